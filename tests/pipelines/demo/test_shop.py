"""The demo shop keeps its laws: same seed, same bytes; tastes show in clicks and in no column."""

from dataclasses import dataclass, replace
from datetime import date
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw

from feature_jobs.schemas import OperatorError
from pipelines.config import load_settings
from pipelines.demo import shop
from pipelines.demo.garments import COLOURS, NO_COLOUR, PATTERNS, TYPES, draw_item
from pipelines.demo.photographs import dominant_colour, listed_items, photographed_items
from pipelines.demo.shop import CHARGER, Shop, ShopSummary, make_shop

SMALL = Shop(items=60, users=25, days=7, image_size=32)


@dataclass(frozen=True)
class Made:
    folder: Path
    summary: ShopSummary

    def table(self, name: str, ds: str) -> pa.Table:
        return pq.ParquetFile(self.folder / name / f"ds={ds}" / f"{name}.parquet").read()

    def item_ids(self, ds: str) -> set[int]:
        return set(self.table("catalogue", ds)["item_id"].to_pylist())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("demo") / "shop"
    # 300 items have an undecodable image of each kind.
    return Made(folder, make_shop(folder, replace(SMALL, items=300)))


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# ---------------------------------------------------------------------------- the shop as a whole


def test_same_parameters_give_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_shop(tmp_path / name, replace(SMALL, seed=seed))
    first, again, other = (contents(tmp_path / name) for name in "abc")
    assert len(first) > 60
    assert again == first
    pictures = [name for name in first.keys() & other.keys() if name.endswith(".jpg")]
    assert any(first[name] != other[name] for name in pictures)
    log = "impressions/ds=2026-01-01/impressions.parquet"
    assert first[log] != other[log]


def test_making_a_shop_again_does_nothing(made: Made) -> None:
    def stamps() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in made.folder.rglob("*")}

    before = stamps()
    assert make_shop(made.folder, replace(SMALL, items=300)) == made.summary
    assert stamps() == before


def test_a_shop_of_other_parameters_is_refused(made: Made) -> None:
    with pytest.raises(OperatorError, match="other parameters"):
        make_shop(made.folder, replace(SMALL, items=301))


@pytest.mark.parametrize("name", ["notes.txt", "demo.json"])
def test_a_folder_of_something_else_is_refused_and_kept(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(OperatorError, match="no demo shop"):
        make_shop(tmp_path, SMALL)
    assert contents(tmp_path) == {name: b"mine"}


def test_an_empty_folder_is_used(tmp_path: Path) -> None:
    out = tmp_path / "shop"
    out.mkdir()
    make_shop(out, SMALL)
    assert (out / "demo.json").is_file()


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(shop, "_write_settings", full_disk)
    with pytest.raises(OSError, match="No space"):
        make_shop(tmp_path / "shop", SMALL)
    assert list(tmp_path.iterdir()) == []


def test_the_summary_counts_what_is_there(made: Made) -> None:
    summary = made.summary
    logs = [made.table("impressions", ds) for ds in summary.ds]
    assert summary.impressions == sum(log.num_rows for log in logs) > 0
    assert summary.clicks == sum(sum(log["clicked"].to_pylist()) for log in logs) > 0
    assert summary.items == len(made.item_ids(summary.ds[-1]))
    assert summary.images_written == len(list((made.folder / "images").iterdir()))
    assert summary.images_written + summary.missing == 300


# ---------------------------------------------------------------------------- tables and images


def test_no_column_tells_of_looks_or_tastes(made: Made) -> None:
    for ds in made.summary.ds:
        catalogue, log = made.table("catalogue", ds), made.table("impressions", ds)
        assert catalogue.schema.equals(shop.CATALOGUE)
        assert catalogue.schema.names == ["item_id", "image_uri", "category", "title"]
        assert log.schema.equals(shop.IMPRESSIONS)
        assert log.schema.names == [
            *("user_id", "item_id", "event_time", "clicked", "click_time", "request_id")
        ]
        for name in ("catalogue", "impressions"):
            assert (made.folder / name / f"ds={ds}" / "_SUCCESS").read_bytes() == b""


def test_a_title_names_the_category_and_an_item_keeps_it(made: Made) -> None:
    seen: dict[int, str | None] = {}
    for ds in made.summary.ds:
        for item in made.table("catalogue", ds).to_pylist():
            assert seen.setdefault(item["item_id"], item["title"]) == item["title"]
            assert item["title"] is None or f" {item['category']} " in item["title"]
    titles = [title for title in seen.values() if title]
    assert len(set(titles)) > 0.95 * len(titles)  # a title tells items apart
    assert 0 < len(seen) - len(titles) < 0.06 * len(seen)  # a few have none


def test_titles_do_not_tell_of_looks() -> None:
    items = shop.drawn_items(SMALL)
    titles = shop.make_world(SMALL, items, arriving=0.15).title
    others = replace(items, colour=items.colour[::-1], pattern=items.pattern[::-1])
    assert (others.colour != items.colour).any()
    assert (shop.make_world(SMALL, others, arriving=0.15).title == titles).all()
    words = {word.lower() for title in titles for word in title.split()}
    assert not words & {*COLOURS, *PATTERNS}
    other_seed = shop.make_world(replace(SMALL, seed=8), items, arriving=0.15).title
    assert (other_seed != titles).mean() > 0.9


def test_an_item_without_a_category_has_a_title_without_one() -> None:
    items = shop.drawn_items(SMALL)
    items = replace(items, category=np.full_like(items.category, ""))
    titles = shop.make_world(SMALL, items, arriving=0.15).title
    assert {len(title.split()) for title in titles} == {0, 3}
    assert not any("  " in title for title in titles)


def test_items_arrive_every_day_and_some_leave(made: Made) -> None:
    days = [made.item_ids(ds) for ds in made.summary.ds]
    assert len(days) >= 7
    for before, after in pairwise(days):
        assert after - before
    assert days[0] - days[-1]


def test_some_images_are_missing_and_some_undecodable(made: Made) -> None:
    uris = {
        uri
        for ds in made.summary.ds
        for uri in made.table("catalogue", ds)["image_uri"].to_pylist()
    }
    missing, undecodable, formats = set(), set(), set()
    for uri in uris:
        try:
            with Image.open(made.folder / "images" / uri) as image:
                image.load()
                formats.add(image.format)
        except FileNotFoundError:
            missing.add(uri)
        except OSError:
            undecodable.add(uri)
    assert len(missing) == made.summary.missing == 6
    assert len(undecodable) == made.summary.undecodable == 3
    assert formats == {"JPEG", "PNG"}


def test_times_lie_in_their_day_and_clicks_follow(made: Made) -> None:
    for ds in made.summary.ds:
        log = made.table("impressions", ds)
        event, click = (
            log[name].cast(pa.int64()).to_numpy() for name in ("event_time", "click_time")
        )
        clicked = log["clicked"].to_numpy()
        start = np.datetime64(ds, "us").astype(np.int64)
        assert (event >= start).all()
        assert (event < start + 86_400_000_000).all()
        assert (np.diff(event) >= 0).all()
        assert (np.isnan(click) == ~clicked).all()
        delay = (click - event)[clicked] / 1e6
        assert delay.min() >= 2
        assert delay.max() <= 90


def test_a_request_shows_five_items_to_one_user_at_one_moment(made: Made) -> None:
    log = made.table("impressions", made.summary.ds[0])
    keys = ["request_id", "user_id", "event_time"]
    requests = log.group_by(keys).aggregate([("item_id", "count_distinct")])
    assert len(requests) == len(log["request_id"].unique()) > 20
    assert set(requests["item_id_count_distinct"].to_pylist()) == {5}


def test_only_items_of_the_day_are_shown_or_such_as_just_left() -> None:
    world = shop.make_world(Shop(), shop.drawn_items(Shop()), arriving=0.15)
    stale = shown = 0
    for day in range(1, Shop().days):
        present, before = (
            set(shop.catalogue_table(world, d)["item_id"].to_pylist()) for d in (day, day - 1)
        )
        items = shop.impressions_table(Shop(), world, day)["item_id"].to_pylist()
        assert set(items) <= present | before
        stale += sum(item not in present for item in items)
        shown += len(items)
    assert 0 < stale / shown < 0.01


# ---------------------------------------------------------------------------- clicks


@dataclass(frozen=True)
class Log:
    """Holds the impressions of a shop, as positions, with what the tables don't tell."""

    world: shop.World
    user: npt.NDArray[np.int64]
    item: npt.NDArray[np.int64]
    clicked: npt.NDArray[np.bool_]


@pytest.fixture(scope="module")
def log() -> Log:
    usual = Shop()
    world = shop.make_world(usual, shop.drawn_items(usual), arriving=0.15)
    tables = [shop.impressions_table(usual, world, day) for day in range(usual.days)]
    user, item, clicked = (
        pa.concat_tables(tables)[name].to_numpy() for name in ("user_id", "item_id", "clicked")
    )
    return Log(world, user - 1, item - 1, clicked)


def test_popularity_and_activity_are_skewed_and_clicks_are_rare(log: Log) -> None:
    def share_of_top_tenth(ids: npt.NDArray[np.int64]) -> float:
        counts = np.sort(np.bincount(ids))[::-1]
        return float(counts[: len(counts) // 10].sum() / counts.sum())

    assert 20_000 < len(log.item) / Shop().days < 28_000
    assert 0.3 < share_of_top_tenth(log.item) < 0.7
    assert share_of_top_tenth(log.user) > 0.2
    assert 0.10 < log.clicked.mean() < 0.20


@pytest.mark.parametrize("kind", ["colour", "pattern"])
def test_tastes_matter_save_for_chargers(log: Log, kind: str) -> None:
    taste = getattr(log.world, f"{kind}_taste")
    liked = taste[log.user, getattr(log.world.items, kind)[log.item]] > 0
    charger = log.world.items.category[log.item] == CHARGER

    def lift(rows: npt.NDArray[np.bool_]) -> float:
        return float(log.clicked[rows & liked].mean() / log.clicked[rows & ~liked].mean())

    assert liked.sum() > 1000
    assert lift(~charger) > 1.8
    assert 0.8 < lift(charger) < 1.25


def test_what_is_shown_does_not_depend_on_tastes(log: Log) -> None:
    taste, colour = log.world.colour_taste, log.world.items.colour
    shown = taste[log.user, colour[log.item]].mean()
    strangers = taste[np.random.default_rng(0).permutation(log.user), colour[log.item]].mean()
    assert shown == pytest.approx(strangers, abs=0.05)


# ---------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("type_", TYPES)
def test_a_picture_shows_cut_colour_and_pattern(type_: str) -> None:
    def picture(colour: str, pattern: str, cut: tuple[float, float]) -> bytes:
        return draw_item(type_, colour, pattern, 48, np.random.default_rng(5), cut).tobytes()

    short, long = (0.0, 0.0), (1.0, 1.0)
    variants = {picture("red", pattern, cut) for pattern in PATTERNS for cut in (short, long)}
    variants.add(picture("blue", "plain", short))
    assert len(variants) == 2 * len(PATTERNS) + 1


@pytest.mark.parametrize("colour", COLOURS)
def test_the_dominant_colour_of_a_drawn_shirt_is_its_own(colour: str) -> None:
    for seed in range(5):
        image = draw_item("t-shirt", colour, "plain", 96, np.random.default_rng(seed), (1.0, 1.0))
        assert dominant_colour(image) == colour


# ---------------------------------------------------------------------------- photographs


def photo_shop(root: Path, rows: list[str] | None = None) -> tuple[Path, Path]:
    """Makes 20 photographs; returns their folder and the list of items.

    Number i is of colour i modulo 10; the last two are missing and broken.
    """
    (root / "photos").mkdir(parents=True)
    names = list(COLOURS)
    for number in range(18):
        image = Image.new("RGB", (60, 80), (120, 84, 58))
        ImageDraw.Draw(image).rectangle((12, 12, 48, 68), fill=COLOURS[names[number % 10]])
        image.save(root / "photos" / f"{number}.jpg")
    (root / "photos" / "19.jpg").write_bytes(b"<html>")
    listed = rows or [f"{100 + number},hat,{number}.jpg" for number in range(20)]
    items_csv = root / "items.csv"
    items_csv.write_text("\n".join(["item_id,category,image_path", *listed]) + "\n")
    return root / "photos", items_csv


def test_photographs_are_measured_and_stay_where_they_are(tmp_path: Path) -> None:
    shop, out = replace(SMALL, first_ds=date(2026, 2, 26)), tmp_path / "shop"
    photos, items_csv = photo_shop(tmp_path)
    items = photographed_items(photos, listed_items(photos, items_csv))
    assert items.colour.tolist() == [*(n % 10 for n in range(18)), NO_COLOUR, NO_COLOUR]
    summary = make_shop(out, shop, photos, items_csv)
    assert (summary.images_written, summary.missing, summary.undecodable) == (0, 1, 1)
    assert summary.ds[-1] == "2026-03-04"
    assert not (out / "images").exists()
    settings = load_settings(str(out / "courier.toml"))
    assert settings.catalogue.image_roots == (str(photos),)
    last = Made(out, summary).table("catalogue", summary.ds[-1]).to_pylist()
    (item,) = (item for item in last if item["item_id"] == 117)
    assert (item["image_uri"], item["category"]) == ("17.jpg", "hat")
    assert " hat " in item["title"]
    assert make_shop(out, shop, photos, items_csv) == summary


def test_an_unreadable_photograph_gets_no_taste(tmp_path: Path) -> None:
    photos, items_csv = photo_shop(tmp_path)
    items = photographed_items(photos, listed_items(photos, items_csv))
    world = shop.make_world(SMALL, items, arriving=0.05)
    assert (world.colour_taste[:, items.colour[19]] == 0).all()
    assert (world.colour_taste[:, items.colour[0]] != 0).all()


def test_another_item_list_makes_another_shop(tmp_path: Path) -> None:
    photos, items_csv = photo_shop(tmp_path)
    make_shop(tmp_path / "shop", SMALL, photos, items_csv)
    items_csv.write_text(items_csv.read_text().replace("hat", "cap"))
    with pytest.raises(OperatorError, match="other parameters"):
        make_shop(tmp_path / "shop", SMALL, photos, items_csv)


GOOD = [f"{number},hat,{number}.jpg" for number in range(20)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["x,hat,1.jpg", *GOOD], "item_id 'x'"),
        ([f"{2**63},hat,1.jpg", *GOOD], "64 bits"),
        (["3,hat,1.jpg", *GOOD], "an earlier item has"),
        (["99,hat,../items.csv", *GOOD], "inside it"),
        (["99,hat,/etc/hostname", *GOOD], "inside it"),
        (["99,hat", *GOOD], "image_path ''"),
        (GOOD[:13], "13 items"),
        ([""], "0 items"),
    ],
)
def test_a_bad_item_list_is_refused(tmp_path: Path, rows: list[str], message: str) -> None:
    photos, items_csv = photo_shop(tmp_path, rows)
    with pytest.raises(OperatorError, match=message):
        make_shop(tmp_path / "shop", SMALL, photos, items_csv)
    assert not (tmp_path / "shop").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"id,category\n1,hat\n", "lacks item_id, image_path"), (b"", "none"), (b"\xff\n", "UTF-8")],
)
def test_a_file_that_is_no_item_list_is_refused(
    tmp_path: Path, content: bytes, message: str
) -> None:
    photos, items_csv = photo_shop(tmp_path)
    items_csv.write_bytes(content)
    with pytest.raises(OperatorError, match=message):
        make_shop(tmp_path / "shop", SMALL, photos, items_csv)


def test_lacking_photographs_or_item_list_are_refused(tmp_path: Path) -> None:
    photos, items_csv = photo_shop(tmp_path)
    out = tmp_path / "shop"
    with pytest.raises(OperatorError, match="is not a folder"):
        make_shop(out, SMALL, tmp_path / "nowhere", items_csv)
    with pytest.raises(OperatorError, match="can't be read"):
        make_shop(out, SMALL, photos, tmp_path / "nowhere.csv")
    with pytest.raises(OperatorError, match="--images is given without --items"):
        make_shop(out, SMALL, photos=photos)
    with pytest.raises(OperatorError, match="--items is given without --images"):
        make_shop(out, SMALL, items_csv=items_csv)


@pytest.mark.parametrize(
    "shop",
    [
        *(replace(SMALL, days=6), replace(SMALL, users=0), replace(SMALL, seed=-1)),
        *(replace(SMALL, items=13), replace(SMALL, items=-1), replace(SMALL, image_size=8)),
    ],
)
def test_a_shop_that_cannot_be_is_refused(tmp_path: Path, shop: Shop) -> None:
    with pytest.raises(OperatorError, match="at least"):
        make_shop(tmp_path / "shop", shop)


def test_too_few_days_are_told_as_the_option(tmp_path: Path) -> None:
    with pytest.raises(OperatorError) as refused:
        make_shop(tmp_path / "shop", replace(SMALL, days=6))
    assert "with --days 6: it needs at least 7" in str(refused.value)
    assert not (tmp_path / "shop").exists()
