"""The slow join, which judges `courier join`, agrees with real nights and with `night_at`.

Its random worlds hold every case that the command has to get right.
"""

import dataclasses
import datetime as dt
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from feature_jobs.impressions.snapshots import Snapshot, night_at
from feature_jobs.store import partitions
from pipelines.running import records
from tests.support.join_worlds import DRAWN, World, make_world
from tests.support.slow_join import (
    ALWAYS,
    Law,
    Names,
    Options,
    SlowJoin,
    available_from,
    check_join,
    midnight,
    night_of,
    read_clicks,
    read_nights,
)
from tests.support.world import DAY_US, DAYS
from tests.support.world import World as Shop

SCORES = (
    "sim_scores", "sim_mask", "history_len", "sim_known", "sim_max", "sim_mean", "simtier",
    "same_cluster",
)  # fmt: skip


# ---- Real nights -------------------------------------------------------------------------------


def log_files(shop: Shop, day: dt.date) -> list[Path]:
    return sorted((shop.folder / f"impressions/ds={day}").glob("*.parquet"))


def join_log(shop: Shop, day: dt.date) -> pa.Table:
    """Joins a day's own impressions to the night of the day."""
    law = Law(history_len=5, window_us=2 * DAY_US)
    clicks = read_clicks({ds: log_files(shop, ds) for ds in DAYS}, law)
    nights = read_nights(shop.root, "test")
    join = SlowJoin(day, nights, clicks, ("coarse",), law, Options(features_from="same"))
    rows = pa.concat_tables(partitions.read_parquet(str(path)) for path in log_files(shop, day))
    return join.of(rows, Names())


@pytest.mark.parametrize("day", DAYS)
def test_impressions_are_joined_to_what_their_night_published_to_the_bit(
    refreshed: Shop, day: dt.date
) -> None:
    published = {
        (row["user_id"], row["item_id"], row["event_time"]): row
        for row in refreshed.table("user_simscores", day).to_pylist()
    }
    items = {row["item_id"]: row for row in refreshed.table("item_features", day).to_pylist()}
    rows = join_log(refreshed, day).to_pylist()
    assert sum(row["sim_known"] > 0 for row in rows) > 20
    for row in rows:
        found = published[row["user_id"], row["item_id"], row["event_time"]]
        assert row["feature_ds"] == day
        assert {name: row[name] for name in SCORES} == {name: found[name] for name in SCORES}
        item = items.get(row["item_id"])
        assert row["item_known"] == (item is not None)
        for name in ("has_image", "in_scope", "cluster_id", "cluster_coarse"):
            assert row[name] == (item[name] if item else 0)


# ---- Random worlds -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def worlds(in_memory: Path) -> list[World]:
    folder = in_memory / "slow-join"
    return [make_world(seed, folder / str(seed)) for seed in range(24)]


def test_the_newest_night_is_that_of_night_at(worlds: list[World]) -> None:
    for world in worlds:
        for options in DRAWN:
            nights = world.slow_join(world.joined[0], options).nights
            there = [Snapshot(one.ds, available_from(one, world.law, options)) for one in nights]
            starts = [one.from_us for one in there]
            moments = np.array([max(at + step, ALWAYS) for at in starts for step in (-1, 0, 1)])
            for moment, place in zip(moments, night_at(moments, there), strict=True):
                found = night_of(int(moment), nights, world.law, options)
                assert found == (nights[place] if place >= 0 else None)


def test_worlds_are_the_same_for_a_seed_wherever_they_lie(tmp_path: Path) -> None:
    one, other = (make_world(7, tmp_path / name) for name in ("one", "other"))
    assert one.options == other.options
    for ds in one.joined:
        options = dataclasses.asdict(one.options)
        check_join(one.expected(ds, **options), other.expected(ds, **options))


def test_nights_are_published_as_the_command_finds_them(worlds: list[World]) -> None:
    for world in worlds:
        days = world.layout.recorded_days()
        assert days
        for ds in days:
            record = records.read_night(world.layout, ds)
            assert record
            assert records.is_whole(record, world.layout)
        latest = records.read_latest(world.layout)
        assert latest
        assert latest["ds"] == str(days[-1])


def test_what_was_joined_is_in_the_order_of_the_samples(worlds: list[World]) -> None:
    for world in worlds:
        for ds in world.joined:
            found = world.expected(ds)
            samples = world.samples_of(ds)
            assert found.select(samples.column_names).equals(samples)


def test_the_worlds_are_not_trivial(worlds: list[World]) -> None:
    seen: Counter[str] = Counter()
    for world in worlds:
        seen.update(nights_of(world))
        for ds in world.joined:
            join = world.slow_join(ds, world.options)
            for row in join.of(world.samples_of(ds), world.names).to_pylist():
                seen.update(kinds_of_row(join, world.names, row))
    assert set(seen) == {
        "late night", "hole", "embedded alone", "published again", "two codebooks", "two encoders",
        "no snapshot", "older night", "unknown", "no image", "out of scope", "former", "no history",
        "late", "too late", "scored", "same cluster", "masked", "text", "int", "mapped",
        "several files", *(str(options) for options in DRAWN),
    }  # fmt: skip


def nights_of(world: World) -> list[str]:
    """Returns what kinds of nights a world has."""
    kinds = ["text" if world.is_text else "int", str(world.options)]
    kinds += ["two codebooks"] if len(world.pins) > 1 else []
    kinds += ["two encoders"] if world.mixes_encoders else []
    kinds += ["mapped"] if world.names != Names() else []
    kinds += ["several files"] if len(world.sample_files(world.joined[0])) > 1 else []
    created: dict[dt.date, int] = {}
    for day in world.days:
        record = records.read_night(world.layout, day)
        if record is None:
            embedded = (world.root / f"test/item_embeddings/ds={day}").exists()
            kinds.append("embedded alone" if embedded else "hole")
            continue
        kinds += ["published again"] if record["before"] else []
        moment = dt.datetime.fromisoformat(record["published_at"])
        created[day] = round(moment.timestamp() * 1e6)
    kinds += [
        "late night"
        for one in created
        for other in created
        if one < other and created[one] > created[other]
    ]
    return kinds


def kinds_of_row(join: SlowJoin, names: Names, row: dict[str, Any]) -> list[str]:
    """Returns of what kinds a joined sample is."""
    start, late_us = midnight(join.ds, join.law.day_timezone), join.law.late_us
    moment = round(row[names.event_time].timestamp() * 1e6)
    night = next((n for n in join.nights if n.ds == row["feature_ds"]), None)
    item = night.features.get(row[names.item_id]) if night else None
    known = item is not None
    kinds = {
        "no snapshot": not row["has_night"],
        "older night": row["has_night"] and (join.ds - row["feature_ds"]).days > 1,
        "unknown": row["has_night"] and not row["item_known"],
        "no image": known and not row["has_image"],
        "out of scope": known and not row["in_scope"],
        "former": item is not None and not item["in_catalogue"],
        "no history": row["history_len"] == 0,
        "late": start - late_us <= moment < start,
        "too late": moment < start - late_us,
        "scored": row["sim_known"] > 0,
        "same cluster": row["same_cluster"] > 0,
        "masked": 0 < row["sim_known"] < row["history_len"],
    }
    return [kind for kind, is_so in kinds.items() if is_so]
