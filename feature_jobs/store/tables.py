"""Tables as files: parts written out of sight, partitions as readers see them, identities.

A job writes each shard of a table as one Parquet *part* with a *receipt* beside it (rows, bytes,
sha256, counts). The receipt comes last, so a part with a receipt is whole, and a job that died is
resumed by leaving out the shards that have one. A *partition* is what the manifest lists, and
nothing else that may lie in its folder.
"""

import functools
import hashlib
import json
import os
import re
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from feature_jobs.schemas import (
    EMBEDDING_DIM,
    CourierError,
    DataContractError,
    InputNotReady,
    OperatorError,
    Table,
    cluster_column,
)
from feature_jobs.store import files, hashing

MANIFEST = "_manifest.json"
SUCCESS = "_SUCCESS"
STAGED = "_staged.json"
_ROW_GROUP_ROWS = 32_768
_RECEIPT_READERS = 16
# As Python prints one, and Beam goes on.
_IN_TRACEBACK = rf"^{re.escape(CourierError.__module__)}\.(\w+): (.+?)(?: \[while running .*\])?$"


# ---- JSON and identities -------------------------------------------------------------------


def canonical_json(value: Any) -> bytes:
    """One spelling per value: sorted keys, no spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def digest(value: Any) -> str:
    """sha256 of the canonical JSON of `value`, hex."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def write_json(path: str, value: Any) -> None:
    files.write_bytes(path, json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n")


def read_json(path: str) -> Any:
    """Raises FileNotFoundError, or DataContractError where the file is not JSON."""
    try:
        return json.loads(files.read_bytes(path))
    except ValueError as error:
        raise DataContractError(
            f"{path} should be JSON but cannot be parsed ({error}). It was written by COURIER and "
            "has since been damaged: restore it, or delete its folder and run the command again."
        ) from error


@dataclass(frozen=True)
class EncoderInfo:
    """What `encoder.json` says of an encoder package, readable without torch.

    `categories` None means that every category is in scope. The data range is that of the training
    data, both ends inclusive; None for an encoder that was made without any.
    """

    encoder_id: str
    backbone: str
    preprocessing: dict[str, Any]
    categories: tuple[str, ...] | None
    data_start_ds: str | None
    data_end_ds: str | None
    weights: str


def read_encoder_info(folder: str) -> EncoderInfo:
    """Raises OperatorError where `folder` is no encoder package."""
    path = os.path.join(folder, "encoder.json")
    try:
        fields = read_json(path)
        categories = fields["categories"]
        fields["categories"] = None if categories is None else tuple(categories)
        return EncoderInfo(**fields)
    except (FileNotFoundError, NotADirectoryError, TypeError, KeyError) as error:
        raise OperatorError(
            f"{folder!r} is no encoder package: {path} is missing or lacks a field ({error!r}). "
            "Point at a folder made by `courier init-encoder`."
        ) from error


def write_encoder_info(folder: str, info: EncoderInfo) -> None:
    write_json(os.path.join(folder, "encoder.json"), asdict(info))


def in_scope(category: pa.ChunkedArray, categories: Sequence[str] | None) -> np.ndarray:
    """Which items an encoder was made for, bool [n]; a null category only where all are in scope.

    COURIER appendix §7: features of categories that it was not trained on are filled with zero.
    """
    if categories is None:
        return np.ones(len(category), bool)
    return pc.is_in(category, value_set=pa.array(categories, pa.string())).to_numpy()


def fitted_on(rows: pa.Table, categories: Sequence[str] | None) -> np.ndarray:
    """Which rows of `item_embeddings` codebooks are made of, bool [n]: those in the catalogue and
    in scope."""
    return in_scope(rows["category"], categories) & rows["in_catalogue"].to_numpy()


def check_unit(points: np.ndarray, ids: pa.ChunkedArray) -> None:
    """Raises DataContractError where `points` float32 [n, 256], those of item `ids` [n], are not
    finite unit vectors."""
    square = np.einsum("nd,nd->n", points, points)
    bad = np.flatnonzero(~(np.abs(square - 1) < 2e-3))  # written so that NaN counts as bad
    if len(bad):
        raise DataContractError(
            f"item_embeddings holds {len(bad):,} rows whose embedding is no finite unit vector of "
            f"{EMBEDDING_DIM} floats, for example that of item_id {ids[int(bad[0])]}. Distances to "
            "it mean nothing, and its cluster ID would be arbitrary. Run `courier embed --full` "
            "for this ds."
        )


# ---- Arrow and numpy -----------------------------------------------------------------------


def list_column(matrix: np.ndarray, type: pa.DataType) -> pa.Array:
    """The rows of `matrix` [n, m] as a list column of `type`, without a copy of the values."""
    n, m = matrix.shape
    offsets = pa.array(np.arange(0, n * m + 1, m, dtype=np.int32) if m else np.zeros(n + 1, "i4"))
    values = pa.array(np.ascontiguousarray(matrix).reshape(-1), type=type.value_type)
    return pa.ListArray.from_arrays(offsets, values, type=type)


def embedding_matrix(column: pa.ChunkedArray) -> np.ndarray:
    """The list column `embedding` as float32 [n, 256]; read-only, where it needs no copy."""
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return flat.astype(np.float32, copy=False).reshape(-1, EMBEDDING_DIM)


def lookup(
    ids: pa.Array | pa.ChunkedArray, rows: pa.Table, column: str, key: str = "item_id"
) -> np.ndarray:
    """The integer in `column` of the row that has each of `ids` as `key`, 0 for none; [n]."""
    at = pc.index_in(ids, value_set=rows[key].combine_chunks())
    return pc.fill_null(rows[column].take(at), 0).to_numpy()


def to_ipc(table: pa.Table) -> bytes:
    """A table as bytes for a shuffle: only the table's own rows, even when it is a slice."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def from_ipc(chunks: Iterable[bytes], otherwise: pa.Table) -> pa.Table:
    """The rows of all chunks, b"" holding none; `otherwise` where no chunk holds any."""
    found = [pa.ipc.open_stream(chunk).read_all() for chunk in chunks if chunk]
    return pa.concat_tables(found) if found else otherwise


def split_by_shard(table: pa.Table, key: str, shards: int) -> Iterator[tuple[int, bytes]]:
    """The rows of `table` by the hash of their `key`: (shard, IPC bytes), for a shuffle."""
    if not len(table):
        return  # an empty row group, as writers leave in the file of an empty day
    shard = hashing.shard_of(hashing.hash_ids(table[key]), shards)
    order = np.argsort(shard, kind="stable")
    table, shard = table.take(pa.array(order)), shard[order]
    starts = np.flatnonzero(np.diff(shard, prepend=-1))
    for start, end in zip(starts, [*starts[1:], len(shard)], strict=True):
        yield int(shard[start]), to_ipc(table.slice(start, end - start))


# ---- Parts ---------------------------------------------------------------------------------


def part_name(shard: int, shards: int) -> str:
    return f"part-{shard:05d}-of-{shards:05d}"


def _receipt_path(folder: str, shard: int, shards: int) -> str:
    return os.path.join(folder, "receipts", part_name(shard, shards) + ".json")


def has_part(folder: str, shard: int, shards: int) -> bool:
    """Whether this shard was written whole, by this run or by one that died."""
    return files.exists(_receipt_path(folder, shard, shards))


def write_part(
    folder: str, table: Table, schema: pa.Schema, rows: pa.Table, shard: int, shards: int,
    counts: dict[str, int] | None = None, work: dict[str, float] | None = None,
) -> None:  # fmt: skip
    """Writes one shard of `table` and its receipt; `rows` are sorted as `table` says here.

    `counts` are the same whenever the shard is made again; `work` is what it cost this time.
    Raises DataContractError for a null where `schema` allows none.
    """
    rows = in_order(
        pa.Table.from_arrays(
            [rows[field.name].cast(field.type) for field in schema], schema=schema
        ),
        [table.key, *table.then_by],
    )
    for field in schema:
        if not field.nullable and rows[field.name].null_count:
            key = rows[table.key].filter(pc.is_null(rows[field.name]))[0]
            example = "a row" if table.key == "user_id" else f"the row of {table.key} {key}"
            raise DataContractError(
                f"{table.name}.{field.name} must not be null but is in {example}; whoever joins "
                "the table counts on it. This is a fault of COURIER: please report it."
            )
    name = part_name(shard, shards) + ".parquet"
    path = os.path.join(folder, name)
    size, sha256 = write_parquet(path, rows)
    receipt = {
        "name": name,
        "rows": len(rows),
        "bytes": size,
        "sha256": sha256,
        "counts": counts or {},
        "work": work or {},
    }
    write_json(_receipt_path(folder, shard, shards), receipt)


def in_order(rows: pa.Table, keys: Sequence[str]) -> pa.Table:
    """`rows` in ascending order of `keys`; as they are where they stand so already."""
    first = rows[keys[0]]
    if len(keys) == 1 and pc.all(pc.less_equal(first[:-1], first[1:])).as_py():
        return rows  # looked at without sorting, which takes thirty times as long
    order = pc.sort_indices(rows, [(key, "ascending") for key in keys])
    stands = np.array_equal(order.to_numpy(), np.arange(len(rows)))
    return rows if stands else rows.take(order)


def write_parquet(path: str, rows: pa.Table) -> tuple[int, str]:
    """One Parquet file, zstd; no dictionary pages for lists of floats, which never repeat, and no
    statistics of lists, which nobody filters by.

    Returns its bytes and their sha256, hex.
    """
    flat = [f.name for f in rows.schema if not pa.types.is_nested(f.type)]
    # In memory first: a writer that is interrupted at its file complains when it is thrown away.
    sink = pa.BufferOutputStream()
    pq.write_table(
        rows, sink, compression="zstd", row_group_size=_ROW_GROUP_ROWS, use_dictionary=flat,
        write_statistics=flat,
    )  # fmt: skip
    data = sink.getvalue()
    files.write_bytes(path, data)
    return data.size, hashlib.sha256(data).hexdigest()


def receipts(folder: str) -> list[dict[str, Any]]:
    """The receipts of all parts written so far, in shard order."""
    at = os.path.join(folder, "receipts")
    with ThreadPoolExecutor(_RECEIPT_READERS) as pool:
        return list(pool.map(lambda n: read_json(os.path.join(at, n)), files.list_names(at)))


def sum_counts(parts: Iterable[dict[str, Any]], what: str = "counts") -> dict[str, Any]:
    """The "counts", or the "work", of all parts, added up by name."""
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part[what])
    return dict(sorted(total.items()))


# ---- Partitions ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Partition:
    """A whole table of one ds: its folder and the manifest that says which files are it."""

    folder: str
    manifest: dict[str, Any]

    @property
    def paths(self) -> list[str]:
        return [os.path.join(self.folder, file["name"]) for file in self.manifest["files"]]

    @property
    def rows(self) -> int:
        return sum(file["rows"] for file in self.manifest["files"])

    @property
    def run_id(self) -> str:
        return str(self.manifest["run_id"])

    @property
    def schema(self) -> pa.Schema:
        with files.open_input(self.paths[0]) as file:
            return pq.read_schema(file)

    def slim(self) -> "Partition":
        """What a worker needs of it: whole manifests of many days and files would make a job too
        large to be submitted."""
        files = [{"name": file["name"], "rows": file["rows"]} for file in self.manifest["files"]]
        return Partition(self.folder, {"files": files})

    def read_shard(
        self, shard: int, shards: int, key: str, columns: Sequence[str] | None = None
    ) -> pa.Table:
        """The rows whose `key` falls into the hash range of `shard` of `shards`.

        The table must be sharded by that key. Reads one file, or the few that overlap the range.
        """
        paths = self.paths
        needed = [paths[i] for i in hashing.overlapping_shards(shard, shards, len(paths))]
        rows = pa.concat_tables(read_parquet(path, columns) for path in needed)
        if len(paths) >= shards:
            return rows
        mine = hashing.shard_of(hashing.hash_ids(rows[key]), shards) == shard
        return rows.filter(pa.array(mine))


def read_parquet(path: str, columns: Sequence[str] | None = None) -> pa.Table:
    """One of our own files; the folder's name never becomes a column."""
    with files.open_input(path) as data, pq.ParquetFile(data) as file:
        return plain(file.read(columns=None if columns is None else list(columns)))


def plain(rows: pa.Table) -> pa.Table:
    """The columns alone: "not null" and comments belong to a file and hinder joining rows."""
    return pa.table(dict(zip(rows.column_names, rows.columns, strict=True)))


def empty_rows(schema: pa.Schema) -> pa.Table:
    return plain(schema.empty_table())


def open_staged(folder: str) -> Partition:
    """A partition that was made but not yet published; raises FileNotFoundError where none is."""
    return Partition(folder, read_json(os.path.join(folder, STAGED)))


def is_published(folder: str) -> bool:
    """Whether `_SUCCESS` stands and names the manifest that lies beside it."""
    try:
        success = files.read_bytes(os.path.join(folder, SUCCESS)).decode().strip()
        manifest = files.read_bytes(os.path.join(folder, MANIFEST))
    except FileNotFoundError:
        return False
    return success == hashlib.sha256(manifest).hexdigest()


def open_published(folder: str) -> Partition:
    """Raises InputNotReady where no whole partition is published at this moment."""
    if not is_published(folder):
        raise InputNotReady(
            f"No published partition at {folder}: it has not been made yet, or is being replaced "
            "just now. Run the command that makes it, or ask again later."
        )
    return Partition(folder, read_json(os.path.join(folder, MANIFEST)))


def cluster_numbers(
    features: Partition, shard: int, shards: int, ids: pa.ChunkedArray, labels: Sequence[str]
) -> dict[str, np.ndarray]:
    """By label, the cluster ID in `item_features` of each of some `ids` of a shard, 0 for none;
    int32 [n]."""
    columns = {label: cluster_column(label) for label in labels}
    rows = features.read_shard(shard, shards, "item_id", ["item_id", *columns.values()])
    return {label: lookup(ids, rows, column) for label, column in columns.items()}


# ---- What workers tell the launcher ----------------------------------------------------------


def refusing(process: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Iterator[Any]]:
    """Makes the `process` of a DoFn leave a CourierError where the launcher finds it.

    The DoFn has its staging folder as `staging`. Once anything there was refused, the job runs to
    its end without doing more, and the launcher raises the error word for word. Raised in a worker
    it would be tried again, and reach the operator as a traceback within a traceback.
    """

    @functools.wraps(process)
    def guarded(self: Any, element: Any) -> Iterator[Any]:
        errors = os.path.join(self.staging, "errors")
        if files.list_names(errors):
            return
        try:
            yield from process(self, element) or ()
        except CourierError as error:
            found = {"kind": type(error).__name__, "message": str(error)}
            write_json(os.path.join(errors, digest(found)[:12] + ".json"), found)

    return guarded


def refused(staging: str) -> list[CourierError]:
    """All that was refused below `staging`."""
    errors = os.path.join(staging, "errors")
    found = [read_json(os.path.join(errors, name)) for name in files.list_names(errors)]
    return [_courier_error(error["kind"], error["message"]) for error in found]


def _courier_error(kind: str, message: str) -> CourierError:
    kinds = {kind.__name__: kind for kind in CourierError.__subclasses__()}
    return kinds.get(kind, CourierError)(message)


def courier_error_in(error: BaseException) -> CourierError | None:
    """The first CourierError of those that led to `error`: Beam adds words of its own to the later
    ones, and of other processes it gives the traceback as text."""
    told = re.search(_IN_TRACEBACK, str(error), re.MULTILINE)
    found = _courier_error(*told.groups()) if told else None
    at: BaseException | None = error
    while at is not None:
        if isinstance(at, CourierError):
            found = _courier_error(type(at).__name__, str(at))
        at = at.__cause__ or at.__context__
    return found


def warn(staging: str, message: str) -> None:
    """Leaves a warning where the launcher finds it; the same one of many workers counts once."""
    name = hashlib.sha256(message.encode()).hexdigest()[:12]
    write_json(os.path.join(staging, "warnings", name + ".json"), {"message": message})


def warnings(staging: str) -> list[str]:
    """What workers warned of below `staging`."""
    folder = os.path.join(staging, "warnings")
    return [read_json(os.path.join(folder, n))["message"] for n in files.list_names(folder)]


class Heartbeat:
    """Counts of one worker thread, as a file that the launcher adds up with all others.

    Written every two seconds at most, so that a fast worker does not spend its time on telling.
    """

    _SECONDS = 2.0

    def __init__(self, staging: str):
        self._folder = os.path.join(staging, "progress")
        self._name: str | None = None  # known to the worker alone: workers begin as copies
        self._counts: dict[str, float] = {}
        self._written = 0.0

    def add(self, **counts: float) -> None:
        for name, count in counts.items():
            self._counts[name] = self._counts.get(name, 0) + count
        if time.monotonic() - self._written > self._SECONDS:
            self.write()

    def write(self) -> None:
        self._name = self._name or uuid.uuid4().hex[:12] + ".json"
        write_json(os.path.join(self._folder, self._name), self._counts)
        self._written = time.monotonic()
