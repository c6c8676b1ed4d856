"""Tests how impressions are told apart and put in order."""

import numpy as np
import pyarrow as pa

from feature_jobs.impressions.simscore import impression_ids, sort_impressions


def impressions(rows: list[tuple[int, int, int, bool]]) -> pa.Table:
    users, items, times, clicked = (list(c) for c in zip(*rows, strict=True))
    return pa.table(
        {
            "user_id": users,
            "item_id": items,
            "event_time": pa.array(times, pa.int64()).cast(pa.timestamp("us", "UTC")),
            "clicked": clicked,
        }
    )


def test_made_ids_tell_all_rows_apart_and_do_not_follow_arrival() -> None:
    rng = np.random.default_rng(2)
    rows = [tuple(int(v) for v in r) for r in rng.integers(0, 3, (60, 4))]
    rows = [(u, i, t, bool(c)) for u, i, t, c in rows]
    assert len(set(rows)) < 60
    one = sort_impressions(impressions(rows))
    other = sort_impressions(impressions(rows[::-1]))
    assert one == other
    ids = impression_ids(one).to_pylist()
    assert len(set(ids)) == 60
    assert all(len(i) == 32 and int(i, 16) >= 0 for i in ids)
    alone = sort_impressions(impressions(rows[:1]))
    assert impression_ids(alone)[0].as_py() in ids
