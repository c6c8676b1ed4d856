"""Codebooks: cluster centres, the numbers that stand for them, and the exact nearest centre.

A package is a folder `<codebook_id>/` with `centres.npy` float32 [clusters, 256], `numbers.npy`
int32 [clusters] and `codebook.json`. A number's meaning never changes within a lineage, and a
retired number is not given to another cluster, so that a CTR model's ID embeddings stay valid.
"""

import hashlib
import io
import os
from dataclasses import asdict, dataclass

import numpy as np

from feature_jobs import storage, tables
from feature_jobs.schemas import EMBEDDING_DIM, DataContractError, OperatorError

_BLOCK_CELLS = 1 << 25  # products held at once while assigning: 128 MiB


@dataclass(frozen=True)
class CodebookInfo:
    """What `codebook.json` says.

    `max_id` is the highest number ever issued in the lineage; consumers size tables by max_id + 1.
    `objective` is the mean squared distance of the sample to its centres, `sizes` the sample's
    items per centre. The data range is that of the embeddings it was fitted on, inclusive.
    """

    codebook_id: str
    encoder_id: str
    parent: str | None
    clusters: int
    max_id: int
    algorithm: str
    seed: int
    iterations: int
    sample_items: int
    sample_fingerprint: str
    objective: float
    sizes: tuple[int, ...]
    data_start_ds: str
    data_end_ds: str


@dataclass(frozen=True)
class Codebook:
    """Centres float32 [clusters, 256] and their numbers int32 [clusters], in 1..max_id."""

    info: CodebookInfo
    centres: np.ndarray
    numbers: np.ndarray


def codebook_id(name: str, centres: np.ndarray, numbers: np.ndarray, encoder_id: str) -> str:
    """`<name>-<12 hex digits>` of a digest of everything that an assignment depends on."""
    hasher = hashlib.sha256(encoder_id.encode())
    hasher.update(np.ascontiguousarray(centres, "<f4").tobytes())
    hasher.update(np.ascontiguousarray(numbers, "<i4").tobytes())
    return f"{name}-{hasher.hexdigest()[:12]}"


def save_codebook(root: str, codebook: Codebook) -> str:
    """Writes the package below `root`, `codebook.json` last; returns its folder."""
    folder = os.path.join(root, codebook.info.codebook_id)
    for name, array in (("centres", codebook.centres), ("numbers", codebook.numbers)):
        data = io.BytesIO()
        np.save(data, array, allow_pickle=False)
        storage.write_bytes(os.path.join(folder, name + ".npy"), data.getvalue())
    tables.write_json(os.path.join(folder, "codebook.json"), asdict(codebook.info))
    return folder


def read_codebook_info(folder: str) -> CodebookInfo:
    """Raises OperatorError where `folder` is no codebook package."""
    path = os.path.join(folder, "codebook.json")
    try:
        fields = tables.read_json(path)
        return CodebookInfo(**{**fields, "sizes": tuple(fields["sizes"])})
    except (FileNotFoundError, NotADirectoryError, TypeError, KeyError) as error:
        raise OperatorError(
            f"{folder!r} is no codebook package: {path} is missing or lacks a field ({error!r}). "
            "Point at a folder made by `courier fit-codebook`."
        ) from error


def load_codebook(folder: str) -> Codebook:
    """Raises DataContractError where the arrays are not those that the id was made of."""
    info = read_codebook_info(folder)
    try:
        centres, numbers = (_load(folder, name) for name in ("centres", "numbers"))
    except (OSError, ValueError, EOFError) as error:
        raise _damaged(folder, str(error)) from error
    name = info.codebook_id.rsplit("-", 1)[0]
    found = codebook_id(name, centres, numbers, info.encoder_id)
    if found != info.codebook_id or centres.shape != (info.clusters, EMBEDDING_DIM):
        raise _damaged(folder, f"its arrays {centres.shape} make {found}")
    return Codebook(info, centres, numbers)


def _load(folder: str, name: str) -> np.ndarray:
    data = storage.read_bytes(os.path.join(folder, name + ".npy"))
    array: np.ndarray = np.load(io.BytesIO(data), allow_pickle=False)
    return array


def _damaged(folder: str, found: str) -> DataContractError:
    return DataContractError(
        f"The codebook at {folder} is damaged: {found}. Items assigned by it would carry cluster "
        "IDs of another meaning. Restore the folder from a copy, or fit a new codebook."
    )


def nearest_centre(centres: np.ndarray, embeddings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The exact nearest of `centres` for each row of `embeddings`; float32 [K, 256] and [n, 256].

    Returns its index int64 [n] and the Euclidean distance float32 [n]. Of centres equally near the
    first wins. COURIER appendix §1.
    """
    nearest = np.empty(len(embeddings), np.int64)
    half_norms = 0.5 * np.einsum("kd,kd->k", centres, centres)
    block = max(1, _BLOCK_CELLS // len(centres))
    for at in range(0, len(embeddings), block):
        # argmin |x - c|² = argmax x·c - |c|²/2, one matrix product for all centres: [block, K]
        scores = embeddings[at : at + block] @ centres.T
        scores -= half_norms
        nearest[at : at + block] = scores.argmax(axis=1)
    distance = np.linalg.norm(embeddings - centres[nearest], axis=1)
    return nearest, distance.astype(np.float32)
