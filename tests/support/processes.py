"""Starts scripts in processes of their own, which tests kill."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def start(script: str, *args: object) -> subprocess.Popen:
    command = [sys.executable, "-c", script, *map(str, args)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def killed(process: subprocess.Popen) -> int:
    process.kill()
    code = process.wait(20)
    process.stdout.close()
    return code
