"""Walks the items of a shard through the days of a job: what each day's tables of EMBED hold.

A day's tables follow from its catalogue, the tables of the day before, what stands at the addresses
of images (seen once for all days) and what became of those that were read. Vectors take no part:
a row says where its vector lies.

A shard is walked twice. Before anything is read the walk *hopes* that all images turn out good; the
images that it asks for are read; then the same walk goes by what became of them. Both ask for the
same images, and for each on the same day first: until an image of an item was asked for, the item's
rows are the same in both walks, and so is what is asked. From then on its rows name addresses that
were asked for, or at which nothing was seen, in either walk; any other address is new to both, and
both ask for it. So all that the second walk asks for was read.
"""

import datetime as dt
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_jobs.inputs import CATALOGUE_COLUMNS
from feature_jobs.items import embed_plan
from feature_jobs.items.embed_plan import TO_READ, UNCHANGED, VERSION_COLUMNS, WAITING, Sightings
from feature_jobs.store import arrays, partitions

RESULT_ROW = "result_row"  # stands in the place of the vector
_REASON = ("stage", "reason", "message")
_NO_ADDRESS = "unsupported_uri"  # nothing was looked for
NO_VECTOR = "no_vector"  # the reason of an item of which a table of vectors has none
_NOT_FETCHED = pa.array(["missing", "forbidden", NO_VECTOR])
_SECONDS = ("io_seconds", "decode_seconds", "forward_seconds")


# ---- A day -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tables:
    """Holds the two tables of a day, for some items.

    `embeddings` has `result_row` instead of vectors: the row of the results that the vector comes
    from, null for one that was there before the first day. Where that row has none, since the bytes
    were known, it is the one from before all the same.
    """

    embeddings: pa.Table
    rejects: pa.Table

    @classmethod
    def before_the_first_day(cls, embeddings: pa.Table, rejects: pa.Table) -> "Tables":
        """Takes the tables as they were published, `embeddings` without vectors."""
        nowhere = pa.nulls(len(embeddings), pa.int32())
        return cls(embeddings.append_column(RESULT_ROW, nowhere), rejects)


@dataclass(frozen=True)
class Day:
    """Holds what a day's plan goes by, besides the day before: see `embed_plan.plan`."""

    ds: dt.date
    catalogue: pa.Table
    reuse: bool
    same_roots: bool


@dataclass(frozen=True)
class WalkedDay:
    """Holds what became of some items on a day.

    `plan` has the columns of `embed_plan.plan` and `outcomes` those of `outcomes`, row by row.
    """

    ds: dt.date
    before: Tables
    plan: pa.Table
    outcomes: pa.Table

    @cached_property
    def tables(self) -> Tables:
        """Returns the day's tables, in one chunk each: chunks of former items would add up."""
        embeddings = assemble_embeddings(self.plan, self.before.embeddings, self.outcomes)
        rejects = assemble_rejects(self.plan, self.before.rejects, self.outcomes, self.ds)
        return Tables(embeddings.combine_chunks(), rejects.combine_chunks())

    @cached_property
    def result_rows(self) -> np.ndarray:
        """Returns the rows of the results that the day's plan asks for; int64 [n]."""
        return self.outcomes[RESULT_ROW].drop_null().to_numpy().astype(np.int64)

    def were_rejected(self, items: pa.Table) -> pa.ChunkedArray:
        """Tells which items were rejects the day before; bool [n]."""
        before = self.before.rejects["item_id"].combine_chunks()
        return pc.is_in(items["item_id"], value_set=before)

    @cached_property
    def not_fetched(self) -> pa.ChunkedArray:
        """Returns the items, by ID, that were no rejects before and whose image was not reached.

        An image goes missing now and then; of many at once the store is the cause.
        """
        rejects = self.tables.rejects
        away = pc.is_in(rejects["reason"], value_set=_NOT_FETCHED)
        away = pc.and_(away, pc.equal(rejects["stage"], "read"))
        return rejects["item_id"].filter(pc.and_not(away, self.were_rejected(rejects)))


def walk(
    days: Iterable[Day],
    before: Tables,
    sightings: Sightings,
    window_days: int,
    results: pa.Table | None = None,
) -> Iterator[WalkedDay]:
    """Yields what becomes of some items on each of `days`, consecutive ones.

    `before` are the tables before the first day and `results` has a row for each image that was
    read, in the columns of `embed_images` and VERSION_COLUMNS; vectors are not looked at. Without
    `results` all images to read are hoped to be good. Raises DataContractError for an item that a
    catalogue holds twice.
    """
    walked: WalkedDay | None = None
    for day in days:
        before = walked.tables if walked else before
        items = embed_plan.items_of_shard(day.catalogue, before.embeddings, day.ds, window_days)
        plan = embed_plan.plan(
            items, before.embeddings, before.rejects, sightings, day.ds, day.reuse, day.same_roots
        )
        found = hopes(plan) if results is None else outcomes(plan, results)
        walked = WalkedDay(day.ds, before, plan, found)
        yield walked


# ---- What becomes of images ------------------------------------------------------------------


def outcomes(plan: pa.Table, results: pa.Table) -> pa.Table:
    """Returns what became of each item's image: image_sha256, VERSION_COLUMNS, reason, result_row.

    The version is that when it was read. All are null for an item that is not to be read.
    """
    rows = embed_plan.row_of_image(plan, results)
    rows = pc.if_else(pc.equal(plan["state"], TO_READ), rows, pa.scalar(None, rows.type))
    columns = ["image_sha256", *VERSION_COLUMNS, *_REASON]
    return results.select(columns).take(rows).append_column(RESULT_ROW, rows)


def hopes(plan: pa.Table) -> pa.Table:
    """Returns the `outcomes` of a plan all of whose images turn out good, with "" as digest."""
    good = pc.if_else(pc.equal(plan["state"], TO_READ), "", pa.scalar(None, pa.string()))
    nothing = {name: pa.nulls(len(plan), pa.string()) for name in _REASON}
    versions = {name: plan[name] for name in VERSION_COLUMNS}
    nowhere = pa.nulls(len(plan), pa.int32())
    return pa.table({"image_sha256": good, **versions, **nothing, RESULT_ROW: nowhere})


# ---- The tables of a day ---------------------------------------------------------------------


def assemble_embeddings(plan: pa.Table, previous: pa.Table, outcomes: pa.Table) -> pa.Table:
    """Makes `item_embeddings` of a day, without vectors: planned items with one, old or new."""
    is_same = pc.equal(plan["state"], UNCHANGED)
    is_good = pc.and_(pc.is_valid(outcomes["image_sha256"]), pc.is_null(outcomes["reason"]))
    good = pc.or_(is_same, is_good)
    plan, outcomes, is_same = plan.filter(good), outcomes.filter(good), is_same.filter(good)
    before = previous.take(plan["previous_row"])
    columns = [*CATALOGUE_COLUMNS, "in_catalogue", "left_catalogue_ds"]
    as_read = [*VERSION_COLUMNS, "image_sha256", RESULT_ROW]
    return pa.table(
        {
            **{name: plan[name] for name in columns},
            **{name: pc.if_else(is_same, before[name], outcomes[name]) for name in as_read},
        }
    )


def assemble_rejects(
    plan: pa.Table, previous: pa.Table, outcomes: pa.Table, ds: dt.date
) -> pa.Table:
    """Makes `item_rejects` of a day: the catalogue items without an embedding, with their past.

    An item that was not tried stays as it was in `previous`.
    """
    reason = {name: pc.coalesce(plan[name], outcomes[name]) for name in _REASON}
    waits = pc.equal(plan["state"], WAITING)
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


def with_vectors(rows: pa.Table, results: pa.Table, before: pa.Table) -> pa.Table:
    """Returns rows of `item_embeddings` in the order of their items, each with its `embedding`.

    `results` holds the vectors that `result_row` points at and `before` those of the partition
    before the first day, by item_id. A row that has none in either gets null.
    """
    rows = arrays.in_order(rows, ["item_id"])
    at = pc.cast(rows[RESULT_ROW], pa.int64())
    is_new = pc.fill_null(pc.is_valid(results["embedding"]).take(at), False)
    old = pc.add(pc.cast(embed_plan.row_of(rows, before), pa.int64()), len(results))
    kind = pa.list_(pa.float32())
    both = [table["embedding"].cast(kind) for table in (results, before)]
    vectors = pa.chunked_array([chunk for column in both for chunk in column.chunks], kind)
    found = vectors.combine_chunks().take(pc.if_else(is_new, at, old).combine_chunks())
    return rows.drop_columns(RESULT_ROW).combine_chunks().append_column("embedding", found)


# ---- What is told of a day -------------------------------------------------------------------


def count(walked: WalkedDay) -> dict[str, int]:
    """Counts the items of a day: all follows from its tables and those of the day before.

    Tried are those of the catalogue whose image was looked for and that were no reject before.
    """
    plan, embeddings = walked.plan, walked.tables.embeddings
    has_address = pc.not_equal(pc.fill_null(plan["reason"], ""), _NO_ADDRESS)
    looked_for = pc.and_not(has_address, walked.were_rejected(plan))
    return {
        "catalogue_items": _count(plan["in_catalogue"]),
        "former_items": len(embeddings) - _count(embeddings["in_catalogue"]),
        "items_without_uri": _count(pc.and_(plan["in_catalogue"], pc.is_null(plan["image_uri"]))),
        "items_tried": _count(pc.and_(plan["in_catalogue"], looked_for)),
        "items_not_fetched": len(walked.not_fetched),
        "rejects_waiting": _count(pc.equal(plan["state"], WAITING)),
        **count_reasons(walked.tables.rejects["reason"]),
    }


def _count(mask: pa.ChunkedArray) -> int:
    return pc.sum(mask).as_py() or 0


def examples(walked: WalkedDay) -> dict[str, list[int | str]]:
    """Returns the first items by ID of those that were rejected, and that were not fetched.

    Those without an address are no example of a bad image.
    """
    rejects = walked.tables.rejects
    rejected = rejects["item_id"].filter(pc.is_valid(rejects["image_uri"]))
    found = {"rejected": rejected, "not_fetched": walked.not_fetched}
    return {name: ids[: partitions.EXAMPLES].to_pylist() for name, ids in found.items()}


def count_reasons(reasons: pa.ChunkedArray) -> dict[str, int]:
    """Counts reasons by name, as rejected_<reason>; nulls are none."""
    found = pc.value_counts(reasons.drop_null())
    return {f"rejected_{reason['values']}": reason["counts"].as_py() for reason in found}


def work_of(embeddings: pa.Table, read: pa.Table) -> dict[str, float]:
    """Tells what the `embeddings` of a day cost, and on which devices and in which precisions.

    `read` are the results that no earlier day of the job had. All other embeddings count as
    unchanged: for this day their images were not read.
    """
    embedded = read.filter(read["is_embedded"])
    devices = pc.value_counts(embedded["device"])
    return {
        "images_unchanged": len(embeddings) - read["reason"].null_count,
        "images_read": pc.sum(read["is_read"]).as_py() or 0,
        "images_embedded": len(embedded),
        "images_reused": read["reason"].null_count - len(embedded),
        "bytes_read": pc.sum(read["bytes_read"]).as_py() or 0,
        **{name: pc.sum(read[name]).as_py() or 0.0 for name in _SECONDS},
        **{f"embedded_on_{d['values']}": d["counts"].as_py() for d in devices},
    }
