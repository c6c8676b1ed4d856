"""Decodes the pixels of a fixed list of items once, and maps them from disk from then on.

Decoding costs a hundred times as much as reading the result, and an epoch shows an item many times.
So whichever process needs an image first writes its square beside all others; the files are sparse,
so an image that nobody asks for takes no room.

The folder holds `pixels` uint8 `[items, 3, R, R]`, `keys` int64 `[items]`, `state` uint8 `[items]`,
and `identity.json`, which says for which list of addresses, roots and preprocessing.

An image is looked at once per folder: that its file changed later is not noticed. Delete the folder
to have all images read again, and also after a power cut, which may keep a state and lose pixels.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from courier_model.image_files import Image, read_image
from courier_model.images import Preprocessing
from feature_jobs.schemas import OperatorError
from feature_jobs.store import files
from feature_jobs.store.documents import digest, read_json, write_json

_UNKNOWN, _GOOD, _BAD = 0, 1, 2  # 0, since that is what a hole in a file reads as

Pixels = npt.NDArray[np.uint8]
Keys = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


class ImageCache:
    """Reads squares by item code: the place in `uris`, where null is an item without an image.

    Survives fork and pickling: every process opens the files for itself when it first reads.
    `folder` None decodes on every read. A folder that was made for another list, other roots or
    another preprocessing is begun anew. Images found bad are tried again by every new `ImageCache`,
    since a file may have been missing because a disk was not mounted.
    """

    def __init__(
        self,
        folder: str | None,
        uris: pa.ChunkedArray | pa.Array,
        roots: Sequence[str],
        preprocessing: Preprocessing,
    ) -> None:
        self._uris = uris
        self._roots = tuple(files.absolute(root) for root in roots)
        self._square = preprocessing.square()
        self._store = None if folder is None else _Store(folder, len(uris), self.side)
        if self._store is not None:
            identity = {"uris": digest(uris.to_pylist()), "roots": list(self._roots)}
            self._store.begin(identity | {"square": asdict(self._square)})

    @property
    def side(self) -> int:
        return self._square.input_size

    @property
    def bytes_needed(self) -> int:
        """Returns the bytes that the folder takes on disk once every item was asked for."""
        return len(self._uris) * (3 * self.side**2 + 9)

    def read(self, codes: Keys) -> tuple[Pixels, Keys, Flags]:
        """Reads the squares and content keys of items, and tells which of the images are good.

        `codes` int64 `[m]` -> squares uint8 `[m, 3, R, R]`, content keys int64 `[m]`, good bool
        `[m]`. Equal bytes have equal keys. An image that is missing or cannot be decoded is not
        good, its pixels and key are 0. Raises OSError for faults of the disk (a full one included),
        which are no property of an image, and OperatorError when the folder now belongs to another
        list.
        """
        if self._store is None:
            return self._decode(codes)
        state = self._store.state(codes)
        unknown = np.unique(codes[state == _UNKNOWN])
        for code in unknown:  # one at a time: a first batch may be larger than memory
            pixels, keys, good = self._decode(code[None])
            self._store.write(int(code), pixels, keys, bool(good[0]))
        return self._store.read(codes)

    def _decode(self, codes: Keys) -> tuple[Pixels, Keys, Flags]:
        pixels = np.zeros((len(codes), 3, self.side, self.side), np.uint8)
        keys, good = np.zeros(len(codes), np.int64), np.zeros(len(codes), bool)
        for place, code in enumerate(codes.tolist()):
            image = read_image(self._uris[code].as_py(), self._roots, self._square)
            if isinstance(image, Image):
                assert image.pixels is not None  # no digest was known
                pixels[place], keys[place], good[place] = image.pixels, _key(image.sha256), True
        return pixels, keys, good


def _key(sha256: str) -> int:
    return int.from_bytes(bytes.fromhex(sha256[:16]), "big", signed=True)


class _Store:
    """Keeps the files of a cache: reads them through memory maps, writes them by `pwrite`.

    They are not written through the maps: on a full disk that kills the process (SIGBUS) where
    `pwrite` raises, and system calls also keep the order in which other processes see pixels and
    state.
    """

    _FILES = ("pixels", "keys", "state")

    def __init__(self, folder: str, items: int, side: int) -> None:
        self._folder = os.path.abspath(folder)
        shapes: list[tuple[int, ...]] = [(items, 3, side, side), (items,), (items,)]
        types: list[type] = [np.uint8, np.int64, np.uint8]
        self._layout = dict(zip(self._FILES, zip(shapes, types, strict=True), strict=True))
        self._identity: dict[str, object] = {}
        self._maps: dict[str, np.memmap] = {}
        self._handles: dict[str, int] = {}

    def __getstate__(self) -> dict[str, object]:
        # A pickled map would carry a copy of all pixels, and a handle means nothing elsewhere.
        return self.__dict__ | {"_maps": {}, "_handles": {}}

    def __del__(self) -> None:
        for handle in self._handles.values():
            os.close(handle)

    def begin(self, identity: dict[str, object]) -> None:
        """Makes the files for `identity`, or keeps them where they are for it already.

        Several processes may do so at once. Raises OSError where the folder cannot be written.
        """
        self._identity = identity
        with files.lock(self._folder, wait=True):
            if self._is_ours():
                state = np.memmap(self._path("state"), np.uint8, "r+")
                state[state == _BAD] = _UNKNOWN
                return
            # The identity goes first and comes last: a folder that has one is whole.
            for name in ("identity.json", *self._FILES):
                files.delete(self._path(name))
            for name, (shape, dtype) in self._layout.items():
                with open(self._path(name), "wb") as file:
                    file.truncate(int(np.prod(shape)) * np.dtype(dtype).itemsize)
            write_json(self._path("identity.json"), identity)

    def _path(self, name: str) -> str:
        return os.path.join(self._folder, name)

    def _is_ours(self) -> bool:
        path = self._path("identity.json")
        # By digest, to which a tuple and the list that JSON makes of it are the same.
        return files.exists(path) and digest(read_json(path)) == digest(self._identity)

    def _open(self) -> None:
        if self._maps:
            return
        with files.lock(self._folder, wait=True):  # nobody begins it anew meanwhile
            if not self._is_ours():
                raise OperatorError(
                    f"The image cache {self._folder} was begun anew by another run, for other "
                    "items, roots or preprocessing, while this one still used it. Give each run "
                    "that goes on at the same time a folder of its own, and start this one again."
                )
            for name, (shape, dtype) in self._layout.items():
                self._handles[name] = os.open(self._path(name), os.O_RDWR)
                self._maps[name] = np.memmap(self._path(name), dtype, "r", shape=shape)

    def state(self, codes: Keys) -> npt.NDArray[np.uint8]:
        self._open()
        return self._maps["state"][codes]

    def read(self, codes: Keys) -> tuple[Pixels, Keys, Flags]:
        """Reads items; bad images were never written, so their pixels and keys read as 0."""
        self._open()
        pixels, keys, state = (self._maps[name][codes] for name in self._FILES)
        return pixels, keys, state == _GOOD

    def write(self, code: int, pixels: Pixels, keys: Keys, good: bool) -> None:
        """Writes one item, its state last, for all readers; processes that race write the same."""
        if good:
            self._write_at("pixels", code, pixels)
            self._write_at("keys", code, keys)
        self._write_at("state", code, np.array([_GOOD if good else _BAD], np.uint8))

    def _write_at(self, name: str, code: int, row: np.ndarray) -> None:
        data, offset = memoryview(row.tobytes()), code * row.nbytes
        while data:  # a nearly full disk may take part of it
            try:
                written = os.pwrite(self._handles[name], data, offset)
            except OSError as error:
                error.filename = self._path(name)  # which the system leaves out here
                raise
            data, offset = data[written:], offset + written
