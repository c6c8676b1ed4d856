"""Measures how fast the loader of the plain layout feeds a PyTorch model, beside its limit.

    python tests/benchmarks/bench_ctr_data.py [--rows 400000]

`make bench` runs it. A set is written as the join writes its parts, without a join: L = 50 scores
and mask, the 20 tiers, cluster IDs of two resolutions, label and flags. Each
file is read four times an epoch, from the system's cache. Rows per second are those on a clock, and
those of one core by CPU time, of which two make a machine on which nobody else is at work:

1. `pyarrow`: the columns decoded by its own threads, nothing else: the limit of all that read them.
2. `loader`: a DataLoader over `CtrBatches`, with 2 workers, and in the training process (0).
3. `pandas`: what one would write by hand, `pandas.read_parquet` of a file, a permutation, and
   `torch.tensor` of the columns of each batch.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from nights import head
from torch.utils.data import DataLoader

from courier_model.ctr_data import CtrBatches
from feature_jobs.impressions.scores import mean_scores, simtier
from feature_jobs.store import arrays, partitions

HISTORY, CLUSTERS, FILES, TIMES, BATCH = 50, 10_000, 4, 4, 4096
FLOATS, COUNTS, FLAGS = (pa.list_(t) for t in (pa.float32(), pa.int32(), pa.int8()))


def joined(n: int, rng: np.random.Generator) -> pa.Table:
    """Draws rows as the join writes them; half of the users have a full history."""
    length = np.minimum(HISTORY, rng.integers(0, 2 * HISTORY, n)).astype(np.int32)
    real = (np.arange(HISTORY) < length[:, None]) & (rng.random((n, HISTORY)) < 0.95)
    scores = rng.normal(0.2, 0.2, (n, HISTORY)).astype(np.float32).clip(-1, 1) * real
    mask, known = real.view(np.int8), real.sum(axis=1, dtype=np.int32)
    return pa.table(
        {
            "user_id": rng.integers(0, 10**6, n),
            "clicked": rng.random(n) < 0.05,
            "has_image": rng.random(n) < 0.95,
            "cluster_id": rng.integers(0, CLUSTERS + 1, n).astype(np.int32),
            "cluster_fine": rng.integers(0, 10 * CLUSTERS + 1, n).astype(np.int32),
            "sim_scores": arrays.list_column(scores, FLOATS),
            "sim_mask": arrays.list_column(mask, FLAGS),
            "sim_mean": mean_scores(scores, known),
            "simtier": arrays.list_column(simtier(scores, mask), COUNTS),
        }
    )


COLUMNS = [
    "clicked", "has_image", "cluster_id", "cluster_fine",
    "sim_scores", "sim_mask", "sim_mean", "simtier",
]  # fmt: skip


def by_pyarrow(paths: list[str]) -> Iterator[int]:
    for path in paths:
        yield len(pq.read_table(path, columns=COLUMNS))


def by_loader(paths: list[str], workers: int) -> Iterator[int]:
    batches = CtrBatches(paths, COLUMNS, BATCH)
    for batch in DataLoader(batches, batch_size=None, num_workers=workers):
        yield len(batch["clicked"])


def by_pandas(paths: list[str]) -> Iterator[int]:
    for path in paths:
        frame = pd.read_parquet(path, columns=COLUMNS).sample(frac=1)
        for at in range(0, len(frame), BATCH):
            rows = frame.iloc[at : at + BATCH]
            batch = {name: torch.tensor(np.array(rows[name].tolist())) for name in COLUMNS}
            yield len(batch["clicked"])


def seconds() -> float:
    """Returns the CPU time of this process and of its workers that have ended."""
    return sum(os.times()[:4])


def measure(name: str, read: Callable[[], Iterator[int]]) -> None:
    """Prints the rates of the better of two epochs."""
    found = []
    for _ in range(2):
        start, cpu = time.perf_counter(), seconds()
        rows = sum(read())
        found.append((rows / (time.perf_counter() - start), rows / (seconds() - cpu)))
    by_clock, by_core = np.max(found, axis=0)
    print(f"{name:18} {by_clock:>10,.0f} {by_core:>10,.0f}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=400_000)
    n = parser.parse_args().rows
    print(f"{head()}; {n:,} rows in {FILES} files, L = {HISTORY}, batches of {BATCH:,}")
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        paths = [
            str(Path(folder, f"{partitions.part_name(f, FILES)}.parquet")) for f in range(FILES)
        ]
        size = sum(partitions.write_parquet(path, joined(n // FILES, rng))[0] for path in paths)
        print(f"{size / n:.0f} bytes a row")
        print(f"{'rows per second':18} {'on a clock':>10} {'of a core':>10}")
        paths *= TIMES
        measure("pyarrow", lambda: by_pyarrow(paths))
        measure("loader, 2 workers", lambda: by_loader(paths, 2))
        measure("loader, 0 workers", lambda: by_loader(paths, 0))
        measure("pandas", lambda: by_pandas(paths[:FILES]))


if __name__ == "__main__":
    main()
