"""Builds the networks that encoders are made of, and finds their weights and preprocessing.

A backbone is a classification model of torchvision, by its name, or any image model of timm, as
`timm:NAME` with or without the tag of its pretrained weights (`timm:resnet50.a1_in1k`). timm comes
with the extra `timm` and is imported only where such a backbone is asked for.
"""

from __future__ import annotations

import difflib
import math
import pickle
import sys
import textwrap
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import safetensors.torch
import torch
import torchvision
from safetensors import SafetensorError
from torch import Tensor, nn
from torchvision.models import WeightsEnum, get_model, get_model_weights, list_models

from courier_model.images import Preprocessing
from feature_jobs.schemas import OperatorError
from feature_jobs.store.encoder_info import TIMM, check_timm_is_there
from feature_jobs.store.versions import PACKAGE_VERSIONS

_IMAGENET_CLASSES = 1000
_HUB_FILE = "model.safetensors"

# What torch, safetensors and the file system raise for a file that cannot be read as weights.
_UNREADABLE = (OSError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError)

# What timm's models raise, as seen, for arguments or weights that are not theirs.
_UNFIT = (RuntimeError, ValueError, TypeError, AssertionError, LookupError, AttributeError)


class Network(NamedTuple):
    """Holds a backbone with random weights; its module `head` is to become the embedding layer."""

    module: nn.Module
    head: str  # dotted name
    features: int  # what the head gets of each image


class Weights(NamedTuple):
    """Holds what a backbone begins with, and for timm what `EncoderInfo.timm` says of it."""

    tensors: dict[str, Tensor] | None  # by their names in Network.module; None: stays random
    timm: dict[str, str] | None


class Backbone(Protocol):
    """What an encoder needs of the library that its backbone is of."""

    usual_size: int  # pixels

    def preprocessing(self, input_size: int) -> Preprocessing:
        """Returns that of the pretrained weights, scaled to `input_size` pixels."""

    def build(self, input_size: int) -> Network:
        """Builds the network with random weights of torch's current seed."""

    def weights(self, origin: str, input_size: int) -> Weights:
        """Reads the weights that `origin` means, see `encoder.build_encoder`."""


def find(name: str) -> Backbone:
    """Finds a backbone by its name; downloads nothing.

    Raises OperatorError for a name that torchvision or timm does not have, and where timm is needed
    and not installed.
    """
    if name.startswith(TIMM):
        return _OfTimm(name)
    return _OfTorchvision(name)


def package_of(name: str) -> str:
    """Returns the library that the backbone `name` is of, with its version: torchvision 0.29.1."""
    library = "timm" if name.startswith(TIMM) else "torchvision"
    return f"{library} {PACKAGE_VERSIONS[library]}"


# ---- torchvision -----------------------------------------------------------------------------


class _OfTorchvision:
    def __init__(self, name: str) -> None:
        self._name = _known_to_torchvision(name)
        self._published = _imagenet_weights(name)
        self._transforms = self._published.transforms()
        self.usual_size: int = self._transforms.crop_size[0]

    def preprocessing(self, input_size: int) -> Preprocessing:
        resize = self._transforms.resize_size[0]
        return Preprocessing(
            input_size=input_size,
            resize_size=round(input_size * resize / self.usual_size),
            interpolation=self._transforms.interpolation.value,
            mean=tuple(self._transforms.mean),
            std=tuple(self._transforms.std),
        )

    def build(self, input_size: int) -> Network:
        module = get_model(self._name, weights=None)
        head = _head_name(module, self._name)
        features = module.get_submodule(head).in_features
        assert isinstance(features, int)
        return Network(module, head, features)

    def weights(self, origin: str, input_size: int) -> Weights:
        if origin == "random":
            return Weights(None, None)
        if origin in ("imagenet", "pretrained"):
            return Weights(_download(self._published), None)
        return Weights(_read_weights(Path(origin)), None)


def _known_to_torchvision(name: str) -> str:
    known = list_models(module=torchvision.models)
    if name not in known:
        raise OperatorError(
            f"The backbone {name!r} is not a classification model of "
            f"{package_of(name)}. The nearest name is {_nearest(name, known)!r}; models of "
            "timm are named timm:NAME."
        )
    return name


def _head_name(backbone: nn.Module, name: str) -> str:
    """Returns the dotted name of the classifier: the one `Linear` with an output per class."""
    heads = [
        path
        for path, module in backbone.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == _IMAGENET_CLASSES
    ]
    if len(heads) != 1:  # squeezenet classifies by a convolution, googlenet has auxiliary heads
        raise OperatorError(
            f"The backbone {name!r} has {len(heads)} linear classification layers; exactly one is "
            "needed, since it gives way to the embedding layer. Take a model such as swin_t, "
            "resnet50 or shufflenet_v2_x1_0."
        )
    return heads[0]


def _imagenet_weights(name: str) -> WeightsEnum:
    """Tells where ImageNet weights are and how their images were prepared; downloads nothing."""
    known = get_model_weights(name)
    if "IMAGENET1K_V1" not in known.__members__:
        raise OperatorError(
            f"The backbone {name!r} has no IMAGENET1K_V1 weights in torchvision, which say how its "
            f"images are prepared (it has {', '.join(known.__members__)}). Take another backbone."
        )
    return known["IMAGENET1K_V1"]


def _download(weights: WeightsEnum) -> dict[str, Tensor]:
    """Calls torchvision's own loader: torch's cache first (`TORCH_HOME`), else the network."""
    try:
        # weights_only: the hub's default would run whatever code a poisoned cache file holds.
        return weights.get_state_dict(
            progress=sys.stderr.isatty(), check_hash=True, weights_only=True
        )
    except _UNREADABLE as error:
        raise OperatorError(
            f"The ImageNet weights could not be fetched: {error}. On a machine with a connection, "
            f"fetch {weights.url} and pass the file here with --weights PATH."
        ) from error


# ---- timm ------------------------------------------------------------------------------------


class _OfTimm:
    """Wraps a model of timm: `body` gives its pooled features, `head` is our embedding layer.

    Pictures that timm would squeeze into a square or pad (crop_mode "squash" and "border") are cut
    to their centre square here, as all others are.
    """

    def __init__(self, name: str) -> None:
        check_timm_is_there(name)
        self._name = name
        self._model = name.removeprefix(TIMM)
        self._published = _pretrained_cfg(self._model)
        self.usual_size: int = self._published.input_size[-1]

    def preprocessing(self, input_size: int) -> Preprocessing:
        published = self._published
        return Preprocessing(
            input_size=input_size,
            resize_size=math.floor(input_size / published.crop_pct),  # as timm's own transform
            interpolation=published.interpolation,
            mean=tuple(published.mean),
            std=tuple(published.std),
        )

    def build(self, input_size: int) -> Network:
        try:
            body = self._create(input_size, num_classes=0)
        except _UNFIT as error:
            raise OperatorError(
                f"{package_of(self._name)} cannot build the backbone {self._name!r} for an input "
                f"size of {input_size} pixels: {error}. Its usual one is {self.usual_size}."
            ) from error
        features = getattr(body, "head_hidden_size", body.num_features)
        module = nn.Sequential(OrderedDict(body=body, head=nn.Identity()))
        return Network(module, "head", features)

    def weights(self, origin: str, input_size: int) -> Weights:
        facts = {"version": PACKAGE_VERSIONS["timm"]}
        if origin == "random":
            return Weights(None, facts)
        if origin == "imagenet":
            raise OperatorError(
                f'The weights "imagenet" are those of torchvision; {self._name!r} may have been '
                "pretrained on other images. Give --weights pretrained for its own, random, or the "
                "path of a file."
            )
        if origin == "pretrained":
            path = self._download()
            facts |= {"hub_id": self._published.hf_hub_id, "revision": path.parent.name}
            facts |= {"licence": self._published.license} if self._published.license else {}
            return Weights(self._fitted(_read_weights(path), str(path), input_size), facts)
        return Weights(self._fitted(_read_weights(Path(origin)), origin, input_size), facts)

    def _create(self, input_size: int, **options: Any) -> Any:
        import timm

        # Those that are fixed to one size are so by this argument, and have no such one otherwise.
        size = {"img_size": input_size} if self._published.fixed_input_size else {}
        return timm.create_model(self._model, **size, **options)

    def _fitted(self, state: dict[str, Tensor], source: str, input_size: int) -> dict[str, Tensor]:
        """Returns `state` as timm loads it, which maps names of original releases to its own.

        Position embeddings are resampled to the input size. timm is strict only where a model has
        all of its classes, so it gets them, and they are dropped afterwards.
        """
        own = self._create(input_size).state_dict()
        heads = tuple(f"{name}." for name in _classifiers(self._published))
        names = {name for name in own if not name.startswith(heads)}
        if names == {name for name in state if not name.startswith(heads)}:
            # A file of timm's own, perhaps of other classes or of none.
            state = {name: state[name] if name in names else own[name] for name in own}
        try:
            model = self._create(
                input_size, pretrained=True, pretrained_cfg_overlay={"state_dict": state}
            )
            model.reset_classifier(0)
        except _UNFIT as error:
            raise OperatorError(
                f"{source} does not fit the backbone {self._name!r}: {_some_of(error)}. Expected "
                "are the weights of just this model, since a partial load leaves layers random."
            ) from error
        return {f"body.{name}": tensor for name, tensor in model.state_dict().items()}

    def _download(self) -> Path:
        """Returns the file of the hub's own cache (`HF_HOME`), else fetches it."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        hub_id = self._published.hf_hub_id
        if not hub_id:
            raise OperatorError(
                f"timm knows no pretrained weights of {self._name!r} on the Hugging Face hub. Pass "
                "a file of them with --weights PATH, give --weights random, or take another "
                "backbone."
            )
        try:
            try:
                path = hf_hub_download(hub_id, _HUB_FILE, local_files_only=True)
            except LocalEntryNotFoundError:
                path = hf_hub_download(hub_id, _HUB_FILE)
        except OSError as error:  # all that the hub's client raises
            first_line = str(error).partition("\n")[0]
            raise OperatorError(
                f"The weights of {self._name!r} could not be fetched from the hub: {first_line} On "
                f"a machine with a connection, fetch https://huggingface.co/{hub_id}/resolve/main/"
                f"{_HUB_FILE} and pass the file here with --weights PATH."
            ) from error
        return Path(path)


def _pretrained_cfg(model: str) -> Any:
    """Returns what timm knows of a model's pretrained weights; of its default ones without a tag.

    Raises OperatorError for an unknown name or tag, and for a model whose images are not square or
    not RGB.
    """
    import timm
    from timm.models import get_arch_pretrained_cfgs

    name, _, tag = model.partition(".")
    models = timm.list_models()  # without the old names of some, which timm still builds
    if name not in models:
        raise OperatorError(
            f"The backbone {TIMM + model!r} is not a model of {package_of(TIMM)}. The nearest "
            f"name is {TIMM + _nearest(name, models)!r}."
        )
    known = get_arch_pretrained_cfgs(name)
    if tag and model not in known:
        there = (
            f"The nearest is {TIMM + _nearest(model, list(known))!r}" if known else "It has none"
        )
        raise OperatorError(
            f"{package_of(TIMM)} knows no pretrained weights {tag!r} of {TIMM + name!r}. "
            f"{there}; without a tag, the name means the default ones."
        )
    found = timm.get_pretrained_cfg(model, allow_unregistered=True)
    channels, height, width = found.input_size
    if channels != 3 or height != width:
        raise OperatorError(
            f"The backbone {TIMM + model!r} takes images of {channels} x {height} x {width}; "
            "expected are 3 colours and a square. Take another backbone."
        )
    return found


def _classifiers(published: Any) -> tuple[str, ...]:
    found = published.classifier or ()
    return (found,) if isinstance(found, str) else tuple(found)


# ---- both ------------------------------------------------------------------------------------


def _nearest(name: str, known: list[str]) -> str:
    return difflib.get_close_matches(name, known, n=1, cutoff=0)[0]


def _read_weights(path: Path) -> dict[str, Tensor]:
    if path.suffix not in (".pth", ".safetensors"):
        raise OperatorError(
            f'The weights are {str(path)!r}; expected "imagenet" or "pretrained", "random", or the '
            "path of a .pth or .safetensors file of the backbone's weights."
        )
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        first_line = str(error).partition("\n")[0]
        raise OperatorError(
            f"The weights file {path} cannot be read: {first_line} Expected is a state dict of the "
            "backbone's own model and nothing besides tensors, since nothing is unpickled that "
            "could run code."
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise OperatorError(
            f"The weights file {path} holds no plain state dict (names -> tensors) but a "
            f"{type(state).__name__} with other things in it, perhaps a whole training checkpoint. "
            "Save only the model's state_dict()."
        )
    return state


def _some_of(error: Exception) -> str:
    """Shortens torch's message, which for a wrong model names hundreds of tensors."""
    lines = str(error).split("\n\t")
    return " ".join(textwrap.shorten(line, 200, placeholder=" …") for line in lines[-3:])
