"""How far a stage or a training run is, told while it goes on.

A job blocks until it ends, so what is shown of a stage comes from the heartbeat files and receipts
that the workers leave below the staging folder: the same on one machine and on a hundred.
"""

import contextlib
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from feature_jobs import storage, tables
from pipelines.runs import Stage

if TYPE_CHECKING:
    from courier_model.train_progress import Progress  # which nights do not need

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
    rate = done / seconds if seconds else 0.0
    left = f", {(total - done) / rate:,.0f} s left" if done else ""
    rejects = f", {counts['rejects']:,} rejects" if counts["rejects"] else ""
    return f"{name} {_bar(done, total)} {done:,}/{total:,}, {rate:,.1f}/s{left}{rejects}"


def _bar(done: int, total: int) -> str:
    filled = _BAR * done // total if total else 0
    return "[" + "#" * filled + "." * (_BAR - filled) + "]"


class StepBar:
    """The steps of a training run: a bar on a terminal's stderr, a line now and then elsewhere.

    `say` None keeps it silent.
    """

    def __init__(self, say: Callable[[str], None] | None) -> None:
        self._say = say
        self._live = sys.stderr.isatty()
        self._shown = time.monotonic()

    def say(self, message: str) -> None:
        """A line of its own, in place of the bar that stands there."""
        if self._say:
            self._say("\r\033[K" + message if self._live else message)

    def show(self, at: "Progress") -> None:
        pause = _TERMINAL_SECONDS if self._live else _LOG_SECONDS
        ended = at.step == at.steps
        if not self._say or (time.monotonic() - self._shown < pause and not ended):
            return
        self._shown = time.monotonic()
        text = (
            f"train {_bar(at.step, at.steps)} step {at.step:,}/{at.steps:,}, loss {at.loss:.4f}, "
            f"{at.images_per_second:,.0f} images/s, {at.seconds_left:,.0f} s left"
        )
        if self._live and not ended:
            sys.stderr.write(f"\r\033[K{text}")
            sys.stderr.flush()
        else:
            self.say(text)
