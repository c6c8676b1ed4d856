"""Times of every unit are read with checked arithmetic: what cannot be held is never wrapped."""

import datetime as dt
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from feature_jobs import inputs
from feature_jobs.schemas import TIMESTAMP, DataContractError, OperatorError
from tests.support.day_tables import (
    DS,
    NOON,
    impressions,
    open_impressions,
    read,
    refusal,
    write,
)

EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
NOON_S = int(NOON.timestamp())
LAST = dt.datetime(9999, 12, 31, tzinfo=dt.UTC)
FAR = dt.datetime(9999, 12, 31)


def times(values: list[int | None], unit: str, zone: str | None = "UTC") -> pa.Array:
    return pa.array(values, pa.int64()).cast(pa.timestamp(unit, zone))


# What a shop stores in a column of one unit, when it has counted in another.
MISTAKEN = {
    "microseconds as ms": ("ms", NOON_S * 10**6),
    "nanoseconds as ms": ("ms", NOON_S * 10**9),
    "nanoseconds as us": ("us", NOON_S * 10**9),
    "the largest ms": ("ms", 2**63 - 1),
    "the least us": ("us", -(2**63)),
}


@pytest.mark.parametrize("zone", ["UTC", None])
@pytest.mark.parametrize("case", MISTAKEN)
def test_an_event_of_no_year_is_refused_by_its_number(
    tmp_path: Path, case: str, zone: str | None
) -> None:
    unit, value = MISTAKEN[case]
    rows = impressions(event_time=times([value, None, value], unit, zone).fill_null(0))
    source = open_impressions(write(tmp_path, rows), input_timezone="Asia/Tokyo")
    refusal(
        DataContractError,
        lambda: read(source),
        "'event_time'", "impressions", "2 times", f"{value} as timestamp[{unit}", "0.parquet",
        "microseconds or nanoseconds stored as milliseconds",
    )  # fmt: skip


@pytest.mark.parametrize("zone", ["UTC", None])
@pytest.mark.parametrize("case", MISTAKEN)
def test_a_click_of_no_year_becomes_the_nearest_time_that_there_is(
    tmp_path: Path, case: str, zone: str | None
) -> None:
    unit, value = MISTAKEN[case]
    rows = impressions(click_time=times([value, None, 0], unit, zone))
    found = read(open_impressions(write(tmp_path, rows), input_timezone="UTC"))["click_time"]
    assert found.type == TIMESTAMP
    year = 9999 if value > 0 else 1
    assert [t and t.year for t in found.to_pylist()] == [year, None, 1970]
    assert found[2].as_py() == EPOCH


@pytest.mark.parametrize("unit", ["s", "ms", "us"])
def test_the_last_day_of_9999_is_kept_in_every_unit(tmp_path: Path, unit: str) -> None:
    rows = impressions(click_time=pa.array([FAR, None, FAR], pa.timestamp(unit)))
    found = read(open_impressions(write(tmp_path, rows), input_timezone="UTC"))["click_time"]
    assert found.to_pylist() == [LAST, None, LAST]


@pytest.mark.parametrize("zone", ["Asia/Tokyo", "America/New_York"])
def test_nanoseconds_do_not_wrap_where_a_zone_moves_them(tmp_path: Path, zone: str) -> None:
    ends = [-(2**63), None, 2**63 - 1]
    rows = impressions(click_time=times(ends, "ns", None))
    found = read(open_impressions(write(tmp_path, rows), input_timezone=zone))["click_time"]
    assert [t and t.year for t in found.to_pylist()] == [1677, None, 2262]


# ---- INT96 -------------------------------------------------------------------------------------


def test_int96_is_read_to_the_microsecond_and_9999_does_not_wrap(tmp_path: Path) -> None:
    moment = NOON.replace(tzinfo=None, microsecond=123_456)
    rows = impressions(
        event_time=pa.array([moment] * 3),
        click_time=pa.array([FAR, None, dt.datetime(1600, 1, 1)], pa.timestamp("us")),
        carried=pa.array([FAR, None, moment], pa.timestamp("us")),
    )
    template = write(tmp_path, rows, use_deprecated_int96_timestamps=True)
    source = open_impressions(template, input_timezone="UTC", carry=("carried",))
    found = read(source, carry=["carried"])
    assert found["event_time"].to_pylist() == [moment.replace(tzinfo=dt.UTC)] * 3
    assert found["click_time"].to_pylist() == [LAST, None, dt.datetime(1600, 1, 1, tzinfo=dt.UTC)]
    assert found["carried"].to_pylist() == [FAR, None, moment]
    assert source.carried[0].type == found["carried"].type


@pytest.mark.parametrize("column", ["event_time", "click_time", "carried"])
def test_an_int96_that_microseconds_cannot_hold_is_refused(tmp_path: Path, column: str) -> None:
    second = 9_500_000_000_000  # of the year 303,014, which wraps to a year before Christ
    plain = {"event_time": times([0] * 3, "s", None)}
    rows = impressions(**plain | {column: times([second, 0, 0], "s", None)})
    template = write(tmp_path, rows, use_deprecated_int96_timestamps=True)
    carry = ("carried",) if column == "carried" else ()
    source = open_impressions(template, input_timezone="UTC", carry=carry)
    (path,) = source.paths
    assert pq.ParquetFile(path).schema.column(2).physical_type == "INT96"
    refusal(
        DataContractError,
        lambda: read(source, carry=list(carry)),
        repr(column), "1 times", f"{second} as INT96, in s", path,
    )  # fmt: skip


# ---- Messages ----------------------------------------------------------------------------------


def test_an_event_of_the_year_9999_is_told_as_one_after_its_day(tmp_path: Path) -> None:
    source = open_impressions(write(tmp_path, impressions(event_time=pa.array([LAST] * 3))))
    (group,) = source.groups()
    rows = inputs.read_rows(group, ["item_id", "event_time"])
    refusal(
        DataContractError,
        lambda: inputs.check_day(group, rows, inputs.day_end(DS, "UTC")),
        "3 rows", "9999-12-31T00:00:00", "day_timezone",
    )  # fmt: skip


def test_a_machine_without_pyarrows_zones_is_told_as_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object, **__: object) -> None:
        raise pa.ArrowInvalid("Cannot locate or parse timezone 'Asia/Tokyo'")

    naive = pa.array([NOON.replace(tzinfo=None)] * 3)
    template = write(tmp_path, impressions(event_time=naive))
    monkeypatch.setattr(pc, "assume_timezone", missing)
    refusal(
        OperatorError,
        lambda: open_impressions(template, input_timezone="Asia/Tokyo"),
        "'event_time'", "Asia/Tokyo", "lacks the operating system's time-zone database", "tzdata",
    )  # fmt: skip
