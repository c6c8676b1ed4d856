"""`courier fit-codebook` makes a codebook and its pin from one day's published embeddings.

What it will do is found out before any of it is done, the memory and the time that it takes
included. The package appears when all of it is there; nothing else is changed.
"""

import datetime as dt
import os
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from feature_jobs import inputs
from feature_jobs.codebooks.codebook import (
    Codebook,
    CodebookInfo,
    load_codebook,
    read_codebook_info,
    save_codebook,
)
from feature_jobs.codebooks.crosswalk import (
    CrosswalkJob,
    crosswalk,
    define_crosswalk,
    read_counts,
    shards_counted,
    with_moves,
)
from feature_jobs.codebooks.fit_codebook import (
    Fit,
    SampleJob,
    count_in_scope,
    define_sample,
    make_codebook,
    parts_sampled,
    read_sample,
    sampling_shares,
    stream_embeddings,
)
from feature_jobs.codebooks.kmeans import Estimate, estimate
from feature_jobs.inputs import Source
from feature_jobs.schemas import (
    ITEM_EMBEDDINGS,
    ITEM_FEATURES,
    MAIN,
    InputNotReady,
    OperatorError,
)
from feature_jobs.store import encoder_info, faults, files, partitions, worker_notes
from pipelines.artefacts.fit_staging import own_staging
from pipelines.artefacts.free_memory import available_bytes
from pipelines.artefacts.stanzas import whole_stanza
from pipelines.config import Settings
from pipelines.planning.shop_tables import ShopTables
from pipelines.running import beam_options, cluster_jobs, making
from pipelines.running.layout import Layout

Say = Callable[[str], None]
_LABEL = r"[a-z][a-z0-9_]*"


@dataclass(frozen=True)
class FitPlan:
    """Holds all that is known before a fit: what is read, what is continued, what it costs."""

    fit: Fit
    ds: dt.date
    encoder_folder: str
    encoder: encoder_info.EncoderInfo
    parent_folder: str | None
    parent: CodebookInfo | None
    sampling: SampleJob
    items: int
    impressions: Source | None
    estimate: Estimate
    options: beam_options.JobOptions


# ---- Planning ------------------------------------------------------------------------------


def parse_clusters(text: str) -> dict[str, int]:
    """Reads `10000`, or `coarse=1000,main=10000`, as the number of clusters by label.

    Raises OperatorError where it is neither, or names no `main`.
    """
    found: dict[str, int] = {}
    for part in text.split(","):
        label, _, count = part.strip().rpartition("=")
        label = label.strip() or MAIN
        fits = re.fullmatch(_LABEL, label) and label not in ("id", "ids", *found)
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


def plan_fit(
    settings: Settings,
    ds: dt.date,
    encoder_folder: str | None,
    fit: Fit,
    mode: str | None,
    parent_folder: str | None,
    beam_args: Sequence[str],
    say: Say,
) -> FitPlan:
    """Opens and checks all that `fit` needs; `mode` None takes the one that keeps most numbers.

    Without `encoder_folder`, that of a candidate, the encoder is the pinned one. Raises
    OperatorError, DataContractError or InputNotReady.
    """
    layout, is_candidate = settings.layout, encoder_folder is not None
    encoder_folder = files.absolute(encoder_folder or settings.pin_for(ds).encoder)
    encoder = encoder_info.read_encoder_info(encoder_folder)
    if is_candidate:
        layout = layout.candidate(encoder.encoder_id)
    embeddings = _open_embeddings(layout, ds, encoder)
    parent_folder = parent_folder or _pinned_codebook(settings, ds)
    parent = read_codebook_info(parent_folder) if parent_folder else None
    fit = replace(fit, mode=mode or _default_mode(parent, encoder))
    _check_parent(fit, parent, encoder)
    items = count_in_scope(embeddings, encoder.categories)
    _check_items(items, fit, encoder, embeddings)
    fraction, held_out = sampling_shares(items, max(fit.clusters.values()), fit.points_per_cluster)
    old = _old_features(settings, ds, fit, parent, encoder)
    if old:
        _check_alike(old, embeddings)
    labels = tuple(k for k in fit.clusters if parent and k in parent.labels)
    sample = SampleJob(
        embeddings, encoder.dimension, encoder.categories, fraction, held_out,
        # Not that of an earlier fit, whose workers may live on.
        settings.layout.fit_folder("fit-codebook", ds, secrets.token_hex(6)),
        old, labels if old else (),
    )  # fmt: skip
    drawn = round(items * (fraction * (1 - held_out) + held_out))
    rows = items if fit.algorithm == "single-pass" else drawn
    plan = FitPlan(
        fit, ds, encoder_folder, encoder, parent_folder, parent, sample, items,
        impressions=_impressions(settings, ds, embeddings, say) if parent else None,
        estimate=estimate(
            fit.algorithm, drawn, rows, list(fit.clusters.values()), encoder.dimension
        ),
        options=beam_options.job_options(settings, "fit-codebook", beam_args),
    )  # fmt: skip
    _check_memory(plan)
    beam_options.check_ready([plan.options])
    if beam_options.is_for_jar(plan.options):
        raise OperatorError(
            "fit-codebook goes on with the sample that its job draws, and --output_executable_path "
            "would have that job written into a jar instead of run. Leave the option out here; of "
            "[beam] in the settings it belongs under the stages that run so, as [beam.embed]."
        )
    return plan


def _open_embeddings(
    layout: Layout, ds: dt.date, encoder: encoder_info.EncoderInfo
) -> partitions.Partition:
    folder = layout.folder(ITEM_EMBEDDINGS, ds)
    embeddings = partitions.open_published(folder)
    found = embeddings.manifest["identities"]["encoder_id"]
    if found != encoder.encoder_id:
        raise OperatorError(
            f"The embeddings of ds {ds} were made by {found}, but the pin that holds for that day "
            f"names {encoder.encoder_id}. A codebook belongs to one encoder. Run `courier embed "
            f"--ds {ds}` first."
        )
    return embeddings


def _pinned_codebook(settings: Settings, ds: dt.date) -> str | None:
    """Returns the codebook of the newest pin that names one, None where none does.

    Pins count that hold on the day after ds or before.
    """
    day = ds + dt.timedelta(days=1)
    pins = [pin for pin in settings.pins if pin.from_ds <= day and pin.codebook]
    return max(pins, key=lambda pin: pin.from_ds).codebook if pins else None


def _default_mode(parent: CodebookInfo | None, encoder: encoder_info.EncoderInfo) -> str:
    if parent is None:
        return "fresh"
    return "warm" if parent.encoder_id == encoder.encoder_id else "aligned"


def _check_parent(fit: Fit, parent: CodebookInfo | None, encoder: encoder_info.EncoderInfo) -> None:
    if fit.mode != "fresh" and parent is None:
        raise OperatorError(
            f"Mode {fit.mode} continues a codebook, but the settings pin none and --parent names "
            "none. Name the codebook whose numbers are to live on, or say --mode fresh."
        )
    if fit.mode == "warm" and parent and parent.encoder_id != encoder.encoder_id:
        raise OperatorError(
            f"Mode warm starts from the parent's centres, but {parent.codebook_id} was fitted on "
            f"embeddings of {parent.encoder_id}, and those of this ds are of {encoder.encoder_id}: "
            "its centres mean nothing there. Say --mode aligned, which follows the items instead."
        )


def _check_items(
    items: int, fit: Fit, encoder: encoder_info.EncoderInfo, embeddings: partitions.Partition
) -> None:
    clusters = max(fit.clusters.values())
    if items >= clusters:
        return
    scope = "all categories"
    if encoder.categories is not None:
        scope = f"the encoder's categories {', '.join(encoder.categories[:10])}"
    raise OperatorError(
        f"{clusters:,} clusters were asked for, but of {embeddings.rows:,} embeddings in "
        f"{embeddings.folder} only {items:,} are of catalogue items in {scope}. Clusters would be "
        "empty. Ask for fewer, or embed a day with more of these items."
    )


def _old_features(
    settings: Settings,
    ds: dt.date,
    fit: Fit,
    parent: CodebookInfo | None,
    encoder: encoder_info.EncoderInfo,
) -> partitions.Partition | None:
    """Opens the newest `item_features` up to ds made with `parent`, of this feature set or another.

    None where they are not needed, since the parent's own centres tell an item's number, or where
    there are none. Raises InputNotReady where mode `aligned` cannot do without.
    """
    if parent is None or (parent.encoder_id == encoder.encoder_id and fit.mode != "aligned"):
        return None
    own = settings.layout
    others = [own.of(name) for name in own.feature_sets() if name != own.feature_set]
    for layout in [own, *others]:
        days = layout.published_days(ITEM_FEATURES)
        for day in reversed([day for day in days if day <= ds]):
            found = partitions.open_published(layout.folder(ITEM_FEATURES, day))
            if found.manifest["identities"]["codebook_id"] == parent.codebook_id:
                return found
    if fit.mode != "aligned":
        return None
    raise InputNotReady(
        f"Mode aligned follows the items of the old clusters, but neither {settings.feature_set} "
        f"nor a feature set with a whole night below {settings.root} has item_features of codebook "
        f"{parent.codebook_id} up to ds {ds}. Numbers could not be kept. Run `courier "
        "item-features` for a day with that codebook, or say --mode fresh, which gives every "
        "cluster a new number."
    )


def _check_alike(old: partitions.Partition, embeddings: partitions.Partition) -> None:
    one, other = (p.schema.field("item_id").type for p in (old, embeddings))
    if one != other:
        raise OperatorError(
            f"item_id is {one} in {old.folder}, which tells the old cluster IDs, but {other} in "
            f"{embeddings.folder}: no item would be found again. Say --mode fresh without that "
            "parent, or make the features with item_id of one type."
        )


def _impressions(
    settings: Settings, ds: dt.date, embeddings: partitions.Partition, say: Say
) -> Source | None:
    """Opens the impressions of ds, which weigh the crosswalk.

    Returns None where the shop has no log and, with a word, where there are none yet.
    """
    if settings.impressions is None:
        return None
    try:
        found = ShopTables(settings, ds, say).impressions(ds)
    except InputNotReady:
        say(f"fit-codebook: no impressions of ds {ds}; the crosswalk counts items alone")
        return None
    item_id = embeddings.schema.field("item_id").type
    if inputs.common_id_type("item_id", [found], item_id) != item_id:
        raise OperatorError(
            f"item_id is {item_id} in {embeddings.folder}, but of another type in the impressions "
            f"of ds {ds}; no item would be found. Cast it where it is written."
        )
    return found


def _check_memory(plan: FitPlan) -> None:
    """Raises OperatorError where the fit needs more memory than this machine has left."""
    free, fit = available_bytes(), plan.fit
    if plan.estimate.bytes <= free:
        return
    fewer = f"sample fewer items with --points-per-cluster (now {fit.points_per_cluster})"
    other = "" if fit.algorithm == "single-pass" else ", or say --algorithm single-pass"
    raise OperatorError(
        f"The fit needs about {_size(plan.estimate.bytes)} of memory, and {_size(free)} are free "
        f"here ({describe(plan)}). It would be killed halfway. Run it on a larger machine, ask for "
        f"fewer clusters, {fewer}{other}."
    )


def describe(plan: FitPlan) -> str:
    """Says in one line what is about to be done, and what it will take."""
    fit = plan.fit
    clusters = ", ".join(f"{label} {n:,}" for label, n in fit.clusters.items())
    share = plan.sampling.fraction * (1 - plan.sampling.held_out)
    parent = f" continues {plan.parent.codebook_id}" if plan.parent else ""
    reads = f"samples {plan.items * share:,.0f} of {plan.items:,} items"
    if fit.algorithm == "single-pass":
        reads += " and then reads all"
    return (
        f"{fit.algorithm}, {fit.mode}{parent}; clusters: {clusters}; {reads}; about "
        f"{_size(plan.estimate.bytes)} and {_duration(plan.estimate.seconds)}"
    )


def _size(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count > 1e9 else f"{count / 1e6:,.0f} MB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:,.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"


# ---- Fitting -------------------------------------------------------------------------------


def fit_codebook(settings: Settings, plan: FitPlan, folder: str, out: str, say: Say) -> str:
    """Fits the codebook of `plan` and writes its package below `out`/codebooks.

    Returns the stanza that pins it from the next day on, since features know nothing of their own
    day; `folder` is that of the settings.
    """
    parent = load_codebook(plan.parent_folder) if plan.parent_folder else None
    with own_staging(plan.sampling.staging, say):
        say(f"fit-codebook: {describe(plan)}")
        paths = plan.sampling.embeddings.paths
        _run(
            lambda root: define_sample(root, plan.sampling),
            lambda: parts_sampled(plan.sampling) == len(paths), plan, say,
        )  # fmt: skip
        sample, stream = read_sample(plan.sampling), stream_embeddings(plan.sampling)
        codebook = make_codebook(
            sample, plan.fit, plan.encoder.encoder_id, str(plan.ds), parent, stream
        )
        codebook, table = _compare(codebook, parent, plan, say)
        path = save_codebook(os.path.join(out, "codebooks"), codebook, table)
    for line in report(codebook.info):
        say(f"  {line}")
    if table is not None:
        say(f"  crosswalk: {os.path.join(path, 'crosswalk.parquet')}, {table.num_rows:,} rows")
    next_day = dt.date.fromisoformat(codebook.info.data_end_ds) + dt.timedelta(days=1)
    comment = _comment(plan, codebook.info)
    return whole_stanza(settings, folder, comment, next_day, plan.encoder_folder, path)


def _run(
    define: Callable[[Any], None], is_whole: Callable[[], bool], plan: FitPlan, say: Say
) -> None:
    """Runs a job of the fit; waits until what it wrote `is_whole`, if other hosts did."""
    staging, options = plan.sampling.staging, plan.options
    name = f"fit-codebook-{plan.ds}-{os.path.basename(staging)}"
    job = cluster_jobs.Job(name, options.beam, staging, say)
    for told in ("begun", "usage"):  # of the fit's job before
        files.delete_tree(os.path.join(staging, told))
    making.run_job(define, staging, job.run, options.share)
    if worker_notes.are_elsewhere(staging):
        faults.until_shown(is_whole)


def _compare(
    codebook: Codebook, parent: Codebook | None, plan: FitPlan, say: Say
) -> tuple[Codebook, pa.Table | None]:
    """Returns the codebook with what moved since its parent, and the crosswalk.

    The crosswalk is None without a parent, or without `item_features` that tell the old numbers of
    another encoder's items.
    """
    sample = plan.sampling
    if parent is None:
        return codebook, None
    other = parent.info.encoder_id != codebook.info.encoder_id
    if other and sample.old is None:
        say(
            f"fit-codebook: no crosswalk, since no feature set has item_features of codebook "
            f"{parent.info.codebook_id}"
        )
        return codebook, None
    job = CrosswalkJob(
        embeddings=sample.embeddings,
        categories=sample.categories,
        codebook_folder=save_codebook(os.path.join(sample.staging, "codebook"), codebook),
        parent_folder=str(plan.parent_folder),
        labels=tuple(label for label in codebook.info.labels if label in parent.centres),
        old=sample.old if other else None,
        staging=sample.staging,
    )
    _run(
        lambda root: define_crosswalk(root, plan.impressions, job),
        lambda: shards_counted(job) == job.shards, plan, say,
    )  # fmt: skip
    impressions = plan.impressions.rows if plan.impressions else 0
    table = crosswalk(read_counts(job, impressions), parent, codebook)
    return replace(codebook, info=with_moves(codebook.info, table)), table


def report(info: CodebookInfo) -> list[str]:
    """Writes a line for each resolution: objective, health, and what moved since the parent."""
    lines = []
    for r in map(info.resolution, info.labels):
        held_out = "" if r.held_out_objective is None else f", held out {r.held_out_objective:.4f}"
        moved = "" if r.moved_items is None else f"; moved {r.moved_items:.1%} of items"
        if r.moved_impressions is not None:
            moved += f" and {r.moved_impressions:.1%} of impressions"
        lines.append(
            f"{r.label}: {r.health['used']:,} of {r.clusters:,} clusters used, perplexity "
            f"{r.health['perplexity']:,.1f}, largest {r.health['largest_share']:.1%} of "
            f"{info.sample_items:,} items; mean squared distance {r.objective:.4f}{held_out}{moved}"
        )
    return lines


def _comment(plan: FitPlan, info: CodebookInfo) -> str:
    clusters = ", ".join(
        f"{r.label} {r.clusters:,} clusters with numbers up to {r.max_id:,}"
        for r in map(info.resolution, info.labels)
    )
    parent = f", {info.mode} after {info.parent}" if info.parent else ""
    return f"{clusters}; fitted on {info.sample_items:,} items of ds {plan.ds}{parent}"
