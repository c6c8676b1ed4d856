"""Tests how impressions are told apart, put in order, and share histories on their way."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from feature_jobs.impressions import simscore
from feature_jobs.impressions.simscore import (
    impression_ids,
    score_impressions,
    share_histories,
    sort_impressions,
)
from feature_jobs.items.item_vectors import items_of_answers, no_answers
from feature_jobs.store.pieces import read_all, write_pieces


def impressions(rows: list[tuple[int, int, int, bool]]) -> pa.Table:
    users, items, times, clicked = (list(c) for c in zip(*rows, strict=True))
    return pa.table(
        {
            "user_id": users,
            "item_id": items,
            "event_time": pa.array(times, pa.int64()).cast(pa.timestamp("us", "UTC")),
            "clicked": clicked,
        }
    )


def test_made_ids_tell_all_rows_apart_and_do_not_follow_arrival() -> None:
    rng = np.random.default_rng(2)
    rows = [tuple(int(v) for v in r) for r in rng.integers(0, 3, (60, 4))]
    rows = [(u, i, t, bool(c)) for u, i, t, c in rows]
    assert len(set(rows)) < 60
    one = sort_impressions(impressions(rows))
    other = sort_impressions(impressions(rows[::-1]))
    assert one == other
    ids = impression_ids(one).to_pylist()
    assert len(set(ids)) == 60
    assert all(len(i) == 32 and int(i, 16) >= 0 for i in ids)
    alone = sort_impressions(impressions(rows[:1]))
    assert impression_ids(alone)[0].as_py() in ids


HISTORIES = st.lists(
    st.tuples(st.lists(st.integers(0, 1), max_size=2), st.integers(0, 2)), max_size=12
)


@given(HISTORIES, st.integers(0, 2))
def test_a_shared_history_is_that_of_the_row_before_if_of_its_shard(
    drawn: list[tuple[list[int], int]], cut: int
) -> None:
    lists = pa.array([history for history, _ in drawn], pa.list_(pa.int64()))[cut:]
    shards = np.array([shard for _, shard in drawn], np.int64)[cut:]
    found = share_histories(pa.table({"history": lists}), shards)["history"].to_pylist()
    previous: tuple[int, list[int]] | None = None
    for history, shard, kept in zip(lists.to_pylist(), shards, found, strict=True):
        assert kept == (None if previous == (shard, history) else history)
        previous = shard, history


def test_no_piece_of_a_shard_begins_with_a_history_of_another(tmp_path: Path) -> None:
    rows = pa.table({"history": pa.array([[1]] * 6, pa.list_(pa.int64()))})
    shards = np.array([1, 0, 0, 1, 1, 0])
    pieces = list(write_pieces(str(tmp_path / "rows"), share_histories(rows, shards), shards))
    assert [shard for shard, _ in pieces] == [0, 1]
    found = read_all(pieces[0][1].path)["history"].to_pylist()
    assert found == [[1], None, [1], [1], [1], None]


# ---- Scored with histories of the log ----------------------------------------------------------

NOTHING_KNOWN = items_of_answers(no_answers(pa.int64()))


def logged() -> pa.Table:
    """Makes requests of two users in turns; many rows differ in what is carried alone."""
    rows = impressions([(n % 2, n // 8, n // 8, False) for n in range(32)])
    histories = pa.array([[n % 2, 7, n // 16] for n in range(32)], pa.list_(pa.int64()))
    carried = np.random.default_rng(0).permutation(32)
    return rows.append_column("history", histories).append_column("position", pa.array(carried))


@pytest.mark.parametrize("shared", [False, True])
def test_neither_arrival_nor_sharing_decides_what_a_made_id_stands_for(shared: bool) -> None:
    rows = logged()
    expected, _ = score_impressions(rows, NOTHING_KNOWN, 3)
    assert len(set(expected["impression_id"].to_pylist())) == 32
    for seed in range(5):
        mixed = rows.take(np.random.default_rng(seed).permutation(32))
        if shared:
            mixed = share_histories(mixed, np.zeros(32, np.int64))
        assert score_impressions(mixed, NOTHING_KNOWN, 3)[0].equals(expected)


def test_a_history_is_read_once_for_a_user_whose_rows_lie_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: list[int] = []

    def count(vectors: np.ndarray, shown: np.ndarray, past: np.ndarray, of: np.ndarray) -> object:
        read.append(len(past))
        return sim_scores(vectors, shown, past, of)

    sim_scores = simscore.sim_scores
    monkeypatch.setattr(simscore, "sim_scores", count)
    score_impressions(logged(), NOTHING_KNOWN, 3)
    assert read == [4]  # of each user two


def test_rows_of_which_the_first_shares_a_history_are_refused() -> None:
    rows = share_histories(logged().slice(0, 1).take([0, 0]), np.zeros(2, np.int64))
    with pytest.raises(ValueError, match="no row before"):
        score_impressions(rows.slice(1), NOTHING_KNOWN, 3)
