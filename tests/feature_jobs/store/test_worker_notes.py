"""Workers tell the launcher refusals word for word, how far they are, a warning once, and costs."""

import copy
import errno
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from feature_jobs.schemas import (
    CourierError,
    DataContractError,
    OperatorError,
    StorageUnavailable,
)
from feature_jobs.store import (
    faults,
    partitions,
    threads,
    usage,
    versions,
    worker_notes,
)
from feature_jobs.store.documents import read_json
from tests.support.ill_disk import watch_disk
from tests.support.processes import start


class Worker:
    """Looks to `refusing` as a DoFn does."""

    def __init__(self, staging: Path):
        self.staging = str(staging)

    @worker_notes.refusing
    def process(self, element: Exception | int) -> Iterator[int]:
        if isinstance(element, Exception):
            raise element
        yield element

    @worker_notes.refusing
    def write(self, element: Exception | None) -> None:
        if element:
            raise element


@pytest.mark.parametrize(
    "kind", [DataContractError, OperatorError, StorageUnavailable, CourierError]
)
def test_what_is_refused_reaches_the_launcher_word_for_word(
    tmp_path: Path, kind: type[CourierError]
) -> None:
    worker = Worker(tmp_path)
    assert list(worker.process(1)) == [1]
    assert worker_notes.refused(worker.staging) == []
    assert list(worker.process(kind("item 7 is »null«"))) == []
    (found,) = worker_notes.refused(worker.staging)
    assert type(found) is kind
    assert str(found) == "item 7 is »null«"


def test_once_anything_is_refused_no_worker_does_more(tmp_path: Path) -> None:
    assert list(Worker(tmp_path).write(None)) == []
    assert list(Worker(tmp_path).write(DataContractError("no"))) == []
    assert list(Worker(tmp_path).process(1)) == []


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError(5)])
def test_what_is_not_for_the_operator_is_raised(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)):
        list(Worker(tmp_path).process(error))
    assert os.listdir(tmp_path) == []


def test_a_full_disk_of_a_worker_reaches_the_launcher_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "gettempdir", lambda: "/scratch")
    for number, told in ((errno.ENOSPC, "/x/file"), (errno.EDQUOT, None)):
        worker = Worker(tmp_path / str(number))
        assert list(worker.process(OSError(number, os.strerror(number), told))) == []
        (found,) = worker_notes.refused(worker.staging)
        assert type(found) is StorageUnavailable
        assert str(found).startswith(f"{told or '/scratch'} could not be written (")


def test_workers_keep_to_the_threads_and_row_groups_that_the_launcher_told_each_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[int] = []
    sizes: list[int] = []
    monkeypatch.setattr(threads, "limit", limits.append)
    monkeypatch.setattr(partitions, "limit_row_groups", sizes.append)
    one, other = Worker(tmp_path / "one"), Worker(tmp_path / "other")
    worker_notes.tell(one.staging, threads.Share(3), 300)
    worker_notes.tell(other.staging, threads.Share(2), 200)
    for worker in (one, one, other):
        assert list(worker.process(1)) == [1]
    assert (limits, sizes) == ([3, 2], [300, 200])  # once in a process
    worker_notes.tell(one.staging, threads.Share(1), 100)  # the job is run again
    list(one.process(1))
    assert (limits[2:], sizes[2:]) == ([1], [100])


def elsewhere(staging: Path) -> Worker:
    """Returns a worker of a launcher that is another process."""
    worker_notes.tell(str(staging), threads.Share(), 100)
    worker_notes._launched.remove(str(staging))
    return Worker(staging)


def test_a_worker_in_other_versions_does_nothing_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = elsewhere(tmp_path)
    monkeypatch.setitem(versions.PACKAGE_VERSIONS, "torch", "1.0")
    assert list(worker.process(1)) == []
    (found,) = worker_notes.refused(worker.staging)
    assert type(found) is OperatorError
    assert f"The worker on {socket.gethostname()} has other versions" in str(found)
    assert "torch 1.0 (the command's: " in str(found)
    monkeypatch.undo()
    worker_notes._kept_to.clear()
    assert list(worker.process(1)) == []  # no other worker goes on
    assert len(worker_notes.refused(worker.staging)) == 1


def test_a_worker_may_check_in_before_it_has_any_element(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert worker_notes.check_in(str(tmp_path)) is None  # it was told nothing
    worker = elsewhere(tmp_path)
    assert worker_notes.check_in(worker.staging)["row_group_bytes"] == 100
    assert worker_notes.has_begun(worker.staging)
    assert worker_notes.refused(worker.staging) == []
    monkeypatch.setitem(versions.PACKAGE_VERSIONS, "courier", "0.0.1")
    worker_notes.check_in(worker.staging)
    assert len(worker_notes.refused(worker.staging)) == 1


@pytest.mark.parametrize("what", ["told.json", "begun"])
def test_a_worker_that_may_not_use_the_folder_of_its_job_says_which_and_who_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(faults, "FORBIDDEN_SECONDS", 0.05)
    worker = elsewhere(tmp_path)

    def forbid(_: str, path: str) -> None:
        if what in path:
            raise PermissionError(errno.EACCES, "Permission denied", path)

    watch_disk(monkeypatch, forbid)
    for check_in in (worker_notes.check_in, lambda _: list(worker.process(1))):
        with pytest.raises(StorageUnavailable) as refused:
            check_in(worker.staging)
        assert (
            f"The worker on {socket.gethostname()}, which runs as the user {os.getuid()}, cannot "
            f"use the folder of its job, {tmp_path}: {tmp_path}/{what}" in str(refused.value)
        )
        assert "Give this account access" in str(refused.value)
        assert refused.value.__suppress_context__  # of a traceback the first is told
    assert worker_notes.refused(worker.staging) == []


OTHER_USER = """
import os, sys
import google.api_core.retry  # loaded while it may be read
from feature_jobs.schemas import StorageUnavailable
from feature_jobs.store import faults, worker_notes
faults.FORBIDDEN_SECONDS = 0.05
os.setgroups([])
os.setgid(int(sys.argv[2]))
os.umask(0o002)
os.setuid(65534)
try:
    print(worker_notes.check_in(sys.argv[1])["row_group_bytes"])
except StorageUnavailable as error:
    print(error)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root may become another user")
def test_a_worker_of_another_user_checks_in_where_its_group_may_write() -> None:
    group = 54321
    with tempfile.TemporaryDirectory() as name:  # below which another user may look
        os.chmod(name, 0o755)
        folder = Path(name, "job")
        elsewhere(folder)
        folder.chmod(0o755)
        said = start(OTHER_USER, folder, group).communicate()[0]
        assert f"runs as the user 65534, cannot use the folder of its job, {folder}: " in said
        assert os.listdir(folder) == ["told.json"]
        os.chown(folder, 0, group)
        folder.chmod(0o2775)
        assert start(OTHER_USER, folder, group).communicate()[0] == "100\n"
        assert worker_notes.has_begun(str(folder))


def test_a_heartbeat_is_one_file_that_grows_with_what_is_counted(tmp_path: Path) -> None:
    assert worker_notes.counted(str(tmp_path)) == {}
    heartbeat = worker_notes.Heartbeat(str(tmp_path))
    heartbeat.begin("a chunk")
    heartbeat.add(done=1)
    heartbeat.add(done=4, rejected_missing=1)  # too soon to be written
    (name,) = os.listdir(tmp_path / "progress")
    assert worker_notes.counted(str(tmp_path)) == {"done": 1}
    heartbeat.begin("another")
    heartbeat.add(done=2)
    heartbeat.write()
    assert os.listdir(tmp_path / "progress") == [name]
    assert worker_notes.counted(str(tmp_path)) == {"done": 7, "rejected_missing": 1}


def test_what_is_tried_twice_counts_once(tmp_path: Path) -> None:
    first, slow = (worker_notes.Heartbeat(str(tmp_path)) for _ in range(2))
    for heartbeat, done in ((first, (3, 4)), (slow, (3, 1))):  # which has not ended yet
        for element, count in zip(("a chunk", "another"), done, strict=True):
            heartbeat.begin(element)
            heartbeat.add(done=count, io_seconds=0.5)
        heartbeat.write()
    assert worker_notes.counted(str(tmp_path)) == {"done": 7, "io_seconds": 1.0}
    first.begin("a chunk")  # once more, by the same worker
    first.write()
    assert worker_notes.counted(str(tmp_path))["done"] == 7
    first.begin("a third")
    first.add(done=5)
    first.write()
    assert worker_notes.counted(str(tmp_path))["done"] == 12


def test_what_is_finished_is_known_in_its_job_alone(tmp_path: Path) -> None:
    one, other = (str(tmp_path / name) for name in ("one", "other"))
    assert worker_notes.finished(one, "chunk") is None
    worker_notes.note_finished(one, "chunk", [[1, ["path", 0, 3]]])
    assert worker_notes.finished(one, "chunk") == [[1, ["path", 0, 3]]]
    assert worker_notes.finished(other, "chunk") is None


def test_of_many_elements_the_newest_are_kept_apart(tmp_path: Path) -> None:
    one, slow = (worker_notes.Heartbeat(str(tmp_path)) for _ in range(2))
    for number in range(2500):
        one.begin(f"chunk {number}")
        one.add(done=2, io_seconds=0.5)
    one.write()
    (path,) = (tmp_path / "progress").iterdir()
    assert len(read_json(str(path))) == 101
    slow.begin("chunk 2450")
    slow.add(done=2)
    assert worker_notes.counted(str(tmp_path)) == {"done": 5000, "io_seconds": 1250.0}


def test_workers_that_begin_as_copies_of_one_have_heartbeats_of_their_own(tmp_path: Path) -> None:
    one = worker_notes.Heartbeat(str(tmp_path))
    other = copy.deepcopy(one)
    for heartbeat, done in ((one, 1), (other, 2)):
        heartbeat.begin(f"chunk {done}")
        heartbeat.add(done=done)
    assert len(os.listdir(tmp_path / "progress")) == 2
    assert worker_notes.counted(str(tmp_path)) == {"done": 3}


def test_a_warning_of_many_workers_is_told_once(tmp_path: Path) -> None:
    assert worker_notes.warnings(str(tmp_path)) == []
    for message in ("no »CUDA« here", "another", "no »CUDA« here"):
        worker_notes.warn(str(tmp_path), message)
    assert sorted(worker_notes.warnings(str(tmp_path))) == ["another", "no »CUDA« here"]


# ---- What a job uses -------------------------------------------------------------------------

# Works for a job as a worker process does: computes in a thread of its own, holds an array, reads.
WORK = """
import sys, threading, time
import numpy as np
from feature_jobs.store import files, worker_notes

class Worker:
    staging = sys.argv[1]

    @worker_notes.refusing
    def process(self, seconds):
        thread = threading.Thread(target=burn, args=(seconds,))
        thread.start()
        thread.join()
        files.read_bytes(sys.argv[2])
        held = np.ones(200_000_000, np.uint8)
        files.write_bytes(f"{sys.argv[2]}-{threading.get_ident()}", held[:1000].tobytes())

def burn(seconds):
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass

list(Worker().process(float(sys.argv[3])))
"""


def test_what_worker_processes_used_adds_up(tmp_path: Path) -> None:
    staging, file = str(tmp_path / "job"), tmp_path / "file"
    file.write_bytes(bytes(3000))
    worker_notes.tell(staging, threads.Share(1), 100)
    seconds = (0.2, 0.5)
    processes = [start(WORK, staging, file, one) for one in seconds]
    assert [process.wait(60) for process in processes] == [0, 0]
    used = worker_notes.used_by_workers(staging)
    assert len(os.listdir(tmp_path / "job/usage")) == 2
    assert sum(seconds) <= used.cpu_seconds
    told = len((tmp_path / "job/told.json").read_bytes())
    assert (used.bytes_read, used.bytes_written) == (2 * (3000 + told), 2 * 1000)
    assert 200_000_000 < used.peak_memory_bytes < 400_000_000  # of one of them


@pytest.mark.parametrize("is_elsewhere", [False, True])
def test_the_launcher_knows_that_a_worker_has_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_elsewhere: bool
) -> None:
    worker = Worker(tmp_path)
    worker_notes.tell(worker.staging, threads.Share(1), 100)
    if is_elsewhere:
        monkeypatch.setattr(worker_notes, "_launched", set())
    assert not worker_notes.has_begun(worker.staging)
    elements = worker.process(1)
    assert not worker_notes.has_begun(worker.staging)
    next(elements)
    assert worker_notes.has_begun(worker.staging)
    assert worker_notes.are_elsewhere(worker.staging) == is_elsewhere
    list(worker.process(2))
    assert len(list(tmp_path.glob("begun/*"))) == is_elsewhere


def test_workers_of_a_cluster_are_elsewhere_before_a_folder_shows_that_they_have_begun(
    tmp_path: Path,
) -> None:
    staging = str(tmp_path / "job")
    assert not worker_notes.are_elsewhere(staging)
    worker_notes.note_sent_away(staging)
    assert worker_notes.are_elsewhere(staging)
    assert not worker_notes.has_begun(staging)
    assert not worker_notes.are_elsewhere(f"{staging}-of-another")


def test_a_worker_in_the_launchers_process_tells_nothing_that_the_launcher_measures_itself(
    tmp_path: Path,
) -> None:
    worker = Worker(tmp_path)
    worker_notes.tell(worker.staging, threads.Share(1), 100)
    list(worker.process(1))
    assert os.listdir(tmp_path) == ["told.json"]
    assert worker_notes.used_by_workers(worker.staging) == usage.Usage()


def test_a_worker_tells_again_what_it_used_since_and_seldom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_notes, "_launched", set())  # as in another process
    worker, clock = Worker(tmp_path), [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    worker_notes.tell(worker.staging, threads.Share(1), 100)
    worker_notes._launched.clear()
    write = worker_notes.write_json

    def write_in_a_second(path: str, value: object) -> None:
        clock[0] += 1.0
        write(path, value)

    monkeypatch.setattr(worker_notes, "write_json", write_in_a_second)
    usage.take()
    found = []
    for at in (1.0, 50.0, 101.0, 103.0):
        clock[0] = at
        usage.count(bucket_requests=1)
        list(worker.process(1))
        found.append(worker_notes.used_by_workers(worker.staging).bucket_requests)
    assert found == [1, 1, 1, 4]
    assert len(os.listdir(tmp_path / "usage")) == 1
