"""Makes random shops for `courier join`: samples, a log, and published nights, without a job.

Nights come late, are missing, half published or published again with other rows; encoders and
codebooks change in the middle; items leave; clocks tie; scores are published, and a night after
them again. `SlowJoin` says what a join is to give.
"""

import dataclasses
import datetime as dt
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from feature_jobs.codebooks.codebook import read_codebook_info, save_codebook
from feature_jobs.impressions import histories
from feature_jobs.impressions.histories import DAY_US, HistoryDay
from feature_jobs.inputs import open_source
from feature_jobs.schemas import (
    CROSSWALK,
    ITEM_EMBEDDINGS,
    ITEM_FEATURES,
    ITEM_REJECTS,
    RECENT_CLICKS,
    TIMESTAMP,
    USER_HISTORIES,
    USER_SIMSCORES,
    Table,
    cluster_field,
)
from feature_jobs.store import arrays, files, hashing, partitions
from feature_jobs.store.documents import digest, to_json, write_json
from feature_jobs.store.encoder_info import EncoderInfo, write_encoder_info
from feature_jobs.store.partitions import MANIFEST, STAGED, Partition
from pipelines.config import Catalogue, Impressions, Settings
from pipelines.planning.impressions import score_settings
from pipelines.planning.made_with import history_settings
from pipelines.planning.yesterday import history_law
from pipelines.running import records
from pipelines.running.layout import Layout
from pipelines.running.locks import Locks
from pipelines.running.publishing import publication, renew_latest
from pipelines.stages import kind_of
from tests.support.codebooks import by_hand, unit_rows
from tests.support.slow_join import (
    Law,
    Names,
    Options,
    PublishedNight,
    SlowJoin,
    available_from,
    midnight,
    read_clicks,
    read_nights,
)

FIRST = dt.date(2026, 3, 6)  # two days on, clocks change in New York
ITEMS, UNKNOWN, USERS, SILENT_USER = 8, 9, 4, 5
HOUR = 3_600_000_000
SCOPE = ("dress", "cable")  # in scope, and not
_VECTORS = unit_rows(6, seed=19)  # fewer than items, so that some look alike
_PLAIN = [Options(), Options(features_from="same"), Options(as_of="created")]
DRAWN = [
    *_PLAIN,
    Options(history_as_of="night"),
    Options(as_of="created", history_as_of="night", created_timestamp=True),
    Options(created_timestamp=True),
]


@dataclass(frozen=True)
class Pin:
    """Is what is pinned from a day on, as package folders."""

    from_ds: dt.date
    encoder: str
    codebook: str

    @property
    def identities(self) -> dict[str, str]:
        names = os.path.basename(self.encoder), os.path.basename(self.codebook)
        return dict(zip(("encoder_id", "codebook_id"), names, strict=True))


class World:
    """Is a shop below `folder`, drawn by a seed.

    `options` are drawn with it: what its samples may be joined with. `joined` are the days that
    have samples.
    """

    def __init__(self, seed: int, folder: Path):
        self.folder, self._rng = folder, np.random.default_rng(seed)
        self.labels = ("coarse",) if self._coin(0.5) else ()
        self.is_text = self._coin(0.5)
        self.days = [FIRST + dt.timedelta(days=n) for n in range(self._draw(4, 6))]
        self.joined = self.days[-3:]
        self.names = Names("uid", "sku", "at") if self._coin(0.3) else Names()
        self.options = DRAWN[self._draw(0, len(DRAWN) - 1)]
        self._draw_settings()
        self._write_log()
        self._draw_pins()
        self._publish_histories()
        for day in self.days:
            self._publish_night(day)
        for day in self.joined:
            self._write_samples(day)
            if self._coin(0.6):
                self.publish_scores(day, self._one_of("previous", "previous", "same"))
        if self._coin(0.3):  # so that of some of these scores the night is another now
            day = self._one_of(*self._created)
            self._record(day, self._publish_items(day, with_features=True))
        renew_latest(self.layout, Locks())

    # -- Drawing --

    def _draw(self, low: int, high: int) -> int:
        return int(self._rng.integers(low, high + 1))

    def _coin(self, chance: float) -> bool:
        return bool(self._rng.random() < chance)

    def _one_of(self, *values: Any) -> Any:
        return values[self._draw(0, len(values) - 1)]

    def item(self, number: int) -> Any:
        return f"item-{number}" if self.is_text else number

    def user(self, number: int) -> Any:
        return f"user-{number}" if self.is_text else number

    @property
    def id_type(self) -> pa.DataType:
        return pa.string() if self.is_text else pa.int64()

    # -- Settings --

    def _draw_settings(self) -> None:
        self.availability_delay_hours = self._one_of(0.0, 6.0, 23.5)
        self._delay_seconds = self._one_of(0.0, 1800.0)
        self._top: dict[str, Any] = {
            "day_timezone": self._one_of("UTC", "Asia/Shanghai", "America/New_York"),
            "history_len": self._draw(1, 5),
            "window_days": self._draw(1, 3),
            "late_days": self._draw(0, 2),
            "history_lag_seconds": self._one_of(0.0, 3600.0),
            "keep_repeats": self._coin(0.3),
            "rows_per_shard": self._one_of(5, 20, 1000),
        }
        self._embeddings_by = self._one_of("broadcast", "shuffle")
        for name in ("images", "ctr"):
            (self.folder / name).mkdir(parents=True)
        self.settings = Settings(
            root=str(self.folder / "features"),
            feature_set="test",
            catalogue=Catalogue(path="catalogue/{ds}", image_roots=(str(self.folder / "images"),)),
            impressions=Impressions(
                path=str(self.folder / "impressions/ds={ds}/*.parquet"),
                click_delay_seconds=self._delay_seconds,
            ),
            **self._top,
        )

    @cached_property
    def config(self) -> Path:
        """Returns the settings file; the catalogue that it names is not there."""
        text = [f"{name} = {json.dumps(value)}" for name, value in self._top.items()]
        text += [
            'root = "features"\nfeature_set = "test"',
            f"availability_delay_hours = {self.availability_delay_hours}",
            '[catalogue]\npath = "catalogue/ds={ds}/*.parquet"\nimage_roots = ["images"]',
            '[impressions]\npath = "impressions/ds={ds}/*.parquet"',
            f"click_delay_seconds = {self._delay_seconds}",
            f'[simscore]\nembeddings_by = "{self._embeddings_by}"',
        ]
        for pin in self.pins:
            text += [f"[[pins]]\nfrom_ds = {pin.from_ds}\nencoder = '{pin.encoder}'"]
            text += [f"codebook = '{pin.codebook}'"]
        path = self.folder / "courier.toml"
        path.write_text("\n".join(text) + "\n")
        return path

    @property
    def layout(self) -> Layout:
        return self.settings.layout

    @property
    def root(self) -> Path:
        return self.folder / "features"

    @property
    def law(self) -> Law:
        """Returns the settings as the slow join takes them."""
        top = self._top
        return Law(
            top["day_timezone"], top["history_len"], top["window_days"] * DAY_US,
            int(self._delay_seconds * 1e6), int(top["history_lag_seconds"] * 1e6),
            top["late_days"] * DAY_US, top["keep_repeats"],
            int(self.availability_delay_hours * HOUR),
        )  # fmt: skip

    def _start(self, day: dt.date, days: int = 0) -> int:
        return midnight(day + dt.timedelta(days=days), self.law.day_timezone)

    # -- The log --

    def _write_log(self) -> None:
        self.logged = {day: self._draw_impressions(day) for day in self.days}
        for day, rows in self.logged.items():
            self._write(self.folder / f"impressions/ds={day}", rows)

    def _draw_impressions(self, day: dt.date) -> pa.Table:
        """Draws impressions on a coarse grid of times; few are late, so that the day is its own."""
        count = self._draw(14, 22)
        users = [self._draw(1, SILENT_USER) for _ in range(count)]
        event = [self._moment(day, late=0.08) for _ in users]
        clicked = [user != SILENT_USER and self._coin(0.6) for user in users]
        click = [
            at + self._draw(-1, 4) * HOUR if is_clicked and self._coin(0.7) else None
            for at, is_clicked in zip(event, clicked, strict=True)
        ]
        return pa.table(
            {
                "user_id": pa.array([self.user(user) for user in users], self.id_type),
                "item_id": pa.array([self._any_item() for _ in users], self.id_type),
                "event_time": _times(event),
                "clicked": pa.array(clicked),
                "click_time": _times(click),
            }
        )

    def _any_item(self) -> Any:
        return self.item(UNKNOWN if self._coin(0.08) else self._draw(1, ITEMS))

    def _moment(self, day: dt.date, late: float) -> int:
        """Draws a moment of a day, or of one up to four days before it."""
        days = -self._draw(1, 4) if self._coin(late) else 0
        return self._start(day, days) + self._draw(0, 22) * HOUR

    def _write(self, folder: Path, rows: pa.Table) -> None:
        """Writes up to three files of small row groups; some may have no row."""
        folder.mkdir(parents=True)
        count = self._draw(1, 3)
        cuts = [0, *sorted(self._draw(0, len(rows)) for _ in range(count - 1)), len(rows)]
        for number, (at, end) in enumerate(itertools.pairwise(cuts)):
            path = folder / f"{number}.parquet"
            pq.write_table(rows.slice(at, end - at), path, row_group_size=7)
        (folder / "_SUCCESS").touch()

    # -- Samples --

    @property
    def samples(self) -> str:
        """Returns the template of the samples."""
        return str(self.folder / "ctr" / "dt={ds:%Y%m%d}" / "*.parquet")

    def sample_files(self, ds: dt.date) -> list[str]:
        """Returns the files of a day's samples in their order."""
        return sorted(map(str, (self.folder / "ctr" / f"dt={ds:%Y%m%d}").glob("*.parquet")))

    def samples_of(self, ds: dt.date) -> pa.Table:
        """Returns the samples of a day in their order."""
        found = [pq.ParquetFile(path).read() for path in self.sample_files(ds)]
        return pa.concat_tables(found)

    @cached_property
    def _types_of_samples(self) -> tuple[str, str, bool]:
        """Returns unit and zone of times, and whether items are int32: alike on all days."""
        unit, zone = self._one_of("us", "ms", "ns"), self._one_of("UTC", "Asia/Tokyo")
        return unit, zone, not self.is_text and self._coin(0.3)

    def _write_samples(self, day: dt.date) -> None:
        """Writes impressions, candidates that were never shown, and some rows twice, shuffled."""
        logged, n = self.logged[day], self._draw(4, 10)
        unit, zone, is_narrow = self._types_of_samples
        step = 1000 if unit == "ms" else 1
        drawn = {
            "user_id": pa.array([self.user(self._draw(1, SILENT_USER + 1)) for _ in range(n)]),
            "item_id": pa.array([self._any_item() for _ in range(n)]),
            "event_time": _times([self._edge(day, step) for _ in range(n)]),
        }
        shown = logged.select(list(drawn)).take(self._rng.permutation(len(logged))[:12])
        rows = pa.concat_tables([shown, pa.table(drawn, shown.schema)])
        rows = rows.take(self._rng.integers(0, len(rows), len(rows) + 3))
        at = rows["event_time"].cast(pa.timestamp(unit, zone))
        price = [None if self._coin(0.2) else float(number) for number in range(len(rows))]
        columns = {
            "label": pa.array(self._rng.integers(0, 2, len(rows)), pa.int8()),
            self.names.event_time: at,
            self.names.user_id: rows["user_id"],
            self.names.item_id: rows["item_id"].cast(pa.int32()) if is_narrow else rows["item_id"],
            "price": pa.array(price, pa.float64()),
            "row": pa.array([str(number) for number in range(len(rows))]),
        }
        self._write(self.folder / "ctr" / f"dt={day:%Y%m%d}", pa.table(columns))

    def _edge(self, day: dt.date, step: int) -> int:
        """Draws a moment, mostly one at which something changes, or a `step` before or after."""
        if self._coin(0.4):
            return self._moment(day, late=0.2)
        edges = [*self._edges(day)]
        moment = edges[self._draw(0, len(edges) - 1)] + step * self._draw(-1, 1)
        return min(moment, self._start(day, 1) - step)

    def _edges(self, day: dt.date) -> Iterator[int]:
        yield self._start(day)
        yield self._start(day) + int(self.availability_delay_hours * HOUR)
        yield self._start(day) - self.law.late_us
        yield from (at for at in self._created.values() if self._start(day) <= at)
        yield from self.logged[day]["click_time"].drop_null().cast(pa.int64()).to_pylist()

    # -- Pins --

    def _draw_pins(self) -> None:
        """Draws the pins: mostly two, the second of another codebook, or of another encoder too."""
        encoder = self._encoder("a" * 12)
        first = self._codebook(encoder, None)
        self.pins = [Pin(self.days[0], encoder, first)]
        changes = self._one_of("nothing", "codebook", "encoder")
        self.mixes_encoders = changes == "encoder"
        if changes == "nothing":
            return
        if self.mixes_encoders:
            encoder = self._encoder("b" * 12)
        day = self.days[self._draw(1, len(self.days) - 2)]
        self.pins.append(Pin(day, encoder, self._codebook(encoder, os.path.basename(first))))

    def _encoder(self, digits: str) -> str:
        folder = str(self.folder / "packages" / f"tiny-{digits}")
        name = os.path.basename(folder)
        write_encoder_info(folder, EncoderInfo(name, "none", {}, SCOPE[:1], None, None, "random"))
        return folder

    def _codebook(self, encoder: str, parent: str | None) -> str:
        """Writes a codebook of the lineage of `parent`; returns its folder."""
        numbers = {label: np.arange(1, 4) for label in ("main", *self.labels)}
        centres = {label: _VECTORS[:3] for label in numbers}
        made = by_hand(centres, numbers, os.path.basename(encoder))
        if parent:
            identity = f"test-{digest([made.info.codebook_id, parent])[:12]}"
            info = dataclasses.replace(made.info, codebook_id=identity, ancestors=(parent,))
            made = dataclasses.replace(made, info=info)
        crosswalk = CROSSWALK.empty_table() if parent else None
        return save_codebook(str(self.folder / "packages"), made, crosswalk)

    def pin_of(self, day: dt.date) -> Pin:
        return max((pin for pin in self.pins if pin.from_ds <= day), key=lambda pin: pin.from_ds)

    # -- Nights --

    def _publish_night(self, day: dt.date) -> None:
        """Publishes a night, once or twice, or embeddings alone, or nothing."""
        fate = self._one_of("whole", "whole", "whole", "again", "half", "none")
        if day == self.days[0] and fate in ("half", "none"):
            fate = "whole"
        if fate == "none":
            return
        parts = self._publish_items(day, with_features=fate != "half")
        if fate == "half":
            return
        self._record(day, parts)
        if fate == "again":
            self._record(day, self._publish_items(day, with_features=True))

    @cached_property
    def _created(self) -> dict[dt.date, int]:
        return {}

    def _record(self, day: dt.date, parts: list[Partition]) -> None:
        """Records a night as published on time, late, or before its day had ended."""
        shared = [
            partitions.open_published(self.layout.folder(table, day))
            for table in (USER_HISTORIES, RECENT_CLICKS)
        ]
        before = records.read_night(self.layout, day)
        record = records.night_record(self.layout, day, [*parts, *shared], before)
        hours = self._one_of(0, 3, 6, 30, 50)
        if self.options.history_as_of == "moment" and self._coin(0.2):
            hours = -20  # of items alone, whose clicks nobody has to know
        created = self._start(day, 1) + hours * HOUR + self._draw(0, 2) * 1000
        created = max(created, self._created.get(day, created) + 1000)
        self._created[day] = created
        at = dt.datetime.fromtimestamp(created // 10**6, dt.UTC)
        at += dt.timedelta(microseconds=created % 10**6)
        record["published_at"] = at.isoformat(timespec="microseconds")
        files.write_bytes(self.layout.night_path(day), to_json(record))

    def _publish_items(self, day: dt.date, with_features: bool) -> list[Partition]:
        pin, rows = self.pin_of(day), [self._draw_item(n, day) for n in range(1, ITEMS + 1)]
        known = [row for row in rows if self._coin(0.85)] or rows[:1]
        shards = self._one_of(1, 2, 4)
        ids = pin.identities
        embeddings = ITEM_EMBEDDINGS.schema(self.id_type)
        embedded = [row for row in known if row["has_image"]]
        rejected = [self._reject(row, day) for row in known if not row["has_image"]]
        encoder = {"encoder_id": ids["encoder_id"]}
        made = [
            (ITEM_EMBEDDINGS, embeddings, embedded, encoder),
            (ITEM_REJECTS, ITEM_REJECTS.schema(self.id_type), rejected, encoder),
        ]
        if with_features:
            extra = [cluster_field(label) for label in self.labels]
            without = ["embedding", "second_distance"]
            schema = ITEM_FEATURES.schema(self.id_type, extra=extra, without=without)
            made.append((ITEM_FEATURES, schema, [{**row, **ids} for row in known], ids))
        info = read_codebook_info(pin.codebook)
        settings = {"ancestors": info.ancestors, "max_id": info.max_ids}
        return [
            self.publish(table, day, schema, found, shards, identities, settings=settings)
            for table, schema, found, identities in made
        ]

    def _draw_item(self, number: int, day: dt.date) -> dict[str, Any]:
        """Draws what tables say of an item; of those not in the catalogue the images are known."""
        has_image, in_scope = self._coin(0.8), self._coin(0.85)
        has_left = has_image and self._coin(0.15)
        clusters = {
            name: self._draw(1, 3) if has_image and in_scope else 0
            for name in ("cluster_id", *(f"cluster_{label}" for label in self.labels))
        }
        return {
            "item_id": self.item(number),
            "category": SCOPE[not in_scope],
            "has_image": has_image,
            "in_scope": in_scope,
            "in_catalogue": not has_left,
            "left_catalogue_ds": day if has_left else None,
            "centre_distance": 0.0,
            "embedding": _VECTORS[self._draw(0, len(_VECTORS) - 1)].tolist(),
            "image_uri": f"{number}.png",
            "image_size": 1,
            "image_sha256": "0" * 64,
            **clusters,
        }

    def _reject(self, row: dict[str, Any], day: dt.date) -> dict[str, Any]:
        told = {"stage": "read", "reason": "missing", "message": "it is not there", "attempts": 1}
        days = {"first_ds": day, "last_ds": day, "next_ds": day + dt.timedelta(days=1)}
        return {**row, **told, **days}

    # -- Histories --

    def _publish_histories(self) -> None:
        """Publishes the tables of HISTORIES of all days, as a run of each day would."""
        law, run_id = history_law(self.settings), None
        days = [
            HistoryDay(day.toordinal(), self._start(day), self._start(day, 1)) for day in self.days
        ]
        clicks = [
            histories.clicks_of(rows, day.number, day.end_us, law)
            for rows, day in zip(self.logged.values(), days, strict=True)
        ]
        rows_by_day: dict[str, int] = {}
        settings = history_settings(self.settings)
        for known in histories.walk_days(pa.concat_tables(clicks), days, law):
            day = dt.date.fromordinal(known.day.number)
            rows_by_day[str(day)] = len(self.logged[day])
            inputs = {"histories_before": run_id, "log_rows": dict(rows_by_day)}
            made = (histories.user_histories(known), histories.recent_clicks(known))
            for table, rows in zip((USER_HISTORIES, RECENT_CLICKS), made, strict=True):
                schema = table.schema(self.id_type, self.id_type)
                told = {"inputs": inputs, "settings": settings}
                found = self.publish(table, day, schema, rows, 1, {}, **told)
            run_id = found.run_id

    # -- Publishing --

    def publish(
        self, table: Table, day: dt.date, schema: pa.Schema, rows: Any, shards: int,
        identities: dict[str, str], **told: Any,
    ) -> Partition:  # fmt: skip
        """Publishes `rows`, a table or one dict each, as a table of a day; `told` by its manifest.

        Its run is named by its inputs and settings, so that the tables of a stage are of one run.
        """
        if not isinstance(rows, pa.Table):
            plain = arrays.plain(schema.empty_table()).schema
            rows = pa.Table.from_pylist(rows, plain)
        run_id = digest([kind_of(table).name, str(day), identities, told])[:12]
        staging = self.layout.staging(kind_of(table), day, run_id)
        folder = os.path.join(staging, table.name)
        of = hashing.shard_of(hashing.hash_ids(rows[table.key]), shards)
        for shard in range(shards):
            mine = rows.filter(pa.array(of == shard))
            partitions.write_part(folder, table, schema, mine, shard, shards)
        parts = partitions.receipts(folder)
        listed = [{k: part[k] for k in ("name", "rows", "bytes", "sha256")} for part in parts]
        manifest = {
            "table": table.name,
            "ds": str(day),
            "feature_set": None if table.shared else self.layout.feature_set,
            "run_id": run_id, "files": listed, "rows": len(rows), "shards": shards,
            "counts": {}, "histograms": {}, "examples": {}, "identities": identities,
            "inputs": {}, "made_from": {}, "settings": {}, "notes": {}, "versions": {},
            "gates": [], **told,
        }  # fmt: skip
        write_json(os.path.join(folder, STAGED), manifest)
        place = self.layout.place(table, day)
        there = files.read_if_there(os.path.join(place.folder, MANIFEST))
        publication(folder, place, there, Locks()).run()
        files.delete_tree(staging)
        return partitions.open_published(place.folder)

    def publish_scores(self, day: dt.date, features_from: str) -> Partition:
        """Publishes `user_simscores` of a day's log: what the slow join makes of it.

        Its manifest says what it was made from, as one of SIMSCORE does.
        """
        options = Options(features_from=features_from)
        join = self.slow_join(day, options)
        made = join.of(self.logged[day], Names())
        made = made.append_column("impression_id", pa.array([f"{n:06d}" for n in range(len(made))]))
        found = made["feature_ds"].to_pylist()
        for name in ("encoder_id", "codebook_id"):
            of_rows = [self.pin_of(ds).identities[name] if ds else "" for ds in found]
            made = made.append_column(name, pa.array(of_rows))
        is_previous = features_from == "previous"
        without = ["history_item_ids", *([] if is_previous else ["feature_ds"])]
        schema = USER_SIMSCORES.schema(self.id_type, self.id_type, pa.string(), without=without)
        nights = [night for night in join.known if night.ds < day or not is_previous]
        told = self._previous_nights(nights) if is_previous else self._own_night(nights)
        settings = {**history_settings(self.settings), **score_settings(self.settings)}
        told["inputs"] |= self._log_inputs(day)
        return self.publish(USER_SIMSCORES, day, schema, made, 2, {}, settings=settings, **told)

    def _own_night(self, nights: list[PublishedNight]) -> dict[str, Any]:
        """Returns what a manifest tells of scores by the night of the day."""
        made_from = self._versions(nights[0].ds) if nights else {}
        return {"inputs": {}, "made_from": made_from}

    def _previous_nights(self, nights: list[PublishedNight]) -> dict[str, Any]:
        """Returns what a manifest tells of scores by nights that were available."""
        snapshots = [
            {"ds": str(one.ds), "from_us": available_from(one, self.law, Options())}
            for one in nights
        ]
        made_from = {str(one.ds): self._versions(one.ds) for one in nights}
        return {"inputs": {"snapshots": snapshots}, "made_from": {"snapshots": made_from}}

    def _versions(self, day: dt.date) -> dict[str, str]:
        folders = {t.name: self.layout.folder(t, day) for t in (ITEM_EMBEDDINGS, ITEM_FEATURES)}
        return {name: partitions.open_published(at).version for name, at in folders.items()}

    def _log_inputs(self, day: dt.date) -> dict[str, Any]:
        section = self.settings.log
        names = section.columns.model_dump()
        log = open_source("impressions", section.path, day, names)
        before = self.layout.folder(USER_HISTORIES, day - dt.timedelta(days=1))
        run_id = partitions.open_published(before).run_id
        return {"impressions": log.identity(), "histories_before": run_id}

    # -- What is expected --

    def slow_join(self, ds: dt.date, options: Options) -> SlowJoin:
        """Returns the slow join of what lies on disk now."""
        log = {
            day: sorted((self.folder / f"impressions/ds={day}").glob("*.parquet"))
            for day in self.days
        }
        nights = read_nights(self.root, self.layout.feature_set)
        clicks = read_clicks(log, self.law)
        return SlowJoin(ds, nights, clicks, self.labels, self.law, options)

    def expected(self, ds: dt.date, **options: Any) -> pa.Table:
        """Returns what `courier join` is to give for a day, with the fields of `Options`."""
        return self.slow_join(ds, Options(**options)).of(self.samples_of(ds), self.names)


def make_world(seed: int, folder: Path) -> World:
    """Makes the world of a seed in `folder`, which is not there yet."""
    return World(seed, folder)


def _times(moments: Sequence[int | None]) -> pa.Array:
    return pa.array(moments, pa.int64()).cast(TIMESTAMP)
