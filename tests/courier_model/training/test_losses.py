"""Each loss is its formula; what is masked takes no part, neither forwards nor backwards."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from courier_model.training.losses import (
    Candidates,
    Term,
    clip_loss,
    contrastive_loss,
    masked_prediction_loss,
    nt_xent_loss,
    pv_loss,
    simsiam_loss,
    ucs_loss,
)
from tests.support import model_oracles as oracles
from tests.support.model_oracles import normal

DIM = 4
TAU = 0.3


def whole_numbers(*shape: int, below: int, seed: int) -> Tensor:
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed))


def candidates(n: int, seed: int, contents: int = 5) -> Candidates:
    """Draws candidates of which some are not valid and some have the same content as others."""
    valid = whole_numbers(n, below=4, seed=seed) > 0
    return Candidates(
        normal(n, DIM, seed=seed), valid, whole_numbers(n, below=contents, seed=seed + 1)
    )


def distinct(vectors: Tensor) -> Candidates:
    """Returns candidates that are all valid, each of a content of its own."""
    return Candidates(vectors, torch.ones(len(vectors)).bool(), torch.arange(len(vectors)))


def valid_only(found: Candidates) -> tuple[list[oracles.Candidate], list[int]]:
    """Returns the valid candidates as the oracle has them, and where each place is among them."""
    listed = zip(found.vectors.tolist(), found.keys.tolist(), strict=True)
    kept = [pair for pair, valid in zip(listed, found.valid.tolist(), strict=True) if valid]
    return kept, (found.valid.cumsum(0) - 1).tolist()


def assert_is(term: Term, found: oracles.Found) -> None:
    assert term.loss.item() == pytest.approx(found.loss, rel=1e-4, abs=1e-5)
    assert int(term.anchors) == found.anchors
    assert int(term.hits) in found.hits


def assert_slope(
    of: Callable[[Tensor], Tensor], oracle: Callable[[list], float], x: Tensor
) -> None:
    """Along a random direction autograd's slope is that of the oracle, by finite differences."""
    x = x.clone().requires_grad_()
    of(x).backward()
    assert x.grad is not None
    way = normal(*x.shape, seed=99)
    step = 1e-4
    ahead, behind = (x.detach().double() + sign * step * way for sign in (1, -1))
    slope = (oracle(ahead.tolist()) - oracle(behind.tolist())) / (2 * step)
    assert (x.grad * way).sum().item() == pytest.approx(slope, rel=1e-3, abs=1e-4)


# ---- Against the formulas --------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("loss", [pv_loss, ucs_loss, masked_prediction_loss])
def test_a_clicked_image_is_told_from_the_others_as_the_formula_says(
    loss: Callable[..., Term], seed: int
) -> None:
    images = candidates(12, seed)
    first, n = 3, 6  # this process's places are 3..8
    images = Candidates(images.vectors, images.valid, images.keys, first)
    is_anchor = images.valid[first : first + n] & (whole_numbers(n, below=2, seed=seed + 7) > 0)
    made = normal(n, DIM, seed=seed + 3)
    listed, at = valid_only(images)
    mine = torch.nonzero(is_anchor)[:, 0].tolist()

    def oracle(made: list, listed: list) -> oracles.Found:
        return oracles.contrast([(made[j], at[first + j]) for j in mine], listed, TAU)

    assert_is(loss(made, is_anchor, images, TAU), oracle(made.tolist(), listed))
    assert_slope(
        lambda x: loss(x, is_anchor, images, TAU).loss, lambda x: oracle(x, listed).loss, made
    )

    def with_vectors(vectors: Tensor) -> Candidates:
        return Candidates(vectors, images.valid, images.keys, first)

    def oracle_of_vectors(vectors: list) -> float:
        kept = [v for v, valid in zip(vectors, images.valid.tolist(), strict=True) if valid]
        pairs = [(v, content) for v, (_, content) in zip(kept, listed, strict=True)]
        return oracle(made.tolist(), pairs).loss

    assert_slope(
        lambda x: loss(made, is_anchor, with_vectors(x), TAU).loss,
        oracle_of_vectors,
        images.vectors,
    )


def test_the_random_worlds_are_not_trivial() -> None:
    found = [candidates(12, seed) for seed in range(8)]
    assert sum(int((~c.valid).sum()) for c in found) > 10
    assert all(len(c.keys[c.valid].unique()) < int(c.valid.sum()) for c in found)


@pytest.mark.parametrize("seed", range(4))
def test_nt_xent_is_its_formula(seed: int) -> None:
    views = normal(2, 5, DIM, seed=seed)
    keys = torch.tensor([0, 1, 2, 1, 3])  # 1 and 3 are the same image
    is_image = torch.ones(5).bool()
    both = Candidates(views.flatten(0, 1), is_image.repeat(2), keys.repeat(2))

    def oracle(views: list) -> oracles.Found:
        return oracles.nt_xent(*views, keys.tolist(), TAU)

    def term(views: Tensor) -> Term:
        both = Candidates(views.flatten(0, 1), is_image.repeat(2), keys.repeat(2))
        return nt_xent_loss(views, is_image, both, TAU)

    assert_is(nt_xent_loss(views, is_image, both, TAU), oracle(views.tolist()))
    assert_slope(lambda x: term(x).loss, lambda x: oracle(x).loss, views)


def test_padding_of_views_changes_nothing() -> None:
    views = normal(2, 5, DIM, seed=0)
    padded = torch.nn.functional.pad(views, (0, 0, 0, 3))
    is_image = torch.arange(8) < 5
    both = Candidates(padded.flatten(0, 1), is_image.repeat(2), torch.arange(8).repeat(2))
    found = oracles.nt_xent(*views.tolist(), list(range(5)), TAU)
    assert_is(nt_xent_loss(padded, is_image, both, TAU), found)


@pytest.mark.parametrize("seed", range(4))
def test_clip_is_its_formula(seed: int) -> None:
    images, titles = normal(2, 6, DIM, seed=seed)
    keys = torch.tensor([4, 1, 2, 1, 3, 0])
    valid = torch.tensor([True] * 5 + [False])

    def term(both: Tensor) -> Term:
        sides = (Candidates(side, valid, keys) for side in both)
        return clip_loss(*sides, torch.arange(5), TAU)

    def oracle(both: list) -> oracles.Found:
        return oracles.clip(both[0][:5], both[1][:5], keys[:5].tolist(), TAU)

    both = torch.stack([images, titles])
    assert_is(term(both), oracle(both.tolist()))
    assert_slope(lambda x: term(x).loss, lambda x: oracle(x).loss, both)


@pytest.mark.parametrize("seed", range(4))
def test_simsiam_is_its_formula_and_the_projections_stand_still(seed: int) -> None:
    predicted, projected = normal(2, 2, 5, DIM, seed=seed)
    assert_is(
        simsiam_loss(predicted, projected), oracles.simsiam(predicted.tolist(), projected.tolist())
    )
    assert_slope(
        lambda x: simsiam_loss(x, projected).loss,
        lambda x: oracles.simsiam(x, projected.tolist()).loss,
        predicted,
    )
    projected.requires_grad_()
    simsiam_loss(predicted.requires_grad_(), projected).loss.backward()
    assert projected.grad is None


# ---- Answers that are known ------------------------------------------------------------------


def test_candidates_in_one_direction_cost_the_log_of_their_number_and_none_is_nearest() -> None:
    same = distinct(torch.ones(7, DIM))
    term = contrastive_loss(same.vectors[:3], torch.arange(3), same, TAU)
    assert term.loss.item() == pytest.approx(3 * math.log(7), rel=1e-5)
    assert int(term.hits) == 0


def test_own_candidates_apart_from_all_others_cost_nothing() -> None:
    apart = distinct(torch.eye(DIM))
    term = contrastive_loss(5 * torch.eye(DIM), torch.arange(DIM), apart, temperature=0.05)
    assert term.loss.item() == pytest.approx(4 * math.log1p(3 * math.exp(-20)), abs=1e-6)
    assert int(term.hits) == DIM


def test_opposite_candidates_cost_two_over_the_temperature() -> None:
    two = distinct(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    term = contrastive_loss(-two.vectors, torch.arange(2), two, temperature=0.05)
    assert term.loss.item() == pytest.approx(2 * (2 / 0.05), rel=1e-5)
    assert int(term.hits) == 0


def test_lengths_of_vectors_do_not_count() -> None:
    images, made = candidates(9, seed=0), normal(3, DIM, seed=1)
    places = torch.nonzero(images.valid)[:3, 0]
    longer = Candidates(100 * images.vectors, images.valid, images.keys)
    one = contrastive_loss(made, places, images, TAU)
    other = contrastive_loss(made / 100, places, longer, TAU)
    # A cosine of 4 numbers takes some 8 roundings; of each loss two of them are divided by TAU.
    rounding = 8 * torch.finfo(torch.float32).eps
    assert other.loss.item() == pytest.approx(one.loss.item(), abs=3 * 2 * rounding / TAU)
    assert (int(other.anchors), int(other.hits)) == (int(one.anchors), int(one.hits))


def test_hits_are_the_anchors_whose_own_candidate_is_nearest() -> None:
    apart = distinct(torch.eye(DIM))
    made = apart.vectors[[0, 2, 1, 3]] + apart.vectors / 2
    term = contrastive_loss(made, torch.arange(DIM), apart, TAU)
    assert (int(term.anchors), int(term.hits)) == (4, 2)
    # The same images, where those that were nearer are no candidates.
    alike = Candidates(apart.vectors, apart.valid, torch.tensor([0, 1, 1, 3]))
    assert int(contrastive_loss(made, torch.arange(DIM), alike, TAU).hits) == 4


def test_an_anchor_without_negatives_costs_nothing() -> None:
    same = Candidates(normal(3, DIM, seed=0), torch.ones(3).bool(), torch.zeros(3).long())
    term = contrastive_loss(normal(3, DIM, seed=1), torch.arange(3), same, TAU)
    assert (term.loss.item(), int(term.hits)) == (0, 3)


# ---- What takes no part ----------------------------------------------------------------------


def test_what_is_masked_changes_nothing_and_learns_nothing() -> None:
    vectors = normal(8, DIM, seed=0).requires_grad_()
    keys = torch.tensor([0, 1, 2, 3, 0, 5, 6, 7])
    valid = torch.tensor([1, 1, 1, 0, 1, 1, 0, 1]).bool()
    made, is_anchor = normal(8, DIM, seed=1), torch.tensor([1, 0, 0, 0, 0, 0, 0, 0]).bool()
    made.requires_grad_()
    term = pv_loss(made, is_anchor, Candidates(vectors, valid, keys), TAU)
    term.loss.backward()
    silent = [3, 6, 4]  # two that are not valid, and a repost of the anchor's image
    assert not vectors.grad[silent].any()
    assert vectors.grad[[0, 1, 2, 5, 7]].any(1).all()
    assert not made.grad[1:].any()
    changed, others = vectors.detach().clone(), made.detach().clone()
    changed[silent], others[1:] = 1e3, -7.0
    again = pv_loss(others, is_anchor, Candidates(changed, valid, keys), TAU)
    assert torch.equal(term.loss, again.loss)


@pytest.mark.parametrize("n", [0, 5])
def test_without_anchors_the_loss_is_zero_and_so_are_the_gradients(n: int) -> None:
    vectors = normal(n, DIM, seed=0).requires_grad_()
    images = Candidates(vectors, torch.zeros(n).bool(), torch.arange(n))
    none = torch.zeros(0, dtype=torch.int64)
    terms = [
        pv_loss(vectors, images.valid, images, TAU),
        clip_loss(images, images, none, TAU),
        simsiam_loss(vectors[None, :0].expand(2, -1, -1), vectors[None, :0].expand(2, -1, -1)),
    ]
    for term in terms:
        assert (term.loss.item(), int(term.anchors), int(term.hits)) == (0, 0, 0)
    sum(term.loss for term in terms).backward()
    assert vectors.grad is not None
    assert not vectors.grad.any()


def test_anchors_in_half_precision_are_compared_in_float32() -> None:
    images = distinct(normal(6, DIM, seed=0))
    term = contrastive_loss(images.vectors[:2].bfloat16(), torch.arange(2), images, TAU)
    assert term.loss.dtype == torch.float32
