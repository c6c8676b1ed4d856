"""CROSSWALK tells where the items of each old cluster went, and the impressions of these items.

In: `item_embeddings` of ds, a codebook and its parent, the impressions of ds, and, where the two
codebooks are of different encoders, an `item_features` partition with the parent's numbers. Out:
counts of (resolution, old number, new number), which `crosswalk` makes into the table beside the
codebook. The law: for every number of the parent the shares of its rows sum to one.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from apache_beam.utils.shared import Shared

from feature_jobs import laws
from feature_jobs.codebooks.codebook import Codebook, CodebookInfo
from feature_jobs.codebooks.nearest import shared_search
from feature_jobs.inputs import RowGroup, Source, read_rows
from feature_jobs.schemas import CROSSWALK
from feature_jobs.store import (
    arrays,
    documents,
    encoder_info,
    files,
    hashing,
    partitions,
    worker_notes,
)
from feature_jobs.store.every_shard import check_all_came, every_shard
from feature_jobs.store.pieces import Piece, read_pieces, write_pieces

_KEY = ["label", "old_cluster_id", "new_cluster_id"]
_COUNTS = ["items", "impressions"]


@dataclass(frozen=True)
class CrosswalkJob:
    """Holds all that the workers of CROSSWALK need to know.

    `old` are `item_features` made with the parent; None where both codebooks are of one encoder, so
    that the parent itself tells.
    """

    embeddings: partitions.Partition
    categories: tuple[str, ...] | None
    codebook_folder: str
    parent_folder: str
    labels: tuple[str, ...]
    old: partitions.Partition | None
    staging: str

    @property
    def shards(self) -> int:
        return len(self.embeddings.paths)


# ---- Pure functions ------------------------------------------------------------------------


def count_moves(old: np.ndarray, new: np.ndarray, impressions: np.ndarray, label: str) -> pa.Table:
    """Counts items and their `impressions` by `old` and `new` number; int [n] each.

    Items without an old number are left out.
    """
    rows = pa.table(
        {
            "old_cluster_id": old.astype(np.int32),
            "new_cluster_id": new.astype(np.int32),
            "items": np.ones(len(old), np.int64),
            "impressions": impressions.astype(np.int64),
        }
    ).filter(pa.array(old > 0))
    rows = rows.append_column("label", pa.array([label] * len(rows), pa.string()))
    return _sum(rows)


def _sum(rows: pa.Table) -> pa.Table:
    total = rows.group_by(_KEY, use_threads=False).aggregate([(name, "sum") for name in _COUNTS])
    return total.rename_columns([name.removesuffix("_sum") for name in total.column_names])


def crosswalk(counts: Iterable[pa.Table], parent: Codebook, codebook: Codebook) -> pa.Table:
    """Returns the table `crosswalk` of the counts of all shards.

    An old number without items goes to itself where it lives on, else to 0. Where no impression is
    of an old cluster's items, its impressions are taken to go where its items went.
    """
    labels = [label for label in codebook.info.labels if label in parent.centres]
    none = _sum(_without_items(parent, codebook, labels).slice(0, 0))
    rows = none
    for part in counts:
        rows = _sum(pa.concat_tables([rows, part.select(none.column_names)]))
    idle = _without_items(parent, codebook, labels).join(
        rows.select(["label", "old_cluster_id"]), ["label", "old_cluster_id"], join_type="left anti"
    )
    rows = pa.concat_tables([rows, idle.select(rows.column_names)])
    item_share = pc.coalesce(_share(rows, "items"), pa.scalar(1.0))
    rows = rows.append_column("item_share", item_share)
    impression_share = pc.coalesce(_share(rows, "impressions"), item_share)
    rows = rows.append_column("impression_share", impression_share)
    order = [("label", "ascending"), ("old_cluster_id", "ascending"), ("items", "descending")]
    rows = rows.sort_by([*order, ("new_cluster_id", "ascending")])
    return rows.select(CROSSWALK.names).cast(CROSSWALK)


def _without_items(parent: Codebook, codebook: Codebook, labels: list[str]) -> pa.Table:
    """Returns a row without items for each number of the parent."""
    parts = []
    for label in labels:
        old = np.asarray(parent.numbers[label])
        new = np.where(np.isin(old, codebook.numbers[label]), old, 0)
        nothing = np.zeros(len(old), np.int64)
        columns = [pa.array([label] * len(old), pa.string()), old, new, nothing, nothing]
        parts.append(pa.table(columns, names=[*_KEY, *_COUNTS]))
    return pa.concat_tables(parts)


def _share(rows: pa.Table, name: str) -> pa.Array:
    """Returns each row's share of its old number's total, float64 [rows]; null for a total of 0."""
    key = pc.binary_join_element_wise(rows["label"], rows["old_cluster_id"].cast(pa.string()), " ")
    code = pc.dictionary_encode(key).combine_chunks().indices.to_numpy()
    counts = rows[name].to_numpy()
    total = np.bincount(code, weights=counts)[code]
    return pa.array(counts / np.maximum(total, 1.0), mask=total == 0)


def with_moves(info: CodebookInfo, table: pa.Table) -> CodebookInfo:
    """Returns `info` with the shares of items and impressions that have changed their number."""
    found = []
    for resolution in info.resolutions:
        rows = table.filter(pc.equal(table["label"], resolution.label))
        moved = pc.not_equal(rows["old_cluster_id"], rows["new_cluster_id"]).to_numpy()
        items, impressions = (rows[name].to_numpy() for name in _COUNTS)
        found.append(
            replace(
                resolution,
                moved_items=_ratio(items[moved].sum(), items.sum()),
                moved_impressions=_ratio(impressions[moved].sum(), impressions.sum()),
            )
        )
    return replace(info, resolutions=tuple(found))


def _ratio(some: int, total: int) -> float | None:
    return float(some / total) if total else None


# ---- Transforms ----------------------------------------------------------------------------


class CountImpressions(beam.DoFn):
    """Counts how many impressions of a row group are of each item, by item shard."""

    def __init__(self, job: CrosswalkJob):
        self._job, self.staging = job, job.staging

    @worker_notes.refusing
    def process(self, group: RowGroup) -> Iterator[tuple[int, Piece]]:
        found = pc.value_counts(read_rows(group, ["item_id"])["item_id"])
        rows = pa.table({"item_id": found.field("values"), "impressions": found.field("counts")})
        shard = hashing.shard_of(hashing.hash_ids(rows["item_id"]), self._job.shards)
        name = documents.digest([group.path, group.index])[:16]
        yield from write_pieces(os.path.join(self.staging, "impressions", name), rows, shard)


class CountMoves(beam.DoFn):
    """Turns the impressions of an item shard into a file of its counts by old and new number."""

    _new, _old = Shared(), Shared()  # one of each codebook per worker process

    def __init__(self, job: CrosswalkJob, no_rows: pa.Table):
        self._job, self.staging = job, job.staging
        self._no_rows = no_rows  # item_id, impressions: for a shard without any

    @worker_notes.refusing
    def process(self, element: tuple[int, Iterable[Piece | bytes]]) -> None:
        job, (shard, pieces) = self._job, element
        wanted = ["item_id", "embedding", "category", "in_catalogue"]
        rows = job.embeddings.read_shard(shard, job.shards, "item_id", wanted)
        rows = rows.filter(pa.array(encoder_info.fitted_on(rows, job.categories)))
        counts = read_pieces(pieces, self._no_rows)
        shown = _impressions_of(rows["item_id"], counts)
        codebook = shared_search(self._new, job.codebook_folder)
        points = arrays.embedding_matrix(rows["embedding"], codebook.codebook.info.dimension)
        laws.check_unit(points, rows["item_id"])
        old = self._old_numbers(shard, rows["item_id"], points)
        parts = [
            count_moves(old[label], codebook.assign(label, points)[0], shown, label)
            for label in job.labels
        ]
        came = pc.sum(counts["impressions"]).as_py() or 0  # of items of any day or scope
        documents.write_json(_came_path(job, shard), {"impressions": came})
        partitions.write_parquet(_counts_path(job, shard), pa.concat_tables(parts))

    def _old_numbers(
        self, shard: int, ids: pa.ChunkedArray, points: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Returns, by label, the parent's number of each item; int32 [n]."""
        job = self._job
        if job.old is None:
            parent = shared_search(self._old, job.parent_folder)
            return {label: parent.assign(label, points)[0] for label in job.labels}
        return partitions.cluster_numbers(job.old, shard, job.shards, ids, job.labels)


def _impressions_of(ids: pa.ChunkedArray, counts: pa.Table) -> np.ndarray:
    """Adds up each item's impressions, int64 [n], of (item_id, impressions) that repeat items."""
    total = counts.group_by("item_id", use_threads=False).aggregate([("impressions", "sum")])
    return arrays.lookup(ids, total, "impressions_sum")


# ---- The job -------------------------------------------------------------------------------


def define_crosswalk(root: beam.Pipeline, impressions: Source | None, job: CrosswalkJob) -> None:
    """Writes the counts of each item shard as a file; without `impressions`, items alone count."""
    job = replace(job, embeddings=job.embeddings.slim(), old=job.old and job.old.slim())
    item_id = job.embeddings.schema.field("item_id").type
    no_rows = pa.table({"item_id": pa.array([], item_id), "impressions": pa.array([], pa.int64())})
    counted = (
        root
        | "ImpressionGroups" >> beam.Create(impressions.groups() if impressions else [])
        | "CountImpressions" >> beam.ParDo(CountImpressions(job))
    )
    _ = (
        (counted, every_shard(root, job.shards))
        | "ImpressionsAndShards" >> beam.Flatten()
        | "ByItemShard" >> beam.GroupByKey()
        | "CountMoves" >> beam.ParDo(CountMoves(job, no_rows))
    )


def _counts_path(job: CrosswalkJob, shard: int) -> str:
    return os.path.join(job.staging, "moves", f"{shard:05d}.parquet")


def _came_path(job: CrosswalkJob, shard: int) -> str:
    return os.path.join(job.staging, "came", f"{shard:05d}.json")


def shards_counted(job: CrosswalkJob) -> int:
    """Returns of how many item shards the moves, and what came to them, are counted."""
    paths = _counts_path(job, 0), _came_path(job, 0)
    return min(len(files.list_names(os.path.dirname(path))) for path in paths)


def read_counts(job: CrosswalkJob, impressions: int) -> Iterator[pa.Table]:
    """Yields the counts of all shards, one after the other.

    Raises DataContractError where a shard's are not there, or where not all `impressions` that the
    job was given came to them.
    """
    shards = range(job.shards)
    check_all_came("item shards whose moves were counted", shards_counted(job), job.shards)
    came = sum(documents.read_json(_came_path(job, shard))["impressions"] for shard in shards)
    check_all_came("impressions of items that may have moved", came, impressions)
    for shard in shards:
        yield partitions.read_parquet(_counts_path(job, shard))
