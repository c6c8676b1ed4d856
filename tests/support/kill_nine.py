"""Kills `courier embed` with signal 9 at random moments and lets it resume, many times over.

    python -m tests.support.kill_nine CONFIG DS KILLS SEED

Every run is a fork of this process, which has imported all that a run needs and wired the job once,
but has run nothing, as an interpreter of its own would take ten seconds to begin. Each run begins
with the files below the root as they are now. Prints a summary as JSON.
"""

import datetime as dt
import gc
import importlib
import json
import os
import random
import shutil
import signal
import sys
import time
from glob import glob
from pathlib import Path
from typing import Any

import apache_beam as beam
import pyarrow as pa
import pytest

from feature_jobs.items import embed
from feature_jobs.store.pieces import read_all
from pipelines import cli
from pipelines.config import load_settings
from pipelines.nightly import plan_nights
from pipelines.stages import EMBED
from tests.support import quick_beam
from tests.support.commands import published_below

for _module in ("pipelines.reports.status", "torch"):
    importlib.import_module(_module)

_ENDED = os.WEXITED | os.WNOHANG | os.WNOWAIT  # asks, and leaves the answer to whoever waits


class Runs:
    """Runs one command on one root, each time in a process of its own."""

    def __init__(self, config: str, ds: str):
        self.root = Path(load_settings(config).root)
        self._command = ["embed", "--config", config, "--ds", ds]
        self._before = self.root.with_name("before")
        self._told = self.root.with_name("told.json")
        shutil.copytree(self.root, self._before)

    def begin_again(self) -> None:
        shutil.rmtree(self.root)
        shutil.copytree(self._before, self.root)

    def wire(self) -> None:
        """Has Beam look at all that the job consists of, so that no run has to (`quick_beam`)."""
        *_, config, _, ds = self._command
        (night,) = plan_nights(load_settings(config), [dt.date.fromisoformat(ds)], [EMBED])
        type(night.planned[0]).wire(beam.Pipeline(), night.planned, str(self._told) + "-wired")

    def start(self) -> int:
        """Starts a process that runs the command; returns its number."""
        self._told.unlink(missing_ok=True)
        number = os.fork()
        if number:
            return number
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        chunks = _watch_chunks()
        status = cli.main(self._command)
        self._told.write_text(json.dumps(chunks))
        os._exit(status)

    def finish(self, number: int) -> list[int]:
        """Waits for a process to end well; returns the size of each chunk that it embedded."""
        _, status = os.waitpid(number, 0)
        if status:
            raise RuntimeError(f"courier embed ended with {os.waitstatus_to_exitcode(status)}")
        found: list[int] = json.loads(self._told.read_text())
        return found

    def chunks(self) -> int:
        """Returns how many chunks a run has written."""
        return len(self._chunk_files())

    def embedded(self) -> int:
        """Returns how many images a killed run has embedded, as its chunk files say."""
        return sum(read_all(path)["reason"].null_count for path in self._chunk_files())

    def _chunk_files(self) -> list[str]:
        """Returns the chunk files, none that was only begun (".tmp-…").

        They are found by `glob`, which bears that folders go meanwhile.
        """
        return glob(f"{self.root}/_staging/*/embed/chunks-*/0*.arrow")


def _watch_chunks() -> list[int]:
    """Returns a list that gets the number of images of each chunk embedded from now on."""
    chunks: list[int] = []
    real = embed.embed_images

    def count(rows: pa.Table, *args: Any) -> pa.Table:
        chunks.append(len(rows))
        return real(rows, *args)

    embed.embed_images = count
    return chunks


def kill(runs: Runs, chunks: int, seconds: float) -> bool:
    """Kills a run `seconds` after it has written `chunks`; returns whether it was still at work.

    How fast a run is depends on what else the machine does: time alone would hit the start of a
    slow one again and again.
    """
    runs.begin_again()
    number = runs.start()
    while runs.chunks() < chunks and not os.waitid(os.P_PID, number, _ENDED):
        time.sleep(0.001)
    time.sleep(seconds)
    os.kill(number, signal.SIGKILL)
    _, status = os.waitpid(number, 0)
    return os.WIFSIGNALED(status)


def main(config: str, ds: str, kills: int, seed: int) -> dict[str, Any]:
    rng, runs = random.Random(seed), Runs(config, ds)
    runs.wire()
    gc.collect()
    gc.freeze()  # else each fork copies what its collector looks at
    started = time.monotonic()
    chunks = runs.finish(runs.start())
    duration = time.monotonic() - started
    uninterrupted = published_below(runs.root)
    found: dict[str, Any] = {"chunks": len(chunks), "images": sum(chunks), "seconds": duration}
    found |= {"killed": 0, "too_late": 0, "mismatches": 0, "resumed_from_chunks": 0}
    while found["killed"] < kills and found["too_late"] < 2 * kills:
        # Every other time anywhere from the start on, else in the midst of embedding.
        chunk = rng.randrange(1, len(chunks)) if found["killed"] % 2 else 0
        if not kill(runs, chunk, rng.random() * (duration / len(chunks) if chunk else duration)):
            found["too_late"] += 1
            continue
        found["killed"] += 1
        had = runs.embedded()
        again = sum(runs.finish(runs.start()))
        found["resumed_from_chunks"] += had > 0 and again < sum(chunks)
        found["mismatches"] += published_below(runs.root) != uninterrupted
    return found


if __name__ == "__main__":
    _config, _ds, _kills, _seed = sys.argv[1:]
    quick_beam.remember(pytest.MonkeyPatch())
    sys.stdout.write(json.dumps(main(_config, _ds, int(_kills), int(_seed))) + "\n")
