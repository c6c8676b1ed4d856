"""Makes a shop of six days for `courier backfill`, and reads what it plans and publishes."""

import contextlib
import datetime as dt
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from feature_jobs.store import partitions
from pipelines import stages
from tests.conftest import Artefacts
from tests.support import any_order
from tests.support.any_order import COMES_LATE, Inputs, Log
from tests.support.ordered_shop import Shop
from tests.support.stub_nights import stub_jobs

DAYS = any_order.DAYS[:6]
ALL = ("--start-ds", DAYS[0], "--end-ds", DAYS[-1])
DONE, FAILED, USAGE, REFUSED, NOT_READY = 0, 1, 2, 3, 4


@contextlib.contextmanager
def six_days(folder: Path, artefacts: Artefacts) -> Iterator[Shop]:
    """Gives a shop of six days, below a folder, whose inputs are all there; nothing is made yet.

    Until the block ends, stub jobs make tables.
    """
    inputs = Inputs()
    inputs.logs[COMES_LATE] = Log()
    for later in any_order.DAYS[6:]:
        del inputs.catalogues[later], inputs.logs[later]
    (folder / "shop").mkdir()
    with stub_jobs():
        yield Shop(folder / "shop", artefacts, inputs)


def plan_of(shop: Shop, *args: object) -> dict[str, dict[str, Any]]:
    """Returns the stages of each day in a plan, by ds."""
    assert shop.run("backfill", *args, "--dry-run", "--json") == DONE, shop.told
    return {day["ds"]: day["stages"] for day in json.loads(shop.out)["plan"]["days"]}


def computed(shop: Shop, *args: object) -> list[dt.date]:
    """Returns the days of which a plan computes something."""
    days = plan_of(shop, *args)
    actions = {ds: {stage["action"] for stage in stages.values()} for ds, stages in days.items()}
    return [dt.date.fromisoformat(ds) for ds, found in actions.items() if "compute" in found]


def contents(shop: Shop) -> dict[Any, Any]:
    return {key: seen.content for key, seen in shop.seen().items()}


def run_ids(shop: Shop) -> dict[Any, str]:
    layout = shop.settings.layout
    found = {(t.name, ds): partitions.find_published(layout.folder(t, ds))
             for kind in stages.NIGHT for t in kind.tables for ds in DAYS}  # fmt: skip
    return {key: one.run_id for key, one in found.items() if one}


def whole_nights(shop: Shop) -> list[dt.date]:
    return [ds for ds in DAYS if shop.record(ds) is not None]
