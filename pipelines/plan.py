"""What a night, or a stage outside it, will do, found out before any of it is done.

Settings, artefacts and inputs are opened and checked here, by footers and manifests alone. Each
stage then knows all that it depends on, and with that its `run_id`.
"""

import datetime as dt
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from feature_jobs.store import tables
from pipelines.config import STAGES, Settings
from pipelines.planning.day_plan import DayPlan, NightOptions
from pipelines.planning.impressions import plan_histories, plan_simscore, plan_training_rows
from pipelines.planning.items import plan_embed, plan_item_features
from pipelines.running.runs import Stage

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


@dataclass(frozen=True)
class Night:
    """The stages of one ds that were asked for, in order, and those they read from."""

    settings: Settings
    ds: dt.date
    stages: tuple[Stage, ...]
    upstream: tuple[Stage, ...]

    @property
    def is_whole(self) -> bool:
        return {stage.name for stage in self.stages} == set(STAGES)

    @property
    def run_id(self) -> str:
        return tables.digest([stage.run_id for stage in self.stages])[:12]

    def stage(self, name: str) -> Stage | None:
        """The one of that name that was asked for."""
        return next((stage for stage in self.stages if stage.name == name), None)


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
