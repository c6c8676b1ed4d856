"""Makes encoders for `courier init-encoder`, and the `[[pins]]` stanzas of all new artefacts.

Commands that make artefacts print a stanza to be added to the settings, and edit nothing.
"""

import datetime as dt
import json
import os
from collections.abc import Sequence

from courier_model.encoder import build_encoder, origin_of, save_encoder
from feature_jobs.store import files

_ANY_DAY = dt.date(2000, 1, 1)


def stanza(folder: str, comment: str, from_ds: dt.date, **artefacts: str) -> str:
    """Writes a `[[pins]]` stanza; local paths are relative to `folder`, that of the settings."""
    lines = [f"# {comment}", "[[pins]]", f'from_ds = "{from_ds}"']
    for name, path in artefacts.items():
        near = path if files.is_remote(path) else os.path.relpath(path, folder)
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
