"""Stops a writer before its k-th call of the store, until another writer has run to its end.

Calls are those that a store makes of the system (a disk) or over the network (a bucket), so that a
writer is stopped between any two of them. Where it is inside a step, whose lock the other waits
for, it goes on until it has left the step.
"""

import fcntl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from feature_jobs.store import files, local
from tests.support.gcs_emulator import Nearby
from tests.support.ill_disk import watch_disk

_WAIT = 60.0
CHANGING = {"replace", "link", "unlink", "rmdir", "rmtree", "POST", "PUT", "PATCH", "DELETE"}


class Calls:
    """Sees each call of the store ahead of it, and tells them apart by who is at work."""

    def __init__(self) -> None:
        self.before: Callable[[str, str], None] = lambda *_: None
        self._quiet = threading.local()

    def see(self, what: str, path: str) -> None:
        """Passes a call on, unless this thread only looks."""
        if not getattr(self._quiet, "now", False):
            self.before(what, path)

    @contextmanager
    def quietly(self) -> Iterator[None]:
        """Lets this thread call the store unseen."""
        was, self._quiet.now = getattr(self._quiet, "now", False), True
        try:
            yield
        finally:
            self._quiet.now = was


def watch_store(patch: pytest.MonkeyPatch) -> Calls:
    """Returns what sees all calls of the disk and of a near bucket from now on."""
    calls = Calls()
    watch_disk(patch, calls.see)
    send = Nearby.request

    def seen(self: Nearby, method: str, url: str, *args: Any, **kwargs: Any) -> Any:
        calls.see(method, url)
        return send(self, method, url, *args, **kwargs)

    patch.setattr(Nearby, "request", seen)
    return calls


class Schedule:
    """Stops the calling thread, the first writer, before its `stop_at`-th call, for `other`.

    `each` is called ahead of every call of either that changes something. `calls_made` counts the
    calls of the first writer.
    """

    def __init__(
        self, calls: Calls, stop_at: int, other: Callable[[], None], each: Callable[[], None]
    ):
        self._calls, self._stop_at, self._each = calls, stop_at, each
        self._me = threading.current_thread()
        self._thread = threading.Thread(target=self._run, args=(other,), daemon=True)
        self._waits = threading.Event()  # the other one does, for a lock that this one has
        self._ended = threading.Event()
        self.calls_made = 0
        self.error: BaseException | None = None  # of the other one
        self.was_stopped, self.stopped_at = False, ""

    @contextmanager
    def running(self, patch: pytest.MonkeyPatch) -> Iterator[None]:
        """Lets the first writer run inside the block."""
        patch.setattr(local, "fcntl", self._telling_flock())
        self._calls.before = self._before
        try:
            yield
        finally:
            self._calls.before = lambda *_: None
            if self.was_stopped:
                assert self._ended.wait(_WAIT)
                self._thread.join()
        if self.error:
            raise self.error

    def _run(self, other: Callable[[], None]) -> None:
        try:
            other()
        except BaseException as error:  # noqa: BLE001 - raised where the test runs
            self.error = error
        self._ended.set()

    def _before(self, what: str, path: str) -> None:
        if what in CHANGING:
            with self._calls.quietly():
                self._each()
        if threading.current_thread() is not self._me:
            return
        self.calls_made += 1
        if self.calls_made == self._stop_at:
            self.was_stopped, self.stopped_at = True, f"{what} {path}"
            self._thread.start()
        if self.was_stopped:
            self._let_the_other_run()

    def _let_the_other_run(self) -> None:
        in_step = bool(files._LOCAL._steps.__dict__.get("folders"))
        deadline = time.monotonic() + _WAIT
        while not self._ended.wait(0.0005 if in_step else _WAIT):
            if in_step and self._waits.is_set():
                return
            assert time.monotonic() < deadline

    def _telling_flock(self) -> Any:
        """Makes whoever has to wait for a lock say so first."""

        def flock(handle: int, operation: int) -> None:
            try:
                fcntl.flock(handle, operation | fcntl.LOCK_NB)
            except BlockingIOError:
                if operation & fcntl.LOCK_NB:
                    raise
                self._waits.set()
                fcntl.flock(handle, operation)
                self._waits.clear()

        return SimpleNamespace(flock=flock, LOCK_EX=fcntl.LOCK_EX, LOCK_NB=fcntl.LOCK_NB)
