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
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from feature_jobs.schemas import CourierError
from feature_jobs.store import documents, files, worker_notes
from pipelines.running.stage import Stage

if TYPE_CHECKING:
    from courier_model.training.progress import Progress  # which nights do not need

_TERMINAL_SECONDS = 0.5
_LOG_SECONDS = 15.0
_BAR = 24


@contextlib.contextmanager
def watch(stages: Sequence[Stage]) -> Iterator[None]:
    """Shows a bar on a terminal's stderr, or a line now and then elsewhere, during the block, in
    which one job makes all of `stages`."""
    live = sys.stderr.isatty()
    for folder in ("progress", "warnings"):  # of an earlier run
        files.delete_tree(os.path.join(stages[0].staging, folder))
    ended = threading.Event()
    thread = threading.Thread(target=_watch, args=(stages, live, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _watch(stages: Sequence[Stage], live: bool, ended: threading.Event) -> None:
    started, told, over = time.monotonic(), set[str](), False
    while not over:
        over = ended.wait(_TERMINAL_SECONDS if live else _LOG_SECONDS)
        # What cannot be read now may be next time, and the job itself tells what ails the store.
        with contextlib.suppress(OSError, CourierError):
            _warn(stages[0], told)
            if live or not over:
                _show(stages, live, time.monotonic() - started)
    if live:
        sys.stderr.write("\n")


def _warn(stage: Stage, told: set[str]) -> None:
    """Tells what workers warn of, as soon as it is there and once."""
    for message in worker_notes.warnings(stage.staging):
        if message not in told:
            sys.stderr.write(f"WARNING: {message}\n")
            told.add(message)


def _show(stages: Sequence[Stage], live: bool, seconds: float) -> None:
    text = describe(stages[0].name, measure(stages), seconds)
    if live:
        sys.stderr.write(f"\r\033[K{text}")
    else:
        sys.stderr.write(text + "\n")
    sys.stderr.flush()


def measure(stages: Sequence[Stage]) -> Counter[str]:
    """done and total, and what else the workers tell: images where they do, else shards."""
    folder = os.path.join(stages[0].staging, "progress")
    found: Counter[str] = Counter()
    for name in files.list_names(folder):
        found.update(documents.read_json(os.path.join(folder, name)))
    if found["total"]:
        return found
    done, total = (sum(s.shards_done() for s in stages), sum(s.shards for s in stages))
    return Counter(done=done, total=total)


def describe(name: str, counts: Counter[str], seconds: float) -> str:
    """One line: a bar, done of total, the rate, the time left; of images also what became of them.

    `counts` are those of `measure`: what `embed_images` tells of each image, added up.
    """
    done, total = counts["done"], counts["total"]
    seconds = max(seconds, 1e-3)
    text = f"{name} {_bar(done, total)} {done:,}/{total:,}, {done / seconds:,.1f}/s"
    if counts["bytes"]:
        text += f", {counts['bytes'] / seconds / 1e6:,.2f} MB/s"
    if done:
        text += f", {(total - done) * seconds / done:,.0f} s left"
    for what in ("embedded", "reused"):
        text += f", {counts[what]:,} {what}" if counts[what] else ""
    return text + _rejected(counts) + _seconds(counts)


def _seconds(counts: Counter[str]) -> str:
    """What images cost so far, the threads of all workers added up."""
    kinds = ("io", "decode", "forward")
    found = [f"{k} {counts[k + '_seconds']:,.0f} s" for k in kinds if counts[k + "_seconds"]]
    return f"; {', '.join(found)}" if found else ""


def _rejected(counts: Counter[str]) -> str:
    """How many images were rejected, and for which reasons, the most frequent first."""
    reasons = Counter(
        {k.removeprefix("rejected_"): n for k, n in counts.items() if k.startswith("rejected_")}
    )
    if not reasons:
        return ""
    named = ", ".join(f"{name.replace('_', ' ')} {n:,}" for name, n in reasons.most_common())
    return f", {reasons.total():,} rejected ({named})"


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
