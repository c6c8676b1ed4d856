"""Tests the pieces of a SimScore row, each against a closed form or a plain loop."""

import numpy as np
import pyarrow as pa
import pytest

from feature_jobs.impressions import simscore
from feature_jobs.impressions.simscore import impression_ids, sim_scores, simtier, sort_impressions
from tests.support import oracles
from tests.support.codebooks import unit_rows


@pytest.mark.parametrize("run_rows", [16, 3, 1])
@pytest.mark.parametrize("cached", [512, 7])
def test_scores_equal_the_loop_however_rows_share_histories(
    monkeypatch: pytest.MonkeyPatch, run_rows: int, cached: int
) -> None:
    rng = np.random.default_rng(0)
    vectors = unit_rows(20)
    sizes = rng.integers(1, 9, 30)  # of runs of neighbours with one history
    past, of = rng.integers(-1, 20, (30, 4)), np.arange(30).repeat(sizes)
    shown = rng.integers(-1, 20, len(of))
    named = dict(enumerate(vectors))
    expected = [
        oracles.score(int(i), [int(j) for j in past[k]], named, 4)
        for i, k in zip(shown, of, strict=True)
    ]
    monkeypatch.setattr(simscore, "_RUN_ROWS", run_rows)
    monkeypatch.setattr(simscore, "_CACHED_VECTORS", cached)
    scores, mask = sim_scores(vectors, shown, past, of)
    np.testing.assert_allclose(scores, [s for s, _ in expected], atol=1e-6)
    assert mask.tolist() == [m for _, m in expected]
    assert (mask == 0).any()
    assert (mask == 1).any()


def test_a_vector_and_itself_score_1_its_opposite_minus_1_and_none_beyond() -> None:
    x = unit_rows(50, seed=3)
    itself, opposite = np.arange(50), np.arange(50, 100)
    both = np.stack([itself, opposite], axis=1)
    scores, _ = sim_scores(np.concatenate([x, -x]), itself, both, itself)
    np.testing.assert_allclose(scores[:, 0], 1, atol=1e-6)
    np.testing.assert_allclose(scores[:, 1], -1, atol=1e-6)
    assert np.abs(scores).max() <= 1


@pytest.mark.parametrize(
    ("score", "tier"),
    [(-1.0, 0), (-0.95, 0), (-0.85, 1), (-0.05, 9), (0.0, 10), (0.05, 10), (0.95, 19), (1.0, 19)],
)
def test_a_score_falls_into_its_tier(score: float, tier: int) -> None:
    counts = simtier(np.array([[score]], np.float32), np.array([[1]], np.int8))
    assert counts.shape == (1, 20)
    assert np.flatnonzero(counts[0]).tolist() == [tier]


def test_tiers_count_real_scores_only_and_equal_the_loop() -> None:
    rng = np.random.default_rng(1)
    scores = rng.uniform(-1, 1, (40, 7)).astype(np.float32)
    mask = rng.integers(0, 2, (40, 7)).astype(np.int8)
    expected = [
        oracles.tiers(s.tolist(), m.tolist()) for s, m in zip(scores, mask, strict=True)
    ]  # fmt: skip
    assert simtier(scores, mask).tolist() == expected
    assert simtier(scores, mask).sum(axis=1).tolist() == mask.sum(axis=1).tolist()


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
