"""Builds, identifies, saves and loads the image encoder, and embeds images with it.

COURIER appendix §4: a torchvision `swin_t` with ImageNet weights whose classification head gives
way to a randomly initialised `Linear(768, 256)`; `dimension` may take the place of 256. Any other
torchvision classification model with one linear classifier serves as well, and any image model of
timm (`backbones`). Encoders are kept as safetensors + JSON; nothing that is read is unpickled into
code.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Callable
from dataclasses import asdict

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from courier_model import backbones
from courier_model.images import Preprocessing
from courier_model.projection import EMBEDDING_DIM, Projection, mean_of
from feature_jobs.schemas import DataContractError, OperatorError
from feature_jobs.store import files
from feature_jobs.store.documents import digest
from feature_jobs.store.encoder_info import (
    EncoderInfo,
    check_name,
    check_same_scope,
    read_encoder_info,
    told,
    write_encoder_info,
)

PRECISIONS = ("fp32", "bf16")

_WEIGHTS_FILE = "model.safetensors"
PACKAGE = ("encoder.json", _WEIGHTS_FILE)  # the files of a saved encoder
_WORDS = ("imagenet", "pretrained", "random")

_placing = threading.Lock()


class ImageEncoder(nn.Module):
    """Embeds images as unit vectors; `backbone` is the pretrained model with its new last layer.

    The vectors have D numbers, the `dimension`.

    Raises OperatorError when there is no such model, or none that we can use.
    """

    mean: Tensor
    std: Tensor
    centre: Tensor | None

    def __init__(self, backbone_name: str, preprocessing: Preprocessing, dimension: int) -> None:
        super().__init__()
        self.backbone_name = backbone_name
        self.preprocessing = preprocessing
        self.dimension = dimension
        self.encoder_id: str | None = None  # known once loaded from a saved encoder
        self.placed_on: torch.device | None = None  # where `embed` has moved it
        self.timm: dict[str, str] | None = None  # see EncoderInfo
        network = backbones.find(backbone_name).build(preprocessing.input_size)
        self.backbone, self.head_name = network.module, network.head
        head = nn.Linear(network.features, dimension)
        # A bias adds the same vector to all embeddings. Where features start out small, it is all
        # that is left of them: with torch's random bias, untrained ShuffleNets have cosines of 1.
        nn.init.zeros_(head.bias)
        self.backbone.set_submodule(self.head_name, head)
        # Not persistent: they are preprocessing, which encoder.json holds. [3, 1, 1]
        mean, std = torch.tensor(preprocessing.mean), torch.tensor(preprocessing.std)
        self.register_buffer("mean", mean.view(3, 1, 1), persistent=False)
        self.register_buffer("std", std.view(3, 1, 1), persistent=False)
        self.register_buffer("centre", None)  # [D]; None: nothing is taken off

    def forward(self, images: Tensor) -> Tensor:
        """Embeds uint8 RGB `[batch, 3, S, S]`, as `images.decode` gives it: float32 `[batch, D]`.

        The embeddings are L2-normalised.
        """
        return F.normalize(self.features(images), dim=-1)

    def features(self, images: Tensor) -> Tensor:
        """Returns the embeddings before their L2 norm is taken, which training attends with.

        They are float32 also under autocast, where the backbone runs in the lower precision. The
        `centre`, if it has one, is taken off.
        """
        if images.dtype != torch.uint8:  # floats in 0..1 would silently become all but black
            raise TypeError(f"expected uint8 images, found {images.dtype}")
        output: Tensor = self.backbone((images.float() / 255 - self.mean) / self.std)
        return output.float() if self.centre is None else output.float() - self.centre

    @property
    def head(self) -> nn.Linear:
        """Returns the embedding layer."""
        head = self.backbone.get_submodule(self.head_name)
        assert isinstance(head, nn.Linear)
        return head

    def leave_out_head(self) -> None:
        """Makes `features` what the head gets, `[batch, features]`."""
        self.backbone.set_submodule(self.head_name, nn.Identity())
        self.centre = None

    def project(self, projection: Projection, centred: bool = True) -> None:
        """Takes a projection of pooled features for its head, and its centre if it is `centred`.

        `weight` has the shape of the head's.
        """
        with torch.no_grad():
            self.head.weight.copy_(torch.from_numpy(projection.weight))
            nn.init.zeros_(self.head.bias)
        self.centre = torch.from_numpy(projection.centre) if centred else None

    def take_off(self, features: npt.NDArray[np.float32]) -> None:
        """Takes for its centre what the head makes of the mean of pooled `features` [n, c]."""
        with torch.no_grad():
            self.centre = self.head(torch.from_numpy(mean_of(features)))

    def move_centre(self, mean: npt.NDArray[np.float32]) -> None:
        """Takes off a mean of its `features`, float32 [D], besides what it takes off already."""
        more = torch.from_numpy(mean).to(self.head.weight.device)
        self.centre = more if self.centre is None else self.centre + more


def build_encoder(
    backbone: str,
    weights: str,
    input_size: int | None = None,
    seed: int = 0,
    dimension: int = EMBEDDING_DIM,
) -> ImageEncoder:
    """Builds a new encoder in eval mode, on the CPU; the same arguments give the same tensors.

    `weights` is "pretrained" (what the backbone's library publishes, downloaded or from its cache:
    torchvision's IMAGENET1K_V1, also called "imagenet", or the model's own on the Hugging Face hub
    for one of timm), "random", or the path of a `.pth` or `.safetensors` file of this model. The
    classification head of such weights is dropped; the new one, to `dimension` numbers, depends on
    backbone and `seed` only.
    Mean, std, interpolation and the ratio of resize to crop are those of the published weights,
    also where others are loaded; `input_size` (pixels) defaults to theirs.

    Raises OperatorError for an unknown backbone, weights that cannot be had or do not fit, and an
    input size that the backbone does not take.
    """
    found = backbones.find(backbone)
    size = found.usual_size if input_size is None else input_size
    if size < 1:
        raise OperatorError(
            f"The input size is {size} pixels; expected 1 or more, such as {found.usual_size}."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = ImageEncoder(backbone, found.preprocessing(size), dimension).eval()
        _try_input_size(encoder, found.usual_size)
        tensors, encoder.timm = found.weights(weights, size)
    if tensors is not None:
        named = "the pretrained weights" if weights in _WORDS else weights
        _load_backbone(encoder, tensors, named)
    return encoder.eval()  # some of timm's keep, in this mode, what follows from their weights


def _load_backbone(encoder: ImageEncoder, state: dict[str, Tensor], source: str) -> None:
    """Loads everything but the classification head, which stays as it was initialised."""
    is_head = encoder.head_name + "."
    body = {name: tensor for name, tensor in state.items() if not name.startswith(is_head)}
    own = encoder.backbone.state_dict()
    head = {name: tensor for name, tensor in own.items() if name.startswith(is_head)}
    misfit = _load_state(encoder.backbone, body | head)
    if misfit:
        raise OperatorError(
            f"{source} does not fit the backbone {encoder.backbone_name!r}: {misfit}. Expected are "
            "the weights of just this model, since a partial load leaves layers random."
        )


def _load_state(module: nn.Module, state: dict[str, Tensor]) -> str:
    """Loads `state` strictly; returns "" or else, in words, what does not fit, naming some keys.

    torch's own strict loading names all keys, hundreds for a wrong model.
    """
    try:
        keys = module.load_state_dict(state, strict=False)
    except RuntimeError as error:  # shapes
        return " ".join(str(error).split("\n\t")[1:4])
    found = {"missing": keys.missing_keys, "unexpected": keys.unexpected_keys}
    return "; ".join(
        f"{len(names)} {kind} tensors, such as {', '.join(names[:3])}"
        for kind, names in found.items()
        if names
    )


def _try_input_size(encoder: ImageEncoder, usual_size: int) -> None:
    size, name = encoder.preprocessing.input_size, encoder.backbone_name
    try:
        with torch.inference_mode():
            found = encoder(torch.zeros(1, 3, size, size, dtype=torch.uint8))
        if found.shape != (1, encoder.dimension):
            raise TypeError(f"it makes {tuple(found.shape)}")
    except TypeError as error:
        raise OperatorError(
            f"The backbone {name!r} does not make one vector of features out of one image: {error}."
            " Take an image model that classifies."
        ) from error
    except (RuntimeError, ValueError, AssertionError) as error:
        raise OperatorError(
            f"The backbone {name!r} does not take an input size of {size} pixels: {error}. Its "
            f"usual one is {usual_size}."
        ) from error


def _encoder_id(
    name: str,
    backbone: str,
    preprocessing: dict[str, object],
    dimension: int,
    state: dict[str, Tensor],
) -> str:
    """Returns `<name>-<12 hex>`, changed by what can change an embedding and by nothing else."""
    tensors = {
        key: [str(tensor.dtype), list(tensor.shape), _sha256(tensor)]
        for key, tensor in state.items()
    }
    made_of = {"backbone": backbone, "preprocessing": preprocessing, **told(dimension)}
    identity = {**made_of, "tensors": tensors}
    return f"{name}-{digest(identity)[:12]}"


def _sha256(tensor: Tensor) -> str:
    # Flat first: a scalar cannot be viewed as bytes.
    values = tensor.contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.sha256(values.data).hexdigest()


def save_encoder(
    encoder: ImageEncoder,
    folder_root: str,
    name: str,
    categories: tuple[str, ...] | None,
    data_start_ds: str | None,
    data_end_ds: str | None,
    weights: str,
    lineage: tuple[str, ...] = (),
) -> EncoderInfo:
    """Writes an encoder into `<folder_root>/<encoder_id>/`: model.safetensors, then encoder.json.

    Without encoder.json, which comes last, the folder holds no encoder.

    Saving the same encoder again changes nothing. Raises OperatorError for a bad name, and when the
    same weights are already there under this name with another scope or other dates, since one ID
    cannot mean both.
    """
    check_name(name)
    state = {key: tensor.cpu().contiguous() for key, tensor in encoder.state_dict().items()}
    preprocessing = asdict(encoder.preprocessing)
    dimension = encoder.dimension
    encoder_id = _encoder_id(name, encoder.backbone_name, preprocessing, dimension, state)
    info = EncoderInfo(
        encoder_id=encoder_id,
        backbone=encoder.backbone_name,
        preprocessing=preprocessing,
        categories=categories,
        data_start_ds=data_start_ds,
        data_end_ds=data_end_ds,
        weights=weights,
        timm=encoder.timm,
        lineage=lineage,
        dimension=dimension,
    )
    folder = os.path.join(folder_root, encoder_id)
    if not files.exists(os.path.join(folder, "encoder.json")):
        files.write_bytes(os.path.join(folder, _WEIGHTS_FILE), safetensors.torch.save(state))
        write_encoder_info(folder, info)
    saved = read_encoder_info(folder)
    check_same_scope(saved, info, folder)
    return saved


def origin_of(weights: str) -> str:
    """Returns what encoder.json says of `build_encoder`'s `weights`: no folder of this machine."""
    return weights if weights in _WORDS else os.path.basename(weights)


def load_encoder(folder: str) -> ImageEncoder:
    """Loads the encoder in `folder`, in eval mode on the CPU, its tensors checked against its ID.

    Raises OperatorError when the folder holds no encoder, DataContractError when its files are
    damaged or do not belong together.
    """
    info = read_encoder_info(folder)
    if info.vectors is not None:
        raise OperatorError(
            f"The encoder {info.encoder_id} gives out vectors that the shop has, and COURIER "
            "cannot run what made them: there are no weights to embed an image with, or to train "
            "on from. Name an encoder that was made by `courier train` or `courier init-encoder`."
        )
    path = os.path.join(folder, _WEIGHTS_FILE)
    try:
        state = safetensors.torch.load(files.read_bytes(path))
    except (OSError, SafetensorError) as error:
        raise DataContractError(
            f"{path} cannot be read as safetensors ({error}), so the encoder {info.encoder_id} is "
            "damaged. Restore the file from its origin, or make the encoder again."
        ) from error
    name = info.encoder_id.rpartition("-")[0]
    found = _encoder_id(name, info.backbone, info.preprocessing, info.dimension, state)
    if found != info.encoder_id:
        raise DataContractError(
            f"{path} and encoder.json beside it digest to {found}, but encoder.json says "
            f"{info.encoder_id}: weights, backbone, preprocessing or dimension were changed or "
            "damaged. "
            "Its embeddings would not be comparable with those made under that ID. Restore the "
            "folder from its origin, or make the encoder again."
        )
    return _rebuild(info, state, path)


def _rebuild(info: EncoderInfo, state: dict[str, Tensor], path: str) -> ImageEncoder:
    with torch.random.fork_rng(devices=[]):  # its initial weights are overwritten
        preprocessing = Preprocessing.from_dict(info.preprocessing)
        encoder = ImageEncoder(info.backbone, preprocessing, info.dimension)
    if "centre" in state:
        encoder.centre = torch.zeros(info.dimension)
    misfit = _load_state(encoder, state)
    if misfit:
        made = f", {info.timm['version']}" if info.timm else ""
        raise DataContractError(
            f"{path} does not fit the backbone {info.backbone!r} as "
            f"{backbones.package_of(info.backbone)} builds it: {misfit}. It was made with another "
            f"version{made}: install that one, or make the encoder again."
        )
    encoder.encoder_id, encoder.timm = info.encoder_id, info.timm
    return encoder.eval()


def choose_device(wanted: str = "auto") -> torch.device:
    """Picks CUDA where there is one, unless "cpu" is `wanted`; else the CPU, even if "cuda" is."""
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def choose_precision(device: torch.device, wanted: str = "auto") -> str:
    """Returns the precision that is `wanted`; for "auto" "bf16" where the hardware has it.

    Else that is "fp32". CUDA multiplies in bf16 since Ampere, and CPUs with AMX do. Elsewhere it is
    emulated, slower than fp32.
    """
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu.get_capabilities().get("amx_bf16", False)
    return "bf16" if fast else "fp32"


def kind_of(device: torch.device) -> str:
    """Names the hardware as far as it decides an embedding's bits: cpu_intel_avx512_amx, cuda_…"""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device).lower()
        return "_".join([device.type, *re.findall(r"[a-z0-9]+", name)])
    known = torch.cpu.get_capabilities()
    maker = str(known.get("cpu_name", "")).lower().split()[:1]
    kernels = torch.backends.cpu.get_cpu_capability().lower().replace(" ", "_")
    # Units that multiply bf16, on x86 and on Arm; elsewhere it is emulated.
    units = {"amx_bf16": "amx", "avx512_bf16": "bf16", "bf16": "bf16"}
    unit = [units[name] for name in units if known.get(name)][:1]
    return "_".join([device.type, *maker, kernels, *unit])


def embed(
    encoder: ImageEncoder,
    images: npt.NDArray[np.uint8],
    batch_size: int,
    device: torch.device,
    precision: str,
) -> npt.NDArray[np.float32]:
    """Embeds uint8 RGB `[n, 3, S, S]` as float32 unit vectors `[n, D]`, `batch_size` at a time.

    Every forward pass has the same shape (the last one is padded with black images, which are
    dropped), so an embedding does not depend on how many other images there are. Moves the encoder
    to `device`. `precision` is "fp32" or "bf16" (see `choose_precision`).

    Raises DataContractError when a vector is not finite or not of unit length: it must not be
    published.
    """
    embeddings = _in_batches(encoder, images, batch_size, device, precision, encoder.forward)
    _check_unit_norm(embeddings, encoder)
    return embeddings


def pool(
    encoder: ImageEncoder,
    images: npt.NDArray[np.uint8],
    batch_size: int,
    device: torch.device,
    precision: str,
) -> npt.NDArray[np.float32]:
    """Returns the features of uint8 RGB `[n, 3, S, S]`, as `embed` computes them, without a norm.

    They are float32 `[n, features]` of an encoder whose head is left out. Raises DataContractError
    where one is not finite.
    """
    features = _in_batches(encoder, images, batch_size, device, precision, encoder.features)
    if not np.isfinite(features).all():
        raise DataContractError(
            f"The backbone {encoder.backbone_name!r} gave features that are not finite. Its "
            "weights are broken or overflow in the chosen precision; nothing can be fitted on "
            "them. Try precision fp32 in [embed] of the settings."
        )
    return features


def _in_batches(
    encoder: ImageEncoder,
    images: npt.NDArray[np.uint8],
    batch_size: int,
    device: torch.device,
    precision: str,
    compute: Callable[[Tensor], Tensor],
) -> npt.NDArray[np.float32]:
    size = encoder.preprocessing.input_size
    if images.dtype != np.uint8 or images.shape[1:] != (3, size, size):
        raise ValueError(
            f"expected uint8 [n, 3, {size}, {size}], got {images.dtype} {images.shape}"
        )
    if encoder.training or precision not in PRECISIONS:
        raise ValueError(f"needs an encoder in eval mode and a precision out of {PRECISIONS}")
    if not len(images):
        return np.zeros((0, encoder.dimension), np.float32)
    _place(encoder, device)
    with (
        torch.inference_mode(),
        torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"),
    ):
        # Outputs stay on the device until the end, so that a GPU is not waited for per batch.
        outputs = [
            _compute_batch(compute, images[start : start + batch_size], batch_size, device)
            for start in range(0, len(images), batch_size)
        ]
        found: npt.NDArray[np.float32] = torch.cat(outputs).cpu().numpy()
    return found


def _place(encoder: ImageEncoder, device: torch.device) -> None:
    """Moves the encoder to `device`, its weights channels last, unless it is there.

    Moving replaces the weights, which other threads may be computing with.
    """
    with _placing:
        if encoder.placed_on != device:
            encoder.to(device).to(memory_format=torch.channels_last)
            encoder.placed_on = device


def _compute_batch(
    compute: Callable[[Tensor], Tensor], images: npt.NDArray[np.uint8], batch_size: int,
    device: torch.device,
) -> Tensor:  # fmt: skip
    padded = np.zeros((batch_size, *images.shape[1:]), np.uint8)
    padded[: len(images)] = images
    # Channels last: measured 1.1 to 1.2 times as fast on a CPU for swin_t and ResNets.
    channels_last = torch.from_numpy(padded).to(device, memory_format=torch.channels_last)
    return compute(channels_last)[: len(images)]


def _check_unit_norm(embeddings: npt.NDArray[np.float32], encoder: ImageEncoder) -> None:
    norms = np.linalg.norm(embeddings, axis=1)
    bad = np.flatnonzero(~(np.abs(norms - 1) < 1e-3))  # so written that NaN is bad
    if len(bad):
        raise DataContractError(
            f"The encoder {encoder.encoder_id or encoder.backbone_name} gave {len(bad)} of "
            f"{len(norms)} embeddings that are not finite unit vectors (the first: image {bad[0]}, "
            f"norm {norms[bad[0]]}). Its weights are broken or overflow in the chosen precision; "
            "nothing of it may be published. Try precision fp32, else make the encoder again."
        )
