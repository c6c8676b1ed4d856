"""How fast SIMSCORE is, beside the bare loop that it wraps. Run by `make bench`.

    python tests/benchmarks/bench_simscore.py [--impressions 200000] [--items 100000]

A whole job, Parquet in and out, against a numpy loop user by user with everything in memory, which
is the limit.
"""

import argparse
import datetime as dt
import logging
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from courier_model.encoder import build_encoder, save_encoder
from feature_jobs import hashing, tables
from feature_jobs.codebook import save_codebook
from pipelines.config import load_settings
from pipelines.nightly import run_night
from pipelines.plan import plan_night
from tests.support.codebooks import by_hand

DAY = dt.date(2026, 1, 5)
HISTORY, DIM, PER_USER = 50, 256, 5


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


# ---- SIMSCORE ------------------------------------------------------------------------------------


def bench_simscore(folder: Path, impressions: int, items: int) -> None:
    """The scoring job with logged histories: reading, scoring, writing."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(items, DIM)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    users = impressions // PER_USER
    histories = rng.integers(0, items, (users, HISTORY))
    shown = rng.integers(0, items, (users, PER_USER))
    limit = impressions / timed(lambda: user_by_user(vectors, histories, shown))
    print(f"  numpy, user by user, in memory: {limit:12,.0f} impressions/s")
    top = Path(tempfile.mkdtemp(dir=folder))
    settings = make_tables(top, vectors, histories, shown)
    night = plan_night(load_settings(settings), DAY, ["simscore"])
    scoring = next(stage for stage in night.stages if stage.name == "simscore")
    report = run_night(night, [], lambda _: None)
    seconds = report["seconds"]["simscore"]
    ours = scoring.input_rows / seconds
    print(f"  whole job, Parquet to Parquet:  {ours:12,.0f} impressions/s ({seconds} s)")
    print(f"  job / numpy user by user: {ours / limit:.2f}")


def user_by_user(vectors: np.ndarray, histories: np.ndarray, shown: np.ndarray) -> list[np.ndarray]:
    return [vectors[s] @ vectors[h].T for h, s in zip(histories, shown, strict=True)]


def make_tables(top: Path, vectors: np.ndarray, histories: np.ndarray, shown: np.ndarray) -> str:
    """A shop whose embeddings and features are published already, by hand."""
    users = len(histories)
    write_catalogue(top, ["x"] * len(vectors))
    time_us = np.int64(dt.datetime.combine(DAY, dt.time(12), dt.UTC).timestamp() * 1e6)
    rows = users * PER_USER
    lists = tables.list_column(np.repeat(histories, PER_USER, axis=0), pa.list_(pa.int64()))
    write(
        top / "impressions" / str(DAY),
        pa.table(
            {
                "user_id": np.repeat(np.arange(users), PER_USER),
                "item_id": shown.reshape(-1),
                "event_time": pa.array(np.full(rows, time_us)).cast(pa.timestamp("us", "UTC")),
                "clicked": np.zeros(rows, bool),
                "history": lists,
            }
        ),
    )
    encoder = build_encoder("shufflenet_v2_x0_5", "random", input_size=32)
    info = save_encoder(encoder, str(top), "bench", None, None, None, "random")
    book = save_book(top, vectors[:64], info.encoder_id)
    settings = write_settings(top, str(top), top / info.encoder_id, book)
    publish_items(settings, vectors)
    return settings


def save_book(top: Path, centres: np.ndarray, encoder_id: str) -> str:
    numbers = {"main": np.arange(1, len(centres) + 1)}
    return save_codebook(str(top), by_hand({"main": centres}, numbers, encoder_id, "2026-01-01"))


def publish_items(settings: str, vectors: np.ndarray) -> None:
    """Runs the item stages with an embedding stage that takes `vectors` instead of images."""
    from pipelines import runs

    night = plan_night(load_settings(settings), DAY, ["embed", "item-features"])
    stage = night.stages[0]
    hashes = hashing.shard_of(hashing.hash_ids(pa.array(np.arange(len(vectors)))), stage.shards)
    for shard in range(stage.shards):
        rows = np.flatnonzero(hashes == shard)
        write_shard(stage, vectors[rows], rows, shard)
    for table in stage.tables:
        runs.seal(stage, table)
    run_night(night, [], lambda _: None)


def write_shard(stage: object, vectors: np.ndarray, rows: np.ndarray, shard: int) -> None:
    embeddings, rejects = stage.tables
    schema = embeddings.schema(pa.int64())
    n = len(rows)
    columns = {name: pa.nulls(n, schema.field(name).type) for name in schema.names}
    columns |= {
        "item_id": pa.array(rows),
        "embedding": tables.list_column(vectors, pa.list_(pa.float32())),
        "category": pa.array(["a"] * n),
        "in_catalogue": pa.array(np.ones(n, bool)),
        "image_uri": pa.array(["x"] * n),
        "image_size": pa.array(np.zeros(n, np.int64)),
        "image_sha256": pa.array([""] * n),
    }
    counts = {"catalogue_items": n, "former_items": 0}
    top = os.path.join(stage.staging, embeddings.name)
    tables.write_part(top, embeddings, schema, pa.table(columns), shard, stage.shards, counts)
    schema = rejects.schema(pa.int64())
    top = os.path.join(stage.staging, rejects.name)
    nothing = schema.empty_table()
    tables.write_part(top, rejects, schema, nothing, shard, stage.shards)


# ---- What it needs ----------------------------------------------------------------------------


def write(folder: Path, rows: pa.Table) -> None:
    folder.mkdir(parents=True)
    pq.write_table(rows, folder / "0.parquet", row_group_size=65_536)


def write_catalogue(top: Path, uris: list[str]) -> None:
    n = len(uris)
    rows = {"item_id": np.arange(n), "image_uri": uris, "category": ["a"] * n}
    write(top / "catalogue", pa.table(rows))


def write_settings(top: Path, images: str, encoder: Path, codebook: str | None) -> str:
    path = top / "courier.toml"
    pin = f"[[pins]]\nfrom_ds = 2026-01-02\nencoder = '{encoder}'\n"
    path.write_text(
        f'root = "features"\n[catalogue]\npath = "catalogue"\nimage_roots = ["{images}"]\n'
        f'[impressions]\npath = "impressions/{{ds}}"\n{pin}'
        + (f"codebook = '{codebook}'\n" if codebook else "")
    )
    return str(path)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--impressions", type=int, default=200_000)
    parser.add_argument("--items", type=int, default=100_000)
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    print(f"{dt.date.today()}, {platform.processor() or platform.machine()}, {os.cpu_count()} CPUs")
    print(f"SIMSCORE, L = {HISTORY}, {given.impressions:,} impressions, {given.items:,} items")
    with tempfile.TemporaryDirectory() as name:
        bench_simscore(Path(name), given.impressions, given.items)


if __name__ == "__main__":
    main()
