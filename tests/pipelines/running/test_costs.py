"""What making took is told of the stages that were made, by shares that add up."""

import datetime as dt
import time

import pytest

from feature_jobs.store import usage
from feature_jobs.store.usage import Usage
from pipelines.running.costs import Costs
from pipelines.running.layout import Layout
from pipelines.running.stage import Stage
from pipelines.stages import EMBED, ITEM_FEATURES, SIMSCORE, Kind


def stage(kind: Kind, day: int = 1, input_rows: int = 0) -> Stage:
    return Stage(
        kind, dt.date(2026, 3, day), Layout("/root", "test", "/root"), shards=1, inputs={},
        identities={}, settings={}, input_rows=input_rows,
    )  # fmt: skip


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Gives the time that there is instead of the clock's."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "process_time", lambda: 2 * now[0])
    usage.take()
    return now


def test_a_stage_has_what_was_used_while_it_was_made(clock: list[float]) -> None:
    one, costs, made = stage(SIMSCORE, input_rows=1000), Costs(), dict[str, object]()
    usage.count(bytes_read=99)  # before it
    clock[0] = 10.0
    with costs.shared_by(made):
        made[one.run_id] = "never made"
        clock[0] = 14.0
        usage.count(bytes_read=5, bucket_requests=7)
        usage.add(Usage(2.0, 1, 2, 3, 10**15))  # of a worker elsewhere
    usage.count(bytes_read=99)
    assert costs.describe(one, {}) == {
        "wall_seconds": 4.0, "cpu_seconds": 10.0, "peak_memory_bytes": 10**15,
        "bytes_read": 6, "bytes_written": 2, "bucket_requests": 10,
        "days_in_job": 1, "impressions": 1000,
        "rates": {"impressions_per_second": 250.0, "impressions_per_core_second": 100.0},
    }  # fmt: skip


def test_days_of_one_job_have_equal_shares_but_of_the_peak(clock: list[float]) -> None:
    days, costs, made = [stage(EMBED, day, 30) for day in (1, 2, 3)], Costs(), dict[str, object]()
    with costs.shared_by(made):
        made |= {one.run_id: "" for one in days}
        clock[0] = 6.0
        usage.add(Usage(0.0, 300, 0, 0, 10**15))
    for one in days:
        found = costs.describe(one, {})
        assert (found["days_in_job"], found["wall_seconds"], found["cpu_seconds"]) == (3, 2.0, 4.0)
        assert (found["bytes_read"], found["peak_memory_bytes"]) == (100, 10**15)
        assert found["rates"] == {"items_per_second": 15.0, "items_per_core_second": 7.5}


def test_item_features_go_by_the_items_that_they_have(clock: list[float]) -> None:
    one, costs, made = stage(ITEM_FEATURES), Costs(), dict[str, object]()
    with costs.shared_by(made):
        made[one.run_id] = ""
        clock[0] = 2.0
    found = costs.describe(one, {"items": 50})
    assert (found["items"], found["rates"]["items_per_second"]) == (50, 25.0)


def test_what_a_run_did_not_make_took_nothing(clock: list[float]) -> None:
    there, mine, costs = stage(EMBED, 1, 10), stage(EMBED, 2, 10), Costs()
    made: dict[str, object] = {there.run_id: "made by an earlier block"}
    with costs.shared_by(made):
        made[mine.run_id] = ""
        clock[0] = 1.0
    with costs.shared_by(made):  # nothing was left to do
        clock[0] = 9.0
    assert costs.describe(there, {}) == {}
    assert costs.describe(mine, {})["wall_seconds"] == 1.0
