"""What `courier join --show-sql` prints gives what the slow join does, where scores are published.

DuckDB runs it here, and Spark where `make readers` has installed it.
"""

import dataclasses
import datetime as dt
import itertools
import shutil
from pathlib import Path
from typing import Any, Literal

import duckdb
import pyarrow as pa
import pytest

from feature_jobs.impressions.snapshots import Snapshot
from feature_jobs.schemas import ITEM_FEATURES, TIMESTAMP, InputNotReady
from feature_jobs.store import partitions
from pipelines.reports.join_sql import JoinQuery, SqlNight, show_sql
from tests.pipelines.test_readers import SPARK_PYTHON, read_with_spark
from tests.support.join_worlds import World, make_world
from tests.support.slow_join import ALWAYS, Names, Options, available_from, check_join

FeaturesFrom = Literal["previous", "same"]
SCORES = (
    "sim_scores", "sim_mask", "history_len", "sim_known", "sim_max", "sim_mean", "simtier",
    "same_cluster",
)  # fmt: skip
CREATED = Options(as_of="created", created_timestamp=True)
# What the samples are joined with, and what published scores were made with.
WAYS: list[tuple[Options, FeaturesFrom]] = [
    (Options(), "previous"), (CREATED, "previous"), (Options(features_from="same"), "same"),
]  # fmt: skip
NIGHT = SqlNight(Snapshot(dt.date(2026, 3, 1), 0), ["/f/part-0.parquet"], 0)
QUERY = JoinQuery(
    dt.date(2026, 3, 2), ["/s/a.parquet"], "user_id", "item_id", "event_time", [NIGHT],
    ["/u/part-0.parquet"], "previous", 5,
)  # fmt: skip


def query_of(world: World, ds: dt.date, options: Options, made_with: FeaturesFrom) -> JoinQuery:
    """Publishes the scores of a day, and returns what joins its samples to them."""
    scores = world.publish_scores(ds, made_with)
    nights = []
    for one in world.slow_join(ds, options).known:
        features = partitions.open_published(world.layout.folder(ITEM_FEATURES, one.ds))
        snapshot = Snapshot(one.ds, available_from(one, world.law, options))
        nights.append(SqlNight(snapshot, features.paths, one.created_us))
    return JoinQuery(
        ds, world.sample_files(ds), *world.names, nights, scores.paths, made_with,
        world.law.history_len, world.labels, options.created_timestamp,
    )  # fmt: skip


def expected(
    world: World, ds: dt.date, options: Options, made_with: FeaturesFrom
) -> tuple[pa.Table, list[int]]:
    """Returns what the slow join gives, with zeros where no score is published.

    Published are those of the log, of the night that `made_with` says. Returns with it how many
    real scores there are before and after.
    """
    samples = world.samples_of(ds)
    joined = world.slow_join(ds, options).of(samples, world.names)
    scored = world.slow_join(ds, Options(features_from=made_with)).of(world.logged[ds], Names())
    there = set(zip(*keys(scored, Names()), nights_of(scored, ds, made_with), strict=True))
    rows = joined.to_pylist()
    mine = zip(*keys(joined, world.names), joined["feature_ds"].to_pylist(), strict=True)
    for row, key in zip(rows, mine, strict=True):
        if key not in there:
            for name in SCORES:
                row[name] = [0] * len(row[name]) if isinstance(row[name], list) else 0
    found = pa.Table.from_pylist(rows, joined.schema)
    return found, [sum(table["sim_known"].to_pylist()) for table in (joined, found)]


def keys(rows: pa.Table, names: Names) -> list[list[Any]]:
    moments = rows[names.event_time].cast(TIMESTAMP, safe=False)
    columns = (rows[names.user_id], rows[names.item_id], moments)
    return [column.to_pylist() for column in columns]


def nights_of(scored: pa.Table, ds: dt.date, made_with: FeaturesFrom) -> list[dt.date | None]:
    """Returns of which night scores are: those of a table with one night are all of it."""
    return scored["feature_ds"].to_pylist() if made_with == "previous" else [ds] * len(scored)


def by_duckdb(statement: str) -> pa.Table:
    with duckdb.connect() as database:
        return database.sql(statement).to_arrow_table()


def check(found: pa.Table, rows: pa.Table) -> None:
    """Asserts that an engine gives these columns and rows; it names time zones in its own way."""
    assert found.column_names == rows.column_names
    for name in set(rows.column_names) - {"event_time", "at", "night_created"}:
        assert found[name].type == rows[name].type, name
    check_join(found.cast(rows.schema), rows)


@pytest.fixture(scope="module")
def worlds(in_memory: Path) -> list[World]:
    return [make_world(seed, in_memory / "join-sql" / str(seed)) for seed in range(100, 110)]


@pytest.mark.parametrize(("options", "made_with"), WAYS)
def test_duckdb_gives_what_the_slow_join_does(
    worlds: list[World], options: Options, made_with: FeaturesFrom
) -> None:
    before = after = 0
    for number, world in enumerate(worlds):
        ds = world.joined[number % 3]
        rows, real = expected(world, ds, options, made_with)
        query = query_of(world, ds, options, made_with)
        if not query.nights:  # of its own day
            continue
        check(by_duckdb(show_sql("duckdb", query)), rows)
        before, after = before + real[0], after + real[1]
    assert before > after > 10  # of candidates there are none


@pytest.mark.readers
@pytest.mark.skipif(not SPARK_PYTHON.exists(), reason="`make readers` installs Spark")
def test_spark_gives_what_the_slow_join_does(in_memory: Path, tmp_path: Path) -> None:
    folder = in_memory / "join-sql-spark"
    drawn = [make_world(seed, folder / str(seed)) for seed in range(100, 106)]
    statements, rows = [], dict[str, pa.Table]()
    for world, ds in itertools.product(drawn, range(3)):
        day, (options, made_with) = world.joined[ds], WAYS[ds]
        query = query_of(world, day, options, made_with)
        if unit_of(world, day) == "ns" or not query.nights:  # Spark reads no nanoseconds
            continue
        name = f"joined_{len(rows)}"
        rows[name], _ = expected(world, day, options, made_with)
        statement = show_sql("spark", query)
        statements.append(f"CREATE TABLE {name} USING PARQUET AS {statement.removesuffix(';')}")
    assert len(rows) > 6
    found = read_with_spark(tmp_path, statements, {}, {name: name for name in rows})
    for name, table in rows.items():
        check(found(name), table)


def unit_of(world: World, ds: dt.date) -> str:
    return str(world.samples_of(ds)[world.names.event_time].type.unit)


# ---- Texts -------------------------------------------------------------------------------------


def test_a_night_that_came_after_a_newer_one_is_known_to_no_sample() -> None:
    days = [dt.date(2026, 3, day) for day in (1, 2, 3)]
    moments = [300, 100, 100]  # the first is late; of two at one moment the newer one counts
    nights = [
        SqlNight(Snapshot(day, moment), [f"/f/{day}.parquet"], 0)
        for day, moment in zip(days, moments, strict=True)
    ]
    statement = show_sql("duckdb", dataclasses.replace(QUERY, nights=nights))
    assert "DATE '2026-03-03'" in statement
    assert "2026-03-01" not in statement
    assert statement.count("WHEN") == 1


@pytest.mark.parametrize("dialect", ["duckdb", "spark"])
def test_no_night_is_refused_with_what_to_run(dialect: Literal["duckdb", "spark"]) -> None:
    with pytest.raises(InputNotReady, match=r"ds 2026-03-02.*courier refresh"):
        show_sql(dialect, dataclasses.replace(QUERY, nights=[]))


def test_paths_and_columns_are_taken_as_they_are_written(worlds: list[World]) -> None:
    world = worlds[0]
    ds, odd = world.joined[0], world.folder / "it's [a] {b}, *"
    query = query_of(world, ds, Options(), "previous")
    odd.mkdir()
    paths = [shutil.copy(path, odd) for path in query.samples]
    (odd / "other.parquet").write_bytes(b"which nobody named")
    found = by_duckdb(show_sql("duckdb", dataclasses.replace(query, samples=paths)))
    check(found, expected(world, ds, Options(), "previous")[0])
    named = dataclasses.replace(query, user_id='my "user"', samples=paths)
    assert '"my ""user"""' in show_sql("duckdb", named)
    spark = show_sql("spark", dataclasses.replace(named, user_id="my `user`"))
    assert "`my ``user```" in spark
    assert r"it's [a\] {b\}\, \*/" not in spark
    assert r"it's \[a\] \{b\}\, \*/" in spark


def test_a_night_that_was_always_known_and_one_that_nobody_noted_can_be_asked_for() -> None:
    night = dataclasses.replace(NIGHT, snapshot=Snapshot(QUERY.ds, ALWAYS), created_us=None)
    query = dataclasses.replace(QUERY, nights=[night], created_timestamp=True)
    statement = show_sql("duckdb", query)
    assert ">= TIMESTAMPTZ '0001-01-01 00:00:00.000000+00:00' THEN DATE '2026-03-02'" in statement
    assert "WHEN DATE '2026-03-02' THEN NULL" in statement


def test_files_of_a_bucket_are_read_there() -> None:
    query = dataclasses.replace(QUERY, samples=["gs://shop/a.parquet", "gs://shop/b.parquet"])
    assert "parquet.`gs://shop/{a.parquet,b.parquet}`" in show_sql("spark", query)
    assert "['gs://shop/a.parquet', 'gs://shop/b.parquet']" in show_sql("duckdb", query)
