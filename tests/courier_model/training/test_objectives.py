"""Each objective is its formula of the rows; images that no row shows take no part."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from courier_model.projection import EMBEDDING_DIM
from courier_model.training.losses import Term
from courier_model.training.objectives import Objective, Places, build_objective
from courier_model.training.settings import TEMPERATURES
from tests.support import model_oracles as oracles
from tests.support.model_oracles import listed, normal, random_places

ROWS, IMAGES = 7, 12
TAU = 0.05  # what objectives are built with
COURIER = [
    "courier", "courier-projection", "no-ucs", "no-reconstruction", "no-unclicked-negatives",
]  # fmt: skip
OF_ROWS = [*COURIER, "masked-self-attention", "clip"]  # the others see images without rows
TITLES = [
    "red lamp",
    "lamp",
    "",
    "shoe",
    "red shoe",
    "",
    "long red lamp",
    "long",
    *["lamp red"] * 4,
]


@pytest.fixture
def build(bert: Path) -> Callable[[str], Objective]:
    """Builds objectives by name, with biases that are not zero, and without dropout."""

    def build(name: str) -> Objective:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            objective = build_objective(
                name, EMBEDDING_DIM, None, str(bert) if name == "clip" else None
            )
        for seed, (key, parameter) in enumerate(objective.named_parameters()):
            if "attention" in key and not key.startswith("text."):
                parameter.data = normal(*parameter.shape, seed=seed) / 8
        if name == "clip":
            objective.text.eval()
        return objective

    return build


def a_world(seed: int) -> Places:
    return replace(random_places(ROWS, IMAGES, seed), titles=TITLES)


def features_of(objective: Objective, seed: int = 0) -> Tensor:
    return normal(objective.views, IMAGES, EMBEDDING_DIM, seed=seed)


def total(terms: dict[str, Term]) -> Tensor:
    """Adds terms up as the training job does."""
    return torch.stack([term.loss / term.anchors.clamp(min=1) for term in terms.values()]).sum()


def formulas(
    name: str, objective: Objective, features: Tensor, rows: Places
) -> dict[str, oracles.Found]:
    """Returns by name what the terms of COURIER, or of an ablation, are by their formulas."""
    attend = (
        oracles.mean
        if objective.attention is None
        else oracles.CrossAttention(objective.attention.attention)
    )
    images = objective.projection(features[0]).tolist()
    world = images, rows.keys.tolist(), listed(rows), attend, TAU
    found = {"pv": oracles.pv(*world, clicked_only=name == "no-unclicked-negatives")}
    return found if name == "no-ucs" else found | {"ucs": oracles.ucs(*world)}


def assert_is(term: Term, found: oracles.Found) -> None:
    assert found.anchors > 0
    assert term.loss.item() == pytest.approx(found.loss, rel=1e-4)
    assert int(term.anchors) == found.anchors
    assert int(term.hits) in found.hits


# ---- Against the formulas --------------------------------------------------------------------


def test_the_random_worlds_are_not_trivial() -> None:
    rows = a_world(0)
    assert {int(n) for n in (rows.clicks >= 0).sum(1)} >= {0, 1, 2, 5}
    assert (rows.pv < 0).any(1).sum() > 2
    assert (rows.clicked & (rows.pv < 0)).any()
    assert (rows.clicked & (rows.pv >= 0)).sum(1).max() > 1
    assert len(rows.pv[rows.pv >= 0].unique()) < (rows.pv >= 0).sum()
    repost = torch.nonzero(rows.keys == rows.keys[-1])[:, 0]
    assert len(repost) == 2
    assert (rows.pv[:, :, None] == repost).any((0, 1)).all()
    assert not (rows.pv == 0).any()
    assert not (rows.clicks == 0).any()


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", COURIER)
def test_courier_and_its_ablations_are_their_formulas(
    name: str, seed: int, build: Callable[[str], Objective]
) -> None:
    objective, rows = build(name), a_world(seed)
    features = features_of(objective, seed)
    terms = objective(features, rows)
    found = formulas(name, objective, features, rows)
    assert list(terms) == list(found)
    for term in terms:
        assert_is(terms[term], found[term])


def test_the_ablations_differ_from_courier(build: Callable[[str], Objective]) -> None:
    features = normal(1, IMAGES, EMBEDDING_DIM, seed=0)
    losses = {name: total(build(name)(features, a_world(0))).item() for name in COURIER}
    assert len(set(losses.values())) == len(COURIER)


def test_couriers_gradient_is_the_slope_of_the_formula(build: Callable[[str], Objective]) -> None:
    objective, rows = build("courier"), a_world(0)
    features = features_of(objective).requires_grad_()
    total(objective(features, rows)).backward()
    attend = oracles.CrossAttention(objective.attention.attention)
    way, step = normal(IMAGES, EMBEDDING_DIM, seed=9).double(), 1e-4

    def loss(images: Tensor) -> float:
        world = images.tolist(), rows.keys.tolist(), listed(rows), attend, TAU
        return sum(f.loss / f.anchors for f in (oracles.pv(*world), oracles.ucs(*world)))

    at = features[0].detach().double()
    slope = (loss(at + step * way) - loss(at - step * way)) / (2 * step)
    assert (features.grad[0] * way).sum().item() == pytest.approx(slope, rel=1e-3)


@pytest.mark.parametrize("seed", range(2))
def test_masked_prediction_is_its_formula(seed: int, build: Callable[[str], Objective]) -> None:
    objective, rows = build("masked-self-attention"), a_world(seed)
    features = features_of(objective)
    noise = torch.rand(ROWS, 6, generator=torch.Generator().manual_seed(seed))
    first = torch.where(rows.clicked & (rows.pv >= 0), rows.pv, -1)
    first = [next((place for place in row if place >= 0), -1) for row in first.tolist()]
    sequence = torch.cat([torch.tensor(first)[:, None], rows.clicks], dim=1)
    masked = noise.masked_fill(sequence < 0, -1).argmax(1)
    assert len(masked.unique()) > 2
    found = oracles.masked_prediction(
        features[0].tolist(),
        rows.keys.tolist(),
        listed(rows),
        masked.tolist(),
        oracles.Attention(objective.attention.attention),
        objective.attention.mask.tolist(),
        objective.attention.positions.tolist(),
        temperature=TAU,
    )
    with patch("torch.rand", return_value=noise):
        assert_is(objective(features, rows)["masked"], found)


def test_every_valid_place_of_a_sequence_is_masked_at_times(
    build: Callable[[str], Objective],
) -> None:
    objective, rows = build("masked-self-attention"), a_world(0)
    seen: list[Tensor] = []
    objective.attention.register_forward_pre_hook(lambda _, given: seen.append(given[2]))
    torch.manual_seed(0)
    for _ in range(60):
        objective(features_of(objective), rows)
    shown = (rows.clicked & (rows.pv >= 0)).any(1)[:, None]
    valid = torch.cat([shown, rows.clicks >= 0], dim=1)
    found = torch.stack(seen, dim=1)  # [B, 60]
    for row in range(ROWS):
        assert set(found[row].tolist()) == set(torch.nonzero(valid[row])[:, 0].tolist())


def test_simclr_is_its_formula(build: Callable[[str], Objective]) -> None:
    objective, rows = build("simclr"), a_world(0)
    features = features_of(objective)
    views, keys = objective.head(features).tolist(), rows.keys.tolist()
    assert_is(objective(features, rows)["nt_xent"], oracles.nt_xent(*views, keys, 0.2))


def test_simsiam_is_its_formula_with_statistics_per_view(build: Callable[[str], Objective]) -> None:
    objective = build("simsiam")
    features = features_of(objective)
    features[1] = 3 * features[1] + 1  # statistics of both views together would be others
    projected = [objective.head(view) for view in features]
    predicted = [objective.predictor(view).tolist() for view in projected]
    found = oracles.simsiam(predicted, [view.tolist() for view in projected])
    assert_is(objective(features, a_world(0))["simsiam"], found)


def test_clip_is_its_formula_over_the_titled_pvs(build: Callable[[str], Objective]) -> None:
    objective, rows = build("clip"), a_world(0)
    rows.pv[rows.pv == 3] = -1  # an image with a title that is among the clicks only
    assert (rows.clicks == 3).any()
    features = features_of(objective)
    pairs = [place for place in range(1, IMAGES) if TITLES[place] and (rows.pv == place).any()]
    assert 3 < len(pairs) < IMAGES - 3
    titles = objective.text([TITLES[place] for place in pairs]).tolist()
    keys = rows.keys[pairs].tolist()
    assert len(set(keys)) < len(keys)
    found = oracles.clip(features[0][pairs].tolist(), titles, keys, temperature=0.1)
    assert_is(objective(features, rows)["clip"], found)


# ---- What takes no part ----------------------------------------------------------------------


@pytest.mark.parametrize("name", OF_ROWS)
def test_an_image_that_no_row_shows_changes_nothing_and_learns_nothing(
    name: str, build: Callable[[str], Objective]
) -> None:
    objective, rows = build(name), a_world(0)
    features = features_of(objective).requires_grad_()
    torch.manual_seed(0)
    loss = total(objective(features, rows))
    loss.backward()
    assert not features.grad[0, 0].any()
    if name not in ("clip", "no-unclicked-negatives"):
        assert features.grad[0, rows.pv[rows.pv >= 0]].any(1).all()
    other = features.detach().clone()
    other[0, 0] = 1e3
    torch.manual_seed(0)
    assert torch.equal(loss, total(objective(other, rows)))


@pytest.mark.parametrize("name", OF_ROWS)
def test_rows_without_anything_to_learn_from_give_no_anchor_and_no_gradient(
    name: str, build: Callable[[str], Objective]
) -> None:
    objective, rows = build(name), a_world(0)
    if name == "clip":
        rows = replace(rows, titles=[""] * IMAGES)
    rows = replace(rows, clicks=torch.full_like(rows.clicks, -1))
    features = features_of(objective).requires_grad_()
    terms = objective(features, rows)
    for term in terms.values():
        assert (term.loss.item(), int(term.anchors), int(term.hits)) == (0, 0, 0)
    torch.stack([term.loss for term in terms.values()]).sum().backward()
    assert not features.grad.any()  # so written that NaN would be found
    assert all(p.grad is None or not p.grad.any() for p in objective.parameters())


@pytest.mark.parametrize("name", ["simclr", "simsiam"])
def test_a_lone_image_gives_no_gradient(name: str, build: Callable[[str], Objective]) -> None:
    objective, rows = build(name), a_world(0)
    features = normal(2, 1, EMBEDDING_DIM, seed=0).requires_grad_()
    loss = total(objective(features, replace(rows, keys=rows.keys[:1])))
    assert loss.item() == 0
    loss.backward()
    assert not features.grad.any()


def test_a_row_that_loses_its_clicks_takes_its_anchors_with_it_and_leaves_its_negatives(
    build: Callable[[str], Objective],
) -> None:
    objective, rows = build("courier"), a_world(0)
    features = features_of(objective).requires_grad_()
    before = objective(features, rows)["pv"]
    row = int(((rows.clicks >= 0).sum(1) == 5).nonzero()[0])
    fewer = replace(rows, clicks=rows.clicks.clone())
    fewer.clicks[row] = -1
    after = objective(features, fewer)["pv"]
    lost = int((rows.clicked & (rows.pv >= 0))[row].sum())
    assert int(after.anchors) == int(before.anchors) - lost
    after.loss.backward()
    assert features.grad[0, rows.pv[row][rows.pv[row] >= 0]].any(1).all()


def test_a_row_is_reconstructed_from_its_own_clicks_alone(
    build: Callable[[str], Objective],
) -> None:
    objective = build("courier")
    pv = torch.tensor([[1, 2, -1, -1, -1], [3, -1, -1, -1, -1]])
    clicks = torch.tensor([[4, 5, -1, -1, -1], [6, -1, -1, -1, -1]])
    rows = Places(torch.arange(7), pv, torch.tensor([[True, *[False] * 4]] * 2), clicks)
    features = normal(1, 7, EMBEDDING_DIM, seed=0).requires_grad_()
    seen: list[Tensor] = []
    objective.attention.register_forward_hook(lambda *given: seen.append(given[2]))
    objective(features, rows)
    of_first, of_second = seen[0][:, 0]
    for made, own in ((of_first, [1, 4, 5]), (of_second, [3, 6])):
        (gradient,) = torch.autograd.grad(made.sum(), features, retain_graph=True)
        assert torch.nonzero(gradient[0].any(1))[:, 0].tolist() == own


@pytest.mark.parametrize("name", ["courier", "no-reconstruction", "no-unclicked-negatives"])
def test_the_order_of_rows_and_of_the_pvs_in_them_does_not_count(
    name: str, build: Callable[[str], Objective]
) -> None:
    objective, rows = build(name), a_world(0)
    features = features_of(objective)
    turned = Places(
        rows.keys, rows.pv.flip(0, 1), rows.clicked.flip(0, 1), rows.clicks.flip(0), rows.titles
    )
    one, other = objective(features, rows), objective(features, turned)
    # A cosine is wrong by the rounding of its products at most; a loss is twice that over TAU.
    rounding = 2 * EMBEDDING_DIM * torch.finfo(torch.float32).eps / 2 / TAU
    for term, found in formulas(name, objective, features, rows).items():
        slack = found.anchors * rounding
        assert other[term].loss.item() == pytest.approx(one[term].loss.item(), abs=slack)
        assert int(one[term].hits) in found.hits
        assert int(other[term].hits) in found.hits


# ---- By name ---------------------------------------------------------------------------------


def test_temperatures_are_those_of_the_paper_unless_another_is_given(
    build: Callable[[str], Objective],
) -> None:
    wanted = dict.fromkeys([*COURIER, "masked-self-attention"], 0.05) | {"simclr": 0.2, "clip": 0.1}
    found = {name: getattr(build(name), "temperature", None) for name in TEMPERATURES}
    assert found == {**wanted, "simsiam": None}
    for name in wanted.keys() - {"clip"}:
        assert build_objective(name, EMBEDDING_DIM, 0.5, None).temperature == 0.5


@pytest.mark.parametrize("name", TEMPERATURES)
def test_every_objective_gives_finite_gradients_to_all_that_it_trains(
    name: str, build: Callable[[str], Objective]
) -> None:
    objective, rows = build(name), a_world(0)
    features = features_of(objective).requires_grad_()
    terms = objective(features, rows)
    assert objective.reconstructs is None or objective.reconstructs in terms
    assert all(term.loss.dtype == torch.float32 for term in terms.values())
    total(terms).backward()
    assert features.grad.isfinite().all()
    assert features.grad.flatten(1).any(1).all()
    for key, parameter in objective.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("name", sorted(TEMPERATURES.keys() - {"clip"}))
@pytest.mark.parametrize("dimension", [64, 772])
def test_every_objective_takes_features_of_any_dimension(name: str, dimension: int) -> None:
    objective = build_objective(name, dimension, None, None)
    features = normal(objective.views, IMAGES, dimension, seed=0).requires_grad_()
    total(objective(features, a_world(0))).backward()
    assert features.grad.isfinite().all()
    assert features.grad.flatten(1).any(1).all()


def test_evaluation_finds_the_terms_of_training(build: Callable[[str], Objective]) -> None:
    objective, rows = build("courier"), a_world(0)
    features = features_of(objective)
    wanted = objective(features, rows)
    with torch.no_grad():  # torch takes other kernels then
        found = objective.eval()(features, rows)
    for name, term in wanted.items():
        torch.testing.assert_close(found[name].loss, term.loss.detach(), rtol=1e-4, atol=1e-4)
