"""Measures nights that take a shop's own vectors: all new, and 1% changed.

    python tests/benchmarks/bench_vectors.py [--items 1000000] [--dimension 512] [--rounds 3]

One night after the other, with two workers of the local engine, its start-up left out: that is a
night of 1,000 vectors. Beside it is what reads and writes the same bytes with pyarrow alone: the
catalogue and the vectors of the day, and the Parquet files of `item_embeddings`, as many and
written alike; all columns but the vectors are there when its clock starts. The goal is 0.8 of its
rate. The night does more: it joins the catalogue, digests and normalises each vector, and checks
and digests what it writes. What pyarrow takes with these digests (hashlib) is told besides. Of the
second night 0.1% of the items are former ones.
"""

import argparse
import datetime as dt
import hashlib
import logging
import shutil
import tempfile
from functools import partial
from pathlib import Path

import nights
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from feature_jobs.store.encoder_info import VectorSource
from pipelines.artefacts import vectors
from pipelines.artefacts.vectors import Registration
from pipelines.config import load_settings
from pipelines.stages import EMBED

DAYS = (dt.date(2026, 1, 5), dt.date(2026, 1, 6))
FILES, GROUP_ROWS = 8, 32_768


def write_shop(top: Path, items: int, dimension: int) -> Path:
    """Writes two days of a catalogue and their vectors; returns the settings' path."""
    rng = np.random.default_rng(0)
    found = rng.standard_normal((items, dimension), np.float32)
    ids = np.arange(items)
    for number, day in enumerate(DAYS):
        left = items // 1000 * number
        if number:
            changed = rng.choice(items, items // 100, replace=False)
            found[changed] = rng.standard_normal((len(changed), dimension), np.float32)
        catalogue = {"item_id": ids[left:], "category": ["a"] * (items - left)}
        (top / "catalogue" / str(day)).mkdir(parents=True)
        pq.write_table(pa.table(catalogue), top / "catalogue" / str(day) / "0.parquet")
        (top / "vectors" / str(day)).mkdir(parents=True)
        for n in range(FILES):
            some = slice(n * items // FILES, (n + 1) * items // FILES)
            lists = pa.FixedSizeListArray.from_arrays(found[some].ravel(), dimension)
            path = top / "vectors" / str(day) / f"{n}.parquet"
            rows = pa.table({"item_id": ids[some], "embedding": lists})
            pq.write_table(
                rows, path, row_group_size=GROUP_ROWS, use_dictionary=False, compression="zstd"
            )
    config = top / "courier.toml"
    config.write_text(
        'root = "features"\ntables = "items"\n'
        '[catalogue]\npath = "catalogue/{ds}"\nimage_roots = []\n'
    )
    source = VectorSource("vectors/{ds}", "item_id", "embedding")
    wanted = Registration("clip", source, (), None, DAYS[0], False)
    stanza = vectors.register_vectors(
        wanted, load_settings(str(config)), str(top), str(top), lambda _: None
    )
    with config.open("a") as file:
        file.write(stanza)
    return config


def with_pyarrow(
    top: Path, day: dt.date, into: Path, known: pa.Table, files: int, digests: bool
) -> None:
    """Reads what the night reads of a shop and writes `item_embeddings` with the columns `known`.

    Vectors stand in the order of their table: which row is whose is not looked at. With `digests`
    each vector's and each file's sha256 is taken, as the table's law asks.
    """
    into.mkdir()
    pq.read_table(top / "catalogue" / str(day), partitioning=None)
    rows = pq.read_table(top / "vectors" / str(day), partitioning=None)
    if digests:
        for chunk in rows["embedding"].chunks:
            for vector in chunk.flatten().to_numpy().reshape(len(chunk), -1):
                hashlib.sha256(vector).hexdigest()
    rows = known.append_column("embedding", rows["embedding"].cast(pa.list_(pa.float32())))
    for n in range(files):
        start = n * len(rows) // files
        part = rows.slice(start, (n + 1) * len(rows) // files - start)
        pq.write_table(
            part, into / f"{n}.parquet", row_group_size=GROUP_ROWS, compression="zstd",
            use_dictionary=known.column_names, write_statistics=known.column_names,
        )  # fmt: skip
        if digests:
            with (into / f"{n}.parquet").open("rb") as file:
                hashlib.file_digest(file, "sha256")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--dimension", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mode", choices=nights.MODES, default="multi_processing")
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    print(nights.head())
    size = given.items * given.dimension * 4 / 1e9
    print(f"{given.items:,} vectors of {given.dimension}, {size:.2f} GB; night / pyarrow")
    with tempfile.TemporaryDirectory() as name:
        few = write_shop(Path(name) / "few", 1000, given.dimension)
        start_up = np.median([start(few, given.mode) for _ in range(3)])
        print(f"start-up {start_up:.1f} s, left out of what follows")
        top = Path(name) / "shop"
        config = write_shop(top, given.items, given.dimension)
        found: dict[str, list[tuple[float, float, float]]] = {"all new": [], "1% changed": []}
        for _ in range(given.rounds):
            shutil.rmtree(top / "features", ignore_errors=True)
            for what, day in zip(found, DAYS, strict=True):
                nights.touch_memory()
                made = nights.run_stage(config, day, EMBED.name, nights.local(given.mode))
                took, peak = made["seconds"] - start_up, made["peak_bytes"] / 1e9
                bare, digested = (beside(top, day, digests) for digests in (False, True))
                found[what].append((took, bare, digested))
                print(
                    f"  {what}: night {took:.1f} s, {peak:.1f} GB a process; pyarrow {bare:.1f} s, "
                    f"with digests {digested:.1f} s",
                    flush=True,
                )
        for what, times in found.items():
            took, bare, digested = map(np.asarray, zip(*times, strict=True))
            print(
                f"{what}: {np.median(took):.1f} s, {given.items / np.median(took):,.0f} items/s; "
                f"of pyarrow's rate {spread(bare / took)}, goal 0.8; with digests "
                f"{spread(digested / took)}"
            )


def start(few: Path, mode: str) -> float:
    """Returns the seconds of a night of few vectors."""
    shutil.rmtree(few.parent / "features", ignore_errors=True)
    nights.touch_memory()
    return nights.run_stage(few, DAYS[0], EMBED.name, nights.local(mode))["seconds"]


def beside(top: Path, day: dt.date, digests: bool) -> float:
    """Returns the seconds that pyarrow takes for the tables of a night that was made."""
    parts = sorted((top / "features/production/item_embeddings" / f"ds={day}").glob("*.parquet"))
    columns = [name for name in pq.read_schema(parts[0]).names if name != "embedding"]
    known = pq.read_table(parts, columns=columns)
    nights.touch_memory()
    into = top / "bare"
    took = nights.timed(partial(with_pyarrow, top, day, into, known, len(parts), digests))
    shutil.rmtree(into)
    return took


def spread(ratios: np.ndarray) -> str:
    return f"{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})"


if __name__ == "__main__":
    main()
