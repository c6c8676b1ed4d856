"""Files and folders behind one small interface: of the local disk, and of `gs://` in `gcs`.

Every write is atomic: a reader sees the old file, the new file or none, never half of one. A
process killed while writing leaves at most a file whose name starts with `.tmp-`, which no reader
looks at. Durability is that of the file system: after a power cut the newest files may be gone.

Transient faults of a network are waited for, and then raise StorageUnavailable: they say nothing of
the file that was asked for.
"""

import contextlib
import errno
import fcntl
import functools
import glob as globbing
import hashlib
import os
import re
import shutil
import stat as file_mode
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any, Concatenate, ParamSpec, TypeVar

import pyarrow as pa

from feature_jobs.schemas import OperatorError, StorageUnavailable

RETRY_SECONDS = 120.0  # so long is a transient fault waited for
FIRST_WAIT_SECONDS = 1.0  # at most, before the second try of a call; then twice as long each time

P = ParamSpec("P")
T = TypeVar("T")
OfPath = Callable[Concatenate[str, P], T]

# What a disk that is mounted over a network says while it cannot be reached.
_TRANSIENT = {
    getattr(errno, name)
    for name in (
        "EIO", "ETIMEDOUT", "ESTALE", "EAGAIN", "EINTR", "EREMOTEIO", "ECONNRESET", "ECONNABORTED",
        "ENETDOWN", "ENETRESET", "ENETUNREACH", "EHOSTDOWN", "EHOSTUNREACH", "ENOTCONN",
    )
    if hasattr(errno, name)
}  # fmt: skip


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


# ---- Where a path lies -----------------------------------------------------------------------


def check_supported(path: str) -> None:
    """Raises OperatorError for a path that is neither local nor in a bucket."""
    if "://" in path and not re.match("gs://[^/]", path):
        raise OperatorError(
            f"The path {path!r} names a remote store other than gs://bucket/…: only those and "
            "local paths are read and written (a mounted folder is one)."
        )


def is_remote(path: str) -> bool:
    return path.startswith("gs://")


def absolute(path: str, folder: str = ".") -> str:
    """`path` from `folder` on, or of a bucket as it is; without a `/` at its end."""
    return path.rstrip("/") if is_remote(path) else os.path.abspath(os.path.join(folder, path))


def _or_gcs(local: OfPath[P, T]) -> OfPath[P, T]:
    """`local`, or for a gs:// path the function of `gcs` with the same name, which keeps the same
    promises. Google's client is loaded when it is first needed."""

    @functools.wraps(local)
    def chosen(path: str, /, *args: P.args, **kwargs: P.kwargs) -> T:
        if not is_remote(path):
            return local(path, *args, **kwargs)
        from feature_jobs.store import gcs

        found: T = getattr(gcs, local.__name__)(path, *args, **kwargs)
        return found

    return chosen


# ---- Transient faults --------------------------------------------------------------------------


def unavailable(path: str, found: str) -> StorageUnavailable:
    return StorageUnavailable(
        f"{path} could not be reached for {RETRY_SECONDS:.0f} seconds ({found}). The store or the "
        "way to it is at fault and not the data, so nothing was rejected for it. Run the same "
        "command again later: it goes on from where it was."
    )


def _retrying(local: OfPath[P, T]) -> OfPath[P, T]:
    """`local`, tried again with back-off and jitter while a disk cannot be reached."""

    @functools.wraps(local)
    def tried(path: str, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return local(path, *args, **kwargs)
        except OSError as error:
            if not _is_transient(error):
                raise
        return _retry(path, functools.partial(local, path, *args, **kwargs))

    return tried


def _is_transient(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in _TRANSIENT


def _retry(path: str, call: Callable[[], T]) -> T:
    from google.api_core import exceptions, retry  # half a second, which only a fault has to pay

    patient = retry.Retry(
        _is_transient, initial=FIRST_WAIT_SECONDS, maximum=30, multiplier=2, timeout=RETRY_SECONDS
    )
    try:
        found: T = patient(call)()
    except exceptions.RetryError as error:
        raise unavailable(path, str(error.cause)) from error
    return found


# ---- Looking ---------------------------------------------------------------------------------


@_or_gcs
@_retrying
def stat(path: str) -> FileInfo:
    """Raises FileNotFoundError (or another OSError) where there is no such regular file."""
    found = os.stat(path)
    if not file_mode.S_ISREG(found.st_mode):
        raise FileNotFoundError(f"{path} is no regular file")
    return FileInfo(path, found.st_size, found.st_mtime_ns // 1000)


@_or_gcs
def exists(path: str) -> bool:
    """Whether there is a file; a folder is none (`is_folder`)."""
    return os.path.isfile(path)


@_or_gcs
def is_folder(path: str) -> bool:
    return os.path.isdir(path)


@_or_gcs
def glob(pattern: str) -> list[FileInfo]:
    """The files that match `pattern`, sorted by path; leading `.` and `_` mark what is no data."""
    fixed = os.path.dirname(re.split(r"[*?[]", pattern)[0])
    return [
        stat(path)
        for path in sorted(globbing.glob(pattern, recursive=True))
        if os.path.isfile(path) and not is_hidden(os.path.relpath(path, fixed or "."))
    ]


@_or_gcs
def find(pattern: str) -> list[str]:
    """Paths of files that match `pattern`, sorted; a wildcard matches no leading dot."""
    return sorted(globbing.glob(pattern))


def is_hidden(path: str) -> bool:
    """Whether a name on the way marks what is no data."""
    return any(name.startswith((".", "_")) for name in path.split("/"))


@_or_gcs
def list_names(folder: str) -> list[str]:
    """Names in `folder`, sorted; empty where there is no such folder."""
    if not os.path.isdir(folder):
        return []
    return sorted(n for n in os.listdir(folder) if not n.startswith(".tmp-"))


# ---- Reading ---------------------------------------------------------------------------------


@_or_gcs
@_retrying
def read_bytes(path: str, limit: int = -1) -> bytes:
    """The bytes of a file, or the first `limit` of them."""
    with open(path, "rb") as file:
        return file.read(limit)


@_or_gcs
def open_input(path: str) -> IO[bytes]:
    """A file to read at any position, never a mixture of two versions. When it is replaced
    meanwhile, a disk goes on with the old bytes; a bucket raises FileNotFoundError."""
    found: IO[bytes] = pa.OSFile(path)
    return found


@_or_gcs
def sha256(path: str) -> str:
    """Digest of a file's bytes, hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- Writing ---------------------------------------------------------------------------------


@_or_gcs
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


@_or_gcs
def write_bytes(path: str, data: bytes) -> None:
    with atomic_writer(path) as file:
        file.write(data)


@_or_gcs
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


@_or_gcs
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


@_or_gcs
def move(source: str, target: str) -> None:
    """Moves a file within one root; replaces `target`."""
    os.makedirs(os.path.dirname(target), exist_ok=True)
    os.replace(source, target)
    delete(source)  # a rename between two hard links of one file leaves both


@_or_gcs
def delete(path: str) -> None:
    """Deletes a file; that it is gone already is no error, so that a killed deletion can resume."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


@_or_gcs
def delete_tree(folder: str) -> None:
    """Deletes a folder and all below it; being gone is no error.

    At once for any reader on a disk; in a bucket what says that other files are whole goes first.
    """
    top, name = os.path.split(os.path.abspath(folder))
    aside = os.path.join(top, f".tmp-{uuid.uuid4().hex[:12]}-{name}")
    with contextlib.suppress(FileNotFoundError):
        os.rename(folder, aside)
        shutil.rmtree(aside)


@_or_gcs
@contextlib.contextmanager
def lock(folder: str, wait: bool = False) -> Iterator[None]:
    """Holds `folder` exclusively; the system frees it when the process ends, however it ends.

    In a bucket that of a killed process is free when another on the same machine asks for it, and
    five minutes later for others. Raises BlockingIOError at once where another process holds it,
    unless `wait`.
    """
    os.makedirs(folder, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(handle)
