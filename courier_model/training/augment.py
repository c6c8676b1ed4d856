"""Makes of squares what the encoder is trained on: crops, and the distorted views of SimCLR.

A *square* is `decode(data, preprocessing.square())`: uint8 `[3, R, R]`, R being `resize_size`. All
functions take a batch of squares and give uint8 images of the encoder's input size. Bytes -> pixels
stays with `images`.

COURIER trains with `random_crop` (COURIER appendix §4: resize, random crop and normalisation only,
since stronger augmentation changes what the user saw). SimCLR and SimSiam train with `simclr_view`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageFilter

Pixels = npt.NDArray[np.uint8]


def centre_crop(squares: Pixels, size: int) -> Pixels:
    """Cuts out what an encoder sees at night: uint8 `[n, 3, R, R]` -> `[n, 3, size, size]`, a view.

    Equal, pixel for pixel, to `decode` without the detour over the square where R - size is a
    multiple of four, as in all of torchvision's ImageNet weights at their own size; otherwise up
    to one pixel off along the longer side, since each of the two cuts rounds.
    """
    start = round((squares.shape[-1] - size) / 2)  # halves to even, like `decode`
    return squares[..., start : start + size, start : start + size]


def random_crop(squares: Pixels, size: int, rng: np.random.Generator) -> Pixels:
    """Cuts uint8 `[n, 3, R, R]` to `[n, 3, size, size]`, each image at its own uniform offset."""
    n, _, _, side = squares.shape
    top, left = rng.integers(0, side - size + 1, (2, n))
    # [n, 3, offsets, offsets, size, size], a view -> one window per image [n, 3, size, size]
    windows = np.lib.stride_tricks.sliding_window_view(squares, (size, size), axis=(2, 3))
    return windows[np.arange(n), :, top, left]


def simclr_view(squares: Pixels, size: int, seed: int) -> Pixels:
    """Distorts each of uint8 `[n, 3, R, R]` on its own into one view: `[n, 3, size, size]`.

    SimCLR's augmentations (arXiv 2002.05709 appendix A) at colour strength 1: random resized crop
    (8 to 100% of the area, ratio 3/4 to 4/3, bicubic as in the authors' code), flip, colour jitter,
    greyscale, blur. The crop is taken from the square, not from the whole picture. The same seed
    gives the same views; torch's global random numbers stay as they are.
    """
    transform = _simclr_transform(size)
    views = np.empty((len(squares), 3, size, size), np.uint8)
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: that would also reseed CUDA, which is not forked.
        torch.default_generator.manual_seed(seed)
        for view, square in zip(views, squares, strict=True):  # v2 draws once per call
            picture = Image.fromarray(np.ascontiguousarray(square.transpose(1, 2, 0)))
            view[:] = np.asarray(transform(picture)).transpose(2, 0, 1)
    return views


@functools.cache
def _simclr_transform(size: int) -> Callable[[Image.Image], Image.Image]:
    """Builds SimCLR's transform of Pillow images.

    On one core it takes 12 ms a view of 224 pixels, where tensors took 60. torchvision is loaded
    here: that takes longer than all else that a worker of the loader needs.
    """
    from torchvision.transforms import v2

    jitter = v2.ColorJitter(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2)
    bicubic = v2.InterpolationMode.BICUBIC
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, (0.08, 1.0), (3 / 4, 4 / 3), interpolation=bicubic),
            v2.RandomHorizontalFlip(0.5),
            v2.RandomApply([jitter], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.Lambda(_blur)], p=0.5),
        ]
    )


def _blur(picture: Image.Image) -> Image.Image:
    """Blurs a picture without the paper's cut-off at a kernel of 10% of the side.

    At 224 pixels that is over 5 sigma.
    """
    sigma = float(torch.empty(()).uniform_(0.1, 2.0))
    return picture.filter(ImageFilter.GaussianBlur(sigma))
