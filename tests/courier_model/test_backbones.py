"""A backbone of timm's is built, prepared for and loaded as timm does it, or refused."""

import io
import math
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_data_config
from timm.models import generate_default_cfgs, register_model
from timm.models.swin_transformer import _create_swin_transformer
from torch import Tensor, nn

from courier_model import backbones
from courier_model.encoder import ImageEncoder, build_encoder, embed, load_encoder, save_encoder
from courier_model.images import decode
from courier_model.training import memory
from feature_jobs.schemas import OperatorError
from feature_jobs.store.encoder_info import EncoderInfo, read_encoder_info

CPU = torch.device("cpu")
SIDE = 64
# A small model of each family, and a part of what it computes again.
FAMILIES = {
    "test_vit": "blocks.0.attn",
    "test_convnext": "stages.0.blocks.0.conv_dw",
    "test_efficientnet": "blocks.1.0.conv_pwl",
    "tiny_swin": "layers.0.blocks.1.attn",
}
CACHE = "models--timm--test_vit.r160_in1k"

default_cfgs = generate_default_cfgs(
    {"tiny_swin": {"fixed_input_size": True, "classifier": "head.fc"}}  # as timm's own
)


@register_model
def tiny_swin(pretrained: bool = False, **options: object) -> nn.Module:
    """Builds a Swin as small as they come, since all of timm's take seconds."""
    size = {"window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2)}
    return _create_swin_transformer("tiny_swin", pretrained=pretrained, **size, **options)


def build(name: str, weights: str = "random", input_size: int | None = SIDE) -> ImageEncoder:
    return build_encoder(f"timm:{name}", weights, input_size, seed=1)


def save(encoder: ImageEncoder, root: Path, weights: str = "random") -> EncoderInfo:
    return save_encoder(encoder, str(root), "demo", None, None, None, weights)


def pictures(count: int, side: int = SIDE) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 3, side, side), dtype=np.uint8)


def whole_model(name: str, **options: object) -> nn.Module:
    """Stands for what the hub has: a model with all its classes, not as it was initialised."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        return timm.create_model(name, **options).eval()


def own_head(encoder: ImageEncoder) -> Tensor:
    return encoder.backbone.get_submodule(encoder.head_name).weight


# ---- built as timm builds it -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet.r160_in1k", "test_convnext"])
def test_an_embedding_is_that_of_timms_own_transform_and_pooled_features(
    name: str, tmp_path: Path
) -> None:
    model = whole_model(name)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    encoder = build(name, str(tmp_path / "w.safetensors"), None)
    ramp = np.add.outer(np.arange(300), np.arange(260)) * np.ones((3, 1, 1))
    image = Image.fromarray((ramp % 256).astype(np.uint8).transpose(1, 2, 0))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    pixels = decode(buffer.getvalue(), encoder.preprocessing)
    found = embed(encoder, pixels[None], 1, CPU, "fp32")

    prepared = create_transform(**resolve_data_config(model=model))(image)
    with torch.inference_mode():
        pooled = model.forward_head(model.forward_features(prepared[None]), pre_logits=True)
        output = (pooled @ own_head(encoder).T)[0]
    np.testing.assert_allclose(found[0], (output / output.norm()).numpy(), atol=1e-5)


def test_preprocessing_is_that_of_the_pretrained_weights_scaled_to_the_input_size() -> None:
    usual = build("test_vit", input_size=None).preprocessing
    assert (usual.input_size, usual.resize_size) == (160, math.floor(160 / 0.95))
    assert (usual.mean, usual.std) == ((0.5,) * 3, (0.5,) * 3)
    scaled = build("tf_efficientnet_lite0").preprocessing
    assert (scaled.input_size, scaled.resize_size) == (64, 73)  # timm rounds down
    assert scaled.interpolation == "bicubic"
    tags = ("resnet18.a1_in1k", "resnet18.tv_in1k")
    assert [build(tag).preprocessing.interpolation for tag in tags] == ["bicubic", "bilinear"]


def test_the_head_depends_on_backbone_and_seed_only(tmp_path: Path) -> None:
    save_file(whole_model("test_vit").state_dict(), tmp_path / "w.safetensors")
    before = torch.get_rng_state()
    loaded, fresh = build("test_vit", str(tmp_path / "w.safetensors")), build("test_vit")
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(own_head(loaded), own_head(fresh))
    other = build_encoder("timm:test_vit", "random", SIDE, seed=2)
    assert not torch.equal(own_head(other), own_head(fresh))
    assert not other.backbone.get_submodule("head").bias.any()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_encoder_embeds_as_before_and_says_what_made_it(name: str, tmp_path: Path) -> None:
    encoder, images = build(name), pictures(5)
    info = save(encoder, tmp_path)
    assert info.timm == {"version": timm.__version__}
    assert info.backbone == f"timm:{name}"
    loaded = load_encoder(str(tmp_path / info.encoder_id))
    expected = embed(encoder, images, 4, CPU, "fp32")
    assert np.abs(expected[0] - expected[1]).max() > 1e-4  # else anything would pass
    np.testing.assert_array_equal(embed(loaded, images, 4, CPU, "fp32"), expected)
    again = save(loaded, tmp_path / "again")
    assert again == info
    rough = embed(encoder, images, 4, CPU, "bf16")
    assert not np.array_equal(rough, expected)
    assert (rough * expected).sum(axis=1).min() > 0.99


def test_timms_version_is_no_part_of_an_encoders_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = save(build("test_vit"), tmp_path / "before")
    monkeypatch.setitem(backbones.PACKAGE_VERSIONS, "timm", "1.0.99")
    after = save(build("test_vit"), tmp_path / "after")
    assert before.encoder_id == after.encoder_id
    assert (after.timm, before.timm) == ({"version": "1.0.99"}, {"version": timm.__version__})


# ---- trained like any other ------------------------------------------------------------------


def step(encoder: ImageEncoder, chunk_images: int | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the features that a step's loss was taken of, and all gradients."""
    encoder.zero_grad()
    memory.freeze_batch_statistics(encoder.train())
    torch.manual_seed(4)
    images = torch.from_numpy(pictures(5)).contiguous(memory_format=torch.channels_last)
    target = torch.randn(256)
    seen = []

    def loss_of(features: Tensor) -> Tensor:
        seen.append(features.detach())
        shared = features.mean(dim=0)  # so that an image's gradient depends on the others
        return (features @ target).square().mean() + (features - shared).pow(3).sum()

    def go_back(loss: Tensor) -> bool:
        loss.backward()
        return True

    memory.backward(encoder.features, images, chunk_images, loss_of, go_back)
    return seen[0], {n: p.grad.clone() for n, p in encoder.named_parameters() if p.grad is not None}


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Returns the largest difference, relative to the largest gradient of the same parameter."""
    assert one.keys() == other.keys()
    largest = max(float(gradient.abs().max()) for gradient in other.values())
    return max(
        float((one[n] - other[n]).abs().max() / other[n].abs().max().clamp(min=1e-4 * largest))
        for n in one
    )


def without_random_depth(encoder: ImageEncoder) -> ImageEncoder:
    for part in encoder.modules():
        if hasattr(part, "drop_prob"):
            part.drop_prob = 0.0
    return encoder


@pytest.mark.parametrize("name", FAMILIES)
def test_cached_gradients_are_those_of_the_whole_batch(name: str) -> None:
    encoder = without_random_depth(build(name).to(memory_format=torch.channels_last))
    features, gradients = step(encoder, None)
    its_features, its = step(encoder, 2)
    assert len(gradients) == len(list(encoder.parameters()))
    torch.testing.assert_close(its_features, features, rtol=1e-4, atol=1e-5)
    assert difference(its, gradients) < 1e-2


@pytest.mark.parametrize("chunk_images", [None, 2])
@pytest.mark.parametrize("name", FAMILIES)
def test_checkpointing_changes_no_number(name: str, chunk_images: int | None) -> None:
    encoder = build(name)
    state = {key: value.clone() for key, value in encoder.state_dict().items()}
    features, gradients = step(encoder, chunk_images)
    memory.checkpoint_attention(encoder.backbone)
    passes = []
    part = encoder.backbone.get_submodule(f"body.{FAMILIES[name]}")
    part.register_forward_pre_hook(lambda *_: passes.append(None))
    its_features, its = step(encoder, chunk_images)
    assert len(passes) == (2 if chunk_images is None else 9)  # of 1 chunk, or 3 with a pass before
    assert torch.equal(features, its_features)
    assert difference(its, gradients) < 1e-5
    assert all(torch.equal(state[key], value) for key, value in encoder.state_dict().items())
    assert encoder.state_dict().keys() == state.keys()


def test_a_model_that_provides_for_no_checkpoints_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoder = build("ghostnet_050")
    body = encoder.backbone.get_submodule("body")

    def fail(enable: bool = True) -> None:
        raise AssertionError("gradient checkpointing not supported")

    monkeypatch.setattr(body, "set_grad_checkpointing", fail)
    with pytest.raises(OperatorError, match="--no-checkpoint-attention"):
        memory.checkpoint_attention(encoder.backbone)


# ---- weights ---------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes a cache of the hub without connection, where test_vit was downloaded before."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "hub" / CACHE
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc123")
    (folder / "snapshots" / "abc123").mkdir(parents=True)
    path = folder / "snapshots" / "abc123" / "model.safetensors"
    save_file(whole_model("test_vit").state_dict(), path)
    return path


def test_pretrained_weights_come_from_the_hubs_cache_first(hub: Path, tmp_path: Path) -> None:
    encoder = build("test_vit", "pretrained", None)
    published = load_file(hub)
    body = encoder.backbone.get_submodule("body").state_dict()
    assert body.keys() == published.keys() - {"head.weight", "head.bias"}
    assert all(torch.equal(body[name], published[name]) for name in body)
    info = save(encoder, tmp_path, "pretrained")
    assert info.timm == {
        "version": timm.__version__, "hub_id": "timm/test_vit.r160_in1k", "revision": "abc123",
        "licence": "apache-2.0",
    }  # fmt: skip
    assert read_encoder_info(str(tmp_path / info.encoder_id)) == info
    from_file = build("test_vit", str(hub), None)
    assert save(from_file, tmp_path / "file").encoder_id == info.encoder_id


def test_without_a_connection_the_refusal_says_what_to_fetch_and_where_to_put_it(
    hub: Path,
) -> None:
    shutil.rmtree(hub.parents[2])
    with pytest.raises(OperatorError, match="could not be fetched from the hub") as caught:
        build("test_vit", "pretrained", None)
    message = str(caught.value)
    assert "https://huggingface.co/timm/test_vit.r160_in1k/resolve/main/model.safeten" in message
    assert "--weights PATH" in message
    assert "\n" not in message
    with pytest.raises(OperatorError, match="no pretrained weights of 'timm:test_maxvit'"):
        build("test_maxvit", "pretrained")
    with pytest.raises(OperatorError, match="Give --weights pretrained"):
        build("test_vit", "imagenet")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_may_have_other_classes_or_none(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"w{suffix}"
    for classes in (1000, 7, 0):
        state = whole_model("test_convnext", num_classes=classes).state_dict()
        (save_file if suffix == ".safetensors" else torch.save)(dict(state), path)
        encoder = build("test_convnext", str(path))
        body = encoder.backbone.get_submodule("body").state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in body.items())


def test_position_embeddings_are_resampled_to_another_input_size(tmp_path: Path) -> None:
    state = whole_model("test_vit").state_dict()
    save_file(state, tmp_path / "w.safetensors")
    found = build("test_vit", str(tmp_path / "w.safetensors"), 96).backbone.state_dict()
    assert found["body.pos_embed"].shape[1] < state["pos_embed"].shape[1]
    assert torch.equal(found["body.blocks.0.attn.qkv.weight"], state["blocks.0.attn.qkv.weight"])


def test_weights_of_another_model_are_refused_naming_some_keys(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(whole_model("test_vit").state_dict(), path)
    for name in ("test_efficientnet", "test_convnext", "tiny_swin"):
        with pytest.raises(OperatorError, match=f"does not fit the backbone 'timm:{name}'") as told:
            build(name, str(path))
        assert len(str(told.value)) < 1000  # a paragraph, not hundreds of keys
        assert any(key in str(told.value) for key in ("blocks.0.", "patch_embed."))
    state = whole_model("test_efficientnet").state_dict()
    save_file(state | {"conv_stem.weight": torch.zeros(1, 3, 7, 7)}, path)
    with pytest.raises(OperatorError, match=r"mismatch for conv_stem\.weight"):
        build("test_efficientnet", str(path))
    del state["conv_stem.weight"]
    save_file(state, path)
    with pytest.raises(OperatorError, match=r"conv_stem\.weight"):
        build("test_efficientnet", str(path))


# ---- refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("swin_tiny_patch4_window7", "nearest name is 'timm:swin_tiny_patch4_window7_224'"),
        ("resnet18.a1_in1", "nearest is 'timm:resnet18.a1_in1k'"),
        ("", "not a model of timm"),
        ("convnext_tiny_in22ft1k", "not a model of timm"),  # an old name, of no known weights
        ("hf-hub:timm/resnet18.a1_in1k", "not a model of timm"),
        ("vit_base_patch16_sapiens2", "expected are 3 colours and a square"),
    ],
)
def test_an_unknown_or_unusable_model_is_refused(name: str, message: str) -> None:
    with pytest.raises(OperatorError, match=message) as caught:
        build(name)
    assert caught.value.exit_status == 2


def test_an_input_size_that_a_fixed_backbone_does_not_take_is_refused() -> None:
    with pytest.raises(OperatorError, match=r"input size of 2 pixels.*usual one is 224"):
        build("tiny_swin", input_size=2)
    with pytest.raises(OperatorError, match=r"input size of 100 pixels.*usual one is 160"):
        build("test_maxvit", input_size=100)


class TwoInputs(nn.Module):
    num_features = 8

    def forward(self, images: Tensor, masks: Tensor) -> Tensor:
        return images.mean(dim=(2, 3)) + masks


class Pyramid(nn.Module):
    num_features = 3

    def forward(self, images: Tensor) -> list[Tensor]:
        return [images.mean(dim=(2, 3))]


class Map(nn.Module):
    num_features = SIDE

    def forward(self, images: Tensor) -> Tensor:
        return images


@pytest.mark.parametrize("model", [TwoInputs, Pyramid, Map])
def test_a_model_that_makes_no_vector_of_an_image_is_refused(
    model: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: model())
    with pytest.raises(OperatorError, match="does not make one vector"):
        build("test_convnext")


def test_without_timm_its_backbones_are_refused_and_torchvisions_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(OperatorError, match=r"'timm:test_vit' .* pip install '\.\[timm\]'"):
        build("test_vit")
    build_encoder("resnet18", "random", input_size=32)


def test_an_encoder_of_another_timm_is_told_with_its_version(tmp_path: Path) -> None:
    encoder = build("test_vit")
    encoder.backbone.register_buffer("renamed_since", torch.zeros(1))
    assert encoder.timm is not None
    encoder.timm["version"] = "1.0.3"
    info = save(encoder, tmp_path)
    with pytest.raises(Exception, match=r"as timm .* another version, 1\.0\.3") as caught:
        load_encoder(os.path.join(str(tmp_path), info.encoder_id))
    assert "renamed_since" in str(caught.value)
