"""Impressions scored as a shop serves them take the night that plain loops choose for each.

A second pin begins in the middle, rows come late, and the first day knows no night yet.
"""

import copy
import datetime as dt
import json
import os
import shutil
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pytest

from feature_jobs.impressions import simscore
from pipelines.nightly import plan_nights
from pipelines.planning.impressions import PlannedScores
from pipelines.running.states import Look
from tests.conftest import Artefacts, pinned
from tests.pipelines.reports.test_audit import audit, texts
from tests.pipelines.test_nights import LENGTH, WINDOW_DAYS, as_us, log_of, named, vectors_of
from tests.support import oracles
from tests.support.commands import Capture, counts, courier, manifest, published
from tests.support.world import DAY_US, DAYS, World, draw_impressions, make_codebook, make_encoder

DELAY_HOURS = 6
AT, AFTER = "night available at that very moment", "night available 1 us after"


@pytest.fixture(scope="module")
def later(tmp_path_factory: pytest.TempPathFactory) -> Artefacts:
    """Gives another encoder, and a codebook for it, pinned from the third day on."""
    folder = tmp_path_factory.mktemp("later")
    encoder = make_encoder(folder / "encoders", seed=1)
    return Artefacts(encoder, make_codebook(folder / "codebooks", encoder))


@pytest.fixture(scope="module", params=["UTC", "America/New_York"])
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, artefacts: Artefacts,
    later: Artefacts,
) -> World:  # fmt: skip
    """Makes a world night by night; tests only read it."""
    world = World(
        tmp_path_factory.mktemp("served") / "shop",
        extra_settings=f'day_timezone = "{request.param}"',
        simscore='features_from = "previous"\ncolumns = ["history_item_ids", "sim_bucket"]',
        gates="\n".join(
            f"{name}.fail = 1.0" for name in ("balance", "dead_clusters", "churn", "late")
        ),
    )
    pinned(world, artefacts).pin(DAYS[2], later.encoder, later.codebook)
    for day in DAYS:
        assert courier(world, "refresh", "--ds", str(day)) == 0
    return world


def nights_of(world: World) -> dict[dt.date, int]:
    """Returns since when each night is available, in microseconds since 1970."""
    zone = ZoneInfo(world.settings().day_timezone)
    ends = {day: dt.datetime.combine(day + dt.timedelta(days=1), dt.time(), zone) for day in DAYS}
    return {day: as_us(end) + DELAY_HOURS * DAY_US // 24 for day, end in ends.items()}


def expected_rows(world: World, day: dt.date) -> list[dict[str, Any]]:
    clicks, found = oracles.clicks_of(named(world, log_of(day))), []
    features = {ds: world.table("item_features", ds).to_pylist() for ds in DAYS}
    vectors = {ds: vectors_of(world, ds) for ds in DAYS}
    for row in named(world, draw_impressions(day, seed=DAYS.index(day))):
        moment = row["event_time"]
        ds = oracles.night_at(moment, nights_of(world).items())
        items = {item["item_id"]: item for item in features[ds]} if ds else {}
        known = {i: v for i, v in vectors[ds].items() if items[i]["in_scope"]} if ds else {}
        past = oracles.history(clicks, row["user"], moment, LENGTH, WINDOW_DAYS * DAY_US)
        scores, mask = oracles.score(row["item"], past, known, LENGTH)
        cluster = {item: one["cluster_id"] for item, one in items.items()}
        mine = cluster.get(row["item"], 0)
        same = sum(mine > 0 and cluster.get(other, 0) == mine for other in past)
        who = items[row["item"]] if row["item"] in items else next(iter(items.values()), {})
        found.append(
            {
                "user_id": row["user"], "item_id": row["item"], "event_time": moment,
                "clicked": row["clicked"], "feature_ds": ds, "history_item_ids": past,
                "sim_mask": mask, "same_cluster": same, "sim_scores": scores,
                "encoder_id": who.get("encoder_id", ""),
                "codebook_id": who.get("codebook_id", ""),
            }
        )  # fmt: skip
    return sorted(found, key=_key)


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["user_id"], row["item_id"], row["event_time"], row["clicked"]


@pytest.mark.parametrize("day", DAYS)
def test_each_impression_is_scored_with_the_night_that_the_loop_chooses(
    served: World, day: dt.date
) -> None:
    expected = expected_rows(served, day)
    found = served.table("user_simscores", day).to_pylist()
    found = sorted(({**row, "event_time": as_us(row["event_time"])} for row in found), key=_key)
    assert len(found) == len(expected) == len({row["impression_id"] for row in found})
    for row, right in zip(found, expected, strict=True):
        scores = right.pop("sim_scores")
        assert {name: row[name] for name in right} == right
        np.testing.assert_allclose(row["sim_scores"], scores, atol=2e-6)
        assert row["simtier"] == oracles.tiers(row["sim_scores"], row["sim_mask"])


def test_the_nights_are_of_every_kind(served: World, artefacts: Artefacts) -> None:
    days = {day: {row["feature_ds"] for row in expected_rows(served, day)} for day in DAYS}
    assert days[DAYS[0]] == {None}
    assert days[DAYS[1]] == {None, DAYS[0]}
    assert days[DAYS[3]] >= {DAYS[1], DAYS[2]}
    encoders = served.table("user_simscores", DAYS[3])["encoder_id"].to_pylist()
    assert len(set(encoders)) == 2
    assert os.path.basename(artefacts.encoder) in encoders


def test_impressions_without_a_night_score_0_and_are_counted(served: World) -> None:
    first = served.table("user_simscores", DAYS[0])
    made = counts(served, "user_simscores", DAYS[0])
    assert made["without_snapshot"] == made["impressions"] == len(first)
    assert made["histories_without_snapshot"] == len(first) - made["without_history"] > 0
    assert (made["unknown_items"], made["scored_impressions"]) == (0, 0)
    assert counts(served, "user_simscores", DAYS[3])["without_snapshot"] == 0


def test_a_range_is_its_nights_either_way_that_embeddings_come(served: World) -> None:
    days = ("--start-ds", str(DAYS[0]), "--end-ds", str(DAYS[-1]))
    nights, kept = published(served), served.root.with_name("kept")
    served.root.rename(kept)
    try:
        for way in ("broadcast", "shuffle"):
            assert courier(served, "refresh", *days, "--embeddings-by", way) == 0
            assert published(served) == nights, way
            shutil.rmtree(served.root)
    finally:
        shutil.rmtree(served.root, ignore_errors=True)
        kept.rename(served.root)


def test_days_of_a_job_share_the_copies_of_their_nights(served: World) -> None:
    settings = served.settings()
    planned = [
        one
        for night in plan_nights(settings, DAYS[2:], settings.night)
        for one in night.planned
        if isinstance(one, PlannedScores)
    ]
    keys = [
        {night.broadcast_key for night in one.as_worker_knows_it(Look(), "a job").nights}
        for one in planned
    ]
    assert [len(one) for one in keys] == [2, 3]
    assert keys[0] < keys[1]
    others = {night.broadcast_key for night in planned[1].as_worker_knows_it(Look(), "b").nights}
    assert not keys[1] & others


def test_churn_of_impressions_is_that_of_their_night(served: World) -> None:
    """Codebooks of two encoders have nothing in common: all that can be compared has moved."""
    made = counts(served, "user_simscores", DAYS[3])
    assert 0 < made["moved_impressions"] <= made["compared_impressions"]


# ---- Audited, validated ------------------------------------------------------------------------


def test_a_later_night_moves_nothing_before_it(served: World, capsys: Capture) -> None:
    status, report = audit(served, capsys)
    assert status == 0, report["findings"]
    planted = {one["plant"]: one for one in report["planted"]}
    assert planted[AT]["moved"] == planted[AT]["sampled"] > 0
    assert {"feature_ds", "encoder_id"} <= set(planted[AT]["columns"])
    assert (planted[AFTER]["moved"], planted[AFTER]["wrongly"]) == (0, 0)
    assert "152 published user_simscores are what their inputs give" in texts(report, "ok")


def test_a_night_that_is_known_too_early_is_a_leak(served: World, capsys: Capture) -> None:
    real = simscore.night_at
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simscore, "night_at", lambda moments, nights: real(moments + 1, nights))
        status, report = audit(served, capsys)
    assert status == 1
    assert f"{AFTER}: " in texts(report, "leak")


def test_a_night_that_is_known_too_late_is_found(served: World, capsys: Capture) -> None:
    real = simscore.night_at
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simscore, "night_at", lambda moments, nights: real(moments - 1, nights))
        status, report = audit(served, capsys)
    assert status == 1
    assert "scored with an older night than they may know" in texts(report, "leak")


def test_what_is_published_is_valid_and_is_computed_again(served: World, capsys: Capture) -> None:
    for day in DAYS:
        capsys.readouterr()
        assert courier(served, "validate", "--ds", str(day)) == 0
        assert "152 impressions scored again" in capsys.readouterr().out


def test_the_manifest_names_the_nights_and_their_versions(served: World) -> None:
    made = manifest(served, "user_simscores", DAYS[3])
    nights = [dt.date.fromisoformat(one["ds"]) for one in made["inputs"]["snapshots"]]
    assert nights == [DAYS[2], DAYS[1], DAYS[0]]
    assert [one["from_us"] for one in made["inputs"]["snapshots"]] == [
        nights_of(served)[ds] for ds in nights
    ]
    for ds in nights:
        assert made["made_from"]["snapshots"][str(ds)] == {
            name: manifest(served, name, ds)["version"]
            for name in ("item_features", "item_embeddings")
        }


def test_a_night_whose_pin_is_gone_is_told_and_the_rest_is_audited(
    served: World, capsys: Capture, artefacts: Artefacts, later: Artefacts
) -> None:
    """What is pinned by now holds for the last days alone."""
    world = copy.copy(served)
    world.pins = served.pins[1:]
    capsys.readouterr()
    assert courier(world, "audit", "--ds", str(DAYS[3]), "--json") == 0
    report = json.loads(capsys.readouterr().out)
    told = texts(report, "unverified")
    for day in DAYS[:2]:
        assert f"codebook of the night of ds {day} are not pinned for it any more" in told
    assert os.path.basename(artefacts.codebook) in told
    assert f"encoder {os.path.basename(later.encoder)} was made from" in texts(report, "ok")
    assert "published user_simscores are what their inputs give" in texts(report, "ok")


def test_a_night_that_was_pruned_leaves_nothing_to_compute_scores_again_from(
    served: World, capsys: Capture
) -> None:
    copy = served.folder.with_name("copy")
    shutil.copytree(served.root, copy)
    try:
        for name in ("item_features", "item_embeddings", "item_rejects"):
            shutil.rmtree(served.root / "test" / name / f"ds={DAYS[0]}")
        assert courier(served, "audit", "--ds", str(DAYS[1])) == 0
        told = f"the night of ds {DAYS[0]} that its scores took was taken away"
        assert told in capsys.readouterr().out
    finally:
        shutil.rmtree(served.root)
        copy.rename(served.root)
