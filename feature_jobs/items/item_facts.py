"""Finds what `item_features` of a night say of items, by item ID, without any vectors.

It is the machine's copy, memory-mapped and shared by its processes, of some thirty bytes an item.
Rows are ordered by the ID's hash, in the shards of the table, so that a few IDs are found without
looking at all.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_jobs.store import arrays, broadcast, hashing
from feature_jobs.store.partitions import Partition

FLAGS = ("has_image", "in_scope")
_ITEM_BYTES = 40
_FILE = "facts.arrow"


@dataclass(frozen=True)
class ItemFacts:
    """Holds the facts of items, a table for each shard of the hash space, each ordered by `hash`.

    Its columns are item_id, hash, has_image, in_scope and those of cluster IDs.
    """

    shards: tuple[pa.Table, ...]
    clusters: tuple[str, ...]

    def look_up(self, ids: pa.Array) -> dict[str, np.ndarray]:
        """Returns what is known of each of some item IDs, [m] each.

        These are `item_known`, `has_image` and `in_scope` bool, and int32 cluster IDs; false and 0
        for an unknown item.
        """
        hashes = hashing.hash_ids(ids)
        order = np.argsort(hashes)  # neighbours are found ten times as fast
        ids, hashes = ids.take(pa.array(order)), hashes[order]
        shard = hashing.shard_of(hashes, len(self.shards))
        found = {name: np.zeros(len(ids), bool) for name in ("item_known", *FLAGS)}
        found |= {name: np.zeros(len(ids), np.int32) for name in self.clusters}
        for number in np.unique(shard):
            first, end = np.searchsorted(shard, [number, number + 1])
            table, mine = self.shards[number], slice(first, end)
            at, row = _matches(ids[mine], hashes[mine], table, self._hashes[number])
            place = order[mine][at]
            found["item_known"][place] = True
            for name in (*FLAGS, *self.clusters):
                taken = table[name].take(pa.array(row))
                found[name][place] = taken.to_numpy(zero_copy_only=False)
        return found

    @cached_property
    def _hashes(self) -> list[np.ndarray]:
        return [table["hash"].combine_chunks().to_numpy() for table in self.shards]


def _matches(
    ids: pa.Array, hashes: np.ndarray, table: pa.Table, known: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns which of some IDs a shard has, and in which rows; int64 [k] each."""
    first, end = (np.searchsorted(known, hashes, side) for side in ("left", "right"))
    counts = end - first  # one, but for IDs whose hashes are equal
    at = np.arange(len(ids)).repeat(counts)
    row = (
        np.arange(counts.sum()) - (np.cumsum(counts) - counts).repeat(counts) + first.repeat(counts)
    )
    theirs = table["item_id"].take(pa.array(row)).combine_chunks()
    same = pc.equal(theirs, ids.take(pa.array(at)).cast(theirs.type))
    same = same.to_numpy(zero_copy_only=False)
    return at[same], row[same]


def open_item_facts(features: Partition, clusters: Sequence[str], key: str) -> ItemFacts:
    """Opens the machine's copy under `key` of `features`, with the columns of cluster IDs.

    The first process that needs it makes it while the others wait.
    """
    build = partial(_build, features, clusters)
    folder, _ = broadcast.shared_folder(key, build, features.rows * _ITEM_BYTES)
    with pa.ipc.open_file(pa.memory_map(os.path.join(folder, _FILE))) as reader:
        batches = [reader.get_batch(at) for at in range(reader.num_record_batches)]
    return ItemFacts(tuple(pa.Table.from_batches([one]) for one in batches), tuple(clusters))


def item_facts(features: Partition, clusters: Sequence[str]) -> ItemFacts:
    """Reads the facts of all items of `features` into the memory of this process alone."""
    return ItemFacts(tuple(_by_shard(features, clusters)), tuple(clusters))


def _by_shard(features: Partition, clusters: Sequence[str]) -> Iterator[pa.Table]:
    shards, wanted = len(features.paths), ["item_id", *FLAGS, *clusters]
    for shard in range(shards):
        rows = features.read_shard(shard, shards, "item_id", wanted)
        rows = rows.append_column("hash", pa.array(hashing.hash_ids(rows["item_id"])))
        yield arrays.plain(rows.sort_by("hash").combine_chunks())


def _build(features: Partition, clusters: Sequence[str], folder: str) -> None:
    writer = None
    for rows in _by_shard(features, clusters):
        writer = writer or pa.ipc.new_file(os.path.join(folder, _FILE), rows.schema)
        batch, *more = rows.to_batches() or [pa.RecordBatch.from_pylist([], rows.schema)]
        if more:
            raise ValueError(f"a shard of {features.folder} is more than one batch of Arrow's")
        writer.write_batch(batch)
    if writer:
        writer.close()
