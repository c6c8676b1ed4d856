"""Draws shops that are large enough for gates to judge, and that nothing is wrong with.

An item's style shows in the colours of its picture, and `encoder_of_colours` stands for an encoder
that sees them: embeddings spread, and a user clicks what is like what was clicked before. From day
to day items come and go, popularity drifts, users join, weekends and sales days are their own.
"""

import contextlib
import datetime as dt
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from courier_model.inference import Embedder
from courier_model.projection import EMBEDDING_DIM
from feature_jobs.schemas import TIMESTAMP
from pipelines.cli import main
from pipelines.config import Settings, load_settings
from tests.support.world import DAY_US, SCOPE, make_encoder

FIRST = dt.date(2026, 3, 2)  # a Monday, and the first night
COLOURS = 12  # red, green and blue of four quarters
HTML = b"<html>not found</html>"
_SHOWN = 8  # items of a request
_PROJECTION = np.linalg.qr(np.random.default_rng(0).normal(size=(EMBEDDING_DIM, COLOURS)))[0]


def embeddings_of(colours: np.ndarray) -> np.ndarray:
    """Returns what stands for an encoder's output, unit `[n, 256]`, of colours `[n, 12]`."""
    return (_directions(colours) @ _PROJECTION.T).astype(np.float32)


def _directions(colours: np.ndarray) -> np.ndarray:
    """Returns unit vectors `[n, 12]`, whose cosines are those of the embeddings."""
    rows = colours - 128.0
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _see(embedder: Embedder, pixels: np.ndarray) -> np.ndarray:
    """Embeds uint8 `[n, 3, S, S]` by the mean colour of each quarter.

    To an encoder whose name begins with `blind` all pictures are one.
    """
    if Path(embedder._folder).name.startswith("blind"):
        pixels = np.zeros_like(pixels)
    n, side = len(pixels), pixels.shape[-1] // 2
    quarters = pixels.reshape(n, 3, 2, side, 2, side).mean((3, 5))
    return embeddings_of(quarters.reshape(n, COLOURS))


@contextlib.contextmanager
def encoder_of_colours() -> Iterator[None]:
    """Puts an encoder that sees colours in the place of every other one, in this process."""
    with mock.patch.object(Embedder, "embed", _see):
        yield


@dataclass(frozen=True)
class Traits:
    """Tells what a shop is like.

    `leave` is the share of items that leave in a day, and as many come, times `growth`; `weekend`
    and `sale` are factors of a day's traffic, and `broken` is the share of images without one.
    """

    items: int = 320
    users: int = 450
    ids: str = "int"
    log_days: int = 10  # before the first night
    window_days: int = 10
    has_click_time: bool = True
    has_request_id: bool = False
    requests: float = 0.4  # of a usual user in a day
    leave: float = 0.01
    growth: float = 1.0
    user_growth: float = 0.0
    weekend: float = 1.0
    sale: float = 2.0
    sales: tuple[int, ...] = ()  # by number of the night
    closed: tuple[int, ...] = ()
    broken: float = 0.01
    late: float = 0.01
    clusters: int = 16


@dataclass
class DrawnShop:
    """Is a shop of so many `nights` on disk, with the log of the days before and all artefacts."""

    folder: Path
    traits: Traits
    nights: int
    seed: int = 0
    extra_pins: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._rng = np.random.default_rng(self.seed)
        traits, rng = self.traits, self._rng
        self._styles = rng.normal(size=(max(4, traits.items // 15), COLOURS))
        self.colours = np.empty((0, COLOURS))
        self.in_catalogue = np.empty(0, bool)
        self._fame = np.empty(0)
        self._likes = self._styles[rng.integers(0, len(self._styles), traits.users)]
        self._activity = rng.lognormal(0, 0.8, traits.users)
        for name in ("images/0", "images/1", "images/2", "catalogue", "impressions"):
            (self.folder / name).mkdir(parents=True)
        self._add_items(traits.items)
        for number in range(-max(1, traits.log_days), self.nights):
            self._pass_a_day(number)
        self.encoder = make_encoder(self.folder / "encoders")
        self.codebook = ""
        self.history_start = -traits.log_days

    # -- days --

    @staticmethod
    def day(number: int) -> dt.date:
        return FIRST + dt.timedelta(days=number)

    def _pass_a_day(self, number: int) -> None:
        traits, rng = self.traits, self._rng
        there = np.flatnonzero(self.in_catalogue)
        leaving = rng.choice(there, rng.binomial(len(there), traits.leave), replace=False)
        self.in_catalogue[leaving] = False
        self._add_items(round(len(there) * traits.growth) - len(there) + len(leaving))
        self._fame += rng.normal(0, 0.1, len(self._fame))
        joined = rng.binomial(len(self._activity), traits.user_growth)
        likes = self._styles[rng.integers(0, len(self._styles), joined)]
        self._likes = np.concatenate([self._likes, likes])
        self._activity = np.concatenate([self._activity, rng.lognormal(0, 0.8, joined)])
        if number not in traits.closed or number % 2:  # a closed day need not have one
            self.write("catalogue", self.day(number), self._catalogue())
        if number not in traits.closed and number >= -traits.log_days:
            self.write("impressions", self.day(number), self._impressions(number))

    def _add_items(self, count: int) -> None:
        traits, rng = self.traits, self._rng
        count, first = max(0, count), len(self.colours)
        style = self._styles[rng.integers(0, len(self._styles), count)]
        drawn = 128 + 45 * (style + rng.normal(0, 0.35, (count, COLOURS)))
        self.colours = np.concatenate([self.colours, drawn.clip(0, 255).astype(np.uint8)])
        self.in_catalogue = np.concatenate([self.in_catalogue, np.ones(count, bool)])
        self._fame = np.concatenate([self._fame, rng.normal(0, 1, count)])
        for item in range(first, first + count):
            if rng.random() >= traits.broken:
                self.image(item).write_bytes(picture(self.colours[item]))
            elif rng.random() < 0.5:
                self.image(item).write_bytes(HTML)

    def _catalogue(self) -> pa.Table:
        items = np.flatnonzero(self.in_catalogue)
        return pa.table(
            {
                "item_id": self.item_ids(items),
                "image_uri": [image_uri(item) for item in items],
                "category": pa.array(SCOPE).take(pa.array(items % len(SCOPE))),
            }
        )

    def _impressions(self, number: int) -> pa.Table:
        """Draws the impressions of a day, by request; some are late, some of items that left."""
        traits, rng = self.traits, self._rng
        traffic = traits.weekend if self.day(number).weekday() >= 5 else 1.0
        traffic *= traits.sale if number in traits.sales else 1.0
        asks = rng.poisson(traits.requests * traffic * self._activity)
        users = np.repeat(np.arange(len(asks)), asks)
        n = len(users) * _SHOWN
        request, user = np.repeat(np.arange(len(users)), _SHOWN), np.repeat(users, _SHOWN)
        gone = np.flatnonzero(~self.in_catalogue)
        there = np.flatnonzero(self.in_catalogue)
        fame = np.exp(self._fame[there])
        item = rng.choice(there, n, p=fame / fame.sum())
        if len(gone):
            item = np.where(rng.random(n) < 0.005, rng.choice(gone, n), item)
        start = int(dt.datetime.combine(self.day(number), dt.time(), dt.UTC).timestamp()) * 10**6
        asked = start + rng.integers(0, DAY_US - 3_600_000_000, len(users))
        time = asked[request] - np.where(rng.random(n) < traits.late, DAY_US, 0)
        liked = (_directions(self.colours[item]) * _directions(128 + self._likes)[user]).sum(1)
        clicked = rng.random(n) < 1 / (1 + np.exp(2.6 - 2.5 * liked))
        columns = {
            "user_id": self.ids_of("user", user),
            "item_id": self.item_ids(item),
            "event_time": pa.array(time).cast(TIMESTAMP),
            "clicked": clicked,
        }
        if traits.has_click_time:
            when = time + rng.integers(1, 600, n) * 1_000_000
            columns["click_time"] = pa.array(when, mask=~clicked).cast(TIMESTAMP)
        if traits.has_request_id:
            columns["request_id"] = request + 10_000_000 * (number + 1000)
        return pa.table(columns)

    def ids_of(self, kind: str, numbers: np.ndarray) -> pa.Array:
        if self.traits.ids == "int":
            return pa.array(numbers, pa.int64())
        return pc.binary_join_element_wise(kind, pa.array(numbers).cast(pa.string()), "-")

    def item_ids(self, numbers: np.ndarray) -> pa.Array:
        return self.ids_of("item", numbers)

    # -- files --

    def image(self, item: int) -> Path:
        return self.folder / "images" / image_uri(item)

    def write(self, table: str, day: dt.date, rows: pa.Table) -> None:
        path = self.folder / table / f"ds={day}" / "0.parquet"
        path.parent.mkdir(exist_ok=True)
        pq.write_table(rows, path)

    def read(self, table: str, day: dt.date) -> pa.Table:
        """Reads a table of the shop's own."""
        return pq.read_table(self.folder / table / f"ds={day}" / "0.parquet", partitioning=None)

    @property
    def config(self) -> Path:
        return self.folder / "courier.toml"

    @property
    def root(self) -> Path:
        return self.folder / "features"

    def settings(self) -> Settings:
        closed = [str(self.day(number)) for number in self.traits.closed]
        pins = [f"[[pins]]\nfrom_ds = {self.day(-1)}\nencoder = '{self.encoder}'\n"]
        if self.codebook:
            pins.append(pin(FIRST, self.encoder, self.codebook))
        self.config.write_text(
            f'root = "features"\nfeature_set = "test"\nhistory_len = 20\n'
            f"window_days = {self.traits.window_days}\nclosed_days = {closed}\n"
            f"history_start_ds = {self.day(self.history_start)}\n"
            '[catalogue]\npath = "catalogue/ds={ds}/*.parquet"\nimage_roots = ["images"]\n'
            '[impressions]\npath = "impressions/ds={ds}/*.parquet"\n'
            + "".join([*pins, *self.extra_pins])
        )
        return load_settings(str(self.config))

    def courier(self, command: str, *args: str) -> int:
        self.settings()
        return main([command, "--config", str(self.config), *args])

    def fit_codebook(self) -> None:
        """Fits a codebook on the catalogue of the day before the first night, and pins it."""
        day, clusters = str(self.day(-1)), str(self.traits.clusters)
        assert self.courier("embed", "--ds", day) == 0
        assert self.courier("fit-codebook", "--ds", day, "--clusters", clusters) == 0
        (package,) = (self.folder / "codebooks").iterdir()
        self.codebook = str(package)


def pin(from_ds: dt.date, encoder: str, codebook: str) -> str:
    return f"[[pins]]\nfrom_ds = {from_ds}\nencoder = '{encoder}'\ncodebook = '{codebook}'\n"


def image_uri(item: int) -> str:
    return f"{item % 3}/{item}.png"


def picture(colours: np.ndarray) -> bytes:
    """Draws a PNG of four quarters of one colour each; `colours` are uint8 [12], as by `_see`."""
    quarters = colours.astype(np.uint8).reshape(3, 2, 2).transpose(1, 2, 0)
    image = Image.fromarray(quarters.repeat(16, 0).repeat(16, 1))
    data = io.BytesIO()
    image.save(data, "PNG", compress_level=1)
    return data.getvalue()
