"""`courier train` takes or refuses days, options, items and images of the tiny world."""

import datetime as dt
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from courier_model.training.settings import TrainSettings
from feature_jobs.store import files
from feature_jobs.store.partitions import MANIFEST, SUCCESS
from pipelines.artefacts import training
from pipelines.config import load_settings
from tests.support.commands import Capture, paragraph
from tests.support.training_shop import (
    SECTION,
    D,
    at,
    copied_until_d,
    make_rows,
    rows_of,
    train,
)
from tests.support.world import (
    DAYS,
    LEAVES_ON_DAY_2,
    MISSING,
    NEW_ON_DAY_2,
    UNKNOWN,
    World,
    image_uri,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def shop(prepared: Path, tmp_path: Path) -> World:
    """Copies a shop whose days before D have training rows."""
    return copied_until_d(prepared, tmp_path)


# ---- Refused ---------------------------------------------------------------------------------


def test_without_training_rows_it_exits_4_and_says_how_to_make_them(
    shop: World, capsys: Capture
) -> None:
    for day in DAYS[1:3]:
        files.delete_tree(str(rows_of(shop, day)))
    assert train(shop) == 4
    assert "courier training-rows --start-ds 2026-03-02 --end-ds 2026-03-03" in paragraph(capsys)
    files.delete_tree(str(shop.root))
    assert train(shop) == 4
    told = paragraph(capsys)
    assert "--end-ds 2026-03-03" in told
    assert "courier training-rows --start-ds 2026-03-0" in told
    assert not (shop.folder / "training").exists()


def test_a_gap_is_refused_after_a_given_start_and_told_otherwise(
    shop: World, capsys: Capture
) -> None:
    files.delete_tree(str(rows_of(shop, DAYS[1])))
    assert train(shop, "--start-ds", str(DAYS[0])) == 4
    assert "courier training-rows --start-ds 2026-03-02" in paragraph(capsys)
    told: list[str] = []
    span = training.find_span(shop.settings(), None, D, 1, told.append)
    assert list(span.train) == [DAYS[0]]
    assert list(span.held_out) == [DAYS[2]]
    assert "no training_rows of 1 days: 2026-03-02" in told


def test_the_last_days_are_held_out_and_no_other(prepared: Path) -> None:
    settings = at(prepared).settings()
    span = training.find_span(settings, None, D, 2, lambda _: None)
    assert (list(span.train), list(span.held_out)) == ([DAYS[0]], list(DAYS[1:3]))
    span = training.find_span(settings, DAYS[1], D + dt.timedelta(days=1), 1, lambda _: None)
    assert (list(span.train), list(span.held_out)) == (list(DAYS[1:3]), [D])


def test_rows_of_other_categories_exit_2(shop: World, capsys: Capture) -> None:
    for categories in ("", 'categories = ["dress"]\n'):
        shop.extra_settings = f"[training]\n{categories}request_gap_seconds = 1800\n"
        assert train(shop) == 2
        told = paragraph(capsys)
        assert "['dress', 'shirt']" in told
        assert "courier training-rows --start-ds 2026-03-01 --end-ds 2026-03-03" in told
    shop.extra_settings = SECTION.replace("1800", "60")
    assert train(shop) == 2
    assert "'request_gap_seconds': 1800" in paragraph(capsys)
    assert not (shop.folder / "training").exists()


@pytest.mark.parametrize(
    "line",
    [
        "history_lag_seconds = 60.0",
        "window_days = 9",
        'day_timezone = "Asia/Tokyo"',
        "click_delay_seconds = 3.0",
    ],
)
def test_rows_of_days_made_otherwise_exit_2_naming_days_and_settings(
    shop: World, capsys: Capture, line: str
) -> None:
    name, _, value = line.partition(" = ")
    path = rows_of(shop, DAYS[1]) / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["settings"][name] = json.loads(value)
    path.write_text(json.dumps(manifest))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    (path.parent / SUCCESS).write_text(digest)
    assert train(shop) == 2
    told = paragraph(capsys)
    assert f"1 of 3 days, ds {DAYS[1]} the first and {DAYS[1]} the last" in told
    assert f"with {{{name!r}: {json.loads(value)!r}}}, where the settings have {{{name!r}: " in told
    assert f"courier training-rows --start-ds {DAYS[1]} --end-ds {DAYS[1]}" in told
    assert not (shop.folder / "training").exists()


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--objective", "couriers"], "the nearest is 'courier'"),
        (["--backbone", "shuflenet_v2_x0_5"], "nearest name is 'shufflenet_v2_x0_5'"),
        (["--weights", "imagnet"], "'imagnet'"),
        (["--weights", "nowhere.pth"], "nowhere.pth"),
        (["--name", "Tiny One"], "'Tiny One'"),
        (["--name", "../tiny"], "'../tiny'"),
        (["--batch-rows", "1"], "A batch of 1 rows"),
        (["--batch-rows", "100000"], "rows to take batches of 100,000 from"),
        (["--temperature", "0"], "The temperature is 0.0"),
        (["--objective", "clip"], "--text-model"),
        (["--checkpoint-attention"], "--no-checkpoint-attention"),
        (["--start-ds", str(D)], "--until"),
        (["--warmup-steps", "9999"], "--warmup-steps is 9,999"),
        (["--freeze-backbone", "9999"], "--freeze-backbone is 9,999"),
        (["--ema-decay", "nan"], "--ema-decay is nan"),
    ],
)
def test_wrong_options_exit_2_in_one_paragraph(
    args: list[str], told: str, prepared: Path, capsys: Capture
) -> None:
    world = at(prepared)
    assert train(world, *args) == 2
    assert told in paragraph(capsys)
    assert not list(world.folder.glob("training/*/checkpoints"))
    assert not (world.folder / "encoders").exists()


@pytest.mark.parametrize(
    "args",
    [
        ["--epochs", "0"], ["--held-out-days", "0"], ["--learning-rate", "0"], ["--preset", "big"],
        ["--warmup-steps", "-1"], ["--freeze-backbone", "-1"], ["--backbone-lr-factor", "0"],
        ["--ema-decay", "1"],
        ["--until", "soon"], ["--seed", "-1"], ["--input-size", "4"], ["--precision", "int8"],
    ],
)  # fmt: skip
def test_values_out_of_range_exit_2(args: list[str], prepared: Path, capsys: Capture) -> None:
    assert train(at(prepared), *args) == 2
    assert f"'{args[0]}'" in capsys.readouterr().err


def test_no_catalogue_at_all_exits_4(shop: World, capsys: Capture) -> None:
    files.delete_tree(str(shop.folder / "catalogue"))
    assert train(shop) == 4
    assert "The catalogue has no partition" in paragraph(capsys)


def test_no_image_at_all_exits_1_and_names_the_setting(shop: World, capsys: Capture) -> None:
    files.delete_tree(str(shop.folder / "images"))
    assert train(shop) == 1
    told = paragraph(capsys)
    assert "image_roots" in told
    assert not (shop.folder / "encoders").exists()


def test_rows_without_a_click_exit_1(shop: World, capsys: Capture) -> None:
    for day in DAYS[:2]:
        for path in rows_of(shop, day).rglob("*.parquet"):
            rows = pq.read_table(path, partitioning=None)
            labels = [[False] * len(row) for row in rows["pv_clicked"].to_pylist()]
            place = rows.column_names.index("pv_clicked")
            column = pa.array(labels, rows.schema.field(place).type)
            pq.write_table(rows.set_column(place, rows.schema.field(place), column), path)
    assert train(shop) == 1
    assert "0 with a click" in paragraph(capsys)


# ---- Items and their images ------------------------------------------------------------------


def catalogue_of(world: World, days: tuple[dt.date, ...]) -> tuple[dict[int, str], list[Any]]:
    everything = pa.array([*range(1, 14), UNKNOWN])
    rows, identities = training.read_catalogue(world.settings(), list(days), everything)
    assert len(set(rows["item_id"].to_pylist())) == len(rows)
    items = zip(rows["item_id"].to_pylist(), rows["image_uri"].to_pylist(), strict=True)
    return dict(items), identities


def test_an_item_has_the_image_of_the_newest_snapshot_that_knows_it(shop: World) -> None:
    old, both = catalogue_of(shop, DAYS[:1])[0], catalogue_of(shop, DAYS[:3])[0]
    assert LEAVES_ON_DAY_2 in old
    assert NEW_ON_DAY_2 not in old
    assert both[LEAVES_ON_DAY_2] == image_uri(LEAVES_ON_DAY_2)  # of the first day
    assert both[NEW_ON_DAY_2] == image_uri(NEW_ON_DAY_2)
    assert UNKNOWN not in both
    for path in (shop.folder / "catalogue" / f"ds={DAYS[2]}").glob("*.parquet"):
        rows = pq.read_table(path, partitioning=None)
        uris = pa.array([f"new/{uri}" for uri in rows["image_uri"].to_pylist()])
        pq.write_table(rows.set_column(1, "image_uri", uris), path)
    moved = catalogue_of(shop, DAYS[:3])[0]
    assert moved[1] == f"new/{image_uri(1)}"
    assert moved[LEAVES_ON_DAY_2] == image_uri(LEAVES_ON_DAY_2)
    files.delete_tree(str(shop.folder / "catalogue" / f"ds={DAYS[2]}"))
    assert catalogue_of(shop, DAYS[:3])[0] == both  # a missing day is passed over


def test_items_that_no_snapshot_knows_are_masked(shop: World) -> None:
    shop.extra_settings = "[training]\nrequest_gap_seconds = 1800\n"  # of every item
    assert make_rows(shop, DAYS[1], DAYS[2]) == 0
    settings = shop.settings()
    span = training.find_span(settings, DAYS[1], D, 1, lambda _: None)
    data, sources = training.read_data(settings, span, TrainSettings())
    ids, uris = (data.train.items[name].to_pylist() for name in ("item_id", "image_uri"))
    known = dict(zip(ids, uris, strict=True))
    assert known[UNKNOWN] is None
    assert known[MISSING] == image_uri(MISSING)  # that its file is missing shows itself later
    # It left before the first of these days; what it looked like is beyond them.
    assert known[LEAVES_ON_DAY_2] is None
    assert data.train.items is data.held_out.items
    assert data.image_roots == settings.catalogue.image_roots
    assert len(data.train) > 20
    assert np.intersect1d(data.train.users, data.held_out.users).size > 1
    assert set(sources["training_rows"]) == {str(day) for day in DAYS[1:3]}


def test_one_catalogue_for_all_days_is_read_once(shop: World) -> None:
    shop.settings()
    one = shop.folder / "catalogue" / f"ds={DAYS[1]}" / "*.parquet"
    text = shop.config.read_text().replace("catalogue/ds={ds}/*.parquet", str(one))
    shop.config.write_text(text)
    rows, identities = training.read_catalogue(
        load_settings(str(shop.config)), list(DAYS[:3]), pa.array([1, 2, UNKNOWN])
    )
    assert sorted(rows["item_id"].to_pylist()) == [1, 2]
    assert len(identities) == 1
