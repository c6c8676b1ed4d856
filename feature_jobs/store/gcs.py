"""Keeps files in Google Cloud Storage, by paths `gs://bucket/name`: a store (`protocol.Store`).

An object appears when its upload has ended, whole or not at all. There are no folders: a "folder"
is what names have in common up to a `/`, and it goes with the last object below it.

A call that meets a fault (no connection, a time-out, 408, 429, 5xx, and for a while 403) is tried
again with back-off and jitter, and raises StorageUnavailable once that took too long. A missing
object raises FileNotFoundError. A process has one client, made when it is first needed, whose
connections its threads share.

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
import math
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

from feature_jobs.schemas import CourierError
from feature_jobs.store import faults, usage
from feature_jobs.store.faults import Changed
from feature_jobs.store.gcs_client import (
    IN_FLIGHT,
    bucket_of,
    client,
    retry_options,
    translating_errors,
    translating_errors_of_bucket,
)
from feature_jobs.store.protocol import FileInfo, Held, is_hidden

LOCK_RENEW_SECONDS = 60.0
LOCK_FREE_SECONDS = 300.0  # without renewal
_RENEWED_AT_ONCE = 16
_RELEASE_SECONDS = 5.0  # so long is a store that is away asked to take a lease back
_CHUNK = 1 << 17  # read at once, at least: a seek within it costs nothing
_LARGE_CHUNK = 1 << 24  # of a file that is read or written from end to end
_LOCK = ".tmp-lock"  # readers look at no name that begins so
_STAMP = "courier-write"
_NAME_BYTES = 1024  # at most
_BUCKET = "[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]"  # the store refuses other names with HTTP 400
_LISTED = "items(name,size,generation,timeCreated),prefixes,nextPageToken"

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
    return _CountedBlob(name, client().bucket(bucket))


class _CountedBlob(Blob):
    """Is an object whose bytes are counted as they are read."""

    def download_as_bytes(self, *args: Any, **kwargs: Any) -> bytes:
        data: bytes = super().download_as_bytes(*args, **kwargs)
        usage.count(bytes_read=len(data))
        return data


def _current(path: str) -> Blob | None:
    """Returns the object as it is now, of one generation from here on; None where there is none."""
    with contextlib.suppress(FileNotFoundError), translating_errors(path):
        blob = _blob(path)
        blob.reload(projection="noAcl", **retry_options())
        return blob
    return None


def _there(path: str) -> Blob:
    """Returns the object as it is now; raises FileNotFoundError where there is none."""
    blob = _current(path)
    if blob is None:
        raise FileNotFoundError(errno.ENOENT, "no such object", path)
    return blob


def _list(path: str, delimiter: str | None = None) -> tuple[list[Blob], list[str]]:
    """Returns all objects whose paths begin with `path`; raises OperatorError for a missing bucket.

    With a delimiter, returns those alone that have none after `path`, and the beginnings of the
    others.
    """
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
    created = blob.time_created
    created_us = created and int(created.timestamp() * 1e6)
    return FileInfo(path, blob.size, None, blob.generation, created_us)


def _before_wildcards(pattern: str) -> str:
    return re.split(r"[*?[]", pattern)[0]


def _matching(pattern: str) -> list[tuple[str, Blob]]:
    """Returns the objects that match `pattern`, by path; `**` stands for any number of folders."""
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


# ---- Reading ---------------------------------------------------------------------------------


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
    """Decompresses `data`, never to more than `limit` bytes; what is no gzip stays as it is."""
    made = b""
    with contextlib.suppress(zlib.error):
        while data and (limit < 0 or len(made) < limit):  # one stream may follow another
            stream = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
            made += stream.decompress(data, max(limit - len(made), 0))
            data = stream.unused_data
        return made
    return made or data


class _Reader(BlobReader):
    """Reads one generation of an object, piece by piece where it is wanted."""

    def __init__(self, path: str, chunk: int):
        super().__init__(_there(path), chunk, **retry_options())
        self._path = path

    def read(self, size: int | None = -1) -> bytes:
        if self.tell() >= self._blob.size:
            return b""
        with translating_errors(self._path):
            data: bytes = super().read(-1 if size is None else size)
            return data


# ---- Writing ---------------------------------------------------------------------------------


def _upload(path: str, file: IO[Any], stamp: str = "", generation: int | None = None) -> Blob:
    """Uploads `file` as the object at `path`; `stamp` goes into its metadata.

    Raises PreconditionFailed unless the object has `generation`, where one is given.
    """
    with translating_errors_of_bucket(path):
        blob = _blob(path)
        blob.chunk_size = _LARGE_CHUNK  # held in memory at once
        blob.metadata = {_STAMP: stamp} if stamp else None
        size = file.seek(0, os.SEEK_END)
        blob.upload_from_file(
            file,
            rewind=True,
            size=size,
            if_generation_match=generation,
            **retry_options(),
        )
        usage.count(bytes_written=size)
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


# ---- The store -------------------------------------------------------------------------------


class GcsStore:
    """Keeps the promises of `protocol.Store` in a bucket."""

    # -- Looking --

    def stat(self, path: str) -> FileInfo:
        return _info(path, _there(path))

    def is_folder(self, path: str) -> bool:
        blobs, prefixes = _list(os.path.join(path, ""), "/")
        return bool(blobs or prefixes)

    def glob(self, pattern: str) -> list[FileInfo]:
        fixed = os.path.dirname(_before_wildcards(pattern))
        return [
            _info(path, blob)
            for path, blob in _matching(pattern)
            if not is_hidden(path.removeprefix(fixed + "/"))
        ]

    def find(self, pattern: str) -> list[str]:
        return [path for path, _ in _matching(pattern.replace("**", "*"))]

    def list_names(self, folder: str) -> list[str]:
        folder = os.path.join(folder, "")
        blobs, prefixes = _list(folder, "/")
        below = [f"gs://{bucket_of(folder)}/{prefix.rstrip('/')}" for prefix in prefixes]
        names = {path.removeprefix(folder) for path in (*map(_path, blobs), *below)}
        return sorted(name for name in names if name and not name.startswith(".tmp-"))

    def below(self, folder: str) -> list[FileInfo]:
        return [_info(_path(blob), blob) for blob in _list(os.path.join(folder, ""))[0]]

    # -- Reading --

    def read_bytes(self, path: str, limit: int = -1) -> bytes:
        with translating_errors(path):
            return _read(_blob(path), limit)

    def open_input(self, path: str) -> IO[bytes]:
        return _Reader(path, _CHUNK)

    def sha256(self, path: str) -> str:
        with _Reader(path, _LARGE_CHUNK) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def checksum(self, path: str) -> str:
        blob = _there(path)  # every object has a CRC32C, composed ones too
        return f"crc32c {blob.crc32c} of {blob.size}"

    # -- Writing --

    @contextlib.contextmanager
    def atomic_writer(self, path: str) -> Iterator[IO[Any]]:
        with tempfile.SpooledTemporaryFile(_LARGE_CHUNK) as file:
            with faults.telling_full(tempfile.gettempdir()):
                yield file
            _upload(path, file)

    def write_bytes(self, path: str, data: bytes) -> None:
        _upload(path, io.BytesIO(data))

    def write_if_unchanged(self, path: str, data: bytes, expected: bytes | None) -> None:
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

    def replace_seen(self, path: str, data: bytes, seen: FileInfo | None) -> None:
        _put(path, data, (seen and seen.generation) or 0)

    def link(self, source: str, target: str) -> None:
        copy, token = _blob(target), None
        with translating_errors(source):
            while True:
                token, _, _ = copy.rewrite(_blob(source), token=token, **retry_options())
                if token is None:
                    return

    def move(self, source: str, target: str) -> None:
        self.link(source, target)
        self.delete(source)

    def delete(self, path: str) -> None:
        _delete(path)

    def delete_seen(self, file: FileInfo) -> None:
        with contextlib.suppress(api_errors.PreconditionFailed):
            _delete(file.path, file.generation)

    def delete_tree(self, folder: str) -> None:
        """Deletes marks first: while others go, none may say that what it stands for is whole.

        One call for each object, many at once. The store's batches would leave to us which of
        their hundred parts to try again.
        """
        paths = [_path(blob) for blob in _list(os.path.join(folder, ""))[0]]
        marks = [
            path for path in paths if path.endswith(".json") or os.path.basename(path)[0] == "_"
        ]
        _delete_all(marks)
        _delete_all(set(paths) - set(marks))

    def delete_empty(self, folder: str) -> None:
        pass

    # -- Excluding others --

    @contextlib.contextmanager
    def step(self, folder: str) -> Iterator[None]:
        yield

    @contextlib.contextmanager
    def lock(self, folder: str, wait: bool = False) -> Iterator[Held]:
        lease = _Lease(folder)
        pause = faults.FIRST_WAIT_SECONDS
        while not lease.take():
            if not wait:
                raise BlockingIOError(errno.EWOULDBLOCK, "held by another process", folder)
            time.sleep(random.uniform(0.0, pause))
            pause = min(2 * pause, 10.0)
        _RENEWAL.add(lease)
        try:
            yield lease
        finally:
            _RENEWAL.remove(lease)
            lease.release()


def _delete(path: str, generation: int | None = None) -> None:
    with contextlib.suppress(FileNotFoundError), translating_errors(path):
        _blob(path).delete(if_generation_match=generation, **retry_options())


def _delete_all(paths: Iterable[str]) -> None:
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        for _ in pool.map(_delete, paths):
            pass


# ---- Locks -----------------------------------------------------------------------------------


class _Lease:
    """A lease is an object that belongs to who wrote its present generation: a lock (`Held`)."""

    def __init__(self, folder: str):
        self._folder, self._process = folder, os.getpid()
        self._path = os.path.join(folder, _LOCK)
        self._generation = 0
        self._written = -math.inf  # when it was last begun to be written, by `_now`
        self._busy, self._ended = threading.Lock(), False

    def take(self) -> bool:
        """Takes the lease if nobody holds it or its holder is gone; returns whether it is held."""
        found = _current(self._path)
        if found is not None and not _is_abandoned(found):
            return False
        try:
            self._write(found.generation if found else 0)
        except Changed:
            return False
        return True

    def _write(self, generation: int) -> None:
        begun, owner = _now(), f"{self._process} {_machine()}"
        text = f"held by process {self._process} of {socket.gethostname()}\n"
        self._generation = _put(self._path, text.encode(), generation, owner).generation
        self._written = begun

    def check(self) -> None:
        """Raises CourierError unless it is sure that nobody may have taken the lease over."""
        if _now() - self._written > LOCK_FREE_SECONDS - LOCK_RENEW_SECONDS:
            raise faults.lost(self._folder)

    def renew(self) -> None:
        """Writes the lease anew, unless it was given back; what fails is warned of."""
        with self._busy:
            if self._ended:
                return
            try:
                self._write(self._generation)
            except Changed:
                _LOG.warning("Another process took over %s, which had not been renewed", self._path)
                self._written, self._ended = -math.inf, True
            except Exception as error:  # noqa: BLE001 - it may still be renewed in time
                _LOG.warning("%s could not be renewed: %s", self._path, error)

    def release(self) -> None:
        """Gives the lease back; a store that is away frees it later, and hides no other error."""
        with self._busy:
            self._ended = True
        if os.getpid() != self._process:
            return  # a fork of the holder
        gone = (api_errors.PreconditionFailed, FileNotFoundError)
        patience = retry_options(min(_RELEASE_SECONDS, faults.RETRY_SECONDS))
        try:
            with contextlib.suppress(*gone), translating_errors(self._path):
                _blob(self._path).delete(if_generation_match=self._generation, **patience)
        except CourierError as error:
            _LOG.warning("%s is not given back, and is free in a while: %s", self._path, error)


class _Renewal:
    """Renews all leases of a process, by one thread, which ends when none is left."""

    def __init__(self) -> None:
        self._leases: list[_Lease] = []
        self._changing = threading.Condition()
        self._thread: threading.Thread | None = None

    def add(self, lease: _Lease) -> None:
        """Renews a lease from now on."""
        with self._changing:
            self._leases.append(lease)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._renew_all, name="lease-renewal", daemon=True
                )
                self._thread.start()

    def remove(self, lease: _Lease) -> None:
        """Renews a lease no more."""
        with self._changing:
            if lease in self._leases:  # a fork of the holder has none
                self._leases.remove(lease)
            self._changing.notify_all()

    def _renew_all(self) -> None:
        while True:
            with self._changing:
                self._changing.wait_for(lambda: not self._leases, LOCK_RENEW_SECONDS)
                leases = list(self._leases)
                if not leases:
                    self._thread = None
                    return
            with ThreadPoolExecutor(min(len(leases), _RENEWED_AT_ONCE)) as pool:
                list(pool.map(_Lease.renew, leases))  # of a long range there are many


def _forget_leases() -> None:
    """Makes a forked child renew nothing: the leases are its parent's."""
    global _RENEWAL
    _RENEWAL = _Renewal()


_RENEWAL: _Renewal
_forget_leases()
os.register_at_fork(after_in_child=_forget_leases)
# It goes on while a machine sleeps, where there is such a clock.
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def _now() -> float:
    return time.clock_gettime(_CLOCK)


def _is_abandoned(lease: Blob) -> bool:
    """Returns whether the holder of `lease` has ended or has long not renewed it.

    That a holder has ended is known where it was a process of this machine.
    """
    process, _, machine = _stamp(lease).partition(" ")[2].partition(" ")
    if machine == _machine() and not _is_alive(int(process)):
        return True
    # By the store's own clock: that of another machine may go wrong.
    clock = _upload(f"{_path(lease)}-{uuid.uuid4().hex[:12]}", io.BytesIO(b"now\n"))
    _delete(_path(clock))
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
    """Returns a name that is the same where the number of a process means the same process.

    Where the system does not tell, it is a name of our own.
    """
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            booted = file.read().strip()
        return f"{socket.gethostname()} {booted} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return uuid.uuid4().hex
