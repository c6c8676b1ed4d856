"""Makes nights: everything that is made for one ds or for several, published when it is good.

    catalogue + images ── EMBED ──► item_embeddings, item_rejects ── ITEM-FEATURES ──► item_features
    impressions of ds, histories of the day before ─┬─ HISTORIES ──► user_histories         │
                                                    └─ SIMSCORE ◄───────────────────────────┘
                                                          └──► user_simscores

Every stage of every day is planned before the first one runs, so that a wrong setting or a missing
input is found at once and `--dry-run` can tell what would happen. Each kind of stage is one job for
all days. The encoder and the codebook are those of the pin that holds for a day; the night never
fits either.
"""

import datetime as dt
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from feature_jobs.schemas import (
    CourierError,
    DataContractError,
    GateRefused,
    InputNotReady,
    OperatorError,
)
from pipelines.config import Settings
from pipelines.planning.day_plan import DayPlan, NightOptions, Range
from pipelines.planning.impressions import plan_histories, plan_simscore, plan_training_rows
from pipelines.planning.items import plan_embed, plan_item_features
from pipelines.planning.pinned import with_candidate
from pipelines.running import announcing, beam_options, gates, locks, making, publishing, records
from pipelines.running import states as stage_states
from pipelines.running.beam_options import JobOptions
from pipelines.running.costs import Costs
from pipelines.running.judging import Accepted, Judge
from pipelines.running.locks import Locks
from pipelines.running.making import Made
from pipelines.running.stage import Planned, Stage
from pipelines.running.states import PUBLISHED, Look, Night
from pipelines.stages import (
    EMBED,
    HISTORIES,
    ITEM_FEATURES,
    NIGHT,
    SIMSCORE,
    TRAINING_ROWS,
    Kind,
)

_NOTHING_ASKED, _NOTHING_ACCEPTED = NightOptions(), Accepted()


# ---- The night -----------------------------------------------------------------------------


class Plan:
    """Says what plans a kind of stage of a day, and which other stages it takes."""

    def __init__(self, kind: Kind, function: Callable[..., Planned], *takes: "Plan"):
        self.kind, self.function, self.takes = kind, function, takes


def the_night(settings: Settings) -> tuple[Plan, ...]:
    """Returns the plans of all stages, in the order in which they are made: the drawing as code.

    Scores take the items of ds, or with `features_from = "previous"` those of nights before it.
    """
    embedded = Plan(EMBED, plan_embed)
    features = Plan(ITEM_FEATURES, plan_item_features, embedded)
    histories = Plan(HISTORIES, plan_histories)
    items = (embedded, features) if settings.simscore.features_from == "same" else ()
    scores = Plan(SIMSCORE, plan_simscore, histories, *items)
    rows = Plan(TRAINING_ROWS, plan_training_rows)
    return embedded, features, histories, scores, rows


# ---- Planning ------------------------------------------------------------------------------


def plan_nights(
    settings: Settings,
    days: Sequence[dt.date],
    wanted: Collection[Kind],
    say: Callable[[str], None] = lambda _: None,
    options: NightOptions = _NOTHING_ASKED,
) -> list[Night]:
    """Plans the `wanted` stages of ascending days, each of which goes on from the one before."""
    again = partial(plan_nights, settings, days, wanted, say, options)
    nights = settings.layout
    if options.encoder:
        settings = with_candidate(settings, options.encoder)
    together = Range(settings, nights, say, options, len(days))
    return [plan_day(DayPlan(together, ds), wanted, again) for ds in days]


@dataclass(frozen=True)
class Outlook:
    """Holds the plan of a day as far as there can be one.

    Of the stages that are asked for and not in `night`, `blocked` says why they are not.
    """

    night: Night
    blocked: Mapping[Kind, CourierError]

    @property
    def missing(self) -> dict[Kind, CourierError]:
        """Returns which stages cannot be made and are not there, with what keeps them from it.

        What is published stays, whatever became of the shop's own tables since.
        """
        night = self.night
        return {k: error for k, error in self.blocked.items() if not night.is_published(k)}


def look_ahead(
    settings: Settings, wanted: Mapping[dt.date, Collection[Kind]], options: NightOptions
) -> list[Outlook]:
    """Plans the wanted stages of ascending days, as far as inputs are there and settings allow.

    Whoever makes them says how they are planned again (`Night.again`), as that is for the days that
    go together.
    """
    together = Range(settings, settings.layout, lambda _: None, options, len(wanted))
    found = []
    for ds, kinds in wanted.items():
        blocked: dict[Kind, CourierError] = {}
        night = plan_day(DayPlan(together, ds), kinds, blocked=blocked)
        found.append(Outlook(night, {kind: blocked[kind] for kind in kinds if kind in blocked}))
    return found


def plan_day(
    day: DayPlan,
    wanted: Collection[Kind],
    again: Callable[[], Sequence[Night]] = tuple,
    blocked: dict[Kind, CourierError] | None = None,
) -> Night:
    """Plans the `wanted` stages of a day, and those that they take.

    `again` plans anew all days that are planned together. Where a dict `blocked` is given, what
    cannot be planned is noted there with the error, and left out.
    """
    needed: list[Plan] = []
    for plan in reversed(the_night(day.settings)):
        if plan.kind in wanted or any(plan.kind is t.kind for one in needed for t in one.takes):
            needed.insert(0, plan)
    if blocked is None:
        day.open_inputs([plan.kind for plan in needed])
    planned: dict[Kind, Planned] = {}
    for plan in needed:
        taken = [one.kind for one in plan.takes]
        try:
            if blocked is not None:
                if missing := next((blocked[kind] for kind in taken if kind in blocked), None):
                    raise missing
                day.open_inputs([plan.kind])
            planned[plan.kind] = plan.function(day, *(planned[kind] for kind in taken))
        except (InputNotReady, DataContractError, OperatorError) as error:
            if blocked is None:
                raise
            blocked[plan.kind] = error.with_traceback(None)
    day.range.planned |= {(kind.name, day.ds): one for kind, one in planned.items()}
    mine = tuple(one for kind, one in planned.items() if kind in wanted)
    upstream = {stage.name: stage for one in mine for stage in one.stage.upstream}
    return Night(
        day.settings,
        day.ds,
        mine,
        tuple(stage for stage in upstream.values() if stage.kind not in wanted),
        day.range.look,
        day.is_outdated,
        again,
    )


# ---- Making --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refused:
    """Tells what refused a stage of ds, or (without a `kind`) its hold, or its announcement."""

    ds: dt.date
    kind: Kind | None
    error: CourierError


def make_nights(
    nights: Sequence[Night],
    beam_args: Sequence[str],
    say: Callable[[str], None],
    accepted: Accepted = _NOTHING_ACCEPTED,
) -> tuple[list[dict[str, Any]], list[Refused]]:
    """Makes, checks and publishes the stages of consecutive days, each kind in one job.

    Gates that are `accepted` refuse none of them. Returns what was made, by day, and what was
    refused or could not be announced; a day that goes on from a refused one waits for it. Finds
    what an earlier run had done and does only the rest. Raises a CourierError, with nothing
    published, where an input refuses, where a day is on hold, and where another run is at the same
    tables.
    """
    settings, days = nights[0].settings, [night.ds for night in nights]
    kinds = [stage.kind for stage in nights[0].stages]
    options = {
        kind: beam_options.job_options(settings, kind.name, beam_args) for kind in kinds
    }  # all are checked before the first stage runs
    if all(map(is_there, nights)):
        idle = _Making(options, say, Locks(), accepted)
        reports = [idle.report(night, night.look) for night in nights]
        idle.tell_unneeded()
        return reports, []
    beam_options.check_ready(options.values())
    with locks.holding(_lock_folders(settings, days, kinds[:1]), say) as held:
        refuse_held(settings, days, kinds)
        making_them = _Making(options, say, held, accepted)
        started = dt.datetime.now(dt.UTC)
        while not making_them.make_all(nights := _up_to_date(nights, say)):
            pass
        good = [night for night in nights if night.ds not in making_them.without]
        look = Look()
        reports = [making_them.report(night, look) for night in good]
        for night, report in zip(good, reports, strict=True):
            if not report["idle"]:
                held.check()
                making.write_run(night, report, started)
            publishing.publish_night(night, held)
        for night in nights:
            if told := night.ds in making_them.without and making_them.report_refused(night, look):
                making.write_run(night, told, started, is_published=False)
        publishing.tidy_jobs(nights[0], held)
    making_them.tell_unneeded()
    failed = _announce(good, say)
    return reports, [*making_them.refused, *failed]


def _announce(nights: Sequence[Night], say: Callable[[str], None]) -> list[Refused]:
    """Announces nights that are published; returns what failed."""
    failed = []
    for night in nights:
        try:
            announcing.announce(night.settings, night.ds, say)
        except CourierError as error:
            failed.append(Refused(night.ds, None, error))
    return failed


def without_held(
    settings: Settings, days: Sequence[dt.date], kinds: Collection[Kind]
) -> tuple[list[dt.date], list[Refused]]:
    """Returns the days that are not on hold, and what refuses those that are."""
    free, refused = list[dt.date](), list[Refused]()
    for ds in days:
        try:
            refuse_held(settings, [ds], kinds)
            free.append(ds)
        except GateRefused as error:
            refused.append(Refused(ds, None, error))
    return free, refused


def refuse_held(settings: Settings, days: Sequence[dt.date], kinds: Collection[Kind]) -> None:
    """Raises GateRefused where one of the days, as far as `kinds` publish it, is on hold."""
    records.refuse_held(settings.layout, days, _tables_of(kinds))


def _lock_folders(
    settings: Settings, days: Sequence[dt.date], kinds: Collection[Kind]
) -> list[str]:
    return settings.layout.lock_folders(_tables_of(kinds), days)


def _tables_of(kinds: Collection[Kind]) -> list[Any]:
    return [table for kind in kinds for table in kind.tables]


def is_there(night: Night) -> bool:
    """Returns whether a night is published as it is planned, and its record says so."""
    look = night.look
    if any(stage.forced or look.state(stage).name != PUBLISHED for stage in night.stages):
        return False
    record = records.read_night(night.settings.layout, night.ds)
    if record is None:
        return not night.is_whole
    if not records.is_latest_written(night.settings.layout, record):
        return False
    if announcing.is_due(night.settings, record):
        return False
    recorded = {
        name: (entry["version"], entry["run_id"]) for name, entry in record["tables"].items()
    }
    return all(
        recorded.get(table.name) == (partition.version, partition.run_id)
        for stage in night.stages if stage.kind in NIGHT
        for table, partition in zip(stage.tables, look.state(stage).tables, strict=True)
    )  # fmt: skip


def _up_to_date(nights: Sequence[Night], say: Callable[[str], None]) -> Sequence[Night]:
    """Returns the plans, made again where another run has published what they are built on."""
    while _are_outdated(nights):
        say("another run has published days that this one goes on from: planning again")
        nights = nights[0].again()
    return nights


def _are_outdated(nights: Sequence[Night]) -> bool:
    look = Look()
    return any(night.is_outdated(look) for night in nights)


class _Making:
    """Makes the stages of nights, kind by kind, and keeps what came of it.

    `why` says of what was made, by run_id, why it was; `without` are the days that are refused, or
    go on from one that is, and `refused` the errors.
    """

    def __init__(
        self,
        options: Mapping[Kind, JobOptions],
        say: Callable[[str], None],
        held: Locks,
        accepted: Accepted,
    ):
        self._options, self._say, self._held = options, say, held
        self._judge, self._costs = Judge(accepted), Costs()
        self.why: dict[str, tuple[str, ...]] = {}
        self.without: set[dt.date] = set()
        self.refused: list[Refused] = []

    def make_all(self, nights: Sequence[Night]) -> bool:
        """Makes all stages that are not made yet.

        Locks are taken as stages come to need them: other feature sets, which share the histories,
        need not wait for images. False where a plan turned out to be outdated by then: what is made
        so far stays.
        """
        look = Look()
        for stage in (stage for night in nights for stage in night.upstream):
            look.made(stage)  # which raises where it is not made
        settings, days = nights[0].settings, [night.ds for night in nights]
        for number, kind in enumerate(self._options):
            taken = self._held.take(_lock_folders(settings, days, [kind]))
            if taken and _are_outdated(nights):
                return False
            good = [night for night in nights if night.ds not in self.without]
            if good:
                with self._costs.shared_by(self.why):
                    self._make_and_judge([night.planned[number] for night in good], nights)
                self._leave_out_later_days(nights)
        return True

    def _make_and_judge(self, planned: Sequence[Planned], nights: Sequence[Night]) -> None:
        """Makes one kind of stage of all days and asks the gates.

        What an earlier run had made and the gates refuse again is made once more, from its chunk
        files: its inputs may have been mended since. What is above a limit stays as it was made;
        what breaks a contract does not, as another command would read it.
        """
        make = partial(
            making.make_missing, options=self._options[planned[0].stage.kind], say=self._say,
            locks=self._held,
        )  # fmt: skip
        kind = planned[0].stage.kind
        made = make(planned)
        refused = self._judge.refused(kind, nights, self.without)
        if old := [one.stage for one, _ in refused if one.stage.run_id not in made.why]:
            for stage in old:
                say = f"{stage.name}: what an earlier run made of ds {stage.ds} is refused still"
                self._say(say)
                self._held.check()
                stage_states.reopen(stage)
            again = make(planned)
            made = Made(made.why | again.why, again.refused)
            refused = self._judge.refused(kind, nights, self.without)
        self.why |= made.why
        for one, error in refused:
            self._held.check()
            stage_states.note_refusal(one.stage, error)
            if isinstance(error, DataContractError):
                stage_states.reopen(one.stage)
        for one, error in sorted([*made.refused, *refused], key=lambda pair: pair[0].stage.ds):
            self.without.add(one.stage.ds)
            self.refused.append(Refused(one.stage.ds, kind, error))

    def _leave_out_later_days(self, nights: Sequence[Night]) -> None:
        """Leaves out the days that go on from what a day left out has not published."""
        look, missing = Look(), dict[str, dt.date]()
        for night in nights:
            before = [
                one.run_id for stage in night.stages for one in (*stage.before, *stage.snapshots)
            ]
            blocked_by = next((missing[run_id] for run_id in before if run_id in missing), None)
            if night.ds not in self.without and blocked_by:
                self._say(f"ds {night.ds} waits: it goes on from ds {blocked_by}")
                self.without.add(night.ds)
            if night.ds in self.without:
                unpublished = (s for s in night.stages if look.state(s).name != PUBLISHED)
                missing |= {stage.run_id: night.ds for stage in unpublished}

    def report(self, night: Night, look: Look) -> dict[str, Any]:
        """Returns what there is of a night, stage by stage, and what making it took.

        Tells what an operator should know besides.
        """
        found = {stage.name: self._report_stage(stage, look) for stage in night.stages}
        told = [message for stage in found.values() for message in gates.mixed(stage["work"])]
        told += [gates.short(one) for stage in night.stages for one in self._judge.told_of(stage)]
        is_idle = all(look.state(stage).name == PUBLISHED for stage in night.stages)
        for message in told:
            self._say(f"WARNING: ds {night.ds}: {message}")
        if is_idle:
            self._say(f"ds {night.ds}: already published from the same inputs, nothing to do")
        report = {"ds": str(night.ds), "run_id": night.run_id, "stages": found}
        return {**report, "warnings": told, "idle": is_idle}

    def report_refused(self, night: Night, look: Look) -> dict[str, Any]:
        """Returns what there is of a night that may not be published; nothing where none is."""
        made = [stage for stage in night.stages if look.state(stage).is_made]
        found = {stage.name: self._report_stage(stage, look) for stage in made}
        return {"ds": str(night.ds), "run_id": night.run_id, "stages": found} if found else {}

    def tell_unneeded(self) -> None:
        """Tells which gates were accepted though they refused nothing."""
        for name in self._judge.unneeded():
            self._say(f"--accept {name} was not needed: the gate refused nothing of this run")

    def _report_stage(self, stage: Stage, look: Look) -> dict[str, Any]:
        is_published = look.state(stage).name == PUBLISHED
        counts = making.counts_of(stage, look)
        return {
            **self._costs.describe(stage, counts),
            "why": list(self.why.get(stage.run_id, ())),
            "counts": counts,
            "work": {} if is_published else making.work_of(stage),
            "workers": asdict(self._options[stage.kind].share),
            "gates": [one.as_json() for one in self._judge.findings.get(stage.run_id, ())],
        }
