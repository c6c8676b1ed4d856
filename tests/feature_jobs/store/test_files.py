"""Tests what is said of the local disk alone: half files, links, file times, faults of mounts."""

import errno
import os
import signal
import time
from pathlib import Path

import pyarrow as pa
import pytest

from feature_jobs.schemas import OperatorError, StorageUnavailable
from feature_jobs.store import faults, files, usage
from tests.support.ill_disk import watch_disk
from tests.support.processes import killed, start
from tests.support.store_calls import CALLS

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


# ---- reading by pyarrow ----------------------------------------------------------------------


def test_pyarrow_reads_into_its_own_memory_and_finds_what_python_finds(tmp_path: Path) -> None:
    path = str(tmp_path / "file")
    files.write_bytes(path, bytes(range(256)) * 4_096)
    usage.take()
    with files.open_input(path) as file, pa.PythonFile(file, "r") as theirs:
        before = pa.total_allocated_bytes()
        theirs.seek(100)
        middle = theirs.read_buffer(1 << 19)
        assert pa.total_allocated_bytes() - before == 1 << 19  # no bytes of Python's
        rest = theirs.read_buffer(1 << 21)
        assert theirs.read_buffer(10).size == 0
        file.seek(100)
        assert middle.to_pybytes() + rest.to_pybytes() == file.read()
    assert usage.take().bytes_read >= 2 * ((1 << 20) - 100)


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


@pytest.fixture
def ill(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns the faults that the system's next calls meet, the last one first; waits are short."""
    left: list[int] = []

    def fail(what: str, path: str) -> None:
        if left:
            raise OSError(left.pop(), "the disk is ill", path)

    watch_disk(monkeypatch, fail)
    monkeypatch.setattr(faults, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(faults, "RETRY_SECONDS", 0.2)
    monkeypatch.setattr(faults, "FORBIDDEN_SECONDS", 0.2)
    monkeypatch.setattr(faults, "FULL_SECONDS", 0.2)
    return left


FAULTS = ["EIO", "ESTALE", "ETIMEDOUT", "ECONNRESET", "EAGAIN", "EINTR", "EACCES", "ENOSPC"]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_passing_fault_of_a_disk_is_waited_for_in_every_function(
    tmp_path: Path, ill: list[int], call: str, fault: str
) -> None:
    well, path = str(tmp_path / "well" / "file"), str(tmp_path / "ill" / "file")
    for each in (well, path):
        files.write_bytes(each, b"data")
        os.utime(each, ns=(10**18, 10**18))
    expected = CALLS[call](well)
    ill += [getattr(errno, fault)] * 3
    assert str(CALLS[call](path)) == str(expected).replace(well, path)
    assert ill == []
    assert os.path.exists(well) == os.path.exists(path)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_disk_that_stays_away_fails_in_one_paragraph_and_is_never_taken_for_empty(
    tmp_path: Path, ill: list[int], call: str, fault: str
) -> None:
    path = str(tmp_path / "file")
    files.write_bytes(path, b"data")
    ill += [getattr(errno, fault)] * 10_000
    started = time.monotonic()
    with pytest.raises(StorageUnavailable, match="the disk is ill") as failed:
        CALLS[call](path)
    assert time.monotonic() - started < 5
    assert str(failed.value).startswith(str(tmp_path))
    assert "\n" not in str(failed.value)
    assert len(ill) < 10_000 - 3
    ill.clear()
    assert files.read_bytes(path) == b"data"


@pytest.mark.parametrize("call", ["stat", "exists", "read", "open", "digest", "link", "glob"])
@pytest.mark.parametrize("fault", ["ELOOP", "ENAMETOOLONG", "EISDIR"])
def test_what_is_wrong_with_a_name_is_told_at_once(
    tmp_path: Path, ill: list[int], call: str, fault: str
) -> None:
    path = str(tmp_path / "file")
    files.write_bytes(path, b"data")
    ill += [errno.EIO, getattr(errno, fault)]
    with pytest.raises(OSError, match="the disk is ill") as failed:
        CALLS[call](path)
    assert failed.value.errno == getattr(errno, fault)
    assert ill == [errno.EIO]


@pytest.mark.parametrize("fault", ["ENOENT", "ENOTDIR"])
def test_what_is_not_there_is_so_whichever_way_the_disk_says_it(
    tmp_path: Path, ill: list[int], fault: str
) -> None:
    path = str(tmp_path / "file")
    files.write_bytes(path, b"data")
    nothing = {"exists": False, "is folder": False, "names": [], "glob": [], "read if there": None}
    for call, answer in nothing.items():
        ill += [getattr(errno, fault)]
        assert CALLS[call](path) == answer
    for call in ("stat", "read", "open", "digest"):
        ill += [getattr(errno, fault)]
        with pytest.raises(FileNotFoundError):
            CALLS[call](path)
    assert ill == []


def test_a_forbidden_file_is_told_at_once_where_that_is_said_of_the_file(
    tmp_path: Path, ill: list[int]
) -> None:
    path = str(tmp_path / "file")
    files.write_bytes(path, b"data")
    ill += [errno.EIO, errno.EACCES]
    with pytest.raises(PermissionError), faults.telling_forbidden():
        files.read_bytes(path)
    assert ill == [errno.EIO]


@pytest.mark.parametrize("call", ["write", "writer", "write if unchanged", "link", "move"])
@pytest.mark.parametrize("fault", ["ENOSPC", "EDQUOT"])
def test_a_full_disk_is_told_with_the_file_that_has_no_room(
    tmp_path: Path, ill: list[int], monkeypatch: pytest.MonkeyPatch, call: str, fault: str
) -> None:
    monkeypatch.setattr(faults, "RETRY_SECONDS", 60.0)  # which nobody need wait
    path = str(tmp_path / "file")
    files.write_bytes(path, b"data")
    ill += [getattr(errno, fault)] * 10_000
    with pytest.raises(StorageUnavailable, match=f"^{tmp_path}.* could not be written.*Make room"):
        CALLS[call](path)
    ill.clear()
    assert files.read_bytes(path) == b"data"


def test_a_full_disk_is_told_of_what_others_write(tmp_path: Path) -> None:
    def write() -> None:
        with faults.telling_full(str(tmp_path)), open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")

    with pytest.raises(StorageUnavailable, match=f"^{tmp_path} could not be written") as told:
        write()
    # Between two tables of a night, the first is new then and the second old.
    assert "half-published" not in str(told.value)
    assert "is not whole until the next run has ended" in str(told.value)
    with pytest.raises(OSError, match="Input/output"), faults.telling_full(str(tmp_path)):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_write_that_fails_midway_leaves_the_old_file_and_is_the_stores_fault(
    tmp_path: Path,
) -> None:
    path = str(tmp_path / "file")
    files.write_bytes(path, b"data")

    def write() -> None:
        with files.atomic_writer(path) as file:
            file.write(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(StorageUnavailable, match="No space left"):
        write()
    assert os.listdir(tmp_path) == ["file"]
    assert files.read_bytes(path) == b"data"


# ---- what is supported -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["gs://", "gs:///x", "GS://a/b", "s3://a/b", "hdfs://h/p", "https://x/y.parquet"]
)
def test_a_remote_path_other_than_of_a_bucket_is_refused(path: str) -> None:
    with pytest.raises(OperatorError) as refused:
        files.expanded(path)
    assert refused.value.exit_status == 2
    assert path in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "path", ["/data/imps", "relative/dt={ds}/*.parquet", "C:/shop", "a:b", "gs://b", "gs://b/x"]
)
def test_a_local_path_or_one_of_a_bucket_is_supported(path: str) -> None:
    assert files.expanded(path) == path


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("", "An empty path"), (" ", "An empty path"), (" images", "a blank"), ("a\n", "a blank"),
        ("a\0b", "control character"), ("gs:/bucket/x", "two slashes"), ("gs:b/x", "two slashes"),
        ("gs:", "two slashes"), ("s3:/b", "two slashes"), ("file:/data", "two slashes"),
        ("$HOME/x", "variable"), ("a/$DATA", "variable"), ("a${X}b", "variable"),
        ("~nobody-here/x", "no such user"),
    ],
)  # fmt: skip
def test_a_path_that_would_become_a_folder_that_nobody_meant_is_refused(
    path: str, told: str
) -> None:
    with pytest.raises(OperatorError, match=told) as refused:
        files.expanded(path)
    assert repr(path) in str(refused.value) or not path.strip()
    assert "\n" not in str(refused.value)


def test_the_home_folder_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/shop")
    assert files.expanded("~") == "/home/shop"
    assert files.expanded("~/features") == "/home/shop/features"
    assert files.expanded("a/~/b$") == "a/~/b$"
