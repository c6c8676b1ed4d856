"""Runs commands in-process on a tiny world, and finds what they published and told."""

import datetime as dt
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from feature_jobs.items import embed as embed_stage
from feature_jobs.store.local import LocalStore
from pipelines import nightly
from pipelines.cli import main
from pipelines.config import Settings
from pipelines.running.states import Night
from tests.support.world import World

Capture = pytest.CaptureFixture[str]


def courier(world: World, *args: str) -> int:
    world.settings()
    command, *rest = args
    return main([command, "--config", str(world.config), *rest])


def refresh(world: World, day: dt.date, *args: str) -> int:
    return courier(world, "refresh", "--ds", str(day), *args)


def published(world: World) -> dict[str, bytes]:
    """Returns every file that a reader may look at, with its bytes."""
    return published_below(world.root)


def published_below(root: Path) -> dict[str, bytes]:
    """Returns every published file, with its bytes; records of nights without their times."""
    files = [p for p in root.rglob("*") if p.is_file()]
    hidden = ("_staging", "_runs")
    return {
        str(p.relative_to(root)): _without_times(p)
        for p in files
        if not set(hidden) & set(p.relative_to(root).parts)
    }


def _without_times(path: Path) -> bytes:
    """Returns the bytes of a file; what a record of a night has of the time of a run is left out.

    That is the digest of a whole record, too.
    """
    if path.parent.name != "_nights":
        return path.read_bytes()
    times = rb'\n *"(published_at|record)": "[^"]*",?'
    return re.sub(times, b"", path.read_bytes())


def make_night(
    settings: Settings, ds: dt.date, say: Callable[[str], None] = lambda _: None
) -> None:
    """Plans a night and makes it, without a command."""
    finish(nightly.plan_nights(settings, [ds], settings.night), say)


def finish(nights: Sequence[Night], say: Callable[[str], None] = lambda _: None) -> None:
    """Makes nights that are planned; raises the first of what refuses one."""
    for refused in nightly.make_nights(nights, [], say)[1]:
        raise refused.error


def counts(world: World, table: str, day: dt.date) -> dict[str, Any]:
    return manifest(world, table, day)["counts"]


def embed_work(world: World, day: dt.date) -> dict[str, Any]:
    """Returns what the newest run of a day that made embeddings noted of its work, and counts."""
    paths = (world.root / "test/_runs" / f"ds={day}").rglob("run.json")
    path = max(paths, key=lambda path: path.stat().st_mtime_ns)
    stage = json.loads(path.read_text())["stages"]["embed"]
    return {**stage["counts"], **stage["work"]}


def manifest(world: World, table: str, day: dt.date) -> dict[str, Any]:
    path = world.root / "test" / table / f"ds={day}" / "_manifest.json"
    return json.loads(path.read_text())


def status(world: World, capsys: Capture, *args: str) -> tuple[int, str]:
    """Runs `courier status`; returns its exit status, and what it told as if in one line."""
    capsys.readouterr()
    ended = courier(world, "status", *args)
    return ended, " ".join(capsys.readouterr().out.split())


def paragraph(capsys: Capture) -> str:
    """Returns the error that was told, once it is seen to be one paragraph and no traceback."""
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    (told,) = [line for line in errors.splitlines() if line.startswith("Error: ")]
    return told


def vectors(world: World, day: dt.date) -> dict[int, list[float]]:
    rows = world.table("item_embeddings", day)
    return dict(zip(rows["item_id"].to_pylist(), rows["embedding"].to_pylist(), strict=True))


def rewrite(world: World, day: dt.date, change: Callable[[pa.Table], pa.Table]) -> None:
    for path in (world.folder / "impressions" / f"ds={day}").glob("*.parquet"):
        pq.write_table(change(pq.read_table(path, partitioning=None)), path)


def given_to_the_encoder(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns a list that gets the items whose images are read from now on, as they are."""
    items: list[int] = []
    real = embed_stage.embed_images

    def count(rows: pa.Table, *args: Any) -> pa.Table:
        items.extend(rows["item_id"].to_pylist())
        return real(rows, *args)

    monkeypatch.setattr(embed_stage, "embed_images", count)
    return items


class Killed(Exception):
    """Stands for a process that ends here."""


def die_at_write(patch: pytest.MonkeyPatch, at: int | None) -> list[str]:
    """Returns a list that gets the files written from now on, as they are.

    Raises Killed instead of writing the one numbered `at`.
    """
    written: list[str] = []

    def dying(real: Callable) -> Callable:
        def write(store: LocalStore, path: str, *args: Any) -> Any:
            if len(written) == at:
                raise Killed(path)
            if "progress" not in path:  # heartbeats follow the clock
                written.append(path)
            return real(store, path, *args)

        return write

    for name in ("atomic_writer", "write_bytes"):
        patch.setattr(LocalStore, name, dying(getattr(LocalStore, name)))
    return written
