"""Runs the command `courier`. Results go to stdout, logs and progress to stderr.

Exit status: 0 done; 1 failed; 2 wrong usage or settings; 3 a quality gate refused to publish; 4 an
input is not there yet; 130 and 143 interrupted, resumable. Nothing heavy is imported before a
command runs.
"""

import datetime as dt
import logging
import os
import re
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import click

from feature_jobs import __version__
from feature_jobs.schemas import CourierError, GateRefused
from pipelines import stages
from pipelines.options import (
    Ds,
    PathText,
    SetName,
    ZoneName,
    beam_argument,
    checked_days_options,
    config_option,
    days_asked,
    days_options,
    dry_run_option,
    ds_option,
    embeddings_by_option,
    encoder_option,
    from_log_option,
    full_option,
    json_option,
    out_option,
    overlap_option,
    remake_option,
    waiting_options,
)
from pipelines.stages import Kind

if TYPE_CHECKING:
    from pipelines.config import Settings


def _say(message: str) -> None:
    click.echo(message, err=True)


def _settings(path: str) -> "Settings":
    """Reads the settings; tells what would stop a night to come."""
    from pipelines.config import load_settings

    settings = load_settings(path)
    for pin in settings.half_pins:
        _say(f"WARNING: {pin.way_to_a_codebook}")
    return settings


@click.group(context_settings={"auto_envvar_prefix": "COURIER", "show_default": True})
@click.version_option(__version__, prog_name="courier")
def cli() -> None:
    """Visual features for CTR models: item embeddings, cluster IDs and SimScores, every night.

    Every option can be given in the environment, as COURIER_<COMMAND>_<OPTION>.
    """


# ---- The night and its stages ----------------------------------------------------------------


def _make(
    kinds: Sequence[Kind] | None, config: str, days: Sequence[dt.date], dry_run: bool, json: bool,
    accepted: tuple[tuple[str, ...], str], beam_args: Sequence[str],
    wait: dt.timedelta | None = None, deadline: dt.time | None = None, **asked: Any,
) -> None:  # fmt: skip
    """Makes stages of all days, each kind in one job; the JSON of several days is a list.

    Without `kinds` they are those of a whole night. Inputs are waited for where it is said how long
    (`wait`) or until when (`deadline`).

    What is refused of some days is told when the rest is done.
    """
    from pipelines import nightly
    from pipelines.nightly import NightOptions
    from pipelines.planning.readiness import wait_for_inputs
    from pipelines.reports import night
    from pipelines.running import beam_options
    from pipelines.running.judging import Accepted

    settings, options = _settings(config), NightOptions(**asked)
    is_night, kinds = not kinds, kinds or settings.night
    # A mistyped option is told before anything is read, and all that is wrong before a long wait.
    jobs = [beam_options.job_options(settings, kind.name, beam_args) for kind in kinds]
    found: list[dict[str, Any]] = []
    refused: list[CourierError] = []
    if dry_run:
        nights = nightly.plan_nights(settings, days, kinds, _say, options)
        found = [night.describe_plan(one, beam_args) for one in nights]
    else:
        free = list(days)
        if not options.encoder:
            free, held = nightly.without_held(settings, days, kinds)
            refused = [one.error for one in held]
        try:
            if wait is not None or deadline is not None:
                beam_options.check_ready(jobs)
                overlap = options.allow_overlap
                wait_for_inputs(settings, free, kinds, wait, deadline, _say, overlap)
            nights = nightly.plan_nights(settings, free, kinds, _say, options)
            if nights:
                made = nightly.make_nights(nights, beam_args, _say, Accepted(*accepted))
                found, refused = made[0], refused + [one.error for one in made[1]]
        except CourierError as told:
            refused.append(told)
    _echo(found, len(days) == 1, dry_run, json)
    if is_night and not dry_run and not refused:
        from pipelines.running import retention

        retention.prune_by_the_night(settings, _say)
    _refuse(refused)


def _echo(found: Sequence[dict[str, Any]], is_one: bool, dry_run: bool, json: bool) -> None:
    """Prints plans, or what runs did, of days; of one day the JSON is no list."""
    from pipelines.reports import night

    if json and found:
        click.echo(dumps(found[0] if is_one else found, indent=1))
    elif not json:
        render = night.render_plan if dry_run else night.render_report
        for text in filter(None, map(render, found)):
            click.echo(text)


def _refuse(refused: Sequence[CourierError]) -> None:
    """Tells all errors, and raises the last one, if there is any."""
    for error in refused[:-1]:
        _tell_error(error)
    if refused:
        raise refused[-1]


@cli.command()
@days_options
@overlap_option
@full_option
@embeddings_by_option
@from_log_option
@waiting_options
def refresh(**options: Any) -> None:
    """Make and publish whole nights, of one day or several; resumes, and does nothing twice.

    With --wait or --deadline it waits for its inputs, and then ends with 4 where they are missing.
    Of several days each stage is one job, and the tables are those that night after night would
    make. With --json, of several days a list.
    """
    _make(None, **options)


@cli.command()
@config_option
@click.option("--start-ds", type=Ds(), help="First day. [default: all that the choice concerns]")
@click.option("--end-ds", type=Ds(), help="Last day.")
@click.option("--only-missing", is_flag=True, help="Leave days alone that are published.")
@click.option("--cascade", is_flag=True, help="Only what is stale, and what goes on from it.")
@click.option("--late", is_flag=True, help="Only days whose log grew, within late_days.")
@click.option("--failed", is_flag=True, help="Only days that failed in the backfill before.")
@click.option(
    "--step-days",
    type=click.IntRange(1),
    help="So many days together. [default: as many as [backfill] in the settings has room for]",
)
@click.option(
    "--max-failures", type=click.IntRange(1), help="End once so many days failed. [default: go on]"
)
@remake_option
@dry_run_option
@json_option
@beam_argument
def backfill(
    config: str, start_ds: dt.date | None, end_ds: dt.date | None, only_missing: bool,
    cascade: bool, late: bool, failed: bool, step_days: int | None, max_failures: int | None,
    remake: bool, dry_run: bool, json: bool, beam_args: Sequence[str],
) -> None:  # fmt: skip
    """Make a range of nights: says beforehand what, why and what it takes, and resumes.

    A day that fails or is refused stops what goes on from it, and nothing else. Ends with 0 once
    every day is there, else with the status of the worst.
    """
    from pipelines.backfill import begin, carry_out
    from pipelines.backfill_plan import Asked, Only, plan_backfill
    from pipelines.running import beam_options

    choices: dict[Only, bool] = {
        "missing": only_missing, "stale": cascade, "late": late, "failed": failed
    }  # fmt: skip
    chosen = [name for name, is_asked in choices.items() if is_asked]
    if len(chosen) > 1:
        raise click.UsageError("--only-missing, --cascade, --late and --failed exclude each other.")
    if remake and chosen not in ([], ["failed"]):
        raise click.UsageError("--remake makes all days again, and goes with --failed alone.")
    only = chosen[0] if chosen else None
    days: tuple[dt.date, ...] = ()
    if start_ds or end_ds or only in (None, "missing"):
        days = tuple(days_asked(None, start_ds, end_ds))
    settings = _settings(config)
    for kind in settings.night:  # a mistyped option is told before anything is read
        beam_options.job_options(settings, kind.name, beam_args)
    asked = Asked(days, only, step_days, max_failures, remake)
    plan = plan_backfill(settings, asked)
    if not json:
        click.echo(plan.render())
    if dry_run:
        if json:
            click.echo(dumps({"plan": plan.as_json()}, indent=1))
        return
    outcome = begin(plan)
    try:
        carry_out(plan, outcome, config, beam_args, sys.argv[1:], _say)
    finally:  # what was made until then is told also where something ended it
        result = {"plan": plan.as_json(), **outcome.as_json()}
        click.echo(dumps(result, indent=1) if json else f"\n{outcome.render()}")
    outcome.refuse()


@cli.command()
@days_options
@overlap_option
@full_option
@encoder_option("Not the pinned encoder but this package, into a feature set of its own.")
def embed(**options: Any) -> None:
    """Embed the catalogue of one day or several: item_embeddings and item_rejects.

    An encoder that is to take the place of the pinned one embeds the catalogue beside the nights,
    with --encoder, and the night that changes to it finds its embeddings.
    """
    _make([stages.EMBED], **options)


@cli.command("item-features")
@days_options
@overlap_option
def item_features(**options: Any) -> None:
    """Assign cluster IDs to the embedded items of one day or several: item_features."""
    _make([stages.ITEM_FEATURES], **options)


@cli.command()
@days_options
@from_log_option
def histories(**options: Any) -> None:
    """Make the click histories of one day or several: user_histories and recent_clicks.

    They go on from those of the day before.
    """
    _make([stages.HISTORIES], **options)


@cli.command()
@days_options
@overlap_option
@embeddings_by_option
@from_log_option
def simscore(**options: Any) -> None:
    """Score the impressions of one day or several: histories and user_simscores.

    Each impression is scored with the history of its own moment.
    """
    _make([stages.HISTORIES, stages.SIMSCORE], **options)


@cli.command("training-rows")
@days_options
def training_rows(**options: Any) -> None:
    """Make what an encoder is trained on, for one day or several: training_rows."""
    _make([stages.TRAINING_ROWS], **options)


@cli.command()
@days_options
@click.option(
    "--samples",
    required=True,
    metavar="TEMPLATE",
    help="Where they lie: 'ctr/dt={ds:%Y%m%d}/*.parquet', relative to the settings' folder.",
)
@click.option("--name", type=SetName(), default="ctr", help="Of the training set.")
@click.option("--user-id", default="user_id", metavar="COLUMN", help="Their column of users.")
@click.option("--item-id", default="item_id", metavar="COLUMN", help="Their column of items.")
@click.option("--time", default="event_time", metavar="COLUMN", help="Their column of moments.")
@click.option("--label", metavar="COLUMN", help="Their column of labels, to count it.")
@click.option(
    "--timezone",
    type=ZoneName(),
    metavar="ZONE",
    help="Of moments that have none: 'Asia/Shanghai'.",
)
@click.option(
    "--features-from",
    type=click.Choice(["previous", "same"]),
    default="previous",
    help="The newest night that is available at a moment, or that of the day itself.",
)
@click.option(
    "--history-as-of",
    type=click.Choice(["moment", "night"]),
    default="moment",
    help="Clicks until the moment, or those that its night knew.",
)
@click.option(
    "--as-of",
    type=click.Choice(["day", "created"]),
    default="day",
    help="A night is available a delay after its day, or once it was really published.",
)
@click.option(
    "--layout",
    type=click.Choice(["plain", "fuxictr", "torcheasyrec"]),
    default="plain",
    help="Types and shapes that a framework's reader takes, with its configuration.",
)
@click.option(
    "--show-sql",
    type=click.Choice(["duckdb", "spark"]),
    help="Only print a query that does the same for published scores.",
)
@click.option("--created-timestamp", is_flag=True, help="Add when nights were published.")
@click.option("--mixed-encoders", is_flag=True, help="Let scores be of several encoders.")
def join(
    samples: str, name: str, user_id: str, item_id: str, time: str, label: str | None,
    timezone: str | None, show_sql: Literal["duckdb", "spark"] | None, config: str,
    days: Sequence[dt.date], dry_run: bool, json: bool, remake: bool,
    accepted: tuple[tuple[str, ...], str], beam_args: Sequence[str], **asked: Any,
) -> None:  # fmt: skip
    """Join samples of your own with features as they were at each moment: a training set.

    Samples are any Parquet with user, item and time: impressions, candidates, sampled negatives.
    One row comes out for each, in the same order, with all of its columns.
    """
    from pipelines import training_sets
    from pipelines.planning import joins
    from pipelines.planning.day_plan import NightOptions
    from pipelines.reports import night
    from pipelines.running import beam_options

    if accepted[0]:
        raise click.UsageError("No gate judges a training set: there is nothing to --accept.")
    settings = _settings(config)
    beam_options.job_options(settings, stages.JOIN.name, beam_args)
    columns = {"user_id": user_id, "item_id": item_id, "event_time": time}
    template = joins.samples_template(samples, config)
    wanted = joins.JoinAsked(name, template, columns, timezone, label, **asked)
    nights = joins.plan_joins(settings, days, wanted, _say, NightOptions(remake=remake))
    if show_sql:
        from pipelines.reports import join_sql

        for one in nights:
            click.echo(join_sql.show_sql(show_sql, join_sql.query_of(one)))
        return
    if dry_run:
        _echo([night.describe_plan(one, beam_args) for one in nights], len(days) == 1, True, json)
        return
    made, refused = training_sets.make_planned(nights, beam_args, _say)
    _echo(made, len(days) == 1, dry_run, json)
    _refuse(refused)


# ---- Artefacts -------------------------------------------------------------------------------


@cli.command("init-encoder")
@config_option
@click.option(
    "--backbone",
    default="swin_t",
    metavar="NAME|timm:NAME",
    help="A torchvision classification model, or one of timm's.",
)
@click.option(
    "--weights",
    type=PathText(local=True),
    required=True,
    metavar="pretrained|imagenet|random|PATH",
    help="Where from.",
)
@click.option(
    "--input-size", type=click.IntRange(16, 1024), help="Pixels; default: the backbone's."
)
@click.option(
    "--embedding-dim",
    type=click.IntRange(64, 1024),
    default=256,
    show_default=True,
    help="Numbers of an embedding.",
)
@click.option("--seed", default=0, help="Of the random weights.")
@click.option(
    "--name", default=None, help="First part of the encoder's id. [default: the backbone]"
)
@click.option("--category", multiple=True, help="One in scope; repeat. [default: all]")
@click.option("--ds", type=Ds(), help="Fit what follows on images of this day's catalogue.")
@click.option(
    "--centre/--no-centre",
    default=None,
    help="Take off the mean feature before the norm. [default: of pretrained weights]",
)
@click.option(
    "--projection",
    type=click.Choice(["random", "pca"]),
    default="random",
    help="Of the features to an embedding; pca: their leading directions.",
)
@click.option("--whiten", is_flag=True, help="Scale the directions of pca to the same variance.")
@click.option(
    "--sample",
    type=click.IntRange(300),
    help="About how many items of the catalogue to draw for that. [default: 20000]",
)
@out_option
@beam_argument
def init_encoder(
    config: str, name: str | None, category: tuple[str, ...], ds: dt.date | None,
    centre: bool | None, projection: str, whiten: bool, sample: int | None, out: str | None,
    beam_args: Sequence[str], **begun_with: Any,
) -> None:  # fmt: skip
    """Make an encoder package without training; prints the pin to append to the settings."""
    from pipelines.artefacts import encoders

    start = encoders.Start(**begun_with)
    fitting = encoders.choose_fitting(ds, centre, projection, whiten, sample, start.weights, _say)

    # `>>` to a new file has made an empty one by now.
    is_there = os.path.exists(config) and os.path.getsize(config)
    settings = _settings(config) if is_there else None
    folder, out = _folders(config, out)
    name = name or re.sub("[^a-z0-9]+", "-", start.backbone.lower())
    click.echo(
        encoders.init_encoder(
            start, name, category, settings, folder, out, _say, fitting, beam_args
        )
    )


@cli.command("register-vectors")
@config_option
@click.option("--name", required=True, help="First part of the encoder's id.")
@click.option(
    "--path",
    required=True,
    metavar="TEMPLATE",
    help="The table's files, with {ds} for the day; without, one snapshot.",
)
@click.option("--vector", required=True, metavar="COLUMN", help="The vectors.")
@click.option("--item", default="item_id", show_default=True, metavar="COLUMN", help="Item IDs.")
@click.option("--as-bytes", is_flag=True, help="Vectors are bytes: float32, little-endian.")
@click.option("--category", multiple=True, help="One in scope; repeat. [default: all]")
@click.option("--ds", type=Ds(), help="The day whose vectors to look at. [default: the newest]")
@click.option("--centre", is_flag=True, help="Take off the mean of a sample, before the norm.")
@click.option(
    "--trained-on",
    nargs=2,
    type=Ds(),
    metavar="START END",
    help="Days of this shop's clicks that their maker was trained on.",
)
@click.option("--trained-elsewhere", is_flag=True, help="It knows nothing of this shop's clicks.")
@click.option("--require-success", is_flag=True, help="Wait for a _SUCCESS beside the files.")
@out_option
def register_vectors(
    config: str, name: str, path: str, vector: str, item: str, as_bytes: bool,
    category: tuple[str, ...], ds: dt.date | None, centre: bool,
    trained_on: tuple[dt.date, dt.date] | None, trained_elsewhere: bool, require_success: bool,
    out: str | None,
) -> None:  # fmt: skip
    """Register vectors that the shop has as an encoder; prints the pin to append."""
    from feature_jobs.store.encoder_info import VectorSource
    from pipelines.artefacts import vectors

    days = vectors.choose_training(trained_on, trained_elsewhere)
    source = VectorSource(path, item, vector, as_bytes, require_success)
    wanted = vectors.Registration(name, source, category, days, ds, centre)
    folder, out = _folders(config, out)
    click.echo(vectors.register_vectors(wanted, _settings(config), folder, out, _say))


def _folders(config: str, out: str | None) -> tuple[str, str]:
    """Returns the folder of the settings, and the one where packages go."""
    from feature_jobs.store import files

    folder = os.path.dirname(os.path.abspath(config))
    return folder, files.absolute(out or folder)


@cli.command()
@config_option
@click.option(
    "--until",
    type=Ds(),
    required=True,
    help="Train on days before this one; the pin holds from it.",
)
@click.option("--start-ds", type=Ds(), help="First day. [default: all that have training rows]")
@click.option(
    "--held-out-days",
    type=click.IntRange(1, 365),
    default=1,
    help="How many of the last days to measure on.",
)
@click.option(
    "--name", default=None, help="Of the run, and of the encoder. [default: the objective]"
)
@click.option(
    "--preset",
    type=click.Choice(["paper", "demo"]),
    default="paper",
    help="Defaults of what follows.",
)
@click.option("--objective", help="courier, an ablation or a baseline.")
@click.option(
    "--backbone",
    metavar="NAME|timm:NAME",
    help="A torchvision classification model, or one of timm's.",
)
@click.option(
    "--weights",
    type=PathText(local=True),
    metavar="pretrained|imagenet|random|PATH",
    help="Where the backbone begins.",
)
@click.option(
    "--init-from",
    type=PathText(),
    metavar="FOLDER",
    help="Or an encoder package to go on from, of the same backbone and scope.",
)
@click.option("--input-size", type=click.IntRange(16, 1024), help="Side of the images in pixels.")
@click.option(
    "--embedding-dim", type=click.IntRange(64, 1024), help="Numbers of an embedding, by fours."
)
@click.option("--epochs", type=click.IntRange(1), help="Passes over all rows.")
@click.option("--batch-rows", type=int, help="Rows of a batch, over all processes.")
@click.option(
    "--chunk-images",
    type=click.IntRange(0),
    help="Cache gradients, so many images at a time; 0: do not.",
)
@click.option("--learning-rate", type=click.FloatRange(0, min_open=True), help="Of Adam.")
@click.option("--warmup-steps", type=click.IntRange(0), help="Steps in which the rate rises to it.")
@click.option(
    "--cosine-decay/--no-cosine-decay", default=None, help="Lower the rate to 0 over all epochs."
)
@click.option(
    "--backbone-lr-factor",
    type=click.FloatRange(0, min_open=True),
    help="Of all layers but the last: so many times the rate.",
)
@click.option(
    "--freeze-backbone",
    type=click.IntRange(0),
    metavar="STEPS",
    help="Train the last layer alone at first.",
)
@click.option(
    "--ema-decay",
    type=click.FloatRange(0, 1, max_open=True),
    help="Export an average of the weights, which keeps so much of itself at each step.",
)
@click.option(
    "--centre/--no-centre",
    default=None,
    help="Take off the mean feature before the norm, where that is better on the held-out days.",
)
@click.option("--temperature", type=float, help="Of the loss. [default: the objective's]")
@click.option(
    "--text-model",
    type=PathText(local=True),
    metavar="NAME|PATH",
    help="Hugging Face; for the objective clip.",
)
@click.option(
    "--precision", type=click.Choice(["auto", "fp32", "bf16", "fp16"]), help="Of the encoder."
)
@click.option(
    "--checkpoint-attention/--no-checkpoint-attention", default=None, help="Saves memory."
)
@click.option("--compile/--no-compile", default=None, help="torch.compile the backbone.")
@click.option("--evaluate-every", type=click.IntRange(1), help="Steps between held-out measures.")
@click.option("--workers", type=click.IntRange(0), help="Processes that decode.")
@click.option("--cache/--no-cache", default=None, help="Keep resized images on disk.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="Of weights, order and crops.")
@out_option
@click.option("--dry-run", is_flag=True, help="Only say what it would take, by a few timed steps.")
def train(
    config: str, until: dt.date, start_ds: dt.date | None, held_out_days: int, name: str | None,
    preset: str, out: str | None, dry_run: bool, **given: Any,
) -> None:  # fmt: skip
    """Train an encoder on training rows; prints the pin to append to the settings.

    The preset gives what no option says: `paper` is COURIER's appendix, for GPUs; `demo` trains a
    small network in minutes on a CPU. The same command goes on where a run was stopped. On several
    GPUs: torchrun --nproc-per-node 8 --no-python courier train ...
    """
    from courier_model.training.settings import PRESETS
    from pipelines.artefacts import training

    if given["weights"] and given["init_from"]:
        raise click.UsageError(
            f"--weights {given['weights']} and --init-from {given['init_from']} both say where the "
            "encoder begins. Give one of them."
        )
    wanted = replace(PRESETS[preset], **{k: v for k, v in given.items() if v is not None})
    settings = _settings(config)
    folder, out = _folders(config, out)
    name = name or wanted.objective
    stanza = training.train(
        settings, folder, out, wanted, name, start_ds, until, held_out_days, dry_run, _say
    )
    if stanza:
        click.echo(stanza)


@cli.command("fit-codebook")
@config_option
@click.option("--ds", type=Ds(), required=True, help="The day whose embeddings it is fitted on.")
@encoder_option("Of this package, which `courier embed --encoder` has embedded with.")
@click.option(
    "--clusters",
    required=True,
    metavar="N|LABEL=N,...",
    help="How many; or several resolutions, one of them main, as in coarse=1000,main=10000.",
)
@click.option(
    "--mode",
    type=click.Choice(["fresh", "warm", "aligned"]),
    help="What becomes of the parent's numbers. [default: warm; aligned for another encoder; "
    "fresh without a parent]",
)
@click.option(
    "--parent",
    type=PathText(),
    metavar="FOLDER",
    help="The codebook to continue. [default: the newest one pinned]",
)
@click.option(
    "--algorithm",
    type=click.Choice(["lloyd", "single-pass"]),
    default="lloyd",
    help="k-means on a sample, or one pass over all items in little memory.",
)
@click.option(
    "--points-per-cluster",
    type=click.IntRange(1),
    help="Items to sample for each cluster. [default: 256; 32 to begin a single pass]",
)
@click.option(
    "--soft-threshold",
    type=click.FloatRange(0),
    default=0.0,
    help="λ of single-pass, which makes centres sparse; 0 is right for dense embeddings.",
)
@click.option("--seed", default=0, help="Of the first centres.")
@click.option("--name", default="codebook", help="First part of the codebook's id.")
@out_option
@click.option("--dry-run", is_flag=True, help="Only say what it would do, and what that takes.")
@beam_argument
def fit_codebook(
    config: str, ds: dt.date, encoder: str | None, clusters: str, mode: str | None,
    parent: str | None, points_per_cluster: int | None, out: str | None, dry_run: bool,
    beam_args: Sequence[str],
    **asked: Any,
) -> None:  # fmt: skip
    """Fit cluster centres on one day's embeddings; prints the pin to append to the settings.

    Nights never fit: they keep the pinned codebook, and its numbers, as they are. To follow a
    catalogue that changed, --mode warm starts from the old centres; for a new encoder, aligned
    follows the items of the old clusters; new clusters get new numbers. fresh gives every cluster a
    new number. Where there is a parent, the package holds the crosswalk from old to new numbers.
    """
    from feature_jobs.codebooks.fit_codebook import ALGORITHMS, Fit
    from pipelines.artefacts import codebooks

    settings = _settings(config)
    folder, out = _folders(config, out)
    points = points_per_cluster or ALGORITHMS[asked["algorithm"]]
    fit = Fit(codebooks.parse_clusters(clusters), points_per_cluster=points, **asked)
    plan = codebooks.plan_fit(settings, ds, encoder, fit, mode, parent, beam_args, _say)
    if dry_run:
        click.echo(f"# {codebooks.describe(plan)}")  # a comment, as it may be appended too
        return
    click.echo(codebooks.fit_codebook(settings, plan, folder, out, _say))


@cli.command()
@click.option(
    "--rows",
    type=PathText(local=True),
    required=True,
    metavar="FILE",
    help="The embedding table, .npy of floats [max_id + 1, d]: row n is that of number n.",
)
@click.option(
    "--from", type=PathText(), required=True, metavar="FOLDER", help="The codebook it is for."
)
@click.option(
    "--to", type=PathText(), required=True, metavar="FOLDER", help="A codebook that continues it."
)
@click.option("--label", default="main", help="The resolution whose numbers the rows have.")
@click.option(
    "--out", type=PathText(local=True), required=True, metavar="FILE", help="The table to write."
)
@json_option
def crosswalk(rows: str, to: str, label: str, out: str, json: bool, **given: str) -> None:
    """Move the rows of a model's embedding table to a codebook that continues the table's own.

    A number that lived on keeps its row, and so does a retired one. A new number gets the mean of
    the rows that its items had, one without such items the mean of all. Of several generations the
    packages between are looked for beside the two.
    """
    from pipelines.artefacts import embedding_rows

    found = embedding_rows.move_rows(rows, given["from"], to, label, out)
    click.echo(dumps(found, indent=1) if json else embedding_rows.render(found))


# ---- Looking and starting --------------------------------------------------------------------


@cli.command()
@config_option
@click.option("--ds", type=Ds(), help="That day alone; ends with 0, 3 or 4, as said above.")
@click.option("--start-ds", type=Ds(), help="First day. [default: the last 14 that there are]")
@click.option("--end-ds", type=Ds(), help="Last day. [default: the last one]")
@click.option("--tables", is_flag=True, help="A line for each day, with the rows of its tables.")
@click.option(
    "--ddl",
    type=click.Choice(["spark", "bigquery", "duckdb"]),
    help="Instead, the SQL that makes the tables known there.",
)
@json_option
def status(
    config: str, ds: dt.date | None, start_ds: dt.date | None, end_ds: dt.date | None,
    tables: bool, ddl: str | None, json: bool,
) -> None:  # fmt: skip
    """Say how the last night went, what is next and unfinished, and which days and pins there are.

    With --ds it ends with 0 where the night of that day is whole, with 3 where it was refused or is
    on hold, and with 4 where it is not there.
    """
    from pipelines.reports import ddl as ddls
    from pipelines.reports import status as statuses

    if ddl:
        if ds or start_ds or end_ds or tables or json:
            raise click.UsageError("--ddl prints SQL for all days, and goes with no other option.")
        click.echo(ddls.statements(_settings(config), ddl))
        return
    if ds and (start_ds or end_ds):
        raise click.UsageError("Give one day as --ds, or several as --start-ds and --end-ds.")
    found = statuses.collect(_settings(config), ds or start_ds, ds or end_ds)
    click.echo(dumps(found, indent=1) if json else statuses.render(found, tables))
    if ds:
        statuses.check_day(found, ds)


@cli.command()
@config_option
@ds_option("The published day to look into.")
@click.option(
    "--impressions", type=click.IntRange(1), default=100, help="How many to plant clicks around."
)
@from_log_option
@json_option
def audit(config: str, ds: dt.date, impressions: int, from_log: bool, json: bool) -> None:
    """Prove on your own data that the features of one day know nothing of the future.

    Plants clicks around sampled impressions in a copy of a bucket of users and says which features
    moved; compares with what was published; looks at what encoder, codebook and embeddings were
    made from. Training sets of the day are audited likewise, with planted nights besides. Changes
    nothing, and ends with status 1 where it finds a leak.
    """
    from feature_jobs.schemas import DataContractError
    from pipelines.reports import audit as audits
    from pipelines.reports import audit_joins

    report = audit_joins.audit_day(_settings(config), ds, impressions, from_log, _say)
    click.echo(dumps(report.as_json(), indent=1) if json else audits.render(report))
    if report.leaks:
        raise DataContractError(
            f"The audit of ds {ds} found {len(report.leaks)} faults, of which the first is: "
            f"{report.leaks[0]}. A model trained on features that know the future, or miss what "
            "was known, fails online. Mend what is named, and make the day again."
        )


@cli.command()
@checked_days_options
@click.option(
    "--encoder",
    type=PathText(),
    multiple=True,
    metavar="FOLDER",
    help="A package whose embeddings are published; repeat. [default: the pinned one]",
)
@click.option(
    "--feature-set", multiple=True, metavar="NAME", help="Or the embeddings of this one; repeat."
)
@click.option(
    "--impressions",
    type=click.IntRange(1),
    default=20_000,
    help="About how many, at most, of all days; of whole users.",
)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, help="Draws other users.")
@click.option(
    "--allow-overlap", is_flag=True, help="Measure encoders made from these days or later, too."
)
@from_log_option
def measure(
    config: str, days: Sequence[dt.date], json: bool, encoder: tuple[str, ...],
    feature_set: tuple[str, ...], **asked: Any,
) -> None:  # fmt: skip
    """Say which encoder's vectors tell more of what users click, from published embeddings.

    How well do an impression's cosines with what its user had clicked before rank clicked over
    unclicked impressions? With standard errors over users, on the same impressions for all, beside
    a plain colour histogram. Takes minutes, trains no model and writes nothing.
    """
    from pipelines.reports import measure as measures

    wanted = measures.Asked(encoder, feature_set, **asked)
    report = measures.measure(_settings(config), days, wanted, _say)
    click.echo(dumps(report.as_json(), indent=1) if json else measures.render(report))


@cli.command()
@checked_days_options
@click.option("--fast", is_flag=True, help="Take the bytes of files for right, without checksums.")
def validate(config: str, days: Sequence[dt.date], fast: bool, json: bool) -> None:
    """Check what is published of one day or several: every byte, every law, every gate again.

    Files are those of the manifest, rows keep the laws of their tables, tables fit each other and
    the night's record, and a sample of scores is computed again from the shop's own log. Writes
    nothing. Ends with 1 where something is broken, 3 where a gate would refuse it now, 4 where a
    day is not there, or is being published just now.
    """
    from pipelines.reports import validate as validations

    found = validations.validate(_settings(config), days, fast)
    told = [day.as_json() for day in found]
    text = dumps(told[0] if len(days) == 1 else told, indent=1)
    click.echo(text if json else validations.render(found))
    validations.refuse(found)


@cli.command()
@config_option
@ds_option("The day whose night is brought back, or released.")
@click.option("--reason", help="Why; whoever runs the day again is told. [default: rolled back]")
@click.option(
    "--release", is_flag=True, help="Lift the hold instead, so that the day may be made again."
)
@click.option("--dry-run", is_flag=True, help="Only look, and say what would come back.")
@json_option
def rollback(
    config: str, ds: dt.date, reason: str | None, release: bool, dry_run: bool, json: bool
) -> None:
    """Bring back the night of one day that was published before the present one, and hold it there.

    Until --release, commands that would publish the day end with status 3, so that no retry brings
    back what was rejected. All files are read before the first step; what is damaged is told, and
    nothing has changed then. The same command goes on after a kill.
    """
    from pipelines.running import announcing
    from pipelines.running import rollback as rollbacks

    settings = _settings(config)
    if release and reason:
        raise click.UsageError("--release lifts a hold, which has its --reason already.")
    if release:
        found = rollbacks.release(settings, ds, dry_run, _say)
    else:
        found = rollbacks.roll_back(settings, ds, reason or "rolled back", dry_run, _say)
    click.echo(dumps(found, indent=1) if json else rollbacks.render(found))
    if not release and not dry_run:
        announcing.announce(settings, ds, _say, again="rollback")


@cli.command()
@config_option
@click.option("--dry-run", is_flag=True, help="Only look, and say what would go.")
@json_option
def prune(config: str, dry_run: bool, json: bool) -> None:
    """Delete what [retention] keeps no longer: old days, earlier versions, what dead runs staged.

    Never what a pin, a night's record, a hold or the window still needs. A day on which a run is at
    work is left as it is, and the next prune comes back to it. So is one of which a record, a hold
    or a manifest is damaged, and the command ends with 1. The same command goes on after a kill.
    """
    from pipelines.running import retention

    found = retention.prune(_settings(config), dry_run, _say)
    click.echo(dumps(found.as_json(), indent=1) if json else retention.render(found))
    if found.damaged:
        raise retention.damaged(found)


@cli.command()
@click.option(
    "--catalogue",
    type=PathText(),
    metavar="PATH",
    help="Parquet: a folder, a file, or a pattern in which {ds} stands for the day.",
)
@click.option(
    "--impressions",
    type=PathText(),
    metavar="PATH",
    help="Likewise; without it, nights make cluster IDs alone.",
)
@click.option(
    "--images", type=PathText(), multiple=True, metavar="FOLDER", help="Where images lie; repeat."
)
@click.option(
    "--out",
    type=PathText(local=True),
    default="courier.toml",
    metavar="FILE",
    help="The settings to write.",
)
@click.option(
    "--check",
    type=PathText(local=True),
    is_flag=False,
    flag_value="courier.toml",
    metavar="[FILE]",
    help="Look again at what settings name, and write nothing. [default file: courier.toml]",
)
def init(
    catalogue: str | None,
    impressions: str | None,
    images: tuple[str, ...],
    out: str,
    check: str | None,
) -> None:
    """Look at your tables and images, say what will not work, and write commented settings.

    With --check, look at those of settings that exist, and at their pins; a problem ends it with
    status 1.
    """
    from pipelines.first_look import look as first_look

    if check:
        if catalogue or impressions or images:
            raise click.UsageError("--check looks where the settings say; give no paths with it.")
        _check_settings(check)
        return
    if not catalogue:
        raise click.UsageError("Give --catalogue and --impressions, or settings to --check.")
    first_look.refuse_existing(out)
    found = first_look.look(catalogue, impressions, images, os.path.dirname(os.path.abspath(out)))
    problems = _tell(found.findings)
    first_look.write_settings(out, found.toml)
    click.echo(f"wrote {out}; problems to mend first: {problems}" if problems else f"wrote {out}")


def _check_settings(path: str) -> None:
    from feature_jobs.schemas import DataContractError
    from pipelines.config import load_settings
    from pipelines.first_look.look import look_again

    if problems := _tell(look_again(load_settings(path), os.path.dirname(os.path.abspath(path)))):
        raise DataContractError(
            f"What is called a problem above would stop a night made by {path} ({problems} of "
            "them). Mend that, and look again."
        )


def _tell(findings: Sequence[Any]) -> int:
    """Prints what a first look saw; returns how many problems there are."""
    for finding in findings:
        click.echo(f"{finding.level:8} {finding.text}")
    return sum(finding.level == "problem" for finding in findings)


@cli.command()
@click.option(
    "--out",
    required=True,
    type=PathText(local=True),
    metavar="FOLDER",
    help="The shop's new folder.",
)
@click.option(
    "--images", type=PathText(local=True), metavar="FOLDER", help="Photographs to use instead."
)
@click.option(
    "--items",
    type=PathText(local=True),
    metavar="N|CSV",
    help="How many to draw; or item_id,category,image_path.",
)
@click.option("--users", type=click.IntRange(1), default=1200)
@click.option("--days", type=click.IntRange(1), default=9)
@click.option("--first-ds", type=Ds(), default="2026-01-01")
@click.option("--seed", default=7)
def demo(
    out: str, items: str | None, images: str | None, users: int, days: int, first_ds: dt.date,
    seed: int,
) -> None:  # fmt: skip
    """Make a small shop: drawn garments, users with tastes, a click log, and settings for it."""
    from pipelines.demo.shop import Shop, make_shop

    if images is None and items is not None and not items.isdigit():
        raise click.BadParameter("must be a number unless --images is given", param_hint="--items")
    drawn = {"items": int(items)} if images is None and items else {}
    shop = Shop(seed=seed, users=users, days=days, first_ds=first_ds, **drawn)
    made = make_shop(
        Path(out), shop, Path(images) if images else None, Path(items) if images and items else None
    )
    click.echo(
        f"{out}: {made.items:,} items, {made.impressions:,} impressions and {made.clicks:,} clicks "
        f"from ds {made.ds[0]} to {made.ds[-1]}; {made.images_written:,} images drawn, "
        f"{made.missing:,} missing, {made.undecodable:,} undecodable"
    )


# ---- Running ---------------------------------------------------------------------------------


_IDLE = ("semi_persistent_directory", "Resource module is not available")


def _is_news(record: logging.LogRecord) -> bool:
    """Returns whether a log record tells an operator anything.

    Beam's idle warnings do not, nor what it makes of an interruption or of an error that `main`
    tells in one paragraph, nor the traces of a job service, for which a job fails.
    """
    text, error = record.getMessage(), record.exc_info and record.exc_info[1]
    told = isinstance(error, CourierError) or f"{CourierError.__module__}." in text
    if _received or (told and record.name.startswith("apache_beam")):
        return False
    if record.module == "portable_runner" and record.levelno >= logging.ERROR:
        return False
    return not any(idle in text for idle in _IDLE)


def _set_up_logging() -> None:
    handler = logging.StreamHandler()
    handler.addFilter(_is_news)
    logging.basicConfig(
        level=logging.WARNING, handlers=[handler], format="%(levelname)s %(message)s"
    )


class _Interrupted(BaseException):
    """A signal asked the command to end."""


def _interrupt(number: int, _frame: Any) -> NoReturn:
    _received.append(number)
    raise _Interrupted


def _tell_error(error: CourierError) -> None:
    """Tells an error in its paragraph, and of gates that refuse in their table besides."""
    _say(f"Error: {error}")
    if isinstance(error, GateRefused) and error.table:
        _say(f"\n{error.table}\n")


_received: list[int] = []  # Beam wraps what is raised inside a job, so the signal is kept here


def main(args: Sequence[str] | None = None) -> int:
    """Runs `courier` and returns its exit status."""
    _set_up_logging()
    _received.clear()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        cli.main(args, prog_name="courier", standalone_mode=False)
        return 0
    except BaseException as error:
        if _received:
            _say("Interrupted; the same command resumes.")
            return 128 + _received[0]
        if isinstance(error, CourierError):
            _tell_error(error)
            return error.exit_status
        if isinstance(error, OSError) and error.filename:
            _say(f"Error: {error}. Mend the file or the disk and run the same command again.")
            return 1
        if isinstance(error, click.ClickException):
            error.show()
            return error.exit_code
        raise


if __name__ == "__main__":
    sys.exit(main())
