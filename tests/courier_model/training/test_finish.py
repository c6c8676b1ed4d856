"""What a run exports is centred where that is wanted, and better on the held-out days."""

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from courier_model.measures import Estimate
from courier_model.training.evaluate import Vectors, embed
from courier_model.training.settings import TrainSettings
from courier_model.training.train import Stopped, TrainingData
from tests.support.training_runs import ALONE, GOOD, TINY, Run, same

pytestmark = pytest.mark.usefixtures("one_thread", "small_encoders")
CENTRED = replace(TINY, centre=True)


@pytest.fixture
def finished(data: TrainingData, tmp_path: Path) -> Run:
    run = Run(tmp_path, data, CENTRED)
    run.go()
    return run


def mean_feature(run: Run) -> np.ndarray:
    """Returns the mean of what the finished encoder makes of the images trained on."""
    training = run.training
    features = partial(training.compute, training.encoder.features)
    found = embed(training.cache, np.array(GOOD), features, 32, ALONE)
    return found.values[found.known].mean(axis=0)


def auc_of(run: Run) -> Estimate:
    """Measures the encoder that the run exports."""
    training = run.training
    features = partial(training.compute, training.encoder.features)
    found = training.evaluation.rank_clicks(training.evaluation.embed(features, 32, ALONE)).auc
    assert found is not None
    return found


def said(run: Run) -> str:
    """Returns the line about centring, before those about what was measured at first."""
    return run.told[-1 - len(run.training.ahead)]


def finish(run: Run, better: str) -> None:
    """Ends a run whose AUC is better "as it comes" or "centred": the other's is one lower."""
    rank, ranked = run.training._rank, ["as it comes", "centred"]

    def lower(vectors: Vectors) -> tuple[dict[str, Any], Estimate]:
        found, auc = rank(vectors)
        if ranked.pop(0) != better:
            auc = replace(auc, value=auc.value - 1)
        return found | {"auc": auc.value}, auc

    with patch.object(run.training, "_rank", lower):
        run.training.finish()


def test_what_is_exported_is_centred_where_that_is_better(finished: Run) -> None:
    finish(finished, better="centred")
    found = finished.training.centred
    assert found is not None
    assert found["taken"]
    assert found["images"] == len(GOOD)
    np.testing.assert_allclose(mean_feature(finished), 0, atol=1e-5)
    again = auc_of(finished)
    assert again.value == pytest.approx(found["auc"])
    assert again.standard_error == pytest.approx(found["auc_se"])
    assert finished.training.auc == found["auc"]
    assert f"less the mean of {len(GOOD)} images: auc {found['auc']:.4f}" in said(finished)


def test_it_stays_as_it_comes_where_that_is_as_good(finished: Run) -> None:
    finish(finished, better="as it comes")
    found = finished.training.centred
    assert found is not None
    assert not found["taken"]
    assert finished.training.encoder.centre is None
    assert finished.training.auc == auc_of(finished).value == found["auc"] + 1
    assert "no more than without" in said(finished)


def test_an_encoder_is_as_it_comes_where_nothing_else_is_wanted(
    data: TrainingData, tmp_path: Path
) -> None:
    run = Run(tmp_path, data, TINY)
    record = run.go()
    run.training.finish()
    assert run.training.centred is None
    assert same(run.weights(), record.best_weights)
    assert record.best is not None
    assert run.training.auc == record.best["auc"]


def test_a_centre_that_it_began_with_is_moved(finished: Run) -> None:
    """As an encoder has it that training goes on from; its weights learn with it."""
    training = finished.training
    training.encoder.centre = torch.linspace(-1, 1, 256)
    training.record.best_weights = finished.weights()
    before = mean_feature(finished)
    assert np.abs(before).max() > 0.5
    finish(finished, better="centred")
    np.testing.assert_allclose(mean_feature(finished), 0, atol=1e-5)


def test_a_run_may_be_centred_that_was_begun_otherwise(data: TrainingData, tmp_path: Path) -> None:
    """Nothing of its steps depends on that."""
    Run(tmp_path, data, TINY).go()
    again = Run(tmp_path, data, CENTRED)
    again.go()
    finish(again, better="centred")
    assert again.training.encoder.centre is not None


@pytest.mark.parametrize("settings", [TINY, CENTRED], ids=["as it comes", "centred"])
def test_what_is_exported_is_told_beside_what_was_measured_first(
    settings: TrainSettings, data: TrainingData, tmp_path: Path
) -> None:
    run = Run(tmp_path, data, settings)
    record = run.go()
    run.training.finish()
    colours = run.training.evaluation.rank_clicks(run.training.evaluation.colours(ALONE)).auc
    assert colours is not None
    wanted = auc_of(run) - colours
    first = run.training.ahead["a plain colour histogram"]
    assert (first["auc"], first["auc_se"]) == pytest.approx((wanted.value, wanted.standard_error))
    begun = run.training.ahead["the untrained encoder"]
    assert begun["auc"] == pytest.approx(run.training.auc - record.measures[1]["auc"])
    assert run.told[-2:] == [
        f"held out, above {name}: auc {found['auc']:.4f} ± {found['auc_se']:.4f}"
        for name, found in run.training.ahead.items()
    ]


def test_a_run_that_an_earlier_version_began_is_told_beside_nothing(finished: Run) -> None:
    record = finished.training.record
    record.errors = {}
    for measured in record.measures:
        del measured["of"], measured["ranked"]
    finished.training.finish()
    assert finished.training.ahead == {}
    assert finished.training.centred is not None
    assert sum("on other impressions" in line for line in finished.told) == 2


def test_after_an_image_has_come_back_only_what_is_measured_anew_is_compared(
    data: TrainingData, image_root: str, tmp_path: Path
) -> None:
    """One user's history is of that image alone, so that others are ranked with it than without."""
    root = tmp_path / "images"
    shutil.copytree(image_root, root)
    histories = data.histories.copy()
    histories[data.held_out.users == data.held_out.users[0]] = -1
    histories[data.held_out.users == data.held_out.users[0], 0] = 5
    data = replace(data, histories=histories, image_roots=(str(root),))
    (root / "5.png").rename(tmp_path / "away.png")
    run = Run(tmp_path / "run", data, TINY)
    with pytest.raises(Stopped):
        run.go(stop_at=2)
    (tmp_path / "away.png").rename(root / "5.png")
    last = Run(tmp_path / "run", data, TINY)
    record = last.go()
    last.training.finish()
    assert record.measures[0]["users"] < record.measures[-1]["users"]
    assert record.best is not None
    assert record.best["step"] > 2
    assert last.training.ahead == {}
    assert "a plain colour histogram was measured on other impressions" in last.told[-2]
