"""Is a shared folder whose workers are shown old names now and then, as a network's caches do."""

import errno
from collections import Counter
from typing import Any

import pytest

from feature_jobs.store import partitions
from feature_jobs.store.local import LocalStore


def hide_receipts_now_and_then(patch: pytest.MonkeyPatch) -> None:
    """Hides each receipt from every other look of a worker; the launcher, who asks first, sees all.

    So of two steps that look for the same part one finds it, and the other does not.
    """
    looks: Counter[str] = Counter()
    launcher: list[bool] = []

    def shown(name: str) -> Any:
        real = getattr(LocalStore, name)

        def look(self: LocalStore, path: str, *args: Any) -> Any:
            if "/receipts/" in path and not launcher:
                looks[path] += 1
                if looks[path] % 2 == 0:
                    raise FileNotFoundError(errno.ENOENT, "no such file as far as is known", path)
            return real(self, path, *args)

        return look

    def finished(*args: Any) -> frozenset[int]:
        launcher.append(True)
        try:
            return real_finished(*args)
        finally:
            launcher.pop()

    real_finished = partitions.finished
    patch.setattr(partitions, "finished", finished)
    for name in ("stat", "read_bytes"):
        patch.setattr(LocalStore, name, shown(name))
