"""Makes point-in-time histories: what a user had clicked strictly before a moment.

In: the impressions of one day or of several in a row, and what was known at the end of the day
before them: its `user_histories` and `recent_clicks`, or, where the world begins, the log of the
days of the window. Out, for each day: `user_histories`, one row for every user with a click in the
window as of the end of ds; and `recent_clicks`, what the next day needs besides.

The law, for these tables, for SimScores, training rows and every join: the history of a moment t
holds the `history_len` latest distinct items with t - window <= click time < t - lag. Equal times
are not before. An item clicked twice stands once, at its newest place (with `keep_repeats` at all
of them). Clicks of one user at one time are ordered by item ID, so that the order in which rows
arrive never matters. Known to a partition are the clicks of its log and of earlier days' logs.

A click may be dated after the end of the day that logs it, and an impression may come in the log of
a later day than its own. `recent_clicks` therefore keeps what `user_histories` does not show but a
moment from `late_us` before the end of ds on can see. An impression that comes later than that has
no history: what is left of it by then depends on later clicks.
"""

import datetime as dt
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_jobs import inputs
from feature_jobs.impressions.clicks import Clicks, HistoryLaw, histories_at, sort_clicks
from feature_jobs.impressions.day_checks import DayFacts, JudgeDays, facts_of
from feature_jobs.inputs import RowGroup, Source, check_day, read_rows
from feature_jobs.schemas import RECENT_CLICKS, TIMESTAMP, USER_HISTORIES, Table
from feature_jobs.store import arrays, documents, hashing, partitions, worker_notes
from feature_jobs.store.arrays import list_array
from feature_jobs.store.every_shard import (
    check_all_came,
    every_shard,
    every_shard_of_days,
)
from feature_jobs.store.pieces import Piece, made_from, read_pieces, write_piece, write_pieces

DAY_US = 86_400_000_000


@dataclass(frozen=True)
class HistoryDay:
    """Describes a day whose log is walked through: its ordinal, first moment and end.

    The end is the first moment after the day.
    """

    number: int
    start_us: int
    end_us: int

    def known_from_us(self, law: HistoryLaw) -> int:
        """Returns the earliest moment whose history is known when the day's log comes in."""
        return self.start_us - law.late_us


# ---- Pure functions: clicks of tables --------------------------------------------------------


def click_moments(rows: pa.Table, click_delay_us: int) -> tuple[np.ndarray, int]:
    """Returns when each click of `rows` happened, int64 us [n], and how many were dated too early.

    Without a click time a click is dated event_time + click_delay. A click cannot precede its own
    impression: dated so by a skewed clock it would enter its own history, so it is moved there.
    """
    event = rows["event_time"].cast(pa.int64()).to_numpy()
    if "click_time" not in rows.column_names:
        return event + click_delay_us, 0
    known = rows["click_time"].cast(pa.int64())
    moment = pc.coalesce(known, pa.array(event + click_delay_us)).to_numpy()
    return np.maximum(moment, event), int((moment < event).sum())


def clicks_of(
    rows: pa.Table, day: int, end_us: int, law: HistoryLaw, carry: Sequence[str] = ()
) -> pa.Table:
    """Returns the clicks of some impressions (user_id, item_id, click_time, day).

    `day` is the ordinal of the partition that logged them and `end_us` its end. Clicks dated a
    whole window after that are left out: a time in a wrong unit looks like this, and would be kept
    for ever. Columns to `carry` come with the others.
    """
    rows = rows.filter(rows["clicked"])
    moments, _ = click_moments(rows, law.click_delay_us)
    sane = moments < end_us + law.window_us
    rows, moments = rows.filter(pa.array(sane)), moments[sane]
    return pa.table(
        {
            "user_id": rows["user_id"],
            "item_id": rows["item_id"],
            "click_time": pa.array(moments).cast(TIMESTAMP),
            "day": np.full(len(rows), day, np.int32),
            **{name: rows[name] for name in carry},
        }
    )


def no_clicks(user_id: pa.DataType, item_id: pa.DataType) -> pa.Table:
    """Returns an empty table of clicks."""
    kinds = [user_id, item_id, TIMESTAMP, pa.int32()]
    names = ["user_id", "item_id", "click_time", "day"]
    return pa.schema(list(zip(names, kinds, strict=True))).empty_table()


def codes_of(ids: Sequence[pa.ChunkedArray]) -> tuple[pa.Array, list[np.ndarray]]:
    """Returns the distinct IDs of all columns, ascending, and each column as codes into them."""
    distinct = pc.unique(pa.chunked_array([chunk for c in ids for chunk in c.chunks], ids[0].type))
    distinct = distinct.take(pc.sort_indices(distinct))
    return distinct, [pc.index_in(c, value_set=distinct).to_numpy().astype(np.int64) for c in ids]


def clicks_before(rows: Iterable[pa.Table], no_rows: pa.Table) -> pa.Table:
    """Returns the clicks in a day's `user_histories` and `recent_clicks`, as logged on day 0."""
    parts = [no_rows]
    for table in rows:
        items = table["item_ids"].combine_chunks()
        of_row = pc.list_parent_indices(items)
        parts.append(
            pa.table(
                {
                    "user_id": table["user_id"].take(of_row),
                    "item_id": items.flatten(),
                    "click_time": table["click_times"].combine_chunks().flatten(),
                    "day": np.zeros(len(of_row), np.int32),
                }
            )
        )
    return pa.concat_tables(parts)


# ---- Pure functions: what is known on a day --------------------------------------------------


@dataclass(frozen=True)
class Known:
    """Holds the clicks of some users that are known when the log of `day` is in.

    They are those of its histories. `user_ids` and `item_ids` are distinct and ascending; the codes
    of `clicks` point into them.
    """

    day: HistoryDay
    law: HistoryLaw
    user_ids: pa.Array
    item_ids: pa.Array
    clicks: Clicks

    def of_all_users(self, moment_us: int, law: HistoryLaw) -> np.ndarray:
        """Returns the places of the clicks that are the users' histories at a moment, ascending."""
        users = len(self.user_ids)
        places = histories_at(self.clicks, np.arange(users), np.full(users, moment_us), law)
        return places[places >= 0]

    @cached_property
    def at_the_end(self) -> np.ndarray:
        """Returns the places of the clicks that are the users' histories at the end of the day.

        They ascend, and are of all clicks till then, without lag: whoever serves stale histories
        knows best how stale.
        """
        return self.of_all_users(self.day.end_us, replace(self.law, lag_us=0))

    @cached_property
    def still_needed(self) -> np.ndarray:
        """Tells which clicks can still be seen by a moment in the log of the next day; bool [n].

        The moment may see them alone, or after others have come in.
        """
        horizon = self.day.end_us - self.law.late_us
        needed = self.clicks.times >= horizon - self.law.lag_us
        needed[self.of_all_users(horizon, self.law)] = True
        return needed


def walk_days(clicks: pa.Table, days: Sequence[HistoryDay], law: HistoryLaw) -> Iterator[Known]:
    """Yields what is known on each of `days`, consecutive ones: the night's recurrence.

    `clicks` (user_id, item_id, click_time, day) hold all clicks of some users that were logged on
    these days, and those from before the first. What a later moment cannot see is left behind, as
    it is between two nights.
    """
    user_ids, (users,) = codes_of([clicks["user_id"]])
    item_ids, (items,) = codes_of([clicks["item_id"]])
    logged = np.maximum(clicks["day"].to_numpy(), days[0].number - 1)
    order = np.argsort(logged, kind="stable")
    columns = [c[order] for c in (users, clicks["click_time"].cast(pa.int64()).to_numpy(), items)]
    bounds = np.searchsorted(logged[order], [day.number for day in days] + [days[-1].number + 1])
    carried = [column[: bounds[0]] for column in columns]
    for day, at, end in zip(days, bounds[:-1], bounds[1:], strict=True):
        now = [np.concatenate([c, new[at:end]]) for c, new in zip(carried, columns, strict=True)]
        log = sort_clicks(now[0], now[1], now[2], law.keep_repeats)
        known = Known(day, law, user_ids, item_ids, log)
        yield known
        if day is not days[-1]:
            carried = [c[known.still_needed] for c in (log.users, log.times, log.items)]


def history_lists(known: Known, rows: pa.Table) -> pa.Array:
    """Returns the history of each of some impressions of the day, as a list array.

    It holds item IDs, newest first.
    """
    moments = rows["event_time"].cast(pa.int64()).to_numpy()
    users = pc.fill_null(pc.index_in(rows["user_id"], value_set=known.user_ids), -1)
    users = np.where(moments < known.day.known_from_us(known.law), -1, users.to_numpy())
    places = histories_at(known.clicks, users, moments, known.law)
    there = places >= 0
    flat = known.item_ids.take(pa.array(known.clicks.items[places[there]]))  # newest first
    return list_array(there.sum(axis=1), flat)


def user_histories(known: Known) -> pa.Table:
    """Returns the history of every user who has one as of the end of the day."""
    return _by_user(known, known.at_the_end)


def recent_clicks(known: Known) -> pa.Table:
    """Returns the known clicks that `user_histories` of the day lacks and the next day needs."""
    needed = known.still_needed.copy()
    needed[known.at_the_end] = False
    return _by_user(known, np.flatnonzero(needed))


def _by_user(known: Known, places: np.ndarray) -> pa.Table:
    """Returns the clicks at `places` [k], ascending, a row for each user who has some of them."""
    log = known.clicks
    users, sizes = np.unique(log.users[places], return_counts=True)
    times = pa.array(log.times[places]).cast(TIMESTAMP)
    return pa.table(
        {
            "user_id": known.user_ids.take(pa.array(users)),
            "item_ids": list_array(sizes, known.item_ids.take(pa.array(log.items[places]))),
            "click_times": list_array(sizes, times),
        }
    )


# ---- Transforms ------------------------------------------------------------------------------


@dataclass(frozen=True)
class HistoriesJob:
    """Describes the histories of consecutive `days`, walked through in `shards` of users.

    `before` are `user_histories` and `recent_clicks` of the day before the first, empty where that
    day's clicks come from the log instead.
    """

    law: HistoryLaw
    days: tuple[HistoryDay, ...]
    before: tuple[partitions.Partition, ...]
    shards: int
    user_id: pa.DataType
    item_id: pa.DataType
    day_timezone: str
    staging: str

    def known(self, shard: int, pieces: Iterable[Piece]) -> Iterator[Known]:
        """Yields what is known of a shard's users on each day; `pieces` are clicks of the log."""
        return self.known_of(shard, read_pieces(pieces, no_clicks(self.user_id, self.item_id)))

    def known_of(self, shard: int, clicks: pa.Table) -> Iterator[Known]:
        """Yields the same of `clicks` themselves."""
        nothing = no_clicks(self.user_id, self.item_id)
        columns = ["user_id", "item_ids", "click_times"]
        before = (p.read_shard(shard, self.shards, "user_id", columns) for p in self.before)
        every = pa.concat_tables([clicks_before(before, nothing), clicks])
        return walk_days(every, self.days, self.law)


def checked_clicks(
    group: RowGroup, rows: pa.Table, law: HistoryLaw, day_timezone: str, staging: str
) -> pa.Table:
    """Returns the clicks of the rows of a row group, and warns of those that are left out.

    Raises DataContractError where an event lies after the day of its partition.
    """
    end_us = inputs.day_end(group.form.ds, day_timezone)
    check_day(group, rows, end_us)
    clicks = clicks_of(rows, group.form.ds.toordinal(), end_us, law)
    if len(clicks) < (pc.sum(rows["clicked"]).as_py() or 0):
        worker_notes.warn(
            staging,
            f"Clicks of ds {group.form.ds} are dated more than window_days after its end and "
            "are left out of histories. Look at click_time: a wrong unit looks like this.",
        )
    return clicks


def facts_of_group(
    group: RowGroup, rows: pa.Table, law: HistoryLaw, day_timezone: str
) -> Iterator[tuple[int, DayFacts]]:
    """Yields what the rows of a row group tell of their day, by its ordinal."""
    ds = group.form.ds
    if len(rows):
        start, end = (inputs.day_end(day, day_timezone) for day in (ds - dt.timedelta(days=1), ds))
        yield ds.toordinal(), facts_of(rows, start, end, law.window_us)


class LogChunk(NamedTuple):
    """Holds what a row group of the log says of a shard of users.

    These are the ordinal of its day, how many impressions, and those that are clicks that count.
    """

    day: int
    impressions: int
    clicks: Piece | None


def open_chunks(chunks: Iterable[LogChunk | bytes]) -> tuple[list[Piece], Counter[int]]:
    """Returns the clicks of chunks of the log, and how many impressions they tell of, by day."""
    found = [chunk for chunk in chunks if isinstance(chunk, LogChunk)]
    impressions: Counter[int] = Counter()
    for chunk in found:
        impressions[chunk.day] += chunk.impressions
    return [chunk.clicks for chunk in found if chunk.clicks], impressions


class ReadClicks(beam.DoFn):
    """Turns a row group of impressions into a chunk for each shard of users.

    A chunk counts the impressions beside the clicks: how many impressions a day has is known, so
    that it shows where chunks are lost. What it tells of its day goes out as `facts`.
    """

    def __init__(self, law: HistoryLaw, day_timezone: str, shards: int, staging: str):
        self._law = law
        self._day_timezone = day_timezone
        self._shards = shards
        self.staging = staging

    @worker_notes.refusing
    def process(self, group: RowGroup) -> Iterator[Any]:
        rows = read_rows(group, ["user_id", "item_id", "event_time", "clicked", "click_time"])
        clicks = checked_clicks(group, rows, self._law, self._day_timezone, self.staging)
        if not len(rows):
            return
        for told in facts_of_group(group, rows, self._law, self._day_timezone):
            yield beam.pvalue.TaggedOutput("facts", told)
        shards, shards_of_clicks = (
            hashing.shard_of(hashing.hash_ids(some["user_id"]), self._shards)
            for some in (rows, clicks)
        )
        name = documents.digest([group.path, group.index])[:16]
        path = os.path.join(self.staging, "pieces", f"clicks-{name}")
        pieces = dict(write_pieces(path, clicks, shards_of_clicks))
        impressions = np.bincount(shards)
        for shard in np.flatnonzero(impressions).tolist():
            chunk = LogChunk(group.form.ds.toordinal(), int(impressions[shard]), pieces.get(shard))
            yield shard, chunk


class UsersOfDay(NamedTuple):
    """Holds the rows of a day's tables of some users, and how many impressions they had on it."""

    user_histories: Piece | None
    recent_clicks: Piece | None
    impressions: int


class AdvanceHistories(beam.DoFn):
    """Turns the clicks of a user shard into pieces of the tables of every day.

    What comes out is ((day, shard), what there is of these users), once for each day. `shards` are
    those of each day's tables, none more than the job's.
    """

    def __init__(self, job: HistoriesJob, shards: Sequence[int]):
        self._job, self._shards = job, shards
        self.staging = job.staging

    @worker_notes.refusing
    def process(
        self, element: tuple[int, Iterable[LogChunk | bytes]]
    ) -> Iterator[tuple[tuple[int, int], UsersOfDay]]:
        job, (shard, chunks) = self._job, element
        clicks, impressions = open_chunks(chunks)
        for day, known in enumerate(job.known(shard, clicks)):
            path = os.path.join(job.staging, "pieces", f"{{}}-{day}-{shard:05d}")
            users = UsersOfDay(
                write_piece(path.format(USER_HISTORIES.name), user_histories(known)),
                write_piece(path.format(RECENT_CLICKS.name), recent_clicks(known)),
                impressions[job.days[day].number],
            )
            yield (day, shard * self._shards[day] // job.shards), users


class WriteHistories(beam.DoFn):
    """Turns a day's pieces of a shard into a part of `user_histories` and of `recent_clicks`."""

    def __init__(self, job: HistoriesJob, shards: Sequence[int], stagings: Sequence[str]):
        self._job, self._shards, self._stagings = job, shards, stagings
        self.staging = job.staging

    @worker_notes.refusing
    def process(self, element: tuple[tuple[int, int], Iterable]) -> None:
        (day, shard), given = element
        found = [users for users in given if isinstance(users, UsersOfDay)]
        expected = self._job.shards // self._shards[day]
        check_all_came(f"user shards walked through day {day + 1} of the job", len(found), expected)
        histories = [users.user_histories for users in found if users.user_histories]
        counts = {
            "impressions": sum(users.impressions for users in found),
            "users": sum(piece.rows for piece in histories),
        }
        limits = {"item_ids": self._job.law.history_len}
        self._write(USER_HISTORIES, day, shard, histories, counts, limits)
        recent = [users.recent_clicks for users in found if users.recent_clicks]
        self._write(RECENT_CLICKS, day, shard, recent)

    def _write(
        self, table: Table, day: int, shard: int, pieces: Sequence[Piece],
        counts: dict[str, int] | None = None, limits: dict[str, int] | None = None,
    ) -> None:  # fmt: skip
        folder, shards = os.path.join(self._stagings[day], table.name), self._shards[day]
        source = made_from(pieces)
        if not partitions.has_part(folder, shard, shards, source):
            schema = table.schema(self._job.item_id, self._job.user_id)
            rows = read_pieces(pieces, arrays.empty_rows(schema))
            partitions.write_part(
                folder, table, schema, rows, shard, shards, counts, limits=limits, made_from=source
            )


def clicks_by_user(
    root: beam.Pipeline, log: Sequence[Source], job: HistoriesJob,
    wanted: beam.PCollection | None = None,
) -> beam.PCollection:  # fmt: skip
    """Returns the clicks of `log` by the job's shards of users, every shard among them.

    Days of the log that cannot be meant are refused, and those of which something is lost. It is
    not read where `wanted`, a collection of one number, is 0.
    """
    read_clicks = ReadClicks(job.law, job.day_timezone, job.shards, job.staging)
    groups = root | "ClickGroups" >> beam.Create([g for day in log for g in day.groups()])
    unread = []
    if wanted is not None:
        is_wanted = beam.pvalue.AsSingleton(wanted)
        told = [(day.form.ds.toordinal(), DayFacts(rows=day.rows)) for day in log]
        unread.append(
            root
            | "FactsOfUnread" >> beam.Create(told)
            | "IfUnread" >> beam.Filter(lambda _, count: not count, is_wanted)
        )
        groups |= "IfWanted" >> beam.Filter(lambda _, count: bool(count), is_wanted)
    read = groups | "ReadClicks" >> beam.ParDo(read_clicks).with_outputs("facts", main="clicks")
    facts = (read.facts, *unread) | "FactsOfLog" >> beam.Flatten()
    _ = facts | "JudgeLog" >> JudgeDays(log, job.staging)
    return (read.clicks, every_shard(root, job.shards)) | "ClicksAndShards" >> beam.Flatten()


# ---- The job ---------------------------------------------------------------------------------


def define_histories(
    root: beam.Pipeline,
    log: Sequence[Source],
    job: HistoriesJob,
    shards: Sequence[int],
    stagings: Sequence[str],
) -> None:
    """Writes `user_histories` and `recent_clicks` of each day of `job`.

    They are in so many `shards` a day, below the staging folder of that day. `log` are the logs of
    the days, and of those before them where `job` has no tables of the day before.
    """
    pieces = (
        clicks_by_user(root, log, job)
        | "ClicksByUser" >> beam.GroupByKey()
        | "AdvanceHistories" >> beam.ParDo(AdvanceHistories(job, shards))
    )
    _ = (
        (pieces, every_shard_of_days(root, shards))
        | "PiecesAndShards" >> beam.Flatten()
        | "ByDayAndShard" >> beam.GroupByKey()
        | "WriteHistories" >> beam.ParDo(WriteHistories(job, shards, stagings))
    )
