"""Keeps codebooks: cluster centres, the numbers that stand for them, and the life of those numbers.

A package is a folder `<codebook_id>/` with `<label>-centres.npy` float32 [clusters, d] and
`<label>-numbers.npy` int32 [clusters] for each resolution, `codebook.json`, and `crosswalk.parquet`
where the codebook has a parent. A number's meaning never changes within a lineage, and a retired
number is not given to another cluster, so that a CTR model's ID embeddings stay valid.
"""

import hashlib
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa

from feature_jobs.schemas import MAIN, DataContractError, OperatorError
from feature_jobs.store import broadcast, documents, files, partitions
from feature_jobs.store.encoder_info import UNTOLD_DIMENSION, told

_QUANTILES = (0.05, 0.5, 0.95)
_SAME = 0.25  # of a number's items or of a centre's: with fewer in common, they are not the same


@dataclass(frozen=True)
class Resolution:
    """Holds what `codebook.json` says of one set of centres.

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

    @property
    def numbers(self) -> np.ndarray:
        """Returns the numbers of all centres, ascending: what is not retired; int64 [clusters]."""
        return np.flatnonzero(self.in_use)

    @property
    def in_use(self) -> np.ndarray:
        """Tells of 0..max_id which are numbers of a centre; bool [max_id + 1]."""
        found = np.ones(self.max_id + 1, bool)
        found[[0, *self.retired]] = False
        return found


@dataclass(frozen=True)
class CodebookInfo:
    """Holds what `codebook.json` says of a codebook.

    `ancestors` are the codebook_ids of parent, grandparent and so on; between two codebooks of
    which neither is the other's ancestor, even equal numbers mean nothing. `mode` and `algorithm`
    are those of `Fit`; the sample's fingerprint is the exclusive or of the hashes of its item IDs.
    The data range is that of the embeddings it knows of, inclusive. `left_out` has the `max_id` of
    labels that only ancestors have. `dimension` is that of its encoder.
    """

    codebook_id: str
    encoder_id: str
    ancestors: tuple[str, ...]
    mode: str
    algorithm: str
    seed: int
    soft_threshold: float
    sample_items: int
    held_out_items: int
    sample_fingerprint: str
    data_start_ds: str
    data_end_ds: str
    left_out: Mapping[str, int]
    resolutions: tuple[Resolution, ...]
    dimension: int = UNTOLD_DIMENSION

    def resolution(self, label: str) -> Resolution:
        """Returns the resolution of a label; raises KeyError where the codebook has no such one."""
        return {r.label: r for r in self.resolutions}[label]

    @property
    def parent(self) -> str | None:
        return self.ancestors[0] if self.ancestors else None

    @property
    def made_of(self) -> tuple[str | None, ...]:
        """Returns what the identity of a codebook holds beside its arrays."""
        return self.encoder_id, self.parent, self.data_end_ds

    @property
    def max_ids(self) -> dict[str, int]:
        """Returns the highest number ever issued in the lineage, by label."""
        return {**self.left_out, **{r.label: r.max_id for r in self.resolutions}}

    @property
    def labels(self) -> tuple[str, ...]:
        """Returns the labels of all resolutions, `main` first."""
        return tuple(sorted((r.label for r in self.resolutions), key=lambda n: (n != MAIN, n)))


@dataclass(frozen=True)
class Codebook:
    """Holds, by label, centres float32 [clusters, d] and their numbers int32 [clusters].

    The numbers are in 1..max_id.
    """

    info: CodebookInfo
    centres: Mapping[str, np.ndarray]
    numbers: Mapping[str, np.ndarray]


# ---- Packages ------------------------------------------------------------------------------


def codebook_id(
    name: str,
    centres: Mapping[str, np.ndarray],
    numbers: Mapping[str, np.ndarray],
    made_of: Sequence[str | None],
) -> str:
    """Returns `<name>-<12 hex digits>` of a digest of all that an assignment depends on.

    The digest also holds what the codebook was `made_of`: encoder, parent and day, so that a later
    fit never takes an earlier one's place.
    """
    hasher = hashlib.sha256(documents.canonical_json(list(made_of)))
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
            files.write_bytes(os.path.join(folder, f"{label}-{kind}.npy"), data.getvalue())
    if crosswalk is not None:
        partitions.write_parquet(os.path.join(folder, "crosswalk.parquet"), crosswalk)
    facts = asdict(codebook.info)
    del facts["dimension"]
    facts |= told(codebook.info.dimension)
    documents.write_json(os.path.join(folder, "codebook.json"), facts)
    return folder


def read_codebook_info(folder: str) -> CodebookInfo:
    """Raises OperatorError where `folder` is no codebook package."""
    path = os.path.join(folder, "codebook.json")
    try:
        fields = documents.read_json(path)
        resolutions = tuple(
            Resolution(**{**r, "sizes": tuple(r["sizes"]), "retired": tuple(r["retired"])})
            for r in fields["resolutions"]
        )
        ancestors = tuple(fields["ancestors"])
        return CodebookInfo(**{**fields, "resolutions": resolutions, "ancestors": ancestors})
    except (FileNotFoundError, NotADirectoryError, TypeError, KeyError) as error:
        raise OperatorError(
            f"{folder!r} is no codebook package: {path} is missing or lacks a field ({error!r}). "
            "Point at a folder made by `courier fit-codebook` of this version."
        ) from error


def load_codebook(folder: str) -> Codebook:
    """Loads the package in `folder`, its arrays memory-mapped.

    The processes of a machine share one copy of them.

    Raises DataContractError where the arrays are not those that the id was made of.
    """
    info = read_codebook_info(folder)
    names = [f"{label}-{kind}.npy" for label in info.labels for kind in ("centres", "numbers")]
    try:
        near = _on_this_machine(folder, info.codebook_id, names)
        # Copied where written, which nobody does: torch takes no array that is read-only.
        arrays = {n: np.load(os.path.join(near, n), mmap_mode="c") for n in names}
    except (FileNotFoundError, ValueError, EOFError) as error:
        broadcast.discard(key_of_copy(info.codebook_id))
        raise _damaged(folder, str(error)) from error
    centres = {label: arrays[f"{label}-centres.npy"] for label in info.labels}
    numbers = {label: arrays[f"{label}-numbers.npy"] for label in info.labels}
    found = codebook_id(info.codebook_id.rsplit("-", 1)[0], centres, numbers, info.made_of)
    fits = all(
        centres[r.label].shape == (r.clusters, info.dimension)
        and numbers[r.label].max() <= r.max_id
        for r in info.resolutions
    )
    if found != info.codebook_id or not fits:
        broadcast.discard(key_of_copy(info.codebook_id))
        raise _damaged(folder, f"its arrays {[c.shape for c in centres.values()]} make {found}")
    return Codebook(info, centres, numbers)


def _on_this_machine(folder: str, identity: str, names: list[str]) -> str:
    """Returns `folder`, or this machine's copy of it where it lies in a bucket."""
    if not files.is_remote(folder):
        return folder

    def copy(target: str) -> list[str]:
        for name in names:
            data = files.read_bytes(os.path.join(folder, name))
            files.write_bytes(os.path.join(target, name), data)
        return names

    return broadcast.shared_folder(key_of_copy(identity), copy)[0]


def key_of_copy(identity: str) -> str:
    """Names this machine's copy of a codebook in a bucket."""
    return f"codebook-{identity}"


def _damaged(folder: str, found: str) -> DataContractError:
    return DataContractError(
        f"The codebook at {folder} is damaged: {found}. Items assigned by it would carry cluster "
        "IDs of another meaning. Restore the folder from a copy, or fit a new codebook."
    )


# ---- The life of numbers ---------------------------------------------------------------------


def continued_numbers(old: np.ndarray, place: np.ndarray, clusters: int, max_id: int) -> np.ndarray:
    """Returns numbers for new centres that go on meaning what they meant; int32 [clusters].

    `old` int32 [n] are the numbers that some items had, 0 = none, `place` int64 [n] the new centres
    that they fall to. A number goes to the centre that shares most items with it, pair by pair from
    the largest, each number and each centre once, as long as what they share is a quarter of the
    number's items or of the centre's. A centre that is left gets a number above `max_id`, the
    highest one ever issued.
    """
    old, place = old[old > 0], place[old > 0]
    # One cell for each pair of number and centre that occurs: [pairs]
    cells, shared = np.unique(old * np.int64(clusters) + place, return_counts=True)
    number, centre = np.divmod(cells, clusters)
    least = np.minimum(np.bincount(old)[number], np.bincount(place)[centre]) if len(old) else shared
    order = np.argsort(-shared, kind="stable")
    order = order[(shared >= _SAME * least)[order]]
    numbers, given = np.zeros(clusters, np.int32), set[int]()
    for one, other in zip(number[order].tolist(), centre[order].tolist(), strict=True):
        if one not in given and not numbers[other]:
            numbers[other] = one
            given.add(one)
    new = np.flatnonzero(numbers == 0)
    numbers[new] = max_id + 1 + np.arange(len(new))
    return numbers


def retired_numbers(numbers: np.ndarray, max_id: int) -> tuple[int, ...]:
    """Returns the numbers in 1..max_id that no centre has."""
    return tuple(np.setdiff1d(np.arange(1, max_id + 1), numbers).tolist())


def health_of(sizes: np.ndarray) -> dict[str, float]:
    """Tells how evenly items spread over clusters that have `sizes` int64 [clusters] items.

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
