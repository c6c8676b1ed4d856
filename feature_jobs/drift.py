"""Tells how far counts by bin, of clusters, scores or lengths, are from those of another day.

The population stability index is the symmetrised Kullback-Leibler divergence of two histograms:
below 0.1 is commonly read as no change, above 0.25 as a large one. Of few counts it is large for
their noise alone, which `expected_noise` tells: B. Yurdakul, Statistical Properties of Population
Stability Index, Western Michigan University 2018.
"""

import math

import numpy as np

_SMOOTHING = 0.5  # added to each bin, so that an empty one is no infinite change
_DECILES = 10
_DEVIATIONS = 4


def population_stability_index(before: np.ndarray, now: np.ndarray) -> float:
    """Returns the sum over bins of (q - p) ln(q / p) of two counts by bin, int [bins] each.

    p and q are the shares of `before` and `now`, with 0.5 added to each bin; 0 where the shares are
    equal, and never less. Raises ValueError where the two have not as many bins.
    """
    if before.shape != now.shape:
        raise ValueError(f"counts of {len(before)} and of {len(now)} bins cannot be compared")
    p, q = ((counts + _SMOOTHING) / (counts + _SMOOTHING).sum() for counts in (before, now))
    return float(((q - p) * np.log(q / p)).sum())


def deciles(before: np.ndarray, now: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Merges fine bins, int [bins] of each day, into at most ten of equal mass of `before`.

    Merged are neighbours alone. There are fewer than ten where a fine bin holds more than a tenth,
    one where `before` has nothing. Returns the counts of both days by merged bin.
    """
    total = max(1, before.sum())
    # Of each fine bin the decile in which the middle of its mass lies; [bins], ascending.
    decile = ((before.cumsum() - before / 2) * _DECILES / total).astype(np.int64)
    _, merged = np.unique(np.minimum(decile, _DECILES - 1), return_inverse=True)
    starts = np.flatnonzero(np.diff(merged, prepend=-1))
    return np.add.reduceat(before, starts), np.add.reduceat(now, starts)


def expected_noise(bins: int, n: int, m: int) -> float:
    """Returns what the index of two samples of one distribution, of `n` and `m`, hardly exceeds.

    It is distributed as chi squared of bins - 1 degrees of freedom, times 1/n + 1/m, where no bin
    is nearly empty; this is its mean and four standard deviations.
    """
    freedom = bins - 1
    return (freedom + _DEVIATIONS * math.sqrt(2 * freedom)) * (1 / n + 1 / m)
