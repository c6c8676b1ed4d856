"""Training rows equal the loop over requests in every random world, and know no future."""

import datetime as dt
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_jobs.impressions.clicks import HistoryLaw
from feature_jobs.impressions.training_rows import (
    TrainingRowsDay,
    TrainingRowsJob,
    training_rows,
)
from feature_jobs.schemas import ROW_CLICKS, TIMESTAMP, TRAINING_ROWS
from tests.support import oracles

END, GAP, WINDOW, DELAY = 60, 4, 40, 2
ID_TYPES = {"int": pa.int64(), "string": pa.string()}
Row = dict[str, Any]

# Few users, items and times, so that ties, repeats and long requests are the rule. Requests with an
# ID have one that a moment may give to a request without.
impression = st.fixed_dictionaries(
    {
        "user": st.integers(0, 1),
        "item": st.integers(0, 25),
        "event_time": st.integers(0, END - 1),
        "clicked": st.booleans(),
        "click_time": st.none() | st.integers(0, END + 10),
        "request": st.none() | st.integers(28, 30),
    }
)
impressions = st.lists(impression, max_size=80)
kinds = st.tuples(
    st.sampled_from(["int", "string"]), st.sampled_from(["int", "string", "absent"])
)  # of item and user IDs, of request IDs


def named(rows: list[Row], ids: str, requests: str) -> list[Row]:
    """Returns the rows with IDs of these kinds; `absent` takes the request away."""

    def name(kind: str, prefix: str, number: Any) -> Any:
        return f"{prefix}{number}" if kind == "string" and number is not None else number

    return [
        {
            **row,
            "user": name(ids, "u", row["user"]),
            "item": name(ids, "i", row["item"]),
            "request": None if requests == "absent" else name(requests, "", row["request"]),
        }
        for row in rows
    ]


def shard_of(rows: list[Row], ids: str, requests: str) -> pa.Table:
    def column(name: str, kind: pa.DataType) -> pa.Array:
        return pa.array([row[name] for row in rows], kind)

    columns = {
        "user_id": column("user", ID_TYPES[ids]),
        "item_id": column("item", ID_TYPES[ids]),
        "event_time": column("event_time", pa.int64()).cast(TIMESTAMP),
        "clicked": column("clicked", pa.bool_()),
        "click_time": column("click_time", pa.int64()).cast(TIMESTAMP),
    }
    if requests != "absent":
        columns["request_id"] = column("request", ID_TYPES[requests])
    return pa.table(columns)


def found_rows(
    rows: list[Row], clicks: list[oracles.Click], ids: str, requests: str, lag: int = 0
) -> tuple[list[tuple], dict[str, int]]:
    """Returns what `training_rows` makes, as the oracle tells it, and the counts."""
    kind = ID_TYPES[ids]
    request_id = ID_TYPES.get(requests, pa.string())
    schema = TRAINING_ROWS.schema(kind, kind, request_id=request_id)
    day = TrainingRowsDay(dt.date(1970, 1, 1), END, 1, schema, (), (), "")
    job = TrainingRowsJob(HistoryLaw(ROW_CLICKS, WINDOW, DELAY, lag), GAP, "UTC", None, (day,), "")
    users, items, times = (list(c) for c in zip(*clicks, strict=True)) if clicks else ([],) * 3
    log = pa.table(
        {
            "user_id": pa.array(users, kind),
            "item_id": pa.array(items, kind),
            "click_time": pa.array(times, pa.int64()).cast(TIMESTAMP),
        }
    )
    made, counts = training_rows(shard_of(rows, ids, requests), log, job, day)
    made = made.select(schema.names).cast(schema)
    moments = made["event_time"].cast(pa.int64())
    made = made.set_column(made.schema.get_field_index("event_time"), "event_time", moments)
    return sorted((tuple(r.values()) for r in made.to_pylist()), key=lambda r: r[:3]), counts


def expected_rows(
    rows: list[Row], clicks: list[oracles.Click], requests: str, lag: int = 0
) -> list[tuple]:
    name_of = int if requests == "int" else str
    return oracles.training_rows(rows, clicks, END, GAP, WINDOW, DELAY, name_of, lag)


@settings(max_examples=300, deadline=None)
@given(impressions, impressions, kinds, st.sampled_from([0, 3]))
def test_training_rows_equal_the_loop_over_requests(
    rows: list[Row], earlier: list[Row], kinds: tuple[str, str], lag: int
) -> None:
    rows, earlier = named(rows, *kinds), named(earlier, *kinds)
    clicks = oracles.clicks_of([*earlier, *rows], DELAY)
    found, _ = found_rows(rows, clicks, *kinds, lag)
    assert found == expected_rows(rows, clicks, kinds[1], lag)


def random_world(seed: int, count: int = 150) -> list[Row]:
    rng = np.random.default_rng(seed)
    return [
        {
            "user": int(rng.integers(0, 3)),
            "item": int(rng.integers(0, 40)),
            "event_time": int(rng.integers(0, END)),
            "clicked": bool(rng.random() < 0.5),
            "click_time": int(rng.integers(0, END + 10)) if rng.random() < 0.7 else None,
            "request": [None, 1000, 1001, 1002][rng.integers(0, 4)],
        }
        for _ in range(count)
    ]


@pytest.mark.parametrize("kinds", [("int", "int"), ("string", "string"), ("int", "absent")])
def test_a_world_with_every_kind_of_request_equals_the_loop_and_is_counted(
    kinds: tuple[str, str],
) -> None:
    rows = named(random_world(seed=5), *kinds)
    clicks = oracles.clicks_of(rows, DELAY)
    found, counts = found_rows(rows, clicks, *kinds)
    assert found == expected_rows(rows, clicks, kinds[1])
    assert any(row[2] > 0 for row in found)  # a request of several rows
    assert {len(row[6]) for row in found} >= {0, ROW_CLICKS}
    assert any(set(row[5]) == {True, False} for row in found)
    assert counts["impressions"] == len(rows)
    assert counts["requests"] == len({row[:2] for row in found})
    assert counts["clicks"] == sum(sum(row[5]) for row in found)
    assert counts["rows_with_history"] == sum(bool(row[6]) for row in found)
    assert counts["unclicked_left_out"] > 0
    assert counts["clicks_after_the_day"] > 0


def test_every_click_of_a_request_is_a_label_exactly_once() -> None:
    rows = [
        {**dict(user=1, event_time=7, click_time=None, request=1000), "item": i, "clicked": i < 12}
        for i in [*range(20), 3, 15]
    ]
    found, counts = found_rows(rows, [], "int", "int")
    assert [(row[2], len(row[4])) for row in found] == [(0, 5), (1, 5), (2, 5)]
    labelled = [i for row in found for i, yes in zip(row[4], row[5], strict=True) if yes]
    assert labelled == list(range(12))
    assert (counts["clicks"], counts["unclicked_left_out"]) == (12, 5)


def test_a_click_after_the_day_leaves_out_its_item_but_not_one_clicked_before() -> None:
    blank = dict(user=1, event_time=50, clicked=True, request=1000)
    rows = [
        {**blank, "item": 1, "click_time": END},
        {**blank, "item": 2, "click_time": END},
        {**blank, "item": 2, "click_time": END - 1},
        {**blank, "item": 3, "click_time": END, "request": 1001},
        {**blank, "item": 1, "click_time": None, "clicked": False},
    ]
    found, counts = found_rows(rows, [], "int", "int")
    assert [(row[4], row[5]) for row in found] == [([2], [True])]
    assert (counts["requests"], counts["clicks_after_the_day"]) == (1, 2)


def test_the_items_that_stay_do_not_follow_arrival() -> None:
    rows = [{**row, "clicked": False} for row in named(random_world(seed=6), "string", "string")]
    found, counts = found_rows(rows, [], "string", "string")
    assert counts["unclicked_left_out"] > 20
    assert found_rows(rows[::-1], [], "string", "string") == (found, counts)


@settings(max_examples=300, deadline=None)
@given(impressions.filter(bool), kinds, st.data())
def test_a_click_moved_within_the_future_of_a_row_never_changes_it(
    rows: list[Row], kinds: tuple[str, str], data: Any
) -> None:
    rows = named(rows, *kinds)
    before, _ = found_rows(rows, oracles.clicks_of(rows, DELAY), *kinds)
    moment = data.draw(st.sampled_from([row[3] for row in before] or [0]))

    def moved(row: Row) -> Row:
        if not row["clicked"] or not moment <= oracles.clicked_at(row, DELAY) < END:
            return row
        first = max(moment, row["event_time"])
        return {**row, "click_time": data.draw(st.integers(first, END - 1))}

    changed = [moved(row) for row in rows]
    planted = [(row["user"], row["item"], data.draw(st.integers(moment, END + 5))) for row in rows]
    after, _ = found_rows(changed, [*oracles.clicks_of(changed, DELAY), *planted], *kinds)
    for one in (row for row in before if row[3] <= moment):
        assert one in after


@pytest.mark.parametrize("requests", ["int", "string"])
def test_a_request_without_an_id_never_has_the_name_of_another(requests: str) -> None:
    """Some shops' request_id are moments, which name the requests without one too."""
    blank = dict(user=1, item=1, clicked=False, click_time=None)
    at = [(10, None), (12, 10), (20, None), (20, 11), (30, 30), (30, 31), (30, None), (40, 50)]
    rows = [{**blank, "event_time": moment, "request": given} for moment, given in at]
    other = {**blank, "user": 2, "event_time": 10, "request": None}
    found, _ = found_rows(named([*rows, other], "int", requests), [], "int", requests)
    names = {(row[0], int(row[1])): row[3] for row in found}
    assert names == {
        **{(1, 10): 12, (1, 11): 20, (1, 30): 30, (1, 31): 30, (1, 50): 40},
        **{(1, 12): 10, (1, 20): 20, (1, 32): 30, (2, 10): 10},
    }


@pytest.mark.parametrize("kind", ["int", "string"])
def test_a_shard_without_an_impression_makes_no_row(kind: str) -> None:
    click = ("u", "i", 5) if kind == "string" else (1, 2, 5)
    for clicks in ([], [click]):
        found, counts = found_rows([], clicks, kind, kind)
        assert found == []
        assert set(counts.values()) == {0}
