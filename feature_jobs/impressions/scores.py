"""Scores impressions by their histories: cosines, and the numbers that are made of them."""

from collections.abc import Iterator

import numpy as np

from feature_jobs.schemas import SIM_TIERS

_RUN_ROWS = 16  # of them with one history, at most
_CACHED_VECTORS = 256  # gathered at once: a quarter of a megabyte stays in the cache


def sim_scores(
    vectors: np.ndarray, impression: np.ndarray, histories: np.ndarray, history_of: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Takes the cosine of each impression with each item of its history: COURIER appendix §1 eq. 1.

    `vectors` float32 [v, 256] of unit rows; `impression` int64 [n] and `histories` int64 [h, L] are
    rows of it, -1 = none. `history_of` int64 [n], ascending, says which history an impression has:
    neighbours with the same one share the reading of its vectors. Returns scores float32 [n, L] in
    [-1, 1], 0 where either is none, and the mask int8 [n, L] of real scores.
    """
    length = histories.shape[1]
    mask = (histories >= 0)[history_of] & (impression >= 0)[:, None]
    scores = np.empty((len(impression), length), np.float32)
    for rows in _rows_with_one_history(history_of):  # [runs, r]
        at_once = max(1, _CACHED_VECTORS // (length + rows.shape[1]))
        for at in range(0, len(rows), at_once):
            some = rows[at : at + at_once]
            shown = _gather(vectors, impression[some])  # [runs, r, 256]
            clicked = _gather(vectors, histories[history_of[some[:, 0]]])  # [runs, L, 256]
            scores[some] = shown @ clicked.transpose(0, 2, 1)
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


def _gather(vectors: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Returns `vectors` at `rows` [a, b]; float32 [a, b, 256], those at -1 arbitrary."""
    return np.take(vectors, rows, axis=0, mode="clip")


def simtier(scores: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Counts real scores per tier of width 0.1 over [-1, 1]; int32 [n, 20]. arXiv 2407.19467.

    Tier k holds -1 + k/10 <= score < -1 + (k+1)/10; a score of 1.0 falls into the last one.
    """
    tier = ((scores.astype(np.float64) + 1.0) * 10.0).astype(np.int32)
    np.minimum(tier, SIM_TIERS - 1, out=tier)
    tier[mask == 0] = SIM_TIERS  # one too many, cut off at the end
    tier += (np.arange(len(scores), dtype=np.int32) * (SIM_TIERS + 1))[:, None]
    counts = np.bincount(tier.reshape(-1), minlength=len(scores) * (SIM_TIERS + 1))
    return counts.reshape(len(scores), SIM_TIERS + 1)[:, :SIM_TIERS].astype(np.int32)
