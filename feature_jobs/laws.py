"""Checks what must hold of published tables (DESIGN §3)."""

import numpy as np
import pyarrow as pa

from feature_jobs.schemas import EMBEDDING_DIM, DataContractError


def check_unit(points: np.ndarray, ids: pa.ChunkedArray) -> None:
    """Raises DataContractError where `points` float32 [n, 256] are not finite unit vectors.

    The points are those of the items `ids` [n].
    """
    square = np.einsum("nd,nd->n", points, points)
    bad = np.flatnonzero(~(np.abs(square - 1) < 2e-3))  # written so that NaN counts as bad
    if len(bad):
        raise DataContractError(
            f"item_embeddings holds {len(bad):,} rows whose embedding is no finite unit vector of "
            f"{EMBEDDING_DIM} floats, for example that of item_id {ids[int(bad[0])]}. Distances to "
            "it mean nothing, and its cluster ID would be arbitrary. Run `courier embed --full` "
            "for this ds."
        )
