"""Is a shared folder that shows each host late what another has written, as a network's caches do.

A process stands for a host. What was written there in the last seconds by others is not there, in
listings and by name; and of each file of theirs that is opened the first handle is stale.
"""

import errno
import os
import time
from typing import Any

import pytest

from feature_jobs.store.local import LocalStore


def show_late(patch: pytest.MonkeyPatch, seconds: float) -> None:
    """Hides files below staging folders, but for this process's own, until they are so old."""
    mine, opened = set[str](), set[str]()

    def is_hidden(path: str) -> bool:
        if "/_staging/" not in path or path in mine or os.path.isdir(path):
            return False
        try:
            return time.time() - os.stat(path).st_mtime < seconds
        except FileNotFoundError:
            return False

    def seen(name: str) -> Any:
        real = getattr(LocalStore, name)

        def look(self: LocalStore, path: str, *args: Any) -> Any:
            if is_hidden(path):
                raise FileNotFoundError(errno.ENOENT, "no such file as far as is known", path)
            if name == "open_input" and "/_staging/" in path and path not in mine | opened:
                opened.add(path)
                raise OSError(errno.ESTALE, "stale file handle", path)
            return real(self, path, *args)

        return look

    def names(self: LocalStore, folder: str) -> list[str]:
        return [name for name in real_names(self, folder) if not is_hidden(f"{folder}/{name}")]

    def write(self: LocalStore, path: str, data: Any) -> None:
        mine.add(path)
        real_write(self, path, data)

    real_names, real_write = LocalStore._names, LocalStore.write_bytes
    for name in ("stat", "read_bytes", "open_input"):
        patch.setattr(LocalStore, name, seen(name))
    patch.setattr(LocalStore, "_names", names)
    patch.setattr(LocalStore, "write_bytes", write)
