"""Tests how impressions are told apart, put in order, and share histories on their way."""

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from feature_jobs.impressions import scoring, simscore
from feature_jobs.impressions.clicks import HistoryLaw
from feature_jobs.impressions.histories import HistoriesJob, HistoryDay
from feature_jobs.impressions.scoring import Coded, Scored, ScoreForm
from feature_jobs.impressions.simscore import (
    BROADCAST,
    SimscoreDay,
    SimscoreJob,
    impression_ids,
    score_histograms,
    score_impressions,
    share_histories,
    sort_impressions,
)
from feature_jobs.items.item_vectors import FoundItems, items_of_answers, no_answers
from feature_jobs.schemas import TIMESTAMP
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
FORM = ScoreForm(3, ("history_item_ids",))


def logged() -> pa.Table:
    """Makes requests of two users in turns; many rows differ in what is carried alone."""
    rows = impressions([(n % 2, n // 8, n // 8, False) for n in range(32)])
    histories = pa.array([[n % 2, 7, n // 16] for n in range(32)], pa.list_(pa.int64()))
    carried = np.random.default_rng(0).permutation(32)
    return rows.append_column("history", histories).append_column("position", pa.array(carried))


@pytest.mark.parametrize("shared", [False, True])
def test_neither_arrival_nor_sharing_decides_what_a_made_id_stands_for(shared: bool) -> None:
    rows = logged()
    expected, _ = score_impressions(rows, NOTHING_KNOWN, FORM)
    assert len(set(expected["impression_id"].to_pylist())) == 32
    for seed in range(5):
        mixed = rows.take(np.random.default_rng(seed).permutation(32))
        if shared:
            mixed = share_histories(mixed, np.zeros(32, np.int64))
        assert score_impressions(mixed, NOTHING_KNOWN, FORM)[0].equals(expected)


def test_a_history_is_read_once_for_a_user_whose_rows_lie_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: list[int] = []

    def count(vectors: np.ndarray, shown: np.ndarray, past: np.ndarray, of: np.ndarray) -> object:
        read.append(len(past))
        return sim_scores(vectors, shown, past, of)

    sim_scores = scoring.sim_scores
    monkeypatch.setattr(scoring, "sim_scores", count)
    score_impressions(logged(), NOTHING_KNOWN, FORM)
    assert read == [4]  # of each user two


def test_rows_of_which_the_first_shares_a_history_are_refused() -> None:
    rows = share_histories(logged().slice(0, 1).take([0, 0]), np.zeros(2, np.int64))
    with pytest.raises(ValueError, match="no row before"):
        score_impressions(rows.slice(1), NOTHING_KNOWN, FORM)


# ---- What is told of a shard -------------------------------------------------------------------

DAY = HistoryDay(20_000, 100, 200)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.floats(-1, 1, width=32), st.integers(0, 3), st.booleans()), max_size=40)
)
@example([(1.0, 3, True), (-1.0, 1, False), (0.0, 0, True), (float(np.float32(0.29)), 2, False)])
def test_impressions_are_counted_by_their_largest_score_and_their_history(
    drawn: list[tuple[float, int, bool]],
) -> None:
    clicked = np.array([c for *_, c in drawn], bool)
    known = np.array([n for _, n, _ in drawn], np.int32)
    scored = {
        "sim_max": np.array([s for s, *_ in drawn], np.float32),
        "sim_known": known,
        "history_len": np.minimum(known + 1, 3),
    }
    expected = {
        "sim_max_clicked": [0] * 200, "sim_max_unclicked": [0] * 200, "history_len": [0] * 5
    }  # fmt: skip
    for score, n, is_click in drawn:
        expected["history_len"][min(n + 1, 3)] += 1
        if n:
            kind = "sim_max_clicked" if is_click else "sim_max_unclicked"
            expected[kind][min(199, math.floor((float(np.float32(score)) + 1) / 2 * 200))] += 1
    found = score_histograms(clicked, scored, 4)
    assert {name: bins.tolist() for name, bins in found.items()} == expected


def test_what_is_told_of_a_shard_does_not_follow_arrival() -> None:
    """Of 32 impressions items 0 to 3 are shown; none is known, and three are named."""
    rows = logged().append_column("click_time", pa.nulls(32, TIMESTAMP))
    clicked = pa.array([n % 4 == 0 for n in range(32)])
    rows = rows.set_column(rows.column_names.index("clicked"), "clicked", clicked)
    for seed in range(3):
        mixed = rows.take(np.random.default_rng(seed).permutation(32))
        _, told = score_impressions(mixed, NOTHING_KNOWN, FORM)
        assert told.counts == {
            "impressions": 32, "users": 2, "clicks": 8, "unknown_items": 32,
            "impressions_by_user_squared": 512, "clicks_by_user_squared": 64,
            "scored_impressions": 0, "compared_impressions": 0, "moved_impressions": 0,
            "without_history": 0, "click_times_before_event": 0, "clicks_with_time": 0,
        }  # fmt: skip
        assert told.examples == {"unknown_items": [0, 1, 2]}
        assert told.histograms["history_len"].tolist() == [0, 0, 0, 32]
        assert not told.histograms["sim_max_clicked"].any()


def test_a_score_is_counted_with_the_click_of_its_own_impression() -> None:
    rows = impressions([(1, 1, 1, True), (1, 1, 2, False), (1, 1, 3, False)])
    none = np.zeros(1, np.int64)
    coded = Coded(
        pa.array([1]), np.zeros(3, np.int32), np.zeros((1, 2), np.int32), np.zeros(3, np.int64)
    )
    found = FoundItems(np.ones(1, bool), none, none, none, {})
    scored = {
        "sim_max": np.array([0.995, -0.985, -0.995], np.float32),
        "sim_known": np.ones(3, np.int32),
        "history_len": np.ones(3, np.int32),
    }
    told = simscore.count_impressions(rows, Scored(FORM, scored, coded, found))
    assert np.flatnonzero(told.histograms["sim_max_clicked"]).tolist() == [199]
    assert np.flatnonzero(told.histograms["sim_max_unclicked"]).tolist() == [0, 1]


def test_clicks_whose_time_is_known_are_counted_where_the_log_has_times() -> None:
    rows = logged()
    _, told = score_impressions(rows, NOTHING_KNOWN, FORM)
    assert "clicks_with_time" not in told.counts
    clicked = pa.array([n < 10 for n in range(32)])
    rows = rows.set_column(rows.column_names.index("clicked"), "clicked", clicked)
    times = pa.array([n if n % 2 else None for n in range(32)], pa.int64()).cast(TIMESTAMP)
    _, told = score_impressions(rows.append_column("click_time", times), NOTHING_KNOWN, FORM)
    assert (told.counts["clicks"], told.counts["clicks_with_time"]) == (10, 5)


@pytest.mark.parametrize("has_history", [True, False])
def test_impressions_of_earlier_days_are_counted_whether_or_not_histories_are_logged(
    has_history: bool, tmp_path: Path
) -> None:
    law = HistoryLaw(3, 1000, 0, 0, False, late_us=30)
    histories = HistoriesJob(law, (DAY,), (), 1, pa.int64(), pa.int64(), "UTC", str(tmp_path))
    job = SimscoreJob((), None if has_history else histories, FORM, BROADCAST, str(tmp_path))
    day = SimscoreDay(DAY, has_history, (), 1, pa.schema([]), str(tmp_path))
    rows = impressions([(1, 1, t, False) for t in (69, 70, 99, 100, 199)])
    counts = simscore.ScoreShard(job)._count_late(day, rows)
    too_late = {} if has_history else {"too_late_for_a_history": 1}
    assert counts == {"late_impressions": 3, **too_late}
