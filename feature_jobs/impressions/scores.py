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
_CACHED_VECTORS = 256  # gathered at once: three quarters of a megabyte stay in the cache
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
    length = histories.shape[1]
    mask = (histories >= 0)[history_of] & (impression >= 0)[:, None]
    scores = np.empty((len(impression), length), np.float32)
    gather = _Gather(vectors, max(_CACHED_VECTORS, length + _RUN_ROWS))
    for rows in _rows_with_one_history(history_of):  # [runs, r]
        r = rows.shape[1]
        wanted = np.concatenate([impression[rows], histories[history_of[rows[:, 0]]]], axis=1)
        at_once = max(1, _CACHED_VECTORS // (length + r))
        for at in range(0, len(rows), at_once):
            some, found = rows[at : at + at_once], gather(wanted[at : at + at_once])
            shown, clicked = found[:, :r], found[:, r:].transpose(0, 2, 1)  # [runs, 256, L]
            for first in range(0, length, _PLACES_AT_ONCE):
                places = slice(first, first + _PLACES_AT_ONCE)
                scores[some, places] = shown @ clicked[:, :, places]
    scores[~mask] = 0.0
    return np.clip(scores, -1.0, 1.0, out=scores), mask.astype(np.int8)


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


class _Gather:
    """Gathers rows of `vectors` as float64, at most `most` at once, into memory that is kept.

    Fresh memory for each call would have to be made anew by the system: a tenth of the time.
    """

    def __init__(self, vectors: np.ndarray, most: int):
        self._vectors = vectors
        self._as_they_are = np.empty((most, EMBEDDING_DIM), vectors.dtype)
        self._wide = np.empty((most, EMBEDDING_DIM))

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Returns the vectors at `rows` [a, b], float64 [a, b, 256], those at -1 arbitrary.

        They are valid until the next call.
        """
        found, wide = self._as_they_are[: rows.size], self._wide[: rows.size]
        np.take(self._vectors, rows.reshape(-1), axis=0, mode="clip", out=found)
        np.copyto(wide, found)
        return wide.reshape(*rows.shape, EMBEDDING_DIM)


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
