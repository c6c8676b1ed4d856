"""The index of two histograms is what the textbook's loop says, and its noise what chance makes."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from feature_jobs.drift import deciles, expected_noise, population_stability_index

COUNTS = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=40)


def by_hand(before: list[int], now: list[int]) -> float:
    """Returns the index as credit scoring's textbooks write it, bin by bin."""
    n, m = (sum(counts) + len(counts) / 2 for counts in (before, now))
    shares = [((b + 0.5) / n, (a + 0.5) / m) for b, a in zip(before, now, strict=True)]
    return sum((q - p) * math.log(q / p) for p, q in shares)


@given(COUNTS)
def test_the_index_is_the_sum_over_bins_and_the_same_both_ways(
    drawn: list[tuple[int, int]],
) -> None:
    before, now = (list(column) for column in zip(*drawn, strict=True))
    found = population_stability_index(np.array(before), np.array(now))
    assert found == pytest.approx(by_hand(before, now), abs=1e-12)
    assert found >= -1e-12
    other = population_stability_index(np.array(now), np.array(before))
    assert other == pytest.approx(found, abs=1e-12)


def test_the_index_of_a_known_shift() -> None:
    before, now = np.array([5000, 5000]), np.array([6000, 4000])
    expected = 0.1 * math.log(0.6 / 0.5) - 0.1 * math.log(0.4 / 0.5)
    assert population_stability_index(before, now) == pytest.approx(expected, rel=1e-3)
    assert population_stability_index(before, 3 * before) == pytest.approx(0, abs=1e-9)


def test_a_bin_that_empties_or_fills_is_no_infinite_change() -> None:
    gone = population_stability_index(np.array([100, 100]), np.array([200, 0]))
    assert 0.25 < gone < 10


def test_counts_of_other_bins_are_not_compared() -> None:
    with pytest.raises(ValueError, match="counts of 2 and of 3 bins"):
        population_stability_index(np.ones(2, int), np.ones(3, int))


@given(COUNTS)
def test_merged_bins_are_neighbours_and_nothing_is_lost(drawn: list[tuple[int, int]]) -> None:
    before, now = (np.array(column) for column in zip(*drawn, strict=True))
    merged = deciles(before, now)
    for fine, coarse in zip((before, now), merged, strict=True):
        assert len(coarse) <= 10
        sums = set(np.concatenate([[0], fine.cumsum()]).tolist())
        assert set(coarse.cumsum().tolist()) <= sums
        assert coarse.sum() == fine.sum()


def test_fine_bins_become_ten_of_equal_mass() -> None:
    before = np.histogram(np.random.default_rng(0).normal(0.3, 0.1, 100_000), 200, (-1, 1))[0]
    coarse, _ = deciles(before, before)
    assert len(coarse) == 10
    assert np.abs(coarse / coarse.sum() - 0.1).max() < 0.03


def test_a_bin_with_most_of_the_mass_stays_apart_from_what_was_empty() -> None:
    """All histories are full on one day, and many are empty on the next."""
    before, now = np.zeros(51, int), np.zeros(51, int)
    before[50], now[50], now[0] = 1000, 700, 300
    coarse, later = deciles(before, now)
    assert (coarse.tolist(), later.tolist()) == ([0, 1000], [300, 700])
    assert population_stability_index(coarse, later) > 0.25


def test_of_nothing_before_all_is_one_bin() -> None:
    coarse, later = deciles(np.zeros(4, int), np.array([1, 2, 0, 3]))
    assert (coarse.tolist(), later.tolist()) == ([0], [6])


@pytest.mark.parametrize(("bins", "n", "m"), [(2, 1000, 1000), (10, 2000, 500), (50, 5000, 9000)])
def test_the_index_of_one_distribution_stays_below_its_noise(bins: int, n: int, m: int) -> None:
    rng = np.random.default_rng(bins)
    p = rng.dirichlet(np.full(bins, 20))
    found = np.array(
        [
            population_stability_index(one, other)
            for one, other in zip(
                rng.multinomial(n, p, 2000), rng.multinomial(m, p, 2000), strict=True
            )
        ]
    )
    mean = (bins - 1) * (1 / n + 1 / m)
    assert found.mean() == pytest.approx(mean, rel=0.1)
    limit = expected_noise(bins, n, m)
    assert (found > limit).mean() < 0.015  # 0.01 of one degree of freedom, fewer of more
    assert found.max() > limit / 3  # no limit that nothing could reach
