"""Google Cloud Storage behind the functions of `files`, for paths `gs://bucket/name`.

An object appears when its upload has ended, whole or not at all. There are no folders: a "folder"
is what names have in common up to a `/`, and it goes with the last object below it.

A call that meets a transient fault (no connection, a time-out, 408, 429, 5xx) is tried again with
back-off and jitter, and raises StorageUnavailable once that took too long. A missing object raises
FileNotFoundError and a forbidden one PermissionError, as on a disk. A process has one client, made
when it is first needed, whose connections its threads share.

Nothing frees a lock when its holder is killed. So a lock is an object that its holder renews, and
that others may take over when it has not been renewed for a while.
"""

import contextlib
import errno
import fnmatch
import functools
import hashlib
import io
import logging
import os
import random
import re
import socket
import tempfile
import threading
import time
import uuid
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any

from google.api_core import exceptions as api_errors
from google.cloud.storage import Blob
from google.cloud.storage.fileio import BlobReader

from feature_jobs.store import files
from feature_jobs.store.files import Changed, FileInfo
from feature_jobs.store.gcs_client import (
    IN_FLIGHT,
    bucket_of,
    client,
    retry_options,
    translating_errors,
    translating_errors_of_bucket,
)

LOCK_RENEW_SECONDS = 60.0
LOCK_FREE_SECONDS = 300.0  # without renewal
_CHUNK = 1 << 17  # read at once, at least: a seek within it costs nothing
_LARGE_CHUNK = 1 << 24  # of a file that is read or written from end to end
_LOCK = ".tmp-lock"  # readers look at no name that begins so
_STAMP = "courier-write"
_NAME_BYTES = 1024  # at most
_BUCKET = "[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]"  # the store refuses other names with HTTP 400
_LISTED = "items(name,size,generation),prefixes,nextPageToken"

_LOG = logging.getLogger(__name__)


# ---- Looking ---------------------------------------------------------------------------------


def _name_of(path: str) -> str:
    return path.removeprefix(f"gs://{bucket_of(path)}").removeprefix("/")


def _blob(path: str) -> Blob:
    bucket, name = bucket_of(path), _name_of(path)
    if not name or len(name.encode()) > _NAME_BYTES or set("\r\n") & set(name):
        raise FileNotFoundError(errno.ENOENT, "no object can be called so", path)
    if not re.fullmatch(_BUCKET, bucket):
        raise FileNotFoundError(errno.ENOENT, "no bucket can be called so", path)
    return client().bucket(bucket).blob(name)


def _current(path: str) -> Blob | None:
    """The object as it is now, of one generation from here on; None where there is none."""
    with contextlib.suppress(FileNotFoundError), translating_errors(path):
        blob = _blob(path)
        blob.reload(projection="noAcl", **retry_options())
        return blob
    return None


def _list(path: str, delimiter: str | None = None) -> tuple[list[Blob], list[str]]:
    """All objects whose paths begin with `path`; with a delimiter those alone that have none after
    it, and the beginnings of the others. Raises OperatorError where there is no such bucket."""
    with translating_errors_of_bucket(path):
        pages = client().list_blobs(
            bucket_of(path),
            prefix=_name_of(path),
            delimiter=delimiter,
            fields=_LISTED,
            **retry_options(),
        )
        # The console marks a "folder" by an object whose name ends so.
        blobs = [blob for blob in pages if not blob.name.endswith("/")]
        return blobs, sorted(pages.prefixes)


def _path(blob: Blob) -> str:
    return f"gs://{blob.bucket.name}/{blob.name}"


def _info(path: str, blob: Blob) -> FileInfo:
    return FileInfo(path, blob.size, None, blob.generation)


def stat(path: str) -> FileInfo:
    blob = _current(path)
    if blob is None:
        raise FileNotFoundError(errno.ENOENT, "no such object", path)
    return _info(path, blob)


def exists(path: str) -> bool:
    return _current(path) is not None


def is_folder(path: str) -> bool:
    """Whether there is an object below it."""
    blobs, prefixes = _list(os.path.join(path, ""), "/")
    return bool(blobs or prefixes)


def glob(pattern: str) -> list[FileInfo]:
    fixed = os.path.dirname(_before_wildcards(pattern))
    return [
        _info(path, blob)
        for path, blob in _matching(pattern)
        if not files.is_hidden(path.removeprefix(fixed + "/"))
    ]


def find(pattern: str) -> list[str]:
    return [path for path, _ in _matching(pattern.replace("**", "*"))]


def _before_wildcards(pattern: str) -> str:
    return re.split(r"[*?[]", pattern)[0]


def _matching(pattern: str) -> list[tuple[str, Blob]]:
    """Objects by path; `**` stands for any number of folders."""
    begins = _before_wildcards(pattern)
    in_last = "/" not in pattern[len(begins) :]
    blobs, _ = _list(begins, "/" if in_last else None)
    parts = pattern.split("/")
    found = [(path, blob) for blob in blobs if _matches((path := _path(blob)).split("/"), parts)]
    return sorted(found, key=lambda pair: pair[0])


def _matches(names: list[str], patterns: list[str]) -> bool:
    if not patterns:
        return not names
    if patterns[0] == "**":
        return any(_matches(names[n:], patterns[1:]) for n in range(len(names) + 1))
    if not names or (names[0].startswith(".") and not patterns[0].startswith(".")):
        return False
    return fnmatch.fnmatchcase(names[0], patterns[0]) and _matches(names[1:], patterns[1:])


def list_names(folder: str) -> list[str]:
    folder = os.path.join(folder, "")
    blobs, prefixes = _list(folder, "/")
    paths = [*map(_path, blobs), *(f"gs://{bucket_of(folder)}/{p.rstrip('/')}" for p in prefixes)]
    names = {path.removeprefix(folder) for path in paths}
    return sorted(name for name in names if name and not name.startswith(".tmp-"))


# ---- Reading ---------------------------------------------------------------------------------


def read_bytes(path: str, limit: int = -1) -> bytes:
    with translating_errors(path):
        return _read(_blob(path), limit)


def _read(blob: Blob, limit: int = -1) -> bytes:
    # Raw: the client would decompress all that the bytes hold, however much that is.
    end, raw = limit - 1 if limit > 0 else None, {"raw_download": True}
    try:
        data: bytes = blob.download_as_bytes(end=end, **raw, **retry_options())
    except api_errors.RequestRangeNotSatisfiable:  # not even the first byte is there
        return b""
    if blob.content_encoding == "gzip":
        data = _gunzip(data, limit)
    return data if limit < 0 else data[:limit]


def _gunzip(data: bytes, limit: int) -> bytes:
    """No more than `limit` bytes are ever made. What is no gzip stays as it is."""
    made = b""
    with contextlib.suppress(zlib.error):
        while data and (limit < 0 or len(made) < limit):  # one stream may follow another
            stream = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
            made += stream.decompress(data, max(limit - len(made), 0))
            data = stream.unused_data
        return made
    return made or data


class _Reader(BlobReader):
    """One generation of an object, read piece by piece where it is wanted."""

    def __init__(self, path: str, chunk: int):
        blob = _current(path)
        if blob is None:
            raise FileNotFoundError(errno.ENOENT, "no such object", path)
        super().__init__(blob, chunk, **retry_options())
        self._path = path

    def read(self, size: int | None = -1) -> bytes:
        if self.tell() >= self._blob.size:
            return b""
        with translating_errors(self._path):
            data: bytes = super().read(-1 if size is None else size)
            return data


def open_input(path: str) -> IO[bytes]:
    return _Reader(path, _CHUNK)


def sha256(path: str) -> str:
    with _Reader(path, _LARGE_CHUNK) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- Writing ---------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_writer(path: str) -> Iterator[IO[Any]]:
    with tempfile.SpooledTemporaryFile(_LARGE_CHUNK) as file:
        yield file
        _upload(path, file)


def write_bytes(path: str, data: bytes) -> None:
    _upload(path, io.BytesIO(data))


def _upload(path: str, file: IO[Any], stamp: str = "", generation: int | None = None) -> Blob:
    """Raises PreconditionFailed unless the object has `generation`, where one is given; `stamp`
    goes into its metadata."""
    with translating_errors_of_bucket(path):
        blob = _blob(path)
        blob.chunk_size = _LARGE_CHUNK  # held in memory at once
        blob.metadata = {_STAMP: stamp} if stamp else None
        blob.upload_from_file(
            file,
            rewind=True,
            size=file.seek(0, os.SEEK_END),
            if_generation_match=generation,
            **retry_options(),
        )
    return blob


def _put(path: str, data: bytes, generation: int, owner: str = "") -> Blob:
    """Writes only while the object has `generation`, or while there is none where that is 0.

    Raises Changed otherwise. A write whose answer was lost is tried again and finds an object:
    its mark then tells that it is its own.
    """
    stamp = f"{uuid.uuid4().hex} {owner}".strip()
    try:
        return _upload(path, io.BytesIO(data), stamp, generation)
    except api_errors.PreconditionFailed as error:
        found = _current(path)
        if found is None or _stamp(found) != stamp:
            raise Changed(path) from error
        return found


def _stamp(blob: Blob) -> str:
    return str((blob.metadata or {}).get(_STAMP, ""))


def write_if_unchanged(path: str, data: bytes, expected: bytes | None) -> None:
    blob = _current(path)
    generation = blob.generation if blob else 0
    try:
        with translating_errors(path):
            found = None if blob is None else _read(blob)
    except FileNotFoundError as error:  # another generation meanwhile
        raise Changed(path) from error
    if found != expected:
        raise Changed(path)
    _put(path, data, generation)


def link(source: str, target: str) -> None:
    """A copy, made by the store."""
    copy, token = _blob(target), None
    with translating_errors(source):
        while True:
            token, _, _ = copy.rewrite(_blob(source), token=token, **retry_options())
            if token is None:
                return


def move(source: str, target: str) -> None:
    link(source, target)
    delete(source)


def delete(path: str) -> None:
    with contextlib.suppress(FileNotFoundError), translating_errors(path):
        _blob(path).delete(**retry_options())


def delete_tree(folder: str) -> None:
    """Marks first: while others go, none of them may say that what they stand for is whole.

    One call for each object, many at once. The store's batches would leave to us which of their
    hundred parts to try again.
    """
    paths = [_path(blob) for blob in _list(os.path.join(folder, ""))[0]]
    marks = [path for path in paths if path.endswith(".json") or os.path.basename(path)[0] == "_"]
    _delete_all(marks)
    _delete_all(set(paths) - set(marks))


def _delete_all(paths: Iterable[str]) -> None:
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        for _ in pool.map(delete, paths):
            pass


# ---- Locks -----------------------------------------------------------------------------------


@contextlib.contextmanager
def lock(folder: str, wait: bool = False) -> Iterator[None]:
    """Renewed by a thread of its own until the block ends.

    A holder that could not renew it in time, since it was asleep or cut off, is not stopped when
    another takes over: it warns, and what it publishes is still written with preconditions.
    """
    lease = _Lease(os.path.join(folder, _LOCK))
    pause = files.FIRST_WAIT_SECONDS
    while not lease.take():
        if not wait:
            raise BlockingIOError(errno.EWOULDBLOCK, "held by another process", folder)
        time.sleep(random.uniform(0.0, pause))
        pause = min(2 * pause, 10.0)
    ended = threading.Event()
    renewing = threading.Thread(target=lease.keep, args=(ended,), daemon=True)
    renewing.start()
    try:
        yield
    finally:
        ended.set()
        renewing.join()
        lease.release()


class _Lease:
    """An object that belongs to who wrote its present generation."""

    def __init__(self, path: str):
        self._path, self._process = path, os.getpid()
        self._generation = 0

    def take(self) -> bool:
        """Whether nobody held it, or who held it is gone."""
        found = _current(self._path)
        if found is not None and not _is_abandoned(found):
            return False
        try:
            self._write(found.generation if found else 0)
        except Changed:
            return False
        return True

    def _write(self, generation: int) -> None:
        owner = f"{self._process} {_machine()}"
        text = f"held by process {self._process} of {socket.gethostname()}\n"
        self._generation = _put(self._path, text.encode(), generation, owner).generation

    def keep(self, ended: threading.Event) -> None:
        while not ended.wait(LOCK_RENEW_SECONDS):
            try:
                self._write(self._generation)
            except Changed:
                _LOG.warning("Another process took over %s, which had not been renewed", self._path)
                return
            except Exception as error:  # noqa: BLE001 - it may still be renewed in time
                _LOG.warning("%s could not be renewed: %s", self._path, error)

    def release(self) -> None:
        if os.getpid() != self._process:
            return  # a fork of the holder
        gone = (api_errors.PreconditionFailed, FileNotFoundError)
        with contextlib.suppress(*gone), translating_errors(self._path):
            _blob(self._path).delete(if_generation_match=self._generation, **retry_options())


def _is_abandoned(lease: Blob) -> bool:
    """Whether its holder has ended, as far as this machine knows, or has long not renewed it."""
    process, _, machine = _stamp(lease).partition(" ")[2].partition(" ")
    if machine == _machine() and not _is_alive(int(process)):
        return True
    # By the store's own clock: that of another machine may go wrong.
    clock = _upload(f"{_path(lease)}-{uuid.uuid4().hex[:12]}", io.BytesIO(b"now\n"))
    delete(_path(clock))
    return (clock.updated - lease.updated).total_seconds() > LOCK_FREE_SECONDS


def _is_alive(process: int) -> bool:
    try:
        with contextlib.suppress(PermissionError):  # that of another user
            os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@functools.cache
def _machine() -> str:
    """Alike where the number of a process means the same process; else a name of our own."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            booted = file.read().strip()
        return f"{socket.gethostname()} {booted} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return uuid.uuid4().hex
