"""What is killed with signal 9 on a cluster costs a command, or a try of its job, and no row."""

import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Artefacts, pinned
from tests.support import clusters
from tests.support.cluster_commands import Command, held_python, states, tables
from tests.support.clusters import Flink, Spark
from tests.support.commands import courier, embed_work, published
from tests.support.held_embed import Hold
from tests.support.world import DAYS, UNDECODABLE, Kept, World

pytestmark = pytest.mark.clusters

DS = ("--ds", str(DAYS[0]))
# A worker that was killed would be asked again by a new try while it is kept: by default for 10 s.
SOON_FORGOTTEN = "--environment_cache_millis=500"
SETTINGS = {
    "no restarts": {"rest.retry.delay": "100"},  # the job server asks 20 times for a job manager
    "restarts": {
        "restart-strategy.type": "fixed-delay",
        "restart-strategy.fixed-delay.attempts": "5",
        "restart-strategy.fixed-delay.delay": "2 s",
    },
}


@pytest.fixture(scope="module")
def flink(
    request: pytest.FixtureRequest,
    _hold: Hold,
    warm_python: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Flink]:
    folder = tmp_path_factory.mktemp("flink")
    python = held_python(folder, warm_python, _hold)
    settings = SETTINGS[request.param]
    with clusters.flink(folder / "cluster", python=python, settings=settings) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def spark(
    _hold: Hold, warm_python: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Spark]:
    folder = tmp_path_factory.mktemp("spark")
    python = held_python(folder, warm_python, _hold)
    with clusters.spark(folder / "cluster", python=python) as cluster:
        yield cluster


class Shop:
    """Holds a shop before a command, and what this machine publishes by it."""

    def __init__(self, world: World, stage: str):
        self._before = Kept(world, f"before-{stage}")
        earlier = tables(world).keys()
        assert courier(world, stage, *DS) == 0
        self.expected = published(world)
        assert tables(world).keys() - earlier
        self.embedded = embedded(world) if stage == "embed" else {}

    def again(self) -> World:
        world: World = self._before.again()
        return world


@pytest.fixture(scope="module")
def shops(tmp_path_factory: pytest.TempPathFactory, artefacts: Artefacts) -> dict[str, Shop]:
    folder = tmp_path_factory.mktemp("local") / "shop"
    world = pinned(World(folder, rows_per_shard=10), artefacts)
    return {
        stage: Shop(world, stage) for stage in ("embed", "item-features", "histories", "simscore")
    }


def embedded(world: World) -> dict[str, Any]:
    """Returns what the record of a run says of its images, seconds aside."""
    work = embed_work(world, DAYS[0])
    return {name: count for name, count in work.items() if not name.endswith("_seconds")}


def kill(what: str, flink: Flink, hold: Hold) -> str:
    """Kills a process of the cluster; returns by which words the operator is told of it."""
    if what == "worker":
        os.kill(hold.workers()[0], signal.SIGKILL)
        return "a worker ended in the midst of its work"
    name = flink.processes.running(what)[0]
    flink.processes.named[name].kill()
    return name if what == "taskmanager" else "Flink gives no answer there any more"


def start(what: str, flink: Flink) -> None:
    """Starts another one in place of what was killed; a worker starts with the next job."""
    if what == "taskmanager":
        flink.start_task_manager()
    elif what == "jobmanager":
        flink.start_job_manager()
    flink.wait()


def paragraph(command: Command) -> str:
    """Returns the error that was told, once it is seen to be one paragraph and no traceback."""
    assert "Traceback" not in command.told
    (told,) = [line for line in command.told.splitlines() if line.startswith("Error: ")]
    return told


def assert_made_once(hold: Hold, finished: list[int]) -> None:
    """Asserts that nothing of what was finished before a kill was made again, and more was made.

    Another command looks at a reject again: someone may have mended the file.
    """
    times = Counter(hold.made())
    assert finished
    assert [one for one in finished if times[one] != 1 and one != UNDECODABLE] == []
    assert len(times) > len(finished)


@pytest.mark.parametrize("flink", ["no restarts"], indirect=True)
@pytest.mark.parametrize(
    ("stage", "what"),
    [
        ("embed", "taskmanager"),
        ("simscore", "taskmanager"),
        ("embed", "worker"),
        ("embed", "jobmanager"),
    ],
)
def test_a_kill_ends_the_command_which_goes_on_when_repeated(
    stage: str,
    what: str,
    shops: dict[str, Shop],
    flink: Flink,
    hold: Hold,
    warm_python: str,
) -> None:
    world = shops[stage].again()
    untouched, known = published(world), states(flink)
    hold.begin()
    command = Command(world, flink.options, warm_python, stage, *DS)
    command.wait_until(hold.is_waited_for)
    (job,) = states(flink, known)
    finished, reason = hold.made(), kill(what, flink, hold)
    assert command.end() == 1
    told = paragraph(command)
    assert f"The job {job} on {flink.url} failed: " in told
    assert reason in told
    assert "the same command goes on with that" in told
    assert published(world) == untouched
    start(what, flink)
    hold.end()
    again = Command(world, flink.options, warm_python, stage, *DS)
    assert again.end() == 0, again.told
    assert published(world) == shops[stage].expected
    assert_made_once(hold, finished)


@pytest.mark.parametrize("flink", ["restarts"], indirect=True)
@pytest.mark.parametrize(
    ("stage", "what"),
    [("embed", "taskmanager"), ("simscore", "taskmanager"), ("embed", "worker")],
)
def test_where_flink_tries_again_a_kill_doubles_nothing(
    stage: str,
    what: str,
    shops: dict[str, Shop],
    flink: Flink,
    hold: Hold,
    warm_python: str,
) -> None:
    world = shops[stage].again()
    known = states(flink)
    hold.begin()
    command = Command(world, [*flink.options, SOON_FORGOTTEN], warm_python, stage, *DS)
    command.wait_until(hold.is_waited_for)
    finished = hold.made()
    kill(what, flink, hold)
    command.wait_until(lambda: "RESTARTING" in states(flink, known).values())
    start(what, flink)
    hold.end()
    assert command.end() == 0, command.told
    assert list(states(flink, known).values()) == ["FINISHED"]
    assert published(world) == shops[stage].expected
    assert_made_once(hold, finished)
    if stage == "embed":
        assert embedded(world) == shops[stage].embedded


# ---- Spark -------------------------------------------------------------------------------------


def executors(spark: Spark) -> list[int]:
    """Returns the processes in which a job of Spark's runs now."""
    folder, found = str(spark.processes.folder), []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command, at = path.read_bytes(), os.readlink(path.with_name("cwd"))
        except OSError:
            continue  # it has ended
        if b"CoarseGrainedExecutorBackend" in command and at.startswith(folder):
            found.append(int(path.parent.name))
    return found


def test_spark_tries_again_what_an_executor_had_and_doubles_nothing(
    shops: dict[str, Shop], spark: Spark, hold: Hold, warm_python: str
) -> None:
    world = shops["embed"].again()
    hold.begin()
    command = Command(world, spark.options, warm_python, "embed", *DS)
    command.wait_until(hold.is_waited_for)
    finished, before = hold.made(), executors(spark)
    os.kill(before[0], signal.SIGKILL)
    command.wait_until(lambda: set(executors(spark)) - set(before) != set())
    hold.end()
    assert command.end() == 0, command.told
    assert published(world) == shops["embed"].expected
    assert_made_once(hold, finished)
    assert embedded(world) == shops["embed"].embedded
