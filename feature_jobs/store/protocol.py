"""Says what COURIER asks of a store, a disk or a bucket, and what it is promised.

A class that keeps these promises is a store; `files` chooses the one of a path. `local` and `gcs`
are those there are.

Every write is atomic: a reader sees the old file, the new file or none, never half of one. A
process killed while writing leaves at most a file whose name starts with `.tmp-`, which no reader
looks at. Durability is that of the file system: after a power cut the newest files may be gone.

Every method tells faults from answers as `faults` says: what is not there raises FileNotFoundError
(or is an empty answer, where a method says so), all else is waited for and then raises
StorageUnavailable.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import IO, Any, Protocol


@dataclass(frozen=True)
class FileInfo:
    """Holds what can be known of a file without reading it.

    `mtime_us` is µs since 1970; None in a bucket, which knows instead when each generation was
    created, `created_us`.
    """

    path: str
    size: int
    mtime_us: int | None
    generation: int | None = None
    created_us: int | None = None

    @property
    def version(self) -> tuple[int | None, ...]:
        """Returns what changes whenever the bytes may have changed."""
        return (self.size, self.mtime_us, self.generation)

    @property
    def written_us(self) -> int | None:
        """Returns when the bytes were written, µs since 1970; None where no store tells."""
        return self.created_us if self.mtime_us is None else self.mtime_us


def is_hidden(path: str) -> bool:
    """Returns whether a name on the way marks what is no data."""
    return any(name.startswith((".", "_")) for name in path.split("/"))


class Held(Protocol):
    """Stands for a lock that is held."""

    def check(self) -> None:
        """Raises CourierError where it can no longer be relied on that the lock is held."""


class Store(Protocol):
    """Keeps files of one kind of place, by full paths; a folder is what paths have in common."""

    # -- Looking --

    def stat(self, path: str) -> FileInfo:
        """Returns what is known of a file; raises FileNotFoundError where there is none."""

    def is_folder(self, path: str) -> bool:
        """Returns whether `path` is a folder."""

    def glob(self, pattern: str) -> list[FileInfo]:
        """Returns the files that match `pattern`, sorted by path, but for what is no data.

        `**` stands for any number of folders. A name on the way from the first wildcard on that
        begins with `.` or `_` marks what is no data.
        """

    def find(self, pattern: str) -> list[str]:
        """Returns the paths that match `pattern`, sorted; a wildcard matches no leading dot."""

    def list_names(self, folder: str) -> list[str]:
        """Returns the names in `folder`, sorted; none where there is no such folder."""

    def below(self, folder: str) -> list[FileInfo]:
        """Returns all files below `folder`, and when each was written: hidden ones, too."""

    # -- Reading --

    def read_bytes(self, path: str, limit: int = -1) -> bytes:
        """Returns the bytes of a file, or the first `limit` of them."""

    def open_input(self, path: str) -> IO[bytes]:
        """Opens a file to read at any position, never a mixture of two versions.

        When it is replaced meanwhile, a disk goes on with the old bytes; a bucket raises
        FileNotFoundError.
        """

    def sha256(self, path: str) -> str:
        """Returns the digest of a file's bytes, hex."""

    def checksum(self, path: str) -> str:
        """Returns what tells a file's bytes, without reading them where the store knows it."""

    # -- Writing --

    def atomic_writer(self, path: str) -> AbstractContextManager[IO[Any]]:
        """Gives a binary file that appears as `path` when the block ends well, else not at all."""

    def write_bytes(self, path: str, data: bytes) -> None:
        """Writes a whole file, in place of what is there."""

    def write_if_unchanged(self, path: str, data: bytes, expected: bytes | None) -> None:
        """Replaces `path` only while it holds `expected` (None: while there is no file).

        Raises Changed otherwise.
        """

    def replace_seen(self, path: str, data: bytes, seen: FileInfo | None) -> None:
        """Replaces the file that was `seen` at `path` (None: while there is none).

        Raises Changed where another has taken its name since, of the same bytes too. On a disk that
        holds within `step`.
        """

    def link(self, source: str, target: str) -> None:
        """Gives a file a second name within one root: on a disk, where it can, without a copy.

        A `target` that is there is replaced. In a bucket it is written anew in any case, and so has
        a new generation. Raises FileNotFoundError where there is no `source`.
        """

    def move(self, source: str, target: str) -> None:
        """Moves a file within one root; replaces `target`."""

    def delete(self, path: str) -> None:
        """Deletes a file; that it is gone already is no error, so that a killed call resumes."""

    def delete_seen(self, file: FileInfo) -> None:
        """Deletes the file that was seen, and not another that has taken its name since.

        On a disk that holds within `step`.
        """

    def delete_tree(self, folder: str) -> None:
        """Deletes a folder and all below it; being gone is no error.

        On a disk it is gone at once for any reader; in a bucket what says that other files are
        whole goes first.
        """

    def delete_empty(self, folder: str) -> None:
        """Deletes `folder`, and folders below it, as far as they hold nothing.

        A bucket has no folders to delete.
        """

    # -- Excluding others --

    def step(self, folder: str) -> AbstractContextManager[None]:
        """Lets what is looked at in `folder` stay so until the block, a short one, has written.

        On a disk no other process is in a step of the folder meanwhile; a thread may be in the
        same step twice. In a bucket others are not kept out: writes have preconditions there.
        """

    def lock(self, folder: str, wait: bool = False) -> AbstractContextManager[Held]:
        """Holds `folder` exclusively, for as long as work takes.

        On a disk the system frees it when the process ends, however it ends. In a bucket that of a
        killed process is free when another on the same machine asks for it, and five minutes later
        for others. Raises BlockingIOError at once where another holds it, unless `wait`.
        """
