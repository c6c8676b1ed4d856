"""Plans HISTORIES, SIMSCORE and TRAINING-ROWS: what is made of the impressions of ds."""

import datetime as dt
import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import permutations
from types import MappingProxyType
from typing import Any

import pyarrow as pa

from feature_jobs.impressions.histories import HistoriesJob, HistoryDay, define_histories
from feature_jobs.impressions.scoring import ScoreForm
from feature_jobs.impressions.simscore import (
    BROADCAST,
    SHUFFLE,
    ItemSnapshot,
    SimscoreDay,
    SimscoreJob,
    define_simscore,
)
from feature_jobs.impressions.snapshots import always
from feature_jobs.impressions.training_rows import (
    TrainingRowsDay,
    TrainingRowsJob,
    define_training_rows,
)
from feature_jobs.inputs import IMPRESSION_COLUMNS, Source
from feature_jobs.items.item_vectors import ItemTables, broadcast_bytes
from feature_jobs.schemas import (
    HISTORY_ITEM_IDS,
    MAIN,
    ROW_CLICKS,
    TOP_POSITIONS,
    USER_HISTORIES,
    InputNotReady,
    OperatorError,
    resolution_of,
    scores_schema,
)
from feature_jobs.schemas import TRAINING_ROWS as ROWS_TABLE
from feature_jobs.store import documents, hashing
from feature_jobs.store.encoder_info import dimension_of, weight
from pipelines.config import Settings
from pipelines.planning.day_plan import NO_IDS, DayPlan
from pipelines.planning.items import PlannedFeatures
from pipelines.planning.made_with import history_settings, rows_settings
from pipelines.planning.snapshots import ItemNight, Nights, candidates
from pipelines.planning.yesterday import (
    IMPRESSIONS_PER_CLICK,
    Before,
    history_law,
    shards_of_log,
)
from pipelines.running import records
from pipelines.running.layout import job_of
from pipelines.running.stage import Planned, Stage
from pipelines.running.states import PUBLISHED, Look, made_in
from pipelines.stages import HISTORIES, SIMSCORE, TRAINING_ROWS

_USUAL_LENGTH = 50  # of a history; shards of much longer ones have fewer rows
_DAY_US = 86_400_000_000
_WITH_RESOLUTION = (
    "Ask for one of these, or leave the column out; `courier fit-codebook --clusters "
    "main=…,{label}=…` makes one that has it."
)

Ids = tuple[pa.DataType, pa.DataType]


# ---- HISTORIES -------------------------------------------------------------------------------


@dataclass(frozen=True)
class LogOfDay:
    """Holds what a job that walks through the log of days knows of one of them.

    `ids` are the types of user_id and item_id, None while no file has told them.
    """

    settings: Settings
    day: HistoryDay
    log: Source
    before: Before
    ids: Ids | None

    def inputs(self) -> dict[str, Any]:
        """Returns what the id of a run changes with that makes histories of each moment of it."""
        return {"impressions": self.log.identity(), **self.before.inputs()}


@dataclass(frozen=True)
class PlannedHistories(Planned):
    """Holds what HISTORIES must know of a day."""

    stage: Stage
    log: LogOfDay

    @property
    def id_types(self) -> Ids | None:
        return self.log.ids

    def continues(self, earlier: Planned) -> bool:
        return self.log.before.run_id == earlier.stage.run_id

    def came_in(self) -> dict[str, int]:
        return {"impressions": self.stage.input_rows}

    @classmethod
    def wire(cls, root: Any, days: Sequence["PlannedHistories"], folder: str) -> None:
        shards = [day.stage.shards for day in days]
        logs = [*days[0].log.before.log, *(day.log.log for day in days)]
        job = histories_job([day.log for day in days], shards, folder)
        define_histories(root, logs, job, shards, [made_in(day.stage.staging) for day in days])


def plan_histories(day: DayPlan) -> PlannedHistories:
    _check_shared(day)
    return day.settled(HISTORIES, day.befores(), partial(_plan_histories, day))


def _plan_histories(day: DayPlan, before: Before) -> PlannedHistories:
    settings, log = day.settings, day.shop.impressions(day.ds)
    log_rows = {**before.log_rows, str(day.ds): log.rows}
    stage = day.stage(
        HISTORIES,
        shards=shards_of_log(log_rows, settings.rows_per_shard),
        inputs={"impressions": log.identity(), **before.inputs(), "log_rows": log_rows},
        identities={},
        settings=history_settings(settings),
        before=before.tables,
        input_rows=log.rows,
        notes={"days_without_log": list(before.missing)},
    )
    known = LogOfDay(settings, day.history_day(), log, before, day.history_ids(before.ids))
    return PlannedHistories(stage, known)


def histories_job(days: Sequence[LogOfDay], shards: Sequence[int], staging: str) -> HistoriesJob:
    """Returns the job that makes histories of consecutive days, or walks through them."""
    settings, before = days[0].settings, days[0].before
    user_id, item_id = days[-1].ids or NO_IDS  # the last day knows most
    state = tuple(partition.slim() for partition in before.partitions())
    return HistoriesJob(
        history_law(settings),
        tuple(day.day for day in days),
        state,
        max(*shards, before.shards(state, settings.rows_per_shard)),
        user_id,
        item_id,
        settings.day_timezone,
        staging,
    )


def _check_shared(day: DayPlan) -> None:
    """Refuses to replace histories that another feature set made under another law."""
    settings, look, layout = day.settings, day.range.look, day.settings.layout
    for other in layout.beside():
        record = records.read_night(other, day.ds) or {"tables": {}}
        entry = record["tables"].get(USER_HISTORIES.name)
        theirs = entry and look.published(layout.folder(USER_HISTORIES, day.ds))
        if not theirs or theirs.manifest["version"] != entry["version"]:
            continue
        made_with = theirs.manifest["settings"]
        if made_with != history_settings(settings):
            raise OperatorError(
                f"The feature set {other.feature_set!r} below {settings.root} made user_histories "
                f"of ds {day.ds} with {made_with}, which differs from these settings. The table is "
                "shared, so that each set would undo the other's night. Use the same settings, or "
                "another root."
            )


# ---- SIMSCORE --------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlannedScores(Planned):
    """Holds what SIMSCORE must know of a day.

    `has_history` tells that its impressions come with their histories, `embeddings_by` how
    embeddings reach them; `nights` are those whose items they are scored with.
    """

    stage: Stage
    log: LogOfDay
    has_history: bool
    embeddings_by: str
    nights: Nights
    schema: pa.Schema

    @property
    def no_rows(self) -> pa.Table:
        """Returns the impressions of a log without a file: an empty table."""
        return self.schema.empty_table().select(IMPRESSION_COLUMNS)

    @property
    def copied_bytes(self) -> int:
        """Returns about how many bytes a worker's copy of the largest of its nights takes."""
        return max((night.copied_bytes for night in self.nights), default=0)

    def as_worker_knows_it(self, look: Look, folder: str) -> SimscoreDay:
        """Returns the day as the workers of the job of a `folder` know it.

        All that it is scored with is made by then; raises InputNotReady where it is not.
        """
        settings = self.log.settings
        nights = tuple(_as_worker_knows_it(night, settings, look, folder) for night in self.nights)
        return SimscoreDay(
            self.log.day, self.has_history, nights, self.stage.shards, self.schema,
            made_in(self.stage.staging),
        )  # fmt: skip

    @classmethod
    def wire(cls, root: Any, days: Sequence["PlannedScores"], folder: str) -> None:
        look, logs, log = Look(), [day.log for day in days], list[Source]()
        histories = None
        if not all(day.has_history or not day.log.log.rows for day in days):
            histories = histories_job(logs, [day.stage.shards for day in days], folder)
            log = [*logs[0].before.log, *(one.log for one in logs)]
        known = tuple(day.as_worker_knows_it(look, job_of(folder)) for day in days)
        by = SHUFFLE if SHUFFLE in {day.embeddings_by for day in days} else BROADCAST
        form = score_form(logs[0].settings)
        job = SimscoreJob(known, histories, form, by, folder)
        define_simscore(root, [one.log for one in logs], log, job)

    def copies(self, folder: str) -> list[str]:
        nights = self.as_worker_knows_it(Look(), job_of(folder)).nights
        return [one.broadcast_key for one in nights]


def _as_worker_knows_it(
    night: ItemNight, settings: Settings, look: Look, folder: str
) -> ItemSnapshot:
    features, embeddings = look.open(night.features), look.open(night.embeddings)
    before = look.find(night.compared) if night.compared else None
    is_other = before is not None and _are_of_two_lineages(features.manifest, before.manifest)
    made = [one and one.version for one in (features, embeddings, before)]
    return ItemSnapshot(
        night.snapshot,
        ItemTables(
            features.slim(),
            embeddings.slim(),
            before and before.slim(),
            is_other,
            dimension_of(embeddings.manifest["settings"]),
            score_form(settings).labels,
            settings.simscore.embedding_dtype,
        ),
        documents.digest([made, folder])[:16],  # days of the job share it, and no other job does
        **features.manifest["identities"],
    )


def _are_of_two_lineages(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Returns whether neither codebook of two `item_features` is an ancestor of the other."""
    lineages = [
        (m["identities"]["codebook_id"], *m["settings"].get("ancestors", ())) for m in (one, other)
    ]
    return all(mine[0] not in theirs for mine, theirs in permutations(lineages))


def score_form(settings: Settings) -> ScoreForm:
    """Returns what the settings ask to be made of scores."""
    asked = settings.simscore
    columns = tuple(sorted(set(asked.columns)))
    return ScoreForm(settings.history_len, columns, asked.tiers, asked.top_k)


def score_settings(settings: Settings) -> dict[str, Any]:
    """Returns what manifests say of the form of scores.

    What nobody asked for is not said: days that were made before one could ask stay as they are.
    """
    asked, columns = settings.simscore, sorted(set(settings.simscore.columns) - {HISTORY_ITEM_IDS})
    said = {
        "columns": (columns, []),
        "tiers": (asked.tiers, "courier"),
        "top_k": (asked.top_k if TOP_POSITIONS in columns else None, None),
        "embedding_dtype": (asked.embedding_dtype, "float32"),
    }
    return {
        "history_item_ids": HISTORY_ITEM_IDS in asked.columns,
        **{name: value for name, (value, otherwise) in said.items() if value != otherwise},
    }


def _check_labels(
    form: ScoreForm, codebook: str, labels: Collection[str], remedy: str = _WITH_RESOLUTION
) -> None:
    """Raises OperatorError where a column on request is of a resolution that is not there.

    What is said of it names the `codebook`, and ends with the `remedy`.
    """
    known = [label for label in labels if label != MAIN]
    for column in form.columns:
        label = resolution_of(column)
        if label is None or label in labels:
            continue
        prefix = column.removesuffix(label)
        near = difflib.get_close_matches(label, known, n=1)
        hint = f"Did you mean {prefix + near[0]!r}? The" if near else "The"
        raise OperatorError(
            f"[simscore] columns asks for {column!r}, but {codebook} has no resolution {label!r}, "
            f"and the column would have no cluster IDs to show. {hint} codebook has "
            f"{', '.join(known) or 'none'} beside main. {remedy.format(label=label)}"
        )


def _check_labels_of_nights(day: DayPlan, nights: Nights, known_from_us: int) -> None:
    """Raises OperatorError where a night lacks a resolution, with the day from which on none does.

    `known_from_us` is the earliest moment of which an impression of `day` may come.
    """
    for night in nights:
        if night.is_gone:
            continue
        lacking = night.snapshot
        days_until = -((known_from_us - lacking.from_us) // _DAY_US - 1)  # the next night is enough
        first = day.ds + dt.timedelta(days=days_until)
        _check_labels(
            score_form(day.settings),
            f"the night of ds {lacking.ds}, of codebook {night.codebook_id}, which impressions of "
            f"ds {day.ds} may know,",
            night.labels,
            f"Ask for the column from ds {first} on, where nights after ds {lacking.ds} are of a "
            "codebook with {label!r}: impressions of that day know no older ones. Until then ask "
            "for one of these, or leave the column out.",
        )


def plan_simscore(
    day: DayPlan, histories: PlannedHistories, embedded: Planned | None = None,
    features: PlannedFeatures | None = None,
) -> PlannedScores:  # fmt: skip
    """Plans the scores of ds by its own items, or where these are not given of nights before it."""
    if embedded and features:
        codebook = day.pinned.codebook
        pinned = f"the pinned codebook {codebook.codebook_id}"
        _check_labels(score_form(day.settings), pinned, codebook.labels)
        return _plan_scores(
            day, histories, (_night_of_ds(embedded, features),),
            inputs={"item_features": features.stage.run_id},
            upstream=(embedded.stage, features.stage),
            identities=day.pinned.identities(),
        )  # fmt: skip
    known_from_us = histories.log.day.known_from_us(history_law(day.settings))
    nights = candidates(day.settings, day.ds, known_from_us, day.yesterdays)
    return day.as_published(SIMSCORE, nights, partial(_plan_by_nights, day, histories))


def _night_of_ds(embedded: Planned, features: PlannedFeatures) -> ItemNight:
    (own,), embeddings = features.stage.references(), embedded.stage.references()[0]
    before = features.compared_with
    return ItemNight(
        always(features.stage.ds), own, embeddings, {}, before.tables[0] if before else None,
        broadcast_bytes(embedded.stage.input_rows, dimension_of(embedded.stage.settings)),
    )  # fmt: skip


def _plan_by_nights(day: DayPlan, histories: PlannedHistories, nights: Nights) -> PlannedScores:
    settings = day.settings
    known_from_us = histories.log.day.known_from_us(history_law(settings))
    _check_labels_of_nights(day, nights, known_from_us)
    return _plan_scores(
        day, histories, nights,
        {
            "features_from": settings.simscore.features_from,
            "availability_delay_hours": settings.availability_delay_hours,
        },
        inputs={"snapshots": [night.as_input() for night in nights]},
        snapshots=tuple(table for night in nights for table in night.tables),
        identities={},  # each row has those of its night
    )  # fmt: skip


def _plan_scores(
    day: DayPlan, histories: PlannedHistories, nights: Nights,
    said: Mapping[str, Any] = MappingProxyType({}), *, inputs: Mapping[str, Any], **fields: Any,
) -> PlannedScores:  # fmt: skip
    """Plans scores by `nights`, of which the stage has `inputs` and `fields`, its settings `said`.

    Raises InputNotReady where they are to be made of histories that are gone.
    """
    settings, log = day.settings, histories.log
    has_history = "history" in log.log.form.columns
    if has_history:
        log = replace(log, ids=(day.shop.user_id_type(NO_IDS[0]), day.item_id_type()))
    user_id, item_id = log.ids or NO_IDS
    form = score_form(settings)
    schema = scores_schema(
        item_id,
        user_id,
        log.log.impression_id or pa.string(),
        form.columns,
        form.tiers,
        log.log.carried,
        by_night=bool(said),
    )
    stage = day.stage(
        SIMSCORE,
        shards=hashing.num_shards(
            log.log.rows
            * max(1, settings.history_len // _USUAL_LENGTH)
            * weight(day.pinned.encoder.dimension),
            settings.rows_per_shard,
        ),
        inputs={
            "impressions": log.log.identity(),
            **({} if has_history else log.before.inputs()),
            **inputs,
        },
        before=() if has_history else log.before.tables,
        settings={**history_settings(settings), **score_settings(settings), **said},
        input_rows=log.log.rows,
        notes={
            "logged_histories": has_history,
            "days_without_log": [] if has_history else list(log.before.missing),
        },
        **fields,
    )
    if log.before.is_gone and not has_history:
        _refuse_if_to_be_made(day, stage)
    by = embeddings_by(day, max((night.copied_bytes for night in nights), default=0), len(nights))
    return PlannedScores(stage, log, has_history, by, nights, schema)


def _refuse_if_to_be_made(day: DayPlan, stage: Stage) -> None:
    """Raises InputNotReady for scores that are to be made of histories that are gone."""
    state = day.range.look.state(stage)
    if state.name == PUBLISHED and not stage.forced:
        return
    raise InputNotReady(
        f"The scores of ds {stage.ds} are to be made again ({'; '.join(state.why)}), of the "
        "histories of the day before, which were pruned. Run `courier simscore --ds "
        f"{stage.ds} --from-log`, which reads the log of the window in their place, or leave the "
        "day as it is."
    )


def embeddings_by(day: DayPlan, copied_bytes: int, nights: int = 1) -> str:
    """Chooses how embeddings reach impressions, of which copies of each night take so many bytes.

    Of several days in one job each day adds a copy of its own.
    """
    asked = day.options.embeddings_by or day.settings.simscore.embeddings_by
    if asked != "auto":
        return asked
    limit = day.settings.simscore.broadcast_limit_gb * 1e9
    copies = day.range.days + nights - 1
    return BROADCAST if copied_bytes * copies <= limit else SHUFFLE


# ---- TRAINING-ROWS ---------------------------------------------------------------------------


@dataclass(frozen=True)
class PlannedRows(Planned):
    """Holds what TRAINING-ROWS must know of a day: its log, and the catalogues of the same days."""

    stage: Stage
    settings: Settings
    day: HistoryDay
    log: tuple[Source, ...]
    catalogues: tuple[Source, ...]
    schema: pa.Schema

    def came_in(self) -> dict[str, int]:
        return {"catalogue_items": sum(source.rows for source in self.catalogues)}

    @classmethod
    def wire(cls, root: Any, days: Sequence["PlannedRows"], folder: str) -> None:
        settings = days[0].settings
        job = TrainingRowsJob(
            law=replace(history_law(settings), history_len=ROW_CLICKS, keep_repeats=False),
            gap_us=round(settings.training.request_gap_seconds * 1_000_000),
            day_timezone=settings.day_timezone,
            categories=_scope(settings),
            days=tuple(day._as_worker_knows_it() for day in days),
            staging=folder,
        )
        logs = {source.form.ds: source for day in days for source in day.log}
        catalogues = {source.form.ds: source for day in days for source in day.catalogues}
        define_training_rows(root, list(logs.values()), list(catalogues.values()), job)

    def _as_worker_knows_it(self) -> TrainingRowsDay:
        return TrainingRowsDay(
            self.stage.ds,
            self.day.end_us,
            self.stage.shards,
            self.schema,
            log=_days_of(self.log),
            catalogues=_days_of(self.catalogues),
            staging=made_in(self.stage.staging),
        )


def _days_of(sources: Sequence[Source]) -> tuple[dt.date, ...]:
    return tuple(source.form.ds for source in sources)


def _scope(settings: Settings) -> tuple[str, ...] | None:
    """Returns the categories in scope, None for all."""
    return tuple(sorted(set(settings.training.categories))) or None


def plan_training_rows(day: DayPlan) -> PlannedRows:
    settings, impressions = day.settings, day.shop.impressions(day.ds)
    log, missing = day.shop.log
    categories = _scope(settings)
    if categories:
        day.shop.check_categories(categories)
    catalogues = day.shop.catalogues() if categories else []
    # What meets in a shard: impressions, the clicks of all days, the catalogues of all days.
    rows = max(
        impressions.rows,
        sum(source.rows for source in log) // IMPRESSIONS_PER_CLICK,
        sum(source.rows for source in catalogues),
    )
    schema = ROWS_TABLE.schema(
        day.item_id_type(),
        day.shop.user_id_type(pa.int64()),
        request_id=impressions.request_id or pa.string(),
    )
    stage = day.stage(
        TRAINING_ROWS,
        shards=hashing.num_shards(rows, settings.rows_per_shard),
        inputs={
            "log": [source.identity() for source in log],
            "catalogues": [source.identity() for source in catalogues],
        },
        identities={},
        settings=rows_settings(settings),
        input_rows=impressions.rows,
        notes={
            "days_without_log": missing,
            "one_snapshot_for_all_days": bool(catalogues) and day.shop.has_one_catalogue,
        },
    )
    return PlannedRows(stage, settings, day.history_day(), tuple(log), tuple(catalogues), schema)
