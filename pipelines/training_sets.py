"""Makes training sets: what `courier join` does, as a function.

from pipelines.config import load_settings
from pipelines.training_sets import JoinAsked, make_training_set

settings = load_settings("courier.toml")
columns = {"user_id": "uid", "item_id": "sku", "event_time": "at"}
asked = JoinAsked("ctr", "/data/ctr/dt={ds:%Y%m%d}/*.parquet", columns, label="clicked")
reports = make_training_set(settings, [dt.date(2026, 1, 9)], asked)
"""

import datetime as dt
from collections.abc import Callable, Sequence
from typing import Any

from feature_jobs.schemas import CourierError
from pipelines import nightly
from pipelines.config import Settings
from pipelines.planning import joins
from pipelines.planning.day_plan import NightOptions
from pipelines.planning.join_nights import JoinAsked
from pipelines.running.states import Night

__all__ = ["JoinAsked", "make_training_set"]


def make_training_set(
    settings: Settings,
    days: Sequence[dt.date],
    asked: JoinAsked,
    beam_args: Sequence[str] = (),
    say: Callable[[str], None] = lambda _: None,
    remake: bool = False,
) -> list[dict[str, Any]]:
    """Joins the samples of ascending days and publishes the set; returns what there is of each day.

    What is there already, from the same inputs, stays. `beam_args` are Beam's own options, `say` is
    told of what an operator should know. Raises a CourierError, with nothing published of the day:
    InputNotReady where samples, a night, the log or its histories are not there yet, OperatorError
    for what never is right, DataContractError for samples that break their contract.
    """
    nights = joins.plan_joins(settings, days, asked, say, NightOptions(remake=remake))
    reports, errors = make_planned(nights, beam_args, say)
    for error in errors:
        raise error
    return reports


def make_planned(
    nights: Sequence[Night], beam_args: Sequence[str], say: Callable[[str], None]
) -> tuple[list[dict[str, Any]], list[CourierError]]:
    """Makes days that `joins.plan_joins` has planned; returns what there is, and what refused."""
    reports, refused = nightly.make_nights(nights, beam_args, say)
    for path in joins.hand_over(nights):
        say(f"join: the configuration for the framework is {path}")
    return reports, [one.error for one in refused]
