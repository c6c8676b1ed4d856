"""Finds where the shop's tables lie, and reads the columns and some rows of one day of them.

A table is found from a path as people type it: a template with {ds}, a folder, a glob or a file.
Columns are guessed by their names, and checked by the night's own checks.
"""

import datetime as dt
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from feature_jobs import inputs
from feature_jobs.schemas import CourierError, DataContractError, OperatorError
from feature_jobs.store import day_names, files
from pipelines.config import Catalogue, Impressions

_ROWS = 200_000  # of each table are looked at
_OTHERS = 10  # files without a known ending are opened to see whether they are Parquet

_ITEM_IDS = "iid itemid item sku product_id productid article_id goods_id nid news_id"
# Other names of our columns, compared without regard to case; the first that fits is taken.
_SYNONYMS: Mapping[str, Mapping[str, str]] = {
    "catalogue": {
        "item_id": f"{_ITEM_IDS} id",
        "image_uri": "image image_url image_path image_file img img_url img_path pic pic_url "
        "picture uri url path",
        "category": "cat category_name cate category_id cate_id cat_id",
        "title": "item_title product_title item_name product_name name",
    },
    "impressions": {
        "user_id": "uid userid user member_id customer_id visitor_id",
        "item_id": _ITEM_IDS,
        "event_time": "ts timestamp time event_ts event_timestamp impression_time datetime",
        "clicked": "click is_click is_clicked clk label",
        "click_time": "click_ts click_timestamp clicked_at",
        "impression_id": "imp_id impressionid exposure_id",
        "request_id": "requestid req_id search_id pageview_id pv_id",
        "history": "click_history user_history",
    },
    "vectors": {"item_id": f"{_ITEM_IDS} id"},
}
_REQUIRED = {
    "catalogue": inputs.CATALOGUE_COLUMNS, "impressions": inputs.IMPRESSION_COLUMNS,
    "vectors": ("item_id",),
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """Tells what was seen, in a sentence or short paragraph; a "problem" stops a later command."""

    level: Literal["ok", "note", "problem"]
    text: str


@dataclass(frozen=True)
class Place:
    """Tells where a table lies: `template` as in the settings, and its days (none without {ds})."""

    table: str
    template: str
    days: tuple[dt.date, ...]

    def gaps(self) -> list[dt.date]:
        """Returns the days between first and last that have neither a file nor a `_SUCCESS`."""
        span = (self.days[-1] - self.days[0]).days
        missing = {self.days[0] + dt.timedelta(days=n) for n in range(span)} - set(self.days)
        return sorted(day for day in missing if not inputs.is_marked_whole(self.template, day))


@dataclass(frozen=True)
class Table:
    """Describes one day of a table as seen.

    `columns` maps our names to the shop's, `guessed` or as in settings, for those that were found
    or are needed; `source` has those of them that can be used. `faults` is what the night would
    refuse, by our name of the column, or "" where several are at odds. `rows` is a sample in our
    form, where times without a zone are taken for UTC unless settings say otherwise.
    """

    place: Place
    source: inputs.Source
    columns: Mapping[str, str]
    guessed: bool
    faults: Mapping[str, str]
    rows: pa.Table

    def without(self, ours: str) -> "Table":
        """Returns the table as that of a shop that needs no such column."""
        columns, faults = (
            {n: of[n] for n in of if n != ours} for of in (self.columns, self.faults)
        )
        return replace(self, columns=columns, faults=faults)

    def has(self, ours: str) -> bool:
        return len(self.rows) > 0 and ours in self.rows.column_names


def fault_of(check: Callable[[], object]) -> str | None:
    """Tells what one of the night's checks has against the shop's data; None where it passes."""
    try:
        check()
    except CourierError as error:
        return str(error)
    return None


# ---- Finding -------------------------------------------------------------------------------


def find_place(table: str, typed: str) -> Place:
    """Finds where a table lies, from a path as people type it; raises OperatorError if nowhere."""
    return place_of(table, _as_template(table, files.expanded(typed)))


def place_of(table: str, template: str) -> Place:
    """Finds the days of a table at a full template; where it has none, what in its paths is a day.

    Raises OperatorError where there is no file.
    """
    if day_names.has_day(template):
        return Place(table, template, _days_of(table, template))
    pattern, found = _files_at(table, template)
    templates = Counter(
        template
        for file in found
        for folders, name in _dated(file)
        if (template := _template(file, folders, name, pattern))
    )
    if not templates:
        return Place(table, pattern, ())
    template = templates.most_common(1)[0][0]
    return Place(table, template, _days_of(table, template))


def settled_place(table: str, template: str) -> Place:
    """Returns the place that settings name; raises OperatorError where no day is there."""
    has_day = day_names.has_day(template)
    return Place(table, template, _days_of(table, template) if has_day else ())


def _as_template(table: str, typed: str) -> str:
    """Returns the full template of what was typed.

    Brackets in the names of folders that are there are no wildcards, and braces no days; so it is
    with those of the folder where the command is run.
    """
    heads = [typed, *(typed[: found.start()] for found in re.finditer("(?<=[^/])/", typed))]
    for head in sorted(heads, key=len, reverse=True):
        if files.is_folder(path := files.absolute(head)) or files.exists(path):
            typed = day_names.literal(head) + typed[len(head) :]
            break
    template = files.absolute(typed, day_names.literal(os.getcwd()))
    try:
        if day_names.has_day(template):
            day_names.DayNames(template)
    except ValueError as error:
        raise OperatorError(
            f"The path {typed} of the {table} table {error}. The days that it is of could not be "
            "told. Correct it, or give the folder of the table, in which days are looked for."
        ) from error
    return template


def _files_at(table: str, template: str) -> tuple[str, list[str]]:
    """Finds the Parquet files of a file, glob or folder without a day.

    Returns the pattern that they match, as a template, and their paths.
    """
    for below in ("", "/*", "/*/*", "/**/*"):
        pattern = template + below
        paths = [file.path for file in files.glob(day_names.name_of(pattern, dt.date.min))]
        if below:
            paths = [path for path in paths if inputs.is_parquet_name(path)]
        if found := _only_parquet(paths):
            return _with_ending(pattern, found) if below else pattern, found
    raise _nothing(table, template)


def _only_parquet(paths: Sequence[str]) -> list[str]:
    """Returns the files that are Parquet by their ending, or by the first bytes of some others."""
    known = [path for path in paths if path.lower().endswith(inputs.PARQUET_ENDINGS)]
    others = sorted(set(paths) - set(known))[:_OTHERS]
    return list(paths) if any(files.read_bytes(p, 4) == b"PAR1" for p in others) else known


def _with_ending(pattern: str, found: Sequence[str]) -> str:
    """Returns a pattern of the files in a folder: of their one ending, or else of the folder."""
    first, *others = {os.path.splitext(path)[1] for path in found}
    if first and not others:
        return pattern + first
    return pattern if "**" in pattern else pattern.removesuffix("/*")


def _nothing(table: str, template: str) -> OperatorError:
    return OperatorError(
        f"There is no Parquet file ({', '.join(f'*{e}' for e in inputs.PARQUET_ENDINGS)}, or one "
        f"without an ending) at {template}, where the {table} table was expected. Say as "
        f"--{table}, or as [{table}] path in settings, where it lies: a folder, a file, a glob, or "
        "a template in which {ds} stands for the day as YYYY-MM-DD, or {ds:%Y%m%d} for 20260106, "
        "for example 'data/dt={ds}/*.parquet'."
    )


def _dated(file: str) -> Iterator[tuple[list[str], str]]:
    """Yields templates of a file: its folders, and its name, with the day as a field.

    That of 2026/12/25 may be one of numbers with or without leading zeros.
    """
    if seen := day_names.find_day(file):
        _, found = seen
        for month, day in product(_fields(file, found, "m"), _fields(file, found, "d")):
            yield _spelt(file, found, month, day)


def _spelt(file: str, found: re.Match[str], month: str, day: str) -> tuple[list[str], str]:
    """Returns a file's path, its folders and its name, with the day that was found as fields."""
    a, b = found["a"], found["b"]
    if "/" in a + b:
        spelt = f"{{ds:%Y}}{a}{{ds:{month}}}{b}{{ds:{day}}}"
    else:
        spelt = (
            "{ds}"
            if (a, b, month, day) == ("-", "-", "%m", "%d")
            else (f"{{ds:%Y{a}{month}{b}{day}}}")
        )
    text = file[found.start("Y") : found.end("d")]
    parts = [day_names.literal(part) for part in file.split(text)]
    *folders, name = spelt.join(parts).split(os.sep)
    return folders, name


def _fields(file: str, found: re.Match[str], of: str) -> Sequence[str]:
    """Returns the fields that may have written the month or day; of 12 or 25 there are two."""
    between = found["a"] and found["b"] and found.end("d") <= file.rindex("/")
    if found[of].startswith("0") or not between:
        return (f"%{of}",) if len(found[of]) == 2 else ()
    return (f"%-{of}",) if len(found[of]) == 1 else (f"%{of}", f"%-{of}")


def _template(file: str, folders: Sequence[str], name: str, pattern: str) -> str:
    """Returns the pattern of a table's files with the day in it, which `file` spells as given."""
    *given, any_name = pattern.split(os.sep)
    deep = "**" in given
    if deep:
        given[given.index("**") : given.index("**") + 1] = ["*"] * (len(folders) - len(given) + 1)
    elif len(folders) > len(given):  # of a folder whose files are given by its name alone
        given, any_name = [*given, any_name], ""
    if "{ds" in name:
        # What follows the day differs between the files of one day.
        before, _, after = name.partition("}")
        ending = os.path.splitext(f"_{after}")[1]
        any_name = f"{before}}}{'' if after == ending else '*'}{ending}"
    found = [f if "{ds" in f else g for f, g in zip(folders, given, strict=True)]
    if deep and "{ds" not in name:
        last = max(at for at, folder in enumerate(found) if "{ds" in folder)
        found[last + 1 :] = ["**"] if last + 1 < len(found) else []
    return os.sep.join([*found, any_name]).removesuffix(os.sep)


def _days_of(table: str, template: str) -> tuple[dt.date, ...]:
    """Returns the days that have a file, ascending; raises OperatorError where none has."""
    found = inputs.find_days(template)
    if not found:
        raise _nothing(table, template)
    return tuple(found)


# ---- Columns -------------------------------------------------------------------------------


def open_table(place: Place, ds: dt.date, section: Catalogue | Impressions | None = None) -> Table:
    """Reads the footers and a sample of the rows of one day, by settings where there are some."""
    wait = section is not None and section.require_success
    paths = inputs.find_files(place.table, place.template, ds, wait)
    footers = read_footers(paths)
    schema = footers[0][1] if footers else pa.schema([])
    columns = _named(section, schema) if section else guess_columns(place.table, paths[0], schema)
    zone: str | None = None
    carry: tuple[str, ...] = ()
    if isinstance(section, Impressions):
        zone, carry = section.input_timezone, section.carry
    usable, faults = check_columns(place.table, columns, paths, footers, carry, zone)
    form = inputs.Form(place.table, ds, usable, input_timezone=zone or "UTC")
    source = source_of(form, paths, footers)
    rows, in_rows = _sample_rows(source)
    return Table(place, source, columns, section is None, faults | in_rows, rows)


def read_footers(paths: Sequence[str]) -> list[tuple[pq.FileMetaData, pa.Schema]]:
    """Reads footers at once; raises DataContractError where a file is no Parquet."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(inputs.read_footer, paths))


def source_of(form: inputs.Form, paths: Sequence[str], footers: Sequence) -> inputs.Source:
    """Describes files, the columns of whose `form` were checked, as far as a look needs it."""
    return inputs.Source(
        form,
        tuple(paths),
        tuple(inputs.group_rows(metadata) for metadata, _ in footers),
        sum(metadata.num_rows for metadata, _ in footers),
        checksums=(),
        item_id=inputs.same_id_type("item_id", form.columns, paths, footers),
        user_id=None,
        impression_id=None,
        request_id=None,
        carried=(),
    )


def check_columns(
    table: str,
    columns: Mapping[str, str],
    paths: Sequence[str],
    footers: Sequence,
    carry: Sequence[str] = (),
    zone: str | None = None,
) -> tuple[dict[str, str], dict[str, str]]:
    """Finds the columns that can be used in all files, and what the night would refuse.

    That is told by our name of the column, or "" where several are at odds.
    """

    def check(
        checked: Mapping[str, str], required: Sequence[str], zone: str | None, carry: Sequence[str]
    ) -> None:
        found = [
            inputs.check_schema(table, path, schema, checked, required, carry, zone)
            for path, (_, schema) in zip(paths, footers, strict=True)
        ]
        inputs.check_alike(table, paths, footers, found, carry)

    usable, faults = {}, {}
    for ours, theirs in columns.items():
        # Each alone, so that all faults are told at once. Times without a zone are told below.
        if fault := fault_of(partial(check, {ours: theirs}, [ours], "UTC", ())):
            faults[ours] = fault
        else:
            usable[ours] = theirs
    if fault := fault_of(partial(check, usable, [], zone, carry)):
        faults[""] = fault
    return usable, faults


def _named(section: Catalogue | Impressions, schema: pa.Schema) -> dict[str, str]:
    """Returns the columns of settings, without those that are not there and may be absent."""
    names = section.columns.model_dump()
    table = "catalogue" if isinstance(section, Catalogue) else "impressions"
    needed = set(_REQUIRED[table])
    if isinstance(section, Catalogue) and not section.image_roots:
        needed.remove("image_uri")
    needed |= section.columns.model_fields_set
    return {o: theirs for o, theirs in names.items() if o in needed or theirs in schema.names}


def guess_columns(table: str, path: str, schema: pa.Schema) -> dict[str, str]:
    """Maps our names to the shop's: the same name, else the first synonym of a fitting type.

    A required column is guessed by its name alone where no type fits, and else keeps our name.
    """
    found = {}
    for ours, synonyms in _SYNONYMS[table].items():
        named = [c for name in (ours, *synonyms.split()) for c in schema.names if c.lower() == name]
        check = partial(inputs.check_schema, table, path, schema)
        fitting = [c for c in named if not fault_of(partial(check, {ours: c}, [ours], (), "UTC"))]
        if ours in schema.names:
            found[ours] = ours
        elif fitting or ours in _REQUIRED[table]:
            found[ours] = (fitting or named or [ours])[0]
    return found


# ---- Rows ----------------------------------------------------------------------------------


def _sample_rows(source: inputs.Source) -> tuple[pa.Table, dict[str, str]]:
    """Reads row groups spread over the day, in our form, and what the night would refuse there."""
    if not source.rows:
        return pa.table({}), {}
    groups, columns, faults = source.groups(), {}, {}
    wanted = max(1, min(len(groups), _ROWS * len(groups) // source.rows))
    chosen = [groups[at] for at in np.linspace(0, len(groups) - 1, wanted).astype(int)]
    for name in source.form.columns:
        if name == "history":  # of any length, and nothing in it that could be wrong
            continue
        try:
            columns[name] = read_column(chosen, name)
        except DataContractError as error:
            faults[name] = str(error)
    return pa.table(columns), faults


def read_column(groups: Sequence[inputs.RowGroup], name: str) -> pa.ChunkedArray:
    return pa.concat_tables([inputs.read_rows(group, [name]) for group in groups])[name]
