"""SIMSCORE: the cosine of each impression's item with each item that its user had clicked before.

In: the impressions of ds, the clicks of `window_days`, `item_features` and `item_embeddings`. Out:
`user_simscores`.

The law: rows = impressions of ds, one for one. sim(x, y) of COURIER appendix §1 eq. 1, over the
history of the impression's own moment; 0 and masked where either item is unknown, has no
embedding or is out of the encoder's scope.

Flow: impressions and clicks meet in user shards; the embeddings are broadcast as memory-mapped
files, one copy per machine, shared by its processes.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from apache_beam.utils.shared import Shared

from feature_jobs import broadcast, hashing, tables
from feature_jobs.histories import (
    Clicks,
    HistoryLaw,
    click_moments,
    codes_of,
    every_shard,
    histories_at,
    no_clicks,
    read_clicks,
    sort_clicks,
)
from feature_jobs.inputs import (
    IMPRESSION_COLUMNS,
    RowGroup,
    Source,
    check_day,
    read_rows,
)
from feature_jobs.schemas import (
    EMBEDDING_DIM,
    SIM_TIERS,
    USER_SIMSCORES,
    DataContractError,
)

_READ_TOO = ("click_time", "impression_id", "history")  # of the optional columns
_BLOCK_ROWS = 512  # impressions scored at once: 512 x 50 x 256 floats are 26 MB


@dataclass(frozen=True)
class SimscoreJob:
    """All that the workers need to know. `end_us` is the first moment after ds.
    `previous_features` are those of the day before, None for none, whose cluster IDs may be
    `of_another_lineage`."""

    features: tables.Partition
    embeddings: tables.Partition
    previous_features: tables.Partition | None
    of_another_lineage: bool
    law: HistoryLaw
    end_us: int
    shards: int
    schema: pa.Schema
    encoder_id: str
    codebook_id: str
    staging: str

    @property
    def broadcast_key(self) -> str:
        return tables.digest([self.features.manifest, self.embeddings.manifest, self.staging])[:16]


# ---- Pure functions: scores ----------------------------------------------------------------


def sim_scores(
    vectors: np.ndarray, impression: np.ndarray, history: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Cosine of each impression with each history item: COURIER appendix §1 eq. 1.

    `vectors` float32 [v, 256] of unit rows; `impression` int64 [n] and `history` int64 [n, L] are
    rows of it, -1 = none. Returns scores float32 [n, L] in [-1, 1], 0 where either is none, and the
    mask int8 [n, L] of real scores.
    """
    mask = (history >= 0) & (impression >= 0)[:, None]
    scores = np.zeros(history.shape, np.float32)
    for at in range(0, len(impression), _BLOCK_ROWS):
        block = slice(at, at + _BLOCK_ROWS)
        if mask[block].any():
            shown = vectors[impression[block]]  # [block, 256]
            clicked = vectors[history[block]]  # [block, L, 256]; row -1 is masked below
            scores[block] = np.einsum("nd,nld->nl", shown, clicked, optimize=True)
    scores[~mask] = 0.0
    return np.clip(scores, -1.0, 1.0, out=scores), mask.astype(np.int8)


def simtier(scores: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Real scores per tier of width 0.1 over [-1, 1]; int32 [n, 20]. arXiv 2407.19467.

    Tier k holds -1 + k/10 <= score < -1 + (k+1)/10; a score of 1.0 falls into the last one.
    """
    tier = np.clip(np.floor((scores.astype(np.float64) + 1.0) * 10.0), 0, SIM_TIERS - 1)
    row, column = np.nonzero(mask)
    cell = row * SIM_TIERS + tier[row, column].astype(np.int64)
    counts = np.bincount(cell, minlength=len(scores) * SIM_TIERS)
    return counts.reshape(len(scores), SIM_TIERS).astype(np.int32)


def impression_ids(rows: pa.Table) -> pa.Array:
    """A digest of user, item, time and the ordinal among equal rows: 32 hex digits each.

    `rows` are sorted, so that equal ones are neighbours.
    """
    users, items = hashing.hash_ids(rows["user_id"]), hashing.hash_ids(rows["item_id"])
    times = rows["event_time"].cast(pa.int64()).to_numpy().view(np.uint64)
    first = np.ones(len(rows), bool)
    for column in (users, items, times):
        if len(column):
            first[1:] &= column[1:] == column[:-1]
    first[1:] = ~first[1:]
    place = np.arange(len(rows))
    ordinal = place - np.maximum.accumulate(np.where(first, place, 0))
    key = np.stack([users, items, times, ordinal.astype(np.uint64)], axis=1).astype("<u8")
    data = key.view(np.uint8).reshape(len(rows), 32)
    digests = np.stack([hashing.hash_rows(data, seed) for seed in (0, 1)], axis=1).astype(">u8")
    digits = digests.view(np.uint8).reshape(len(rows), 16)
    hexed = np.frombuffer(b"0123456789abcdef", np.uint8)[
        np.stack([digits >> 4, digits & 15], axis=2).reshape(len(rows), 32)
    ]
    offsets = pa.py_buffer(np.arange(0, 32 * len(rows) + 1, 32, dtype=np.int32))
    return pa.StringArray.from_buffers(
        len(rows), offsets, pa.py_buffer(np.ascontiguousarray(hexed))
    )


def logged_history(lists: pa.ChunkedArray, item_ids: pa.Array, length: int) -> np.ndarray:
    """Logged histories as codes into `item_ids`, int64 [n, length], -1 = none."""
    lists = pc.fill_null(lists, pa.scalar([], lists.type)).combine_chunks()
    sizes = pc.list_value_length(lists).to_numpy().astype(np.int64)
    codes = pc.index_in(lists.flatten(), value_set=item_ids).to_numpy().astype(np.int64)
    row = np.repeat(np.arange(len(sizes)), sizes)
    place = np.arange(len(codes)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    out = np.full((len(sizes), length), -1, np.int64)
    kept = place < length
    out[row[kept], place[kept]] = codes[kept]
    return out


# ---- Embeddings, broadcast -------------------------------------------------------------------


@dataclass(frozen=True)
class ItemVectors:
    """What is known of every item of `item_features`, memory-mapped and ordered by the ID's hash.

    `vector_row` int64 [n] is the item's row in `vectors` float32 [v, 256], -1 for an item that
    scores 0. `old_cluster_ids` int32 [n] are those of the day before: 0 for none, -1 for one of
    another lineage. `longest_run` is the largest number of items with one hash.
    """

    item_ids: pa.ChunkedArray
    hashes: np.ndarray
    cluster_ids: np.ndarray
    old_cluster_ids: np.ndarray
    vector_row: np.ndarray
    vectors: np.ndarray
    longest_run: int

    def look_up(self, ids: pa.Array) -> "FoundItems":
        row = self.find(ids)
        known = row >= 0
        vector = np.full(len(ids), -1, np.int64)
        cluster, old_cluster = np.zeros(len(ids), np.int32), np.zeros(len(ids), np.int32)
        vector[known], cluster[known] = self.vector_row[row[known]], self.cluster_ids[row[known]]
        old_cluster[known] = self.old_cluster_ids[row[known]]
        return FoundItems(known, vector, cluster, old_cluster)

    def find(self, ids: pa.Array) -> np.ndarray:
        """The row of each item ID, -1 for an unknown item; int64 [m]."""
        wanted = hashing.hash_ids(ids)
        start = np.searchsorted(self.hashes, wanted)
        found = np.full(len(ids), -1, np.int64)
        for step in range(self.longest_run):
            row = np.minimum(start + step, len(self.hashes) - 1)
            same = pc.equal(self.item_ids.take(pa.array(row)), ids).to_numpy(zero_copy_only=False)
            found[same] = row[same]
        return found


class FoundItems(NamedTuple):
    """Of some item IDs, [m] each: whether it is known, its row of the vectors or -1, its cluster ID
    or 0, and that of the day before as in `ItemVectors`."""

    known: np.ndarray
    vector: np.ndarray
    cluster: np.ndarray
    old_cluster: np.ndarray


def open_item_vectors(job: SimscoreJob) -> ItemVectors:
    """The machine's copy, made by the first process that needs it while the others wait."""
    folder, longest = broadcast.shared_folder(
        job.broadcast_key, lambda folder: _build_item_vectors(job, folder)
    )
    arrays = {
        name: np.load(os.path.join(folder, name + ".npy"), mmap_mode="r", allow_pickle=False)
        for name in ("hashes", "cluster_ids", "old_cluster_ids", "vector_row", "vectors")
    }
    with pa.memory_map(os.path.join(folder, "item_ids.arrow")) as file:
        item_ids = pa.ipc.open_file(file).read_all()["item_id"]
    return ItemVectors(item_ids, longest_run=longest, **arrays)


def _longest_run(sorted_values: np.ndarray) -> int:
    """How often the most frequent of `sorted_values` occurs."""
    if not len(sorted_values):
        return 0
    last = np.flatnonzero(np.diff(sorted_values, append=~sorted_values[-1:]))
    return int(np.diff(last, prepend=-1).max())


def _build_item_vectors(job: SimscoreJob, folder: str) -> int:
    """Streams both tables shard by shard: memory does not grow with the catalogue.

    Returns the largest number of items with one hash, all of which lie in one shard.
    """
    n, shards = job.features.rows, len(job.features.paths)

    def create(name: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        path = os.path.join(folder, name + ".npy")
        return np.lib.format.open_memmap(path, "w+", dtype=dtype, shape=shape)

    hashes, clusters = create("hashes", "u8", (n,)), create("cluster_ids", "i4", (n,))
    old_clusters = create("old_cluster_ids", "i4", (n,))
    vector_row = create("vector_row", "i8", (n,))
    vectors = create("vectors", "f4", (max(1, job.embeddings.rows), EMBEDDING_DIM))
    at = filled = longest = 0
    schema = pa.schema([pa.field("item_id", job.schema.field("item_id").type)])
    with pa.ipc.new_file(os.path.join(folder, "item_ids.arrow"), schema) as ids:
        for shard in range(shards):
            items, matrix = _scoring_shard(job, shard, shards)
            rows = slice(at, at + len(items))
            hashes[rows] = items["hash"].to_numpy()
            longest = max(longest, _longest_run(items["hash"].to_numpy()))
            clusters[rows] = items["cluster_id"].to_numpy()
            old_clusters[rows] = _old_clusters(job, shard, items["item_id"])
            row = items["row"].to_numpy()
            vector_row[rows] = np.where(row >= 0, row + filled, -1)
            vectors[filled : filled + len(matrix)] = matrix
            ids.write_table(pa.table({"item_id": items["item_id"]}, schema=schema))
            at, filled = at + len(items), filled + len(matrix)
    return longest


def _old_clusters(job: SimscoreJob, shard: int, ids: pa.ChunkedArray) -> np.ndarray:
    """`old_cluster_ids` of a shard's items."""
    if job.previous_features is None:
        return np.zeros(len(ids), np.int32)
    columns = ["item_id", "cluster_id"]
    shards = len(job.features.paths)
    previous = job.previous_features.read_shard(shard, shards, "item_id", columns)
    old = tables.lookup(ids, previous, "cluster_id")
    return np.where(old > 0, -1, 0) if job.of_another_lineage else old


def _scoring_shard(job: SimscoreJob, shard: int, shards: int) -> tuple[pa.Table, np.ndarray]:
    """A shard's items by hash (item_id, hash, cluster_id, row) and the vectors float32 [v, 256]
    of those that score; `row` is an item's place among them or -1."""
    features = job.features.read_shard(
        shard, shards, "item_id", ["item_id", "cluster_id", "in_scope", "has_image"]
    )
    embedded = job.embeddings.read_shard(shard, shards, "item_id", ["item_id", "embedding"])
    features = features.append_column("hash", pa.array(hashing.hash_ids(features["item_id"])))
    features = features.sort_by("hash")
    scores = pc.and_(features["in_scope"], features["has_image"]).to_numpy()
    at = pc.index_in(
        features["item_id"].filter(pa.array(scores)), value_set=embedded["item_id"].combine_chunks()
    )
    row = np.full(len(features), -1, np.int64)
    row[scores] = np.arange(int(scores.sum()))
    matrix = tables.embedding_matrix(embedded["embedding"])[at.to_numpy()]
    return features.append_column("row", pa.array(row)), matrix


# ---- Pure functions: a user shard ------------------------------------------------------------


def sort_impressions(rows: pa.Table) -> pa.Table:
    """By user, item and time, then by all else that can be ordered: arrival does not decide.

    Rows alike but for nested columns or half floats stay as they came.
    """
    first = ["user_id", "item_id", "event_time"]
    rest = [f.name for f in rows.schema if f.name not in first and _can_be_ordered(f.type)]
    return rows.sort_by([(name, "ascending") for name in (*first, *rest)])


def _can_be_ordered(kind: pa.DataType) -> bool:
    return not (pa.types.is_nested(kind) or pa.types.is_float16(kind) or pa.types.is_null(kind))


def score_impressions(
    rows: pa.Table, clicks: pa.Table, items: ItemVectors, law: HistoryLaw
) -> tuple[pa.Table, dict[str, int]]:
    """`user_simscores` of a shard's impressions, artefact IDs aside, and what was counted.

    `clicks` (user_id, item_id, click_time) hold all clicks of the users of `rows`.
    """
    rows = sort_impressions(rows)
    item_ids, shown, history = _histories(rows, clicks, law)
    known, vector, cluster, old_cluster = items.look_up(item_ids)  # [distinct items] each
    used = np.unique(vector[vector >= 0])
    vectors = items.vectors[used] if len(used) else np.zeros((1, EMBEDDING_DIM), np.float32)
    local = np.where(vector >= 0, np.searchsorted(used, vector), -1)
    there = history >= 0
    scores, mask = sim_scores(vectors, local[shown], np.where(there, local[history], -1))
    same = there & (cluster[history] == cluster[shown][:, None]) & (cluster[shown] > 0)[:, None]
    compared = (old_cluster != 0) & (cluster > 0)
    columns = _columns(rows, scores, mask, there, item_ids.take(pa.array(history[there])))
    columns["same_cluster"] = pa.array(same.sum(axis=1).astype(np.int32))
    _, early = click_moments(rows.filter(rows["clicked"]), law.click_delay_us)
    return pa.table(columns), {
        "impressions": len(rows),
        "clicks": pc.sum(rows["clicked"]).as_py() or 0,
        "unknown_items": int((~known[shown]).sum()),
        "compared_impressions": int(compared[shown].sum()),
        "moved_impressions": int((compared & (old_cluster != cluster))[shown].sum()),
        "without_history": int((~there.any(axis=1)).sum()),
        "click_times_before_event": early,
    }


def _histories(
    rows: pa.Table, clicks: pa.Table, law: HistoryLaw
) -> tuple[pa.Array, np.ndarray, np.ndarray]:
    """All distinct item IDs, and as codes into them: the shown items [n], the histories [n, L]."""
    if "history" in rows.column_names:
        flat = pa.chunked_array(
            [c.flatten() for c in rows["history"].chunks], clicks["item_id"].type
        )
        item_ids, (shown, _) = codes_of([rows["item_id"], flat])
        return item_ids, shown, logged_history(rows["history"], item_ids, law.history_len)
    item_ids, (shown, clicked) = codes_of([rows["item_id"], clicks["item_id"]])
    _, (users, clickers) = codes_of([rows["user_id"], clicks["user_id"]])
    log: Clicks = sort_clicks(clickers, clicks["click_time"].cast(pa.int64()).to_numpy(), clicked)
    moments = rows["event_time"].cast(pa.int64()).to_numpy()
    places = histories_at(log, users, moments, law)
    if not len(log.items):
        return item_ids, shown, places
    return item_ids, shown, np.where(places >= 0, log.items[places], -1)


def _columns(
    rows: pa.Table, scores: np.ndarray, mask: np.ndarray, there: np.ndarray, history_ids: pa.Array
) -> dict[str, pa.Array]:
    known = mask.sum(axis=1, dtype=np.int32)
    length = there.sum(axis=1).astype(np.int32)
    largest = np.where(mask, scores, -np.inf).max(axis=1, initial=-np.inf)
    offsets = np.concatenate([[0], np.cumsum(length)]).astype(np.int32)
    columns = {name: rows[name] for name in rows.column_names if name not in _READ_TOO}
    given = "impression_id" in rows.column_names
    return {
        **columns,
        "impression_id": rows["impression_id"] if given else impression_ids(rows),
        "sim_scores": tables.list_column(scores, pa.list_(pa.float32())),
        "sim_mask": tables.list_column(mask, pa.list_(pa.int8())),
        "history_item_ids": pa.ListArray.from_arrays(pa.array(offsets), history_ids),
        "history_len": pa.array(length),
        "sim_known": pa.array(known),
        "sim_max": pa.array(np.where(known > 0, largest, 0.0).astype(np.float32)),
        "sim_mean": pa.array((scores.sum(axis=1) / np.maximum(known, 1)).astype(np.float32)),
        "simtier": tables.list_column(simtier(scores, mask), pa.list_(pa.int32())),
    }


# ---- Transforms ----------------------------------------------------------------------------


class ReadImpressions(beam.DoFn):
    """A row group of the impressions of ds → its rows by user shard."""

    def __init__(self, job: SimscoreJob):
        self._job, self.staging = job, job.staging

    @tables.refusing
    def process(self, group: RowGroup) -> Iterator[tuple[int, bytes]]:
        rows = read_rows(group, [*IMPRESSION_COLUMNS, *_READ_TOO], group.form.carry)
        check_day(group, rows, self._job.end_us)
        _check_histories(group, rows)
        return tables.split_by_shard(rows, "user_id", self._job.shards)


def _check_histories(group: RowGroup, rows: pa.Table) -> None:
    if "history" in rows.column_names and pc.list_flatten(rows["history"]).null_count:
        raise DataContractError(
            f"The column {group.form.columns['history']!r} of {group.path} has nulls inside its "
            "lists. Every place of a history is an item, or the scores would stand at wrong "
            "positions. Leave the missing items out where the table is written."
        )


class ScoreShard(beam.DoFn):
    """The impressions and the clicks of a user shard → one part of `user_simscores`."""

    _opened = Shared()  # one mapping per worker process

    def __init__(self, job: SimscoreJob, no_rows: pa.Table):
        self._job, self.staging = job, job.staging
        self._no_rows = no_rows  # of impressions, for a shard that has none

    @tables.refusing
    def process(self, element: tuple[int, dict[str, Iterable[bytes]]]) -> None:
        job, (shard, chunks) = self._job, element
        folder = os.path.join(job.staging, USER_SIMSCORES.name)
        if tables.has_part(folder, shard, job.shards):
            return
        rows = tables.from_ipc(chunks["impressions"], self._no_rows)
        clicks = tables.from_ipc(chunks["clicks"], no_clicks(job.schema))
        items = self._opened.acquire(lambda: open_item_vectors(job), tag=job.broadcast_key)
        scored, counts = score_impressions(rows, clicks, items, job.law)
        for name, value in (("encoder_id", job.encoder_id), ("codebook_id", job.codebook_id)):
            scored = scored.append_column(name, pa.array([value] * len(scored), pa.string()))
        tables.write_part(folder, USER_SIMSCORES, job.schema, scored, shard, job.shards, counts)


# ---- The job -------------------------------------------------------------------------------


def define_simscore(
    root: beam.Pipeline, impressions: Source, log: Sequence[Source], job: SimscoreJob
) -> None:
    """Writes `user_simscores` below `job.staging`, one part per user shard.

    `log` are the days that histories come from, ds among them; empty where histories are logged.
    """
    rows = (
        (
            root
            | "ImpressionGroups" >> beam.Create(impressions.groups())
            | "SpreadImpressionGroups" >> beam.Reshuffle()
            | "ReadImpressions" >> beam.ParDo(ReadImpressions(job)),
            every_shard(root, job.shards),
        )
        | "ImpressionsAndShards" >> beam.Flatten()
    )  # fmt: skip
    clicks = read_clicks(root, log, job.law, job.end_us, job.shards, job.staging)
    own = [(name, job.schema.field(name).type) for name in IMPRESSION_COLUMNS]
    no_rows = pa.schema([*own, *impressions.carried]).empty_table()
    _ = (
        {"impressions": rows, "clicks": clicks}
        | "ByUserShard" >> beam.CoGroupByKey()
        | "ScoreShard" >> beam.ParDo(ScoreShard(job, no_rows))
    )
