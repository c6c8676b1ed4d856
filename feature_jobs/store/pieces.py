"""Hands rows from one step of a job to another, by way of files.

What travels through Beam is a reference, a *piece*: one record batch of an Arrow file below the
staging folder. Local engines keep shuffles in memory, and bulk does not belong into any.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import IO, NamedTuple

import numpy as np
import pyarrow as pa

from feature_jobs.store import documents, files, memory_files
from feature_jobs.store.arrays import plain, take
from feature_jobs.store.faults import until_seen
from feature_jobs.store.partitions import MadeFrom

_READERS = 32  # a remote store takes tens of milliseconds for each file


class Piece(NamedTuple):
    """A piece is a record batch of an Arrow file, known by its number, of so many `rows`."""

    path: str
    batch: int
    rows: int


def write_pieces(
    path: str, rows: pa.Table, keys: np.ndarray, compression: str | None = "lz4",
    known_by: Sequence[str] = (),
) -> Iterator[tuple[int, Piece]]:  # fmt: skip
    """Writes `rows` to one file, in a piece for each distinct one of `keys` int [n].

    Yields each key with its piece. Rows of one key keep their order. The file is called
    `<path>-<digest of its content>.arrow`: a second attempt that finds other rows must not change
    those that the first one's references stand for. Where rows are `known_by` some columns, which
    tell all others, the digest is of these alone.
    """
    if not len(rows):
        return
    if (keys[1:] < keys[:-1]).any():
        order = np.argsort(keys, kind="stable")
        rows, keys = take(rows, order), keys[order]
    if any(column.num_chunks > 1 for column in rows.columns):  # combining copies a single one too
        rows = rows.combine_chunks()
    starts = np.flatnonzero(np.diff(keys, prepend=-1))
    sizes = np.diff(starts, append=len(keys))
    data = _as_file(rows, starts, sizes, compression)
    telling = _as_file(rows.select(known_by), starts, sizes, None) if known_by else data
    name = f"{path}-{hashlib.sha256(telling).hexdigest()[:16]}.arrow"
    files.write_bytes(name, data)
    for number, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        yield int(keys[start]), Piece(name, number, int(size))


def _as_file(
    rows: pa.Table, starts: np.ndarray, sizes: np.ndarray, compression: str | None
) -> pa.Buffer:
    """Returns the bytes of an Arrow file: a record batch of `sizes` rows from each of `starts`."""
    # The histories of neighbours repeat: lz4 makes a fifth of them at the speed of a network.
    options = pa.ipc.IpcWriteOptions(compression=compression, use_threads=False)

    def write(sink: pa.NativeFile) -> None:
        with pa.ipc.new_file(sink, rows.schema, options=options) as writer:
            for start, size in zip(starts, sizes, strict=True):
                writer.write_table(rows.slice(start, size))

    return memory_files.written(rows.nbytes, write)


def write_piece(path: str, rows: pa.Table) -> Piece | None:
    """Writes all rows as one piece; returns None where there are none."""
    pieces = write_pieces(path, rows, np.zeros(len(rows), np.int64))
    return next((piece for _, piece in pieces), None)


def made_from(pieces: Iterable[Piece]) -> MadeFrom:
    """Returns what a receipt says of the pieces that a part was made from."""
    # The digest in a name is of all rows of the file: which job wrote it, and where, says nothing.
    found = sorted((piece.path.rpartition("-")[2], piece.batch, piece.rows) for piece in pieces)
    return MadeFrom(len(found), sum(rows for *_, rows in found), documents.digest(found))


def read_pieces(
    pieces: Iterable[Piece | bytes], otherwise: pa.Table, columns: Sequence[str] | None = None
) -> pa.Table:
    """Reads the rows of all pieces, in an order that does not depend on theirs.

    b"" has no rows; where there is no piece, the rows are `otherwise`. Only `columns` are read, in
    the order that they have there; None means all.
    """
    found = sorted(piece for piece in pieces if isinstance(piece, Piece))
    files = [
        (path, [piece.batch for piece in of_file], columns)
        for path, of_file in groupby(found, key=lambda piece: piece.path)
    ]
    if not files:
        return otherwise
    if len(files) == 1:  # for a small day threads would take longer than its file
        return _read_batches(*files[0])
    with ThreadPoolExecutor(_READERS) as pool:
        return pa.concat_tables(pool.map(lambda file: _read_batches(*file), files))


def read_each(pieces: Sequence[Piece]) -> Iterator[pa.Table]:
    """Yields the rows of one piece after the other, some of which are read ahead."""
    with ThreadPoolExecutor(_READERS) as pool:
        for at in range(0, len(pieces), _READERS):
            some = pieces[at : at + _READERS]
            yield from pool.map(lambda piece: _read_batches(piece.path, [piece.batch], None), some)


def _read_batches(path: str, numbers: list[int], columns: Sequence[str] | None) -> pa.Table:
    """Reads pieces of a file, which is there: whoever has a reference has it from its writer.

    Where a second attempt writes the file once more, a mount may say of the open one that it is
    stale.
    """

    def read() -> pa.Table:
        with files.open_input(path) as file:
            wanted = None if columns is None else _places(file, columns)
            options = pa.ipc.IpcReadOptions(included_fields=wanted)
            with pa.ipc.open_file(file, options=options) as reader:
                return plain(pa.Table.from_batches([reader.get_batch(n) for n in numbers]))

    return until_seen(path, read)


def _places(file: IO[bytes], columns: Sequence[str]) -> list[int]:
    """Returns the places of some columns in a file of pieces."""
    names = pa.ipc.open_file(file).schema.names
    return [names.index(name) for name in columns]


def read_all(path: str) -> pa.Table:
    """Reads all rows of a file of pieces."""
    with files.open_input(path) as file, pa.ipc.open_file(file) as reader:
        return plain(reader.read_all())
