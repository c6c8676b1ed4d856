"""Finds what SIMSCORE knows of items, cluster IDs and vectors, by item ID.

Read from `item_features` and `item_embeddings` shard by shard, and then either all of it on each
worker machine, as memory-mapped files that its processes share (`broadcast`), or for each shard of
impressions what it asked the item shards for (`shuffle`). Both are `ItemVectors`.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_jobs.schemas import MAIN, cluster_column
from feature_jobs.store import arrays, broadcast, hashing, partitions

_STEPS = np.float32(2.0**26)  # to 1; a float32 of 1/4 and more is a whole number of them anyway
_ITEM_BYTES = 64  # of the machine's copy beside the vector, with the item's ID


@dataclass(frozen=True)
class ItemTables:
    """Holds the tables that tell what is known of the items on one day.

    `previous_features` are those of the day before, None for none, whose cluster IDs may be
    `of_another_lineage`. `labels` are the further resolutions whose cluster IDs are asked for. With
    an `embedding_dtype` of "float16" the vectors are those of a store of half floats. They have
    `dimension` numbers.
    """

    features: partitions.Partition
    embeddings: partitions.Partition
    previous_features: partitions.Partition | None
    of_another_lineage: bool
    dimension: int
    labels: tuple[str, ...] = ()
    embedding_dtype: Literal["float32", "float16"] = "float32"

    @property
    def shards(self) -> int:
        return len(self.features.paths)


# ---- Items -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ItemVectors:
    """Holds what is known of items, ordered by the ID's hash; of all of them memory-mapped.

    `item_ids` are int64 or large strings. `starts` int64 [2^b + 1] say where the hashes with each
    of the leading b bits begin.
    `vector_row` int64 [n] is the item's row in `vectors` float32 [v, d], in `whole_steps`, -1 for
    an item that scores 0. `old_cluster_ids` int32 [n] are those of the day before: 0 for none, -1
    for one of another lineage. `further_ids` are cluster IDs int32 [n] by label of a resolution,
    beside the main one.
    """

    item_ids: pa.Array
    hashes: np.ndarray
    starts: np.ndarray
    cluster_ids: np.ndarray
    old_cluster_ids: np.ndarray
    vector_row: np.ndarray
    vectors: np.ndarray
    further_ids: Mapping[str, np.ndarray] = field(default_factory=dict)

    def look_up(self, ids: pa.Array) -> "FoundItems":
        row = self.find(ids)
        known = row >= 0
        vector = np.full(len(ids), -1, np.int64)
        cluster, old_cluster = np.zeros(len(ids), np.int32), np.zeros(len(ids), np.int32)
        vector[known], cluster[known] = self.vector_row[row[known]], self.cluster_ids[row[known]]
        old_cluster[known] = self.old_cluster_ids[row[known]]
        further = {label: np.zeros(len(ids), np.int32) for label in self.further_ids}
        for label, ids_of in self.further_ids.items():
            further[label][known] = ids_of[row[known]]
        return FoundItems(known, vector, cluster, old_cluster, further)

    def find(self, ids: pa.Array) -> np.ndarray:
        """Returns the row of each item ID, -1 for an unknown item; int64 [m]."""
        wanted = hashing.hash_ids(ids)
        bucket = hashing.shard_of(wanted, len(self.starts) - 1)
        row, end = self.starts[bucket], self.starts[bucket + 1]
        found = np.full(len(ids), -1, np.int64)
        todo = np.flatnonzero(row < end)
        while len(todo):  # as often as the fullest bucket has items
            at = row[todo]
            hit = np.flatnonzero(self.hashes[at] == wanted[todo])
            asked = ids.take(pa.array(todo[hit])).cast(self.item_ids.type)
            same = pc.equal(self.item_ids.take(pa.array(at[hit])), asked)
            hit = hit[same.to_numpy(zero_copy_only=False)]
            found[todo[hit]] = at[hit]
            row[todo] += 1
            todo = todo[(found[todo] < 0) & (row[todo] < end[todo])]
        return found


class FoundItems(NamedTuple):
    """Holds what was found of some item IDs, [m] each.

    That is whether it is known, its row of the vectors or -1, its cluster ID or 0, and that of the
    day before and those of further resolutions as in `ItemVectors`.
    """

    known: np.ndarray
    vector: np.ndarray
    cluster: np.ndarray
    old_cluster: np.ndarray
    further: Mapping[str, np.ndarray]

    def and_none(self) -> "FoundItems":
        """Returns them with one more at the end, at place -1, of which nothing is known."""
        nothing = np.zeros(1, np.int32)
        return FoundItems(
            np.append(self.known, False),
            np.append(self.vector, -1),
            np.append(self.cluster, nothing),
            np.append(self.old_cluster, nothing),
            {label: np.append(ids, nothing) for label, ids in self.further.items()},
        )

    def clusters(self, label: str) -> np.ndarray:
        """Returns the cluster IDs of a resolution; int32 [m]."""
        return self.cluster if label == MAIN else self.further[label]


def bucket_starts(hashes: np.ndarray) -> np.ndarray:
    """Returns `ItemVectors.starts` of ascending `hashes`, one or two to a bucket on average."""
    buckets = hashing.num_shards(len(hashes), 2)
    bucket = hashing.shard_of(hashes, buckets)
    return np.searchsorted(bucket, np.arange(buckets + 1))


def items_of_shard(items: ItemTables, shard: int) -> tuple[pa.Table, np.ndarray]:
    """Returns a shard's items by hash and the vectors float32 [v, d] of those that score.

    The vectors are in `whole_steps`. The columns are item_id, hash, cluster_id and those of further
    resolutions, old_cluster_id and row; `row` is an item's place among the vectors or -1.
    """
    clusters = map(cluster_column, (MAIN, *items.labels))
    features = items.features.read_shard(
        shard, items.shards, "item_id", ["item_id", *clusters, "in_scope", "has_image"]
    )
    embedded = items.embeddings.read_shard(shard, items.shards, "item_id", ["item_id", "embedding"])
    features = features.append_column("hash", pa.array(hashing.hash_ids(features["item_id"])))
    features = features.sort_by("hash")
    scores = pc.and_(features["in_scope"], features["has_image"]).to_numpy()
    at = pc.index_in(
        features["item_id"].filter(pa.array(scores)), value_set=embedded["item_id"].combine_chunks()
    )
    row = np.full(len(features), -1, np.int64)
    row[scores] = np.arange(int(scores.sum()))
    matrix = arrays.embedding_matrix(embedded["embedding"], items.dimension)[at.to_numpy()]
    matrix = whole_steps(matrix.astype(items.embedding_dtype).astype(np.float32, copy=False))
    old = pa.array(_old_clusters(items, shard, features["item_id"]), pa.int32())
    return features.append_column("old_cluster_id", old).append_column("row", pa.array(row)), matrix


def whole_steps(vectors: np.ndarray) -> np.ndarray:
    """Rounds the components of `vectors` float32 [v, d] to multiples of 2^-26; float32 [v, d].

    Products of such vectors are exact: see `scores`.
    """
    return np.rint(vectors * _STEPS) / _STEPS


def _old_clusters(items: ItemTables, shard: int, ids: pa.ChunkedArray) -> np.ndarray:
    """Returns `old_cluster_ids` of a shard's items."""
    if items.previous_features is None:
        return np.zeros(len(ids), np.int32)
    columns = ["item_id", "cluster_id"]
    previous = items.previous_features.read_shard(shard, items.shards, "item_id", columns)
    old = arrays.lookup(ids, previous, "cluster_id")
    return np.where(old > 0, -1, 0) if items.of_another_lineage else old


# ---- Items, broadcast ------------------------------------------------------------------------


def open_item_vectors(items: ItemTables, key: str) -> ItemVectors:
    """Opens the machine's copy under `key`.

    The first process that needs it makes it while the others wait.
    """
    folder, _ = broadcast.shared_folder(
        key,
        partial(_build_item_vectors, items),
        broadcast_bytes(items.features.rows, items.dimension),
    )
    names = ("hashes", "starts", "cluster_ids", "old_cluster_ids", "vector_row", "vectors")
    arrays = {
        name: np.asarray(np.load(os.path.join(folder, name + ".npy"), mmap_mode="r"))
        for name in (*names, *map(_further, items.labels))
    }
    further = {label: arrays.pop(_further(label)) for label in items.labels}
    ids = _open_ids(folder, len(arrays["hashes"]))
    return ItemVectors(ids, **arrays, further_ids=further)


def _further(label: str) -> str:
    """Names the file of a further resolution's cluster IDs."""
    return f"further_ids-{label}"


def _open_ids(folder: str, count: int) -> pa.Array:
    """Opens the IDs of the machine's copy as one array over mapped files; nothing is copied."""
    path = os.path.join(folder, "item_ids.npy")
    if os.path.exists(path):
        return pa.array(np.load(path, mmap_mode="r"))
    ends = pa.py_buffer(np.load(os.path.join(folder, "id_ends.npy"), mmap_mode="r"))
    path = os.path.join(folder, "id_text.bin")
    text = pa.memory_map(path).read_buffer() if os.path.getsize(path) else pa.py_buffer(b"")
    return pa.LargeStringArray.from_buffers(count, ends, text)


def broadcast_bytes(items: int, dimension: int) -> int:
    """Estimates the bytes of disk that the machine's copy of so many items takes."""
    return items * (4 * dimension + _ITEM_BYTES)


def _build_item_vectors(items: ItemTables, folder: str) -> None:
    """Streams both tables shard by shard into the files of the machine's copy.

    What is in memory at once is one shard, and at the end some twenty bytes an item for the index.
    """
    n, filled = items.features.rows, 0
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "hashes": ("<u8", (n,)),
        "cluster_ids": ("<i4", (n,)),
        "old_cluster_ids": ("<i4", (n,)),
        "vector_row": ("<i8", (n,)),
        "vectors": ("<f4", (max(1, items.embeddings.rows), items.dimension)),
        **{_further(label): ("<i4", (n,)) for label in items.labels},
    }
    with contextlib.ExitStack() as files:
        write = {
            name: files.enter_context(_array_file(os.path.join(folder, name + ".npy"), *shape))
            for name, shape in shapes.items()
        }
        write_ids = files.enter_context(_id_files(folder, items.features, n))
        for shard in range(items.shards):
            found, matrix = items_of_shard(items, shard)
            row = found["row"].to_numpy()
            write["hashes"](found["hash"].to_numpy())
            write["cluster_ids"](found["cluster_id"].to_numpy())
            write["old_cluster_ids"](found["old_cluster_id"].to_numpy())
            write["vector_row"](np.where(row >= 0, row + filled, -1))
            write["vectors"](matrix)
            for label in items.labels:
                write[_further(label)](found[cluster_column(label)].to_numpy())
            write_ids(found["item_id"])
            filled += len(matrix)
    hashes = np.load(os.path.join(folder, "hashes.npy"), mmap_mode="r")
    starts = bucket_starts(hashes)
    # Not by np.save, which says of a full disk how many bytes it wrote and not what is wrong.
    path = os.path.join(folder, "starts.npy")
    with _array_file(path, starts.dtype.str, starts.shape) as write_starts:
        write_starts(starts)


@contextlib.contextmanager
def _id_files(
    folder: str, features: partitions.Partition, count: int
) -> Iterator[Callable[[pa.ChunkedArray], object]]:
    """Opens the files that `_open_ids` reads, to be written piece by piece."""
    if pa.types.is_int64(features.schema.field("item_id").type):
        path = os.path.join(folder, "item_ids.npy")
        with _array_file(path, "<i8", (count,)) as write:
            yield lambda ids: write(ids.to_numpy())
        return
    total = 0
    ends_file = _array_file(os.path.join(folder, "id_ends.npy"), "<i8", (count + 1,))
    with ends_file as write_ends, open(os.path.join(folder, "id_text.bin"), "wb") as text:
        write_ends(np.zeros(1, np.int64))

        def write_text(ids: pa.ChunkedArray) -> None:
            nonlocal total
            array = ids.combine_chunks().cast(pa.large_string())
            _, ends, data = array.buffers()
            offsets = np.frombuffer(ends, np.int64)[array.offset :][: len(array) + 1]
            first, last = (int(offsets[0]), int(offsets[-1])) if len(array) else (0, 0)
            text.write(memoryview(data)[first:last] if last > first else b"")
            write_ends(offsets[1:] - first + total)
            total += last - first

        yield write_text


@contextlib.contextmanager
def _array_file(
    path: str, dtype: str, shape: tuple[int, ...]
) -> Iterator[Callable[[np.ndarray], object]]:
    """Opens an .npy file to be written piece by piece; what is left of its shape is zeros.

    Written and not mapped, since what is written to a mapping counts as this process's memory.
    """
    with open(path, "wb") as file:
        header = {"descr": dtype, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        size = file.tell() + np.dtype(dtype).itemsize * int(np.prod(shape))
        yield lambda array: file.write(np.ascontiguousarray(array, dtype).data)
        file.truncate(size)


# ---- Items, shuffled -------------------------------------------------------------------------


def answer(wanted: pa.ChunkedArray, found: pa.Table, matrix: np.ndarray) -> pa.Table:
    """Returns what `items_of_shard` found of the `wanted` item IDs.

    The columns are item_id, cluster_id and those of further resolutions, old_cluster_id and
    embedding; the embedding of an item that scores 0 is null, and unknown items are left out.
    """
    at = pc.index_in(wanted, value_set=found["item_id"].combine_chunks()).drop_null()
    labels = _further_labels(found)
    rows = found.select(["item_id", *map(cluster_column, (MAIN, *labels)), "old_cluster_id"]).take(
        at
    )
    row = found["row"].take(at).to_numpy()
    scores = row >= 0
    offsets = np.concatenate([[0], np.cumsum(scores * matrix.shape[1])]).astype(np.int32)
    lists = pa.ListArray.from_arrays(
        pa.array(offsets), pa.array(matrix[row[scores]].reshape(-1)), mask=pa.array(~scores)
    )
    return rows.append_column("embedding", lists)


def no_answers(item_id: pa.DataType, labels: Sequence[str] = ()) -> pa.Table:
    """Returns an empty table of `answer`."""
    clusters = [*map(cluster_column, (MAIN, *labels)), "old_cluster_id"]
    numbers = [(name, pa.int32()) for name in clusters]
    kinds = [("item_id", item_id), *numbers, ("embedding", pa.list_(pa.float32()))]
    return pa.schema(kinds).empty_table()


def items_of_answers(answers: pa.Table) -> ItemVectors:
    """Returns the items of all item shards that a shard of impressions had asked for."""
    hashes = hashing.hash_ids(answers["item_id"])
    order = np.argsort(hashes)
    answers = answers.take(pa.array(order))
    scores = pc.is_valid(answers["embedding"]).to_numpy(zero_copy_only=False)
    # Vectors of one night are equally long, and a null has no values.
    dimension = pc.max(pc.list_value_length(answers["embedding"])).as_py() or 1
    matrix = arrays.matrix(answers["embedding"], dimension)
    row = np.where(scores, np.cumsum(scores) - 1, -1)
    kind = pa.int64() if pa.types.is_int64(answers["item_id"].type) else pa.large_string()
    further = {k: answers[cluster_column(k)].to_numpy() for k in _further_labels(answers)}
    return ItemVectors(
        answers["item_id"].cast(kind).combine_chunks(),
        hashes[order],
        bucket_starts(hashes[order]),
        answers["cluster_id"].to_numpy(),
        answers["old_cluster_id"].to_numpy(),
        row,
        matrix if len(matrix) else np.zeros((1, dimension), np.float32),
        further,
    )


def _further_labels(rows: pa.Table) -> list[str]:
    """Returns the resolutions besides the main one whose cluster IDs `rows` have."""
    prefix, main = cluster_column(""), cluster_column(MAIN)
    names = [name for name in rows.column_names if name.startswith(prefix) and name != main]
    return [name.removeprefix(prefix) for name in names]


def ask_all(items: ItemTables, wanted: pa.Array) -> ItemVectors:
    """Asks all item shards for the `wanted` items, one after the other."""
    answers = [no_answers(wanted.type, items.labels)]
    for shard in range(items.shards):
        answers.append(answer(pa.chunked_array([wanted]), *items_of_shard(items, shard)))
    return items_of_answers(pa.concat_tables(answers))
