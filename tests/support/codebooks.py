"""Makes unit vectors, and codebooks by hand, without a fit."""

from collections.abc import Mapping

import numpy as np

from courier_model.projection import EMBEDDING_DIM
from feature_jobs.codebooks.codebook import (
    Codebook,
    CodebookInfo,
    Resolution,
    codebook_id,
    health_of,
    retired_numbers,
)


def unit_rows(count: int, seed: int = 0, dimension: int = EMBEDDING_DIM) -> np.ndarray:
    """Draws random directions; float32 [count, dimension]."""
    rows = np.random.default_rng(seed).normal(size=(count, dimension)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def by_hand(
    centres: Mapping[str, np.ndarray],
    numbers: Mapping[str, np.ndarray],
    encoder_id: str,
    data_ds: str = "2026-02-28",
) -> Codebook:
    """Makes a codebook whose centres each stand for one item, by label.

    Its highest numbers were issued last.
    """
    numbers = {label: np.asarray(n, np.int32) for label, n in numbers.items()}
    identity = codebook_id("test", centres, numbers, (encoder_id, None, data_ds))
    resolutions = tuple(
        Resolution(
            label, len(n), int(n.max()), 0.0, None, health_of(np.ones(len(n), np.int64)),
            (1,) * len(n), retired_numbers(n, int(n.max())),
        )
        for label, n in numbers.items()
    )  # fmt: skip
    info = CodebookInfo(
        identity, encoder_id, (), "fresh", "by hand", 0, 0.0, 4, 0, "", data_ds, data_ds, {},
        resolutions, next(iter(centres.values())).shape[1],
    )  # fmt: skip
    return Codebook(info, centres, numbers)
