"""Makes a range of nights by one command, as planned, and tells what came of it.

The work goes in *steps* of consecutive days, each of which is what `courier refresh` makes of them.
What is made is published step by step, so that a backfill that was killed finds it and goes on.

A day that fails, or that a gate refuses, stops what goes on from it, and nothing else: its
histories are made all the same, items of later days go on from the newest day that is there, and
what cannot be made is told at the end. No stage is made twice, by this run or by another.
"""

import contextlib
import datetime as dt
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from typing import Any

from feature_jobs.schemas import (
    CourierError,
    GateRefused,
    InputNotReady,
    OperatorError,
    StorageUnavailable,
)
from feature_jobs.store import files
from feature_jobs.store.documents import write_json
from pipelines import nightly
from pipelines.backfill_plan import Plan, days_in_words
from pipelines.config import Settings
from pipelines.nightly import Outlook
from pipelines.planning.day_plan import NightOptions
from pipelines.running import beam_options, beside, estimates, records
from pipelines.running.cluster_jobs import NotRun
from pipelines.running.locks import Busy
from pipelines.running.states import Night
from pipelines.stages import EMBED, HISTORIES, ITEMS, Kind

_TELL_SECONDS = 600.0
_PAUSE = 5.0  # seconds between two looks whether another run has ended


@dataclass(frozen=True)
class Failure:
    """Tells of a day which stage failed, or None where none was tried, and why."""

    stage: str | None
    error: Exception

    @property
    def exit_status(self) -> int:
        return self.error.exit_status if isinstance(self.error, CourierError) else 1

    @property
    def told(self) -> str:
        """Returns the reason in one line; what nobody expected is told by its kind."""
        if isinstance(self.error, CourierError):
            return str(self.error)
        return f"{type(self.error).__name__}: {self.error}".splitlines()[0]

    def as_json(self) -> dict[str, Any]:
        return {"stage": self.stage, "status": self.exit_status, "reason": self.told}


@dataclass
class Outcome:
    """Holds what came of a backfill: the days that were made, that were there, that are not."""

    days: tuple[dt.date, ...]
    made: list[dt.date] = field(default_factory=list)
    failures: dict[dt.date, Failure] = field(default_factory=dict)
    untried: list[dt.date] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return {
            "made": [str(day) for day in sorted(self.made)],
            "failed": {str(ds): one.as_json() for ds, one in sorted(self.failures.items())},
            "not_tried": [str(day) for day in self.untried],
        }

    def render(self) -> str:
        """Returns the closing table: what was made, and a line for each day that is not there."""
        left = len(self.days) - len(self.made) - len(self.failures) - len(self.untried)
        told = f"{len(self.made):,} made, {left:,} left as they were"
        lines = [f"of {days_in_words(len(self.days))}: {told}, {len(self.failures):,} not made"]
        for ds, failure in sorted(self.failures.items()):
            stage = failure.stage or "-"
            lines.append(f"{ds}  {stage:14} {failure.exit_status}  {failure.told}")
        if self.untried:
            lines.append(f"not tried: {days_in_words(len(self.untried))} from {self.untried[0]} on")
        return "\n".join(lines)

    def refuse(self) -> None:
        """Raises where a day is not there, with the exit status of the worst of them."""
        if not self.failures:
            return
        order = [1, 2, 3, 4]
        worst = min(self.failures.values(), key=lambda one: order.index(one.exit_status))
        kinds: dict[int, type[CourierError]] = {2: OperatorError, 3: GateRefused, 4: InputNotReady}
        count = len(self.failures) + len(self.untried)
        raise kinds.get(worst.exit_status, CourierError)(
            f"{days_in_words(count)} of {len(self.days):,} {'is' if count == 1 else 'are'} not "
            "made, as the table above says; all else is there. Mend what it names, and run the "
            "same command again, or with --failed for those days alone: what is there is left "
            "alone."
        )


def begin(plan: Plan) -> Outcome:
    """Returns the outcome of a backfill of which nothing is made yet."""
    found = {day.ds: day.error for day in plan.days if day.error and not day.kinds}
    failures = {ds: Failure(None, error) for ds, error in found.items()}
    return Outcome(tuple(day.ds for day in plan.days), failures=failures)


def carry_out(
    plan: Plan, outcome: Outcome, config: str, beam_args: Sequence[str],
    command: Sequence[str], say: Callable[[str], None],
) -> None:  # fmt: skip
    """Makes what is planned, in steps; what comes of it is noted in `outcome`, and below the root.

    `config` is the file of the settings, `command` what was typed. Raises CourierError where
    another backfill is at some of these days, and where the store is away or full: the same command
    goes on from there.
    """
    if not plan.todo and not outcome.failures:
        return
    with _alone(plan.settings, outcome.days):
        work = _Work(plan, config, beam_args, command, say, outcome)
        try:
            work.make_all()
        finally:
            with contextlib.suppress(CourierError, OSError):  # which would hide what ended it
                work.note()


@contextlib.contextmanager
def _alone(settings: Settings, days: Sequence[dt.date]) -> Iterator[None]:
    """Keeps other backfills from the same days until the block ends."""
    layout, ends = settings.layout, (days[0], days[-1])
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(files.lock(layout.backfill_lock(*ends)))
            for other in layout.backfill_locks():  # seen by now: also of one that begins just now
                if other != ends and other[0] <= ends[1] and ends[0] <= other[1]:
                    with files.lock(layout.backfill_lock(*other)):
                        pass
        except BlockingIOError as error:
            raise CourierError(
                f"Another backfill is at some of the days {days[0]} to {days[-1]} (it holds "
                f"{error.filename}). Two at once would wait for each other day by day. Wait for "
                "it, or stop it and run this command: it goes on where that was."
            ) from error
        yield


class _Work:
    """Makes the days of a plan step by step, and keeps what came of them."""

    def __init__(
        self, plan: Plan, config: str, beam_args: Sequence[str], command: Sequence[str],
        say: Callable[[str], None], outcome: Outcome,
    ):  # fmt: skip
        self._plan, self._beam_args, self._say, self._outcome = plan, beam_args, say, outcome
        self._settings, self._config, self._command = plan.settings, config, list(command)
        self._options = NightOptions(remake=plan.asked.remake)
        self._wanted: dict[dt.date, tuple[Kind, ...]] = {day.ds: day.kinds for day in plan.todo}
        self._total, self._started = len(self._wanted), time.monotonic()
        self._began = dt.datetime.now(dt.UTC)
        self._steps: list[dict[str, Any]] = []
        days = outcome.days
        self._path = self._settings.layout.backfill_path(days[0], days[-1], self._began)
        self._failed, self._tried_again = set[dt.date](), set[dt.date]()
        self._told_done, self._waiting_told = 0, -_TELL_SECONDS

    def make_all(self) -> None:
        while self._wanted:
            if self._has_enough():
                self._outcome.untried = sorted(self._wanted.keys() - self._failed)
                self._say(
                    f"backfill: {days_in_words(len(self._failed))} failed, which is as many as may"
                )
                return
            step = list(self._wanted)[: self._plan.step_days]
            started = time.monotonic()
            self._make_step(step)
            self._steps.append(
                {"start_ds": str(step[0]), "end_ds": str(step[-1]),
                 "seconds": round(time.monotonic() - started, 3)}
            )  # fmt: skip
            self.note()  # a run that is killed leaves how far it was

    def _has_enough(self) -> bool:
        most = self._plan.asked.max_failures
        return most is not None and len(self._failed) >= most

    def _make_step(self, days: Sequence[dt.date]) -> None:
        """Makes days in as few jobs as can be: anew from where one fails, without it."""
        at_once = len(days)
        while not self._has_enough() and (todo := [ds for ds in days if ds in self._wanted]):
            wanted = {ds: self._wanted[ds] for ds in todo}
            outlooks = nightly.look_ahead(self._settings, wanted, self._options)
            for together in _alike(outlooks, at_once):
                try:
                    if self._make(together):
                        break  # later days may go on from what failed: they are planned anew
                except Busy as busy:
                    before = [one for one in together if busy.ds and one.night.ds < busy.ds]
                    at_once = len(before) or at_once
                    if not before:
                        self._wait(busy)
                    break
                except (StorageUnavailable, OSError, OperatorError, NotRun):
                    raise  # no other day would fare better
                except Exception as error:  # noqa: BLE001  # a worker may raise anything
                    if len(together) == 1:
                        self._try_again_or_fail(together[0].night.ds, error)
                        at_once = len(days)
                    else:
                        at_once = max(1, len(together) // 2)  # to find the day
                    break
            self._tell()

    def _make(self, together: Sequence[Outlook]) -> bool:
        """Makes what can be made of days, in one job a stage; returns whether one was refused."""
        days, kinds = [one.night.ds for one in together], _kinds_of(together[0])
        again = partial(nightly.plan_nights, self._settings, days, kinds, options=self._options)
        nights = [replace(one.night, again=again) for one in together]
        reports, refused = list[dict[str, Any]](), list[nightly.Refused]()
        if kinds:
            with self._histories_beside(nights):
                reports, refused = nightly.make_nights(nights, self._beam_args, self._say)
        for one in refused:
            self._fail(one.ds, one.kind, one.error)
        idle = {report["ds"]: report["idle"] for report in reports}
        for outlook in together:
            ds = outlook.night.ds
            if kinds and str(ds) not in idle:
                continue  # refused, or it waits for one that is
            for kind, error in outlook.missing.items():
                self._failed.add(ds)
                self._outcome.failures.setdefault(ds, Failure(kind.name, error))
            self._wanted.pop(ds, None)
            if not idle.get(str(ds), True) and ds not in self._outcome.failures:
                self._outcome.made.append(ds)
        return bool(refused)

    def _histories_beside(self, nights: Sequence[Night]) -> AbstractContextManager[None]:
        """Makes the histories of nights beside their items, where they are made elsewhere.

        It is the command for them, for days of which nothing stands yet: the step waits for it at
        their locks, finds what it made, and makes what it did not.
        """
        kinds = {stage.kind for stage in nights[0].stages}
        options = beam_options.job_options(self._settings, HISTORIES.name, self._beam_args)
        days = [night.ds for night in nights]
        layout = self._settings.layout
        if (
            not {EMBED, HISTORIES} <= kinds
            or self._options.remake
            or beam_options.is_local(options)
            or beam_options.is_for_jar(options)
            or (days[-1] - days[0]).days >= len(days)
            or any(records.read_night(layout, ds) for ds in days)
        ):
            return contextlib.nullcontext()
        ends = ["--start-ds", str(days[0]), "--end-ds", str(days[-1])]
        command = ["histories", "--config", self._config, *ends, "--", *self._beam_args]
        return beside.running(command)

    def _try_again_or_fail(self, ds: dt.date, error: Exception) -> None:
        """Notes a failure of ds; once it is only tried again, where another run came first."""
        if type(error) is CourierError and ds not in self._tried_again:
            self._tried_again.add(ds)
            return
        if not isinstance(error, CourierError):
            traceback.print_exception(error)
        self._fail(ds, None, error)

    def _fail(self, ds: dt.date, kind: Kind | None, error: Exception) -> None:
        """Notes a failure; what later days need of ds, and nobody has yet, is made all the same."""
        self._outcome.failures.setdefault(ds, Failure(kind.name if kind else None, error))
        self._failed.add(ds)
        wanted = self._wanted.pop(ds, ())
        with contextlib.suppress(ValueError):
            self._outcome.made.remove(ds)
        is_new = records.read_night(self._settings.layout, ds) is None
        if (kind is None or kind in ITEMS) and {HISTORIES} < set(wanted) and is_new:
            self._wanted = dict(sorted([*self._wanted.items(), (ds, (HISTORIES,))]))

    def _wait(self, busy: Busy) -> None:
        if time.monotonic() - self._waiting_told >= _TELL_SECONDS:
            self._waiting_told = time.monotonic()
            self._say(f"backfill: another run is at ds {busy.ds}: waiting until it has ended")
        time.sleep(_PAUSE)

    def _tell(self) -> None:
        """Tells how far the work is, where that has changed."""
        done, seconds = self._total - len(self._wanted), time.monotonic() - self._started
        if done == self._told_done:
            return
        self._told_done = done
        left = estimates.duration(len(self._wanted) * seconds / max(1, done))
        rate = f"{done / max(seconds, 1e-3) * 60:,.1f} a minute"
        failed = f", {days_in_words(len(self._failed))} failed" if self._failed else ""
        self._say(
            f"backfill: {done:,} of {days_in_words(self._total)} done, {rate}, {left} left{failed}"
        )

    def note(self) -> None:
        """Writes below the root how far the work is."""
        now = dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds")
        told = {
            "command": self._command,
            "started": self._began.isoformat(timespec="milliseconds"),
            "noted": now,
            "left": [str(ds) for ds in self._wanted],
            **self._outcome.as_json(),
            "steps": self._steps,
        }
        write_json(self._path, told)


def _kinds_of(outlook: Outlook) -> list[Kind]:
    return [stage.kind for stage in outlook.night.stages]


def _alike(outlooks: Sequence[Outlook], at_once: int) -> Iterator[list[Outlook]]:
    """Yields days in a row of which the same stages can be made, at most so many."""
    for _, row in groupby(outlooks, key=_kinds_of):
        days = list(row)
        for first in range(0, len(days), at_once):
            yield days[first : first + at_once]
