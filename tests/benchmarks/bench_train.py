"""Measures how fast and large a training step is, beside what it wraps. `make bench` runs it.

    python tests/benchmarks/bench_train.py [--quick] [--gpu-paper] [--processes] [--workers 8]

On the device that is there, each figure a ratio within this run: training with its loader against a
bare step of the same backbone, timm's EfficientNet-Lite0 among them; swin_t of timm against
torchvision's; each distinct image once against every place of the rows; attention checkpointing and
cached gradients against a plain step, in time and memory; the loader against Pillow; on a CPU a
process on each core against one on all. --quick leaves swin_t out on a CPU, --gpu-paper takes the
paper's batch on one GPU instead, --libraries what is of timm alone. Peak memory on a CPU is that of
a process of its own (Linux).
"""

import argparse
import ctypes
import functools
import itertools
import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import nights
import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from PIL import Image

from courier_model.encoder import build_encoder, choose_device
from courier_model.training import distributed
from courier_model.training.distributed import Process
from courier_model.training.image_cache import ImageCache, Keys
from courier_model.training.memory import freeze_batch_statistics
from courier_model.training.rows import Batch, RowBatches, TrainingSet, batches
from courier_model.training.settings import PRESETS, TrainSettings
from courier_model.training.train import Training, TrainingData
from feature_jobs.store import threads
from pipelines.demo.garments import COLOURS, PATTERNS, TYPES, draw_item

ROUNDS = 3
DEVICE = choose_device()
ON_GPU = DEVICE.type == "cuda"
SWIN = replace(
    PRESETS["paper"], weights="random", batch_rows=16 if ON_GPU else 2, chunk_images=None,
    checkpoint_attention=False,
)  # fmt: skip


def timed(work: Callable[[], object]) -> float:
    finish()
    start = time.perf_counter()
    work()
    finish()
    return time.perf_counter() - start


def finish() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def median(values: list[float]) -> float:
    return float(np.median(values))


# ---- A made-up shop --------------------------------------------------------------------------


def draw_files(folder: Path, count: int, side: int, kinds: int = 40) -> list[str]:
    """Draws JPEGs of `kinds` garments; a comment makes the bytes of each file its own."""
    rng = np.random.default_rng(0)
    names = list(COLOURS)
    folder.mkdir()
    pictures = [
        draw_item(TYPES[k % len(TYPES)], names[k % len(names)], PATTERNS[k % 4], side, rng)
        for k in range(kinds)
    ]
    for n in range(count):
        pictures[n % kinds].save(folder / f"{n}.jpg", quality=88, comment=str(n))
    return [f"{n}.jpg" for n in range(count)]


def make_rows(uris: list[str], rows: int) -> TrainingSet:
    """Draws full rows of popular and less popular items, each of its own user, one PV clicked."""
    rng = np.random.default_rng(1)
    items = len(uris)
    popularity = 1 / np.arange(1, items + 1) ** 0.7
    codes = rng.choice(items, (rows, 10), p=popularity / popularity.sum())
    return as_set(codes, uris)


def as_set(codes: np.ndarray, uris: list[str]) -> TrainingSet:
    """Makes a set of int64 `[rows, 10]`: five PVs, the first of them clicked, and five clicks."""
    clicked = np.zeros((len(codes), 5), bool)
    clicked[:, 0] = True
    items = pa.table({"item_id": np.arange(len(uris)), "image_uri": uris, "title": uris})
    users, moments = np.arange(len(codes)), np.zeros(len(codes), np.int64)
    return TrainingSet(codes[:, :5], clicked, codes[:, 5:], users, moments, items)


def start_training(settings: TrainSettings, rows: TrainingSet, images: Path, top: Path) -> Training:
    data = TrainingData(rows, rows, rows.clicks, (str(images),), "bench")  # never measured
    folder = tempfile.mkdtemp(dir=top)
    return Training(settings, data, folder, Process(0, 1, DEVICE), lambda _: None)


# ---- Training against a bare step --------------------------------------------------------------


def bare_step(run: Training) -> Callable[[int], None]:
    """Returns a step of forward, backward and Adam on that many images of random pixels.

    It has the run's precision.
    """
    settings = run.settings
    size = run.encoder.preprocessing.input_size
    encoder = build_encoder(settings.backbone, "random", settings.input_size)
    backbone = encoder.backbone.train().to(DEVICE, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(backbone.parameters(), settings.learning_rate)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(run.precision)
    pixels = torch.rand(settings.batch_rows * 10, 3, size, size, device=DEVICE)
    pixels = pixels.contiguous(memory_format=torch.channels_last)

    def step(images: int) -> None:
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, dtype, enabled=dtype is not None):
            features = backbone(pixels[:images])
        features.float().square().mean().backward()
        optimizer.step()

    return step


def timed_steps(run: Training, stream: Iterable[Batch]) -> tuple[float, list[int]]:
    """Trains on `stream`, its loader in the loop; returns seconds and the images of each step."""
    sizes = []

    def go() -> None:
        for batch in stream:
            run.train_on(batch)
            sizes.append(batch.images.shape[1])

    return timed(go), sizes


def fill_cache(run: Training, items: int) -> None:
    run.batches._cache.read(np.arange(items))


def bench_steps(name: str, run: Training, items: int, rounds: int, steps: int) -> None:
    fill_cache(run, items)
    bare = bare_step(run)
    bare(run.settings.batch_rows)
    stream = iter(batches(run.batches, 0, 10**9, run.workers))
    run.train_on(next(stream))
    ours, limit, sizes = [], [], []
    for _ in range(rounds):  # in turn, since shared machines drift
        for batch in itertools.islice(stream, run.workers):  # made while the bare steps went on
            run.train_on(batch)
        seconds, sizes = timed_steps(run, itertools.islice(stream, steps))
        ours.append(sum(sizes) / seconds)
        limit.append(sum(sizes) / timed(functools.partial(all_of, bare, sizes)))
    ratios = [a / b for a, b in zip(ours, limit, strict=True)]
    print(
        f"  {name}: training {median(ours):.1f}, bare step {median(limit):.1f} images/s; ratio "
        f"median {median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f} ({run.precision}, "
        f"{run.settings.batch_rows} rows, {np.mean(sizes):.0f} images, {run.workers} workers)"
    )


def all_of(step: Callable[[int], None], sizes: list[int]) -> None:
    for images in sizes:
        step(images)


# ---- One network of two libraries --------------------------------------------------------------

TIMMS_SWIN = "timm:swin_tiny_patch4_window7_224"
LITE0 = replace(
    SWIN, backbone="timm:tf_efficientnet_lite0", input_size=96, batch_rows=64 if ON_GPU else 16
)


def bench_libraries(images: Path, uris: list[str], top: Path, workers: int | None) -> None:
    """Compares steps of training, loader included, with timm's swin_t and torchvision's."""
    print("swin_t of timm, against torchvision's: steps of training (goal 0.97)")
    rows = make_rows(uris, 64 * SWIN.batch_rows)
    streams = []
    for backbone in (SWIN.backbone, TIMMS_SWIN):
        settings = replace(SWIN, backbone=backbone, workers=workers)
        run = start_training(settings, rows, images, top)
        fill_cache(run, len(uris))
        streams.append((run, iter(batches(run.batches, 0, 10**9, run.workers))))
        run.train_on(next(streams[-1][1]))
    steps = 24 if ON_GPU else 2
    rates = np.array([[rate(*stream, steps) for stream in streams] for _ in range(2 * ROUNDS)])
    ratios = rates[:, 1] / rates[:, 0]
    theirs, timms = np.median(rates, axis=0)
    print(
        f"  torchvision {theirs:.1f}, timm {timms:.1f} images/s; ratio median "
        f"{np.median(ratios):.2f}, {ratios.min():.2f} to {ratios.max():.2f}"
    )


def bench_lite0(images: Path, uris: list[str], top: Path, workers: int | None) -> None:
    print("timm's EfficientNet-Lite0 with its loader, against a bare step (goal 0.85)")
    settings = replace(LITE0, workers=workers)
    run = start_training(settings, make_rows(uris, 64 * settings.batch_rows), images, top)
    bench_steps("lite0 at 96 px", run, len(uris), *((3, 24) if ON_GPU else (7, 2)))


def rate(run: Training, stream: Iterator[Batch], steps: int) -> float:
    seconds, sizes = timed_steps(run, itertools.islice(stream, steps))
    return sum(sizes) / seconds


# ---- Each distinct image once ------------------------------------------------------------------


def every_place(batch: Batch) -> Batch:
    """Returns the rows of `batch` with an image of its own for each of their places."""
    places = torch.cat([batch.pv, batch.clicks], dim=1)  # [B, 10], none masked in these rows
    flat, own = places.flatten(), torch.arange(places.numel()).view_as(places)
    return replace(
        batch,
        images=batch.images[:, flat],
        keys=batch.keys[flat],
        pv=own[:, :5].contiguous(),
        clicks=own[:, 5:].contiguous(),
    )


def bench_distinct(run: Training) -> None:
    batch = run.batches[0]
    spread = every_place(batch)
    times: dict[str, list[float]] = {"once": [], "every": []}
    run.train_on(batch)
    for _ in range(ROUNDS):
        times["once"].append(timed(lambda: run.train_on(batch)))
        times["every"].append(timed(lambda: run.train_on(spread)))
    once, every = (median(values) for values in times.values())
    rows, images = len(batch.pv), batch.images.shape[1]
    print(
        f"  every place {rows / every:8.1f}  each image once {rows / once:8.1f}  rows/s: "
        f"{every / once:.1f} times as fast; {10 * rows} places show {images} images, "
        f"{10 * rows / images:.1f} times fewer"
    )


# ---- Memory --------------------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, object]] = {
    "plain": {},
    "checkpointed attention": {"checkpoint_attention": True},
    "cached gradients": {"chunk_images": 32 if ON_GPU else 4},
    "both": {"checkpoint_attention": True, "chunk_images": 32 if ON_GPU else 4},
}


def bench_memory(rows: int) -> None:
    measured = {name: measure_apart(name, rows) for name in VARIANTS}
    plain = measured["plain"]
    for name, found in measured.items():
        print(
            f"  {name:23} peak {found['peak'] / 1e9:6.2f} GB above rest "
            f"({found['peak'] / plain['peak']:.2f} of plain), {found['seconds']:6.2f} s a step "
            f"({found['seconds'] / plain['seconds']:.2f} of plain)"
        )
    print(f"  ({plain['images']} images; at rest: weights, gradients and Adam's state)")


def measure_apart(name: str, rows: int) -> dict[str, float]:
    """Runs `measure` in a process of its own, since freed memory is not all given back."""
    command = [sys.executable, __file__, "--measure", name, "--rows", str(rows)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def measure(name: str, rows: int) -> None:
    """Prints peak bytes and seconds of a step, as JSON."""
    settings = replace(SWIN, batch_rows=rows, cache=False, **VARIANTS[name])
    with tempfile.TemporaryDirectory() as folder:
        top = Path(folder)
        uris = draw_files(top / "images", 10 * rows, 224)
        codes = np.arange(10 * rows).reshape(rows, 10)  # as many images as places
        run = start_training(settings, as_set(codes, uris), top / "images", top)
        batch = run.batches[0]
        run.train_on(run.batches.load(np.array([0]), 0))  # one row, for Adam's state
        rest = start_peak()
        seconds = timed(lambda: run.train_on(batch))
        found = {"peak": peak() - rest, "seconds": seconds, "images": batch.images.shape[1]}
    print(json.dumps(found))


def start_peak() -> int:
    """Forgets the peak of memory so far; returns the bytes in use."""
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)  # what the step before has freed
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def peak() -> int:
    return torch.cuda.max_memory_allocated() if ON_GPU else resident("VmHWM")


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


# ---- The loader alone ------------------------------------------------------------------------


def bench_loader(images: Path, uris: list[str], top: Path) -> None:
    preprocessing = build_encoder("swin_t", "random").preprocessing
    paths = [images / uri for uri in uris]
    bare = len(paths) / timed(lambda: [pillow(path, preprocessing.resize_size) for path in paths])
    print(f"  Pillow, decode and resize, one process: {bare:8.1f} images/s")
    rows = as_set(np.arange(len(uris)).reshape(-1, 10), uris)
    for augmentation, views in (("crop", 1), ("simclr", 2)):
        for workers in (0, 2):
            folder = tempfile.mkdtemp(dir=top)
            cache = ImageCache(folder, rows.items["image_uri"], [str(images)], preprocessing)
            dataset = RowBatches(rows, cache, views, augmentation, preprocessing.input_size, 1, 0)
            first, cached = loader_rates(dataset, workers)
            print(
                f"  {augmentation:6} {workers} workers: first epoch {first:8.1f} "
                f"({first / bare:5.2f} of Pillow), cached {cached:8.1f} ({cached / bare:6.2f}) "
                f"images/s, {views} view{'s' * (views > 1)} of each"
            )


def pillow(path: Path, side: int) -> np.ndarray:
    picture = Image.open(path).convert("RGB")
    return np.asarray(picture.resize((side, side), Image.Resampling.BILINEAR))


def loader_rates(dataset: RowBatches, workers: int) -> tuple[float, float]:
    """Returns images/s of the first epoch, after the workers' start, and of the second."""
    epoch = dataset.steps_per_epoch
    stream = iter(batches(dataset, 0, 2 * epoch, workers))
    before = len([*itertools.islice(stream, 1 + 2 * workers)])
    rates = []
    for steps in (epoch - before, epoch):
        seconds = timed(lambda steps=steps: drain(itertools.islice(stream, steps)))
        rates.append(10 * steps / seconds)
    return rates[0], rates[1]


def drain(stream: Iterator[Batch]) -> None:
    for _ in stream:
        pass


# ---- The paper's batch on one GPU --------------------------------------------------------------


class RandomCache(ImageCache):
    """Gives pixels as if cached: of a few random squares, each item its own content."""

    def read(self, codes: Keys) -> tuple[np.ndarray, Keys, np.ndarray]:
        rng = np.random.default_rng(0)
        squares = rng.integers(0, 256, (64, 3, self.side, self.side), np.uint8)
        return squares[codes % len(squares)], codes, np.ones(len(codes), bool)


def bench_paper(workers: int | None) -> None:
    if not ON_GPU:
        print("left out: no CUDA device here")
        return
    paper = replace(PRESETS["paper"], weights="random", workers=workers, cache=False)
    print(f"{paper.backbone}, {paper.batch_rows:,} rows a step on one card, random pixels")
    rows = make_rows([str(n) for n in range(100_000)], 3 * paper.batch_rows)
    with tempfile.TemporaryDirectory() as folder:
        for checkpoints in (True, False):
            settings = replace(paper, checkpoint_attention=checkpoints)
            run = start_training(settings, rows, Path(folder), Path(folder))
            print(f"  attention {'' if checkpoints else 'not '}checkpointed:", paper_steps(run))
            del run  # its weights, before the peak of the next


def paper_steps(run: Training, steps: int = 2) -> str:
    """Says what so many steps take, after one to begin with."""
    pixels = run.encoder.preprocessing
    run.batches._cache = RandomCache(None, pa.nulls(0, pa.string()), ["."], pixels)
    stream = iter(batches(run.batches, 0, steps + 1, run.workers))
    run.train_on(next(stream))
    start_peak()
    seconds, sizes = timed_steps(run, stream)
    settings = run.settings
    return (
        f"{sum(sizes) / seconds:,.0f} images/s, {steps * settings.batch_rows / seconds:,.0f} "
        f"rows/s, peak {peak() / 1e9:.1f} GB; {seconds / steps:.1f} s and "
        f"{sum(sizes) / steps:,.0f} distinct images a step, chunks of {settings.chunk_images}, "
        f"{pixels.input_size} pixels, {run.precision}, {run.workers} workers"
    )


# ---- Processes against threads ---------------------------------------------------------------


STEPS = {32: (120, 4), 96: (40, 2)}  # pixels -> images of a step, steps


def bench_processes() -> None:
    """Compares a gloo process on each core with one on all, forward and backward, resnet18.

    `train` leaves it to torchrun: sums of gradients are rounded otherwise, and an encoder would
    depend on how many cores the machine had that trained it.
    """
    print("A gloo process on each core, against one process on all")
    cores = threads.cores()
    rates = []
    for _ in range(ROUNDS):  # in turn, since shared machines drift
        for processes in (1, cores):
            with tempfile.TemporaryDirectory() as meeting:
                torch.multiprocessing.spawn(gloo_steps, (processes, meeting), processes)
                rates.append(json.loads(Path(meeting, "rates").read_text()))
    for at, side in enumerate(STEPS):
        one, several = (np.array([found[at] for found in rates[n::2]]) for n in range(2))
        ratios = several / one
        print(
            f"  {side} px: {np.median(one):.1f} images/s in one process of {cores} threads, "
            f"{np.median(several):.1f} in {cores} of one: {np.median(ratios):.2f} of it, "
            f"{ratios.min():.2f} to {ratios.max():.2f}"
        )


def gloo_steps(rank: int, processes: int, meeting: str) -> None:
    """Takes steps in one process of a group; the first writes images/s below `meeting`."""
    torch.set_num_threads(threads.cores() // processes)
    address = f"file://{meeting}/group"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=processes)
    rates = []
    for side, (images, steps) in STEPS.items():
        step = gloo_step(side, images // processes)
        step()
        dist.barrier()
        rates.append(steps * images / timed(lambda: [step() for _ in range(steps)]))  # noqa: B023
    if rank == 0:
        Path(meeting, "rates").write_text(json.dumps(rates))
    dist.destroy_process_group()


def gloo_step(side: int, images: int) -> Callable[[], None]:
    encoder = build_encoder("resnet18", "random", input_size=side).train()
    encoder.to(memory_format=torch.channels_last)
    freeze_batch_statistics(encoder)
    pixels = torch.randint(0, 256, (images, 3, side, side), dtype=torch.uint8)

    def step() -> None:
        encoder.zero_grad()
        distributed.gather(encoder.features(pixels)).square().mean().backward()
        distributed.sum_gradients(encoder.parameters())

    return step


# ---- The script ------------------------------------------------------------------------------


def bench_all(top: Path, quick: bool, workers: int | None) -> None:
    images = top / "images"
    uris = draw_files(images, 600, 256)
    demo, swin = replace(PRESETS["demo"], workers=workers), replace(SWIN, workers=workers)
    has_swin = ON_GPU or not quick
    print("Training with its loader, images cached, against a bare step (goal 0.85)")
    run = start_training(demo, make_rows(uris, 4 * demo.batch_rows), images, top)
    bench_steps("demo preset, resnet18 at 32 px", run, len(uris), *((3, 24) if ON_GPU else (7, 1)))
    if has_swin:
        run = start_training(swin, make_rows(uris, 64 * swin.batch_rows), images, top)
        bench_steps("swin_t at 224 px", run, len(uris), *((3, 24) if ON_GPU else (3, 1)))
    bench_lite0(images, uris, top, workers)
    if has_swin:
        bench_libraries(images, uris, top, workers)
    print("Each distinct image once, against every place of the same rows: demo preset, 256 rows")
    run = start_training(replace(demo, batch_rows=256), make_rows(uris, 256), images, top)
    bench_distinct(run)
    print("Loader alone, swin_t's 224 pixels from JPEGs of 256")
    bench_loader(images, uris[:300], top)
    if not ON_GPU and threads.cores() > 1:
        bench_processes()
    if has_swin:
        print("Memory and time of a step, swin_t at 224 px")
        bench_memory(SWIN.batch_rows)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="no swin_t on a CPU")
    parser.add_argument("--gpu-paper", action="store_true", help="the paper's batch alone")
    parser.add_argument("--processes", action="store_true", help="against threads, that alone")
    parser.add_argument("--libraries", action="store_true", help="what is of timm, that alone")
    parser.add_argument("--workers", type=int, help="of the loader [default on a CPU: 0]")
    parser.add_argument("--measure", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, default=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        measure(given.measure, given.rows)
        return
    logging.disable(logging.WARNING)
    device = torch.cuda.get_device_name() if ON_GPU else f"{torch.get_num_threads()} threads"
    print(f"{nights.head()}, {device}")
    if given.gpu_paper:
        bench_paper(given.workers)
        return
    if given.processes:
        bench_processes()
        return
    # Alone with two cores a worker would take one from the step itself, as the demo preset says.
    workers = 0 if given.workers is None and not ON_GPU else given.workers
    with tempfile.TemporaryDirectory() as folder:
        top = Path(folder)
        if given.libraries:
            uris = draw_files(top / "images", 600, 256)
            bench_lite0(top / "images", uris, top, workers)
            bench_libraries(top / "images", uris, top, workers)
        else:
            bench_all(top, given.quick, workers)


if __name__ == "__main__":
    main()
