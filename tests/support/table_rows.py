"""Makes keys, shard numbers and rows for tests of tables as files and of what jobs exchange."""

import datetime as dt

import numpy as np
import pyarrow as pa
from hypothesis import strategies as st

from feature_jobs.schemas import ITEM_EMBEDDINGS
from feature_jobs.store import arrays
from tests.support.codebooks import unit_rows

FLOATS = pa.list_(pa.float32())
KEYS = st.one_of(
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=60, unique=True),
    st.lists(st.text(max_size=40), max_size=60, unique=True),
)
SHARDS = st.integers(0, 5).map(lambda bits: 1 << bits)


def embeddings(items: int) -> tuple[pa.Schema, pa.Table]:
    schema = ITEM_EMBEDDINGS.schema(pa.int64(), dimension=256)
    vectors = unit_rows(items)
    columns = {
        "item_id": np.arange(items)[::-1],
        "embedding": arrays.list_column(vectors, FLOATS),
        "image_uri": [f"{i}.jpg" for i in range(items)],
        "image_generation": [None] * items,
        "image_size": [100] * items,
        "image_mtime": [dt.datetime(2026, 1, 1)] * items,
        "image_sha256": ["ab" * 32] * items,
        "category": [None, *["dress"] * (items - 1)],
        "in_catalogue": [True] * items,
        "left_catalogue_ds": [None] * items,
    }
    return schema, pa.table(columns)
