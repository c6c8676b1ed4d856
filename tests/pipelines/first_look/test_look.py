"""`courier init` finds in columns and rows what the night would refuse."""

import dataclasses
import datetime as dt
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from feature_jobs.codebooks.codebook import CodebookInfo
from feature_jobs.store.documents import write_json
from feature_jobs.store.encoder_info import EncoderInfo, write_encoder_info
from pipelines import config
from pipelines.cli import main
from pipelines.first_look import look
from tests.support.first_look import (
    DAYS,
    ITEMS,
    UTC,
    Shop,
    impressions,
    noted,
    only_problem,
    problems,
    write,
)

Capture = pytest.CaptureFixture[str]

# ---- Columns -------------------------------------------------------------------------------


def test_columns_of_other_names_are_guessed_noted_and_written(shop: Shop) -> None:
    shop.catalogue = {
        "IID": shop.catalogue["item_id"],
        "img_url": shop.catalogue["image_uri"],
        "cate_id": pa.array([7] * ITEMS),  # fits no category, so that the next name is taken
        "category_name": shop.catalogue["category"],
        "Item_Name": pa.array([f"a thing, number {i}" for i in range(ITEMS)]),
    }
    shop.write()
    for ds in DAYS:
        columns = impressions(ds)
        renamed = dict(zip(("uid", "nid", "ts", "is_click"), columns.values(), strict=True))
        write(shop.folder / f"impressions/dt={ds}/part-0.parquet", renamed)
    first = shop.look()
    assert problems(first) == []
    assert noted(first, "item_id is taken from 'IID'", "category is taken from 'category_name'")
    settings = shop.settings(first)
    assert settings.catalogue.columns == config.CatalogueColumns(
        item_id="IID", image_uri="img_url", category="category_name", title="Item_Name"
    )
    assert settings.impressions.columns == config.ImpressionColumns(
        user_id="uid", item_id="nid", event_time="ts", clicked="is_click"
    )


def test_a_missing_column_is_a_problem_that_names_those_that_are_there(shop: Shop) -> None:
    shop.impressions = {"clicked": None, "purchased": pa.array([False] * 120)}
    found = only_problem(shop.write().look())
    assert "lacks the column 'clicked'" in found
    assert "user_id, item_id, event_time, purchased" in found


def test_two_columns_of_one_name_are_a_problem(shop: Shop) -> None:
    path = next(shop.write().folder.glob(f"impressions/*{DAYS[-1]}*/*.parquet"))
    rows = pq.read_table(path, partitioning=None)
    pq.write_table(rows.append_column("item_id", rows["item_id"]), path)
    assert "has 2 columns called 'item_id'" in only_problem(shop.look())


@pytest.mark.parametrize(
    ("table", "column", "values"),
    [
        ("catalogue", "item_id", [float(i) for i in range(ITEMS)]),
        ("catalogue", "category", [1] * ITEMS),
        ("impressions", "user_id", [0.5] * 120),
        ("impressions", "event_time", [1767780000] * 120),
        ("impressions", "clicked", ["yes"] * 120),
        ("impressions", "history", ["1 2 3"] * 120),
    ],
)
def test_a_wrong_type_is_a_problem(shop: Shop, table: str, column: str, values: list[Any]) -> None:
    getattr(shop, table)[column] = pa.array(values)
    found = only_problem(shop.write().look())
    assert f"column '{column}' of the {table} table has type" in found
    assert "Cast it" in found


def test_several_faults_are_told_at_once(shop: Shop) -> None:
    shop.catalogue["category"] = pa.array([1] * ITEMS)
    shop.impressions = {"user_id": pa.array([0.5] * 120), "clicked": None, "zone": None}
    found = problems(shop.write().look())
    for words in ("'category' of the", "'user_id' of the", "lacks the column 'clicked'"):
        assert any(words in text for text in found), words
    assert any("without a time zone" in text for text in found)
    assert len(found) == 4


def test_a_history_of_other_ids_is_a_problem(shop: Shop) -> None:
    shop.impressions = {"history": pa.array([["a", "b"]] * 120)}
    assert "string inside the lists of 'history'" in only_problem(shop.write().look())


def test_ids_of_two_types_are_a_problem_that_names_the_cast(shop: Shop) -> None:
    shop.catalogue["item_id"] = shop.catalogue["item_id"].cast(pa.string())
    found = only_problem(shop.write().look())
    assert "item_id is string in the catalogue" in found
    assert "int64 in the impressions" in found
    assert "CAST(item_id AS BIGINT)" in found


def test_ids_of_two_types_in_one_partition_are_a_problem(shop: Shop) -> None:
    shop.write()
    columns = impressions(DAYS[-1])
    write(
        shop.folder / f"impressions/dt={DAYS[-1]}/part-1.parquet",
        columns | {"user_id": columns["user_id"].cast(pa.string())},
    )
    found = only_problem(shop.look())
    assert "'user_id' of the impressions table is int64 in" in found
    assert "but string in" in found


def test_times_without_a_zone_need_an_input_timezone(shop: Shop) -> None:
    shop.impressions = {"zone": None}
    found = only_problem(shop.write().look())
    assert "'event_time' of the impressions table holds times without a time zone" in found
    assert "Set input_timezone" in found


def test_an_optional_column_is_guessed_too(shop: Shop) -> None:
    shop.impressions = {"click_ts": pa.array([None] * 120, UTC)}
    first = shop.write().look()
    assert problems(first) == []
    assert not noted(first, "no click_time")
    assert shop.settings(first).impressions.columns.click_time == "click_ts"


def test_without_a_click_time_the_date_of_clicks_is_noted(shop: Shop) -> None:
    assert noted(shop.write().look(), "no click_time", "event_time + click_delay_seconds")


# ---- Rows ----------------------------------------------------------------------------------


def test_items_that_come_twice_are_a_problem(shop: Shop) -> None:
    shop.catalogue["item_id"] = pa.array([0, 0, *range(2, ITEMS)])
    found = problems(shop.write().look())
    assert any("holds 1 items twice or more, for example item_id 0" in text for text in found)


def test_a_large_catalogue_is_not_read_as_a_whole(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(look, "_CATALOGUE_ROWS", ITEMS - 1)
    shop.catalogue["item_id"] = pa.array([0, 0, *range(2, ITEMS)])
    first = shop.write().look()
    assert problems(first) == []
    assert noted(first, "100 items", "the first night does")


def test_nulls_in_required_columns_are_a_problem(shop: Shop) -> None:
    users = [None, *range(119)]
    shop.impressions = {"user_id": pa.array(users, pa.int64())}
    assert "'user_id' of the impressions table is null in 1 rows" in only_problem(
        shop.write().look()
    )


def test_clicks_other_than_0_and_1_are_a_problem(shop: Shop) -> None:
    shop.impressions = {"clicked": pa.array([i % 4 for i in range(120)])}
    assert "must be 0 or 1" in only_problem(shop.write().look())


def test_a_log_without_a_click_is_a_problem(shop: Shop) -> None:
    shop.impressions = {"clicked": pa.array([0] * 120)}
    assert "Without clicks all histories are empty" in only_problem(shop.write().look())


@pytest.mark.parametrize("table", ["catalogue", "impressions"])
def test_a_newest_day_without_a_row_is_a_problem(shop: Shop, table: str) -> None:
    shop.write()
    path = shop.folder / f"{table}/dt={DAYS[-1]}/part-0.parquet"
    pq.write_table(pq.ParquetFile(path).read().slice(0, 0), path)
    assert f"{table}: ds {DAYS[-1]} has files but no row" in only_problem(shop.look())


@pytest.mark.parametrize(("strange", "is_problem"), [(3, False), (30, True)])
def test_unknown_items_are_a_problem_where_the_gate_would_refuse(
    shop: Shop, strange: int, is_problem: bool
) -> None:
    items = [5000 + i if i < strange else 1 for i in range(120)]
    shop.impressions = {"item_id": pa.array(items)}
    first = shop.write().look()
    assert (len(problems(first)) == 1) is is_problem
    share = f"{strange / 120:.1%} of those looked at show an item that the catalogue lacks"
    assert any(share in f.text and "5000, 5001, 5002" in f.text for f in first.findings)


@pytest.mark.parametrize(("hour", "span"), [(-8, "-8.0 to +15.8"), (5, "+5.0 to +28.8")])
def test_days_of_another_zone_are_a_problem(shop: Shop, hour: int, span: str) -> None:
    shop.impressions = {"hour": hour}
    found = only_problem(shop.write().look())
    assert f"lie {span} hours from the day's start in UTC" in found
    assert "set day_timezone or input_timezone" in found


@pytest.mark.parametrize(("hours", "level"), [(-30, "note"), (30, "problem")])
def test_events_before_their_day_are_late_and_after_it_a_problem(
    shop: Shop, hours: int, level: str
) -> None:
    times = impressions(DAYS[-1])["event_time"].to_pylist()
    times[0] = dt.datetime(2026, 1, 7, tzinfo=dt.UTC) + dt.timedelta(hours=hours)
    shop.write()
    day = impressions(DAYS[-1], event_time=pa.array(times, UTC))
    write(shop.folder / f"impressions/dt={DAYS[-1]}/part-0.parquet", day)
    found = [f for f in shop.look().findings if "0.8% of those looked at outside the day" in f.text]
    assert [finding.level for finding in found] == [level]


# ---- Looking again -------------------------------------------------------------------------


def init(shop: Shop) -> str:
    path = shop.folder / "courier.toml"
    assert shop.settings(shop.look()).root
    return str(path)


def test_settings_without_a_fault_are_looked_at_again(shop: Shop, capsys: Capture) -> None:
    path = init(shop.write())
    before = sorted(shop.folder.rglob("*"))
    assert main(["init", f"--check={path}"]) == 0
    assert "problem" not in (out := capsys.readouterr().out)
    for told in (
        "3 day(s) from",
        "100 items, each once",
        "lie in that day of UTC",
        "all 64 sampled",
    ):
        assert told in out
    assert sorted(shop.folder.rglob("*")) == before


def test_the_settings_here_are_those_to_check(
    shop: Shop, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    init(shop.write())
    monkeypatch.chdir(shop.folder)
    assert main(["init", "--check"]) == 0
    monkeypatch.chdir(shop.folder.parent)
    assert main(["init", "--check"]) == 2
    assert "no settings at courier.toml" in capsys.readouterr().err


CHANGED = {
    "a column": ("[embed]", "[embed]", "lacks the column 'user_id'"),
    "a named column": ("# title =", 'title = "name" #', "lacks the column 'name'"),
    "images": ('image_roots = ["images"]', 'image_roots = ["catalogue"]', "64 missing"),
    "the time zone": ('"UTC"', '"Asia/Tokyo"', "from the day's start in Asia/Tokyo"),
    "a carried column": ("# carry = []", 'carry = ["price"]', "lacks the column 'price'"),
    "rewrite": ("# rewrite = []", 'rewrite = [["", "x"]]', ""),
}


@pytest.mark.parametrize("what", CHANGED)
def test_a_problem_of_settings_that_exist_ends_with_1(
    shop: Shop, capsys: Capture, what: str
) -> None:
    path = init(shop.write())
    old, new, told = CHANGED[what]
    if what == "a column":
        shop.impressions = {"user_id": None}
        shop.write()
    text = Path(path).read_text()
    assert old in text
    Path(path).write_text(text.replace(old, new, 1))
    assert main(["init", "--check", path]) == (1 if told else 2)
    seen = capsys.readouterr()
    assert told in seen.out
    assert ("problem above would stop" in seen.err) == bool(told)
    assert "Traceback" not in seen.err


def check_pins(shop: Shop, *pins: tuple[str, str | None]) -> list[str]:
    """Returns what is wrong with pins of encoder and codebook folders, from one day each."""
    toml = shop.write().look().toml
    for day, (encoder, codebook) in enumerate(pins, start=1):
        toml += f'[[pins]]\nfrom_ds = "2026-01-0{day}"\nencoder = "{encoder}"\n'
        toml += f'codebook = "{codebook}"\n' if codebook else ""
    settings = shop.settings(look.FirstLook((), toml))
    return problems(look.FirstLook(look.look_again(settings, str(shop.folder)), ""))


def pin_packages(shop: Shop, *names: str) -> None:
    """Writes encoder packages e-NAME, and a codebook c-NAME of each."""
    for name in names:
        info = EncoderInfo(f"e-{name}", "swin_t", {}, None, None, None, "random")
        write_encoder_info(str(shop.folder / f"e-{name}"), info)
        codebook = {field.name: None for field in dataclasses.fields(CodebookInfo)}
        codebook |= {"encoder_id": f"e-{name}", "resolutions": [], "ancestors": []}
        del codebook["dimension"]  # as of one of 256
        write_json(str(shop.folder / f"c-{name}/codebook.json"), codebook)


def test_pins_that_make_nights_are_no_problem(shop: Shop) -> None:
    pin_packages(shop, "a", "b")
    assert check_pins(shop, ("e-a", None), ("e-a", "c-a"), ("e-b", "c-b")) == []


def test_a_half_pin_is_a_problem(shop: Shop) -> None:
    pin_packages(shop, "a", "b")
    (found,) = check_pins(shop, ("e-a", "c-a"), ("e-b", None))
    assert found.startswith("The pin from 2026-01-02 names the encoder")
    assert "`courier embed --encoder" in found


def test_a_pinned_folder_that_is_no_package_is_a_problem(shop: Shop) -> None:
    encoder, codebook = check_pins(shop, ("images", "catalogue"), ("images", "catalogue"))
    assert f"'{shop.folder}/images' is no encoder package" in encoder
    assert f"'{shop.folder}/catalogue' is no codebook package" in codebook


def test_a_pinned_encoder_that_is_no_package_is_told_once(shop: Shop) -> None:
    pin_packages(shop, "a")
    (found,) = check_pins(shop, ("images", "c-a"))
    assert "is no encoder package" in found


def test_a_pin_of_two_encoders_is_a_problem(shop: Shop) -> None:
    pin_packages(shop, "a", "b")
    (found,) = check_pins(shop, ("e-a", "c-b"))
    assert "mixes two encoders" in found


def test_what_settings_allow_is_no_problem(shop: Shop) -> None:
    shop.impressions = {"zone": None, "item_id": pa.array([5000] * 60 + [1] * 60)}
    first = shop.write(["2026-01-05", "2026-01-07"]).look()
    assert len(problems(first)) == 2
    text = first.toml.replace('# input_timezone = "UTC"', 'input_timezone = "UTC"')
    text = text.replace("# unknown_items = {warn = 0.02, fail = 0.05}", "unknown_items.fail = 0.5")
    text = text.replace('# closed_days = ["2025-12-25"]', 'closed_days = ["2026-01-06"]')
    settings = shop.settings(look.FirstLook((), text))
    again = look.FirstLook(look.look_again(settings, str(shop.folder)), "")
    assert problems(again) == []
    assert not noted(again, "missing between them")
    assert not noted(again, "by its name")


@pytest.mark.parametrize("missing", ["catalogue", "impressions"])
def test_tables_of_settings_that_are_not_there_are_told(
    shop: Shop, capsys: Capture, missing: str
) -> None:
    path = init(shop.write())
    (shop.folder / missing).rename(shop.folder / "away")
    assert main(["init", "--check", path]) == 2
    assert f"where the {missing} table was expected" in capsys.readouterr().err


def test_init_needs_tables_or_settings_to_check(shop: Shop, capsys: Capture) -> None:
    path = init(shop.write())
    assert main(["init", "--check", path, "--images", str(shop.folder)]) == 2
    assert "give no paths with it" in capsys.readouterr().err
    assert main(["init", "--impressions", str(shop.folder)]) == 2
    assert "Give --catalogue and --impressions" in capsys.readouterr().err
