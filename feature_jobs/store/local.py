"""Keeps files on the local disk, or on one that is mounted: a store (`protocol.Store`)."""

import contextlib
import errno
import fcntl
import fnmatch
import hashlib
import io
import os
import re
import shutil
import stat as file_mode
import threading
import uuid
from collections.abc import Iterator, Sequence
from typing import IO, Any

import pyarrow as pa

from feature_jobs.store import usage
from feature_jobs.store.faults import NOT_THERE, Changed, gave_up, is_waited_for, patient
from feature_jobs.store.protocol import FileInfo, Held, is_hidden

# What a disk without hard links says.
_NO_LINKS = {errno.EPERM, errno.EXDEV, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_NOT_EMPTY = {errno.ENOTEMPTY, errno.EEXIST}  # what systems say of a folder that holds something


class LocalStore:
    """Keeps the promises of `protocol.Store` on a disk."""

    def __init__(self) -> None:
        self._steps = threading.local()  # the folders whose step this thread is in

    # -- Looking --

    @patient
    def stat(self, path: str) -> FileInfo:
        found = os.stat(path)
        if not file_mode.S_ISREG(found.st_mode):
            raise FileNotFoundError(errno.ENOENT, "no regular file", path)
        return FileInfo(path, found.st_size, found.st_mtime_ns // 1000)

    @patient
    def is_folder(self, path: str) -> bool:
        try:
            return file_mode.S_ISDIR(os.stat(path).st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return False

    def glob(self, pattern: str) -> list[FileInfo]:
        fixed = os.path.dirname(re.split(r"[*?[]", pattern)[0])
        found = []
        for path in self._matching(pattern):
            if not is_hidden(os.path.relpath(path, fixed or ".")):
                with contextlib.suppress(FileNotFoundError):  # a folder, or gone meanwhile
                    found.append(self.stat(path))
        return found

    def find(self, pattern: str) -> list[str]:
        return self._matching(pattern.replace("**", "*"))

    def _matching(self, pattern: str) -> list[str]:
        """Returns sorted paths; unlike Python's `glob` this hides no fault of the disk."""
        top = "/" if pattern.startswith("/") else ""
        parts = pattern.removeprefix(top).split("/")
        return sorted(set(self._below(top, parts + ["*"] * (parts[-1] == "**"))))

    def _below(self, folder: str, parts: Sequence[str]) -> Iterator[str]:
        """Yields the paths below `folder` that match all of `parts`."""
        if not parts:
            yield folder
            return
        part, *rest = parts
        if not re.search(r"[*?[]", part):
            path = os.path.join(folder, part)
            if rest or self._is_there(path):
                yield from self._below(path, rest)
            return
        if part == "**":
            yield from self._below(folder, rest)
        for name in self._names(folder or "."):
            if name.startswith(".") and not part.startswith("."):
                continue
            path = os.path.join(folder, name)
            if part == "**":
                if self.is_folder(path):
                    yield from self._below(path, parts)
            elif fnmatch.fnmatchcase(name, part):
                yield from self._below(path, rest)

    @patient
    def _is_there(self, path: str) -> bool:
        try:
            os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    @patient
    def _names(self, folder: str) -> list[str]:
        try:
            return sorted(os.listdir(folder))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def list_names(self, folder: str) -> list[str]:
        return [name for name in self._names(folder) if not name.startswith(".tmp-")]

    def below(self, folder: str) -> list[FileInfo]:
        found = []
        for path in (os.path.join(folder, name) for name in self._names(folder)):
            try:
                found.append(self.stat(path))
            except FileNotFoundError:  # a folder, or gone meanwhile
                found += self.below(path)
        return found

    # -- Reading --

    @patient
    def read_bytes(self, path: str, limit: int = -1) -> bytes:
        with open(path, "rb") as file:
            data = file.read(limit)
        usage.count(bytes_read=len(data))
        return data

    @patient
    def open_input(self, path: str) -> IO[bytes]:
        return _InputFile(_CountedFile(path))

    @patient
    def sha256(self, path: str) -> str:
        with io.BufferedReader(_CountedFile(path)) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def checksum(self, path: str) -> str:
        return self.sha256(path)

    # -- Writing --

    @contextlib.contextmanager
    def atomic_writer(self, path: str) -> Iterator[IO[Any]]:
        folder, name = os.path.split(path)
        temporary = os.path.join(folder, f".tmp-{uuid.uuid4().hex[:12]}-{name}")
        self._make_folder(folder or ".")
        try:
            with self._create(temporary) as file:
                yield file
                size = file.seek(0, os.SEEK_END)
            self._rename(temporary, path)
            usage.count(bytes_written=size)
        except OSError as error:
            if error.filename is None and is_waited_for(error):  # of a write: what the block did
                raise gave_up(path, error) from error  # cannot be done again from here
            raise
        finally:
            with contextlib.suppress(OSError):  # no reader looks at what is left
                os.unlink(temporary)

    @patient
    def _make_folder(self, folder: str) -> None:
        os.makedirs(folder, exist_ok=True)

    @patient
    def _create(self, path: str) -> IO[bytes]:
        return open(path, "wb")

    @patient
    def _rename(self, source: str, target: str) -> None:
        os.replace(source, target)

    @patient
    def write_bytes(self, path: str, data: bytes) -> None:
        folder, name = os.path.split(path)
        temporary = os.path.join(folder, f".tmp-{uuid.uuid4().hex[:12]}-{name}")
        os.makedirs(folder or ".", exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(data)
            os.replace(temporary, path)
            usage.count(bytes_written=len(data))
        finally:
            with contextlib.suppress(OSError):  # no reader looks at what is left
                os.unlink(temporary)

    def write_if_unchanged(self, path: str, data: bytes, expected: bytes | None) -> None:
        with self.step(os.path.dirname(path) or "."):
            try:
                found = self.read_bytes(path)
            except FileNotFoundError:
                found = None
            if found != expected:
                raise Changed(path)
            self.write_bytes(path, data)

    def replace_seen(self, path: str, data: bytes, seen: FileInfo | None) -> None:
        with self.step(os.path.dirname(path) or "."):
            try:
                found = self.stat(path)
            except FileNotFoundError:
                found = None
            if (found and found.version) != (seen and seen.version):
                raise Changed(path)
            self.write_bytes(path, data)

    @patient
    def link(self, source: str, target: str) -> None:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        try:
            os.link(source, target)
        except FileExistsError:
            folder, name = os.path.split(target)
            aside = os.path.join(folder, f".tmp-{uuid.uuid4().hex[:12]}-{name}")
            self.link(source, aside)
            self.move(aside, target)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            with self.open_input(source) as data, self.atomic_writer(target) as file:
                shutil.copyfileobj(data, file)

    def move(self, source: str, target: str) -> None:
        self._make_folder(os.path.dirname(target))
        self._rename(source, target)
        self.delete(source)  # a rename between two hard links of one file leaves both

    @patient
    def delete(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)

    def delete_seen(self, file: FileInfo) -> None:
        with contextlib.suppress(FileNotFoundError):
            if self.stat(file.path).version == file.version:
                self.delete(file.path)

    def delete_tree(self, folder: str) -> None:
        top, name = os.path.split(os.path.abspath(folder))
        aside = os.path.join(top, f".tmp-{uuid.uuid4().hex[:12]}-{name}")
        with contextlib.suppress(FileNotFoundError):
            self._rename(folder, aside)
            self._remove_tree(aside)

    @patient
    def _remove_tree(self, folder: str) -> None:
        shutil.rmtree(folder)

    def delete_empty(self, folder: str) -> None:
        for path in (os.path.join(folder, name) for name in self._names(folder)):
            if self.is_folder(path):
                self.delete_empty(path)
        self._remove_if_empty(folder)

    @patient
    def _remove_if_empty(self, folder: str) -> None:
        try:
            os.rmdir(folder)
        except OSError as error:
            if error.errno not in _NOT_EMPTY | NOT_THERE:
                raise

    # -- Excluding others --

    @contextlib.contextmanager
    def step(self, folder: str) -> Iterator[None]:
        mine = self._steps.__dict__.setdefault("folders", set())
        if folder in mine:
            yield
            return
        while True:  # until the folder is the one that is locked: another may delete an empty one
            with self._locked(folder, wait=True) as handle:
                mine.add(folder)
                try:
                    if self._is_there_as(folder, handle):
                        yield
                        return
                finally:
                    mine.remove(folder)

    @contextlib.contextmanager
    def lock(self, folder: str, wait: bool = False) -> Iterator[Held]:
        with self._locked(folder, wait):
            yield _KEPT

    @contextlib.contextmanager
    def _locked(self, folder: str, wait: bool) -> Iterator[int]:
        """Gives the open folder, while it is locked."""
        handle = self._open_new_folder(folder)
        try:
            if not self._is_locked(folder, handle, wait):
                raise BlockingIOError(errno.EWOULDBLOCK, "held by another process", folder)
            yield handle
        finally:
            os.close(handle)

    def _open_new_folder(self, folder: str) -> int:
        while True:
            self._make_folder(folder)
            with contextlib.suppress(FileNotFoundError):  # another deleted it, as it was empty
                return self._open_folder(folder)

    @patient
    def _is_locked(self, folder: str, handle: int, wait: bool) -> bool:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        return True

    @patient
    def _is_there_as(self, folder: str, handle: int) -> bool:
        """Returns whether the folder is the one that was opened, and not another made since."""
        try:
            return os.path.samestat(os.fstat(handle), os.stat(folder))
        except FileNotFoundError:
            return False

    @patient
    def _open_folder(self, folder: str) -> int:
        return os.open(folder, os.O_RDONLY)


class _InputFile(io.BufferedReader):
    """Is a file that pyarrow reads into memory of its own pool.

    What Python takes for a large read comes from the system each time, page by page of zeros, which
    takes longer than to read a file that is in memory.
    """

    def read_buffer(self, size: int) -> pa.Buffer:
        """Reads at most `size` bytes; pyarrow looks for this method, and else calls `read`."""
        room = pa.allocate_buffer(size)
        return room.slice(0, self.readinto(room))


class _CountedFile(io.FileIO):
    """Is a file whose bytes are counted as they are read."""

    def readinto(self, buffer: Any, /) -> int:
        size = super().readinto(buffer)
        usage.count(bytes_read=size)
        return size

    def readall(self) -> bytes:
        data = super().readall()
        usage.count(bytes_read=len(data))
        return data


class _Kept:
    """Stands for any lock of the system, which lasts as long as its process."""

    def check(self) -> None:
        pass


_KEPT = _Kept()
