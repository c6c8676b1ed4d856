"""Runs commands on clusters in processes of their own, which tests interrupt and kill."""

import shlex
import signal
import subprocess
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from tests.conftest import Artefacts, pinned
from tests.support.clusters import Flink
from tests.support.commands import published
from tests.support.held_embed import Hold
from tests.support.processes import ROOT, wait_for
from tests.support.world import World

_HELD = "tests.support.held_embed"


def small(folder: Path, artefacts: Artefacts) -> World:
    """Returns a shop whose days have several chunks and parts."""
    return pinned(World(folder / "shop", rows_per_shard=4), artefacts)


def held_python(folder: Path, python: str, hold: Hold) -> str:
    """Writes a program that is `python`, but that its workers wait where `hold` says; its path."""
    command = shlex.join([python, "-m", _HELD, "worker", hold.path])
    (program := folder / "python").write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    program.chmod(0o755)
    return str(program)


class Command:
    """Runs a command of `courier` by Beam's `options` on a cluster."""

    def __init__(self, world: World, options: Sequence[str], python: str, *command: str):
        world.settings()
        self._log = world.folder / "told"
        self._log.write_text("")
        name, *rest = command
        arguments = [name, "--config", str(world.config), *rest, "--", *options]
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(
                [python, "-m", _HELD, "courier", *arguments], cwd=ROOT, stdout=log, stderr=log
            )

    @property
    def told(self) -> str:
        return self._log.read_text()

    def wait_until(self, found: Callable[[], bool]) -> None:
        wait_for(found, self._process)

    def end(self, how: signal.Signals | None = None) -> int:
        """Returns the exit status, of what it is told to end by, or by itself."""
        if how:
            self._process.send_signal(how)
        return self._process.wait(120)


def states(flink: Flink, known: Collection[str] = ()) -> dict[str, str]:
    """Returns the states of Flink's jobs by their names, but for those `known`."""
    jobs = flink.ask("jobs/overview")["jobs"]
    return {job["name"]: job["state"] for job in jobs if job["name"] not in known}


def tables(world: World) -> dict[str, bytes]:
    """Returns the published files that hold rows."""
    return {path: data for path, data in published(world).items() if path.endswith(".parquet")}
