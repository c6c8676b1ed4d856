"""The measures say what their definitions say, and what plain loops say."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from courier_model import measures
from courier_model.measures import (
    Estimate,
    HeldOut,
    auc,
    colour_histogram,
    gauc,
    history_cosines,
    numbers,
    rank_clicks,
)

# ---- Slow twins ----------------------------------------------------------------------------


def slow_auc(scores: list[float], labels: list[bool]) -> float | None:
    """Averages all pairs of a clicked and an unclicked impression: 1 if won, a half if tied."""
    won = [
        1.0 if high > low else 0.5 if high == low else 0.0
        for high, clicked in zip(scores, labels, strict=True)
        for low, other in zip(scores, labels, strict=True)
        if clicked and not other
    ]
    return sum(won) / len(won) if won else None


def slow_gauc(scores: list[float], labels: list[bool], users: list[int]) -> float | None:
    total, weight = 0.0, 0
    for user in set(users):
        mine = [at for at, who in enumerate(users) if who == user]
        value = slow_auc([scores[at] for at in mine], [labels[at] for at in mine])
        if value is not None:
            total, weight = total + len(mine) * value, weight + len(mine)
    return total / weight if weight else None


def slow_cosines(
    vectors: np.ndarray, known: np.ndarray, item: int, clicks: np.ndarray
) -> list[float]:
    """Returns one shown item's cosines with its row's known clicks; none where it has no score."""
    if item < 0 or not known[item]:
        return []
    shown = vectors[item].astype(np.float64)
    past = [vectors[code].astype(np.float64) for code in clicks if code >= 0 and known[code]]
    return [float(shown @ one / np.sqrt((shown @ shown) * (one @ one))) for one in past]


def value(found: Estimate | None) -> float | None:
    return None if found is None else found.value


def slow_histogram(image: np.ndarray, bins: int) -> np.ndarray:
    counts = np.zeros((bins, bins, bins))
    for y in range(image.shape[1]):
        for x in range(image.shape[2]):
            r, g, b = (int(value) * bins // 256 for value in image[:, y, x])
            counts[r, g, b] += 1
    return counts.ravel() / np.sqrt((counts**2).sum())


# ---- AUC and GAUC --------------------------------------------------------------------------

# Few distinct values, so that ties and users with one label only are common.
IMPRESSIONS = st.lists(
    st.tuples(
        st.sampled_from([-1.0, -0.0, 0.0, 0.25, 0.5, 1.0]), st.booleans(), st.integers(-2, 3)
    ),
    max_size=40,
)


def columns(rows: list[tuple[float, bool, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    scores, labels, users = zip(*rows, strict=True) if rows else ((), (), ())
    return np.array(scores, np.float64), np.array(labels, bool), np.array(users, np.int64)


def near(wanted: float | None) -> object:
    return wanted if wanted is None else pytest.approx(wanted)


@given(rows=IMPRESSIONS)
def test_auc_and_gauc_are_those_of_plain_loops(rows: list[tuple[float, bool, int]]) -> None:
    scores, labels, users = columns(rows)
    wanted = slow_auc(list(scores), list(labels))
    assert value(auc(scores, labels, users)) == near(wanted)
    wanted = slow_gauc(list(scores), list(labels), list(users))
    assert value(gauc(scores, labels, users)) == near(wanted)


@given(rows=IMPRESSIONS, seed=st.integers(0, 99))
def test_only_the_ranking_within_a_user_counts(
    rows: list[tuple[float, bool, int]], seed: int
) -> None:
    scores, labels, users = columns(rows)
    order = np.random.default_rng(seed).permutation(len(rows))
    found = value(gauc(scores, labels, users))
    assert value(gauc(scores[order], labels[order], users[order])) == found
    assert value(gauc(np.exp(scores) + users, labels, users)) == found  # each user's own scale
    reverse = value(gauc(scores, ~labels, users))
    assert reverse == (None if found is None else pytest.approx(1 - found))


def auc_of(scores: np.ndarray, labels: np.ndarray) -> float | None:
    return value(auc(scores, labels, np.zeros(len(scores), np.int64)))


def test_auc_has_the_values_of_its_closed_form() -> None:
    labels = np.arange(10) >= 6
    assert auc_of(np.arange(10.0), labels) == 1.0
    assert auc_of(-np.arange(10.0), labels) == 0.0
    assert auc_of(np.ones(10), labels) == 0.5
    # One of two clicks leads, the other ties with one of two unclicked: (2 + 1.5) / 4.
    assert auc_of(np.array([3.0, 2.0, 2.0, 1.0]), np.array([True, True, False, False])) == 0.875


def test_gauc_weighs_users_by_impressions_and_leaves_out_those_with_one_label() -> None:
    scores = np.array([1.0, 0.0, 0.0, 1.0, 0.5, 0.5, 9.0, -9.0])
    labels = np.array([True, False, True, False, False, False, True, False])
    users = np.array([7, 7, 8, 8, 8, 8, 9, 6])  # AUC 1, AUC 0, and two without one
    assert value(gauc(scores, labels, users)) == pytest.approx((2 * 1 + 4 * 0) / 6)
    assert value(gauc(scores[::-1], labels[::-1], users[::-1])) == pytest.approx(2 / 6)


@pytest.mark.parametrize("labels", [[], [True, True], [False]])
def test_one_label_alone_cannot_be_ranked(labels: list[bool]) -> None:
    scores, users = np.arange(float(len(labels))), np.zeros(len(labels), np.int64)
    assert auc(scores, np.array(labels, bool), users) is None
    assert gauc(scores, np.array(labels, bool), users) is None


def test_labels_of_both_kinds_but_none_within_a_user_give_an_auc_and_no_gauc() -> None:
    scores, labels, users = np.array([1.0, 0.0]), np.array([True, False]), np.array([1, 2])
    assert value(auc(scores, labels, users)) == 1.0
    assert gauc(scores, labels, users) is None


@pytest.mark.parametrize("measure", [auc, gauc])
@pytest.mark.parametrize(
    ("scores", "labels"), [([np.nan, 1.0], [True, False]), ([0.0, 1.0], [1, 0])]
)
def test_scores_or_labels_that_would_be_misread_are_refused(
    scores: list[float], labels: list[bool], measure: Callable[..., Estimate | None]
) -> None:
    with pytest.raises(ValueError, match="dtype bool"):
        measure(np.array(scores), np.array(labels), np.array([1, 2]))


# ---- Standard errors -----------------------------------------------------------------------


def drawn_users(users: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws impressions of users who differ in how much they click and in how well it is told."""
    sizes = rng.integers(2, 30, users)
    who = np.repeat(np.arange(users), sizes)
    taste, rate = rng.normal(0.5, 0.7, users)[who], rng.beta(2, 4, users)[who]
    labels = rng.random(len(who)) < rate
    scores = taste * labels + rng.normal(0, 0.6, users)[who] + rng.normal(size=len(who))
    return np.round(scores, 1), labels, who  # rounded: with ties


@pytest.mark.parametrize("measure", [auc, gauc])
def test_standard_errors_are_the_spread_of_measures_of_other_users(
    measure: Callable[..., Estimate | None],
) -> None:
    rng = np.random.default_rng(0)
    found = [measure(*drawn_users(150, rng)) for _ in range(300)]
    values = [one.value for one in found if one]
    errors = [one.standard_error for one in found if one and one.standard_error]
    assert len(values) == len(errors) == 300
    # The spread of 300 draws is known to 1 / sqrt(600), a twenty-fifth.
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.15)
    # As if impressions were independent it would be said to be half of that.
    scores, labels, _ = drawn_users(150, rng)
    alone = auc(scores, labels, np.arange(len(labels)))
    assert alone is not None
    assert alone.standard_error is not None
    assert alone.standard_error < 0.8 * np.std(values)


@pytest.mark.parametrize("measure", [auc, gauc])
def test_a_difference_is_known_better_than_what_it_is_of(
    measure: Callable[..., Estimate | None],
) -> None:
    rng = np.random.default_rng(1)
    differences, errors, alone = [], [], []
    for _ in range(200):
        scores, labels, users = drawn_users(100, rng)
        better = measure(scores + 0.3 * labels + 0.3 * rng.normal(size=len(users)), labels, users)
        worse = measure(scores, labels, users)
        assert better
        assert worse
        assert better.standard_error
        difference = better - worse
        assert difference.value == better.value - worse.value
        assert (worse - better).standard_error == difference.standard_error
        differences.append(difference.value)
        errors.append(difference.standard_error)
        alone.append(better.standard_error)
    assert np.mean(errors) == pytest.approx(np.std(differences), rel=0.2)
    assert np.mean(errors) < 0.5 * np.mean(alone)


def test_users_who_cannot_be_ranked_make_gauc_no_surer() -> None:
    scores = np.array([1.0, 0.0, 0.5, 0.5, 0.5, 1.0, 0.0, 2.0])
    labels = np.array([True, False, True, True, False, True, True, False])
    users = np.array([1, 1, 2, 3, 4, 5, 5, 5])  # of whom the first and the last can be ranked
    found = gauc(scores, labels, users)
    assert found is not None
    assert (found.ranked, found.value) == (2, 0.4)
    apart = np.array([0.4 * (1 - 0.4), 0.6 * (0 - 0.4)])
    assert found.standard_error == pytest.approx(np.sqrt(2 * (apart**2).sum()))
    alone = gauc(scores[:5], labels[:5], users[:5])
    assert alone is not None
    assert alone.standard_error is None


def test_one_user_alone_has_no_standard_error() -> None:
    scores, labels = np.array([1.0, 0.0, 2.0]), np.array([True, False, False])
    found = auc(scores, labels, np.array([4, 4, 4]))
    assert found is not None
    assert found.standard_error is None


# ---- The held-out measure ------------------------------------------------------------------


@pytest.fixture(params=[4096, 7])
def world(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Makes rows with absent and unknown items, in one block or in several."""
    monkeypatch.setattr(measures, "_BLOCK_FLOATS", request.param * 9 * 6)
    rng = np.random.default_rng(3)
    known = rng.random(40) < 0.8
    vectors = rng.normal(size=(40, 6)).astype(np.float32) * rng.uniform(0.1, 9, (40, 1))
    vectors = vectors.astype(np.float32)
    vectors[~known] = np.nan  # must not be looked at
    pv, clicks = rng.integers(-1, 40, (50, 5)), rng.integers(-1, 40, (50, 9))
    clicks[rng.random((50, 9)) < 0.7] = -1
    clicks[:7] = -1
    return {
        "vectors": vectors,
        "known": known,
        "pv": pv,
        "clicked": rng.random((50, 5)) < 0.4,
        "clicks": clicks,
        "users": rng.integers(0, 9, 50),
    }


def test_history_cosines_are_those_of_plain_loops(world: dict[str, np.ndarray]) -> None:
    vectors, known, pv, clicks = (world[name] for name in ("vectors", "known", "pv", "clicks"))
    mean, largest = history_cosines(vectors, known, pv, clicks)
    cosines = [
        [slow_cosines(vectors, known, i, c) for i in p] for p, c in zip(pv, clicks, strict=True)
    ]
    assert mean.dtype == largest.dtype == np.float32
    for found, of in ((mean, np.mean), (largest, max)):
        wanted = [[of(one) if one else np.nan for one in row] for row in cosines]
        np.testing.assert_allclose(found, np.array(wanted, np.float64), atol=1e-6)
    # Not trivial: some rows without a history, some scores, some NaN within a scored row.
    scored = ~np.isnan(mean)
    assert (clicks < 0).all(axis=1).any()
    assert scored.any()
    assert (scored.any(axis=1) & ~scored.all(axis=1)).any()


def test_rows_of_the_same_clicks_tie_whatever_their_order() -> None:
    rng = np.random.default_rng(4)
    vectors = rng.normal(1, 0.3, (60, 256)).astype(np.float32)  # much alike, as of a poor encoder
    pv, clicks = rng.integers(0, 60, (200, 2)), rng.integers(-1, 60, (200, 50))
    mean, largest = history_cosines(vectors, np.ones(60, bool), pv, clicks)
    for order in (rng.permuted(clicks, axis=1), clicks[:, ::-1]):
        again = history_cosines(vectors, np.ones(60, bool), pv[:, ::-1], order)
        np.testing.assert_array_equal(again[0][:, ::-1], mean)
        np.testing.assert_array_equal(again[1][:, ::-1], largest)


def test_rank_clicks_ranks_every_impression_with_a_score(world: dict[str, np.ndarray]) -> None:
    found = rank_clicks(**world)
    both = history_cosines(world["vectors"], world["known"], world["pv"], world["clicks"])
    assert not np.array_equal(*both, equal_nan=True)
    for scores, of_all, within in zip(
        both, (found.auc, found.max_auc), (found.gauc, found.max_gauc), strict=True
    ):
        rows = [
            (scores[row, place], bool(world["clicked"][row, place]), int(world["users"][row]))
            for row in range(50)
            for place in range(5)
            if not np.isnan(scores[row, place])
        ]
        cells, labels, users = columns(rows)
        assert 0 < found.impressions == len(rows) < 250
        assert 0 < found.clicks == sum(labels) < len(rows)
        assert found.users == len(set(users)) > 1
        assert value(of_all) == pytest.approx(slow_auc(list(cells), list(labels)))
        assert value(within) == pytest.approx(slow_gauc(list(cells), list(labels), list(users)))
    numbers = found.numbers()
    assert numbers["auc"] == value(found.auc) != numbers["gauc"] != numbers["max_auc"]
    assert found.gauc is not None
    assert numbers["gauc_se"] == found.gauc.standard_error
    assert numbers["impressions"] == found.impressions


def test_one_measure_is_above_another_by_the_differences_of_the_same_impressions(
    world: dict[str, np.ndarray],
) -> None:
    found = rank_clicks(**world)
    other = rank_clicks(**world | {"vectors": world["vectors"] ** 3})
    above = found.above(other)
    assert list(above) == ["auc", "gauc", "max_auc", "max_gauc"]
    assert found.auc is not None
    assert other.auc is not None
    assert above["auc"].value == found.auc.value - other.auc.value != 0
    assert above["auc"].standard_error == (found.auc - other.auc).standard_error
    told = numbers(above)
    assert list(told)[:2] == ["auc", "auc_se"]
    assert told["auc"] == above["auc"].value
    nobody = HeldOut(None, None, None, None, 0, 0, 0)
    assert nobody.above(nobody) == {}


def test_who_clicks_what_looks_like_their_clicks_is_ranked_perfectly() -> None:
    vectors = np.eye(2, dtype=np.float32)[[0, 0, 1, 1]]
    pv = np.array([[0, 2, -1, -1, -1], [3, 1, -1, -1, -1]])
    clicks = np.array([[1, -1, -1, -1, -1], [2, 2, -1, -1, -1]])
    clicked = np.array([[True, False, False, False, False]] * 2)
    known = np.ones(4, bool)
    users = np.array([5, 6])
    found = rank_clicks(vectors, known, pv, clicked, clicks, users).numbers()
    assert [found[name] for name in ("auc", "gauc", "max_auc", "max_gauc")] == [1.0] * 4
    assert (found["impressions"], found["clicks"], found["users"]) == (4, 2, 2)
    nobody = HeldOut(None, None, None, None, 0, 0, 0)
    assert rank_clicks(vectors, ~known, pv, clicked, clicks, users) == nobody
    none = rank_clicks(vectors, known, pv[:0], clicked[:0], clicks[:0], users[:0])
    assert none == nobody
    assert none.numbers()["auc"] is None


def test_a_known_item_has_a_score_even_where_the_cosine_is_undefined() -> None:
    vectors = np.array([[0, 0], [1, 0], [-1, 0]], np.float32)
    pv = np.array([[0, 1, -1, -1, -1], [1, -1, -1, -1, -1]])
    clicks = np.array([[1, -1, -1, -1, -1], [1, 2, -1, -1, -1]])
    mean, largest = history_cosines(vectors, np.ones(3, bool), pv, clicks)
    np.testing.assert_array_equal(mean[:, 0], [0, 0])  # a vector of zeros; clicks that cancel out
    np.testing.assert_array_equal(largest[:, 0], [0, 1])
    assert mean[0, 1] == 1


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_broken_vector_is_refused_and_not_left_out(value: float) -> None:
    vectors, codes = np.ones((2, 3), np.float32), np.full((1, 5), -1)
    vectors[1, 2] = value
    with pytest.raises(ValueError, match="finite"):
        history_cosines(vectors, np.array([True, True]), codes, codes)
    for found in history_cosines(vectors, np.array([True, False]), codes, codes):
        assert np.isnan(found).all()


@pytest.mark.parametrize("code", [-2, 3])
def test_a_code_that_is_no_item_is_refused(code: int) -> None:
    vectors, known = np.eye(3, dtype=np.float32), np.ones(3, bool)
    fine, wrong = np.full((2, 5), -1), np.full((2, 5), -1)
    wrong[1, 4] = code
    for pv, clicks in ((fine, wrong), (wrong, fine)):
        with pytest.raises(ValueError, match="from -1 to 2"):
            history_cosines(vectors, known, pv, clicks)


# ---- The baseline --------------------------------------------------------------------------


@pytest.mark.parametrize("bins", [2, 3, 4])
def test_the_colour_histogram_is_that_of_plain_loops(bins: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 9, 9), dtype=np.uint8)
    images[0] //= 2  # a darker one
    found = colour_histogram(images, bins)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [slow_histogram(image, bins) for image in images], atol=1e-6)
    assert len(np.unique(found, axis=0)) == 3


def test_the_colour_histogram_has_the_values_of_its_closed_form() -> None:
    images = np.zeros((2, 3, 2, 2), np.uint8)
    images[0, 0] = 255  # all red
    images[1, 2, 0] = 64  # half black, half the second blue of four
    wanted = np.zeros((2, 64))
    wanted[0, 3 * 16] = 1
    wanted[1, :2] = np.sqrt(0.5)
    np.testing.assert_allclose(colour_histogram(images), wanted, atol=1e-7)
    assert colour_histogram(images[:0]).shape == (0, 64)
