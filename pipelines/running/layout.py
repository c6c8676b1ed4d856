"""Says where everything lies below a root, and which days are there."""

import datetime as dt
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from feature_jobs.schemas import Table
from feature_jobs.store import documents, files, partitions
from pipelines.stages import KINDS, Kind, kind_of

CHUNK_FOLDER = "chunks-"  # + digest: beside the folders of days, the chunk files that runs share
JOB_FOLDER = "job-"  # + its days and a digest: what one job for one day or many writes of its own


@dataclass(frozen=True)
class Place:
    """Says where one partition is published, and where its earlier versions are kept.

    They lie outside the table's folder: a reader that descends into folders, as DuckDB does, must
    not take old rows with new ones.
    """

    folder: str
    kept: str


def staging_folder(root: str, feature_set: str, name: str, ds: dt.date, run_id: str) -> str:
    """Returns where a run writes, out of readers' sight.

    Each feature set has its own, so that they never meet half-way, and so have tables they share.
    """
    return os.path.join(root, "_staging", feature_set, name, f"ds={ds}", run_id)


def staging_of(root: str, feature_set: str, kind: Kind, ds: dt.date, run_id: str) -> str:
    """Returns the staging folder of a run of a stage."""
    return staging_folder(root, _top(feature_set, kind.tables[0]), kind.name, ds, run_id)


def kind_folder(root: str, feature_set: str, kind: Kind) -> str:
    """Returns the folder below which all runs of a kind of stage write, by days and by jobs."""
    return os.path.join(root, "_staging", _top(feature_set, kind.tables[0]), kind.name)


def job_folder(
    root: str, feature_set: str, kind: Kind, days: Sequence[dt.date], run_ids: Sequence[str]
) -> str:
    """Returns the folder of one job for consecutive days; the same job has the same one."""
    name = f"{JOB_FOLDER}{days[0]}-{days[-1]}-{documents.digest(list(run_ids))[:12]}"
    return os.path.join(kind_folder(root, feature_set, kind), name)


def days_of_job(name: str) -> tuple[dt.date, dt.date] | None:
    """Returns the first and the last day of a job by its folder's name; None for no such name."""
    found = re.fullmatch(JOB_FOLDER + r"(\d{4}-\d\d-\d\d)-(\d{4}-\d\d-\d\d)-[0-9a-f]+", name)
    return found and (dt.date.fromisoformat(found[1]), dt.date.fromisoformat(found[2]))


def place_of(root: str, feature_set: str, table: Table, ds: dt.date) -> Place:
    """Returns the place of one partition."""
    within = os.path.join(_top(feature_set, table), table.name, f"ds={ds}")
    return Place(os.path.join(root, within), os.path.join(root, "_versions", within))


def table_folder(root: str, feature_set: str, table: Table, ds: dt.date) -> str:
    """Returns the folder of one partition: below `shared` for a table that no encoder touches."""
    return place_of(root, feature_set, table, ds).folder


def _top(feature_set: str, table: Table) -> str:
    return "shared" if table.shared else feature_set


def lock_folders(
    root: str, feature_set: str, tables: Sequence[Table], days: Sequence[dt.date]
) -> list[str]:
    """Returns what is to be locked to write `tables` of `days`, in the one order of all commands.

    Families come one after the other, as their stages do, and in each its days ascend: so two
    commands never wait for each other.
    """
    return [
        os.path.join(root, top, "_locks", family, f"ds={ds}")
        for family in dict.fromkeys(kind.family for kind in KINDS)
        for ds in sorted(days)
        for top in sorted({_top(feature_set, t) for t in tables if kind_of(t).family == family})
    ]


def is_shared(folder: str) -> bool:
    """Returns whether a folder of `lock_folders` is that of tables other feature sets share."""
    top = os.path.dirname(os.path.dirname(os.path.dirname(folder)))
    return os.path.basename(top) == "shared"


def night_path(root: str, feature_set: str, ds: dt.date) -> str:
    """Returns where the record of a night lies."""
    return os.path.join(root, feature_set, "_nights", f"ds={ds}.json")


def hold_path(root: str, feature_set: str, ds: dt.date) -> str:
    """Returns where the hold of a day lies, if there is one."""
    return os.path.join(root, feature_set, "_holds", f"ds={ds}.json")


# ---- Which days are there --------------------------------------------------------------------


def date_of(name: str) -> dt.date | None:
    """Returns the date in a name ds=YYYY-MM-DD; None for a name that is none of ours."""
    try:
        return dt.date.fromisoformat(name.removeprefix("ds=").removesuffix(".json"))
    except ValueError:
        return None


def feature_sets(root: str) -> list[str]:
    """Returns the feature sets that have published a night below `root`."""
    names = [name for name in files.list_names(root) if name[0] != "_"]
    return [n for n in names if files.list_names(os.path.join(root, n, "_nights"))]


def begun_days(root: str, feature_set: str, table: Table) -> list[dt.date]:
    """Returns the ds that have a folder, published or not, ascending."""
    folder = os.path.dirname(table_folder(root, feature_set, table, dt.date.min))
    names = [name for name in files.list_names(folder) if name.startswith("ds=")]
    return [day for day in map(date_of, names) if day]


def published_days(root: str, feature_set: str, table: Table) -> list[dt.date]:
    """Returns the ds of all published partitions of a table, ascending."""
    days = begun_days(root, feature_set, table)
    return [d for d in days if partitions.is_published(table_folder(root, feature_set, table, d))]
