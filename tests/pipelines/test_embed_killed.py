"""`courier embed` can be killed with signal 9 at any moment, and resumed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa

from tests.conftest import Artefacts, pinned
from tests.support.commands import courier
from tests.support.world import DAYS, World, image_uri, picture

KILLS = 20


def test_a_run_killed_twenty_times_at_random_moments_publishes_the_same_bytes(
    tmp_path: Path, artefacts: Artefacts
) -> None:
    """The second day has images as they were, new, changed, repeated, broken and missing."""
    world = pinned(World(tmp_path / "shop"), artefacts)
    world.gates += "\noutage.fail = 1.0"
    for item in range(100, 180):
        if item % 10:
            bad = item % 10 == 1
            world.put(item, b"<html></html>" if bad else picture(item - item % 3))
    write_catalogue(world, 0, range(100, 130))
    assert courier(world, "embed", "--ds", str(DAYS[0])) == 0
    for item in range(102, 106):
        world.put(item, picture(item + 100))
    write_catalogue(world, 1, range(101, 180))

    command = [sys.executable, "-m", "tests.support.kill_nine", str(world.config), str(DAYS[1])]
    done = subprocess.run(
        [*command, str(KILLS), "0"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["chunks"] >= 12, found
    assert found["killed"] == KILLS, found
    assert found["mismatches"] == 0, found
    assert found["resumed_from_chunks"] >= 5, found


def write_catalogue(world: World, number: int, items: range) -> None:
    rows = pa.table(
        {
            "item_id": list(items),
            "image_uri": [image_uri(item) for item in items],
            "category": ["dress"] * len(items),
        }
    )
    world.write("catalogue", DAYS[number], [rows.slice(0, 30), rows.slice(30)], rows_to_group=20)
