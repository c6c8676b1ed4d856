"""Tests what is made of rows with histories against plain loops, whatever order they come in."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from feature_jobs.impressions.scoring import ScoreForm, score_rows, unfolded
from feature_jobs.impressions.simscore import share_histories
from feature_jobs.items.item_vectors import ItemVectors, bucket_starts, whole_steps
from feature_jobs.store import hashing
from tests.support import oracles
from tests.support.codebooks import unit_rows

LENGTH = 4
EVERY = (
    "history_cluster_fine", "history_cluster_ids", "history_item_ids", "same_cluster_fine",
    "sim_bucket", "top_positions",
)  # fmt: skip
VECTORS = whole_steps(unit_rows(8))


def known_items() -> ItemVectors:
    """Makes items 0 to 9, of which 8 and 9 have neither a vector nor a cluster."""
    hashes = hashing.hash_ids(pa.array(np.arange(10)))
    order = np.argsort(hashes)
    scores = order < 8
    clusters = np.where(scores, order % 3 + 1, 0).astype(np.int32)
    return ItemVectors(
        pa.array(order), hashes[order], bucket_starts(hashes[order]), clusters,
        np.zeros(10, np.int32), np.where(scores, order, -1), VECTORS,
        {"fine": np.where(scores, order % 2 + 5, 0).astype(np.int32)},
    )  # fmt: skip


def drawn_rows(seed: int, count: int = 60) -> pa.Table:
    """Draws rows of items 0 to 11, two of them unknown, by neighbours that share a history."""
    rng = np.random.default_rng(seed)
    lists = [rng.integers(0, 12, rng.integers(0, LENGTH + 2)).tolist() for _ in range(count)]
    histories = pa.array(lists, pa.list_(pa.int64())).take(np.sort(rng.integers(0, count, count)))
    return pa.table({"item_id": rng.integers(0, 12, count), "history": histories})


def folded(rows: pa.Table) -> pa.Table:
    return share_histories(rows, np.zeros(len(rows), np.int64))


@pytest.mark.parametrize("seed", range(5))
def test_rows_are_scored_in_their_own_order_as_plain_loops_would(seed: int) -> None:
    rows = drawn_rows(seed)
    mixed = rows.take(np.random.default_rng(seed).permutation(len(rows)))
    for some in (rows, mixed, rows.slice(0, 0)):
        at = np.arange(len(some))
        form = ScoreForm(LENGTH, EVERY, top_k=3)
        found = pa.table(score_rows(folded(some), known_items(), form).arrow(at)).to_pylist()
        assert len(found) == len(some)
        named = dict(enumerate(VECTORS))
        for row, given in zip(found, some.to_pylist(), strict=True):
            item, past = given["item_id"], given["history"][:LENGTH]
            scores, mask = oracles.score(item, past, named, LENGTH)
            assert (row["history_item_ids"], row["history_len"]) == (past, len(past))
            assert row["sim_mask"] == mask
            np.testing.assert_allclose(row["sim_scores"], scores, atol=1e-6)
            same = [i for i in past if item < 8 and i < 8 and i % 3 == item % 3]
            assert row["same_cluster"] == len(same)
            same = [i for i in past if item < 8 and i < 8 and i % 2 == item % 2]
            assert row["same_cluster_fine"] == len(same)
            empty = [0] * (LENGTH - len(past))
            ids = [i % 3 + 1 if i < 8 else 0 for i in past]
            assert row["history_cluster_ids"] == ids + empty
            ids = [i % 2 + 5 if i < 8 else 0 for i in past]
            assert row["history_cluster_fine"] == ids + empty
            assert row["sim_bucket"] == oracles.buckets(row["sim_scores"], mask)
            assert row["top_positions"] == oracles.top_positions(row["sim_scores"], mask, 3)
            assert row["simtier"] == oracles.tiers(row["sim_scores"], mask)


def test_what_is_not_asked_for_is_not_made_and_needs_no_further_resolution() -> None:
    rows, at = drawn_rows(1), np.arange(60)
    every, plain = ScoreForm(LENGTH, EVERY), ScoreForm(LENGTH)
    assert (every.labels, plain.labels) == (("fine",), ())
    few = replace(known_items(), further_ids={})
    found = score_rows(rows, few, plain).arrow(at)
    asked = score_rows(rows, known_items(), every).arrow(at)
    assert asked.keys() - found.keys() == set(EVERY)
    assert all(asked[name].equals(column) for name, column in found.items())


def test_the_tiers_of_muse_are_those_of_the_form() -> None:
    rows = drawn_rows(2)
    form = ScoreForm(LENGTH, ("sim_bucket",), "muse")
    for row in pa.table(score_rows(rows, known_items(), form).arrow(np.arange(60))).to_pylist():
        expected = oracles.muse_tiers(row["sim_scores"])
        np.testing.assert_allclose(row["simtier"], expected, rtol=1e-6)
        assert row["sim_bucket"] == oracles.buckets(row["sim_scores"], row["sim_mask"], True)


def test_rows_whose_first_shares_a_history_are_refused() -> None:
    rows = folded(drawn_rows(0).take([0, 0])).slice(1)
    with pytest.raises(ValueError, match="no row before"):
        score_rows(rows, known_items(), ScoreForm(LENGTH))


def test_a_folded_column_is_its_lists_and_their_places() -> None:
    lists, place = unfolded(pa.chunked_array([[[1], None], [None, []]], pa.list_(pa.int64())))
    assert (lists.to_pylist(), place.tolist()) == ([[1], []], [0, 0, 0, 1])
