"""Computes what a backbone makes of a sample of a catalogue's images: its pooled features.

An encoder's projection and its centre are fitted on them.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from apache_beam.utils.shared import Shared

from courier_model.encoder import PACKAGE
from courier_model.images import Preprocessing
from courier_model.inference import Embedder, embed_images
from feature_jobs.inputs import RowGroup, Source, read_rows
from feature_jobs.schemas import DataContractError
from feature_jobs.store import arrays, documents, files, hashing, partitions, worker_notes
from feature_jobs.store.encoder_info import in_scope
from feature_jobs.store.every_shard import check_all_came
from feature_jobs.store.faults import until_seen
from feature_jobs.store.pieces import Piece, read_pieces, write_pieces

_SEED = 7  # of the items' hashes, by which they are drawn
_READERS = 16
_DRAWN, _LOOKED_AT = "drawn", "looked_at"

Named = tuple[str, int]  # a row group or a file, and how many images are of it


@dataclass(frozen=True)
class FeaturesJob:
    """Holds all that the workers need to know; a `share` of the items is drawn.

    `categories` None means all. `encoder_folder` holds the encoder whose head is left out.
    """

    encoder_folder: str
    preprocessing: Preprocessing
    image_roots: tuple[str, ...]
    categories: tuple[str, ...] | None
    share: float
    device: str
    precision: str
    batch_size: int
    chunk_items: int
    staging: str


class SampleImages(beam.DoFn):
    """Turns a row group of a catalogue into chunks of the images to look at.

    How many there are goes on as output `drawn`.
    """

    def __init__(self, job: FeaturesJob):
        self._job, self.staging = job, job.staging
        self._heartbeat = worker_notes.Heartbeat(job.staging)

    @worker_notes.refusing
    def process(self, group: RowGroup) -> Iterator[Any]:
        job, rows = self._job, read_rows(group, ["item_id", "image_uri", "category"])
        wanted = hashing.drawn(rows["item_id"], job.share, _SEED)
        wanted &= in_scope(rows["category"], job.categories)
        wanted &= pc.is_valid(rows["image_uri"]).to_numpy()
        images = rows.select(["item_id", "image_uri"]).filter(pa.array(wanted))
        images = images.append_column("known_sha256", pa.nulls(len(images), pa.string()))
        name = documents.digest([group.path, group.index])[:16]
        self._heartbeat.begin(name)
        self._heartbeat.add(total=len(images))
        self._heartbeat.write()
        chunk = np.arange(len(images)) // job.chunk_items
        for _, piece in write_pieces(os.path.join(job.staging, "images", name), images, chunk):
            yield piece
        yield beam.pvalue.TaggedOutput(_DRAWN, (0, (name, len(images))))


class ComputeFeatures(beam.DoFn):
    """Turns chunks of images into a file of the features of those that are good.

    Its columns are item_id and `embedding`, float32 [features]. Yields its name, with how many
    images were looked at.
    """

    _shared = Shared()  # one backbone per worker process

    def __init__(self, job: FeaturesJob):
        self._job, self.staging = job, job.staging
        self._heartbeat = worker_notes.Heartbeat(job.staging)

    @worker_notes.refusing
    def process(self, pieces: list[Piece]) -> Iterator[tuple[int, Named]]:
        job = self._job
        embedder = self._shared.acquire(self._embedder, job.encoder_folder)
        name = f"{documents.digest(sorted(pieces))[:16]}.parquet"
        self._heartbeat.begin(name)
        found = embed_images(
            read_pieces(pieces, pa.table({})), embedder.embed, job.preprocessing,
            job.image_roots, job.batch_size, self._heartbeat.add, embedder.passes(),
        )  # fmt: skip
        self._heartbeat.write()
        good = found.select(["item_id", "embedding"]).filter(pc.is_valid(found["embedding"]))
        partitions.write_parquet(os.path.join(job.staging, "features", name), good)
        yield 0, (name, sum(piece.rows for piece in pieces))

    def _embedder(self) -> Embedder:
        job = self._job
        for path in [os.path.join(job.encoder_folder, name) for name in PACKAGE]:
            until_seen(path, partial(_open_once, path))  # it was written for this very job
        return Embedder(job.encoder_folder, job.batch_size, job.device, job.precision, pooled=True)


def _open_once(path: str) -> None:
    files.open_input(path).close()


class ListFeatures(beam.DoFn):
    """Writes which files of features there are, if any, once all drawn images were looked at."""

    def __init__(self, staging: str):
        self.staging = staging

    @worker_notes.refusing
    def process(self, element: tuple[int, Mapping[str, Iterable[Named]]]) -> None:
        drawn, looked_at = (dict(element[1][name]) for name in (_DRAWN, _LOOKED_AT))
        check_all_came("sampled images", sum(looked_at.values()), sum(drawn.values()))
        documents.write_json(_list_path(self.staging), sorted(looked_at))


def define_features(root: beam.Pipeline, catalogue: Source, job: FeaturesJob) -> None:
    """Writes the features of a sample of the catalogue's images below `job.staging`."""
    sampled = (
        root
        | "CatalogueGroups" >> beam.Create(catalogue.groups())
        | "SampleImages" >> beam.ParDo(SampleImages(job)).with_outputs(_DRAWN, main="images")
    )
    looked_at = (
        sampled.images
        | "SpreadChunks" >> beam.Reshuffle()
        # Of a small row group few images are drawn, and the backbone pads what it gets to a batch.
        | "FillChunks"
        >> beam.BatchElements(job.chunk_items, job.chunk_items, element_size_fn=attrgetter("rows"))
        | "ComputeFeatures" >> beam.ParDo(ComputeFeatures(job))
    )
    _ = (
        {_DRAWN: sampled[_DRAWN], _LOOKED_AT: looked_at}
        | "AllFiles" >> beam.CoGroupByKey()
        | "ListFeatures" >> beam.ParDo(ListFeatures(job.staging))
    )


def is_whole(job: FeaturesJob) -> bool:
    """Returns whether the job has told that it is done; raises a worker's CourierError."""
    if errors := worker_notes.refused(job.staging):
        raise errors[0]
    return files.exists(_list_path(job.staging))


def read_features(job: FeaturesJob) -> np.ndarray:
    """Reads the features of all sampled images by the hash of their items, float32 [n, features].

    Raises DataContractError where there are none.
    """
    path = _list_path(job.staging)

    def read(name: str) -> pa.Table:
        at = os.path.join(job.staging, "features", name)
        return until_seen(at, lambda: partitions.read_parquet(at))

    with ThreadPoolExecutor(_READERS) as pool:
        # A catalogue without a row group has none to list.
        found = list(pool.map(read, documents.read_json(path) if files.exists(path) else []))
    if not sum(map(len, found)):
        raise DataContractError(
            "Not one of the sampled catalogue items has an image that can be read, so that nothing "
            "can be fitted on them. Check catalogue.image_roots in the settings, and that the "
            "catalogue of that day has image addresses and items of the --category given."
        )
    rows = pa.concat_tables(found)
    order = np.argsort(hashing.hash_ids(rows["item_id"], _SEED))
    width = len(rows["embedding"][0])
    return arrays.matrix(rows["embedding"], width)[order]


def _list_path(staging: str) -> str:
    return os.path.join(staging, "features.json")
