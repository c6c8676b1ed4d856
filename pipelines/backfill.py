"""Makes a range of nights by one command: what is to do, in which order, what came of it.

First a plan: of each stage of each day whether it is computed (and why), reused, left alone or
blocked, what all that comes to, and what it is likely to take. Then the work, in *steps* of
consecutive days, each of which is what `courier refresh` makes of them. What is made is published
step by step, so that a backfill that was killed finds it and goes on.

A day that fails, or that a gate refuses, stops what goes on from it, and nothing else: its
histories are made all the same, items of later days go on from the newest day that is there, and
what cannot be made is told at the end. No stage is made twice, by this run or by another.
"""

import contextlib
import datetime as dt
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import groupby
from typing import Any, Literal

from feature_jobs.items.item_vectors import broadcast_bytes
from feature_jobs.schemas import (
    CourierError,
    GateRefused,
    InputNotReady,
    OperatorError,
    StorageUnavailable,
)
from feature_jobs.store import files
from feature_jobs.store.documents import parse_json, write_json
from pipelines import nightly
from pipelines.config import Settings
from pipelines.nightly import Outlook
from pipelines.planning.day_plan import NightOptions
from pipelines.running import beam_options, beside, estimates, records
from pipelines.running.locks import Busy
from pipelines.running.stage import Planned
from pipelines.running.states import PUBLISHED, REFUSED, STAGED, Look, Night
from pipelines.stages import EMBED, HISTORIES, ITEMS, SIMSCORE, Kind

COMPUTE, REUSE, LEAVE, BLOCKED, HELD = "compute", "reuse", "leave", "blocked", "held"
Only = Literal["missing", "stale", "late", "failed"]

_BYTES_IN_MEMORY = 64  # of the local engine, for each row that a step of several days reads
_PAUSE = 5.0  # seconds between two looks whether another run has ended
_ONE_DAY = dt.timedelta(days=1)


@dataclass(frozen=True)
class Asked:
    """Holds what an operator asks for.

    Without `days`, they are those that `only` may concern: of all that are published, or of the
    newest ones. A step has at most `step_days`, by default as many as fit. The work ends once
    `max_failures` days have failed.
    """

    days: tuple[dt.date, ...] = ()
    only: Only | None = None
    step_days: int | None = None
    max_failures: int | None = None
    remake: bool = False


# ---- The plan ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class DayAhead:
    """Tells what is to be done of a day: by stage one of the actions above, and why.

    `kinds` are the stages that are asked for, none where the day is left alone; `error` is what
    keeps some of them from being made.
    """

    ds: dt.date
    actions: Mapping[Kind, tuple[str, str]]
    kinds: tuple[Kind, ...] = ()
    computed: tuple[Planned, ...] = ()
    error: CourierError | None = None

    @property
    def told(self) -> str:
        """Returns the actions in a line, stages that fare alike together."""
        alike: dict[str, list[str]] = {}
        for kind, (action, why) in self.actions.items():
            alike.setdefault(f"{action} ({why})" if why else action, []).append(kind.name)
        if len(alike) == 1:
            return next(iter(alike))
        return "; ".join(f"{', '.join(names)}: {told}" for told, names in alike.items())

    @property
    def reasons(self) -> dict[str, list[str]]:
        """Returns for what reasons which stages are made again."""
        found: dict[str, list[str]] = {}
        for kind, (action, why) in self.actions.items():
            if kind in self.kinds and action in (COMPUTE, REUSE):
                found.setdefault(why, []).append(kind.name)
        return found


@dataclass(frozen=True)
class Plan:
    """Holds what a backfill will do, day by day, in steps of at most `step_days`."""

    settings: Settings
    asked: Asked
    days: tuple[DayAhead, ...]
    estimate: estimates.Estimate
    look: Look

    @property
    def todo(self) -> list[DayAhead]:
        return [day for day in self.days if day.kinds]

    @cached_property
    def step_days(self) -> int:
        """Returns how many days fit into the memory and onto the disk that settings grant."""
        if self.asked.step_days:
            return self.asked.step_days
        settings, todo = self.settings, self.todo
        rows = [sum(one.stage.input_rows for one in day.computed) for day in todo]
        items = [
            one.stage.input_rows for day in todo for one in day.computed if one.stage.kind in ITEMS
        ]
        written = self.estimate.bytes_written / max(1, len(todo))
        fitting = [
            settings.backfill.memory_gb * 1e9 / max(1, _BYTES_IN_MEMORY * max(rows, default=0)),
            settings.backfill.disk_gb * 1e9 / max(1.0, written),
        ]
        if SIMSCORE in settings.night and items:  # each day of a job has a copy of its items
            fitting.append(settings.simscore.broadcast_limit_gb * 1e9 / broadcast_bytes(max(items)))
        return max(1, int(min(fitting)))

    def as_json(self) -> dict[str, Any]:
        return {
            "days": [
                {
                    "ds": str(day.ds),
                    "stages": {
                        kind.name: {"action": action, "why": why}
                        for kind, (action, why) in day.actions.items()
                    },
                }
                for day in self.days
            ],
            "days_to_make": len(self.todo),
            "step_days": self.step_days,
            **self.estimate.as_json(),
        }

    def render(self) -> str:
        """Returns what people read: a line for each row of days that fare alike, then the sums."""
        lines = []
        for told, row in groupby(self.days, key=lambda day: day.told):
            first, *_, last = [*row] * 2
            days = str(first.ds) if first is last else f"{first.ds} to {last.ds}"
            lines.append(f"{days:24}  {told}")
        if not self.todo:
            return "\n".join([*lines, "nothing to do"])
        count, size = len(self.todo), min(self.step_days, len(self.todo))
        lines.append(f"{_days(count)} to make, in steps of at most {_days(size)}")
        return "\n".join([*lines, *self.estimate.lines()])


def plan_backfill(settings: Settings, asked: Asked) -> Plan:
    """Plans a backfill; nothing is written.

    Raises OperatorError for days before the settings' `history_start_ds`, or without a pin.
    """
    days = asked.days or _days_concerned(settings, asked.only)
    start = settings.history_start_ds if HISTORIES in settings.night else None
    if start and asked.days and days[0] < start:
        raise OperatorError(
            f"--start-ds {days[0]} lies before history_start_ds = {start}, from which on the "
            "settings say that there are clicks: all histories before it would be empty. Begin "
            "there, or correct history_start_ds. Nothing was started."
        )
    recorded = set(settings.layout.recorded_days())
    nights = {ds: records.read_night(settings.layout, ds) for ds in days if ds in recorded}
    chosen = _Chosen(settings, asked, records.held_days(settings.layout), nights)
    ahead = {ds: left for ds in days if (left := chosen.left(ds))}
    wanted = {ds: settings.night for ds in days if ds not in ahead}
    outlooks = nightly.look_ahead(settings, wanted, NightOptions(remake=asked.remake))
    if asked.only in (None, "missing", "failed"):
        _refuse_wrong_settings(outlooks)
    if outlooks:
        chosen.look = outlooks[0].night.look
    ahead |= {outlook.night.ds: chosen.day_ahead(outlook) for outlook in outlooks}
    found = tuple(ahead[ds] for ds in days)
    computed = [one for day in found for one in day.computed]
    return Plan(
        settings, asked, found, estimates.estimate(settings, computed, chosen.look), chosen.look
    )


def stale_days(settings: Settings, days: Sequence[dt.date]) -> dict[dt.date, DayAhead]:
    """Returns the days on which something published would be made otherwise now, and why.

    Days on hold are none of them, nor those whose inputs are not there any more.
    """
    todo = plan_backfill(settings, Asked(tuple(days), "stale")).todo if days else []
    return {day.ds: day for day in todo}


def _refuse_wrong_settings(outlooks: Sequence[Outlook]) -> None:
    """Raises OperatorError where the settings keep a day from being made."""
    for outlook in outlooks:
        for error in _missing(outlook).values():
            if isinstance(error, OperatorError):
                raise error


def _days_concerned(settings: Settings, only: Only | None) -> tuple[dt.date, ...]:
    """Returns the days that are looked at where none are named."""
    if only == "failed":
        return tuple(sorted(_failed_before(settings)))
    tables = (table for kind in settings.night for table in kind.tables)
    known = sorted({day for table in tables for day in settings.layout.begun_days(table)})
    if only == "late" and known:
        oldest = known[-1] - dt.timedelta(days=settings.late_days)
        known = [day for day in known if day >= oldest]
    return tuple(known)


@dataclass
class _Chosen:
    """Chooses, of what could be made of days, what was asked for."""

    settings: Settings
    asked: Asked
    holds: Mapping[dt.date, Any]
    nights: Mapping[dt.date, Any]
    look: Look = field(default_factory=Look)
    _blocked: set[tuple[Kind, dt.date]] = field(default_factory=set)

    def day_ahead(self, outlook: Outlook) -> DayAhead:
        night, actions = outlook.night, dict[Kind, tuple[str, str]]()
        planned = {one.stage.kind: one for one in night.planned}
        missing = _missing(outlook)
        for kind in self.settings.night:
            if kind in planned:
                actions[kind] = self._action(planned[kind])
            elif kind in missing:
                actions[kind] = BLOCKED, self._blocked_by(kind, outlook)
            else:
                actions[kind] = LEAVE, f"as it is: {self._blocked_by(kind, outlook)}"
        kinds = self._kinds(night, actions)
        if not kinds:
            actions = {kind: _left(action, why) for kind, (action, why) in actions.items()}
        computed = tuple(one for kind, one in planned.items() if kind in kinds
                         and actions[kind][0] == COMPUTE)  # fmt: skip
        error = next(iter(missing.values()), None) if self._counts(night.ds) else None
        return DayAhead(night.ds, actions, kinds, computed, error)

    def left(self, ds: dt.date) -> DayAhead | None:
        """Returns a day that is not planned at all: on hold, or pruned; None for any other."""
        kinds, night = self.settings.night, self.nights.get(ds)
        if ds in self.holds:
            hold = self.holds[ds]
            why = f"rolled back at {hold['since']}: {hold['reason']}"
            _, refused = nightly.without_held(self.settings, [ds], kinds)
            error = refused[0].error if refused and self._counts(ds) else None
            return DayAhead(ds, dict.fromkeys(kinds, (HELD, why)), error=error)
        if night and night.get("pruned") and not self.asked.remake:
            why = f"pruned: {', '.join(sorted(night['pruned']))}; --remake makes it anew"
            return DayAhead(ds, dict.fromkeys(kinds, (LEAVE, why)))
        return None

    def _counts(self, ds: dt.date) -> bool:
        """Returns whether a day that cannot be made is missed: it was asked for by name."""
        if self.asked.only == "failed":
            return ds in self._failed
        return self.asked.only not in ("stale", "late")

    def _blocked_by(self, kind: Kind, outlook: Outlook) -> str:
        """Returns what blocks a stage: another one that is blocked, else what its input tells."""
        ds, kinds, error = outlook.night.ds, list(outlook.blocked), outlook.blocked[kind]
        self._blocked.add((kind, ds))
        if kind is HISTORIES and (kind, ds - _ONE_DAY) in self._blocked:
            return f"by {kind.name} of ds {ds - _ONE_DAY}"
        first = next(one for one in kinds if outlook.blocked[one] is error)
        return f"by {first.name}" if first is not kind else _sentence(error)

    def _action(self, one: Planned) -> tuple[str, str]:
        state = self.look.state(one.stage)
        why = "; ".join(self._reason(one, reason) for reason in state.why)
        if state.name == PUBLISHED and not one.stage.forced:
            return LEAVE, ""
        if state.name in (STAGED, REFUSED):
            return REUSE, "made by an earlier run" + (f": {why}" if why else "")
        done = (
            f", {state.shards_done} of {one.stage.shards} shards done" if state.shards_done else ""
        )
        return COMPUTE, why + done

    def _reason(self, one: Planned, reason: str) -> str:
        """Tells of the day before, where that is the reason, what became of it."""
        if reason not in ("previous made again", "histories before made again"):
            return reason
        earlier = one.stage.before[0]
        there = self.look.published(earlier.folder)
        accepted = [g["gate"] for g in (there.manifest.get("gates", ()) if there else ())
                    if g["level"] == "accepted"]  # fmt: skip
        if earlier.ds in self.holds:
            became = "was rolled back"
        elif accepted:
            became = f"was accepted ({', '.join(accepted)})"
        elif earlier.stage and self.look.state(earlier.stage).name != PUBLISHED:
            became = "is made again"
        else:
            became = "was made again"
        return f"ds {earlier.ds}, from which it goes on, {became}"

    def _kinds(self, night: Night, actions: Mapping[Kind, tuple[str, str]]) -> tuple[Kind, ...]:
        """Returns the stages that are asked for: all, where the night is to be whole."""
        possible = tuple(stage.kind for stage in night.stages)
        if nightly.is_there(night) or not possible:
            return ()
        there = {kind for kind in self.settings.night if _is_published(night, kind)}
        stale = tuple(
            kind for kind in possible if kind in there and actions[kind][0] in (COMPUTE, REUSE)
        )
        is_recorded = night.ds in self.nights
        match self.asked.only:
            case "missing":
                is_asked = not is_recorded or bool(set(self.settings.night) - there)
            case "stale":
                is_asked = bool(stale)
            case "late":
                stale = tuple(kind for kind in stale if self._has_grown(night, kind))
                is_asked = bool(stale)
            case "failed":
                is_asked = night.ds in self._failed
            case None:
                is_asked = True
        is_part = self.asked.only in ("stale", "late") and not is_recorded
        return () if not is_asked else stale if is_part else self.settings.night

    def _has_grown(self, night: Night, kind: Kind) -> bool:
        """Returns whether the log of a day has more rows than a stage was made from, of late."""
        (stage,) = (stage for stage in night.stages if stage.kind is kind)
        there = self.look.published(stage.folder(kind.tables[0]))
        now = stage.inputs.get("impressions")
        newest = max(self._known_days)
        if (
            now is None
            or there is None
            or night.ds < newest - dt.timedelta(days=self.settings.late_days)
        ):
            return False
        then = there.manifest["inputs"]["impressions"]
        return bool(now["digest"] != then["digest"] and now["rows"] > then["rows"])

    @cached_property
    def _known_days(self) -> tuple[dt.date, ...]:
        return _days_concerned(self.settings, None)

    @cached_property
    def _failed(self) -> set[dt.date]:
        return _failed_before(self.settings)


def _is_published(night: Night, kind: Kind) -> bool:
    """Returns whether a stage of a day is published, by whatever run."""
    folders = (night.settings.layout.folder(table, night.ds) for table in kind.tables)
    return all(map(night.look.published, folders))


def _missing(outlook: Outlook) -> dict[Kind, CourierError]:
    """Returns which stages cannot be made and are not there, with what keeps them from it.

    What is published stays, whatever became of the shop's own tables since.
    """
    night = outlook.night
    return {k: error for k, error in outlook.blocked.items() if not _is_published(night, k)}


def _left(action: str, why: str) -> tuple[str, str]:
    """Returns what is said of a stage of a day that is not asked for."""
    could_be_made = action in (COMPUTE, REUSE)
    return (LEAVE, f"not asked for; {why}") if could_be_made else (action, why)


def _sentence(error: CourierError) -> str:
    """Returns how an error begins, until its first full stop or colon."""
    return re.split(r"[.:;] ", str(error))[0].rstrip(".")


def _days(count: int) -> str:
    return "1 day" if count == 1 else f"{count:,} days"


# ---- The work ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Failure:
    """Tells of a day which stage failed, or None where none was tried, and why."""

    stage: str | None
    error: Exception

    @property
    def exit_status(self) -> int:
        return self.error.exit_status if isinstance(self.error, CourierError) else 1

    def as_json(self) -> dict[str, Any]:
        return {"stage": self.stage, "status": self.exit_status, "reason": str(self.error)}


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
        there = len(self.days) - len(self.failures) - len(self.untried)
        lines = [f"{_days(len(self.made))} made; {there:,} of {_days(len(self.days))} are there"]
        for ds, failure in sorted(self.failures.items()):
            stage = failure.stage or "-"
            lines.append(f"{ds}  {stage:14} {failure.exit_status}  {failure.error}")
        if self.untried:
            lines.append(f"not tried: {_days(len(self.untried))} from {self.untried[0]} on")
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
            f"{_days(count)} of {len(self.days):,} {'is' if count == 1 else 'are'} not there, as "
            "the table above says; all else is published. Mend what it names, and run the same "
            "command again, or with --failed for those days alone: what is there is left alone."
        )


def carry_out(
    plan: Plan, config: str, beam_args: Sequence[str], command: Sequence[str],
    say: Callable[[str], None],
) -> Outcome:  # fmt: skip
    """Makes what is planned, in steps; what came of it is noted below the root after each.

    `config` is the file of the settings, `command` what was typed.

    Raises CourierError where another backfill is at some of these days, and where the store is away
    or full: the same command goes on from there.
    """
    days = tuple(day.ds for day in plan.days)
    outcome = Outcome(days)
    for day in plan.days:
        if day.error and not day.kinds:
            outcome.failures[day.ds] = Failure(None, day.error)
    if not plan.todo:
        return outcome
    with _alone(plan.settings, days):
        work = _Work(plan, config, beam_args, command, say, outcome)
        work.make_all()
        work.note(ended=True)
    return outcome


@contextlib.contextmanager
def _alone(settings: Settings, days: Sequence[dt.date]) -> Iterator[None]:
    """Keeps other backfills from the same days until the block ends."""
    layout = settings.layout
    mine = layout.backfill_lock(days[0], days[-1])
    others = [
        layout.backfill_lock(*ends)
        for ends in layout.backfill_locks()
        if ends != (days[0], days[-1]) and ends[0] <= days[-1] and days[0] <= ends[1]
    ]
    with contextlib.ExitStack() as stack:
        for folder in [mine, *others]:
            try:
                lock = files.lock(folder)
                if folder == mine:
                    stack.enter_context(lock)
                else:
                    with lock:
                        pass
            except BlockingIOError as error:
                raise CourierError(
                    f"Another backfill is at some of the days {days[0]} to {days[-1]} (it holds "
                    f"{folder}). Two at once would wait for each other day by day. Wait for it, or "
                    "stop it and run this command: it goes on where that was."
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
        self._failed, self._tried_again = set[dt.date](), set[dt.date]()

    def make_all(self) -> None:
        while self._wanted:
            if self._has_enough():
                self._outcome.untried = sorted(self._wanted.keys() - self._failed)
                self._say(f"backfill: {_days(len(self._failed))} failed, which is as many as may")
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
                except (StorageUnavailable, OSError, OperatorError):
                    raise  # no other day would fare better
                except Exception as error:  # noqa: BLE001  # a worker may raise anything
                    if len(together) == 1:
                        self._try_again_or_fail(together[0].night.ds, error)
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
            for kind, error in _missing(outlook).items():
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
        else:
            self._fail(ds, None, error)

    def _fail(self, ds: dt.date, kind: Kind | None, error: Exception) -> None:
        """Notes a failure; what later days need of ds, and nobody has yet, is made all the same."""
        self._outcome.failures.setdefault(ds, Failure(kind.name if kind else None, error))
        self._failed.add(ds)
        wanted = self._wanted.pop(ds, ())
        with contextlib.suppress(ValueError):
            self._outcome.made.remove(ds)
        is_new = records.read_night(self._settings.layout, ds) is None
        if kind in ITEMS and HISTORIES in wanted and is_new:
            self._wanted = dict(sorted([*self._wanted.items(), (ds, (HISTORIES,))]))

    def _wait(self, busy: Busy) -> None:
        self._say(f"backfill: another run is at ds {busy.ds}: waiting until it has ended")
        time.sleep(_PAUSE)

    def _tell(self) -> None:
        """Tells how far the work is."""
        done, seconds = self._total - len(self._wanted), time.monotonic() - self._started
        left = len(self._wanted) * seconds / max(1, done)
        rate = f"{done / max(seconds, 1e-3) * 60:,.1f} a minute"
        told = f"backfill: {done:,} of {_days(self._total)} done, {rate}"
        failed = f", {_days(len(self._failed))} failed" if self._failed else ""
        self._say(f"{told}, {estimates.duration(left)} left{failed}")

    def note(self, ended: bool = False) -> None:
        """Writes below the root how far the work is."""
        now = dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds")
        told = {
            "command": self._command,
            "started": self._began.isoformat(timespec="milliseconds"),
            "ended" if ended else "seen": now,
            "left": [str(ds) for ds in self._wanted],
            **self._outcome.as_json(),
            "steps": self._steps,
        }
        days = self._outcome.days
        write_json(self._settings.layout.backfill_path(days[0], days[-1]), told)


def _kinds_of(outlook: Outlook) -> list[Kind]:
    return [stage.kind for stage in outlook.night.stages]


def _alike(outlooks: Sequence[Outlook], at_once: int) -> Iterator[list[Outlook]]:
    """Yields days in a row of which the same stages can be made, at most so many."""
    for _, row in groupby(outlooks, key=_kinds_of):
        days = list(row)
        for first in range(0, len(days), at_once):
            yield days[first : first + at_once]


def _failed_before(settings: Settings) -> set[dt.date]:
    """Returns the days that failed when a backfill tried them last."""
    layout, states = settings.layout, list[dict[str, Any]]()
    for path in layout.backfill_paths():
        if found := files.read_if_there(path):
            states.append(parse_json(path, found))
    failed: set[dt.date] = set()
    for state in sorted(states, key=lambda one: one["started"]):
        failed -= {dt.date.fromisoformat(ds) for ds in state["made"]}
        failed |= {dt.date.fromisoformat(ds) for ds in [*state["failed"], *state["not_tried"]]}
    return failed
