"""Fetches what clusters are made of, once, into a cache outside the tree, and checks every file.

Maven has Flink, Spark and Beam's runners for them; Go builds Prism. Both find their hosts by their
own configuration. `cluster_packages.sha256` has the digest of each jar, and Go's sum of Beam's
module. `python -m tests.support.cluster_packages` fetches all; of a new version it prints the lines
that belong into that file.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

LOCK = Path(__file__).with_suffix(".sha256")
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "courier-clusters"
# The newest of Beam's runners that Maven's index has whole; it takes jobs of our newer Beam.
_BEAM = "2.62.0"
JARS = {
    "flink": [f"org.apache.beam:beam-runners-flink-1.19:{_BEAM}", "org.slf4j:slf4j-simple:1.7.30"],
    "spark": [
        "org.apache.spark:spark-streaming_2.12:3.5.6",
        # As in Spark's distribution; of its dependencies Maven would take others' older ones.
        "org.slf4j:slf4j-api:2.0.7",
        "com.fasterxml.jackson.core:jackson-core:2.15.2",
    ],
    "beam-on-spark": [f"org.apache.beam:beam-runners-spark-3:{_BEAM}"],
}
# Spark's logging and JSON stay Spark's.
_WITHOUT = {"beam-on-spark": "org.slf4j,com.fasterxml.jackson.core"}
PRISM = "v2.77.0"
_MODULE = f"github.com/apache/beam/sdks/v2@{PRISM}"
_COPY = "org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy-dependencies"


class NotFetched(Exception):
    """Says what cannot be had here."""


class WrongFile(Exception):
    """Says which file is another than it was."""


def jars(name: str) -> Path:
    """Returns the folder of the jars of one of `JARS`, fetched where they are not there yet."""
    return _once(f"{name}-{_digest(name)}", lambda folder: _fetch_jars(name, folder))


def prism() -> Path:
    """Returns the program of Prism, built where it is not there yet."""
    return _once(f"prism-{PRISM}", _build_prism) / "prism"


def locked() -> Mapping[str, str]:
    """Returns the digest of each file by its name."""
    return {name: digest for digest, name in map(str.split, LOCK.read_text().splitlines())}


def _digest(name: str) -> str:
    wanted = LOCK.read_text() + _pom(name)
    return hashlib.sha256(wanted.encode()).hexdigest()[:12]


def _once(name: str, fill: Callable[[Path], None]) -> Path:
    """Returns a folder of the cache that `fill` has filled; one that failed half-way is none."""
    folder = CACHE / name
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="partial-", dir=CACHE) as partial:
            made = Path(partial) / name
            made.mkdir()
            fill(made)
            try:
                made.rename(folder)
            except OSError:
                if not folder.exists():  # else another process was first
                    raise
    return folder


def _fetch_jars(name: str, folder: Path) -> None:
    pom = folder / "pom.xml"
    pom.write_text(_pom(name))
    _run(["mvn", "-q", "-B", "-f", pom, _COPY, "-DincludeScope=runtime",
          f"-DexcludeGroupIds={_WITHOUT.get(name, '')}",
          f"-DoutputDirectory={folder / 'jars'}"])  # fmt: skip
    check(folder / "jars", locked())


def check(folder: Path, digests: Mapping[str, str]) -> None:
    """Raises WrongFile where jars of `folder` have other digests than they should, or none."""
    found = {jar.name: hashlib.sha256(jar.read_bytes()).hexdigest() for jar in folder.glob("*.jar")}
    if wrong := sorted(name for name in found if digests.get(name) != found[name]):
        lines = "".join(f"\n{found[name]}  {name}" for name in wrong)
        raise WrongFile(
            f"{len(wrong)} of {len(found)} jars are not those of {LOCK.name}: what runs would not "
            "be what was tested. If their versions were changed on purpose, put these lines there; "
            f"else find out where Maven took them from.{lines}"
        )


def _build_prism(folder: Path) -> None:
    told = json.loads(_run(["go", "mod", "download", "-json", _MODULE]))
    if (expected := locked()[_MODULE]) != told["Sum"]:
        raise WrongFile(
            f"{_MODULE} has the sum {told['Sum']}, and {LOCK.name} has {expected}: what runs would "
            "not be what was tested. Find out where Go took it from."
        )
    path, version = _MODULE.split("@")
    _run(["go", "install", f"{path}/go/cmd/prism@{version}"], GOBIN=str(folder))


def _run(command: Sequence[str | Path], **variables: str) -> str:
    """Returns what a command prints; raises NotFetched where it fails or is not there."""
    program = str(command[0])
    if shutil.which(program) is None:
        raise NotFetched(f"There is no {program} on PATH, which fetches what clusters are made of.")
    done = subprocess.run(
        command, env=os.environ | variables, text=True, capture_output=True, timeout=1800
    )
    if done.returncode:
        told = " ".join((done.stdout + done.stderr)[-1500:].split())
        raise NotFetched(f"{program} cannot fetch what clusters are made of: {told}")
    return done.stdout


def _pom(name: str) -> str:
    found = ""
    for wanted in JARS[name]:
        group, artefact, version = wanted.split(":")
        found += (
            f"<dependency><groupId>{group}</groupId><artifactId>{artefact}</artifactId>"
            f"<version>{version}</version></dependency>\n"
        )
    return (
        '<project xmlns="http://maven.apache.org/POM/4.0.0"><modelVersion>4.0.0</modelVersion>\n'
        f"<groupId>courier</groupId><artifactId>{name}</artifactId><version>1</version>\n"
        f"<dependencies>\n{found}</dependencies></project>\n"
    )


def main() -> int:
    """Fetches all; returns 0, or 1 for a file that is not the one, or 4 for what cannot be had."""
    try:
        for name in JARS:
            jars(name)
        prism()
    except (NotFetched, WrongFile) as error:
        sys.stderr.write(f"Error: {error}\n")
        return 4 if isinstance(error, NotFetched) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
