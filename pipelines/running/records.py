"""The record of a night: which versions of which tables together are the night of a day."""

import datetime as dt
import os
from collections.abc import Mapping
from typing import Any

from feature_jobs.store import files, partitions
from feature_jobs.store.documents import read_json
from feature_jobs.store.partitions import Partition
from pipelines.running.layout import night_path


def night_record(
    root: str,
    feature_set: str,
    ds: dt.date,
    partitions: list[Partition],
    before: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Which version of each table together is the night of ds, and which ones were before."""
    entries = {
        p.manifest["table"]: {
            "path": os.path.relpath(p.folder, root),
            "version": p.manifest["version"],
            "run_id": p.run_id,
            "rows": p.rows,
        }
        for p in partitions
    }
    return {"ds": str(ds), "feature_set": feature_set, "tables": entries, "before": before}


def read_night(root: str, feature_set: str, ds: dt.date) -> dict[str, Any] | None:
    """The record of a night, whole or not; None where there is none."""
    path = night_path(root, feature_set, ds)
    return read_json(path) if files.exists(path) else None


def is_whole_night(root: str, feature_set: str, ds: dt.date) -> bool:
    """Whether the night's record stands and every table is the version that it names."""
    record = read_night(root, feature_set, ds)
    return record is not None and all(
        partitions.is_published(os.path.join(root, entry["path"]))
        and partitions.open_published(os.path.join(root, entry["path"])).manifest["version"]
        == entry["version"]
        for entry in record["tables"].values()
    )
