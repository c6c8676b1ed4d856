"""Makes a shop that `courier init` looks at for the first time, and reads what it finds there."""

import datetime as dt
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipelines import config
from pipelines.first_look.look import FirstLook, look, write_settings

DAYS = ("2026-01-05", "2026-01-06", "2026-01-07")
ITEMS = 100
SECRET_USER = 987654321
UTC = pa.timestamp("us", tz="UTC")


def catalogue(**changed: Any) -> dict[str, Any]:
    """Returns columns of a catalogue without a fault; None takes a column away."""
    columns = {
        "item_id": pa.array(range(ITEMS)),
        "image_uri": pa.array([f"{i}.png" for i in range(ITEMS)]),
        "category": pa.array([("hat", "shoe")[i % 2] for i in range(ITEMS)]),
    } | changed
    return {name: column for name, column in columns.items() if column is not None}


def impressions(
    ds: str, hour: float = 0, zone: str | None = "UTC", **changed: Any
) -> dict[str, Any]:
    """Returns columns of a day of impressions without a fault, its 24 hours from `hour` on."""
    midnight = dt.datetime.fromisoformat(ds) + dt.timedelta(hours=hour)
    times = [midnight + dt.timedelta(minutes=12 * i) for i in range(120)]
    columns = {
        "user_id": pa.array([SECRET_USER + i % 7 for i in range(120)]),
        "item_id": pa.array([i % ITEMS for i in range(120)]),
        "event_time": pa.array(times, pa.timestamp("us")).cast(pa.timestamp("us", tz=zone)),
        "clicked": pa.array([i % 5 == 0 for i in range(120)]),
    } | changed
    return {name: column for name, column in columns.items() if column is not None}


def write(path: Path, columns: Mapping[str, Any], **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(dict(columns)), path, **options)


@dataclass
class Shop:
    """Makes a shop on disk: a catalogue and impressions of three days, and an image per item."""

    folder: Path
    catalogue: dict[str, Any] = field(default_factory=catalogue)
    impressions: dict[str, Any] = field(default_factory=dict)  # changed columns
    catalogue_path: str = "catalogue/dt={ds}/*.parquet"
    impressions_path: str = "impressions/dt={ds}/*.parquet"

    def write(self, days: Sequence[str] = DAYS) -> "Shop":
        for ds in days:
            write(self.folder / f"catalogue/dt={ds}/part-0.parquet", self.catalogue)
            events = impressions(ds, **self.impressions)
            # Several row groups, so that the look has some to choose from.
            write(self.folder / f"impressions/dt={ds}/part-0.parquet", events, row_group_size=50)
        return self

    def look(self, *roots: str) -> FirstLook:
        folder = str(self.folder)
        return look(
            f"{folder}/{self.catalogue_path}", f"{folder}/{self.impressions_path}", roots, folder
        )

    def settings(self, first: FirstLook) -> config.Settings:
        path = self.folder / "courier.toml"
        write_settings(str(path), first.toml)
        return config.load_settings(str(path))


def draw(folder: Path, items: int = ITEMS) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(items):
        Image.new("RGB", (8, 8), (i, 2 * i, 100)).save(folder / f"{i}.png")


def problems(first: FirstLook) -> list[str]:
    """Returns the problems that were found.

    Checks what holds for every finding besides: one paragraph, and no user ID.
    """
    for finding in first.findings:
        assert "\n" not in finding.text
        assert not re.search(rf"{SECRET_USER // 10}\d", finding.text)
    return [finding.text for finding in first.findings if finding.level == "problem"]


def only_problem(first: FirstLook) -> str:
    found = problems(first)
    assert len(found) == 1, found
    return found[0]


def noted(first: FirstLook, *words: str) -> bool:
    texts = [finding.text for finding in first.findings if finding.level == "note"]
    return any(all(word in text for word in words) for text in texts)
