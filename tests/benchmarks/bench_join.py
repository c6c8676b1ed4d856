"""Measures `courier join`, beside a query by hand and beside the scoring job.

    python tests/benchmarks/bench_join.py [--items 1000000] [--samples 10000000]

`make bench` runs it. A shop of so many items has logged so many impressions of a day, of users with
histories of 50 clicks; they are the samples.

1. Samples that take published scores: seconds and peak memory (goal: 3 minutes and 4 GB for ten
   million samples of a million items on 2 cores), beside the query in DuckDB that somebody would
   write instead, with as much memory and as many threads (goal: 0.7 of its rate): once with the
   rows in the order of the samples, as `courier join` keeps them, and once in any order. Neither
   counts, checks or publishes anything; and both begin in a process that runs already: a join of
   one user's samples tells what that is worth.
2. The same samples scored on the way, beside the night's own scoring job (goal: 0.8 of its rate).

Each command is a process of its own, with two workers.
"""

import argparse
import contextlib
import datetime as dt
import io
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import duckdb
import nights
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from bench_simscore import DAY, DAY_BEFORE, HISTORY, NOON_US, Shop, make_shop
from nights import timed

from feature_jobs.impressions.histories import DAY_US
from feature_jobs.schemas import TIMESTAMP

PER_USER, CLICKED, USERS_AT_ONCE = 20, 0.05, 8192
MEMORY_GB = 4
ON_ALL_CORES = (
    "--", "--direct_running_mode=multi_processing", f"--direct_num_workers={nights.WORKERS}"
)  # fmt: skip
GATES = (
    "[gates]\nbalance.fail = 1.0\ndead_clusters.fail = 1.0\nhistory_drift.fail = inf\n"
    "cluster_drift.fail = inf\nscore_drift.fail = inf\nimpression_rows.fail = inf\n"
)
LOG = pa.schema(
    [("user_id", pa.int64()), ("item_id", pa.int64()), ("event_time", TIMESTAMP),
     ("clicked", pa.bool_())]
)  # fmt: skip


# ---- The shop ----------------------------------------------------------------------------------


def write_log(shop: Shop, ds: dt.date, items: int, users: int, rows: int, clicked: float) -> None:
    """Writes the log of a day: so many rows of each user, in the order of time."""
    rng, start = np.random.default_rng(ds.toordinal()), NOON_US + (ds - DAY).days * DAY_US
    path = shop.top / "impressions" / str(ds) / "0.parquet"
    path.parent.mkdir(parents=True)
    with pq.ParquetWriter(path, LOG) as file:
        for at in range(0, users, USERS_AT_ONCE):
            some = np.arange(at, min(at + USERS_AT_ONCE, users))
            count = len(some) * rows
            columns = [
                some.repeat(rows),
                rng.integers(0, items, count),
                pa.array(start + np.arange(count)).cast(TIMESTAMP),
                rng.random(count) < clicked,
            ]
            file.write_table(pa.table(columns, schema=LOG))


def write_samples(shop: Shop) -> None:
    """Writes the impressions of the day as samples, with two columns of the shop's own."""
    folder = shop.top / "ctr" / str(DAY)
    folder.mkdir(parents=True)
    rng = np.random.default_rng(5)
    with pq.ParquetFile(shop.log) as log:
        writer = None
        for batch in log.iter_batches(1_000_000):
            rows = pa.Table.from_batches([batch])
            rows = rows.append_column("price", pa.array(rng.random(len(rows), np.float32)))
            rows = rows.append_column("place", pa.array(rng.integers(0, 50, len(rows), np.int32)))
            rows = rows.take(pa.array(rng.permutation(len(rows))))
            writer = writer or pq.ParquetWriter(folder / "0.parquet", rows.schema)
            writer.write_table(rows)
        writer.close()


def write_few(shop: Shop) -> None:
    """Writes the samples of one user, which are all start-up to join."""
    folder = shop.top / "few" / str(DAY)
    folder.mkdir(parents=True)
    with pq.ParquetFile(shop.top / "ctr" / str(DAY) / "0.parquet") as samples:
        rows = samples.read_row_group(0)
    pq.write_table(rows.filter(pc.equal(rows["user_id"], 0)), folder / "0.parquet")


def make_night(top: Path, items: int, samples: int) -> tuple[Shop, dict[str, Any]]:
    """Makes the shop and its night; returns what the scoring job took."""
    shop, users = make_shop(top, items), samples // PER_USER
    text = shop.settings.read_text().replace("[[pins]]", f"{GATES}[[pins]]", 1)
    shop.settings.write_text(text)
    write_log(shop, DAY_BEFORE, items, users, HISTORY, 1.0)
    write_log(shop, DAY, items, users, PER_USER, CLICKED)
    write_samples(shop)
    write_few(shop)
    courier(shop, "histories", "--ds", DAY_BEFORE, *ON_ALL_CORES)
    courier(shop, "refresh", "--ds", DAY, *ON_ALL_CORES)
    return shop, told_of_runs(shop, "simscore")[0]


def told_of_runs(shop: Shop, stage: str) -> list[dict[str, Any]]:
    """Returns what runs of the day noted of a stage that they made."""
    runs = (shop.top / "features" / "production" / "_runs" / f"ds={DAY}").glob("*/run.json")
    found = [json.loads(path.read_text())["stages"].get(stage) for path in runs]
    return [one for one in found if one and "wall_seconds" in one]


def courier(shop: Shop, *args: object) -> dict[str, Any]:
    """Runs a command in a process of its own; returns its seconds and peak memory in GB."""
    return nights.child(__file__, "--run", shop.settings, *args)


def run(settings: str, command: str, *args: str) -> dict[str, Any]:
    from pipelines import cli

    start, said = time.perf_counter(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = cli.main([command, "--config", settings, *args])
    if status:
        raise RuntimeError(f"{command} ended with {status}: {said.getvalue()[-1000:]}")
    return {"seconds": time.perf_counter() - start}


def join(shop: Shop, name: str, folder: str = "ctr") -> dict[str, Any]:
    """Joins the samples; returns the run's figures and what it counted."""
    samples = ("--samples", f"{folder}/{{ds}}/*.parquet", "--features-from", "same", "--name", name)
    found = courier(shop, "join", "--ds", DAY, *samples, *ON_ALL_CORES)
    of_set = f"joined/{name}_rows"
    (stage,) = (one for one in told_of_runs(shop, "join") if of_set in one["counts"])
    return {**found, **stage}


# ---- By hand -----------------------------------------------------------------------------------


def by_hand(shop: Shop, in_order: bool) -> float:
    """Runs the query that somebody would write; returns its seconds."""
    query = f"""
        COPY (
            SELECT s.* EXCLUDE (_file, file_row_number), i.has_image, i.in_scope, i.cluster_id,
                u.sim_scores, u.sim_mask, u.history_len, u.sim_known, u.sim_max, u.sim_mean,
                u.simtier, u.same_cluster
            FROM read_parquet(
                '{shop.top}/ctr/{DAY}/*.parquet', filename = '_file', file_row_number = true
            ) s
            LEFT JOIN '{shop.features}/*.parquet' i USING (item_id)
            LEFT JOIN '{shop.scores}/*.parquet' u USING (user_id, item_id, event_time)
            {"ORDER BY s._file, s.file_row_number" if in_order else ""}
        ) TO '{shop.top}/by-hand.parquet' (FORMAT parquet, COMPRESSION zstd)
    """  # of this benchmark's own folder
    with duckdb.connect() as database:
        database.execute(f"SET memory_limit = '{MEMORY_GB}GB'; SET threads = {nights.WORKERS}")
        database.execute(f"SET preserve_insertion_order = {in_order}")
        database.execute(f"SET temp_directory = '{shop.top}/spill'")
        return timed(lambda: database.execute(query))


# ---- Told --------------------------------------------------------------------------------------


def bench(items: int, samples: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        shop, scoring = make_night(Path(name), items, samples)
        start_up = join(shop, "few", "few")["seconds"]
        taken = join(shop, "taken")
        assert taken["work"]["scores_taken"] == samples, taken["work"]
        in_order, in_any = by_hand(shop, in_order=True), by_hand(shop, in_order=False)
        peak = taken["peak_memory_bytes"] / 1e9
        print(f"  {samples:,} samples, {items:,} items, L = {HISTORY}")
        print(
            f"    published scores taken: {taken['seconds']:.1f} s (goal 180 of 10,000,000), peak "
            f"{peak:.1f} GB (goal {MEMORY_GB}); one user's samples {start_up:.1f} s"
        )
        for order, query in (("the samples'", in_order), ("any", in_any)):
            print(
                f"    by hand in DuckDB, rows in {order} order: {query:.1f} s, "
                f"{query / taken['seconds']:.2f} of its rate (goal 0.7)"
            )
        shutil.rmtree(shop.scores)
        made = join(shop, "made")
        assert made["work"]["scores_taken"] == 0, made["work"]
        on_the_way, job = made["wall_seconds"], scoring["wall_seconds"]
        print(
            f"    scored on the way: {on_the_way:.1f} s, the scoring job {job:.1f} s: "
            f"{job / on_the_way:.2f} of its rate (goal 0.8); peak "
            f"{made['peak_memory_bytes'] / 1e9:.1f} GB"
        )


def main() -> None:
    if sys.argv[1:2] == ["--run"]:
        print(json.dumps(run(*sys.argv[2:])))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--samples", type=int, default=10_000_000)
    given = parser.parse_args()
    print(nights.head())
    bench(given.items, given.samples)


if __name__ == "__main__":
    main()
