"""What `[simscore]` asks for is in the published table, as plain loops make it."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.planning.made_with import history_settings
from tests.conftest import Artefacts, pinned
from tests.support import oracles
from tests.support.commands import (
    Capture,
    courier,
    make_night,
    manifest,
    paragraph,
    refresh,
    status,
)
from tests.support.world import DAYS, World, draw_impressions

LENGTH, TOP_K = 5, 3
COLUMNS = (
    "top_positions", "sim_bucket", "same_cluster_coarse", "history_item_ids",
    "history_cluster_ids", "history_cluster_coarse",
)  # fmt: skip
EVERY = f"columns = {list(COLUMNS)}\ntop_k = {TOP_K}\ntiers = 'muse'\nembedding_dtype = 'float16'\n"


def two_nights(folder: Path, artefacts: Artefacts, simscore: str) -> World:
    world = pinned(World(folder, simscore=simscore), artefacts)
    for number, day in enumerate(DAYS[:2]):
        world.write_images(day)
        world.write_impressions(day, draw_impressions(day, seed=number, count=60))
        make_night(world.settings(), day)
    return world


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory, artefacts: Artefacts) -> World:
    """Makes two nights with all that can be asked for, which tests only read."""
    return two_nights(tmp_path_factory.mktemp("asked") / "shop", artefacts, EVERY)


def features_of(world: World) -> dict[Any, dict[str, Any]]:
    return {row["item_id"]: row for row in world.table("item_features", DAYS[1]).to_pylist()}


def half_vectors(world: World) -> dict[Any, np.ndarray]:
    """Returns the vectors of items that score, as a store of half floats has them."""
    features, rows = features_of(world), world.table("item_embeddings", DAYS[1]).to_pylist()
    return {
        row["item_id"]: np.array(row["embedding"]).astype(np.float16).astype(np.float64)
        for row in rows
        if features[row["item_id"]]["in_scope"]
    }


def test_the_columns_are_what_plain_loops_make_of_the_published_items(asked: World) -> None:
    features, vectors = features_of(asked), half_vectors(asked)
    rows = asked.table("user_simscores", DAYS[1]).to_pylist()
    assert any(row["same_cluster_coarse"] > row["same_cluster"] for row in rows)
    assert any(1 < row["sim_known"] < row["history_len"] for row in rows)
    nothing = {"cluster_id": 0, "cluster_coarse": 0}
    for row in rows:
        past, mask, scores = row["history_item_ids"], row["sim_mask"], row["sim_scores"]
        exact = [
            float(vectors[item] @ vectors[row["item_id"]]) if real else 0.0
            for item, real in zip([*past, *[None] * LENGTH][:LENGTH], mask, strict=True)
        ]
        np.testing.assert_allclose(scores, np.clip(exact, -1, 1), atol=1e-7)
        own = features.get(row["item_id"], nothing)["cluster_coarse"]
        found = {
            name: [features.get(item, nothing)[name] for item in past] for name in nothing
        }  # fmt: skip
        empty = [0] * (LENGTH - len(past))
        assert row["history_cluster_ids"] == found["cluster_id"] + empty
        assert row["history_cluster_coarse"] == found["cluster_coarse"] + empty
        assert row["same_cluster_coarse"] == (found["cluster_coarse"].count(own) if own else 0)
        assert row["sim_bucket"] == oracles.buckets(scores, mask, is_muse=True)
        assert row["top_positions"] == oracles.top_positions(scores, mask, TOP_K)
        np.testing.assert_allclose(row["simtier"], oracles.muse_tiers(scores), rtol=1e-6)


def test_their_types_are_said_and_what_they_mean(asked: World) -> None:
    schema = asked.table("user_simscores", DAYS[1]).schema
    lists = ("history_cluster_ids", "history_cluster_coarse", "sim_bucket", "top_positions")
    assert {schema.field(name).type.value_type for name in lists} == {pa.int32()}
    assert schema.field("same_cluster_coarse").type == pa.int32()
    assert schema.field("simtier").type.value_type == pa.float32()
    for name in (*COLUMNS, "simtier"):
        assert schema.field(name).metadata[b"meaning"]


def test_what_was_asked_for_validates_is_audited_and_known_to_engines(
    asked: World, capsys: Capture
) -> None:
    capsys.readouterr()
    assert courier(asked, "validate", "--ds", str(DAYS[1]), "--json") == 0
    day = json.loads(capsys.readouterr().out)
    assert (day["sound"], day["recomputed_impressions"]) == (True, 62)
    assert courier(asked, "audit", "--ds", str(DAYS[1])) == 0
    assert "are what their inputs give" in capsys.readouterr().out
    _, told = status(asked, capsys, "--ddl", "spark")
    assert "`top_positions` ARRAY<INT> COMMENT" in told
    assert "`same_cluster_coarse` INT COMMENT" in told
    assert "`simtier` ARRAY<FLOAT> COMMENT" in told


def test_a_join_takes_scores_of_the_form_that_is_asked_for(
    asked: World, tmp_path: Path, capsys: Capture
) -> None:
    world = copy.copy(asked)
    world.folder = tmp_path / "shop"
    shutil.copytree(asked.folder, world.folder)
    samples = ("--samples", "impressions/ds={ds}/*.parquet", "--ds", str(DAYS[1]))
    assert courier(world, "join", *samples, "--features-from", "same") == 0
    assert "taken where a sample is an impression" in capsys.readouterr().err
    found = pq.read_table(world.root / "test/joined/ctr" / f"ds={DAYS[1]}", partitioning=None)
    assert set(COLUMNS) <= set(found.column_names)
    assert {len(row) for row in found["simtier"].to_pylist()} == {22}


def test_the_manifest_says_what_was_asked_for_and_of_what_was_not_nothing(
    asked: World, tmp_path: Path, artefacts: Artefacts
) -> None:
    """What a night with defaults was made with is what it was before one could ask."""
    plain = two_nights(tmp_path / "shop", artefacts, "")
    of_histories = history_settings(plain.settings())
    told = manifest(plain, "user_simscores", DAYS[1])
    assert told["settings"] == {**of_histories, "history_item_ids": False}
    told = manifest(asked, "user_simscores", DAYS[1])
    assert told["settings"] == {
        **of_histories, "history_item_ids": True, "tiers": "muse", "top_k": TOP_K,
        "columns": sorted(set(COLUMNS) - {"history_item_ids"}), "embedding_dtype": "float16",
    }  # fmt: skip


def test_another_order_of_columns_or_a_top_k_of_nothing_makes_nothing_again(
    tmp_path: Path, artefacts: Artefacts, capsys: Capture
) -> None:
    world = pinned(World(tmp_path / "shop"), artefacts)
    world.simscore = "columns = ['sim_bucket', 'history_item_ids']"
    world.write_images(DAYS[0])
    assert refresh(world, DAYS[0]) == 0

    def remade() -> bool:
        before = manifest(world, "user_simscores", DAYS[0])["version"]
        assert refresh(world, DAYS[0]) == 0
        return manifest(world, "user_simscores", DAYS[0])["version"] != before

    world.simscore = "columns = ['history_item_ids', 'sim_bucket']\ntop_k = 3"
    assert not remade()
    world.simscore = "columns = ['history_item_ids', 'top_positions']"
    assert remade()
    world.simscore += "\ntop_k = 3"
    assert remade()


@pytest.mark.parametrize(
    ("column", "hint"),
    [
        ("history_cluster_coarser", "Did you mean 'history_cluster_coarse'?"),
        ("same_cluster_corse", "Did you mean 'same_cluster_coarse'?"),
        ("same_cluster_x", "The codebook has coarse beside main."),
    ],
)
def test_a_resolution_that_the_codebook_lacks_is_refused_with_the_nearest(
    world: World, capsys: Capture, column: str, hint: str
) -> None:
    world.simscore = f"columns = ['{column}']"
    world.write_images(DAYS[0])
    assert refresh(world, DAYS[0]) == 2
    told = paragraph(capsys)
    assert f"asks for {column!r}" in told
    assert hint in told
    assert not (world.root / "test").exists()
