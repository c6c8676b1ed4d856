"""A command that ends leaves no job on Flink, and one that is killed leaves none to the next."""

import signal
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Artefacts
from tests.support import clusters
from tests.support.cluster_commands import Command, held_python, small, states, tables
from tests.support.clusters import Flink
from tests.support.commands import courier, published
from tests.support.held_embed import Hold
from tests.support.world import DAYS, UNDECODABLE, World

pytestmark = pytest.mark.clusters

EMBED = ("embed", "--ds", str(DAYS[0]))


@pytest.fixture(scope="module")
def flink(
    _hold: Hold, warm_python: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Flink]:
    folder = tmp_path_factory.mktemp("flink")
    python = held_python(folder, warm_python, _hold)
    with clusters.flink(folder / "cluster", python=python) as cluster:
        yield cluster


@pytest.fixture
def world(tmp_path: Path, artefacts: Artefacts) -> World:
    return small(tmp_path, artefacts)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, artefacts: Artefacts) -> dict[str, bytes]:
    """Returns the tables that this machine makes."""
    world = small(tmp_path_factory.mktemp("local"), artefacts)
    assert courier(world, *EMBED) == 0
    found = tables(world)
    assert len(found) > 2
    return found


def cancel(flink: Flink, name: str) -> None:
    """Cancels a job as one does who looks at Flink's pages."""
    (jid,) = [job["jid"] for job in flink.ask("jobs/overview")["jobs"] if job["name"] == name]
    request = urllib.request.Request(f"{flink.url}/v1/jobs/{jid}?mode=cancel", method="PATCH")
    urllib.request.urlopen(request, timeout=10).close()


def test_an_interrupted_command_cancels_its_job_and_resumes(
    world: World, flink: Flink, hold: Hold, expected: dict[str, bytes], warm_python: str
) -> None:
    hold.begin()
    for how in (signal.SIGINT, signal.SIGTERM):
        before = states(flink)
        command = Command(world, flink.options, warm_python, *EMBED)
        command.wait_until(hold.is_waited_for)
        command.wait_until(lambda: "tasks finished" in command.told)  # noqa: B023
        assert command.end(how) == 128 + how, command.told
        ((name, state),) = states(flink, before).items()
        assert state == "CANCELED"
        assert f"the job {name}: {flink.url}/#/job/running/" in command.told
        assert f"the job {name} is CANCELLED" in command.told
        assert "Traceback" not in command.told
        assert published(world) == {}
        hold.forget_waiting()
    finished = hold.made()
    assert finished
    hold.end()
    again = Command(world, flink.options, warm_python, *EMBED)
    assert again.end() == 0, again.told
    assert "left the job" not in again.told
    assert tables(world) == expected
    times = Counter(hold.made())
    assert all(times[item] == 1 for item in set(finished) - {UNDECODABLE})
    assert len(times) > len(finished)


def test_the_job_of_a_killed_command_is_cancelled_by_the_next(
    world: World, flink: Flink, hold: Hold, expected: dict[str, bytes], warm_python: str
) -> None:
    before = states(flink)
    hold.begin()
    killed = Command(world, flink.options, warm_python, *EMBED)
    killed.wait_until(hold.is_waited_for)
    assert killed.end(signal.SIGKILL) == -signal.SIGKILL
    ((name, state),) = states(flink, before).items()
    assert state == "RUNNING"
    finished = hold.made()
    again = Command(world, flink.options, warm_python, *EMBED)
    again.wait_until(lambda: f"the job {name} is CANCELLED" in again.told)
    assert states(flink)[name] == "CANCELED"
    hold.end()
    assert again.end() == 0, again.told
    assert f"left the job {name} RUNNING on {flink.url}: cancelling it" in again.told
    assert sorted(states(flink, before).values()) == ["CANCELED", "FINISHED"]
    assert tables(world) == expected
    times = Counter(hold.made())
    assert all(times[item] == 1 for item in set(finished) - {UNDECODABLE})


def test_workers_that_do_not_begin_are_told_with_what_flink_says(
    world: World, flink: Flink, hold: Hold, warm_python: str
) -> None:
    before = states(flink)
    hold.begin(boot=True)
    command = Command(world, flink.options, warm_python, *EMBED)
    command.wait_until(lambda: "no worker of the job" in command.told)
    assert command.end(signal.SIGTERM) == 143
    (told,) = [line for line in command.told.splitlines() if "no worker" in line]
    assert "has begun after 3 s. Flink says: RUNNING; " in told
    assert "0 of 2 slots free" in told
    assert list(states(flink, before).values()) == ["CANCELED"]


def test_a_job_that_ends_on_its_cluster_is_told_in_a_paragraph(
    world: World, flink: Flink, hold: Hold, warm_python: str
) -> None:
    before = states(flink)
    hold.begin()
    command = Command(world, flink.options, warm_python, *EMBED)
    command.wait_until(hold.is_waited_for)
    (name,) = states(flink, before)
    cancel(flink, name)
    assert command.end() == 1
    (told,) = [line for line in command.told.splitlines() if line.startswith("Error: ")]
    assert f"The job {name} on {flink.url} " in told
    assert "Traceback" not in command.told
    assert published(world) == {}
