"""A kernel is used where it is there, right and fast; and what it may lose, it states."""

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from feature_jobs.codebooks import kernels
from feature_jobs.codebooks.kernels import BFLOAT16, FLOAT32, INT8, Kernel

EACH_KERNEL = pytest.mark.parametrize("kernel", kernels.present(), ids=lambda kernel: kernel.name)


def test_products_of_floats_are_there_and_right_on_every_processor() -> None:
    assert {FLOAT32, BFLOAT16} <= set(kernels.present())


def test_a_torch_without_products_of_bytes_has_the_other_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(torch, "_int_mm")
    names = [kernel.name for kernel in kernels.present()]
    assert "float32" in names
    assert "int8" not in names
    assert kernels.fastest.__wrapped__("cpu", 256).name in names


def test_a_gpu_has_no_product_of_bfloat16_since_it_may_add_up_in_bfloat16(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "is_right", lambda kernel, device: device == "cuda")
    assert FLOAT32 in kernels.present("cuda")
    assert BFLOAT16 not in kernels.present("cuda")


def test_a_slow_product_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        begun = time.thread_time()
        while time.thread_time() < begun + 0.05:
            pass
        return out.copy_(a.int() @ b.int())

    monkeypatch.setattr(torch, "_int_mm", slow)
    assert INT8 in kernels.present()
    assert kernels.fastest.__wrapped__("cpu", 256) != INT8


def test_products_that_overflow_or_lose_more_than_is_stated_are_wrong() -> None:
    def saturating(a: Tensor, b: Tensor, out: Tensor) -> None:
        # As processors without VNNI: unsigned by signed bytes, two at a time, in 16 bits.
        pairs = (a.int() + 128)[:, None, :] * b.int()[None, :, :]
        sums = pairs.unflatten(2, (-1, 2)).sum(dim=3).clamp(-(1 << 15), (1 << 15) - 1).sum(dim=2)
        out.copy_(sums - 128 * b.int().sum(dim=1))

    def through_bfloat16(a: Tensor, b: Tensor, out: Tensor) -> None:
        out.copy_(a.bfloat16() @ b.bfloat16().T)

    def with_ten_bits(a: Tensor, b: Tensor, out: Tensor) -> None:
        # As tensor cores may, rounding to 10 bits.
        a, b = (((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32) for x in (a, b))
        out.copy_(a @ b.T)

    def truncated(a: Tensor, b: Tensor, out: Tensor) -> None:
        out.copy_(((a.float() @ b.float().T).view(torch.int32) & ~0x1FFFF).view(torch.float32))

    assert not kernels.is_right(replace(INT8, multiply=saturating))
    assert not kernels.is_right(replace(FLOAT32, multiply=through_bfloat16))
    assert not kernels.is_right(replace(FLOAT32, multiply=with_ten_bits))
    assert not kernels.is_right(replace(BFLOAT16, multiply=truncated))


@EACH_KERNEL
def test_what_is_best_before_it_is_rounded_is_never_below_the_limit(kernel: Kernel) -> None:
    rng = np.random.default_rng(0)
    for size, error in [
        (1.0, 1e-3),
        (1.0, 0.1),
        (1e-3, 1e-4),
        (1e4, 1.0),
        (1e4, 300.0),
        (0.01, 1.0),
    ]:
        # Best scores of many, which are rarely below 0; their errors are as large as can be.
        truth = size * rng.standard_normal((2000, 40)) * kernel.levels**2
        error *= kernel.levels**2
        seen = torch.from_numpy(truth + error * rng.choice([-1, 1], truth.shape))
        scores = (seen.round() if kernel.whole else seen).to(kernel.scores).view(kernel.ordered)
        bound = torch.full((2000,), error + (1 if kernel.whole else 0), dtype=torch.float32)
        limit = kernel.limit(scores.amax(dim=1), kernel.slack(bound * 1.01))
        kept = scores >= limit[:, None]
        assert kept[torch.arange(2000), torch.from_numpy(truth.argmax(axis=1))].all()
        assert size < 10 * error / kernel.levels**2 or kept.double().mean() < 0.1  # not trivial


@EACH_KERNEL
def test_a_row_that_wants_nothing_gets_a_limit_that_nothing_reaches(kernel: Kernel) -> None:
    best = torch.ones(3).to(kernel.scores).view(kernel.ordered)
    limit = kernel.limit(best, kernel.slack(torch.tensor([0.0, torch.nan, 0.0])))
    assert (best >= limit).tolist() == [True, False, True]


def test_the_choice_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = kernels.fastest("cpu", 256)

    def refuse(*_: Any) -> float:
        raise AssertionError("measured again")

    monkeypatch.setattr(kernels, "_seconds", refuse)
    assert kernels.fastest("cpu", 256) is chosen
