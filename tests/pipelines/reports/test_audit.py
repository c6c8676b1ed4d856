"""The audit finds every leak that is planted in the code, and none where there is none."""

import json
import os
import re
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from feature_jobs.impressions import clicks, histories
from feature_jobs.impressions.snapshots import Snapshot, always
from feature_jobs.store import partitions
from pipelines.reports import audit as audits
from tests.conftest import Artefacts
from tests.support.commands import Capture, courier, paragraph, published, refresh, rewrite
from tests.support.world import DAYS, World, make_codebook

BEFORE, AT, AFTER, LATER = (
    "clicked 1 us before",
    "clicked at that very moment",
    "clicked 1 us after",
    "shown a minute before, clicked 1 us after",
)


def audit(world: World, capsys: Capture, *args: str) -> tuple[int, dict[str, Any]]:
    """Audits the third day; returns the exit status and the report."""
    capsys.readouterr()
    status = courier(world, "audit", "--ds", str(DAYS[2]), "--json", *args)
    return status, json.loads(capsys.readouterr().out)


def moved(report: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Counts, by kind of plant, sampled impressions that moved, and others that moved wrongly."""
    return {p["plant"]: (p["moved"], p["wrongly"]) for p in report["planted"]}


def texts(report: dict[str, Any], level: str) -> str:
    return "\n".join(f["text"] for f in report["findings"] if f["level"] == level)


def timed(rows: pa.Table) -> pa.Table:
    """Gives every click a time of its own."""
    times = pa.compute.coalesce(rows["click_time"], rows["event_time"])
    return rows.set_column(rows.column_names.index("click_time"), "click_time", times)


# ---- No leak -----------------------------------------------------------------------------------


def test_of_a_published_night_only_clicks_before_move_features(
    refreshed: World, capsys: Capture
) -> None:
    files = published(refreshed)
    status, report = audit(refreshed, capsys)
    assert status == 0
    assert published(refreshed) == files
    sampled = report["planted"][0]["sampled"]
    assert sampled == 6  # users
    assert moved(report) == {BEFORE: (sampled, 0), AT: (0, 0), AFTER: (0, 0), LATER: (0, 0)}
    columns = report["planted"][0]["columns"]
    assert {"history_item_ids", "history_len", "sim_scores", "sim_mask", "simtier"} <= set(columns)
    assert not {"clicked", "user_id", "item_id", "event_time"} & set(columns)
    assert "152 published user_simscores are what their inputs give" in texts(report, "ok")
    assert "codebook" in texts(report, "ok")
    assert "have no click_time and are dated event_time" in texts(report, "unverified")


def test_the_report_is_a_table_for_people(refreshed: World, capsys: Capture) -> None:
    assert courier(refreshed, "audit", "--ds", str(DAYS[2]), "--impressions", "3") == 0
    out = capsys.readouterr().out
    assert "audit of ds 2026-03-03: bucket 0 of 1, 152 impressions of 6 users" in out
    assert any(line.split()[-4:] == ["3", "3", "yes", "0"] for line in out.splitlines())
    assert out.splitlines()[-1] == "no leak was found"


def test_a_day_that_was_not_made_is_audited_too_once_its_items_are(
    world: World, capsys: Capture
) -> None:
    assert courier(world, "audit", "--ds", str(DAYS[2])) == 4
    assert "courier item-features" in paragraph(capsys)
    for stage in ("embed", "item-features"):
        assert courier(world, stage, "--ds", str(DAYS[2])) == 0
    status, report = audit(world, capsys)
    assert status == 0
    assert len(report["planted"]) == 4
    assert "user_simscores of ds 2026-03-03 are not there" in texts(report, "unverified")


def test_a_shop_that_serves_stale_histories_is_audited_by_its_own_law(
    world: World, capsys: Capture
) -> None:
    world.extra_settings = "history_lag_seconds = 3600\nkeep_repeats = true"
    assert refresh(world, DAYS[2]) == 0
    status, report = audit(world, capsys)
    assert status == 0
    assert moved(report)[BEFORE] == (6, 0)


# ---- Leaks -------------------------------------------------------------------------------------


def clicks_at_the_same_time_count(patch: pytest.MonkeyPatch) -> None:
    real = clicks.places_before
    patch.setattr(clicks, "places_before", lambda log, users, times: real(log, users, times + 1))


def histories_as_of_the_end_of_the_day(patch: pytest.MonkeyPatch) -> None:
    real = histories.histories_at

    def as_of_the_end(log: Any, users: Any, times: Any, law: Any) -> Any:
        return real(log, users, np.full(len(times), int(times.max(initial=0))), law)

    patch.setattr(histories, "histories_at", as_of_the_end)


def clicks_dated_when_they_were_shown(patch: pytest.MonkeyPatch) -> None:
    real = histories.click_moments
    patch.setattr(
        histories, "click_moments", lambda rows, delay: real(rows.drop(["click_time"]), delay)
    )


@pytest.mark.parametrize(
    ("breaks", "plants"),
    [
        (clicks_at_the_same_time_count, {AT}),
        (histories_as_of_the_end_of_the_day, {AT, AFTER, LATER}),
        (clicks_dated_when_they_were_shown, {LATER}),
    ],
)
def test_a_leak_in_the_code_is_found_and_what_was_published_does_not_fit_it(
    refreshed: World, capsys: Capture, breaks: Callable, plants: set[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        breaks(patch)
        status, report = audit(refreshed, capsys)
    assert status == 1
    assert {p for p, (_, wrongly) in moved(report).items() if wrongly} >= plants
    found = texts(report, "leak")
    assert all(f"{plant}: " in found for plant in plants)
    assert "the published user_simscores are not what their inputs give" in found


def test_histories_that_miss_clicks_are_found_too(refreshed: World, capsys: Capture) -> None:
    """An audit that could not see a click would find no leak in anything."""
    with pytest.MonkeyPatch.context() as patch:
        real = clicks.places_before
        patch.setattr(clicks, "places_before", lambda log, u, t: real(log, u, t - 10))
        status, report = audit(refreshed, capsys)
    assert status == 1
    assert "only 0 of 6 sampled impressions moved" in texts(report, "leak")


def test_published_columns_that_were_changed_by_one_bit_are_found(
    world: World, capsys: Capture
) -> None:
    assert refresh(world, DAYS[2]) == 0
    for path in (world.root / "test/user_simscores" / f"ds={DAYS[2]}").glob("*.parquet"):
        rows = pq.read_table(path, partitioning=None)
        for name in ("same_cluster", "sim_mean"):
            values = rows[name].to_numpy().copy()
            values.view(np.int32)[:1] ^= 1
            rows = rows.set_column(rows.column_names.index(name), name, pa.array(values))
        partitions.write_parquet(str(path), rows)
    assert courier(world, "audit", "--ds", str(DAYS[2])) == 1
    message = paragraph(capsys)
    assert re.search(r"give: same_cluster in \d+ rows, sim_mean in \d+ rows\.", message)
    assert "the audit of" in message.lower()


def test_a_codebook_made_from_the_day_itself_is_a_leak(
    world: World, capsys: Capture, artefacts: Artefacts
) -> None:
    late = make_codebook(world.folder / "late", artefacts.encoder, data_ds=str(DAYS[2]))
    world.pins.clear()
    world.pin(DAYS[0], artefacts.encoder, late)
    assert refresh(world, DAYS[2], "--allow-overlap") == 0
    status, report = audit(world, capsys)
    assert status == 1
    assert f"was made from data up to ds {DAYS[2]}, which is not before ds" in texts(report, "leak")


# ---- What cannot be verified -------------------------------------------------------------------


def test_logged_histories_are_said_to_be_beyond_the_audit(world: World, capsys: Capture) -> None:
    def log_histories(rows: pa.Table) -> pa.Table:
        return rows.append_column("history", pa.array([[1, 2]] * len(rows)))

    for day in DAYS:
        rewrite(world, day, log_histories)
    assert refresh(world, DAYS[2]) == 0
    status, report = audit(world, capsys)
    assert (status, report["planted"]) == (0, [])
    assert "histories were logged by the shop" in texts(report, "unverified")
    assert "152 published user_simscores" in texts(report, "ok")


def test_clicks_without_times_leave_out_what_only_times_could_tell(
    world: World, capsys: Capture
) -> None:
    for day in DAYS:
        rewrite(world, day, lambda rows: rows.drop(["click_time"]))
    assert refresh(world, DAYS[2]) == 0
    status, report = audit(world, capsys)
    assert status == 0
    assert moved(report) == {BEFORE: (6, 0), AT: (0, 0), AFTER: (0, 0)}
    found = texts(report, "unverified")
    assert "clicks have no click_time" in found
    for day in DAYS:
        rewrite(world, day, lambda rows: rows.append_column("click_time", rows["event_time"]))
    assert refresh(world, DAYS[2]) == 0
    _, report = audit(world, capsys)
    assert "clicks have a click_time" in texts(report, "ok")


def test_images_written_after_the_day_are_told(world: World, capsys: Capture) -> None:
    for path in world.folder.glob("images/[123].png"):
        os.utime(path, ns=(2 * 10**18, 2 * 10**18))  # in 2033
    assert refresh(world, DAYS[2]) == 0
    status, report = audit(world, capsys)
    assert status == 0
    assert "the images of 3 of 10 items" in texts(report, "unverified")


def test_an_empty_day_has_nothing_to_look_at(world: World, capsys: Capture) -> None:
    assert refresh(world, DAYS[1]) == 0
    world.write("impressions", DAYS[2], [], rows_to_group=1)
    assert refresh(world, DAYS[2]) == 0
    status, report = audit(world, capsys)
    assert (status, report["impressions"]) == (0, 0)
    assert "has no impressions" in texts(report, "unverified")


def test_an_artefact_of_data_between_a_night_and_its_scores_is_a_leak(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Scores of the last day are made with the nights of the first and the third."""
    codebook = SimpleNamespace(codebook_id="c", data_end_ds=str(DAYS[1]))
    encoder = SimpleNamespace(encoder_id="e", data_end_ds="2026-02-27", vectors=None)
    pinned = SimpleNamespace(encoder=encoder, codebook=codebook, identities=dict)
    monkeypatch.setattr(audits, "PinnedArtefacts", lambda *_: pinned)
    monkeypatch.setattr(audits, "_audit_embeddings", lambda *_: None)
    item_night: Any = partial(SimpleNamespace, is_gone=False, features=None, embeddings=None)
    scores: Any = SimpleNamespace(
        nights=[item_night(snapshot=always(day)) for day in (DAYS[2], DAYS[0])]
    )
    look: Any = SimpleNamespace(open=lambda _: SimpleNamespace(manifest={"identities": {}}))
    day: Any = SimpleNamespace(ds=DAYS[3], settings=None, range=SimpleNamespace(artefacts={}))
    report = audits.Report(str(DAYS[3]), 0, 1, 0, 0)
    audits._audit_artefacts(day, scores, look, report)
    (leak,) = report.leaks
    assert leak == (
        f"codebook c was made from data up to ds {DAYS[1]}, which is not before ds {DAYS[0]}"
    )
    # As a shop serves it, a night may have been made from its own day.
    scores.nights = [item_night(snapshot=Snapshot(day, 0)) for day in (DAYS[2], DAYS[1])]
    report = audits.Report(str(DAYS[3]), 0, 1, 0, 0)
    audits._audit_artefacts(day, scores, look, report)
    assert not report.leaks
