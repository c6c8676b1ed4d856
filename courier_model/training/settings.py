"""Holds what a training run depends on besides its data, and two presets.

Settings are checked before anything is read.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import asdict, dataclass
from typing import Any

from courier_model.projection import EMBEDDING_DIM
from feature_jobs.schemas import OperatorError

# The temperature of each objective's loss, by COURIER appendix §4; None where it has none.
TEMPERATURES: dict[str, float | None] = {
    "courier": 0.05,
    "courier-projection": 0.05,
    "no-ucs": 0.05,
    "no-reconstruction": 0.05,
    "no-unclicked-negatives": 0.05,
    "masked-self-attention": 0.05,
    "simclr": 0.2,
    "simsiam": None,
    "clip": 0.1,
}
HEADS = 4  # of attention
_DIMENSIONS = range(64, 1025)
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
# What may change between a run and its continuation without making it another run.
_FREE = {"epochs", "precision", "checkpoint_attention", "compile", "workers", "cache", "centre"}


@dataclass(frozen=True)
class TrainSettings:
    """Describes a training run; the defaults are the paper's (COURIER appendix §4).

    `init_from`, the folder of a saved encoder, takes the place of `weights`. An embedding has
    `embedding_dim` numbers, 64 to 1,024 and a multiple of 4. `input_size` in pixels and
    `temperature` default to the backbone's and the objective's own. `batch_rows` is the global
    batch, in rows of up to ten images. With `chunk_images` gradients are cached: so many images at
    a time have activations on the device; with 0 all of a batch have. `evaluate_every` is in steps.
    `workers` processes decode, 0 for the training process itself, by default one for each core that
    is left, at most 8.

    The learning rate rises over `warmup_steps`, and with `cosine_decay` falls to 0 at the run's
    end; all of the encoder but its last layer has `backbone_lr_factor` times the rate, and does not
    learn at all for the first `freeze_backbone` steps. An `ema_decay` above 0 evaluates and exports
    an exponential moving average of the weights. With `centre` what is exported has the mean
    feature of the images trained on taken off, where that raises the held-out measure.

    Raises OperatorError where a value makes no sense.
    """

    objective: str = "courier"
    backbone: str = "swin_t"
    weights: str = "imagenet"
    init_from: str | None = None
    input_size: int | None = None
    embedding_dim: int = EMBEDDING_DIM
    epochs: int = 1
    batch_rows: int = 3072
    chunk_images: int = 256
    learning_rate: float = 1e-4
    weight_decay: float = 1e-6
    warmup_steps: int = 0
    cosine_decay: bool = False
    backbone_lr_factor: float = 1.0
    freeze_backbone: int = 0
    ema_decay: float = 0.0
    centre: bool = False
    temperature: float | None = None
    text_model: str | None = None
    precision: str = "auto"
    checkpoint_attention: bool = True
    compile: bool = False
    evaluate_every: int = 100
    held_out_rows: int = 20_000
    workers: int | None = None
    cache: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.objective not in TEMPERATURES:
            near = difflib.get_close_matches(self.objective, TEMPERATURES, n=1, cutoff=0)[0]
            raise OperatorError(
                f"There is no objective {self.objective!r}; the nearest is {near!r}. All are: "
                f"{', '.join(TEMPERATURES)}."
            )
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise OperatorError(
                f"The temperature is {self.temperature}; it divides cosines, so it must be above "
                "0. The defaults are 0.05 to 0.2."
            )
        if not 0 < self.learning_rate < math.inf:
            raise OperatorError(
                f"The learning rate is {self.learning_rate}; expected is a number above 0, such as "
                "1e-4."
            )
        if self.embedding_dim not in _DIMENSIONS or self.embedding_dim % HEADS:
            raise OperatorError(
                f"--embedding-dim is {self.embedding_dim}; expected is a number from "
                f"{_DIMENSIONS[0]} to {_DIMENSIONS[-1]:,} that {HEADS} divides, since each of the "
                f"{HEADS} heads of attention takes an equal part of a vector. The paper's is 256."
            )
        self._check_schedules()
        if self.temperature is not None and TEMPERATURES[self.objective] is None:
            raise OperatorError(
                f"The loss of {self.objective!r} has no temperature. Leave --temperature out."
            )
        if self.precision not in PRECISIONS:
            raise OperatorError(
                f"The precision is {self.precision!r}; expected one of {', '.join(PRECISIONS)}."
            )
        if self.batch_rows < 2:
            raise OperatorError(
                f"A batch of {self.batch_rows} rows is too small to have negatives, which are "
                "images of the other rows. Give 2 rows or more as --batch-rows; thousands are "
                "better."
            )
        if (self.objective == "clip") != (self.text_model is not None):
            needs = "needs a text model" if self.objective == "clip" else "reads no titles"
            raise OperatorError(
                f"The objective {self.objective!r} {needs}. --text-model names a model of the "
                "Hugging Face hub, or the folder of one, for the objective clip alone."
            )

    def _check_schedules(self) -> None:
        for name in ("warmup_steps", "freeze_backbone"):
            if getattr(self, name) < 0:
                raise OperatorError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}; expected is a number of "
                    "steps, or 0 for none."
                )
        if not 0 < self.backbone_lr_factor < math.inf:
            raise OperatorError(
                f"--backbone-lr-factor is {self.backbone_lr_factor}; the learning rate of the "
                "backbone is multiplied by it, so it must be above 0, such as 0.1. With "
                "--freeze-backbone N the backbone does not learn at all for N steps."
            )
        if not 0 <= self.ema_decay < 1:
            raise OperatorError(
                f"--ema-decay is {self.ema_decay}; expected is 0, for no average, or a number "
                "below 1, such as 0.99 for an average of about the last 100 steps."
            )

    def identity(self) -> dict[str, Any]:
        """Returns what a checkpoint must agree with, for a run to go on from it.

        `epochs` are in it where the learning rate falls to 0 at their end.
        """
        free = _FREE - {"epochs"} if self.cosine_decay else _FREE
        return {name: value for name, value in asdict(self).items() if name not in free}


PRESETS = {
    # One epoch on one GPU or many; the effective batch is the paper's 3,072 rows on any number.
    "paper": TrainSettings(),
    # The demo shop, from scratch, in three minutes on two CPU cores. 1,024 rows show most of its
    # 600 items, each of which is encoded once: more rows are more clicks at the same cost.
    "demo": TrainSettings(
        backbone="resnet18", weights="random", input_size=32, epochs=6, batch_rows=1024,
        chunk_images=0, learning_rate=3e-4, precision="fp32", checkpoint_attention=False,
        evaluate_every=7, workers=0, centre=True,
    ),
}  # fmt: skip
