"""Gives tests a `python -m` that has torch and Beam imported already.

To import them takes five seconds, and dozens of processes that tests start would do it again. A
server has imported them and run nothing; each process is a fork of it (`server`), that begins where
an interpreter of its own would. The file that stands for the interpreter passes on its arguments,
its folder, its environment and its streams (`client`); killed or terminated, it takes the fork
along. What an interpreter settles when it starts stays as the server has it: one thread of OpenMP,
and where modules are looked for.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[3]


@contextlib.contextmanager
def python() -> Iterator[str]:
    """Gives the path of the file that stands for the interpreter."""
    with tempfile.TemporaryDirectory() as name:  # the path of a socket may have 100 letters
        address, program = Path(name) / "socket", Path(name) / "python"
        client = Path(__file__).with_name("client.py")
        program.write_text(
            f'#!/bin/sh\nexec "{sys.executable}" -S -E "{client}" "{address}" "$@"\n'
        )
        program.chmod(0o755)
        command = [sys.executable, "-m", "tests.support.warm.server", address]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        # It ends when its standard input does, as it does when this process is gone.
        pipe = subprocess.PIPE
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdin=pipe) as server:
            try:
                yield str(program)
            finally:
                server.kill()
