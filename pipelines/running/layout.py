"""Where everything lies below a root, and which days are there."""

import datetime as dt
import os
from collections.abc import Sequence

from feature_jobs.schemas import Table
from feature_jobs.store import files, partitions
from feature_jobs.store.partitions import Partition


def staging_folder(root: str, feature_set: str, name: str, ds: dt.date, run_id: str) -> str:
    """Out of readers' sight; apart for each feature set, so that they never meet half-way."""
    return os.path.join(root, "_staging", feature_set, name, f"ds={ds}", run_id)


def table_folder(root: str, feature_set: str, table: Table, ds: dt.date) -> str:
    """The folder of one partition: below `shared` for a table that no encoder touches."""
    return os.path.join(root, "shared" if table.shared else feature_set, table.name, f"ds={ds}")


def _date_of(name: str) -> dt.date | None:
    """The date in a folder's name ds=YYYY-MM-DD; None for a folder that is none of ours."""
    try:
        return dt.date.fromisoformat(name.removeprefix("ds="))
    except ValueError:
        return None


def feature_sets(root: str) -> list[str]:
    """The feature sets that have published a night below `root`."""
    names = [name for name in files.list_names(root) if name[0] != "_"]
    return [n for n in names if files.list_names(os.path.join(root, n, "_nights"))]


def begun_days(root: str, feature_set: str, table: Table) -> list[dt.date]:
    """The ds that have a folder, published or not, ascending."""
    folder = os.path.dirname(table_folder(root, feature_set, table, dt.date.min))
    names = [name for name in files.list_names(folder) if name.startswith("ds=")]
    return [day for day in map(_date_of, names) if day]


def published_days(root: str, feature_set: str, table: Table) -> list[dt.date]:
    """The ds of all published partitions of a table, ascending."""
    days = begun_days(root, feature_set, table)
    return [d for d in days if partitions.is_published(table_folder(root, feature_set, table, d))]


def latest_before(
    root: str, feature_set: str, wanted: Sequence[Table], ds: dt.date
) -> tuple[Partition, ...]:
    """The partitions of the newest day before ds that has all of the `wanted` tables, since those
    of several days do not go together; empty where the world begins."""
    for day in reversed(begun_days(root, feature_set, wanted[0])):
        folders = [table_folder(root, feature_set, table, day) for table in wanted]
        if day < ds and all(map(partitions.is_published, folders)):
            return tuple(map(partitions.open_published, folders))
    return ()


def night_path(root: str, feature_set: str, ds: dt.date) -> str:
    return os.path.join(root, feature_set, "_nights", f"ds={ds}.json")
