"""Records of nights are told from what lies beside them, and `latest.json` names the newest."""

import datetime as dt
import json
from pathlib import Path
from typing import Any

import pytest

from feature_jobs.schemas import DataContractError
from feature_jobs.store import nights
from feature_jobs.store.documents import write_json
from pipelines import stages

DAY, NEXT = dt.date(2026, 3, 1), dt.date(2026, 3, 2)
TABLES = {"item_features": {"path": "x/item_features/ds=…", "version": "aa", "rows": 3}}
TIME = "2026-03-02T04:05:06.000007+00:00"
RECORD = {"ds": str(DAY), "feature_set": "x", "published_at": TIME, "tables": TABLES, "gates": []}


def test_days_are_those_of_records_and_of_nothing_that_lies_beside_them(tmp_path: Path) -> None:
    root = str(tmp_path)
    assert nights.recorded_days(root, "x") == []
    for ds in (NEXT, DAY):
        write_json(nights.record_path(root, "x", ds), RECORD)
    write_json(nights.latest_path(root, "x"), RECORD)
    for name in ("ds=2026-02-30.json", "ds=2026-03-03", "note.txt", ".tmp-1-ds=2026-03-04.json"):
        (tmp_path / "x/_nights" / name).touch()
    assert nights.recorded_days(root, "x") == [DAY, NEXT]
    (tmp_path / "_versions").mkdir()
    (tmp_path / "y/item_features").mkdir(parents=True)  # has published no night
    assert nights.feature_sets(root) == ["x"]


def test_latest_says_of_a_record_what_readers_need_and_which_one_it_is_of() -> None:
    latest = nights.latest_of(RECORD)
    assert latest.items() >= {k: v for k, v in RECORD.items() if k != "gates"}.items()
    assert nights.stands(latest, RECORD)
    assert not nights.stands(None, RECORD)
    assert not nights.stands(latest, RECORD | {"rolled_back": "t"})  # the same versions
    assert nights.stands(nights.latest_of(RECORD | {"ds": str(NEXT)}), RECORD)
    assert not nights.stands(latest, RECORD | {"ds": str(NEXT)})


def test_a_record_of_an_earlier_version_has_no_time() -> None:
    old = {name: value for name, value in RECORD.items() if name != "published_at"}
    assert nights.parse_record("r", json.dumps(old).encode())["published_at"] is None


def test_tables_of_a_night_are_those_that_its_stages_make() -> None:
    made = {table.name for kind in stages.NIGHT for table in kind.tables}
    assert set(nights.NIGHT_TABLES) == made


@pytest.mark.parametrize(
    "told",
    [
        None, [], "x", RECORD | {"ds": 3}, RECORD | {"ds": "2026-02-30"},
        RECORD | {"feature_set": None}, RECORD | {"tables": None}, RECORD | {"tables": {"t": 1}},
        RECORD | {"tables": {"t": {"version": "aa"}}},
        RECORD | {"tables": {"t": {"path": 3, "version": "aa", "rows": 3}}},
        RECORD | {"tables": {"t": {"path": "x", "version": None, "rows": 3}}},
        RECORD | {"published_at": "yesterday"}, RECORD | {"published_at": 3},
        RECORD | {"published_at": "2026-03-02T04:05:06"},  # of which clock?
        RECORD | {"pruned": None}, RECORD | {"pruned": {"t": 3}},
    ],
)  # fmt: skip
def test_what_is_no_record_is_told_with_its_path(told: Any) -> None:
    with pytest.raises(DataContractError, match=r"^/r/ds=1\.json should say of a night its ds, "):
        nights.parse_record("/r/ds=1.json", json.dumps(told).encode())
