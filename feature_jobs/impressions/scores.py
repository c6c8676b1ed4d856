"""Scores impressions by their histories: cosines, and the numbers that are made of them.

A score is a function of its two vectors alone. Their components are whole multiples of 2^-26
(`item_vectors.whole_steps`), so that each product of two is one of 2^-52; and no sum of some such
products reaches 2, by Cauchy-Schwarz, since vectors are 1 long up to a thousandth, in however many
dimensions. float64 holds all of these numbers: nothing is rounded, and whichever order or kernel a
product of matrices takes, which depends on its shape and on the CPU, its bits are the same.
"""

from collections.abc import Iterator

import numpy as np

from feature_jobs.schemas import MUSE_TIERS, SIM_TIERS, Tiers

_RUN_ROWS = 16  # with one history are scored at once, at most
# Of vectors gathered at once, 2.25 MiB: fewer stay closer to the processor, but then two threads of
# a worker wait for each other at the start of every step.
_NUMBERS_AT_ONCE = 768 * 256
_PLACES_AT_ONCE = 64  # of histories; for larger products BLAS starts threads that wait in turns
_MEAN_STEPS = 2.0**30  # to 1, of scores that are added up
_MUSE_EDGES = (np.arange(-10, 11) / 10).astype(np.float32)  # the upper ones of tiers 0 to 20


def sim_scores(
    vectors: np.ndarray, impression: np.ndarray, histories: np.ndarray, history_of: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Takes the cosine of each impression with each item of its history: COURIER appendix §1 eq. 1.

    `vectors` float32 [v, d] of unit rows, multiples of 2^-26; `impression` int64 [n] and
    `histories` int64 [h, L] are rows of it, -1 = none. `history_of` int64 [n], ascending, says
    which history an impression has: neighbours with the same one share the reading of its vectors.
    Returns scores float32 [n, L] in [-1, 1], 0 where either is none, and the mask int8 [n, L] of
    real scores.
    """
    mask = (histories >= 0)[history_of] & (impression >= 0)[:, None]
    scores = np.empty(mask.shape, np.float32)
    for rows in _rows_with_one_history(history_of):
        clicked = histories[history_of[rows[:, 0]]]
        scores[rows] = _scores_of_runs(vectors, impression[rows], clicked)
    np.copyto(scores, 0.0, where=~mask)
    return np.clip(scores, -1.0, 1.0, out=scores), mask.view(np.int8)


def _rows_with_one_history(history_of: np.ndarray) -> Iterator[np.ndarray]:
    """Yields the places of all rows, by runs of neighbours that have one history.

    They are int64 [runs, r] for each length r that a run has; longer runs are cut.
    """
    place = np.arange(len(history_of))
    new = np.diff(history_of, prepend=-1) != 0
    new |= (place - np.maximum.accumulate(np.where(new, place, 0))) % _RUN_ROWS == 0
    starts = np.flatnonzero(new)
    sizes = np.diff(starts, append=len(history_of))
    for size in np.unique(sizes):
        yield starts[sizes == size][:, None] + np.arange(size)


def _scores_of_runs(vectors: np.ndarray, shown: np.ndarray, clicked: np.ndarray) -> np.ndarray:
    """Scores the items `shown` [runs, r] by those `clicked` [runs, L]; float32 [runs, r, L].

    Both are rows of `vectors`; scores of -1 are arbitrary.
    """
    wanted = np.concatenate([shown, clicked], axis=1)
    (runs, width), r, dimension = wanted.shape, shown.shape[1], vectors.shape[1]
    at_once = max(1, _NUMBERS_AT_ONCE // dimension // width)
    # Memory that is kept: fresh one for each step would take a tenth of the time.
    narrow = np.empty((at_once * width, dimension), vectors.dtype)
    wide = np.empty((at_once * width, dimension))
    scores = np.empty((runs, r, width - r), np.float32)
    for at in range(0, runs, at_once):
        rows = wanted[at : at + at_once].reshape(-1)
        np.take(vectors, rows, axis=0, mode="clip", out=narrow[: len(rows)])
        np.copyto(wide[: len(rows)], narrow[: len(rows)])
        both = wide[: len(rows)].reshape(-1, width, dimension)
        left, right = both[:, :r], both[:, r:].transpose(0, 2, 1)
        for first in range(0, width - r, _PLACES_AT_ONCE):
            places = slice(first, first + _PLACES_AT_ONCE)
            scores[at : at + at_once, :, places] = left @ right[:, :, places]
    return scores


def mean_scores(scores: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Returns the mean of the real ones of `scores` [n, L], `known` [n] of them; float32 [n].

    The others are 0. Scores are added as multiples of 2^-30: whole numbers, whose sum is the same
    in any order. Added as they are, each CPU would round them in its own.
    """
    whole = np.rint(scores * np.float64(_MEAN_STEPS)).sum(axis=1)
    return (whole / _MEAN_STEPS / np.maximum(known, 1)).astype(np.float32)


def simtier(scores: np.ndarray, mask: np.ndarray, tiers: Tiers = "courier") -> np.ndarray:
    """Returns the histogram of `scores` [n, L] over the tiers of `tier_of`. arXiv 2407.19467.

    "courier" counts the real ones, those with a `mask` of 1; int32 [n, 20]. "muse" is what the code
    of MUSE has (arXiv 2512.07216): log(count + 1), and a score that is not real counts as 0, the
    empty places of a history too; float32 [n, 22].
    """
    tier = tier_of(scores, tiers)
    if tiers == "muse":
        return np.log1p(_histogram(tier, MUSE_TIERS)).astype(np.float32)
    tier[mask == 0] = SIM_TIERS  # one too many, cut off at the end
    return _histogram(tier, SIM_TIERS + 1)[:, :SIM_TIERS].astype(np.int32)


def tier_of(scores: np.ndarray, tiers: Tiers) -> np.ndarray:
    """Returns the tier of each of `scores` float32 [n, L], 0 the lowest; int64 [n, L].

    "courier": tier k of 20 holds -1 + k/10 <= score < -1 + (k+1)/10, the last one 1.0 besides.
    "muse": tier k of 22 holds -1.1 + k/10 < score <= -1 + k/10, which is ceil(10 score) + 10. The
    edges are the float32 numbers nearest to these: a score that reads 0.1 is not above 0.1. No
    cosine falls in tier 21.
    """
    if tiers == "muse":
        return np.searchsorted(_MUSE_EDGES, scores, side="left")
    tier = ((scores + np.float64(1.0)) * 10.0).astype(np.intp)
    return np.minimum(tier, SIM_TIERS - 1, out=tier)


def _histogram(tier: np.ndarray, count: int) -> np.ndarray:
    """Counts in each row of `tier` int64 [n, L] the values 0 to `count` - 1; int64 [n, count]."""
    flat = tier + (np.arange(len(tier)) * count)[:, None]
    return np.bincount(flat.reshape(-1), minlength=len(tier) * count).reshape(len(tier), count)


def sim_buckets(scores: np.ndarray, mask: np.ndarray, tiers: Tiers) -> np.ndarray:
    """Returns 1 + the tier of each real one of `scores` [n, L], 0 for others; int32 [n, L].

    So an embedding table of tiers has a row for "unknown". arXiv 2605.25726.
    """
    return np.where(mask > 0, tier_of(scores, tiers) + 1, 0).astype(np.int32)


def top_positions(scores: np.ndarray, mask: np.ndarray, k: int) -> np.ndarray:
    """Returns the places, from 1, of the k largest real ones of `scores` [n, L]; int32 [n, k].

    The largest comes first, of equal ones that which comes first in the history, the newer one. 0
    fills up where there are fewer than k. arXiv 2512.07216.
    """
    best = np.argsort(np.where(mask > 0, -scores, np.inf), axis=1, kind="stable")[:, :k]
    places = np.zeros((len(scores), k), np.int32)
    real = np.take_along_axis(mask, best, axis=1) > 0
    places[:, : best.shape[1]] = np.where(real, best + 1, 0)
    return places
