"""A run of training that was stopped, killed or damaged goes on as if it never had been.

With other settings or other data it is another run, and refused.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from courier_model.training import checkpoints as checkpoint_files
from courier_model.training import train as training_job
from courier_model.training.progress import Progress
from courier_model.training.settings import TrainSettings
from courier_model.training.train import Stopped, TrainingData
from feature_jobs.schemas import DataContractError, OperatorError
from tests.support.training_runs import STEPS, TINY, Run, checkpoints, same, training_data

pytestmark = pytest.mark.usefixtures("one_thread", "small_encoders")


SCHEDULES: dict[str, Any] = {"backbone_lr_factor": 0.1, "ema_decay": 0.6}
# Of TINY, in a checkpoint of before there were schedules.
OLD_IDENTITY = {
    "objective": "courier", "backbone": "small", "weights": "random", "input_size": 32,
    "batch_rows": 8, "chunk_images": 0, "learning_rate": 1e-3, "weight_decay": 1e-6,
    "temperature": None, "text_model": None, "evaluate_every": 2, "held_out_rows": 20_000,
    "seed": 0,
}  # fmt: skip


class Killed(Exception):
    """Stands for a process that ends here."""


def die_at(step: int) -> Callable[[Progress], None]:
    def watch(at: Progress) -> None:
        if at.step == step:
            raise Killed

    return watch


# ---- Stopped, killed, damaged ----------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        TINY,
        # Dropout, a random mask, and every image's activations made twice.
        replace(TINY, backbone="small random", objective="masked-self-attention", chunk_images=5),
        replace(TINY, objective="simsiam", precision="bf16"),
        replace(TINY, precision="fp16"),
        # Steps 3 and 4 are in the midst of each schedule.
        replace(TINY, **SCHEDULES, cosine_decay=True, warmup_steps=4),
        replace(TINY, **SCHEDULES, cosine_decay=True, freeze_backbone=5, chunk_images=5),
        replace(TINY, **SCHEDULES, warmup_steps=5, freeze_backbone=2, objective="simsiam"),
    ],
    ids=[
        "plain",
        "random numbers, cached gradients",
        "bf16, statistics in the objective",
        "fp16",
        "warm-up",
        "frozen, cached gradients",
        "average of the objective's statistics",
    ],
)
def test_a_stopped_run_goes_on_as_if_it_had_never_stopped(
    settings: TrainSettings, data: TrainingData, tmp_path: Path
) -> None:
    whole = Run(tmp_path / "whole", data, settings)
    whole.go()
    assert [at.step for at in whole.seen] == list(range(1, STEPS + 1))
    for stop in (3, 4):  # between evaluations, and at one
        part = Run(tmp_path / "parts", data, settings)
        with pytest.raises(Stopped):
            part.go(stop_at=stop)
        assert part.seen[-1].step == stop
    last = Run(tmp_path / "parts", data, settings)
    last.go()
    assert [at.step for at in last.seen] == [5, 6]
    assert last.told[0].startswith("going on from step 4 of 6")
    assert same(last.state(), whole.state())
    assert [m["step"] for m in whole.training.record.measures] == [None, 0, 2, 4, 6]
    assert whole.training.record.counts["bad_images"] > 0
    assert whole.training.record.seconds > 0
    assert (settings.precision == "fp16") == bool(whole.training.scaler.state_dict())


def test_other_random_numbers_give_a_run_other_weights(data: TrainingData, tmp_path: Path) -> None:
    """Without a seed of their own steps would differ, so a test that a run goes on can fail."""
    settings = replace(TINY, backbone="small random", epochs=1)
    weights = []
    for seed in (1, 2):
        run = Run(tmp_path / str(seed), data, settings)
        with patch.object(training_job, "_seed", return_value=seed):
            run.go()
        weights.append(run.weights())
    assert not same(*weights)


@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_killed_run_goes_on_from_its_last_checkpoint(
    step: int, data: TrainingData, tmp_path: Path
) -> None:
    whole, part, last = (Run(tmp_path / name, data) for name in ("whole", "part", "part"))
    whole.go()
    with pytest.raises(Killed):
        part.go(watch=die_at(step))
    last.go()
    assert last.seen[0].step == step // 2 * 2 + 1
    assert same(last.state(), whole.state())


def test_a_run_that_has_ended_does_nothing_more(data: TrainingData, tmp_path: Path) -> None:
    first, again = (Run(tmp_path, data) for _ in range(2))
    first.go()
    assert same(again.go().best_weights, first.training.record.best_weights)
    assert again.seen == []
    assert same(again.state(), first.state())


def test_a_stop_at_the_last_step_is_no_interruption(data: TrainingData, tmp_path: Path) -> None:
    assert Run(tmp_path, data).go(stop_at=STEPS).step == STEPS


def test_a_damaged_checkpoint_costs_only_its_steps(data: TrainingData, tmp_path: Path) -> None:
    whole, part, last = (Run(tmp_path / name, data) for name in ("whole", "part", "part"))
    whole.go()
    with pytest.raises(Stopped):
        part.go(stop_at=5)
    older, newest = checkpoints(tmp_path / "part")
    assert [name[:13] for name in (older, newest)] == ["step-00000004", "step-00000005"]
    path = tmp_path / "part" / "checkpoints" / newest
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    last.go()
    assert newest in last.told[0]
    assert f"Going back to the checkpoint before it, {older}." in last.told[0]
    assert [at.step for at in last.seen] == [5, 6]
    assert same(last.state(), whole.state())


def test_without_a_whole_checkpoint_nothing_is_overwritten(
    data: TrainingData, tmp_path: Path
) -> None:
    with pytest.raises(Stopped):
        Run(tmp_path, data).go(stop_at=1)
    (name,) = checkpoints(tmp_path)
    (tmp_path / "checkpoints" / name).write_bytes(b"half of it")
    with pytest.raises(DataContractError, match=r"No checkpoint in .* is whole"):
        Run(tmp_path, data).go()
    assert (tmp_path / "checkpoints" / name).read_bytes() == b"half of it"


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    board = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    return {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


@pytest.mark.parametrize("step", [1, 3])
def test_scalars_of_a_killed_run_that_went_on_have_every_step_once(
    step: int, data: TrainingData, tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        Run(tmp_path, data).go(watch=die_at(step))
    last = Run(tmp_path, data)
    record = last.go()
    found = scalars(tmp_path)
    assert set(found) == {
        "loss/pv", "loss/ucs", "images_per_second", "learning_rate",
        "held_out/auc", "held_out/gauc", "held_out/max_auc", "held_out/max_gauc",
        "held_out/nearest",
    }  # fmt: skip
    for tag in ("loss/pv", "images_per_second", "learning_rate"):
        assert [at for at, _ in found[tag]] == list(range(1, STEPS + 1))
    assert found["held_out/auc"] == [
        (m["step"], pytest.approx(m["auc"])) for m in record.measures[1:]
    ]
    total = found["loss/pv"][-1][1] + found["loss/ucs"][-1][1]
    assert total == pytest.approx(last.seen[-1].loss, rel=1e-5)


# ---- Another run -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def begun(image_root: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes a run of TINY after its first step, for reading only."""
    folder = tmp_path_factory.mktemp("begun")
    with pytest.raises(Stopped):
        Run(folder, training_data(image_root)).go(stop_at=1)
    return folder


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"backbone": "small random"},
            "backbone 'small', now 'small random'",
        ),
        ({"objective": "no-ucs"}, "objective 'courier', now 'no-ucs'"),
        (
            {"learning_rate": 1e-4, "seed": 1},
            "learning_rate 0.001, now 0.0001; seed 0, now 1",
        ),
        ({"batch_rows": 4}, "batch_rows 8, now 4"),
        ({"chunk_images": 5}, "chunk_images 0, now 5"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(
    changes: dict[str, Any], told: str, begun: Path, data: TrainingData
) -> None:
    before = checkpoints(begun)
    with pytest.raises(OperatorError) as refused:
        Run(begun, data, replace(TINY, **changes)).go()
    assert told in str(refused.value)
    assert "another --name" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert checkpoints(begun) == before


def test_a_checkpoint_of_other_data_is_refused(begun: Path, data: TrainingData) -> None:
    with pytest.raises(OperatorError, match="other training rows or another catalogue"):
        Run(begun, replace(data, fingerprint="others")).go()


def test_a_run_may_be_made_longer(data: TrainingData, tmp_path: Path) -> None:
    settings = replace(TINY, evaluate_every=3)
    whole = Run(tmp_path / "whole", data, settings)
    whole.go()
    Run(tmp_path / "parts", data, replace(settings, epochs=1)).go()
    longer = Run(tmp_path / "parts", data, settings)
    longer.go()
    assert longer.seen[0].step == 4
    assert same(longer.state(), whole.state())


@pytest.mark.parametrize(
    ("changes", "others", "told"),
    [
        ({"cosine_decay": True, "epochs": 3}, {"epochs": 2}, "epochs 3, now 2"),
        ({"cosine_decay": True}, {"cosine_decay": False}, "cosine_decay True, now False"),
        ({}, {"cosine_decay": True, "epochs": 3}, "cosine_decay False, now True"),
        ({"warmup_steps": 2}, {"warmup_steps": 3}, "warmup_steps 2, now 3"),
        ({}, {"backbone_lr_factor": 0.1}, "backbone_lr_factor 1.0, now 0.1"),
        ({"freeze_backbone": 2}, {"freeze_backbone": 0}, "freeze_backbone 2, now 0"),
        ({}, {"ema_decay": 0.9}, "ema_decay 0.0, now 0.9"),
    ],
)
def test_a_checkpoint_of_another_schedule_is_refused(
    changes: dict[str, Any],
    others: dict[str, Any],
    told: str,
    data: TrainingData,
    tmp_path: Path,
) -> None:
    settings = replace(TINY, **changes)
    with pytest.raises(Stopped):
        Run(tmp_path, data, settings).go(stop_at=1)
    with pytest.raises(OperatorError) as refused:
        Run(tmp_path, data, replace(settings, **others)).go()
    assert f"begun with {told}. " in str(refused.value)


def test_a_checkpoint_of_before_there_were_schedules_is_gone_on_from(
    data: TrainingData, tmp_path: Path
) -> None:
    whole, part, last = (Run(tmp_path / name, data) for name in ("whole", "part", "part"))
    whole.go()
    with pytest.raises(Stopped):
        part.go(stop_at=3)
    folder = str(tmp_path / "part" / "checkpoints")
    state = checkpoint_files.load_latest(folder, print)
    assert state is not None
    names = {"identity", "record", "encoder", "objective", "optimizer", "scaler"}
    assert set(state) == names
    assert len(state["optimizer"]["param_groups"]) == 1
    state["identity"] = {"settings": OLD_IDENTITY, "data": "these"}
    checkpoint_files.save(folder, 3, state)
    last.go()
    assert last.seen[0].step == 4
    assert same(last.state(), whole.state())
    with pytest.raises(OperatorError, match=r"ema_decay 0\.0, now 0\.9"):
        Run(tmp_path / "part", data, replace(TINY, ema_decay=0.9)).go()


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_run_may_go_on_in_another_precision(
    precision: str, data: TrainingData, tmp_path: Path
) -> None:
    with pytest.raises(Stopped):
        Run(tmp_path, data).go(stop_at=1)
    with pytest.raises(Stopped):
        Run(tmp_path, data, replace(TINY, precision=precision)).go(stop_at=2)
    last = Run(tmp_path, data, replace(TINY, cache=False))
    assert last.go().step == STEPS
    assert all(math.isfinite(at.loss) for at in last.seen)
