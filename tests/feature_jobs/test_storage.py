"""Files appear whole or not at all, and a folder has one writer at a time, whoever is killed."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from feature_jobs import storage
from feature_jobs.schemas import OperatorError

HOLD = """
import sys, time
from feature_jobs import storage
with storage.lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""
HALF = """
import sys, time
from feature_jobs import storage
with storage.atomic_writer(sys.argv[1]) as file:
    file.write(b"half")
    file.flush()
    print("half written", flush=True)
    time.sleep(60)
"""
# Adds one to the number in a file, again and again, starting over when another process was faster.
COUNT = """
import sys
from feature_jobs import storage
path, times = sys.argv[1], int(sys.argv[2])
while times:
    found = storage.read_bytes(path)
    try:
        storage.write_if_unchanged(path, b"%d" % (int(found) + 1), found)
        times -= 1
    except storage.Changed:
        pass
"""


def start(script: str, *args: object) -> subprocess.Popen:
    command = [sys.executable, "-c", script, *map(str, args)]
    root = Path(storage.__file__).parents[1]
    return subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True)


def killed(process: subprocess.Popen) -> int:
    process.kill()
    code = process.wait(20)
    process.stdout.close()
    return code


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """Another process that holds the lock on `tmp_path`/night."""
    process = start(HOLD, tmp_path / "night")
    assert process.stdout.readline() == "held\n"
    yield process
    if process.poll() is None:
        killed(process)


# ---- atomic writes ---------------------------------------------------------------------------


def test_a_file_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    path = str(tmp_path / "new" / "file")
    with storage.atomic_writer(path) as file:
        file.write(b"one")
        file.flush()
        assert not os.path.exists(path)
    assert storage.read_bytes(path) == b"one"
    assert os.listdir(tmp_path / "new") == ["file"]


def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = str(tmp_path / "file")
    storage.write_bytes(path, b"old")
    with open(path, "rb") as reader, storage.atomic_writer(path) as file:
        file.write(b"new and longer")
        file.flush()
        assert storage.read_bytes(path) == b"old"
        assert reader.read() == b"old"
    assert storage.read_bytes(path) == b"new and longer"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_nothing_new(tmp_path: Path, error: type[BaseException]) -> None:
    def write_half(name: str) -> None:
        with storage.atomic_writer(str(tmp_path / name)) as file:
            file.write(b"half")
            raise error

    storage.write_bytes(str(tmp_path / "file"), b"old")
    for name in ("file", "other"):
        with pytest.raises(error):
            write_half(name)
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_killed_writer_leaves_no_file_that_a_reader_looks_at(tmp_path: Path) -> None:
    path = tmp_path / "part.parquet"
    process = start(HALF, path)
    assert process.stdout.readline() == "half written\n"
    assert killed(process) == -signal.SIGKILL
    left = os.listdir(tmp_path)
    assert len(left) == 1  # the half file is there
    assert left[0].startswith(".tmp-")
    assert not storage.exists(str(path))
    assert storage.list_names(str(tmp_path)) == []
    assert storage.glob(str(tmp_path / "*")) == []


# ---- preconditioned writes -------------------------------------------------------------------


def test_a_write_that_expects_no_file_makes_one_once(tmp_path: Path) -> None:
    path = str(tmp_path / "new" / "manifest")
    storage.write_if_unchanged(path, b"one", None)
    with pytest.raises(storage.Changed):
        storage.write_if_unchanged(path, b"two", None)
    assert storage.read_bytes(path) == b"one"


def test_a_write_replaces_only_what_it_was_made_for(tmp_path: Path) -> None:
    path = str(tmp_path / "manifest")
    storage.write_bytes(path, b"one")
    storage.write_if_unchanged(path, b"two", b"one")
    with pytest.raises(storage.Changed):
        storage.write_if_unchanged(path, b"three", b"one")
    assert storage.read_bytes(path) == b"two"
    storage.delete(path)
    with pytest.raises(storage.Changed):
        storage.write_if_unchanged(path, b"three", b"two")
    assert os.listdir(tmp_path) == []


def test_an_empty_file_is_not_the_same_as_no_file(tmp_path: Path) -> None:
    path = str(tmp_path / "manifest")
    with pytest.raises(storage.Changed):
        storage.write_if_unchanged(path, b"one", b"")
    storage.write_bytes(path, b"")
    with pytest.raises(storage.Changed):
        storage.write_if_unchanged(path, b"one", None)
    assert storage.read_bytes(path) == b""


def test_no_write_is_lost_when_processes_race(tmp_path: Path) -> None:
    path = str(tmp_path / "counter")
    storage.write_bytes(path, b"0")
    writers = [start(COUNT, path, 150) for _ in range(3)]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    for writer in writers:
        writer.stdout.close()
    assert storage.read_bytes(path) == b"450"


# ---- locks -----------------------------------------------------------------------------------


def test_a_lock_excludes_another_process(tmp_path: Path, holder: subprocess.Popen) -> None:
    with pytest.raises(BlockingIOError), storage.lock(str(tmp_path / "night")):
        pytest.fail("two processes held one lock")
    with storage.lock(str(tmp_path / "other night")):
        assert holder.poll() is None  # it held its lock all the while


def test_a_lock_is_free_once_its_process_is_killed(
    tmp_path: Path, holder: subprocess.Popen
) -> None:
    assert killed(holder) == -signal.SIGKILL
    with storage.lock(str(tmp_path / "night")):
        assert os.listdir(tmp_path / "night") == []  # no lock file that one would have to delete


def test_who_waits_gets_the_lock_when_its_holder_dies(
    tmp_path: Path, holder: subprocess.Popen
) -> None:
    waiter = start(HOLD.replace("sys.argv[1]", "sys.argv[1], wait=True"), tmp_path / "night")
    with pytest.raises(subprocess.TimeoutExpired):
        waiter.wait(0.5)
    killed(holder)
    assert waiter.stdout.readline() == "held\n"
    killed(waiter)


@pytest.mark.parametrize("error", [None, ValueError])
def test_a_lock_ends_with_its_block(tmp_path: Path, error: type[Exception] | None) -> None:
    try:
        with storage.lock(str(tmp_path)):
            with pytest.raises(BlockingIOError), storage.lock(str(tmp_path)):
                pass
            if error:
                raise error
    except ValueError:
        assert error
    with storage.lock(str(tmp_path)):
        assert os.path.isdir(tmp_path)


# ---- listing ---------------------------------------------------------------------------------


def test_glob_lists_data_files_by_path_and_leaves_out_marks(tmp_path: Path) -> None:
    names = ["b.parquet", "a.parquet", "_SUCCESS", "_b.parquet", ".a.parquet.crc", ".x.parquet"]
    for name in [*names, "sub/c.parquet"]:
        storage.write_bytes(str(tmp_path / name), name.encode())
    os.mkdir(tmp_path / "folder.parquet")

    def found(pattern: str) -> list[str]:
        return [os.path.relpath(f.path, tmp_path) for f in storage.glob(str(tmp_path / pattern))]

    assert found("*.parquet") == ["a.parquet", "b.parquet"]
    assert found("*") == ["a.parquet", "b.parquet"]
    assert found("_*") == []
    assert found("**/*.parquet") == ["a.parquet", "b.parquet", "sub/c.parquet"]
    assert found("nothing/*") == []


def test_a_files_version_changes_with_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    storage.write_bytes(str(path), b"one")
    before = storage.stat(str(path))
    assert (before.path, before.size) == (str(path), 3)
    assert storage.stat(str(path)).version == before.version
    os.utime(path, ns=(0, 5_000_000))
    assert storage.stat(str(path)).mtime_us == 5_000
    assert storage.stat(str(path)).version != before.version
    with pytest.raises(FileNotFoundError):
        storage.stat(str(tmp_path / "none"))


def test_names_are_sorted_and_none_where_there_is_no_folder(tmp_path: Path) -> None:
    for name in ("b", "_SUCCESS", "a", ".tmp-123-a"):
        storage.write_bytes(str(tmp_path / name), b"")
    assert storage.list_names(str(tmp_path)) == ["_SUCCESS", "a", "b"]
    assert storage.list_names(str(tmp_path / "none")) == []


# ---- links, moves, deletions -----------------------------------------------------------------


@pytest.mark.parametrize("hard_links", [True, False])
def test_a_link_is_a_second_name_that_outlives_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hard_links: bool
) -> None:
    def refuse(*_: str) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    if not hard_links:
        monkeypatch.setattr(os, "link", refuse)
    source, target = str(tmp_path / "a"), str(tmp_path / "new" / "b")
    storage.write_bytes(source, b"data")
    storage.link(source, target)
    storage.link(source, target)  # a run that was killed after it, and resumes
    assert os.path.samefile(source, target) == hard_links
    storage.delete(source)
    assert storage.read_bytes(target) == b"data"
    assert os.listdir(tmp_path / "new") == ["b"]


def test_a_move_replaces_its_target(tmp_path: Path) -> None:
    source, target = str(tmp_path / "a"), str(tmp_path / "new" / "b")
    for data in (b"one", b"two"):
        storage.write_bytes(source, data)
        storage.move(source, target)
        assert not storage.exists(source)
        assert storage.read_bytes(target) == data


def test_a_move_between_two_names_of_one_file_leaves_the_target(tmp_path: Path) -> None:
    source, target = str(tmp_path / "a"), str(tmp_path / "b")
    storage.write_bytes(source, b"data")
    storage.link(source, target)
    storage.move(source, target)
    assert os.listdir(tmp_path) == ["b"]
    assert storage.read_bytes(target) == b"data"


def test_deleting_what_is_gone_is_no_error(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "folder" / "file"), b"data")
    for _ in range(2):
        storage.delete(str(tmp_path / "folder" / "file"))
        assert os.listdir(tmp_path) in (["folder"], [])
        storage.delete_tree(str(tmp_path / "folder"))
        assert os.listdir(tmp_path) == []


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "file"), b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert storage.sha256(str(tmp_path / "file")) == known


# ---- what is supported -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["gs://shop/imps", "s3://a/b", "hdfs://h/p", "https://x/y.parquet"]
)
def test_a_remote_path_is_refused(path: str) -> None:
    with pytest.raises(OperatorError) as refused:
        storage.check_supported(path)
    assert refused.value.exit_status == 2
    assert path in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("path", ["/data/imps", "relative/dt={ds}/*.parquet", "C:/shop", "a:b"])
def test_a_local_path_is_supported(path: str) -> None:
    assert storage.check_supported(path) is None
