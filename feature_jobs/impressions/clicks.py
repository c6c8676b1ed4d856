"""Finds the history of a moment among clicks, held as arrays: the heart of `histories`, in numpy.

Nothing here costs Python per click or per moment, and no moment costs more than a few times
`history_len`, however many clicks or repeats its user has.
"""

from dataclasses import dataclass

import numpy as np

_MAX_CELLS = 250_000  # candidates looked at in one step, so that a step stays in the cache
_STEP = 4  # between two checkpoints of a user lie so many times `history_len` clicks


@dataclass(frozen=True)
class HistoryLaw:
    """Holds the settings that define a history.

    Times are in microseconds; impressions may be `late_us` late in the log and still get theirs.
    """

    history_len: int
    window_us: int
    click_delay_us: int
    lag_us: int = 0
    keep_repeats: bool = False
    late_us: int = 0


# ---- Clicks ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clicks:
    """Holds distinct clicks by user, newest first; int64 [n] each, `users` and `items` as codes.

    `again` is the place of the same user's next newer click on the same item, -1 without one.
    """

    users: np.ndarray
    times: np.ndarray
    items: np.ndarray
    again: np.ndarray


def sort_clicks(
    users: np.ndarray, times: np.ndarray, items: np.ndarray, keep_repeats: bool = False
) -> Clicks:
    """Sorts clicks and drops exact repeats. Item codes must follow the order of the item IDs.

    With `keep_repeats` no click has a newer one that could hide it.
    """
    order = _newest_first(users, times, items)
    users, times, items = users[order], times[order], items[order]
    new = np.ones(len(users), bool)
    new[1:] = (np.diff(users) != 0) | (np.diff(times) != 0) | (np.diff(items) != 0)
    users, times, items = users[new], times[new], items[new]
    again = np.full(len(users), -1) if keep_repeats else _clicked_again(users, items)
    return Clicks(users, times, items, again)


def _newest_first(users: np.ndarray, times: np.ndarray, items: np.ndarray) -> np.ndarray:
    """Returns the order by user, then newest first.

    It is cheap for clicks that nearly stand so already, as those of the day before do: only the
    users with a click out of order are sorted in full.
    """
    order = np.argsort(users, kind="stable")
    who, when, what = users[order], times[order], items[order]
    older = (when[1:] < when[:-1]) | ((when[1:] == when[:-1]) & (what[1:] <= what[:-1]))
    torn = np.zeros(int(who[-1]) + 1 if len(who) else 0, bool)
    torn[who[1:][(who[1:] == who[:-1]) & ~older]] = True
    rows = np.flatnonzero(torn[who])
    order[rows] = order[rows][np.lexsort((-what[rows], -when[rows], who[rows]))]
    return order


def _clicked_again(users: np.ndarray, items: np.ndarray) -> np.ndarray:
    """Returns `Clicks.again` of clicks by user, newest first."""
    key = users * (int(items.max(initial=0)) + 1) + items
    order = np.argsort(key)
    same = key[order][1:] == key[order][:-1]
    repeated = np.zeros(len(order), bool)
    repeated[1:] |= same
    repeated[:-1] |= same
    places = order[repeated]  # few, and only they need an order that is stable
    places = places[np.lexsort((places, key[places]))]
    newer, older = places[:-1], places[1:]
    pair = key[newer] == key[older]
    again = np.full(len(users), -1)
    again[older[pair]] = newer[pair]
    return again


def places_before(clicks: Clicks, users: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Finds the place of each user's newest click strictly before each time; int64 [m].

    Without one it is the place behind the user's last click.
    """
    low = np.searchsorted(clicks.users, users, "left")
    high = np.searchsorted(clicks.users, users, "right")
    while (searching := low < high).any():  # all binary searches advance together
        middle = np.minimum((low + high) // 2, len(clicks.users) - 1)
        too_new = clicks.times[middle] >= times
        low = np.where(searching & too_new, middle + 1, low)
        high = np.where(searching & ~too_new, middle, high)
    return low


def histories_at(
    clicks: Clicks, users: np.ndarray, times: np.ndarray, law: HistoryLaw
) -> np.ndarray:
    """Returns the history of each (user, moment): places in `clicks`, int64 [m, history_len].

    Places are newest first, padded with -1. A user code that no click has, as -1, has no history.
    """
    begin = places_before(clicks, users, times - law.lag_us)
    end = places_before(clicks, users, times - law.window_us)
    return latest_distinct(clicks, begin, end, law.history_len)


# ---- The latest distinct items of a range ----------------------------------------------------


def latest_distinct(clicks: Clicks, begin: np.ndarray, end: np.ndarray, length: int) -> np.ndarray:
    """Returns the places of the `length` latest distinct items of each range of one user's clicks.

    The ranges are begin:end; the places are int64 [m, length], newest first, padded with -1. A
    click counts only while no newer click on its item lies in the range.
    """
    found = np.full((len(begin), length), -1, np.int64)
    todo = np.flatnonzero(begin < end)
    for width in (length, _STEP * length):  # mostly the first looks back far enough
        for rows in _blocks(todo, width):
            there = begin[rows, None] + np.arange(width)
            found[rows] = _visible(clicks, there, begin[rows], end[rows], length)
        todo = todo[(found[todo, -1] < 0) & (begin[todo] + width < end[todo])]
    if len(todo):
        found[todo] = _from_checkpoints(clicks, begin[todo], end[todo], length)
    return found


def _blocks(rows: np.ndarray, width: int) -> list[np.ndarray]:
    """Cuts `rows` so that so many of `width` candidates each stay in the cache."""
    size = max(1, _MAX_CELLS // width)
    return [rows[at : at + size] for at in range(0, len(rows), size)]


def _visible(
    clicks: Clicks, places: np.ndarray, begin: np.ndarray, end: np.ndarray, length: int
) -> np.ndarray:
    """Returns the first `length` candidates of each range that count there; [m, length].

    The candidates are `places` int64 [m, w], newest first; those count that lie in begin:end and
    have no newer click on their item there. The result is padded with -1.
    """
    inside = (places >= begin[:, None]) & (places < end[:, None])
    visible = inside & (clicks.again[np.where(inside, places, 0)] < begin[:, None])
    found = np.full((len(places), length), -1, np.int64)
    rank = np.cumsum(visible, axis=1)
    row, column = np.nonzero(visible & (rank <= length))
    found[row, rank[row, column] - 1] = places[row, column]
    return found


def _from_checkpoints(
    clicks: Clicks, begin: np.ndarray, end: np.ndarray, length: int
) -> np.ndarray:
    """Finds what `latest_distinct` returns, where many repeats hide the older items.

    The cost does not grow with the number of repeats. Every `step` clicks of a user, counted from
    the oldest, there is a checkpoint: the latest distinct items of the clicks from there back. A
    range sees at most `step` clicks newer than a checkpoint, and of what is older nothing but what
    the checkpoint has.
    """
    step = _STEP * length
    user_end = np.searchsorted(clicks.users, clicks.users[begin], "right")
    ends, of_row = np.unique(user_end, return_inverse=True)
    back = (user_end - begin) // step  # checkpoints that lie at or behind each beginning
    depth = np.zeros(len(ends), np.int64)
    np.maximum.at(depth, of_row, back)
    first = np.cumsum(depth + 1) - (depth + 1)  # of each user's checkpoints; the first has nothing
    lists = np.full((int((depth + 1).sum()), length), -1, np.int64)
    for k in range(1, int(depth.max()) + 1):
        for users in _blocks(np.flatnonzero(depth >= k), step + length):
            at = ends[users] - k * step
            newer = at[:, None] + np.arange(step)
            candidates = np.concatenate([newer, lists[first[users] + k - 1]], axis=1)
            lists[first[users] + k] = _visible(clicks, candidates, at, ends[users], length)
    found = np.full((len(begin), length), -1, np.int64)
    for rows in _blocks(np.arange(len(begin)), step + length):
        at = user_end[rows] - back[rows] * step
        newer = begin[rows, None] + np.arange(step)
        newer[newer >= at[:, None]] = -1
        candidates = np.concatenate([newer, lists[first[of_row[rows]] + back[rows]]], axis=1)
        found[rows] = _visible(clicks, candidates, begin[rows], end[rows], length)
    return found
