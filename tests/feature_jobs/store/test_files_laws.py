"""Tests what `files` promises on a disk and in a bucket alike, whoever is killed."""

import hashlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from inspect import signature
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from feature_jobs.store import files, usage
from feature_jobs.store.gcs import GcsStore
from feature_jobs.store.local import LocalStore
from feature_jobs.store.protocol import Store
from tests.support.processes import killed, start

HOLD = """
import sys, time
from feature_jobs.store import files
with files.lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""
# Adds one to the number in a file, again and again, starting over when another process was faster.
COUNT = """
import sys
from feature_jobs.store import files
path, times = sys.argv[1], int(sys.argv[2])
while times:
    found = files.read_bytes(path)
    try:
        files.write_if_unchanged(path, b"%d" % (int(found) + 1), found)
        times -= 1
    except files.Changed:
        pass
"""


@pytest.fixture(params=["disk", "bucket"])
def folder(request: pytest.FixtureRequest) -> str:
    """Returns a folder where there is nothing yet, on a disk or in a bucket."""
    if request.param == "disk":
        return str(request.getfixturevalue("tmp_path") / "new")
    return request.getfixturevalue("bucket")


@pytest.fixture
def holder(folder: str) -> Iterator[subprocess.Popen]:
    """Starts another process, which holds the lock on `folder`/night."""
    process = start(HOLD, f"{folder}/night")
    assert process.stdout.readline() == "held\n"
    yield process
    if process.poll() is None:
        killed(process)


@pytest.mark.parametrize("store", [LocalStore, GcsStore])
def test_a_store_offers_what_the_protocol_asks_for(store: type) -> None:
    asked = {name: thing for name, thing in vars(Store).items() if name[0] != "_"}
    assert {"stat", "read_bytes", "atomic_writer", "lock", "delete_tree"} <= asked.keys()
    for name, method in asked.items():
        offered = signature(getattr(store, name), follow_wrapped=True)
        assert list(offered.parameters) == list(signature(method).parameters), name
        kinds = [parameter.default for parameter in offered.parameters.values()]
        assert kinds == [p.default for p in signature(method).parameters.values()], name


def test_a_file_that_was_replaced_since_it_was_seen_is_not_deleted(folder: str) -> None:
    path = f"{folder}/part"
    files.write_bytes(path, b"old")
    seen = files.stat(path)
    files.write_bytes(path, b"newer")
    files.delete_seen(seen)
    assert files.read_bytes(path) == b"newer"
    files.delete_seen(files.stat(path))
    assert not files.exists(path)
    files.delete_seen(seen)


def test_only_the_file_that_was_seen_is_replaced_and_not_one_of_the_same_bytes(folder: str) -> None:
    path = f"{folder}/list"
    files.replace_seen(path, b"one", None)
    with pytest.raises(files.Changed):
        files.replace_seen(path, b"two", None)
    seen = files.stat(path)
    files.write_bytes(path, b"one")
    with pytest.raises(files.Changed):
        files.replace_seen(path, b"two", seen)
    assert files.read_bytes(path) == b"one"
    seen = files.stat(path)
    files.replace_seen(path, b"two", seen)
    assert files.read_bytes(path) == b"two"
    files.delete(path)
    with pytest.raises(files.Changed):
        files.replace_seen(path, b"three", seen)
    assert files.list_names(folder) == []


def test_all_files_below_a_folder_are_told_and_when_they_were_written(folder: str) -> None:
    assert files.below(folder) == []
    started = time.time()
    names = ["a", "_b", ".tmp-c", "deep/d", "deep/_e/.f"]
    for name in names:
        files.write_bytes(f"{folder}/{name}", name.encode())
    found = {file.path.removeprefix(f"{folder}/"): file for file in files.below(folder)}
    assert found.keys() == set(names)
    for name, file in found.items():
        assert file == files.stat(f"{folder}/{name}")
        assert started - 5 < file.written_us / 1e6 < time.time() + 5
        files.delete_seen(file)
    assert files.below(folder) == []


def test_folders_that_hold_nothing_are_deleted_and_others_are_not(folder: str) -> None:
    files.write_bytes(f"{folder}/deep/empty/a", b"a")
    files.write_bytes(f"{folder}/deep/full/_b", b"b")
    files.delete(f"{folder}/deep/empty/a")
    for _ in range(2):
        files.delete_empty(folder)
        assert files.list_names(folder) == ["deep"]
        assert files.list_names(f"{folder}/deep") == ["full"]
    files.delete(f"{folder}/deep/full/_b")
    files.delete_empty(folder)
    assert not files.is_folder(folder)


# ---- atomic writes ---------------------------------------------------------------------------


def test_a_file_appears_only_when_it_is_whole(folder: str) -> None:
    path = f"{folder}/deep/file"
    with files.atomic_writer(path) as file:
        file.write(b"one")
        file.flush()
        assert not files.exists(path)
    assert files.read_bytes(path) == b"one"
    assert files.list_names(f"{folder}/deep") == ["file"]


def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(folder: str) -> None:
    path = f"{folder}/file"
    files.write_bytes(path, b"old")
    with files.open_input(path) as reader:
        with files.atomic_writer(path) as file:
            file.write(b"new and longer")
            file.flush()
            assert files.read_bytes(path) == b"old"
        assert files.read_bytes(path) == b"new and longer"
        if files.is_remote(path):
            with pytest.raises(FileNotFoundError):
                reader.read()
        else:
            assert reader.read() == b"old"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_nothing_new(folder: str, error: type[BaseException]) -> None:
    def write_half(name: str) -> None:
        with files.atomic_writer(f"{folder}/{name}") as file:
            file.write(b"half")
            raise error

    files.write_bytes(f"{folder}/file", b"old")
    for name in ("file", "other"):
        with pytest.raises(error):
            write_half(name)
    assert files.list_names(folder) == ["file"]
    assert files.read_bytes(f"{folder}/file") == b"old"


# ---- preconditioned writes -------------------------------------------------------------------


def test_a_write_that_expects_no_file_makes_one_once(folder: str) -> None:
    path = f"{folder}/manifest"
    files.write_if_unchanged(path, b"one", None)
    with pytest.raises(files.Changed):
        files.write_if_unchanged(path, b"two", None)
    assert files.read_bytes(path) == b"one"


def test_a_write_replaces_only_what_it_was_made_for(folder: str) -> None:
    path = f"{folder}/manifest"
    files.write_bytes(path, b"one")
    files.write_if_unchanged(path, b"two", b"one")
    with pytest.raises(files.Changed):
        files.write_if_unchanged(path, b"three", b"one")
    assert files.read_bytes(path) == b"two"
    files.delete(path)
    with pytest.raises(files.Changed):
        files.write_if_unchanged(path, b"three", b"two")
    assert files.list_names(folder) == []


def test_an_empty_file_is_not_the_same_as_no_file(folder: str) -> None:
    path = f"{folder}/manifest"
    with pytest.raises(files.Changed):
        files.write_if_unchanged(path, b"one", b"")
    files.write_bytes(path, b"")
    with pytest.raises(files.Changed):
        files.write_if_unchanged(path, b"one", None)
    assert files.read_bytes(path) == b""


def test_no_write_is_lost_when_processes_race(folder: str) -> None:
    path, times = f"{folder}/counter", 100 if folder[0] == "/" else 20
    files.write_bytes(path, b"0")
    writers = [start(COUNT, path, times) for _ in range(3)]
    assert [writer.wait(120) for writer in writers] == [0, 0, 0]
    for writer in writers:
        writer.stdout.close()
    assert files.read_bytes(path) == b"%d" % (3 * times)


# ---- locks -----------------------------------------------------------------------------------


def test_a_lock_excludes_another_process(folder: str, holder: subprocess.Popen) -> None:
    with pytest.raises(BlockingIOError), files.lock(f"{folder}/night"):
        pytest.fail("two processes held one lock")
    with files.lock(f"{folder}/other night"):
        assert holder.poll() is None  # it held its lock all the while


def test_a_lock_is_free_once_its_process_is_killed(folder: str, holder: subprocess.Popen) -> None:
    assert killed(holder) == -signal.SIGKILL
    with files.lock(f"{folder}/night"):
        assert files.list_names(f"{folder}/night") == []  # nothing that one would have to delete


def test_who_waits_gets_the_lock_when_its_holder_dies(
    folder: str, holder: subprocess.Popen
) -> None:
    waiter = start(HOLD.replace("sys.argv[1]", "sys.argv[1], wait=True"), f"{folder}/night")
    with pytest.raises(subprocess.TimeoutExpired):
        waiter.wait(3)
    killed(holder)
    assert waiter.stdout.readline() == "held\n"
    killed(waiter)


@pytest.mark.parametrize("error", [None, ValueError])
def test_a_lock_ends_with_its_block(folder: str, error: type[Exception] | None) -> None:
    try:
        with files.lock(folder):
            with pytest.raises(BlockingIOError), files.lock(folder):
                pass
            if error:
                raise error
    except ValueError:
        assert error
    with files.lock(folder):
        assert files.list_names(folder) == []


# ---- listing ---------------------------------------------------------------------------------


def test_glob_lists_data_files_by_path_and_leaves_out_marks(folder: str) -> None:
    names = ["b.parquet", "a.parquet", "_SUCCESS", "_b.parquet", ".a.parquet.crc", ".x.parquet"]
    for name in [*names, "sub/c.parquet", "sub/_d/e.parquet", "sub.parquet/f", "aa.parquets"]:
        files.write_bytes(f"{folder}/{name}", name.encode())

    def found(pattern: str) -> list[str]:
        return [f.path.removeprefix(folder + "/") for f in files.glob(f"{folder}/{pattern}")]

    assert found("*.parquet") == ["a.parquet", "b.parquet"]
    assert found("*") == ["a.parquet", "aa.parquets", "b.parquet"]
    assert found("[a-b].par?uet") == ["a.parquet", "b.parquet"]
    assert found("a.parquet") == ["a.parquet"]
    assert found("_*") == []
    assert found("*/*.parquet") == ["sub/c.parquet"]
    assert found("s*/**/*.parquet") == ["sub/c.parquet"]
    assert found("**/*.parquet") == ["a.parquet", "b.parquet", "sub/c.parquet"]
    assert found("nothing/*") == []
    assert [f.size for f in files.glob(f"{folder}/**/[bc].*")] == [9, 13]


def test_a_listed_file_is_the_one_that_stat_finds(folder: str) -> None:
    files.write_bytes(f"{folder}/file", b"data")
    assert files.glob(f"{folder}/*") == [files.stat(f"{folder}/file")]


def test_find_gives_paths_whatever_they_are_called(folder: str) -> None:
    for name in ("ds=1/_SUCCESS", "ds=2/_SUCCESS", "ds=2/x", "_SUCCESS2"):
        files.write_bytes(f"{folder}/{name}", b"")
    assert files.find(f"{folder}/ds=1/_SUCCESS") == [f"{folder}/ds=1/_SUCCESS"]
    assert files.find(f"{folder}/*/_SUCCESS") == [f"{folder}/ds={n}/_SUCCESS" for n in (1, 2)]
    assert files.find(f"{folder}/_SUCCESS") == []


def test_a_files_version_changes_with_its_bytes(folder: str) -> None:
    path = f"{folder}/file"
    files.write_bytes(path, b"one")
    before = files.stat(path)
    assert (before.path, before.size) == (path, 3)
    assert files.stat(path).version == before.version
    files.write_bytes(path, b"two")
    assert files.stat(path).version != before.version
    with pytest.raises(FileNotFoundError):
        files.stat(f"{folder}/none")


def test_names_are_sorted_and_none_where_there_is_no_folder(folder: str) -> None:
    for name in ("b/c", "_SUCCESS", "a", ".tmp-123-a", "b/d"):
        files.write_bytes(f"{folder}/{name}", b"")
    assert files.list_names(folder) == ["_SUCCESS", "a", "b"]
    assert files.list_names(f"{folder}/none") == []
    assert files.is_folder(folder)
    assert files.is_folder(f"{folder}/b")
    assert not files.is_folder(f"{folder}/a")
    assert not files.is_folder(f"{folder}/non")


# ---- reading ---------------------------------------------------------------------------------


def test_bytes_are_read_as_they_were_written(folder: str) -> None:
    data = os.urandom(50_000) + b"\r\n--x\n\r"
    files.write_bytes(f"{folder}/file", data)
    assert files.read_bytes(f"{folder}/file") == data
    assert files.read_bytes(f"{folder}/file", 100) == data[:100]
    assert files.read_bytes(f"{folder}/file", len(data) + 1) == data
    files.write_bytes(f"{folder}/empty", b"")
    assert files.read_bytes(f"{folder}/empty", 100) == b""
    with pytest.raises(FileNotFoundError):
        files.read_bytes(f"{folder}/none")


def test_an_input_is_read_at_any_position(folder: str) -> None:
    data = os.urandom(5_000_000)
    files.write_bytes(f"{folder}/file", data)
    with files.open_input(f"{folder}/file") as file:
        for at, length in ((4_999_990, 10), (10, 20), (100, 3_000_000), (2_000_000, 8)):
            file.seek(at)
            assert file.read(length) == data[at : at + length]
            assert file.tell() == at + length
        file.seek(0, os.SEEK_END)
        assert file.tell() == len(data)
        assert file.read(1) == b""
    with pytest.raises(FileNotFoundError):
        files.open_input(f"{folder}/none")


def test_arrow_writes_and_reads_its_files(folder: str) -> None:
    rows = pa.table({"n": range(100_000), "text": [str(n) for n in range(100_000)]})
    with files.atomic_writer(f"{folder}/rows.parquet") as file:
        pq.write_table(rows, file, row_group_size=10_000)
    with files.open_input(f"{folder}/rows.parquet") as data, pq.ParquetFile(data) as file:
        assert file.read_row_group(3, ["n"])["n"][0].as_py() == 30_000
        assert file.read() == rows
    with files.atomic_writer(f"{folder}/a") as out, pa.ipc.new_file(out, rows.schema) as writer:
        writer.write_table(rows)
    with files.open_input(f"{folder}/a") as data, pa.ipc.open_file(data) as reader:
        assert reader.read_all() == rows


def test_sha256_is_that_of_the_bytes(folder: str) -> None:
    files.write_bytes(f"{folder}/file", b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert files.sha256(f"{folder}/file") == known
    data = os.urandom(20_000_000)
    with files.atomic_writer(f"{folder}/large") as file:
        for at in range(0, len(data), 1_000_000):
            file.write(data[at : at + 1_000_000])
    assert files.sha256(f"{folder}/large") == hashlib.sha256(data).hexdigest()


def bytes_of(call: Callable[[], object]) -> tuple[int, int]:
    """Returns how many bytes a call read, and how many it wrote."""
    usage.take()
    call()
    used = usage.take()
    return used.bytes_read, used.bytes_written


def test_bytes_that_are_read_and_written_are_counted(folder: str) -> None:
    path, data = f"{folder}/file", os.urandom(3_000_000)

    def write() -> None:
        with files.atomic_writer(path) as file:
            file.write(data)
            file.seek(100)
            file.write(b"again")

    def read(at: int, size: int) -> None:
        with files.open_input(path) as file:
            file.seek(at)
            file.read(size)

    assert bytes_of(lambda: files.write_bytes(path, data)) == (0, 3_000_000)
    assert bytes_of(write) == (0, 3_000_000)
    assert bytes_of(lambda: files.read_bytes(path)) == (3_000_000, 0)
    assert bytes_of(lambda: files.read_bytes(path, 1000)) == (1000, 0)
    assert bytes_of(lambda: files.sha256(path)) == (3_000_000, 0)
    assert bytes_of(lambda: files.stat(path)) == (0, 0)
    assert bytes_of(lambda: read(2_900_000, -1)) == (100_000, 0)
    found, written = bytes_of(lambda: read(1_000_000, 500_000))
    assert 500_000 <= found < 520_000  # what is read ahead is read
    assert written == 0


def test_of_a_table_those_bytes_are_counted_that_its_columns_have(folder: str) -> None:
    path, noise = f"{folder}/rows.parquet", [os.urandom(1000) for _ in range(4000)]

    def read() -> None:
        with files.open_input(path) as data, pq.ParquetFile(data) as file:
            file.read(["b"])

    with files.atomic_writer(path) as file:
        pq.write_table(pa.table({"a": noise, "b": noise}), file, use_dictionary=False)
    assert files.stat(path).size > 8_000_000
    found, _ = bytes_of(read)
    assert 4_000_000 < found < 4_400_000


# ---- links, moves, deletions -----------------------------------------------------------------


def test_a_link_is_a_second_name_that_outlives_the_first(folder: str) -> None:
    source, target = f"{folder}/a", f"{folder}/deep/b"
    files.write_bytes(source, b"data")
    files.link(source, target)
    files.link(source, target)  # a run that was killed after it, and resumes
    files.delete(source)
    assert files.read_bytes(target) == b"data"
    assert files.list_names(f"{folder}/deep") == ["b"]


def test_a_link_replaces_its_target(folder: str) -> None:
    for name, data in (("a", b"one"), ("b", b"two")):
        files.write_bytes(f"{folder}/{name}", data)
        files.link(f"{folder}/{name}", f"{folder}/deep/c")
        assert files.read_bytes(f"{folder}/deep/c") == data
    assert files.list_names(f"{folder}/deep") == ["c"]
    assert files.read_bytes(f"{folder}/a") == b"one"


def test_a_move_replaces_its_target(folder: str) -> None:
    source, target = f"{folder}/a", f"{folder}/deep/b"
    for data in (b"one", b"two"):
        files.write_bytes(source, data)
        files.move(source, target)
        assert not files.exists(source)
        assert files.read_bytes(target) == data


@pytest.mark.parametrize("take", [files.link, files.move])
def test_what_is_not_there_cannot_be_taken(folder: str, take: Callable[[str, str], None]) -> None:
    files.write_bytes(f"{folder}/a", b"")
    with pytest.raises(FileNotFoundError):
        take(f"{folder}/none", f"{folder}/b")
    assert files.list_names(folder) == ["a"]


def test_deleting_what_is_gone_is_no_error(folder: str) -> None:
    files.write_bytes(f"{folder}/top/folder/file", b"data")
    files.write_bytes(f"{folder}/top/folders", b"")
    for _ in range(2):
        files.delete(f"{folder}/top/folder/file")
        assert not files.exists(f"{folder}/top/folder/file")
        files.delete_tree(f"{folder}/top/folder")
        assert files.list_names(f"{folder}/top") == ["folders"]
    files.delete_tree(folder)
    assert not files.is_folder(folder)


def test_a_step_of_a_folder_that_was_deleted_meanwhile_is_in_the_one_that_is_there(
    tmp_path: Path,
) -> None:
    """Else two would be in a step of one folder: whoever waited, and whoever came after."""
    folder, order = str(tmp_path / "day"), list[str]()
    waits = threading.Event()

    def wait_for_it() -> None:
        waits.set()
        with files.step(folder):
            order.append("the one that waited")
            files.write_bytes(f"{folder}/a", b"a")
            try:
                with files.lock(folder):
                    order.append("another one")
            except BlockingIOError:
                order.append("nobody else")

    waiting = threading.Thread(target=wait_for_it)
    with files.step(folder):
        waiting.start()
        assert waits.wait(30)
        time.sleep(0.05)
        files.delete_empty(folder)
        order.append("the one that deleted it")
    waiting.join(30)
    assert order == ["the one that deleted it", "the one that waited", "nobody else"]
    assert files.read_bytes(f"{folder}/a") == b"a"
