"""Measures how fast SIMSCORE is, beside its limits and what a user would otherwise run.

    python tests/benchmarks/bench_simscore.py [--items 1000000] [--impressions 1000000]
        [--mode multi_threading] [--shuffle 50000] [--memory 1000000,10000000]
        [--dimensions 64,768]

`make bench` runs it. Histories of 50 items are logged, each with five impressions of its user;
vectors have 256 floats. With --dimensions only the job is measured, at these too: bytes of vectors
that are scored in a second, beside those of 256 dimensions.

1. The job on two cores, Parquet to Parquet, with its start-up left out: the same night of five
   users, in which a machine's copy of the embeddings is made.
2. Limits of one core: numpy with all in memory, row by row and user by user; Parquet alone.
3. On the same files, start-up left out likewise: a Beam pipeline of one row per element, and
   DuckDB's fastest query on two threads.
4. --shuffle: so many impressions with the embeddings broadcast and shuffled, score by score.
5. --memory: the job's peak at so many impressions.
6. What it costs to find out whether the shop's own impression IDs are unique, as a share of 1.
7. What it costs to count all that gates judge a night's scores by, as a share of 1 (goal 5 %).
"""

import argparse
import datetime as dt
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import apache_beam as beam
import duckdb
import nights
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from apache_beam.io.parquetio import ReadFromParquet, WriteToParquet
from apache_beam.options.pipeline_options import PipelineOptions
from nights import timed

from courier_model.encoder import build_encoder, save_encoder
from feature_jobs import inputs
from feature_jobs.codebooks.codebook import (
    Codebook,
    CodebookInfo,
    Resolution,
    codebook_id,
    health_of,
    save_codebook,
)
from feature_jobs.impressions import simscore
from feature_jobs.impressions.day_checks import CheckIds, write_hashes
from feature_jobs.impressions.scoring import ScoreForm
from feature_jobs.items.item_vectors import ItemTables, ask_all
from feature_jobs.schemas import (
    ITEM_EMBEDDINGS,
    SIM_TIERS,
    TIMESTAMP,
    USER_SIMSCORES,
)
from feature_jobs.schemas import (
    ITEM_FEATURES as FEATURES_TABLE,
)
from feature_jobs.store import arrays, hashing, partitions
from pipelines.config import load_settings
from pipelines.nightly import make_nights, plan_nights
from pipelines.running import making, runners, states
from pipelines.running.stage import Stage
from pipelines.running.states import Look
from pipelines.stages import EMBED, ITEM_FEATURES

ROWS_PER_ID_SHARD = 16 * 131_072  # as the job has it by default
DAY_BEFORE, DAY = dt.date(2026, 1, 5), dt.date(2026, 1, 6)
NOON_US = int(dt.datetime.combine(DAY, dt.time(12), dt.UTC).timestamp()) * 1_000_000
HISTORY, DIM, PER_USER, CENTRES = 50, 256, 5, 64
FEW = 5 * PER_USER  # impressions of the night that is all start-up
SUBSET = 100_000  # impressions for the yardsticks that are slow
COUNTED = 20_000  # impressions of which the counting is measured
REPEATS = 3  # of each yardstick, since shared machines drift
BEAM_DISTINCT, BEAM_TIMES = 2_000, 20  # impressions of the row-by-row pipeline, so often repeated
USERS_AT_ONCE = 13_107  # written: a row group of some 65,536 impressions
ALLOWED_BYTES = 1.5e9  # of memory beside the embeddings
LOG_SCHEMA = pa.schema(
    [
        ("user_id", pa.int64()),
        ("item_id", pa.int64()),
        ("event_time", TIMESTAMP),
        ("clicked", pa.bool_()),
        ("history", pa.list_(pa.int64())),
    ]
)
ONE_PROCESS = PipelineOptions([f"--runner={runners.LOCAL}"])
ScoreRow = Callable[[dict[str, Any], dict[int, np.ndarray]], dict[str, Any]]


def rate_of(run: Callable[[int], object], few: int, many: int) -> float:
    """Measures impressions/s of `run`, which takes their number, start-up left out; a median."""

    def once() -> float:
        start_up, whole = timed(lambda: run(few)), timed(lambda: run(many))
        return (many - few) / (whole - start_up)

    return float(np.median([once() for _ in range(REPEATS)]))


# ---- A shop whose items are published already --------------------------------------------------


@dataclass(frozen=True)
class Shop:
    """Tells where all of the shop lies, below `top`."""

    top: Path

    @property
    def settings(self) -> Path:
        return self.top / "courier.toml"

    @property
    def log(self) -> Path:
        return self.top / "impressions" / str(DAY) / "0.parquet"

    @property
    def scores(self) -> Path:
        return self._published(USER_SIMSCORES.name)

    @property
    def embeddings(self) -> Path:
        return self._published(ITEM_EMBEDDINGS.name)

    @property
    def features(self) -> Path:
        return self._published(FEATURES_TABLE.name)

    def _published(self, table: str) -> Path:
        return self.top / "features" / "production" / table / f"ds={DAY}"


def unit_vectors(items: int, dimension: int = DIM) -> np.ndarray:
    """Draws the embedding of every item, by its ID; float32 [items, dimension]."""
    vectors = np.random.default_rng(0).standard_normal((items, dimension), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def make_shop(top: Path, items: int, dimension: int = DIM) -> Shop:
    """Makes settings, a catalogue, and item tables of two days: most nights know the one before."""
    shop, vectors = Shop(top), unit_vectors(items, dimension)
    (top / "catalogue").mkdir()
    rows = {"item_id": np.arange(items), "image_uri": ["x"] * items, "category": ["a"] * items}
    pq.write_table(pa.table(rows), top / "catalogue" / "0.parquet", row_group_size=65_536)
    encoder = build_encoder("shufflenet_v2_x0_5", "random", input_size=32, dimension=dimension)
    info = save_encoder(encoder, str(top), "bench", None, None, None, "random")
    book = save_codebook(str(top), book_by_hand(vectors[:CENTRES], info.encoder_id))
    write_settings(shop, info.encoder_id, os.path.basename(book))
    for day in (DAY_BEFORE, DAY):
        publish_items(shop, day, vectors)
    return shop


def write_settings(shop: Shop, encoder: str, codebook: str) -> None:
    """Writes the settings of all nights."""
    shop.settings.write_text(
        f'root = "features"\n[catalogue]\npath = "catalogue"\nimage_roots = ["."]\n'
        f'[impressions]\npath = "impressions/{{ds}}"\n'
        f'[[pins]]\nfrom_ds = {DAY_BEFORE}\nencoder = "{encoder}"\ncodebook = "{codebook}"\n'
    )


def book_by_hand(centres: np.ndarray, encoder_id: str) -> Codebook:
    """Makes a codebook without a fit, whose centres each stand for one item."""
    made_before, count = "2026-01-01", len(centres)
    arrays = {"main": centres}, {"main": np.arange(1, count + 1, dtype=np.int32)}
    sizes = np.ones(count, np.int64)
    main = Resolution(
        "main", count, count, 0.0, None, health_of(sizes), tuple(sizes.tolist()), retired=()
    )
    info = CodebookInfo(
        codebook_id("bench", *arrays, (encoder_id, None, made_before)), encoder_id, (), "fresh",
        "by hand", 0, 0.0, count, 0, "", made_before, made_before, {}, (main,),
        centres.shape[1],
    )  # fmt: skip
    return Codebook(info, *arrays)


def publish_items(shop: Shop, day: dt.date, vectors: np.ndarray) -> None:
    """Runs the item stages with an embedding stage that took `vectors` instead of images."""
    (night,) = plan_nights(load_settings(str(shop.settings)), [day], [EMBED, ITEM_FEATURES])
    stage, parts = night.stages[0], shop.top / "parts"
    if not parts.exists():  # of the first day: those of the others are links to them
        of = hashing.shard_of(hashing.hash_ids(pa.array(np.arange(len(vectors)))), stage.shards)
        for shard in range(stage.shards):
            write_shard(parts, vectors, np.flatnonzero(of == shard), shard, stage)
    states.begin(stage, (), Look())  # begins the staging folder, which is sealed below
    shutil.copytree(parts, states.made_in(stage.staging), copy_function=os.link)
    for table in stage.tables:
        making.seal(night.planned[0], table, Look())
    make_nights([night], [], lambda _: None)


def write_shard(
    parts: Path, vectors: np.ndarray, items: np.ndarray, shard: int, stage: Stage
) -> None:
    """Writes the parts of one shard, as EMBED leaves them: its `items` embedded, none rejected."""
    embeddings, rejects = stage.tables
    schema, n = embeddings.schema(pa.int64(), dimension=vectors.shape[1]), len(items)
    columns = {name: pa.nulls(n, schema.field(name).type) for name in schema.names}
    columns |= {
        "item_id": pa.array(items),
        "embedding": arrays.list_column(vectors[items], pa.list_(pa.float32())),
        "category": pa.array(["a"] * n),
        "in_catalogue": pa.array(np.ones(n, bool)),
        "image_uri": pa.array(["x"] * n),
        "image_size": pa.array(np.zeros(n, np.int64)),
        "image_sha256": pa.array([""] * n),
    }
    counts, shards = {"catalogue_items": n, "former_items": 0}, stage.shards
    folder = str(parts / embeddings.name)
    partitions.write_part(folder, embeddings, schema, pa.table(columns), shard, shards, counts)
    schema, folder = rejects.schema(pa.int64()), str(parts / rejects.name)
    partitions.write_part(folder, rejects, schema, schema.empty_table(), shard, shards)


def write_log(shop: Shop, items: int, impressions: int) -> None:
    """Writes so many impressions of DAY in place of those before, in memory that does not grow."""
    rng, users = np.random.default_rng(1), impressions // PER_USER
    shop.log.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(shop.log, LOG_SCHEMA) as file:
        for at in range(0, users, USERS_AT_ONCE):
            some = np.arange(at, min(at + USERS_AT_ONCE, users))
            rows = len(some) * PER_USER
            histories = rng.integers(0, items, (len(some), HISTORY)).repeat(PER_USER, axis=0)
            columns = [
                some.repeat(PER_USER),
                rng.integers(0, items, rows),
                pa.array(NOON_US + np.arange(rows)).cast(TIMESTAMP),
                np.zeros(rows, bool),
                arrays.list_column(histories, pa.list_(pa.int64())),
            ]
            file.write_table(pa.table(columns, schema=LOG_SCHEMA))


# ---- 1. The job --------------------------------------------------------------------------------


def score(shop: Shop, mode: str) -> dict[str, Any]:
    """Runs the night's last stage over the log that is there, whatever was published before."""
    shutil.rmtree(shop.scores, ignore_errors=True)
    return nights.run_stage(shop.settings, DAY, "simscore", nights.local(mode))


def bench_job(shop: Shop, items: int, impressions: int, mode: str) -> float:
    """Measures impressions/s of the job, start-up left out; log and scores of all of them stay."""
    found = []
    for rows in (FEW, impressions):
        write_log(shop, items, rows)
        found.append(score(shop, mode))
    few, many = found
    rate = (many["rows"] - few["rows"]) / (many["seconds"] - few["seconds"])
    print(f"  job, {nights.WORKERS} workers, {mode}: {rate:,.0f} impressions/s, start-up aside")
    for night in found:
        print(
            f"    {night['rows']:11,} impressions in {night['seconds']:6.1f} s, "
            f"peak memory {night['peak_bytes'] / 1e9:.2f} GB",
            flush=True,
        )
    return rate


# ---- 2. Limits of one core ---------------------------------------------------------------------


def in_memory(shop: Shop, items: int) -> dict[str, float]:
    """Measures numpy alone, with the vectors and the impressions at hand."""
    vectors = unit_vectors(items)
    rows = first_rows(shop, SUBSET)
    shown = rows["item_id"].to_numpy().reshape(-1, PER_USER)
    histories = rows["history"].combine_chunks().flatten().to_numpy()
    histories = histories.reshape(-1, PER_USER, HISTORY)[:, 0]
    return {
        f"numpy, {name}": rows_per_second(lambda way=way: way(vectors, histories, shown), len(rows))
        for name, way in (("row by row", row_by_row), ("user by user", user_by_user))
    }


def rows_per_second(work: Callable[[], object], rows: int) -> float:
    """Returns the rows/s of `work`, which handles so many; a median."""
    return rows / float(np.median([timed(work) for _ in range(REPEATS)]))


def first_rows(shop: Shop, count: int) -> pa.Table:
    """Reads so many impressions of the log, or all of a shorter one."""
    with pq.ParquetFile(shop.log) as file:
        wanted = min(file.num_row_groups, -(-count // (USERS_AT_ONCE * PER_USER)))
        return file.read_row_groups(range(wanted), use_threads=False)[:count]


def row_by_row(vectors: np.ndarray, histories: np.ndarray, shown: np.ndarray) -> list[np.ndarray]:
    """Scores each impression by a product of its own."""
    return [vectors[h] @ vectors[i] for h, s in zip(histories, shown, strict=True) for i in s]


def user_by_user(vectors: np.ndarray, histories: np.ndarray, shown: np.ndarray) -> list[np.ndarray]:
    """Scores the impressions of each user by one product."""
    return [vectors[s] @ vectors[h].T for h, s in zip(histories, shown, strict=True)]


def parquet_alone(shop: Shop, items: int) -> dict[str, float]:
    """Measures pyarrow reading the log and writing the job's own rows, on one thread."""
    pa.set_cpu_count(1)
    scored = partitions.read_parquet(partitions.open_published(str(shop.scores)).paths[0])[:SUBSET]
    flat = [field.name for field in scored.schema if not pa.types.is_nested(field.type)]
    path, rows = shop.top / "written.parquet", len(first_rows(shop, SUBSET))

    def write() -> None:
        pq.write_table(scored, path, compression="zstd", use_dictionary=flat)

    return {
        "Parquet, log read": rows_per_second(lambda: first_rows(shop, SUBSET), rows),
        "Parquet, scores written": rows_per_second(write, len(scored)),
    }


def one_after_the_other(limits: dict[str, float]) -> float:
    """Returns what one core could do at best: read, score user by user, write; impressions/s."""
    steps = ("Parquet, log read", "numpy, user by user", "Parquet, scores written")
    return 1 / sum(1 / limits[step] for step in steps)


# ---- 3. What a user would otherwise run ----------------------------------------------------------


def beam_by_row(shop: Shop, items: int) -> dict[str, float]:
    """Measures a pipeline of one impression per element, with the embeddings as a dict.

    It has few impressions and the items that they need: with a million of them the side input alone
    would not be there in minutes. They are repeated, since so few are scored in the time of the
    start-up.
    """
    rows = first_rows(shop, BEAM_DISTINCT)
    needed, path = shop.top / "needed.parquet", shop.top / "some.parquet"
    clicked = rows["history"].combine_chunks().flatten()
    ids = pa.concat_arrays([rows["item_id"].combine_chunks(), clicked])
    embeddings = pq.ParquetDataset(shop.embeddings, filters=pc.field("item_id").isin(ids))
    pq.write_table(embeddings.read(["item_id", "embedding"]), needed)

    def run(count: int, way: str) -> None:
        pq.write_table(pa.concat_tables([rows] * BEAM_TIMES)[:count], path)
        with beam.Pipeline(options=ONE_PROCESS) as root:
            score_by_row(root, needed, path, *BY_ROW[way])

    many = len(rows) * BEAM_TIMES
    return {f"Beam, {way}": rate_of(partial(run, way=way), FEW, many) for way in BY_ROW}


def score_by_row(
    root: beam.Pipeline, items: Path, impressions: Path, function: ScoreRow, schema: pa.Schema
) -> None:
    """Wires the pipeline as a user would write it.

    A dict that the function captures, or one that is a singleton, scores no faster, and starts much
    later.
    """
    vectors = root | "ReadItems" >> ReadFromParquet(str(items)) | beam.Map(to_pair)
    _ = (
        root
        | "ReadImpressions" >> ReadFromParquet(str(impressions))
        | beam.Map(function, beam.pvalue.AsDict(vectors))
        | WriteToParquet(str(impressions.with_suffix(".out")), schema)
    )


def to_pair(row: dict[str, Any]) -> tuple[int, np.ndarray]:
    """Returns an item's ID and vector."""
    return row["item_id"], np.array(row["embedding"], np.float32)


def score_row(row: dict[str, Any], vectors: dict[int, np.ndarray]) -> dict[str, Any]:
    """Returns an impression with its scores in the place of its history."""
    clicked = np.stack([vectors[item] for item in row.pop("history")])
    return {**row, "sim_scores": (clicked @ vectors[row["item_id"]]).tolist()}


def score_row_fully(row: dict[str, Any], vectors: dict[int, np.ndarray]) -> dict[str, Any]:
    """Returns an impression with its scores and all other columns of the job but same_cluster."""
    key = f"{row['user_id']} {row['item_id']} {row['event_time']}"
    row = score_row(row, vectors)
    scores = np.array(row["sim_scores"])
    tiers = np.clip(np.floor((scores + 1) * 10), 0, SIM_TIERS - 1).astype(int)
    return {
        **row,
        "impression_id": hashlib.md5(key.encode()).hexdigest(),
        "sim_mask": [1] * len(scores),
        "history_len": len(scores),
        "sim_known": len(scores),
        "sim_max": scores.max(),
        "sim_mean": scores.mean(),
        "simtier": np.bincount(tiers, minlength=SIM_TIERS).tolist(),
        "encoder_id": "bench",
        "codebook_id": "bench",
    }


SCORE_SCHEMA = pa.schema([*list(LOG_SCHEMA)[:-1], ("sim_scores", pa.list_(pa.float32()))])
FULL_SCHEMA = USER_SIMSCORES.schema(
    pa.int64(), pa.int64(), pa.string(), without=["history_item_ids", "same_cluster", "feature_ds"]
)
BY_ROW = {
    "rows, scores alone": (score_row, SCORE_SCHEMA),
    "rows, the same columns": (score_row_fully, FULL_SCHEMA),
}


# The fastest of those tried. To collect each user's vectors once is slower, since a list is copied
# into every row that meets it, and so is to order the scores by list(… ORDER BY place).
QUERY = """
COPY (
    WITH shown AS (
        SELECT row_number() OVER () AS row, * FROM '{log}' WHERE user_id < {users}
    ), pairs AS (
        SELECT row, item_id, unnest(history) AS clicked, generate_subscripts(history, 1) AS place
        FROM shown
    ), scores AS (
        SELECT row, arg_min(array_inner_product(a.vector, b.vector), place, {length}) AS sim_scores
        FROM pairs
        JOIN items a ON a.item_id = pairs.item_id
        JOIN items b ON b.item_id = pairs.clicked
        GROUP BY row
    )
    SELECT shown.* EXCLUDE (row, history), sim_scores FROM shown JOIN scores USING (row)
) TO '{out}' (FORMAT parquet, COMPRESSION zstd)
"""


def duckdb_query(shop: Shop, items: int) -> dict[str, float]:
    """Measures DuckDB: it loads the embeddings as a table of arrays, then runs one query."""
    vectors = (
        f"SELECT item_id, embedding::FLOAT[{DIM}] AS vector FROM '{shop.embeddings}/*.parquet'"
    )
    out = shop.top / "duckdb.parquet"

    def run(count: int) -> None:
        with duckdb.connect() as database:
            database.execute(f"SET threads = {nights.WORKERS}")
            database.execute("SET preserve_insertion_order = false")
            database.execute(f"CREATE TABLE items AS {vectors}")
            users = count // PER_USER
            database.execute(QUERY.format(log=shop.log, users=users, length=HISTORY, out=out))

    many = min(SUBSET, pq.read_metadata(shop.log).num_rows)
    return {"DuckDB, 2 threads": rate_of(run, FEW, many)}


YARDSTICKS = {
    "in_memory": in_memory,
    "parquet_alone": parquet_alone,
    "beam_by_row": beam_by_row,
    "duckdb_query": duckdb_query,
}
ONE_CORE = ("in_memory", "parquet_alone")
GOALS = {
    "numpy, user by user": " (goal 0.65; 0.45 on a CPU of AVX2)",
    **{f"Beam, {way}": " (goal 30)" for way in BY_ROW},
}


def bench_yardsticks(shop: Shop, items: int, ours: float) -> None:
    """Prints the rates of all yardsticks over the log that is there, each in its own process."""
    rates: dict[str, float] = {}
    for name in YARDSTICKS:
        arguments = ("--items", items, "--yardstick", name, "--shop", shop.top)
        rates |= nights.child(__file__, *arguments, one_thread=name in ONE_CORE)
        if name == ONE_CORE[-1]:
            rates["the least of these in turn"] = one_after_the_other(rates)
    print(f"  {'':28}{'impressions/s':>14}{'job / it':>10}")
    for name, rate in rates.items():
        print(f"  {name:28}{rate:14,.0f}{ours / rate:10.2f}{GOALS.get(name, '')}", flush=True)


# ---- 4. Broadcast or shuffle -------------------------------------------------------------------


def bench_shuffle(shop: Shop, items: int, impressions: int, mode: str) -> None:
    """Scores the same impressions with embeddings that come by either way.

    Prints how far apart the scores are, and how much item shards answered.
    """
    write_log(shop, items, impressions)
    plain, kept = shop.settings.read_text(), []
    for way in ("broadcast", "shuffle"):
        shop.settings.write_text(f'{plain}[simscore]\nembeddings_by = "{way}"\n')
        found = score(shop, mode)
        told = found["counts"].get("answered_bytes", 0) / found["rows"]
        print(f"  {way:9} {found['seconds']:6.1f} s, {told:9,.0f} bytes answered/impression")
        kept.append(shop.scores.rename(shop.top / way))
    shop.settings.write_text(plain)
    print(f"  largest difference of two scores: {largest_difference(*kept):.2g}", flush=True)


def largest_difference(one: Path, other: Path) -> float:
    """Returns the largest difference between sim_scores of one impression in two partitions."""
    ids, scores = zip(*map(scores_by_impression, (one, other)), strict=True)
    if not ids[0].equals(ids[1]):
        raise ValueError(f"{one} and {other} are not of the same impressions")
    return float(np.abs(scores[0] - scores[1]).max())


def scores_by_impression(folder: Path) -> tuple[pa.ChunkedArray, np.ndarray]:
    """Reads the impression IDs, ascending, and their scores float32 [n, L]."""
    columns = ["impression_id", "sim_scores"]
    paths = partitions.open_published(str(folder)).paths
    rows = pa.concat_tables(partitions.read_parquet(path, columns) for path in paths)
    rows = rows.sort_by("impression_id")
    scores = rows["sim_scores"].combine_chunks().flatten().to_numpy()
    return rows["impression_id"], scores.reshape(len(rows), -1)


# ---- 5. Memory ---------------------------------------------------------------------------------


def bench_memory(shop: Shop, items: int, sizes: list[int], mode: str) -> None:
    """Prints the job's peak beside what it may take: the embeddings' size on disk and 1.5 GB."""
    embeddings = partitions.open_published(str(shop.embeddings)).manifest["files"]
    allowed = sum(file["bytes"] for file in embeddings) + ALLOWED_BYTES
    for impressions in sizes:
        write_log(shop, items, impressions)
        found = score(shop, mode)
        print(
            f"  {found['rows']:11,} impressions in {found['seconds']:6.1f} s: peak memory "
            f"{found['peak_bytes'] / 1e9:.2f} GB (goal {allowed / 1e9:.2f} GB)",
            flush=True,
        )


# ---- 6. Impression IDs of the shop -------------------------------------------------------------


def bench_ids(shop: Shop, impressions: int, rate: float) -> None:
    """Prints the core seconds of the check of text IDs, beside those of the job at its `rate`."""
    path, names = (
        shop.top / "ids" / f"{DAY}" / "0.parquet",
        [*LOG_SCHEMA.names[:4], "impression_id"],
    )
    path.parent.mkdir(parents=True)
    ids = [hashlib.md5(str(n).encode()).hexdigest() for n in range(impressions)]
    columns = [ids, ids, pa.nulls(len(ids), TIMESTAMP), np.zeros(len(ids), bool), ids]
    pq.write_table(pa.table(columns, names=names), path, row_group_size=65_536)
    source = inputs.open_source(
        "impressions", str(shop.top / "ids" / "{ds}"), DAY, {name: name for name in names}
    )
    groups = [(group, inputs.read_rows(group, ["impression_id"])) for group in source.groups()]
    shards = hashing.num_shards(impressions, ROWS_PER_ID_SHARD)

    def check() -> None:
        found: dict[tuple[int, int], list[Any]] = {}
        for group, rows in groups:
            pieces = str(shop.top / "pieces" / f"ids-{group.index}")
            for shard, told in write_hashes(pieces, group, rows, shards):
                found.setdefault((0, shard), []).append(told)
        check_ids = CheckIds([source.form], str(shop.top / "staging"))
        for element in found.items():
            list(check_ids.process(element))

    seconds = float(np.median([timed(check) for _ in range(REPEATS)]))
    share = seconds / (nights.WORKERS * impressions / rate)
    print(f"  IDs: {seconds:.2f} core seconds, {share:.1%} of the job's", flush=True)


# ---- 7. What gates are judged by ---------------------------------------------------------------


def bench_counting(shop: Shop, rate: float) -> None:
    """Prints the core microseconds of counting an impression, beside those of the job at `rate`."""
    rows = first_rows(shop, COUNTED)
    published = [partitions.open_published(str(f)) for f in (shop.features, shop.embeddings)]
    ids = pa.concat_arrays(
        [rows["item_id"].combine_chunks(), rows["history"].combine_chunks().flatten()]
    )
    items = ask_all(ItemTables(*published, None, False, DIM), pc.unique(ids))
    counting = simscore.count_impressions
    with mock.patch.object(simscore, "count_impressions", wraps=counting) as called:
        simscore.score_impressions(rows, items, ScoreForm(HISTORY))
    seconds = 1 / rows_per_second(partial(counting, *called.call_args.args), len(rows))
    share = seconds * rate / nights.WORKERS
    print(
        f"  gates' counting: {seconds * 1e6:.2f} core-us an impression, {share:.1%} of the job",
        flush=True,
    )


# ---- Other dimensions ----------------------------------------------------------------------------


def bench_dimensions(dimensions: list[int], given: argparse.Namespace) -> None:
    """Prints the bytes of vectors that the job scores in a second, each with a shop of its own."""
    usual = None
    for dimension in (DIM, *dimensions):
        with tempfile.TemporaryDirectory() as name:
            shop = make_shop(Path(name), given.items, dimension)
            rate = bench_job(shop, given.items, given.impressions, given.mode)
        size = rate * (HISTORY + 1) * 4 * dimension
        usual = usual or size
        print(f"  D = {dimension}: {size / 1e6:,.0f} MB/s, {size / usual:.2f} of 256", flush=True)


# ---- All of it ---------------------------------------------------------------------------------


def bench_all(top: Path, given: argparse.Namespace) -> None:
    """Takes every measurement that was asked for, in one shop."""
    shop = make_shop(top, given.items)
    ours = bench_job(shop, given.items, given.impressions, given.mode)
    bench_ids(shop, given.impressions, ours)
    bench_counting(shop, ours)
    bench_yardsticks(shop, given.items, ours)
    if given.shuffle:
        print(f"Broadcast or shuffle, {given.shuffle:,} impressions")
        bench_shuffle(shop, given.items, given.shuffle, given.mode)
    if given.memory:
        print("Memory")
        bench_memory(shop, given.items, [int(n) for n in given.memory.split(",")], given.mode)


def main() -> None:
    parser = argparse.ArgumentParser(description="How fast impressions are scored.")
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--impressions", type=int, default=1_000_000)
    parser.add_argument("--mode", choices=nights.MODES, default="multi_threading")
    parser.add_argument("--shuffle", type=int, default=50_000, help="impressions; 0 for none")
    parser.add_argument("--memory", help="numbers of impressions, as in 1000000,10000000")
    parser.add_argument("--dimensions", help="to measure beside 256, as in 64,768")
    parser.add_argument("--yardstick", choices=YARDSTICKS, help=argparse.SUPPRESS)
    parser.add_argument("--shop", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    if given.yardstick:
        print(json.dumps(YARDSTICKS[given.yardstick](Shop(given.shop), given.items)))
        return
    print(nights.head())
    print(
        f"SIMSCORE, L = {HISTORY}, D = {DIM}, {given.items:,} items, {given.impressions:,} "
        f"impressions, {PER_USER} per user",
        flush=True,
    )
    if given.dimensions:
        bench_dimensions([int(n) for n in given.dimensions.split(",")], given)
        return
    with tempfile.TemporaryDirectory() as name:
        bench_all(Path(name), given)


if __name__ == "__main__":
    main()
