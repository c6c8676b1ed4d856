"""Runs jobs below their staging folders, and seals what they made."""

import contextlib
import datetime as dt
import os
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from feature_jobs.schemas import CourierError, DataContractError, Table
from feature_jobs.store import broadcast, faults, files, partitions, threads, usage, worker_notes
from feature_jobs.store.documents import parse_json, write_json
from feature_jobs.store.partitions import STAGED
from feature_jobs.store.versions import PACKAGE_VERSIONS
from pipelines.running import cluster_jobs, progress, states
from pipelines.running.beam_options import JobOptions, is_for_jar
from pipelines.running.cluster_jobs import Job, JobFailed
from pipelines.running.gates import counts_of as counts_of_table
from pipelines.running.layout import days_of_job
from pipelines.running.locks import Locks
from pipelines.running.stage import Planned, Stage
from pipelines.running.states import PUBLISHED, Look, Night

# What no manifest says of a single file.
_OF_RECEIPT = ("counts", "histograms", "examples", "work", "made_from")


@dataclass
class Made:
    """Tells of the stages that were made why they were, by run_id, and which inputs refused."""

    why: dict[str, tuple[str, ...]] = field(default_factory=dict)
    refused: list[tuple[Planned, CourierError]] = field(default_factory=list)


def make_missing(
    planned: Sequence[Planned], options: JobOptions, say: Callable[[str], None], locks: Locks
) -> Made:
    """Makes the stages of one kind that are not made yet.

    Each row of consecutive days is one job. Where it ends since an input breaks its contract, days
    are made apart, so that those before it are made.
    """
    locks.check()
    _end_left(planned, say)
    look, made = Look(), Made()
    why = {one.stage.run_id: look.state(one.stage).why for one in planned}
    if forced := [one.stage for one in planned if one.stage.forced]:
        begun = Look()
        for stage in forced:
            states.begin(stage, why[stage.run_id], begun)
        look = Look()  # what is published of them counts for nothing now
    is_made = [look.state(one.stage).is_made for one in planned]
    missing = [one for one, there in zip(planned, is_made, strict=True) if not there]
    for one in missing:
        if any(look.staged(one.stage, table) for table in one.stage.tables):
            states.reopen(one.stage)  # it goes on from what is another by now
        made.why[one.stage.run_id] = why[one.stage.run_id]
    for together in _consecutive(missing):
        made.refused += _make_or_part(together, made, options, say, locks)
    for one, there in zip(planned, is_made, strict=True):
        if there and look.state(one.stage).name != PUBLISHED:
            _bring_notes_up_to_date(one, look, locks)
    return made


def _end_left(planned: Sequence[Planned], say: Callable[[str], None]) -> None:
    """Ends jobs of these days that killed commands left: they write where these are to be made."""
    if not planned:
        return
    layout, kind = planned[0].stage.layout, planned[0].stage.kind
    top, days = layout.kind_folder(kind), [one.stage.ds for one in planned]
    for name in files.list_names(top):
        ends, folder = days_of_job(name), os.path.join(top, name)
        if ends and any(ends[0] <= day <= ends[1] for day in days):
            for attempt in [os.path.join(folder, name) for name in files.list_names(folder)]:
                cluster_jobs.end_left(attempt, say)
                if not (cluster_jobs.is_left(attempt) or cluster_jobs.is_in_jar(attempt)):
                    files.delete_tree(attempt)


def _make_or_part(
    planned: Sequence[Planned], made: Made, options: JobOptions, say: Callable[[str], None],
    locks: Locks,
) -> list[tuple[Planned, CourierError]]:  # fmt: skip
    """Makes consecutive days in one job, or where that is refused in two; returns what is refused.

    Days that go on from a refused one are not tried. A job in a jar is the one of all its days.
    """
    try:
        _make(planned, made, options, say, locks)
        return []
    except DataContractError as error:
        if len(planned) == 1 or is_for_jar(options):
            return [(one, error) for one in planned]
        say(f"{planned[0].stage.name}: a day is refused, so that days are made apart: {error}")
    middle = len(planned) // 2
    refused = _make_or_part(planned[:middle], made, options, say, locks)
    without = {one.stage.run_id for one, _ in refused}
    rest = []
    for one in planned[middle:]:
        if without & {reference.run_id for reference in one.stage.before}:
            without.add(one.stage.run_id)
        else:
            rest.append(one)
    return refused + (_make_or_part(rest, made, options, say, locks) if rest else [])


def _bring_notes_up_to_date(one: Planned, look: Look, locks: Locks) -> None:
    """Seals what an earlier run made again where this one notes more, as what it was allowed."""
    for table, found in zip(one.stage.tables, look.made(one.stage), strict=True):
        if found.manifest["notes"] != dict(one.stage.notes):
            locks.check()
            seal(one, table, Look())


def _consecutive(planned: Sequence[Planned]) -> list[list[Planned]]:
    """Returns days in a row, cut where they cannot be one job."""
    found: list[list[Planned]] = []
    for one in planned:
        last = found[-1][-1] if found else None
        follows = last and last.stage.ds + dt.timedelta(days=1) == one.stage.ds
        if last and follows and one.continues(last):
            found[-1].append(one)
        else:
            found.append([one])
    return found


def _make(
    planned: Sequence[Planned], made: Made, options: JobOptions, say: Callable[[str], None],
    locks: Locks,
) -> None:  # fmt: skip
    first, last = planned[0].stage, planned[-1].stage
    names = ", ".join(table.name for table in first.tables)
    days = f"ds {first.ds} (run {first.run_id})"
    if first is not last:
        days = f"ds {first.ds} to {last.ds}"
    say(f"{first.name}: making {names} of {days}")
    name, folder = f"{first.name}-{first.ds}-{first.run_id}", job_folder(planned)
    begin(planned, made.why)
    ran = _ran_from_jar(planned, folder)
    attempt = ran or os.path.join(folder, secrets.token_hex(4))
    job = Job(name, options.beam, attempt, progress.above_bar(say))
    with progress.watch([one.stage for one in planned], attempt, job):
        run = _nothing_to_run if ran else job.run
        make(planned, attempt, run, options.share, locks)
    files.delete_tree(folder)


def begin(planned: Sequence[Planned], why: Mapping[str, Sequence[str]]) -> None:
    """Notes of stages, by `states.begin`, that they are to be made; `why` by their run_ids."""
    before = Look()
    for one in planned:
        states.begin(one.stage, why.get(one.stage.run_id, ()), before)


def _ran_from_jar(planned: Sequence[Planned], folder: str) -> str | None:
    """Returns the attempt whose job was written into a jar and has made all parts since, if any.

    Raises the CourierError that one ended for, as Spark and Flink don't: to them it ended well. Any
    other is given up: the next attempt goes on with what it has finished.
    """
    for attempt in [os.path.join(folder, name) for name in files.list_names(folder)]:
        if not cluster_jobs.is_in_jar(attempt):
            continue
        try:
            is_made = worker_notes.has_begun(attempt) and _is_made(planned, attempt)
        except CourierError:
            _give_up(planned, attempt)
            raise
        if is_made:
            return attempt
        _give_up(planned, attempt)
    return None


def _give_up(planned: Sequence[Planned], attempt: str) -> None:
    """Deletes an attempt whose job was written into a jar, and may go on."""
    if worker_notes.has_begun(attempt):
        _reopen_uncounted(planned)
    files.delete_tree(attempt)


def _nothing_to_run(_: Callable[[Any], None]) -> None:
    """Runs no job, where another has made all."""


def job_folder(planned: Sequence[Planned]) -> str:
    """Returns the folder of the one job of `planned`, which lies in no day's staging.

    Each attempt at the job has a folder below it. Workers of an earlier one may live on, on a host
    that was cut off, say: what they still tell, and write for others, is none of the next one's.
    """
    first, stages = planned[0].stage, [one.stage for one in planned]
    days, run_ids = [one.ds for one in stages], [one.run_id for one in stages]
    return first.layout.job_folder(first.kind, days, run_ids)


def make(
    planned: Sequence[Planned],
    attempt: str,
    run_pipeline: Callable[[Callable[[Any], None]], None],
    share: threads.Share,
    locks: Locks,
) -> None:
    """Runs one job for stages of consecutive days, which are begun; seals its tables.

    `attempt` is a folder that no job had before, unless `run_pipeline` runs none since that one has
    made all. Raises a worker's CourierError word for word; nothing is published in any case.
    """
    kind = type(planned[0])
    try:
        run_job(
            lambda root: kind.wire(root, planned, attempt), attempt, run_pipeline, share,
            planned[0].stage.layout.row_group_bytes,
        )  # fmt: skip
        if worker_notes.are_elsewhere(attempt):
            _is_made(planned, attempt)  # of what lacks then it is told where it is sealed
    except CourierError:
        with contextlib.suppress(OSError, CourierError):  # which would hide what the job ended for
            if worker_notes.refused(attempt) and worker_notes.are_elsewhere(attempt):
                _reopen_uncounted(planned)
        raise
    finally:
        for one in planned:
            _discard_copies(one, attempt)
    locks.check()
    look = Look()  # each day is sealed when the look comes to it, for the day after
    for one in planned:
        for table in one.stage.tables:
            seal(one, table, look)


def _is_made(planned: Sequence[Planned], attempt: str) -> bool:
    """Returns whether every part has its receipt, and workers told the rest.

    A shared folder may show that late here: it is waited for. Raises a worker's CourierError that
    it shows meanwhile.
    """

    def is_made() -> bool:
        if errors := worker_notes.refused(attempt):
            raise errors[0]
        return all(
            states.shards_done(one.stage) >= one.stage.shards and one.all_is_told()
            for one in planned
        )

    return faults.until_shown(is_made)


def _reopen_uncounted(planned: Sequence[Planned]) -> None:
    """Lets parts be made again whose rows nobody counts, after a worker refused an element.

    Other hosts may have seen that late, and gone on without its rows.
    """
    for one in planned:
        if not one.came_in():
            states.reopen(one.stage)


def _discard_copies(one: Planned, folder: str) -> None:
    """Deletes the copies that a job left on this machine.

    What cannot be deleted stays, and keeps no other: it would hide what the job ended for.
    """
    keys: Sequence[str] = ()
    with contextlib.suppress(OSError, CourierError):
        keys = one.copies(folder)
    for key in keys:
        with contextlib.suppress(OSError, CourierError):
            broadcast.discard(key)


def run_job(
    define: Callable[[Any], None],
    staging: str,
    run_pipeline: Callable[[Callable[[Any], None]], None],
    share: threads.Share,
    row_group_bytes: int = partitions.ROW_GROUP_BYTES,
) -> None:
    """Runs the job that `define` wires to write below `staging`, in its `share` of the workers.

    No job wrote there before: what workers tell below it is of this one. Row groups that it writes
    have at most `row_group_bytes`. Adds what its workers used to what this process did (`usage`).
    Raises a worker's CourierError word for word.
    """
    worker_notes.tell(staging, share, row_group_bytes)
    try:
        run_pipeline(define)
    except Exception as error:
        if found := _told(staging, error):
            raise found from error
        raise
    finally:
        with contextlib.suppress(OSError, CourierError):  # which would hide what the job ended for
            usage.add(worker_notes.used_by_workers(staging))
    if errors := worker_notes.refused(staging):
        raise errors[0]


def _told(staging: str, error: Exception) -> CourierError | None:
    """Returns the CourierError that a job ended for, None where it failed for another reason.

    It is read off `error` where no worker could leave it, as when the store of the staging folder
    was away too; else it is one that was left before.
    """
    led = error.__cause__ if isinstance(error, JobFailed) else error
    if led and (found := worker_notes.courier_error_in(led)):
        return found
    with contextlib.suppress(OSError, CourierError):
        return next(iter(worker_notes.refused(staging)), None)
    return None


def seal(one: Planned, table: Table, look: Look) -> None:
    """Writes what a manifest will say beside the parts, after every shard has its receipt.

    `look` has not seen the stage, nor what it goes on from before that was sealed. Raises
    DataContractError where rows were lost on the way to the parts; they are made again then.
    """
    stage = one.stage
    folder = states.staged_folder(stage, table)
    parts = partitions.receipts(folder)
    if len(parts) != stage.shards:
        raise CourierError(
            f"{table.name} of ds {stage.ds} has {len(parts)} of {stage.shards} parts although its "
            f"job ended well ({folder}). The table would lack rows. Run the command again; if it "
            "happens again, delete that folder."
        )
    counts, rows = partitions.sum_counts(parts), sum(part["rows"] for part in parts)
    if table is stage.tables[0]:
        _check_all_reached(one, counts)
    made = parts
    if table is not stage.tables[0] or not rows:  # the shards are as many as the first one needs
        partitions.limit_row_groups(stage.layout.row_group_bytes)
        made = partitions.fold(folder, table, parts)
    manifest = {
        "table": table.name,
        "ds": str(stage.ds),
        "feature_set": None if table.shared else stage.layout.feature_set,
        "run_id": stage.run_id,
        "files": [{k: v for k, v in part.items() if k not in _OF_RECEIPT} for part in made],
        "rows": rows,
        "shards": stage.shards,
        "counts": counts,
        "histograms": partitions.sum_histograms(parts),
        "examples": partitions.first_examples(parts),
        "identities": dict(stage.identities),
        "inputs": dict(stage.inputs),
        "made_from": states.made_from(stage, look),
        "settings": dict(stage.settings),
        "notes": dict(stage.notes),
        "versions": PACKAGE_VERSIONS,
        **one.summarise(),
        **({"gates": []} if table is stage.tables[0] else {}),  # until they have something to say
    }
    write_json(os.path.join(folder, STAGED), manifest)


def note_gates(stage: Stage, findings: Sequence[Mapping[str, Any]]) -> None:
    """Writes what gates found of a staged stage into the manifest of its first table."""
    folder = states.staged_folder(stage, stage.tables[0])
    staged = partitions.find_staged(folder)
    if staged and staged.manifest.get("gates") != list(findings):
        write_json(os.path.join(folder, STAGED), {**staged.manifest, "gates": list(findings)})


def _check_all_reached(one: Planned, counts: Mapping[str, int]) -> None:
    for name, expected in one.came_in().items():
        if counts.get(name, 0) != expected:
            states.reopen(one.stage)  # else the next run would trust the parts
            raise DataContractError(
                f"{one.stage.name} of ds {one.stage.ds}: {counts.get(name, 0):,} of {expected:,} "
                f"{name} reached its tables. The runner lost rows without an error, or doubled "
                "some; nothing was published, and the parts that were made are thrown away. Run "
                "the command again; if it happens again, run it on this machine (without --runner) "
                "and report it."
            )


def counts_of(stage: Stage, look: Look) -> dict[str, int]:
    """Returns counts and rows of all tables that the stage made."""
    counts: dict[str, int] = {}
    for partition in look.made(stage):
        counts |= counts_of_table(partition.manifest)
    return counts


def work_of(stage: Stage) -> dict[str, float]:
    """Returns what making the tables cost, interrupted runs included; empty once published."""
    receipts = [partitions.receipts(states.staged_folder(stage, t)) for t in stage.tables]
    return partitions.sum_counts((part for parts in receipts for part in parts), "work")


def write_run(
    night: Night, report: Mapping[str, Any], started: dt.datetime, is_published: bool = True
) -> None:
    """Writes what a run did, and when: all else of a run is the same when it is run again.

    It is run.json, or refused.json where nothing was published. What a stage cost stays where an
    earlier run had made it.
    """
    folder = os.path.join(night.settings.layout.runs_folder(night.ds), night.run_id)
    run, refused = (os.path.join(folder, name) for name in ("run.json", "refused.json"))
    earlier = _stages_of(run) | _stages_of(refused)
    stages = {
        name: stage if "wall_seconds" in stage else {**earlier.get(name, {}), **_nonempty(stage)}
        for name, stage in report["stages"].items()
    }
    told = {
        "started": started.isoformat(timespec="milliseconds"),
        "ended": dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds"),
        "command": sys.argv[1:],
        "versions": PACKAGE_VERSIONS,
    }
    write_json(run if is_published else refused, {**report, "stages": stages, **told})
    if is_published:
        files.delete(refused)


def _stages_of(path: str) -> dict[str, Any]:
    """Returns what an earlier run noted of its stages; nothing where there is none."""
    found = files.read_if_there(path)
    return dict(parse_json(path, found)["stages"]) if found else {}


def _nonempty(stage: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in stage.items() if value}
