"""Runs EMBED on clusters that can be held: in a worker's first moment, or in the stage's midst.

    python -m tests.support.held_embed worker HOLD …    as `python …`, which starts a worker
    python -m tests.support.held_embed courier …        as `courier …`, which tells more often

Each worker that reads images notes which, in a file beside HOLD.
"""

import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from feature_jobs.items import embed
from pipelines import cli
from pipelines.running import cluster_jobs, progress, worker_boot


@dataclass(frozen=True)
class Hold:
    """Holds workers by files beside `path`, for which they look."""

    path: str
    _seen: set[Path] = field(default_factory=set)

    def begin(self, boot: bool = False) -> None:
        """Lets one chunk be embedded, and holds all others; or holds all workers from the first."""
        self.end()
        self._file("made").unlink(missing_ok=True)
        self._file("boot" if boot else "embed").touch()

    def is_waited_for(self) -> bool:
        """Returns whether a chunk is held, and another was embedded before."""
        return bool(self._waiting() - self._seen and self.made())

    def forget_waiting(self) -> None:
        """Counts those no more that are held now: of a cancelled job they wait for some seconds."""
        self._seen.update(self._waiting())

    def end(self) -> None:
        for name in ("embed", "boot", "passed"):
            self._file(name).unlink(missing_ok=True)
        self.forget_waiting()

    def made(self) -> list[int]:
        """Returns the items whose images were read, as often as they were."""
        made = self._file("made")
        return list(map(int, made.read_text().split())) if made.exists() else []

    def _waiting(self) -> set[Path]:
        return set(Path(self.path).parent.glob("*.waiting-*"))

    # -- In workers --

    def wait_to_boot(self) -> None:
        while self._file("boot").exists():
            time.sleep(0.1)

    def embed_images(self, rows: Any, *args: Any) -> Any:
        try:
            self._file("passed").touch(exist_ok=False)
        except FileExistsError:
            while self._file("embed").exists():
                self._file(f"waiting-{os.getpid()}").touch()
                time.sleep(0.1)
        found = _embed_images(rows, *args)
        with open(self._file("made"), "a") as made:
            made.write(" ".join(map(str, rows["item_id"].to_pylist())) + "\n")
        return found

    def _file(self, name: str) -> Path:
        return Path(f"{self.path}.{name}")


_embed_images = embed.embed_images


def main() -> int:
    what, *rest = sys.argv[1:]
    if what == "courier":
        # A minute is long for a test, and so is a quarter of one between two lines.
        cluster_jobs._BEGIN_SECONDS, progress._LOG_SECONDS = 3.0, 0.5
        return cli.main(rest)
    hold = Hold(rest[0])
    embed.embed_images = hold.embed_images
    hold.wait_to_boot()
    sys.argv[1:] = rest[3:]  # after -m and the module
    worker_boot.main()
    return 0


if __name__ == "__main__":
    sys.exit(main())
