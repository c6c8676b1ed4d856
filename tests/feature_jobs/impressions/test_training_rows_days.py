"""Days that are made together have the bytes of days made one by one, and what the loop makes.

The steps of the job are those of the pipeline, called one after the other without Beam: a run of
Beam costs a second.
"""

import datetime as dt
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from apache_beam.pvalue import TaggedOutput
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_jobs import inputs
from feature_jobs.impressions import training_rows as steps
from feature_jobs.impressions.clicks import HistoryLaw
from feature_jobs.impressions.histories import DAY_US
from feature_jobs.impressions.training_rows import (
    TrainingRowsDay,
    TrainingRowsJob,
    catalogue_windows,
    check_days,
    define_training_rows,
    find_runs,
)
from feature_jobs.inputs import IMPRESSION_COLUMNS, Source
from feature_jobs.schemas import ROW_CLICKS, TIMESTAMP, TRAINING_ROWS
from feature_jobs.store import partitions, worker_notes
from pipelines.running.beam_options import pipeline_options, run_pipeline
from tests.support import oracles
from tests.support.stale_disk import hide_receipts_now_and_then

FIRST = dt.date(2026, 3, 1)
START = (FIRST - dt.date(1970, 1, 1)).days * DAY_US
TICK, TICKS = DAY_US // 24, 24
WINDOW, LAG, DELAY, GAP, BACK = 2 * DAY_US, TICK, TICK, 2 * TICK, 4
LAW = HistoryLaw(ROW_CLICKS, WINDOW, DELAY, LAG)
CATEGORIES = ("dress", "shirt")
# Days by number; the log begins before the job does, and has no day 5.
LOGGED, MISSING, EMPTY, JOB = range(10), 5, 6, (2, 3, 4, 6, 7, 8, 9)
SHARDS = {2: 1, 3: 2, 4: 4, 6: 1, 7: 4, 8: 2, 9: 2}
IDS = {"int": pa.int64(), "string": pa.string()}
Row = dict[str, Any]


def ds(number: int) -> dt.date:
    return FIRST + dt.timedelta(days=number)


def end_of(number: int) -> int:
    return START + (number + 1) * DAY_US


# ---- Random shops ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shop:
    """Holds the rows of each day's log, its kind of request IDs, and the catalogue of each day.

    IDs of users and items are of the types `ids`. A day looks at no day with IDs of another type.
    """

    ids: dict[int, str]
    rows: dict[int, list[Row]]
    requests: dict[int, str]
    catalogues: dict[int, list[tuple[Any, str | None]]]
    log: dict[int, Source]
    tables: dict[int, Source]

    def known(self, number: int) -> list[int]:
        """Returns the days that one day may look at, newest first."""
        back = range(number, number - BACK - 1, -1)
        return [n for n in back if n in self.rows and self.ids[n] == self.ids[number]]

    def schema(self, number: int) -> pa.Schema:
        kind = IDS.get(self.requests[number], pa.string())
        ids = IDS[self.ids[number]]
        return TRAINING_ROWS.schema(ids, ids, request_id=kind)


def draw_shop(folder: Path, seed: int, ids: str, snapshot: bool = False) -> Shop:
    """Draws a shop: late rows, clicks after their day, requests with and without an ID.

    Items change their category, or leave the catalogue for days; one of them stands there twice.
    With `ids` "both" all IDs change their type when the job is half done.
    """
    kind_of = {n: ("int" if n < EMPTY else "string") if ids == "both" else ids for n in LOGGED}
    rng = np.random.default_rng(seed)
    rows: dict[int, list[Row]] = {}
    requests, catalogues = {}, {}
    for number in LOGGED:
        if number == MISSING:
            continue
        requests[number] = ["int", "string", "absent"][rng.integers(0, 3)]
        mine = kind_of[number]
        rows[number] = [_draw_row(rng, number, mine, requests[number]) for _ in range(60)]
        if number == EMPTY:
            rows[number], requests[number] = [], "absent"
        items = [n for n in range(12) if rng.random() < 0.7] + [3]
        kinds = [*CATEGORIES, "boat", None]
        catalogues[number] = [(_id(mine, "i", n), kinds[rng.integers(0, 4)]) for n in items]
    if snapshot:
        catalogues = {max(rows): catalogues[max(rows)]}
    log = {n: _write_log(folder, n, found, kind_of[n], requests[n]) for n, found in rows.items()}
    tables = {n: _write_catalogue(folder, n, found, kind_of[n]) for n, found in catalogues.items()}
    return Shop(kind_of, rows, requests, catalogues, log, tables)


def _id(ids: str, prefix: str, number: int) -> Any:
    return f"{prefix}{number}" if ids == "string" else number


def _draw_row(rng: np.random.Generator, number: int, ids: str, requests: str) -> Row:
    late = int(rng.choice([0, 0, 0, 0, 0, 0, 0, 1, 2, 12]))
    event = START + (number - late) * DAY_US + int(rng.integers(0, TICKS)) * TICK
    after = int(rng.choice([0, 1, 2, 5, 30, 24 * 60]))  # ticks; the last is no true time
    request = None
    if requests != "absent" and rng.random() < 0.7:
        request = int(rng.integers(0, 4)) if requests == "int" else f"r{rng.integers(0, 4)}"
    return {
        "user": _id(ids, "u", int(rng.integers(0, 8))),
        "item": _id(ids, "i", int(rng.integers(0, 14))),  # some are in no catalogue
        "event_time": event,
        "clicked": bool(rng.random() < 0.4),
        "click_time": event + after * TICK if rng.random() < 0.7 else None,
        "request": request,
    }


def _write_log(folder: Path, number: int, rows: list[Row], ids: str, requests: str) -> Source:
    kind = IDS[ids]
    columns = {
        "user_id": pa.array([row["user"] for row in rows], kind),
        "item_id": pa.array([row["item"] for row in rows], kind),
        "event_time": pa.array([row["event_time"] for row in rows], TIMESTAMP),
        "clicked": pa.array([row["clicked"] for row in rows], pa.bool_()),
        "click_time": pa.array([row["click_time"] for row in rows], TIMESTAMP),
    }
    if requests != "absent":
        columns["request_id"] = pa.array([row["request"] for row in rows], IDS[requests])
    _write(folder / "log" / str(ds(number)), pa.table(columns) if rows else None)
    names = {name: name for name in (*IMPRESSION_COLUMNS, "click_time", "request_id")}
    return inputs.open_source("impressions", str(folder / "log" / "{ds}"), ds(number), names)


def _write_catalogue(folder: Path, number: int, rows: list[tuple], ids: str) -> Source:
    columns = {
        "item_id": pa.array([row[0] for row in rows], IDS[ids]),
        "image_uri": pa.array(["x"] * len(rows)),
        "category": pa.array([row[1] for row in rows], pa.string()),
    }
    _write(folder / "catalogue" / str(ds(number)), pa.table(columns))
    names = {name: name for name in columns}
    return inputs.open_source("catalogue", str(folder / "catalogue" / "{ds}"), ds(number), names)


def _write(folder: Path, rows: pa.Table | None) -> None:
    """Writes two files, one of them of two row groups; or an empty day."""
    folder.mkdir(parents=True)
    (folder / "_SUCCESS").touch()
    if rows is not None:
        for number, part in enumerate((rows[:20], rows[20:])):
            pq.write_table(part, folder / f"{number}.parquet", row_group_size=30)


# ---- The job, by hand --------------------------------------------------------------------------


def job_of(shop: Shop, numbers: Sequence[int], out: Path, scoped: bool) -> TrainingRowsJob:
    days = tuple(
        TrainingRowsDay(
            ds(n), end_of(n), SHARDS[n], shop.schema(n), tuple(map(ds, shop.known(n))),
            tuple(ds(d) for d in shop.known(n) if d in shop.tables) if scoped else (),
            str(out / str(n)),
        )
        for n in numbers
    )  # fmt: skip
    return TrainingRowsJob(LAW, GAP, "UTC", CATEGORIES if scoped else None, days, str(out / "job"))


def sources_of(shop: Shop, numbers: Sequence[int]) -> tuple[list[Source], list[Source]]:
    """Returns the log and the catalogues that days need."""
    needed = sorted({n for number in numbers for n in shop.known(number)})
    tables = shop.tables if len(shop.tables) == 1 else [n for n in needed if n in shop.tables]
    return [shop.log[n] for n in needed], [shop.tables[n] for n in tables]


def by_key(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, list[Any]]:
    found: dict[Any, list[Any]] = {}
    for key, value in pairs:
        found.setdefault(key, []).append(value)
    return found


def run(job: TrainingRowsJob, log: Sequence[Source], catalogues: Sequence[Source]) -> None:
    """Runs the pipeline of `define_training_rows` by hand."""
    job = replace(job, done=job.find_done())
    read = steps.ReadLog(job)
    found = [pair for source in log for g in source.groups() for pair in read.process(g)]
    rows = by_key(pair for pair in found if not isinstance(pair, TaggedOutput))
    parts: list[tuple[Any, Any]] = []
    if job.categories is not None:
        list_items = steps.ReadCatalogue(job)
        items = by_key(p for s in catalogues for g in s.groups() for p in list_items.process(g))
        keep = steps.KeepInScope(job, catalogue_windows(job.days, catalogues))
        kept = [
            found
            for key in {**rows, **items}
            for found in keep.process(
                (key, {"log": rows.get(key, []), "catalogues": items.get(key, [])})
            )
        ]
        parts += [found.value for found in kept if isinstance(found, TaggedOutput)]
        rows = by_key(found for found in kept if not isinstance(found, TaggedOutput))
    make, write = steps.MakeTrainingRows(job), steps.WriteTrainingRows(job)
    parts += [part for element in rows.items() for part in make.process(element)]
    parts += [((n, k), b"") for n, day in enumerate(job.days) for k in range(day.shards)]
    for element in by_key(parts).items():
        list(write.process(element))
    assert worker_notes.refused(job.staging) == []


def make(shop: Shop, groups: Sequence[Sequence[int]], out: Path, scoped: bool) -> None:
    """Makes training rows, in one job for each group of days."""
    for numbers in groups:
        run(job_of(shop, numbers, out, scoped), *sources_of(shop, numbers))


def files_below(out: Path) -> dict[str, bytes]:
    """Returns the bytes of all parts, and receipts but for the pieces, which go by the job."""
    paths = [path for path in out.glob("*/training_rows/**/*") if path.is_file()]
    found = {str(path.relative_to(out)): path.read_bytes() for path in paths}
    return {
        path: json.dumps(json.loads(data) | {"made_from": None}).encode()
        if path.endswith(".json")
        else data
        for path, data in found.items()
    }


def counts_of(out: Path, number: int) -> dict[str, int]:
    return partitions.sum_counts(partitions.receipts(str(out / str(number) / "training_rows")))


# ---- The loop ----------------------------------------------------------------------------------


def in_scope(shop: Shop, number: int, scoped: bool) -> set[Any]:
    """Returns the items in scope on a day: as the newest catalogue till then says that has them."""
    if not scoped:
        return {row["item"] for rows in shop.rows.values() for row in rows}
    found: dict[Any, bool] = {}
    for n in shop.known(number) if len(shop.catalogues) > 1 else shop.catalogues:
        listed = shop.catalogues[n]
        for item in {item for item, _ in listed} - found.keys():
            found[item] = any(i == item and kind in CATEGORIES for i, kind in listed)
    return {item for item, inside in found.items() if inside}


def expected_rows(shop: Shop, number: int, scoped: bool) -> list[tuple]:
    scope = in_scope(shop, number, scoped)
    clicks = [
        click
        for n in shop.known(number)
        for click in oracles.clicks_of(shop.rows[n], DELAY)
        if click[1] in scope and click[2] < end_of(n) + WINDOW
    ]
    rows = [row for row in shop.rows[number] if row["item"] in scope]
    name_of = int if shop.requests[number] == "int" else str
    return oracles.training_rows(rows, clicks, end_of(number), GAP, WINDOW, DELAY, name_of, LAG)


def made_rows(out: Path, number: int) -> list[tuple]:
    paths = sorted((out / str(number) / "training_rows").glob("*.parquet"))
    rows = pa.concat_tables(pq.read_table(path) for path in paths)
    at = rows.column_names.index("event_time")
    rows = rows.set_column(at, "event_time", rows["event_time"].cast(pa.int64()))
    return sorted((tuple(row.values()) for row in rows.to_pylist()), key=lambda row: row[:3])


# ---- Days made together --------------------------------------------------------------------------


@pytest.mark.parametrize("scoped", [True, False])
@pytest.mark.parametrize(("seed", "ids"), [(1, "int"), (2, "both")])
def test_days_made_together_have_the_bytes_of_days_made_one_by_one_and_what_the_loop_makes(
    tmp_path: Path, seed: int, ids: str, scoped: bool
) -> None:
    shop = draw_shop(tmp_path, seed, ids)
    make(shop, [[number] for number in JOB], tmp_path / "alone", scoped)
    make(shop, [JOB[:3], JOB[3:]], tmp_path / "halves", scoped)
    make(shop, [JOB], tmp_path / "together", scoped)
    expected = files_below(tmp_path / "alone")
    assert len(expected) == 2 * sum(SHARDS.values())
    assert files_below(tmp_path / "halves") == expected
    assert files_below(tmp_path / "together") == expected

    out = tmp_path / "together"
    made = {number: made_rows(out, number) for number in JOB}
    for number, rows in made.items():
        assert rows == expected_rows(shop, number, scoped)
        counts = counts_of(out, number)
        shown = counts["impressions"] + counts["out_of_scope_impressions"]
        assert shown == len(shop.rows[number])
        assert counts["requests"] == len({row[:2] for row in rows})
        assert counts["rows_with_history"] == sum(bool(row[6]) for row in rows)
    assert made[EMPTY] == []
    lengths = {len(row[6]) for rows in made.values() for row in rows}
    assert lengths >= {0, 1, 2, 3 if scoped else ROW_CLICKS}
    assert sum(counts_of(out, number)["clicks_after_the_day"] for number in JOB) > 0
    scopes = {number: in_scope(shop, number, scoped) for number in JOB}
    assert (len({frozenset(scope) for scope in scopes.values()}) > 3) == scoped
    warned = worker_notes.warnings(str(out / "job"))
    assert any("dated more than window_days" in message for message in warned)


def test_one_snapshot_of_the_catalogue_tells_the_categories_of_all_days(tmp_path: Path) -> None:
    shop = draw_shop(tmp_path, 7, "int", snapshot=True)
    make(shop, [JOB], tmp_path / "out", scoped=True)
    for number in JOB:
        assert made_rows(tmp_path / "out", number) == expected_rows(shop, number, scoped=True)
    assert made_rows(tmp_path / "out", JOB[0])


def through_beam(job: TrainingRowsJob, log: list[Source], catalogues: list[Source]) -> None:
    needed = catalogues if job.categories else []
    options = pipeline_options({}, "training-rows", [])
    run_pipeline(lambda root: define_training_rows(root, log, needed, job), options)


def test_through_beam_it_is_what_it_is_by_hand(tmp_path: Path) -> None:
    shop = draw_shop(tmp_path, 1, "int")
    for scoped in (True, False):
        out = tmp_path / str(scoped)
        make(shop, [JOB], out / "by hand", scoped)
        through_beam(job_of(shop, JOB, out / "beam", scoped), *sources_of(shop, JOB))
        assert files_below(out / "beam") == files_below(out / "by hand")


def test_each_row_group_is_read_once_however_many_days_know_its_clicks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop, read, real = draw_shop(tmp_path, 1, "int"), [], steps.read_rows
    monkeypatch.setattr(steps, "read_rows", lambda g, wanted: read.append(g) or real(g, wanted))
    make(shop, [JOB], tmp_path / "out", scoped=False)
    log, _ = sources_of(shop, JOB)
    assert sorted((g.path, g.index) for g in read) == sorted(
        (g.path, g.index) for source in log for g in source.groups()
    )


def test_a_job_that_died_goes_on_with_the_parts_that_lack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = draw_shop(tmp_path, 1, "int")
    make(shop, [JOB], tmp_path / "out", scoped=True)
    whole = files_below(tmp_path / "out")
    receipts = tmp_path / "out" / "7" / "training_rows" / "receipts"
    (receipts / f"{partitions.part_name(2, SHARDS[7])}.json").unlink()
    written, real = [], partitions.write_part
    monkeypatch.setattr(
        partitions, "write_part", lambda *a, **k: written.append(a[0]) or real(*a, **k)
    )
    make(shop, [JOB], tmp_path / "out", scoped=True)
    assert files_below(tmp_path / "out") == whole
    assert written == [str(tmp_path / "out" / "7" / "training_rows")]


def test_workers_that_are_shown_old_names_write_no_part_without_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = draw_shop(tmp_path, 1, "int")
    make(shop, [JOB], tmp_path / "out", scoped=True)
    whole = files_below(tmp_path / "out")
    receipts = tmp_path / "out" / "7" / "training_rows" / "receipts"
    (receipts / f"{partitions.part_name(2, SHARDS[7])}.json").unlink()
    hide_receipts_now_and_then(monkeypatch)
    make(shop, [JOB], tmp_path / "out", scoped=True)
    monkeypatch.undo()
    assert files_below(tmp_path / "out") == whole


# ---- The scope -----------------------------------------------------------------------------------

listing = st.dictionaries(st.integers(0, 3), st.booleans())
windows = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=8)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.integers(0, 8), listing, max_size=9), windows)
def test_runs_are_the_days_on_which_the_newest_catalogue_of_the_window_has_the_item_in_scope(
    listed: dict[int, dict[int, bool]], drawn: list[tuple[int, int]]
) -> None:
    days = list(zip(sorted(map(min, drawn)), sorted(map(max, drawn)), strict=True))
    catalogues = [
        (number, pa.table({"item_id": pa.array(list(found), pa.int64()),
                           "in_scope": pa.array(list(found.values()), pa.bool_())}))
        for number, found in sorted(listed.items())
    ]  # fmt: skip
    runs = find_runs(catalogues, days, pa.int64())
    told = {
        (item, place)
        for at, item in enumerate(runs.items.to_pylist())
        for run in range(runs.starts[at], runs.starts[at + 1])
        for place in range(runs.first[run], runs.last[run] + 1)
    }

    def says(item: int, oldest: int, newest: int) -> bool:
        having = [n for n in listed if oldest <= n <= newest and item in listed[n]]
        return bool(having) and listed[max(having)][item]

    expected = {
        (item, place)
        for item in range(4)
        for place, (oldest, newest) in enumerate(days)
        if says(item, oldest, newest)
    }
    assert told == expected
    assert (np.diff(runs.starts) >= 0).all()


def test_a_log_that_is_not_what_the_days_need_is_refused(tmp_path: Path) -> None:
    shop = draw_shop(tmp_path, 1, "int")
    job = job_of(shop, [2, 3], tmp_path, scoped=False)
    log, _ = sources_of(shop, [2, 3])
    check_days(job.days, log)
    no_log_of_its_own = (job.days[0], replace(job.days[1], log=job.days[0].log))
    for days, logs in (
        (job.days, log[1:]), (job.days, [*log, log[0]]), (job.days, [*log, shop.log[4]]),
        (job.days[::-1], log), (no_log_of_its_own, log[:-1]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="need the logs of"):
            check_days(days, logs)


def test_a_day_without_a_catalogue_in_between_is_refused(tmp_path: Path) -> None:
    shop = draw_shop(tmp_path, 1, "int")
    job = job_of(shop, [2, 3], tmp_path, scoped=True)
    _, catalogues = sources_of(shop, [2, 3])
    assert catalogue_windows(job.days, catalogues) == [
        (ds(0).toordinal(), ds(number).toordinal()) for number in (2, 3)
    ]
    lacks = replace(job.days[1], catalogues=(ds(3), ds(1)))
    with pytest.raises(ValueError, match=r"2026-03-04 .* gaps"):
        catalogue_windows([lacks], catalogues)
