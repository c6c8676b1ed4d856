"""Makes a tiny shop whose answers are known by construction or by the loops of `oracles`.

Four days. Every kind of item and of impression that has a law of its own is in it: see `ITEMS`.
"""

import copy
import datetime as dt
import io
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageDraw

from courier_model.encoder import build_encoder, embed, load_encoder, save_encoder
from courier_model.images import decode
from courier_model.projection import EMBEDDING_DIM
from feature_jobs.codebooks.codebook import save_codebook
from feature_jobs.schemas import TABLES
from pipelines.config import Settings, load_settings
from tests.support.codebooks import by_hand

DAYS = tuple(dt.date(2026, 3, day) for day in (1, 2, 3, 4))
SCOPE = ("dress", "shirt")
NORMAL = (1, 2, 3, 4, 5, 6)
LEAVES_ON_DAY_2 = 7  # and its file is deleted
NEW_ON_DAY_2 = 8
SAME_BYTES_AS_1 = 9
MISSING, UNDECODABLE = 10, 11
OUT_OF_SCOPE, WITHOUT_CATEGORY = 12, 13
UNKNOWN = 99
SILENT_USER = 6  # never clicks
CLUSTERS = 4
NUMBERS = {"main": np.array([2, 3, 5, 9], np.int32), "coarse": np.array([1, 4], np.int32)}
CPU = torch.device("cpu")
DAY_US = 86_400_000_000


@dataclass
class World:
    """Makes a shop on disk; `ids` is "int" or "string", the type of both kinds of ID."""

    folder: Path
    ids: str = "int"
    rows_per_shard: int = 10
    extra_settings: str = ""
    simscore: str = 'columns = ["history_item_ids"]'
    gates: str = "balance.fail = 1.0\ndead_clusters.fail = 1.0"
    pins: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("images", "catalogue", "impressions"):
            (self.folder / name).mkdir(parents=True)
        for day in DAYS:
            self.write_images(day)
            self.write_catalogue(day, catalogue_items(day))
        for number, day in enumerate(DAYS):
            self.write_impressions(day, draw_impressions(day, seed=number))
        self.undo_images()

    # -- the shop's tables --

    def item(self, number: int) -> Any:
        return f"item-{number}" if self.ids == "string" else number

    def user(self, number: int) -> Any:
        return f"user-{number}" if self.ids == "string" else number

    def write_catalogue(self, day: dt.date, items: list[int]) -> None:
        """Writes a day's catalogue: two files, three rows to a row group, not sorted."""
        rows = pa.table(
            {
                "item_id": [self.item(i) for i in reversed(items)],
                "image_uri": [image_uri(i) for i in reversed(items)],
                "category": pa.array([category(i) for i in reversed(items)], pa.string()),
            }
        )
        self.write("catalogue", day, [rows.slice(0, 5), rows.slice(5)], rows_to_group=3)

    def write_impressions(self, day: dt.date, rows: list[dict[str, Any]]) -> None:
        """Writes a day's impressions: three files, sixteen rows to a row group, as given."""
        table = self.impressions_table(rows)
        third = len(rows) // 3
        parts = [table.slice(0, third), table.slice(third, third), table.slice(2 * third)]
        self.write("impressions", day, parts, rows_to_group=16)

    def impressions_table(self, rows: list[dict[str, Any]]) -> pa.Table:
        time = pa.timestamp("us", tz="UTC")
        return pa.table(
            {
                "user_id": [self.user(r["user"]) for r in rows],
                "item_id": [self.item(r["item"]) for r in rows],
                "event_time": pa.array([r["event_time"] for r in rows], pa.int64()).cast(time),
                "clicked": pa.array([r["clicked"] for r in rows], pa.bool_()),
                "click_time": pa.array([r["click_time"] for r in rows], pa.int64()).cast(time),
            }
        )

    def write(self, table: str, day: dt.date, parts: list[pa.Table], rows_to_group: int) -> None:
        folder = self.folder / table / f"ds={day}"
        folder.mkdir(exist_ok=True)
        for old in folder.iterdir():
            old.unlink()
        for number, part in enumerate(parts):
            pq.write_table(part, folder / f"{number}.parquet", row_group_size=rows_to_group)
        (folder / "_SUCCESS").touch()

    # -- images --

    def image(self, number: int) -> Path:
        return self.folder / "images" / image_uri(number)

    def write_images(self, day: dt.date) -> None:
        """Writes images as they are on `day`, with file times that change only with the bytes."""
        for number in {*NORMAL, LEAVES_ON_DAY_2, NEW_ON_DAY_2, OUT_OF_SCOPE, WITHOUT_CATEGORY}:
            self.put(number, picture(number))
        self.put(SAME_BYTES_AS_1, picture(1))
        self.put(UNDECODABLE, b"<html>not found</html>")
        if day >= DAYS[1]:
            self.image(LEAVES_ON_DAY_2).unlink(missing_ok=True)

    def undo_images(self) -> None:
        self.write_images(DAYS[0])

    def put(self, number: int, data: bytes) -> None:
        path = self.image(number)
        if not path.exists() or path.read_bytes() != data:
            path.write_bytes(data)
            os.utime(path, ns=(10**18, 10**18))

    # -- settings and artefacts --

    @property
    def config(self) -> Path:
        return self.folder / "courier.toml"

    @property
    def root(self) -> Path:
        return self.folder / "features"

    def settings(self) -> Settings:
        self.config.write_text(
            'root = "features"\nfeature_set = "test"\nhistory_len = 5\nwindow_days = 2\n'
            f"rows_per_shard = {self.rows_per_shard}\n{self.extra_settings}\n"
            '[catalogue]\npath = "catalogue/ds={ds}/*.parquet"\nimage_roots = ["images"]\n'
            '[impressions]\npath = "impressions/ds={ds}/*.parquet"\n'
            "[embed]\nbatch_size = 4\nchunk_items = 3\n"
            "[item_features]\nvector = true\nsecond_distance = true\n"
            "[simscore]\n"
            f"{self.simscore}\n"
            "[gates]\nrejects.fail = 0.5\nunknown_items.fail = 0.5\n"
            f"{self.gates}\n" + "".join(self.pins)
        )
        return load_settings(str(self.config))

    def pin(self, from_ds: dt.date, encoder: str, codebook: str | None = None) -> None:
        extra = f"codebook = '{codebook}'\n" if codebook else ""
        self.pins.append(f"[[pins]]\nfrom_ds = {from_ds}\nencoder = '{encoder}'\n{extra}")

    def table(self, name: str, day: dt.date) -> pa.Table:
        """Reads a published table as a user does: by its plain path."""
        top = "shared" if TABLES[name].shared else "test"
        return pq.read_table(self.root / top / name / f"ds={day}", partitioning=None)


class Kept:
    """Keeps a world as it is now, and brings it back for one test after another.

    It is always in the same place: what is published says which folders it was made from.
    """

    def __init__(self, world: Any, name: str = "kept"):
        self._world, self._copy = copy.deepcopy(world), world.folder.with_name(name)
        shutil.copytree(world.folder, self._copy)

    def again(self) -> Any:
        shutil.rmtree(self._world.folder)
        shutil.copytree(self._copy, self._world.folder)
        return copy.deepcopy(self._world)


def image_uri(number: int) -> str:
    return f"{number}.png"


def category(number: int) -> str | None:
    if number == WITHOUT_CATEGORY:
        return None
    return "cable" if number == OUT_OF_SCOPE else SCOPE[number % 2]


def catalogue_items(day: dt.date) -> list[int]:
    always = [*NORMAL, SAME_BYTES_AS_1, MISSING, UNDECODABLE, OUT_OF_SCOPE, WITHOUT_CATEGORY]
    return [*always, LEAVES_ON_DAY_2 if day < DAYS[1] else NEW_ON_DAY_2]


def picture(number: int, size: int = 40) -> bytes:
    """Draws a PNG that differs from every other in colour and shape."""
    rng = np.random.default_rng(number)
    colour, ground = (tuple(int(c) for c in rng.integers(0, 256, 3)) for _ in range(2))
    image = Image.new("RGB", (size, size + number), ground)
    draw = ImageDraw.Draw(image)
    box = (5, 5, 10 + 2 * number, 35)
    (draw.ellipse if number % 2 else draw.rectangle)(box, fill=colour)
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def draw_impressions(day: dt.date, seed: int, count: int = 150) -> list[dict[str, Any]]:
    """Draws impressions on a coarse grid of times, so that ties, repeats and equal rows are common.

    Some are late (an event of the day before), some clicks have no time of their own, some happen
    after midnight, and one user never clicks.
    """
    rng = np.random.default_rng(seed)
    start = int(dt.datetime.combine(day, dt.time(), dt.UTC).timestamp()) * 1_000_000
    items = [*catalogue_items(DAYS[0]), NEW_ON_DAY_2, UNKNOWN]
    step = DAY_US // 48
    rows = []
    for _ in range(count):
        late = rng.random() < 0.05
        event = start + int(rng.integers(0, 48)) * step - (DAY_US if late else 0)
        user = int(rng.integers(1, SILENT_USER + 1))
        clicked = bool(rng.random() < 0.5) and user != SILENT_USER
        timed = clicked and rng.random() < 0.8
        click = event + int(rng.integers(0, 3)) * step if timed else None
        item = int(items[rng.integers(0, len(items))])
        rows.append(
            {
                "user": user,
                "item": item,
                "event_time": event,
                "clicked": clicked,
                "click_time": click,
            }
        )
    return [*rows, rows[0], rows[0]]  # equal rows are kept, one for one


def make_encoder(
    folder: Path, seed: int = 0, categories: tuple[str, ...] | None = SCOPE, name: str = "tiny",
    dimension: int = EMBEDDING_DIM,
) -> str:  # fmt: skip
    """Makes a small encoder package with random weights; returns its folder."""
    encoder = build_encoder("shufflenet_v2_x0_5", "random", 32, seed, dimension)
    info = save_encoder(
        encoder, str(folder), name, categories, data_start_ds=None, data_end_ds=None,
        weights="random",
    )  # fmt: skip
    return str(folder / info.encoder_id)


def make_codebook(folder: Path, encoder: str, data_ds: str = "2026-02-28") -> str:
    """Makes a codebook whose centres are four of the world's images; returns its folder.

    Two of them are the coarse centres as well.
    """
    network = load_encoder(encoder)
    pixels = [decode(picture(n), network.preprocessing) for n in (1, 2, 3, 12)]
    centres = embed(network, np.stack(pixels), CLUSTERS, CPU, "fp32")
    encoder_id = os.path.basename(encoder)
    by_label = {"main": centres, "coarse": centres[:2]}
    return save_codebook(str(folder), by_hand(by_label, NUMBERS, encoder_id, data_ds))
