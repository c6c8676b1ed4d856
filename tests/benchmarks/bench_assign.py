"""Measures how fast every item finds its nearest centre, beside faiss and the bare product.

    python tests/benchmarks/bench_assign.py [--clusters 1000,16384,65536] [--threads 2]
        [--dimensions 64,768]

`make bench` runs it. Items are unit vectors about styles, styles about categories, in noise whose
spectrum falls off; centres are those of one step of k-means. All take turns in one process; rates
are medians. "Parquet" reads item_embeddings and writes IDs and distances, the rest have all in
memory; products choose nothing, and "nothing" reads and writes alone, so they are limits. Wrong are
IDs that are not the nearest in float64. With --dimensions only this is measured: bytes of vectors a
second, beside those of 256 dimensions.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import faiss
import nights
import numpy as np
import pyarrow as pa
import torch

from feature_jobs.codebooks import kernels
from feature_jobs.codebooks.nearest import CentreSearch
from feature_jobs.store import arrays, partitions, threads

DIM = 256
WORK = 1 << 28  # rows times centres of one measurement
ITEMS = 1 << 17  # that are measured at several dimensions
BLOCK = 1 << 25  # scores held at once by those that hold all: 128 MiB
CHECKED = 2000  # rows whose IDs are compared with float64


# ---- Data ----------------------------------------------------------------------------------------


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


class Shop:
    """Draws items of a catalogue with a quarter as many styles as there are clusters."""

    def __init__(self, clusters: int, dimension: int = DIM):
        self._rng, self._dimension = np.random.default_rng(0), dimension
        basis = np.linalg.qr(self._rng.normal(size=(dimension, dimension)))[0]
        falling = np.arange(1, dimension + 1) ** -0.5
        self._shape = (falling[:, None] / np.linalg.norm(falling) * basis).astype(np.float32)
        categories = unit(self._noise(200))
        styles = max(clusters // 4, 200)
        of = self._rng.integers(0, 200, styles)
        self._styles = unit(categories[of] + 0.7 * self._noise(styles))

    def _noise(self, count: int) -> np.ndarray:
        return self._rng.standard_normal((count, self._dimension), np.float32) @ self._shape

    def items(self, count: int) -> np.ndarray:
        of = self._rng.integers(0, len(self._styles), count)
        return unit(self._styles[of] + 0.6 * self._noise(count))

    def centres(self, clusters: int) -> np.ndarray:
        items = self.items(2 * clusters)
        sums = items[:clusters].copy()
        place = CentreSearch(sums.copy()).nearest(items[clusters:]).place
        np.add.at(sums, place, items[clusters:])
        return sums / (1 + np.bincount(place, minlength=clusters)).astype(np.float32)[:, None]


# ---- What is compared ----------------------------------------------------------------------------

Find = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # rows → places, distances


def by_courier(centres: np.ndarray) -> Find:
    search = CentreSearch(centres)
    return lambda rows: search.nearest(rows)[:2]


def by_faiss(centres: np.ndarray) -> Find:
    index = faiss.IndexFlatL2(centres.shape[1])
    index.add(centres)

    def find(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        squared, place = index.search(rows, 1)
        return place[:, 0], np.sqrt(squared[:, 0])

    return find


def by_numpy(centres: np.ndarray) -> Find:
    half = (centres**2).sum(axis=1) / 2

    def find(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        size = BLOCK // len(centres)
        blocks = (rows[at : at + size] for at in range(0, len(rows), size))
        place = np.concatenate([(block @ centres.T - half).argmax(axis=1) for block in blocks])
        return place, np.linalg.norm(rows - centres[place], axis=1)

    return find


def by_nothing(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros(len(rows), np.int64), rows[:, 0]


def through_parquet(find: Find, path: Path, dimension: int = DIM) -> Callable[[], object]:
    def run() -> None:
        rows = partitions.read_parquet(str(path), ["item_id", "embedding"])
        place, distance = find(arrays.embedding_matrix(rows["embedding"], dimension))
        columns = {
            "item_id": rows["item_id"],
            "cluster_id": place.astype(np.int32) + 1,
            "centre_distance": distance,
        }
        partitions.write_parquet(str(path.with_suffix(".out")), pa.table(columns))

    return run


def product_of_numpy(rows: np.ndarray, centres: np.ndarray) -> Callable[[], object]:
    size = BLOCK // len(centres)
    scores = np.empty((size, len(centres)), np.float32)

    def run() -> None:
        for at in range(0, len(rows) - size + 1, size):
            np.matmul(rows[at : at + size], centres.T, out=scores)

    return run


def product_of_torch(
    rows: np.ndarray, centres: np.ndarray, kind: torch.dtype
) -> Callable[[], object]:
    size = BLOCK // len(centres)
    multiply = torch._int_mm if kind == torch.int8 else torch.mm
    result = torch.int32 if kind == torch.int8 else kind
    scale = 127 if kind == torch.int8 else 1
    a, b = ((torch.from_numpy(array) * scale).to(kind) for array in (rows, centres))
    scores = torch.empty(size, len(centres), dtype=result)

    def run() -> None:
        for at in range(0, len(rows) - size + 1, size):
            multiply(a[at : at + size], b.T, out=scores)

    return run


# ---- Measuring -----------------------------------------------------------------------------------


def medians(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, tuple[float, float]]:
    """Returns median seconds of each run: by the clock, and of all processors together.

    The libraries' threads come to rest between runs.
    """
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            time.sleep(0.1)
            start, used = time.perf_counter(), time.process_time()
            run()
            taken[name].append((time.perf_counter() - start, time.process_time() - used))
    return {name: tuple(np.median(times, axis=0)) for name, times in taken.items()}


def wrong(find: Find, rows: np.ndarray, centres: np.ndarray) -> int:
    """Counts the first rows whose IDs are not the nearest in float64."""
    size = max(1, BLOCK // len(centres) // 2)
    exact, count = centres.astype(np.float64), 0
    half = (exact**2).sum(axis=1) / 2
    found = find(rows)[0]
    for at in range(0, min(CHECKED, len(rows)), size):
        block = rows[at : at + size].astype(np.float64)
        count += int((found[at : at + size] != (block @ exact.T - half).argmax(axis=1)).sum())
    return count


def write_items(path: Path, rows: np.ndarray) -> Path:
    embedding = arrays.list_column(rows, pa.list_(pa.float32()))
    items = pa.table({"item_id": np.arange(len(rows)), "embedding": embedding})
    partitions.write_parquet(str(path), items)
    return path


def bench_dimensions(dimensions: list[int], clusters: int, repeats: int, folder: Path) -> None:
    """Prints bytes of vectors a second of each dimension, beside those of 256; all take turns."""
    runs, sizes = dict[str, Callable[[], object]](), dict[str, int]()
    for dimension in (DIM, *dimensions):
        shop = Shop(clusters, dimension)
        find, rows = by_courier(shop.centres(clusters)), shop.items(ITEMS)
        path = write_items(folder / f"{dimension}.parquet", rows)
        runs[f"{dimension}, in memory"] = lambda find=find, rows=rows: find(rows)
        runs[f"{dimension}, Parquet"] = through_parquet(find, path, dimension)
        sizes |= dict.fromkeys(list(runs)[-2:], rows.nbytes)
    rates = {name: sizes[name] / clock for name, (clock, _) in medians(runs, repeats).items()}
    print(f"\nK = {clusters:,}, {ITEMS:,} items\n{'':26}{'MB/s':>12}{'/ 256':>9}")
    for name, rate in rates.items():
        usual = rates[f"{DIM}, {name.partition(', ')[2]}"]
        print(f"{name:26}{rate / 1e6:12,.1f}{rate / usual:9.2f}", flush=True)


def bench(clusters: int, repeats: int, folder: Path) -> None:
    shop = Shop(clusters)
    centres, rows = shop.centres(clusters), shop.items(WORK // max(clusters, 4096))
    path = write_items(folder / f"{clusters}.parquet", rows)
    finds = {"courier": by_courier(centres), "faiss": by_faiss(centres), "numpy": by_numpy(centres)}
    runs: dict[str, Callable[[], object]] = {}
    for name, find in finds.items():
        runs[f"{name}, in memory"] = lambda find=find: find(rows)
        runs[f"{name}, Parquet"] = through_parquet(find, path)
    runs["nothing, Parquet"] = through_parquet(by_nothing, path)
    runs["product, numpy float32"] = product_of_numpy(rows, centres)
    runs["product, torch float32"] = product_of_torch(rows, centres, torch.float32)
    runs["product, torch bfloat16"] = product_of_torch(rows, centres, torch.bfloat16)
    if kernels.INT8 in kernels.present():
        runs["product, torch int8"] = product_of_torch(rows, centres, torch.int8)
    print(f"\nK = {clusters:,}, {len(rows):,} items")
    print(f"{'':26}{'items/s':>12}{'/ faiss':>9}{'by CPU time':>13}{'wrong IDs':>11}")
    found = medians(runs, repeats)
    clock, used = found["faiss, in memory"]
    for name, (seconds, cpu) in found.items():
        library, _, how = name.partition(", ")
        errors = str(wrong(finds[library], rows[:CHECKED], centres)) if how == "in memory" else ""
        ratios = f"{clock / seconds:9.2f}{used / cpu:13.2f}{errors:>11}"
        print(f"{name:26}{len(rows) / seconds:12,.0f}{ratios}", flush=True)


def bench_gpu(clusters: int = 100_000, items: int = 10_000_000) -> None:
    shop = Shop(clusters)
    search = CentreSearch(shop.items(clusters))
    part = shop.items(500_000)
    search.nearest(part[:50_000])
    start = time.perf_counter()
    for _ in range(items // len(part)):
        search.nearest(part)
    seconds = time.perf_counter() - start
    print(f"\n{torch.cuda.get_device_name()}: {items:,} items, K = {clusters:,}: {seconds:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description="Items to their nearest centres.")
    parser.add_argument("--clusters", default="1000,16384,65536")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dimensions", help="to measure beside 256, as in 64,768")
    parser.add_argument("--threads", type=int, default=min(2, threads.cores()))
    given = parser.parse_args()
    threads.limit(given.threads)
    torch.set_num_threads(given.threads)
    faiss.omp_set_num_threads(given.threads)
    CentreSearch(np.eye(2, DIM, dtype=np.float32))  # so that the kernel is chosen as jobs do
    kernel = kernels.fastest("cuda" if torch.cuda.is_available() else "cpu", DIM).name
    print(f"{nights.head()}, {given.threads} threads, screening in {kernel}")
    with tempfile.TemporaryDirectory() as folder:
        for clusters in map(int, given.clusters.split(",")):
            if given.dimensions:
                dimensions = [int(n) for n in given.dimensions.split(",")]
                bench_dimensions(dimensions, clusters, given.repeats, Path(folder))
            else:
                bench(clusters, given.repeats, Path(folder))
    if given.dimensions:
        return
    if torch.cuda.is_available():
        bench_gpu()


if __name__ == "__main__":
    main()
