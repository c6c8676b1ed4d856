"""Starts and stops clusters that stay: `make flink`, `make flink-stop`, and so for Spark.

    python -m tests.support.standing_clusters flink|spark start|stop
    python -m tests.support.standing_clusters prism

`start` prints Beam's options that send jobs there, to add to a command after `--`; those of a
cluster that runs already are printed again. `prism` prints them too: Prism needs no cluster. A
process of its own holds the cluster, with its logs in a folder of the cache. It reads the pipe
`stop` there, and ends with all that it has started once there is something to read.
"""

import errno
import os
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from tests.support import clusters
from tests.support.cluster_packages import CACHE, NotFetched, WrongFile
from tests.support.clusters import NotUp
from tests.support.processes import ROOT

_STOP_SECONDS = 30.0
_PIPE, _OPTIONS, _ERRORS = "stop", "options", "errors.log"


def start(engine: str, place: Path) -> str:
    """Starts a cluster that stays, logging into `place`; returns Beam's options, as in a shell.

    Raises NotUp where it does not start. One that is there already is left as it is.
    """
    if is_held(place):
        return (place / _OPTIONS).read_text()
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    os.mkfifo(place / _PIPE)
    pipe = os.open(place / _PIPE, os.O_RDWR)  # it is a writer, too: the pipe never ends
    with open(place / _ERRORS, "w") as errors:
        command = [sys.executable, "-m", "tests.support.standing_clusters", engine, "hold", place]
        held = subprocess.Popen(
            command, cwd=ROOT, stdin=pipe, stdout=subprocess.PIPE, stderr=errors, text=True,
            start_new_session=True,
        )  # fmt: skip
    os.close(pipe)
    with held.stdout:
        options = held.stdout.readline()
    if not options:
        held.wait()
        raise NotUp(f"{engine} did not start: {(place / _ERRORS).read_text()}")
    (place / _OPTIONS).write_text(options)
    return options


def hold(engine: str, place: Path) -> None:
    """Holds a cluster until standard input has a byte; prints its options once it is up."""
    with {"flink": clusters.flink, "spark": clusters.spark}[engine](place) as cluster:
        sys.stdout.write(shlex.join(cluster.options) + "\n")
        sys.stdout.flush()
        sys.stdin.buffer.read(1)


def stop(place: Path) -> bool:
    """Stops the cluster that logs into `place`; returns whether there was one."""
    if not is_held(place):
        return False
    pipe = os.open(place / _PIPE, os.O_WRONLY)
    os.write(pipe, b".")
    os.close(pipe)
    deadline = time.monotonic() + _STOP_SECONDS
    while is_held(place):
        if time.monotonic() > deadline:
            raise NotUp(f"The cluster of {place} has not ended {_STOP_SECONDS:.0f} s later.")
        time.sleep(0.05)
    return True


def is_held(place: Path) -> bool:
    """Returns whether a process holds the cluster of `place`: whether someone reads its pipe."""
    try:
        os.close(os.open(place / _PIPE, os.O_WRONLY | os.O_NONBLOCK))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENXIO):
            return False
        raise
    return True


def main(engine: str, what: str = "start", *given: str) -> int:
    place = CACHE / f"standing-{engine}"
    try:
        if what == "hold":
            hold(engine, Path(*given))
        elif what == "stop":
            found = "stopped" if stop(place) else "was not running"
            sys.stderr.write(f"{engine} {found}\n")
        elif engine == "prism":
            sys.stdout.write(shlex.join(clusters.prism()) + "\n")
        else:
            sys.stderr.write(
                f"Logs are in {place}; `make {engine}-stop` stops it. Add, after --:\n"
            )
            sys.stdout.write(start(engine, place))
    except (NotFetched, NotUp, WrongFile) as error:
        sys.stderr.write(f"Error: {error}\n")
        return 4 if isinstance(error, NotFetched) else 1
    return 0


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        sys.exit(main(*sys.argv[1:]))
