"""Flink is asked for a job by its name, and told to cancel it."""

from collections.abc import Iterator

import pytest

from pipelines.running.flink import FlinkJob
from tests.support import stand_in_clusters
from tests.support.processes import free_port
from tests.support.stand_in_clusters import FlinkStandIn


@pytest.fixture
def flink() -> Iterator[FlinkStandIn]:
    with stand_in_clusters.flink() as told:
        yield told


@pytest.mark.parametrize(
    ("of_flink", "of_beam"),
    [
        ("FINISHED", "DONE"), ("CANCELED", "CANCELLED"), ("FAILED", "FAILED"),
        ("RUNNING", "RUNNING"), ("INITIALIZING", "INITIALIZING"), ("CANCELLING", "CANCELLING"),
    ],
)  # fmt: skip
def test_a_state_of_flinks_is_told_in_beams_words(
    flink: FlinkStandIn, of_flink: str, of_beam: str
) -> None:
    flink.states = {"other": "RUNNING", "mine": of_flink}
    assert FlinkJob(flink.url, "mine").state == of_beam


def test_a_job_is_cancelled_and_no_other(flink: FlinkStandIn) -> None:
    flink.states = {"mine-too": "RUNNING", "mine": "RUNNING", "other": "RUNNING"}
    FlinkJob(flink.url, "mine").cancel()
    assert flink.states == {"mine-too": "RUNNING", "mine": "CANCELED", "other": "RUNNING"}


def test_a_job_that_flink_does_not_know_is_none(flink: FlinkStandIn) -> None:
    flink.states = {"other": "RUNNING"}
    job = FlinkJob(flink.url, "mine")
    assert job.state is None
    assert job.tell() == "not begun"
    assert job.error() == ""
    assert "no such job; 0 tasks; 0 of 2 slots free" in job.tell_slots()
    job.cancel()
    assert flink.states == {"other": "RUNNING"}
    assert job.page == ""


def test_tasks_and_slots_are_told_and_the_page_once_the_job_was_seen(flink: FlinkStandIn) -> None:
    flink.states = {"mine": "RUNNING"}
    job = FlinkJob(flink.url, "mine")
    assert job.tell() == "RUNNING, 3 of 12 tasks finished"
    assert job.tell_slots() == (
        "Flink says: RUNNING; 12 tasks, 7 created, 3 finished, 2 running; 0 of 2 slots free."
    )
    assert job.page == f"{flink.url}/#/job/running/{b'mine'.hex()}/overview"


def test_what_ended_a_job_is_told(flink: FlinkStandIn) -> None:
    flink.states, flink.errors = {"mine": "FAILED"}, {"mine": "java.lang.Exception: no disk"}
    assert FlinkJob(flink.url, "mine").error() == "java.lang.Exception: no disk"
    flink.errors = {}
    assert FlinkJob(flink.url, "mine").error() == ""


def test_no_answer_is_an_error() -> None:
    with pytest.raises(OSError, match="refused"):
        _ = FlinkJob(f"http://localhost:{free_port()}", "mine").state
