"""Measures what an image costs from bytes to pixels, by library. `make bench` runs it.

    python tests/benchmarks/bench_decode.py [--photos DIR]

JPEGs of quality 90 and 4:2:0 become uint8 [3, 224, 224] as swin_t takes them. They are mosaics of
the photographs in DIR, or of textures as fine as photographs. Times are of the processor, on one
thread, the libraries in turn. Ratios are to the first row, what torchvision's documentation shows.
"""

import argparse
import importlib.util
import io
import itertools
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import nights
import numpy as np
import torch
from PIL import Image
from torchvision import io as torchvision_io
from torchvision.transforms.v2 import functional as F

from courier_model.images import Preprocessing, decode

SIZES = [(232, 310), (600, 800), (1200, 1600), (2400, 3200)]
IMAGES, REPEATS = 5, 5  # of each size
SWIN = Preprocessing(224, 232, "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def square(image: Image.Image | torch.Tensor) -> Image.Image | torch.Tensor:
    image = F.resize(image, [SWIN.resize_size], F.InterpolationMode.BICUBIC)
    return F.center_crop(image, [SWIN.input_size])


def by_pillow(data: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return F.pil_to_tensor(square(image)).numpy()


def by_torchvision_io(data: bytes) -> np.ndarray:
    image = torchvision_io.decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    return square(image).contiguous().numpy()


def by_simplejpeg(data: bytes) -> np.ndarray:
    import simplejpeg  # no dependency of this project

    least = int(SWIN.jpeg_margin * SWIN.resize_size)
    pixels = simplejpeg.decode_jpeg(data, min_height=least, min_width=least)
    return F.pil_to_tensor(square(Image.fromarray(pixels))).numpy()


LIBRARIES: dict[str, Callable[[bytes], np.ndarray]] = {
    "Pillow": by_pillow,
    "courier images.decode": lambda data: decode(data, SWIN),
    "torchvision.io": by_torchvision_io,
    "simplejpeg + Pillow": by_simplejpeg,
}


def texture(seed: int) -> Image.Image:
    """Draws noise of all scales, each twice as strong as the next finer one, as in photographs."""
    rng = np.random.default_rng(seed)
    total = np.zeros((256, 256, 3))
    for cells in (2, 4, 8, 16, 32, 64, 128, 256):
        noise = rng.integers(0, 256, (cells, cells, 3)).astype(np.uint8)
        layer = Image.fromarray(noise).resize((256, 256), Image.Resampling.BICUBIC)
        total += np.asarray(layer, np.float64) / cells
    return Image.fromarray((total / total.max() * 255).astype(np.uint8))


def mosaics(size: tuple[int, int], tiles: list[Image.Image]) -> list[bytes]:
    width, height = size
    found, turn = [], itertools.cycle(tiles)
    for _ in range(IMAGES):
        mosaic = Image.new("RGB", size)
        for left, top in itertools.product(range(0, width, 232), range(0, height, 232)):
            mosaic.paste(next(turn), (left, top))
        file = io.BytesIO()
        mosaic.save(file, "JPEG", quality=90, subsampling="4:2:0")
        found.append(file.getvalue())
    return found


def milliseconds(files: list[bytes], names: list[str]) -> dict[str, float]:
    """Returns the median milliseconds per image of each library."""
    taken: dict[str, list[float]] = {name: [] for name in names}
    for _, data, name in itertools.product(range(REPEATS), files, names):
        start = time.process_time()
        LIBRARIES[name](data)
        taken[name].append(1000 * (time.process_time() - start))
    return {name: float(np.median(times)) for name, times in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Bytes to pixels, by library.")
    parser.add_argument("--photos", type=Path, help="a folder of .jpg to make the mosaics of")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # torchvision.io says that it is to be replaced
    names = list(LIBRARIES)
    if importlib.util.find_spec("simplejpeg") is None:
        names.remove("simplejpeg + Pillow")
        print("simplejpeg is not installed: left out")
    tiles = [texture(seed) for seed in range(20)]
    if options.photos:
        paths = sorted(options.photos.rglob("*.jpg"))[:200]
        tiles = [Image.open(path).convert("RGB") for path in paths]
    print(nights.head())
    print(f"{'library':24}{'source':>12}{'ms/image':>10}{'images/s':>10}{'ratio':>8}")
    for size in SIZES:
        found = milliseconds(mosaics(size, tiles), names)
        for name, value in found.items():
            speeds = f"{value:10.2f}{1000 / value:10.1f}{found['Pillow'] / value:8.2f}"
            print(f"{name:24}{size[0]:5} x {size[1]:4}{speeds}")


if __name__ == "__main__":
    main()
