"""Draws the rows that an encoder is measured on, with histories as long as the night's.

A training row knows five clicks, and its user's earlier rows know those before them: all that a row
lists was clicked before its moment, so that no history holds a click from later than its row.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from courier_model.training.rows import TrainingSet
from feature_jobs.impressions.clicks import HistoryLaw, histories_at, sort_clicks
from feature_jobs.schemas import ROW_CLICKS

_PARTS = 8  # of a microsecond, one for each click of a row at least

Codes = npt.NDArray[np.int64]


def draw_users(rows: TrainingSet, limit: int, seed: int) -> TrainingSet:
    """Returns the rows with a history of users drawn by `seed`, at most `limit`, in their order.

    They are all rows of a user, the last one's cut: users are told apart, and a user's histories
    share images.
    """
    rows = rows.with_history()
    users, owner = np.unique(rows.users, return_inverse=True)
    turn = np.random.default_rng([seed, 1]).permutation(len(users))[owner]
    return rows.take(np.sort(np.argsort(turn, kind="stable")[:limit]))


def histories_of(rows: TrainingSet, seen: Sequence[TrainingSet], law: HistoryLaw) -> Codes:
    """Returns what each user had clicked before each of `rows`, int64 [rows, history_len].

    Distinct items that the user's rows in the sets `seen` list, newest first, padded with -1. What
    is missed is clicks of more than five between two rows, and those from before the first of
    `seen`. The window of `law` counts back to the row that lists a click, which may itself be
    older by as much. The lag has been taken off what a row lists.
    """
    users = np.unique(rows.users)
    sets = [one.take(np.isin(one.users, users)) for one in seen]
    clicks = np.concatenate([one.clicks for one in sets])
    owners, moments = (
        np.concatenate([getattr(one, name) for one in sets]).repeat(ROW_CLICKS)
        for name in ("users", "moments")
    )
    # In parts of a microsecond, so that a row's clicks keep their order.
    times = moments * _PARTS - np.tile(np.arange(ROW_CLICKS), len(clicks))
    there = clicks.ravel() >= 0
    log = sort_clicks(owners[there], times[there], clicks.ravel()[there])
    finer = replace(law, window_us=(law.window_us + 1) * _PARTS, lag_us=0)
    places = histories_at(log, rows.users, rows.moments * _PARTS + 1, finer)
    return np.where(places >= 0, np.append(log.items, -1)[places], -1)
