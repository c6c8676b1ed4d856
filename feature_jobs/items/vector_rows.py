"""Turns a shop's own vectors into embeddings: what each item has, and what is wrong with it.

Everything here is pure and knows no files. What an item has is known by the sha256 of its vector's
bytes as float32, as an image is by that of its file.
"""

import datetime as dt
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_jobs.inputs import CATALOGUE_COLUMNS, is_bytes
from feature_jobs.items import embed_plan
from feature_jobs.items.embed_plan import REJECTED, TO_READ, UNCHANGED, WAITING
from feature_jobs.items.embed_walk import NO_VECTOR, RESULT_ROW, Tables, WalkedDay
from feature_jobs.schemas import TIMESTAMP
from feature_jobs.store import arrays

WRONG_LENGTH, NOT_FINITE, ZERO, AMBIGUOUS = "wrong_length", "not_finite", "zero", "ambiguous"
REASONS = (NO_VECTOR, WRONG_LENGTH, NOT_FINITE, ZERO, AMBIGUOUS)
_UNIT = 1e-5  # so far from 1 a length may be that is left as it is
_SMALL, _LARGE = 1e-15, 1e15  # between which squares are exact enough in float32
_BLOCK = 4_096  # rows that are brought to length 1 at a time, while they are in a cache
_FLOAT_BYTES = 4


# ---- As they were read -------------------------------------------------------------------------


def rows_schema(item_id: pa.DataType, dimension: int) -> pa.Schema:
    """Returns the schema of `checked`: a row has a vector, or the reason why it has none.

    The columns beside `vector` tell which one it is: `image_sha256` is the digest of its bytes.
    `length` is that of the vector less the centre.
    """
    return pa.schema(
        [
            ("item_id", item_id),
            ("vector", pa.binary(_FLOAT_BYTES * dimension)),
            ("length", pa.float64()),
            ("reason", pa.string()),
            ("message", pa.string()),
            ("image_sha256", pa.string()),
        ]
    )


def checked(rows: pa.Table, dimension: int, centre: np.ndarray | None = None) -> pa.Table:
    """Returns `rows` (item_id, vector) in the columns of `rows_schema`, row by row.

    Vectors are lists of floats, or bytes of float32, little-endian; they become float32 as bytes.
    One that is the `centre` float32 [dimension], if any, is as useless as one of zeros.
    """
    column = arrays.whole(rows["vector"])
    sizes = _sizes(column)
    fits = np.flatnonzero(sizes == dimension)
    vectors = _as_floats(column if fits.size == len(rows) else column.take(pa.array(fits)))
    lengths, is_zero = _lengths(vectors, centre), _are_zero(vectors)
    finite, is_centre = np.isfinite(lengths), ~is_zero & (lengths == 0)
    reason = np.full(len(rows), WRONG_LENGTH, object)
    reason[sizes == -1] = NO_VECTOR
    reason[fits] = None
    reason[fits[~finite]] = NOT_FINITE
    reason[fits[is_zero | is_centre]] = ZERO
    message = _messages(reason, sizes, dimension)
    message[fits[is_centre]] = "it is the centre, less which it has no direction"
    is_good = finite & ~is_zero & ~is_centre
    good = fits[is_good]
    if good.size < fits.size:
        vectors, lengths = vectors[is_good], lengths[is_good]
    digests = [hashlib.sha256(row).hexdigest() for row in _byte_rows(vectors)]
    found = {
        "vector": _as_bytes(vectors, dimension),
        "length": pa.array(lengths),
        "image_sha256": pa.array(digests, pa.string()),
    }
    told = {"reason": pa.array(reason, pa.string()), "message": pa.array(message, pa.string())}
    columns = {name: _spread(values, good, len(rows)) for name, values in found.items()} | told
    schema = rows_schema(rows["item_id"].type, dimension)
    return pa.table({"item_id": rows["item_id"]} | columns).select(schema.names)


def sizes_of(rows: pa.Table) -> np.ndarray:
    """Returns how many numbers each vector of `rows` has; below 0 for none; int64 [n]."""
    return _sizes(arrays.whole(rows["vector"]))


def _sizes(column: pa.Array) -> np.ndarray:
    """Returns how many numbers each row has, int64 [n]; -1 for a null, -2 for half a number."""
    if is_bytes(column.type):
        found = pc.fill_null(pc.binary_length(column), -_FLOAT_BYTES).cast(pa.int64()).to_numpy()
        return np.where(found % _FLOAT_BYTES, -2, found // _FLOAT_BYTES)
    lengths = pc.list_value_length(column).cast(pa.int64())
    return pc.fill_null(lengths, -1).to_numpy(zero_copy_only=False)


def _as_floats(column: pa.Array) -> np.ndarray:
    """Returns vectors of one length as float32 [n, d]; a null among their numbers is no number."""
    if not len(column):
        return np.zeros((0, 1), np.float32)
    if is_bytes(column.type):
        fixed = column.cast(pa.binary(len(column[0].as_py())))
        return _of_fixed(fixed)
    values = column.flatten().cast(pa.float32(), safe=False)
    return values.to_numpy(zero_copy_only=False).reshape(len(column), -1)


def _of_fixed(column: pa.FixedSizeBinaryArray) -> np.ndarray:
    """Returns bytes of one width as float32 [n, width / 4]; no value is copied.

    Rows of nulls hold anything.
    """
    width = column.type.byte_width
    count, start = len(column) * width // _FLOAT_BYTES, column.offset * width
    flat = np.frombuffer(column.buffers()[1], "<f4", count, start) if count else np.zeros(0, "<f4")
    return flat.reshape(-1, width // _FLOAT_BYTES)


def _byte_rows(vectors: np.ndarray) -> np.ndarray:
    """Returns float32 [n, d] as bytes, little-endian; nothing is copied that lies in one piece."""
    return np.ascontiguousarray(vectors, "<f4").view(np.uint8)


def _as_bytes(vectors: np.ndarray, dimension: int) -> pa.Array:
    """Returns float32 [n, d] as bytes of one width."""
    data = pa.py_buffer(_byte_rows(vectors))
    return pa.Array.from_buffers(pa.binary(_FLOAT_BYTES * dimension), len(vectors), [None, data])


def _spread(values: pa.Array, places: np.ndarray, n: int) -> pa.Array:
    """Returns n rows with `values` at their `places`, ascending, and nulls between them."""
    if len(values) == n:
        return values
    at = np.zeros(n, np.int64)
    at[places] = np.arange(len(places))
    missing = np.ones(n, bool)
    missing[places] = False
    return values.take(pa.array(at, mask=missing))


def _messages(reason: np.ndarray, sizes: np.ndarray, dimension: int) -> np.ndarray:
    told = np.full(len(reason), None, object)
    told[reason == NO_VECTOR] = "its vector is null"
    told[reason == NOT_FINITE] = "some of its numbers are infinite, too large for float32, or none"
    told[reason == ZERO] = "all its numbers are 0, which has no direction"
    for at in np.flatnonzero(reason == WRONG_LENGTH):
        found = f"{sizes[at]:,} numbers" if sizes[at] >= 0 else "bytes that are no whole float32"
        told[at] = f"it has {found}, where the encoder has {dimension:,}"
    return told


# ---- One of each item --------------------------------------------------------------------------


def one_of_each(found: pa.Table) -> pa.Table:
    """Returns rows as `described` gives them with each item once, in the order of items.

    An item that has two different vectors is rejected: which of them counts cannot be told.
    """
    # Of rows without a vector the reason is that of the first, wherever it came from.
    found = found.sort_by([(name, "ascending") for name in ("item_id", "reason", "message")])
    ids = found["item_id"]
    is_first = np.ones(len(found), bool)
    if len(found) > 1:
        is_first[1:] = pc.not_equal(ids[1:], ids[:-1]).to_numpy()
    if is_first.all():
        return found
    first, again = np.flatnonzero(is_first), np.flatnonzero(~is_first)
    differ = again[_differ(found["image_sha256"], again)]
    is_ambiguous = np.zeros(len(first), bool)
    is_ambiguous[np.searchsorted(first, differ, side="right") - 1] = True
    found, bad = found.take(pa.array(first)), pa.array(is_ambiguous)
    told = {
        "image_sha256": pc.if_else(bad, pa.scalar(None, pa.string()), found["image_sha256"]),
        "reason": pc.if_else(bad, AMBIGUOUS, found["reason"]),
        "message": pc.if_else(bad, "it stands there twice or more, differently", found["message"]),
    }
    return pa.table({"item_id": found["item_id"], **told, RESULT_ROW: found[RESULT_ROW]})


def _differ(values: pa.ChunkedArray, rows: np.ndarray) -> np.ndarray:
    """Tells which of some rows differ from the one before them, where two nulls are equal."""
    one, two = (pc.fill_null(values.take(pa.array(at)), "") for at in (rows - 1, rows))
    return pc.not_equal(one, two).to_numpy()


# ---- As embeddings -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Taken:
    """Holds vectors as they were read, in `parts` float32 [m, d], and what is known of them.

    Rows are numbered through all parts. `lengths` float64 [n] are those of the vectors less the
    `centre` float32 [d], if any.
    """

    parts: Sequence[np.ndarray]
    lengths: np.ndarray
    centre: np.ndarray | None
    dimension: int

    @classmethod
    def of(cls, rows: pa.Table, dimension: int, centre: np.ndarray | None) -> "Taken":
        """Takes rows as `checked` gives them; no vector is copied."""
        parts = [_of_fixed(chunk).reshape(-1, dimension) for chunk in rows["vector"].chunks]
        return cls(parts, rows["length"].to_numpy(), centre, dimension)

    def write_embeddings(self, rows: np.ndarray, into: np.ndarray, places: np.ndarray) -> None:
        """Writes the vectors in some rows `into` some places of a matrix, each at length 1.

        One that has that length stays as it is, so that our own embeddings come out as they went
        in.
        """
        for at, vectors in self._in_blocks(rows):
            lengths = self.lengths[rows[at]]
            lengths[np.abs(lengths - 1) < _UNIT] = 1.0
            with np.errstate(over="ignore", invalid="ignore"):
                less = _less(vectors, self.centre) / lengths[:, None].astype(np.float32)
            odd = np.flatnonzero(_are_odd(lengths))
            exact = _less(vectors[odd].astype(np.float64), self.centre)
            less[odd] = exact / lengths[odd, None]
            into[places[at]] = less

    def _in_blocks(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields places in `rows`, and the vectors of the rows there, float32 [m, d].

        That is in the order of the vectors, and so few at a time that they stay in a cache.
        """
        starts = np.cumsum([0, *map(len, self.parts)])
        order = np.argsort(rows, kind="stable")
        in_parts = np.split(order, np.searchsorted(rows, starts[1:-1], sorter=order))
        for part, start, some in zip(self.parts, starts[:-1], in_parts, strict=False):
            for first in range(0, len(some), _BLOCK):
                at = some[first : first + _BLOCK]
                yield at, part[_in_a_row(rows[at] - start)]


def _in_a_row(rows: np.ndarray) -> np.ndarray | slice:
    """Returns ascending `rows`, as a slice where none is left out: what it takes is no copy."""
    is_whole = len(rows) and rows[-1] - rows[0] == len(rows) - 1
    return slice(rows[0], rows[-1] + 1) if is_whole else rows


def _less(vectors: np.ndarray, centre: np.ndarray | None) -> np.ndarray:
    return vectors if centre is None else vectors - centre


def _lengths(vectors: np.ndarray, centre: np.ndarray | None) -> np.ndarray:
    """Returns the length of each vector less the centre; float64 [n], finite where it is."""
    found = np.empty(len(vectors))
    with np.errstate(over="ignore", invalid="ignore"):
        for first in range(0, len(vectors), _BLOCK):
            block = slice(first, first + _BLOCK)
            found[block] = _norms(_less(vectors[block], centre))
            odd = first + np.flatnonzero(_are_odd(found[block]))
            found[odd] = _norms(_less(vectors[odd].astype(np.float64), centre))
    return found


def _norms(vectors: np.ndarray) -> np.ndarray:
    return np.sqrt(np.einsum("ij,ij->i", vectors, vectors))


def _are_zero(vectors: np.ndarray) -> np.ndarray:
    """Tells which vectors have zeros alone; bool [n]."""
    found = vectors[:, 0] == 0
    found[found] = ~vectors[found].any(axis=1)
    return found


def _are_odd(lengths: np.ndarray) -> np.ndarray:
    """Tells which vectors are computed with in double precision; bool [n].

    Their squares leave what float32 holds, or they themselves do, less the centre.
    """
    return ~((lengths > _SMALL) & (lengths < _LARGE))


def matrix_of(vectors: pa.ChunkedArray, dimension: int) -> np.ndarray:
    """Returns vectors as `checked` gives them as float32 [n, d]; rows of nulls hold anything."""
    return _of_fixed(arrays.whole(vectors)).reshape(-1, dimension)


# ---- A day -------------------------------------------------------------------------------------


def take_day(
    catalogue: pa.Table, before: Tables, vectors: pa.Table, ds: dt.date, window_days: int,
    reuse: bool, full: bool, dimension: int,
) -> WalkedDay:  # fmt: skip
    """Returns what becomes of the items of a shard; its rows point at those of `vectors`.

    `vectors` has the columns of `checked`, rows of other items too. `reuse` says whether the
    embeddings of `before` are of the same encoder: former items keep theirs then, and a reject
    waits as one of images does, as long as nothing better stands there and not all is made in
    `full`.
    """
    items = embed_plan.items_of_shard(catalogue, before.embeddings, ds, window_days)
    is_mine = pc.is_in(vectors["item_id"], value_set=arrays.whole(items["item_id"])).to_numpy()
    found = one_of_each(described(vectors, np.flatnonzero(is_mine)))
    mine = found.take(embed_plan.row_of(items, found))
    plan = _plan(items, mine, before, ds, reuse, reuse and not full, dimension)
    is_taken = pc.equal(plan["state"], TO_READ)
    outcomes = {
        name: pc.if_else(is_taken, mine[name], pa.scalar(None, mine[name].type))
        for name in ("image_sha256", RESULT_ROW)
    }
    names = [*embed_plan.VERSION_COLUMNS, "stage", "reason", "message"]
    nothing = {name: pa.nulls(len(plan), plan[name].type) for name in names[3:]}
    versions = {name: plan[name] for name in embed_plan.VERSION_COLUMNS}
    return WalkedDay(ds, before, plan, pa.table({**outcomes, **versions, **nothing}))


def with_embeddings(rows: pa.Table, taken: Taken, before: pa.Table) -> pa.Table:
    """Returns rows of `item_embeddings` in the order of their items, each with its `embedding`.

    It is of the vector that `result_row` points at, or without one as it was `before`.
    """
    rows = arrays.in_order(rows, ["item_id"])
    at, dimension = rows[RESULT_ROW], taken.dimension
    is_new = at.is_valid().to_numpy()
    found = np.empty((len(rows), dimension), np.float32)
    taken.write_embeddings(at.drop_null().to_numpy(), found, np.flatnonzero(is_new))
    if not is_new.all():
        old = rows.filter(pa.array(~is_new))
        kept = before["embedding"].take(embed_plan.row_of(old, before))
        found[~is_new] = arrays.embedding_matrix(kept, dimension)
    column = arrays.list_column(found, pa.list_(pa.float32()))
    return rows.drop_columns(RESULT_ROW).append_column("embedding", column)


def described(vectors: pa.Table, rows: np.ndarray) -> pa.Table:
    """Returns some rows of `checked` with their places in the place of their vectors."""
    few = vectors.drop_columns(["vector", "length"]).take(pa.array(rows))
    return few.append_column(RESULT_ROW, pa.array(rows, pa.int32()))


def _plan(
    items: pa.Table, mine: pa.Table, before: Tables, ds: dt.date, reuse: bool, may_wait: bool,
    dimension: int,
) -> pa.Table:  # fmt: skip
    """Returns `items` with their state, versions and reasons, as `embed_plan.plan` does."""
    n, inside = len(items), items["in_catalogue"].to_numpy()
    missing = mine["image_sha256"].is_null().to_numpy() & mine["reason"].is_null().to_numpy()
    reason = pc.if_else(pa.array(missing), NO_VECTOR, mine["reason"])
    nothing = "the table of vectors has no row of it"
    message = pc.if_else(pa.array(missing), nothing, mine["message"])
    is_bad = reason.is_valid().to_numpy()
    tried = embed_plan.next_tries(items, before.rejects)
    waits = is_bad & inside & may_wait & (tried > np.datetime64(ds, "D"))
    state = np.full(n, TO_READ, object)
    state[is_bad] = REJECTED
    # A former item keeps its embedding. Where its vector still stands here, that is not read.
    then = before.embeddings["image_sha256"].take(items["previous_row"])
    is_here = pc.fill_null(pc.equal(then, mine["image_sha256"]), False).to_numpy()
    state[~inside & reuse & ~(is_here & ~is_bad)] = UNCHANGED
    state[waits] = WAITING
    unread = pc.is_in(reason, value_set=pa.array([NO_VECTOR]))
    stage = pc.if_else(unread, "read", pc.if_else(pa.array(is_bad), "decode", None))
    added = {
        "image_generation": pa.nulls(n, pa.int64()),
        "image_size": pa.array(np.full(n, _FLOAT_BYTES * dimension)),
        "image_mtime": pa.nulls(n, TIMESTAMP),
        "stage": stage,
        "reason": reason,
        "message": message,
        "state": pa.array(state, pa.string()),
    }
    for name, column in added.items():
        items = items.append_column(name, column)
    return items


def with_addresses(catalogue: pa.Table) -> pa.Table:
    """Returns a catalogue with the columns of one; image_uri is null where it has none."""
    if "image_uri" not in catalogue.column_names:
        nothing = pa.nulls(len(catalogue), pa.string())
        catalogue = catalogue.append_column("image_uri", nothing)
    return catalogue.select(CATALOGUE_COLUMNS)
