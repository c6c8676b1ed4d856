"""Tells what an encoder package says of itself, and which items it was made for, without torch."""

import importlib.util
import io
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_jobs.schemas import DataContractError, OperatorError
from feature_jobs.store import files
from feature_jobs.store.documents import digest, read_json, write_json

TIMM = "timm:"  # begins the names of timm's backbones
# Of encoders, codebooks and tables whose records do not tell it: once there was no other.
UNTOLD_DIMENSION = 256
DIMENSIONS = range(16, 2049)


def told(dimension: int) -> dict[str, int]:
    """Returns what a record says of a dimension; nothing of the usual one, as it always was."""
    return {} if dimension == UNTOLD_DIMENSION else {"dimension": dimension}


def dimension_of(record: Mapping[str, Any]) -> int:
    """Returns the dimension of which a record says what is `told`."""
    return int(record.get("dimension", UNTOLD_DIMENSION))


def weight(dimension: int) -> int:
    """Returns for how many rows one with a vector counts where tables are cut into shards.

    So the memory that a shard takes does not grow with the dimension.
    """
    return max(1, dimension // UNTOLD_DIMENSION)


VECTORS = "vectors"  # in the place of a backbone, of an encoder that others run
CENTRE = "centre.npy"  # in its package, where it has a centre; float32 [dimension]


@dataclass(frozen=True)
class VectorSource:
    """Says where a shop's own vectors lie, which an encoder of the kind `vectors` gives out.

    `path` is a template (`day_names`), as it was typed: a relative one begins where the shop's
    other paths do. `item` and `vector` name columns; with `as_bytes` a vector is float32,
    little-endian. What made them was `trained_on` the clicks of the shop's days from the first to
    the second, or None: on nothing of the shop, as was declared. With `centred` the package has a
    CENTRE.
    """

    path: str
    item: str
    vector: str
    as_bytes: bool = False
    require_success: bool = False
    trained_on: tuple[str, str] | None = None
    centred: bool = False

    def encoder_id(self, name: str, dimension: int, centre: np.ndarray | None) -> str:
        """Returns the ID of an encoder of this name, by all that its numbers follow from."""
        decides = [self.path, self.item, self.vector, self.as_bytes, dimension]
        data = "" if centre is None else centre.astype("<f4").tobytes().hex()
        return f"{name}-{digest([VECTORS, decides, data])[:12]}"


@dataclass(frozen=True)
class EncoderInfo:
    """Holds what `encoder.json` says of an encoder package, readable without torch.

    `categories` None means that every category is in scope. The data range is that of the training
    data, both ends inclusive; None for an encoder that was made without any. `timm` is there for a
    backbone of timm's: its `version`, and of weights from its hub `hub_id`, `revision`, `licence`.
    `lineage` has the IDs of the encoders that training went on from, the latest first; the data
    range includes theirs. `dimension` is how many numbers an embedding has, 16 to 2,048. An
    encoder with `vectors` has no images to embed, and neither weights nor preprocessing.
    """

    encoder_id: str
    backbone: str
    preprocessing: dict[str, Any]
    categories: tuple[str, ...] | None
    data_start_ds: str | None
    data_end_ds: str | None
    weights: str
    timm: dict[str, str] | None = None
    lineage: tuple[str, ...] = ()
    dimension: int = UNTOLD_DIMENSION
    vectors: VectorSource | None = None


def read_encoder_info(folder: str) -> EncoderInfo:
    """Raises OperatorError where `folder` is no encoder package, or its dimension is impossible."""
    path = os.path.join(folder, "encoder.json")
    try:
        fields = read_json(path)
        categories = fields["categories"]
        fields["categories"] = None if categories is None else tuple(categories)
        fields["lineage"] = tuple(fields.get("lineage", ()))
        fields["vectors"] = _source_of(fields["vectors"]) if "vectors" in fields else None
        info = EncoderInfo(**fields)
    except (FileNotFoundError, NotADirectoryError, TypeError, KeyError) as error:
        raise OperatorError(
            f"{folder!r} is no encoder package: {path} is missing or lacks a field ({error!r}). "
            "Point at a folder made by `courier init-encoder`, `courier train` or `courier "
            "register-vectors`."
        ) from error
    if info.dimension not in DIMENSIONS:
        raise OperatorError(
            f"{path} says that embeddings have a dimension of {info.dimension!r}; expected is a "
            f"whole number from {DIMENSIONS[0]} to {DIMENSIONS[-1]:,}. Tables of anything else "
            "would be searched with bounds that do not hold. Restore the file from its origin, or "
            "make the encoder again."
        )
    return info


def _source_of(fields: Mapping[str, Any]) -> VectorSource:
    first_last = fields.get("trained_on")
    return VectorSource(**{**fields, "trained_on": first_last and tuple(first_last)})


def read_centre(folder: str, info: EncoderInfo) -> np.ndarray | None:
    """Returns the centre of an encoder of the kind `vectors`, float32 [dimension]; None for none.

    Raises DataContractError where its package is not what its ID says.
    """
    assert info.vectors is not None
    path, centre = os.path.join(folder, CENTRE), None
    if info.vectors.centred:
        data = files.read_if_there(path)
        try:
            centre = np.asarray(np.load(io.BytesIO(data or b""), allow_pickle=False), np.float32)
        except (ValueError, EOFError, OSError) as error:
            raise DataContractError(
                f"{path} is missing or damaged ({error}), and encoder.json beside it says that it "
                "is taken off every vector. Embeddings without it would lie elsewhere than the "
                "codebook's centres. Restore the file from its origin, or register the vectors "
                "again."
            ) from error
    name = info.encoder_id.rpartition("-")[0]
    found = info.vectors.encoder_id(name, info.dimension, centre)
    if found != info.encoder_id:
        raise DataContractError(
            f"The package {folder} digests to {found}, but its encoder.json says "
            f"{info.encoder_id}: path, columns, dimension or centre were changed or damaged. Its "
            "vectors would be taken for those made under that ID. Restore the folder from its "
            "origin, or register the vectors again."
        )
    return centre


def write_encoder_info(folder: str, info: EncoderInfo) -> None:
    facts = asdict(info)
    for name in ("timm", "lineage", "vectors"):
        if not facts[name]:
            del facts[name]
    del facts["dimension"]
    write_json(os.path.join(folder, "encoder.json"), facts | told(info.dimension))


def check_name(name: str) -> None:
    """Raises OperatorError for a name that no encoder can have."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", name):
        raise OperatorError(
            f"The encoder's name is {name!r}; expected small letters, digits and hyphens, not "
            "beginning with a hyphen, since it becomes a folder name and part of the encoder_id."
        )


def check_same_scope(saved: EncoderInfo, wanted: EncoderInfo, folder: str) -> None:
    """Raises OperatorError where an encoder that is `saved` has another scope or other dates."""
    for field in ("categories", "data_start_ds", "data_end_ds", "trained_on"):
        found, expected = (
            getattr(one.vectors if field == "trained_on" else one, field, None)
            for one in (saved, wanted)
        )
        if found != expected:
            raise OperatorError(
                f"This encoder is already saved as {folder} with {field} = {found!r}, now given "
                f"as {expected!r}. One encoder_id cannot mean both; save under another name."
            )


def check_timm_is_there(backbone: str) -> None:
    """Raises OperatorError where `backbone` is of timm, which is not installed; imports nothing."""
    if backbone.startswith(TIMM) and importlib.util.find_spec("timm") is None:
        raise OperatorError(
            f"The backbone {backbone!r} is of the package timm, which is not installed here. It is "
            "optional, since torchvision's backbones do without. Install it with pip install "
            "'.[timm]' in COURIER's own folder."
        )


def in_scope(category: pa.ChunkedArray, categories: Sequence[str] | None) -> np.ndarray:
    """Tells which items an encoder was made for, bool [n].

    A null category is in scope only where all are. COURIER appendix §7: features of categories that
    it was not trained on are filled with zero.
    """
    if categories is None:
        return np.ones(len(category), bool)
    return pc.is_in(category, value_set=pa.array(categories, pa.string())).to_numpy()


def fitted_on(rows: pa.Table, categories: Sequence[str] | None) -> np.ndarray:
    """Tells which rows of `item_embeddings` codebooks are made of, bool [n].

    These are the rows in the catalogue and in scope.
    """
    return in_scope(rows["category"], categories) & rows["in_catalogue"].to_numpy()
