"""Trains an image encoder on click logs: the training job.

On one device:   courier train --preset paper --until 2026-02-01
On eight GPUs:   torchrun --nproc-per-node 8 --no-python courier train --preset paper --until …

A step is: the distinct images of a batch of rows -> features -> the objective's terms, each divided
by its number of anchors over all processes -> gradients, summed over all processes -> Adam. Which
rows a step sees and how fast it learns follow from the step, and what it draws at random from seed,
step and process: a run that is resumed at a step goes on as if it had never stopped. (With several
processes and batch normalisation that is not frozen, the statistics kept are the first process's.)
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from courier_model.encoder import ImageEncoder, build_encoder, choose_precision, load_encoder
from courier_model.images import Preprocessing
from courier_model.measures import Estimate
from courier_model.projection import mean_of, principal
from courier_model.training import checkpoints, distributed, evaluate, memory, schedules
from courier_model.training.distributed import Process
from courier_model.training.evaluate import Evaluation, Vectors
from courier_model.training.image_cache import ImageCache
from courier_model.training.losses import Term
from courier_model.training.objectives import Objective, Places, build_objective
from courier_model.training.progress import Board, Clock, Progress
from courier_model.training.rows import Batch, Codes, RowBatches, Squares, TrainingSet, batches
from courier_model.training.settings import TrainSettings
from feature_jobs.schemas import CourierError, DataContractError, OperatorError
from feature_jobs.store import threads
from feature_jobs.store.versions import PACKAGE_VERSIONS

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_CENTRE_IMAGES = 20_000  # at most: the mean of more is the same
_MEASURES = ("auc", "gauc", "max_auc", "max_gauc")
_COUNTS = ("rows", "images", "bad_images", "skipped_batches")


@dataclass(frozen=True)
class TrainingData:
    """Holds rows of two ranges of days, held-out ones later; `fingerprint` tells their content.

    `histories` int64 [held-out rows, n] are codes of what their users had clicked before.
    """

    train: TrainingSet
    held_out: TrainingSet
    histories: Codes
    image_roots: tuple[str, ...]
    fingerprint: str


@dataclass
class Record:
    """Holds what a run has done and found so far, beside its weights; all of it is in a checkpoint.

    `measures` are held-out: of what training must beat (step None), then of the encoder at each
    evaluated step, 0 being the one that training begins with. `best` is the one of the trained with
    the highest AUC, `best_weights` the encoder's state then. `errors` are what each user adds to
    the error of the AUC, float64 [users], by what was measured; of `best` under "best". Measures
    can be compared where they are of the same impressions, by `ranked`: an image that was missing
    may be there after a stop, and the measure of an earlier version was another one.
    """

    step: int = 0
    seconds: float = 0.0
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_COUNTS, 0))
    measures: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None
    best_weights: dict[str, Tensor] | None = None
    errors: dict[str, Tensor] = field(default_factory=dict)


class Stopped(Exception):
    """Somebody asked the run to stop; a checkpoint of its last step is written."""


@dataclass(frozen=True)
class Loss:
    """Holds a batch's loss: this process's part with its graph, and the terms as numbers.

    `part` is None where no process has an anchor; `terms` are over all processes.
    """

    part: Tensor | None
    terms: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.terms.values())


class Training:
    """Trains one run in `folder`; holds its encoder, objective, optimizer, batches and record.

    Raises OperatorError for settings that do not fit the data or each other, and DataContractError
    for data that cannot teach anything; no image is read before.
    """

    def __init__(
        self, settings: TrainSettings, data: TrainingData, folder: str, process: Process,
        say: Callable[[str], None],
    ) -> None:  # fmt: skip
        rows = data.train.with_anchor()
        check_data(data, rows)
        self.settings, self.process, self.folder, self.say = settings, process, folder, say
        self.precision = choose_training_precision(settings.precision, process.device)
        self.encoder, self.objective = build_modules(settings, process.device)
        begun_from = {"init_from": self.encoder.encoder_id}  # wherever its folder lies
        self.identity = {"settings": settings.identity() | begun_from, "data": data.fingerprint}
        self.model = torch.nn.ModuleList([self.encoder, self.objective])
        self.parameters = list(self.model.parameters())
        self.backbone_parameters = schedules.backbone_parameters(self.encoder)
        groups = schedules.parameter_groups(settings, self.parameters, self.backbone_parameters)
        self.rates = [group["lr"] for group in groups]
        self.optimizer = torch.optim.Adam(groups, weight_decay=settings.weight_decay)
        decay = settings.ema_decay
        self.average = schedules.averaged(self.model, decay) if decay else None
        # What is evaluated and exported.
        measured = self.average.module if self.average else self.model
        self.measured = cast(tuple[ImageEncoder, Objective], tuple(measured.children()))
        self.scaler = torch.amp.GradScaler(process.device.type, enabled=self.precision == "fp16")
        preprocessing = self.encoder.preprocessing
        uris = rows.items["image_uri"]
        self.rows = rows
        self.cache = open_cache(settings, folder, uris, data, preprocessing, say)
        self.batches = self.make_batches(self.cache)
        free = threads.budget() // process.size - 1  # one for the step itself
        self.workers = min(8, max(0, free)) if settings.workers is None else settings.workers
        self.steps = settings.epochs * self.batches.steps_per_epoch
        schedules.check_lengths(settings, self.steps)
        self.evaluation = Evaluation(data.held_out, data.histories, self.cache)
        self.record = Record()
        # What `finish` finds.
        self.exported: dict[str, Any] = {}  # its measure
        self.centred: dict[str, Any] | None = None
        self.ahead: dict[str, dict[str, float | None]] = {}  # of what, and by how much

    def make_batches(self, squares: Squares) -> RowBatches:
        """Returns the batches of this run's rows, with images from `squares`."""
        settings, objective, process = self.settings, self.objective, self.process
        return RowBatches(
            self.rows, squares, objective.views, objective.augmentation,
            self.encoder.preprocessing.input_size, settings.batch_rows, settings.seed,
            process.rank, process.size, objective.reads_titles,
        )  # fmt: skip

    def run(self, report: Callable[[Progress], None], stopped: Callable[[], bool]) -> Record:
        """Goes on from the last checkpoint to the end.

        Raises Stopped once `stopped` says so, with a checkpoint written; CourierError for a loss
        that is not finite; OperatorError for a checkpoint of another run or of a later step;
        DataContractError where the held-out rows can tell nothing, or no batch has an anchor.
        """
        with memory.enough():
            return self._run(report, stopped)

    def _run(self, report: Callable[[Progress], None], stopped: Callable[[], bool]) -> Record:
        self._resume()
        record = self.record
        # A run that was killed before its first checkpoint measures step 0 again.
        first = record.step + 1 if record.measures else 0
        board = Board(self.folder, first) if self.process.leads else None
        if not record.measures:
            self._evaluate_baselines(board)
        clock = Clock(record.seconds)
        for batch in batches(self.batches, record.step, self.steps, self.workers):
            loss = self.train_on(batch)
            record.step += 1
            record.seconds = clock.seconds()
            rate = clock.images_per_second(batch.images.shape[:2].numel() * self.process.size)
            if board:
                numbers = {"images_per_second": rate, "learning_rate": self._learning_rate()}
                board.add(record.step, {**_named("loss", loss.terms), **numbers})
            left = clock.seconds_left(self.steps - record.step)
            report(Progress(record.step, self.steps, loss.total, rate, left))
            stop = distributed.any_process(stopped(), self.process.device)
            ended = record.step == self.steps
            evaluates = ended or record.step % self.settings.evaluate_every == 0
            if evaluates:
                self._check_that_it_learns()
                with clock.paused():
                    self._evaluate(board)
            # Asked of all, since saving is something that processes do together.
            due = distributed.any_process(clock.is_time_to_save(), self.process.device)
            if evaluates or stop or due:
                self._save()
                clock.saved()
            if stop and not ended:
                raise Stopped
        return record

    # ---- A step ----------------------------------------------------------------------------

    def train_on(self, batch: Batch) -> Loss:
        """Takes an optimizer step, unless no process has an anchor in its part of the batch."""
        device, settings = self.process.device, self.settings
        torch.manual_seed(_seed(settings.seed, batch.step, self.process.rank))
        images = batch.images.shape[1]
        self._set_training_mode(images, batch.step)
        self._set_rates(batch.step)
        self.optimizer.zero_grad()
        size = self.encoder.preprocessing.input_size
        seen = batch if images else _with_a_black_image(batch, size)
        loss = memory.backward(
            partial(self.compute, self.encoder.features),
            seen.images.flatten(0, 1).to(device, non_blocking=True),  # [views * n, 3, S, S]
            settings.chunk_images or None,
            partial(self._loss, places=_places(seen, device), views=len(seen.images)),
            partial(self._backpropagate, step=batch.step),
        )
        self._count(batch, loss)
        if loss.part is not None:
            self._step_optimizer(batch.step)
        return loss

    def _set_training_mode(self, images: int, step: int) -> None:
        self.encoder.train()
        self.objective.train()
        frozen = step < self.settings.freeze_backbone
        for parameter in self.backbone_parameters:
            parameter.requires_grad_(not frozen)
        # One image may have a single value in the last layers, of which torch takes no statistics;
        # and those of the black one that stands for none are not to be learned. A block that is
        # computed again would count its batch twice.
        alone = self.settings.chunk_images or self.settings.checkpoint_attention or images < 2
        if alone or frozen:
            memory.freeze_batch_statistics(self.encoder)

    def _set_rates(self, step: int) -> None:
        factor = schedules.rate_factor(self.settings, step, self.steps)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor

    def _learning_rate(self) -> float:
        """Returns the last step's, of all but the backbone."""
        return float(self.optimizer.param_groups[0]["lr"])

    def compute(self, features: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """Computes `features` in the chosen precision: uint8 `[m, 3, S, S]` -> float32 `[m, d]`."""
        dtype = _DTYPES.get(self.precision)
        # Depthwise convolutions train 5 times faster in this format on a CPU.
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
            return features(images)

    def _loss(self, features: Tensor, places: Places, views: int) -> Loss:
        """Sums the objective's terms, each divided by its anchors over all processes."""
        terms: dict[str, Term] = self.objective(features.unflatten(0, (views, -1)), places)
        anchors = {name: int(distributed.total(term.anchors)) for name, term in terms.items()}
        parts = {name: term.loss / anchors[name] for name, term in terms.items() if anchors[name]}
        values = {name: float(distributed.total(part)) for name, part in parts.items()}
        return Loss(torch.stack([*parts.values()]).sum() if parts else None, values)

    def _backpropagate(self, loss: Loss, step: int) -> bool:
        if loss.part is None:
            return False
        for name, value in loss.terms.items():
            self._check_finite(f"loss term {name!r}", value, step)
        self.scaler.scale(loss.part).backward()
        return True

    def _step_optimizer(self, step: int) -> None:
        distributed.sum_gradients(self.parameters)
        if not self.scaler.is_enabled():  # which leaves such a step out by itself
            gradients = [p.grad for p in self.parameters if p.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(gradients))
            self._check_finite("norm of the gradients", norm, step)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average:
            self.average.update_parameters(self.model)
        if self.scaler.is_enabled() and self.scaler.get_scale() < 1:
            raise CourierError(
                f"The gradients overflow 16 bits at every scale since about step {step}; steps "
                "are left out and nothing is learned. The same command goes on with --precision "
                "fp32 or bf16."
            )

    def _check_finite(self, what: str, value: float, step: int) -> None:
        if not math.isfinite(value):
            raise CourierError(
                f"The {what} became {value} at step {step}; expected a finite number. Training "
                "stopped before the optimizer could take it into the weights, and the checkpoints "
                f"in {self.folder} are of steps before. The same settings would come to the same "
                "step again: go on with --precision fp32, or begin anew with a lower "
                "--learning-rate and another --name."
            )

    def _check_that_it_learns(self) -> None:
        if self.record.counts["skipped_batches"] == self.record.step:
            raise DataContractError(
                f"Not one of the {self.record.step:,} batches had anything to learn from for the "
                f"objective {self.settings.objective!r}, with {self.record.counts['bad_images']:,} "
                "images that could not be read. The encoder would stay as it began. Check "
                "catalogue.image_roots in the settings, and for clip that the catalogue has titles."
            )

    def _count(self, batch: Batch, loss: Loss) -> None:
        counts = self.record.counts
        found = torch.tensor(
            [len(batch.pv), batch.images.shape[1], batch.bad_images], device=self.process.device
        )
        rows, images, bad = distributed.total(found).tolist()
        counts["rows"] += rows
        counts["images"] += images
        counts["bad_images"] += bad
        counts["skipped_batches"] += loss.part is None

    # ---- The held-out measure ----------------------------------------------------------------

    def _evaluate_baselines(self, board: Board | None) -> None:
        """Measures what training must beat, the encoder as it begins at last."""
        colours = self.evaluation.colours(self.process)
        self._note(colours, {"of": "a plain colour histogram", "step": None}, board)
        begun = "the encoder it started from"
        if not self.settings.init_from:
            begun = "the untrained encoder"
            if self.measures_principal:
                of = {"of": "the pretrained backbone with PCA", "step": None}
                self._note(self._embed_principal(), of, board)
        self._measure(begun, board)

    @property
    def measures_principal(self) -> bool:
        """Tells whether the run measures what its backbone is worth by itself."""
        return not self.settings.init_from and self.settings.weights != "random"

    def _embed_principal(self) -> Vectors:
        """Returns what the backbone is worth without clicks: its leading principal directions."""
        settings, process = self.settings, self.process
        backbone = build_encoder(
            settings.backbone, settings.weights, settings.input_size, settings.seed
        )
        backbone.leave_out_head()
        backbone.eval().to(memory_format=torch.channels_last).to(process.device)
        seen, held_out = self._embed_sample(backbone)
        known = seen.values[seen.known]
        found = principal(known, min(settings.embedding_dim, known.shape[1], len(known) - 1))
        return replace(held_out, values=held_out.values @ found.weight.T - found.centre)

    def _evaluate(self, board: Board | None) -> None:
        record = self.record
        of = f"step {record.step:,}"
        found = self._measure(of, board)
        errors = record.errors.pop(of)
        best = record.best
        is_other = best is not None and best.get("ranked") != found["ranked"]
        if best is None or is_other or found["auc"] > best["auc"]:
            record.best, record.errors["best"] = found, errors
            # A copy: the next step changes the encoder's own tensors in place.
            weights = self.measured[0].state_dict()
            record.best_weights = {k: v.cpu().clone() for k, v in weights.items()}

    def _measure(self, name: str, board: Board | None) -> dict[str, Any]:
        encoder, objective = self.measured
        encoder.eval()
        objective.eval()
        self._share_statistics()
        torch.manual_seed(_seed(self.settings.seed))
        vectors = self.evaluation.embed(
            partial(self.compute, encoder.features), encoder.preprocessing.input_size,
            self.process,
        )  # fmt: skip
        largest = float(np.abs(vectors.values).max())
        self._check_finite("largest feature of a held-out image", largest, self.record.step)
        nearest = self.evaluation.nearest(
            vectors, objective, self.settings.batch_rows, self.process.device
        )
        of = {"of": name, "step": self.record.step, "nearest": nearest}
        return self._note(vectors, of, board)

    def _note(self, vectors: Vectors, of: dict[str, Any], board: Board | None) -> dict[str, Any]:
        """Notes the measure of an encoder's `vectors`, or of what it stands beside."""
        found, auc = self._rank(vectors)
        found = {**of, **found}
        self.record.measures.append(found)
        self.record.errors[of["of"]] = torch.from_numpy(auc.errors)
        self.say(f"held out, {of['of']}: {told(found)}")
        if board and of["step"] is not None:
            measured = {name: found[name] for name in (*_MEASURES, "nearest")}
            known = {name: value for name, value in measured.items() if value is not None}
            board.add(self.record.step, _named("held_out", known))
        return found

    def _rank(self, vectors: Vectors) -> tuple[dict[str, Any], Estimate]:
        """Returns the held-out measure as numbers, and its AUC."""
        found = self.evaluation.rank_clicks(vectors)
        if found.auc is None:
            raise DataContractError(
                f"The held-out days have {found.impressions:,} impressions with a history and "
                f"readable images, {found.clicks:,} of them clicked; both clicked and unclicked "
                "ones are needed to tell a good encoder from a bad one. Hold out more days with "
                "--held-out-days, or check catalogue.image_roots in the settings."
            )
        return {**found.numbers(), "ranked": self.evaluation.ranked(vectors)}, found.auc

    def finish(self) -> None:
        """Makes `encoder` the best evaluated one, centred where that is wanted and better.

        What was found of that is in `centred`, and in `ahead` what was measured before training,
        and by how much the AUC is above its. All processes call it, once the run has ended.
        """
        best, weights = self.record.best, self.record.best_weights
        assert best is not None
        assert weights is not None
        self.encoder.load_state_dict(weights)
        self.encoder.eval()
        self.exported = best
        errors = dict(self.record.errors)
        auc = _estimate(best, errors.pop("best", None))
        if self.settings.centre:
            auc = self._centre()
        for measured in self.record.measures:
            if measured["step"]:
                continue
            if measured.get("ranked") != self.exported.get("ranked"):
                self.say(
                    f"held out, {measured.get('of', 'what stood beside it')} was measured on other "
                    "impressions, before images, settings or the version changed: not compared"
                )
                continue
            before = _estimate(measured, errors.get(measured["of"])) if errors else None
            if auc and before:
                ahead = auc - before
                by = {"auc": ahead.value, "auc_se": ahead.standard_error}
                self.ahead[measured["of"]] = by
                self.say(f"held out, above {measured['of']}: {told(by)}")

    def _centre(self) -> Estimate:
        """Takes off the mean of the features where that is better; returns the AUC then."""
        seen, held_out = self._embed_sample(self.encoder)
        mean = mean_of(seen.values[seen.known])
        plain, auc = self._rank(held_out)
        found, centred = self._rank(replace(held_out, values=held_out.values - mean))
        taken = centred.value > auc.value
        if taken:
            self.encoder.move_centre(mean)
        self.exported = found if taken else {**self.exported, **plain}
        images = int(seen.known.sum())
        self.centred = {"images": images, **found, "taken": taken}
        self.say(
            f"held out, less the mean of {images:,} images: {told(self.centred)}"
            + ("" if taken else ", which is no more than without: it stays")
        )
        return centred if taken else auc

    def _embed_sample(self, encoder: ImageEncoder) -> tuple[Vectors, Vectors]:
        """Returns the features of a sample of the images trained on, and of the held-out ones."""
        sample, held_out = self.sample(), self.evaluation.codes
        codes = np.union1d(sample, held_out)  # of a small shop they are much the same
        features, size = partial(self.compute, encoder.features), encoder.preprocessing.input_size
        found = evaluate.embed(self.cache, codes, features, size, self.process)
        return found.take(np.searchsorted(codes, sample)), found.take(
            np.searchsorted(codes, held_out)
        )

    def sample(self) -> npt.NDArray[np.int64]:
        """Returns some of the images that are trained on, by their codes."""
        codes = np.unique(np.concatenate([self.rows.pv, self.rows.clicks], axis=1))
        drawn = np.random.default_rng([self.settings.seed, 2]).permutation(codes[codes >= 0])
        return drawn[:_CENTRE_IMAGES]

    @property
    def auc(self) -> float:
        """Returns the held-out AUC of the finished encoder."""
        return float(self.exported["auc"])

    # ---- Checkpoints -------------------------------------------------------------------------

    def _share_statistics(self) -> None:
        """Gives all processes the batch statistics of the first, which are those that are saved."""
        for encoder in dict.fromkeys([self.encoder, self.measured[0]]):
            distributed.copy_from_first(encoder.buffers())

    def _save(self) -> None:
        self._share_statistics()
        if self.process.leads:
            state = {
                "identity": self.identity,
                "record": vars(self.record),
                "encoder": self.encoder.state_dict(),
                "objective": self.objective.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
            }
            if self.average:
                state["average"] = self.average.state_dict()
            checkpoints.save(os.path.join(self.folder, "checkpoints"), self.record.step, state)
        distributed.wait_for_all()

    def _resume(self) -> None:
        state = checkpoints.load_latest(os.path.join(self.folder, "checkpoints"), self.say)
        step = state["record"]["step"] if state else 0
        if distributed.largest(step, self.process.device) != step:
            raise OperatorError(
                f"One process finds a checkpoint of step {step:,} in {self.folder}, another a "
                "later one. All processes must see the same folder: put it on a disk that they "
                "share."
            )
        if state is None:
            return
        check_same_run(state["identity"], self.identity, self.folder)
        if state["record"]["step"] > self.steps:
            raise OperatorError(
                f"The run in {self.folder} is at step {state['record']['step']:,} already, but "
                f"{self.settings.epochs} epochs end at step {self.steps:,}. Give as many --epochs "
                "as before or more, or another --name."
            )
        self.encoder.load_state_dict(state["encoder"])
        self.objective.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty where the precision needed none
            self.scaler.load_state_dict(state["scaler"])
        if self.average:
            self.average.load_state_dict(state["average"])
        self.record = Record(**state["record"])
        self.say(f"going on from step {self.record.step:,} of {self.steps:,} ({self.folder})")


# ---- Before the first step -------------------------------------------------------------------


def check_data(data: TrainingData, rows: TrainingSet) -> None:
    """Raises DataContractError where the rows of `data.train` cannot teach anything.

    `rows` are those of them that have an anchor.
    """
    if len(rows) and len(np.unique(rows.users)) > 1 and len(data.held_out):
        return
    clicks, histories = data.train.clicked.any(1).sum(), len(data.train.with_history())
    found = (
        f"The training rows hold {len(data.train):,} requests: {clicks:,} with a click, "
        f"{histories:,} with an earlier click of their user, {len(rows):,} with both, of "
        f"{len(np.unique(rows.users)):,} users; of the held-out days after them "
        f"{len(data.held_out):,} with an earlier click."
    )
    raise DataContractError(
        f"{found} A clicked image is reconstructed from images that its user had clicked before, "
        "and told from those of other users: requests with both are needed, of several users, and "
        "later ones to measure on. Train on more days, or check that the log's clicks are there "
        "and its categories are those of [training]."
    )


def check_same_run(found: Mapping[str, Any], wanted: Mapping[str, Any], folder: str) -> None:
    """Raises OperatorError where a checkpoint in `folder` belongs to another run.

    A setting that it does not know yet, it was made with the default of.
    """
    old, new = TrainSettings().identity() | found["settings"], wanted["settings"]
    if old == new and found["data"] == wanted["data"]:
        return
    changes = [f"{k} {old[k]!r}, now {new[k]!r}" for k in new if k in old and old[k] != new[k]]
    what = "; ".join(changes) or "other training rows or another catalogue"
    raise OperatorError(
        f"{folder} holds a run that was begun with {what}. Its checkpoints cannot be gone on from: "
        "the mixture would be neither run. Give this run another --name, go back to those "
        "settings, or delete the folder."
    )


def choose_training_precision(wanted: str, device: torch.device) -> str:
    """Returns the `wanted` precision; for "auto" it goes by the device.

    That is bf16 where the hardware multiplies in it, else fp16 on CUDA and fp32 on a CPU.
    """
    if wanted != "auto":
        return wanted
    precision = choose_precision(device)
    return "fp16" if device.type == "cuda" and precision == "fp32" else precision


def build_modules(settings: TrainSettings, device: torch.device) -> tuple[ImageEncoder, Objective]:
    """Builds encoder and objective as they begin; the same settings give the same weights."""
    weights = "random" if settings.init_from else settings.weights
    encoder = build_encoder(
        settings.backbone, weights, settings.input_size, settings.seed, settings.embedding_dim
    )
    if settings.init_from:
        encoder = load_earlier(settings.init_from, encoder)
    for part in encoder.modules():
        if isinstance(part, torch.nn.modules.batchnorm._BatchNorm):
            # 0.1 lags ten steps behind: short runs from scratch were measured with statistics of
            # weights long gone (held-out AUC 0.59 where the batch's own gave 0.63).
            part.momentum = 0.4
    if settings.checkpoint_attention:
        memory.checkpoint_attention(encoder.backbone)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        objective = build_objective(
            settings.objective, settings.embedding_dim, settings.temperature, settings.text_model
        )
    if settings.compile:
        encoder.backbone.compile()
    encoder.to(memory_format=torch.channels_last)
    return encoder.to(device), objective.to(device)


def load_earlier(folder: str, like: ImageEncoder) -> ImageEncoder:
    """Loads the saved encoder that training is to go on from.

    Raises OperatorError where `folder` holds none, or one of another backbone, dimension or
    preprocessing than `like`, and DataContractError where it is damaged.
    """
    found = load_encoder(folder)
    old, new = (
        {"backbone": one.backbone_name, "dimension": one.dimension, **asdict(one.preprocessing)}
        for one in (found, like)
    )
    if old != new:
        changes = [
            f"{name} {old[name]!r}, now {new[name]!r}" for name in new if old[name] != new[name]
        ]
        raise OperatorError(
            f"The encoder {found.encoder_id} of --init-from was made with {'; '.join(changes)}. "
            "Its weights are of that network and of images prepared in that way. Give the same "
            "--backbone, --embedding-dim and --input-size, or leave --init-from out."
        )
    if found.timm:  # what it learns from now on it learns with this one
        found.timm = {**found.timm, "version": PACKAGE_VERSIONS["timm"]}
    return found


def images_folder(folder: str) -> str:
    """Returns where the run in `folder` keeps its image cache."""
    return os.path.join(folder, "images")


def open_cache(
    settings: TrainSettings, folder: str, uris: pa.ChunkedArray, data: TrainingData,
    preprocessing: Preprocessing, say: Callable[[str], None],
) -> ImageCache:  # fmt: skip
    """Opens the image cache, without files where they are not wanted or the disk is too small."""
    decoding = ImageCache(None, uris, data.image_roots, preprocessing)
    if not settings.cache:
        return decoding
    os.makedirs(folder, exist_ok=True)
    free = shutil.disk_usage(folder).free
    path = images_folder(folder)
    if decoding.bytes_needed > free and not os.path.isdir(path):
        say(
            f"no image cache: it could take {decoding.bytes_needed / 1e9:,.1f} GB of the "
            f"{free / 1e9:,.1f} GB that are free at {folder}; every epoch will decode again"
        )
        return decoding
    return ImageCache(path, uris, data.image_roots, preprocessing)


# ---- Words -----------------------------------------------------------------------------------


def told(found: Mapping[str, Any]) -> str:
    """Writes a held-out measure by its names, with standard errors where they are known."""
    words = [
        f"{name} {found[name]:.4f}" + ("" if error is None else f" ± {error:.4f}")
        for name, error in ((name, found.get(f"{name}_se")) for name in (*_MEASURES, "nearest"))
        if found.get(name) is not None
    ]
    return ", ".join(words)


def _estimate(measured: Mapping[str, Any], errors: Tensor | None) -> Estimate | None:
    """Returns the AUC of a measure, None where it is not known what users add to its error."""
    if errors is None:
        return None
    return Estimate(measured["auc"], errors.numpy(), len(errors))


# ---- Seeds and places ------------------------------------------------------------------------


def _seed(*parts: int) -> int:
    """Makes one seed for torch out of several numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


def _places(batch: Batch, device: torch.device) -> Places:
    keys, pv, clicked, clicks = (
        tensor.to(device, non_blocking=True)
        for tensor in (batch.keys, batch.pv, batch.clicked, batch.clicks)
    )
    return Places(keys, pv, clicked, clicks, batch.titles)


def _with_a_black_image(batch: Batch, size: int) -> Batch:
    """Adds to a batch without images a black one, which no row shows.

    This is for a process all of whose images are bad, since the processes go through the same
    operations together.
    """
    return replace(
        batch,
        images=torch.zeros(len(batch.images), 1, 3, size, size, dtype=torch.uint8),
        keys=torch.zeros(1, dtype=torch.int64),
        titles=None if batch.titles is None else [""],
    )


def _named(group: str, values: Mapping[str, float]) -> dict[str, float]:
    return {f"{group}/{name}": value for name, value in values.items()}
