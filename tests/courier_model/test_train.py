"""A run of training: resumed as if never stopped, stopped before it spoils anything, refused early.

Sixteen items of which four have no image to show, and rows of them drawn at random: nothing is to
be learned but the law of the loop.
"""

import math
import os
import shutil
import socket
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor, multiprocessing, nn

from courier_model import distributed
from courier_model import train as training_job
from courier_model.distributed import Process
from courier_model.encoder import ImageEncoder, build_encoder
from courier_model.evaluate import Evaluation
from courier_model.image_cache import ImageCache
from courier_model.images import decode
from courier_model.measures import HeldOut
from courier_model.objectives import Courier, Places, build_objective
from courier_model.rows import TrainingSet
from courier_model.train import Record, Stopped, Training, TrainingData
from courier_model.train_progress import Progress
from courier_model.train_settings import TEMPERATURES, TrainSettings
from feature_jobs.schemas import CourierError, DataContractError, OperatorError
from tests.support import model_oracles
from tests.support.world import picture

pytestmark = pytest.mark.usefixtures("one_thread")

ALONE = Process(0, 1, torch.device("cpu"))
ITEMS = 16
REPOST = 11  # has the bytes of item 2
MISSING, BROKEN, NO_URI, UNDRAWN = BAD = (12, 13, 14, 15)
GOOD = tuple(range(12))
TINY = TrainSettings(
    backbone="small", weights="random", input_size=32, epochs=2, batch_rows=8,
    chunk_images=0, learning_rate=1e-3, precision="fp32", checkpoint_attention=False,
    evaluate_every=2, workers=0,
)  # fmt: skip
STEPS = 6  # of TINY on the rows below


def small_encoder(backbone: str, weights: str, input_size: int | None, seed: int) -> ImageEncoder:
    """Torchvision's have hundreds of tensors: at this size, saving them is all that takes time.

    As in those, the last layers see one value an image.
    """
    if "small" not in backbone.split():
        return build_encoder(backbone, weights, input_size, seed)
    encoder = build_encoder("shufflenet_v2_x0_5", weights, input_size, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder.backbone = nn.Sequential(
            nn.Conv2d(3, 16, 4, 4), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 64, 8), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten(),
            nn.Dropout(0.2 if "random" in backbone else 0.0), nn.Linear(64, 256),
        )  # fmt: skip
    return encoder.eval()


@pytest.fixture(scope="module", autouse=True)
def _small_encoders() -> Iterator[None]:
    with patch.object(training_job, "build_encoder", small_encoder):
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("images")
    for number in GOOD:
        (folder / f"{number}.png").write_bytes(picture(2 if number == REPOST else number))
    (folder / f"{BROKEN}.png").write_bytes(b"<html>not found</html>")
    return str(folder)


def some_rows(count: int, seed: int, items: tuple[int, ...] = (*GOOD, *BAD)) -> TrainingSet:
    """Rows of one to five PVs, the first of them clicked, and one to five clicks."""
    rng = np.random.default_rng(seed)
    pv, clicks = np.full((2, count, 5), -1)
    for row in range(count):
        shown = rng.permutation(items)[: rng.integers(2, 6)]
        past = rng.permutation(items)[: rng.integers(1, 6)]
        pv[row, : len(shown)], clicks[row, : len(past)] = shown, past
    clicked = (rng.random((count, 5)) < 0.3) & (pv >= 0)
    clicked[:, 0] = True
    uris = [None if n == NO_URI else f"{n}.png" for n in range(ITEMS)]
    titles = [None if n == 3 else ["red dress", "wool shoe", "lamp"][n % 3] for n in range(ITEMS)]
    table = pa.table(
        {"item_id": list(range(ITEMS)), "image_uri": uris, "title": pa.array(titles, pa.string())}
    )
    return TrainingSet(pv, clicked, clicks, rng.integers(0, 4, count), table)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model as small as can be."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "dress", "wool", "shoe", "lamp"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=64,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def data(root: str) -> TrainingData:
    """26 rows to train on: three batches of eight an epoch, and a rest."""
    return TrainingData(some_rows(26, seed=0), some_rows(12, seed=1), (root,), "these")


class Run:
    """A run in a folder, what it told, and the steps it reported."""

    def __init__(
        self, folder: Path, data: TrainingData, settings: TrainSettings = TINY,
        process: Process = ALONE,
    ) -> None:  # fmt: skip
        self.told: list[str] = []
        self.seen: list[Progress] = []
        self.training = Training(settings, data, str(folder), process, self.told.append)

    def go(
        self, stop_at: int | None = None, watch: Callable[[Progress], None] | None = None
    ) -> Record:
        def report(at: Progress) -> None:
            self.seen.append(at)
            if watch:
                watch(at)

        return self.training.run(report, lambda: bool(self.seen) and self.seen[-1].step == stop_at)

    def weights(self) -> dict[str, Tensor]:
        return copied(self.training.encoder.state_dict())

    def state(self) -> dict[str, Any]:
        """All that a run is about, but for how long it took."""
        run = self.training
        return {
            "encoder": self.weights(),
            "objective": copied(run.objective.state_dict()),
            "optimizer": run.optimizer.state_dict(),
            "scaler": run.scaler.state_dict(),
            "record": {k: v for k, v in vars(run.record).items() if k != "seconds"},
        }


def copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


def same(one: Any, other: Any) -> bool:
    """Bit for bit, however deep."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


class Killed(Exception):
    """Stands for a process that ends here."""


def die_at(step: int) -> Callable[[Progress], None]:
    def watch(at: Progress) -> None:
        if at.step == step:
            raise Killed

    return watch


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("step-*.pt"))


# ---- Stopped, killed, damaged ----------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        TINY,
        # Dropout, a random mask, and every image's activations made twice.
        replace(TINY, backbone="small random", objective="masked-self-attention", chunk_images=5),
        replace(TINY, objective="simsiam", precision="bf16"),
        replace(TINY, precision="fp16"),
    ],
    ids=["plain", "random numbers, cached gradients", "bf16, statistics in the objective", "fp16"],
)
def test_a_stopped_run_goes_on_as_if_it_had_never_stopped(
    settings: TrainSettings, data: TrainingData, tmp_path: Path
) -> None:
    whole = Run(tmp_path / "whole", data, settings)
    whole.go()
    assert [at.step for at in whole.seen] == list(range(1, STEPS + 1))
    for stop in (3, 4):  # between evaluations, and at one
        part = Run(tmp_path / "parts", data, settings)
        with pytest.raises(Stopped):
            part.go(stop_at=stop)
        assert part.seen[-1].step == stop
    last = Run(tmp_path / "parts", data, settings)
    last.go()
    assert [at.step for at in last.seen] == [5, 6]
    assert last.told[0].startswith("going on from step 4 of 6")
    assert same(last.state(), whole.state())
    assert [m["step"] for m in whole.training.record.measures] == [None, 0, 2, 4, 6]
    assert whole.training.record.counts["bad_images"] > 0
    assert whole.training.record.seconds > 0
    assert (settings.precision == "fp16") == bool(whole.training.scaler.state_dict())


def test_random_numbers_matter_to_that_run(data: TrainingData, tmp_path: Path) -> None:
    """So the test above can fail: without a seed of their own, steps would differ."""
    settings = replace(TINY, backbone="small random", epochs=1)
    weights = []
    for seed in (1, 2):
        run = Run(tmp_path / str(seed), data, settings)
        with patch.object(training_job, "_seed", return_value=seed):
            run.go()
        weights.append(run.weights())
    assert not same(*weights)


@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_killed_run_goes_on_from_its_last_checkpoint(
    step: int, data: TrainingData, tmp_path: Path
) -> None:
    whole, part, last = (Run(tmp_path / name, data) for name in ("whole", "part", "part"))
    whole.go()
    with pytest.raises(Killed):
        part.go(watch=die_at(step))
    last.go()
    assert last.seen[0].step == step // 2 * 2 + 1
    assert same(last.state(), whole.state())


def test_a_run_that_has_ended_does_nothing_more(data: TrainingData, tmp_path: Path) -> None:
    first, again = (Run(tmp_path, data) for _ in range(2))
    first.go()
    assert same(again.go().best_weights, first.training.record.best_weights)
    assert again.seen == []
    assert same(again.state(), first.state())


def test_a_stop_at_the_last_step_is_no_interruption(data: TrainingData, tmp_path: Path) -> None:
    assert Run(tmp_path, data).go(stop_at=STEPS).step == STEPS


def test_a_damaged_checkpoint_costs_only_its_steps(data: TrainingData, tmp_path: Path) -> None:
    whole, part, last = (Run(tmp_path / name, data) for name in ("whole", "part", "part"))
    whole.go()
    with pytest.raises(Stopped):
        part.go(stop_at=5)
    older, newest = checkpoints(tmp_path / "part")
    assert [name[:13] for name in (older, newest)] == ["step-00000004", "step-00000005"]
    path = tmp_path / "part" / "checkpoints" / newest
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    last.go()
    assert newest in last.told[0]
    assert f"Going back to the checkpoint before it, {older}." in last.told[0]
    assert [at.step for at in last.seen] == [5, 6]
    assert same(last.state(), whole.state())


def test_without_a_whole_checkpoint_nothing_is_overwritten(
    data: TrainingData, tmp_path: Path
) -> None:
    with pytest.raises(Stopped):
        Run(tmp_path, data).go(stop_at=1)
    (name,) = checkpoints(tmp_path)
    (tmp_path / "checkpoints" / name).write_bytes(b"half of it")
    with pytest.raises(DataContractError, match=r"No checkpoint in .* is whole"):
        Run(tmp_path, data).go()
    assert (tmp_path / "checkpoints" / name).read_bytes() == b"half of it"


# ---- Another run -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def begun(root: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of TINY after its first step. Read only."""
    folder = tmp_path_factory.mktemp("begun")
    data = TrainingData(some_rows(26, seed=0), some_rows(12, seed=1), (root,), "these")
    with pytest.raises(Stopped):
        Run(folder, data).go(stop_at=1)
    return folder


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"backbone": "small random"},
            "backbone 'small', now 'small random'",
        ),
        ({"objective": "no-ucs"}, "objective 'courier', now 'no-ucs'"),
        (
            {"learning_rate": 1e-4, "seed": 1},
            "learning_rate 0.001, now 0.0001; seed 0, now 1",
        ),
        ({"batch_rows": 4}, "batch_rows 8, now 4"),
        ({"chunk_images": 5}, "chunk_images 0, now 5"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(
    changes: dict[str, Any], told: str, begun: Path, data: TrainingData
) -> None:
    before = checkpoints(begun)
    with pytest.raises(OperatorError) as refused:
        Run(begun, data, replace(TINY, **changes)).go()
    assert told in str(refused.value)
    assert "another --name" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert checkpoints(begun) == before


def test_a_checkpoint_of_other_data_is_refused(begun: Path, data: TrainingData) -> None:
    with pytest.raises(OperatorError, match="other training rows or another catalogue"):
        Run(begun, replace(data, fingerprint="others")).go()


def test_a_run_may_be_made_longer(data: TrainingData, tmp_path: Path) -> None:
    settings = replace(TINY, evaluate_every=3)
    whole = Run(tmp_path / "whole", data, settings)
    whole.go()
    Run(tmp_path / "parts", data, replace(settings, epochs=1)).go()
    longer = Run(tmp_path / "parts", data, settings)
    longer.go()
    assert longer.seen[0].step == 4
    assert same(longer.state(), whole.state())


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_run_may_go_on_in_another_precision(
    precision: str, data: TrainingData, tmp_path: Path
) -> None:
    with pytest.raises(Stopped):
        Run(tmp_path, data).go(stop_at=1)
    with pytest.raises(Stopped):
        Run(tmp_path, data, replace(TINY, precision=precision)).go(stop_at=2)
    last = Run(tmp_path, data, replace(TINY, cache=False))
    assert last.go().step == STEPS
    assert all(math.isfinite(at.loss) for at in last.seen)


# ---- Numbers that are none -------------------------------------------------------------------


def refused_at(run: Run) -> tuple[str, dict[str, Tensor], dict[str, Tensor]]:
    """What it says, and the weights before and after the step that was refused."""
    before = run.weights()

    def watch(_at: Progress) -> None:
        nonlocal before
        before = run.weights()

    with pytest.raises(CourierError) as refused:
        run.go(watch=watch)
    return str(refused.value), before, run.weights()


def parameters(run: Run, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weights[name] for name, _ in run.training.encoder.named_parameters()}


def test_a_loss_that_is_not_finite_stops_before_the_optimizer(
    data: TrainingData, tmp_path: Path
) -> None:
    run = Run(tmp_path, data)
    forward, calls = run.training.objective.forward, []

    def fails_at_the_fourth(features: Tensor, rows: Places) -> Any:
        terms = forward(features, rows)
        calls.append(features.requires_grad)
        if sum(calls) == 4:
            terms["ucs"] = replace(terms["ucs"], loss=terms["ucs"].loss * math.nan)
        return terms

    run.training.objective.forward = fails_at_the_fourth  # type: ignore[method-assign]
    told, before, after = refused_at(run)
    assert "loss term 'ucs' became nan at step" in told
    assert "\n" not in told
    assert len(run.seen) == 3
    assert same(parameters(run, after), parameters(run, before))
    assert checkpoints(tmp_path)[-1].startswith("step-00000002")


def test_an_absurd_learning_rate_stops_and_names_the_remedy(
    data: TrainingData, tmp_path: Path
) -> None:
    run = Run(tmp_path, data, replace(TINY, learning_rate=1e30, evaluate_every=100))
    told, before, after = refused_at(run)
    assert "became nan at step" in told
    assert "--learning-rate" in told
    assert same(parameters(run, after), parameters(run, before))
    assert checkpoints(tmp_path) == []


def test_gradients_that_are_not_finite_stop_before_the_optimizer(
    data: TrainingData, tmp_path: Path
) -> None:
    run = Run(tmp_path, data)
    next(run.training.encoder.parameters()).register_hook(lambda gradient: gradient * math.inf)
    told, before, after = refused_at(run)
    assert "norm of the gradients became" in told
    assert run.seen == []
    assert same(parameters(run, after), parameters(run, before))
    assert run.training.optimizer.state_dict()["state"] == {}


def test_in_fp16_such_a_step_is_left_out_and_the_scale_halved(
    data: TrainingData, tmp_path: Path
) -> None:
    run = Run(tmp_path, data, replace(TINY, precision="fp16"))
    weight = next(run.training.encoder.parameters())
    hook = weight.register_hook(lambda gradient: gradient * math.inf)
    scale, before = run.training.scaler.get_scale(), run.weights()
    run.training._train_on(run.training.batches[0])
    assert run.training.scaler.get_scale() == scale / 2
    assert same(parameters(run, run.weights()), parameters(run, before))
    hook.remove()
    for step in range(1, 20):  # the first scale is too large for some of them all the same
        run.training._train_on(run.training.batches[step])
    assert not same(parameters(run, run.weights()), parameters(run, before))


# ---- Images that cannot be read --------------------------------------------------------------


def of_items(*numbers: int) -> TrainingSet:
    """Four rows that show these items alone."""
    rows = some_rows(4, seed=2)
    pv, clicks = np.full((2, 4, 5), -1)
    for row in range(4):
        shown = np.roll(numbers, row)[:5]
        pv[row, : len(shown)] = clicks[row, : len(shown)] = shown
    return replace(rows, pv=pv, clicks=clicks, clicked=pv >= 0, users=np.arange(4))


@pytest.mark.parametrize("objective", ["courier", "simsiam", "masked-self-attention"])
def test_a_batch_without_a_readable_image_is_counted_and_changes_nothing(
    objective: str, data: TrainingData, tmp_path: Path
) -> None:
    settings = replace(TINY, objective=objective, batch_rows=4, epochs=1)
    run = Run(tmp_path, replace(data, train=of_items(*BAD)), settings)
    before = run.weights()
    with pytest.raises(DataContractError, match=r"Not one of the 1 batches had anything to learn"):
        run.go()
    counts = run.training.record.counts
    assert counts == {"rows": 4, "images": 0, "bad_images": 4, "skipped_batches": 1}
    assert run.seen[0].loss == 0
    assert same(run.weights(), before)
    assert run.training.optimizer.state_dict()["state"] == {}


def test_a_batch_without_an_anchor_leaves_weights_and_adam_alone(
    data: TrainingData, tmp_path: Path
) -> None:
    """Images there are, but all clicks of the rows are unreadable."""
    rows = of_items(*GOOD[:5])
    rows = replace(rows, clicks=np.full((4, 5), MISSING))
    run = Run(tmp_path, replace(data, train=rows), replace(TINY, batch_rows=4, epochs=2))
    run.training.optimizer.step()  # nothing yet, and nothing to come
    before = parameters(run, run.weights())
    with pytest.raises(DataContractError, match=r"Not one of the 2 batches had anything to learn"):
        run.go()
    counts = run.training.record.counts
    assert counts == {"rows": 8, "images": 10, "bad_images": 2, "skipped_batches": 2}
    assert same(parameters(run, run.weights()), before)
    assert run.training.optimizer.state_dict()["state"] == {}


@pytest.mark.parametrize("objective", ["courier", "simclr", "simsiam", "masked-self-attention"])
def test_a_batch_of_one_readable_image_can_be_gone_through(
    objective: str, data: TrainingData, tmp_path: Path
) -> None:
    """Batch normalisation has no statistics of one value, which one image of 32 pixels comes to."""
    settings = replace(TINY, objective=objective, batch_rows=4, epochs=1)
    run = Run(tmp_path, replace(data, train=of_items(0, MISSING)), settings)
    run.training._train_on(run.training.batches[0])
    counts = run.training.record.counts
    assert (counts["images"], counts["bad_images"]) == (1, 1)
    assert all(torch.isfinite(tensor).all() for tensor in run.weights().values())


def test_rows_images_and_bad_images_are_counted(data: TrainingData, tmp_path: Path) -> None:
    run = Run(tmp_path, data)
    found = run.go().counts
    wanted = [run.training.batches[step] for step in range(STEPS)]
    assert found["rows"] == STEPS * 8
    assert found["images"] == sum(len(batch.keys) for batch in wanted)
    assert found["bad_images"] == sum(batch.bad_images for batch in wanted) > 0
    assert found["skipped_batches"] == 0


# ---- A step ----------------------------------------------------------------------------------


def test_cached_gradients_of_a_step_are_those_of_the_whole_batch(
    data: TrainingData, tmp_path: Path
) -> None:
    gradients, losses = [], []
    for chunk in (10_000, 5):  # with either, batch statistics are frozen
        run = Run(tmp_path / str(chunk), data, replace(TINY, chunk_images=chunk))
        batch = run.training.batches[0]
        assert len(batch.keys) > 5
        losses.append(run.training._train_on(batch).total)
        gradients.append([p.grad for p in run.training.parameters])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for one, other in zip(*gradients, strict=True):
        assert one is not None
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(one.abs().max()))


def test_a_step_goes_down_the_gradient_of_the_terms_sum(data: TrainingData, tmp_path: Path) -> None:
    run = Run(tmp_path, data, replace(TINY, weight_decay=0.0))
    before = run.weights()
    loss = run.training._train_on(run.training.batches[0])
    assert set(loss.terms) == {"pv", "ucs"}
    assert loss.part is not None
    assert loss.total == pytest.approx(sum(loss.terms.values()))
    assert loss.total == pytest.approx(float(loss.part.detach()))
    for name, parameter in run.training.encoder.named_parameters():
        assert parameter.grad is not None
        moved = (parameter.detach() - before[name]) * parameter.grad
        assert moved.max() <= 0, name  # Adam's first step is against the gradient's sign


@pytest.mark.parametrize("objective", TEMPERATURES)
def test_every_objective_trains_and_is_measured(
    objective: str, data: TrainingData, tmp_path: Path, bert: Path
) -> None:
    text_model = str(bert) if objective == "clip" else None
    settings = replace(TINY, objective=objective, text_model=text_model, batch_rows=24, epochs=1)
    run = Run(tmp_path, data, settings)
    before = run.weights()
    record = run.go()
    assert record.step == 1
    assert math.isfinite(run.seen[0].loss)
    assert run.seen[0].loss != 0
    assert not same(parameters(run, run.weights()), parameters(run, before))
    last = record.measures[-1]
    assert 0 <= last["auc"] <= 1
    assert (last["nearest"] is None) == (objective in ("simclr", "simsiam", "clip"))


# ---- The held-out measure --------------------------------------------------------------------


def test_the_encoder_of_the_best_trained_step_is_kept(data: TrainingData, tmp_path: Path) -> None:
    run = Run(tmp_path, data)
    # A histogram, then steps 0, 2, 4 and 6: the untrained one is best of all.
    script = [HeldOut(auc, None, 9, 3) for auc in (0.5, 0.99, 0.6, 0.8, 0.7)]
    at_step: dict[int, dict[str, Tensor]] = {}
    with patch.object(run.training.evaluation, "rank_clicks", side_effect=script):
        record = run.go(watch=lambda at: at_step.update({at.step: run.weights()}))
    assert record.best is not None
    assert (record.best["step"], record.best["auc"]) == (4, 0.8)
    assert same(record.best_weights, at_step[4])
    assert not same(record.best_weights, run.weights())
    assert [m["auc"] for m in record.measures] == [0.5, 0.99, 0.6, 0.8, 0.7]


def test_the_untrained_encoder_is_never_the_best(data: TrainingData, tmp_path: Path) -> None:
    run = Run(tmp_path, data, replace(TINY, epochs=1, evaluate_every=100))
    script = [HeldOut(auc, None, 9, 3) for auc in (0.5, 0.99, 0.1)]
    with patch.object(run.training.evaluation, "rank_clicks", side_effect=script):
        record = run.go()
    assert record.best is not None
    assert record.best["step"] == 3
    assert same(record.best_weights, run.weights())


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))


def test_clicks_are_ranked_as_by_loops_over_single_images(root: str) -> None:
    rows = some_rows(12, seed=4)
    rows.clicks[0] = -1  # no history, so not measured
    rows.clicks[1] = [MISSING, -1, -1, -1, -1]  # none that can be seen
    encoder = small_encoder(TINY.backbone, "random", 32, seed=0)
    cache = ImageCache(None, rows.items["image_uri"], (root,), encoder.preprocessing)
    evaluation = Evaluation(rows, cache, limit=100, seed=0)
    vectors = evaluation.embed(encoder.features, 32, ALONE)
    found = evaluation.rank_clicks(vectors)

    embedding = {}
    for number in GOOD:
        content = Path(root, f"{number}.png").read_bytes()
        pixels = torch.from_numpy(decode(content, encoder.preprocessing))[None]
        with torch.no_grad():
            embedding[number] = encoder(pixels)[0].double().numpy()
    scored = []
    for pv, clicked, clicks, user in zip(
        rows.pv, rows.clicked, rows.clicks, rows.users, strict=True
    ):
        past = [embedding[item] for item in clicks if item in embedding]
        for item, label in zip(pv, clicked, strict=True):
            if past and item in embedding:
                scored.append((cosine(embedding[item], np.mean(past, axis=0)), label, user))
    won = [
        high > low
        for high, clicked, _ in scored
        for low, other, _ in scored
        if clicked and not other
    ]
    assert found.impressions == len(scored) < (rows.pv >= 0).sum()
    assert found.clicks == sum(label for _, label, _ in scored)
    # Squares are cut once where `decode` cuts twice: up to a pixel apart.
    assert found.auc == pytest.approx(np.mean(won), abs=0.02)


def test_nearest_is_the_share_of_reconstructions_that_find_their_own(root: str) -> None:
    rows = some_rows(12, seed=4)
    rows.clicks[1] = [MISSING, -1, -1, -1, -1]
    rows.clicks[2] = [MISSING, 4, 5, -1, -1]  # of which the first must not hide the others
    preprocessing = small_encoder(TINY.backbone, "random", 32, 0).preprocessing
    cache = ImageCache(None, rows.items["image_uri"], (root,), preprocessing)
    evaluation = Evaluation(rows, cache, limit=100, seed=0)
    vectors = evaluation.colours(ALONE)
    values = torch.tensor(vectors.values)
    values = torch.cat([values, torch.zeros(len(values), 256 - values.shape[1])], dim=1)
    vectors = replace(vectors, values=values.numpy())
    objective = build_objective("no-reconstruction", None, None)
    found = evaluation.nearest(vectors, objective, 100, ALONE.device)

    codes = np.unique(np.concatenate([rows.pv, rows.clicks], axis=1))
    codes = codes[codes >= 0].tolist()
    assert vectors.known.tolist() == [code not in BAD for code in codes]

    def seen(items: np.ndarray) -> list[int]:
        return [codes.index(item) if item in GOOD else -1 for item in items.tolist()]

    listed = [
        model_oracles.Row(seen(pv), [bool(c) and p in GOOD for c, p in zip(y, pv, strict=True)], c)
        for pv, y, c in zip(rows.pv, rows.clicked, map(seen, rows.clicks), strict=True)
    ]
    listed = [row for row in listed if any(row.clicked) and max(row.clicks) >= 0]
    wanted = model_oracles.pv(
        values.double().tolist(), vectors.keys.tolist(), listed, model_oracles.mean, 0.05
    )
    assert 0 < wanted.hits < wanted.anchors
    assert found == pytest.approx(wanted.hits / wanted.anchors)
    assert evaluation.nearest(vectors, build_objective("simsiam", None, None), 9, ALONE.device) is (
        None
    )


def test_held_out_rows_are_at_most_so_many_drawn_by_the_seed(root: str) -> None:
    rows = some_rows(40, seed=3)
    preprocessing = small_encoder(TINY.backbone, "random", 32, 0).preprocessing
    cache = ImageCache(None, rows.items["image_uri"], (root,), preprocessing)
    chosen = [Evaluation(rows, cache, 10, seed)._rows.users.tolist() for seed in (0, 0, 1)]
    assert len(chosen[0]) == 10
    assert chosen[0] == chosen[1] != chosen[2]


# ---- Told ------------------------------------------------------------------------------------


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    # Here, as processes that are spawned import this module too.
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    return {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


@pytest.mark.parametrize("step", [1, 3])
def test_scalars_of_a_killed_run_that_went_on_have_every_step_once(
    step: int, data: TrainingData, tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        Run(tmp_path, data).go(watch=die_at(step))
    last = Run(tmp_path, data)
    record = last.go()
    found = scalars(tmp_path)
    assert set(found) == {
        "loss/pv", "loss/ucs", "images_per_second",
        "held_out/auc", "held_out/gauc", "held_out/nearest",
    }  # fmt: skip
    for tag in ("loss/pv", "images_per_second"):
        assert [at for at, _ in found[tag]] == list(range(1, STEPS + 1))
    assert found["held_out/auc"] == [
        (m["step"], pytest.approx(m["auc"])) for m in record.measures[1:]
    ]
    total = found["loss/pv"][-1][1] + found["loss/ucs"][-1][1]
    assert total == pytest.approx(last.seen[-1].loss, rel=1e-5)


def test_progress_tells_steps_rate_and_time_left(data: TrainingData, tmp_path: Path) -> None:
    run = Run(tmp_path, data)
    run.go()
    assert {at.steps for at in run.seen} == {STEPS}
    assert all(at.images_per_second > 0 for at in run.seen)
    assert run.seen[0].seconds_left > run.seen[-1].seconds_left == 0
    assert [line.partition(":")[0] for line in run.told] == [
        "held out, colour histogram", "held out, untrained",
        *(f"held out, step {step}" for step in (2, 4, 6)),
    ]  # fmt: skip


def test_a_disk_too_small_for_the_cache_is_told_and_done_without(
    data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    settings = replace(TINY, epochs=1, evaluate_every=100)
    whole = Run(tmp_path / "whole", data, settings)
    whole.go()
    assert (tmp_path / "whole" / "images" / "pixels").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
    run = Run(tmp_path / "small", data, settings)
    assert run.told[0].startswith("no image cache: it could take")
    run.go()
    assert not (tmp_path / "small" / "images").exists()
    assert same(run.weights(), whole.weights())


# ---- Refused ---------------------------------------------------------------------------------


NOTHING = np.full((12, 5), -1)


@pytest.mark.parametrize(
    ("train", "held_out", "told"),
    [
        ({"clicked": np.zeros((12, 5), bool)}, {}, "0 with a click"),
        ({"clicks": NOTHING}, {}, "0 with an earlier click of their user"),
        ({"users": np.zeros(12, int)}, {}, "12 with both, of 1 users"),
        ({}, {"clicks": NOTHING}, "on the held-out days after them 0 have an earlier click"),
    ],
    ids=["no clicks", "no history", "one user", "no held-out history"],
)
def test_rows_that_cannot_teach_are_refused_before_any_image_is_read(
    train: dict[str, Any], held_out: dict[str, Any], told: str, root: str, tmp_path: Path
) -> None:
    data = TrainingData(
        replace(some_rows(12, seed=0), **train), replace(some_rows(12, seed=1), **held_out),
        (root,), "these",
    )  # fmt: skip
    with pytest.raises(DataContractError) as refused:
        Run(tmp_path / "run", data)
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_no_rows_at_all_are_refused(root: str, tmp_path: Path) -> None:
    none = some_rows(0, seed=0)
    for train, held_out in ((none, some_rows(9, 1)), (some_rows(9, 1), none), (none, none)):
        with pytest.raises(DataContractError, match="Train on more days"):
            Run(tmp_path, TrainingData(train, held_out, (root,), "these"))


@pytest.mark.parametrize("clicked", [True, False])
def test_held_out_days_of_one_label_are_refused(
    clicked: bool, data: TrainingData, tmp_path: Path
) -> None:
    rows = data.held_out
    held_out = replace(rows, clicked=(rows.pv >= 0) & clicked)
    with pytest.raises(DataContractError) as refused:
        Run(tmp_path, replace(data, held_out=held_out)).go()
    assert "both clicked and unclicked" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert checkpoints(tmp_path) == []


def test_held_out_images_of_which_none_can_be_read_are_refused(
    data: TrainingData, tmp_path: Path
) -> None:
    nowhere = replace(data, image_roots=(str(tmp_path / "nowhere"),))
    with pytest.raises(DataContractError, match=r"check catalogue\.image_roots"):
        Run(tmp_path / "run", nowhere).go()


def test_fewer_rows_than_a_batch_are_refused(data: TrainingData, tmp_path: Path) -> None:
    with pytest.raises(OperatorError, match="There are 26 rows to take batches of 27 from"):
        Run(tmp_path, data, replace(TINY, batch_rows=27))
    with pytest.raises(OperatorError, match="cannot be shared evenly by 3 processes"):
        Run(tmp_path, data, TINY, Process(0, 3, ALONE.device))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"objective": "couriers"}, "no objective 'couriers'; the nearest is 'courier'"),
        ({"objective": "simclear"}, "the nearest is 'simclr'"),
        ({"temperature": 0.0}, "The temperature is 0.0"),
        ({"temperature": -0.1}, "The temperature is -0.1"),
        ({"temperature": math.nan}, "The temperature is nan"),
        ({"objective": "simsiam", "temperature": 0.1}, "has no temperature"),
        ({"precision": "fp8"}, "The precision is 'fp8'"),
        ({"batch_rows": 1}, "A batch of 1 rows is too small"),
        ({"batch_rows": 0}, "A batch of 0 rows"),
        ({"objective": "clip"}, "needs a text model"),
        ({"text_model": "bert"}, "reads no titles"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(OperatorError) as refused:
        replace(TINY, **changes)
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"checkpoint_attention": True}, "--no-checkpoint-attention"),
        ({"backbone": "resnet19"}, "nearest name is 'resnet18'"),
        ({"weights": "imagnet"}, "'imagnet'"),
        ({"objective": "clip", "text_model": "/nowhere"}, "cannot be loaded"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused_before_any_image_is_read(
    changes: dict[str, Any], told: str, data: TrainingData, tmp_path: Path
) -> None:
    with pytest.raises(OperatorError) as refused:
        Run(tmp_path / "run", data, replace(TINY, **changes))
    assert told in str(refused.value)
    assert not (tmp_path / "run").exists()


# ---- Two processes ---------------------------------------------------------------------------

JOINT = replace(TINY, chunk_images=10_000, epochs=1)  # statistics frozen, gradients at once


def joint_run(folder: Path, data: TrainingData, process: Process) -> Run:
    run = Run(folder, data, JOINT, process)
    # Else Adam's first steps go by the sign of gradients however small, rounding included.
    run.training.optimizer.param_groups[0]["eps"] = 1e-3
    return run


def run_process(rank: int, port: int, folder: Path, root: str) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": "",
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
    }  # fmt: skip
    torch.set_num_threads(1)
    data = TrainingData(some_rows(26, seed=0), some_rows(12, seed=1), (root,), "these")
    Courier.augmentation = "centre"  # crops are drawn by each process for itself
    training_job.build_encoder = small_encoder
    with distributed.joined() as process:
        whole = joint_run(folder / "two", data, process)
        whole.go()
        stopped = joint_run(folder / "stopped", data, process)
        told = ""
        try:
            stopped.go(stop_at=2 if rank else None)  # one is asked, both stop
        except Stopped:
            told = f"stopped at {stopped.training.record.step}"
        resumed = joint_run(folder / "stopped", data, process)
        resumed.go()
        half = joint_run(folder / "half", data, process)
        batch = half.training.batches[0]
        if rank:
            batch = replace(
                batch, images=batch.images[:, :0], keys=batch.keys[:0], pv=-1 * (batch.pv < 9),
                clicked=batch.clicked & False, clicks=-1 * (batch.clicks < 9),
            )  # fmt: skip
        loss = half.training._train_on(batch).total
    torch.save(
        {
            "weights": whole.weights(), "losses": [at.loss for at in whole.seen],
            "record": vars(whole.training.record), "told": told,
            "resumed": resumed.weights(), "steps": [at.step for at in resumed.seen],
            "half": (half.weights(), loss),
        },
        folder / f"{rank}.pt",
    )  # fmt: skip


def test_two_processes_train_the_weights_of_one(
    data: TrainingData, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Courier, "augmentation", "centre")
    alone = joint_run(tmp_path / "one", data, ALONE)
    alone.go()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(run_process, (port, tmp_path, root), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert same(one["weights"], other["weights"])
    assert one["losses"] == pytest.approx([at.loss for at in alone.seen], rel=1e-4)
    for name, wanted in alone.weights().items():
        torch.testing.assert_close(one["weights"][name], wanted, rtol=1e-3, atol=1e-5, msg=name)
    begun = small_encoder(TINY.backbone, "random", 32, TINY.seed).state_dict()
    assert (alone.weights()["backbone.8.weight"] - begun["backbone.8.weight"]).abs().max() > 1e-4
    counts = alone.training.record.counts
    for process in (one, other):
        assert process["record"]["counts"]["rows"] == counts["rows"]
        assert process["record"]["measures"][-1]["auc"] == pytest.approx(
            alone.training.record.measures[-1]["auc"], abs=0.02
        )
        assert process["told"] == "stopped at 2"
        assert process["steps"] == [3]
        assert same(process["resumed"], process["weights"])
    # A process without a readable image goes along.
    assert same(one["half"], other["half"])
    assert one["half"][1] > 0
