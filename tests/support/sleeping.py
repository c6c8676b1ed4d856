"""Does something else where one module would sleep.

A module's `time` is that of all others: their threads sleep too, and would do it as well.
"""

import time
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import pytest


def instead_of_sleep(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, do: Callable[[float], object]
) -> None:
    """Makes `module`, and nobody else, call `do` with the seconds that it would sleep."""
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=time.monotonic, sleep=do))
