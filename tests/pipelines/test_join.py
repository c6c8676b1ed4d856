"""`courier join`: a training set of one's own samples, whose rows know what could be known."""

import copy
import datetime as dt
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from feature_jobs.store import partitions
from pipelines.cli import main
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
    assert manifest["counts"]["scores_taken"] == len(samples)
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
    assert manifest["counts"]["scores_taken"] == 0
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
