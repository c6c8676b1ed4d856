"""Writes the `[[pins]]` stanzas of new artefacts.

Commands that make artefacts print a stanza to be added to the settings, and edit nothing.
"""

import datetime as dt
import json
import os

from feature_jobs.store import files
from feature_jobs.store.encoder_info import read_encoder_info
from pipelines.config import Settings

ANY_DAY = dt.date(2000, 1, 1)  # from which on an encoder serves that knows of no day


def stanza(folder: str, comment: str, from_ds: dt.date, **artefacts: str) -> str:
    """Writes a `[[pins]]` stanza; local paths are relative to `folder`, that of the settings."""
    lines = [f"# {comment}", "[[pins]]", f'from_ds = "{from_ds}"']
    for name, path in artefacts.items():
        near = path if files.is_remote(path) else os.path.relpath(path, folder)
        lines.append(f"{name} = {json.dumps(near)}")
    return "\n".join(lines)


def whole_stanza(
    settings: Settings, folder: str, comment: str, from_ds: dt.date, encoder: str, codebook: str
) -> str:
    """Writes the stanza of a codebook and its encoder.

    Where nights have embeddings of another dimension, which it would end, it is a comment that says
    where it belongs.
    """
    found = stanza(folder, comment, from_ds, encoder=encoder, codebook=codebook)
    dimension = read_encoder_info(encoder).dimension
    nights = [pin for pin in settings.pins if pin.codebook and pin.from_ds <= from_ds]
    if not nights:
        return found
    other = read_encoder_info(max(nights, key=lambda pin: pin.from_ds).encoder).dimension
    if other == dimension:
        return found
    lines = [
        f"Embeddings of {dimension:,} numbers do not go on from those of {other:,} in the",
        f"feature_set {settings.feature_set!r}. In settings with a feature_set of its own, these",
        "lines without their # are the pin:",
        *found.splitlines(),
    ]
    return "\n".join(f"# {line}" for line in lines)


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
