"""Finds and checks the shop's own tables, catalogue and impressions, and brings them to one form.

What a footer can tell (no such partition, a missing column, a wrong type) is refused by the
launcher before any worker starts; what only the rows can tell (a null, an event after its day) by
the worker that reads them. Beyond this module an ID is int64 or string, a time timestamp[us, UTC]
of the years 1 to 9999, and a click a bool.
"""

import contextlib
import datetime as dt
import difflib
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, TypeVar
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from feature_jobs.schemas import TIMESTAMP, DataContractError, InputNotReady, OperatorError
from feature_jobs.store import addresses, day_names, documents, files
from feature_jobs.store.day_names import DayNames
from feature_jobs.store.faults import patiently
from feature_jobs.store.files import FileInfo

_FOOTER_READERS = 16
_BUFFER_BYTES = 8 << 20
CATALOGUE_COLUMNS = ("item_id", "image_uri", "category")
PARQUET_ENDINGS = (".parquet", ".parq", ".pq")
IMPRESSION_COLUMNS = ("user_id", "item_id", "event_time", "clicked")
SAMPLE_COLUMNS = IMPRESSION_COLUMNS[:3]
VECTOR_COLUMNS = ("item_id", "vector")
_REQUIRED = {
    "catalogue": CATALOGUE_COLUMNS, "impressions": IMPRESSION_COLUMNS, "samples": SAMPLE_COLUMNS,
    "vectors": VECTOR_COLUMNS,
}  # fmt: skip
_NULLABLE = ("image_uri", "category", "title", "click_time", "request_id", "history", "vector")
_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
# The years 1 to 9999, which Python can print, less a day, so that no time zone leaves them.
_FIRST_SECOND, _LAST_SECOND = -62_135_510_400, 253_402_214_400
# What pyarrow raises for damaged bytes; a damaged footer may name impossible types or columns.
_UNREADABLE = (pa.ArrowInvalid, pa.ArrowNotImplementedError, UnicodeDecodeError, OSError)

T = TypeVar("T")


@dataclass(frozen=True)
class Form:
    """Says how to read one input table of one ds.

    `columns` maps our names to the shop's, for the columns that are there; `carry` names columns of
    the shop's to pass through; `rewrite` has pairs of prefixes of image_uri (`addresses`).
    """

    table: str
    ds: dt.date
    columns: Mapping[str, str]
    carry: tuple[str, ...] = ()
    input_timezone: str | None = None
    rewrite: addresses.Pairs = ()


@dataclass(frozen=True)
class RowGroup:
    """Refers to one row group: what travels through Beam instead of its rows."""

    path: str
    index: int
    form: Form


@dataclass(frozen=True)
class Source:
    """Describes the files of one input table of one ds, checked by their footers.

    ID types are None where there is no file to tell. `checksums` are those of the files' bytes.
    Of a catalogue, so many rows have an image_uri; None where footers don't tell.
    """

    form: Form
    paths: tuple[str, ...]
    row_groups: tuple[tuple[int, ...], ...]  # the rows of each, by file
    rows: int
    checksums: tuple[str, ...]
    item_id: pa.DataType | None
    user_id: pa.DataType | None
    impression_id: pa.DataType | None
    request_id: pa.DataType | None
    carried: tuple[pa.Field, ...]
    image_uris: int | None = None

    def groups(self) -> list[RowGroup]:
        return [
            RowGroup(path, index, self.form)
            for path, groups in zip(self.paths, self.row_groups, strict=True)
            for index in range(len(groups))
        ]

    def identity(self) -> dict[str, object]:
        """Returns what changes the id of a run that reads these files; it fits into a manifest.

        Where they lie does not: a shop that has moved is the same.
        """
        form, count = self.form, len(self.paths)
        settings = [sorted(form.columns.items()), form.carry, form.input_timezone]
        digest = documents.digest(sorted(self.checksums))[:16]
        read_as = documents.digest(settings)[:16]
        found = {"ds": str(form.ds), "files": count, "rows": self.rows, "digest": digest}
        return {**found, "read_as": read_as}


# ---- Finding -------------------------------------------------------------------------------


def find_files(
    table: str, template: str, ds: dt.date, require_success: bool, closed: bool = False
) -> list[str]:
    """Returns the paths of the files of one ds, as `list_files` finds them."""
    return [file.path for file in list_files(table, template, ds, require_success, closed)]


def list_files(
    table: str, template: str, ds: dt.date, require_success: bool, closed: bool = False
) -> list[FileInfo]:
    """Returns the files of one ds; none for an empty day.

    A `template` (`day_names`) is that of files, or of a folder, of which those that are Parquet by
    their names are taken. An empty day has a `_SUCCESS` and no file, or is one without a file on
    which the shop was `closed`; a catalogue may have been written all the same.

    Raises InputNotReady where there is no partition, or no `_SUCCESS` although it is required,
    OperatorError for impressions of a day on which the shop was closed, and DataContractError for
    a day that is marked as whole and has other files only.
    """
    typed = day_names.name_of(template, ds)
    found, folder = _look(typed)
    if closed and found and table == "impressions":
        raise OperatorError(
            f"closed_days in the settings names {ds}, but the {table} table has files of that day, "
            f"such as {found[0].path}. To pass them over would lose what they hold. Take the day "
            "out of closed_days, or the files away."
        )
    if closed and not found:
        return []
    done = _has_success(folder)
    others = "" if found else _others(template, typed, folder)
    if others and done:
        raise DataContractError(
            f"The {table} partition of ds {ds} has a _SUCCESS and {others}, but none at {folder} "
            f"that is {_asked(typed, folder)}. Taken for an empty day, it would publish empty "
            f"tables. Correct {_setting(table, 'path')}."
        )
    if not done and (require_success or not found):
        missing = "no _SUCCESS" if found else "no file and no _SUCCESS"
        beside = f" (there is {others})" if others else ""
        raise InputNotReady(
            f"The {table} table has no partition for ds {ds} yet: {missing} at {folder}; "
            f"{_asked(typed, folder)} was looked for{beside}. Without it the features of that day "
            "would be made from nothing. Run the command again when the partition is there, or "
            f"correct {_setting(table, 'path')}. If the shop was closed on that day, say so: "
            f'closed_days = ["{ds}"] in the settings, or a _SUCCESS in the empty folder.'
        )
    return found


def _setting(table: str, key: str) -> str:
    """Names what an operator says of a table: by a setting, or of some by an option."""
    options = {
        "samples": {
            "path": "--samples", "columns": "--user-id, --item-id or --time",
            "input_timezone": "Say which it is: --timezone UTC, for example.",
            "carry": "the samples",
        },
        "vectors": {
            "path": "--path of `courier register-vectors`",
            "columns": "--item or --vector of `courier register-vectors`",
            "carry": "the table of vectors",
        },
    }  # fmt: skip
    settings = {
        "path": f"[{table}] path in the settings",
        "columns": f"[{table}.columns] in the settings",
        "input_timezone": f"Set input_timezone under [{table}], for example input_timezone = "
        '"UTC".',
        "carry": f"carry under [{table}] in the settings",
    }
    return options.get(table, settings)[key]


def find_days(template: str) -> list[dt.date]:
    """Returns the days of which a table has a file, ascending; the template has a day."""
    names = DayNames(template)
    found = [file.path for file in files.glob(names.glob())]
    found = found or [os.path.dirname(file.path) for file in _parquet_in(names.glob())]
    return sorted({day for path in found if (day := names.day_of(path))})


def is_marked_whole(template: str, ds: dt.date) -> bool:
    """Tells whether a `_SUCCESS` lies beside the files of ds."""
    return _has_success(_look(day_names.name_of(template, ds))[1])


def is_parquet_name(path: str) -> bool:
    """Tells whether a file is Parquet by its name: Hive and Trino give theirs no ending."""
    name = os.path.basename(path)
    return name.lower().endswith(PARQUET_ENDINGS) or "." not in name


def _look(typed: str) -> tuple[list[FileInfo], str]:
    """Returns the files of a day, and a pattern of the folder where its `_SUCCESS` would lie.

    What is typed is matched as typed. Only what is no file is a folder, whatever its name is:
    Spark calls folders log.parquet.
    """
    above = os.path.dirname(typed).removesuffix("/**")
    if found := files.glob(typed):
        return found, above
    if _names_files(typed) and not files.find(os.path.join(typed, "*")):
        return [], above
    return _parquet_in(typed), typed


def _parquet_in(folder: str) -> list[FileInfo]:
    found = files.glob(os.path.join(folder, "*"))
    return [file for file in found if is_parquet_name(file.path)]


def _names_files(typed: str) -> bool:
    name = re.sub(r"\[[*?[]\]", "", os.path.basename(typed))  # "[[]" is a bracket, no wildcard
    return name.lower().endswith(PARQUET_ENDINGS) or bool(re.search(r"[*?[]", name))


def _has_success(folder: str) -> bool:
    return bool(files.find(os.path.join(folder, "_SUCCESS")))


def _asked(typed: str, folder: str) -> str:
    """Describes the names that are looked for."""
    if folder != typed:
        return os.path.basename(typed)
    return f"a name with the ending {', '.join(PARQUET_ENDINGS)} or none"


def _others(template: str, typed: str, folder: str) -> str:
    """Describes what lies where the files of a day were looked for, files of other days aside."""
    others = files.glob(os.path.join(folder, "*"))
    if not others and folder == typed:
        others = files.glob(os.path.join(folder, "*", "*"))
    if day_names.has_day(template):
        others = [file for file in others if not DayNames(template).day_of(file.path)]
    return f"{len(others):,} other file(s), such as {others[0].path}" if others else ""


def earliest_event(source: Source) -> int | None:
    """Returns a moment, in microseconds, not after any event of a partition; None without rows.

    It is told by footers, of times without a zone up to a day too early; else times are read.
    Raises DataContractError for times before the year 1.
    """
    groups = {(group.path, group.index): group for group in source.groups()}
    footers = _read_all(read_footer, source.paths)
    todo = [
        (groups[path, index], footer.row_group(index))
        for path, (footer, _) in zip(source.paths, footers, strict=True)
        for index in range(footer.num_row_groups)
    ]
    with ThreadPoolExecutor(_FOOTER_READERS) as pool:
        found = list(pool.map(lambda one: _earliest_of(*one), todo))
    return min((moment for moment in found if moment is not None), default=None)


def _earliest_of(group: RowGroup, told: pq.RowGroupMetaData) -> int | None:
    column = group.form.columns["event_time"]
    leaves = (told.column(at) for at in range(told.num_columns))
    statistics = next(leaf.statistics for leaf in leaves if leaf.path_in_schema == column)
    with contextlib.suppress(OverflowError, ValueError):  # of years that Python does not know
        if statistics is not None and statistics.has_min_max:
            first: dt.datetime = statistics.min
            if not first.tzinfo:
                first = first.replace(tzinfo=dt.UTC) - dt.timedelta(days=1)
            return int(first.timestamp()) * 1_000_000
    times = read_rows(group, ["event_time"])["event_time"].cast(pa.int64())
    return int(pc.min(times).as_py()) if len(times) else None


# ---- Checking what footers tell --------------------------------------------------------------


def open_source(
    table: str,
    template: str,
    ds: dt.date,
    columns: Mapping[str, str],
    carry: Sequence[str] = (),
    input_timezone: str | None = None,
    require_success: bool = False,
    named: Iterable[str] = (),
    closed: bool = False,
    rewrite: addresses.Pairs = (),
    optional: Iterable[str] = (),
) -> Source:
    """Finds and checks one input partition by its footers alone.

    `named` are columns that the settings name, and which therefore must be there; those that are
    `optional` need not be. Of a day on which the shop was `closed` nothing is waited for. `rewrite`
    tells where images are whose addresses are in the web; it changes no identity, since the places
    that it names may move.

    Raises InputNotReady (no partition; no row and no `_SUCCESS`), DataContractError (unreadable
    file, missing column, wrong type, files that differ) or OperatorError (naive times without
    `input_timezone`, impressions of a closed day).
    """
    paths = find_files(table, template, ds, require_success, closed)
    footers, checksums = _read_all(read_footer, paths), tuple(_read_all(files.checksum, paths))
    rows = sum(metadata.num_rows for metadata, _ in footers)
    if not rows and not (closed and not paths) and not is_marked_whole(template, ds):
        raise InputNotReady(
            f"The {table} table of ds {ds} has files but no row, and no _SUCCESS to say that this "
            "is all. An empty day is published only when it is marked as whole: write the "
            "_SUCCESS, or wait for the rows."
        )
    needed = [name for name in _REQUIRED[table] if name not in optional]
    required = tuple(dict.fromkeys([*needed, *named]))
    found = [
        check_schema(table, path, schema, columns, required, carry, input_timezone)
        for path, (_, schema) in zip(paths, footers, strict=True)
    ]
    check_alike(table, paths, footers, found, carry)
    present = found[0] if found else {}
    first = footers[0][1] if footers else None
    return Source(
        Form(table, ds, present, tuple(carry), input_timezone, rewrite),
        tuple(paths),
        tuple(group_rows(metadata) for metadata, _ in footers),
        rows,
        checksums,
        item_id=same_id_type("item_id", present, paths, footers),
        user_id=same_id_type("user_id", present, paths, footers),
        impression_id=same_id_type("impression_id", present, paths, footers),
        request_id=same_id_type("request_id", present, paths, footers),
        carried=tuple(pa.field(c, plain_type(first.field(c).type)) for c in carry) if first else (),
        image_uris=_values_in(present.get("image_uri"), [metadata for metadata, _ in footers]),
    )


def group_rows(footer: pq.FileMetaData) -> tuple[int, ...]:
    return tuple(footer.row_group(at).num_rows for at in range(footer.num_row_groups))


def _values_in(column: str | None, footers: Sequence[pq.FileMetaData]) -> int | None:
    """Returns how many values other than null a flat column has; None where footers don't tell."""
    values = 0
    for footer in footers:
        paths = [footer.schema.column(at).path for at in range(footer.num_columns)]
        if column not in paths:
            return None
        at = paths.index(column)
        for group in range(footer.num_row_groups):
            told = footer.row_group(group).column(at).statistics
            if told is None or not told.has_null_count:
                return None
            values += footer.row_group(group).num_rows - told.null_count
    return values


def read_footer(path: str) -> tuple[pq.FileMetaData, pa.Schema]:
    """Raises DataContractError where `path` is no Parquet file."""

    def read() -> tuple[pq.FileMetaData, pa.Schema]:
        with files.open_input(path) as data, _open_parquet(data) as file:
            return file.metadata, file.schema_arrow

    try:
        return patiently(path, read)
    except _UNREADABLE as error:
        raise unreadable(path, error) from error


def _read_all(read: Callable[[str], T], paths: Sequence[str]) -> list[T]:
    if len(paths) == 1:  # of many small days, threads would take longer
        return [read(paths[0])]
    with ThreadPoolExecutor(_FOOTER_READERS) as pool:
        return list(pool.map(read, paths))


def _open_parquet(data: IO[bytes], int96_unit: str = "us") -> pq.ParquetFile:
    """Opens a Parquet file; INT96 times become microseconds, since nanoseconds end in 2262."""
    return pq.ParquetFile(
        data, coerce_int96_timestamp_unit=int96_unit, arrow_extensions_enabled=False
    )


def unreadable(path: str, error: Exception) -> DataContractError:
    if isinstance(error, FileNotFoundError):
        return DataContractError(
            f"{path} is gone since the partition was listed. Features made without its rows would "
            "be silently wrong. Wait until the partition is written to its end, and run the "
            "command again."
        )
    if "Expected all lists to be of size" in str(error):
        return DataContractError(
            f"{path} has a null in a column of lists of a fixed size, which pyarrow cannot read "
            f"({_first_line(error)}). Write the column as lists of any size, or without nulls."
        )
    return DataContractError(
        f"{path} cannot be read as Parquet ({_first_line(error)}). It is damaged or was not "
        "written to its end; features made without its rows would be silently wrong. Write the "
        "file again, or take it out of the partition."
    )


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def check_schema(
    table: str,
    path: str,
    schema: pa.Schema,
    columns: Mapping[str, str],
    required: Sequence[str],
    carry: Sequence[str],
    input_timezone: str | None,
) -> dict[str, str]:
    """Returns the columns of one file that we use, our name to the shop's.

    Raises DataContractError for a missing column, two of one name, or one of a wrong type.
    """
    for name in [*(columns[ours] for ours in required), *carry]:
        if name not in schema.names:
            near = difflib.get_close_matches(name, schema.names, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise DataContractError(
                f"The {table} table lacks the column {name!r} in {path}; it has "
                f"{', '.join(schema.names)}.{hint} Add the column, or name the right one by "
                f"{_setting(table, 'columns')}."
            )
    present = {ours: theirs for ours, theirs in columns.items() if theirs in schema.names}
    for name in [*present.values(), *carry]:
        if schema.names.count(name) > 1:
            raise DataContractError(
                f"The {table} table has {schema.names.count(name)} columns called {name!r} in "
                f"{path}, as a join without suffixes leaves them. Which of them is meant cannot be "
                "told. Rename or drop one where the table is written."
            )
    for ours, theirs in present.items():
        found = schema.field(theirs).type
        if not _type_fits(ours, found):
            raise DataContractError(
                f"The column {theirs!r} of the {table} table has type {found} in {path}, but "
                f"{ours} must be {_EXPECTED[ours]}. Cast it where the table is written."
            )
        if pa.types.is_timestamp(found) and found.tz is None:
            _check_zone(table, path, theirs, found, input_timezone)
    for name in carry:
        found = schema.field(name).type
        if not _can_be_plain(found):
            raise DataContractError(
                f"The column {name!r} of the {table} table has type {found} in {path}, which "
                "cannot be carried: its rows cannot be read or sorted. Cast it where the table is "
                f"written, or take it out of {_setting(table, 'carry')}."
            )
    if {"item_id", "history"} <= present.keys():
        one = id_type(schema.field(present["item_id"]).type)
        two = id_type(plain_type(schema.field(present["history"]).type).value_type)
        if one != two:
            inside = f"inside the lists of {present['history']!r}"
            raise _id_clash("item_id", f"{one} in {path}", f"{two} {inside} there")
    return present


def _check_zone(
    table: str, path: str, column: str, found: pa.DataType, input_timezone: str | None
) -> None:
    """Raises OperatorError where naive times have no `input_timezone`, or pyarrow has no such."""
    if input_timezone is None:
        raise OperatorError(
            f"The column {column!r} of the {table} table holds times without a time zone "
            f"({found}) in {path}. Taken for the wrong zone they would shift every click by "
            f"hours, past impressions that they followed. {_setting(table, 'input_timezone')}"
        )
    try:
        to_utc(pa.chunked_array([[0]], pa.timestamp("us")), input_timezone)
    except pa.ArrowInvalid as error:
        raise OperatorError(
            f"The times in the column {column!r} of the {table} table have no zone, and pyarrow "
            f"cannot read them as of {input_timezone} ({_first_line(error)}). This machine, or its "
            "image, lacks the operating system's time-zone database. Install it, for example "
            "`apt-get install tzdata`, here and in the image of the workers."
        ) from error


def check_alike(
    table: str,
    paths: Sequence[str],
    footers: Sequence,
    present: Sequence[Mapping[str, str]],
    carry: Sequence[str],
) -> None:
    """Raises DataContractError where files of one partition cannot be joined into one table.

    `present` are the columns of each file that we use. An optional column stands in all files or
    in none, and a column of IDs or a carried one has the same type in all.
    """
    kinds = [
        _kinds(schema, columns, carry)
        for (_, schema), columns in zip(footers, present, strict=True)
    ]
    for path, other in zip(paths[1:], kinds[1:], strict=True):
        for name in kinds[0] | other:
            one, two = kinds[0].get(name, "missing"), other.get(name, "missing")
            if one != two:
                raise DataContractError(
                    f"The column {name!r} of the {table} table is {one} in {paths[0]} but {two} in "
                    f"{path}. Rows of all files are joined, and IDs of two types never meet. Write "
                    f"all files of a day alike, for IDs as in CAST({name} AS BIGINT)."
                )


def _kinds(
    schema: pa.Schema, present: Mapping[str, str], carry: Sequence[str]
) -> dict[str, object]:
    """Returns what must be alike in all files, by column of the shop's.

    That is the type of the IDs in a column of IDs, the exact type of a carried column, and for any
    other column that it is there.
    """
    found: dict[str, object] = {}
    for ours, theirs in present.items():
        kind = plain_type(schema.field(theirs).type)
        is_id = _EXPECTED[ours].endswith(_ID)
        found[theirs] = id_type(kind.value_type if _is_list(kind) else kind) if is_id else "there"
    return found | {name: plain_type(schema.field(name).type) for name in carry}


_ID = "int64 or string"
_EXPECTED = {
    "item_id": _ID, "user_id": _ID,
    "image_uri": "string", "category": "string", "title": "string",
    "event_time": "a timestamp", "click_time": "a timestamp", "clicked": "bool, or int 0 and 1",
    "impression_id": _ID, "request_id": _ID, "history": f"a list of {_ID}",
    "vector": "a list of floats, or bytes",
}  # fmt: skip


def _type_fits(ours: str, found: pa.DataType) -> bool:
    kinds = {
        "string": _is_string,
        "a timestamp": pa.types.is_timestamp,
        "bool, or int 0 and 1": lambda t: pa.types.is_boolean(t) or pa.types.is_integer(t),
        _ID: lambda t: id_type(t) is not None,
        f"a list of {_ID}": lambda t: _is_list(t) and id_type(t.value_type) is not None,
        "a list of floats, or bytes": lambda t: is_float_list(t) or is_bytes(t),
    }
    return bool(kinds[_EXPECTED[ours]](plain_type(found))) and _can_be_plain(found)


def plain_type(found: pa.DataType) -> pa.DataType:
    """Returns the type that a column is brought to, in which its rows can be taken and sorted.

    It has no dictionaries, views of text or bytes, or extension types (as of JSON and UUIDs), at no
    depth: their values and their storage stand in their places.
    """
    if isinstance(found, pa.BaseExtensionType):
        return plain_type(found.storage_type)
    if pa.types.is_dictionary(found):
        return plain_type(found.value_type)
    if pa.types.is_string_view(found):
        return pa.string()
    if pa.types.is_binary_view(found):
        return pa.binary()
    if pa.types.is_struct(found):
        return pa.struct([_plain_field(field) for field in found])
    if pa.types.is_map(found):
        return pa.map_(_plain_field(found.key_field), _plain_field(found.item_field))
    if pa.types.is_fixed_size_list(found):
        return pa.list_(_plain_field(found.value_field), found.list_size)
    if pa.types.is_list(found):
        return pa.list_(_plain_field(found.value_field))
    if pa.types.is_large_list(found):
        return pa.large_list(_plain_field(found.value_field))
    return found


def _plain_field(field: pa.Field) -> pa.Field:
    return field.with_type(plain_type(field.type))


def _can_be_plain(found: pa.DataType) -> bool:
    """Tells whether pyarrow can bring columns of this type to their plain type.

    It reads views of lists from Parquet with offsets that are none.
    """
    try:
        pa.nulls(1, found).cast(plain_type(found))
    except pa.ArrowNotImplementedError:
        return False
    return not any(map(_is_list_view, _parts_of(found)))


def _parts_of(kind: pa.DataType) -> Iterator[pa.DataType]:
    """Yields a type and all that it is nested of."""
    yield kind
    for at in range(kind.num_fields):
        yield from _parts_of(kind.field(at).type)


def _is_list_view(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind))


def _is_string(plain: pa.DataType) -> bool:
    return bool(pa.types.is_string(plain) or pa.types.is_large_string(plain))


def _is_list(plain: pa.DataType) -> bool:
    return bool(pa.types.is_list(plain) or pa.types.is_large_list(plain))


def is_float_list(plain: pa.DataType) -> bool:
    """Tells whether a plain type is of lists of floats, all of one length or not."""
    is_list = _is_list(plain) or pa.types.is_fixed_size_list(plain)
    return is_list and bool(pa.types.is_floating(plain.value_type))


def is_bytes(plain: pa.DataType) -> bool:
    """Tells whether a plain type is of bytes, as many in each row or not."""
    kinds = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary)
    return any(is_kind(plain) for is_kind in kinds)


def id_type(found: pa.DataType) -> pa.DataType | None:
    """Returns int64 or string, whichever an ID column of type `found` widens to, or None."""
    plain = plain_type(found)
    if pa.types.is_integer(plain) and not pa.types.is_uint64(plain):
        return pa.int64()
    return pa.string() if _is_string(plain) else None


def same_id_type(
    ours: str, present: Mapping[str, str], paths: Sequence[str], footers: Sequence
) -> pa.DataType | None:
    """Returns the one type of an ID column in all files; None where no file has it."""
    if ours not in present:
        return None
    found = [id_type(schema.field(present[ours]).type) for _, schema in footers]
    for path, kind in zip(paths, found, strict=True):
        if kind != found[0]:
            raise _id_clash(ours, f"{found[0]} in {paths[0]}", f"{kind} in {path}")
    return found[0]


def _id_clash(name: str, one: str, other: str) -> DataContractError:
    return DataContractError(
        f"{name} is {one} but {other}. IDs of two types never meet in a join, and every feature "
        f"would be empty. Cast one of them where it is written, as in CAST({name} AS BIGINT)."
    )


def common_id_type(name: str, sources: Iterable[Source], otherwise: pa.DataType) -> pa.DataType:
    """Returns the type of one kind of ID in all tables; `otherwise` where no table has a file.

    Raises DataContractError for a mismatch, naming the cast.
    """
    known = [(s, getattr(s, name)) for s in sources if getattr(s, name) is not None]
    for source, kind in known:
        if kind != known[0][1]:
            raise _id_clash(
                name,
                f"{known[0][1]} in the {known[0][0].form.table} table of ds {known[0][0].form.ds}",
                f"{kind} in the {source.form.table} table of ds {source.form.ds}",
            )
    return known[0][1] if known else otherwise


# ---- Reading rows --------------------------------------------------------------------------


def read_rows(group: RowGroup, wanted: Sequence[str], carry: Sequence[str] = ()) -> pa.Table:
    """Reads one row group in our form.

    It has the `wanted` of our columns that are there, then columns of the shop's in plain types. A
    click_time before the year 1 or after 9999 becomes the nearest within.

    Raises DataContractError for damaged pages, a null where none is allowed, an event_time of
    another year, or a click that is neither 0 nor 1.
    """
    form = group.form
    ours = [name for name in wanted if name in form.columns]
    theirs = [form.columns[name] for name in ours]
    columns = list(dict.fromkeys([*theirs, *carry]))
    try:
        rows = patiently(group.path, lambda: _read_plain(group, columns))
    except _UNREADABLE as error:
        raise unreadable(group.path, error) from error
    found = {
        name: _normalise(form, group.path, name, rows[column])
        for name, column in zip(ours, theirs, strict=True)
    }
    return pa.table(found | {name: rows[name] for name in carry})


def read_in_batches(group: RowGroup, wanted: Sequence[str], size: int) -> Iterator[pa.Table]:
    """Yields the rows of one row group as `read_rows` gives them, at most `size` of them at a time.

    A row group of vectors may be larger than memory.
    """
    form = group.form
    theirs = [form.columns[name] for name in wanted]
    batches = _Batches(group, theirs, size)
    try:
        while (rows := patiently(group.path, batches.read)) is not None:
            yield pa.table(
                {
                    name: _normalise(form, group.path, name, rows[column])
                    for name, column in zip(wanted, theirs, strict=True)
                }
            )
    except _UNREADABLE as error:
        raise unreadable(group.path, error) from error
    finally:
        batches.close()


class _Batches:
    """Reads one batch of a row group after the other; after a fault, again from where it was."""

    def __init__(self, group: RowGroup, columns: list[str], size: int):
        self._group, self._columns, self._size = group, columns, size
        self._done, self._open = 0, contextlib.ExitStack()
        self._batches: Iterator[pa.RecordBatch] | None = None

    def read(self) -> pa.Table | None:
        """Returns the next rows in plain types, None after the last ones."""
        try:
            if self._batches is None:
                self._batches = itertools.islice(self._begin(), self._done, None)
            batch = next(self._batches, None)
        except OSError:
            self.close()
            raise
        if batch is None:
            return None
        self._done += 1
        rows = pa.Table.from_batches([batch])
        return pa.table({n: rows[n].cast(plain_type(rows[n].type)) for n in self._columns})

    def close(self) -> None:
        self._batches = None
        self._open.close()

    def _begin(self) -> Iterator[pa.RecordBatch]:
        data = self._open.enter_context(files.open_input(self._group.path))
        # Without a buffer, or read ahead, all pages of a column are read at once.
        options = {"pre_buffer": False, "buffer_size": _BUFFER_BYTES}
        file = self._open.enter_context(
            pq.ParquetFile(data, arrow_extensions_enabled=False, **options)
        )
        return file.iter_batches(self._size, [self._group.index], self._columns)


def _read_plain(group: RowGroup, columns: list[str]) -> pa.Table:
    """Reads some columns of the shop's, in plain types."""
    with files.open_input(group.path) as data:
        with _open_parquet(data) as file:
            rows = file.read_row_group(group.index, columns=columns)
            leaves = [file.schema.column(at) for at in range(len(file.schema))]
        old = [c.path for c in leaves if c.physical_type == "INT96" and c.path in columns]
        if old:
            # Microseconds of an INT96 may have wrapped; its seconds cannot.
            with _open_parquet(data, "s") as file:
                seconds = file.read_row_group(group.index, columns=old)
            for name in old:
                _check_not_wrapped(group, name, rows[name], seconds[name])
    return pa.table({name: rows[name].cast(plain_type(rows[name].type)) for name in columns})


def _check_not_wrapped(
    group: RowGroup, column: str, times: pa.ChunkedArray, seconds: pa.ChunkedArray
) -> None:
    """Raises DataContractError where `times`, in microseconds, are not those of `seconds`."""
    true = seconds.cast(pa.int64())
    apart = pc.abs(pc.subtract(pc.divide(times.cast(pa.int64()), 1_000_000), true))
    beyond = pc.greater(apart, 1)
    if pc.any(beyond).as_py():
        raise _no_time(group.form.table, group.path, column, "INT96, in s", true.filter(beyond))


def _no_time(
    table: str, path: str, column: str, stored_as: str, values: pa.ChunkedArray
) -> DataContractError:
    """Returns the error for `values` int64 that are times beyond the years 1 to 9999."""
    return DataContractError(
        f"The column {column!r} of the {table} table holds {len(values):,} times before the year 1 "
        f"or after 9999 in {path}, for example {values[0]} as {stored_as}. Their rows belong to no "
        "day. A wrong unit looks like this: microseconds or nanoseconds stored as milliseconds. "
        "Convert them where the table is written."
    )


def _normalise(form: Form, path: str, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    if column.null_count and name not in _NULLABLE:
        raise DataContractError(
            f"The column {form.columns[name]!r} of the {form.table} table is null in "
            f"{column.null_count:,} rows of {path}. A row without {name} can be neither joined nor "
            "ordered in time. Leave such rows out, or fill them, where the table is written."
        )
    kind = _EXPECTED[name]
    if name == "image_uri":
        return addresses.rewrite(_to_utf8(form, path, name, column), form.rewrite)
    if kind in (_ID, "string"):
        return _to_utf8(form, path, name, column)
    if kind == "a timestamp":
        known = nearest_times(column)
        if name == "event_time" and known is not column:
            raw = column.cast(pa.int64())
            beyond = raw.filter(pc.not_equal(raw, known.cast(pa.int64())))
            raise _no_time(form.table, path, form.columns[name], str(column.type), beyond)
        return to_utc(known, form.input_timezone)
    if name == "clicked":
        return _to_bool(form, path, column)
    if name == "vector":
        return column
    return column.cast(pa.list_(id_type(column.type.value_type)))


def _to_utf8(form: Form, path: str, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    column = column.cast(id_type(column.type))
    try:
        column.validate(full=True)
    except pa.ArrowInvalid as error:
        raise DataContractError(
            f"The column {form.columns[name]!r} of the {form.table} table holds text in {path} "
            f"that is not UTF-8 ({_first_line(error)}). It could be neither compared nor shown. "
            "Decode it where the table is written."
        ) from error
    return column


def nearest_times(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Returns `column` itself where its times are of the years 1 to 9999, else the nearest such."""
    per_second, raw = _PER_SECOND[column.type.unit], column.cast(pa.int64())
    ends = np.iinfo(np.int64)
    low, high = (
        max(ends.min, min(second * per_second, ends.max))
        for second in (_FIRST_SECOND, _LAST_SECOND)
    )
    found = pc.min_max(raw)
    if not column.length() or found["min"].as_py() is None:
        return column
    if low <= found["min"].as_py() and found["max"].as_py() <= high:
        return column
    nearest = pc.min_element_wise(raw, high, skip_nulls=False)
    return pc.max_element_wise(nearest, low, skip_nulls=False).cast(column.type)


def to_utc(column: pa.ChunkedArray, input_timezone: str | None) -> pa.ChunkedArray:
    """Turns timestamps into timestamp[us, UTC]; naive ones are local times of `input_timezone`.

    They are of the years 1 to 9999. A local time that a clock change makes ambiguous is taken for
    the earlier moment, one that it leaves out for the moment of the change. Nanoseconds are cut to
    microseconds.
    """
    # Microseconds first: near their ends, nanoseconds would wrap by a change of zone.
    in_us = pa.timestamp("us", column.type.tz)
    column = pc.cast(column, options=pc.CastOptions(in_us, allow_time_truncate=True))
    if column.type.tz is None:
        column = pc.assume_timezone(
            column, input_timezone, ambiguous="earliest", nonexistent="latest"
        )
    return column.cast(TIMESTAMP)


def _to_bool(form: Form, path: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    if not pa.types.is_boolean(column.type) and len(column):
        bounds = pc.min_max(column)
        if bounds["min"].as_py() < 0 or bounds["max"].as_py() > 1:
            raise DataContractError(
                f"The column {form.columns['clicked']!r} of the {form.table} table reaches "
                f"from {bounds['min']} to {bounds['max']} in {path}; it must be 0 or 1. Numbers "
                "of clicks need a threshold before they are labels."
            )
    return column.cast(pa.bool_())


def distinct_categories(catalogue: Source) -> list[str]:
    """Returns the categories of all items, ascending; reads that column alone."""
    found: set[str] = set()
    for group in catalogue.groups():
        found.update(pc.unique(read_rows(group, ["category"])["category"]).drop_null().to_pylist())
    return sorted(found)


def check_unique(item_ids: pa.ChunkedArray, ds: dt.date) -> None:
    """Raises DataContractError where a sorted column of item IDs holds one twice."""
    twice = pc.equal(item_ids[1:], item_ids[:-1]) if len(item_ids) > 1 else pa.array([], pa.bool_())
    repeated = pc.unique(pc.filter(item_ids[1:], twice))
    if len(repeated):
        examples = ", ".join(str(i) for i in repeated[:5].to_pylist())
        raise DataContractError(
            f"The catalogue of ds {ds} holds {len(repeated):,} items twice or more, for example "
            f"item_id {examples}. Each item must stand there once, since it has one image and one "
            "cluster ID. Deduplicate the catalogue where it is written."
        )


def check_one_snapshot(setting: str, template: str, table: Source) -> None:
    """Raises OperatorError where what a `template` matches for one snapshot is of several days.

    Files of several days that share no item may be one: a table by the day of an item's creation.
    """
    by_day: dict[dt.date, list[RowGroup]] = {}
    for group in table.groups():
        if seen := day_names.find_day(group.path):
            by_day.setdefault(seen[0], []).append(group)
    if len(by_day) < 2:
        return
    one, other = sorted(by_day)[-2:]
    ids = read_rows(by_day[one][0], ["item_id"])["item_id"].combine_chunks()
    if any(
        pc.any(pc.is_in(read_rows(group, ["item_id"])["item_id"], value_set=ids)).as_py()
        for group in by_day[other]
    ):
        raise OperatorError(
            f"{setting}, {template!r}, names no day, and so means one snapshot for all "
            f"days, but it matches files of {len(by_day)} days, such as {one} and {other}, which "
            "hold the same items. Which of them counts cannot be told. Write {ds} where the day "
            "stands in the path, or name the one snapshot that is meant."
        )


# ---- Days ----------------------------------------------------------------------------------


def day_end(ds: dt.date, day_timezone: str) -> int:
    """Returns the first moment after ds, in microseconds since 1970 UTC."""
    midnight = dt.datetime.combine(ds + dt.timedelta(days=1), dt.time(), ZoneInfo(day_timezone))
    return int(midnight.timestamp()) * 1_000_000


def check_day(group: RowGroup, rows: pa.Table, end_us: int) -> None:
    """Raises DataContractError where an event lies after the day of its partition."""
    late = np.flatnonzero(rows["event_time"].cast(pa.int64()).to_numpy() >= end_us)
    if len(late):
        first = int(late[0])
        raise DataContractError(
            f"{len(late):,} rows of {group.path} lie after their day: item "
            f"{rows['item_id'][first].as_py()} at {rows['event_time'][first].as_py().isoformat()}, "
            f"in the partition of ds {group.form.ds}. Its features would know the next day. "
            "Check day_timezone and input_timezone in the settings, or how the log is split."
        )
