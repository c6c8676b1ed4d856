"""A backfill is killed with signal 9 again and again, or meets others, and no reader sees it.

The real command runs in processes of its own, on a disk and in a bucket, while a reader polls.
Numbers of kills and of versions read are printed (`pytest -s`).
"""

import contextlib
import random
import shutil
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from feature_jobs.store import files, partitions
from pipelines.running.layout import Layout
from pipelines.stages import NIGHT
from tests.conftest import Artefacts
from tests.support.any_order import DAYS, Inputs, Key
from tests.support.buckets import upload
from tests.support.ordered_shop import RealShop, read_listed

KILLS = 20
NIGHTS = DAYS[:3]
BACKFILL = ["backfill", "--start-ds", NIGHTS[0], "--end-ds", NIGHTS[-1], "--step-days", 2]
BUSY = "Another run is writing the same tables of the same day"
_OF_CONTENT = ("version", "files", "run_id", "made_from")


class Reader:
    """Reads all tables again and again: each whole, of a version, and never of an earlier one."""

    def __init__(self, layout: Layout):
        self._layout = layout
        self.versions: dict[Key, list[str]] = {}
        self.read = 0

    def poll(self) -> None:
        for table in (table for kind in NIGHT for table in kind.tables):
            for ds in NIGHTS:
                found = partitions.find_published(self._layout.folder(table, ds))
                if found is None:
                    continue
                with contextlib.suppress(FileNotFoundError):  # to be asked again
                    read_listed(found)
                    self._note((table.name, ds), found.version)

    def _note(self, key: Key, version: str) -> None:
        self.read += 1
        seen = self.versions.setdefault(key, [])
        if seen[-1:] != [version]:
            assert version not in seen, f"{key} went back to {version}"
            seen.append(version)


class Process:
    """Is a command in a process of its own."""

    def __init__(self, python: str, shop: RealShop, args: list[Any]):
        command, *rest = map(str, args)
        line = [python, "-m", "pipelines.cli", command, "--config", str(shop.config), *rest]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(line, stdout=pipe, stderr=subprocess.STDOUT, text=True)

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()  # which ends when the process does

    def end(self) -> tuple[int, str]:
        """Waits; returns its status and what it told."""
        told, _ = self._process.communicate()
        return self._process.returncode, told


@pytest.fixture
def shop(tmp_path: Path, artefacts: Artefacts) -> RealShop:
    """Makes three nights of a shop whose catalogues and logs have changed since."""
    folder = tmp_path / "shop"
    folder.mkdir()
    inputs = Inputs()
    made = RealShop(folder, artefacts, inputs)
    assert made.run("refresh", "--start-ds", NIGHTS[0], "--end-ds", NIGHTS[-1]) == 0, made.told
    for ds in NIGHTS:
        inputs.catalogues[ds] = inputs.catalogues[ds].after("replaced")
        inputs.logs[ds] = inputs.logs[ds].after("late rows")
    made.write_inputs()
    shutil.copytree(made.root, folder / "before")
    return made


@pytest.fixture(params=["disk", "bucket"])
def root(request: pytest.FixtureRequest, shop: RealShop) -> str:
    """Names a root on a disk or in a bucket."""
    if request.param == "disk":
        return "killed"
    return f"{request.getfixturevalue('bucket')}/killed"


def test_a_backfill_killed_twenty_times_ends_as_if_undisturbed_and_no_reader_saw_it(
    shop: RealShop, root: str, artefacts: Artefacts, warm_python: str
) -> None:
    rng, counts = random.Random(0), Counter[str]()
    started = time.monotonic()
    status, told = Process(warm_python, shop, BACKFILL).end()
    assert status == 0, told
    seconds = time.monotonic() - started
    expected = made_of(shop)

    killed = RealShop(shop.folder, artefacts, shop.inputs, root)
    while counts["killed"] < KILLS:
        put_back(shop, killed.root)
        reader, is_over = Reader(killed.settings.layout), False
        while not is_over:
            process = Process(warm_python, killed, BACKFILL)
            publishing = rng.random() < 0.5 and counts["killed"] < KILLS
            until = time.monotonic() + rng.random() * seconds * (2 if publishing else 0.5)
            before = {key: seen[:] for key, seen in reader.versions.items()}
            while process.is_running:
                reader.poll()
                time.sleep(0.01)  # the command is to have the processor
                is_due = time.monotonic() > until or (publishing and reader.versions != before)
                if counts["killed"] < KILLS and is_due:
                    process.kill()
                    counts["killed"] += 1
                    break
            else:
                status, told = process.end()
                assert status == 0, told
                is_over = True
        reader.poll()
        assert made_of(killed) == expected
        counts["backfills"] += 1
        counts["versions read"] += reader.read
        assert {len(seen) for seen in reader.versions.values()} <= {1, 2}
    print(f"\n{dict(counts)}, no mixture, no step back")  # noqa: T201


@pytest.mark.parametrize("root", ["disk"], indirect=True)
def test_of_runs_at_once_each_partition_is_made_by_one(
    shop: RealShop, root: str, artefacts: Artefacts, warm_python: str
) -> None:
    """Two refreshes and a backfill of overlapping days end well, or say that another is at work.

    Which of them comes first says what a day goes on from, and in this shop not what it holds.
    """
    assert shop.run(*BACKFILL) == 0, shop.told
    expected = versions_of(shop)
    both = RealShop(shop.folder, artefacts, shop.inputs, root)
    reader = Reader(both.settings.layout)
    spans = [NIGHTS[:2], NIGHTS[1:]]
    commands = [["refresh", "--start-ds", days[0], "--end-ds", days[-1]] for days in spans]
    left = [BACKFILL, *commands]
    while left:
        processes = [Process(warm_python, both, args) for args in left]
        while any(process.is_running for process in processes):
            reader.poll()
            time.sleep(0.01)
        ended = [process.end() for process in processes]
        assert all(status == 0 or (status == 1 and BUSY in told) for status, told in ended), ended
        left = [args for args, (status, _) in zip(left, ended, strict=True) if status]
    reader.poll()
    assert versions_of(both) == expected
    assert {len(seen) for seen in reader.versions.values()} == {1}
    assert {manifest.get("publication", 1) for manifest in manifests(both)} == {1}


def put_back(shop: RealShop, root: str) -> None:
    """Makes what lies below `root` what was published before the range."""
    files.delete_tree(root)
    if files.is_remote(root):
        upload(shop.folder / "before", root)
    else:
        shutil.copytree(shop.folder / "before", root)


def made_of(shop: RealShop) -> dict[Any, Any]:
    """Returns what each manifest says of files and run, and what each night's record names."""
    found: dict[Any, Any] = {
        (manifest["table"], manifest["ds"]): [manifest[name] for name in _OF_CONTENT]
        for manifest in manifests(shop)
    }
    for ds in NIGHTS:
        record = shop.record(ds)
        assert record
        found["night", ds] = {name: entry["version"] for name, entry in record["tables"].items()}
    return found


def versions_of(shop: RealShop) -> dict[Key, str]:
    return {(one["table"], one["ds"]): one["version"] for one in manifests(shop)}


def manifests(shop: RealShop) -> list[dict[str, Any]]:
    folder = shop.settings.layout.folder
    tables = [table for kind in NIGHT for table in kind.tables]
    found = [partitions.open_published(folder(table, ds)) for table in tables for ds in NIGHTS]
    return [partition.manifest for partition in found]
