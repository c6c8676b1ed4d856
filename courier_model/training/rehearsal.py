"""Finds out what a training run will take, without beginning it: a dry run.

A few steps are made on noise, since what an image shows takes no time, and some images are decoded.
Where a whole batch would take long, part of it is tried, and what it takes grows with its images.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from courier_model.training import distributed, evaluate, memory
from courier_model.training.rows import Codes, Flags, Pixels, RowBatches
from courier_model.training.train import Training
from feature_jobs.store import usage

_FIRST_IMAGES = 256  # tried at first
_PATIENCE = 20.0  # seconds: whole batches are tried where a step takes no longer
_DECODED, _EMBEDDED = 64, 128  # images


@dataclass(frozen=True)
class Rehearsal:
    """Holds what a run will take. Times are in seconds, memory in bytes.

    `images` are the distinct items of all rows, held out ones too. A step's time is that of
    `batch_images`; it was tried on `tried_images`, and all else of it estimated. Preparing makes a
    batch of squares that are decoded already. `decoding_first` is of images that are looked at
    before the first step, `decoding` of all others; `embedding` is of all that is measured.
    `memory` is what this process will have resident, workers aside, and `device_memory` what the
    GPU will have allocated, None without one.
    """

    images: int
    batch_images: int
    tried_images: int
    step: float
    preparing: float
    decoding_first: float
    decoding: float
    embedding: float
    memory: int
    device_memory: int | None
    steps: int
    evaluations: int
    workers: int

    @property
    def seconds(self) -> float:
        """Returns the time of the whole run. Workers decode and prepare while steps are made."""
        shown = self.steps * self.preparing + self.decoding
        steps = self.steps * self.step
        steps = max(steps, shown / self.workers) if self.workers else steps + shown
        return self.decoding_first + steps + self.embedding


def rehearse(run: Training, cached: bool) -> Rehearsal:
    """Tries what `run` will do, which was made without an image cache and is of no use then.

    With `cached` its images are decoded once, else whenever they are shown. Raises as steps do.
    """
    with memory.enough():
        return _rehearse(run, cached)


def _rehearse(run: Training, cached: bool) -> Rehearsal:
    settings, codes = run.settings, run.evaluation.codes
    step = min(settings.freeze_backbone, run.steps - 1)  # those after it take longer
    noise = Noise(run.cache.side)
    batches = run.make_batches(noise)
    rows = batches.rows_of(step)
    whole = len(batches.items_of(rows))
    part = rows[: _enough(batches, rows, max(_FIRST_IMAGES, settings.chunk_images))]
    tried = _try(run, batches, part, step)
    is_quick = tried.seconds * whole / tried.images < _PATIENCE
    if distributed.any_process(is_quick and len(part) < len(rows), run.process.device):
        tried = _try(run, batches, rows, step)
    seen = np.union1d(batches.items_of(np.arange(len(run.rows))), codes)
    evaluations = 1 + -(-run.steps // settings.evaluate_every)
    sampled = len(np.union1d(run.sample(), codes))
    first = sampled if run.measures_principal else len(codes)
    embedded = evaluations * len(codes) + sampled * (run.measures_principal + settings.centre)
    # Of what processes share, each sees to its part.
    shared = len(seen) - first if cached else len(codes) + embedded - first
    decoded = shared / run.process.size + (0 if cached else run.steps * whole)
    decoding = _per_image(run.cache.read, _spread(seen, _DECODED))
    device = tried.device
    return Rehearsal(
        images=len(seen),
        batch_images=whole,
        tried_images=tried.images,
        step=tried.seconds * whole / tried.images,
        preparing=tried.preparing * whole / tried.images,
        decoding_first=decoding * first / run.process.size,
        decoding=decoding * decoded,
        embedding=embedded * _per_image(partial(_embed, run, noise), _spread(codes, _EMBEDDED)),
        memory=_at_most(run, tried, tried.host, whole),
        device_memory=_at_most(run, tried, device, whole) if device else None,
        steps=run.steps,
        evaluations=evaluations,
        workers=run.workers,
    )


class Noise:
    """Has for each item a square of `side` pixels of noise, each of its own content."""

    def __init__(self, side: int) -> None:
        self._side = side

    def read(self, codes: Codes) -> tuple[Pixels, Codes, Flags]:
        rng = np.random.default_rng(0)
        squares = rng.integers(0, 256, (len(codes), 3, self._side, self._side), np.uint8)
        return squares, codes, np.ones(len(codes), bool)


# ---- A step ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Memory:
    """Holds bytes before a step, and the most while it was made."""

    before: int
    peak: int


@dataclass(frozen=True)
class _Tried:
    """Holds what a step on so many `images` took."""

    images: int
    seconds: float
    preparing: float
    host: _Memory
    device: _Memory | None


def _enough(batches: RowBatches, rows: Codes, images: int) -> int:
    """Returns how many of the rows show so many images, or all."""
    count = 1
    while count < len(rows) and len(batches.items_of(rows[:count])) < images:
        count *= 2
    return min(count, len(rows))


def _try(run: Training, batches: RowBatches, rows: Codes, step: int) -> _Tried:
    """Makes a step on `rows` twice: the first time pays for what happens once."""
    began = time.perf_counter()
    batch = batches.load(rows, step)
    preparing = time.perf_counter() - began
    run.train_on(batch)
    device = run.process.device
    before, on_device = _resident(), _allocated(device)
    began = time.perf_counter()
    run.train_on(batch)
    at_most = _allocated(device)  # which waits for the device
    seconds = time.perf_counter() - began
    return _Tried(
        images=batch.images.shape[1],
        seconds=seconds,
        preparing=preparing,
        host=_Memory(before, usage.take().peak_memory_bytes),
        device=_Memory(on_device[0], at_most[1]) if on_device and at_most else None,
    )


def _resident() -> int:
    """Returns the bytes of this process now; from here on its peak is counted anew."""
    usage.take()
    return usage.take().peak_memory_bytes


def _allocated(device: torch.device) -> tuple[int, int] | None:
    """Returns the bytes allocated on the device now, and the most since this was last asked."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    found = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return found


def _at_most(run: Training, tried: _Tried, memory: _Memory, images: int) -> int:
    """Estimates the memory of a step on so many images from that of the tried ones.

    What has activations at a time, a chunk or all images, takes what it took; more images are more
    pixels besides.
    """
    together = min(images, run.settings.chunk_images or images)
    grown = (memory.peak - memory.before) * max(0.0, together / tried.images - 1)
    size = run.encoder.preprocessing.input_size
    pixels = max(0, images - tried.images) * run.objective.views * 3 * size**2
    return round(memory.peak + grown + pixels)


# ---- Images ------------------------------------------------------------------------------------


def _spread(codes: Codes, count: int) -> Codes:
    """Returns so many of sorted codes, or all of them, at equal distances."""
    return codes[np.unique(np.linspace(0, len(codes) - 1, count).astype(np.int64))]


def _embed(run: Training, noise: Noise, codes: Codes) -> None:
    encoder = run.encoder.eval()
    features = partial(run.compute, encoder.features)
    evaluate.embed(noise, codes, features, encoder.preprocessing.input_size, run.process)


def _per_image(look: Callable[[Codes], object], codes: Codes) -> float:
    """Returns the seconds that looking at an image takes, the first one aside."""
    look(codes[:1])
    began = time.perf_counter()
    look(codes)
    return (time.perf_counter() - began) / len(codes)
