"""What is killed with signal 9 on a cluster costs a command, or a try of its job, and no row."""

import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Artefacts, pinned
from tests.support import clusters
from tests.support.cluster_commands import Command, held_python, states, tables
from tests.support.clusters import Flink
from tests.support.commands import courier, published
from tests.support.held_embed import Hold
from tests.support.world import DAYS, Kept, World

pytestmark = pytest.mark.clusters

DS = ("--ds", str(DAYS[0]))
RETRIES = ("--number_of_execution_retries=3", "--execution_retry_delay=1000")


@pytest.fixture(scope="module")
def _hold(tmp_path_factory: pytest.TempPathFactory) -> Hold:
    return Hold(str(tmp_path_factory.mktemp("hold") / "hold"))


@pytest.fixture
def hold(_hold: Hold) -> Iterator[Hold]:
    yield _hold
    _hold.end()


@pytest.fixture(scope="module")
def flink(
    _hold: Hold, warm_python: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Flink]:
    folder = tmp_path_factory.mktemp("flink")
    python = held_python(folder, warm_python, _hold)
    with clusters.flink(folder / "cluster", python=python) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def shops(
    tmp_path_factory: pytest.TempPathFactory, artefacts: Artefacts
) -> dict[str, tuple[Kept, dict[str, bytes]]]:
    """Returns for each command the shop before it, and what this machine publishes by it."""
    world = pinned(World(tmp_path_factory.mktemp("local") / "shop", rows_per_shard=4), artefacts)
    found = {}
    for stage in ("embed", "item-features", "histories", "simscore"):
        before = Kept(world, f"before-{stage}")
        assert courier(world, stage, *DS) == 0
        found[stage] = before, published(world)
        assert len(tables(world)) > 2
    return found


def paragraph(command: Command) -> str:
    """Returns the error that was told, once it is seen to be one paragraph and no traceback."""
    assert "Traceback" not in command.told
    (told,) = [line for line in command.told.splitlines() if line.startswith("Error: ")]
    return told


@pytest.mark.parametrize("stage", ["embed", "simscore"])
def test_a_killed_task_manager_costs_the_command_which_goes_on_when_repeated(
    stage: str, shops, flink: Flink, hold: Hold, warm_python: str
) -> None:
    kept, expected = shops[stage]
    world = kept.again()
    untouched, known = published(world), states(flink)
    hold.begin()
    command = Command(world, flink.options, warm_python, stage, *DS)
    command.wait_until(hold.is_waited_for)
    name = flink.processes.running("taskmanager")[0]
    flink.processes.named[name].kill()
    assert command.end() == 1
    (job,) = states(flink, known)
    print(command.told)
    print(hold.made())
    finished = hold.made()
    told = paragraph(command)
    assert f"The job {job} on {flink.url} failed: " in told
    assert name in told
    assert published(world) == untouched
    flink.start_task_manager()
    flink.wait()
    hold.end()
    again = Command(world, flink.options, warm_python, stage, *DS)
    assert again.end() == 0, again.told
    assert published(world) == expected
    times = Counter(hold.made())
    print(times)
    assert all(times[one] == 1 for one in finished)
    assert len(times) > len(finished)


def test_retries(shops, flink: Flink, hold: Hold, warm_python: str) -> None:
    stage = "embed"
    kept, expected = shops[stage]
    world = kept.again()
    hold.begin()
    command = Command(world, [*flink.options, *RETRIES], warm_python, stage, *DS)
    command.wait_until(hold.is_waited_for)
    name = flink.processes.running("taskmanager")[0]
    flink.processes.named[name].kill()
    flink.start_task_manager()
    finished = hold.made()
    hold.end()
    status = command.end()
    print(command.told)
    assert status == 0
    assert published(world) == expected
    times = Counter(hold.made())
    print(times, finished)
    assert all(times[one] == 1 for one in finished)
