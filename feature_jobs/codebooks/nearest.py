"""Finds the exact nearest of some centres for each embedding, as fast as products of few bits can.

Two steps. *Screening* rounds rows and centres to numbers that this processor multiplies fast (see
kernels), and keeps every centre whose score is within the rounding error of the best or two best: a
handful. *Ranking* measures their distances directly, in float64. The error is bounded by the
Cauchy-Schwarz inequality rather than estimated, so that no nearest centre is ever screened out, and
which kernel screens changes nothing but the time.
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
from feature_jobs.codebooks.kernels import Kernel
from feature_jobs.store import threads

_GROUPS = 128  # of a tile's centres; a group's scores are looked at when its best is high
_TILE = 4096  # centres multiplied at once at most, a multiple of _GROUPS
_CELLS = 1 << 21  # scores that a thread holds at once: 8 MiB, which stay in the cache
_CELLS_GPU = 1 << 25
_LEAST_ROWS = 32  # CUDA multiplies no fewer than 17
# Pairs of row and centre per cell: those ranked at once, those measured at once (256 stay in the
# cache).
_RANKED, _MEASURED = 1 / 32, 1 / 8192
# What float32 loses at most, with room to spare: of a row's length, and of a squared distance.
_LENGTH_ERROR, _SQUARE_ERROR, _UNDERFLOW = 1e-5, 1e-4, 1e-30

Distance = Callable[[Tensor, Tensor, Tensor], Tensor]  # rows, centres, room → squares


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
    """Holds the memory that a thread works in, block after block.

    Fresh memory costs more than what is done in it.
    """

    def __init__(self, rows: int, tile: int, columns: int, pairs: int, kernel: Kernel, device: str):
        make = functools.partial(torch.empty, device=device)
        self.rows = torch.empty(rows, 256)
        self.moved, self.rounded = make(rows, 256), make(rows, 256)
        self.codes = make(rows, columns, dtype=kernel.codes)
        self.scores = make(rows * tile, dtype=kernel.scores)
        self.tops = make(rows, _GROUPS, dtype=kernel.ordered)
        self.near, self.far = make(pairs, 256), make(pairs, 256)
        self.exact = make(pairs, 256, dtype=torch.float64)


class CentreSearch:
    """Finds the nearest of `centres`, float32 [K, 256] of any layout, finite. COURIER appendix §1.

    The nearest is that of float64 arithmetic, and of centres equally near the first. What a row
    gets depends on no other row. Uses an NVIDIA GPU where there is one, else the process's budget
    of threads, which all searches share; several threads may search at once. `kernel` screens, by
    default the one that is fastest here. Holds up to 1,032 bytes per centre beside the centres.
    """

    def __init__(self, centres: np.ndarray, kernel: Kernel | None = None):
        gpu = torch.cuda.is_available()
        self._device, self._cells = ("cuda", _CELLS_GPU) if gpu else ("cpu", _CELLS)
        # One thread per block: within a block they would wait for each other at every step.
        self._workers = 1 if gpu else threads.budget()
        # Measured in such a thread, as it will be used. A GPU takes bytes in any case.
        self._kernel = kernel or (
            kernels.INT8 if gpu else _pool(1).submit(kernels.fastest).result()
        )
        exact = np.require(centres, np.float32, ["C", "W"])  # no copy of a codebook's own
        middle = exact.mean(axis=0, dtype=np.float64).astype(np.float32)
        self._centres = torch.from_numpy(exact).to(self._device)
        self._middle = torch.from_numpy(middle).to(self._device)
        self._count = len(exact)
        self._tile = min(_TILE, _GROUPS * -(-self._count // _GROUPS))
        self._set_codes(exact.astype(np.float64) - middle)

    def nearest(self, rows: np.ndarray, second: bool = False) -> Nearest:
        """Finds the nearest centre of each of `rows`, float32 [n, 256].

        A row that is not finite gets place 0 and distance nan. The `second` distances take up to a
        third of the time more.
        """
        n = len(rows)
        found = Nearest(np.empty(n, np.int64), np.empty(n, np.float32), np.empty(n, np.float32))
        size = max(_LEAST_ROWS, min(self._cells // self._tile, -(-n // self._workers)))
        starts = iter(range(0, n, size))  # all workers take their blocks from here

        @torch.inference_mode()  # whose many small steps take less time to begin
        def work(_: int) -> None:
            columns, pairs = self._codes.shape[1], int(self._cells * _MEASURED)
            room = _Room(size, self._tile, columns, pairs, self._kernel, self._device)
            for at in starts:
                block = room.rows[: len(rows[at : at + size])]
                np.copyto(block.numpy(), rows[at : at + size], casting="same_kind")
                parts = self._search(block.to(self._device), room, second)
                place, *squares = (part.cpu().numpy() for part in parts)
                found.place[at : at + size] = place
                for whole, part in zip(found[1:], squares, strict=True):
                    whole[at : at + size] = np.sqrt(part)  # torch's may err in the last place

        for _ in _pool(self._workers).map(work, range(self._workers)):
            pass
        return found

    def _set_codes(self, moved: np.ndarray) -> None:
        """Rounds the centres, float64 [K, 256] about their middle, to codes [K.., columns]."""
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
        padding = (0, 0, 0, -self._count % _GROUPS)
        few = torch.nn.functional.pad(torch.cat(columns, dim=1).to(kernel.codes), padding)
        self._codes = few.to(self._device)

    def _search(self, rows: Tensor, room: _Room, second: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Finds the nearest centre of each row of a block, and the squared distances, float64."""
        pairs = self._screen(rows, room, second)
        if pairs is not None:
            return self._rank(rows, *pairs, room, second)
        # Crowded beyond what memory allows, as where thousands of centres are equal.
        halves = (self._search(half, room, second) for half in rows.tensor_split(2))
        place, distance, next_one = (torch.cat(both) for both in zip(*halves, strict=True))
        return place, distance, next_one

    def _encode(self, rows: Tensor, room: _Room) -> tuple[Tensor, Tensor]:
        """Returns rows as codes [_LEAST_ROWS.., columns], and the error of their scores [n]."""
        # Each row has a step of its own, which changes nothing in the order of its scores: [n, 1]
        kernel, n = self._kernel, len(rows)
        moved, vectors = room.moved[:n], room.rounded[:n]
        codes = room.codes[: max(n, _LEAST_ROWS)]
        codes[n:] = 0
        torch.sub(rows, self._middle, out=moved)
        step = torch.abs(moved, out=vectors).amax(dim=1, keepdim=True)
        step = step.clamp_(min=max(self._unit, 1e-15)).div_(kernel.levels)
        moved.div_(step)
        bias = self._unit / step
        kernel.encode(moved, codes[:n, :256], vectors)
        biases = kernel.rounded(bias)
        codes[:n, 256:] = biases
        # |x·c - x'·c'| ≤ |x - x'| |c| + |x'| |c - c'|, where x' and c' are the rounded ones; so for
        # the biases; and what adding up loses: [n]
        length = torch.linalg.vector_norm(vectors, dim=1)
        lost = torch.linalg.vector_norm(moved.sub_(vectors), dim=1) + _LENGTH_ERROR * length
        lost_bias, bias = (bias - biases).abs_()[:, 0], biases[:, 0]
        error = lost * self._longest + length * self._vector_loss
        error += lost_bias * self._largest + bias * self._bias_loss
        error += kernel.sums * (length * self._longest + bias * self._largest)
        # A little more, for what rounding did to the error itself.
        return codes, error * 1.01 + (1 if kernel.whole else _UNDERFLOW)

    def _screen(self, rows: Tensor, room: _Room, second: bool) -> tuple[Tensor, Tensor] | None:
        """Returns all that may be the nearest or `second` of a row: rows, centres; int64 [pairs].

        None where there are too many pairs to hold.
        """
        n, kernel = len(rows), self._kernel
        codes, error = self._encode(rows, room)
        never = torch.iinfo if kernel.ordered != torch.float32 else torch.finfo
        lowest = never(kernel.ordered).min
        kept = _GROUPS if second else 1
        best = torch.full((n, kept), lowest, dtype=kernel.ordered, device=rows.device)
        found: list[tuple[Tensor, Tensor]] = []
        pairs = 0
        for at in range(0, self._count, self._tile):
            tile = self._codes[at : at + self._tile]
            scores = room.scores[: len(codes) * len(tile)].view(len(codes), len(tile))
            kernel.multiply(codes, tile, scores)
            scores = scores.view(kernel.ordered)[:n]
            scores[:, self._count - at :] = lowest
            # The best score of each group, of this tile and of all tiles so far: [n, groups], and
            # where the second does not matter, of all groups: [n, 1]
            tops = torch.amax(scores.view(n, -1, _GROUPS), dim=1, out=room.tops[:n])
            best = torch.maximum(best, tops if second else tops.amax(dim=1, keepdim=True))
            least = best.amax(dim=1)
            if second:
                # Another group holds another centre: the second nearest is no worse than that: [n]
                least = best.masked_fill(best == least[:, None], lowest).amax(dim=1)
            limit = kernel.limit(least, error)
            cell = _reaching(tops, limit)
            if pairs + len(cell) > self._cells * _RANKED and n > 1:
                return None
            # The members of such a group stand _GROUPS apart: [cells, members]
            row = cell // _GROUPS
            member = torch.arange(0, len(tile), _GROUPS, device=rows.device)
            cell = (cell + row * (len(tile) - _GROUPS))[:, None] + member
            keep = _reaching(scores.view(-1)[cell], limit[row])
            cell = cell.view(-1)[keep]
            row = cell // len(tile)
            found.append((row, at + cell - row * len(tile)))
            pairs += len(row)
            if pairs > self._cells * _RANKED and n > 1:
                return None
        row, centre = (torch.cat(parts) for parts in zip(*found, strict=True))
        real = centre < self._count
        return row[real], centre[real]

    def _rank(
        self, rows: Tensor, row: Tensor, centre: Tensor, room: _Room, second: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the nearest of the pairs that are left, and the squares of the two distances."""
        n = len(rows)
        # What float32 cannot tell from the nearest, of rows with several pairs: [rivals]
        rivals = (torch.bincount(row, minlength=n)[row] > 1).nonzero()[:, 0]
        mine = row[rivals]
        rough = self._measure(rows, mine, centre[rivals], room, _rough_squared_distance)
        least = _least(rough, mine, n)
        if second:  # or of equally near ones the next, which is no nearer than the second
            least = _least(rough.masked_fill(rough <= least[mine], torch.inf), mine, n)
        keep = torch.ones_like(row, dtype=torch.bool)
        keep[rivals] = rough <= least[mine] * (1 + _SQUARE_ERROR) + _UNDERFLOW
        row, centre = row[keep], centre[keep]
        away = self._measure(rows, row, centre, room, _squared_distance)
        least = _least(away, row, n)
        nobody = torch.full((n,), self._count, device=rows.device)
        first = centre.where(away == least[row], self._count)
        place = nobody.scatter_reduce(0, row, first, "amin")
        next_one = torch.full_like(least, torch.nan)
        if second:
            next_one = _least(away.masked_fill_(centre == place[row], torch.inf), row, n)
        least.masked_fill_(place == nobody, torch.nan)
        return place.masked_fill_(place == nobody, 0), least, next_one

    def _measure(
        self, rows: Tensor, row: Tensor, centre: Tensor, room: _Room, distance: Distance
    ) -> Tensor:
        """Returns the squared distances of pairs, float64 [pairs]."""
        away = torch.empty(len(row), dtype=torch.float64, device=rows.device)
        size = len(room.near)
        for whole, r, c in zip(away.split(size), row.split(size), centre.split(size), strict=True):
            near = torch.index_select(rows, 0, r, out=room.near[: len(r)])
            far = torch.index_select(self._centres, 0, c, out=room.far[: len(r)])
            whole.copy_(distance(near, far, room.exact[: len(r)]))
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

        The `rows` are float32 [n, 256].
        """
        found = self._searches[label].nearest(rows, second)
        return np.asarray(self.codebook.numbers[label])[found.place], found


def shared_search(loaded: Shared, folder: str) -> CodebookSearch:
    """Returns the search of the codebook in `folder`, which `loaded` keeps for its worker process.

    Each process has one; the centres are memory-mapped, once for each machine.
    """
    found: CodebookSearch = loaded.acquire(lambda: CodebookSearch(load_codebook(folder)), folder)
    return found


def _longest(vectors: Tensor) -> float:
    return float(vectors.norm(dim=1).max())


def _reaching(values: Tensor, limit: Tensor) -> Tensor:
    """Returns where `values` [n, m] are no less than their row's `limit` [n]: flat, int64."""
    if values.is_cuda:
        return (values >= limit[:, None]).flatten().nonzero()[:, 0]
    # On a CPU several times as fast as torch.
    return torch.from_numpy(np.flatnonzero(values.numpy() >= limit.numpy()[:, None]))


def _squared_distance(rows: Tensor, centres: Tensor, room: Tensor) -> Tensor:
    """Returns squared distances, float64 [n], of `rows` to `centres`, float32 [n, 256].

    They have the same bits on every machine: all is done element by element, and added up in the
    order that stands here, halves onto halves, where a library's sum would choose one by the
    processor. The `room` is float64 [n, 256].
    """
    room.copy_(rows).sub_(centres)
    room.mul_(room)
    # Numpy's steps are the same; on a CPU they take less time to begin: [n, 256], [n, 128], …
    sums = room if room.is_cuda else room.numpy()
    while sums.shape[1] > 16:
        half = sums.shape[1] // 2
        sums = sums[:, :half] + sums[:, half:]
    # On its side, as steps along rows so short take several times as long: [16, n], [8, n], …
    sums = sums.T.copy() if isinstance(sums, np.ndarray) else sums.T.contiguous()
    while len(sums) > 1:
        half = len(sums) // 2
        sums = sums[:half] + sums[half:]
    return torch.as_tensor(sums[0])


def _rough_squared_distance(rows: Tensor, centres: Tensor, _: Tensor) -> Tensor:
    """Returns the same within _SQUARE_ERROR, float32 [n]; spoils `rows`."""
    return rows.sub_(centres).square_().sum(dim=1)


def _least(values: Tensor, row: Tensor, n: int) -> Tensor:
    """Returns the least of the values of each row, float64 [n], inf for a row that has none."""
    least = torch.full((n,), torch.inf, dtype=values.dtype, device=values.device)
    return least.scatter_reduce_(0, row, values, "amin")


@functools.cache
def _pool(workers: int) -> ThreadPoolExecutor:
    """Returns the threads that all searches of this process share."""
    return ThreadPoolExecutor(workers, initializer=functools.partial(threads.keep_to_one, torch))
