"""FIT-CODEBOOK fits cluster centres to one day's in-scope embeddings: occasionally, never nightly.

In: a published `item_embeddings` partition; where a codebook of another encoder is continued, an
`item_features` partition with its numbers. Out: files with a sample, and of that a codebook, which
one machine fits. Sample and held-out items are chosen by a hash of the item ID, so that they depend
neither on the order of files nor on the number of workers.

Modes (METHOD §6): `fresh` begins with new centres and new numbers. `warm` starts from the parent's
centres, `aligned`, for a new encoder, from the mean of the new embeddings of each old cluster's
members; both then give each number to the centre that keeps most of its items.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import apache_beam as beam
import numpy as np
import pyarrow as pa

from feature_jobs import laws
from feature_jobs.codebooks.codebook import (
    Codebook,
    CodebookInfo,
    Resolution,
    codebook_id,
    continued_numbers,
    health_of,
    retired_numbers,
)
from feature_jobs.codebooks.kmeans import SinglePass, count_distinct, first_centres, lloyd
from feature_jobs.codebooks.nearest import CentreSearch
from feature_jobs.schemas import OperatorError, cluster_column
from feature_jobs.store import arrays, encoder_info, files, hashing, partitions, worker_notes
from feature_jobs.store.every_shard import check_all_came

_SAMPLE_SEED, _HELD_OUT_SEED = 1, 2  # of the hashes: independent of that of the shards
_HELD_OUT_SHARE, _HELD_OUT_ITEMS = 0.05, 65_536  # the smaller of the two
_READ = ["item_id", "embedding", "category", "in_catalogue"]
_BLOCK_ROWS = 65_536
ALGORITHMS = {"lloyd": 256, "single-pass": 32}  # with the items per cluster that they sample


@dataclass(frozen=True)
class Fit:
    """Describes the fit that was asked for: clusters by label, and how to find them.

    `soft_threshold` is λ of single-pass clustering. Raises OperatorError for one that the algorithm
    has no use for.
    """

    clusters: Mapping[str, int]
    seed: int = 0
    name: str = "codebook"
    algorithm: str = "lloyd"
    mode: str = "fresh"
    points_per_cluster: int = ALGORITHMS["lloyd"]
    soft_threshold: float = 0.0

    def __post_init__(self) -> None:
        if self.soft_threshold and self.algorithm != "single-pass":
            raise OperatorError(
                "--soft-threshold makes the centres of single-pass clustering sparse; lloyd has no "
                "such thing and would ignore it. Say --algorithm single-pass, or leave it out."
            )


@dataclass(frozen=True)
class SampleJob:
    """Holds all that the workers that draw a sample need to know.

    `embeddings` have vectors of so many `dimension`s. `fraction` of the in-scope catalogue items is
    drawn, and `held_out` of them kept apart; `categories` None means all. `old` are `item_features`
    that tell the parent's numbers of the items, of `old_labels`; None where they are not asked for.
    """

    embeddings: partitions.Partition
    dimension: int
    categories: tuple[str, ...] | None
    fraction: float
    held_out: float
    staging: str
    old: partitions.Partition | None = None
    old_labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sample:
    """Holds the sampled points, and those held out from the fit.

    `points` float32 [n, d] stand by the hash of their items' IDs; `held_out` is float32 [h, d].
    The fingerprint is the exclusive or of the points' item hashes, hex. `old` are the parent's
    numbers of the points by label, int32 [n], 0 = none.
    """

    points: np.ndarray
    held_out: np.ndarray
    fingerprint: str
    old: Mapping[str, np.ndarray] = field(default_factory=dict)


# ---- Pure functions: the sample --------------------------------------------------------------


def count_in_scope(embeddings: partitions.Partition, categories: tuple[str, ...] | None) -> int:
    """Counts the items that there are to fit on; reads two narrow columns, file by file."""
    total = 0
    for path in embeddings.paths:
        rows = partitions.read_parquet(path, ["category", "in_catalogue"])
        total += int(encoder_info.fitted_on(rows, categories).sum())
    return total


def sampling_shares(items: int, clusters: int, points_per_cluster: int) -> tuple[float, float]:
    """Returns the shares of the in-scope items to sample and to hold out.

    The sample's is a share of those that are not held out.
    """
    held_out = min(_HELD_OUT_SHARE, _HELD_OUT_ITEMS / max(1, items))
    return min(1.0, clusters * points_per_cluster / max(1.0, items * (1 - held_out))), held_out


def draw_sample(rows: pa.Table, job: SampleJob) -> pa.Table:
    """Returns the catalogue's in-scope rows of `item_embeddings` to fit on, or to hold out."""
    held_out = hashing.drawn(rows["item_id"], job.held_out, _HELD_OUT_SEED)
    wanted = held_out | hashing.drawn(rows["item_id"], job.fraction, _SAMPLE_SEED)
    drawn = rows.select(["item_id", "embedding"]).append_column("held_out", pa.array(held_out))
    return drawn.filter(pa.array(wanted & encoder_info.fitted_on(rows, job.categories)))


def check_distinct(points: np.ndarray, clusters: int) -> None:
    """Raises OperatorError where there are fewer distinct points than clusters."""
    distinct = count_distinct(points)
    if distinct < clusters:
        raise OperatorError(
            f"{clusters:,} clusters were asked for, but the sample of {len(points):,} in-scope "
            f"items has only {distinct:,} distinct embeddings, so that clusters would be empty. "
            f"Ask for at most {distinct:,}, sample more items with --points-per-cluster, or fit on "
            "a larger catalogue."
        )


# ---- Pure functions: the fit -----------------------------------------------------------------


def starting_centres(
    points: np.ndarray, anchors: np.ndarray, members: np.ndarray, clusters: int, seed: int
) -> np.ndarray:
    """Returns first centres float32 [clusters, d] of a fit that continues another one.

    `anchors` float32 [old, d] stand for the old clusters, `members` int64 [old] are their items
    in the sample. The largest come first; where they are too few, or have no items, random points
    take their place.
    """
    largest = np.argsort(-members, kind="stable")[:clusters]
    kept = np.sort(largest[members[largest] > 0])
    rng = np.random.default_rng(seed)
    drawn = rng.choice(len(points), clusters - len(kept), replace=False)
    return np.concatenate([anchors[kept], points[np.sort(drawn)]]).astype(np.float32)


def member_means(
    points: np.ndarray, old: np.ndarray, numbers: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean point, float32 [k, d], and the members, int64 [k], of `numbers` int32 [k].

    `old` int32 [n] are the points' numbers. One without members has the mean 0.
    """
    order = np.argsort(numbers)
    at = np.minimum(np.searchsorted(numbers, old, sorter=order), len(numbers) - 1)
    place = np.where(numbers[order[at]] == old, order[at], len(numbers))  # [n]; last one = none
    members = np.bincount(place, minlength=len(numbers) + 1)
    sums = np.zeros((len(numbers) + 1, points.shape[1]))
    blocks = max(1, len(points) // _BLOCK_ROWS)
    for rows in np.array_split(np.argsort(place, kind="stable"), blocks):
        # Rows of one number are neighbours: one sum for each run of them, [runs, d].
        starts = np.flatnonzero(np.diff(place[rows], prepend=-1))
        if len(starts):
            sums[place[rows[starts]]] += np.add.reduceat(points[rows], starts, dtype=np.float64)
    means = sums[:-1] / np.maximum(1, members[:-1])[:, None]
    return means.astype(np.float32), members[:-1]


def make_codebook(
    sample: Sample,
    fit: Fit,
    encoder_id: str,
    ds: str,
    parent: Codebook | None = None,
    stream: Iterable[np.ndarray] = (),
) -> Codebook:
    """Fits all resolutions and numbers their centres.

    `parent` is continued, or in mode `fresh` only its numbers are not used again. `stream` has all
    in-scope embeddings float32 [any, d], which only single-pass clustering reads.
    Raises OperatorError where there are fewer distinct points than clusters.
    """
    check_distinct(sample.points, max(fit.clusters.values()))
    old, starts = _continue(sample, fit, parent)
    centres = _fit_centres(sample.points, fit, starts, stream)
    max_ids = parent.info.max_ids if parent else {}
    numbers, resolutions = {}, []
    for label in fit.clusters:
        numbers[label], found = _number(
            sample, label, centres[label], old.get(label), max_ids.pop(label, 0)
        )
        resolutions.append(found)
    # What is continued knows the days that the parent was made of.
    known = parent.info if parent and fit.mode != "fresh" else None
    info = CodebookInfo(
        codebook_id="",
        encoder_id=encoder_id,
        ancestors=(parent.info.codebook_id, *parent.info.ancestors) if parent else (),
        mode=fit.mode,
        algorithm=fit.algorithm,
        seed=fit.seed,
        soft_threshold=fit.soft_threshold,
        sample_items=len(sample.points),
        held_out_items=len(sample.held_out),
        sample_fingerprint=sample.fingerprint,
        data_start_ds=min(ds, known.data_start_ds) if known else ds,
        data_end_ds=max(ds, known.data_end_ds) if known else ds,
        left_out=max_ids,
        resolutions=tuple(resolutions),
        dimension=sample.points.shape[1],
    )
    identity = codebook_id(fit.name, centres, numbers, info.made_of)
    return Codebook(replace(info, codebook_id=identity), centres, numbers)


def _continue(
    sample: Sample, fit: Fit, parent: Codebook | None
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Returns, by label, the parent's numbers of the sample's points, and the first centres.

    The numbers are int32 [n], the centres float32 [clusters, d]; both are empty where no
    resolution is continued.
    """
    if parent is None or fit.mode == "fresh":
        return {}, {}
    old, starts = {}, {}
    for label in set(fit.clusters) & set(parent.centres):
        if fit.mode == "aligned":
            old[label] = sample.old[label]
            _check_followed(old[label], label, parent)
        else:
            place = CentreSearch(parent.centres[label]).nearest(sample.points).place
            old[label] = np.asarray(parent.numbers[label])[place]
        means, members = member_means(sample.points, old[label], parent.numbers[label])
        anchors = means if fit.mode == "aligned" else parent.centres[label]
        clusters = fit.clusters[label]
        starts[label] = starting_centres(sample.points, anchors, members, clusters, fit.seed)
    return old, starts


def _check_followed(old: np.ndarray, label: str, parent: Codebook) -> None:
    if not (old > 0).any():
        raise OperatorError(
            f"Not one of the {len(old):,} sampled items had a cluster ID ({label}) of codebook "
            f"{parent.info.codebook_id}, so that no number could be kept. Mode aligned needs items "
            "that both know: are the item IDs written alike? Or say --mode fresh."
        )


def _fit_centres(
    points: np.ndarray, fit: Fit, starts: Mapping[str, np.ndarray], stream: Iterable[np.ndarray]
) -> dict[str, np.ndarray]:
    """Returns the centres by label; the stream is read once for all of them."""
    if fit.algorithm == "lloyd":
        return {k: lloyd(points, n, fit.seed, starts.get(k)) for k, n in fit.clusters.items()}
    passes = {
        label: SinglePass(
            starts[label] if label in starts else first_centres(points, clusters, fit.seed),
            fit.soft_threshold,
        )
        for label, clusters in fit.clusters.items()
    }
    for rows in stream:
        for single_pass in passes.values():
            single_pass.add(rows)
    return {label: single_pass.centres() for label, single_pass in passes.items()}


def _number(
    sample: Sample, label: str, centres: np.ndarray, old: np.ndarray | None, max_id: int
) -> tuple[np.ndarray, Resolution]:
    """Returns the numbers of `centres` and what the artefact says of them."""
    clusters, search = len(centres), CentreSearch(centres)
    found, held_out = search.nearest(sample.points), search.nearest(sample.held_out)
    old = np.zeros(len(found.place), np.int32) if old is None else old
    numbers = continued_numbers(old, found.place, clusters, max_id)
    max_id = max(max_id, int(numbers.max()))
    sizes = np.bincount(found.place, minlength=clusters)
    return numbers, Resolution(
        label=label,
        clusters=clusters,
        max_id=max_id,
        objective=_mean_square(found.distance),
        held_out_objective=_mean_square(held_out.distance) if len(sample.held_out) else None,
        health=health_of(sizes),
        sizes=tuple(sizes.tolist()),
        retired=retired_numbers(numbers, max_id),
    )


def _mean_square(distance: np.ndarray) -> float:
    return float((distance.astype(np.float64) ** 2).mean())


# ---- Transforms ----------------------------------------------------------------------------


class SamplePart(beam.DoFn):
    """Turns the number of a part of `item_embeddings` into a file with the sample of its rows."""

    def __init__(self, job: SampleJob):
        self._job, self.staging = job, job.staging

    @worker_notes.refusing
    def process(self, part: int) -> None:
        job = self._job
        paths = job.embeddings.paths
        sample = draw_sample(partitions.read_parquet(paths[part], _READ), job)
        points = arrays.embedding_matrix(sample["embedding"], job.dimension)
        laws.check_unit(points, sample["item_id"])
        if job.old:
            numbers = partitions.cluster_numbers(
                job.old, part, len(paths), sample["item_id"], job.old_labels
            )
            for label, column in numbers.items():
                sample = sample.append_column(cluster_column(label), pa.array(column))
        partitions.write_parquet(_sample_path(job, part), sample)


# ---- The job -------------------------------------------------------------------------------


def define_sample(root: beam.Pipeline, job: SampleJob) -> None:
    """Writes the sample of each part of `job.embeddings` as a file."""
    job = replace(job, embeddings=job.embeddings.slim(), old=job.old and job.old.slim())
    _ = (
        root
        | "Parts" >> beam.Create(range(len(job.embeddings.paths)))
        | "SamplePart" >> beam.ParDo(SamplePart(job))
    )


def _sample_path(job: SampleJob, part: int) -> str:
    return os.path.join(job.staging, "sample", f"{part:05d}.parquet")


def parts_sampled(job: SampleJob) -> int:
    """Returns of how many parts the sample is there."""
    return len(files.list_names(os.path.dirname(_sample_path(job, 0))))


def read_sample(job: SampleJob) -> Sample:
    """Reads all sampled rows, each to its place at once: no second copy of the matrix is made.

    Raises DataContractError where those of a part are not there.
    """
    paths = [_sample_path(job, part) for part in range(len(job.embeddings.paths))]
    check_all_came("parts of item_embeddings that were sampled", parts_sampled(job), len(paths))
    narrow = ["item_id", "held_out", *map(cluster_column, job.old_labels)]
    rows = pa.concat_tables(partitions.read_parquet(path, narrow) for path in paths)
    hashes, held_out = hashing.hash_ids(rows["item_id"], _SAMPLE_SEED), rows["held_out"].to_numpy()
    order = np.lexsort((hashes, held_out))  # the points first, then what is held out
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    matrix = np.empty((len(order), job.dimension), np.float32)
    at = 0
    for path in paths:
        column = partitions.read_parquet(path, ["embedding"])["embedding"]
        part = arrays.embedding_matrix(column, job.dimension)
        matrix[place[at : at + len(part)]] = part
        at += len(part)
    fitted = order[: int((~held_out).sum())]
    return Sample(
        points=matrix[: len(fitted)],
        held_out=matrix[len(fitted) :],
        fingerprint=f"{int(np.bitwise_xor.reduce(hashes[fitted])):016x}",
        old={k: rows[cluster_column(k)].to_numpy()[fitted] for k in job.old_labels},
    )


def stream_embeddings(job: SampleJob) -> Iterator[np.ndarray]:
    """Yields all in-scope embeddings that are not held out, part by part and shuffled within each.

    So items of one time or kind don't come together; the next part is read meanwhile.
    """
    paths = job.embeddings.paths
    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(partitions.read_parquet, paths[0], _READ)
        for following in [*paths[1:], None]:
            rows = ahead.result()
            if following:
                ahead = reader.submit(partitions.read_parquet, following, _READ)
            held_out = hashing.drawn(rows["item_id"], job.held_out, _HELD_OUT_SEED)
            kept = np.flatnonzero(encoder_info.fitted_on(rows, job.categories) & ~held_out)
            hashes = hashing.hash_ids(rows["item_id"], _SAMPLE_SEED)[kept]
            order = kept[np.argsort(hashes)]
            points = arrays.embedding_matrix(rows["embedding"], job.dimension)[order]
            laws.check_unit(points, rows["item_id"].take(pa.array(order)))
            yield points
