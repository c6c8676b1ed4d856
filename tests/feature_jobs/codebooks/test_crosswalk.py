"""Tests where items of old clusters go: counts against plain loops, shares that sum to one."""

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from feature_jobs.codebooks.codebook import Codebook
from feature_jobs.codebooks.crosswalk import (
    CrosswalkJob,
    count_moves,
    crosswalk,
    read_counts,
    with_moves,
)
from feature_jobs.schemas import CROSSWALK, DataContractError
from feature_jobs.store.documents import write_json
from feature_jobs.store.partitions import Partition, write_parquet
from tests.support.codebooks import by_hand, unit_rows

ENCODER = "tiny-000000000000"


def book(numbers: list[int], label: str = "main") -> Codebook:
    return by_hand({label: unit_rows(len(numbers))}, {label: np.array(numbers)}, ENCODER)


def sums(table: pa.Table, column: str) -> dict[int, float]:
    found: Counter[int] = Counter()
    for row in table.to_pylist():
        found[row["old_cluster_id"]] += row[column]
    return dict(found)


def test_items_and_their_impressions_are_counted_by_old_and_new_number() -> None:
    old, new = np.array([1, 1, 1, 2, 0]), np.array([1, 3, 3, 2, 3])
    counts = count_moves(old, new, np.array([10, 0, 4, 0, 99]), "main")
    table = crosswalk([counts], book([1, 2]), book([1, 2, 3]))
    assert table.schema == CROSSWALK
    rows = [tuple(row.values()) for row in table.to_pylist()]
    assert rows == [
        ("main", 1, 3, 2, pytest.approx(2 / 3), 4, pytest.approx(4 / 14)),
        ("main", 1, 1, 1, pytest.approx(1 / 3), 10, pytest.approx(10 / 14)),
        ("main", 2, 2, 1, 1.0, 0, 1.0),  # no impression: they would go where the items went
    ]


def test_an_old_number_without_items_stays_where_it_lives_on_or_goes_to_none() -> None:
    nothing = count_moves(np.zeros(0, "i4"), np.zeros(0, "i4"), np.zeros(0, "i8"), "main")
    table = crosswalk([nothing], book([1, 2]), book([2, 7]))
    rows = [tuple(row.values()) for row in table.to_pylist()]
    assert rows == [("main", 1, 0, 0, 1.0, 0, 1.0), ("main", 2, 2, 0, 1.0, 0, 1.0)]


@given(st.integers(0, 2**32 - 1))
def test_the_shares_of_every_old_number_sum_to_one_however_the_shards_are_cut(seed: int) -> None:
    rng = np.random.default_rng(seed)
    parent, child = book([1, 2, 4, 6]), book([2, 4, 7, 8, 9])
    old = rng.choice([0, 1, 2, 4], 60)
    new, shown = rng.choice([2, 4, 7, 8, 9], 60), rng.integers(0, 3, 60)
    cut = int(rng.integers(0, 61))
    parts = [
        count_moves(old[at], new[at], shown[at], "main") for at in (slice(cut), slice(cut, None))
    ]
    table = crosswalk(parts, parent, child)
    assert table.equals(crosswalk([count_moves(old, new, shown, "main")], parent, child))
    for column in ("item_share", "impression_share"):
        assert sums(table, column) == pytest.approx({1: 1.0, 2: 1.0, 4: 1.0, 6: 1.0})
    for row in table.to_pylist():
        mine = (old == row["old_cluster_id"]) & (new == row["new_cluster_id"])
        assert (row["items"], row["impressions"]) == (mine.sum(), shown[mine].sum())
    info = with_moves(child.info, table).resolutions[0]
    known = old > 0
    assert info.moved_items == pytest.approx((old != new)[known].mean())
    if shown[known].sum():
        expected = shown[known & (old != new)].sum() / shown[known].sum()
        assert info.moved_impressions == pytest.approx(expected)


def test_each_resolution_has_rows_of_its_own_and_new_ones_have_none() -> None:
    both = {"main": unit_rows(2), "coarse": unit_rows(1)}
    parent = by_hand(both, {"main": np.array([1, 2]), "coarse": np.array([1])}, ENCODER)
    child = by_hand(
        {**both, "fine": unit_rows(1)},
        {"main": np.array([1, 3]), "coarse": np.array([1]), "fine": np.array([1])}, ENCODER,
    )  # fmt: skip
    one = np.ones(3, np.int64)
    parts = [
        pa.concat_tables(
            [
                count_moves(np.array([1, 2, 2]), np.array([1, 3, 3]), one, "main"),
                count_moves(one, one, one, "coarse"),
            ]
        )
    ]
    table = crosswalk(parts, parent, child)
    assert [row["label"] for row in table.to_pylist()] == ["coarse", "main", "main"]
    moved = {r.label: r.moved_items for r in with_moves(child.info, table).resolutions}
    assert moved == {"main": pytest.approx(2 / 3), "coarse": 0.0, "fine": None}


def test_impressions_or_shards_that_a_runner_lost_are_missed(tmp_path: Path) -> None:
    """Without its impressions an item would still have a share, by items alone."""
    job = CrosswalkJob(
        Partition("e", {"files": [{"name": "a"}, {"name": "b"}]}),
        None,
        "",
        "",
        (),
        None,
        str(tmp_path),
    )
    for shard, impressions in enumerate((3, 4)):
        with pytest.raises(DataContractError, match=f"counted: {shard} of 2 came"):
            next(read_counts(job, 7))
        write_json(f"{tmp_path}/came/0000{shard}.json", {"impressions": impressions})
        write_parquet(f"{tmp_path}/moves/0000{shard}.parquet", pa.table({"items": [shard]}))
    assert [table["items"].to_pylist() for table in read_counts(job, 7)] == [[0], [1]]
    with pytest.raises(DataContractError, match="7 of 8 came"):
        next(read_counts(job, 8))
