"""Runs Flink and Spark on this machine, as clusters of processes, and finds Prism.

The clusters that `flink` and `spark` give end with this process, however it ends: a guard kills
them once its standard input does. `standing_clusters` has another process hold one until it is told
to stop.
"""

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tests.support import cluster_packages
from tests.support.processes import ROOT, answers, free_port

_START_SECONDS = 120.0
_GUARD = "import os, signal, sys; sys.stdin.buffer.read(1); os.killpg(0, signal.SIGKILL)"
# Much starts here and little runs for long: compiled once, and collected by one thread.
_JAVA = ["java", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-Xshare:auto"]
_JOB_SERVER = Path(__file__).with_name("JobServer.java")
_DATED = [
    "-Dorg.slf4j.simpleLogger.showDateTime=true",
    "-Dorg.slf4j.simpleLogger.dateTimeFormat=HH:mm:ss.SSS",
]
_OPENED = (
    "java.lang", "java.lang.invoke", "java.lang.reflect", "java.net", "java.nio", "java.io",
    "java.util", "java.util.concurrent", "java.util.concurrent.atomic", "java.text", "java.time",
    "sun.nio.ch", "sun.nio.cs", "sun.security.action", "sun.util.calendar",
)  # fmt: skip


class NotUp(Exception):
    """Says which process of a cluster is not up, with the end of its log."""


class Processes:
    """Starts processes that end with this one, however it ends, and logs each into a file."""

    def __init__(self, folder: Path):
        self.folder, self.named = folder, dict[str, subprocess.Popen]()
        folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> "Processes":
        command = [sys.executable, "-I", "-S", "-c", _GUARD]
        self._guard = subprocess.Popen(command, stdin=subprocess.PIPE, process_group=0)
        return self

    def __exit__(self, *_: object) -> None:
        """Kills all of them, and what they have started."""
        os.killpg(self._guard.pid, signal.SIGKILL)
        for process in (self._guard, *self.named.values()):
            process.wait()

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def start(self, name: str, command: Sequence[str | Path], **variables: str) -> None:
        """Starts a process as one of the group that the guard kills; raises NotUp without it."""
        if shutil.which(command[0]) is None:
            raise NotUp(f"{name} cannot start: there is no {command[0]} on PATH.")
        with open(self.log(name), "ab") as log:
            self.named[name] = subprocess.Popen(
                command, cwd=self.folder, env=os.environ | variables, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, process_group=self._guard.pid,
            )  # fmt: skip

    def running(self, kind: str = "") -> list[str]:
        """Returns the names that begin with `kind` of what has not ended."""
        alive = [name for name, process in self.named.items() if process.poll() is None]
        return [name for name in alive if name.startswith(kind)]

    def wait_until(self, found: Callable[[], bool], *names: str) -> None:
        """Waits until `found`; raises NotUp where one of `names` ends before, or it takes long."""
        deadline = time.monotonic() + _START_SECONDS
        while not found():
            for name in names:
                if (status := self.named[name].poll()) is not None:
                    raise NotUp(f"{name} has ended with status {status}. {self._tail(name)}")
            if time.monotonic() > deadline:
                told = "\n".join(map(self._tail, names))
                raise NotUp(f"{', '.join(names)}: not up after {_START_SECONDS:.0f} s. {told}")
            time.sleep(0.1)

    def _tail(self, name: str) -> str:
        lines = self.log(name).read_text(errors="replace").splitlines()[-20:]
        return "\n".join([f"The end of {self.log(name)}:", *lines])


class Flink:
    """A job manager, task managers of one slot each, and a job server that stays.

    `settings` are Flink's own; workers run in `python`. A task manager has 3/4 GB.
    """

    def __init__(self, processes: Processes, python: str, settings: Mapping[str, str]):
        self.processes, self._jars = processes, cluster_packages.jars("flink") / "jars"
        self._worker = _write_worker(processes.folder, python)
        self._rest, self._job_port = free_port(), free_port()
        self.url = f"http://localhost:{self._rest}"
        own = {
            "jobmanager.rpc.address": "localhost",
            "jobmanager.rpc.port": free_port(),
            "rest.address": "localhost",
            "rest.port": self._rest,
            "io.tmp.dirs": processes.folder,
            # What was killed is seen within seconds, by its closed ports; what hangs, by these.
            "heartbeat.interval": 1000,
            "heartbeat.timeout": 20000,
            "restart-strategy.type": "none",
            # Classes of Beam are those of the cluster's own path, and not loaded anew for each job.
            "classloader.resolve-order": "parent-first",
            "taskmanager.cpu.cores": 1,
            "taskmanager.numberOfTaskSlots": 1,
            "taskmanager.memory.framework.heap.size": "64m",
            "taskmanager.memory.task.heap.size": "192m",
            "taskmanager.memory.managed.size": "128m",
            "taskmanager.memory.framework.off-heap.size": "128m",
            "taskmanager.memory.task.off-heap.size": "0m",
            "taskmanager.memory.network.min": "64m",
            "taskmanager.memory.network.max": "64m",
            "taskmanager.network.sort-shuffle.min-buffers": 64,
            "taskmanager.memory.jvm-metaspace.size": "192m",
            "taskmanager.memory.jvm-overhead.min": "64m",
            "taskmanager.memory.jvm-overhead.max": "64m",
        }
        lines = [f"{name}: {value}" for name, value in {**own, **settings}.items()]
        (processes.folder / "flink-conf.yaml").write_text("\n".join(lines) + "\n")
        self._started = 0

    @property
    def options(self) -> list[str]:
        """Beam's options that send a job here, at as many slots as there are now."""
        slots = self.ask("overview")["slots-total"]
        return [
            "--runner=FlinkRunner", f"--job_endpoint=localhost:{self._job_port}",
            f"--flink_master=localhost:{self._rest}",
            f"--parallelism={slots}", *_worker_options(self._worker),
        ]  # fmt: skip

    def start_job_manager(self) -> None:
        entry = "org.apache.flink.runtime.entrypoint.StandaloneSessionClusterEntrypoint"
        self._java("jobmanager", ["-Xmx256m"], entry, "--configDir", self.processes.folder)
        self.processes.wait_until(lambda: self.ask("overview") is not None, "jobmanager")

    def start_task_manager(self) -> str:
        """Starts one more, and returns its name."""
        self._started += 1
        name = f"taskmanager-{self._started}"
        self._java(
            name, ["-Xmx256m", "-XX:MaxDirectMemorySize=192m", "-XX:MaxMetaspaceSize=192m"],
            "org.apache.flink.runtime.taskexecutor.TaskManagerRunner",
            "--configDir", self.processes.folder, f"-Dtaskmanager.resource-id={name}",
        )  # fmt: skip
        return name

    def start_job_server(self) -> None:
        self._java(
            "jobserver", ["-Xmx384m"], _JOB_SERVER,
            "org.apache.beam.runners.flink.FlinkJobServerDriver",
            f"--flink-master=localhost:{self._rest}", f"--flink-conf-dir={self.processes.folder}",
            *_job_server_options(self.processes.folder, self._job_port),
        )  # fmt: skip

    def wait(self) -> None:
        """Waits until all that was started is up."""
        wanted = len(self.processes.running("taskmanager"))

        def found() -> bool:
            slots = (self.ask("overview") or {}).get("slots-total", 0)  # told after they are there
            return slots >= wanted and answers(self._job_port)

        self.processes.wait_until(found, *self.processes.running())

    def ask(self, path: str) -> Any:
        """Returns what the job manager answers to a GET of its REST interface; None for nothing."""
        return _get_json(f"{self.url}/v1/{path}")

    def _java(self, name: str, flags: Sequence[str], *command: str | Path) -> None:
        jars = ":".join(map(str, sorted(self._jars.iterdir())))
        start = [*_JAVA, *_DATED, *_opened(), *flags, "-cp", jars, *command]
        self.processes.start(name, start)


class Spark:
    """A master, workers of one core each, and a job server that stays: each job's driver."""

    def __init__(self, processes: Processes, python: str):
        self.processes, self._worker = processes, _write_worker(processes.folder, python)
        self._home = cluster_packages.jars("spark")
        beam = cluster_packages.jars("beam-on-spark") / "jars"
        self._beam = ":".join(map(str, sorted(beam.iterdir())))
        self._port, self._web, self._job_port = free_port(), free_port(), free_port()
        self.url = f"http://localhost:{self._web}"
        self._started = 0

    @property
    def options(self) -> list[str]:
        """Beam's options that send a job here."""
        return [
            "--runner=SparkRunner", f"--job_endpoint=localhost:{self._job_port}",
            *_worker_options(self._worker),
        ]  # fmt: skip

    def start_master(self) -> None:
        self._spark(
            "master", "org.apache.spark.deploy.master.Master", "--host", "localhost",
            "--port", str(self._port), "--webui-port", str(self._web),
        )  # fmt: skip
        self.processes.wait_until(lambda: self.ask() is not None, "master")

    def start_worker(self) -> str:
        """Starts one more, and returns its name."""
        self._started += 1
        name = f"worker-{self._started}"
        self._spark(
            name, "org.apache.spark.deploy.worker.Worker", "--host", "localhost", "--cores", "1",
            "--memory", "1g", "--work-dir", str(self.processes.folder / name),
            f"spark://localhost:{self._port}",
        )  # fmt: skip
        return name

    def start_job_server(self, workers: int) -> None:
        settings = {
            "spark.executor.extraClassPath": self._beam,
            "spark.executor.memory": "512m",
            "spark.executor.extraJavaOptions": " ".join([*_JAVA[1:], *_opened()]),
            "spark.driver.host": "localhost",
            "spark.default.parallelism": str(workers),
            "spark.local.dir": str(self.processes.folder),
        }
        flags = [f"-D{name}={value}" for name, value in settings.items()]
        self.processes.start(
            "jobserver",
            [*_JAVA, *_opened(), "-Xmx512m", *flags, "-cp", f"{self._beam}:{self._home}/jars/*",
             _JOB_SERVER, "org.apache.beam.runners.spark.SparkJobServerDriver",
             f"--spark-master-url=spark://localhost:{self._port}",
             *_job_server_options(self.processes.folder, self._job_port)],
        )  # fmt: skip

    def wait(self) -> None:
        """Waits until all that was started is up."""
        wanted = len(self.processes.running("worker"))

        def found() -> bool:
            told = self.ask() or {}
            return told.get("aliveworkers", 0) >= wanted and answers(self._job_port)

        self.processes.wait_until(found, *self.processes.running())

    def ask(self) -> Any:
        """Returns what the master tells of itself; None for nothing."""
        return _get_json(f"{self.url}/json/")

    def _spark(self, name: str, entry: str, *arguments: str) -> None:
        command = [*_JAVA, *_opened(), "-Xmx256m", "-cp", f"{self._home}/jars/*", entry, *arguments]
        variables = {
            "SPARK_HOME": str(self._home),
            "SPARK_SCALA_VERSION": "2.12",
            "SPARK_LOCAL_DIRS": str(self.processes.folder),
        }
        self.processes.start(name, command, **variables)


@contextlib.contextmanager
def flink(
    folder: Path, task_managers: int = 2, python: str = sys.executable,
    settings: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Flink]:  # fmt: skip
    """Gives a Flink cluster that logs into `folder`; raises NotUp where it does not start.

    `python` is its workers' interpreter; `settings` are Flink's own.
    """
    with Processes(folder) as processes:
        cluster = Flink(processes, python, settings)
        for _ in range(task_managers):
            cluster.start_task_manager()
        cluster.start_job_server()
        cluster.start_job_manager()
        cluster.wait()
        yield cluster


@contextlib.contextmanager
def spark(folder: Path, workers: int = 2, python: str = sys.executable) -> Iterator[Spark]:
    """Gives a Spark cluster that logs into `folder`; raises NotUp where it does not start.

    `python` is its workers' interpreter.
    """
    with Processes(folder) as processes:
        cluster = Spark(processes, python)
        cluster.start_job_server(workers)
        cluster.start_master()  # up before its workers ask for it, which would wait for long
        for _ in range(workers):
            cluster.start_worker()
        cluster.wait()
        yield cluster


def prism() -> list[str]:
    """Returns Beam's options that run a job on Prism, which each command starts by itself."""
    return ["--runner=PrismRunner", f"--prism_location={cluster_packages.prism()}"]


def _opened() -> list[str]:
    return [f"--add-opens=java.base/{name}=ALL-UNNAMED" for name in _OPENED]


def _job_server_options(folder: Path, port: int) -> list[str]:
    return [
        "--job-host=localhost", f"--job-port={port}", "--artifact-port=0", "--expansion-port=0",
        f"--artifacts-dir={folder / 'artifacts'}",
    ]  # fmt: skip


def _write_worker(folder: Path, python: str) -> Path:
    """Writes a program that is the worker of this checkout; what it prints goes to a file each."""
    program = folder / "courier-worker"
    program.write_text(
        f"#!/bin/sh\ncd {shlex.quote(str(ROOT))}\n"
        f"exec {shlex.quote(python)} -m pipelines.running.worker_boot "
        f'"$@" >>{shlex.quote(str(folder))}/python-$$.log 2>&1\n'
    )
    program.chmod(0o755)
    return program


def _worker_options(program: Path) -> list[str]:
    return [
        "--environment_type=PROCESS", f"--environment_options=process_command={program}",
    ]  # fmt: skip


def _get_json(url: str) -> Any:
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
        return json.load(answer)
    return None
