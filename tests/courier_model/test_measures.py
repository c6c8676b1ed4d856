"""The measures say what their definitions say, and what plain loops say."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from courier_model import measures
from courier_model.measures import HeldOut, auc, colour_histogram, gauc, history_cosine, rank_clicks

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


def slow_cosine(
    vectors: np.ndarray, known: np.ndarray, item: int, clicks: np.ndarray
) -> float | None:
    """Returns one shown item's cosine with the mean of its row's known unit vectors; None = NaN."""
    past = [vectors[code].astype(np.float64) for code in clicks if code >= 0 and known[code]]
    if item < 0 or not known[item] or not past:
        return None
    mean = sum(vector / np.sqrt(vector @ vector) for vector in past) / len(past)
    shown = vectors[item].astype(np.float64)
    return float(shown @ mean / np.sqrt((shown @ shown) * (mean @ mean)))


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


@given(rows=IMPRESSIONS)
def test_auc_and_gauc_are_those_of_plain_loops(rows: list[tuple[float, bool, int]]) -> None:
    scores, labels, users = columns(rows)
    wanted = slow_auc(list(scores), list(labels))
    assert auc(scores, labels) == (wanted if wanted is None else pytest.approx(wanted))
    wanted = slow_gauc(list(scores), list(labels), list(users))
    assert gauc(scores, labels, users) == (wanted if wanted is None else pytest.approx(wanted))


@given(rows=IMPRESSIONS, seed=st.integers(0, 99))
def test_only_the_ranking_within_a_user_counts(
    rows: list[tuple[float, bool, int]], seed: int
) -> None:
    scores, labels, users = columns(rows)
    order = np.random.default_rng(seed).permutation(len(rows))
    found = gauc(scores, labels, users)
    assert gauc(scores[order], labels[order], users[order]) == found
    assert gauc(np.exp(scores) + users, labels, users) == found  # each user's own scale
    reverse = gauc(scores, ~labels, users)
    assert reverse == (None if found is None else pytest.approx(1 - found))


def test_auc_has_the_values_of_its_closed_form() -> None:
    labels = np.arange(10) >= 6
    assert auc(np.arange(10.0), labels) == 1.0
    assert auc(-np.arange(10.0), labels) == 0.0
    assert auc(np.ones(10), labels) == 0.5
    # One of two clicks leads, the other ties with one of two unclicked: (2 + 1.5) / 4.
    assert auc(np.array([3.0, 2.0, 2.0, 1.0]), np.array([True, True, False, False])) == 0.875


def test_gauc_weighs_users_by_impressions_and_leaves_out_those_with_one_label() -> None:
    scores = np.array([1.0, 0.0, 0.0, 1.0, 0.5, 0.5, 9.0, -9.0])
    labels = np.array([True, False, True, False, False, False, True, False])
    users = np.array([7, 7, 8, 8, 8, 8, 9, 6])  # AUC 1, AUC 0, and two without one
    assert gauc(scores, labels, users) == pytest.approx((2 * 1 + 4 * 0) / 6)
    assert gauc(scores[::-1], labels[::-1], users[::-1]) == pytest.approx(2 / 6)


@pytest.mark.parametrize("labels", [[], [True, True], [False]])
def test_one_label_alone_cannot_be_ranked(labels: list[bool]) -> None:
    scores, users = np.arange(float(len(labels))), np.zeros(len(labels), np.int64)
    assert auc(scores, np.array(labels, bool)) is None
    assert gauc(scores, np.array(labels, bool), users) is None


def test_labels_of_both_kinds_but_none_within_a_user_give_an_auc_and_no_gauc() -> None:
    scores, labels = np.array([1.0, 0.0]), np.array([True, False])
    assert auc(scores, labels) == 1.0
    assert gauc(scores, labels, np.array([1, 2])) is None


@pytest.mark.parametrize(
    ("scores", "labels"), [([np.nan, 1.0], [True, False]), ([0.0, 1.0], [1, 0])]
)
def test_scores_or_labels_that_would_be_misread_are_refused(
    scores: list[float], labels: list[bool]
) -> None:
    with pytest.raises(ValueError, match="dtype bool"):
        auc(np.array(scores), np.array(labels))


# ---- The held-out measure ------------------------------------------------------------------


@pytest.fixture(params=[4096, 7])
def world(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Makes rows with absent and unknown items, in one block or in several."""
    monkeypatch.setattr(measures, "_BLOCK_ROWS", request.param)
    rng = np.random.default_rng(3)
    known = rng.random(40) < 0.8
    vectors = rng.normal(size=(40, 6)).astype(np.float32) * rng.uniform(0.1, 9, (40, 1))
    vectors = vectors.astype(np.float32)
    vectors[~known] = np.nan  # must not be looked at
    pv, clicks = rng.integers(-1, 40, (50, 5)), rng.integers(-1, 40, (50, 5))
    clicks[rng.random((50, 5)) < 0.6] = -1
    return {
        "vectors": vectors,
        "known": known,
        "pv": pv,
        "clicked": rng.random((50, 5)) < 0.4,
        "clicks": clicks,
        "users": rng.integers(0, 9, 50),
    }


def test_history_cosine_is_that_of_plain_loops(world: dict[str, np.ndarray]) -> None:
    vectors, known, pv, clicks = (world[name] for name in ("vectors", "known", "pv", "clicks"))
    found = history_cosine(vectors, known, pv, clicks)
    wanted = [
        [slow_cosine(vectors, known, i, c) for i in p] for p, c in zip(pv, clicks, strict=True)
    ]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.array(wanted, np.float64), atol=1e-6)
    # Not trivial: some rows without a history, some scores, some NaN within a scored row.
    scored = ~np.isnan(found)
    assert (clicks < 0).all(axis=1).any()
    assert scored.any()
    assert (scored.any(axis=1) & ~scored.all(axis=1)).any()


def test_rank_clicks_ranks_every_impression_with_a_score(world: dict[str, np.ndarray]) -> None:
    found = rank_clicks(**world)
    scores = history_cosine(world["vectors"], world["known"], world["pv"], world["clicks"])
    rows = [
        (scores[row, place], bool(world["clicked"][row, place]), int(world["users"][row]))
        for row in range(50)
        for place in range(5)
        if not np.isnan(scores[row, place])
    ]
    scores, labels, users = columns(rows)
    assert 0 < found.impressions == len(rows) < 250
    assert 0 < found.clicks == sum(labels) < len(rows)
    assert found.auc == pytest.approx(slow_auc(list(scores), list(labels)))
    assert found.gauc == pytest.approx(slow_gauc(list(scores), list(labels), list(users)))
    assert found.auc != found.gauc


def test_who_clicks_what_looks_like_their_clicks_is_ranked_perfectly() -> None:
    vectors = np.eye(2, dtype=np.float32)[[0, 0, 1, 1]]
    pv = np.array([[0, 2, -1, -1, -1], [3, 1, -1, -1, -1]])
    clicks = np.array([[1, -1, -1, -1, -1], [2, 2, -1, -1, -1]])
    clicked = np.array([[True, False, False, False, False]] * 2)
    known = np.ones(4, bool)
    users = np.array([5, 6])
    assert rank_clicks(vectors, known, pv, clicked, clicks, users) == HeldOut(1.0, 1.0, 4, 2)
    nobody = rank_clicks(vectors, ~known, pv, clicked, clicks, users)
    assert nobody == HeldOut(None, None, 0, 0)
    none = rank_clicks(vectors, known, pv[:0], clicked[:0], clicks[:0], users[:0])
    assert none == HeldOut(None, None, 0, 0)


def test_a_known_item_has_a_score_even_where_the_cosine_is_undefined() -> None:
    vectors = np.array([[0, 0], [1, 0], [-1, 0]], np.float32)
    pv = np.array([[0, 1, -1, -1, -1], [1, -1, -1, -1, -1]])
    clicks = np.array([[1, -1, -1, -1, -1], [1, 2, -1, -1, -1]])
    found = history_cosine(vectors, np.ones(3, bool), pv, clicks)
    np.testing.assert_array_equal(found[:, 0], [0, 0])  # a vector of zeros; clicks that cancel out
    assert found[0, 1] == 1


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_broken_vector_is_refused_and_not_left_out(value: float) -> None:
    vectors, codes = np.ones((2, 3), np.float32), np.full((1, 5), -1)
    vectors[1, 2] = value
    with pytest.raises(ValueError, match="finite"):
        history_cosine(vectors, np.array([True, True]), codes, codes)
    assert np.isnan(history_cosine(vectors, np.array([True, False]), codes, codes)).all()


@pytest.mark.parametrize("code", [-2, 3])
def test_a_code_that_is_no_item_is_refused(code: int) -> None:
    vectors, known = np.eye(3, dtype=np.float32), np.ones(3, bool)
    fine, wrong = np.full((2, 5), -1), np.full((2, 5), -1)
    wrong[1, 4] = code
    for pv, clicks in ((fine, wrong), (wrong, fine)):
        with pytest.raises(ValueError, match="from -1 to 2"):
            history_cosine(vectors, known, pv, clicks)


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
