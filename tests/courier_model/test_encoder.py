"""An encoder is built from what it says, the same wherever it is saved, and never half right."""

import io
import json
import os
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models import ResNet18_Weights, ShuffleNet_V2_X0_5_Weights, resnet18

from courier_model.encoder import (
    ImageEncoder,
    build_encoder,
    choose_device,
    choose_precision,
    embed,
    kind_of,
    load_encoder,
    save_encoder,
)
from courier_model.images import decode
from feature_jobs.schemas import DataContractError, OperatorError
from feature_jobs.store import files
from feature_jobs.store.encoder_info import EncoderInfo, read_encoder_info

CPU = torch.device("cpu")
SMALL = "shufflenet_v2_x0_5"


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (11, 3, 64, 64), dtype=np.uint8)


@pytest.fixture(scope="module")
def encoder() -> ImageEncoder:
    """Builds a network whose embeddings differ, so that comparing them means something."""
    encoder = build_encoder("resnet18", "random", input_size=64, seed=1)
    nn.init.normal_(encoder.backbone.get_submodule("fc").weight)
    return encoder


def small(seed: int = 0, input_size: int = 32) -> ImageEncoder:
    return build_encoder(SMALL, "random", input_size=input_size, seed=seed)


def save(
    encoder: ImageEncoder, root: Path | str, name: str = "demo", **changes: object
) -> EncoderInfo:
    facts = {"categories": None, "data_start_ds": None, "data_end_ds": None, "weights": "random"}
    return save_encoder(encoder, str(root), name, **(facts | changes))


def same_tensors(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


# ---- what an embedding is --------------------------------------------------------------------


def test_an_embedding_is_that_of_torchvisions_own_transform_and_model() -> None:
    encoder = build_encoder("resnet18", "random")
    ramp = np.add.outer(np.arange(300), np.arange(260)) * np.ones((3, 1, 1))
    image = Image.fromarray((ramp % 256).astype(np.uint8).transpose(1, 2, 0))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    pixels = decode(buffer.getvalue(), encoder.preprocessing)
    found = embed(encoder, pixels[None], 1, CPU, "fp32")

    prepared = ResNet18_Weights.IMAGENET1K_V1.transforms()(image)
    with torch.inference_mode():
        output = encoder.backbone(prepared[None])[0]
    np.testing.assert_allclose(found[0], (output / output.norm()).numpy(), atol=1e-6)


def test_embeddings_are_float32_unit_vectors(encoder: ImageEncoder, images: np.ndarray) -> None:
    embeddings = embed(encoder, images, 4, CPU, "fp32")
    assert embeddings.shape == (11, 256)
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-6)
    assert embed(encoder, images[:0], 4, CPU, "fp32").shape == (0, 256)


def test_an_embedding_does_not_depend_on_its_neighbours(
    encoder: ImageEncoder, images: np.ndarray
) -> None:
    together = embed(encoder, images, 4, CPU, "fp32")
    assert np.abs(together[0] - together[1]).max() > 1e-3  # else anything would pass
    for place in (0, 5, 10):  # in the first, a middle and the padded batch
        alone = embed(encoder, images[place : place + 1], 4, CPU, "fp32")
        np.testing.assert_allclose(alone[0], together[place], atol=1e-6)
    order = np.random.default_rng(1).permutation(len(images))
    shuffled = embed(encoder, images[order], 4, CPU, "fp32")
    np.testing.assert_allclose(shuffled, together[order], atol=1e-6)


def test_every_forward_pass_has_the_same_shape(
    encoder: ImageEncoder, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = []
    forward = encoder.backbone.forward

    def record(batch: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(batch.shape))
        return forward(batch)

    monkeypatch.setattr(encoder.backbone, "forward", record)
    embed(encoder, images, 4, CPU, "fp32")
    assert shapes == [(4, 3, 64, 64)] * 3


def test_read_only_images_are_embedded(encoder: ImageEncoder, images: np.ndarray) -> None:
    frozen = images.copy()
    frozen.flags.writeable = False  # as Arrow and memory maps give them
    embed(encoder, frozen, 4, CPU, "fp32")


def test_bf16_gives_nearly_the_same_unit_vectors(encoder: ImageEncoder, images: np.ndarray) -> None:
    exact, rough = (embed(encoder, images, 4, CPU, p) for p in ("fp32", "bf16"))
    assert not np.array_equal(exact, rough)
    assert rough.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rough, axis=1), 1, atol=1e-6)
    assert (exact * rough).sum(axis=1).min() > 0.999


@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_what_is_no_finite_unit_vector_is_never_returned(value: float, tmp_path: Path) -> None:
    encoder = small()
    nn.init.constant_(encoder.backbone.get_submodule("fc").weight, value)
    info = save(encoder, tmp_path)
    loaded = load_encoder(str(tmp_path / info.encoder_id))
    with pytest.raises(DataContractError, match=f"{info.encoder_id} gave 3 of 3"):
        embed(loaded, np.ones((3, 3, 32, 32), np.uint8), 2, CPU, "fp32")


def test_embed_refuses_wrong_use(encoder: ImageEncoder, images: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8"):
        embed(encoder, images.astype(np.float32), 4, CPU, "fp32")
    with pytest.raises(ValueError, match="64, 64"):
        embed(encoder, images[..., :32], 4, CPU, "fp32")
    with pytest.raises(ValueError, match="precision"):
        embed(encoder, images, 4, CPU, "fp16")
    with pytest.raises(ValueError, match="eval mode"):
        embed(small().train(), images[..., :32, :32], 4, CPU, "fp32")
    with pytest.raises(TypeError, match="uint8"):
        encoder(torch.zeros(1, 3, 64, 64))


def test_the_chosen_precision_is_one_that_the_hardware_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for has_amx, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda a=has_amx: {"amx_bf16": a})
        assert choose_precision(CPU) == expected
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"sve": True})  # ARM
    assert choose_precision(CPU) == "fp32"
    assert choose_precision(CPU, "bf16") == "bf16"  # asked for, though slow


@pytest.mark.parametrize(
    ("known", "kernels", "kind"),
    [
        (
            {"cpu_name": "Intel X", "avx512_bf16": 1, "amx_bf16": 1},
            "AVX512",
            "cpu_intel_avx512_amx",
        ),
        ({"cpu_name": "AMD EPYC 9B14", "avx512_bf16": True}, "AVX512", "cpu_amd_avx512_bf16"),
        ({"cpu_name": "AMD EPYC 7B12", "amx_bf16": False}, "AVX2", "cpu_amd_avx2"),
        ({"sve": True, "bf16": True}, "SVE256", "cpu_sve256_bf16"),
        ({}, "NO AVX", "cpu_no_avx"),
    ],
)
def test_a_cpu_is_named_by_what_decides_its_kernels(
    known: dict[str, object], kernels: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: kernels)
    assert kind_of(CPU) == kind


def test_a_gpu_is_named_by_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    assert kind_of(torch.device("cuda")) == "cuda_nvidia_a100_sxm4_80gb"


def test_the_chosen_device_is_cuda_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device().type == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device().type == "cpu"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(("precision", "cosine"), [("fp32", 0.9999), ("bf16", 0.999)])
def test_a_gpu_gives_the_embeddings_of_the_cpu(
    images: np.ndarray, precision: str, cosine: float
) -> None:
    encoder = build_encoder("swin_t", "random", input_size=64)
    expected = embed(encoder, images, 4, CPU, "fp32")
    found = embed(encoder, images, 4, torch.device("cuda"), precision)
    assert (expected * found).sum(axis=1).min() > cosine
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    alone = embed(encoder, images[5:6], 4, torch.device("cuda"), precision)
    np.testing.assert_allclose(alone[0], found[5], atol=1e-6)
    assert choose_precision(torch.device("cuda")) == "bf16"


# ---- building --------------------------------------------------------------------------------


def test_swin_t_is_the_papers_encoder() -> None:
    encoder = build_encoder("swin_t", "random", input_size=32)
    preprocessing = encoder.preprocessing
    assert (preprocessing.resize_size, preprocessing.interpolation) == (33, "bicubic")
    head = encoder.backbone.get_submodule("head")
    assert isinstance(head, nn.Linear)
    assert (head.in_features, head.out_features) == (768, 256)
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)
    assert embed(encoder, images, 2, CPU, "fp32").shape == (2, 256)


def test_preprocessing_is_that_of_the_imagenet_weights_scaled_to_the_input_size() -> None:
    usual = build_encoder(SMALL, "random").preprocessing
    expected = ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1.transforms()
    assert (usual.input_size, usual.resize_size) == (224, 256)
    assert usual.interpolation == expected.interpolation.value == "bilinear"
    assert usual.mean == tuple(expected.mean)
    assert usual.std == tuple(expected.std)
    scaled = small(input_size=63).preprocessing
    assert (scaled.input_size, scaled.resize_size) == (63, 72)


def test_the_seed_alone_decides_random_weights() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = small(seed=1)
    assert torch.equal(before, torch.get_rng_state())  # and others' random numbers stay theirs
    torch.manual_seed(6)
    assert same_tensors(first, small(seed=1))
    assert not same_tensors(first, small(seed=2))


def test_an_unknown_backbone_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(OperatorError, match="'swin_t'"):
        build_encoder("swin-t", "random")
    with pytest.raises(OperatorError, match="nearest"):
        build_encoder("deeplabv3_resnet50", "random")  # of torchvision, but no classifier


def test_backbones_without_one_linear_classifier_are_refused() -> None:
    with pytest.raises(OperatorError, match="0 linear classification layers"):
        build_encoder("squeezenet1_1", "random")
    with pytest.raises(OperatorError, match="IMAGENET1K_V1"):
        build_encoder("vit_h_14", "random")


def test_an_input_size_that_the_backbone_does_not_take_is_refused() -> None:
    with pytest.raises(OperatorError, match=r"input size of 96 pixels.*224"):
        build_encoder("vit_b_32", "random", input_size=96)
    with pytest.raises(OperatorError, match="0 pixels"):
        build_encoder(SMALL, "random", input_size=0)


# ---- weights from elsewhere ------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained() -> dict[str, torch.Tensor]:
    """Stands for torchvision's published file: a whole ResNet-18, classification head included."""
    torch.manual_seed(99)
    return dict(resnet18(weights=None).state_dict())


def test_imagenet_weights_come_through_torchvisions_own_loader(
    trained: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    torch.save(trained, cache / os.path.basename(ResNet18_Weights.IMAGENET1K_V1.url))
    encoder = build_encoder("resnet18", "imagenet", input_size=32, seed=3)
    untrained = build_encoder("resnet18", "random", input_size=32, seed=3)
    for name, tensor in encoder.backbone.state_dict().items():
        own = untrained.backbone.get_submodule("fc").state_dict()
        expected = own[name[3:]] if name.startswith("fc.") else trained[name]
        assert torch.equal(tensor, expected), name


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_weights_file_gives_the_same_encoder_as_the_download(
    suffix: str, trained: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    url = ResNet18_Weights.IMAGENET1K_V1.url
    torch.save(trained, tmp_path / "hub" / "checkpoints" / os.path.basename(url))
    path = tmp_path / f"fetched{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(trained, path)
    downloaded = build_encoder("resnet18", "imagenet", input_size=32)
    assert same_tensors(build_encoder("resnet18", str(path), input_size=32), downloaded)


def test_a_failing_download_says_what_to_fetch_and_where_to_put_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", fail)
    monkeypatch.setattr("torch.hub.urlopen", fail)
    with pytest.raises(OperatorError, match="no route to host") as caught:
        build_encoder("resnet18", "imagenet")
    assert ResNet18_Weights.IMAGENET1K_V1.url in str(caught.value)
    assert "--weights PATH" in str(caught.value)


def test_weights_of_another_model_are_refused_naming_some_keys(
    trained: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    body = {name: tensor for name, tensor in trained.items() if not name.startswith("fc.")}
    cases = {
        "missing tensors, such as conv1.weight": {**body},
        "unexpected tensors, such as extra": body | {"extra": torch.zeros(1)},
        "size mismatch for conv1.weight": body | {"conv1.weight": torch.zeros(1, 3, 7, 7)},
    }
    del cases["missing tensors, such as conv1.weight"]["conv1.weight"]
    for message, state in cases.items():
        path = tmp_path / "w.safetensors"
        save_file(state, path)
        with pytest.raises(OperatorError, match=message) as caught:
            build_encoder("resnet18", str(path), input_size=32)
        assert len(str(caught.value)) < 1000  # a paragraph, not hundreds of keys
    save_file(body, tmp_path / "headless.safetensors")
    build_encoder("resnet18", str(tmp_path / "headless.safetensors"), input_size=32)


class RunsCode:
    """Leaves a folder behind when its pickle is loaded without care."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (self.target,)


def test_a_weights_file_that_would_run_code_is_refused_unrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    cached = (
        tmp_path
        / "hub"
        / "checkpoints"
        / os.path.basename(ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1.url)
    )
    for path, weights in ((tmp_path / "w.pth", str(tmp_path / "w.pth")), (cached, "imagenet")):
        torch.save({"w": RunsCode(tmp_path / "ran")}, path)
        with pytest.raises(OperatorError):
            build_encoder(SMALL, weights, input_size=32)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("w.pth", b"<html>not found</html>", "cannot be read"),
        ("w.pth", b"PK\x03\x04 cut short", "cannot be read"),
        ("w.pth", b"", "cannot be read"),
        ("w.pth", None, "cannot be read"),
        ("w.safetensors", b"rubbish rubbish", "cannot be read"),
        ("w.safetensors", None, "cannot be read"),
        ("w.pkl", b"", 'expected "imagenet"'),
    ],
)
def test_a_file_that_holds_no_weights_is_refused(
    name: str, content: bytes | None, message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(OperatorError, match=message):
        build_encoder(SMALL, str(tmp_path / name), input_size=32)


def test_a_whole_checkpoint_is_refused(tmp_path: Path) -> None:
    torch.save({"model": small().backbone.state_dict(), "epoch": 3}, tmp_path / "w.pth")
    with pytest.raises(OperatorError, match="checkpoint"):
        build_encoder(SMALL, str(tmp_path / "w.pth"), input_size=32)


# ---- saved and loaded ------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["tmp_path", "bucket"])
def test_a_saved_and_loaded_encoder_gives_identical_embeddings(
    encoder: ImageEncoder, images: np.ndarray, place: str, request: pytest.FixtureRequest
) -> None:
    root = request.getfixturevalue(place)
    info = save(encoder, root, categories=("dress", "shirt"), data_start_ds="2024-01-01")
    folder = f"{root}/{info.encoder_id}"
    assert files.list_names(folder) == ["encoder.json", "model.safetensors"]
    assert info == read_encoder_info(folder)
    assert info.categories == ("dress", "shirt")
    loaded = load_encoder(folder)
    assert loaded.encoder_id == info.encoder_id
    assert loaded.preprocessing == encoder.preprocessing
    assert not loaded.training
    np.testing.assert_array_equal(
        embed(loaded, images, 4, CPU, "fp32"), embed(encoder, images, 4, CPU, "fp32")
    )


def test_the_encoder_id_depends_on_weights_and_preprocessing_alone(tmp_path: Path) -> None:
    here = save(small(), tmp_path / "here")
    there = save(small(), tmp_path / "there", categories=("dress",), data_end_ds="2024-01-01")
    assert here.encoder_id == there.encoder_id
    assert here.encoder_id.startswith("demo-")
    assert len(here.encoder_id) == len("demo-") + 12
    reseeded = save(small(seed=1), tmp_path)
    resized = save(small(input_size=33), tmp_path)
    other_bias = small()
    other_bias.backbone.get_submodule("fc").bias.data[255] += 1e-6
    ids = {i.encoder_id for i in (here, reseeded, resized, save(other_bias, tmp_path))}
    assert len(ids) == 4


@pytest.mark.parametrize("dimension", [64, 100, 1024])
def test_an_encoder_has_the_dimension_that_it_is_built_with(dimension: int, tmp_path: Path) -> None:
    encoder = build_encoder(SMALL, "random", 32, dimension=dimension)
    info = save(encoder, tmp_path)
    assert info.dimension == dimension
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), np.uint8)
    loaded = load_encoder(str(tmp_path / info.encoder_id))
    found = embed(loaded, images, 2, torch.device("cpu"), "fp32")
    assert found.shape == (3, dimension)
    np.testing.assert_array_equal(found, embed(encoder, images, 2, torch.device("cpu"), "fp32"))
    assert embed(loaded, images[:0], 2, torch.device("cpu"), "fp32").shape == (0, dimension)


def test_an_encoder_that_says_another_dimension_than_it_has_is_refused(tmp_path: Path) -> None:
    info = save(build_encoder(SMALL, "random", 32, dimension=64), tmp_path)
    path = tmp_path / info.encoder_id / "encoder.json"
    facts = json.loads(path.read_text())
    for said in ({"dimension": 128}, {}):
        del facts["dimension"]
        path.write_text(json.dumps(facts | said))
        with pytest.raises(DataContractError, match="preprocessing or dimension were changed"):
            load_encoder(str(path.parent))
        facts["dimension"] = 64


def test_saving_again_changes_nothing(tmp_path: Path) -> None:
    info = save(small(), tmp_path)
    before = [(p, p.stat().st_mtime_ns) for p in sorted(tmp_path.rglob("*"))]
    assert save(small(), tmp_path) == info
    assert [(p, p.stat().st_mtime_ns) for p in sorted(tmp_path.rglob("*"))] == before


def test_one_encoder_id_never_means_two_scopes(tmp_path: Path) -> None:
    save(small(), tmp_path, categories=("dress",))
    with pytest.raises(OperatorError, match="categories"):
        save(small(), tmp_path, categories=("dress", "hat"))


def test_a_failed_save_leaves_no_encoder_and_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as broken:
        broken.setattr("courier_model.encoder.write_encoder_info", fail)
        with pytest.raises(OSError, match="disk full"):
            save(small(), tmp_path)
    (folder,) = tmp_path.iterdir()
    with pytest.raises(OperatorError, match="no encoder package"):
        load_encoder(str(folder))
    load_encoder(str(tmp_path / save(small(), tmp_path).encoder_id))


@pytest.mark.parametrize("name", ["", "Demo", "-demo", "a/b", "..", "a_b", "demo\n"])
def test_a_name_that_is_no_folder_name_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(OperatorError, match="name"):
        save(small(), tmp_path, name)


def test_damaged_weights_are_refused_naming_the_file(tmp_path: Path) -> None:
    info = save(small(), tmp_path)
    path = tmp_path / info.encoder_id / "model.safetensors"
    whole = path.read_bytes()
    flipped = whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:]
    for damaged in (flipped, whole[:-5], b"rubbish", b""):
        path.write_bytes(damaged)
        with pytest.raises(DataContractError, match=r"model\.safetensors"):
            load_encoder(str(path.parent))
    path.unlink()
    with pytest.raises(DataContractError, match=r"model\.safetensors"):
        load_encoder(str(path.parent))


@pytest.mark.parametrize(
    "change", [{"backbone": "resnet18"}, {"encoder_id": "demo-000000000000"}, {"preprocessing": {}}]
)
def test_facts_that_do_not_belong_to_the_weights_are_refused(
    change: dict[str, object], tmp_path: Path
) -> None:
    folder = tmp_path / save(small(), tmp_path).encoder_id
    facts = json.loads((folder / "encoder.json").read_text())
    (folder / "encoder.json").write_text(json.dumps(facts | change))
    with pytest.raises(DataContractError, match=r"encoder\.json"):
        load_encoder(str(folder))


def test_weights_of_another_torchvision_are_refused(tmp_path: Path) -> None:
    encoder = small()
    encoder.backbone.register_buffer("renamed_since", torch.zeros(1))
    info = save(encoder, tmp_path)
    with pytest.raises(DataContractError, match="renamed_since"):
        load_encoder(str(tmp_path / info.encoder_id))


def test_a_folder_without_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OperatorError, match=r"encoder\.json"):
        load_encoder(str(tmp_path))


def test_saved_tensors_are_those_of_the_encoder(tmp_path: Path) -> None:
    encoder = small()
    saved = load_file(tmp_path / save(encoder, tmp_path).encoder_id / "model.safetensors")
    state = encoder.state_dict()
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[name], state[name]) for name in state)
