"""A run of training that cannot succeed is refused early, or stopped before it spoils anything."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from courier_model.training.distributed import Process
from courier_model.training.objectives import Places
from courier_model.training.progress import Progress
from courier_model.training.train import TrainingData
from feature_jobs.schemas import CourierError, DataContractError, OperatorError
from tests.support.training_runs import (
    ALONE,
    TINY,
    Run,
    checkpoints,
    parameters,
    same,
    some_rows,
)

pytestmark = pytest.mark.usefixtures("one_thread", "small_encoders")


# ---- Refused ---------------------------------------------------------------------------------


NOTHING = np.full((12, 5), -1)


@pytest.mark.parametrize(
    ("train", "held_out_rows", "told"),
    [
        ({"clicked": np.zeros((12, 5), bool)}, 12, "0 with a click"),
        ({"clicks": NOTHING}, 12, "0 with an earlier click of their user"),
        ({"users": np.zeros(12, int)}, 12, "12 with both, of 1 users"),
        ({}, 0, "of the held-out days after them 0 with an earlier click"),
    ],
    ids=["no clicks", "no history", "one user", "no held-out history"],
)
def test_rows_that_cannot_teach_are_refused_before_any_image_is_read(
    train: dict[str, Any], held_out_rows: int, told: str, image_root: str, tmp_path: Path
) -> None:
    rows, held_out = replace(some_rows(12, seed=0), **train), some_rows(held_out_rows, seed=1)
    data = TrainingData(rows, held_out, held_out.clicks, (image_root,), "these")
    with pytest.raises(DataContractError) as refused:
        Run(tmp_path / "run", data)
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_no_rows_at_all_are_refused(image_root: str, tmp_path: Path) -> None:
    none = some_rows(0, seed=0)
    for train, held_out in ((none, some_rows(9, 1)), (some_rows(9, 1), none), (none, none)):
        with pytest.raises(DataContractError, match="Train on more days"):
            Run(tmp_path, TrainingData(train, held_out, held_out.clicks, (image_root,), "these"))


@pytest.mark.parametrize("clicked", [True, False])
def test_held_out_days_of_one_label_are_refused(
    clicked: bool, data: TrainingData, tmp_path: Path
) -> None:
    rows = data.held_out
    held_out = replace(rows, clicked=(rows.pv >= 0) & clicked)
    with pytest.raises(DataContractError) as refused:
        Run(tmp_path, replace(data, held_out=held_out)).go()
    assert "both clicked and unclicked" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert checkpoints(tmp_path) == []


def test_held_out_images_of_which_none_can_be_read_are_refused(
    data: TrainingData, tmp_path: Path
) -> None:
    nowhere = replace(data, image_roots=(str(tmp_path / "nowhere"),))
    with pytest.raises(DataContractError, match=r"check catalogue\.image_roots"):
        Run(tmp_path / "run", nowhere).go()


def test_fewer_rows_than_a_batch_are_refused(data: TrainingData, tmp_path: Path) -> None:
    with pytest.raises(OperatorError, match="There are 26 rows to take batches of 27 from"):
        Run(tmp_path, data, replace(TINY, batch_rows=27))
    with pytest.raises(OperatorError, match="cannot be shared evenly by 3 processes"):
        Run(tmp_path, data, TINY, Process(0, 3, ALONE.device))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"objective": "couriers"}, "no objective 'couriers'; the nearest is 'courier'"),
        ({"objective": "simclear"}, "the nearest is 'simclr'"),
        ({"temperature": 0.0}, "The temperature is 0.0"),
        ({"temperature": -0.1}, "The temperature is -0.1"),
        ({"temperature": math.nan}, "The temperature is nan"),
        ({"objective": "simsiam", "temperature": 0.1}, "has no temperature"),
        ({"precision": "fp8"}, "The precision is 'fp8'"),
        ({"batch_rows": 1}, "A batch of 1 rows is too small"),
        ({"batch_rows": 0}, "A batch of 0 rows"),
        ({"objective": "clip"}, "needs a text model"),
        ({"text_model": "bert"}, "reads no titles"),
        ({"embedding_dim": 63}, "--embedding-dim is 63; expected is a number from 64 to 1,024"),
        ({"embedding_dim": 1028}, "--embedding-dim is 1028"),
        ({"embedding_dim": 102}, "that 4 divides, since each of the 4 heads"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(OperatorError) as refused:
        replace(TINY, **changes)
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"checkpoint_attention": True}, "--no-checkpoint-attention"),
        ({"backbone": "resnet19"}, "nearest name is 'resnet18'"),
        ({"weights": "imagnet"}, "'imagnet'"),
        ({"objective": "clip", "text_model": "/nowhere"}, "cannot be loaded"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused_before_any_image_is_read(
    changes: dict[str, Any], told: str, data: TrainingData, tmp_path: Path
) -> None:
    with pytest.raises(OperatorError) as refused:
        Run(tmp_path / "run", data, replace(TINY, **changes))
    assert told in str(refused.value)
    assert not (tmp_path / "run").exists()


# ---- Numbers that are none -------------------------------------------------------------------


def refused_at(run: Run) -> tuple[str, dict[str, Tensor], dict[str, Tensor]]:
    """Returns what the refusal says, and the weights before and after the step that was refused."""
    before = run.weights()

    def watch(_at: Progress) -> None:
        nonlocal before
        before = run.weights()

    with pytest.raises(CourierError) as refused:
        run.go(watch=watch)
    return str(refused.value), before, run.weights()


def test_a_loss_that_is_not_finite_stops_before_the_optimizer(
    data: TrainingData, tmp_path: Path
) -> None:
    run = Run(tmp_path, data)
    forward, calls = run.training.objective.forward, []

    def fails_at_the_fourth(features: Tensor, rows: Places) -> Any:
        terms = forward(features, rows)
        calls.append(features.requires_grad)
        if sum(calls) == 4:
            terms["ucs"] = replace(terms["ucs"], loss=terms["ucs"].loss * math.nan)
        return terms

    run.training.objective.forward = fails_at_the_fourth  # type: ignore[method-assign]
    told, before, after = refused_at(run)
    assert "loss term 'ucs' became nan at step" in told
    assert "\n" not in told
    assert len(run.seen) == 3
    assert same(parameters(run, after), parameters(run, before))
    assert checkpoints(tmp_path)[-1].startswith("step-00000002")


def test_an_absurd_learning_rate_stops_and_names_the_remedy(
    data: TrainingData, tmp_path: Path
) -> None:
    run = Run(tmp_path, data, replace(TINY, learning_rate=1e30, evaluate_every=100))
    told, before, after = refused_at(run)
    assert "became nan at step" in told
    assert "--learning-rate" in told
    assert same(parameters(run, after), parameters(run, before))
    assert checkpoints(tmp_path) == []


def test_gradients_that_are_not_finite_stop_before_the_optimizer(
    data: TrainingData, tmp_path: Path
) -> None:
    run = Run(tmp_path, data)
    next(run.training.encoder.parameters()).register_hook(lambda gradient: gradient * math.inf)
    told, before, after = refused_at(run)
    assert "norm of the gradients became" in told
    assert run.seen == []
    assert same(parameters(run, after), parameters(run, before))
    assert run.training.optimizer.state_dict()["state"] == {}


def test_in_fp16_a_step_whose_gradients_overflow_is_left_out_and_the_scale_halved(
    data: TrainingData, tmp_path: Path
) -> None:
    run = Run(tmp_path, data, replace(TINY, precision="fp16"))
    weight = next(run.training.encoder.parameters())
    hook = weight.register_hook(lambda gradient: gradient * math.inf)
    scale, before = run.training.scaler.get_scale(), run.weights()
    run.training.train_on(run.training.batches[0])
    assert run.training.scaler.get_scale() == scale / 2
    assert same(parameters(run, run.weights()), parameters(run, before))
    hook.remove()
    for step in range(1, 20):  # the first scale is too large for some of them all the same
        run.training.train_on(run.training.batches[step])
    assert not same(parameters(run, run.weights()), parameters(run, before))
