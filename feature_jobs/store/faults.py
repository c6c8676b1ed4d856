"""Tells faults of a store from answers: which are waited for, how long, and what is raised then.

"Not there" is ENOENT, ENOTDIR or 404 and nothing else, and reaches callers as FileNotFoundError.
What is wrong with a name (a folder, a loop of links, too long) is told at once. Everything else, a
full disk included, says nothing of the file that was asked for: it is waited for, and then raised
as StorageUnavailable, so that nothing is ever rejected, made again or deleted for it.
"""

import contextlib
import contextvars
import errno
import functools
import time
from collections.abc import Callable, Iterator
from typing import Concatenate, ParamSpec, TypeVar

from feature_jobs.schemas import CourierError, StorageUnavailable

RETRY_SECONDS = 120.0  # so long is a fault waited for
FORBIDDEN_SECONDS = 10.0  # what may not be read seldom mends itself, but a mount's login does
FULL_SECONDS = 10.0  # a full disk seldom has room again unless somebody makes it
FIRST_WAIT_SECONDS = 1.0  # at most, before the second try of a call; then twice as long each time

LATE_SECONDS = 60.0  # so long may a shared folder not show one host what another has written
_LOOK_AGAIN_SECONDS = 1.0

Self_ = TypeVar("Self_")
P = ParamSpec("P")
T = TypeVar("T")
OfPath = Callable[Concatenate[Self_, str, P], T]

NOT_THERE = {errno.ENOENT, errno.ENOTDIR}
FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
FULL = {errno.ENOSPC, errno.EDQUOT}
# What a name is, or what a call is asked to do, does not change by waiting.
_ANSWERS = NOT_THERE | {
    errno.EEXIST, errno.EISDIR, errno.EINVAL, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTEMPTY,
    errno.EXDEV, errno.EMLINK, errno.EBADF,
}  # fmt: skip

_forbidden_is_told: contextvars.ContextVar[bool] = contextvars.ContextVar("told", default=False)


class Changed(Exception):
    """A preconditioned write found another content than the one it was made for."""


def unavailable(path: str, found: str) -> StorageUnavailable:
    """Returns the error for a store that kept failing with `found`."""
    return StorageUnavailable(
        f"{path} could not be reached for {RETRY_SECONDS:.0f} seconds ({found}). The store or the "
        "way to it is at fault and not the data, so nothing was rejected or deleted for it. Run "
        "the same command again later: it goes on from where it was."
    )


def forbidden(path: str, found: str) -> StorageUnavailable:
    """Returns the error for a file that this account may not use, `found` the store's words."""
    return StorageUnavailable(
        f"{path} may not be read or written ({found}), and that did not change for "
        f"{FORBIDDEN_SECONDS:.0f} seconds. Whether it is there cannot be told, so nothing was "
        "rejected or deleted for it. Give this account access, or mend the mount, and run the "
        "same command again: it goes on from where it was."
    )


def full(path: str, found: str) -> StorageUnavailable:
    """Returns the error for a disk that has no room for `path`, `found` the system's words."""
    return StorageUnavailable(
        f"{path} could not be written ({found}): its disk is full, or what this account may use of "
        "it. All files that were written before are whole; but of a night that was being published "
        "some tables may be new and others old or not yet there, so that it is not whole until the "
        "next run has ended. Make room there, or give the account more, and run the same command "
        "again: it goes on from where it was."
    )


@contextlib.contextmanager
def telling_full(folder: str) -> Iterator[None]:
    """Raises StorageUnavailable where the block, which writes below `folder`, finds no room.

    For what is not written through a store; what the system says of a write names no file.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise full(error.filename or folder, str(error)) from error


def gave_up(path: str, found: BaseException | None) -> StorageUnavailable:
    """Returns the error for a call on a disk that `found` the same fault until waiting ended."""
    number = found.errno if isinstance(found, OSError) else None
    known = forbidden if number in FORBIDDEN else full if number in FULL else unavailable
    return known(path, str(found))


def lost(path: str) -> CourierError:
    """Returns the error for a lock that its holder could not renew in time."""
    return CourierError(
        f"The lock on {path} could not be renewed in time, so that another run may hold it now. "
        "This run stopped before it wrote anything more: two at once would publish over each "
        "other. Run the same command again: it goes on from where it was."
    )


@contextlib.contextmanager
def telling_forbidden() -> Iterator[None]:
    """Raises PermissionError at once, inside the block, for files that may not be read.

    One image of many that is forbidden is a property of that image; waiting for each would stop
    the night. Elsewhere a forbidden file is waited for, since nothing may be concluded from it.
    """
    token = _forbidden_is_told.set(True)
    try:
        yield
    finally:
        _forbidden_is_told.reset(token)


def forbidden_is_told() -> bool:
    """Returns whether a forbidden file is to be told at once (`telling_forbidden`)."""
    return _forbidden_is_told.get()


def is_waited_for(error: BaseException) -> bool:
    """Returns whether `error` is a fault of the store rather than an answer about a file."""
    if not isinstance(error, OSError) or error.errno is None:
        return False
    if error.errno in FORBIDDEN and _forbidden_is_told.get():
        return False
    return error.errno not in _ANSWERS


def patient(method: OfPath[Self_, P, T]) -> OfPath[Self_, P, T]:
    """Makes a method of a store, whose first argument is a path, wait as `patiently` does."""

    @functools.wraps(method)
    def tried(self: Self_, path: str, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return patiently(path, functools.partial(method, self, path, *args, **kwargs))

    return tried


def patiently(path: str, call: Callable[[], T]) -> T:
    """Returns what `call` does, made again with back-off and jitter while a disk has a fault.

    Raises FileNotFoundError for what is not there, whichever way the disk says so, and
    StorageUnavailable once waiting took too long.
    """
    try:
        try:
            return call()
        except OSError as error:
            if not is_waited_for(error):
                raise
            return _wait(path, call, error)
    except NotADirectoryError as error:
        raise FileNotFoundError(errno.ENOENT, "no such file", path) from error


def until_shown(look: Callable[[], T]) -> T:
    """Looks for what other hosts wrote until that is true of it, a minute at most; returns it.

    A network's caches may show it late.
    """
    began = time.monotonic()
    while not (found := look()) and time.monotonic() - began < LATE_SECONDS:
        time.sleep(_LOOK_AGAIN_SECONDS)
    return found


def until_seen(path: str, call: Callable[[], T]) -> T:
    """Returns what `call` does with a file that was written, once this host can see it.

    Raises FileNotFoundError where it does not within a minute (`until_shown`), StorageUnavailable
    as `patiently` does.
    """

    def look() -> list[T]:
        with contextlib.suppress(FileNotFoundError):
            return [patiently(path, call)]
        return []

    found = until_shown(look)
    return found[0] if found else patiently(path, call)


def _wait(path: str, call: Callable[[], T], found: OSError) -> T:
    """Calls again and again until there is an answer; `found` is the fault of the first time."""
    from google.api_core import exceptions, retry  # half a second, which only a fault has to pay

    patience = RETRY_SECONDS
    if found.errno in FORBIDDEN | FULL:
        patience = min(patience, FORBIDDEN_SECONDS if found.errno in FORBIDDEN else FULL_SECONDS)
    again = retry.Retry(
        is_waited_for, initial=FIRST_WAIT_SECONDS, maximum=30, multiplier=2, timeout=patience
    )
    try:
        answer: T = again(call)()
    except exceptions.RetryError as error:
        raise gave_up(path, error.cause) from error
    return answer
