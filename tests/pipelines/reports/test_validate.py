"""`courier validate` finds every way to break a published root, and nothing in sound ones."""

import json
import shutil
from typing import Any

import pytest

from pipelines.reports import validate as validations
from tests.conftest import Artefacts, pinned
from tests.support import broken_roots
from tests.support.broken_roots import FAULTS, Fault, Root
from tests.support.commands import Capture, courier, make_night
from tests.support.world import DAYS, Kept, World, draw_impressions

OF_FILES = ("a file ", "there is a file too many")


@pytest.fixture(scope="module")
def two_nights(tmp_path_factory: pytest.TempPathFactory, artefacts: Artefacts) -> Kept:
    """Makes a shop after two nights and the training rows of the second, once for all faults.

    It has few impressions, so that it has few files, of several shards still.
    """
    world = pinned(World(tmp_path_factory.mktemp("two-nights") / "shop"), artefacts)
    for number, day in enumerate(DAYS[:2]):
        world.write_images(day)
        world.write_impressions(day, draw_impressions(day, seed=number, count=30))
        make_night(world.settings(), day)
    assert courier(world, "training-rows", "--ds", str(DAYS[1])) == 0
    for folder in ("features/_staging", "features/test/_runs"):
        shutil.rmtree(world.folder / folder, ignore_errors=True)  # copied for nothing
    return Kept(world)


@pytest.fixture
def shop(two_nights: Kept) -> World:
    return two_nights.again()


def validate(world: World, capsys: Capture, *args: str) -> tuple[int, dict[str, Any]]:
    """Validates the second night; returns the exit status and what was found of the day."""
    capsys.readouterr()
    status = courier(world, "validate", "--ds", str(DAYS[1]), "--json", *args)
    return status, json.loads(capsys.readouterr().out)


# ---- Sound roots -------------------------------------------------------------------------------


def test_sound_nights_are_sound_and_their_scores_are_computed_again(
    refreshed: World, capsys: Capture
) -> None:
    capsys.readouterr()
    every = ("--start-ds", str(DAYS[0]), "--end-ds", str(DAYS[3]))
    assert courier(refreshed, "validate", *every, "--json") == 0
    days = json.loads(capsys.readouterr().out)
    assert [day["ds"] for day in days] == [str(day) for day in DAYS]
    for day in days:
        assert day["findings"] == []
        assert (day["sound"], day["recomputed_impressions"]) == (True, 152)
        assert day["tables"]["user_simscores"]["rows"] == 152
        assert day["rows"] == sum(table["rows"] for table in day["tables"].values())


# ---- Faults ------------------------------------------------------------------------------------


def test_there_are_more_than_forty_ways_to_break_a_root_of_every_table() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) > 80
    tables = {fault.table for fault in FAULTS} - {""}
    assert len(tables) == 7


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
def test_a_fault_is_found_in_its_table_and_by_its_law(fault: Fault, shop: World) -> None:
    fault.breaks(Root(shop))
    (day,) = validations.validate(shop.settings(), [broken_roots.DS], fast=False)
    told = [(found.level, found.table, found.law) for found in day.findings]
    assert any(
        (level, table) == (fault.level, fault.table) and law.startswith(fault.law)
        for level, table, law in told
    ), told
    if not fault.law.startswith(OF_FILES):  # it was written back as if it had been made so
        assert not [law for _, _, law in told if law.startswith(OF_FILES)]
