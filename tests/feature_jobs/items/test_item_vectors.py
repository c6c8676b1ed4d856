"""Items are found by their ID, whichever way they came."""

import numpy as np
import pyarrow as pa
import pytest

from feature_jobs.items.item_vectors import (
    ItemVectors,
    answer,
    bucket_starts,
    items_of_answers,
    no_answers,
    whole_steps,
)
from feature_jobs.store import hashing
from tests.support.codebooks import unit_rows

ID_TYPES = {int: pa.int64(), str: pa.large_string()}


def items(ids: list, hashes: np.ndarray) -> ItemVectors:
    n = len(ids)
    return ItemVectors(
        pa.array(ids, ID_TYPES[type(ids[0])]), hashes, bucket_starts(hashes),
        np.arange(1, n + 1, dtype="i4"), np.zeros(n, "i4"), np.arange(n), unit_rows(n),
    )  # fmt: skip


def test_every_known_id_is_found_and_no_other() -> None:
    ids = np.random.default_rng(0).permutation(5000)
    hashes = hashing.hash_ids(pa.array(ids))
    order = np.argsort(hashes)
    known = items(ids[order].tolist(), hashes[order])
    wanted = np.arange(-50, 5050)
    found = known.find(pa.array(wanted))
    inside = (wanted >= 0) & (wanted < 5000)
    assert (found[~inside] == -1).all()
    np.testing.assert_array_equal(ids[order][found[inside]], wanted[inside])
    assert len(known.starts) == 4097


def test_items_with_one_hash_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """64-bit digests of 100 M strings collide now and then: no item may pass for another."""
    monkeypatch.setattr(hashing, "hash_ids", lambda ids: np.full(len(ids), 7, np.uint64))
    known = items(["a", "b", "c"], np.full(3, 7, np.uint64))
    assert known.find(pa.array(["c", "x", "a"])).tolist() == [2, -1, 0]


def test_nothing_is_known_of_an_empty_catalogue() -> None:
    for nothing in (
        ItemVectors(
            pa.array([], pa.int64()), np.zeros(0, np.uint64), np.zeros(2, np.int64),
            np.zeros(0, "i4"), np.zeros(0, "i4"), np.zeros(0, "i8"), unit_rows(1),
        ),
        items_of_answers(no_answers(pa.int64())),
    ):  # fmt: skip
        found = nothing.look_up(pa.array([1, 2]))
        told = [column.tolist() for column in found[:4]]
        assert told == [[False] * 2, [-1] * 2, [0] * 2, [0] * 2]
        assert found.further == {}
        assert len(nothing.vectors) == 1


def test_answers_say_of_asked_items_what_the_shard_knows() -> None:
    matrix = unit_rows(2)
    shard = pa.table(
        {
            "item_id": ["a", "b", "c"],
            "cluster_id": pa.array([4, 0, 6], pa.int32()),
            "cluster_fine": pa.array([7, 0, 9], pa.int32()),
            "old_cluster_id": pa.array([4, 0, -1], pa.int32()),
            "row": [1, -1, 0],
        }
    )
    asked = pa.chunked_array([["c", "unknown", "b"]])
    assert no_answers(pa.string(), ["fine"]).schema == answer(asked, shard, matrix).schema
    found = items_of_answers(answer(asked, shard, matrix))
    told = found.look_up(pa.array(["a", "b", "c", "unknown"]))
    assert told.known.tolist() == [False, True, True, False]
    assert told.cluster.tolist() == [0, 0, 6, 0]
    assert told.old_cluster.tolist() == [0, 0, -1, 0]
    assert told.clusters("main") is told.cluster
    assert told.clusters("fine").tolist() == [0, 0, 9, 0]
    ended = told.and_none()
    assert [ended.known[-1], ended.vector[-1], ended.cluster[-1]] == [False, -1, 0]
    assert ended.clusters("fine").tolist() == [0, 0, 9, 0, 0]
    assert (told.vector >= 0).tolist() == [False, False, True, False]
    np.testing.assert_array_equal(found.vectors[told.vector[2]], matrix[0])


def test_buckets_begin_where_their_hashes_do() -> None:
    hashes = np.sort(np.random.default_rng(1).integers(0, 2**64 - 1, 1000, np.uint64))
    starts = bucket_starts(hashes)
    assert (starts[0], starts[-1], len(starts)) == (0, 1000, 513)
    for bucket in (0, 17, 511):
        inside = hashes[starts[bucket] : starts[bucket + 1]]
        assert (inside >> np.uint64(55) == bucket).all()


def test_components_become_the_nearest_multiples_of_2_to_the_minus_26() -> None:
    rows = unit_rows(100, seed=2)
    rows[0, :3] = [1, -1, 0.7]
    found = whole_steps(rows)
    assert found.dtype == np.float32
    steps = found.astype(np.float64) * 2**26
    np.testing.assert_array_equal(steps, np.rint(steps))
    assert 0 < np.abs(found.astype(np.float64) - rows).max() <= 2.0**-27
    np.testing.assert_array_equal(found[np.abs(rows) >= 0.25], rows[np.abs(rows) >= 0.25])
