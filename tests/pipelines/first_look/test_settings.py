"""`courier init` finds where tables lie and writes settings; where it finds no fault, they load."""

import datetime as dt
import glob
import os
import re
from pathlib import Path
from typing import get_args

import pyarrow as pa
import pytest

from feature_jobs.schemas import DataContractError, OperatorError
from feature_jobs.store import day_names
from pipelines import config
from pipelines.first_look.look import FirstLook, look, look_again, refuse_existing, write_settings
from tests.support.buckets import upload
from tests.support.first_look import (
    DAYS,
    ITEMS,
    Shop,
    draw,
    impressions,
    noted,
    only_problem,
    problems,
    write,
)

# ---- The settings --------------------------------------------------------------------------


def test_settings_of_a_shop_without_a_fault_are_those_that_were_meant(shop: Shop) -> None:
    first = shop.write().look()
    assert problems(first) == []
    folder = str(shop.folder)
    meant = config.Settings(
        root=f"{folder}/features",
        catalogue=config.Catalogue(
            path=f"{folder}/catalogue/dt={{ds}}/*.parquet", image_roots=(f"{folder}/images",)
        ),
        impressions=config.Impressions(path=f"{folder}/impressions/dt={{ds}}/*.parquet"),
    )
    assert shop.settings(first).model_dump() == meant.model_dump()


def test_settings_of_a_shop_without_a_log_are_for_nights_of_items_alone(shop: Shop) -> None:
    folder = str(shop.write().folder)
    first = look(f"{folder}/{shop.catalogue_path}", None, (), folder)
    assert problems(first) == []
    assert noted(first, "no impressions", "cluster IDs")
    settings = shop.settings(first)
    assert settings.tables == "items"
    assert settings.impressions is None
    assert "problem" not in {finding.level for finding in look_again(settings, folder)}


def test_a_setting_that_is_commented_out_shows_its_default(shop: Shop) -> None:
    first = shop.write().look()
    as_written = shop.settings(first)
    head, tail = first.toml.split("[beam]")
    assert head.count("\n# ") > 30
    examples = "base|input_timezone|history_start_ds|closed_days|threads|user_root|on_published"
    examples += "|core_hour|gb_month"
    switched_on = re.sub(rf"^# (?!{examples})(\w+ = )", r"\1", head, flags=re.MULTILINE)
    assert switched_on.count(" = ") == head.count(" = ")
    path = shop.folder / "switched-on.toml"
    write_settings(str(path), f"{switched_on}[beam]{tail}")
    assert config.load_settings(str(path)) == as_written


def test_every_setting_is_in_the_file_in_the_order_of_the_settings_class(shop: Shop) -> None:
    toml = shop.write().look().toml
    places = []
    for name, about in config.Settings.model_fields.items():
        kinds = (about.annotation, *get_args(about.annotation))
        section = next((k.model_fields for k in kinds if hasattr(k, "model_fields")), {})
        section = {} if name == "pins" else section
        for key in [k for k in section if k != "columns"]:
            assert re.search(rf"^(# )?{key} = ", toml, re.MULTILINE), key
        places.append(re.search(rf"^(# )?(\[+{name}\]|{name} =)", toml, re.MULTILINE).start())
    assert places == sorted(places)


def test_next_commands_fit_on_a_day_before_the_night_they_make(shop: Shop) -> None:
    toml = shop.write().look().toml
    commands = re.findall(r"^# {3}(courier .*)$", toml, re.MULTILINE)
    assert commands == [
        "courier init-encoder --weights imagenet --ds 2026-01-05 >> courier.toml",
        "courier embed --ds 2026-01-06",
        "courier fit-codebook --ds 2026-01-06 --clusters 5 >> courier.toml",
        "courier refresh --ds 2026-01-07",
    ]


def test_of_two_days_none_is_left_to_centre_an_encoder_on(shop: Shop) -> None:
    toml = shop.write(DAYS[1:]).look().toml
    assert "#   courier init-encoder --weights imagenet >> courier.toml\n" in toml
    assert "#   courier embed --ds 2026-01-06\n" in toml


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
        ("dt={ds:%Y%m%d}/a.parquet", "log/dt={ds:%Y%m%d}/*.parquet"),
        ("{ds:%Y_%m_%d}/a.parquet", "log/{ds:%Y_%m_%d}/*.parquet"),
        ("log.{ds:%Y%m%d}.parquet", "log/log.{ds:%Y%m%d}.parquet"),
        ("{ds:%Y%m%d}_0103_xy", "log/{ds:%Y%m%d}*"),
        (
            "year={ds:%Y}/month={ds:%m}/day={ds:%d}/a.parquet",
            "log/year={ds:%Y}/month={ds:%m}/day={ds:%d}/*.parquet",
        ),
        ("y={ds:%Y}/m={ds:%-m}/d={ds:%-d}/a.pq", "log/y={ds:%Y}/m={ds:%-m}/d={ds:%-d}/*.pq"),
        (
            "{ds:%Y/%m/%d}/hour=3/20260301_0103_xy.parquet",
            "log/{ds:%Y}/{ds:%m}/{ds:%d}/**/*.parquet",
        ),
        ("{ds:%Y%m}/{ds:%d}/a.parquet", "log/{ds:%Y}{ds:%m}/{ds:%d}/*.parquet"),
        ("region=eu/dt={ds}/h=1/a.parquet", "log/*/dt={ds}/**/*.parquet"),
        ("dt={ds}/000000_0", "log/dt={ds}"),
        ("dt={ds}/h=1/000000_0", "log/dt={ds}/**/*"),
        ("{ds}.parquet/part-0.snappy.parquet", "log/{ds}.parquet/*.parquet"),
        ("dt={ds}/a-2020-01-01.parquet", "log/dt={ds}/*.parquet"),
    ],
)
def test_a_folder_becomes_a_template_whichever_part_of_its_paths_has_the_day(
    shop: Shop, name: str, template: str
) -> None:
    shop.write()
    for ds in DAYS:
        day = dt.date.fromisoformat(ds)
        write(shop.folder / "log" / day_names.name_of(name, day), impressions(ds))
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


def test_days_in_another_spelling_than_is_typed_are_refused(shop: Shop) -> None:
    shop.write()
    write(shop.folder / "log/dt=20260106/a.parquet", impressions("2026-01-06"))
    shop.impressions_path = "log/dt={ds}"
    with pytest.raises(OperatorError, match=re.escape("or {ds:%Y%m%d} for 20260106")):
        shop.look()
    shop.impressions_path = "log/dt={date}"
    with pytest.raises(OperatorError, match=re.escape("but has {date}")):
        shop.look()


@pytest.mark.parametrize("days", [("2026-09-05", "2026-11-25"), ("2026-10-05", "2026-11-25")])
@pytest.mark.parametrize("spelt", ["{ds:%Y}/{ds:%-m}/{ds:%-d}", "{ds:%Y}/{ds:%m}/{ds:%d}"])
def test_a_spelling_is_one_that_all_days_have(
    shop: Shop, days: tuple[str, str], spelt: str
) -> None:
    shop.write(days)
    for ds in days:
        day = dt.date.fromisoformat(ds)
        write(shop.folder / "log" / day_names.name_of(spelt, day) / "a.parquet", impressions(ds))
    shop.impressions_path = "log"
    first = shop.look()
    assert problems(first) == []
    assert any(f"2 day(s) from {days[0]} to {days[1]}" in f.text for f in first.findings)


@pytest.mark.parametrize(
    "endings", [("pq",), ("parq",), ("snappy.pq", "parquet"), ("parquet", "x.PQ")]
)
def test_files_of_other_endings_are_found(shop: Shop, endings: tuple[str, ...]) -> None:
    shop.write()
    for ds in DAYS:
        for number, ending in enumerate(endings):
            write(shop.folder / f"log/dt={ds}/{number}.{ending}", impressions(ds))
    shop.impressions_path = "log"
    first = shop.look()
    assert problems(first) == []
    one = f"*.{endings[0]}" if len(endings) == 1 else ""
    assert f'path = "{os.path.join("log/dt={ds}", one).rstrip("/")}"' in first.toml


def test_a_file_that_is_typed_may_have_any_ending(shop: Shop) -> None:
    shop.write()
    write(shop.folder / "items.dat", shop.catalogue)
    shop.catalogue_path = "items.dat"
    assert noted(shop.look(), "one snapshot", "items.dat")


@pytest.mark.parametrize("typed", ["", "{folder}/"])
@pytest.mark.parametrize("path", ["{}", "{}/dt={{ds}}", "{}/*/*.parquet"])
def test_a_folder_with_brackets_in_its_name_is_no_pattern(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: str, path: str
) -> None:
    folder = tmp_path / "shop [1] {a}"
    draw(folder / "images")
    shop = Shop(folder).write()
    monkeypatch.chdir(folder)
    tables = [typed.format(folder=folder) + path.format(t) for t in ("catalogue", "impressions")]
    first = look(*tables, [], str(folder))
    assert problems(first) == []
    settings = shop.settings(first)
    for template, name in (
        (settings.catalogue.path, "catalogue"), (settings.impressions.path, "impressions"),
    ):  # fmt: skip
        path = day_names.name_of(template, dt.date(2026, 1, 6))
        assert path.startswith(glob.escape(f"{folder}/{name}/dt=2026-01-06"))


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


def test_paths_of_other_stores_and_missing_image_folders_are_refused(shop: Shop) -> None:
    shop.write()
    log = f"{shop.folder}/impressions"
    with pytest.raises(OperatorError, match="remote store"):
        look("s3://shop/catalogue", log, [], str(shop.folder))
    with pytest.raises(OperatorError, match="remote store"):
        shop.look("https://shop/images")
    with pytest.raises(OperatorError, match="is no folder"):
        shop.look(str(shop.folder / "pictures"))


def test_a_shop_in_a_bucket_is_looked_at_like_one_on_a_disk(shop: Shop, bucket: str) -> None:
    upload(shop.write().folder, bucket)
    first = look(f"{bucket}/catalogue", f"{bucket}/impressions/", [], str(shop.folder))
    assert problems(first) == []
    settings = shop.settings(first)
    assert settings.catalogue.path == f"{bucket}/catalogue/dt={{ds}}/*.parquet"
    assert settings.impressions.path == f"{bucket}/impressions/dt={{ds}}/*.parquet"
    assert settings.catalogue.image_roots == (f"{bucket}/images",)
    with pytest.raises(OperatorError, match="is no folder"):
        look(f"{bucket}/catalogue", f"{bucket}/impressions", [f"{bucket}/none"], "/")


def test_images_in_a_bucket_are_looked_at(shop: Shop, bucket: str) -> None:
    shop.catalogue["image_uri"] = pa.array([f"{bucket}/images/{i}.png" for i in range(ITEMS)])
    upload(shop.write().folder / "images", f"{bucket}/images")
    first = shop.look()
    assert problems(first) == []
    assert 'image_roots = ["gs://shop"]' in first.toml


def test_a_damaged_file_is_refused_in_one_paragraph(shop: Shop) -> None:
    shop.write()
    (shop.folder / f"impressions/dt={DAYS[-1]}/part-1.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataContractError, match="cannot be read as Parquet") as refused:
        shop.look()
    assert "\n" not in str(refused.value)
