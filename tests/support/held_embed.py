"""Runs EMBED and SIMSCORE on clusters that can be held: in a worker's first moment, or midway.

    python -m tests.support.held_embed worker HOLD …    as `python …`, which starts a worker
    python -m tests.support.held_embed courier …        as `courier …`, which tells more often

Each worker notes the items whose images it reads, and the users whose impressions it scores, in a
file beside HOLD.
"""

import os
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from feature_jobs.impressions import simscore
from feature_jobs.items import embed
from pipelines import cli
from pipelines.running import cluster_jobs, progress, worker_boot


@dataclass(frozen=True)
class Hold:
    """Holds workers by files beside `path`, for which they look."""

    path: str
    _seen: set[Path] = field(default_factory=set)

    def begin(self, boot: bool = False) -> None:
        """Lets one chunk or shard be made, and holds all others; or all workers from the first."""
        self.end()
        self._file("made").unlink(missing_ok=True)
        self._file("boot" if boot else "work").touch()

    def is_waited_for(self) -> bool:
        """Returns whether a chunk or shard is held, and another was made before."""
        return bool(self._waiting() - self._seen and self.made())

    def workers(self) -> list[int]:
        """Returns the processes that are held."""
        return [int(path.name.rpartition("-")[2]) for path in self._waiting() - self._seen]

    def forget_waiting(self) -> None:
        """Counts those no more that are held now: of a cancelled job they wait for some seconds."""
        self._seen.update(self._waiting())

    def end(self) -> None:
        for name in ("work", "boot", "passed"):
            self._file(name).unlink(missing_ok=True)
        self.forget_waiting()

    def made(self) -> list[int]:
        """Returns the items whose images were read, or users scored, as often as they were."""
        made = self._file("made")
        return list(map(int, made.read_text().split())) if made.exists() else []

    def _waiting(self) -> set[Path]:
        return set(Path(self.path).parent.glob("*.waiting-*"))

    # -- In workers --

    def wait_to_boot(self) -> None:
        while self._file("boot").exists():
            time.sleep(0.1)

    def embed_images(self, rows: pa.Table, *args: Any) -> pa.Table:
        self._wait()
        found = _embed_images(rows, *args)
        self._note(rows["item_id"].to_pylist())
        return found

    def score_by_night(self, rows: Mapping[int, pa.Table], *args: Any) -> Any:
        users = {user for some in rows.values() for user in some["user_id"].to_pylist()}
        if not users:
            return _score_by_night(rows, *args)
        self._wait()
        found = _score_by_night(rows, *args)
        self._note(users)
        return found

    def _wait(self) -> None:
        try:
            self._file("passed").touch(exist_ok=False)
        except FileExistsError:
            while self._file("work").exists():
                self._file(f"waiting-{os.getpid()}").touch()
                time.sleep(0.1)

    def _note(self, made: Iterable[int]) -> None:
        with open(self._file("made"), "a") as file:
            file.write(" ".join(map(str, made)) + "\n")

    def _file(self, name: str) -> Path:
        return Path(f"{self.path}.{name}")


_embed_images, _score_by_night = embed.embed_images, simscore.score_by_night


def main() -> int:
    what, *rest = sys.argv[1:]
    if what == "courier":
        # A minute is long for a test, and so is a quarter of one between two lines.
        cluster_jobs._BEGIN_SECONDS, progress._LOG_SECONDS = 3.0, 0.5
        cluster_jobs._CANCEL_SECONDS = 5.0
        return cli.main(rest)
    hold = Hold(rest[0])
    embed.embed_images, simscore.score_by_night = hold.embed_images, hold.score_by_night
    hold.wait_to_boot()
    sys.argv[1:] = rest[3:]  # after -m and the module
    worker_boot.main()
    return 0


if __name__ == "__main__":
    sys.exit(main())
