"""Measures SIMSCORE and EMBED on a Flink cluster of this machine, beside the local engine.

    PYTHONPATH=. python tests/benchmarks/bench_clusters.py [--items 100000] [--impressions 1000000]
        [--rounds 3] [--memory 1000000,10000000]

`make bench` runs it; it needs Java, and Maven where the cluster's jars are not in the cache yet.
The cluster and its job server stand; it has as many task managers of one slot each as the local
engine has processes. Both engines' workers compute on one thread each for two cores: a host does
not know how many workers a cluster gives it, so the settings say it.

1. SIMSCORE by either join, and EMBED with a small real encoder over as many small images as there
   are items: rows a second of the command, on Flink and locally in turn (goal: 0.8 of the local
   rate). Start-up is left out: the same command over a few rows, which on Flink starts workers too.
   The classes that Flink's first job loads are loaded before. Both engines make the same files.
2. Bytes that Flink's tasks hand to one another, for each impression (goal: at most 64). It counts
   what goes to the next task on the same host, too.
3. --memory: the peak of Flink's worker processes at so many impressions of SIMSCORE, by either join
   (goal: the largest at most 1.1 of the smallest).
"""

import argparse
import contextlib
import logging
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import bench_simscore
import nights
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from bench_simscore import DAY
from PIL import Image

from courier_model.encoder import build_encoder, save_encoder
from feature_jobs.impressions.simscore import BROADCAST, SHUFFLE
from feature_jobs.schemas import ITEM_EMBEDDINGS, USER_SIMSCORES
from feature_jobs.store import threads
from tests.support import cluster_packages, clusters
from tests.support.clusters import Flink

RATE_GOAL, BYTES_GOAL, MEMORY_GOAL = 0.8, 64, 1.1
LOCALLY = nights.local("multi_processing")
SIDE = 32  # of an image, in pixels
FEW_IMAGES = 512  # two chunks, so that both workers load the encoder
THREADS = f"[workers]\nthreads = {max(1, threads.cores() // nights.WORKERS)}\n"
WORKER = b"pipelines.running.worker_boot"
SAMPLED_SECONDS = 0.1


@dataclass(frozen=True)
class Work:
    """Describes a stage to be measured: `write` gives it so many rows to read, `few` or `many`."""

    name: str
    stage: str
    settings: Path
    table: str
    write: Callable[[int], None]
    few: int
    many: int

    @property
    def published(self) -> Path:
        features = self.settings.parent / "features" / "production"
        return features / self.table / f"ds={DAY}"


@dataclass(frozen=True)
class Ran:
    """Holds what a command took; of one on Flink, what its job wrote and its workers needed."""

    rows: int
    seconds: float
    files: tuple[str, ...]
    shuffled_bytes: int = 0
    peak_bytes: int = 0


# ---- What is made ------------------------------------------------------------------------------


def simscore(top: Path, items: int, impressions: int, join: str) -> Work:
    """Makes a shop whose impressions are scored by one `join`."""
    top.mkdir()
    shop = bench_simscore.make_shop(top, items)
    plain = shop.settings.read_text()
    shop.settings.write_text(f'{plain}{THREADS}[simscore]\nembeddings_by = "{join}"\n')

    def write(rows: int) -> None:
        bench_simscore.write_log(shop, items, rows)

    name, table = f"SIMSCORE, {join}", USER_SIMSCORES.name
    return Work(
        name, "simscore", shop.settings, table, write, few=bench_simscore.FEW, many=impressions
    )


def embed(top: Path, images: int) -> Work:
    """Makes a shop of so many small images, each another, and a small encoder for them."""
    (top / "images").mkdir(parents=True)
    rng = np.random.default_rng(2)
    for number in range(images):
        image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
        image.resize((SIDE, SIDE)).save(top / "images" / f"{number}.jpg")
    encoder = build_encoder("shufflenet_v2_x0_5", "random", input_size=SIDE)
    info = save_encoder(encoder, str(top), "bench", None, None, None, "random")
    settings = top / "courier.toml"
    settings.write_text(
        f'root = "features"\n[catalogue]\npath = "catalogue"\nimage_roots = ["images"]\n{THREADS}'
        f'[impressions]\npath = "impressions/{{ds}}"\n'
        f'[[pins]]\nfrom_ds = {DAY}\nencoder = "{info.encoder_id}"\n'
    )

    def write(rows: int) -> None:
        uris = [f"{number}.jpg" for number in range(rows)]
        table = pa.table({"item_id": np.arange(rows), "image_uri": uris, "category": ["a"] * rows})
        (top / "catalogue").mkdir(exist_ok=True)
        pq.write_table(table, top / "catalogue" / "0.parquet", row_group_size=65_536)

    return Work(
        "EMBED", "embed", settings, ITEM_EMBEDDINGS.name, write, few=FEW_IMAGES, many=images
    )


# ---- Running it --------------------------------------------------------------------------------


def run(work: Work, options: Sequence[str]) -> Ran:
    """Makes the stage over what was written, whatever was published before."""
    shutil.rmtree(work.published, ignore_errors=True)
    found = nights.run_stage(work.settings, DAY, work.stage, options)
    files = sorted(path.name for path in work.published.glob("part-*"))
    return Ran(found["rows"], found["seconds"], tuple(files))


def run_on(flink: Flink, work: Work) -> Ran:
    """Makes the stage on Flink, once the workers of the job before have ended."""
    while worker_peaks(flink):
        time.sleep(SAMPLED_SECONDS)
    with peak_of_workers(flink) as peaks:
        found = run(work, flink.options)
    return Ran(found.rows, found.seconds, found.files, shuffled_bytes(flink), max(peaks))


def shuffled_bytes(flink: Flink) -> int:
    """Returns what the tasks of the newest job handed to one another."""
    newest = max(flink.ask("jobs/overview")["jobs"], key=lambda job: job["start-time"])
    steps = flink.ask(f"jobs/{newest['jid']}")["vertices"]
    return sum(step["metrics"]["write-bytes"] for step in steps)


@contextlib.contextmanager
def peak_of_workers(flink: Flink) -> Iterator[list[int]]:
    """Gives a list that gets the largest peak of memory of a worker, in bytes, again and again.

    Again, since a worker that tells what it used (`usage`) has its peak begin anew.
    """
    peaks, over = [0], threading.Event()

    def sample() -> None:
        while not over.wait(SAMPLED_SECONDS):
            peaks.extend(worker_peaks(flink))

    sampling = threading.Thread(target=sample)
    sampling.start()
    try:
        yield peaks
    finally:
        over.set()
        sampling.join()


def worker_peaks(flink: Flink) -> list[int]:
    """Returns the peak of memory of each Python worker of the cluster that runs now, in bytes."""
    group, found = os.getpgid(flink.processes.named["jobserver"].pid), []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if os.getpgid(int(process.name)) != group:
                continue
            if WORKER in (process / "cmdline").read_bytes():
                told = re.search(r"VmHWM:\s+(\d+) kB", (process / "status").read_text())
                found += [int(told[1]) * 1024] if told else []
    return found


# ---- Measuring it ------------------------------------------------------------------------------


def bench_rates(flink: Flink, works: Sequence[Work], rounds: int) -> None:
    """Prints each stage's rates on both engines, and what it sent through Flink."""
    for work in works:
        work.write(work.few)
        run_on(flink, work)  # loads the classes
        found = [one_round(flink, work) for _ in range(rounds)]
        here, there, sent = np.median(found, axis=0)
        ratio = float(np.median([on_flink / locally for locally, on_flink, _ in found]))
        print(
            f"  {work.name}: {there:,.0f} rows/s on Flink, {here:,.0f} locally: {ratio:.2f} "
            f"(goal {RATE_GOAL}); {sent:.1f} bytes shuffled a row{goal_of_bytes(work)}",
            flush=True,
        )


def goal_of_bytes(work: Work) -> str:
    return f" (goal {BYTES_GOAL})" if work.stage == "simscore" else ""


def one_round(flink: Flink, work: Work) -> tuple[float, float, float]:
    """Returns rows a second locally and on Flink, and bytes a row that went through Flink."""
    ways: list[Callable[[], Ran]] = [lambda: run(work, LOCALLY), lambda: run_on(flink, work)]
    taken = []
    for rows in (work.few, work.many):
        work.write(rows)
        taken.append([way() for way in ways])
        assert len({ran.files for ran in taken[-1]}) == 1, "the engines made other bytes"
    rates = [
        (many.rows - few.rows) / (many.seconds - few.seconds)
        for few, many in zip(*taken, strict=True)
    ]
    sent = taken[1][1]
    for name, few, many in zip(("locally", "on Flink"), *taken, strict=True):
        print(
            f"    {name}: {few.rows:,} rows in {few.seconds:.1f} s, {many.rows:,} in "
            f"{many.seconds:.1f} s",
            flush=True,
        )
    return rates[0], rates[1], sent.shuffled_bytes / sent.rows


def bench_memory(flink: Flink, work: Work, sizes: Sequence[int]) -> None:
    """Prints the peak of Flink's workers over so many impressions each."""
    peaks = []
    for rows in sizes:
        work.write(rows)
        found = run_on(flink, work)
        peaks.append(found.peak_bytes)
        print(
            f"  {work.name}: {rows:,} impressions in {found.seconds:.1f} s, a worker's peak "
            f"{found.peak_bytes / 1e9:.2f} GB",
            flush=True,
        )
    print(f"    the largest {max(peaks) / min(peaks):.2f} of the smallest (goal {MEMORY_GOAL})")


def bench(top: Path, given: argparse.Namespace) -> None:
    scored = [
        simscore(top / join, given.items, given.impressions, join) for join in (BROADCAST, SHUFFLE)
    ]
    with clusters.flink(top / "flink", nights.WORKERS) as flink:
        bench_rates(flink, [*scored, embed(top / "embed", given.items)], given.rounds)
        for work in scored if given.memory else ():
            bench_memory(flink, work, [int(rows) for rows in given.memory.split(",")])


def missing() -> str:
    """Returns what a cluster lacks here; nothing where it has all."""
    if shutil.which("java") is None:
        return "there is no java on PATH"
    try:
        cluster_packages.jars("flink")
    except cluster_packages.NotFetched as error:
        return str(error)
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--impressions", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", help="numbers of impressions, as in 1000000,10000000")
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    print(nights.head())
    if found := missing():
        print(f"Nothing on Flink is measured: {found}")
        return
    print(f"On Flink, {given.items:,} items, {given.impressions:,} impressions", flush=True)
    with tempfile.TemporaryDirectory() as name:
        bench(Path(name), given)


if __name__ == "__main__":
    main()
