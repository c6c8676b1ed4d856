"""Nights that lost tables to `courier prune` are told as such, and nobody takes them for broken."""

import copy
import json
import shutil
from pathlib import Path

import pytest

from pipelines.cli import main
from tests.support.commands import Capture, courier, paragraph, published, refresh, status
from tests.support.world import DAYS, World

KEPT = "days = {user_simscores = 2, item_features = 2}, grace_hours = 0.0"
LOST = {"user_simscores", "item_features"}
FIRST, SECOND, THIRD, LAST = map(str, DAYS)


@pytest.fixture
def world(refreshed: World, tmp_path: Path) -> World:
    """Makes a copy of a shop after four nights, whose settings keep two days of two tables."""
    world = copy.deepcopy(refreshed)
    world.folder = tmp_path / "shop"
    shutil.copytree(refreshed.folder, world.folder)
    world.extra_settings = f"retention = {{{KEPT}}}"
    return world


@pytest.mark.parametrize("refreshed", ["int"], indirect=True)
def test_pruned_nights_are_told_as_such_by_all_who_look(world: World, capsys: Capture) -> None:
    before = published(world)
    assert courier(world, "prune", "--dry-run") == 0
    told = capsys.readouterr().out
    assert f"user_simscores, published: 2 days, ds {FIRST} to {SECOND}: " in told
    assert published(world) == before
    assert courier(world, "prune", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert {(one["table"], tuple(one["days"])) for one in found["gone"]} == {
        (name, (FIRST, SECOND)) for name in LOST
    }
    assert courier(world, "prune") == 0
    assert "earlier versions" in capsys.readouterr().out  # what was noted of the days that went
    assert courier(world, "prune") == 0
    assert capsys.readouterr().out == "nothing to prune\n"

    for day in (FIRST, SECOND):
        assert courier(world, "validate", "--ds", day, "--json") == 0
        told = json.loads(capsys.readouterr().out)
        assert {x["table"] for x in told["findings"] if x["law"] == "it was pruned"} == LOST
        assert {x["level"] for x in told["findings"]} <= {"unverified", "warning"}
    for day in (THIRD, LAST):
        assert courier(world, "validate", "--ds", day, "--json") == 0
        assert json.loads(capsys.readouterr().out)["sound"]

    assert status(world, capsys, "--ds", FIRST)[0] == 0
    ended, told = status(world, capsys, "--tables")
    assert (ended, f"{FIRST} whole 10 2 - " in told) == (0, True)
    assert courier(world, "status", "--ddl", "spark") == 0
    (scores,) = (
        one for one in capsys.readouterr().out.split("\n\n") if "CREATE TABLE `test`.`user_s" in one
    )
    assert (f"'{FIRST}'" in scores, f"'{THIRD}'" in scores) == (False, True)
    assert courier(world, "rollback", "--ds", FIRST) == 2
    assert "tables of it were pruned" in paragraph(capsys)
    assert courier(world, "audit", "--ds", FIRST) == 4
    assert f"item_features of ds {FIRST} has not been made" in paragraph(capsys)

    there = published(world)
    assert refresh(world, DAYS[3]) == 0
    assert "already published from the same inputs, nothing to do" in capsys.readouterr().err
    assert published(world) == there


@pytest.mark.parametrize("refreshed", ["int"], indirect=True)
def test_no_day_is_stale_after_a_prune_of_one_of_two_tables_of_a_stage(
    world: World, capsys: Capture
) -> None:
    """Of both as many days are kept as of the one of which more are."""
    assert stale(world, capsys) == {}
    settings = world.extra_settings
    days = "user_histories = 2, recent_clicks = 3, item_embeddings = 3, item_rejects = 2"
    world.extra_settings = f"late_days = 0\nretention = {{days = {{{days}}}}}"
    assert courier(world, "prune", "--json") == 0
    gone = {(one["table"], *one["days"]) for one in json.loads(capsys.readouterr().out)["gone"]}
    names = ("user_histories", "recent_clicks", "item_embeddings", "item_rejects")
    assert {one for one in gone if one[0] in names} == {(name, FIRST) for name in names}
    world.extra_settings = settings  # else histories are to be made by another law
    assert stale(world, capsys) == {}


def stale(world: World, capsys: Capture) -> dict[str, dict[str, list[str]]]:
    """Returns the days that `courier status` calls stale, with the stages by their reasons."""
    assert courier(world, "status", "--json") == 0
    found: dict[str, dict[str, list[str]]] = json.loads(capsys.readouterr().out)["stale"]
    return found


@pytest.mark.parametrize("refreshed", ["int"], indirect=True)
def test_a_damaged_hold_ends_a_prune_with_1_and_a_refresh_with_a_warning(
    world: World, capsys: Capture
) -> None:
    hold = Path(world.settings().layout.hold_path(DAYS[0]))
    hold.parent.mkdir(exist_ok=True)
    hold.write_text("{}")
    assert courier(world, "prune") == 1
    told = capsys.readouterr()
    assert f"WARNING: ds {FIRST} is left as it is: {hold} should say" in told.err
    assert f"may go of ds {FIRST}, so that nothing of it was deleted" in " ".join(told.err.split())
    assert told.out.endswith(f"\n1 day left as it is: ds {FIRST}\n")
    assert (world.root / f"test/item_features/ds={FIRST}").exists()
    assert not (world.root / f"test/item_features/ds={SECOND}").exists()
    world.extra_settings = f"retention = {{{KEPT}, by_the_night = true}}"
    assert refresh(world, DAYS[3]) == 0
    assert f"WARNING: ds {FIRST} is left as it is: {hold} should say" in capsys.readouterr().err


@pytest.mark.parametrize("refreshed", ["int"], indirect=True)
def test_a_refresh_prunes_at_its_end_where_the_settings_say_so(
    world: World, capsys: Capture
) -> None:
    assert refresh(world, DAYS[3]) == 0
    assert "pruned: " not in capsys.readouterr().err
    world.extra_settings = f"retention = {{{KEPT}, by_the_night = true}}"
    for args in (["embed"], ["refresh", "--dry-run"]):
        assert courier(world, *args, "--ds", LAST) == 0
    assert (world.root / f"test/item_features/ds={FIRST}").exists()
    assert refresh(world, DAYS[3]) == 0
    assert "pruned: " in capsys.readouterr().err
    assert not (world.root / f"test/item_features/ds={FIRST}").exists()
    assert (world.root / f"test/item_features/ds={THIRD}").exists()


@pytest.mark.parametrize("refreshed", ["int"], indirect=True)
def test_settings_that_keep_less_than_the_window_end_every_command_with_2(
    world: World, capsys: Capture
) -> None:
    world.extra_settings = "retention = {days = {user_simscores = 2}}"
    world.settings()
    text = world.config.read_text()
    world.config.write_text(text.replace("user_simscores = 2}", "user_simscores = 1}"))
    for command in (["prune"], ["refresh", "--ds", LAST]):
        assert main([*command, "--config", str(world.config)]) == 2
        assert "keeps 1 days of user_simscores, fewer than window_days = 2" in paragraph(capsys)
