"""Tells how far a stage or a training run is, while it goes on.

A job blocks until it ends, so what is shown of a stage comes from the heartbeat files and receipts
that the workers leave below the staging folder: the same on one machine and on a hundred. What a
cluster says of the job besides is asked of it.
"""

import contextlib
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from tqdm import tqdm

from feature_jobs.schemas import CourierError
from feature_jobs.store import worker_notes
from pipelines.running.stage import Stage
from pipelines.running.states import shards_done

if TYPE_CHECKING:
    from courier_model.training.progress import Progress  # which nights do not need
    from pipelines.running.cluster_jobs import Job

_TERMINAL_SECONDS = 0.5
_LOG_SECONDS = 15.0
# Rate and time left come with the facts: tqdm's own would count the steps of an earlier session.
_ON_TERMINALS = "{l_bar}{bar:10}| {n:,}/{total:,}{postfix}"
_ELSEWHERE = "{desc} [{bar:24}] {unit}{n:,}/{total:,}{postfix}"


@contextlib.contextmanager
def watch(stages: Sequence[Stage], job: str, remote: "Job | None" = None) -> Iterator[None]:
    """Shows, during the block, how far the one job is that makes all of `stages`.

    It shows a bar on a terminal's stderr, or a line now and then elsewhere. `job` is the folder of
    this attempt at it; `remote` says how a cluster sees it.
    """
    ended = threading.Event()
    thread = threading.Thread(target=_watch, args=(stages, job, remote, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _watch(stages: Sequence[Stage], job: str, remote: "Job | None", ended: threading.Event) -> None:
    started, told, over = time.monotonic(), set[str](), False
    with _bar(stages[0].name) as bar:
        while not over:
            over = ended.wait(_pause(bar))
            # What cannot be read now may be next time, and the job tells what ails the store.
            with contextlib.suppress(OSError, CourierError):
                _tell(job, remote, told)
                if not (over and bar.disable):
                    more = remote.describe() if remote and not over else ""
                    _show(bar, stages, job, time.monotonic() - started, more)


def _tell(job: str, remote: "Job | None", told: set[str]) -> None:
    """Tells what workers warn of, and what is new of the job, as soon as it is there and once."""
    news = [f"WARNING: {message}" for message in worker_notes.warnings(job)]
    for message in (*news, *(remote.news() if remote else ())):
        if message not in told:
            tqdm.write(message, file=sys.stderr)  # above the bar
            told.add(message)


def _show(bar: tqdm, stages: Sequence[Stage], job: str, seconds: float, more: str) -> None:
    counts = measure(stages, job)
    done, total, facts = counts["done"], counts["total"], describe(counts, seconds) + more
    if bar.disable:
        tqdm.write(line(stages[0].name, done, total, facts), file=sys.stderr)
    else:
        _move(bar, done, total, facts)


def above_bar(say: Callable[[str], None]) -> Callable[[str], None]:
    """Returns what says the same on lines of their own, where a bar may be shown."""

    def say_above(message: str) -> None:
        with tqdm.external_write_mode(file=sys.stderr):
            say(message)

    return say_above


def measure(stages: Sequence[Stage], job: str) -> Counter[str]:
    """Returns done and total, and what else the workers tell: images where they do, else shards."""
    if (found := worker_notes.counted(job))["total"]:
        return found
    done, total = (sum(map(shards_done, stages)), sum(s.shards for s in stages))
    return Counter(done=done, total=total)


def describe(counts: Counter[str], seconds: float) -> str:
    """Returns the rate, the time left and, of images, what became of them.

    `counts` are those of `measure`: what `embed_images` tells of each image, added up.
    """
    done, total = counts["done"], counts["total"]
    seconds = max(seconds, 1e-3)
    text = f"{done / seconds:,.1f}/s"
    if counts["bytes"]:
        text += f", {counts['bytes'] / seconds / 1e6:,.2f} MB/s"
    if done:
        text += f", {(total - done) * seconds / done:,.0f} s left"
    for what in ("embedded", "reused"):
        text += f", {counts[what]:,} {what}" if counts[what] else ""
    return text + _rejected(counts) + _seconds(counts)


def _seconds(counts: Counter[str]) -> str:
    """Returns what images cost so far, the threads of all workers added up."""
    kinds = ("io", "decode", "forward")
    found = [f"{k} {counts[k + '_seconds']:,.0f} s" for k in kinds if counts[k + "_seconds"]]
    return f"; {', '.join(found)}" if found else ""


def _rejected(counts: Counter[str]) -> str:
    """Returns how many images were rejected, and for which reasons, the most frequent first."""
    reasons = Counter(
        {k.removeprefix("rejected_"): n for k, n in counts.items() if k.startswith("rejected_")}
    )
    if not reasons:
        return ""
    named = ", ".join(f"{name.replace('_', ' ')} {n:,}" for name, n in reasons.most_common())
    return f", {reasons.total():,} rejected ({named})"


# ---- Bars and lines ----------------------------------------------------------------------------


def _bar(name: str, total: int = 0) -> tqdm:
    """Returns a bar on a terminal's stderr, cut at its width, and elsewhere a `disable`d one."""
    return tqdm(desc=name, total=total, bar_format=_ON_TERMINALS, disable=None, dynamic_ncols=True)


def _pause(bar: tqdm) -> float:
    return _LOG_SECONDS if bar.disable else _TERMINAL_SECONDS


def _move(bar: tqdm, done: int, total: int, facts: str) -> None:
    bar.n, bar.total = min(done, total), total
    bar.set_postfix_str(facts)


def line(name: str, done: int, total: int, facts: str, unit: str = "") -> str:
    """Returns what a log tells instead of a bar."""
    return tqdm.format_meter(
        min(done, total), total, 0, prefix=name, ascii=".#", unit=unit, bar_format=_ELSEWHERE,
        postfix=facts,
    )  # fmt: skip


# ---- Bytes -------------------------------------------------------------------------------------


@contextlib.contextmanager
def counting_bytes(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """Gives what tells, from any thread, that so many more of `total` bytes are done.

    It shows a bar on a terminal's stderr, or a line now and then elsewhere.
    """
    done, started, telling = 0, time.monotonic(), threading.Lock()
    shown = started

    def facts() -> str:
        seconds = max(time.monotonic() - started, 1e-3)
        left = (total - done) * seconds / max(1, done)
        return f"{done / seconds / 1e6:,.1f} MB/s, {left:,.0f} s left"

    def add(some: int) -> None:
        nonlocal done, shown
        with telling:
            done += some
            if time.monotonic() - shown < _pause(bar):
                return
            shown = time.monotonic()
            if bar.disable:
                tqdm.write(line(name, done, total, facts(), "byte "), file=sys.stderr)
            else:
                _move(bar, done, total, facts())

    with _bar(name, total) as bar:
        yield add
        if not bar.disable:
            _move(bar, done, total, facts())


# ---- Training ----------------------------------------------------------------------------------


class StepBar:
    """Shows the steps of a training run, as a bar on a terminal's stderr or as lines elsewhere.

    Lines go to `say`; None keeps it silent. It is to be closed, so that what follows begins a line.
    """

    def __init__(self, say: Callable[[str], None] | None) -> None:
        self._say = say and above_bar(say)
        self._bar: tqdm | None = None
        self._shown = time.monotonic()

    def say(self, message: str) -> None:
        """Tells a line of its own, above the bar."""
        if self._say:
            self._say(message)

    def show(self, at: "Progress") -> None:
        """Shows where the run is, once it is time to and at the end."""
        if not self._say:
            return
        if self._bar is None:
            self._bar = _bar("train", at.steps)
        if time.monotonic() - self._shown < _pause(self._bar) and at.step < at.steps:
            return
        self._shown = time.monotonic()
        facts = (
            f"loss {at.loss:.4f}, {at.images_per_second:,.0f} images/s, "
            f"{at.seconds_left:,.0f} s left"
        )
        if self._bar.disable:
            self._say(line("train", at.step, at.steps, facts, "step "))
        else:
            _move(self._bar, at.step, at.steps, facts)

    def close(self) -> None:
        """Leaves the bar as it is and ends its line."""
        if self._bar is not None:
            self._bar.close()
