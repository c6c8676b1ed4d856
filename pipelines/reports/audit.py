"""Audits, on the user's own data, that no feature of a moment knows of a click at or after it.

One hash bucket of the users of ds is taken as it is, and its features are made by the functions
that the nightly jobs call. Then clicks are planted in a copy of it, around sampled impressions, and
the features are made again: those of a sampled impression must move for a click just before it,
which shows that the audit can see, and for no other; and no impression of the bucket may move for
a click that it was not later than. Where scores are of the nights before ds, a later night is
planted likewise. What was published for ds must be what these functions make, and encoder, codebook
and embeddings must be of days before ds.
"""

import datetime as dt
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_jobs.impressions.histories import HistoriesJob, clicks_of, history_lists
from feature_jobs.impressions.simscore import (
    ItemSnapshot,
    by_night,
    read_impressions,
    score_by_night,
)
from feature_jobs.impressions.snapshots import Snapshot, always
from feature_jobs.inputs import RowGroup, Source, day_end
from feature_jobs.items.item_vectors import ItemVectors, ask_all
from feature_jobs.schemas import (
    HISTORY_ITEM_IDS,
    TIMESTAMP,
    USER_SIMSCORES,
    CourierError,
    OperatorError,
)
from feature_jobs.store import arrays, hashing, partitions
from feature_jobs.store.arrays import differ_from_before
from pipelines.config import Settings
from pipelines.nightly import plan_day
from pipelines.planning.day_plan import DayPlan, NightOptions, Range
from pipelines.planning.impressions import PlannedScores, histories_job, score_form
from pipelines.planning.items import DECLARED, ONE_SNAPSHOT_OF_VECTORS
from pipelines.planning.pinned import PinnedArtefacts
from pipelines.planning.snapshots import ItemNight
from pipelines.running.states import PUBLISHED, Look
from pipelines.stages import SIMSCORE

_BUCKET_ROWS = 20_000
_READERS = 4
_EARLIER_US = 60_000_000  # so long before the moment is the impression that is clicked later
OK, LEAK, UNVERIFIED = "ok", "leak", "unverified"
# What is damaged, or was made by an earlier version, whose manifests say less, shows itself so.
ILL = (CourierError, OSError, KeyError, pa.ArrowException)


@dataclass(frozen=True)
class Plant:
    """Describes clicks that are planted near the ends of sampled impressions' histories.

    They lie `clicked_us` microseconds from the end of a history, and are of impressions that were
    shown `shown_us` from it; `must_move` says whether sampled features must move for them, or must
    not.
    """

    name: str
    clicked_us: int
    shown_us: int
    must_move: bool


PLANTS = (
    Plant("clicked 1 us before", -1, -1, True),
    Plant("clicked at that very moment", 0, 0, False),
    Plant("clicked 1 us after", 1, 1, False),
    Plant("shown a minute before, clicked 1 us after", 1, -_EARLIER_US, False),
)


# A night that is planted is available so long after the moment of an impression: must that move?
NIGHTS = (
    ("night available at that very moment", 0, True),
    ("night available 1 us after", 1, False),
)


@dataclass(frozen=True)
class Moved:
    """Tells what one kind of plant moved.

    `moved` counts the `sampled` impressions that moved, `wrongly` the impressions of the bucket
    that it must not have moved; `columns` says in which columns.
    """

    plant: str
    must_move: bool
    sampled: int
    moved: int
    wrongly: int
    columns: tuple[str, ...]


@dataclass(frozen=True)
class Finding:
    """Tells of one thing that was looked at: `level` is "ok", "leak" or "unverified"."""

    level: str
    text: str


@dataclass
class Report:
    """Holds what the audit of a day found: of its night, or of one of its training sets.

    That of a night has those of its `training_sets` by name. `impressions` are samples there.
    """

    ds: str
    bucket: int
    buckets: int
    impressions: int
    users: int
    planted: list[Moved] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    training_sets: dict[str, "Report"] = field(default_factory=dict)

    @property
    def leaks(self) -> list[str]:
        """Returns what was found to leak, of training sets too."""
        mine = [finding.text for finding in self.findings if finding.level == LEAK]
        sets = self.training_sets.items()
        return mine + [f"training set {name}: {leak}" for name, of in sets for leak in of.leaks]

    def as_json(self) -> dict[str, object]:
        return {**asdict(self), "leaks": len(self.leaks)}

    def tell(self, level: str, text: str) -> None:
        self.findings.append(Finding(level, text))


def audit(
    settings: Settings, ds: dt.date, sample: int, from_log: bool, say: Callable[[str], None]
) -> Report:
    """Audits ds; `sample` impressions are planted around.

    Raises OperatorError, DataContractError or InputNotReady where its features could not be made.
    """
    day, scores, look, rows, report = _open(settings, ds, from_log, say)
    gone = _tell_gone(scores, report)
    if len(rows) and not gone:
        _audit_features(_Bucket(scores, look, rows, report.bucket, report.buckets), sample, report)
    elif not len(rows):
        report.tell(UNVERIFIED, f"ds {ds} has no impressions in this bucket: nothing to look at")
    _audit_clicks(rows, scores.has_history, report)
    _audit_artefacts(day, scores, look, report)
    return report


def _tell_gone(scores: PlannedScores, report: Report) -> bool:
    """Tells which nights that scores took are gone; returns whether there are any."""
    gone = [night.snapshot.ds for night in scores.nights if night.is_gone]
    for ds in gone:
        told = f"the night of ds {ds} that its scores took was taken away: no score was made again"
        report.tell(UNVERIFIED, told)
    return bool(gone)


def recompute(settings: Settings, ds: dt.date) -> Report:
    """Makes the features of the bucket of ds again and compares them with what is published.

    Raises as `audit` does, of which it is a part.
    """
    _, scores, look, rows, report = _open(settings, ds, False, lambda _: None)
    published = _published(scores, look, report)
    if published is None:
        return report
    if len(rows):
        bucket = _Bucket(scores, look, rows, report.bucket, report.buckets)
        _audit_published(published, bucket.features(), report)
        return report
    if found := len(published):
        report.tell(LEAK, f"{found:,} published user_simscores are of no impression of the log")
    else:
        report.tell(UNVERIFIED, f"ds {ds} has no impressions in this bucket: nothing to look at")
    return report


def _open(
    settings: Settings, ds: dt.date, from_log: bool, say: Callable[[str], None]
) -> tuple[DayPlan, PlannedScores, Look, pa.Table, Report]:
    """Plans ds and reads the impressions of its bucket; the report has nothing to tell yet."""
    options = NightOptions(allow_overlap=True, from_log=from_log)
    day = DayPlan(Range(settings, settings.layout, say, options), ds)
    night = plan_day(day, [SIMSCORE])
    (scores,) = (one for one in night.planned if isinstance(one, PlannedScores))
    buckets = hashing.num_shards(scores.log.log.rows, _BUCKET_ROWS)
    bucket = ds.toordinal() % buckets
    rows = _rows_of_bucket(scores.log.log, bucket, buckets, scores, settings.history_len)
    users = pc.count_distinct(rows["user_id"]).as_py()
    return day, scores, night.look, rows, Report(str(ds), bucket, buckets, len(rows), users)


# ---- Features of a bucket ----------------------------------------------------------------------


class Bucket(Protocol):
    """Is a bucket of users of one day, whose features can be made with more clicks in the log.

    `rows` are its impressions, and `probes` two items to plant clicks on.
    """

    rows: pa.Table
    job: HistoriesJob | None

    @property
    def probes(self) -> tuple[pa.Scalar, pa.Scalar]: ...

    def features(self, planted: pa.Table | None = None) -> pa.Table: ...


class _Bucket:
    """Holds the impressions of a bucket of users on one day, and what makes their features."""

    def __init__(
        self, scores: PlannedScores, look: Look, rows: pa.Table, bucket: int, buckets: int
    ):
        self.scores, self.look = scores, look
        self.rows, self.bucket, self.buckets = rows, bucket, buckets
        form = score_form(scores.log.settings)
        # Plants are of items that a history does not begin with.
        self.form = replace(form, columns=tuple(sorted({*form.columns, HISTORY_ITEM_IDS})))
        self.job: HistoriesJob | None = None
        self._earlier: list[pa.Table] = []
        if not scores.has_history:
            job = histories_job([scores.log], [buckets], scores.stage.staging)
            self.job = replace(job, shards=buckets)
            self._earlier = [self._clicks(log) for log in scores.log.before.log]
        self.nights = scores.as_worker_knows_it(look, scores.stage.staging).nights
        self._items = self._ask_for_items()

    def _clicks(self, log: Source) -> pa.Table:
        """Returns the bucket's clicks in the log of an earlier day."""
        assert self.job is not None
        rows = _rows_of_bucket(log, self.bucket, self.buckets, self.scores, self.form.length)
        end_us = day_end(log.form.ds, self.job.day_timezone)
        return clicks_of(rows, log.form.ds.toordinal(), end_us, self.job.law)

    def _ask_for_items(self) -> dict[str, ItemVectors]:
        """Returns the items of each night, by its key."""
        ids = [self.rows["item_id"].combine_chunks()]
        if self.job is None:
            ids.append(pc.list_flatten(self.rows["history"].combine_chunks()))
        else:
            (known,) = self.job.known_of(self.bucket, self._clicks_with(self.rows.slice(0, 0)))
            ids.append(known.item_ids)
        self.ids = pc.unique(pa.concat_arrays(ids))
        return {one.broadcast_key: ask_all(one.items, self.ids) for one in self.nights}

    @property
    def probes(self) -> tuple[pa.Scalar, pa.Scalar]:
        """Returns two items to plant clicks on; the same one twice where there is but one."""
        return self.ids[0], self.ids[-1]

    def _clicks_with(self, planted: pa.Table) -> pa.Table:
        """Returns all clicks of the day and of logs before it, with the planted ones."""
        assert self.job is not None
        day, law = self.scores.log.day, self.job.law
        own = [clicks_of(rows, day.number, day.end_us, law) for rows in (self.rows, planted)]
        return pa.concat_tables([*self._earlier, *own])

    def features(
        self, planted: pa.Table | None = None, planted_nights: tuple[ItemSnapshot, ...] = ()
    ) -> pa.Table:
        """Makes `user_simscores` of the bucket, with clicks of `planted` impressions in the log.

        Planted nights are of the items of the others, by other names.
        """
        nights = (*self.nights, *planted_nights)
        rows = self.rows
        if self.job is not None:
            planted = rows.slice(0, 0) if planted is None else planted
            (known,) = self.job.known_of(self.bucket, self._clicks_with(planted))
            rows = rows.append_column("history", history_lists(known, rows))
        return score_by_night(by_night(rows, nights), nights, self._items_of, self.form)[0]

    def _items_of(self, night: ItemSnapshot, _: pa.Table) -> ItemVectors:
        return self._items[night.broadcast_key]


def _rows_of_bucket(
    source: Source, bucket: int, buckets: int, scores: PlannedScores, history_len: int
) -> pa.Table:
    """Returns the impressions of one bucket of users in one log; reads all of it.

    `source` is the log of the day of `scores`, or of one before it.
    """

    def read(group: RowGroup) -> pa.Table:
        rows = read_impressions(group, scores.log.day.end_us, history_len)
        mine = hashing.shard_of(hashing.hash_ids(rows["user_id"]), buckets) == bucket
        return rows.filter(pa.array(mine))

    with ThreadPoolExecutor(_READERS) as pool:
        found = list(pool.map(read, source.groups()))
    return pa.concat_tables(found) if found else scores.no_rows


# ---- Planting ----------------------------------------------------------------------------------


def _audit_features(bucket: _Bucket, sample: int, report: Report) -> None:
    before = bucket.features()
    published = _published(bucket.scores, bucket.look, report)
    if published is not None:
        _audit_published(published, before, report)
    if bucket.nights and "feature_ds" in bucket.scores.schema.names:
        for name, after_us, must_move in NIGHTS:
            moved = _plant_night(name, after_us, must_move, bucket, before)
            report.planted.append(moved)
            judge(moved, report, "night", "they are scored with an older night than they may know")
    if bucket.job is None:
        report.tell(
            UNVERIFIED,
            "histories were logged by the shop and are scored as they are: whether its serving "
            "knew of clicks too early cannot be seen from here",
        )
        return
    sampled = sample_rows(before, bucket.scores.log.day.known_from_us(bucket.job.law), sample)
    if bucket.probes[0] == bucket.probes[1]:
        sampled = sampled[:0]
    if not len(sampled):
        report.tell(
            UNVERIFIED,
            "no clicks were planted: of this bucket's impressions none came in time for a history, "
            "or all are of one item",
        )
        return
    for plant in PLANTS:
        if plant.clicked_us != plant.shown_us and "click_time" not in bucket.rows.column_names:
            continue
        moved = plant_clicks(plant, bucket, before, sampled)
        report.planted.append(moved)
        judge(moved, report)


def _plant_night(
    name: str, after_us: int, must_move: bool, bucket: _Bucket, before: pa.Table
) -> Moved:
    """Makes the features again with a newer night, available near the middle impression's moment.

    Only those from when it is available may move, and all of them must.
    """
    moments = before["event_time"].cast(pa.int64()).to_numpy()
    middle = np.sort(moments)[len(moments) // 2]
    night = Snapshot(bucket.scores.stage.ds, int(middle) + after_us)
    planted = replace(bucket.nights[0], snapshot=night, encoder_id="planted")
    after = bucket.features(planted_nights=(planted,))
    return night_moved(name, must_move, night, int(middle), before, after)


def night_moved(
    name: str, must_move: bool, night: Snapshot, at_us: int, before: pa.Table, after: pa.Table
) -> Moved:
    """Tells what a planted night moved: rows of the moment `at_us`, and wrongly those before it."""
    moments = before["event_time"].cast(pa.int64()).to_numpy()
    columns = {one: differing(before[one], after[one]) for one in before.column_names}
    differs, sampled = np.any(list(columns.values()), axis=0), moments == at_us
    wrongly = differs & (moments < night.from_us)
    return Moved(
        name,
        must_move,
        int(sampled.sum()),
        int((differs & sampled).sum()),
        int(wrongly.sum()),
        tuple(one for one, moved in columns.items() if moved.any()),
    )


def sample_rows(features: pa.Table, known_from_us: int, count: int) -> np.ndarray:
    """Returns the places of at most `count` impressions, each of another user.

    None came too late for a history. They are chosen by a hash, so that the same ones are looked at
    again.
    """
    users = pc.dictionary_encode(features["user_id"].combine_chunks()).indices.to_numpy()
    moments = features["event_time"].cast(pa.int64()).to_numpy()
    order = np.argsort(hashing.hash_ids(features["item_id"]) ^ moments.view(np.uint64))
    order = order[moments[order] >= known_from_us]
    _, first = np.unique(users[order], return_index=True)
    return order[np.sort(first)][:count]


def plant_clicks(plant: Plant, bucket: Bucket, before: pa.Table, sampled: np.ndarray) -> Moved:
    """Makes the features again with one more click near each sampled impression."""
    assert bucket.job is not None
    law = bucket.job.law
    moments = before["event_time"].cast(pa.int64()).to_numpy() - law.lag_us
    planted = _planted(plant, bucket, before, sampled, moments[sampled], law.click_delay_us)
    after = bucket.features(planted)
    columns = {name: differing(before[name], after[name]) for name in before.column_names}
    differs = np.any(list(columns.values()), axis=0)
    of_plant = pc.index_in(
        before["user_id"], value_set=before["user_id"].take(pa.array(sampled)).combine_chunks()
    )
    clicked = np.append(moments[sampled] + plant.clicked_us, np.iinfo(np.int64).max)
    later = moments > clicked[pc.fill_null(of_plant, -1).to_numpy()]
    moved_too = differs & ~later
    looked_at = moved_too if moved_too.any() else differs
    return Moved(
        plant.name,
        plant.must_move,
        len(sampled),
        int(differs[sampled].sum()),
        int(moved_too.sum()),
        tuple(name for name, moved in columns.items() if (moved & looked_at).any()),
    )


def _planted(
    plant: Plant,
    bucket: Bucket,
    before: pa.Table,
    sampled: np.ndarray,
    moments: np.ndarray,
    delay_us: int,
) -> pa.Table:
    """Makes a click for each sampled impression, of an item its history does not begin with."""
    newest = _first_of(before["history_item_ids"].take(pa.array(sampled)).combine_chunks())
    one, other = bucket.probes
    items = pc.if_else(pc.equal(newest, one).fill_null(False), other, one)
    columns = {
        "user_id": before["user_id"].take(pa.array(sampled)),
        "item_id": items,
        "event_time": _times(moments + plant.shown_us),
        "clicked": np.ones(len(sampled), bool),
    }
    if "click_time" in bucket.rows.column_names:
        columns["click_time"] = _times(moments + plant.clicked_us)
    else:
        columns["event_time"] = _times(moments + plant.clicked_us - delay_us)
    return pa.table(columns)


def _first_of(lists: pa.Array) -> pa.Array:
    """Returns the first value of each of some lists, null for an empty one."""
    sizes = pc.list_value_length(lists).to_numpy()
    starts = lists.offsets.to_numpy()[:-1] - lists.offsets[0].as_py()
    return lists.flatten().take(pa.array(starts, mask=sizes == 0))


def _times(moments: np.ndarray) -> pa.Array:
    return pa.array(moments).cast(TIMESTAMP)


def differing(one: pa.ChunkedArray, other: pa.ChunkedArray) -> np.ndarray:
    """Tells in which rows two columns of the same rows differ; bool [n]."""
    if pa.types.is_list(one.type):
        both = pa.concat_arrays([one.combine_chunks(), other.combine_chunks()])
        paired = np.arange(len(both)).reshape(2, -1).T.reshape(-1)
        return differ_from_before(both.take(pa.array(paired)))[1::2]
    same = pc.or_kleene(pc.equal(one, other), pc.and_(pc.is_null(one), pc.is_null(other)))
    return ~pc.fill_null(same, False).to_numpy()


def judge(
    moved: Moved,
    report: Report,
    planted: str = "clicks",
    lacking: str = "clicks which a history must know are missing from it",
) -> None:
    """Tells of a plant that moved what it must not have moved, or less than it must have."""
    if moved.wrongly:
        report.tell(
            LEAK,
            f"{moved.plant}: {moved.wrongly:,} impressions moved that were not later than the "
            f"planted {planted}, in {', '.join(moved.columns)}",
        )
    if moved.must_move and moved.moved < moved.sampled:
        report.tell(
            LEAK,
            f"{moved.plant}: only {moved.moved:,} of {moved.sampled:,} sampled impressions moved, "
            f"so that {lacking}",
        )


# ---- What was published ------------------------------------------------------------------------


def _published(scores: PlannedScores, look: Look, report: Report) -> pa.Table | None:
    """Returns the published `user_simscores` of the bucket; None, and tells why, without any."""
    stage = scores.stage
    state = look.state(stage)
    if state.name != PUBLISHED:
        other = look.published(stage.folder(USER_SIMSCORES))
        why = "are of other inputs or settings than the present ones" if other else "are not there"
        report.tell(UNVERIFIED, f"the published user_simscores of ds {stage.ds} {why}")
        return None
    (partition,) = state.tables
    return partition.read_shard(report.bucket, report.buckets, "user_id")


def _audit_published(found: pa.Table, made: pa.Table, report: Report) -> None:
    """Tells whether the published `user_simscores` are those that were made here."""
    found = arrays.in_order(found, ["impression_id", "user_id", "event_time", "item_id"])
    made = arrays.in_order(made, ["impression_id", "user_id", "event_time", "item_id"])
    wrong = not_as_published(found, made)
    if wrong:
        report.tell(LEAK, f"the published user_simscores are not what their inputs give: {wrong}")
    else:
        report.tell(OK, f"the {len(made):,} published user_simscores are what their inputs give")


def not_as_published(found: pa.Table, made: pa.Table) -> str:
    """Says in words what differs between published and made rows; empty where nothing does."""
    if len(found) != len(made):
        return f"{len(found):,} rows instead of {len(made):,}"
    both = sorted(set(found.column_names) & set(made.column_names))
    differ = {name: int(differing(found[name], made[name]).sum()) for name in both}
    return ", ".join(f"{name} in {n:,} rows" for name, n in differ.items() if n)


# ---- What cannot be planted --------------------------------------------------------------------


def _audit_clicks(rows: pa.Table, has_history: bool, report: Report) -> None:
    clicks = rows.filter(rows["clicked"])
    if has_history or not len(clicks):
        return
    known = (
        len(clicks) - clicks["click_time"].null_count if "click_time" in rows.column_names else 0
    )
    if known < len(clicks):
        report.tell(
            UNVERIFIED,
            f"{len(clicks) - known:,} of {len(clicks):,} clicks have no click_time and are dated "
            "event_time + click_delay_seconds: those that happened later are known too early",
        )
    else:
        report.tell(OK, f"all {len(clicks):,} clicks have a click_time")


def _audit_artefacts(day: DayPlan, scores: PlannedScores, look: Look, report: Report) -> None:
    nights = [night for night in scores.nights if not night.is_gone]
    made = dict[str, str | None]()  # up to which day the data of what was made goes, by its name
    used_by = dict[str, list[str]]()  # the nights, by its name
    for night in nights:
        pinned = PinnedArtefacts(day.settings, night.snapshot.ds, True, day.range.artefacts)
        made_by = look.open(night.features).manifest["identities"]
        if made_by != _identities(pinned):
            told = f"encoder and codebook of the night of ds {night.snapshot.ds} are not pinned for"
            why = (
                f"it any more ({', '.join(made_by.values())}): of what they were made is not known"
            )
            report.tell(UNVERIFIED, f"{told} {why}")
            continue
        encoder, codebook = pinned.encoder, pinned.codebook
        word = " (by what was declared of its vectors)" if encoder.vectors else ""
        ends = {
            f"encoder {encoder.encoder_id}{word}": encoder.data_end_ds,
            f"codebook {codebook.codebook_id}": codebook.data_end_ds,
        }
        made |= ends
        for name in ends:
            used_by.setdefault(name, []).append(_first_served(night))
    for name, end in made.items():
        _tell_end(name, end, used_by[name], report)
    for night in nights:
        _audit_embeddings(look.open(night.embeddings), night, day, report)


def _identities(pinned: PinnedArtefacts) -> dict[str, str] | None:
    """Returns what is pinned for a day; None where nothing is, or its packages are gone."""
    try:
        return pinned.identities()
    except OperatorError:
        return None


def _first_served(night: ItemNight) -> str:
    """Returns the first day whose impressions may be scored with a night: its own, or the next."""
    is_own = night.snapshot == always(night.snapshot.ds)
    return str(night.snapshot.ds if is_own else night.snapshot.ds + dt.timedelta(days=1))


def _tell_end(name: str, end: str | None, used_by: Sequence[str], report: Report) -> None:
    """Tells whether an artefact, made from data up to `end`, is older than the days it served."""
    if end is None:
        report.tell(OK, f"{name} was made from no data of the shop")
    elif late := [ds for ds in used_by if ds <= end]:
        told = f"{name} was made from data up to ds {end}, which is not before ds "
        report.tell(LEAK, told + ", ".join(late))
    else:
        report.tell(OK, f"{name} was made from data up to ds {end}, before ds")


def _audit_embeddings(
    embeddings: partitions.Partition, night: ItemNight, day: DayPlan, report: Report
) -> None:
    """Tells of images written after the day's end: its users may have seen other ones."""
    end_us = day_end(night.snapshot.ds, day.settings.day_timezone)
    ds = "ds" if night.snapshot.ds == day.ds else f"ds {night.snapshot.ds}"
    read = partial(partitions.read_parquet, columns=["item_id", "image_mtime"])
    with ThreadPoolExecutor(_READERS) as pool:
        rows = pa.concat_tables(pool.map(read, embeddings.paths))
    times = rows["image_mtime"]
    late = pc.sum(pc.greater_equal(times.cast(pa.int64()), end_us)).as_py() or 0
    if embeddings.manifest["notes"].get("one_snapshot_for_all_days"):
        report.tell(UNVERIFIED, f"one catalogue serves all days: it may hold what came after {ds}")
    if declared := embeddings.manifest["notes"].get(DECLARED):
        report.tell(
            UNVERIFIED,
            f"the vectors of {len(rows):,} items are the shop's own, declared as {declared}: what "
            "they know was not seen",
        )
        if embeddings.manifest["notes"].get(ONE_SNAPSHOT_OF_VECTORS):
            told = "one snapshot of vectors serves all days: it may know what came after"
            report.tell(UNVERIFIED, f"{told} {ds}")
    elif times.null_count:
        report.tell(
            UNVERIFIED,
            f"when the images of {times.null_count:,} of {len(rows):,} items were written is not "
            "known: a bucket tells generations and no times",
        )
    if late:
        first = rows["item_id"].filter(pc.greater_equal(times.cast(pa.int64()), end_us))[0]
        report.tell(
            UNVERIFIED,
            f"the images of {late:,} of {len(rows):,} items, such as {first}, were written after "
            f"the end of {ds}: what users saw may have been another one",
        )
    elif len(rows) > times.null_count:
        report.tell(
            OK, f"{len(rows) - times.null_count:,} images were written before the end of {ds}"
        )


# ---- Telling -----------------------------------------------------------------------------------


def render(report: Report) -> str:
    """Writes the report for people, and those of training sets below it."""
    sets = [_of(one, f"the training set {name} of ") for name, one in report.training_sets.items()]
    last = "no leak was found" if not report.leaks else f"{len(report.leaks)} LEAKS"
    return "\n\n".join([_of(report), *sets]) + f"\n{last}"


def _of(report: Report, what: str = "") -> str:
    rows = "samples" if what else "impressions"
    lines = [
        f"audit of {what}ds {report.ds}: bucket {report.bucket} of {report.buckets}, "
        f"{report.impressions:,} {rows} of {report.users:,} users"
    ]
    if report.planted:
        width = max(len(moved.plant) for moved in report.planted)
        lines += ["", f"{'planted':{width}}  sampled    moved  must move  moved wrongly"]
    for moved in report.planted:
        must = "yes" if moved.must_move else "no"
        lines.append(
            f"{moved.plant:{width}}  {moved.sampled:7,}  {moved.moved:7,}  {must:>9}  "
            f"{moved.wrongly:13,}"
        )
    moving = next((moved.columns for moved in report.planted if moved.plant == PLANTS[0].name), ())
    lines += [f"features that moved for clicks before: {', '.join(moving)}"] if moving else []
    lines += ["", *(f"{finding.level:10} {finding.text}" for finding in report.findings)]
    return "\n".join(lines)
