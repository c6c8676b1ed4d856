"""Measures what this process uses: time of its cores, memory, and what passes through its stores.

The stores count here. A launcher adds what the workers of its jobs tell (`worker_notes`).
"""

import contextlib
import os
import re
import resource
import threading
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_PROCESS = Path("/proc/self")


@dataclass(frozen=True)
class Usage:
    """Holds what processes used.

    `cpu_seconds` are those of all their threads. Bytes are those of files read and written through
    the stores, a try that failed left out; `bucket_requests` those that a bucket answered, all
    tries. `peak_memory_bytes` is the most that one process had resident.
    """

    cpu_seconds: float = 0.0
    bytes_read: int = 0
    bytes_written: int = 0
    bucket_requests: int = 0
    peak_memory_bytes: int = 0


def together(parts: Iterable[Usage]) -> Usage:
    """Returns what several used: all of it, and the largest peak of memory."""
    found = list(parts)
    return Usage(
        sum(part.cpu_seconds for part in found),
        sum(part.bytes_read for part in found),
        sum(part.bytes_written for part in found),
        sum(part.bucket_requests for part in found),
        max((part.peak_memory_bytes for part in found), default=0),
    )


def count(**amounts: int) -> None:
    """Adds to what this process used, by the names of `Usage`; from any thread."""
    with _counting:
        for name, amount in amounts.items():  # `update` takes several times as long
            _counted[name] += amount


def add(other: Usage) -> None:
    """Adds what another process used: the next `take` returns it with what is this one's own."""
    with _counting:
        _added.append(other)


def take() -> Usage:
    """Returns what this process used since this was last asked, or since it began.

    Where the system cannot forget a peak of memory (Linux can), it is that since the process began.
    """
    global _cpu_taken
    with _counting:
        cpu = time.process_time()
        own = Usage(cpu - _cpu_taken, peak_memory_bytes=_take_peak_memory(), **_counted)
        found = together([own, *_added])
        _cpu_taken = cpu
        _counted.clear()
        _added.clear()
    return found


def _take_peak_memory() -> int:
    try:
        status = (_PROCESS / "status").read_text()
    except OSError:  # no Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    with contextlib.suppress(OSError):
        (_PROCESS / "clear_refs").write_text("5")
    return 1024 * int(found[1]) if found else 0


def _begin() -> None:
    """Forgets all, as a process that begins has used nothing: a fork is no part of its parent."""
    global _counting, _counted, _added, _cpu_taken
    _counting, _counted, _added, _cpu_taken = threading.Lock(), Counter(), [], 0.0


_counting: threading.Lock
_counted: Counter[str]
_added: list[Usage]
_cpu_taken: float
_begin()
os.register_at_fork(after_in_child=_begin)
