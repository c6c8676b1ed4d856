"""Plans EMBED and ITEM-FEATURES: what is made of the catalogue of ds.

Both jobs need torch, which takes seconds and most of a gigabyte to load: it is loaded by who runs
them, and not by who only reads what they made.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from feature_jobs.codebooks import codebook as codebooks
from feature_jobs.inputs import Source
from feature_jobs.items.vector_table import VectorTable
from feature_jobs.schemas import (
    ITEM_EMBEDDINGS,
    ITEM_REJECTS,
    MAIN,
    DataContractError,
    OperatorError,
    cluster_field,
)
from feature_jobs.schemas import ITEM_FEATURES as FEATURES_TABLE
from feature_jobs.store import day_names, documents, hashing, partitions
from feature_jobs.store.encoder_info import (
    EncoderInfo,
    check_timm_is_there,
    dimension_of,
    read_centre,
    told,
    weight,
)
from feature_jobs.store.versions import PACKAGE_VERSIONS
from pipelines.config import Settings
from pipelines.planning.day_plan import DayPlan
from pipelines.planning.pinned import PinnedArtefacts
from pipelines.planning.yesterday import Earlier
from pipelines.running.layout import CHUNK_FOLDER, job_of
from pipelines.running.stage import Planned, Stage
from pipelines.running.states import Look, made_in, staged_folder
from pipelines.stages import EMBED, ITEM_FEATURES

ONE_SNAPSHOT_OF_VECTORS = "one_snapshot_of_vectors_for_all_days"  # a note
DECLARED = "encoder_declared"  # the note of what vectors of the shop's own know, by its word

# ---- EMBED -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlannedEmbed(Planned):
    """Holds what EMBED must know of a day.

    Where the encoder gives out `vectors` of the shop's own, they are taken and no image is read.
    """

    stage: Stage
    settings: Settings
    pinned: PinnedArtefacts
    catalogue: Source
    item_id: pa.DataType
    before: Earlier | None
    full: bool
    vectors: VectorTable | None = None
    centre: np.ndarray | None = None

    @property
    def id_types(self) -> tuple[pa.DataType, ...]:
        return (self.item_id,)

    def continues(self, earlier: Planned) -> bool:
        if self.vectors:  # of which each day has its own, or all the same
            return False
        same = earlier.stage.identities == self.stage.identities
        goes_on = self.before is not None and self.before.run_id == earlier.stage.run_id
        return same and goes_on and earlier.id_types == self.id_types

    @classmethod
    def wire(cls, root: Any, days: Sequence["PlannedEmbed"], folder: str) -> None:
        if days[0].vectors:
            (day,) = days
            return day._wire_vectors(root, folder)
        from courier_model.images import Preprocessing
        from feature_jobs.items import embed

        first, shards = days[0], [day.stage.shards for day in days]
        settings, encoder, before = first.settings, first.pinned.encoder, first.before
        check_timm_is_there(encoder.backbone)
        look = Look()
        embeddings, rejects = map(look.open, before.tables) if before else (None, None)
        job = embed.EmbedJob(
            days=tuple(
                embed.EmbedDay(
                    day.stage.ds, day.catalogue, day.stage.shards, made_in(day.stage.staging)
                )
                for day in days
            ),
            embeddings_schema=ITEM_EMBEDDINGS.schema(first.item_id, dimension=encoder.dimension),
            rejects_schema=ITEM_REJECTS.schema(first.item_id),
            encoder_folder=first.pinned.pin.encoder,
            dimension=encoder.dimension,
            preprocessing=Preprocessing.from_dict(encoder.preprocessing),
            device=settings.embed.device,
            precision=settings.embed.precision,
            image_roots=settings.catalogue.image_roots,
            batch_size=settings.embed.batch_size,
            chunk_items=settings.embed.chunk_items,
            window_days=settings.window_days,
            previous_embeddings=embeddings,
            previous_rejects=rejects,
            reuse=first.is_reusable,
            full=first.full,
            same_roots=before is not None
            and before.settings.get("image_roots") == first.stage.settings["image_roots"],
            staging=folder,
            chunks=os.path.join(os.path.dirname(job_of(folder)), first._chunk_folder(max(shards))),
        )
        embed.define_embed(root, job)

    def _wire_vectors(self, root: Any, folder: str) -> None:
        """Defines the job that takes the vectors of the day."""
        from feature_jobs.items import take_vectors

        encoder, look, before = self.pinned.encoder, Look(), self.before
        assert self.vectors is not None
        embeddings, rejects = map(look.open, before.tables) if before else (None, None)
        job = take_vectors.TakeJob(
            ds=self.stage.ds,
            shards=self.stage.shards,
            embeddings_schema=ITEM_EMBEDDINGS.schema(self.item_id, dimension=encoder.dimension),
            rejects_schema=ITEM_REJECTS.schema(self.item_id),
            dimension=encoder.dimension,
            centre=self.centre,
            window_days=self.settings.window_days,
            previous_embeddings=embeddings,
            previous_rejects=rejects,
            reuse=self.is_reusable,
            full=self.full,
            staging=made_in(self.stage.staging),
            folder=folder,
        )
        take_vectors.define_take_vectors(root, job, self.catalogue, self.vectors)

    def came_in(self) -> dict[str, int]:
        return {"vectors_read": self.vectors.source.rows} if self.vectors else {}

    @property
    def is_reusable(self) -> bool:
        """Returns whether the embeddings of the day before are those that would be made now."""
        if self.before is None:
            return False
        wanted = {} if self.vectors else _precision(self.settings)
        made = self.before.settings
        same = self.before.identities["encoder_id"] == self.pinned.encoder.encoder_id
        return same and wanted.items() <= made.items()

    @property
    def images(self) -> int:
        if self.vectors:
            return 0
        told = self.catalogue.image_uris
        return self.catalogue.rows if told is None else told

    @property
    def items_known(self) -> int | None:
        if self.full or self.before is None or not self.is_reusable:
            return None
        return int(self.before.inputs["catalogue"]["rows"])

    def _chunk_folder(self, shards: int) -> str:
        """Names the folder of chunk files, shared by all runs that would embed alike."""
        settings = self.settings
        embedding = [
            self.pinned.encoder.encoder_id,
            settings.embed.batch_size,
            PACKAGE_VERSIONS,
            *_precision(settings).values(),
        ]
        shape = [str(self.item_id), shards, list(settings.catalogue.image_roots), self.full]
        return CHUNK_FOLDER + documents.digest([embedding, shape])[:12]


def plan_embed(day: DayPlan) -> PlannedEmbed:
    item_id = _same_item_id_type(day)
    _check_dimension(day)
    return day.settled(EMBED, _goes_on_from(day), partial(_plan_embed, day, item_id))


def _goes_on_from(day: DayPlan) -> Iterator[Earlier | None]:
    """Yields what EMBED of ds may go on from.

    Where that was made by another encoder it may be from the other side instead: the night that
    changes the encoder goes on from what the candidate has embedded, and a candidate's first day
    from the nights, whose former items it embeds too.
    """
    newest = None
    for newest in day.yesterdays.candidates(EMBED, day.ds):
        yield newest
    wanted = day.pinned.encoder.encoder_id
    if newest and newest.identities["encoder_id"] == wanted:
        return
    named = day.yesterdays.named(EMBED, day.ds, day.beside)
    if named:
        yield named
    other = day.beside.before(EMBED, day.ds)
    if other and (newest is None or other.identities["encoder_id"] == wanted):
        yield other
    elif named and named.is_gone:  # nothing can be made from that
        yield newest


def _plan_embed(day: DayPlan, item_id: pa.DataType, before: Earlier | None) -> PlannedEmbed:
    settings, catalogue, pinned = day.settings, day.shop.catalogue(day.ds), day.pinned
    encoder = pinned.encoder
    vectors = day.shop.vectors(day.ds, encoder) if encoder.vectors else None
    centre = read_centre(pinned.pin.encoder, encoder) if vectors else None
    if not vectors:
        settings.catalogue.check_has_images()
    rows = max(catalogue.rows, vectors.source.rows) if vectors else catalogue.rows
    stage = day.stage(
        EMBED,
        "asked for (--full)" if day.options.full else "",
        shards=hashing.num_shards(rows * weight(encoder.dimension), settings.rows_per_shard),
        inputs={
            "catalogue": catalogue.identity(),
            **({"vectors": vectors.source.identity()} if vectors else {}),
            "previous": before.as_input() if before else None,
        },
        identities={"encoder_id": encoder.encoder_id},
        settings={
            **({} if vectors else _of_images(settings)),
            "window_days": settings.window_days,
            **told(encoder.dimension),
        },
        before=before.tables if before else (),
        input_rows=catalogue.rows,
        notes={
            **({"full": True} if day.options.full else {}),
            "one_snapshot_for_all_days": day.shop.has_one_catalogue,
            **pinned.overlap("encoder", encoder.data_end_ds),
            **_declared(encoder),
        },
    )
    full = day.options.full
    return PlannedEmbed(stage, settings, pinned, catalogue, item_id, before, full, vectors, centre)


def _of_images(settings: Settings) -> dict[str, Any]:
    """Returns what a run that embeds images is known by."""
    return {
        "image_roots": [root.written for root in settings.catalogue.image_roots],
        **settings.catalogue.rewrite_as_written,
        "batch_size": settings.embed.batch_size,
        **_precision(settings),
    }


def _declared(encoder: EncoderInfo) -> dict[str, Any]:
    """Returns what a manifest says of vectors of the shop's own: what they know, by their word."""
    source = encoder.vectors
    if source is None:
        return {}
    word = "trained elsewhere, on nothing of this shop's clicks"
    if source.trained_on:
        word = f"trained on ds {source.trained_on[0]} to {source.trained_on[1]}"
    return {DECLARED: word, ONE_SNAPSHOT_OF_VECTORS: not day_names.has_day(source.path)}


def _precision(settings: Settings) -> dict[str, str]:
    """Returns the precision that the settings ask of all embeddings; empty where they do not."""
    wanted = settings.embed.precision
    return {} if wanted == "auto" else {"precision": wanted}


def _same_item_id_type(day: DayPlan) -> pa.DataType:
    """Returns today's type of item_id; raises DataContractError where it was another before."""
    item_id, before = day.item_id_type(), day.item_id_before
    if before is not None and before != item_id:
        earlier = day.yesterdays.before(EMBED, day.ds)
        where = f" in {earlier.tables[0].folder}" if earlier else ""
        raise DataContractError(
            f"item_id is {item_id} in the tables of ds {day.ds} but was {before}{where}. No item "
            "would be found again. Cast item_id back where it is written, or start a new "
            "feature_set."
        )
    return item_id


def _check_dimension(day: DayPlan) -> None:
    """Raises OperatorError where the feature set has embeddings of another dimension."""
    encoder, other = day.pinned.encoder, day.yesterdays.nearest(EMBED, day.ds)
    found = dimension_of(other.settings) if other else encoder.dimension
    if other and found != encoder.dimension:
        raise OperatorError(
            f"The encoder that is pinned for ds {day.ds}, {encoder.encoder_id}, makes embeddings "
            f"of {encoder.dimension:,} dimensions, but those of ds {other.ds} in the feature set "
            f"{day.settings.feature_set!r} have {found:,}, of {other.identities['encoder_id']}. "
            "Whoever reads a range of its days would get vectors of two lengths. Give the settings "
            "a new feature_set, in which the new encoder begins and the old tables stay, or pin an "
            f"encoder of {found:,} dimensions."
        )


# ---- ITEM-FEATURES ---------------------------------------------------------------------------


@dataclass(frozen=True)
class PlannedFeatures(Planned):
    """Holds what ITEM-FEATURES must know of a day."""

    stage: Stage
    pinned: PinnedArtefacts
    schema: pa.Schema
    before: Earlier | None

    @property
    def of_another_lineage(self) -> bool:
        """Returns whether neither codebook, of ds or the day before, is an ancestor of the other.

        Then even equal numbers mean nothing to each other.
        """
        if self.before is None:
            return False
        mine, theirs = self.pinned.codebook, self.before.identities["codebook_id"]
        return not (
            theirs in (mine.codebook_id, *mine.ancestors)
            or mine.codebook_id in self.before.settings.get("ancestors", ())
        )

    @property
    def compared_with(self) -> Earlier | None:
        """Returns the features of the day before, None where there are none any more."""
        return None if self.before is None or self.before.is_gone else self.before

    @property
    def folder(self) -> str:
        """Returns the folder of the codebook's package."""
        return str(self.pinned.pin.codebook)

    @classmethod
    def wire(cls, root: Any, days: Sequence["PlannedFeatures"], folder: str) -> None:
        from feature_jobs.items.item_features import FeaturesJob, define_item_features

        look = Look()
        made_here = {day.stage.run_id: day.stage for day in days}

        def features_before(day: "PlannedFeatures") -> partitions.Partition | None:
            """Returns the features to compare with, which this very job may be about to make."""
            if not day.stage.before:
                return None
            (reference,) = day.stage.before
            if earlier := made_here.get(reference.run_id):
                folder = staged_folder(earlier, FEATURES_TABLE)
                return partitions.to_be_made(folder, earlier.shards)
            return look.open(reference).slim()

        jobs = [
            FeaturesJob(
                look.table(day.stage.upstream[0], ITEM_EMBEDDINGS).slim(),
                look.table(day.stage.upstream[0], ITEM_REJECTS).slim(), day.folder,
                day.pinned.encoder.categories, day.schema, features_before(day),
                day.of_another_lineage, made_in(day.stage.staging), day.stage.shards,
            )
            for day in days
        ]  # fmt: skip
        define_item_features(root, jobs, folder)

    def copies(self, folder: str) -> list[str]:
        return [codebooks.key_of_copy(self.pinned.codebook.codebook_id)]

    def all_is_told(self) -> bool:
        from feature_jobs.items.item_features import shards_counted

        return shards_counted(made_in(self.stage.staging)) >= self.stage.shards

    def summarise(self) -> dict[str, Any]:
        from feature_jobs.items.item_features import read_clusters

        folder, shards = made_in(self.stage.staging), self.stage.shards
        clusters = read_clusters(folder, shards, self.folder, self.of_another_lineage)
        return {"clusters": clusters}


def plan_item_features(day: DayPlan, embedded: Planned) -> PlannedFeatures:
    candidates = day.yesterdays.candidates(ITEM_FEATURES, day.ds)
    return day.settled(ITEM_FEATURES, candidates, partial(_plan_features, day, embedded))


def _plan_features(day: DayPlan, embedded: Planned, before: Earlier | None) -> PlannedFeatures:
    settings, codebook = day.settings, day.pinned.codebook
    labels = [label for label in codebook.labels if label != MAIN]
    wanted = {
        "embedding": settings.item_features.vector,
        "second_distance": settings.item_features.second_distance,
    }
    schema = FEATURES_TABLE.schema(
        day.item_id_type(),
        extra=[cluster_field(label) for label in labels],
        without=[name for name, asked in wanted.items() if not asked],
        dimension=codebook.dimension,
    )
    stage = day.stage(
        ITEM_FEATURES,
        shards=embedded.stage.shards,
        inputs={
            "embed": embedded.stage.run_id,
            "previous": before.as_input() if before else None,
        },
        upstream=(embedded.stage,),
        before=before.tables if before and not before.is_gone else (),
        identities=day.pinned.identities(),
        settings={
            **wanted,
            "max_id": {r.label: r.max_id for r in codebook.resolutions},
            "ancestors": codebook.ancestors,
            "categories": day.pinned.encoder.categories,
            **told(codebook.dimension),
        },
        notes=day.pinned.overlap("codebook", codebook.data_end_ds),
    )
    return PlannedFeatures(stage, day.pinned, schema, before)
