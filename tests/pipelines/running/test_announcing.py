"""Announcing: the shop's command is called for each night that is published, at least once."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from tests.support.commands import Capture, courier, paragraph, published, refresh, status
from tests.support.world import DAYS, World

pytestmark = pytest.mark.first_night

NOTE = """
import json, os, sys
told = {k: v for k, v in os.environ.items() if k.startswith(("COURIER_DS", "COURIER_FEATURE",
                                                             "COURIER_PATH", "COURIER_VERSION"))}
with open("{calls}", "a") as file:
    file.write(json.dumps(told) + "\\n")
if os.path.exists("{broken}"):
    sys.exit("the metastore is away")
print("partitions added")
"""


class Listener:
    """Is a command that notes what it was told, and fails while it is broken."""

    def __init__(self, world: World, folder: Path):
        self.file, self.broken, script = folder / "calls", folder / "broken", folder / "note.py"
        script.write_text(
            NOTE.replace("{calls}", str(self.file)).replace("{broken}", str(self.broken))
        )
        world.extra_settings = f"on_published = {json.dumps([sys.executable, str(script)])}"

    def calls(self) -> list[dict[str, str]]:
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        return [json.loads(line) for line in lines]


@pytest.fixture
def listener(world: World, tmp_path: Path) -> Listener:
    return Listener(world, tmp_path)


def test_a_night_is_announced_once_with_its_paths_and_versions(
    world: World, listener: Listener, capsys: Capture
) -> None:
    assert refresh(world, DAYS[0]) == 0
    assert "partitions added" in capsys.readouterr().err
    (told,) = listener.calls()
    assert told["COURIER_DS"] == str(DAYS[0])
    assert told["COURIER_FEATURE_SET"] == "test"
    path = Path(told["COURIER_PATH_USER_SIMSCORES"])
    assert path == world.root / "test/user_simscores" / f"ds={DAYS[0]}"
    manifest = json.loads((path / "_manifest.json").read_text())
    assert told["COURIER_VERSION_USER_SIMSCORES"] == manifest["version"]
    assert len(told) == 2 + 2 * 6
    assert refresh(world, DAYS[0]) == 0
    assert len(listener.calls()) == 1


def test_a_command_that_fails_is_told_and_called_again_by_the_next_run_and_the_night_stands(
    world: World, listener: Listener, capsys: Capture
) -> None:
    listener.broken.touch()
    before = published(world)
    assert refresh(world, DAYS[0]) == 1
    told = paragraph(capsys)
    for words in ("ended with status 1", "the metastore is away", "Its tables stand"):
        assert words in told
    assert published(world) == before
    assert "on_published has not ended well" in status(world, capsys)[1]
    listener.broken.unlink()
    assert refresh(world, DAYS[0]) == 0
    assert len(listener.calls()) == 2
    assert "on_published" not in status(world, capsys)[1]


def test_a_command_that_is_not_there_is_told(world: World, capsys: Capture) -> None:
    world.extra_settings = 'on_published = ["no-such-command"]'
    assert refresh(world, DAYS[0]) == 1
    assert "no-such-command, could not be started" in paragraph(capsys)


def test_a_night_that_is_not_whole_is_not_announced_and_one_made_again_is(
    world: World, listener: Listener
) -> None:
    assert courier(world, "embed", "--ds", str(DAYS[1])) == 0
    assert listener.calls() == []
    assert refresh(world, DAYS[0]) == 0
    os.unlink(world.image(1))
    assert refresh(world, DAYS[0], "--full") == 0
    first, second = listener.calls()
    assert first["COURIER_VERSION_ITEM_FEATURES"] != second["COURIER_VERSION_ITEM_FEATURES"]
    assert courier(world, "rollback", "--ds", str(DAYS[0])) == 0
    assert listener.calls()[2] == first


def test_a_rollback_that_could_not_be_announced_is_done_and_says_what_calls_again(
    world: World, listener: Listener, capsys: Capture
) -> None:
    world.image(1).unlink()
    assert refresh(world, DAYS[0], "--full") == 0
    listener.broken.touch()
    capsys.readouterr()
    assert courier(world, "rollback", "--ds", str(DAYS[0])) == 1
    done = capsys.readouterr()
    assert "is published again" in done.out
    assert f"`courier rollback --ds {DAYS[0]}` calls the command again" in done.err
    assert f"`courier rollback --ds {DAYS[0]}` calls it" in status(world, capsys)[1]
    listener.broken.unlink()
    assert courier(world, "rollback", "--ds", str(DAYS[0])) == 0
    assert len(listener.calls()) == 3


def test_a_command_that_leaves_something_running_does_not_hold_the_night_up(
    world: World, capsys: Capture
) -> None:
    world.extra_settings = 'on_published = ["sh", "-c", "sleep 600 & echo $! told"]'
    assert refresh(world, DAYS[0]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.endswith("told")]
    os.kill(int(line.split()[0]), signal.SIGKILL)
