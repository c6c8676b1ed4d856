"""The first look finds what the night would refuse; where it finds nothing, its settings load."""

import datetime as dt
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from feature_jobs.schemas import DataContractError, OperatorError
from pipelines import config, init
from pipelines.init import FirstLook, look, refuse_existing, write_settings

DAYS = ("2026-01-05", "2026-01-06", "2026-01-07")
ITEMS = 100
SECRET_USER = 987654321
UTC = pa.timestamp("us", tz="UTC")


def catalogue(**changed: Any) -> dict[str, Any]:
    """Columns of a catalogue without a fault; None takes a column away."""
    columns = {
        "item_id": pa.array(range(ITEMS)),
        "image_uri": pa.array([f"{i}.png" for i in range(ITEMS)]),
        "category": pa.array([("hat", "shoe")[i % 2] for i in range(ITEMS)]),
    } | changed
    return {name: column for name, column in columns.items() if column is not None}


def impressions(
    ds: str, hour: float = 0, zone: str | None = "UTC", **changed: Any
) -> dict[str, Any]:
    """Columns of a day of impressions without a fault, its 24 hours beginning at `hour`."""
    midnight = dt.datetime.fromisoformat(ds) + dt.timedelta(hours=hour)
    times = [midnight + dt.timedelta(minutes=12 * i) for i in range(120)]
    columns = {
        "user_id": pa.array([SECRET_USER + i % 7 for i in range(120)]),
        "item_id": pa.array([i % ITEMS for i in range(120)]),
        "event_time": pa.array(times, pa.timestamp("us")).cast(pa.timestamp("us", tz=zone)),
        "clicked": pa.array([i % 5 == 0 for i in range(120)]),
    } | changed
    return {name: column for name, column in columns.items() if column is not None}


def write(path: Path, columns: Mapping[str, Any], **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(dict(columns)), path, **options)


@dataclass
class Shop:
    """A shop on disk: a catalogue and impressions of three days, and an image per item."""

    folder: Path
    catalogue: dict[str, Any] = field(default_factory=catalogue)
    impressions: dict[str, Any] = field(default_factory=dict)  # changed columns
    catalogue_path: str = "catalogue/dt={ds}/*.parquet"
    impressions_path: str = "impressions/dt={ds}/*.parquet"

    def write(self, days: Sequence[str] = DAYS) -> "Shop":
        for ds in days:
            write(self.folder / f"catalogue/dt={ds}/part-0.parquet", self.catalogue)
            events = impressions(ds, **self.impressions)
            # Several row groups, so that the look has some to choose from.
            write(self.folder / f"impressions/dt={ds}/part-0.parquet", events, row_group_size=50)
        return self

    def look(self, *roots: str) -> FirstLook:
        folder = str(self.folder)
        return look(
            f"{folder}/{self.catalogue_path}", f"{folder}/{self.impressions_path}", roots, folder
        )

    def settings(self, first: FirstLook) -> config.Settings:
        path = self.folder / "courier.toml"
        write_settings(str(path), first.toml)
        return config.load_settings(str(path))


def draw(folder: Path, items: int = ITEMS) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(items):
        Image.new("RGB", (8, 8), (i, 2 * i, 100)).save(folder / f"{i}.png")


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    draw(tmp_path / "images")
    return Shop(tmp_path)


def problems(first: FirstLook) -> list[str]:
    """Checks what holds for every finding besides: one paragraph, and no user ID."""
    for finding in first.findings:
        assert "\n" not in finding.text
        assert not re.search(rf"{SECRET_USER // 10}\d", finding.text)
    return [finding.text for finding in first.findings if finding.level == "problem"]


def only_problem(first: FirstLook) -> str:
    found = problems(first)
    assert len(found) == 1, found
    return found[0]


def noted(first: FirstLook, *words: str) -> bool:
    texts = [finding.text for finding in first.findings if finding.level == "note"]
    return any(all(word in text for word in words) for text in texts)


# ---- The settings --------------------------------------------------------------------------


def test_settings_of_a_shop_without_a_fault_are_those_that_were_meant(shop: Shop) -> None:
    first = shop.write().look()
    assert problems(first) == []
    folder = str(shop.folder)
    assert shop.settings(first) == config.Settings(
        root=f"{folder}/features",
        catalogue=config.Catalogue(
            path=f"{folder}/catalogue/dt={{ds}}/*.parquet", image_roots=(f"{folder}/images",)
        ),
        impressions=config.Impressions(path=f"{folder}/impressions/dt={{ds}}/*.parquet"),
    )


def test_a_setting_that_is_commented_out_shows_its_default(shop: Shop) -> None:
    first = shop.write().look()
    as_written = shop.settings(first)
    head, tail = first.toml.split("[beam]")
    assert head.count("\n# ") > 30
    switched_on = re.sub(r"^# (?!input_timezone)(\w+ = )", r"\1", head, flags=re.MULTILINE)
    assert switched_on.count(" = ") == head.count(" = ")
    path = shop.folder / "switched-on.toml"
    write_settings(str(path), f"{switched_on}[beam]{tail}")
    assert config.load_settings(str(path)) == as_written


def test_every_setting_is_in_the_file_in_the_order_of_the_settings_class(shop: Shop) -> None:
    toml = shop.write().look().toml
    places = []
    for name, about in config.Settings.model_fields.items():
        section = getattr(about.annotation, "model_fields", {})
        for key in [k for k in section if k != "columns"]:
            assert re.search(rf"^(# )?{key} = ", toml, re.MULTILINE), key
        places.append(re.search(rf"^(# )?(\[+{name}\]|{name} =)", toml, re.MULTILINE).start())
    assert places == sorted(places)


def test_next_commands_fit_on_a_day_before_the_night_they_make(shop: Shop) -> None:
    toml = shop.write().look().toml
    commands = re.findall(r"^# {3}(courier .*)$", toml, re.MULTILINE)
    assert commands == [
        "courier init-encoder --weights imagenet >> courier.toml",
        "courier embed --ds 2026-01-06",
        "courier fit-codebook --ds 2026-01-06 --clusters 5 >> courier.toml",
        "courier refresh --ds 2026-01-07",
    ]


def test_pins_can_be_appended_to_the_file(shop: Shop) -> None:
    first = shop.write().look()
    pin = '[[pins]]\nfrom_ds = "2026-01-07"\nencoder = "encoders/a"\n'
    settings = shop.settings(FirstLook(first.findings, first.toml + pin))
    assert [str(p.from_ds) for p in settings.pins] == ["2026-01-07"]


def test_paths_are_relative_to_a_near_folder_and_absolute_from_a_far_one(shop: Shop) -> None:
    shop.write()
    tables = (f"{shop.folder}/catalogue", f"{shop.folder}/impressions")
    far = shop.folder.joinpath("a", "b", "c", "d")
    near = look(*tables, [], str(shop.folder / "conf")).toml
    assert 'path = "../catalogue/dt={ds}/*.parquet"' in near
    assert 'image_roots = ["../images"]' in near
    assert (
        f'path = "{shop.folder}/catalogue/dt={{ds}}/*.parquet"' in look(*tables, [], str(far)).toml
    )


def test_names_with_quotes_and_umlauts_survive_in_the_settings(tmp_path: Path) -> None:
    odd = tmp_path / 'Möbel "neu" \\'
    draw(odd / "images")
    shop = Shop(odd).write()
    assert shop.settings(shop.look()).catalogue.image_roots == (str(odd / "images"),)


def test_existing_settings_are_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "courier.toml"
    refuse_existing(str(path))
    write_settings(str(path), "first")
    for again in (lambda: refuse_existing(str(path)), lambda: write_settings(str(path), "second")):
        with pytest.raises(OperatorError, match="exists already"):
            again()
    assert path.read_text() == "first"


# ---- Where tables lie ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "template"),
    [
        ("impressions", "impressions/dt={ds}/*.parquet"),
        ("impressions/", "impressions/dt={ds}/*.parquet"),
        ("impressions/dt=2026-01-06", "impressions/dt={ds}/*.parquet"),
        ("impressions/dt=2026-01-06/part-0.parquet", "impressions/dt={ds}/part-0.parquet"),
        ("impressions/dt=*", "impressions/dt={ds}/*.parquet"),
        ("impressions/dt=*/part-*.parquet", "impressions/dt={ds}/part-*.parquet"),
        ("impressions/dt=2026-01-06/part*.parquet", "impressions/dt={ds}/part*.parquet"),
        ("impressions/dt={ds}", "impressions/dt={ds}"),
    ],
)
def test_a_path_as_people_type_it_becomes_a_template(shop: Shop, typed: str, template: str) -> None:
    shop.impressions_path = typed
    first = shop.write().look()
    assert problems(first) == []
    assert f'path = "{template}"' in first.toml
    assert any("3 day(s) from 2026-01-05 to 2026-01-07" in f.text for f in first.findings)


@pytest.mark.parametrize(
    ("name", "template"),
    [
        ("{ds}/a.parquet", "log/{ds}/*.parquet"),
        ("date={ds}/hour=03/a.parquet", "log/date={ds}/**/*.parquet"),
        ("log-{ds}.parquet", "log/log-{ds}.parquet"),
        ("log-{ds}-part3.parquet", "log/log-{ds}*.parquet"),
    ],
)
def test_a_folder_becomes_a_template_whichever_part_of_its_paths_has_the_day(
    shop: Shop, name: str, template: str
) -> None:
    shop.write()
    for ds in DAYS:
        write(shop.folder / "log" / name.replace("{ds}", ds), impressions(ds))
    shop.impressions_path = "log"
    first = shop.look()
    assert problems(first) == []
    assert f'path = "{template}"' in first.toml


def test_a_typed_file_keeps_its_name_beside_other_tables(shop: Shop) -> None:
    for ds in DAYS:
        write(shop.folder / f"{ds}/catalogue.parquet", shop.catalogue)
        write(shop.folder / f"{ds}/impressions.parquet", impressions(ds))
    shop.catalogue_path = f"{DAYS[0]}/catalogue.parquet"
    shop.impressions_path = f"{DAYS[0]}/impressions.parquet"
    first = shop.look()
    assert problems(first) == []
    assert 'path = "{ds}/catalogue.parquet"' in first.toml


def test_missing_days_are_named_and_days_marked_as_empty_are_not(shop: Shop) -> None:
    shop.write(["2026-01-01", "2026-01-03", "2026-01-05"])
    empty = shop.folder / "impressions/dt=2026-01-02/_SUCCESS"
    empty.parent.mkdir()
    empty.touch()
    first = shop.look()
    assert problems(first) == []
    assert noted(first, "impressions", "missing between them: 1 (2026-01-04)")
    assert noted(first, "catalogue", "missing between them: 2 (2026-01-02, 2026-01-04)")


def test_one_snapshot_of_the_catalogue_is_allowed_and_noted(shop: Shop) -> None:
    shop.write()
    write(shop.folder / "items.parquet", shop.catalogue)
    shop.catalogue_path = "items.parquet"
    first = shop.look()
    assert problems(first) == []
    assert noted(first, "one snapshot", "items.parquet")
    assert shop.settings(first).catalogue.path == str(shop.folder / "items.parquet")


def test_impressions_without_a_day_are_a_problem_and_their_settings_do_not_load(shop: Shop) -> None:
    shop.write()
    write(shop.folder / "log.parquet", impressions(DAYS[0]))
    shop.impressions_path = "log.parquet"
    first = shop.look()
    assert "One partition per day is expected" in only_problem(first)
    with pytest.raises(OperatorError, match=r"'impressions\.path' is missing"):
        shop.settings(first)


def test_days_in_another_spelling_are_a_problem(shop: Shop) -> None:
    shop.write()
    write(shop.folder / "log/dt=20260106/a.parquet", impressions("2026-01-06"))
    shop.impressions_path = "log"
    assert "no day YYYY-MM-DD in the path log" in only_problem(shop.look())
    shop.impressions_path = "log/dt={ds}"
    with pytest.raises(OperatorError, match="stands for the day as YYYY-MM-DD"):
        shop.look()


def test_no_day_with_both_tables_is_a_problem(shop: Shop) -> None:
    shop.write()
    write(shop.folder / "log/dt=2025-12-31/a.parquet", impressions("2025-12-31"))
    shop.impressions_path = "log"
    assert "No day has both" in only_problem(shop.look())


def test_the_newest_day_of_both_tables_is_looked_at(shop: Shop) -> None:
    shop.write()
    write(
        shop.folder / "impressions/dt=2026-01-08/a.parquet", impressions("2026-01-08", clicked=None)
    )
    first = shop.look()
    assert problems(first) == []
    assert any("rows of ds 2026-01-07" in f.text for f in first.findings)


def test_a_file_without_a_day_does_not_hide_the_days_of_the_others(shop: Shop) -> None:
    shop.write()
    write(shop.folder / "impressions/latest/part-0.parquet", impressions(DAYS[0]))
    shop.impressions_path = "impressions"
    first = shop.look()
    assert problems(first) == []
    assert 'path = "impressions/dt={ds}/*.parquet"' in first.toml


@pytest.mark.parametrize("path", ["nowhere", "nowhere/dt={ds}/*.parquet", "images", "items.csv"])
def test_a_path_without_a_parquet_file_is_refused(shop: Shop, path: str) -> None:
    shop.write()
    (shop.folder / "items.csv").write_text("item_id\n1\n")
    shop.catalogue_path = path
    with pytest.raises(OperatorError, match=r"no Parquet file .* at .*, where the catalogue"):
        shop.look()


def test_remote_paths_and_missing_image_folders_are_refused(shop: Shop) -> None:
    shop.write()
    log = f"{shop.folder}/impressions"
    with pytest.raises(OperatorError, match="remote store"):
        look("gs://shop/catalogue", log, [], str(shop.folder))
    with pytest.raises(OperatorError, match="remote store"):
        shop.look("gs://shop/images")
    with pytest.raises(OperatorError, match="is no folder"):
        shop.look(str(shop.folder / "pictures"))


def test_a_damaged_file_is_refused_in_one_paragraph(shop: Shop) -> None:
    shop.write()
    (shop.folder / f"impressions/dt={DAYS[-1]}/part-1.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataContractError, match="cannot be read as Parquet") as refused:
        shop.look()
    assert "\n" not in str(refused.value)


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
    monkeypatch.setattr(init, "_CATALOGUE_ROWS", ITEMS - 1)
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


# ---- Images --------------------------------------------------------------------------------


def test_images_are_found_around_the_catalogue_and_read(shop: Shop) -> None:
    first = shop.write().look()
    assert noted(first, "images: read below images; give --images where that is wrong")
    assert any("all 64 sampled can be read and decoded" in f.text for f in first.findings)


def test_relative_images_that_lie_nowhere_near_are_a_problem(tmp_path: Path) -> None:
    far = tmp_path / "far"
    draw(far)
    shop = Shop(tmp_path / "a/shop").write()
    first = shop.look()
    assert "are below none of the folders around the catalogue" in only_problem(first)
    assert "image_roots = []  # REQUIRED" in first.toml
    with pytest.raises(OperatorError, match="image_roots"):
        shop.settings(first)
    assert problems(shop.look(str(far))) == []


def test_images_may_lie_in_a_parent_of_the_catalogue(tmp_path: Path) -> None:
    draw(tmp_path)
    first = Shop(tmp_path).write().look()
    assert problems(first) == []
    assert 'image_roots = ["."]' in first.toml


def test_the_whole_file_system_is_never_guessed() -> None:
    assert init._candidates("/shop") == ["/shop", "/shop/images", "/images"]


def test_image_folders_that_are_given_are_written_in_their_order(shop: Shop) -> None:
    (shop.folder / "more").mkdir()
    first = shop.write().look(str(shop.folder / "images"), str(shop.folder / "more"))
    assert problems(first) == []
    assert 'image_roots = ["images", "more"]' in first.toml


def test_absolute_images_lie_below_their_common_folder(tmp_path: Path) -> None:
    draw(tmp_path / "pictures/of/items")
    uris = [f"{tmp_path}/pictures/of/items/{i}.png" for i in range(ITEMS)]
    first = Shop(tmp_path, catalogue(image_uri=pa.array(uris))).write().look()
    assert problems(first) == []
    assert 'image_roots = ["pictures/of/items"]' in first.toml


def test_absolute_images_without_a_common_folder_need_to_be_told(shop: Shop) -> None:
    shop.catalogue["image_uri"] = pa.array([f"/{i}/a.png" for i in range(ITEMS)])
    assert "Give the folder that they are relative to" in only_problem(shop.write().look())


def test_remote_images_are_a_problem_told_without_their_signature(shop: Shop) -> None:
    uris = [f"https://cdn.example.com/{i}.jpg?sig=SECRET" for i in range(ITEMS)]
    shop.catalogue["image_uri"] = pa.array(uris)
    found = only_problem(shop.write().look())
    assert "64 of 64 sampled image_uri are addresses" in found
    assert "https://cdn.example.com/" in found
    assert "SECRET" not in found


def test_images_that_cannot_be_used_are_told_with_reason_and_example(shop: Shop) -> None:
    uris = [None, *shop.catalogue["image_uri"][1:60].to_pylist()]
    shop.catalogue = {name: column[:60] for name, column in shop.catalogue.items()}
    shop.catalogue["image_uri"] = pa.array(uris)
    for i in range(1, 60, 2):
        (shop.folder / f"images/{i}.png").write_bytes(b"<html>not found</html>")
    (shop.folder / "images/2.png").unlink()
    found = problems(shop.write().look(str(shop.folder / "images")))[-1]
    assert "28 of 60 sampled can be read and decoded; 1 unsupported uri (for example None)" in found
    assert "30 not an image (for example '1.png')" in found
    assert "1 missing (for example '2.png')" in found
    assert "raise max_reject_share" in found


def test_a_few_bad_images_are_noted_only(shop: Shop) -> None:
    for i in range(0, ITEMS, 50):
        (shop.folder / f"images/{i}.png").write_bytes(b"")
    first = shop.write().look()
    assert problems(first) == []
    assert noted(first, "empty (for example '", "listed as rejects")


def test_the_same_images_are_sampled_again(shop: Shop) -> None:
    shop.write()
    assert shop.look() == shop.look()
