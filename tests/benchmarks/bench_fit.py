"""Measures what fitting centres costs, and how good they are. `make bench` runs it.

    python tests/benchmarks/bench_fit.py [--points 65536] [--rows 100000 2000000] [--clusters 512]
        [--dimensions 64 768]

Beside a bare `faiss.Kmeans` of the same sample: all that a fit does with it. Beside Lloyd
of 256 rows per cluster: a single pass over a Parquet dataset on disk, in a process of its own.
Points are a mixture on the unit sphere, of kinds that are often or seldom and wide or narrow. With
--dimensions only this is measured: bytes of points a second, beside those of 256 dimensions.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import faiss
import nights
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from feature_jobs.codebooks.fit_codebook import Fit, Sample, make_codebook
from feature_jobs.codebooks.kmeans import SinglePass, estimate, first_centres, lloyd
from feature_jobs.codebooks.nearest import CentreSearch
from feature_jobs.store import arrays

DIM, KINDS, NOISE = 256, 2000, 0.6
SHARD, BATCH = 131_072, 16_384  # rows of a file; read at once
FIRST, SAMPLE, SCORED = 32, 256, 200_000  # rows: per cluster, per cluster, to measure distances of


class Mixture:
    """Draws rows float32 [n, dimension] of unit length."""

    def __init__(self, seed: int, dimension: int = DIM):
        self._rng, self._dimension = np.random.default_rng(seed), dimension
        # The first directions matter most.
        slope = np.arange(1, dimension + 1, dtype=np.float32) ** -0.5
        self._middles = unit(self._normal(KINDS) * slope)
        widths = self._rng.uniform(0.2, 1.8, (KINDS, dimension)).astype(np.float32) * slope
        sizes = self._rng.uniform(0.3, 1.7, (KINDS, 1)).astype(np.float32)
        self._widths = NOISE * sizes * unit(widths)
        self._turn = np.linalg.qr(self._normal(dimension))[0]
        self._chance = 1 / np.arange(1, KINDS + 1) / (1 / np.arange(1, KINDS + 1)).sum()

    def _normal(self, count: int) -> np.ndarray:
        return self._rng.standard_normal((count, self._dimension), np.float32)

    def rows(self, count: int) -> np.ndarray:
        kind = self._rng.choice(KINDS, count, p=self._chance)
        rows = self._middles[kind] + self._widths[kind] * self._normal(count)
        return unit(rows @ self._turn)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def objective(points: np.ndarray, centres: np.ndarray) -> float:
    """Returns the mean squared distance of points to their nearest centres."""
    return float((CentreSearch(centres).nearest(points).distance.astype(np.float64) ** 2).mean())


# ---- (a) Beside faiss --------------------------------------------------------------------------


def bare_fit(points: np.ndarray, clusters: int) -> np.ndarray:
    kmeans = faiss.Kmeans(
        points.shape[1], clusters, niter=25, seed=1, gpu=faiss.get_num_gpus() > 0,
        min_points_per_centroid=1, max_points_per_centroid=len(points),
    )  # fmt: skip
    kmeans.train(points)
    return kmeans.centroids


def whole_fit(points: np.ndarray, clusters: int) -> np.ndarray:
    """Fits centres as `courier fit-codebook` does once the sample is read."""
    fit = Fit({"main": clusters}, seed=1)
    book = make_codebook(Sample(points, points[:0], ""), fit, "bench", "2026-01-01")
    return np.asarray(book.centres["main"])


def bench_lloyd(points: int) -> None:
    print("A fit beside a bare faiss.Kmeans of the same points (goals: 1.1 and 0.99 to 1.01)")
    print(
        f"{'clusters':>10}{'points':>10}{'bare s':>9}{'ours s':>9}{'time':>7}{'objective':>11}",
        end="",
    )
    print(f"{'estimate s':>12}")
    for clusters in (256, 1024, 4096):
        rows = Mixture(1).rows(min(points, SAMPLE * clusters))
        expected = estimate("lloyd", len(rows), 0, [clusters], DIM).seconds
        seconds: dict[str, list[float]] = {"bare": [], "ours": []}
        centres = {}
        for _ in range(2 if clusters < 4096 else 1):
            for name, fit in (("bare", bare_fit), ("ours", whole_fit)):
                start = time.perf_counter()
                centres[name] = fit(rows, clusters)
                seconds[name].append(time.perf_counter() - start)
        bare, ours = min(seconds["bare"]), min(seconds["ours"])
        quality = objective(rows, centres["ours"]) / objective(rows, centres["bare"])
        numbers = f"{clusters:10,}{len(rows):10,}{bare:9.1f}{ours:9.1f}{ours / bare:7.2f}"
        print(f"{numbers}{quality:11.3f}{expected:12.1f}", flush=True)


# ---- (b) A single pass over files --------------------------------------------------------------


def write_dataset(folder: Path, rows: int) -> None:
    mixture = Mixture(2)
    for at in range(0, rows, SHARD):
        part = mixture.rows(min(SHARD, rows - at))
        column = arrays.list_column(part, pa.list_(pa.float32()))
        pq.write_table(pa.table({"embedding": column}), folder / f"{at:010}.parquet")


def stream(folder: Path) -> Iterator[np.ndarray]:
    for path in sorted(folder.glob("*.parquet")):
        for batch in pq.ParquetFile(path).iter_batches(BATCH, columns=["embedding"]):
            yield arrays.embedding_matrix(pa.chunked_array([batch["embedding"]]), DIM)


def every(folder: Path, rows: int, wanted: int) -> np.ndarray:
    """Reads about `wanted` of the rows, evenly spread."""
    step = max(1, rows // wanted)
    return np.concatenate([part[::step].copy() for part in stream(folder)])  # no views: all rows


def pass_over(folder: Path, rows: int, clusters: int) -> None:
    """Makes a single pass in a process of its own; prints its speed and its peak of memory."""
    start = first_centres(every(folder, rows, FIRST * clusters), clusters, seed=1)
    single_pass = SinglePass(start)
    begun = time.perf_counter()
    for part in stream(folder):
        single_pass.add(part)
    seconds = time.perf_counter() - begun
    np.save(folder / "centres.npy", single_pass.centres())
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+)", status)
    print(json.dumps({"rows_s": rows / seconds, "peak_mb": int(found[1]) / 1024 if found else 0}))


def bench_single_pass(rows_list: list[int], clusters: int) -> None:
    print(f"\nA single pass over Parquet, {clusters:,} clusters (goals: one memory, 1.03)")
    print(f"{'rows':>10}{'peak MB':>10}{'rows/s':>10}{'objective beside Lloyd':>24}", flush=True)
    for rows in rows_list:
        folder = Path(tempfile.mkdtemp(prefix="bench_fit"))
        try:
            write_dataset(folder, rows)
            command = [sys.executable, __file__, "--pass-over", str(folder), "--rows", str(rows)]
            command += ["--clusters", str(clusters)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found = json.loads(done.stdout)
            points = every(folder, rows, SCORED)
            reference = lloyd(every(folder, rows, SAMPLE * clusters), clusters, seed=2)
            ours = objective(points, np.load(folder / "centres.npy"))
        finally:
            shutil.rmtree(folder)
        ratio = ours / objective(points, reference)
        print(
            f"{rows:10,}{found['peak_mb']:10,.0f}{found['rows_s']:10,.0f}{ratio:24.3f}", flush=True
        )


# ---- (c) Other dimensions ------------------------------------------------------------------------


def bench_dimensions(dimensions: list[int], points: int, clusters: int) -> None:
    """Prints bytes of points a second, beside those of 256 dimensions: of a fit, and of a pass."""
    print(f"{points:,} points, {clusters:,} clusters\n{'':26}{'MB/s':>10}{'/ 256':>8}")
    usual: dict[str, float] = {}
    for dimension in (DIM, *dimensions):
        rows = Mixture(1, dimension).rows(points)
        fits = {
            "Lloyd": lambda rows=rows: whole_fit(rows, clusters),
            "a single pass": lambda rows=rows: SinglePass(rows[:clusters].copy()).add(rows),
        }
        for name, fit in fits.items():
            seconds = min(nights.timed(fit) for _ in range(2))
            rate = rows.nbytes / seconds
            ratio = rate / usual.setdefault(name, rate)
            print(f"{f'{dimension}, {name}':26}{rate / 1e6:10,.1f}{ratio:8.2f}", flush=True)


# ---- (d) On a GPU ------------------------------------------------------------------------------


def bench_gpu(rows: int = 10_000_000, clusters: int = 100_000) -> None:
    mixture = Mixture(3)
    points = np.concatenate([mixture.rows(100_000) for _ in range(rows // 100_000)])
    begun = time.perf_counter()
    if faiss.get_num_gpus():
        lloyd(points, clusters, seed=1)
        print(
            f"\nLloyd, {rows:,} points, {clusters:,} clusters: {time.perf_counter() - begun:.0f} s"
        )
        begun = time.perf_counter()
    single_pass = SinglePass(points[:clusters])
    single_pass.add(points)
    seconds = time.perf_counter() - begun
    print(f"Single pass, {rows:,} points, {clusters:,} clusters: {seconds:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description="What fitting centres costs.")
    parser.add_argument("--points", type=int, default=65_536, help="at most, for Lloyd")
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 2_000_000])
    parser.add_argument("--clusters", type=int, default=512, help="of the single pass")
    parser.add_argument("--dimensions", type=int, nargs="+", help="to measure beside 256")
    parser.add_argument("--pass-over", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.pass_over:
        pass_over(options.pass_over, options.rows[0], options.clusters)
        return
    print(nights.head())
    if options.dimensions:
        bench_dimensions(options.dimensions, options.points, options.clusters)
        return
    bench_lloyd(options.points)
    bench_single_pass(options.rows, options.clusters)
    if torch.cuda.is_available():
        bench_gpu()
    else:
        print("\nNo GPU here: 10,000,000 points and 100,000 clusters are left out")


if __name__ == "__main__":
    main()
