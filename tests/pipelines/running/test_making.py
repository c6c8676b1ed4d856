"""Jobs that fail: the error that led to it is told, and what they made is sealed or not."""

import contextlib
import datetime as dt
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from feature_jobs.schemas import (
    ITEM_EMBEDDINGS,
    ITEM_REJECTS,
    CourierError,
    DataContractError,
    StorageUnavailable,
    Table,
)
from feature_jobs.store import (
    broadcast,
    documents,
    faults,
    hashing,
    partitions,
    usage,
    worker_notes,
)
from feature_jobs.store.partitions import Partition
from feature_jobs.store.threads import Share
from pipelines.running import cluster_jobs, making, states
from pipelines.running.beam_options import JobOptions, pipeline_options
from pipelines.running.cluster_jobs import JobFailed, NotRun
from pipelines.running.layout import Layout
from pipelines.running.locks import Locks
from pipelines.running.stage import Planned, Stage
from pipelines.running.states import Look
from pipelines.stages import EMBED
from tests.support import stand_in_clusters
from tests.support.sleeping import instead_of_sleep
from tests.support.small_nights import JustAStage
from tests.support.stand_in_clusters import Jobs, States
from tests.support.table_rows import embeddings
from tests.support.world import DAYS


def stage_of(root: Path, shards: int = 1) -> JustAStage:
    stage = Stage(
        EMBED, dt.date(2026, 3, 1), Layout(str(root), "test", str(root)), shards, inputs={},
        identities={}, settings={},
    )  # fmt: skip
    return JustAStage(stage)


def make(planned: Sequence[Planned], attempt: str, run: Callable, *others: Any) -> None:
    """Makes stages that are begun for it."""
    making.begin(planned, {})
    making.make(planned, attempt, run, *others)


AWAY = "gs://b/x could not be reached. Try again."
TRACEBACK = f"""Traceback (most recent call last):
  File "x.py", line 7, in process
feature_jobs.schemas.StorageUnavailable: {AWAY}

During handling of the above exception, another exception occurred:

feature_jobs.schemas.StorageUnavailable: gs://b/errors/y could not be [while running 'ParDo(X)']
"""


@pytest.mark.parametrize("how", ["itself", "cause", "context", "text"])
def test_of_a_job_that_fails_the_error_that_led_to_it_is_told(tmp_path: Path, how: str) -> None:
    def fail(_: Callable) -> None:
        if how == "text":  # of a worker in another process
            raise RuntimeError(TRACEBACK)
        try:
            raise StorageUnavailable(AWAY)
        except StorageUnavailable as error:
            if how == "itself":
                raise
            if how == "cause":
                raise RuntimeError("Beam failed") from error
            raise StorageUnavailable("gs://b/x [while running 'ParDo(X)']")  # noqa: B904

    with pytest.raises(StorageUnavailable) as told:
        make([stage_of(tmp_path)], str(tmp_path), fail, Share(), Locks())
    assert str(told.value) == AWAY


def test_of_a_job_that_fails_what_was_left_before_is_told(tmp_path: Path) -> None:
    planned = [stage_of(tmp_path)]

    def leave(_: Callable) -> None:
        left = {"kind": "DataContractError", "message": "two rows of item 3"}
        documents.write_json(f"{tmp_path}/attempt/errors/x.json", left)
        raise RuntimeError("Beam failed")

    with pytest.raises(DataContractError, match="two rows of item 3"):
        make(planned, f"{tmp_path}/attempt", leave, Share(), Locks())


def test_a_job_that_fails_for_another_reason_fails_with_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Callable) -> None:
        def away(_: str) -> None:
            raise StorageUnavailable(AWAY)

        monkeypatch.setattr(worker_notes, "refused", away)
        raise RuntimeError("Beam failed")

    with pytest.raises(RuntimeError, match="Beam failed"):
        make([stage_of(tmp_path)], str(tmp_path), fail, Share(), Locks())


def begin(attempt: str, elsewhere: bool) -> None:
    """Begins with an element of a job in this process, or also in another one."""
    worker_notes.check_in(attempt)
    if elsewhere:
        documents.write_json(f"{attempt}/begun/x", {})


class Counted(JustAStage):
    """Is a stage that knows how much is to come in."""

    def came_in(self) -> dict[str, int]:
        return {"impressions": 1}


@pytest.mark.parametrize("elsewhere", [True, False])
@pytest.mark.parametrize("kind", [JustAStage, Counted])
@pytest.mark.parametrize("error", [DataContractError("a bad row"), JobFailed("a host was lost")])
def test_parts_whose_rows_nobody_counts_are_not_trusted_after_a_refusal_on_other_hosts(
    tmp_path: Path, elsewhere: bool, kind: type[JustAStage], error: CourierError
) -> None:
    planned = kind(stage_of(tmp_path).stage)

    def run(_: Callable) -> None:
        begin(f"{tmp_path}/attempt", elsewhere)
        if not isinstance(error, JobFailed):
            left = {"kind": type(error).__name__, "message": str(error)}
            documents.write_json(f"{tmp_path}/attempt/errors/x.json", left)
        for table in planned.stage.tables:
            folder, schema = states.staged_folder(planned.stage, table), table.schema(pa.int64())
            partitions.write_part(folder, table, schema, schema.empty_table(), 0, 1)
        raise error

    with pytest.raises(type(error), match=str(error)):
        make([planned], f"{tmp_path}/attempt", run, Share(), Locks())
    is_kept = not elsewhere or kind is Counted or isinstance(error, JobFailed)
    assert states.shards_done(planned.stage) == is_kept


def test_parts_are_kept_where_the_next_job_could_not_be_sent(tmp_path: Path) -> None:
    """Nothing is known of its workers then, but they were none."""
    planned = stage_of(tmp_path, shards=2)

    def run_one_shard(_: Callable) -> None:
        for table in planned.stage.tables:
            folder, schema = states.staged_folder(planned.stage, table), table.schema(pa.int64())
            partitions.write_part(folder, table, schema, schema.empty_table(), 0, 2)
        raise JobFailed("the cluster was lost")

    def send(_: Callable) -> None:
        raise CourierError("Flink does not answer")

    for run in (run_one_shard, send):
        with pytest.raises(CourierError):
            make([planned], f"{tmp_path}/{run.__name__}", run, Share(), Locks())
        assert states.shards_done(planned.stage) == 1


class WithCopies(JustAStage):
    """Is a stage whose job left copies on this machine."""

    def copies(self, folder: str) -> list[str]:
        if self.stage.ds == DAYS[1]:
            raise StorageUnavailable(AWAY)
        return [f"{self.stage.ds}-{number}" for number in range(3)]


@pytest.mark.parametrize("error", [StorageUnavailable(AWAY), PermissionError("not yours")])
def test_a_copy_that_cannot_be_deleted_keeps_no_other_and_hides_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    asked = list[str]()

    def discard(key: str) -> None:
        asked.append(key)
        raise error

    def fail(_: Callable) -> None:
        raise RuntimeError("Beam failed")

    monkeypatch.setattr(broadcast, "discard", discard)
    planned = [WithCopies(replace(stage_of(tmp_path).stage, ds=ds)) for ds in DAYS[:3]]
    with pytest.raises(RuntimeError, match="Beam failed"):
        make(planned, str(tmp_path), fail, Share(), Locks())
    assert asked == [f"{ds}-{number}" for ds in (DAYS[0], DAYS[2]) for number in range(3)]


def test_receipts_that_come_late_from_other_hosts_are_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = stage_of(tmp_path, shards=2)
    late = [(table, shard) for table in planned.stage.tables for shard in range(2)]

    def write(*_: object) -> None:
        if late:
            table, shard = late.pop()
            folder, schema = states.staged_folder(planned.stage, table), table.schema(pa.int64())
            partitions.write_part(folder, table, schema, schema.empty_table(), shard, 2)

    def run(_: Callable) -> None:
        begin(f"{tmp_path}/attempt", elsewhere=True)
        write()

    instead_of_sleep(monkeypatch, faults, write)
    make([planned], f"{tmp_path}/attempt", run, Share(), Locks())
    assert not late
    assert Look().state(planned.stage).name == states.STAGED


@pytest.mark.parametrize("anew", ["reopened", "other versions"])
def test_what_a_worker_of_before_writes_late_is_of_no_table_that_was_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, anew: str
) -> None:
    planned = stage_of(tmp_path)
    states.begin(planned.stage, (), Look())
    before = [states.staged_folder(planned.stage, table) for table in planned.stage.tables]
    if anew == "reopened":
        states.reopen(planned.stage)
    else:
        monkeypatch.setattr(states, "PACKAGE_VERSIONS", {"torch": "2"})

    def write(folders: list[str]) -> None:
        for folder, table in zip(folders, planned.stage.tables, strict=True):
            schema = table.schema(pa.int64())
            counts = {"of before": int(folders is before)}
            partitions.write_part(folder, table, schema, schema.empty_table(), 0, 1, counts)

    def run(_: Callable) -> None:
        write([states.staged_folder(planned.stage, table) for table in planned.stage.tables])
        write(before)

    make([planned], f"{tmp_path}/attempt", run, Share(), Locks())
    first, _ = Look().made(planned.stage)
    assert first.manifest["counts"] == {"of before": 0}
    states.reopen(planned.stage)
    write(before)
    assert Look().state(planned.stage).name == states.ABSENT


@pytest.mark.parametrize("elsewhere", [True, False])
def test_receipts_that_do_not_come_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: bool
) -> None:
    waited = list[float]()

    def run(_: Callable) -> None:
        begin(f"{tmp_path}/attempt", elsewhere)

    monkeypatch.setattr(faults, "LATE_SECONDS", 0.01)
    instead_of_sleep(monkeypatch, faults, waited.append)
    with pytest.raises(CourierError, match="has 0 of 1 parts although its job ended well"):
        make([stage_of(tmp_path)], f"{tmp_path}/attempt", run, Share(), Locks())
    assert bool(waited) == elsewhere


def test_a_manifest_tells_the_histograms_and_examples_of_all_parts(tmp_path: Path) -> None:
    planned = stage_of(tmp_path, shards=2)
    counted = [({"x": np.array([1, 2])}, {"bad": [4]}), ({"x": np.array([0, 5, 1])}, {"bad": [2]})]
    table = planned.stage.tables[0]
    states.begin(planned.stage, (), states.Look())
    folder, schema = states.staged_folder(planned.stage, table), table.schema(pa.int64())
    for shard, (histograms, examples) in enumerate(counted):
        partitions.write_part(
            folder, table, schema, schema.empty_table(), shard, 2, histograms=histograms,
            examples=examples,
        )  # fmt: skip
    making.seal(planned, table, Look())
    made = partitions.find_staged(folder)
    assert made is not None
    assert made.manifest["histograms"] == {"x": [1, 7, 1]}
    assert made.manifest["examples"] == {"bad": [4, 2]}
    assert set(made.manifest["files"][0]) == {"name", "rows", "bytes", "sha256"}


def test_a_manifest_that_gates_have_nothing_to_say_of_is_written_once(tmp_path: Path) -> None:
    made, _ = sealed(tmp_path, 20, 6)
    path, stage = Path(made.folder, partitions.STAGED), stage_of(tmp_path, shards=4).stage
    written = path.stat()
    making.note_gates(stage, [])
    assert path.stat() == written
    assert list(made.manifest)[-1] == "gates"
    making.note_gates(stage, [{"gate": "churn"}])
    assert documents.read_json(str(path)) == made.manifest | {"gates": [{"gate": "churn"}]}


@pytest.mark.parametrize("fails", [False, True])
def test_what_workers_used_is_added(tmp_path: Path, fails: bool) -> None:
    def leave(name: str, requests: int) -> None:
        documents.write_json(f"{tmp_path}/usage/{name}.json", {"bucket_requests": requests})

    def run(_: Callable) -> None:
        leave("one", 20)
        leave("other", 3)
        if fails:
            raise RuntimeError("Beam failed")

    usage.take()
    with pytest.raises(RuntimeError) if fails else contextlib.nullcontext():
        making.run_job(lambda _: None, str(tmp_path), run, Share())
    assert usage.take().bucket_requests == 23


def test_what_workers_used_and_cannot_be_read_hides_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(_: str) -> None:
        raise StorageUnavailable(AWAY)

    def fail(_: Callable) -> None:
        raise RuntimeError("Beam failed")

    monkeypatch.setattr(worker_notes, "used_by_workers", away)
    with pytest.raises(RuntimeError, match="Beam failed"):
        making.run_job(lambda _: None, str(tmp_path), fail, Share())


def test_workers_are_told_how_large_a_row_group_may_be(tmp_path: Path) -> None:
    stage = stage_of(tmp_path).stage
    one = JustAStage(replace(stage, layout=replace(stage.layout, row_group_bytes=7)))
    told = []

    def look(_: Callable) -> None:
        told.append(documents.read_json(f"{tmp_path}/told.json"))
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        make([one], str(tmp_path), look, Share(), Locks())
    assert told[0]["row_group_bytes"] == 7


def test_jobs_that_killed_commands_left_are_ended_before_their_days_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of other days are let be: the commands that sent them may be at work."""
    one = stage_of(tmp_path)
    top, day = Path(one.stage.layout.kind_folder(EMBED)), one.stage.ds
    days = [day + dt.timedelta(days=n) for n in range(-2, 3)]
    for start, end in ((0, 1), (0, 2), (1, 3), (2, 2), (2, 4), (3, 4)):
        (top / f"job-{days[start]}-{days[end]}-abc" / "attempt").mkdir(parents=True)
    (top / f"ds={day}" / "run").mkdir(parents=True)
    ended: list[str] = []

    def end(folder: str, _: Callable) -> None:
        assert Path(folder).name == "attempt"
        ended.append(Path(folder).parent.name.removeprefix("job-").removesuffix("-abc"))
        if len(ended) == 4:
            raise DataContractError("seen before anything is made")

    monkeypatch.setattr(cluster_jobs, "end_left", end)
    options = JobOptions(pipeline_options({}, "embed", []), (), Share())
    with pytest.raises(DataContractError, match="seen before"):
        making.make_missing([one], options, lambda _: None, Locks())
    assert sorted(ended) == [
        f"{days[start]}-{days[end]}" for start, end in ((0, 2), (1, 3), (2, 2), (2, 4))
    ]
    assert not list(tmp_path.rglob("*.json"))


class Jars:
    """Makes a stage whose jobs a job service writes into jars, and does what they would."""

    def __init__(self, root: Path, jobs: Jobs):
        self.planned, self._jobs, self.refused = stage_of(root, shards=2), jobs, 0
        jobs.at_run = lambda: jobs.set(list(jobs.states)[-1], States.DONE)

    def make(self) -> int:
        """Runs the command's part; returns how many jobs it sent."""
        endpoint = f"--job_endpoint={self._jobs.endpoint}"
        given = ("--runner=portable", endpoint, "--output_executable_path=/shop/embed.jar")
        options = JobOptions(pipeline_options({}, "embed", given), given, Share())
        before = len(self._jobs.states)
        with contextlib.suppress(NotRun):
            made = making.make_missing([self.planned], options, lambda _: None, Locks())
            self.refused += len(made.refused)
        return len(self._jobs.states) - before

    @property
    def attempts(self) -> list[Path]:
        return list(Path(making.job_folder([self.planned])).glob("*"))

    def run(self, parts: int = 2, **refused: str) -> None:
        """Does what workers of the job in the jar do, for so many parts of each table."""
        (attempt,) = self.attempts
        documents.write_json(f"{attempt}/begun/x", {})
        if refused:
            documents.write_json(f"{attempt}/errors/x.json", refused)
        for table in self.planned.stage.tables:
            for shard in range(parts):
                self.write(table, shard)

    def write(self, table: Table, shard: int) -> None:
        folder, schema = states.staged_folder(self.planned.stage, table), table.schema(pa.int64())
        partitions.write_part(folder, table, schema, schema.empty_table(), shard, 2)

    @property
    def state(self) -> str:
        return Look().state(self.planned.stage).name


@pytest.fixture
def jars(tmp_path: Path) -> Iterator[Jars]:
    with stand_in_clusters.job_service() as jobs:
        yield Jars(tmp_path, jobs)


def test_what_the_job_in_a_jar_has_made_is_sealed_by_the_next_command_without_a_job(
    jars: Jars,
) -> None:
    assert jars.make() == 1
    jars.run()
    assert jars.state == states.BEGUN
    assert jars.make() == 0
    assert jars.state == states.STAGED
    assert not jars.attempts


@pytest.mark.parametrize("parts", [None, 1])
def test_a_job_in_a_jar_that_has_not_made_all_gives_way_to_the_next_one(
    jars: Jars, parts: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults, "LATE_SECONDS", 0.01)  # for which more is waited for
    jars.make()
    first = jars.attempts
    if parts:
        jars.run(parts)
    assert jars.make() == 1
    (second,) = jars.attempts
    assert [second] != first
    jars.run()
    assert jars.make() == 0
    assert jars.state == states.STAGED


def test_what_the_job_in_a_jar_has_made_is_waited_for_where_it_shows_late(
    jars: Jars, monkeypatch: pytest.MonkeyPatch
) -> None:
    jars.make()
    jars.run(parts=1)
    late = list(jars.planned.stage.tables)
    instead_of_sleep(monkeypatch, faults, lambda _: late and jars.write(late.pop(), 1))
    assert jars.make() == 0
    assert not late
    assert jars.state == states.STAGED


def test_what_the_job_in_a_jar_has_made_under_other_versions_is_made_again(
    jars: Jars, monkeypatch: pytest.MonkeyPatch
) -> None:
    jars.make()
    jars.run()
    monkeypatch.setattr(states, "PACKAGE_VERSIONS", {"torch": "2"})
    monkeypatch.setattr(faults, "LATE_SECONDS", 0.01)
    assert jars.make() == 1
    jars.run()
    assert jars.make() == 0
    assert jars.state == states.STAGED


def test_what_a_job_in_a_jar_still_writes_after_it_was_given_up_is_not_trusted(
    jars: Jars, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults, "LATE_SECONDS", 0.01)
    jars.make()
    jars.run(parts=1)
    before = states.made_in(jars.planned.stage.staging)
    jars.make()
    assert states.made_in(jars.planned.stage.staging) != before


def test_parts_that_were_there_before_do_not_stand_for_those_of_a_job_in_a_jar(jars: Jars) -> None:
    jars.make()
    jars.run()
    (attempt,) = jars.attempts
    shutil.rmtree(attempt / "begun")
    assert jars.make() == 1


def test_what_the_job_in_a_jar_was_refused_is_told_once_and_its_parts_are_not_trusted(
    jars: Jars,
) -> None:
    jars.make()
    jars.run(kind="StorageUnavailable", message=AWAY)
    with pytest.raises(StorageUnavailable, match="could not be reached"):
        jars.make()
    assert jars.state == states.ABSENT
    assert jars.make() == 1


def test_days_that_break_a_contract_are_told_of_a_jar_as_a_whole(jars: Jars) -> None:
    jars.make()
    jars.run(kind="DataContractError", message="a bad row")
    assert jars.make() == 0
    assert jars.refused == 1


@pytest.mark.parametrize("how", ["cause", "note"])
def test_what_a_worker_told_goes_before_that_its_clusters_job_failed(
    tmp_path: Path, how: str
) -> None:
    def fail(_: Callable) -> None:
        if how == "note":
            left = {"kind": "DataContractError", "message": AWAY}
            documents.write_json(f"{tmp_path}/errors/x.json", left)
        raise JobFailed("The job x failed.") from RuntimeError(TRACEBACK if how == "cause" else "")

    with pytest.raises(CourierError, match="could not be reached"):
        making.run_job(lambda _: None, str(tmp_path), fail, Share())


def test_a_clusters_job_that_failed_is_told_where_no_worker_told_why(tmp_path: Path) -> None:
    def fail(_: Callable) -> None:
        raise JobFailed("The job x failed.") from RuntimeError("java.lang.Exception")

    with pytest.raises(JobFailed, match=r"The job x failed\."):
        making.run_job(lambda _: None, str(tmp_path), fail, Share())


def sealed(root: Path, embedded: int, rejected: int) -> tuple[Partition, Partition]:
    """Returns the two tables of four shards each, of so many rows, as they are sealed."""
    one = stage_of(root, shards=4)
    states.begin(one.stage, (), Look())
    rejects = ITEM_REJECTS.schema(pa.int64())
    row = {"stage": "read", "reason": "missing", "message": "m", "attempts": 1}
    row |= {"first_ds": one.stage.ds, "last_ds": one.stage.ds, "next_ds": DAYS[-1]}
    fallen = [{"item_id": item, **row} for item in range(rejected)]
    schema, rows = embeddings(20)
    made = {
        ITEM_EMBEDDINGS: (schema, rows.slice(20 - embedded)),  # from item 0 on
        ITEM_REJECTS: (rejects, pa.Table.from_pylist(fallen, schema=rejects)),
    }
    for table, (schema, rows) in made.items():
        shard = hashing.shard_of(hashing.hash_ids(rows["item_id"]), 4)
        for n in range(4):
            mine = rows.filter(pa.array(shard == n))
            folder, counts = states.staged_folder(one.stage, table), {"seen": len(mine)}
            partitions.write_part(folder, table, schema, mine, n, 4, counts)
    found = []
    for table in one.stage.tables:
        making.seal(one, table, Look())
        making.seal(one, table, Look())  # as after a kill
        found.append(partitions.find_staged(states.staged_folder(one.stage, table)))
    return tuple(found)


@pytest.mark.parametrize(
    ("embedded", "rejected", "files"), [(20, 6, (4, 1)), (20, 0, (4, 1)), (0, 20, (1, 1))]
)
def test_a_table_that_comes_with_another_is_sealed_in_few_files_and_an_empty_one_in_one(
    tmp_path: Path, embedded: int, rejected: int, files: tuple[int, int]
) -> None:
    found = sealed(tmp_path, embedded, rejected)
    assert tuple(len(partition.paths) for partition in found) == files
    for partition, rows in zip(found, (embedded, rejected), strict=True):
        assert (partition.rows, partition.manifest["rows"]) == (rows, rows)
        assert partition.manifest["counts"] == {"seen": rows}
        assert partition.manifest["shards"] == 4
        read = pa.concat_tables(map(partitions.read_parquet, partition.paths))
        assert sorted(read["item_id"].to_pylist()) == list(range(rows))
