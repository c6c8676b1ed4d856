"""Tests what is made of rows with histories against plain loops, whatever order they come in."""

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
        form = ScoreForm(LENGTH, ("history_item_ids",))
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


def test_rows_whose_first_shares_a_history_are_refused() -> None:
    rows = folded(drawn_rows(0).take([0, 0])).slice(1)
    with pytest.raises(ValueError, match="no row before"):
        score_rows(rows, known_items(), ScoreForm(LENGTH))


def test_a_folded_column_is_its_lists_and_their_places() -> None:
    lists, place = unfolded(pa.chunked_array([[[1], None], [None, []]], pa.list_(pa.int64())))
    assert (lists.to_pylist(), place.tolist()) == ([[1], []], [0, 0, 0, 1])
