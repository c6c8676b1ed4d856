"""Publishing: killed at any point it leaves no mixture, and the next run finishes it."""

import dataclasses
import datetime as dt
import json
import os
import shutil
from collections.abc import Callable, Container
from pathlib import Path

import duckdb
import pytest

from feature_jobs.schemas import (
    USER_HISTORIES,
    CourierError,
    DataContractError,
    InputNotReady,
)
from feature_jobs.store import files, nights, partitions
from feature_jobs.store.documents import read_json, write_json
from feature_jobs.store.partitions import FILE_LIST, MANIFEST, SUCCESS
from pipelines.running import publishing, records, rollback, states
from pipelines.running.layout import Layout
from pipelines.running.locks import Locks
from pipelines.running.states import PUBLISHED, STAGED, Look, Night
from pipelines.stages import HISTORIES, ITEM_FEATURES
from tests.support.ill_disk import watch_disk
from tests.support.schedules import CHANGING, Calls
from tests.support.small_nights import (
    DS,
    JustAStage,
    Readers,
    Shop,
    contents,
    is_whole_night,
    stage_partition,
)

OLD, NEW, LOST = [1, 2, 3, 4], [5, 6, 7, 8, 9], [0, 0, 0]


class Killed(BaseException):
    """Stands for a process that ends here."""


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(str(tmp_path))


def kill_at(
    patch: pytest.MonkeyPatch,
    at: int,
    before_each: Callable[[], None] = lambda: None,
    changes: Container[str] = CHANGING,
) -> list[str]:
    """Makes the `at`-th change of the disk kill the run; `before_each` is called ahead of all."""
    made: list[str] = []
    looking = False

    def before(what: str, path: str) -> None:
        nonlocal looking
        if looking or what not in changes:
            return
        looking = True
        before_each()
        looking = False
        if len(made) >= at:
            raise Killed(f"{what} {path}")
        made.append(what)

    watch_disk(patch, before)
    patch.setattr(publishing, "_AT_ONCE", 1)
    return made


def killed_while(shop: Shop, values: list[int], goes_on: Callable[[], bool]) -> None:
    """Kills the publication of a night, again and again a change later, while that is so."""
    night, at = shop.make(values), 0
    while goes_on():
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, at)
            with pytest.raises(Killed):
                publishing.publish_night(night, Locks())
        at += 1


def killed_with_one_file_in(shop: Shop, values: list[int]) -> None:
    """Kills the publication of a night once the first of its files has come in."""
    night = shop.make(values)
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, 1, changes={"link"})
        with pytest.raises(Killed):
            publishing.publish_night(night, Locks())


def files_of(shop: Shop) -> dict[str, tuple[bytes, int]]:
    folder = Path(shop.place.folder)
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_a_published_partition_is_what_was_staged(shop: Shop) -> None:
    with pytest.raises(InputNotReady, match="No published partition"):
        partitions.open_published(shop.place.folder)
    shop.publish(OLD)
    found = partitions.open_published(shop.place.folder)
    assert shop.published() == OLD
    assert found.manifest["parent_version"] is None
    assert "publication" not in found.manifest
    assert all(found.manifest["version"] in path for path in found.paths)


def test_publishing_the_same_again_changes_nothing(shop: Shop) -> None:
    shop.publish(OLD)
    before = files_of(shop)
    assert len(before) == 5
    shop.publish(OLD)
    assert files_of(shop) == before


def test_the_list_names_the_files_of_the_manifest_in_its_order_by_full_paths(shop: Shop) -> None:
    for values in (OLD, NEW):
        shop.publish(values)
        listed = Path(shop.place.folder, FILE_LIST).read_text().splitlines()
        assert listed == partitions.open_published(shop.place.folder).paths
        assert all(os.path.isabs(path) and os.path.exists(path) for path in listed)


@pytest.mark.parametrize("listed", ["of another place", "none"])
def test_what_is_published_again_gets_its_list_where_that_is_not_right(
    tmp_path: Path, listed: str
) -> None:
    """As in a shop that was copied, or was made by an earlier version."""
    Shop(str(tmp_path / "shop")).publish(OLD)
    shutil.copytree(tmp_path / "shop", tmp_path / "copy")
    copy = Shop(str(tmp_path / "copy"))
    path = Path(copy.place.folder, FILE_LIST)
    if listed == "none":
        path.unlink()
    before = files_of(copy)
    (stage,) = copy.night(OLD).stages
    staged = states.staged_folder(stage, ITEM_FEATURES.tables[0])
    stage_partition(staged, OLD, run_id=stage.run_id)
    manifest = files.read_bytes(os.path.join(copy.place.folder, MANIFEST))
    publishing.publication(staged, copy.place, manifest, Locks()).run()
    after = files_of(copy)
    names = [name for name in after if after[name] != before.get(name)]
    assert names == [FILE_LIST]
    assert path.read_text().splitlines() == partitions.open_published(copy.place.folder).paths
    assert copy.published() == OLD


DAMAGE: dict[str, Callable[[bytes], bytes | None]] = {
    "a byte flipped": lambda data: data[:9] + bytes([data[9] ^ 1]) + data[10:],
    "cut short": lambda data: data[:-7],
    "emptied": lambda _: b"",
    "gone": lambda _: None,
}


def damage(path: str, how: str) -> None:
    """Replaces a file, which is left as it is under its other names."""
    data = DAMAGE[how](files.read_bytes(path))
    files.delete(path)
    if data is not None:
        files.write_bytes(path, data)


def remade(shop: Shop, values: list[int]) -> Night:
    """Returns a night that was made again from the same inputs, as `--remake` does it."""
    night = shop.night(values)
    stage = dataclasses.replace(night.stages[0], forced_by="asked for")
    states.begin(stage, ["asked for"], Look())
    if not Look().state(stage).is_made:
        stage_partition(states.staged_folder(stage, stage.tables[0]), values, run_id=stage.run_id)
    return dataclasses.replace(night, planned=(JustAStage(stage),))


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_file_is_mended_where_the_same_rows_are_made_again(folder: str, how: str) -> None:
    shop = Shop(folder)
    shop.publish(OLD)
    before = contents(shop)
    one, other = partitions.open_published(shop.place.folder).paths
    damage(one, how)
    whole = files.stat(other)
    assert contents(shop) != before
    shop.publish(OLD)  # nobody asked for it, and files of what is published are not read
    assert contents(shop) != before
    publishing.publish_night(remade(shop, OLD), Locks())
    assert contents(shop) == before
    assert files.stat(other) == whole
    assert shop.published() == OLD


def test_of_a_mending_run_killed_at_any_change_no_file_is_away_and_the_next_finishes(
    folder: str, calls: Calls
) -> None:
    killed_at, ended = 0, False
    while not ended:
        shop = Shop(f"{folder}/{killed_at}")
        shop.publish(OLD)
        before = contents(shop)
        paths = partitions.open_published(shop.place.folder).paths
        for path in paths:
            damage(path, "a byte flipped")
        night, made = remade(shop, OLD), 0

        def kill(what: str, _: str, killed_at: int = killed_at, at: list[str] = paths) -> None:
            nonlocal made
            if what not in CHANGING:
                return
            with calls.quietly():
                assert all(files.exists(path) for path in at)
            if made == killed_at:
                raise Killed
            made += 1

        calls.before = kill
        try:
            publishing.publish_night(night, Locks())
            ended = True
        except Killed:
            pass
        calls.before = lambda *_: None
        assert {path.removeprefix(shop.settings.root) for path in paths} < contents(shop).keys()
        publishing.publish_night(remade(shop, OLD), Locks())
        found = {path: data for path, data in contents(shop).items() if "/.tmp-" not in path}
        assert found == before
        killed_at += 1
    assert killed_at > 5


@pytest.mark.parametrize("before", [None, OLD, NEW], ids=["first", "over another", "the same"])
def test_of_a_run_killed_at_any_change_no_reader_accepts_a_mixture_and_the_next_finishes(
    tmp_path: Path, before: list[int] | None
) -> None:
    killed_at, ended = 0, False
    while not ended:
        shop = Shop(str(tmp_path / str(killed_at)))
        if before:
            shop.publish(before, "earlier")
        night, readers = shop.make(NEW), Readers(shop, [OLD, NEW])
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, killed_at, readers.poll)
            try:
                publishing.publish_night(night, Locks())
                ended = True
            except Killed:
                pass
        readers.poll()
        readers.check()
        shop.publish(NEW)  # the next run
        assert shop.published() == NEW
        assert shop.kept() == ([OLD] if before == OLD else [])
        assert Look().state(night.stages[0]).name == PUBLISHED
        killed_at += 1
    assert killed_at > (4 if before == NEW else 8)


def test_a_night_is_not_published_before_the_old_files_are_away(shop: Shop) -> None:
    """The next run finishes that, before it says that there is nothing to do."""
    shop.publish(OLD)
    manifest = os.path.join(shop.place.folder, MANIFEST)
    killed_while(shop, NEW, lambda: read_json(manifest)["values"] != NEW)
    assert shop.look().globbed != NEW
    assert Look().state(shop.night(NEW).stages[0]).name != PUBLISHED
    shop.publish(NEW)
    assert shop.look().globbed == NEW
    assert shop.kept() == [OLD]


def test_another_version_after_a_kill_leaves_no_file_of_the_one_never_published(
    shop: Shop,
) -> None:
    shop.publish(OLD)
    killed_with_one_file_in(shop, LOST)
    assert len(shop.look().globbed) > len(OLD)
    assert shop.look().through_manifest == OLD
    shop.publish(NEW)
    assert shop.look().globbed == NEW
    assert shop.kept() == [OLD]


def test_a_night_that_goes_back_to_what_was_retracted_has_another_success(shop: Shop) -> None:
    """A reader that saw one before and after would trust what a killed run left in between."""
    shop.publish(OLD)
    success = files.read_bytes(os.path.join(shop.place.folder, SUCCESS))
    killed_with_one_file_in(shop, NEW)
    assert shop.published() is None
    shop.publish(OLD)
    assert shop.published() == OLD
    assert files.read_bytes(os.path.join(shop.place.folder, SUCCESS)) != success
    found = partitions.open_published(shop.place.folder).manifest
    assert found["publication"] == 3  # the second was claimed by the run that died


def test_a_reader_that_descends_into_folders_takes_no_old_rows(shop: Shop) -> None:
    shop.publish(OLD)
    shop.publish(NEW)
    assert shop.kept() == [OLD]
    top = os.path.dirname(shop.place.folder)
    rows = duckdb.sql(f"select x from read_parquet('{top}/**/*.parquet') order by x").fetchall()
    assert [x for (x,) in rows] == NEW


def test_a_run_that_finds_nothing_to_do_leaves_what_another_has_staged(shop: Shop) -> None:
    shop.publish(OLD)
    (refused,) = shop.make(NEW).stages
    shop.publish(OLD)
    assert Look().state(refused).name == STAGED
    shop.publish(NEW)
    assert shop.published() == NEW


def test_feature_sets_stage_the_tables_that_they_share_in_one_place() -> None:
    """A writer that was overtaken must find none of its files there, whichever set it is of."""
    one, other = (Layout("/r", name, "/r").staging(HISTORIES, DS, "run") for name in "ab")
    assert one == other
    one, other = (Layout("/r", name, "/r").staging(ITEM_FEATURES, DS, "run") for name in "ab")
    assert one != other


def test_a_file_that_is_none_of_ours_stays(shop: Shop) -> None:
    shop.publish(OLD)
    stray = os.path.join(shop.place.folder, "part-of-somebody.parquet.crc")
    files.write_bytes(stray, b"x")
    shop.publish(NEW)
    assert files.read_bytes(stray) == b"x"


def test_a_run_that_lost_its_lock_stops_before_its_next_write(shop: Shop) -> None:
    class Lost:
        def check(self) -> None:
            raise CourierError("the lock is lost")

    shop.publish(OLD)
    before = files_of(shop)
    night = shop.make(NEW)
    with pytest.raises(CourierError, match="the lock is lost"):
        publishing.publish_night(night, Locks(_held={"x": Lost()}))
    assert files_of(shop) == before
    assert shop.published() == OLD
    assert Look().state(night.stages[0]).name == STAGED


def test_the_record_names_what_was_published(shop: Shop) -> None:
    shop.publish(OLD)
    shop.publish(NEW)
    record = read_json(f"{shop.settings.root}/test/_nights/ds={DS}.json")
    assert record["tables"]["item_features"]["rows"] == len(NEW)
    assert record["before"]["tables"]["item_features"]["rows"] == len(OLD)
    assert record["before"]["before"] is None


# ---- Since when a night is there ---------------------------------------------------------------


def published_at(shop: Shop) -> dt.datetime:
    at = dt.datetime.fromisoformat(read_json(shop.settings.layout.night_path(DS))["published_at"])
    assert at.utcoffset() == dt.timedelta()
    return at


def test_a_night_is_there_since_its_versions_first_were_one(shop: Shop) -> None:
    before = dt.datetime.now(dt.UTC)
    shop.publish(OLD)
    first = published_at(shop)
    assert before <= first <= dt.datetime.now(dt.UTC)
    shop.publish(OLD, "of other inputs")  # the same rows: its record is written again
    assert published_at(shop) == first
    shop.publish(NEW)
    second = published_at(shop)
    assert second > first
    shop.roll_back()
    assert published_at(shop) == first
    rollback.release(shop.settings, DS, False, print)
    shop.publish(NEW)
    assert published_at(shop) == second
    shop.publish(LOST)
    assert published_at(shop) > second


def test_other_versions_of_shared_tables_make_no_night_later(shop: Shop) -> None:
    shop.publish(OLD)
    layout = shop.settings.layout
    path, own = layout.night_path(DS), partitions.open_published(shop.place.folder)
    shared = layout.folder(USER_HISTORIES, DS)
    for values in (OLD, NEW):
        histories = stage_partition(shared, values)
        parts = [own, dataclasses.replace(histories, manifest={
            **publishing.versioned(histories.manifest), "table": USER_HISTORIES.name,
        })]  # fmt: skip
        record = records.night_record(layout, DS, parts, records.read_night(layout, DS))
        assert record["published_at"] == read_json(path)["published_at"]
        write_json(path, record)


def test_a_time_that_an_earlier_version_did_not_note_stays_unknown(shop: Shop) -> None:
    shop.publish(OLD)
    path = shop.settings.layout.night_path(DS)
    record = read_json(path)
    del record["published_at"]
    write_json(path, record)
    shop.publish(OLD, "again")
    assert read_json(path)["published_at"] is None
    shop.publish(NEW)
    shop.roll_back()
    assert read_json(path)["published_at"] is None
    assert shop.published() == OLD


# ---- The newest night --------------------------------------------------------------------------


def latest(shop: Shop) -> dict:
    found: dict = read_json(shop.settings.layout.latest_path)
    return found


def on(shop: Shop, days: int) -> Shop:
    """Returns the shop on a day so many days later."""
    return Shop(shop.settings.root, DS + dt.timedelta(days=days))


def test_latest_names_the_newest_night_with_what_its_record_says(shop: Shop) -> None:
    shop.publish(OLD)
    record = read_json(shop.settings.layout.night_path(DS))
    told = latest(shop)
    assert {k: told[k] for k in ("ds", "feature_set", "published_at", "tables")} == {
        "ds": str(DS), "feature_set": "test", "published_at": record["published_at"],
        "tables": record["tables"],
    }  # fmt: skip
    assert told["tables"]["item_features"].keys() >= {"path", "version", "rows"}


def test_earlier_days_leave_latest_and_the_newest_renews_it(shop: Shop) -> None:
    shop.publish(OLD)
    before = files.stat(shop.settings.layout.latest_path)
    on(shop, -1).publish(OLD)
    on(shop, -1).publish(NEW)
    on(shop, -1).roll_back()
    shop.publish(OLD)
    assert files.stat(shop.settings.layout.latest_path) == before
    for publish in (lambda: shop.publish(NEW), shop.roll_back, lambda: on(shop, 1).publish(OLD)):
        was = latest(shop)
        publish()
        assert latest(shop) != was
    assert latest(shop)["ds"] == str(on(shop, 1).ds)
    assert json.loads(json.dumps(latest(shop))) == nights.latest_of(
        read_json(shop.settings.layout.night_path(on(shop, 1).ds))
    )


def test_a_latest_that_is_lost_is_written_again_by_the_next_night_of_whatever_day(
    shop: Shop,
) -> None:
    shop.publish(OLD)
    was = latest(shop)
    files.delete(shop.settings.layout.latest_path)
    on(shop, -1).publish(NEW)
    assert latest(shop) == was


def test_latest_never_goes_back_where_a_record_was_deleted(shop: Shop) -> None:
    for day in (0, 1):
        on(shop, day).publish(OLD)
    was = latest(shop)
    files.delete(shop.settings.layout.night_path(on(shop, 1).ds))
    shop.publish(NEW)
    assert latest(shop) == was
    on(shop, 1).publish(NEW)
    assert latest(shop)["tables"] != was["tables"]


def test_a_damaged_latest_is_told_once_all_else_is_published(shop: Shop) -> None:
    shop.publish(OLD)
    files.write_bytes(shop.settings.layout.latest_path, b"[]")
    with pytest.raises(DataContractError, match="restore it, or delete that file, and run"):
        shop.publish(NEW)
    assert is_whole_night(shop.settings.layout, DS)
    files.delete(shop.settings.layout.latest_path)
    shop.publish(NEW)
    assert shop.published() == NEW
