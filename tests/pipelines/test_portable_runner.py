"""A night runs through a job service and workers of its own, as on a cluster: here without Java.

They are Beam's own: jobs go to a job service, which asks a pool for worker processes.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Artefacts
from tests.support.commands import courier, published, refresh
from tests.support.processes import ROOT, answers, free_port, wait_for
from tests.support.world import DAYS, World


@contextlib.contextmanager
def running(module: str, *args: str) -> Iterator[subprocess.Popen]:
    """Runs a module of Beam's, and ends it with all that it started."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # the pool: `python`
    process = subprocess.Popen(
        [sys.executable, "-m", f"apache_beam.runners.{module}", *args],
        env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[list[str]]:
    """Gives the options of a runner whose job service and workers run on this machine."""
    port_file, pool = tmp_path / "port", free_port()
    service = running("portability.local_job_service_main", f"--port_file={port_file}")
    workers = running("worker.worker_pool_main", f"--service_port={pool}")
    with service as served, workers as working:
        wait_for(port_file.exists, served)
        wait_for(lambda: answers(pool), working)
        yield [
            "--runner=portable", f"--job_endpoint=localhost:{port_file.read_text()}",
            "--environment_type=EXTERNAL", f"--environment_config=localhost:{pool}",
        ]  # fmt: skip


def test_a_night_of_a_job_service_is_that_of_this_machine(
    world: World, cluster: list[str], artefacts: Artefacts
) -> None:
    assert refresh(world, DAYS[0], "--", *cluster) == 0
    tables = {path: data for path, data in published(world).items() if path.endswith(".parquet")}
    assert len(tables) > 6
    assert courier(world, "refresh", "--ds", str(DAYS[0]), "--remake") == 0
    again = {path: data for path, data in published(world).items() if path.endswith(".parquet")}
    assert again == tables
