"""Stands for a job service and for Flink's REST interface, whose jobs do what a test tells them."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
from apache_beam.portability.api import beam_job_api_pb2 as api
from apache_beam.portability.api import beam_job_api_pb2_grpc as service
from apache_beam.runners.job.utils import struct_to_dict

States = api.JobState


class Jobs(service.JobServiceServicer):
    """Is a job service whose jobs run until they are cancelled, or are told to be in a `state`.

    `at_run` is called when a job was sent; one that is `stubborn` cannot be cancelled.
    """

    def __init__(self) -> None:
        self.names: dict[str, str] = {}
        self.states: dict[str, int] = {}
        self.cancelled: list[str] = []
        self.stubborn = False
        self.says = ""
        self.options: dict[str, Any] = {}  # of the job that was sent last
        self.at_prepare: Callable[[], None] = lambda: None
        self.at_run: Callable[[], None] = lambda: None
        self._changed = threading.Condition()
        self.endpoint = ""
        self.go_away: Callable[[], Any] = lambda: None

    def begin(self, name: str, state: int = States.RUNNING) -> str:
        """Holds one more job, and returns its ID."""
        number = f"{name}_{len(self.states)}"
        self.names[number], self.states[number] = name, state
        return number

    def set(self, number: str, state: int) -> None:
        with self._changed:
            self.states[number] = state
            self._changed.notify_all()

    def DescribePipelineOptions(self, request: Any, context: Any) -> Any:
        return api.DescribePipelineOptionsResponse()

    def Prepare(self, request: Any, context: Any) -> Any:
        self.at_prepare()
        self.options = struct_to_dict(request.pipeline_options)
        name = self.begin(self.options["beam:option:job_name:v1"], States.STOPPED)
        return api.PrepareJobResponse(preparation_id=name)

    def Run(self, request: Any, context: Any) -> Any:
        self.set(request.preparation_id, States.RUNNING)
        self.at_run()
        return api.RunJobResponse(job_id=request.preparation_id)

    def GetState(self, request: Any, context: Any) -> Any:
        return api.JobStateEvent(state=self.states[request.job_id])

    def GetJobs(self, request: Any, context: Any) -> Any:
        infos = [
            api.JobInfo(job_id=number, job_name=self.names[number], state=state)
            for number, state in self.states.items()
        ]
        return api.GetJobsResponse(job_info=infos)

    def Cancel(self, request: Any, context: Any) -> Any:
        self.cancelled.append(request.job_id)
        if not self.stubborn:
            self.set(request.job_id, States.CANCELLED)
        return api.CancelJobResponse()

    def GetStateStream(self, request: Any, context: Any) -> Iterator[Any]:
        seen = -1
        while seen not in (States.DONE, States.FAILED, States.CANCELLED) and context.is_active():
            with self._changed:
                self._changed.wait_for(lambda: self.states[request.job_id] != seen, 0.05)  # noqa: B023
            if self.states[request.job_id] != seen:
                seen = self.states[request.job_id]
                yield api.JobStateEvent(state=seen)

    def GetMessageStream(self, request: Any, context: Any) -> Iterator[Any]:
        for event in self.GetStateStream(request, context):
            if event.state == States.FAILED:
                error = api.JobMessage(importance=api.JobMessage.JOB_MESSAGE_ERROR)
                error.message_text = self.says
                yield api.JobMessagesResponse(message_response=error)
            yield api.JobMessagesResponse(state_response=event)


@contextlib.contextmanager
def job_service() -> Iterator[Jobs]:
    jobs = Jobs()
    server = grpc.server(ThreadPoolExecutor(10))
    service.add_JobServiceServicer_to_server(jobs, server)
    jobs.endpoint = f"localhost:{server.add_insecure_port('localhost:0')}"
    jobs.go_away = lambda: server.stop(None)
    server.start()
    try:
        yield jobs
    finally:
        server.stop(None)


@dataclass
class FlinkStandIn:
    """Is what Flink's REST interface tells: its jobs by name, their states, and what ended them.

    One that `is_gone` hangs up on whoever asks.
    """

    states: dict[str, str] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    url: str = ""
    stubborn: bool = False
    is_gone: bool = False

    def answer(self, method: str, path: str) -> Any:
        if path == "/v1/overview":
            return {"slots-available": 0, "slots-total": 2}
        if path == "/v1/jobs/overview":
            tasks = {"total": 12, "running": 2, "created": 7, "finished": 3, "failed": 0}
            return {
                "jobs": [
                    {"jid": name.encode().hex(), "name": name, "state": state, "tasks": tasks}
                    for name, state in self.states.items()
                ]
            }
        number, _, rest = path.removeprefix("/v1/jobs/").partition("/")
        name = bytes.fromhex(number.partition("?")[0]).decode()
        if method == "PATCH" and number.endswith("?mode=cancel"):
            if not self.stubborn:
                self.states[name] = "CANCELED"
            return {}
        assert rest == "exceptions"
        return {"root-exception": self.errors.get(name)}


@contextlib.contextmanager
def flink() -> Iterator[FlinkStandIn]:
    told = FlinkStandIn()

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            if told.is_gone:
                return
            body = json.dumps(told.answer(self.command, self.path)).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_PATCH = _answer

        def log_message(self, *_: Any) -> None:
            """Tells nothing."""

    server = ThreadingHTTPServer(("localhost", 0), Handler)
    told.url = f"http://localhost:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield told
    finally:
        server.shutdown()
        server.server_close()
