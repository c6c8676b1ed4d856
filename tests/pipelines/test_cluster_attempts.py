"""A worker that Flink has given up, and that works on, changes nothing of what others made since.

It is as if its host were cut off: its task manager is killed, and it does not notice (`zombies`).
"""

import re
import shlex
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import Artefacts
from tests.support import clusters
from tests.support.cluster_commands import Command, small, states, tables
from tests.support.clusters import Flink
from tests.support.commands import counts, courier
from tests.support.late_disk import show_late
from tests.support.processes import wait_for
from tests.support.world import CLUSTERS, DAYS, World
from tests.support.zombies import LATE_SECONDS, REFUSED, Zombie

pytestmark = pytest.mark.clusters

EMBED = ("embed", "--ds", str(DAYS[0]))
ONE_AT_A_TIME = ("--parallelism=1",)  # so that all of a job is on one task manager
SETTINGS = {
    "restart-strategy.type": "fixed-delay",
    "restart-strategy.fixed-delay.attempts": "5",
    "restart-strategy.fixed-delay.delay": "1 s",
}


@pytest.fixture(scope="module")
def zombie(tmp_path_factory: pytest.TempPathFactory) -> Zombie:
    return Zombie(str(tmp_path_factory.mktemp("zombie") / "zombie"))


@pytest.fixture(scope="module")
def flink(
    zombie: Zombie, warm_python: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Flink]:
    folder = tmp_path_factory.mktemp("flink")
    command = shlex.join([warm_python, "-m", "tests.support.zombies", zombie.path])
    (python := folder / "python").write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    python.chmod(0o755)
    with clusters.flink(folder / "cluster", python=str(python), settings=SETTINGS) as cluster:
        yield cluster


@pytest.fixture
def world(tmp_path: Path, artefacts: Artefacts) -> World:
    return small(tmp_path, artefacts)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, artefacts: Artefacts) -> World:
    """Returns the shop as this machine makes its day."""
    world = small(tmp_path_factory.mktemp("local"), artefacts)
    assert courier(world, *EMBED) == 0
    assert len(tables(world)) > 2
    return world


@contextmanager
def without_what_works(flink: Flink) -> Iterator[None]:
    """Kills the task manager that is at work, and starts another in the end."""
    known = flink.ask("taskmanagers")["taskmanagers"]
    (busy,) = [one["id"] for one in known if not one["freeSlots"]]
    flink.processes.named[busy].kill()
    yield
    flink.start_task_manager()
    master = flink.processes.named["jobmanager"]
    wait_for(lambda: (flink.ask("overview") or {}).get("slots-available") == 2, master)


def told_of_images(command: Command) -> list[tuple[int, int, int]]:
    """Returns how many images of how many were done and embedded, as told line by line."""
    return [
        (int(done), int(total), int(embedded))
        for done, total, embedded in re.findall(
            r"^embed \[.*?\] (\d+)/(\d+),.* (\d+) embedded", command.told, re.MULTILINE
        )
    ]


def test_a_zombie_that_ends_before_the_second_attempt_counts_once(
    world: World, local: World, flink: Flink, zombie: Zombie, warm_python: str
) -> None:
    zombie.begin("embed", others_wait=True)
    command = Command(world, [*flink.options, *ONE_AT_A_TIME], warm_python, *EMBED)
    command.wait_until(lambda: zombie.is_held)
    with without_what_works(flink):
        command.wait_until(lambda: zombie.is_passed)
        zombie.release()
        assert command.end() == 0, command.told
        assert zombie.has_ended
    assert tables(world) == tables(local)
    assert counts(world, "item_embeddings", DAYS[0]) == counts(local, "item_embeddings", DAYS[0])
    most = map(max, zip(*told_of_images(command), strict=True))
    assert all(found <= limit for found, limit in zip(most, (11, 11, 9), strict=True))


def test_a_zombie_that_writes_after_the_publication_changes_nothing(
    world: World, local: World, flink: Flink, zombie: Zombie, warm_python: str
) -> None:
    zombie.begin("write")
    command = Command(world, [*flink.options, *ONE_AT_A_TIME], warm_python, *EMBED)
    command.wait_until(lambda: zombie.is_held)
    with without_what_works(flink):
        assert command.end() == 0, command.told
        assert tables(world) == tables(local)
        zombie.release()
        wait_for(lambda: zombie.has_ended, flink.processes.named["jobmanager"])
    assert list(world.root.glob("_staging/**/receipts/*.json"))  # that it left, and nobody counts
    assert tables(world) == tables(local)
    for again in ((), ("--remake",)):
        assert courier(world, *EMBED, *again) == 0
        assert tables(world) == tables(local)
    assert not list(world.root.glob("_staging/**/receipts/*.json"))


def test_a_zombie_of_a_killed_command_tells_the_next_one_nothing(
    world: World, local: World, flink: Flink, zombie: Zombie, warm_python: str
) -> None:
    zombie.begin("embed", others_wait=True, refuses=True)
    before, options = states(flink), [*flink.options, *ONE_AT_A_TIME]
    killed = Command(world, options, warm_python, *EMBED)
    killed.wait_until(lambda: zombie.is_held)
    with without_what_works(flink):
        assert killed.end(signal.SIGKILL) == -signal.SIGKILL
        again = Command(world, options, warm_python, *EMBED)
        again.wait_until(lambda: "/11" in again.told)
        assert sorted(states(flink, before).values()) == ["CANCELED", "RUNNING"]
        zombie.release()
        assert again.end() == 0, again.told
        assert zombie.has_ended
    assert REFUSED not in again.told
    assert tables(world) == tables(local)
    most = map(max, zip(*told_of_images(again), strict=True))
    assert all(found <= limit for found, limit in zip(most, (11, 11, 9), strict=True))


@pytest.mark.parametrize(
    ("stage", "options"),
    [("embed", ()), ("item-features", ()), ("simscore", ("--embeddings-by", "shuffle"))],
)
def test_a_folder_that_shows_late_what_others_write_delays_a_command(
    stage: str, options: tuple[str, ...], world: World, flink: Flink, zombie: Zombie,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    assert courier(world, "refresh", "--ds", str(DAYS[0])) == 0
    expected = tables(world)
    zombie.begin("late")
    show_late(monkeypatch, LATE_SECONDS)
    command = (stage, "--ds", str(DAYS[0]), "--remake", *options)
    assert courier(world, *command, "--", *flink.options) == 0
    assert tables(world) == expected


def test_a_folder_that_shows_late_what_others_write_delays_a_fit(
    tmp_path: Path, world: World, flink: Flink, zombie: Zombie, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It samples, and follows items and impressions from the pinned codebook, in two jobs."""
    assert courier(world, "refresh", "--ds", str(DAYS[0])) == 0

    def fitted(out: str, *options: str) -> dict[str, bytes]:
        command = ("fit-codebook", "--ds", str(DAYS[0]), "--clusters", str(CLUSTERS))
        assert courier(world, *command, "--out", str(tmp_path / out), *options) == 0
        found = [path for path in (tmp_path / out).rglob("*") if path.is_file()]
        return {str(path.relative_to(tmp_path / out)): path.read_bytes() for path in found}

    expected = fitted("here")
    zombie.begin("late")
    show_late(monkeypatch, LATE_SECONDS)
    assert fitted("there", "--", *flink.options) == expected
    assert any(path.endswith("crosswalk.parquet") for path in expected)
