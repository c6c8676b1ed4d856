"""Runs EMBED's workers, the first of which is held at a place while the others go on: a zombie.

    python -m tests.support.zombies FILE …    as `python …`, which starts a worker

A place is "embed", where a chunk is embedded, or "write", where a part is written; at "late" nobody
is held, and all see late what others write. What is held does not end with the process that started
it, nor when it hears no more from there: as on a host that was cut off, which takes long to notice.
"""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from feature_jobs.items import embed
from feature_jobs.schemas import DataContractError
from feature_jobs.store import partitions
from pipelines.running import worker_boot
from tests.support.late_disk import show_late

REFUSED = "said by a zombie"
LATE_SECONDS = 2.0


@dataclass(frozen=True)
class Zombie:
    """Tells workers by files beside `path` who is held, and hears of them by others."""

    path: str

    def begin(self, place: str, others_wait: bool = False, refuses: bool = False) -> None:
        """Holds the first that comes to a `place` until it is released.

        Then it does there what it came for, a part with values of its own, or refuses. The others
        that come there may wait until it has.
        """
        for found in Path(self.path).parent.glob("*"):
            found.unlink()
        for name, wanted in (("wait", others_wait), ("refuses", refuses), (place, True)):
            if wanted:
                self._file(name).touch()

    @property
    def is_held(self) -> bool:
        return self._file("held").exists()

    @property
    def is_passed(self) -> bool:
        """Tells whether another came to the place."""
        return self._file("passed").exists()

    @property
    def has_ended(self) -> bool:
        """Tells whether it has done what it was held from."""
        return self._file("ended").exists()

    def release(self) -> None:
        self._file("released").touch()

    # -- In workers --

    def at(self, place: str, real: Callable, changed: Callable) -> Callable:
        """Returns a function that does what `real` does, and what `changed` does for the zombie."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if not self._file(place).exists() or not self._is_first():
                return real(*args, **kwargs)
            self._wait_for("released")
            try:
                return changed(*args, **kwargs)
            finally:
                self._file("ended").touch()

        return call

    def _is_first(self) -> bool:
        try:
            with open(self._file("held"), "x") as file:
                file.write(str(os.getpid()))
        except FileExistsError:
            self._file("passed").touch()
            if self._file("wait").exists():
                self._wait_for("ended")
            return False
        return True

    def see_late(self) -> None:
        """Lets this process see late what others write, if all are to."""
        if self._file("late").exists():
            show_late(pytest.MonkeyPatch(), LATE_SECONDS)

    def outlive(self) -> None:
        """Keeps this process until it has done what it is held from, if it is."""
        if self.is_held and self._file("held").read_text() == str(os.getpid()):
            self._wait_for("ended")

    def embed_images(self, *args: Any) -> pa.Table:
        found = _embed_images(*args)
        if self._file("refuses").exists():
            raise DataContractError(REFUSED)
        return found

    def write_part(
        self, folder: str, table: Any, schema: Any, rows: pa.Table, *args: Any, **kwargs: Any
    ) -> None:
        at = rows.column_names.index("image_uri")
        rows = rows.set_column(at, "image_uri", pa.repeat(REFUSED, len(rows)))
        _write_part(folder, table, schema, rows, *args, **kwargs)

    def _wait_for(self, name: str) -> None:
        while not self._file(name).exists():
            time.sleep(0.05)

    def _file(self, name: str) -> Path:
        return Path(f"{self.path}.{name}")


_embed_images, _write_part = embed.embed_images, partitions.write_part


def main() -> None:
    path, *rest = sys.argv[1:]
    zombie = Zombie(path)
    zombie.see_late()
    embed.embed_images = zombie.at("embed", _embed_images, zombie.embed_images)
    partitions.write_part = zombie.at("write", _write_part, zombie.write_part)
    sys.argv[1:] = rest[2:]  # after -m and the module
    worker_boot._PARENT_SECONDS = 3600.0
    try:
        worker_boot.main()
    finally:
        zombie.outlive()


if __name__ == "__main__":
    main()
