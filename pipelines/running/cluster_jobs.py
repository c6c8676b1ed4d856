"""Runs the jobs of stages, tells what a cluster says of them, and leaves none there alone.

A job that runs elsewhere goes on when the command that sent it has ended. So a command that is
interrupted, or fails, cancels its job; and one that is killed leaves a record of it in the job's
folder, by which the next command of the same days, holding the locks that the dead one held,
cancels it before it goes on with what that has finished. A job of Flink's is asked for, and
cancelled, at Flink's own REST interface (`flink.py`). One that is written into a jar is run by who
has the jar, unseen from here.
"""

import contextlib
import copy
import functools
import os
import re
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import apache_beam as beam
from apache_beam.options.pipeline_options import (
    DebugOptions,
    FlinkRunnerOptions,
    GoogleCloudOptions,
    JobServerOptions,
    PipelineOptions,
    PortableOptions,
    StandardOptions,
)
from apache_beam.portability.api import beam_job_api_pb2 as job_api
from apache_beam.runners.portability.flink_runner import MAGIC_HOST_NAMES, FlinkRunner
from apache_beam.runners.portability.job_server import ExternalJobServer
from apache_beam.runners.portability.portable_runner import PipelineResult
from apache_beam.runners.runner import PipelineState
from apache_beam.utils import subprocess_server

from feature_jobs.schemas import CourierError
from feature_jobs.store import documents, files, worker_notes
from pipelines.running import beam_options, runners
from pipelines.running.flink import FlinkJob
from pipelines.running.worker_boot import JOB

Say = Callable[[str], None]

_CANCEL_SECONDS = 20.0  # a supervisor that sends SIGTERM kills after 30
_TAKE_OVER_SECONDS = 60.0
_UNSEEN_SECONDS = 5.0  # until a job that Flink doesn't list never came there
_ANSWER_SECONDS = 10.0
_ASK_EVERY_SECONDS = 2.0
_BEGIN_SECONDS = 60.0
_BEGIN_ON_DATAFLOW_SECONDS = 600.0  # which first starts machines
_SHOWN = 500  # of the characters of an error
_OF_A_LOST_WORKER = "StatusRuntimeException: CANCELLED"  # to Beam's Java side it has hung up
_UNREACHABLE = Exception  # asked for a job, Beam raises what the library of its service does


class JobFailed(CourierError):
    """Says that a job failed on its cluster, for a reason that none of our workers told."""


class NotRun(CourierError):
    """Says that a job was written into a jar, for others to run."""

    exit_status = 4


class _Handle(Protocol):
    """Asks for a job, and cancels it: one of Beam's results does, or Flink's REST interface."""

    @property
    def state(self) -> str | None:
        """One of Beam's `PipelineState`; None for a job that is not known there."""

    def cancel(self) -> Any: ...


@dataclass(frozen=True)
class Sent:
    """Says which job was sent, and where to ask for it: what a killed command leaves in a file.

    An `endpoint` of a job service may name the localhost of `host`. `flink` is the URL of Flink's
    REST interface.
    """

    name: str
    runner: str
    host: str
    endpoint: str | None = None
    flink: str | None = None
    project: str | None = None
    region: str | None = None
    job_id: str | None = None

    @property
    def where(self) -> str:
        """Returns where an operator finds the job."""
        if self.runner == runners.DATAFLOW:
            page = "https://console.cloud.google.com/dataflow/jobs"
            return f"{page}/{self.region}/{self.job_id}?project={self.project}"
        service = f"the job service {self.endpoint}" if self.endpoint else self.runner
        return self.flink or service


class Job:
    """Holds the one job of a stage, on this machine or on a cluster.

    `name` tells the stage, days and run in the cluster's lists; `folder` is the job's own.
    """

    def __init__(self, name: str, options: PipelineOptions, folder: str, say: Say):
        self._options, self._folder, self._say = options, folder, say
        self._name = name
        self._jar = options.view_as(PortableOptions).output_executable_path
        self._sent: Sent | None = None  # None, too, of a job on this machine
        self._result: Any = None
        self._handle: _Handle | None = None
        self._began = self._asked = 0.0  # by the monotonic clock: since it was sent, and asked for
        self._told = ""
        self._warned = False

    def run(self, define: Callable[[beam.Pipeline], None]) -> None:
        """Runs the job that `define` wires, and returns when it has ended well.

        Whatever ends it sooner, an interrupt too, leaves no job on the cluster, as far as that can
        be reached. Raises JobFailed for a job that failed there, and NotRun for one that was only
        written into a jar.
        """
        if self._options.view_as(StandardOptions).runner == runners.LOCAL:
            beam_options.run_pipeline(define, self._options)
            return
        worker_notes.note_sent_away(self._folder)
        options = copy.deepcopy(self._options)  # Beam forgets the runner while it runs a job
        sent = _to_send(self._name, options)
        _add_experiments(options, self._folder)
        root = beam.Pipeline(options=options)
        define(root)
        if sent.flink:
            self._handle = _flink_that_answers(sent)
        _silence_lost_services()
        self._send_and_wait(root, sent)
        if self._jar:
            documents.write_json(_in_jar(self._folder), {"jar": self._jar})
        _forget(self._folder)
        if self._jar:
            raise _not_run(sent, self._jar)

    def _send_and_wait(self, root: beam.Pipeline, sent: Sent) -> None:
        try:
            self._send(root, sent)
            self._result.wait_until_finish()
        except Exception as error:
            if self._sent is None:
                raise _not_sent(sent, error) from error
            failed = _failed(self._sent, self._handle, error, self._folder)
            self._end(self._sent)
            raise failed from error
        except BaseException:
            self._end(self._sent or sent)
            raise

    def _send(self, root: beam.Pipeline, sent: Sent) -> None:
        """Sends the job, once there is a record of it, and adds to that under which ID."""
        with _interrupts_waiting():
            _note(self._folder, sent)
            self._result = root.run()
            self._handle = self._handle or self._result
            self._began = time.monotonic()
            self._sent = replace(sent, job_id=_id_of(self._result))
            _note(self._folder, self._sent)

    def _end(self, sent: Sent) -> None:
        """Cancels the job unless it is over, waits until it is, and says how that went.

        What cannot be known to be over keeps its record.
        """
        if self._handle is None:
            return
        with contextlib.suppress(_UNREACHABLE):
            if _is_over(self._handle.state):
                _forget(self._folder)
                return
        self._say(f"cancelling the job {sent.name} on {sent.where}")
        if self._result is not None:
            with contextlib.suppress(_UNREACHABLE):
                self._result.cancel()  # a job service sends no job of Flink's then
        state = _cancel(self._handle, _CANCEL_SECONDS)
        self._say(_how_it_ended(sent, state))
        if _is_over(state):
            _forget(self._folder)

    # -- What is told meanwhile --

    def describe(self) -> str:
        """Returns what the cluster says of the job, as one more fact; nothing for no cluster."""
        if self._sent is None or self._handle is None:
            return ""
        if time.monotonic() - self._asked > _ASK_EVERY_SECONDS:
            self._told = _told_of(self._handle)
            self._asked = time.monotonic()
        return f"; job {self._told}"

    def news(self) -> Iterator[str]:
        """Yields what is to be told once, as soon as it is so: the job's page; no worker begins."""
        if self._sent is None or self._handle is None:
            return
        handle, sent = self._handle, self._sent
        if page := handle.page if isinstance(handle, FlinkJob) else sent.where:
            yield f"the job {sent.name}: {page}"
        limit = _seconds_to_begin(sent.runner)
        late = not self._jar and time.monotonic() - self._began > limit
        if late and not self._warned and not worker_notes.has_begun(self._folder):
            self._warned = True
            yield _no_worker(sent, limit, handle)


# ---- What was written into a jar ---------------------------------------------------------------


def is_in_jar(folder: str) -> bool:
    """Returns whether the job of this `folder` was written into a jar, to be run by others."""
    return files.exists(_in_jar(folder))


def _in_jar(folder: str) -> str:
    return os.path.join(folder, "jar.json")


def _not_run(sent: Sent, jar: str) -> NotRun:
    return NotRun(
        f"The job {sent.name} is written into {jar} and has not run, so that its tables are not "
        "there yet, and nothing was published. Give that jar to `spark-submit`, or to `flink run`; "
        "when it has ended well, run this command again: it takes what the job has made."
    )


# ---- What a killed command left ----------------------------------------------------------------


def is_left(folder: str) -> bool:
    """Returns whether it is on record in a job's `folder` that a killed command left it running."""
    return files.exists(_path(folder))


def end_left(folder: str, say: Say) -> None:
    """Cancels the job that a killed command left running, by what it left in the job's `folder`.

    To be called by who holds the locks of its days: then its command is dead. Says what was found,
    also where the job cannot be asked for. Raises CourierError where it goes on nonetheless.
    """
    found = files.read_if_there(_path(folder))
    if found is None:
        return
    sent = Sent(**documents.parse_json(_path(folder), found))
    try:
        handle = _found_again(sent)
        state = handle.state if handle else None
    except _UNREACHABLE as error:
        say(
            f"WARNING: an earlier command was killed and may have left the job {sent.name} on "
            f"{sent.where}, which cannot be asked ({_short(str(error))}). Where it still runs, it "
            "does the same work a second time: cancel it there."
        )
        return
    if handle and state and not _is_over(state):
        say(
            f"an earlier command was killed and left the job {sent.name} {state} on {sent.where}: "
            "cancelling it, to go on with what it has finished"
        )
        state = _cancel(handle, _TAKE_OVER_SECONDS)
        if not _is_over(state):
            raise CourierError(
                f"The job {sent.name}, which an earlier command left on {sent.where}, is {state} "
                f"{_TAKE_OVER_SECONDS:.0f} s after it was cancelled. A second one beside it would "
                "do the same work twice. Cancel it there and run the same command again; where "
                f"there is no such job any more, delete {_path(folder)} first."
            )
        say(_how_it_ended(sent, state))
    _forget(folder)


def _found_again(sent: Sent) -> _Handle | None:
    """Returns what asks for a job that another process sent; None where nobody knows it.

    Raises _UNREACHABLE where that cannot be found out.
    """
    if sent.flink:
        return FlinkJob(sent.flink, sent.name)
    if sent.runner == runners.DATAFLOW:
        return _on_dataflow(sent) if sent.job_id else None
    if sent.runner == runners.PRISM and not sent.endpoint:
        return None  # its service and its workers were the command's own
    if not sent.endpoint:
        raise OSError("it has no job service")
    if sent.endpoint.startswith("localhost:") and sent.host != socket.gethostname():
        raise OSError(f"it is the localhost of {sent.host}")
    service = ExternalJobServer(sent.endpoint, _ANSWER_SECONDS).start()
    known = service.GetJobs(job_api.GetJobsRequest(), timeout=_ANSWER_SECONDS).job_info
    for job in known:
        if job.job_id == sent.job_id or job.job_name == sent.name:
            return PipelineResult(service, job.job_id, iter(()), iter(()))
    return None


def _on_dataflow(sent: Sent) -> _Handle:
    from apache_beam.runners.dataflow.dataflow_runner import DataflowPipelineResult, DataflowRunner
    from apache_beam.runners.dataflow.internal.apiclient import DataflowApplicationClient

    options = PipelineOptions(project=sent.project, region=sent.region)
    runner = DataflowRunner()
    runner.dataflow_client = DataflowApplicationClient(options)
    return DataflowPipelineResult(runner.dataflow_client.get_job(sent.job_id), runner, options)


@functools.cache
def _silence_lost_services() -> None:
    """Keeps Beam's threads that read what a job tells from printing a traceback, from now on.

    Where the job service is lost, the wait for its state ends by the same error, and is told.
    """
    before = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if args.exc_type.__module__.partition(".")[0] != "grpc":
            before(args)

    threading.excepthook = hook


# ---- Sending -----------------------------------------------------------------------------------


def _to_send(name: str, options: PipelineOptions) -> Sent:
    """Returns what is noted of a job before it is sent; `options` are told the same.

    No other job has its name. A job service that Beam starts gets its port here, so that another
    process can ask it later.
    """
    cloud, portable = options.view_as(GoogleCloudOptions), options.view_as(PortableOptions)
    runner = options.view_as(StandardOptions).runner
    parts = (cloud.job_name or "courier", name, secrets.token_hex(3))
    cloud.job_name = re.sub("[^a-z0-9-]", "-", "-".join(parts).lower())
    sent = Sent(cloud.job_name, runner, socket.gethostname())
    if runner == runners.DATAFLOW:
        return replace(sent, project=cloud.project, region=cloud.region)
    flink = options.view_as(FlinkRunnerOptions).flink_master
    is_sent = not portable.output_executable_path  # to Flink, instead of written into a jar
    if is_sent and flink not in MAGIC_HOST_NAMES and runner in (runners.FLINK, runners.PORTABLE):
        sent = replace(sent, flink=FlinkRunner.add_http_scheme(flink))
    if portable.job_endpoint:
        return replace(sent, endpoint=portable.job_endpoint)
    if runner == runners.PRISM or runners.submits_its_jar(runner, options):
        return sent
    server = options.view_as(JobServerOptions)
    (server.job_port,) = subprocess_server.pick_port(server.job_port or None)
    return replace(sent, endpoint=f"localhost:{server.job_port}")


def _add_experiments(options: PipelineOptions, folder: str) -> None:
    """Tells `courier-worker` the job's folder, among the experiments: Beam hands on those alone."""
    more = options.view_as(DebugOptions)
    more.add_experiment(f"{JOB}={folder}")
    more.add_experiment("disable_logging_submission_environment")  # `pip freeze`, which takes long


def _flink_that_answers(sent: Sent) -> FlinkJob:
    """Returns what asks for a job that is to be sent; raises CourierError where nothing answers."""
    assert sent.flink is not None
    job = FlinkJob(sent.flink, sent.name)
    try:
        job.tell()
    except _UNREACHABLE as error:
        raise CourierError(
            f"Flink does not answer at {sent.flink} ({_short(str(error))}), where its jobs are "
            "watched and cancelled. A job could go on there after its command has ended. Start the "
            "cluster, or give the host:port of its REST interface as --flink_master. Nothing was "
            "sent."
        ) from error
    return job


def _id_of(result: Any) -> str:
    return str(result.job_id() if callable(getattr(result, "job_id", None)) else result._job_id)


@contextlib.contextmanager
def _interrupts_waiting() -> Iterator[None]:
    """Lets a first SIGINT or SIGTERM wait until the block has ended; a second comes through.

    Beam sets handlers of its own where it starts a job service: those of before are put back. No
    thread but the main one may set any, and none but it is interrupted.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    received = list[int]()

    def put_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, _frame: Any) -> None:
        received.append(number)
        if len(received) > 1:
            put_back()
            signal.raise_signal(number)

    for number in before:
        signal.signal(number, note)
    try:
        yield
    finally:
        put_back()
        if len(received) == 1:
            signal.raise_signal(received[0])


def _path(folder: str) -> str:
    return os.path.join(folder, "sent.json")


def _note(folder: str, sent: Sent) -> None:
    documents.write_json(_path(folder), asdict(sent))


def _forget(folder: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        files.delete(_path(folder))


# ---- States and errors -------------------------------------------------------------------------


def _is_over(state: str | None) -> bool:
    return state is not None and PipelineState.is_terminal(state)


def _cancel(handle: _Handle, seconds: float) -> str | None:
    """Cancels a job until it is over, and returns its state then; None for no such job.

    Gives up after some `seconds`, and returns the state of then: UNKNOWN for no answer.
    """
    began = time.monotonic()
    while True:
        state: str | None = PipelineState.UNKNOWN
        with contextlib.suppress(_UNREACHABLE):
            state = handle.state
            if not _is_over(state):
                handle.cancel()
        waited = time.monotonic() - began
        if _is_over(state) or waited > (_UNSEEN_SECONDS if state is None else seconds):
            return state
        time.sleep(0.5)


def _how_it_ended(sent: Sent, state: str | None) -> str:
    if state is None:
        return f"the job {sent.name} never came to {sent.where}"
    if _is_over(state):
        return f"the job {sent.name} is {state}"
    return (
        f"WARNING: the job {sent.name} is {state} and may go on, cancelled or not: look for it on "
        f"{sent.where}, and cancel it there. The same command would cancel it first."
    )


def _told_of(handle: _Handle) -> str:
    try:
        return handle.tell() if isinstance(handle, FlinkJob) else str(handle.state)
    except _UNREACHABLE:
        return "gives no answer"


def _seconds_to_begin(runner: str) -> float:
    return _BEGIN_ON_DATAFLOW_SECONDS if runner == runners.DATAFLOW else _BEGIN_SECONDS


def _no_worker(sent: Sent, seconds: float, handle: _Handle) -> str:
    told = "It gives no answer."
    with contextlib.suppress(_UNREACHABLE):
        told = handle.tell_slots() if isinstance(handle, FlinkJob) else f"It is {handle.state}."
    return (
        f"WARNING: no worker of the job {sent.name} has begun after {seconds:.0f} s. {told} See on "
        f"{sent.where}, and in the logs of its hosts, whether they can start what "
        "--environment_type and its options name, and have room for the job. It is waited for; "
        "Ctrl-C cancels the job."
    )


def _not_sent(sent: Sent, error: Exception) -> JobFailed:
    return JobFailed(
        f"The job {sent.name} could not be sent to {sent.endpoint or sent.runner}: "
        f"{cause(str(error) or repr(error))}. Nothing was published. See that its job service runs "
        "and is reached from here, and run the same command again."
    )


def _failed(sent: Sent, handle: _Handle | None, error: Exception, folder: str) -> JobFailed:
    """Returns what an operator is told of a job that failed with Beam's `error`.

    All that was said of it goes to a file in `folder`.
    """
    said = ""
    if isinstance(handle, FlinkJob):
        try:
            said = handle.error()
        except _UNREACHABLE as away:
            said = f"Flink gives no answer there any more ({_short(str(away))})"
    said, path = said or str(error) or repr(error), os.path.join(folder, "failed.txt")
    with contextlib.suppress(OSError, CourierError):  # which would hide what the job ended for
        files.write_bytes(path, f"{said}\n\n{error}".encode())
    return JobFailed(
        f"The job {sent.name} on {sent.where} failed: {cause(said)}. "
        "Nothing was published, and what it finished is kept: the same command goes on with that. "
        "Where it fails again, look at the job's page and at the logs of its workers; all that was "
        f"said of it is in {path}."
    )


def cause(said: str) -> str:
    """Returns the line that matters of what a job service says of an error, Java's traces and all.

    That is what Python raised last, else the innermost cause that Java names, else the first line.
    """
    lines = re.sub(r"^Pipeline \S+ failed in state \w+: ", "", said).splitlines()
    traces = [
        n for n, line in enumerate(lines) if line.endswith("Traceback (most recent call last):")
    ]
    if traces:
        raised = [line for line in lines[traces[-1] + 1 :] if re.match(r"[A-Za-z_]", line)]
        if raised:
            return _short(raised[0])
    causes = [line.removeprefix("Caused by: ") for line in lines if line.startswith("Caused by: ")]
    found = _short((causes or lines or [""])[-1 if causes else 0])
    if _OF_A_LOST_WORKER in found:
        return f"a worker ended in the midst of its work, as one killed for memory ({found})"
    return found


def _short(text: str) -> str:
    text = " ".join(text.split()).rstrip(".")
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
