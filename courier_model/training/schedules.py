"""Says how fast the parts of a model learn at each step, and averages what they have learned.

Rates follow from the settings and the step alone, as a step's rows and random numbers do, so that a
run that is resumed goes on as if it had never stopped. (torch's schedulers count their own calls,
which a checkpoint would have to hold beside its step.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from courier_model.encoder import ImageEncoder
from courier_model.training.settings import TrainSettings
from feature_jobs.schemas import OperatorError


def check_lengths(settings: TrainSettings, steps: int) -> None:
    """Raises OperatorError where a run of `steps` steps would end within what begins it."""
    for option, found, most in (
        ("--warmup-steps", settings.warmup_steps, steps - 1),
        ("--freeze-backbone", settings.freeze_backbone, steps),
    ):
        if found > most:
            raise OperatorError(
                f"{option} is {found:,}, but {settings.epochs} epochs of these rows are {steps:,} "
                f"steps, of which it may take {most:,} at most: the run would end before the rest "
                f"of its schedule began. Give a smaller {option}, more --epochs, or a smaller "
                "--batch-rows."
            )


def rate_factor(settings: TrainSettings, step: int, steps: int) -> float:
    """Returns what learning rates are multiplied by at `step`, of 0 to `steps` - 1; it is 0 to 1.

    It rises linearly to 1 (arXiv 1706.02677), and falls along half a cosine that would come to 0 at
    `steps` (arXiv 1608.03983).
    """
    warmup = settings.warmup_steps
    if step < warmup:
        return (step + 1) / warmup
    if not settings.cosine_decay:
        return 1.0
    return (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def backbone_parameters(encoder: ImageEncoder) -> list[nn.Parameter]:
    """Returns all parameters that the encoder learns but those of its last layer, the head."""
    head = set(encoder.backbone.get_submodule(encoder.head_name).parameters())
    return [p for p in encoder.parameters() if p not in head and p.requires_grad]


def parameter_groups(
    settings: TrainSettings, parameters: Sequence[nn.Parameter], backbone: Sequence[nn.Parameter]
) -> list[dict[str, Any]]:
    """Returns an optimizer's groups of all `parameters`, with their rates before any schedule.

    The last group is the `backbone`. With a factor of 1 all are one group, as in checkpoints of
    before there were two.
    """
    rate = settings.learning_rate
    if settings.backbone_lr_factor == 1:
        return [{"params": list(parameters), "lr": rate}]
    slower = set(backbone)
    return [
        {"params": [p for p in parameters if p not in slower], "lr": rate},
        {"params": list(backbone), "lr": rate * settings.backbone_lr_factor},
    ]


def averaged(modules: nn.ModuleList, decay: float) -> AveragedModel:
    """Returns an exponential moving average of `modules`, which begins at its first update.

    Batch statistics are averaged alike, since those of the present weights would not fit the
    averaged ones.
    """

    def average(so_far: Tensor, now: Tensor, _updates: Tensor | int) -> Tensor:
        # torch's own function rounds integers down: Swin's indices into its biases would change.
        return torch.lerp(so_far, now, 1 - decay) if so_far.is_floating_point() else now

    return AveragedModel(modules, avg_fn=average, use_buffers=True)
