"""Makes up the demo shop from a seed: a catalogue, its images and a click log.

Goes in: the parameters of a `Shop`, and for a shop of photographs a folder and its items.csv. Comes
out, below one folder: catalogue/ds=…/ and impressions/ds=…/ in Parquet, images/ (a drawn shop's
only), courier.toml, and demo.json with the parameters and what was made.

The shop's laws: an item arrives every day and some leave; popularity and activity are skewed; what
is shown depends on popularity alone, so that only clicks tell of tastes. A user has tastes over
what the pictures show (colour and pattern) and over categories; chargers are clicked whatever they
look like. No table has a column about looks or tastes, and titles don't tell of them: who wants to
know them has to look at the images.

The same parameters give the same bytes. The shop is built in a sibling folder and renamed, so that
a folder of this name is whole; a killed run leaves `<out>.partial-<pid>` behind, which may be
deleted.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import os
import shutil
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from feature_jobs.schemas import OperatorError
from pipelines.demo.garments import COLOURS, PATTERNS, TYPES, Ints, Items, Texts, draw_item
from pipelines.demo.photographs import listed_items, photographed_items, read_item_list

Floats = npt.NDArray[np.float64]

_SETTINGS = Path(__file__).parents[1] / "configs" / "demo.toml"

# The category of which looks don't matter.
CHARGER = "charger"
SHOWN_TOGETHER = 5
REQUESTS_PER_USER_DAY = 4.0
MIN_DAYS = 7

# Streams of random numbers, one per purpose, so that a change in one leaves the others as they are.
_ITEMS, _FAULTS, _DRAWING, _CALENDAR, _USERS, _LOG, _TITLES = range(7)

# Invented, so that a title tells an item from others of its category, but neither colour nor cut.
_BRANDS = ("Aldovar", "Brenna", "Corvel", "Dunmere", "Elstow", "Farrin", "Helvia", "Jorunn")
_MODELS = ("Alto", "Bergen", "Calla", "Delta", "Ember", "Fjord", "Gala", "Harbor", "Indra", "Juno")

_UTC_TIME = pa.timestamp("us", tz="UTC")
CATALOGUE = pa.schema(
    [
        pa.field("item_id", pa.int64(), nullable=False),
        pa.field("image_uri", pa.string(), nullable=False),
        pa.field("category", pa.string()),
        pa.field("title", pa.string()),
    ]
)
IMPRESSIONS = pa.schema(
    [
        pa.field("user_id", pa.int64(), nullable=False),
        pa.field("item_id", pa.int64(), nullable=False),
        pa.field("event_time", _UTC_TIME, nullable=False),
        pa.field("clicked", pa.bool_(), nullable=False),
        pa.field("click_time", _UTC_TIME),
        pa.field("request_id", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True)
class Shop:
    """Holds a demo shop's parameters.

    `items` and `image_size` (pixels a side) are for drawn shops.
    """

    seed: int = 7
    items: int = 600
    users: int = 1200
    days: int = 9
    first_ds: datetime.date = datetime.date(2026, 1, 1)
    image_size: int = 128

    def ds(self, day: int) -> str:
        """Returns the date of a day, counted from 0."""
        return (self.first_ds + datetime.timedelta(days=day)).isoformat()


@dataclass(frozen=True)
class ShopSummary:
    """Counts what was made for a demo shop.

    `items` counts the last day's catalogue; the image counts are over all items of all days.
    """

    ds: list[str]
    items: int
    impressions: int
    clicks: int
    images_written: int
    missing: int
    undecodable: int


@dataclass(frozen=True)
class World:
    """Holds the shop with everything that its tables don't tell.

    An item is in the catalogue on days first_day <= day < end_day (`[items]`), with its `title`
    (`[items]`, "" for none). `popularity` `[items]` is the weight with which it is shown. Tastes
    are added to the log-odds of a click: `colour_taste` `[users, colours + 1]`, `pattern_taste`
    `[users, patterns + 1]` (the last column, for unknown looks, is 0) and `category_taste`
    `[users, categories]`, whose columns `category_code` `[items]` names. `activity` `[users]` is a
    factor of mean 1 on the number of requests. Users are numbered 1, 2, ...
    """

    items: Items
    title: Texts
    first_day: Ints
    end_day: Ints
    popularity: Floats
    category_code: Ints
    colour_taste: Floats
    pattern_taste: Floats
    category_taste: Floats
    activity: Floats


# ---------------------------------------------------------------------------- items


def _rng(shop: Shop, *stream: int) -> np.random.Generator:
    return np.random.default_rng([shop.seed, *stream])


def drawn_items(shop: Shop) -> Items:
    """Makes items of random looks; 2 % lack their image and 1 % have a broken one."""
    _check_item_count(shop, shop.items, "The demo shop")
    rng = _rng(shop, _ITEMS)
    item_id = np.arange(1, shop.items + 1)
    category = np.array(TYPES)[rng.integers(len(TYPES), size=shop.items)]
    pattern = rng.integers(len(PATTERNS), size=shop.items)
    fault = _faults(shop)
    # A broken file is named .jpg whatever it holds; of the good ones some are PNG.
    suffix = np.where((rng.random(shop.items) < 0.1) & (fault == ""), ".png", ".jpg")
    return Items(
        item_id=item_id,
        image_uri=np.char.add(item_id.astype(str), suffix),
        category=category,
        colour=rng.integers(len(COLOURS), size=shop.items),
        pattern=np.where(category == CHARGER, PATTERNS.index("plain"), pattern),
        fault=fault,
    )


def _faults(shop: Shop) -> Texts:
    """Draws which images are broken and how, `[items]`.

    At least one is missing and one undecodable.
    """
    missing, undecodable = (max(1, round(share * shop.items)) for share in (0.02, 0.01))
    hit = _rng(shop, _FAULTS).permutation(shop.items)[: missing + undecodable]
    fault = np.full(shop.items, "", dtype="U9")
    fault[hit] = "missing"
    for number, item in enumerate(hit[missing:]):
        fault[item] = ("html", "truncated", "empty")[number % 3]
    return fault


# ---------------------------------------------------------------------------- world


def make_world(shop: Shop, items: Items, arriving: float) -> World:
    """Makes users with tastes, and decides when items come and go.

    The share `arriving` of the items comes after day 0.
    """
    n = len(items.item_id)
    rng = _rng(shop, _CALENDAR)
    order, rank, late = (
        rng.permutation(n),
        rng.permutation(n),
        max(math.ceil(arriving * n), shop.days - 1),
    )
    leaving = max(1, round(0.04 * n))
    first_day, end_day = np.zeros(n, dtype=np.int64), np.full(n, shop.days)
    # Dealt out in turn, so that every day has a new item.
    first_day[order[:late]] = 1 + np.arange(late) % (shop.days - 1)
    end_day[order[late : late + leaving]] = rng.integers(1, shop.days, size=leaving)
    categories, category_code = np.unique(items.category, return_inverse=True)
    rng = _rng(shop, _USERS)
    activity = rng.lognormal(0, 0.8, size=shop.users)
    return World(
        items=items,
        title=_titles(shop, items.category),
        first_day=first_day,
        end_day=end_day,
        # Zipf's law, less its very peak: with 600 items the first takes 2 % of what is shown.
        popularity=1.0 / (10 + rank),
        category_code=category_code,
        colour_taste=_tastes(shop.users, len(COLOURS), liked=2.8, rng=rng),
        pattern_taste=_tastes(shop.users, len(PATTERNS), liked=1.4, rng=rng),
        category_taste=rng.normal(0, 0.35, size=(shop.users, len(categories))),
        activity=activity / activity.mean(),
    )


def _titles(shop: Shop, category: Texts) -> Texts:
    """Makes up a product name for each item, `[items]`; one in fifty has none."""
    rng = _rng(shop, _TITLES)
    n = len(category)
    brand, model = (rng.choice(words, size=n) for words in (_BRANDS, _MODELS))
    number = rng.integers(100, 1000, size=n)
    named = rng.random(n) >= 0.02
    words = zip(brand, category, model, number, strict=True)
    titles = np.array([" ".join(str(part) for part in parts if str(part)) for parts in words])
    return np.where(named, titles, "")


def _tastes(users: int, kinds: int, liked: float, rng: np.random.Generator) -> Floats:
    """Draws log-odds `[users, kinds + 1]`; each user likes one or two kinds, others lie below 0."""
    taste = rng.normal(-0.6, 0.1, size=(users, kinds + 1))
    rank = rng.random((users, kinds)).argsort(axis=1)
    favourite = rank < rng.integers(1, 3, size=(users, 1))
    taste[:, :kinds][favourite] = liked + rng.normal(0, 0.15, size=favourite.sum())
    taste[:, kinds] = 0.0
    return taste


def click_probability(world: World, user: Ints, item: Ints) -> Floats:
    """Returns how likely users (positions, any shape) click items (positions, same shape), 0..1."""
    items = world.items
    looks = (
        world.colour_taste[user, items.colour[item]]
        + world.pattern_taste[user, items.pattern[item]]
    )
    popularity = np.log(world.popularity)
    standing = (popularity - popularity.mean()) / popularity.std()
    odds = (
        -3.0
        + np.where(items.category[item] == CHARGER, 0.0, looks)
        + world.category_taste[user, world.category_code[item]]
        + 0.25 * standing[item]
    )
    probability: Floats = 1.0 / (1.0 + np.exp(-odds))
    return probability


# ---------------------------------------------------------------------------- tables of a day


def catalogue_table(world: World, day: int) -> pa.Table:
    """Makes the catalogue's snapshot of a day, by item_id."""
    items = world.items
    present = np.flatnonzero((world.first_day <= day) & (day < world.end_day))
    present = present[items.item_id[present].argsort()]
    category, title = items.category[present], world.title[present]
    columns = [
        pa.array(items.item_id[present]),
        pa.array(items.image_uri[present].tolist()),
        pa.array(category.tolist(), mask=category == ""),
        pa.array(title.tolist(), mask=title == ""),
    ]
    return pa.table(columns, schema=CATALOGUE)


def impressions_table(shop: Shop, world: World, day: int) -> pa.Table:
    """Draws the log of a day: SHOWN_TOGETHER rows per request, by event_time."""
    rng = _rng(shop, _LOG, day)
    user = np.repeat(np.arange(shop.users), rng.poisson(REQUESTS_PER_USER_DAY * world.activity))
    user = rng.permutation(user)
    event_time = np.repeat(_event_times(shop.ds(day), len(user), rng), SHOWN_TOGETHER)
    item = _shown(world, day, len(user), rng).ravel()
    ids = [f"{shop.ds(day)}-{number:07d}" for number in range(len(user))]
    user = np.repeat(user, SHOWN_TOGETHER)
    clicked = rng.random(len(user)) < click_probability(world, user, item)
    click_time = event_time + rng.integers(2_000_000, 90_000_001, size=len(user))
    columns = [
        pa.array(user + 1),
        pa.array(world.items.item_id[item]),
        pa.array(event_time, type=_UTC_TIME),
        pa.array(clicked),
        pa.array(click_time, type=_UTC_TIME, mask=~clicked),
        pa.array(np.repeat(ids, SHOWN_TOGETHER).tolist(), type=pa.string()),
    ]
    return pa.table(columns, schema=IMPRESSIONS)


def _event_times(ds: str, requests: int, rng: np.random.Generator) -> Ints:
    """Draws moments of a UTC day, ascending, microseconds since 1970: `[requests]`.

    Evenings are busy.
    """
    hours = np.arange(24)
    weight = 1.2 - np.cos((hours - 7) / 24 * math.tau)
    hour = rng.choice(hours, size=requests, p=weight / weight.sum())
    start = np.datetime64(ds, "us").astype(np.int64)
    hour_us = 3_600_000_000
    return np.sort(start + hour * hour_us + rng.integers(hour_us, size=requests))


def _shown(world: World, day: int, requests: int, rng: np.random.Generator) -> Ints:
    """Draws the items of each request: positions `[requests, SHOWN_TOGETHER]`, none twice in one.

    Of all impressions 0.3 % are of an item that left on this day, as from a page rendered the day
    before.
    """
    present = np.flatnonzero((world.first_day <= day) & (day < world.end_day))
    cumulated = np.cumsum(world.popularity[present])
    item = np.zeros((requests, SHOWN_TOGETHER), dtype=np.int64)
    again = np.arange(requests)
    # Requests with an item twice are drawn anew; each round settles a good part of them.
    while len(again):
        drawn = rng.random((len(again), SHOWN_TOGETHER)) * cumulated[-1]
        item[again] = present[np.searchsorted(cumulated, drawn, side="right")]
        ordered = np.sort(item[again], axis=1)
        again = again[(ordered[:, 1:] == ordered[:, :-1]).any(axis=1)]
    left = np.flatnonzero(world.end_day == day)
    stale = rng.random(requests) < 0.003 * SHOWN_TOGETHER
    if len(left):
        place = rng.integers(SHOWN_TOGETHER, size=stale.sum())
        item[stale, place] = rng.choice(left, size=stale.sum())
    return item


# ---------------------------------------------------------------------------- writing


def make_shop(
    out: Path,
    shop: Shop,
    photos: Path | None = None,
    items_csv: Path | None = None,
) -> ShopSummary:
    """Makes the shop in the folder `out`, or finds it there made with the same parameters.

    With `photos` and `items_csv` the items are photographs, which stay where they are. Raises
    OperatorError on parameters that can't be used, and where `out` holds something else.
    """
    _check_shop(shop)
    out = out.resolve()
    parameters = _parameters(shop, photos, items_csv)
    made = _already_made(out, parameters)
    if made:
        return made
    if photos and items_csv:
        rows = listed_items(photos, items_csv)
        _check_item_count(shop, len(rows), f"The item list {items_csv}")
        world = make_world(shop, photographed_items(photos, rows), arriving=0.05)
    else:
        world = make_world(shop, drawn_items(shop), arriving=0.15)
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        images_written = 0 if photos else _write_images(partial / "images", shop, world.items)
        summary = replace(_write_tables(partial, shop, world), images_written=images_written)
        _write_settings(partial / "courier.toml", photos)
        record = {"parameters": parameters, "summary": asdict(summary)}
        (partial / "demo.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return summary


def _check_shop(shop: Shop) -> None:
    # As they are called where they are given: images have their size from tests alone.
    least = {
        "--seed": (shop.seed, 0),
        "--items": (shop.items, 0),
        "--users": (shop.users, 1),
        "--days": (shop.days, MIN_DAYS),
        "image_size": (shop.image_size, 32),
    }
    for name, (value, bound) in least.items():
        if value < bound:
            raise OperatorError(
                f"A demo shop cannot be made with {name} {value}: it needs at least {bound}. "
                f"Nothing was made. Give {bound} or more."
            )


def _check_item_count(shop: Shop, items: int, source: str) -> None:
    """Refuses a shop too small to have new items every day and enough left to show."""
    least = 2 * shop.days
    if items < least:
        raise OperatorError(
            f"{source} has {items} items; a shop of {shop.days} days needs at least {least}, so "
            "that new ones can arrive every day. Give more items, or fewer days where they are "
            "more than 7."
        )


def _parameters(shop: Shop, photos: Path | None, items_csv: Path | None) -> dict[str, Any]:
    """Returns what the shop follows from, as JSON has it."""
    if (photos is None) != (items_csv is None):
        found, lacking = ("--items", "--images") if photos is None else ("--images", "--items")
        raise OperatorError(
            f"{found} is given without {lacking}. A shop of photographs needs the folder of the "
            f"images and the list of the items. Give {lacking} too, or neither for a drawn shop."
        )
    digest = hashlib.sha256(read_item_list(items_csv)).hexdigest() if items_csv else None
    return {
        "shop": {**asdict(shop), "first_ds": shop.first_ds.isoformat()},
        "photos": str(photos.resolve()) if photos else None,
        "items_csv_sha256": digest,
    }


def _already_made(out: Path, parameters: dict[str, Any]) -> ShopSummary | None:
    """Returns the summary of a shop of these parameters in `out`; None where nothing is there."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    record = _record(out)
    if record.get("parameters") == parameters:
        return ShopSummary(**record["summary"])
    found = "a demo shop made with other parameters" if record else "something that is no demo shop"
    raise OperatorError(
        f"{out} holds {found}. An empty or new folder was expected, or a demo shop of the same "
        "parameters; nothing was changed. Remove the folder, or give another one as --out."
    )


def _record(out: Path) -> dict[str, Any]:
    """Reads what demo.json tells; empty where it isn't one of ours."""
    try:
        record = json.loads((out / "demo.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _write_images(folder: Path, shop: Shop, items: Items) -> int:
    """Draws the items whose images aren't missing; returns the number of files."""
    folder.mkdir()
    present = np.flatnonzero(items.fault != "missing")
    for item in present:
        picture = draw_item(
            str(items.category[item]),
            list(COLOURS)[items.colour[item]],
            PATTERNS[items.pattern[item]],
            shop.image_size,
            _rng(shop, _DRAWING, int(items.item_id[item])),
        )
        uri, fault = str(items.image_uri[item]), str(items.fault[item])
        (folder / uri).write_bytes(_image_file(picture, Path(uri).suffix, fault))
    return len(present)


def _image_file(picture: Image.Image, suffix: str, fault: str) -> bytes:
    """Returns the bytes of a picture's file, broken in the way `fault` says."""
    if fault == "empty":
        return b""
    if fault == "html":
        return b"<!DOCTYPE html><html><body><h1>404 Not Found</h1></body></html>\n"
    file = BytesIO()
    picture.save(file, format="PNG" if suffix == ".png" else "JPEG", quality=88)
    content = file.getvalue()
    return content[: len(content) // 2] if fault == "truncated" else content


def _write_tables(root: Path, shop: Shop, world: World) -> ShopSummary:
    impressions = clicks = 0
    for day in range(shop.days):
        catalogue, log = catalogue_table(world, day), impressions_table(shop, world, day)
        _write_partition(root / "catalogue" / f"ds={shop.ds(day)}" / "catalogue.parquet", catalogue)
        _write_partition(root / "impressions" / f"ds={shop.ds(day)}" / "impressions.parquet", log)
        impressions += log.num_rows
        clicks += log.num_rows - log["click_time"].null_count
    fault = world.items.fault
    return ShopSummary(
        ds=[shop.ds(day) for day in range(shop.days)],
        items=catalogue.num_rows,
        impressions=impressions,
        clicks=clicks,
        images_written=0,
        missing=int((fault == "missing").sum()),
        undecodable=int(((fault != "") & (fault != "missing")).sum()),
    )


def _write_partition(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(parents=True)
    pq.write_table(table, path, compression="zstd")
    (path.parent / "_SUCCESS").touch()


def _write_settings(path: Path, photos: Path | None) -> None:
    settings = _SETTINGS.read_text(encoding="utf-8")
    if photos:
        line = 'image_roots = ["images"]'
        assert settings.count(line) == 1
        # A JSON string is also one of TOML, as long as it isn't escaped to surrogates.
        folder = json.dumps(str(photos.resolve()), ensure_ascii=False)
        settings = settings.replace(line, f"image_roots = [{folder}]")
    path.write_text(settings, encoding="utf-8")
