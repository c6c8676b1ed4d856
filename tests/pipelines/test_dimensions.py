"""Encoders of other dimensions than the usual one: a whole shop, from the encoder to the join.

What other tests ask of nights by plain loops is asked here of nights of such an encoder.
"""

import contextlib
import copy
import hashlib
import io
import json
import os
import shutil
import tomllib
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from feature_jobs.codebooks.codebook import load_codebook, read_codebook_info
from feature_jobs.store.encoder_info import read_encoder_info
from pipelines.cli import main
from tests.conftest import Artefacts, pinned
from tests.pipelines import test_join, test_nights, test_slow_join
from tests.support.commands import (
    Capture,
    courier,
    make_night,
    manifest,
    paragraph,
    published,
    refresh,
)
from tests.support.world import DAYS, SCOPE, World, make_codebook, make_encoder

TABLES = ("item_embeddings", "item_features")


@pytest.fixture(scope="module", params=[64, 768])
def dimension(request: pytest.FixtureRequest) -> int:
    found: int = request.param
    return found


@pytest.fixture(scope="module")
def artefacts(dimension: int, tmp_path_factory: pytest.TempPathFactory) -> Artefacts:
    """Makes an untrained encoder by its command, and a codebook for it."""
    folder = tmp_path_factory.mktemp("artefacts")
    scope = [word for category in SCOPE for word in ("--category", category)]
    assert main([
        "init-encoder", "--config", str(folder / "courier.toml"), "--weights", "random",
        "--backbone", "shufflenet_v2_x0_5", "--input-size", "32", "--name", "tiny", *scope,
        "--embedding-dim", str(dimension),
    ]) == 0  # fmt: skip
    (encoder,) = map(str, (folder / "encoders").iterdir())
    return Artefacts(encoder, make_codebook(folder / "codebooks", encoder))


@pytest.fixture(scope="module")
def refreshed(
    dimension: int, artefacts: Artefacts, tmp_path_factory: pytest.TempPathFactory
) -> World:
    """Makes a world after all its nights; tests only read it."""
    folder = tmp_path_factory.mktemp("refreshed") / "shop"
    world = pinned(World(folder, ids="string" if dimension > 256 else "int"), artefacts)
    for day in DAYS:
        world.write_images(day)
        make_night(world.settings(), day)
    return world


world = test_join.world

# ---- The slow twins ------------------------------------------------------------------------------

test_embeddings = test_nights.test_every_embedding_is_the_encoders_own
test_former_items = test_nights.test_a_former_item_keeps_its_embedding_for_the_window_and_no_longer
test_features = test_nights.test_item_features_equal_the_loop_over_items
test_histories = test_nights.test_user_histories_equal_the_loop_over_users
test_scores = test_nights.test_user_simscores_equal_the_loop_over_impressions
test_slow_joins = (
    test_slow_join.test_impressions_are_joined_to_what_their_night_published_to_the_bit
)
test_joins = test_join.test_impressions_get_their_published_scores_and_the_same_when_they_are_made


def test_scores_by_a_shuffle_have_the_same_bytes(world: World) -> None:
    def tables() -> dict[str, bytes]:
        return {k: v for k, v in published(world).items() if k.endswith((".parquet", ".json"))}

    before, day = tables(), str(DAYS[2])
    assert courier(world, "simscore", "--ds", day, "--embeddings-by", "shuffle", "--remake") == 0
    assert tables() == before
    assert len(list((world.root / "test/user_simscores" / f"ds={day}").glob("*.parquet"))) > 1


def test_nights_are_valid_and_know_no_future(refreshed: World, capsys: Capture) -> None:
    capsys.readouterr()
    every = ("--start-ds", str(DAYS[0]), "--end-ds", str(DAYS[-1]))
    assert courier(refreshed, "validate", *every, "--json") == 0
    days = json.loads(capsys.readouterr().out)
    assert all(day["sound"] and day["recomputed_impressions"] for day in days)
    assert courier(refreshed, "audit", "--ds", str(DAYS[2])) == 0


def test_a_codebook_is_fitted_on_such_embeddings_and_serves_the_next_day(
    world: World, dimension: int
) -> None:
    for algorithm in ("lloyd", "single-pass"):
        command = ("fit-codebook", "--ds", str(DAYS[2]), "--clusters", "main=4,coarse=2")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            assert courier(world, *command, "--algorithm", algorithm, "--mode", "warm") == 0
        world.pins[1:] = [printed.getvalue()]
    folder = world.settings().pin_for(DAYS[3]).codebook
    assert folder
    book = load_codebook(folder)
    assert {k: c.shape for k, c in book.centres.items()} == {
        "main": (4, dimension), "coarse": (2, dimension),
    }  # fmt: skip
    assert refresh(world, DAYS[3], "--accept", "churn", "--reason", "another codebook") == 0


# ---- What records say ----------------------------------------------------------------------------


def test_the_dimension_stands_in_every_record(
    refreshed: World, artefacts: Artefacts, dimension: int
) -> None:
    assert read_encoder_info(artefacts.encoder).dimension == dimension
    assert read_codebook_info(artefacts.codebook).dimension == dimension
    for table in TABLES:
        assert manifest(refreshed, table, DAYS[1])["settings"]["dimension"] == dimension
        folder = refreshed.root / "test" / table / f"ds={DAYS[1]}"
        for path in folder.glob("*.parquet"):
            field = pq.read_schema(path).field("embedding")
            assert field.metadata[b"meaning"].decode().startswith(f"[{dimension}] ")


def test_of_the_usual_dimension_records_say_nothing(tmp_path: Path) -> None:
    encoder = make_encoder(tmp_path / "encoders")
    codebook = make_codebook(tmp_path / "codebooks", encoder)
    for path in (Path(encoder) / "encoder.json", Path(codebook) / "codebook.json"):
        assert "dimension" not in json.loads(path.read_text())


# ---- Refused -------------------------------------------------------------------------------------


@pytest.fixture
def usual(tmp_path: Path) -> World:
    """Makes a world whose encoder has the usual dimension."""
    encoder = make_encoder(tmp_path / "usual")
    codebook = make_codebook(tmp_path / "usual", encoder)
    return pinned(World(tmp_path / "shop"), Artefacts(encoder, codebook))


def narrow(folder: Path) -> tuple[str, str]:
    """Makes an encoder of 64 dimensions, and a codebook for it."""
    encoder = make_encoder(folder, dimension=64)
    return encoder, make_codebook(folder, encoder)


def test_a_pin_that_changes_the_dimension_of_a_feature_set_is_refused(
    usual: World, tmp_path: Path, capsys: Capture
) -> None:
    other = narrow(tmp_path / "narrow")
    usual.pin(DAYS[1], *other)
    # As planned together, before the first day is made.
    assert courier(usual, "refresh", "--start-ds", str(DAYS[0]), "--end-ds", str(DAYS[1])) == 2
    assert published(usual) == {}
    assert refresh(usual, DAYS[0]) == 0
    before = published(usual)
    capsys.readouterr()
    for command in ("refresh", "embed", "backfill"):
        days = ("--start-ds", str(DAYS[1]), "--end-ds", str(DAYS[1]))
        assert courier(usual, command, *days) == 2
        message = paragraph(capsys)
        assert f"{os.path.basename(other[0])}, makes embeddings of 64 dimensions" in message
        assert f"those of ds {DAYS[0]} in the feature set 'test' have 256" in message
        assert "a new feature_set" in message
        assert published(usual) == before


def test_a_day_before_those_of_another_dimension_is_refused(
    usual: World, tmp_path: Path, capsys: Capture
) -> None:
    assert courier(usual, "embed", "--ds", str(DAYS[1])) == 0
    before = published(usual)
    usual.pins.clear()
    usual.pin(DAYS[0], *narrow(tmp_path / "narrow"))
    for day in DAYS[:2]:  # before it, and in its place
        assert courier(usual, "embed", "--ds", str(day)) == 2
        assert "a new feature_set" in paragraph(capsys)
    assert published(usual) == before


def test_a_new_feature_set_and_a_candidate_may_have_another_dimension(
    usual: World, tmp_path: Path
) -> None:
    assert refresh(usual, DAYS[0]) == 0
    encoder, codebook = narrow(tmp_path / "narrow")
    before = published(usual)
    assert courier(usual, "embed", "--ds", str(DAYS[1]), "--encoder", encoder) == 0
    assert published(usual).items() >= before.items()
    usual.pins.clear()
    usual.pin(DAYS[0], encoder, codebook)
    usual.settings()
    text = usual.config.read_text().replace('feature_set = "test"', 'feature_set = "narrow"')
    usual.config.write_text(text)
    assert main(["refresh", "--config", str(usual.config), "--ds", str(DAYS[1]), "--from-log"]) == 0
    (path, *_) = (usual.root / "narrow/item_embeddings" / f"ds={DAYS[1]}").glob("*.parquet")
    assert {len(vector) for vector in pq.read_table(path)["embedding"].to_pylist()} == {64}


def test_a_codebook_of_another_dimension_than_the_encoders_is_refused(
    usual: World, tmp_path: Path, capsys: Capture
) -> None:
    mine = usual.settings().pin_for(DAYS[0]).encoder
    _, codebook = narrow(tmp_path / "narrow")
    usual.pins.clear()
    usual.pin(DAYS[0], mine, codebook)
    assert refresh(usual, DAYS[0]) == 2
    message = paragraph(capsys)
    assert "of 256 dimensions" in message
    assert "of 64" in message
    # Or one that says of itself what is not so.
    path = Path(codebook) / "codebook.json"
    facts = json.loads(path.read_text())
    facts.pop("dimension")
    path.write_text(json.dumps({**facts, "encoder_id": os.path.basename(mine)}))
    assert refresh(usual, DAYS[0]) == 1
    assert "The codebook at" in paragraph(capsys)
    assert published(usual) == {}


def test_embeddings_of_another_length_than_the_manifest_says_are_broken(
    refreshed: World, dimension: int, tmp_path: Path, capsys: Capture
) -> None:
    shop = copy.copy(refreshed)
    shop.folder = tmp_path / "shop"
    shutil.copytree(refreshed.folder, shop.folder)
    for table in TABLES:
        path = shop.root / "test" / table / f"ds={DAYS[1]}" / "_manifest.json"
        text = path.read_text()
        assert text.count(f'"dimension": {dimension}') == 1
        path.write_text(text.replace(f'"dimension": {dimension}', f'"dimension": {dimension + 1}'))
        success = path.with_name("_SUCCESS")
        success.write_text(hashlib.sha256(path.read_bytes()).hexdigest())
    assert courier(shop, "validate", "--ds", str(DAYS[1])) == 1
    told = capsys.readouterr().out
    assert told.count(f"an embedding has not {dimension + 1} floats") == len(TABLES)


def test_the_pin_of_a_candidate_of_another_dimension_is_printed_as_a_comment(
    usual: World, tmp_path: Path, capsys: Capture
) -> None:
    encoder, _ = narrow(tmp_path / "narrow")
    assert refresh(usual, DAYS[0]) == 0
    assert courier(usual, "embed", "--ds", str(DAYS[0]), "--encoder", encoder) == 0
    capsys.readouterr()
    fit = ("fit-codebook", "--ds", str(DAYS[0]), "--encoder", encoder, "--clusters", "4")
    assert courier(usual, *fit, "--mode", "fresh") == 0
    printed = capsys.readouterr().out
    assert tomllib.loads(printed) == {}
    assert "Embeddings of 64 numbers do not go on from those of 256" in printed
    pin = printed.splitlines()[3:]
    assert set(tomllib.loads("\n".join(line[2:] for line in pin))["pins"][0]) == {
        "from_ds", "encoder", "codebook"
    }  # fmt: skip
    usual.pins.append(printed)
    assert refresh(usual, DAYS[1]) == 0
