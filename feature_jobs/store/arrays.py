"""Turns Arrow tables and columns into arrays and back: lists, embeddings, order."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.lib.stride_tricks import sliding_window_view

from feature_jobs.schemas import DataContractError

_ROWS_AT_ONCE = 1024  # compared, so that they stay in the cache
_MOST_VALUES = 2**31 - 1  # of the lists of one Arrow array


# ---- Lists ---------------------------------------------------------------------------------


def list_array(sizes: np.ndarray, values: pa.Array) -> pa.Array:
    """Cuts `values` into lists of `sizes` [n]."""
    offsets = pa.array(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64))
    return pa.ListArray.from_arrays(offsets.cast(pa.int32()), values)  # no silent overflow


def differ_from_before(lists: pa.Array) -> np.ndarray:
    """Tells which lists of IDs, without nulls, are not equal to the one before; bool [n]."""
    offsets, flat = _flat(lists)
    values = flat if pa.types.is_int64(flat.type) else pc.dictionary_encode(flat).indices
    values, sizes = values.to_numpy(), np.diff(offsets)
    new = np.ones(len(sizes), bool)
    new[1:] = sizes[1:] != sizes[:-1]
    alike = np.flatnonzero(~new & (sizes > 0))
    for size in np.unique(sizes[alike]):
        rows = alike[sizes[alike] == size]
        rows = rows[values[offsets[rows]] == values[offsets[rows] - size]]  # few others are equal
        new[alike[sizes[alike] == size]] = True
        beginning = sliding_window_view(values, size)  # at each place; a row is copied at once
        for at in range(0, len(rows), _ROWS_AT_ONCE):
            some = rows[at : at + _ROWS_AT_ONCE]
            starts = offsets[some]
            new[some] = (beginning[starts] != beginning[starts - size]).any(axis=1)
    return new


def folded(lists: pa.Array, new: np.ndarray) -> pa.Array:
    """Returns `lists` with null in place of each that is not `new`, bool [n]."""
    kept = lists.filter(pa.array(new))
    sizes = np.where(new, np.diff(lists.offsets.to_numpy()), 0)
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), kept.flatten(), mask=pa.array(~new))


def padded_codes(lists: pa.Array, codes: np.ndarray, length: int) -> np.ndarray:
    """Returns the codes of the first `length` places of each list; int32 [n, length], -1 = none.

    The flat values of `lists` have `codes`.
    """
    offsets, _ = _flat(lists)
    sizes = np.diff(offsets)
    out = np.full((len(sizes), length), -1, np.int32)
    out[np.arange(length) < sizes[:, None]] = codes[_within(sizes) < length]
    return out


def _flat(lists: pa.Array) -> tuple[np.ndarray, pa.Array]:
    """Returns where each of some lists begins, int64 [n + 1], and the values of all."""
    offsets = lists.offsets.to_numpy().astype(np.int64)
    return offsets - offsets[0], lists.flatten()


def _within(sizes: np.ndarray) -> np.ndarray:
    """Returns 0, 1, … for the places of each list of these sizes; int64 [sum of sizes]."""
    return np.arange(int(sizes.sum())) - (np.cumsum(sizes) - sizes).repeat(sizes)


# ---- Rows ----------------------------------------------------------------------------------


def whole(column: pa.ChunkedArray) -> pa.Array:
    """Returns a column as one array: its only chunk as it is, which combining would copy."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def list_column(matrix: np.ndarray, type: pa.DataType) -> pa.Array:
    """Returns the rows of `matrix` [n, m] as a list column of `type`; no value is copied."""
    n, m = matrix.shape
    offsets = pa.array(np.arange(0, n * m + 1, m, dtype=np.int32) if m else np.zeros(n + 1, "i4"))
    values = pa.array(np.ascontiguousarray(matrix).reshape(-1), type=type.value_type)
    return pa.ListArray.from_arrays(offsets, values, type=type)


def embedding_matrix(column: pa.ChunkedArray, dimension: int) -> np.ndarray:
    """Returns the list column `embedding` as float32 [n, dimension]; read-only where it is no copy.

    Nulls are left out. Raises DataContractError where the vectors are not so long.
    """
    sizes = pc.unique(pc.list_value_length(column).drop_null()).to_pylist()
    if sizes not in ([], [dimension]):
        raise DataContractError(
            f"Of {len(column):,} embeddings some have {', '.join(map(str, sorted(sizes)[:5]))} "
            f"numbers, where the encoder and the codebook have {dimension}. Vectors of two lengths "
            "have no distance. Embed the day again with the encoder that is pinned, `courier embed "
            "--full`, and pin a codebook that was fitted on its embeddings."
        )
    return matrix(column, dimension)


def matrix(column: pa.ChunkedArray, width: int) -> np.ndarray:
    """Returns lists of `width` numbers as float32 [n, width]; read-only where it is no copy."""
    flat = whole(column).flatten().to_numpy(zero_copy_only=False)
    return flat.astype(np.float32, copy=False).reshape(-1, width)


def lookup(
    ids: pa.Array | pa.ChunkedArray, rows: pa.Table, column: str, key: str = "item_id"
) -> np.ndarray:
    """Returns the integer in `column` of the row with each of `ids` as `key`, 0 for none; [n]."""
    at = pc.index_in(ids, value_set=rows[key].combine_chunks())
    return pc.fill_null(rows[column].take(at), 0).to_numpy()


def in_order(rows: pa.Table, keys: Sequence[str]) -> pa.Table:
    """Returns `rows` in ascending order of `keys`; as they are where they stand so already."""
    first = rows[keys[0]]
    if len(keys) == 1 and pc.all(pc.less_equal(first[:-1], first[1:])).as_py():
        return rows  # looked at without sorting, which takes thirty times as long
    order = pc.sort_indices(rows, [(key, "ascending") for key in keys])
    stands = np.array_equal(order.to_numpy(), np.arange(len(rows)))
    return rows if stands else take(rows, order)


def take(rows: pa.Table, at: np.ndarray | pa.Array) -> pa.Table:
    """Returns the rows at some places, int64 [m].

    Lists of a column that are all equally long move as a whole, which is ten times as fast as value
    by value, as Arrow moves lists.
    """
    places = pa.array(at)
    columns = [
        _taken(column, places) if pa.types.is_list(column.type) else column.take(places)
        for column in rows.columns
    ]
    return pa.Table.from_arrays(columns, schema=rows.schema)


def _taken(column: pa.ChunkedArray, places: pa.Array) -> pa.Array | pa.ChunkedArray:
    lists = whole(column)
    if not isinstance(lists, pa.ListArray) or lists.null_count or places.null_count:
        return column.take(places)
    size, longest = pc.min_max(lists.value_lengths()).as_py().values()
    if not size or size != longest or len(places) * size > _MOST_VALUES:
        return lists.take(places)
    taken = pa.FixedSizeListArray.from_arrays(lists.flatten(), size).take(places)
    offsets = pa.array(np.arange(len(places) + 1, dtype=np.int32) * np.int32(size))
    return pa.ListArray.from_arrays(offsets, taken.flatten(), type=column.type)


def plain(rows: pa.Table) -> pa.Table:
    """Returns the columns alone: "not null" and comments belong to a file and hinder joining."""
    return pa.table(dict(zip(rows.column_names, rows.columns, strict=True)))


def empty_rows(schema: pa.Schema) -> pa.Table:
    return plain(schema.empty_table())
