"""Projections keep the leading directions, and centres take off what all features share."""

import numpy as np
import pytest

from courier_model.projection import mean_of, principal
from feature_jobs.schemas import OperatorError

RNG = np.random.default_rng(5)
SHARED = 9.0 * RNG.normal(size=20)
SPREAD = np.geomspace(4.0, 0.01, 20)
TURN = np.linalg.qr(RNG.normal(size=(20, 20)))[0]


def drawn(n: int) -> np.ndarray:
    """Returns features of so many images, which vary by `SPREAD` along the rows of `TURN`."""
    return ((RNG.normal(size=(n, 20)) * SPREAD) @ TURN + SHARED).astype(np.float32)


def projected(features: np.ndarray, dimensions: int, whiten: bool = False) -> np.ndarray:
    found = principal(features, dimensions, whiten)
    assert (found.weight.dtype, found.centre.dtype) == (np.float32, np.float32)
    return features @ found.weight.T - found.centre


def test_what_is_kept_is_centred_uncorrelated_and_has_the_most_variance() -> None:
    features = drawn(5000)
    made = projected(features, 6)
    np.testing.assert_allclose(made.mean(axis=0), 0, atol=2e-3)
    covariance = np.cov(made.T)
    np.testing.assert_allclose(covariance, np.diag(np.diag(covariance)), atol=0.02)
    np.testing.assert_allclose(np.sqrt(np.diag(covariance)), SPREAD[:6], rtol=0.05)
    everything = np.cov(features.T).trace()
    kept = principal(features, 6).explained
    assert kept == pytest.approx(np.diag(covariance).sum() / everything, rel=1e-3)


def test_distances_are_kept_where_all_directions_are() -> None:
    features = drawn(300)
    made = projected(features, 20)
    one, other = (np.linalg.norm(x[:-1] - x[1:], axis=1) for x in (features, made))
    np.testing.assert_allclose(one, other, rtol=1e-3)


def test_whitened_directions_vary_alike() -> None:
    made = projected(drawn(5000), 12, whiten=True)
    np.testing.assert_allclose(np.cov(made.T), np.eye(12), atol=0.02)


def test_the_order_of_images_turns_no_direction_round() -> None:
    features = drawn(500)
    one, other = principal(features, 4), principal(features[::-1], 4)
    np.testing.assert_allclose(one.weight, other.weight, atol=1e-3)


@pytest.mark.parametrize(("images", "dimensions"), [(0, 1), (1, 1), (10, 10), (200, 21)])
def test_more_dimensions_than_there_are_directions_are_refused(
    images: int, dimensions: int
) -> None:
    with pytest.raises(OperatorError, match=f"and {dimensions} are needed"):
        principal(drawn(images), dimensions)


def test_directions_that_are_rounding_are_not_whitened() -> None:
    few = (RNG.normal(size=(300, 8)) @ RNG.normal(size=(8, 20))).astype(np.float32)
    assert principal(few, 12).explained == pytest.approx(1.0)
    with pytest.raises(OperatorError, match="vary in 8 directions, and 12 are needed"):
        principal(few, 12, whiten=True)
    repeated = np.repeat(drawn(10), 30, axis=0)
    with pytest.raises(OperatorError, match="vary in 9 directions"):
        principal(repeated, 12, whiten=True)


def test_a_mean_is_summed_exactly() -> None:
    features = np.full((100_000, 1), 0.1, np.float32)
    features[0] = 1e6
    assert mean_of(features)[0] == np.float32(features.astype(np.float64).mean())
