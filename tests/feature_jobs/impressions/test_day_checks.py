"""A day of the log is refused where its rows lie elsewhere, or its keys tell nothing apart."""

import datetime as dt
import functools
import operator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from feature_jobs import inputs
from feature_jobs.impressions import day_checks
from feature_jobs.impressions.day_checks import (
    CheckIds,
    DayFacts,
    JudgeDay,
    check_facts,
    facts_of,
    find_repeated,
    write_hashes,
)
from feature_jobs.impressions.histories import DAY_US
from feature_jobs.inputs import read_rows
from feature_jobs.schemas import TIMESTAMP, DataContractError
from feature_jobs.store import hashing, worker_notes
from tests.support.day_tables import DS, open_impressions, refusal, write

START = (DS - dt.date(1970, 1, 1)).days * DAY_US
END, WINDOW = START + DAY_US, 7 * DAY_US


def moments(values: list[int | None]) -> pa.Array:
    return pa.array(values, pa.int64()).cast(TIMESTAMP)


def facts(
    events: list[int], window_us: int | None = WINDOW, users: list[int] | None = None, **others: Any
) -> DayFacts:
    """Tells facts of impressions that are all clicked, each by another user if not said."""
    n = len(events)
    rows = pa.table(
        {"user_id": users or list(range(n)), "item_id": range(n), "event_time": moments(events),
         "clicked": [True] * n} | others
    )  # fmt: skip
    return facts_of(rows, START, END, window_us)


def refused(found: DayFacts, *named: str) -> str:
    return refusal(DataContractError, lambda: check_facts(DS, found), str(DS), *named)


# ---- Rows outside of the day -------------------------------------------------------------------


def test_late_rows_are_welcome_up_to_a_half() -> None:
    check_facts(DS, facts([START, START - 1]))
    check_facts(DS, facts([START, END - 1, START - 30 * DAY_US]))
    told = refused(facts([START, START - 1, START - 5]), "2 of the 3 impressions")
    assert "2026-03-01T23:59:59.999995+00:00" in told


def test_seconds_stored_as_milliseconds_are_told_with_usual_causes() -> None:
    refused(
        facts([START // 1_000, END // 1_000]),
        "2 of the 2", "1970-01-21", "seconds stored as milliseconds", "input_timezone",
        "day_timezone", "split by another date",
    )  # fmt: skip


def test_a_day_is_judged_by_all_of_its_row_groups() -> None:
    groups = [facts([START - 1] * 3), facts([START] * 2), facts([START] * 2)]
    refused(groups[0], "3 of the 3")
    check_facts(DS, functools.reduce(operator.add, groups))
    refused(groups[0] + groups[1], "3 of the 5")


def test_click_times_of_other_years_are_told_where_most_are_such() -> None:
    good, old, new = START + 5, START // 1_000, END + WINDOW
    events = [START] * 4
    check_facts(DS, facts(events, click_time=moments([good, old, new, good])))
    check_facts(DS, facts(events, click_time=moments([None, None, None, None])))
    check_facts(DS, facts(events, window_us=None, click_time=moments([old] * 4)))
    edge = [START - WINDOW, END + WINDOW - 1]
    check_facts(DS, facts(events, click_time=moments([*edge, None, None])))
    for odd in (old, new):
        found = facts(events, click_time=moments([odd, odd, good, None]))
        refused(found, "2 of the 3 click times", "window_days", "click_delay_seconds")


def test_a_date_that_stands_for_no_time_is_told_where_most_clicks_have_it() -> None:
    never = (dt.date(9999, 12, 31) - dt.date(1970, 1, 1)).days * DAY_US
    events, times = [START] * 4, moments([never, never, never, START + 5])
    refused(facts(events, click_time=times), "3 of the 4 click times", "9999-12-31", "null")
    some = [True, False, False, True]
    one_of_two = facts(events, click_time=times, clicked=some)
    check_facts(DS, one_of_two)  # that of what was not clicked says nothing
    assert (one_of_two.odd, one_of_two.timed) == (1, 2)


# ---- What a runner may lose --------------------------------------------------------------------


def judged(folder: Path, told: list[DayFacts], rows: int) -> list[str]:
    """Judges the day as the job does; returns what is refused."""
    judge = JudgeDay({DS.toordinal(): rows}, str(folder))
    list(judge.process((DS.toordinal(), told)))
    return [str(error) for error in worker_notes.refused(str(folder))]


def test_facts_that_are_lost_or_doubled_are_missed(tmp_path: Path) -> None:
    told = [facts([START] * 2), facts([START] * 3)]
    assert judged(tmp_path / "whole", told, 5) == []
    assert judged(tmp_path / "empty day", [DayFacts()], 0) == []
    for name, came in {"some": told[:1], "all": [DayFacts()], "doubled": told * 2}.items():
        (error,) = judged(tmp_path / name, came, 5)
        assert f"{sum(one.rows for one in came)} of 5 came. The runner lost some" in error
        assert f"ds {DS}" in error


def test_ids_that_never_met_are_missed(tmp_path: Path) -> None:
    told = [facts([START] * 2, impression_id=[1, 2]), facts([START], impression_id=[3])]
    met = [DayFacts(compared_ids=2), DayFacts(compared_ids=1)]
    assert judged(tmp_path / "whole", told + met, 3) == []
    for name, came in {"some": met[:1], "all": []}.items():
        (error,) = judged(tmp_path / name, told + came, 3)
        assert f"{2 * len(came)} of 3 came. The runner lost some" in error
        assert "impression_id" in error


# ---- Requests ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("users", "requests", "is_refused"),
    [
        ([1, 2, 1], ["r", "r", "r"], True),
        ([1, 2, 1], [0, 0, 0], True),
        ([1, 1, 1], ["r", "r", "r"], False),  # one request, as it may be
        ([1, 2, 1], ["r", "s", "r"], False),
        ([1, 2, 1], ["r", None, "r"], False),
        ([1, 2, 1], [None, None, None], False),  # then gaps tell them apart
    ],
)
def test_one_request_id_for_several_users_is_refused(
    users: list[int], requests: list, is_refused: bool
) -> None:
    kind = pa.int64() if 0 in requests else pa.string()
    events, given = [START] * 3, pa.array(requests, kind)
    whole = facts(events, users=users, request_id=given)
    parts = [facts([START], users=users[n : n + 1], request_id=given.slice(n, 1)) for n in range(3)]
    for found in (whole, functools.reduce(operator.add, parts)):
        if is_refused:
            refused(found, "All 3 impressions", repr(requests[0]), "request_gap_seconds")
        else:
            check_facts(DS, found)


def test_no_more_than_two_users_and_requests_of_a_day_are_held() -> None:
    parts = [
        facts([START], users=[n], request_id=pa.array([f"r{n}"], pa.string())) for n in range(9)
    ]
    whole = functools.reduce(operator.add, parts)
    assert (len(whole.users), len(whole.requests), whole.rows) == (2, 2, 9)
    check_facts(DS, whole)


# ---- Impression IDs ----------------------------------------------------------------------------


def check_ids(folder: Path, columns: list[pa.Array], shards: int = 4) -> list[str]:
    """Checks the IDs of files of a day, as the job does; returns what is refused."""
    days = [
        pa.table(
            {"user_id": np.arange(len(ids)), "item_id": np.arange(len(ids)),
             "event_time": moments([START] * len(ids)), "clicked": [False] * len(ids),
             "impression_id": ids}
        )
        for ids in columns
    ]  # fmt: skip
    source = open_impressions(write(folder, *days, row_group_size=50))
    found: dict[tuple[int, int], list] = {}
    for number, group in enumerate(source.groups()):
        rows = read_rows(group, ["impression_id"])
        for shard, ids in write_hashes(str(folder / f"ids-{number}"), group, rows, shards):
            found.setdefault((0, shard), []).append(ids)
    check = CheckIds([source.form], str(folder / "staging"))
    met = [told for element in found.items() for told in check.process(element)]
    refused = [str(error) for error in worker_notes.refused(str(folder / "staging"))]
    if not refused:
        assert {number for number, _ in met} == {DS.toordinal()}
        assert sum(one.compared_ids for _, one in met) == source.rows
    return refused


KINDS = {"int": pa.array(np.arange(120)), "text": pa.array([f"imp-{n}" for n in range(120)])}


@pytest.mark.parametrize("kind", KINDS)
def test_an_id_is_found_twice_wherever_it_stands(tmp_path: Path, kind: str) -> None:
    ids = KINDS[kind]
    assert check_ids(tmp_path / "each once", [ids.slice(0, 70), ids.slice(70)]) == []
    for at in (70, 119, 0):  # in the same file, in another one, in the same row group
        other = pa.concat_arrays([ids.slice(70), ids.slice(at, 1)])
        (told,) = check_ids(tmp_path / str(at), [ids.slice(0, 70), other])
        assert repr(ids[at].as_py()) in told
        assert "several impressions of one day" in told


def test_ids_that_share_a_hash_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashing, "hash_ids", lambda ids, seed=0: np.zeros(len(ids), np.uint64))
    ids = KINDS["text"]
    assert check_ids(tmp_path / "each once", [ids.slice(0, 70), ids.slice(70)]) == []
    (told,) = check_ids(tmp_path / "twice", [ids, ids.slice(7, 1)])
    assert "'imp-7'" in told


def test_only_row_groups_with_a_shared_hash_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, real, read = KINDS["text"], hashing.hash_ids, []

    def hash_ids(ids: pa.ChunkedArray, seed: int = 0) -> np.ndarray:
        return real(pc.replace_substring_regex(ids, "^imp-60$", "imp-0"), seed)

    def reading(group: inputs.RowGroup, wanted: list[str]) -> pa.Table:
        read.append((Path(group.path).name, group.index))
        return read_rows(group, wanted)

    monkeypatch.setattr(hashing, "hash_ids", hash_ids)
    monkeypatch.setattr(day_checks, "read_rows", reading)
    assert check_ids(tmp_path, [ids.slice(0, 20), ids.slice(20)]) == []
    assert sorted(read) == [("0.parquet", 0), ("1.parquet", 0)]  # of 0, and of 60; not of 70 on


def test_only_what_may_be_equal_is_held_and_the_first_found_ends_the_search() -> None:
    columns = [pa.chunked_array([["a", "b"]]), pa.chunked_array([["c", "a"]])]
    twice = hashing.hash_ids(pa.array(["a", "c"]))

    def read() -> Any:
        yield from columns
        pytest.fail("another row group was read")

    assert find_repeated(read(), twice) == "a"
    assert find_repeated(columns[:1], twice) is None
