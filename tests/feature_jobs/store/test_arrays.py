"""Compares lists of IDs as arrays with plain lists."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from feature_jobs.store.arrays import differ_from_before, list_array, padded_codes


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
