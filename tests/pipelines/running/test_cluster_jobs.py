"""Jobs that run elsewhere end with the commands that sent them, or are ended by the next one."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import JobServerOptions
from apache_beam.runners.dataflow.internal import apiclient

from feature_jobs.schemas import CourierError
from feature_jobs.store import documents, files, worker_notes
from pipelines import cli
from pipelines.running import cluster_jobs
from pipelines.running.beam_options import pipeline_options
from pipelines.running.cluster_jobs import Job, JobFailed, NotRun, Sent, cause, end_left
from tests.support import stand_in_clusters
from tests.support.processes import free_port
from tests.support.stand_in_clusters import FlinkStandIn, Jobs, States


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_jobs, "_UNSEEN_SECONDS", 0.1)
    monkeypatch.setattr(cluster_jobs, "_ASK_EVERY_SECONDS", 0.0)


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """Makes SIGINT what it is to Python; commands that ran in this process took it as theirs."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives up soon, where a job is not to end."""
    for name in ("_CANCEL_SECONDS", "_TAKE_OVER_SECONDS"):
        monkeypatch.setattr(cluster_jobs, name, 0.3)


@pytest.fixture
def jobs() -> Iterator[Jobs]:
    with stand_in_clusters.job_service() as service:
        yield service


@pytest.fixture
def flink() -> Iterator[FlinkStandIn]:
    with stand_in_clusters.flink() as told:
        yield told


class Launcher:
    """Runs a job as a command does, and keeps what it says."""

    def __init__(self, folder: Path, *options: str):
        self.said: list[str] = []
        self.folder = folder
        given = pipeline_options({}, "embed", options)
        self.job = Job("embed-2026-03-01-abc", given, str(folder), self.said.append)

    def run(self) -> None:
        self.job.run(lambda root: root | beam.Create([1]) and None)

    @property
    def record(self) -> Path:
        return self.folder / "sent.json"


def portable(folder: Path, jobs: Jobs, *options: str) -> Launcher:
    return Launcher(folder, "--runner=portable", f"--job_endpoint={jobs.endpoint}", *options)


def on_flink(folder: Path, jobs: Jobs, flink: FlinkStandIn) -> Launcher:
    """Returns what sends jobs to a job service, which has them on Flink at once."""
    jobs.at_run = lambda: flink.states.update(dict.fromkeys(jobs.names.values(), "RUNNING"))
    where = (f"--job_endpoint={jobs.endpoint}", f"--flink_master={flink.url}")
    return Launcher(folder, "--runner=flink", *where)


def soon(found: Callable[[], Any], then: Callable[[], Any]) -> None:
    """Does something in another thread, once something is found."""

    def wait() -> None:
        deadline = time.monotonic() + 20
        while not found() and time.monotonic() < deadline:
            time.sleep(0.01)
        then()

    threading.Thread(target=wait, daemon=True).start()


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def is_running(launcher: Launcher) -> Callable[[], bool]:
    return lambda: "RUNNING" in launcher.job.describe()


# ---- A job's whole life ------------------------------------------------------------------------


def test_a_job_of_this_machine_has_no_record_and_nothing_to_tell(tmp_path: Path) -> None:
    launcher = Launcher(tmp_path)
    launcher.run()
    assert launcher.job.describe() == ""
    assert list(launcher.job.news()) == []
    assert not launcher.record.exists()


def test_a_job_is_on_record_from_before_it_is_sent_until_it_is_done(
    tmp_path: Path, jobs: Jobs
) -> None:
    launcher, seen = portable(tmp_path, jobs), list[Any]()
    jobs.at_prepare = lambda: seen.append(documents.read_json(str(launcher.record)))

    def end() -> None:
        seen.append(documents.read_json(str(launcher.record)))
        seen.extend(launcher.job.news())
        jobs.set(*jobs.states, States.DONE)

    def is_noted() -> bool:
        return is_running(launcher)() and documents.read_json(str(launcher.record))["job_id"]

    soon(is_noted, end)
    launcher.run()
    before, during, news = seen
    assert before["job_id"] is None
    ((number, name),) = jobs.names.items()
    assert name.startswith("courier-embed-2026-03-01-abc-")
    assert before == {**during, "job_id": None}
    assert during["job_id"] == number
    assert (during["name"], during["endpoint"]) == (name, jobs.endpoint)
    assert news == f"the job {name}: the job service {jobs.endpoint}"
    assert launcher.job.describe() == "; job DONE"
    assert launcher.said == []
    assert not launcher.record.exists()


def test_each_job_has_a_name_of_its_own_after_the_users(tmp_path: Path, jobs: Jobs) -> None:
    jobs.at_run = lambda: [jobs.set(number, States.DONE) for number in jobs.states]
    for _ in range(2):
        portable(tmp_path, jobs, "--job_name=Shop_A").run()
    first, second = jobs.names.values()
    assert first != second
    assert all(name.startswith("shop-a-embed-2026-03-01-abc-") for name in (first, second))


def test_workers_are_told_the_folder_beside_the_users_own_experiments(
    tmp_path: Path, jobs: Jobs
) -> None:
    launcher = portable(tmp_path, jobs, "--experiments=one", "--experiment=two")
    soon(is_running(launcher), lambda: jobs.set(*jobs.states, States.DONE))
    launcher.run()
    told = jobs.options["beam:option:experiments:v1"]
    assert {"one", "two", f"courier_job={tmp_path}"} <= set(told)


def test_a_job_that_fails_is_told_in_a_paragraph(
    tmp_path: Path, jobs: Jobs, caplog: pytest.LogCaptureFixture
) -> None:
    """The trace that Beam logs besides is in a file instead."""
    launcher = portable(tmp_path, jobs)
    jobs.says = "java.lang.Exception: lost\n\tat a.b(C.java:1)\nCaused by: x.NoDisk: disk is full\n"
    soon(is_running(launcher), lambda: jobs.set(*jobs.states, States.FAILED))
    with pytest.raises(JobFailed) as failed:
        launcher.run()
    assert failed.value.exit_status == 1
    told = str(failed.value)
    assert "\n" not in told
    assert f"on the job service {jobs.endpoint} failed: x.NoDisk: disk is full. Nothing" in told
    assert told.endswith(f" said of it is in {tmp_path}/failed.txt.")
    assert jobs.says in (tmp_path / "failed.txt").read_text()
    (traced,) = [record for record in caplog.records if "a.b(C.java:1)" in record.getMessage()]
    assert not cli._is_news(traced)
    assert jobs.cancelled == []
    assert not launcher.record.exists()


def test_a_job_that_no_service_takes_is_told_in_a_paragraph(tmp_path: Path) -> None:
    endpoint = f"localhost:{free_port()}"
    given = (f"--job_endpoint={endpoint}", "--job_server_timeout=1")
    launcher = Launcher(tmp_path, "--runner=portable", *given)
    with pytest.raises(JobFailed) as failed:
        launcher.run()
    assert f"could not be sent to {endpoint}: " in str(failed.value)
    assert "\n" not in str(failed.value)
    assert launcher.said == []


@pytest.mark.usefixtures("impatient")
# A thread of Beam's ends by the same error, of which its traceback would be told besides.
@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_job_service_that_goes_away_is_told_and_leaves_the_record(tmp_path: Path) -> None:
    with stand_in_clusters.job_service() as jobs:
        launcher = portable(tmp_path, jobs)
        jobs.at_run = lambda: soon(is_running(launcher), jobs.go_away)
        with pytest.raises(JobFailed):
            launcher.run()
    assert "is UNKNOWN and may go on" in launcher.said[-1]
    assert launcher.record.exists()


# ---- Interrupts --------------------------------------------------------------------------------


def test_an_interrupted_job_is_cancelled(tmp_path: Path, jobs: Jobs) -> None:
    launcher = portable(tmp_path, jobs)
    soon(is_running(launcher), interrupt)
    with pytest.raises(KeyboardInterrupt):
        launcher.run()
    ((number, name),) = jobs.names.items()
    assert number in jobs.cancelled
    assert launcher.said == [
        f"cancelling the job {name} on the job service {jobs.endpoint}",
        f"the job {name} is CANCELLED",
    ]
    assert not launcher.record.exists()


def test_an_interrupt_waits_until_the_job_is_sent(tmp_path: Path, jobs: Jobs) -> None:
    jobs.at_prepare = interrupt
    with pytest.raises(KeyboardInterrupt):
        portable(tmp_path, jobs).run()
    assert list(jobs.states.values()) == [States.CANCELLED]


@pytest.mark.usefixtures("impatient")
def test_a_job_that_cannot_be_cancelled_is_told_and_stays_on_record(
    tmp_path: Path, jobs: Jobs
) -> None:
    jobs.stubborn = True
    launcher = portable(tmp_path, jobs)
    soon(is_running(launcher), interrupt)
    with pytest.raises(KeyboardInterrupt):
        launcher.run()
    assert "is RUNNING and may go on, cancelled or not: look for it on" in launcher.said[-1]
    assert launcher.record.exists()


def test_handlers_that_beam_sets_are_put_back() -> None:
    received = list[int]()
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        with cluster_jobs._interrupts_waiting():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.kill(os.getpid(), signal.SIGTERM)
        assert received == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_second_interrupt_comes_through_at_once() -> None:
    came = list[int]()

    def be_interrupted_twice() -> None:
        with cluster_jobs._interrupts_waiting():
            for number in range(3):
                interrupt()
                came.append(number)

    with pytest.raises(KeyboardInterrupt):
        be_interrupted_twice()
    assert came == [0]


def test_a_job_may_be_sent_by_a_thread(tmp_path: Path, jobs: Jobs) -> None:
    """Only the main thread may set handlers, and only it is interrupted."""
    launcher = portable(tmp_path, jobs)
    soon(is_running(launcher), lambda: jobs.set(next(iter(jobs.states)), States.DONE))
    with ThreadPoolExecutor(1) as pool:
        pool.submit(launcher.run).result(timeout=60)
    assert not launcher.record.exists()


def test_an_interrupt_is_not_lost_where_sending_fails() -> None:
    def fail() -> None:
        with cluster_jobs._interrupts_waiting():
            interrupt()
            raise RuntimeError("the job service was interrupted too")

    with pytest.raises(KeyboardInterrupt):
        fail()


# ---- Flink -------------------------------------------------------------------------------------


def test_a_job_of_flinks_is_cancelled_where_it_runs(
    tmp_path: Path, jobs: Jobs, flink: FlinkStandIn
) -> None:
    launcher = on_flink(tmp_path, jobs, flink)
    soon(is_running(launcher), interrupt)
    with pytest.raises(KeyboardInterrupt):
        launcher.run()
    assert list(flink.states.values()) == ["CANCELED"]
    assert launcher.said[-1].endswith("is CANCELLED")
    assert not launcher.record.exists()


@pytest.mark.usefixtures("impatient")
def test_it_is_not_over_since_the_job_service_says_so(
    tmp_path: Path, jobs: Jobs, flink: FlinkStandIn
) -> None:
    flink.stubborn = True
    launcher = on_flink(tmp_path, jobs, flink)
    soon(is_running(launcher), interrupt)
    with pytest.raises(KeyboardInterrupt):
        launcher.run()
    assert list(jobs.states.values()) == [States.CANCELLED]
    assert "is RUNNING and may go on" in launcher.said[-1]
    assert flink.url in launcher.said[-1]
    assert launcher.record.exists()


def test_a_job_that_never_came_to_flink_is_told(
    tmp_path: Path, jobs: Jobs, flink: FlinkStandIn
) -> None:
    launcher = on_flink(tmp_path, jobs, flink)
    jobs.at_run = interrupt
    with pytest.raises(KeyboardInterrupt):
        launcher.run()
    assert f"never came to {flink.url}" in launcher.said[-1]


def test_flinks_own_words_say_why_a_job_failed(
    tmp_path: Path, jobs: Jobs, flink: FlinkStandIn
) -> None:
    launcher = on_flink(tmp_path, jobs, flink)

    def fail() -> None:
        ((number, name),) = jobs.names.items()
        flink.errors[name] = "x.Recovery\nCaused by: x.Lost: TaskManager with id 1 is gone\n\tat x"
        flink.states[name] = "FAILED"
        jobs.set(number, States.FAILED)

    soon(is_running(launcher), fail)
    with pytest.raises(
        JobFailed, match=r"failed: x\.Lost: TaskManager with id 1 is gone\. Nothing"
    ):
        launcher.run()


@pytest.mark.usefixtures("impatient")
def test_a_job_manager_that_is_gone_is_told_and_leaves_the_record(
    tmp_path: Path, jobs: Jobs, flink: FlinkStandIn
) -> None:
    launcher = on_flink(tmp_path, jobs, flink)

    def fail() -> None:
        flink.is_gone = True
        jobs.set(*jobs.states, States.FAILED)

    soon(is_running(launcher), fail)
    with pytest.raises(
        JobFailed, match=r"failed: Flink gives no answer there any more \(.*\)\. Nothing"
    ):
        launcher.run()
    assert "is UNKNOWN and may go on" in launcher.said[-1]
    assert launcher.record.exists()


def test_nothing_is_sent_where_flink_does_not_answer(tmp_path: Path, jobs: Jobs) -> None:
    nobody = FlinkStandIn(url=f"http://localhost:{free_port()}")
    with pytest.raises(CourierError, match=r"Flink does not answer at .*--flink_master"):
        on_flink(tmp_path, jobs, nobody).run()
    assert jobs.states == {}


# ---- Workers that do not begin -----------------------------------------------------------------


@pytest.mark.parametrize("how", ["none", "here", "elsewhere"])
def test_workers_that_do_not_begin_are_told_once_with_what_the_cluster_says(
    tmp_path: Path, jobs: Jobs, flink: FlinkStandIn, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(cluster_jobs, "_BEGIN_SECONDS", 0.0)
    monkeypatch.setattr(worker_notes, "_begun_here", {str(tmp_path)} if how == "here" else set())
    if how == "elsewhere":
        files.write_bytes(str(tmp_path / "begun" / "x"), b"")
    launcher, news = on_flink(tmp_path, jobs, flink), list[str]()

    def look() -> None:
        for _ in range(2):
            news.extend(launcher.job.news())
        interrupt()

    soon(is_running(launcher), look)
    with pytest.raises(KeyboardInterrupt):
        launcher.run()
    warned = [message for message in news if message.startswith("WARNING")]
    if how == "none":
        (message,) = warned
        assert "no worker of the job courier-embed-2026-03-01-abc-" in message
        assert "RUNNING; 12 tasks, 7 created, 3 finished, 2 running; 0 of 2 slots free." in message
    else:
        assert warned == []


# ---- Jobs in jars ------------------------------------------------------------------------------


def test_a_job_that_is_written_into_a_jar_is_told_to_be_still_to_run(
    tmp_path: Path, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_jobs, "_BEGIN_SECONDS", 0.0)
    launcher = portable(tmp_path, jobs, "--output_executable_path=/shop/embed.jar")
    news = list[str]()

    def end() -> None:
        news.extend(launcher.job.news())
        jobs.set(*jobs.states, States.DONE)

    soon(is_running(launcher), end)
    with pytest.raises(NotRun) as told:
        launcher.run()
    assert told.value.exit_status == 4
    assert "\n" not in str(told.value)
    assert "is written into /shop/embed.jar and has not run" in str(told.value)
    assert "spark-submit" in str(told.value)
    assert "WARNING" not in "".join(news)  # no worker is to begin
    assert cluster_jobs.is_in_jar(str(tmp_path))
    assert not launcher.record.exists()


def test_a_job_that_could_not_be_written_into_a_jar_is_in_none(tmp_path: Path, jobs: Jobs) -> None:
    jobs.at_run = lambda: [jobs.set(number, States.FAILED) for number in jobs.states]
    launcher = portable(tmp_path, jobs, "--output_executable_path=/shop/embed.jar")
    with pytest.raises(JobFailed):
        launcher.run()
    assert not cluster_jobs.is_in_jar(str(tmp_path))


# ---- What killed commands left -----------------------------------------------------------------


def left(folder: Path, jobs: Jobs, state: int = States.RUNNING, **other: Any) -> Sent:
    """Leaves what a killed command does; returns it."""
    number = jobs.begin("courier-embed-x", state)
    jobs.begin("courier-embed-y")
    host = os.uname().nodename
    sent = Sent("courier-embed-x", "PortableRunner", host, jobs.endpoint, job_id=number)
    sent = replace(sent, **other)
    cluster_jobs._note(str(folder), sent)
    return sent


def take_over(folder: Path) -> list[str]:
    said: list[str] = []
    end_left(str(folder), said.append)
    return said


def test_nothing_is_said_where_nothing_was_left(tmp_path: Path) -> None:
    assert take_over(tmp_path) == []


@pytest.mark.parametrize("known", ["by its ID", "by its name"])
def test_a_job_that_was_left_is_cancelled(tmp_path: Path, jobs: Jobs, known: str) -> None:
    sent = left(tmp_path, jobs)
    number = sent.job_id
    if known == "by its name":  # its command died while it was sent
        cluster_jobs._note(str(tmp_path), replace(sent, job_id=None))
    first, last = take_over(tmp_path)
    assert f"left the job courier-embed-x RUNNING on the job service {jobs.endpoint}" in first
    assert last == "the job courier-embed-x is CANCELLED"
    assert set(jobs.cancelled) == {number}
    assert take_over(tmp_path) == []


@pytest.mark.parametrize("state", [States.DONE, States.FAILED, States.CANCELLED])
def test_a_job_that_has_ended_is_let_be(tmp_path: Path, jobs: Jobs, state: int) -> None:
    left(tmp_path, jobs, state)
    assert take_over(tmp_path) == []
    assert jobs.cancelled == []
    assert not list(tmp_path.iterdir())


def test_a_job_that_nobody_knows_is_forgotten(tmp_path: Path, jobs: Jobs) -> None:
    left(tmp_path, jobs, name="courier-embed-z", job_id=None)
    assert take_over(tmp_path) == []
    assert jobs.cancelled == []
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("impatient")
def test_a_job_that_goes_on_nonetheless_stops_the_command(tmp_path: Path, jobs: Jobs) -> None:
    jobs.stubborn = True
    left(tmp_path, jobs)
    with pytest.raises(CourierError) as refused:
        take_over(tmp_path)
    told = str(refused.value)
    assert "\n" not in told
    assert refused.value.exit_status == 1
    assert "courier-embed-x" in told
    assert "is RUNNING 0 s after it was cancelled" in told
    assert f"delete {tmp_path / 'sent.json'}" in told
    assert (tmp_path / "sent.json").exists()


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({"host": "elsewhere"}, "it is the localhost of elsewhere"),
        ({"endpoint": None, "runner": "SparkRunner"}, "it has no job service"),
        ({"flink": f"http://localhost:{free_port()}"}, "refused"),
        ({"endpoint": f"localhost:{free_port()}"}, ""),
    ],
)
def test_where_a_job_cannot_be_asked_for_the_command_warns_and_goes_on(
    tmp_path: Path, jobs: Jobs, monkeypatch: pytest.MonkeyPatch, other: dict[str, Any], why: str
) -> None:
    monkeypatch.setattr(cluster_jobs, "_ANSWER_SECONDS", 2.0)
    left(tmp_path, jobs, **other)
    (warning,) = take_over(tmp_path)
    assert warning.startswith("WARNING: an earlier command was killed and may have left the job")
    assert why in warning
    assert jobs.cancelled == []


def test_a_job_that_was_left_on_flink_is_cancelled_there(
    tmp_path: Path, jobs: Jobs, flink: FlinkStandIn
) -> None:
    flink.states = {"courier-embed-x": "RUNNING", "courier-embed-y": "RUNNING"}
    left(tmp_path, jobs, States.CANCELLED, runner="FlinkRunner", flink=flink.url)
    assert f"RUNNING on {flink.url}" in take_over(tmp_path)[0]
    assert flink.states == {"courier-embed-x": "CANCELED", "courier-embed-y": "RUNNING"}


def test_the_service_of_prism_ends_with_its_command(tmp_path: Path, jobs: Jobs) -> None:
    left(tmp_path, jobs, runner="PrismRunner", endpoint=None)
    assert take_over(tmp_path) == []


def test_a_job_that_was_left_on_dataflow_is_cancelled(
    tmp_path: Path, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_state = apiclient.dataflow.JobState
    states = {"2026-1": job_state.JOB_STATE_RUNNING}

    class Client:
        def __init__(self, options: Any):
            self.options = options

        def get_job(self, number: str) -> Any:
            return SimpleNamespace(id=number, current_state=states[number])

        def modify_job_state(self, number: str, state: str) -> bool:
            states[number] = getattr(job_state, state)
            return True

    monkeypatch.setattr(apiclient, "DataflowApplicationClient", Client)
    where = {"endpoint": None, "project": "shop", "region": "europe-west4"}
    left(tmp_path, jobs, runner="DataflowRunner", job_id="2026-1", **where)
    first, last = take_over(tmp_path)
    assert "dataflow/jobs/europe-west4/2026-1?project=shop" in first
    assert last == "the job courier-embed-x is CANCELLED"
    assert states == {"2026-1": job_state.JOB_STATE_CANCELLED}


def test_a_job_service_that_beam_starts_is_told_its_port() -> None:
    options = pipeline_options({}, "embed", ["--runner=flink", "--flink_master=cluster:8081"])
    sent = cluster_jobs._to_send("embed", options)
    assert sent.endpoint == f"localhost:{options.view_as(JobServerOptions).job_port}"
    assert sent.flink == "http://cluster:8081"
    assert sent.host == os.uname().nodename


# ---- What led to an error ----------------------------------------------------------------------

IN_PYTHON = """java.lang.Exception: The user defined 'open()' method failed
\tat org.apache.flink.X.run(X.java:1)
Caused by: java.lang.RuntimeException: Error received from SDK harness for instruction 3: \
Traceback (most recent call last):
  File "a.py", line 3, in process
    raise ValueError("first")
ValueError: first

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "b.py", line 7, in process
    read(
    ^^^^
feature_jobs.store.Odd: no rows [while running 'ParDo(X)']

\tat org.apache.beam.Y.get(Y.java:2)
Caused by: java.util.concurrent.ExecutionException: late
"""


@pytest.mark.parametrize(
    ("said", "line"),
    [
        (IN_PYTHON, "feature_jobs.store.Odd: no rows [while running 'ParDo(X)']"),
        (IN_PYTHON.partition("\n\nDuring")[0], "ValueError: first"),
        ("a.B: top\n\tat x\nCaused by: c.D: middle\n\tat y\nCaused by: e.F: last\n", "e.F: last"),
        ("Pipeline x_1 failed in state FAILED: a.B: gone.\n\tat x", "a.B: gone"),
        (
            "a.B: top\nCaused by: io.StatusRuntimeException: CANCELLED: client cancelled",
            "a worker ended in the midst of its work, as one killed for memory "
            "(io.StatusRuntimeException: CANCELLED: client cancelled)",
        ),
        ("unknown error", "unknown error"),
        ("x" * 600, "x" * 500 + "…"),
        ("", ""),
    ],
)
def test_the_line_that_matters_is_found_among_those_of_java(said: str, line: str) -> None:
    assert cause(said) == line
