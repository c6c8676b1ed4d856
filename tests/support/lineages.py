"""Makes lineages of codebooks at random, and follows their numbers item by item, in plain loops."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

from feature_jobs.codebooks.codebook import (
    Codebook,
    codebook_id,
    continued_numbers,
    retired_numbers,
    save_codebook,
)
from feature_jobs.codebooks.crosswalk import count_moves, crosswalk
from tests.support.codebooks import by_hand, unit_rows

ENCODER = "tiny-000000000000"
Weights = dict[int, float]  # by old number


@dataclass(frozen=True)
class Generation:
    """Holds a codebook, the number that each item had under it (0 = none), and its crosswalk."""

    codebook: Codebook
    numbers: list[int]
    moves: pa.Table | None

    @property
    def identity(self) -> str:
        return self.codebook.info.codebook_id

    @property
    def max_id(self) -> int:
        return self.codebook.info.resolution("main").max_id

    def save(self, root: Path) -> str:
        return save_codebook(str(root), self.codebook, self.moves)


def random_lineage(rng: np.random.Generator, steps: int, items: int = 40) -> list[Generation]:
    """Makes a codebook and as many descendants as there are `steps`, the oldest first.

    Centres come and go, and so do items; some clusters have none. A child may be fresh.
    """
    place = rng.integers(0, 8, items)
    found = [_generation(rng, place, None)]
    for _ in range(steps):
        moved = rng.random(items) < 0.4
        place = np.where(moved, rng.integers(0, 8, items), place)
        found.append(_generation(rng, place, found[-1]))
    return found


def _generation(
    rng: np.random.Generator, place: np.ndarray, parent: Generation | None
) -> Generation:
    clusters, is_there = int(rng.integers(4, 11)), rng.random(len(place)) < 0.7
    place = place % clusters
    old = np.array(parent.numbers if parent else [0] * len(place))
    known = np.where(is_there & (rng.random() < 0.8), old, 0)  # else fresh: no number lives on
    numbers = continued_numbers(known, place, clusters, parent.max_id if parent else 0)
    mine = np.where(is_there, numbers[place], 0)
    seed = int(rng.integers(1 << 30))
    codebook = _codebook(numbers, seed, parent.codebook if parent else None)
    if parent is None:
        return Generation(codebook, mine.tolist(), None)
    counts = count_moves(old[is_there], mine[is_there], np.ones(is_there.sum(), int), "main")
    return Generation(codebook, mine.tolist(), crosswalk([counts], parent.codebook, codebook))


def _codebook(numbers: np.ndarray, seed: int, parent: Codebook | None) -> Codebook:
    """Makes a codebook of these numbers that descends from `parent`."""
    found = by_hand({"main": unit_rows(len(numbers), seed)}, {"main": numbers}, ENCODER)
    if parent is None:
        return found
    max_id = max(parent.info.max_ids["main"], int(numbers.max()))
    (only,) = found.info.resolutions
    only = replace(only, max_id=max_id, retired=retired_numbers(numbers, max_id))
    ancestors = (parent.info.codebook_id, *parent.info.ancestors)
    info = replace(found.info, ancestors=ancestors, resolutions=(only,))
    identity = codebook_id("test", found.centres, found.numbers, info.made_of)
    return replace(found, info=replace(info, codebook_id=identity))


# ---- The oracle ----------------------------------------------------------------------------


def followed(lineage: Sequence[Generation]) -> tuple[list[Weights], set[int]]:
    """Tells of which old rows the row of each new number is made, and which numbers are seeded."""
    weights: list[Weights] = [{number: 1.0} for number in range(lineage[0].max_id + 1)]
    seeded: set[int] = set()
    for parent, child in pairwise(lineage):
        pairs = [p for p in zip(parent.numbers, child.numbers, strict=True) if 0 not in p]
        members = Counter(old for old, _ in pairs)
        if not members:
            members = Counter(parent.codebook.numbers["main"].tolist())
        seed = _mean(members, weights)
        born: list[Weights] = []
        for number in range(parent.max_id + 1, child.max_id + 1):
            came = Counter(old for old, new in pairs if new == number)
            born.append(_mean(came, weights) if came else seed)
            if all(old in seeded for old in came):
                seeded.add(number)
        weights += born
    return weights, seeded


def _mean(counts: Counter[int], weights: list[Weights]) -> Weights:
    found: Counter[int] = Counter()
    for number, count in counts.items():
        for old, weight in weights[number].items():
            found[old] += weight * count / counts.total()  # type: ignore[assignment]
    return dict(found)


def mixed_rows(rows: np.ndarray, weights: list[Weights]) -> np.ndarray:
    """Returns the rows that `weights` tell, float64 [max_id + 1, d]."""
    out = np.zeros((len(weights), rows.shape[1]))
    for number, mine in enumerate(weights):
        for old, weight in mine.items():
            out[number] += weight * rows[old].astype(np.float64)
    return out
