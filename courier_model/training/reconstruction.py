"""Reconstructs an image from the images that the user clicked before.

Axes: `B` rows, `P` PV items per row, `C` clicks per row, newest first, `D` numbers of a vector, a
multiple of the heads. Masked places are never attended to; what a row without any valid click gives
is meaningless and for the caller to leave out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from courier_model.training.settings import HEADS


class CrossAttention(nn.Module):
    """Reconstructs each item of a row from the row's clicks by attention with 4 heads.

    r_j = MultiHeadAttention(query = p_j, keys = values = c_1..c_C); the clicks are L2-normalised,
    the item is not.

    COURIER appendix §2: how an item can be reconstructed from the history *given the item* is much
    easier to learn, and says more, than which item comes next.

    The value and output projections begin as the identity, so that a reconstruction begins as a
    weighted mean of the clicks. From random ones the way back to the space of the embeddings has to
    be learned first; on a small shop, the attention then learns to tell the item by what the item
    itself has asked for sooner than the encoder learns any taste. Keys of unit length slow the
    attention down for the same reason.
    """

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(dimension, HEADS, batch_first=True)
        nn.init.eye_(self.attention.in_proj_weight.data[2 * dimension :])  # q, k, then v
        nn.init.eye_(self.attention.out_proj.weight)

    def forward(self, items: Tensor, clicks: Tensor, valid: Tensor) -> Tensor:
        """Reconstructs items `[B, P, D]` from clicks `[B, C, D]`, both float and not normalised.

        `valid` is bool `[B, C]`. Returns float `[B, P, D]`, not normalised.
        """
        clicks = F.normalize(clicks, dim=-1)
        output: Tensor = self.attention(
            items, clicks, clicks, key_padding_mask=_hidden(valid), need_weights=False
        )[0]
        return output


def mean_of_clicks(items: Tensor, clicks: Tensor, valid: Tensor) -> Tensor:
    """Gives every item of a row the mean of the row's valid clicks.

    This is the ablation without reconstruction. The clicks are L2-normalised as in
    `CrossAttention`, whose shapes these are.
    """
    clicks = F.normalize(clicks, dim=-1)
    weights = valid.to(clicks.dtype)[:, :, None]  # [B, C, 1]
    mean = (clicks * weights).sum(1) / weights.sum(1).clamp(min=1)
    return mean[:, None].expand(-1, items.shape[1], -1)


class MaskedSelfAttention(nn.Module):
    """Predicts a masked click from the rest of the sequence, without knowing the target.

    This is random masked prediction (COURIER appendix §2); the rest is both earlier and later. A
    learned vector stands in for the masked place, and learned ones tell the places apart.
    """

    def __init__(self, dimension: int, places: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(dimension, HEADS, batch_first=True)
        self.mask = nn.Parameter(torch.zeros(dimension))
        self.positions = nn.Parameter(torch.zeros(places, dimension))
        nn.init.normal_(self.mask, std=0.02)
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, sequence: Tensor, valid: Tensor, masked: Tensor) -> Tensor:
        """Predicts one place, `masked` int64 `[B]`, of each sequence, float `[B, T, D]`.

        `valid` is bool `[B, T]`. Returns float `[B, D]`: what the masked place is predicted to be.
        """
        rows = torch.arange(len(sequence), device=sequence.device)
        is_masked = torch.zeros_like(valid)
        is_masked[rows, masked] = True
        tokens = torch.where(is_masked[:, :, None], self.mask, sequence) + self.positions
        output: Tensor = self.attention(
            tokens, tokens, tokens, key_padding_mask=_hidden(valid), need_weights=False
        )[0]
        return output[rows, masked]


def _hidden(valid: Tensor) -> Tensor:
    """Returns the key padding mask, which hides nothing where nothing is valid.

    A softmax over nothing is NaN, and NaN times a mask of zeros stays NaN in the gradients.
    """
    return ~valid & valid.any(dim=1, keepdim=True)
