"""Checks what manifests and a night's record say: of files, of each other, of other days."""

import datetime as dt
import os
from collections.abc import Iterator, Mapping

from feature_jobs import __version__
from feature_jobs.schemas import (
    TABLES,
    TRAINING_ROWS,
    USER_HISTORIES,
    USER_SIMSCORES,
    DataContractError,
)
from feature_jobs.store import files, partitions
from feature_jobs.store.protocol import is_hidden
from pipelines.config import Settings
from pipelines.reports.validate_parts import BROKEN, UNVERIFIED, WARNING, Finding, Published
from pipelines.running import records
from pipelines.running.layout import Layout

# What manifests have by now; without it the laws that need it are not asked.
_MORE = ("feature_set", "identities", "inputs", "settings", "made_from", "counts", "histograms")


# ---- Manifests ---------------------------------------------------------------------------------


def check_manifest(found: Published, settings: Settings, ds: dt.date) -> Iterator[Finding]:
    """Yields what of a manifest does not fit its place, its own files, or what lies beside it."""
    manifest, table = found.manifest, found.table
    feature_set = None if table.shared else settings.feature_set
    place = {"table": table.name, "ds": str(ds), "feature_set": feature_set}
    other = [f"{k} {manifest[k]!r}" for k, v in place.items() if manifest.get(k, v) != v]
    if other:
        told = f"it says {', '.join(other)}"
        yield found.finding("the manifest is that of another table or day", told)
    if manifest["rows"] != found.partition.rows:
        told = f"it says {manifest['rows']:,} rows, its files have {found.partition.rows:,}"
        yield found.finding("rows were lost or doubled", told)
    now = partitions.version_of({k: v for k, v in manifest.items() if k != "version"})
    if "identities" in manifest and now != manifest["version"]:
        told = f"it says {manifest['version']}, its files and identities give {now}"
        yield found.finding("the version is not that of the content", told)
    yield from _names(found)
    yield from _earlier(found)


def _names(found: Published) -> Iterator[Finding]:
    """Yields files that are too many, or do not stand where their shard does."""
    folder, named = found.partition.folder, [file["name"] for file in found.manifest["files"]]
    there = [name for name in files.list_names(folder) if not is_hidden(name)]
    if more := sorted(set(there) - set(named)):
        told = f"{', '.join(more[:3])} {'lies' if len(more) == 1 else f'({len(more):,}) lie'} in "
        told += f"{folder}, which the manifest does not name: engines that glob read it too"
        yield found.finding("there is a file too many", told)
    shards = len(named)
    parts = [partitions.part_name(shard, shards) for shard in range(shards)]
    if shards & (shards - 1) or not all(map(str.startswith, named, parts)):
        told = f"they are {', '.join(named[:3])}{', …' if shards > 3 else ''}"
        yield found.finding("the files are not one for each shard", told)
    listed = files.read_if_there(os.path.join(folder, partitions.FILE_LIST))
    if listed is not None and listed.decode(errors="replace").splitlines() != found.partition.paths:
        told = f"{os.path.join(folder, partitions.FILE_LIST)} names others, or in another order"
        yield found.finding("the file list names other files than the manifest", told)


def _earlier(found: Published) -> Iterator[Finding]:
    """Yields what an earlier version of COURIER did not write, and so is not checked."""
    by = found.manifest.get("versions", {}).get("courier")
    lacks = [name for name in _MORE if name not in found.manifest]
    if lacks or by != __version__:
        what = f"; it says nothing of {', '.join(lacks)}, by which it is not checked" * bool(lacks)
        told = f"it is of COURIER {by or '(unknown)'}, this is {__version__}{what}"
        yield found.finding("the manifest is of another version", told, UNVERIFIED)


# ---- What it was made from ---------------------------------------------------------------------


def check_made_from(
    tables: Mapping[str, Published], layout: Layout, changing: set[str]
) -> Iterator[Finding]:
    """Yields what was made from other versions than are published, or by other artefacts.

    Of tables that are `changing` just now nothing can be said.
    """
    for found in tables.values():
        ds = found.manifest["ds"]
        then = dict(found.manifest.get("made_from", {}))
        before = then.pop("before", {})
        for name, version in then.items():
            there = tables[name].partition.version if name in tables else None
            if there == version or name in changing:
                continue
            told = f"{name} was {version}, and is {there or 'not there'} now: run `courier refresh "
            yield found.finding("an upstream was made again since", f"{told}--ds {ds}`")
        yield from _goes_on(found, before, layout)
    yield from _artefacts(tables)
    logs = [
        tables[name].manifest.get("inputs", {}).get("impressions")
        for name in (USER_HISTORIES.name, USER_SIMSCORES.name)
        if name in tables
    ]
    if len(logs) == 2 and logs[0] != logs[1]:
        told = "user_histories is of another log than these scores, as `courier status` says too"
        yield tables[USER_SIMSCORES.name].finding("it is stale", told, WARNING)


def _goes_on(found: Published, before: Mapping[str, str], layout: Layout) -> Iterator[Finding]:
    """Yields a warning where the day before that it goes on from is another by now.

    What a night goes on from may be another feature set's, where the encoder changed.
    """
    ds = dt.date.fromisoformat(found.manifest["ds"])
    previous = found.manifest.get("inputs", {}).get("previous")
    earlier = dt.date.fromisoformat(previous["ds"]) if previous else ds - dt.timedelta(days=1)
    for name, version in before.items():
        there = partitions.published_version(layout.folder(TABLES[name], earlier))
        sets = [*layout.feature_sets(), *layout.candidates()]
        folders = (layout.of(one).folder(TABLES[name], earlier) for one in sets)
        if there and there != version and version not in map(partitions.published_version, folders):
            told = f"it goes on from {name} of ds {earlier} as {version}, which is {there} by now"
            yield found.finding("it is stale", told, WARNING)


def _artefacts(tables: Mapping[str, Published]) -> Iterator[Finding]:
    """Yields tables that another encoder or codebook made than made those before them."""
    for name in ("encoder_id", "codebook_id"):
        made_by = {
            found.name: found.manifest["identities"][name]
            for found in tables.values()
            if name in found.manifest.get("identities", {})
        }
        first = next(iter(made_by), "")
        for table, identity in made_by.items():
            if identity != made_by[first]:
                told = f"its {name} is {identity}, that of {first} is {made_by[first]}"
                yield tables[table].finding("tables of one night are of two artefacts", told)


# ---- The night's record ------------------------------------------------------------------------


def check_record(
    tables: Mapping[str, Published], layout: Layout, ds: dt.date, changing: set[str]
) -> Iterator[Finding]:
    """Yields what the record of a night says that is not so."""
    law = "the night's record names what is not published"
    try:
        record = records.read_night(layout, ds)
    except DataContractError as error:
        yield Finding(BROKEN, "", law, str(error))
        return
    if record is None:
        if set(tables) - {TRAINING_ROWS.name}:
            told = "a whole night has one: what is there was checked, and nothing that is missing"
            yield Finding(UNVERIFIED, "", "there is no record of the night", told)
        return
    place = {"ds": str(ds), "feature_set": layout.feature_set}
    if other := [f"{k} {record.get(k)!r}" for k, v in place.items() if record.get(k) != v]:
        yield Finding(BROKEN, "", law, f"it says {', '.join(other)}")
    for name, entry in record.get("tables", {}).items():
        if name in changing:
            continue
        there = tables[name].manifest if name in tables else {}
        for what in ("version", "rows"):
            if entry.get(what) != there.get(what):
                told = f"it says {what} {entry.get(what)}, published is {there.get(what, 'none')}"
                yield Finding(BROKEN, name, law, told)
                break
