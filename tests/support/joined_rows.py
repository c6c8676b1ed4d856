"""Draws rows as `courier join` writes them in its plain layout, on request with all that it can."""

import datetime as dt

import numpy as np
import pyarrow as pa

from feature_jobs.impressions.layouts import Form
from feature_jobs.schemas import TIMESTAMP
from feature_jobs.store.arrays import list_column

PLACES, TIERS, TOP = 6, 20, 3
MAX_IDS = {"main": 32, "fine": 1000}
FORM = Form("user", "label", PLACES, MAX_IDS, TIERS, TOP)
FLOATS, COUNTS, FLAGS = (pa.list_(t) for t in (pa.float32(), pa.int32(), pa.int8()))


def samples(n: int, rng: np.random.Generator) -> dict[str, object]:
    """Draws a user's own columns, of many types; some numbers are null, some users unknown."""
    return {
        "user": [None if k % 50 == 7 else f"user-{k}" for k in rng.integers(0, 100, n)],
        "item": rng.integers(0, 2**62, n),
        "at": pa.array(rng.integers(0, 10**15, n)).cast(TIMESTAMP),
        "label": rng.random(n) < 0.3,
        "price": pa.array(rng.random(n), mask=rng.random(n) < 0.1),
        "member": pa.array(rng.random(n) < 0.5, mask=rng.random(n) < 0.1),
        "position": pa.array(rng.integers(0, 10, n).astype(np.int16), mask=rng.random(n) < 0.1),
        "page": pa.array([f"page-{k}" for k in rng.integers(0, 5, n)]).dictionary_encode(),
        "tags": [[f"tag-{t}" for t in range(k)] for k in rng.integers(0, 3, n)],
    }


def joined(n: int, seed: int = 0) -> pa.Table:
    """Draws `n` rows of the plain layout."""
    rng = np.random.default_rng(seed)

    def numbers(below: int, *shape: int) -> np.ndarray:
        return rng.integers(0, below, (n, *shape)).astype(np.int32)

    main, fine = (max_id + 1 for max_id in MAX_IDS.values())
    ours = {
        "feature_ds": pa.array([None if k % 7 == 0 else dt.date(2026, 1, 7) for k in range(n)]),
        **{name: rng.random(n) < 0.9 for name in ("has_night", "item_known", "has_image")},
        "in_scope": rng.random(n) < 0.9,
        "cluster_id": numbers(main),
        "cluster_fine": numbers(fine),
        "sim_scores": list_column(rng.uniform(-1, 1, (n, PLACES)).astype(np.float32), FLOATS),
        "sim_mask": list_column(numbers(2, PLACES).astype(np.int8), FLAGS),
        "history_len": numbers(PLACES + 1),
        "sim_known": numbers(PLACES + 1),
        "sim_max": rng.uniform(-1, 1, n).astype(np.float32),
        "sim_mean": rng.uniform(-1, 1, n).astype(np.float32),
        "simtier": list_column(numbers(PLACES + 1, TIERS), COUNTS),
        "same_cluster": numbers(PLACES + 1),
        "history_cluster_ids": list_column(numbers(main, PLACES), COUNTS),
        "history_cluster_fine": list_column(numbers(fine, PLACES), COUNTS),
        "sim_bucket": list_column(numbers(TIERS + 1, PLACES), COUNTS),
        "top_positions": list_column(numbers(PLACES + 1, TOP), COUNTS),
        "same_cluster_fine": numbers(PLACES + 1),
        "history_item_ids": list_column(rng.integers(0, 2**62, (n, PLACES)), pa.list_(pa.int64())),
        "night_created": pa.array([10**15] * n).cast(TIMESTAMP),
    }
    return pa.table({**samples(n, rng), **ours})


def as_array(column: pa.ChunkedArray) -> np.ndarray:
    """Returns a column as an array [rows], or [rows, places] of lists of one length."""
    return np.array(column.to_pylist())
