"""Says which night's features a moment may know: one function, for scores and for every join.

A *snapshot* is a night as it is served: its item features and its embeddings, from the moment on
from which it is available. That is the end of its ds and a delay after it, in which a night is
made, whenever it was really made; or any other moment that is known of it.
"""

import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from feature_jobs import inputs


@dataclass(frozen=True)
class Snapshot:
    """Is the night of `ds`, available from `from_us` on, in microseconds since 1970."""

    ds: dt.date
    from_us: int


def always(ds: dt.date) -> Snapshot:
    """Returns the night of ds as what every moment may know."""
    return Snapshot(ds, np.iinfo(np.int64).min)


def after_its_day(ds: dt.date, day_timezone: str, delay_us: int) -> Snapshot:
    """Returns the night of ds as it is available so long after the end of its day."""
    return Snapshot(ds, inputs.day_end(ds, day_timezone) + delay_us)


def night_at(moments: np.ndarray, snapshots: Sequence[Snapshot]) -> np.ndarray:
    """Returns the place of the newest of `snapshots` available at each moment; int64 [n].

    `moments` int64 [n] are microseconds since 1970. It is -1 where none is available yet. A night
    that came late takes the place of no newer one.
    """
    by_time = sorted(range(len(snapshots)), key=lambda at: snapshots[at].from_us)
    newest, best = [-1], -1
    for at in by_time:
        if best < 0 or snapshots[at].ds > snapshots[best].ds:
            best = at
        newest.append(best)
    times = np.array([snapshots[at].from_us for at in by_time], np.int64)
    return np.array(newest, np.int64)[np.searchsorted(times, moments, side="right")]
