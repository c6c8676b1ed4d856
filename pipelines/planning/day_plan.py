"""Opens and checks, once, what the plans of all stages of one ds share: inputs and artefacts."""

import datetime as dt
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import pyarrow as pa

from feature_jobs import inputs
from feature_jobs.impressions.histories import HistoryDay
from feature_jobs.inputs import Source
from feature_jobs.schemas import (
    ITEM_EMBEDDINGS,
    ITEM_FEATURES,
    ITEM_REJECTS,
    DataContractError,
    InputNotReady,
    Table,
)
from feature_jobs.store import partitions
from pipelines.config import Settings
from pipelines.planning import yesterday
from pipelines.planning.pinned import PinnedArtefacts
from pipelines.planning.shop_tables import ShopTables
from pipelines.planning.yesterday import Before
from pipelines.running import layout
from pipelines.running.stage import Stage

_WITHOUT_PIN = {"histories", "training-rows"}
NO_IDS = (pa.int64(), pa.int64())  # user_id and item_id, where no file tells their types
_OF_IMPRESSIONS = {"histories", "simscore", "training-rows"}


@dataclass(frozen=True)
class NightOptions:
    """Holds what an operator says of one night.

    `allow_overlap` lets an encoder or codebook be used that was made from ds or later days,
    `allow_churn` publishes however many items changed their cluster, `full` embeds every image as
    if there had been no day before. `from_log` begins histories from the log of the window, and
    `embeddings_by` is how embeddings reach impressions, where the settings shall not decide.
    """

    allow_overlap: bool = False
    allow_churn: bool = False
    full: bool = False
    from_log: bool = False
    embeddings_by: Literal["auto", "broadcast", "shuffle"] | None = None


class DayPlan:
    """Holds the checked inputs and artefacts of one ds.

    `earlier` are the histories of the day before, where they are planned too, and `together` the
    number of days that are. `found` is what was opened of the shop's tables for other days.
    """

    def __init__(
        self,
        settings: Settings,
        ds: dt.date,
        say: Callable[[str], None],
        options: NightOptions,
        earlier: Stage | None = None,
        together: int = 1,
        found: dict[str, Source | InputNotReady] | None = None,
    ):
        self.settings, self.ds, self.options = settings, ds, options
        self.shop = ShopTables(settings, ds, say, found)
        self.pinned = PinnedArtefacts(settings, ds, options.allow_overlap)
        self._earlier, self.together = earlier, together
        self._finds: list[Callable[[], tuple[partitions.Partition, ...]]] = []
        self._seen: list[partitions.Partition] = []

    # -- What it goes on from --

    def _look(
        self, find: Callable[[], tuple[partitions.Partition, ...]]
    ) -> tuple[partitions.Partition, ...]:
        """Returns what `find` does, and remembers it as what plans are built on."""
        found = find()
        self._finds.append(find)
        self._seen += found
        return found

    def is_outdated(self) -> bool:
        """Returns whether what was looked at has been published anew or overtaken since."""
        now = [partition for find in self._finds for partition in find()]
        return _versions(now) != _versions(self._seen)

    def open_inputs(self, needed: Sequence[str]) -> None:
        """Opens pin and tables of ds; raises DataContractError where IDs are of two types."""
        if set(needed) - _WITHOUT_PIN:
            # a pin that does not hold is told before an input that is missing
            _ = self.pinned.encoder
        if "embed" in needed:
            self.shop.catalogue(self.ds)
        if _OF_IMPRESSIONS & set(needed):
            self.shop.impressions(self.ds)
            self.shop.user_id_type(pa.int64())
        self.item_id_type()

    def stage(
        self, name: str, define: Callable[[Any, Sequence[Stage]], None], **fields: Any
    ) -> Stage:
        settings = self.settings
        return Stage(name, self.ds, settings.root, settings.feature_set, define=define, **fields)

    # -- Items --

    @functools.cached_property
    def day_before(self) -> tuple[partitions.Partition, ...]:
        """Returns embeddings and rejects of the newest day before ds with both; empty for none."""
        return self._look(partial(self._latest_before, ITEM_EMBEDDINGS, ITEM_REJECTS))

    @functools.cached_property
    def previous_features(self) -> partitions.Partition | None:
        """Returns `item_features` of the newest day before ds that has them; None for none.

        Cluster IDs are compared with theirs.
        """
        found = self._look(partial(self._latest_before, ITEM_FEATURES))
        return found[0] if found else None

    def _latest_before(self, *wanted: Table) -> tuple[partitions.Partition, ...]:
        return layout.latest_before(self.settings.root, self.settings.feature_set, wanted, self.ds)

    @property
    def of_another_lineage(self) -> bool:
        """Returns whether neither codebook, of ds or the day before, is an ancestor of the other.

        Then even equal numbers mean nothing to each other.
        """
        if self.previous_features is None:
            return False
        manifest, codebook = self.previous_features.manifest, self.pinned.codebook
        before = manifest["identities"]["codebook_id"]
        return not (
            before in (codebook.codebook_id, *codebook.ancestors)
            or codebook.codebook_id in manifest["settings"].get("ancestors", ())
        )

    def item_id_type(self) -> pa.DataType:
        """Returns the type of the shop's item IDs.

        On days without any file it is that of the day before, so that tables still fit.
        """
        before, _ = self.day_before or (None, None)
        otherwise = before.schema.field("item_id").type if before else pa.int64()
        return self.shop.item_id_type(otherwise)

    # -- Impressions --

    @functools.cached_property
    def before(self) -> Before:
        """Returns what histories of ds begin from."""
        if self._earlier:
            return yesterday.made_before(self._earlier, self.settings)
        newest = partial(self._look, partial(yesterday.newest_before, self.settings, self.ds))
        return yesterday.find_before(
            self.settings, self.ds, self.shop, self.options.from_log, newest
        )

    def history_ids(self) -> tuple[pa.DataType, pa.DataType] | None:
        """Returns the types of user_id and item_id in the clicks of ds and of the days before.

        Returns None where no file tells them; raises DataContractError where they differ.
        """
        known = self.before.ids
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


def _versions(found: Sequence[partitions.Partition]) -> dict[str, str]:
    """Returns the versions of partitions by their folders."""
    return {partition.folder: partition.manifest["version"] for partition in found}
