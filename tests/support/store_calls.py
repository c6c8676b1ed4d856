"""Lists the functions of `files`, called on one file, for tests that go through all of them."""

import os
from collections.abc import Callable

from feature_jobs.store import files


def written(path: str) -> None:
    """Writes a file through `atomic_writer`."""
    with files.atomic_writer(path) as file:
        file.write(b"data")


def opened(path: str) -> None:
    """Reads a file through `open_input`."""
    with files.open_input(path) as file:
        file.read()


def taken(path: str) -> None:
    """Takes a lock beside the file and gives it back."""
    with files.lock(f"{path}.lock"):
        pass


def deleted_as_seen(path: str) -> None:
    """Deletes the file as it stands there now."""
    files.delete_seen(files.stat(path))


def replaced_as_seen(path: str) -> None:
    """Replaces the file as it stands there now."""
    files.replace_seen(path, b"new", files.stat(path))


# Each is called with the path of a file that holds b"data".
CALLS: dict[str, Callable[[str], object]] = {
    "stat": files.stat,
    "exists": files.exists,
    "is folder": lambda path: files.is_folder(os.path.dirname(path)),
    "glob": lambda path: files.glob(path + "*"),
    "find": lambda path: files.find(path + "*"),
    "names": lambda path: files.list_names(os.path.dirname(path)),
    "below": lambda path: files.below(os.path.dirname(path)),
    "read": files.read_bytes,
    "read in part": lambda path: files.read_bytes(path, 2),
    "read if there": files.read_if_there,
    "open": opened,
    "digest": files.sha256,
    "write": lambda path: files.write_bytes(path, b"data"),
    "writer": written,
    "write if unchanged": lambda path: files.write_if_unchanged(path, b"new", b"data"),
    "replace as seen": replaced_as_seen,
    "link": lambda path: files.link(path, path + "2"),
    "move": lambda path: files.move(path, path + "2"),
    "delete": files.delete,
    "delete as seen": deleted_as_seen,
    "delete tree": lambda path: files.delete_tree(os.path.dirname(path)),
    "lock": taken,
}
