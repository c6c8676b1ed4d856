"""Audits training sets: no sample knows of a click, or of a night, of its own moment or later.

A set is looked at as it is published: its rows hold the samples themselves, its manifest says how
they were joined. One hash bucket of their users is joined again, by the functions that the job
calls. Then clicks are planted in a copy of the log, as `audit` does, and nights beside those that
are there: a night must move the samples from the moment on at which it is available, which shows
that the audit can see, and no sample before it.
"""

import datetime as dt
import glob
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_jobs import inputs
from feature_jobs.impressions.ctr_join import (
    KEY,
    JoinNight,
    facts_of_samples,
    night_histories,
)
from feature_jobs.impressions.histories import HistoriesJob, clicks_of, history_lists
from feature_jobs.impressions.scoring import score_rows
from feature_jobs.impressions.snapshots import Snapshot, after_its_day, night_at
from feature_jobs.inputs import RowGroup, Source
from feature_jobs.items.item_facts import ItemFacts, item_facts
from feature_jobs.items.item_vectors import ItemVectors, ask_all, items_of_answers, no_answers
from feature_jobs.schemas import HISTORY_ITEM_IDS, InputNotReady, Table, cluster_column
from feature_jobs.store import files, hashing
from feature_jobs.store.partitions import Partition, open_published
from pipelines.config import Settings
from pipelines.planning.day_plan import DayPlan, NightOptions, Range
from pipelines.planning.impressions import histories_job, score_settings
from pipelines.planning.join_nights import JoinAsked, Nights, NightThere
from pipelines.planning.joins import join_form, log_of
from pipelines.planning.made_with import history_settings
from pipelines.reports import audit
from pipelines.reports.audit import LEAK, OK, UNVERIFIED, Report

_BUCKET_ROWS = 20_000
_READERS = 4
_ONE_DAY = dt.timedelta(days=1)
_DAY_US = 86_400_000_000
_OF_SCORES = ("columns", "tiers", "top_k", "embedding_dtype")  # where settings ask for them
_CLICK_COLUMNS = ("user_id", "item_id", "event_time", "clicked", "click_time")


def audit_day(
    settings: Settings, ds: dt.date, sample: int, from_log: bool, say: Callable[[str], None]
) -> Report:
    """Audits the night of ds, then its training sets; `sample` rows of each are planted around.

    Where there is no night the sets are audited alone, and that is told, as is a set that is not
    whole or cannot be read. Raises as `audit` does.
    """
    options, sets = NightOptions(from_log=from_log), _sets_of(settings, ds)
    try:
        report = audit.audit(settings, ds, sample, from_log, say)
    except InputNotReady as error:
        if not sets:
            raise
        report = Report(str(ds), 0, 0, 0, 0)
        report.tell(UNVERIFIED, f"the night was not audited: {error}")
    for table in sets:
        name = table.name.partition("/")[2]
        try:
            report.training_sets[name] = _audit_set(settings, ds, table, options, sample)
        except audit.ILL as error:
            report.training_sets[name] = Report(str(ds), 0, 0, 0, 0)
            told = f"the training set was not audited: {error}"
            report.training_sets[name].tell(UNVERIFIED, told)
    return report


def recompute_set(settings: Settings, ds: dt.date, table: Table) -> Report:
    """Joins the bucket of a training set of ds again and compares it with what is published.

    Raises InputNotReady where what it was made from is not there.
    """
    opened = _OpenSet(settings, ds, table, NightOptions())
    report = opened.report()
    if len(opened.rows):
        _audit_published(_Bucket(opened), report)
    return report


def _sets_of(settings: Settings, ds: dt.date) -> list[Table]:
    """Returns the training sets that have files of ds, be they published or torn."""
    layout = settings.layout
    return [one for one in layout.training_sets() if files.list_names(layout.folder(one, ds))]


# ---- What is published -------------------------------------------------------------------------


class _OpenSet:
    """Opens one day of a training set: how it was asked for, and a bucket of its `rows`.

    `nights` are those that its samples may know now, by what is published.
    """

    def __init__(self, settings: Settings, ds: dt.date, table: Table, options: NightOptions):
        self.settings, self.ds = settings, ds
        self.partition = open_published(settings.layout.folder(table, ds))
        self.asked = _asked(table, self.partition)
        self.labels = self.partition.manifest["settings"]["labels"]
        self.day = DayPlan(Range(settings, settings.layout, _say_nothing, options), ds)
        self.source = self._source()
        self.buckets = hashing.num_shards(self.partition.rows, _BUCKET_ROWS)
        self.bucket = ds.toordinal() % self.buckets
        self.rows = self._rows()
        self.nights = self._nights()
        self.log = log_of(self.day) if self.asked.history_as_of == "moment" else None

    def _source(self) -> Source:
        """Opens the set's own files as samples."""
        template = os.path.join(glob.escape(self.partition.folder), "*.parquet")
        asked = self.asked
        return inputs.open_source(
            "samples", template, self.ds, asked.columns, (), asked.input_timezone
        )

    def _rows(self) -> pa.Table:
        """Returns the keys of the bucket's samples, in their order, and what is ours of them."""
        own = self.partition.schema.names
        ours = own[own.index("feature_ds") :]

        def read(group: RowGroup) -> pa.Table:
            rows = inputs.read_rows(group, KEY, ours)
            return rows.filter(pa.array(self.is_mine(rows)))

        with ThreadPoolExecutor(_READERS) as pool:
            return pa.concat_tables(pool.map(read, self.source.groups())).combine_chunks()

    def is_mine(self, rows: pa.Table) -> np.ndarray:
        """Tells which rows are of users of the bucket; bool [n]."""
        found: np.ndarray = hashing.shard_of(hashing.hash_ids(rows["user_id"]), self.buckets)
        return found == self.bucket

    def _nights(self) -> tuple[NightThere, ...]:
        start_us = inputs.day_end(self.ds - _ONE_DAY, self.settings.day_timezone)
        earliest = inputs.earliest_event(self.source)
        earliest_us = min(start_us, start_us if earliest is None else earliest)
        found = Nights(self.settings, self.asked, self.day.range.look, _say_nothing)
        # Footers of the shop's files may have told of an earlier moment than those of the set.
        return found.of(self.ds, earliest_us - 2 * _DAY_US)

    def report(self) -> Report:
        """Returns a report that has nothing to tell but of a bucket without samples."""
        users = pc.count_distinct(self.rows["user_id"]).as_py()
        report = Report(str(self.ds), self.bucket, self.buckets, len(self.rows), users)
        if not len(self.rows):
            report.tell(UNVERIFIED, "no sample is in this bucket: nothing to look at")
        return report

    def changed(self) -> str:
        """Says what the set was made from that is another by now; empty where nothing is."""
        manifest, settings = self.partition.manifest, self.settings
        said, now = manifest["inputs"], [night.as_input() for night in self.nights]
        law: dict[str, object] = dict.fromkeys(_OF_SCORES) | score_settings(settings)
        law |= history_settings(settings) if settings.impressions else {}
        law["availability_delay_hours"] = settings.availability_delay_hours
        if any(manifest["settings"].get(name) != value for name, value in law.items()):
            return "the settings are others"
        before = [Snapshot(dt.date.fromisoformat(one["ds"]), one["from_us"])
                  for one in said["nights"]]  # fmt: skip
        moments = self.rows["event_time"].cast(pa.int64()).to_numpy()
        taken = {_named(before, at) for at in np.unique(night_at(moments, before))}
        snapshots = [night.snapshot for night in self.nights]
        taken_now = {_named(snapshots, at) for at in np.unique(night_at(moments, snapshots))}
        if taken != taken_now or any(night not in now for night in said["nights"]):
            return "nights were published since, or pruned"
        log = self.log.inputs() if self.log else {}
        if any(said.get(name) != value for name, value in log.items()):
            return "the log, or the histories before it, are others"
        return ""


def _named(snapshots: list[Snapshot], at: int) -> dt.date | None:
    return snapshots[at].ds if at >= 0 else None


def _say_nothing(_: str) -> None:
    return


def _asked(table: Table, partition: Partition) -> JoinAsked:
    """Returns how a training set was asked for, as its manifest says."""
    said = partition.manifest["settings"]
    names = (
        "label", "input_timezone", "features_from", "history_as_of", "as_of", "created_timestamp",
        "layout",
    )  # fmt: skip
    rest = {name: said[name] for name in names}
    return JoinAsked(table.name.partition("/")[2], "", said["sample_columns"], **rest)


# ---- Features of a bucket ----------------------------------------------------------------------


class _Bucket:
    """Makes the features of a bucket of samples; `rows` are its users' impressions of the log."""

    def __init__(self, opened: _OpenSet):
        self.opened = opened
        form = join_form(opened.settings, opened.asked)
        # Plants are of items that a history does not begin with.
        self.form = replace(form, columns=tuple(sorted({*form.columns, HISTORY_ITEM_IDS})))
        dtype = opened.settings.simscore.embedding_dtype
        self.nights = tuple(
            night.as_worker_knows_it(self.form.labels, dtype, "") for night in opened.nights
        )
        self.samples = opened.rows.select(KEY)
        self.clusters = tuple(map(cluster_column, opened.labels))
        self.job: HistoriesJob | None = None
        self.rows, self._earlier = pa.table({}), list[pa.Table]()
        if opened.log:
            staging = opened.settings.layout.root  # nothing is written
            job = histories_job([opened.log], [opened.buckets], staging)
            self.job = replace(job, shards=opened.buckets)
            self.rows = self._impressions(opened.log.log)
            self._earlier = [self._clicks(log) for log in opened.log.before.log]

    def _impressions(self, log: Source) -> pa.Table:
        """Returns the impressions of the bucket's users in one log; reads all of it."""
        columns = [name for name in _CLICK_COLUMNS if name in log.form.columns]

        def read(group: RowGroup) -> pa.Table:
            rows = inputs.read_rows(group, columns)
            return rows.filter(pa.array(self.opened.is_mine(rows)))

        with ThreadPoolExecutor(_READERS) as pool:
            found = list(pool.map(read, log.groups()))
        assert self.job is not None
        nothing = self.samples.slice(0, 0).append_column("clicked", pa.array([], pa.bool_()))
        return pa.concat_tables(found) if found else nothing

    def _clicks(self, log: Source) -> pa.Table:
        assert self.job is not None
        end_us = inputs.day_end(log.form.ds, self.job.day_timezone)
        rows, number = self._impressions(log), log.form.ds.toordinal()
        return clicks_of(rows, number, end_us, self.job.law)

    def features(
        self, planted: pa.Table | None = None, nights: tuple[JoinNight, ...] = ()
    ) -> pa.Table:
        """Joins the samples, with clicks of `planted` impressions in the log, and more `nights`."""
        every = (*self.nights, *nights)
        moments = self.samples["event_time"].cast(pa.int64()).to_numpy()
        at = night_at(moments, [night.snapshot for night in every])
        rows = self.samples.append_column("night", pa.array(at.astype(np.int16)))
        rows = rows.append_column("history", self._histories(rows, planted))
        taken = np.unique(at[at >= 0]).tolist()
        facts = {place: self._facts[every[place].key] for place in taken}
        scored, order = [], []
        for place in np.unique(at).tolist():
            mine = np.flatnonzero(at == place)
            items = self._vectors[every[place].key] if place >= 0 else self._no_vectors
            scores = score_rows(rows.take(pa.array(mine)).combine_chunks(), items, self.form)
            scored.append(pa.table(scores.arrow()))
            order.append(mine)
        scores = pa.concat_tables(scored).take(pa.array(np.argsort(np.concatenate(order))))
        found = facts_of_samples(rows, every, facts, self.clusters)
        told = [self.samples, pa.table(found), scores]
        columns = {name: one[name] for one in told for name in one.column_names}
        return pa.table(columns)

    def _histories(self, rows: pa.Table, planted: pa.Table | None) -> pa.Array:
        if self.job is None:
            return self._histories_of_nights(rows)
        (known,) = self.job.known_of(self.opened.bucket, self._clicks_with(planted))
        return history_lists(known, rows)

    def _clicks_with(self, planted: pa.Table | None) -> pa.Table:
        """Returns all clicks of the day and of logs before it, with the planted ones."""
        assert self.job is not None
        (day,), law = self.job.days, self.job.law
        logs = [self.rows] if planted is None else [self.rows, planted]
        own = [clicks_of(rows, day.number, day.end_us, law) for rows in logs]
        return pa.concat_tables([*self._earlier, *own])

    def _histories_of_nights(self, rows: pa.Table) -> pa.Array:
        """Returns the histories that the nights of samples knew; planted ones know none."""
        kind, nights = pa.list_(self.samples.schema.field("item_id").type), rows["night"].to_numpy()
        lists, order = [pa.array([], kind)], [np.zeros(0, np.int64)]
        for place in np.unique(nights).tolist():
            mine = np.flatnonzero(nights == place)
            users = rows["user_id"].take(pa.array(mine))
            found = self.nights[place].histories if 0 <= place < len(self.nights) else None
            columns, opened = ["user_id", "item_ids"], self.opened
            if found:
                table = found.read_shard(opened.bucket, opened.buckets, "user_id", columns)
                lists.append(night_histories(users, table, kind))
            else:
                lists.append(pa.array([[]] * len(users), kind))
            order.append(mine)
        return pa.concat_arrays(lists).take(pa.array(np.argsort(np.concatenate(order))))

    # -- Items --

    @cached_property
    def _ids(self) -> pa.Array:
        """Returns all items that samples, or clicks that they may know, are of."""
        found = [self.samples["item_id"].combine_chunks()]
        if self.job is not None:
            (known,) = self.job.known_of(self.opened.bucket, self._clicks_with(None))
            found.append(known.item_ids)
        else:
            for place in range(len(self.nights)):
                at = np.full(len(self.samples), place, np.int16)
                rows = self.samples.append_column("night", pa.array(at))
                found.append(pc.list_flatten(self._histories_of_nights(rows)))
        return pc.unique(pa.concat_arrays(found))

    @property
    def probes(self) -> tuple[pa.Scalar, pa.Scalar]:
        """Returns two items to plant clicks on; the same one twice where there is but one."""
        return self._ids[0], self._ids[-1]

    @cached_property
    def _facts(self) -> dict[str, ItemFacts]:
        return {one.key: item_facts(one.items.features, self.clusters) for one in self.nights}

    @cached_property
    def _vectors(self) -> dict[str, ItemVectors]:
        return {one.key: ask_all(one.items, self._ids) for one in self.nights}

    @cached_property
    def _no_vectors(self) -> ItemVectors:
        return items_of_answers(no_answers(self._ids.type, self.form.labels))


# ---- Planting ----------------------------------------------------------------------------------


def _audit_set(
    settings: Settings, ds: dt.date, table: Table, options: NightOptions, sample: int
) -> Report:
    partition = open_published(settings.layout.folder(table, ds))
    if partition.manifest["settings"]["layout"] == "torcheasyrec":
        report = Report(str(ds), 0, 0, 0, 0)
        report.tell(UNVERIFIED, "it is laid out for TorchEasyRec: audit one of the plain layout")
        return report
    opened = _OpenSet(settings, ds, table, options)
    report = opened.report()
    if not len(opened.rows):
        return report
    bucket = _Bucket(opened)
    before = _audit_published(bucket, report)
    _plant_nights(bucket, before, report)
    if bucket.job is None:
        report.tell(OK, "histories are those of nights: no click of a log reaches a sample")
        return report
    sampled = audit.sample_rows(before, bucket.job.days[0].known_from_us(bucket.job.law), sample)
    if not len(sampled) or bucket.probes[0] == bucket.probes[1]:
        report.tell(UNVERIFIED, "no clicks were planted: all samples are too late, or of one item")
        return report
    for plant in audit.PLANTS:
        if plant.clicked_us == plant.shown_us or "click_time" in bucket.rows.column_names:
            moved = audit.plant_clicks(plant, bucket, before, sampled)
            report.planted.append(moved)
            audit.judge(moved, report)
    return report


def _audit_published(bucket: _Bucket, report: Report) -> pa.Table:
    """Tells whether the published rows are those that are made here, which are returned."""
    made, changed = bucket.features(), bucket.opened.changed()
    if changed:
        report.tell(UNVERIFIED, f"the set was not compared with what its inputs give: {changed}")
    elif wrong := audit.not_as_published(bucket.opened.rows, made):
        report.tell(LEAK, f"the published rows are not what their inputs give: {wrong}")
    else:
        report.tell(OK, f"the {len(made):,} published rows are what their inputs give")
    return made


def _plant_nights(bucket: _Bucket, before: pa.Table, report: Report) -> None:
    """Makes the features again with a newer night each: only samples from when it is there move."""
    if bucket.opened.asked.features_from == "same":
        report.tell(UNVERIFIED, "samples have the night of their own day, as was asked for, which "
                                "nobody could have served at their moments")  # fmt: skip
        return
    if not bucket.nights:
        report.tell(UNVERIFIED, "no night was planted: there is none whose items it could have")
        return
    ds, settings = bucket.opened.ds, bucket.opened.settings
    moments = np.sort(before["event_time"].cast(pa.int64()).to_numpy())
    middle = int(moments[len(moments) // 2])
    delay_us = round(settings.availability_delay_hours * 3_600_000_000)
    own = after_its_day(ds, settings.day_timezone, delay_us).from_us
    for name, from_us, must_move in (
        ("night available at that very moment", middle, True),
        ("night available 1 us after", middle + 1, False),
        ("night of the day itself", own, False),
    ):
        night = Snapshot(ds + _ONE_DAY, from_us)
        after = bucket.features(nights=(replace(bucket.nights[-1], snapshot=night),))
        moved = audit.night_moved(name, must_move, night, middle, before, after)
        report.planted.append(moved)
        lacking = "they are joined with an older night than they may know"
        audit.judge(moved, report, "night", lacking)
