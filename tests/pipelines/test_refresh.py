"""Tests a night repeated, killed, refused and mended: what was published before stays."""

import datetime as dt
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from feature_jobs.store import files, worker_notes
from feature_jobs.store.pieces import read_all
from feature_jobs.store.usage import Usage
from pipelines.cli import main
from tests.conftest import Artefacts, pinned
from tests.support.commands import (
    Capture,
    Killed,
    courier,
    die_at_write,
    embed_work,
    given_to_the_encoder,
    manifest,
    paragraph,
    published,
    refresh,
    rewrite,
    vectors,
)
from tests.support.processes import wait_for
from tests.support.world import (
    DAYS,
    MISSING,
    NORMAL,
    UNKNOWN,
    World,
    catalogue_items,
    draw_impressions,
    make_codebook,
    make_encoder,
    picture,
)

# ---- Repeating -------------------------------------------------------------------------------


@pytest.mark.first_night
def test_the_same_night_again_changes_no_file(world: World, capsys: Capture) -> None:
    before = {p: p.stat().st_mtime_ns for p in world.root.rglob("*.parquet")}
    files = published(world)
    assert len(files) > 20
    assert refresh(world, DAYS[0]) == 0
    assert "nothing to do" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in world.root.rglob("*.parquet")} == before
    assert published(world) == files


@pytest.mark.first_night
def test_a_night_that_died_before_it_was_named_the_newest_is_named_by_the_same_command(
    world: World, capsys: Capture
) -> None:
    path = world.root / "test/_nights/latest.json"
    right = path.read_bytes()
    before = published(world)
    path.unlink()
    assert refresh(world, DAYS[0]) == 0
    assert path.read_bytes() == right
    assert published(world) == before
    inode = path.stat().st_ino
    assert refresh(world, DAYS[0]) == 0
    assert path.stat().st_ino == inode


@pytest.mark.first_night
def test_the_same_night_on_an_empty_root_gives_the_same_bytes(world: World) -> None:
    before = published(world)
    files.delete_tree(str(world.root))
    assert refresh(world, DAYS[0]) == 0
    assert published(world) == before


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(
    world: World, capsys: Capture
) -> None:
    assert refresh(world, DAYS[0], "--dry-run") == 0
    out = capsys.readouterr().out
    assert all(stage in out for stage in ("embed", "item-features", "histories", "simscore"))
    assert out.count("compute") == 4
    assert not world.root.exists()
    assert refresh(world, DAYS[0]) == 0
    capsys.readouterr()
    assert refresh(world, DAYS[0], "--dry-run", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert {s["action"] for s in plan["stages"]} == {"leave alone: published from the same inputs"}


def test_stages_one_by_one_make_what_the_whole_night_makes(world: World, capsys: Capture) -> None:
    assert courier(world, "item-features", "--ds", str(DAYS[0])) == 4
    assert "courier embed --ds 2026-03-01" in paragraph(capsys)
    for stage in ("embed", "item-features", "simscore"):
        assert courier(world, stage, "--ds", str(DAYS[0])) == 0
    apart = published(world)
    assert refresh(world, DAYS[0]) == 0
    records = {f"test/_nights/ds={DAYS[0]}.json", "test/_nights/latest.json"}
    together = published(world)
    assert set(together) - set(apart) == records
    assert {k: v for k, v in together.items() if k not in records} == apart
    capsys.readouterr()
    assert courier(world, "status") == 0
    assert "whole" in capsys.readouterr().out


# ---- Only what changed -------------------------------------------------------------------------


@pytest.mark.first_night
def test_an_image_is_read_only_when_its_file_and_embedded_only_when_its_bytes_changed(
    world: World,
) -> None:
    first = embed_work(world, DAYS[0])
    # One is not there, another is no image, and two of the eleven files that are have equal bytes.
    work = ("images_read", "images_embedded", "images_reused", "images_unchanged")
    assert [first[name] for name in work] == [11, 9, 1, 0]
    changed, touched, left = NORMAL[0], NORMAL[1], NORMAL[2]
    world.put(changed, picture(77))
    os.utime(world.image(touched), ns=(2 * 10**18, 2 * 10**18))
    items = [i for i in catalogue_items(DAYS[0]) if i != left]
    world.write_catalogue(DAYS[1], items)
    assert refresh(world, DAYS[1]) == 0
    second = embed_work(world, DAYS[1])
    # Read: changed, touched and the reject that has a file. The item that left is not looked at.
    assert [second[name] for name in work] == [3, 1, 1, 8]
    assert (second["rejects_waiting"], second["former_items"]) == (0, 1)
    before, after = (vectors(world, day) for day in DAYS[:2])
    assert after[changed] != before[changed]
    assert after[touched] == before[touched]
    assert after[left] == before[left]


@pytest.mark.first_night
def test_a_new_encoder_embeds_everything_anew_former_items_too(
    world: World, artefacts: Artefacts, tmp_path: Path
) -> None:
    encoder = make_encoder(tmp_path / "other", seed=1)
    world.pin(DAYS[1], encoder, make_codebook(tmp_path / "other", encoder))
    assert refresh(world, DAYS[1]) == 3  # its cluster IDs mean something else
    assert (
        refresh(world, DAYS[1], "--accept", "churn", "--reason", "a test") == 0
    )  # item 7 left, its file is still there
    second = embed_work(world, DAYS[1])
    assert (second["images_unchanged"], second["images_embedded"]) == (0, 10)
    assert second["images_reused"] == 1  # two of the eleven have equal bytes
    assert second["former_items"] == 1
    ids = set(world.table("user_simscores", DAYS[1])["encoder_id"].to_pylist())
    assert ids == {os.path.basename(encoder)}


@pytest.mark.first_night
def test_a_reject_heals_once_its_image_is_there(world: World) -> None:
    world.put(MISSING, picture(50))
    assert refresh(world, DAYS[1]) == 0
    assert MISSING in vectors(world, DAYS[1])
    assert MISSING not in world.table("item_rejects", DAYS[1])["item_id"].to_pylist()


# ---- Killed ------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.85, 0.97])
def test_a_night_that_died_at_any_write_ends_as_if_it_had_not(
    refreshed_once: tuple[World, dict[str, bytes], int], share: float
) -> None:
    world, uninterrupted, writes = refreshed_once
    files.delete_tree(str(world.root))
    with pytest.MonkeyPatch.context() as patch:
        die_at_write(patch, int(writes * share))
        with pytest.raises(Killed):
            refresh(world, DAYS[0])
    assert published(world) != uninterrupted
    assert refresh(world, DAYS[0]) == 0
    assert published(world) == uninterrupted


@pytest.fixture(scope="module")
def refreshed_once(
    tmp_path_factory: pytest.TempPathFactory, artefacts: Artefacts
) -> tuple[World, dict[str, bytes], int]:
    """Makes a world; returns it, what its first night publishes, and how many files that writes."""
    world = pinned(World(tmp_path_factory.mktemp("killed") / "shop"), artefacts)
    with pytest.MonkeyPatch.context() as patch:
        written = die_at_write(patch, None)
        assert refresh(world, DAYS[0]) == 0
    assert len(written) > 60
    return world, published(world), len(written)


def start(python: str, world: World, day: dt.date, *args: str) -> subprocess.Popen[str]:
    world.settings()
    command = [python, "-m", "pipelines.cli", "refresh", "--config", str(world.config)]
    return subprocess.Popen(
        [*command, "--ds", str(day), *args],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def wait_until_free(folder: str) -> None:
    """Waits until nobody holds a lock: a warm process ends a moment after whoever stands for it."""
    deadline = time.monotonic() + 30
    while True:
        try:
            with files.lock(folder):
                return
        except BlockingIOError:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_night_killed_with_signal_9_while_embedding_resumes_and_embeds_no_image_twice(
    refreshed_once: tuple[World, dict[str, bytes], int],
    monkeypatch: pytest.MonkeyPatch,
    warm_python: str,
) -> None:
    world, uninterrupted, _ = refreshed_once
    files.delete_tree(str(world.root))
    process = start(warm_python, world, DAYS[0])
    wait_for(lambda: len(list(world.root.rglob("chunks-*/0*.arrow"))) >= 2, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_until_free(f"{world.root}/test/_locks/items/ds={DAYS[0]}")
    assert published(world) == {}
    done = [read_all(str(path)) for path in world.root.rglob("chunks-*/0*.arrow")]
    embedded = sum(len(rows) - rows["embedding"].null_count for rows in done)
    assert embedded
    images = given_to_the_encoder(monkeypatch)
    assert refresh(world, DAYS[0]) == 0
    assert published(world) == uninterrupted
    # One that is not there needs no reading to know it; one that is no image is tried once more.
    assert len(images) == len(catalogue_items(DAYS[0])) - 1 - embedded


def test_a_terminated_night_exits_143_publishes_nothing_and_resumes(
    refreshed_once: tuple[World, dict[str, bytes], int],
) -> None:
    world, uninterrupted, _ = refreshed_once
    files.delete_tree(str(world.root))
    process = start(sys.executable, world, DAYS[0])
    wait_for(lambda: any(world.root.rglob("receipts/*.json")), process)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "Traceback" not in errors
    assert published(world) == {}
    assert refresh(world, DAYS[0]) == 0
    assert published(world) == uninterrupted


# ---- On several worker processes ---------------------------------------------------------------


PROCESSES = ("--", "--direct_running_mode=multi_processing", "--direct_num_workers=2")


def test_worker_processes_make_the_same_bytes(
    refreshed_once: tuple[World, dict[str, bytes], int],
    monkeypatch: pytest.MonkeyPatch,
    warm_python: str,
) -> None:
    monkeypatch.setattr(sys, "executable", warm_python)  # with which Beam starts its workers
    told, real = list[Usage](), worker_notes.used_by_workers

    def used_by_workers(staging: str) -> Usage:
        told.append(real(staging))
        return told[-1]

    monkeypatch.setattr(worker_notes, "used_by_workers", used_by_workers)
    world, uninterrupted, _ = refreshed_once
    files.delete_tree(str(world.root))
    assert refresh(world, DAYS[0], *PROCESSES) == 0
    assert published(world) == uninterrupted
    (path,) = (world.root / "test/_runs").rglob("run.json")
    stages = json.loads(path.read_text())["stages"].values()
    for used, stage in zip(told, stages, strict=True):  # what they told is part of what is noted
        assert 0 < used.cpu_seconds < stage["cpu_seconds"]
        assert 0 < used.bytes_read < stage["bytes_read"]
        assert 10_000_000 < used.peak_memory_bytes <= stage["peak_memory_bytes"]


def test_what_a_worker_process_refuses_is_told_in_one_paragraph(
    world: World, warm_python: str
) -> None:
    world.write_catalogue(DAYS[0], [*catalogue_items(DAYS[0]), NORMAL[0]])
    process = start(warm_python, world, DAYS[0], *PROCESSES)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "Traceback" not in errors
    (told,) = [line for line in errors.splitlines() if line.startswith("Error: ")]
    assert "1 items twice or more" in told


# ---- Odd days and shops --------------------------------------------------------------------------


@pytest.mark.first_night
def test_an_empty_day_publishes_empty_tables(world: World) -> None:
    for table in ("catalogue", "impressions"):
        world.write(table, DAYS[1], [], rows_to_group=1)
    assert refresh(world, DAYS[1]) == 0
    assert len(world.table("user_simscores", DAYS[1])) == 0
    features = world.table("item_features", DAYS[1]).to_pylist()
    assert len(features) == 10  # all former now
    assert not any(row["in_catalogue"] for row in features)
    assert len(world.table("user_histories", DAYS[1])) == 5


@pytest.mark.first_night
def test_a_day_on_which_the_shop_was_closed_publishes_empty_tables(
    world: World, capsys: Capture
) -> None:
    for table in ("catalogue", "impressions"):
        files.delete_tree(str(world.folder / table / f"ds={DAYS[1]}"))
    assert refresh(world, DAYS[1]) == 4
    assert f'closed_days = ["{DAYS[1]}"]' in paragraph(capsys)
    world.extra_settings = f'closed_days = ["{DAYS[1]}"]'
    assert refresh(world, DAYS[1]) == 0
    assert len(world.table("user_simscores", DAYS[1])) == 0
    assert not any(world.table("item_features", DAYS[1])["in_catalogue"].to_pylist())
    assert refresh(world, DAYS[2]) == 0
    assert any(world.table("item_features", DAYS[2])["in_catalogue"].to_pylist())


def test_the_first_day_of_all_may_be_empty(world: World) -> None:
    for table in ("catalogue", "impressions"):
        world.write(table, DAYS[0], [], rows_to_group=1)
    assert refresh(world, DAYS[0]) == 0
    for table in ("item_embeddings", "item_features", "user_simscores", "user_histories"):
        assert len(world.table(table, DAYS[0])) == 0


def test_carried_columns_and_the_shops_own_impression_ids_pass_through(world: World) -> None:
    number = itertools.count()

    def add(rows: pa.Table) -> pa.Table:
        n = len(rows)
        ids = [f"{user}-{next(number)}" for user in rows["user_id"].to_pylist()]
        return rows.append_column("impression_id", pa.array(ids)).append_column(
            "price", pa.array([0.5 * k for k in range(n)])
        )

    for day in DAYS:
        rewrite(world, day, add)
    given = pa.concat_tables(
        pq.read_table(p, partitioning=None)
        for p in (world.folder / "impressions" / f"ds={DAYS[0]}").glob("*.parquet")
    )
    world.extra_settings = ""
    world.settings()
    text = world.config.read_text().replace("[embed]", 'carry = ["price"]\n[embed]')
    world.config.write_text(text)
    args = ["refresh", "--config", str(world.config), "--ds", str(DAYS[0])]
    assert main(args) == 0
    found = world.table("user_simscores", DAYS[0])
    key = ("impression_id", "item_id", "price")
    wanted = sorted(zip(*(given[c].to_pylist() for c in key), strict=True))
    assert sorted(zip(*(found[c].to_pylist() for c in key), strict=True)) == wanted


def test_a_request_id_is_carried_as_it_is_nulls_too(world: World) -> None:
    for day in DAYS:
        rewrite(
            world,
            day,
            lambda rows: rows.append_column(
                "request_id", pa.array(["r", None] * len(rows), pa.string())[: len(rows)]
            ),
        )
    world.settings()
    text = world.config.read_text().replace("[embed]", 'carry = ["request_id"]\n[embed]')
    world.config.write_text(text)
    assert main(["refresh", "--config", str(world.config), "--ds", str(DAYS[0])]) == 0
    assert set(world.table("user_simscores", DAYS[0])["request_id"].to_pylist()) == {"r", None}


def test_a_logged_history_is_scored_as_it_is(world: World) -> None:
    logged = [1, 2, UNKNOWN, 3, 1, 4, 5, 6]
    rewrite(
        world, DAYS[0], lambda rows: rows.append_column("history", pa.array([logged] * len(rows)))
    )
    assert refresh(world, DAYS[0]) == 0
    assert manifest(world, "user_simscores", DAYS[0])["notes"]["logged_histories"]
    rows = world.table("user_simscores", DAYS[0]).to_pylist()
    assert all(row["history_item_ids"] == logged[:5] for row in rows)
    known = [row for row in rows if row["sim_known"]]
    assert known
    assert all(row["sim_mask"] == [1, 1, 0, 1, 1] for row in known)


@pytest.mark.first_night
def test_rollback_brings_the_night_before_back_whole_and_forward_again(
    world: World, capsys: Capture
) -> None:
    first = published(world)
    assert courier(world, "rollback", "--ds", str(DAYS[0])) == 2
    assert "published once" in paragraph(capsys)
    assert published(world) == first
    world.write_catalogue(DAYS[0], [i for i in catalogue_items(DAYS[0]) if i != NORMAL[0]])
    assert refresh(world, DAYS[0]) == 0
    world.write_impressions(DAYS[0], draw_impressions(DAYS[0], seed=9))
    assert refresh(world, DAYS[0]) == 0  # changes the scores, not the items
    nights = [tables_of(world)]
    for _ in range(2):
        assert courier(world, "rollback", "--ds", str(DAYS[0])) == 0
        nights.append(tables_of(world))
        assert is_whole(world, capsys)
        assert courier(world, "rollback", "--ds", str(DAYS[0]), "--release") == 0
    before_last = [r for r in nights[1]["user_simscores"] if r["item_id"] == NORMAL[0]]
    assert before_last
    assert not any(row["sim_known"] for row in before_last)  # the item had left by then
    assert nights[0]["user_simscores"] != nights[1]["user_simscores"]
    assert nights[0]["item_features"] == nights[1]["item_features"]
    assert nights[2] == nights[0]


def tables_of(world: World) -> dict[str, list[dict[str, Any]]]:
    names = ("item_embeddings", "item_features", "user_simscores")
    return {name: world.table(name, DAYS[0]).to_pylist() for name in names}


def is_whole(world: World, capsys: Capture) -> bool:
    capsys.readouterr()
    assert courier(world, "status", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    return bool(found["days"][str(DAYS[0])]["whole_night"])


# ---- What a night depends on -------------------------------------------------------------------


@pytest.mark.first_night
def test_tables_made_from_embeddings_that_were_made_again_are_made_again(
    world: World, capsys: Capture
) -> None:
    world.put(MISSING, picture(50))
    files.delete_tree(str(world.root / "test" / "item_embeddings"))
    assert refresh(world, DAYS[0]) == 0
    row = [r for r in world.table("item_features", DAYS[0]).to_pylist() if r["item_id"] == MISSING]
    assert row[0]["has_image"]
    assert is_whole(world, capsys)


def test_a_chunk_of_a_refused_night_is_not_used_for_an_image_that_changed_since(
    world: World,
) -> None:
    world.settings()
    text = world.config.read_text().replace("rejects.fail = 0.5", "rejects.fail = 0.1")
    world.config.write_text(text)
    args = ["embed", "--config", str(world.config), "--ds", str(DAYS[0])]
    assert main(args) == 3
    world.put(MISSING, picture(50))
    world.put(NORMAL[0], picture(77))
    assert main(args) == 0
    changed = vectors(world, DAYS[0])[NORMAL[0]]
    files.delete_tree(str(world.root))
    assert main(args) == 0
    assert vectors(world, DAYS[0])[NORMAL[0]] == pytest.approx(changed, abs=1e-6)


def test_another_size_of_shards_between_kill_and_resume_does_no_harm(world: World) -> None:
    with pytest.MonkeyPatch.context() as patch:
        die_at_write(patch, 60)
        with pytest.raises(Killed):
            refresh(world, DAYS[0])
    world.rows_per_shard = 5
    assert refresh(world, DAYS[0]) == 0
    resumed = published(world)
    files.delete_tree(str(world.root))
    assert refresh(world, DAYS[0]) == 0
    assert published(world) == resumed


@pytest.mark.first_night
def test_the_scope_of_the_encoder_is_part_of_what_features_depend_on(
    world: World, tmp_path: Path, artefacts: Artefacts
) -> None:
    narrower = make_encoder(tmp_path / "narrower", categories=("dress",))
    assert os.path.basename(narrower) == os.path.basename(artefacts.encoder)
    world.pins.clear()
    world.pin(DAYS[0], narrower, artefacts.codebook)
    assert refresh(world, DAYS[0]) == 0
    rows = world.table("item_features", DAYS[0]).to_pylist()
    assert {row["category"] for row in rows if row["in_scope"]} == {"dress"}


def test_a_click_counts_to_the_windows_edge_whatever_partition_it_came_in(world: World) -> None:
    """A click after midnight, shown late on day 1, is still within two days of early on day 4."""
    midnight = int(dt.datetime.combine(DAYS[1], dt.time(), dt.UTC).timestamp()) * 1_000_000
    minute = 60_000_000
    blank = {"user": 1, "clicked": False, "click_time": None}
    click = {"item": 2, "event_time": midnight - 6 * minute, "clicked": True}
    world.write_impressions(DAYS[0], [{**blank, **click, "click_time": midnight + 30 * minute}] * 3)
    for day in DAYS[1:3]:
        world.write("impressions", day, [], rows_to_group=1)
    moment = midnight + 2 * 86_400_000_000 + 15 * minute
    world.write_impressions(DAYS[3], [{**blank, "item": 3, "event_time": moment}] * 3)
    assert refresh(world, DAYS[3]) == 0
    rows = world.table("user_simscores", DAYS[3]).to_pylist()
    assert [row["history_item_ids"] for row in rows] == [[2]] * 3


@pytest.mark.first_night
def test_two_feature_sets_do_not_fight_over_shared_histories(world: World, capsys: Capture) -> None:
    before = published(world)
    text = world.config.read_text().replace('feature_set = "test"', 'feature_set = "other"')
    args = ["refresh", "--config", str(world.config), "--ds", str(DAYS[0])]
    world.config.write_text(text.replace("history_len = 5", "history_len = 3"))
    assert main(args) == 2
    assert "would undo the other's night" in paragraph(capsys)
    assert published(world) == before
    world.config.write_text(text)
    assert main(args) == 0
    assert published(world).items() >= before.items()
