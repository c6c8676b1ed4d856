"""Keeps two runs from making and publishing the same tables of the same days at once.

A lock saves work that would be done twice, and spares the two to fence each other off. It is not
what keeps readers safe: a holder may lose a lease without noticing, and publishing bears that.
"""

import contextlib
import datetime as dt
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from feature_jobs.schemas import CourierError
from feature_jobs.store import files
from feature_jobs.store.files import Held
from pipelines.running.layout import date_of, is_shared

_LATER = ", or within five minutes where that was killed on another machine"


class Busy(CourierError):
    """Says that another run is at the same tables of a day, `ds`."""

    def __init__(self, message: str, ds: dt.date | None) -> None:
        super().__init__(message)
        self.ds = ds


@dataclass
class Locks:
    """Holds the locks of one run, by folder; with none of them, nothing can be lost."""

    say: Callable[[str], None] = lambda _: None
    _held: dict[str, Held] = field(default_factory=dict)
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def __post_init__(self) -> None:
        self._distinct = set(self._held.values())  # one for all that a disk holds

    def take(self, folders: Sequence[str]) -> bool:
        """Takes those of `folders` that are not held yet, in this order; returns whether any was.

        Those below `shared` belong to other feature sets too, and are waited for. Raises Busy at
        once where another run of this feature set is at the same tables.
        """
        missing = [folder for folder in folders if folder not in self._held]
        for folder in missing:
            self._held[folder] = self._take(folder)
            self._distinct.add(self._held[folder])
        return bool(missing)

    def _take(self, folder: str) -> Held:
        try:
            return self._stack.enter_context(files.lock(folder))
        except BlockingIOError as error:
            if not is_shared(folder):
                raise _busy(folder) from error
        self.say(f"another run is at the tables of {folder}: waiting until it has ended")
        return self._stack.enter_context(files.lock(folder, wait=True))

    def check(self) -> None:
        """Raises CourierError where a lock may have been lost: nothing more may be written."""
        for lock in self._distinct:
            lock.check()


@contextlib.contextmanager
def holding(folders: Sequence[str], say: Callable[[str], None]) -> Iterator[Locks]:
    """Holds `folders`, and what is taken besides, until the block ends; raises as `Locks.take`."""
    with contextlib.ExitStack() as stack:
        held = Locks(say, {}, stack)
        held.take(folders)
        yield held


@contextlib.contextmanager
def holding_at_once(folders: Sequence[str]) -> Iterator[Locks]:
    """Holds `folders` until the block ends; raises BlockingIOError where another holds one."""
    with contextlib.ExitStack() as stack:
        held = {folder: stack.enter_context(files.lock(folder)) for folder in folders}
        yield Locks(_held=held)


def _busy(folder: str) -> Busy:
    return Busy(
        f"Another run is writing the same tables of the same day (it holds {folder}). Two at once "
        "would do the same work twice and publish over each other. Wait for it, or stop it: its "
        f"lock is freed when its process ends{_LATER if files.is_remote(folder) else ''}.",
        date_of(os.path.basename(folder)),
    )
