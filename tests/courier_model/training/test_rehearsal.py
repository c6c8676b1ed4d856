"""A rehearsal counts what the run does, tries its steps on noise, and adds up what they took."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from courier_model.training import rehearsal
from courier_model.training.distributed import Process
from courier_model.training.rehearsal import Noise, Rehearsal, rehearse
from courier_model.training.train import TrainingData
from feature_jobs.schemas import OperatorError
from tests.support.training_runs import ALONE, GOOD, ITEMS, STEPS, TINY, Run, copied

pytestmark = pytest.mark.usefixtures("one_thread", "small_encoders")
UNCACHED = replace(TINY, cache=False)
ONE = rehearsal._Tried(4, 2.0, 0.5, rehearsal._Memory(100, 140), None)


def test_what_is_counted_is_what_the_run_does(data: TrainingData, tmp_path: Path) -> None:
    run = Run(tmp_path, data, UNCACHED)
    found = rehearse(run.training, cached=False)
    again = Run(tmp_path, data, UNCACHED)
    record = again.go()
    assert found.steps == record.step == STEPS
    assert found.evaluations == len(record.measures) - 1  # a histogram takes no encoder
    assert found.images == ITEMS
    # Of a batch's items two have one image, and four have none.
    batch = again.training.batches[0]
    assert batch.images.shape[1] + batch.bad_images == ITEMS - 1
    assert found.batch_images == found.tried_images == ITEMS
    assert min(found.step, found.preparing, found.decoding_first, found.embedding) > 0
    assert found.memory > 10_000_000
    assert found.device_memory is None
    assert not list(tmp_path.glob("*/images")) + list(tmp_path.glob("images"))


def test_only_a_few_images_are_decoded_and_all_are_counted_for(
    data: TrainingData, tmp_path: Path
) -> None:
    training = Run(tmp_path, data, UNCACHED).training
    read: list[int] = []
    plain = training.cache.read

    def counted(codes: np.ndarray) -> Any:
        read.append(len(codes))
        return plain(codes)

    with (
        patch.object(training.cache, "read", counted),
        patch.object(rehearsal, "_DECODED", 4),
        patch.object(rehearsal, "_per_image", lambda look, codes: (look(codes), 0.5)[1]),
    ):
        once = rehearse(training, cached=True)
        always = rehearse(training, cached=False)
    assert read == [4, 4]
    held_out = len(training.evaluation.codes)
    assert once.decoding_first == always.decoding_first == 0.5 * held_out
    assert once.decoding_first + once.decoding == 0.5 * ITEMS
    assert once.embedding == 0.5 * once.evaluations * held_out
    shown = STEPS * once.batch_images + (1 + once.evaluations) * held_out  # with a histogram
    assert always.decoding_first + always.decoding == 0.5 * shown


def test_a_sample_is_embedded_for_the_pretrained_backbone_and_for_the_centre(
    data: TrainingData, tmp_path: Path
) -> None:
    plain = Run(tmp_path, data, UNCACHED).training
    pretrained = Run(tmp_path, data, replace(UNCACHED, centre=True)).training
    pretrained.settings = replace(pretrained.settings, weights="pretrained")
    with patch.object(rehearsal, "_per_image", return_value=0.5):
        once, more = rehearse(plain, cached=True), rehearse(pretrained, cached=True)
    sampled = len(np.union1d(plain.sample(), plain.evaluation.codes))
    assert more.embedding == once.embedding + 0.5 * 2 * sampled
    assert more.decoding_first == 0.5 * sampled
    assert more.decoding_first + more.decoding == 0.5 * ITEMS


def test_processes_share_what_is_decoded(data: TrainingData, tmp_path: Path) -> None:
    training = Run(tmp_path, data, UNCACHED).training
    with (
        patch.object(rehearsal, "_per_image", return_value=0.5),
        patch.object(rehearsal, "_try", return_value=ONE),
    ):
        alone = rehearse(training, cached=True)
        training.process = Process(0, 2, ALONE.device)
        with patch.object(rehearsal.distributed, "any_process", lambda flag, _: flag):
            half = rehearse(training, cached=True)
    assert half.decoding == alone.decoding / 2
    assert half.decoding_first == alone.decoding_first / 2


def test_a_device_that_is_too_small_is_told_as_in_training(
    data: TrainingData, tmp_path: Path
) -> None:
    training = Run(tmp_path, data, UNCACHED).training
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
    with (
        patch.object(training, "train_on", side_effect=full),
        pytest.raises(OperatorError, match=r"too small for this run: .*--chunk-images"),
    ):
        rehearse(training, cached=True)


def test_of_a_large_batch_a_part_is_tried_where_all_would_take_long(
    data: TrainingData, tmp_path: Path
) -> None:
    training = Run(tmp_path, data, UNCACHED).training
    with (
        patch.object(rehearsal, "_FIRST_IMAGES", 4),
        patch.object(rehearsal, "_try", return_value=ONE) as steps,
    ):
        found = rehearse(training, cached=True)
        assert [len(call.args[2]) for call in steps.call_args_list] == [1, 8]  # rows
        with patch.object(rehearsal, "_PATIENCE", 0.0):
            found = rehearse(training, cached=True)
        assert len(steps.call_args_list[2].args[2]) == 1
        assert len(steps.call_args_list) == 3
    share = found.batch_images / 4
    assert found.tried_images == 4 < found.batch_images
    assert (found.step, found.preparing) == (2.0 * share, 0.5 * share)


def test_steps_are_tried_as_they_are_once_the_backbone_learns(
    data: TrainingData, tmp_path: Path
) -> None:
    run = Run(tmp_path, data, replace(UNCACHED, freeze_backbone=2))
    before = copied(run.training.encoder.state_dict())
    rehearse(run.training, cached=True)
    after = run.training.encoder.state_dict()
    assert not torch.equal(before["backbone.0.weight"], after["backbone.0.weight"])


@pytest.mark.parametrize(("chunk", "wanted"), [(0, 140 + 40 * 2), (8, 140 + 40), (4, 140)])
def test_memory_grows_with_the_images_that_have_activations_at_a_time(
    chunk: int, wanted: int, data: TrainingData, tmp_path: Path
) -> None:
    training = Run(tmp_path, data, replace(UNCACHED, chunk_images=chunk)).training
    memory = rehearsal._Memory(before=100, peak=140)
    tried = rehearsal._Tried(4, 1.0, 1.0, memory, None)
    pixels = (12 - 4) * 3 * 32 * 32
    assert rehearsal._at_most(training, tried, memory, 12) == wanted + pixels
    assert rehearsal._at_most(training, tried, memory, 4) == 140


@pytest.mark.parametrize(
    ("workers", "wanted"), [(0, 10 * 2 + 10 * 1 + 40 + 22), (1, 50 + 22), (4, 20 + 22)]
)
def test_workers_decode_while_steps_are_made(workers: int, wanted: float) -> None:
    found = Rehearsal(
        images=1, batch_images=1, tried_images=1, step=2.0, preparing=1.0, decoding_first=7.0,
        decoding=40.0, embedding=15.0, memory=1, device_memory=None, steps=10, evaluations=3,
        workers=workers,
    )  # fmt: skip
    assert found.seconds == wanted


def test_noise_has_a_square_for_each_item() -> None:
    squares, keys, good = Noise(8).read(np.array(GOOD))
    assert squares.shape == (len(GOOD), 3, 8, 8)
    assert keys.tolist() == list(GOOD)
    assert good.all()
