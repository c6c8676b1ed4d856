"""Measures how fast `courier validate` checks published tables, beside its limits.

    python tests/benchmarks/bench_validate.py [--items 500000] [--impressions 1000000]

`make bench` runs it. A day's tables are written as jobs write their parts, without a job; histories
have up to 50 items. MB are of Parquet as it lies there, seconds are those of one core (CPU time, so
that others on the machine count for less):

1. `sha256`: the digest of the files alone. `read`: pyarrow decoding them, nothing else. No check of
   all bytes and rows is faster than both one after the other: `limit`.
2. `laws`: what --fast checks of files, all laws of rows. `all`: with checksums too.
"""

import argparse
import datetime as dt
import hashlib
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from nights import head

from feature_jobs.impressions.scores import mean_scores, simtier
from feature_jobs.schemas import (
    ITEM_EMBEDDINGS,
    ITEM_FEATURES,
    ITEM_REJECTS,
    TIMESTAMP,
    USER_HISTORIES,
    USER_SIMSCORES,
    Table,
)
from feature_jobs.store import arrays, hashing, partitions, threads
from feature_jobs.store.partitions import Partition
from pipelines.reports.validate_parts import Published, check_part

DS = dt.date(2026, 1, 6)
NOON_US = int(dt.datetime.combine(DS, dt.time(12), dt.UTC).timestamp()) * 1_000_000
HISTORY, DIM, PER_USER, CLUSTERS = 50, 256, 20, 1000
ROWS_PER_SHARD = 131_072
WHO = {"encoder_id": "bench-0", "codebook_id": "bench-1"}
SETTINGS = {
    "history_len": HISTORY, "day_timezone": "UTC", "max_id": {"main": CLUSTERS},
    "embedding": False, "second_distance": False, "history_item_ids": False,
}  # fmt: skip
FLOATS = pa.list_(pa.float32())
Columns = dict[str, Any]


# ---- A day's tables ----------------------------------------------------------------------------


def texts(form: str, values: np.ndarray) -> list[str]:
    return [form.format(value) for value in values.tolist()]


def embeddings(ids: np.ndarray, rng: np.random.Generator) -> Columns:
    vectors = rng.standard_normal((len(ids), DIM), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return {
        "item_id": ids,
        "embedding": arrays.list_column(vectors, FLOATS),
        "image_uri": texts("images/{}.jpg", ids),
        "image_generation": pa.nulls(len(ids), pa.int64()),
        "image_size": rng.integers(1_000, 100_000, len(ids)),
        "image_mtime": pa.nulls(len(ids), TIMESTAMP),
        "image_sha256": [hashlib.sha256(b"%d" % one).hexdigest() for one in ids.tolist()],
        "category": texts("category-{}", ids % 20),
        "in_catalogue": np.ones(len(ids), bool),
        "left_catalogue_ds": pa.nulls(len(ids), pa.date32()),
    }


def rejects(ids: np.ndarray, _: np.random.Generator) -> Columns:
    n = len(ids)
    day = {name: [DS] * n for name in ("first_ds", "last_ds")}
    return {
        "item_id": ids, "image_uri": texts("images/{}.jpg", ids), "category": ["category-1"] * n,
        "stage": ["read"] * n, "reason": ["missing"] * n, "message": ["no such file"] * n,
        "attempts": np.ones(n, np.int32), **day, "next_ds": [DS + dt.timedelta(days=1)] * n,
    }  # fmt: skip


def features(ids: np.ndarray, rng: np.random.Generator) -> Columns:
    n = len(ids)
    return {
        "item_id": ids, "category": texts("category-{}", ids % 20),
        **{name: np.ones(n, bool) for name in ("has_image", "in_scope", "in_catalogue")},
        "cluster_id": rng.integers(1, CLUSTERS + 1, n).astype(np.int32),
        "centre_distance": rng.random(n, np.float32), **{k: [v] * n for k, v in WHO.items()},
    }  # fmt: skip


def histories(ids: np.ndarray, rng: np.random.Generator) -> Columns:
    sizes = rng.integers(1, HISTORY + 1, len(ids))
    of_user = np.arange(len(ids)).repeat(sizes)
    place = np.arange(len(of_user)) - (np.cumsum(sizes) - sizes).repeat(sizes)
    times = pa.array(NOON_US - place * 3_600_000_000).cast(TIMESTAMP)
    items = pa.array(rng.integers(0, 500_000, len(of_user)))
    return {
        "user_id": ids,
        "item_ids": arrays.list_array(sizes, items),
        "click_times": arrays.list_array(sizes, times),
    }


def scores(ids: np.ndarray, rng: np.random.Generator) -> Columns:
    """Draws impressions of the users `ids`, so many each."""
    users = ids.repeat(PER_USER)
    n = len(users)
    length = np.minimum(HISTORY, rng.integers(0, 2 * HISTORY, n)).astype(np.int32)
    real = (np.arange(HISTORY) < length[:, None]) & (rng.random((n, HISTORY)) < 0.95)
    made = rng.normal(0.2, 0.2, (n, HISTORY)).astype(np.float32).clip(-1, 1) * real
    mask, known = real.view(np.int8), real.sum(axis=1, dtype=np.int32)
    largest = np.where(real, made, -np.inf).max(axis=1)
    names = [hashlib.md5(b"%d" % one).hexdigest() for one in rng.integers(0, 2**62, n).tolist()]
    return {
        "impression_id": names, "user_id": users, "item_id": rng.integers(0, 500_000, n),
        "event_time": pa.array(NOON_US + np.arange(n)).cast(TIMESTAMP), "clicked": users % 9 == 0,
        "sim_scores": arrays.list_column(made, FLOATS),
        "sim_mask": arrays.list_column(mask, pa.list_(pa.int8())), "history_len": length,
        "sim_known": known, "sim_max": np.where(known > 0, largest, 0).astype(np.float32),
        "sim_mean": mean_scores(made, known),
        "simtier": arrays.list_column(simtier(made, mask), pa.list_(pa.int32())),
        "same_cluster": np.minimum(length, 3).astype(np.int32),
        **{k: [v] * n for k, v in WHO.items()},
    }  # fmt: skip


def publish(top: Path, table: Table, ids: np.ndarray, draw: Callable, rows: int) -> Published:
    """Writes a table of `rows` rows of some items or users; its manifest is what checks ask."""
    folder, shards = str(top / table.name), hashing.num_shards(rows, ROWS_PER_SHARD)
    of = hashing.shard_of(hashing.hash_ids(pa.array(ids)), shards)
    without = (
        ["second_distance", "embedding"]
        if table is ITEM_FEATURES
        else ["history_item_ids", "feature_ds"]
    )
    schema = table.schema(pa.int64(), pa.int64(), pa.string(), without=without)
    for shard in range(shards):
        columns = pa.table(draw(ids[of == shard], np.random.default_rng(shard)))
        limits = {"sim_scores": HISTORY}
        partitions.write_part(folder, table, schema, columns, shard, shards, limits=limits)
    files = [
        {k: part[k] for k in ("name", "rows", "bytes", "sha256")}
        for part in partitions.receipts(folder)
    ]
    manifest = {"table": table.name, "ds": str(DS), "files": files, "settings": SETTINGS}
    return Published(table, Partition(folder, {**manifest, "identities": WHO}))


# ---- Measuring ---------------------------------------------------------------------------------


def sha256(path: str) -> None:
    hashlib.sha256(Path(path).read_bytes()).hexdigest()


def read(path: str) -> None:
    with pq.ParquetFile(pa.BufferReader(Path(path).read_bytes())) as file:
        for group in range(file.num_row_groups):
            file.read_row_group(group, use_threads=False)


def check(found: Published, fast: bool) -> None:
    for number in range(len(found.partition.paths)):
        part = check_part(found, number, fast)
        assert part.is_whole, part.findings
        assert not part.findings, part.findings


def cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def measure(found: Published) -> dict[str, float]:
    """Returns CPU seconds, the best of three of each, taken in turns as a shared machine drifts."""
    paths = found.partition.paths
    works = {
        "sha256": lambda: [sha256(path) for path in paths],
        "read": lambda: [read(path) for path in paths],
        "laws": lambda: check(found, True),
        "all": lambda: check(found, False),
    }
    turns = [{name: cpu_seconds(work) for name, work in works.items()} for _ in range(3)]
    best = {name: min(turn[name] for turn in turns) for name in works}
    return {**best, "limit": best["sha256"] + best["read"]}


COLUMNS = ("sha256", "read", "limit", "laws", "all")


def row(name: str, rows: int, size: float, seconds: dict[str, float]) -> str:
    rates = "".join(f"{size / seconds[column] / 1e6:9,.0f}" for column in COLUMNS)
    return f"{name:16}{rows:12,}{size / 1e6:10,.1f}{rates}{seconds['limit'] / seconds['all']:9.0%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=500_000)
    parser.add_argument("--impressions", type=int, default=1_000_000)
    asked = parser.parse_args()
    threads.limit(1)
    print(head())
    print(
        f"{'':16}{'rows':>12}{'MB':>10}" + "".join(f"{name:>9}" for name in COLUMNS) + "  of limit"
    )
    items, users = np.arange(asked.items), np.arange(asked.impressions // PER_USER)
    day = [
        (ITEM_EMBEDDINGS, items, embeddings, len(items)),
        (ITEM_REJECTS, items[: len(items) // 50], rejects, len(items) // 50),
        (ITEM_FEATURES, items, features, len(items)),
        (USER_HISTORIES, users, histories, len(users)),
        (USER_SIMSCORES, users, scores, asked.impressions),
    ]
    total, size = dict.fromkeys(COLUMNS, 0.0), 0
    for table, ids, draw, rows in day:
        with tempfile.TemporaryDirectory() as top:
            found = publish(Path(top), table, ids, draw, rows)
            seconds = measure(found)
            mine = sum(map(os.path.getsize, found.partition.paths))
        total, size = {name: total[name] + seconds[name] for name in COLUMNS}, size + mine
        print(row(table.name, found.partition.rows, mine, seconds), flush=True)
    print(row("all tables", 0, size, total))


if __name__ == "__main__":
    main()
