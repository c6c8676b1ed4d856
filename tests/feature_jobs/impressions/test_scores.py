"""Tests scores, each against a closed form or a plain loop."""

import numpy as np
import pytest

from feature_jobs.impressions import scores as scores_module
from feature_jobs.impressions.scores import sim_scores, simtier
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
    monkeypatch.setattr(scores_module, "_RUN_ROWS", run_rows)
    monkeypatch.setattr(scores_module, "_CACHED_VECTORS", cached)
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
