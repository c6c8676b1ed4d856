"""Makes encoders for `courier init-encoder`."""

import datetime as dt
import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from courier_model.encoder import (
    ImageEncoder,
    build_encoder,
    origin_of,
    save_encoder,
)
from courier_model.projection import principal
from feature_jobs.inputs import Source
from feature_jobs.schemas import OperatorError
from feature_jobs.store import faults, worker_notes
from feature_jobs.store.encoder_info import check_name
from pipelines.artefacts.fit_staging import own_staging
from pipelines.artefacts.stanzas import ANY_DAY, encoder_stanza
from pipelines.config import Settings
from pipelines.planning.shop_tables import ShopTables
from pipelines.running import beam_options, cluster_jobs, making
from pipelines.running.beam_options import JobOptions
from pipelines.stages import EMBED

if TYPE_CHECKING:
    from feature_jobs.items.image_features import FeaturesJob

Say = Callable[[str], None]

_SAMPLE = 20_000  # items of a catalogue


@dataclass(frozen=True)
class Start:
    """Says with what a new encoder begins, see `build_encoder`."""

    backbone: str
    weights: str
    input_size: int | None
    embedding_dim: int
    seed: int


@dataclass(frozen=True)
class Fitting:
    """Says what of a new encoder is fitted on a sample of images of a day's catalogue.

    `centre` takes off the mean of the images' features before the norm. `projection` is "random" or
    "pca", the leading principal directions, each scaled to the same variance where it is to
    `whiten`. Images of about `sample` items are looked at.
    """

    ds: dt.date
    centre: bool
    projection: str
    whiten: bool
    sample: int


def choose_fitting(
    ds: dt.date | None, centre: bool | None, projection: str, whiten: bool, sample: int | None,
    weights: str, say: Say,
) -> Fitting | None:  # fmt: skip
    """Returns what is to be fitted, None for nothing; `centre` None: where weights are pretrained.

    Raises OperatorError where the options do not go together.
    """
    if whiten and projection != "pca":
        raise OperatorError(
            "--whiten scales principal directions, and a random projection has none: say "
            "--projection pca besides, or leave --whiten out."
        )
    if ds is None and (centre or projection == "pca"):
        option = "--projection pca" if projection == "pca" else "--centre"
        raise OperatorError(
            f"{option} is fitted on images of the catalogue: say of which day, with --ds, one that "
            "lies before those that the encoder is to serve."
        )
    if ds is None and sample:
        raise OperatorError(
            f"--sample {sample} is of the images of a day, on which centre and projection are "
            "fitted: say of which, with --ds, or leave --sample out."
        )
    if ds is None:
        if weights != "random" and centre is None:
            say(
                "WARNING: the encoder is not centred. What all images have in common stays in its "
                "embeddings and makes their cosines alike; give --ds, a day whose catalogue is "
                "there, to take it off, or --no-centre to be silent about it."
            )
        return None
    centred = weights != "random" if centre is None else centre
    if not centred and projection == "random":
        raise OperatorError(
            f"--ds {ds} is the day on whose images centre and projection are fitted, and with "
            "random weights or --no-centre and a random projection there is neither. Leave --ds "
            "out, or say --centre or --projection pca."
        )
    return Fitting(ds, centred, projection, whiten, sample or _SAMPLE)


def init_encoder(
    start: Start, name: str, categories: Sequence[str], settings: Settings | None, folder: str,
    out: str, say: Say, fitting: Fitting | None = None, beam_args: Sequence[str] = (),
) -> str:  # fmt: skip
    """Makes an encoder package below `out`/encoders without training; returns its stanza.

    `folder` is that of the `settings`, None where there are none yet. What is fitted of it knows
    the catalogue of the day, so that it serves later ones.
    """
    check_name(name)
    read = _open(fitting, settings, beam_args, say) if fitting else None
    encoder = build_encoder(
        start.backbone, start.weights, start.input_size, start.seed, start.embedding_dim
    )
    scope, words, day = tuple(categories) or None, origin_of(start.weights), None
    from_ds, knows = ANY_DAY, "made without click data: it may serve any day"
    if fitting and read:
        fitted = _fit(encoder, fitting, scope, *read, say)
        words, day = f"{words}, {fitted}", str(fitting.ds)
        from_ds = fitting.ds + dt.timedelta(days=1)
        knows = "made without click data"
    info = save_encoder(
        encoder, os.path.join(out, "encoders"), name, scope, data_start_ds=day, data_end_ds=day,
        weights=words,
    )  # fmt: skip
    path = os.path.join(out, "encoders", info.encoder_id)
    comment = f"{start.backbone}, weights {info.weights}, {knows}"
    return encoder_stanza(settings, folder, comment, from_ds, path)


# ---- Fitting on images -------------------------------------------------------------------------


def _fit(
    encoder: ImageEncoder, fitting: Fitting, categories: tuple[str, ...] | None,
    settings: Settings, catalogue: Source, options: JobOptions, say: Say,
) -> str:  # fmt: skip
    """Gives the encoder its centre and projection; returns in words what they were fitted on."""
    from feature_jobs.items.image_features import read_features

    dimensions, features_of_each = encoder.head.weight.shape
    if fitting.projection == "pca" and features_of_each < dimensions:
        raise OperatorError(
            f"The backbone {encoder.backbone_name!r} makes {features_of_each} features of an "
            f"image, which have no {dimensions} directions. Say --projection random, take a "
            "larger one, or ask for fewer with --embedding-dim."
        )
    staging = settings.layout.fit_folder("init-encoder", fitting.ds, secrets.token_hex(6))
    with own_staging(staging, say):
        job = _features_job(encoder, fitting, categories, catalogue, settings, staging)
        items = min(fitting.sample, catalogue.rows)
        say(f"init-encoder: looking at images of about {items:,} items of ds {fitting.ds}")
        _run(job, catalogue, options, say)
        features = read_features(job)
    found = f"{len(features):,} images of ds {fitting.ds}"
    centre = "centre of " if fitting.centre else ""
    if fitting.projection == "random":
        encoder.take_off(features)
        return f"{centre}{found}"
    projection = principal(features, encoder.dimension, fitting.whiten)
    say(f"init-encoder: {projection.explained:.1%} of the features' variance is kept")
    encoder.project(projection, fitting.centre)
    whitened = "whitened " if fitting.whiten else ""
    return f"{whitened}pca and {centre}{found}" if centre else f"{whitened}pca of {found}"


def _open(
    fitting: Fitting, settings: Settings | None, beam_args: Sequence[str], say: Say
) -> tuple[Settings, Source, JobOptions]:
    """Opens what a fit reads, before weights are fetched; raises what is wrong with it."""
    if settings is None:
        raise OperatorError(
            f"There are no settings yet, which say where the catalogue of ds {fitting.ds} is. Make "
            "them with `courier init`, or leave --ds out."
        )
    settings.catalogue.check_has_images()
    options = beam_options.job_options(settings, EMBED.name, beam_args)
    beam_options.check_ready([options])
    if beam_options.is_for_jar(options):
        raise OperatorError(
            "init-encoder goes on with the features that its job computes, and "
            "--output_executable_path would have that job written into a jar instead of run. Leave "
            "the option out here, or --ds."
        )
    return settings, ShopTables(settings, fitting.ds, say).catalogue(fitting.ds), options


def _features_job(
    encoder: ImageEncoder, fitting: Fitting, categories: tuple[str, ...] | None,
    catalogue: Source, settings: Settings, staging: str,
) -> "FeaturesJob":  # fmt: skip
    from feature_jobs.items.image_features import FeaturesJob

    # As a package, since workers may be elsewhere.
    info = save_encoder(encoder, staging, "fitted", None, None, None, weights="")
    return FeaturesJob(
        encoder_folder=os.path.join(staging, info.encoder_id),
        preprocessing=encoder.preprocessing,
        image_roots=settings.catalogue.image_roots,
        categories=categories,
        share=min(1.0, fitting.sample / max(1, catalogue.rows)),
        device=settings.embed.device,
        precision=settings.embed.precision,
        batch_size=settings.embed.batch_size,
        chunk_items=settings.embed.chunk_items,
        staging=staging,
    )


def _run(job: "FeaturesJob", catalogue: Source, options: JobOptions, say: Say) -> None:
    from feature_jobs.items.image_features import define_features, is_whole

    name = f"init-encoder-{os.path.basename(job.staging)}"
    sent = cluster_jobs.Job(name, options.beam, job.staging, say)
    making.run_job(
        lambda root: define_features(root, catalogue, job), job.staging, sent.run, options.share
    )
    if worker_notes.are_elsewhere(job.staging):
        faults.until_shown(partial(is_whole, job))
