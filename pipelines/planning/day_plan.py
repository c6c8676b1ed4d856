"""Opens and checks, once, what the plans of all stages of one ds share: inputs and artefacts."""

import datetime as dt
import functools
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import pyarrow as pa

from feature_jobs import inputs
from feature_jobs.impressions.histories import HistoryDay
from feature_jobs.schemas import DataContractError
from pipelines.config import Settings
from pipelines.planning.pinned import PinnedArtefacts
from pipelines.planning.shop_tables import Found, ShopTables
from pipelines.planning.yesterday import Before, Yesterdays, befores
from pipelines.running.layout import Layout
from pipelines.running.stage import Planned, Stage
from pipelines.running.states import Look
from pipelines.stages import EMBED, Kind

T = TypeVar("T")
P = TypeVar("P", bound=Planned)

NO_IDS = (pa.int64(), pa.int64())  # user_id and item_id, where no file tells their types


@dataclass(frozen=True)
class NightOptions:
    """Holds what an operator says of one night.

    `encoder` is embedded with in place of the pinned one, into a feature set of its own.
    `allow_overlap` lets an encoder or codebook be used that was made from ds or later days, `full`
    embeds every image as if there had been no day before, `remake` makes again what is published.
    `from_log` begins histories from the log of the window, and `embeddings_by` is how embeddings
    reach impressions, where the settings shall not decide.
    """

    encoder: str | None = None
    allow_overlap: bool = False
    full: bool = False
    from_log: bool = False
    embeddings_by: Literal["auto", "broadcast", "shuffle"] | None = None
    remake: bool = False

    @property
    def forced_by(self) -> str:
        """Returns why a stage is made again that is published; empty where none is."""
        return "asked for (--remake)" if self.remake else ""


@dataclass
class Range:
    """Holds what the plans of days share that are planned together, of which there are `days`.

    `nights` is where nights lie, also where a candidate's embeddings are planned; `sources` are
    what was opened of the shop's tables, `artefacts` encoders and codebooks by folder, and
    `changed` the days for whose change stages are made.
    """

    settings: Settings
    nights: Layout
    say: Callable[[str], None]
    options: NightOptions
    days: int = 1
    sources: Found = field(default_factory=dict)
    artefacts: dict[str, Any] = field(default_factory=dict)
    planned: dict[tuple[str, dt.date], Planned] = field(default_factory=dict)
    changed: dict[tuple[str, dt.date], frozenset[dt.date]] = field(default_factory=dict)
    look: Look = field(default_factory=Look)

    def yesterdays(self) -> Yesterdays:
        """Returns the finder of what one of the days goes on from."""
        strict = self.options.remake or self.options.full
        return Yesterdays(
            self.settings.layout, self.settings, self.look, self.planned, self.changed, strict
        )

    def yesterdays_beside(self, encoder_id: str) -> Yesterdays:
        """Returns that of the other side: of the nights for a candidate, and the reverse."""
        mine, nights = self.settings.layout, self.nights
        beside = nights.candidate(encoder_id) if mine == nights else nights
        return Yesterdays(beside, self.settings, self.look, {}, {})


class DayPlan:
    """Holds the checked inputs and artefacts of one ds, in a range of days that share some."""

    def __init__(self, of: Range, ds: dt.date):
        self.settings, self.options, self.ds = of.settings, of.options, ds
        self.range = of
        self.shop = ShopTables(self.settings, ds, of.say, of.sources)
        self.pinned = PinnedArtefacts(self.settings, ds, self.options.allow_overlap, of.artefacts)
        self.yesterdays = of.yesterdays()
        self._beside: Yesterdays | None = None

    def open_inputs(self, needed: Collection[Kind]) -> None:
        """Opens pin and tables of ds; raises DataContractError where IDs are of two types."""
        uses = set[str]().union(*(kind.uses for kind in needed))
        if "pin" in uses:
            # a pin that does not hold is told before an input that is missing
            _ = self.pinned.encoder
        if "catalogue" in uses:
            self.shop.catalogue(self.ds)
            if self.pinned.encoder.vectors:
                self.shop.vectors(self.ds, self.pinned.encoder)
        if "impressions" in uses:
            self.shop.impressions(self.ds)
            self.shop.user_id_type(pa.int64())
        self.item_id_type()

    def settled(self, kind: Kind, candidates: Iterable[T], plan: Callable[[T], P]) -> P:
        """Returns the plan by `as_published`, noting which days' changes it is made for."""
        return self.yesterdays.note(self.as_published(kind, candidates, plan))

    def as_published(self, kind: Kind, candidates: Iterable[T], plan: Callable[[T], P]) -> P:
        """Returns the plan by the first of what it may go on from that gives what is published.

        Where none does, the stage is made, and goes on from the last.
        """
        there = self.yesterdays.run_id(kind, self.ds)
        for candidate in candidates:
            planned = plan(candidate)
            if planned.stage.run_id == there:
                break
        return planned

    def stage(self, kind: Kind, forced_by: str = "", **fields: Any) -> Stage:
        forced_by = forced_by or self.options.forced_by
        return Stage(kind, self.ds, self.settings.layout, forced_by=forced_by, **fields)

    # -- Items --

    @property
    def beside(self) -> Yesterdays:
        """Returns the finder of embeddings on the other side, of a candidate or of the nights."""
        if self._beside is None:
            self._beside = self.range.yesterdays_beside(self.pinned.encoder.encoder_id)
        return self._beside

    def is_outdated(self, look: Look) -> bool:
        """Returns whether what it goes on from has been published anew since, by `look`."""
        found = [self.yesterdays, *([self._beside] if self._beside else [])]
        return any(one.is_outdated(look) for one in found)

    def item_id_type(self) -> pa.DataType:
        """Returns the type of the shop's item IDs.

        On days without any file it is that of the day before, so that tables still fit.
        """
        before = self.item_id_before
        return self.shop.item_id_type(pa.int64() if before is None else before)

    @functools.cached_property
    def item_id_before(self) -> pa.DataType | None:
        """Returns the type of the item IDs in the embeddings of the day before; None for none."""
        before = self.yesterdays.before(EMBED, self.ds)
        if before is None:
            return None
        known = before.planned.id_types if before.planned else None
        return known[0] if known else before.published[0].schema.field("item_id").type

    # -- Impressions --

    def befores(self) -> Iterator[Before]:
        """Yields what histories of ds may begin from."""
        from_log = self.options.from_log
        return befores(self.settings, self.ds, self.shop, from_log, self.yesterdays)

    def history_ids(
        self, known: tuple[pa.DataType, pa.DataType] | None
    ) -> tuple[pa.DataType, pa.DataType] | None:
        """Returns the types of user_id and item_id in the clicks of ds and of the days before.

        The latter are `known`, None where no file told them. Returns None where none tells; raises
        DataContractError where they differ.
        """
        if known is None:
            user_id = self.shop.user_id_type(pa.null())
            return None if user_id == pa.null() else (user_id, self.item_id_type())
        mine = self.shop.user_id_type(known[0]), self.shop.item_id_type(known[1])
        for name, kind, before in zip(("user_id", "item_id"), mine, known, strict=True):
            if kind != before:
                raise DataContractError(
                    f"{name} is {kind} in the tables of ds {self.ds} but was {before} in the "
                    "user_histories of the day before. No click would be found again. Cast "
                    f"{name} back where it is written, or say with history_start_ds = {self.ds} "
                    "in the settings that histories begin anew."
                )
        return known

    def history_day(self) -> HistoryDay:
        timezone = self.settings.day_timezone
        start = inputs.day_end(self.ds - dt.timedelta(days=1), timezone)
        return HistoryDay(self.ds.toordinal(), start, inputs.day_end(self.ds, timezone))
