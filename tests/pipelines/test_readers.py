"""Each engine reads exactly the published rows of every table, by the paths that the docs name.

Of one shop all tables were published twice, so that files of an earlier version are kept. Another
has string IDs, days of another name, user IDs in a place of their own, and a day without rows. What
is expected are the rows of the files that the manifests name.
"""

import datetime as dt
import glob
import json
import os
import re
import subprocess
from collections.abc import Callable
from itertools import product
from pathlib import Path

import duckdb
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from feature_jobs.schemas import TABLES
from feature_jobs.store import arrays, partitions
from tests.conftest import Artefacts, pinned
from tests.support.commands import Capture, courier, make_night, refresh
from tests.support.training_shop import SECTION, make_rows
from tests.support.world import DAYS, NORMAL, World, draw_impressions, picture
from tests.test_imports import ROOT

FIRST, SECOND = DAYS[:2]
EMPTY = {"user_simscores", "training_rows"}  # on a day without impressions
SPARK_READER = ROOT / "tests/support/spark_reader.py"
SPARK_PYTHON = ROOT / ".venv-readers/bin/python"


OTHERWISE = '[output]\npartition = "dt={ds:%Y%m%d}"\nuser_root = "users"\n'


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory, artefacts: Artefacts) -> World:
    """Makes two nights with training rows, and every table of the second once more."""
    folder = tmp_path_factory.mktemp("readers") / "shop"
    world = pinned(World(folder, extra_settings=SECTION), artefacts)
    for day in (FIRST, SECOND):
        make_night(world.settings(), day)
    assert make_rows(world, FIRST, SECOND) == 0
    world.put(NORMAL[0], picture(77))
    world.image(NORMAL[1]).unlink()
    world.write_impressions(SECOND, draw_impressions(SECOND, seed=77))
    assert refresh(world, SECOND, "--remake", "--accept", "churn", "--reason", "a test") == 0
    assert make_rows(world, SECOND, SECOND) == 0
    return world


@pytest.fixture(scope="module")
def otherwise(tmp_path_factory: pytest.TempPathFactory, artefacts: Artefacts) -> World:
    """Makes two nights of string IDs, the second without impressions, by other settings."""
    folder = tmp_path_factory.mktemp("otherwise") / "shop"
    world = pinned(World(folder, "string", extra_settings=OTHERWISE + SECTION), artefacts)
    world.write("impressions", SECOND, [], rows_to_group=1)
    for day in (FIRST, SECOND):
        make_night(world.settings(), day)
    assert make_rows(world, FIRST, SECOND) == 0
    return world


@pytest.fixture(params=["twice", "otherwise"])
def shop(request: pytest.FixtureRequest) -> World:
    return request.getfixturevalue(request.param)


def top_of(shop: World, name: str) -> str:
    """Returns the folder of a whole table."""
    apart = TABLES[name].has_users and "user_root" in shop.extra_settings
    root = shop.folder / "users" if apart else shop.root
    return str(root / ("shared" if TABLES[name].shared else "test") / name)


def folder_of(shop: World, name: str, day: dt.date) -> str:
    """Returns the folder of a day of a table."""
    key = f"dt={day:%Y%m%d}" if "dt=" in shop.extra_settings else f"ds={day}"
    return f"{top_of(shop, name)}/{key}"


def listed(folder: str) -> list[str]:
    """Returns the paths that a day's list of files has."""
    return Path(folder, "_files.txt").read_text().splitlines()


def rows_of(shop: World, name: str, *days: dt.date) -> pa.Table:
    """Returns the published rows of some days, with the day as the column `ds`."""
    parts = []
    for day in days:
        found = partitions.open_published(folder_of(shop, name, day))
        rows = pa.concat_tables(map(partitions.read_parquet, found.paths))
        parts.append(rows.append_column("ds", pa.array([day] * len(rows), pa.date32())))
    return pa.concat_tables(parts)


def with_dates(found: pa.Table) -> pa.Table:
    """Returns the rows with the day, where it is a column, as a date in `ds`.

    Engines tell a day as a date, as text or, of one without dashes, as a number.
    """
    for place, name in enumerate(found.column_names):
        if name in ("ds", "dt"):
            text = pc.cast(found[name], pa.string())
            digits = pc.replace_substring(text, "-", "")
            days = pc.cast(pc.strptime(digits, "%Y%m%d", "s"), pa.date32())
            found = found.set_column(place, "ds", days)
    return found


def check_same(found: pa.Table, expected: pa.Table, name: str) -> None:
    """Asserts that both have the same columns and rows, in whatever order these are."""
    found = with_dates(found)
    assert set(found.column_names) == set(expected.column_names)
    keys = [*(["ds"] if "ds" in found.column_names else []), TABLES[name].key]
    keys += TABLES[name].then_by
    found = found.select(expected.column_names).cast(expected.schema)
    one, other = (arrays.in_order(rows, keys).combine_chunks() for rows in (found, expected))
    assert one.equals(other)


def from_pandas(frame: pd.DataFrame) -> pa.Table:
    return pa.Table.from_pandas(frame, preserve_index=False)


def by_duckdb(query: str, *given: object) -> pa.Table:
    with duckdb.connect() as database:
        return database.sql(query, params=given).to_arrow_table()


def test_every_table_was_published_twice_with_other_rows(twice: World) -> None:
    for name in TABLES:
        kept = folder_of(twice, name, SECOND).replace(str(twice.root), f"{twice.root}/_versions")
        (earlier,) = os.listdir(kept)
        old = pa.concat_tables(map(partitions.read_parquet, glob.glob(f"{kept}/{earlier}/*.p*")))
        now = rows_of(twice, name, SECOND).drop_columns("ds")
        assert len(old)
        assert sorted(map(repr, old.to_pylist())) != sorted(map(repr, now.to_pylist()))


def test_the_other_shop_has_string_ids_and_tables_without_rows(otherwise: World) -> None:
    found = {name: rows_of(otherwise, name, SECOND) for name in TABLES}
    assert {name for name, rows in found.items() if not len(rows)} >= EMPTY
    for name, rows in found.items():
        assert rows[TABLES[name].key].type == pa.string()
        assert len(rows_of(otherwise, name, FIRST))


# ---- Paths -----------------------------------------------------------------------------------

# Of a day's folder; whether the day is a column.
DAY: dict[str, tuple[Callable[[str], pa.Table], bool]] = {
    "pyarrow": (pq.read_table, False),
    "pyarrow dataset": (lambda at: pa.dataset.dataset(at).to_table(), False),
    "pandas": (lambda at: from_pandas(pd.read_parquet(at)), False),
    "duckdb": (lambda at: by_duckdb(f"from '{at}/*.parquet'"), True),
    "polars": (lambda at: pl.read_parquet(f"{at}/*.parquet").to_arrow(), False),
}
# Of a table's folder, with the day as a column.
TABLE: dict[str, Callable[[str], pa.Table]] = {
    "pyarrow": pq.read_table,
    "pyarrow dataset": lambda at: pa.dataset.dataset(at, partitioning="hive").to_table(),
    "pandas": lambda at: from_pandas(pd.read_parquet(at)),
    "duckdb": lambda at: by_duckdb(f"from '{at}/*/*.parquet'"),
    "duckdb, all below": lambda at: by_duckdb(f"from '{at}/**/*.parquet'"),
    "polars": lambda at: pl.read_parquet(f"{at}/*/*.parquet", hive_partitioning=True).to_arrow(),
}
# Of the paths that a list of files has.
LIST: dict[str, tuple[Callable[[list[str]], pa.Table], bool]] = {
    "pyarrow dataset": (lambda paths: pa.dataset.dataset(paths).to_table(), False),
    "pandas": (lambda paths: from_pandas(pd.read_parquet(paths)), True),
    "duckdb": (lambda paths: by_duckdb("from read_parquet(?)", paths), True),
    "polars": (lambda paths: pl.read_parquet(paths).to_arrow(), False),
}


def check_day(found: pa.Table, shop: World, name: str, day: dt.date, with_ds: bool) -> None:
    expected = rows_of(shop, name, day)
    check_same(found, expected if with_ds else expected.drop_columns("ds"), name)


@pytest.mark.parametrize("engine", DAY)
def test_the_folder_of_a_day_gives_its_published_rows(shop: World, engine: str) -> None:
    read, with_ds = DAY[engine]
    for name, day in product(TABLES, (FIRST, SECOND)):
        check_day(read(folder_of(shop, name, day)), shop, name, day, with_ds)


@pytest.mark.parametrize("engine", TABLE)
def test_the_folder_of_a_table_gives_all_days_each_by_its_date(shop: World, engine: str) -> None:
    for name in TABLES:
        found = TABLE[engine](top_of(shop, name))
        check_same(found, rows_of(shop, name, FIRST, SECOND), name)


@pytest.mark.parametrize("engine", LIST)
def test_the_list_of_a_day_gives_its_published_rows(shop: World, engine: str) -> None:
    read, with_ds = LIST[engine]
    for name, day in product(TABLES, (FIRST, SECOND)):
        check_day(read(listed(folder_of(shop, name, day))), shop, name, day, with_ds)


# ---- What makes the tables known -------------------------------------------------------------


def ddl(shop: World, engine: str, capsys: Capture) -> str:
    capsys.readouterr()
    assert courier(shop, "status", "--ddl", engine) == 0
    return capsys.readouterr().out


def day_type(shop: World) -> pa.DataType:
    """Returns the type of the column of days, where an engine is told of it."""
    return pa.string() if "dt=" in shop.extra_settings else pa.date32()


def test_duckdb_has_all_tables_once_it_has_run_what_status_prints(
    shop: World, capsys: Capture
) -> None:
    with duckdb.connect() as database:
        database.execute(ddl(shop, "duckdb", capsys))
        for name, table in TABLES.items():
            place = "shared" if table.shared else "test"
            found = database.sql(f"from {place}.{name}").to_arrow_table()
            assert found.schema.field(-1).type == day_type(shop)
            check_same(found, rows_of(shop, name, FIRST, SECOND), name)


def read_with_spark(
    tmp_path: Path,
    statements: list[str],
    read: dict[str, list[str]],
    tables: dict[str, str],
) -> Callable[[str], pa.Table]:
    """Runs Spark; returns what gives the rows found by a name in `read` or `tables`."""
    asked, out = tmp_path / "asked.json", tmp_path / "found"
    asked.write_text(json.dumps({"statements": statements, "read": read, "tables": tables}))
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [SPARK_PYTHON, SPARK_READER, asked, out], cwd=tmp_path, env=outside, text=True,
        capture_output=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    return lambda name: pq.read_table(out / name)


@pytest.mark.readers
@pytest.mark.skipif(not SPARK_PYTHON.exists(), reason="`make readers` installs Spark")
def test_spark_reads_the_folders_the_lists_and_the_tables_that_it_is_told_of(
    shop: World, tmp_path: Path, capsys: Capture
) -> None:
    """Once those of a shop that has moved since, and has got a column, were run, and twice."""
    now = ddl(shop, "spark", capsys)
    assert shop.folder.name == "shop"
    before = re.sub("\n  `item_ids?` .*,", "", now).replace("/shop/", "/before-it-moved/")
    statements = [
        one for text in (before, now, now) for one in text.strip().removesuffix(";").split(";\n")
    ]
    read, tables = {}, {}
    for name, table in TABLES.items():
        read[f"{name}-day"] = [folder_of(shop, name, SECOND)]
        read[f"{name}-table"] = [top_of(shop, name)]
        read[f"{name}-list"] = listed(folder_of(shop, name, SECOND))
        tables[f"{name}-ddl"] = f"{'shared' if table.shared else 'test'}.{name}"
    found = read_with_spark(tmp_path, statements, read, tables)
    for name in TABLES:
        check_day(found(f"{name}-day"), shop, name, SECOND, False)
        check_day(found(f"{name}-list"), shop, name, SECOND, False)
        assert found(f"{name}-ddl").schema.field(-1).type == day_type(shop)
        for how in ("table", "ddl"):
            check_same(found(f"{name}-{how}"), rows_of(shop, name, FIRST, SECOND), name)
