"""A process computes on no more threads than it was told, or than it has cores."""

import os
from collections.abc import Iterator

import pyarrow as pa
import pytest
import threadpoolctl

from feature_jobs.store import threads


@pytest.fixture
def unlimited(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = pa.cpu_count()
    monkeypatch.setattr(threads, "_limited", None)
    with threadpoolctl.threadpool_limits():
        yield
    pa.set_cpu_count(before)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux can pin a process")
def test_cores_are_those_that_the_process_is_pinned_to() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert threads.cores() == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.usefixtures("unlimited")
def test_without_a_limit_the_budget_is_all_cores() -> None:
    assert threads.budget() == threads.cores() >= 1


@pytest.mark.usefixtures("unlimited")
def test_a_limit_bounds_blas_and_pyarrow() -> None:
    threads.limit(1)
    assert threads.budget() == 1
    assert pa.cpu_count() == 1
    pools = [pool for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]
    assert pools
    assert {pool["num_threads"] for pool in pools} == {1}
