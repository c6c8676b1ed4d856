"""Pruning deletes what the settings keep no longer, and nothing that anybody still needs."""

import contextlib
import datetime as dt
import errno
import hashlib
import json
import os
from pathlib import Path

import pytest

from feature_jobs.schemas import (
    ITEM_EMBEDDINGS,
    ITEM_FEATURES,
    RECENT_CLICKS,
    TRAINING_ROWS,
    USER_HISTORIES,
    USER_SIMSCORES,
    CourierError,
    OperatorError,
    StorageUnavailable,
    Table,
)
from feature_jobs.store import faults, files
from feature_jobs.store.partitions import MANIFEST, SUCCESS
from pipelines.running import announcing, records, retention
from pipelines.running.locks import holding_at_once
from pipelines.stages import EMBED, HISTORIES, Kind, join_of, kind_of
from pipelines.stages import ITEM_FEATURES as FEATURES
from tests.pipelines.running.test_publishing import Killed
from tests.support.ill_disk import watch_disk
from tests.support.schedules import CHANGING, Calls, Schedule
from tests.support.small_days import LATE, OF_A_NIGHT, WINDOW, SmallDays, day
from tests.support.small_nights import Readers, Shop, contents, shop_of
from tests.support.writers import refused

LATER = 1000.0  # hours, after which whatever is left is old
OLD, NEW, OTHER = [1, 2, 3, 4], [5, 6, 7, 8, 9], [11, 12, 13]
LATEST = [10] * 4  # of the newer night from which days count
FOUR = {ITEM_FEATURES.name: 4}


def of(kind: Kind, days: int = WINDOW) -> dict[str, int]:
    """Returns how many days are kept, of all tables of a kind of stage."""
    return dict.fromkeys([table.name for table in kind.tables], days)


@pytest.fixture
def root(tmp_path: Path) -> str:
    return str(tmp_path / "root")


# ---- Days ----------------------------------------------------------------------------------------


def test_days_are_counted_back_from_the_newest_night_and_all_days_of_other_tables_stay(
    root: str,
) -> None:
    shop = SmallDays(root, days=FOUR).nights(range(1, 11))
    told = shop.prune()
    assert shop.days(ITEM_FEATURES) == [7, 8, 9, 10]
    assert shop.days(USER_SIMSCORES) == shop.days(USER_HISTORIES) == list(range(1, 11))
    assert {(one.name, one.what) for one in told.gone} == {("item_features", "published")}
    assert [one.ds for one in told.gone] == [day(n) for n in range(1, 7)]
    assert sorted(os.listdir(os.path.dirname(shop.layout.folder(ITEM_FEATURES, day(1))))) == [
        f"ds={day(n)}" for n in range(7, 11)
    ]
    assert shop.prune().gone == []


def test_a_day_that_is_no_whole_night_yet_is_not_what_days_are_counted_from(root: str) -> None:
    tables = [ITEM_FEATURES, USER_SIMSCORES]
    shop = SmallDays(root, days=FOUR).nights(range(1, 11), *tables)
    shop.publish(ITEM_FEATURES, 20, 20)
    shop.night(15, tables=tables)
    files.delete(os.path.join(shop.layout.folder(USER_SIMSCORES, day(15)), SUCCESS))
    shop.prune()
    assert shop.days(ITEM_FEATURES) == [7, 8, 9, 10, 15, 20]


def test_nothing_is_counted_back_where_no_night_is_whole(root: str) -> None:
    shop = SmallDays(root, days={ITEM_FEATURES.name: 4, **of(EMBED, 4)})
    for number in range(1, 11):
        shop.publish(ITEM_EMBEDDINGS, number, number)
    assert shop.prune(LATER).gone == []
    assert shop.prune().newest is None


def test_histories_and_embeddings_stay_as_long_as_the_window_goes_on_from_them(root: str) -> None:
    tables = (USER_HISTORIES, RECENT_CLICKS, ITEM_EMBEDDINGS)
    shop = SmallDays(root, days={**of(EMBED), **of(HISTORIES)})
    shop.nights(range(1, 11), *tables).prune()
    first = 10 - (WINDOW + LATE + 1) + 1
    for table in tables:
        assert shop.days(table) == list(range(first, 11))


@pytest.mark.parametrize("one", [*EMBED.tables, *HISTORIES.tables], ids=lambda table: table.name)
def test_tables_of_one_kind_stay_and_go_together(root: str, one: Table) -> None:
    """One without the other would look as if it were being published just now."""
    tables = kind_of(one).tables
    shop = SmallDays(root, days={one.name: WINDOW}).nights(range(1, 11), *tables)
    assert shop.prune(LATER).gone == []  # of the other all days are kept
    more = SmallDays(root, days={**of(kind_of(one), 7), one.name: WINDOW})
    more.prune()
    assert {tuple(shop.days(table)) for table in tables} == {(4, 5, 6, 7, 8, 9, 10)}


def test_of_training_sets_earlier_versions_go_once_they_are_old_and_no_day_does(root: str) -> None:
    (one,), (other,) = (join_of(name).tables for name in ("ctr", "search"))
    shop = SmallDays(root).nights(range(1, 4))
    for value in (1, 21, 31, 41):
        shop.publish(one, 1, value)
    shop.publish(other, 2, 22)
    assert [gone.name for gone in shop.prune().gone if "joined" in gone.name] == []
    told = shop.prune(LATER)
    assert [(gone.name, gone.what) for gone in told.gone] == [
        ("joined/ctr", "earlier versions")
    ] * 2
    assert shop.kept(one, 1) == [31]
    assert (shop.days(one), shop.days(other)) == ([1], [2])
    with holding_at_once(shop.layout.lock_folders([one], [day(1)])):
        shop.publish(one, 1, 51)
        assert day(1) in shop.prune(LATER).skipped
    assert [gone.ds for gone in shop.prune(LATER).gone] == [day(1)]


@pytest.mark.parametrize("left", ["an empty folder", "a manifest"])
def test_what_a_run_left_in_a_hole_fills_it_not(root: str, left: str) -> None:
    shop = SmallDays(root, days=of(EMBED)).nights([1, 2, *range(11, 16)], *EMBED.tables)
    for table in EMBED.tables:
        folder = shop.layout.folder(table, day(3))
        os.makedirs(folder)
        if left == "a manifest":
            files.write_bytes(os.path.join(folder, MANIFEST), b"{}")
    shop.prune()
    for table in EMBED.tables:
        assert shop.days(table) == [2, *range(11, 16)]


def test_the_last_day_before_a_hole_stays_and_goes_once_that_is_filled(root: str) -> None:
    shop = SmallDays(root, days={**of(EMBED), ITEM_FEATURES.name: WINDOW})
    tables = [ITEM_EMBEDDINGS, ITEM_FEATURES]
    shop.nights([1, 2, 5, 6, *range(11, 16)], *tables).prune()
    assert shop.days(ITEM_EMBEDDINGS) == [2, 6, *range(11, 16)]
    assert shop.days(ITEM_FEATURES) == [13, 14, 15]  # no day goes on from it
    shop.nights([3, 4], *tables).prune()
    assert shop.days(ITEM_EMBEDDINGS) == [6, *range(11, 16)]


def test_a_table_that_nights_make_no_more_keeps_the_day_from_which_it_would_go_on(
    root: str,
) -> None:
    shop = SmallDays(root, days=of(HISTORIES)).nights(range(1, 4))
    shop.nights(range(4, 12), ITEM_FEATURES).prune()
    assert shop.days(USER_HISTORIES) == [3]


def test_a_day_on_hold_stays_whole_with_all_that_its_record_names(root: str) -> None:
    tables = [ITEM_FEATURES, USER_HISTORIES]
    keeps = {ITEM_FEATURES.name: WINDOW, **of(HISTORIES)}
    shop = SmallDays(root, days=keeps, versions=0).nights(range(1, 11), *tables)
    shop.night(2, 99, tables)
    shop.night(2, 100, tables)
    shop.roll_back(2)
    shop.prune(LATER)
    assert shop.days(ITEM_FEATURES) == [2, 8, 9, 10]
    assert shop.days(USER_HISTORIES) == [2, *range(6, 11)]
    assert shop.kept(ITEM_FEATURES, 2) == [99, 100]
    assert records.is_whole(shop.recorded(2), shop.layout)
    files.delete(shop.layout.hold_path(day(2)))
    for _ in range(2):  # the second time what the first has noted of the version that it took away
        shop.prune(LATER)
    assert shop.days(ITEM_FEATURES) == [8, 9, 10]
    assert shop.kept(ITEM_FEATURES, 2) == []


def test_the_record_says_what_was_pruned_and_has_no_way_back(root: str) -> None:
    shop = SmallDays(root, days=FOUR).nights([1, 2, 10])
    shop.night(2, 99)
    assert shop.recorded(2)["before"] is not None
    shop.prune()
    record = shop.recorded(2)
    assert ITEM_FEATURES.name not in record["tables"]
    assert set(record["tables"]) == {t.name for t in OF_A_NIGHT} - {ITEM_FEATURES.name}
    assert list(record["pruned"]) == [ITEM_FEATURES.name]
    assert dt.datetime.fromisoformat(record["pruned"][ITEM_FEATURES.name]).tzinfo
    assert records.is_whole(record, shop.layout)
    before = shop.contents()
    with pytest.raises(OperatorError, match="tables of it were pruned"):
        shop.roll_back(2)
    assert shop.contents() == before


def test_a_night_that_lost_all_tables_is_not_whole(root: str) -> None:
    shop = SmallDays(root, days={t.name: WINDOW for t in OF_A_NIGHT}).nights([1, 2, 10])
    shop.prune()
    assert shop.recorded(1)["tables"] == {}
    assert not records.is_whole(shop.recorded(1), shop.layout)


def test_what_is_made_again_is_pruned_no_more_and_goes_back_to_no_night_that_lost_a_table(
    root: str,
) -> None:
    shop = SmallDays(root, days=FOUR).nights([2, 10])
    shop.prune()
    shop.publish(USER_HISTORIES, 2, 50)
    shop.record(2, [t for t in OF_A_NIGHT if t is not ITEM_FEATURES])
    assert list(shop.recorded(2)["pruned"]) == [ITEM_FEATURES.name]  # still
    shop.night(2, 60)
    record = shop.recorded(2)
    assert "pruned" not in record
    assert record["before"] is None
    shop.night(2, 70)
    assert shop.recorded(2)["before"]["tables"].keys() == record["tables"].keys()
    shop.roll_back(2)
    assert records.is_whole(shop.recorded(2), shop.layout)


def test_a_night_that_lost_a_table_is_not_announced_again(root: str) -> None:
    shop = SmallDays(root, days=FOUR).nights([2, 10])
    path = Path(root).parent / "called"
    command = ("sh", "-c", f"echo $COURIER_DS >> {path}")
    shop.settings = shop.settings.model_copy(update={"on_published": command})
    announcing.announce(shop.settings, day(2), print)
    shop.prune()
    assert not announcing.is_due(shop.settings, shop.recorded(2))
    shop.night(2, 60)
    assert announcing.is_due(shop.settings, shop.recorded(2))
    announcing.announce(shop.settings, day(2), print)
    assert path.read_text().split() == [str(day(2))] * 2


# ---- Tables that feature sets share --------------------------------------------------------------


def test_a_shared_table_goes_with_the_last_record_that_names_it(root: str) -> None:
    keeps = of(HISTORIES)
    tables = [ITEM_FEATURES, USER_HISTORIES]
    one = SmallDays(root, "one", days=keeps).nights(range(1, 11), *tables)
    other = SmallDays(root, "other", days=keeps)
    other.nights(range(1, 11), *tables)  # publishes the same rows, and records them
    all_days, left = list(range(1, 11)), list(range(6, 11))
    told = one.prune()
    assert one.days(USER_HISTORIES) == all_days
    assert {x.others for x in told.gone} == {("other",)}
    assert "5 days, ds 2026-03-01 to 2026-03-05: named no more, but kept for other" in (
        retention.render(told)
    )
    assert USER_HISTORIES.name not in one.recorded(1)["tables"]
    assert records.is_whole(other.recorded(1), other.layout)
    assert one.prune().gone == []
    other.prune()
    assert other.days(USER_HISTORIES) == left
    assert one.prune().gone == []


def test_a_shared_table_of_a_day_that_another_set_holds_stays(root: str) -> None:
    one = SmallDays(root, "one", days=of(HISTORIES))
    one.nights(range(1, 11), ITEM_FEATURES, USER_HISTORIES)
    other = SmallDays(root, "other")
    for value in (98, 99):
        other.night(2, value, [ITEM_FEATURES])
    other.roll_back(2)
    one.prune(LATER)
    assert one.days(USER_HISTORIES) == [2, *range(6, 11)]


def test_training_rows_which_no_record_names_go_by_their_days_alone(root: str) -> None:
    shop = SmallDays(root, days={TRAINING_ROWS.name: 4}).nights([10], ITEM_FEATURES)
    for number in range(1, 13):
        shop.publish(TRAINING_ROWS, number, number)
    shop.prune()
    assert shop.days(TRAINING_ROWS) == list(range(7, 13))


# ---- Earlier versions ----------------------------------------------------------------------------


def replaced(root: str, *values: int, **keeps: int) -> SmallDays:
    """Publishes a table one value over the other; the night's record names the last two."""
    shop = SmallDays(root, **keeps)
    for value in values:
        shop.publish(ITEM_FEATURES, 1, value)
    shop.record(1, [ITEM_FEATURES])
    return shop


@pytest.mark.parametrize(("versions", "kept"), [(0, []), (1, [13]), (2, [12, 13])])
def test_so_many_earlier_versions_are_kept_as_the_settings_say(
    root: str, versions: int, kept: list[int]
) -> None:
    shop = replaced(root, 11, 12, 13, 14, versions=versions)
    age_versions(shop)
    shop.prune(LATER)
    assert shop.kept(ITEM_FEATURES, 1) == kept
    assert shop.days(ITEM_FEATURES) == [1]
    assert shop.prune(LATER).gone == []


def age_versions(shop: SmallDays) -> None:
    """Makes the times at which versions were replaced an hour apart, by their values."""
    place = shop.layout.place(ITEM_FEATURES, day(1))
    for name in files.list_names(place.kept):
        path = os.path.join(place.kept, name, MANIFEST)
        seconds = json.loads(files.read_bytes(path))["values"][0] * 3600 + 1_700_000_000
        for file in files.below(os.path.dirname(path)):
            os.utime(file.path, (seconds, seconds))


def test_what_was_replaced_a_moment_ago_stays_for_those_who_read_it(root: str) -> None:
    shop = replaced(root, 11, 12, 13, versions=0, grace_hours=5)
    assert shop.prune(4.9).gone == []
    assert len(shop.prune(5.1).gone) == 2


def test_the_way_back_stays_whatever_the_settings_say(root: str) -> None:
    shop = SmallDays(root, versions=0, grace_hours=0)
    for value in (11, 12, 13):
        shop.night(1, value)
    shop.prune(LATER)
    assert shop.kept(ITEM_FEATURES, 1) == [12]
    shop.roll_back(1)
    assert shop.recorded(1)["tables"]["item_features"]["run_id"] == "run-12"
    shop.prune(LATER)
    shop.roll_back(1)  # done already
    files.delete(shop.layout.hold_path(day(1)))
    shop.roll_back(1)  # and the other way
    assert records.is_whole(shop.recorded(1), shop.layout)
    assert shop.recorded(1)["tables"]["item_features"]["run_id"] == "run-13"


def test_earlier_versions_of_a_shared_table_stay_while_another_set_names_them(root: str) -> None:
    one, other = (SmallDays(root, name, versions=0) for name in ("one", "other"))
    other.night(1, 11)
    one.night(1, 12)
    one.night(1, 13)
    one.prune(LATER)
    assert one.kept(USER_HISTORIES, 1) == [11, 12]  # what other's night names, and one's before it
    assert one.kept(TRAINING_ROWS, 1) == []
    one.night(1, 14)
    one.prune(LATER)
    assert one.kept(USER_HISTORIES, 1) == [11, 13]


def test_no_version_goes_while_it_is_not_settled_which_one_is_published(root: str) -> None:
    shop = replaced(root, 11, 12, 13, versions=0)
    files.delete(os.path.join(shop.layout.folder(ITEM_FEATURES, day(1)), SUCCESS))
    assert shop.prune(LATER).gone == []


def test_of_a_day_that_goes_no_version_is_left_when_the_grace_is_over(root: str) -> None:
    shop = SmallDays(root, days=FOUR, versions=5).nights([1, 2, 10], ITEM_FEATURES)
    shop.night(2, 99, [ITEM_FEATURES])
    shop.prune()
    assert shop.days(ITEM_FEATURES) == [10]
    assert shop.kept(ITEM_FEATURES, 2) == [2]
    shop.prune(LATER)
    assert shop.layout.kept_days(ITEM_FEATURES) == []
    assert not any(f"ds={day(1)}" in path for path in shop.contents() if "item_features" in path)


# ---- What is staged ------------------------------------------------------------------------------


def stage(shop: SmallDays, run: str = "dead") -> str:
    """Leaves what a run of the first day had staged when it died; returns its folder."""
    folder = shop.layout.staging(FEATURES, day(1), run)
    for name in ("begun.json", "item_features/receipts/a.json", "item_features/.tmp-x-a.parquet"):
        files.write_bytes(f"{folder}/{name}", b"{}")
    job = shop.layout.job_folder(FEATURES, [day(1)], [run])
    files.write_bytes(f"{job}/of a job", b"x")
    return folder


def test_what_a_dead_run_staged_can_be_resumed_for_so_long_and_then_goes(root: str) -> None:
    shop = SmallDays(root, staging_hours=10)
    folder = stage(shop)
    assert shop.prune(9.9).gone == []
    (gone,) = shop.prune(10.1).gone
    assert (gone.what, gone.name, gone.ds, gone.folder) == (
        "staged", "item-features", day(1), folder,
    )  # fmt: skip
    assert len(gone.files) == 3
    assert shop.contents() == {}
    assert not os.path.exists(os.path.dirname(folder))


def test_what_a_job_left_goes_where_no_day_of_it_is_staged_any_more(root: str) -> None:
    shop = SmallDays(root)
    files.delete_tree(os.path.dirname(stage(shop)))
    (left,) = shop.contents()
    assert left.endswith("of a job")
    assert shop.prune(dry_run=True).gone == []
    assert shop.contents().keys() == {left}
    shop.prune()
    assert shop.contents() == {}


def test_what_tells_that_one_of_two_tables_may_be_published_stays(root: str) -> None:
    shop = SmallDays(root)
    folder = stage(shop, "run-forced")
    files.write_bytes(f"{folder}/publishing.json", b"{}")
    assert shop.prune(LATER).gone == []
    files.delete(f"{folder}/publishing.json")
    assert len(shop.prune(LATER).gone) == 1


# ---- Whoever else is at work ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", [EMBED, HISTORIES], ids=["its own tables", "shared tables"])
def test_a_day_on_which_a_run_is_at_work_is_left_for_the_next_prune(
    folder: str, kind: object
) -> None:
    shop = SmallDays(f"{folder}/root", days=FOUR).nights(range(1, 7), ITEM_FEATURES)
    busy = shop.layout.lock_folders(kind.tables, [day(2)])
    with holding_at_once(busy):
        said: list[str] = []
        told = retention.prune(shop.settings, False, said.append)
    assert said == [f"ds {day(2)} is left as it is: a run is at work on it"]
    assert told.skipped == {day(2): "a run is at work on it"}
    assert told.damaged == set()
    assert shop.days(ITEM_FEATURES) == [2, 3, 4, 5, 6]
    assert records.is_whole(shop.recorded(2), shop.layout)
    shop.prune()
    assert shop.days(ITEM_FEATURES) == [3, 4, 5, 6]


def test_a_dry_run_says_the_same_and_changes_nothing(root: str) -> None:
    shop = SmallDays(root, days=FOUR, versions=0).nights(range(1, 8), ITEM_FEATURES)
    for value in (99, 100):
        shop.night(7, value, [ITEM_FEATURES])
    stage(shop)
    before = shop.contents()
    there = sorted(Path(root).rglob("*"))
    told = shop.prune(LATER, dry_run=True)
    assert shop.contents() == before
    assert sorted(Path(root).rglob("*")) == there
    done = shop.prune(LATER)
    assert [(x.folder, x.files) for x in told.gone] == [(x.folder, x.files) for x in done.gone]
    assert {x.what for x in told.gone} == {"published", "earlier versions", "staged"}
    assert told.as_json() | {"dry_run": False} == done.as_json()
    # What goes is noted beside the versions, so that it is counted when it is published again.
    noted = {p for p in shop.contents() if "/_versions/" in p and f"ds={day(7)}" not in p}
    assert len(noted) == 3
    gone = {file.path for one in told.gone for file in one.files}
    left = before.keys() - shop.contents().keys() - gone
    assert [path.rpartition("/")[2] for path in left] == ["of a job"]


def test_a_root_that_cannot_be_written_is_told_and_nothing_is_done(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults, "FIRST_WAIT_SECONDS", 0.001)
    monkeypatch.setattr(faults, "FORBIDDEN_SECONDS", 0.01)
    shop = SmallDays(root, days=FOUR).nights(range(1, 11), ITEM_FEATURES)
    before = shop.contents()

    def read_only(what: str, path: str) -> None:
        if what in (*CHANGING, "makedirs"):
            raise OSError(errno.EROFS, "Read-only file system", path)

    with monkeypatch.context() as patch:
        watch_disk(patch, read_only)
        with pytest.raises(StorageUnavailable, match=r"may not be read or written.*Read-only"):
            shop.prune()
        told: list[str] = []
        settings = shop.settings
        by_night = settings.retention.model_copy(update={"by_the_night": True})
        retention.prune_by_the_night(settings, told.append)
        assert told == []  # it is not asked for
        settings = settings.model_copy(update={"retention": by_night})
        retention.prune_by_the_night(settings, told.append)
    (warning,) = told
    assert warning.startswith("WARNING: the night is published, but not all was pruned after it: ")
    assert shop.contents() == before
    told.clear()
    retention.prune_by_the_night(settings, told.append)
    assert told[0].startswith("pruned: 30 files, ")
    assert shop.days(ITEM_FEATURES) == [7, 8, 9, 10]


def test_a_manifest_that_cannot_be_read_stops_its_own_day_alone(root: str) -> None:
    shop = SmallDays(root, days=FOUR).nights(range(1, 11), ITEM_FEATURES)
    folder = shop.layout.folder(ITEM_FEATURES, day(2))
    for data in (b"{", b"{}"):
        files.write_bytes(os.path.join(folder, MANIFEST), data)
        files.write_bytes(os.path.join(folder, SUCCESS), hashlib.sha256(data).hexdigest().encode())
        told = shop.prune()
        assert list(told.skipped) == [day(2)]
        assert told.as_json()["damaged"] == [str(day(2))]
    files.delete(os.path.join(folder, SUCCESS))
    assert "_manifest.json" in told.skipped[day(2)]
    assert shop.days(ITEM_FEATURES) == [7, 8, 9, 10]
    assert shop.layout.begun_days(ITEM_FEATURES) == [day(2), *map(day, range(7, 11))]


A_RECORD = {"ds": "2026-03-02", "feature_set": "test", "tables": {}}


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("hold", None),
        ("hold", {"record": A_RECORD}),
        ("hold", {"since": "now", "reason": "none", "record": {"tables": {}}}),
        ("record", []),
        ("record", {**A_RECORD, "tables": {"item_features": {}}}),
        ("record", {**A_RECORD, "before": {"tables": {}}}),
        ("record", {**A_RECORD, "pruned": ["item_features"]}),
        ("manifest", None),
        ("manifest", {}),
    ],
)
def test_a_damaged_document_stops_its_own_day_alone(root: str, where: str, said: object) -> None:
    shop, other = SmallDays(root, days=of(HISTORIES)), SmallDays(root, "other")
    shop.nights(range(1, 11), *HISTORIES.tables)
    other.record(2, HISTORIES.tables)
    path = {
        "hold": other.layout.hold_path(day(2)),
        "record": other.layout.night_path(day(2)),
        "manifest": os.path.join(shop.layout.folder(RECENT_CLICKS, day(2)), MANIFEST),
    }[where]
    data = json.dumps(said).encode()
    files.write_bytes(path, data)
    told = shop.prune(LATER)
    assert list(told.skipped) == [day(2)]
    assert told.damaged == {day(2)}
    assert f"{path} should " in told.skipped[day(2)]
    assert "run the command again" in told.skipped[day(2)]
    assert 2 in shop.days(USER_HISTORIES)
    assert day(3) in {x.ds for x in told.gone}
    assert (1 in shop.days(USER_HISTORIES)) == (where == "manifest")  # it would go on from there


def test_a_newest_record_that_is_damaged_lets_days_count_from_the_one_before(root: str) -> None:
    shop = SmallDays(root, days=FOUR).nights(range(1, 11), ITEM_FEATURES)
    files.write_bytes(shop.layout.night_path(day(10)), b"{}")
    said: list[str] = []
    told = retention.prune(shop.settings, False, said.append)
    assert told.newest == day(9)
    assert shop.days(ITEM_FEATURES) == [6, 7, 8, 9, 10]
    assert told.damaged == {day(10)}
    assert [line[:42] for line in said] == ["WARNING: ds 2026-03-10 is left as it is: /"]


def test_what_no_check_of_a_document_foresaw_is_a_warning_after_a_night(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prune(*_: object) -> None:
        raise KeyError("a key")

    monkeypatch.setattr(retention, "prune", prune)
    settings = SmallDays(root, by_the_night=True).settings
    said: list[str] = []
    retention.prune_by_the_night(settings, said.append)
    (warning,) = said
    assert warning.startswith("WARNING: the night is published, but not all was pruned")


# ---- Killed, overtaken ---------------------------------------------------------------------------


def old_night(root: str) -> tuple[Shop, SmallDays]:
    """Publishes two versions of an old day of a table, and a newer night from which days count."""
    shop, days = Shop(root), SmallDays(root, days=FOUR)
    for values in (OLD, NEW):
        shop.publish(values)
    days.night(10, tables=[ITEM_FEATURES])
    return shop, days


@pytest.fixture
def begun(folder: str, monkeypatch: pytest.MonkeyPatch) -> tuple[str, dict[str, bytes]]:
    """Gives a place for shops, and the files of one with an old night."""
    monkeypatch.setattr(retention, "_AT_ONCE", 1)
    shop, _ = old_night(f"{folder}/begun")
    return folder, contents(shop)


def free_locks(root: str) -> None:
    """Frees what a process had locked that ended."""
    for file in files.below(root):
        if os.path.basename(file.path).startswith(".tmp-lock"):
            files.delete(file.path)


def unhurt(shop: Shop) -> dict[str, bytes]:
    """Returns the files of a shop, but for what killed writers left, and times in a record."""
    found = {path: data for path, data in contents(shop).items() if "/.tmp-" not in path}
    (record,) = (path for path in found if path.endswith(f"_nights/ds={day(1)}.json"))
    told = json.loads(found[record])
    return found | {record: json.dumps({**told, "pruned": list(told["pruned"])}).encode()}


@pytest.mark.parametrize("hours", [0.0, LATER], ids=["its day", "its versions, too"])
def test_of_a_prune_killed_at_any_change_no_reader_gets_a_mixture_and_the_next_finishes(
    begun: tuple[str, dict[str, bytes]], calls: Calls, hours: float
) -> None:
    folder, there = begun
    whole = shop_of(there, f"{folder}/whole")
    for _ in range(2):
        SmallDays(whole.settings.root, days=FOUR).prune(hours)
    killed_at, ended = 0, False
    while not ended:
        shop = shop_of(there, f"{folder}/{killed_at}")
        days, readers, made = (
            SmallDays(shop.settings.root, days=FOUR),
            Readers(shop, [OLD, NEW, LATEST]),
            0,
        )

        def kill(what: str, _: str, readers: Readers = readers, killed_at: int = killed_at) -> None:
            nonlocal made
            if what not in CHANGING:
                return
            with calls.quietly():
                readers.poll()
            if made == killed_at:
                raise Killed
            made += 1

        calls.before = kill
        try:
            days.prune(hours)
            ended = True
        except Killed:
            pass
        calls.before = lambda *_: None
        free_locks(shop.settings.root)
        readers.poll()
        for _ in range(2):
            days.prune(hours)
        readers.poll()
        assert shop.published() is None
        assert shop.look().there == {}
        assert unhurt(shop) == unhurt(whole)
        if not hours:  # else whoever read before has long ended
            shop.publish(NEW)
            readers.poll()
            readers.check()
            assert shop.published() == NEW
        killed_at += 2 if files.is_remote(folder) else 1  # a request takes long, as tests go
    assert killed_at > 8


def test_what_is_published_again_after_a_prune_has_another_success(folder: str) -> None:
    """A reader that saw one before and after would trust what it found in between."""
    shop, days = Shop(folder), SmallDays(folder, days=FOUR)
    shop.publish(NEW)
    days.night(10, tables=[ITEM_FEATURES])
    path = os.path.join(shop.place.folder, SUCCESS)
    seen = set[bytes]()
    for _ in range(3):
        assert shop.published() == NEW
        seen.add(files.read_bytes(path))
        days.prune()
        assert shop.look().there == {}
        shop.publish(NEW)
    assert len(seen) == 3


def test_a_record_that_comes_while_it_is_found_out_what_goes_stops_a_prune(root: str) -> None:
    shop = SmallDays(root, days=FOUR).nights([10], ITEM_FEATURES)
    shop.publish(ITEM_FEATURES, 1, 1)
    keeping = retention.Keeping(shop.settings, dt.datetime.now(dt.UTC))
    find = keeping.of_day

    def of_day(ds: dt.date, mine: retention.Documents) -> list[retention.Gone]:
        gone = find(ds, mine)
        shop.record(1, [ITEM_FEATURES])
        return gone

    keeping.of_day = of_day
    with pytest.raises(CourierError, match="Another run published"):
        retention.take_away(keeping, day(1))
    assert shop.days(ITEM_FEATURES) == [1, 10]
    assert records.is_whole(shop.recorded(1), shop.layout)


@pytest.mark.parametrize("first", ["prunes", "publishes"])
def test_a_prune_and_a_publication_that_stop_anywhere_for_each_other_leave_no_mixture(
    begun: tuple[str, dict[str, bytes]], calls: Calls, first: str
) -> None:
    """As where one has lost its lock; whoever finds the other's doing stops, and loses nothing."""
    folder, there = begun
    stop_at, ended, found = 0, False, set[bool]()
    while not ended:
        stop_at += 5 if files.is_remote(folder) else 2  # more would take minutes
        shop = shop_of(there, f"{folder}/{stop_at}")
        days, readers = (
            SmallDays(shop.settings.root, days=FOUR),
            Readers(shop, [OLD, NEW, OTHER, LATEST]),
        )
        shop.make(OTHER)
        keeping = retention.Keeping(days.settings, dt.datetime.now(dt.UTC))

        def prune(keeping: retention.Keeping = keeping) -> None:
            with contextlib.suppress(CourierError):
                retention.take_away(keeping, day(1))

        def publish(shop: Shop = shop) -> None:
            refused(lambda shop: shop.publish(OTHER), shop)

        mine, other = (prune, publish) if first == "prunes" else (publish, prune)
        schedule = Schedule(calls, stop_at, other, readers.poll)
        with pytest.MonkeyPatch.context() as patch, schedule.running(patch):
            mine()
        ended = not schedule.was_stopped
        readers.poll()
        readers.check()
        stands = shop.published()
        found.add(stands is not None)
        assert stands in (None, NEW, OTHER), schedule.stopped_at
        record = records.read_night(days.layout, day(1))
        if record and record["tables"]:  # never a record of what was pruned
            assert stands is not None, schedule.stopped_at
        shop.publish(OTHER)
        readers.poll()
        readers.check()
        assert shop.published() == OTHER, schedule.stopped_at
    assert stop_at > 20
    assert found == {True, False}


# ---- Telling -------------------------------------------------------------------------------------


def test_what_is_told_is_a_line_for_each_table_and_the_sum(root: str) -> None:
    shop = SmallDays(root, days={ITEM_FEATURES.name: 9, USER_SIMSCORES.name: 5})
    shop.nights(range(1, 11), ITEM_FEATURES, USER_SIMSCORES)
    told = shop.prune(dry_run=True)
    lines = retention.render(told).splitlines()
    assert lines[0].startswith("item_features, published: ds 2026-03-01: 5 files, 0.0 MB")
    assert lines[1].startswith(
        "user_simscores, published: 5 days, ds 2026-03-01 to 2026-03-05: 25 files, 0.0 MB"
    )
    assert lines[2].startswith("would go: 30 files, ")
    assert len(lines) == 3
    found = told.as_json()
    assert found["files"] == 30
    assert found["bytes"] == sum(one.bytes for one in told.gone) > 0
    assert found["newest_night"] == str(day(10))
    assert [(one["table"], len(one["days"])) for one in found["gone"]] == [
        ("item_features", 1), ("user_simscores", 5),
    ]  # fmt: skip
    told.skipped = {day(3): "a", day(2): "b"}
    left = retention.render(told).splitlines()[3]
    assert left == "2 days left as they are: ds 2026-03-02, ds 2026-03-03"
    del told.skipped[day(3)]
    assert retention.render(told).splitlines()[3] == "1 day left as it is: ds 2026-03-02"
    shop.prune()
    assert retention.render(shop.prune()) == "nothing to prune"
