"""Makes rows of EMBED's tables, catalogue and results, each item's with values of its own.

Only what a test is about has to be said; the rest is as it is for a healthy item.
"""

import datetime as dt
import hashlib
from typing import Any

import numpy as np
import pyarrow as pa

from courier_model.inference import results_schema
from courier_model.projection import EMBEDDING_DIM
from feature_jobs.items.embed_plan import VERSION_COLUMNS
from feature_jobs.schemas import ITEM_EMBEDDINGS, ITEM_REJECTS, TIMESTAMP
from feature_jobs.store import arrays

DAY = dt.date(2026, 3, 10)
WRITTEN = dt.datetime(2026, 3, 1, tzinfo=dt.UTC)
EMBEDDINGS = ITEM_EMBEDDINGS.schema(pa.int64())
REJECTS = ITEM_REJECTS.schema(pa.int64())

VERSIONS = pa.schema(
    {"image_generation": pa.int64(), "image_size": pa.int64(), "image_mtime": TIMESTAMP}
)
CATALOGUE = pa.schema({"item_id": pa.int64(), "image_uri": pa.string(), "category": pa.string()})
TO_READ = pa.schema(
    [
        *list(CATALOGUE)[:2],
        *VERSIONS,
        pa.field("known_sha256", pa.string()),
        pa.field("shard", pa.int64()),
    ]
)
RESULTS = pa.schema(
    [
        *results_schema(pa.int64()),
        pa.field("shard", pa.int64()),
        *VERSIONS,
        pa.field("device", pa.string()),
    ]
)
assert tuple(VERSIONS.names) == VERSION_COLUMNS

Row = dict[str, Any]


def day(number: int) -> dt.date:
    """Returns the day that lies so many days after DAY."""
    return DAY + dt.timedelta(days=number)


def digest(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def vector(number: int) -> list[float]:
    """Returns a vector of unit length that is of this number alone."""
    found = np.zeros(EMBEDDING_DIM, np.float32)
    found[number] = 1
    return found.tolist()


def _table(schema: pa.Schema, rows: list[Row]) -> pa.Table:
    return arrays.plain(pa.Table.from_pylist(rows, schema))


def _item(item: int) -> Row:
    return {"item_id": item, "image_uri": f"{item}.png", "category": "dress"}


def _version() -> Row:
    return {"image_generation": None, "image_size": 100, "image_mtime": WRITTEN}


def catalogue(*rows: Row) -> pa.Table:
    return _table(CATALOGUE, [{**_item(row["item_id"]), **row} for row in rows])


def embeddings(*rows: Row) -> pa.Table:
    """Makes `item_embeddings` of an earlier day."""
    return _table(
        EMBEDDINGS,
        [
            {
                **_item(row["item_id"]), **_version(),
                "image_sha256": digest(row["item_id"]), "embedding": vector(row["item_id"]),
                "in_catalogue": True, "left_catalogue_ds": None, **row,
            }
            for row in rows
        ],
    )  # fmt: skip


def rejects(*rows: Row) -> pa.Table:
    """Makes `item_rejects` of the day before DAY."""
    return _table(
        REJECTS,
        [
            {
                **_item(row["item_id"]), "stage": "decode", "reason": "truncated",
                "message": f"as it was, {row['item_id']}", "attempts": 1, "first_ds": day(-1),
                "last_ds": day(-1), "next_ds": DAY, **row,
            }
            for row in rows
        ],
    )  # fmt: skip


def images(*rows: Row) -> pa.Table:
    """Makes the table of images that are to be read."""
    given = {"known_sha256": None, "shard": 0}
    return _table(TO_READ, [{**_item(r["item_id"]), **_version(), **given, **r} for r in rows])


def results(*rows: Row) -> pa.Table:
    """Makes the table of what became of images: embedded on the CPU, where no row says else."""
    return _table(
        RESULTS,
        [
            {
                **_item(row["item_id"]), **_version(), "stage": None, "reason": None,
                "message": None, "image_sha256": digest(row["item_id"]),
                "embedding": vector(row["item_id"]), "is_read": True, "bytes_read": 100,
                "io_seconds": 0.25, "decode_seconds": 0.5, "is_embedded": True,
                "forward_seconds": 1.0, "shard": 0, "device": "cpu_fp32", **row,
            }
            for row in rows
        ],
    )  # fmt: skip


def reject(item: int, reason: str = "truncated") -> Row:
    """Makes a row of `results`: what became of an image that cannot be decoded."""
    return {
        "item_id": item, "stage": "decode", "reason": reason, "message": f"as it is, {item}",
        "embedding": None, "is_embedded": False, "forward_seconds": 0.0,
    }  # fmt: skip
