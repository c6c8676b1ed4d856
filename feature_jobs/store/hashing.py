"""Hashes columns of IDs by xxHash64, in numpy: where a row lives never depends on how it arrived.

The hash of an ID is xxHash64 of its 8 little-endian bytes (int64) or of its UTF-8 bytes (string).
Shards are ranges of the hash space and their number is a power of two, so that a shard of 2n
shards is half of one of n: a reader finds yesterday's rows in one or two files, without a shuffle.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_P1, _P2, _P3, _P4, _P5 = (
    np.uint64(p)
    for p in (
        0x9E3779B185EBCA87,
        0xC2B2AE3D27D4EB4F,
        0x165667B19E3779F9,
        0x85EBCA77C2B2AE63,
        0x27D4EB2F165667C5,
    )
)


def _rotl(x: np.ndarray, bits: int) -> np.ndarray:
    return (x << np.uint64(bits)) | (x >> np.uint64(64 - bits))


def _round(acc: np.ndarray, lane: np.ndarray) -> np.ndarray:
    return _rotl(acc + lane * _P2, 31) * _P1


def _avalanche(h: np.ndarray) -> np.ndarray:
    h = (h ^ (h >> np.uint64(33))) * _P2
    h = (h ^ (h >> np.uint64(29))) * _P3
    return h ^ (h >> np.uint64(32))


def _hash_stripes(data: np.ndarray, seed: np.uint64) -> np.ndarray:
    """Returns the accumulator after all whole 32-byte stripes of `data` uint8 [n, ≥32]."""
    n, length = data.shape
    accs = [np.full(n, s, np.uint64) for s in (seed + _P1 + _P2, seed + _P2, seed, seed - _P1)]
    lanes = data[:, : length // 32 * 32].copy().view("<u8")
    for column in range(lanes.shape[1]):
        accs[column % 4] = _round(accs[column % 4], lanes[:, column])
    h = _rotl(accs[0], 1) + _rotl(accs[1], 7) + _rotl(accs[2], 12) + _rotl(accs[3], 18)
    for acc in accs:
        h = (h ^ _round(np.zeros(n, np.uint64), acc)) * _P1 + _P4
    return h


def hash_rows(data: np.ndarray, seed: int = 0) -> np.ndarray:
    """Returns the xxHash64 of each row of `data` uint8 [n, length]; uint64 [n]."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is the definition
        n, length = data.shape
        seed64 = np.uint64(seed)
        h = _hash_stripes(data, seed64) if length >= 32 else np.full(n, seed64 + _P5, np.uint64)
        h = h + np.uint64(length)
        at = length // 32 * 32
        while at + 8 <= length:
            lane = data[:, at : at + 8].copy().view("<u8")[:, 0]
            h = _rotl(h ^ _round(np.zeros(n, np.uint64), lane), 27) * _P1 + _P4
            at += 8
        if at + 4 <= length:
            lane = data[:, at : at + 4].copy().view("<u4")[:, 0].astype(np.uint64)
            h = _rotl(h ^ (lane * _P1), 23) * _P2 + _P3
            at += 4
        while at < length:
            h = _rotl(h ^ (data[:, at].astype(np.uint64) * _P5), 11) * _P1
            at += 1
        return _avalanche(h)


def _hash_strings(ids: pa.Array, seed: int) -> np.ndarray:
    """Strings of one length are hashed together: a shop's IDs have few lengths."""
    ids = ids.cast(pa.large_binary())
    offsets = np.frombuffer(ids.buffers()[1], np.int64)[ids.offset : ids.offset + len(ids) + 1]
    data = np.frombuffer(ids.buffers()[2] or b"", np.uint8)
    lengths = np.diff(offsets)
    out = np.empty(len(ids), np.uint64)
    for length in np.unique(lengths):
        rows = np.flatnonzero(lengths == length)
        at = offsets[rows][:, None] + np.arange(length)  # [rows, length] byte positions
        out[rows] = hash_rows(data[at], seed)
    return out


def hash_ids(ids: pa.Array | pa.ChunkedArray, seed: int = 0) -> np.ndarray:
    """Returns the xxHash64 of each ID of an int64 or string column without nulls; uint64 [n].

    Repeated strings are hashed once.
    """
    if isinstance(ids, pa.ChunkedArray):
        ids = ids.combine_chunks()
    if pa.types.is_int64(ids.type):
        values = ids.to_numpy(zero_copy_only=False).astype("<i8")
        return hash_rows(values.view(np.uint8).reshape(len(values), 8), seed)
    encoded = pc.dictionary_encode(ids)
    return _hash_strings(encoded.dictionary, seed)[encoded.indices.to_numpy()]


def drawn(ids: pa.Array | pa.ChunkedArray, share: float, seed: int) -> np.ndarray:
    """Draws a `share` of IDs, in [0, 1], the same whatever others there are; bool [n]."""
    # 2^64 itself has no room in 64 bits, and this is the largest float64 below it.
    return hash_ids(ids, seed) < np.uint64(share * (2**64 - 2048))


def num_shards(rows: int, rows_per_shard: int) -> int:
    """Returns the least power of two with a mean shard of at most `rows_per_shard`; at least 1."""
    return 1 << max(0, -(-rows // rows_per_shard) - 1).bit_length()


def shard_of(hashes: np.ndarray, shards: int) -> np.ndarray:
    """Returns the shard in 0..shards-1 of each uint64 hash: its leading bits; int64 [n]."""
    bits = shards.bit_length() - 1
    if bits == 0:
        return np.zeros(len(hashes), np.int64)
    return (hashes >> np.uint64(64 - bits)).astype(np.int64)


def overlapping_shards(shard: int, shards: int, other_shards: int) -> range:
    """Returns the shards, of `other_shards`, that hold the hash range of `shard` of `shards`."""
    if other_shards <= shards:
        at = shard * other_shards // shards
        return range(at, at + 1)
    times = other_shards // shards
    return range(shard * times, (shard + 1) * times)
