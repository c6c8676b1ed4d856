"""What `item_features` say of items is found by ID, through the machine's copy."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from feature_jobs.items import item_facts
from feature_jobs.items.item_facts import open_item_facts
from feature_jobs.schemas import ITEM_FEATURES, cluster_field
from feature_jobs.store import broadcast, hashing, partitions

CLUSTERS = ("cluster_id", "cluster_coarse")
ITEMS = 200


def publish(folder: Path, ids: pa.Array, shards: int) -> partitions.Partition:
    """Writes features of items: of every third no image, of every fifth out of scope."""
    n = np.arange(len(ids))
    image, scope = n % 3 > 0, n % 5 > 0
    rows = pa.table(
        {
            "item_id": ids, "category": pa.nulls(len(n), pa.string()), "has_image": image,
            "in_scope": scope, "in_catalogue": np.ones(len(n), bool),
            "cluster_id": np.where(image & scope, 1 + n % 7, 0).astype(np.int32),
            "centre_distance": np.zeros(len(n), np.float32),
            "encoder_id": ["e"] * len(n), "codebook_id": ["c"] * len(n),
            "cluster_coarse": np.where(image & scope, 1 + n % 2, 0).astype(np.int32),
        }
    )  # fmt: skip
    schema = ITEM_FEATURES.schema(
        ids.type, extra=[cluster_field("coarse")], without=["second_distance", "embedding"]
    )
    of = hashing.shard_of(hashing.hash_ids(ids), shards)
    for shard in range(shards):
        mine = rows.filter(pa.array(of == shard))
        partitions.write_part(str(folder), ITEM_FEATURES, schema, mine, shard, shards)
    return partitions.Partition(str(folder), {"files": partitions.receipts(str(folder))})


def as_ids(numbers: np.ndarray, kind: str) -> pa.Array:
    ids = pa.array(numbers)
    return ids if kind == "int" else ids.cast(pa.string())


@pytest.mark.parametrize("kind", ["int", "string"])
@pytest.mark.parametrize("shards", [1, 8])
def test_each_item_is_found_with_what_is_known_of_it(
    tmp_path: Path, kind: str, shards: int
) -> None:
    features = publish(tmp_path, as_ids(np.arange(ITEMS), kind), shards)
    key = f"facts-test-{kind}-{shards}"
    wanted = np.random.default_rng(0).integers(0, ITEMS + 50, 500)
    try:
        facts = open_item_facts(features, CLUSTERS, key)
        found = facts.look_up(as_ids(wanted, kind))
    finally:
        broadcast.discard(key)
    known = wanted < ITEMS
    image, scope = known & (wanted % 3 > 0), known & (wanted % 5 > 0)
    expected = {
        "item_known": known, "has_image": image, "in_scope": scope,
        "cluster_id": np.where(image & scope, 1 + wanted % 7, 0),
        "cluster_coarse": np.where(image & scope, 1 + wanted % 2, 0),
    }  # fmt: skip
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, name)
    in_memory = item_facts.item_facts(features, CLUSTERS).look_up(as_ids(wanted, kind))
    for name, values in found.items():
        np.testing.assert_array_equal(in_memory[name], values, name)


def test_items_whose_hashes_are_equal_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "hash_ids", lambda ids: np.zeros(len(ids), np.uint64))
    rows = {
        "item_id": [1, 2, 3], "hash": np.zeros(3, np.uint64), "has_image": [True] * 3,
        "in_scope": [True] * 3, "cluster_id": np.array([4, 5, 6], np.int32),
    }  # fmt: skip
    facts = item_facts.ItemFacts((pa.table(rows),), ("cluster_id",))
    found = facts.look_up(pa.array([3, 9, 1, 3]))
    assert found["cluster_id"].tolist() == [6, 0, 4, 6]
    assert found["item_known"].tolist() == [True, False, True, True]


def test_without_items_none_is_known(tmp_path: Path) -> None:
    features = publish(tmp_path, pa.array([], pa.int64()), 2)
    try:
        found = open_item_facts(features, CLUSTERS, "facts-test-none").look_up(pa.array([1]))
    finally:
        broadcast.discard("facts-test-none")
    assert not found["item_known"].any()
