"""EMBED makes one embedding, or one reject, for every item of the catalogue.

In: the catalogue of ds, the images, an encoder package, and the previous partition of our own
tables. Out: `item_embeddings` and `item_rejects`. Several days in a row are one job, whose tables
are those that a job a day would make, as long as no image changes between them.

The law: in-catalogue rows of `item_embeddings` + rows of `item_rejects` = the catalogue, each item
once. An image is read only when its file, the image roots or the encoder may have changed since the
previous partition, and embedded only when its bytes or the encoder did; the same bytes under
several items are embedded once. A reject is tried again after 1, 2, 4, 8 and 16 days, then every
30. An item that left the catalogue keeps its embedding for `window_days`, since histories still
hold it. Whatever days ask for an image, a job looks at it once, from each shard with such an item,
and reads and embeds it once.

Flow: catalogue rows → item shards → a walk through the days (what is unchanged, what must be read)
→ images by size, so that equal bytes meet → chunks → results, in chunk files → back to the item
shards, walked again by what became of the images → each day's rows, by the day's shards → vectors
put in, from the partition before the first day and the results. All rows travel as pieces of files;
chunk files also are what a killed run does not do again.
"""

import contextlib
import datetime as dt
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from apache_beam.ml.inference.base import ModelHandler, RunInference

from courier_model.encoder import choose_device
from courier_model.images import Preprocessing
from courier_model.inference import Embedder, embed_images, results_schema
from feature_jobs.inputs import CATALOGUE_COLUMNS, RowGroup, Source, read_rows
from feature_jobs.items import embed_plan, embed_walk
from feature_jobs.items.embed_plan import VERSION_COLUMNS, Sightings
from feature_jobs.items.embed_walk import RESULT_ROW, Day, Tables, WalkedDay
from feature_jobs.schemas import ITEM_EMBEDDINGS, ITEM_REJECTS, Table
from feature_jobs.store import arrays, documents, files, hashing, partitions, worker_notes
from feature_jobs.store.every_shard import check_all_came, every_shard, every_shard_of_days
from feature_jobs.store.pieces import (
    Piece,
    made_from,
    read_all,
    read_pieces,
    write_piece,
    write_pieces,
)

_IMAGES, _KEPT = "images", "kept"
_CATALOGUE, _SEEN, _RESULTS = "catalogue", "seen", "results"

# A piece of a catalogue with the catalogue's number; b"" stands for a shard without any rows.
CataloguePiece = tuple[int, Piece] | bytes


@dataclass(frozen=True)
class EmbedDay:
    """Describes a day of a job; `shards` are those of its tables, a power of two.

    Below its `staging` lie the parts and receipts of its tables and nothing else of the job.
    """

    ds: dt.date
    catalogue: Source
    shards: int
    staging: str


@dataclass(frozen=True)
class EmbedJob:
    """Holds all that the workers of EMBED need to know.

    `days` are in a row. `previous_*` is the latest partition before the first, if any. `reuse` says
    whether the embeddings there are those that would be made now, `same_roots` whether an address
    meant the same file then, `full` that all images are to be embedded again. Vectors
    have the encoder's `dimension`. `chunks` is the folder of chunk files, which other runs with the
    same encoder share. `done` are the parts that were made before the job: (number of the day,
    table, shard).
    """

    days: tuple[EmbedDay, ...]
    embeddings_schema: pa.Schema
    rejects_schema: pa.Schema
    encoder_folder: str
    dimension: int
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
    done: frozenset[tuple[int, str, int]] = frozenset()

    @property
    def shards(self) -> int:
        """Returns how many shards of items are walked through the days: none spans two of a day."""
        return max(day.shards for day in self.days)

    @property
    def catalogues(self) -> list[int]:
        """Returns the number of each day's catalogue: that of the first day with the same files."""
        found = [day.catalogue for day in self.days]
        keys = [(source.form.columns, source.paths, source.checksums) for source in found]
        return [keys.index(key) for key in keys]

    def slim(self) -> "EmbedJob":
        """Returns the job with what workers need of it: without the names of catalogues' files.

        With those of many days it would be too large to be submitted.
        """
        days = (
            replace(d, catalogue=replace(d.catalogue, paths=(), checksums=(), row_groups=()))
            for d in self.days
        )
        return replace(
            self,
            days=tuple(days),
            previous_embeddings=self.previous_embeddings and self.previous_embeddings.slim(),
            previous_rejects=self.previous_rejects and self.previous_rejects.slim(),
            done=self.find_done(),
        )

    def path(self, step: str, name: str) -> str:
        return os.path.join(self.staging, step, name)

    def shard_of_day(self, day: int, shard: int) -> int:
        """Returns the shard of a day's tables that holds the items of a shard of the walk."""
        return shard * self.days[day].shards // self.shards

    def has_part(self, day: int, table: Table, shard: int) -> bool:
        """Returns whether a part was made before the job."""
        return (day, table.name, shard) in self.done

    def find_done(self) -> frozenset[tuple[int, str, int]]:
        """Looks for the parts that are made already."""
        return frozenset(
            (day, table.name, shard)
            for day, of_day in enumerate(self.days)
            for table in (ITEM_EMBEDDINGS, ITEM_REJECTS)
            for shard in partitions.finished(
                os.path.join(of_day.staging, table.name), of_day.shards
            )
        )

    def is_done(self, shard: int) -> bool:
        """Tells whether all parts are made that hold items of a shard of the walk."""
        return all(
            self.has_part(day, table, self.shard_of_day(day, shard))
            for day in range(len(self.days))
            for table in (ITEM_EMBEDDINGS, ITEM_REJECTS)
        )

    def before(self, shard: int) -> Tables:
        """Returns the tables before the first day of a shard of the walk, empty without any."""
        columns = [name for name in self.embeddings_schema.names if name != "embedding"]
        embeddings = _shard_of(
            self.previous_embeddings, self.embeddings_schema, shard, self.shards, columns
        )
        rejects = _shard_of(
            self.previous_rejects, self.rejects_schema, shard, self.shards,
            self.rejects_schema.names,
        )  # fmt: skip
        return Tables.before_the_first_day(embeddings, rejects)

    def vectors_before(self, shard: int, shards: int) -> pa.Table:
        """Returns item_id and embedding of a hash range before the first day.

        It is empty where none of them can be taken over.
        """
        partition = self.previous_embeddings if self.reuse else None
        return _shard_of(partition, self.embeddings_schema, shard, shards, ["item_id", "embedding"])

    def no_results(self) -> pa.Table:
        """Returns an empty table of results, as `EmbedChunk` writes them."""
        schema = self.embeddings_schema
        added = [pa.field(name, schema.field(name).type) for name in VERSION_COLUMNS]
        found = [*results_schema(schema.field("item_id").type), pa.field("device", pa.string())]
        return pa.schema([*found, *added]).empty_table()


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


def all_to_read(days: Iterable[WalkedDay], before: Tables, shard: int, reuse: bool) -> pa.Table:
    """Returns the images that the plans of some days ask for, each item with an address once.

    They are in the columns of `embed_plan.images_to_read`.
    """
    asked = (embed_plan.images_to_read(day.plan, before.embeddings, shard, reuse) for day in days)
    images = pa.concat_tables(asked).combine_chunks()
    _, first = np.unique(embed_plan.row_of_image(images, images), return_index=True)
    return images.take(pa.array(np.sort(first)))


def still_valid(results: pa.Table, images: pa.Table) -> pa.Table:
    """Returns the `results` of an earlier run that `embed_images` would make of `images` again.

    Item, address and version are unchanged. A row without an embedding, since its bytes were known,
    counts only while those bytes are still the known ones. Rejects never count: they are tried
    again, since someone may have mended the file. The shard is that to which they return now.
    """
    rows = embed_plan.row_of_image(results, images)
    good = pc.and_(pc.is_valid(rows), pc.is_null(results["reason"]))
    results, now = results.filter(good), images.take(rows.filter(good))
    same = embed_plan.same_version(results, now)
    known = pc.fill_null(pc.equal(results["image_sha256"], now["known_sha256"]), False)
    holds = pa.array(same & pc.or_(pc.is_valid(results["embedding"]), known).to_numpy())
    shard = now["shard"].filter(holds)
    return results.filter(holds).set_column(results.column_names.index("shard"), "shard", shard)


def first_items(
    examples: Sequence[Mapping[str, Sequence[int | str]]],
) -> dict[str, list[int | str]]:
    """Returns the first items by ID of each kind of `examples`, whichever of these come first."""
    names = {name for found in examples for name in found}
    return {
        name: sorted(item for found in examples for item in found[name])[: partitions.EXAMPLES]
        for name in names
    }


# ---- Transforms ----------------------------------------------------------------------------


class ReadCatalogue(beam.DoFn):
    """Turns a row group of a catalogue into its rows by item shard, with the catalogue's number."""

    def __init__(self, job: EmbedJob):
        self._job, self.staging = job, job.staging

    @worker_notes.refusing
    def process(self, element: tuple[int, RowGroup]) -> Iterator[tuple[int, CataloguePiece]]:
        number, group = element
        rows = read_rows(group, CATALOGUE_COLUMNS)
        shard = hashing.shard_of(hashing.hash_ids(rows["item_id"]), self._job.shards)
        name = documents.digest([group.path, group.index])[:16]
        for into, piece in write_pieces(self._job.path("catalogue", name), rows, shard):
            yield into, (number, piece)


class _Walk(beam.DoFn):
    """Walks the items of a shard through the days."""

    def __init__(self, job: EmbedJob, catalogues: Sequence[int]):
        self._job, self._catalogues, self.staging = job, catalogues, job.staging

    def days(self, pieces: Iterable[CataloguePiece]) -> Iterator[Day]:
        """Yields the days of a shard with their catalogues, each read when its day comes."""
        job, found = self._job, [piece for piece in pieces if isinstance(piece, tuple)]
        nothing = arrays.empty_rows(job.embeddings_schema).select(CATALOGUE_COLUMNS)
        read = None
        for place, (day, number) in enumerate(zip(job.days, self._catalogues, strict=True)):
            if read != number:
                rows = read_pieces((piece for n, piece in found if n == number), nothing)
                read, rows = number, arrays.in_order(rows, ["item_id"])
            later = place > 0  # the day before is then made by this very job
            yield Day(day.ds, rows, later or job.reuse, (later or job.same_roots) and not job.full)


class PlanShard(_Walk):
    """Turns the catalogues of a shard into the images to read, by size, hoping that all are good.

    What was seen of images goes to the second walk, as output `seen`.
    """

    def __init__(self, job: EmbedJob, catalogues: Sequence[int]):
        super().__init__(job, catalogues)
        self._heartbeat = worker_notes.Heartbeat(job.staging)

    @worker_notes.refusing
    def process(self, element: tuple[int, Iterable[CataloguePiece]]) -> Iterator[Any]:
        job, (shard, pieces) = self._job, element
        if job.is_done(shard):
            return
        before, sightings = job.before(shard), Sightings(job.image_roots)
        walked = embed_walk.walk(self.days(pieces), before, sightings, job.window_days)
        images = all_to_read(walked, before, shard, job.reuse and not job.full)
        reasons = embed_walk.count_reasons(sightings.seen["reason"])
        self._heartbeat.begin(f"planned {shard}")
        self._heartbeat.add(total=len(images), **reasons)
        self._heartbeat.write()
        name = f"{shard:05d}"
        seen = write_piece(job.path("seen", name), sightings.seen)
        if seen is not None:
            yield beam.pvalue.TaggedOutput(_SEEN, (shard, seen))
        bucket = embed_plan.bucket_of(images, job.shards)
        yield from write_pieces(job.path("to_read", name), images, bucket)


class CutBucket(beam.DoFn):
    """Turns the images of a bucket into chunks of what is left to do of them.

    What an earlier run did of them goes to the item shards, as output `kept`.
    """

    def __init__(self, job: EmbedJob):
        self._job, self.staging = job, job.staging
        self._heartbeat = worker_notes.Heartbeat(job.staging)

    @worker_notes.refusing
    def process(self, element: tuple[int, Iterable[Piece]]) -> Iterator[Any]:
        job, (bucket, pieces) = self._job, element
        images = read_pieces(pieces, pa.table({}))
        name = f"{bucket:05d}"
        kept = self._kept(bucket, images)
        if kept is not None:
            self._heartbeat.begin(f"kept {bucket}")
            self._heartbeat.add(done=len(kept))
            images = images.filter(pc.is_null(embed_plan.row_of_image(images, kept)))
            for found in write_pieces(job.path("kept", name), kept, kept["shard"].to_numpy()):
                yield beam.pvalue.TaggedOutput(_KEPT, found)
        images, chunk = embed_plan.cut(images, job.chunk_items)
        for _, piece in write_pieces(job.path("chunks_to_do", name), images, chunk):
            yield bucket, piece

    def _kept(self, bucket: int, images: pa.Table) -> pa.Table | None:
        """Returns what earlier runs made of `images` and still holds, each once, or None.

        Their chunk files go when they end: what is not there any more is made again.
        """
        found = []
        for path in files.find(os.path.join(self._job.chunks, f"{bucket:05d}-*.arrow")):
            with contextlib.suppress(FileNotFoundError):
                found.append(still_valid(read_all(path), images))
        if not found:
            return None
        results = pa.concat_tables(found)
        _, first = np.unique(embed_plan.row_of_image(results, images), return_index=True)
        return results.take(pa.array(first))


class EmbedChunk(ModelHandler[tuple[int, Piece], tuple[int, Piece], Embedder]):
    """Turns a chunk of images into what became of each, for the item shards.

    Elements are whole chunks, whose images become batches of one shape here: as elements of their
    own they would cost more than their embedding. The encoder is there once in a process, on a GPU
    once for all processes of a worker. What was made of a chunk is noted: a runner that tries a
    partition again hands on those of its chunks, too, that were finished.
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
        name = f"{os.path.basename(piece.path)}-{piece.batch}"
        found = worker_notes.finished(self.staging, name)
        if found is not None:
            yield from ((shard, Piece(*result)) for shard, result in found)
            return
        images = read_pieces([piece], pa.table({}))
        self._heartbeat.begin(f"embedded {name}")
        results = embed_images(
            images, embedder.embed, job.preprocessing, job.image_roots, job.batch_size,
            self._heartbeat.add, embedder.passes(),
        )  # fmt: skip
        for column in ("shard", *VERSION_COLUMNS):
            results = results.append_column(column, images[column])
        device = pa.repeat(pa.scalar(embedder.kind_and_precision()), len(results))
        results = results.append_column("device", device)
        path = os.path.join(job.chunks, f"{bucket:05d}")
        made = list(write_pieces(path, results, images["shard"].to_numpy()))
        worker_notes.note_finished(self.staging, name, made)
        yield from made


class DayRows(NamedTuple):
    """Holds what a walk makes of a day: the rows of its tables, as pieces, and what is told of it.

    `embeddings` have no vectors; their `result_row` points into the results that the piece
    `results` lists.
    """

    embeddings: Piece | None
    rejects: Piece | None
    results: Piece | None
    counts: dict[str, int]
    examples: dict[str, list[int | str]]
    work: dict[str, float]


class WalkShard(_Walk):
    """Turns the results of a shard into the rows of each day, by day and shard of its tables."""

    @worker_notes.refusing
    def process(
        self, element: tuple[int, Mapping[str, Iterable[Any]]]
    ) -> Iterator[tuple[tuple[int, int], DayRows]]:
        job, (shard, given) = self._job, element
        if job.is_done(shard):
            return
        results, listed = self._results(shard, list(given[_RESULTS]))
        nothing = Sightings(job.image_roots)
        sightings = Sightings(job.image_roots, read_pieces(given[_SEEN], nothing.seen))
        days = embed_walk.walk(
            self.days(given[_CATALOGUE]), job.before(shard), sightings, job.window_days, results
        )
        told = np.zeros(len(results), bool)  # of which results an earlier day has told the cost
        for day, walked in enumerate(days):
            tables, rows = walked.tables, walked.result_rows
            first = results.take(pa.array(rows[~told[rows]]))
            told[rows] = True
            path = job.path("days", f"{walked.ds}-{shard:05d}")
            yield (
                (day, job.shard_of_day(day, shard)),
                DayRows(
                    write_piece(path + "-embeddings", tables.embeddings),
                    write_piece(path + "-rejects", tables.rejects),
                    listed
                    if tables.embeddings[RESULT_ROW].null_count < len(tables.embeddings)
                    else None,
                    embed_walk.count(walked),
                    embed_walk.examples(walked),
                    embed_walk.work_of(tables.embeddings, first),
                ),
            )

    def _results(self, shard: int, pieces: list[Piece]) -> tuple[pa.Table, Piece | None]:
        """Returns the results without vectors, and the piece that lists where they lie."""
        nothing = self._job.no_results().drop_columns("embedding")
        results = read_pieces(pieces, nothing, nothing.column_names)
        listed = sorted(pieces)
        places = {name: [getattr(piece, name) for piece in listed] for name in Piece._fields}
        return results, write_piece(self._job.path("results", f"{shard:05d}"), pa.table(places))


class WriteDay(beam.DoFn):
    """Turns the rows of a day's shard into its parts of `item_embeddings` and `item_rejects`."""

    def __init__(self, job: EmbedJob):
        self._job, self.staging = job, job.staging
        # By what lists them: the next day of a shard is made of the same ones.
        self._results: dict[Piece, pa.Table] = {}

    @worker_notes.refusing
    def process(self, element: tuple[tuple[int, int], Iterable[DayRows | bytes]]) -> None:
        (day, shard), given = element
        found = [of_walk for of_walk in given if isinstance(of_walk, DayRows)]
        tables = (ITEM_EMBEDDINGS, ITEM_REJECTS)
        if all(self._job.has_part(day, table, shard) for table in tables):
            return
        of_day = self._job.days[day]
        expected = self._job.shards // of_day.shards
        check_all_came(f"item shards walked through ds {of_day.ds}", len(found), expected)
        if not self._job.has_part(day, ITEM_EMBEDDINGS, shard):
            told = [of_walk._asdict() for of_walk in found]
            counts, work = (partitions.sum_counts(told, what) for what in ("counts", "work"))
            examples = first_items([of_walk.examples for of_walk in found])
            rows = self._embeddings(day, shard, found)
            pieces = [of_walk.embeddings for of_walk in found if of_walk.embeddings]
            self._write(day, ITEM_EMBEDDINGS, shard, rows, pieces, counts, work, examples)
        if not self._job.has_part(day, ITEM_REJECTS, shard):
            nothing = arrays.empty_rows(self._job.rejects_schema)
            pieces = [of_walk.rejects for of_walk in found if of_walk.rejects]
            rows = read_pieces(pieces, nothing).combine_chunks()
            self._write(day, ITEM_REJECTS, shard, rows, pieces)

    def _embeddings(self, day: int, shard: int, found: Sequence[DayRows]) -> pa.Table:
        job, parts, results = self._job, [], [self._job.no_results().select(["embedding"])]
        self._read_results({of_walk.results for of_walk in found if of_walk.results})
        for of_walk in found:
            if of_walk.embeddings is None:
                continue
            rows = read_pieces([of_walk.embeddings], pa.table({}))
            place = rows.column_names.index(RESULT_ROW)
            offset = pa.scalar(sum(map(len, results)), pa.int64())
            parts.append(rows.set_column(place, RESULT_ROW, pc.add(rows[RESULT_ROW], offset)))
            if of_walk.results is not None:
                results.append(self._results[of_walk.results])
        if not parts:
            return arrays.empty_rows(job.embeddings_schema)
        before = job.vectors_before(shard, job.days[day].shards)
        return embed_walk.with_vectors(pa.concat_tables(parts), pa.concat_tables(results), before)

    def _read_results(self, wanted: set[Piece]) -> None:
        """Reads the vectors of the results that these pieces list, and holds no others."""
        nothing = self._job.no_results().select(["embedding"])
        self._results = {listed: self._results[listed] for listed in wanted & self._results.keys()}
        for listed in wanted - self._results.keys():
            pieces = [Piece(**found) for found in read_pieces([listed], pa.table({})).to_pylist()]
            self._results[listed] = read_pieces(pieces, nothing, ["embedding"])

    def _write(
        self, day: int, table: Table, shard: int, rows: pa.Table, pieces: Sequence[Piece],
        counts: dict[str, int] | None = None, work: dict[str, float] | None = None,
        examples: dict[str, list[int | str]] | None = None,
    ) -> None:  # fmt: skip
        job, of_day = self._job, self._job.days[day]
        schema = job.embeddings_schema if table is ITEM_EMBEDDINGS else job.rejects_schema
        folder = os.path.join(of_day.staging, table.name)
        partitions.write_part(
            folder, table, schema, rows, shard, of_day.shards, counts, work,
            {"embedding": job.dimension}, made_from(pieces), examples=examples,
        )  # fmt: skip


# ---- The job -------------------------------------------------------------------------------


def define_embed(root: beam.Pipeline, job: EmbedJob) -> None:
    """Writes `item_embeddings` and `item_rejects` of each day below that day's staging folder."""
    catalogues = job.catalogues
    groups = [
        (number, group)
        for number in sorted(set(catalogues))
        for group in job.days[number].catalogue.groups()
    ]
    job = job.slim()
    catalogue = (
        root
        | "CatalogueGroups" >> beam.Create(groups)
        | "ReadCatalogue" >> beam.ParDo(ReadCatalogue(job)),
        every_shard(root, job.shards),
    ) | "CatalogueAndShards" >> beam.Flatten()
    planned = (
        catalogue
        | "CatalogueByShard" >> beam.GroupByKey()
        | "PlanShard" >> beam.ParDo(PlanShard(job, catalogues)).with_outputs(_SEEN, main=_IMAGES)
    )
    cut = (
        planned[_IMAGES]
        | "ImagesBySize" >> beam.GroupByKey()
        | "CutBucket" >> beam.ParDo(CutBucket(job)).with_outputs(_KEPT, main="to_do")
    )
    embedded = (
        cut.to_do
        | "SpreadChunks" >> beam.Reshuffle()
        | "EmbedChunk" >> RunInference(EmbedChunk(job))
    )
    results = (embedded, cut.kept) | "Results" >> beam.Flatten()
    rows = (
        {_CATALOGUE: catalogue, _SEEN: planned[_SEEN], _RESULTS: results}
        | "ResultsByShard" >> beam.CoGroupByKey()
        | "WalkShard" >> beam.ParDo(WalkShard(job, catalogues))
    )
    _ = (
        (rows, every_shard_of_days(root, [day.shards for day in job.days]))
        | "RowsAndShards" >> beam.Flatten()
        | "ByDayAndShard" >> beam.GroupByKey()
        | "WriteDay" >> beam.ParDo(WriteDay(job))
    )
