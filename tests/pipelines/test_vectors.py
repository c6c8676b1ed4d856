"""Nights that take a shop's own vectors: the slow twins, and all that a shop may do wrong.

What other tests ask of nights by plain loops is asked here of nights without an image read.
"""

import math

import numpy as np
import pytest

from tests.conftest import Artefacts
from tests.pipelines import test_join, test_nights
from tests.support.commands import (
    Capture,
    counts,
    courier,
    embed_work,
    manifest,
)
from tests.support.vector_shop import (
    CHANGES_ON_DAY_3,
    make_vector_shop,
    vectors_of_day,
)
from tests.support.world import (
    DAYS,
    LEAVES_ON_DAY_2,
    MISSING,
    SAME_BYTES_AS_1,
    UNDECODABLE,
    World,
    catalogue_items,
)

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
