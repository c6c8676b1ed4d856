"""Plans EMBED: which items of a shard are as they were, and which images must be read.

Whether an image may have changed is asked of the store (generation, or size and time), which reads
nothing, and once for all days of a job. A reject is tried again on its `next_ds`, at once under
another address.
"""

import datetime as dt
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from courier_model.image_files import Rejected, find_image
from feature_jobs.inputs import CATALOGUE_COLUMNS, check_unique
from feature_jobs.schemas import TIMESTAMP
from feature_jobs.store import arrays, hashing
from feature_jobs.store.files import FileInfo

UNCHANGED = "unchanged"  # its embedding is taken over
WAITING = "waiting"  # its reject is taken over
REJECTED = "rejected"  # nothing there that could be read
TO_READ = "to_read"

VERSION_COLUMNS = ("image_generation", "image_size", "image_mtime")
_FINDERS = 64  # asking a remote store takes tens of milliseconds, however many ask at once
_BLOCK = 16  # images asked for by one task: on a local disk a task costs more than the question
_LONGEST_WAIT = 30  # days
_LARGEST_GROUP = 65_536


def former_items(
    previous: pa.Table, catalogue_ids: pa.ChunkedArray, ds: dt.date, window_days: int
) -> pa.Table:
    """Returns the rows of `previous` that left the catalogue within `window_days`.

    They are dated when they left.
    """
    gone = pc.invert(pc.is_in(previous["item_id"], value_set=catalogue_ids.combine_chunks()))
    rows = previous.filter(gone)
    left = pc.fill_null(rows["left_catalogue_ds"], pa.scalar(ds, pa.date32()))
    rows = rows.set_column(rows.column_names.index("left_catalogue_ds"), "left_catalogue_ds", left)
    oldest = pa.scalar(ds - dt.timedelta(days=window_days), pa.date32())
    return rows.filter(pc.greater(left, oldest))


def items_of_shard(
    catalogue: pa.Table, previous: pa.Table, ds: dt.date, window_days: int
) -> pa.Table:
    """Returns the items of a shard: its catalogue rows, then kept former items.

    Columns of the catalogue, `in_catalogue`, `left_catalogue_ds` and `previous_row`, the item's row
    in `previous` (null without one). Raises DataContractError for a duplicate item.
    """
    catalogue = arrays.in_order(catalogue, ["item_id"])
    check_unique(catalogue["item_id"], ds)
    former = former_items(previous, catalogue["item_id"], ds, window_days)
    columns = list(CATALOGUE_COLUMNS)
    items = pa.concat_tables([catalogue.select(columns), former.select(columns)])
    inside = np.arange(len(items)) < len(catalogue)
    left = pa.concat_arrays(
        [pa.nulls(len(catalogue), pa.date32()), former["left_catalogue_ds"].combine_chunks()]
    )
    return (
        items.append_column("in_catalogue", pa.array(inside))
        .append_column("left_catalogue_ds", left)
        .append_column("previous_row", row_of(items, previous))
    )


def row_of(items: pa.Table, rows: pa.Table) -> pa.ChunkedArray:
    """Tells where each item stands in `rows`, null for one that does not."""
    return pc.index_in(items["item_id"], value_set=rows["item_id"].combine_chunks())


def row_of_image(images: pa.Table, rows: pa.Table) -> pa.ChunkedArray:
    """Tells where each item with its address stands in `rows`, null for one that does not.

    An item can stand there more than once, each time under another address.
    """
    items, uris = (pc.unique(rows[name]) for name in ("item_id", "image_uri"))

    def code(table: pa.Table) -> pa.ChunkedArray:  # one number for both; null for what is not there
        item = pc.index_in(table["item_id"], value_set=items).cast(pa.int64())
        uri = pc.index_in(table["image_uri"], value_set=uris).cast(pa.int64())
        return pc.add(pc.multiply(item, len(uris)), uri)

    return pc.index_in(code(images), value_set=code(rows).combine_chunks())


def plan(
    items: pa.Table,
    previous: pa.Table,
    rejects: pa.Table,
    sightings: "Sightings",
    ds: dt.date,
    reuse: bool,
    same_roots: bool,
) -> pa.Table:
    """Returns `items` with their `state`, the versions of their images, and why there is none.

    `previous` and `rejects` are the shard's rows of the latest partitions before ds. `reuse` says
    whether the embeddings there are those that would be made now, `same_roots` whether addresses
    and versions can be compared with those of then. Columns added: state, VERSION_COLUMNS, stage,
    reason, message (nullable).
    """
    inside = items["in_catalogue"].to_numpy()
    waits = is_waiting(items, rejects, ds) & inside & reuse & same_roots
    # A former item's file is often deleted with it: its embedding stays, unlooked at.
    stays = ~inside & reuse
    rows = np.flatnonzero(~(waits | stays))
    place = np.full(len(items), -1)
    place[rows] = np.arange(len(rows))
    found = sightings.of(items["image_uri"].take(pa.array(rows)))
    images = found.take(pa.array(place, mask=place < 0))
    same = is_unchanged(items, images, previous) & reuse & same_roots
    state = np.full(len(items), TO_READ, object)
    state[pc.is_valid(images["reason"]).to_numpy()] = REJECTED
    state[same | stays] = UNCHANGED
    state[waits] = WAITING
    for name in images.column_names:
        items = items.append_column(name, images[name])
    return items.append_column("state", pa.array(state, pa.string()))


def is_waiting(items: pa.Table, rejects: pa.Table, ds: dt.date) -> np.ndarray:
    """Tells which items were rejected and are not to be tried on ds.

    Their address is the same, and their `next_ds` later.
    """
    before = rejects["image_uri"].take(row_of(items, rejects))
    same = pc.equal(*(pc.fill_null(uris, "") for uris in (before, items["image_uri"])))
    return same.to_numpy() & (next_tries(items, rejects) > np.datetime64(ds, "D"))


def next_tries(items: pa.Table, rejects: pa.Table) -> np.ndarray:
    """Returns when each item that was rejected is tried again, datetime64[D] [n], else NaT."""
    return rejects["next_ds"].take(row_of(items, rejects)).to_numpy()


def next_ds(ds: dt.date, attempts: np.ndarray) -> np.ndarray:
    """Returns the day to try again: 1, 2, 4, … days later, by `attempts` int [n] from 1."""
    days = np.minimum(1 << np.minimum(attempts - 1, 8), _LONGEST_WAIT)  # a larger shift overflows
    return np.datetime64(ds, "D") + days.astype("timedelta64[D]")


def is_unchanged(items: pa.Table, images: pa.Table, previous: pa.Table) -> np.ndarray:
    """Tells which items' images have the address and the version that they had; bool [n]."""
    before = previous.select(["image_uri", *VERSION_COLUMNS]).take(items["previous_row"])
    same = pc.fill_null(pc.equal(before["image_uri"], items["image_uri"]), False).to_numpy()
    same = same & pc.is_valid(images["image_size"]).to_numpy()
    return same & same_version(before, images)


def same_version(some: pa.Table, others: pa.Table) -> np.ndarray:
    """Tells which rows have equal VERSION_COLUMNS, a null being equal to a null; bool [n]."""
    same = np.ones(len(some), bool)
    for name in VERSION_COLUMNS:
        one, two = (t[name].cast(pa.int64()).fill_null(-1).to_numpy() for t in (some, others))
        same &= one == two
    return same


# ---- What is there ---------------------------------------------------------------------------


class Sightings:
    """Looks at images, at each address once, and keeps what it saw.

    `seen` has a row for each address: image_uri (nullable), VERSION_COLUMNS and, where nothing is
    there that could be read, stage, reason and message.
    """

    def __init__(self, roots: Sequence[str], seen: pa.Table | None = None):
        self._roots = roots
        self.seen = _as_table(pa.array([], pa.string()), []) if seen is None else seen

    def of(self, uris: pa.ChunkedArray) -> pa.Table:
        """Returns the row of each address without the address, looking where it has not yet.

        Raises faults of the store other than a missing or forbidden file.
        """
        distinct = pc.unique(uris)
        known = pc.is_in(distinct, value_set=self.seen["image_uri"].combine_chunks())
        new = distinct.filter(pc.invert(known))
        if len(new):
            seen = pa.concat_tables(
                [self.seen, _as_table(new, _find(new.to_pylist(), self._roots))]
            )
            self.seen = seen.combine_chunks()
        place = pc.index_in(uris, value_set=self.seen["image_uri"].combine_chunks())
        return self.seen.drop_columns("image_uri").take(place)


def _find(uris: Sequence[str | None], roots: Sequence[str]) -> list[FileInfo | Rejected]:
    def find(block: Sequence[str | None]) -> list[FileInfo | Rejected]:
        return [find_image(uri, roots) for uri in block]

    blocks = [uris[at : at + _BLOCK] for at in range(0, len(uris), _BLOCK)]
    if len(blocks) == 1:  # of many small days, threads would take longer
        return find(blocks[0])
    with ThreadPoolExecutor(_FINDERS) as pool:
        return list(chain.from_iterable(pool.map(find, blocks)))


def _as_table(uris: pa.Array, found: Sequence[FileInfo | Rejected]) -> pa.Table:
    """Returns what was found at some addresses as a table."""
    columns = {
        "image_generation": ("generation", pa.int64()),
        "image_size": ("size", pa.int64()),
        "image_mtime": ("mtime_us", pa.int64()),
        "stage": ("stage", pa.string()),
        "reason": ("reason", pa.string()),
        "message": ("message", pa.string()),
    }
    table = pa.table(
        {
            "image_uri": uris,
            **{
                name: pa.array([getattr(one, field, None) for one in found], kind)
                for name, (field, kind) in columns.items()
            },
        }
    )
    times = table["image_mtime"].cast(TIMESTAMP)
    return table.set_column(table.column_names.index("image_mtime"), "image_mtime", times)


# ---- What is to be read ----------------------------------------------------------------------


def images_to_read(planned: pa.Table, before: pa.Table, shard: int, reuse: bool) -> pa.Table:
    """Returns the rows that `embed_images` takes, with the shard to which they return.

    `before` are the embeddings before the first day of the job. With `reuse` the bytes that they
    were made of are known.
    """
    planned = planned.filter(pc.equal(planned["state"], TO_READ))
    rows = planned.select(["item_id", "image_uri", *VERSION_COLUMNS])
    known = pa.nulls(len(rows), pa.string())
    if reuse:
        known = before["image_sha256"].take(row_of(rows, before))
    return rows.append_column("known_sha256", known).append_column(
        "shard", pa.array(np.full(len(rows), shard))
    )


def bucket_of(images: pa.Table, buckets: int) -> np.ndarray:
    """Returns the bucket of each image, by its size; int [n].

    Images of the same bytes meet in one.
    """
    return hashing.shard_of(hashing.hash_ids(images["image_size"]), buckets)


def cut(images: pa.Table, chunk_items: int) -> tuple[pa.Table, np.ndarray]:
    """Returns a bucket's images in an order of their own, and the chunk number of each, int [n].

    Images of one size, among which are all of the same bytes, are not cut apart, so that a chunk
    may have more than `chunk_items`; but for each further 65,536 of them, so that no chunk becomes
    too large to be held or done again. Sizes are in the order of their hashes, mixed.
    """
    hashes = pa.array(hashing.hash_ids(images["image_size"]))
    images = images.append_column("hash", hashes).sort_by(
        [("hash", "ascending"), ("image_uri", "ascending"), ("item_id", "ascending")]
    )
    hashes = images["hash"].to_numpy()
    place = np.arange(len(images))
    is_start = np.ones(len(images), bool)
    is_start[1:] = hashes[1:] != hashes[:-1]
    start = np.maximum.accumulate(np.where(is_start, place, 0))
    start += (place - start) // _LARGEST_GROUP * _LARGEST_GROUP
    return images.drop_columns("hash"), start // chunk_items
