"""`courier join`: a training set of one's own samples, whose rows know what could be known."""

import copy
import datetime as dt
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from feature_jobs.impressions import ctr_join
from feature_jobs.inputs import RowGroup
from feature_jobs.schemas import InputNotReady
from feature_jobs.store import partitions
from pipelines.cli import main
from pipelines.running import records
from pipelines.training_sets import JoinAsked, make_training_set
from tests.support.commands import Capture, paragraph, published
from tests.support.world import DAYS, World

DAY = DAYS[2]
SCORES = ["sim_scores", "sim_mask", "history_len", "sim_known", "sim_max", "sim_mean", "simtier",
          "same_cluster"]  # fmt: skip
DONE, FAILED, USAGE, NOT_READY = 0, 1, 2, 4


@pytest.fixture
def world(refreshed: World, tmp_path: Path) -> World:
    """Gives a world of one's own after all its nights."""
    found = copy.copy(refreshed)
    found.folder = tmp_path / "shop"
    shutil.copytree(refreshed.folder, found.folder)
    return found


def impressions(world: World, day: dt.date) -> pa.Table:
    folder = world.folder / "impressions" / f"ds={day}"
    return pa.concat_tables(pq.read_table(path) for path in sorted(folder.glob("*.parquet")))


def write_samples(world: World, day: dt.date, *parts: pa.Table, rows: int = 7) -> pa.Table:
    folder = world.folder / "samples" / f"ds={day}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for number, part in enumerate(parts):
        pq.write_table(part, folder / f"{number}.parquet", row_group_size=rows)
    return pa.concat_tables(parts)


def join(world: World, *args: object) -> int:
    command = ["join", "--config", str(world.config), "--samples", "samples/ds={ds}/*.parquet"]
    return main([*command, *map(str, args)])


def joined(world: World, day: dt.date, name: str = "ctr") -> tuple[pa.Table, dict[str, Any]]:
    folder = world.root / "test" / "joined" / name / f"ds={day}"
    found = partitions.open_published(str(folder))
    return pa.concat_tables(map(partitions.read_parquet, found.paths)), found.manifest


def scores_taken(world: World, name: str = "ctr") -> int:
    """Returns how many samples of the day took published scores, as the run noted it."""
    runs = (world.root / "test" / "_runs" / f"ds={DAY}").glob("*/run.json")
    stages = [json.loads(path.read_text())["stages"].get("join", {}) for path in runs]
    (mine,) = (one for one in stages if f"joined/{name}_rows" in one.get("counts", {}))
    return mine["work"]["scores_taken"]


def as_samples(rows: pa.Table) -> pa.Table:
    """Returns impressions as samples: in another order, with columns of their own."""
    order = np.random.default_rng(0).permutation(len(rows))
    rows = rows.take(pa.array(order)).drop_columns(["click_time"])
    return rows.append_column("price", pa.array(np.arange(len(rows)) / 7)).append_column(
        "tags", pa.array([["a", None], []] * (len(rows) // 2) + [None] * (len(rows) % 2))
    )


def scores_of_impressions(world: World, day: dt.date, rows: pa.Table) -> pa.Table:
    """Returns the published scores of some impressions, in their order."""
    found = world.table("user_simscores", day)
    key = ["user_id", "item_id", "event_time"]
    at = {tuple(row.values()): n for n, row in enumerate(found.select(key).to_pylist())}
    places = [at[tuple(row.values())] for row in rows.select(key).to_pylist()]
    return found.select(SCORES).take(pa.array(places))


def available_from(night: dt.date) -> dt.datetime:
    """Returns when a night is available, six hours after its day by default."""
    return dt.datetime.combine(night, dt.time(), dt.UTC) + dt.timedelta(hours=30)


# ---- What comes out ----------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["broadcast", "shuffle"])
def test_impressions_get_their_published_scores_and_the_same_when_they_are_made(
    world: World, by: str
) -> None:
    world.extra_settings = "late_days = 2"
    world.settings()
    text = world.config.read_text()
    world.config.write_text(text.replace("[simscore]\n", f'[simscore]\nembeddings_by = "{by}"\n'))
    samples = write_samples(world, DAY, as_samples(impressions(world, DAY)))
    same = ("--ds", DAY, "--features-from", "same", "--label", "clicked")
    assert join(world, *same) == DONE
    found, manifest = joined(world, DAY)
    assert found.select(samples.column_names).equals(samples)
    expected = scores_of_impressions(world, DAY, samples)
    assert found.select(SCORES).to_pylist() == expected.to_pylist()
    assert scores_taken(world) == len(samples)
    assert manifest["counts"]["positives"] == pc.sum(samples["clicked"]).as_py()
    items = world.table("item_features", DAY)
    cluster = dict(zip(items["item_id"].to_pylist(), items["cluster_id"].to_pylist(), strict=True))
    coarse = dict(
        zip(items["item_id"].to_pylist(), items["cluster_coarse"].to_pylist(), strict=True)
    )
    assert found["cluster_id"].to_pylist() == [
        cluster.get(i, 0) for i in samples["item_id"].to_pylist()
    ]
    assert found["cluster_coarse"].to_pylist() == [
        coarse.get(i, 0) for i in samples["item_id"].to_pylist()
    ]
    assert set(found["feature_ds"].to_pylist()) == {DAY}
    shutil.rmtree(world.root / "test" / "user_simscores" / f"ds={DAY}")
    assert join(world, *same, "--name", "made") == DONE
    made, manifest = joined(world, DAY, "made")
    assert scores_taken(world, "made") == 0
    assert made.equals(found)


def test_a_sample_takes_the_night_that_was_available_at_its_moment(world: World) -> None:
    samples = write_samples(
        world, DAY, *(as_samples(impressions(world, DAY)).slice(n, 60) for n in (0, 60, 120))
    )
    assert join(world, "--ds", DAY) == DONE
    found, manifest = joined(world, DAY)
    assert found.select(samples.column_names).equals(samples)
    expected = []
    for moment in samples["event_time"].to_pylist():
        known = [day for day in DAYS[:3] if available_from(day) <= moment]
        expected.append(max(known, default=None))
    assert found["feature_ds"].to_pylist() == expected
    assert {DAYS[0], DAYS[1]} <= set(expected)
    assert manifest["counts"]["no_snapshot"] == expected.count(None)
    for row, ds in zip(found.to_pylist(), expected, strict=True):
        assert row["has_night"] == (ds is not None)
        if ds is None:
            assert [row[name] for name in ("item_known", "cluster_id", "sim_known")] == [0, 0, 0]
            continue
        items = {r["item_id"]: r for r in world.table("item_features", ds).to_pylist()}
        item = items.get(row["item_id"])
        assert row["item_known"] == (item is not None)
        for name in ("has_image", "in_scope", "cluster_id", "cluster_coarse"):
            assert row[name] == (item[name] if item else 0), name


def test_histories_may_be_those_that_the_night_knew(world: World) -> None:
    samples = write_samples(world, DAY, as_samples(impressions(world, DAY)))
    assert join(world, "--ds", DAY, "--history-as-of", "night") == DONE
    found, _ = joined(world, DAY)
    assert len(found) == len(samples)
    for row in found.to_pylist():
        clicks = {}
        if row["feature_ds"]:
            table = world.table("user_histories", row["feature_ds"]).to_pylist()
            clicks = {user["user_id"]: user["item_ids"] for user in table}
        assert row["history_len"] == len(clicks.get(row["user_id"], ()))


def test_a_night_counts_from_when_it_was_really_published(world: World) -> None:
    """The world's nights were all made long after their days: no sample of theirs knew one."""
    write_samples(world, DAY, as_samples(impressions(world, DAY)))
    assert join(world, "--ds", DAY, "--as-of", "created", "--created-timestamp") == DONE
    found, manifest = joined(world, DAY)
    assert manifest["counts"]["no_snapshot"] == len(found)
    assert set(found["night_created"].to_pylist()) == {None}
    assert join(world, "--ds", DAY, "--name", "day", "--created-timestamp") == DONE
    found, _ = joined(world, DAY, "day")
    for row in found.to_pylist():
        record = records.read_night(world.settings().layout, row["feature_ds"] or DAY)
        assert record
        expected = dt.datetime.fromisoformat(record["published_at"])
        assert row["night_created"] == (expected if row["feature_ds"] else None)


def test_days_together_are_those_of_one_command_each(world: World) -> None:
    for day in DAYS[1:]:
        write_samples(world, day, as_samples(impressions(world, day)))
    ends = ("--start-ds", DAYS[1], "--end-ds", DAYS[3])
    shutil.rmtree(world.root / "test" / "user_simscores")
    assert join(world, *ends) == DONE
    for day in DAYS[1:]:
        assert join(world, "--ds", day, "--name", "alone") == DONE
        assert joined(world, day)[0].equals(joined(world, day, "alone")[0])
    before = {path: path.read_bytes() for path in (world.root / "test" / "joined").rglob("*.*")}
    assert join(world, *ends) == DONE
    assert before == {
        path: path.read_bytes() for path in (world.root / "test" / "joined").rglob("*.*")
    }


def test_the_query_that_it_prints_gives_what_it_publishes(world: World, capsys: Capture) -> None:
    write_samples(world, DAY, as_samples(impressions(world, DAY)))
    same = ("--ds", DAY, "--features-from", "same")
    assert join(world, *same, "--show-sql", "duckdb") == DONE
    query = capsys.readouterr().out
    assert not (world.root / "test" / "joined").exists()
    assert join(world, *same) == DONE
    found, _ = joined(world, DAY)
    with duckdb.connect() as database:
        rows = database.sql(query).to_arrow_table()
    assert rows.column_names == found.column_names
    assert rows.select(SCORES).to_pylist() == found.select(SCORES).to_pylist()
    assert (
        rows.drop_columns(["event_time"]).to_pylist()
        == found.drop_columns(["event_time"]).to_pylist()
    )
    assert join(world, *same, "--show-sql", "spark") == DONE
    assert "parquet.`" in capsys.readouterr().out
    assert join(world, "--ds", DAY, "--show-sql", "spark", "--name", "other") == USAGE
    assert "are not taken: they are of other nights" in capsys.readouterr().err


def test_what_is_to_be_joined_is_told_beforehand(world: World, capsys: Capture) -> None:
    write_samples(world, DAY, as_samples(impressions(world, DAY)))
    assert join(world, "--ds", DAY, "--dry-run") == DONE
    told = capsys.readouterr()
    assert "join           compute: never made" in told.out
    assert "not taken: they are of other nights than these samples know" in told.err
    assert join(world, "--ds", DAY, "--dry-run", "--features-from", "same") == DONE
    assert "taken where a sample is an impression of the day" in capsys.readouterr().err
    assert not (world.root / "test" / "joined").exists()
    assert join(world, "--ds", DAY, "--label", "clicked") == DONE
    assert re.search(r"join .* 152 samples: [\d,]+ matched, .*label rate", capsys.readouterr().out)


def test_the_same_is_a_function(world: World) -> None:
    write_samples(world, DAY, as_samples(impressions(world, DAY)))
    assert join(world, "--ds", DAY) == DONE
    template = str(world.folder / "samples" / "ds={ds}" / "*.parquet")
    columns = {name: name for name in ("user_id", "item_id", "event_time")}
    asked = JoinAsked("mine", template, columns)
    (report,) = make_training_set(world.settings(), [DAY], asked)
    assert report["stages"]["join"]["counts"]["samples"] == 152
    assert joined(world, DAY, "mine")[0].equals(joined(world, DAY)[0])
    with pytest.raises(InputNotReady, match="no partition for ds"):
        make_training_set(world.settings(), [DAYS[1]], asked)


# ---- What cannot be joined ---------------------------------------------------------------------


def with_column(rows: pa.Table, name: str, values: pa.ChunkedArray | pa.Array) -> pa.Table:
    return rows.set_column(rows.column_names.index(name), name, values)


def test_samples_that_cannot_be_read_as_such_are_refused(world: World, capsys: Capture) -> None:
    rows = impressions(world, DAY)
    naive = rows["event_time"].cast(pa.timestamp("us"))
    is_text = world.ids == "string"
    other = (
        pc.utf8_length(rows["item_id"]).cast(pa.int64())
        if is_text
        else rows["item_id"].cast(pa.string())
    )
    no_user = pc.if_else(pc.equal(rows["clicked"], True), rows["user_id"], None)
    for bad, status, said in (
        (with_column(rows, "event_time", naive), USAGE, "Say which it is: --timezone"),
        (with_column(rows, "item_id", other), FAILED, "IDs of two types never meet"),
        (with_column(rows, "user_id", no_user), FAILED, "'user_id' of the samples table is null"),
        (rows.rename_columns(["user_id", "item_id", "event_time", "clicked", "sim_max"]), USAGE,
         "have columns named sim_max, as those of the join are"),
        (rows.rename_columns(["user_id", "item_id", "event_time", "clicked", "sim_bucket"]), USAGE,
         "have columns named sim_bucket, as those of the join are"),
        (rows.rename_columns(["user_id", "item_id", "event_time", "clicked", "ds"]), USAGE,
         "have columns named ds, as those of the join are, or the key of its folders"),
        (rows.rename_columns(["user", "item_id", "event_time", "clicked", "price"]), FAILED,
         "lacks the column 'user_id'"),
    ):  # fmt: skip
        write_samples(world, DAY, bad)
        assert join(world, "--ds", DAY) == status
        told = capsys.readouterr().err
        assert said in told
        assert not (world.root / "test" / "joined").exists()
    write_samples(world, DAY, rows.rename_columns(["u", "i", "t", "clicked", "later"]))
    assert join(world, "--ds", DAY, "--user-id", "u", "--item-id", "i", "--time", "t") == DONE


def test_what_is_not_there_yet_is_told(world: World, capsys: Capture) -> None:
    beyond = DAYS[-1] + dt.timedelta(days=3)
    assert join(world, "--ds", DAY) == NOT_READY
    assert "The samples table has no partition for ds" in capsys.readouterr().err
    rows = impressions(world, DAYS[-1])
    moved = pc.add(rows["event_time"], pa.scalar(dt.timedelta(days=3)))
    write_samples(world, beyond, with_column(rows, "event_time", moved))
    assert join(world, "--ds", beyond) == NOT_READY
    assert "The impressions table has no partition" in capsys.readouterr().err
    assert join(world, "--ds", beyond, "--history-as-of", "night") == DONE
    told = capsys.readouterr().err
    assert f"there is no night of ds {DAYS[-1] + dt.timedelta(days=2)}" in told
    assert set(joined(world, beyond)[0]["feature_ds"].to_pylist()) == {DAYS[-1]}
    write_samples(world, DAYS[0], impressions(world, DAYS[0]))
    assert join(world, "--ds", DAYS[0], "--name", "first") == DONE
    assert "no night is available to samples of ds" in capsys.readouterr().err
    found, manifest = joined(world, DAYS[0], "first")
    assert pc.sum(found["cluster_coarse"]).as_py() == 0
    assert manifest["counts"]["no_snapshot"] == len(found)
    assert pc.sum(found["cluster_id"]).as_py() == 0


def test_nights_of_items_alone_have_no_histories_to_join(world: World, capsys: Capture) -> None:
    world.extra_settings = 'tables = "items"'
    world.settings()
    write_samples(world, DAY, as_samples(impressions(world, DAY)))
    assert join(world, "--ds", DAY, "--history-as-of", "night") == USAGE
    assert 'the settings say tables = "items": nights have none' in paragraph(capsys)
    assert not (world.root / "test" / "joined").exists()


@pytest.mark.parametrize("name", ["_file", "File_Row_Number", "_metadata"])
def test_columns_by_which_the_printed_query_orders_rows_are_refused(
    world: World, capsys: Capture, name: str
) -> None:
    rows = impressions(world, DAY)
    write_samples(world, DAY, rows.append_column(name, rows["clicked"]))
    same = ("--ds", DAY, "--features-from", "same")
    for dialect in ("duckdb", "spark"):
        assert join(world, *same, "--show-sql", dialect) == USAGE
        told = capsys.readouterr()
        assert f"have columns named {name}, by which the query of --show-sql" in told.err
        assert told.out == ""
    assert join(world, *same) == DONE
    assert name in joined(world, DAY)[0].column_names


def test_days_of_one_set_are_made_alike(world: World, capsys: Capture) -> None:
    for day in DAYS[1:3]:
        write_samples(world, day, as_samples(impressions(world, day)))
    assert join(world, "--ds", DAYS[1]) == DONE
    capsys.readouterr()
    assert join(world, "--ds", DAYS[2], "--history-as-of", "night") == USAGE
    assert "history_as_of was moment, is night" in capsys.readouterr().err
    assert join(world, "--ds", DAYS[2]) == DONE


def priced(rows: pa.Table, kind: pa.DataType) -> pa.Table:
    """Returns samples whose prices are of another type."""
    return with_column(rows, "price", rows["price"].cast(kind))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda rows: priced(rows, pa.string()), "'price' of the samples is double on ds {}"),
        (
            lambda rows: rows.drop_columns(["tags"]),
            "'tags' of the samples is list<string> on ds {}",
        ),
        (
            lambda rows: rows.append_column("slot", rows["price"]),
            "'slot' of the samples is missing on ds {}",
        ),
    ],
)
def test_days_of_one_set_have_the_same_columns(
    world: World, capsys: Capture, change: Callable[[pa.Table], pa.Table], told: str
) -> None:
    first, second = DAYS[1:3]
    plain = {day: as_samples(impressions(world, day)) for day in (first, second)}
    for day in (first, second):
        write_samples(world, day, plain[day])
    assert join(world, "--ds", first) == DONE
    before = published(world)
    write_samples(world, second, change(plain[second]))
    assert join(world, "--ds", second) == FAILED
    message = paragraph(capsys)
    assert told.format(first) in message
    assert f"on ds {second}" in message
    assert published(world) == before
    assert join(world, "--ds", second, "--name", "other") == DONE
    ends = ("--start-ds", first, "--end-ds", second)
    before = published(world)
    assert join(world, *ends, "--name", "third") == FAILED
    assert told.format(first) in paragraph(capsys)
    assert published(world) == before
    write_samples(world, first, change(plain[first]))
    assert join(world, *ends) == DONE
    both = [joined(world, day)[0].schema for day in (first, second)]
    assert both[0] == both[1] != pa.schema([])


def test_a_day_without_a_file_fits_every_set(world: World) -> None:
    """Nor does it matter what writers call the values of lists."""
    for day in (DAYS[1], DAYS[3]):
        write_samples(world, day, as_samples(impressions(world, day)))
    for path in (world.folder / "samples" / f"ds={DAYS[3]}").glob("*.parquet"):
        rows = pq.read_table(path, partitioning=None)
        pq.write_table(rows, path, use_compliant_nested_type=False)
    empty = world.folder / "samples" / f"ds={DAY}"
    empty.mkdir()
    (empty / "_SUCCESS").touch()
    for day in (DAY, DAYS[1], DAYS[3]):
        assert join(world, "--ds", day) == DONE
    assert joined(world, DAY)[1]["notes"]["own_columns"] == {}
    rows = as_samples(impressions(world, DAY))
    write_samples(world, DAY, priced(rows, pa.float32()))
    assert join(world, "--ds", DAY) == FAILED


def test_wrong_usage_is_told(world: World, capsys: Capture) -> None:
    write_samples(world, DAY, as_samples(impressions(world, DAY)))
    for args, said in (
        (("--label", "none"), "names a column that is not there"),
        (("--label", "tags"), "names a column that is of type list"),
        (("--name", "No Name"), "is no name of small letters"),
        (("--timezone", "Mars/Base"), "is no IANA time zone"),
        (("--history-as-of", "night", "--features-from", "same"), "knows all clicks of that day"),
        (("--samples", "samples/*.parquet"), "names no day"),
        (("--accept", "churn", "--reason", "x"), "No gate judges a training set"),
    ):
        assert join(world, "--ds", DAY, *args) == USAGE
        assert said in capsys.readouterr().err


# ---- For frameworks ----------------------------------------------------------------------------


def ask_for(world: World, *lines: str) -> None:
    world.settings()
    text = world.config.read_text()
    asked = re.search(r"\[simscore\]\n.*\n", text)
    assert asked
    world.config.write_text(text.replace(asked[0], "\n".join(["[simscore]", *lines, ""])))


def test_what_the_settings_ask_of_scores_is_in_the_set_too(world: World) -> None:
    """Columns, tiers and half floats: taken as they are published, and made, they are the same."""
    samples = write_samples(world, DAY, as_samples(impressions(world, DAY)))
    columns = ["history_cluster_ids", "history_cluster_coarse", "sim_bucket", "top_positions",
               "same_cluster_coarse", "history_item_ids"]  # fmt: skip
    ask_for(world, f"columns = {columns}", 'tiers = "muse"', "top_k = 3",
            'embedding_dtype = "float16"')  # fmt: skip
    same = ("--ds", DAY, "--features-from", "same")
    assert join(world, *same, "--name", "made") == DONE
    made, _ = joined(world, DAY, "made")
    assert scores_taken(world, "made") == 0
    command = ["simscore", "--config", str(world.config), "--ds", str(DAY)]
    assert main(command) == DONE
    assert join(world, *same) == DONE
    found, _ = joined(world, DAY)
    assert scores_taken(world) == len(samples)
    assert found.equals(made)
    assert set(columns) <= set(found.column_names)
    assert {len(row) for row in found["simtier"].to_pylist()} == {22}
    coarse = found["history_cluster_coarse"].to_pylist()
    assert max(max(row) for row in coarse) > 0


@pytest.mark.parametrize("layout", ["fuxictr", "torcheasyrec"])
def test_a_set_for_a_framework_has_its_configuration(
    world: World, layout: str, capsys: Capture
) -> None:
    rows = as_samples(impressions(world, DAY))
    write_samples(world, DAY, rows.drop_columns(["tags"]))
    ask_for(world, 'columns = ["history_cluster_ids", "history_item_ids"]')
    asked = ("--ds", DAY, "--layout", layout, "--label", "clicked")
    assert join(world, *asked) == DONE
    told = capsys.readouterr().err
    found, manifest = joined(world, DAY)
    plain = ("--ds", DAY, "--name", "plain")
    assert join(world, *plain) == DONE
    expected, _ = joined(world, DAY, "plain")
    assert found["cluster_id"].to_pylist() == expected["cluster_id"].to_pylist()
    assert manifest["counts"]["matched"] > 0
    (config,) = (world.root / "test" / "joined" / "ctr").glob("_*/*")
    days = pq.read_table(world.root / "test" / "joined" / "ctr")
    assert days["cluster_id"].to_pylist() == expected["cluster_id"].to_pylist()
    assert f"the configuration for the framework is {config}" in told
    text = config.read_text()
    if layout == "fuxictr":
        assert "rebuild_dataset: False" in text
        assert "vocab_size: 10" in text
        assert found["clicked"].type == pa.float32()
    else:
        assert "num_buckets: 10" in text
        assert "history__sim_scores" in found.column_names
    before = config.stat().st_mtime_ns
    assert join(world, *asked) == DONE
    assert config.stat().st_mtime_ns == before
    assert join(world, "--ds", DAY, "--layout", layout, "--name", "third") == USAGE
    assert "needs a column of labels" in capsys.readouterr().err
    odd = rows.append_column("raw", pa.array([b"x"] * len(rows)))
    write_samples(world, DAY, odd)
    status = USAGE if layout == "torcheasyrec" else DONE
    assert join(world, *asked, "--name", "other") == status
    assert ("Column raw is of type binary" in capsys.readouterr().err) == (status == USAGE)
    assert (world.root / "test" / "joined" / "other").exists() == (status == DONE)


# ---- What reviews found ------------------------------------------------------------------------


def test_a_day_without_a_file_or_a_row_is_joined_too(world: World) -> None:
    folder = world.folder / "samples" / f"ds={DAYS[1]}"
    folder.mkdir(parents=True)
    (folder / "_SUCCESS").touch()
    write_samples(world, DAY, as_samples(impressions(world, DAY)))
    ends = ("--start-ds", DAYS[1], "--end-ds", DAY, "--label", "clicked")
    for layout in ("plain", "fuxictr"):
        assert join(world, *ends, "--layout", layout, "--name", layout) == DONE
        found, manifest = joined(world, DAYS[1], layout)
        assert len(found) == 0
        assert manifest["counts"]["samples"] == 0


def test_users_of_another_type_than_the_night_knows_are_refused(
    world: World, capsys: Capture
) -> None:
    rows = impressions(world, DAY)
    users = pa.array([f"u{n}" if world.ids == "int" else None for n in range(len(rows))])
    users = users if world.ids == "int" else pa.array(range(len(rows)))
    write_samples(world, DAY, with_column(rows, "user_id", users))
    assert join(world, "--ds", DAY, "--history-as-of", "night") == FAILED
    assert "in user_histories of ds" in capsys.readouterr().err


def test_late_samples_take_no_scores_of_another_night(world: World) -> None:
    """Late impressions were scored while the night that they know was a hole."""
    ask_for(world, 'features_from = "previous"', 'columns = ["history_item_ids"]')
    samples = write_samples(world, DAY, as_samples(impressions(world, DAY)))
    late = pc.less(samples["event_time"], dt.datetime.combine(DAY, dt.time(), dt.UTC))
    assert pc.any(late).as_py()
    command = ["simscore", "--config", str(world.config), "--ds", str(DAY)]
    assert main(command) == DONE
    assert join(world, "--ds", DAY) == DONE
    assert scores_taken(world) == len(samples) - pc.sum(late).as_py()
    shutil.rmtree(world.root / "test" / "user_simscores" / f"ds={DAY}")
    assert join(world, "--ds", DAY, "--name", "made") == DONE
    assert joined(world, DAY)[0].equals(joined(world, DAY, "made")[0])


def test_columns_of_many_parts_are_read_once_for_each_row_group(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = as_samples(impressions(world, DAY))
    write_samples(world, DAY, rows[:23], rows[23:], rows=20)
    read, asked = ctr_join.read_rows, list[int]()

    def counted(group: RowGroup, wanted: Sequence[str], carry: Sequence[str] = ()) -> pa.Table:
        asked.extend([group.index] * bool(carry))
        return read(group, wanted, carry)

    monkeypatch.setattr(ctr_join, "read_rows", counted)
    world.rows_per_shard = 5
    world.settings()
    assert join(world, "--ds", DAY) == DONE
    found, manifest = joined(world, DAY)
    assert found.select(rows.column_names).equals(rows)
    groups = 2 + -(-(len(rows) - 23) // 20)
    assert len(manifest["files"]) == -(-len(rows) // 5) > groups
    assert groups <= len(asked) <= 2 * groups  # one that a part shares with the next is read again
