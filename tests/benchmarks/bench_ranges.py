"""Measures what a day of a range costs, beside a night of its own, and what many small days take.

    python tests/benchmarks/bench_ranges.py [--days 60] [--items 20000] [--impressions 100000]
        [--small 700] [--step-days 100]

`make bench` runs it. Images and the encoder are stubs: what is measured is all else of a night.

1. A range of so many days through all stages of the night. A day's marginal time, of the range
   without its start-up, beside a night in its middle without its start-up (goal: 1.2 of it at
   most): histories grow, and the first nights with them. The start-up is that of a night of a few
   rows. Peak memory of the range, and of half of it. What the range was estimated to take after its
   first night, whose start-up is in the rates.
2. So many days of 300 items and 300 impressions through all stages (goal: 3 minutes on 2 cores),
   their training rows (goal: 60 s), and then, of the last of them, a night that is there (goal: 1 s
   once all is imported) and `courier status`.
3. The same days by `courier backfill`, so many of them in a step (goal: 1.5 of the range). And what
   `--dry-run` takes once they are there (goal: 5 s), with the reads of a partition (goal: 3 at
   most).

Each runs in a process of its own, on a shop of its own.
"""

import argparse
import contextlib
import datetime as dt
import io
import json
import logging
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import nights
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from bench_embed import stubs
from bench_simscore import book_by_hand, unit_vectors
from nights import timed

from courier_model import inference
from courier_model.encoder import build_encoder, save_encoder
from feature_jobs.codebooks.codebook import save_codebook
from feature_jobs.schemas import TIMESTAMP
from feature_jobs.store.local import LocalStore
from feature_jobs.store.partitions import MANIFEST
from pipelines import cli
from pipelines.config import load_settings
from pipelines.nightly import plan_nights
from pipelines.running.estimates import estimate

FIRST = dt.date(2026, 1, 5)  # after the days that the codebook is made from
PER_USER, NEW_A_DAY, CLICKED = 20, 0.01, 0.1  # impressions; items; of all impressions
SMALL_ROWS, FEW_ROWS, CENTRES = 300, 20, 100
IMPRESSIONS = pa.schema(
    [("user_id", pa.int64()), ("item_id", pa.int64()), ("event_time", TIMESTAMP),
     ("clicked", pa.bool_()), ("request_id", pa.int64())]
)  # fmt: skip


# ---- The shop ----------------------------------------------------------------------------------


def make_shop(top: Path, days: int, items: int, impressions: int) -> None:
    """Writes a shop: each day a hundredth of the items is new, and as many are gone."""
    rng = np.random.default_rng(0)
    encoder = build_encoder("shufflenet_v2_x0_5", "random", input_size=32)
    info = save_encoder(encoder, str(top), "stub", None, None, None, "random")
    book = save_codebook(str(top), book_by_hand(unit_vectors(CENTRES), info.encoder_id))
    (top / "courier.toml").write_text(
        'root = "features"\n[catalogue]\npath = "catalogue/{ds}"\nimage_roots = ["/"]\n'
        '[impressions]\npath = "impressions/{ds}"\n'
        "[gates]\nbalance.fail = 1.0\ndead_clusters.fail = 1.0\nhistory_drift.fail = 100.0\n"
        f'[[pins]]\nfrom_ds = {FIRST}\nencoder = "{info.encoder_id}"\n'
        f'codebook = "{Path(book).name}"\n'
    )
    for number in range(days):
        first = round(number * items * NEW_A_DAY)
        write_day(top, number, np.arange(first, first + items), impressions, rng)


def write_day(
    top: Path, number: int, items: np.ndarray, impressions: int, rng: np.random.Generator
) -> None:
    ds = FIRST + dt.timedelta(days=number)
    start = int(dt.datetime.combine(ds, dt.time(), dt.UTC).timestamp()) * 1_000_000
    users = rng.integers(0, max(1, impressions // PER_USER), impressions)
    times = start + rng.integers(0, 86_400, impressions) * 1_000_000
    shown = rng.choice(items, impressions)
    log = [users, shown, pa.array(times).cast(TIMESTAMP), rng.random(impressions) < CLICKED]
    uris = pa.array([f"{item}.jpg" for item in items])
    catalogue = pa.table({"item_id": items, "image_uri": uris, "category": ["a"] * len(items)})
    for name, rows in (
        ("catalogue", catalogue),
        ("impressions", pa.table([*log, times // 60_000_000], schema=IMPRESSIONS)),
    ):
        folder = top / name / str(ds)
        folder.mkdir(parents=True)
        pq.write_table(rows, folder / "0.parquet")


# ---- In a process of its own -------------------------------------------------------------------


def courier(top: Path, *args: str) -> float:
    """Runs a command in this process; returns its seconds."""
    command = [args[0], "--config", str(top / "courier.toml"), *args[1:]]

    def run() -> None:
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            status = cli.main(command)
        if status:
            raise RuntimeError(f"{command} ended with {status}: {said.getvalue()[-1000:]}")

    return timed(run)


def estimated(top: Path, first: int, last: int) -> float:
    """Returns the seconds that days of two numbers are estimated to take, by what runs took."""
    settings = load_settings(str(top / "courier.toml"))
    days = [FIRST + dt.timedelta(days=number) for number in range(first, last + 1)]
    planned = plan_nights(settings, days, settings.night)
    stages = [one for night in planned for one in night.planned]
    return estimate(settings, stages, planned[0].look).cost.seconds


def peak_of_runs(top: Path) -> int:
    """Returns the peak memory of all stages that were made, in bytes."""
    runs = [json.loads(path.read_text()) for path in top.rglob("run.json")]
    return max(s.get("peak_memory_bytes", 0) for run in runs for s in run["stages"].values())


@contextlib.contextmanager
def counting_reads() -> Iterator[Counter[Path]]:
    """Counts, in the block, how often a file is read in each folder."""
    reads: Counter[Path] = Counter()
    with contextlib.ExitStack() as stack:
        for name in ("read_bytes", "open_input"):
            real = getattr(LocalStore, name)

            def counted(store: LocalStore, path: str, *more: Any, _real: Any = real) -> Any:
                reads[Path(path).parent] += 1
                return _real(store, path, *more)

            stack.enter_context(mock.patch.object(LocalStore, name, counted))
        yield reads


def ends(first: int, last: int) -> tuple[str, ...]:
    """Returns the options for the days of two numbers, both included."""
    days = (FIRST + dt.timedelta(days=number) for number in (first, last))
    return "--start-ds", str(next(days)), "--end-ds", str(next(days))


def measure(
    what: str, days: int, items: int, impressions: int, step_days: int = 0
) -> dict[str, float]:
    """Makes a shop and measures one thing of it, all imports and a first night aside.

    With `step_days`, its range is made by `courier backfill`.
    """
    vectors = unit_vectors(CENTRES)

    def embed(embedder: object, pixels: np.ndarray) -> np.ndarray:
        return vectors[np.arange(len(pixels)) % CENTRES]  # as far from each other as centres are

    with (
        tempfile.TemporaryDirectory() as name,
        stubs(changed=0),
        mock.patch.object(inference.Embedder, "embed", embed),
    ):
        top = Path(name)
        make_shop(top, days + 2, items, impressions)
        found = {"first": courier(top, "refresh", *ends(0, 0))}
        found["estimated"] = estimated(top, 1, days)
        steps = ["backfill", "--step-days", str(step_days)] if step_days else ["refresh"]
        found["seconds"] = courier(top, *steps, *ends(1, days))
        found["peak_mb"] = peak_of_runs(top) / 1e6
        if what == "half":
            found["next"] = courier(top, "refresh", *ends(days + 1, days + 1))
        if what == "small":
            found["training rows"] = courier(top, "training-rows", *ends(0, days))
            found["there"] = courier(top, "refresh", *ends(days, days))
            found["all there"] = courier(top, "refresh", *ends(0, days))
            found["status"] = courier(top, "status")
        if what == "steps":
            with counting_reads() as reads:
                found["plan"] = courier(top, "backfill", "--dry-run", *ends(1, days))
            found["reads"] = max(n for folder, n in reads.items() if (folder / MANIFEST).exists())
    return found


def child(what: str, *sizes: int) -> dict[str, Any]:
    return nights.child(__file__, "--measure", what, *sizes)


# ---- Told --------------------------------------------------------------------------------------


def bench_range(days: int, items: int, impressions: int) -> None:
    few = child("range", 1, FEW_ROWS, FEW_ROWS)["seconds"]
    half = child("half", days // 2, items, impressions)
    whole = child("range", days, items, impressions)
    marginal, night = (whole["seconds"] - few) / days, half["next"]
    print(f"  {days} days of {items:,} items and {impressions:,} impressions")
    print(f"    a night of {FEW_ROWS} rows {few:.1f} s, that in the middle {night:.1f} s")
    print(
        f"    the range {whole['seconds']:.1f} s (estimated {whole['estimated']:.1f} s): a day "
        f"{marginal:.2f} s, "
        f"{marginal / (night - few):.2f} of a night without its start-up (goal 1.2)"
    )
    print(
        f"    peak memory of {days // 2} days {half['peak_mb']:,.0f} MB, of {days} "
        f"{whole['peak_mb']:,.0f} MB"
    )


def bench_small(days: int, step_days: int) -> None:
    found = child("small", days, SMALL_ROWS, SMALL_ROWS)
    print(f"  {days} days of {SMALL_ROWS} items and {SMALL_ROWS} impressions")
    print(f"    the range {found['seconds']:.1f} s (goal 180), a night {found['first']:.1f} s")
    print(f"    training rows {found['training rows']:.1f} s (goal 60)")
    print(
        f"    there already: the last day {found['there']:.2f} s (goal 1), all days "
        f"{found['all there']:.1f} s; status {found['status']:.2f} s"
    )
    steps = child("steps", days, SMALL_ROWS, SMALL_ROWS, step_days)
    print(
        f"    backfill in steps of {step_days} days {steps['seconds']:.1f} s, "
        f"{steps['seconds'] / found['seconds']:.2f} of the range (goal 1.5)"
    )
    print(
        f"    its plan once all is there {steps['plan']:.1f} s (goal 5), "
        f"{steps['reads']:.0f} reads of a partition at most (goal 3)"
    )


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        logging.disable(logging.WARNING)
        what, *sizes = sys.argv[2:]
        print(json.dumps(measure(what, *map(int, sizes))))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--days", type=int, default=60)
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--impressions", type=int, default=100_000)
    parser.add_argument("--small", type=int, default=700)
    parser.add_argument("--step-days", type=int, default=100)
    given = parser.parse_args()
    print(nights.head())
    bench_small(given.small, given.step_days)
    bench_range(given.days, given.items, given.impressions)


if __name__ == "__main__":
    main()
