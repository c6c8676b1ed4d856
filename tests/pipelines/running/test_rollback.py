"""Rolling back looks at all files first, sticks until released, never goes the other way."""

import json
import os
from pathlib import Path

import pytest

from feature_jobs.schemas import DataContractError, GateRefused, OperatorError
from feature_jobs.store import faults, files
from pipelines.running import records, rollback
from pipelines.running.locks import Locks
from tests.pipelines.running.test_publishing import Killed, kill_at, killed_while
from tests.support.ill_disk import watch_disk
from tests.support.small_nights import DS, NOW, Shop

OLDEST, OLD, NEW = [0, 1], [1, 2, 3, 4], [5, 6, 7, 8, 9]


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    shop = Shop(str(tmp_path / "root"))
    for values in (OLDEST, OLD, NEW):
        shop.publish(values)
    return shop


def everything(shop: Shop) -> dict[str, bytes]:
    root = Path(shop.settings.root)
    return {str(p): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def roll_back(shop: Shop, reason: str = "wrong images") -> dict:
    return rollback.roll_back(shop.settings, DS, reason, False, print)


def test_the_night_before_comes_back_whole_and_the_present_one_is_kept(shop: Shop) -> None:
    told = roll_back(shop)
    assert shop.published() == OLD
    assert shop.kept() == [OLDEST, OLD, NEW]
    assert told["action"] == "is published again"
    assert told["tables"]["item_features"]["rows"] == len(OLD)
    assert "on hold (wrong images)" in rollback.render(told)
    assert files.list_names(f"{shop.settings.root}/_staging/test/item-features/ds={DS}") == []


def test_a_second_rollback_finds_it_done_and_only_after_a_release_goes_the_other_way(
    shop: Shop,
) -> None:
    roll_back(shop)
    before = everything(shop)
    assert roll_back(shop, "a retry")["action"] == "is rolled back already"
    assert everything(shop) == before
    assert rollback.release(shop.settings, DS, False, print)["reason"] == "wrong images"
    roll_back(shop)
    assert shop.published() == NEW


def test_a_held_day_refuses_to_be_published_and_says_why_until_it_is_released(shop: Shop) -> None:
    (stage,) = shop.night(NEW).stages
    held = (shop.settings.layout, [DS], stage.tables)
    records.refuse_held(*held)
    roll_back(shop)
    with pytest.raises(GateRefused, match=r"is on hold.*wrong images.*--release") as refused:
        records.refuse_held(*held)
    assert refused.value.exit_status == 3
    assert list(records.held_days(shop.settings.layout)) == [DS]
    rollback.release(shop.settings, DS, False, print)
    records.refuse_held(*held)
    with pytest.raises(OperatorError, match="is not on hold"):
        rollback.release(shop.settings, DS, False, print)


def test_a_dry_run_says_what_would_come_back_and_changes_nothing(shop: Shop) -> None:
    before = everything(shop)
    told = rollback.roll_back(shop.settings, DS, "x", True, print)
    assert told["action"] == "would be published again"
    assert list(told["tables"]) == ["item_features"]
    assert everything(shop) == before


def kept_part(shop: Shop) -> Path:
    (version,) = [
        record["before"]["tables"]["item_features"]["version"]
        for record in [records.read_night(shop.settings.layout, DS)]
    ]
    return next(Path(shop.place.kept, version).glob("*.parquet"))


@pytest.mark.parametrize("damage", ["missing", "shorter", "other bytes"])
def test_a_damaged_file_of_the_night_before_is_found_before_anything_changes(
    shop: Shop, damage: str
) -> None:
    part = kept_part(shop)
    data = part.read_bytes()
    if damage == "missing":
        part.unlink()
    else:
        part.write_bytes(data[:-1] if damage == "shorter" else data[:-1] + b"x")
    before = everything(shop)
    with pytest.raises(DataContractError, match="missing or damaged") as refused:
        roll_back(shop)
    assert part.name in str(refused.value)
    assert everything(shop) == before
    assert shop.published() == NEW
    part.write_bytes(data)
    roll_back(shop)
    assert shop.published() == OLD


def test_a_night_before_that_is_not_kept_is_told(shop: Shop) -> None:
    files.delete_tree(shop.place.kept)
    before = everything(shop)
    with pytest.raises(OperatorError, match="is not kept any more"):
        roll_back(shop)
    assert everything(shop) == before


def test_a_day_that_was_published_once_has_nothing_to_go_back_to(tmp_path: Path) -> None:
    shop = Shop(str(tmp_path))
    with pytest.raises(OperatorError, match="There is no earlier night"):
        roll_back(shop)
    shop.publish(OLD)
    with pytest.raises(OperatorError, match="There is no earlier night"):
        roll_back(shop)
    assert shop.published() == OLD


def test_a_store_that_says_no_for_a_while_does_not_unpublish_the_night(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One "not there" that was none made main delete files and take `_SUCCESS` away."""
    monkeypatch.setattr(faults, "FIRST_WAIT_SECONDS", 0.001)
    monkeypatch.setattr(faults, "RETRY_SECONDS", 0.01)
    before = everything(shop)

    def ill(what: str, path: str) -> None:
        if "_versions" in path:
            raise OSError(116, "Stale file handle", path)

    with monkeypatch.context() as patch:
        watch_disk(patch, ill)
        with pytest.raises(faults.StorageUnavailable):
            roll_back(shop)
    assert everything(shop) == before
    assert shop.published() == NEW


def test_a_rollback_killed_at_any_change_goes_on_and_its_day_stays_held(
    tmp_path: Path,
) -> None:
    killed_at, ended = 0, False
    while not ended:
        shop = Shop(str(tmp_path / str(killed_at)))
        for values in (OLD, NEW):
            shop.publish(values)
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, killed_at)
            plan = rollback.plan_rollback(shop.settings, DS, "wrong images")
            try:
                rollback.carry_out(plan, Locks(), NOW)
                ended = True
            except Killed:
                pass
        touched = shop.published() != NEW
        held = files.exists(shop.settings.layout.hold_path(DS))
        assert held or not touched  # nothing republishes it in between
        assert roll_back(shop)["action"] in ("is published again", "is rolled back already")
        assert shop.published() == OLD
        killed_at += 1
    assert killed_at > 10


def test_a_publication_that_was_never_finished_goes_back_to_the_night_it_would_have_replaced(
    shop: Shop,
) -> None:
    killed_while(shop, [42], lambda: shop.published() is not None)
    assert shop.published() is None
    roll_back(shop)
    assert shop.published() == NEW


def test_what_is_told_is_json(shop: Shop) -> None:
    told = json.loads(json.dumps(roll_back(shop)))
    assert told["tables"]["item_features"]["path"] == os.path.relpath(
        shop.place.folder, shop.settings.root
    )
