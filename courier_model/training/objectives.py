"""Defines what an encoder can be trained for, by name: COURIER, its ablations and its baselines.

An objective is a module of features: it holds what is trained beside the encoder and thrown away
with the end of training, and turns a batch's features into the terms of its loss. The features are
those of the batch's distinct images; rows refer to them by place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from courier_model.training import losses
from courier_model.training.distributed import first_place, gather, largest
from courier_model.training.losses import Candidates, Term
from courier_model.training.reconstruction import (
    CrossAttention,
    MaskedSelfAttention,
    mean_of_clicks,
)
from courier_model.training.settings import TEMPERATURES
from courier_model.training.titles import TextTower
from feature_jobs.schemas import ROW_CLICKS


@dataclass(frozen=True)
class Places:
    """Holds the rows of a batch, on the device of the features that they refer to.

    `keys` int64 `[n]` content of each image; `pv` `[B, 5]` and `clicks` `[B, 5]` int64 places among
    the images, -1 = masked, clicks newest first and valid ones first; `clicked` bool `[B, 5]`;
    `titles` `[n]`, "" = none, where the objective reads them.
    """

    keys: Tensor
    pv: Tensor
    clicked: Tensor
    clicks: Tensor
    titles: list[str] | None = None

    def keys_at(self, places: Tensor) -> Tensor:
        """Returns the content at each place; any where the place is masked."""
        return self.keys[places.clamp(min=0)]


class Objective(nn.Module):
    """Declares what every objective tells the training job besides its terms.

    `views` of each image are encoded, made by the `augmentation` "crop" or "simclr"; `reads_titles`
    asks for titles with the rows; `reconstructs` names the term whose anchors are reconstructions.
    Features have D numbers, the `dimension` that an objective is built for.
    """

    views = 1
    augmentation = "crop"
    reads_titles = False
    reconstructs: str | None = None

    def forward(self, features: Tensor, rows: Places) -> dict[str, Term]:
        """Returns the terms of the loss, by name.

        `features` float32 `[views, n, D]` of the batch's n images, not normalised.
        """
        raise NotImplementedError


class Courier(Objective):
    """Trains by user-intention reconstruction, L_pv + L_ucs (`losses`), or by its ablations.

    `reconstruct=False` puts the mean of the clicks in place of attention; with
    `unclicked_negatives=False` only clicked PVs are candidates; `projection` adds the head of
    COURIER appendix §3.
    """

    reconstructs = "pv"

    def __init__(
        self,
        dimension: int,
        temperature: float,
        reconstruct: bool = True,
        ucs: bool = True,
        unclicked_negatives: bool = True,
        projection: bool = False,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.ucs = ucs
        self.unclicked_negatives = unclicked_negatives
        self.projection = _mlp(dimension) if projection else nn.Identity()
        self.attention = CrossAttention(dimension) if reconstruct else None

    def forward(self, features: Tensor, rows: Places) -> dict[str, Term]:
        vectors = self.projection(features[0])
        pv, clicks = _at(vectors, rows.pv), _at(vectors, rows.clicks)  # [B, P, D], [B, C, D]
        has_click = rows.clicks >= 0
        terms = {"pv": self._pv(pv, clicks, has_click, rows)}
        if self.ucs:
            terms["ucs"] = self._ucs(clicks, has_click, rows)
        return terms

    def _reconstruct(self, items: Tensor, clicks: Tensor, valid: Tensor) -> Tensor:
        if self.attention is None:
            return mean_of_clicks(items, clicks, valid)
        output: Tensor = self.attention(items, clicks, valid)
        return output

    def _pv(self, pv: Tensor, clicks: Tensor, has_click: Tensor, rows: Places) -> Term:
        reconstructions = self._reconstruct(pv, clicks, has_click).flatten(0, 1)  # [B * P, D]
        is_image, clicked = (rows.pv >= 0).flatten(), rows.clicked.flatten()
        is_anchor = is_image & clicked & has_click.any(1).repeat_interleave(rows.pv.shape[1])
        images = _candidates(
            pv.flatten(0, 1),
            is_image if self.unclicked_negatives else is_image & clicked,
            rows.keys_at(rows.pv).flatten(),
        )
        return losses.pv_loss(reconstructions, is_anchor, images, self.temperature)

    def _ucs(self, clicks: Tensor, has_click: Tensor, rows: Places) -> Term:
        newest, older, has_older = clicks[:, :1], clicks[:, 1:], has_click[:, 1:]
        reconstructions = self._reconstruct(newest, older, has_older)[:, 0]  # [B, D]
        candidates = _candidates(newest[:, 0], has_click[:, 0], rows.keys_at(rows.clicks[:, 0]))
        return losses.ucs_loss(reconstructions, has_older.any(1), candidates, self.temperature)


class MaskedPrediction(Objective):
    """Trains by random masked prediction with self-attention (COURIER appendix §2).

    A row's sequence is its clicked PV (the first one, where there are several) and its clicks. One
    place is masked at random and told from all PVs and all masked images of the batch.
    """

    reconstructs = "masked"

    def __init__(self, dimension: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.attention = MaskedSelfAttention(dimension, 1 + ROW_CLICKS)

    def forward(self, features: Tensor, rows: Places) -> dict[str, Term]:
        sequence = torch.cat([_first_clicked(rows)[:, None], rows.clicks], dim=1)  # [B, 1 + C]
        valid = sequence >= 0
        # A row of one image has nothing to be predicted from. Noise picks among the valid places.
        is_anchor = valid.sum(1) >= 2
        masked = torch.rand(sequence.shape, device=valid.device).masked_fill(~valid, -1).argmax(1)
        predicted = self.attention(_at(features[0], sequence), valid, masked)  # [B, D]
        target = sequence.gather(1, masked[:, None])  # [B, 1]
        places = torch.cat([target, rows.pv], dim=1)  # [B, 1 + P]
        images = _candidates(
            _at(features[0], places).transpose(0, 1).flatten(0, 1),  # the B targets come first
            torch.cat([is_anchor[:, None], rows.pv >= 0], dim=1).T.flatten(),
            rows.keys_at(places).T.flatten(),
        )
        term = losses.masked_prediction_loss(predicted, is_anchor, images, self.temperature)
        return {"masked": term}


class SimClr(Objective):
    """Trains by SimCLR (arXiv 2002.05709), with its head, on two augmented views of each image.

    The images are those of the rows. An image that two processes hold is a sample in each.
    """

    views = 2
    augmentation = "simclr"

    def __init__(self, dimension: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.head = _mlp(dimension)

    def forward(self, features: Tensor, rows: Places) -> dict[str, Term]:
        n = largest(features.shape[1], features.device)
        padding = n - features.shape[1]
        views = nn.functional.pad(self.head(features), (0, 0, 0, padding))  # [2, n, D]
        is_image = torch.arange(n, device=features.device) < features.shape[1]
        keys = nn.functional.pad(rows.keys, (0, padding)).repeat(2)
        both = _candidates(views.flatten(0, 1), is_image.repeat(2), keys)
        return {"nt_xent": losses.nt_xent_loss(views, is_image, both, self.temperature)}


class SimSiam(Objective):
    """Trains by SimSiam (arXiv 2011.10566): one view of an image predicts the other; no negatives.

    Batch statistics of its heads are taken per view, as in the paper.
    """

    views = 2
    augmentation = "simclr"

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.head = nn.Sequential(
            _normalised_layer(dimension), nn.ReLU(), _normalised_layer(dimension)
        )
        bottleneck = dimension // 4
        self.predictor = nn.Sequential(
            nn.Linear(dimension, bottleneck, bias=False),
            nn.BatchNorm1d(bottleneck),
            nn.ReLU(),
            nn.Linear(bottleneck, dimension),
        )

    def forward(self, features: Tensor, rows: Places) -> dict[str, Term]:
        if features.shape[1] < 2:  # batch statistics of one image are none
            features = features[:, :0]
            return {"simsiam": losses.simsiam_loss(features, features)}
        projected = torch.stack([self.head(view) for view in features])
        predicted = torch.stack([self.predictor(view) for view in projected])
        return {"simsiam": losses.simsiam_loss(predicted, projected)}


class Clip(Objective):
    """Trains by CLIP (arXiv 2103.00020) on the images and titles of PV items (COURIER appendix §4).

    An image without a title is in no pair.
    """

    reads_titles = True

    def __init__(self, dimension: int, temperature: float, text_model: str) -> None:
        super().__init__()
        self.temperature = temperature
        self.text = TextTower(text_model, dimension)

    def forward(self, features: Tensor, rows: Places) -> dict[str, Term]:
        assert rows.titles is not None
        has_title = torch.tensor([bool(t) for t in rows.titles], device=features.device)
        is_pv = torch.zeros_like(has_title)
        is_pv[rows.pv[rows.pv >= 0]] = True
        pairs = torch.nonzero(has_title & is_pv)[:, 0]
        texts = self.text([rows.titles[i] for i in pairs.tolist()])
        n = largest(len(pairs), features.device)
        padding = n - len(pairs)
        valid = torch.arange(n, device=features.device) < len(pairs)
        keys = nn.functional.pad(rows.keys[pairs], (0, padding))
        images, titles = (
            _candidates(nn.functional.pad(v, (0, 0, 0, padding)), valid, keys)
            for v in (features[0][pairs], texts)
        )
        own = images.first + torch.arange(len(pairs), device=features.device)
        return {"clip": losses.clip_loss(images, titles, own, self.temperature)}


# ---- By name -------------------------------------------------------------------------------

_COURIER: Mapping[str, Mapping[str, bool]] = {
    "courier": {},
    "courier-projection": {"projection": True},
    "no-ucs": {"ucs": False},
    "no-reconstruction": {"reconstruct": False},
    "no-unclicked-negatives": {"unclicked_negatives": False},
}


def build_objective(
    name: str, dimension: int, temperature: float | None, text_model: str | None
) -> Objective:
    """Builds the objective `name`, a key of TEMPERATURES, whose value is the default `temperature`.

    It is for features of so many `dimension`s; `text_model` is CLIP's. The modules are initialised
    from torch's global random numbers.
    """
    chosen = temperature or TEMPERATURES[name] or 0.0  # SimSiam's loss has none
    if name in _COURIER:
        return Courier(dimension, chosen, **_COURIER[name])
    others: Mapping[str, Callable[[], Objective]] = {
        "masked-self-attention": lambda: MaskedPrediction(dimension, chosen),
        "simclr": lambda: SimClr(dimension, chosen),
        "simsiam": lambda: SimSiam(dimension),
        "clip": lambda: Clip(dimension, chosen, str(text_model)),
    }
    return others[name]()


def _mlp(dimension: int) -> nn.Sequential:
    """Builds the projection head of SimCLR: one hidden layer."""
    return nn.Sequential(
        nn.Linear(dimension, dimension),
        nn.ReLU(),
        nn.Linear(dimension, dimension),
    )


def _normalised_layer(dimension: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dimension, dimension, bias=False), nn.BatchNorm1d(dimension))


def _at(vectors: Tensor, places: Tensor) -> Tensor:
    """Takes vectors `[n, D]` at places `[…]`: `[…, D]`, any vector where the place is masked."""
    return vectors[places.clamp(min=0)]


def _first_clicked(rows: Places) -> Tensor:
    """Returns the place of each row's first clicked PV, -1 where there is none; int64 `[B]`."""
    clicked = rows.clicked & (rows.pv >= 0)
    first = rows.pv.gather(1, clicked.int().argmax(1, keepdim=True))[:, 0]
    return first.where(clicked.any(1), -1)


def _candidates(vectors: Tensor, valid: Tensor, keys: Tensor) -> Candidates:
    """Gathers the candidates of all processes, which give the same number each."""
    return Candidates(gather(vectors), gather(valid), gather(keys), first_place(len(vectors)))
