"""Carries notes between launcher and workers, by files below the staging folder.

The launcher tells what share of a host a process has, how large its row groups are and in which
versions it runs; workers tell errors, warnings, counts and what they used, and each other what is
finished.
"""

import functools
import hashlib
import os
import re
import socket
import tempfile
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from feature_jobs.schemas import CourierError, StorageUnavailable
from feature_jobs.store import faults, files, partitions, threads, usage, versions
from feature_jobs.store.documents import digest, parse_json, read_json, write_json

_READERS = 16
# As Python prints one, and Beam goes on.
_IN_TRACEBACK = rf"^{re.escape(CourierError.__module__)}\.(\w+): (.+?)(?: \[while running .*\])?$"


def refusing(process: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Iterator[Any]]:
    """Makes the `process` of a DoFn leave a CourierError where the launcher finds it.

    The DoFn has its staging folder as `staging`. Once anything there was refused, the job runs to
    its end without doing more, and the launcher raises the error word for word. Raised in a worker
    it would be tried again, and reach the operator as a traceback within a traceback. So is a disk
    told that is full, the worker's own included. The process keeps to what `tell` told it, and
    leaves what it used where that is in another process.
    """

    @functools.wraps(process)
    def guarded(self: Any, element: Any) -> Iterator[Any]:
        is_asked = _keep_to_told(self.staging)
        errors = os.path.join(self.staging, "errors")
        if files.list_names(errors):
            return
        try:
            with faults.telling_full(tempfile.gettempdir()):
                yield from process(self, element) or ()
            if is_asked:
                _note_usage(self.staging)
        except CourierError as error:
            _refuse(self.staging, error)

    return guarded


def tell(staging: str, share: threads.Share, row_group_bytes: int) -> None:
    """Tells the workers of the job below `staging` what each process is to keep to.

    That is how many threads it may use, and how many bytes a row group has at most. Those in other
    processes than this one, the launcher's, are to have its versions, and tell what they use
    (`usage`).
    """
    told = {"share": asdict(share), "row_group_bytes": row_group_bytes}
    write_json(_told_path(staging), told | {"versions": versions.of_process()})
    _launched.add(staging)
    _kept_to.clear()  # the local engine's workers are in this process


_launched: set[str] = set()  # the staging folders of this process's own jobs
_begun_here: set[str] = set()  # those of which it had elements
_sent_away: set[str] = set()  # those of which a cluster has the elements
_kept_to: set[str] = set()  # those of any process that told this one


def _keep_to_told(staging: str) -> bool:
    """Keeps this process to what was told; returns whether another one asks what it uses.

    Until that is there, which a shared folder may show late, it is looked for at each element.
    """
    if staging not in _kept_to:
        told = check_in(staging)
        if told is None:
            return False
        threads.limit(threads.Share(**told["share"]).count())
        partitions.limit_row_groups(told["row_group_bytes"])
        _kept_to.add(staging)
    return staging not in _launched


def check_in(staging: str) -> dict[str, Any] | None:
    """Tells the launcher that this worker has begun; returns what it was told, None for nothing.

    Refuses the job's work where the launcher has other versions. Raises StorageUnavailable where
    this process may not use the job's folder.
    """
    path = _told_path(staging)
    if staging in _launched:
        _begun_here.add(staging)
        return dict(read_json(path))
    try:
        found = files.read_if_there(path)
        if found is None:
            return None
        files.write_bytes(os.path.join(staging, "begun", uuid.uuid4().hex[:12]), b"")
    except StorageUnavailable as error:
        raise StorageUnavailable(
            f"The worker on {socket.gethostname()}, which runs as the user {os.getuid()}, cannot "
            f"use the folder of its job, {staging}: {error}"
        ) from None  # a launcher that reads it off a traceback takes the first
    told = dict(parse_json(path, found))
    if refusal := versions.refusal(told.get("versions", {})):  # earlier launchers tell none
        _refuse(staging, refusal)
    return told


def _refuse(staging: str, error: CourierError) -> None:
    """Leaves an error where the launcher finds it, and other workers do."""
    found = {"kind": type(error).__name__, "message": str(error)}
    write_json(os.path.join(staging, "errors", digest(found)[:12] + ".json"), found)


def _told_path(staging: str) -> str:
    return os.path.join(staging, "told.json")


def has_begun(staging: str) -> bool:
    """Returns whether any worker of the job below `staging` has begun with an element."""
    return staging in _begun_here or _have_begun_elsewhere(staging)


def note_sent_away(staging: str) -> None:
    """Notes that the workers of the job below `staging` are a cluster's."""
    _sent_away.add(staging)


def are_elsewhere(staging: str) -> bool:
    """Returns whether workers in other processes than the launcher's have elements of the job.

    That those of a cluster have begun, a shared folder may show only after the job has ended.
    """
    return staging in _sent_away or _have_begun_elsewhere(staging)


def _have_begun_elsewhere(staging: str) -> bool:
    return bool(files.list_names(os.path.join(staging, "begun")))


def refused(staging: str) -> list[CourierError]:
    """Returns all that was refused below `staging`."""
    errors = os.path.join(staging, "errors")
    found = [read_json(os.path.join(errors, name)) for name in files.list_names(errors)]
    return [_courier_error(error["kind"], error["message"]) for error in found]


def _courier_error(kind: str, message: str) -> CourierError:
    kinds = {kind.__name__: kind for kind in CourierError.__subclasses__()}
    return kinds.get(kind, CourierError)(message)


def courier_error_in(error: BaseException) -> CourierError | None:
    """Returns the first CourierError of those that led to `error`.

    Beam adds words of its own to the later ones, and of other processes it gives the traceback as
    text.
    """
    told = re.search(_IN_TRACEBACK, str(error), re.MULTILINE)
    found = _courier_error(*told.groups()) if told else None
    at: BaseException | None = error
    while at is not None:
        if isinstance(at, CourierError):
            found = _courier_error(type(at).__name__, str(at))
        at = at.__cause__ or at.__context__
    return found


def warn(staging: str, message: str) -> None:
    """Leaves a warning where the launcher finds it; the same one of many workers counts once."""
    name = hashlib.sha256(message.encode()).hexdigest()[:12]
    write_json(os.path.join(staging, "warnings", name + ".json"), {"message": message})


def warnings(staging: str) -> list[str]:
    """Returns what workers warned of below `staging`."""
    folder = os.path.join(staging, "warnings")
    return [read_json(os.path.join(folder, n))["message"] for n in files.list_names(folder)]


def finished(staging: str, name: str) -> Any | None:
    """Returns what was noted as finished under `name` in this job; None where nothing was.

    Runners try elements again where a worker was lost, those that it had finished too.
    """
    path = os.path.join(staging, "finished", name + ".json")
    found = files.read_if_there(path)
    return None if found is None else parse_json(path, found)


def note_finished(staging: str, name: str, value: Any) -> None:
    """Notes what came of an element, for another attempt at the same one."""
    write_json(os.path.join(staging, "finished", name + ".json"), value)


class Heartbeat:
    """Keeps the counts of a worker thread in a file that the launcher adds up with all others.

    They are kept by element, which may be tried twice, by two workers at once, too: it counts once
    (`counted`). Only the newest elements are kept apart, and all before them as one. Written every
    two seconds at most, so that a fast worker does not spend its time on telling.
    """

    _SECONDS = 2.0
    _APART = 100

    def __init__(self, staging: str):
        self._folder = os.path.join(staging, "progress")
        self._name: str | None = None  # known to the worker alone: workers begin as copies
        self._counts: dict[str, dict[str, float]] = {}
        self._earlier: dict[str, float] = {}
        self._written = 0.0

    def begin(self, element: str) -> None:
        """Lets what is added from now on count for this element, perhaps once more."""
        self._counts.pop(element, None)
        if len(self._counts) == self._APART:
            _add(self._earlier, self._counts.pop(next(iter(self._counts))))
        self._now = self._counts[element] = {}

    def add(self, **counts: float) -> None:
        _add(self._now, counts)
        if time.monotonic() - self._written > self._SECONDS:
            self.write()

    def write(self) -> None:
        self._name = self._name or uuid.uuid4().hex[:12] + ".json"
        told = {**self._counts, f"before them, {self._name}": self._earlier}
        write_json(os.path.join(self._folder, self._name), told)
        self._written = time.monotonic()


def _add(total: dict[str, float], counts: Mapping[str, float]) -> None:
    for name, count in counts.items():
        total[name] = total.get(name, 0) + count


def counted(staging: str) -> Counter[str]:
    """Returns the sums of what heartbeats below `staging` count; of two tries, the larger count."""
    folder = os.path.join(staging, "progress")
    by_element: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for name in files.list_names(folder):
        for element, counts in read_json(os.path.join(folder, name)).items():
            by_element[element] |= Counter(counts)
    return sum(by_element.values(), Counter())


class _UsageNote:
    """Keeps what this process used for a job in a file that the launcher adds up with all others.

    A hundredth of the time is spent on that: what is used after the last note is not told.
    """

    def __init__(self, staging: str):
        self._path = os.path.join(staging, "usage", uuid.uuid4().hex[:12] + ".json")
        self._used = usage.Usage()
        self._next = 0.0  # when it is written again, by the monotonic clock

    def write(self) -> None:
        begun = time.monotonic()
        if begun < self._next:
            return
        self._used = usage.together([self._used, usage.take()])
        write_json(self._path, asdict(self._used))
        ended = time.monotonic()
        self._next = ended + 100 * (ended - begun)


_usage_notes: dict[str, _UsageNote] = {}  # by the job's staging folder
_noting_usage = threading.Lock()


def _note_usage(staging: str) -> None:
    """Leaves what this process used; another thread that does so just now speaks for both."""
    if not _noting_usage.acquire(blocking=False):
        return
    try:
        _usage_notes.setdefault(staging, _UsageNote(staging)).write()
    finally:
        _noting_usage.release()


def used_by_workers(staging: str) -> usage.Usage:
    """Returns what other processes than the launcher's told that they used for its job."""
    folder = os.path.join(staging, "usage")
    paths = [os.path.join(folder, name) for name in files.list_names(folder)]
    with ThreadPoolExecutor(_READERS) as pool:  # a worker may have many processes, far away
        found = list(pool.map(read_json, paths))
    return usage.together(usage.Usage(**told) for told in found)
