"""Plans JOIN: the training set of each day, from the nights and the log that samples may know."""

import datetime as dt
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import combinations, pairwise
from typing import Any

import pyarrow as pa

from feature_jobs import inputs
from feature_jobs.impressions import layouts
from feature_jobs.impressions.ctr_join import (
    JoinDay,
    JoinJob,
    cut,
    define_join,
)
from feature_jobs.impressions.histories import HistoryDay
from feature_jobs.impressions.scoring import ScoreForm
from feature_jobs.impressions.snapshots import always
from feature_jobs.inputs import Source
from feature_jobs.schemas import (
    HISTORY_ITEM_IDS,
    MAIN,
    MUSE_TIERS,
    SIM_TIERS,
    USER_HISTORIES,
    USER_SIMSCORES,
    DataContractError,
    OperatorError,
    cluster_column,
    joined_fields,
    score_field,
)
from feature_jobs.store import day_names, files, hashing
from feature_jobs.store.encoder_info import weight
from feature_jobs.store.partitions import Partition
from pipelines.config import Settings, key_of
from pipelines.planning.day_plan import NO_IDS, DayPlan, NightOptions, Range
from pipelines.planning.impressions import (
    LogOfDay,
    embeddings_by,
    histories_job,
    score_form,
    score_settings,
)
from pipelines.planning.join_nights import JoinAsked, Nights, NightThere
from pipelines.planning.made_with import history_settings
from pipelines.running.layout import job_of
from pipelines.running.stage import Planned, Stage
from pipelines.running.states import Look, Night, made_in
from pipelines.stages import HISTORIES, join_of

_AT_ONCE = 16
_NOTHING_ASKED = NightOptions()
_FORM = ("history_item_ids", "columns", "tiers", "top_k", "embedding_dtype")  # of scores
_ONE_DAY = dt.timedelta(days=1)

OwnColumns = Mapping[str, str]  # the shop's own columns: their types by name


def samples_template(given: str, config: str) -> str:
    """Returns the template of samples, relative to the folder of the settings `config`.

    Raises OperatorError for one that names no day.
    """
    template = files.absolute(files.expanded(given), os.path.dirname(os.path.abspath(config)))
    if not day_names.has_day(template):
        raise OperatorError(
            f"--samples {given!r} names no day, and a training set has a partition for each. Say "
            "where the day stands in the path, as in 'ctr/ds={ds}/*.parquet' or "
            "'ctr/dt={ds:%Y%m%d}/*.parquet'."
        )
    day_names.DayNames(template)
    return template


# ---- The stage ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlannedJoin(Planned):
    """Holds what JOIN must know of a day.

    `log` is None where samples have the histories of their night; `hands_on` is the run of the
    histories that stand for its end, None where they are of another log.
    """

    stage: Stage
    settings: Settings
    asked: JoinAsked
    samples: Source
    day: HistoryDay
    nights: tuple[NightThere, ...]
    clusters: Mapping[str, int]
    ids: tuple[pa.DataType, pa.DataType]
    schema: pa.Schema
    log: LogOfDay | None
    hands_on: str | None
    scores: Partition | None
    scores_told: str
    embeddings_by: str

    @property
    def form(self) -> ScoreForm:
        """Returns what is made of scores."""
        return join_form(self.settings, self.asked)

    @property
    def layout_form(self) -> layouts.Form:
        """Returns what a layout must know of the set."""
        form, asked, numbers = self.form, self.asked, self.stage.notes["max_id"]
        tiers = MUSE_TIERS if form.tiers == "muse" else SIM_TIERS
        return layouts.Form(
            asked.columns["user_id"], asked.label, form.length, numbers, tiers, form.top_k
        )

    def continues(self, earlier: Planned) -> bool:
        assert isinstance(earlier, PlannedJoin)
        if self.log is None:
            return True
        return earlier.hands_on is not None and self.log.before.run_id == earlier.hands_on

    @property
    def id_types(self) -> tuple[pa.DataType, ...]:
        return self.ids

    def came_in(self) -> Mapping[str, int]:
        return {"samples": self.stage.input_rows}

    @classmethod
    def wire(cls, root: Any, days: Sequence["PlannedJoin"], folder: str) -> None:
        first, logs = days[0], [day.log for day in days if day.log]
        rows, settings = max(day.samples.rows for day in days), first.settings
        # A shard of a table that samples meet is no larger than a part of it.
        met = [len(table.paths) for day in days for table in day._tables_by_user()]
        widest = max((night.dimension for day in days for night in day.nights), default=0)
        shards = max([hashing.num_shards(rows * weight(widest), settings.rows_per_shard), *met])
        histories, log = None, list[Source]()
        if logs:
            histories = histories_job(logs, [shards], folder)
            shards = histories.shards
            log = [*logs[0].before.log, *(one.log for one in logs)]
        job = JoinJob(
            tuple(day._as_worker_knows_it(job_of(folder)) for day in days), shards, histories,
            first.form, first.embeddings_by, first.clusters, first.asked.label,
            first.stage.tables[0], first.asked.layout, first.layout_form, folder,
        )  # fmt: skip
        define_join(root, log, job)

    def _tables_by_user(self) -> list[Partition]:
        """Returns the tables, by user, whose rows samples meet."""
        found = [self.scores, *(night.histories for night in self.nights)]
        return [table for table in found if table]

    def _as_worker_knows_it(self, folder: str) -> JoinDay:
        group_rows = [rows for groups in self.samples.row_groups for rows in groups]
        labels, dtype = self.form.labels, self.settings.simscore.embedding_dtype
        nights = tuple(night.as_worker_knows_it(labels, dtype, folder) for night in self.nights)
        return JoinDay(
            self.day, tuple(self.samples.groups()), cut(group_rows, self.settings.rows_per_shard),
            nights, self.scores and self.scores.slim(), self._scores_from_us, self.schema, self.ids,
            made_in(self.stage.staging),
        )  # fmt: skip

    @property
    def _scores_from_us(self) -> int:
        """Returns from which moment on published scores are of the nights of the samples.

        Of late impressions others may have been there when they were scored.
        """
        is_by_night = self.scores and "snapshots" in self.scores.manifest["inputs"]
        return self.day.start_us if is_by_night else always(self.stage.ds).from_us

    def copies(self, folder: str) -> list[str]:
        keys = [night.key(job_of(folder)) for night in self.nights]
        return [*keys, *(f"facts-{key}" for key in keys)]


def plan_joins(
    settings: Settings,
    days: Sequence[dt.date],
    asked: JoinAsked,
    say: Callable[[str], None] = lambda _: None,
    options: NightOptions = _NOTHING_ASKED,
) -> list[Night]:
    """Plans a training set of ascending days.

    Raises InputNotReady where samples, log or histories of a day are not there, OperatorError for
    columns that clash and codebooks of two lineages, DataContractError for IDs of another type, and
    for days whose own columns differ.
    """
    if (asked.features_from, asked.history_as_of) == ("same", "night"):
        raise OperatorError(
            "The night of a sample's own day knows all clicks of that day, its own among them: "
            "--history-as-of night goes with --features-from previous."
        )
    if asked.history_as_of == "night" and HISTORIES not in settings.night:
        raise OperatorError(
            "--history-as-of night takes the user_histories of each sample's night, and the "
            'settings say tables = "items": nights have none, so that no night could be taken, and '
            "all features would be 0. Leave it out, and histories are made of the log of "
            "[impressions]; or have nights make them, too."
        )
    together = Range(settings, settings.layout, say, options, len(days))
    nights = Nights(settings, asked, together.look, say)
    opened = [_OpenDay(DayPlan(together, ds), asked, nights) for ds in days]
    known = list({night.version: night for one in opened for night in one.nights}.values())
    known = known or nights.first()
    set_of = _SetOfDays(settings, asked, known, together.look)
    set_of.check({one.day.ds: one.own_columns for one in opened})
    again = partial(plan_joins, settings, days, asked, say, options)
    return [one.planned(set_of, again) for one in opened]


@dataclass(frozen=True)
class _SetOfDays:
    """Holds what days of one training set have in common: they are read as one table.

    `known` are the nights that the days which are planned take their features from, or where they
    take none, one of those to come.
    """

    settings: Settings
    asked: JoinAsked
    known: Sequence[NightThere]
    look: Look

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """Returns the resolutions of which all nights have cluster IDs, the main one first."""
        common = [set(night.max_ids) for night in self.known] or [{MAIN}]
        further = sorted(set.intersection(*common) - {MAIN})
        return (MAIN, *further)

    @property
    def max_ids(self) -> dict[str, int]:
        """Returns the highest cluster number of any night by label."""
        return {label: max((night.max_ids[label] for night in self.known), default=0)
                for label in self.labels}  # fmt: skip

    def as_settings(self) -> dict[str, Any]:
        """Returns what a manifest says of how the set is made: alike on all of its days."""
        asked, settings = self.asked, self.settings
        law: dict[str, Any] = {"history_len": settings.history_len}
        if settings.impressions:
            law = history_settings(settings)
        return {
            **law,
            **score_settings(settings),
            "layout": asked.layout,
            "features_from": asked.features_from,
            "availability_delay_hours": settings.availability_delay_hours,
            "history_as_of": asked.history_as_of,
            "as_of": asked.as_of,
            "created_timestamp": asked.created_timestamp,
            "label": asked.label,
            "labels": list(self.labels),
            "sample_columns": dict(asked.columns),
            "input_timezone": asked.input_timezone,
        }

    def check(self, days: Mapping[dt.date, OwnColumns]) -> None:
        """Raises OperatorError where days cannot be read as one table with those published.

        Raises DataContractError where samples of theirs have other columns.
        """
        layout, (table,) = self.settings.layout, join_of(self.asked.name).tables
        others = [ds for ds in layout.begun_days(table) if ds not in days]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            found = list(pool.map(lambda ds: self.look.published(layout.folder(table, ds)), others))
        there = [one.manifest for one in found if one]
        codebooks = dict(night.codebook for night in self.known)
        encoders = {night.encoder_id for night in self.known}
        for manifest in there:
            if manifest["settings"] != self.as_settings():
                raise self._another_set(manifest)
            codebooks |= {one: tuple(of) for one, of in manifest["notes"]["codebooks"].items()}
            encoders |= set(manifest["notes"]["encoders"])
        own = {manifest["ds"]: manifest["notes"].get("own_columns") for manifest in there}
        _refuse_other_columns(self.asked.name, own | {str(ds): one for ds, one in days.items()})
        self._refuse_columns()
        _refuse_two_lineages(codebooks)
        if len(encoders) > 1 and not self.asked.mixed_encoders:
            raise OperatorError(
                f"The nights of these samples, or those of other days of the set "
                f"{self.asked.name!r}, have embeddings of {len(encoders)} encoders: "
                f"{', '.join(sorted(encoders))}. Each score is of one of them, but those of two "
                "encoders are spread differently, and a model would learn from one what does not "
                "hold for the other. Join days of one encoder, or say --mixed-encoders, which the "
                "manifest tells."
            )

    def _refuse_columns(self) -> None:
        """Raises OperatorError where a column on request is of cluster IDs that nights lack."""
        for label in join_form(self.settings, self.asked).labels:
            if label not in self.labels:
                raise OperatorError(
                    f"[simscore] columns asks for columns of the resolution {label!r}, of which "
                    f"not all nights of these samples have cluster IDs; they have "
                    f"{', '.join(self.labels)}. Leave the columns out, or join days whose nights "
                    "have it."
                )

    def _another_set(self, manifest: Mapping[str, Any]) -> OperatorError:
        mine, theirs = self.as_settings(), manifest["settings"]
        differ = [
            name for name in dict.fromkeys([*theirs, *mine]) if theirs.get(name) != mine.get(name)
        ]
        told = "; ".join(f"{name} was {theirs.get(name)}, is {mine.get(name)}" for name in differ)
        return OperatorError(
            f"The training set {self.asked.name!r} has days that were made otherwise, such as ds "
            f"{manifest['ds']}: {told}. They are read as one table, in which columns would mean "
            "two things. Ask as they were made, or give another --name."
        )


def _refuse_other_columns(name: str, own: Mapping[str, OwnColumns | None]) -> None:
    """Raises DataContractError where the shop's `own` columns of a set, by ds, are not alike.

    Those of a day without a file, and of one made by an earlier version, are not known.
    """
    known = [(ds, columns) for ds, columns in own.items() if columns]
    for (ds, first), (other, columns) in pairwise(known):
        for column in dict.fromkeys([*first, *columns]):
            one, two = (there.get(column, "missing") for there in (first, columns))
            if one != two:
                one, two = (
                    "of no type, since all its values are missing," if there == "null" else there
                    for there in (one, two)
                )
                raise DataContractError(
                    f"The column {column!r} of the samples is {one} on ds {ds} of the training set "
                    f"{name!r}, but {two} on ds {other}. The days of a set are read as one table, "
                    "in which engines cast such a column, leave it out, or stop. Write the samples "
                    "of all days alike, and join those that changed again in one command; or give "
                    f"ds {other} another --name."
                )


def _refuse_two_lineages(codebooks: Mapping[str, tuple[str, ...]]) -> None:
    """Raises OperatorError where of two codebooks neither is an ancestor of the other."""
    for one, other in combinations(sorted(codebooks), 2):
        if one not in codebooks[other] and other not in codebooks[one]:
            raise OperatorError(
                f"The nights of this training set have cluster IDs of two codebooks, {one} and "
                f"{other}, of which neither descends from the other: one number would be two "
                "clusters in one column. Join their days into sets of their own (--name), or fit "
                "the later codebook from the earlier one (`courier fit-codebook`), which keeps "
                "numbers."
            )


def log_of(day: DayPlan) -> LogOfDay:
    """Opens the log of a day, and what the histories of its moments begin from.

    Raises InputNotReady where either is not there.
    """
    log, before = day.shop.impressions(day.ds), next(day.befores())
    return LogOfDay(day.settings, day.history_day(), log, before, day.history_ids(before.ids))


class _OpenDay:
    """Opens what a day of a training set is made of."""

    def __init__(self, day: DayPlan, asked: JoinAsked, nights: Nights):
        self.day, self.asked, settings = day, asked, day.settings
        self.samples = _open_samples(asked, day.ds)
        start_us = inputs.day_end(day.ds - _ONE_DAY, settings.day_timezone)
        earliest = inputs.earliest_event(self.samples)
        self.nights = nights.of(day.ds, min(start_us, start_us if earliest is None else earliest))
        self.log = log_of(day) if asked.history_as_of == "moment" else None
        self._tell_nights()

    @property
    def own_columns(self) -> OwnColumns:
        return {field.name: _type_name(field.type) for field in self.samples.carried}

    def _tell_nights(self) -> None:
        """Warns of samples that take no night, or an old one."""
        ds, say = self.day.ds, self.day.range.say
        newest = self.nights[-1].snapshot.ds if self.nights else None
        wanted = ds if self.asked.features_from == "same" else ds - _ONE_DAY
        if newest is None:
            say(f"WARNING: no night is available to samples of ds {ds}: all features are 0")
        elif newest < wanted and self.asked.as_of == "day":
            say(f"WARNING: there is no night of ds {wanted}: samples of ds {ds} take {newest}")

    def planned(self, set_of: _SetOfDays, again: Callable[[], Sequence[Night]]) -> Night:
        day, asked, samples = self.day, self.asked, self.samples
        ids = self._ids()
        clusters = {cluster_column(label): most for label, most in set_of.max_ids.items()}
        schema = self._schema(set_of.labels, ids[1])
        scores, why = self._scores()
        told = "taken where a sample is an impression of the day" if scores else f"not taken: {why}"
        rows = [n for groups in samples.row_groups for n in groups]
        kind = join_of(asked.name)
        stage = day.stage(
            kind,
            shards=len(cut(rows, day.settings.rows_per_shard)),
            inputs={
                "samples": samples.identity(),
                "nights": [night.as_input() for night in self.nights],
                **self._log_inputs(),
            },
            identities={},
            settings=set_of.as_settings(),
            before=self.log.before.tables if self.log else (),
            input_rows=samples.rows,
            notes={
                "codebooks": {one: list(of) for one, of in (n.codebook for n in self.nights)},
                "encoders": sorted({night.encoder_id for night in self.nights}),
                "max_id": set_of.max_ids,
                "own_columns": dict(self.own_columns),
                "days_without_log": list(self.log.before.missing) if self.log else [],
            },
        )
        day.range.say(f"join of ds {day.ds}: published scores are {told}")
        by = embeddings_by(day, max((night.copied_bytes for night in self.nights), default=0))
        planned = PlannedJoin(
            stage, day.settings, asked, samples, day.history_day(), self.nights, clusters, ids,
            schema, self.log, self._hands_on(), scores, told, by,
        )  # fmt: skip
        if samples.paths:  # else there is no column of the shop's
            layouts.layout_schema(asked.layout, schema, planned.layout_form)
        return Night(day.settings, day.ds, (planned,), (), day.range.look, self._is_outdated, again)

    def _is_outdated(self, look: Look) -> bool:
        of_nights = [(one.features, one.embeddings, one.histories) for one in self.nights]
        tables = [table for some in of_nights for table in some if table]
        moved = (look.published(one.folder) for one in tables)
        versions = [one.version if one else None for one in moved]
        return versions != [one.version for one in tables] or self.day.is_outdated(look)

    def _log_inputs(self) -> dict[str, Any]:
        return self.log.inputs() if self.log else {}

    def _ids(self) -> tuple[pa.DataType, pa.DataType]:
        """Returns the types of users and items; raises DataContractError where they differ."""
        sources = [self.samples, *([self.log.log] if self.log else [])]
        user, item = (
            inputs.common_id_type(name, sources, known)
            for name, known in zip(("user_id", "item_id"), NO_IDS, strict=True)
        )
        for night in self.nights if self.samples.rows else ():
            self._check_ids("item_id", item, night.features)
            if night.histories and night.histories.rows:
                self._check_ids("user_id", user, night.histories)
        return user, item

    def _check_ids(self, name: str, mine: pa.DataType, table: Partition) -> None:
        """Raises DataContractError where IDs are of another type in a night's table."""
        theirs = table.schema.field(name).type
        if theirs != mine:
            raise DataContractError(
                f"{name} is {mine} in the samples of ds {self.day.ds}, but {theirs} in "
                f"{table.manifest['table']} of ds {table.manifest['ds']}. IDs of two types never "
                "meet in a join, and every feature would be empty. Cast it where the samples are "
                f"written, as in CAST({self.asked.columns[name]} AS "
                f"{'BIGINT' if theirs == pa.int64() else 'VARCHAR'})."
            )

    def _schema(self, labels: Sequence[str], item: pa.DataType) -> pa.Schema:
        """Returns the columns of the set; raises OperatorError where samples have one of ours."""
        created, form = self.asked.created_timestamp, join_form(self.day.settings, self.asked)
        fields = joined_fields(labels, created, form.columns, form.tiers, item)
        carried = list(self.samples.carried)
        names = {field.name for field in carried}
        taken = {field.name for field in fields} | {HISTORY_ITEM_IDS}
        taken.add(key_of(self.day.settings.output.partition))
        # Engines that read the set do not tell cases apart.
        clash = {name for name in names if name.lower() in taken or score_field(name.lower())}
        if clash:
            raise OperatorError(
                f"The samples of ds {self.day.ds} have columns named {', '.join(sorted(clash))}, "
                "as those of the join are, or the key of its folders, of which readers make a "
                "column. Which is which could not be told. Rename them where "
                "the samples are written, or leave them out: they may come from an earlier join."
            )
        self._check_label(carried)
        return pa.schema([*carried, *fields])

    def _check_label(self, carried: Sequence[pa.Field]) -> None:
        """Raises OperatorError where the column of labels is not there, or holds none."""
        label = self.asked.label
        found = [field for field in carried if field.name == label]
        if label is None or not carried or (found and _is_label(found[0].type)):
            return
        is_there = f"is of type {found[0].type}" if found else "is not there"
        raise OperatorError(
            f"--label {label} names a column that {is_there} in the samples of ds {self.day.ds}; "
            f"they have {', '.join(field.name for field in carried)}. Labels are booleans or "
            "numbers, of which those above 0 are counted as positive. Name such a column."
        )

    def _scores(self) -> tuple[Partition | None, str]:
        """Returns the published scores that may be taken, or why there are none."""
        day = self.day
        there = day.range.look.published(day.settings.layout.folder(USER_SIMSCORES, day.ds))
        if self.log is None:
            return None, "histories are those of the night"
        if there is None:
            return None, "none are published for the day"
        said = there.manifest
        if said["notes"].get("logged_histories"):
            return None, "they are of histories that came with the log"
        law = history_settings(day.settings)
        if {name: said["settings"].get(name) for name in law} != law:
            return None, "they were made by another law of histories"
        form = {name: said["settings"].get(name) for name in _FORM}
        if form != {**dict.fromkeys(_FORM), **score_settings(day.settings)}:
            return None, "they have other columns, tiers or embeddings than the settings ask for"
        now = self._log_inputs()
        if {name: said["inputs"].get(name) for name in now} != _as_json(now):
            return None, "the log, or the histories before it, changed since they were made"
        if not self._are_of(said):
            return None, "they are of other nights than these samples know"
        return there, ""

    def _are_of(self, said: Mapping[str, Any]) -> bool:
        """Returns whether published scores took the nights that these samples take."""
        made_from = said["made_from"]
        if "snapshots" not in said["inputs"]:  # each impression by the night of its own ds
            same = [n for n in self.nights if self.asked.features_from == "same"]
            return [(n.embeddings.version, n.features.version) for n in same] == [
                (made_from.get("item_embeddings"), made_from.get("item_features"))
            ]
        if self.asked.features_from == "same":
            return False
        theirs = {
            (one["ds"], one["from_us"], *sorted(made_from["snapshots"][one["ds"]].items()))
            for one in said["inputs"]["snapshots"]
        }
        mine = {
            (
                str(n.snapshot.ds), n.snapshot.from_us,
                ("item_embeddings", n.embeddings.version), ("item_features", n.features.version),
            )
            for n in self.nights
        }  # fmt: skip
        # Late impressions may have asked for older nights, and late samples.
        start = inputs.day_end(self.day.ds - _ONE_DAY, self.day.settings.day_timezone)
        return _since(mine, start) == _since(theirs, start)

    def _hands_on(self) -> str | None:
        """Returns the run of the histories at the end of the day, if they are of this very log."""
        if self.log is None:
            return None
        layout, look = self.day.settings.layout, self.day.range.look
        there = look.published(layout.folder(USER_HISTORIES, self.day.ds))
        now = self._log_inputs()
        if there and {k: there.manifest["inputs"].get(k) for k in now} == _as_json(now):
            return there.run_id
        return None


def join_form(settings: Settings, asked: JoinAsked) -> ScoreForm:
    """Returns what is made of scores: for a framework no lists that are of any length."""
    form = score_form(settings)
    if asked.layout == layouts.PLAIN:
        return form
    return replace(form, columns=tuple(name for name in form.columns if name != HISTORY_ITEM_IDS))


def _type_name(kind: pa.DataType) -> str:
    """Returns the name of a type; writers call the values of lists by names of their own."""
    return re.sub(r"(?<=list<)\w+: | not null", "", str(kind))


def _is_label(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)
    )


def _since(taken: set[tuple[Any, ...]], start_us: int) -> set[tuple[Any, ...]]:
    """Returns the nights that a moment from the start of the day on can take."""
    before = [one for one in taken if one[1] <= start_us]
    newest = max(before, key=lambda one: one[0], default=None)
    return {one for one in taken if one[1] > start_us} | ({newest} if newest else set())


def _as_json(said: Mapping[str, Any]) -> dict[str, Any]:
    return dict(json.loads(json.dumps(said)))


def _open_samples(asked: JoinAsked, ds: dt.date) -> Source:
    """Opens the samples of a day, of which all columns are carried."""
    paths = inputs.find_files("samples", asked.samples, ds, require_success=False)
    names = inputs.read_footer(paths[0])[1].names if paths else []
    return inputs.open_source(
        "samples", asked.samples, ds, dict(asked.columns), names, asked.input_timezone
    )


def hand_over(nights: Sequence[Night]) -> list[str]:
    """Writes the framework's configuration of a set that is published; returns its paths.

    It lies beside the days, and fits all of them: its tables have a row for every cluster number of
    any day. One that says the same already stays.
    """
    days = [one for night in nights for one in night.planned if isinstance(one, PlannedJoin)]
    planned = next((one for one in reversed(days) if one.samples.paths), None)
    if planned is None or planned.asked.layout == layouts.PLAIN:
        return []
    layout, table, look = planned.settings.layout, planned.stage.tables[0], Look()
    folder, most = os.path.dirname(layout.folder(table, planned.stage.ds)), Counter[str]()
    for ds in layout.begun_days(table):
        if found := look.published(layout.folder(table, ds)):
            most |= Counter(found.manifest["notes"]["max_id"])
    form = replace(planned.layout_form, max_ids={**planned.layout_form.max_ids, **most})
    texts = layouts.layout_config(planned.asked.layout, planned.schema, form)
    paths = {os.path.join(folder, name): text.encode() for name, text in texts.items()}
    for path, data in paths.items():
        if files.read_if_there(path) != data:
            files.write_bytes(path, data)
    return list(paths)
