"""Finds the exact nearest of some centres for each embedding, as fast as 8-bit products can.

Two steps. *Screening* rounds rows and centres to int8, which processors multiply several times as
fast as float32, and keeps every centre whose score is within the rounding error of the two best: a
handful. *Ranking* measures their distances directly, in float64. The error is bounded by the
Cauchy-Schwarz inequality rather than estimated, so that no nearest centre is ever screened out.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from apache_beam.utils.shared import Shared
from torch import Tensor

from feature_jobs.codebooks.codebook import Codebook, load_codebook

_BIAS = 16  # columns that carry -|c|²/2: one would need 16 times the range of the others
_GROUPS = 128  # of a tile's centres; a group's scores are looked at when its best is high
_TILE = 4096  # centres multiplied at once at most, a multiple of _GROUPS
_CELLS = 1 << 21  # scores that a thread holds at once: 8 MiB, which stay in the cache
_CELLS_GPU = 1 << 25
# Pairs of row and centre per cell: those ranked at once, those measured at once (1,024 stay in the
# cache).
_RANKED, _MEASURED = 1 / 32, 1 / 2048
_NEVER = -(1 << 30)  # below any score
# What float32 loses at most, with room to spare: of a row's length, and of a squared distance.
_LENGTH_ERROR, _SQUARE_ERROR, _UNDERFLOW = 1e-5, 1e-4, 1e-30
_setting_threads = threading.Lock()


class Nearest(NamedTuple):
    """Holds the nearest centre of each row and how far it is, Euclidean.

    `place` int64 [n] is the nearest centre; `distance` float32 [n], how far it is; `second`
    float32 [n], how far the next one is: inf where there is one centre only, nan where it was not
    asked for. A distance is a function of row and centre alone, the same bits on every machine.
    """

    place: np.ndarray
    distance: np.ndarray
    second: np.ndarray


class CentreSearch:
    """Finds the nearest of `centres`, float32 [K, 256] of any layout, finite. COURIER appendix §1.

    The nearest is that of float64 arithmetic, and of centres equally near the first. What a row
    gets depends on no other row. Uses an NVIDIA GPU where there is one, else as many threads as
    torch would; several threads may search at once and share these. Holds 272 bytes per centre
    beside the centres.
    """

    def __init__(self, centres: np.ndarray):
        gpu = torch.cuda.is_available()
        self._device, self._cells = ("cuda", _CELLS_GPU) if gpu else ("cpu", _CELLS)
        # One thread per block: within a block they would wait for each other at every step.
        self._workers = 1 if gpu else torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self._workers, initializer=_use_one_core)
        exact = np.require(centres, np.float32, ["C", "W"])  # no copy of a codebook's own
        middle = exact.mean(axis=0, dtype=np.float64).astype(np.float32)
        self._centres = torch.from_numpy(exact).to(self._device)
        self._middle = torch.from_numpy(middle).to(self._device)
        self._count = len(exact)
        self._set_codes(exact.astype(np.float64) - middle)

    def nearest(self, rows: np.ndarray, second: bool = False) -> Nearest:
        """Finds the nearest centre of each of `rows`, float32 [n, 256].

        A row that is not finite gets place 0 and distance nan. The `second` distances take up to a
        third of the time more.
        """
        n = len(rows)
        found = Nearest(np.empty(n, np.int64), np.empty(n, np.float32), np.empty(n, np.float32))
        size = max(32, min(self._cells // self._tile, -(-n // self._workers)))
        starts = iter(range(0, n, size))  # all workers take their blocks from here

        def work(_: int) -> None:
            # Room that is used again: fresh memory costs more than what is done in it.
            scores = torch.empty(size, self._tile, dtype=torch.int32, device=self._device)
            for at in starts:
                block = torch.from_numpy(np.array(rows[at : at + size], np.float32, order="C"))
                parts = self._search(block.to(self._device), scores, second)
                for whole, part in zip(found, parts, strict=True):
                    whole[at : at + size] = part.cpu().numpy()

        for _ in self._pool.map(work, range(self._workers)):
            pass
        return found

    def _set_codes(self, moved: np.ndarray) -> None:
        """Rounds the centres, float64 [K, 256] about their middle, to int8 [K.., 256 + _BIAS]."""
        # argmin |x - c|² = argmax x·c - |c|²/2, wherever the origin is, or the zero of scores: [K]
        bias = -0.5 * np.einsum("kd,kd->k", moved, moved)
        bias -= (bias.max() + bias.min()) / 2
        # A row has `unit` in each of its further columns, a centre its bias by that: [K, 272]
        reach = max(float(np.abs(moved).max()), 1e-15)
        self._unit = float(np.abs(bias).max()) / (_BIAS * reach)
        columns = bias[:, None] / (_BIAS * max(self._unit, 1e-30))
        moved = np.concatenate([moved, np.repeat(columns, _BIAS, axis=1)], axis=1)
        self._levels = _levels(self._device)
        step = reach / self._levels
        codes = np.rint(moved / step)
        # In steps: the longest centre, and the greatest distance from a centre to its codes.
        self._longest = float(np.linalg.norm(moved, axis=1).max()) / step
        self._rounding = float(np.linalg.norm(moved / step - codes, axis=1).max())
        self._tile = min(_TILE, _GROUPS * -(-self._count // _GROUPS))
        codes = np.pad(codes.astype(np.int8), ((0, -self._count % self._tile), (0, 0)))
        self._codes = torch.from_numpy(codes).to(self._device)

    def _search(self, rows: Tensor, scores: Tensor, second: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Finds what `nearest` returns, of one block.

        `scores` int32 [≥ n, tile] is room to work in.
        """
        pairs = self._screen(rows, scores, second)
        if pairs is not None:
            return self._rank(rows, *pairs, second)
        # Crowded beyond what memory allows, as where thousands of centres are equal.
        halves = (self._search(half, scores, second) for half in rows.tensor_split(2))
        place, distance, next_one = (torch.cat(both) for both in zip(*halves, strict=True))
        return place, distance, next_one

    def _encode(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Returns rows as int8 [at least 32, 256 + _BIAS], and the error of their scores [n]."""
        # Each row has a step of its own, which changes nothing in the order of its scores: [n, 1]
        moved = rows - self._middle
        step = moved.abs().amax(dim=1, keepdim=True)
        step = step.clamp_(min=max(self._unit, 1e-15)).div_(self._levels)
        moved = moved.div_(step)
        rounded = moved.round()
        bias = self._unit / step
        rounded_bias = bias.round()
        # CUDA multiplies no fewer than 17 rows.
        codes = torch.zeros(max(len(rows), 32), 256 + _BIAS, dtype=torch.int8, device=rows.device)
        codes[: len(rows), :256] = rounded
        codes[: len(rows), 256:] = rounded_bias
        # |x·c - x'·c'| ≤ |x - x'| |c| + |x'| |c - c'|, where x' and c' are the rounded ones: [n]
        lost = _length(moved.sub_(rounded), bias - rounded_bias)
        length = _length(rounded, rounded_bias)
        error = (lost + _LENGTH_ERROR * length) * self._longest + length * self._rounding
        return codes, error * 1.001 + 1  # for what rounding did to the error itself

    def _screen(self, rows: Tensor, scores: Tensor, second: bool) -> tuple[Tensor, Tensor] | None:
        """Returns all that may be the nearest or `second` of a row: rows, centres; int64 [pairs].

        None where there are too many pairs to hold.
        """
        n = len(rows)
        codes, error = self._encode(rows)
        scores = scores[: len(codes)]
        best = torch.full((n, _GROUPS), _NEVER, dtype=torch.int32, device=rows.device)
        member = torch.arange(0, self._tile, _GROUPS, device=rows.device)
        found: list[tuple[Tensor, Tensor]] = []
        for at in range(0, self._count, self._tile):
            # No public product of torch takes int8 at this speed; the tests guard this one.
            torch._int_mm(codes, self._codes[at : at + self._tile].T, out=scores)
            scores[:, self._count - at :] = _NEVER
            # The best score of each group, of this tile and of all tiles so far: [n, groups]
            tops = scores[:n].view(n, -1, _GROUPS).amax(dim=1)
            best = torch.maximum(best, tops)
            least = best.amax(dim=1)
            if second:
                # Another group holds another centre: the second nearest is no worse than that: [n]
                least = best.masked_fill(best == least[:, None], _NEVER).amax(dim=1)
            # A row that is not finite wants no centre, and no row wants the padding, whose score
            # the limit must pass by more than a float32 of its size is rounded by.
            limit = (least - 2 * error).nan_to_num_(nan=2.0**30).clamp_(min=_NEVER + 128).int()
            row, group = (tops >= limit[:, None]).nonzero(as_tuple=True)
            if len(row) > self._cells * _RANKED and n > 1:
                return None
            cell = (row * self._tile + group)[:, None] + member
            keep = scores.view(-1)[cell] >= limit[row, None]
            cell = cell[keep]
            row = cell // self._tile
            found.append((row, at + cell - row * self._tile))
            if sum(len(row) for row, _ in found) > self._cells * _RANKED and n > 1:
                return None
        row, centre = (torch.cat(parts) for parts in zip(*found, strict=True))
        return row, centre

    def _rank(
        self, rows: Tensor, row: Tensor, centre: Tensor, second: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the nearest and how far the nearest two are, from the pairs that are left."""
        n = len(rows)
        row, centre = self._thin(rows, row, centre, second)
        away = self._measured(rows, row, centre, _squared_distance)
        least = _least(away, row, n)
        nobody = torch.full((n,), self._count, device=rows.device)
        first = centre.where(away == least[row], self._count)
        place = nobody.scatter_reduce(0, row, first, "amin")
        next_one = torch.full_like(least, torch.nan)
        if second:
            next_one = _least(away.masked_fill_(centre == place[row], torch.inf), row, n)
        least.masked_fill_(place == nobody, torch.nan)
        return place.masked_fill_(place == nobody, 0), least.sqrt_(), next_one.sqrt_()

    def _thin(
        self, rows: Tensor, row: Tensor, centre: Tensor, second: bool
    ) -> tuple[Tensor, Tensor]:
        """Returns the pairs that float32 cannot tell from the nearest, or from the `second`."""
        n = len(rows)
        rivals = (torch.bincount(row, minlength=n)[row] > 1).nonzero()[:, 0]
        mine = row[rivals]
        away = self._measured(rows, mine, centre[rivals], _rough_squared_distance)
        least = _least(away, mine, n)
        if second:  # or of equally near ones the next, which is no nearer than the second
            least = _least(away.masked_fill(away <= least[mine], torch.inf), mine, n)
        keep = torch.ones_like(row, dtype=torch.bool)
        keep[rivals] = away <= least[mine] * (1 + _SQUARE_ERROR) + _UNDERFLOW
        return row[keep], centre[keep]

    def _measured(
        self, rows: Tensor, row: Tensor, centre: Tensor, measure: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Returns the squared distances of pairs by `measure`, float64 [pairs]."""
        away = torch.empty(len(row), dtype=torch.float64, device=rows.device)
        size = int(self._cells * _MEASURED)
        for whole, r, c in zip(away.split(size), row.split(size), centre.split(size), strict=True):
            near, far = rows.index_select(0, r), self._centres.index_select(0, c)
            whole.copy_(measure(near, far))
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


def _length(columns: Tensor, bias: Tensor) -> Tensor:
    """Returns the lengths [n] of rows [n, 256] with `bias` [n, 1] as _BIAS more columns.

    Spoils `columns`.
    """
    return (columns.square_().sum(dim=1) + _BIAS * bias[:, 0] ** 2).sqrt_()


def _squared_distance(rows: Tensor, centres: Tensor) -> Tensor:
    """Returns squared distances, float64 [n], of `rows` to `centres`, float32 [n, 256].

    They have the same bits on every machine: all is done element by element, and added up in the
    order that stands here, which a library's sum would choose by the processor.
    """
    apart = rows.double().sub_(centres)
    apart.mul_(apart)
    while apart.shape[1] > 1:
        left, right = apart.chunk(2, dim=1)
        apart = left.add_(right)
    return apart[:, 0]


def _rough_squared_distance(rows: Tensor, centres: Tensor) -> Tensor:
    """Returns the same within _SQUARE_ERROR, in float32; spoils `rows`."""
    return rows.sub_(centres).square_().sum(dim=1)


def _least(values: Tensor, row: Tensor, n: int) -> Tensor:
    """Returns the least of the values of each row, float64 [n], inf for a row that has none."""
    least = torch.full((n,), torch.inf, dtype=values.dtype, device=values.device)
    return least.scatter_reduce_(0, row, values, "amin")


def _levels(device: str) -> int:
    """Tells how far codes may go.

    Processors without VNNI add two products in 16 bits, which overflow.
    """
    ones = torch.full((32, 256 + _BIAS), 127, dtype=torch.int8, device=device)
    exact = bool((torch._int_mm(ones, ones.T) == 127 * 127 * (256 + _BIAS)).all())
    return 127 if exact else 63


def _use_one_core() -> None:
    """Keeps what torch does in this thread to this thread."""
    with _setting_threads:
        threads = torch.get_num_threads()  # asked first: torch would set it anew when first used
        torch.set_num_threads(1)
        # That was also the default of threads to come: put it back, in a thread that ends.
        restore = threading.Thread(target=torch.set_num_threads, args=(threads,))
        restore.start()
        restore.join()
