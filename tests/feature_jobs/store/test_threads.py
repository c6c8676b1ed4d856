"""A process computes on no more threads than it was told, or than it has cores."""

import os
import threading
from collections.abc import Iterator

import pyarrow as pa
import pytest
import threadpoolctl
import torch

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


@pytest.mark.parametrize("processes", [1, 2, 3, 5, 8, None])
@pytest.mark.parametrize("cores", [1, 2, 4, 7])
def test_the_processes_of_a_host_have_no_more_threads_than_it_has_cores(
    cores: int, processes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "cores", lambda: cores)
    share = threads.Share(processes=processes).count()
    together = cores if processes is None else processes
    assert share >= 1
    assert share * together <= max(cores, together)  # none can do with less than one
    assert (share + 1) * together > cores


def test_a_number_of_threads_that_was_asked_for_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "cores", lambda: 8)
    assert threads.Share(3, processes=4).count() == 3


def test_torch_keeps_to_one_thread_where_it_is_told_and_nowhere_else() -> None:
    mine, found = torch.get_num_threads(), []
    torch.set_num_threads(2)  # also where there is one core

    def ask() -> None:
        found.append(torch.get_num_threads())

    def told() -> None:
        threads.keep_to_one(torch)
        ask()

    for work in (ask, told, ask):  # each in a new thread
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    before, within, after = found
    assert (within, after) == (1, before)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(mine)
