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
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from feature_jobs.schemas import TABLES, CourierError, OperatorError
from feature_jobs.store import files, tables
from pipelines.config import Settings
from pipelines.plan import Night
from pipelines.running import beam_options, progress, quality, runs
from pipelines.running.runs import Stage


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
    with runs.exclusive(settings.root, settings.feature_set):
        for night, report in zip(nights, reports, strict=True):
            report["counts"] |= _upstream_counts(night)
        for stages in zip(*(night.stages for night in nights), strict=True):
            before = time.monotonic()
            made |= _make_missing(stages, options[stages[0].name], say)
            for stage, report in zip(stages, reports, strict=True):
                report["counts"] |= runs.counts_of(stage)
                report["work"] |= runs.work_of(stage)
                if not stage.is_published():
                    _check(stage, report["counts"], settings)
            seconds = round((time.monotonic() - before) / len(nights), 1)  # a day's share
            for report in reports:
                report["seconds"][stages[0].name] = seconds
        for night, report in zip(nights, reports, strict=True):
            if all(stage.is_published() for stage in night.stages):
                say(f"ds {night.ds}: already published from the same inputs, nothing to do")
            if made & {stage.run_id for stage in night.stages}:
                _write_run(night, {**report, "started": started, "ended": time.time()})
            _publish(night)
    return reports


def _make_missing(stages: Sequence[Stage], options: Any, say: Callable[[str], None]) -> set[str]:
    """Makes those that are not made yet, with one job for each row of consecutive days; returns
    their run_ids."""
    for stage in stages:
        if stage.forced:
            runs.force(stage)
    missing = [stage for stage in stages if not stage.is_made()]
    for together in _consecutive(missing):
        _make(together, options, say)
    return {stage.run_id for stage in missing}


def _consecutive(stages: Sequence[Stage]) -> list[list[Stage]]:
    found: list[list[Stage]] = []
    for stage in stages:
        if found and found[-1][-1].ds + dt.timedelta(days=1) == stage.ds:
            found[-1].append(stage)
        else:
            found.append([stage])
    return found


def _make(stages: Sequence[Stage], options: Any, say: Callable[[str], None]) -> None:
    first, last = stages[0], stages[-1]
    names = ", ".join(table.name for table in first.tables)
    days = f"ds {first.ds}" if first is last else f"ds {first.ds} to {last.ds}"
    say(f"{first.name}: making {names} of {days} (run {first.run_id})")
    with progress.watch(stages):
        runs.make(stages, partial(beam_options.run_pipeline, options=options))


def _upstream_counts(night: Night) -> dict[str, int]:
    """Counts of what the stages read; raises InputNotReady where it has not been made."""
    counts: dict[str, int] = {}
    for stage in night.upstream:
        counts |= runs.counts_of(stage)
    return counts


def _check(stage: Stage, counts: dict[str, int], settings: Settings) -> None:
    try:
        clusters = runs.clusters_of(*stage.upstream, stage)
        quality.check(stage.name, stage.input_rows, counts, settings, clusters)
    except CourierError as error:
        runs.reopen(stage)  # so that mended inputs are looked at again
        raise type(error)(f"ds {stage.ds}: {error}") from error


def _publish(night: Night) -> None:
    """All tables, then the night's own record, which is wrong and so "not ready" until then."""
    settings = night.settings
    for stage in night.stages:
        with _shared(settings):
            runs.publish(stage)
    root, feature_set = settings.root, settings.feature_set
    before = runs.read_night(root, feature_set, night.ds)
    if night.is_whole or (before and _goes_into(night, before)):
        folders = [stage.folder(table) for stage in night.stages for table in stage.tables]
        if before:
            folders += [os.path.join(root, entry["path"]) for entry in before["tables"].values()]
        parts = [tables.open_published(folder) for folder in dict.fromkeys(folders)]
        earlier = before and {**before, "before": None}  # one step back is kept, not all
        record = runs.night_record(root, feature_set, night.ds, parts, earlier)
        if before is None or before["tables"] != record["tables"]:
            tables.write_json(runs.night_path(root, feature_set, night.ds), record)


def _goes_into(night: Night, record: dict[str, Any]) -> bool:
    """Whether the stages of `night` take the place of those in the record of a whole night: nothing
    of the same ds reads what they make, and the rest is as it was."""
    made = {table.name for stage in night.stages for table in stage.tables}
    folders = {
        os.path.join(night.settings.root, entry["path"]): entry["version"]
        for name, entry in record["tables"].items()
        if name not in made
    }
    return {stage.name for stage in night.stages} <= {"histories", "simscore"} and all(
        tables.is_published(folder) and tables.open_published(folder).manifest["version"] == version
        for folder, version in folders.items()
    )


def _shared(settings: Settings) -> AbstractContextManager[None]:
    """Holds the tables that other feature sets publish as well."""
    return files.lock(f"{settings.root}/shared", wait=True)


def _write_run(night: Night, report: dict[str, Any]) -> None:
    """The one place for times: everything else of a run is the same when it is run again."""
    settings = night.settings
    folder = f"{settings.root}/{settings.feature_set}/_runs/ds={night.ds}/{night.run_id}"
    tables.write_json(f"{folder}/run.json", {**report, "command": sys.argv[1:]})


def roll_back(settings: Settings, ds: dt.date) -> dict[str, str]:
    """Brings back the night of ds that was whole before the present one; returns its versions.

    Tables that other feature sets share stay as they are. The record is changed first: until every
    table is what it names, the night is "not ready", and the same command goes on after a kill.
    Raises OperatorError, with nothing changed, where a version is not kept.
    """
    root, feature_set = settings.root, settings.feature_set
    with runs.exclusive(root, feature_set):
        record = runs.read_night(root, feature_set, ds)
        if record and runs.is_whole_night(root, feature_set, ds):
            record = _turned(record)
        wanted = _own_versions(record, root) if record else {}
        if not wanted or not all(runs.has_version(f, v) for f, v in wanted.items()):
            raise OperatorError(
                f"There is no earlier night of ds {ds} to bring back: it was published once, or "
                "the version before is not kept any more. What is published stays as it is."
            )
        tables.write_json(runs.night_path(root, feature_set, ds), record)
        for folder, version in wanted.items():
            runs.bring_back(folder, version)
    return {os.path.relpath(folder, root): version for folder, version in wanted.items()}


def _turned(record: dict[str, Any]) -> dict[str, Any] | None:
    """The record of the night before, with the present one as the one before that."""
    if not record["before"]:
        return None
    own = {k: v for k, v in record["before"]["tables"].items() if not TABLES[k].shared}
    return {
        **record["before"],
        "tables": {**record["tables"], **own},
        "before": {**record, "before": None},
    }


def _own_versions(record: dict[str, Any], root: str) -> dict[str, str]:
    """The versions that a record names, by folder, of the tables that no other set shares."""
    return {
        os.path.join(root, entry["path"]): entry["version"]
        for name, entry in record["tables"].items()
        if not TABLES[name].shared
    }
