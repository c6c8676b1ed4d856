"""Histories equal the loop over clicks, in every random world; and know nothing of the future."""

import datetime as dt
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_jobs import histories
from feature_jobs.histories import HistoryLaw, click_moments, histories_at, sort_clicks
from tests.support import oracles

# Few users, items and times, so that ties and repeats are the rule.
click = st.tuples(st.integers(0, 2), st.integers(0, 5), st.integers(0, 12))
moment = st.tuples(st.integers(0, 3), st.integers(0, 14))
law = st.builds(
    HistoryLaw,
    history_len=st.integers(1, 4),
    window_us=st.integers(1, 15),
    click_delay_us=st.just(0),
)


def found_histories(
    clicks: list[tuple[int, int, int]], moments: list[tuple[int, int]], law: HistoryLaw
) -> list[list[int]]:
    log = sort_clicks(*(np.array([c[k] for c in clicks], np.int64) for k in (0, 2, 1)))
    users, times = (np.array([m[k] for m in moments], np.int64) for k in (0, 1))
    places = histories_at(log, users, times, law)
    assert places.shape == (len(moments), law.history_len)
    return [[int(log.items[p]) for p in row if p >= 0] for row in places]


@settings(max_examples=300, deadline=None)
@given(st.lists(click, max_size=40), st.lists(moment, min_size=1, max_size=10), law)
def test_histories_equal_the_loop_over_clicks(
    clicks: list[tuple[int, int, int]], moments: list[tuple[int, int]], law: HistoryLaw
) -> None:
    expected = [
        oracles.history(clicks, user, time, law.history_len, law.window_us)
        for user, time in moments
    ]
    assert found_histories(clicks, moments, law) == expected


@settings(max_examples=200, deadline=None)
@given(st.lists(click, min_size=1, max_size=30), moment, law, st.data())
def test_no_click_at_or_after_a_moment_changes_its_history(
    clicks: list[tuple[int, int, int]], at: tuple[int, int], law: HistoryLaw, data: Any
) -> None:
    before = found_histories(clicks, [at], law)
    later = data.draw(st.integers(at[1], 30))
    planted = (at[0], data.draw(st.integers(0, 5)), later)
    assert found_histories([*clicks, planted], [at], law) == before
    future = [c for c in clicks if c[2] >= at[1]]
    assert found_histories([c for c in clicks if c not in future], [at], law) == before


@settings(max_examples=50, deadline=None)
@given(st.lists(click, min_size=2, max_size=30), st.randoms(use_true_random=False))
def test_the_order_of_arrival_never_matters(clicks: list[tuple[int, int, int]], rng: Any) -> None:
    moments, law = [(u, 13) for u in range(3)], HistoryLaw(4, 20, 0)
    shuffled = list(clicks)
    rng.shuffle(shuffled)
    assert found_histories(shuffled, moments, law) == found_histories(clicks, moments, law)


def test_a_repeat_that_hides_many_older_items_is_looked_past() -> None:
    """One item clicked a thousand times since the others: the search has to widen."""
    clicks = [(0, item, item) for item in range(5)] + [(0, 9, t) for t in range(100, 1100)]
    assert found_histories(clicks, [(0, 5000)], HistoryLaw(4, 10_000, 0)) == [[9, 4, 3, 2]]


def test_blocks_of_moments_give_what_one_block_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    clicks = [(int(u), int(i), int(t)) for u, i, t in rng.integers(0, (3, 30, 200), (500, 3))]
    moments = [(int(u), int(t)) for u, t in rng.integers(0, (3, 250), (80, 2))]
    law = HistoryLaw(6, 100, 0)
    whole = found_histories(clicks, moments, law)
    assert sum(len(h) for h in whole) > 200
    monkeypatch.setattr(histories, "_MAX_CELLS", 50)
    assert found_histories(clicks, moments, law) == whole


def rows(event: list[int], click: list[int | None] | None) -> pa.Table:
    time = pa.timestamp("us", tz="UTC")
    columns = {"event_time": pa.array(event, pa.int64()).cast(time)}
    if click is not None:
        columns["click_time"] = pa.array(click, pa.int64()).cast(time)
    return pa.table(columns)


def test_a_click_without_a_time_is_dated_by_its_event_and_the_delay() -> None:
    assert click_moments(rows([10, 20], None), 5)[0].tolist() == [15, 25]
    assert click_moments(rows([10, 20], [None, 21]), 5)[0].tolist() == [15, 21]


def test_a_click_is_never_dated_before_its_own_impression() -> None:
    moments, early = click_moments(rows([10, 20], [3, 21]), 0)
    assert (moments.tolist(), early) == ([10, 21], 1)


def test_user_histories_are_as_of_the_end_of_the_day() -> None:
    time = pa.timestamp("us", tz="UTC")
    clicks = pa.table(
        {
            "user_id": ["b", "a", "a", "c"],
            "item_id": [1, 2, 3, 4],
            "click_time": pa.array([99, 50, 60, 100], pa.int64()).cast(time),
        }
    )
    made = histories.user_histories(clicks, 100, HistoryLaw(5, 1000, 0)).to_pylist()
    assert [(r["user_id"], r["item_ids"]) for r in made] == [("a", [3, 2]), ("b", [1])]
    epoch = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
    assert made[0]["click_times"] == [epoch + dt.timedelta(microseconds=u) for u in (60, 50)]
