"""A worker that a runner starts asks it for all that Beam's worker wants to know, and is it."""

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.portability.api import beam_provision_api_pb2 as provision
from apache_beam.portability.api import beam_provision_api_pb2_grpc as provision_service
from apache_beam.portability.api import endpoints_pb2
from apache_beam.runners.job.utils import dict_to_struct
from apache_beam.runners.worker import sdk_worker_main

from feature_jobs.schemas import StorageUnavailable
from feature_jobs.store import threads, versions, worker_notes
from pipelines.running import worker_boot
from tests.support.processes import ended, killed, start

OPTIONS = {"beam:option:experiments:v1": ["one"], "beam:option:state_cache_size:v1": "7"}
SERVICES = ("control", "logging", "status")


def told(*services: str) -> provision.ProvisionInfo:
    """Returns what a runner tells, with the addresses of some services."""
    addresses = {
        f"{name}_endpoint": endpoints_pb2.ApiServiceDescriptor(url=f"{name}:1") for name in services
    }
    return provision.ProvisionInfo(
        pipeline_options=dict_to_struct(OPTIONS), runner_capabilities=["a", "b"], **addresses
    )


class Runner(provision_service.ProvisionServiceServicer):
    """Tells workers what they ask for, and keeps who asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def GetProvisionInfo(self, _: Any, context: grpc.ServicerContext) -> Any:
        self.asked.append(dict(context.invocation_metadata())["worker_id"])
        return provision.GetProvisionInfoResponse(info=told(*SERVICES))


@pytest.fixture
def runner() -> Iterator[tuple[Runner, str]]:
    found, server = Runner(), grpc.server(ThreadPoolExecutor(1))
    provision_service.add_ProvisionServiceServicer_to_server(found, server)
    port = server.add_insecure_port("localhost:0")
    server.start()
    yield found, f"localhost:{port}"
    server.stop(None)


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """Returns a list that gets the environment in which Beam's worker would have run."""
    found: list[dict[str, str]] = []
    monkeypatch.setattr(os, "environ", {})

    def run(_: Any) -> None:
        found.append({k: v for k, v in os.environ.items() if not k.startswith("PYTEST")})

    monkeypatch.setattr(sdk_worker_main, "main", run)
    return found


@pytest.mark.parametrize("more", [[], ["--control_endpoint=other:2", "--logging_endpoint=other:3"]])
def test_a_worker_is_what_its_runner_tells_it_to_be(
    runner: tuple[Runner, str], worker: list[dict[str, str]], more: list[str]
) -> None:
    asked, endpoint = runner
    worker_boot.main(["--id=1-1", f"--provision_endpoint={endpoint}", *more])
    (found,) = worker
    assert asked.asked == ["1-1"]
    assert found == worker_boot.environment("1-1", told(*SERVICES))
    assert found["WORKER_ID"] == "1-1"
    assert found["RUNNER_CAPABILITIES"] == "a b"
    for name in SERVICES:
        assert found[f"{name.upper()}_API_SERVICE_DESCRIPTOR"] == f'url: "{name}:1"\n'
    read = sdk_worker_main._load_pipeline_options(found["PIPELINE_OPTIONS"])
    assert PipelineOptions.from_dictionary(read).get_all_options()["experiments"] == ["one"]
    assert json.loads(found["PIPELINE_OPTIONS"]) == OPTIONS


def test_a_service_that_a_runner_lacks_is_not_named() -> None:
    found = worker_boot.environment("1", told("control"))
    assert [name for name in found if name.endswith("DESCRIPTOR")] == [
        "CONTROL_API_SERVICE_DESCRIPTOR"
    ]
    assert "SEMI_PERSISTENT_DIRECTORY" not in found


@pytest.mark.parametrize("given", [[], ["--id=1"], ["--provision_endpoint=a:1"], ["--ids=1"]])
def test_a_worker_without_a_name_or_a_runner_is_told_so(
    given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        worker_boot.main(given)
    assert ended.value.code == 2
    assert "courier-worker: error: " in capsys.readouterr().err


def test_a_worker_whose_runner_is_gone_ends(
    worker: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_boot, "_SECONDS", 0.2)
    with pytest.raises(grpc.RpcError):
        worker_boot.main(["--id=1", "--provision_endpoint=localhost:1"])
    assert not worker


def of_job(folder: Path) -> provision.ProvisionInfo:
    experiments = {"beam:option:experiments:v1": ["one", f"courier_job={folder}"]}
    return provision.ProvisionInfo(pipeline_options=dict_to_struct(experiments))


@pytest.mark.parametrize("differ", [False, True])
def test_a_worker_checks_in_before_it_is_sent_anything(
    tmp_path: Path, worker: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch, differ: bool
) -> None:
    """One in other versions goes on and does nothing: for one that ended a cluster may wait."""
    monkeypatch.setattr(worker_boot, "_ask", lambda *_: of_job(tmp_path))
    worker_notes.tell(str(tmp_path), threads.Share(), 100)
    monkeypatch.setattr(worker_notes, "_launched", set())
    if differ:
        monkeypatch.setitem(versions.PACKAGE_VERSIONS, "torch", "1.0")
    worker_boot.main(["--id=1", "--provision_endpoint=localhost:1"])
    assert len(worker) == 1
    assert worker_notes.has_begun(str(tmp_path))
    assert ["torch 1.0" in str(e) for e in worker_notes.refused(str(tmp_path))] == [True] * differ


def test_a_worker_that_may_not_check_in_tells_so_with_its_first_element(
    tmp_path: Path, worker: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: str) -> None:
        raise StorageUnavailable("no access")

    monkeypatch.setattr(worker_boot, "_ask", lambda *_: of_job(tmp_path))
    monkeypatch.setattr(worker_notes, "check_in", refuse)
    worker_boot.main(["--id=1", "--provision_endpoint=localhost:1"])
    assert len(worker) == 1


PARENT = """
import subprocess, sys
worker = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, text=True)
print(worker.pid, worker.stdout.readline(), flush=True)
worker.wait()
"""
BUSY = """
import time
from apache_beam.runners.worker import sdk_worker_main
from pipelines.running import worker_boot
worker_boot._ask = lambda *_: worker_boot.provision.ProvisionInfo()
sdk_worker_main.main = lambda _: print("busy", flush=True) or time.sleep(600)
worker_boot.main(["--id=1", "--provision_endpoint=localhost:1"])
"""


def test_a_busy_worker_ends_once_who_started_it_is_killed() -> None:
    parent = start(PARENT, BUSY)
    number, state = parent.stdout.readline().split()
    assert state == "busy"
    assert killed(parent) == -signal.SIGKILL
    assert ended([int(number)])
