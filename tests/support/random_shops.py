"""Makes random shops of a few days, to compare one way of making their tables with another.

Items come, go and come back; some change their image's address, or have the bytes of another one;
images are missing or broken. Between the first day and the rest, images change, vanish and return.
Rows come late, days are closed with or without a catalogue, and a second pin begins in the middle.
"""

import datetime as dt
import os
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from tests.conftest import Artefacts
from tests.support.world import SCOPE, World, draw_impressions, picture

FIRST = dt.date(2026, 3, 1)
_ITEMS = 14
_SURE = (1, 2, 3)  # always there with an image, so that no catalogue is without any


@dataclass
class RandomShop(World):
    """Is a shop of `count` days drawn by `seed`; the pin from `later` on is another one."""

    seed: int = 0
    later: Artefacts | None = None
    first: Artefacts | None = None

    def __post_init__(self) -> None:
        for name in ("images", "catalogue", "impressions"):
            (self.folder / name).mkdir(parents=True)
        self._rng = np.random.default_rng(self.seed)
        count = int(self._rng.integers(3, 9))
        self.days = [FIRST + dt.timedelta(days=n) for n in range(count)]
        closed = [day for day in self.days[1:] if self._rng.random() < 0.15]
        self.extra_settings = f"closed_days = {[str(day) for day in closed]}\nlate_days = 1"
        self.gates = "\n".join(
            ["image_coverage.fail = 0.0"]
            + [f"{name}.fail = 1.0" for name in ("balance", "dead_clusters", "churn", "outage")]
        )
        self.rows_per_shard = int(self._rng.choice([6, 10, 40]))
        for number, day in enumerate(self.days):
            if day not in closed or self._rng.random() < 0.5:
                self.write_catalogue_of(day)
            if day not in closed:
                rows = draw_impressions(day, seed=100 * self.seed + number, count=60)
                self.write_impressions(day, rows)
        self.write_images_of(0)
        self._pin()

    def _pin(self) -> None:
        assert self.first
        self.pin(self.days[0], self.first.encoder, self.first.codebook)
        if self.later:
            begins = self.days[int(self._rng.integers(1, len(self.days)))]
            self.pin(begins, self.later.encoder, self.later.codebook)

    def write_catalogue_of(self, day: dt.date) -> None:
        there = [n for n in range(1, _ITEMS) if n in _SURE or self._rng.random() < 0.75]
        self._rng.shuffle(there)
        other = [n not in _SURE and self._rng.random() < 0.2 for n in there]
        rows = pa.table(
            {
                "item_id": [self.item(n) for n in there],
                "image_uri": [
                    None if n == 13 else f"{n % 10}{'b' if b else ''}.png"
                    for n, b in zip(there, other, strict=True)
                ],
                "category": pa.array([SCOPE[n % 2] if n % 5 else "cable" for n in there]),
            }
        )
        self.write("catalogue", day, [rows.slice(0, 5), rows.slice(5)], rows_to_group=3)

    def write_images_of(self, time: int) -> None:
        """Writes the images as they are at a time, 0 or 1; some vanish, some return, some change.

        File times change only with the bytes.
        """
        rng = np.random.default_rng(self.seed)
        for name in [f"{n}{b}.png" for n in range(10) for b in ("", "b")]:
            path = self.folder / "images" / name
            kinds = rng.choice(["picture", "picture", "picture", "none", "broken"], 2)
            is_other = rng.random() < 0.3
            kind = "picture" if int(name[0]) in _SURE else kinds[time]
            shown = int(name[0]) + (11 if "b" in name else 0) + (22 * time if is_other else 0)
            path.unlink(missing_ok=True)
            if kind != "none":
                path.write_bytes(picture(shown) if kind == "picture" else b"<html>no</html>")
                os.utime(path, ns=(10**18 + shown, 10**18 + shown * 10**9))
