"""Checks what the manifest of a training set says: how it was cut, and which nights it knows."""

import datetime as dt
from collections.abc import Iterator

from feature_jobs.impressions.snapshots import after_its_day
from feature_jobs.schemas import ITEM_EMBEDDINGS, ITEM_FEATURES, USER_HISTORIES
from feature_jobs.store import partitions
from pipelines.reports.validate_parts import UNVERIFIED, WARNING, Finding, Published, command_for
from pipelines.running.layout import Layout

_TABLES = (ITEM_FEATURES, ITEM_EMBEDDINGS, USER_HISTORIES)
_HOUR_US = 3_600_000_000


def check_training_set(found: Published, ds: dt.date) -> Iterator[Finding]:
    """Yields what of a training set's manifest is not so, whatever else is published."""
    rows = [file["rows"] for file in found.manifest["files"]]
    shards = found.manifest.get("shards", len(rows))
    last_is_more = rows[-1] > rows[0] or (len(rows) > 1 and not rows[-1])
    if len(rows) != shards or len({*rows[:-1]}) > 1 or last_is_more:
        told = f"{len(rows):,} files have {', '.join(map(str, rows[:3]))}"
        told += f"{', …' if len(rows) > 3 else ''} rows, and {shards:,} were cut, all but the last "
        yield found.finding("the files are not as samples were cut", f"{told}of as many rows")
    if found.is_laid_out:
        told = "they are laid out for TorchEasyRec: a set of the plain layout can be checked whole"
        yield found.finding("laws of rows were not asked", told, UNVERIFIED)
    if too_early := [str(night) for night in _not_yet(found, ds)]:
        told = f"samples of ds {ds} take features of {', '.join(too_early)}"
        yield found.finding("a night was not available to samples of ds", told)


def _not_yet(found: Published, ds: dt.date) -> Iterator[dt.date]:
    """Yields the nights that samples of ds may not know, or not from when the manifest says."""
    said = found.settings
    is_same, is_created = said.get("features_from") == "same", said.get("as_of") == "created"
    for night in found.snapshots or ():
        if night.ds > ds or (is_same and night.ds != ds):
            yield night.ds
        elif not is_same and not is_created and "day_timezone" in said:
            delay = round(said["availability_delay_hours"] * _HOUR_US)
            if night.ds == ds or night != after_its_day(night.ds, said["day_timezone"], delay):
                yield night.ds


def check_nights(found: Published, layout: Layout) -> Iterator[Finding]:
    """Yields a warning for each night that is another by now, and artefacts that are not named."""
    for night in found.manifest.get("inputs", {}).get("nights", ()):
        ds = dt.date.fromisoformat(night["ds"])
        for table in _TABLES:
            then = night.get(table.name)
            there = then and partitions.find_published(layout.folder(table, ds))
            if not there:
                if then:
                    told = (
                        f"{table.name} of ds {ds} is not there any more, or is published just now"
                    )
                    yield found.finding("a night was not looked at", told, UNVERIFIED)
            elif there.version != then:
                again = command_for(found.name, found.manifest["ds"])
                told = f"{table.name} of ds {ds} was {then}, and is {there.version} now: `{again}`"
                yield found.finding("it is stale", f"{told} makes it anew", WARNING)
            elif table is ITEM_FEATURES:
                yield from _artefacts(found, there)


def _artefacts(found: Published, night: partitions.Partition) -> Iterator[Finding]:
    """Yields the encoder and codebook of a night that the notes of the manifest do not name."""
    notes = found.manifest.get("notes", {})
    for what, named in (("codebook_id", "codebooks"), ("encoder_id", "encoders")):
        identity = night.manifest["identities"][what]
        if named in notes and identity not in notes[named]:
            told = f"the {what} of ds {night.manifest['ds']} is {identity}, and is not in its notes"
            yield found.finding("it was made with other artefacts than it says", told)
