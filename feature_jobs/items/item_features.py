"""ITEM-FEATURES gives every item the cluster IDs and the flags that the CTR model reads.

In: `item_embeddings` and `item_rejects` of ds, a codebook of the same encoder, `item_features` of
the day before; or those of several days. Out: `item_features`, one row for every catalogue item and
every kept former item; beside each part, how many items each cluster has and how many left it since
the day before.

The law: an item whose category is out of the encoder's scope, or that has no embedding, has
cluster_id 0 (COURIER appendix §7); any other has the number of its exactly nearest centre.

Flow: the parts of all days are written first, since the day before may be one of them; then the
clusters are counted.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from apache_beam.utils.shared import Shared

from feature_jobs import laws
from feature_jobs.codebooks.codebook import CodebookInfo, health_of, read_codebook_info
from feature_jobs.codebooks.nearest import CodebookSearch, shared_search
from feature_jobs.drift import population_stability_index
from feature_jobs.schemas import ITEM_FEATURES, MAIN, cluster_column
from feature_jobs.store import arrays, encoder_info, files, partitions, worker_notes
from feature_jobs.store.every_shard import check_all_came

_CLUSTERS = "cluster_counts"  # folder of the counts beside the parts
_COUNTS = ("items", "before", "compared", "moved")
_NAMED = 5  # clusters that most items left, by name
_LOOKED_AT = 1_000_000  # items of a cluster, for a picture that many of them have


@dataclass(frozen=True)
class FeaturesJob:
    """Holds all that the workers of ITEM-FEATURES need to know of one day.

    One part is made for each of `shards`. `previous` are the features of the day before,
    None for none; they may be made by the same job. Where they are `of_another_lineage`, every
    number has changed its meaning.
    """

    embeddings: partitions.Partition
    rejects: partitions.Partition
    codebook_folder: str
    categories: tuple[str, ...] | None
    schema: pa.Schema
    previous: partitions.Partition | None
    of_another_lineage: bool
    staging: str
    shards: int


# ---- Pure functions ------------------------------------------------------------------------


def features_of(
    embedded: pa.Table,
    rejected: pa.Table,
    search: CodebookSearch,
    categories: tuple[str, ...] | None,
    second: bool = False,
) -> pa.Table:
    """Makes `item_features` of rows of `item_embeddings` and `item_rejects`.

    The Vector form is included, with `second` also the distances to the second-nearest centres.
    Raises DataContractError for an embedding that is no unit vector.
    """
    category = pa.chunked_array(
        embedded["category"].chunks + rejected["category"].chunks, pa.string()
    )
    scope = encoder_info.in_scope(category, categories)
    n, rows = len(category), np.flatnonzero(scope[: len(embedded)])
    info = search.codebook.info
    points = arrays.embedding_matrix(embedded["embedding"], info.dimension)[rows]
    laws.check_unit(points, embedded["item_id"].take(pa.array(rows)))
    inside = np.ones(n, bool)
    inside[: len(embedded)] = embedded["in_catalogue"].to_numpy()
    return pa.table(
        {
            "item_id": pa.chunked_array(embedded["item_id"].chunks + rejected["item_id"].chunks),
            "category": category,
            "has_image": np.arange(n) < len(embedded),
            "in_scope": scope,
            "in_catalogue": inside,
            **_assigned(points, rows, n, search, second),
            "encoder_id": pa.array([info.encoder_id] * n, pa.string()),
            "codebook_id": pa.array([info.codebook_id] * n, pa.string()),
            "embedding": arrays.list_column(_spread(points, rows, n), pa.list_(pa.float32())),
        }
    )


def _assigned(
    points: np.ndarray, rows: np.ndarray, n: int, search: CodebookSearch, second: bool
) -> dict[str, np.ndarray]:
    """Returns the cluster IDs of all resolutions, [n] each, and the distances of the main one."""
    columns = {}
    for label in search.codebook.info.labels:
        main = label == MAIN
        numbers, found = search.assign(label, points, second and main)
        columns[cluster_column(label)] = _spread(numbers, rows, n)
        if main:
            columns["centre_distance"] = _spread(found.distance, rows, n)
        if second and main:
            known = np.where(np.isfinite(found.second), found.second, np.float32(0))
            columns["second_distance"] = _spread(known, rows, n)
    return columns


def _spread(values: np.ndarray, rows: np.ndarray, n: int) -> np.ndarray:
    """Puts `values` at `rows` of n, and zeros elsewhere."""
    out = np.zeros((n, *values.shape[1:]), values.dtype)
    out[rows] = values
    return out


def count_features(rows: pa.Table) -> dict[str, int]:
    """Counts what the receipt of a part tells of its rows of `item_features`."""
    cluster = rows["cluster_id"].to_numpy()
    return {
        "items": len(rows),
        "items_with_cluster": int((cluster > 0).sum()),
        "items_out_of_scope": len(rows) - (pc.sum(rows["in_scope"]).as_py() or 0),
    }


def count_clusters(
    rows: pa.Table, previous: pa.Table | None, labels: Sequence[str], of_another_lineage: bool
) -> pa.Table:
    """Counts the items of each number of each resolution, and those that have moved to another.

    These are the items that have the number; those that had it the day before; those of them that
    have some number now; and those of these that have another one. `examples` are the first few
    items that moved, each with the number that it left. `previous` are all rows of the day before
    that are sharded as `rows`.
    """
    parts = []
    for label in labels:
        column = cluster_column(label)
        new = rows[column].to_numpy()
        before, old = np.zeros(0, np.int32), np.zeros(len(new), np.int32)
        if previous is not None and column in previous.column_names:
            before = previous[column].to_numpy()
            old = arrays.lookup(rows["item_id"], previous, column)
        both = (old > 0) & (new > 0)
        moved = both & ((old != new) | of_another_lineage)
        named = np.flatnonzero(moved)[: partitions.EXAMPLES]
        named = named[np.argsort(old[named], kind="stable")]
        counts = list(map(_bincount, (new, before, old[both], old[moved], old[named])))
        length = max(map(len, counts))
        counts = [np.pad(c, (0, length - len(c))) for c in counts]
        number = np.flatnonzero(np.any(counts, axis=0))
        *counts, sizes = (c[number] for c in counts)
        examples = arrays.list_array(sizes, rows["item_id"].take(pa.array(named)).combine_chunks())
        columns = [pa.array([label] * len(number), pa.string()), number, *counts, examples]
        parts.append(pa.table(columns, names=["label", "cluster_id", *_COUNTS, "examples"]))
    return pa.concat_tables(parts)


def _bincount(numbers: np.ndarray) -> np.ndarray:
    """Counts how often each number occurs; 0 = none does not count."""
    counts = np.bincount(numbers, minlength=1)
    counts[0] = 0
    return counts


def summarise_clusters(
    counts: pa.Table, codebook: CodebookInfo, of_another_lineage: bool
) -> dict[str, dict[str, Any]]:
    """Tells, by resolution, the health of the clusters, and what changed since the day before.

    That is how many items moved, and how far the sizes are from those of then; the clusters that
    most items left are named, and some items. `counts` are those of all shards, in their order.
    """
    total = counts.group_by(["label", "cluster_id"]).aggregate([(n, "sum") for n in _COUNTS])
    found = {}
    for label in codebook.labels:
        rows = total.filter(pc.equal(total["label"], label)).sort_by(
            [("moved_sum", "descending"), ("cluster_id", "ascending")]
        )
        numbers = codebook.resolution(label).numbers
        sizes = arrays.lookup(pa.array(numbers), rows, "items_sum", key="cluster_id")
        left = rows.filter(pc.greater(rows["moved_sum"], 0)).slice(0, _NAMED)
        moved = pc.list_flatten(counts["examples"].filter(pc.equal(counts["label"], label)))
        found[label] = {
            **health_of(sizes),
            "largest_cluster": int(numbers[sizes.argmax()]),
            "items_before": pc.sum(rows["before_sum"]).as_py() or 0,
            "compared_items": pc.sum(rows["compared_sum"]).as_py() or 0,
            "moved_items": pc.sum(rows["moved_sum"]).as_py() or 0,
            "most_moved": [
                {"cluster_id": r["cluster_id"], "moved": r["moved_sum"], "of": r["compared_sum"]}
                for r in left.to_pylist()
            ],
            "moved_examples": moved[: partitions.EXAMPLES].to_pylist(),
            "population_stability_index": (None if of_another_lineage else _drift(rows, numbers)),
        }
    return found


def _drift(rows: pa.Table, numbers: np.ndarray) -> float | None:
    """Returns how far clusters' sizes are from those of the day before, None without any then.

    `numbers` are those of today's codebook; some that it has retired had items the day before.
    """
    if not pc.sum(rows["before_sum"]).as_py():
        return None
    every = pa.array(np.union1d(numbers, rows["cluster_id"].to_numpy()))
    before, now = (
        arrays.lookup(every, rows, column, key="cluster_id")
        for column in ("before_sum", "items_sum")
    )
    return population_stability_index(before, now)


# ---- Transforms ----------------------------------------------------------------------------


class AssignShard(beam.DoFn):
    """Turns the number of a (day, shard) into one part of `item_features`, and tells that it is.

    `done` are the parts that were made before the job.
    """

    def __init__(self, jobs: Sequence[FeaturesJob], done: frozenset[tuple[int, int]], staging: str):
        self._jobs, self._done, self.staging = jobs, done, staging
        # One each, and held: a Shared alone would load anew whenever two days take turns.
        self._loaded = {job.codebook_folder: Shared() for job in jobs}
        self._held: dict[str, CodebookSearch] = {}

    @worker_notes.refusing
    def process(self, element: tuple[int, int]) -> Iterator[tuple[tuple[int, int], bytes]]:
        day, shard = element
        if element not in self._done:
            self._write(self._jobs[day], shard)
        yield element, b""

    def _write(self, job: FeaturesJob, shard: int) -> None:
        embedded = job.embeddings.read_shard(
            shard, job.shards, "item_id", ["item_id", "embedding", "category", "in_catalogue"]
        )
        rejected = job.rejects.read_shard(shard, job.shards, "item_id", ["item_id", "category"])
        folder, second = job.codebook_folder, "second_distance" in job.schema.names
        search = self._held[folder] = shared_search(self._loaded[folder], folder)
        rows = features_of(embedded, rejected, search, job.categories, second)
        info = search.codebook.info
        highest = {cluster_column(one.label): one.max_id for one in info.resolutions}
        partitions.write_part(
            _parts(job), ITEM_FEATURES, job.schema, rows, shard, job.shards, count_features(rows),
            limits=highest | {"embedding": info.dimension},
        )  # fmt: skip


class CountClusters(beam.DoFn):
    """Turns the number of a (day, shard), once all parts are there, into its counts of clusters."""

    def __init__(self, jobs: Sequence[FeaturesJob], staging: str):
        self._jobs, self.staging = jobs, staging
        self._labels: dict[str, tuple[str, ...]] = {}
        self._there: dict[int, list[str]] = {}

    @worker_notes.refusing
    def process(self, element: tuple[tuple[int, int], Iterable[bytes]]) -> None:
        (day, shard), _ = element
        job = self._jobs[day]
        path = _counts_path(job.staging, shard)
        if files.exists(path):
            return
        labels = self._labels_of(job.codebook_folder)
        part = partitions.to_be_made(_parts(job), job.shards).path(shard)
        rows = partitions.read_parquet(part, ["item_id", *map(cluster_column, labels)])
        previous = job.previous and job.previous.read_shard(
            shard, job.shards, "item_id", self._compared_columns(day, labels)
        )
        counts = count_clusters(rows, previous, labels, job.of_another_lineage)
        partitions.write_parquet(path, counts)

    def _labels_of(self, codebook_folder: str) -> tuple[str, ...]:
        if codebook_folder not in self._labels:
            self._labels[codebook_folder] = read_codebook_info(codebook_folder).labels
        return self._labels[codebook_folder]

    def _compared_columns(self, day: int, labels: Sequence[str]) -> list[str]:
        """Returns the columns to compare: those that the day before has too.

        Its parts may be of this job: who wires it could not look yet.
        """
        previous = self._jobs[day].previous
        if day not in self._there:
            self._there[day] = previous.schema.names if previous else []
        mine = map(cluster_column, labels)
        return ["item_id", *(column for column in mine if column in self._there[day])]


# ---- The job -------------------------------------------------------------------------------


def define_item_features(root: beam.Pipeline, jobs: Sequence[FeaturesJob], staging: str) -> None:
    """Writes `item_features` of each day of `jobs` below its staging folder.

    There is one part per item shard. What workers tell of the job lies below `staging`.
    """
    keys = [(day, shard) for day, job in enumerate(jobs) for shard in range(job.shards)]
    done = [
        (day, shard)
        for day, job in enumerate(jobs)
        for shard in partitions.finished(_parts(job), job.shards)
    ]
    _ = (
        root
        | "Shards" >> beam.Create(keys)
        | "AssignShard" >> beam.ParDo(AssignShard(jobs, frozenset(done), staging))
        | "AfterAllParts" >> beam.GroupByKey()
        | "CountClusters" >> beam.ParDo(CountClusters(jobs, staging))
    )


def _parts(job: FeaturesJob) -> str:
    return os.path.join(job.staging, ITEM_FEATURES.name)


def _counts_path(staging: str, shard: int) -> str:
    return os.path.join(staging, _CLUSTERS, f"{shard:05d}.parquet")


def shards_counted(staging: str) -> int:
    """Returns of how many shards the clusters were counted."""
    return len(files.list_names(os.path.join(staging, _CLUSTERS)))


def read_clusters(
    staging: str, shards: int, codebook_folder: str, of_another_lineage: bool
) -> Mapping[str, dict[str, Any]]:
    """Returns what `summarise_clusters` makes of all shards' counts.

    Raises DataContractError where those of a shard are not there.
    """
    check_all_came("shards whose clusters were counted", shards_counted(staging), shards)
    counts = pa.concat_tables(
        partitions.read_parquet(_counts_path(staging, n)) for n in range(shards)
    )
    return summarise_clusters(counts, read_codebook_info(codebook_folder), of_another_lineage)


class SamePicture(NamedTuple):
    """Tells of items of a cluster how many have the very same picture, byte for byte.

    These are `items` of `looked_at`; `item_id` is one of them.
    """

    sha256: str
    item_id: int | str
    items: int
    looked_at: int


def most_frequent_picture(
    embeddings: partitions.Partition, features: partitions.Partition, label: str, cluster: int
) -> SamePicture:
    """Finds the picture that most items of a cluster have; the cluster has some.

    Of a large one, the items of some shards are looked at: since items are sharded by the hash of
    their ID, they are a sample. `features` is made of `embeddings`, in as many parts.
    """
    column, shards, seen, found = cluster_column(label), len(features.paths), 0, []
    for shard in range(shards):
        rows = features.read_shard(shard, shards, "item_id", ["item_id", column])
        ids = rows["item_id"].filter(pc.equal(rows[column], cluster)).combine_chunks()
        images = embeddings.read_shard(shard, shards, "item_id", ["item_id", "image_sha256"])
        found.append(images.filter(pc.is_in(images["item_id"], value_set=ids)))
        seen += len(found[-1])
        if seen >= _LOOKED_AT:
            break
    items = pa.concat_tables(found).group_by("image_sha256").aggregate(
        [("item_id", "count"), ("item_id", "min")]
    )  # fmt: skip
    order = [("item_id_count", "descending"), ("image_sha256", "ascending")]
    most = items.sort_by(order).slice(0, 1).to_pylist()[0]
    return SamePicture(most["image_sha256"], most["item_id_min"], most["item_id_count"], seen)
