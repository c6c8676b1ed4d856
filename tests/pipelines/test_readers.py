"""Each engine reads exactly the published rows of every table, by the paths that the docs name.

All tables were published twice, so that files of an earlier version are kept. What is expected are
the rows of the files that the manifests name.
"""

import glob
import json
import os
import subprocess
from collections.abc import Callable
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
SPARK_READER = ROOT / "tests/support/spark_reader.py"
SPARK_PYTHON = ROOT / ".venv-readers/bin/python"


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, artefacts: Artefacts) -> World:
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


def top_of(shop: World, name: str) -> str:
    """Returns the folder of a whole table."""
    return str(shop.root / ("shared" if TABLES[name].shared else "test") / name)


def day_of(shop: World, name: str) -> str:
    """Returns the folder of the day of a table that was published twice."""
    return f"{top_of(shop, name)}/ds={SECOND}"


def listed(folder: str) -> list[str]:
    """Returns the paths that a day's list of files has."""
    return Path(folder, "_files.txt").read_text().splitlines()


def rows_of(shop: World, name: str, *days: object) -> pa.Table:
    """Returns the published rows of some days, with the day as the column `ds`."""
    parts = []
    for day in days:
        found = partitions.open_published(f"{top_of(shop, name)}/ds={day}")
        rows = pa.concat_tables(map(partitions.read_parquet, found.paths))
        parts.append(rows.append_column("ds", pa.array([day] * len(rows), pa.date32())))
    return pa.concat_tables(parts)


def check_same(found: pa.Table, expected: pa.Table, name: str) -> None:
    """Asserts that both have the same columns and rows, in whatever order these are.

    A day that is told as text, as some engines do, is the same day.
    """
    if "ds" in found.column_names:
        place = found.column_names.index("ds")
        days = pc.cast(pc.cast(found["ds"], pa.string()), pa.date32())
        found = found.set_column(place, "ds", days)
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


def test_every_table_was_published_twice_with_other_rows(shop: World) -> None:
    for name in TABLES:
        kept = day_of(shop, name).replace(str(shop.root), f"{shop.root}/_versions")
        (earlier,) = os.listdir(kept)
        old = pa.concat_tables(map(partitions.read_parquet, glob.glob(f"{kept}/{earlier}/*.p*")))
        now = rows_of(shop, name, SECOND).drop_columns("ds")
        assert len(old)
        assert sorted(map(repr, old.to_pylist())) != sorted(map(repr, now.to_pylist()))


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


def check_day(found: pa.Table, shop: World, name: str, with_ds: bool) -> None:
    expected = rows_of(shop, name, SECOND)
    check_same(found, expected if with_ds else expected.drop_columns("ds"), name)


@pytest.mark.parametrize("engine", DAY)
def test_the_folder_of_a_day_gives_its_published_rows(shop: World, engine: str) -> None:
    read, with_ds = DAY[engine]
    for name in TABLES:
        check_day(read(day_of(shop, name)), shop, name, with_ds)


@pytest.mark.parametrize("engine", TABLE)
def test_the_folder_of_a_table_gives_all_days_each_by_its_date(shop: World, engine: str) -> None:
    for name in TABLES:
        found = TABLE[engine](top_of(shop, name))
        check_same(found, rows_of(shop, name, FIRST, SECOND), name)


@pytest.mark.parametrize("engine", LIST)
def test_the_list_of_a_day_gives_its_published_rows(shop: World, engine: str) -> None:
    read, with_ds = LIST[engine]
    for name in TABLES:
        check_day(read(listed(day_of(shop, name))), shop, name, with_ds)


# ---- What makes the tables known -------------------------------------------------------------


def ddl(shop: World, engine: str, capsys: Capture) -> str:
    capsys.readouterr()
    assert courier(shop, "status", "--ddl", engine) == 0
    return capsys.readouterr().out


def test_duckdb_has_all_tables_once_it_has_run_what_status_prints(
    shop: World, capsys: Capture
) -> None:
    with duckdb.connect() as database:
        database.execute(ddl(shop, "duckdb", capsys))
        for name, table in TABLES.items():
            place = "shared" if table.shared else "test"
            found = database.sql(f"from {place}.{name}").to_arrow_table()
            assert found["ds"].type == pa.date32()
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
    statements = ddl(shop, "spark", capsys).strip().removesuffix(";").split(";\n")
    read, tables = {}, {}
    for name, table in TABLES.items():
        read[f"{name}-day"] = [day_of(shop, name)]
        read[f"{name}-table"] = [top_of(shop, name)]
        read[f"{name}-list"] = listed(day_of(shop, name))
        tables[f"{name}-ddl"] = f"{'shared' if table.shared else 'test'}.{name}"
    found = read_with_spark(tmp_path, statements, read, tables)
    for name in TABLES:
        check_day(found(f"{name}-day"), shop, name, False)
        check_day(found(f"{name}-list"), shop, name, False)
        for how in ("table", "ddl"):
            rows = found(f"{name}-{how}")
            assert rows["ds"].type == pa.date32()
            check_same(rows, rows_of(shop, name, FIRST, SECOND), name)
