"""`courier train` on the tiny world makes an encoder that D may use, also after a stop."""

import json
import os
import shutil
import signal
import subprocess
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest

from courier_model.training.train import Training
from feature_jobs.store import files
from feature_jobs.store.encoder_info import read_encoder_info
from tests.support.commands import Capture, courier, paragraph
from tests.support.training_shop import OPTIONS, D, copied, copied_until_d, rows_of, train
from tests.support.world import (
    DAYS,
    SCOPE,
    World,
    catalogue_items,
    draw_impressions,
    make_codebook,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def trained(
    prepared: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[World, str, dict[str, Any]]:
    """Runs `courier train` in a shop; returns the shop, what was printed, and the pin in it.

    No test changes the shop.
    """
    world = copied_until_d(prepared, tmp_path_factory.mktemp("trained"))
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("click.echo", lambda text, err=False: None if err else printed.append(text))
        assert train(world) == 0
    (text,) = printed
    (pin,) = tomllib.loads(text)["pins"]
    return world, text, pin


def encoder_id(world: World) -> str:
    (path,) = (world.folder / "encoders").iterdir()
    return path.name


def run_folder(world: World) -> Path:
    (path,) = (world.folder / "training").iterdir()
    return path


# ---- What comes out --------------------------------------------------------------------------


def test_train_prints_a_pin_that_holds_from_the_day_it_trained_until(
    trained: tuple[World, str, dict[str, Any]],
) -> None:
    world, text, pin = trained
    assert tomllib.loads(text) == {"pins": [pin]}
    assert pin == {"from_ds": str(D), "encoder": f"encoders/{encoder_id(world)}"}
    assert encoder_id(world).startswith("tiny-")
    comment, *_ = text.splitlines()
    assert comment.startswith("# courier, shufflenet_v2_x0_5, trained on ds 2026-03-01 to ")
    assert "held-out AUC 0." in comment


def test_the_encoder_tells_its_scope_and_its_days(
    trained: tuple[World, str, dict[str, Any]],
) -> None:
    world, _, pin = trained
    info = read_encoder_info(str(world.folder / pin["encoder"]))
    assert info.categories == SCOPE
    assert (info.data_start_ds, info.data_end_ds) == (str(DAYS[0]), str(DAYS[2]))
    assert info.weights == "random, trained for courier"
    assert info.lineage == ()
    assert info.preprocessing["input_size"] == 32


def test_beside_the_encoder_lies_how_it_was_made_and_what_it_was_found_to_be_worth(
    trained: tuple[World, str, dict[str, Any]],
) -> None:
    world, text, pin = trained
    found = json.loads((world.folder / pin["encoder"] / "train.json").read_text())
    assert found["settings"]["backbone"] == "shufflenet_v2_x0_5"
    assert found["settings"]["batch_rows"] == 16
    assert found["settings"]["learning_rate"] == 3e-4  # of the preset
    data = found["data"]
    assert (data["start_ds"], data["end_ds"]) == (str(DAYS[0]), str(DAYS[2]))
    assert data["held_out_from_ds"] == str(DAYS[2])
    assert list(data["training_rows"]) == [str(day) for day in DAYS[:3]]
    assert len(data["fingerprint"]) >= 32
    assert data["catalogues"]
    assert found["git_revision"] is None or len(found["git_revision"]) >= 40
    assert (found["precision"], found["processes"]) == ("fp32", 1)
    assert found["device"].startswith("cpu")
    assert "torch" in found["versions"]
    steps, counts = found["steps"], found["counts"]
    assert steps % 4 == 0
    assert counts["rows"] == 16 * steps
    assert counts["images"] > 0
    assert counts["bad_images"] > 0
    assert found["seconds"] > 0
    measured = [m["step"] for m in found["measures"]]
    assert measured[:2] == [None, 0]
    assert measured[-1] == steps >= 8
    trained_ones = found["measures"][2:]
    assert found["best"] == max(trained_ones, key=lambda m: m["auc"])
    assert f"AUC {found['best']['auc']:.4f} at step {found['best']['step']}" in text


def test_a_night_of_that_day_takes_the_encoder_and_one_of_an_earlier_day_refuses_it(
    trained: tuple[World, str, dict[str, Any]], tmp_path: Path, capsys: Capture
) -> None:
    world, text, pin = trained
    world = copied(world.folder, tmp_path)
    encoder = str(world.folder / pin["encoder"])
    codebook = make_codebook(tmp_path / "codebooks", encoder)
    world.pins = [text + f'\ncodebook = "{codebook}"\n']
    assert courier(world, "refresh", "--ds", str(D)) == 0
    assert set(world.table("user_simscores", D)["encoder_id"].to_pylist()) == {encoder_id(world)}
    capsys.readouterr()
    world.pins = []
    world.pin(DAYS[0], encoder, codebook)
    for day in DAYS[1:3]:
        assert courier(world, "refresh", "--ds", str(day)) == 2
        told = paragraph(capsys)
        assert f"made from data up to ds {DAYS[2]}" in told
        assert "know their own future" in told


def test_no_row_of_the_day_or_later_counts(
    trained: tuple[World, str, dict[str, Any]], prepared: Path, tmp_path: Path
) -> None:
    """Rows of D are there, and D's log and catalogue are not those of the trained shop."""
    world = copied(prepared, tmp_path)
    assert (rows_of(world, D) / "_manifest.json").exists()
    world.write_impressions(D, draw_impressions(D, seed=99))
    world.write_catalogue(D, catalogue_items(D)[3:])
    assert train(world) == 0
    assert encoder_id(world) == encoder_id(trained[0])


def test_an_earlier_day_less_makes_another_encoder(
    trained: tuple[World, str, dict[str, Any]], prepared: Path, tmp_path: Path
) -> None:
    """Rows of earlier days do count, so that the test that rows of D do not count can fail."""
    shop = copied_until_d(prepared, tmp_path)
    assert train(shop, "--start-ds", str(DAYS[1])) == 0
    assert encoder_id(shop) != encoder_id(trained[0])


# ---- Gone on from yesterday's ------------------------------------------------------------------


@pytest.fixture(scope="module")
def gone_on(
    trained: tuple[World, str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[World, str, list[dict[str, Any]], str]:
    """Goes on from the trained encoder on days of before its end, and from that one once more.

    Returns the shop, the encoder it began with, the pins of the two made and what was told. No test
    changes the shop.
    """
    world = copied(trained[0].folder, tmp_path_factory.mktemp("gone_on"))
    parent = str(world.folder / trained[2]["encoder"])
    printed: list[str] = []
    told: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("click.echo", lambda text, err=False: (told if err else printed).append(text))
        options = ("--until", str(DAYS[2]), "--name", "second", "--ema-decay", "0.5")
        assert train(world, *options, "--init-from", parent) == 0
        second = str(world.folder / tomllib.loads(printed[0])["pins"][0]["encoder"])
        assert train(world, "--name", "third", "--init-from", second) == 0
    pins = [tomllib.loads(text)["pins"][0] for text in printed]
    return world, parent, pins, "\n".join(told)


def test_an_encoder_that_went_on_knows_what_the_earlier_one_knew(
    gone_on: tuple[World, str, list[dict[str, Any]], str],
) -> None:
    world, parent, pins, _ = gone_on
    second, third = (read_encoder_info(str(world.folder / pin["encoder"])) for pin in pins)
    first = read_encoder_info(parent)
    # It was trained on the first two days alone.
    assert (second.data_start_ds, second.data_end_ds) == (str(DAYS[0]), str(DAYS[2]))
    assert second.weights == f"{first.encoder_id}, trained for courier"
    assert second.lineage == (first.encoder_id,)
    assert third.lineage == (second.encoder_id, first.encoder_id)
    assert second.categories == first.categories
    found = json.loads((world.folder / pins[1]["encoder"] / "train.json").read_text())
    assert found["lineage"] == [second.encoder_id, first.encoder_id]
    found = json.loads((world.folder / pins[0]["encoder"] / "train.json").read_text())
    assert (found["data"]["start_ds"], found["data"]["end_ds"]) == (str(DAYS[0]), str(DAYS[1]))
    assert found["settings"]["ema_decay"] == 0.5


def test_its_measures_are_told_to_be_of_what_the_earlier_one_has_seen(
    gone_on: tuple[World, str, list[dict[str, Any]], str],
) -> None:
    told = gone_on[3]
    assert f"WARNING: {os.path.basename(gone_on[1])}, which training goes on from" in told
    assert f"up to ds {DAYS[2]}, and the days held out begin with {DAYS[1]}" in told
    assert "held out, the encoder it started from: auc" in told
    assert "untrained" not in told


def test_a_night_of_a_day_that_only_the_earlier_encoder_knew_is_refused(
    gone_on: tuple[World, str, list[dict[str, Any]], str], tmp_path: Path, capsys: Capture
) -> None:
    world, _, (pin, _), _ = gone_on
    assert pin["from_ds"] == str(D)  # not the day it was trained until
    world = copied(world.folder, tmp_path)
    encoder = str(world.folder / pin["encoder"])
    world.pin(DAYS[0], encoder, make_codebook(tmp_path / "codebooks", encoder))
    assert courier(world, "refresh", "--ds", str(DAYS[2])) == 2
    told = paragraph(capsys)
    assert f"The pinned encoder was made from data up to ds {DAYS[2]}" in told
    assert "know their own future" in told
    assert courier(world, "refresh", "--ds", str(D)) == 0


def test_an_encoder_that_does_not_fit_is_not_gone_on_from(
    trained: tuple[World, str, dict[str, Any]], tmp_path: Path, capsys: Capture
) -> None:
    world = copied(trained[0].folder, tmp_path)
    parent = world.folder / trained[2]["encoder"]
    new = ("--name", "new", "--init-from")

    def refused(*args: str, status: int = 2) -> str:
        capsys.readouterr()
        assert train(world, *args) == status
        assert not (world.folder / "training" / f"new-until-{D}" / "checkpoints").exists()
        return paragraph(capsys)

    assert "is no encoder package" in refused(*new, str(tmp_path / "nowhere"))
    told = refused(*new, str(parent), "--weights", "random")
    assert f"--weights random and --init-from {parent}" in told
    told = refused(*new, str(parent), "--backbone", "resnet18")
    assert "backbone 'shufflenet_v2_x0_5', now 'resnet18'" in told
    assert "input_size 32, now 64" in refused(*new, str(parent), "--input-size", "64")
    other = shutil.copytree(parent, tmp_path / "other")
    for categories, named in ((None, "all categories"), (["dress"], "the categories ['dress']")):
        facts = json.loads((other / "encoder.json").read_text()) | {"categories": categories}
        (other / "encoder.json").write_text(json.dumps(facts))
        told = refused(*new, str(other))
        assert f"was made for {named}, but the training rows are of the categories ['dress'" in told
    broken = shutil.copytree(parent, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"half")
    assert "cannot be read as safetensors" in refused(*new, str(broken), status=1)


# ---- Again, and stopped ----------------------------------------------------------------------


def test_the_same_command_again_trains_nothing_and_prints_the_same(
    trained: tuple[World, str, dict[str, Any]], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, text, pin = trained
    monkeypatch.setattr(Training, "train_on", None)
    before = (world.folder / pin["encoder"] / "train.json").read_bytes()
    assert train(world) == 0
    assert capsys.readouterr().out.rstrip("\n") == text
    assert (world.folder / pin["encoder"] / "train.json").read_bytes() == before


def test_other_settings_under_the_same_name_exit_2(
    trained: tuple[World, str, dict[str, Any]], capsys: Capture
) -> None:
    world, _, pin = trained
    assert train(world, "--learning-rate", "0.5") == 2
    told = paragraph(capsys)
    assert "learning_rate 0.0003, now 0.5" in told
    assert "--name" in told
    assert train(world, "--start-ds", str(DAYS[1])) == 2
    assert "other training rows" in paragraph(capsys)
    assert encoder_id(world) == os.path.basename(pin["encoder"])


def test_a_terminated_training_saves_exits_143_and_the_same_command_ends_as_if_it_had_not(
    trained: tuple[World, str, dict[str, Any]],
    prepared: Path,
    tmp_path: Path,
    capsys: Capture,
    warm_python: str,
) -> None:
    shop = copied_until_d(prepared, tmp_path)
    shop.settings()
    process = subprocess.Popen(
        [warm_python, "-m", "pipelines.cli", "train", "--config", str(shop.config), *OPTIONS],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(shop.folder.glob("training/*/tensorboard")):  # it is about to take its steps
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert out == ""
    assert "Traceback" not in errors
    assert "Interrupted; the same command resumes" in errors
    assert "the same command resumes" in errors
    (saved,) = (run_folder(shop) / "checkpoints").glob("step-*.pt")
    assert not (shop.folder / "encoders").exists()
    capsys.readouterr()
    assert train(shop) == 0
    assert f"going on from step {int(saved.name.split('-')[1])} of" in capsys.readouterr().err
    assert encoder_id(shop) == encoder_id(trained[0])


def test_two_processes_do_not_train_in_one_folder(
    trained: tuple[World, str, dict[str, Any]], capsys: Capture
) -> None:
    world = trained[0]
    with files.lock(str(run_folder(world))):
        assert train(world) == 1
    told = paragraph(capsys)
    assert f"Another process is training in {run_folder(world)}" in told
    assert train(world) == 0  # the lock goes with its holder
