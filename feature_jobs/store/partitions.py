"""Keeps tables as files: parts written out of sight, partitions as readers see them, identities.

A job writes each shard of a table as one Parquet *part* with a *receipt* beside it (rows, bytes,
sha256, counts, what it was made from). The receipt comes last, so a part with a receipt is whole,
and a job that died is resumed by leaving out the shards that have one. A part is named by its
content and found by its receipt: a second attempt that ends late, of a worker that was given up,
changes no file that is counted on. A *partition* is what the manifest lists, and nothing else that
may lie in its folder.
"""

import hashlib
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from feature_jobs import laws
from feature_jobs.schemas import (
    DataContractError,
    InputNotReady,
    Table,
    cluster_column,
)
from feature_jobs.store import files, hashing, memory_files
from feature_jobs.store.arrays import in_order, lookup, plain, take
from feature_jobs.store.documents import digest, parse_json, read_json, write_json
from feature_jobs.store.faults import patiently, until_seen

MANIFEST = "_manifest.json"
SUCCESS = "_SUCCESS"
FILE_LIST = "_files.txt"
STAGED = "_staged.json"
EXAMPLES = 3  # told of what was counted, by ID
_MADE_FROM = "made_from"
# What a receipt says; one of an earlier version lacks some, and its part is made again.
_TOLD = {"counts", "histograms", "examples", "work", _MADE_FROM}
_ROW_GROUP_ROWS = 32_768  # at most: more make no file smaller, and readers hold them at once
_RECEIPT_READERS = 16
_PART_READERS = 64
_TABLE_READERS = 8  # each holds a row group
_FOLDED_FILE = 8 * 10**6  # bytes, about, of a file of parts that are folded together
_FOLDED_TABLE = 512 * 10**6  # more is not for one process to read

ROW_GROUP_BYTES = 128 * 10**6  # uncompressed, at most, unless told otherwise
_row_group_bytes = ROW_GROUP_BYTES


# ---- Parts ---------------------------------------------------------------------------------


def part_name(shard: int, shards: int) -> str:
    return f"part-{shard:05d}-of-{shards:05d}"


def shard_name(file: str) -> str:
    """Returns the `part_name` in the name of a file of a part, staged or published."""
    found = re.match(r"part-\d+-of-\d+", file)
    if found is None:
        raise ValueError(f"{file} is no part")
    return found[0]


def _receipt_path(folder: str, shard: int, shards: int) -> str:
    return os.path.join(folder, "receipts", part_name(shard, shards) + ".json")


class MadeFrom(NamedTuple):
    """Names what a part was made from: so many pieces with so many rows, and which; see `pieces`.

    Equal ones are of equal rows.
    """

    pieces: int
    rows: int
    digest: str


def has_part(folder: str, shard: int, shards: int, made_from: MadeFrom) -> bool:
    """Returns whether this shard was written whole, by whatever run, and from the very same rows.

    A worker to whom a shared folder showed old names may have written it from others.
    """
    path = _receipt_path(folder, shard, shards)
    found = files.read_if_there(path)
    if found is None:
        return False
    receipt = parse_json(path, found)
    return receipt.keys() >= _TOLD and receipt[_MADE_FROM] == made_from._asdict()


def finished(folder: str, shards: int) -> frozenset[int]:
    """Returns the shards that an earlier run wrote whole; asked once, where a job is defined.

    Of workers that ask each for itself some may be shown old names: one step would leave a shard
    out as done, and a later one would find it missing and write it without rows.
    """
    names = {shard_name(part["name"]): part.keys() >= _TOLD for part in receipts(folder)}
    return frozenset(shard for shard in range(shards) if names.get(part_name(shard, shards)))


def write_part(
    folder: str, table: Table, schema: pa.Schema, rows: pa.Table, shard: int, shards: int,
    counts: dict[str, int] | None = None, work: dict[str, float] | None = None,
    limits: Mapping[str, int] | None = None, made_from: MadeFrom | None = None,
    histograms: Mapping[str, np.ndarray] | None = None,
    examples: Mapping[str, Sequence[int | str]] | None = None,
) -> None:  # fmt: skip
    """Writes one shard of `table` and its receipt; `rows` are sorted as `table` says here.

    `counts`, `histograms` (counts by bin, int [bins]) and `examples` (the IDs of some items of
    what was counted, never of users) are the same whenever the shard is made again; `work` is what
    it cost this time. `made_from` names what the rows were made from, where as many went in as come
    out. Raises DataContractError where that is not so, for a null where `schema` allows none, and
    for rows that break the law of `table` within `limits`, which are those of `laws.check`.
    """
    if made_from is not None and made_from.rows != len(rows):
        raise DataContractError(
            f"{part_name(shard, shards)} of {table.name} has {len(rows):,} rows, but "
            f"{made_from.rows:,} went into it. Rows were lost or doubled; the part was not "
            "written. This is a fault of COURIER: please report it."
        )
    rows = _as_table(table, schema, rows)
    for field in schema:
        if not field.nullable and rows[field.name].null_count:
            example = laws.name_row(table, rows.filter(pc.is_null(rows[field.name])), 0)
            raise DataContractError(
                f"{table.name}.{field.name} must not be null but is in {example}; whoever joins "
                "the table counts on it. This is a fault of COURIER: please report it."
            )
    laws.check(table, rows, limits)
    receipt = {
        **_write_named(folder, part_name(shard, shards), rows),
        "counts": counts or {},
        "histograms": {name: bins.tolist() for name, bins in (histograms or {}).items()},
        "examples": {name: list(ids[:EXAMPLES]) for name, ids in (examples or {}).items()},
        "work": work or {},
        _MADE_FROM: made_from and made_from._asdict(),
    }
    write_json(_receipt_path(folder, shard, shards), receipt)


def _as_table(table: Table, schema: pa.Schema, rows: pa.Table) -> pa.Table:
    """Returns `rows` of this schema, sorted as `table` says."""
    columns = [rows[field.name].cast(field.type) for field in schema]
    found = pa.Table.from_arrays(columns, schema=schema)
    return in_order(found, [table.key, *table.then_by]) if table.key else found


def limit_row_groups(size: int) -> None:
    """Makes row groups that this process writes have at most `size` bytes, uncompressed.

    It lasts until the next call, in all threads. A group has one row at least.
    """
    global _row_group_bytes
    _row_group_bytes = size


def write_parquet(path: str, rows: pa.Table) -> tuple[int, str]:
    """Writes one Parquet file, zstd; returns how many bytes it has and their sha256, hex.

    It has no dictionary pages for lists of floats, which never repeat, and no statistics of lists,
    which nobody filters by.
    """
    data = _parquet(rows)
    files.write_bytes(path, data)
    return data.size, hashlib.sha256(data).hexdigest()


def _write_named(folder: str, name: str, rows: pa.Table) -> dict[str, Any]:
    """Writes `rows` as a file whose name goes on with a digest; returns what receipts say of it.

    So no other rows ever take its place.
    """
    data = _parquet(rows)
    sha256 = hashlib.sha256(data).hexdigest()
    name = f"{name}-{sha256[:12]}.parquet"
    files.write_bytes(os.path.join(folder, name), data)
    return {"name": name, "rows": len(rows), "bytes": data.size, "sha256": sha256}


def _parquet(rows: pa.Table) -> pa.Buffer:
    """Returns the bytes of a Parquet file whose row groups are no larger than they may be."""
    length = min(_ROW_GROUP_ROWS, _row_group_bytes * len(rows) // max(rows.nbytes, 1) or 1)
    data, largest = _encoded(rows, length)
    while largest > _row_group_bytes and length > 1:  # some rows are larger than the mean
        length = max(1, length // 2)
        data, largest = _encoded(rows, length)
    return data


def _encoded(rows: pa.Table, length: int) -> tuple[pa.Buffer, int]:
    """Returns a Parquet file of row groups of `length` rows, and the bytes of the largest group."""
    flat = [f.name for f in rows.schema if not pa.types.is_nested(f.type)]
    # In memory first: a writer that is interrupted at its file complains when it is thrown away.
    data = memory_files.written(
        rows.nbytes,
        lambda sink: pq.write_table(
            rows, sink, compression="zstd", row_group_size=length, use_dictionary=flat,
            write_statistics=flat,
        ),
    )  # fmt: skip
    footer = pq.read_metadata(pa.BufferReader(data))
    groups = [footer.row_group(n).total_byte_size for n in range(footer.num_row_groups)]
    return data, max(groups, default=0)


def receipts(folder: str) -> list[dict[str, Any]]:
    """Returns the receipts of all parts written so far, in shard order."""
    at = os.path.join(folder, "receipts")
    paths = [os.path.join(at, name) for name in files.list_names(at)]
    if len(paths) == 1:  # of many small days, threads would take longer
        return [read_json(paths[0])]
    with ThreadPoolExecutor(_RECEIPT_READERS) as pool:
        return list(pool.map(read_json, paths))


def sum_counts(parts: Iterable[dict[str, Any]], what: str = "counts") -> dict[str, Any]:
    """Returns the "counts", or the "work", of all parts, added up by name."""
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part[what])
    return dict(sorted(total.items()))


def sum_histograms(parts: Iterable[Mapping[str, Any]]) -> dict[str, list[int]]:
    """Returns the "histograms" of all parts, added up bin by bin; the longest says how many."""
    total: dict[str, list[int]] = {}
    for part in parts:
        for name, bins in part["histograms"].items():
            pairs = itertools.zip_longest(total.get(name, ()), bins, fillvalue=0)
            total[name] = [one + other for one, other in pairs]
    return dict(sorted(total.items()))


def first_examples(parts: Iterable[Mapping[str, Any]]) -> dict[str, list[int | str]]:
    """Returns the first few distinct "examples" of all parts by name, in the order of the parts."""
    found: dict[str, dict[int | str, None]] = {}
    for part in parts:
        for name, ids in part["examples"].items():
            found[name] = found.get(name, {}) | dict.fromkeys(ids)
    return {name: list(ids)[:EXAMPLES] for name, ids in sorted(found.items())}


def fold(folder: str, table: Table, parts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the fewest files of some 8 MB at most that hold all parts of a table, as receipts do.

    They are a power of two, each of a range of the hash that those of its parts make up. The parts,
    of the given receipts in shard order, stay where they are. Those of a table of more than 512 MB,
    and those that are few already, are returned as they are.
    """
    sizes = np.array([part["bytes"] if part["rows"] else 0 for part in parts])
    count = 1
    while count < len(parts) and sizes.reshape(count, -1).sum(axis=1).max() > _FOLDED_FILE:
        count *= 2
    if count == len(parts) or sizes.sum() > _FOLDED_TABLE:
        return list(parts)
    together = len(parts) // count
    return [
        _folded(folder, table, parts[n * together : (n + 1) * together], n, count)
        for n in range(count)
    ]


def _folded(
    folder: str, table: Table, parts: Sequence[dict[str, Any]], shard: int, shards: int
) -> dict[str, Any]:
    """Writes one file of the rows of `parts`; returns what a receipt says of it."""
    filled = [part for part in parts if part["rows"]] or parts[:1]
    found = Partition(folder, {"files": filled})
    with ThreadPoolExecutor(_PART_READERS) as pool:
        rows = pa.concat_tables(pool.map(read_parquet, found.paths))
    rows = _as_table(table, found.schema, rows)
    return _write_named(folder, part_name(shard, shards), rows)


# ---- Partitions ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Partition:
    """Holds a whole table of one ds: its folder and the manifest that says which files are it."""

    folder: str
    manifest: dict[str, Any]

    def path(self, number: int) -> str:
        """Returns where one of the files lies; asks the part's receipt where that is to tell."""
        file = self.manifest["files"][number]
        if "name" in file:
            return os.path.join(self.folder, file["name"])
        receipt = os.path.join(self.folder, "receipts", file["receipt"])
        return os.path.join(self.folder, until_seen(receipt, lambda: read_json(receipt))["name"])

    @property
    def paths(self) -> list[str]:
        return [self.path(number) for number in range(len(self.manifest["files"]))]

    @property
    def rows(self) -> int:
        return sum(file["rows"] for file in self.manifest["files"])

    @property
    def run_id(self) -> str:
        return str(self.manifest["run_id"])

    @property
    def schema(self) -> pa.Schema:
        path = self.path(0)

        def read() -> pa.Schema:
            with files.open_input(path) as file:
                return pq.read_schema(file)

        return patiently(path, read)

    @property
    def version(self) -> str:
        return version_of(self.manifest)

    def slim(self) -> "Partition":
        """Returns the partition with what a worker needs of it: names and rows of files.

        Whole manifests of many days and files would make a job too large to be submitted.
        """
        files = [{"name": file["name"], "rows": file["rows"]} for file in self.manifest["files"]]
        return Partition(self.folder, {"files": files})

    def read_shard(
        self, shard: int, shards: int, key: str, columns: Sequence[str] | None = None
    ) -> pa.Table:
        """Returns the rows whose `key` falls into the hash range of `shard` of `shards`.

        The table must be sharded by that key. Reads one file, or the few that overlap the range.
        """
        parts = len(self.manifest["files"])
        needed = hashing.overlapping_shards(shard, shards, parts)
        rows = pa.concat_tables(read_parquet(self.path(i), columns) for i in needed)
        if parts >= shards:
            return rows
        mine = hashing.shard_of(hashing.hash_ids(rows[key]), shards) == shard
        return rows.filter(pa.array(mine))

    def look_up(self, ids: pa.Array, key: str, columns: Sequence[str]) -> pa.Table:
        """Returns the rows whose `key` is one of `ids`, distinct and of the key's type.

        The table must be sharded by that key, which is one of `columns`. Of what holds none of
        them no file is read, and of a row group the keys alone; where there are as many `ids` as
        row groups, nearly all is read.
        """
        part = hashing.shard_of(hashing.hash_ids(ids), len(self.manifest["files"]))

        def rows_of(number: int) -> list[pa.Table]:
            wanted = ids.filter(pa.array(part == number))
            return _rows_of(self.path(number), wanted, key, list(columns))

        with ThreadPoolExecutor(_TABLE_READERS) as pool:
            found = [*itertools.chain(*pool.map(rows_of, np.unique(part).tolist()))]
        if not found:
            return plain(self.schema.empty_table().select(list(columns)))
        return pa.concat_tables(found)


def _rows_of(path: str, wanted: pa.Array, key: str, columns: list[str]) -> list[pa.Table]:
    """Returns the rows of a file whose `key` is one of those `wanted`, by row groups."""

    def read() -> list[pa.Table]:
        found = []
        with files.open_input(path) as data, pq.ParquetFile(data) as file:
            for group in range(file.num_row_groups):
                keys = file.read_row_group(group, [key])[key]
                at = np.flatnonzero(pc.is_in(keys, value_set=wanted))
                if len(at):
                    found.append(take(plain(file.read_row_group(group, columns)), at))
        return found

    return patiently(path, read)


def read_parquet(path: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Reads one of our own files; the folder's name never becomes a column."""

    def read() -> pa.Table:
        with files.open_input(path) as data, pq.ParquetFile(data) as file:
            return plain(file.read(columns=None if columns is None else list(columns)))

    return patiently(path, read)


def to_be_made(folder: str, shards: int) -> Partition:
    """Returns the partition that a job will have made in `folder`: receipts will tell its names."""
    names = [os.path.basename(_receipt_path(folder, shard, shards)) for shard in range(shards)]
    return Partition(folder, {"files": [{"receipt": name} for name in names]})


def find_staged(folder: str) -> Partition | None:
    """Returns the partition that was made in `folder` but not published yet, None for none."""
    path = os.path.join(folder, STAGED)
    manifest = files.read_if_there(path)
    return None if manifest is None else Partition(folder, parse_json(path, manifest))


def find_published(folder: str) -> Partition | None:
    """Returns the partition that is published: `_SUCCESS` names the manifest that lies beside it.

    Returns None where there is none, or one is being replaced just now. Raises DataContractError
    where the manifest is damaged.
    """
    success = files.read_if_there(os.path.join(folder, SUCCESS))
    path = os.path.join(folder, MANIFEST)
    manifest = None if success is None else files.read_if_there(path)
    if success is None or manifest is None:
        return None
    if success.decode(errors="replace").strip() != hashlib.sha256(manifest).hexdigest():
        return None
    return Partition(folder, parse_manifest(path, manifest))


def parse_manifest(path: str, data: bytes) -> dict[str, Any]:
    """Returns what a manifest says; raises DataContractError where it names no version."""
    manifest = parse_json(path, data)
    if isinstance(manifest, dict) and isinstance(manifest.get("version"), str):
        return manifest
    raise DataContractError(
        f"{path} should name the version of its table and does not, so that nobody can tell what "
        "belongs to it. It was written by COURIER and has since been damaged: restore it, or "
        "delete that file, and run the command again."
    )


def is_published(folder: str) -> bool:
    """Returns whether a whole partition is published in `folder` at this moment."""
    return find_published(folder) is not None


def published_version(folder: str) -> str | None:
    """Returns the version of what is published in `folder`, None where nothing is."""
    found = find_published(folder)
    return None if found is None else str(found.manifest["version"])


def open_published(folder: str) -> Partition:
    """Returns what is published in `folder`; raises InputNotReady where nothing whole is."""
    found = find_published(folder)
    if found is None:
        raise InputNotReady(
            f"No published partition at {folder}: it has not been made yet, or is being replaced "
            "just now. Run the command that makes it, or ask again later."
        )
    return found


def version_of(manifest: Mapping[str, Any]) -> str:
    """Returns the version of a partition, published or yet to be.

    It is a digest of what readers get, all rows and whose they are: what was made again from other
    inputs and came out the same has the same version.
    """
    if "version" in manifest:
        return str(manifest["version"])
    who = [manifest.get(key) for key in ("table", "ds", "feature_set", "identities")]
    return digest([who, [[file["rows"], file["sha256"]] for file in manifest["files"]]])[:12]


def cluster_numbers(
    features: Partition, shard: int, shards: int, ids: pa.ChunkedArray, labels: Sequence[str]
) -> dict[str, np.ndarray]:
    """Returns by label the cluster ID of each of some `ids` of a shard; int32 [n], 0 for none.

    They are those in `item_features`.
    """
    columns = {label: cluster_column(label) for label in labels}
    rows = features.read_shard(shard, shards, "item_id", ["item_id", *columns.values()])
    return {label: lookup(ids, rows, column) for label, column in columns.items()}
