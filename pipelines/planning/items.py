"""Plans EMBED and ITEM-FEATURES: what is made of the catalogue of ds.

Both jobs need torch, which takes seconds and most of a gigabyte to load: it is loaded by who runs
them, and not by who only reads what they made.
"""

import os
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from feature_jobs.codebooks import codebook as codebooks
from feature_jobs.schemas import (
    ITEM_EMBEDDINGS,
    ITEM_FEATURES,
    ITEM_REJECTS,
    MAIN,
    DataContractError,
    cluster_field,
)
from feature_jobs.store import documents, hashing, partitions
from pipelines.config import Settings
from pipelines.planning.day_plan import DayPlan
from pipelines.running.layout import CHUNK_FOLDER
from pipelines.running.stage import PACKAGE_VERSIONS, Stage

# ---- EMBED -----------------------------------------------------------------------------------


def plan_embed(day: DayPlan, made: dict[str, Stage]) -> Stage:
    settings, catalogue = day.settings, day.shop.catalogue(day.ds)
    before, rejects = day.day_before or (None, None)
    item_id = _same_item_id_type(day, before)
    made_by = before.manifest["identities"]["encoder_id"] if before else None
    roots = list(settings.catalogue.image_roots)
    shards = hashing.num_shards(catalogue.rows, settings.rows_per_shard)
    chunks = _chunk_folder(day, item_id, shards)

    def define(root: Any, stages: Sequence[Stage]) -> None:
        from courier_model.images import Preprocessing
        from feature_jobs.items import embed

        (stage,) = stages
        job = embed.EmbedJob(
            days=(embed.EmbedDay(day.ds, catalogue, shards, stage.staging),),
            embeddings_schema=ITEM_EMBEDDINGS.schema(item_id),
            rejects_schema=ITEM_REJECTS.schema(item_id),
            encoder_folder=day.pinned.pin.encoder,
            preprocessing=Preprocessing.from_dict(day.pinned.encoder.preprocessing),
            device=settings.embed.device,
            precision=settings.embed.precision,
            image_roots=settings.catalogue.image_roots,
            batch_size=settings.embed.batch_size,
            chunk_items=settings.embed.chunk_items,
            window_days=settings.window_days,
            previous_embeddings=before,
            previous_rejects=rejects,
            reuse=made_by == day.pinned.encoder.encoder_id and _is_of_precision(before, settings),
            full=day.options.full,
            same_roots=before is not None and before.manifest["settings"]["image_roots"] == roots,
            staging=stage.staging,
            chunks=os.path.join(os.path.dirname(stage.staging), chunks),
        )
        embed.define_embed(root, job)

    return day.stage(
        "embed",
        define,
        tables=(ITEM_EMBEDDINGS, ITEM_REJECTS),
        shards=shards,
        inputs={
            "catalogue": catalogue.identity(),
            "previous": [p.manifest["version"] for p in (before, rejects) if p],
        },
        identities={"encoder_id": day.pinned.encoder.encoder_id},
        settings={
            "image_roots": roots,
            "batch_size": settings.embed.batch_size,
            "window_days": settings.window_days,
            **_precision(settings),
        },
        input_rows=catalogue.rows,
        forced=day.options.full,
        notes={
            **({"full": True} if day.options.full else {}),
            "one_snapshot_for_all_days": day.shop.has_one_catalogue,
            **day.pinned.overlap("encoder", day.pinned.encoder.data_end_ds),
        },
    )


def _precision(settings: Settings) -> dict[str, str]:
    """Returns the precision that the settings ask of all embeddings; empty where they do not."""
    wanted = settings.embed.precision
    return {} if wanted == "auto" else {"precision": wanted}


def _is_of_precision(before: partitions.Partition | None, settings: Settings) -> bool:
    """Returns whether all embeddings of `before` were made in the precision that is asked for."""
    return (
        before is not None and _precision(settings).items() <= before.manifest["settings"].items()
    )


def _same_item_id_type(day: DayPlan, before: partitions.Partition | None) -> pa.DataType:
    """Returns today's type of item_id; raises DataContractError where `before` had another one."""
    item_id = day.item_id_type()
    if before and before.schema.field("item_id").type != item_id:
        raise DataContractError(
            f"item_id is {item_id} in the tables of ds {day.ds} but was "
            f"{before.schema.field('item_id').type} in {before.folder}. No item would be found "
            "again. Cast item_id back where it is written, or start a new feature_set."
        )
    return item_id


def _chunk_folder(day: DayPlan, item_id: pa.DataType, shards: int) -> str:
    """Names the folder of chunk files, shared by all runs of ds that would embed alike."""
    settings = day.settings
    embedding = [
        day.pinned.encoder.encoder_id,
        settings.embed.batch_size,
        PACKAGE_VERSIONS,
        *_precision(settings).values(),
    ]
    layout = [str(item_id), shards, list(settings.catalogue.image_roots), day.options.full]
    return CHUNK_FOLDER + documents.digest([embedding, layout])[:12]


# ---- ITEM-FEATURES ---------------------------------------------------------------------------


def plan_item_features(day: DayPlan, made: dict[str, Stage]) -> Stage:
    settings, upstream, codebook = day.settings, made["embed"], day.pinned.codebook
    labels = [label for label in codebook.labels if label != MAIN]
    wanted = {
        "embedding": settings.item_features.vector,
        "second_distance": settings.item_features.second_distance,
    }
    schema = ITEM_FEATURES.schema(
        day.item_id_type(),
        extra=[cluster_field(label) for label in labels],
        without=[name for name, asked in wanted.items() if not asked],
    )
    folder = str(day.pinned.pin.codebook)
    before = day.previous_features

    def define(root: Any, stages: Sequence[Stage]) -> None:
        from feature_jobs.items.item_features import FeaturesJob, define_item_features

        (stage,) = stages
        job = FeaturesJob(
            upstream.partition(ITEM_EMBEDDINGS), upstream.partition(ITEM_REJECTS), folder,
            day.pinned.encoder.categories, schema, before, day.of_another_lineage, stage.staging,
        )  # fmt: skip
        define_item_features(root, job)

    def summarise(staging: str) -> dict[str, Any]:
        from feature_jobs.items.item_features import read_clusters

        return {"clusters": read_clusters(staging, upstream.shards, folder)}

    return day.stage(
        "item-features",
        define,
        tables=(ITEM_FEATURES,),
        shards=upstream.shards,
        inputs={
            "embed": upstream.run_id,
            "previous": before.manifest["version"] if before else None,
        },
        upstream=(upstream,),
        identities=day.pinned.identities(),
        settings={
            **wanted,
            "max_id": {r.label: r.max_id for r in codebook.resolutions},
            "ancestors": codebook.ancestors,
            "categories": day.pinned.encoder.categories,
        },
        notes={
            **day.pinned.overlap("codebook", codebook.data_end_ds),
            **churn_note(day),
        },
        clean=lambda _: codebooks.discard_copy(codebook.codebook_id),
        summarise=summarise,
    )


def churn_note(day: DayPlan) -> dict[str, bool]:
    """Returns what manifests say where cluster IDs were allowed to change as they like."""
    return {"churn_allowed": True} if day.options.allow_churn else {}
