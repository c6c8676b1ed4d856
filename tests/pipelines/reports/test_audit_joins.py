"""The audit of a training set finds all that samples know too early, and in sound ones nothing."""

import json
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from feature_jobs.impressions import clicks, ctr_join
from feature_jobs.impressions.snapshots import Snapshot
from pipelines.reports import audit_joins
from tests.pipelines.reports.test_audit import (
    AFTER,
    AT,
    BEFORE,
    LATER,
    histories_as_of_the_end_of_the_day,
    moved,
    texts,
)
from tests.pipelines.test_join import join
from tests.support.commands import Capture, courier, published
from tests.support.world import DAYS, World, draw_impressions

DAY = DAYS[2]
NIGHT_AT, NIGHT_AFTER, NIGHT_OF_DAY = (
    "night available at that very moment", "night available 1 us after", "night of the day itself",
)  # fmt: skip


def audit(joinable: World, capsys: Capture, name: str = "ctr") -> tuple[int, dict[str, Any]]:
    """Audits the third day; returns the exit status, and the report of a training set."""
    capsys.readouterr()
    status = courier(joinable, "audit", "--ds", str(DAY), "--json")
    return status, json.loads(capsys.readouterr().out)["training_sets"][name]


# ---- No leak -----------------------------------------------------------------------------------


def test_later_clicks_and_later_nights_move_no_sample_and_earlier_ones_do(
    joinable: World, capsys: Capture
) -> None:
    assert join(joinable, "--ds", DAY) == 0
    files = published(joinable)
    status, report = audit(joinable, capsys)
    assert (status, published(joinable)) == (0, files)
    assert "the 152 published rows are what their inputs give" in texts(report, "ok")
    found = moved(report)
    sampled = {plant["plant"]: plant["sampled"] for plant in report["planted"]}
    assert found.pop(BEFORE) == (6, 0)
    assert found.pop(NIGHT_AT) == (sampled[NIGHT_AT], 0)
    assert sampled[NIGHT_AT] > 0
    assert found == dict.fromkeys([AT, AFTER, LATER, NIGHT_AFTER, NIGHT_OF_DAY], (0, 0))
    columns = {plant["plant"]: set(plant["columns"]) for plant in report["planted"]}
    assert {"history_len", "sim_scores", "history_item_ids"} <= columns[BEFORE]
    assert "feature_ds" in columns[NIGHT_AT]


def test_sets_are_told_below_their_night(joinable: World, capsys: Capture) -> None:
    for name in ("ctr", "search"):
        assert join(joinable, "--ds", DAY, "--name", name) == 0
    capsys.readouterr()
    assert courier(joinable, "audit", "--ds", str(DAY), "--impressions", "3") == 0
    out = capsys.readouterr().out
    assert "audit of ds 2026-03-03: bucket 0 of 1, 152 impressions of 6 users" in out
    for name in ("ctr", "search"):
        told = f"audit of the training set {name} of ds 2026-03-03: bucket 0 of 1, 152 samples of 6"
        assert told in out
    assert out.splitlines()[-1] == "no leak was found"


@pytest.mark.parametrize("args", [("--history-as-of", "night"), ("--features-from", "same")])
def test_sets_that_were_asked_for_otherwise_are_audited_as_such(
    joinable: World, capsys: Capture, args: tuple[str, str]
) -> None:
    assert join(joinable, "--ds", DAY, *args) == 0
    status, report = audit(joinable, capsys)
    assert status == 0
    assert "the 152 published rows are what their inputs give" in texts(report, "ok")
    if "night" in args:
        assert set(moved(report)) == {NIGHT_AT, NIGHT_AFTER, NIGHT_OF_DAY}
        assert "no click of a log reaches a sample" in texts(report, "ok")
    else:
        assert set(moved(report)) == {BEFORE, AT, AFTER, LATER}
        assert "the night of their own day" in texts(report, "unverified")


def test_a_set_of_a_day_without_a_night_is_audited_alone(joinable: World, capsys: Capture) -> None:
    for table in ("item_embeddings", "item_rejects", "item_features"):
        shutil.rmtree(joinable.root / "test" / table / f"ds={DAY}")
    assert join(joinable, "--ds", DAY) == 0
    assert courier(joinable, "audit", "--ds", str(DAY)) == 0
    assert "the night was not audited: " in capsys.readouterr().out
    shutil.rmtree(joinable.root / "test/joined")
    assert courier(joinable, "audit", "--ds", str(DAY)) == 4


def test_a_set_that_cannot_be_read_leaves_the_report_of_the_night(
    joinable: World, capsys: Capture
) -> None:
    for name in ("ctr", "search"):
        assert join(joinable, "--ds", DAY, "--name", name) == 0
    for path in (joinable.root / "test/joined/ctr" / f"ds={DAY}").glob("*.parquet"):
        path.write_bytes(b"torn")
    with pytest.MonkeyPatch.context() as patch:
        histories_as_of_the_end_of_the_day(patch)
        capsys.readouterr()
        assert courier(joinable, "audit", "--ds", str(DAY), "--json") == 1
    report = json.loads(capsys.readouterr().out)
    assert f"{AFTER}: " in texts(report, "leak")
    torn, whole = (report["training_sets"][name] for name in ("ctr", "search"))
    assert "the training set was not audited: " in texts(torn, "unverified")
    assert "not audited" not in texts(whole, "unverified")


@pytest.mark.parametrize("torn", ["_manifest.json", "_SUCCESS"])
def test_a_set_that_is_not_whole_is_told(joinable: World, capsys: Capture, torn: str) -> None:
    for name in ("ctr", "search"):
        assert join(joinable, "--ds", DAY, "--name", name) == 0
    path = joinable.root / "test/joined/ctr" / f"ds={DAY}" / torn
    path.write_bytes(path.read_bytes()[:20])
    status, report = audit(joinable, capsys)
    assert status == 0
    assert "the training set was not audited: No published partition" in texts(report, "unverified")
    _, report = audit(joinable, capsys, "search")
    assert "the 152 published rows are what their inputs give" in texts(report, "ok")


# ---- Leaks -------------------------------------------------------------------------------------


def nights_known_too_early(patch: pytest.MonkeyPatch) -> None:
    """Lets a moment know a night that is available a microsecond after it."""
    real = audit_joins.night_at
    patch.setattr(audit_joins, "night_at", lambda moments, nights: real(moments + 1, nights))


def the_night_of_the_day_itself(patch: pytest.MonkeyPatch) -> None:
    real = audit_joins.night_at

    def night_at(moments: np.ndarray, nights: Any) -> np.ndarray:
        return real(moments, [Snapshot(one.ds, one.from_us - 2 * 86_400_000_000) for one in nights])

    patch.setattr(audit_joins, "night_at", night_at)


@pytest.mark.parametrize(
    ("breaks", "plants"),
    [
        (nights_known_too_early, {NIGHT_AFTER}),
        (the_night_of_the_day_itself, {NIGHT_AT, NIGHT_AFTER, NIGHT_OF_DAY}),
        (histories_as_of_the_end_of_the_day, {AT, AFTER, LATER}),
    ],
)
def test_a_leak_in_the_code_is_found(
    joinable: World, capsys: Capture, breaks: Callable, plants: set[str]
) -> None:
    assert join(joinable, "--ds", DAY, "--name", "ctr") == 0
    with pytest.MonkeyPatch.context() as patch:
        breaks(patch)
        status, report = audit(joinable, capsys)
    assert status == 1
    assert {plant for plant, (_, wrongly) in moved(report).items() if wrongly} >= plants
    found = texts(report, "leak")
    assert all(f"{plant}: " in found for plant in plants)


def test_samples_that_know_too_little_are_found_too(joinable: World, capsys: Capture) -> None:
    """An audit that could not see a plant would find no leak in anything."""
    assert join(joinable, "--ds", DAY) == 0
    with pytest.MonkeyPatch.context() as patch:
        real, places = audit_joins.night_at, clicks.places_before
        patch.setattr(audit_joins, "night_at", lambda moments, nights: real(moments - 9, nights))
        patch.setattr(clicks, "places_before", lambda log, u, t: places(log, u, t - 9))
        status, report = audit(joinable, capsys)
    assert status == 1
    assert "joined with an older night than they may know" in texts(report, "leak")
    assert "clicks which a history must know are missing from it" in texts(report, "leak")


def test_rows_that_were_joined_with_a_night_too_early_are_found(
    joinable: World, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what is published knows of it: the code that looks is right again."""
    real = ctr_join.night_at
    monkeypatch.setattr(
        ctr_join, "night_at", lambda moments, nights: real(moments + 43_200_000_000, nights)
    )
    assert join(joinable, "--ds", DAY) == 0
    monkeypatch.undo()
    status, report = audit(joinable, capsys)
    assert status == 1
    assert "the published rows are not what their inputs give: " in texts(report, "leak")
    assert "feature_ds in " in texts(report, "leak")


# ---- What cannot be verified -------------------------------------------------------------------


def test_what_was_made_from_other_inputs_is_not_compared(joinable: World, capsys: Capture) -> None:
    assert join(joinable, "--ds", DAY) == 0
    joinable.write_impressions(DAY, draw_impressions(DAY, seed=77))
    status, report = audit(joinable, capsys)
    assert status == 0
    assert "the log, or the histories before it, are others" in texts(report, "unverified")
    shutil.rmtree(joinable.root / "test/_nights")
    status, report = audit(joinable, capsys)
    assert status == 0
    assert "nights were published since, or pruned" in texts(report, "unverified")
    assert "there is none whose items it could have" in texts(report, "unverified")
