"""Reads the encoder and codebook that settings pin for a day, checked to fit it and each other."""

import datetime as dt
import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

from feature_jobs.codebooks import codebook as codebooks
from feature_jobs.schemas import OperatorError
from feature_jobs.store import encoder_info, files
from pipelines.config import PackagePath, Pin, Settings

T = TypeVar("T")


def with_candidate(settings: Settings, encoder: str) -> Settings:
    """Returns the settings under which the package folder `encoder` embeds beside the nights.

    Its embeddings go into a feature set of their own. Raises OperatorError where it is no package.
    """
    pin = Pin(from_ds=dt.date.min, encoder=PackagePath(files.absolute(encoder)))
    info = encoder_info.read_encoder_info(pin.encoder)
    feature_set = settings.layout.candidate(info.encoder_id).feature_set
    return settings.model_copy(update={"feature_set": feature_set, "pins": (pin,)})


class PinnedArtefacts:
    """Holds the encoder and codebook that are pinned for ds.

    `allow_overlap` lets them be made from data of ds or later days. `known` are artefacts that days
    planned together have read already, by folder.
    """

    def __init__(
        self, settings: Settings, ds: dt.date, allow_overlap: bool = False,
        known: dict[str, Any] | None = None,
    ):  # fmt: skip
        self._settings, self._ds, self._allow_overlap = settings, ds, allow_overlap
        self._known = {} if known is None else known

    @functools.cached_property
    def pin(self) -> Pin:
        return self._settings.pin_for(self._ds)

    @functools.cached_property
    def encoder(self) -> encoder_info.EncoderInfo:
        return self._read(encoder_info.read_encoder_info, self.pin.encoder)

    @functools.cached_property
    def codebook(self) -> codebooks.CodebookInfo:
        """Reads the pinned codebook; raises OperatorError for none, or one of another encoder."""
        if self.pin in self._settings.half_pins:
            raise OperatorError(self.pin.way_to_a_codebook)
        if self.pin.codebook is None:
            raise OperatorError(
                f"The pin that holds for ds {self._ds} (from_ds {self.pin.from_ds}) names no "
                "codebook, and the night never fits one. Run `courier embed` and `courier "
                "fit-codebook` for an earlier day, and add the stanza that it prints."
            )
        info = self._read(codebooks.read_codebook_info, self.pin.codebook)
        mine, theirs = self.encoder, info
        if (mine.encoder_id, mine.dimension) != (theirs.encoder_id, theirs.dimension):
            raise OperatorError(
                f"The pin from {self.pin.from_ds} mixes two encoders: its encoder is "
                f"{mine.encoder_id}, of {mine.dimension:,} dimensions, but its codebook "
                f"{info.codebook_id} was fitted on embeddings of {info.encoder_id}, of "
                f"{theirs.dimension:,}. Distances between the two mean nothing. Pin the codebook's "
                "own encoder, or fit a codebook on the new embeddings."
            )
        return info

    def _read(self, read: Callable[[str], T], folder: str) -> T:
        if folder not in self._known:
            self._known[folder] = read(folder)
        return cast(T, self._known[folder])

    def identities(self) -> dict[str, str]:
        return {"encoder_id": self.encoder.encoder_id, "codebook_id": self.codebook.codebook_id}

    def overlap(self, what: str, data_end_ds: str | None) -> dict[str, bool]:
        """Refuses an artefact made from ds or later, but on the first day or when allowed."""
        if data_end_ds is None or data_end_ds < str(self._ds):
            return {}
        if self._allow_overlap:
            return {f"{what}_overlap_allowed": True}
        first = min((p.from_ds for p in self._settings.pins if p.codebook), default=self._ds)
        if self._ds == first:
            return {"bootstrap": True}
        raise OperatorError(
            f"The pinned {what} was made from data up to ds {data_end_ds}, but is to make features "
            f"of ds {self._ds}: they would know their own future, look better offline than they "
            f"are, and fail online. Pin a {what} made from days before {self._ds}, or say "
            "--allow-overlap, which the manifest will record."
        )
