"""Runs modules in forks of itself, for whoever asks at a socket.

python -m tests.support.warm.server SOCKET
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
import traceback
import warnings
from pathlib import Path
from typing import Any, NoReturn

_IMPORTED = (
    "torch", "apache_beam", "apache_beam.runners.worker.sdk_worker_main", "pipelines.nightly",
    "pipelines.reports.status", "pipelines.artefacts.training", "pipelines.artefacts.codebooks",
    "pipelines.demo.shop",
)  # fmt: skip


def serve(address: str) -> None:
    for name in _IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # else each fork copies what its collector looks at
    sys.executable = str(Path(address).with_name("python"))  # for what the forks will start
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        while server in select.select([server, sys.stdin], [], [])[0]:
            connection, _ = server.accept()
            with connection:
                if not os.fork():
                    server.close()
                    os.close(0)
                    _run_and_tell(connection)


def _run_and_tell(connection: socket.socket) -> None:
    """Runs what is asked for in a fork; tells its number, and later how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, streams, *_ = socket.recv_fds(connection, 8, 3)
    asked = json.loads(connection.makefile().read(int.from_bytes(size, "big")))
    number = os.fork()
    if not number:
        connection.close()
        _become(asked, streams)
    _tell(connection, number)
    status = None
    while status is None:
        ended, found = os.waitpid(number, os.WNOHANG)
        if ended:
            status = os.waitstatus_to_exitcode(found)
        elif select.select([connection], [], [], 0.01)[0]:  # whoever asked has gone
            os.kill(number, signal.SIGKILL)
    _tell(connection, status)
    os._exit(0)


def _tell(connection: socket.socket, number: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # whoever asked may have gone
        connection.sendall(b"%d\n" % number)


def _become(asked: dict[str, Any], streams: list[int]) -> NoReturn:
    """Runs a module as `python -m` does, and ends this process as that does."""
    for place, stream in enumerate(streams):
        os.dup2(stream, place)
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    sys.argv = asked["args"]
    warnings.filterwarnings("ignore", module="runpy")  # that the module is imported already
    status = 0
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            sys.stderr.write(end.code + "\n")
    except BaseException:  # noqa: BLE001 - whoever asked gets it
        traceback.print_exc()
        status = 1
    # All that an interpreter does at its end, but for taking down what it has imported: a second.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    serve(sys.argv[1])
