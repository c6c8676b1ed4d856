"""TAKE-VECTORS is EMBED where a shop has the vectors already: it takes them, and reads no image.

In: the catalogue of ds, a table of vectors (the source of an encoder of the kind `vectors`), and
the previous partition of our own tables. Out: `item_embeddings` and `item_rejects`, under EMBED's
law and with its columns. A vector is known by the sha256 of its bytes as float32. An item without a
usable one is a reject, and taken as soon as there is one; until then its tries are counted as those
of images are. Rows of items that are neither in the catalogue nor kept are counted and left.

Flow: rows of the catalogue and of the vectors → item shards, as pieces of files → each shard's
parts. Each day is a job of its own: nothing that one day reads is of use to the next.
"""

import datetime as dt
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_jobs.inputs import (
    CATALOGUE_COLUMNS,
    VECTOR_COLUMNS,
    RowGroup,
    Source,
    read_in_batches,
    read_rows,
)
from feature_jobs.items import embed_walk, vector_rows
from feature_jobs.items.embed_walk import Tables, WalkedDay
from feature_jobs.items.vector_rows import Taken
from feature_jobs.items.vector_table import VectorTable
from feature_jobs.schemas import ITEM_EMBEDDINGS, ITEM_REJECTS, DataContractError, Table
from feature_jobs.store import arrays, documents, files, hashing, partitions, worker_notes
from feature_jobs.store.every_shard import every_shard
from feature_jobs.store.pieces import Piece, read_pieces, write_pieces

_CATALOGUE, _VECTORS = "catalogue", "vectors"
_TABLES = (ITEM_EMBEDDINGS, ITEM_REJECTS)
_BATCH_BYTES = 64 << 20  # of vectors that are held at a time


@dataclass(frozen=True)
class TakeJob:
    """Holds all that the workers of TAKE-VECTORS need to know.

    The tables have `shards`, and lie below `staging` with their receipts and nothing else; pieces
    lie below `folder`. `centre` float32 [dimension] is taken off each vector; None for none.
    `reuse` says whether the `previous_*` tables, if any, are of the same encoder, and `full` that
    no reject waits. `done` are the shards whose parts were made before the job.
    """

    ds: dt.date
    shards: int
    embeddings_schema: pa.Schema
    rejects_schema: pa.Schema
    dimension: int
    centre: np.ndarray | None
    window_days: int
    previous_embeddings: partitions.Partition | None
    previous_rejects: partitions.Partition | None
    reuse: bool
    full: bool
    staging: str
    folder: str
    done: frozenset[int] = frozenset()

    def slim(self) -> "TakeJob":
        """Returns the job with what workers need of it."""
        return replace(
            self,
            previous_embeddings=self.previous_embeddings and self.previous_embeddings.slim(),
            previous_rejects=self.previous_rejects and self.previous_rejects.slim(),
            done=self.find_done(),
        )

    def path(self, step: str, name: str) -> str:
        return os.path.join(self.folder, step, name)

    def table_folder(self, table: Table) -> str:
        return os.path.join(self.staging, table.name)

    @property
    def item_id(self) -> pa.DataType:
        return self.embeddings_schema.field("item_id").type

    def find_done(self) -> frozenset[int]:
        """Looks for the shards both of whose parts are made already."""
        folders = map(self.table_folder, _TABLES)
        return frozenset.intersection(*(partitions.finished(f, self.shards) for f in folders))

    def before(self, shard: int) -> Tables:
        """Returns the tables before ds of a shard, empty without any."""
        columns = [name for name in self.embeddings_schema.names if name != "embedding"]
        embeddings = self._read(
            self.previous_embeddings, self.embeddings_schema.empty_table(), shard, columns
        )
        rejects = self.rejects_schema.empty_table()
        return Tables.before_the_first_day(
            embeddings, self._read(self.previous_rejects, rejects, shard, rejects.column_names)
        )

    def vectors_before(self, items: pa.ChunkedArray) -> pa.Table:
        """Returns item_id and embedding before ds of some items, as far as they have one."""
        columns = ["item_id", "embedding"]
        if self.previous_embeddings is None or not len(items):
            return arrays.plain(self.embeddings_schema.empty_table().select(columns))
        return self.previous_embeddings.look_up(arrays.whole(items), "item_id", columns)

    def _read(
        self, partition: partitions.Partition | None, nothing: pa.Table, shard: int,
        columns: list[str],
    ) -> pa.Table:  # fmt: skip
        if partition is None:
            return arrays.plain(nothing.select(columns))
        return partition.read_shard(shard, self.shards, "item_id", columns)


# ---- Steps -----------------------------------------------------------------------------------


class ReadCatalogue(beam.DoFn):
    """Turns a row group of the catalogue into pieces by shard."""

    def __init__(self, job: TakeJob):
        self._job, self.staging = job, job.folder

    @worker_notes.refusing
    def process(self, group: RowGroup) -> Iterator[tuple[int, Piece]]:
        rows = vector_rows.with_addresses(read_rows(group, CATALOGUE_COLUMNS))
        yield from _by_shard(self._job, _CATALOGUE, group, 0, rows)


class ReadVectors(beam.DoFn):
    """Turns a row group of vectors into pieces by shard; each vector is looked at by itself.

    The group comes with the version of its file, which must be the same once it was read.
    """

    def __init__(self, job: TakeJob):
        self._job, self.staging = job, job.folder
        self._heartbeat = worker_notes.Heartbeat(job.folder)

    @worker_notes.refusing
    def process(self, element: tuple[RowGroup, object]) -> Iterator[tuple[int, Piece]]:
        job, (group, version) = self._job, element
        size = max(1, _BATCH_BYTES // (4 * job.dimension))
        self._heartbeat.begin(f"read {group.path} {group.index}")
        for number, rows in enumerate(read_in_batches(group, VECTOR_COLUMNS, size)):
            found = vector_rows.checked(rows, job.dimension, job.centre)
            self._heartbeat.add(total=len(rows), done=len(rows))
            yield from _by_shard(job, _VECTORS, group, number, found)
        if _version_of(group.path) != version:
            raise DataContractError(
                f"{group.path} was written anew, or taken away, while it was read, so that vectors "
                "of two versions of it would lie in one table. Nothing was published. Run the "
                "command again once the table is whole; where its writer leaves a _SUCCESS, "
                "register the vectors with --require-success, and nights wait for it."
            )


def _version_of(path: str) -> object:
    try:
        return files.stat(path).version
    except FileNotFoundError:
        return None


def _by_shard(
    job: TakeJob, step: str, group: RowGroup, number: int, rows: pa.Table
) -> Iterator[tuple[int, Piece]]:
    shard = hashing.shard_of(hashing.hash_ids(rows["item_id"]), job.shards)
    name = documents.digest([group.path, group.index, number])[:16]
    if step == _CATALOGUE:
        yield from write_pieces(job.path(step, name), rows, shard)
    else:  # vectors hardly get smaller by compression
        known_by = [column for column in rows.column_names if column != "vector"]
        yield from write_pieces(job.path(step, name), rows, shard, None, known_by)


class TakeShard(beam.DoFn):
    """Turns the rows of a shard into its parts of `item_embeddings` and `item_rejects`."""

    def __init__(self, job: TakeJob):
        self._job, self.staging = job, job.folder

    @worker_notes.refusing
    def process(self, element: tuple[int, Mapping[str, Iterable[Piece | bytes]]]) -> None:
        job, (shard, given) = self._job, element
        if shard in job.done:
            return
        catalogue, vectors = (list(given[name]) for name in (_CATALOGUE, _VECTORS))
        schema = vector_rows.rows_schema(job.item_id, job.dimension)
        rows = read_pieces(vectors, schema.empty_table())
        nothing = arrays.empty_rows(job.embeddings_schema).select(CATALOGUE_COLUMNS)
        before = job.before(shard)
        day = vector_rows.take_day(
            read_pieces(catalogue, nothing), before, rows, job.ds, job.window_days, job.reuse,
            job.full, job.dimension,
        )  # fmt: skip
        tables = day.tables
        kept = tables.embeddings.filter(pc.is_null(tables.embeddings[embed_walk.RESULT_ROW]))
        embeddings = vector_rows.with_embeddings(
            _with_some_address(tables.embeddings), Taken.of(rows, job.dimension, job.centre),
            job.vectors_before(kept["item_id"]),
        )  # fmt: skip
        counts, work = _counts(day, rows), _work(day, rows)
        examples = {
            "rejected": tables.rejects["item_id"][: partitions.EXAMPLES].to_pylist(),
            "not_fetched": day.not_fetched[: partitions.EXAMPLES].to_pylist(),
        }
        self._write(ITEM_EMBEDDINGS, shard, embeddings, counts, work, examples)
        self._write(ITEM_REJECTS, shard, tables.rejects)

    def _write(
        self, table: Table, shard: int, rows: pa.Table, counts: dict[str, int] | None = None,
        work: dict[str, float] | None = None, examples: dict[str, list[int | str]] | None = None,
    ) -> None:  # fmt: skip
        job = self._job
        schema = job.embeddings_schema if table is ITEM_EMBEDDINGS else job.rejects_schema
        partitions.write_part(
            job.table_folder(table), table, schema, rows, shard, job.shards, counts, work,
            {"embedding": job.dimension}, examples=examples,
        )  # fmt: skip


def _with_some_address(rows: pa.Table) -> pa.Table:
    """Returns rows whose image_uri is nowhere null, as the table asks for; "" is no address."""
    at = rows.column_names.index("image_uri")
    return rows.set_column(at, "image_uri", pc.fill_null(rows["image_uri"], ""))


def _counts(day: WalkedDay, rows: pa.Table) -> dict[str, int]:
    """Counts the items of a day as EMBED does; an address is none of a vector's affairs."""
    known = pc.is_in(rows["item_id"], value_set=day.plan["item_id"].combine_chunks())
    return {
        **embed_walk.count(day),
        "items_without_uri": 0,
        "vectors_read": len(rows),
        "vectors_ignored": len(rows) - (pc.sum(known).as_py() or 0),
    }


def _work(day: WalkedDay, rows: pa.Table) -> dict[str, float]:
    """Tells how many embeddings are of a vector that was there the day before, and how many new."""
    now = day.tables.embeddings
    then = day.before.embeddings
    before = then["image_sha256"].take(
        pc.index_in(now["item_id"], then["item_id"].combine_chunks())
    )
    same = pc.sum(pc.equal(before, now["image_sha256"])).as_py() or 0
    return {
        "images_unchanged": same,
        "vectors_taken": len(now) - same,
        "bytes_read": rows["vector"].nbytes,
    }


# ---- The job ---------------------------------------------------------------------------------


def define_take_vectors(
    root: beam.Pipeline, job: TakeJob, catalogue: Source, vectors: VectorTable
) -> None:
    """Writes `item_embeddings` and `item_rejects` of a day below its staging folder."""
    job = job.slim()
    groups = [(group, vectors.versions[group.path]) for group in vectors.source.groups()]
    pieces = {
        _CATALOGUE: (
            root
            | "CatalogueGroups" >> beam.Create(catalogue.groups())
            | "ReadCatalogue" >> beam.ParDo(ReadCatalogue(job)),
            every_shard(root, job.shards),
        )
        | "CatalogueAndShards" >> beam.Flatten(),
        _VECTORS: root
        | "VectorGroups" >> beam.Create(groups)
        | "ReadVectors" >> beam.ParDo(ReadVectors(job)),
    }
    _ = pieces | "ByShard" >> beam.CoGroupByKey() | "TakeShard" >> beam.ParDo(TakeShard(job))
