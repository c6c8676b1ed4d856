"""Scores impressions by their histories: cosines, and the numbers that are made of them.

A score is a function of its two vectors alone. Their components are whole multiples of 2^-26
(`item_vectors.whole_steps`), so that each product of two is one of 2^-52; and no sum of some such
products reaches 2, by Cauchy-Schwarz, since vectors are 1 long up to a thousandth. float64 holds
all of these numbers: nothing is rounded, and whichever order or kernel a product of matrices takes,
which depends on its shape and on the CPU, its bits are the same.
"""

from collections.abc import Iterator

import numpy as np

from feature_jobs.schemas import EMBEDDING_DIM, SIM_TIERS

_RUN_ROWS = 16  # with one history are scored at once, at most
# Gathered at once, 2.25 MiB: fewer stay closer to the processor, but then two threads of a worker
# wait for each other at the start of every step.
_VECTORS_AT_ONCE = 768
_PLACES_AT_ONCE = 64  # of histories; for larger products BLAS starts threads that wait in turns
_MEAN_STEPS = 2.0**30  # to 1, of scores that are added up


def sim_scores(
    vectors: np.ndarray, impression: np.ndarray, histories: np.ndarray, history_of: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Takes the cosine of each impression with each item of its history: COURIER appendix §1 eq. 1.

    `vectors` float32 [v, 256] of unit rows, multiples of 2^-26; `impression` int64 [n] and
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
    (runs, width), r = wanted.shape, shown.shape[1]
    at_once = max(1, _VECTORS_AT_ONCE // width)
    # Memory that is kept: fresh one for each step would take a tenth of the time.
    narrow = np.empty((at_once * width, EMBEDDING_DIM), vectors.dtype)
    wide = np.empty((at_once * width, EMBEDDING_DIM))
    scores = np.empty((runs, r, width - r), np.float32)
    for at in range(0, runs, at_once):
        rows = wanted[at : at + at_once].reshape(-1)
        np.take(vectors, rows, axis=0, mode="clip", out=narrow[: len(rows)])
        np.copyto(wide[: len(rows)], narrow[: len(rows)])
        both = wide[: len(rows)].reshape(-1, width, EMBEDDING_DIM)
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


def simtier(scores: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Counts real scores per tier of width 0.1 over [-1, 1]; int32 [n, 20]. arXiv 2407.19467.

    Tier k holds -1 + k/10 <= score < -1 + (k+1)/10; a score of 1.0 falls into the last one.
    """
    tier = ((scores + np.float64(1.0)) * 10.0).astype(np.intp)
    np.minimum(tier, SIM_TIERS - 1, out=tier)
    tier[mask == 0] = SIM_TIERS  # one too many, cut off at the end
    tier += (np.arange(len(scores)) * (SIM_TIERS + 1))[:, None]
    counts = np.bincount(tier.reshape(-1), minlength=len(scores) * (SIM_TIERS + 1))
    return counts.reshape(len(scores), SIM_TIERS + 1)[:, :SIM_TIERS].astype(np.int32)
