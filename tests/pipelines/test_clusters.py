"""Every stage makes on Flink, Spark and Prism, with workers of their own, what this machine makes.

The clusters are of this machine, each of two workers or task managers (`tests.support.clusters`).
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Artefacts, pinned
from tests.support import cluster_packages, clusters, standing_clusters
from tests.support.commands import Capture, courier, published, published_below
from tests.support.processes import ROOT, ended, is_alive
from tests.support.training_shop import SECTION
from tests.support.vector_shop import make_vector_shop
from tests.support.world import CLUSTERS, DAYS, World

pytestmark = pytest.mark.clusters

RANGE = ("--start-ds", str(DAYS[0]), "--end-ds", str(DAYS[2]))
FIT = ("--ds", str(DAYS[2]), "--clusters", str(CLUSTERS), "--mode", "fresh", "--out")
STAGES = {
    "training-rows": ("training-rows", *RANGE),
    "embed": ("embed", *RANGE),
    "item-features": ("item-features", *RANGE),
    "histories": ("histories", *RANGE),
    "simscore, by broadcast": ("simscore", *RANGE, "--embeddings-by", "broadcast"),
    "simscore, by shuffle": ("simscore", *RANGE, "--embeddings-by", "shuffle", "--remake"),
    "fit-codebook": ("fit-codebook", *FIT, "{fitted}"),
    "a night": ("refresh", "--ds", str(DAYS[3])),
}
Files = dict[str, bytes]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, artefacts: Artefacts) -> World:
    folder = tmp_path_factory.mktemp("clusters") / "shop"
    return pinned(World(folder, extra_settings=SECTION), artefacts)


def make_all(shop: World, capsys: Capture, engine: str, options: list[str]) -> dict[str, Files]:
    """Returns what is there after each of `STAGES`, and tells how long each has taken."""
    fitted, found = shop.folder / "fitted", {}
    for folder in (shop.root, fitted):
        shutil.rmtree(folder, ignore_errors=True)
    for stage, command in STAGES.items():
        started = time.monotonic()
        asked = [part.format(fitted=fitted) for part in command]
        assert courier(shop, *asked, "--", *options) == 0
        with capsys.disabled():
            sys.stdout.write(f"{engine}: {stage} {time.monotonic() - started:.1f} s\n")
        found[stage] = published(shop) | published_below(fitted)
    return found


@pytest.fixture(scope="module")
def expected() -> dict[str, Files]:
    """Holds what this machine makes, once the first test has made it."""
    return {}


@pytest.fixture(scope="module", params=["prism", "flink", "spark"])
def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, warm_python: str
) -> Iterator[tuple[str, list[str]]]:
    """Gives a cluster's name and Beam's options that send jobs there.

    Its workers have torch and Beam imported already.
    """
    if request.param == "prism":
        yield request.param, clusters.prism()
        return
    running = {"flink": clusters.flink, "spark": clusters.spark}[request.param]
    with running(tmp_path_factory.mktemp(request.param), python=warm_python) as cluster:
        yield request.param, cluster.options


def test_every_stage_has_the_bytes_of_the_local_engine(
    shop: World, engine: tuple[str, list[str]], expected: dict[str, Files], capsys: Capture
) -> None:
    if not expected:
        expected.update(make_all(shop, capsys, "this machine", []))
        # Each makes files; the same table comes by the other join.
        assert len(set(map(frozenset, expected.values()))) == len(STAGES) - 1
    found = make_all(shop, capsys, *engine)
    for stage, files in expected.items():
        assert len(files) > 5
        differing = [
            path for path in files | found[stage] if files.get(path) != found[stage].get(path)
        ]
        assert differing == [], stage


def test_nights_that_take_vectors_have_the_bytes_of_the_local_engine(
    tmp_path: Path, engine: tuple[str, list[str]]
) -> None:
    shop = make_vector_shop(tmp_path / "shop", 64, "lists", "string")
    made = []
    for options in ([], ["--", *engine[1]]):
        shutil.rmtree(shop.root, ignore_errors=True)
        assert courier(shop, "refresh", *RANGE, *options) == 0
        made.append(published(shop))
    assert len(made[0]) > 15
    assert made[0] == made[1]


# ---- Starting and ending -----------------------------------------------------------------------

HOLDER = """
import pathlib, subprocess, sys, time
from tests.support.clusters import Processes
with Processes(pathlib.Path(sys.argv[1])) as processes:
    processes.start("one", ["sh", "-c", "sleep 600 & echo $! $$; wait"])
    processes.wait_until(lambda: processes.log("one").read_text().endswith("\\n"), "one")
    print(processes.log("one").read_text(), flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_what_a_killed_process_has_started_ends_with_it(
    how: signal.Signals, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", HOLDER, tmp_path]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        numbers = [int(number) for number in holder.stdout.readline().split()]
        assert len(numbers) == 2
        assert all(map(is_alive, numbers))
        holder.send_signal(how)
    assert ended(numbers)


def test_what_does_not_start_is_told_with_the_end_of_its_log(tmp_path: Path) -> None:
    with clusters.Processes(tmp_path) as processes:
        processes.start("broken", ["sh", "-c", "echo no memory; exit 3"])
        with pytest.raises(clusters.NotUp, match=r"(?s)broken has ended with status 3.*no memory"):
            processes.wait_until(lambda: False, "broken")


def test_a_cluster_that_stays_ends_when_it_is_told_to(tmp_path: Path) -> None:
    place = tmp_path / "standing"
    assert not standing_clusters.stop(place)
    options = standing_clusters.start("flink", place)
    assert "--job_endpoint=localhost:" in options
    assert "--parallelism=2" in options
    assert standing_clusters.start("flink", place) == options  # there already
    group = processes_of(place)
    assert len(group) >= 4
    assert standing_clusters.stop(place)
    assert ended(group)
    assert not standing_clusters.stop(place)


def test_a_cluster_that_cannot_stay_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster_packages.jars("flink")
    monkeypatch.setenv("PATH", "nowhere")
    with pytest.raises(clusters.NotUp, match=r"flink did not start: .*no java on PATH"):
        standing_clusters.start("flink", tmp_path / "standing")
    assert not standing_clusters.is_held(tmp_path / "standing")


def processes_of(place: Path) -> list[int]:
    """Returns the processes whose command names `place`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            named = str(place).encode() in path.read_bytes()
        except OSError:
            continue
        if named and int(path.parent.name) != os.getpid():
            found.append(int(path.parent.name))
    return found


# ---- What is fetched ---------------------------------------------------------------------------


def test_a_jar_that_is_another_or_unknown_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jar").write_bytes(b"a")
    digest = "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"
    cluster_packages.check(tmp_path, {"a.jar": digest})
    for digests in ({"a.jar": digest[::-1]}, {"b.jar": digest}):
        with pytest.raises(
            cluster_packages.WrongFile, match=f"1 of 1 jars are not .*\n{digest}  a.jar"
        ):
            cluster_packages.check(tmp_path, digests)


def test_what_cannot_be_fetched_leaves_no_folder_that_looks_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_packages, "CACHE", tmp_path)
    monkeypatch.setenv("PATH", "nowhere")
    for _ in range(2):
        with pytest.raises(cluster_packages.NotFetched, match="no mvn on PATH"):
            cluster_packages.jars("flink")
    assert cluster_packages.main() == 4
    assert list(tmp_path.iterdir()) == []
