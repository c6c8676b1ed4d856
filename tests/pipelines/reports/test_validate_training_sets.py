"""Training sets of all layouts are sound as they are made; their faults: `broken_training_sets`."""

import datetime as dt
import json
import shutil
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from feature_jobs.impressions.snapshots import after_its_day
from feature_jobs.store.partitions import Partition
from pipelines.cli import main
from pipelines.reports.validate_parts import Published
from pipelines.reports.validate_training_sets import check_training_set
from pipelines.stages import join_of
from tests.pipelines.test_join import as_samples, ask_for, impressions, join, write_samples
from tests.support.commands import Capture, courier
from tests.support.world import DAYS, World

DAY, BEFORE = DAYS[2], DAYS[1]
HOUR_US = 3_600_000_000


def validate(world: World, capsys: Capture, day: dt.date = DAY) -> tuple[int, dict[str, Any]]:
    """Validates a day by the settings that lie there; returns what was found of its sets."""
    capsys.readouterr()
    status = main(["validate", "--config", str(world.config), "--ds", str(day), "--json"])
    found = json.loads(capsys.readouterr().out)
    sets = [one for one in found["findings"] if one["table"].startswith("joined/")]
    return status, {**found, "findings": sets}


# ---- Sound sets --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "asked"),
    [
        ((), ()),
        (("--created-timestamp", "--label", "clicked"), ()),
        (("--features-from", "same"), ()),
        ((), ("history_cluster_coarse", "sim_bucket", "top_positions", "history_item_ids")),
        (("--layout", "fuxictr", "--label", "clicked"), ("history_item_ids", "sim_bucket")),
    ],
)
def test_a_set_is_sound_as_it_is_made(
    joinable: World, capsys: Capture, args: tuple[str, ...], asked: tuple[str, ...]
) -> None:
    if asked:
        ask_for(joinable, f"columns = {[*asked]}", 'tiers = "muse"')
    assert join(joinable, "--ds", DAY, *args) == 0
    _, found = validate(joinable, capsys)
    assert found["findings"] == []
    assert found["tables"]["joined/ctr"]["rows"] == 152


def test_a_set_for_torcheasyrec_is_sound_as_far_as_its_files_tell(
    joinable: World, capsys: Capture
) -> None:
    rows = as_samples(impressions(joinable, DAY)).drop_columns(["tags"])
    write_samples(joinable, DAY, rows)
    assert join(joinable, "--ds", DAY, "--layout", "torcheasyrec", "--label", "clicked") == 0
    status, found = validate(joinable, capsys)
    (finding,) = found["findings"]
    assert (status, finding["level"], finding["law"]) == (
        0, "unverified", "laws of rows were not asked",
    )  # fmt: skip
    assert courier(joinable, "audit", "--ds", str(DAY), "--json") == 0
    report = json.loads(capsys.readouterr().out)["training_sets"]["ctr"]
    assert [one["level"] for one in report["findings"]] == ["unverified"]


def test_a_set_without_samples_is_sound(joinable: World, capsys: Capture) -> None:
    write_samples(joinable, DAY, as_samples(impressions(joinable, DAY)).slice(0, 0))
    (joinable.folder / "samples" / f"ds={DAY}" / "_SUCCESS").touch()
    assert join(joinable, "--ds", DAY) == 0
    _, found = validate(joinable, capsys)
    assert {one["level"] for one in found["findings"]} <= {"unverified"}
    assert found["tables"]["joined/ctr"]["rows"] == 0


def test_a_day_of_a_set_alone_is_judged_by_no_gate(joinable: World, capsys: Capture) -> None:
    day = DAYS[-1] + dt.timedelta(days=1)
    rows = as_samples(impressions(joinable, DAYS[-1]))
    at = rows.column_names.index("event_time")
    moved = pc.add(rows["event_time"], pa.scalar(dt.timedelta(days=1)))
    write_samples(joinable, day, rows.set_column(at, "event_time", moved))
    assert join(joinable, "--ds", day, "--history-as-of", "night") == 0
    capsys.readouterr()
    assert courier(joinable, "validate", "--ds", str(day), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["findings"], found["gates"], list(found["tables"])) == ([], [], ["joined/ctr"])


def test_a_set_whose_nights_are_gone_is_told_as_unverified(
    joinable: World, capsys: Capture
) -> None:
    assert join(joinable, "--ds", DAY) == 0
    shutil.rmtree(joinable.root / "test/item_features" / f"ds={BEFORE}")
    _, found = validate(joinable, capsys)
    assert {one["level"] for one in found["findings"]} == {"unverified"}
    laws = {one["law"] for one in found["findings"]}
    assert laws == {"a night was not looked at", "no sample was joined again"}


def test_a_set_of_a_night_that_was_made_again_is_stale(joinable: World, capsys: Capture) -> None:
    assert join(joinable, "--ds", DAY) == 0
    image = next(joinable.folder.glob("images/1.png"))
    image.write_bytes(next(joinable.folder.glob("images/2.png")).read_bytes())
    assert courier(joinable, "refresh", "--ds", str(BEFORE), "--full") == 0
    _, found = validate(joinable, capsys)
    (told,) = {one["text"] for one in found["findings"] if "item_embeddings" in one["text"]}
    assert f"item_embeddings of ds {BEFORE} was " in told
    assert f"`courier join --samples … --name ctr --ds {DAY}` makes it anew" in told
    assert {one["law"] for one in found["findings"]} >= {"it is stale"}
    assert not {one["level"] for one in found["findings"]} & {"broken"}


# ---- Manifests ---------------------------------------------------------------------------------


def laws_of(rows: list[int], night: dt.date = BEFORE, early_us: int = 0, **said: Any) -> list[str]:
    """Returns the laws that a set's manifest breaks, of files of so many rows and one night."""
    from_us = after_its_day(night, "UTC", 6 * HOUR_US).from_us - early_us
    settings = {"day_timezone": "UTC", "availability_delay_hours": 6, "features_from": "previous"}
    manifest = {
        "ds": str(DAY), "files": [{"name": f"{n}", "rows": n} for n in rows],
        "settings": settings | said, "shards": len(rows),
        "inputs": {"nights": [{"ds": str(night), "from_us": from_us}]},
    }  # fmt: skip
    (table,) = join_of("ctr").tables
    found = Published(table, Partition("folder", manifest))
    return [one.law for one in check_training_set(found, DAY)]


CUT, TOO_EARLY = (
    "the files are not as samples were cut", "a night was not available to samples of ds",
)  # fmt: skip


@pytest.mark.parametrize("rows", [[0], [7], [7, 7], [7, 3], [7, 7, 7]])
def test_all_files_but_the_last_have_as_many_rows(rows: list[int]) -> None:
    assert laws_of(rows) == []


@pytest.mark.parametrize("rows", [[7, 0], [3, 7], [7, 6, 7], [0, 0]])
def test_files_that_were_not_cut_so_are_told(rows: list[int]) -> None:
    assert laws_of(rows) == [CUT]


@pytest.mark.parametrize(
    ("night", "early_us", "said", "laws"),
    [
        (BEFORE, 1, {}, [TOO_EARLY]),
        (BEFORE, 1, {"as_of": "created"}, []),
        (DAY, 0, {}, [TOO_EARLY]),
        (DAYS[3], 0, {"as_of": "created"}, [TOO_EARLY]),
        (DAY, 0, {"features_from": "same"}, []),
        (BEFORE, 0, {"features_from": "same"}, [TOO_EARLY]),
    ],
)
def test_nights_are_those_that_samples_may_know(
    night: dt.date, early_us: int, said: dict[str, str], laws: list[str]
) -> None:
    assert laws_of([7], night, early_us, **said) == laws
