"""Chunks and forgotten activations cost time and save memory; they change no gradient."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet18, swin_transformer
from torchvision.models.swin_transformer import SwinTransformer

from courier_model.projection import EMBEDDING_DIM
from courier_model.training import memory
from courier_model.training.memory import backward, checkpoint_attention, freeze_batch_statistics
from courier_model.training.objectives import Objective, build_objective
from feature_jobs.schemas import OperatorError
from tests.support.model_oracles import normal, random_places

IMAGES = 11
# Chunks are multiplied in other shapes than the batch: features are wrong by some 1e-6 of their
# size, and cosines over a temperature of 0.05 by twenty times that.
ROUNDING = {"rtol": 1e-4, "atol": 0.0}
Gradients = dict[str, Tensor]


def a_swin(random: bool) -> nn.Module:
    """Builds a Swin as small as they come, with dropout and stochastic depth where `random`."""
    p = 0.4 if random else 0.0
    torch.manual_seed(0)
    return SwinTransformer(
        [4, 4], 8, [2, 2], [2, 2], [2, 2], num_classes=EMBEDDING_DIM,
        dropout=p / 4, attention_dropout=p / 4, stochastic_depth_prob=p,
    )  # fmt: skip


def a_normalised_one() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * 16, EMBEDDING_DIM),
    )  # fmt: skip


class Step:
    """Does what a step of training does with a batch, an encoder and the objective "courier"."""

    def __init__(self, encoder: nn.Module, dtype: torch.dtype | None = None) -> None:
        self.encoder, self.dtype = encoder, dtype
        torch.manual_seed(1)
        self.objective: Objective = build_objective("courier", EMBEDDING_DIM, None, None)
        self.images = normal(IMAGES, 3, 16, 16, seed=2)
        self.places = random_places(6, IMAGES, seed=3)
        self.calls: list[tuple[int, bool]] = []  # how many images, with a graph?
        torch.manual_seed(4)

    def encode(self, images: Tensor) -> Tensor:
        self.calls.append((len(images), torch.is_grad_enabled()))
        with torch.autocast("cpu", self.dtype, enabled=self.dtype is not None):
            return self.encoder(images).float()

    def loss(self, features: Tensor) -> Tensor:
        torch.rand(1)  # an objective may draw random numbers too
        terms = self.objective(features[None], self.places).values()
        return torch.stack([term.loss / term.anchors for term in terms]).sum()

    def go_back(self, loss: Tensor) -> bool:
        loss.backward()
        return True

    def cached(self, chunk_images: int | None) -> Tensor:
        return backward(self.encode, self.images, chunk_images, self.loss, self.go_back)

    def plain(self, chunk_images: int) -> Tensor:
        """Keeps all of the batch's activations at once, with each chunk's own random numbers."""
        parts = [self.encode(chunk) for chunk in self.images.split(chunk_images)]
        loss = self.loss(torch.cat(parts))
        loss.backward()
        return loss

    def gradients(self) -> Gradients:
        modules = {"encoder": self.encoder, "objective": self.objective}
        named = nn.ModuleDict(modules).named_parameters()
        return {name: p.grad.clone() for name, p in named if p.grad is not None}


def a_step(encoder: nn.Module, of: Callable[[Step], Tensor]) -> tuple[Tensor, Gradients, Tensor]:
    """Returns the loss, the gradients and the state of the random numbers after a step."""
    step = Step(encoder)
    step.encoder.zero_grad()
    loss = of(step)
    return loss.detach(), step.gradients(), torch.get_rng_state()


def difference(one: Gradients, other: Gradients) -> float:
    """Returns the largest difference, relative to the largest gradient of the same parameter."""
    assert one.keys() == other.keys()
    return max(
        float((one[name] - other[name]).abs().max() / other[name].abs().max().clamp(min=1e-6))
        for name in one
    )


# ---- Cached gradients ------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_images", [1, 4, IMAGES - 1, IMAGES, None])
def test_cached_gradients_are_those_of_the_whole_batch(chunk_images: int | None) -> None:
    encoder = a_swin(random=False)
    loss, gradients, _ = a_step(encoder, lambda s: s.plain(IMAGES))
    found, its, _ = a_step(encoder, lambda s: s.cached(chunk_images))
    assert len(gradients) == len(list(encoder.parameters())) + 4
    assert all(g.any() for g in gradients.values())
    torch.testing.assert_close(found, loss, **ROUNDING)
    assert difference(its, gradients) < 1e-3


def test_the_whole_batchs_gradients_are_not_those_of_its_chunks_alone() -> None:
    """Negatives of other chunks count, so a test of cached gradients can fail."""
    encoder = a_swin(random=False)
    _, gradients, _ = a_step(encoder, lambda s: s.plain(IMAGES))

    def without_the_others(step: Step) -> Tensor:
        last = step.encode(step.images[4:])
        loss = step.loss(torch.cat([step.encode(step.images[:4]).detach(), last]))
        loss.backward()
        return loss

    _, its, _ = a_step(encoder, without_the_others)
    assert difference(its, gradients) > 0.1


@pytest.mark.parametrize("chunk_images", [1, 4])
def test_random_numbers_are_the_same_both_times(chunk_images: int) -> None:
    encoder = a_swin(random=True)
    loss, gradients, after = a_step(encoder, lambda s: s.plain(chunk_images))
    found, its, its_after = a_step(encoder, lambda s: s.cached(chunk_images))
    torch.testing.assert_close(found, loss, **ROUNDING)
    assert difference(its, gradients) < 1e-3
    assert torch.equal(after, its_after)  # what comes next goes on as after the plain batch
    _, others, _ = a_step(encoder, lambda s: s.plain(IMAGES))
    assert difference(others, gradients) > 0.1  # they matter


def test_without_the_same_random_numbers_gradients_would_differ(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoder = a_swin(random=True)
    _, gradients, _ = a_step(encoder, lambda s: s.plain(4))
    monkeypatch.setattr(memory, "_set_random_state", lambda like, states: None)
    _, others, _ = a_step(encoder, lambda s: s.cached(4))
    assert difference(others, gradients) > 0.1


def test_one_chunk_at_a_time_has_a_graph() -> None:
    step = Step(a_swin(random=False))
    step.cached(4)
    sizes = [4, 4, 3]
    assert step.calls == [(n, False) for n in sizes] + [(n, True) for n in sizes]
    step.calls.clear()
    step.cached(None)
    assert step.calls == [(IMAGES, True)]


@pytest.mark.parametrize("chunk_images", [4, None])
def test_gradients_are_added_to_those_that_are_there(chunk_images: int | None) -> None:
    step = Step(a_swin(random=False))
    step.cached(chunk_images)
    once = step.gradients()
    step.cached(chunk_images)
    assert difference(step.gradients(), {name: 2 * g for name, g in once.items()}) < 1e-3


@pytest.mark.parametrize("chunk_images", [4, None])
def test_a_batch_that_is_left_out_leaves_no_gradient(chunk_images: int | None) -> None:
    step = Step(a_swin(random=False))
    found = backward(
        step.encode, step.images, chunk_images, lambda features: "skipped", lambda loss: False
    )
    assert found == "skipped"
    assert not step.gradients()


def test_16_bit_gradients_reach_the_weights() -> None:
    """autocast may keep weights that it has cast without a graph, which then get no gradients."""
    encoder = a_swin(random=True)
    plain, cached = (Step(encoder, torch.bfloat16) for _ in range(2))
    torch.manual_seed(4)
    plain.plain(4)
    wanted = plain.gradients()
    encoder.zero_grad()
    torch.manual_seed(4)
    cached.cached(4)
    found = cached.gradients()
    assert all(g.any() for g in found.values())
    assert difference(found, wanted) < 0.02
    exact = a_step(encoder, lambda s: s.plain(4))[1]
    assert 1e-4 < difference(found, exact) < 0.5  # it did compute in 16 bits


# ---- Batch normalisation ---------------------------------------------------------------------


def test_with_frozen_statistics_chunks_give_the_whole_batchs_gradients() -> None:
    encoder = a_normalised_one()
    encoder[1].running_mean += 0.3
    before = {name: value.clone() for name, value in encoder.named_buffers()}
    freeze_batch_statistics(encoder.train())
    _, gradients, _ = a_step(encoder, lambda s: s.plain(IMAGES))
    _, its, _ = a_step(encoder, lambda s: s.cached(4))
    assert difference(its, gradients) < 1e-3
    assert its["encoder.1.weight"].any()  # scale and shift go on learning
    assert all(torch.equal(before[name], value) for name, value in encoder.named_buffers())


def test_with_live_statistics_chunks_do_not_give_the_whole_batchs_gradients() -> None:
    encoder = a_normalised_one()
    _, gradients, _ = a_step(encoder, lambda s: s.plain(IMAGES))
    _, its, _ = a_step(encoder, lambda s: s.cached(4))
    assert difference(its, gradients) > 0.1


def test_freezing_statistics_leaves_dropout_active() -> None:
    module = nn.Sequential(nn.BatchNorm1d(3), nn.Sequential(nn.BatchNorm2d(3), nn.Dropout()))
    freeze_batch_statistics(module.train())
    assert [m.training for m in module.modules()] == [True, False, True, False, True]


# ---- Checkpointed attention ------------------------------------------------------------------


@pytest.mark.parametrize("chunk_images", [None, 4])
def test_attention_that_is_computed_again_gives_the_same_features_and_gradients(
    chunk_images: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, forgetful = a_swin(random=True), a_swin(random=True)
    checkpoint_attention(forgetful)
    found = []
    attend, calls = swin_transformer.shifted_window_attention, []

    def counted(*args: Any, **options: Any) -> Tensor:
        calls.append(None)
        return attend(*args, **options)

    monkeypatch.setattr(swin_transformer, "shifted_window_attention", counted)
    for encoder in (plain, forgetful):
        calls.clear()
        torch.manual_seed(7)
        features = encoder(normal(3, 3, 16, 16, seed=0))
        found.append((features, a_step(encoder, lambda s: s.cached(chunk_images)), len(calls)))
    (features, (loss, gradients, after), count), (its, (its_loss, other, its_after), more) = found
    assert torch.equal(features, its)
    assert torch.equal(loss, its_loss)
    assert difference(other, gradients) < 1e-5
    assert torch.equal(after, its_after)
    blocks, chunks = 4, 1 if chunk_images is None else 3
    assert more - count == blocks * chunks  # it did compute them again


def test_checkpointing_renames_no_weight() -> None:
    forgetful = a_swin(random=False)
    names = list(forgetful.state_dict())
    checkpoint_attention(forgetful)
    assert list(forgetful.state_dict()) == names
    a_swin(random=False).load_state_dict(forgetful.state_dict())


def test_a_backbone_without_attention_is_refused() -> None:
    with pytest.raises(OperatorError, match="take swin_t"):
        checkpoint_attention(resnet18())
