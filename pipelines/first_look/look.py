"""`courier init` takes a first look at the shop's tables and images, and writes settings from it.

What the night would refuse is found here by the night's own checks, all of it at once instead of
one refusal after another. The look is bounded: footers and some rows of the newest day, the item
IDs of a catalogue of moderate size and of tables of vectors beside it, and 64 images. Nothing but
the settings is written.
"""

import datetime as dt
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_jobs import inputs
from feature_jobs.schemas import DataContractError, OperatorError
from feature_jobs.store import files
from pipelines.config import Catalogue, Gates, Impressions, Settings
from pipelines.first_look.images import (
    Images,
    about_images,
    any_readable,
    find_images,
    folders_of,
)
from pipelines.first_look.settings import first_nights, near_template, settings_text
from pipelines.first_look.tables import (
    Finding,
    Place,
    Table,
    fault_of,
    find_place,
    open_table,
    read_column,
    settled_place,
)
from pipelines.first_look.vectors import about_vectors, find_vectors, registering
from pipelines.planning.pinned import PinnedArtefacts

_CATALOGUE_ROWS = 2_000_000  # up to here all item IDs are read: a second or two
_HOUR_US = 3_600_000_000
_NO_IMAGES = Finding(
    "note",
    "images: none were found, and vectors of the items were: the settings are those of a shop "
    "without images. Where it has some, give the folder that they lie in as --images.",
)
_LATE_SHARE = 0.05  # more events before their day are no late ones: it is the wrong time zone


@dataclass(frozen=True)
class FirstLook:
    """Holds what was seen, and the text of settings for it."""

    findings: tuple[Finding, ...]
    toml: str


def look(
    catalogue: str, impressions: str | None, image_roots: Sequence[str], folder: str
) -> FirstLook:
    """Looks at two tables and a sample of images, and writes the text of a settings file for them.

    Table paths are templates with {ds}, folders, globs or files; without impressions the settings
    are for nights of items alone. `folder` is where the settings
    will lie: paths in them are relative to it when they are near. Raises OperatorError where there
    is nothing to look at, DataContractError for a file that is no Parquet.
    """
    roots = [files.absolute(files.expanded(root)) for root in image_roots]
    for root in roots:
        _check_folder(root)
    places = [find_place("catalogue", catalogue)]
    if impressions:
        places.append(find_place("impressions", impressions))
    items, events = _both(map(open_table, places, _days_to_look_at(places)))
    images = find_images(items, roots)
    vectors = find_vectors(items, events, folders_of(items, images))
    commands = registering(vectors, first_nights(items, events)[0], folder)
    register = next(iter(commands.values()), None)
    has_images = bool(roots) or register is None or any_readable(items, images)
    if not has_images:
        items, images = items.without("image_uri"), Images(())
    findings = (
        *_about_places(places, folder, ()),
        *_about_tables(items, events, Gates(), "UTC"),
        *(about_images(items, images, folder, Gates()) if has_images else [_NO_IMAGES]),
        *about_vectors(vectors, commands, folder),
    )
    toml = settings_text(items, events, images.roots, images.rewrite, folder, register, has_images)
    return FirstLook(findings, toml)


def look_again(settings: Settings, folder: str) -> tuple[Finding, ...]:
    """Looks at the tables, images and pins of settings in `folder`, as they are read by these.

    Raises OperatorError or InputNotReady where there is nothing to look at, DataContractError for a
    file that is no Parquet.
    """
    sections: list[Catalogue | Impressions] = [settings.catalogue]
    places = [settled_place("catalogue", settings.catalogue.path)]
    if settings.impressions:
        sections.append(settings.impressions)
        places.append(settled_place("impressions", settings.impressions.path))
    items, events = _both(map(open_table, places, _days_to_look_at(places), sections))
    images = Images(settings.catalogue.image_roots, settings.catalogue.rewrite)
    of_images = about_images(items, images, folder, settings.gates) if images.roots else ()
    return (
        *_about_places(places, folder, settings.closed_days),
        *_about_tables(items, events, settings.gates, settings.day_timezone),
        *of_images,
        *_about_pins(settings),
    )


def refuse_existing(path: str) -> None:
    """Raises OperatorError where a file of this name exists already."""
    if os.path.exists(path):
        raise OperatorError(
            f"{path} exists already. Settings are never overwritten, since pins and corrections in "
            "them would be lost; nothing was changed. Give another name as --out, or move the file "
            "away."
        )


def write_settings(path: str, toml: str) -> None:
    """Writes a new file; raises OperatorError where one of this name exists already."""
    try:
        files.write_if_unchanged(os.path.abspath(path), toml.encode(), expected=None)
    except files.Changed:
        refuse_existing(path)


def _check_folder(root: str) -> None:
    if not files.is_folder(root):
        raise OperatorError(
            f"--images {root} is no folder. The folder that the catalogue's image_uri are relative "
            "to was expected."
        )


def _days_to_look_at(places: Sequence[Place]) -> list[dt.date]:
    """Chooses the newest day that all tables have, where there is one; else the newest of each."""
    newest = [max(place.days) for place in places if place.days] or [dt.date.today()]
    if common := set.intersection(*(set(place.days) for place in places)):
        newest = [max(common)]
    return [newest[0], newest[-1]][: len(places)]


def _both(tables: Iterable[Table]) -> tuple[Table, Table | None]:
    """Returns the catalogue and the impressions, None where a shop has no log."""
    items, *events = tables
    return items, events[0] if events else None


# ---- Places --------------------------------------------------------------------------------


def _about_places(
    places: Sequence[Place], folder: str, closed: Sequence[dt.date]
) -> Iterator[Finding]:
    for place in places:
        yield from _about_place(place, folder, closed)
    if len(places) > 1:
        yield from _about_both_places(*places)
    else:
        yield Finding("note", "no impressions: nights will make cluster IDs and no SimScores.")


def _about_place(place: Place, folder: str, closed: Sequence[dt.date]) -> Iterator[Finding]:
    where = near_template(place, folder)
    if place.days:
        first, last = place.days[0], place.days[-1]
        gaps = [day for day in place.gaps() if day not in closed]
        text = f"{place.table}: {len(place.days):,} day(s) from {first} to {last} at {where}"
        missing = ", ".join(str(day) for day in gaps[:3]) + (", …" if len(gaps) > 3 else "")
        if gaps:
            yield Finding("note", f"{text}; missing between them: {len(gaps):,} ({missing}).")
        else:
            yield Finding("ok", f"{text}.")
    elif place.table == "catalogue":
        yield Finding(
            "note",
            f"catalogue: one snapshot without a day in its path, {where}. It is used "
            "for past days as well, though they did not know all of its items.",
        )
    else:
        yield Finding(
            "problem",
            f"impressions: no day (2026-01-06, 20260106 or 2026/01/06) in the path {where}. One "
            "partition per day is expected, since a night reads the impressions of one day and "
            "the clicks of the days before. Write each day's events to a folder of its own, as in "
            "impressions/dt=2026-01-06/, and give --impressions 'impressions/dt={ds}/*.parquet'.",
        )


def _about_both_places(shop: Place, log: Place) -> Iterator[Finding]:
    if shop.days and log.days and not set(shop.days) & set(log.days):
        yield Finding(
            "problem",
            f"No day has both a catalogue (newest: {shop.days[-1]}) and impressions (newest: "
            f"{log.days[-1]}), so that no night can be made. Bring a catalogue of the same day, or "
            "give one snapshot without a day in its path.",
        )


# ---- Columns -------------------------------------------------------------------------------


def _about_tables(
    items: Table, events: Table | None, gates: Gates, day_timezone: str
) -> Iterator[Finding]:
    yield from _about_columns(items)
    if events is None:
        yield from _about_items(items, None, gates.unknown_items.fail)
        return
    yield from _about_columns(events)
    clash = _clash(items, events)
    if clash:
        yield Finding("problem", clash)
    yield from _about_items(items, None if clash else events, gates.unknown_items.fail)
    yield from _about_clicks(events)
    yield from _about_day(events, day_timezone)


def _about_columns(table: Table) -> Iterator[Finding]:
    name = table.place.table
    for fault in table.faults.values():
        yield Finding("problem", fault)
    guessed = {ours: theirs for ours, theirs in table.columns.items() if ours != theirs}
    if table.guessed and guessed:
        names = ", ".join(f"{ours} is taken from {theirs!r}" for ours, theirs in guessed.items())
        yield Finding(
            "note", f"{name}: {names}, by its name. Correct [{name}.columns] where that is wrong."
        )
    if not table.faults:
        usable = ", ".join(table.source.form.columns)
        yield Finding("ok", f"{name}: has the columns {usable} in usable types.")
    if name == "impressions" and "click_time" not in table.columns:
        yield Finding(
            "note",
            "impressions: no click_time, so a click is dated event_time + click_delay_seconds, "
            "which is 0 unless you set it.",
        )


# ---- Rows ----------------------------------------------------------------------------------


def _clash(items: Table, events: Table) -> str | None:
    sources = (items.source, events.source)
    return fault_of(lambda: inputs.common_id_type("item_id", sources, pa.int64()))


def _about_items(items: Table, events: Table | None, allowed: float) -> Iterator[Finding]:
    """Finds whether each item stands once in the catalogue, and whether impressions are of them."""
    rows, ds = items.source.rows, items.source.form.ds
    if not rows:
        yield Finding("problem", f"catalogue: ds {ds} has files but no row.")
    elif rows > _CATALOGUE_ROWS:
        yield Finding(
            "note",
            f"catalogue: {rows:,} items. For so many it was not looked at whether each comes once, "
            "and whether the impressions are of them; the first night does.",
        )
    elif items.has("item_id"):
        try:
            ids = read_column(items.source.groups(), "item_id")
        except DataContractError as error:
            yield Finding("problem", str(error))
            return
        in_order = ids.take(pc.sort_indices(ids))
        if twice := fault_of(lambda: inputs.check_unique(in_order, ds)):
            yield Finding("problem", twice)
        else:
            yield Finding("ok", f"catalogue: {rows:,} items, each once.")
        if events and events.has("item_id"):
            yield _about_unknown_items(events.rows["item_id"], ids, allowed)


def _about_unknown_items(seen: pa.ChunkedArray, ids: pa.ChunkedArray, allowed: float) -> Finding:
    unknown = seen.filter(pc.invert(pc.is_in(seen, value_set=ids.combine_chunks())))
    if not len(unknown):
        return Finding("ok", "impressions: all items looked at are in the catalogue.")
    share = len(unknown) / len(seen)
    examples = ", ".join(str(i) for i in pc.unique(unknown)[:3].to_pylist())
    text = (
        f"impressions: {share:.1%} of those looked at show an item that the catalogue lacks, for "
        f"example {examples}. They score 0, unless they left it within window_days"
    )
    if share <= allowed:
        return Finding("note", f"{text}.")
    return Finding(
        "problem",
        f"{text}; above {allowed:.0%} the night refuses to publish. Are both tables of the same "
        "shop and day? If so, add the items, or raise the limits of unknown_items under [gates].",
    )


def _about_clicks(events: Table) -> Iterator[Finding]:
    ds, rows = events.source.form.ds, events.source.rows
    if not rows:
        yield Finding("problem", f"impressions: ds {ds} has files but no row.")
    elif events.has("clicked"):
        rate = pc.mean(events.rows["clicked"].cast(pa.int8())).as_py()
        of_day = f" of ds {ds}" if events.place.days else ""
        text = f"impressions: {rows:,} rows{of_day}; {rate:.2%} of those looked at are clicked."
        if not rate:
            text += " Without clicks all histories are empty, and so are the features made of them."
        yield Finding("ok" if rate else "problem", text)


def _about_day(events: Table, day_timezone: str) -> Iterator[Finding]:
    """Finds whether events lie in the day of their partition."""
    if not events.place.days or not events.has("event_time"):
        return
    ds = events.source.form.ds
    start, end = (inputs.day_end(ds - dt.timedelta(days=n), day_timezone) for n in (1, 0))
    hours = (events.rows["event_time"].cast(pa.int64()).to_numpy() - start) / _HOUR_US
    first, last, length = hours.min(), hours.max(), (end - start) / _HOUR_US
    if first >= 0 and last < length:
        yield Finding("ok", f"impressions: events of ds {ds} lie in that day of {day_timezone}.")
        return
    # Late events are treated by their own time; features of later ones would know the next day.
    late = last < length and np.mean(hours < 0) <= _LATE_SHARE
    yield Finding(
        "note" if late else "problem",
        f"impressions: events of ds {ds} lie {first:+.1f} to {last:+.1f} hours from the day's "
        f"start in {day_timezone}, {np.mean((hours < 0) | (hours >= length)):.1%} of those looked "
        "at outside the day: set day_timezone or input_timezone where that is wrong.",
    )


# ---- Pins ----------------------------------------------------------------------------------


def _about_pins(settings: Settings) -> Iterator[Finding]:
    """Finds what keeps the pins from making a night; the first ones may be without a codebook."""
    faults = []
    for pin in settings.pins:
        pinned = PinnedArtefacts(settings, pin.from_ds)
        faults.append(fault_of(partial(getattr, pinned, "encoder")))
        if pin.codebook or pin in settings.half_pins:
            faults.append(fault_of(partial(getattr, pinned, "codebook")))
    for fault in dict.fromkeys(filter(None, faults)):
        yield Finding("problem", fault)
