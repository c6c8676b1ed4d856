"""Rows are taken in every usual form, and those that cannot be used are refused by name."""

import datetime as dt
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from feature_jobs import inputs
from feature_jobs.inputs import CATALOGUE_COLUMNS, IMPRESSION_COLUMNS
from feature_jobs.schemas import TIMESTAMP, DataContractError
from tests.support.day_tables import (
    DS,
    NAMES,
    NOON,
    WANTED,
    catalogue,
    impressions,
    open_catalogue,
    open_impressions,
    read,
    refusal,
    write,
)

# ---- Taken in every usual form -----------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [pa.int8(), pa.int16(), pa.int32(), pa.uint8(), pa.uint16(), pa.uint32(), pa.int64()],
)
def test_narrower_ints_widen_to_int64(tmp_path: Path, kind: pa.DataType) -> None:
    ids = pa.array([1, 2, 127], kind)
    rows = impressions(item_id=ids, user_id=ids, history=pa.array([[1], [], [127]], pa.list_(kind)))
    source = open_impressions(write(tmp_path, rows))
    assert (source.item_id, source.user_id) == (pa.int64(), pa.int64())
    found = read(source)
    assert found["item_id"].type == found["user_id"].type == pa.int64()
    assert found["history"].type == pa.list_(pa.int64())
    assert found["item_id"].to_pylist() == [1, 2, 127]
    assert found["history"].to_pylist() == [[1], [], [127]]


def test_the_largest_ids_are_kept_exactly(tmp_path: Path) -> None:
    largest = [2**63 - 1, -(2**63), 2**53 + 1]
    source = open_impressions(write(tmp_path, impressions(item_id=pa.array(largest))))
    assert read(source)["item_id"].to_pylist() == largest
    wide = impressions(item_id=pa.array([2**32 - 1, 0, 1], pa.uint32()))
    assert read(open_impressions(write(tmp_path, wide)))["item_id"][0].as_py() == 2**32 - 1


STRINGS = {
    "string": lambda ids: ids,
    "large": lambda ids: ids.cast(pa.large_string()),
    "view": lambda ids: ids.cast(pa.string_view()),
    "dictionary": lambda ids: ids.dictionary_encode(),
    "large dictionary": lambda ids: ids.cast(pa.large_string()).dictionary_encode(),
}


@pytest.mark.parametrize("form", STRINGS)
def test_strings_of_every_form_become_strings(tmp_path: Path, form: str) -> None:
    ids = pa.array(["é", "a longer one than a view holds inline", "é"])
    widen = STRINGS[form](ids)
    shown = open_impressions(write(tmp_path / "i", impressions(item_id=widen, user_id=widen)))
    assert (shown.item_id, shown.user_id) == (pa.string(), pa.string())
    shop = open_catalogue(
        write(tmp_path / "c", pa.table({name: widen for name in CATALOGUE_COLUMNS}))
    )
    for source, names in ((shown, ("item_id", "user_id")), (shop, CATALOGUE_COLUMNS)):
        rows = read(source, names)
        for name in names:
            assert rows[name].type == pa.string()
            assert rows[name].to_pylist() == ids.to_pylist()


@pytest.mark.parametrize("lists", [pa.list_, pa.large_list])
def test_histories_in_lists_of_either_size_become_lists(tmp_path: Path, lists: Callable) -> None:
    rows = impressions(history=pa.array([[3, 1], None, []], lists(pa.int32())))
    found = read(open_impressions(write(tmp_path, rows)))["history"]
    assert found.type == pa.list_(pa.int64())
    assert found.to_pylist() == [[3, 1], None, []]


@pytest.mark.parametrize("zone", ["UTC", "+00:00", "Asia/Shanghai", "America/New_York", "+05:30"])
@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_times_of_every_unit_and_zone_become_microseconds_of_utc(
    tmp_path: Path, unit: str, zone: str
) -> None:
    times = pa.array([NOON] * 3, pa.timestamp(unit, zone))
    found = read(open_impressions(write(tmp_path, impressions(event_time=times, click_time=times))))
    assert found["event_time"].type == found["click_time"].type == TIMESTAMP
    assert found["event_time"].to_pylist() == found["click_time"].to_pylist() == [NOON] * 3


def test_nanoseconds_are_cut(tmp_path: Path) -> None:
    times = pa.array([1_999, 1_000, 999], pa.int64()).cast(pa.timestamp("ns", "UTC"))
    found = read(open_impressions(write(tmp_path, impressions(event_time=times))))
    assert found["event_time"].cast(pa.int64()).to_pylist() == [1, 1, 0]


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_naive_times_are_local_through_every_clock_change(tmp_path: Path, unit: str) -> None:
    local = {
        "2026-01-15 12:00": "2026-01-15 17:00",  # winter
        "2026-07-15 12:00": "2026-07-15 16:00",  # summer
        "2026-03-08 01:59": "2026-03-08 06:59",
        "2026-03-08 02:00": "2026-03-08 07:00",  # the gap: the moment of the change
        "2026-03-08 02:30": "2026-03-08 07:00",
        "2026-03-08 03:00": "2026-03-08 07:00",
        "2026-03-08 03:01": "2026-03-08 07:01",
        "2026-11-01 00:59": "2026-11-01 04:59",
        "2026-11-01 01:30": "2026-11-01 05:30",  # the fold: the earlier of two
        "2026-11-01 02:00": "2026-11-01 07:00",
    }
    times = pa.array([dt.datetime.fromisoformat(t) for t in local], pa.timestamp(unit))
    ids = pa.array(range(len(local)))
    rows = pa.table(
        {"user_id": ids, "item_id": ids, "event_time": times, "clicked": [True] * len(local)}
    )
    source = open_impressions(write(tmp_path, rows), input_timezone="America/New_York")
    found = read(source)["event_time"]
    assert found.type == TIMESTAMP
    assert [t.strftime("%Y-%m-%d %H:%M") for t in found.to_pylist()] == list(local.values())


def test_a_zone_in_the_file_wins_over_the_setting(tmp_path: Path) -> None:
    source = open_impressions(write(tmp_path, impressions()), input_timezone="Asia/Tokyo")
    assert read(source)["event_time"].to_pylist() == [NOON] * 3


@pytest.mark.parametrize("kind", [pa.bool_(), pa.int8(), pa.uint8(), pa.int64(), pa.uint64()])
def test_clicks_of_every_form_become_bools(tmp_path: Path, kind: pa.DataType) -> None:
    clicked = pa.array([1, 0, 1], pa.int8()).cast(kind)
    found = read(open_impressions(write(tmp_path, impressions(clicked=clicked))))["clicked"]
    assert found.type == pa.bool_()
    assert found.to_pylist() == [True, False, True]


def test_columns_go_by_the_shops_names_and_carried_ones_keep_their_type(tmp_path: Path) -> None:
    rows = impressions().rename_columns(["uid", "sku", "ts", "is_click"])
    rows = rows.append_column("price", pa.array([1.5, None, 2.5], pa.float32()))
    rows = rows.append_column("unused", pa.array(["x"] * 3))
    names = dict(zip(IMPRESSION_COLUMNS, rows.column_names[:4], strict=True))
    template = write(tmp_path, rows)
    source = inputs.open_source("impressions", template, DS, NAMES | names, carry=("price",))
    assert source.carried == (pa.field("price", pa.float32()),)
    assert source.form.columns == names  # the optional ones are not there
    found = read(source, WANTED, carry=["price"])
    assert found.column_names == [*IMPRESSION_COLUMNS, "price"]
    assert found["price"].type == pa.float32()
    assert found["price"].to_pylist() == [1.5, None, 2.5]
    assert read(source, ["item_id"]).column_names == ["item_id"]


# ---- Refused or kept -------------------------------------------------------------------------


@pytest.mark.parametrize("column", [*IMPRESSION_COLUMNS, "impression_id"])
def test_a_null_where_a_value_is_needed_is_counted_and_named(tmp_path: Path, column: str) -> None:
    rows = impressions(impression_id=["a", "b", "c"])
    values = pa.array([None, *rows[column].to_pylist()[1:]], rows[column].type)
    rows = rows.set_column(rows.column_names.index(column), column, values)
    source = open_impressions(write(tmp_path, rows))
    refusal(
        DataContractError,
        lambda: read(source),
        f"column {column!r} of the impressions table", "1 rows", "0.parquet",
    )  # fmt: skip
    others = [name for name in rows.column_names if name != column]
    assert len(read(source, others)) == 3  # who does not need the column reads the rows


def test_an_item_without_an_id_is_refused(tmp_path: Path) -> None:
    source = open_catalogue(write(tmp_path, catalogue(item_id=[1, None])))
    refusal(DataContractError, lambda: read(source, CATALOGUE_COLUMNS), "'item_id'", "catalogue")


def test_nulls_that_mean_something_are_kept(tmp_path: Path) -> None:
    source = open_catalogue(write(tmp_path, catalogue()))
    assert read(source, CATALOGUE_COLUMNS).to_pylist() == catalogue().to_pylist()
    optional = {
        "click_time": pa.array([NOON, None, None], TIMESTAMP),
        "request_id": pa.array(["r", None, None]),
        "history": pa.array([[1, 2], None, []]),
    }
    rows = read(open_impressions(write(tmp_path, impressions(**optional))))
    assert rows["request_id"].to_pylist() == ["r", None, None]
    assert rows["click_time"].to_pylist() == [NOON, None, None]
    assert rows["history"].to_pylist() == [[1, 2], None, []]


def test_titles_are_read_where_the_catalogue_has_them(tmp_path: Path) -> None:
    wanted = [*CATALOGUE_COLUMNS, "title"]
    without = open_catalogue(write(tmp_path / "without", catalogue()))
    assert read(without, wanted).column_names == [*CATALOGUE_COLUMNS]
    titles = pa.array(["Silk dress", None], pa.large_string())
    source = open_catalogue(write(tmp_path / "with", catalogue(title=titles)))
    rows = read(source, wanted)
    assert rows.column_names == wanted
    assert rows["title"].type == pa.string()
    assert rows["title"].to_pylist() == ["Silk dress", None]
    assert read(source, CATALOGUE_COLUMNS).equals(read(without, CATALOGUE_COLUMNS))


def test_a_title_that_is_no_text_is_refused(tmp_path: Path) -> None:
    template = write(tmp_path, catalogue(title=[1, 2]))
    refusal(DataContractError, lambda: open_catalogue(template), "'title'", "must be string")


@pytest.mark.parametrize("clicks", [[0, 1, 2], [0, -1, 1]])
def test_a_click_that_is_neither_0_nor_1_is_refused(tmp_path: Path, clicks: list[int]) -> None:
    source = open_impressions(write(tmp_path, impressions(clicked=pa.array(clicks, pa.int8()))))
    bounds = f"{min(clicks)} to {max(clicks)}"
    refusal(
        DataContractError, lambda: read(source), "'clicked'", "impressions", bounds, "0.parquet"
    )


# ---- Days ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("zone", "ds", "end", "hours"),
    [
        ("UTC", "2026-03-02", "2026-03-03T00:00", 24),
        ("Asia/Shanghai", "2026-03-02", "2026-03-02T16:00", 24),
        ("America/New_York", "2026-03-07", "2026-03-08T05:00", 24),
        ("America/New_York", "2026-03-08", "2026-03-09T04:00", 23),
        ("America/New_York", "2026-11-01", "2026-11-02T05:00", 25),
        ("America/Sao_Paulo", "2018-11-03", "2018-11-04T03:00", 24),
        ("America/Sao_Paulo", "2018-11-04", "2018-11-05T02:00", 23),  # it had no midnight
        ("America/Havana", "2026-10-31", "2026-11-01T04:00", 24),  # the first of two midnights
        ("America/Havana", "2026-11-01", "2026-11-02T05:00", 25),
        ("Asia/Kathmandu", "2026-03-02", "2026-03-02T18:15", 24),
    ],
)
def test_a_day_ends_where_the_next_begins_on_the_clock_of_its_zone(
    zone: str, ds: str, end: str, hours: int
) -> None:
    day = dt.date.fromisoformat(ds)
    found = inputs.day_end(day, zone)
    assert dt.datetime.fromtimestamp(found / 1e6, dt.UTC).isoformat()[:16] == end
    length = found - inputs.day_end(day - dt.timedelta(days=1), zone)
    assert length == hours * 3_600_000_000


def test_an_event_after_its_day_is_refused_with_an_item_and_no_user(tmp_path: Path) -> None:
    end = inputs.day_end(DS, "UTC")
    times = pa.array([end - 1, end, end + 5], pa.int64()).cast(TIMESTAMP)
    rows = impressions(item_id=pa.array([71, 72, 73]), event_time=times)
    (group,) = open_impressions(write(tmp_path, rows)).groups()
    found = inputs.read_rows(group, WANTED)
    refusal(
        DataContractError,
        lambda: inputs.check_day(group, found, end),
        "2 rows", "0.parquet", "item 72", "2026-03-03T00:00:00", str(DS), "day_timezone",
    )  # fmt: skip


def test_late_events_of_earlier_days_are_welcome(tmp_path: Path) -> None:
    end = inputs.day_end(DS, "UTC")
    times = pa.array([end - 1, 0, -5], pa.int64()).cast(TIMESTAMP)
    (group,) = open_impressions(write(tmp_path, impressions(event_time=times))).groups()
    found = inputs.read_rows(group, WANTED)
    assert found["event_time"].cast(pa.int64()).to_pylist() == [end - 1, 0, -5]
    assert inputs.check_day(group, found, end) is None
    assert inputs.check_day(group, found.slice(0, 0), end) is None
