"""Gives places for small nights, on a disk and in a bucket, whose calls are seen."""

import pytest

from feature_jobs.store import faults
from pipelines.running import publishing
from tests.support.schedules import Calls, watch_store


@pytest.fixture(params=["disk", "bucket"])
def folder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Gives a place with nothing in it; each file is a step of its own, and waits are short."""
    monkeypatch.setattr(publishing, "_AT_ONCE", 1)
    monkeypatch.setattr(faults, "FIRST_WAIT_SECONDS", 0.001)
    if request.param == "disk":
        return str(request.getfixturevalue("tmp_path"))
    return request.getfixturevalue("near_bucket")


@pytest.fixture
def calls(folder: str, monkeypatch: pytest.MonkeyPatch) -> Calls:
    return watch_store(monkeypatch)
