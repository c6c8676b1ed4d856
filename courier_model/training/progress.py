"""Tracks how far a training run is: for whoever watches, for TensorBoard, and when to save."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch.utils.tensorboard import SummaryWriter

_SAVE_SECONDS = 600.0  # between checkpoints, where no evaluation comes first


@dataclass(frozen=True)
class Progress:
    """Tells whoever watches where a run is; the loss is the sum of the objective's terms."""

    step: int
    steps: int
    loss: float
    images_per_second: float
    seconds_left: float


class Board:
    """Writes scalars for TensorBoard; hides what a killed run wrote from step `first` on."""

    def __init__(self, folder: str, first: int) -> None:
        self._writer = SummaryWriter(os.path.join(folder, "tensorboard"), purge_step=first)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()


class Clock:
    """Measures a run's time over all its sessions, and the rates of this one, evaluations aside."""

    def __init__(self, seconds_before: float) -> None:
        self._before = seconds_before
        self._started = self._saved = time.monotonic()
        self._paused = 0.0
        self._steps = self._images = 0

    def seconds(self) -> float:
        return self._before + time.monotonic() - self._started

    def images_per_second(self, images: int) -> float:
        """Returns this session's rate, after one more step of `images` images."""
        self._steps += 1
        self._images += images
        return self._images / self._training_seconds()

    def seconds_left(self, steps: int) -> float:
        return steps * self._training_seconds() / self._steps

    def _training_seconds(self) -> float:
        return time.monotonic() - self._started - self._paused

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        before = time.monotonic()
        yield
        self._paused += time.monotonic() - before

    def is_time_to_save(self) -> bool:
        return time.monotonic() - self._saved > _SAVE_SECONDS

    def saved(self) -> None:
        self._saved = time.monotonic()
