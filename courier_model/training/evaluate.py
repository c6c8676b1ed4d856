"""Measures, while an encoder trains, what it is worth on days that it was not trained on.

The held-out measure asks what SimScores will be asked, with histories as long as the night's: how
well do an impression's cosines with what its user had clicked before rank clicked over unclicked
impressions? See `courier_model.measures`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from courier_model.measures import HeldOut, colour_histogram, rank_clicks
from courier_model.training.augment import centre_crop
from courier_model.training.distributed import Process, total
from courier_model.training.objectives import Objective, Places
from courier_model.training.rows import Codes, Squares, TrainingSet, valid_first

_BLOCK_IMAGES = 64

Pixels = npt.NDArray[np.uint8]
Features = Callable[[Tensor], Tensor]  # uint8 [n, 3, S, S] -> float32 [n, D]


@dataclass(frozen=True)
class Vectors:
    """Holds a vector for each of the images that the held-out rows show.

    `values` float32 `[items, d]`, not normalised; `keys` int64 `[items]`, equal for equal content;
    `known` bool `[items]`, False for an image that cannot be read.
    """

    values: np.ndarray
    keys: np.ndarray
    known: np.ndarray

    def take(self, at: npt.NDArray[np.int64]) -> Vectors:
        return Vectors(self.values[at], self.keys[at], self.known[at])


class Evaluation:
    """Measures on rows of later days and their images.

    `histories` int64 [rows, n] are codes of what each row's user had clicked before, -1 = none.
    """

    def __init__(self, rows: TrainingSet, histories: Codes, cache: Squares) -> None:
        self._cache = cache
        shown = np.concatenate([rows.pv, rows.clicks, histories], axis=1)
        self.codes = np.unique(shown[shown >= 0])  # of the images that are looked at
        # From here on items are places in `codes`; -1 stays.
        pv, clicks, self._histories = (
            np.where(c >= 0, np.searchsorted(self.codes, c), -1)
            for c in (rows.pv, rows.clicks, histories)
        )
        self._rows = replace(rows, pv=pv, clicks=clicks)

    def embed(self, features: Features, size: int, process: Process) -> Vectors:
        """Returns the features of all images, of `size` pixels; each process sees to a share."""
        return embed(self._cache, self.codes, features, size, process)

    def colours(self, process: Process) -> Vectors:
        """Returns all images' colour histograms: an encoder worth no more has learned nothing."""
        return _vectors(self._cache, self.codes, colour_histogram, process)

    def rank_clicks(self, vectors: Vectors) -> HeldOut:
        """Returns AUC and GAUC of clicked over unclicked impressions, by cosines with history."""
        rows = self._rows
        return rank_clicks(
            vectors.values, vectors.known, rows.pv, rows.clicked, self._histories, rows.users
        )

    def ranked(self, vectors: Vectors) -> str:
        """Returns what tells the impressions that such vectors rank from any others."""
        rows = self._rows
        found = hashlib.sha256()
        for part in (self.codes, rows.pv, rows.clicked, self._histories, rows.users, vectors.known):
            found.update(np.ascontiguousarray(part).tobytes())
        return found.hexdigest()[:12]

    def nearest(
        self, vectors: Vectors, objective: Objective, batch_rows: int, device: torch.device
    ) -> float | None:
        """Returns the share of reconstructions whose own PV is nearest in a batch of held-out rows.

        None where the objective reconstructs nothing, or no row has a clicked PV.
        """
        if not objective.reconstructs:
            return None
        rows = self._rows
        known = np.append(vectors.known, False)  # code -1 finds the last
        pv = np.where(known[rows.pv], rows.pv, -1)
        clicks = valid_first(np.where(known[rows.clicks], rows.clicks, -1))
        clicked = rows.clicked & (pv >= 0)
        chosen = np.flatnonzero(clicked.any(1) & (clicks[:, 0] >= 0))[:batch_rows]
        if not len(chosen):
            return None
        keys, at_pv, is_clicked, at_clicks = (
            torch.from_numpy(a).to(device)
            for a in (vectors.keys, pv[chosen], clicked[chosen], clicks[chosen])
        )
        places = Places(keys, at_pv, is_clicked, at_clicks)
        with torch.no_grad():
            terms = objective(torch.from_numpy(vectors.values)[None].to(device), places)
        term = terms[objective.reconstructs]
        return int(term.hits) / int(term.anchors)


def embed(
    cache: Squares, codes: npt.NDArray[np.int64], features: Features, size: int, process: Process
) -> Vectors:
    """Returns the features of the images of `codes` [items]; each process sees to a share."""

    def of_squares(squares: Pixels) -> np.ndarray:
        images = torch.from_numpy(np.ascontiguousarray(centre_crop(squares, size)))
        with torch.no_grad():
            return features(images.to(process.device)).cpu().numpy()

    return _vectors(cache, codes, of_squares, process)


def _vectors(
    cache: Squares, codes: npt.NDArray[np.int64], of_squares: Callable[[Pixels], np.ndarray],
    process: Process,
) -> Vectors:  # fmt: skip
    found: dict[str, list[np.ndarray]] = {"values": [], "keys": [], "known": []}
    for at in range(0, len(codes), _BLOCK_IMAGES * process.size):
        # Every process has a block, so that all have the same shapes; most but the last full.
        block = codes[at : at + _BLOCK_IMAGES * process.size]
        mine = np.array_split(np.arange(len(block)), process.size)[process.rank]
        squares, keys, known = cache.read(block[mine])
        values = of_squares(squares)
        # Sums of zeros and one process's numbers; of bools there are none.
        parts = {"values": values, "keys": keys, "known": known.astype(np.int8)}
        for name, part in parts.items():
            whole = np.zeros((len(block), *part.shape[1:]), part.dtype)
            whole[mine] = part
            tensor = torch.from_numpy(whole).to(process.device)
            found[name].append(total(tensor).cpu().numpy())
    values, keys, known = (np.concatenate(parts) for parts in found.values())
    return Vectors(values, keys, known.astype(bool))
