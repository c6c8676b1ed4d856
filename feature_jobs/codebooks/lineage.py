"""Follows cluster numbers from a codebook to a descendant, to move the rows that a model has.

Numbers up to the older one's `max_id` keep their rows, bit for bit: what lived on still means what
it meant, and days made before the change still have what is retired. A number born since begins as
the mean of its parent's rows, each weighted by how many items came from there. One that no items
came to from an old number is seeded with the mean row of its parent codebook, weighted by items.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_jobs.codebooks.codebook import CodebookInfo, Resolution, read_codebook_info
from feature_jobs.schemas import CROSSWALK, DataContractError, InputNotReady, OperatorError
from feature_jobs.store import files, partitions

_VALUES = 1 << 17  # float64 of a block: 1 MiB stays in the cache, and is six times as fast as 32


@dataclass(frozen=True)
class Step:
    """Holds where the numbers that a codebook has issued came from, in its parent.

    They are first..last, none where last is first - 1. Items came to `born` int [m], ascending,
    from `old` int [m], and `share` float64 [m] is the part of the born number's items that did.
    `weights` float64 [first] are the shares of the parent's numbers in all items: their sum is one.
    """

    first: int
    last: int
    born: np.ndarray
    old: np.ndarray
    share: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True)
class Lineage:
    """Holds the steps of one resolution from codebook `old` to its descendant `new`, in order."""

    old: CodebookInfo
    new: CodebookInfo
    label: str
    steps: tuple[Step, ...]

    def fates(self) -> dict[str, int]:
        """Counts the numbers of `new` that are kept, mixed and seeded, and those retired since.

        Seeded is a number of which no items came, over all steps, from a number of `old`.
        """
        old, new = (info.resolution(self.label) for info in (self.old, self.new))
        known = np.ones(old.max_id + 1, bool)
        for step in self.steps:
            came = np.bincount(step.born[known[step.old]], minlength=step.last + 1)
            known = np.append(known, came[step.first :] > 0)
        kept = int((old.in_use & new.in_use[: old.max_id + 1]).sum())
        mixed = int((known & new.in_use)[old.max_id + 1 :].sum())
        return {
            "kept": kept,
            "mixed": mixed,
            "seeded": new.clusters - kept - mixed,
            "retired": old.clusters - kept,
        }


# ---- Rows ----------------------------------------------------------------------------------


def born_rows(rows: np.ndarray, step: Step) -> Iterator[np.ndarray]:
    """Yields the rows of the numbers born in `step`, ascending; floats [any, d] of the same dtype.

    `rows` [step.first, d], which may be memory-mapped, are those of all numbers before. Sums are in
    float64, of some rows at a time.
    """
    size = max(1, _VALUES // rows.shape[1])
    starts = np.searchsorted(step.born, np.arange(step.first, step.last + 2))
    orphans = np.diff(starts) == 0
    seed = _mean_row(rows, step.weights, size) if orphans.any() else np.zeros(rows.shape[1])
    for at in range(0, len(orphans), size):
        cuts = starts[at : at + size + 1]
        block = _mixed(rows, step, step.first + at, cuts, size)
        block[orphans[at : at + size]] = seed
        yield block.astype(rows.dtype)


def _mixed(rows: np.ndarray, step: Step, first: int, cuts: np.ndarray, size: int) -> np.ndarray:
    """Returns the weighted means of the numbers from `first` on, float64 [n, d]; 0 for orphans.

    The moves to each lie between two of `cuts` [n + 1].
    """
    sums = np.zeros((len(cuts) - 1, rows.shape[1]))
    for at in range(cuts[0], cuts[-1], size):
        some = slice(at, min(at + size, cuts[-1]))
        born = step.born[some] - first
        # Moves to one number are neighbours: one sum for each run of them, [runs, d].
        runs = np.flatnonzero(np.diff(born, prepend=-1))
        sums[born[runs]] += np.add.reduceat(rows[step.old[some]] * step.share[some, None], runs)
    return sums


def _mean_row(rows: np.ndarray, weights: np.ndarray, size: int) -> np.ndarray:
    """Returns the weighted mean of all rows, float64 [d]."""
    mean = np.zeros(rows.shape[1])
    for at in range(0, len(rows), size):
        mean += (rows[at : at + size] * weights[at : at + size, None]).sum(axis=0)
    return mean


# ---- Steps ---------------------------------------------------------------------------------


def step_of(crosswalk: pa.Table, parent: Resolution, child: Resolution) -> Step:
    """Returns the step of one resolution that the table `crosswalk` of the child tells.

    Raises DataContractError where the numbers of the table are not those of the two.
    """
    rows = crosswalk.filter(pc.equal(crosswalk["label"], child.label))
    old, new, items = (rows[n].to_numpy() for n in ("old_cluster_id", "new_cluster_id", "items"))
    if not _fit(old, new, parent, child):
        raise DataContractError(
            f"The crosswalk has {len(rows):,} rows of resolution {child.label!r}, but its numbers "
            f"are not those of the codebook ({child.clusters:,} numbers up to {child.max_id:,}) "
            f"and its parent ({parent.clusters:,} up to {parent.max_id:,}). Rows would be moved "
            "to numbers of other items. Restore the codebook's folder from a copy."
        )
    totals = np.bincount(old, weights=items, minlength=parent.max_id + 1)
    if not totals.any():  # nobody has an item: all its numbers count alike
        totals = parent.in_use.astype(np.float64)
    came = np.flatnonzero(new > parent.max_id)
    came = came[np.argsort(new[came], kind="stable")]
    born = new[came]
    share = items[came] / np.bincount(born, weights=items[came])[born]
    return Step(parent.max_id + 1, child.max_id, born, old[came], share, totals / totals.sum())


def _fit(old: np.ndarray, new: np.ndarray, parent: Resolution, child: Resolution) -> bool:
    """Returns whether `old` are the numbers of the parent, all of them, and `new` of the child.

    Both are int [n]; a new one may be 0, too.
    """
    if not ((old > 0) & (old <= parent.max_id) & (new >= 0) & (new <= child.max_id)).all():
        return False
    seen = np.bincount(old, minlength=parent.max_id + 1) > 0
    return np.array_equal(seen, parent.in_use) and bool((child.in_use[new] | (new == 0)).all())


# ---- Packages ------------------------------------------------------------------------------


def read_lineage(old: str, new: str, label: str) -> Lineage:
    """Reads the steps of one resolution from the package in folder `old` to that in `new`.

    The packages between are looked for beside these two. Raises OperatorError where `new` does not
    descend from `old`, or one of them has no such label or no crosswalk, InputNotReady where one
    between is not there, and DataContractError where a crosswalk is damaged.
    """
    old, new = files.absolute(old), files.absolute(new)
    first, last = read_codebook_info(old), read_codebook_info(new)
    between = _between(first, last)
    folders = [*(_find(name, (new, old), last) for name in reversed(between)), new]
    infos = [first, *map(read_codebook_info, folders)]
    for info in infos:
        _check_label(info, label)
    resolutions = [info.resolution(label) for info in infos]
    pairs = zip(folders, pairwise(resolutions), strict=True)
    steps = tuple(step_of(_read_crosswalk(folder), *pair) for folder, pair in pairs)
    return Lineage(first, last, label, steps)


def _between(old: CodebookInfo, new: CodebookInfo) -> Sequence[str]:
    """Returns the ids of the codebooks between `new` and its ancestor `old`, the youngest first."""
    if old.codebook_id in new.ancestors:
        return new.ancestors[: new.ancestors.index(old.codebook_id)]
    if new.codebook_id in (old.codebook_id, *old.ancestors):
        hint = "It is the same one or older, and there is nothing to move: are the two swapped?"
    else:
        hint = "Give a codebook of this lineage, or begin with new rows."
    came = ", child of ".join([new.codebook_id, *new.ancestors])
    raise OperatorError(
        f"The codebook to move to ({came if new.ancestors else came + ', which has no parent'}; of "
        f"encoder {new.encoder_id}) does not descend from {old.codebook_id} (of encoder "
        f"{old.encoder_id}). Between two lineages even equal numbers mean nothing, and rows would "
        f"come to stand for other items. {hint}"
    )


def _find(identity: str, beside: Sequence[str], new: CodebookInfo) -> str:
    """Returns the folder of the package `identity` that lies beside one of these folders."""
    places = list(dict.fromkeys(map(os.path.dirname, beside)))
    for folder in (os.path.join(place, identity) for place in places):
        if files.exists(os.path.join(folder, "codebook.json")):
            return folder
    raise InputNotReady(
        f"{new.codebook_id} descends from {identity}, whose package is not in "
        f"{' or '.join(places)}. The crosswalk in it is a step of the way, without which rows "
        "cannot be followed. Copy the package there."
    )


def _check_label(info: CodebookInfo, label: str) -> None:
    if label not in info.labels:
        raise OperatorError(
            f"The codebook {info.codebook_id} has no resolution {label!r}, only "
            f"{', '.join(info.labels)}. Its numbers cannot be followed through a codebook that "
            "lacks them. Name one that all have with --label."
        )


def _read_crosswalk(folder: str) -> pa.Table:
    path = os.path.join(folder, "crosswalk.parquet")
    try:
        table = partitions.read_parquet(path)
        if not table.schema.equals(CROSSWALK):
            raise pa.ArrowInvalid(f"columns {', '.join(table.column_names)}")
        return table
    except FileNotFoundError as error:
        raise OperatorError(
            f"The codebook in {folder} has a parent but no {os.path.basename(path)}: when it was "
            "fitted, no item_features told its parent's numbers. Nothing says which items moved "
            "where. Fit it anew with a day of item_features made with its parent there, or begin "
            "with new rows."
        ) from error
    except pa.ArrowInvalid as error:
        raise DataContractError(
            f"{path} is damaged: {error}. Rows would be moved to numbers of other items. Restore "
            "the codebook's folder from a copy."
        ) from error
