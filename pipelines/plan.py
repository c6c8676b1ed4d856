"""What a night, or a stage outside it, will do, found out before any of it is done.

Settings, artefacts and inputs are opened and checked here, by footers and manifests alone. Each
stage then knows all that it depends on, and with that its `run_id`.
"""

import datetime as dt
import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyarrow as pa

from courier_model.images import Preprocessing
from feature_jobs import broadcast, embed, hashing, inputs, tables
from feature_jobs import codebook as codebooks
from feature_jobs.histories import DAY_US, HistoryLaw, define_user_histories
from feature_jobs.item_features import FeaturesJob, define_item_features, read_clusters
from feature_jobs.schemas import (
    ITEM_EMBEDDINGS,
    ITEM_FEATURES,
    ITEM_REJECTS,
    MAIN,
    ROW_CLICKS,
    TRAINING_ROWS,
    USER_HISTORIES,
    USER_SIMSCORES,
    DataContractError,
    OperatorError,
    cluster_field,
)
from feature_jobs.simscore import SimscoreJob, define_simscore
from feature_jobs.training_rows import TrainingRowsJob, define_training_rows
from pipelines import runs
from pipelines.config import STAGES, Settings
from pipelines.pinned import PinnedArtefacts
from pipelines.runs import Stage
from pipelines.shop_tables import ShopTables

_IMPRESSIONS_PER_CLICK = 8  # at least, as a rule: it only sizes the shards
_UPSTREAM = {  # in the order in which they are made
    "embed": (),
    "item-features": ("embed",),
    "histories": (),
    "simscore": ("embed", "item-features"),
    "training-rows": (),
}
CHUNK_FOLDER = "chunks-"  # + digest: beside the folders of runs, the chunk files that they share
_WITHOUT_PIN = {"histories", "training-rows"}


@dataclass(frozen=True)
class NightOptions:
    """What an operator says of one night. `allow_overlap` lets an encoder or codebook be used that
    was made from ds or later days, `allow_churn` publishes however many items changed their
    cluster, `full` embeds every image as if there had been no day before."""

    allow_overlap: bool = False
    allow_churn: bool = False
    full: bool = False


@dataclass(frozen=True)
class Night:
    """The stages of one ds that were asked for, in order, and those they read from."""

    settings: Settings
    ds: dt.date
    stages: tuple[Stage, ...]
    upstream: tuple[Stage, ...]

    @property
    def is_whole(self) -> bool:
        return {stage.name for stage in self.stages} == set(STAGES)

    @property
    def run_id(self) -> str:
        return tables.digest([stage.run_id for stage in self.stages])[:12]


# ---- Planning ------------------------------------------------------------------------------


def plan_night(
    settings: Settings,
    ds: dt.date,
    wanted: Sequence[str] = STAGES,
    say: Callable[[str], None] = lambda _: None,
    options: NightOptions = NightOptions(),
) -> Night:
    """Checks settings, artefacts and inputs for the `wanted` stages of ds, and plans them.

    Raises OperatorError, DataContractError or InputNotReady.
    """
    if options.allow_churn:
        settings = settings.allowing_churn()
    needed = [s for s in _UPSTREAM if s in wanted or any(s in _UPSTREAM[w] for w in wanted)]
    planner = _Planner(settings, ds, say, options)
    planner.open_inputs(needed)
    made: dict[str, Stage] = {}
    for name in needed:
        made[name] = planner.plan(name, made)
    return Night(
        settings,
        ds,
        stages=tuple(made[name] for name in needed if name in wanted),
        upstream=tuple(made[name] for name in needed if name not in wanted),
    )


class _Planner:
    """The checked inputs and artefacts of one ds, and what each stage makes of them."""

    def __init__(
        self,
        settings: Settings,
        ds: dt.date,
        say: Callable[[str], None],
        options: NightOptions,
    ):
        self.settings, self.ds, self.options = settings, ds, options
        self.shop = ShopTables(settings, ds, say)
        self.pinned = PinnedArtefacts(settings, ds, options.allow_overlap)

    def open_inputs(self, needed: Sequence[str]) -> None:
        """Opens pin and tables of ds; raises DataContractError where IDs are of two types."""
        if set(needed) - _WITHOUT_PIN:
            # a pin that does not hold is told before an input that is missing
            _ = self.pinned.encoder
        if "embed" in needed:
            self.shop.catalogue(self.ds)
        if {"histories", "simscore", "training-rows"} & set(needed):
            self.shop.impressions(self.ds)
            self.shop.user_id_type()
        self._item_id_type()

    def plan(self, name: str, made: dict[str, Stage]) -> Stage:
        plans = {
            "embed": self._embed,
            "item-features": self._item_features,
            "histories": self._histories,
            "simscore": self._simscore,
            "training-rows": self._training_rows,
        }
        return plans[name](made)

    def _stage(self, name: str, define: Callable[[Any, str], None], **fields: Any) -> Stage:
        settings = self.settings
        return Stage(name, self.ds, settings.root, settings.feature_set, define=define, **fields)

    # -- EMBED --

    def _embed(self, made: dict[str, Stage]) -> Stage:
        settings, catalogue = self.settings, self.shop.catalogue(self.ds)
        before, rejects = self._day_before or (None, None)
        item_id = self._same_item_id_type(before)
        made_by = before.manifest["identities"]["encoder_id"] if before else None
        roots = list(settings.catalogue.image_roots)
        shards = hashing.num_shards(catalogue.rows, settings.rows_per_shard)
        chunks = self._chunk_folder(item_id, shards)
        job = partial(
            embed.EmbedJob,
            ds=self.ds,
            shards=shards,
            embeddings_schema=ITEM_EMBEDDINGS.schema(item_id),
            rejects_schema=ITEM_REJECTS.schema(item_id),
            encoder_folder=self.pinned.pin.encoder,
            preprocessing=Preprocessing.from_dict(self.pinned.encoder.preprocessing),
            device=settings.embed.device,
            image_roots=settings.catalogue.image_roots,
            batch_size=settings.embed.batch_size,
            chunk_items=settings.embed.chunk_items,
            window_days=settings.window_days,
            previous_embeddings=before,
            previous_rejects=rejects,
            reuse=made_by == self.pinned.encoder.encoder_id,
            full=self.options.full,
            same_roots=before is not None and before.manifest["settings"]["image_roots"] == roots,
        )

        def define(root: Any, staging: str) -> None:
            folder = os.path.join(os.path.dirname(staging), chunks)
            embed.define_embed(root, catalogue, job(staging=staging, chunks=folder))

        return self._stage(
            "embed",
            define,
            tables=(ITEM_EMBEDDINGS, ITEM_REJECTS),
            shards=shards,
            inputs={
                "catalogue": catalogue.identity(),
                "previous": [p.manifest["version"] for p in (before, rejects) if p],
            },
            identities={"encoder_id": self.pinned.encoder.encoder_id},
            settings={
                "image_roots": roots,
                "batch_size": settings.embed.batch_size,
                "window_days": settings.window_days,
            },
            input_rows=catalogue.rows,
            forced=self.options.full,
            notes={
                **({"full": True} if self.options.full else {}),
                "one_snapshot_for_all_days": self.shop.has_one_catalogue,
                **self.pinned.overlap("encoder", self.pinned.encoder.data_end_ds),
            },
        )

    def _same_item_id_type(self, before: tables.Partition | None) -> pa.DataType:
        """Today's type of item_id; raises DataContractError where it was another one `before`."""
        item_id = self._item_id_type()
        if before and before.schema.field("item_id").type != item_id:
            raise DataContractError(
                f"item_id is {item_id} in the tables of ds {self.ds} but was "
                f"{before.schema.field('item_id').type} in {before.folder}. No item would be found "
                "again. Cast item_id back where it is written, or start a new feature_set."
            )
        return item_id

    def _chunk_folder(self, item_id: pa.DataType, shards: int) -> str:
        """Name of the folder of chunk files, shared by all runs of ds that would embed alike."""
        settings = self.settings
        embedding = [
            self.pinned.encoder.encoder_id,
            settings.embed.batch_size,
            runs.PACKAGE_VERSIONS,
        ]
        layout = [str(item_id), shards, list(settings.catalogue.image_roots), self.options.full]
        return CHUNK_FOLDER + tables.digest([embedding, layout])[:12]

    # -- ITEM-FEATURES --

    def _item_features(self, made: dict[str, Stage]) -> Stage:
        settings, upstream, codebook = self.settings, made["embed"], self.pinned.codebook
        labels = [label for label in codebook.labels if label != MAIN]
        wanted = {
            "embedding": settings.item_features.vector,
            "second_distance": settings.item_features.second_distance,
        }
        schema = ITEM_FEATURES.schema(
            self._item_id_type(),
            extra=[cluster_field(label) for label in labels],
            without=[name for name, asked in wanted.items() if not asked],
        )
        folder = str(self.pinned.pin.codebook)
        before = self._previous_features

        def define(root: Any, staging: str) -> None:
            job = FeaturesJob(
                upstream.partition(ITEM_EMBEDDINGS), upstream.partition(ITEM_REJECTS), folder,
                self.pinned.encoder.categories, schema, before, self._of_another_lineage, staging,
            )  # fmt: skip
            define_item_features(root, job)

        return self._stage(
            "item-features",
            define,
            tables=(ITEM_FEATURES,),
            shards=upstream.shards,
            inputs={
                "embed": upstream.run_id,
                "previous": before.manifest["version"] if before else None,
            },
            upstream=(upstream,),
            identities=self.pinned.identities(),
            settings={
                **wanted,
                "max_id": {r.label: r.max_id for r in codebook.resolutions},
                "ancestors": codebook.ancestors,
                "categories": self.pinned.encoder.categories,
            },
            notes={
                **self.pinned.overlap("codebook", codebook.data_end_ds),
                **self._churn_note(),
            },
            clean=lambda _: codebooks.discard_copy(codebook.codebook_id),
            summarise=lambda staging: {"clusters": read_clusters(staging, upstream.shards, folder)},
        )

    def _churn_note(self) -> dict[str, bool]:
        return {"churn_allowed": True} if self.options.allow_churn else {}

    @functools.cached_property
    def _previous_features(self) -> tables.Partition | None:
        """`item_features` of the newest day before ds that has them: cluster IDs are compared."""
        settings, wanted = self.settings, (ITEM_FEATURES,)
        found = runs.latest_before(settings.root, settings.feature_set, wanted, self.ds)
        return found[0] if found else None

    @property
    def _of_another_lineage(self) -> bool:
        """Whether neither codebook, of ds and of the day before, is an ancestor of the other: then
        even equal numbers mean nothing to each other."""
        if self._previous_features is None:
            return False
        manifest, codebook = self._previous_features.manifest, self.pinned.codebook
        before = manifest["identities"]["codebook_id"]
        return not (
            before in (codebook.codebook_id, *codebook.ancestors)
            or codebook.codebook_id in manifest["settings"].get("ancestors", ())
        )

    # -- HISTORIES --

    def _histories(self, made: dict[str, Stage]) -> Stage:
        log, missing = self.shop.log
        rows = sum(source.rows for source in log)
        shards = hashing.num_shards(rows // _IMPRESSIONS_PER_CLICK, self.settings.rows_per_shard)
        schema = USER_HISTORIES.schema(self._item_id_type(), self.shop.user_id_type())
        self._check_shared()

        return self._stage(
            "histories",
            lambda root, staging: define_user_histories(
                root, log, self._law(), self._end_us(), shards, schema, staging
            ),
            tables=(USER_HISTORIES,),
            shards=shards,
            inputs={"impressions": [source.identity() for source in log]},
            identities={},
            settings=self._history_settings(),
            input_rows=rows,
            notes={"days_without_log": missing},
        )

    # -- SIMSCORE --

    def _simscore(self, made: dict[str, Stage]) -> Stage:
        settings, impressions = self.settings, self.shop.impressions(self.ds)
        logged = "history" in impressions.form.columns
        unneeded = logged or not impressions.rows
        log, missing = ([], []) if unneeded else self.shop.log
        # Of impressions, and of the clicks of all days: these are a fraction of their rows.
        rows = max(impressions.rows, sum(day.rows for day in log) // _IMPRESSIONS_PER_CLICK)
        shards = hashing.num_shards(rows, settings.rows_per_shard)
        optional = [] if settings.simscore.history_item_ids else ["history_item_ids"]
        schema = USER_SIMSCORES.schema(
            self._item_id_type(),
            self.shop.user_id_type(),
            impressions.impression_id or pa.string(),
            extra=impressions.carried,
            without=optional,
        )
        features, embedded = made["item-features"], made["embed"]

        def job(staging: str) -> SimscoreJob:
            return SimscoreJob(
                features.partition(ITEM_FEATURES), embedded.partition(ITEM_EMBEDDINGS),
                self._previous_features, self._of_another_lineage,
                self._law(), self._end_us(), shards, schema,
                **self.pinned.identities(), staging=staging,
            )  # fmt: skip

        return self._stage(
            "simscore",
            lambda root, staging: define_simscore(root, impressions, log, job(staging)),
            tables=(USER_SIMSCORES,),
            shards=shards,
            inputs={
                "impressions": impressions.identity(),
                "log": [source.identity() for source in log],
                "item_features": features.run_id,
            },
            upstream=(embedded, features),
            identities=self.pinned.identities(),
            settings={
                **self._history_settings(),
                "history_item_ids": settings.simscore.history_item_ids,
            },
            input_rows=impressions.rows,
            notes={
                "logged_histories": logged,
                "days_without_log": missing,
                **self._churn_note(),
            },
            clean=lambda staging: broadcast.discard(job(staging).broadcast_key),
        )

    # -- TRAINING-ROWS --

    def _training_rows(self, made: dict[str, Stage]) -> Stage:
        settings, impressions = self.settings, self.shop.impressions(self.ds)
        log, missing = self.shop.log
        categories = tuple(sorted(set(settings.training.categories))) or None
        if categories:
            self.shop.check_categories(categories)
        catalogues = self.shop.catalogues() if categories else []
        # What meets in a shard: impressions, the clicks of all days, the catalogues of all days.
        rows = max(
            impressions.rows,
            sum(day.rows for day in log) // _IMPRESSIONS_PER_CLICK,
            sum(day.rows for day in catalogues),
        )
        shards = hashing.num_shards(rows, settings.rows_per_shard)
        schema = TRAINING_ROWS.schema(
            self._item_id_type(),
            self.shop.user_id_type(),
            request_id=impressions.request_id or pa.string(),
        )
        job = partial(
            TrainingRowsJob,
            law=replace(self._law(), history_len=ROW_CLICKS),
            gap_us=round(settings.training.request_gap_seconds * 1_000_000),
            end_us=self._end_us(),
            categories=categories,
            shards=shards,
            schema=schema,
        )
        return self._stage(
            "training-rows",
            lambda root, staging: define_training_rows(
                root, impressions, log, catalogues, job(staging=staging)
            ),
            tables=(TRAINING_ROWS,),
            shards=shards,
            inputs={
                "log": [source.identity() for source in log],
                "catalogues": [source.identity() for source in catalogues],
            },
            identities={},
            settings={
                **self._click_settings(),
                "categories": categories,
                "request_gap_seconds": settings.training.request_gap_seconds,
            },
            input_rows=impressions.rows,
            notes={
                "days_without_log": missing,
                "one_snapshot_for_all_days": bool(catalogues) and self.shop.has_one_catalogue,
            },
        )

    # -- What the stages share --

    @functools.cached_property
    def _day_before(self) -> tuple[tables.Partition, ...]:
        """Embeddings and rejects of the newest day before ds that has both; empty for none."""
        settings, wanted = self.settings, (ITEM_EMBEDDINGS, ITEM_REJECTS)
        return runs.latest_before(settings.root, settings.feature_set, wanted, self.ds)

    def _item_id_type(self) -> pa.DataType:
        """The shop's; on days without any file that of the day before, so that tables still fit."""
        before, _ = self._day_before or (None, None)
        otherwise = before.schema.field("item_id").type if before else pa.int64()
        return self.shop.item_id_type(otherwise)

    def _check_shared(self) -> None:
        """Refuses to replace histories that another feature set made under another law."""
        settings = self.settings
        for other in runs.feature_sets(settings.root):
            record = runs.read_night(settings.root, other, self.ds) or {"tables": {}}
            entry = record["tables"].get(USER_HISTORIES.name)
            folder = runs.table_folder(settings.root, other, USER_HISTORIES, self.ds)
            if other == settings.feature_set or not entry or not tables.is_published(folder):
                continue
            theirs = tables.open_published(folder).manifest
            if (
                theirs["version"] == entry["version"]
                and theirs["settings"] != self._history_settings()
            ):
                raise OperatorError(
                    f"The feature set {other!r} below {settings.root} made user_histories of ds "
                    f"{self.ds} with {theirs['settings']}, which differs from these settings. The "
                    "table is shared, so that each set would undo the other's night. Use the same "
                    "settings, or another root."
                )

    def _law(self) -> HistoryLaw:
        return HistoryLaw(
            self.settings.history_len,
            self.settings.window_days * DAY_US,
            round(self.settings.impressions.click_delay_seconds * 1_000_000),
        )

    def _history_settings(self) -> dict[str, Any]:
        return {"history_len": self.settings.history_len, **self._click_settings()}

    def _click_settings(self) -> dict[str, Any]:
        return {
            "window_days": self.settings.window_days,
            "click_delay_seconds": self.settings.impressions.click_delay_seconds,
            "day_timezone": self.settings.day_timezone,
        }

    def _end_us(self) -> int:
        return inputs.day_end(self.ds, self.settings.day_timezone)
