"""Makes a shop's training rows, copies shops, and runs the tests' one small `courier train`."""

import datetime as dt
import json
import shutil
from pathlib import Path

from feature_jobs.store import files
from tests.support.commands import courier
from tests.support.world import DAYS, SCOPE, World

D = DAYS[3]
SECTION = f"[training]\ncategories = {json.dumps(SCOPE)}\nrequest_gap_seconds = 1800\n"
OPTIONS = (
    "--until", str(D), "--preset", "demo", "--backbone", "shufflenet_v2_x0_5", "--epochs", "4",
    "--batch-rows", "16", "--evaluate-every", "4", "--name", "tiny",
)  # fmt: skip


def make_rows(world: World, first: dt.date, last: dt.date) -> int:
    return courier(world, "training-rows", "--start-ds", str(first), "--end-ds", str(last))


def at(folder: Path) -> World:
    """Returns the world that lies in a folder already."""
    world = World.__new__(World)
    world.folder, world.ids, world.rows_per_shard = folder, "int", 1000
    world.extra_settings, world.pins = SECTION, []
    return world


def copied(folder: Path, to: Path) -> World:
    shutil.copytree(folder, to / "shop")
    return at(to / "shop")


def rows_of(world: World, day: dt.date) -> Path:
    return world.root / "shared" / "training_rows" / f"ds={day}"


def copied_until_d(folder: Path, to: Path) -> World:
    """Copies a shop, leaving of its rows those of days before D."""
    world = copied(folder, to)
    files.delete_tree(str(rows_of(world, D)))
    return world


def train(world: World, *args: str) -> int:
    return courier(world, "train", *OPTIONS, *args)
