"""EMBED plans who is looked at, who is read, who waits, and which images meet in a chunk."""

import datetime as dt
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from courier_model.images import DecodeLimits
from feature_jobs.inputs import check_unique
from feature_jobs.items import embed_plan
from feature_jobs.items.embed_plan import REJECTED, TO_READ, UNCHANGED, WAITING, Sightings
from feature_jobs.schemas import DataContractError
from feature_jobs.store import files
from tests.support.embed_rows import (
    DAY,
    WRITTEN,
    Row,
    catalogue,
    day,
    digest,
    embeddings,
    images,
    rejects,
)

# ---- The items of a shard --------------------------------------------------------------------


def test_a_sorted_catalogue_with_an_item_twice_is_refused_with_examples() -> None:
    check_unique(pa.chunked_array([[1, 2], [3]]), DAY)
    check_unique(pa.chunked_array([[]], pa.int64()), DAY)
    with pytest.raises(DataContractError, match="2 items twice or more, for example item_id 2, 4"):
        check_unique(pa.chunked_array([[1, 2], [2, 3, 4, 4, 4]]), DAY)


def test_former_items_are_dated_when_they_left_and_kept_for_the_window() -> None:
    left = [None, None, day(-2), day(-3)]
    rows = pa.table({"item_id": [1, 2, 3, 4], "left_catalogue_ds": pa.array(left, pa.date32())})
    kept = embed_plan.former_items(rows, pa.chunked_array([[1]]), DAY, window_days=3).to_pylist()
    assert kept == [
        {"item_id": 2, "left_catalogue_ds": DAY},
        {"item_id": 3, "left_catalogue_ds": day(-2)},
    ]
    nothing = rows.slice(0, 0)
    assert len(embed_plan.former_items(nothing, pa.chunked_array([[1]]), DAY, 3)) == 0


def test_the_items_of_a_shard_are_its_catalogue_and_then_the_kept_former_items() -> None:
    now = catalogue({"item_id": 5}, {"item_id": 2, "category": None}, {"item_id": 3})
    previous = embeddings(
        {"item_id": 1, "category": "coat"},
        {"item_id": 2, "image_uri": "old.png", "left_catalogue_ds": day(-1)},
        {"item_id": 4, "left_catalogue_ds": day(-9), "in_catalogue": False},
        {"item_id": 5},
    )
    items = embed_plan.items_of_shard(now, previous, DAY, window_days=9)
    found = list(zip(*(column.to_pylist() for column in items.columns), strict=True))
    assert items.column_names == [
        "item_id", "image_uri", "category", "in_catalogue", "left_catalogue_ds", "previous_row",
    ]  # fmt: skip
    assert found == [
        (2, "2.png", None, True, None, 1),  # it came back: the catalogue's own values hold
        (3, "3.png", "dress", True, None, None),
        (5, "5.png", "dress", True, None, 3),
        (1, "1.png", "coat", False, DAY, 0),
    ]
    with pytest.raises(DataContractError, match="3 items twice or more"):
        embed_plan.items_of_shard(pa.concat_tables([now, now]), previous, DAY, 9)


# ---- When a reject is tried again ------------------------------------------------------------


def test_a_reject_is_tried_after_1_2_4_8_16_and_then_every_30_days() -> None:
    attempts = np.array([1, 2, 3, 4, 5, 6, 7, 60, 2**31 - 1], np.int32)
    found = embed_plan.next_ds(DAY, attempts)
    assert found.dtype == np.dtype("datetime64[D]")
    days = [1, 2, 4, 8, 16, 30, 30, 30, 30]
    assert found.tolist() == [day(n) for n in days]


@pytest.mark.parametrize(
    ("before", "now", "waits"),
    [
        ({"next_ds": day(1)}, {}, True),
        ({"next_ds": DAY}, {}, False),
        ({"next_ds": day(-3)}, {}, False),  # days on which no night ran
        ({"next_ds": day(30)}, {"image_uri": "other.png"}, False),
        ({"next_ds": day(30)}, {"image_uri": None}, False),
        ({"next_ds": day(30), "image_uri": None}, {}, False),
        ({"next_ds": day(30)}, {"category": "coat"}, True),
        ({"next_ds": day(30)}, {"item_id": 8}, False),
    ],
)
def test_a_reject_waits_for_its_day_under_its_address(before: Row, now: Row, waits: bool) -> None:
    others = ({"item_id": 1, "next_ds": day(9)}, {"item_id": 3, "next_ds": day(-9)})
    past = rejects(others[0], {"item_id": 7, **before}, others[1])
    items = catalogue({"item_id": 9}, {"item_id": 7, **now}, {"item_id": 1})
    assert embed_plan.is_waiting(items, past, DAY).tolist() == [False, waits, True]


# ---- The plan --------------------------------------------------------------------------------


def stat_of(root: Path, name: str) -> Row:
    found = files.stat(str(root / name))
    time = dt.datetime.fromtimestamp(0, dt.UTC) + dt.timedelta(microseconds=found.mtime_us or 0)
    return {"image_size": found.size, "image_mtime": time}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Makes images of one size and time, and what cannot be one."""
    for number in (1, 2, 3, 4, 6, 8, 14):
        (tmp_path / f"{number}.png").write_bytes(b"x" * 100)
    (tmp_path / "3-new.png").write_bytes(b"x" * 100)
    for path in tmp_path.iterdir():
        os.utime(path, ns=(10**18, 10**18))
    (tmp_path / "10.png").touch()
    with open(tmp_path / "11.png", "wb") as file:
        file.truncate(DecodeLimits().max_bytes + 1)
    return tmp_path


def planned(root: Path, reuse: bool = True, same_roots: bool = True) -> pa.Table:
    """Plans one item of every kind: see the comments."""
    version = stat_of(root, "1.png")
    previous = embeddings(
        {"item_id": 1, **version},
        {"item_id": 2, **version, "image_mtime": WRITTEN},
        {"item_id": 3, **version},
        {"item_id": 5, **version},
        {"item_id": 13, **version},
        {"item_id": 14, **version},
    )
    past = rejects(
        {"item_id": 6, "next_ds": day(5)},
        {"item_id": 7, "next_ds": DAY},
        {"item_id": 8, "next_ds": day(5), "image_uri": "old.png"},
    )
    now = catalogue(
        {"item_id": 1},  # unchanged
        {"item_id": 2},  # touched
        {"item_id": 3, "image_uri": "3-new.png"},  # renamed
        {"item_id": 4},  # new
        {"item_id": 6},  # a reject that waits, although its file is there now
        {"item_id": 7},  # a reject whose day has come; its file is not there
        {"item_id": 8},  # a reject under another address
        {"item_id": 9},  # not there
        {"item_id": 10},  # empty
        {"item_id": 11},  # too large
        {"item_id": 12, "image_uri": None},
        {"item_id": 13},  # was there
    )  # and two former items: 5 without a file, 14 with one
    items = embed_plan.items_of_shard(now, previous, DAY, 9)
    return embed_plan.plan(items, previous, past, Sightings([str(root)]), DAY, reuse, same_roots)


NOTHING_THERE = {
    7: "missing", 9: "missing", 10: "empty", 11: "too_many_bytes", 12: "unsupported_uri",
    13: "missing",
}  # fmt: skip


@pytest.mark.parametrize(
    ("reuse", "same_roots", "differs"),
    [
        (True, True, {}),
        (True, False, {1: TO_READ, 6: TO_READ}),  # only former items are not looked at
        (False, True, {1: TO_READ, 6: TO_READ, 5: REJECTED, 14: TO_READ}),
        (False, False, {1: TO_READ, 6: TO_READ, 5: REJECTED, 14: TO_READ}),
    ],
)
def test_every_kind_of_item_has_its_state(
    root: Path, reuse: bool, same_roots: bool, differs: dict[int, str]
) -> None:
    plan = planned(root, reuse, same_roots)
    found = dict(zip(plan["item_id"].to_pylist(), plan["state"].to_pylist(), strict=True))
    usual = {1: UNCHANGED, 2: TO_READ, 3: TO_READ, 4: TO_READ, 5: UNCHANGED, 6: WAITING}
    usual |= {8: TO_READ, 14: UNCHANGED, **dict.fromkeys(NOTHING_THERE, REJECTED)}
    assert found == usual | differs


def test_what_is_not_there_is_rejected_without_reading_and_the_rest_has_its_version(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "read_bytes", lambda *_: pytest.fail("was read"))
    plan = planned(root)
    rows = {row["item_id"]: row for row in plan.to_pylist()}
    assert {i: r["reason"] for i, r in rows.items() if r["reason"]} == NOTHING_THERE
    for item, row in rows.items():
        assert (row["stage"] == "read") == (item in NOTHING_THERE)
        assert bool(row["message"]) == (item in NOTHING_THERE)
        if row["state"] in (WAITING, REJECTED) or not row["in_catalogue"]:
            assert row["image_size"] is row["image_mtime"] is None
        else:
            wanted = stat_of(root, row["image_uri"])
            assert {name: row[name] for name in wanted} == wanted
    assert plan.schema.field("image_mtime").type == pa.timestamp("us", tz="UTC")


def test_a_plan_without_items_has_the_same_columns(root: Path) -> None:
    empty = embed_plan.items_of_shard(catalogue(), embeddings(), DAY, 9)
    plan = embed_plan.plan(empty, embeddings(), rejects(), Sightings([str(root)]), DAY, True, True)
    assert len(plan) == 0
    assert plan.schema.equals(planned(root).schema)
    assert len(embed_plan.images_to_read(plan, embeddings(), 3, True)) == 0


@pytest.mark.parametrize("fault", [TimeoutError, OSError(5, "I/O")])
def test_a_fault_of_the_disk_is_no_property_of_an_image(
    root: Path, monkeypatch: pytest.MonkeyPatch, fault: type | OSError
) -> None:
    def fail(path: str) -> files.FileInfo:
        raise fault

    monkeypatch.setattr(files, "stat", fail)
    with pytest.raises(OSError):  # noqa: PT011 - the very fault that was planted
        planned(root)


def test_each_address_is_looked_at_once_and_what_was_seen_of_it_stays(root: Path) -> None:
    asked = ["1.png", None, "9.png", "1.png", "2.png", None]
    sightings = Sightings([str(root)])
    first = sightings.of(pa.chunked_array([asked], pa.string()))
    assert sorted(map(str, sightings.seen["image_uri"].to_pylist())) == sorted(map(str, {*asked}))
    assert first["reason"].to_pylist() == [
        None, "unsupported_uri", "missing", None, None, "unsupported_uri"
    ]  # fmt: skip
    (root / "1.png").unlink()
    (root / "9.png").write_bytes(b"there now")
    seen = Sightings(["elsewhere"], sightings.seen)  # as it was written for another worker
    for known in (sightings, seen):
        assert known.of(pa.chunked_array([asked[::-1]], pa.string())).equals(
            first.take(list(range(5, -1, -1)))
        )
    assert sightings.of(pa.chunked_array([["3.png", "1.png"]]))["reason"].null_count == 2


def test_an_item_is_found_under_its_address_alone() -> None:
    rows = images(*({"item_id": n, "image_uri": u} for n, u in [(1, "a"), (1, "b"), (2, "a")]))
    asked = [(2, "a"), (2, "b"), (1, "b"), (3, "a"), (1, None), (1, "c"), (1, "a")]
    now = catalogue(*({"item_id": n, "image_uri": u} for n, u in asked))
    found = embed_plan.row_of_image(now, rows).to_pylist()
    assert found == [2, None, 1, None, None, None, 0]
    assert embed_plan.row_of_image(now, images()).null_count == len(now)
    assert len(embed_plan.row_of_image(catalogue(), rows)) == 0


@pytest.mark.parametrize("reuse", [True, False])
def test_what_is_to_be_read_goes_with_the_bytes_that_are_known(root: Path, reuse: bool) -> None:
    version = stat_of(root, "2.png")
    previous = embeddings({"item_id": 2, **version, "image_size": 7}, {"item_id": 5})
    now = catalogue({"item_id": 2}, {"item_id": 4}, {"item_id": 9})
    items = embed_plan.items_of_shard(now, previous, DAY, 9)
    plan = embed_plan.plan(items, previous, rejects(), Sightings([str(root)]), DAY, reuse, True)
    expected = [
        {"item_id": item, "image_uri": f"{item}.png", "image_generation": None, **version,
         "known_sha256": digest(2) if item == 2 and reuse else None, "shard": 3}
        for item in (2, 4)
    ]  # fmt: skip
    assert embed_plan.images_to_read(plan, previous, 3, reuse).to_pylist() == expected


def test_versions_are_equal_only_column_by_column_and_null_is_like_null() -> None:
    names = ("image_generation", "image_size", "image_mtime")
    pairs = {
        ((None, 5, WRITTEN), (None, 5, WRITTEN)): True,
        ((7, 5, None), (7, 5, None)): True,
        ((None, None, None), (None, None, None)): True,
        ((7, 5, None), (8, 5, None)): False,
        ((7, 5, None), (None, 5, None)): False,
        ((None, 5, WRITTEN), (None, 6, WRITTEN)): False,
        ((None, 5, WRITTEN), (None, 5, WRITTEN + dt.timedelta(microseconds=1))): False,
        ((None, 5, WRITTEN), (None, 5, None)): False,
    }
    some, others = (
        images(
            *(
                {"item_id": number, **dict(zip(names, pair[side], strict=True))}
                for number, pair in enumerate(pairs)
            )
        )
        for side in (0, 1)
    )
    assert embed_plan.same_version(some, others).tolist() == list(pairs.values())


# ---- What is read together -------------------------------------------------------------------

SIZES = st.lists(st.integers(1, 12), max_size=60)


def sized(sizes: list[int]) -> pa.Table:
    return images(*({"item_id": n, "image_size": size} for n, size in enumerate(sizes)))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(SIZES, st.integers(1, 9), st.randoms(use_true_random=False))
def test_a_bucket_is_cut_between_sizes_whatever_order_its_images_came_in(
    sizes: list[int], chunk_items: int, random: object
) -> None:
    rows = sized(sizes)
    cut, chunk = embed_plan.cut(rows, chunk_items)
    assert cut.sort_by("item_id").equals(rows)
    assert sorted(chunk) == list(chunk)
    for number in set(chunk.tolist()):
        its = [s for s, c in zip(cut["image_size"].to_pylist(), chunk, strict=True) if c == number]
        assert all(sizes.count(size) == its.count(size) for size in its)  # none is cut apart
        assert len(its) - its.count(its[-1]) < chunk_items  # no more than it takes for that
    order = list(range(len(sizes)))
    random.shuffle(order)  # type: ignore[attr-defined]
    again, same = embed_plan.cut(rows.take(pa.array(order, pa.int64())), chunk_items)
    assert again.equals(cut)
    np.testing.assert_array_equal(same, chunk)


def test_images_of_all_different_sizes_make_chunks_of_the_size_asked_for() -> None:
    _, chunk = embed_plan.cut(sized(list(range(100, 125))), 10)
    assert np.unique(chunk, return_counts=True)[1].tolist() == [10, 10, 5]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(SIZES, st.integers(0, 5).map(lambda bits: 1 << bits))
def test_images_of_one_size_meet_in_one_bucket(sizes: list[int], buckets: int) -> None:
    rows = sized(sizes)
    found = embed_plan.bucket_of(rows, buckets)
    assert len(found) == len(sizes)
    assert set(found.tolist()) <= set(range(buckets))
    assert len(set(zip(sizes, found.tolist(), strict=True))) == len(set(sizes))


def test_sizes_spread_over_all_buckets() -> None:
    found = embed_plan.bucket_of(sized(list(range(1, 4001))), 16)
    assert np.bincount(found, minlength=16).min() > 150
    assert pc.count_distinct(pa.array(found)).as_py() == 16
