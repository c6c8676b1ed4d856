"""`courier train --dry-run` says what training would take, and leaves nothing behind."""

import re
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from courier_model.training import rehearsal
from tests.support.commands import Capture
from tests.support.training_shop import D, copied_until_d, train
from tests.support.world import World

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def shop(prepared: Path, tmp_path: Path) -> World:
    return copied_until_d(prepared, tmp_path)


def listing(world: World) -> list[str]:
    return sorted(str(path) for path in world.folder.rglob("*"))


def test_what_it_says_is_what_training_does(
    shop: World, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearsal, "_PATIENCE", 0.0)
    monkeypatch.setattr(rehearsal, "_FIRST_IMAGES", 8)
    before = listing(shop)
    assert train(shop, "--dry-run") == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    assert listing(shop) == before
    steps, rows, images, evaluations, held_out = map(
        int,
        re.search(
            r"(\d+) steps of (\d+) rows, which show about (\d+) images; (\d+) evaluations on "
            r"(\d+) images",
            printed.err,
        ).groups(),  # type: ignore[union-attr]
    )
    assert rows == 16
    assert 0 < images <= 160
    assert re.search(r"an image cache of up to [\d.]+ kB, where [\d.]+ .B are free", printed.err)
    assert re.search(r"a step takes [\d.]+ s on cpu.* in fp32, estimated from one on", printed.err)
    assert re.search(r"[\d.]+ .B of memory at most\n", printed.err)
    assert re.search(r"about \d+ .*in all: steps .*Nothing was written\.\n", printed.err)

    assert train(shop) == 0
    told = capsys.readouterr().err
    assert f"step {steps}/{steps}" in told
    assert told.count("held out, ") - told.count("held out, above") - told.count("less") == (
        evaluations + 1
    )
    assert held_out > 0
    assert "checkpoints" not in printed.err
    assert train(shop, "--dry-run") == 0
    assert "has checkpoints, from which it goes on" in capsys.readouterr().err


class Disk(NamedTuple):
    total: int
    used: int
    free: int


def test_a_disk_that_is_too_small_for_the_cache_is_told(
    shop: World, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(10, 9, 1000))
    assert train(shop, "--dry-run") == 0
    assert "of the 1.0 kB that are free" in capsys.readouterr().err
    assert train(shop, "--dry-run", "--no-cache") == 0
    assert "no image cache, every epoch decodes again" in capsys.readouterr().err
    (path,) = {shop.folder / "training" / f"tiny-until-{D}" / "images"}
    path.mkdir(parents=True)
    assert train(shop, "--dry-run") == 0
    assert "an image cache of up to" in capsys.readouterr().err


def test_what_training_would_refuse_it_refuses(shop: World, capsys: Capture) -> None:
    before = listing(shop)
    assert train(shop, "--dry-run", "--batch-rows", "100000") == 2
    assert "Take smaller batches" in capsys.readouterr().err
    assert listing(shop) == before
