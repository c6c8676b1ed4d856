"""TRAINING-ROWS tells what a user was shown at one moment, and what the user had clicked before.

In: the impressions of one day or of several, the clicks of `window_days`, and, where the scope is a
set of categories, the catalogues of the same days. Out: `training_rows` of each day, from which an
encoder is trained.

The law: one row is one request of one user, with up to 5 of the items shown (PVs), their labels,
and up to 5 latest distinct clicks strictly before the row's moment, which is that of the request's
first impression. A request is what one user saw under one request_id; impressions without one
begin a new request when they come more than the gap after the user's last of them. An item shown
twice in a request stands once, clicked if it ever was. A request with more than 5 PVs becomes
max(1, ceil(clicked / 5)) rows: clicked PVs first, then as many of the others as there are places,
in the order of a seeded hash. So every click of ds is a label exactly once.

A click after the end of ds leaves out its PV: an encoder that is used from the next day on must not
know it, and as unclicked the PV would be a false negative. What the logs of later days hold never
counts, however early it is dated.

Items whose category is out of scope are neither PV nor click, nor do they count for moments and
gaps. An item's category on ds is that of the newest catalogue till then that has it; without one it
is out. So a click may count for one ds and not for another.

Flow: each file of the log is read once. Where there is a scope, its rows first meet the catalogues
in item shards, which tell the days on which each row counts. Then each user shard walks through the
log day by day, holding the clicks of the window; what it makes of a day goes to that day's parts.
"""

import datetime as dt
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_jobs.impressions.clicks import HistoryLaw, histories_at, sort_clicks
from feature_jobs.impressions.day_checks import JudgeDays
from feature_jobs.impressions.histories import (
    checked_clicks,
    click_moments,
    clicks_of,
    codes_of,
    facts_of_group,
    no_clicks,
)
from feature_jobs.inputs import IMPRESSION_COLUMNS, RowGroup, Source, day_end, read_rows
from feature_jobs.schemas import ROW_PVS, TIMESTAMP, TRAINING_ROWS
from feature_jobs.store import arrays, documents, encoder_info, hashing, partitions, worker_notes
from feature_jobs.store.arrays import list_array
from feature_jobs.store.every_shard import every_shard_of_days
from feature_jobs.store.pieces import Piece, made_from, read_pieces, write_pieces

_RUN = ("first", "last")  # of the days on which a row is in scope: places among the job's days


@dataclass(frozen=True)
class TrainingRowsDay:
    """Describes a day whose training rows are made, in so many `shards`.

    `end_us` is the first moment after ds. `log` are the days whose logs tell its clicks, ds among
    them, and `catalogues` those that tell its items' categories, empty where all are in scope.
    """

    ds: dt.date
    end_us: int
    shards: int
    schema: pa.Schema
    log: tuple[dt.date, ...]
    catalogues: tuple[dt.date, ...]
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

    @property
    def folder(self) -> str:
        return os.path.join(self.staging, TRAINING_ROWS.name)


@dataclass(frozen=True)
class TrainingRowsJob:
    """Holds what the workers of TRAINING-ROWS need to know beside the `days`, which ascend.

    `gap_us` is what parts two requests without request_id, and `categories` the scope, None for
    everything. `done` are the parts that were made before the job, as `part_of` names them.
    """

    law: HistoryLaw
    gap_us: int
    day_timezone: str
    categories: tuple[str, ...] | None
    days: tuple[TrainingRowsDay, ...]
    staging: str
    done: frozenset[tuple[int, int]] = frozenset()

    @property
    def shards(self) -> int:
        """Returns how many shards of users, and of items, the log is walked through in."""
        return max(day.shards for day in self.days)

    def part_of(self, place: int, shard: int) -> tuple[int, int]:
        """Returns where a shard's rows of a day go: the day's place and the shard of its table."""
        return place, shard * self.days[place].shards // self.shards

    def find_done(self) -> frozenset[tuple[int, int]]:
        """Looks for the parts that are made already."""
        return frozenset(
            (place, shard)
            for place, day in enumerate(self.days)
            for shard in partitions.finished(day.folder, day.shards)
        )


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


_COUNTS = (
    "impressions", "requests", "clicks", "rows_with_history", "unclicked_left_out",
    "clicks_after_the_day", "out_of_scope_impressions", "catalogue_items",
)  # fmt: skip


def training_rows(
    rows: pa.Table, clicks: pa.Table, job: TrainingRowsJob, day: TrainingRowsDay
) -> tuple[pa.Table, dict[str, int]]:
    """Returns `training_rows` of a day's impressions, all of them in scope, and what was counted.

    `clicks` (user_id, item_id, click_time) hold all clicks in scope of the users of `rows`.
    """
    user_ids, (users, clickers) = codes_of([rows["user_id"], clicks["user_id"]])
    item_ids, (items, clicked_items) = codes_of([rows["item_id"], clicks["item_id"]])
    given, codes = given_requests(rows, day.schema.field("request_id").type)
    times = rows["event_time"].cast(pa.int64()).to_numpy()
    requests = find_requests(users, codes, times, job.gap_us)
    request_ids = name_requests(requests, given)

    clicked = rows["clicked"].to_numpy()
    in_time = click_moments(rows, job.law.click_delay_us)[0] < day.end_us
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


# ---- Pure functions: the scope ---------------------------------------------------------------


@dataclass(frozen=True)
class ScopeRuns:
    """Holds the runs of days on which items are in scope.

    The item at place i of the distinct `items` has the runs `starts[i]:starts[i + 1]`, int64
    [items + 1]; of each run, `first` and `last` are the places of its days, int32 [runs].
    """

    items: pa.Array
    starts: np.ndarray
    first: np.ndarray
    last: np.ndarray


def find_runs(
    catalogues: Iterable[tuple[int, pa.Table]],
    windows: Sequence[tuple[int, int]],
    kind: pa.DataType,
) -> ScopeRuns:
    """Finds the runs of days on which each item is in scope.

    On a day it is what the newest catalogue that has the item says, of those with numbers from the
    first to the second of the day's window. `catalogues` (item_id, in_scope) ascend, and so do the
    windows. One catalogue is held at a time. `kind` is the type of the IDs.
    """
    # Of each item so far: what lists it last, what that says, and where its open run began.
    items = pa.array([], kind)
    listed, since = np.empty(0, np.int32), np.empty(0, np.int32)  # -1 = nowhere
    inside = np.empty(0, bool)
    runs: list[np.ndarray] = []  # each [3, ended runs]: item, first, last
    coming = iter(catalogues)
    comes = next(coming, None)
    for place, (oldest, newest) in enumerate(windows):
        while comes is not None and comes[0] <= newest:
            number, table = comes
            items, at = _codes_among(items, table["item_id"])
            listed, since, inside = (
                np.pad(column, (0, len(items) - len(column)), constant_values=missing)
                for column, missing in ((listed, -1), (since, -1), (inside, False))
            )
            says = table["in_scope"].to_numpy()
            listed[at], inside[at] = number, False
            inside[at[says]] = True  # of an item that it has twice, either may say so
            comes = next(coming, None)
        now = inside & (listed >= oldest)
        ended = np.flatnonzero(~now & (since >= 0))
        runs.append(np.stack([ended, since[ended], np.full(len(ended), place - 1)]))
        since[ended] = -1
        since[now & (since < 0)] = place
    rest = np.flatnonzero(since >= 0)
    runs.append(np.stack([rest, since[rest], np.full(len(rest), len(windows) - 1)]))
    item, first, last = np.concatenate(runs, axis=1)
    order = np.argsort(item, kind="stable")
    starts = np.searchsorted(item[order], np.arange(len(items) + 1))
    return ScopeRuns(items, starts, first[order].astype(np.int32), last[order].astype(np.int32))


def _codes_among(items: pa.Array, ids: pa.ChunkedArray) -> tuple[pa.Array, np.ndarray]:
    """Returns the distinct `items` with those of `ids` that they lack, and the places of `ids`."""
    at = pc.index_in(ids, value_set=items)
    if at.null_count:
        new = pc.unique(ids.filter(pc.is_null(at)))
        items = pa.concat_arrays([items, new])
        at = pc.index_in(ids, value_set=items)
    return items, at.to_numpy().astype(np.int64)


def add_runs(rows: pa.Table, runs: ScopeRuns, own: int, known: tuple[int, int]) -> pa.Table:
    """Returns the rows of a day's log with the `first` and `last` of the days they are in scope on.

    `own` is the place of that day, -1 where it is none of the job's, and `known` the first and last
    place of the days that know its clicks. A click stands there once for each run that meets these;
    another row only where it is in scope on its own day.
    """
    code = pc.fill_null(pc.index_in(rows["item_id"], value_set=runs.items), -1).to_numpy()
    starts = np.append(runs.starts, runs.starts[-1])  # at -1: no run
    sizes = np.where(code < 0, 0, starts[code + 1] - starts[code])
    row = np.arange(len(rows)).repeat(sizes)
    run = np.arange(len(row)) - (np.cumsum(sizes) - sizes - starts[code]).repeat(sizes)
    first, last = runs.first[run], runs.last[run]
    clicked = rows["clicked"].to_numpy()[row]
    kept = (first <= own) & (own <= last) | clicked & (first <= known[1]) & (last >= known[0])
    found = rows.take(pa.array(row[kept]))
    for name, values in zip(_RUN, (first[kept], last[kept]), strict=True):
        found = found.append_column(name, pa.array(values))
    return found


def are_in_scope(rows: pa.Table, place: int) -> pa.ChunkedArray:
    """Tells which of `rows`, to which runs were added, are in scope on the day at `place`."""
    first, last = (rows[name] for name in _RUN)
    return pc.and_(pc.less_equal(first, place), pc.greater_equal(last, place))


# ---- Pure functions: the walk ----------------------------------------------------------------


def walk_log(
    pieces: Mapping[int, Sequence[Piece]], job: TrainingRowsJob
) -> Iterator[tuple[pa.Table, pa.Table]]:
    """Yields, for each day of the job, its impressions in scope and the clicks of their users.

    `pieces` are those of some users, by the ordinal of the day that logged their rows. No more is
    held than the clicks that a day knows, and its own rows.
    """
    known: dict[int, pa.Table] = {}
    for place, day in enumerate(job.days):
        today = day.ds.toordinal()
        rows = read_pieces(pieces.get(today, ()), day.no_rows)
        numbers = [number for number in map(dt.date.toordinal, day.log) if number in pieces]
        known = {
            n: known[n] if n in known
            else _clicks_logged(rows if n == today else read_pieces(pieces[n], day.no_rows), n, job)
            for n in numbers
        }  # fmt: skip
        if not len(rows):
            yield rows, day.no_clicks
            continue
        clicks = pa.concat_tables(known.values())
        # Most users of the window are not here today, and sorting their clicks would be in vain.
        counts = pc.is_in(clicks["user_id"], value_set=pc.unique(rows["user_id"]))
        if _RUN[0] in rows.column_names:
            counts = pc.and_(counts, are_in_scope(clicks, place))
            rows = rows.filter(are_in_scope(rows, place)).drop_columns(list(_RUN))
        yield rows, clicks.filter(counts)


def _clicks_logged(rows: pa.Table, number: int, job: TrainingRowsJob) -> pa.Table:
    """Returns the clicks of some rows of the log of the day with this ordinal."""
    end_us = day_end(dt.date.fromordinal(number), job.day_timezone)
    carry = [name for name in _RUN if name in rows.column_names]
    return clicks_of(rows, number, end_us, job.law, carry)


def by_day(found: Iterable[tuple[int, Piece]]) -> dict[int, list[Piece]]:
    """Groups pieces by the ordinal of their day, ascending."""
    pieces: dict[int, list[Piece]] = {}
    for number, piece in sorted(found):
        pieces.setdefault(number, []).append(piece)
    return pieces


# ---- Transforms ----------------------------------------------------------------------------


def _pieces(staging: str, *name: object) -> str:
    """Returns where pieces go; what follows in the name is up to `write_pieces`."""
    return os.path.join(staging, "pieces", "-".join(map(str, name)))


class ReadLog(beam.DoFn):
    """Turns a row group of the log into pieces of its rows: (shard, (ordinal of its day, piece)).

    Of days that are none of the job's only the clicks are kept. Where there is a scope, the shards
    are of items, as (shard, type of the IDs): those of two types never meet. What a row group tells
    of its day goes out as `facts`.
    """

    def __init__(self, job: TrainingRowsJob):
        self._law, self._day_timezone, self._shards = job.law, job.day_timezone, job.shards
        self._by_item = job.categories is not None
        self._days = {day.ds.toordinal() for day in job.days}
        self.staging = job.staging

    @worker_notes.refusing
    def process(self, group: RowGroup) -> Iterator[Any]:
        number = group.form.ds.toordinal()
        wanted = [*IMPRESSION_COLUMNS, "click_time"]
        if number in self._days:
            wanted.append("request_id")
        rows = read_rows(group, wanted)
        checked_clicks(group, rows, self._law, self._day_timezone, self.staging)
        for told in facts_of_group(group, rows, self._law, self._day_timezone):
            yield beam.pvalue.TaggedOutput("facts", told)
        if number not in self._days:
            rows = rows.filter(rows["clicked"])
        path = _pieces(self.staging, "log", documents.digest([group.path, group.index])[:16])
        key = "item_id" if self._by_item else "user_id"
        for shard, piece in split_into_pieces(path, rows, key, self._shards):
            yield item_key(shard, rows) if self._by_item else shard, (number, piece)


class ReadCatalogue(beam.DoFn):
    """Turns a row group of a catalogue into pieces of its items (item_id, in_scope).

    They come as ((item shard, type of the IDs), (ordinal of its day, piece)).
    """

    def __init__(self, job: TrainingRowsJob):
        self._categories, self._shards, self.staging = job.categories, job.shards, job.staging

    @worker_notes.refusing
    def process(self, group: RowGroup) -> Iterator[tuple[tuple[int, str], tuple[int, Piece]]]:
        rows = read_rows(group, ["item_id", "category"])
        inside = encoder_info.in_scope(rows["category"], self._categories)
        items = pa.table({"item_id": rows["item_id"], "in_scope": inside})
        path = _pieces(self.staging, "items", documents.digest([group.path, group.index])[:16])
        for shard, piece in split_into_pieces(path, items, "item_id", self._shards):
            yield item_key(shard, items), (group.form.ds.toordinal(), piece)


def split_into_pieces(
    path: str, rows: pa.Table, key: str, shards: int
) -> Iterator[tuple[int, Piece]]:
    """Writes `rows` in a piece for each shard of their `key`; yields the shards with the pieces."""
    if len(rows):
        yield from write_pieces(path, rows, hashing.shard_of(hashing.hash_ids(rows[key]), shards))


def item_key(shard: int, rows: pa.Table) -> tuple[int, str]:
    """Returns the key of an item shard, for rows whose item IDs are of one type."""
    return shard, str(rows["item_id"].type)


class KeepInScope(beam.DoFn):
    """Keeps what is in scope on some day of the log's rows of an item shard.

    Pieces of the log and of catalogues come in. What is in scope goes out by user shard, with the
    days on which it is, as (shard, (ordinal of its day, piece)); and under `counts` how many
    impressions of a day are not, and how many rows of its catalogues came, as what
    `MakeTrainingRows` tells of it.
    """

    def __init__(self, job: TrainingRowsJob, windows: Sequence[tuple[int, int]]):
        self._job, self._windows, self.staging = job, windows, job.staging
        self._places = {day.ds.toordinal(): place for place, day in enumerate(job.days)}
        self._known: dict[int, tuple[int, int]] = {}  # by day: who knows its clicks, from and to
        for place, day in enumerate(job.days):
            for number in map(dt.date.toordinal, day.log):
                self._known[number] = (self._known.get(number, (place,))[0], place)

    @worker_notes.refusing
    def process(
        self, element: tuple[tuple[int, str], dict[str, Iterable[tuple[int, Piece]]]]
    ) -> Iterator[Any]:
        job, ((shard, kind), found) = self._job, element
        listed = list(found["catalogues"])
        catalogues = (
            (number, read_pieces(pieces, pa.table({}))) for number, pieces in by_day(listed).items()
        )
        runs = find_runs(catalogues, self._windows, pa.type_for_alias(kind))
        for place, (oldest, newest) in enumerate(self._windows):
            came = sum(piece.rows for n, piece in listed if oldest <= n <= newest)
            if came:
                part = job.part_of(place, shard)
                yield beam.pvalue.TaggedOutput("counts", (part, ([], {"catalogue_items": came})))
        for number, pieces in by_day(found["log"]).items():
            rows = read_pieces(pieces, pa.table({}))
            place = self._places.get(number, -1)
            kept = add_runs(rows, runs, place, self._known[number])
            path = _pieces(self.staging, "scope", number, kind, f"{shard:05d}")
            for user_shard, piece in split_into_pieces(path, kept, "user_id", job.shards):
                yield user_shard, (number, piece)
            if place >= 0:
                left_out = len(rows) - (pc.sum(are_in_scope(kept, place)).as_py() or 0)
                part, counts = job.part_of(place, shard), {"out_of_scope_impressions": left_out}
                yield beam.pvalue.TaggedOutput("counts", (part, ([], counts)))


class MakeTrainingRows(beam.DoFn):
    """Turns the log of a user shard into pieces of the training rows of every day.

    What comes out is ((day, shard), (pieces, what was counted)).
    """

    def __init__(self, job: TrainingRowsJob):
        self._job, self.staging = job, job.staging

    @worker_notes.refusing
    def process(
        self, element: tuple[int, Iterable[tuple[int, Piece]]]
    ) -> Iterator[tuple[tuple[int, int], tuple[list[Piece], dict[str, int]]]]:
        job, (shard, found) = self._job, element
        for place, (rows, clicks) in enumerate(walk_log(by_day(found), job)):
            day, part = job.days[place], job.part_of(place, shard)
            if not len(rows) or part in job.done:
                continue
            made, counts = training_rows(rows, clicks, job, day)
            path = _pieces(job.staging, "rows", place, f"{shard:05d}")
            pieces = write_pieces(path, made, np.zeros(len(made), np.int64))
            yield part, ([piece for _, piece in pieces], counts)


class WriteTrainingRows(beam.DoFn):
    """Turns a day's pieces of a shard into one part of `training_rows`."""

    def __init__(self, job: TrainingRowsJob):
        self._job, self.staging = job, job.staging

    @worker_notes.refusing
    def process(self, element: tuple[tuple[int, int], Iterable]) -> None:
        (place, shard), found = element
        day = self._job.days[place]
        if (place, shard) in self._job.done:
            return
        pieces, counts = [], Counter(dict.fromkeys(_COUNTS, 0))
        for made, counted in filter(None, found):
            pieces += made
            counts.update(counted)
        rows = read_pieces(pieces, arrays.empty_rows(day.schema)).combine_chunks()
        partitions.write_part(
            day.folder, TRAINING_ROWS, day.schema, rows, shard, day.shards, dict(counts),
            made_from=made_from(pieces),
        )  # fmt: skip


def keep_in_scope(
    root: beam.Pipeline,
    log: beam.PCollection,
    catalogues: Sequence[Source],
    windows: Sequence[tuple[int, int]],
    job: TrainingRowsJob,
) -> tuple[beam.PCollection, beam.PCollection]:
    """Returns what of the log by item shard is in scope, by user shard, and what was counted.

    `windows` are those of `catalogue_windows`.
    """
    items = (
        root
        | "CatalogueGroups" >> beam.Create([group for day in catalogues for group in day.groups()])
        | "ReadCatalogue" >> beam.ParDo(ReadCatalogue(job))
    )
    kept = (
        {"log": log, "catalogues": items}
        | "ByItemShard" >> beam.CoGroupByKey()
        | "KeepInScope" >> beam.ParDo(KeepInScope(job, windows)).with_outputs("counts", main="kept")
    )
    return kept.kept, kept.counts


# ---- The job -------------------------------------------------------------------------------


def check_days(days: Sequence[TrainingRowsDay], log: Sequence[Source]) -> None:
    """Raises ValueError where the days do not ascend, or `log` is not what they need, each once."""
    needed = sorted({day for one in days for day in one.log})
    given, dates = sorted(source.form.ds for source in log), [day.ds for day in days]
    knows_itself = all(day.ds in day.log for day in days)
    if given != needed or dates != sorted(set(dates)) or not knows_itself:
        raise ValueError(f"the days {dates} need the logs of {needed}, given are {given}")


def catalogue_windows(
    days: Sequence[TrainingRowsDay], catalogues: Sequence[Source]
) -> list[tuple[int, int]]:
    """Returns the ordinals of the oldest and the newest catalogue of each day.

    A catalogue that is alone is one snapshot for all days, whichever day it was opened for. Raises
    ValueError where a day lacks one of the catalogues in between: it would be told by that too.
    """
    numbers = sorted(source.form.ds.toordinal() for source in catalogues)
    if len(numbers) == 1:
        return [(numbers[0], numbers[0])] * len(days)
    windows = []
    for day in days:
        mine = sorted(map(dt.date.toordinal, day.catalogues))
        if mine != [n for n in numbers if mine and mine[0] <= n <= mine[-1]] or not mine:
            raise ValueError(f"{day.ds} has the catalogues {day.catalogues}, with gaps")
        windows.append((mine[0], mine[-1]))
    return windows


def define_training_rows(
    root: beam.Pipeline, log: Sequence[Source], catalogues: Sequence[Source], job: TrainingRowsJob
) -> None:
    """Writes `training_rows` of each day of `job` below the staging folder of that day.

    There is one part per user shard. `log` are all days that some day's clicks come from, those of
    the job among them, and `catalogues` all that tell categories, empty where everything is in
    scope; each of them once.
    """
    check_days(job.days, log)
    windows = catalogue_windows(job.days, catalogues) if job.categories is not None else []
    job = replace(job, days=_with_equal_values_shared(job.days), done=job.find_done())
    read = (
        root
        | "LogGroups" >> beam.Create([group for day in log for group in day.groups()])
        | "ReadLog" >> beam.ParDo(ReadLog(job)).with_outputs("facts", main="rows")
    )
    _ = read.facts | "JudgeDays" >> JudgeDays(log, job.staging)
    rows = read.rows
    parts = [every_shard_of_days(root, [day.shards for day in job.days])]
    if job.categories is not None:
        rows, counts = keep_in_scope(root, rows, catalogues, windows, job)
        parts.append(counts)
    made = (
        rows
        | "ByUserShard" >> beam.GroupByKey()
        | "MakeTrainingRows" >> beam.ParDo(MakeTrainingRows(job))
    )
    _ = (
        (made, *parts)
        | "RowsAndShards" >> beam.Flatten()
        | "ByDayAndShard" >> beam.GroupByKey()
        | "WriteTrainingRows" >> beam.ParDo(WriteTrainingRows(job))
    )


def _with_equal_values_shared(days: Sequence[TrainingRowsDay]) -> tuple[TrainingRowsDay, ...]:
    """Returns the days with one object for all equal dates, and for all equal schemas.

    Pickled with a DoFn, an object of its own for each would make a job of many days too large to be
    submitted.
    """
    seen: dict[Any, Any] = {}

    def shared(value: Any) -> Any:
        return seen.setdefault(value, value)

    return tuple(
        replace(
            day,
            ds=shared(day.ds),
            schema=shared(day.schema),
            log=tuple(map(shared, day.log)),
            catalogues=(),  # their windows say what is needed
        )
        for day in days
    )
