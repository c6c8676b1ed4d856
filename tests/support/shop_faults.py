"""Breaks tonight's inputs of a drawn shop in every way that a gate or a contract is there for.

Each fault is one that shops have had: of images, of the catalogue, of what is pinned, of the log.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_jobs.codebooks.codebook import save_codebook
from tests.support.codebooks import by_hand
from tests.support.drawn_shops import (
    COLOURS,
    HTML,
    DrawnShop,
    embeddings_of,
    image_uri,
    picture,
    pin,
)
from tests.support.world import make_encoder

NIGHT = 5  # tonight's number; the nights before are published
LARGE = 1_000_000  # what is added to an ID to make another one
Change = Callable[[pa.Table], pa.Table]


@dataclass(frozen=True)
class Fault:
    """Breaks tonight; some of the `gates` refuse that, or where there are none, a contract.

    A fault that `is_of_the_log` is met by a night whose items are published. Gates that are
    `accepted` let the night pass so far that others are asked. `told` is in the error.
    """

    do: Callable[[DrawnShop], None]
    gates: tuple[str, ...] = ()
    is_of_the_log: bool = False
    accepted: tuple[str, ...] = ()
    status: int = 3
    told: str = ""


# ---- Images ------------------------------------------------------------------------------------


def unmount_a_third(shop: DrawnShop) -> None:
    shutil.rmtree(shop.folder / "images" / "2")


def unmount_all(shop: DrawnShop) -> None:
    shutil.rmtree(shop.folder / "images")
    (shop.folder / "images").mkdir()


def forget_new_images(shop: DrawnShop) -> None:
    """Adds items whose images the export does not have yet."""
    _add(shop, np.arange(60), lambda item: None)


def replace_by_pages(shop: DrawnShop) -> None:
    for item in _items(shop)[::12]:
        shop.image(item).write_bytes(HTML)


def cut_images_short(shop: DrawnShop) -> None:
    for item in _items(shop)[::12]:
        image = shop.image(item)
        if image.exists():
            image.write_bytes(image.read_bytes()[:60])


def empty_images(shop: DrawnShop) -> None:
    for item in _items(shop)[::12]:
        shop.image(item).write_bytes(b"")


def shuffle_images(shop: DrawnShop) -> None:
    """Gives each item the picture of another one."""
    items = _items(shop)
    for item, other in zip(items, np.random.default_rng(0).permutation(items), strict=True):
        shop.image(item).write_bytes(picture(shop.colours[other]))


def lose_colours(shop: DrawnShop) -> None:
    """Makes each picture grey, as an export for print does."""
    for item in _items(shop):
        colours = shop.colours[item].reshape(3, 4).astype(float)
        grey = colours.mean(0, keepdims=True).repeat(3, 0)
        shop.image(item).write_bytes(picture(grey.reshape(COLOURS)))


def show_a_placeholder(shop: DrawnShop) -> None:
    """Gives two thirds of the items one and the same picture."""
    grey = picture(np.full(COLOURS, 90))
    for item in _items(shop):
        if item % 3:
            shop.image(item).write_bytes(grey)


# ---- The catalogue -----------------------------------------------------------------------------


def lose_addresses(shop: DrawnShop) -> None:
    shop_rows = _catalogue(shop)
    is_lost = pa.array(np.arange(len(shop_rows)) % 5 < 3)
    lost = pc.if_else(is_lost, pa.scalar(None, pa.string()), shop_rows["image_uri"])
    _write_catalogue(shop, _with(shop_rows, "image_uri", lost))


def lose_image_folder_of_addresses(shop: DrawnShop) -> None:
    rows = _catalogue(shop)
    _write_catalogue(shop, _with(rows, "image_uri", pc.utf8_slice_codeunits(rows["image_uri"], 2)))


def halve_catalogue(shop: DrawnShop) -> None:
    _write_catalogue(shop, _catalogue(shop)[: len(_catalogue(shop)) // 2])


def cut_catalogue_to_a_fifth(shop: DrawnShop) -> None:
    _write_catalogue(shop, _catalogue(shop)[: len(_catalogue(shop)) // 5])


def double_catalogue(shop: DrawnShop) -> None:
    rows = _catalogue(shop)
    _write_catalogue(shop, pa.concat_tables([rows, _other_items(rows)]))


def take_another_shops_catalogue(shop: DrawnShop) -> None:
    _write_catalogue(shop, _other_items(_catalogue(shop)))


def rename_categories(shop: DrawnShop) -> None:
    rows = _catalogue(shop)
    _write_catalogue(shop, _with(rows, "category", pc.utf8_capitalize(rows["category"])))


def flood_catalogue_with_one_kind(shop: DrawnShop) -> None:
    """Adds items, four for every ten that there are, which look nearly alike."""
    drawn = np.random.default_rng(0).normal(shop.colours[0], 4, (130, COLOURS)).clip(0, 255)
    _add(shop, np.arange(len(drawn)), lambda item: picture(drawn[item]))


def double_an_item(shop: DrawnShop) -> None:
    rows = _catalogue(shop)
    _write_catalogue(shop, pa.concat_tables([rows, rows[:1]]))


def lose_an_item_id(shop: DrawnShop) -> None:
    rows = _catalogue(shop)
    is_first = pa.array(np.arange(len(rows)) == 0)
    ids = pc.if_else(is_first, pa.scalar(None, pa.int64()), rows["item_id"])
    _write_catalogue(shop, _with(rows, "item_id", ids))


def write_item_ids_as_text(shop: DrawnShop) -> None:
    rows = _catalogue(shop)
    _write_catalogue(shop, _with(rows, "item_id", rows["item_id"].cast(pa.string())))


def cut_catalogue_file(shop: DrawnShop) -> None:
    _cut(shop.folder / "catalogue" / f"ds={shop.day(NIGHT)}" / "0.parquet")


# ---- What is pinned ----------------------------------------------------------------------------


def pin_an_encoder_that_sees_nothing(shop: DrawnShop) -> None:
    """Pins one that makes the same embedding of all images; its codebook is of other days."""
    blind = make_encoder(shop.folder / "encoders", name="blind")
    _pin(shop, embeddings_of(shop.colours[:16]), blind)


def pin_a_fresh_codebook(shop: DrawnShop) -> None:
    assert (
        shop.courier(
            "fit-codebook",
            "--ds",
            str(shop.day(NIGHT - 1)),
            "--clusters",
            "16",
            "--mode",
            "fresh",
            "--seed",
            "7",
        )
        == 0
    )
    packages = {str(package) for package in Path(shop.codebook).parent.iterdir()}
    (fresh,) = packages - {shop.codebook}
    _add_pin(shop, shop.encoder, fresh)


def pin_a_codebook_of_another_catalogue(shop: DrawnShop) -> None:
    """Pins one of shades of a single colour, none of which the shop has."""
    rng = np.random.default_rng(0)
    shades = np.array([255, 255, 255, 255, *[0] * 8]) + rng.normal(0, 2, (64, COLOURS))
    _pin(shop, embeddings_of(shades), shop.encoder)


def _pin(shop: DrawnShop, centres: np.ndarray, encoder: str) -> None:
    numbers = {"main": np.arange(1, len(centres) + 1)}
    book = by_hand({"main": centres}, numbers, Path(encoder).name)
    _add_pin(shop, encoder, save_codebook(str(shop.folder / "codebooks"), book))


def _add_pin(shop: DrawnShop, encoder: str, codebook: str) -> None:
    shop.extra_pins.append(pin(shop.day(NIGHT), encoder, codebook))


def begin_histories_anew(shop: DrawnShop) -> None:
    shop.history_start = NIGHT


# ---- The log -----------------------------------------------------------------------------------


def of_the_log(change: Change) -> Callable[[DrawnShop], None]:
    """Returns what changes tonight's impressions."""

    def do(shop: DrawnShop) -> None:
        day = shop.day(NIGHT)
        shop.write("impressions", day, change(shop.read("impressions", day)))

    return do


def and_rows_of(nights_before: int, some: slice) -> Callable[[DrawnShop], None]:
    """Returns what adds some of the rows of an earlier day to tonight's."""

    def do(shop: DrawnShop) -> None:
        old = shop.read("impressions", shop.day(NIGHT - nights_before))
        rows = shop.read("impressions", shop.day(NIGHT))
        old = old.take(np.arange(len(old))[some])
        shop.write("impressions", shop.day(NIGHT), pa.concat_tables([rows, old]))

    return do


def instead_the_day_before(shop: DrawnShop) -> None:
    shop.write("impressions", shop.day(NIGHT), shop.read("impressions", shop.day(NIGHT - 1)))


def lose_the_log(shop: DrawnShop) -> None:
    shutil.rmtree(shop.folder / "impressions" / f"ds={shop.day(NIGHT)}")


def cut_log_file(shop: DrawnShop) -> None:
    _cut(shop.folder / "impressions" / f"ds={shop.day(NIGHT)}" / "0.parquet")


def every(step: int) -> Change:
    return lambda rows: rows.take(np.arange(0, len(rows), step))


def times(count: int) -> Change:
    return lambda rows: pa.concat_tables([rows] * count)


def shifted(column: str, share: float) -> Change:
    """Returns what makes other IDs of a column, in a share of the rows."""

    def change(rows: pa.Table) -> pa.Table:
        is_other = np.random.default_rng(0).random(len(rows)) < share
        ids = np.where(is_other, rows[column].to_numpy() + LARGE, rows[column].to_numpy())
        return _with(rows, column, pa.array(ids))

    return change


def constant(column: str, value: object) -> Change:
    return lambda rows: _with(
        rows, column, pa.array([value] * len(rows), rows.schema.field(column).type)
    )


def inverted(rows: pa.Table) -> pa.Table:
    return _with(rows, "clicked", pc.invert(rows["clicked"]))


def without_most_click_times(rows: pa.Table) -> pa.Table:
    is_lost = pa.array(np.arange(len(rows)) % 10 < 7)
    null = pa.scalar(None, rows.schema.field("click_time").type)
    return _with(rows, "click_time", pc.if_else(is_lost, null, rows["click_time"]))


def late_by_a_day(share: float) -> Change:
    """Returns what puts a share of the rows a day back, as a log has it that splits by arrival."""

    def change(rows: pa.Table) -> pa.Table:
        back = np.where(np.random.default_rng(0).random(len(rows)) < share, 86_400_000_000, 0)
        for name in ("event_time", "click_time"):
            time = pc.subtract(rows[name].cast(pa.int64()), pa.array(back))
            rows = _with(rows, name, time.cast(rows.schema.field(name).type))
        return rows

    return change


def of_tomorrow(rows: pa.Table) -> pa.Table:
    time = pc.add(rows["event_time"].cast(pa.int64()), 86_400_000_000)
    return _with(rows, "event_time", time.cast(rows.schema.field("event_time").type))


def without(column: str) -> Change:
    return lambda rows: rows.drop_columns([column])


# ---- All of them -------------------------------------------------------------------------------


def _log(do: Callable[[DrawnShop], None], *gates: str, status: int = 3, told: str = "") -> Fault:
    return Fault(do, gates, is_of_the_log=True, status=status, told=told)


FAULTS: dict[str, Fault] = {
    "a mount is gone with a third of the images": Fault(unmount_a_third, ("outage", "rejects")),
    "the export lacks the images of new items": Fault(forget_new_images, ("outage", "rejects")),
    "pages in place of images": Fault(replace_by_pages, ("rejects",)),
    "images cut short": Fault(cut_images_short, ("rejects",)),
    "empty images": Fault(empty_images, ("rejects",)),
    "image addresses are null": Fault(lose_addresses, ("image_coverage", "lost_addresses")),
    "the catalogue is cut in half": Fault(halve_catalogue, ("item_rows",)),
    "the catalogue is cut to a fifth": Fault(cut_catalogue_to_a_fifth, ("item_rows",)),
    "the catalogue is doubled under new IDs": Fault(double_catalogue, ("item_rows",)),
    "the catalogue of another shop": Fault(
        take_another_shops_catalogue, ("item_rows",), told="318 of 320 catalogue items of the day"
    ),
    "categories are spelt anew": Fault(rename_categories, ("item_rows",)),
    "categories are spelt anew, accepted": Fault(
        rename_categories, ("score_coverage", "zero_rows"), accepted=("item_rows",)
    ),
    "many new items of one kind": Fault(flood_catalogue_with_one_kind, ("cluster_drift",)),
    "images of other items": Fault(shuffle_images, ("churn",)),
    "images without colour": Fault(lose_colours, ("churn", "cluster_drift")),
    "images without colour, accepted": Fault(
        lose_colours, ("score_drift",), accepted=("churn", "cluster_drift")
    ),
    "one placeholder for most items": Fault(
        show_a_placeholder, ("balance", "churn", "cluster_drift")
    ),
    "an encoder that sees nothing": Fault(
        pin_an_encoder_that_sees_nothing, ("balance", "churn", "dead_clusters")
    ),
    "another codebook": Fault(pin_a_fresh_codebook, ("churn",)),
    "a codebook of another catalogue": Fault(
        pin_a_codebook_of_another_catalogue, ("churn", "dead_clusters")
    ),
    "histories begin anew": _log(begin_histories_anew, "user_rows"),
    "histories begin anew, accepted": Fault(
        begin_histories_anew,
        ("history_drift", "score_drift", "zero_rows"),
        True,
        accepted=("user_rows",),
    ),
    "a tenth of the log": _log(of_the_log(every(10)), "impression_rows"),
    "the log five times": _log(of_the_log(times(5)), "impression_rows"),
    "the log is split by arrival": _log(of_the_log(late_by_a_day(0.4)), "late"),
    "half of the rows of the day before": _log(and_rows_of(1, slice(0, None, 2)), "late"),
    "rows of last week come again": _log(and_rows_of(6, slice(0, None, 5)), "too_late"),
    "click times are not joined": _log(of_the_log(without_most_click_times), "click_times"),
    "item IDs of another table": _log(
        of_the_log(shifted("item_id", 0.5)), "unknown_items", "zero_rows"
    ),
    "user IDs are hashed anew": _log(
        of_the_log(shifted("user_id", 1.0)), "history_drift", "score_drift", "zero_rows"
    ),
    "everything was clicked": _log(
        of_the_log(constant("clicked", True)), "click_times", "impression_rows"
    ),
    "clicked is inverted": _log(of_the_log(inverted), "click_times", "impression_rows"),
    "nothing was clicked": _log(
        of_the_log(constant("clicked", False)), "impression_rows", told="0 clicks of 8,760"
    ),
    "all are one user": _log(of_the_log(constant("user_id", 7)), "impression_rows"),
    # What a contract refuses.
    "no image is there": Fault(unmount_all, status=1, told="Not one of the 320 catalogue images"),
    "addresses without their folder": Fault(
        lose_image_folder_of_addresses, status=1, told="Not one of the 320 catalogue images"
    ),
    "an item twice": Fault(double_an_item, status=1, told="holds 1 items twice or more"),
    "an item without an ID": Fault(lose_an_item_id, status=1, told="'item_id' of the catalogue"),
    "item IDs as text": Fault(write_item_ids_as_text, status=1, told="item_id is string in the"),
    "a catalogue file cut short": Fault(
        cut_catalogue_file, status=1, told="cannot be read as Parquet"
    ),
    "the log of the day before": _log(instead_the_day_before, status=1, told="lie before that day"),
    "a log of the future": _log(of_the_log(of_tomorrow), status=1, told="lie after their day"),
    "a log without users": _log(
        of_the_log(constant("user_id", None)), status=1, told="'user_id' of the impressions"
    ),
    "a log without a column": _log(
        of_the_log(without("clicked")), status=1, told="lacks the column 'clicked'"
    ),
    "no log": _log(lose_the_log, status=4, told="has no partition for ds"),
    "a log file cut short": _log(cut_log_file, status=1, told="cannot be read as Parquet"),
}


# ---- Pieces ------------------------------------------------------------------------------------


def _catalogue(shop: DrawnShop) -> pa.Table:
    return shop.read("catalogue", shop.day(NIGHT))


def _write_catalogue(shop: DrawnShop, rows: pa.Table) -> None:
    shop.write("catalogue", shop.day(NIGHT), rows)


def _items(shop: DrawnShop) -> Sequence[int]:
    return _catalogue(shop)["item_id"].to_pylist()


def _other_items(rows: pa.Table) -> pa.Table:
    return _with(rows, "item_id", pc.add(rows["item_id"], LARGE))


def _add(shop: DrawnShop, items: np.ndarray, draw: Callable[[int], bytes | None]) -> None:
    """Adds items to tonight's catalogue, of the first category, with what `draw` makes of each."""
    rows = _catalogue(shop)
    for item in items:
        if (data := draw(item)) is not None:
            shop.image(LARGE + item).write_bytes(data)
    new = pa.table(
        {
            "item_id": items + LARGE,
            "image_uri": [image_uri(LARGE + item) for item in items],
            "category": [rows["category"][0].as_py()] * len(items),
        }
    )
    _write_catalogue(shop, pa.concat_tables([rows, new]))


def _with(rows: pa.Table, column: str, values: object) -> pa.Table:
    return rows.set_column(rows.column_names.index(column), column, values)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])
