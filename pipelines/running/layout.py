"""Says where everything of a feature set lies, and which days are there."""

import datetime as dt
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from feature_jobs.schemas import Table
from feature_jobs.store import documents, files, nights, partitions
from feature_jobs.store.day_names import DayNames
from feature_jobs.store.protocol import is_hidden
from pipelines.stages import JOIN, KINDS, Kind, join_of, kind_of

CHUNK_FOLDER = "chunks-"  # + digest: beside the folders of days, the chunk files that runs share
JOB_FOLDER = "job-"  # + its days and a digest: what one job for one day or many writes of its own
_SHARED = "shared"  # in the place of a feature set: tables that no encoder touches


@dataclass(frozen=True)
class Place:
    """Says where one partition is published, and where its earlier versions are kept.

    They lie outside the table's folder: a reader that descends into folders, as DuckDB does, must
    not take old rows with new ones.
    """

    folder: str
    kept: str


@dataclass(frozen=True)
class Layout:
    """Says where the tables and records of a feature set lie.

    Tables with user IDs, and what is written on the way to them, lie below `user_root`, all else
    below `root`: where the two differ, whoever may read items sees no users. `partition` names the
    folder of a day in each table, as `DayNames` does. A row group has at most `row_group_bytes`,
    uncompressed.
    """

    root: str
    feature_set: str
    user_root: str
    partition: str = "ds={ds}"
    row_group_bytes: int = partitions.ROW_GROUP_BYTES

    def of(self, feature_set: str) -> "Layout":
        """Returns where another feature set lies beside this one."""
        return replace(self, feature_set=feature_set)

    def beside(self) -> list["Layout"]:
        """Returns where other feature sets lie, and what else may be one."""
        names = [name for name in files.list_names(self.root) if name[0] != "_"]
        return [self.of(name) for name in names if name != self.feature_set]

    def candidate(self, encoder_id: str) -> "Layout":
        """Returns where the embeddings of an encoder lie that is not pinned yet."""
        return self.of(f"{self.feature_set}-candidate-{encoder_id.rpartition('-')[2]}")

    def candidates(self) -> list[str]:
        """Returns the feature sets of encoders that embedded beside this one's nights."""
        beside = f"{self.feature_set}-candidate-"
        return [name for name in files.list_names(self.root) if name.startswith(beside)]

    def feature_sets(self) -> list[str]:
        """Returns the feature sets that have published a night here."""
        return nights.feature_sets(self.root)

    def root_of(self, table: Table) -> str:
        """Returns the root below which a table lies."""
        return self.user_root if table.has_users else self.root

    def _top(self, table: Table) -> str:
        return _SHARED if table.shared else self.feature_set

    # -- Tables --

    def place(self, table: Table, ds: dt.date) -> Place:
        """Returns the place of one partition."""
        name = self._day_names.name_of(ds)
        root, within = self.root_of(table), os.path.join(self._of_table(table), name)
        return Place(os.path.join(root, within), os.path.join(root, "_versions", within))

    def folder(self, table: Table, ds: dt.date) -> str:
        """Returns the folder in which a partition is published."""
        return self.place(table, ds).folder

    @cached_property
    def _day_names(self) -> DayNames:
        return DayNames(self.partition)

    def training_sets(self) -> list[Table]:
        """Returns the training sets that are there, published or not, by name."""
        (joined,) = JOIN.tables
        names = files.list_names(os.path.join(self.root_of(joined), self._of_table(joined)))
        return [join_of(name).tables[0] for name in names if not is_hidden(name)]

    def _of_table(self, table: Table) -> str:
        return os.path.join(self._top(table), table.name)

    def begun_days(self, table: Table) -> list[dt.date]:
        """Returns the ds that have a folder, published or not, ascending."""
        return self._days_in(os.path.join(self.root_of(table), self._of_table(table)))

    def kept_days(self, table: Table) -> list[dt.date]:
        """Returns the ds of which earlier versions are kept, ascending."""
        return self._days_in(os.path.join(self.root_of(table), "_versions", self._of_table(table)))

    def _days_in(self, folder: str) -> list[dt.date]:
        names = files.list_names(folder)
        return sorted(day for name in names if (day := self._day_names.day_of(name)))

    def published_days(self, table: Table) -> list[dt.date]:
        """Returns the ds of all published partitions of a table, ascending."""
        days = self.begun_days(table)
        return [ds for ds in days if partitions.is_published(self.folder(table, ds))]

    # -- What is being made --

    def kind_folder(self, kind: Kind) -> str:
        """Returns the folder below which all runs of a kind of stage write, by days and by jobs.

        It is out of readers' sight. Each feature set has its own, so that they never meet half-way,
        and so have the tables that they share.
        """
        table = kind.tables[0]
        return os.path.join(self.root_of(table), "_staging", self._top(table), kind.name)

    def staging(self, kind: Kind, ds: dt.date, run_id: str) -> str:
        """Returns the staging folder of a run of a stage."""
        return os.path.join(self.kind_folder(kind), f"ds={ds}", run_id)

    def fit_folder(self, command: str, ds: dt.date, run_id: str) -> str:
        """Returns where a fit by one of our commands writes."""
        top = os.path.join(self.root, "_staging", self.feature_set)
        return os.path.join(top, command, f"ds={ds}", run_id)

    def job_folder(self, kind: Kind, days: Sequence[dt.date], run_ids: Sequence[str]) -> str:
        """Returns the folder of one job for consecutive days; the same job has the same one."""
        name = f"{JOB_FOLDER}{days[0]}-{days[-1]}-{documents.digest(list(run_ids))[:12]}"
        return os.path.join(self.kind_folder(kind), name)

    def lock_folders(self, tables: Sequence[Table], days: Sequence[dt.date]) -> list[str]:
        """Returns what is to be locked to write `tables` of `days`, in one order for all commands.

        Families come one after the other, as their stages do, and in each its days ascend: so two
        commands never wait for each other.
        """
        return [
            os.path.join(top, "_locks", name, f"ds={ds}")
            for family in dict.fromkeys(kind.family for kind in KINDS)
            for ds in sorted(days)
            for top, name in sorted(
                {
                    # Training sets are locked each by itself.
                    (os.path.join(self.root_of(table), self._top(table)),
                     family if table.key else table.name)
                    for table in tables if kind_of(table).family == family
                }
            )
        ]  # fmt: skip

    # -- Records --

    @property
    def _records(self) -> str:
        return os.path.join(self.root, self.feature_set)

    def night_path(self, ds: dt.date) -> str:
        """Returns where the record of a night lies."""
        return nights.record_path(self.root, self.feature_set, ds)

    @property
    def latest_path(self) -> str:
        """Returns where it is written which night is the newest."""
        return nights.latest_path(self.root, self.feature_set)

    def recorded_days(self) -> list[dt.date]:
        """Returns the ds of all nights that have a record, ascending."""
        return nights.recorded_days(self.root, self.feature_set)

    def hold_path(self, ds: dt.date) -> str:
        """Returns where the hold of a day lies, if there is one."""
        return os.path.join(self._records, "_holds", f"ds={ds}.json")

    def announced_path(self, ds: dt.date) -> str:
        """Returns where it is written which versions of a night were announced."""
        return os.path.join(self._records, "_announced", f"ds={ds}.json")

    def backfill_path(self, start: dt.date, end: dt.date, began: dt.datetime) -> str:
        """Returns where it is written how far a backfill of these days is, that `began` then."""
        name = f"{start}_{end}_{began:%Y%m%dT%H%M%S%f}.json"
        return os.path.join(self._records, "_backfills", name)

    def backfill_paths(self) -> list[str]:
        """Returns where it is written of all backfills how far they are."""
        folder = os.path.join(self._records, "_backfills")
        return [os.path.join(folder, name) for name in files.list_names(folder)]

    def backfill_lock(self, start: dt.date, end: dt.date) -> str:
        """Returns what a backfill of these days locks."""
        return os.path.join(self._records, "_locks", "backfill", f"{start}_{end}")

    def backfill_locks(self) -> list[tuple[dt.date, dt.date]]:
        """Returns the first and the last day of all backfills that have locked theirs."""
        names = files.list_names(os.path.join(self._records, "_locks", "backfill"))
        days = (name.split("_") for name in names)
        return [(dt.date.fromisoformat(one), dt.date.fromisoformat(other)) for one, other in days]

    def runs_folder(self, ds: dt.date) -> str:
        """Returns where it is written what runs did of a day, each in a folder of its run_id."""
        return os.path.join(self._records, "_runs", f"ds={ds}")


def days_of_job(name: str) -> tuple[dt.date, dt.date] | None:
    """Returns the first and the last day of a job by its folder's name; None for no such name."""
    found = re.fullmatch(JOB_FOLDER + r"(\d{4}-\d\d-\d\d)-(\d{4}-\d\d-\d\d)-[0-9a-f]+", name)
    return found and (dt.date.fromisoformat(found[1]), dt.date.fromisoformat(found[2]))


def job_of(attempt: str) -> str:
    """Returns the folder of the job of which a folder is an attempt."""
    return os.path.dirname(attempt)


def is_shared(folder: str) -> bool:
    """Returns whether a folder of `lock_folders` is that of tables other feature sets share."""
    top = os.path.dirname(os.path.dirname(os.path.dirname(folder)))
    return os.path.basename(top) == _SHARED


def date_of(name: str) -> dt.date | None:
    """Returns the date in a name ds=YYYY-MM-DD; None for a name that is none of ours."""
    try:
        return dt.date.fromisoformat(name.removeprefix("ds=").removesuffix(".json"))
    except ValueError:
        return None
