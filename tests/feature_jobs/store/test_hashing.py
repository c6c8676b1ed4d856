"""Where a row lives follows from its key alone: xxHash64, and ranges of it."""

import random

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_jobs.store.hashing import (
    hash_ids,
    hash_rows,
    num_shards,
    overlapping_shards,
    shard_of,
)

INT64 = np.iinfo(np.int64)
SEEDS = [0, 1, 0x9E3779B185EBCA87, 2**64 - 1]
INTS = st.lists(st.integers(int(INT64.min), int(INT64.max)), max_size=30)
STRINGS = st.lists(st.text(max_size=70), max_size=30)
SHARDS = st.integers(0, 10).map(lambda bits: 1 << bits)
HASHES = st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=50).map(
    lambda hashes: np.array(hashes, np.uint64)
)


def of_ints(values: list[int], seed: int = 0) -> list[int]:
    return [xxhash.xxh64_intdigest(v.to_bytes(8, "little", signed=True), seed) for v in values]


def of_strings(values: list[str], seed: int = 0) -> list[int]:
    return [xxhash.xxh64_intdigest(v.encode(), seed) for v in values]


# ---- the hash itself -------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_an_int_hashes_as_its_8_little_endian_bytes(seed: int) -> None:
    values = [0, 1, -1, 255, 256, 2**31, -(2**31), int(INT64.min), int(INT64.max)]
    assert hash_ids(pa.array(values, pa.int64()), seed).tolist() == of_ints(values, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_string_of_any_length_hashes_as_its_bytes(seed: int) -> None:
    letters = random.Random(0)
    values = ["".join(letters.choices("abcxyz019-", k=length)) for length in range(101)]
    letters.shuffle(values)
    assert hash_ids(pa.array(values), seed).tolist() == of_strings(values, seed)


def test_rows_of_any_bytes_hash_as_in_the_reference_library() -> None:
    data = np.random.default_rng(0).integers(0, 256, (7, 131), dtype=np.uint8)
    for length in range(data.shape[1] + 1):
        expected = [xxhash.xxh64_intdigest(row.tobytes()) for row in data[:, :length]]
        assert hash_rows(data[:, :length]).tolist() == expected


def test_a_string_that_is_not_ascii_hashes_as_its_utf8_bytes() -> None:
    values = ["é", "e\u0301", "衣服", "👗" * 12, "\x00", "", "ÿ" * 16]
    assert hash_ids(pa.array(values)).tolist() == of_strings(values)
    assert len(set(of_strings(values))) == len(values)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(INTS, INTS, st.sampled_from(SEEDS))
def test_ints_hash_alike_however_the_column_is_chunked_and_sliced(
    first: list[int], second: list[int], seed: int
) -> None:
    expected = of_ints(first + second, seed)
    chunks = [pa.array(values, pa.int64()) for values in (first, [], second)]
    column = pa.chunked_array(chunks)
    assert hash_ids(column, seed).tolist() == expected
    whole = pa.array(first + second, pa.int64())
    for start in {0, len(whole) // 3, len(whole)}:
        assert hash_ids(whole.slice(start), seed).tolist() == expected[start:]
        assert hash_ids(column.slice(start, 5), seed).tolist() == expected[start : start + 5]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(STRINGS, STRINGS, st.sampled_from(SEEDS))
def test_strings_hash_alike_however_the_column_is_chunked_and_sliced(
    first: list[str], second: list[str], seed: int
) -> None:
    values = first + second + first  # repeated ones among them
    expected = of_strings(values, seed)
    column = pa.chunked_array([pa.array(part, pa.string()) for part in (first, second, first)])
    assert hash_ids(column, seed).tolist() == expected
    whole = pa.array(values, pa.string())
    for start in {0, len(whole) // 3, len(whole)}:
        assert hash_ids(whole.slice(start), seed).tolist() == expected[start:]
        assert hash_ids(column.slice(start, 5), seed).tolist() == expected[start : start + 5]


@pytest.mark.parametrize("kind", [pa.int64(), pa.string()])
def test_a_column_without_rows_has_no_hashes(kind: pa.DataType) -> None:
    for column in (pa.array([], kind), pa.chunked_array([], kind), pa.chunked_array([[]], kind)):
        hashes = hash_ids(column)
        assert hashes.dtype == np.uint64
        assert len(hashes) == 0


def test_hashes_of_neighbouring_ids_fill_all_shards_evenly() -> None:
    shard = shard_of(hash_ids(pa.array(np.arange(64_000))), 64)
    rows = np.bincount(shard, minlength=64)
    assert len(rows) == 64
    assert rows.min() > 850  # 1000 each, standard deviation 31
    assert rows.max() < 1150


# ---- shards ----------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None, derandomize=True)
@given(HASHES, SHARDS)
def test_a_shard_of_2n_shards_is_half_of_one_of_n(hashes: np.ndarray, shards: int) -> None:
    assert (shard_of(hashes, 2 * shards) // 2).tolist() == shard_of(hashes, shards).tolist()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(HASHES, SHARDS)
def test_shards_are_equal_ranges_of_the_hash(hashes: np.ndarray, shards: int) -> None:
    assert shard_of(hashes, shards).tolist() == [h * shards >> 64 for h in hashes.tolist()]


@pytest.mark.parametrize("shards", [1, 2, 8, 1024])
def test_the_first_and_last_hash_of_each_range_belong_to_its_shard(shards: int) -> None:
    width = 2**64 // shards
    for shard in range(shards):
        ends = np.array([shard * width, (shard + 1) * width - 1], np.uint64)
        assert shard_of(ends, shards).tolist() == [shard, shard]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.integers(0, 10**10), st.integers(1, 10**7))
def test_the_number_of_shards_is_the_smallest_power_of_two_that_suffices(
    rows: int, rows_per_shard: int
) -> None:
    shards = num_shards(rows, rows_per_shard)
    assert shards.bit_count() == 1
    assert rows <= shards * rows_per_shard
    assert shards == 1 or rows > shards // 2 * rows_per_shard


@pytest.mark.parametrize(
    ("rows", "expected"), [(0, 1), (1, 1), (100, 1), (101, 2), (200, 2), (201, 4), (401, 8)]
)
def test_the_number_of_shards_grows_just_above_each_full_power(rows: int, expected: int) -> None:
    assert num_shards(rows, 100) == expected


@pytest.mark.parametrize("shards", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("other", [1, 2, 4, 8, 16, 32])
def test_overlapping_shards_are_exactly_those_that_may_share_a_hash(
    shards: int, other: int
) -> None:
    # 64 hashes, one in the middle of each 64th of the space: enough to tell 32 shards apart.
    hashes = (np.arange(64, dtype=np.uint64) << np.uint64(58)) + np.uint64(1 << 57)
    mine, theirs = shard_of(hashes, shards), shard_of(hashes, other)
    assert set(mine) == set(range(shards))
    for shard in range(shards):
        assert list(overlapping_shards(shard, shards, other)) == sorted(set(theirs[mine == shard]))
