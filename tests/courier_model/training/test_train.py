"""A run of training learns, counts, keeps and tells what it should; two processes learn as one."""

import math
import os
import shutil
import socket
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor, multiprocessing

from courier_model.measures import Estimate, HeldOut
from courier_model.training import distributed
from courier_model.training import train as training_job
from courier_model.training.distributed import Process
from courier_model.training.objectives import Courier
from courier_model.training.rows import TrainingSet
from courier_model.training.settings import TEMPERATURES, TrainSettings
from courier_model.training.train import Stopped, TrainingData
from feature_jobs.schemas import DataContractError
from tests.support.training_runs import (
    ALONE,
    BAD,
    GOOD,
    MISSING,
    STEPS,
    TINY,
    Run,
    parameters,
    same,
    small_encoder,
    some_rows,
    training_data,
)

pytestmark = pytest.mark.usefixtures("one_thread", "small_encoders")


# ---- A step ----------------------------------------------------------------------------------


def test_cached_gradients_of_a_step_are_those_of_the_whole_batch(
    data: TrainingData, tmp_path: Path
) -> None:
    gradients, losses = [], []
    for chunk in (10_000, 5):  # with either, batch statistics are frozen
        run = Run(tmp_path / str(chunk), data, replace(TINY, chunk_images=chunk))
        batch = run.training.batches[0]
        assert len(batch.keys) > 5
        losses.append(run.training.train_on(batch).total)
        gradients.append([p.grad for p in run.training.parameters])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for one, other in zip(*gradients, strict=True):
        assert one is not None
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(one.abs().max()))


def test_statistics_are_frozen_where_checkpoints_would_take_them_twice(
    data: TrainingData, tmp_path: Path
) -> None:
    moved = []
    for checkpoints in (True, False):
        network = "timm:test_efficientnet"
        settings = replace(TINY, backbone=network, checkpoint_attention=checkpoints)
        run = Run(tmp_path / str(checkpoints), data, settings)
        before = run.weights()
        run.training.train_on(run.training.batches[0])
        after = run.weights()
        moved.append(
            {name.rpartition(".")[2] for name in before if not same(before[name], after[name])}
        )
    assert moved[0] == {"weight", "bias"}
    assert moved[1] == {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}


@pytest.mark.parametrize("chunk_images", [0, 5])
def test_a_backbone_of_timms_trains_like_any_other(
    chunk_images: int, data: TrainingData, tmp_path: Path
) -> None:
    settings = replace(
        TINY, backbone="timm:test_vit", chunk_images=chunk_images, checkpoint_attention=True,
        precision="bf16",
    )  # fmt: skip
    run = Run(tmp_path, data, settings)
    before = run.weights()
    record = run.go()
    assert record.step == STEPS
    assert record.best_weights is not None
    assert record.best_weights.keys() == before.keys()
    assert not same(before, record.best_weights)


def test_a_step_goes_down_the_gradient_of_the_terms_sum(data: TrainingData, tmp_path: Path) -> None:
    run = Run(tmp_path, data, replace(TINY, weight_decay=0.0))
    before = run.weights()
    loss = run.training.train_on(run.training.batches[0])
    assert set(loss.terms) == {"pv", "ucs"}
    assert loss.part is not None
    assert loss.total == pytest.approx(sum(loss.terms.values()))
    assert loss.total == pytest.approx(float(loss.part.detach()))
    for name, parameter in run.training.encoder.named_parameters():
        assert parameter.grad is not None
        moved = (parameter.detach() - before[name]) * parameter.grad
        assert moved.max() <= 0, name  # Adam's first step is against the gradient's sign


@pytest.mark.parametrize("objective", TEMPERATURES)
def test_every_objective_trains_and_is_measured(
    objective: str, data: TrainingData, tmp_path: Path, bert: Path
) -> None:
    text_model = str(bert) if objective == "clip" else None
    settings = replace(TINY, objective=objective, text_model=text_model, batch_rows=24, epochs=1)
    run = Run(tmp_path, data, settings)
    before = run.weights()
    record = run.go()
    assert record.step == 1
    assert math.isfinite(run.seen[0].loss)
    assert run.seen[0].loss != 0
    assert not same(parameters(run, run.weights()), parameters(run, before))
    last = record.measures[-1]
    assert 0 <= last["auc"] <= 1
    assert (last["nearest"] is None) == (objective in ("simclr", "simsiam", "clip"))


# ---- Images that cannot be read --------------------------------------------------------------


def of_items(*numbers: int) -> TrainingSet:
    """Makes four rows that show the items `numbers` alone."""
    rows = some_rows(4, seed=2)
    pv, clicks = np.full((2, 4, 5), -1)
    for row in range(4):
        shown = np.roll(numbers, row)[:5]
        pv[row, : len(shown)] = clicks[row, : len(shown)] = shown
    return replace(rows, pv=pv, clicks=clicks, clicked=pv >= 0, users=np.arange(4))


@pytest.mark.parametrize("objective", ["courier", "simsiam", "masked-self-attention"])
def test_a_batch_without_a_readable_image_is_counted_and_changes_nothing(
    objective: str, data: TrainingData, tmp_path: Path
) -> None:
    settings = replace(TINY, objective=objective, batch_rows=4, epochs=1)
    run = Run(tmp_path, replace(data, train=of_items(*BAD)), settings)
    before = run.weights()
    with pytest.raises(DataContractError, match=r"Not one of the 1 batches had anything to learn"):
        run.go()
    counts = run.training.record.counts
    assert counts == {"rows": 4, "images": 0, "bad_images": 4, "skipped_batches": 1}
    assert run.seen[0].loss == 0
    assert same(run.weights(), before)
    assert run.training.optimizer.state_dict()["state"] == {}


def test_a_batch_without_an_anchor_leaves_weights_and_adam_alone(
    data: TrainingData, tmp_path: Path
) -> None:
    """The batch has images, but all clicks of its rows are unreadable."""
    rows = of_items(*GOOD[:5])
    rows = replace(rows, clicks=np.full((4, 5), MISSING))
    run = Run(tmp_path, replace(data, train=rows), replace(TINY, batch_rows=4, epochs=2))
    run.training.optimizer.step()  # nothing yet, and nothing to come
    before = parameters(run, run.weights())
    with pytest.raises(DataContractError, match=r"Not one of the 2 batches had anything to learn"):
        run.go()
    counts = run.training.record.counts
    assert counts == {"rows": 8, "images": 10, "bad_images": 2, "skipped_batches": 2}
    assert same(parameters(run, run.weights()), before)
    assert run.training.optimizer.state_dict()["state"] == {}


@pytest.mark.parametrize("objective", ["courier", "simclr", "simsiam", "masked-self-attention"])
def test_a_batch_of_one_readable_image_can_be_gone_through(
    objective: str, data: TrainingData, tmp_path: Path
) -> None:
    """Batch normalisation has no statistics of one value, which one image of 32 pixels comes to."""
    settings = replace(TINY, objective=objective, batch_rows=4, epochs=1)
    run = Run(tmp_path, replace(data, train=of_items(0, MISSING)), settings)
    run.training.train_on(run.training.batches[0])
    counts = run.training.record.counts
    assert (counts["images"], counts["bad_images"]) == (1, 1)
    assert all(torch.isfinite(tensor).all() for tensor in run.weights().values())


def test_rows_images_and_bad_images_are_counted(data: TrainingData, tmp_path: Path) -> None:
    run = Run(tmp_path, data)
    found = run.go().counts
    wanted = [run.training.batches[step] for step in range(STEPS)]
    assert found["rows"] == STEPS * 8
    assert found["images"] == sum(len(batch.keys) for batch in wanted)
    assert found["bad_images"] == sum(batch.bad_images for batch in wanted) > 0
    assert found["skipped_batches"] == 0


# ---- The encoder that is kept ----------------------------------------------------------------


def held_out(auc: float) -> HeldOut:
    return HeldOut(Estimate(auc, np.zeros(2), 2), None, None, None, 9, 3, 2)


def test_the_encoder_of_the_best_trained_step_is_kept(data: TrainingData, tmp_path: Path) -> None:
    run = Run(tmp_path, data)
    # A histogram, then steps 0, 2, 4 and 6: the untrained one is best of all.
    script = [held_out(auc) for auc in (0.5, 0.99, 0.6, 0.8, 0.7)]
    at_step: dict[int, dict[str, Tensor]] = {}
    with patch.object(run.training.evaluation, "rank_clicks", side_effect=script):
        record = run.go(watch=lambda at: at_step.update({at.step: run.weights()}))
    assert record.best is not None
    assert (record.best["step"], record.best["auc"]) == (4, 0.8)
    assert same(record.best_weights, at_step[4])
    assert not same(record.best_weights, run.weights())
    assert [m["auc"] for m in record.measures] == [0.5, 0.99, 0.6, 0.8, 0.7]


def test_the_untrained_encoder_is_never_the_best(data: TrainingData, tmp_path: Path) -> None:
    run = Run(tmp_path, data, replace(TINY, epochs=1, evaluate_every=100))
    script = [held_out(auc) for auc in (0.5, 0.99, 0.1)]
    with patch.object(run.training.evaluation, "rank_clicks", side_effect=script):
        record = run.go()
    assert record.best is not None
    assert record.best["step"] == 3
    assert same(record.best_weights, run.weights())


# ---- Told ------------------------------------------------------------------------------------


def test_progress_tells_steps_rate_and_time_left(data: TrainingData, tmp_path: Path) -> None:
    run = Run(tmp_path, data)
    run.go()
    assert {at.steps for at in run.seen} == {STEPS}
    assert all(at.images_per_second > 0 for at in run.seen)
    assert run.seen[0].seconds_left > run.seen[-1].seconds_left == 0
    assert [line.partition(":")[0] for line in run.told] == [
        "held out, a plain colour histogram", "held out, the untrained encoder",
        *(f"held out, step {step}" for step in (2, 4, 6)),
    ]  # fmt: skip


def test_a_disk_too_small_for_the_cache_is_told_and_done_without(
    data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    settings = replace(TINY, epochs=1, evaluate_every=100)
    whole = Run(tmp_path / "whole", data, settings)
    whole.go()
    assert (tmp_path / "whole" / "images" / "pixels").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
    run = Run(tmp_path / "small", data, settings)
    assert run.told[0].startswith("no image cache: it could take")
    run.go()
    assert not (tmp_path / "small" / "images").exists()
    assert same(run.weights(), whole.weights())


# ---- Two processes ---------------------------------------------------------------------------

JOINT = replace(TINY, chunk_images=10_000, epochs=1)  # statistics frozen, gradients at once
SCHEDULED = replace(
    JOINT, warmup_steps=1, cosine_decay=True, backbone_lr_factor=0.5, freeze_backbone=1,
    ema_decay=0.5, centre=True,
)  # fmt: skip


def exported(run: Run) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns what `finish` makes of a run that has ended: the encoder, and what is told of it."""
    assert run.training.record.best is not None
    run.training.record.best["auc"] = 0.0  # so that the centre is taken
    run.training.finish()
    assert run.training.centred is not None
    return run.weights(), {"centred": run.training.centred, "ahead": run.training.ahead}


def joint_run(
    folder: Path, data: TrainingData, process: Process, settings: TrainSettings = JOINT
) -> Run:
    run = Run(folder, data, settings, process)
    # Else Adam's first steps go by the sign of gradients however small, rounding included.
    for group in run.training.optimizer.param_groups:
        group["eps"] = 1e-3
    return run


def run_process(rank: int, port: int, folder: Path, root: str) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": "",
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
    }  # fmt: skip
    torch.set_num_threads(1)
    data = training_data(root)
    Courier.augmentation = "centre"  # crops are drawn by each process for itself
    training_job.build_encoder = small_encoder
    with distributed.joined() as process:
        whole = joint_run(folder / "two", data, process)
        whole.go()
        stopped = joint_run(folder / "stopped", data, process)
        told = ""
        try:
            stopped.go(stop_at=2 if rank else None)  # one is asked, both stop
        except Stopped:
            told = f"stopped at {stopped.training.record.step}"
        resumed = joint_run(folder / "stopped", data, process)
        resumed.go()
        scheduled = joint_run(folder / "scheduled", data, process, SCHEDULED)
        scheduled.go()
        finished = scheduled.weights(), exported(scheduled)
        half = joint_run(folder / "half", data, process)
        batch = half.training.batches[0]
        if rank:
            batch = replace(
                batch, images=batch.images[:, :0], keys=batch.keys[:0], pv=-1 * (batch.pv < 9),
                clicked=batch.clicked & False, clicks=-1 * (batch.clicks < 9),
            )  # fmt: skip
        loss = half.training.train_on(batch).total
    torch.save(
        {
            "weights": whole.weights(), "losses": [at.loss for at in whole.seen],
            "record": vars(whole.training.record), "told": told,
            "resumed": resumed.weights(), "steps": [at.step for at in resumed.seen],
            "half": (half.weights(), loss),
            "scheduled": (finished[0], scheduled.training.record.best_weights),
            "exported": finished[1],
        },
        folder / f"{rank}.pt",
    )  # fmt: skip


def test_two_processes_train_the_weights_of_one(
    data: TrainingData, image_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Courier, "augmentation", "centre")
    alone = joint_run(tmp_path / "one", data, ALONE)
    alone.go()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(run_process, (port, tmp_path, image_root), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert same(one["weights"], other["weights"])
    assert one["losses"] == pytest.approx([at.loss for at in alone.seen], rel=1e-4)
    for name, wanted in alone.weights().items():
        torch.testing.assert_close(one["weights"][name], wanted, rtol=1e-3, atol=1e-5, msg=name)
    begun = small_encoder(TINY.backbone, "random", 32, TINY.seed).state_dict()
    assert (alone.weights()["backbone.8.weight"] - begun["backbone.8.weight"]).abs().max() > 1e-4
    counts = alone.training.record.counts
    for process in (one, other):
        assert process["record"]["counts"]["rows"] == counts["rows"]
        assert process["record"]["measures"][-1]["auc"] == pytest.approx(
            alone.training.record.measures[-1]["auc"], abs=0.02
        )
        assert process["told"] == "stopped at 2"
        assert process["steps"] == [3]
        assert same(process["resumed"], process["weights"])
    scheduled = joint_run(tmp_path / "one scheduled", data, ALONE, SCHEDULED)
    scheduled.go()
    assert not same(scheduled.weights(), alone.weights())
    wanted = scheduled.weights(), scheduled.training.record.best_weights
    torch.testing.assert_close(one["scheduled"], wanted, rtol=1e-3, atol=1e-5)
    assert same(one["scheduled"], other["scheduled"])
    weights, told = exported(scheduled)
    torch.testing.assert_close(one["exported"][0], weights, rtol=1e-3, atol=1e-5)
    assert same(one["exported"][0], other["exported"][0])
    assert one["exported"][1] == other["exported"][1]
    assert one["exported"][1]["centred"]["images"] == told["centred"]["images"] == len(GOOD)
    assert one["exported"][1]["ahead"].keys() == told["ahead"].keys()
    # A process without a readable image goes along.
    assert same(one["half"], other["half"])
    assert one["half"][1] > 0
