"""Two processes learn what one would from the joint batch; they agree on numbers and wait."""

import os
import socket
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, multiprocessing, nn

from courier_model.projection import EMBEDDING_DIM
from courier_model.training import distributed, memory, objectives
from courier_model.training.distributed import Process
from courier_model.training.objectives import Places, build_objective
from tests.support.model_oracles import normal, random_places

ROWS = 6
PIXELS = 8
NOISE = normal(ROWS, 6, seed=6).sigmoid()  # which place of each row is masked


@dataclass(frozen=True)
class Case:
    """Describes a batch of ROWS rows, of which two processes get half each."""

    objective: str
    places: Places


class Titles(nn.Module):
    """Stands for a language model: each title has the vector of its length."""

    def __init__(self, _name: str, dimension: int) -> None:
        super().__init__()
        self.table = nn.Parameter(normal(9, dimension, seed=8))

    def forward(self, titles: list[str]) -> Tensor:
        return self.table[[len(title) for title in titles]]


def cases() -> dict[str, Case]:
    shared = random_places(ROWS, 12, seed=0)  # images in both halves, and reposts
    few = replace(shared, clicks=shared.clicks.clone())
    few.clicks[:3] = -1
    none = replace(shared, clicks=torch.full_like(shared.clicks, -1))
    # The first half shows ten images, the second half four others.
    pv, clicks = torch.full((2, ROWS, 5), -1)
    pv[0], pv[1], pv[3, :4] = *torch.arange(10).split(5), torch.arange(10, 14)
    titles = ["t" * (image % 9) for image in range(14)]
    apart = Places(torch.arange(14), pv, pv >= 0, clicks, titles)
    in_one = replace(apart, titles=[*titles[:10], *[""] * 4])
    return {
        "courier": Case("courier", shared),
        "one process without an anchor": Case("courier", few),
        "no process with an anchor": Case("courier", none),
        "only clicked negatives": Case("no-unclicked-negatives", few),
        "masked prediction": Case("masked-self-attention", shared),
        "simclr, more images in one": Case("simclr", apart),
        "clip, more pairs in one": Case("clip", apart),
        "clip, pairs in one only": Case("clip", in_one),
        "clip, no pairs": Case("clip", replace(apart, titles=[""] * 14)),
    }


def part_of(places: Places, process: Process) -> tuple[Places, Tensor]:
    """Returns this process's rows over the images that they show, and which images those are."""
    rows = slice(process.rank * ROWS // process.size, (process.rank + 1) * ROWS // process.size)
    pv, clicks = places.pv[rows], places.clicks[rows]
    shown = torch.cat([pv, clicks], dim=1).unique()
    shown = shown[shown >= 0]
    place = torch.full((len(places.keys) + 1,), -1)  # the last for -1
    place[shown] = torch.arange(len(shown))
    titles = places.titles and [places.titles[i] for i in shown.tolist()]
    part = Places(places.keys[shown], place[pv], places.clicked[rows], place[clicks], titles)
    return part, shown


def step(case: Case, process: Process) -> dict[str, Any]:
    """Returns the loss and gradients of all processes together, as the training job takes them."""
    with torch.random.fork_rng(devices=[]), patch.object(objectives, "TextTower", Titles):
        torch.manual_seed(0)
        encoder = nn.Linear(PIXELS, EMBEDDING_DIM)
        objective = build_objective(case.objective, EMBEDDING_DIM, None, "titles")
    places, shown = part_of(case.places, process)
    images = normal(objective.views, len(case.places.keys), PIXELS, seed=5)[:, shown]
    counts: dict[str, tuple[int, int]] = {}
    loss = torch.zeros(())

    def loss_of(features: Tensor) -> Tensor | None:
        nonlocal loss
        terms = objective(features.unflatten(0, (objective.views, -1)), places)
        for name, term in terms.items():
            counts[name] = tuple(int(distributed.total(n)) for n in (term.anchors, term.hits))
        parts = [term.loss / counts[name][0] for name, term in terms.items() if counts[name][0]]
        loss = torch.stack(parts).sum() if parts else torch.zeros((), requires_grad=True)
        return loss

    def go_back(loss: Tensor) -> bool:
        loss.backward()
        return True

    rows = slice(process.rank * ROWS // process.size, (process.rank + 1) * ROWS // process.size)
    with patch("torch.rand", return_value=NOISE[rows]):
        # So that gradients are cached in a process with more images and not in one with fewer.
        memory.backward(encoder, images.flatten(0, 1), 8, loss_of, go_back)
    named = dict(nn.ModuleDict({"encoder": encoder, "objective": objective}).named_parameters())
    distributed.sum_gradients(named.values())
    gradients = {name: p.grad for name, p in named.items()}
    return {"loss": distributed.total(loss), "counts": counts, "gradients": gradients}


def primitives(process: Process, folder: Path) -> dict[str, Any]:
    rank, cpu = process.rank, process.device
    mine = torch.full((2, 3), float(rank + 1), requires_grad=True)
    gathered = distributed.gather(mine)
    weights = torch.arange(6.0 * process.size).reshape(-1, 3) + 100 * rank
    (gathered * weights).sum().backward()
    # Two gathers that one gradient reaches: each has to add it up for itself.
    one, other = (torch.ones(1, requires_grad=True) for _ in range(2))
    (distributed.gather(one) + distributed.gather(other)).square().sum().backward()
    value = torch.tensor(2.0 + rank, requires_grad=True)
    untouched = nn.Parameter(torch.ones(2))
    touched, frozen = nn.Parameter(torch.ones(2, 3).T), torch.ones(1)
    touched.grad = torch.arange(6.0).reshape(3, 2) if rank else None
    distributed.sum_gradients([untouched, frozen, touched])
    if rank:
        time.sleep(0.5)
        (folder / "written").touch()
    distributed.wait_for_all()
    return {
        "process": (rank, process.size, process.leads, cpu.type),
        "gathered": gathered.detach(),
        "gradient": mine.grad,
        "twice": (one.grad, other.grad),
        "flags": distributed.gather(torch.tensor([rank == 1])),
        "first": distributed.first_place(5),
        "total": (distributed.total(value), value.detach()),
        "largest": distributed.largest(7 - rank, cpu),
        "any": [distributed.any_process(flag, cpu) for flag in (False, rank == 1, True)],
        "summed": (untouched.grad, touched.grad, frozen.grad),
        "waited": (folder / "written").exists(),
    }


def run_process(rank: int, port: int, folder: Path) -> None:
    """Runs one process of two, joined by torchrun's variables, and saves what it found."""
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": "",
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
    }  # fmt: skip
    torch.set_num_threads(1)
    with distributed.joined() as process:
        found = {name: step(case, process) for name, case in cases().items()}
        found["primitives"] = primitives(process, folder)
    found["left"] = not torch.distributed.is_initialized()
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Returns what each of two processes found."""
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(run_process, (port, folder), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


# ---- The joint batch -------------------------------------------------------------------------


@pytest.mark.parametrize("name", cases())
def test_two_processes_have_the_loss_and_the_gradients_of_one(
    name: str, found: list[dict[str, Any]]
) -> None:
    alone = step(cases()[name], Process(0, 1, torch.device("cpu")))
    for process in found:
        assert process[name]["counts"] == alone["counts"]
        torch.testing.assert_close(process[name]["loss"], alone["loss"], rtol=1e-5, atol=1e-6)
        for key, wanted in alone["gradients"].items():
            wanted = torch.zeros(1) if wanted is None else wanted
            its = process[name]["gradients"][key]
            torch.testing.assert_close(
                its, wanted.expand_as(its), rtol=1e-4, atol=1e-5 * float(wanted.abs().max())
            )


def test_the_cases_are_not_trivial() -> None:
    halves = {
        name: [part_of(case.places, Process(rank, 2, torch.device("cpu"))) for rank in range(2)]
        for name, case in cases().items()
    }
    shown = {name: [set(images.tolist()) for _, images in both] for name, both in halves.items()}
    assert shown["courier"][0] & shown["courier"][1]
    assert [len(images) for images in shown["simclr, more images in one"]] == [10, 4]
    anchors = {
        name: [int(((p.pv >= 0) & p.clicked & (p.clicks[:, :1] >= 0)).sum()) for p, _ in both]
        for name, both in halves.items()
    }
    assert min(anchors["courier"]) > 1
    assert anchors["one process without an anchor"][0] == 0 < anchors["only clicked negatives"][1]
    alone = {name: step(case, Process(0, 1, torch.device("cpu"))) for name, case in cases().items()}
    for name, one in alone.items():
        learns = name not in ("no process with an anchor", "clip, no pairs")
        moved = [g is not None and bool(g.any()) for g in one["gradients"].values()]
        assert any(moved) == learns
        assert (one["loss"] > 0) == learns


# ---- What passes between processes -----------------------------------------------------------


def test_processes_know_their_places_and_leave_the_group(found: list[dict[str, Any]]) -> None:
    places = [process["primitives"]["process"] for process in found]
    assert places == [(0, 2, True, "cpu"), (1, 2, False, "cpu")]
    assert [process["primitives"]["first"] for process in found] == [0, 5]
    assert all(process["left"] for process in found)


def test_gathered_parts_are_in_order_and_gradients_come_home(found: list[dict[str, Any]]) -> None:
    both = 2 * torch.arange(12.0).reshape(4, 3) + 100  # of both processes' losses
    for rank, process in enumerate(found):
        its = process["primitives"]
        assert its["gathered"][:, 0].tolist() == [1, 1, 2, 2]
        assert its["flags"].tolist() == [False, True]
        assert torch.equal(its["gradient"], both[2 * rank : 2 * rank + 2])


def test_a_gradient_that_reaches_two_gathers_is_added_up_once_for_each(
    found: list[dict[str, Any]],
) -> None:
    for process in found:
        assert [float(g) for g in process["primitives"]["twice"]] == [8, 8]  # 2 · (1 + 1), of two


def test_processes_agree_on_sums_and_the_largest(found: list[dict[str, Any]]) -> None:
    for rank, process in enumerate(found):
        its = process["primitives"]
        assert [float(v) for v in its["total"]] == [5, 2 + rank]  # one's own value stays
        assert not its["total"][0].requires_grad
        assert its["largest"] == 7
        assert its["any"] == [False, True, True]


def test_gradients_are_summed_in_place_and_none_counts_as_zeros(
    found: list[dict[str, Any]],
) -> None:
    for process in found:
        untouched, touched, frozen = process["primitives"]["summed"]
        assert torch.equal(untouched, torch.zeros(2))
        assert torch.equal(touched, torch.arange(6.0).reshape(3, 2))
        assert frozen is None


def test_no_process_goes_on_before_all_have_come(found: list[dict[str, Any]]) -> None:
    assert all(process["primitives"]["waited"] for process in found)


def test_without_torchruns_variables_a_process_is_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with distributed.joined() as process:
        assert (process.rank, process.size, process.leads) == (0, 1, True)
        its = primitives(replace(process, device=torch.device("cpu")), tmp_path)
    assert its["gathered"].shape == (2, 3)
    assert torch.equal(its["gradient"], torch.arange(6.0).reshape(2, 3))
    assert (its["first"], its["largest"], its["any"]) == (0, 7, [False, False, True])
    assert its["summed"] == (None, None, None)
