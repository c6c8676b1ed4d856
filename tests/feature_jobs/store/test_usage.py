"""What a process used is told once, of all its threads, and of no other process."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from feature_jobs.store import usage
from feature_jobs.store.usage import Usage
from tests.support.processes import ROOT


@pytest.fixture(autouse=True)
def _nothing_used_yet() -> Iterator[None]:
    usage.take()
    yield
    usage.take()


def burn(seconds: float) -> None:
    """Computes for so many CPU seconds of this thread, however long that takes."""
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


def test_cpu_seconds_are_those_of_all_threads_and_not_those_of_the_clock() -> None:
    threads = [threading.Thread(target=burn, args=(0.1,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    burn(0.1)
    time.sleep(0.3)
    assert 0.4 <= usage.take().cpu_seconds < 0.6
    assert usage.take().cpu_seconds < 0.1  # what is told is not told again


@pytest.mark.skipif(sys.platform != "linux", reason="no other system forgets a peak")
def test_the_peak_of_memory_is_that_since_it_was_asked_last() -> None:
    before = usage.take().peak_memory_bytes
    held = np.ones(200_000_000, np.uint8)
    del held
    peak = usage.take().peak_memory_bytes
    assert before + 190_000_000 < peak < before + 300_000_000
    assert usage.take().peak_memory_bytes < before + 100_000_000


def test_where_the_system_tells_no_peak_it_is_that_of_the_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    monkeypatch.setattr(usage, "_PROCESS", tmp_path / "none")
    assert usage.take().peak_memory_bytes > 0


def test_threads_count_together() -> None:
    def count() -> None:
        for _ in range(2000):
            usage.count(bytes_read=3, bucket_requests=1)

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    used = usage.take()
    assert (used.bytes_read, used.bucket_requests, used.bytes_written) == (48_000, 16_000, 0)
    assert usage.take().bytes_read == 0


def test_what_other_processes_used_is_added_but_for_their_peaks() -> None:
    usage.count(bytes_written=1)
    far = 10**15
    usage.add(Usage(100.0, 10, 20, 30, far))
    usage.add(Usage(200.0, 1, 2, 3, 5))
    used = usage.take()
    assert 300 <= used.cpu_seconds < 301
    assert (used.bytes_read, used.bytes_written, used.bucket_requests) == (11, 23, 33)
    assert used.peak_memory_bytes == far


# Of a process that has no threads of other tests: a child that is forked beside these may wait for
# ever, and with it whoever ends the pool.
FORKING = """
import multiprocessing
from feature_jobs.store import usage

usage.count(bytes_read=7)
with usage._counting, multiprocessing.get_context("fork").Pool(1) as pool:
    # Held by this process: a child that had inherited it would wait for ever.
    used = pool.apply_async(usage.take).get(60)
print(used.bytes_read, used.cpu_seconds, usage.take().bytes_read)
"""


def test_a_fork_has_used_nothing_of_what_its_parent_did() -> None:
    command = [sys.executable, "-c", FORKING]
    found = subprocess.run(command, cwd=ROOT, timeout=120, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    read, cpu_seconds, of_parent = map(float, found.stdout.split())
    assert (read, of_parent) == (0, 7)
    assert 0 <= cpu_seconds < 5
