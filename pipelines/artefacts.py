"""The occasional commands: make an encoder without training, fit a codebook.

Both print the `[[pins]]` stanza to add to the settings, and edit nothing.
"""

import datetime as dt
import json
import os
from collections.abc import Sequence

from courier_model.encoder import build_encoder, origin_of, save_encoder
from feature_jobs import storage, tables
from feature_jobs.codebook import save_codebook
from feature_jobs.fit_codebook import (
    SampleJob,
    count_in_scope,
    define_sample,
    make_codebook,
    read_sample,
    sample_fraction,
)
from feature_jobs.schemas import ITEM_EMBEDDINGS, OperatorError
from pipelines import beam_options, runs
from pipelines.config import Settings

_ANY_DAY = dt.date(2000, 1, 1)


def stanza(folder: str, comment: str, from_ds: dt.date, **artefacts: str) -> str:
    """A `[[pins]]` stanza; local paths are written relative to `folder`, that of the settings."""
    lines = [f"# {comment}", "[[pins]]", f'from_ds = "{from_ds}"']
    for name, path in artefacts.items():
        near = path if storage.is_remote(path) else os.path.relpath(path, folder)
        lines.append(f"{name} = {json.dumps(near)}")
    return "\n".join(lines)


def init_encoder(
    backbone: str, weights: str, input_size: int | None, seed: int, name: str,
    categories: Sequence[str], folder: str, out: str,
) -> str:  # fmt: skip
    """Makes an encoder package below `out`/encoders without training; returns its stanza.

    `folder` is that of the settings.
    """
    encoder = build_encoder(backbone, weights, input_size, seed)
    info = save_encoder(
        encoder, os.path.join(out, "encoders"), name, tuple(categories) or None,
        data_start_ds=None, data_end_ds=None,
        weights=origin_of(weights),
    )  # fmt: skip
    path = os.path.join(out, "encoders", info.encoder_id)
    comment = f"{backbone}, weights {info.weights}, made without click data: it may serve any day"
    return stanza(folder, comment, _ANY_DAY, encoder=path)


def fit_codebook(
    settings: Settings, ds: dt.date, clusters: int, seed: int, name: str, folder: str, out: str,
    beam_args: Sequence[str],
) -> str:  # fmt: skip
    """Fits a codebook on the published embeddings of ds, below `out`/codebooks; returns its stanza.

    The stanza holds from the next day on, since features know nothing of their own day.
    """
    pin = settings.pin_for(ds)
    encoder = tables.read_encoder_info(pin.encoder)
    target = runs.table_folder(settings.root, settings.feature_set, ITEM_EMBEDDINGS, ds)
    embeddings = tables.open_published(target)
    found = embeddings.manifest["identities"]["encoder_id"]
    if found != encoder.encoder_id:
        raise OperatorError(
            f"The embeddings of ds {ds} were made by {found}, but the pin that holds for that day "
            f"names {encoder.encoder_id}. A codebook belongs to one encoder. Run `courier embed "
            f"--ds {ds}` first."
        )
    options = beam_options.pipeline_options(settings.beam, "fit-codebook", beam_args)
    run_id = tables.digest([embeddings.manifest["version"], clusters, seed, name])[:12]
    staging = runs.staging_folder(settings.root, settings.feature_set, "fit-codebook", ds, run_id)
    items = count_in_scope(embeddings, encoder.categories)
    job = SampleJob(embeddings, encoder.categories, sample_fraction(items, clusters), staging)
    beam_options.run_pipeline(lambda root: define_sample(root, job), options)
    sample = read_sample(job)
    storage.delete_tree(staging)
    codebook = make_codebook(sample, clusters, seed, name, encoder.encoder_id, str(ds))
    path = save_codebook(os.path.join(out, "codebooks"), codebook)
    info = codebook.info
    comment = (
        f"{clusters:,} clusters fitted on {info.sample_items:,} items of ds {ds}, mean squared "
        f"distance {info.objective:.4f}, max_id {info.max_id}"
    )
    next_day = ds + dt.timedelta(days=1)
    return stanza(folder, comment, next_day, encoder=pin.encoder, codebook=path)
