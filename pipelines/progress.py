"""How far a stage is, told while its job runs.

A job blocks until it ends, so what is shown comes from the heartbeat files and receipts that the
workers leave below the staging folder: the same on one machine and on a hundred.
"""

import contextlib
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator

from feature_jobs import storage, tables
from pipelines.runs import Stage

_TERMINAL_SECONDS = 0.5
_LOG_SECONDS = 15.0
_BAR = 24


@contextlib.contextmanager
def watch(stage: Stage) -> Iterator[None]:
    """Shows a bar on a terminal's stderr, or a line now and then elsewhere, during the block."""
    live = sys.stderr.isatty()
    storage.delete_tree(os.path.join(stage.staging, "progress"))
    ended = threading.Event()
    thread = threading.Thread(target=_watch, args=(stage, live, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _watch(stage: Stage, live: bool, ended: threading.Event) -> None:
    started = time.monotonic()
    while not ended.wait(_TERMINAL_SECONDS if live else _LOG_SECONDS):
        _show(stage, live, time.monotonic() - started)
    if live:
        _show(stage, live, time.monotonic() - started)
        sys.stderr.write("\n")


def _show(stage: Stage, live: bool, seconds: float) -> None:
    text = describe(stage.name, measure(stage), seconds)
    if live:
        sys.stderr.write(f"\r\033[K{text}")
    else:
        sys.stderr.write(text + "\n")
    sys.stderr.flush()


def measure(stage: Stage) -> Counter[str]:
    """done, total and rejects so far: images where the workers report them, else shards."""
    folder = os.path.join(stage.staging, "progress")
    found: Counter[str] = Counter()
    for name in storage.list_names(folder):
        found.update(tables.read_json(os.path.join(folder, name)))
    return found if found["total"] else Counter(done=stage.shards_done(), total=stage.shards)


def describe(name: str, counts: Counter[str], seconds: float) -> str:
    """One line: a bar, done of total, the rate, the time left, the rejects."""
    done, total = counts["done"], counts["total"]
    filled = _BAR * done // total if total else 0
    rate = done / seconds if seconds else 0.0
    left = f", {(total - done) / rate:,.0f} s left" if done else ""
    rejects = f", {counts['rejects']:,} rejects" if counts["rejects"] else ""
    bar = "#" * filled + "." * (_BAR - filled)
    return f"{name} [{bar}] {done:,}/{total:,}, {rate:,.1f}/s{left}{rejects}"
