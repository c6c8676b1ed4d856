"""Finds where the shop's tables lie, and reads the columns and some rows of one day of them.

A table is found from a path as people type it: a template with {ds}, a folder, a glob or a file.
Columns are guessed by their names, and checked by the night's own checks.
"""

import datetime as dt
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa

from feature_jobs import inputs
from feature_jobs.schemas import CourierError, DataContractError, OperatorError
from feature_jobs.store import files

_ROWS = 200_000  # of each table are looked at

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
}
_REQUIRED = {"catalogue": inputs.CATALOGUE_COLUMNS, "impressions": inputs.IMPRESSION_COLUMNS}


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

    `columns` maps our names to the shop's, for those that were found or are needed; `source` has
    those of them that can be used. `faults` is what the night would refuse. `rows` is a sample in
    our form, where times without a zone are taken for UTC.
    """

    place: Place
    source: inputs.Source
    columns: Mapping[str, str]
    faults: tuple[str, ...]
    rows: pa.Table

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

_DAY = re.compile(r"(?<!\d)\d{4}-\d{2}-\d{2}(?!\d)")
_DAY_FOLDER = re.compile(r"(?:\w+=)?(\d{4}-\d{2}-\d{2})")


def find_place(table: str, typed: str) -> Place:
    """Finds where a table lies, from a path as people type it; raises OperatorError if nowhere."""
    path = files.absolute(files.expanded(typed))
    if "{ds}" in path:
        return Place(table, path, _days_of(table, path))
    pattern, found = _files_at(table, path)
    templates = Counter(t for file in found if (t := _template(file, pattern)))
    if not templates:
        return Place(table, pattern, ())
    template = templates.most_common(1)[0][0]
    return Place(table, template, _days_of(table, template))


def _files_at(table: str, path: str) -> tuple[str, list[str]]:
    """Finds the Parquet files of a file, glob or folder without {ds}.

    Returns the pattern that they match, and their paths.
    """
    if files.is_folder(path):
        depths = ("*.parquet", "*/*.parquet", "**/*.parquet")
        patterns = [os.path.join(path, depth) for depth in depths]
    else:
        patterns = [path if path.endswith(".parquet") else os.path.join(path, "*.parquet")]
    for pattern in patterns:
        if found := [file.path for file in files.glob(pattern)]:
            return pattern, found
    raise _nothing(table, path)


def _nothing(table: str, path: str) -> OperatorError:
    return OperatorError(
        f"There is no Parquet file (*.parquet) at {path}, where the {table} table was expected. "
        f"Give --{table} a folder, a file, a glob, or a template in which {{ds}} stands for the "
        "day as YYYY-MM-DD, for example 'data/dt={ds}/*.parquet'."
    )


def _template(file: str, pattern: str) -> str | None:
    """Returns `pattern` with the day of one of its files as {ds}; None if its path has no day."""
    *folders, name = file.split(os.sep)
    *given, any_name = pattern.split(os.sep)
    if match := _DAY.search(name):
        day = match[0]
        # What follows the day differs between the files of one day.
        before, after = name.split(day, 1)
        name = f"{before}{day}{'' if after == '.parquet' else '*'}.parquet"
    elif dated := [m[1] for folder in folders if (m := _DAY_FOLDER.fullmatch(folder))]:
        day, name = dated[-1], any_name
    else:
        return None
    if len(folders) == len(given):
        given = [f if day in f else g for f, g in zip(folders, given, strict=True)]
    elif deepest := [at for at, folder in enumerate(folders) if day in folder]:
        given = [*folders[: deepest[-1] + 1], "**"]
    return os.sep.join([*given, name]).replace(day, "{ds}")


def _days_of(table: str, template: str) -> tuple[dt.date, ...]:
    """Returns the days that have a file, ascending; raises OperatorError where none has."""
    pattern = inputs.pattern_for(template.replace("{ds}", "*"), dt.date.min)
    days = set()
    for text in {text for file in files.glob(pattern) for text in _DAY.findall(file.path)}:
        with suppress(ValueError):  # digits such as 2026-99-01
            days.add(dt.date.fromisoformat(text))
    found = sorted(day for day in days if files.glob(inputs.pattern_for(template, day)))
    if not found:
        raise _nothing(table, template)
    return tuple(found)


# ---- Columns -------------------------------------------------------------------------------


def open_table(place: Place, ds: dt.date) -> Table:
    """Reads the footers and a sample of the rows of one day."""
    paths = inputs.find_files(place.table, place.template, ds, require_success=False)
    with ThreadPoolExecutor() as pool:
        footers = list(pool.map(inputs.read_footer, paths))
    columns = _guess_columns(place.table, paths[0], footers[0][1])
    usable, faults = _check_columns(place.table, columns, paths, footers)
    source = inputs.Source(
        inputs.Form(place.table, ds, usable, input_timezone="UTC"),
        tuple(paths),
        tuple(metadata.num_row_groups for metadata, _ in footers),
        sum(metadata.num_rows for metadata, _ in footers),
        checksums=(),
        item_id=inputs.same_id_type("item_id", usable, paths, footers),
        user_id=None,
        impression_id=None,
        request_id=None,
        carried=(),
    )
    rows, in_rows = _sample_rows(source)
    return Table(place, source, columns, (*faults, *in_rows), rows)


def _check_columns(
    table: str, columns: Mapping[str, str], paths: Sequence[str], footers: Sequence
) -> tuple[dict[str, str], list[str]]:
    """Finds the columns that can be used in all files, and what the night would refuse."""

    def check(checked: Mapping[str, str], required: Sequence[str], timezone: str | None) -> None:
        found = [
            inputs.check_schema(table, path, schema, checked, required, (), timezone)
            for path, (_, schema) in zip(paths, footers, strict=True)
        ]
        inputs.check_alike(table, paths, footers, found, ())

    usable, faults = {}, []
    for ours, theirs in columns.items():
        # Each alone, so that all faults are told at once. Times without a zone are told below.
        if fault := fault_of(partial(check, {ours: theirs}, [ours], "UTC")):
            faults.append(fault)
        else:
            usable[ours] = theirs
    if fault := fault_of(partial(check, usable, [], None)):
        faults.append(fault)
    return usable, faults


def _guess_columns(table: str, path: str, schema: pa.Schema) -> dict[str, str]:
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


def _sample_rows(source: inputs.Source) -> tuple[pa.Table, list[str]]:
    """Reads row groups spread over the day, in our form, and what the night would refuse there."""
    if not source.rows:
        return pa.table({}), []
    groups, columns, faults = source.groups(), {}, []
    wanted = max(1, min(len(groups), _ROWS * len(groups) // source.rows))
    chosen = [groups[at] for at in np.linspace(0, len(groups) - 1, wanted).astype(int)]
    for name in source.form.columns:
        if name == "history":  # of any length, and nothing in it that could be wrong
            continue
        try:
            columns[name] = read_column(chosen, name)
        except DataContractError as error:
            faults.append(str(error))
    return pa.table(columns), faults


def read_column(groups: Sequence[inputs.RowGroup], name: str) -> pa.ChunkedArray:
    return pa.concat_tables([inputs.read_rows(group, [name]) for group in groups])[name]
