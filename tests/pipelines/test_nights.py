"""Four nights of the tiny world give tables equal to what plain loops make of the same inputs."""

import datetime as dt
import json
import os
import sys
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from courier_model.encoder import choose_precision, embed, load_encoder
from courier_model.images import BadImage, decode
from feature_jobs.codebooks.codebook import load_codebook
from feature_jobs.store import files
from pipelines.config import Gates
from pipelines.stages import ITEMS, NIGHT
from tests.support import oracles
from tests.support.world import (
    CPU,
    DAY_US,
    DAYS,
    LEAVES_ON_DAY_2,
    MISSING,
    NEW_ON_DAY_2,
    OUT_OF_SCOPE,
    SAME_BYTES_AS_1,
    SCOPE,
    SILENT_USER,
    UNDECODABLE,
    UNKNOWN,
    WITHOUT_CATEGORY,
    World,
    catalogue_items,
    category,
    draw_impressions,
)

LENGTH, WINDOW_DAYS = 5, 2


def vectors_of(world: World, day: dt.date) -> dict[Any, np.ndarray]:
    rows = world.table("item_embeddings", day)
    vectors = np.array(rows["embedding"].to_pylist(), "f4")
    return dict(zip(rows["item_id"].to_pylist(), vectors, strict=True))


def log_of(day: dt.date) -> list[dict[str, Any]]:
    """Returns impressions up to `day`, all that the world drew: the oracle applies the window."""
    return [
        row
        for number, other in enumerate(DAYS)
        if other <= day
        for row in draw_impressions(other, seed=number)
    ]


def as_us(time: dt.datetime) -> int:
    return (time - dt.datetime(1970, 1, 1, tzinfo=dt.UTC)) // dt.timedelta(microseconds=1)


def named(world: World, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**r, "user": world.user(r["user"]), "item": world.item(r["item"])} for r in rows]


def test_the_world_is_not_trivial(refreshed: World) -> None:
    simscores = [refreshed.table("user_simscores", day).to_pylist() for day in DAYS]
    assert (
        len(list((refreshed.root / "test/user_simscores" / f"ds={DAYS[0]}").glob("*.parquet")))
        == 16
    )
    assert len(list((refreshed.folder / "impressions" / f"ds={DAYS[0]}").glob("*.parquet"))) == 3
    last = simscores[-1]
    assert {row["history_len"] for row in last} >= {0, LENGTH}
    assert any(row["sim_known"] == 0 < row["history_len"] for row in last)
    assert any(0 < row["sim_known"] < row["history_len"] for row in last)
    assert any(row["same_cluster"] > 1 for row in last)
    assert len(set(refreshed.table("item_features", DAYS[3])["cluster_id"].to_pylist())) > 2


@pytest.mark.parametrize("day", DAYS)
def test_embeddings_and_rejects_together_are_the_catalogue(refreshed: World, day: dt.date) -> None:
    embedded = refreshed.table("item_embeddings", day)
    inside = embedded.filter(embedded["in_catalogue"])["item_id"].to_pylist()
    rejected = refreshed.table("item_rejects", day)["item_id"].to_pylist()
    assert sorted(inside + rejected) == sorted(refreshed.item(i) for i in catalogue_items(day))
    assert sorted(rejected) == sorted(refreshed.item(i) for i in (MISSING, UNDECODABLE))


def test_every_embedding_is_the_encoders_own(refreshed: World, artefacts: Any) -> None:
    encoder = load_encoder(artefacts.encoder)
    refreshed.write_images(DAYS[3])
    found = vectors_of(refreshed, DAYS[3])
    assert len(found) == 10
    for number in catalogue_items(DAYS[3]):
        if number in (MISSING, UNDECODABLE):
            continue
        pixels = decode(refreshed.image(number).read_bytes(), encoder.preprocessing)
        alone = embed(encoder, pixels[None], 4, CPU, choose_precision(CPU))[0]
        np.testing.assert_allclose(found[refreshed.item(number)], alone, atol=1e-5)
    norms = np.linalg.norm(list(found.values()), axis=1)
    np.testing.assert_allclose(norms, 1, atol=1e-5)
    same = (found[refreshed.item(number)] for number in (SAME_BYTES_AS_1, 1))
    np.testing.assert_array_equal(*same)
    with pytest.raises(BadImage):
        decode(refreshed.image(UNDECODABLE).read_bytes(), encoder.preprocessing)


def test_a_former_item_keeps_its_embedding_for_the_window_and_no_longer(refreshed: World) -> None:
    former = refreshed.item(LEAVES_ON_DAY_2)
    before = vectors_of(refreshed, DAYS[0])[former]
    for day in DAYS[1:3]:
        np.testing.assert_array_equal(vectors_of(refreshed, day)[former], before)
        row = refreshed.table("item_embeddings", day).filter(
            pa.compute.field("item_id") == former
        ).to_pylist()[0]  # fmt: skip
        assert (row["in_catalogue"], row["left_catalogue_ds"]) == (False, DAYS[1])
    assert former not in vectors_of(refreshed, DAYS[3])
    assert former not in refreshed.table("item_features", DAYS[3])["item_id"].to_pylist()


def test_rejects_count_the_days_on_which_they_were_tried(refreshed: World) -> None:
    """Rejects wait one day, then two, then four: they are tried on days 1, 2 and 4, not on 3."""
    tried = {DAYS[0]: (1, DAYS[0], 1), DAYS[1]: (2, DAYS[1], 2), DAYS[2]: (2, DAYS[1], 2)}
    tried[DAYS[3]] = (3, DAYS[3], 4)
    for day, (attempts, last, wait) in tried.items():
        rows = {r["item_id"]: r for r in refreshed.table("item_rejects", day).to_pylist()}
        missing, broken = rows[refreshed.item(MISSING)], rows[refreshed.item(UNDECODABLE)]
        assert (missing["stage"], missing["reason"]) == ("read", "missing")
        assert (broken["stage"], broken["reason"]) == ("decode", "not_an_image")
        for row in rows.values():
            assert (row["attempts"], row["first_ds"], row["last_ds"]) == (attempts, DAYS[0], last)
            assert row["next_ds"] == last + dt.timedelta(days=wait)


@pytest.mark.parametrize("day", DAYS)
def test_item_features_equal_the_loop_over_items(
    refreshed: World, day: dt.date, artefacts: Any
) -> None:
    codebook = load_codebook(artefacts.codebook)
    vectors = vectors_of(refreshed, day)
    rejected = set(refreshed.table("item_rejects", day)["item_id"].to_pylist())
    rows = refreshed.table("item_features", day).to_pylist()
    assert sorted(row["item_id"] for row in rows) == sorted({*vectors, *rejected})
    numbers = {refreshed.item(n): n for n in range(1, 14)}
    inside = {refreshed.item(n) for n in catalogue_items(day)}
    for row in rows:
        item = row["item_id"]
        scope = category(numbers[item]) in SCOPE
        expected, coarse, distance, second = 0, 0, 0.0, 0.0
        if item in vectors and scope:
            place, distance = oracles.nearest(vectors[item], codebook.centres["main"])
            expected = int(codebook.numbers["main"][place])
            others = np.delete(codebook.centres["main"], place, axis=0)
            second = oracles.nearest(vectors[item], others)[1]
            coarse_place = oracles.nearest(vectors[item], codebook.centres["coarse"])[0]
            coarse = int(codebook.numbers["coarse"][coarse_place])
        assert row["category"] == category(numbers[item])
        assert (row["has_image"], row["in_scope"]) == (item in vectors, scope)
        assert row["in_catalogue"] == (item in inside)
        assert (row["cluster_id"], row["cluster_coarse"]) == (expected, coarse)
        assert row["centre_distance"] == pytest.approx(distance, abs=1e-5)
        assert row["second_distance"] == pytest.approx(second, abs=1e-5)
        vector = vectors[item] if expected else np.zeros_like(codebook.centres["main"][0])
        np.testing.assert_array_equal(np.array(row["embedding"], "f4"), vector)
    without = {refreshed.item(OUT_OF_SCOPE), refreshed.item(WITHOUT_CATEGORY)}
    assert {r["cluster_id"] for r in rows if r["item_id"] in without} == {0}


@pytest.mark.parametrize("day", DAYS)
def test_user_histories_equal_the_loop_over_users(refreshed: World, day: dt.date) -> None:
    clicks = oracles.clicks_of(named(refreshed, log_of(day)))
    end = int(dt.datetime.combine(day, dt.time(), dt.UTC).timestamp()) * 1_000_000 + DAY_US
    expected = {}
    for user in {who for who, _, _ in clicks}:
        past = oracles.history(clicks, user, end, LENGTH, WINDOW_DAYS * DAY_US)
        times = [max(t for w, i, t in clicks if (w, i) == (user, x) and t < end) for x in past]
        if past:
            expected[user] = (past, times)
    rows = refreshed.table("user_histories", day).to_pylist()
    found = {r["user_id"]: (r["item_ids"], [as_us(t) for t in r["click_times"]]) for r in rows}
    assert found == expected
    assert len(found) == SILENT_USER - 1


@pytest.mark.parametrize("day", DAYS)
def test_user_simscores_equal_the_loop_over_impressions(
    refreshed: World, day: dt.date, artefacts: Any
) -> None:
    impressions = named(refreshed, draw_impressions(day, seed=DAYS.index(day)))
    clicks = oracles.clicks_of(named(refreshed, log_of(day)))
    features = {r["item_id"]: r for r in refreshed.table("item_features", day).to_pylist()}
    vectors = {
        i: v for i, v in vectors_of(refreshed, day).items() if features[i]["in_scope"]
    }  # fmt: skip
    cluster = {item: row["cluster_id"] for item, row in features.items()}
    expected = []
    for row in impressions:
        past = oracles.history(clicks, row["user"], row["event_time"], LENGTH, WINDOW_DAYS * DAY_US)
        scores, mask = oracles.score(row["item"], past, vectors, LENGTH)
        mine = cluster.get(row["item"], 0)
        same = sum(mine > 0 and cluster.get(other, 0) == mine for other in past)
        expected.append((row, past, scores, mask, same))
    found = refreshed.table("user_simscores", day).to_pylist()
    assert len(found) == len(impressions) == len({row["impression_id"] for row in found})
    found.sort(key=lambda r: (str(r["user_id"]), str(r["item_id"]), r["event_time"], r["clicked"]))
    expected.sort(
        key=lambda e: (str(e[0]["user"]), str(e[0]["item"]), e[0]["event_time"], e[0]["clicked"])
    )
    for row, (impression, past, scores, mask, same) in zip(found, expected, strict=True):
        assert (row["user_id"], row["item_id"]) == (impression["user"], impression["item"])
        assert row["clicked"] == impression["clicked"]
        assert as_us(row["event_time"]) == impression["event_time"]
        assert row["encoder_id"] == os.path.basename(artefacts.encoder)
        assert row["codebook_id"] == os.path.basename(artefacts.codebook)
        assert row["history_item_ids"] == past
        assert row["history_len"] == len(past)
        assert row["sim_mask"] == mask
        np.testing.assert_allclose(row["sim_scores"], scores, atol=2e-6)
        real = [s for s, known in zip(row["sim_scores"], mask, strict=True) if known]
        assert row["sim_known"] == len(real)
        assert row["sim_max"] == pytest.approx(max(real, default=0.0), abs=1e-6)
        assert row["sim_mean"] == pytest.approx(float(np.mean(real)) if real else 0.0, abs=1e-6)
        assert row["simtier"] == oracles.tiers(row["sim_scores"], mask)
        assert row["same_cluster"] == same


def test_an_unknown_or_new_item_scores_only_once_it_is_known(refreshed: World) -> None:
    for day, known in ((DAYS[0], False), (DAYS[1], True)):
        rows = refreshed.table("user_simscores", day).to_pylist()
        new = [r for r in rows if r["item_id"] == refreshed.item(NEW_ON_DAY_2)]
        assert any(r["history_len"] for r in new)
        assert any(r["sim_known"] for r in new) == known
        unknown = [r for r in rows if r["item_id"] == refreshed.item(UNKNOWN)]
        assert unknown
        assert not any(r["sim_known"] for r in unknown)


@pytest.mark.parametrize("day", DAYS)
def test_the_run_of_a_night_states_when_by_what_and_what_each_stage_took(
    refreshed: World, day: dt.date
) -> None:
    (path,) = (refreshed.root / "test/_runs" / f"ds={day}").rglob("run.json")
    run = json.loads(path.read_text())
    started, ended = (dt.datetime.fromisoformat(run[name]) for name in ("started", "ended"))
    assert started.utcoffset() == ended.utcoffset() == dt.timedelta(0)
    seconds = (ended - started).total_seconds()
    assert 0 < sum(stage["wall_seconds"] for stage in run["stages"].values()) <= seconds
    assert run["command"] == sys.argv[1:]
    assert run["versions"].keys() >= {"courier", "apache-beam", "pyarrow", "torch"}
    units = {kind.name: "items" if kind in ITEMS else "impressions" for kind in NIGHT}
    assert run["stages"].keys() == units.keys()
    for name, stage in run["stages"].items():
        rows, cpu = stage[units[name]], stage["cpu_seconds"]
        assert stage["rates"] == {
            f"{units[name]}_per_second": pytest.approx(rows / stage["wall_seconds"], rel=0.01),
            f"{units[name]}_per_core_second": pytest.approx(rows / cpu, rel=0.01),
        }
        assert stage["peak_memory_bytes"] > 100_000_000  # Beam and torch are loaded
        assert (stage["bucket_requests"], stage["days_in_job"]) == (0, 1)
        assert {gate["level"] for gate in stage["gates"]} <= {"ok", "warn", "unjudged"}
    judged = {gate["gate"] for stage in run["stages"].values() for gate in stage["gates"]}
    assert judged == set(Gates.model_fields)
    assert run["stages"]["simscore"]["impressions"] == 152
    assert run["stages"]["item-features"]["items"] == len(refreshed.table("item_features", day))


def test_bytes_of_a_run_are_at_least_those_of_its_images_and_tables(refreshed: World) -> None:
    day = DAYS[0]
    (path,) = (refreshed.root / "test/_runs" / f"ds={day}").rglob("run.json")
    stages = json.loads(path.read_text())["stages"]
    assert stages["embed"]["bytes_read"] > stages["embed"]["work"]["bytes_read"] > 0
    for kind in NIGHT:
        folders = [refreshed.settings().layout.folder(table, day) for table in kind.tables]
        size = sum(file.size for top in folders for file in files.glob(f"{top}/*.parquet"))
        assert size < stages[kind.name]["bytes_written"] < 50 * size


def test_published_partitions_are_read_by_a_plain_path(refreshed: World) -> None:
    folder = refreshed.root / "test/user_simscores" / f"ds={DAYS[3]}"
    rows = len(refreshed.table("user_simscores", DAYS[3]))
    assert rows == 152
    assert len(pd.read_parquet(folder)) == rows
    assert duckdb.sql(f"select count(*) from '{folder}/*.parquet'").fetchall() == [(rows,)]
    everything = refreshed.root / "test/user_simscores"
    per_day = duckdb.sql(
        f"select ds, count(*) from read_parquet('{everything}/*/*.parquet', hive_partitioning=true)"
        " group by ds order by ds"
    ).fetchall()
    assert per_day == [(day, 152) for day in DAYS]
