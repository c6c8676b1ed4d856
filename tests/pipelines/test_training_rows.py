"""`courier training-rows` makes what the loop makes, also repeated or killed, or refuses to.

The world has no pin: training rows come before any encoder.
"""

import datetime as dt
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from feature_jobs import inputs
from feature_jobs.store import files
from tests.support import oracles
from tests.support.commands import (
    Capture,
    Killed,
    courier,
    die_at_write,
    paragraph,
    published,
    rewrite,
    status,
)
from tests.support.world import (
    DAY_US,
    DAYS,
    LEAVES_ON_DAY_2,
    NEW_ON_DAY_2,
    World,
    catalogue_items,
    category,
    draw_impressions,
)

GAP_SECONDS = 1800  # the grid of the world's times: one step is no gap, two are
WINDOW_DAYS = 2
EVERY_DAY = ("--start-ds", str(DAYS[0]), "--end-ds", str(DAYS[-1]))
LAST_DAY = ("--ds", str(DAYS[-1]))


@pytest.fixture
def shop(tmp_path: Path) -> World:
    return World(tmp_path / "shop", rows_per_shard=40, extra_settings=training())


def training(*categories: str) -> str:
    names = f"categories = {json.dumps(categories)}\n" if categories else ""
    return f"[training]\n{names}request_gap_seconds = {GAP_SECONDS}"


def make(world: World, *args: str) -> int:
    return courier(world, "training-rows", *args)


def made(world: World, day: dt.date) -> list[tuple[Any, ...]]:
    """Returns the rows of a day as they lie, times in microseconds."""
    rows = world.table("training_rows", day)
    times = rows["event_time"].cast(pa.int64())
    rows = rows.set_column(rows.column_names.index("event_time"), "event_time", times)
    return [tuple(row.values()) for row in rows.to_pylist()]


def manifest(world: World, day: dt.date) -> dict[str, Any]:
    path = world.root / "shared" / "training_rows" / f"ds={day}" / "_manifest.json"
    return json.loads(path.read_text())


# ---- What is made ------------------------------------------------------------------------------


def request_of(user: Any, event_us: int) -> int | None:
    """Returns an impression's request: half a day is one; the third user's have none."""
    return None if str(user).endswith("3") else event_us // (DAY_US // 2)


def add_requests(world: World, kind: pa.DataType) -> None:
    def add(rows: pa.Table) -> pa.Table:
        times = rows["event_time"].cast(pa.int64()).to_pylist()
        pairs = zip(rows["user_id"].to_pylist(), times, strict=True)
        ids = pa.array([request_of(*pair) for pair in pairs], pa.int64())
        return rows.append_column("request_id", ids.cast(kind))

    for day in DAYS:
        rewrite(world, day, add)


def expected(world: World, day: dt.date, requests: str, scope: set[Any]) -> list[tuple[Any, ...]]:
    """Returns what the loop makes of the impressions up to `day`, of items in `scope`."""

    def prepared(number: int) -> list[dict[str, Any]]:
        rows = [
            {**row, "user": world.user(row["user"]), "item": world.item(row["item"])}
            for row in draw_impressions(DAYS[number], seed=number)
        ]
        return [{**row, "request": request(row)} for row in rows if row["item"] in scope]

    def request(row: dict[str, Any]) -> Any:
        found = None if requests == "absent" else request_of(row["user"], row["event_time"])
        return str(found) if requests == "string" and found is not None else found

    number = DAYS.index(day)
    clicks = oracles.clicks_of(row for n in range(number + 1) for row in prepared(n))
    end = int(dt.datetime.combine(day, dt.time(), dt.UTC).timestamp()) * 1_000_000 + DAY_US
    name_of = int if requests == "int" else str
    return oracles.training_rows(
        prepared(number), clicks, end, GAP_SECONDS * 1_000_000, WINDOW_DAYS * DAY_US, 0, name_of
    )


def scope_of(world: World, day: dt.date, categories: tuple[str, ...]) -> set[Any]:
    """Returns the items of `categories` in all catalogues up to `day`.

    Everything is in scope where there are no categories.
    """
    if not categories:
        return {world.item(number) for number in range(100)}
    listed = {number for other in DAYS if other <= day for number in catalogue_items(other)}
    return {world.item(number) for number in listed if category(number) in categories}


@pytest.mark.parametrize(
    ("ids", "requests", "categories"),
    [
        ("int", "absent", ()),
        ("int", "int", ("shirt",)),
        ("string", "string", ("dress", "shirt")),
    ],
)
def test_training_rows_of_every_day_equal_the_loop_over_requests(
    tmp_path: Path, ids: str, requests: str, categories: tuple[str, ...]
) -> None:
    shop = World(tmp_path / "shop", ids, 40, training(*categories))
    if requests != "absent":
        add_requests(shop, pa.string() if requests == "string" else pa.int64())
    assert make(shop, *EVERY_DAY) == 0
    rows = {day: made(shop, day) for day in DAYS}
    counts = {day: manifest(shop, day)["counts"] for day in DAYS}
    for day, found in rows.items():
        assert sorted(found) == expected(shop, day, requests, scope_of(shop, day, categories))
        assert counts[day]["impressions"] + counts[day]["out_of_scope_impressions"] == 152
        assert (counts[day]["out_of_scope_impressions"] > 0) == bool(categories)
        assert counts[day]["clicks"] == sum(sum(row[5]) for row in found)
    everything = [row for found in rows.values() for row in found]
    assert len(manifest(shop, DAYS[3])["files"]) == 4
    assert sum(c["clicks_after_the_day"] for c in counts.values())
    assert {len(row[6]) for row in everything} >= {0, 4}
    assert any(row[2] for row in everything) == (requests != "absent" and len(categories) != 1)
    assert any(set(row[5]) == {True, False} for row in everything)
    # An item that left the catalogue keeps its category; one that is yet to come has none.
    assert shop.item(LEAVES_ON_DAY_2) in {item for row in rows[DAYS[3]] for item in row[4]}
    new = shop.item(NEW_ON_DAY_2) in {item for row in rows[DAYS[0]] for item in row[4]}
    assert new == (not categories)


def test_rows_are_sorted_by_user_request_and_chunk_within_each_file(shop: World) -> None:
    add_requests(shop, pa.string())
    shop.rows_per_shard = 1000
    assert make(shop, *LAST_DAY) == 0
    assert len(manifest(shop, DAYS[3])["files"]) == 1
    keys = [row[:3] for row in made(shop, DAYS[3])]
    assert len(set(keys)) == len(keys) > 10
    assert keys == sorted(keys)


def test_the_manifest_tells_the_scope_and_the_law(shop: World) -> None:
    shop.extra_settings = training("shirt", "dress")
    assert make(shop, *LAST_DAY) == 0
    found = manifest(shop, DAYS[3])
    assert found["settings"] == {
        "categories": ["dress", "shirt"],
        "click_delay_seconds": 0.0,
        "day_timezone": "UTC",
        "history_lag_seconds": 0.0,
        "request_gap_seconds": GAP_SECONDS,
        "window_days": WINDOW_DAYS,
    }
    assert found["notes"] == {
        "days_without_log": ["2026-02-28", "2026-02-27", "2026-02-26"],
        "one_snapshot_for_all_days": False,
    }
    shop.extra_settings = training()
    assert make(shop, *LAST_DAY) == 0
    assert manifest(shop, DAYS[3])["settings"]["categories"] is None
    assert manifest(shop, DAYS[3])["inputs"]["catalogues"] == []


def test_an_empty_day_publishes_an_empty_table(shop: World) -> None:
    for categories in ((), ("dress",)):
        shop.extra_settings = training(*categories)
        for table in ("catalogue", "impressions"):
            shop.write(table, DAYS[3], [], rows_to_group=1)
        assert make(shop, *LAST_DAY) == 0
        assert made(shop, DAYS[3]) == []


def test_the_first_day_of_all_may_be_empty(shop: World) -> None:
    shop.write("impressions", DAYS[0], [], rows_to_group=1)
    assert make(shop, "--ds", str(DAYS[0])) == 0
    assert made(shop, DAYS[0]) == []


# ---- Repeated and killed -----------------------------------------------------------------------


def test_the_same_days_again_do_nothing_and_a_dry_run_writes_nothing(
    shop: World, capsys: Capture
) -> None:
    assert make(shop, *EVERY_DAY, "--dry-run") == 0
    assert capsys.readouterr().out.count("compute") == len(DAYS)
    assert not shop.root.exists()
    assert make(shop, *EVERY_DAY) == 0
    before = published(shop)
    capsys.readouterr()
    assert make(shop, *EVERY_DAY) == 0
    assert capsys.readouterr().err.count("nothing to do") == len(DAYS)
    assert published(shop) == before
    assert make(shop, *LAST_DAY, "--dry-run", "--json") == 0
    (stage,) = json.loads(capsys.readouterr().out)["stages"]
    assert stage["action"] == "leave alone: published from the same inputs"
    assert status(shop, capsys)[1].endswith(f"{DAYS[0]} to {DAYS[-1]} training rows")


@pytest.mark.parametrize("share", [0.2, 0.8])
def test_a_run_that_died_at_any_write_ends_as_if_it_had_not(shop: World, share: float) -> None:
    shop.extra_settings = training("shirt")
    with pytest.MonkeyPatch.context() as patch:
        writes = die_at_write(patch, None)
        assert make(shop, *LAST_DAY) == 0
    uninterrupted = published(shop)
    files.delete_tree(str(shop.root))
    with pytest.MonkeyPatch.context() as patch:
        die_at_write(patch, int(len(writes) * share))
        with pytest.raises(Killed):
            make(shop, *LAST_DAY)
    assert published(shop) != uninterrupted
    assert make(shop, *LAST_DAY) == 0
    assert published(shop) == uninterrupted


# ---- Refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ([], "Give one day as --ds"),
        (["--ds", "2026-03-01", "--start-ds", "2026-03-01"], "Give one day as --ds"),
        (["--ds", "2026-03-01", *EVERY_DAY], "Give one day as --ds"),
        (["--end-ds", "2026-03-01"], "Give one day as --ds"),
        (["--start-ds", "2026-03-02", "--end-ds", "2026-03-01"], "comes after --end-ds 2026-03-01"),
        (["--ds", "2026-03-01", "--", "--num_worker=3"], "Did you mean --num_workers"),
    ],
)
def test_wrong_usage_exits_2_before_anything_is_made(
    shop: World, capsys: Capture, args: list[str], told: str
) -> None:
    assert make(shop, *args) == 2
    assert told in capsys.readouterr().err
    assert not shop.root.exists()


def test_an_unknown_category_exits_2_and_names_the_nearest(shop: World, capsys: Capture) -> None:
    for unknown, hint in (("shirts", "did you mean 'shirt'?"), ("boat", "cable, dress, shirt")):
        shop.extra_settings = training("dress", unknown)
        assert make(shop, *LAST_DAY) == 2
        told = paragraph(capsys)
        assert repr(unknown) in told
        assert hint in told
    assert not shop.root.exists()


def test_a_day_that_is_not_there_exits_4_before_any_is_made(shop: World, capsys: Capture) -> None:
    tomorrow = DAYS[3] + dt.timedelta(days=1)
    assert make(shop, "--start-ds", str(DAYS[2]), "--end-ds", str(tomorrow)) == 4
    told = paragraph(capsys)
    assert f"no partition for ds {tomorrow}" in told
    assert f'closed_days = ["{tomorrow}"]' in told
    assert not shop.root.exists()


def test_a_day_on_which_the_shop_was_closed_is_that_of_an_empty_folder(shop: World) -> None:
    shop.write("impressions", DAYS[1], [], rows_to_group=1)
    assert make(shop, *EVERY_DAY) == 0
    marked = published(shop)
    files.delete_tree(str(shop.root))
    files.delete_tree(str(shop.folder / "impressions" / f"ds={DAYS[1]}"))
    assert make(shop, *EVERY_DAY) == 4
    shop.extra_settings = f'closed_days = ["{DAYS[1]}"]\n{training()}'
    assert make(shop, *EVERY_DAY) == 0
    assert published(shop) == marked
    assert str(DAYS[1]) not in manifest(shop, DAYS[3])["notes"]["days_without_log"]


def test_each_partition_is_opened_once_however_many_days_read_it(
    shop: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop.extra_settings = training("dress")
    opened, read = [], inputs.read_footer
    monkeypatch.setattr(inputs, "read_footer", lambda path: opened.append(path) or read(path))
    assert make(shop, *EVERY_DAY, "--dry-run") == 0
    assert len(opened) == len(set(opened)) == len(DAYS) * (3 + 2)


def test_categories_need_the_catalogue_and_everything_does_not(
    shop: World, capsys: Capture
) -> None:
    files.delete_tree(str(shop.folder / "catalogue"))
    assert make(shop, *LAST_DAY) == 0
    shop.extra_settings = training("shirt")
    assert make(shop, *LAST_DAY) == 4
    assert "The catalogue table has no partition for ds 2026-03-04" in paragraph(capsys)


def test_an_event_after_its_day_is_refused(shop: World, capsys: Capture) -> None:
    rows = draw_impressions(DAYS[3], seed=0)
    rows[5] = {**rows[5], "event_time": rows[5]["event_time"] + 3 * DAY_US}
    shop.write_impressions(DAYS[3], rows)
    assert make(shop, *LAST_DAY) == 1
    assert "lie after their day" in paragraph(capsys)
    assert published(shop) == {}
