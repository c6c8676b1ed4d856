"""Measures the fit of a projection: the leading principal directions of a sample's features.

    python tests/benchmarks/bench_projection.py [--images 20000] [--features 1280]

Beside `numpy.linalg.svd` of the centred features, which needs no covariance, and the product that
the covariance cannot do without, both in float64. The goal is 10 s for 20,000 x 1,280 on two cores.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np

from courier_model.projection import principal


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--features", type=int, default=1280)
    given = parser.parse_args()
    rng = np.random.default_rng(0)
    scale = np.arange(1, given.features + 1, dtype=np.float32) ** -0.5
    features = rng.standard_normal((given.images, given.features), np.float32) * scale + 1
    wide = features.astype(np.float64)
    ours = seconds(lambda: principal(features, 256))
    product = seconds(lambda: wide.T @ wide)
    svd = seconds(lambda: np.linalg.svd(wide - wide.mean(axis=0), full_matrices=False))
    print(
        f"{given.images:,} x {given.features:,} features: principal {ours:.1f} s (goal 10), the "
        f"product alone {product:.1f} s, numpy's SVD {svd:.1f} s"
    )


if __name__ == "__main__":
    main()
