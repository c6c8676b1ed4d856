"""Vectors of a shop become embeddings as plain loops make them, whatever form they come in."""

import datetime as dt
import hashlib
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from feature_jobs.items import vector_rows
from feature_jobs.items.embed_walk import Tables, WalkedDay
from feature_jobs.items.vector_rows import Taken, checked, described, one_of_each, take_day
from feature_jobs.schemas import ITEM_EMBEDDINGS, ITEM_REJECTS
from feature_jobs.store import arrays
from tests.support.vector_shop import LISTS, as_column

D = 16
DS = dt.date(2026, 3, 5)
EMBEDDINGS, REJECTS = ITEM_EMBEDDINGS.schema(pa.int64()), ITEM_REJECTS.schema(pa.int64())
RNG = np.random.default_rng(3)
GOOD = (RNG.normal(size=(8, D)) * 3).astype(np.float32)


def rows_of(*rows: tuple[int, Any], form: str = "list") -> pa.Table:
    ids, vectors = zip(*rows, strict=True)
    return pa.table({"item_id": pa.array(ids, pa.int64()), "vector": as_column([*vectors], form)})


def read(*rows: tuple[int, Any], form: str = "list", centre: np.ndarray | None = None) -> pa.Table:
    return checked(rows_of(*rows, form=form), D, centre)


# ---- As they were read -------------------------------------------------------------------------


@pytest.mark.parametrize("form", [*LISTS, "bytes"])
def test_every_form_of_a_vector_becomes_its_float32(form: str) -> None:
    given = GOOD.astype(np.float16).astype(np.float32)
    rows = rows_of(*enumerate(given), form=form)
    for some in (rows, rows.slice(2), rows.slice(3, 2), rows.slice(1, 0)):  # with offsets, and none
        found = checked(some, D)
        assert found.schema.equals(vector_rows.rows_schema(pa.int64(), D))
        assert found["reason"].null_count == len(some)
        expected = given[some["item_id"].to_numpy()]
        np.testing.assert_array_equal(
            vector_rows.matrix_of(found["vector"], D), expected.reshape(-1, D)
        )


@pytest.mark.parametrize("form", ["list", "large", "half", "double", "bytes"])
def test_what_is_wrong_with_a_vector_is_told_row_by_row(form: str) -> None:
    infinite, none, zero = (GOOD[0].copy() for _ in range(3))
    infinite[2], none[5], zero[:] = -np.inf, np.nan, 0
    rows = [
        (1, GOOD[1]), (2, None), (3, infinite), (4, GOOD[2]), (5, none), (6, zero),
        (7, GOOD[3][:-1]), (8, GOOD[4][:0]), (9, GOOD[5]),
    ]  # fmt: skip
    found = {row["item_id"]: row for row in read(*rows, form=form).to_pylist()}
    assert {item: row["reason"] for item, row in found.items()} == {
        1: None, 2: "no_vector", 3: "not_finite", 4: None, 5: "not_finite", 6: "zero",
        7: "wrong_length", 8: "wrong_length", 9: None,
    }  # fmt: skip
    for row in found.values():
        assert (
            (row["vector"] is None) == (row["reason"] is not None) == (row["message"] is not None)
        )
    assert found[7]["message"] == "it has 15 numbers, where the encoder has 16"
    assert set(vector_rows.REASONS) >= {row["reason"] for row in found.values()} - {None}


def test_a_null_among_the_numbers_is_no_number_and_float64_may_be_too_large() -> None:
    kind = pa.list_(pa.float64())
    vectors = [[1.0] * 15 + [None], [1e300] + [1.0] * 15, [1e-300] + [1.0] * 15, [1e-60] * 16]
    rows = pa.table({"item_id": [1, 2, 3, 4], "vector": pa.array(vectors, kind)})
    found = checked(rows, D)["reason"].to_pylist()
    assert found == ["not_finite", "not_finite", None, "zero"]


def test_vectors_of_zeros_and_the_centre_itself_are_told_apart() -> None:
    zero, begins = np.zeros(D, np.float32), GOOD[0] * (np.arange(D) > 0)
    rows = [(1, zero), (2, GOOD[0]), (3, begins), (4, -zero), (5, GOOD[1])]
    found = read(*rows, centre=GOOD[1]).to_pylist()
    assert [row["reason"] for row in found] == ["zero", None, None, "zero", "zero"]
    assert [(row["message"] or "").split(",")[0] for row in found] == [
        "all its numbers are 0", "", "", "all its numbers are 0", "it is the centre"
    ]  # fmt: skip
    for nothing in (None, zero):  # where zeros are no centre, and where they are
        (told,) = read((1, zero), centre=nothing)["message"].to_pylist()
        assert told.startswith("all its numbers are 0")
    lengths = [row["length"] for row in found]
    assert lengths[1] == pytest.approx(np.linalg.norm(GOOD[0] - GOOD[1]), rel=1e-6)
    assert lengths[0] is lengths[4] is None


def test_bytes_that_are_no_whole_numbers_are_told() -> None:
    column = pa.array([GOOD[0].tobytes(), GOOD[0].tobytes()[:-1], GOOD[0].tobytes()[:-4]])
    found = checked(pa.table({"item_id": [1, 2, 3], "vector": column}), D)
    assert found["reason"].to_pylist() == [None, "wrong_length", "wrong_length"]
    assert found["message"][1].as_py().startswith("it has bytes that are no whole float32")


# ---- One of each item --------------------------------------------------------------------------


def known(rows: pa.Table) -> pa.Table:
    return described(rows, np.arange(len(rows)))


def digest(vector: np.ndarray) -> str:
    return hashlib.sha256(vector.tobytes()).hexdigest()


def test_an_item_that_stands_there_twice_has_one_vector_or_none() -> None:
    rows = read(
        (5, GOOD[0]), (1, GOOD[1]), (5, GOOD[0]), (2, GOOD[2]), (1, GOOD[3]), (3, None), (3, None),
        (4, GOOD[4]), (4, None), (6, GOOD[5]), (1, GOOD[1]),
    )  # fmt: skip
    found = {row["item_id"]: row for row in one_of_each(known(rows)).to_pylist()}
    assert list(found) == [1, 2, 3, 4, 5, 6]
    reasons = {item: row["reason"] for item, row in found.items()}
    assert reasons == {
        1: "ambiguous", 2: None, 3: "no_vector", 4: "ambiguous", 5: None, 6: None
    }  # fmt: skip
    assert found[5]["image_sha256"] == digest(GOOD[0])
    assert found[5]["result_row"] in (0, 2)
    assert found[1]["image_sha256"] is None


@pytest.mark.parametrize(
    ("other", "reason"),
    [(None, "no_vector"), (GOOD[0][:7], "wrong_length"), (GOOD[2] * np.nan, "not_finite"),
     (GOOD[0], "ambiguous"), (GOOD[1], "zero")],
)  # fmt: skip
def test_the_centre_beside_another_row_of_its_item_is_no_vector(other: Any, reason: str) -> None:
    for rows in ([(1, GOOD[1]), (1, other)], [(1, other), (1, GOOD[1])]):
        (found,) = one_of_each(known(read(*rows, centre=GOOD[1]))).to_pylist()
        assert (found["reason"], found["image_sha256"]) == (reason, None)


def test_the_order_of_rows_changes_nothing() -> None:
    bad = [None, np.zeros(D, np.float32), GOOD[0][:3], GOOD[0][:4]]
    rows = read(
        *[(int(i), GOOD[int(i) % 3]) for i in RNG.integers(0, 6, 30)],
        *[(int(i), bad[int(k)]) for i, k in RNG.integers((4, 0), (8, 4), (12, 2))],
    )
    expected = one_of_each(known(rows)).drop_columns("result_row")
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(len(rows))
        found = one_of_each(known(rows.take(order)))
        assert found.drop_columns("result_row").equals(expected)


# ---- As embeddings -----------------------------------------------------------------------------


def as_embeddings(rows: pa.Table, centre: np.ndarray | None = None) -> np.ndarray:
    found = np.zeros((len(rows), D), np.float32)
    usable = np.flatnonzero(rows["reason"].is_null())
    Taken.of(rows, D, centre).write_embeddings(usable, found, usable)
    return found


@pytest.mark.parametrize("scale", [1e-42, 1e-38, 1e-20, 1.0, 1e18, 3e37])
def test_embeddings_have_the_direction_and_the_length_1(scale: float) -> None:
    given = (GOOD / 3 * np.float32(scale)).astype(np.float32)
    found = as_embeddings(read(*enumerate(given)))
    for mine, vector in zip(found, given, strict=True):
        numbers = [float(x) for x in vector]
        length = math.sqrt(sum(x * x for x in numbers))
        np.testing.assert_allclose(mine, [x / length for x in numbers], atol=2e-7)


def test_one_of_length_1_stays_as_it_is_to_the_bit() -> None:
    unit = GOOD / np.linalg.norm(GOOD, axis=1, keepdims=True)
    found = as_embeddings(read(*enumerate(unit)))
    assert found.tobytes() == unit.tobytes()


def test_the_centre_is_taken_off_before_the_norm() -> None:
    centre = GOOD.mean(axis=0)
    found = as_embeddings(read(*enumerate(GOOD), (8, centre), centre=centre), centre)
    less = GOOD.astype(np.float64) - centre
    np.testing.assert_allclose(
        found[:8], less / np.linalg.norm(less, axis=1, keepdims=True), atol=1e-6
    )
    assert not found[8].any()


def test_what_leaves_float32_less_the_centre_is_computed_in_double_precision() -> None:
    centre, huge = np.full(D, -3e38, np.float32), np.full(D, 3e38, np.float32)
    huge[0] = 0
    found = as_embeddings(read((0, huge), (1, GOOD[0]), centre=centre), centre)
    for mine, vector in zip(found, (huge, GOOD[0]), strict=True):
        less = vector.astype(np.float64) - centre.astype(np.float64)
        np.testing.assert_allclose(mine, less / np.linalg.norm(less), atol=1e-6)


@pytest.mark.parametrize("sizes", [[8], [1, 0, 5, 2], [3, 3, 2]])
def test_many_rows_are_as_each_of_them(sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vector_rows, "_BLOCK", 3)
    rows, ends = read(*enumerate(GOOD)), np.cumsum(sizes)
    parts = [rows.slice(end - size, size) for end, size in zip(ends, sizes, strict=True)]
    in_blocks = as_embeddings(pa.concat_tables(parts))
    alone = [as_embeddings(read((0, v)))[0] for v in GOOD]
    assert in_blocks.tobytes() == np.stack(alone).tobytes()


# ---- A day -------------------------------------------------------------------------------------


def day_of(
    items: list[int], vectors: pa.Table, before: Tables | None = None, reuse: bool = True,
    ds: dt.date = DS, full: bool = False,
) -> WalkedDay:  # fmt: skip
    catalogue = pa.table(
        {
            "item_id": pa.array(items, pa.int64()),
            "image_uri": pa.nulls(len(items), pa.string()),
            "category": pa.array(["dress"] * len(items)),
        }
    )
    before = before or nothing()
    return take_day(catalogue, before, vectors, ds, 2, reuse, full, D)


def nothing() -> Tables:
    without = arrays.empty_rows(EMBEDDINGS).drop_columns("embedding")
    return Tables.before_the_first_day(without, arrays.empty_rows(REJECTS))


def published(day: WalkedDay) -> Tables:
    """Returns the tables of a day as the next one finds them."""
    return Tables.before_the_first_day(
        day.tables.embeddings.drop_columns("result_row"), day.tables.rejects
    )


def embedded(day: WalkedDay, vectors: pa.Table) -> dict[int, list[float]]:
    before = arrays.empty_rows(EMBEDDINGS).select(["item_id", "embedding"])
    taken = Taken.of(vectors, D, None)
    rows = vector_rows.with_embeddings(day.tables.embeddings, taken, before)
    return dict(zip(rows["item_id"].to_pylist(), rows["embedding"].to_pylist(), strict=True))


def test_items_with_a_vector_are_embedded_and_the_others_rejected_with_their_reason() -> None:
    vectors = read((4, GOOD[4]), (1, GOOD[1]), (2, None), (9, GOOD[0]), (5, GOOD[5]), (5, GOOD[6]))
    day = day_of([1, 2, 3, 4, 5], vectors)
    assert set(embedded(day, vectors)) == {1, 4}
    np.testing.assert_allclose(
        embedded(day, vectors)[4], GOOD[4] / np.linalg.norm(GOOD[4]), atol=1e-6
    )
    rejects = {r["item_id"]: (r["stage"], r["reason"]) for r in day.tables.rejects.to_pylist()}
    assert rejects == {
        2: ("read", "no_vector"), 3: ("read", "no_vector"), 5: ("decode", "ambiguous")
    }  # fmt: skip
    told = {r["item_id"]: r["message"] for r in day.tables.rejects.to_pylist()}
    assert told[2] != told[3]
    assert day.not_fetched.to_pylist() == [2, 3]
    sha = day.tables.embeddings["image_sha256"].to_pylist()
    assert sha == [digest(GOOD[n]) for n in (1, 4)]
    assert set(day.tables.embeddings["image_size"].to_pylist()) == {4 * D}


def test_a_vector_that_is_the_centre_is_rejected() -> None:
    vectors = read((1, GOOD[1]), (2, GOOD[2]), centre=GOOD[2])
    day = day_of([1, 2], vectors)
    assert set(embedded(day, vectors)) == {1}
    (reject,) = day.tables.rejects.to_pylist()
    assert (reject["item_id"], reject["reason"]) == (2, "zero")
    assert "it is the centre" in reject["message"]


def test_a_reject_waits_while_nothing_better_is_there_and_is_taken_at_once_when_it_is() -> None:
    bad, good = read((1, GOOD[1])), read((1, GOOD[1]), (2, GOOD[2]))
    tried = []
    day = nothing()
    for number in range(5):
        walked = day_of([1, 2], bad, day, ds=DS + dt.timedelta(days=number))
        day = published(walked)
        (reject,) = day.rejects.to_pylist()
        tried.append((reject["attempts"], (reject["last_ds"] - DS).days))
        assert reject["first_ds"] == DS
    assert tried == [(1, 0), (2, 1), (2, 1), (3, 3), (3, 3)]
    anew = day_of([1, 2], bad, day, ds=DS + dt.timedelta(days=4), full=True)
    assert anew.tables.rejects["attempts"].to_pylist() == [4]  # tried, although it waits
    walked = day_of([1, 2], good, day, ds=DS + dt.timedelta(days=5))
    assert set(embedded(walked, good)) == {1, 2}
    assert len(walked.tables.rejects) == 0


def test_a_former_item_keeps_its_row_whatever_stands_there_now() -> None:
    first = day_of([1, 2], read((1, GOOD[1]), (2, GOOD[2])))
    after = day_of(
        [1], read((1, GOOD[3]), (2, GOOD[4])), published(first), ds=DS + dt.timedelta(days=1)
    )
    rows = {row["item_id"]: row for row in after.tables.embeddings.to_pylist()}
    assert rows[2]["image_sha256"] == digest(GOOD[2])
    assert (rows[2]["in_catalogue"], rows[2]["result_row"]) == (False, None)
    assert rows[1]["image_sha256"] == digest(GOOD[3])
    assert rows[1]["result_row"] is not None


def test_a_former_item_whose_vector_still_stands_there_is_taken_from_there() -> None:
    vectors = read((1, GOOD[1]), (2, GOOD[2]))
    first = day_of([1, 2], vectors)
    after = day_of([1], vectors, published(first), ds=DS + dt.timedelta(days=1))
    rows = {row["item_id"]: row for row in after.tables.embeddings.to_pylist()}
    assert rows[2]["result_row"] is not None
    assert (rows[2]["in_catalogue"], rows[2]["left_catalogue_ds"]) == (
        False,
        DS + dt.timedelta(days=1),
    )
    assert set(embedded(after, vectors)) == {1, 2}


def test_after_another_encoder_former_items_are_taken_where_they_have_a_vector() -> None:
    first = day_of([1, 2, 3], read((1, GOOD[1]), (2, GOOD[2]), (3, GOOD[3])))
    vectors = read((1, GOOD[4]), (2, GOOD[5]))
    after = day_of(
        [1], vectors, published(first), reuse=False, ds=DS + dt.timedelta(days=1)
    )  # fmt: skip
    assert set(embedded(after, vectors)) == {1, 2}
    assert len(after.tables.rejects) == 0
