"""List columns of IDs, as arrays."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_ROWS_AT_ONCE = 4096  # compared, so that they stay in the cache


def list_array(sizes: np.ndarray, values: pa.Array) -> pa.Array:
    """`values` cut into lists of `sizes` [n]."""
    offsets = pa.array(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64))
    return pa.ListArray.from_arrays(offsets.cast(pa.int32()), values)  # no silent overflow


def differ_from_before(lists: pa.Array) -> np.ndarray:
    """Which of some lists of IDs, without nulls, are not equal to the one before; bool [n]."""
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
        for at in range(0, len(rows), _ROWS_AT_ONCE):
            some = rows[at : at + _ROWS_AT_ONCE]
            place = offsets[some][:, None] + np.arange(size)
            new[some] = (values[place] != values[place - size]).any(axis=1)
    return new


def padded_codes(lists: pa.Array, codes: np.ndarray, length: int) -> np.ndarray:
    """The first `length` places of each of `lists`, whose flat values have `codes`; int32
    [n, length], -1 = none."""
    offsets, _ = _flat(lists)
    sizes = np.diff(offsets)
    place = _within(sizes)
    kept = place < length
    out = np.full((len(sizes), length), -1, np.int32)
    out[np.arange(len(sizes)).repeat(sizes)[kept], place[kept]] = codes[kept]
    return out


def _flat(lists: pa.Array) -> tuple[np.ndarray, pa.Array]:
    """Where each of some lists begins, int64 [n + 1], and the values of all."""
    offsets = lists.offsets.to_numpy().astype(np.int64)
    return offsets - offsets[0], lists.flatten()


def _within(sizes: np.ndarray) -> np.ndarray:
    """0, 1, … for the places of each list of these sizes; int64 [sum of sizes]."""
    return np.arange(int(sizes.sum())) - (np.cumsum(sizes) - sizes).repeat(sizes)
