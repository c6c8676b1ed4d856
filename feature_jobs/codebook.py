"""Codebooks: cluster centres, the numbers that stand for them, and the life of those numbers.

A package is a folder `<codebook_id>/` with `<label>-centres.npy` float32 [clusters, 256] and
`<label>-numbers.npy` int32 [clusters] for each resolution, `codebook.json`, and `crosswalk.parquet`
where the codebook has a parent. A number's meaning never changes within a lineage, and a retired
number is not given to another cluster, so that a CTR model's ID embeddings stay valid.
"""

import hashlib
import io
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa

from feature_jobs import broadcast, storage, tables
from feature_jobs.schemas import EMBEDDING_DIM, DataContractError, OperatorError

MAIN = "main"  # the resolution of the column cluster_id
_LABEL = r"[a-z][a-z0-9_]*"
_QUANTILES = (0.05, 0.5, 0.95)


@dataclass(frozen=True)
class Resolution:
    """What `codebook.json` says of one set of centres.

    `max_id` is the highest number ever issued in the lineage; consumers size tables by max_id + 1.
    `retired` are the numbers in 1..max_id that no centre has any more. The objectives are the mean
    squared distance to the nearest centre, of the sample and of items held out from the fit (None
    where there were none). `sizes` are the sample's items per centre, `health` what `health_of`
    makes of them. `moved_items` and `moved_impressions` are the shares whose number is not the
    parent's; None without a parent, or where its numbers of these items are not known.
    """

    label: str
    clusters: int
    max_id: int
    objective: float
    held_out_objective: float | None
    health: Mapping[str, float]
    sizes: tuple[int, ...]
    retired: tuple[int, ...]
    moved_items: float | None = None
    moved_impressions: float | None = None


@dataclass(frozen=True)
class CodebookInfo:
    """What `codebook.json` says.

    `lineage` is the codebook_id of the first ancestor: numbers of two lineages mean nothing to each
    other. The data range is that of the embeddings it was fitted on, inclusive.
    """

    codebook_id: str
    encoder_id: str
    parent: str | None
    lineage: str
    mode: str
    algorithm: str
    seed: int
    soft_threshold: float
    sample_items: int
    held_out_items: int
    sample_fingerprint: str
    data_start_ds: str
    data_end_ds: str
    resolutions: tuple[Resolution, ...]

    def resolution(self, label: str) -> Resolution | None:
        """That of a label; None where the codebook has no such one."""
        return next((r for r in self.resolutions if r.label == label), None)

    @property
    def labels(self) -> tuple[str, ...]:
        """Those of all resolutions, `main` first."""
        return tuple(sorted((r.label for r in self.resolutions), key=lambda n: (n != MAIN, n)))


@dataclass(frozen=True)
class Codebook:
    """By label: centres float32 [clusters, 256] and their numbers int32 [clusters] in 1..max_id."""

    info: CodebookInfo
    centres: Mapping[str, np.ndarray]
    numbers: Mapping[str, np.ndarray]


def cluster_column(label: str) -> str:
    """The column of `item_features` that holds the cluster IDs of a resolution."""
    return "cluster_id" if label == MAIN else f"cluster_{label}"


def parse_clusters(text: str) -> dict[str, int]:
    """`10000`, or `coarse=1000,main=10000`: the number of clusters by label.

    Raises OperatorError where it is neither, or names no `main`.
    """
    found: dict[str, int] = {}
    for part in text.split(","):
        label, _, count = part.strip().rpartition("=")
        label = label.strip() or MAIN
        fits = re.fullmatch(_LABEL, label) and label != "id" and label not in found
        if not fits or not count.strip().isdecimal() or int(count) < 1:
            raise OperatorError(
                f"--clusters {text!r} is not understood at {part.strip()!r}. Give a number, or "
                "several with labels, as in coarse=1000,main=10000,fine=100000: small letters, "
                "digits and _, each label once."
            )
        found[label] = int(count)
    if MAIN not in found:
        raise OperatorError(
            f"--clusters {text!r} names no {MAIN!r}, the resolution that the column cluster_id "
            "holds; the others become columns cluster_<label>. Call one of them main."
        )
    return found


# ---- Packages ------------------------------------------------------------------------------


def codebook_id(
    name: str, centres: Mapping[str, np.ndarray], numbers: Mapping[str, np.ndarray], encoder_id: str
) -> str:
    """`<name>-<12 hex digits>` of a digest of everything that an assignment depends on."""
    hasher = hashlib.sha256(encoder_id.encode())
    for label in sorted(centres):
        hasher.update(f"{label}:{centres[label].shape}".encode())
        hasher.update(np.ascontiguousarray(centres[label], "<f4").data)
        hasher.update(np.ascontiguousarray(numbers[label], "<i4").data)
    return f"{name}-{hasher.hexdigest()[:12]}"


def save_codebook(root: str, codebook: Codebook, crosswalk: pa.Table | None = None) -> str:
    """Writes the package below `root`, `codebook.json` last; returns its folder."""
    folder = os.path.join(root, codebook.info.codebook_id)
    for label in codebook.centres:
        for kind, array in (
            ("centres", codebook.centres[label]),
            ("numbers", codebook.numbers[label]),
        ):
            data = io.BytesIO()
            np.save(data, array, allow_pickle=False)
            storage.write_bytes(os.path.join(folder, f"{label}-{kind}.npy"), data.getvalue())
    if crosswalk is not None:
        tables.write_parquet(os.path.join(folder, "crosswalk.parquet"), crosswalk)
    tables.write_json(os.path.join(folder, "codebook.json"), asdict(codebook.info))
    return folder


def read_codebook_info(folder: str) -> CodebookInfo:
    """Raises OperatorError where `folder` is no codebook package."""
    path = os.path.join(folder, "codebook.json")
    try:
        fields = tables.read_json(path)
        resolutions = tuple(
            Resolution(**{**r, "sizes": tuple(r["sizes"]), "retired": tuple(r["retired"])})
            for r in fields["resolutions"]
        )
        return CodebookInfo(**{**fields, "resolutions": resolutions})
    except (FileNotFoundError, NotADirectoryError, TypeError, KeyError) as error:
        raise OperatorError(
            f"{folder!r} is no codebook package: {path} is missing or lacks a field ({error!r}). "
            "Point at a folder made by `courier fit-codebook`."
        ) from error


def load_codebook(folder: str) -> Codebook:
    """The package, its arrays memory-mapped: the processes of a machine share one copy of them.

    Raises DataContractError where the arrays are not those that the id was made of.
    """
    info = read_codebook_info(folder)
    names = [f"{label}-{kind}.npy" for label in info.labels for kind in ("centres", "numbers")]
    try:
        near = _on_this_machine(folder, info.codebook_id, names)
        # Copied where written, which nobody does: torch takes no array that is read-only.
        arrays = {n: np.load(os.path.join(near, n), mmap_mode="c") for n in names}
    except (OSError, ValueError, EOFError) as error:
        raise _damaged(folder, str(error)) from error
    centres = {label: arrays[f"{label}-centres.npy"] for label in info.labels}
    numbers = {label: arrays[f"{label}-numbers.npy"] for label in info.labels}
    found = codebook_id(info.codebook_id.rsplit("-", 1)[0], centres, numbers, info.encoder_id)
    shapes = {r.label: (r.clusters, EMBEDDING_DIM) for r in info.resolutions}
    if found != info.codebook_id or any(centres[k].shape != shapes[k] for k in shapes):
        broadcast.discard(_key(info.codebook_id))
        raise _damaged(folder, f"its arrays {[c.shape for c in centres.values()]} make {found}")
    return Codebook(info, centres, numbers)


def _on_this_machine(folder: str, identity: str, names: list[str]) -> str:
    """`folder`, or this machine's copy of it where it lies in a bucket."""
    if not storage.is_remote(folder):
        return folder

    def copy(target: str) -> list[str]:
        for name in names:
            data = storage.read_bytes(os.path.join(folder, name))
            storage.write_bytes(os.path.join(target, name), data)
        return names

    return broadcast.shared_folder(_key(identity), copy)[0]


def _key(identity: str) -> str:
    return f"codebook-{identity}"


def _damaged(folder: str, found: str) -> DataContractError:
    return DataContractError(
        f"The codebook at {folder} is damaged: {found}. Items assigned by it would carry cluster "
        "IDs of another meaning. Restore the folder from a copy, or fit a new codebook."
    )


# ---- The life of numbers ---------------------------------------------------------------------


def continued_numbers(old: np.ndarray, place: np.ndarray, clusters: int, max_id: int) -> np.ndarray:
    """Numbers for new centres that go on meaning what they meant; int32 [clusters].

    `old` int32 [n] are the numbers that some items had, 0 = none, `place` int64 [n] the new centres
    that they fall to. A number goes to the centre that shares most items with it, pair by pair from
    the largest, each number and each centre once. A centre that is left gets a number above
    `max_id`, the highest one ever issued.
    """
    # One cell for each pair of number and centre that occurs: [pairs]
    cells, shared = np.unique(
        old[old > 0] * np.int64(clusters) + place[old > 0], return_counts=True
    )
    numbers, given = np.zeros(clusters, np.int32), set[int]()
    for cell in cells[np.argsort(-shared, kind="stable")].tolist():
        number, centre = divmod(cell, clusters)
        if number not in given and not numbers[centre]:
            numbers[centre] = number
            given.add(number)
    new = np.flatnonzero(numbers == 0)
    numbers[new] = max_id + 1 + np.arange(len(new))
    return numbers


def retired_numbers(numbers: np.ndarray, max_id: int) -> tuple[int, ...]:
    """Those in 1..max_id that no centre has."""
    return tuple(np.setdiff1d(np.arange(1, max_id + 1), numbers).tolist())


def health_of(sizes: np.ndarray) -> dict[str, float]:
    """How evenly items spread over clusters, of their numbers of items int64 [clusters].

    The perplexity is exp of the entropy of the shares: the number of equal clusters that would
    tell as much about an item as these do.
    """
    share = sizes[sizes > 0] / max(1, sizes.sum())
    low, middle, high = np.quantile(sizes, _QUANTILES).tolist()
    return {
        "items": int(sizes.sum()),
        "clusters": len(sizes),
        "used": len(share),
        "dead": len(sizes) - len(share),
        "perplexity": float(np.exp(-(share * np.log(share)).sum())) if len(share) else 0.0,
        "largest_share": float(share.max(initial=0.0)),
        "items_p5": low,
        "items_p50": middle,
        "items_p95": high,
        "items_max": int(sizes.max(initial=0)),
    }
