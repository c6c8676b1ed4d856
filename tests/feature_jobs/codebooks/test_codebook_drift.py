"""Tells how many items keep their cluster ID over ten nights and one change of encoder, by mode.

A world of 60 kinds of image of unequal frequency, some of which come up only later, in 128
clusters. Every night 5 % of the items leave and 7 % come. Printed with `pytest -s`.
"""

import numpy as np
import pytest

from feature_jobs.codebooks.codebook import Codebook
from feature_jobs.codebooks.fit_codebook import Fit, Sample, make_codebook
from feature_jobs.codebooks.nearest import CodebookSearch
from tests.support.codebooks import unit_rows

KINDS, CLUSTERS, ITEMS, NIGHTS = 60, 128, 6000, 10


class Catalogue:
    """Holds items and their embeddings, night after night.

    `ids` are int64 [n], `points` float32 [n, 256].
    """

    def __init__(self, seed: int):
        self._rng = np.random.default_rng(seed)
        self._kinds = unit_rows(KINDS, seed)
        self._night, self._issued = 0, 0
        self.ids, self.points = np.zeros(0, np.int64), np.zeros((0, 256), np.float32)
        self._come(ITEMS)

    def next_night(self) -> None:
        self._night += 1
        stay = self._rng.random(len(self.ids)) > 0.05
        self.ids, self.points = self.ids[stay], self.points[stay]
        self._come(ITEMS * 7 // 100)

    def seen_by_another_encoder(self) -> np.ndarray:
        """Returns the images in another space, where some look more alike and others less."""
        mixing = self._rng.normal(size=(256, 256)) / 16
        return unit(np.tanh(4 * self.points @ mixing) + self._rng.normal(size=(256,)) * 0.05)

    def _come(self, count: int) -> None:
        shares = 1.0 / (5 + np.arange(KINDS))
        shares[KINDS * 3 // 4 :] *= self._night / NIGHTS  # the last ones come up later
        kinds = self._rng.choice(KINDS, count, p=shares / shares.sum())
        noise = self._rng.normal(size=(count, 256)) * 0.04
        self.points = np.concatenate([self.points, unit(self._kinds[kinds] + noise)])
        self.ids = np.concatenate([self.ids, self._issued + np.arange(count)])
        self._issued += count


def unit(rows: np.ndarray) -> np.ndarray:
    scaled: np.ndarray = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return scaled


def fit(
    points: np.ndarray, mode: str, parent: Codebook | None, old: np.ndarray | None = None
) -> Codebook:
    sample = Sample(points, points[:0], "", {} if old is None else {"main": old})
    encoder = "one-000000000000" if old is None else "two-000000000000"
    return make_codebook(sample, Fit({"main": CLUSTERS}, mode=mode), encoder, "2026-01-01", parent)


def numbers(book: Codebook, points: np.ndarray) -> np.ndarray:
    return CodebookSearch(book).assign("main", points)[0]


def kept(ids: np.ndarray, now: np.ndarray, before: dict[int, int]) -> float:
    """Returns the share of the items of both nights that have the same number."""
    pairs = [(before[i], n) for i, n in zip(ids.tolist(), now.tolist(), strict=True) if i in before]
    assert len(pairs) > ITEMS / 4
    return float(np.mean([one == other for one, other in pairs]))


def ten_nights(mode: str, seed: int) -> tuple[list[float], float, Codebook, Catalogue]:
    """Returns the share kept from each night to the next, and from the first to the last."""
    world = Catalogue(seed)
    book = fit(world.points, "fresh", None)
    first = before = dict(
        zip(world.ids.tolist(), numbers(book, world.points).tolist(), strict=True)
    )
    shares, now = [], np.zeros(0, np.int32)
    for _ in range(NIGHTS):
        world.next_night()
        if mode != "frozen":
            book = fit(world.points, mode, book)
        now = numbers(book, world.points)
        shares.append(kept(world.ids, now, before))
        before = dict(zip(world.ids.tolist(), now.tolist(), strict=True))
    return shares, kept(world.ids, now, first), book, world


@pytest.mark.parametrize("seed", [0, 1])
def test_most_items_keep_their_id_unless_a_fit_is_fresh(seed: int) -> None:
    found = {mode: ten_nights(mode, seed) for mode in ("frozen", "warm", "fresh")}
    _, _, book, world = found["warm"]
    old = numbers(book, world.points)
    before = dict(zip(world.ids.tolist(), old.tolist(), strict=True))
    turned = world.seen_by_another_encoder()
    change = {
        mode: kept(world.ids, numbers(fit(turned, mode, book, old), turned), before)
        for mode in ("aligned", "fresh")
    }
    lines = [
        f"{mode:7}  mean of nights {np.mean(shares):6.1%}  worst night {min(shares):6.1%}  "
        f"first to last {whole:6.1%}"
        for mode, (shares, whole, _, _) in found.items()
    ]
    lines += [f"{mode:7}  new encoder {share:6.1%}" for mode, share in change.items()]
    print(f"\nseed {seed}: share of items that keep their ID", *lines, sep="\n")  # noqa: T201
    assert min(found["frozen"][0]) == 1.0
    assert found["frozen"][1] == 1.0
    assert min(*found["warm"][0], found["warm"][1]) >= 0.8
    assert max(found["fresh"][0]) == 0.0
    assert change["aligned"] >= 0.6
    assert change["fresh"] == 0.0
    (resolution,) = book.info.resolutions
    assert len(set(book.numbers["main"].tolist())) == CLUSTERS
    assert not set(resolution.retired) & set(book.numbers["main"].tolist())
