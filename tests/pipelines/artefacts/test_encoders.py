"""New encoders are centred and projected by a sample of a day's catalogue, and know that day."""

import copy
import datetime as dt
import os
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

from courier_model.encoder import ImageEncoder, load_encoder
from courier_model.images import decode
from feature_jobs.store.encoder_info import read_encoder_info
from pipelines.cli import main
from tests.support.commands import Capture, courier, paragraph
from tests.support.world import DAYS, World, category, image_uri, picture

ITEMS, DAY = 400, DAYS[0]
BACKBONE = ("--backbone", "shufflenet_v2_x0_5", "--weights", "random", "--input-size", "32")
FITTED = (*BACKBONE, "--ds", str(DAY))


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World(tmp_path_factory.mktemp("many") / "shop")
    for item in range(ITEMS):
        (world.folder / "images" / image_uri(item)).write_bytes(picture(item))
    world.write_catalogue(DAY, list(range(ITEMS)))
    world.settings()
    return world


@pytest.fixture
def shop(many: World) -> World:
    return copy.deepcopy(many)


def made(world: World, capsys: Capture, *args: str) -> tuple[str, str]:
    """Makes an encoder; returns the stanza that was printed, and what was told."""
    capsys.readouterr()
    assert courier(world, "init-encoder", *args) == 0
    told = capsys.readouterr()
    return told.out, told.err


def folder_of(world: World, stanza: str) -> Path:
    (pin,) = tomllib.loads(stanza)["pins"]
    return world.folder / pin["encoder"]


def refused(world: World, capsys: Capture, status: int, *args: str) -> str:
    capsys.readouterr()
    assert courier(world, "init-encoder", *args) == status
    assert not list(world.root.rglob("_staging/**/*.parquet"))
    return paragraph(capsys)


def features(encoder: ImageEncoder, world: World, items: list[int]) -> np.ndarray:
    """Returns what the encoder makes of images before their norm; float32 [n, 256]."""
    pictures = [world.image(item).read_bytes() for item in items]
    pixels = torch.from_numpy(np.stack([decode(p, encoder.preprocessing) for p in pictures]))
    with torch.inference_mode():
        return np.concatenate([encoder.features(some).numpy() for some in pixels.split(100)])


def test_a_centred_encoder_takes_off_the_mean_of_the_catalogues_images(
    shop: World, capsys: Capture
) -> None:
    stanza, told = made(shop, capsys, *FITTED, "--centre")
    assert "looking at images of about 400 items of ds 2026-03-01" in told
    encoder = load_encoder(str(folder_of(shop, stanza)))
    of_all = features(encoder, shop, list(range(ITEMS)))
    spread = np.linalg.norm(of_all, axis=1).mean()
    assert np.linalg.norm(of_all.mean(axis=0)) < 0.01 * spread
    plain = load_encoder(str(folder_of(shop, made(shop, capsys, *BACKBONE)[0])))
    assert torch.equal(plain.head.weight, encoder.head.weight)
    assert encoder.centre is not None
    expected = features(plain, shop, list(range(ITEMS))) - encoder.centre.numpy()
    np.testing.assert_allclose(of_all, expected, atol=1e-5)


def test_principal_directions_of_the_sample_become_the_head(shop: World, capsys: Capture) -> None:
    stanza, told = made(shop, capsys, *FITTED, "--projection", "pca", "--centre")
    assert re.search(r"\d+\.\d% of the features' variance is kept", told)
    encoder = load_encoder(str(folder_of(shop, stanza)))
    of_all = features(encoder, shop, list(range(ITEMS)))
    covariance = np.cov(of_all.T)[:20, :20]  # the later ones are close to rounding
    variances = np.diag(covariance)
    allowed = 0.1 * np.sqrt(np.outer(variances, variances))  # bf16 is as far from fp32 as that
    assert (np.abs(covariance - np.diag(variances)) <= allowed).all()
    assert (np.diff(variances) < 0).all()
    assert (np.abs(of_all.mean(axis=0)[:20]) < 0.1 * np.sqrt(variances)).all()


def test_as_many_directions_are_taken_as_are_asked_for(shop: World, capsys: Capture) -> None:
    pca = (*FITTED, "--projection", "pca", "--centre")
    stanza, _ = made(shop, capsys, *pca, "--embedding-dim", "64")
    folder = str(folder_of(shop, stanza))
    narrow, usual = (
        load_encoder(folder),
        load_encoder(str(folder_of(shop, made(shop, capsys, *pca)[0]))),
    )
    assert read_encoder_info(folder).dimension == 64
    assert torch.equal(narrow.head.weight, usual.head.weight[:64])
    assert "has no such" not in refused(shop, capsys, 2, *pca, "--embedding-dim", "1025")


def test_directions_that_are_rounding_are_not_whitened(shop: World, capsys: Capture) -> None:
    """An untrained network tells images apart by fewer than it has."""
    message = refused(shop, capsys, 2, *FITTED, "--projection", "pca", "--whiten")
    assert "and 256 are needed" in message
    assert "leave --whiten out" in message


def test_what_is_fitted_knows_its_day_and_serves_later_ones(shop: World, capsys: Capture) -> None:
    stanza, _ = made(shop, capsys, *FITTED, "--centre", "--category", "dress")
    info = read_encoder_info(str(folder_of(shop, stanza)))
    assert (info.data_start_ds, info.data_end_ds) == (str(DAY), str(DAY))
    mine = sum(category(item) == "dress" for item in range(ITEMS))
    assert info.weights == f"random, centre of {mine} images of ds {DAY}"
    (pin,) = tomllib.loads(stanza)["pins"]
    assert pin["from_ds"] == str(DAY + dt.timedelta(days=1))


def test_the_same_command_makes_the_same_encoder_however_many_hands_there_are(
    shop: World, capsys: Capture
) -> None:
    args = (*FITTED, "--projection", "pca", "--sample", "350")
    one, _ = made(shop, capsys, *args)
    two, _ = made(shop, capsys, *args, "--", "--direct_num_workers=2")
    assert one == two
    words = read_encoder_info(str(folder_of(shop, one))).weights
    assert 300 < int(words.split()[3]) < 400  # of those that it drew


def test_a_centre_is_part_of_the_identity_and_of_no_encoder_without_one(
    shop: World, capsys: Capture
) -> None:
    plain, _ = made(shop, capsys, *BACKBONE)
    centred, _ = made(shop, capsys, *FITTED, "--centre")
    assert folder_of(shop, plain).name != folder_of(shop, centred).name
    assert load_encoder(str(folder_of(shop, plain))).centre is None


def test_pretrained_weights_are_centred_where_a_day_is_given_and_else_it_is_told(
    shop: World, capsys: Capture, tmp_path: Path
) -> None:
    random = load_encoder(str(folder_of(shop, made(shop, capsys, *BACKBONE)[0])))
    weights = str(tmp_path / "x.pth")
    torch.save(random.backbone.state_dict(), weights)
    given = ("--backbone", "shufflenet_v2_x0_5", "--weights", weights, "--input-size", "32")
    stanza, told = made(shop, capsys, *given)
    assert "WARNING: the encoder is not centred" in told
    assert load_encoder(str(folder_of(shop, stanza))).centre is None
    _, told = made(shop, capsys, *given, "--no-centre")
    assert "WARNING" not in told
    stanza, told = made(shop, capsys, *given, "--ds", str(DAY))
    assert "WARNING" not in told
    assert load_encoder(str(folder_of(shop, stanza))).centre is not None


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (("--projection", "pca"), "--projection pca is fitted on images"),
        (("--centre",), "--centre is fitted on images"),
        (("--sample", "400"), "say of which, with --ds"),
        (("--whiten", "--ds", str(DAY)), "say --projection pca"),
        (("--ds", str(DAY)), "there is neither"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    shop: World, capsys: Capture, args: tuple[str, ...], expected: str
) -> None:
    assert expected in refused(shop, capsys, 2, *BACKBONE, *args)


def test_a_job_in_a_jar_is_refused(shop: World, capsys: Capture) -> None:
    into_jar = ("--runner=portable", "--job_endpoint=x:1", "--output_executable_path=/shop/x.jar")
    assert "written into a jar" in refused(shop, capsys, 2, *FITTED, "--centre", "--", *into_jar)


def test_too_few_images_for_their_directions_are_refused(shop: World, capsys: Capture) -> None:
    args = (*FITTED, "--projection", "pca", "--category", "dress")
    assert "are needed. Sample more images" in refused(shop, capsys, 2, *args)


def test_a_day_whose_images_cannot_be_read_or_that_is_not_there_is_told(
    shop: World, capsys: Capture
) -> None:
    args = (*BACKBONE, "--centre", "--ds")
    nothing = (*args, str(DAY), "--category", "hat")
    assert "Not one of the sampled catalogue items" in refused(shop, capsys, 1, *nothing)
    assert "2026-04-01" in refused(shop, capsys, 4, *args, "2026-04-01")


def test_without_settings_there_is_no_catalogue(tmp_path: Path, capsys: Capture) -> None:
    config = str(tmp_path / "new.toml")
    assert main(["init-encoder", "--config", config, *FITTED, "--centre"]) == 2
    assert "There are no settings yet" in paragraph(capsys)
    assert not os.path.exists(tmp_path / "encoders")
