"""What `courier status --ddl` prints fits the engine, the names of days and the types of columns.

DuckDB runs it here; whole nights, and Spark, are in test_readers.
"""

import datetime as dt
import hashlib
import os

import duckdb
import pyarrow as pa
import pytest

from feature_jobs.schemas import (
    ITEM_EMBEDDINGS,
    ITEM_REJECTS,
    USER_SIMSCORES,
    InputNotReady,
    OperatorError,
    Table,
)
from feature_jobs.store import arrays, documents, files, partitions
from feature_jobs.store.partitions import MANIFEST, SUCCESS
from pipelines.cli import main
from pipelines.config import Settings
from pipelines.reports import ddl
from tests.support.commands import Capture
from tests.support.table_rows import embeddings

DAYS = (dt.date(2026, 3, 1), dt.date(2026, 3, 2))


def settings_of(root: str, partition: str = "ds={ds}") -> Settings:
    return Settings(
        root=root, tables="items", feature_set="my-shop", output={"partition": partition},
        catalogue={"path": f"{root}/items", "image_roots": (root,)},
    )  # fmt: skip


def publish(
    settings: Settings, table: Table, ds: dt.date, schema: pa.Schema, rows: pa.Table
) -> None:
    folder = settings.layout.folder(table, ds)
    name = "part-00000-of-00001-abc.parquet"
    rows = pa.Table.from_arrays([rows[f.name].cast(f.type) for f in schema], schema=schema)
    partitions.write_parquet(os.path.join(folder, name), rows)
    manifest = documents.to_json({"files": [{"name": name, "rows": len(rows)}], "version": "abc"})
    files.write_bytes(os.path.join(folder, MANIFEST), manifest)
    digest = hashlib.sha256(manifest).hexdigest()
    files.write_bytes(os.path.join(folder, SUCCESS), f"{digest}\n".encode())


def published(root: str, partition: str = "ds={ds}") -> Settings:
    """Returns settings of a shop whose embeddings of two days are published, of 3 and 4 items."""
    settings = settings_of(root, partition)
    for n, ds in enumerate(DAYS):
        publish(settings, ITEM_EMBEDDINGS, ds, *embeddings(3 + n))
    return settings


def statement(text: str, begins: str) -> str:
    """Returns the one statement that begins so."""
    (found,) = (part for part in text.split("\n\n") if part.startswith(begins))
    return found


def test_spark_has_a_typed_column_for_each_and_the_days_that_are_published(
    near_bucket: str,
) -> None:
    settings = published(near_bucket)
    begun = f"{near_bucket}/my-shop/item_embeddings/ds=2026-03-03/part-00000-of-00001-x.parquet"
    files.write_bytes(begun, b"of a day that is on its way")
    found = ddl.statements(settings, "spark")
    assert "CREATE DATABASE IF NOT EXISTS `my_shop`;" in found
    top = f"{near_bucket}/my-shop/item_embeddings"
    name = "`my_shop`.`item_embeddings`"
    table = statement(found, "DROP TABLE")
    assert table.startswith(f"DROP TABLE IF EXISTS {name};\nCREATE TABLE {name} (\n")
    comments = [line for line in found.splitlines() if line.startswith("--")]
    assert not any(line.endswith(";") for line in comments)  # as who splits statements counts on
    assert "an external one (it has a LOCATION), so that the files stay" in found
    for line in (
        "  `item_id` BIGINT COMMENT 'the item',",
        "  `embedding` ARRAY<FLOAT> COMMENT '[256] unit vector',",
        "  `image_mtime` TIMESTAMP COMMENT 'file time; null where generations exist',",
        "  `in_catalogue` BOOLEAN COMMENT 'false for an item that left within window_days',",
        "  `ds` DATE",
        f") USING PARQUET PARTITIONED BY (`ds`) LOCATION '{top}';",
        f"  PARTITION (`ds` = '2026-03-01') LOCATION '{top}/ds=2026-03-01'",
        f"  PARTITION (`ds` = '2026-03-02') LOCATION '{top}/ds=2026-03-02';",
    ):
        assert line in table.splitlines()
    assert "2026-03-03" not in found
    assert "-- Left out, since nothing of them is published: item_features, item_rejects" in found


def test_bigquery_infers_lists_takes_the_day_from_the_path_and_is_told_not_to_have_been_run(
    near_bucket: str,
) -> None:
    found = ddl.statements(published(near_bucket), "bigquery")
    assert "could not run this there" in found
    table = statement(found, "CREATE OR REPLACE EXTERNAL TABLE `my_shop.item_embeddings`")
    top = f"{near_bucket}/my-shop/item_embeddings"
    for line in (
        "  `item_id` INT64 OPTIONS (description = 'the item'),",
        "  `embedding` ARRAY<FLOAT64> OPTIONS (description = '[256] unit vector'),",
        "WITH PARTITION COLUMNS (`ds` DATE)",
        "  enable_list_inference = TRUE,",
        f"  uris = ['{top}/*.parquet'],",
        f"  hive_partition_uri_prefix = '{top}'",
    ):
        assert line in table.splitlines()


def test_bigquery_refuses_what_lies_on_a_disk(tmp_path) -> None:
    with pytest.raises(OperatorError, match=f"item_embeddings lies at {tmp_path}"):
        ddl.statements(published(str(tmp_path)), "bigquery")


def in_duckdb(settings: Settings, query: str) -> list[tuple]:
    with duckdb.connect() as database:
        database.execute(ddl.statements(settings, "duckdb"))
        return database.sql(query).fetchall()


def test_duckdb_reads_all_days_whatever_the_root_is_called(tmp_path) -> None:
    settings = published(str(tmp_path / "it's [my] *shop?"))
    published(str(tmp_path / "it's m shop"))  # which the name would match as a pattern
    rows = in_duckdb(
        settings, "select ds, count(*) from my_shop.item_embeddings group by 1 order by 1"
    )
    assert rows == [(DAYS[0], 3), (DAYS[1], 4)]


def test_a_key_with_days_in_another_spelling_is_text(tmp_path) -> None:
    settings = published(str(tmp_path), "dt={ds:%Y%m%d}")
    rows = in_duckdb(
        settings, "select dt, count(*) from my_shop.item_embeddings group by 1 order by 1"
    )
    assert rows == [("20260301", 3), ("20260302", 4)]
    found = ddl.statements(settings, "spark")
    assert "  `dt` STRING\n) USING PARQUET PARTITIONED BY (`dt`)" in found
    assert "PARTITION (`dt` = '20260302') LOCATION" in found


def test_where_folders_are_no_key_and_value_it_is_said_what_tells_the_day(tmp_path) -> None:
    settings = published(str(tmp_path), "{ds:%Y%m%d}")
    query = "select filename, count(*) from my_shop.item_embeddings group by 1 order by 1"
    (one, three), (_, four) = in_duckdb(settings, query)
    assert (three, four) == (3, 4)
    assert one.endswith("/item_embeddings/20260301/part-00000-of-00001-abc.parquet")
    assert "`filename` alone tells the day" in ddl.statements(settings, "duckdb")
    found = ddl.statements(settings, "spark")
    assert "no key=value: each is added with its day" in found
    assert f"PARTITION (`ds` = '2026-03-02') LOCATION 'file:{tmp_path}/my-shop/" in found


def test_of_bigquery_a_day_without_a_key_is_told_by_the_file_name(near_bucket: str) -> None:
    found = ddl.statements(published(near_bucket, "{ds:%Y%m%d}"), "bigquery")
    assert "_FILE_NAME alone tells the day" in found
    assert "PARTITION" not in found
    assert "hive" not in found


def test_a_day_that_lacks_a_column_of_later_ones_has_nulls_there(tmp_path) -> None:
    settings = settings_of(str(tmp_path))
    schema = ITEM_REJECTS.schema(pa.int64())
    rows = pa.Table.from_pylist(
        [
            {"item_id": 1, "stage": "read", "reason": "missing", "message": "m", "attempts": 1}
            | dict.fromkeys(("first_ds", "last_ds", "next_ds"), DAYS[0])
        ],
        schema=schema,
    )
    without = schema.remove(schema.get_field_index("message"))
    publish(settings, ITEM_REJECTS, DAYS[0], without, rows)
    publish(settings, ITEM_REJECTS, DAYS[1], schema, rows)
    query = "select ds, message from my_shop.item_rejects order by ds"
    assert in_duckdb(settings, query) == [(DAYS[0], None), (DAYS[1], "m")]


@pytest.mark.parametrize("engine", ["spark", "bigquery"])
def test_a_carried_column_that_the_engine_has_no_type_for_is_left_out_and_named(
    near_bucket: str, engine: str
) -> None:
    carried = [
        pa.field("place", pa.list_(pa.string())), pa.field("dwell", pa.duration("us")),
        pa.field("it's", pa.int32(), metadata={"meaning": "the user's \\ own"}),
    ]  # fmt: skip
    schema = USER_SIMSCORES.schema(pa.string(), pa.string(), pa.string(), extra=carried)
    settings = settings_of(near_bucket)
    publish(settings, USER_SIMSCORES, DAYS[0], schema, arrays.empty_rows(schema))
    found = ddl.statements(settings, engine)
    assert "-- Left out: `dwell`, which is of the Arrow type duration[us]." in found
    assert "  `dwell`" not in found
    assert "  `place` ARRAY<STRING>" in found
    assert "'the user\\'s \\\\ own'" in found


def test_of_nothing_no_columns_are_known(tmp_path) -> None:
    with pytest.raises(InputNotReady, match="Nothing is published"):
        ddl.statements(settings_of(str(tmp_path)), "duckdb")


@pytest.mark.parametrize("other", [("--ds", "2026-03-01"), ("--tables",), ("--json",)])
def test_ddl_goes_with_no_other_option(other: tuple[str, ...], capsys: Capture) -> None:
    assert main(["status", "--ddl", "spark", *other]) == 2
    assert "goes with no other option" in capsys.readouterr().err
