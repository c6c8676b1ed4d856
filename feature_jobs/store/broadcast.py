"""Shares files among a machine's worker processes: one copy, made by the first that needs it.

A machine outlasts many jobs. So whoever makes a copy deletes those of jobs that are over: what no
process has open, but for the newest, to which a job comes back whose workers have just ended.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

from feature_jobs.schemas import CourierError
from feature_jobs.store import documents, faults, files

_DONE = "done.json"
_KEPT = 3  # copies that no process has open; none of them where room is short

# By folder, what this process opened: while it is locked, others know that the copy is in use.
_open_here: dict[str, int] = {}


def shared_folder(key: str, build: Callable[[str], Any], size: int = 0) -> tuple[str, Any]:
    """Returns this machine's folder for `key`, and the JSON value that `build` of it returned.

    `build` runs once, while other processes wait; one that was killed is run again. The folder
    stays as long as this process, unless it discards it. Raises CourierError where the folder
    belongs to somebody else, or where the disk has no room for the `size` of it, in bytes, or had
    none while it was built.
    """
    folder = folder_of(key)
    done, lock = os.path.join(folder, _DONE), _lock_own(folder)
    try:
        if not files.exists(done):
            _make_room(key, size)
            with faults.telling_full(folder):  # others may fill the disk meanwhile
                built = build(folder)
            documents.write_json(done, built)
        _keep_open(folder)
        return folder, documents.read_json(done)
    finally:
        os.close(lock)


def folder_of(key: str) -> str:
    """Returns where this machine keeps its copy of `key`."""
    return os.path.join(tempfile.gettempdir(), f"{_prefix()}{key}")


def discard(key: str) -> None:
    """Deletes this machine's copy of `key`, unless another process uses or builds it.

    Such a copy goes with the next one that is made after its last process has ended.
    """
    folder = folder_of(key)
    if folder in _open_here:
        os.close(_open_here.pop(folder))
    with contextlib.suppress(FileNotFoundError, BlockingIOError):
        lock = _lock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            if not _is_open(folder):
                files.delete_tree(folder)
        finally:
            os.close(lock)


def _prefix() -> str:
    return f"courier-{os.getuid()}-"


# ---- Who uses a copy ---------------------------------------------------------------------------


def _lock_own(folder: str) -> int:
    """Returns the open folder, made where there is none, which this thread alone has locked."""
    while True:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # another process has deleted it meanwhile
            found = os.lstat(folder)
            if found.st_uid != os.getuid() or found.st_mode & 0o077:
                raise CourierError(
                    f"{folder} belongs to another user or can be written by others, who could "
                    "plant embeddings or centres there. Delete it, or set TMPDIR to a folder of "
                    "your own."
                )
            return _lock(folder, fcntl.LOCK_EX)


def _lock(path: str, how: int) -> int:
    """Returns the open file or folder, locked; raises FileNotFoundError for what is deleted.

    Raises BlockingIOError where `how` is not to wait and another has locked it.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, how)
        if os.path.samestat(os.fstat(handle), os.stat(path)):
            return handle
        raise FileNotFoundError(path)
    except OSError:
        os.close(handle)
        raise


def _keep_open(folder: str) -> None:
    """Tells others, as long as this process lives, that the copy in a locked `folder` is in use."""
    os.utime(folder)
    before = _open_here.get(folder)
    _open_here[folder] = _lock(os.path.join(folder, _DONE), fcntl.LOCK_SH)
    if before is not None:
        os.close(before)


def _is_open(folder: str) -> bool:
    """Returns whether a process has opened the copy in a locked `folder`."""
    with contextlib.suppress(FileNotFoundError):  # not finished, so that none has
        try:
            os.close(_lock(os.path.join(folder, _DONE), fcntl.LOCK_EX | fcntl.LOCK_NB))
        except BlockingIOError:
            return True
    return False


# ---- Room --------------------------------------------------------------------------------------


def _make_room(key: str, size: int) -> None:
    """Deletes copies of jobs that are over; raises CourierError where `size` bytes are not free."""
    _delete_unused(_KEPT)
    if _free_bytes() < size:
        _delete_unused(0)
    if _free_bytes() < size:
        raise CourierError(
            f"{folder_of(key)} needs {size / 1e9:,.1f} GB for a copy of the embeddings, but the "
            f"disk has {_free_bytes() / 1e9:,.1f} GB left. Half written, it would end the worker "
            'without a word. Set [simscore] embeddings_by = "shuffle", which needs no copy, or '
            "give the workers larger disks."
        )


def _free_bytes() -> int:
    return shutil.disk_usage(tempfile.gettempdir()).free


def _delete_unused(kept: int) -> None:
    """Deletes what no process has open, but for the copies `kept` that were opened last.

    And what is left of a copy whose deletion was cut short.
    """
    top = tempfile.gettempdir()
    names = os.listdir(top)
    for name in names:
        if name.startswith(".tmp-") and f"-{_prefix()}" in name:
            shutil.rmtree(os.path.join(top, name), ignore_errors=True)
    ours = [os.path.join(top, name) for name in names if name.startswith(_prefix())]
    for path in _newest_first(ours):
        with contextlib.suppress(FileNotFoundError, BlockingIOError):  # gone, or just being made
            lock = _lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                if _is_open(path):
                    continue
                kept -= 1
                if kept < 0:
                    files.delete_tree(path)
            finally:
                os.close(lock)


def _newest_first(paths: list[str]) -> list[str]:
    """Returns those of this user, by when they were opened last."""
    opened = dict[str, int]()
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            found = os.lstat(path)
            if found.st_uid == os.getuid():
                opened[path] = found.st_mtime_ns
    return sorted(opened, key=lambda path: -opened[path])
