"""JOIN gives each of a shop's own samples its features: cluster IDs and SimScores of one night.

In: samples of one day or of several in a row, any Parquet with user, item and time: impressions,
candidates, sampled negatives. `item_features` and `item_embeddings` of the nights that they may
know (`snapshots`); clicks, from which the history of each sample's own moment is made, or the
histories of the night; published `user_simscores`, where they are made as these would be. Out, for
each day: a training set, the samples' own columns with ours behind them.

The law: one row comes out for each that goes in, in the same order, whatever is known of it.
Nothing of it knows a click, or a night, of its own moment or later.

Flow: what identifies a sample goes, with its place, to the shards of users. There it meets the
published scores of the day; what is not among them gets its history and is scored as SIMSCORE does.
All of it goes on to the parts of the training set, each of which is a run of rows of the samples:
they are read again there, so that the shop's own columns, however wide, travel nowhere. Parts that
are cut from one row group are a batch, which reads it once.
"""

import datetime as dt
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from apache_beam.utils.shared import Shared

from feature_jobs import laws
from feature_jobs.impressions import layouts
from feature_jobs.impressions.histories import (
    HistoriesJob,
    HistoryDay,
    clicks_by_user,
    history_lists,
    open_chunks,
)
from feature_jobs.impressions.scoring import ScoreForm, score_rows
from feature_jobs.impressions.simscore import SHUFFLE, items_of, share_histories
from feature_jobs.impressions.snapshots import Snapshot, night_at
from feature_jobs.inputs import RowGroup, Source, check_day, read_rows
from feature_jobs.items.item_answers import Answer, Asker, ask_for_items, items_told
from feature_jobs.items.item_facts import FLAGS, ItemFacts, open_item_facts
from feature_jobs.items.item_vectors import (
    ItemTables,
    ItemVectors,
    items_of_answers,
    no_answers,
    open_item_vectors,
)
from feature_jobs.schemas import TIMESTAMP, DataContractError, Table
from feature_jobs.store import arrays, hashing, partitions, worker_notes
from feature_jobs.store.every_shard import check_all_came, every_shard_of_days
from feature_jobs.store.partitions import Partition
from feature_jobs.store.pieces import Piece, made_from, read_pieces, write_pieces

_SCORES = (
    "sim_scores", "sim_mask", "history_len", "sim_known", "sim_max", "sim_mean", "simtier",
    "same_cluster",
)  # fmt: skip
KEY = ("user_id", "item_id", "event_time")
_GROUP_BITS = 32  # a sample's number is that of its row group, and of its row in there
_ITEMS_AT_ONCE = 6_553_600  # of the histories that the samples of a user shard get at once
_EPOCH = dt.date(1970, 1, 1)

Shard = tuple[int, int, int]  # the place of a day, that of a night among its nights, a user shard
Batch = tuple[int, int]  # the place of a day, the number of a batch of its parts


@dataclass(frozen=True)
class JoinNight:
    """Describes a night that samples may know.

    `created_us` is when it was first published, None where nobody noted it. `histories` are its
    `user_histories`, where samples have those; `key` is that of the machine's copies of its items.
    """

    snapshot: Snapshot
    created_us: int | None
    items: ItemTables
    histories: Partition | None
    key: str


class Slice(NamedTuple):
    """Is a run of rows, from `start` to before `stop`, of a row group of a day's samples."""

    group: int
    start: int
    stop: int


@dataclass(frozen=True)
class JoinDay:
    """Describes one day of a job: its samples by row group, and the rows of each part.

    `scores` are published ones that may be taken, of moments from `scores_from_us` on. The `ids`
    are the types of users and items.
    """

    day: HistoryDay
    groups: tuple[RowGroup, ...]
    parts: tuple[tuple[Slice, ...], ...]
    nights: tuple[JoinNight, ...]
    scores: Partition | None
    scores_from_us: int
    schema: pa.Schema
    ids: tuple[pa.DataType, pa.DataType]
    staging: str

    @cached_property
    def firsts(self) -> np.ndarray:
        """Returns the number of the first sample of each part; int64 [parts]."""
        firsts = [slices[0] if slices else Slice(0, 0, 0) for slices in self.parts]
        return np.array([(one.group << _GROUP_BITS) + one.start for one in firsts], np.int64)

    def samples_of(self, part: int) -> np.ndarray:
        """Returns the numbers of the samples of a part, in order; int64 [n]."""
        none = [np.zeros(0, np.int64)]
        runs = [(group << _GROUP_BITS) + np.arange(start, stop)
                for group, start, stop in self.parts[part]]  # fmt: skip
        return np.concatenate(none + runs)

    @cached_property
    def batches(self) -> list[int]:
        """Returns the number of the first part of each batch."""
        return batches_of(self.parts)

    @property
    def no_keys(self) -> pa.Table:
        """Returns an empty table of what identifies samples."""
        kinds = (*self.ids, TIMESTAMP, pa.int64(), pa.int16(), pa.bool_())
        names = (*KEY, "sample", "night", "positive")
        return pa.schema(list(zip(names, kinds, strict=True))).empty_table()

    @property
    def no_rows(self) -> pa.Table:
        """Returns an empty table of samples with their histories."""
        history = pa.field("history", pa.list_(self.ids[1]))
        return self.no_keys.schema.append(history).empty_table()


@dataclass(frozen=True)
class JoinJob:
    """Holds all that the workers of JOIN need to know.

    Samples meet their clicks in `shards` of users. `clusters` has the highest cluster number by the
    name of its column, `label` names the samples' own column of labels. `histories` are None where
    samples have those of their night. Rows are written in a `layout` for a framework, or plain.
    """

    days: tuple[JoinDay, ...]
    shards: int
    histories: HistoriesJob | None
    form: ScoreForm
    embeddings_by: str
    clusters: Mapping[str, int]
    label: str | None
    table: Table
    layout: str
    layout_form: layouts.Form
    staging: str

    @property
    def score_columns(self) -> list[str]:
        """Returns the names of all columns that are made of scores."""
        return [*_SCORES, *self.form.columns]

    def piece(self, *name: object) -> str:
        """Returns where pieces go; what follows in the name is up to `write_pieces`."""
        return os.path.join(self.staging, "pieces", "-".join(map(str, name)))


def cut(group_rows: Sequence[int], rows_per_part: int) -> tuple[tuple[Slice, ...], ...]:
    """Cuts row groups of so many rows into runs of at most `rows_per_part`; one run at least."""
    parts, room = [list[Slice]()], rows_per_part
    for group, rows in enumerate(group_rows):
        start = 0
        while start < rows:
            if not room:
                parts.append([])
                room = rows_per_part
            stop = min(rows, start + room)
            parts[-1].append(Slice(group, start, stop))
            room -= stop - start
            start = stop
    return tuple(map(tuple, parts))


def batches_of(parts: Sequence[Sequence[Slice]]) -> list[int]:
    """Returns the number of the first part of each batch: parts that begin in one row group."""
    begin = [slices[0].group if slices else 0 for slices in parts]
    return [n for n, group in enumerate(begin) if n == 0 or group != begin[n - 1]]


# ---- Pure functions --------------------------------------------------------------------------


def match_rows(samples: pa.Table, published: pa.Table) -> np.ndarray:
    """Returns which of the `published` scores is that of each sample, -1 for none; int64 [n].

    It is one of the same user, item and moment; of several such, whose scores are equal, any.
    """
    wanted, there = _key_hashes(samples), _key_hashes(published)
    order, asked = np.argsort(there), np.argsort(wanted)  # neighbours are found five times as fast
    found = np.full(len(wanted), -1, np.int64)
    at = np.searchsorted(there[order], wanted[asked])
    is_within = at < len(order)
    maybe, row = asked[is_within], order[at[is_within]]
    same = there[row] == wanted[maybe]
    maybe, row = maybe[same], row[same]
    mine, theirs = samples.take(pa.array(maybe)), published.select(KEY).take(pa.array(row))
    same = np.ones(len(maybe), bool)
    for name in KEY:  # two keys may have one hash
        equal = pc.equal(mine[name], theirs[name].cast(mine[name].type))
        same &= equal.to_numpy()
    found[maybe[same]] = row[same]
    return found


def _key_hashes(rows: pa.Table) -> np.ndarray:
    users, items = (hashing.hash_ids(rows[name]) for name in KEY[:2])
    times = rows["event_time"].cast(pa.int64()).to_numpy().view(np.uint64)
    key = np.stack([users, items, times], axis=1).astype("<u8")
    return hashing.hash_rows(key.view(np.uint8).reshape(len(rows), 24))


def night_histories(users: pa.ChunkedArray, histories: pa.Table, kind: pa.DataType) -> pa.Array:
    """Returns the history of each of some users as `user_histories` of a night have it.

    They are lists of the type `kind`, empty for a user who has none.
    """
    at = pc.index_in(users, value_set=histories["user_id"].combine_chunks()).combine_chunks()
    lists = histories["item_ids"].combine_chunks().cast(kind).take(at)
    return pc.fill_null(lists, pa.scalar([], kind))


def facts_of_samples(
    rows: pa.Table, nights: Sequence[JoinNight], facts: Mapping[int, ItemFacts],
    clusters: Sequence[str],
) -> dict[str, pa.Array]:  # fmt: skip
    """Returns what the night of each sample says of its item, as columns of the training set.

    The `night` of a row is a place among `nights`, -1 = none; of each that occurs there are
    `facts`.
    """
    at, ids = rows["night"].to_numpy(), rows["item_id"].combine_chunks()
    found = {name: np.zeros(len(rows), bool) for name in ("item_known", *FLAGS)}
    found |= {name: np.zeros(len(rows), np.int32) for name in clusters}
    for night, known in facts.items():
        mine = np.flatnonzero(at == night)
        for name, values in known.look_up(ids.take(pa.array(mine))).items():
            found[name][mine] = values
    days = np.array([*((one.snapshot.ds - _EPOCH).days for one in nights), 0], np.int32)
    created = np.array([*(one.created_us or 0 for one in nights), 0], np.int64)
    is_noted = np.array([*(one.created_us is not None for one in nights), False])
    return {
        "feature_ds": pa.array(days[at], pa.int32(), mask=at < 0).cast(pa.date32()),
        "has_night": pa.array(at >= 0),
        **{name: pa.array(values) for name, values in found.items()},
        "night_created": pa.array(created[at], mask=~is_noted[at]).cast(TIMESTAMP),
    }


def count_samples(rows: pa.Table) -> dict[str, int]:
    """Counts the rows of a training set by what is known of them; each by the first that lacks."""
    left = np.ones(len(rows), bool)
    counts = {"samples": len(rows)}
    for reason, column in (
        ("no_snapshot", "has_night"), ("unknown_item", "item_known"), ("no_image", "has_image"),
        ("out_of_scope", "in_scope"), ("no_history", "history_len"),
    ):  # fmt: skip
        there = rows[column].to_numpy().astype(bool)
        counts[reason] = int((left & ~there).sum())
        left &= there
    counts["matched"] = int(left.sum())
    return counts


def positive(labels: pa.ChunkedArray) -> np.ndarray:
    """Tells which labels are true, or above 0; bool [n]."""
    above = labels if pa.types.is_boolean(labels.type) else pc.greater(labels, 0)
    found: np.ndarray = pc.fill_null(above, False).to_numpy()
    return found


# ---- Transforms ----------------------------------------------------------------------------


class _JoinFn(beam.DoFn):
    """Is a step of the job, with the machine's copies of what is known of items."""

    _facts, _vectors = Shared(), Shared()  # one mapping of each per worker process

    def __init__(self, job: JoinJob):
        self._job, self.staging = job, job.staging

    def _finish(
        self, place: int, rows: pa.Table, scores: Mapping[str, pa.Array], is_taken: bool,
        *name: object,
    ) -> Iterator[tuple[Batch, tuple[int, Piece]]]:  # fmt: skip
        """Writes all that is ours of some samples to the parts that they go to, by batch."""
        day, clusters = self._job.days[place], tuple(self._job.clusters)
        at = np.unique(rows["night"].to_numpy())
        facts = {night: self._facts_of(day.nights[night]) for night in at[at >= 0].tolist()}
        table = pa.table(
            {
                "sample": rows["sample"],
                "positive": rows["positive"],
                "taken": np.full(len(rows), is_taken),
                "too_late": self._too_late(day, rows),
                **facts_of_samples(rows, day.nights, facts, clusters),
                **scores,
            }
        )
        parts = np.searchsorted(day.firsts, rows["sample"].to_numpy(), "right") - 1
        for part, piece in write_pieces(self._job.piece(*name), table, parts):
            yield (place, bisect_right(day.batches, part) - 1), (part, piece)

    def _too_late(self, day: JoinDay, rows: pa.Table) -> np.ndarray:
        """Tells which samples came too late for a history of their moment; bool [n]."""
        histories = self._job.histories
        if histories is None:
            return np.zeros(len(rows), bool)
        moments: np.ndarray = rows["event_time"].cast(pa.int64()).to_numpy()
        return moments < day.day.known_from_us(histories.law)

    def _facts_of(self, night: JoinNight) -> ItemFacts:
        key, features = f"facts-{night.key}", night.items.features
        clusters = tuple(self._job.clusters)
        return self._facts.acquire(lambda: open_item_facts(features, clusters, key), tag=key)

    def _vectors_of(self, night: JoinNight) -> ItemVectors:
        key = night.key
        return self._vectors.acquire(lambda: open_item_vectors(night.items, key), tag=key)


class ReadSamples(_JoinFn):
    """Turns a row group of a day's samples into pieces of what identifies them.

    The places of day and row group come in, ((place, user shard), piece) goes out.
    """

    @worker_notes.refusing
    def process(self, element: tuple[int, int]) -> Iterator[tuple[tuple[int, int], Piece]]:
        place, number = element
        job, day = self._job, self._job.days[place]
        group = day.groups[number]
        rows = read_rows(group, KEY, [job.label] if job.label else [])
        check_day(group, rows, day.day.end_us)
        moments = rows["event_time"].cast(pa.int64()).to_numpy()
        nights = night_at(moments, [night.snapshot for night in day.nights])
        yes = positive(rows[job.label]) if job.label else np.zeros(len(rows), bool)
        keys = rows.select(KEY)
        for name, values in (
            ("sample", (number << _GROUP_BITS) + np.arange(len(rows))),
            ("night", nights.astype(np.int16)),
            ("positive", yes),
        ):
            keys = keys.append_column(name, pa.array(values))
        shards = hashing.shard_of(hashing.hash_ids(rows["user_id"]), job.shards)
        for shard, piece in write_pieces(job.piece("samples", place, number), keys, shards):
            yield (place, shard), piece


class TakeScores(_JoinFn):
    """Takes the published scores of the samples of a user shard that are impressions of the day.

    (`Batch`, (part, piece)) of all that is ours goes out; as `rest` (user shard, (place, piece)) of
    the samples that are to be scored.
    """

    @worker_notes.refusing
    def process(self, element: tuple[tuple[int, int], Iterable[Piece]]) -> Iterator[Any]:
        (place, shard), pieces = element
        job, day = self._job, self._job.days[place]
        if day.scores is None:
            for piece in pieces:
                yield beam.pvalue.TaggedOutput("rest", (shard, (place, piece)))
            return
        rows = read_pieces(pieces, day.no_keys)
        columns = [*KEY, *job.score_columns]
        published = day.scores.read_shard(shard, job.shards, "user_id", columns)
        at = match_rows(rows, published)
        at[rows["event_time"].cast(pa.int64()).to_numpy() < day.scores_from_us] = -1
        taken = np.flatnonzero(at >= 0)
        taken = taken[np.argsort(rows["sample"].to_numpy()[taken])]
        scores = arrays.take(published.select(job.score_columns), at[taken])
        found = dict(zip(scores.column_names, scores.columns, strict=True))
        mine = rows.take(pa.array(taken))
        yield from self._finish(place, mine, found, True, "taken", place, shard)
        rest = rows.filter(pa.array(at < 0))
        path = job.piece("rest", place, shard)
        for _, piece in write_pieces(path, rest, np.zeros(len(rest), np.int64)):
            yield beam.pvalue.TaggedOutput("rest", (shard, (place, piece)))


class AddHistories(_JoinFn):
    """Gives the samples of a user shard their histories: `Shard`, piece goes out.

    They are those of their moments, from the clicks that come in too, or those of their nights. How
    many impressions came with the clicks goes out as `impressions`, by the ordinal of their day.
    """

    @worker_notes.refusing
    def process(self, element: tuple[int, Mapping[str, Iterable]]) -> Iterator[Any]:
        job, (shard, found) = self._job, element
        clicks, impressions = open_chunks(found.get("clicks", ()))
        for day, came in impressions.items():
            yield beam.pvalue.TaggedOutput("impressions", (day, (came, 0)))
        pieces: dict[int, list[Piece]] = {}
        for place, piece in found["samples"]:
            pieces.setdefault(place, []).append(piece)
        if not pieces:
            return
        if job.histories is None:
            for place, some in pieces.items():
                yield from self._of_nights(place, shard, some)
            return
        for place, known in enumerate(job.histories.known(shard, clicks)):
            if place in pieces:
                for some in self._slices(self._in_order(place, pieces[place])):
                    lists = history_lists(known, some)
                    yield from self._hand_on(place, shard, some, lists)

    def _in_order(self, place: int, pieces: Iterable[Piece]) -> pa.Table:
        """Reads samples; those that may share a history are neighbours."""
        rows = read_pieces(pieces, self._job.days[place].no_keys)
        return arrays.in_order(rows, ["user_id", "event_time", "item_id", "sample"])

    def _slices(self, rows: pa.Table) -> Iterator[pa.Table]:
        """Yields as many rows at once as histories fit into memory."""
        at_once = max(1, _ITEMS_AT_ONCE // self._job.form.length)
        for at in range(0, len(rows), at_once):
            yield rows.slice(at, at_once)

    def _of_nights(
        self, place: int, shard: int, pieces: Iterable[Piece]
    ) -> Iterator[tuple[Shard, Piece]]:
        day, rows = self._job.days[place], self._in_order(place, pieces)
        kind, nights = pa.list_(day.ids[1]), rows["night"].to_numpy()
        nobodys = pa.table({"user_id": pa.array([], day.ids[0]), "item_ids": pa.array([], kind)})
        for night in np.unique(nights).tolist():
            mine, table = rows.filter(pa.array(nights == night)), nobodys
            if night >= 0:
                histories = day.nights[night].histories
                assert histories is not None
                columns = ["user_id", "item_ids"]
                table = histories.read_shard(shard, self._job.shards, "user_id", columns)
            for some in self._slices(mine):
                lists = night_histories(some["user_id"], table, kind)
                yield from self._hand_on(place, shard, some, lists)

    def _hand_on(
        self, place: int, shard: int, rows: pa.Table, lists: pa.Array
    ) -> Iterator[tuple[Shard, Piece]]:
        nights = rows["night"].to_numpy().astype(np.int64) + 1
        order = pa.array(np.argsort(nights, kind="stable"))
        rows, nights = rows.append_column("history", lists).take(order), np.sort(nights)
        path = self._job.piece("histories", place, shard)  # its content names it, too
        for night, piece in write_pieces(path, share_histories(rows, nights), nights):
            yield (place, night - 1, shard), piece


class CheckLog(_JoinFn):
    """Refuses to join where not all impressions of a day of the log came to the shards of users.

    A sample whose clicks were lost would look like one of a user who never clicked. In come, by the
    ordinal of the day, how many came and how many there are, in any number of pairs.
    """

    @worker_notes.refusing
    def process(self, element: tuple[int, Iterable[tuple[int, int]]]) -> None:
        day, pairs = element
        came, there = (sum(numbers) for numbers in zip(*pairs, strict=True))
        check_all_came(f"impressions of the log of ds {dt.date.fromordinal(day)}", came, there)


def _wanted_items(
    job: JoinJob, asker: Asker, pieces: Iterable[Any]
) -> Iterator[tuple[str, pa.Array]]:
    """Yields the distinct items that samples of a night are about, by the key of the night."""
    place, night, _ = asker
    if night >= 0:
        day = job.days[place]
        yield day.nights[night].key, items_of(read_pieces(pieces, day.no_rows))


class ScoreSamples(_JoinFn):
    """Scores samples of one night that come with their histories: (`Batch`, (part, piece))."""

    @worker_notes.refusing
    def process(
        self, element: tuple[Shard, Mapping[str, Iterable]]
    ) -> Iterator[tuple[Batch, tuple[int, Piece]]]:
        (place, night, shard), found = element
        day = self._job.days[place]
        rows = read_pieces(found["rows"], day.no_rows)
        items = self._items(day, night, rows, list(found.get("items", ())))
        scored = score_rows(rows, items, self._job.form).arrow()
        name = ("scored", place, night, shard)
        yield from self._finish(place, rows, scored, False, *name)

    def _items(
        self, day: JoinDay, night: int, rows: pa.Table, answers: Sequence[Answer]
    ) -> ItemVectors:
        labels = self._job.form.labels
        if night < 0:
            return items_of_answers(no_answers(day.ids[1], labels))
        if self._job.embeddings_by != SHUFFLE:
            return self._vectors_of(day.nights[night])
        asked = len(items_of(rows))
        return items_told(answers, day.nights[night].key, asked, day.ids[1], labels)


class WriteJoined(_JoinFn):
    """Turns all that is ours of the samples of a batch into its parts, their own columns before.

    What all parts of a batch are cut from is read once.
    """

    @worker_notes.refusing
    def process(self, element: tuple[Batch, Iterable]) -> None:
        (place, batch), given = element
        day = self._job.days[place]
        pieces: dict[int, list[Piece]] = {}
        for part, piece in (one for one in given if one):
            pieces.setdefault(part, []).append(piece)
        read = lru_cache(1)(partial(_own_columns, day))
        ends = [*day.batches[1:], len(day.parts)]
        for part in range(day.batches[batch], ends[batch]):
            self._write(place, part, pieces.get(part, []), read)

    def _write(
        self, place: int, part: int, pieces: list[Piece], read: Callable[[int], pa.Table]
    ) -> None:
        job, day = self._job, self._job.days[place]
        folder, parts = os.path.join(day.staging, job.table.name), len(day.parts)
        source = made_from(pieces)
        if partitions.has_part(folder, part, parts, source):
            return
        expected = day.samples_of(part)
        check_all_came("samples of a part, by its rows", source.rows, len(expected))
        own = _own_rows(day, part, read)
        ours = arrays.in_order(read_pieces(pieces, self._nothing(day)), ["sample"])
        if not np.array_equal(ours["sample"].to_numpy(), expected):
            raise _mixed_up(expected, ours["sample"].to_numpy())
        counts, taken = count_samples(ours), int(ours["taken"].to_numpy().sum())
        counts["too_late_for_a_history"] = int(ours["too_late"].to_numpy().sum())
        if job.label in own.column_names:
            counts["positives_read"] = int(ours["positive"].to_numpy().sum())
            counts["positives"] = int(positive(own[job.label]).sum())
        columns = [*own.columns, *(ours[name] for name in day.schema.names[own.num_columns :])]
        rows = pa.table(columns, schema=day.schema)
        limits = {**job.form.limits, **job.clusters}
        if job.layout != layouts.PLAIN and own.num_columns:  # a day without a file has none
            laws.check(job.table, rows, limits)
            rows, limits = layouts.to_layout(job.layout, rows, job.layout_form), {}
        partitions.write_part(
            folder, job.table, rows.schema, rows, part, parts, counts, {"scores_taken": taken},
            limits, source,
        )  # fmt: skip

    def _nothing(self, day: JoinDay) -> pa.Table:
        """Returns an empty table of what comes in."""
        flags = [(name, pa.bool_()) for name in ("positive", "taken", "too_late")]
        kinds = [("sample", pa.int64()), *flags]
        return pa.schema([*day.schema, *kinds]).empty_table()


def _own_columns(day: JoinDay, group: int) -> pa.Table:
    """Reads the shop's own columns of a row group of samples again."""
    return read_rows(day.groups[group], [], day.groups[group].form.carry)


def _own_rows(day: JoinDay, part: int, read: Callable[[int], pa.Table]) -> pa.Table:
    """Returns the shop's own columns of a part's samples, of row groups as `read` has them."""
    carry = day.groups[0].form.carry if day.groups else ()
    found = [arrays.empty_rows(pa.schema([day.schema.field(name) for name in carry]))]
    found += [read(group).slice(start, stop - start) for group, start, stop in day.parts[part]]
    return pa.concat_tables(found)


def _mixed_up(expected: np.ndarray, found: np.ndarray) -> DataContractError:
    return DataContractError(
        f"{int((expected != found).sum()):,} of {len(expected):,} rows of a part of the training "
        "set are those of other samples. Features would stand beside rows that they are not of, so "
        "that nothing was published. Run the command again; if it happens again, run it on this "
        "machine (without --runner) and report it."
    )


# ---- The job ---------------------------------------------------------------------------------


def define_join(root: beam.Pipeline, log: Sequence[Source], job: JoinJob) -> None:
    """Writes the training set of each day of `job` below the staging folder of that day.

    `log` is where clicks come from (`histories`); it is read if any sample is to be scored.
    """
    groups = [(place, n) for place, day in enumerate(job.days) for n in range(len(day.groups))]
    taken = (
        root
        | "SampleGroups" >> beam.Create(groups)
        | "ReadSamples" >> beam.ParDo(ReadSamples(job))
        | "ByDayAndUser" >> beam.GroupByKey()
        | "TakeScores" >> beam.ParDo(TakeScores(job)).with_outputs("rest", main="taken")
    )
    users = {"samples": taken.rest}
    if job.histories:
        wanted = taken.rest | "CountRest" >> beam.combiners.Count.Globally()
        users["clicks"] = clicks_by_user(root, log, job.histories, wanted)
    added = (
        users
        | "ByUser" >> beam.CoGroupByKey()
        | "AddHistories" >> beam.ParDo(AddHistories(job)).with_outputs("impressions", main="rows")
    )
    if job.histories:
        _check_log(root, log, job, wanted, added.impressions)
    rows = added.rows
    found = {"rows": rows}
    if job.embeddings_by == SHUFFLE:
        nights = {night.key: night.items for day in job.days for night in day.nights}
        found["items"] = ask_for_items(rows, nights, partial(_wanted_items, job), job.staging)
    scored = (
        found | "ByNight" >> beam.CoGroupByKey() | "ScoreSamples" >> beam.ParDo(ScoreSamples(job))
    )
    every = every_shard_of_days(root, [len(day.batches) for day in job.days])
    _ = (
        (taken.taken, scored, every)
        | "AllOfSamples" >> beam.Flatten()
        | "ByBatch" >> beam.GroupByKey()
        | "WriteJoined" >> beam.ParDo(WriteJoined(job))
    )


def _check_log(
    root: beam.Pipeline, log: Sequence[Source], job: JoinJob, wanted: beam.PCollection,
    came: beam.PCollection,
) -> None:  # fmt: skip
    """Checks how many impressions of the log `came`, where it is read at all."""
    there = [(day.form.ds.toordinal(), (0, day.rows)) for day in log]
    of_log = (
        root
        | "ImpressionsOfLog" >> beam.Create(there)
        | "IfRead" >> beam.Filter(lambda _, count: bool(count), beam.pvalue.AsSingleton(wanted))
    )
    _ = (
        (came, of_log)
        | "AllOfLog" >> beam.Flatten()
        | "ByDayOfLog" >> beam.GroupByKey()
        | "CheckLog" >> beam.ParDo(CheckLog(job))
    )
