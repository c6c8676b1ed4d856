"""ITEM-FEATURES: the cluster ID and the flags of every item, as the CTR model reads them.

In: `item_embeddings` and `item_rejects` of ds, a codebook of the same encoder. Out:
`item_features`, one row for every catalogue item and every kept former item.

The law: an item whose category is out of the encoder's scope, or that has no embedding, has
cluster_id 0 (COURIER appendix §7); any other has the number of its exactly nearest centre.
"""

import os
from dataclasses import dataclass

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from apache_beam.utils.shared import Shared

from feature_jobs import tables
from feature_jobs.codebook import Codebook, load_codebook, nearest_centre
from feature_jobs.schemas import EMBEDDING_DIM, ITEM_FEATURES


@dataclass(frozen=True)
class FeaturesJob:
    """All that the workers need to know; one part is made for each part of `embeddings`."""

    embeddings: tables.Partition
    rejects: tables.Partition
    codebook_folder: str
    categories: tuple[str, ...] | None
    schema: pa.Schema
    staging: str

    @property
    def shards(self) -> int:
        return len(self.embeddings.paths)


# ---- Pure functions ------------------------------------------------------------------------


def features_of(
    embedded: pa.Table, rejected: pa.Table, codebook: Codebook, categories: tuple[str, ...] | None
) -> pa.Table:
    """`item_features`, the Vector form included, from `item_embeddings` and `item_rejects` rows."""
    category = pa.chunked_array(
        embedded["category"].chunks + rejected["category"].chunks, pa.string()
    )
    scope = tables.in_scope(category, categories)
    usable = scope[: len(embedded)]
    n = len(category)
    cluster, distance = np.zeros(n, np.int32), np.zeros(n, np.float32)
    vectors = np.zeros((n, EMBEDDING_DIM), np.float32)
    rows = np.flatnonzero(usable)
    vectors[rows] = tables.embedding_matrix(embedded["embedding"])[rows]
    nearest, distance[rows] = nearest_centre(codebook.centres, vectors[rows])
    cluster[rows] = codebook.numbers[nearest]
    inside = np.ones(n, bool)
    inside[: len(embedded)] = embedded["in_catalogue"].to_numpy()
    return pa.table(
        {
            "item_id": pa.chunked_array(embedded["item_id"].chunks + rejected["item_id"].chunks),
            "category": category,
            "has_image": np.arange(n) < len(embedded),
            "in_scope": scope,
            "in_catalogue": inside,
            "cluster_id": cluster,
            "centre_distance": distance,
            "encoder_id": pa.array([codebook.info.encoder_id] * n, pa.string()),
            "codebook_id": pa.array([codebook.info.codebook_id] * n, pa.string()),
            "embedding": tables.list_column(vectors, pa.list_(pa.float32())),
        }
    )


def count_features(rows: pa.Table) -> dict[str, int]:
    cluster = rows["cluster_id"].to_numpy()
    return {
        "items": len(rows),
        "items_with_cluster": int((cluster > 0).sum()),
        "items_out_of_scope": len(rows) - (pc.sum(rows["in_scope"]).as_py() or 0),
    }


# ---- Transforms ----------------------------------------------------------------------------


class AssignShard(beam.DoFn):
    """A shard number → one part of `item_features`."""

    _loaded = Shared()  # one set of centres per worker process

    def __init__(self, job: FeaturesJob):
        self._job, self.staging = job, job.staging

    @tables.refusing
    def process(self, shard: int) -> None:
        job = self._job
        folder = os.path.join(job.staging, ITEM_FEATURES.name)
        if tables.has_part(folder, shard, job.shards):
            return
        embedded = job.embeddings.read_shard(
            shard, job.shards, "item_id", ["item_id", "embedding", "category", "in_catalogue"]
        )
        rejected = job.rejects.read_shard(shard, job.shards, "item_id", ["item_id", "category"])
        codebook = self._loaded.acquire(
            lambda: load_codebook(job.codebook_folder), tag=job.codebook_folder
        )
        rows = features_of(embedded, rejected, codebook, job.categories)
        tables.write_part(
            folder, ITEM_FEATURES, job.schema, rows, shard, job.shards, count_features(rows)
        )


# ---- The job -------------------------------------------------------------------------------


def define_item_features(root: beam.Pipeline, job: FeaturesJob) -> None:
    """Writes `item_features` below `job.staging`, one part per item shard."""
    _ = (
        root
        | "Shards" >> beam.Create(range(job.shards))
        | "SpreadShards" >> beam.Reshuffle()
        | "AssignShard" >> beam.ParDo(AssignShard(job))
    )
