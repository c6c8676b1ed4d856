"""Point-in-time histories: what a user had clicked strictly before a moment.

In: the impressions of ds and of the days before it, as row groups. Out: `user_histories`,
one row for every user with a click in the window as of the end of ds, newest item first.

The law, for this table, for SimScores and for every join: the history of a moment t holds the
`history_len` latest distinct items with t - window <= click time < t. Equal times are not before.
An item clicked twice stands once, at its newest place. Clicks of one user at one time are ordered
by item ID, so that the order in which rows arrive never matters.

Clicks are looked for in the partitions of ds - window_days - SLACK_DAYS up to ds: a click may come
some days after the partition of its impression, and a late row of ds looks back from its own time.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_jobs import tables
from feature_jobs.inputs import RowGroup, Source, check_day, read_rows
from feature_jobs.schemas import TIMESTAMP, USER_HISTORIES

DAY_US = 86_400_000_000
SLACK_DAYS = 2
_MAX_CELLS = 4_000_000  # candidates looked at in one step: bounds the memory of a block
_NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True)
class HistoryLaw:
    """The settings that define a history. Times in microseconds."""

    history_len: int
    window_us: int
    click_delay_us: int


# ---- Pure functions ------------------------------------------------------------------------


@dataclass(frozen=True)
class Clicks:
    """Distinct clicks sorted by user, time, item; int64 [n] each, `users` and `items` as codes.

    `repeated_at` is the place of the same user's next click on the same item, `_NEVER` without one.
    """

    users: np.ndarray
    times: np.ndarray
    items: np.ndarray
    repeated_at: np.ndarray


def sort_clicks(users: np.ndarray, times: np.ndarray, items: np.ndarray) -> Clicks:
    """Sorts clicks and drops exact repeats. Item codes must follow the order of the item IDs."""
    order = np.lexsort((items, times, users))
    users, times, items = users[order], times[order], items[order]
    new = np.ones(len(users), bool)
    new[1:] = (np.diff(users) != 0) | (np.diff(times) != 0) | (np.diff(items) != 0)
    users, times, items = users[new], times[new], items[new]
    # Walk each user's clicks on one item in time order: the next of them is the repeat.
    order = np.lexsort((np.arange(len(users)), items, users))
    here, there = order[:-1], order[1:]
    again = (users[here] == users[there]) & (items[here] == items[there])
    repeated_at = np.full(len(users), _NEVER)
    repeated_at[here[again]] = there[again]
    return Clicks(users, times, items, repeated_at)


def count_before(clicks: Clicks, users: np.ndarray, times: np.ndarray) -> np.ndarray:
    """For each (user, time): how many clicks sort strictly before it; int64 [m].

    Thus clicks[:count] are those of smaller users and those of the user at earlier times.
    """
    n, m = len(clicks.users), len(users)
    is_click = np.repeat([False, True], [m, n])  # a moment sorts before clicks at the same time
    order = np.lexsort(
        (is_click, np.concatenate([times, clicks.times]), np.concatenate([users, clicks.users]))
    )
    seen = np.cumsum(is_click[order])
    counts = np.empty(n + m, np.int64)
    counts[order] = seen
    return counts[:m]


def latest_distinct(clicks: Clicks, first: np.ndarray, end: np.ndarray, length: int) -> np.ndarray:
    """For each range first:end of clicks, the places of its `length` latest distinct items.

    Returns int64 [m, length], newest first, padded with -1. A click counts only while no newer
    click on its item lies in the range.
    """
    found = np.full((len(first), length), -1, np.int64)
    todo = np.flatnonzero(end > first)
    width = 2 * length
    while len(todo):
        rows_at_once = max(1, _MAX_CELLS // width)
        blocks = [todo[at : at + rows_at_once] for at in range(0, len(todo), rows_at_once)]
        done = [_search_block(clicks, first, end, rows, width, found) for rows in blocks]
        todo = todo[~np.concatenate(done)]
        width *= 4  # rare: many repeats hide the older items, so look further back
    return found


def _search_block(
    clicks: Clicks,
    first: np.ndarray,
    end: np.ndarray,
    rows: np.ndarray,
    width: int,
    found: np.ndarray,
) -> np.ndarray:
    """Fills `found[rows]` from the `width` latest clicks; returns which rows are complete."""
    length = found.shape[1]
    place = end[rows, None] - 1 - np.arange(width)  # [rows, width], newest first
    inside = place >= first[rows, None]
    visible = inside & (clicks.repeated_at[np.maximum(place, 0)] >= end[rows, None])
    rank = np.cumsum(visible, axis=1)
    visible &= rank <= length
    row, column = np.nonzero(visible)
    found[rows[row], rank[row, column] - 1] = place[row, column]
    return (rank[:, -1] >= length) | ~inside[:, -1]


def histories_at(
    clicks: Clicks, users: np.ndarray, times: np.ndarray, law: HistoryLaw
) -> np.ndarray:
    """The history of each (user, moment): places in `clicks`, int64 [m, history_len], -1 = none."""
    end = count_before(clicks, users, times)
    first = count_before(clicks, users, times - law.window_us)
    return latest_distinct(clicks, first, end, law.history_len)


def click_moments(rows: pa.Table, click_delay_us: int) -> tuple[np.ndarray, int]:
    """When each click of `rows` happened, int64 us [n], and how many were dated too early.

    Without a click time a click is dated event_time + click_delay. A click cannot precede its own
    impression: dated so by a skewed clock it would enter its own history, so it is moved there.
    """
    event = rows["event_time"].cast(pa.int64()).to_numpy()
    if "click_time" not in rows.column_names:
        return event + click_delay_us, 0
    known = rows["click_time"].cast(pa.int64())
    moment = pc.coalesce(known, pa.array(event + click_delay_us)).to_numpy()
    return np.maximum(moment, event), int((moment < event).sum())


def no_clicks(ids: pa.Schema) -> pa.Table:
    """An empty table of clicks for the ID types in `ids`, of user_id and of item_id or item_ids."""
    item = (
        ids.field("item_id").type
        if "item_id" in ids.names
        else ids.field("item_ids").type.value_type
    )
    columns = {"user_id": ids.field("user_id").type, "item_id": item, "click_time": TIMESTAMP}
    return pa.schema(list(columns.items())).empty_table()


def codes_of(ids: Sequence[pa.ChunkedArray]) -> tuple[pa.Array, list[np.ndarray]]:
    """The distinct IDs of all columns in ascending order, and each column as codes into them."""
    distinct = pc.unique(pa.chunked_array([chunk for c in ids for chunk in c.chunks], ids[0].type))
    distinct = distinct.take(pc.sort_indices(distinct))
    return distinct, [pc.index_in(c, value_set=distinct).to_numpy().astype(np.int64) for c in ids]


def user_histories(clicks: pa.Table, end_us: int, law: HistoryLaw) -> pa.Table:
    """The history of every user of `clicks` (user_id, item_id, click_time) as of `end_us`."""
    user_ids, (users,) = codes_of([clicks["user_id"]])
    item_ids, (items,) = codes_of([clicks["item_id"]])
    log = sort_clicks(users, clicks["click_time"].cast(pa.int64()).to_numpy(), items)
    everyone = np.arange(len(user_ids))
    places = histories_at(log, everyone, np.full(len(user_ids), end_us), law)
    length = (places >= 0).sum(axis=1)
    offsets = pa.array(np.concatenate([[0], np.cumsum(length)]).astype(np.int32))
    flat = places[places >= 0]  # row by row, newest first
    rows = pa.table(
        {
            "user_id": user_ids,
            "item_ids": pa.ListArray.from_arrays(offsets, item_ids.take(pa.array(log.items[flat]))),
            "click_times": pa.ListArray.from_arrays(
                offsets, pa.array(log.times[flat]).cast(TIMESTAMP)
            ),
        }
    )
    return rows.filter(pa.array(length > 0))


# ---- Transforms ----------------------------------------------------------------------------


class ReadClicks(beam.DoFn):
    """A row group of impressions → its clicks (user_id, item_id, click_time) by shard of `key`."""

    def __init__(self, click_delay_us: int, end_us: int, shards: int, staging: str, key: str):
        self._click_delay_us = click_delay_us
        self._end_us = end_us  # of the day that is made: its own partition may not reach past it
        self._shards = shards
        self._key = key
        self.staging = staging

    @tables.refusing
    def process(self, group: RowGroup) -> Iterator[tuple[int, bytes]]:
        rows = read_rows(group, ["user_id", "item_id", "event_time", "clicked", "click_time"])
        check_day(group, rows, self._end_us)
        rows = rows.filter(rows["clicked"])
        if len(rows):
            moments, _ = click_moments(rows, self._click_delay_us)
            clicks = rows.select(["user_id", "item_id"]).append_column(
                "click_time", pa.array(moments).cast(TIMESTAMP)
            )
            yield from tables.split_by_shard(clicks, self._key, self._shards)


class WriteUserHistories(beam.DoFn):
    """All clicks of a user shard → one part of `user_histories`."""

    def __init__(self, law: HistoryLaw, end_us: int, shards: int, schema: pa.Schema, staging: str):
        self._law = law
        self._end_us = end_us
        self._shards = shards
        self._schema = schema
        self._folder = os.path.join(staging, USER_HISTORIES.name)
        self.staging = staging

    @tables.refusing
    def process(self, element: tuple[int, Iterable[bytes]]) -> None:
        shard, chunks = element
        if tables.has_part(self._folder, shard, self._shards):
            return
        clicks = tables.from_ipc(chunks, no_clicks(self._schema))
        rows = user_histories(clicks, self._end_us, self._law)
        tables.write_part(
            self._folder, USER_HISTORIES, self._schema, rows, shard, self._shards,
            {"users": len(rows)},
        )  # fmt: skip


def every_shard(root: beam.Pipeline, shards: int) -> beam.PCollection:
    """(shard, b"") for every shard, so that one without rows still becomes an empty part."""
    return root | "EveryShard" >> beam.Create([(shard, b"") for shard in range(shards)])


def read_clicks(
    root: beam.Pipeline,
    log: Sequence[Source],
    law: HistoryLaw,
    end_us: int,
    shards: int,
    staging: str,
    key: str = "user_id",
) -> beam.PCollection:
    """The clicks of all days of `log`, as (shard of their `key`, IPC bytes)."""
    return (
        root
        | "ClickGroups" >> beam.Create([group for day in log for group in day.groups()])
        | "SpreadClickGroups" >> beam.Reshuffle()
        | "ReadClicks" >> beam.ParDo(ReadClicks(law.click_delay_us, end_us, shards, staging, key))
    )


# ---- The job -------------------------------------------------------------------------------


def define_user_histories(
    root: beam.Pipeline,
    log: Sequence[Source],
    law: HistoryLaw,
    end_us: int,
    shards: int,
    schema: pa.Schema,
    staging: str,
) -> None:
    """Writes `user_histories` as of `end_us` below `staging`, one part per user shard."""
    _ = (
        (read_clicks(root, log, law, end_us, shards, staging), every_shard(root, shards))
        | beam.Flatten()
        | beam.GroupByKey()
        | "WriteUserHistories"
        >> beam.ParDo(WriteUserHistories(law, end_us, shards, schema, staging))
    )
