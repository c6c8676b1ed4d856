"""A night is opened whole, in the versions of its record, or NightNotReady says why it is not."""

import datetime as dt
import errno
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from feature_jobs import tables
from feature_jobs.schemas import (
    ITEM_FEATURES,
    TABLES,
    DataContractError,
    InputNotReady,
    OperatorError,
)
from feature_jobs.store import files, partitions
from feature_jobs.store.arrays import plain
from feature_jobs.store.documents import read_json, write_json
from feature_jobs.tables import Night, NightNotReady, open_night
from tests.support.ill_disk import watch_disk
from tests.support.schedules import CHANGING
from tests.support.small_nights import DS, Shop
from tests.support.world import DAYS, World

OLD, NEW = [1, 2, 3, 4], [5, 6, 7, 8, 9]
NAME = ITEM_FEATURES.name
ITEM_TABLES = ("item_embeddings", "item_rejects", NAME)
USER_TABLES = {"user_histories", "recent_clicks", "user_simscores"}


@pytest.fixture(params=["disk", "bucket"])
def shop(request: pytest.FixtureRequest) -> Shop:
    """Gives a shop with one night of one small table, on a disk or in a bucket."""
    fixture = "tmp_path" if request.param == "disk" else "near_bucket"
    shop = Shop(f"{request.getfixturevalue(fixture)}/root")
    shop.publish(OLD)
    return shop


def opened(shop: Shop, ds: str | dt.date = "latest", **more: Any) -> Night:
    return open_night(shop.settings.root, "test", ds, **more)


def values(night: Night) -> list[int]:
    return sorted(night[NAME].read()["x"].to_pylist())


def edit_record(shop: Shop, **fields: Any) -> None:
    path = shop.settings.layout.night_path(DS)
    write_json(path, read_json(path) | fields)


# ---- What is opened ----------------------------------------------------------------------------


@pytest.mark.first_night
def test_all_tables_of_a_night_are_read_by_name(world: World) -> None:
    night = open_night(str(world.root), "test", "latest")
    assert (night.ds, night.feature_set) == (DAYS[0], "test")
    assert set(night.tables) == {*ITEM_TABLES, *USER_TABLES}
    for name, table in night.tables.items():
        found = table.read()
        assert found.equals(plain(world.table(name, DAYS[0])))
        assert len(found) == table.rows
        assert sum(map(len, table.read_files())) == table.rows
        assert table.schema.names == found.column_names
        assert table.folder == os.path.dirname(table.paths[0])
        assert all(table.version in path for path in table.paths)
    assert night[NAME].rows > 0
    assert night[NAME].schema.field("item_id").metadata[b"meaning"].startswith(b"a cata")
    columns = ["cluster_id", "item_id"]
    assert night[NAME].read(columns).column_names == columns
    assert all(rows.column_names == columns for rows in night[NAME].read_files(columns))


@pytest.mark.first_night
def test_the_lines_of_the_page_read_a_night(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(__file__).parents[2] / "pipelines/docs/nights.md"
    (lines,) = re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(world.folder)
    names: dict[str, Any] = {}
    exec(lines.replace('"demo"', '"test"'), names)
    assert names["clusters"].num_rows == names["night"]["item_features"].rows > 0


def test_a_night_is_opened_by_its_day_or_as_the_newest(shop: Shop) -> None:
    Shop(shop.settings.root, DS + dt.timedelta(days=1)).publish(NEW)
    for ds in (DS, str(DS)):
        assert values(opened(shop, ds)) == OLD
    assert opened(shop).ds == DS + dt.timedelta(days=1)
    assert values(opened(shop)) == NEW


def test_the_time_of_a_night_is_utc_and_none_where_an_earlier_version_published_it(
    shop: Shop,
) -> None:
    at = opened(shop).published_at
    assert at
    assert dt.timedelta() <= dt.datetime.now(dt.UTC) - at < dt.timedelta(minutes=1)
    record = read_json(shop.settings.layout.night_path(DS))
    del record["published_at"]
    write_json(shop.settings.layout.night_path(DS), record)
    assert opened(shop, DS).published_at is None


def test_opening_and_reading_writes_nothing_and_reads_each_manifest_once(tmp_path: Path) -> None:
    shop = Shop(str(tmp_path))
    shop.publish(OLD)
    calls = Counter[str]()
    with pytest.MonkeyPatch.context() as patch:
        watch_disk(patch, lambda what, path: calls.update([what, os.path.basename(path)]))
        opened(shop)
        assert calls["open file"] == 5  # latest.json, the record twice, _SUCCESS, the manifest
        opened(shop)[NAME].read()
    assert calls["_manifest.json"] == 2
    assert not set(calls) & CHANGING


def test_a_root_is_spelt_as_in_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Shop(str(tmp_path / "root")).publish(OLD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for root in ("root", "./root/", "~/root", str(tmp_path / "root")):
        assert values(open_night(root, "test", "latest")) == OLD
    with pytest.raises(OperatorError, match="An empty path names nothing"):
        open_night("", "test", "latest")
    with pytest.raises(OperatorError, match=r"other than gs://"):
        open_night("s3://shop/root", "test", "latest")


# ---- Tables with user IDs ----------------------------------------------------------------------


@pytest.mark.first_night
def test_who_may_not_read_user_ids_reads_the_tables_of_items(world: World) -> None:
    users = world.folder / "users"
    for table in filter(lambda table: table.has_users, TABLES.values()):
        there = ("shared" if table.shared else "test", table.name)
        if world.root.joinpath(*there).exists():
            users.joinpath(there[0]).mkdir(parents=True, exist_ok=True)
            shutil.move(world.root.joinpath(*there), users.joinpath(*there))
    root = str(world.root)
    with pytest.raises(OperatorError, match=r"user_root.*or name the `tables` that you read"):
        open_night(root, "test", "latest")
    night = open_night(root, "test", "latest", tables=ITEM_TABLES)
    assert list(night.tables) == list(ITEM_TABLES)
    assert night[NAME].read().num_rows == night[NAME].rows
    night = open_night(root, "test", "latest", user_root=str(users))
    assert set(night.tables) == {*ITEM_TABLES, *USER_TABLES}
    assert night["user_simscores"].read().num_rows == night["user_simscores"].rows > 0
    shutil.rmtree(users / "shared/user_histories")
    with pytest.raises(NightNotReady, match="consists of user_histories as version"):
        open_night(root, "test", "latest", user_root=str(users))


# ---- What is not ready -------------------------------------------------------------------------


def refused(call: Callable[[], object]) -> str:
    """Returns what NightNotReady says, which is one paragraph that ends with status 4."""
    with pytest.raises(NightNotReady) as error:
        call()
    assert isinstance(error.value, InputNotReady)
    assert error.value.exit_status == 4
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_night_that_is_not_there_is_told_with_what_is(shop: Shop, tmp_path: Path) -> None:
    root = shop.settings.root
    Shop(root, DS - dt.timedelta(days=9)).publish(NEW)
    told = refused(lambda: opened(shop, "2026-04-01"))
    assert f"There is no night of ds 2026-04-01 of the feature set 'test' below {root}" in told
    assert "the newest there is that of 2026-03-01, the oldest that of 2026-02-20" in told
    for ds in ("latest", DS):
        assert "there are nights of 'test'" in refused(lambda ds=ds: open_night(root, "tset", ds))
        told = refused(lambda ds=ds: open_night(f"{root}s", "test", ds))
        assert "there is no such folder" in told
    (tmp_path / "empty").mkdir()
    told = refused(lambda: open_night(str(tmp_path / "empty"), "test", DS))
    assert "there are no nights" in told


def test_nights_of_an_earlier_version_have_no_newest_one_and_are_opened_by_day(shop: Shop) -> None:
    files.delete(shop.settings.layout.latest_path)
    told = refused(lambda: opened(shop))
    assert "Ask for a day, such as the newest there, 2026-03-01" in told
    assert values(opened(shop, DS)) == OLD


def test_a_night_whose_tables_are_not_those_of_its_record_is_being_published(shop: Shop) -> None:
    success = os.path.join(shop.place.folder, partitions.SUCCESS)
    data = files.read_bytes(success)
    files.delete(success)
    assert f"but at {shop.place.folder} it is not whole." in refused(lambda: opened(shop))
    files.write_bytes(success, data)
    assert values(opened(shop)) == OLD
    (entry,) = read_json(shop.settings.layout.night_path(DS))["tables"].values()
    edit_record(shop, tables={NAME: entry | {"version": "0123456789ab"}})
    told = refused(lambda: opened(shop))
    assert f"as version 0123456789ab, but at {shop.place.folder} it is as version" in told
    edit_record(shop, tables={NAME: entry, "item_rejects": entry | {"path": "test/item_rejects/x"}})
    assert "consists of item_rejects as version" in refused(lambda: opened(shop))
    assert values(opened(shop, tables=[NAME])) == OLD


def test_a_shared_table_that_was_made_again_is_taken_by_the_next_refresh(shop: Shop) -> None:
    (entry,) = read_json(shop.settings.layout.night_path(DS))["tables"].values()
    edit_record(shop, tables={"user_histories": entry | {"version": "0123456789ab"}})
    told = refused(lambda: opened(shop))
    assert f"it is as version {entry['version']}. Feature sets share it" in told
    assert "`courier refresh --ds 2026-03-01` of 'test' takes it" in told
    files.delete(os.path.join(shop.place.folder, partitions.SUCCESS))
    told = refused(lambda: opened(shop))
    assert "it is not whole. The day is being published" in told


def test_a_newest_night_whose_record_is_gone_is_told_with_what_names_it(shop: Shop) -> None:
    Shop(shop.settings.root, DS - dt.timedelta(days=1)).publish(NEW)
    files.delete(shop.settings.layout.night_path(DS))
    told = refused(lambda: opened(shop))
    assert told.startswith(f"{shop.settings.layout.latest_path} names ds 2026-03-01 as the newest")
    assert f"its record, {shop.settings.layout.night_path(DS)}, is gone" in told
    assert "`courier refresh --ds 2026-03-01`, which writes it anew" in told
    shop.publish(OLD)
    assert values(opened(shop)) == OLD


def test_a_table_that_was_pruned_is_told_with_the_time_and_hinders_no_other(shop: Shop) -> None:
    edit_record(shop, pruned={"user_simscores": "2026-06-01T00:00:00+00:00"})
    night = opened(shop)
    assert values(night) == OLD
    told = refused(lambda: night["user_simscores"])
    assert "user_simscores of ds 2026-03-01 was pruned at 2026-06-01T00:00:00+00:00" in told
    assert refused(lambda: opened(shop, tables=[NAME, "user_simscores"])) == told
    edit_record(shop, tables={}, pruned={NAME: "2026-06-01T00:00:00+00:00"})
    assert "nothing of it is left" in refused(lambda: opened(shop))


def test_a_table_that_the_night_was_made_without_is_told_with_those_it_has(shop: Shop) -> None:
    for call in (
        lambda: opened(shop)["user_simscores"],
        lambda: opened(shop, tables=["recent_clicks"]),
    ):
        assert "it has item_features. Read only these" in refused(call)


# ---- What changes meanwhile --------------------------------------------------------------------


@pytest.mark.parametrize("change", ["published anew", "brought back"])
def test_what_was_opened_is_read_whole_or_not_at_all(shop: Shop, change: str) -> None:
    if change == "brought back":
        shop.publish(NEW)
    night = opened(shop)
    before = values(night)
    first = night[NAME].read_files()
    assert len(next(first)) > 0
    shop.publish(NEW) if change == "published anew" else shop.roll_back()
    calls = (lambda: night[NAME].read(), lambda: list(first), lambda: night[NAME].schema)
    for call in calls:
        assert "Open the night again" in refused(call)
    assert values(opened(shop)) == (NEW if before == OLD else OLD)


def test_a_night_that_is_published_while_it_is_opened_is_the_new_one(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, todo = partitions.find_published, [NEW]

    def find(folder: str) -> Any:
        found = real(folder)
        if todo:
            shop.publish(todo.pop())
        return found

    monkeypatch.setattr(tables.partitions, "find_published", find)
    assert values(opened(shop)) == NEW


def test_a_record_that_never_stands_is_given_up(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, times = partitions.find_published, []

    def find(folder: str) -> Any:
        times.append(folder)
        edit_record(shop, times=len(times))
        return real(folder)

    monkeypatch.setattr(tables.partitions, "find_published", find)
    assert "changed 5 times while it was opened" in refused(lambda: opened(shop))
    assert len(times) == 5


# ---- What is wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ds",
    [
        "2026-02-30", "20260301", "2026-W09-7", "yesterday", "", "Latest", "2026-03-01.json",
        dt.datetime(2026, 3, 1), None,
    ],
)  # fmt: skip
def test_what_is_no_day_is_refused(shop: Shop, ds: Any) -> None:
    with pytest.raises(OperatorError, match=r"which is no day\. Give a day as YYYY-MM-DD"):
        opened(shop, ds)


def test_names_that_are_none_of_a_table_or_a_column_are_refused(shop: Shop) -> None:
    for call in (
        lambda: opened(shop)["itemfeatures"],
        lambda: opened(shop, tables=["itemfeatures"]),
    ):
        with pytest.raises(OperatorError, match=r"no table 'itemfeatures'.*item_features"):
            call()
    with pytest.raises(OperatorError, match=r"has no column 'cluster'; it has x"):
        opened(shop)[NAME].read(["x", "cluster"])


def test_one_name_in_the_place_of_a_list_is_refused_by_name(shop: Shop) -> None:
    with pytest.raises(OperatorError, match=r"^`tables` is the text 'item_features'.*\['item_f"):
        opened(shop, tables=NAME)
    table = opened(shop)[NAME]
    for call in (lambda: table.read("x"), lambda: list(table.read_files("x"))):
        with pytest.raises(OperatorError, match=r"^`columns` is the text 'x'.*Give \['x'\]"):
            call()


def test_no_columns_are_all_rows(shop: Shop) -> None:
    table = opened(shop)[NAME]
    assert table.read([]).shape == (len(OLD), 0)
    assert [rows.shape for rows in table.read_files([])] == [(2, 0), (2, 0)]


def test_rows_for_training_are_of_no_night(shop: Shop) -> None:
    for call in (
        lambda: opened(shop)["training_rows"],
        lambda: opened(shop, tables=["training_rows"]),
    ):
        with pytest.raises(OperatorError, match="no table 'training_rows' in any") as error:
            call()
        assert str(error.value).count("training_rows") == 1


def test_a_table_that_was_not_asked_for_is_told_from_one_that_the_night_lacks(shop: Shop) -> None:
    (entry,) = read_json(shop.settings.layout.night_path(DS))["tables"].values()
    edit_record(shop, tables={NAME: entry, "user_simscores": entry})
    night = opened(shop, tables=[NAME])
    with pytest.raises(OperatorError, match=r"not among the tables asked for .*: item_features"):
        night["user_simscores"]
    assert "was made without recent_clicks" in refused(lambda: night["recent_clicks"])
    assert not opened(shop, tables=[]).tables


def test_what_is_damaged_is_told_with_its_path(shop: Shop) -> None:
    night = opened(shop)
    files.write_bytes(night[NAME].paths[0], b"PAR1 and no more")
    for call in (night[NAME].read, lambda: night[NAME].schema):
        with pytest.raises(DataContractError, match=r"part-.*cannot be read as Parquet"):
            call()
    for path in (shop.settings.layout.night_path(DS), shop.settings.layout.latest_path):
        right = files.read_bytes(path)
        for data in (b"{", b"[]"):
            files.write_bytes(path, data)
            with pytest.raises(DataContractError, match="has since been damaged") as error:
                opened(shop)
            assert path in str(error.value)
        files.write_bytes(path, right)


def test_whichever_byte_of_a_file_is_damaged_is_told_with_its_path_and_what_mends_it(
    tmp_path: Path,
) -> None:
    shop = Shop(str(tmp_path))
    shop.publish(OLD)
    table = opened(shop)[NAME]
    path = table.paths[0]
    data, told = files.read_bytes(path), list[DataContractError]()
    for at in range(len(data)):
        files.write_bytes(path, data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
        try:
            table.read()
        except DataContractError as error:
            told.append(error)
    assert all(str(one).startswith(f"{path} cannot be read as Parquet (") for one in told)
    assert all("`courier validate` tells" in str(one) for one in told)
    assert not any("\n" in str(one) for one in told)
    assert {type(one.__cause__) for one in told} >= {OSError, pa.ArrowInvalid}


@pytest.mark.parametrize("error", [OSError(errno.EIO, "a bad sector"), pa.ArrowMemoryError()])
def test_a_fault_of_the_machine_is_not_taken_for_damage(
    shop: Shop, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(path: str, columns: Any) -> Any:
        raise error

    monkeypatch.setattr(tables.partitions, "read_parquet", read)
    with pytest.raises(type(error)) as found:
        opened(shop)[NAME].read()
    assert found.value is error
