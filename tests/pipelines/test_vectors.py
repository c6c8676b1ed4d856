"""Nights that take a shop's own vectors: the slow twins, and all that a shop may do wrong.

What other tests ask of nights by plain loops is asked here of nights without an image read.
"""

import copy
import datetime as dt
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from feature_jobs.codebooks.codebook import load_codebook, save_codebook
from pipelines.cli import main
from tests.conftest import Artefacts, pinned
from tests.pipelines import test_join, test_nights
from tests.support.codebooks import by_hand
from tests.support.commands import (
    Capture,
    counts,
    courier,
    embed_work,
    manifest,
    paragraph,
    published,
    refresh,
)
from tests.support.vector_shop import (
    CHANGES_ON_DAY_3,
    make_codebook,
    make_vector_shop,
    register,
    vector_of,
    vectors_of_day,
    write_vectors,
)
from tests.support.world import (
    DAYS,
    LEAVES_ON_DAY_2,
    MISSING,
    SAME_BYTES_AS_1,
    UNDECODABLE,
    World,
    catalogue_items,
    make_encoder,
)
from tests.support.world import make_codebook as make_image_codebook

SHOPS = [(64, "lists", "string"), (256, "lists", "int"), (768, "bytes", "int")]


@pytest.fixture(scope="module", params=SHOPS, ids=[f"{n}-{form}" for n, form, _ in SHOPS])
def refreshed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Makes a shop of vectors after all its nights; tests only read it."""
    dimension, form, ids = request.param
    folder = tmp_path_factory.mktemp("refreshed") / "shop"
    world = make_vector_shop(folder, dimension, form, ids)
    for path in (folder / "images").iterdir():
        path.unlink()  # nobody is to look at one
    every = ("--start-ds", str(DAYS[0]), "--end-ds", str(DAYS[-1]))
    assert courier(world, "refresh", *every) == 0
    return world


@pytest.fixture(scope="module")
def artefacts(refreshed: World) -> Artefacts:
    pin = refreshed.settings().pin_for(DAYS[0])
    assert pin.codebook
    return Artefacts(str(pin.encoder), str(pin.codebook))


def dimension_of(world: World) -> int:
    return int(manifest(world, "item_embeddings", DAYS[0])["settings"].get("dimension", 256))


# ---- The slow twins ------------------------------------------------------------------------------

world = test_join.world
test_former_items = test_nights.test_a_former_item_keeps_its_embedding_for_the_window_and_no_longer
test_features = test_nights.test_item_features_equal_the_loop_over_items
test_histories = test_nights.test_user_histories_equal_the_loop_over_users
test_scores = test_nights.test_user_simscores_equal_the_loop_over_impressions
test_joins = test_join.test_impressions_get_their_published_scores_and_the_same_when_they_are_made


def slow_unit(vector: np.ndarray) -> list[float]:
    length = math.sqrt(sum(float(x) * float(x) for x in vector))
    return [float(x) / length for x in vector]


def test_every_embedding_is_the_shops_vector_at_length_1(refreshed: World) -> None:
    dimension = dimension_of(refreshed)
    for day, form in zip(DAYS, ("list", "fixed", "large", "half"), strict=True):
        found = test_nights.vectors_of(refreshed, day)
        given = vectors_of_day(day, dimension)
        expected = {*catalogue_items(day)} - {MISSING, UNDECODABLE}
        former = {LEAVES_ON_DAY_2} if day in DAYS[1:3] else set()
        assert set(found) == {refreshed.item(n) for n in expected | former}
        for n in expected:
            vector = given[n].astype(np.float16) if form == "half" and dimension < 768 else given[n]
            np.testing.assert_allclose(
                found[refreshed.item(n)], slow_unit(vector), atol=1e-6, err_msg=str((day, n))
            )
        same = (found[refreshed.item(n)] for n in (SAME_BYTES_AS_1, 1))
        np.testing.assert_array_equal(*same)


def test_embeddings_and_rejects_are_the_catalogue_and_rejects_say_why(refreshed: World) -> None:
    for day, tried in zip(DAYS, (1, 2, 2, 3), strict=True):
        rows = refreshed.table("item_rejects", day).to_pylist()
        found = {r["item_id"]: (r["stage"], r["reason"], r["attempts"]) for r in rows}
        assert found == {
            refreshed.item(MISSING): ("read", "no_vector", tried),
            refreshed.item(UNDECODABLE): ("decode", "not_finite", tried),
        }
        assert all(r["first_ds"] == DAYS[0] < r["next_ds"] for r in rows)
        ours = counts(refreshed, "item_embeddings", day)
        assert ours["catalogue_items"] == len(catalogue_items(day))
        # Of the unknown item, and of the former one once it is forgotten.
        assert ours["vectors_ignored"] == (2 if day == DAYS[3] else 1)
        assert ours["vectors_read"] == len(vectors_of_day(day, 64))


def test_unchanged_vectors_are_known_by_their_bytes(refreshed: World) -> None:
    days = {day: embed_work(refreshed, day) for day in DAYS}
    assert days[DAYS[0]]["images_unchanged"] == 0
    assert days[DAYS[1]]["vectors_taken"] == 1  # the new item
    assert days[DAYS[2]]["vectors_taken"] == 1
    rows = refreshed.table("item_embeddings", DAYS[2])
    sha = dict(zip(rows["item_id"].to_pylist(), rows["image_sha256"].to_pylist(), strict=True))
    before = refreshed.table("item_embeddings", DAYS[1])
    for item, was in zip(
        before["item_id"].to_pylist(), before["image_sha256"].to_pylist(), strict=True
    ):
        assert (sha[item] == was) == (item != refreshed.item(CHANGES_ON_DAY_3))


def test_nights_are_valid_and_know_no_future(refreshed: World, capsys: Capture) -> None:
    every = ("--start-ds", str(DAYS[0]), "--end-ds", str(DAYS[-1]))
    assert courier(refreshed, "validate", *every) == 0
    capsys.readouterr()
    assert courier(refreshed, "audit", "--ds", str(DAYS[2])) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "declared as trained elsewhere, on nothing of this shop's clicks" in told
    assert "(by what was declared of its vectors)" in told
    noted = manifest(refreshed, "item_embeddings", DAYS[2])["notes"]["encoder_declared"]
    assert noted == "trained elsewhere, on nothing of this shop's clicks"


# ---- Everything a shop may do wrong ------------------------------------------------------------

D = 32


@pytest.fixture
def shop(tmp_path: Path) -> World:
    """Makes a shop of vectors whose first night is made."""
    world = make_vector_shop(tmp_path / "shop", D, "lists")
    assert refresh(world, DAYS[0]) == 0
    return world


def write(world: World, day: dt.date, rows: dict[int, Any], **more: Any) -> None:
    write_vectors(world, day, list(rows.items()), **more)


def test_a_day_without_vectors_is_waited_for(shop: World, capsys: Capture) -> None:
    before = published(shop)
    shutil.rmtree(shop.folder / "vectors" / f"ds={DAYS[1]}")
    for command in ("refresh", "embed"):
        assert courier(shop, command, "--ds", str(DAYS[1])) == 4
        assert f"vectors table has no partition for ds {DAYS[1]} yet" in paragraph(capsys)
    assert courier(shop, "refresh", "--ds", str(DAYS[1]), "--wait", "1s") == 4
    assert f"vectors of ds {DAYS[1]} ({shop.folder}/vectors/" in paragraph(capsys)
    assert published(shop) == before
    write(shop, DAYS[1], vectors_of_day(DAYS[1], D))
    shop.extra_settings = "settle_minutes = 60.0"
    for path in (shop.folder / "catalogue" / f"ds={DAYS[1]}").iterdir():
        os.utime(path, (10**9, 10**9))
    assert courier(shop, "refresh", "--ds", str(DAYS[1]), "--wait", "1s") == 4
    message = paragraph(capsys)
    assert f"The vectors table of ds {DAYS[1]} may still be written" in message
    assert "register them with --require-success" in message
    shop.extra_settings = "settle_minutes = 0.0"
    assert courier(shop, "refresh", "--ds", str(DAYS[1]), "--wait", "1s") == 0


def test_an_outage_of_vectors_refuses_the_night_and_a_mended_table_makes_it(
    shop: World, capsys: Capture
) -> None:
    before, good = published(shop), vectors_of_day(DAYS[1], D)
    write(shop, DAYS[1], {n: good[n] for n in (3, 4, 5, 6, UNDECODABLE, 12, 13)})
    assert refresh(shop, DAYS[1]) == 3
    message = paragraph(capsys)
    assert "4 of 10 vectors that were there last time, or are new, could not be fetched" in message
    assert published(shop) == before
    write(shop, DAYS[1], good)
    assert refresh(shop, DAYS[1]) == 0


def test_vectors_of_two_lengths_are_rejected_and_too_many_refuse_the_night(
    shop: World, capsys: Capture
) -> None:
    good = vectors_of_day(DAYS[1], D)
    write(shop, DAYS[1], {**good, 3: good[3][:-2], 4: good[4][:-2]}, form="list")
    assert courier(shop, "embed", "--ds", str(DAYS[1])) == 0
    rejects = {r["item_id"]: r for r in shop.table("item_rejects", DAYS[1]).to_pylist()}
    assert rejects[3]["reason"] == "wrong_length"
    assert rejects[3]["message"] == "it has 30 numbers, where the encoder has 32"
    before = published(shop)
    write(shop, DAYS[1], {n: v[:-2] for n, v in good.items()}, form="list")
    assert courier(shop, "embed", "--ds", str(DAYS[1])) == 1
    assert "Not one of the 12 catalogue items has a usable vector" in paragraph(capsys)
    write(shop, DAYS[1], {n: v[:-2] for n, v in good.items()}, form="fixed")
    assert courier(shop, "embed", "--ds", str(DAYS[1])) == 1
    assert "have 30 numbers each, but 32 were registered" in paragraph(capsys)
    assert published(shop) == before


def test_an_item_with_two_vectors_is_rejected_and_twice_the_same_is_one(shop: World) -> None:
    good = vectors_of_day(DAYS[1], D)
    rows = [*good.items(), (3, good[3]), (4, good[5])]
    write_vectors(shop, DAYS[1], rows)
    assert courier(shop, "embed", "--ds", str(DAYS[1])) == 0
    rejects = {r["item_id"]: r["reason"] for r in shop.table("item_rejects", DAYS[1]).to_pylist()}
    assert rejects == {MISSING: "no_vector", UNDECODABLE: "not_finite", 4: "ambiguous"}
    assert counts(shop, "item_embeddings", DAYS[1])["rejected_ambiguous"] == 1


def test_ids_of_another_type_are_refused_before_a_job_begins(shop: World, capsys: Capture) -> None:
    before = published(shop)
    folder = shop.folder / "vectors" / f"ds={DAYS[1]}"
    for path in folder.iterdir():
        rows = pq.read_table(path, partitioning=None)
        pq.write_table(rows.set_column(0, "item_id", rows["item_id"].cast(pa.string())), path)
    assert refresh(shop, DAYS[1]) == 1
    message = paragraph(capsys)
    assert "item_id is int64 in the catalogue table" in message
    assert "string in the vectors table" in message
    assert "CAST(item_id AS BIGINT)" in message
    assert published(shop) == before


def test_a_codebook_of_another_dimension_and_a_pin_that_changes_it_are_refused(
    shop: World, tmp_path: Path, capsys: Capture
) -> None:
    before = published(shop)
    other = make_vector_shop(tmp_path / "other", 48, "lists")
    theirs = other.settings().pin_for(DAYS[0])
    mine = shop.settings().pin_for(DAYS[0])
    pins = shop.pins[:]
    shop.pin(DAYS[1], str(mine.encoder), theirs.codebook)
    assert refresh(shop, DAYS[1]) == 2
    assert "mixes two encoders" in paragraph(capsys)
    shop.pins = pins
    shutil.copytree(other.folder / "vectors", shop.folder / "wide")
    wide = register(shop, "--path", "wide/ds={ds}/*.parquet", "--name", "wide")
    shop.pin(DAYS[1], wide, make_codebook(tmp_path / "wide", wide, 48))
    capsys.readouterr()
    assert refresh(shop, DAYS[1]) == 2
    assert "a new feature_set" in paragraph(capsys)
    assert published(shop) == before


def test_vectors_that_know_the_day_are_refused(shop: World, capsys: Capture) -> None:
    before = published(shop)
    knows = register(shop, "--name", "late", "--trained-on", "2026-02-01", str(DAYS[1]))
    shop.pin(DAYS[1], knows, make_codebook(shop.folder / "late", knows, D))
    capsys.readouterr()
    assert refresh(shop, DAYS[1]) == 2
    assert f"was made from data up to ds {DAYS[1]}" in paragraph(capsys)
    assert published(shop) == before


# ---- One encoder after another -----------------------------------------------------------------


def test_a_candidate_of_vectors_is_embedded_beside_the_nights_and_measured(
    shop: World, capsys: Capture
) -> None:
    for day in DAYS[1:3]:
        assert refresh(shop, day) == 0
    scope = ["--category", "dress", "--category", "shirt"]
    centred = register(shop, "--name", "centred", "--centre", "--ds", str(DAYS[0]), *scope)
    assert courier(shop, "embed", "--encoder", centred, "--ds", str(DAYS[2])) == 0
    capsys.readouterr()
    pinned = shop.settings().pin_for(DAYS[2]).encoder
    both = ("--encoder", str(pinned), "--encoder", centred)
    assert courier(shop, "measure", "--ds", str(DAYS[2]), *both) == 0
    assert os.path.basename(centred) in capsys.readouterr().out


def test_an_encoder_of_images_is_followed_by_vectors_of_its_length(tmp_path: Path) -> None:
    """Former items get a vector of the new one where there is one, and else go."""
    world = make_vector_shop(tmp_path / "shop", 256, "lists")
    vectors, folder = world.settings().pin_for(DAYS[0]), tmp_path / "images"
    world.pins.clear()
    encoder = make_encoder(folder)
    world.pin(DAYS[0], encoder, make_image_codebook(folder, encoder))
    world.pin(DAYS[1], str(vectors.encoder), vectors.codebook)
    world.write_images(DAYS[0])
    assert refresh(world, DAYS[0]) == 0
    accepted = ("--accept", "churn", "--accept", "score_drift", "--reason", "another encoder")
    assert refresh(world, DAYS[1], *accepted) == 0
    found = test_nights.vectors_of(world, DAYS[1])
    assert set(found) == {*catalogue_items(DAYS[1]), LEAVES_ON_DAY_2} - {MISSING, UNDECODABLE}
    late = vector_of(LEAVES_ON_DAY_2, DAYS[1], 256).astype(np.float64)
    np.testing.assert_allclose(found[LEAVES_ON_DAY_2], late / np.linalg.norm(late), atol=1e-6)


@pytest.fixture(scope="module")
def artefacts_of_images(tmp_path_factory: pytest.TempPathFactory) -> Artefacts:
    folder = tmp_path_factory.mktemp("of-images")
    encoder = make_encoder(folder)
    return Artefacts(encoder, make_image_codebook(folder, encoder))


def test_our_own_embeddings_as_vectors_give_the_same_ids_and_scores(
    tmp_path: Path, artefacts_of_images: Artefacts
) -> None:
    world = pinned(World(tmp_path / "shop"), artefacts_of_images)
    for day in DAYS[:2]:
        world.write_images(day)
        assert refresh(world, day) == 0
        rows = world.table("item_embeddings", day).select(["item_id", "embedding"])
        (world.folder / "vectors" / f"ds={day}").mkdir(parents=True)
        rows = rows.rename_columns(["item_id", "clip"])
        pq.write_table(rows, world.folder / "vectors" / f"ds={day}" / "0.parquet")
    encoder = register(world, "--category", "dress", "--category", "shirt")
    book = load_codebook(artefacts_of_images.codebook)
    same = save_codebook(
        str(tmp_path / "same"), by_hand(book.centres, book.numbers, os.path.basename(encoder))
    )
    own = copy.deepcopy(world)
    own.pins.clear()
    own.pin(DAYS[0], encoder, same)
    own.settings()
    text = own.config.read_text().replace('feature_set = "test"', 'feature_set = "own"')
    own.config.write_text(text)
    for day in DAYS[:2]:
        assert main(["refresh", "--config", str(own.config), "--ds", str(day)]) == 0
        for table in ("item_features", "user_simscores"):
            key = "item_id" if table == "item_features" else "impression_id"
            theirs, ours = (
                pq.read_table(world.root / name / table / f"ds={day}", partitioning=None)
                .sort_by(key).drop_columns(["encoder_id", "codebook_id"])
                for name in ("test", "own")
            )  # fmt: skip
            assert ours.equals(theirs)


def test_a_shop_without_images_needs_no_addresses(tmp_path: Path, capsys: Capture) -> None:
    world = make_vector_shop(tmp_path / "shop", D, "lists")
    shutil.rmtree(world.folder / "images")
    for day in DAYS[:2]:
        for path in (world.folder / "catalogue" / f"ds={day}").glob("*.parquet"):
            rows = pq.read_table(path, partitioning=None).drop_columns("image_uri")
            pq.write_table(rows, path)
    assert refresh(world, DAYS[0]) == 1  # the settings say that there are images
    assert "lacks the column 'image_uri'" in paragraph(capsys)
    world.settings()
    text = world.config.read_text().replace('image_roots = ["images"]', "image_roots = []")
    world.config.write_text(text)
    for day in DAYS[:2]:
        assert main(["refresh", "--config", str(world.config), "--ds", str(day)]) == 0
    assert set(world.table("item_embeddings", DAYS[1])["image_uri"].to_pylist()) == {""}
    assert main(["validate", "--config", str(world.config), "--ds", str(DAYS[1])]) == 0
    # An encoder of images has nothing to embed there.
    world.config.write_text(text.partition("[[pins]]")[0])
    encoder = make_encoder(tmp_path / "encoders", dimension=D)
    with world.config.open("a") as file:
        file.write(f"[[pins]]\nfrom_ds = {DAYS[0]}\nencoder = '{encoder}'\n")
    capsys.readouterr()
    assert main(["embed", "--config", str(world.config), "--ds", str(DAYS[2])]) == 2
    assert "the settings name no catalogue.image_roots" in paragraph(capsys)


def test_one_snapshot_serves_all_days(tmp_path: Path, capsys: Capture) -> None:
    world = make_vector_shop(tmp_path / "shop", D, "lists")
    (world.folder / "vectors" / f"ds={DAYS[1]}").rename(world.folder / "snapshot")
    folder = register(world, "--path", "snapshot/*.parquet", "--name", "once")
    world.pins.clear()
    world.pin(DAYS[0], folder, make_codebook(tmp_path / "once", folder, D))
    days = ("--start-ds", str(DAYS[0]), "--end-ds", str(DAYS[1]))
    assert courier(world, "refresh", *days) == 0
    for day in DAYS[:2]:
        made = manifest(world, "item_embeddings", day)
        assert made["notes"]["one_snapshot_of_vectors_for_all_days"]
        late = slow_unit(vector_of(LEAVES_ON_DAY_2, DAYS[1], D))  # as the snapshot has it
        found = test_nights.vectors_of(world, day)[LEAVES_ON_DAY_2]
        np.testing.assert_allclose(found, late, atol=1e-6)
    capsys.readouterr()
    assert courier(world, "audit", "--ds", str(DAYS[1])) == 0
    assert "one snapshot of vectors serves all days" in " ".join(capsys.readouterr().out.split())


def test_the_rejects_of_a_night_and_what_was_left_are_told(shop: World, capsys: Capture) -> None:
    capsys.readouterr()
    assert refresh(shop, DAYS[1]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "12 items and 1 former ones: 10 as they were, 1 vectors taken" in told
    assert "2 rejected: 1 no vector, 1 not finite; 1 vectors of other items left" in told


def test_vectors_are_followed_by_an_encoder_of_images_of_their_length(tmp_path: Path) -> None:
    world = make_vector_shop(tmp_path / "shop", 256, "lists")
    encoder = make_encoder(tmp_path / "images")
    world.pin(DAYS[1], encoder, make_image_codebook(tmp_path / "images", encoder))
    assert refresh(world, DAYS[0]) == 0
    world.write_images(DAYS[1])
    accepted = ("--accept", "churn", "--accept", "score_drift", "--reason", "another encoder")
    assert refresh(world, DAYS[1], *accepted) == 0
    rejects = {r["item_id"]: r for r in world.table("item_rejects", DAYS[1]).to_pylist()}
    assert {item: r["reason"] for item, r in rejects.items()} == {
        MISSING: "missing", UNDECODABLE: "not_an_image"
    }  # fmt: skip
    assert embed_work(world, DAYS[1])["images_unchanged"] == 0


def test_a_candidate_of_vectors_becomes_the_encoder_without_a_gap(shop: World) -> None:
    scope = ["--category", "dress", "--category", "shirt"]
    centred = register(shop, "--name", "centred", "--centre", "--ds", str(DAYS[0]), *scope)
    assert courier(shop, "embed", "--encoder", centred, "--ds", str(DAYS[1])) == 0
    assert refresh(shop, DAYS[1]) == 0
    shop.pin(DAYS[2], centred, make_codebook(shop.folder / "centred", centred, D))
    accepted = ("--accept", "churn", "--accept", "score_drift", "--reason", "another encoder")
    assert refresh(shop, DAYS[2], *accepted) == 0
    work = embed_work(shop, DAYS[2])
    assert work["vectors_taken"] == 1  # the one that changed: the others are the candidate's
    former = shop.table("item_embeddings", DAYS[2]).to_pylist()
    assert LEAVES_ON_DAY_2 in {r["item_id"] for r in former if not r["in_catalogue"]}


def test_a_backfill_makes_what_nights_make_and_full_tries_rejects_anew(
    shop: World, tmp_path: Path
) -> None:
    for day in DAYS[1:3]:
        assert refresh(shop, day) == 0
    other = make_vector_shop(tmp_path / "other" / "shop", D, "lists")
    days = ("--start-ds", str(DAYS[0]), "--end-ds", str(DAYS[2]))
    assert courier(other, "backfill", *days, "--step-days", "2") == 0
    for day in DAYS[:3]:
        for table in ("item_embeddings", "item_rejects", "user_simscores"):
            assert other.table(table, day).equals(shop.table(table, day)), (table, day)
    (waits, *_) = shop.table("item_rejects", DAYS[2]).to_pylist()
    assert waits["last_ds"] == DAYS[1]
    assert courier(shop, "embed", "--ds", str(DAYS[2]), "--full") == 0
    (tried, *_) = shop.table("item_rejects", DAYS[2]).to_pylist()
    assert tried["last_ds"] == DAYS[2]


def test_of_a_closed_day_no_vectors_are_waited_for(shop: World) -> None:
    shop.extra_settings = f'closed_days = ["{DAYS[1]}"]'
    for table in ("catalogue", "impressions", "vectors"):
        shutil.rmtree(shop.folder / table / f"ds={DAYS[1]}")
    assert refresh(shop, DAYS[1]) == 0
    rows = shop.table("item_embeddings", DAYS[1]).to_pylist()
    assert rows
    assert not any(row["in_catalogue"] for row in rows)


def test_more_vectors_than_items_are_cut_into_more_shards(tmp_path: Path) -> None:
    world = make_vector_shop(tmp_path / "shop", D, "lists")
    former, shards = [], []
    for day, more in zip(DAYS, (100, 0, 100), strict=False):
        others = {n: vector_of(n, day, D) for n in range(1000, 1000 + more)}
        write_vectors(world, day, [*vectors_of_day(day, D).items(), *others.items()])
        assert courier(world, "embed", "--ds", str(day)) == 0
        assert counts(world, "item_embeddings", day)["vectors_ignored"] >= more
        shards.append(len(manifest(world, "item_embeddings", day)["files"]))
        former.append(test_nights.vectors_of(world, day)[world.item(LEAVES_ON_DAY_2)])
    assert shards[0] == shards[2] > shards[1]
    for found in former[1:]:  # it keeps what it had, in whichever part that was
        np.testing.assert_array_equal(found, former[0])


def test_status_tells_that_the_next_night_waits_for_vectors(shop: World, capsys: Capture) -> None:
    shutil.rmtree(shop.folder / "vectors" / f"ds={DAYS[1]}")
    capsys.readouterr()
    assert courier(shop, "status", "--json") == 0
    assert json.loads(capsys.readouterr().out)["next"]["waits_for"] == ["vectors"]


def test_the_colour_histogram_is_left_out_where_there_are_no_images(
    shop: World, capsys: Capture
) -> None:
    assert refresh(shop, DAYS[1]) == 0
    shop.settings()
    text = shop.config.read_text().replace('image_roots = ["images"]', "image_roots = []")
    shop.config.write_text(text)
    capsys.readouterr()
    assert main(["measure", "--config", str(shop.config), "--ds", str(DAYS[1])]) == 0
    assert "histogram: 9 of 9 images could not be read" in capsys.readouterr().out
    fitted = ("--weights", "random", "--backbone", "shufflenet_v2_x0_5", "--centre")
    told = ("--config", str(shop.config), "--ds", str(DAYS[1]))
    assert main(["init-encoder", *told, *fitted]) == 2
    assert "name no catalogue.image_roots" in paragraph(capsys)
