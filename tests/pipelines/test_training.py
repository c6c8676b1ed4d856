"""`courier train` on the tiny world: rows of days before D in, an encoder that D may use out."""

import datetime as dt
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from courier_model.train import Training
from courier_model.train_progress import Progress
from feature_jobs import storage
from feature_jobs.tables import read_encoder_info
from pipelines import progress, training
from pipelines.config import load_settings
from pipelines.progress import StepBar
from tests.support.commands import Capture, courier, paragraph
from tests.support.world import (
    DAYS,
    LEAVES_ON_DAY_2,
    MISSING,
    NEW_ON_DAY_2,
    SCOPE,
    UNKNOWN,
    World,
    catalogue_items,
    draw_impressions,
    image_uri,
    make_codebook,
)

pytestmark = pytest.mark.usefixtures("one_thread")

D = DAYS[3]
SECTION = f"[training]\ncategories = {json.dumps(SCOPE)}\nrequest_gap_seconds = 1800\n"
OPTIONS = (
    "--until", str(D), "--preset", "demo", "--backbone", "shufflenet_v2_x0_5", "--epochs", "4",
    "--batch-rows", "16", "--evaluate-every", "4", "--name", "tiny",
)  # fmt: skip


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shop with training rows of every day, D included. Read only."""
    world = World(tmp_path_factory.mktemp("prepared") / "shop", "int", 1000, SECTION)
    assert make_rows(world, DAYS[0], D) == 0
    return world.folder


def make_rows(world: World, first: dt.date, last: dt.date) -> int:
    return courier(world, "training-rows", "--start-ds", str(first), "--end-ds", str(last))


def at(folder: Path) -> World:
    """The world that lies in a folder already."""
    world = World.__new__(World)
    world.folder, world.ids, world.rows_per_shard = folder, "int", 1000
    world.extra_settings, world.pins = SECTION, []
    return world


def copied(folder: Path, to: Path) -> World:
    shutil.copytree(folder, to / "shop")
    return at(to / "shop")


@pytest.fixture
def shop(prepared: Path, tmp_path: Path) -> World:
    """A shop of one's own, whose days before D have training rows."""
    world = copied(prepared, tmp_path)
    storage.delete_tree(str(rows_of(world, D)))
    return world


@pytest.fixture(scope="module")
def trained(
    prepared: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[World, str, dict[str, Any]]:
    """A shop after `courier train`, what that printed, and the one pin in it. It stays."""
    world = copied(prepared, tmp_path_factory.mktemp("trained"))
    storage.delete_tree(str(rows_of(world, D)))
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("click.echo", lambda text, err=False: None if err else printed.append(text))
        assert train(world) == 0
    (text,) = printed
    (pin,) = tomllib.loads(text)["pins"]
    return world, text, pin


def rows_of(world: World, day: dt.date) -> Path:
    return world.root / "shared" / "training_rows" / f"ds={day}"


def train(world: World, *args: str) -> int:
    return courier(world, "train", *OPTIONS, *args)


def encoder_id(world: World) -> str:
    (path,) = (world.folder / "encoders").iterdir()
    return path.name


def run_folder(world: World) -> Path:
    (path,) = (world.folder / "training").iterdir()
    return path


# ---- What comes out --------------------------------------------------------------------------


def test_it_prints_a_pin_that_holds_from_the_day_it_was_trained_until(
    trained: tuple[World, str, dict[str, Any]],
) -> None:
    world, text, pin = trained
    assert tomllib.loads(text) == {"pins": [pin]}
    assert pin == {"from_ds": str(D), "encoder": f"encoders/{encoder_id(world)}"}
    assert encoder_id(world).startswith("tiny-")
    comment, *_ = text.splitlines()
    assert comment.startswith("# courier, shufflenet_v2_x0_5, trained on ds 2026-03-01 to ")
    assert "held-out AUC 0." in comment


def test_the_encoder_tells_its_scope_and_its_days(
    trained: tuple[World, str, dict[str, Any]],
) -> None:
    world, _, pin = trained
    info = read_encoder_info(str(world.folder / pin["encoder"]))
    assert info.categories == SCOPE
    assert (info.data_start_ds, info.data_end_ds) == (str(DAYS[0]), str(DAYS[2]))
    assert info.weights == "random, trained for courier"
    assert info.preprocessing["input_size"] == 32


def test_beside_the_encoder_lies_how_it_was_made_and_what_it_was_found_to_be_worth(
    trained: tuple[World, str, dict[str, Any]],
) -> None:
    world, text, pin = trained
    found = json.loads((world.folder / pin["encoder"] / "train.json").read_text())
    assert found["settings"]["backbone"] == "shufflenet_v2_x0_5"
    assert found["settings"]["batch_rows"] == 16
    assert found["settings"]["learning_rate"] == 3e-4  # of the preset
    data = found["data"]
    assert (data["start_ds"], data["end_ds"]) == (str(DAYS[0]), str(DAYS[2]))
    assert data["held_out_from_ds"] == str(DAYS[2])
    assert list(data["training_rows"]) == [str(day) for day in DAYS[:3]]
    assert len(data["fingerprint"]) >= 32
    assert data["catalogues"]
    assert found["git_revision"] is None or len(found["git_revision"]) >= 40
    assert (found["precision"], found["processes"]) == ("fp32", 1)
    assert found["device"].startswith("cpu")
    assert "torch" in found["versions"]
    steps, counts = found["steps"], found["counts"]
    assert steps % 4 == 0
    assert counts["rows"] == 16 * steps
    assert counts["images"] > 0
    assert counts["bad_images"] > 0
    assert found["seconds"] > 0
    measured = [m["step"] for m in found["measures"]]
    assert measured[:2] == [None, 0]
    assert measured[-1] == steps >= 8
    trained_ones = found["measures"][2:]
    assert found["best"] == max(trained_ones, key=lambda m: m["auc"])
    assert f"AUC {found['best']['auc']:.4f} at step {found['best']['step']}" in text


def test_a_night_of_that_day_takes_the_encoder_and_one_of_an_earlier_day_refuses_it(
    trained: tuple[World, str, dict[str, Any]], tmp_path: Path, capsys: Capture
) -> None:
    world, text, pin = trained
    world = copied(world.folder, tmp_path)
    encoder = str(world.folder / pin["encoder"])
    codebook = make_codebook(tmp_path / "codebooks", encoder)
    world.pins = [text + f'\ncodebook = "{codebook}"\n']
    assert courier(world, "refresh", "--ds", str(D)) == 0
    assert set(world.table("user_simscores", D)["encoder_id"].to_pylist()) == {encoder_id(world)}
    capsys.readouterr()
    world.pins = []
    world.pin(DAYS[0], encoder, codebook)
    for day in DAYS[1:3]:
        assert courier(world, "refresh", "--ds", str(day)) == 2
        told = paragraph(capsys)
        assert f"made from data up to ds {DAYS[2]}" in told
        assert "know their own future" in told


def test_no_row_of_the_day_or_later_counts(
    trained: tuple[World, str, dict[str, Any]], prepared: Path, tmp_path: Path
) -> None:
    """Rows of D are there, and D's log and catalogue are others."""
    world = copied(prepared, tmp_path)
    assert (rows_of(world, D) / "_manifest.json").exists()
    world.write_impressions(D, draw_impressions(D, seed=99))
    world.write_catalogue(D, catalogue_items(D)[3:])
    assert train(world) == 0
    assert encoder_id(world) == encoder_id(trained[0])


def test_an_earlier_day_less_makes_another_encoder(
    trained: tuple[World, str, dict[str, Any]], shop: World
) -> None:
    """So the test above can fail."""
    assert train(shop, "--start-ds", str(DAYS[1])) == 0
    assert encoder_id(shop) != encoder_id(trained[0])


# ---- Again, and stopped ----------------------------------------------------------------------


def test_the_same_command_again_trains_nothing_and_prints_the_same(
    trained: tuple[World, str, dict[str, Any]], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, text, pin = trained
    monkeypatch.setattr(Training, "_train_on", None)
    before = (world.folder / pin["encoder"] / "train.json").read_bytes()
    assert train(world) == 0
    assert capsys.readouterr().out.rstrip("\n") == text
    assert (world.folder / pin["encoder"] / "train.json").read_bytes() == before


def test_other_settings_under_the_same_name_exit_2(
    trained: tuple[World, str, dict[str, Any]], capsys: Capture
) -> None:
    world, _, pin = trained
    assert train(world, "--learning-rate", "0.5") == 2
    told = paragraph(capsys)
    assert "learning_rate 0.0003, now 0.5" in told
    assert "--name" in told
    assert train(world, "--start-ds", str(DAYS[1])) == 2
    assert "other training rows" in paragraph(capsys)
    assert encoder_id(world) == os.path.basename(pin["encoder"])


def test_terminated_it_saves_exits_143_and_the_same_command_ends_as_if_it_had_not(
    trained: tuple[World, str, dict[str, Any]], shop: World, capsys: Capture
) -> None:
    shop.settings()
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", "train", "--config", str(shop.config), *OPTIONS],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(shop.folder.glob("training/*/tensorboard")):  # it is about to take its steps
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert out == ""
    assert "Traceback" not in errors
    assert "Interrupted; the same command resumes" in errors
    assert "the same command resumes" in errors
    (saved,) = (run_folder(shop) / "checkpoints").glob("step-*.pt")
    assert not (shop.folder / "encoders").exists()
    capsys.readouterr()
    assert train(shop) == 0
    assert f"going on from step {int(saved.name.split('-')[1])} of" in capsys.readouterr().err
    assert encoder_id(shop) == encoder_id(trained[0])


def test_two_processes_do_not_train_in_one_folder(
    trained: tuple[World, str, dict[str, Any]], capsys: Capture
) -> None:
    world = trained[0]
    with storage.lock(str(run_folder(world))):
        assert train(world) == 1
    told = paragraph(capsys)
    assert f"Another process is training in {run_folder(world)}" in told
    assert train(world) == 0  # the lock goes with its holder


# ---- Refused ---------------------------------------------------------------------------------


def test_without_training_rows_it_exits_4_and_says_how_to_make_them(
    shop: World, capsys: Capture
) -> None:
    for day in DAYS[1:3]:
        storage.delete_tree(str(rows_of(shop, day)))
    assert train(shop) == 4
    assert "courier training-rows --start-ds 2026-03-02 --end-ds 2026-03-03" in paragraph(capsys)
    storage.delete_tree(str(shop.root))
    assert train(shop) == 4
    told = paragraph(capsys)
    assert "--end-ds 2026-03-03" in told
    assert "courier training-rows --start-ds 2026-03-0" in told
    assert not (shop.folder / "training").exists()


def test_a_gap_is_refused_after_a_given_start_and_told_otherwise(
    shop: World, capsys: Capture
) -> None:
    storage.delete_tree(str(rows_of(shop, DAYS[1])))
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
        assert "courier training-rows --ds 2026-03-01" in told
    shop.extra_settings = SECTION.replace("1800", "60")
    assert train(shop) == 2
    assert "'request_gap_seconds': 1800" in paragraph(capsys)
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
        ["--until", "soon"], ["--seed", "-1"], ["--input-size", "4"], ["--precision", "int8"],
    ],
)  # fmt: skip
def test_values_out_of_range_exit_2(args: list[str], prepared: Path, capsys: Capture) -> None:
    assert train(at(prepared), *args) == 2
    assert f"'{args[0]}'" in capsys.readouterr().err


def test_no_catalogue_at_all_exits_4(shop: World, capsys: Capture) -> None:
    storage.delete_tree(str(shop.folder / "catalogue"))
    assert train(shop) == 4
    assert "The catalogue has no partition" in paragraph(capsys)


def test_no_image_at_all_exits_1_and_names_the_setting(shop: World, capsys: Capture) -> None:
    storage.delete_tree(str(shop.folder / "images"))
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
    storage.delete_tree(str(shop.folder / "catalogue" / f"ds={DAYS[2]}"))
    assert catalogue_of(shop, DAYS[:3])[0] == both  # a missing day is passed over


def test_items_that_no_snapshot_knows_are_masked(shop: World) -> None:
    shop.extra_settings = "[training]\nrequest_gap_seconds = 1800\n"  # of every item
    assert make_rows(shop, DAYS[1], DAYS[2]) == 0
    settings = shop.settings()
    span = training.find_span(settings, DAYS[1], D, 1, lambda _: None)
    data, sources = training.read_data(settings, span)
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


# ---- Progress --------------------------------------------------------------------------------


def shown(capsys: Capture, live: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], str]:
    """What a bar told line by line over four steps, and what went to the terminal."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: live)
    for pause in ("_TERMINAL_SECONDS", "_LOG_SECONDS"):
        monkeypatch.setattr(progress, pause, 0.0)
    lines: list[str] = []
    bar = StepBar(lines.append)
    for step in (1, 2, 3, 4):
        bar.show(Progress(step, 4, 1.25, 1234.5, (4 - step) * 2.0))
        if step == 2:
            bar.say("held out")
    return lines, capsys.readouterr().err


LINES = [
    "train [######..................] step 1/4, loss 1.2500, 1,234 images/s, 6 s left",
    "train [############............] step 2/4, loss 1.2500, 1,234 images/s, 4 s left",
    "train [##################......] step 3/4, loss 1.2500, 1,234 images/s, 2 s left",
    "train [########################] step 4/4, loss 1.2500, 1,234 images/s, 0 s left",
]


def test_elsewhere_progress_is_lines(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    lines, terminal = shown(capsys, False, monkeypatch)
    assert lines == [*LINES[:2], "held out", *LINES[2:]]
    assert terminal == ""


def test_on_a_terminal_progress_is_a_bar_in_place(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines, terminal = shown(capsys, True, monkeypatch)
    clear = "\r\033[K"
    assert terminal == "".join(clear + line for line in LINES[:3])
    assert lines == [f"{clear}held out", clear + LINES[3]]  # these end a line


def test_progress_is_told_now_and_then_and_at_the_end(capsys: Capture) -> None:
    lines: list[str] = []
    bar = StepBar(lines.append)
    for step in range(1, 101):
        bar.show(Progress(step, 100, math.pi, 9.0, 1.0))
    assert len(lines) == 1
    assert "step 100/100" in lines[0]


@pytest.mark.parametrize("live", [True, False])
def test_all_but_the_first_process_are_silent(
    live: bool, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: live)
    monkeypatch.setattr(progress, "_TERMINAL_SECONDS", 0.0)
    bar = StepBar(None)
    bar.say("held out")
    bar.show(Progress(4, 4, 1.0, 1.0, 0.0))
    assert capsys.readouterr() == ("", "")
