"""Measures which vectors tell more of what users click, over published tables, without a CTR model.

One hash bucket of the users is taken as it is: what they were shown on ds, each impression with the
history of its own moment, made by the functions that the night calls of what the night reads.
An impression's scores are the cosines of its item with those of its history, by the published
`item_embeddings` of ds: by their mean, and by the largest, clicked impressions are ranked over
unclicked ones (`courier_model.measures`). All encoders are measured on the same impressions, those
that each of them can score, and compared user by user; beside them stands the colour histogram.

The log is read row group by row group, of which the bucket's rows alone are kept, and embeddings
are looked up: what is in memory grows with the sample and not with the shop.
"""

import contextlib
import datetime as dt
import difflib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from courier_model.image_files import Image, read_image
from courier_model.images import Preprocessing
from courier_model.measures import (
    Estimate,
    HeldOut,
    colour_histogram,
    history_cosines,
    numbers,
    rank_scores,
)
from feature_jobs.impressions.histories import clicks_of, codes_of, history_lists
from feature_jobs.impressions.simscore import read_impressions
from feature_jobs.inputs import RowGroup, Source, day_end
from feature_jobs.schemas import (
    ITEM_EMBEDDINGS,
    CourierError,
    DataContractError,
    InputNotReady,
    OperatorError,
)
from feature_jobs.store import arrays, encoder_info, files, hashing
from feature_jobs.store.encoder_info import EncoderInfo
from feature_jobs.store.partitions import Partition, find_published
from pipelines.config import Settings
from pipelines.planning.day_plan import DayPlan, NightOptions, Range
from pipelines.planning.impressions import LogOfDay, histories_job, plan_histories
from pipelines.running.layout import Layout

Say = Callable[[str], None]
HISTOGRAM = "colour histogram"
_READERS = 4  # of the log: so many row groups are in memory at once
_IMAGE_READERS = 16  # images are small, and may be far away
_IMAGES_AT_ONCE = 1024
_READABLE = 0.9  # of fewer images, the histogram would leave out too many impressions of all others
_CELLS = 64  # of a histogram
_SMALL = Preprocessing(32, 32, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_COLUMNS = ("item_id", "embedding", "image_uri", "category")


@dataclass(frozen=True)
class Asked:
    """Names what is measured, by packages of `encoders` and by `feature_sets`.

    The sample has about so many `impressions`, of users drawn by `seed`. `allow_overlap` and
    `from_log` mean what they mean to a night.
    """

    encoders: tuple[str, ...]
    feature_sets: tuple[str, ...]
    impressions: int
    seed: int
    allow_overlap: bool
    from_log: bool


@dataclass(frozen=True)
class Vectors:
    """Names the published vectors of one encoder, a partition of `item_embeddings` for each day.

    Items of other `categories` than these score nothing, as in the night; None means all. A `note`
    says what their measure may not be worth.
    """

    name: str
    encoder_id: str
    categories: tuple[str, ...] | None
    days: Mapping[dt.date, Partition]
    note: str | None


@dataclass(frozen=True)
class Sample:
    """Holds the impressions of a bucket of users on one day, and all items that they are about.

    `shown` int [n] and `histories` int [n, history_len], newest first, are places in `item_ids`, -1
    = none; `clicked` is bool [n], and `users` int64 [n] tells them apart on all days.
    """

    ds: dt.date
    item_ids: pa.Array
    shown: np.ndarray
    histories: np.ndarray
    clicked: np.ndarray
    users: np.ndarray


@dataclass(frozen=True)
class Measured:
    """Tells what one kind of vectors is worth, and by how much it is `above` the first, by measure.

    So many impressions were `scored`, of which `held_out` takes those that all kinds score. The
    histogram has no encoder.
    """

    name: str
    encoder_id: str | None
    scored: int
    held_out: HeldOut
    above: Mapping[str, Estimate]

    @property
    def auc(self) -> Estimate:
        """Returns the AUC by mean cosines, which is there where anything was measured."""
        assert self.held_out.auc is not None
        return self.held_out.auc


@dataclass(frozen=True)
class Report:
    """Holds what was measured of a bucket of users, and what must be known besides (`notes`)."""

    days: tuple[dt.date, ...]
    bucket: int
    buckets: int
    impressions: int
    measured: tuple[Measured, ...]
    notes: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """Says which vectors are ahead, and whether by more than two standard errors."""
        by_auc = sorted(self.measured, key=lambda one: -one.auc.value)
        if len(by_auc) < 2:
            return "There is nothing to compare with: name further encoders with --encoder."
        best, second = by_auc[:2]
        ahead = best.auc - second.auc
        error, by = ahead.standard_error, f"{best.name} is ahead of {second.name} by"
        if error is None:
            return (
                f"{by} {ahead.value:.4f} of AUC, of one user alone: that tells nothing of others."
            )
        if ahead.value > 2 * error:
            return f"{by} {ahead.value:.4f} ± {error:.4f} of AUC: more than two standard errors."
        return (
            f"{by} {ahead.value:.4f} ± {error:.4f} of AUC, no more than two standard errors: these "
            "impressions do not tell which is better. Take more, by --impressions or of more days."
        )

    def as_json(self) -> dict[str, Any]:
        return {
            "days": [str(ds) for ds in self.days],
            "bucket": self.bucket,
            "buckets": self.buckets,
            "impressions": self.impressions,
            "measured": [
                {
                    "name": one.name,
                    "encoder_id": one.encoder_id,
                    "scored": one.scored,
                    **one.held_out.numbers(),
                    "above_first": numbers(one.above),
                }
                for one in self.measured
            ],
            "verdict": self.verdict,
            "notes": list(self.notes),
        }


def measure(settings: Settings, days: Sequence[dt.date], asked: Asked, say: Say) -> Report:
    """Measures on `days`, ascending; all of them count together.

    Raises OperatorError for what cannot be meant, DataContractError for tables that do not fit
    each other, and InputNotReady for a table that is not there yet.
    """
    found = find_vectors(settings, days, asked)
    options = NightOptions(allow_overlap=True, from_log=asked.from_log)
    shared = Range(settings, settings.layout, say, options)
    logs = [_log_of(DayPlan(shared, ds), say) for ds in days]
    buckets = hashing.num_shards(sum(log.log.rows for log in logs), asked.impressions)
    bucket = asked.seed % buckets
    sampled = [_sample(log, bucket, buckets) for log in logs if log.log.rows]
    scores, notes = _score(settings, sampled, found, say)
    measured = _compare(sampled, {one.name: one.encoder_id for one in found}, scores)
    impressions = sum(len(sample.shown) for sample in sampled)
    notes = [one.note for one in found if one.note] + notes
    return Report(tuple(days), bucket, buckets, impressions, measured, tuple(notes))


# ---- Which vectors -----------------------------------------------------------------------------


def find_vectors(settings: Settings, days: Sequence[dt.date], asked: Asked) -> list[Vectors]:
    """Finds the published vectors that are asked for; where none are, of the pinned encoder.

    Raises OperatorError for a name that is none, for an encoder that is named twice or was made
    from one of `days`, and InputNotReady for one that has not embedded the catalogue of a day.
    """
    folders = [files.absolute(folder) for folder in asked.encoders]
    if not folders and not asked.feature_sets:
        folders = [settings.pin_for(days[-1]).encoder]
    found = [
        *(_of_encoder(settings, days, folder, asked) for folder in folders),
        *(_of_feature_set(settings, days, name, asked) for name in asked.feature_sets),
    ]
    for place, one in enumerate(found):
        for other in found[:place]:
            if one.encoder_id == other.encoder_id:
                raise OperatorError(
                    f"{other.name} and {one.name} are vectors of one encoder, {one.encoder_id}: "
                    "they would be compared with themselves. Name each encoder once."
                )
    return found


def _of_encoder(settings: Settings, days: Sequence[dt.date], folder: str, asked: Asked) -> Vectors:
    info = encoder_info.read_encoder_info(folder)
    note = _check_range(info, days, asked)
    embedded = {ds: _embedded_by(settings, info.encoder_id, folder, ds) for ds in days}
    return Vectors(info.encoder_id, info.encoder_id, info.categories, embedded, note)


def _embedded_by(settings: Settings, encoder_id: str, folder: str, ds: dt.date) -> Partition:
    """Returns the embeddings by an encoder of ds: of the nights, or of a candidate beside them."""
    own = settings.layout
    candidate = own.candidate(encoder_id)
    for layout in (own, candidate):
        found = find_published(layout.folder(ITEM_EMBEDDINGS, ds))
        if found and _made_by(found) == encoder_id:
            return found
    pinned = [pin for pin in settings.pins if pin.from_ds <= ds]
    is_pinned = bool(pinned) and max(pinned, key=lambda pin: pin.from_ds).encoder == folder
    option = "" if is_pinned else f"--encoder {folder} "
    raise InputNotReady(
        f"Encoder {encoder_id} has no published item_embeddings of ds {ds} below {settings.root}, "
        f"neither in {own.feature_set} nor in {candidate.feature_set}, so that its scores of that "
        f"day are not known. Run `courier embed {option}--ds {ds}` first."
    )


def _made_by(embeddings: Partition) -> str:
    return str(embeddings.manifest["identities"]["encoder_id"])


def _of_feature_set(
    settings: Settings, days: Sequence[dt.date], name: str, asked: Asked
) -> Vectors:
    layout = _layout_of(settings, name)
    embedded = {ds: find_published(layout.folder(ITEM_EMBEDDINGS, ds)) for ds in days}
    there = {ds: found for ds, found in embedded.items() if found}
    for ds in days:
        if ds not in there:
            raise InputNotReady(
                f"The feature set {name!r} has no published item_embeddings of ds {ds}, so that "
                f"its scores of that day are not known. Run `courier embed --ds {ds}` with its "
                "settings, or ask for a day that it has."
            )
    by = sorted(set(map(_made_by, there.values())))
    if len(by) > 1:
        raise OperatorError(
            f"The feature set {name!r} changed its encoder between ds {days[0]} and ds {days[-1]} "
            f"({', '.join(by)}), and one measure of both would tell of neither. Measure the days "
            "of each by themselves."
        )
    info = _package_of(settings, by[0])
    if info:
        return Vectors(name, by[0], info.categories, there, _check_range(info, days, asked))
    note = (
        f"Of {name} it is not known on which days its encoder {by[0]} was trained, nor for which "
        "categories, since no pin names it: --encoder and its package would tell."
    )
    return Vectors(name, by[0], None, there, note)


def _layout_of(settings: Settings, name: str) -> Layout:
    """Returns where a feature set lies; raises OperatorError where none of that name embedded."""
    layouts = [settings.layout, *settings.layout.beside()]
    known = {one.feature_set: one for one in layouts if one.begun_days(ITEM_EMBEDDINGS)}
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(known) or 'none'}."
    raise OperatorError(
        f"There is no feature set {name!r} with item_embeddings below {settings.root}, and nothing "
        f"to measure. {hint}"
    )


def _package_of(settings: Settings, encoder_id: str) -> EncoderInfo | None:
    """Returns what the package of an encoder says that is pinned for some day; None for none."""
    for folder in dict.fromkeys(pin.encoder for pin in settings.pins):
        with contextlib.suppress(OperatorError):  # packages of long ago may be gone
            info = encoder_info.read_encoder_info(folder)
            if info.encoder_id == encoder_id:
                return info
    return None


def _check_range(info: EncoderInfo, days: Sequence[dt.date], asked: Asked) -> str | None:
    """Returns what is to be noted of an encoder that was made from data of one of `days` or later.

    Raises OperatorError for it unless that is allowed.
    """
    if info.data_end_ds is None or info.data_end_ds < str(days[0]):
        return None
    told = f"{info.encoder_id} was made from data up to ds {info.data_end_ds}"
    if asked.allow_overlap:
        return f"{told}, and may have learned from the very clicks that it is measured on."
    raise OperatorError(
        f"Encoder {told}, but is to be measured on ds {days[0]}: it may have learned from the very "
        f"clicks, and would look better than it is. Measure on days after {info.data_end_ds}, or "
        "say --allow-overlap, which the report will tell."
    )


# ---- Which impressions -------------------------------------------------------------------------


def _log_of(day: DayPlan, say: Say) -> LogOfDay:
    """Returns the log of a day and what its histories begin from, as the night has them.

    Raises InputNotReady where that is gone.
    """
    log = plan_histories(day).log
    if _has_history(log):
        return log
    if log.before.is_gone:
        raise InputNotReady(
            f"The histories that those of ds {day.ds} went on from were pruned, so that what its "
            "users had clicked before is not known. Say --from-log, which reads the log of the "
            "window in their place, or measure on a later day."
        )
    if log.before.log:
        say(
            f"measure: histories of ds {day.ds} begin from the log of {len(log.before.log)} days "
            "before it, which takes longer than from published user_histories"
        )
    return log


def _has_history(log: LogOfDay) -> bool:
    return "history" in log.log.form.columns


def _sample(log: LogOfDay, bucket: int, buckets: int) -> Sample:
    """Returns the impressions of a bucket of users with their histories."""
    length = log.settings.history_len
    read = partial(_rows_of_bucket, log.day.end_us, bucket, buckets, length)
    # In one order, so that sums of floats are the same from whatever files.
    rows = arrays.in_order(read(log.log), ["user_id", "event_time", "item_id", "clicked"])
    if _has_history(log):
        lists = rows["history"].combine_chunks()
    else:
        lists = _histories_of(rows, log, bucket, buckets, read)
    item_ids, (shown, past) = codes_of([rows["item_id"], pa.chunked_array([lists.flatten()])])
    return Sample(
        log.log.form.ds,
        item_ids,
        shown,
        arrays.padded_codes(lists, past, length),
        rows["clicked"].to_numpy(),
        hashing.hash_ids(rows["user_id"]).view(np.int64),
    )


def _histories_of(
    rows: pa.Table, log: LogOfDay, bucket: int, buckets: int, read: Callable[[Source], pa.Table]
) -> pa.Array:
    """Returns the histories of the `rows` of a bucket as lists; `read` reads it in earlier logs."""
    job = replace(histories_job([log], [buckets], ""), shards=buckets)
    clicks = [clicks_of(rows, log.day.number, log.day.end_us, job.law)]
    for earlier in log.before.log:
        if earlier.rows:  # what is empty tells no types
            ds = earlier.form.ds
            end_us = day_end(ds, job.day_timezone)
            clicks.append(clicks_of(read(earlier), ds.toordinal(), end_us, job.law))
    (known,) = job.known_of(bucket, pa.concat_tables(clicks))
    return history_lists(known, rows)


def _rows_of_bucket(
    end_us: int, bucket: int, buckets: int, history_len: int, source: Source
) -> pa.Table:
    """Returns the impressions of one bucket of users; reads all, some row groups at a time."""

    def read(group: RowGroup) -> pa.Table:
        bare = replace(group, form=replace(group.form, carry=()))
        rows = read_impressions(bare, end_us, history_len)
        mine = hashing.shard_of(hashing.hash_ids(rows["user_id"]), buckets) == bucket
        return rows.filter(pa.array(mine))

    with ThreadPoolExecutor(_READERS) as pool:
        return pa.concat_tables(pool.map(read, source.groups()))


# ---- What they score ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    """Holds what one kind of vectors knows of the items of a sample.

    `values` are float32 [items, d]; `known` bool [items] says which of them mean anything, and
    `uris` object [items] where the images of these lie, None where none is told.
    """

    values: np.ndarray
    known: np.ndarray
    uris: np.ndarray


Scores = tuple[np.ndarray, np.ndarray]  # the mean and the largest cosine of each impression, [n]


def _score(
    settings: Settings, sampled: Sequence[Sample], vectors: Sequence[Vectors],
    say: Say,
) -> tuple[dict[str, Scores], list[str]]:  # fmt: skip
    """Returns the scores of the impressions of all days by each kind of vectors, and notes.

    The histogram's are among them where images can be read.
    """
    scores: dict[str, list[Scores]] = {}
    notes: list[str] = []
    for sample in sampled:
        known = np.zeros(len(sample.item_ids), bool)
        uris = np.full(len(known), None, object)
        for one in vectors:
            found = _look_up(one, sample.ds, sample.item_ids)
            scores.setdefault(one.name, []).append(_cosines(found.values, found.known, sample))
            uris[found.known] = found.uris[found.known]
            known |= found.known
        if not notes:
            try:
                colours = _colours(uris, known, settings.catalogue.image_roots, say)
                scores.setdefault(HISTOGRAM, []).append(_cosines(*colours, sample))
            except CourierError as error:
                notes.append(f"No {HISTOGRAM}: {error}")
                scores.pop(HISTOGRAM, None)
    joined = {name: _concatenated(of_days) for name, of_days in scores.items()}
    return joined, notes


def _concatenated(scores: Sequence[Scores]) -> Scores:
    means, largest = zip(*scores, strict=True)
    return np.concatenate(means), np.concatenate(largest)


def _cosines(values: np.ndarray, known: np.ndarray, sample: Sample) -> Scores:
    mean, largest = history_cosines(values, known, sample.shown[:, None], sample.histories)
    return mean[:, 0], largest[:, 0]


def _look_up(vectors: Vectors, ds: dt.date, item_ids: pa.Array) -> _Found:
    """Finds what the published `item_embeddings` of ds know of some items."""
    embeddings = vectors.days[ds]
    theirs = embeddings.schema.field("item_id").type
    if theirs != item_ids.type:
        raise DataContractError(
            f"item_id is {theirs} in {embeddings.folder}, but {item_ids.type} in the impressions "
            f"of ds {ds}, so that no item would be found. Cast it where it is written."
        )
    rows = embeddings.look_up(item_ids, "item_id", _COLUMNS)
    rows = rows.filter(pa.array(encoder_info.in_scope(rows["category"], vectors.categories)))
    at = pc.index_in(rows["item_id"], value_set=item_ids).to_numpy()
    width = len(rows["embedding"][0]) if len(rows) else 1
    found = _Found(
        np.zeros((len(item_ids), width), np.float32),
        np.zeros(len(item_ids), bool),
        np.full(len(item_ids), None, object),
    )
    found.values[at] = arrays.matrix(rows["embedding"], width)
    found.known[at] = True
    found.uris[at] = rows["image_uri"].to_numpy()
    return found


def _colours(
    uris: np.ndarray, wanted: np.ndarray, roots: Sequence[str], say: Say
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the colour histograms of the images of `wanted` items, bool [items].

    They are float32 [items, 64], and bool [items] tells for which of them an image was read. Raises
    InputNotReady where too many cannot be read, for which nobody's impressions are left out.
    """
    # In an order by chance: of images that are gone, many may be of neighbours.
    at = np.random.default_rng(0).permutation(np.flatnonzero(wanted))
    say(f"measure: reads {len(at):,} images for the {HISTOGRAM}")
    values, known = np.zeros((len(uris), _CELLS), np.float32), np.zeros(len(uris), bool)
    with ThreadPoolExecutor(_IMAGE_READERS) as pool:
        for first in range(0, len(at), _IMAGES_AT_ONCE):
            some = at[first : first + _IMAGES_AT_ONCE]
            images = list(pool.map(lambda uri: read_image(uri, roots, _SMALL), uris[some]))
            pixels = [image.pixels for image in images if isinstance(image, Image)]
            good = some[[isinstance(image, Image) for image in images]]
            known[good] = True
            seen, read = first + len(some), int(known.sum())
            if read < _READABLE * seen:
                raise InputNotReady(f"{seen - read:,} of {seen:,} images could not be read.")
            if pixels:
                values[good] = colour_histogram(np.array(pixels))
    return values, known


# ---- Comparing ---------------------------------------------------------------------------------


def _compare(
    sampled: Sequence[Sample], encoders: Mapping[str, str], scores: Mapping[str, Scores]
) -> tuple[Measured, ...]:
    """Measures all kinds of vectors on the impressions that each of them scores.

    `encoders` are their IDs by name. Raises OperatorError where these cannot be ranked.
    """
    scored = {name: ~np.isnan(mean) for name, (mean, _) in scores.items()}
    both = np.logical_and.reduce(list(scored.values()) or [np.zeros(0, bool)])
    clicked, users = (
        np.concatenate([getattr(one, name) for one in sampled] or [np.zeros(0, kind)])[both]
        for name, kind in (("clicked", bool), ("users", np.int64))
    )
    if clicked.all() or not clicked.any():
        raise _cannot_rank(len(clicked), int(clicked.sum()), scored)
    found = {
        name: rank_scores(mean[both], largest[both], clicked, users)
        for name, (mean, largest) in scores.items()
    }
    first = next(iter(found.values()))
    return tuple(
        Measured(name, encoders.get(name), int(scored[name].sum()), one, one.above(first))
        for name, one in found.items()
    )


def _cannot_rank(impressions: int, clicks: int, scored: Mapping[str, np.ndarray]) -> OperatorError:
    each = ", ".join(f"{name} scores {int(one.sum()):,}" for name, one in scored.items())
    return OperatorError(
        f"The sample has {impressions:,} impressions that can be scored, and {clicks:,} of them "
        f"are clicked, but clicked ones are to be ranked over others ({each or 'none was shown'}). "
        "An impression is scored where its item and one of its history have vectors. Take more "
        "with --impressions, other users with --seed, or days with more clicks before them."
    )


# ---- Telling -----------------------------------------------------------------------------------


def render(report: Report) -> str:
    """Writes the report for people: a line for each kind of vectors, and what follows from them."""
    first, *_ = report.measured
    of = first.held_out
    days = " to ".join(map(str, dict.fromkeys((report.days[0], report.days[-1]))))
    titles = ["", "scores", "AUC", "GAUC", "max AUC", "max GAUC", "AUC above the first"]
    lines = [titles, *map(_cells, report.measured)]
    lines[1][-1] = ""  # above itself
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        [
            f"measure of ds {days}: bucket {report.bucket} of {report.buckets}, "
            f"{report.impressions:,} impressions; all score {of.impressions:,} of them, of "
            f"{of.users:,} users, {of.clicks:,} clicked",
            "",
            *(_aligned(cells, widths) for cells in lines),
            "",
            *report.notes,
            report.verdict,
        ]
    )


def _cells(one: Measured) -> list[str]:
    of, above = one.held_out, one.above.get("auc")
    measures = [of.auc, of.gauc, of.max_auc, of.max_gauc, above]
    return [one.name, f"{one.scored:,}", *(_told(measure) for measure in measures)]


def _told(measure: Estimate | None) -> str:
    if measure is None:
        return "-"
    error = measure.standard_error
    return f"{measure.value:.4f}" + ("" if error is None else f" ± {error:.4f}")


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    name, *rest = (
        cell.rjust(width) if place else cell.ljust(width)
        for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return "  ".join([name, *rest]).rstrip()
