"""What is said of the local disk alone: half files, links, file times, faults of its mounts."""

import errno
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from feature_jobs.schemas import OperatorError, StorageUnavailable
from feature_jobs.store import files
from tests.support.processes import killed, start

HALF = """
import sys, time
from feature_jobs.store import files
with files.atomic_writer(sys.argv[1]) as file:
    file.write(b"half")
    file.flush()
    print("half written", flush=True)
    time.sleep(60)
"""


# ---- atomic writes ---------------------------------------------------------------------------


def test_a_killed_writer_leaves_no_file_that_a_reader_looks_at(tmp_path: Path) -> None:
    path = tmp_path / "part.parquet"
    process = start(HALF, path)
    assert process.stdout.readline() == "half written\n"
    assert killed(process) == -signal.SIGKILL
    left = os.listdir(tmp_path)
    assert len(left) == 1  # the half file is there
    assert left[0].startswith(".tmp-")
    assert not files.exists(str(path))
    assert files.list_names(str(tmp_path)) == []
    assert files.glob(str(tmp_path / "*")) == []


def test_a_files_version_changes_with_its_time(tmp_path: Path) -> None:
    path = tmp_path / "file"
    files.write_bytes(str(path), b"one")
    before = files.stat(str(path))
    os.utime(path, ns=(0, 5_000_000))
    assert files.stat(str(path)).mtime_us == 5_000
    assert files.stat(str(path)).version != before.version


# ---- links, moves, deletions -----------------------------------------------------------------


@pytest.mark.parametrize("hard_links", [True, False])
def test_a_link_is_hard_where_the_disk_has_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hard_links: bool
) -> None:
    def refuse(*_: str) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    if not hard_links:
        monkeypatch.setattr(os, "link", refuse)
    source, target = str(tmp_path / "a"), str(tmp_path / "new" / "b")
    files.write_bytes(source, b"data")
    files.link(source, target)
    files.link(source, target)  # a run that was killed after it, and resumes
    assert os.path.samefile(source, target) == hard_links
    files.delete(source)
    assert files.read_bytes(target) == b"data"
    assert os.listdir(tmp_path / "new") == ["b"]


def test_a_move_between_two_names_of_one_file_leaves_the_target(tmp_path: Path) -> None:
    source, target = str(tmp_path / "a"), str(tmp_path / "b")
    files.write_bytes(source, b"data")
    files.link(source, target)
    files.move(source, target)
    assert os.listdir(tmp_path) == ["b"]
    assert files.read_bytes(target) == b"data"


# ---- transient faults --------------------------------------------------------------------------

READS = {"stat": files.stat, "read": files.read_bytes}


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What the next looks at a file fail with, the last one first; waits are short."""
    left: list[int] = []

    def failing(real: Callable) -> Callable:
        def call(path: str, *args: object, **kwargs: object) -> object:
            if left and str(path).endswith("file"):
                raise OSError(left.pop(), "the disk is ill", path)
            return real(path, *args, **kwargs)

        return call

    monkeypatch.setattr(os, "stat", failing(os.stat))
    monkeypatch.setattr("builtins.open", failing(open))
    monkeypatch.setattr(files, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(files, "RETRY_SECONDS", 0.2)
    return left


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("fault", ["EIO", "ETIMEDOUT", "ESTALE", "ECONNRESET", "EAGAIN", "EINTR"])
def test_a_passing_fault_of_a_disk_is_waited_for(
    tmp_path: Path, faults: list[int], read: str, fault: str
) -> None:
    files.write_bytes(str(tmp_path / "file"), b"data")
    expected = READS[read](str(tmp_path / "file"))
    faults += [getattr(errno, fault)] * 3
    assert READS[read](str(tmp_path / "file")) == expected
    assert faults == []


@pytest.mark.parametrize("read", READS)
def test_a_disk_that_stays_away_fails_in_one_paragraph(
    tmp_path: Path, faults: list[int], read: str
) -> None:
    path = str(tmp_path / "file")
    faults += [errno.EIO] * 10_000
    started = time.monotonic()
    with pytest.raises(StorageUnavailable, match="the disk is ill") as failed:
        READS[read](path)
    assert time.monotonic() - started < 5
    assert str(failed.value).startswith(path)
    assert "\n" not in str(failed.value)
    assert len(faults) < 10_000 - 3


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("fault", ["ENOENT", "EACCES", "ELOOP", "ENAMETOOLONG", "EISDIR"])
def test_what_is_wrong_with_a_file_is_told_at_once(
    tmp_path: Path, faults: list[int], read: str, fault: str
) -> None:
    faults += [errno.EIO, getattr(errno, fault)]
    with pytest.raises(OSError, match="the disk is ill") as failed:
        READS[read](str(tmp_path / "file"))
    assert failed.value.errno == getattr(errno, fault)
    assert faults == [errno.EIO]


# ---- what is supported -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["gs://", "gs:///x", "GS://a/b", "s3://a/b", "hdfs://h/p", "https://x/y.parquet"]
)
def test_a_remote_path_other_than_of_a_bucket_is_refused(path: str) -> None:
    with pytest.raises(OperatorError) as refused:
        files.check_supported(path)
    assert refused.value.exit_status == 2
    assert path in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "path", ["/data/imps", "relative/dt={ds}/*.parquet", "C:/shop", "a:b", "gs://b", "gs://b/x"]
)
def test_a_local_path_or_one_of_a_bucket_is_supported(path: str) -> None:
    assert files.check_supported(path) is None
