"""The night: everything that is made for one ds, in order, and published when all of it is good.

    catalogue + images ── EMBED ──► item_embeddings, item_rejects ── ITEM-FEATURES ──► item_features
    impressions ── HISTORIES ──► user_histories                                             │
    impressions of ds, clicks of the window ── SIMSCORE ◄───────────────────────────────────┘
                                                  └──► user_simscores

Every stage is planned before the first one runs, so that a wrong setting or a missing input is
found at once and `--dry-run` can tell what would happen. The encoder and the codebook are those of
the pin that holds for ds; the night never fits either.
"""

import datetime as dt
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from feature_jobs import storage, tables
from feature_jobs.schemas import TABLES, CourierError, OperatorError
from pipelines import beam_options, progress, quality, runs
from pipelines.config import Settings
from pipelines.plan import Night
from pipelines.runs import Stage


def run_night(night: Night, beam_args: Sequence[str], say: Callable[[str], None]) -> dict[str, Any]:
    """Makes, checks and publishes the stages of `night`; returns what was made, with the counts.

    Finds what an earlier run had done and does only the rest. Raises a CourierError, with nothing
    published, where an input, a law or a gate refuses.
    """
    settings = night.settings
    options = {
        s.name: beam_options.pipeline_options(settings.beam, s.name, beam_args)
        for s in night.stages
    }  # all are checked before the first stage runs
    started, seconds = time.time(), {}
    with runs.exclusive(settings.root, settings.feature_set):
        counts = _upstream_counts(night)
        for stage in night.stages:
            before = time.monotonic()
            if not (stage.is_published() or stage.is_staged()):
                say(f"{stage.name}: making {_names(stage)} of ds {night.ds} (run {stage.run_id})")
                with progress.watch(stage):
                    runs.make(
                        stage, partial(beam_options.run_pipeline, options=options[stage.name])
                    )
            counts |= runs.counts_of(stage)
            if not stage.is_published():
                _check(stage, counts, settings)
            seconds[stage.name] = round(time.monotonic() - before, 1)
        _publish(night, say)
        report = {"ds": str(night.ds), "run_id": night.run_id, "counts": counts, "seconds": seconds}
        _write_run(night, {**report, "started": started, "ended": time.time()})
    return report


def _upstream_counts(night: Night) -> dict[str, int]:
    """Counts of what the stages read; raises InputNotReady where it has not been made."""
    counts: dict[str, int] = {}
    for stage in night.upstream:
        counts |= runs.counts_of(stage)
    return counts


def _check(stage: Stage, counts: dict[str, int], settings: Settings) -> None:
    try:
        quality.check(stage.name, counts, settings)
    except CourierError:
        runs.reopen(stage)  # so that mended inputs are looked at again
        raise


def _publish(night: Night, say: Callable[[str], None]) -> None:
    """All tables, then the night's own record; while tables change, no record stands."""
    settings = night.settings
    record = runs.night_path(settings.root, settings.feature_set, night.ds)
    if all(stage.is_published() for stage in night.stages):
        say(f"ds {night.ds}: already published from the same inputs, nothing to do")
    else:
        storage.delete(record)
    for stage in night.stages:
        with _shared(settings):
            runs.publish(stage)
    if night.is_whole:
        parts = [stage.partition(t) for stage in night.stages for t in stage.tables]
        record_now = runs.night_record(settings.root, settings.feature_set, night.ds, parts)
        tables.write_json(record, record_now)


def _shared(settings: Settings) -> AbstractContextManager[None]:
    """Holds the tables that other feature sets publish as well."""
    return storage.lock(f"{settings.root}/shared", wait=True)


def _write_run(night: Night, report: dict[str, Any]) -> None:
    """The one place for times: everything else of a run is the same when it is run again."""
    settings = night.settings
    folder = f"{settings.root}/{settings.feature_set}/_runs/ds={night.ds}/{night.run_id}"
    tables.write_json(f"{folder}/run.json", {**report, "command": sys.argv[1:]})


def _names(stage: Stage) -> str:
    return ", ".join(table.name for table in stage.tables)


def roll_back(settings: Settings, ds: dt.date, names: Sequence[str]) -> dict[str, str]:
    """Brings back the previous version of the named tables of ds, or of all that have one.

    Returns the versions now published. Raises OperatorError for an unknown table, or where nothing
    can be brought back.
    """
    if unknown := sorted(set(names) - set(TABLES)):
        raise OperatorError(f"There is no table {unknown[0]!r}; tables are {', '.join(TABLES)}.")
    with runs.exclusive(settings.root, settings.feature_set):
        record = runs.night_path(settings.root, settings.feature_set, ds)
        storage.delete(record)
        found = {}
        for table in TABLES.values():
            folder = runs.table_folder(settings.root, settings.feature_set, table, ds)
            if table.name in names or (not names and runs.has_previous(folder)):
                with _shared(settings):
                    found[table.name] = runs.roll_back(folder)
    if not found:
        raise OperatorError(
            f"No table of ds {ds} has a previous version to bring back: each was published once."
        )
    return found
