"""Makes encoders for `courier init-encoder`, and the `[[pins]]` stanzas of all new artefacts.

Commands that make artefacts print a stanza to be added to the settings, and edit nothing.
"""

import datetime as dt
import json
import os
from collections.abc import Sequence

from courier_model.encoder import build_encoder, origin_of, save_encoder
from feature_jobs.store import files
from pipelines.config import Settings

_ANY_DAY = dt.date(2000, 1, 1)


def stanza(folder: str, comment: str, from_ds: dt.date, **artefacts: str) -> str:
    """Writes a `[[pins]]` stanza; local paths are relative to `folder`, that of the settings."""
    lines = [f"# {comment}", "[[pins]]", f'from_ds = "{from_ds}"']
    for name, path in artefacts.items():
        near = path if files.is_remote(path) else os.path.relpath(path, folder)
        lines.append(f"{name} = {json.dumps(near)}")
    return "\n".join(lines)


def encoder_stanza(
    settings: Settings | None, folder: str, comment: str, from_ds: dt.date, encoder: str
) -> str:
    """Writes the stanza of a new encoder, which has no codebook yet.

    Where nights have a codebook already, a pin without one would end them: it says in comments then
    how the encoder gets its own, so that appending it does no harm.
    """
    if settings is None or not any(pin.codebook for pin in settings.pins):
        return stanza(folder, comment, from_ds, encoder=encoder)
    path = encoder if files.is_remote(encoder) else os.path.relpath(encoder)
    return "\n".join(
        [
            f"# {comment}",
            "# It takes the place of the pinned encoder once it has a codebook of its own, made on",
            "# a day before it is to serve:",
            f"#   courier embed --encoder {path} --ds DAY",
            f"#   courier fit-codebook --encoder {path} --ds DAY --clusters N >> courier.toml",
        ]
    )


def init_encoder(
    backbone: str, weights: str, input_size: int | None, seed: int, name: str,
    categories: Sequence[str], settings: Settings | None, folder: str, out: str,
) -> str:  # fmt: skip
    """Makes an encoder package below `out`/encoders without training; returns its stanza.

    `folder` is that of the `settings`, None where there are none yet.
    """
    encoder = build_encoder(backbone, weights, input_size, seed)
    info = save_encoder(
        encoder, os.path.join(out, "encoders"), name, tuple(categories) or None,
        data_start_ds=None, data_end_ds=None,
        weights=origin_of(weights),
    )  # fmt: skip
    path = os.path.join(out, "encoders", info.encoder_id)
    comment = f"{backbone}, weights {info.weights}, made without click data: it may serve any day"
    return encoder_stanza(settings, folder, comment, _ANY_DAY, path)
