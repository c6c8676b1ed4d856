"""Plans a backfill: what is to be done of which days, why, and what it is likely to take.

Of each stage of each day the plan says whether it is computed (and why), reused, left alone or
blocked. A day is *stale* where something published would be made otherwise now. Nothing is written
here: `backfill` does the work.
"""

import datetime as dt
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any, Literal

from feature_jobs.schemas import CourierError, OperatorError
from feature_jobs.store import files
from feature_jobs.store.documents import parse_json
from pipelines import nightly
from pipelines.config import Settings
from pipelines.nightly import Outlook
from pipelines.planning.day_plan import NightOptions
from pipelines.planning.impressions import PlannedScores
from pipelines.running import estimates, records
from pipelines.running.stage import Planned, Stage
from pipelines.running.states import (
    NEVER_MADE,
    PUBLISHED,
    REFUSED,
    STAGED,
    Look,
    Night,
    Reason,
)
from pipelines.stages import HISTORIES, Kind, kind_of

COMPUTE, REUSE, RECORD, LEAVE = "compute", "reuse", "record", "leave"
BLOCKED, HELD = "blocked", "held"
Only = Literal["missing", "stale", "late", "failed"]

_MOST_DAYS = 60  # of a step, unless more are asked for: after each it is told how far the work is
_BYTES_IN_MEMORY = 64  # of the local engine, for each row that a step of several days reads
_GOES_ON = "from which it goes on"
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
    look: Look

    @property
    def todo(self) -> list[DayAhead]:
        return [day for day in self.days if day.kinds]

    @cached_property
    def estimate(self) -> estimates.Estimate:
        """Returns what all that is computed is likely to take."""
        computed = [one for day in self.days for one in day.computed]
        return estimates.estimate(self.settings, computed, self.look)

    @cached_property
    def step_days(self) -> int:
        """Returns how many days fit into the memory and onto the disk that settings grant."""
        if self.asked.step_days:
            return self.asked.step_days
        settings, todo = self.settings, self.todo
        rows = [sum(one.stage.input_rows for one in day.computed) for day in todo]
        written = self.estimate.bytes_written / max(1, len(todo))
        fitting = [
            _MOST_DAYS,
            settings.backfill.memory_gb * 1e9 / max(1, _BYTES_IN_MEMORY * max(rows, default=0)),
            settings.backfill.disk_gb * 1e9 / max(1.0, written),
        ]
        if copied := max(map(_bytes_copied, todo), default=0):
            copies = settings.simscore.broadcast_limit_gb * 1e9 / copied
            fitting.append(copies - max(map(_nights_copied, todo)) + 1)
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
        lines.append(f"{days_in_words(count)} to make, in steps of at most {days_in_words(size)}")
        return "\n".join([*lines, *self.estimate.lines()])


def _bytes_copied(day: DayAhead) -> int:
    """Returns how large a copy of items a job makes that scores the day: each day has its own."""
    scores = (one for one in day.computed if isinstance(one, PlannedScores))
    return max((one.copied_bytes for one in scores), default=0)


def _nights_copied(day: DayAhead) -> int:
    """Returns of how many nights' items a job that scores the day alone makes copies."""
    scores = (one for one in day.computed if isinstance(one, PlannedScores))
    return max((len(one.nights) for one in scores), default=1)


def plan_backfill(settings: Settings, asked: Asked) -> Plan:
    """Plans a backfill; nothing is written.

    Raises OperatorError for days before the settings' `history_start_ds`, or without a pin.
    """
    days = asked.days or _days_concerned(settings, asked.only)
    start = settings.history_start_ds if HISTORIES in settings.night else None
    if start and asked.days and days[0] < start and asked.only in (None, "missing"):
        raise OperatorError(
            f"--start-ds {days[0]} lies before history_start_ds = {start}, from which on the "
            "settings say that there are clicks: all histories before it would be empty. Begin "
            "there, or correct history_start_ds. Nothing was started."
        )
    recorded = set(settings.layout.recorded_days())
    nights = {ds: records.read_night(settings.layout, ds) for ds in days if ds in recorded}
    chosen = _Chosen(settings, asked, records.held_days(settings.layout), nights)
    ahead = {ds: left for ds in days if (left := chosen.left(ds))}
    wanted = {ds: chosen.wanted(ds) for ds in days if ds not in ahead}
    outlooks = nightly.look_ahead(settings, wanted, NightOptions(remake=asked.remake))
    if asked.only in (None, "missing", "failed"):
        _refuse_wrong_settings(outlooks)
    if outlooks:
        chosen.look = outlooks[0].night.look
    ahead |= {outlook.night.ds: chosen.day_ahead(outlook) for outlook in outlooks}
    return Plan(settings, asked, tuple(ahead[ds] for ds in days), chosen.look)


def stale_days(settings: Settings, days: Sequence[dt.date]) -> dict[dt.date, DayAhead]:
    """Returns the days on which something published would be made otherwise now, and why.

    Days on hold are none of them, nor those whose inputs are not there any more.
    """
    todo = plan_backfill(settings, Asked(tuple(days), "stale")).todo if days else []
    return {day.ds: day for day in todo}


def _refuse_wrong_settings(outlooks: Sequence[Outlook]) -> None:
    """Raises OperatorError where the settings keep a day from being made."""
    for outlook in outlooks:
        for error in outlook.missing.values():
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


@dataclass
class _Chosen:
    """Chooses, of what could be made of days, what was asked for."""

    settings: Settings
    asked: Asked
    holds: Mapping[dt.date, Any]
    nights: Mapping[dt.date, Any]
    look: Look = field(default_factory=Look)
    _blocked: set[tuple[Kind, dt.date]] = field(default_factory=set)
    _waiting: dict[tuple[Kind, dt.date], dt.date] = field(default_factory=dict)

    def day_ahead(self, outlook: Outlook) -> DayAhead:
        night, actions = outlook.night, dict[Kind, tuple[str, str]]()
        planned = {one.stage.kind: one for one in night.planned}
        ds, missing, hold = night.ds, outlook.missing, self.holds.get(night.ds)
        for kind in self.settings.night:
            if kind in planned:
                actions[kind] = self._action(planned[kind].stage)
            elif hold and not kind.is_shared:
                actions[kind] = HELD, f"rolled back at {hold['since']}: {hold['reason']}"
            elif kind in missing:
                actions[kind] = BLOCKED, self._blocked_by(kind, outlook)
            else:
                actions[kind] = LEAVE, f"as it is: {self._blocked_by(kind, outlook)}"
        kinds = self._kinds(night, actions)
        if kinds and _breaks_a_night(outlook):
            kinds, missing = (), missing or dict(outlook.blocked)
        has_work = any(action in (COMPUTE, REUSE) for action, _ in actions.values())
        if not has_work and any(day == ds for _, day in self._waiting):
            kinds = ()
        if not kinds:
            actions = {kind: _left(action, why) for kind, (action, why) in actions.items()}
        elif not has_work:
            actions = dict.fromkeys(actions, (RECORD, "all tables are published"))
        computed = tuple(one for kind, one in planned.items() if kind in kinds
                         and actions[kind][0] == COMPUTE)  # fmt: skip
        error = next(iter(missing.values()), None) or (self._hold(ds) if hold else None)
        return DayAhead(ds, actions, kinds, computed, error if self._counts(ds) else None)

    def left(self, ds: dt.date) -> DayAhead | None:
        """Returns a day that is not planned at all, since it was pruned; None for any other."""
        night = self.nights.get(ds)
        if not night or not night.get("pruned") or self.asked.remake:
            return None
        why = f"pruned: {', '.join(sorted(night['pruned']))}; --remake makes it anew"
        return DayAhead(ds, dict.fromkeys(self.settings.night, (LEAVE, why)))

    def wanted(self, ds: dt.date) -> tuple[Kind, ...]:
        """Returns the stages that may be made: of a day on hold those alone that others share."""
        is_held = ds in self.holds
        return tuple(kind for kind in self.settings.night if kind.is_shared or not is_held)

    def _hold(self, ds: dt.date) -> CourierError | None:
        _, refused = nightly.without_held(self.settings, [ds], self.settings.night)
        return refused[0].error if refused else None

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

    def _action(self, stage: Stage) -> tuple[str, str]:
        state = self.look.state(stage)
        if state.name == PUBLISHED and not stage.forced:
            return LEAVE, ""
        if day := self._waits_for(state.reasons):
            self._waiting[stage.kind, stage.ds] = day
            if day != stage.ds:
                return LEAVE, f"waits for ds {day}, which is refused"
        why = "; ".join(self._told(stage, one) for one in state.reasons if one.text != NEVER_MADE)
        if state.name in (STAGED, REFUSED):
            if state.name == REFUSED:
                self._waiting[stage.kind, stage.ds] = stage.ds
            return REUSE, "made by an earlier run" + (f", as {why}" if why else "")
        if state.shards_done:
            why = f"{why or NEVER_MADE}, {state.shards_done} of {stage.shards} shards are done"
        return COMPUTE, why or NEVER_MADE

    def _waits_for(self, reasons: Sequence[Reason]) -> dt.date | None:
        """Returns the refused day for whose sake alone a published stage would be made again."""
        again = [reason.of for reason in reasons]
        found = {self._waiting.get((kind_of(one.table), one.ds)) if one else None for one in again}
        return found.pop() if len(found) == 1 else None

    def _told(self, stage: Stage, reason: Reason) -> str:
        """Tells of the day before, or a night of items, where that is the reason, what became."""
        earlier = reason.of
        if earlier is None or earlier.ds == stage.ds:
            return reason.text
        there = self.look.published(earlier.folder)
        accepted = [g["gate"] for g in (there.manifest.get("gates", ()) if there else ())
                    if g["level"] == "accepted"]  # fmt: skip
        if earlier.ds in self.holds and not earlier.table.shared:
            became = "was rolled back"
        elif accepted:
            became = f"was accepted ({', '.join(accepted)})"
        elif earlier.stage and self.look.state(earlier.stage).name != PUBLISHED:
            became = "is made again"
        else:
            became = "was made again"
        link = "whose items it is scored with" if earlier in stage.snapshots else _GOES_ON
        return f"ds {earlier.ds}, {link}, {became}"

    def _kinds(self, night: Night, actions: Mapping[Kind, tuple[str, str]]) -> tuple[Kind, ...]:
        """Returns the stages that are asked for: all, where the night is to be whole."""
        possible = tuple(stage.kind for stage in night.stages)
        if nightly.is_there(night) or not possible:
            return ()
        there = {kind for kind in self.settings.night if night.is_published(kind)}
        stale = tuple(
            kind for kind in possible if kind in there and actions[kind][0] in (COMPUTE, REUSE)
        )
        is_recorded = night.ds in self.nights
        match self.asked.only:
            case "missing":
                is_asked = not is_recorded or bool(set(self.wanted(night.ds)) - there)
            case "stale":
                is_asked = bool(stale)
            case "late":
                # With what is stale upstream: scores are made of the items as they are now.
                is_asked = any(self._has_grown(night, kind) for kind in stale)
            case "failed":
                is_asked = night.ds in self._failed
            case None:
                is_asked = True
        is_part = self.asked.only == "late" or (self.asked.only == "stale" and not is_recorded)
        return () if not is_asked else stale if is_part else self.wanted(night.ds)

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


def _breaks_a_night(outlook: Outlook) -> bool:
    """Returns whether to make what can be made would leave a whole night half as it was.

    What is read of the rest could not be made again from it.
    """
    night = outlook.night
    if not outlook.blocked or all(night.look.state(s).name == PUBLISHED for s in night.stages):
        return False
    record = records.read_night(night.settings.layout, night.ds)
    return record is not None and records.is_whole(record, night.settings.layout)


def _left(action: str, why: str) -> tuple[str, str]:
    """Returns what is said of a stage of a day that is not asked for."""
    could_be_made = action in (COMPUTE, REUSE)
    return (LEAVE, f"not asked for; {why}") if could_be_made else (action, why)


def _sentence(error: CourierError) -> str:
    """Returns how an error begins, until its first full stop or colon."""
    return re.split(r"[.:;] ", str(error))[0].rstrip(".")


def days_in_words(count: int) -> str:
    return "1 day" if count == 1 else f"{count:,} days"
