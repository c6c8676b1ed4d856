"""Reads settings from one TOML file: typed, frozen, unknown keys refused, the nearest known named.

Paths in the file are relative to the file's own folder, so that it can be used from anywhere, or
gs://…. Those of the shop are relative to `base` where it is given.
"""

import codecs
import contextlib
import datetime as dt
import difflib
import json
import os
import re
import tomllib
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal, Self, get_args
from zoneinfo import ZoneInfo, available_timezones

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic.fields import FieldInfo

from feature_jobs.schemas import (
    HISTORY_CLUSTER,
    HISTORY_ITEM_IDS,
    SAME_CLUSTER,
    SCORES_ON_REQUEST,
    TABLES,
    OperatorError,
    Tiers,
    score_field,
)
from feature_jobs.store import addresses, day_names, files
from feature_jobs.store.day_names import DayNames
from pipelines.running.layout import Layout
from pipelines.stages import ITEMS, KINDS, NIGHT, Kind

BEAM_STAGES = (*(kind.name for kind in KINDS), "fit-codebook")
_NAME = r"^[a-z0-9][a-z0-9-]*$"


class FullPath(str):
    """Is a full path that knows how it is `written` in the settings, which a moved shop keeps."""

    written: str

    @classmethod
    def __get_pydantic_core_schema__(cls, _source: Any, handler: GetCoreSchemaHandler) -> Any:
        return handler.generate_schema(Annotated[str, AfterValidator(_path)])


class PackagePath(str):
    """Is the full path of an encoder or a codebook, which the `base` of the shop does not move."""

    @classmethod
    def __get_pydantic_core_schema__(cls, _source: Any, handler: GetCoreSchemaHandler) -> Any:
        return handler.generate_schema(Annotated[str, AfterValidator(_package)])


def _expanded(path: str) -> str:
    try:
        return files.expanded(path)
    except OperatorError as error:  # as a ValueError it is told with the key, and with the others
        raise ValueError(str(error)) from error


def _path(path: str, info: ValidationInfo) -> FullPath:
    full = FullPath(files.absolute(_expanded(path), (info.context or {}).get("base", ".")))
    full.written = path
    return full


def _package(path: str, info: ValidationInfo) -> PackagePath:
    return PackagePath(files.absolute(_expanded(path), (info.context or {}).get("folder", ".")))


def _template(path: str, info: ValidationInfo) -> str:
    if day_names.has_day(path):
        day_names.DayNames(path)
    folder = day_names.literal(_path(".", info))
    return files.absolute(_expanded(path), folder)


def _daily(path: str) -> str:
    if not day_names.has_day(path):
        raise ValueError("needs {ds}: impressions come in one partition for each day")
    return path


def _timezone(name: str) -> str:
    try:
        ZoneInfo(name)
    except (KeyError, ValueError, OSError) as error:
        if not available_timezones():
            raise ValueError(
                "no time zone can be looked up, since this machine or image has no time-zone "
                "database: install it, for example by `apt-get install tzdata`"
            ) from error
        raise ValueError(f"{name!r} is no IANA time zone such as 'Asia/Shanghai'") from error
    return name


def _prefix(source: str) -> str:
    if not source.endswith("/"):
        raise ValueError(
            "does not end in '/': what follows is the name of a file below the folder, and of "
            f"'https://cdn' also 'https://cdn.other/…' would be taken. Say {source + '/'!r}"
        )
    return source


Template = Annotated[str, AfterValidator(_template)]
Timezone = Annotated[str, AfterValidator(_timezone)]
Prefix = Annotated[str, Field(min_length=1), AfterValidator(_prefix)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Price = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class CatalogueColumns(_Section):
    """Names the catalogue's columns in the shop's table; the last one may be absent there."""

    item_id: str = "item_id"
    image_uri: str = "image_uri"
    category: str = "category"
    title: str = "title"


class ImpressionColumns(_Section):
    """Names the impressions' columns in the shop's table; the last four may be absent there."""

    user_id: str = "user_id"
    item_id: str = "item_id"
    event_time: str = "event_time"
    clicked: str = "clicked"
    click_time: str = "click_time"
    impression_id: str = "impression_id"
    request_id: str = "request_id"
    history: str = "history"


class Catalogue(_Section):
    """Tells where the catalogue and its images lie.

    `path` has {ds}, or the day in another spelling (`day_names`), or is one snapshot for all days;
    images lie below one of `image_roots`, of which a shop without images has none: image_uri may be
    absent then. Of an image_uri that begins with the first text of a pair
    of `rewrite`, which ends in "/", the file lies below the second, a folder.
    """

    path: Template
    image_roots: tuple[FullPath, ...]
    rewrite: tuple[tuple[Prefix, FullPath], ...] = ()
    require_success: bool = False
    columns: CatalogueColumns = CatalogueColumns()

    @model_validator(mode="after")
    def _below_roots(self) -> "Catalogue":
        roots = tuple(os.path.join(root, "") for root in self.image_roots)
        for source, folder in self.rewrite:
            if not (files.is_remote(folder) or os.path.join(folder, "").startswith(roots)):
                raise ValueError(
                    f"rewrite leads from {source} to {folder}, below none of the image_roots, so "
                    "that no image would be read there. Add that folder to image_roots"
                )
        return self

    def check_has_images(self) -> None:
        """Raises OperatorError for a shop that names no images, which are about to be read."""
        if not self.image_roots:
            raise OperatorError(
                "Images are to be read, and the settings name no catalogue.image_roots below which "
                "they lie. Name them; or where the shop has vectors instead of images, register "
                "these with `courier register-vectors` and pin that encoder."
            )

    @property
    def image_uri_pairs(self) -> tuple[tuple[str, str], ...]:
        """Returns `rewrite` as pairs of prefixes of image_uri."""
        return addresses.as_image_uris(self.rewrite, self.image_roots)

    @property
    def rewrite_as_written(self) -> dict[str, list[str]]:
        """Returns what a run that reads images is known by, besides its image roots."""
        told = [f"{source} -> {folder.written}" for source, folder in self.rewrite]
        return {"rewrite": told} if told else {}


class Impressions(_Section):
    """Tells where the impressions lie and how they are read.

    `input_timezone` is that of times without one; `carry` columns pass through to SimScores.
    """

    path: Annotated[Template, AfterValidator(_daily)]
    require_success: bool = False
    input_timezone: Timezone | None = None
    click_delay_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    carry: tuple[str, ...] = ()
    columns: ImpressionColumns = ImpressionColumns()


class Embed(_Section):
    """Tells how images are embedded.

    `batch_size` images go through the encoder at once; about `chunk_items` are redone after a kill.
    A `device` "cuda" that is not there is warned of; "auto" takes what there is. A `precision`
    other than "auto", by which each worker takes what its hardware is made for, is that of all
    embeddings: those of another are made again.
    """

    device: Literal["auto", "cuda", "cpu"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    batch_size: Count = 32
    chunk_items: Count = 256


class ItemFeatures(_Section):
    """Tells which columns `item_features` has on request.

    `vector` adds the embedding itself as a column: the Vector form; `second_distance` that to the
    second-nearest centre, which tells how clear a cluster ID is.
    """

    vector: bool = False
    second_distance: bool = False


def _score_column(name: str) -> str:
    if name == HISTORY_ITEM_IDS or score_field(name):
        return name
    near = difflib.get_close_matches(name, SCORES_ON_REQUEST, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"those on request are {_ON_REQUEST}"
    raise ValueError(f"names no column of user_simscores on request, {hint}")


_ON_REQUEST = (
    f"{', '.join(SCORES_ON_REQUEST)}, and {HISTORY_CLUSTER}LABEL and {SAME_CLUSTER}LABEL for each "
    "further resolution of the codebook"
)


class Simscore(_Section):
    """Tells how impressions are scored, and what is published with the scores.

    `features_from` says whose items impressions are scored with: those of the "same" day, or as a
    shop serves them, of the "previous" night that is available (`availability_delay_hours`).
    `columns` are added on request: history_item_ids, the items that were scored, and those of
    `score_field`. `tiers` are those of simtier and sim_bucket, `top_k` is how many top_positions
    tells. With an `embedding_dtype` of "float16" scores are those of a store of half floats.
    `embeddings_by` says what brings embeddings to impressions: a copy on every worker, up to
    `broadcast_limit_gb` of it, or a shuffle.
    """

    features_from: Literal["same", "previous"] = "same"
    columns: tuple[Annotated[str, AfterValidator(_score_column)], ...] = ()
    tiers: Tiers = "courier"
    top_k: Count = 10
    embedding_dtype: Literal["float32", "float16"] = "float32"
    embeddings_by: Literal["auto", "broadcast", "shuffle"] = "auto"
    broadcast_limit_gb: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 20.0


class Training(_Section):
    """Tells what encoders are trained on: items of `categories`, of all where there are none.

    Without a request_id, impressions further apart than the gap are of two requests.
    """

    categories: tuple[str, ...] = ()
    request_gap_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 60.0


class Workers(_Section):
    """Tells how many `threads` a worker process may compute on.

    Without it, the processes of a host share its cores, as far as Beam's options tell how many they
    are.
    """

    threads: Count | None = None


class Limits(_Section):
    """Holds the limits of a gate: beyond `warn` it is told of, beyond `fail` nothing is published.

    Which side is beyond is for the classes below to say.
    """

    warn: float
    fail: float
    upwards: ClassVar[bool] = True  # whether larger is worse

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.is_beyond(self.warn, self.fail):
            side = "above" if self.upwards else "below"
            raise ValueError(
                f"warn = {self.warn:g} lies beyond fail = {self.fail:g}, the wrong way round: the "
                f"gate warns {side} the one and refuses {side} the other"
            )
        return self

    def is_beyond(self, observed: float, limit: float) -> bool:
        """Returns whether a gate stops at `limit` what was `observed`."""
        return observed > limit if self.upwards else observed < limit


class AtMost(Limits):
    """Limits a share from above."""

    warn: Share
    fail: Share


class AtLeast(AtMost):
    """Limits a share from below."""

    upwards: ClassVar[bool] = False


class Drift(Limits):
    """Limits a population stability index from above; `inf` refuses none.

    From 0.1 on a shift is commonly called small, from 0.25 on large.
    """

    warn: Annotated[float, Field(ge=0)]
    fail: Annotated[float, Field(ge=0)]


class Factor(Limits):
    """Limits by how many times more, or fewer, there are than there were; `inf` refuses none."""

    warn: Annotated[float, Field(ge=1)]
    fail: Annotated[float, Field(ge=1)]


class Gates(_Section):
    """Holds what a night is judged by, before it is published; `running/gates.py` has the meanings.

    Of a gate, the limit that is not given is the default; a stricter `fail` alone is `warn` too.
    """

    image_coverage: AtLeast = AtLeast(warn=0.9, fail=0.5)
    lost_addresses: AtMost = AtMost(warn=0.02, fail=0.05)
    rejects: AtMost = AtMost(warn=0.02, fail=0.05)
    outage: AtMost = AtMost(warn=0.01, fail=0.03)
    item_rows: Factor = Factor(warn=1.2, fail=1.5)
    churn: AtMost = AtMost(warn=0.1, fail=0.2)
    balance: AtMost = AtMost(warn=0.3, fail=0.5)
    dead_clusters: AtMost = AtMost(warn=0.3, fail=0.5)
    cluster_drift: Drift = Drift(warn=0.1, fail=0.25)
    user_rows: AtLeast = AtLeast(warn=0.8, fail=0.5)
    unknown_items: AtMost = AtMost(warn=0.02, fail=0.05)
    late: AtMost = AtMost(warn=0.05, fail=0.2)
    too_late: AtMost = AtMost(warn=0.01, fail=0.05)
    click_times: AtLeast = AtLeast(warn=0.9, fail=0.5)
    score_coverage: AtLeast = AtLeast(warn=0.5, fail=0.1)
    score_drift: Drift = Drift(warn=0.1, fail=0.25)
    history_drift: Drift = Drift(warn=0.1, fail=0.25)
    zero_rows: AtMost = AtMost(warn=0.1, fail=0.3)
    impression_rows: Factor = Factor(warn=2.5, fail=4.0)

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, given: Any) -> Any:
        """Fills in the limits that are not given."""
        if not isinstance(given, dict):
            return given
        return {name: _both(cls.model_fields.get(name), limits) for name, limits in given.items()}


def _both(gate: FieldInfo | None, given: Any) -> Any:
    if gate is None or not isinstance(given, dict) or len(given) != 1:
        return given
    (name, value), default = *given.items(), gate.default
    if name == "warn":
        return {**given, "fail": default.fail}
    if name == "fail" and isinstance(value, int | float):
        is_stricter = default.is_beyond(default.warn, value)
        return {**given, "warn": value if is_stricter else default.warn}
    return given


def _partition(name: str) -> str:
    DayNames(name)
    if not re.fullmatch(r"[A-Za-z0-9][\w.=-]*", day_names.name_of(name, dt.date.min)):
        raise ValueError(
            "is to be the name of one folder, of letters, digits and _ . = -, which begins with a "
            "letter or a digit"
        )
    key = key_of(name)
    if having := [t.name for t in TABLES.values() if key in {c.name for c in t.columns}]:
        raise ValueError(
            f"is to have another key than {key!r}: {having[0]} has a column of that name, and a "
            "reader would take the day for its values"
        )
    return name


def key_of(partition: str) -> str:
    """Returns the name of the column that readers make of the folders of days, "" for none."""
    return partition.rpartition("=")[0]


class Output(_Section):
    """Tells where tables lie.

    Those with user IDs lie below `user_root`, for fewer people to read; the folder of a day in each
    table is named `partition`. Row groups of their files have at most `row_group_mb` uncompressed,
    and 32,768 rows.
    """

    user_root: FullPath | None = None
    partition: Annotated[str, AfterValidator(_partition)] = "ds={ds}"
    row_group_mb: Count = 128


class Prices(_Section):
    """Tells what is paid, in a `currency`, so that estimates come with their money.

    That is for an hour of one core, and for each GB that is kept for a month.
    """

    currency: str = "USD"
    core_hour: Price | None = None
    gb_month: Price | None = None


class Backfill(_Section):
    """Tells what a step of `courier backfill` may take, which says how many days it has.

    They are the memory of the local engine, and room for what is staged and not published yet.
    """

    memory_gb: Annotated[float, Field(gt=0)] = 4.0
    disk_gb: Annotated[float, Field(gt=0)] = 100.0


def _table(name: str) -> str:
    if name in TABLES:
        return name
    near = difflib.get_close_matches(name, TABLES, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"tables are {', '.join(TABLES)}"
    raise ValueError(f"names no table, {hint}")


class Retention(_Section):
    """Tells what `courier prune` keeps; `running/retention.py` says what it never deletes.

    Of a table in `days` so many days are kept, the newest night's being the first of them; of
    others all. Tables of one kind of stage stay and go together (`days_of`). Of each partition it
    keeps as many `versions` that were replaced, besides those that a night's record or a hold
    names, and all that was replaced in the last `grace_hours`. What a run has staged that was
    refused, or died, is kept for `staging_hours`. With `by_the_night`, `courier refresh` ends with
    it, where no day was refused.
    """

    days: dict[Annotated[str, AfterValidator(_table)], Count] = {}
    versions: Annotated[int, Field(ge=0)] = 1
    grace_hours: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 24.0
    staging_hours: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 168.0
    by_the_night: bool = False

    def days_of(self, kind: Kind) -> int | None:
        """Returns how many days of a kind's tables are kept, None for all: as many as of any.

        One without the other would look to every night as if it were being published just now.
        """
        days = [self.days.get(table.name) for table in kind.tables]
        return None if None in days else max(day for day in days if day is not None)


class Pin(_Section):
    """A pin names the encoder and codebook (package folders) of features from `from_ds` on."""

    from_ds: dt.date
    encoder: PackagePath
    codebook: PackagePath | None = None

    @property
    def way_to_a_codebook(self) -> str:
        """Returns what to do about a pin that ends the days of a complete one."""
        return (
            f"The pin from {self.from_ds} names the encoder {self.encoder} but no codebook, while "
            "nights before it have one: from then on none could be published. Take that pin out, "
            "and make its codebook beside the nights, on a day before: `courier embed --encoder "
            f"{self.encoder} --ds DAY`, then `courier fit-codebook --encoder {self.encoder} --ds "
            "DAY --clusters N`, which prints a whole pin."
        )


class Settings(_Section):
    """Holds everything that a night depends on besides its inputs.

    The shop's relative paths begin at `base`, where there is one, and else at the settings' folder.
    A history knows a click `history_lag_seconds` after it, and an item clicked twice once, or with
    `keep_repeats` twice. Impressions that come more than `late_days` late have none. Before
    `history_start_ds` there are no clicks, and on `closed_days` no impressions, nor perhaps a
    catalogue. Who waits for inputs takes files that nothing marks as whole once they have stood
    still for `settle_minutes`. The night of a day counts as available `availability_delay_hours`
    after the end of it. A night is of all `tables`, or of those of items alone, which need
    no impressions. The command `on_published` is called for each.
    """

    base: PackagePath | None = None
    root: FullPath
    feature_set: Annotated[str, Field(pattern=_NAME)] = "production"
    day_timezone: Timezone = "UTC"
    history_len: Count = 50
    window_days: Annotated[int, Field(ge=1, le=3650)] = 30
    history_lag_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    keep_repeats: bool = False
    late_days: Annotated[int, Field(ge=0, le=30)] = 2
    history_start_ds: dt.date | None = None
    closed_days: tuple[dt.date, ...] = ()
    settle_minutes: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 10.0
    availability_delay_hours: Annotated[float, Field(ge=0, lt=24)] = 6.0
    rows_per_shard: Count = 131_072
    on_published: tuple[str, ...] = ()
    tables: Literal["all", "items"] = "all"
    catalogue: Catalogue
    impressions: Impressions | None = None
    embed: Embed = Embed()
    item_features: ItemFeatures = ItemFeatures()
    simscore: Simscore = Simscore()
    training: Training = Training()
    gates: Gates = Gates()
    workers: Workers = Workers()
    backfill: Backfill = Backfill()
    output: Output = Output()
    retention: Retention = Retention()
    costs: Prices = Prices()
    beam: dict[str, Any] = {}
    pins: tuple[Pin, ...] = ()
    _shop: str = PrivateAttr(default=".")

    def model_post_init(self, context: Any) -> None:
        """Notes the folder where the shop's relative paths begin."""
        self._shop = (context or {}).get("base", ".")

    def full_template(self, typed: str) -> str:
        """Returns the full template of a table of the shop's, typed as in the settings.

        Raises OperatorError for one that cannot be read.
        """
        try:
            if day_names.has_day(typed):
                day_names.DayNames(typed)
        except ValueError as error:
            raise OperatorError(f"The path {typed!r} {error}. Correct it.") from error
        folder = day_names.literal(files.absolute(".", self._shop))
        return files.absolute(files.expanded(typed), folder)

    @property
    def night(self) -> tuple[Kind, ...]:
        """Returns the kinds of stages of a whole night."""
        return NIGHT if self.tables == "all" else ITEMS

    @property
    def log(self) -> Impressions:
        """Returns where the impressions lie; raises OperatorError where the settings have none."""
        if self.impressions is None:
            raise OperatorError(
                'The settings say tables = "items" and have no [impressions], so that nights make '
                "the tables of items alone. Histories, SimScores and training rows are made of a "
                "log of impressions: say where it lies under [impressions]."
            )
        return self.impressions

    @property
    def layout(self) -> Layout:
        """Returns where what is made lies."""
        user_root = self.output.user_root or self.root
        size = self.output.row_group_mb * 10**6
        return Layout(self.root, self.feature_set, user_root, self.output.partition, size)

    @model_validator(mode="after")
    def _consistent(self) -> "Settings":
        if self.feature_set == "shared":
            raise ValueError("feature_set must not be 'shared', where tables of all sets lie")
        if len({pin.from_ds for pin in self.pins}) < len(self.pins):
            raise ValueError("two [[pins]] have the same from_ds, so neither can win")
        for table, days in self.retention.days.items():
            if days < self.window_days:
                raise ValueError(
                    f"retention.days keeps {days} days of {table}, fewer than window_days = "
                    f"{self.window_days}: nights to come, and a recomputation of the window, would "
                    "miss what they read. Keep as many days, or more"
                )
        if self.history_lag_seconds >= self.window_days * 86_400:
            raise ValueError("history_lag_seconds reaches past window_days: no click would count")
        if self.impressions is None and self.tables == "all":
            raise ValueError(
                "[impressions] is missing; a shop without a log, which wants cluster IDs alone, "
                'says tables = "items"'
            )
        carry = self.impressions.carry if self.impressions else ()
        ours = {column.name for column in TABLES["user_simscores"].columns}
        ours |= {"ds", "click_time", "history", key_of(self.output.partition)}
        ours |= {name for name in carry if score_field(name)}
        if clash := sorted(ours & set(carry)):
            raise ValueError(f"impressions.carry cannot pass on {clash}, names that are ours")
        if len(set(carry)) < len(carry):
            raise ValueError("impressions.carry names a column twice")
        unknown = [k for k, v in self.beam.items() if isinstance(v, dict) and k not in BEAM_STAGES]
        if unknown:
            raise ValueError(
                f"[beam.{unknown[0]}] names no stage; stages are {', '.join(BEAM_STAGES)}"
            )
        return self

    @property
    def half_pins(self) -> list[Pin]:
        """Returns the pins without a codebook that end the days of one that has it."""
        complete = [pin.from_ds for pin in self.pins if pin.codebook]
        first = min(complete, default=dt.date.max)
        return [pin for pin in self.pins if pin.codebook is None and pin.from_ds > first]

    def pin_for(self, ds: dt.date) -> Pin:
        """Returns the pin with the greatest from_ds ≤ ds; raises OperatorError if there is none."""
        valid = [pin for pin in self.pins if pin.from_ds <= ds]
        if not valid:
            dates = ", ".join(str(pin.from_ds) for pin in self.pins)
            found = f"pins from {dates} on" if dates else "no pins"
            raise OperatorError(
                f"No pin holds for ds {ds}: the settings have {found}. A pin says which "
                "encoder and codebook make the features of a day. Make an encoder with `courier "
                "init-encoder` and add the stanza that it prints to the settings."
            )
        return max(valid, key=lambda pin: pin.from_ds)


def load_settings(path: str) -> Settings:
    """Reads and checks the settings in the TOML file at `path`.

    Raises OperatorError for a missing file, bad TOML, or a key that is unknown or wrong.
    """
    try:
        with open(path, "rb") as file:
            data = tomllib.loads(_text_of(path, file.read()))
    except (FileNotFoundError, IsADirectoryError) as error:
        raise OperatorError(
            f"There are no settings at {path}. Point at them with --config, or write them with "
            "`courier init --catalogue … --impressions …`."
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OperatorError(
            f"The settings {path} are not valid TOML: {error}. Correct that line."
        ) from error
    folder = os.path.dirname(os.path.abspath(path))
    base = folder
    if isinstance(data.get("base"), str):
        with contextlib.suppress(OperatorError):  # what is no path is told with the rest
            base = files.absolute(files.expanded(data["base"]), folder)
    try:
        # As JSON, since strict mode then takes arrays for tuples and text for dates, and no more.
        text = json.dumps(data, default=str)
        return Settings.model_validate_json(text, context={"folder": folder, "base": base})
    except ValidationError as error:
        problems = "; ".join(_problem(e) for e in error.errors())
        raise OperatorError(
            f"The settings {path} cannot be used: {problems}. Nothing was started."
        ) from error


def _text_of(path: str, data: bytes) -> str:
    """Decodes a settings file; raises OperatorError for what Windows editors may make of it."""
    marks = {codecs.BOM_UTF8: "UTF-8", codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}
    for mark, encoding in marks.items():
        if data.startswith(mark):
            raise OperatorError(
                f"The settings {path} begin with a byte-order mark, as {encoding} text of some "
                "editors does; TOML is UTF-8 without one. Save the file as UTF-8 without a mark "
                "(BOM)."
            )
    if b"\0" in data:
        raise OperatorError(
            f"The settings {path} hold NUL bytes, as UTF-16 text does; TOML is UTF-8. Save the "
            "file as UTF-8 without a mark (BOM)."
        )
    return data.decode()


def _problem(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"]) or "the file"
    if error["type"] == "extra_forbidden":
        known = _known_keys(error["loc"][:-1])
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known here are {', '.join(known)}"
        return f"unknown key {where!r}, {hint}"
    if error["type"] == "missing":
        return f"{where!r} is missing"
    found = "" if isinstance(error["input"], dict) else f", found {error['input']!r}"
    told = error["msg"].removeprefix("Value error, ").removesuffix(".")
    if error["type"] == "model_type" and error["loc"][0] == "gates" and len(error["loc"]) == 2:
        told = "Input should be {warn = …, fail = …}"
    return f"{where!r}: {told}{found}"


def _known_keys(loc: Iterable[Any]) -> list[str]:
    """Returns the keys of the section at `loc`, for example ("pins", 0)."""
    model: Any = Settings
    for part in loc:
        if isinstance(part, str):
            annotation = model.model_fields[part].annotation
            kinds = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
            (model,) = (kind for kind in kinds if issubclass(kind, BaseModel))
    return sorted(model.model_fields)
