"""Tests the cluster IDs of a shard's items, and what a night tells of its clusters."""

import numpy as np
import pyarrow as pa
import pytest

from feature_jobs.codebooks.codebook import Codebook
from feature_jobs.codebooks.nearest import CodebookSearch
from feature_jobs.items.item_features import count_clusters, features_of, summarise_clusters
from feature_jobs.schemas import DataContractError
from feature_jobs.store import arrays
from tests.support.codebooks import by_hand, unit_rows

POINTS = unit_rows(12)
NUMBERS = np.array([2, 3, 5, 9])


LABELS = ("main", "coarse")


def book() -> Codebook:
    centres = {"main": POINTS[:4], "coarse": POINTS[:1]}
    return by_hand(centres, {"main": NUMBERS, "coarse": np.array([7])}, "tiny-000000000000")


def embedded(points: np.ndarray) -> pa.Table:
    n = len(points)
    return pa.table(
        {
            "item_id": pa.chunked_array([pa.array(np.arange(n))]),
            "embedding": arrays.list_column(points, pa.list_(pa.float32())),
            "category": pa.chunked_array([pa.array(["dress"] * n, pa.string())]),
            "in_catalogue": np.ones(n, bool),
        }
    )


NO_REJECTS = pa.table({"item_id": pa.array([], pa.int64()), "category": pa.array([], pa.string())})


def features(points: np.ndarray) -> pa.Table:
    return features_of(embedded(points), NO_REJECTS, CodebookSearch(book()), None, second=True)


def test_a_centre_has_its_own_number_and_distance_zero() -> None:
    rows = features(POINTS[:4])
    assert rows["cluster_id"].to_pylist() == NUMBERS.tolist()
    assert rows["cluster_coarse"].to_pylist() == [7] * 4
    np.testing.assert_allclose(rows["centre_distance"].to_numpy(), 0, atol=1e-6)
    assert (rows["second_distance"].to_numpy() > 0.5).all()


def test_an_unrelated_item_changes_no_other_ones_id() -> None:
    alone = features(POINTS[4:8]).slice(0, 4)
    among = features(POINTS[4:]).slice(0, 4)
    assert alone.equals(among)


@pytest.mark.parametrize("value", [np.nan, np.inf, 3.0])
def test_an_embedding_that_is_no_unit_vector_is_refused_and_named(value: float) -> None:
    points = POINTS.copy()
    points[5, 0] = value
    with pytest.raises(DataContractError, match=r"1 rows whose embedding .* item_id 5"):
        features(points)


def test_what_moved_since_the_day_before_is_counted_by_the_cluster_it_left() -> None:
    rows = pa.table(
        {
            "item_id": np.arange(6),
            "cluster_id": pa.array([2, 3, 3, 5, 0, 9], pa.int32()),
            "cluster_coarse": pa.array([7] * 6, pa.int32()),
        }
    )
    before = pa.table(
        {"item_id": [1, 2, 3, 4, 0], "cluster_id": pa.array([5, 5, 5, 5, 2], pa.int32())}
    )
    counts = count_clusters(rows, before, LABELS, of_another_lineage=False)
    found = summarise_clusters(counts, book().info)
    main, coarse = found["main"], found["coarse"]
    assert (main["compared_items"], main["moved_items"]) == (4, 2)
    assert main["most_moved"] == [{"cluster_id": 5, "moved": 2, "of": 3}]
    assert (main["items"], main["used"], main["dead"], main["items_max"]) == (5, 4, 0, 2)
    assert (coarse["compared_items"], coarse["moved_items"]) == (0, 0)  # the column is new
    other = summarise_clusters(count_clusters(rows, before, LABELS, True), book().info)["main"]
    assert (other["compared_items"], other["moved_items"]) == (4, 4)


def test_on_the_first_day_nothing_can_have_moved() -> None:
    found = summarise_clusters(count_clusters(features(POINTS), None, LABELS, False), book().info)
    assert (found["main"]["compared_items"], found["main"]["most_moved"]) == (0, [])
    assert found["main"]["items"] == 12
    assert sum(found["coarse"][k] for k in ("used", "dead")) == 1


def test_clusters_without_items_are_dead_and_shards_add_up() -> None:
    rows = features(POINTS[:2])
    parts = [count_clusters(part, None, LABELS, False) for part in (rows[:1], rows[1:])]
    found = summarise_clusters(pa.concat_tables(parts), book().info)["main"]
    assert (found["items"], found["used"], found["dead"]) == (2, 2, 2)
