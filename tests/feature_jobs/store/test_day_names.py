"""Names of days are an exact inverse of the days, in every spelling that is allowed."""

import datetime as dt
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feature_jobs.store.day_names import DayNames, find_day, has_day, literal, name_of

DS = dt.date(2026, 3, 1)
SPELLINGS = {
    "ds={ds}": "ds=2026-03-01",
    "dt={ds:%Y%m%d}": "dt=20260301",
    "year={ds:%Y}/month={ds:%m}/day={ds:%d}": "year=2026/month=03/day=01",
    "y={ds:%Y}/m={ds:%-m}/d={ds:%-d}": "y=2026/m=3/d=1",
    "{ds:%Y/%m/%d}": "2026/03/01",
    "{ds:%d.%m.%Y}.json": "01.03.2026.json",
    "{ds:%Y}/{ds:%m}/{ds}": "2026/03/2026-03-01",
    "{{x}}/{ds}": "{x}/2026-03-01",
}


@pytest.mark.parametrize(("template", "name"), SPELLINGS.items())
def test_a_day_is_spelt_as_the_template_says(template: str, name: str) -> None:
    assert DayNames(template).name_of(DS) == name
    assert DayNames(template).day_of(name) == DS


@given(st.sampled_from(sorted(SPELLINGS)), st.dates(), st.dates())
def test_a_name_is_of_one_day_alone(template: str, one: dt.date, other: dt.date) -> None:
    names = DayNames(template)
    assert names.day_of(names.name_of(one)) == one
    assert (names.name_of(one) == names.name_of(other)) == (one == other)


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("ds={ds}", "ds=2026-02-30"), ("ds={ds}", "ds=2026-03-01x"), ("ds={ds}", "xds=2026-03-01"),
        ("ds={ds}", "ds=2026-3-1"), ("ds={ds}", "ds=20260301"), ("ds={ds}", "ds=٢٠٢٦-03-01"),
        ("ds={ds}", "ds=0000-03-01"), ("ds={ds}", "ds=2026-03-01\n"), ("ds={ds}", ""),
        ("d.{ds}", "dx2026-03-01"), ("{ds:%Y/%-m/%-d}", "2026/03/1"),
        ("{ds:%Y}/{ds}", "2025/2026-03-01"),
    ],
)  # fmt: skip
def test_another_name_has_no_day(template: str, name: str) -> None:
    assert DayNames(template).day_of(name) is None


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{date}", "knows {ds} only, but has {date}"), ("{ds!r}", "knows {ds} only"),
        ("{ds.year}", "knows {ds} only, but has {ds.year}"), ("{}", "knows {ds} only"),
        ("{ds:%y%m%d}", "spells the day with '%y'"), ("{ds:%Y-%b-%d}", "spells the day with '%b'"),
        ("{ds}/{ds:%H}", "spells the day with '%H'"), ("{ds:%}", "spells the day with '%'"),
        ("catalogue", "has no day"), ("{{ds}}", "has no day"),
        ("{ds:%Y%m}", "has no day: "), ("{ds:%m}/{ds:%d}", "has no year: "),
        ("{ds:%Y}", "has no month and no day: "), ("{ds:%Y-%-m%-d}", "has a month of one digit"),
        ("{ds:%Y%m-%-d}*", "has a day of one digit"), ("{ds:%Y%m}/1{ds:%-d}", "has a day of one"),
        ("{ds:%Y%m}/*{ds:%-d}", "has a day of one digit"), ("{ds", "'}'"), ("{ds}}", "'}'"),
    ],
)  # fmt: skip
def test_a_template_that_does_not_tell_each_day_is_refused(template: str, reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)) as refused:
        DayNames(template)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("template", "path"),
    [
        ("log/dt={ds}/*.parquet", "log/dt=2026-03-01/a.parquet"),
        ("log/{ds:%Y/%m/%d}/**/*.parquet", "log/2026/03/01/hour=3/b/a.parquet"),
        ("log/{ds:%Y/%m/%d}/**/*.parquet", "log/2026/03/01/a.parquet"),
        ("log/{ds:%Y%m%d}/**", "log/20260301/hour=3/a.parquet"),
        ("[[]x]/{ds:%Y%m%d}*.p[!b][p-r]", "[x]/20260301-part3.paq"),
        ("log/m={ds:%-m}/d={ds:%-d}/y={ds:%Y}/?.pq", "log/m=3/d=1/y=2026/1.pq"),
    ],
)
def test_a_file_that_a_pattern_finds_has_the_day_of_the_pattern(template: str, path: str) -> None:
    assert DayNames(template).day_of(path) == DS
    assert DayNames(template).day_of(path.replace(".p", ".q")) in (None, DS)
    assert DayNames(template).day_of(f"other/{path}") is None


def test_a_wildcard_does_not_reach_into_folders() -> None:
    assert DayNames("log/{ds}/*.parquet").day_of("log/2026-03-01/hour=3/a.parquet") is None


@pytest.mark.parametrize(
    ("template", "pattern"),
    [
        ("dt={ds}/*", "dt=????-??-??/*"), ("{ds:%Y%m%d}", "????????"),
        ("{ds:%Y}/{ds:%-m}/{ds:%-d}", "????/*/*"),
    ],
)  # fmt: skip
def test_one_pattern_finds_all_days(template: str, pattern: str) -> None:
    assert DayNames(template).glob() == pattern


@pytest.mark.parametrize(
    ("path", "day"),
    [
        ("/log/dt=2026-03-01/a.parquet", DS), ("/log/20260301/a.parquet", DS),
        ("/log/year=2026/month=3/day=1/a.parquet", DS), ("/log/2026/03/01/hour=3/a.pq", DS),
        ("/log/clicks-2026-03-01-part2.parquet", DS), ("/log/clicks_20260301.parquet", DS),
        ("/log/2025-01-01/dt=2026-03-01/part-2025-02-02.parquet", DS),
        ("/log/2025-01-01/20260301/a.parquet", DS),
        ("/log/20260301/part-00000-12345678-1234-4123-8123-123456789012-c000.parquet", DS),
        ("/log/dt=2026-99-01/20260301.parquet", DS), ("/log/2026-99-01/a.parquet", None),
        ("/log/part-00000-12345678-1234-4123-8123-123456789012-c000.parquet", None),
        ("/log/part-00000-tid-20260301202603012026-1-c000.parquet", None),
        ("/log/120260301.parquet", None), ("/log/2026/a.parquet", None),
    ],
)  # fmt: skip
def test_a_day_is_recognised_in_folders_and_names(path: str, day: dt.date | None) -> None:
    seen = find_day(path)
    assert (seen and seen[0]) == day
    if seen:
        assert (int(seen[1]["Y"]), int(seen[1]["m"]), int(seen[1]["d"])) == (2026, 3, 1)


def test_one_snapshot_has_the_same_name_every_day() -> None:
    assert not has_day("items/{{x}}.parquet")
    assert has_day("items/{ds:%Y}")
    assert name_of("items/{{x}}.parquet", DS) == "items/{x}.parquet"
    assert name_of(literal("a{b}{ds}"), DS) == "a{b}{ds}"
    assert DayNames(f"{literal('[a]{b}*')}/{{ds}}").day_of(f"[a]{{b}}*/{DS}") == DS
