"""Which night's features a moment may know."""

import datetime as dt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from feature_jobs.impressions.snapshots import Snapshot, after_its_day, always, night_at

HOUR = 3_600_000_000
DAY = dt.date(2026, 3, 1)


def test_a_night_is_available_a_delay_after_the_end_of_its_day_in_its_time_zone() -> None:
    found = after_its_day(DAY, "Asia/Shanghai", 6 * HOUR)
    end = dt.datetime(2026, 3, 2, 6, tzinfo=dt.timezone(dt.timedelta(hours=8)))
    assert found == Snapshot(DAY, int(end.timestamp()) * 1_000_000)
    at = found.from_us
    assert night_at(np.array([at - 1, at, at + 1]), [found]).tolist() == [-1, 0, 0]


@pytest.mark.parametrize(
    ("zone", "day", "hours"),
    [("Europe/Berlin", dt.date(2026, 3, 29), 23), ("America/New_York", dt.date(2026, 11, 1), 25)],
)
def test_the_day_on_which_clocks_change_is_an_hour_shorter_or_longer(
    zone: str, day: dt.date, hours: int
) -> None:
    before = after_its_day(day - dt.timedelta(days=1), zone, 6 * HOUR)
    assert after_its_day(day, zone, 6 * HOUR).from_us - before.from_us == hours * HOUR


def test_a_night_that_is_always_available_is_so_before_1970_too() -> None:
    first = np.iinfo(np.int64).min
    assert night_at(np.array([first, -1, 0]), [always(DAY)]).tolist() == [0, 0, 0]


def test_without_nights_none_is_available() -> None:
    assert night_at(np.array([0, 5]), []).tolist() == [-1, -1]


@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 30)), unique_by=lambda one: one[0]),
    st.lists(st.integers(-1, 31)),
)
def test_it_is_the_newest_of_those_available(
    nights: list[tuple[int, int]], moments: list[int]
) -> None:
    snapshots = [Snapshot(DAY + dt.timedelta(days=day), from_us) for day, from_us in nights]
    for moment, found in zip(
        moments, night_at(np.array(moments, np.int64), snapshots), strict=True
    ):
        there = [one.ds for one in snapshots if one.from_us <= moment]
        assert (snapshots[found].ds if found >= 0 else None) == max(there, default=None)
