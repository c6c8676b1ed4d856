"""Makes runs of training as small as can be, which teach nothing but the law of the loop.

Their shop has sixteen items, of which four have no image to show, and rows of them drawn at random.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from courier_model.encoder import ImageEncoder, build_encoder
from courier_model.projection import EMBEDDING_DIM
from courier_model.training.distributed import Process
from courier_model.training.progress import Progress
from courier_model.training.rows import TrainingSet
from courier_model.training.settings import TrainSettings
from courier_model.training.train import Record, Training, TrainingData
from feature_jobs.impressions.clicks import HistoryLaw
from pipelines.artefacts.held_out import histories_of

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
DAY_US = 86_400_000_000
LAW = HistoryLaw(history_len=8, window_us=7 * DAY_US, click_delay_us=0)


def small_encoder(
    backbone: str, weights: str, input_size: int | None, seed: int, dimension: int = EMBEDDING_DIM
) -> ImageEncoder:
    """Builds an encoder of few tensors, or the plain `backbone` unless "small" is one of its words.

    Torchvision's have hundreds of tensors: at this size, saving them is all that takes time. As in
    those, the last layers see one value an image.
    """
    if "small" not in backbone.split():
        return build_encoder(backbone, weights, input_size, seed, dimension)
    encoder = build_encoder("shufflenet_v2_x0_5", weights, input_size, seed, dimension)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder.backbone = nn.Sequential(
            nn.Conv2d(3, 16, 4, 4), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 64, 8), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten(),
            nn.Dropout(0.2 if "random" in backbone else 0.0), nn.Linear(64, dimension),
        )  # fmt: skip
    encoder.head_name = "8"
    return encoder.eval()


def slow_history(
    rows: TrainingSet, row: int, seen: Sequence[TrainingSet], law: HistoryLaw
) -> list[int]:
    """Walks back over the rows of a row's user, and takes what each lists and none before did."""
    moment = rows.moments[row]
    listed = [
        (one.moments[at], one.clicks[at].tolist())
        for one in seen
        for at in range(len(one))
        if one.users[at] == rows.users[row] and moment - law.window_us <= one.moments[at] <= moment
    ]
    found: dict[int, None] = {}
    for _, clicks in sorted(listed, key=lambda at: -at[0]):
        found |= dict.fromkeys(item for item in clicks if item >= 0)
    return list(found)[: law.history_len]


def some_rows(count: int, seed: int, items: tuple[int, ...] = (*GOOD, *BAD)) -> TrainingSet:
    """Draws rows of two to five PVs, the first of them clicked, and one to five clicks."""
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
    users, moments = rng.integers(0, 4, count), rng.integers(0, DAY_US, count)
    return TrainingSet(pv, clicked, clicks, users, moments, table)


def training_data(root: str) -> TrainingData:
    """Makes 26 rows to train on: three batches of eight an epoch, and a rest."""
    train, held_out = some_rows(26, seed=0), some_rows(12, seed=1)
    held_out = replace(held_out, moments=held_out.moments + DAY_US)
    histories = histories_of(held_out, [train, held_out], LAW)
    return TrainingData(train, held_out, histories, (root,), "these")


class Run:
    """Holds a run in a folder, what it told, and the steps it reported."""

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
        """Returns all that a run is about, but for how long it took."""
        run = self.training
        return {
            "encoder": self.weights(),
            "objective": copied(run.objective.state_dict()),
            "optimizer": run.optimizer.state_dict(),
            "scaler": run.scaler.state_dict(),
            "average": copied(run.average.state_dict()) if run.average else None,
            "record": {k: v for k, v in vars(run.record).items() if k != "seconds"},
        }


def copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


def same(one: Any, other: Any) -> bool:
    """Tells whether two states are equal bit for bit, however deep."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def parameters(run: Run, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weights[name] for name, _ in run.training.encoder.named_parameters()}


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("step-*.pt"))
