"""Writes the statements that make the published tables known to a query engine.

Columns and types are those of the newest published day of each table; the day is a column beside
them, which no file holds. A feature set is a schema of its own (a database in Spark, a dataset in
BigQuery), and so is `shared`.
"""

import glob
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pyarrow as pa

from feature_jobs.schemas import TABLES, InputNotReady, OperatorError, Table
from feature_jobs.store import files, partitions
from feature_jobs.store.day_names import DayNames
from pipelines.config import Settings

_TIMES = [pa.timestamp("ms", tz="UTC"), pa.timestamp("us", tz="UTC")]
_SPARK = {
    pa.bool_(): "BOOLEAN", pa.int8(): "TINYINT", pa.int16(): "SMALLINT", pa.int32(): "INT",
    pa.int64(): "BIGINT", pa.float32(): "FLOAT", pa.float64(): "DOUBLE", pa.string(): "STRING",
    pa.binary(): "BINARY", pa.date32(): "DATE", **dict.fromkeys(_TIMES, "TIMESTAMP"),
}  # fmt: skip
_BIGQUERY = {
    pa.bool_(): "BOOL", pa.int8(): "INT64", pa.int16(): "INT64", pa.int32(): "INT64",
    pa.int64(): "INT64", pa.float32(): "FLOAT64", pa.float64(): "FLOAT64", pa.string(): "STRING",
    pa.binary(): "BYTES", pa.date32(): "DATE", **dict.fromkeys(_TIMES, "TIMESTAMP"),
}  # fmt: skip


@dataclass(frozen=True)
class _Published:
    """Describes what is published of a table.

    `days` are pairs of a day as the column has it, and its folder below `top`. `key` names the
    column that engines make of the folders' names, "" where those are no key=value; its values are
    dates where `is_date`, else text.
    """

    table: Table
    schema_name: str
    top: str
    days: Sequence[tuple[str, str]]
    key: str
    is_date: bool
    columns: pa.Schema


# ---- Finding -----------------------------------------------------------------------------------


def statements(settings: Settings, engine: str) -> str:
    """Returns the SQL for "spark", "bigquery" or "duckdb", with comments.

    Raises InputNotReady where nothing is published, OperatorError for BigQuery where a table does
    not lie in a bucket.
    """
    head, schema, create = _ENGINES[engine]
    found = [one for table in TABLES.values() if (one := _find(settings, table))]
    if not found:
        raise InputNotReady(
            f"Nothing is published below {settings.root} yet, and the columns of a table are read "
            "off what is. Run `courier refresh --ds DAY` first."
        )
    missing = TABLES.keys() - {one.table.name for one in found}
    if missing:
        head += f"\n-- Left out, since nothing of them is published: {', '.join(sorted(missing))}."
    schemas = [schema.format(name) for name in dict.fromkeys(one.schema_name for one in found)]
    return "\n\n".join([head, *schemas, *map(create, found)])


def _find(settings: Settings, table: Table) -> _Published | None:
    """Returns what is published of a table, None for nothing."""
    layout, names = settings.layout, DayNames(settings.layout.partition)
    days = layout.published_days(table)
    if not days:
        return None
    named = re.fullmatch(r"([^=]+)=([^=]+)", names.name_of(days[-1]))
    values = [names.name_of(ds).rpartition("=")[2] if named else str(ds) for ds in days]
    newest = layout.folder(table, days[-1])
    return _Published(
        table,
        # BigQuery takes no "-". No two feature sets meet in one schema: their names have no "_".
        "shared" if table.shared else layout.feature_set.replace("-", "_"),
        os.path.dirname(newest),
        [(value, layout.folder(table, ds)) for value, ds in zip(values, days, strict=True)],
        named[1] if named else "",
        values[-1] == str(days[-1]),
        partitions.open_published(newest).schema,
    )


# ---- Engines -----------------------------------------------------------------------------------


def _spark(one: _Published) -> str:
    columns, told = _columns(one, _SPARK, " COMMENT {}")
    if not one.key:
        told.append("-- The names of its folders are no key=value: each is added with its day.")
    name, key = f"`{one.schema_name}`.`{one.table.name}`", one.key or "ds"
    columns.append(f"  `{key}` {'DATE' if one.is_date else 'STRING'}")
    added = [f"  PARTITION (`{key}` = {_text(day)}) LOCATION {_at(at)}" for day, at in one.days]
    return _lines(
        *told,
        f"DROP TABLE IF EXISTS {name};",
        f"CREATE TABLE {name} (",
        ",\n".join(columns),
        f") USING PARQUET PARTITIONED BY (`{key}`) LOCATION {_at(one.top)};",
        f"ALTER TABLE {name} ADD",
        *added[:-1],
        f"{added[-1]};",
    )


def _bigquery(one: _Published) -> str:
    if not files.is_remote(one.top):
        raise OperatorError(
            f"BigQuery reads what lies in a bucket, but {one.table.name} lies at {one.top}, so "
            "that no statement could make it known there. Move the shop to gs://…, or load the "
            "files that each day's _files.txt names."
        )
    columns, told = _columns(one, _BIGQUERY, " OPTIONS (description = {})")
    options = ["format = 'PARQUET'", "enable_list_inference = TRUE"]
    options += [f"uris = [{_text(os.path.join(one.top, '*.parquet'))}]"]
    days = []
    if one.key:
        options.append(f"hive_partition_uri_prefix = {_text(one.top)}")
        days.append(f"WITH PARTITION COLUMNS (`{one.key}` {'DATE' if one.is_date else 'STRING'})")
    else:
        told.append("-- The names of its folders are no key=value: _FILE_NAME alone tells the day.")
    return _lines(
        *told,
        f"CREATE OR REPLACE EXTERNAL TABLE `{one.schema_name}.{one.table.name}` (",
        ",\n".join(columns),
        ")",
        *days,
        "OPTIONS (",
        ",\n".join(f"  {option}" for option in options),
        ");",
    )


def _duckdb(one: _Published) -> str:
    told, options = [], ["union_by_name = true"]  # an earlier day may lack a column
    if one.key:
        kind = "DATE" if one.is_date else "VARCHAR"
        options.append(f"hive_partitioning = true, hive_types = {{'{one.key}': {kind}}}")
    else:
        options.append("hive_partitioning = false, filename = true")
        told.append("-- The names of its folders are no key=value: `filename` alone tells the day.")
    # Not *.parquet: a file on its way has a name that begins with a dot.
    days = f"{one.key}=*" if one.key else "*"
    pattern = os.path.join(glob.escape(one.top), days, "part-*.parquet").replace("'", "''")
    return _lines(
        *told,
        f'CREATE OR REPLACE VIEW "{one.schema_name}"."{one.table.name}" AS',
        f"SELECT * FROM read_parquet('{pattern}',",
        f"  {', '.join(options)});",
    )


# By engine: what is said first, how a schema is made, and how a table.
_ENGINES: dict[str, tuple[str, str, Callable[[_Published], str]]] = {
    "spark": (
        """\
-- For Spark SQL. A table that is known already is dropped and made again, since its columns or its
-- place may be others now: an external one (it has a LOCATION), so that the files stay. A table has
-- the days that are added to it: here those that are published. Later ones are added likewise, and
-- a command of on_published can do that. A session that has read a day which is published again
-- needs REFRESH TABLE.""",
        "CREATE DATABASE IF NOT EXISTS `{}`;",
        _spark,
    ),
    "bigquery": (
        """\
-- For BigQuery. Those who wrote COURIER could not run this there: look it over first. Datasets are
-- to be where the bucket is. A table has all days whose files are there, also one that is just
-- being published.""",
        "CREATE SCHEMA IF NOT EXISTS `{}`;",
        _bigquery,
    ),
    "duckdb": (
        """\
-- For DuckDB, which needs its extension httpfs and a secret of TYPE gcs for what lies in a bucket.
-- A view has all days whose files are there, also one that is just being published.""",
        'CREATE SCHEMA IF NOT EXISTS "{}";',
        _duckdb,
    ),
}


# ---- Columns and texts -------------------------------------------------------------------------


def _columns(
    one: _Published, types: dict[pa.DataType, str], comment: str
) -> tuple[list[str], list[str]]:
    """Returns the lines of the columns that the engine has a type for, and a remark for the rest.

    What a column means goes into its `comment`.
    """
    told, lines = [], []
    for field in one.columns:
        kind = _type_of(field.type, types)
        if kind is None:
            told.append(f"-- Left out: `{field.name}`, which is of the Arrow type {field.type}.")
            continue
        meaning = (field.metadata or {}).get(b"meaning", b"").decode()
        said = comment.format(_text(meaning)) if meaning else ""
        lines.append(f"  `{field.name}` {kind}{said}")
    return lines, told


def _type_of(type: pa.DataType, types: dict[pa.DataType, str]) -> str | None:
    """Returns the name of a type, None for one that is not among `types`, nor a list of one."""
    if pa.types.is_list(type):
        inner = _type_of(type.value_type, types)
        return inner and f"ARRAY<{inner}>"
    return types.get(type)


def _text(value: str) -> str:
    """Returns a text of SQL, as Spark and BigQuery write it."""
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _at(folder: str) -> str:
    """Returns where a folder is, as Spark wants it: of a bare path it would ask HDFS."""
    return _text(folder if files.is_remote(folder) else f"file:{folder}")


def _lines(*lines: str) -> str:
    return "\n".join(lines)
