"""Checks what manifests and a night's record say: of files, of each other, of other days."""

import datetime as dt
import os
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from feature_jobs import __version__
from feature_jobs.schemas import (
    TABLES,
    TRAINING_ROWS,
    USER_HISTORIES,
    USER_SIMSCORES,
    DataContractError,
)
from feature_jobs.store import files, nights, partitions
from feature_jobs.store.documents import parse_json
from feature_jobs.store.protocol import is_hidden
from pipelines.config import Settings, Timezone
from pipelines.reports.validate_parts import (
    BROKEN,
    NOT_READY,
    UNVERIFIED,
    WARNING,
    Finding,
    Published,
    command_for,
)
from pipelines.running import records
from pipelines.running.layout import Layout

# What manifests have by now; without it the laws that need it are not asked.
_MORE = ("feature_set", "identities", "inputs", "settings", "made_from", "counts", "histograms")


# ---- Shapes ------------------------------------------------------------------------------------


class _Document(BaseModel):
    """Says what a document has where it has it; what else it may have is not looked at."""

    model_config = ConfigDict(strict=True)


class _File(_Document):
    name: str
    rows: NonNegativeInt
    bytes: NonNegativeInt
    sha256: str


class _Log(_Document):
    rows: int | None = None


class _Previous(_Document):
    ds: dt.date


class _Night(_Document):
    ds: dt.date
    from_us: int


class _JoinedNight(_Night):
    item_features: str
    item_embeddings: str
    user_histories: str | None = None


class _Inputs(_Document):
    samples: _Log | None = None
    nights: list[_JoinedNight] | None = None
    catalogue: _Log | None = None
    impressions: _Log | None = None
    log: list[_Log] | None = None
    previous: _Previous | None = None
    snapshots: list[_Night] | None = None


class _MadeFrom(_Document):
    model_config = ConfigDict(extra="allow")

    __pydantic_extra__: dict[str, str] = Field(init=False)
    before: dict[str, str] = {}
    snapshots: dict[str, dict[str, str]] = {}


class _Settings(_Document):
    day_timezone: Timezone = "UTC"
    history_len: NonNegativeInt = 0
    max_id: dict[str, int] = {}
    labels: list[str] = []
    label: str | None = None
    sample_columns: dict[str, str] = {}
    input_timezone: Timezone | None = None


class _Notes(_Document):
    max_id: dict[str, int] = {}
    codebooks: dict[str, list[str]] = {}
    encoders: list[str] = []
    own_columns: dict[str, str] = {}


class _Clusters(_Document):
    items: int


class _Gate(_Document):
    gate: str
    level: str


class _Manifest(_Document):
    table: str
    ds: dt.date
    feature_set: str | None = None
    files: list[_File] = Field(min_length=1)
    rows: NonNegativeInt
    run_id: str
    version: str
    identities: dict[str, str] = {}
    inputs: _Inputs = _Inputs()
    made_from: _MadeFrom = _MadeFrom()
    settings: _Settings = _Settings()
    notes: _Notes = _Notes()
    shards: int | None = None
    counts: dict[str, int] = {}
    histograms: dict[str, list[int]] = {}
    clusters: dict[str, _Clusters] = {}
    versions: dict[str, str] = {}
    gates: list[_Gate] = []


class _Entry(_Document):
    version: str
    rows: int


class _Record(_Document):
    ds: str
    feature_set: str
    tables: dict[str, _Entry]
    pruned: dict[str, str] = {}


def parse_manifest(path: str, data: bytes) -> dict[str, Any]:
    """Returns the manifest `data` at `path`; raises DataContractError where it is of another shape.

    What earlier versions did not write may be missing.
    """
    return _parse(_Manifest, path, data)


def _parse(shape: type[_Document], path: str, data: bytes) -> dict[str, Any]:
    found: dict[str, Any] = parse_json(path, data)
    try:
        shape.model_validate_json(data)
    except ValidationError as error:
        first, *others = error.errors(include_url=False, include_input=False)
        where = ".".join(map(str, first["loc"])) or "all of it"
        more = f", and {len(others):,} more such faults" if others else ""
        raise DataContractError(f"{path}: {where}: {first['msg']}{more}") from error
    return found


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
    yield from _file_list(found)
    yield from _lacking(found)


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
    is_odd = bool(shards & (shards - 1)) and not found.is_training_set
    if is_odd or not all(map(str.startswith, named, parts)):
        told = f"they are {', '.join(named[:3])}{', …' if shards > 3 else ''}"
        yield found.finding("the files are not one for each shard", told)


def _file_list(found: Published) -> Iterator[Finding]:
    """Yields what of the list of files is not the manifest's; one of another place is a warning.

    A shop that was moved, or is mounted elsewhere, has such lists.
    """
    path = os.path.join(found.partition.folder, partitions.FILE_LIST)
    mend = f"`{command_for(found.name, found.manifest['ds'])} --remake` writes it anew"
    data = files.read_if_there(path)
    if data is None:
        told = f"{path} is not there, as in days made by an earlier version: {mend}"
        yield found.finding("there is no file list", told, WARNING)
        return
    listed, named = data.decode(errors="replace").splitlines(), found.partition.paths
    if list(map(os.path.basename, listed)) != list(map(os.path.basename, named)):
        told = f"{path} names others, or in another order: {mend}"
        yield found.finding("the file list names other files than the manifest", told)
        return
    elsewhere = [there for there, here in zip(listed, named, strict=True) if there != here]
    if elsewhere:
        place = os.path.dirname(elsewhere[0])
        told = f"{path} names the place {place}: engines that read by it look there; {mend}"
        yield found.finding("the file list names another place", told, WARNING)


def _lacking(found: Published) -> Iterator[Finding]:
    """Yields what a manifest says nothing of, as an earlier version's, and is not checked by."""
    lacks = [name for name in _MORE if name not in found.manifest]
    if lacks:
        by = found.manifest.get("versions", {}).get("courier", "(unknown)")
        version = f" (it was made by COURIER {by}, this is {__version__})"
        told = f"it says nothing of {', '.join(lacks)}{version * (by != __version__)}"
        law = "the manifest lacks what it would be checked by"
        yield found.finding(law, told, UNVERIFIED)


# ---- What it was made from ---------------------------------------------------------------------


def check_made_from(
    tables: Mapping[str, Published],
    layout: Layout,
    changing: set[str],
    pruned: Collection[str] = (),
) -> Iterator[Finding]:
    """Yields what was made from other versions than are published, or by other artefacts.

    Of tables that are `changing` just now, or were `pruned`, nothing can be said.
    """
    for found in tables.values():
        ds = found.manifest["ds"]
        then = dict(found.manifest.get("made_from", {}))
        before, nights = then.pop("before", {}), then.pop("snapshots", {})
        for name, version in then.items():
            there = tables[name].partition.version if name in tables else None
            if there == version or name in changing or (there is None and name in pruned):
                continue
            told = f"{name} was {version}, and is {there or 'not there'} now: run `courier refresh "
            yield found.finding("an upstream was made again since", f"{told}--ds {ds}`")
        yield from _goes_on(found, before, layout)
        yield from _scored_with(found, nights, layout)
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


def _scored_with(
    found: Published, nights: Mapping[str, Mapping[str, str]], layout: Layout
) -> Iterator[Finding]:
    """Yields a warning where a night that its impressions are scored with is another by now."""
    for ds, tables in nights.items():
        for name, version in tables.items():
            folder = layout.folder(TABLES[name], dt.date.fromisoformat(ds))
            there = partitions.published_version(folder)
            if there and there != version:
                told = f"it is scored with {name} of ds {ds} as {version}, which is {there} by now"
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


def pruned_tables(data: bytes | None, path: str) -> dict[str, str]:
    """Returns when tables of a night were pruned, by name, as its record at `path` says.

    None were where it cannot be read, of which `check_record` tells.
    """
    try:
        return {} if data is None else dict(_parse(_Record, path, data).get("pruned", {}))
    except DataContractError:
        return {}


def check_record(
    data: bytes | None,
    tables: Mapping[str, Published],
    layout: Layout,
    ds: dt.date,
    changing: set[str],
) -> Iterator[Finding]:
    """Yields what the record of a night, None where there is none, says that is not so."""
    law = "the night's record names what is not published"
    try:
        record = None if data is None else _parse(_Record, layout.night_path(ds), data)
    except DataContractError as error:
        yield Finding(BROKEN, "", law, str(error))
        return
    if record is None:
        if set(tables) - {TRAINING_ROWS.name}:
            told = "a whole night has one: what is there was checked, and nothing that is missing"
            yield Finding(UNVERIFIED, "", "there is no record of the night", told)
        return
    place = {"ds": str(ds), "feature_set": layout.feature_set}
    if other := [f"{k} {record[k]!r}" for k, v in place.items() if record[k] != v]:
        yield Finding(BROKEN, "", law, f"it says {', '.join(other)}")
    for name, entry in record["tables"].items():
        if name in changing:
            continue
        there = tables[name].manifest if name in tables else {}
        for what in ("version", "rows"):
            if entry[what] != there.get(what):
                told = f"it says {what} {entry[what]}, published is {there.get(what, 'none')}"
                yield Finding(BROKEN, name, law, told)
                break


def check_latest(layout: Layout, ds: dt.date) -> Iterator[Finding]:
    """Yields what `latest.json` does not say of the night of ds, where that is the newest.

    It follows the record, so that one that lags is not ready; of an earlier ds it says nothing.
    """
    law = "latest.json does not name the newest night"
    try:
        latest = records.read_latest(layout)
    except DataContractError as error:
        yield Finding(BROKEN, "", law, str(error))
        return
    try:
        record = records.read_night(layout, ds)  # after latest.json, as that is written after it
    except DataContractError:
        return  # `check_record` tells
    if record is None:
        if latest and latest["ds"] == str(ds):
            yield Finding(BROKEN, "", law, f"it names {ds}, whose night has no record")
    elif latest is None:
        if layout.recorded_days()[-1] == ds:
            told = "it is not there, as where an earlier version published the night, or a run died"
            yield Finding(WARNING, "", law, f"{told}: `courier refresh --ds {ds}` writes it")
    elif not nights.stands(latest, record):
        same = "another state of it" if latest["ds"] == str(ds) else f"ds {latest['ds']}"
        told = f"it names {same}: the night is being published or brought back just now, or a run "
        told += "died at it; ask again, or run the same command again"
        yield Finding(NOT_READY, "", law, told)
