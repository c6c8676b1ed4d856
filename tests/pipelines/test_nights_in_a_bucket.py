"""Tests a shop whose tables, images, encoder, codebook and features all lie in a bucket."""

import datetime as dt
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from apache_beam.internal.gcp import auth

from feature_jobs.codebooks.codebook import load_codebook
from feature_jobs.schemas import ITEM_FEATURES, TABLES, TRAINING_ROWS
from feature_jobs.store import encoder_info, files, gcs_client, partitions, worker_notes
from feature_jobs.store.gcs import GcsStore
from feature_jobs.store.partitions import Partition
from pipelines import cli
from pipelines.cli import main
from pipelines.config import Settings, load_settings
from pipelines.running import locks
from tests.conftest import Artefacts
from tests.support.buckets import move, upload
from tests.support.commands import make_night
from tests.support.small_nights import is_whole_night
from tests.support.vector_shop import make_vector_shop
from tests.support.world import (
    DAYS,
    LEAVES_ON_DAY_2,
    NORMAL,
    World,
    catalogue_items,
    picture,
)  # fmt: skip

NIGHT = [table for table in TABLES.values() if table != TRAINING_ROWS]
# A disk has file times where a bucket has generations.
VERSIONS = ["image_generation", "image_mtime"]


@pytest.fixture
def in_bucket(
    world: World, artefacts: Artefacts, near_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Returns settings for the world as it is on its first day, moved to a bucket."""

    def look(*_: object) -> None:
        raise AssertionError("Beam looks for credentials, which takes it half a minute")

    monkeypatch.setattr(auth, "get_service_credentials", look)
    return move(world, near_bucket, artefacts.encoder, artefacts.codebook)


def test_a_shop_that_moved_to_another_prefix_is_the_same(in_bucket: Path, near_bucket: str) -> None:
    """`base` says where it lies: nothing else is spelt otherwise, and nothing is made again."""
    text = in_bucket.read_text().replace(f'"{near_bucket}/', '"')
    in_bucket.write_text(f'base = "{near_bucket}"\n{text}')
    make(load_settings(str(in_bucket)), DAYS[0])
    for name in [blob.name for blob in gcs_client.client().list_blobs("shop")]:
        files.write_bytes(f"gs://shop/moved/{name}", files.read_bytes(f"gs://shop/{name}"))
    in_bucket.write_text(f'base = "{near_bucket}/moved"\n{text}')
    settings = load_settings(str(in_bucket))
    assert settings.root == f"{near_bucket}/moved/features"
    assert make(settings, DAYS[0]) == [
        f"ds {DAYS[0]}: already published from the same inputs, nothing to do"
    ]


def test_a_night_that_is_there_is_read_little(
    in_bucket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a disk: of each of its tables three reads at most, and nothing twice."""
    settings = load_settings(str(in_bucket))
    make(settings, DAYS[0])
    reads: Counter[str] = Counter()
    for name in ("read_bytes", "open_input"):
        real = getattr(GcsStore, name)

        def count(store: GcsStore, path: str, *args: Any, real: Any = real) -> Any:
            reads[path] += path.startswith(settings.root)
            return real(store, path, *args)

        monkeypatch.setattr(GcsStore, name, count)
    assert "nothing to do" in make(settings, DAYS[0])[-1]
    assert max(reads.values()) == 1
    assert 2 * len(NIGHT) < reads.total() <= 3 * len(NIGHT)


def make(settings: Settings, ds: dt.date) -> list[str]:
    said: list[str] = []
    make_night(settings, ds, said.append)
    return said


def published(settings: Settings, name: str, ds: dt.date) -> Partition:
    folder = settings.layout.folder(TABLES[name], ds)
    return partitions.open_published(folder)


def rows_of(partition: Partition) -> pa.Table:
    rows = pa.concat_tables(partitions.read_parquet(path) for path in partition.paths)
    return rows.drop_columns([name for name in VERSIONS if name in rows.column_names])


def snapshot(settings: Settings) -> dict[str, object]:
    """Returns the versions of objects below the root, but for accounts of runs and their times."""
    found = files.find(f"{settings.root}/*/*/*/*") + files.find(f"{settings.root}/*/*/*")
    return {path: files.stat(path).version for path in found if "/_runs/" not in path}


@pytest.mark.parametrize("refreshed", ["int"], indirect=True)
def test_nights_in_a_bucket_have_the_tables_of_those_on_a_disk(
    refreshed: World, in_bucket: Path, near_bucket: str
) -> None:
    here, there = refreshed.settings(), load_settings(str(in_bucket))
    for ds in DAYS[:2]:
        if ds == DAYS[1]:
            files.delete(f"{near_bucket}/images/{LEAVES_ON_DAY_2}.png")
        make(there, ds)
        for table in NIGHT:
            mine, theirs = published(here, table.name, ds), published(there, table.name, ds)
            assert theirs.folder.startswith(f"{near_bucket}/features/")
            assert rows_of(mine).equals(rows_of(theirs)), table.name
            assert mine.rows > 0
            digests = [[f["sha256"] for f in p.manifest["files"]] for p in (mine, theirs)]
            assert (digests[0] == digests[1]) == (table.name != "item_embeddings"), table.name
            for file, at in zip(theirs.manifest["files"], theirs.paths, strict=True):
                assert file["sha256"] == files.sha256(at)
        assert is_whole_night(there.layout, ds)


def test_a_night_in_a_bucket_can_be_repeated_and_brought_back(
    world: World, in_bucket: Path, near_bucket: str
) -> None:
    settings = load_settings(str(in_bucket))
    make(settings, DAYS[0])
    first = snapshot(settings)
    assert len(first) > 10
    assert "nothing to do" in make(settings, DAYS[0])[-1]
    assert snapshot(settings) == first
    assert not files.is_folder(f"{settings.root}/_staging")
    before = rows_of(published(settings, "item_embeddings", DAYS[0]))

    files.write_bytes(f"{near_bucket}/images/{NORMAL[0]}.png", picture(50))
    arguments = ["--config", str(in_bucket), "--ds", str(DAYS[0])]
    assert main(["refresh", *arguments, "--dry-run"]) == 0
    world.write_catalogue(DAYS[0], catalogue_items(DAYS[0])[1:])
    files.delete_tree(f"{near_bucket}/catalogue")
    upload(world.folder / "catalogue", f"{near_bucket}/catalogue")
    make(settings, DAYS[0])
    after = rows_of(published(settings, "item_embeddings", DAYS[0]))
    assert len(after) < len(before)
    assert main(["rollback", *arguments]) == 0
    assert rows_of(published(settings, "item_embeddings", DAYS[0])).equals(before)
    assert is_whole_night(settings.layout, DAYS[0])


def test_packages_are_made_in_a_bucket(
    in_bucket: Path, near_bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config", str(in_bucket), "--out", f"{near_bucket}/packages/"]
    options = ["--weights", "random", "--backbone", "shufflenet_v2_x0_5", "--input-size", "32"]
    assert main(["init-encoder", *arguments, *options]) == 0
    printed = capsys.readouterr().out
    (encoder,) = files.list_names(f"{near_bucket}/packages/encoders")
    assert f"courier embed --encoder {near_bucket}/packages/encoders/{encoder} " in printed
    assert (
        encoder_info.read_encoder_info(f"{near_bucket}/packages/encoders/{encoder}").encoder_id
        == encoder
    )

    ds = ["--ds", str(DAYS[0])]
    assert main(["embed", "--config", str(in_bucket), *ds]) == 0
    capsys.readouterr()
    assert main(["fit-codebook", *arguments, *ds, "--clusters", "3"]) == 0
    stanza = capsys.readouterr().out
    (codebook,) = files.list_names(f"{near_bucket}/packages/codebooks")
    assert f'codebook = "{near_bucket}/packages/codebooks/{codebook}"' in stanza
    assert f'encoder = "{near_bucket}/made/' in stanza
    assert len(load_codebook(f"{near_bucket}/packages/codebooks/{codebook}").centres["main"]) == 3


def test_two_runs_do_not_write_one_feature_set(
    in_bucket: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = load_settings(str(in_bucket))
    arguments = ["refresh", "--config", str(in_bucket), "--ds", str(DAYS[0])]
    folders = settings.layout.lock_folders([ITEM_FEATURES], [DAYS[0]])
    with locks.holding(folders, print):
        assert main(arguments) == 1
    told = capsys.readouterr().err
    assert "Another run is writing the same tables of the same day" in told
    assert "within five minutes" in told


def test_a_store_that_stays_away_fails_the_stage_and_rejects_nothing(
    in_bucket: Path, near_bucket: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    settings = load_settings(str(in_bucket))
    arguments = ["refresh", "--config", str(in_bucket), "--ds", str(DAYS[0])]
    with monkeypatch.context() as broken:
        broken.setattr(files, "read_bytes", unreachable(f"{near_bucket}/images/"))
        assert main(arguments) == 1
    told = capsys.readouterr().err
    assert f"Error: {near_bucket}/images/" in told
    assert "could not be reached" in told
    assert "Traceback" not in told
    assert not files.is_folder(f"{settings.root}/test/item_rejects")
    assert main(arguments) == 0
    assert published(settings, "item_rejects", DAYS[0]).rows == 2


def test_a_store_that_gives_no_image_and_takes_no_message_is_told_in_one_paragraph(
    in_bucket: Path, near_bucket: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Nothing can be left for the launcher, so Beam's worker ends with an exception."""
    write = worker_notes.write_json

    def fail(path: str, *args: object) -> None:
        if "/errors/" in path:
            raise files.unavailable(path, "HTTP 503")
        write(path, *args)

    monkeypatch.setattr(files, "read_bytes", unreachable(f"{near_bucket}/images/"))
    monkeypatch.setattr(worker_notes, "write_json", fail)
    assert main(["refresh", "--config", str(in_bucket), "--ds", str(DAYS[0])]) == 1
    (told,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("Error: ")]
    assert told.startswith(f"Error: {near_bucket}/images/")
    assert "while running" not in told
    logged = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert logged
    assert not any(map(cli._is_news, logged))


def unreachable(below: str) -> Callable:
    call = files.read_bytes

    def fail(path: str, *args: object) -> object:
        if path.startswith(below):
            raise files.unavailable(path, "HTTP 503")
        return call(path, *args)

    return fail


def test_vectors_in_a_bucket_are_registered_and_taken(
    tmp_path: Path, near_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_vector_shop(tmp_path / "shop", 32, "lists")
    here = world.settings()
    make(here, DAYS[0])
    upload(world.folder / "vectors", f"{near_bucket}/clip")
    text = world.config.read_text().partition("[[pins]]")[0]
    text = text.replace('root = "features"', f'root = "{near_bucket}/features"')
    world.config.write_text(text)
    declared = ("--path", f"{near_bucket}/clip/ds={{ds}}/*.parquet", "--trained-elsewhere")
    named = ("--name", "clip", "--vector", "clip", "--out", near_bucket)
    assert main(["register-vectors", "--config", str(world.config), *named, *declared]) == 0
    (encoder,) = files.list_names(f"{near_bucket}/encoders")
    pin = f"[[pins]]\nfrom_ds = {DAYS[0]}\nencoder = '{near_bucket}/encoders/{encoder}'\n"
    world.config.write_text(text + pin)
    assert main(["embed", "--config", str(world.config), "--ds", str(DAYS[0])]) == 0
    there = load_settings(str(world.config))
    mine, theirs = (published(one, "item_embeddings", DAYS[0]) for one in (here, there))
    assert rows_of(theirs).equals(rows_of(mine))
    assert mine.rows > 0
