"""Tests that going on from the day before, and many days in one job, make the tables of nights."""

import dataclasses
import datetime as dt
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from feature_jobs.store import broadcast, files
from pipelines.cli import main
from tests.conftest import Artefacts, pinned
from tests.support.commands import (
    Capture,
    Killed,
    counts,
    courier,
    die_at_write,
    manifest,
    paragraph,
    published,
    refresh,
    rewrite,
    status,
)
from tests.support.world import (
    DAY_US,
    DAYS,
    World,
    draw_impressions,
    make_codebook,
    make_encoder,
)

ONE_DAY = dt.timedelta(days=1)
RANGE = ("--start-ds", str(DAYS[0]), "--end-ds", str(DAYS[3]))


class Bare(World):
    """Stands for a world whose folder is there already."""

    def __post_init__(self) -> None:
        pass


@dataclasses.dataclass
class Stand:
    """Holds one folder of a shop, for tests in turn, and what the folder held at two moments.

    There is one folder, since the id of a run changes with the place and the times of its inputs.
    """

    world: World
    items: Path  # item features of all days, and nothing of users
    nights: Path  # all nights, one by one

    def at(self, moment: Path) -> World:
        """Returns the shop as it was at that moment."""
        shutil.rmtree(self.world.folder, ignore_errors=True)
        shutil.copytree(moment, self.world.folder)
        return self._bare(self.world.folder)

    @property
    def after_nights(self) -> World:
        """Returns the shop after all nights, to be read only."""
        return self._bare(self.nights)

    def _bare(self, folder: Path) -> World:
        return dataclasses.replace(
            Bare(**vars(self.world)), folder=folder, pins=list(self.world.pins)
        )


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory, artefacts: Artefacts) -> Stand:
    top = tmp_path_factory.mktemp("stand")
    stand = Stand(pinned(World(top / "shop"), artefacts), top / "items", top / "nights")
    for day in DAYS:
        for stage in ("embed", "item-features"):
            assert courier(stand.world, stage, "--ds", str(day)) == 0
    shutil.copytree(stand.world.folder, stand.items)
    for day in DAYS:
        assert courier(stand.world, "simscore", "--ds", str(day)) == 0
    shutil.copytree(stand.world.folder, stand.nights)
    return stand


@pytest.fixture
def after_nights(stand: Stand) -> World:
    return stand.after_nights


@pytest.fixture
def shop(stand: Stand) -> World:
    return stand.at(stand.items)


@pytest.fixture
def nights(stand: Stand) -> World:
    return stand.at(stand.nights)


def delete_log(world: World, day: dt.date) -> None:
    files.delete_tree(str(world.folder / "impressions" / f"ds={day}"))


# ---- One day of log ----------------------------------------------------------------------------


def test_a_night_reads_the_log_of_its_own_day_alone(nights: World) -> None:
    before = published(nights)
    for day in DAYS[:3]:
        delete_log(nights, day)
    for table in ("test/user_simscores", "shared/user_histories", "shared/recent_clicks"):
        files.delete_tree(str(nights.root / table / f"ds={DAYS[3]}"))
    assert courier(nights, "simscore", "--ds", str(DAYS[3])) == 0
    assert published(nights) == before


def test_the_first_day_reads_the_log_of_the_window_and_names_the_days_it_lacks(
    shop: World, capsys: Capture
) -> None:
    delete_log(shop, DAYS[1])
    assert courier(shop, "histories", "--ds", str(DAYS[3])) == 0
    assert "no impressions on 4 of the 6 days before it (2026-02-26 to 2026-03-02)" in (
        capsys.readouterr().err
    )
    path = shop.root / "shared/user_histories" / f"ds={DAYS[3]}" / "_manifest.json"
    assert json.loads(path.read_text())["notes"] == {
        "days_without_log": ["2026-03-02", "2026-02-28", "2026-02-27", "2026-02-26"]
    }


def test_beginning_from_the_log_gives_the_histories_that_nights_give(
    shop: World, after_nights: World
) -> None:
    assert courier(shop, "histories", "--ds", str(DAYS[3])) == 0
    for table in ("user_histories", "recent_clicks"):
        assert shop.table(table, DAYS[3]) == after_nights.table(table, DAYS[3])
    assert len(shop.table("recent_clicks", DAYS[3])) > 2


# ---- Gaps --------------------------------------------------------------------------------------


def test_a_gap_is_refused_and_the_command_that_it_names_fills_it(
    shop: World, after_nights: World, capsys: Capture
) -> None:
    assert courier(shop, "simscore", "--ds", str(DAYS[0])) == 0
    before = published(shop)
    assert courier(shop, "simscore", "--ds", str(DAYS[3])) == 4
    message = paragraph(capsys)
    assert "of ds 2026-03-01: the clicks from 2026-03-02 to 2026-03-03 would be missing" in message
    told = f"courier histories --start-ds {DAYS[1]} --end-ds {DAYS[2]}"
    assert f"`{told}`" in message
    assert published(shop) == before
    assert courier(shop, *told.split()[1:]) == 0
    assert courier(shop, "simscore", "--ds", str(DAYS[3])) == 0
    assert shop.table("user_simscores", DAYS[3]) == after_nights.table("user_simscores", DAYS[3])


def test_the_world_begins_where_the_settings_say_so(shop: World, capsys: Capture) -> None:
    assert courier(shop, "histories", "--ds", str(DAYS[0])) == 0
    shop.extra_settings = f"history_start_ds = {DAYS[2]}"
    assert courier(shop, "histories", "--ds", str(DAYS[1])) == 2
    assert "lies before history_start_ds = 2026-03-03" in paragraph(capsys)
    assert courier(shop, "histories", "--ds", str(DAYS[2])) == 0
    assert "no impressions" not in capsys.readouterr().err
    assert courier(shop, "histories", "--ds", str(DAYS[3])) == 0
    start = dt.datetime.combine(DAYS[2], dt.time(), dt.UTC)
    times = shop.table("user_histories", DAYS[2])["click_times"].to_pylist()
    assert min(t for some in times for t in some) >= start - ONE_DAY  # a late row of that log


def test_from_log_begins_anew_after_a_gap(
    shop: World, after_nights: World, capsys: Capture
) -> None:
    assert courier(shop, "histories", "--ds", str(DAYS[0])) == 0
    assert courier(shop, "histories", "--ds", str(DAYS[3])) == 4
    assert "--from-log" in paragraph(capsys)
    assert courier(shop, "simscore", "--ds", str(DAYS[3]), "--from-log") == 0
    assert shop.table("user_simscores", DAYS[3]) == after_nights.table("user_simscores", DAYS[3])


def test_histories_of_another_law_are_not_gone_on_from(nights: World, capsys: Capture) -> None:
    nights.extra_settings = "keep_repeats = true"
    assert courier(nights, "histories", "--ds", str(DAYS[3])) == 2
    message = paragraph(capsys)
    assert "{'keep_repeats': False}" in message
    assert "--from-log" in message
    assert courier(nights, "histories", "--ds", str(DAYS[3]), "--from-log") == 0
    items = nights.table("user_histories", DAYS[3])["item_ids"].to_pylist()
    assert any(len(set(some)) < len(some) for some in items)


def test_the_same_command_without_from_log_finds_nothing_to_do(
    shop: World, capsys: Capture
) -> None:
    assert courier(shop, "histories", "--ds", str(DAYS[0])) == 0
    assert courier(shop, "simscore", "--ds", str(DAYS[3]), "--from-log") == 0
    capsys.readouterr()
    assert courier(shop, "simscore", "--ds", str(DAYS[3])) == 0
    assert "nothing to do" in capsys.readouterr().err


def test_a_new_beginning_of_the_world_is_another_law(nights: World, capsys: Capture) -> None:
    nights.extra_settings = f"history_start_ds = {DAYS[2]}"
    assert courier(nights, "histories", "--ds", str(DAYS[3])) == 2
    assert "history_start_ds" in paragraph(capsys)
    assert courier(nights, "histories", "--start-ds", str(DAYS[2]), "--end-ds", str(DAYS[3])) == 0


def test_where_nothing_was_known_ids_may_be_of_any_type(shop: World) -> None:
    """An empty first day has no file that could tell the types of IDs."""

    def as_text(rows: pa.Table) -> pa.Table:
        return rows.set_column(0, "user_id", rows["user_id"].cast(pa.string()))

    shop.write("impressions", DAYS[0], [], rows_to_group=1)
    assert courier(shop, "histories", "--ds", str(DAYS[0])) == 0
    for day in DAYS[1:]:
        rewrite(shop, day, as_text)
    assert courier(shop, "histories", "--ds", str(DAYS[1])) == 0
    assert shop.table("user_histories", DAYS[1]).schema.field("user_id").type == pa.string()
    one_by_one = shop.table("user_histories", DAYS[1])
    files.delete_tree(str(shop.root / "shared"))
    assert courier(shop, "simscore", *RANGE) == 0
    assert shop.table("user_histories", DAYS[1]) == one_by_one
    assert len(shop.table("user_simscores", DAYS[3])) == 152


def test_ids_of_another_type_than_the_day_before_are_refused(
    nights: World, capsys: Capture
) -> None:
    def as_text(rows: pa.Table) -> pa.Table:
        return rows.set_column(0, "user_id", rows["user_id"].cast(pa.string()))

    rewrite(nights, DAYS[3], as_text)
    assert courier(nights, "simscore", "--ds", str(DAYS[3])) == 1
    message = paragraph(capsys)
    assert "user_id is string in the tables of ds 2026-03-04 but was int64" in message
    assert "Cast user_id back" in message


def test_a_day_without_any_row_hands_on_what_was_known(nights: World, capsys: Capture) -> None:
    nights.write("impressions", DAYS[2], [], rows_to_group=1)
    assert courier(nights, "simscore", *RANGE) == 0
    assert len(nights.table("user_simscores", DAYS[2])) == 0
    two_days_old = nights.table("user_histories", DAYS[2]).to_pylist()
    assert {row["user_id"] for row in two_days_old} == {1, 2, 3, 4, 5}


# ---- Late and lagging --------------------------------------------------------------------------


def test_an_impression_later_than_late_days_has_no_history_and_is_told(
    shop: World, capsys: Capture
) -> None:
    rows = draw_impressions(DAYS[3], seed=3)
    late = [{**r, "event_time": r["event_time"] - 3 * DAY_US, "clicked": False} for r in rows[:9]]
    shop.write_impressions(DAYS[3], [*rows, *late])
    shop.gates += "\ntoo_late.fail = 1.0"
    assert courier(shop, "simscore", "--ds", str(DAYS[3])) == 0
    assert "WARNING: Some impressions came in the log more than late_days" in (
        capsys.readouterr().err
    )
    assert counts(shop, "user_simscores", DAYS[3])["too_late_for_a_history"] == 9
    day = dt.datetime.combine(DAYS[1], dt.time(), dt.UTC)
    found = shop.table("user_simscores", DAYS[3]).to_pylist()
    early = [row for row in found if row["event_time"] < day]
    assert len(early) == 9
    assert not any(row["history_len"] for row in early)
    start = dt.datetime.combine(DAYS[3], dt.time(), dt.UTC)
    of_earlier_days = sum(row["event_time"] < start for row in found)
    assert counts(shop, "user_simscores", DAYS[3])["late_impressions"] == of_earlier_days >= 9
    shop.extra_settings = "late_days = 3"
    assert courier(shop, "simscore", "--ds", str(DAYS[3])) == 0
    assert counts(shop, "user_simscores", DAYS[3])["too_late_for_a_history"] == 0


# ---- Stale days --------------------------------------------------------------------------------


def stale(world: World, capsys: Capture) -> dict[str, dict[str, list[str]]]:
    """Returns the days that `courier status` calls stale, with the stages by their reasons."""
    capsys.readouterr()
    assert courier(world, "status", "--json") == 0
    return json.loads(capsys.readouterr().out)["stale"]


def follow_the_advice(world: World, capsys: Capture) -> None:
    """Types the command that `courier status` has for stale days."""
    _, told = status(world, capsys)
    command = told.split("`courier backfill ")[1].split("`")[0]
    assert courier(world, "backfill", *command.split()) == 0
    assert stale(world, capsys) == {}


def test_days_after_one_that_was_made_again_are_stale_until_they_are_too(
    nights: World, capsys: Capture
) -> None:
    assert stale(nights, capsys) == {}
    rewrite(nights, DAYS[1], lambda rows: rows.slice(0, 10))
    assert courier(nights, "simscore", "--ds", str(DAYS[1])) == 0
    _, told = status(nights, capsys)
    why = "ds 2026-03-02, from which it goes on, was made again"
    assert f"stale: 2026-03-03 (histories, simscore: {why})" in told
    then = "ds 2026-03-03, from which it goes on, is made again"
    assert stale(nights, capsys) == {
        "2026-03-03": {why: ["histories", "simscore"]},
        "2026-03-04": {then: ["histories", "simscore"]},
    }
    follow_the_advice(nights, capsys)


def test_scores_of_histories_that_were_made_again_are_stale_too(
    nights: World, capsys: Capture
) -> None:
    rewrite(nights, DAYS[0], lambda rows: rows.slice(0, 40))
    assert courier(nights, "histories", *RANGE) == 0
    found = stale(nights, capsys)
    assert list(found) == [str(day) for day in DAYS]
    assert found[str(DAYS[0])] == {"impressions rewritten": ["simscore"]}
    assert {str(stages) for why in found.values() for stages in why.values()} == {"['simscore']"}
    follow_the_advice(nights, capsys)


def test_of_days_without_scores_the_histories_are_made_anew(shop: World, capsys: Capture) -> None:
    assert courier(shop, "histories", *RANGE) == 0
    rewrite(shop, DAYS[0], lambda rows: rows.slice(0, 40))
    assert courier(shop, "histories", "--ds", str(DAYS[0])) == 0
    follow_the_advice(shop, capsys)
    assert not list((shop.root / "test").glob("user_simscores/*"))


def test_a_whole_night_stays_whole_when_its_scores_are_made_again(
    nights: World, capsys: Capture
) -> None:
    assert refresh(nights, DAYS[0]) == refresh(nights, DAYS[1]) == 0
    rewrite(nights, DAYS[0], lambda rows: rows.slice(0, 40))
    assert courier(nights, "simscore", "--start-ds", str(DAYS[0]), "--end-ds", str(DAYS[1])) == 0
    capsys.readouterr()
    assert courier(nights, "status", "--json") == 0
    days = json.loads(capsys.readouterr().out)["days"]
    assert [days[str(day)]["whole_night"] for day in DAYS] == [True, True, False, False]


# ---- Many days in one job ----------------------------------------------------------------------


def test_days_in_one_job_give_the_files_that_nights_give(
    shop: World, after_nights: World, capsys: Capture
) -> None:
    assert courier(shop, "simscore", *RANGE) == 0
    out, err = capsys.readouterr()
    assert "making user_simscores of ds 2026-03-01 to 2026-03-04" in err
    assert err.count("simscore: making") == 1
    assert [line[:13] for line in out.splitlines() if line.startswith("ds ")] == [
        f"ds {day}" for day in DAYS
    ]
    assert published(shop) == published(after_nights)
    assert courier(shop, "simscore", "--ds", str(DAYS[2])) == 0
    assert "nothing to do" in capsys.readouterr().err


def test_only_the_days_that_are_missing_are_made(
    nights: World, after_nights: World, capsys: Capture
) -> None:
    for table in ("test/user_simscores", "shared/user_histories"):
        files.delete_tree(str(nights.root / table / f"ds={DAYS[1]}"))
    files.delete_tree(str(nights.root / "test/user_simscores" / f"ds={DAYS[3]}"))
    assert courier(nights, "simscore", *RANGE, "--dry-run", "--json") == 0
    plans = json.loads(capsys.readouterr().out)
    actions = [[stage["action"][:5] for stage in plan["stages"]] for plan in plans]
    assert actions == [
        ["leave", "leave"], ["compu", "compu"], ["leave", "leave"], ["leave", "compu"]
    ]  # fmt: skip
    assert courier(nights, "simscore", *RANGE) == 0
    assert published(nights) == published(after_nights)


@pytest.fixture(scope="module")
def writes(stand: Stand) -> int:
    """Returns how many files the job of all days writes."""
    with pytest.MonkeyPatch.context() as patch:
        written = die_at_write(patch, None)
        assert courier(stand.at(stand.items), "simscore", *RANGE) == 0
    return len(written)


@pytest.mark.parametrize("share", [0.3, 0.7, 0.97])
def test_many_days_that_died_at_any_write_end_as_if_they_had_not(
    writes: int, shop: World, after_nights: World, share: float
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        die_at_write(patch, int(writes * share))
        with pytest.raises(Killed):
            courier(shop, "simscore", *RANGE)
    assert published(shop) != published(after_nights)
    assert courier(shop, "simscore", *RANGE) == 0
    assert published(shop) == published(after_nights)


def test_a_gate_that_refuses_one_of_many_days_stops_it_and_those_that_go_on_from_it(
    shop: World, after_nights: World, capsys: Capture
) -> None:
    """The days before are published, and once the day is mended the same command does the rest."""
    asked = [{**row, "item": 99} for row in draw_impressions(DAYS[2], seed=2)]
    shop.write_impressions(DAYS[2], asked)
    assert courier(shop, "simscore", *RANGE) == 3
    said = capsys.readouterr()
    assert "Error: ds 2026-03-03: 152 of 152 impressions" in said.err
    assert "ds 2026-03-04 waits: it goes on from ds 2026-03-03" in said.err
    assert [line[:23] for line in said.out.splitlines() if line.startswith("ds")] == [
        f"ds {day} published" for day in DAYS[:2]
    ]
    there, rest = published(shop), {f"/ds={day}/" for day in DAYS[2:]}
    scored = {path for path in there if "user_simscores" in path or "user_histories" in path}
    assert scored
    assert not any(day in path for path in scored for day in rest)
    shop.write_impressions(DAYS[2], draw_impressions(DAYS[2], seed=2))
    assert courier(shop, "simscore", *RANGE) == 0
    assert published(shop) == published(after_nights)


@pytest.mark.parametrize(
    "args",
    [
        (),
        ("--ds", str(DAYS[0]), "--end-ds", str(DAYS[1])),
        ("--start-ds", str(DAYS[0])),
        ("--start-ds", str(DAYS[1]), "--end-ds", str(DAYS[0])),
    ],
)
@pytest.mark.parametrize("command", ["histories", "simscore"])
def test_days_asked_for_in_no_way_that_makes_sense_exit_2(
    shop: World, command: str, args: tuple[str, ...]
) -> None:
    assert courier(shop, command, *args) == 2


# ---- Embeddings come in two ways ---------------------------------------------------------------


def test_embeddings_that_come_either_way_give_the_same_table(
    shop: World, after_nights: World, capsys: Capture
) -> None:
    assert courier(shop, "simscore", *RANGE, "--embeddings-by", "shuffle") == 0
    for day in DAYS:
        found, other = (w.table("user_simscores", day) for w in (shop, after_nights))
        assert found == other
    assert "sim_scores" in other.column_names
    assert capsys.readouterr().out.count("asked item shards for") == len(DAYS)


@pytest.mark.parametrize(
    ("settings", "args", "by"),
    [
        ("", (), "broadcast"),
        ("broadcast_limit_gb = 0.000001", (), "shuffle"),
        ('embeddings_by = "shuffle"', (), "shuffle"),
        ('embeddings_by = "shuffle"', ("--embeddings-by", "broadcast"), "broadcast"),
        ("broadcast_limit_gb = 0.000001", ("--embeddings-by", "auto"), "shuffle"),
    ],
)
def test_how_embeddings_come_follows_from_the_size_or_from_who_asks_and_the_plan_tells_it(
    shop: World, capsys: Capture, settings: str, args: tuple[str, ...], by: str
) -> None:
    shop.settings()
    text = shop.config.read_text().replace("[simscore]", f"[simscore]\n{settings}")
    shop.config.write_text(text)
    command = ["simscore", "--config", str(shop.config), "--ds", str(DAYS[0]), "--dry-run"]
    assert main([*command, *args]) == 0
    assert f"embeddings by {by}" in capsys.readouterr().out


def test_a_worker_without_room_for_a_copy_says_so_before_it_is_half_written(
    shop: World, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broadcast, "_free_bytes", lambda: 10)
    assert courier(shop, "simscore", "--ds", str(DAYS[0])) == 1
    message = paragraph(capsys)
    assert "has 0.0 GB left" in message
    assert 'embeddings_by = "shuffle"' in message


def test_how_embeddings_came_is_no_part_of_what_was_made(nights: World, capsys: Capture) -> None:
    assert courier(nights, "simscore", "--ds", str(DAYS[0]), "--embeddings-by", "shuffle") == 0
    assert "nothing to do" in capsys.readouterr().err


def test_days_together_need_room_for_a_copy_each(shop: World, capsys: Capture) -> None:
    shop.settings()
    text = shop.config.read_text().replace("[simscore]", "[simscore]\nbroadcast_limit_gb = 2e-5")
    shop.config.write_text(text)
    for days, by in ((("--ds", str(DAYS[0])), "broadcast"), (RANGE, "shuffle")):
        assert main(["simscore", "--config", str(shop.config), *days, "--dry-run"]) == 0
        assert f"embeddings by {by}" in capsys.readouterr().out


# ---- Logged histories --------------------------------------------------------------------------


def logging(history: Callable[[int], list[int] | None]) -> Callable[[pa.Table], pa.Table]:
    def add(rows: pa.Table) -> pa.Table:
        lists = pa.array([history(k) for k in range(len(rows))], pa.list_(pa.int64()))
        return rows.append_column("history", lists)

    return add


def test_a_logged_history_is_scored_as_it_is_and_never_feeds_user_histories(
    shop: World, after_nights: World
) -> None:
    histories = [[1, 2, 3, 4, 5, 6, 1], [6, 6], [], None, [99, 12, 3]]
    for day in DAYS:
        rewrite(shop, day, logging(lambda k: histories[k % 5]))
    assert courier(shop, "simscore", *RANGE) == 0
    for day in DAYS:
        found = shop.table("user_simscores", day).to_pylist()
        seen = {tuple(row["history_item_ids"]) for row in found}
        assert seen == {(1, 2, 3, 4, 5), (6, 6), (), (99, 12, 3)}
        for row in found:
            if row["history_item_ids"] == [99, 12, 3]:  # one unknown, one out of scope
                assert row["sim_mask"][:2] == [0, 0]
        notes = manifest(shop, "user_simscores", day)["notes"]
        assert (notes["logged_histories"], notes["days_without_log"]) == (True, [])
        assert shop.table("user_histories", day) == after_nights.table("user_histories", day)


def test_days_with_and_without_logged_histories_go_together(
    shop: World, after_nights: World
) -> None:
    rewrite(shop, DAYS[1], logging(lambda _: [1, 2]))
    assert courier(shop, "simscore", *RANGE) == 0
    lengths = set(shop.table("user_simscores", DAYS[1])["history_len"].to_pylist())
    assert lengths == {2}
    for day in (DAYS[0], *DAYS[2:]):
        assert shop.table("user_simscores", day) == after_nights.table("user_simscores", day)


# ---- Other bad input ---------------------------------------------------------------------------


def test_embeddings_of_another_encoder_are_not_scored(
    nights: World, tmp_path: Path, capsys: Capture, artefacts: Artefacts
) -> None:
    before = published(nights)
    other = make_encoder(tmp_path / "other", seed=1)
    nights.pin(DAYS[3], other, artefacts.codebook)
    assert courier(nights, "simscore", "--ds", str(DAYS[3])) == 2
    assert "mixes two encoders" in paragraph(capsys)
    nights.pins[-1:] = []
    nights.pin(DAYS[3], other, make_codebook(tmp_path / "other", other))
    assert courier(nights, "simscore", "--ds", str(DAYS[3])) == 4
    assert "not been made from the present inputs and settings" in paragraph(capsys)
    assert published(nights) == before


@pytest.mark.parametrize("column", ["user_id", "event_time"])
def test_an_impression_without_user_or_time_is_refused(
    shop: World, capsys: Capture, column: str
) -> None:
    def without(rows: pa.Table) -> pa.Table:
        values = rows[column].to_pylist()
        values[3] = None
        place = rows.column_names.index(column)
        return rows.set_column(place, column, pa.array(values, rows[column].type))

    before = published(shop)
    rewrite(shop, DAYS[0], without)
    assert courier(shop, "simscore", "--ds", str(DAYS[0])) == 1
    message = paragraph(capsys)
    assert f"'{column}' of the impressions table is null in" in message
    assert published(shop) == before


def test_rows_that_are_alike_are_kept_one_for_one(after_nights: World) -> None:
    found = after_nights.table("user_simscores", DAYS[0]).to_pylist()
    first = draw_impressions(DAYS[0], seed=0)[0]
    alike = [
        row
        for row in found
        if (row["user_id"], row["item_id"]) == (first["user"], first["item"])
        and row["event_time"].timestamp() * 1e6 == first["event_time"]
    ]
    assert len(alike) >= 3
    assert len({row["impression_id"] for row in alike}) == len(alike)
    assert len({tuple(row["history_item_ids"]) for row in alike}) == 1


def test_the_whole_night_takes_the_options_of_its_stages(shop: World) -> None:
    assert refresh(shop, DAYS[3], "--from-log", "--embeddings-by", "shuffle") == 0
    assert len(shop.table("user_simscores", DAYS[3])) == 152
