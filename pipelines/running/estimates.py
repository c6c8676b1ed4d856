"""Estimates what making stages takes: rows, images, bytes, time and money.

Rates are those of the root's own newest runs, and the bytes of a row those of its newest tables: a
shop, its machines and its encoder are known by what they did. Where none was published yet, bytes
are guessed by the columns; where nothing was made yet, there are no rates.
"""

import contextlib
import datetime as dt
import os
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from feature_jobs import schemas
from feature_jobs.schemas import DataContractError, Table
from feature_jobs.store import files
from feature_jobs.store.documents import parse_json
from feature_jobs.store.encoder_info import dimension_of
from pipelines.config import Prices, Settings
from pipelines.running.layout import Layout, date_of
from pipelines.running.stage import Planned, Stage
from pipelines.running.states import Look
from pipelines.stages import (
    EMBED,
    HISTORIES,
    ITEM_FEATURES,
    ITEMS,
    KINDS,
    TRAINING_ROWS,
    Kind,
    kind_of,
)

_RUN_DAYS = 14  # of so many days, the newest that have rates, are runs read,
_RUNS_READ = 28  # and of no more files: runs of earlier versions have none
_DAYS_TRIED = 3  # for a table that tells what a row takes; one of an empty day does not

Numbers = dict[str, float]


@dataclass(frozen=True)
class Cost:
    """Holds seconds by the clock, and those of cores."""

    seconds: float = 0.0
    core_seconds: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.seconds + other.seconds, self.core_seconds + other.core_seconds)

    def __mul__(self, times: float) -> "Cost":
        return Cost(self.seconds * times, self.core_seconds * times)


@dataclass(frozen=True)
class KindEstimate:
    """Estimates what all stages of one kind take; `cost` is None where no run tells a rate yet."""

    name: str
    days: int
    bytes_written: float
    cost: Cost | None


@dataclass(frozen=True)
class Estimate:
    """Estimates what making some stages takes.

    `items` and `impressions` are those of the days, whatever is made of them. `images` are looked
    at, of which about `images_to_embed` are embedded; exactly all, where no day before is gone on
    from.
    """

    items: int
    images: int
    images_to_embed: int
    impressions: int
    kinds: tuple[KindEstimate, ...]
    prices: Prices

    @property
    def bytes_written(self) -> float:
        return sum(kind.bytes_written for kind in self.kinds)

    @property
    def cost(self) -> Cost | None:
        """Returns what all stages take, None where that of one kind is not known."""
        costs = [kind.cost for kind in self.kinds if kind.cost]
        return sum(costs, Cost()) if len(costs) == len(self.kinds) else None

    @property
    def price_of_cores(self) -> float | None:
        """Returns what the cores cost, None where no price is set, or no time is known."""
        price, cost = self.prices.core_hour, self.cost
        return None if price is None or cost is None else price * cost.core_seconds / 3600

    @property
    def price_of_month(self) -> float | None:
        """Returns what a month of what is written costs, None where no price is set."""
        price = self.prices.gb_month
        return None if price is None else price * self.bytes_written / 1e9

    def as_json(self) -> dict[str, Any]:
        """Returns all of it; what is not known is None."""
        return {
            "items": self.items,
            "images": self.images,
            "images_to_embed": self.images_to_embed,
            "impressions": self.impressions,
            "bytes_written": round(self.bytes_written),
            **_told(self.cost),
            "stages": {
                kind.name: {
                    "days": kind.days,
                    "bytes_written": round(kind.bytes_written),
                    **_told(kind.cost),
                }
                for kind in self.kinds
            },
            "currency": self.prices.currency,
            "price_of_cores": _rounded(self.price_of_cores),
            "price_of_month": _rounded(self.price_of_month),
        }

    def lines(self) -> list[str]:
        """Returns what people read: the sums, a line for each kind of stage, all together."""
        lines = [("in all", self._sums())]
        for kind in self.kinds:
            days = f"{kind.days:,} day{'' if kind.days == 1 else 's'}"
            lines.append((kind.name, f"{days}, {size(kind.bytes_written)}, {_time(kind.cost)}"))
        lines.append(("time", _time(self.cost)))
        if self.cost:
            lines.append(("time of cores", f"about {duration(self.cost.core_seconds)}"))
        prices = [(self.price_of_cores, "for cores"), (self.price_of_month, "a month to keep it")]
        known = [
            f"about {price:,.2f} {self.prices.currency} {what}"
            for price, what in prices if price is not None
        ]  # fmt: skip
        lines += [("money", ", ".join(known))] if known else []
        return [f"{name:15}{text}" for name, text in lines]

    def _sums(self) -> str:
        to_embed = f"{self.images_to_embed:,} to embed"
        told = {
            f"{self.items:,} items": self.items,
            f"{self.images:,} images to look at": self.images,
            to_embed if self.images_to_embed == self.images else f"about {to_embed}": self.images,
            f"{self.impressions:,} impressions": self.impressions,
        }
        found = [text for text, number in told.items() if number]
        return ", ".join([*found, f"about {size(self.bytes_written)} to write"])


def _told(cost: Cost | None) -> dict[str, float | None]:
    found = asdict(cost) if cost else {"seconds": None, "core_seconds": None}
    return {name: _rounded(value) for name, value in found.items()}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _time(cost: Cost | None) -> str:
    return f"about {duration(cost.seconds)}" if cost else "no rates yet"


def estimate(settings: Settings, planned: Sequence[Planned], look: Look) -> Estimate:
    """Estimates what it takes to make all that is `planned`, from its beginning.

    Reads the run.json of some 14 nights, and a manifest for each table where `look` has not; raises
    DataContractError for one that is damaged.
    """
    rates, sizes = _Rates.of_runs(_newest_runs(settings.layout)), _Sizes(settings, look)
    items, impressions = dict[dt.date, int](), dict[dt.date, int]()
    for stage in (one.stage for one in planned):
        rows = items if stage.kind in ITEMS else impressions
        rows[stage.ds] = _rows_of_day(stage)
    of_kind = {kind: [one for one in planned if one.stage.kind is kind] for kind in KINDS}
    return Estimate(
        sum(items.values()),
        sum(one.images for one in planned),
        sum(map(rates.to_embed, planned)),
        sum(impressions.values()),
        tuple(
            KindEstimate(
                kind.name,
                len(days),
                sum(sizes.of_stage(one.stage) for one in days),
                rates.cost(days),
            )
            for kind, days in of_kind.items()
            if days
        ),
        settings.costs,
    )


# ---- Rates -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rates:
    """Holds what runs took: for a `row` of each kind of stage, and for an `image` that is embedded.

    Of the images that they looked at, where they went on from a day before, they embedded `share`.
    """

    row: Mapping[str, Cost]
    image: Cost | None
    share: float

    @classmethod
    def of_runs(cls, runs: Iterable[Mapping[str, Any]]) -> Self:
        """Returns medians over the jobs of `runs`, each as its run.json says.

        Days of one job are taken together: its cost is shared equally, whatever each had to do.
        """
        jobs, shares = defaultdict[tuple[str, str], list[Numbers]](list), []
        for run in runs:
            for name, stage in _measured(run):
                jobs[name, run["started"]].append(found := _numbers(stage))
                if found["unchanged"]:
                    shares.append(found["embedded"] / found["rows"])
        rows, images = defaultdict[str, list[Cost]](list), []
        for (name, _), days in jobs.items():
            job = {key: sum(day[key] for day in days) for key in days[0]}
            cost = Cost(job["seconds"], job["core_seconds"])
            embedding = min(1.0, job["embedding"] / job["core_seconds"])
            rows[name].append(cost * ((1 - embedding) / job["rows"]))
            if job["embedded"]:
                images.append(cost * (embedding / job["embedded"]))
        return cls(
            {name: _median(costs) for name, costs in rows.items()},
            _median(images) if images else None,
            statistics.median(shares) if shares else 0.0,
        )

    def to_embed(self, one: Planned) -> int:
        """Returns about how many images a stage embeds: all, where it takes none over.

        Else as many as there are items more than before, or the share that runs embedded.
        """
        if one.items_known is None:
            return one.images
        more = one.stage.input_rows - one.items_known
        return min(one.images, max(more, round(self.share * one.images)))

    def cost(self, planned: Sequence[Planned]) -> Cost | None:
        """Returns what stages of one kind take together, None where no run tells it."""
        row, images = self.row.get(planned[0].stage.name), sum(map(self.to_embed, planned))
        if row is None or (images and self.image is None):
            return None
        read = sum(_rows_read(one.stage) for one in planned)
        return row * read + (self.image or Cost()) * images


def _newest_runs(layout: Layout) -> Iterator[dict[str, Any]]:
    """Yields what is noted of the runs of the newest days that have rates."""
    names = files.list_names(os.path.dirname(layout.runs_folder(dt.date.min)))
    days, read = 0, 0
    for day in sorted(filter(None, map(date_of, names)), reverse=True):
        folder = layout.runs_folder(day)
        paths = [os.path.join(folder, run_id, "run.json") for run_id in files.list_names(folder)]
        noted = [run for path in paths if (run := _read(path))]
        found = [run for run in noted if any(_measured(run))]
        yield from found
        days, read = days + bool(found), read + len(noted)
        if days == _RUN_DAYS or read >= _RUNS_READ:
            return


def _read(path: str) -> dict[str, Any] | None:
    """Returns what a run noted; nothing where it is damaged: an estimate is to stop nobody."""
    found = files.read_if_there(path)
    with contextlib.suppress(DataContractError):
        return parse_json(path, found) if found else None
    return None


def _measured(run: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields the stages that a run made, as versions of COURIER note them that measure."""
    for name, stage in run["stages"].items():
        if stage.get("cpu_seconds") and (stage.get("items") or stage.get("impressions")):
            yield name, stage


def _numbers(stage: Mapping[str, Any]) -> Numbers:
    """Returns what run.json says of a stage, as far as rates follow from it."""
    work = stage.get("work", {})
    return {
        "seconds": stage["wall_seconds"],
        "core_seconds": stage["cpu_seconds"],
        "rows": stage.get("items") or stage["impressions"],
        "embedded": work.get("images_embedded", 0),
        "unchanged": work.get("images_unchanged", 0),
        # Seconds of threads. Their part of those of the cores is taken for their part of the clock.
        "embedding": work.get("decode_seconds", 0.0) + work.get("forward_seconds", 0.0),
    }


def _median(costs: Sequence[Cost]) -> Cost:
    return Cost(
        statistics.median(cost.seconds for cost in costs),
        statistics.median(cost.core_seconds for cost in costs),
    )


# ---- Rows and bytes ----------------------------------------------------------------------------


def _rows_of_day(stage: Stage) -> int:
    """Returns the items, or the impressions, of the day."""
    return stage.upstream[0].input_rows if stage.kind is ITEM_FEATURES else stage.input_rows


def _rows_read(stage: Stage) -> int:
    """Returns what the job reads for a stage: the day's rows, and those of a log to begin from."""
    return _rows_of_day(stage) + sum(day["rows"] for day in stage.inputs.get("earlier_log", ()))


class _Sizes:
    """Estimates bytes of tables, by the newest of each that is published."""

    def __init__(self, settings: Settings, look: Look) -> None:
        self._settings, self._look = settings, look
        self._of_row: dict[str, float] = {}

    def of_stage(self, stage: Stage) -> float:
        """Returns about how many bytes the tables of a stage have."""
        rows = _rows_that_size(stage.kind, stage.inputs, _rows_of_day(stage))
        dimension = dimension_of(stage.settings)
        return sum(self._bytes_of_row(table, dimension) for table in stage.tables) * rows

    def _bytes_of_row(self, table: Table, dimension: int) -> float:
        if table.name not in self._of_row:
            published = self._of_newest(table)
            guess = _guess(table, self._settings, dimension) if published is None else published
            self._of_row[table.name] = guess
        return self._of_row[table.name]

    def _of_newest(self, table: Table) -> float | None:
        """Returns the bytes that the newest table has for a row that came in, None for no table."""
        layout = self._settings.layout
        for day in layout.begun_days(table)[: -_DAYS_TRIED - 1 : -1]:
            if found := self._look.published(layout.folder(table, day)):
                manifest = found.manifest
                rows = _rows_that_size(kind_of(table), manifest["inputs"], found.rows)
                if rows:
                    return sum(file["bytes"] for file in manifest["files"]) / rows
        return None


def _rows_that_size(kind: Kind, inputs: Mapping[str, Any], rows: int) -> int:
    """Returns the rows that a table's size follows: those of its day, `rows`, or of its inputs.

    Histories follow the log of the whole window.
    """
    if kind is HISTORIES:
        return sum(inputs["log_rows"].values())
    if kind is EMBED:
        return int(inputs["catalogue"]["rows"])
    if kind is TRAINING_ROWS:
        return int(inputs["log"][0]["rows"])  # newest first
    return rows


def _guess(table: Table, settings: Settings, dimension: int) -> float:
    """Returns the bytes for a row that came in, by the columns and what they took in the demo."""
    embedding, length = 4 * dimension, settings.history_len
    columns = settings.simscore.columns
    of_history = 4 * sum(name.startswith("history_") for name in columns)
    sizes = {
        schemas.ITEM_EMBEDDINGS.name: embedding + 100,
        schemas.ITEM_REJECTS.name: 5,  # a hundred, of one item in twenty
        schemas.ITEM_FEATURES.name: 15 + embedding * settings.item_features.vector,
        schemas.USER_HISTORIES.name: 1,  # 8 for each click, of which there is one in eight rows
        schemas.RECENT_CLICKS.name: 0.5,
        schemas.USER_SIMSCORES.name: 40 + (3 + of_history + ("sim_bucket" in columns)) * length,
        schemas.TRAINING_ROWS.name: 10,
    }
    return sizes[table.name]


# ---- In words ----------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """Returns a time as people say it, in two units at most: 45 s, 3 h 20 min, 5 d 4 h."""
    whole, minutes, hours = round(seconds), round(seconds / 60), round(seconds / 3600)
    if whole < 60:
        return f"{whole} s"
    if minutes < 10:
        return _in_two(whole, 60, "min", "s")
    if minutes < 60:
        return f"{minutes} min"
    return _in_two(minutes, 60, "h", "min") if hours < 48 else _in_two(hours, 24, "d", "h")


def _in_two(count: int, per: int, large: str, small: str) -> str:
    whole, rest = divmod(count, per)
    return f"{whole:,} {large}" + (f" {rest} {small}" if rest else "")


def size(of_bytes: float) -> str:
    """Returns bytes as people say them: 71.2 MB."""
    units = {"TB": 1e12, "GB": 1e9, "MB": 1e6}
    unit = next((name for name, least in units.items() if of_bytes >= least), "kB")
    return f"{of_bytes / units.get(unit, 1e3):,.1f} {unit}"
