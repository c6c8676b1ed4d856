"""The slow, obviously right twins: plain loops over plain values, as the laws read."""

from collections.abc import Iterable
from typing import Any

import numpy as np

Click = tuple[Any, Any, int]  # user, item, click time in us


def clicks_of(rows: Iterable[dict[str, Any]], delay_us: int = 0) -> list[Click]:
    """When each click happened: its own time, else the event's plus the delay, never before it."""
    found = []
    for row in rows:
        if row["clicked"]:
            time = row["click_time"]
            time = row["event_time"] + delay_us if time is None else max(time, row["event_time"])
            found.append((row["user"], row["item"], time))
    return found


def history(clicks: list[Click], user: Any, moment: int, length: int, window_us: int) -> list[Any]:
    """The latest distinct items that `user` clicked in [moment - window, moment), newest first."""
    mine = sorted(
        {
            (time, item)
            for who, item, time in clicks
            if who == user and moment - window_us <= time < moment
        }
    )
    found: list[Any] = []
    for _, item in reversed(mine):
        if item not in found:
            found.append(item)
    return found[:length]


def score(
    item: Any, past: list[Any], vectors: dict[Any, np.ndarray], length: int
) -> tuple[list[float], list[int]]:
    """Scores and mask, padded: the cosine where both items have a vector in scope, else 0."""
    scores, mask = [0.0] * length, [0] * length
    for place, other in enumerate(past):
        if item in vectors and other in vectors:
            x, y = vectors[item].astype(np.float64), vectors[other].astype(np.float64)
            scores[place] = float(x @ y / (np.sqrt(x @ x) * np.sqrt(y @ y)))
            mask[place] = 1
    return scores, mask


def tiers(scores: list[float], mask: list[int]) -> list[int]:
    """How many real scores lie in each of 20 tiers of [-1, 1]; 1.0 in the last."""
    counts = [0] * 20
    for value, real in zip(scores, mask, strict=True):
        if real:
            counts[min(19, int(np.floor((np.float64(np.float32(value)) + 1) * 10)))] += 1
    return counts


def nearest(vector: np.ndarray, centres: np.ndarray) -> tuple[int, float]:
    """The first of the nearest centres and the Euclidean distance to it."""
    distances = [float(np.sqrt(((vector - centre) ** 2).sum())) for centre in centres]
    best = min(range(len(distances)), key=distances.__getitem__)
    return best, distances[best]
