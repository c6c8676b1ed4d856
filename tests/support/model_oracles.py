"""Follows the formulas of losses and attention in loops over single vectors, lists of floats.

Rows are those of `objectives.Places`, as lists: places among the images, -1 = masked.
"""

import math
from collections.abc import Callable, Sequence
from operator import mul
from typing import NamedTuple

import torch

from courier_model.training.objectives import Places

Vector = list[float]
Candidate = tuple[Vector, int]  # an image's vector and its content
Attend = Callable[[Vector, list[Vector]], Vector]  # an item, its row's clicks -> reconstruction


class Row(NamedTuple):
    pv: list[int]
    clicked: list[bool]
    clicks: list[int]


# Float32 cosines that are closer than this may come in either order: of 256 products their rounding
# is 256 * 2**-24 at most, which is 1.5e-5, and that of reconstructed anchors a few times as much.
TIE = 1e-4


class Found(NamedTuple):
    """Holds the sum over anchors, their number, and of how many the own candidate is nearest.

    An anchor whose own candidate is as near as another may count or not: `hits` are all answers.
    """

    loss: float
    anchors: int
    hits: range


def listed(places: Places) -> list[Row]:
    columns = (places.pv.tolist(), places.clicked.tolist(), places.clicks.tolist())
    return [Row(*row) for row in zip(*columns, strict=True)]


def dot(x: Sequence[float], y: Sequence[float]) -> float:
    assert len(x) == len(y)
    return sum(map(mul, x, y))


def cosine(x: Sequence[float], y: Sequence[float]) -> float:
    return dot(x, y) / math.sqrt(dot(x, x) * dot(y, y))


# ---- Reconstruction --------------------------------------------------------------------------


class Attention:
    """Attends with several heads and the weights of torch's module, one query at a time."""

    def __init__(self, module: torch.nn.MultiheadAttention) -> None:
        size = module.embed_dim
        weights, biases = module.in_proj_weight.tolist(), module.in_proj_bias.tolist()
        self.query, self.key, self.value = (
            (weights[at : at + size], biases[at : at + size]) for at in (0, size, 2 * size)
        )
        self.out = module.out_proj.weight.tolist(), module.out_proj.bias.tolist()
        self.heads, self.width = module.num_heads, size // module.num_heads

    def __call__(self, query: Vector, keys: list[Vector]) -> Vector:
        q = _linear(query, self.query)
        k = [_linear(key, self.key) for key in keys]
        v = [_linear(key, self.value) for key in keys]
        joined: Vector = []
        for head in range(self.heads):
            part = slice(head * self.width, (head + 1) * self.width)
            scores = [math.exp(dot(q[part], one[part]) / math.sqrt(self.width)) for one in k]
            shares = [score / sum(scores) for score in scores]
            for place in range(part.start, part.stop):
                joined.append(sum(s * one[place] for s, one in zip(shares, v, strict=True)))
        return _linear(joined, self.out)


class CrossAttention(Attention):
    """Attends over clicks scaled to unit length, as `reconstruction.CrossAttention` does."""

    def __call__(self, query: Vector, keys: list[Vector]) -> Vector:
        return super().__call__(query, [unit(key) for key in keys])


def unit(x: Vector) -> Vector:
    return [value / math.sqrt(dot(x, x)) for value in x]


def _linear(x: Vector, layer: tuple[list[Vector], Vector]) -> Vector:
    return [dot(row, x) + bias for row, bias in zip(*layer, strict=True)]


def mean(_item: Vector, clicks: list[Vector]) -> Vector:
    return [sum(values) / len(clicks) for values in zip(*map(unit, clicks), strict=True)]


# ---- Contrastive losses ----------------------------------------------------------------------


def info_nce(
    anchor: Vector, own: int, candidates: list[Candidate], temperature: float
) -> tuple[float, float]:
    """Returns − log softmax at the candidate `own`, and how much nearer it is than any other.

    The softmax runs over `own` and all candidates of other content.
    """
    mine = cosine(anchor, candidates[own][0])
    others = [cosine(anchor, v) for v, content in candidates if content != candidates[own][1]]
    total = sum(math.exp(one / temperature) for one in (mine, *others))
    return math.log(total) - mine / temperature, mine - max(others, default=-math.inf)


def contrast(
    anchors: list[tuple[Vector, int]], candidates: list[Candidate], temperature: float
) -> Found:
    """Adds up `info_nce` of all anchors, each with the place of its own candidate."""
    parts = [info_nce(vector, own, candidates, temperature) for vector, own in anchors]
    sure, possible = (sum(margin > least for _, margin in parts) for least in (TIE, -TIE))
    return Found(sum(loss for loss, _ in parts), len(parts), range(sure, possible + 1))


def pv(
    images: list[Vector],
    contents: list[int],
    rows: list[Row],
    attend: Attend,
    temperature: float,
    clicked_only: bool = False,
) -> Found:
    """Returns L_pv; with `clicked_only` the unclicked PVs are no negatives."""
    candidates: list[Candidate] = []
    anchors = []
    for row in rows:
        past = [images[place] for place in row.clicks if place >= 0]
        for place, clicked in zip(row.pv, row.clicked, strict=True):
            if place < 0 or (clicked_only and not clicked):
                continue
            if clicked and past:
                anchors.append((attend(images[place], past), len(candidates)))
            candidates.append((images[place], contents[place]))
    return contrast(anchors, candidates, temperature)


def ucs(
    images: list[Vector],
    contents: list[int],
    rows: list[Row],
    attend: Attend,
    temperature: float,
) -> Found:
    """Returns L_ucs, the loss of the user click sequence."""
    candidates: list[Candidate] = []
    anchors = []
    for row in rows:
        valid = [place for place in row.clicks if place >= 0]
        if len(valid) >= 2:
            newest, *older = valid
            past = [images[place] for place in older]
            anchors.append((attend(images[newest], past), len(candidates)))
        if valid:
            candidates.append((images[valid[0]], contents[valid[0]]))
    return contrast(anchors, candidates, temperature)


def masked_prediction(
    images: list[Vector],
    contents: list[int],
    rows: list[Row],
    masked: list[int],
    attend: Attend,
    mask: Vector,
    positions: list[Vector],
    temperature: float,
) -> Found:
    """Predicts the place `masked` of each row's sequence: its first clicked PV and its clicks."""
    candidates: list[Candidate] = []
    anchors = []
    for row, hidden in zip(rows, masked, strict=True):
        shown = [p for p, c in zip(row.pv, row.clicked, strict=True) if p >= 0 and c]
        sequence = [shown[0] if shown else -1, *row.clicks]
        if sum(place >= 0 for place in sequence) >= 2:
            tokens = [
                [x + y for x, y in zip(mask if at == hidden else images[p], where, strict=True)]
                for at, (p, where) in enumerate(zip(sequence, positions, strict=True))
            ]
            past = [token for token, place in zip(tokens, sequence, strict=True) if place >= 0]
            anchors.append((attend(tokens[hidden], past), len(candidates)))
            candidates.append((images[sequence[hidden]], contents[sequence[hidden]]))
        candidates += [(images[place], contents[place]) for place in row.pv if place >= 0]
    return contrast(anchors, candidates, temperature)


def nt_xent(
    first: list[Vector], second: list[Vector], contents: list[int], temperature: float
) -> Found:
    n = len(contents)
    candidates = list(zip(first + second, contents * 2, strict=True))
    anchors = [(vector, (place + n) % (2 * n)) for place, (vector, _) in enumerate(candidates)]
    return contrast(anchors, candidates, temperature)


def clip(
    images: list[Vector], titles: list[Vector], contents: list[int], temperature: float
) -> Found:
    """Returns half of each direction's loss; nearest counts from image to title."""
    to_title, to_image = (
        contrast(
            [(vector, place) for place, vector in enumerate(one)],
            list(zip(other, contents, strict=True)),
            temperature,
        )
        for one, other in ((images, titles), (titles, images))
    )
    return to_title._replace(loss=(to_title.loss + to_image.loss) / 2)


def simsiam(predicted: list[list[Vector]], projected: list[list[Vector]]) -> Found:
    (p1, p2), (z1, z2) = predicted, projected
    loss = 0.0
    for n in range(len(p1)):
        loss -= (cosine(p1[n], z2[n]) + cosine(p2[n], z1[n])) / 2
    return Found(loss, len(p1), range(1))


# ---- Worlds ----------------------------------------------------------------------------------


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_places(rows: int, images: int, seed: int) -> Places:
    """Draws rows of places among images, of which the first is in no row.

    There are masked PVs, rows with no click to five, images in several rows, and reposts: two
    places of equal content.
    """
    generator = torch.Generator().manual_seed(seed)
    pv, clicks = torch.full((2, rows, 5), -1)
    clicked = torch.rand(rows, 5, generator=generator) < 0.5
    for row in range(rows):
        shown = 1 + torch.randperm(images - 1, generator=generator)
        pv[row, : 2 + row % 4] = shown[: 2 + row % 4]
        past = 1 + torch.randperm(images - 1, generator=generator)
        clicks[row, : row % 6] = past[: row % 6]
    pv[-1] = pv[-1].roll(2)  # masked places come anywhere among the PVs
    clicked[:, 0] = True
    keys = torch.arange(images) + 100
    keys[images // 2] = keys[images - 1]
    return Places(keys, pv, clicked, clicks)
