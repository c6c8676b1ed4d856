"""Starts workers that differ from the launcher, as a file says.

python -m tests.support.odd_workers FILE …    as `python …`, which starts a worker
"""

import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

# Loaded while they still may be read: another user may not look where this Python lies.
import google.api_core.retry  # noqa: F401

import pipelines.nightly  # noqa: F401
from feature_jobs.items import embed
from feature_jobs.store import documents, faults, versions
from pipelines.running import worker_boot


@dataclass(frozen=True)
class Odd:
    """Says in what workers differ.

    They have other `versions`, lack a class of EMBED, run as the `user` of another number, or fail
    at images with a `bug`.
    """

    versions: dict[str, str] = field(default_factory=dict)
    lacks: str = ""
    user: int = 0
    bug: str = ""

    def write(self, path: Path) -> None:
        documents.write_json(str(path), asdict(self))

    def become(self) -> None:
        versions.PACKAGE_VERSIONS.update(self.versions)
        if self.lacks:
            delattr(embed, self.lacks)
        if self.bug:
            embed.embed_images = self._fail
        if self.user:
            faults.FORBIDDEN_SECONDS = 0.5
            os.setgroups([])
            os.setgid(self.user)
            os.setuid(self.user)

    def _fail(self, *_: Any) -> NoReturn:
        raise ValueError(self.bug)


def main() -> None:
    path, _, _, *rest = sys.argv[1:]  # -m and the module
    Odd(**documents.read_json(path)).become()
    sys.argv[1:] = rest
    worker_boot.main()


if __name__ == "__main__":
    main()
