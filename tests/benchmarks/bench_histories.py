"""Measures how fast HISTORIES is on a large day, and how much memory it takes.

    python tests/benchmarks/bench_histories.py [--impressions 10000000] [--clicks 50]
        [--mode multi_threading] [--sample 100000]

`make bench` runs it. A day of five impressions per user, a tenth of them clicked, after one that
left every user so many clicks of the 30 days before. That day's histories are made first, and not
counted. Beside it, for a sample of users, with their clicks in memory and ready: the history
strictly before each impression, by a plain loop and by DuckDB. Both take repeated items and the
window for what they are not, rare.
"""

import argparse
import datetime as dt
import gc
import logging
import tempfile
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import duckdb
import nights
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from nights import timed

from feature_jobs.impressions.histories import DAY_US
from feature_jobs.schemas import TIMESTAMP

DAY_BEFORE, DAY = dt.date(2026, 1, 31), dt.date(2026, 2, 1)
START_US = int(dt.datetime.combine(DAY, dt.time(), dt.UTC).timestamp()) * 1_000_000
WINDOW_DAYS, HISTORY, PER_USER, CLICKED, ITEMS = 30, 50, 5, 0.1, 1_000_000
GROUP, FILE = 1 << 20, 10 << 20  # rows of a row group; of a file
STEP = 1_000_003  # a prime: row r is of user r * STEP % users, so that all have equally many
SECONDS, BYTES = 180, 4e9  # the goals
LOG_SCHEMA = pa.schema(
    [
        ("user_id", pa.int64()),
        ("item_id", pa.int64()),
        ("event_time", TIMESTAMP),
        ("clicked", pa.bool_()),
    ]
)


# ---- The log -----------------------------------------------------------------------------------


def write_settings(top: Path) -> Path:
    """Writes the settings of both days; no catalogue is read."""
    path = top / "courier.toml"
    path.write_text(
        f'root = "features"\nhistory_len = {HISTORY}\nwindow_days = {WINDOW_DAYS}\n'
        '[catalogue]\npath = "catalogue"\nimage_roots = ["."]\n'
        '[impressions]\npath = "impressions/{ds}"\n'
    )
    return path


def write_log(top: Path, users: int, clicks: int) -> None:
    """Writes the clicks of the days before, in one partition, and the impressions of DAY."""
    if users % STEP == 0:
        raise ValueError(f"{users:,} users are a multiple of {STEP:,}: not all would be met")
    earlier = START_US - WINDOW_DAYS * DAY_US
    write_day(folder_of(top, DAY_BEFORE), users, clicks, (earlier, START_US), clicked=1.0)
    write_day(folder_of(top, DAY), users, PER_USER, (START_US, START_US + DAY_US), CLICKED)


def folder_of(top: Path, day: dt.date) -> Path:
    """Returns the folder in which the log of a day lies."""
    return top / "impressions" / str(day)


def write_day(
    folder: Path, users: int, per_user: int, span_us: tuple[int, int], clicked: float
) -> None:
    """Writes `per_user` rows of each user, at random times in the span.

    Files have several row groups; `clicked` is the share of rows that are clicks.
    """
    rng, rows = np.random.default_rng(per_user), users * per_user
    folder.mkdir(parents=True)
    for first in range(0, rows, FILE):
        with pq.ParquetWriter(folder / f"{first // FILE:03}.parquet", LOG_SCHEMA) as file:
            for at in range(first, min(first + FILE, rows), GROUP):
                count = min(GROUP, rows - at)
                columns = [
                    np.arange(at, at + count) * STEP % users,
                    rng.integers(0, ITEMS, count),
                    pa.array(rng.integers(*span_us, count)).cast(TIMESTAMP),
                    rng.random(count) < clicked,
                ]
                file.write_table(pa.table(columns, schema=LOG_SCHEMA))


def sampled(top: Path, day: dt.date, sample: int) -> pa.Table:
    """Reads the rows of a day of the first `sample` users, by time."""
    rows = pq.read_table(folder_of(top, day), filters=pc.field("user_id") < sample)
    return rows.sort_by("event_time")


# ---- The job -----------------------------------------------------------------------------------


def bench_job(settings: Path, impressions: int, mode: str) -> float:
    """Measures HISTORIES on DAY, after that of the day before; returns impressions/s."""
    nights.run_stage(settings, DAY_BEFORE, "histories", nights.local(mode))
    found = nights.run_stage(settings, DAY, "histories", nights.local(mode))
    print(
        f"  job, {nights.WORKERS} workers, {mode}: {found['seconds']:.1f} s (goal {SECONDS} s), "
        f"peak memory {found['peak_bytes'] / 1e9:.2f} GB (goal {BYTES / 1e9:.0f} GB)",
        flush=True,
    )
    return impressions / found["seconds"]


# ---- In memory -----------------------------------------------------------------------------------


def by_loop(clicks: pa.Table, impressions: pa.Table) -> float:
    """Times a plain Python loop, in seconds, with a deque of each user's clicks filled already."""
    histories: dict[int, deque[int]] = {}
    for user, item in columns_of(clicks, "user_id", "item_id"):
        histories.setdefault(user, deque(maxlen=HISTORY)).appendleft(item)
    rows = list(columns_of(impressions, "user_id", "item_id", "clicked"))

    def run() -> list[list[int]]:
        found = []
        for user, item, clicked in rows:
            history = histories[user]
            found.append(list(history))
            if clicked:
                history.appendleft(item)
        return found

    gc.disable()  # it would go through all histories that were made, again and again
    try:
        return timed(run)
    finally:
        gc.enable()


def columns_of(rows: pa.Table, *names: str) -> Iterator[tuple]:
    """Returns the rows as tuples of these columns."""
    return zip(*(rows[name].to_pylist() for name in names), strict=True)


# The fastest of those tried: ASOF joins, windows and arg_max(…, 50) take longer than lists that
# are cut where as many clicks end as come before.
FROM_ALL_CLICKS = """
    WITH lists AS (
        SELECT user_id, list(item_id ORDER BY event_time) AS items FROM clicks GROUP BY user_id
    ), counts AS (
        SELECT row, count(*) AS n FROM impressions i
        JOIN clicks c ON c.user_id = i.user_id AND c.event_time < i.event_time GROUP BY row
    )
    SELECT impressions.*, list_reverse(items[greatest(1, n - {length} + 1):n]) AS history
    FROM impressions JOIN counts USING (row) JOIN lists USING (user_id)
"""
FROM_STATE = """
    WITH today AS (
        SELECT i.row, list(c.item_id ORDER BY c.event_time DESC) AS items FROM impressions i
        JOIN impressions c ON c.user_id = i.user_id AND c.event_time < i.event_time
        WHERE c.clicked GROUP BY i.row
    )
    SELECT impressions.*, (coalesce(today.items, []) || state.items)[1:{length}] AS history
    FROM impressions LEFT JOIN today USING (row) JOIN state USING (user_id)
"""


def by_duckdb(clicks: pa.Table, impressions: pa.Table, out: Path) -> dict[str, float]:
    """Times DuckDB writing the histories, in seconds.

    It makes them from all clicks, and from yesterday's histories.
    """
    with duckdb.connect() as database:
        database.execute(f"SET threads = {nights.WORKERS}")
        database.execute("SET preserve_insertion_order = false")
        database.register("earlier", clicks)
        database.register("shown", impressions)
        database.execute(
            "CREATE TABLE impressions AS SELECT row_number() OVER () AS row, * FROM shown;"
            "CREATE TABLE clicks AS FROM earlier UNION ALL FROM shown WHERE clicked;"
            "CREATE TABLE state AS SELECT user_id, list(item_id ORDER BY event_time DESC) AS items "
            "FROM earlier GROUP BY user_id"
        )
        queries = {"all clicks": FROM_ALL_CLICKS, "the state": FROM_STATE}
        copies = {
            name: f"COPY ({query.format(length=HISTORY)}) TO '{out}' (COMPRESSION zstd)"
            for name, query in queries.items()
        }
        return {name: timed(lambda c=copy: database.execute(c)) for name, copy in copies.items()}


def bench_in_memory(top: Path, sample: int, ours: float) -> None:
    """Prints the rates of the loop and of DuckDB, and how many times as fast the job is."""
    clicks, impressions = sampled(top, DAY_BEFORE, sample), sampled(top, DAY, sample)
    seconds = {"plain loop, one core": by_loop(clicks, impressions)}
    found = by_duckdb(clicks, impressions, top / "duckdb.parquet")
    seconds |= {f"DuckDB, 2 threads, from {name}": taken for name, taken in found.items()}
    print(f"  {'':34}{'impressions/s':>14}{'job / it':>10}")
    print(f"  {'job':34}{ours:14,.0f}")
    for name, taken in seconds.items():
        rate = len(impressions) / taken
        print(f"  {name:34}{rate:14,.0f}{ours / rate:10.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="How fast a large day's histories are made.")
    parser.add_argument("--impressions", type=int, default=10_000_000)
    parser.add_argument("--clicks", type=int, default=50, help="of each user before the day")
    parser.add_argument("--mode", choices=nights.MODES, default="multi_threading")
    parser.add_argument("--sample", type=int, default=100_000, help="users of the comparison")
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    users = given.impressions // PER_USER
    print(nights.head())
    print(
        f"HISTORIES, L = {HISTORY}, {users * PER_USER:,} impressions of {users:,} users with "
        f"{given.clicks} clicks each",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        write_log(top, users, given.clicks)
        ours = bench_job(write_settings(top), users * PER_USER, given.mode)
        bench_in_memory(top, min(given.sample, users), ours)


if __name__ == "__main__":
    main()
