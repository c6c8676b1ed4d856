"""Makes the worlds that several tests read; no test changes what a session-wide one holds."""

import os
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from feature_jobs.store import gcs_client
from tests.support import quick_beam, warm
from tests.support.commands import make_night
from tests.support.gcs_emulator import NEAR, Nearby, make_objects
from tests.support.world import DAYS, Kept, World, make_codebook, make_encoder

# Files that take half a minute or more, the longest first. Begun last, one of them would still run
# when all others have ended: a process takes whole files, in this order (`make test`).
LONGEST = [
    "test_ctr_join_worlds.py",
    "test_any_order_of_jobs.py", "test_any_order.py", "test_killed_nights.py",
    "test_false_alarms.py", "test_gate_faults.py", "test_publishing_schedules.py",
    "test_ranges.py", "test_refresh.py", "test_history_nights.py", "test_held_nights.py",
    "test_publishing_faults.py",
    "test_embed_killed.py", "test_readme.py", "test_simscore_worlds.py",
    "test_nights_in_a_bucket.py", "test_codebooks.py", "test_portable_runner.py",
    "test_full_runs.py", "test_embed_nights.py", "test_retention.py", "test_rows.py",
    "test_audit.py",
]  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(scope="session")
def warm_python() -> Iterator[str]:
    """Gives the path of a `python -m` that has torch and Beam imported already."""
    with warm.python() as program:
        yield program


@dataclass(frozen=True)
class Artefacts:
    encoder: str
    codebook: str


@pytest.fixture(scope="session", autouse=True)
def _quick_beam() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        quick_beam.remember(patch)
        yield


@pytest.fixture(scope="session")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> Artefacts:
    """Makes a tiny encoder and a codebook for it."""
    folder = tmp_path_factory.mktemp("artefacts")
    encoder = make_encoder(folder / "encoders")
    return Artefacts(encoder, make_codebook(folder / "codebooks", encoder))


def pinned(world: World, artefacts: Artefacts) -> World:
    world.pin(DAYS[0], artefacts.encoder, artefacts.codebook)
    return world


@pytest.fixture
def world(request: pytest.FixtureRequest, tmp_path: Path, artefacts: Artefacts) -> World:
    """Makes a world of one's own before its first night, or after it where a test is so marked."""
    if request.node.get_closest_marker("first_night"):
        return request.getfixturevalue("first_night").again()
    return pinned(World(tmp_path / "shop"), artefacts)


@pytest.fixture(scope="session")
def first_night(tmp_path_factory: pytest.TempPathFactory, artefacts: Artefacts) -> Kept:
    """Makes a world and its first night, once for all tests."""
    world = pinned(World(tmp_path_factory.mktemp("first-night") / "shop"), artefacts)
    make_night(world.settings(), DAYS[0])
    return Kept(world)


@pytest.fixture(scope="session", params=["int", "string"])
def refreshed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, artefacts: Artefacts
) -> World:
    """Makes a world after all its nights, with int64 or string IDs; tests only read it."""
    folder = tmp_path_factory.mktemp("refreshed") / "shop"
    world = pinned(World(folder, ids=request.param), artefacts)
    for day in DAYS:
        world.write_images(day)
        make_night(world.settings(), day)
    return world


@pytest.fixture(scope="session")
def in_memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Gives a folder whose files are in memory, where there is such a one.

    Nights of a few rows spend half of their time on deleting small files from a disk.
    """
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path_factory.mktemp("in-memory")
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Keeps torch to one thread.

    Convolutions of 32 pixels are so short that two threads mostly wait for each other.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def gcs_emulator() -> Iterator[str]:
    """Gives the address of a store of Google's API with one empty bucket, `shop`."""
    command = [sys.executable, "-m", "tests.support.gcs_emulator", "shop"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=Path(__file__).parents[1], text=True, **pipes) as process:
        yield process.stdout.readline().strip()
        process.kill()


@pytest.fixture
def bucket(gcs_emulator: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Gives an empty "folder" of one's own in a bucket, `gs://…`, which processes find too."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs_emulator)
    gcs_client.forget_client()
    yield f"gs://shop/{uuid.uuid4().hex}"
    gcs_client.forget_client()


@pytest.fixture
def near_bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Gives an empty bucket, `gs://…`, that is in this process and that no other one finds."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", NEAR)
    gcs_client.forget_client()
    gcs_client.client()._http_internal = Nearby(make_objects("shop"))
    yield "gs://shop"
    gcs_client.forget_client()
