"""Histories equal the loop over clicks, in every random world; and know nothing of the future."""

import dataclasses
import datetime as dt
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_jobs.impressions import clicks as click_arrays
from feature_jobs.impressions.clicks import HistoryLaw, histories_at, sort_clicks
from feature_jobs.impressions.histories import (
    DAY_US,
    AdvanceHistories,
    HistoriesJob,
    HistoryDay,
    LogChunk,
    WriteHistories,
    click_moments,
    clicks_before,
    clicks_of,
    history_lists,
    no_clicks,
    recent_clicks,
    user_histories,
    walk_days,
)
from feature_jobs.store import partitions
from feature_jobs.store.pieces import write_piece
from tests.support import oracles

# Few users, items and times, so that ties and repeats are the rule.
click = st.tuples(st.integers(0, 2), st.integers(0, 5), st.integers(0, 12))
moment = st.tuples(st.integers(0, 3), st.integers(0, 14))
law = st.builds(
    HistoryLaw,
    history_len=st.integers(1, 4),
    window_us=st.integers(4, 15),
    click_delay_us=st.just(0),
    lag_us=st.integers(0, 3),
    keep_repeats=st.booleans(),
)


def expected_history(clicks: list[oracles.Click], user: Any, time: int, law: HistoryLaw) -> list:
    return oracles.history(
        clicks, user, time, law.history_len, law.window_us, law.lag_us, law.keep_repeats
    )


def found_histories(
    clicks: list[tuple[int, int, int]], moments: list[tuple[int, int]], law: HistoryLaw
) -> list[list[int]]:
    columns = (np.array([c[k] for c in clicks], np.int64) for k in (0, 2, 1))
    log = sort_clicks(*columns, law.keep_repeats)
    users, times = (np.array([m[k] for m in moments], np.int64) for k in (0, 1))
    places = histories_at(log, users, times, law)
    assert places.shape == (len(moments), law.history_len)
    return [[int(log.items[p]) for p in row if p >= 0] for row in places]


@settings(max_examples=300, deadline=None)
@given(st.lists(click, max_size=40), st.lists(moment, min_size=1, max_size=10), law)
def test_histories_equal_the_loop_over_clicks(
    clicks: list[tuple[int, int, int]], moments: list[tuple[int, int]], law: HistoryLaw
) -> None:
    expected = [expected_history(clicks, user, time, law) for user, time in moments]
    assert found_histories(clicks, moments, law) == expected


@settings(max_examples=200, deadline=None)
@given(st.lists(click, min_size=1, max_size=30), moment, law, st.data())
def test_no_click_at_or_after_a_moment_changes_its_history(
    clicks: list[tuple[int, int, int]], at: tuple[int, int], law: HistoryLaw, data: Any
) -> None:
    before = found_histories(clicks, [at], law)
    later = data.draw(st.integers(at[1] - law.lag_us, 30))
    planted = (at[0], data.draw(st.integers(0, 5)), later)
    assert found_histories([*clicks, planted], [at], law) == before
    future = [c for c in clicks if c[2] >= at[1] - law.lag_us]
    assert found_histories([c for c in clicks if c not in future], [at], law) == before


@settings(max_examples=50, deadline=None)
@given(st.lists(click, min_size=2, max_size=30), st.randoms(use_true_random=False))
def test_the_order_of_arrival_never_matters(clicks: list[tuple[int, int, int]], rng: Any) -> None:
    moments, law = [(u, 13) for u in range(3)], HistoryLaw(4, 20, 0)
    shuffled = list(clicks)
    rng.shuffle(shuffled)
    assert found_histories(shuffled, moments, law) == found_histories(clicks, moments, law)


# ---- Users who click a lot ---------------------------------------------------------------------


def test_a_repeat_that_hides_many_older_items_is_looked_past() -> None:
    """The search has to go far back past an item clicked a thousand times since the others."""
    clicks = [(0, item, item) for item in range(5)] + [(0, 9, t) for t in range(100, 1100)]
    assert found_histories(clicks, [(0, 5000)], HistoryLaw(4, 10_000, 0)) == [[9, 4, 3, 2]]


def test_many_repeats_of_several_users_give_what_the_loop_gives() -> None:
    rng = np.random.default_rng(0)
    users, times = rng.integers(0, 3, 900), rng.integers(0, 1000, 900)
    # Mostly two items, and now and then one of forty.
    items = np.where(rng.random(900) < 0.95, rng.integers(0, 2, 900), rng.integers(2, 42, 900))
    clicks = [(int(u), int(i), int(t)) for u, i, t in zip(users, items, times, strict=True)]
    moments = [(u, t) for u in range(4) for t in range(0, 1100, 23)]
    for law in (HistoryLaw(5, 2000, 0), HistoryLaw(5, 300, 0, 40), HistoryLaw(3, 900, 0)):
        expected = [expected_history(clicks, user, time, law) for user, time in moments]
        assert found_histories(clicks, moments, law) == expected
    assert max(len(h) for h in expected) == 3


def test_what_a_user_with_a_hundred_thousand_clicks_on_ten_items_costs_follows_from_the_length(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A plain search would look at five thousand million candidates."""
    looked_at, real = [], click_arrays._visible

    def count(clicks: Any, places: np.ndarray, *args: Any) -> np.ndarray:
        looked_at.append(places.size)
        return real(clicks, places, *args)

    monkeypatch.setattr(click_arrays, "_visible", count)
    n, length = 100_000, 50
    times, items = np.arange(n), np.arange(n) % 10
    log = sort_clicks(np.zeros(n, np.int64), times, items)
    places = histories_at(log, np.zeros(n, np.int64), times, HistoryLaw(length, 10 * n, 0))
    assert (places[:, 10:] == -1).all()
    np.testing.assert_array_equal(log.times[places[20:, :10]], times[20:, None] - np.arange(1, 11))
    assert sum(looked_at) < 15 * n * length


def test_blocks_of_moments_give_what_one_block_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    clicks = [(int(u), int(i), int(t)) for u, i, t in rng.integers(0, (3, 30, 200), (500, 3))]
    moments = [(int(u), int(t)) for u, t in rng.integers(0, (3, 250), (80, 2))]
    law = HistoryLaw(6, 100, 0)
    whole = found_histories(clicks, moments, law)
    assert sum(len(h) for h in whole) > 200
    monkeypatch.setattr(click_arrays, "_MAX_CELLS", 50)
    assert found_histories(clicks, moments, law) == whole


# ---- When a click happened ---------------------------------------------------------------------

TIME = pa.timestamp("us", tz="UTC")


def rows(event: list[int], click: list[int | None] | None) -> pa.Table:
    columns = {"event_time": pa.array(event, pa.int64()).cast(TIME)}
    if click is not None:
        columns["click_time"] = pa.array(click, pa.int64()).cast(TIME)
    return pa.table(columns)


def test_a_click_without_a_time_is_dated_by_its_event_and_the_delay() -> None:
    assert click_moments(rows([10, 20], None), 5)[0].tolist() == [15, 25]
    assert click_moments(rows([10, 20], [None, 21]), 5)[0].tolist() == [15, 21]


def test_a_click_is_never_dated_before_its_own_impression() -> None:
    moments, early = click_moments(rows([10, 20], [3, 21]), 0)
    assert (moments.tolist(), early) == ([10, 21], 1)


# ---- Day after day -----------------------------------------------------------------------------

FIRST = dt.date(2026, 3, 1).toordinal()
EPOCH = dt.date(1970, 1, 1).toordinal()
NUMBERS = tuple(range(FIRST, FIRST + 5))
DAYS = tuple(HistoryDay(n, (n - EPOCH) * DAY_US, (n - EPOCH + 1) * DAY_US) for n in NUMBERS)
QUARTER = DAY_US // 4
# An impression: the day that logs it, user, item, how many quarters of a day after the day's start
# it happened (below zero: late), whether it was clicked, and how many quarters later.
impression = st.tuples(
    st.integers(0, len(DAYS) - 1), st.integers(0, 2), st.integers(0, 6),
    st.integers(-16, 3), st.booleans(), st.integers(0, 9),
)  # fmt: skip
daily_law = st.builds(
    HistoryLaw,
    history_len=st.integers(1, 4),
    window_us=st.integers(2, 16).map(lambda quarters: quarters * QUARTER + 1),
    click_delay_us=st.just(0),
    lag_us=st.sampled_from([0, 1, QUARTER]),
    keep_repeats=st.booleans(),
    late_us=st.sampled_from([0, 2 * DAY_US]),
)


def logged(drawn: list[tuple], day: int) -> pa.Table:
    """Returns the impressions that the partition of a day holds."""
    mine = [row for row in drawn if row[0] == day]
    event = [DAYS[day].start_us + row[3] * QUARTER for row in mine]
    clicked_at = [e + row[5] * QUARTER for e, row in zip(event, mine, strict=True)]
    columns = [
        pa.array([f"user-{row[1]}" for row in mine], pa.string()),
        pa.array([row[2] for row in mine], pa.int64()),
        pa.array(event, pa.int64()).cast(TIME),
        pa.array([row[4] for row in mine], pa.bool_()),
        pa.array(clicked_at, pa.int64()).cast(TIME),
    ]
    return pa.table(columns, names=["user_id", "item_id", "event_time", "clicked", "click_time"])


def as_clicks(table: pa.Table) -> list[oracles.Click]:
    columns = table["user_id"], table["item_id"], table["click_time"].cast(pa.int64())
    return list(zip(*(c.to_pylist() for c in columns), strict=True))


def clicks_on(drawn: list[tuple], days: list[int]) -> pa.Table:
    nothing = no_clicks(pa.string(), pa.int64())
    law = HistoryLaw(1, 99 * DAY_US, 0)
    parts = [clicks_of(logged(drawn, day), NUMBERS[day], DAYS[day].end_us, law) for day in days]
    return pa.concat_tables([nothing, *parts])


def expected_lists(drawn: list[tuple], day: int, law: HistoryLaw) -> list[list[int]]:
    """Finds histories by the law as it reads, over the clicks that partitions up to `day` log."""
    clicks = as_clicks(clicks_on(drawn, list(range(day + 1))))
    rows = logged(drawn, day)
    moments = rows["event_time"].cast(pa.int64()).to_pylist()
    found = []
    for user, moment in zip(rows["user_id"].to_pylist(), moments, strict=True):
        too_late = moment < DAYS[day].start_us - law.late_us
        found.append([] if too_late else expected_history(clicks, user, moment, law))
    return found


def expected_state(drawn: list[tuple], day: int, law: HistoryLaw) -> dict[str, list[int]]:
    clicks = as_clicks(clicks_on(drawn, list(range(day + 1))))
    users = sorted({user for user, _, _ in clicks})
    law = dataclasses.replace(law, lag_us=0)  # the table has all clicks, whoever serves them late
    found = {user: expected_history(clicks, user, DAYS[day].end_us, law) for user in users}
    return {user: past for user, past in found.items() if past}


def state_of(table: pa.Table) -> dict[str, list[int]]:
    return dict(zip(table["user_id"].to_pylist(), table["item_ids"].to_pylist(), strict=True))


@settings(max_examples=200, deadline=None)
@given(st.lists(impression, max_size=60), daily_law)
def test_one_walk_through_all_days_gives_what_the_loop_gives(
    drawn: list[tuple], law: HistoryLaw
) -> None:
    clicks = clicks_on(drawn, list(range(len(DAYS))))
    for day, known in enumerate(walk_days(clicks, DAYS, law)):
        found = history_lists(known, logged(drawn, day)).to_pylist()
        assert found == expected_lists(drawn, day, law)
        assert state_of(user_histories(known)) == expected_state(drawn, day, law)


@settings(max_examples=200, deadline=None)
@given(st.lists(impression, max_size=60), daily_law, st.integers(1, len(DAYS) - 1))
def test_night_after_night_through_tables_gives_the_same_tables_as_one_walk(
    drawn: list[tuple], law: HistoryLaw, first: int
) -> None:
    """The first night begins from the log of the days before it, the next from its tables."""
    whole = list(walk_days(clicks_on(drawn, list(range(len(DAYS)))), DAYS, law))
    before = clicks_on(drawn, list(range(first)))
    for day in range(first, len(DAYS)):
        clicks = pa.concat_tables([before, clicks_on(drawn, [day])])
        (known,) = walk_days(clicks, DAYS[day : day + 1], law)
        rows = logged(drawn, day)
        assert history_lists(known, rows).equals(history_lists(whole[day], rows))
        state = [user_histories(known), recent_clicks(known)]
        assert state == [user_histories(whole[day]), recent_clicks(whole[day])]
        before = clicks_before(state, no_clicks(pa.string(), pa.int64()))


def test_user_histories_hold_no_click_of_a_later_day_and_recent_clicks_keep_it() -> None:
    drawn = [(0, 1, 5, 3, True, 2), (0, 1, 6, 0, True, 0), (0, 2, 5, 3, True, 1)]
    (known,) = walk_days(clicks_on(drawn, [0]), DAYS[:1], HistoryLaw(5, 9 * DAY_US, 0))
    (today,) = user_histories(known).to_pylist()
    assert (today["user_id"], today["item_ids"]) == ("user-1", [6])
    assert [t < dt.datetime(2026, 3, 2, tzinfo=dt.UTC) for t in today["click_times"]] == [True]
    kept = recent_clicks(known)
    assert state_of(kept) == {"user-1": [5], "user-2": [5]}


def test_nothing_is_kept_that_no_later_moment_can_see() -> None:
    """Of ten items that each user clicked on the first day, five are left four days later."""
    drawn = [(0, user, item, 0, True, 0) for user in range(10) for item in range(10)]
    law = HistoryLaw(5, 30 * DAY_US, 0, late_us=2 * DAY_US)
    known = list(walk_days(clicks_on(drawn, [0]), DAYS, law))
    assert [len(k.clicks.users) for k in known] == [100, 100, 100, 50, 50]
    assert len(recent_clicks(known[-1])) == 0


def test_a_click_dated_a_whole_window_after_its_day_is_left_out() -> None:
    """A shop that takes milliseconds for microseconds dates clicks far after their day."""
    law = HistoryLaw(5, 2 * DAY_US, 0)
    drawn = [(0, 1, 5, 0, True, 12), (0, 1, 6, 0, True, 11)]
    clicks = clicks_of(logged(drawn, 0), NUMBERS[0], DAYS[0].end_us, law)
    assert clicks["item_id"].to_pylist() == [6]


def test_the_receipts_of_a_day_tell_its_impressions_and_its_users(tmp_path: Path) -> None:
    """Three users of two shards of the walk share a part on each of two days."""
    drawn = [(0, 0, 1, 0, True, 0), (0, 1, 2, 1, True, 1), (1, 2, 1, 0, True, 0)]
    law, staging = HistoryLaw(5, 9 * DAY_US, 0), str(tmp_path / "job")
    job = HistoriesJob(law, DAYS[:2], (), 2, pa.string(), pa.int64(), "UTC", staging)
    advance = AdvanceHistories(job, (1, 1))
    given_rows: dict[tuple[int, int], list] = {}
    for shard, mine in ((0, drawn[:1]), (1, drawn[1:])):
        clicks = clicks_on(mine, [0, 1])
        piece = write_piece(f"{staging}/clicks-{shard}", clicks)
        chunks = [LogChunk(NUMBERS[0], 7, piece), LogChunk(NUMBERS[1], 2, None)]
        for key, users in advance.process((shard, chunks)):
            given_rows.setdefault(key, []).append(users)
    stagings = [str(tmp_path / str(day)) for day in range(2)]
    for element in given_rows.items():
        list(WriteHistories(job, (1, 1), stagings).process(element) or ())
    told = [partitions.receipts(f"{staging}/user_histories")[0] for staging in stagings]
    assert [part["counts"] for part in told] == [
        {"impressions": 14, "users": 2}, {"impressions": 4, "users": 3}
    ]  # fmt: skip
    assert [part["rows"] for part in told] == [2, 3]
