"""SIMSCORE takes the cosine of each impression's item with each item its user had clicked before.

In: the impressions of one day or of several in a row; their histories, logged with them or made of
clicks (see `histories`); `item_features` and `item_embeddings` of each day, or of the nights before
it. Out, for each day: `user_simscores`.

The law: rows = impressions of ds, one for one. sim(x, y) of COURIER appendix §1 eq. 1, over the
history of the impression's own moment; 0 and masked where either item is unknown, has no
embedding or is out of the encoder's scope. Each row takes all of its items from one night
(`snapshots`): that of ds, or the newest that its moment may know; 0 where there is none.

Flow: impressions meet the clicks of their users in user shards, get their histories, and go to the
shards of their day's table. The embeddings reach those in one of two ways, which give the same
table: `broadcast`, as memory-mapped files, one copy per machine, shared by its processes; or
`shuffle`, for catalogues larger than a worker's disk: each shard asks the item shards for what it
needs, every item once. Rows travel by way of files (`pieces`): what is in Beam's hands is small.
"""

import datetime as dt
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from apache_beam.utils.shared import Shared

from feature_jobs.impressions.day_checks import (
    CheckIds,
    JudgeDays,
    facts_of,
    repeated_id,
    write_hashes,
)
from feature_jobs.impressions.histories import (
    HistoriesJob,
    HistoryDay,
    click_moments,
    clicks_by_user,
    history_lists,
    open_chunks,
)
from feature_jobs.impressions.scoring import Scored, ScoreForm, score_rows, unfolded
from feature_jobs.impressions.snapshots import Snapshot, night_at
from feature_jobs.inputs import IMPRESSION_COLUMNS, RowGroup, Source, check_day, read_rows
from feature_jobs.items.item_answers import Answer, Asker, ask_for_items, items_told
from feature_jobs.items.item_vectors import (
    ItemTables,
    ItemVectors,
    items_of_answers,
    no_answers,
    open_item_vectors,
)
from feature_jobs.schemas import USER_SIMSCORES, DataContractError, score_field
from feature_jobs.store import arrays, documents, hashing, partitions, worker_notes
from feature_jobs.store.arrays import differ_from_before
from feature_jobs.store.every_shard import check_all_came, every_shard_of_days
from feature_jobs.store.pieces import Piece, made_from, read_pieces, write_pieces

_READ_TOO = ("click_time", "impression_id", "history")  # of the optional columns
_SHARDS_PER_ID_SHARD = 16  # hashes of IDs are small
_SCORE_BINS = 200  # of the largest scores, for gates
_ITEMS_AT_ONCE = 6_553_600  # of the histories that the impressions of a user shard get at once
BROADCAST, SHUFFLE = "broadcast", "shuffle"


@dataclass(frozen=True)
class ItemSnapshot:
    """Holds the items of a night, for the impressions that may know it; days may share it."""

    snapshot: Snapshot
    items: ItemTables
    broadcast_key: str  # of the machine's copy of the items
    encoder_id: str
    codebook_id: str


@dataclass(frozen=True)
class SimscoreDay:
    """Describes one day of a job; `has_history` tells that its impressions come with theirs.

    Each is scored with that of the `nights` which `night_at` says.
    """

    day: HistoryDay
    has_history: bool
    nights: tuple[ItemSnapshot, ...]
    shards: int
    schema: pa.Schema
    staging: str

    @property
    def id_shards(self) -> int:
        """Returns how many shards the shop's impression IDs meet in."""
        return max(1, self.shards // _SHARDS_PER_ID_SHARD)

    @property
    def no_rows(self) -> pa.Table:
        """Returns an empty table of impressions with histories, for a shard that has none."""
        made = {column.name for column in USER_SIMSCORES.columns} - set(IMPRESSION_COLUMNS)
        given = [
            (f.name, f.type) for f in self.schema if f.name not in made and not score_field(f.name)
        ]
        history = ("history", pa.list_(self.schema.field("item_id").type))
        return pa.schema([*given, history]).empty_table()


@dataclass(frozen=True)
class SimscoreJob:
    """Holds all that the workers of SIMSCORE need to know.

    `histories` are None where all days have logged ones; `form` says what is made of scores.
    """

    days: tuple[SimscoreDay, ...]
    histories: HistoriesJob | None
    form: ScoreForm
    embeddings_by: str
    staging: str


# ---- Pure functions: a shard of impressions --------------------------------------------------


def impression_ids(rows: pa.Table) -> pa.Array:
    """Makes a digest of user, item, time and the ordinal among equal rows: 32 hex digits each.

    `rows` are sorted, so that equal ones are neighbours.
    """
    users, items = hashing.hash_ids(rows["user_id"]), hashing.hash_ids(rows["item_id"])
    times = rows["event_time"].cast(pa.int64()).to_numpy().view(np.uint64)
    first = np.ones(len(rows), bool)
    for column in (users, items, times):
        if len(column):
            first[1:] &= column[1:] == column[:-1]
    first[1:] = ~first[1:]
    place = np.arange(len(rows))
    ordinal = place - np.maximum.accumulate(np.where(first, place, 0))
    key = np.stack([users, items, times, ordinal.astype(np.uint64)], axis=1).astype("<u8")
    data = key.view(np.uint8).reshape(len(rows), 32)
    digests = np.stack([hashing.hash_rows(data, seed) for seed in (0, 1)], axis=1).astype(">u8")
    digits = digests.view(np.uint8).reshape(len(rows), 16)
    hexed = np.frombuffer(b"0123456789abcdef", np.uint8)[
        np.stack([digits >> 4, digits & 15], axis=2).reshape(len(rows), 32)
    ]
    offsets = pa.py_buffer(np.arange(0, 32 * len(rows) + 1, 32, dtype=np.int32))
    return pa.StringArray.from_buffers(
        len(rows), offsets, pa.py_buffer(np.ascontiguousarray(hexed))
    )


def sort_impressions(rows: pa.Table) -> pa.Table:
    """Sorts `rows` by user, time and item, then by all else that can be ordered.

    So arrival does not decide. Rows alike but for histories, nested columns or half floats stay as
    they came.
    """
    first = ["user_id", "event_time", "item_id"]
    others = [f for f in rows.schema if f.name not in (*first, "history")]
    rest = [f.name for f in others if _can_be_ordered(f.type)]
    return arrays.in_order(rows, [*first, *rest])


def _can_be_ordered(kind: pa.DataType) -> bool:
    return not (pa.types.is_nested(kind) or pa.types.is_float16(kind) or pa.types.is_null(kind))


def score_impressions(
    rows: pa.Table, items: ItemVectors, form: ScoreForm
) -> tuple[pa.Table, "Counted"]:
    """Returns `user_simscores` of a shard's impressions, artefact IDs aside, and what was counted.

    `rows` have a `history`, newest first, null where it is that of the row before. Sorted by
    impression_id. Raises DataContractError where one of the shop's own occurs twice in the shard,
    ValueError where the first history is null.
    """
    lists, place = unfolded(rows["history"])
    at = rows.column_names.index("history")
    rows = sort_impressions(rows.set_column(at, "history", pa.array(place)))
    place = rows["history"].to_numpy()
    moved = np.diff(place, prepend=-1) != 0
    rows = rows.set_column(at, "history", lists.take(pa.array(place, mask=~moved)))
    scored = score_rows(rows, items, form)
    given = "impression_id" in rows.column_names
    ids = rows["impression_id"].combine_chunks() if given else impression_ids(rows)
    order = pc.sort_indices(ids)
    if given:
        _check_ids(ids.take(order))  # as laws.check would, in other words
    columns = {
        **{name: rows[name].take(order) for name in rows.column_names if name not in _READ_TOO},
        "impression_id": ids.take(order),
        **scored.arrow(order.to_numpy()),
    }
    return pa.table(columns), count_impressions(rows, scored)


def _check_ids(ids: pa.Array) -> None:
    """Raises DataContractError where one of the shop's `ids` of a shard, ascending, occurs twice.

    Those of users in different shards meet in `CheckIds`.
    """
    again = ids[1:].filter(pc.equal(ids[:-1], ids[1:]))
    if len(again):
        raise repeated_id(again[0].as_py())


# ---- Pure functions: a night for each impression ---------------------------------------------


def by_night(rows: pa.Table, nights: Sequence[ItemSnapshot]) -> dict[int, pa.Table]:
    """Returns `rows` by the place of the night that each is scored with; -1 for none.

    A `history` stays null where it is that of the row before.
    """
    moments = rows["event_time"].cast(pa.int64()).to_numpy()
    place = night_at(moments, [night.snapshot for night in nights])
    places = np.unique(place).tolist() or [len(nights) - 1]
    if len(places) == 1:
        return {places[0]: rows}
    return {at: _taken(rows, np.flatnonzero(place == at)) for at in places}


def _taken(rows: pa.Table, at: np.ndarray) -> pa.Table:
    """Returns the rows at the ascending places `at`, each with its history or the one before."""
    lists, place = unfolded(rows["history"])
    new = np.diff(place[at], prepend=-1) != 0
    own = lists.take(pa.array(place[at], mask=~new))
    return rows.take(pa.array(at)).set_column(rows.column_names.index("history"), "history", own)


def score_by_night(
    rows: Mapping[int, pa.Table],
    nights: Sequence[ItemSnapshot],
    items: Callable[[ItemSnapshot, pa.Table], ItemVectors],
    form: ScoreForm,
) -> tuple[pa.Table, "Counted"]:
    """Returns what `score_impressions` does of `rows` that `by_night` returned, all together.

    `items` gives the items of a night, at least those that its rows are about. Each row tells its
    night besides: `encoder_id`, `codebook_id`, `feature_ds`. Those without one score 0 and are
    counted apart, not as of items that are unknown.
    """
    parts = []
    for at, some in rows.items():
        night = nights[at] if at >= 0 else None
        nothing = items_of_answers(no_answers(some["item_id"].type, form.labels))
        known = items(night, some) if night else nothing
        scored, counted = score_impressions(some, known, form)
        if night is None:
            counted = _without_night(scored, counted)
        parts.append((_tell_night(scored, night), counted))
    return parts[0] if len(parts) == 1 else _together(parts)


def _tell_night(scored: pa.Table, night: ItemSnapshot | None) -> pa.Table:
    told = {
        "encoder_id": pa.scalar(night.encoder_id if night else ""),
        "codebook_id": pa.scalar(night.codebook_id if night else ""),
        "feature_ds": pa.scalar(night.snapshot.ds if night else None, pa.date32()),
    }
    for name, value in told.items():
        scored = scored.append_column(name, pa.repeat(value, len(scored)))
    return scored


def _without_night(scored: pa.Table, counted: "Counted") -> "Counted":
    counts = {
        "unknown_items": 0,
        "without_snapshot": len(scored),
        "histories_without_snapshot": len(scored) - counted.counts["without_history"],
    }
    return Counted(counted.counts | counts, counted.histograms, {})


def _together(parts: Sequence[tuple[pa.Table, "Counted"]]) -> tuple[pa.Table, "Counted"]:
    """Returns the rows of all nights as one table, and what was counted of them."""
    rows = arrays.in_order(pa.concat_tables([scored for scored, _ in parts]), ["impression_id"])
    _check_ids(rows["impression_id"].combine_chunks())
    told = [counted._asdict() for _, counted in parts]
    counts: Counter[str] = Counter()
    for one in told:
        counts.update(one["counts"])
    # A user with rows of two nights is one.
    users = _count_users(arrays.in_order(rows.select(["user_id", "clicked"]), ["user_id"]))
    histograms = {
        name: np.sum([one["histograms"][name] for one in told], axis=0)
        for name in told[0]["histograms"]
    }
    return rows, Counted({**counts, **users}, histograms, partitions.first_examples(told))


# ---- Pure functions: what is told of a shard ---------------------------------------------------


class Counted(NamedTuple):
    """Holds what is told of a shard's impressions beside their rows: see `write_part`."""

    counts: dict[str, int]
    histograms: dict[str, np.ndarray]
    examples: dict[str, list[int | str]]


def count_impressions(rows: pa.Table, scored: Scored) -> Counted:
    """Counts impressions: `rows` sorted by user, and what `score_rows` made of them."""
    coded, found, columns = scored.coded, scored.found, scored.columns
    compared = (found.old_cluster != 0) & (found.cluster > 0)
    moved = compared & (found.old_cluster != found.cluster)
    unknown = coded.shown[~found.known[coded.shown]]
    times = [name for name in ("event_time", "click_time") if name in rows.column_names]
    clicks = rows.select(times).filter(rows["clicked"])
    counts = {
        "impressions": len(rows),
        "clicks": len(clicks),
        **_count_users(rows),
        "unknown_items": len(unknown),
        "scored_impressions": int(np.count_nonzero(columns["sim_known"])),
        "compared_impressions": int(compared[coded.shown].sum()),
        "moved_impressions": int(moved[coded.shown].sum()),
        "without_history": int((columns["history_len"] == 0).sum()),
        "click_times_before_event": click_moments(clicks, 0)[1],
    }
    if "click_time" in times:
        counts["clicks_with_time"] = len(clicks) - clicks["click_time"].null_count
    clicked = rows["clicked"].to_numpy()
    histograms = score_histograms(clicked, columns, coded.histories.shape[1])
    first = coded.item_ids.take(pa.array(np.unique(unknown)[: partitions.EXAMPLES]))
    return Counted(counts, histograms, {"unknown_items": first.to_pylist()})


def _count_users(rows: pa.Table) -> dict[str, int]:
    """Counts users, and the squares of how many impressions and clicks each has.

    `rows` are sorted by user. By the squares it is known of how many users of equal weight they
    are: a few may have most of them.
    """
    users, clicked = rows["user_id"].combine_chunks(), rows["clicked"].to_numpy()
    is_other = pc.not_equal(users[1:], users[:-1]).to_numpy(zero_copy_only=False)
    starts = np.flatnonzero(np.append(True, is_other)[: len(users)])
    shown = np.diff(starts, append=len(users))
    clicks = np.add.reduceat(clicked.astype(np.int64), starts) if len(users) else shown
    return {
        "users": len(starts),
        "impressions_by_user_squared": int((shown**2).sum()),
        "clicks_by_user_squared": int((clicks**2).sum()),
    }


def score_histograms(
    clicked: np.ndarray, scored: dict[str, np.ndarray], length: int
) -> dict[str, np.ndarray]:
    """Counts impressions by score, and by length of history from 0 to `length`; int [bins] each.

    Those with a known score are counted by the largest, clicked ones apart: bins are 0.01 wide over
    [-1, 1], and 1.0 falls in the last one.
    """
    known = scored["sim_known"] > 0
    place = ((scored["sim_max"][known] + np.float64(1.0)) / 2 * _SCORE_BINS).astype(np.intp)
    np.minimum(place, _SCORE_BINS - 1, out=place)
    place += clicked[known] * _SCORE_BINS
    of_unclicked, of_clicked = np.bincount(place, minlength=2 * _SCORE_BINS).reshape(2, -1)
    return {
        "sim_max_clicked": of_clicked,
        "sim_max_unclicked": of_unclicked,
        "history_len": np.bincount(scored["history_len"], minlength=length + 1),
    }


# ---- Transforms ----------------------------------------------------------------------------


def read_impressions(group: RowGroup, end_us: int, history_len: int) -> pa.Table:
    """Reads the impressions of a row group, with no more of a logged history than counts.

    No history is null; where the log has none it is empty. Raises DataContractError for one after
    its day's end, or for a history with a null inside.
    """
    rows = read_rows(group, [*IMPRESSION_COLUMNS, *_READ_TOO], group.form.carry)
    check_day(group, rows, end_us)
    if "history" not in rows.column_names:
        return rows
    if pc.list_flatten(rows["history"]).null_count:
        raise DataContractError(
            f"The column {group.form.columns['history']!r} of {group.path} has nulls inside its "
            "lists. Every place of a history is an item, or the scores would stand at wrong "
            "positions. Leave the missing items out where the table is written."
        )
    lists = rows["history"].combine_chunks()
    lists = pc.fill_null(lists, pa.scalar([], lists.type))
    if (pc.max(pc.list_value_length(lists)).as_py() or 0) > history_len:
        lists = pc.list_slice(lists, 0, history_len)
    return rows.set_column(rows.column_names.index("history"), "history", lists)


def share_histories(rows: pa.Table, shards: np.ndarray) -> pa.Table:
    """Returns `rows` with null for each history that is that of the row before, if in one shard.

    So a history travels once for neighbours that share it, as they do in a log that is grouped by
    requests. `shards` int [n] are those of the rows.
    """
    lists = rows["history"].combine_chunks()
    new = differ_from_before(lists) | (np.diff(shards, prepend=-1) != 0)
    at = rows.column_names.index("history")
    return rows.set_column(at, "history", arrays.folded(lists, new))


class ReadImpressions(beam.DoFn):
    """Turns a row group of impressions into pieces of its rows: ((day, shard), piece).

    Where they get their histories first, it is (user shard, (day, piece)) as `by_user`. What checks
    the whole day goes out as `facts` of it, and as `ids` by ((day, shard of the IDs)).
    """

    def __init__(self, job: SimscoreJob):
        self._job, self.staging = job, job.staging
        self._places = {day.day.number: place for place, day in enumerate(job.days)}

    @worker_notes.refusing
    def process(self, group: RowGroup) -> Iterator[Any]:
        place = self._places[group.form.ds.toordinal()]
        day, histories = self._job.days[place], self._job.histories
        rows = read_impressions(group, day.day.end_us, self._job.form.length)
        if len(rows):
            facts = facts_of(rows, day.day.start_us, day.day.end_us)
            yield beam.pvalue.TaggedOutput("facts", (day.day.number, facts))
        name = documents.digest([group.path, group.index])[:16]
        for shard, ids in write_hashes(_pieces(self._job, "ids", name), group, rows, day.id_shards):
            yield beam.pvalue.TaggedOutput("ids", ((place, shard), ids))
        users = None if histories is None or day.has_history else histories.shards
        shards = hashing.shard_of(hashing.hash_ids(rows["user_id"]), users or day.shards)
        if "history" in rows.column_names:
            rows = share_histories(rows, shards)
        for shard, piece in write_pieces(_pieces(self._job, "rows", name), rows, shards):
            if users:
                yield beam.pvalue.TaggedOutput("by_user", (shard, (place, piece)))
            else:
                yield (place, shard), piece


def _pieces(job: SimscoreJob, *name: object) -> str:
    """Returns where pieces go; what follows in the name is up to `write_pieces`."""
    return os.path.join(job.staging, "pieces", "-".join(map(str, name)))


class AddHistories(beam.DoFn):
    """Gives the impressions of a user shard the histories that its clicks make.

    The impressions and the clicks come in; ((day, shard), piece) of the impressions with their
    histories goes out.
    """

    def __init__(self, job: SimscoreJob, histories: HistoriesJob):
        self._job, self._histories = job, histories
        self.staging = job.staging

    @worker_notes.refusing
    def process(
        self, element: tuple[int, dict[str, Iterable]]
    ) -> Iterator[tuple[tuple[int, int], Piece]]:
        job, histories, (user_shard, chunks) = self._job, self._histories, element
        pieces: dict[int, list[Piece]] = {}
        for place, piece in chunks["impressions"]:
            pieces.setdefault(place, []).append(piece)
        clicks, impressions = open_chunks(chunks["clicks"])
        for place, known in enumerate(histories.known(user_shard, clicks)):
            self._check(place, pieces.get(place, []), impressions)
            if place not in pieces:
                continue
            shard = user_shard * job.days[place].shards // histories.shards
            rows = read_pieces(pieces[place], job.days[place].no_rows)
            at_once = max(1, _ITEMS_AT_ONCE // job.form.length)
            for at in range(0, len(rows), at_once):
                some = rows.slice(at, at_once)
                some = some.append_column("history", history_lists(known, some))
                one = np.zeros(len(some), np.int64)
                path = _pieces(job, "histories", place, user_shard, at)
                for _, piece in write_pieces(path, share_histories(some, one), one):
                    yield (place, shard), piece

    def _check(self, place: int, pieces: Sequence[Piece], impressions: Mapping[int, int]) -> None:
        """Raises DataContractError where impressions and clicks are not of the same log.

        They come in two ways, and a history that lacks clicks would look like any other.
        """
        day = self._job.days[place]
        if not day.has_history:
            told, found = impressions[day.day.number], sum(piece.rows for piece in pieces)
            date = dt.date.fromordinal(day.day.number)
            check_all_came(f"impressions of ds {date} for the {told:,} of its log", found, told)


def items_of(rows: pa.Table) -> pa.Array:
    """Returns the distinct items that impressions with histories are about."""
    both = [rows["item_id"].combine_chunks(), pc.list_flatten(rows["history"].combine_chunks())]
    return pc.unique(pa.concat_arrays(both))


def _wanted_items(
    job: SimscoreJob, asker: Asker, pieces: Iterable[Any]
) -> Iterator[tuple[str, pa.Array]]:
    """Yields the distinct items that a shard of a day is about, by the key of their night."""
    place, _ = asker
    day = job.days[place]
    rows = by_night(read_pieces(pieces, day.no_rows), day.nights)
    for at, some in rows.items():
        if at >= 0:
            yield day.nights[at].broadcast_key, items_of(some)


class ScoreShard(beam.DoFn):
    """Turns the impressions of a shard of a day into one part of `user_simscores`.

    They come with their histories.
    """

    _opened = Shared()  # one mapping per worker process

    def __init__(self, job: SimscoreJob):
        self._job, self.staging = job, job.staging

    @worker_notes.refusing
    def process(self, element: tuple[tuple[int, int], dict[str, Iterable]]) -> None:
        (place, shard), found = element
        day = self._job.days[place]
        folder = os.path.join(day.staging, USER_SIMSCORES.name)
        pieces = [piece for piece in found["rows"] if isinstance(piece, Piece)]
        answers = list(found.get("items", ()))
        source = made_from(pieces)
        if partitions.has_part(folder, shard, day.shards, source):
            return
        rows = read_pieces(pieces, day.no_rows)
        items = partial(self._items, answers)
        scored, counted = score_by_night(
            by_night(rows, day.nights), day.nights, items, self._job.form
        )
        counts = counted.counts | self._count_late(day, rows)
        if "feature_ds" in day.schema.names:
            counts = {"without_snapshot": 0, "histories_without_snapshot": 0, **counts}
        work = {"answered_bytes": sum(answer.sent for answer in answers)} if answers else {}
        partitions.write_part(
            folder, USER_SIMSCORES, day.schema, scored, shard, day.shards, counts, work,
            self._job.form.limits, source, counted.histograms, counted.examples,
        )  # fmt: skip

    def _items(self, answers: Sequence[Answer], night: ItemSnapshot, rows: pa.Table) -> ItemVectors:
        """Returns the items of a night, or what its item shards answered of those of `rows`."""
        key = night.broadcast_key
        if self._job.embeddings_by == BROADCAST:
            return self._opened.acquire(lambda: open_item_vectors(night.items, key), tag=key)
        wanted, labels = len(items_of(rows)), night.items.labels
        return items_told(answers, key, wanted, rows["item_id"].type, labels)

    def _count_late(self, day: SimscoreDay, rows: pa.Table) -> dict[str, int]:
        """Counts the impressions of earlier days, and those too late for a history.

        Where the log has histories, none is too late for its own.
        """
        histories = self._job.histories
        moments = rows["event_time"].cast(pa.int64()).to_numpy()
        counts = {"late_impressions": int((moments < day.day.start_us).sum())}
        if day.has_history:
            return counts
        known_from = day.day.known_from_us(histories.law) if histories else 0
        late = int((moments < known_from).sum())
        if late:
            worker_notes.warn(
                self.staging,
                "Some impressions came in the log more than late_days after their day: they have "
                "no history, and score 0. The manifest counts them as too_late_for_a_history.",
            )
        return {**counts, "too_late_for_a_history": late}


# ---- The job -------------------------------------------------------------------------------


def define_simscore(
    root: beam.Pipeline, impressions: Sequence[Source], log: Sequence[Source], job: SimscoreJob
) -> None:
    """Writes `user_simscores` of each day of `job` below the staging folder of that day.

    There is one part per user shard. `impressions` are those of the days, and `log` where histories
    come from; see `histories`.
    """
    read = (
        root
        | "ImpressionGroups" >> beam.Create([g for day in impressions for g in day.groups()])
        | "ReadImpressions"
        >> beam.ParDo(ReadImpressions(job)).with_outputs("by_user", "facts", "ids", main="rows")
    )
    check_ids = CheckIds([day.form for day in impressions], job.staging)
    checked = (
        read.ids | "ByDayAndIdShard" >> beam.GroupByKey() | "CheckIds" >> beam.ParDo(check_ids)
    )
    _ = (
        (read.facts, checked)
        | "FactsOfDays" >> beam.Flatten()
        | "JudgeDays" >> JudgeDays(impressions, job.staging)
    )
    every = every_shard_of_days(root, [day.shards for day in job.days])
    parts = [read.rows, every]
    if job.histories:
        users = {
            "impressions": read.by_user,
            "clicks": clicks_by_user(root, log, job.histories),
        }
        parts.append(
            users
            | "ByUser" >> beam.CoGroupByKey()
            | "AddHistories" >> beam.ParDo(AddHistories(job, job.histories))
        )
    found = {"rows": parts | "RowsAndShards" >> beam.Flatten()}
    if job.embeddings_by == SHUFFLE:
        nights = {night.broadcast_key: night.items for day in job.days for night in day.nights}
        wanted = partial(_wanted_items, job)
        found["items"] = ask_for_items(found["rows"], nights, wanted, job.staging)
    _ = found | "ByDayAndShard" >> beam.CoGroupByKey() | "ScoreShard" >> beam.ParDo(ScoreShard(job))
