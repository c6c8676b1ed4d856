"""On Flink, what is long or stays for long is held in little: keys of many values, bundles, hosts.

The cluster's sort buffers are about the smallest with which Flink begins our jobs.
"""

import contextlib
import datetime as dt
import fcntl
import shlex
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import Artefacts, pinned
from tests.support import clusters
from tests.support.cluster_commands import tables
from tests.support.clusters import Flink
from tests.support.commands import courier
from tests.support.processes import wait_for
from tests.support.watched_steps import noted
from tests.support.world import DAY_US, DAYS, World

pytestmark = pytest.mark.clusters

MANY = 20_000
KEPT = 3  # copies that nobody uses: what `broadcast` promises
SETTINGS = {"taskmanager.memory.managed.size": "4m"}  # of which each sorter gets a share
WORKERS_END_SOON = "--environment_cache_millis=1000"  # after the last step of their job


@dataclass(frozen=True)
class Host:
    """Is the machine on which workers live: its disk for copies, and what workers note of steps."""

    copies: Path
    notes: Path


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    folder = tmp_path_factory.mktemp("host")
    found = Host(folder / "tmp", folder / "notes")
    for path in (found.copies, found.notes):
        path.mkdir()
    return found


@pytest.fixture(scope="module")
def flink(
    host: Host, warm_python: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Flink]:
    folder = tmp_path_factory.mktemp("flink")
    command = [warm_python, "-m", "tests.support.watched_steps", str(host.notes)]
    start = f"TMPDIR={shlex.quote(str(host.copies))} exec {shlex.join(command)}"
    (python := folder / "python").write_text(f'#!/bin/sh\n{start} "$@"\n')
    python.chmod(0o755)
    with clusters.flink(folder / "cluster", python=str(python), settings=SETTINGS) as cluster:
        yield cluster


# ---- Long bundles and groups ---------------------------------------------------------------------


def log_in_row_groups(folder: Path, artefacts: Artefacts, rows_to_group: int) -> World:
    """Returns a shop whose log of a day has `MANY` rows, in row groups of so many."""
    world = pinned(World(folder / "shop", rows_per_shard=2 * MANY), artefacts)
    start = int(dt.datetime.combine(DAYS[0], dt.time(), dt.UTC).timestamp()) * 1_000_000
    rng = np.random.default_rng(0)
    users, items = rng.integers(1, 100, MANY).tolist(), rng.integers(1, 8, MANY).tolist()
    rows = [
        {
            "user": user, "item": item, "event_time": start + number * (DAY_US // MANY),
            "clicked": number % 10 == 0, "click_time": None,
        }
        for number, (user, item) in enumerate(zip(users, items, strict=True))
    ]  # fmt: skip
    table = world.impressions_table(rows)
    of_file = max(10, rows_to_group)
    parts = [table.slice(at, of_file) for at in range(0, MANY, of_file)]
    world.write("impressions", DAYS[0], parts, rows_to_group)
    return world


def test_twenty_thousand_row_groups_make_the_tables_of_a_few(
    tmp_path: Path, artefacts: Artefacts, flink: Flink, host: Host
) -> None:
    """All users are of one shard, which gets a value of each; each worker has one bundle."""
    command = ("histories", "--ds", str(DAYS[0]))
    few = log_in_row_groups(tmp_path / "few", artefacts, MANY // 4)
    assert courier(few, *command) == 0
    many = log_in_row_groups(tmp_path / "many", artefacts, 1)
    for of_jobs_before in host.notes.iterdir():
        of_jobs_before.unlink()
    assert courier(many, *command, "--", *flink.options) == 0
    assert tables(many) == tables(few)
    bundles = noted(host.notes)
    assert [one.elements for one in bundles["ReadClicks"]] == [MANY // 2, MANY // 2]
    for step in ("AdvanceHistories", "JudgeDay"):
        assert max(one.values for one in bundles[step]) == MANY + 1
    assert {step for step, found in bundles.items() if any(one.grown for one in found)} == set()


# ---- A host that outlasts many jobs ------------------------------------------------------------


def is_open(copy: Path) -> bool:
    """Returns whether a worker, or this test, has opened a copy."""
    with open(copy / "done.json") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_a_host_of_many_nights_keeps_few_copies_but_all_that_are_in_use(
    tmp_path: Path, artefacts: Artefacts, flink: Flink, host: Host
) -> None:
    """It is none that the launcher shares, who would discard its own."""
    assert Path(tempfile.gettempdir()) != host.copies
    world = pinned(World(tmp_path / "shop"), artefacts)
    for stage in ("embed", "item-features", "histories"):
        assert courier(world, stage, "--start-ds", str(DAYS[0]), "--end-ds", str(DAYS[-1])) == 0
    nights = [("float32", day) for day in DAYS] + [("float16", day) for day in DAYS[:2]]
    made = list[Path]()
    with contextlib.ExitStack() as stack:

        def only_the_first_is_open() -> bool:
            return [copy for copy in host.copies.iterdir() if is_open(copy)] == made[:1]

        for dtype, day in nights:
            world.simscore = f'embedding_dtype = "{dtype}"'
            command = ("simscore", "--ds", str(day), "--embeddings-by", "broadcast")
            assert courier(world, *command, "--", *flink.options, WORKERS_END_SOON) == 0
            made += set(host.copies.iterdir()) - set(made)
            if len(made) == 1:  # a long job goes on with it
                fcntl.flock(stack.enter_context(open(made[0] / "done.json")), fcntl.LOCK_SH)
            wait_for(only_the_first_is_open, flink.processes.named["jobmanager"])
        assert len(made) == len(nights)
        assert set(host.copies.iterdir()) == {made[0], *made[-KEPT - 1 :]}
