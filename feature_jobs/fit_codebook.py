"""FIT-CODEBOOK: k-means over a sample of one day's in-scope embeddings. Occasional, never nightly.

In: a published `item_embeddings` partition. Out: files with a sample of it, and of that a codebook,
which one machine fits. The sample is chosen by a hash
of the item ID, so that it depends neither on the order of files nor on the number of workers.
"""

import os
from dataclasses import dataclass

import apache_beam as beam
import faiss
import numpy as np
import pyarrow as pa

from feature_jobs import hashing, tables
from feature_jobs.codebook import Codebook, CodebookInfo, codebook_id, nearest_centre
from feature_jobs.schemas import EMBEDDING_DIM, DataContractError, OperatorError

_SAMPLE_SEED = 1  # of the hash: independent of the one that shards are made with
_ITERATIONS = 25
_POINTS_PER_CLUSTER = 256  # more changes k-means centres little (faiss's own default)


@dataclass(frozen=True)
class SampleJob:
    """`fraction` of the in-scope catalogue items is drawn; `categories` None means all."""

    embeddings: tables.Partition
    categories: tuple[str, ...] | None
    fraction: float
    staging: str


# ---- Pure functions ------------------------------------------------------------------------


def count_in_scope(embeddings: tables.Partition, categories: tuple[str, ...] | None) -> int:
    """How many items there are to fit on; reads two narrow columns, file by file."""
    total = 0
    for path in embeddings.paths:
        rows = tables.read_parquet(path, ["category", "in_catalogue"])
        total += int(_fitted_on(rows, categories).sum())
    return total


def _fitted_on(rows: pa.Table, categories: tuple[str, ...] | None) -> np.ndarray:
    return tables.in_scope(rows["category"], categories) & rows["in_catalogue"].to_numpy()


def sample_fraction(items: int, clusters: int) -> float:
    return min(1.0, clusters * _POINTS_PER_CLUSTER / max(1, items))


def draw_sample(rows: pa.Table, categories: tuple[str, ...] | None, fraction: float) -> pa.Table:
    """The rows of `item_embeddings` to fit on: in the catalogue, in scope, and chosen by hash."""
    chosen = hashing.hash_ids(rows["item_id"], _SAMPLE_SEED) <= np.uint64(fraction * (2**64 - 1025))
    wanted = _fitted_on(rows, categories)
    return rows.filter(pa.array(wanted & chosen)).select(["item_id", "embedding"])


def check_sample(points: np.ndarray, clusters: int) -> None:
    """Raises DataContractError for rows that are no unit vectors, OperatorError for too few."""
    norms = np.linalg.norm(points, axis=1)
    bad = int((~(np.abs(norms - 1) < 1e-3)).sum())  # written so that NaN counts as bad
    if bad:
        raise DataContractError(
            f"{bad:,} of {len(points):,} sampled embeddings are not finite unit vectors; centres "
            "fitted on them would be meaningless. Run `courier embed` for this ds again."
        )
    distinct = len(np.unique(points, axis=0))
    if distinct < clusters:
        raise OperatorError(
            f"{clusters:,} clusters were asked for, but the in-scope items of this ds have only "
            f"{distinct:,} distinct embeddings ({len(points):,} items), so that clusters would be "
            f"empty. Ask for at most {distinct:,}, or fit on a larger catalogue."
        )


def fit(points: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """Lloyd's k-means of `points` float32 [n, 256] by faiss: centres float32 [clusters, 256].

    Deterministic for a seed and a number of threads.
    """
    kmeans = faiss.Kmeans(
        EMBEDDING_DIM, clusters, niter=_ITERATIONS, seed=seed, gpu=faiss.get_num_gpus() > 0,
        min_points_per_centroid=1, max_points_per_centroid=len(points),
    )  # fmt: skip
    kmeans.train(np.ascontiguousarray(points, np.float32))
    return np.array(kmeans.centroids).reshape(clusters, EMBEDDING_DIM)


def make_codebook(
    sample: pa.Table, clusters: int, seed: int, name: str, encoder_id: str, ds: str
) -> Codebook:
    """Fits `sample` (item_id, embedding) and numbers the centres 1..clusters.

    Raises what `check_sample` raises.
    """
    sample = sample.sort_by("item_id")
    points = tables.embedding_matrix(sample["embedding"])
    check_sample(points, clusters)
    centres = fit(points, clusters, seed)
    nearest, distance = nearest_centre(centres, points)
    numbers = np.arange(1, clusters + 1, dtype=np.int32)
    info = CodebookInfo(
        codebook_id=codebook_id(name, centres, numbers, encoder_id),
        encoder_id=encoder_id,
        parent=None,
        clusters=clusters,
        max_id=clusters,
        algorithm="lloyd",
        seed=seed,
        iterations=_ITERATIONS,
        sample_items=len(points),
        sample_fingerprint=f"{int(np.bitwise_xor.reduce(hashing.hash_ids(sample['item_id']))):016x}",
        objective=float((distance**2).mean()),
        sizes=tuple(np.bincount(nearest, minlength=clusters).tolist()),
        data_start_ds=ds,
        data_end_ds=ds,
    )
    return Codebook(info, centres, numbers)


# ---- Transforms ----------------------------------------------------------------------------


class SamplePart(beam.DoFn):
    """A file of `item_embeddings` → a file with the sample of its rows."""

    def __init__(self, job: SampleJob):
        self._job = job

    def process(self, path: str) -> None:
        job = self._job
        rows = tables.read_parquet(path, ["item_id", "embedding", "category", "in_catalogue"])
        sample = draw_sample(rows, job.categories, job.fraction)
        tables.write_parquet(os.path.join(job.staging, os.path.basename(path)), sample)


# ---- The job -------------------------------------------------------------------------------


def define_sample(root: beam.Pipeline, job: SampleJob) -> None:
    """Writes the sample of each part of `job.embeddings` as a file of the same name."""
    _ = (
        root
        | "Parts" >> beam.Create(job.embeddings.paths)
        | "SpreadParts" >> beam.Reshuffle()
        | "SamplePart" >> beam.ParDo(SamplePart(job))
    )


def read_sample(job: SampleJob) -> pa.Table:
    """All sampled rows: at most a few hundred for each cluster, so one machine holds them."""
    paths = [os.path.join(job.staging, os.path.basename(path)) for path in job.embeddings.paths]
    return pa.concat_tables(tables.read_parquet(path) for path in paths)
