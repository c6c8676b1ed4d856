"""Rates rise and fall as they should, the backbone waits, and the average is one of the steps."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from courier_model.encoder import build_encoder
from courier_model.training import schedules
from courier_model.training.progress import Progress
from courier_model.training.train import TrainingData
from feature_jobs.schemas import OperatorError
from tests.support.training_runs import STEPS, TINY, Run, copied, same

HEAD = "backbone.8."

trains = pytest.mark.usefixtures("one_thread", "small_encoders")


def factors(steps: int, **changes: Any) -> list[float]:
    settings = replace(TINY, **changes)
    return [schedules.rate_factor(settings, step, steps) for step in range(steps)]


# ---- Rates -----------------------------------------------------------------------------------


def test_without_a_schedule_the_rate_is_exactly_the_one_given() -> None:
    assert factors(9) == [1.0] * 9


def test_the_rate_rises_linearly_and_then_stays() -> None:
    assert factors(6, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_the_rate_falls_along_half_a_cosine() -> None:
    found = factors(4, cosine_decay=True)
    assert found == pytest.approx([1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2])


def test_the_rate_is_that_of_torchs_own_schedulers_at_every_step() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 10, 1.0, total_iters=9)
    expected = []
    for _ in range(10):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        warmup.step()
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 90)
    for _ in range(90):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        cosine.step()
    found = factors(100, warmup_steps=10, cosine_decay=True)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)


@trains
def test_each_step_is_taken_at_its_rate_and_layers_of_the_backbone_at_a_share_of_it(
    data: TrainingData, tmp_path: Path
) -> None:
    settings = replace(TINY, warmup_steps=2, cosine_decay=True, backbone_lr_factor=0.1)
    run = Run(tmp_path, data, settings)
    seen = []

    def watch(at: Progress) -> None:
        head, backbone = run.training.optimizer.param_groups
        assert backbone["lr"] == pytest.approx(head["lr"] / 10)
        seen.append(head["lr"] / TINY.learning_rate)

    run.go(watch=watch)
    assert seen == pytest.approx(factors(STEPS, warmup_steps=2, cosine_decay=True))


def moved(run: Run, before: dict[str, Tensor]) -> dict[str, float]:
    after = run.weights()
    names = [name for name, _ in run.training.encoder.named_parameters()]
    return {name: float((after[name] - before[name]).abs().max()) for name in names}


@trains
def test_the_factor_slows_the_backbone_and_nothing_else(data: TrainingData, tmp_path: Path) -> None:
    """Adam's first step is as long as its rate, whatever the gradient."""
    settings = replace(TINY, backbone_lr_factor=0.01, weight_decay=0.0)
    run = Run(tmp_path, data, settings)
    groups = run.training.optimizer.param_groups
    assert len(groups) == 2
    assert {id(p) for group in groups for p in group["params"]} == set(
        map(id, run.training.parameters)
    )
    before, objective = run.weights(), copied(run.training.objective.state_dict())
    run.training.train_on(run.training.batches[0])
    for name, step in moved(run, before).items():
        rate = TINY.learning_rate * (1 if name.startswith(HEAD) else 0.01)
        assert step <= rate * 1.01, name
    assert moved(run, before)[HEAD + "weight"] == pytest.approx(TINY.learning_rate, rel=0.01)
    assert not same(objective, run.training.objective.state_dict())


# ---- A frozen backbone -----------------------------------------------------------------------


@trains
@pytest.mark.parametrize("chunk_images", [0, 5])
def test_a_frozen_backbone_waits_with_its_statistics_while_the_rest_learns(
    chunk_images: int, data: TrainingData, tmp_path: Path
) -> None:
    settings = replace(TINY, freeze_backbone=2, chunk_images=chunk_images, evaluate_every=100)
    run = Run(tmp_path, data, settings)
    begun, objective = run.weights(), copied(run.training.objective.state_dict())
    at_step: dict[int, dict[str, Tensor]] = {0: begun}
    run.go(watch=lambda at: at_step.update({at.step: run.weights()}))
    body = [name for name in begun if not name.startswith(HEAD)]
    assert any("running_mean" in name for name in body)
    for name in begun:
        for step in (1, 2):
            waits = torch.equal(at_step[step][name], at_step[step - 1][name])
            assert waits == (name in body), name
    parameters = [name for name, _ in run.training.encoder.named_parameters()]
    assert not any(torch.equal(at_step[3][name], at_step[2][name]) for name in parameters)
    assert not same(objective, run.training.objective.state_dict())


def test_the_backbone_is_all_of_an_encoder_but_its_last_layer() -> None:
    encoder = build_encoder("shufflenet_v2_x0_5", "random", 32)
    found = set(map(id, schedules.backbone_parameters(encoder)))
    rest = [name for name, p in encoder.named_parameters() if id(p) not in found]
    assert rest == ["backbone.fc.weight", "backbone.fc.bias"]


# ---- The average -----------------------------------------------------------------------------


@trains
def test_the_average_of_the_steps_is_what_is_measured_and_kept(
    data: TrainingData, tmp_path: Path
) -> None:
    run = Run(tmp_path, data, replace(TINY, ema_decay=0.75, evaluate_every=100))
    at_step: list[dict[str, Tensor]] = []
    record = run.go(watch=lambda _: at_step.append(run.weights()))
    expected = at_step[0]
    for weights in at_step[1:]:
        expected = {name: 0.75 * expected[name] + 0.25 * weights[name] for name in expected}
    assert record.best_weights is not None
    assert list(record.best_weights) == list(run.weights())
    for name, tensor in record.best_weights.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, expected[name], msg=name)
            assert not torch.equal(tensor, at_step[-1][name]), name
    plain = Run(tmp_path / "plain", data, replace(TINY, evaluate_every=100))
    plain.go()
    assert same(plain.weights(), run.weights())  # it learns as it would without
    last, unlike = record.measures[-1], plain.training.record.measures[-1]
    assert last["nearest"] != unlike["nearest"] or last["auc"] != unlike["auc"]


def test_integers_of_an_average_are_those_of_the_model() -> None:
    """Swin's `relative_position_index`, say: 23 · .9 + 23 · .1 is below 23."""
    model = nn.ModuleList([nn.Linear(2, 2)])
    model.register_buffer("index", torch.arange(100))
    model.register_buffer("constant", torch.rand(100))
    average = schedules.averaged(model, 0.9)
    for _ in range(3):
        average.update_parameters(model)
    assert torch.equal(average.module.get_buffer("index"), torch.arange(100))
    assert torch.equal(average.module.get_buffer("constant"), model.get_buffer("constant"))


# ---- Refused ---------------------------------------------------------------------------------


@trains
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"warmup_steps": 6}, "--warmup-steps is 6, but 2 epochs of these rows are 6 steps"),
        ({"freeze_backbone": 7}, "--freeze-backbone is 7, but 2 epochs of these rows are 6 steps"),
    ],
)
def test_what_would_begin_after_the_end_is_refused(
    changes: dict[str, Any], told: str, data: TrainingData, tmp_path: Path
) -> None:
    with pytest.raises(OperatorError) as refused:
        Run(tmp_path / "run", data, replace(TINY, **changes))
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)
    (option,) = changes
    Run(tmp_path, data, replace(TINY, **{option: changes[option] - 1}))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"warmup_steps": -1}, "--warmup-steps is -1"),
        ({"freeze_backbone": -2}, "--freeze-backbone is -2"),
        ({"backbone_lr_factor": 0.0}, "--backbone-lr-factor is 0.0"),
        ({"backbone_lr_factor": -1.0}, "--backbone-lr-factor is -1.0"),
        ({"backbone_lr_factor": math.inf}, "--backbone-lr-factor is inf"),
        ({"backbone_lr_factor": math.nan}, "--backbone-lr-factor is nan"),
        ({"ema_decay": 1.0}, "--ema-decay is 1.0"),
        ({"ema_decay": -0.1}, "--ema-decay is -0.1"),
        ({"ema_decay": math.nan}, "--ema-decay is nan"),
    ],
)
def test_schedules_that_make_no_sense_are_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(OperatorError) as refused:
        replace(TINY, **changes)
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)
