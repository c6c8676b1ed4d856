"""Runs jobs below their staging folders, and seals what they made."""

import contextlib
import datetime as dt
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from feature_jobs.schemas import CourierError, Table
from feature_jobs.store import files, partitions, threads, worker_notes
from feature_jobs.store.documents import parse_json, read_json, write_json
from feature_jobs.store.partitions import STAGED
from pipelines.running import beam_options, progress
from pipelines.running.beam_options import JobOptions
from pipelines.running.locks import Locks
from pipelines.running.stage import BEGUN, PACKAGE_VERSIONS, Night, Stage

_REFUSED = "refused.json"
_OF_RECEIPT = ("counts", "work")  # what no manifest says of a single file


def make_missing(
    stages: Sequence[Stage], options: JobOptions, say: Callable[[str], None], locks: Locks
) -> set[str]:
    """Makes the stages that are not made yet, and returns their run_ids.

    Each row of consecutive days is one job.
    """
    locks.check()
    for stage in stages:
        if stage.forced:
            force(stage)
    missing = [stage for stage in stages if not stage.is_made()]
    for together in _consecutive(missing):
        _make(together, options, say, locks)
    for stage in stages:
        if stage not in missing and not stage.is_published():
            _bring_notes_up_to_date(stage, locks)
    return {stage.run_id for stage in missing}


def _bring_notes_up_to_date(stage: Stage, locks: Locks) -> None:
    """Seals what an earlier run made again where this one notes more, as what it was allowed."""
    for table in stage.tables:
        if stage.partition(table).manifest["notes"] != dict(stage.notes):
            locks.check()
            seal(stage, table)


def _consecutive(stages: Sequence[Stage]) -> list[list[Stage]]:
    found: list[list[Stage]] = []
    for stage in stages:
        if found and found[-1][-1].ds + dt.timedelta(days=1) == stage.ds:
            found[-1].append(stage)
        else:
            found.append([stage])
    return found


def _make(
    stages: Sequence[Stage], options: JobOptions, say: Callable[[str], None], locks: Locks
) -> None:
    first, last = stages[0], stages[-1]
    names = ", ".join(table.name for table in first.tables)
    days = f"ds {first.ds}" if first is last else f"ds {first.ds} to {last.ds}"
    say(f"{first.name}: making {names} of {days} (run {first.run_id})")
    with progress.watch(stages):
        run_pipeline = partial(beam_options.run_pipeline, options=options.beam)
        make(stages, run_pipeline, options.share, locks)


def make(
    stages: Sequence[Stage],
    run_pipeline: Callable[[Callable[[Any], None]], None],
    share: threads.Share,
    locks: Locks,
) -> None:
    """Runs one job for stages of consecutive days below their staging folders; seals its tables.

    Raises a worker's CourierError word for word; nothing is published in any case.
    """
    for stage in stages:
        _forget_other_content(stage)
    first = stages[0]
    try:
        run_job(lambda root: first.define(root, stages), first.staging, run_pipeline, share)
    finally:
        for stage in stages:
            stage.clean(stage)
    locks.check()
    for stage in stages:
        for table in stage.tables:
            seal(stage, table)


def run_job(
    define: Callable[[Any], None],
    staging: str,
    run_pipeline: Callable[[Callable[[Any], None]], None],
    share: threads.Share,
) -> None:
    """Runs the job that `define` wires to write below `staging`, in its `share` of the workers.

    Raises a worker's CourierError word for word.
    """
    files.delete_tree(os.path.join(staging, "errors"))
    worker_notes.share_host(staging, share)
    try:
        run_pipeline(define)
    except Exception as error:
        if found := _told(staging, error):
            raise found from error
        raise
    if errors := worker_notes.refused(staging):
        raise errors[0]


def _told(staging: str, error: Exception) -> CourierError | None:
    """Returns the CourierError that a job ended for, None where it failed for another reason.

    It is read off `error` where no worker could leave it, as when the store of the staging folder
    was away too; else it is one that was left before.
    """
    if found := worker_notes.courier_error_in(error):
        return found
    with contextlib.suppress(OSError, CourierError):
        return next(iter(worker_notes.refused(staging)), None)
    return None


def force(stage: Stage) -> None:
    """Makes the stage count as unpublished, by the first file of its staging folder.

    What a forced run that was killed had done stays.
    """
    _forget_other_content(stage)


def _forget_other_content(stage: Stage) -> None:
    """Deletes what was begun from another content of the tables upstream."""
    path = os.path.join(stage.staging, BEGUN)
    now = stage.made_from()
    begun = files.read_if_there(path)
    if begun is None or parse_json(path, begun) != now:
        files.delete_tree(stage.staging)
        write_json(path, now)


def seal(stage: Stage, table: Table) -> None:
    """Writes what a manifest will say beside the parts, after every shard has its receipt.

    What is upstream is what it was when the job began: should it have been published anew since,
    the stage counts as not made, and is made again.
    """
    folder = stage.staged_folder(table)
    parts = partitions.receipts(folder)
    if len(parts) != stage.shards:
        raise CourierError(
            f"{table.name} of ds {stage.ds} has {len(parts)} of {stage.shards} parts although its "
            f"job ended well ({folder}). The table would lack rows. Run the command again; if it "
            "happens again, delete that folder."
        )
    manifest = {
        "table": table.name,
        "ds": str(stage.ds),
        "feature_set": None if table.shared else stage.feature_set,
        "run_id": stage.run_id,
        "files": [{k: v for k, v in part.items() if k not in _OF_RECEIPT} for part in parts],
        "rows": sum(part["rows"] for part in parts),
        "counts": partitions.sum_counts(parts),
        "identities": dict(stage.identities),
        "inputs": dict(stage.inputs),
        "made_from": read_json(os.path.join(stage.staging, BEGUN)),
        "settings": dict(stage.settings),
        "notes": dict(stage.notes),
        "versions": PACKAGE_VERSIONS,
        **stage.summarise(stage.staging),
    }
    write_json(os.path.join(folder, STAGED), manifest)


def counts_of(stage: Stage) -> dict[str, int]:
    """Returns counts and rows of all tables that the stage made."""
    manifests = {table.name: stage.partition(table).manifest for table in stage.tables}
    counts = {f"{name}_rows": m["rows"] for name, m in manifests.items()}
    for manifest in manifests.values():
        counts.update(manifest["counts"])
    return counts


def clusters_of(*stages: Stage) -> dict[str, Any]:
    """Returns how items spread over clusters, by resolution; empty where no stage assigns any."""
    manifests = [stage.partition(table).manifest for stage in stages for table in stage.tables]
    found = [manifest.get("clusters", {}) for manifest in manifests]
    return {label: entry for clusters in found for label, entry in clusters.items()}


def work_of(stage: Stage) -> dict[str, float]:
    """Returns what making the tables cost, interrupted runs included; empty once published."""
    receipts = [partitions.receipts(stage.staged_folder(t)) for t in stage.tables]
    return partitions.sum_counts((part for parts in receipts for part in parts), "work")


def reopen(stage: Stage) -> None:
    """Undoes the sealing of a stage whose tables were refused, so that they are made again.

    What was expensive, the chunk files, stays.
    """
    for table in stage.tables:
        files.delete_tree(stage.staged_folder(table))


def note_refusal(stage: Stage, error: CourierError | None) -> None:
    """Notes beside what was made why it may not be published, or that it may (`error` None)."""
    path = os.path.join(stage.staging, _REFUSED)
    if error is not None:
        write_json(path, {"message": str(error)})
    elif files.exists(path):
        files.delete(path)


def refusal(staging: str) -> str | None:
    """Returns why what lies in a staging folder may not be published, None where nothing says so.

    A later run may find that it may.
    """
    path = os.path.join(staging, _REFUSED)
    found = files.read_if_there(path)
    return None if found is None else str(parse_json(path, found)["message"])


def write_run(night: Night, report: dict[str, Any]) -> None:
    """Writes what a run did, and when: all else of a run is the same when it is run again."""
    settings = night.settings
    folder = f"{settings.root}/{settings.feature_set}/_runs/ds={night.ds}/{night.run_id}"
    write_json(f"{folder}/run.json", {**report, "command": sys.argv[1:]})
