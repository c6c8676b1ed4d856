"""Tells a process its place among those that torchrun started, and passes values between them.

Every process computes the loss of its own anchors against the candidates of all. The gradient of
the joint batch is then the plain sum over processes: `gather` carries the part of it that reaches
other processes' embeddings back to them, `sum_gradients` adds up the rest.
(DistributedDataParallel would have to be told, for every one of a step's backward passes with
cached gradients, whether to synchronise. Batch statistics are each process's own, also those of
SimSiam's heads.)
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from courier_model.encoder import choose_device


@dataclass(frozen=True)
class Process:
    """Describes this process among all `size` that train together, and its device."""

    rank: int
    size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Tells whether this process is the one that writes and speaks for all."""
        return self.rank == 0

    @property
    def device_name(self) -> str:
        """Names the device for people."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"cpu, {torch.get_num_threads()} threads"


@contextmanager
def joined() -> Iterator[Process]:
    """Joins the group that torchrun's variables describe; without them, the process is alone."""
    device = choose_device()
    if "RANK" not in os.environ:
        yield Process(0, 1, device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Process(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


class _Gather(torch.autograd.Function):
    """Runs all_gather; backward brings home what all processes' losses say of one's own part."""

    @staticmethod
    def forward(_ctx: Any, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # others may hold it too
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def gather(tensor: Tensor) -> Tensor:
    """Gathers `[n, …]` of each process, of equal shapes: `[processes * n, …]`, with gradients."""
    if not dist.is_initialized():
        return tensor
    gathered: Tensor = _Gather.apply(tensor)
    return gathered


def first_place(length: int) -> int:
    """Tells where this process's part of `length` rows begins in what `gather` returns."""
    return length * dist.get_rank() if dist.is_initialized() else 0


def total(value: Tensor) -> Tensor:
    """Returns the sum over all processes, without gradients."""
    value = value.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def largest(value: int, device: torch.device) -> int:
    """Returns the largest of all processes' values."""
    if not dist.is_initialized():
        return value
    found = torch.tensor(value, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def any_process(value: bool, device: torch.device) -> bool:
    """Tells whether `value` is true in any process."""
    return bool(largest(int(value), device))


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Adds up all processes' gradients in place, in one message; none counts as zeros."""
    if not dist.is_initialized():
        return
    parameters = [p for p in parameters if p.requires_grad]
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    dist.all_reduce(flat)
    parts = flat.split([p.numel() for p in parameters])
    for p, part in zip(parameters, parts, strict=True):
        assert p.grad is not None
        p.grad.copy_(part.view_as(p))


def copy_from_first(tensors: Iterable[Tensor]) -> None:
    """Gives all processes the first one's values, in place."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def wait_for_all() -> None:
    """Returns in every process once all have come here."""
    if dist.is_initialized():
        dist.barrier()
