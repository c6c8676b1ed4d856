"""A range is its nights: many days in one job have the files that night after night makes."""

import datetime as dt
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.cli import main
from tests.conftest import Artefacts
from tests.support.commands import (
    Killed,
    die_at_write,
    published_below,
)
from tests.support.random_shops import RandomShop
from tests.support.world import make_codebook, make_encoder

COMMANDS = ("refresh", "training-rows")


@pytest.fixture(scope="module")
def later(tmp_path_factory: pytest.TempPathFactory, artefacts: Artefacts) -> Artefacts:
    """Gives another encoder and a codebook for it."""
    folder = tmp_path_factory.mktemp("later")
    encoder = make_encoder(folder / "encoders", seed=1)
    return Artefacts(encoder, make_codebook(folder / "codebooks", encoder))


def make_days(shop: RandomShop, days: list[dt.date], command: str = "refresh") -> None:
    """Makes days in one command."""
    shop.settings()
    ends = ("--start-ds", str(days[0]), "--end-ds", str(days[-1]))
    assert main([command, "--config", str(shop.config), *ends]) == 0


def night_by_night(shop: RandomShop, days: list[dt.date]) -> None:
    for command in COMMANDS:
        for day in days:
            make_days(shop, [day], command)


def one_range(shop: RandomShop, days: list[dt.date]) -> None:
    for command in COMMANDS:
        make_days(shop, days, command)


def two_ranges(shop: RandomShop, days: list[dt.date]) -> None:
    middle = len(days) // 2
    for part in filter(None, (days[:middle], days[middle:])):
        one_range(shop, part)


def killed_once(shop: RandomShop, days: list[dt.date]) -> None:
    """Makes one range that dies somewhere, and the same once more."""
    at = 150 + 97 * shop.seed
    with pytest.MonkeyPatch.context() as patch:
        die_at_write(patch, at)
        try:
            one_range(shop, days)
        except Killed:
            pass
        else:
            pytest.fail(f"it has ended before the write {at}")
    one_range(shop, days)


def made(shop: RandomShop, how: Callable[[RandomShop, list[dt.date]], None]) -> dict[str, bytes]:
    """Returns what is published of a shop whose first night was made before images changed."""
    shutil.rmtree(shop.root, ignore_errors=True)
    shop.write_images_of(0)
    make_days(shop, shop.days[:1])
    shop.write_images_of(1)
    how(shop, shop.days[1:])
    return published_below(shop.root)


def differences(one: dict[str, bytes], other: dict[str, bytes]) -> list[str]:
    return sorted(path for path in one | other if one.get(path) != other.get(path))


@pytest.mark.parametrize("seed", range(3))
def test_a_range_is_its_nights(
    seed: int, tmp_path: Path, artefacts: Artefacts, later: Artefacts
) -> None:
    shop = RandomShop(
        tmp_path / "shop", ids=("int", "string")[seed % 2], seed=seed, first=artefacts,
        later=later if seed % 3 else None,
    )  # fmt: skip
    expected = made(shop, night_by_night)
    assert len(expected) > 20 * len(shop.days)
    for how in (one_range, two_ranges, killed_once):
        assert differences(made(shop, how), expected) == [], how.__name__
