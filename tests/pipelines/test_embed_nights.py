"""Whole `courier embed` runs read, embed and reject what they should, on the tiny shop."""

import datetime as dt
import functools
import itertools
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from courier_model import encoder as encoders
from courier_model.images import decode
from courier_model.inference import Embedder
from feature_jobs.schemas import StorageUnavailable
from feature_jobs.store import files, partitions, threads
from pipelines.cli import main
from tests.conftest import Artefacts, pinned
from tests.support.commands import (
    Capture,
    courier,
    embed_work,
    given_to_the_encoder,
    manifest,
    paragraph,
    published,
    vectors,
)
from tests.support.world import (
    CPU,
    DAYS,
    MISSING,
    NORMAL,
    SAME_BYTES_AS_1,
    UNDECODABLE,
    World,
    catalogue_items,
    draw_impressions,
    image_uri,
    make_encoder,
    picture,
)

STRICT = ("rejects.fail = 0.5", "rejects.fail = 0.1")
LENIENT = ("rejects.fail = 0.5", "rejects.fail = 1.0")
ON_CUDA = ("[embed]", '[embed]\ndevice = "cuda"')
WORK = ("images_unchanged", "images_read", "images_embedded", "images_reused", "rejects_waiting")


@pytest.fixture
def world(world: World) -> World:
    """Makes a world of which gates say nothing, as far as a test does not ask for it."""
    world.gates += "\nimage_coverage = {warn = 0.0, fail = 0.0}\nlost_addresses.fail = 1.0"
    world.gates += "\noutage.fail = 1.0"
    return world


def embed(world: World, day: dt.date, *args: str) -> int:
    return courier(world, "embed", "--ds", str(day), *args)


def embed_with(world: World, day: dt.date, *changes: tuple[str, str]) -> int:
    """Runs `courier embed` for a day with other settings: each change is old and new text."""
    world.settings()
    text = world.config.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    world.config.write_text(text)
    return main(["embed", "--config", str(world.config), "--ds", str(day)])


def offer(world: World, day: dt.date, uris: Mapping[int, str | None]) -> None:
    """Writes a catalogue of these items with these addresses, in two files."""
    rows = pa.table(
        {
            "item_id": list(uris),
            "image_uri": pa.array(uris.values(), pa.string()),
            "category": ["dress"] * len(uris),
        }
    )
    world.write("catalogue", day, [rows.slice(0, 5), rows.slice(5)], rows_to_group=3)


def addresses(*items: int) -> dict[int, str]:
    return {item: image_uri(item) for item in items or catalogue_items(DAYS[0])}


def work(world: World, day: dt.date) -> list[int]:
    found = embed_work(world, day)
    return [found[name] for name in WORK]


def rejects(world: World, day: dt.date) -> dict[int, dict[str, Any]]:
    return {row["item_id"]: row for row in world.table("item_rejects", day).to_pylist()}


# ---- The same bytes --------------------------------------------------------------------------


def test_the_same_bytes_under_items_of_several_shards_are_embedded_once(
    tmp_path: Path, artefacts: Artefacts
) -> None:
    world = pinned(World(tmp_path / "shop", rows_per_shard=1), artefacts)
    same = range(20, 30)
    for item in same:
        world.put(item, picture(1))
    offer(world, DAYS[0], addresses(*NORMAL, *same) | {30: image_uri(2), 31: image_uri(2)})
    assert embed(world, DAYS[0]) == 0
    folder = world.root / "test/item_embeddings" / f"ds={DAYS[0]}"
    of_shards = [
        partitions.read_parquet(str(path), ["item_id"]) for path in folder.glob("*.parquet")
    ]
    assert sum(any(i in same for i in rows["item_id"].to_pylist()) for rows in of_shards) > 4
    # Eighteen items, sixteen files, six different contents.
    assert work(world, DAYS[0]) == [0, 16, 6, 12, 0]
    found = vectors(world, DAYS[0])
    assert len(found) == 18
    assert all(found[item] == found[1] for item in same)
    assert found[30] == found[31] == found[2]
    assert len({tuple(vector) for vector in found.values()}) == 6


def test_an_image_that_was_renamed_is_read_but_not_embedded(world: World) -> None:
    assert embed(world, DAYS[0]) == 0
    renamed, elsewhere = NORMAL[1], NORMAL[2]
    os.rename(world.image(renamed), world.folder / "images" / "renamed.png")
    uris = addresses() | {renamed: "renamed.png", elsewhere: f"./{image_uri(elsewhere)}"}
    offer(world, DAYS[1], uris)
    assert embed(world, DAYS[1]) == 0
    # Read: both, and the reject that has a file. All ten that are embedded were so before.
    assert work(world, DAYS[1]) == [8, 3, 0, 2, 0]
    assert vectors(world, DAYS[1]) == vectors(world, DAYS[0])
    row = {r["item_id"]: r for r in world.table("item_embeddings", DAYS[1]).to_pylist()}[renamed]
    assert row["image_uri"] == "renamed.png"


# ---- Encoders of timm's ----------------------------------------------------------------------


@pytest.fixture
def of_timm(world: World, capsys: Capture) -> World:
    """Makes a world whose pinned encoder has a backbone of timm's."""
    world.pins.clear()
    options = ("--backbone", "timm:test_convnext", "--weights", "random", "--input-size", "32")
    assert courier(world, "init-encoder", *options) == 0
    world.config.write_text(world.config.read_text() + capsys.readouterr().out)
    return world


def embed_alone(world: World) -> int:
    return main(["embed", "--config", str(world.config), "--ds", str(DAYS[0])])


def test_an_encoder_of_timms_embeds_a_night_like_any_other(of_timm: World) -> None:
    assert embed_alone(of_timm) == 0
    (folder,) = (of_timm.folder / "encoders").iterdir()
    assert folder.name.startswith("timm-test-convnext-")
    encoder = encoders.load_encoder(str(folder))
    assert manifest(of_timm, "item_embeddings", DAYS[0])["identities"] == {
        "encoder_id": folder.name
    }
    found = vectors(of_timm, DAYS[0])
    items = [item for item in NORMAL if item in found]
    assert len(items) > 3
    pixels = np.stack([decode(of_timm.image(i).read_bytes(), encoder.preprocessing) for i in items])
    wanted = encoders.embed(encoder, pixels, 4, CPU, "fp32")
    np.testing.assert_allclose([found[item] for item in items], wanted, atol=1e-2)


def test_where_timm_is_missing_its_encoder_is_told_before_the_job_begins(
    of_timm: World, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert embed_alone(of_timm) == 2
    told = paragraph(capsys)
    assert "'timm:test_convnext' is of the package timm, which is not installed here" in told
    assert "pip install '.[timm]'" in told
    assert not published(of_timm)


# ---- Rejects ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rejected_twice(tmp_path_factory: pytest.TempPathFactory, artefacts: Artefacts) -> World:
    """Makes a world after two nights, whose two rejects are tried again on its fourth day."""
    world = pinned(World(tmp_path_factory.mktemp("rejects") / "shop"), artefacts)
    for day in DAYS:
        offer(world, day, addresses())
    assert embed(world, DAYS[0]) == embed(world, DAYS[1]) == 0
    assert {row["next_ds"] for row in rejects(world, DAYS[1]).values()} == {DAYS[3]}
    shutil.copytree(world.folder, world.folder.with_name("kept"))
    return world


@pytest.fixture
def healing(rejected_twice: World) -> World:
    """Makes the twice rejected world anew, with an image for each reject at its old address."""
    world = rejected_twice
    shutil.rmtree(world.folder)
    shutil.copytree(world.folder.with_name("kept"), world.folder)
    for item in (MISSING, UNDECODABLE):
        world.put(item, picture(item))
    return world


def test_a_reject_waits_for_its_day_and_heals_on_it(healing: World) -> None:
    before = rejects(healing, DAYS[1])
    assert embed(healing, DAYS[2]) == 0
    assert work(healing, DAYS[2]) == [10, 0, 0, 0, 2]
    assert rejects(healing, DAYS[2]) == before
    assert embed(healing, DAYS[3]) == 0
    assert work(healing, DAYS[3]) == [10, 2, 2, 0, 0]
    assert rejects(healing, DAYS[3]) == {}
    assert {MISSING, UNDECODABLE} < set(vectors(healing, DAYS[3]))


def test_a_reject_under_another_address_heals_at_once_the_other_still_waits(healing: World) -> None:
    os.rename(healing.image(MISSING), healing.folder / "images" / "found.png")
    offer(healing, DAYS[2], addresses() | {MISSING: "found.png"})
    assert embed(healing, DAYS[2]) == 0
    assert work(healing, DAYS[2]) == [10, 1, 1, 0, 1]
    assert set(rejects(healing, DAYS[2])) == {UNDECODABLE}


def test_a_reject_heals_at_once_under_other_image_roots_and_in_a_full_run(healing: World) -> None:
    more = 'image_roots = ["images"', 'image_roots = ["images", "impressions"'
    assert embed_with(healing, DAYS[2], more) == 0
    assert rejects(healing, DAYS[2]) == {}
    # The images are looked at again, but their bytes and their embeddings are those of before.
    assert work(healing, DAYS[2]) == [0, 12, 2, 10, 0]
    assert embed(healing, DAYS[2], "--full") == 0
    assert rejects(healing, DAYS[2]) == {}


def test_a_reject_heals_at_once_with_another_encoder(healing: World, tmp_path: Path) -> None:
    pins = list(healing.pins)
    try:
        healing.pin(DAYS[2], make_encoder(tmp_path / "other", seed=1))
        assert embed(healing, DAYS[2]) == 0
    finally:
        healing.pins[:] = pins
    assert rejects(healing, DAYS[2]) == {}
    assert work(healing, DAYS[2]) == [0, 12, 11, 1, 0]


def test_a_reject_that_stays_bad_is_tried_less_and_less_often(world: World) -> None:
    tried = []
    for number in range(9):  # and not on every day is there a night
        day = DAYS[0] + dt.timedelta(days=number)
        if number in (5, 6):
            continue
        offer(world, day, addresses(1, UNDECODABLE))
        assert embed(world, day) == 0
        row = rejects(world, day)[UNDECODABLE]
        if row["last_ds"] == day:
            tried.append(number)
            assert row["attempts"] == len(tried)
        assert row["first_ds"] == DAYS[0]
    assert tried == [0, 1, 3, 7]


# ---- The law over many days ------------------------------------------------------------------


def change(world: World, rng: np.random.Generator, uris: dict[int, str], item: int) -> None:
    """Lets something happen to an item's image, or to its address."""
    path = world.folder / "images" / uris[item]
    match rng.integers(0, 12):
        case 0:
            path.unlink(missing_ok=True)
        case 1:
            path.write_bytes(b"<html>not found</html>")
        case 2 | 3:
            path.write_bytes(picture(int(rng.integers(1, 6))))
        case 4:
            path.touch()
        case 5 if path.exists():
            uris[item] = f"moved-{item}-{rng.integers(1000)}.png"
            path.rename(world.folder / "images" / uris[item])
        case 6:
            uris[item] = image_uri(int(rng.integers(1, 6)))
        case 7:
            path.write_bytes(b"")


def test_over_many_days_every_item_is_in_one_table_with_its_images_own_embedding(
    world: World, artefacts: Artefacts
) -> None:
    rng = np.random.default_rng(7)
    encoder, precision = encoders.load_encoder(artefacts.encoder), encoders.choose_precision(CPU)

    @functools.cache
    def alone(data: bytes) -> np.ndarray:
        pixels = decode(data, encoder.preprocessing)[None]
        return encoders.embed(encoder, pixels, 4, CPU, precision)[0]

    items, uris = list(range(1, 25)), addresses(*range(1, 25))
    for item in items:
        world.put(item, picture(item % 7))
    seen = set()
    for number in range(6):
        day = DAYS[0] + dt.timedelta(days=number)
        for item in items:
            change(world, rng, uris, item)
        here = [item for item in items if rng.random() < 0.9]
        offer(world, day, {item: uris[item] for item in here})
        assert embed_with(world, day, LENIENT) == 0
        table, refused = world.table("item_embeddings", day), rejects(world, day)
        inside = table.filter(table["in_catalogue"]).to_pylist()
        assert sorted([row["item_id"] for row in inside] + list(refused)) == here
        for row in inside:
            assert row["image_uri"] == uris[row["item_id"]]
            data = (world.folder / "images" / row["image_uri"]).read_bytes()
            np.testing.assert_allclose(row["embedding"], alone(data), atol=1e-5)
        seen |= {row["reason"] for row in refused.values()}
        seen |= {name for name, n in zip(WORK, work(world, day), strict=True) if n}
    assert seen == {"missing", "empty", "not_an_image", *WORK}  # all of it did happen


# ---- Nights that do not end well -------------------------------------------------------------


def test_a_passing_fault_ends_the_night_without_a_reject_and_the_next_one_goes_on(
    world: World, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, tries = files.read_bytes, []

    def fail(path: str, limit: int = -1) -> bytes:
        if path.endswith(".png"):
            tries.append(path)
            if len(tries) > 6:
                raise StorageUnavailable(f"{path} could not be reached for 120 seconds")
        return read(path, limit)

    with monkeypatch.context() as patch:
        patch.setattr(files, "read_bytes", fail)
        assert embed(world, DAYS[0]) == 1
    assert "could not be reached" in paragraph(capsys)
    assert published(world) == {}
    assert not list(world.root.rglob("receipts/*.json"))
    assert list(world.root.rglob("chunks-*/*.arrow"))
    items = given_to_the_encoder(monkeypatch)
    assert embed(world, DAYS[0]) == 0
    assert 0 < len(items) < 11
    assert set(rejects(world, DAYS[0])) == {MISSING, UNDECODABLE}
    resumed = published(world)
    files.delete_tree(str(world.root))
    assert embed(world, DAYS[0]) == 0
    assert published(world) == resumed


def test_a_mended_catalogue_after_a_refused_night_embeds_nothing_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert embed_with(world, DAYS[0], STRICT) == 3
    assert published(world) == {}
    world.write_catalogue(DAYS[0], [i for i in catalogue_items(DAYS[0]) if i != MISSING])
    items = given_to_the_encoder(monkeypatch)
    assert embed_with(world, DAYS[0], STRICT) == 0
    assert items == [UNDECODABLE]  # it could have been mended, and so is tried once more
    assert len(vectors(world, DAYS[0])) == 10
    assert not list(world.root.rglob("chunks-*"))  # published, and so no longer needed


def test_a_shop_whose_ids_became_strings_after_a_refused_night_begins_anew(world: World) -> None:
    assert embed_with(world, DAYS[0], STRICT) == 3
    world.ids = "string"
    for number, day in enumerate(DAYS):
        world.write_catalogue(day, catalogue_items(day))
        world.write_impressions(day, draw_impressions(day, seed=number))
    assert embed(world, DAYS[0]) == 0
    assert "item-1" in world.table("item_embeddings", DAYS[0])["item_id"].to_pylist()


# ---- Precision -------------------------------------------------------------------------------


def in_precision(name: str) -> tuple[str, str]:
    return "[embed]", f'[embed]\nprecision = "{name}"'


def test_a_pinned_precision_is_that_of_every_embedding_also_of_earlier_nights(
    world: World,
) -> None:
    first, second, third = DAYS[:3]
    assert embed_with(world, first, in_precision("fp32")) == 0
    exact = vectors(world, first)
    for day in (second, third):
        offer(world, day, addresses())
    assert embed_with(world, second, in_precision("bf16")) == 0
    rough = vectors(world, second)
    assert rough.keys() == exact.keys()
    assert all(rough[item] != exact[item] for item in exact)
    assert manifest(world, "item_embeddings", second)["settings"]["precision"] == "bf16"
    assert embed_with(world, third, in_precision("bf16")) == 0
    assert vectors(world, third) == rough
    assert work(world, third)[2] == 0  # taken over


def test_embeddings_of_unknown_precision_are_made_again_once_it_is_pinned(world: World) -> None:
    assert embed(world, DAYS[0]) == 0
    assert "precision" not in manifest(world, "item_embeddings", DAYS[0])["settings"]
    offer(world, DAYS[1], addresses())
    assert embed_with(world, DAYS[1], in_precision("fp32")) == 0
    assert work(world, DAYS[1])[2] == 9
    offer(world, DAYS[2], addresses())
    assert embed(world, DAYS[2]) == 0  # which asks for none
    assert work(world, DAYS[2])[2] == 0


def test_what_a_refused_night_embedded_in_another_precision_is_not_taken(world: World) -> None:
    assert embed_with(world, DAYS[0], STRICT, in_precision("fp32")) == 3
    assert embed_with(world, DAYS[0], in_precision("bf16")) == 0
    rough = vectors(world, DAYS[0])
    files.delete_tree(str(world.root))
    assert embed_with(world, DAYS[0], in_precision("bf16")) == 0
    assert vectors(world, DAYS[0]) == rough


def test_a_night_whose_new_embeddings_are_of_two_precisions_is_told_so(
    world: World, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = itertools.cycle(["cpu_intel_avx512_amx_bf16", "cpu_amd_avx2_fp32"])  # chunk by chunk
    monkeypatch.setattr(Embedder, "kind_and_precision", lambda self: next(names))
    assert embed(world, DAYS[0], "--json") == 0
    told = capsys.readouterr()
    (warning,) = json.loads(told.out)["warnings"]
    assert "several precisions" in warning
    assert "embedded on cpu amd avx2 fp32" in warning
    assert f"WARNING: ds {DAYS[0]}: {warning}" in told.err
    (path,) = (world.root / "test/_runs").rglob("run.json")
    assert json.loads(path.read_text())["warnings"] == [warning]


def test_a_night_of_one_precision_is_not_warned_of_whatever_its_hardware(
    world: World, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = itertools.cycle(["cpu_intel_avx512_fp32", "cpu_amd_avx2_fp32"])
    monkeypatch.setattr(Embedder, "kind_and_precision", lambda self: next(names))
    assert embed(world, DAYS[0], "--json") == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["warnings"] == []
    assert "WARNING" not in told.err


# ---- What is told ----------------------------------------------------------------------------


def test_a_gpu_that_is_asked_for_and_not_there_is_warned_of_and_the_night_goes_on(
    world: World, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert embed_with(world, DAYS[0], ON_CUDA) == 0
    warned = [x for x in capsys.readouterr().err.splitlines() if x.startswith("WARNING: ")]
    assert len(warned) == 1
    assert "no CUDA device" in warned[0]
    assert len(vectors(world, DAYS[0])) == 10


def test_a_warning_of_a_refused_night_is_not_told_of_the_next_one(
    world: World, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert embed_with(world, DAYS[0], ON_CUDA, STRICT) == 3
    assert "WARNING: " in capsys.readouterr().err
    assert embed(world, DAYS[0]) == 0
    assert "WARNING: " not in capsys.readouterr().err


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_no_gpu_is_missed_where_none_was_asked_for(
    world: World, capsys: Capture, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert embed_with(world, DAYS[0], ("[embed]", f'[embed]\ndevice = "{device}"')) == 0
    assert "WARNING" not in capsys.readouterr().err


def test_the_run_and_its_report_tell_what_the_images_cost_and_where_they_were_embedded(
    world: World, capsys: Capture
) -> None:
    assert embed(world, DAYS[0], "--json") == 0
    report = json.loads(capsys.readouterr().out)
    found = report["stages"]["embed"]["work"]
    device = f"embedded_on_{encoders.choose_device().type}"
    assert [n for name, n in found.items() if name.startswith(device)] == [9]  # in one precision
    readable = [i for i in catalogue_items(DAYS[0]) if i not in (MISSING, UNDECODABLE)]
    assert SAME_BYTES_AS_1 in readable
    assert found["bytes_read"] >= sum(world.image(i).stat().st_size for i in readable)
    for step in ("io", "decode", "forward"):
        assert 0 < found[f"{step}_seconds"] < 60
    (path,) = (world.root / "test/_runs").rglob("run.json")
    assert json.loads(path.read_text())["stages"]["embed"]["work"] == found

    files.delete_tree(str(world.root))
    assert embed(world, DAYS[0]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert "12 items: 1 reused by bytes, 9 embedded on cpu " in last
    assert "; 2 rejected: 1 missing, 1 not an image; read " in last


def test_workers_compute_on_the_threads_of_the_settings_and_the_run_states_them(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[int] = []
    monkeypatch.setattr(threads, "limit", limits.append)
    assert embed_with(world, DAYS[0], ("[embed]", "[workers]\nthreads = 3\n[embed]")) == 0
    assert limits == [3]
    (path,) = (world.root / "test/_runs").rglob("run.json")
    (stage,) = json.loads(path.read_text())["stages"].values()
    assert stage["workers"] == {"threads": 3, "processes": 1}


def test_a_night_that_is_published_already_tells_no_cost(world: World, capsys: Capture) -> None:
    reports = []
    for _ in range(2):
        assert embed(world, DAYS[0], "--json") == 0
        reports.append(json.loads(capsys.readouterr().out)["stages"]["embed"])
    assert reports[0]["counts"] == reports[1]["counts"]
    assert reports[0]["work"]
    assert reports[1]["work"] == {}
    assert embed(world, DAYS[0]) == 0
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("\n") == 1
