"""A range is its nights: many days in one job have the files that night after night makes."""

import datetime as dt
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from pipelines.cli import main
from pipelines.running import publishing
from tests.conftest import Artefacts
from tests.support.commands import (
    Capture,
    Killed,
    counts,
    courier,
    die_at_write,
    manifest,
    paragraph,
    published,
    published_below,
)
from tests.support.random_shops import RandomShop
from tests.support.world import (
    DAYS,
    MISSING,
    NORMAL,
    World,
    catalogue_items,
    make_codebook,
    make_encoder,
    picture,
)

COMMANDS = ("refresh", "training-rows")
ITEM_TABLES = ("item_embeddings", "item_rejects", "item_features")


@pytest.fixture(scope="module")
def later(tmp_path_factory: pytest.TempPathFactory, artefacts: Artefacts) -> Artefacts:
    """Gives another encoder and a codebook for it."""
    folder = tmp_path_factory.mktemp("later")
    encoder = make_encoder(folder / "encoders", seed=1)
    return Artefacts(encoder, make_codebook(folder / "codebooks", encoder))


def make_days(shop: RandomShop, days: list[dt.date], command: str = "refresh") -> None:
    """Makes days in one command."""
    shop.settings()
    ends = ("--start-ds", str(days[0]), "--end-ds", str(days[-1]))
    assert main([command, "--config", str(shop.config), *ends]) == 0


def night_by_night(shop: RandomShop, days: list[dt.date]) -> None:
    for command in COMMANDS:
        for day in days:
            make_days(shop, [day], command)


def one_range(shop: RandomShop, days: list[dt.date]) -> None:
    for command in COMMANDS:
        make_days(shop, days, command)


def two_ranges(shop: RandomShop, days: list[dt.date]) -> None:
    middle = len(days) // 2
    for part in filter(None, (days[:middle], days[middle:])):
        one_range(shop, part)


def killed_once(shop: RandomShop, days: list[dt.date]) -> None:
    """Makes one range that dies somewhere, and the same once more."""
    at = 150 + 97 * shop.seed
    with pytest.MonkeyPatch.context() as patch:
        die_at_write(patch, at)
        try:
            one_range(shop, days)
        except Killed:
            pass
        else:
            pytest.fail(f"it has ended before the write {at}")
    one_range(shop, days)


def made(shop: RandomShop, how: Callable[[RandomShop, list[dt.date]], None]) -> dict[str, bytes]:
    """Returns what is published of a shop whose first night was made before images changed."""
    shutil.rmtree(shop.root, ignore_errors=True)
    shop.write_images_of(0)
    make_days(shop, shop.days[:1])
    shop.write_images_of(1)
    how(shop, shop.days[1:])
    return published_below(shop.root)


def differences(one: dict[str, bytes], other: dict[str, bytes]) -> list[str]:
    return sorted(path for path in one | other if one.get(path) != other.get(path))


@pytest.mark.parametrize("seed", range(3))
def test_a_range_is_its_nights(
    seed: int, tmp_path: Path, artefacts: Artefacts, later: Artefacts
) -> None:
    shop = RandomShop(
        tmp_path / "shop", ids=("int", "string")[seed % 2], seed=seed, first=artefacts,
        later=later if seed % 3 else None,
    )  # fmt: skip
    expected = made(shop, night_by_night)
    assert len(expected) > 20 * len(shop.days)
    for how in (one_range, two_ranges, killed_once):
        assert differences(made(shop, how), expected) == [], how.__name__


# ---- What stands in the middle of a range ------------------------------------------------------


def run(world: World, command: str, *days: dt.date, more: tuple[str, ...] = ()) -> int:
    """Makes days, from the first of `days` to the last, in one command."""
    ends = ("--start-ds", str(days[0]), "--end-ds", str(days[-1]))
    return courier(world, command, *ends, *more)


def as_nights(world: World, command: str, days: Sequence[dt.date]) -> dict[str, bytes]:
    """Returns what is published of the shop as it is now where it is made night by night."""
    shutil.rmtree(world.root)
    for day in days:
        assert run(world, command, day) == 0
    return published(world)


@pytest.mark.first_night
def test_a_day_in_the_middle_that_is_made_again_goes_on_from_the_newest(world: World) -> None:
    """It had gone on from the first, as there was no second; as a part of a range it may not."""
    assert run(world, "embed", DAYS[2]) == 0
    world.write_catalogue(DAYS[2], catalogue_items(DAYS[2])[1:])
    shutil.rmtree(world.root / "_versions", ignore_errors=True)
    assert run(world, "embed", *DAYS[1:3]) == 0
    made = manifest(world, "item_embeddings", DAYS[2])
    assert made["inputs"]["previous"]["ds"] == str(DAYS[1])
    parts = embeddings_of(world)
    as_nights(world, "embed", DAYS[:3])
    assert embeddings_of(world) == parts


def embeddings_of(world: World) -> dict[str, bytes]:
    """Returns the files of what EMBED published, but for what they say of versions before."""
    there = published(world).items()
    names = ("item_embeddings", "item_rejects")
    return {p: d for p, d in there if p.endswith(".parquet") and any(n in p for n in names)
            and "_versions" not in p}  # fmt: skip


@pytest.mark.first_night
def test_days_that_waited_for_a_refused_one_are_made_again_when_it_is_another(
    world: World, capsys: Capture
) -> None:
    broken = NORMAL[:5]
    for item in broken:
        world.put(item, b"broken")
    good = catalogue_items(DAYS[2])
    for item in range(30, 50):
        world.put(item, picture(item))
    world.write_catalogue(DAYS[2], [*good, *range(30, 50)])
    assert run(world, "embed", *DAYS[1:3]) == 3
    said = capsys.readouterr().err
    assert f"ds {DAYS[2]} waits: it goes on from ds {DAYS[1]}" in said
    for item in broken:
        world.put(item, picture(item))
    assert run(world, "embed", *DAYS[1:3]) == 0
    parts = embeddings_of(world)
    as_nights(world, "embed", DAYS[:3])
    assert embeddings_of(world) == parts


@pytest.mark.first_night
def test_a_range_after_an_upstream_of_other_content_compares_with_that(world: World) -> None:
    """Under one run_id the tables of a day may be of other content: what is there now counts."""
    assert run(world, "refresh", DAYS[1]) == 0
    for item in NORMAL:
        world.put(item, picture(item + 40))
    assert run(world, "embed", DAYS[0], more=("--remake", "--full")) == 0
    world.write_catalogue(DAYS[1], catalogue_items(DAYS[1])[1:])
    assert run(world, "refresh", *DAYS[:2]) == 0
    moved = counts(world, "user_simscores", DAYS[1])["moved_impressions"]
    as_nights(world, "refresh", DAYS[:2])
    assert counts(world, "user_simscores", DAYS[1])["moved_impressions"] == moved


@pytest.mark.first_night
def test_a_range_that_is_remade_is_as_if_nights_were(world: World) -> None:
    assert run(world, "refresh", DAYS[1]) == 0
    world.put(MISSING, picture(50))
    assert run(world, "refresh", *DAYS[:2], more=("--remake",)) == 0
    made = [manifest(world, name, DAYS[1])["made_from"] for name in ITEM_TABLES]
    as_nights(world, "refresh", DAYS[:2])
    assert [manifest(world, name, DAYS[1])["made_from"] for name in ITEM_TABLES] == made


@pytest.mark.first_night
def test_a_day_half_published_by_a_forced_run_is_none_to_go_on_from(
    world: World, capsys: Capture
) -> None:
    world.put(MISSING, picture(50))
    real, done = publishing.Publication.run, []

    def one(publication: publishing.Publication) -> None:
        if done:
            raise Killed(publication.place.folder)
        done.append(publication)
        real(publication)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(publishing.Publication, "run", one)
        with pytest.raises(Killed):
            run(world, "embed", DAYS[0], more=("--remake", "--full"))
    assert run(world, "embed", DAYS[1]) == 4
    assert "being published anew" in paragraph(capsys)


@pytest.mark.first_night
def test_a_day_whose_rows_are_refused_stops_itself_and_those_after_it(
    world: World, capsys: Capture
) -> None:
    world.write_catalogue(DAYS[2], [*catalogue_items(DAYS[2]), NORMAL[0]])
    assert run(world, "embed", *DAYS[1:]) == 1
    said = capsys.readouterr().err
    assert "days are made apart" in said
    (told,) = [line for line in said.splitlines() if line.startswith("Error: ")]
    assert "1 items twice or more" in told
    assert f"ds {DAYS[3]} waits: it goes on from ds {DAYS[2]}" in said
    there = [(world.root / "test" / "item_embeddings" / f"ds={d}" / "_SUCCESS") for d in DAYS]
    assert [path.exists() for path in there] == [True, True, False, False]


@pytest.mark.first_night
def test_a_held_day_is_left_out_and_later_ones_go_on_from_what_it_has(
    world: World, capsys: Capture
) -> None:
    assert run(world, "embed", DAYS[1]) == 0
    assert run(world, "refresh", DAYS[1]) == 0
    world.write_catalogue(DAYS[1], catalogue_items(DAYS[1])[1:])
    assert run(world, "refresh", DAYS[1]) == 0
    assert courier(world, "rollback", "--ds", str(DAYS[1])) == 0
    capsys.readouterr()
    assert run(world, "refresh", *DAYS[1:3]) == 3
    assert f"ds {DAYS[1]} of the feature set 'test' is on hold" in paragraph(capsys)
    assert manifest(world, "item_embeddings", DAYS[2])["inputs"]["previous"]["ds"] == str(DAYS[1])


def test_a_first_day_stays_when_earlier_days_are_made(world: World, capsys: Capture) -> None:
    """It goes on from nothing, and that cannot be taken from it."""
    assert run(world, "refresh", DAYS[1]) == 0
    assert run(world, "refresh", DAYS[0]) == 0
    before = published(world)
    capsys.readouterr()
    assert run(world, "refresh", DAYS[1]) == 0
    assert "nothing to do" in capsys.readouterr().err
    assert published(world) == before
