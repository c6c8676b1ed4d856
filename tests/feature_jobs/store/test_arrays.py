"""Compares lists and embeddings as arrays with plain lists."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from courier_model.projection import EMBEDDING_DIM
from feature_jobs.schemas import DataContractError
from feature_jobs.store import arrays
from feature_jobs.store.arrays import (
    differ_from_before,
    embedding_matrix,
    list_array,
    list_column,
    padded_codes,
    take,
)
from tests.support.table_rows import FLOATS

# ---- Lists of IDs ------------------------------------------------------------------------------


def test_lists_are_cut_to_their_length_and_padded() -> None:
    lists = pa.array([[9], [3, 0, 1], [], [2]], pa.list_(pa.int64()))[1:]
    assert padded_codes(lists, np.array([3, 0, 1, 2]), 2).tolist() == [[3, 0], [-1, -1], [2, -1]]


SHORT_LISTS = st.lists(st.lists(st.integers(0, 2), max_size=3), max_size=12)


@given(SHORT_LISTS, st.sampled_from([pa.int64(), pa.string()]), st.integers(0, 3))
def test_neighbours_with_the_same_list_are_found(
    drawn: list[list[int]], kind: pa.DataType, cut: int
) -> None:
    lists = [[str(v) if kind == pa.string() else v for v in some] for some in drawn]
    found = differ_from_before(pa.array(lists, pa.list_(kind))[cut:])
    lists = lists[cut:]
    assert found.tolist() == [k == 0 or lists[k] != lists[k - 1] for k in range(len(lists))]


def test_lists_too_long_for_their_offsets_are_refused() -> None:
    """Offsets cut to 32 bits would wrap, and rows would show items of others."""
    with pytest.raises(pa.ArrowInvalid):
        list_array(np.array([2**31, 5]), pa.array([], pa.int64()))


# ---- Embeddings and chunks ---------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 4), (1, 1), (0, 4), (3, 0), (0, 0)])
@pytest.mark.parametrize(
    ("dtype", "kind"), [("f4", pa.float32()), ("i1", pa.int8()), ("i4", pa.int32())]
)
def test_a_matrix_survives_as_a_list_column(
    shape: tuple[int, int], dtype: str, kind: pa.DataType
) -> None:
    matrix = np.arange(shape[0] * shape[1]).reshape(shape).astype(dtype)
    column = list_column(matrix, pa.list_(kind))
    assert column.type == pa.list_(kind)
    assert column.to_pylist() == matrix.tolist()
    column.validate(full=True)


def test_a_transposed_matrix_keeps_its_rows() -> None:
    matrix = np.arange(6, dtype=np.float32).reshape(2, 3).T
    assert list_column(matrix, FLOATS).to_pylist() == [[0, 3], [1, 4], [2, 5]]


@pytest.mark.parametrize("rows", [0, 1, 7])
def test_embeddings_survive_as_a_column_however_it_is_chunked_and_sliced(rows: int) -> None:
    matrix = np.random.default_rng(0).standard_normal((rows, EMBEDDING_DIM)).astype(np.float32)
    column = list_column(matrix, FLOATS)
    whole = pa.chunked_array([column.slice(0, rows // 2), column.slice(rows // 2)], FLOATS)
    for found, expected in (
        (embedding_matrix(whole, EMBEDDING_DIM), matrix),
        (embedding_matrix(whole.slice(1), EMBEDDING_DIM), matrix[1:]),
        (
            embedding_matrix(pa.chunked_array([column.slice(rows // 2)]), EMBEDDING_DIM),
            matrix[rows // 2 :],
        ),
    ):
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected)


def test_embeddings_of_another_length_are_refused_and_nulls_left_out() -> None:
    vectors = [[1.0, 2.0], None, [3.0, 4.0]]
    column = pa.chunked_array([vectors, []], FLOATS)
    assert embedding_matrix(column, 2).tolist() == [[1, 2], [3, 4]]
    # As many numbers as two of four would have.
    for wrong in (column, pa.chunked_array([[[1.0, 2.0, 3.0], [4.0]]], FLOATS)):
        with pytest.raises(DataContractError, match=r"some have .* numbers, where .* have 4"):
            embedding_matrix(wrong, 4)


@pytest.mark.parametrize(
    "lists",
    [
        [[1, 2], [3, 4], [5, 6], [7, 8]],
        [[1, None], [3, 4], [None, 6], [7, 8]],
        [[1, 2], [], [5, 6, 7], [8]],
        [[1, 2], None, [5, 6], [7, 8]],
        [[], [], [], []],
    ],
    ids=["equally long", "nulls within", "of any length", "a null", "empty"],
)
@pytest.mark.parametrize("at", [[3, 0, 0, 2], [], [1]])
@pytest.mark.parametrize("values", [pa.int16(), pa.string()])
@pytest.mark.parametrize("most", [2**31 - 1, 3])
def test_lists_move_as_arrow_moves_them(
    lists: list[list[int] | None], at: list[int], values: pa.DataType, most: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(arrays, "_MOST_VALUES", most)
    kind = pa.list_(pa.field("element", values))
    schema = pa.schema([("user", pa.string()), ("values", kind)], {"comment": "kept"})
    rows = pa.table(
        [["a", "b", "c", "d"], pa.array(lists, pa.list_(pa.int16())).cast(kind)], schema=schema
    )
    chunked = pa.concat_tables([rows[:1], rows[1:3], rows[3:]])
    sliced = pa.concat_tables([rows, rows])[2:6]
    for some in (rows, chunked, sliced, rows[:0]):
        places = np.array([one for one in at if one < len(some)], np.int64)
        found, wanted = take(some, places), some.take(pa.array(places))
        found.validate(full=True)
        assert found.equals(wanted, check_metadata=True)
