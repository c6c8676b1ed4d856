"""Makes a large contrastive batch fit one device.

*Cached gradients* (arXiv 2101.06983): embed all images without a graph, take the loss on those
features alone, then embed again chunk by chunk, each time backpropagating from the features' cached
gradient. Twice the forward passes, the memory of one chunk, and the gradients of the plain batch.
*Gradient checkpointing* (arXiv 1604.06174) of the attention blocks, as in COURIER appendix §4, or
as timm's models do it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.swin_transformer import ShiftedWindowAttention

from feature_jobs.schemas import OperatorError

T = TypeVar("T")


@contextmanager
def enough() -> Iterator[None]:
    """Raises OperatorError for what takes more memory than the device has."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OperatorError(
            f"The device's memory is too small for this run: {str(error).splitlines()[0]} Encode "
            "fewer images at a time with --chunk-images, recompute with --checkpoint-attention, or "
            "give a smaller --batch-rows, --input-size or --backbone."
        ) from error


def checkpoint_attention(backbone: nn.Module) -> None:
    """Makes Swin's attention blocks recompute their activations in the backward pass.

    Of timm's models it is what they themselves recompute, mostly whole blocks. Batch statistics in
    there must be frozen, since the second pass would count them again.

    Raises OperatorError for a backbone without either.
    """
    blocks = [m for m in backbone.modules() if isinstance(m, ShiftedWindowAttention)]
    for block in blocks:
        # On the instance: a wrapping module would rename the weights in every saved file.
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    if not blocks and not _checkpoint_as_timm_does(backbone):
        raise OperatorError(
            "Gradient checkpointing is meant for the attention blocks of Swin transformers and for "
            "models of timm that provide for it, and this backbone is neither. Give "
            "--no-checkpoint-attention, or take swin_t."
        )


def _checkpoint_as_timm_does(backbone: nn.Module) -> bool:
    body: Any = getattr(backbone, "body", None)
    try:
        body.set_grad_checkpointing()
    except (AttributeError, AssertionError):  # timm's models assert where they provide for none
        return False
    return True


def freeze_batch_statistics(module: nn.Module) -> None:
    """Puts batch normalisation into evaluation mode, so that neighbours in a chunk do not count.

    In training mode, an image's features depend on its neighbours in the chunk, and chunks would
    not give the gradients of the whole batch.
    """
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.eval()


def backward(
    encode: Callable[[Tensor], Tensor],
    images: Tensor,
    chunk_images: int | None,
    loss_of: Callable[[Tensor], T],
    backpropagate: Callable[[T], bool],
) -> T:
    """Adds the gradients of `loss_of(encode(images))` to the parameters'; returns that loss.

    `images` `[n, …]`; `encode` gives features `[m, D]` of any number of them, each time in an
    autocast context of its own: older torch casts weights once per context, and those cast without
    a graph would get no gradients. `backpropagate` calls backward on what `loss_of` returned, or
    returns False to leave this batch out. With `chunk_images` the gradients are cached. Random
    numbers of a chunk are the same both times.
    """
    if chunk_images is None or len(images) <= chunk_images:
        result = loss_of(encode(images))
        backpropagate(result)
        return result
    chunks = images.split(chunk_images)
    with torch.no_grad():
        states, parts = zip(*[(_random_state(c), encode(c)) for c in chunks], strict=True)
    features = torch.cat(parts).requires_grad_()
    result = loss_of(features)
    if backpropagate(result) and features.grad is not None:
        _backward_again(encode, chunks, states, features.grad.split(chunk_images))
    return result


def _backward_again(
    encode: Callable[[Tensor], Tensor],
    chunks: Sequence[Tensor],
    states: Sequence[list[Tensor]],
    gradients: Sequence[Tensor],
) -> None:
    after = _random_state(chunks[0])
    for chunk, state, gradient in zip(chunks, states, gradients, strict=True):
        _set_random_state(chunk, state)
        encode(chunk).backward(gradient)
    _set_random_state(chunks[0], after)


def _random_state(like: Tensor) -> list[Tensor]:
    """Returns the state of the generators that dropout on the device of `like` may draw from."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(like.device)] if like.is_cuda else states


def _set_random_state(like: Tensor, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if like.is_cuda:
        torch.cuda.set_rng_state(states[1], like.device)
