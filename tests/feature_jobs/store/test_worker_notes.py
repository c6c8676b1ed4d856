"""Workers tell the launcher refusals word for word, how far they are, and a warning once."""

import copy
import errno
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from feature_jobs.schemas import (
    CourierError,
    DataContractError,
    OperatorError,
    StorageUnavailable,
)
from feature_jobs.store import documents, threads, worker_notes


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


def test_workers_keep_to_the_threads_that_the_launcher_told_each_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[int] = []
    monkeypatch.setattr(threads, "limit", limits.append)
    one, other = Worker(tmp_path / "one"), Worker(tmp_path / "other")
    worker_notes.share_host(one.staging, threads.Share(3))
    worker_notes.share_host(other.staging, threads.Share(2))
    for worker in (one, one, other):
        assert list(worker.process(1)) == [1]
    assert limits == [3, 2]  # once in a process
    worker_notes.share_host(one.staging, threads.Share(1))  # the job is run again
    list(one.process(1))
    assert limits[2:] == [1]


def test_a_heartbeat_is_one_file_that_grows_with_what_is_counted(tmp_path: Path) -> None:
    heartbeat = worker_notes.Heartbeat(str(tmp_path))
    heartbeat.add(done=1)
    heartbeat.add(done=4, rejected_missing=1)  # too soon to be written
    (name,) = os.listdir(tmp_path / "progress")
    assert documents.read_json(str(tmp_path / "progress" / name)) == {"done": 1}
    heartbeat.write()
    assert os.listdir(tmp_path / "progress") == [name]
    told = documents.read_json(str(tmp_path / "progress" / name))
    assert told == {"done": 5, "rejected_missing": 1}


def test_workers_that_begin_as_copies_of_one_have_heartbeats_of_their_own(tmp_path: Path) -> None:
    one = worker_notes.Heartbeat(str(tmp_path))
    other = copy.deepcopy(one)
    one.add(done=1)
    other.add(done=2)
    found = [json.loads(path.read_text()) for path in (tmp_path / "progress").iterdir()]
    assert sorted(told["done"] for told in found) == [1, 2]


def test_a_warning_of_many_workers_is_told_once(tmp_path: Path) -> None:
    assert worker_notes.warnings(str(tmp_path)) == []
    for message in ("no »CUDA« here", "another", "no »CUDA« here"):
        worker_notes.warn(str(tmp_path), message)
    assert sorted(worker_notes.warnings(str(tmp_path))) == ["another", "no »CUDA« here"]
