"""Opens the shop's tables of one ds and of earlier days, once however many stages read them.

Opening reads footers alone. A day that is not there is an error for ds, and told for earlier ones.
"""

import datetime as dt
import difflib
import functools
import math
from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import pyarrow as pa

from feature_jobs import inputs
from feature_jobs.inputs import Source
from feature_jobs.items.vector_table import VectorTable, open_vectors
from feature_jobs.schemas import InputNotReady, OperatorError
from feature_jobs.store import day_names
from feature_jobs.store.encoder_info import EncoderInfo
from pipelines.config import Settings

T = TypeVar("T", Source, VectorTable)
Found = dict[str, Source | VectorTable | InputNotReady]  # tables, or why one is not there, by name
_CLICK_DAYS = 2  # so long after the end of its log is a click looked for where histories begin


class ShopTables:
    """Opens the catalogues and impressions that stages of `ds` read; `say` tells missing days.

    `found` are partitions that were opened for other days, to which those opened here are added.
    """

    def __init__(
        self,
        settings: Settings,
        ds: dt.date,
        say: Callable[[str], None],
        found: Found | None = None,
    ):
        self._settings, self._ds, self._say = settings, ds, say
        self._found: Found = {} if found is None else found
        self._opened: dict[str, Source] = {}

    def catalogue(self, ds: dt.date) -> Source:
        return self._once(f"catalogue {ds}", lambda: self._open_catalogue(ds))

    def _open_catalogue(self, ds: dt.date) -> Source:
        section = self._settings.catalogue
        found = inputs.open_source(
            "catalogue", section.path, ds, section.columns.model_dump(),
            require_success=section.require_success,
            named=section.columns.model_fields_set,
            closed=not self.has_one_catalogue and ds in self._settings.closed_days,
            rewrite=section.image_uri_pairs,
            optional=() if section.image_roots else ("image_uri",),
        )  # fmt: skip
        if self.has_one_catalogue:
            inputs.check_one_snapshot("[catalogue] path", section.path, found)
        return found

    @property
    def has_one_catalogue(self) -> bool:
        """Tells whether one snapshot of the catalogue serves all days."""
        return not day_names.has_day(self._settings.catalogue.path)

    def vectors(self, ds: dt.date, encoder: EncoderInfo) -> VectorTable:
        """Opens the vectors that an encoder gives out for ds; one snapshot serves all days."""
        assert encoder.vectors is not None, encoder.encoder_id
        template = self._settings.full_template(encoder.vectors.path)
        key = f"vectors {encoder.encoder_id} {day_names.name_of(template, ds)}"
        of = encoder.vectors
        closed = day_names.has_day(template) and ds in self._settings.closed_days
        table = self._once(key, lambda: open_vectors(of, template, ds, encoder.dimension, closed))
        return table.of_day(ds)

    def impressions(self, ds: dt.date) -> Source:
        section = self._settings.log
        return self._once(
            f"impressions {ds}",
            lambda: inputs.open_source(
                "impressions", section.path, ds, section.columns.model_dump(), section.carry,
                section.input_timezone, section.require_success, section.columns.model_fields_set,
                ds in self._settings.closed_days,
            ),
        )  # fmt: skip

    @functools.cached_property
    def log(self) -> tuple[list[Source], list[str]]:
        """Opens the impressions of ds and of the days that its histories need.

        Returns with them the missing days, which are told.
        """
        log, missing = self._days_back(self.impressions)
        if missing:
            self._say(
                f"histories of ds {self._ds}: no impressions on {len(missing)} of the "
                f"{len(log) - 1 + len(missing)} days before it ({missing[-1]} to {missing[0]})"
            )
        return log, missing

    def catalogues(self) -> list[Source]:
        """Opens the catalogues of ds and of the days of the log, which tell an item's category."""
        if self.has_one_catalogue:
            return [self.catalogue(self._ds)]
        return self._days_back(self.catalogue)[0]

    def check_categories(self, wanted: Sequence[str]) -> None:
        """Raises OperatorError for a category that the catalogue of ds has no item of."""
        found = inputs.distinct_categories(self.catalogue(self._ds))
        unknown = [category for category in wanted if category not in found]
        if found and unknown:  # the catalogue of an empty day tells nothing
            near = difflib.get_close_matches(unknown[0], found, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(found[:10])}."
            raise OperatorError(
                f"training.categories names {unknown[0]!r}, but the catalogue of ds {self._ds} has "
                f"no item of that category; {hint} An encoder would be trained without items that "
                "it is meant for. Correct training.categories in the settings."
            )

    def item_id_type(self, otherwise: pa.DataType) -> pa.DataType:
        """Returns item_id's type in all tables that were opened; `otherwise` if no file tells."""
        return inputs.common_id_type("item_id", self._opened.values(), otherwise)

    def user_id_type(self, otherwise: pa.DataType) -> pa.DataType:
        return inputs.common_id_type("user_id", self._opened.values(), otherwise)

    def _days_back(self, open_day: Callable[[dt.date], Source]) -> tuple[list[Source], list[str]]:
        """Opens one table of ds and of the days that its histories need, newest first.

        Returns with the partitions the days that have none.
        """
        found, missing = [open_day(self._ds)], []
        start = self._settings.history_start_ds or dt.date.min
        for back in range(1, days_that_count(self._settings) + 1):
            day = self._ds - dt.timedelta(days=back)
            if day < start:
                break
            try:
                found.append(open_day(day))
            except InputNotReady:
                missing.append(str(day))
        return found, missing

    def _once(self, key: str, open_it: Callable[[], T]) -> T:
        if key not in self._found:
            try:
                self._found[key] = open_it()
            except InputNotReady as missing:
                self._found[key] = missing
        found = self._found[key]
        if isinstance(found, InputNotReady):
            raise found.with_traceback(None)
        self._opened[key] = found.source if isinstance(found, VectorTable) else found
        return cast(T, found)


def days_that_count(settings: Settings) -> int:
    """Returns how many days back a partition may hold a click of a day's histories.

    These are the window's days, those that impressions may be late, and some, since a click may
    come after the day that logs it.
    """
    delay_days = math.ceil(settings.log.click_delay_seconds / 86_400)
    return settings.window_days + settings.late_days + delay_days + _CLICK_DAYS
