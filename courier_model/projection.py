"""Fits what of an encoder needs no clicks: the centre of its features, and a projection of them.

What all images of a shop have in common is most of a pretrained feature, and says nothing of any of
them: it makes all cosines alike. Taken off before the norm, cosines tell images apart.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from feature_jobs.schemas import OperatorError

Floats = npt.NDArray[np.float32]

EMBEDDING_DIM = 256  # of an encoder of ours, where none is asked for: COURIER appendix §4

# Of the largest variance: below it a direction is rounding of float32 features, of bf16 products
# even more. Whitening would blow it up; else it does no harm.
_LEAST_VARIANCE = 1e-6


@dataclass(frozen=True)
class Projection:
    """Holds a linear map of pooled features: `features @ weight.T - centre` is an embedding's.

    `weight` float32 [d, c], `centre` float32 [d]; `explained` is the share of the features'
    variance that the map keeps, in [0, 1].
    """

    weight: Floats
    centre: Floats
    explained: float


def mean_of(features: Floats) -> Floats:
    """Returns the mean feature, float32 [c], of float32 [n, c]; n is 1 or more."""
    mean: Floats = features.mean(axis=0, dtype=np.float64).astype(np.float32)
    return mean


def principal(features: Floats, dimensions: int, whiten: bool = False) -> Projection:
    """Returns the projection to the leading principal directions of `features` float32 [n, c].

    Where it is to `whiten`, each direction is divided by the features' standard deviation along it.
    A direction points to where its largest weight is positive, so that a fit is repeated alike.
    Raises OperatorError where there are not so many `dimensions` in the features.
    """
    mean, variances, directions = _variances(features)
    found = min(len(features) - 1, features.shape[1])
    if whiten:
        found = min(found, int((variances > _LEAST_VARIANCE * variances[0]).sum()))
    if found < dimensions:
        raise OperatorError(
            f"{len(features):,} images with features of {features.shape[1]:,} numbers vary in "
            f"{max(0, found):,} directions, and {dimensions} are needed. Sample more images, from "
            "a day with a larger catalogue, leave --whiten out, or say --projection random."
        )
    weight = directions[:dimensions]
    largest = weight[np.arange(dimensions), np.abs(weight).argmax(axis=1)]
    weight = weight * np.sign(largest)[:, None]
    if whiten:
        weight = weight / np.sqrt(variances[:dimensions])[:, None]
    explained = float(variances[:dimensions].sum() / variances.sum())
    return Projection(weight.astype(np.float32), (weight @ mean).astype(np.float32), explained)


def _variances(features: Floats) -> tuple[npt.NDArray[np.float64], ...]:
    """Returns the mean [c], and the variances [c], largest first, by directions [c, c] in rows."""
    total = features.sum(axis=0, dtype=np.float64)
    mean = total / max(1, len(features))
    centred = features - mean  # float64: products of float32 would be as large as small variances
    covariance = centred.T @ centred / max(1, len(features) - 1)
    variances, directions = np.linalg.eigh(covariance)
    return mean, variances[::-1], directions[:, ::-1].T
