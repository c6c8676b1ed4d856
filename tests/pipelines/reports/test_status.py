"""`courier status` tells how the last night went, what there is to do, and which days are there."""

import datetime as dt
import json

import pytest

from feature_jobs.store import partitions
from pipelines.cli import main
from pipelines.reports import status as statuses
from tests.support.commands import Capture, courier, paragraph, refresh, status
from tests.support.world import DAYS, World, catalogue_items

TOMORROW = DAYS[-1] + dt.timedelta(days=1)


def test_status_tells_rows_by_day_and_table(refreshed: World, capsys: Capture) -> None:
    assert main(["status", "--config", str(refreshed.config), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["days"]) == {str(day) for day in DAYS}
    for day, entry in found["days"].items():
        assert entry["whole_night"]
        assert entry["tables"]["user_simscores"]["rows"] == 152
        assert str(day) in entry["tables"]["item_features"]["path"]
    _, told = status(refreshed, capsys, "--tables")
    assert f"{DAYS[3]} whole 10 2 12 5 5 152 - " in told


def test_the_last_night_comes_first_and_then_what_is_next(
    refreshed: World, capsys: Capture
) -> None:
    _, told = status(refreshed, capsys)
    assert f"newest night: {DAYS[3]}, whole; published 20" in told
    assert "12 items, 8 of them clustered; 152 impressions, " in told
    assert f"next: {TOMORROW}, which waits for catalogue and impressions" in told
    assert f"{DAYS[0]} to {DAYS[3]} whole" in told


def test_training_sets_are_told_with_their_days(world: World, capsys: Capture) -> None:
    for name, days in (("ctr", DAYS[:3]), ("search", DAYS[3:])):
        for day in days:
            (world.root / "test/joined" / name / f"ds={day}").mkdir(parents=True)
    _, told = status(world, capsys, "--tables")
    assert f"training set ctr: 3 days, {DAYS[0]} to {DAYS[2]}" in told
    assert f"training set search: 1 day, {DAYS[3]}" in told
    assert "training set" not in status(world, capsys)[1]
    assert courier(world, "status", "--json") == 0
    sets = json.loads(capsys.readouterr().out)["training_sets"]
    assert sets == {"ctr": [str(day) for day in DAYS[:3]], "search": [str(DAYS[3])]}


@pytest.mark.first_night
def test_runs_of_an_earlier_version_noted_seconds_and_are_read(
    world: World, capsys: Capture
) -> None:
    runs = world.root / "test/_runs" / f"ds={DAYS[0]}"
    (newest,) = runs.rglob("run.json")
    run = json.loads(newest.read_text())
    stages = {name: {"seconds": 1.0, "why": ["of old"]} for name in run["stages"]}
    earlier = runs / "aaaaaaaaaaaa" / "run.json"
    earlier.parent.mkdir()
    earlier.write_text(json.dumps({"started": 1.7e9, "ended": 1.7e9 + 3.5, "stages": stages}))
    _, told = status(world, capsys)
    ended = dt.datetime.fromisoformat(run["ended"])
    assert f"published {ended:%Y-%m-%d %H:%M} UTC, in " in told
    newest.unlink()
    _, told = status(world, capsys)
    assert "published 2023-11-14 22:13 UTC, in 3.5 s" in told
    assert "embed made again: of old" in told


@pytest.mark.first_night
def test_a_next_day_whose_files_are_no_partition_hinders_nobody_from_looking(
    world: World, capsys: Capture
) -> None:
    folder = world.folder / "impressions" / f"ds={DAYS[1]}"
    for path in folder.glob("*.parquet"):
        path.rename(path.with_suffix(".csv"))
    ended, told = status(world, capsys)
    assert (ended, "which waits for impressions (refused as they are)" in told) == (0, True)


@pytest.mark.parametrize("args", [(), ("--tables",), ("--start-ds", str(DAYS[1]))])
def test_no_line_is_longer_than_100_columns_and_no_command_is_broken(
    refreshed: World, capsys: Capture, args: tuple[str, ...]
) -> None:
    capsys.readouterr()
    assert courier(refreshed, "status", *args) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 100 for line in lines if str(refreshed.root) not in line)
    assert all(line.count("`") % 2 == 0 for line in lines)


def test_of_days_that_are_not_shown_nothing_is_read(
    refreshed: World, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statuses, "DAYS_SHOWN", 1)
    read, seen = partitions.find_published, []
    monkeypatch.setattr(
        partitions, "find_published", lambda folder: seen.append(folder) or read(folder)
    )
    _, told = status(refreshed, capsys)
    assert "3 earlier days: --start-ds shows them" in told
    assert not any(f"ds={day}" in folder for folder in seen for day in DAYS[:2])
    assert any(f"ds={DAYS[3]}" in folder for folder in seen)
    _, told = status(refreshed, capsys, "--start-ds", str(DAYS[0]), "--end-ds", str(DAYS[1]))
    assert f"{DAYS[0]} to {DAYS[1]} whole" in told
    assert "earlier days" not in told
    _, told = status(refreshed, capsys, "--end-ds", str(DAYS[2]))
    assert f"{DAYS[2]} whole 2 earlier days" in told


def test_status_of_nothing_says_so(world: World, capsys: Capture) -> None:
    assert "nothing is published yet" in status(world, capsys)[1]
    assert courier(world, "status", "--ds", str(DAYS[0])) == 4
    assert f"courier refresh --ds {DAYS[0]}" in paragraph(capsys)


@pytest.mark.first_night
def test_one_day_ends_with_0_whole_4_missing_and_3_on_hold(world: World, capsys: Capture) -> None:
    first, second = str(DAYS[0]), str(DAYS[1])
    assert status(world, capsys, "--ds", first)[0] == 0
    assert courier(world, "embed", "--ds", second) == 0
    assert courier(world, "status", "--ds", second) == 4
    assert "not whole: embeddings" in paragraph(capsys)
    world.write_catalogue(DAYS[0], catalogue_items(DAYS[0])[1:])
    assert refresh(world, DAYS[0]) == 0
    assert courier(world, "rollback", "--ds", first, "--reason", "grey") == 0
    assert courier(world, "status", "--ds", first) == 3
    assert "is on hold: grey" in paragraph(capsys)


def test_a_refused_day_ends_with_3_and_says_why_until_it_is_accepted(
    world: World, capsys: Capture
) -> None:
    world.settings()
    strict = world.config.read_text().replace("rejects.fail = 0.5", "rejects.fail = 0.0")
    day = ["--config", str(world.config), "--ds", str(DAYS[0])]
    world.config.write_text(strict)
    assert main(["embed", *day]) == 3
    _, told = status(world, capsys)
    assert f"refused: embed {DAYS[0]} run " in told
    assert courier(world, "status", "--ds", str(DAYS[0])) == 3
    assert "--accept rejects" in paragraph(capsys)
    assert main(["embed", *day]) == 0
    assert "refused: " not in status(world, capsys)[1]


def test_one_day_and_several_are_not_asked_for_together(world: World, capsys: Capture) -> None:
    assert courier(world, "status", "--ds", str(DAYS[0]), "--end-ds", str(DAYS[1])) == 2
    assert "Give one day as --ds" in capsys.readouterr().err
