"""The one way from an image's address to its pixels: found below the roots, read, decoded.

What is wrong with the image makes a reject; what is wrong with the disk is raised.
"""

import errno
import functools
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from courier_model.images import BadImage, DecodeLimits, Preprocessing, decode
from feature_jobs import storage


@functools.cache
def _resolved(roots: tuple[str, ...]) -> tuple[str, ...]:
    """The roots as beginnings of resolved paths."""
    return tuple(os.path.join(os.path.realpath(root), "") for root in roots)


def locate(uri: str | None, roots: Sequence[str]) -> str:
    """The path of an image: `uri` itself, or below the first root; never outside the roots.

    Raises BadImage("unsupported_uri") for anything else, network addresses included.
    """
    if not uri or "://" in uri or "\0" in uri:
        raise BadImage("unsupported_uri", f"{str(uri)[:100]!r} is no path below the image roots")
    path = os.path.realpath(os.path.join(roots[0], uri))
    if not path.startswith(_resolved(tuple(roots))):
        raise BadImage("unsupported_uri", f"{uri!r} lies outside the image roots")
    return path


@dataclass(frozen=True)
class Image:
    """One image file as read: its version, its digest and its pixels, None for known bytes."""

    file: storage.FileInfo
    sha256: str
    pixels: np.ndarray | None  # uint8 [3, S, S]


@dataclass(frozen=True)
class Rejected:
    """Why an item has no embedding."""

    stage: str
    reason: str
    message: str


def read_image(
    uri: str | None, known_sha256: str | None, roots: Sequence[str], preprocessing: Preprocessing
) -> Image | Rejected:
    """Reads and decodes one image; one with the known digest is not decoded again.

    Faults of the disk other than a missing or forbidden file are raised: they are no property of
    the image, and would reject a good one.
    """
    stage = "read"
    try:
        path = locate(uri, roots)
        file = storage.stat(path)
        if file.size > DecodeLimits().max_bytes:
            raise BadImage("too_many_bytes", f"the file has {file.size:,} bytes")
        data = storage.read_bytes(path)
        stage = "decode"
        sha256 = hashlib.sha256(data).hexdigest()
        pixels = None if sha256 == known_sha256 else decode(data, preprocessing)
        return Image(file, sha256, pixels)
    except BadImage as error:
        return Rejected(stage, error.reason, str(error))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return Rejected(stage, "missing", f"no file {uri!r} below the image roots")
    except PermissionError:
        return Rejected(stage, "forbidden", f"{uri!r} may not be read")
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
            return Rejected(stage, "unsupported_uri", f"{str(uri)[:100]!r}: {error.strerror}")
        raise
