"""Finds an image below the roots, reads and decodes it: the one way from an address to pixels.

What is wrong with the image makes a reject; what is wrong with the disk or the network is raised.
"""

import contextlib
import errno
import functools
import hashlib
import os
import posixpath
import stat
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from courier_model.images import BadImage, DecodeLimits, Preprocessing, decode
from feature_jobs.store import files, threads
from feature_jobs.store.faults import patiently, telling_forbidden

T = TypeVar("T")


@dataclass
class Image:
    """Holds one image file as read: its digest and its pixels, None where they were not wanted."""

    bytes_read: int
    sha256: str
    pixels: np.ndarray | None  # uint8 [3, S, S]
    io_seconds: float
    decode_seconds: float


@dataclass(frozen=True)
class Rejected:
    """Tells why an item has no embedding; `sha256` is that of bytes that cannot be decoded."""

    stage: str
    reason: str
    message: str
    sha256: str | None = None
    bytes_read: int = 0


# ---- Where an image lies -------------------------------------------------------------------


def locate(uri: str | None, roots: Sequence[str]) -> str:
    """Returns the path of an image: `gs://…`, or below a root, a relative one below the first.

    Raises BadImage("unsupported_uri") for anything else, network addresses included.
    """
    if uri and uri.startswith("gs://"):
        return uri
    if not uri or not roots or "://" in uri or "\0" in uri:
        raise BadImage("unsupported_uri", f"{str(uri)[:100]!r} is no path below the image roots")
    path = os.path.join(roots[0], uri)
    remote = files.is_remote(path)
    path = posixpath.normpath(path).replace(":/", "://", 1) if remote else _real_path(path)
    if not path.startswith(_resolved(tuple(roots))):
        raise BadImage("unsupported_uri", f"{uri!r} lies outside the image roots")
    return path


@functools.cache
def _resolved(roots: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the roots as beginnings of resolved paths."""
    real = (root if files.is_remote(root) else _without_links(root) for root in roots)
    return tuple(os.path.join(root, "") for root in real)


def _real_path(path: str) -> str:
    """Resolves a path as os.path.realpath, not asking the disk about every folder every time."""
    folder, name = os.path.split(path)
    if name not in ("", ".", ".."):
        path = os.path.join(_real_folder(folder), name)
        if not _is_link(path):
            return path
    return _without_links(path)


def _is_link(path: str) -> bool:
    try:
        return stat.S_ISLNK(patiently(path, functools.partial(os.lstat, path)).st_mode)
    except FileNotFoundError:
        return False


def _without_links(path: str) -> str:
    """Returns a path with all links in it resolved, also of what is not there.

    os.path.realpath takes any fault of the disk for "no link": below a root that is one, all images
    would then seem to lie outside, for as long as it is remembered.
    """
    try:
        return patiently(path, functools.partial(os.path.realpath, path, strict=True))
    except FileNotFoundError:
        return os.path.realpath(path)


# Kept for the life of the process: that a folder becomes a link meanwhile is not noticed.
_real_folder = functools.lru_cache(maxsize=1 << 16)(_without_links)


# ---- What is there --------------------------------------------------------------------------


def find_image(uri: str | None, roots: Sequence[str]) -> files.FileInfo | Rejected:
    """Tells the version of an image without reading it, or why it cannot be read.

    Faults other than a missing or forbidden file are raised: they are no property of the image,
    and would reject a good one. So is a bucket of the roots that is missing, as OperatorError.
    """
    return _or_rejected(uri, roots, _stat)


def _stat(path: str) -> files.FileInfo:
    file = files.stat(path)
    if not file.size:
        raise BadImage("empty", "the file has 0 bytes")
    if file.size > DecodeLimits().max_bytes:
        raise BadImage("too_many_bytes", f"the file has {file.size:,} bytes")
    return file


def read_image(
    uri: str | None,
    roots: Sequence[str],
    preprocessing: Preprocessing,
    skip_decoding: Callable[[str], bool] = lambda sha256: False,
) -> Image | Rejected:
    """Reads and decodes one image; `skip_decoding` is asked once, with the digest of its bytes.

    Faults other than a missing or forbidden file are raised, as by `find_image`.
    """
    started = time.perf_counter()
    data = _or_rejected(uri, roots, _read)
    if isinstance(data, Rejected):
        return data
    read = time.perf_counter()
    sha256 = hashlib.sha256(data).hexdigest()
    try:
        with _decoding(threads.budget()):
            pixels = None if skip_decoding(sha256) else decode(data, preprocessing)
    except BadImage as error:
        return Rejected("decode", error.reason, str(error), sha256, len(data))
    return Image(len(data), sha256, pixels, read - started, time.perf_counter() - read)


@functools.cache
def _decoding(most: int) -> threading.Semaphore:
    """Returns what lets `most` threads of this process decode at once.

    A picture within the limits can take half a gigabyte while it is decoded. More at once than may
    compute would not be faster, however many threads wait for files.
    """
    return threading.BoundedSemaphore(most)


def _read(path: str) -> bytes:
    if not files.is_remote(path):
        _stat(path)  # here it costs nothing, and a pipe would be waited for without end
    # One byte more than allowed, by which `decode` sees that there are too many.
    return files.read_bytes(path, DecodeLimits().max_bytes + 1)


def _or_rejected(uri: str | None, roots: Sequence[str], look: Callable[[str], T]) -> T | Rejected:
    try:
        with telling_forbidden():
            path = locate(uri, roots)
            try:
                return look(path)
            except FileNotFoundError:
                _refuse_missing_bucket(path, roots)
                raise
    except BadImage as error:
        return Rejected("read", error.reason, str(error))
    except (FileNotFoundError, IsADirectoryError):
        return Rejected("read", "missing", f"no file {uri!r} below the image roots")
    except PermissionError:
        return Rejected("read", "forbidden", f"{uri!r} may not be read")
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
            return Rejected("read", "unsupported_uri", f"{str(uri)[:100]!r}: {error.strerror}")
        raise


def _refuse_missing_bucket(path: str, roots: Sequence[str]) -> None:
    """Raises OperatorError where there is no bucket of `path` and a root lies in it.

    To a store both are 404. A bucket that an address alone names is a property of that address.
    """
    bucket = "/".join(path.split("/")[:3])
    if files.is_remote(path) and any(f"{root}/".startswith(f"{bucket}/") for root in roots):
        _check_bucket(bucket)


@functools.cache  # of buckets that are there
def _check_bucket(bucket: str) -> None:
    with contextlib.suppress(PermissionError):  # who may read images need not be allowed to list
        files.is_folder(f"{bucket}/.is-there")  # a listing that is short, unlike that of a root
