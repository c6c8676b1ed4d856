"""EMBED makes one embedding, or one reject, for every item of the catalogue.

In: the catalogue of ds, the images, an encoder package, and the previous partition of our own
tables. Out: `item_embeddings` and `item_rejects`.

The law: in-catalogue rows of `item_embeddings` + rows of `item_rejects` = the catalogue, each item
once. An image is read only when its file, the image roots or the encoder may have changed since the
previous partition, and embedded only when its bytes or the encoder did; the same bytes under
several items are embedded once. A reject is tried again after 1, 2, 4, 8 and 16 days, then every
30. An item that left the catalogue keeps its embedding for `window_days`, since histories still
hold it.

Flow: catalogue rows → item shards → plan (what is unchanged, what must be read) → images by size,
so that equal bytes meet → chunks → results, in chunk files → back to the item shards, each put
together from its plan, the previous partition and the results. All rows travel as pieces of files;
chunk files also are what a killed run does not do again.
"""

import datetime as dt
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from apache_beam.ml.inference.base import ModelHandler, RunInference

from courier_model.encoder import choose_device
from courier_model.images import Preprocessing
from courier_model.inference import Embedder, embed_images, results_schema
from feature_jobs.inputs import CATALOGUE_COLUMNS, RowGroup, Source, read_rows
from feature_jobs.items import embed_plan
from feature_jobs.items.embed_plan import VERSION_COLUMNS
from feature_jobs.schemas import ITEM_EMBEDDINGS, ITEM_REJECTS
from feature_jobs.store import arrays, documents, files, hashing, partitions, worker_notes
from feature_jobs.store.every_shard import every_shard
from feature_jobs.store.pieces import Piece, read_all, read_pieces, write_pieces

Keyed = tuple[int, Iterable[Piece | bytes]]  # b"" stands for a shard without any rows
_KEPT = "kept"
_SECONDS = ("io_seconds", "decode_seconds", "forward_seconds")


@dataclass(frozen=True)
class EmbedJob:
    """Holds all that the workers of EMBED need to know.

    `previous_*` is the latest partition before ds, if any. `reuse` says whether the previous
    embeddings are those that would be made now, `same_roots` whether an address meant the same file
    then, `full` that all images are to be embedded again. `chunks` is the folder of chunk files,
    which other runs with the same encoder share.
    """

    ds: dt.date
    shards: int
    embeddings_schema: pa.Schema
    rejects_schema: pa.Schema
    encoder_folder: str
    preprocessing: Preprocessing
    image_roots: tuple[str, ...]
    device: str
    precision: str
    batch_size: int
    chunk_items: int
    window_days: int
    previous_embeddings: partitions.Partition | None
    previous_rejects: partitions.Partition | None
    reuse: bool
    same_roots: bool
    full: bool
    staging: str
    chunks: str

    def path(self, step: str, name: str) -> str:
        return os.path.join(self.staging, step, name)

    def is_done(self, shard: int) -> bool:
        names = (ITEM_EMBEDDINGS.name, ITEM_REJECTS.name)
        return all(
            partitions.has_part(os.path.join(self.staging, name), shard, self.shards)
            for name in names
        )

    def previous_embeddings_of(self, shard: int, without: Sequence[str] = ()) -> pa.Table:
        """Returns the previous embeddings of a shard's hash range; empty where there were none."""
        columns = [name for name in self.embeddings_schema.names if name not in without]
        return _shard_of(
            self.previous_embeddings, self.embeddings_schema, shard, self.shards, columns
        )

    def previous_rejects_of(self, shard: int) -> pa.Table:
        """Returns the previous rejects of a shard's hash range; empty where there were none."""
        names = self.rejects_schema.names
        return _shard_of(self.previous_rejects, self.rejects_schema, shard, self.shards, names)

    def plan_path(self, shard: int) -> str:
        return self.path("plan", partitions.part_name(shard, self.shards) + ".parquet")


def _shard_of(
    partition: partitions.Partition | None,
    schema: pa.Schema,
    shard: int,
    shards: int,
    columns: list[str],
) -> pa.Table:
    if partition is None:
        return arrays.empty_rows(schema).select(columns)
    return partition.read_shard(shard, shards, "item_id", columns)


# ---- Pure functions ------------------------------------------------------------------------


def still_valid(results: pa.Table, images: pa.Table) -> pa.Table:
    """Returns the `results` of an earlier run that `embed_images` would make of `images` again.

    Item, address and version are unchanged. A row without an embedding, since its bytes were known,
    counts only while those bytes are still the known ones. Rejects never count: they are tried
    again, since someone may have mended the file.
    """
    results = results.filter(pc.is_null(results["reason"]))
    now = images.take(embed_plan.row_of(results, images))
    same = pc.fill_null(pc.equal(results["image_uri"], now["image_uri"]), False).to_numpy()
    same = same & embed_plan.same_version(results, now)
    known = pc.fill_null(pc.equal(results["image_sha256"], now["known_sha256"]), False)
    return results.filter(pa.array(same & pc.or_(pc.is_valid(results["embedding"]), known)))


def assemble_embeddings(plan: pa.Table, previous: pa.Table, results: pa.Table) -> pa.Table:
    """Makes `item_embeddings` of a shard: planned items with an embedding, old or new.

    `plan` has the columns of `embed_plan.plan`; `results` those of `embed_images`, one row for each
    item to read.
    """
    before = previous.take(plan["previous_row"])
    after = results.take(embed_plan.row_of(plan, results))
    is_same = pc.equal(plan["state"], embed_plan.UNCHANGED)
    is_good = pc.and_(pc.is_valid(after["image_sha256"]), pc.is_null(after["reason"]))
    columns = {
        name: plan[name] for name in (*CATALOGUE_COLUMNS, "in_catalogue", "left_catalogue_ds")
    }
    for name in VERSION_COLUMNS:
        columns[name] = pc.if_else(is_same, before[name], after[name])  # as it was when read
    columns["image_sha256"] = pc.if_else(is_same, before["image_sha256"], after["image_sha256"])
    # An embedding is taken over when the file is unchanged, or was read and held the known bytes.
    columns["embedding"] = pa.chunked_array(
        [pc.coalesce(after["embedding"].combine_chunks(), before["embedding"].combine_chunks())]
    )
    return pa.table(columns).filter(pc.or_(is_same, is_good))


def assemble_rejects(
    plan: pa.Table, previous: pa.Table, results: pa.Table, ds: dt.date
) -> pa.Table:
    """Makes `item_rejects` of a shard: the catalogue items without an embedding, with their past.

    An item that was not tried stays as it was in `previous`.
    """
    after = results.take(embed_plan.row_of(plan, results))
    reason = {n: pc.coalesce(plan[n], after[n]) for n in ("stage", "reason", "message")}
    waits = pc.equal(plan["state"], embed_plan.WAITING)
    rejected = pc.and_(pc.or_(waits, pc.is_valid(reason["reason"])), plan["in_catalogue"])
    plan, waits = plan.filter(rejected), waits.filter(rejected)
    before = previous.take(embed_plan.row_of(plan, previous))
    attempts = pc.cast(pc.add(pc.fill_null(before["attempts"], 0), 1), pa.int32())
    today = pa.scalar(ds, pa.date32())
    now = {
        **{name: column.filter(rejected) for name, column in reason.items()},
        "attempts": attempts,
        "first_ds": pc.fill_null(before["first_ds"], today),
        "last_ds": pa.chunked_array([pa.repeat(today, len(plan))]),
        "next_ds": pa.chunked_array([embed_plan.next_ds(ds, attempts.to_numpy())]),
    }
    rows = {name: pc.if_else(waits, before[name], column) for name, column in now.items()}
    return pa.table({**{name: plan[name] for name in CATALOGUE_COLUMNS}, **rows})


def count_shard(
    plan: pa.Table, results: pa.Table, embeddings: pa.Table, rejects: pa.Table
) -> dict[str, int]:
    """Counts what became of the items of a shard."""
    state = {s["values"].as_py(): s["counts"].as_py() for s in pc.value_counts(plan["state"])}
    embedded = pc.sum(results["is_embedded"]).as_py() or 0
    valid = results["reason"].null_count
    return {
        "catalogue_items": pc.sum(plan["in_catalogue"]).as_py() or 0,
        "former_items": len(embeddings) - (pc.sum(embeddings["in_catalogue"]).as_py() or 0),
        "images_unchanged": state.get(embed_plan.UNCHANGED, 0),
        "images_read": pc.sum(results["is_read"]).as_py() or 0,
        "images_embedded": embedded,
        "images_reused": valid - embedded,
        "rejects_waiting": state.get(embed_plan.WAITING, 0),
        **_rejected(rejects["reason"]),
    }


def _rejected(reasons: pa.ChunkedArray) -> dict[str, int]:
    found = pc.value_counts(reasons.drop_null())
    return {f"rejected_{reason['values']}": reason["counts"].as_py() for reason in found}


def work_of(results: pa.Table) -> dict[str, float]:
    """Tells what the results of a shard cost, and on which devices and in which precisions."""
    embedded = results.filter(results["is_embedded"])
    devices = pc.value_counts(embedded["device"])
    return {
        "bytes_read": pc.sum(results["bytes_read"]).as_py() or 0,
        **{name: pc.sum(results[name]).as_py() or 0.0 for name in _SECONDS},
        **{f"embedded_on_{d['values']}": d["counts"].as_py() for d in devices},
    }


# ---- Transforms ----------------------------------------------------------------------------


class ReadCatalogue(beam.DoFn):
    """Turns a row group of the catalogue into its rows by item shard."""

    def __init__(self, job: EmbedJob):
        self._job, self.staging = job, job.staging

    @worker_notes.refusing
    def process(self, group: RowGroup) -> Iterator[tuple[int, Piece]]:
        rows = read_rows(group, CATALOGUE_COLUMNS)
        shard = hashing.shard_of(hashing.hash_ids(rows["item_id"]), self._job.shards)
        name = documents.digest([group.path, group.index])[:16]
        return write_pieces(self._job.path("catalogue", name), rows, shard)


class PlanShard(beam.DoFn):
    """Turns the catalogue rows of a shard into its plan and the images to read.

    The plan is a file; the images go by size.
    """

    def __init__(self, job: EmbedJob):
        self._job, self.staging = job, job.staging
        self._heartbeat = worker_notes.Heartbeat(job.staging)

    @worker_notes.refusing
    def process(self, element: Keyed) -> Iterator[tuple[int, Piece]]:
        job, (shard, pieces) = self._job, element
        if job.is_done(shard):
            return
        nothing = arrays.empty_rows(job.embeddings_schema).select(CATALOGUE_COLUMNS)
        catalogue = read_pieces(pieces, nothing)
        previous = job.previous_embeddings_of(shard, without=["embedding"])
        items = embed_plan.items_of_shard(catalogue, previous, job.ds, job.window_days)
        plan = embed_plan.plan(
            items,
            previous,
            job.previous_rejects_of(shard),
            job.image_roots,
            job.ds,
            job.reuse,
            job.same_roots and not job.full,
        )
        partitions.write_parquet(job.plan_path(shard), plan)
        images = embed_plan.images_to_read(plan, previous, shard, job.reuse and not job.full)
        self._heartbeat.add(total=len(images), **_rejected(plan["reason"]))
        self._heartbeat.write()
        yield from write_pieces(
            job.path("to_read", f"{shard:05d}"), images, embed_plan.bucket_of(images, job.shards)
        )


class CutBucket(beam.DoFn):
    """Turns the images of a bucket into chunks of what is left to do of them.

    What an earlier run did of them goes to the item shards, as output `kept`.
    """

    def __init__(self, job: EmbedJob):
        self._job, self.staging = job, job.staging
        self._heartbeat = worker_notes.Heartbeat(job.staging)

    @worker_notes.refusing
    def process(self, element: Keyed) -> Iterator[Any]:
        job, (bucket, pieces) = self._job, element
        images = read_pieces(pieces, pa.table({}))
        name = f"{bucket:05d}"
        kept = self._kept(bucket, images)
        if kept is not None:
            self._heartbeat.add(done=len(kept))
            done = pc.is_in(images["item_id"], value_set=kept["item_id"].combine_chunks())
            images = images.filter(pc.invert(done))
            for found in write_pieces(job.path("kept", name), kept, kept["shard"].to_numpy()):
                yield beam.pvalue.TaggedOutput(_KEPT, found)
        images, chunk = embed_plan.cut(images, job.chunk_items)
        for _, piece in write_pieces(job.path("chunks_to_do", name), images, chunk):
            yield bucket, piece

    def _kept(self, bucket: int, images: pa.Table) -> pa.Table | None:
        """Returns what earlier runs made of `images` and still holds, each item once, or None."""
        paths = files.find(os.path.join(self._job.chunks, f"{bucket:05d}-*.arrow"))
        if not paths:
            return None
        results = pa.concat_tables(still_valid(read_all(path), images) for path in paths)
        codes = results["item_id"].combine_chunks().dictionary_encode().indices.to_numpy()
        _, first = np.unique(codes, return_index=True)
        return results.take(pa.array(first))


class EmbedChunk(ModelHandler[tuple[int, Piece], tuple[int, Piece], Embedder]):
    """Turns a chunk of images into what became of each, for the item shards.

    Elements are whole chunks, whose images become batches of one shape here: as elements of their
    own they would cost more than their embedding. The encoder is there once in a process, on a GPU
    once for all processes of a worker.
    """

    def __init__(self, job: EmbedJob):
        super().__init__()
        self._job, self.staging = job, job.staging
        self._heartbeat = worker_notes.Heartbeat(job.staging)

    def load_model(self) -> Embedder:
        if self._job.device == "cuda" and choose_device().type != "cuda":
            worker_notes.warn(
                self.staging,
                'embed.device is "cuda" but a worker has no CUDA device that torch can use, so it '
                "embeds on its CPU, many times slower. Check the machine type and drivers of "
                "[beam.embed], or set embed.device to what is there.",
            )
        job = self._job
        return Embedder(job.encoder_folder, job.batch_size, job.device, job.precision)

    def share_model_across_processes(self) -> bool:
        return choose_device(self._job.device).type == "cuda"

    def batch_elements_kwargs(self) -> dict[str, int]:
        return {"min_batch_size": 1, "max_batch_size": 1}

    def run_inference(
        self, batch: Sequence[Any], model: Embedder, inference_args: dict[str, Any] | None = None
    ) -> Iterator[tuple[int, Piece]]:
        for bucket, piece in batch:
            yield from self.embed_chunk((bucket, piece, model))

    @worker_notes.refusing
    def embed_chunk(self, element: tuple[int, Piece, Embedder]) -> Iterator[tuple[int, Piece]]:
        job, (bucket, piece, embedder) = self._job, element
        images = read_pieces([piece], pa.table({}))
        results = embed_images(
            images, embedder.embed, job.preprocessing, job.image_roots, job.batch_size,
            self._heartbeat.add, embedder.passes(),
        )  # fmt: skip
        for name in ("shard", *VERSION_COLUMNS):
            results = results.append_column(name, images[name])
        device = pa.repeat(pa.scalar(embedder.kind_and_precision()), len(results))
        results = results.append_column("device", device)
        path = os.path.join(job.chunks, f"{bucket:05d}")
        yield from write_pieces(path, results, images["shard"].to_numpy())


class AssembleShard(beam.DoFn):
    """Turns the results of a shard into its parts of `item_embeddings` and `item_rejects`."""

    def __init__(self, job: EmbedJob):
        self._job, self.staging = job, job.staging

    @worker_notes.refusing
    def process(self, element: Keyed) -> None:
        job, (shard, pieces) = self._job, element
        if job.is_done(shard):
            return
        plan = partitions.read_parquet(job.plan_path(shard))
        results = read_pieces(pieces, self._no_results())
        embeddings = assemble_embeddings(plan, job.previous_embeddings_of(shard), results)
        rejects = assemble_rejects(plan, job.previous_rejects_of(shard), results, job.ds)
        partitions.write_part(
            os.path.join(job.staging, ITEM_EMBEDDINGS.name), ITEM_EMBEDDINGS, job.embeddings_schema,
            embeddings, shard, job.shards,
            count_shard(plan, results, embeddings, rejects), work_of(results),
        )  # fmt: skip
        partitions.write_part(
            os.path.join(job.staging, ITEM_REJECTS.name), ITEM_REJECTS, job.rejects_schema,
            rejects, shard, job.shards,
        )  # fmt: skip

    def _no_results(self) -> pa.Table:
        """Returns an empty table of results, as `EmbedChunk` writes them."""
        schema = self._job.embeddings_schema
        added = [pa.field(name, schema.field(name).type) for name in VERSION_COLUMNS]
        found = [*results_schema(schema.field("item_id").type), pa.field("device", pa.string())]
        return pa.schema([*found, *added]).empty_table()


# ---- The job -------------------------------------------------------------------------------


def define_embed(root: beam.Pipeline, catalogue: Source, job: EmbedJob) -> None:
    """Writes `item_embeddings` and `item_rejects` below `job.staging`, one part per item shard."""
    shards = every_shard(root, job.shards)
    cut = (
        (
            root
            | "CatalogueGroups" >> beam.Create(catalogue.groups())
            | "ReadCatalogue" >> beam.ParDo(ReadCatalogue(job)),
            shards,
        )
        | "CatalogueAndShards" >> beam.Flatten()
        | "CatalogueByShard" >> beam.GroupByKey()
        | "PlanShard" >> beam.ParDo(PlanShard(job))
        | "ImagesBySize" >> beam.GroupByKey()
        | "CutBucket" >> beam.ParDo(CutBucket(job)).with_outputs(_KEPT, main="to_do")
    )
    embedded = (
        cut.to_do
        | "SpreadChunks" >> beam.Reshuffle()
        | "EmbedChunk" >> RunInference(EmbedChunk(job))
    )
    _ = (
        (embedded, cut.kept, shards)
        | "ResultsAndShards" >> beam.Flatten()
        | "ResultsByShard" >> beam.GroupByKey()
        | "AssembleShard" >> beam.ParDo(AssembleShard(job))
    )
