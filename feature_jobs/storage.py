"""Files and folders behind one small interface: the local disk now, `gs://` behind it later.

Every write is atomic: a reader sees the old file, the new file or none, never half of one. A
process killed while writing leaves at most a file whose name starts with `.tmp-`, which no reader
looks at. Durability is that of the file system: after a power cut the newest files may be gone.
"""

import contextlib
import fcntl
import glob as globbing
import hashlib
import os
import re
import shutil
import stat as file_mode
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

from feature_jobs.schemas import OperatorError


@dataclass(frozen=True)
class FileInfo:
    """What can be known of a file without reading it. `mtime_us` is in microseconds since 1970."""

    path: str
    size: int
    mtime_us: int | None
    generation: int | None = None

    @property
    def version(self) -> tuple[int | None, ...]:
        """Changes whenever the bytes may have changed."""
        return (self.size, self.mtime_us, self.generation)


class Changed(Exception):
    """A preconditioned write found another content than the one it was made for."""


def check_supported(path: str) -> None:
    """Raises OperatorError for a path that no storage of this version can hold."""
    if "://" in path:
        raise OperatorError(
            f"The path {path!r} names a remote store, but this version reads and writes the local "
            "disk only. Use a local path (a mounted bucket is one)."
        )


def stat(path: str) -> FileInfo:
    """Raises FileNotFoundError (or another OSError) where there is no such regular file."""
    found = os.stat(path)
    if not file_mode.S_ISREG(found.st_mode):
        raise FileNotFoundError(f"{path} is no regular file")
    return FileInfo(path, found.st_size, found.st_mtime_ns // 1000)


def exists(path: str) -> bool:
    return os.path.exists(path)


def glob(pattern: str) -> list[FileInfo]:
    """The files that match `pattern`, sorted by path; leading `.` and `_` mark what is no data."""
    fixed = os.path.dirname(re.split(r"[*?[]", pattern)[0])
    return [
        stat(path)
        for path in sorted(globbing.glob(pattern, recursive=True))
        if os.path.isfile(path) and not _is_hidden(os.path.relpath(path, fixed or "."))
    ]


def find(pattern: str) -> list[str]:
    """The paths that match `pattern`, whatever they are called."""
    return sorted(globbing.glob(pattern))


def _is_hidden(path: str) -> bool:
    return any(name[0] in "._" for name in path.split(os.sep))


def list_names(folder: str) -> list[str]:
    """Names in `folder`, sorted; empty where there is no such folder."""
    if not os.path.isdir(folder):
        return []
    return sorted(n for n in os.listdir(folder) if not n.startswith(".tmp-"))


def read_bytes(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


@contextlib.contextmanager
def atomic_writer(path: str) -> Iterator[IO[Any]]:
    """A binary file that appears under `path` when the block ends well, and else not at all."""
    folder, name = os.path.split(path)
    os.makedirs(folder or ".", exist_ok=True)
    temporary = os.path.join(folder, f".tmp-{uuid.uuid4().hex[:12]}-{name}")
    try:
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def write_bytes(path: str, data: bytes) -> None:
    with atomic_writer(path) as file:
        file.write(data)


def write_if_unchanged(path: str, data: bytes, expected: bytes | None) -> None:
    """Replaces `path` only while it holds `expected` (None: while there is no file).

    Raises Changed otherwise. Writers on one machine are serialised by a lock on the folder.
    """
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    with lock(folder, wait=True):
        found = read_bytes(path) if os.path.exists(path) else None
        if found != expected:
            raise Changed(path)
        write_bytes(path, data)


def link(source: str, target: str) -> None:
    """Gives a file a second name within one root, without copying where the disk can do so."""
    os.makedirs(os.path.dirname(target), exist_ok=True)
    try:
        os.link(source, target)
    except FileExistsError:
        return  # file names carry the version of the content, so it is the same file
    except OSError:  # a disk without hard links
        with atomic_writer(target) as file, open(source, "rb") as data:
            shutil.copyfileobj(data, file)


def move(source: str, target: str) -> None:
    """Moves a file within one root; replaces `target`."""
    os.makedirs(os.path.dirname(target), exist_ok=True)
    os.replace(source, target)
    delete(source)  # a rename between two hard links of one file leaves both


def delete(path: str) -> None:
    """Deletes a file; that it is gone already is no error, so that a killed deletion can resume."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def delete_tree(folder: str) -> None:
    """Deletes a folder and all below it, at once for any reader; being gone is no error."""
    top, name = os.path.split(os.path.abspath(folder))
    aside = os.path.join(top, f".tmp-{uuid.uuid4().hex[:12]}-{name}")
    with contextlib.suppress(FileNotFoundError):
        os.rename(folder, aside)
        shutil.rmtree(aside)


def sha256(path: str) -> str:
    """Digest of a file's bytes, hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def lock(folder: str, wait: bool = False) -> Iterator[None]:
    """Holds `folder` exclusively; the system frees it when the process ends, however it ends.

    Raises BlockingIOError at once where another process holds it, unless `wait`.
    """
    os.makedirs(folder, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(handle)
