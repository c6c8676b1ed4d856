"""Computes the losses of COURIER and of what it is compared with, by pure functions of tensors.

All of them but SimSiam's are one contrastive loss over different anchors and candidates. Axes: `a`
anchors of this process, `N` candidates of all processes, `D` numbers of a vector. Each returns a
`Term`, whose sum the caller divides by the *global* number of anchors, over all processes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Candidates:
    """Holds what a softmax runs over, gathered over all processes with gradients.

    `vectors` float32 `[N, D]`, not yet normalised; `valid` bool `[N]`; `keys` int64 `[N]`, equal
    for images of equal content; `first` is the place of this process's first candidate.
    """

    vectors: Tensor
    valid: Tensor
    keys: Tensor
    first: int = 0


@dataclass(frozen=True)
class Term:
    """Holds one part of a loss over this process's anchors.

    `loss` is the sum over the anchors, a scalar; `anchors` their number; `hits` how many of them
    have their own positive alone as the nearest candidate, both int64 scalars.
    """

    loss: Tensor
    anchors: Tensor
    hits: Tensor


def contrastive_loss(
    anchors: Tensor, positives: Tensor, candidates: Candidates, temperature: float
) -> Term:
    """Returns InfoNCE (arXiv 1807.03748): − Σ_a log softmax_i( ĉ_i · â_a / τ )[i = positive of a].

    `anchors` float `[a, D]`, `positives` int64 `[a]` places among the candidates. Vectors are
    L2-normalised here. Candidates that are not valid leave the denominator, and so do those that
    show the same image as the anchor's positive, since they are no negatives.
    """
    cosines = F.normalize(anchors.float(), dim=-1) @ F.normalize(candidates.vectors, dim=-1).T
    same_image = candidates.keys[positives][:, None] == candidates.keys
    allowed = candidates.valid & ~same_image  # [a, N]
    allowed.scatter_(1, positives[:, None], torch.ones_like(positives, dtype=torch.bool)[:, None])
    logits = (cosines / temperature).masked_fill(~allowed, -torch.inf)
    loss = F.cross_entropy(logits, positives, reduction="sum")
    # Not by argmax: it favours the first of equals, and there may be no candidate at all.
    is_nearest = (logits >= logits.gather(1, positives[:, None])).sum(1) == 1
    return Term(loss, torch.tensor(len(positives), device=positives.device), is_nearest.sum())


def pv_loss(
    reconstructions: Tensor, is_anchor: Tensor, images: Candidates, temperature: float
) -> Term:
    """Returns L_pv, the loss of reconstructing clicked images (COURIER appendix §2 and §4).

    A clicked image is told from all others by its reconstruction from the images clicked before:

    − Σ_j y_j m_j log softmax_i( p̂_i · r̂_j / τ )[i = j]

    `reconstructions` float `[n, D]` of this process's PV places, `is_anchor` bool `[n]` (y_j m_j,
    with a history); `images` are the PV places of all processes, where place `images.first + j` is
    that of reconstruction j.
    """
    anchors = torch.nonzero(is_anchor)[:, 0]
    return contrastive_loss(reconstructions[anchors], images.first + anchors, images, temperature)


def ucs_loss(
    reconstructions: Tensor, is_anchor: Tensor, newest: Candidates, temperature: float
) -> Term:
    """Returns L_ucs, the loss of the user click sequence (the authors' research code).

    The newest click is told from all rows' newest clicks by its reconstruction from the older ones.

    `reconstructions` float `[rows, D]`, `is_anchor` bool `[rows]` (rows with two clicks or more);
    `newest` are the newest clicks of all processes' rows, in the same order.
    """
    return pv_loss(reconstructions, is_anchor, newest, temperature)


def masked_prediction_loss(
    predictions: Tensor, is_anchor: Tensor, images: Candidates, temperature: float
) -> Term:
    """Returns the loss of predicting masked images (COURIER appendix §2).

    A masked image is told from all others by its prediction.

    `predictions` float `[rows, D]`, `is_anchor` bool `[rows]`; `images` are all candidates, of each
    process first the rows' masked images in the same order.
    """
    return pv_loss(predictions, is_anchor, images, temperature)


def nt_xent_loss(views: Tensor, is_image: Tensor, both: Candidates, temperature: float) -> Term:
    """Returns NT-Xent, the loss of SimCLR (arXiv 2002.05709 eq. 1).

    A view of an image is told from all views of other images by the image's second view.

    `views` float `[2, n, D]` of this process, `is_image` bool `[n]` (False for padding); `both`
    holds the same for all processes, of each in turn n first views and then n second views.
    """
    n = views.shape[1]
    place = both.first + torch.arange(n, device=views.device)
    partner = torch.cat([place + n, place])  # of a first view the second view, and vice versa
    anchors = torch.nonzero(is_image.repeat(2))[:, 0]
    return contrastive_loss(views.flatten(0, 1)[anchors], partner[anchors], both, temperature)


def clip_loss(images: Candidates, titles: Candidates, own: Tensor, temperature: float) -> Term:
    """Returns CLIP's symmetric loss (arXiv 2103.00020 fig. 3): image to title and title to image.

    `images` and `titles` hold the pairs of all processes at equal places, `own` int64 `[n]` are the
    places of this process's pairs. Half of each direction, so that a pair counts as one anchor.
    """
    to_title = contrastive_loss(images.vectors[own], own, titles, temperature)
    to_image = contrastive_loss(titles.vectors[own], own, images, temperature)
    return Term((to_title.loss + to_image.loss) / 2, to_title.anchors, to_title.hits)


def simsiam_loss(predicted: Tensor, projected: Tensor) -> Term:
    """Returns the loss of SimSiam (arXiv 2011.10566 eq. 2–4).

    − ½ Σ_n [cos(p_1, sg(z_2)) + cos(p_2, sg(z_1))]

    `predicted`, `projected` float `[2, n, D]`: predictions p and projections z of both views. No
    negatives, so no candidates and no hits.
    """
    targets = projected.detach().flip(0)  # each view is compared with the other, which stands still
    loss = -F.cosine_similarity(predicted.float(), targets.float(), dim=-1).sum() / 2
    count = torch.tensor(predicted.shape[1], device=predicted.device)
    return Term(loss, count, torch.zeros_like(count))
