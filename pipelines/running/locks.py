"""Keeps two runs from making and publishing the same tables of the same days at once.

A lock saves work that would be done twice, and spares the two to fence each other off. It is not
what keeps readers safe: a holder may lose a lease without noticing, and publishing bears that.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from feature_jobs.schemas import CourierError
from feature_jobs.store import files
from feature_jobs.store.files import Held

_LATER = ", or within five minutes where that was killed on another machine"


@dataclass(frozen=True)
class Locks:
    """Holds the locks of one run; none of them where nothing can take them away."""

    held: tuple[Held, ...] = ()

    def check(self) -> None:
        """Raises CourierError where a lock may have been lost: nothing more may be written."""
        for lock in self.held:
            lock.check()


@contextlib.contextmanager
def holding(folders: Sequence[str], say: Callable[[str], None]) -> Iterator[Locks]:
    """Holds all of `folders`, taken in this order, until the block ends.

    Those below `shared` belong to other feature sets too, and are waited for. Raises CourierError
    at once where another run of this feature set is at the same tables.
    """
    with contextlib.ExitStack() as stack:
        yield Locks(tuple(stack.enter_context(_hold(folder, say)) for folder in folders))


@contextlib.contextmanager
def _hold(folder: str, say: Callable[[str], None]) -> Iterator[Held]:
    is_shared = "/shared/_locks/" in folder
    with contextlib.ExitStack() as stack:
        try:
            held = stack.enter_context(files.lock(folder))
        except BlockingIOError as error:
            if not is_shared:
                raise _busy(folder) from error
            say(f"another run is at the tables of {folder}: waiting until it has ended")
            held = stack.enter_context(files.lock(folder, wait=True))
        yield held


def _busy(folder: str) -> CourierError:
    return CourierError(
        f"Another run is writing the same tables of the same day (it holds {folder}). Two at once "
        "would do the same work twice and publish over each other. Wait for it, or stop it: its "
        f"lock is freed when its process ends{_LATER if files.is_remote(folder) else ''}."
    )
