"""Computes cluster centres: by Lloyd's k-means, with faiss, or in one pass over a stream.

Points are float32 [n, d], centres float32 [clusters, d]. Here is also what a fit asks before
it starts: how many distinct points there are, and what memory and time it will take.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import faiss
import numpy as np
import torch

from feature_jobs.codebooks.nearest import CentreSearch
from feature_jobs.store import threads

_ITERATIONS = 25  # of Lloyd's
_FIRST_ITERATIONS = 10  # before a single pass, which ends as well with them as with 25
# Of a single pass, per cluster: a first epoch of 32 ends 0.5% worse than one of 16.
_EPOCH_ROWS = 16
# How far, of a coordinate, the halves of a split cluster move apart; faiss's own.
_APART = np.float32(1 / 1024)

_BLOCK = 4096 * 256  # numbers of points hashed at once: 4 MiB
_ADDED = 1024 * 256  # numbers of points added to sums at once
_SEARCH_BYTES = 256 << 20  # the most that a search holds for a moment, where centres are crowded


def lloyd(
    points: np.ndarray,
    clusters: int,
    seed: int,
    start: np.ndarray | None = None,
    iterations: int = _ITERATIONS,
) -> np.ndarray:
    """Finds centres float32 [clusters, d] of `points` float32 [n, d] by Lloyd's k-means.

    There are at least as many points as clusters. The first centres are `start` float32
    [clusters, d], or rows chosen by `seed`. A cluster that runs empty is given half of a large
    one. The same seed gives the same centres on the same class of hardware with the same number of
    threads.
    """
    faiss.omp_set_num_threads(threads.budget())
    kmeans = faiss.Kmeans(
        points.shape[1], clusters, niter=iterations, seed=seed, gpu=faiss.get_num_gpus() > 0,
        min_points_per_centroid=1, max_points_per_centroid=len(points),
    )  # fmt: skip
    first = None if start is None else np.ascontiguousarray(start, np.float32)
    kmeans.train(np.ascontiguousarray(points, np.float32), init_centroids=first)
    return np.array(kmeans.centroids).reshape(clusters, points.shape[1])


# ---- The single pass -----------------------------------------------------------------------


def first_centres(sample: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """Finds where a single pass begins, from a `sample` of its stream: 32 rows per cluster do."""
    return lloyd(sample, clusters, seed, iterations=_FIRST_ITERATIONS)


class _Sums:
    """Holds the sum [K, d], number and squared distances [K] of each centre's points; float64."""

    def __init__(self, total: np.ndarray, count: np.ndarray):
        self.total, self.count, self.spread = total, count, np.zeros(len(count))

    def add(self, rows: np.ndarray, search: CentreSearch) -> None:
        found = search.nearest(rows)
        totals = torch.from_numpy(self.total)
        step = max(1, _ADDED // rows.shape[1])  # a block in float64 stays in the cache
        for at in range(0, len(rows), step):
            block = torch.from_numpy(rows[at : at + step]).double()
            totals.index_add_(0, torch.from_numpy(found.place[at : at + step]), block)
        np.add.at(self.count, found.place, 1)
        np.add.at(self.spread, found.place, found.distance.astype(np.float64) ** 2)

    def joined(self, other: "_Sums") -> "_Sums":
        return _Sums(self.total + other.total, self.count + other.count)

    def split(self, place: np.ndarray, into: np.ndarray) -> None:
        """Gives half of each of `place` to the one of `into`."""
        for values in (self.total, self.count):
            values[place] /= 2
            values[into] = values[place]

    def centres(self, otherwise: np.ndarray, threshold: float) -> np.ndarray:
        """Returns soft-thresholded means, float32; `otherwise` for centres without a point."""
        seen = self.count > 0
        means = self.total[seen]
        means /= self.count[seen, None]
        means -= np.clip(means, -threshold, threshold)  # = sign(x) max(|x| - threshold, 0)
        centres = otherwise.copy()
        centres[seen] = means
        return centres


class SinglePass:
    """Clusters a stream of points in a single pass, after Yi et al., ICML 2014.

    COURIER appendix §1 ref. 2, as METHOD §6 reads it. The stream is cut into epochs, each twice as
    long as the one before. Within an epoch points go to the nearest of the *frozen* centres; at its
    end each centre becomes the mean of its points, whose coordinates shrink towards 0 by the
    epoch's threshold: `soft_threshold`, then 1/√2 of it, and so on. With 0, which is right for
    dense unit vectors, this is mini-batch k-means. Memory is O(K · d) whatever the stream.

    What METHOD leaves open, decided by experiment (mean squared distances):
    - A centre that got no point stays where it is until the next epoch begins; then it takes half
      of the cluster with the greatest sum of squared distances. Left alone, 2 to 5% of centres
      never get a point, which makes distances 0.5 to 1.5% greater.
    - The points of an unfinished epoch are averaged with those of the epoch before it. Where they
      are few, the means of them alone are 22% worse.
    - The epoch before the first is `start` itself, which counts as half of a first epoch.

    Centres depend on the order of points, which ought to be random, and not on how they are cut
    into calls of `add`.
    """

    def __init__(
        self, start: np.ndarray, soft_threshold: float = 0.0, epoch_rows: int | None = None
    ):
        """Begins at `start` float32 [K, d]: `first_centres`, or the centres of an earlier fit."""
        self._epoch_rows = self._left = epoch_rows or _EPOCH_ROWS * len(start)
        self._threshold = soft_threshold
        count = np.full(len(start), self._epoch_rows / 2 / len(start))
        self._before = _Sums(start * count[:, None], count)
        self._begin_epoch(start)

    def add(self, rows: np.ndarray) -> None:
        """Takes the next points of the stream, float32 [n, d]."""
        while len(rows):
            if not self._left:
                self._next_epoch()
            self._now.add(rows[: self._left], self._search)
            rest = rows[self._left :]
            self._left -= len(rows) - len(rest)
            rows = rest

    def centres(self) -> np.ndarray:
        """Returns the centres of the stream so far, float32 [K, d]; more points may follow."""
        points = self._before.joined(self._now) if self._left else self._now
        return points.centres(self._frozen, self._threshold)

    def _begin_epoch(self, centres: np.ndarray) -> None:
        self._frozen = centres
        self._search = CentreSearch(centres)
        self._now = _Sums(np.zeros(centres.shape), np.zeros(len(centres)))

    def _next_epoch(self) -> None:
        centres = self.centres()
        lonely = np.flatnonzero(self._now.count == 0)
        widest = np.argsort(-self._now.spread, kind="stable")[: len(lonely)]
        widest = widest[self._now.spread[widest] > 0]
        lonely = lonely[: len(widest)]
        apart = np.where(np.arange(centres.shape[1]) % 2, _APART, -_APART)
        centres[lonely] = centres[widest] * (1 + apart)
        centres[widest] *= 1 - apart
        self._now.split(widest, into=lonely)
        self._before = self._now
        self._epoch_rows *= 2
        self._left = self._epoch_rows
        self._threshold /= np.sqrt(2)
        self._begin_epoch(centres)


# ---- Before a fit --------------------------------------------------------------------------


def count_distinct(points: np.ndarray) -> int:
    """Counts the rows of `points` float32 [n, d] that differ from all before; +0 equals -0.

    Rows are told apart by 64 bits of hash, 9 bytes a row in all: that two of them agree by chance
    has the probability n² / 2^65, 1 in 4,000 for 100 million.
    """
    half = -(-points.shape[1] // 2)
    odd = np.random.default_rng(0).integers(1 << 63, size=half, dtype=np.uint64) | 1
    hashes = np.empty(len(points), np.uint64)
    step = max(1, _BLOCK // points.shape[1])
    room = np.empty((step, 2 * half), np.float32)
    for at in range(0, len(points), step):
        block = room[: len(points) - at]
        np.add(points[at : at + step], np.float32(0), out=block[:, : points.shape[1]])
        block[:, points.shape[1] :] = 0  # beside the last of an odd number
        words = block.view(np.uint64)  # [block, half]
        # Low bits of round numbers are zeros, which a product keeps: fill them from the high ones.
        words *= odd[0]
        words ^= words >> np.uint64(32)
        hashes[at : at + step] = words @ odd
    hashes.sort()
    return int(np.count_nonzero(hashes[1:] != hashes[:-1])) + bool(len(hashes))


@dataclass(frozen=True)
class Estimate:
    """Holds peak memory in bytes, beyond what the process holds already, and time in seconds.

    The time is that of this machine.
    """

    bytes: int
    seconds: float


def estimate(
    algorithm: str, sample: int, rows: int, clusters: Sequence[int], dimension: int
) -> Estimate:
    """Estimates a fit of `sample` points by "lloyd", or of `rows` after a sample by "single-pass".

    `clusters` are the resolutions, all fitted to the same points, which have so many numbers. The
    sample is counted in; what reads and checks it is not.
    """
    if algorithm == "lloyd":
        return _estimate_lloyd(sample, clusters, dimension)
    return _estimate_single_pass(sample, rows, clusters, dimension)


def _estimate_lloyd(
    points: int, clusters: Sequence[int], dimension: int, iterations: int = _ITERATIONS
) -> Estimate:
    """Estimates `lloyd` of so many points for each of `clusters` in turn, the points counted in."""
    working = max(_lloyd_bytes(points, k, dimension) for k in clusters)
    seconds = (
        iterations
        * _products(points, clusters)
        * _seconds_per_product(
            lambda some, centres: lloyd(some, len(centres), 0, centres, iterations=1), dimension
        )
    )
    return Estimate(4 * dimension * points + working, seconds)


def _estimate_single_pass(
    sample: int, rows: int, clusters: Sequence[int], dimension: int
) -> Estimate:
    """Estimates `first_centres` of the sample for each of `clusters`, then all passes together.

    The passes go on side by side.
    """
    first = _estimate_lloyd(sample, clusters, dimension, _FIRST_ITERATIONS)
    seconds = _products(rows, clusters) * _seconds_per_product(
        lambda some, centres: SinglePass(centres).add(some), dimension
    )
    passes = 4 * dimension * sample + _pass_bytes(sum(clusters), dimension) + _SEARCH_BYTES
    return Estimate(max(first.bytes, passes), first.seconds + seconds)


def _lloyd_bytes(points: int, clusters: int, dimension: int) -> int:
    """Returns the bytes that `lloyd` takes beside its points.

    Faiss holds two numbers for each point, three copies of the centres, and a block of products.
    With the points, this is 0 to 20% above measured peaks.
    """
    products = 4 * min(points, 4096) * min(clusters, 1024)
    return 16 * points + 3 * 4 * dimension * clusters + products + (8 << 20)


def _pass_bytes(clusters: int, dimension: int) -> int:
    """Returns the bytes that single passes of so many clusters in all take beside their sample.

    They have float64 sums of three epochs and two temporaries, and three copies of the centres.
    """
    return (5 * 8 + 3 * 4) * dimension * clusters


def _products(points: int, clusters: Sequence[int]) -> float:
    """Returns the number of products of a point and a centre, as a measure of work.

    What a point costs beside them (its norm, its share of the mean) is worth 400: measured on a CPU
    with 64 to 8,192 centres, within 25%.
    """
    return sum(float(points) * (k + 400) for k in clusters)


def _seconds_per_product(work: Callable[[np.ndarray, np.ndarray], object], dimension: int) -> float:
    """Times `work` on 4,096 points and 1,024 centres; the least of 3 times, as the first warms up.

    Points lie about their centres as embeddings of images do, at squared distances of 0.4.
    """
    unit = np.random.default_rng(0).standard_normal((4096, dimension), np.float32)
    unit /= np.sqrt(np.float32(dimension))
    centres = unit[:1024]
    points = 0.75 * np.tile(centres, (4, 1)) + 0.6 * unit
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        work(points, centres)
        seconds.append(time.perf_counter() - start)
    return min(seconds) / _products(len(points), [len(centres)])
