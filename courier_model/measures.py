"""Measures, without training a ranking model, how well an encoder tells what a user clicks next.

The held-out measure asks what SimScores will be asked: a shown item's scores are its cosines with
all that its user had clicked before; how far do their mean, and the largest of them, put clicked
items before unclicked ones? AUC asks so over all impressions, GAUC within each user. An encoder is
worth keeping only if it beats `colour_histogram`, which has learned nothing.

Standard errors are over users, whose impressions are no independent draws: a measure is linearised
into what each user adds to its error (the infinitesimal jackknife of clustered data; for AUC that
is Obuchowski, Biometrics 53, 1997). Two measures of the same impressions are compared user by user.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_BLOCK_FLOATS = 2**22  # of the histories of the rows that are scored at once: 48 MB
_DECIMALS = 6  # of a cosine: what float32 knows of it

Bools = npt.NDArray[np.bool_]
Doubles = npt.NDArray[np.float64]
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Estimate:
    """Holds a measure in [0, 1], or the difference of two in [-1, 1].

    `errors` float64 [users] is what each user, by ascending code, adds to its error; only `ranked`
    of them took part in it.
    """

    value: float
    errors: Doubles
    ranked: int

    @property
    def standard_error(self) -> float | None:
        """Returns the standard error over users, None where one user alone was ranked."""
        if self.ranked < 2:
            return None
        return math.sqrt(self.ranked / (self.ranked - 1) * float((self.errors**2).sum()))

    def __sub__(self, other: "Estimate") -> "Estimate":
        """Returns the difference of two measures of the same impressions."""
        return Estimate(self.value - other.value, self.errors - other.errors, self.ranked)


@dataclass(frozen=True)
class HeldOut:
    """Holds the held-out measure; a measure is None where nothing can be ranked.

    `auc` and `gauc` rank by the mean of the cosines, `max_auc` and `max_gauc` by the largest.
    `impressions` are those with a score, `clicks` the clicked ones among them, of so many `users`.
    """

    auc: Estimate | None
    gauc: Estimate | None
    max_auc: Estimate | None
    max_gauc: Estimate | None
    impressions: int
    clicks: int
    users: int

    def numbers(self) -> dict[str, float | int | None]:
        """Returns all of it as numbers by name, `NAME_se` being the standard error of NAME."""
        return numbers(vars(self))

    def above(self, other: "HeldOut") -> dict[str, Estimate]:
        """Returns by how much each measure is above that of `other`, by its name.

        Both are of the same impressions. What cannot be ranked is left out.
        """
        pairs = {name: (value, getattr(other, name)) for name, value in vars(self).items()}
        return {k: one - of for k, (one, of) in pairs.items() if isinstance(one, Estimate)}


def numbers(found: Mapping[str, Estimate | int | None]) -> dict[str, float | int | None]:
    """Returns measures by name as numbers, `NAME_se` being the standard error of NAME."""
    told: dict[str, float | int | None] = {}
    for name, value in found.items():
        if isinstance(value, Estimate):
            told |= {name: value.value, f"{name}_se": value.standard_error}
        else:
            told[name] = value
    return told


# ---- Ranking -------------------------------------------------------------------------------


def auc(scores: npt.NDArray[np.floating], labels: Bools, users: Ints) -> Estimate | None:
    """Estimates the area under the ROC curve: how often a clicked item outscores an unclicked one.

    Ties count half.

    `scores` [n], `labels` bool [n], `users` int64 [n] in any order. None where only one label
    occurs. Raises ValueError for a NaN among the scores.
    """
    _check(scores, labels)
    clicks, others = int(labels.sum()), int((~labels).sum())
    if not clicks or not others:
        return None
    order = np.argsort(scores, kind="stable")
    scores, labels, users = scores[order], labels[order], users[order]
    # A tie is a run of equal scores. Its first impression, [ties].
    first = np.flatnonzero(np.append(True, scores[1:] != scores[:-1]))
    tied = np.diff(first, append=len(scores))
    clicked = np.add.reduceat(labels, first, dtype=np.int64)
    unclicked = tied - clicked
    # Of each impression of a tie, twice the pairs that it wins: a clicked one those with unclicked
    # ones of lower scores, an unclicked one those with clicked ones of higher scores.
    lower = 2 * (np.cumsum(unclicked) - unclicked) + unclicked
    higher = 2 * (clicks - np.cumsum(clicked)) + clicked
    # Counted in whole numbers, so that it is exact and no order of the impressions changes it.
    value = int((clicked * lower).sum()) / (2 * clicks * others)
    wins = np.where(labels, np.repeat(lower, tied) / others, np.repeat(higher, tied) / clicks) / 2
    parts = (wins - value) / np.where(labels, clicks, others)
    _, owner = np.unique(users, return_inverse=True)
    errors = np.bincount(owner, weights=parts).astype(np.float64)
    return Estimate(value, errors, len(errors))


def gauc(scores: npt.NDArray[np.floating], labels: Bools, users: Ints) -> Estimate | None:
    """Estimates the AUC within each user, averaged by their impressions: Σ n_u·AUC_u / Σ n_u.

    `scores` [n], `labels` bool [n], `users` int64 [n] in any order. Users with one label only are
    left out; None where there are no others. Raises ValueError for a NaN among the scores.
    """
    _check(scores, labels)
    values, impressions = _auc_per_user(scores, labels, users)
    both = ~np.isnan(values)
    if not both.any():
        return None
    weights = np.where(both, impressions, 0) / impressions[both].sum()
    value = float(np.average(values[both], weights=impressions[both]))
    return Estimate(value, np.where(both, weights * (values - value), 0.0), int(both.sum()))


def _check(scores: npt.NDArray[np.floating], labels: Bools) -> None:
    if labels.dtype != np.bool_ or np.isnan(scores).any():
        raise ValueError("expected labels of dtype bool, and scores that are numbers")


def _auc_per_user(
    scores: npt.NDArray[np.floating], labels: Bools, users: Ints
) -> tuple[Doubles, Ints]:
    """Returns AUC (NaN where only one label occurs) and impressions of each user, both [users].

    Counted in whole numbers, so that it is exact and no order of the impressions changes it.
    """
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


def history_cosines(vectors: Floats, known: Bools, pv: Ints, clicks: Ints) -> tuple[Floats, Floats]:
    """Returns the mean and the largest of each shown item's cosines with the row's known clicks.

    `vectors` float32 [items, d] of any length, `known` bool [items] says which rows of it mean
    anything; `pv` int64 [rows, p] and `clicks` int64 [rows, l] are rows of it, -1 = none. Returns
    two of float32 [rows, p] in [-1, 1]: NaN where the shown item is none or unknown or the row has
    no known click; a cosine with a vector of zeros is 0. So `known` alone decides who is scored,
    and encoders that know the same items are measured on the same impressions.

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
    known = np.append(known, False)
    mean, largest = np.empty(pv.shape, np.float32), np.empty(pv.shape, np.float32)
    rows = max(1, _BLOCK_FLOATS // max(1, clicks.shape[1] * units.shape[1]))
    for at in range(0, len(pv), rows):
        block = slice(at, at + rows)
        counts = known[clicks[block]][:, None]  # [block, 1, l]
        shown, past = (units[codes[block]].astype(np.float64) for codes in (pv, clicks))
        cosines = shown @ past.transpose(0, 2, 1)  # [block, p, l]
        # In double precision, and rounded: an item is as near to itself as any other is, and rows
        # of the same clicks tie whatever their order, which float32 would leave to luck.
        np.clip(np.round(cosines, _DECIMALS), -1.0, 1.0, out=cosines)
        # Unknown clicks have a cosine of 0, which adds nothing to the sum.
        mean[block] = cosines.sum(axis=2) / np.maximum(1, counts.sum(axis=2))
        largest[block] = np.where(counts, cosines, -1.0).max(axis=2, initial=-1.0)
    unscored = ~(known[pv] & known[clicks].any(axis=1, keepdims=True))
    mean[unscored] = largest[unscored] = np.nan
    return mean, largest


def _unit(vectors: Floats) -> Floats:
    """Scales rows of [n, d] to length 1; rows of zeros stay."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms != 0)


def rank_clicks(
    vectors: Floats, known: Bools, pv: Ints, clicked: Bools, clicks: Ints, users: Ints
) -> HeldOut:
    """Returns AUC and GAUC of clicked over unclicked shown items, scored by `history_cosines`.

    `pv` int64 [rows, p], `clicked` bool [rows, p] and `clicks` int64 [rows, l] as there, `users`
    int64 [rows]. Impressions without a score are left out.
    """
    mean, largest = history_cosines(vectors, known, pv, clicks)
    scored = ~np.isnan(mean)
    owners = np.broadcast_to(users[:, None], pv.shape)[scored]
    return rank_scores(mean[scored], largest[scored], clicked[scored], owners)


def rank_scores(mean: Floats, largest: Floats, clicked: Bools, users: Ints) -> HeldOut:
    """Returns AUC and GAUC of clicked over unclicked impressions, by scores that are there.

    `mean` and `largest` float32 [n] as of `history_cosines`, `clicked` bool [n], `users` int64 [n].
    Raises ValueError for a NaN among the scores.
    """
    return HeldOut(
        auc(mean, clicked, users), gauc(mean, clicked, users),
        auc(largest, clicked, users), gauc(largest, clicked, users),
        len(clicked), int(clicked.sum()), len(np.unique(users)),
    )  # fmt: skip


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
