"""Says in which versions the packages are here that decide which bytes are made.

Launcher and workers must have the same: what one pickles the other must be able to load, and one
table must not be made in two ways.
"""

import functools
import hashlib
import socket
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import feature_jobs
from feature_jobs import __version__
from feature_jobs.schemas import OperatorError


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # on a host that has less than the launcher
        return "missing"


PACKAGE_VERSIONS = {
    "courier": __version__,
    **{
        name: _installed(name)
        for name in ("apache-beam", "numpy", "pillow", "pyarrow", "timm", "torch", "torchvision")
    },
}


@functools.cache
def _code() -> str:
    """Returns a digest of this project's own modules: checkouts of one version may differ."""
    top, found = Path(feature_jobs.__file__).parents[1], hashlib.sha256()
    for package in ("courier_model", "feature_jobs", "pipelines"):
        for path in sorted((top / package).rglob("[!.]*.py")):  # none that an editor hides
            data = path.read_bytes()
            found.update(f"{path.relative_to(top).as_posix()} {len(data)} ".encode() + data)
    return found.hexdigest()[:12]


def of_process() -> dict[str, str]:
    """Returns the versions that all processes of a job must have in common, Python's among them.

    Nothing is told of builds, as +cpu: embeddings may be made on other processors than the rest.
    """
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return {"python": python, "courier's code": _code()} | {
        name: found.partition("+")[0] for name, found in PACKAGE_VERSIONS.items()
    }


def refusal(launchers: dict[str, str]) -> OperatorError | None:
    """Returns what the operator is told where the launcher has other versions than this worker.

    None where they are the same; `launchers` are what `of_process` returns there.
    """
    here = of_process()
    found = [
        f"{name} {here.get(name)} (the command's: {launchers.get(name)})"
        for name in sorted(here | launchers)
        if here.get(name) != launchers.get(name)
    ]
    if not found:
        return None
    return OperatorError(
        f"The worker on {socket.gethostname()} has other versions than the command that sent the "
        f"job: {', '.join(found)}. It might fail at what it was sent, or make a part of the tables "
        "in another way than the others; so it did nothing, and nothing was published. Install the "
        "same versions of this project and of what requirements.txt pins on all hosts, start pools "
        "of workers anew, and run the same command again."
    )
