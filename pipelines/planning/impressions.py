"""Plans HISTORIES, SIMSCORE and TRAINING-ROWS: what is made of the impressions of ds.

Histories and SimScores of several days in a row are one job: the stage of the first day defines it
for all, and each stage's `part` says what is its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyarrow as pa

from feature_jobs.impressions.histories import HistoriesJob, HistoryDay, define_histories
from feature_jobs.impressions.simscore import (
    BROADCAST,
    SHUFFLE,
    SimscoreDay,
    SimscoreJob,
    define_simscore,
)
from feature_jobs.impressions.training_rows import (
    TrainingRowsDay,
    TrainingRowsJob,
    define_training_rows,
)
from feature_jobs.inputs import IMPRESSION_COLUMNS, Source
from feature_jobs.items.item_vectors import ItemTables, broadcast_bytes
from feature_jobs.schemas import (
    ITEM_EMBEDDINGS,
    ITEM_FEATURES,
    ROW_CLICKS,
    TRAINING_ROWS,
    USER_HISTORIES,
    USER_SIMSCORES,
    OperatorError,
)
from feature_jobs.store import broadcast, documents, hashing, partitions
from pipelines.planning.day_plan import NO_IDS, DayPlan
from pipelines.planning.items import churn_note
from pipelines.planning.yesterday import (
    IMPRESSIONS_PER_CLICK,
    STATE,
    click_settings,
    history_law,
    history_settings,
    shards_of_log,
)
from pipelines.running import layout, records
from pipelines.running.stage import Stage

_USUAL_LENGTH = 50  # of a history; shards of much longer ones have fewer rows


# ---- HISTORIES -------------------------------------------------------------------------------


@dataclass(frozen=True)
class LogOfDay:
    """Holds what a job of several days knows of one of them.

    `ids` are the types of user_id and item_id, None while no file has told them.
    """

    day: HistoryDay
    log: Source
    ids: tuple[pa.DataType, pa.DataType] | None


def plan_histories(day: DayPlan, made: dict[str, Stage]) -> Stage:
    settings, before = day.settings, day.before
    log = day.shop.impressions(day.ds)
    log_rows = {**before.log_rows, str(day.ds): log.rows}
    _check_shared(day)

    def define(root: Any, stages: Sequence[Stage]) -> None:
        shards = [stage.shards for stage in stages]
        logs = [*before.log, *(stage.part.log for stage in stages)]
        job = histories_job(day, [stage.part for stage in stages], shards, stages[0].staging)
        define_histories(root, logs, job, shards, [stage.staging for stage in stages])

    return day.stage(
        "histories",
        define,
        tables=STATE,
        shards=shards_of_log(log_rows, settings.rows_per_shard),
        inputs={"impressions": log.identity(), **before.inputs(), "log_rows": log_rows},
        identities={},
        settings=history_settings(settings),
        input_rows=log.rows,
        notes={"days_without_log": list(before.missing)},
        part=LogOfDay(day.history_day(), log, day.history_ids()),
    )


def histories_job(
    day: DayPlan, parts: Sequence[LogOfDay], shards: Sequence[int], staging: str
) -> HistoriesJob:
    """Returns the job that makes histories of the days of `parts`, of which `day` is the first."""
    settings, before = day.settings, day.before
    user_id, item_id = parts[-1].ids or NO_IDS  # the last day knows most
    state = tuple(partition.slim() for partition in before.partitions())
    return HistoriesJob(
        history_law(settings),
        tuple(part.day for part in parts),
        state,
        max(*shards, before.shards(state, settings.rows_per_shard)),
        user_id,
        item_id,
        settings.day_timezone,
        staging,
    )


def _check_shared(day: DayPlan) -> None:
    """Refuses to replace histories that another feature set made under another law."""
    settings = day.settings
    for other in layout.feature_sets(settings.root):
        record = records.read_night(settings.root, other, day.ds) or {"tables": {}}
        entry = record["tables"].get(USER_HISTORIES.name)
        folder = layout.table_folder(settings.root, other, USER_HISTORIES, day.ds)
        if other == settings.feature_set or not entry or not partitions.is_published(folder):
            continue
        theirs = partitions.open_published(folder).manifest
        if theirs["version"] == entry["version"] and theirs["settings"] != history_settings(
            settings
        ):
            raise OperatorError(
                f"The feature set {other!r} below {settings.root} made user_histories of ds "
                f"{day.ds} with {theirs['settings']}, which differs from these settings. The "
                "table is shared, so that each set would undo the other's night. Use the same "
                "settings, or another root."
            )


# ---- SIMSCORE --------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScoresOfDay(LogOfDay):
    """Holds what a SIMSCORE job of several days knows of one of them.

    `has_history` tells that its impressions come with their histories, `embeddings_by` how
    embeddings reach them.
    """

    has_history: bool
    embeddings_by: str
    previous_features: partitions.Partition | None
    of_another_lineage: bool
    schema: pa.Schema

    @property
    def no_rows(self) -> pa.Table:
        """Returns the impressions of a log without a file: an empty table."""
        return self.schema.empty_table().select(IMPRESSION_COLUMNS)

    def of(self, stage: Stage) -> SimscoreDay:
        """Returns the day as the workers know it, once everything upstream is made."""
        embedded, features = stage.upstream
        found = features.partition(ITEM_FEATURES), embedded.partition(ITEM_EMBEDDINGS)
        key = documents.digest([[p.manifest for p in found], stage.staging])[:16]
        previous = self.previous_features and self.previous_features.slim()
        items = ItemTables(found[0].slim(), found[1].slim(), previous, self.of_another_lineage)
        return SimscoreDay(
            self.day, self.has_history, items, key, stage.shards, self.schema, **stage.identities,
            staging=stage.staging,
        )  # fmt: skip


def plan_simscore(day: DayPlan, made: dict[str, Stage]) -> Stage:
    settings, impressions = day.settings, day.shop.impressions(day.ds)
    has_history = "history" in impressions.form.columns
    optional = [] if settings.simscore.history_item_ids else ["history_item_ids"]
    ids = _ids(day, has_history)
    user_id, item_id = ids or NO_IDS
    schema = USER_SIMSCORES.schema(
        item_id,
        user_id,
        impressions.impression_id or pa.string(),
        extra=impressions.carried,
        without=optional,
    )
    part = ScoresOfDay(
        day.history_day(), impressions, ids, has_history,
        _embeddings_by(day, made["embed"].input_rows), day.previous_features,
        day.of_another_lineage, schema,
    )  # fmt: skip
    return day.stage(
        "simscore",
        partial(_define_simscore, day),
        tables=(USER_SIMSCORES,),
        shards=hashing.num_shards(
            impressions.rows * max(1, settings.history_len // _USUAL_LENGTH),
            settings.rows_per_shard,
        ),
        inputs={
            "impressions": impressions.identity(),
            **({} if has_history else day.before.inputs()),
            "item_features": made["item-features"].run_id,
        },
        upstream=(made["embed"], made["item-features"]),
        identities=day.pinned.identities(),
        settings={
            **history_settings(settings),
            "history_item_ids": settings.simscore.history_item_ids,
        },
        input_rows=impressions.rows,
        notes={
            "logged_histories": has_history,
            "days_without_log": [] if has_history else list(day.before.missing),
            **churn_note(day),
        },
        clean=lambda stage: broadcast.discard(stage.part.of(stage).broadcast_key),
        part=part,
    )


def _ids(day: DayPlan, has_history: bool) -> tuple[pa.DataType, pa.DataType] | None:
    """Returns the types of user_id and item_id, None while no file has told them.

    The state of the day before has a say where it is read.
    """
    if has_history:
        return day.shop.user_id_type(NO_IDS[0]), day.item_id_type()
    return day.history_ids()


def _embeddings_by(day: DayPlan, items: int) -> str:
    """Chooses how the embeddings of so many items reach the impressions.

    Of several days in one job each day has a copy of its own.
    """
    asked = day.options.embeddings_by or day.settings.simscore.embeddings_by
    if asked != "auto":
        return asked
    fits = broadcast_bytes(items) * day.together <= day.settings.simscore.broadcast_limit_gb * 1e9
    return BROADCAST if fits else SHUFFLE


def _define_simscore(day: DayPlan, root: Any, stages: Sequence[Stage]) -> None:
    """Defines the job that scores the days of `stages`, of which `day` is the first."""
    parts = [stage.part for stage in stages]
    days = tuple(part.of(stage) for part, stage in zip(parts, stages, strict=True))
    staging, shards = stages[0].staging, [stage.shards for stage in stages]
    histories, log = None, []
    if not all(part.has_history or not part.log.rows for part in parts):
        histories = histories_job(day, parts, shards, staging)
        log = [*day.before.log, *(part.log for part in parts)]
    by = SHUFFLE if SHUFFLE in {part.embeddings_by for part in parts} else BROADCAST
    job = SimscoreJob(days, histories, day.settings.history_len, by, staging)
    define_simscore(root, [part.log for part in parts], log, job)


# ---- TRAINING-ROWS ---------------------------------------------------------------------------


def plan_training_rows(day: DayPlan, made: dict[str, Stage]) -> Stage:
    settings, impressions = day.settings, day.shop.impressions(day.ds)
    log, missing = day.shop.log
    categories = tuple(sorted(set(settings.training.categories))) or None
    if categories:
        day.shop.check_categories(categories)
    catalogues = day.shop.catalogues() if categories else []
    # What meets in a shard: impressions, the clicks of all days, the catalogues of all days.
    rows = max(
        impressions.rows,
        sum(source.rows for source in log) // IMPRESSIONS_PER_CLICK,
        sum(source.rows for source in catalogues),
    )
    shards = hashing.num_shards(rows, settings.rows_per_shard)
    schema = TRAINING_ROWS.schema(
        day.item_id_type(),
        day.shop.user_id_type(pa.int64()),
        request_id=impressions.request_id or pa.string(),
    )

    def define(root: Any, stages: Sequence[Stage]) -> None:
        (stage,) = stages
        one = TrainingRowsDay(
            day.ds, day.history_day().end_us, shards, schema,
            tuple(source.form.ds for source in log),
            tuple(source.form.ds for source in catalogues), stage.staging,
        )  # fmt: skip
        law = replace(history_law(settings), history_len=ROW_CLICKS, keep_repeats=False)
        gap_us = round(settings.training.request_gap_seconds * 1_000_000)
        job = TrainingRowsJob(law, gap_us, settings.day_timezone, categories, (one,), stage.staging)
        define_training_rows(root, log, catalogues, job)

    return day.stage(
        "training-rows",
        define,
        tables=(TRAINING_ROWS,),
        shards=shards,
        inputs={
            "log": [source.identity() for source in log],
            "catalogues": [source.identity() for source in catalogues],
        },
        identities={},
        settings={
            **click_settings(settings),
            "categories": categories,
            "request_gap_seconds": settings.training.request_gap_seconds,
        },
        input_rows=impressions.rows,
        notes={
            "days_without_log": missing,
            "one_snapshot_for_all_days": bool(catalogues) and day.shop.has_one_catalogue,
        },
    )
