"""Says where everything lies below a root, and which days are there."""

import datetime as dt
import os
from collections.abc import Sequence
from dataclasses import dataclass

from feature_jobs.schemas import (
    ITEM_EMBEDDINGS,
    ITEM_FEATURES,
    ITEM_REJECTS,
    RECENT_CLICKS,
    TABLES,
    TRAINING_ROWS,
    USER_HISTORIES,
    USER_SIMSCORES,
    InputNotReady,
    Table,
)
from feature_jobs.store import files, partitions
from feature_jobs.store.partitions import MANIFEST, Partition

# The stages that make each table, by families of tables that are locked together, in the order in
# which their locks are taken.
_FAMILIES = {
    "items": {
        ITEM_EMBEDDINGS.name: "embed",
        ITEM_REJECTS.name: "embed",
        ITEM_FEATURES.name: "item-features",
    },
    "impressions": {
        USER_HISTORIES.name: "histories",
        RECENT_CLICKS.name: "histories",
        USER_SIMSCORES.name: "simscore",
    },
    "training": {TRAINING_ROWS.name: "training-rows"},
}

CHUNK_FOLDER = "chunks-"  # + digest: beside the folders of runs, the chunk files that they share


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


def staging_of(root: str, feature_set: str, table: Table, ds: dt.date, run_id: str) -> str:
    """Returns the staging folder of a run of the stage that makes `table`."""
    (stage,) = (members[table.name] for members in _FAMILIES.values() if table.name in members)
    return staging_folder(root, _top(feature_set, table), stage, ds, run_id)


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
        for family, members in _FAMILIES.items()
        for ds in sorted(days)
        for top in sorted({_top(feature_set, t) for t in tables if t.name in members})
    ]


def is_shared(folder: str) -> bool:
    """Returns whether a folder of `lock_folders` is that of tables other feature sets share."""
    top = os.path.dirname(os.path.dirname(os.path.dirname(folder)))
    return os.path.basename(top) == "shared"


def tables_of(stages: Sequence[str]) -> list[Table]:
    """Returns the tables that these stages make."""
    made_by = {name: stage for members in _FAMILIES.values() for name, stage in members.items()}
    return [TABLES[name] for name, stage in made_by.items() if stage in stages]


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


def latest_before(
    root: str, feature_set: str, wanted: Sequence[Table], ds: dt.date
) -> tuple[Partition, ...]:
    """Returns the partitions of the newest day before ds that has all of the `wanted` tables.

    Those of several days do not go together. Empty where the world begins. Raises InputNotReady
    where that day is being published anew just now: an older one would be taken in its place.
    """
    for day in reversed(begun_days(root, feature_set, wanted[0])):
        folders = [table_folder(root, feature_set, table, day) for table in wanted]
        if day >= ds:
            continue
        found = [
            partition for folder in folders if (partition := partitions.find_published(folder))
        ]
        if len(found) == len(wanted):
            return tuple(found)
        if all(files.exists(os.path.join(folder, MANIFEST)) for folder in folders):
            raise InputNotReady(
                f"ds {ds} goes on from ds {day}, whose {wanted[0].name} are being published anew "
                "just now, or were when a run of that day died. Run this command again when that "
                f"has ended, or `courier refresh --ds {day}` to end it."
            )
    return ()
