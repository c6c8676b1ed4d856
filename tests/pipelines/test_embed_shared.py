"""One encoder serves all processes of a worker, as a GPU wants it: Beam keeps it behind a proxy."""

import pytest

from feature_jobs.items.embed import EmbedChunk
from feature_jobs.store import files
from tests.support.commands import Capture, courier, paragraph, published
from tests.support.world import DAYS, World


@pytest.fixture
def _shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EmbedChunk, "share_model_across_processes", lambda self: True)


def embed(world: World) -> int:
    return courier(world, "embed", "--ds", str(DAYS[0]))


@pytest.mark.usefixtures("_shared")
def test_a_shared_encoder_makes_the_same_bytes(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert embed(world) == 0
    shared = published(world)
    files.delete_tree(str(world.root))
    monkeypatch.undo()
    assert embed(world) == 0
    assert published(world) == shared


@pytest.mark.usefixtures("_shared")
def test_a_damaged_shared_encoder_is_told_in_one_paragraph(world: World, capsys: Capture) -> None:
    pin = world.settings().pins[0]
    weights = f"{pin.encoder}/model.safetensors"
    intact = files.read_bytes(weights)
    try:
        files.write_bytes(weights, intact[:-4] + b"\0\0\0\1")
        assert embed(world) == 1
    finally:
        files.write_bytes(weights, intact)
    assert "damaged" in paragraph(capsys)
