"""Finds, reads and writes files and folders, wherever they lie: on a disk, or in a bucket.

A path in a bucket is `gs://…`. Each function asks the store of its path; `protocol.Store` says what
is promised, and `faults` what happens when a store cannot be reached.
"""

import functools
import os
import re
from contextlib import AbstractContextManager
from typing import IO, Any

from feature_jobs.schemas import OperatorError
from feature_jobs.store.faults import Changed, unavailable
from feature_jobs.store.local import LocalStore
from feature_jobs.store.protocol import FileInfo, Held, Store

__all__ = ["Changed", "FileInfo", "Held", "unavailable"]  # what callers meet, beside functions

_LOCAL = LocalStore()


# ---- Where a path lies -----------------------------------------------------------------------


def expanded(path: str) -> str:
    """Returns a path as people type it, with `~` for the home folder expanded.

    Raises OperatorError for what could only be a mistake: taken as it is, it would name a folder
    that nobody meant.
    """
    if not path.strip():
        raise OperatorError(
            "An empty path names nothing: taken for the present folder it would mix its files with "
            "ours. Give the folder or file that is meant ('.' for the present folder)."
        )
    if path != path.strip() or not path.isprintable():
        raise OperatorError(
            f"The path {path!r} begins or ends with a blank, or has a control character in it, so "
            "that it is not the name that it looks like. Write it without."
        )
    if re.match("gs://[^/]", path):
        return path
    if "://" in path:
        raise OperatorError(
            f"The path {path!r} names a remote store other than gs://bucket/…: only those and "
            "local paths are read and written (a mounted folder is one)."
        )
    if re.match("gs:|[A-Za-z][A-Za-z0-9+.-]+:/", path):
        raise OperatorError(
            f"The path {path!r} looks like an address, but would be a folder of that name. A "
            "bucket is gs://bucket/…, with two slashes."
        )
    if re.search(r"(^|/)\$\w|\$\{", path):
        raise OperatorError(
            f"The path {path!r} has a variable of the shell in it, which is not looked up: a run "
            "would depend on who starts it. Write the path itself ('~' is the home folder)."
        )
    home = os.path.expanduser(path)
    if home.startswith("~"):
        raise OperatorError(
            f"The path {path!r} begins with '~', but there is no such user or home folder here. "
            "Write the path itself, or './~…' for a folder of that name."
        )
    return home


def is_remote(path: str) -> bool:
    """Returns whether `path` lies in a bucket."""
    return path.startswith("gs://")


def absolute(path: str, folder: str = ".") -> str:
    """Returns `path` from `folder` on, which may be of a bucket; without a `/` at its end."""
    if is_remote(path):
        return path.rstrip("/")
    if is_remote(folder) and not os.path.isabs(path):
        scheme, _, rest = folder.partition("://")
        return f"{scheme}://{os.path.normpath(os.path.join(rest, path))}"
    return os.path.abspath(os.path.join(folder, path))


def store_of(path: str) -> Store:
    """Returns the store that keeps `path`."""
    return _bucket_store() if is_remote(path) else _LOCAL


@functools.cache
def _bucket_store() -> Store:
    from feature_jobs.store.gcs import GcsStore  # Google's client takes a second to load

    return GcsStore()


# ---- Looking ---------------------------------------------------------------------------------


def stat(path: str) -> FileInfo:
    """Returns what is known of a file; raises FileNotFoundError where there is none."""
    return store_of(path).stat(path)


def exists(path: str) -> bool:
    """Returns whether there is a file; a folder is none (`is_folder`)."""
    try:
        stat(path)
    except FileNotFoundError:
        return False
    return True


def is_folder(path: str) -> bool:
    """Returns whether `path` is a folder; in a bucket, whether there is an object below it."""
    return store_of(path).is_folder(path)


def glob(pattern: str) -> list[FileInfo]:
    """Returns the files that match `pattern`, sorted; names with `.` or `_` first are no data."""
    return store_of(pattern).glob(pattern)


def find(pattern: str) -> list[str]:
    """Returns the paths that match `pattern`, sorted; a wildcard matches no leading dot."""
    return store_of(pattern).find(pattern)


def list_names(folder: str) -> list[str]:
    """Returns the names in `folder`, sorted; none where there is no such folder."""
    return store_of(folder).list_names(folder)


def below(folder: str) -> list[FileInfo]:
    """Returns all files below `folder`, and when each was written: hidden ones, too."""
    return store_of(folder).below(folder)


# ---- Reading ---------------------------------------------------------------------------------


def read_bytes(path: str, limit: int = -1) -> bytes:
    """Returns the bytes of a file, or the first `limit`; raises FileNotFoundError for none."""
    return store_of(path).read_bytes(path, limit)


def read_if_there(path: str) -> bytes | None:
    """Returns the bytes of a file, None where there is none."""
    try:
        return read_bytes(path)
    except FileNotFoundError:
        return None


def open_input(path: str) -> IO[bytes]:
    """Opens a file to read at any position, never a mixture of two versions of it."""
    return store_of(path).open_input(path)


def sha256(path: str) -> str:
    """Returns the digest of a file's bytes, hex; raises FileNotFoundError where there is none."""
    return store_of(path).sha256(path)


def checksum(path: str) -> str:
    """Returns what tells a file's bytes, wherever they lie: what a bucket keeps, else a digest.

    Raises FileNotFoundError where there is no file.
    """
    return store_of(path).checksum(path)


# ---- Writing ---------------------------------------------------------------------------------


def atomic_writer(path: str) -> AbstractContextManager[IO[Any]]:
    """Gives a binary file that appears as `path` when the block ends well, and else not at all."""
    return store_of(path).atomic_writer(path)


def write_bytes(path: str, data: bytes) -> None:
    """Writes a whole file, in place of what is there."""
    store_of(path).write_bytes(path, data)


def write_if_unchanged(path: str, data: bytes, expected: bytes | None) -> None:
    """Replaces `path` only while it holds `expected` (None: no file); raises Changed otherwise."""
    store_of(path).write_if_unchanged(path, data, expected)


def replace_seen(path: str, data: bytes, seen: FileInfo | None) -> None:
    """Replaces the file that was `seen` (None: no file), and not another of the same bytes.

    Raises Changed where another has taken its name since.
    """
    store_of(path).replace_seen(path, data, seen)


def link(source: str, target: str) -> None:
    """Gives a file a second name within one root, without copying where the disk can do so.

    Replaces `target`.
    """
    store_of(source).link(source, target)


def move(source: str, target: str) -> None:
    """Moves a file within one root; replaces `target`."""
    store_of(source).move(source, target)


def delete(path: str) -> None:
    """Deletes a file; that it is gone already is no error."""
    store_of(path).delete(path)


def delete_seen(file: FileInfo) -> None:
    """Deletes the file that was seen, and not another that has taken its name since."""
    store_of(file.path).delete_seen(file)


def delete_tree(folder: str) -> None:
    """Deletes a folder and all below it; being gone is no error."""
    store_of(folder).delete_tree(folder)


def delete_empty(folder: str) -> None:
    """Deletes a folder, and those below it, as far as they hold nothing; no error where they do."""
    store_of(folder).delete_empty(folder)


# ---- Excluding others ------------------------------------------------------------------------


def step(folder: str) -> AbstractContextManager[None]:
    """Lets what is looked at in `folder` stay so until the block, a short one, has written.

    On a disk that is a lock; in a bucket the writes of the block need preconditions of their own.
    """
    return store_of(folder).step(folder)


def lock(folder: str, wait: bool = False) -> AbstractContextManager[Held]:
    """Holds `folder` exclusively; raises BlockingIOError at once where another does, or waits."""
    return store_of(folder).lock(folder, wait)
