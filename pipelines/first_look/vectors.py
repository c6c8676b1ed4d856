"""Finds vectors that the shop has of its items: in the catalogue, or in a table beside it.

The look is bounded: footers, the item IDs of a table of moderate size, and of each column that may
hold vectors the first rows.
"""

import datetime as dt
import os
import re
import shlex
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import pyarrow as pa
import pyarrow.compute as pc

from feature_jobs import inputs
from feature_jobs.inputs import Source
from feature_jobs.items import vector_rows
from feature_jobs.schemas import DataContractError
from feature_jobs.store import day_names, files
from feature_jobs.store.encoder_info import DIMENSIONS
from feature_jobs.store.protocol import is_hidden
from pipelines.first_look.settings import near_template
from pipelines.first_look.tables import (
    Finding,
    Place,
    Table,
    check_columns,
    guess_columns,
    place_of,
    read_column,
    read_footers,
    source_of,
)

_ROWS = 64  # of a column are looked at: a row group of vectors may be larger than memory
_IDS = 2_000_000  # up to here all of a table's item IDs are read
_TABLES = 32  # at most are looked at
# The folder of a partition: Hive's key=value, or a day or a part of one.
_PARTITION = re.compile(r"\w+=.*|\d[\d_.-]*")
_DAY = re.compile(r"(?:19|20)\d\d([-_.]?)\d\d\1\d\d")
_OTHER_FILE = re.compile(r"\.[A-Za-z]\w*$")


@dataclass(frozen=True)
class Column:
    """Describes a column of lists of floats, or of bytes, by the first `rows` of it.

    Most that are not null have so many numbers, the `dimension`; `strays` have another length.
    """

    name: str
    as_bytes: bool
    dimension: int
    rows: int
    nulls: int
    strays: int

    @property
    def has_vectors(self) -> bool:
        return self.dimension in DIMENSIONS and 2 * self.strays < self.rows - self.nulls


@dataclass(frozen=True)
class Vectors:
    """Describes a table that has vectors of items, as seen.

    `item` is its column of item IDs, and `share` that of the sampled items whose ID stands there,
    None where it was not looked at. `faults` are of columns that cannot be read, `id_fault` keeps
    the table from being used.
    """

    place: Place
    item: str
    rows: int
    columns: tuple[Column, ...]
    share: float | None = None
    faults: tuple[str, ...] = ()
    id_fault: str | None = None

    @property
    def usable(self) -> list[Column]:
        return [column for column in self.columns if column.has_vectors and not self.id_fault]


# ---- Finding -------------------------------------------------------------------------------


def find_vectors(items: Table, events: Table | None, images: Collection[str]) -> list[Vectors]:
    """Finds vectors of the catalogue's items: in its own columns, and in tables beside it.

    Such a table is a Parquet file, or a folder of them or of their partitions, in the folder of the
    catalogue or the one above. Folders of `images` are not listed: they may have millions of files.
    """
    tables = [items, events] if events else [items]
    known = [path for table in tables for path in table.source.paths]
    found = [_of_catalogue(items)]
    templates = {table.place.template for table in tables}
    for path in _beside(items.source.paths[0], [*known, *images]):
        newest = _newest_file(path)
        if newest is None or not _may_have_vectors(newest):
            continue
        place = place_of("vectors", day_names.literal(path))
        if place.template not in templates:
            found.append(_of_table(place, items))
            templates.add(place.template)
    return [vectors for vectors in found if vectors]


def _beside(file: str, known: Sequence[str]) -> list[str]:
    """Lists files and folders beside a table that has this `file`, without those `known`.

    Of files that differ by a day in their names, the newest stands for all.
    """
    folder = home = os.path.dirname(file)
    while _PARTITION.fullmatch(os.path.basename(home)):
        home = os.path.dirname(home)
    found: dict[str, str] = {}
    for parent in dict.fromkeys([folder, home, os.path.dirname(home)]):
        names = files.list_names(parent) if os.path.basename(parent) else []
        for name in filter(_may_be_table, names):
            path = os.path.join(parent, name)
            if not any(f"{one}/".startswith(f"{path}/") for one in known):
                found[_DAY.sub("{ds}", path)] = path
    return list(found.values())[:_TABLES]


def _may_be_table(name: str) -> bool:
    if is_hidden(name) or _PARTITION.fullmatch(name) or not name.isprintable():
        return False
    return _is_parquet(name) or not _OTHER_FILE.search(name)


def _is_parquet(name: str) -> bool:
    return name.lower().endswith(inputs.PARQUET_ENDINGS)


def _newest_file(path: str) -> str | None:
    """Finds a Parquet file of a table: `path` itself, or one in that folder's last partition."""
    if files.exists(path):
        return path
    names = [name for name in files.list_names(path) if not is_hidden(name)]
    partitions = [name for name in names if _PARTITION.fullmatch(name)]
    inside = [*filter(_is_parquet, names), *reversed(partitions)][:1]
    return _newest_file(os.path.join(path, *inside)) if inside else None


def _may_have_vectors(path: str) -> bool:
    """Tells whether a file is Parquet and has item IDs and vectors by the types of its columns."""
    try:
        _, schema = inputs.read_footer(path)
    except DataContractError:  # no Parquet: none of the shop's tables that we were asked to read
        return False
    item = guess_columns("vectors", path, schema)["item_id"]
    return item in schema.names and bool(_candidates(schema))


def _candidates(schema: pa.Schema) -> list[str]:
    """Returns the columns that hold vectors by their types; bytes may be anything else, too."""
    once = [f for f in schema if schema.names.count(f.name) == 1 and f.name.isprintable()]
    plain = {field.name: inputs.plain_type(field.type) for field in once}
    return [n for n, kind in plain.items() if inputs.is_float_list(kind) or inputs.is_bytes(kind)]


# ---- Looking -------------------------------------------------------------------------------


def _of_catalogue(items: Table) -> Vectors | None:
    source = items.source
    if not source.rows or not items.has("item_id"):
        return None
    _, schema = inputs.read_footer(source.paths[0])
    columns, faults = _look_at(source, _candidates(schema))
    return _if_any(Vectors(items.place, items.columns["item_id"], source.rows, columns, 1, faults))


def _of_table(place: Place, items: Table) -> Vectors | None:
    """Looks at the newest day not after the catalogue's; None without vectors of its items."""
    known = [day for day in place.days if day <= items.source.form.ds] or place.days[-1:]
    ds = known[-1] if known else items.source.form.ds
    paths = inputs.find_files("vectors", place.template, ds, require_success=False)
    try:
        footers = read_footers(paths)
    except DataContractError as error:
        return Vectors(place, "", 0, (), faults=(str(error),))
    schema = footers[0][1]
    named = guess_columns("vectors", paths[0], schema)
    usable, id_faults = check_columns("vectors", named, paths, footers)
    source = source_of(inputs.Form("vectors", ds, usable), paths, footers)
    if not source.rows:
        return None
    share, id_fault = None, next(iter(id_faults.values()), None)
    if not id_fault:
        try:
            share = _share(items, source)
        except DataContractError as error:
            id_fault = str(error)
    columns, faults = _look_at(source, _candidates(schema))
    found = Vectors(place, named["item_id"], source.rows, columns, share, faults, id_fault)
    return None if share == 0 else _if_any(found)


def _share(items: Table, source: Source) -> float | None:
    """Returns the share of the sampled items that a table has; None where that is not looked at.

    Raises DataContractError for IDs of two types, and for nulls.
    """
    inputs.common_id_type("item_id", (items.source, source), pa.int64())
    if source.rows > _IDS or not items.has("item_id"):
        return None
    ids = read_column(source.groups(), "item_id").combine_chunks()
    return float(pc.mean(pc.is_in(items.rows["item_id"], ids).cast(pa.int8())).as_py())


def _if_any(found: Vectors) -> Vectors | None:
    """Returns what was found if it is worth a word."""
    if found.id_fault and not any(column.has_vectors for column in found.columns):
        return None
    return found if found.columns or found.faults else None


def _look_at(source: Source, names: Sequence[str]) -> tuple[tuple[Column, ...], tuple[str, ...]]:
    """Reads the first rows of columns; returns what they hold, and what cannot be read.

    Bytes that are no vectors are something else, and left out.
    """
    columns, faults = [], []
    for name in names:
        try:
            column = _column(name, _first_rows(source, name))
        except DataContractError as error:
            faults.append(str(error))
            continue
        if column.has_vectors or not column.as_bytes:
            columns.append(column)
    return tuple(columns), tuple(faults)


def _first_rows(source: Source, name: str) -> pa.Table:
    """Reads the first rows of a column, as `vector`."""
    form = replace(source.form, columns={"vector": name})
    sizes = chain.from_iterable(source.row_groups)
    filled = next(g for g, rows in zip(source.groups(), sizes, strict=True) if rows)
    return next(inputs.read_in_batches(replace(filled, form=form), ["vector"], _ROWS))


def _column(name: str, rows: pa.Table) -> Column:
    as_bytes, nulls = inputs.is_bytes(rows["vector"].type), rows["vector"].null_count
    sizes = vector_rows.sizes_of(rows)
    sizes = sizes[sizes != -1]  # of nulls
    (usual, count), *_ = Counter(sizes.tolist()).most_common(1) or [(0, 0)]
    strays = len(sizes) - count
    dimension = 0 if as_bytes and strays else usual  # bytes of many lengths are something else
    return Column(name, as_bytes, dimension, len(rows), nulls, strays)


# ---- Telling -------------------------------------------------------------------------------


def registering(
    found: Sequence[Vectors], centre_ds: dt.date | None, folder: str
) -> dict[Place, str]:
    """Returns the command that makes an encoder of each table's first column of vectors.

    It is for a shell in the `folder` of the settings; the centre is that of the vectors of a day.
    """
    return {v.place: _command(v, v.usable[0], centre_ds, folder) for v in found if v.usable}


def _command(vectors: Vectors, column: Column, centre_ds: dt.date | None, folder: str) -> str:
    name = re.sub("[^a-z0-9]+", "-", column.name.lower()).strip("-") or "vectors"
    path, days = near_template(vectors.place, folder), vectors.place.days
    words = ["courier", "register-vectors", "--name", name, "--path", path, "--vector", column.name]
    if vectors.item != "item_id":
        words += ["--item", vectors.item]
    if column.as_bytes:
        words += ["--as-bytes"]
    if centre_ds and (not days or centre_ds in days):
        words += ["--ds", str(centre_ds), "--centre"]
    return shlex.join([*words, "--trained-elsewhere"])


def about_vectors(
    found: Sequence[Vectors], commands: Mapping[Place, str], folder: str
) -> Iterator[Finding]:
    """Tells which vectors were found, what is wrong with them, and the command to use them by."""
    for vectors in found:
        where = near_template(vectors.place, folder)
        for fault in vectors.faults:
            yield Finding("note", f"vectors: {fault}")
        for column in vectors.columns:
            if text := _fault_of(column):
                yield Finding("note", f"vectors: the column {column.name!r} of {where} {text}")
        if vectors.id_fault:
            yield Finding("note", f"vectors: those of {where} cannot be used: {vectors.id_fault}")
        if command := commands.get(vectors.place):
            yield Finding("note", f"{_found_in(vectors, where)}. {_ADVICE.format(command)}")


_ADVICE = (
    "To make nights of them instead of images: `{}`. Where they were trained on this shop's "
    "clicks, --trained-on START END is right instead of --trained-elsewhere."
)


def _fault_of(column: Column) -> str | None:
    """Tells what is wrong with a column of lists; None where nothing is."""
    values = column.rows - column.nulls
    if not values:
        return f"is null in all {column.rows:,} rows looked at, and was left aside."
    if 2 * column.strays >= values:
        return "has lists of many lengths: they are no vectors, and were left aside."
    least, most = DIMENSIONS[0], DIMENSIONS[-1]
    if column.dimension not in DIMENSIONS:
        return (
            f"has lists of {column.dimension:,} floats. Vectors of {least} to {most:,} are taken, "
            "so that it was left aside."
        )
    if column.strays:
        return (
            f"has another length than {column.dimension:,} in {column.strays:,} of {column.rows:,} "
            "rows looked at. Such vectors would be rejected, and their items have no embedding."
        )
    return None


def _found_in(vectors: Vectors, where: str) -> str:
    column, *others = vectors.usable
    kind = "bytes, taken for vectors" if column.as_bytes else "vectors"
    text = (
        f"vectors: {vectors.rows:,} rows of {where} have {kind} of {column.dimension:,} numbers in "
        f"{column.name!r}, by the item ID in {vectors.item!r}"
    )
    if vectors.share is None:
        text += "; which items they are of was not looked at"
    else:
        share = vectors.share * (1 - column.nulls / column.rows)
        text += f"; {share:.1%} of the sampled items have one"
    if others:
        text += f"; there are also {', '.join(repr(other.name) for other in others)}"
    return text
