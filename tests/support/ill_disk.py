"""Stands between the local store and the system, and sees each call before it is made."""

import builtins
import os
import shutil
from collections.abc import Callable
from typing import Any

import pytest

from feature_jobs.store import local

_OF_OS = ("stat", "listdir", "makedirs", "open", "replace", "link", "unlink", "rmdir")


class _Seen:
    """Stands for a module of which some functions are watched."""

    def __init__(self, module: Any, watched: dict[str, Callable]):
        self._module, self._watched = module, watched

    def __getattr__(self, name: str) -> Any:
        return self._watched.get(name) or getattr(self._module, name)


def watch_disk(patch: pytest.MonkeyPatch, before: Callable[[str, str], None]) -> None:
    """Makes `before(what, path)` be called, and perhaps raise, ahead of each call of the system."""

    def seen(what: str, real: Callable) -> Callable:
        def call(path: Any, *args: Any, **kwargs: Any) -> Any:
            before(what, str(path))
            return real(path, *args, **kwargs)

        return call

    of_os = {name: seen(name, getattr(os, name)) for name in _OF_OS}
    patch.setattr(local, "os", _Seen(os, of_os))
    patch.setattr(local, "open", seen("open file", builtins.open), raising=False)
    patch.setattr(local, "_CountedFile", seen("open file", local._CountedFile))
    patch.setattr(local, "shutil", _Seen(shutil, {"rmtree": seen("rmtree", shutil.rmtree)}))
