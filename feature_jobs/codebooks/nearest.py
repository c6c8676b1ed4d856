"""Finds the exact nearest of some centres for each embedding, as fast as products of few bits can.

Two steps. *Screening* rounds rows and centres to numbers that this processor multiplies fast (see
kernels), and keeps every centre whose score is within the rounding error of the best or two best: a
handful. *Ranking* measures their distances directly, in float64. The error is bounded by the
Cauchy-Schwarz inequality rather than estimated, so that no nearest centre is ever screened out, and
which kernel screens changes nothing but the time.

A small step takes longer to begin than to do. So blocks are large, and on a CPU what works on
numbers of rows and of pairs is numpy's, whose steps begin sooner.
"""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from apache_beam.utils.shared import Shared
from torch import Tensor

from feature_jobs.codebooks import kernels
from feature_jobs.codebooks.codebook import Codebook, load_codebook
from feature_jobs.codebooks.kernels import Array, Kernel, library
from feature_jobs.store import threads

_GROUPS = 128  # of a tile's centres; a group's scores are looked at when its best is high
# Sizes are not fitted to a machine's caches: steps of half the size stay in more of them and take
# a tenth longer, as two threads wait for each other at the beginning of each.
_TILE = 2048  # centres multiplied at once at most, a multiple of _GROUPS
# Searched at once, by one thread, of so many columns or fewer: of more columns fewer rows, so that
# a block has no more numbers.
_ROWS, _ROWS_GPU, _COLUMNS = 4096, 8192, 256
_LEAST_ROWS = 32  # CUDA multiplies no fewer than 17
# Pairs of row and centre: so many times the rows of a block are kept at most, and measured at once.
_RANKED, _MEASURED, _MEASURED_GPU = 64, 512, 4096
# What float32 loses at most of a row's length, and float64 of a squared distance in whatever order
# it is added up; with room to spare for 2,048 columns, of which each loses its own share of a row's
# length, and 2^-53 of a sum of squares.
_LENGTH_ERROR, _ANY_ORDER, _UNDERFLOW = 1e-5, 1e-12, 1e-30

Distance = Callable[[Array, Array], Array]  # rows, centres → squares


class Nearest(NamedTuple):
    """Holds the nearest centre of each row and how far it is, Euclidean.

    `place` int64 [n] is the nearest centre; `distance` float32 [n], how far it is; `second`
    float32 [n], how far the next one is: inf where there is one centre only, nan where it was not
    asked for. A distance is a function of row and centre alone, the same bits on every machine.
    """

    place: np.ndarray
    distance: np.ndarray
    second: np.ndarray


class _Room:
    """Holds the memory that a thread screens in, block after block.

    Fresh memory costs more than what is done in it.
    """

    def __init__(self, rows: int, dimension: int, tile: int, kernel: Kernel, device: str):
        make = functools.partial(torch.empty, device=device)
        self.moved, self.rounded = make(rows, dimension), make(rows, dimension)
        self.codes = make(rows, kernel.columns(dimension), dtype=kernel.codes).zero_()
        self.scores = make(rows * tile, dtype=kernel.scores)
        self.tops = make(rows, _GROUPS, dtype=kernel.ordered)


class CentreSearch:
    """Finds the nearest of `centres`, float32 [K, d] of any layout, finite. COURIER appendix §1.

    The nearest is that of float64 arithmetic, and of centres equally near the first, for rows up to
    10^10 times as long as the centres. What a row gets depends on no other row. Uses an NVIDIA GPU
    where there is one, else the process's budget of threads, which all searches share; several
    threads may search at once. `kernel` screens, by default the one that is fastest here. Holds up
    to 4 (d + 2) bytes per centre beside the centres; d is 2,048 at most.
    """

    def __init__(self, centres: np.ndarray, kernel: Kernel | None = None):
        gpu = torch.cuda.is_available()
        self._device = "cuda" if gpu else "cpu"
        self._dimension = centres.shape[1]
        at_once = (_ROWS_GPU, _MEASURED_GPU) if gpu else (_ROWS, _MEASURED)
        self._rows, self._measured = (
            max(1, rows * _COLUMNS // max(_COLUMNS, self._dimension)) for rows in at_once
        )
        # One thread per block: within a block they would wait for each other at every step.
        self._workers = 1 if gpu else threads.budget()
        # Measured in such a thread, as it will be used.
        fastest = functools.partial(kernels.fastest, self._device, self._dimension)
        self._kernel = kernel or _pool(1).submit(fastest).result()
        exact = np.require(centres, np.float32, ["C", "W"])  # no copy of a codebook's own
        middle = exact.mean(axis=0, dtype=np.float64).astype(np.float32)
        self._centres = _array(torch.from_numpy(exact).to(self._device))
        self._middle = _array(torch.from_numpy(middle).to(self._device))
        self._count = len(exact)
        self._tile = min(_TILE, _GROUPS * -(-self._count // _GROUPS))
        self._set_codes(exact.astype(np.float64) - middle)

    def nearest(self, rows: np.ndarray, second: bool = False) -> Nearest:
        """Finds the nearest centre of each of `rows`, float32 [n, d].

        A row that is not finite gets place 0 and distance nan. The `second` distances take up to a
        third of the time more.
        """
        n = len(rows)
        found = Nearest(np.empty(n, np.int64), np.empty(n, np.float32), np.empty(n, np.float32))
        size = max(_LEAST_ROWS, min(self._rows, -(-n // self._workers)))
        starts = iter(range(0, n, size))  # all workers take their blocks from here

        @torch.inference_mode()  # whose many small steps take less time to begin
        @np.errstate(all="ignore")  # rows that are not finite, as torch does
        def work(_: int) -> None:
            room = _Room(size, self._dimension, self._tile, self._kernel, self._device)
            for at in starts:
                block = torch.as_tensor(np.require(rows[at : at + size], np.float32, ["C", "W"]))
                parts = self._search(_array(block.to(self._device)), room, second)
                place, *squares = (torch.as_tensor(part).cpu().numpy() for part in parts)
                found.place[at : at + size] = place
                for whole, part in zip(found[1:], squares, strict=True):
                    whole[at : at + size] = np.sqrt(part)  # torch's may err in the last place

        for _ in _pool(self._workers).map(work, range(self._workers)):
            pass
        return found

    def _set_codes(self, moved: np.ndarray) -> None:
        """Rounds the centres, float64 [K, d] about their middle, to codes [K.., columns]."""
        kernel = self._kernel
        # argmin |x - c|² = argmax x·c - |c|²/2, wherever the origin is, or the zero of scores: [K]
        bias = -0.5 * np.einsum("kd,kd->k", moved, moved)
        # As small as can be, or never below 0: as the mean of x·c over the centres is 0, the best
        # score is then not below 0 either, which is where kernels have their order.
        bias -= (bias.max() + bias.min()) / 2 if kernel.whole else bias.min()
        # A row has `unit` in each of its further columns, a centre parts of its bias by that: [K]
        reach = max(float(np.abs(moved).max()), 1e-15)
        step = reach / kernel.levels
        shares = kernel.bias_columns if kernel.whole else 1
        self._unit = float(np.abs(bias).max()) / (shares * reach)
        vectors = torch.from_numpy(moved / step)
        biases = torch.from_numpy(bias / (max(self._unit, 1e-30) * step))
        codes = kernel.rounded(vectors)
        columns, rest = [codes], biases
        for left in range(kernel.bias_columns, 0, -1):
            columns.append(kernel.rounded(rest / left if kernel.whole else rest)[:, None])
            rest = rest - columns[-1][:, 0]
        # In steps: the longest centre and the largest bias, and what rounding takes of them.
        self._longest, self._vector_loss = _longest(vectors), _longest(vectors - codes)
        self._largest, self._bias_loss = float(biases.abs().max()), float(rest.abs().max())
        few = torch.cat(columns, dim=1).to(kernel.codes)
        padding = (0, kernel.columns(self._dimension) - few.shape[1], 0, -self._count % _GROUPS)
        few = torch.nn.functional.pad(few, padding)
        self._codes = few.to(self._device)

    def _search(self, rows: Array, room: _Room, second: bool) -> tuple[Array, Array, Array]:
        """Finds the nearest centre of each row of a block, and the squared distances, float64."""
        pairs = self._screen(rows, room, second)
        if pairs is not None:
            return self._rank(rows, *pairs, second)
        # Crowded beyond what memory allows, as where thousands of centres are equal.
        xp, half = library(rows), len(rows) // 2
        halves = (self._search(part, room, second) for part in (rows[:half], rows[half:]))
        place, distance, next_one = (xp.concatenate(both) for both in zip(*halves, strict=True))
        return place, distance, next_one

    def _encode(self, rows: Array, room: _Room) -> tuple[Tensor, Array]:
        """Returns rows as codes [_LEAST_ROWS.., columns], and the error of their scores [n]."""
        # Each row has a step of its own, which changes nothing in the order of its scores: [n, 1]
        kernel, n, d, xp = self._kernel, len(rows), self._dimension, library(rows)
        moved, rounded = room.moved[:n], room.rounded[:n]
        codes = room.codes[: max(n, _LEAST_ROWS)]
        codes[n:] = 0
        xp.subtract(rows, self._middle, out=_array(moved))
        step = torch.abs(moved, out=rounded).amax(dim=1, keepdim=True)
        step.clamp_(min=max(self._unit, 1e-15)).div_(kernel.levels)
        moved.div_(step)
        bias = step.reciprocal_().mul_(self._unit)
        kernel.encode(moved, codes[:n, :d], rounded)
        biases = kernel.rounded(bias)
        codes[:n, d : d + kernel.bias_columns] = biases
        # |x·c - x'·c'| ≤ |x - x'| |c| + |x'| |c - c'|, where x' and c' are the rounded ones; so for
        # the biases; and what adding up loses: [n]
        length = _length(_array(rounded))
        lost = _length(_array(moved.sub_(rounded))) + _LENGTH_ERROR * length
        lost_bias, bias = _array((bias - biases).abs_())[:, 0], _array(biases)[:, 0]
        error = lost * self._longest + length * self._vector_loss
        error += lost_bias * self._largest + bias * self._bias_loss
        sums = kernel.sums * kernel.columns(d)
        error += sums * (length * self._longest + bias * self._largest)
        # A little more, for what rounding did to the error itself.
        return codes, error * 1.01 + (1 if kernel.whole else _UNDERFLOW)

    def _screen(self, rows: Array, room: _Room, second: bool) -> tuple[Array, Array] | None:
        """Returns all that may be the nearest or `second` of a row: rows, centres; int64 [pairs].

        None where there are too many pairs to hold.
        """
        n, kernel, xp = len(rows), self._kernel, library(rows)
        codes, error = self._encode(rows, room)
        slack = kernel.slack(error)
        best = xp.full_like(_array(room.tops)[:n, : _GROUPS if second else 1], kernel.lowest)
        limit = kernel.limit(xp.amax(best, axis=1), slack)
        found: list[tuple[Array, Array, Array]] = []
        held, most = 0, _RANKED * self._rows if n > 1 else np.inf
        for at in range(0, self._count, self._tile):
            tile = self._codes[at : at + self._tile]
            scores = room.scores[: len(codes) * len(tile)].view(len(codes), len(tile))
            kernel.multiply(codes, tile, scores)
            scores = scores.view(kernel.ordered)[:n]
            scores[:, self._count - at :] = kernel.lowest
            # A group's members stand _GROUPS apart: [n, members, groups]
            scores = scores.view(n, -1, _GROUPS)
            # The best score of each group, of this tile and of all tiles so far: [n, groups], and
            # where the second does not matter, of all groups: [n, 1]
            tops = _array(torch.amax(scores, dim=1, out=room.tops[:n]))
            best = xp.maximum(best, tops if second else xp.amax(tops, axis=1, keepdims=True))
            least = xp.amax(best, axis=1)
            if second:
                # Another group holds another centre: the second nearest is no worse than that: [n]
                others = xp.where(best == least[:, None], kernel.lowest, best)
                least = xp.amax(others, axis=1)
            limit = xp.maximum(limit, kernel.limit(least, slack))
            cell = _where(tops >= limit[:, None])
            row, group = cell // _GROUPS, cell % _GROUPS
            if held + len(cell) > most:
                return None
            members = _array(scores)[row, :, group]  # [cells, members]
            high = _where(members >= limit[row][:, None])
            cell, member = high // members.shape[1], high % members.shape[1]
            found.append(
                (row[cell], at + member * _GROUPS + group[cell], members.reshape(-1)[high])
            )
            held += len(high)
            if held > most:
                return None
        row, centre, score = (xp.concatenate(parts) for parts in zip(*found, strict=True))
        keep = (score >= limit[row]) & (centre < self._count)  # limits only rise
        return row[keep], centre[keep]

    def _rank(
        self, rows: Array, row: Array, centre: Array, second: bool
    ) -> tuple[Array, Array, Array]:
        """Returns the nearest of the pairs that are left, and the squares of the two distances.

        The squares are exact enough for the float32 of their roots.
        """
        n, xp = len(rows), library(rows)
        away = self._measure(rows, row, centre, _quick_squared_distance)
        nearest = wanted = _least(away, row, n, np.inf)
        if second:  # or of equally near ones the next, which is no nearer than the second
            wanted = _least(xp.where(away <= nearest[row], np.inf, away), row, n, np.inf)
        keep = away <= wanted[row] * (1 + 3 * _ANY_ORDER)
        row, centre, away = row[keep], centre[keep], away[keep]
        # The order of additions decides only between those that may be equally near, either the
        # nearest or those after it, and where it decides how a root is rounded. That is seldom.
        rank = 2 * row + (away > nearest[row] * (1 + 3 * _ANY_ORDER))
        may_turn = xp.bincount(rank)[rank] > 1
        may_turn |= _root(away * (1 - _ANY_ORDER)) != _root(away * (1 + _ANY_ORDER))
        unsure = _where(may_turn)
        away[unsure] = self._measure(rows, row[unsure], centre[unsure], _squared_distance)
        least = _least(away, row, n, np.inf)
        nobody = self._count
        place = _least(xp.where(away == least[row], centre, nobody), row, n, nobody)
        next_one = xp.full_like(least, np.nan)
        if second:
            next_one = _least(xp.where(centre == place[row], np.inf, away), row, n, np.inf)
        least[place == nobody] = np.nan
        place[place == nobody] = 0
        return place, least, next_one

    def _measure(self, rows: Array, row: Array, centre: Array, distance: Distance) -> Array:
        """Returns the squared distances of pairs, float64 [pairs]."""
        xp = library(rows)
        away = xp.empty(len(row), dtype=xp.float64, device=rows.device)
        for at in range(0, len(row), self._measured):
            part = slice(at, at + self._measured)
            away[part] = distance(rows[row[part]], self._centres[centre[part]])
        return away


class CodebookSearch:
    """Finds the cluster IDs of embeddings, by any resolution of `codebook`."""

    def __init__(self, codebook: Codebook):
        self.codebook = codebook
        self._searches = {k: CentreSearch(centres) for k, centres in codebook.centres.items()}

    def assign(
        self, label: str, rows: np.ndarray, second: bool = False
    ) -> tuple[np.ndarray, Nearest]:
        """Returns the number of the nearest centre of each row, int32 [n], and how near it is.

        The `rows` are float32 [n, d].
        """
        found = self._searches[label].nearest(rows, second)
        return np.asarray(self.codebook.numbers[label])[found.place], found


def shared_search(loaded: Shared, folder: str) -> CodebookSearch:
    """Returns the search of the codebook in `folder`, which `loaded` keeps for its worker process.

    Each process has one; the centres are memory-mapped, once for each machine.
    """
    found: CodebookSearch = loaded.acquire(lambda: CodebookSearch(load_codebook(folder)), folder)
    return found


def _array(tensor: Tensor) -> Array:
    """Returns the same memory as what the many small steps work on.

    On a CPU that is an array of numpy's, whose steps take a fraction of the time to begin.
    """
    return tensor if tensor.is_cuda else tensor.numpy()


def _where(mask: Array) -> Array:
    """Returns the places in the flat `mask` where it is true, int64."""
    return mask.flatten().nonzero()[:, 0] if library(mask) is torch else np.flatnonzero(mask)


def _length(vectors: Array) -> Array:
    xp = library(vectors)
    return xp.sqrt(xp.linalg.vecdot(vectors, vectors))


def _root(squares: Array) -> Array:
    xp = library(squares)
    return xp.asarray(xp.sqrt(squares), dtype=xp.float32)


def _longest(vectors: Tensor) -> float:
    return float(vectors.norm(dim=1).max())


def _squared_distance(rows: Array, centres: Array) -> Array:
    """Returns squared distances, float64 [n], of `rows` to `centres`, float32 [n, d].

    They have the same bits on every machine: all is done element by element, and added up in the
    order that stands here, halves onto halves, where a library's sum would choose one by the
    processor.
    """
    sums = _difference(rows, centres)
    sums *= sums
    # [n, d], [n, d / 2], …; of an odd number the middle one stays for the next step.
    while (half := -(-sums.shape[1] // 2)) < sums.shape[1]:
        sums, more = sums[:, :half], sums[:, half:]
        sums[:, : more.shape[1]] += more
    return sums[:, 0]


def _quick_squared_distance(rows: Array, centres: Array) -> Array:
    """Returns squared distances within _ANY_ORDER of those, added up as is fastest."""
    away = _difference(rows, centres)
    return library(away).linalg.vecdot(away, away)


def _difference(rows: Array, centres: Array) -> Array:
    xp = library(rows)
    return xp.asarray(rows, dtype=xp.float64) - xp.asarray(centres, dtype=xp.float64)


def _least(values: Array, row: Array, n: int, otherwise: float) -> Array:
    """Returns the least of the values of each row, [n], `otherwise` for a row that has none."""
    xp = library(values)
    least = xp.full((n,), otherwise, dtype=values.dtype, device=values.device)
    if xp is torch:
        return least.scatter_reduce_(0, row, values, "amin")
    np.minimum.at(least, row, values)
    return least


@functools.cache
def _pool(workers: int) -> ThreadPoolExecutor:
    """Returns the threads that all searches of this process share."""
    return ThreadPoolExecutor(workers, initializer=functools.partial(threads.keep_to_one, torch))
