"""Holds what benchmarks of a night's stages share: their own processes, and the head of a report.

A stage runs in a process of its own, so that its peak of memory is the job's alone and nothing that
was measured before is still in its way.
"""

import datetime as dt
import json
import logging
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from feature_jobs.store import threads
from pipelines.config import load_settings
from pipelines.nightly import make_nights, plan_nights
from pipelines.stages import KINDS

WORKERS = 2
MODES = ("in_memory", "multi_threading", "multi_processing")
# Read by the BLAS libraries while they are loaded: a running process can no longer be told.
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def head() -> str:
    """Returns the head of a report: the date and the machine."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text() if info.exists() else "")
    processor = found[1] if found else platform.machine()
    return f"{dt.date.today()}, {processor}, {threads.cores()} cores, {capabilities()}"


def capabilities() -> str:
    """Returns what torch can use of the CPU: its vectors, then VNNI and AMX where they are there.

    What pins the vectors (ATEN_CPU_CAPABILITY) leaves VNNI and AMX as the CPU has them.
    """
    import torch  # not above: the processes of the stages, whose memory is measured, need no torch

    cpu = torch.cpu.get_capabilities()
    units = {"VNNI": ("avx512_vnni", "avx_vnni"), "AMX": ("amx_bf16", "amx_int8")}
    found = [unit for unit, names in units.items() if any(cpu.get(name) for name in names)]
    return " + ".join([torch.backends.cpu.get_cpu_capability(), *found])


def timed(work: Callable[[], object]) -> float:
    """Returns the seconds that `work` takes by the clock."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def touch_memory() -> None:
    """Takes nearly all memory that is free, writes to it, and gives it back; caches stay.

    The host of a virtual machine takes back what is free, within seconds, and a page that it must
    find again takes ten times as long as one that is there: whatever ran first would pay for the
    others.
    """
    info = Path("/proc/meminfo").read_text()
    kilobytes = int(re.findall(r"MemFree:\s+(\d+) kB", info)[0])
    fill = f"import numpy; numpy.ones({kilobytes * 1024 * 9 // 10}, 'u1')"
    subprocess.run([sys.executable, "-c", fill], check=True)


def child(script: str, *arguments: object, one_thread: bool = False) -> dict[str, Any]:
    """Returns the JSON that `script` prints in a process of its own."""
    command = [sys.executable, script, *map(str, arguments)]
    environment = os.environ | (ONE_THREAD if one_thread else {})
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def local(mode: str) -> list[str]:
    """Returns Beam's options of the local engine with so many workers."""
    return [f"--direct_num_workers={WORKERS}", f"--direct_running_mode={mode}"]


def run_stage(settings: Path, day: dt.date, stage: str, beam: Sequence[str]) -> dict[str, Any]:
    """Makes and publishes one stage of a night by Beam's options, in a process of its own.

    Returns the rows read, seconds, peak memory of one process in bytes, and counts.
    """
    return child(__file__, settings, day, stage, *beam)


def _peak_bytes() -> int:
    """Returns the peak of memory of this process since it began, in bytes.

    getrusage would count its parent's until then.
    """
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def main() -> None:
    """Runs one stage for `run_stage`, in the process of its own, and prints the figures as JSON."""
    logging.disable(logging.WARNING)
    settings, day, stage, *beam_args = sys.argv[1:]
    kinds = [kind for kind in KINDS if kind.name == stage]
    (night,) = plan_nights(load_settings(settings), [dt.date.fromisoformat(day)], kinds)
    start = time.perf_counter()
    (report,), _ = make_nights([night], beam_args, lambda _: None)
    seconds = time.perf_counter() - start
    made = report["stages"][stage]
    counts = made["counts"] | made["work"]
    found = {"rows": night.stages[0].input_rows, "seconds": seconds, "counts": counts}
    print(json.dumps({**found, "peak_bytes": made["peak_memory_bytes"]}))


if __name__ == "__main__":
    main()
