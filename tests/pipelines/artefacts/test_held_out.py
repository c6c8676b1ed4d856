"""Encoders are measured on all rows of some users, with what their earlier rows list."""

from dataclasses import replace

import numpy as np
import pytest

from courier_model.training.rows import TrainingSet
from feature_jobs.impressions.clicks import HistoryLaw
from pipelines.artefacts.held_out import draw_users, histories_of
from tests.support.training_runs import slow_history, some_rows

# ---- Users -----------------------------------------------------------------------------------


def test_rows_are_those_of_users_drawn_by_the_seed() -> None:
    rows = replace(some_rows(60, seed=3), users=np.arange(60) // 4 % 15)
    chosen = [draw_users(rows, 10, seed).users.tolist() for seed in (0, 0, 1)]
    assert len(chosen[0]) == 10
    assert chosen[0] == chosen[1] != chosen[2]
    assert sorted(map(chosen[0].count, set(chosen[0]))) == [2, 4, 4]  # the last one's are cut
    assert chosen[0] == sorted(chosen[0])


def test_rows_without_an_earlier_click_are_left_out() -> None:
    rows = some_rows(20, seed=3)
    rows.clicks[:5] = -1
    found = draw_users(rows, 100, seed=0)
    assert found.pv.tolist() == rows.pv[5:].tolist()
    assert len(draw_users(rows.take(np.arange(5)), 100, seed=0)) == 0


# ---- Histories -------------------------------------------------------------------------------


def listed(*rows: tuple[int, int, list[int]]) -> TrainingSet:
    """Makes rows of a user, a moment in microseconds, and clicks, newest first."""
    made = some_rows(len(rows), seed=0)
    users, moments, clicks = zip(*rows, strict=True)
    padded = np.array([[*one, *[-1] * (5 - len(one))] for one in clicks])
    return replace(made, users=np.array(users), moments=np.array(moments), clicks=padded)


def test_histories_are_what_earlier_rows_list() -> None:
    rows = listed(
        (1, 100, [5, 4, 3, 2, 1]),
        (1, 102, [6, 5, 4, 3, 2]),
        (1, 102, [6, 5, 4, 3, 2]),  # the request's other chunk
        (1, 101, [5, 4, 3, 2, 1]),
        (1, 300, [9, 1]),  # 1 was clicked again
        (2, 101, [10]),
        (3, 300, []),
    )

    def histories(**given: int) -> list[list[int]]:
        law = HistoryLaw(**({"history_len": 8, "window_us": 1000, "click_delay_us": 0} | given))
        found = histories_of(
            rows, [rows.take(np.array([0, 4, 6])), rows.take(np.array([1, 2, 3, 5]))], law
        )
        assert found.shape == (7, law.history_len)
        return [row[row >= 0].tolist() for row in found]

    whole = [[5, 4, 3, 2, 1], *[[6, 5, 4, 3, 2, 1]] * 2, [5, 4, 3, 2, 1], [9, 1, 6, 5, 4, 3, 2]]
    assert histories() == [*whole, [10], []]
    assert histories(history_len=3)[1:5:3] == [[6, 5, 4], [9, 1, 6]]
    assert histories(window_us=198)[4] == [9, 1, 6, 5, 4, 3, 2]
    assert histories(window_us=197)[4] == [9, 1]
    assert histories(lag_us=50) == histories()  # rows know of it


@pytest.mark.parametrize("seed", range(20))
def test_histories_are_those_of_plain_loops(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sets = [some_rows(int(rng.integers(60)), seed), some_rows(40, 100 + seed)]
    moments = np.split(rng.permutation(100), [60])  # no two of one moment, which would be requests
    sets = [replace(one, moments=at[: len(one)]) for one, at in zip(sets, moments, strict=True)]
    law = HistoryLaw(
        history_len=int(rng.integers(1, 14)), window_us=int(rng.integers(1, 120)),
        click_delay_us=0, lag_us=int(rng.integers(0, 9)),
    )  # fmt: skip
    found = histories_of(sets[1], sets, law)
    for row, places in enumerate(found):
        assert places[places >= 0].tolist() == slow_history(sets[1], row, sets, law)
        assert (np.diff(places < 0) >= 0).all()
