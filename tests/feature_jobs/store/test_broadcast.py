"""All processes of a machine share one copy of a folder, and keep none that nobody needs."""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from feature_jobs.schemas import CourierError, StorageUnavailable
from feature_jobs.store import broadcast
from tests.support.processes import killed, start


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield
    ends_here()


def ends_here() -> None:
    """Makes of all that was opened what a process leaves that has ended."""
    while broadcast._open_here:
        os.close(broadcast._open_here.popitem()[1])


def test_a_folder_is_built_once_until_it_is_discarded(tmp_path: Path) -> None:
    built: list[str] = []

    def build(folder: str) -> int:
        built.append(folder)
        Path(folder, "data").write_text("x")
        return len(built)

    folder = broadcast.folder_of("k")
    assert Path(folder).parent == tmp_path
    assert broadcast.shared_folder("k", build) == (folder, 1)
    assert broadcast.shared_folder("k", build) == (folder, 1)
    broadcast.discard("k")
    assert os.listdir(tmp_path) == []
    assert broadcast.shared_folder("k", build)[1] == 2


def test_a_folder_that_another_process_uses_or_builds_is_not_discarded(tmp_path: Path) -> None:
    folder, _ = broadcast.shared_folder("k", lambda _: "built")
    for path in (Path(folder, "done.json"), Path(folder)):
        other = os.open(path, os.O_RDONLY)  # locked for itself, as one of another process
        fcntl.flock(other, fcntl.LOCK_SH)
        broadcast.discard("k")
        assert Path(folder, "done.json").exists()
        os.close(other)
    broadcast.discard("k")
    broadcast.discard("k")
    assert os.listdir(tmp_path) == []


def test_a_folder_that_was_not_finished_is_built_again() -> None:
    def dies(_folder: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broadcast.shared_folder("k", dies)
    assert broadcast.shared_folder("k", lambda _: "built")[1] == "built"


def test_a_folder_that_others_may_write_to_is_refused() -> None:
    """Whoever could plant embeddings in a shared folder would decide about scores."""
    folder = Path(broadcast.folder_of("k"))
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(CourierError, match="could plant embeddings"):
        broadcast.shared_folder("k", lambda _: None)


def test_a_disk_that_fills_meanwhile_is_told_with_the_folder() -> None:
    def build(folder: str) -> None:
        with open("/dev/full", "wb", buffering=0) as file:  # what any full disk says
            file.write(b"x")

    with pytest.raises(
        StorageUnavailable, match=f"^{broadcast.folder_of('k')} could not be written .*No space"
    ):
        broadcast.shared_folder("k", build)
    assert broadcast.shared_folder("k", lambda _: "built")[1] == "built"


# ---- A machine that outlasts many jobs ---------------------------------------------------------

NIGHT = bytes(10_000)


def make(key: str) -> Path:
    folder, _ = broadcast.shared_folder(key, lambda to: Path(to, "data").write_bytes(NIGHT))
    return Path(folder)


def kept(folder: Path) -> list[str]:
    names = [path.name.rpartition("-")[2] for path in folder.iterdir()]
    return sorted(names)


def test_copies_of_thirty_nights_take_the_disk_of_a_few(tmp_path: Path) -> None:
    for night in range(30):
        make(f"{night:02}")
        ends_here()
        assert sum(path.stat().st_size for path in tmp_path.rglob("data")) <= 4 * len(NIGHT)
    assert kept(tmp_path) == ["26", "27", "28", "29"]


def test_what_a_job_that_runs_has_opened_stays_however_old(tmp_path: Path) -> None:
    script = """
import sys, tempfile, time
from feature_jobs.store import broadcast
tempfile.tempdir = sys.argv[1]
for key in ("a", "b"):
    broadcast.shared_folder(key, lambda _: None)
print("open", flush=True)
time.sleep(600)
"""
    other = start(script, tmp_path)
    assert other.stdout.readline() == "open\n"
    make("mine")
    for night in range(8):
        make(f"{night}")
        os.close(broadcast._open_here.pop(broadcast.folder_of(f"{night}")))
    assert kept(tmp_path) == ["4", "5", "6", "7", "a", "b", "mine"]
    killed(other)
    make("next")
    assert kept(tmp_path) == ["5", "6", "7", "mine", "next"]


def test_a_copy_that_was_used_again_is_not_an_old_one(tmp_path: Path) -> None:
    for key in ("a", "b", "c", "d", "a", "e"):
        make(key)
        ends_here()
    assert kept(tmp_path) == ["a", "c", "d", "e"]


def test_none_but_what_is_open_stays_where_room_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make("old")
    ends_here()
    make("open")
    rooms = iter([10, 20])
    monkeypatch.setattr(broadcast, "_free_bytes", lambda: next(rooms))
    broadcast.shared_folder("new", lambda _: None, size=15)
    assert kept(tmp_path) == ["new", "open"]


def test_what_a_killed_process_left_of_a_copy_goes_too(tmp_path: Path) -> None:
    def dies(folder: str) -> None:
        Path(folder, "half").write_bytes(NIGHT)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broadcast.shared_folder("half", dies)
    aside = tmp_path / f".tmp-0123456789ab-courier-{os.getuid()}-gone"
    others = [tmp_path / ".tmp-0123456789ab-x", tmp_path / f"courier-{os.getuid() + 1}-x"]
    for folder in (aside, *others):
        folder.mkdir()
    for night in range(4):
        make(f"{night}")
        ends_here()
    assert not aside.exists()
    assert all(folder.exists() for folder in others)
    assert not Path(broadcast.folder_of("half")).exists()


def test_a_copy_that_is_deleted_while_another_waits_for_it_is_made_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make("k")
    ends_here()
    lock, times = fcntl.flock, iter([True])

    def waits(handle: int, how: int) -> None:
        if next(times, False):
            broadcast.files.delete_tree(broadcast.folder_of("k"))
        lock(handle, how)

    monkeypatch.setattr(fcntl, "flock", waits)
    assert (make("k") / "data").read_bytes() == NIGHT
