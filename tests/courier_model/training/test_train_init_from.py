"""A run begins with a saved encoder and its last layer, or refuses one that does not fit."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from courier_model.encoder import build_encoder, load_encoder, save_encoder
from courier_model.training.train import Stopped, TrainingData
from feature_jobs.schemas import CourierError, DataContractError, OperatorError
from tests.support.training_runs import TINY, Run, same

pytestmark = pytest.mark.usefixtures("one_thread")

BACKBONE = "shufflenet_v2_x0_5"
SETTINGS = replace(TINY, backbone=BACKBONE, epochs=1, evaluate_every=100)


def saved(folder: Path, seed: int = 7, input_size: int = 32, centre: float | None = None) -> str:
    encoder = build_encoder(BACKBONE, "random", input_size, seed)
    if centre is not None:
        encoder.move_centre(np.full(256, centre, np.float32))
    info = save_encoder(encoder, str(folder), "earlier", None, None, None, "random")
    return str(folder / info.encoder_id)


def test_a_run_begins_with_the_weights_and_the_last_layer_of_the_encoder(
    data: TrainingData, tmp_path: Path
) -> None:
    run = Run(tmp_path / "run", data, replace(SETTINGS, init_from=saved(tmp_path)))
    begun = run.weights()
    assert same(begun, build_encoder(BACKBONE, "random", 32, seed=7).state_dict())
    other = Run(tmp_path / "other", data, SETTINGS)
    assert same(run.training.objective.state_dict(), other.training.objective.state_dict())
    record = run.go()
    assert record.measures[1]["step"] == 0
    assert run.told[1].startswith("held out, the encoder it started from: auc")
    assert not any("untrained" in line for line in run.told)
    assert not same(run.weights(), begun)


def test_a_stopped_run_goes_on_wherever_the_same_encoder_lies_and_with_no_other(
    data: TrainingData, tmp_path: Path
) -> None:
    here = saved(tmp_path)
    there = shutil.copytree(here, tmp_path / "there")
    whole = Run(tmp_path / "whole", data, replace(SETTINGS, init_from=here))
    whole.go()
    with pytest.raises(Stopped):
        Run(tmp_path / "part", data, replace(SETTINGS, init_from=here)).go(stop_at=1)
    another = saved(tmp_path, seed=8)
    for init_from, now in ((another, repr(Path(another).name)), (None, "None")):
        with pytest.raises(OperatorError) as refused:
            Run(tmp_path / "part", data, replace(SETTINGS, init_from=init_from)).go()
        assert f"init_from {Path(here).name!r}, now {now}." in str(refused.value)
    last = Run(tmp_path / "part", data, replace(SETTINGS, init_from=str(there)))
    last.go()
    assert [at.step for at in last.seen] == [2, 3]
    assert same(last.state(), whole.state())


def test_a_centre_stays_through_a_stop_and_is_a_part_of_what_is_averaged(
    data: TrainingData, tmp_path: Path
) -> None:
    settings = replace(SETTINGS, init_from=saved(tmp_path, centre=0.25), ema_decay=0.5)
    whole = Run(tmp_path / "whole", data, settings)
    whole.go()
    with pytest.raises(Stopped):
        Run(tmp_path / "part", data, settings).go(stop_at=1)
    last = Run(tmp_path / "part", data, settings)
    record = last.go()
    assert same(last.state(), whole.state())
    assert record.best_weights is not None
    last.training.finish()
    centre = last.training.encoder.centre
    assert centre is not None
    assert centre.tolist() == record.best_weights["centre"].tolist() == [0.25] * 256
    info = save_encoder(last.training.encoder, str(tmp_path), "later", None, None, None, "")
    again = load_encoder(str(tmp_path / info.encoder_id))
    assert same(again.state_dict(), last.weights())


def refused(
    data: TrainingData, folder: Path, init_from: str, kind: type[CourierError], **changes: str | int
) -> str:
    with pytest.raises(kind) as found:
        Run(folder / "run", data, replace(SETTINGS, init_from=init_from, **changes))  # type: ignore[arg-type]
    assert "\n" not in str(found.value)
    assert not (folder / "run").exists()
    return str(found.value)


def test_an_encoder_of_another_network_is_refused_naming_both(
    data: TrainingData, tmp_path: Path
) -> None:
    told = refused(data, tmp_path, saved(tmp_path), OperatorError, backbone="resnet18")
    assert f"made with backbone {BACKBONE!r}, now 'resnet18'. " in told
    told = refused(data, tmp_path, saved(tmp_path), OperatorError, input_size=64)
    assert "input_size 32, now 64" in told
    assert "backbone '" not in told
    told = refused(data, tmp_path, saved(tmp_path), OperatorError, embedding_dim=64)
    assert "dimension 256, now 64" in told
    assert "Give the same --backbone, --embedding-dim and --input-size" in told
    assert "backbone '" not in told


def test_a_folder_without_a_whole_encoder_is_refused(data: TrainingData, tmp_path: Path) -> None:
    missing = str(tmp_path / "nowhere")
    assert "is no encoder package" in refused(data, tmp_path, missing, OperatorError)
    broken = saved(tmp_path)
    path = Path(broken) / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    assert "changed or damaged" in refused(data, tmp_path, broken, DataContractError)
    path.write_bytes(content[:100])
    assert "cannot be read as safetensors" in refused(data, tmp_path, broken, DataContractError)
