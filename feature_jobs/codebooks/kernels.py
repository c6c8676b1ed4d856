"""Multiplies rounded rows and centres as fast as this processor can, with a bound of the error.

A score is the product of two rows of *codes*, numbers of few bits. Which bits a processor
multiplies fastest differs: bfloat16 with AMX, int8 with VNNI, else float32. A kernel states what
its roundings lose at most; a search that keeps all within that loses nothing.
"""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = Any  # numpy's or torch's; what is done with them, both understand

_DIMENSIONS_TRIED = (16, 64, 255, 256, 2048)  # of vectors whose products must be right
_TOGETHER = 16  # columns: of bytes, products take multiples of so many
# Rows and centres that are multiplied to find the fastest kernel: few first, as some product may be
# fifty times as slow as another.
_TRIED = {"cpu": ((32, 64), (128, 256)), "cuda": ((8192, 2048),)}
_FAR_BEHIND = 8  # times slower on few: not tried on more


@dataclass(frozen=True)
class Kernel:
    """Describes a product of codes [n, columns] and [k, columns]: scores [n, k].

    Codes lie in -`levels`..`levels`, whole numbers where these are more than one. Of a vector's
    bias, `bias_columns` carry a part each. Adding up loses for each column at most `sums` of the
    product of the vectors' lengths, and rounding a score at most half of `rounding` of it.

    Scores are compared as `ordered`, a type of the same size that is quick to compare; among those
    that are at least 0 the order is the same.
    """

    name: str
    codes: torch.dtype
    scores: torch.dtype
    ordered: torch.dtype
    levels: int
    bias_columns: int
    sums: float
    rounding: float
    multiply: Callable[[Tensor, Tensor, Tensor], object]

    @property
    def whole(self) -> bool:
        return self.levels > 1

    def columns(self, dimension: int) -> int:
        """Returns how many columns the codes of vectors have; those after the bias are zeros."""
        needed = dimension + self.bias_columns
        return -(-needed // _TOGETHER) * _TOGETHER if self.whole else needed

    def rounded(self, values: Tensor) -> Tensor:
        """Returns the codes of `values`, in the type of these; they lie in ±levels."""
        return values.round() if self.whole else values.to(self.codes).to(values.dtype)

    def encode(self, values: Tensor, codes: Tensor, rounded: Tensor) -> None:
        """Writes the codes of `values` float32, and these as float32 to `rounded`."""
        codes.copy_(torch.round(values, out=rounded) if self.whole else values)
        if not self.whole:
            rounded.copy_(codes)

    @property
    def lowest(self) -> float:
        """Returns what no score is below; of int32 so far from the end that no limit wraps."""
        if self.ordered == torch.int32:
            return -(1 << 29)
        return -(1 << 15) if self.ordered == torch.int16 else float(torch.finfo(self.ordered).min)

    def slack(self, error: Array) -> Array:
        """Returns how far below the best score the best one's may lie, as `limit` takes it: [n].

        The `error` float32 [n] is that of each score before its own rounding, nan for a row that
        wants nothing.
        """
        if self.ordered != torch.int32:
            return 2 * error
        xp = library(error)
        whole = xp.ceil(2 * error).clip(max=2.0**30)
        return xp.asarray(xp.where(xp.isnan(whole), -(2.0**30), whole), dtype=xp.int32)

    def limit(self, best: Array, slack: Array) -> Array:
        """Returns the least score that may be the best one's, where `best` [n] was found.

        Both are of type `ordered`.
        """
        if self.ordered != torch.int16:
            return best - slack
        xp = library(best)
        score = (xp.asarray(best, dtype=xp.int32) << 16).view(xp.float32)
        least = score - self.rounding * xp.abs(score) - slack
        # As the upper half of its bits, rounded down; below 0 the order is another: all may be.
        bits = xp.asarray(least.view(xp.int32) >> 16, dtype=xp.int16)
        bits[~(least > 0)] = -(1 << 15)
        bits[xp.isnan(least)] = (1 << 15) - 1
        return bits


def _multiply(codes: Tensor, centres: Tensor, out: Tensor) -> object:
    return torch.mm(codes, centres.T, out=out)


def _multiply_bytes(codes: Tensor, centres: Tensor, out: Tensor) -> object:
    # No public product of torch takes int8 at this speed.
    return torch._int_mm(codes, centres.T, out=out)


# Sums of float32 in any order, twice what IEEE arithmetic loses: Arm's products of bfloat16 are not
# IEEE's. Sums of bytes are whole, and below 2^26 for 2,048 columns.
_SUMS = 2.0**-23
FLOAT32 = Kernel(
    "float32", torch.float32, torch.float32, torch.float32, 1, 2, _SUMS, 0.0, _multiply
)
BFLOAT16 = Kernel(
    "bfloat16", torch.bfloat16, torch.bfloat16, torch.int16, 1, 2, _SUMS, 2.0**-6.9, _multiply
)
INT8 = Kernel("int8", torch.int8, torch.int32, torch.int32, 127, 16, 0.0, 0.0, _multiply_bytes)


def library(array: Array) -> Any:
    """Returns the module, numpy or torch, whose functions take the `array`."""
    return torch if isinstance(array, Tensor) else np


def present(device: str = "cpu") -> list[Kernel]:
    """Returns the kernels that this torch has and whose products on `device` are right."""
    # CUDA may add up parts of a product of bfloat16 in bfloat16, for some shapes.
    found = [FLOAT32] + ([BFLOAT16] if device == "cpu" else [])
    found += [INT8] if hasattr(torch, "_int_mm") else []
    return [kernel for kernel in found if is_right(kernel, device)]


def is_right(kernel: Kernel, device: str = "cpu") -> bool:
    """Tells whether products are as near to the exact ones as the kernel states.

    Processors without VNNI may add two products of int8 in 16 bits, which overflow.
    """
    return all(_is_right(kernel, kernel.columns(d), device) for d in _DIMENSIONS_TRIED)


def _is_right(kernel: Kernel, columns: int, device: str) -> bool:
    rng = torch.Generator().manual_seed(0)
    codes = torch.rand(32, columns, generator=rng, dtype=torch.float64) * 2 - 1
    codes[:2] = torch.tensor([[1.0], [-1.0]])  # the greatest products of all
    codes[2] = 1 - 2.0**-12  # what fewer bits would round up, each time
    codes = kernel.rounded(codes * kernel.levels)
    few = codes.to(device, kernel.codes)
    scores = torch.empty(32, 32, dtype=kernel.scores, device=device)
    kernel.multiply(few, few, scores)
    exact, length = codes @ codes.T, codes.norm(dim=1)
    error = kernel.sums * columns * length[:, None] * length + kernel.rounding / 2 * exact.abs()
    return bool(((scores.cpu().double() - exact).abs() <= error).all())


@functools.cache
def fastest(device: str, dimension: int) -> Kernel:
    """Returns the kernel whose products of such vectors take the least time on `device`.

    It is measured in the thread that asks first, which torch must not spread over several.
    """
    kernels = present(device)
    for rows, centres in _TRIED[device]:
        seconds = {
            k.name: _seconds(k, rows, centres, k.columns(dimension), device) for k in kernels
        }
        least = min(seconds.values())
        kernels = [k for k in kernels if seconds[k.name] <= _FAR_BEHIND * least]
    return min(kernels, key=lambda kernel: seconds[kernel.name])


def _seconds(kernel: Kernel, rows: int, centres: int, columns: int, device: str) -> float:
    """Returns the seconds of a product: on a CPU this thread's own, as others may want it too."""
    clock = time.thread_time if device == "cpu" else time.perf_counter
    few, many = (torch.ones(n, columns, dtype=kernel.codes, device=device) for n in (rows, centres))
    scores = torch.empty(rows, centres, dtype=kernel.scores, device=device)
    seconds = []
    for _ in range(3):  # the first warms up
        start = clock()
        kernel.multiply(few, many, scores)
        scores[0, 0].item()  # waits for a GPU
        seconds.append(clock() - start)
    return min(seconds[1:])
