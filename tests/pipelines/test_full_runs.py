"""Tests that `--full` embeds all images again, though the day and the day before have them."""

import pytest

from feature_jobs.store import files
from pipelines.running import publishing
from tests.support.commands import Capture, Killed, courier, die_at_write, embed_work, published
from tests.support.world import (
    DAYS,
    LEAVES_ON_DAY_2,
    MISSING,
    NORMAL,
    World,
    catalogue_items,
    picture,
)

WORK = ("images_unchanged", "images_read", "images_embedded", "images_reused", "rejects_waiting")


@pytest.fixture
def nights(world: World) -> World:
    """Makes two whole nights, the second one incremental."""
    for day in DAYS[:2]:
        assert courier(world, "refresh", "--ds", str(day)) == 0
    return world


def embed(world: World, *args: str) -> int:
    return courier(world, "embed", "--ds", str(DAYS[1]), *args)


def work(world: World) -> list[int]:
    found = embed_work(world, DAYS[1])
    return [found[name] for name in WORK]


def rejects(world: World) -> list[int]:
    return world.table("item_rejects", DAYS[1])["item_id"].to_pylist()


def test_all_images_are_embedded_again_and_equal_embeddings_published(nights: World) -> None:
    before = nights.table("item_embeddings", DAYS[1])
    assert work(nights) == [10, 2, 1, 0, 0]  # the new item and the reject with a file
    nights.image(LEAVES_ON_DAY_2).unlink(missing_ok=True)  # it left, and its embedding stays
    assert embed(nights, "--full") == 0
    assert work(nights) == [1, 11, 9, 1, 0]
    assert nights.table("item_embeddings", DAYS[1]).equals(before)


def test_what_a_full_run_published_stays_when_the_plain_command_follows(
    nights: World, capsys: Capture
) -> None:
    nights.put(MISSING, picture(50))
    assert embed(nights, "--full") == 0
    assert MISSING not in rejects(nights)
    after = published(nights)
    assert embed(nights) == 0
    assert published(nights) == after
    capsys.readouterr()
    assert courier(nights, "item-features", "--ds", str(DAYS[1])) == 0
    found = nights.table("item_features", DAYS[1]).to_pylist()
    assert {row["item_id"]: row["has_image"] for row in found}[MISSING]


def test_each_full_run_is_a_new_one(nights: World, capsys: Capture) -> None:
    assert embed(nights, "--full") == 0
    before = published(nights)
    assert embed(nights, "--full") == 0  # of the same images
    assert published(nights) == before
    nights.put(MISSING, picture(50))
    capsys.readouterr()
    assert embed(nights, "--full", "--dry-run") == 0
    assert "compute: asked for (--full)" in capsys.readouterr().out
    assert published(nights) == before
    assert embed(nights, "--full") == 0
    assert MISSING not in rejects(nights)


def test_a_full_run_killed_between_its_two_tables_is_no_day_to_build_on(nights: World) -> None:
    """The plain command that follows a killed full run must not take the half for the whole."""
    nights.put(MISSING, picture(50))
    nights.put(NORMAL[2], b"broken")
    real, published_tables = publishing.Publication.run, []

    def publish_one(publication: publishing.Publication) -> None:
        if published_tables:
            raise Killed(publication.place.folder)
        published_tables.append(publication.place.folder)
        real(publication)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(publishing.Publication, "run", publish_one)
        with pytest.raises(Killed):
            embed(nights, "--full")
    assert embed(nights) == 0
    rows = nights.table("item_embeddings", DAYS[1])
    inside = rows.filter(rows["in_catalogue"])["item_id"].to_pylist()
    assert sorted(inside + rejects(nights)) == sorted(catalogue_items(DAYS[1]))


def test_a_full_night_that_was_killed_goes_on_and_ends_as_if_it_had_not(nights: World) -> None:
    full = ("refresh", "--ds", str(DAYS[1]), "--full")
    assert courier(nights, *full) == 0
    with pytest.MonkeyPatch.context() as patch:
        written = die_at_write(patch, None)
        assert courier(nights, *full) == 0
    uninterrupted = published(nights)
    for share in (0.2, 0.5, 0.8):
        with pytest.MonkeyPatch.context() as patch:
            die_at_write(patch, int(share * len(written)))
            with pytest.raises(Killed):
                courier(nights, *full)
        assert courier(nights, *full) == 0
        assert published(nights) == uninterrupted
    assert files.list_names(str(nights.root / "_staging" / "test" / "embed")) == []
