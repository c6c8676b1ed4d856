"""Holds the slow, obviously right twins: plain loops over plain values, as the laws read."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import xxhash

Click = tuple[Any, Any, int]  # user, item, click time in us


def clicks_of(rows: Iterable[dict[str, Any]], delay_us: int = 0) -> list[Click]:
    """Dates each click: its own time, else the event's plus the delay, never before the event."""
    return [(r["user"], r["item"], clicked_at(r, delay_us)) for r in rows if r["clicked"]]


def clicked_at(row: dict[str, Any], delay_us: int = 0) -> int:
    event, click = row["event_time"], row["click_time"]
    return int(event + delay_us if click is None else max(click, event))


def history(
    clicks: list[Click], user: Any, moment: int, length: int, window_us: int, lag_us: int = 0,
    keep_repeats: bool = False,
) -> list[Any]:  # fmt: skip
    """Returns the latest distinct items that `user` clicked before `moment`, newest first.

    Clicks in [moment - window, moment - lag) count; with `keep_repeats` the items are the latest
    ones, distinct or not.
    """
    mine = sorted(
        {
            (time, item)
            for who, item, time in clicks
            if who == user and moment - window_us <= time < moment - lag_us
        }
    )
    found: list[Any] = []
    for _, item in reversed(mine):
        if keep_repeats or item not in found:
            found.append(item)
    return found[:length]


def night_at(moment: int, nights: Iterable[tuple[Any, int]]) -> Any:
    """Returns the newest of `nights`, each a day and since when it is available; None for none."""
    found = None
    for day, since in nights:
        if since <= moment and (found is None or day > found):
            found = day
    return found


def score(
    item: Any, past: list[Any], vectors: dict[Any, np.ndarray], length: int
) -> tuple[list[float], list[int]]:
    """Returns scores and mask, padded: a cosine where both items have a vector in scope, else 0."""
    scores, mask = [0.0] * length, [0] * length
    for place, other in enumerate(past):
        if item in vectors and other in vectors:
            x, y = vectors[item].astype(np.float64), vectors[other].astype(np.float64)
            scores[place] = float(x @ y / (np.sqrt(x @ x) * np.sqrt(y @ y)))
            mask[place] = 1
    return scores, mask


def tiers(scores: list[float], mask: list[int]) -> list[int]:
    """Counts the real scores in each of 20 tiers of [-1, 1]; 1.0 falls in the last."""
    counts = [0] * 20
    for value, real in zip(scores, mask, strict=True):
        if real:
            counts[min(19, int(np.floor((np.float64(np.float32(value)) + 1) * 10)))] += 1
    return counts


def muse_tier(score: float) -> int:
    """Returns the tier of a float32 score, ceil(10 score) + 10, by which upper edge is not below.

    The edges are the float32 numbers nearest to tenths.
    """
    return next(tier for tier in range(22) if score <= np.float32((tier - 10) / 10))


def muse_tiers(scores: list[float]) -> list[float]:
    """Returns log(count + 1) of the scores in each of 22 tiers; those that are not real are 0."""
    found = [muse_tier(score) for score in scores]
    return [math.log(found.count(tier) + 1) for tier in range(22)]


def buckets(scores: list[float], mask: list[int], is_muse: bool = False) -> list[int]:
    """Returns 1 + the tier of each real score, else 0."""
    found = []
    for value, real in zip(scores, mask, strict=True):
        tier = muse_tier(value) if is_muse else tiers([value], [1]).index(1)
        found.append(tier + 1 if real else 0)
    return found


def top_positions(scores: list[float], mask: list[int], k: int) -> list[int]:
    """Returns the places from 1 of the k largest real scores, of equal ones the first, then 0."""
    places = [place for place, real in enumerate(mask) if real]
    best = [place + 1 for place in sorted(places, key=lambda place: (-scores[place], place))]
    return [*best, *[0] * k][:k]


def nearest(vector: np.ndarray, centres: np.ndarray) -> tuple[int, float]:
    """Returns the place of the first of the nearest centres, and the Euclidean distance to it."""
    distances = [float(np.sqrt(((vector - centre) ** 2).sum())) for centre in centres]
    best = min(range(len(distances)), key=distances.__getitem__)
    return best, distances[best]


def training_rows(
    rows: Iterable[dict[str, Any]],
    clicks: list[Click],
    end: int,
    gap_us: int,
    window_us: int,
    delay_us: int = 0,
    name_of: Any = str,
    lag_us: int = 0,
) -> list[tuple[Any, Any, int, int, list[Any], list[bool], list[Any]]]:
    """Makes `training_rows`, each row a tuple of the columns in their order.

    `rows` have a `request`, None without one, which `name_of` then makes of the request's first
    moment, or of the next one that names no other request of the user.
    """
    made = []
    for user, request, shown in _requests(rows, gap_us, name_of):
        moment = min(row["event_time"] for row in shown)
        clicked, unclicked = [], []
        for item in {row["item"] for row in shown}:
            times = [clicked_at(r, delay_us) for r in shown if r["item"] == item and r["clicked"]]
            if any(time < end for time in times):
                clicked.append(item)
            elif not times:
                unclicked.append(item)
        pvs = sorted(clicked) + sorted(unclicked, key=lambda item: _sample(user, request, item))
        for chunk in range(max(1, math.ceil(len(clicked) / 5))):
            part = pvs[5 * chunk : 5 * chunk + 5]
            labels = [item in clicked for item in part]
            past = history(clicks, user, moment, 5, window_us, lag_us)
            if part:
                made.append((user, request, chunk, moment, part, labels, past))
    return sorted(made, key=lambda row: row[:3])


def _requests(
    rows: Iterable[dict[str, Any]], gap_us: int, name_of: Any
) -> list[tuple[Any, Any, list[dict[str, Any]]]]:
    """Groups rows into requests: (user, request_id, its impressions)."""
    given: dict[Any, list[dict[str, Any]]] = {}
    bursts: dict[Any, list[list[dict[str, Any]]]] = {}
    for row in sorted(rows, key=lambda row: row["event_time"]):
        if row["request"] is not None:
            given.setdefault((row["user"], row["request"]), []).append(row)
            continue
        mine = bursts.setdefault(row["user"], [])
        if not mine or row["event_time"] - mine[-1][-1]["event_time"] > gap_us:
            mine.append([])
        mine[-1].append(row)
    named = {**given}
    for user, mine in bursts.items():
        for shown in mine:
            moment = shown[0]["event_time"]
            while (user, name_of(moment)) in named:
                moment += 1
            named[user, name_of(moment)] = shown
    return [(user, name, shown) for (user, name), shown in named.items()]


def _sample(*ids: Any) -> int:
    """Returns the xxHash64 of the hashes of the IDs, 8 little-endian bytes each."""
    parts = [
        i.encode() if isinstance(i, str) else i.to_bytes(8, "little", signed=True) for i in ids
    ]
    hashes = [xxhash.xxh64_intdigest(part) for part in parts]
    return xxhash.xxh64_intdigest(b"".join(h.to_bytes(8, "little") for h in hashes))
