"""A reconstruction is attention over its own row's valid clicks, and over nothing else."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from courier_model.projection import EMBEDDING_DIM
from courier_model.training.reconstruction import (
    CrossAttention,
    MaskedSelfAttention,
    mean_of_clicks,
)
from tests.support import model_oracles as oracles
from tests.support.model_oracles import normal

# Rows with no click, with one, with all, and with gaps.
VALID = torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 0, 1, 0]]).bool()
Reconstruct = Callable[[Tensor, Tensor, Tensor], Tensor]
# Two layers of sums of 256 products, of numbers about 1: 2 * 256 * 2**-24 is 3e-5.
ROUNDING = {"rtol": 1e-4, "atol": 1e-4}


def random_weights(module: Any) -> Any:
    """Gives all parameters random values, also the biases, which begin as zeros."""
    for seed, parameter in enumerate(module.parameters()):
        parameter.data = normal(*parameter.shape, seed=seed) / 8
    return module


@pytest.fixture(scope="module", params=["attention", "mean"])
def reconstruct(request: pytest.FixtureRequest) -> Reconstruct:
    return (
        random_weights(CrossAttention(EMBEDDING_DIM))
        if request.param == "attention"
        else mean_of_clicks
    )


@pytest.fixture
def items() -> Tensor:
    return normal(4, 2, EMBEDDING_DIM, seed=0)


@pytest.fixture
def clicks() -> Tensor:
    return normal(4, 4, EMBEDDING_DIM, seed=1)


def test_a_reconstruction_is_the_formula(
    reconstruct: Reconstruct, items: Tensor, clicks: Tensor
) -> None:
    found = reconstruct(items, clicks, VALID)
    assert found.shape == items.shape
    one = reconstruct
    attend: oracles.Attend = oracles.mean
    if isinstance(one, CrossAttention):
        attend = oracles.CrossAttention(one.attention)
    for row in range(1, 4):
        past = clicks[row][VALID[row]].tolist()
        for place in range(2):
            wanted = torch.tensor(attend(items[row, place].tolist(), past))
            torch.testing.assert_close(found[row, place], wanted, **ROUNDING)


def test_attention_has_the_four_heads_and_the_biases_of_the_paper() -> None:
    attention = CrossAttention(EMBEDDING_DIM).attention
    assert attention.num_heads == 4
    assert {name: tuple(p.shape) for name, p in attention.named_parameters()} == {
        "in_proj_weight": (768, 256),
        "in_proj_bias": (768,),
        "out_proj.weight": (256, 256),
        "out_proj.bias": (256,),
    }


def test_a_row_is_reconstructed_from_its_own_valid_clicks_alone(
    reconstruct: Reconstruct, items: Tensor, clicks: Tensor
) -> None:
    clicks.requires_grad_()
    reconstruct(items, clicks, VALID)[3].square().sum().backward()
    moved = clicks.grad.any(-1)
    assert moved[3].tolist() == VALID[3].tolist()
    assert not moved[:3].any()
    other = torch.where(VALID[:, :, None], clicks.detach(), 1e3)
    before, after = (reconstruct(items, c, VALID)[1:] for c in (clicks, other))
    assert torch.equal(before, after)


def test_the_order_of_the_clicks_does_not_count(
    reconstruct: Reconstruct, items: Tensor, clicks: Tensor
) -> None:
    found = reconstruct(items, clicks.flip(1), VALID.flip(1))
    torch.testing.assert_close(found[1:], reconstruct(items, clicks, VALID)[1:], **ROUNDING)


def test_attention_depends_on_the_item_and_the_mean_does_not(items: Tensor, clicks: Tensor) -> None:
    one, other = random_weights(CrossAttention(EMBEDDING_DIM))(items, clicks, VALID)[2]
    assert not torch.allclose(one, other, atol=1e-2)
    one, other = mean_of_clicks(items, clicks, VALID)[2]
    assert torch.equal(one, other)


def test_rows_without_a_click_are_finite_forwards_and_backwards(
    reconstruct: Reconstruct, items: Tensor, clicks: Tensor
) -> None:
    clicks.requires_grad_()
    items.requires_grad_()
    found = reconstruct(items, clicks, VALID)
    assert found.isfinite().all()
    found[1:].square().sum().backward()  # the first row takes part, with gradients of zero
    assert clicks.grad.isfinite().all()
    assert not clicks.grad[0].any()
    if isinstance(reconstruct, nn.Module):
        assert items.grad.isfinite().all()
        assert all(p.grad.isfinite().all() for p in reconstruct.parameters())


def test_evaluation_reconstructs_as_training_does(items: Tensor, clicks: Tensor) -> None:
    attention = random_weights(CrossAttention(EMBEDDING_DIM))
    wanted = attention(items, clicks, VALID)
    with torch.no_grad():  # torch takes other kernels then
        found = attention.eval()(items, clicks, VALID)
    torch.testing.assert_close(found, wanted, **ROUNDING)


# ---- Masked prediction -----------------------------------------------------------------------

MASKED = torch.tensor([0, 0, 3, 2])


def test_a_masked_place_is_predicted_from_the_rest_as_the_formula_says(clicks: Tensor) -> None:
    module = random_weights(MaskedSelfAttention(EMBEDDING_DIM, 4))
    found = module(clicks, VALID, MASKED)
    attend = oracles.Attention(module.attention)
    for row in range(1, 4):
        tokens = clicks[row].clone()
        tokens[MASKED[row]] = module.mask.data
        tokens += module.positions.data
        wanted = attend(tokens[MASKED[row]].tolist(), tokens[VALID[row]].tolist())
        torch.testing.assert_close(found[row], torch.tensor(wanted), **ROUNDING)


def test_a_prediction_does_not_know_its_target_nor_what_is_not_there(clicks: Tensor) -> None:
    module = random_weights(MaskedSelfAttention(EMBEDDING_DIM, 4))
    clicks.requires_grad_()
    found = module(clicks, VALID, MASKED)
    assert found.isfinite().all()
    found.square().sum().backward()
    known = VALID.clone()
    known[torch.arange(4), MASKED] = False
    assert clicks.grad[1:].any(-1).tolist() == known[1:].tolist()
    assert clicks.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in module.parameters())


def test_evaluation_predicts_as_training_does(clicks: Tensor) -> None:
    module = random_weights(MaskedSelfAttention(EMBEDDING_DIM, 4))
    wanted = module(clicks, VALID, MASKED)
    with torch.no_grad():  # torch takes other kernels then
        found = module.eval()(clicks, VALID, MASKED)
    assert found.isfinite().all()  # also for the row without anything
    torch.testing.assert_close(found, wanted, **ROUNDING)


def test_a_prediction_knows_the_places(clicks: Tensor) -> None:
    module = random_weights(MaskedSelfAttention(EMBEDDING_DIM, 4))
    whole = torch.ones(4, 4).bool()
    one = module(clicks, whole, torch.zeros(4).long())
    other = module(clicks[:, [0, 3, 2, 1]], whole, torch.zeros(4).long())
    assert not torch.allclose(one, other, atol=1e-2)
