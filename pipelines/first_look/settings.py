"""Writes the text of the settings of `courier init`: every setting, with a comment."""

import datetime as dt
import json
import os
from collections.abc import Sequence
from string import Template

from feature_jobs.store import day_names, files
from feature_jobs.store.addresses import Pairs
from pipelines.config import CatalogueColumns, ImpressionColumns
from pipelines.first_look.tables import Place, Table

_SETTINGS = Template("""\
# Settings of COURIER, written by `courier init`. Paths are relative to this file's folder, or gs://…;
# {ds} stands for the day, YYYY-MM-DD, {ds:%Y%m%d} for 20260301, and year={ds:%Y}/month={ds:%m} for
# parts of it. A setting that is commented out has the default or example shown.

# Where the relative paths of tables and images begin, pins aside; without it, this file's folder.
# A shop that lies in a bucket can be moved by this line alone.
# base = "gs://shop"
# Where the tables are published.
root = "features"
# The name of this series of tables; several may live side by side below the root.
feature_set = "production"
# The time zone, by its IANA name, in which a day begins and ends.
day_timezone = "UTC"
# A history is what a user clicked last: at most so many items ...
# history_len = 50
# ... of the last so many days. Items that left the catalogue keep their features as long.
# window_days = 30
# So long after a click do histories know it: for a shop that serves stale ones.
# history_lag_seconds = 0.0
# An item clicked twice stands once in a history, at its newest place; or with true at both.
# keep_repeats = false
# Impressions may come in the log so many days after their own; later ones have no history.
# late_days = 2
# Before this day there are no clicks: histories begin with it.
# history_start_ds = "2026-01-01"
# On these days the shop was closed: no log of them is waited for.
# closed_days = ["2025-12-25"]
# Who waits for inputs (`courier refresh --wait`) takes files for whole that have stood still for so
# many minutes, unless a _SUCCESS is required.
# settle_minutes = 10.0
# So many hours after the end of its day a night counts as available, whenever it was made: who
# reads what a moment may know ([simscore] features_from = "previous") finds no newer one.
# availability_delay_hours = 6.0
# Tables are split into files of at most about so many rows.
# rows_per_shard = 131072
# A command that is called for each night that is published. Its environment names the day, as
# COURIER_DS, and for each table path and version, as COURIER_PATH_ITEM_FEATURES and
# COURIER_VERSION_ITEM_FEATURES.
# on_published = ["python", "add_partitions.py"]
# A night makes "all" tables, or those of "items" alone: cluster IDs, without [impressions].
$tables

[catalogue]
# One row per item: one snapshot per day, or one for all days.
path = $catalogue_path
# Local images are read below these folders alone; a relative image_uri begins at the first.
# A gs:// image_uri is read wherever it lies. [] says that there are no images.
$image_roots
# Of an image_uri that begins with the first text of a pair, as in [["https://cdn.shop.example/",
# "gs://shop-images/"]], the file lies below the second, a folder. The first pair that fits is
# taken, and nothing is fetched.
$rewrite
# Wait for a file _SUCCESS in the partition.
# require_success = false

# The names of the columns in your table. The title may be absent there.
[catalogue.columns]
$catalogue_columns

$without_log[impressions]
# One row per item shown to a user, clicked or not; one partition per day.
$impressions_path
# Wait for a file _SUCCESS in the partition.
# require_success = false
# The time zone of times that are stored without one; needed for those only.
# input_timezone = "UTC"
# Without a click_time, a click is dated so long after its impression.
# click_delay_seconds = 0.0
# Columns of your table to pass through to user_simscores.
# carry = []

# The names of the columns in your table. The last four may be absent there: to do without one that
# is there, name one that is not.
$without_log[impressions.columns]
$impressions_columns

[embed]
# "cuda" warns where there is none and a CPU must do; "auto" takes what there is.
# device = "auto"
# The precision of all embeddings, "fp32" or "bf16"; "auto" takes bf16 where a worker's hardware
# has it.
# precision = "auto"
# Images that go through the encoder at once: 8 was best on two CPU cores, a GPU wants 256 or so.
# batch_size = 32
# About as many images as a thread of a worker loses when it is killed.
# chunk_items = 256

[item_features]
# Add the embedding itself as a column.
# vector = false
# Add the distance to the second-nearest centre, which tells how clear a cluster ID is.
# second_distance = false

[simscore]
# Whose items impressions are scored with: those of the "same" day; or "previous", those of the
# newest night that was available at their moment, as a shop serves them.
# features_from = "same"
# Columns to add: "history_item_ids", the items that were scored; "history_cluster_ids", their
# cluster IDs; "sim_bucket", the tier of each score; "top_positions", where the `top_k` items most
# alike stand; of a further resolution of the codebook, fine say, also "history_cluster_fine" and
# "same_cluster_fine".
# columns = []
# The tiers of simtier and sim_bucket: 20 of real scores, or the 22 that "muse" has.
# tiers = "courier"
# top_k = 10
# What serving keeps embeddings in: "float16" rounds them to half floats before they are scored.
# embedding_dtype = "float32"
# How embeddings reach impressions: as a copy on every worker ("broadcast"), or by a "shuffle";
# "auto" is a copy as long as it is not larger than the limit.
# embeddings_by = "auto"
# broadcast_limit_gb = 20.0

[training]
# The categories whose items an encoder is trained on, ["dress", "shirt"] say; none means all.
# categories = []
# Without a request_id, impressions of one user further apart than this are of two requests.
# request_gap_seconds = 60.0

[gates]
# A night is judged before it is published: beyond `warn` a gate tells, beyond `fail` it refuses.
# The share of catalogue items that have an embedding is not to be below ...
# image_coverage = {warn = 0.9, fail = 0.5}
# ... and the share without an image address not be above that of the day before by more than ...
# lost_addresses = {warn = 0.02, fail = 0.05}
# ... of those with an address, the share without a readable image not above ...
# rejects = {warn = 0.02, fail = 0.05}
# ... nor that of images that were there last time, or are new, and cannot be fetched.
# outage = {warn = 0.01, fail = 0.03}
# How many times more or fewer items there may be than in the median of the last seven nights.
# item_rows = {warn = 1.2, fail = 1.5}
# The share of items, and of impressions, whose cluster ID is not that of the day before.
# churn = {warn = 0.1, fail = 0.2}
# The share of items in the largest cluster, and of clusters without an item.
# balance = {warn = 0.3, fail = 0.5}
# dead_clusters = {warn = 0.3, fail = 0.5}
# How far cluster sizes are from those of the day before, as a population stability index.
# cluster_drift = {warn = 0.1, fail = 0.25}
# Users with a history, as a share of the median of the last seven nights, are not to be below ...
# user_rows = {warn = 0.8, fail = 0.5}
# Shares of impressions: of items that the catalogue lacks ...
# unknown_items = {warn = 0.02, fail = 0.05}
# ... of those that lie before their day, and that came too late for a history.
# late = {warn = 0.05, fail = 0.2}
# too_late = {warn = 0.01, fail = 0.05}
# Where the log has a click_time, the share of clicks that have one is not to be below ...
# click_times = {warn = 0.9, fail = 0.5}
# ... nor, of impressions with a history, the share of those with a score.
# score_coverage = {warn = 0.5, fail = 0.1}
# How far the largest score of impressions, clicked and not, and the lengths of histories are from
# those of the day before, as population stability indices.
# score_drift = {warn = 0.1, fail = 0.25}
# history_drift = {warn = 0.1, fail = 0.25}
# By how much the share of impressions without any score may be above that of the day before.
# zero_rows = {warn = 0.1, fail = 0.3}
# How many times more or fewer impressions there may be than in the median of the last seven nights.
# impression_rows = {warn = 2.5, fail = 4.0}

[workers]
# Threads that a worker process computes on; without it, its part of the host's cores.
# threads = 4

[backfill]
# What a step of `courier backfill` may take, which decides how many days it has: memory of the
# local engine, and room for what is staged before it is published.
# memory_gb = 4.0
# disk_gb = 100.0

[output]
# Where the tables with user IDs go, if not below the root: people may then read items alone.
# user_root = "gs://shop-users/features"
# How the folder of a day is named in every table, if all your tables spell it otherwise. To be
# chosen before the first night: a name by which the newest night is not found is refused.
# partition = "ds={ds}"
# A row group, which readers hold in memory at once, has at most so many MB, uncompressed.
# row_group_mb = 128

[retention]
# What `courier prune` keeps. Of a table that is named, as in {user_simscores = 400}, so many days,
# counted back from the newest night, not fewer than window_days; of others all. The two tables of
# one stage go together: name user_histories with recent_clicks, item_embeddings with item_rejects.
# days = {}
# So many earlier versions of each partition, besides those that a rollback would bring back.
# versions = 1
# What was replaced less than so many hours ago stays: somebody may be reading it.
# grace_hours = 24.0
# What a run has staged that was refused, or died, can be resumed for so long.
# staging_hours = 168.0
# Prune at the end of each `courier refresh`.
# by_the_night = false

[costs]
# What an hour of one core costs, and keeping a GB for a month: estimates of what is to be made come
# with their money then.
# currency = "USD"
# core_hour = 0.05
# gb_month = 0.02

# Beam's own options, as Beam spells them; [beam.embed] and the like are for one stage alone.
[beam]
# runner = "DataflowRunner"

# Pins say from which day on features are made with which encoder and codebook. The commands below
# append them; they look like this:
#
# [[pins]]
# from_ds = "$from_ds"
# encoder = "encoders/swin-t-0123456789ab"
# codebook = "codebooks/codebook-0123456789ab"
#
# What to run next, once the problems that `courier init` named are mended:
#
#   $make_encoder >> courier.toml
#   courier embed --ds $fit_ds
#   courier fit-codebook --ds $fit_ds --clusters $clusters >> courier.toml
#   courier refresh --ds $refresh_ds
$of_vectors""")
_INSTEAD = """\
#
# The shop has vectors of its items. To use them instead of images, begin with
#
#   {register} >> courier.toml
"""
_TRAINED = """\
#
# Where the vectors were trained on this shop's clicks, the days of those are to be told: by
# --trained-on START END, instead of --trained-elsewhere.
"""


def settings_text(
    items: Table,
    events: Table | None,
    roots: Sequence[str],
    rewrite: Pairs,
    folder: str,
    register: str | None,
    has_images: bool,
) -> str:
    """Writes the text of a settings file in `folder` for two tables, with images below `roots`.

    Without impressions, `events`, nights are of items alone. `rewrite` has pairs of an address and
    a folder, "" for one that is not known. `register` is the command that makes an encoder of the
    shop's vectors: the first one to run, unless the shop `has_images`. What could not be found is a
    line that says REQUIRED.
    """
    centre_ds, fit_ds, refresh_ds = first_nights(items, events)
    centre = f" --ds {centre_ds}" if centre_ds else ""
    of_images = f"courier init-encoder --weights imagenet{centre}"
    instead = _INSTEAD.format(register=register) if has_images else ""
    return _SETTINGS.substitute(
        catalogue_path=_quote(near_template(items.place, folder)),
        image_roots=_image_roots(roots, folder) if has_images else "image_roots = []",
        rewrite=_rewrite(rewrite, folder),
        catalogue_columns=_columns(items, CatalogueColumns),
        tables='# tables = "all"' if events else 'tables = "items"',
        without_log="" if events else "# ",
        impressions_path=_impressions_path(events.place if events else None, folder),
        impressions_columns=_columns(events, ImpressionColumns),
        make_encoder=of_images if has_images else register,
        fit_ds=fit_ds,
        from_ds=fit_ds + dt.timedelta(days=1),  # features know nothing of their own day
        refresh_ds=refresh_ds,
        clusters=max(1, min(1000, items.source.rows // 20)),
        of_vectors=instead + _TRAINED if register else "",
    )


def near(path: str, folder: str) -> str:
    """Returns `path` relative to `folder` where that takes at most two steps up, else absolute."""
    if files.is_remote(path):
        return path
    relative = os.path.relpath(path, folder)
    return path if relative.split(os.sep).count(os.pardir) > 2 else relative


def near_template(place: Place, folder: str) -> str:
    """Returns where a table lies as `near` does: the names of folders are no patterns."""
    return near(place.template, day_names.literal(folder))


def first_nights(items: Table, events: Table | None) -> tuple[dt.date | None, dt.date, dt.date]:
    """Chooses days to centre the encoder and fit the codebook on, and for the first night.

    Each is later than the one before it; there may be no day to centre on.
    """
    newest, day = (events or items).source.form.ds, dt.timedelta(days=1)
    if not items.place.days:  # one catalogue for all
        return newest - 2 * day, newest - day, newest
    before = [ds for ds in items.place.days if ds < newest]
    if not before:
        return None, newest, newest + day
    return before[-2] if len(before) > 1 else None, before[-1], newest


def _quote(text: str) -> str:
    """Quotes `text` as a TOML string: JSON's, as long as it isn't escaped to surrogates."""
    return json.dumps(text, ensure_ascii=False)


def _image_roots(roots: Sequence[str], folder: str) -> str:
    if not roots:  # an empty list would say that there are no images
        return 'image_roots = [""]  # REQUIRED: the folder that image_uri are relative to'
    return f"image_roots = [{', '.join(_quote(near(root, folder)) for root in roots)}]"


def _rewrite(pairs: Pairs, folder: str) -> str:
    known = [f"[{_quote(source)}, {_quote(near(to, folder))}]" for source, to in pairs if to]
    unknown = [f'[{_quote(source)}, "gs://…"]' for source, to in pairs if not to]
    lines = [f"rewrite = [{', '.join(known)}]"] if known or not unknown else []
    if unknown:
        lines.append(f"rewrite = [{', '.join(known + unknown)}]  # REQUIRED: where their files lie")
    return "\n".join(line if known and at == 0 else f"# {line}" for at, line in enumerate(lines))


def _impressions_path(place: Place | None, folder: str) -> str:
    if place is None:
        return '# path = "impressions/dt={ds}/*.parquet"'
    if place.days:
        return f"path = {_quote(near_template(place, folder))}"
    return '# path = "impressions/dt={ds}/*.parquet"  # REQUIRED: where the partition of a day lies'


def _columns(table: Table | None, names: type[CatalogueColumns | ImpressionColumns]) -> str:
    """Lists every column: as a comment where it has our name, or was not found."""
    columns = table.columns if table else {}
    found = {ours: columns.get(ours, ours) for ours in names.model_fields}
    return "\n".join(f"{'# ' * (a == b)}{a} = {_quote(b)}" for a, b in found.items())
