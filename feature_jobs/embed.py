"""EMBED: one embedding, or one reject, for every item of the catalogue.

In: the catalogue of ds, the images, an encoder package, and the previous partition of our own
tables. Out: `item_embeddings` and `item_rejects`.

The law: in-catalogue rows of `item_embeddings` + rows of `item_rejects` = the catalogue, each item
once. An image is read only when its file, the image roots or the encoder may have changed since the
previous partition, and embedded only when its bytes or the encoder did; rejects are tried every
night. An item that left the catalogue keeps its
embedding for `window_days`, since histories still hold it.

Flow: catalogue rows → item shards → plan (what is unchanged, what must be read) → chunks of images
→ embeddings in chunk files → each shard is put together from its plan, the previous partition and
its chunk files. Chunk files also are what a killed run does not do again.
"""

import datetime as dt
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from apache_beam.utils.shared import Shared

from courier_model import encoder as encoders
from courier_model.image_files import Image, Rejected, locate, read_image
from courier_model.images import BadImage
from feature_jobs import storage, tables
from feature_jobs.histories import every_shard
from feature_jobs.inputs import CATALOGUE_COLUMNS, RowGroup, Source, check_unique, read_rows
from feature_jobs.schemas import ITEM_EMBEDDINGS, ITEM_REJECTS, TIMESTAMP

_READERS = 2 * (os.cpu_count() or 1)  # reading waits on the disk, decoding on a core
_IMAGE_COLUMNS = ("image_generation", "image_size", "image_mtime", "image_sha256")


@dataclass(frozen=True)
class EmbedJob:
    """All that the workers need to know. `previous_*` is the latest partition before ds, if any.

    `reuse` says whether the previous embeddings came from the same encoder, `same_roots` whether
    an address meant the same file then.
    """

    ds: dt.date
    shards: int
    embeddings_schema: pa.Schema
    rejects_schema: pa.Schema
    encoder_folder: str
    image_roots: tuple[str, ...]
    batch_size: int
    chunk_items: int
    window_days: int
    previous_embeddings: tables.Partition | None
    previous_rejects: tables.Partition | None
    reuse: bool
    same_roots: bool
    staging: str

    def folder(self, table: str) -> str:
        return os.path.join(self.staging, table)

    def is_done(self, shard: int) -> bool:
        names = (ITEM_EMBEDDINGS.name, ITEM_REJECTS.name)
        return all(tables.has_part(self.folder(name), shard, self.shards) for name in names)

    def previous(self, shard: int, without: Sequence[str] = ()) -> pa.Table:
        """The previous embeddings of a shard's hash range; empty where there were none."""
        columns = [name for name in self.embeddings_schema.names if name not in without]
        if self.previous_embeddings is None:
            return tables.empty_rows(self.embeddings_schema).select(columns)
        return self.previous_embeddings.read_shard(shard, self.shards, "item_id", columns)

    def plan_path(self, shard: int) -> str:
        return os.path.join(self.staging, "plan", tables.part_name(shard, self.shards) + ".parquet")


# ---- Pure functions: the plan --------------------------------------------------------------


def former_items(
    previous: pa.Table, catalogue_ids: pa.ChunkedArray, ds: dt.date, window_days: int
) -> pa.Table:
    """Rows of `previous` that left the catalogue within `window_days`, dated when they left."""
    gone = pc.invert(pc.is_in(previous["item_id"], value_set=catalogue_ids.combine_chunks()))
    rows = previous.filter(gone)
    left = pc.fill_null(rows["left_catalogue_ds"], pa.scalar(ds, pa.date32()))
    rows = rows.set_column(rows.column_names.index("left_catalogue_ds"), "left_catalogue_ds", left)
    oldest = pa.scalar(ds - dt.timedelta(days=window_days), pa.date32())
    return rows.filter(pc.greater(left, oldest))


def plan_shard(
    catalogue: pa.Table, previous: pa.Table, ds: dt.date, window_days: int
) -> pa.Table:  # fmt: skip
    """The items of a shard: its catalogue rows, then kept former items.

    Columns of the catalogue, `in_catalogue`, `left_catalogue_ds` and `previous_row`, the item's row
    in `previous` (null without one). Raises DataContractError for a duplicate item.
    """
    catalogue = catalogue.sort_by("item_id")
    check_unique(catalogue["item_id"], ds)
    former = former_items(previous, catalogue["item_id"], ds, window_days)
    columns = list(CATALOGUE_COLUMNS)
    items = pa.concat_tables([catalogue.select(columns), former.select(columns)])
    inside = np.arange(len(items)) < len(catalogue)
    left = pa.concat_arrays(
        [pa.nulls(len(catalogue), pa.date32()), former["left_catalogue_ds"].combine_chunks()]
    )
    previous_row = pc.index_in(items["item_id"], value_set=previous["item_id"].combine_chunks())
    return (
        items.append_column("in_catalogue", pa.array(inside))
        .append_column("left_catalogue_ds", left)
        .append_column("previous_row", previous_row)
    )


def unchanged(items: pa.Table, previous: pa.Table, roots: Sequence[str]) -> np.ndarray:
    """Which items' files cannot have changed since `previous`, told without reading; bool [n]."""
    before = previous.select(["image_uri", *_IMAGE_COLUMNS]).take(items["previous_row"])
    same_uri = pc.fill_null(pc.equal(before["image_uri"], items["image_uri"]), False)
    rows = np.flatnonzero(same_uri.to_numpy(zero_copy_only=False))
    out = np.zeros(len(items), bool)
    out[rows] = have_versions(before.take(pa.array(rows)), roots)
    return out


def have_versions(images: pa.Table, roots: Sequence[str]) -> np.ndarray:
    """Which files still have the versions that `images` says, by its image columns; bool [n]."""
    versions = zip(
        images["image_size"].to_pylist(),
        images["image_mtime"].cast(pa.int64()).to_pylist(),
        images["image_generation"].to_pylist(),
        strict=True,
    )
    with ThreadPoolExecutor(_READERS) as pool:
        same = pool.map(
            lambda uri, version: _has_version(uri, version, roots),
            images["image_uri"].to_pylist(),
            versions,
        )
        return np.fromiter(same, bool, len(images))


def _has_version(uri: str, version: tuple[int | None, ...], roots: Sequence[str]) -> bool:
    try:
        return storage.stat(locate(uri, roots)).version == version
    except (BadImage, OSError):
        return False  # it is read again, and rejected or raised with its reason there


# ---- Pure functions: images ----------------------------------------------------------------


def embed_images(
    rows: pa.Table,
    encoder: encoders.ImageEncoder,
    roots: Sequence[str],
    batch_size: int,
    done: Callable[[int, int], None] = lambda _images, _rejects: None,
) -> pa.Table:
    """Reads and embeds the images of `rows` (item_id, image_uri, known_sha256).

    One row each: image columns and `embedding` (null for the bytes already known), or stage,
    reason and message of a reject. Reading and decoding run ahead of the forward pass. `done` is
    told after each batch how many images were dealt with so far, and how many of them rejected.
    """
    device = encoders.choose_device()
    precision = encoders.choose_precision(device)
    uris, known = rows["image_uri"].to_pylist(), rows["known_sha256"].to_pylist()
    images: list[Image | Rejected] = []
    embeddings: list[list[float] | np.ndarray | None] = []
    with ThreadPoolExecutor(_READERS) as pool:
        reading = pool.map(
            lambda uri, sha: read_image(uri, sha, roots, encoder.preprocessing), uris, known
        )
        while batch := list(islice(reading, batch_size)):
            pixels = [i.pixels for i in batch if isinstance(i, Image) and i.pixels is not None]
            vectors = iter(
                encoders.embed(encoder, np.stack(pixels), batch_size, device, precision)
                if pixels
                else ()
            )
            embeddings += [
                next(vectors) if isinstance(i, Image) and i.pixels is not None else None
                for i in batch
            ]
            images += [_without_pixels(image) for image in batch]
            done(len(images), sum(isinstance(image, Rejected) for image in images))
    return _results(rows["item_id"], rows["image_uri"], images, embeddings)


def _without_pixels(image: Image | Rejected) -> Image | Rejected:
    return Image(image.file, image.sha256, None) if isinstance(image, Image) else image


def _results(
    item_ids: pa.ChunkedArray,
    image_uris: pa.ChunkedArray,
    images: Sequence[Image | Rejected],
    embeddings: Sequence[Any],
) -> pa.Table:
    def of_image(get: Any) -> list[Any]:
        return [get(i) if isinstance(i, Image) else None for i in images]

    def of_reject(name: str) -> pa.Array:
        return pa.array([getattr(i, name, None) for i in images], pa.string())

    return pa.table(
        {
            "item_id": item_ids,
            "image_uri": image_uris,
            "embedding": pa.array(embeddings, pa.list_(pa.float32())),
            "image_generation": pa.array(of_image(lambda i: i.file.generation), pa.int64()),
            "image_size": pa.array(of_image(lambda i: i.file.size), pa.int64()),
            "image_mtime": pa.array(of_image(lambda i: i.file.mtime_us), pa.int64()).cast(
                TIMESTAMP
            ),
            "image_sha256": pa.array(of_image(lambda i: i.sha256), pa.string()),
            "stage": of_reject("stage"),
            "reason": of_reject("reason"),
            "message": of_reject("message"),
        }
    )


# ---- Pure functions: putting a shard together ------------------------------------------------


def assemble_embeddings(plan: pa.Table, previous: pa.Table, results: pa.Table) -> pa.Table:
    """`item_embeddings` of a shard: planned items with an embedding, old or new.

    `plan` has the columns of `plan_shard` and `unchanged`; `results` those of `embed_images`, one
    row for each planned item that is not `unchanged`.
    """
    result_row = pc.index_in(plan["item_id"], value_set=results["item_id"].combine_chunks())
    before = previous.take(plan["previous_row"])
    after = results.take(result_row)
    unchanged = plan["unchanged"]
    columns = {
        name: plan[name] for name in (*CATALOGUE_COLUMNS, "in_catalogue", "left_catalogue_ds")
    }
    for name in _IMAGE_COLUMNS:
        columns[name] = pc.if_else(unchanged, before[name], after[name])
    # An embedding is taken over when the file is unchanged, or was read and held the known bytes.
    columns["embedding"] = pa.chunked_array(
        [pc.coalesce(after["embedding"].combine_chunks(), before["embedding"].combine_chunks())]
    )
    rejected = pc.is_valid(after["reason"])
    return pa.table(columns).filter(pc.invert(rejected))


def assemble_rejects(
    plan: pa.Table, previous: pa.Table, results: pa.Table, ds: dt.date
) -> pa.Table:
    """`item_rejects` of a shard: the catalogue items that `results` rejects, with their past."""
    plan = plan.filter(plan["in_catalogue"])
    rows = results.take(pc.index_in(plan["item_id"], value_set=results["item_id"].combine_chunks()))
    rejected = pc.is_valid(rows["reason"])
    plan, rows = plan.filter(rejected), rows.filter(rejected)
    before = previous.take(
        pc.index_in(plan["item_id"], value_set=previous["item_id"].combine_chunks())
    )
    today = pa.scalar(ds, pa.date32())
    return pa.table(
        {
            **{name: plan[name] for name in CATALOGUE_COLUMNS},
            **{name: rows[name] for name in ("stage", "reason", "message")},
            "attempts": pc.add(pc.fill_null(before["attempts"], 0), 1),
            "first_ds": pc.fill_null(before["first_ds"], today),
            "last_ds": pa.array([ds] * len(plan), pa.date32()),
            "next_ds": pa.array([ds + dt.timedelta(days=1)] * len(plan), pa.date32()),
        }
    )


def count_shard(
    plan: pa.Table, results: pa.Table, embeddings: pa.Table, rejects: pa.Table
) -> dict[str, int]:
    """What became of the items of a shard."""
    reasons = pc.value_counts(rejects["reason"])
    return {
        "catalogue_items": pc.sum(plan["in_catalogue"]).as_py() or 0,
        "former_items": len(embeddings) - (pc.sum(embeddings["in_catalogue"]).as_py() or 0),
        "images_unchanged": pc.sum(plan["unchanged"]).as_py() or 0,
        "images_read": len(results),
        "images_embedded": len(results) - results["embedding"].null_count,
        **{f"rejected_{r['values']}": r["counts"].as_py() for r in reasons},
    }


# ---- Transforms ----------------------------------------------------------------------------


class ReadCatalogue(beam.DoFn):
    """A row group of the catalogue → its rows by item shard."""

    def __init__(self, job: EmbedJob):
        self._job, self.staging = job, job.staging

    @tables.refusing
    def process(self, group: RowGroup) -> Iterator[tuple[int, bytes]]:
        rows = read_rows(group, CATALOGUE_COLUMNS)
        return tables.split_by_shard(rows, "item_id", self._job.shards)


class PlanShard(beam.DoFn):
    """All catalogue rows of a shard → its plan, as a file, and the chunks of images to read."""

    def __init__(self, job: EmbedJob):
        self._job, self.staging = job, job.staging

    @tables.refusing
    def process(self, element: tuple[int, Iterable[bytes]]) -> Iterator[tuple[int, bytes]]:
        job, (shard, chunks) = self._job, element
        if job.is_done(shard):
            return
        nothing = tables.empty_rows(job.embeddings_schema).select(CATALOGUE_COLUMNS)
        catalogue = tables.from_ipc(chunks, nothing)
        previous = job.previous(shard, without=["embedding"])
        plan = plan_shard(catalogue, previous, job.ds, job.window_days)
        # A former item's file is often deleted with it: its embedding stays, unlooked at.
        same = ~plan["in_catalogue"].to_numpy()
        if job.same_roots:
            same = same | unchanged(plan, previous, job.image_roots)
        same = same & job.reuse
        plan = plan.append_column("unchanged", pa.array(same))
        tables.write_parquet(job.plan_path(shard), plan)
        tables.Heartbeat(job.staging, f"plan-{shard:05d}").end(total=int((~same).sum()))
        known = previous["image_sha256"].take(plan["previous_row"])
        to_read = plan.select(["item_id", "image_uri"]).append_column(
            "known_sha256", known if job.reuse else pa.nulls(len(plan), pa.string())
        )
        to_read = to_read.filter(pa.array(~same))
        for at in range(0, len(to_read), job.chunk_items):
            yield shard, tables.to_ipc(to_read.slice(at, job.chunk_items))


class EmbedChunk(beam.DoFn):
    """A chunk of images to read → the path of a file with what became of each.

    The file's name is a digest of the chunk, so that a run which was killed finds it again. Its
    rejects are tried once more then: a night that was refused for its rejects may have been mended.
    """

    _loaded = Shared()  # one encoder per worker process, whatever the number of threads

    def __init__(self, job: EmbedJob):
        self._job, self.staging = job, job.staging

    @tables.refusing
    def process(self, element: tuple[int, bytes]) -> Iterator[tuple[int, bytes]]:
        shard, chunk = element
        name = f"{shard:05d}-{hashlib.sha256(chunk).hexdigest()[:16]}"
        path = os.path.join(self._job.staging, "chunks", name + ".parquet")
        rows = tables.from_ipc([chunk], pa.table({}))
        kept = self._kept(path, rows["item_id"])
        done = pc.is_in(rows["item_id"], value_set=kept["item_id"].combine_chunks())
        todo = rows.filter(pc.invert(done))
        heartbeat = tables.Heartbeat(self._job.staging, f"chunk-{name}")
        heartbeat.end(done=len(kept))
        if len(todo):
            folder = self._job.encoder_folder
            encoder = self._loaded.acquire(lambda: encoders.load_encoder(folder), tag=folder)
            results = embed_images(
                todo, encoder, self._job.image_roots, self._job.batch_size,
                lambda n, rejects: heartbeat.beat(done=len(kept) + n, rejects=rejects),
            )  # fmt: skip
            tables.write_parquet(path, pa.concat_tables([kept, results]))
            heartbeat.end()
        yield shard, path.encode()

    def _kept(self, path: str, item_ids: pa.ChunkedArray) -> pa.Table:
        """What an earlier run embedded of this chunk, as far as the files are still the same."""
        if not storage.exists(path):
            return _results(item_ids[:0], pa.chunked_array([[]], pa.string()), [], [])
        results = tables.read_parquet(path)
        results = results.filter(pc.is_null(results["reason"]))
        return results.filter(pa.array(have_versions(results, self._job.image_roots)))


class AssembleShard(beam.DoFn):
    """The chunk files of a shard → its parts of `item_embeddings` and `item_rejects`."""

    def __init__(self, job: EmbedJob):
        self._job, self.staging = job, job.staging

    @tables.refusing
    def process(self, element: tuple[int, Iterable[bytes]]) -> None:
        job, (shard, paths) = self._job, element
        if job.is_done(shard):
            return
        plan = tables.read_parquet(job.plan_path(shard))
        chunks = [tables.read_parquet(path.decode()) for path in sorted(paths) if path]
        nothing = _results(plan["item_id"][:0], plan["image_uri"][:0], [], [])
        results = pa.concat_tables([nothing, *chunks])
        embeddings = assemble_embeddings(plan, job.previous(shard), results)
        rejects = assemble_rejects(plan, self._previous_rejects(shard), results, job.ds)
        tables.write_part(
            job.folder(ITEM_EMBEDDINGS.name), ITEM_EMBEDDINGS, job.embeddings_schema,
            embeddings, shard, job.shards, count_shard(plan, results, embeddings, rejects),
        )  # fmt: skip
        tables.write_part(
            job.folder(ITEM_REJECTS.name), ITEM_REJECTS, job.rejects_schema,
            rejects, shard, job.shards,
        )  # fmt: skip

    def _previous_rejects(self, shard: int) -> pa.Table:
        if self._job.previous_rejects is None:
            return tables.empty_rows(self._job.rejects_schema)
        return self._job.previous_rejects.read_shard(shard, self._job.shards, "item_id")


# ---- The job -------------------------------------------------------------------------------


def define_embed(root: beam.Pipeline, catalogue: Source, job: EmbedJob) -> None:
    """Writes `item_embeddings` and `item_rejects` below `job.staging`, one part per item shard."""
    shards = every_shard(root, job.shards)
    chunks = (
        (
            root
            | "CatalogueGroups" >> beam.Create(catalogue.groups())
            | "SpreadCatalogueGroups" >> beam.Reshuffle()
            | "ReadCatalogue" >> beam.ParDo(ReadCatalogue(job)),
            shards,
        )
        | "CatalogueAndShards" >> beam.Flatten()
        | "CatalogueByShard" >> beam.GroupByKey()
        | "PlanShard" >> beam.ParDo(PlanShard(job))
        | "SpreadChunks" >> beam.Reshuffle()
        | "EmbedChunk" >> beam.ParDo(EmbedChunk(job))
    )
    _ = (
        (chunks, shards)
        | "ChunksAndShards" >> beam.Flatten()
        | "ChunksByShard" >> beam.GroupByKey()
        | "AssembleShard" >> beam.ParDo(AssembleShard(job))
    )
