"""Makes a night: everything that is made for one ds, in order, published when all of it is good.

    catalogue + images ── EMBED ──► item_embeddings, item_rejects ── ITEM-FEATURES ──► item_features
    impressions of ds, histories of the day before ─┬─ HISTORIES ──► user_histories         │
                                                    └─ SIMSCORE ◄───────────────────────────┘
                                                          └──► user_simscores

Every stage is planned before the first one runs, so that a wrong setting or a missing input is
found at once and `--dry-run` can tell what would happen. The encoder and the codebook are those of
the pin that holds for ds; the night never fits either.
"""

import datetime as dt
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from feature_jobs.inputs import Source
from feature_jobs.schemas import CourierError, DataContractError, GateRefused, InputNotReady
from pipelines.config import STAGES, Settings
from pipelines.planning.day_plan import DayPlan, NightOptions
from pipelines.planning.impressions import plan_histories, plan_simscore, plan_training_rows
from pipelines.planning.items import plan_embed, plan_item_features
from pipelines.running import beam_options, layout, locks, making, publishing, quality, records
from pipelines.running.beam_options import JobOptions
from pipelines.running.locks import Locks
from pipelines.running.stage import Night, Stage

_PLANS: dict[str, Callable[[DayPlan, dict[str, Stage]], Stage]] = {
    # in the order in which they are made
    "embed": plan_embed,
    "item-features": plan_item_features,
    "histories": plan_histories,
    "simscore": plan_simscore,
    "training-rows": plan_training_rows,
}
_NOTHING_ASKED = NightOptions()
_UPSTREAM = {"item-features": {"embed"}, "simscore": {"embed", "item-features"}}


# ---- Planning ------------------------------------------------------------------------------


def plan_night(
    settings: Settings,
    ds: dt.date,
    wanted: Sequence[str] = STAGES,
    say: Callable[[str], None] = lambda _: None,
    options: NightOptions = _NOTHING_ASKED,
) -> Night:
    """Checks settings, artefacts and inputs for the `wanted` stages of ds, and plans them.

    Raises OperatorError, DataContractError or InputNotReady.
    """
    (night,) = plan_nights(settings, [ds], wanted, say, options)
    return night


def plan_day(
    day: DayPlan, wanted: Sequence[str], again: Callable[[], Sequence[Night]] = tuple
) -> Night:
    """Plans the `wanted` stages of a day whose inputs and artefacts `day` holds.

    `again` plans anew all days that are planned together.
    """
    upstream = set().union(*(_UPSTREAM.get(name, set()) for name in wanted))
    needed = [name for name in _PLANS if name in upstream | set(wanted)]
    day.open_inputs(needed)
    made: dict[str, Stage] = {}
    for name in needed:
        made[name] = _PLANS[name](day, made)
    return Night(
        day.settings,
        day.ds,
        stages=tuple(made[name] for name in needed if name in wanted),
        upstream=tuple(made[name] for name in needed if name not in wanted),
        is_outdated=day.is_outdated,
        again=again,
    )


def plan_nights(
    settings: Settings,
    days: Sequence[dt.date],
    wanted: Sequence[str],
    say: Callable[[str], None] = lambda _: None,
    options: NightOptions = _NOTHING_ASKED,
    together: bool = True,
) -> list[Night]:
    """Plans the `wanted` stages of days.

    Days that are made `together` are consecutive, and their histories go on from each other.
    """
    again = partial(plan_nights, settings, wanted=wanted, say=say, options=options)
    if options.allow_churn:
        settings = settings.allowing_churn()
    nights: list[Night] = []
    found: dict[str, Source | InputNotReady] = {}
    for ds in days:
        group = days if together else [ds]
        earlier = nights[-1].stage("histories") if nights and together else None
        day = DayPlan(settings, ds, say, options, earlier, len(group), found)
        nights.append(plan_day(day, wanted, partial(again, days=group)))
    return nights


# ---- Making --------------------------------------------------------------------------------


def run_nights(
    nights: Sequence[Night], beam_args: Sequence[str], say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Makes, checks and publishes the stages of consecutive days; returns what was made, by day.

    Each kind of stage is one job for all days. Finds what an earlier run had done and does only
    the rest. Raises a CourierError, with nothing published, where an input, a law or a gate
    refuses, where a day is on hold, and where another run is at the same tables.
    """
    settings, days = nights[0].settings, [night.ds for night in nights]
    names = [stage.name for stage in nights[0].stages]
    options = {
        name: beam_options.job_options(settings, name, beam_args) for name in names
    }  # all are checked before the first stage runs
    refuse_held(settings, days, names)
    with locks.holding(_lock_folders(settings, days, names[:1]), say) as held:
        refuse_held(settings, days, names)
        made: set[str] = set()
        started, reports = time.time(), None
        while reports is None:
            nights = _up_to_date(nights, say)
            reports = _make_all(nights, options, made, say, held)
        for night, report in zip(nights, reports, strict=True):
            report["idle"] = all(stage.is_published() for stage in night.stages)
            if report["idle"]:
                say(f"ds {night.ds}: already published from the same inputs, nothing to do")
            if made & {stage.run_id for stage in night.stages}:
                held.check()
                making.write_run(night, {**report, "started": started, "ended": time.time()})
            publishing.publish_night(night, held)
    return reports


def refuse_held(settings: Settings, days: Sequence[dt.date], stages: Sequence[str]) -> None:
    """Raises GateRefused where one of the days, as far as `stages` publish it, is on hold."""
    tables = layout.tables_of(stages)
    records.refuse_held(settings.root, settings.feature_set, days, tables)


def _lock_folders(settings: Settings, days: Sequence[dt.date], stages: Sequence[str]) -> list[str]:
    tables = layout.tables_of(stages)
    return layout.lock_folders(settings.root, settings.feature_set, tables, days)


def _up_to_date(nights: Sequence[Night], say: Callable[[str], None]) -> Sequence[Night]:
    """Returns the plans, made again where another run has published what they are built on."""
    while any(night.is_outdated() for night in nights):
        say("another run has published days that this one goes on from: planning again")
        nights = nights[0].again()
    return nights


def _make_all(
    nights: Sequence[Night], options: Mapping[str, JobOptions], made: set[str],
    say: Callable[[str], None], held: Locks,
) -> list[dict[str, Any]] | None:  # fmt: skip
    """Makes all stages that are not made yet; returns a report for each day.

    Locks are taken as stages come to need them: other feature sets, which share the histories, need
    not wait for images. Adds the run_ids of what it made to `made`. None where a plan turned out to
    be outdated by then: what is made so far stays.
    """
    settings, days = nights[0].settings, [night.ds for night in nights]
    reports: list[dict[str, Any]] = [
        {"ds": str(night.ds), "run_id": night.run_id, "stages": {}} for night in nights
    ]
    for night in nights:
        for stage in night.upstream:
            making.counts_of(stage)  # which raises where it is not made
    for stages in zip(*(night.stages for night in nights), strict=True):
        name, before = stages[0].name, time.monotonic()
        taken = held.take(_lock_folders(settings, days, [name]))
        if taken and any(night.is_outdated() for night in nights):
            return None
        made |= _make_and_judge(stages, settings, options[name], say, held)
        seconds = round((time.monotonic() - before) / len(nights), 1)  # a day's share
        for stage, report in zip(stages, reports, strict=True):
            report["stages"][name] = {
                "seconds": seconds,
                "counts": making.counts_of(stage),
                "work": making.work_of(stage),
                "workers": asdict(options[name].share),
            }
    for report in reports:
        works = [stage["work"] for stage in report["stages"].values()]
        report["warnings"] = [message for work in works for message in quality.warnings(work)]
        for message in report["warnings"]:
            say(f"WARNING: ds {report['ds']}: {message}")
    return reports


def _make_and_judge(
    stages: Sequence[Stage], settings: Settings, options: JobOptions, say: Callable[[str], None],
    held: Locks,
) -> set[str]:  # fmt: skip
    """Makes one kind of stage of all days and asks the gates; returns the run_ids of what it made.

    What an earlier run had made and the gates refuse again is made once more, from its chunk
    files: its inputs may have been mended since. Raises what the gates say. What is above a limit
    stays as it was made; what breaks a contract does not, as another command would read it.
    """
    made = making.make_missing(stages, options, say, held)
    refused = _refused(stages, settings)
    if old := [stage for stage, _ in refused if stage.run_id not in made]:
        for stage in old:
            say(f"{stage.name}: what an earlier run made of ds {stage.ds} is refused still")
            held.check()
            making.reopen(stage)
        made |= making.make_missing(stages, options, say, held)
        refused = _refused(stages, settings)
    for stage, error in refused:
        held.check()
        making.note_refusal(stage, error)
        if isinstance(error, DataContractError):
            making.reopen(stage)
    for _, error in refused:
        raise error
    return made


def _refused(stages: Sequence[Stage], settings: Settings) -> list[tuple[Stage, CourierError]]:
    """Asks the gates about each stage that is not published; returns what they refuse, and why."""
    refused: list[tuple[Stage, CourierError]] = []
    for stage in stages:
        if stage.is_published():
            continue
        together = (*stage.upstream, stage)
        counts = {name: n for one in together for name, n in making.counts_of(one).items()}
        clusters = making.clusters_of(*together)
        try:
            quality.check(stage.name, stage.input_rows, counts, settings, clusters)
            making.note_refusal(stage, None)
        except (GateRefused, DataContractError) as error:
            told = type(error)(f"ds {stage.ds}: {error}")
            told.__cause__ = error
            refused.append((stage, told))
    return refused
