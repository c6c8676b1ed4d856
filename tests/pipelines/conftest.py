"""Makes what tests of `courier train`, of `courier init` and of killed jobs begin with."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.first_look import Shop, draw
from tests.support.held_embed import Hold
from tests.support.training_shop import SECTION, D, make_rows
from tests.support.world import DAYS, World


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes a shop with training rows of every day, D included; it is only read."""
    world = World(tmp_path_factory.mktemp("prepared") / "shop", "int", 1000, SECTION)
    assert make_rows(world, DAYS[0], D) == 0
    return world.folder


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    """Makes the shop that `courier init` looks at; other commands' tests have one of their own."""
    draw(tmp_path / "images")
    return Shop(tmp_path)


@pytest.fixture(scope="module")
def _hold(tmp_path_factory: pytest.TempPathFactory) -> Hold:
    """Holds the workers of a cluster of a module's tests."""
    return Hold(str(tmp_path_factory.mktemp("hold") / "hold"))


@pytest.fixture
def hold(_hold: Hold) -> Iterator[Hold]:
    """Gives a hold of workers that lets go once a test has ended."""
    yield _hold
    _hold.end()
