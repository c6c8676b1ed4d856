"""Runs a command in a process of its own beside this one."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Sequence

_SECONDS_TO_END = 30.0  # until a process that was asked to end is killed


@contextlib.contextmanager
def running(command: Sequence[str]) -> Iterator[None]:
    """Runs `courier` with these arguments beside the block, and waits for it.

    What it tells goes to this process's stderr. That it fails is none of the block's, which finds
    what it published and makes the rest. Where the block raises, it is ended.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", *command],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield
        process.wait()  # a job that it has begun elsewhere is not left alone
    finally:
        process.terminate()
        try:
            process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
