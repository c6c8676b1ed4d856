"""Tests that bad input gives one paragraph and the right exit status; published tables stay."""

import datetime as dt
import errno
import hashlib
import itertools
import os
from pathlib import Path
from types import ModuleType

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from feature_jobs.impressions import histories, simscore
from feature_jobs.items import embed_walk
from feature_jobs.store import faults, files, hashing
from pipelines.cli import main
from tests.conftest import Artefacts, pinned
from tests.support.commands import (
    Capture,
    courier,
    manifest,
    paragraph,
    published,
    refresh,
    rewrite,
)
from tests.support.ill_disk import watch_disk
from tests.support.small_nights import is_whole_night
from tests.support.world import (
    DAYS,
    NORMAL,
    UNKNOWN,
    World,
    catalogue_items,
    draw_impressions,
    make_codebook,
    make_encoder,
)

# ---- Refused -----------------------------------------------------------------------------------


@pytest.mark.first_night
def test_too_many_rejects_publish_nothing_and_a_mended_night_embeds_only_them(
    world: World, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = published(world)
    images = [world.image(n) for n in (*NORMAL, 8)]
    hidden = [(path, path.read_bytes(), path.stat().st_mtime_ns) for path in images]
    for path, *_ in hidden:
        path.unlink()
    assert refresh(world, DAYS[1]) == 3
    message = paragraph(capsys)
    assert "9 of 12 catalogue items with an address have no readable image" in message
    assert "--accept image_coverage --accept rejects --accept outage --reason" in message
    assert published(world) == before
    for path, data, mtime in hidden:
        path.write_bytes(data)
        os.utime(path, ns=(mtime, mtime))
    assert refresh(world, DAYS[1]) == 0
    assert len(world.table("item_rejects", DAYS[1])) == 2


def test_too_many_unknown_items_publish_nothing(world: World, capsys: Capture) -> None:
    rows = [{**row, "item": UNKNOWN} for row in draw_impressions(DAYS[0], seed=0)]
    world.write_impressions(DAYS[0], rows)
    assert refresh(world, DAYS[0]) == 3
    assert "152 of 152 impressions are of items that the catalogue lacks" in paragraph(capsys)
    assert published(world) == {}
    world.write_impressions(DAYS[0], draw_impressions(DAYS[0], seed=0))
    assert refresh(world, DAYS[0]) == 0


def test_a_cluster_of_equal_pictures_is_put_down_to_their_bytes(
    world: World, capsys: Capture
) -> None:
    for number in NORMAL:
        world.put(number, world.image(1).read_bytes())
    world.gates = "balance.fail = 0.5\ndead_clusters.fail = 1.0"
    assert refresh(world, DAYS[0]) == 3
    message = capsys.readouterr().err
    assert "items with a cluster ID (main) are in cluster" in message
    digest = hashlib.sha256(world.image(1).read_bytes()).hexdigest()
    assert f"the very same picture, byte for byte (sha256 {digest}, for example item 1)" in message
    assert "An encoder that takes" not in message


def test_a_catalogue_without_one_readable_image_is_refused(world: World, capsys: Capture) -> None:
    (world.folder / "images").rename(world.folder / "elsewhere")
    assert refresh(world, DAYS[0]) == 1
    message = paragraph(capsys)
    assert "Not one of the 12 catalogue images can be read (missing 12)" in message
    assert "image_roots" in message
    assert published(world) == {}


@pytest.mark.parametrize(
    ("module", "name", "told"),
    [
        (embed_walk, "assemble_rejects", "item_rejects: found 11, expected 12"),
        (simscore, "sort_impressions", "went into it. Rows were lost or doubled"),
    ],
)
def test_tables_that_do_not_add_up_publish_nothing_and_are_made_again(
    world: World, capsys: Capture, module: ModuleType, name: str, told: str
) -> None:
    make = getattr(module, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, lambda *given: make(*given).slice(1))  # a row of each shard
        assert refresh(world, DAYS[0]) == 1
    assert told in paragraph(capsys)
    assert published(world) == {}
    assert refresh(world, DAYS[0]) == 0


def test_tables_that_do_not_add_up_are_read_by_no_other_command(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, day = embed_walk.assemble_rejects, str(DAYS[0])
    monkeypatch.setattr(embed_walk, "assemble_rejects", lambda *given: make(*given).slice(1))
    assert courier(world, "embed", "--ds", day) == 1
    assert courier(world, "item-features", "--ds", day) == 4
    assert published(world) == {}


@pytest.mark.first_night
@pytest.mark.parametrize("name", ["results/", "item_features/.tmp-", "_manifest.json"])
def test_a_full_disk_is_told_with_the_file_and_a_night_goes_on_once_there_is_room(
    world: World, capsys: Capture, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    before, files_of_night = published(world), []

    def has_no_room(what: str, path: str) -> None:
        if what == "open file" and name in path and ".tmp-" in path:
            files_of_night.append(path)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(faults, "FULL_SECONDS", 0.01)
    with pytest.MonkeyPatch.context() as patch:
        watch_disk(patch, has_no_room)
        assert refresh(world, DAYS[1]) == 1
    message = paragraph(capsys)
    assert f"Error: {os.path.dirname(files_of_night[0])}/" in message
    assert "could not be written ([Errno 28] No space left on device" in message
    assert published(world).items() >= before.items()
    assert not is_whole_night(world.settings().layout, DAYS[1])
    assert refresh(world, DAYS[1]) == 0


@pytest.mark.first_night
def test_a_duplicate_item_is_refused_and_what_was_published_stays(
    world: World, capsys: Capture
) -> None:
    before = published(world)
    world.write_catalogue(DAYS[0], [*catalogue_items(DAYS[0]), NORMAL[0]])
    assert refresh(world, DAYS[0]) == 1
    message = paragraph(capsys)
    assert "item_id 1." in message
    assert "Deduplicate" in message
    assert published(world) == before
    world.write_catalogue(DAYS[0], catalogue_items(DAYS[0]))
    assert refresh(world, DAYS[0]) == 0


def test_an_event_after_its_day_is_refused_without_naming_the_user(
    world: World, capsys: Capture
) -> None:
    rows = draw_impressions(DAYS[0], seed=0)
    rows[5] = {**rows[5], "event_time": rows[5]["event_time"] + 3 * 86_400_000_000, "user": 4}
    world.ids = "string"
    world.write_catalogue(DAYS[0], catalogue_items(DAYS[0]))
    for number, day in enumerate(DAYS):
        world.write_impressions(day, draw_impressions(day, seed=number))
    world.write_impressions(DAYS[0], rows)
    assert refresh(world, DAYS[0]) == 1
    message = paragraph(capsys)
    assert "lie after their day" in message
    assert f"item-{rows[5]['item']}" in message
    assert "user-" not in message
    assert published(world) == {}


def test_unreadable_parquet_and_missing_partitions_have_their_own_status(
    world: World, capsys: Capture
) -> None:
    broken = world.folder / "impressions" / f"ds={DAYS[0]}" / "1.parquet"
    broken.write_bytes(b"not parquet")
    assert refresh(world, DAYS[0]) == 1
    assert str(broken) in paragraph(capsys)
    assert refresh(world, dt.date(2026, 4, 1)) == 4
    assert "no partition for ds 2026-04-01" in paragraph(capsys)
    assert published(world) == {}


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--ds", "2026-3-1x"], "is no date YYYY-MM-DD"),
        (["--ds", "2026-02-27"], "No pin holds for ds 2026-02-27"),
        (["--ds", "2026-03-01", "--", "--num_worker=3"], "Did you mean --num_workers"),
        (["--ds", "2026-03-01", "2026-03-02"], "Unexpected argument"),
        (["--ds", "2026-03-01", "--nonsense"], "nonsense"),
        ([], "Give one day as --ds"),
    ],
)
def test_wrong_usage_exits_2_before_anything_is_made(
    world: World, capsys: Capture, args: list[str], told: str
) -> None:
    assert courier(world, "refresh", *args) == 2
    assert told in capsys.readouterr().err
    assert not world.root.exists()


def test_an_unknown_setting_exits_2_and_names_the_nearest(world: World, capsys: Capture) -> None:
    world.extra_settings = "history_length = 5"
    with pytest.raises(Exception, match="did you mean 'history_len'"):
        world.settings()
    assert main(["refresh", "--config", str(world.config), "--ds", str(DAYS[0])]) == 2
    assert "did you mean 'history_len'" in paragraph(capsys)


def test_a_codebook_of_another_encoder_is_refused(
    world: World, tmp_path: Path, capsys: Capture, artefacts: Artefacts
) -> None:
    other = make_encoder(tmp_path / "other", seed=1)
    world.pin(DAYS[1], other, artefacts.codebook)
    assert refresh(world, DAYS[1]) == 2
    message = paragraph(capsys)
    assert "mixes two encoders" in message
    assert os.path.basename(other) in message


def test_a_codebook_made_from_the_day_itself_serves_only_the_first_day_or_when_allowed(
    world: World, tmp_path: Path, capsys: Capture, artefacts: Artefacts
) -> None:
    late = make_codebook(tmp_path / "late", artefacts.encoder, data_ds=str(DAYS[1]))
    world.pins.clear()
    world.pin(DAYS[0], artefacts.encoder, late)
    assert refresh(world, DAYS[0]) == 0
    assert manifest(world, "item_features", DAYS[0])["notes"] == {"bootstrap": True}
    assert refresh(world, DAYS[1]) == 2
    assert "would know their own future" in paragraph(capsys)
    assert refresh(world, DAYS[1], "--allow-overlap") == 0
    notes = manifest(world, "item_features", DAYS[1])["notes"]
    assert notes == {"codebook_overlap_allowed": True}
    assert refresh(world, DAYS[2]) == 0
    assert manifest(world, "item_features", DAYS[2])["notes"] == {}


# ---- More bad input ----------------------------------------------------------------------------


def edit(world: World, old: str, new: str) -> list[str]:
    world.settings()
    text = world.config.read_text()
    assert old in text
    world.config.write_text(text.replace(old, new))
    return ["refresh", "--config", str(world.config), "--ds", str(DAYS[0])]


def test_files_that_the_pattern_misses_are_not_taken_for_an_empty_day(
    world: World, capsys: Capture
) -> None:
    assert main(edit(world, "impressions/ds={ds}/*.parquet", "impressions/ds={ds}/x*.parquet")) == 1
    assert "Taken for an empty day" in paragraph(capsys)
    assert published(world) == {}


def test_a_folder_with_brackets_is_a_folder_like_any_other(
    tmp_path: Path, artefacts: Artefacts
) -> None:
    world = pinned(World(tmp_path / "shop [1]"), artefacts)
    assert refresh(world, DAYS[0]) == 0
    assert len(world.table("user_simscores", DAYS[0])) == 152


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("impressions/ds={ds}/", "impressions/ds=2026-03-01/", "one partition for each day"),
        ("impressions/ds={ds}/", "impressions/ds={date}/", "knows {ds} only"),
        ("window_days = 2", "window_days = 1000000", "window_days"),
        ("[embed]", 'carry = ["ds"]\n[embed]', "carry"),
    ],
)
def test_settings_that_could_not_work_exit_2(
    world: World, capsys: Capture, old: str, new: str, told: str
) -> None:
    assert main(edit(world, old, new)) == 2
    assert told in paragraph(capsys)


def test_an_optional_column_that_the_settings_name_must_be_there(
    world: World, capsys: Capture
) -> None:
    new = '[impressions.columns]\nclick_time = "clck_time"\n[embed]'
    assert main(edit(world, "[embed]", new)) == 1
    assert "lacks the column 'clck_time'" in paragraph(capsys)


def test_an_empty_catalogue_with_impressions_is_refused_by_the_gate(
    world: World, capsys: Capture
) -> None:
    world.write("catalogue", DAYS[0], [], rows_to_group=1)
    assert refresh(world, DAYS[0]) == 3
    assert "152 of 152 impressions" in paragraph(capsys)


def test_a_categorical_carried_column_passes_through_as_text(world: World) -> None:
    def add(rows: pa.Table) -> pa.Table:
        return rows.append_column(
            "device", pa.array(["a", "b"] * 60)[: len(rows)].dictionary_encode()
        )

    for day in DAYS:
        rewrite(world, day, add)
    assert main(edit(world, "[embed]", 'carry = ["device"]\n[embed]')) == 0
    assert set(world.table("user_simscores", DAYS[0])["device"].to_pylist()) == {"a", "b"}


def test_the_shops_impression_ids_keep_their_type(world: World) -> None:
    ids = itertools.count()
    for day in DAYS:
        rewrite(world, day, lambda rows: with_ids(rows, [next(ids) for _ in range(len(rows))]))
    assert refresh(world, DAYS[0]) == 0
    assert world.table("user_simscores", DAYS[0]).schema.field("impression_id").type == pa.int64()


def with_ids(rows: pa.Table, ids: list[int]) -> pa.Table:
    return rows.append_column("impression_id", pa.array(ids))


def test_an_impression_id_that_two_rows_have_is_refused(world: World, capsys: Capture) -> None:
    rewrite(world, DAYS[0], lambda rows: with_ids(rows, [7] * len(rows)))
    assert refresh(world, DAYS[0]) == 1
    told = paragraph(capsys)
    assert "impression_id 7, for example, is that of several impressions of one day" in told


def test_an_impression_id_of_users_in_two_shards_is_refused(world: World, capsys: Capture) -> None:
    users = pc.unique(pa.array([row["user"] for row in draw_impressions(DAYS[0], seed=0)]))
    shards = hashing.shard_of(hashing.hash_ids(users), 16)
    one, other = users[0].as_py(), users[int(np.flatnonzero(shards != shards[0])[0])].as_py()
    ids, left = itertools.count(), {one, other}

    def add(rows: pa.Table) -> pa.Table:
        found = []
        for user in rows["user_id"].to_pylist():
            found.append(-1 if user in left else next(ids))
            left.discard(user)
        return with_ids(rows, found)

    rewrite(world, DAYS[0], add)
    assert not left
    assert refresh(world, DAYS[0]) == 1
    assert "impression_id -1, for example, is that of several" in paragraph(capsys)


# ---- Days of the log that cannot be meant ------------------------------------------------------


def as_seconds(rows: pa.Table) -> pa.Table:
    """Returns a log that has counted seconds and calls them milliseconds."""
    for name in ("event_time", "click_time"):
        seconds = pc.divide(rows[name].cast(pa.int64()), 1_000_000)
        wrong = seconds.cast(pa.timestamp("ms", "UTC"))
        rows = rows.set_column(rows.column_names.index(name), name, wrong)
    return rows


@pytest.mark.parametrize("command", ["refresh", "histories", "training-rows"])
def test_a_day_in_january_1970_is_refused_by_who_reads_its_log(
    world: World, capsys: Capture, command: str
) -> None:
    rewrite(world, DAYS[0], as_seconds)
    assert courier(world, command, "--ds", str(DAYS[0])) == 1
    told = paragraph(capsys)
    assert "152 of the 152 impressions of ds 2026-03-01 lie before that day" in told
    assert "1970-01-21" in told
    assert published(world) == {}


def test_a_day_of_other_times_is_refused_by_simscore_alone(
    world: World, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(histories, "JudgeDays", lambda *_: beam.Map(lambda told: None))
    rewrite(world, DAYS[0], as_seconds)
    assert refresh(world, DAYS[0]) == 1
    assert "152 of the 152 impressions of ds 2026-03-01" in paragraph(capsys)


def test_one_request_id_for_a_day_is_refused_by_training_rows(
    world: World, capsys: Capture
) -> None:
    def add(rows: pa.Table) -> pa.Table:
        return rows.append_column("request_id", pa.array(["r"] * len(rows)))

    for day in DAYS[:2]:
        rewrite(world, day, add)
    assert courier(world, "training-rows", "--ds", str(DAYS[1])) == 1
    assert "have the request_id 'r'" in paragraph(capsys)


def test_clicks_of_the_year_9999_in_int96_are_left_out_and_told(
    world: World, capsys: Capture
) -> None:
    # As Spark writes them; a wrapped one would be a click of 1816, and so one at its impression.
    def never(rows: pa.Table) -> pa.Table:
        far = dt.datetime(9999, 12, 31)
        rows = rows.drop_columns(["click_time"])
        return rows.append_column("click_time", pa.array([far] * len(rows), pa.timestamp("us")))

    clicked = 0
    for path in (world.folder / "impressions" / f"ds={DAYS[0]}").glob("*.parquet"):
        rows = pq.read_table(path, partitioning=None)
        clicked += sum(rows["clicked"].to_pylist())
        some = pa.concat_tables([never(rows.slice(0, 9)), naive(rows.slice(9))])
        pq.write_table(some, path, use_deprecated_int96_timestamps=True)
    edit(world, "[embed]", 'input_timezone = "UTC"\n[embed]')
    assert main(["histories", "--config", str(world.config), "--ds", str(DAYS[0])]) == 0
    assert "dated more than window_days after its end" in capsys.readouterr().err
    lists = world.table("user_histories", DAYS[0])["click_times"].to_pylist()
    assert {time.year for times in lists for time in times} == {2026}


def naive(rows: pa.Table) -> pa.Table:
    times = rows["click_time"].cast(pa.timestamp("us"))
    return rows.drop_columns(["click_time"]).append_column("click_time", times)


# ---- Two snapshots taken for one -----------------------------------------------------------------


def test_two_days_taken_for_one_snapshot_are_told_as_that(world: World, capsys: Capture) -> None:
    assert main(edit(world, "catalogue/ds={ds}/", "catalogue/*/")) == 2
    told = paragraph(capsys)
    assert "names no day" in told
    assert f"matches files of {len(DAYS)} days, such as {DAYS[-2]} and {DAYS[-1]}" in told
    assert "Write {ds}" in told
    assert published(world) == {}


def test_digits_in_the_names_that_spark_gives_are_no_days(world: World, capsys: Capture) -> None:
    for day in DAYS:
        folder = world.folder / "catalogue" / f"ds={day}"
        for at, path in enumerate(sorted(folder.glob("*.parquet"))):
            path.rename(folder / f"part-0000{at}-{at}2345678-1234-4123-8123-123456789012.parquet")
    assert main(edit(world, "catalogue/ds={ds}/", "catalogue/*/")) == 2
    assert f"files of {len(DAYS)} days, such as {DAYS[-2]} and {DAYS[-1]}" in paragraph(capsys)


def test_a_snapshot_in_folders_of_several_days_that_share_no_item_is_one(world: World) -> None:
    for day in DAYS[2:]:
        files.delete_tree(str(world.folder / "catalogue" / f"ds={day}"))
    items = catalogue_items(DAYS[0])
    for day, some in ((DAYS[0], items[:6]), (DAYS[1], items[6:])):
        world.write_catalogue(day, some)
    args = edit(world, "catalogue/ds={ds}/", "catalogue/*/")
    assert main(["embed", *args[1:]]) == 0


def test_text_that_is_not_utf8_is_refused(world: World, capsys: Capture) -> None:
    path = world.folder / "catalogue" / f"ds={DAYS[0]}" / "0.parquet"
    rows = pq.read_table(path, partitioning=None)
    bad = pa.array([b"\xff.png"] * len(rows)).cast(pa.string(), safe=False)
    rows = rows.set_column(rows.column_names.index("image_uri"), "image_uri", bad)
    pq.write_table(rows, path)
    assert refresh(world, DAYS[0]) == 1
    assert "not UTF-8" in paragraph(capsys)


def test_a_root_that_is_a_file_is_told_without_a_traceback(world: World, capsys: Capture) -> None:
    world.root.write_text("")
    assert refresh(world, DAYS[0]) == 1
    assert str(world.root) in paragraph(capsys)
