"""Measures what TRAINING-ROWS of many small days costs in one job, and day by day.

    python tests/benchmarks/bench_training_rows.py [--days 733] [--rows 193] [--sample 6]
        [--scope category] [--mode in_memory]

`make bench` runs it. A shop of 2,000 items with so many days of so many impressions, 15% of them
clicked, and a window of 30 days. Beside one job of all days: a job a day, for the last days, whose
windows are full; and what no job goes without, each file read once and as many parts written, by a
plain loop. Each runs in a process of its own, and what is told of a sample is scaled to all days.
"""

import argparse
import datetime as dt
import json
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nights
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from nights import timed

from feature_jobs import inputs
from feature_jobs.impressions.clicks import HistoryLaw
from feature_jobs.impressions.histories import DAY_US
from feature_jobs.impressions.training_rows import (
    TrainingRowsDay,
    TrainingRowsJob,
    define_training_rows,
)
from feature_jobs.inputs import Source
from feature_jobs.schemas import ROW_CLICKS, TIMESTAMP, TRAINING_ROWS
from feature_jobs.store import partitions
from pipelines.running import beam_options

FIRST = dt.date(2024, 1, 1)
WINDOW_DAYS, BACK, ITEMS, USERS, CLICKED, GAP_US = 30, 33, 2000, 50, 0.15, 1_800_000_000
NAMES = {
    "impressions": ("user_id", "item_id", "event_time", "clicked", "request_id"),
    "catalogue": ("item_id", "image_uri", "category"),
}
SECONDS_A_DAY = 60 / 733  # the goal, for days of 193 rows
WAYS = {"range": "one job of all days", "days": "a job a day", "files": "the files alone"}


# ---- The shop ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shop:
    top: Path
    days: int

    @property
    def dates(self) -> list[dt.date]:
        return [FIRST + dt.timedelta(days=number) for number in range(self.days)]

    def open(self, table: str, day: dt.date) -> Source:
        names = {name: name for name in NAMES[table]}
        return inputs.open_source(table, str(self.top / table / "{ds}"), day, names)


def write_shop(shop: Shop, rows: int) -> None:
    """Writes the log and the catalogue of each day, a file each; items come and go."""
    for number, day in enumerate(shop.dates):
        rng = np.random.default_rng(number)
        start = int(dt.datetime.combine(day, dt.time(), dt.UTC).timestamp()) * 1_000_000
        times = start + rng.integers(0, DAY_US, rows)
        columns = [
            rng.integers(0, USERS, rows),
            rng.integers(0, ITEMS, rows),
            pa.array(times).cast(TIMESTAMP),
            rng.random(rows) < CLICKED,
            times // (DAY_US // 50),
        ]
        listed = np.arange(number % 50, ITEMS)
        kinds = np.array(["dress", "boat"])[listed % 2]
        tables = {
            "impressions": columns,
            "catalogue": [listed, ["x.jpg"] * len(listed), kinds],
        }
        for table, values in tables.items():
            folder = shop.top / table / str(day)
            folder.mkdir(parents=True)
            pq.write_table(pa.table(values, names=NAMES[table]), folder / "0.parquet")


# ---- Three ways --------------------------------------------------------------------------------


def make(shop: Shop, out: Path, dates: Sequence[dt.date], scoped: bool, mode: str) -> None:
    """Makes the training rows of consecutive days in one job."""
    before = {day: [d for d in shop.dates if 0 <= (day - d).days <= BACK] for day in dates}
    needed = sorted({d for days in before.values() for d in days})
    schema = TRAINING_ROWS.schema(pa.int64(), pa.int64(), request_id=pa.int64())
    days = tuple(
        TrainingRowsDay(
            day, inputs.day_end(day, "UTC"), 1, schema, tuple(before[day]),
            tuple(before[day]) if scoped else (), str(out / str(day)),
        )
        for day in dates
    )  # fmt: skip
    law = HistoryLaw(ROW_CLICKS, WINDOW_DAYS * DAY_US, 0)
    categories = ("dress",) if scoped else None
    job = TrainingRowsJob(law, GAP_US, "UTC", categories, days, days[0].staging)
    log = [shop.open("impressions", day) for day in needed]
    catalogues = [shop.open("catalogue", day) for day in needed] if scoped else []
    given = [f"--direct_num_workers={nights.WORKERS}", f"--direct_running_mode={mode}"]
    options = beam_options.pipeline_options({}, "training-rows", given)
    beam_options.run_pipeline(
        lambda root: define_training_rows(root, log, catalogues, job), options
    )


def move_files(shop: Shop, out: Path, dates: Sequence[dt.date], scoped: bool) -> None:
    """Reads each file of these days, and writes the impressions as they are."""
    for day in dates:
        tables = [table for table in NAMES if scoped or table == "impressions"]
        rows = [pq.read_table(shop.top / table / str(day) / "0.parquet") for table in tables]
        partitions.write_parquet(str(out / str(day) / "0.parquet"), rows[0])


def run_way(way: str, shop: Shop, sample: int, scoped: bool, mode: str) -> dict[str, Any]:
    """Returns the seconds for all days, and the peak of memory in bytes."""
    with tempfile.TemporaryDirectory() as name:
        out = Path(name)
        if way == "range":
            seconds = timed(lambda: make(shop, out, shop.dates, scoped, mode))
        elif way == "files":
            seconds = timed(lambda: move_files(shop, out, shop.dates, scoped))
        else:
            last = shop.dates[-sample:]
            seconds = sum(timed(lambda d=d: make(shop, out, [d], scoped, mode)) for d in last)
            seconds *= shop.days / len(last)
    return {"seconds": seconds, "peak_bytes": nights._peak_bytes()}


def main() -> None:
    parser = argparse.ArgumentParser(description="What training rows of many small days cost.")
    parser.add_argument("--days", type=int, default=733)
    parser.add_argument("--rows", type=int, default=193, help="impressions of a day")
    parser.add_argument("--sample", type=int, default=6, help="days that are made one by one")
    parser.add_argument("--scope", choices=("category", "everything"), default="category")
    parser.add_argument("--mode", choices=nights.MODES, default="in_memory")
    parser.add_argument("--shop", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    if given.way:
        shop, scoped = Shop(given.shop, given.days), given.scope == "category"
        print(json.dumps(run_way(given.way, shop, given.sample, scoped, given.mode)))
        return
    print(nights.head())
    print(f"TRAINING-ROWS, {given.days} days of {given.rows} impressions, scope {given.scope}")
    print(f"  {'':24}{'seconds':>10}{'ms a day':>10}{'it / job':>10}{'peak':>10}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        write_shop(Shop(Path(name), given.days), given.rows)
        shared = [f"--{k}={getattr(given, k)}" for k in ("days", "sample", "scope", "mode")]
        ours = 0.0
        for way, text in WAYS.items():
            found = nights.child(__file__, *shared, f"--shop={name}", f"--way={way}")
            ours = ours or found["seconds"]
            print(
                f"  {text:24}{found['seconds']:10.1f}{found['seconds'] / given.days * 1000:10.1f}"
                f"{found['seconds'] / ours:10.1f}{found['peak_bytes'] / 1e6:7.0f} MB"
                + (f"  (goal {SECONDS_A_DAY * given.days:.0f} s)" if way == "range" else ""),
                flush=True,
            )


if __name__ == "__main__":
    main()
