"""What goes wrong in workers on Flink is told by the command, in the words of this machine."""

import os
import re
import shlex
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Artefacts, pinned
from tests.support import clusters
from tests.support.clusters import Flink
from tests.support.commands import Capture, courier, published
from tests.support.odd_workers import Odd
from tests.support.processes import ROOT
from tests.support.world import DAYS, NORMAL, World, catalogue_items

pytestmark = pytest.mark.clusters

EMBED = ("embed", "--ds", str(DAYS[0]))


@pytest.fixture(scope="module")
def _odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("odd") / "odd.json"


@pytest.fixture
def odd(_odd: Path) -> Path:
    """Gives the file that says in what workers differ: in nothing yet."""
    Odd().write(_odd)
    return _odd


@pytest.fixture(scope="module")
def flink(
    _odd: Path, warm_python: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Flink]:
    folder = tmp_path_factory.mktemp("flink")
    command = shlex.join([warm_python, "-m", "tests.support.odd_workers", str(_odd)])
    (python := folder / "python").write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    python.chmod(0o755)
    with clusters.flink(folder / "cluster", task_managers=1, python=str(python)) as cluster:
        yield cluster


@pytest.fixture
def world(tmp_path: Path, artefacts: Artefacts) -> World:
    return pinned(World(tmp_path / "shop"), artefacts)


def refused(world: World, flink: Flink, python: str) -> tuple[int, str]:
    """Returns the status of EMBED on Flink, which ends ill, and the one paragraph that it tells.

    Java's traces and Python's are nowhere.
    """
    world.settings()
    name, *rest = EMBED
    command = [python, "-m", "pipelines.cli", name, "--config", world.config, *rest, "--"]
    done = subprocess.run(
        [*command, *flink.options], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert "Traceback" not in done.stderr
    assert not re.search(r"^\s*(at|Caused by:) [\w.$]+", done.stderr, re.MULTILINE), done.stderr
    (told,) = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert published(world) == {}
    return done.returncode, told


@pytest.mark.parametrize("lacks", ["", "ReadCatalogue"])
def test_workers_in_other_versions_are_told_before_their_first_element(
    world: World, flink: Flink, odd: Path, warm_python: str, lacks: str
) -> None:
    """Also where such a worker cannot even load what it is sent."""
    Odd(versions={"torch": "1.0", "courier": "0.0.1"}, lacks=lacks).write(odd)
    status, told = refused(world, flink, warm_python)
    assert status == 2
    assert told.startswith(f"Error: The worker on {socket.gethostname()} has other versions")
    assert "courier 0.0.1 (the command's: " in told
    assert "torch 1.0 (the command's: " in told


@pytest.mark.skipif(os.getuid() != 0, reason="only root may start workers of another user")
def test_workers_of_another_user_are_told_with_the_folder_that_they_may_not_use(
    world: World, flink: Flink, odd: Path, warm_python: str
) -> None:
    Odd(user=65534).write(odd)
    status, told = refused(world, flink, warm_python)
    assert status == 1
    start = f"Error: The worker on {socket.gethostname()}, which runs as the user 65534, cannot use"
    assert told.startswith(f"{start} the folder of its job, {world.root}/")
    assert "Give this account access" in told


@pytest.mark.parametrize("broken", ["contract", "image"])
def test_what_breaks_a_contract_there_is_told_as_here(
    world: World, flink: Flink, odd: Path, warm_python: str, broken: str, capsys: Capture
) -> None:
    if broken == "contract":
        items = catalogue_items(DAYS[0])
        world.write_catalogue(DAYS[0], [*items, items[0]])
    else:
        for number in NORMAL:
            world.put(number, b"<html>not found</html>")
    here = courier(world, *EMBED)
    (expected,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("Error: ")]
    assert here == {"contract": 1, "image": 3}[broken]
    assert refused(world, flink, warm_python) == (here, expected)


def test_a_bug_there_is_told_in_a_paragraph_that_says_where_its_trace_is(
    world: World, flink: Flink, odd: Path, warm_python: str
) -> None:
    Odd(bug="no such layer").write(odd)
    status, told = refused(world, flink, warm_python)
    assert status == 1
    assert "failed: ValueError: no such layer" in told
    trace = Path(told.rpartition(" said of it is in ")[2].removesuffix(".")).read_text()
    assert "Traceback (most recent call last)" in trace
    assert "odd_workers.py" in trace
