"""The night: everything that is made for one ds, in order, and published when all of it is good.

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
from collections.abc import Callable, Sequence
from typing import Any

from feature_jobs.schemas import CourierError
from pipelines.config import STAGES, Settings
from pipelines.planning.day_plan import DayPlan, NightOptions
from pipelines.planning.impressions import plan_histories, plan_simscore, plan_training_rows
from pipelines.planning.items import plan_embed, plan_item_features
from pipelines.running import beam_options, making, publishing, quality
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


def plan_day(day: DayPlan, wanted: Sequence[str]) -> Night:
    """The same of a day whose plan has begun."""
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
    )


def plan_nights(
    settings: Settings,
    days: Sequence[dt.date],
    wanted: Sequence[str],
    say: Callable[[str], None] = lambda _: None,
    options: NightOptions = _NOTHING_ASKED,
) -> list[Night]:
    """The same for consecutive days, whose histories go on from each other."""
    if options.allow_churn:
        settings = settings.allowing_churn()
    nights: list[Night] = []
    for ds in days:
        earlier = nights[-1].stage("histories") if nights else None
        day = DayPlan(settings, ds, say, options, earlier, len(days))
        nights.append(plan_day(day, wanted))
    return nights


# ---- Making --------------------------------------------------------------------------------


def run_nights(
    nights: Sequence[Night], beam_args: Sequence[str], say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Makes, checks and publishes the stages of a night, or of those of consecutive days, of which
    each kind is one job for all days; returns what was made, with the counts.

    Finds what an earlier run had done and does only the rest. Raises a CourierError, with nothing
    published, where an input, a law or a gate refuses.
    """
    settings = nights[0].settings
    options = {
        s.name: beam_options.pipeline_options(settings.beam, s.name, beam_args)
        for s in nights[0].stages
    }  # all are checked before the first stage runs
    started = time.time()
    made: set[str] = set()
    reports: list[dict[str, Any]] = [
        {"ds": str(night.ds), "run_id": night.run_id, "counts": {}, "work": {}, "seconds": {}}
        for night in nights
    ]
    with publishing.exclusive(settings.root, settings.feature_set):
        for night, report in zip(nights, reports, strict=True):
            report["counts"] |= _upstream_counts(night)
        for stages in zip(*(night.stages for night in nights), strict=True):
            before = time.monotonic()
            made |= making.make_missing(stages, options[stages[0].name], say)
            for stage, report in zip(stages, reports, strict=True):
                report["counts"] |= making.counts_of(stage)
                report["work"] |= making.work_of(stage)
                if not stage.is_published():
                    _check(stage, report["counts"], settings)
            seconds = round((time.monotonic() - before) / len(nights), 1)  # a day's share
            for report in reports:
                report["seconds"][stages[0].name] = seconds
        for night, report in zip(nights, reports, strict=True):
            if all(stage.is_published() for stage in night.stages):
                say(f"ds {night.ds}: already published from the same inputs, nothing to do")
            if made & {stage.run_id for stage in night.stages}:
                making.write_run(night, {**report, "started": started, "ended": time.time()})
            publishing.publish_night(night)
    return reports


def _upstream_counts(night: Night) -> dict[str, int]:
    """Counts of what the stages read; raises InputNotReady where it has not been made."""
    counts: dict[str, int] = {}
    for stage in night.upstream:
        counts |= making.counts_of(stage)
    return counts


def _check(stage: Stage, counts: dict[str, int], settings: Settings) -> None:
    try:
        clusters = making.clusters_of(*stage.upstream, stage)
        quality.check(stage.name, stage.input_rows, counts, settings, clusters)
    except CourierError as error:
        making.reopen(stage)  # so that mended inputs are looked at again
        raise type(error)(f"ds {stage.ds}: {error}") from error
