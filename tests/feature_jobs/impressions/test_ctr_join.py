"""The pure functions of JOIN; the job is tried by `courier join` (tests/pipelines/test_join.py)."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from feature_jobs.impressions import ctr_join
from feature_jobs.impressions.ctr_join import (
    batches_of,
    count_samples,
    cut,
    match_rows,
    night_histories,
    positive,
)
from feature_jobs.schemas import TIMESTAMP


@given(st.lists(st.integers(0, 30), max_size=8), st.integers(1, 12))
def test_parts_are_all_rows_in_order_and_no_more_than_asked(groups: list[int], most: int) -> None:
    parts = cut(groups, most)
    rows = [(one.group, row) for part in parts for one in part for row in range(*one[1:])]
    assert rows == [(group, row) for group, count in enumerate(groups) for row in range(count)]
    sizes = [sum(one.stop - one.start for one in part) for part in parts]
    assert max(sizes) <= most
    assert len(parts) == max(1, -(-sum(groups) // most))
    first = [part[0].group if part else 0 for part in parts]
    assert [first[n] for n in batches_of(parts)] == list(dict.fromkeys(first))


def keys(rows: list[tuple[int, int, int]]) -> pa.Table:
    users, items, times = zip(*rows, strict=True) if rows else ((), (), ())
    return pa.table(
        {
            "user_id": pa.array(users, pa.int64()),
            "item_id": pa.array(items, pa.int64()).cast(pa.string()),
            "event_time": pa.array(times, pa.int64()).cast(TIMESTAMP),
        }
    )


row = st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3))


@given(st.lists(row), st.lists(row))
def test_a_sample_is_matched_by_user_item_and_moment(
    samples: list[tuple[int, int, int]], published: list[tuple[int, int, int]]
) -> None:
    found = match_rows(keys(samples), keys(published))
    for sample, at in zip(samples, found.tolist(), strict=True):
        assert (at >= 0) == (sample in published)
        assert at < 0 or published[at] == sample


def test_two_keys_of_one_hash_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctr_join, "_key_hashes", lambda rows: np.zeros(len(rows), np.uint64))
    found = match_rows(keys([(1, 1, 1), (2, 2, 2)]), keys([(1, 1, 1)]))
    assert found.tolist() == [0, -1]


def test_users_without_a_history_have_an_empty_one() -> None:
    histories = pa.table({"user_id": [1, 2], "item_ids": [[7, 8], [9]]})
    kind = pa.list_(pa.int64())
    found = night_histories(pa.chunked_array([[2, 3, 1, 2]]), histories, kind)
    assert found.to_pylist() == [[9], [], [7, 8], [9]]


def test_each_sample_is_counted_by_the_first_that_it_lacks() -> None:
    rows = pa.table(
        {
            "has_night": [False, True, True, True, True, True],
            "item_known": [False, False, True, True, True, True],
            "has_image": [False, False, False, True, True, True],
            "in_scope": [False, False, False, False, True, True],
            "history_len": [3, 0, 0, 0, 0, 2],
        }
    )
    assert count_samples(rows) == {
        "samples": 6, "no_snapshot": 1, "unknown_item": 1, "no_image": 1,
        "out_of_scope": 1, "no_history": 1, "matched": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (pa.chunked_array([[True, False, None]]), [True, False, False]),
        (pa.chunked_array([[1, 0, None]]), [True, False, False]),
        (pa.chunked_array([[0.5, -1.0, float("nan")]]), [True, False, False]),
    ],
)
def test_labels_may_be_of_any_kind(labels: pa.ChunkedArray, expected: list[bool]) -> None:
    assert positive(labels).tolist() == expected
