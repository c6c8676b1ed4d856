"""Finds the nights that the impressions of a day may know: `features_from = "previous"`.

An impression at t takes the newest night whose ds ended `availability_delay_hours` before t. For
most of a day that is the night before, for its first hours the one before that, for what came late
an older one; where there is none between, the next older one. A night whose embeddings alone were
taken away is passed over too, but none is looked for before it once all that may come would have
known it. As with `yesterday`, a published day stays with the nights that it names while they stand:
filling a hole changes no later day, nor does taking a night away. A night that was made again with
other content stands no more.
"""

import datetime as dt
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from feature_jobs.impressions.snapshots import Snapshot, after_its_day
from feature_jobs.items.item_vectors import broadcast_bytes
from feature_jobs.schemas import ITEM_EMBEDDINGS, InputNotReady
from feature_jobs.schemas import ITEM_FEATURES as FEATURES_TABLE
from feature_jobs.store import files
from feature_jobs.store.encoder_info import dimension_of
from feature_jobs.store.partitions import MANIFEST, Partition
from pipelines.config import Settings
from pipelines.planning.yesterday import Earlier, Yesterdays
from pipelines.running.stage import Reference
from pipelines.stages import EMBED, ITEM_FEATURES, SIMSCORE


@dataclass(frozen=True)
class ItemNight:
    """Names the tables of a night that impressions are scored with.

    `run_ids` are those of the tables, as the scores name them; `compared` are the features that
    those of the night are compared with, None for none. A worker's copy of its items takes about
    `copied_bytes`; `labels` are the resolutions of its codebook. One that `is_gone` was taken away
    since.
    """

    snapshot: Snapshot
    features: Reference
    embeddings: Reference
    run_ids: Mapping[str, str]
    compared: Reference | None = None
    copied_bytes: int = 0
    codebook_id: str = ""
    labels: tuple[str, ...] = ()
    is_gone: bool = False

    def as_input(self) -> dict[str, Any]:
        """Returns what the id of a run changes with that scores by it."""
        return {"ds": str(self.snapshot.ds), "from_us": self.snapshot.from_us, **self.run_ids}

    @property
    def tables(self) -> tuple[Reference, ...]:
        """Names its tables; none where they are gone."""
        return () if self.is_gone else (self.features, self.embeddings)


Nights = tuple[ItemNight, ...]  # newest first


def candidates(
    settings: Settings, ds: dt.date, known_from_us: int, yesterdays: Yesterdays
) -> Iterator[Nights]:
    """Yields the nights that scores of ds may be made with.

    First those that the published scores name, while they stand; then the newest, back to the one
    that `known_from_us` may know. Raises InputNotReady where one of these is published in part.
    """
    finder = _Finder(settings, yesterdays)
    if (named := finder.named(ds)) is not None:
        yield named
    yield finder.newest(ds, known_from_us)


@dataclass(frozen=True)
class _Finder:
    settings: Settings
    yesterdays: Yesterdays

    def newest(self, ds: dt.date, known_from_us: int) -> Nights:
        found = list[ItemNight]()
        before = self.yesterdays.before(ITEM_FEATURES, ds)
        while before:
            if night := self._night(ds, before):
                found.append(night)
            if self._snapshot(before.ds).from_us <= known_from_us:
                break  # also at one whose embeddings are gone: those of older ones went before
            before = self.yesterdays.before(ITEM_FEATURES, before.ds)
        return tuple(found)

    def named(self, ds: dt.date) -> Nights | None:
        """Returns the nights that the published scores name; None unless all of them stand."""
        own = self.yesterdays.published(SIMSCORE, ds)
        said = own[0].manifest["inputs"].get("snapshots") if own else None
        if said is None:
            return None
        then = own[0].manifest["made_from"]["snapshots"]
        found = [self._standing(ds, one, then[one["ds"]]) for one in said]
        return tuple(night for night in found if night) if all(found) else None

    def _standing(
        self, ds: dt.date, said: dict[str, Any], then: dict[str, str]
    ) -> ItemNight | None:
        """Returns a night that scores of ds name; None where it is another by now, or is to be.

        It goes by the runs that they name also where it was made again and came out the same.
        """
        day = dt.date.fromisoformat(said["ds"])
        run_ids = {table.name: said[table.name] for table in (FEATURES_TABLE, ITEM_EMBEDDINGS)}
        features, embedded = (self.yesterdays.at(kind, day) for kind in (ITEM_FEATURES, EMBED))
        if features is None or embedded is None:
            return self._gone(day, run_ids)
        there = [*map(self.yesterdays.published_now, (features, embedded))]
        now = {p.manifest["table"]: p.version for tables in there for p in tables}
        night = self._of(features, embedded)
        if night.run_ids == run_ids and not all(self._published(day)):
            return self._gone(day, run_ids)  # what fills the hole is taken for what was there
        is_same = all(now.get(name) == version for name, version in then.items())
        if not is_same or (self.yesterdays.strict and night.run_ids != run_ids):
            return None
        return replace(night, run_ids=run_ids)

    def _gone(self, day: dt.date, run_ids: dict[str, str]) -> ItemNight | None:
        """Returns what is known of a night that was taken away; None where it is on its way."""
        if self.yesterdays.strict or self._is_on_its_way(day):
            return None
        layout = self.settings.layout
        features, embeddings = (
            Reference(table, day, run_ids[table.name], layout.folder(table, day))
            for table in (FEATURES_TABLE, ITEM_EMBEDDINGS)
        )
        return ItemNight(self._snapshot(day), features, embeddings, run_ids, is_gone=True)

    def _is_on_its_way(self, day: dt.date) -> bool:
        """Returns whether a table of a night is being published anew."""
        return any(
            there is None and files.exists(os.path.join(folder, MANIFEST))
            for folder, there in zip(self._folders(day), self._published(day), strict=True)
        )

    def _published(self, day: dt.date) -> list[Partition | None]:
        return [self.yesterdays.look.published(folder) for folder in self._folders(day)]

    def _folders(self, day: dt.date) -> list[str]:
        return [self.settings.layout.folder(t, day) for t in (FEATURES_TABLE, ITEM_EMBEDDINGS)]

    def _night(self, ds: dt.date, features: Earlier) -> ItemNight | None:
        """Returns the night of `features`; None where its embeddings were taken away."""
        embedded = self.yesterdays.at(EMBED, features.ds)
        if features.planned:
            return self._of(features, embedded) if embedded else None
        _, there = self._published(features.ds)
        made_from = features.published[0].manifest["made_from"][ITEM_EMBEDDINGS.name]
        is_other = there and (embedded is None or there.version != made_from)
        if is_other or self._is_on_its_way(features.ds):
            raise InputNotReady(
                f"Impressions of ds {ds} are scored with the night of ds {features.ds}, but its "
                "item_features were made of other item_embeddings than are published: it is being "
                "published anew just now, or a stage of it was run alone. IDs and scores would be "
                f"of two nights. Run `courier refresh --ds {features.ds}`, then this command again."
            )
        return self._of(features, embedded) if there and embedded else None

    def _of(self, features: Earlier, embedded: Earlier) -> ItemNight:
        (own,), embeddings = features.tables, embedded.tables[0]
        previous = features.inputs.get("previous")
        compared = previous and self.yesterdays.at(
            ITEM_FEATURES, dt.date.fromisoformat(previous["ds"])
        )
        items = (
            embedded.planned.stage.input_rows if embedded.planned else embedded.published[0].rows
        )
        return ItemNight(
            self._snapshot(features.ds),
            own,
            embeddings,
            {FEATURES_TABLE.name: features.run_id, ITEM_EMBEDDINGS.name: embedded.run_id},
            compared.tables[0] if compared else None,
            broadcast_bytes(items, dimension_of(embedded.settings)),
            features.identities["codebook_id"],
            tuple(features.settings["max_id"]),
        )

    def _snapshot(self, day: dt.date) -> Snapshot:
        delay_us = round(self.settings.availability_delay_hours * 3_600_000_000)
        return after_its_day(day, self.settings.day_timezone, delay_us)
