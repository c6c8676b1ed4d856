"""A published night stays while what it is made from is the same; else why it is made is told."""

import dataclasses
import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipelines.running import making, states
from tests.conftest import Artefacts
from tests.support.commands import Capture, courier, manifest, published, refresh, status
from tests.support.ill_disk import watch_disk
from tests.support.world import (
    DAYS,
    UNKNOWN,
    World,
    catalogue_items,
    draw_impressions,
    make_codebook,
    picture,
)

pytestmark = pytest.mark.first_night
NIGHT_TABLES = 6


def reasons(world: World, capsys: Capture, *args: str) -> dict[str, tuple[str, list[str]]]:
    """Returns by stage what `--dry-run` says would be done, and why."""
    capsys.readouterr()
    assert refresh(world, DAYS[0], "--dry-run", "--json", *args) == 0
    plan = json.loads(capsys.readouterr().out)
    return {stage["stage"]: (stage["state"], stage["why"]) for stage in plan["stages"]}


def is_idle(world: World, capsys: Capture) -> bool:
    """Refreshes the first day; returns whether there was nothing to do, and nothing changed."""
    before = published(world)
    capsys.readouterr()
    assert refresh(world, DAYS[0]) == 0
    told = capsys.readouterr()
    return "nothing to do" in told.err and not told.out and published(world) == before


# ---- What does not matter ----------------------------------------------------------------------


def test_a_shop_that_moved_to_another_folder_is_the_same(
    world: World, tmp_path: Path, capsys: Capture
) -> None:
    moved = dataclasses.replace(world, folder=tmp_path / "made", pins=list(world.pins))
    shutil.rmtree(moved.folder)
    shutil.copytree(world.folder, tmp_path / "there")  # with new times of all files
    for path in (tmp_path / "there").rglob("*"):
        path.touch()
    moved.folder = tmp_path / "there"
    assert is_idle(moved, capsys)


def test_other_versions_of_packages_are_noted_and_change_nothing(
    world: World, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer = making.PACKAGE_VERSIONS | {"pillow": "99.0"}
    for module in (making, states):
        monkeypatch.setattr(module, "PACKAGE_VERSIONS", newer)
    assert is_idle(world, capsys)
    version = manifest(world, "item_embeddings", DAYS[0])["version"]
    assert refresh(world, DAYS[0], "--remake") == 0
    again = manifest(world, "item_embeddings", DAYS[0])
    assert again["versions"]["pillow"] == "99.0"
    assert again["version"] == version  # the same rows


@pytest.mark.parametrize("days", [1, 2])
def test_a_night_that_is_there_is_read_little(days: int, world: World, capsys: Capture) -> None:
    """Of each table that is looked at `_SUCCESS` and manifest, once, and one read besides.

    A second day looks at the tables of the first, too, that it goes on from.
    """
    for day in DAYS[:days]:
        assert refresh(world, day) == 0
    reads: Counter[str] = Counter()

    def count(what: str, path: str) -> None:
        if what == "open file" and path.startswith(f"{world.root}/"):
            reads[path] += 1

    with pytest.MonkeyPatch.context() as patch:
        watch_disk(patch, count)
        assert refresh(world, DAYS[days - 1]) == 0
    assert "nothing to do" in capsys.readouterr().err
    assert max(reads.values()) == 1  # each file once
    tables = {path for path in map(os.path.dirname, reads) if "/ds=" in path}
    assert len(tables) == (NIGHT_TABLES if days == 1 else 2 * NIGHT_TABLES - 1)
    assert 2 * len(tables) < reads.total() <= 3 * len(tables)


# ---- Why it is made ----------------------------------------------------------------------------


def test_a_night_that_is_there_needs_no_reason(world: World, capsys: Capture) -> None:
    assert set(map(str, reasons(world, capsys).values())) == {"('published', [])"}


@pytest.mark.parametrize(
    ("change", "stage", "why"),
    [
        (lambda w: rewrite_catalogue(w), "embed", "catalogue rewritten"),
        (lambda w: rewrite_impressions(w), "histories", "impressions rewritten"),
        (lambda w: rewrite_impressions(w), "simscore", "impressions rewritten"),
        (lambda w: images_elsewhere(w), "embed", "image_roots was images, is pictures"),
        (lambda w: rewrite_catalogue(w), "item-features", "upstream embed made again"),
        (lambda w: rewrite_catalogue(w), "simscore", "upstream item-features made again"),
        (lambda w: shutil.rmtree(w.root / "shared"), "histories", "never made"),
        (lambda w: setattr(w, "rows_per_shard", 5), "embed", "it had 2 shards, has 4"),
    ],
)  # fmt: skip
def test_why_a_stage_is_not_simply_there_is_told(
    change: Any, stage: str, why: str, world: World, capsys: Capture
) -> None:
    change(world)
    state, told = reasons(world, capsys)[stage]
    assert told == [why]
    assert state == ("absent" if why == "never made" else "published from something else")


def rewrite_catalogue(world: World) -> None:
    world.write_catalogue(DAYS[0], catalogue_items(DAYS[0])[1:])


def rewrite_impressions(world: World, **other: Any) -> None:
    rows = draw_impressions(DAYS[0], seed=9)
    world.write_impressions(DAYS[0], [row | other for row in rows])


def images_elsewhere(world: World) -> None:
    """Makes the settings spell the folder of images in another way."""
    (world.folder / "images").rename(world.folder / "pictures")
    real = World.settings

    def settings(self: World) -> Any:
        real(self)
        text = self.config.read_text().replace(
            'image_roots = ["images"]', 'image_roots = ["pictures"]'
        )
        self.config.write_text(text)
        return None

    world.settings = settings.__get__(world)  # type: ignore[method-assign]


def test_another_codebook_is_told_by_name(
    world: World, artefacts: Artefacts, tmp_path: Path, capsys: Capture
) -> None:
    old = Path(artefacts.codebook).name
    other = Path(make_codebook(tmp_path, artefacts.encoder, "2026-02-27")).name
    world.pins[:] = [pin.replace(artefacts.codebook, str(tmp_path / other)) for pin in world.pins]
    _, why = reasons(world, capsys)["item-features"]
    assert why == [f"codebook_id was {old}, is {other}"]


def test_what_is_asked_for_is_the_reason(world: World, capsys: Capture) -> None:
    assert {why[0] for _, why in reasons(world, capsys, "--remake").values()} == {
        "asked for (--remake)"
    }
    assert reasons(world, capsys, "--full")["embed"] == ("published", ["asked for (--full)"])


def test_report_and_status_tell_why_a_night_was_made_again(world: World, capsys: Capture) -> None:
    rewrite_catalogue(world)
    capsys.readouterr()
    assert refresh(world, DAYS[0]) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("  embed")]
    assert line.endswith("(catalogue rewritten)")
    _, told = status(world, capsys)
    assert "embed made again: catalogue rewritten" in told


def test_status_tells_why_what_is_unfinished_was_begun(world: World, capsys: Capture) -> None:
    rewrite_impressions(world, item=UNKNOWN)
    assert refresh(world, DAYS[0]) == 3
    _, told = status(world, capsys)
    assert re.search(r"unfinished: histories 2026-03-01 run \w+ \(impressions rewritten\)", told)


def test_filling_a_hole_changes_no_later_day(world: World, capsys: Capture) -> None:
    """A day stays as it is while what it went on from stands, and follows where that is another."""
    stages = [DAYS[2], DAYS[1]]  # the third goes on from the first, as there is no second yet
    for day in stages:
        assert courier(world, "embed", "--ds", str(day)) == 0
    before = published(world)
    capsys.readouterr()
    assert courier(world, "embed", "--ds", str(DAYS[2])) == 0
    assert "nothing to do" in capsys.readouterr().err
    assert published(world) == before
    assert manifest(world, "item_embeddings", DAYS[2])["inputs"]["previous"]["ds"] == str(DAYS[0])
    rewrite_catalogue(world)
    assert courier(world, "embed", "--ds", str(DAYS[0])) == 0
    capsys.readouterr()
    assert courier(world, "embed", "--ds", str(DAYS[2]), "--dry-run") == 0
    assert f"previous was ds {DAYS[0]}, is ds {DAYS[1]}" in capsys.readouterr().out


# ---- What comes out the same -------------------------------------------------------------------


def test_what_was_made_and_equals_what_is_published_keeps_its_version(
    world: World, capsys: Capture
) -> None:
    """The same rows in other files: all is made again, and readers see nothing of it."""
    before = published(world)
    for file in (world.folder / "catalogue" / f"ds={DAYS[0]}").glob("*.parquet"):
        pq.write_table(pq.read_table(file, partitioning=None), file, row_group_size=2)
    old = manifest(world, "item_features", DAYS[0])
    assert reasons(world, capsys)["embed"][1] == ["catalogue rewritten"]
    assert refresh(world, DAYS[0]) == 0
    now = manifest(world, "item_features", DAYS[0])
    assert now["version"] == old["version"]
    assert now["inputs"] != old["inputs"]
    parts = {path: data for path, data in before.items() if path.endswith(".parquet")}
    assert {p: d for p, d in published(world).items() if p.endswith(".parquet")} == parts
    assert not (world.root / "_versions").exists()
    assert is_idle(world, capsys)


def test_a_remade_image_of_other_content_changes_what_reads_it(
    world: World, capsys: Capture
) -> None:
    """`--remake` looks at all again; what is downstream follows since its upstream is another."""
    old = manifest(world, "item_features", DAYS[0])
    world.image(1).write_bytes(picture(77))
    assert is_idle(world, capsys)  # images are no input of a published day
    assert courier(world, "embed", "--ds", str(DAYS[0]), "--remake", "--full") == 0
    _, why = reasons(world, capsys)["item-features"]
    assert why == ["upstream embed made again"]
    assert refresh(world, DAYS[0]) == 0
    now = manifest(world, "item_features", DAYS[0])
    assert now["run_id"] == old["run_id"]
    assert now["version"] != old["version"]
