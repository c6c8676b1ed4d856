"""Shares files among a machine's worker processes: one copy, made by the first that needs it."""

import os
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

from feature_jobs.schemas import CourierError
from feature_jobs.store import documents, faults, files

_DONE = "done.json"


def shared_folder(key: str, build: Callable[[str], Any], size: int = 0) -> tuple[str, Any]:
    """Returns this machine's folder for `key`, and the JSON value that `build` of it returned.

    `build` runs once, while other processes wait; one that was killed is run again. Raises
    CourierError where the folder belongs to somebody else, or where the disk has no room for the
    `size` of it, in bytes, or had none while it was built.
    """
    folder = folder_of(key)
    os.makedirs(folder, mode=0o700, exist_ok=True)
    found = os.lstat(folder)
    if found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise CourierError(
            f"{folder} belongs to another user or can be written by others, who could plant "
            "embeddings or centres there. Delete it, or set TMPDIR to a folder of your own."
        )
    done = os.path.join(folder, _DONE)
    with files.lock(folder, wait=True):
        if not files.exists(done):
            _check_room(key, size)
            with faults.telling_full(folder):  # others may fill the disk meanwhile
                built = build(folder)
            documents.write_json(done, built)
    return folder, documents.read_json(done)


def _check_room(key: str, size: int) -> None:
    if _free_bytes() < size:
        raise CourierError(
            f"{folder_of(key)} needs {size / 1e9:,.1f} GB for a copy of the embeddings, but the "
            f"disk has {_free_bytes() / 1e9:,.1f} GB left. Half written, it would end the worker "
            'without a word. Set [simscore] embeddings_by = "shuffle", which needs no copy, or '
            "give the workers larger disks."
        )


def _free_bytes() -> int:
    return shutil.disk_usage(tempfile.gettempdir()).free


def folder_of(key: str) -> str:
    """Returns where this machine keeps its copy of `key`."""
    return os.path.join(tempfile.gettempdir(), f"courier-{os.getuid()}-{key}")


def discard(key: str) -> None:
    """Deletes this machine's copy of `key`; a worker's own goes with the worker."""
    files.delete_tree(folder_of(key))
