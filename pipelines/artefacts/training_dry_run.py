"""Says what a `courier train` would take, for `--dry-run`."""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace

from courier_model.training import checkpoints
from courier_model.training.distributed import Process
from courier_model.training.rehearsal import Rehearsal, rehearse
from courier_model.training.settings import TrainSettings
from courier_model.training.train import Training, TrainingData, images_folder
from pipelines.running.estimates import duration, size


def run(
    wanted: TrainSettings, data: TrainingData, folder: str, process: Process,
    say: Callable[[str], None],
) -> list[str]:  # fmt: skip
    """Returns, in lines, what the run in `folder` would take; nothing is written.

    Raises what its first steps would.
    """
    run = Training(replace(wanted, cache=False), data, folder, process, say)
    needed, free = run.cache.bytes_needed, _free(folder)
    fits = needed <= free or os.path.isdir(images_folder(folder))
    found = rehearse(run, wanted.cache and fits)
    return list(_describe(run, found, data, wanted.cache, fits, folder, free))


def _free(folder: str) -> int:
    """Returns the bytes that are free where the folder will lie."""
    folder = os.path.abspath(folder)
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return shutil.disk_usage(folder).free


def _describe(
    run: Training, found: Rehearsal, data: TrainingData, cache: bool, fits: bool, folder: str,
    free: int,
) -> Iterator[str]:  # fmt: skip
    settings, rows = run.settings, run.rows
    yield (
        f"train: {len(rows):,} rows to learn from, with {int(rows.clicked.sum()):,} clicked images "
        f"of {len(data.train):,} rows; measured on {len(data.held_out):,} later ones"
    )
    needed = run.cache.bytes_needed
    if not cache:
        kept = "no image cache, every epoch decodes again"
    elif fits:
        kept = f"an image cache of up to {size(needed)}, where {size(free)} are free"
    else:
        kept = (
            f"no image cache, which could take {size(needed)} of the {size(free)} that are free at "
            f"{folder}: every epoch decodes again"
        )
    yield f"train: {found.images:,} distinct images; {kept}"
    yield (
        f"train: {found.steps:,} steps of {settings.batch_rows:,} rows, which show about "
        f"{found.batch_images * run.process.size:,} images; {found.evaluations:,} evaluations on "
        f"{len(run.evaluation.codes):,} images"
    )
    part = ""
    if found.tried_images < found.batch_images:
        part = f", estimated from one on {found.tried_images:,} images"
    rate = found.batch_images * run.objective.views * run.process.size / found.step
    yield (
        f"train: a step takes {found.step:,.1f} s on {run.process.device_name} in "
        f"{run.precision}{part}: {rate:,.0f} images/s"
    )
    memory = f"{size(found.memory)} of memory at most"
    if found.workers:
        memory += f", and {found.workers} workers with a batch of pixels each"
    if found.device_memory:
        memory += f"; {size(found.device_memory)} on the GPU"
    yield f"train: {memory}"
    yield (
        f"train: about {duration(found.seconds)} in all: steps "
        f"{duration(found.steps * found.step)}, decoding "
        f"{duration(found.decoding_first + found.decoding)}, measuring "
        f"{duration(found.embedding)}. Nothing was written."
    )
    if checkpoints.are_in(os.path.join(folder, "checkpoints")):
        yield f"train: that is from the start; {folder} has checkpoints, from which it goes on"
