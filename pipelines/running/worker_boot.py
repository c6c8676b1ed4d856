"""Runs the command `courier-worker`: a Beam worker out of the Python that it is installed in.

Hosts of Flink and Spark run it for jobs that name it as their environment:

    --environment_type=PROCESS --environment_options=process_command=/path/to/courier-worker

so that a virtual environment on each host does instead of Docker. It takes what Beam starts the
`boot` of its images with, and fetches and installs nothing: all that a job needs is to be there,
in the versions that its launcher has.
"""

import argparse
import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from apache_beam.portability.api import beam_provision_api_pb2 as provision
from apache_beam.portability.api import beam_provision_api_pb2_grpc as provision_service
from apache_beam.runners.job.utils import struct_to_dict
from apache_beam.runners.worker import sdk_worker_main
from apache_beam.runners.worker.channel_factory import GRPCChannelFactory

from feature_jobs.schemas import CourierError
from feature_jobs.store import faults, worker_notes

JOB = "courier_job"  # the experiment, as Beam names what it hands on, that names a job's folder

_SECONDS = 60.0  # for an answer of whoever has just started this process
_PARENT_SECONDS = 1.0


def main(args: Sequence[str] | None = None) -> None:
    """Works for the runner that started this process, until it has no more for it.

    `args` are those of the command line if None. Raises what Beam raises where the runner is gone.
    """
    given = _parse(args)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    info = _ask(given.provision_endpoint, given.id)
    _check_in(info)
    os.environ.update(environment(given.id, info))
    sdk_worker_main.main(sys.argv)


def _end_with_parent(parent: int) -> None:
    """Ends this process once `parent` is gone, killed with its host's memory at an end, say.

    Beam's worker would first finish what it is at: for hours, and beside another try of the same.
    """
    while os.getppid() == parent:
        time.sleep(_PARENT_SECONDS)
    os._exit(1)


def _parse(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("courier-worker", description=__doc__)
    parser.add_argument("--id", required=True, help="the worker's name in its job")
    parser.add_argument("--provision_endpoint", required=True, help="host:port that tells the rest")
    for name in ("control", "logging", "artifact"):
        parser.add_argument(f"--{name}_endpoint", help="not read: the provision service tells it")
    return parser.parse_args(args)


def _ask(endpoint: str, worker_id: str) -> provision.ProvisionInfo:
    """Returns what the runner tells a worker that it starts."""
    with GRPCChannelFactory.insecure_channel(endpoint) as channel:
        service = provision_service.ProvisionServiceStub(channel)
        request = provision.GetProvisionInfoRequest()
        who = (("worker_id", worker_id),)
        return service.GetProvisionInfo(
            request, metadata=who, timeout=_SECONDS, wait_for_ready=True
        ).info


def _check_in(info: provision.ProvisionInfo) -> None:
    """Checks in before anything of the job is loaded, at which another version might fail.

    A worker that is refused goes on, to do nothing: one that ended would be waited for. So does one
    that may not use the job's folder, which it tells, as it can then, with its first element.
    """
    for experiment in struct_to_dict(info.pipeline_options).get("beam:option:experiments:v1") or ():
        name, _, folder = experiment.partition("=")
        if name == JOB:
            with contextlib.suppress(CourierError):
                # It is never shown where its attempt is over, and its folder gone.
                faults.until_shown(partial(worker_notes.check_in, folder))


def environment(worker_id: str, info: provision.ProvisionInfo) -> Mapping[str, str]:
    """Returns the variables by which Beam's worker finds its runner and the job's options.

    There is no SEMI_PERSISTENT_DIRECTORY: it is where staged files would lie.
    """
    found = {
        "WORKER_ID": worker_id,
        "PIPELINE_OPTIONS": json.dumps(struct_to_dict(info.pipeline_options)),
        "RUNNER_CAPABILITIES": " ".join(info.runner_capabilities),
    }
    services: dict[str, Any] = {
        "CONTROL": info.control_endpoint,
        "LOGGING": info.logging_endpoint,
        "STATUS": info.status_endpoint,
    }
    named = {name: service for name, service in services.items() if service.url}
    return found | {f"{name}_API_SERVICE_DESCRIPTOR": str(at) for name, at in named.items()}


if __name__ == "__main__":
    main()
