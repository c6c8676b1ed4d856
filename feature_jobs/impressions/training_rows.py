"""TRAINING-ROWS tells what a user was shown at one moment, and what the user had clicked before.

In: the impressions of ds, the clicks of `window_days`, and, where the scope is a set of categories,
the catalogue of the same days. Out: `training_rows`, from which an encoder is trained.

The law: one row is one request of one user, with up to 5 of the items shown (PVs), their labels,
and up to 5 latest distinct clicks strictly before the row's moment, which is that of the request's
first impression. A request is what one user saw under one request_id; impressions without one
begin a new request when they come more than the gap after the user's last of them. An item shown
twice in a request stands once, clicked if it ever was. A request with more than 5 PVs becomes
max(1, ceil(clicked / 5)) rows: clicked PVs first, then as many of the others as there are places,
in the order of a seeded hash. So every click of ds is a label exactly once.

A click after the end of ds leaves out its PV: an encoder that is used from the next day on must not
know it, and as unclicked the PV would be a false negative.

Items whose category is out of scope are neither PV nor click, nor do they count for moments and
gaps. An item's category is that of the newest catalogue that has it; without one it is out.

Flow: where there is a scope, impressions and clicks first meet the catalogue in item shards; then
they meet each other in user shards.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_jobs.impressions.clicks import HistoryLaw, histories_at, sort_clicks
from feature_jobs.impressions.histories import click_moments, codes_of, no_clicks, read_clicks
from feature_jobs.inputs import IMPRESSION_COLUMNS, RowGroup, Source, check_day, read_rows
from feature_jobs.schemas import ROW_PVS, TIMESTAMP, TRAINING_ROWS
from feature_jobs.store import arrays, encoder_info, hashing, partitions, worker_notes
from feature_jobs.store.arrays import list_array
from feature_jobs.store.every_shard import every_shard


@dataclass(frozen=True)
class TrainingRowsJob:
    """Holds all that the workers of TRAINING-ROWS need to know.

    `end_us` is the first moment after ds, `gap_us` what parts two requests without request_id, and
    `categories` the scope, None for everything.
    """

    law: HistoryLaw
    gap_us: int
    end_us: int
    day_timezone: str
    categories: tuple[str, ...] | None
    shards: int
    schema: pa.Schema
    staging: str

    @property
    def no_rows(self) -> pa.Table:
        """Returns an empty table of impressions, for a shard that has none."""
        item_id = self.schema.field("pv_item_ids").type.value_type
        kinds = (self.schema.field("user_id").type, item_id, TIMESTAMP, pa.bool_())
        return pa.schema(list(zip(IMPRESSION_COLUMNS, kinds, strict=True))).empty_table()

    @property
    def no_clicks(self) -> pa.Table:
        return no_clicks(self.no_rows["user_id"].type, self.no_rows["item_id"].type)


# ---- Pure functions: requests ----------------------------------------------------------------


def starts_of(*columns: np.ndarray) -> np.ndarray:
    """Returns where each run of equal rows begins in sorted columns [n]; int64 [runs]."""
    new = np.ones(len(columns[0]), bool)
    new[1:] = np.any([np.diff(column) != 0 for column in columns], axis=0)
    return np.flatnonzero(new)


def runs_of(starts: np.ndarray, n: int) -> np.ndarray:
    """Returns the number of the run that each of `n` rows belongs to; int64 [n]."""
    return np.repeat(np.arange(len(starts)), np.diff(starts, append=n))


@dataclass(frozen=True)
class Requests:
    """Holds requests in the order of their users, [r] each.

    `given` are codes of a request_id, -1 = none. `of_row` int64 [n] is the request of each
    impression.
    """

    users: np.ndarray
    given: np.ndarray
    moments: np.ndarray
    of_row: np.ndarray


def find_requests(users: np.ndarray, given: np.ndarray, times: np.ndarray, gap_us: int) -> Requests:
    """Finds the requests of the impressions [n], by `given` or by gaps in time.

    A request has equal `given`, or no gap above `gap_us` where that is -1. Its moment is that of
    its first impression.
    """
    order = np.lexsort((times, given, users))
    users, given, times = users[order], given[order], times[order]
    after_gap = (given < 0) & (np.diff(times, prepend=times[:1]) > gap_us)
    starts = starts_of(users, given, np.cumsum(after_gap))
    of_row = np.empty(len(order), np.int64)
    of_row[order] = runs_of(starts, len(order))
    return Requests(users[starts], given[starts], times[starts], of_row)


def given_requests(rows: pa.Table, kind: pa.DataType) -> tuple[pa.Array, np.ndarray]:
    """Returns the distinct request_id of `rows`, and each row's as a code into them, -1 = none."""
    if "request_id" not in rows.column_names:
        return pa.array([], kind), np.full(len(rows), -1)
    distinct = pc.unique(rows["request_id"]).drop_null()
    codes = pc.fill_null(pc.index_in(rows["request_id"], value_set=distinct), -1)
    return distinct, codes.to_numpy().astype(np.int64)


def name_requests(requests: Requests, given: pa.Array) -> pa.Array:
    """Returns the request_id of each request: the one given, else its moment in microseconds.

    No two requests of a user have one name. Where a shop's IDs are moments too, a request without
    one is named by the first microsecond from its moment on that names no other.
    """
    known = given.take(pa.array(requests.given, mask=requests.given < 0))
    moments = requests.moments
    while True:
        names = pc.coalesce(known, pa.array(moments).cast(given.type))
        codes = names.dictionary_encode().indices.to_numpy()
        # Of one name the given request comes first, then the earliest: all others go on looking.
        order = np.lexsort((requests.given < 0, codes, requests.users))
        is_taken = np.ones(len(order), bool)
        is_taken[order[starts_of(requests.users[order], codes[order])]] = False
        if not is_taken.any():
            return names
        moments = moments + is_taken


# ---- Pure functions: page views --------------------------------------------------------------


@dataclass(frozen=True)
class PageViews:
    """Holds items shown in requests, once per request; [m] each.

    `requests` and `items` are codes.
    """

    requests: np.ndarray
    items: np.ndarray
    clicked: np.ndarray

    def take(self, at: np.ndarray) -> "PageViews":
        return PageViews(self.requests[at], self.items[at], self.clicked[at])


def label_items(
    requests: np.ndarray, items: np.ndarray, clicked: np.ndarray, too_late: np.ndarray
) -> tuple[PageViews, int]:
    """Turns impressions [n] into page views, sorted by request and item.

    Returns also how many were left out, since `too_late` was all their clicking.
    """
    order = np.lexsort((items, requests))
    shown = PageViews(requests, items, clicked).take(order)
    starts = starts_of(shown.requests, shown.items)
    clicked = np.logical_or.reduceat(clicked[order], starts)
    unlabelled = np.logical_or.reduceat(too_late[order], starts) & ~clicked
    once = PageViews(shown.requests[starts], shown.items[starts], clicked)
    return once.take(~unlabelled), int(unlabelled.sum())


def cut_requests(shown: PageViews, hashes: np.ndarray) -> tuple[PageViews, np.ndarray]:
    """Returns the page views that stay, row by row, and the chunk of their request; int64 [k].

    Clicked ones first, by item; then unclicked ones by `hashes` uint64 [m], as many as fill the
    ceil(clicked / 5) chunks of the request, and one chunk where none is clicked.
    """
    sample = np.where(shown.clicked, np.uint64(0), hashes)
    shown = shown.take(np.lexsort((shown.items, sample, ~shown.clicked, shown.requests)))
    starts = starts_of(shown.requests)
    request = runs_of(starts, len(shown.requests))
    place = np.arange(len(request)) - starts[request]
    clicks = np.bincount(request, weights=shown.clicked).astype(np.int64)
    chunks = np.maximum(1, -(-clicks // ROW_PVS))
    kept = place < ROW_PVS * chunks[request]
    return shown.take(kept), place[kept] // ROW_PVS


def sample_hashes(users: np.ndarray, requests: np.ndarray, items: np.ndarray) -> np.ndarray:
    """Makes one hash of three, uint64 [m]: what orders the unclicked page views of a request."""
    key = np.stack([users, requests, items], axis=1).astype("<u8")
    return hashing.hash_rows(key.view(np.uint8).reshape(len(users), 24))


# ---- Pure functions: a user shard ------------------------------------------------------------


def training_rows(
    rows: pa.Table, clicks: pa.Table, job: TrainingRowsJob
) -> tuple[pa.Table, dict[str, int]]:
    """Returns `training_rows` of a shard's impressions, all of them in scope, and what was counted.

    `clicks` (user_id, item_id, click_time) hold all clicks in scope of the users of `rows`.
    """
    user_ids, (users, clickers) = codes_of([rows["user_id"], clicks["user_id"]])
    item_ids, (items, clicked_items) = codes_of([rows["item_id"], clicks["item_id"]])
    given, codes = given_requests(rows, job.schema.field("request_id").type)
    times = rows["event_time"].cast(pa.int64()).to_numpy()
    requests = find_requests(users, codes, times, job.gap_us)
    request_ids = name_requests(requests, given)

    clicked = rows["clicked"].to_numpy()
    in_time = click_moments(rows, job.law.click_delay_us)[0] < job.end_us
    shown, too_late = label_items(requests.of_row, items, clicked & in_time, clicked & ~in_time)
    hashes = sample_hashes(
        hashing.hash_ids(user_ids)[requests.users[shown.requests]],
        hashing.hash_ids(request_ids)[shown.requests],
        hashing.hash_ids(item_ids)[shown.items],
    )
    kept, chunk = cut_requests(shown, hashes)

    starts = starts_of(kept.requests, chunk)
    request = kept.requests[starts]
    log = sort_clicks(clickers, clicks["click_time"].cast(pa.int64()).to_numpy(), clicked_items)
    places = histories_at(log, requests.users[request], requests.moments[request], job.law)
    there = places >= 0
    past = item_ids.take(pa.array(log.items[places[there]]))
    sizes = np.diff(starts, append=len(chunk))
    made = pa.table(
        {
            "user_id": user_ids.take(pa.array(requests.users[request])),
            "request_id": request_ids.take(pa.array(request)),
            "chunk": pa.array(chunk[starts].astype(np.int32)),
            "event_time": pa.array(requests.moments[request]).cast(TIMESTAMP),
            "pv_item_ids": list_array(sizes, item_ids.take(pa.array(kept.items))),
            "pv_clicked": list_array(sizes, pa.array(kept.clicked)),
            "click_item_ids": list_array(there.sum(axis=1), past),
        }
    )
    return made, {
        "impressions": len(rows),
        "requests": len(starts_of(request)),
        "clicks": int(kept.clicked.sum()),
        "rows_with_history": int(there.any(axis=1).sum()),
        "unclicked_left_out": len(shown.items) - len(kept.items),
        "clicks_after_the_day": too_late,
    }


def are_in_scope(item_ids: pa.ChunkedArray, catalogues: pa.Table) -> np.ndarray:
    """Tells which items are in scope, bool [n].

    It is what the newest row of `catalogues` (item_id, day, in_scope) says of each, and false for
    an item without a row.
    """
    distinct, (asked, listed) = codes_of([item_ids, catalogues["item_id"]])
    inside = catalogues["in_scope"].to_numpy()
    order = np.lexsort((inside, catalogues["day"].to_numpy(), listed))
    newest = order[np.flatnonzero(np.diff(listed[order], append=-1))]
    scope = np.zeros(len(distinct), bool)
    scope[listed[newest]] = inside[newest]
    return scope[asked]


# ---- Transforms ----------------------------------------------------------------------------


class ReadImpressions(beam.DoFn):
    """Turns a row group of the impressions of ds into its rows by shard of `key`."""

    def __init__(self, job: TrainingRowsJob, key: str):
        self._job, self.staging = job, job.staging
        self._key = key

    @worker_notes.refusing
    def process(self, group: RowGroup) -> Iterator[tuple[int, bytes]]:
        rows = read_rows(group, [*IMPRESSION_COLUMNS, "click_time", "request_id"])
        check_day(group, rows, self._job.end_us)
        return hashing.split_by_shard(rows, self._key, self._job.shards)


class ReadCatalogue(beam.DoFn):
    """Turns a row group of a catalogue into its items (item_id, day, in_scope) by item shard."""

    def __init__(self, job: TrainingRowsJob):
        self._job, self.staging = job, job.staging

    @worker_notes.refusing
    def process(self, group: RowGroup) -> Iterator[tuple[int, bytes]]:
        rows = read_rows(group, ["item_id", "category"])
        inside = encoder_info.in_scope(rows["category"], self._job.categories)
        day = np.full(len(rows), group.form.ds.toordinal(), np.int32)
        items = pa.table({"item_id": rows["item_id"], "day": day, "in_scope": inside})
        return hashing.split_by_shard(items, "item_id", self._job.shards)


class KeepInScope(beam.DoFn):
    """Keeps what is in scope of the impressions and clicks of an item shard.

    Impressions, clicks and catalogue rows come in; what is in scope goes out by user shard, and
    under `out_of_scope` the number of impressions that are not. That number goes to the user shard
    of the same number, since it is only ever added up.
    """

    def __init__(self, job: TrainingRowsJob):
        self._job, self.staging = job, job.staging
        no_items = {"item_id": job.no_rows["item_id"].type, "day": pa.int32()}
        self._no_items = pa.schema([*no_items.items(), ("in_scope", pa.bool_())]).empty_table()

    @worker_notes.refusing
    def process(self, element: tuple[int, dict[str, Iterable[bytes]]]) -> Iterator[Any]:
        job, (shard, chunks) = self._job, element
        catalogues = arrays.from_ipc(chunks["catalogues"], self._no_items)
        rows = arrays.from_ipc(chunks["impressions"], job.no_rows)
        clicks = arrays.from_ipc(chunks["clicks"], job.no_clicks)
        kept = rows.filter(pa.array(are_in_scope(rows["item_id"], catalogues)))
        clicks = clicks.filter(pa.array(are_in_scope(clicks["item_id"], catalogues)))
        for name, found in (("impressions", kept), ("clicks", clicks)):
            for part in hashing.split_by_shard(found, "user_id", job.shards):
                yield beam.pvalue.TaggedOutput(name, part)
        yield beam.pvalue.TaggedOutput("out_of_scope", (shard, len(rows) - len(kept)))


class WriteTrainingRows(beam.DoFn):
    """Turns the impressions and the clicks of a user shard into one part of `training_rows`."""

    def __init__(self, job: TrainingRowsJob):
        self._job, self.staging = job, job.staging

    @worker_notes.refusing
    def process(self, element: tuple[int, dict[str, Iterable]]) -> None:
        job, (shard, chunks) = self._job, element
        folder = os.path.join(job.staging, TRAINING_ROWS.name)
        if partitions.has_part(folder, shard, job.shards):
            return
        rows = arrays.from_ipc(chunks["impressions"], job.no_rows)
        clicks = arrays.from_ipc(chunks["clicks"], job.no_clicks)
        made, counts = training_rows(rows, clicks, job)
        counts["out_of_scope_impressions"] = sum(chunks.get("out_of_scope", ()))
        partitions.write_part(folder, TRAINING_ROWS, job.schema, made, shard, job.shards, counts)


def keep_in_scope(
    root: beam.Pipeline,
    by_item: dict[str, beam.PCollection],
    catalogues: Sequence[Source],
    job: TrainingRowsJob,
) -> dict[str, beam.PCollection]:
    """Returns what of `impressions` and `clicks` by item shard is in scope, by user shard."""
    items = (
        root
        | "CatalogueGroups" >> beam.Create([group for day in catalogues for group in day.groups()])
        | "ReadCatalogue" >> beam.ParDo(ReadCatalogue(job))
    )
    kept = (
        {**by_item, "catalogues": items}
        | "ByItemShard" >> beam.CoGroupByKey()
        | "KeepInScope"
        >> beam.ParDo(KeepInScope(job)).with_outputs("impressions", "clicks", "out_of_scope")
    )
    return {name: kept[name] for name in ("impressions", "clicks", "out_of_scope")}


# ---- The job -------------------------------------------------------------------------------


def define_training_rows(
    root: beam.Pipeline,
    impressions: Source,
    log: Sequence[Source],
    catalogues: Sequence[Source],
    job: TrainingRowsJob,
) -> None:
    """Writes `training_rows` below `job.staging`, one part per user shard.

    `log` are the days that clicks come from, ds among them; `catalogues` those that tell an item's
    category, empty where everything is in scope.
    """
    key = "user_id" if job.categories is None else "item_id"
    found = {
        "impressions": root
        | "ImpressionGroups" >> beam.Create(impressions.groups())
        | "ReadImpressions" >> beam.ParDo(ReadImpressions(job, key)),
        "clicks": read_clicks(root, log, job.law, job.day_timezone, job.shards, job.staging, key),
    }
    if job.categories is not None:
        found = keep_in_scope(root, found, catalogues, job)
    every = every_shard(root, job.shards)
    found["impressions"] = (found["impressions"], every) | "AndEveryShard" >> beam.Flatten()
    _ = (
        found
        | "ByUserShard" >> beam.CoGroupByKey()
        | "WriteTrainingRows" >> beam.ParDo(WriteTrainingRows(job))
    )
