"""Opens a published night for whoever reads on: all of its tables, in the versions of that night.

    from feature_jobs.tables import NightNotReady, open_night

    night = open_night("features", "demo", "latest")
    clusters = night["item_features"].read(["item_id", "cluster_id"])

Days are published anew and brought back while others read. What is opened here is of one night,
whatever happens meanwhile: the night's record names a version of each table, and each file's name
carries its version. Where that cannot be had at this moment, NightNotReady says why.
"""

import datetime as dt
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import pyarrow as pa

from feature_jobs.schemas import TABLES, DataContractError, InputNotReady, OperatorError
from feature_jobs.store import files, nights, partitions
from feature_jobs.store.partitions import Partition

LATEST = "latest"

_TRIES = 5
_AT_ONCE = 16  # files that are read side by side
_UNREADABLE = (OSError, pa.ArrowException, UnicodeDecodeError)  # what Arrow raises of damage
T = TypeVar("T")


class NightNotReady(InputNotReady):
    """Says that a night is not there, or not any more as it was opened; asked again, it may be."""


@dataclass(frozen=True)
class NightTable:
    """Is one table of a night, in the night's version of it.

    Methods that read raise NightNotReady where files of it have gone since it was opened: the day
    was published anew, or pruned. Open the night again then.
    """

    name: str
    _partition: Partition

    @property
    def folder(self) -> str:
        """Returns the folder of the files, absolute or `gs://…`; it may hold others besides."""
        return self._partition.folder

    @property
    def version(self) -> str:
        """Returns the version, a digest of all rows, 12 hex digits: the same one, the same rows."""
        return self._partition.version

    @property
    def paths(self) -> list[str]:
        """Returns the full paths of all files, in the order of their rows."""
        return self._partition.paths

    @property
    def rows(self) -> int:
        """Returns the number of rows."""
        return self._partition.rows

    @property
    def schema(self) -> pa.Schema:
        """Returns the columns; each field's metadata has its "meaning"."""
        return self._reading(self.paths[0], lambda _: self._partition.schema)

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Returns all rows, of these columns in this order; None for all columns.

        Raises OperatorError where there is no such column, and DataContractError where a file is
        damaged so that it cannot be read. What is too large for memory is read by `read_files`, or
        by its `paths` with an engine.
        """
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            rows = pa.concat_tables(pool.map(self._reader(columns), self.paths))
        return rows if columns is None else rows.select(list(columns))

    def read_files(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Yields the rows of file after file; see `read`."""
        for rows in map(self._reader(columns), self.paths):
            yield rows if columns is None else rows.select(list(columns))

    def _reader(self, columns: Sequence[str] | None) -> Callable[[str], pa.Table]:
        """Returns what reads a file: at least one column of it, else Arrow counts no rows."""
        _refuse_text(columns, "columns")
        if columns is not None and not columns:
            columns = self.schema.names[:1]
        return partial(self._read_file, columns)

    def _read_file(self, columns: Sequence[str] | None, path: str) -> pa.Table:
        rows = self._reading(path, lambda path: partitions.read_parquet(path, columns))
        if missing := [name for name in columns or () if name not in rows.column_names]:
            raise OperatorError(
                f"{self.name} has no column {', '.join(map(repr, missing))}; it has "
                f"{', '.join(self.schema.names)}. Give `columns` a list of some of these."
            )
        return rows

    def _reading(self, path: str, read: Callable[[str], T]) -> T:
        try:
            return read(path)
        except FileNotFoundError as error:
            raise NightNotReady(
                f"{path} is not there any more: since this night was opened, its {self.name} was "
                "published anew, brought back or pruned. Nothing was read by halves. Open the "
                "night again, and read all that belongs together of that one."
            ) from error
        except _UNREADABLE as error:
            if isinstance(error, MemoryError) or getattr(error, "errno", None) is not None:
                raise  # of memory or of the disk; what is damaged, Arrow tells without a number
            raise DataContractError(
                f"{path} cannot be read as Parquet ({' '.join(str(error).split())}). COURIER "
                f"published it whole, so it was damaged since, and the rows of {self.name} are not "
                "all to be had. `courier validate` tells what else is damaged and what mends it."
            ) from error


@dataclass(frozen=True)
class Night:
    """Is a published night: its tables, by name, in the versions that belong together.

    `published_at` is when these versions of the feature set's own tables were first a night, UTC,
    None where an earlier version of COURIER did not note it. A night that was brought back has the
    time that it had.
    """

    ds: dt.date
    feature_set: str
    published_at: dt.datetime | None
    tables: Mapping[str, NightTable]
    _recorded: Collection[str]
    _pruned: Mapping[str, str]

    def __getitem__(self, table: str) -> NightTable:
        """Returns a table.

        Raises NightNotReady where this night has it no more, or was made without it, OperatorError
        where it was not among the `tables` that were opened, or no night has a table of that name.
        """
        if table in self.tables:
            return self.tables[table]
        _refuse_unknown([table])
        if table in self._recorded:
            raise OperatorError(
                f"{table} is part of the night of ds {self.ds}, but was not among the tables asked "
                f"for when it was opened: {', '.join(self.tables) or 'none'}. Open the night with "
                f"{table!r} among its `tables`, or without `tables` for all of them."
            )
        raise _without(table, self.ds, self._recorded, self._pruned)


def open_night(
    root: str,
    feature_set: str,
    ds: str | dt.date,
    *,
    tables: Sequence[str] | None = None,
    user_root: str | None = None,
) -> Night:
    """Opens the night of `ds`, YYYY-MM-DD or a date, or the newest one, "latest".

    `root` is `[output] root` of the shop's settings, a folder or `gs://…`, and `user_root` that of
    tables with user IDs, where it has one. Only the manifests of `tables` are looked at, all of the
    night's where none are named: who may not read those with user IDs names the others.

    Raises NightNotReady, and no other error, for what another moment may mend: there is no such
    night or table (a mistyped root or feature set looks the same; what is there is told), the day
    is being published just now, or a table of it was pruned. Raises OperatorError for what never
    is right, such as ds = "2026-02-30", DataContractError for a record or manifest that is damaged,
    and StorageUnavailable where the disk or bucket does not answer or refuses.
    """
    place = _Place(_folder(root), feature_set, _folder(user_root or root), user_root is not None)
    day = None if ds == LATEST else _day(ds)
    _refuse_text(tables, "tables")
    _refuse_unknown(tables or ())
    for _ in range(_TRIES):
        at = day or place.newest()
        path = nights.record_path(place.root, feature_set, at)
        data = files.read_if_there(path)
        if data is None:
            raise place.no_night(at) if day else place.lost_night(at)
        # Of a record that changed meanwhile, what was found of tables may be of either night.
        try:
            night = place.open(at, nights.parse_record(path, data), tables)
        except (NightNotReady, OperatorError):
            if files.read_if_there(path) == data:
                raise
        else:
            if files.read_if_there(path) == data:
                return night
    raise NightNotReady(
        f"The record of a night of {feature_set!r} below {place.root} changed {_TRIES} times while "
        "it was opened, so that its tables could not be told to belong together. It is being "
        "published or brought back again and again: ask again later."
    )


# ---- What was asked for ------------------------------------------------------------------------


def _folder(path: str) -> str:
    return files.absolute(files.expanded(path))


def _day(ds: str | dt.date) -> dt.date:
    try:
        day = dt.date.fromisoformat(str(ds))
        if str(day) == str(ds):
            return day
    except ValueError:
        pass
    raise OperatorError(
        f"ds is {str(ds)!r}, which is no day. Give a day as YYYY-MM-DD, a date without a time of "
        f'day, or "{LATEST}" for the newest night.'
    )


def _refuse_text(names: Sequence[str] | None, what: str) -> None:
    """Raises OperatorError for one name in the place of a list, which is one of letters else."""
    if isinstance(names, str):
        raise OperatorError(
            f"`{what}` is the text {names!r}, and should be a list of names. Give [{names!r}] for "
            "this one."
        )


def _refuse_unknown(tables: Sequence[str]) -> None:
    """Raises OperatorError for names that are those of no table of a night."""
    if unknown := [name for name in tables if name not in nights.NIGHT_TABLES]:
        raise OperatorError(
            f"There is no table {', '.join(map(repr, unknown))} in any night. `tables` is a list "
            f"of some of {', '.join(nights.NIGHT_TABLES)}."
        )


# ---- What is there -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """Says where the nights of a feature set lie; `has_user_root` where that was told."""

    root: str
    feature_set: str
    user_root: str
    has_user_root: bool

    def newest(self) -> dt.date:
        """Returns the ds of the newest night; raises NightNotReady where none is named."""
        path = nights.latest_path(self.root, self.feature_set)
        data = files.read_if_there(path)
        if data is None:
            raise self.no_night(None)
        return dt.date.fromisoformat(nights.parse_record(path, data)["ds"])

    def no_night(self, ds: dt.date | None) -> NightNotReady:
        """Returns the error for a night, None for the newest one, that is not there."""
        what = f"no night of ds {ds}" if ds else "no newest night"
        what = f"There is {what} of the feature set {self.feature_set!r} below {self.root}: "
        if days := nights.recorded_days(self.root, self.feature_set):
            if ds is None:
                return NightNotReady(
                    f"{what}no latest.json names one, as an earlier version of COURIER published "
                    f"them. Ask for a day, such as the newest there, {days[-1]}; `courier refresh "
                    f"--ds {days[-1]}` writes latest.json."
                )
            return NightNotReady(
                f"{what}the newest there is that of {days[-1]}, the oldest that of {days[0]}. Ask "
                "again when it is published, or for one of these."
            )
        if not files.is_folder(self.root):
            return NightNotReady(
                f"{what}there is no such folder. Give the `root` of [output] in the shop's "
                "settings, or ask again when a first night is published."
            )
        others = nights.feature_sets(self.root)
        there = f"nights of {', '.join(map(repr, others))}" if others else "no nights"
        return NightNotReady(
            f"{what}there are {there}. Give the `root` and `feature_set` of the shop's settings, "
            "or ask again when a first night is published."
        )

    def lost_night(self, ds: dt.date) -> NightNotReady:
        """Returns the error for a newest night that has no record."""
        record = nights.record_path(self.root, self.feature_set, ds)
        return NightNotReady(
            f"{nights.latest_path(self.root, self.feature_set)} names ds {ds} as the newest night, "
            f"but its record, {record}, is gone, so that nobody can tell whether its tables belong "
            f"together. Restore that file, or say `courier refresh --ds {ds}`, which writes it "
            "anew, and ask again. Any other night can be opened by its ds."
        )

    def open(self, ds: dt.date, record: Mapping[str, Any], wanted: Sequence[str] | None) -> Night:
        """Opens the tables that a record names; raises what is wrong with them if it stands."""
        pruned, entries = record.get("pruned", {}), record["tables"]
        opened = dict[str, NightTable]()
        for name in entries if wanted is None else wanted:
            if name not in entries:
                raise _without(name, ds, entries, pruned)
            opened[name] = self._open_table(ds, name, entries[name])
        if not entries and pruned:
            raise _without(next(iter(pruned)), ds, [], pruned)
        at = record["published_at"]
        published_at = dt.datetime.fromisoformat(at) if at else None
        return Night(ds, self.feature_set, published_at, opened, tuple(entries), pruned)

    def _open_table(self, ds: dt.date, name: str, entry: Mapping[str, Any]) -> NightTable:
        has_users = name in TABLES and TABLES[name].has_users
        folder = os.path.join(self.user_root if has_users else self.root, entry["path"])
        found = partitions.find_published(folder)
        if found and found.version == entry["version"]:
            return NightTable(name, found)
        if has_users and not self.has_user_root and not files.is_folder(folder):
            raise OperatorError(
                f"{name} of ds {ds} is part of the night, but there is no {folder}: tables with "
                "user IDs lie below the `user_root` of [output] in the shop's settings, where it "
                "has one. Give that as `user_root`, or name the `tables` that you read."
            )
        raise NightNotReady(
            f"The night of ds {ds} of {self.feature_set!r} consists of {name} as version "
            f"{entry['version']}, but at {folder} it is "
            + (f"as version {found.version}. " if found else "not whole. ")
            + self._why_other(ds, name, found)
        )

    def _why_other(self, ds: dt.date, name: str, found: Partition | None) -> str:
        """Returns why a table may be another than the night's, and what to do."""
        if found and name in TABLES and TABLES[name].shared:
            return (
                "Feature sets share it: another one, or a stage that was run alone, such as "
                "`courier histories`, made it again since, unless this night is being published "
                f"just now. `courier refresh --ds {ds}` of {self.feature_set!r} takes it into the "
                "night; ask again then."
            )
        return (
            "The day is being published or brought back just now, or a run died at it: its tables "
            "follow one another. Ask again; `courier status` tells what is unfinished."
        )


def _without(
    table: str, ds: dt.date, there: Collection[str], pruned: Mapping[str, str]
) -> NightNotReady:
    """Returns the error for a table that a night does not have."""
    has = f"it has {', '.join(there)}" if there else "nothing of it is left"
    if table in pruned:
        return NightNotReady(
            f"{table} of ds {ds} was pruned at {pruned[table]}, as [retention] in the shop's "
            f"settings says; {has}. Read a later day, or make it again with `courier refresh --ds "
            f"{ds}`."
        )
    return NightNotReady(
        f"The night of ds {ds} was made without {table}; {has}. Read only these, or ask again when "
        "it was made with it."
    )
