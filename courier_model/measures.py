"""Measures, without training a ranking model, how well an encoder tells what a user clicks next.

The held-out measure: a shown item's score is its cosine with what its user had clicked before; AUC
and GAUC say how far clicked items come before unclicked ones. An encoder is worth keeping only if
it beats `colour_histogram`, which has learned nothing.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_BLOCK_ROWS = 4096  # rows scored at once: 4096 x 5 x 256 floats are 21 MB

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class HeldOut:
    """Holds the held-out measure; `auc` and `gauc` are in [0, 1], None where nothing can be ranked.

    `impressions` are those with a score, `clicks` the clicked ones among them.
    """

    auc: float | None
    gauc: float | None
    impressions: int
    clicks: int


# ---- Ranking -------------------------------------------------------------------------------


def auc(scores: npt.NDArray[np.floating], labels: Bools) -> float | None:
    """Returns the area under the ROC curve: how often a clicked item outscores an unclicked one.

    Ties count half.

    `scores` [n] and `labels` bool [n]. None where only one label occurs. Raises ValueError for a
    NaN among the scores.
    """
    values, _ = _auc_per_user(scores, labels, np.zeros(len(scores), np.int64))
    return float(values[0]) if len(values) and not np.isnan(values[0]) else None


def gauc(scores: npt.NDArray[np.floating], labels: Bools, users: Ints) -> float | None:
    """Returns the AUC within each user, averaged by their impressions: Σ n_u·AUC_u / Σ n_u.

    `scores` [n], `labels` bool [n], `users` int64 [n] in any order. Users with one label only are
    left out; None where there are no others. Raises ValueError for a NaN among the scores.
    """
    values, impressions = _auc_per_user(scores, labels, users)
    both = ~np.isnan(values)
    return float(np.average(values[both], weights=impressions[both])) if both.any() else None


def _auc_per_user(
    scores: npt.NDArray[np.floating], labels: Bools, users: Ints
) -> tuple[npt.NDArray[np.float64], Ints]:
    """Returns AUC (NaN where only one label occurs) and impressions of each user, both [users].

    Counted in whole numbers, so that it is exact and no order of the impressions changes it.
    """
    if labels.dtype != np.bool_ or np.isnan(scores).any():
        raise ValueError("expected labels of dtype bool, and scores that are numbers")
    if not len(scores):
        return np.zeros(0), np.zeros(0, np.int64)
    order = np.lexsort((scores, users))
    scores, labels, users = scores[order], labels[order], users[order]
    # A tie is a run of equal scores of one user. Its first impression, [ties].
    new_user = np.append(True, users[1:] != users[:-1])
    tie = np.flatnonzero(new_user | np.append(True, scores[1:] != scores[:-1]))
    clicked = np.add.reduceat(labels, tie, dtype=np.int64)
    unclicked = np.add.reduceat(~labels, tie, dtype=np.int64)
    # Unclicked impressions of the same user with a lower score, [ties].
    first = np.flatnonzero(new_user[tie])  # each user's first tie, [users]
    lower = np.cumsum(unclicked) - unclicked
    lower -= lower[first][np.cumsum(new_user[tie]) - 1]
    # Twice the pairs won, a tied pair being half won, and the pairs there are, [users].
    won_twice = np.add.reduceat(clicked * (2 * lower + unclicked), first)
    clicked, unclicked = np.add.reduceat(clicked, first), np.add.reduceat(unclicked, first)
    with np.errstate(invalid="ignore"):  # no pairs: 0 / 0 is the NaN that is meant
        return won_twice / (2 * clicked * unclicked), clicked + unclicked


# ---- The held-out measure ------------------------------------------------------------------


def history_cosine(vectors: Floats, known: Bools, pv: Ints, clicks: Ints) -> Floats:
    """Returns each shown item's cosine with the mean of the unit vectors of the row's known clicks.

    `vectors` float32 [items, d] of any length, `known` bool [items] says which rows of it mean
    anything; `pv` and `clicks` int64 [rows, 5] are rows of it, -1 = none. Returns float32 [rows, 5]
    in [-1, 1]: NaN where the shown item is none or unknown or the row has no known click, and 0
    where a known vector or the mean is zero. So `known` alone decides who is scored, and encoders
    that know the same items are measured on the same impressions.

    Raises ValueError for a code that is no row of `vectors`, and for a known vector that is not
    finite.
    """
    for codes in (pv, clicks):
        if codes.size and not -1 <= codes.min() <= codes.max() < len(vectors):
            raise ValueError(f"expected codes from -1 to {len(vectors) - 1}")
    if not np.isfinite(vectors[known]).all():  # they would be left out without a word
        raise ValueError("expected finite vectors of known items")
    # One more row of zeros, which code -1 finds, as no code finds an unknown item's own vector.
    units = np.zeros((len(vectors) + 1, vectors.shape[1]), np.float32)
    units[:-1][known] = _unit(vectors[known])
    cosines = np.zeros(pv.shape, np.float32)
    for at in range(0, len(pv), _BLOCK_ROWS):
        block = slice(at, at + _BLOCK_ROWS)
        history = _unit(units[clicks[block]].sum(axis=1))  # [block, d], along the mean
        cosines[block] = np.einsum("npd,nd->np", units[pv[block]], history)
    np.clip(cosines, -1.0, 1.0, out=cosines)
    known = np.append(known, False)
    cosines[~(known[pv] & known[clicks].any(axis=1, keepdims=True))] = np.nan
    return cosines


def _unit(vectors: Floats) -> Floats:
    """Scales rows of [n, d] to length 1; rows of zeros stay."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms != 0)


def rank_clicks(
    vectors: Floats, known: Bools, pv: Ints, clicked: Bools, clicks: Ints, users: Ints
) -> HeldOut:
    """Returns AUC and GAUC of clicked over unclicked shown items, scored by `history_cosine`.

    `pv`, `clicks` int64 [rows, 5] and `clicked` bool [rows, 5] as there, `users` int64 [rows].
    Impressions without a score are left out.
    """
    scores = history_cosine(vectors, known, pv, clicks)
    scored = ~np.isnan(scores)
    scores, labels = scores[scored], clicked[scored]  # [impressions]
    owners = np.broadcast_to(users[:, None], pv.shape)[scored]
    return HeldOut(
        auc(scores, labels), gauc(scores, labels, owners), len(scores), int(labels.sum())
    )


# ---- The baseline --------------------------------------------------------------------------


def colour_histogram(images: npt.NDArray[np.uint8], bins: int = 4) -> Floats:
    """Counts the colours of uint8 RGB images [n, 3, S, S] into unit vectors [n, bins**3].

    The joint histogram: cell (r * bins + g) * bins + b counts pixels of that red, green and blue,
    each channel being cut into `bins` equal parts.
    """
    level = np.arange(256) * bins // 256  # of a channel's value
    histograms = np.zeros((len(images), bins**3), np.float32)
    for row, (red, green, blue) in enumerate(images):  # all at once would take 8 bytes per pixel
        cells = (level[red] * bins + level[green]) * bins + level[blue]
        histograms[row] = np.bincount(cells.ravel(), minlength=bins**3)
    return _unit(histograms)
