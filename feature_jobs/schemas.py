"""Describes every table that COURIER publishes, and how a run can fail.

A table has columns, types, a key and meanings. A table's schema depends on the shop only through
the types of its IDs (int64 or string), which are kept from the user's tables to ours. Lists are
newest first, padded with 0, and hold no nulls; those of a training row and of a user's clicks are
not padded.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

ROW_PVS = 5  # of a training row, and
ROW_CLICKS = 5  # so many clicks: ten images, COURIER appendix §4
SIM_TIERS = 20  # tiers of width 0.1 over [-1, 1], arXiv 2407.19467
MUSE_TIERS = 22  # as MUSE has them, arXiv 2512.07216
Tiers = Literal["courier", "muse"]


class CourierError(Exception):
    """A CourierError is a failure told to the operator in one paragraph, without a traceback.

    The paragraph says what was found, what was expected, where, what would have gone wrong, and
    what to do. It carries item IDs at most, never user IDs.
    """

    exit_status = 1


class OperatorError(CourierError):
    """Says that usage or settings are wrong."""

    exit_status = 2


class DataContractError(CourierError):
    """A table breaks its contract, so that nothing made from it could be trusted."""

    exit_status = 1


class GateRefused(CourierError):
    """The tables were made, but a quality gate refuses to publish them; a `table` tells which."""

    exit_status = 3

    def __init__(self, message: str, table: str = "") -> None:
        super().__init__(message)
        self.table = table


class InputNotReady(CourierError):
    """An input is not there yet; the same command may succeed later."""

    exit_status = 4


class StorageUnavailable(CourierError):
    """A disk or a bucket could not be reached for so long that the command gave up."""

    exit_status = 1


TIMESTAMP = pa.timestamp("us", tz="UTC")
_STRING = pa.string()
_FLOATS = pa.list_(pa.float32())
_ITEM_ID = "item_id"
_USER_ID = "user_id"


@dataclass(frozen=True)
class Column:
    """Describes one column.

    `type` is an Arrow type, or names an ID whose type is the shop's own.
    """

    name: str
    type: pa.DataType | str
    meaning: str
    nullable: bool = False


@dataclass(frozen=True)
class Table:
    """Describes one published table.

    Rows are sorted by `key` within each file, then by `then_by`. One without a key has the rows of
    a table of the shop's own, as they came, with its columns before ours.
    """

    name: str
    key: str
    shared: bool
    columns: tuple[Column, ...]
    then_by: tuple[str, ...] = ()

    @property
    def has_users(self) -> bool:
        """Returns whether it holds user IDs."""
        return not self.key or any(column.name == _USER_ID for column in self.columns)

    def schema(
        self,
        item_id: pa.DataType,
        user_id: pa.DataType | None = None,
        impression_id: pa.DataType | None = None,
        request_id: pa.DataType | None = None,
        extra: Sequence[pa.Field] = (),
        without: Sequence[str] = (),
        dimension: int | None = None,
    ) -> pa.Schema:
        """Returns the Arrow schema for a shop's ID types.

        `extra` fields come last, `without` are left out. What the columns mean tells the
        `dimension` of embeddings, where it is given.
        """
        ids = {
            _ITEM_ID: item_id,
            _USER_ID: user_id,
            "impression_id": impression_id,
            "request_id": request_id,
            "list item_id": pa.list_(item_id),
        }
        fields = [
            pa.field(
                column.name,
                ids[column.type] if isinstance(column.type, str) else column.type,
                nullable=column.nullable,
                metadata={"meaning": column.meaning.replace("[d]", f"[{dimension or 'd'}]")},
            )
            for column in self.columns
            if column.name not in without
        ]
        return pa.schema([*fields, *extra])


def _clicks_of_user(user: str, items: str) -> tuple[Column, ...]:
    """Returns the columns of a table with a row of clicks per user, and what they mean."""
    return (
        Column("user_id", _USER_ID, user),
        Column("item_ids", "list item_id", items),
        Column("click_times", pa.list_(TIMESTAMP), "when, aligned with item_ids"),
    )


USER_HISTORIES = Table(
    "user_histories",
    key="user_id",
    shared=True,
    columns=_clicks_of_user(
        "a user with a click in the window", "items clicked before the end of ds, newest first"
    ),
)

RECENT_CLICKS = Table(
    "recent_clicks",
    key="user_id",
    shared=True,
    columns=_clicks_of_user(
        "a user with such a click",
        "clicked items that user_histories of ds does not show but the next day's histories need, "
        "newest first; no feature, since some are dated after the end of ds",
    ),
)

TRAINING_ROWS = Table(
    "training_rows",
    key="user_id",
    then_by=("request_id", "chunk"),
    shared=True,
    columns=(
        Column("user_id", _USER_ID, "to whom the items were shown"),
        Column("request_id", "request_id", "the shop's, else its first moment in microseconds"),
        Column("chunk", pa.int32(), "from 0; a request with more clicks than a row holds has more"),
        Column("event_time", TIMESTAMP, "the row's moment: the request's earliest impression"),
        Column("pv_item_ids", "list item_id", f"at most {ROW_PVS} items shown, clicked ones first"),
        Column("pv_clicked", pa.list_(pa.bool_()), "the labels, aligned with pv_item_ids"),
        Column(
            "click_item_ids",
            "list item_id",
            f"at most {ROW_CLICKS} items clicked before event_time, newest first",
        ),
    ),
)

ITEM_EMBEDDINGS = Table(
    "item_embeddings",
    key="item_id",
    shared=False,
    columns=(
        Column("item_id", _ITEM_ID, "the item"),
        Column("embedding", _FLOATS, "[d] unit vector"),
        Column("image_uri", _STRING, "as in the catalogue"),
        Column("image_generation", pa.int64(), "object generation; null on a local disk", True),
        Column("image_size", pa.int64(), "bytes"),
        Column("image_mtime", TIMESTAMP, "file time; null where generations exist", True),
        Column("image_sha256", _STRING, "of the image's bytes, hex"),
        Column("category", _STRING, "as in the catalogue", True),
        Column("in_catalogue", pa.bool_(), "false for an item that left within window_days"),
        Column("left_catalogue_ds", pa.date32(), "first ds without it; null while in it", True),
    ),
)

ITEM_REJECTS = Table(
    "item_rejects",
    key="item_id",
    shared=False,
    columns=(
        Column("item_id", _ITEM_ID, "a catalogue item without an embedding"),
        Column("image_uri", _STRING, "as in the catalogue", True),
        Column("category", _STRING, "as in the catalogue", True),
        Column("stage", _STRING, "where it fell out: read or decode"),
        Column("reason", _STRING, "from a closed list"),
        Column("message", _STRING, "what was found"),
        Column("attempts", pa.int32(), "distinct ds on which it was tried"),
        Column("first_ds", pa.date32(), "first of them"),
        Column("last_ds", pa.date32(), "latest of them"),
        Column("next_ds", pa.date32(), "when it is tried again"),
    ),
)

ITEM_FEATURES = Table(
    "item_features",
    key="item_id",
    shared=False,
    columns=(
        Column("item_id", _ITEM_ID, "a catalogue item or a kept former item"),
        Column("category", _STRING, "as in the catalogue", True),
        Column("has_image", pa.bool_(), "it has an embedding"),
        Column("in_scope", pa.bool_(), "its category is one the encoder was made for"),
        Column("in_catalogue", pa.bool_(), "false for a kept former item"),
        Column("cluster_id", pa.int32(), "1..max_id; 0 = none"),
        Column(
            "centre_distance", pa.float32(), "Euclidean, to its centre; 0 where cluster_id is 0"
        ),
        Column(
            "second_distance",
            pa.float32(),
            "Euclidean, to the second-nearest centre; 0 where there is none",
        ),
        Column("encoder_id", _STRING, "the encoder of the embedding"),
        Column("codebook_id", _STRING, "the codebook of the cluster ID"),
        Column("embedding", _FLOATS, "[d] the Vector form; zeros without a feature"),
    ),
)


MAIN = "main"  # the resolution of a codebook that cluster_id is of


def cluster_column(label: str) -> str:
    """Names the column of `item_features` that holds the cluster IDs of a resolution."""
    return "cluster_id" if label == MAIN else f"cluster_{label}"


def cluster_field(label: str) -> pa.Field:
    """Returns the field of the cluster IDs of a resolution other than the main one."""
    meaning = {"meaning": f"as cluster_id, of the resolution {label}"}
    return pa.field(cluster_column(label), pa.int32(), nullable=False, metadata=meaning)


USER_SIMSCORES = Table(
    "user_simscores",
    key="impression_id",
    shared=False,
    columns=(
        Column("impression_id", "impression_id", "the shop's, else a digest of what it shows"),
        Column("user_id", _USER_ID, "to whom it was shown"),
        Column("item_id", _ITEM_ID, "what was shown"),
        Column("event_time", TIMESTAMP, "when"),
        Column("clicked", pa.bool_(), "the label"),
        Column("sim_scores", _FLOATS, "[L] cosine with each history item, newest first"),
        Column("sim_mask", pa.list_(pa.int8()), "[L] 1 = a real score"),
        Column("history_item_ids", "list item_id", "[history_len] the history that was scored"),
        Column("history_len", pa.int32(), "items in the history, at most L"),
        Column("sim_known", pa.int32(), "real scores"),
        Column("sim_max", pa.float32(), "largest real score; 0 if none"),
        Column("sim_mean", pa.float32(), "mean of the real scores; 0 if none"),
        Column("simtier", pa.list_(pa.int32()), f"[{SIM_TIERS}] real scores per tier of 0.1"),
        Column("same_cluster", pa.int32(), "history items with the impression's cluster_id"),
        Column("encoder_id", _STRING, "the encoder of the scores"),
        Column("codebook_id", _STRING, "the codebook of same_cluster"),
        Column("feature_ds", pa.date32(), "the night of items and scores; null for none yet", True),
    ),
)

# Columns of user_simscores on request, with those of `score_field` for each further resolution.
HISTORY_ITEM_IDS, HISTORY_CLUSTER_IDS = "history_item_ids", "history_cluster_ids"
SIM_BUCKET, TOP_POSITIONS = "sim_bucket", "top_positions"
SCORES_ON_REQUEST = (HISTORY_ITEM_IDS, HISTORY_CLUSTER_IDS, SIM_BUCKET, TOP_POSITIONS)
HISTORY_CLUSTER, SAME_CLUSTER = "history_cluster_", "same_cluster_"


def resolution_of(column: str) -> str | None:
    """Names the resolution whose cluster IDs a column on request is made of; None for none."""
    if column == HISTORY_CLUSTER_IDS:
        return MAIN
    for prefix in (HISTORY_CLUSTER, SAME_CLUSTER):
        label = column.removeprefix(prefix)
        if label not in (column, MAIN, ""):
            return label
    return None


def score_field(column: str) -> pa.Field | None:
    """Returns the field of a column that `user_simscores` has on request beside history_item_ids.

    Returns None for a name that is none of these.
    """
    label, integers = resolution_of(column), pa.list_(pa.int32())
    fields = {
        HISTORY_CLUSTER_IDS: (integers, "[L] cluster_id of each history item, newest first"),
        SIM_BUCKET: (integers, "[L] tier of each real score, the lowest being 1; 0 = none"),
        TOP_POSITIONS: (
            integers,
            "[top_k] places in the history, from 1, of the items most alike, best first; 0 = none",
        ),
        f"{HISTORY_CLUSTER}{label}": (integers, f"[L] as {HISTORY_CLUSTER_IDS}, of {label}"),
        f"{SAME_CLUSTER}{label}": (pa.int32(), f"as same_cluster, of the resolution {label}"),
    }
    if column not in fields:
        return None
    kind, meaning = fields[column]
    return pa.field(column, kind, nullable=False, metadata={"meaning": meaning})


def scores_schema(
    item_id: pa.DataType,
    user_id: pa.DataType,
    impression_id: pa.DataType,
    columns: Collection[str] = (),
    tiers: Tiers = "courier",
    carried: Sequence[pa.Field] = (),
    by_night: bool = False,
) -> pa.Schema:
    """Returns the schema of `user_simscores` with the `columns` on request and those `carried`.

    Rows tell their night where they are scored `by_night`.
    """
    asked = [field for name in sorted(columns) if (field := score_field(name))]
    without = [HISTORY_ITEM_IDS] if HISTORY_ITEM_IDS not in columns else []
    without += [] if by_night else ["feature_ds"]
    if tiers == "muse":
        without.append("simtier")
        meaning = {"meaning": f"[{MUSE_TIERS}] log(1 + scores per tier), as MUSE has them"}
        asked.insert(0, pa.field("simtier", _FLOATS, nullable=False, metadata=meaning))
    extra = [*asked, *carried]
    return USER_SIMSCORES.schema(item_id, user_id, impression_id, extra=extra, without=without)


JOINED = Table(
    "joined",
    key="",
    shared=False,
    columns=(
        Column("feature_ds", pa.date32(), "the night of the features; null: none yet", True),
        Column("has_night", pa.bool_(), "a night was available at the sample's moment"),
        Column("item_known", pa.bool_(), "the night has the item"),
        Column("has_image", pa.bool_(), "and an embedding of it"),
        Column("in_scope", pa.bool_(), "and its category is one the encoder was made for"),
        Column("cluster_id", pa.int32(), "1..max_id; 0 = none"),
        Column("sim_scores", _FLOATS, "[L] cosine with each history item, newest first"),
        Column("sim_mask", pa.list_(pa.int8()), "[L] 1 = a real score"),
        Column("history_len", pa.int32(), "items in the history, at most L"),
        Column("sim_known", pa.int32(), "real scores"),
        Column("sim_max", pa.float32(), "largest real score; 0 if none"),
        Column("sim_mean", pa.float32(), "mean of the real scores; 0 if none"),
        Column("simtier", pa.list_(pa.int32()), f"[{SIM_TIERS}] real scores per tier of 0.1"),
        Column("same_cluster", pa.int32(), "history items with the sample's cluster_id"),
        Column("night_created", TIMESTAMP, "when the night was first published", True),
    ),
)


def joined_fields(
    labels: Sequence[str],
    created_timestamp: bool,
    columns: Collection[str],
    tiers: Tiers,
    item_id: pa.DataType,
) -> list[pa.Field]:
    """Returns the fields of a training set behind those of its samples, in their order.

    It has cluster IDs of the resolutions `labels`, and on request when nights were published and
    the `columns` that scores may have besides.
    """
    ours = JOINED.schema(item_id, without=[] if created_timestamp else ["night_created"])
    if tiers == "muse":
        muse = scores_schema(item_id, item_id, item_id, tiers=tiers).field("simtier")
        ours = ours.set(ours.get_field_index("simtier"), muse)
    further = [cluster_field(label) for label in labels if label != MAIN]
    at = ours.get_field_index(cluster_column(MAIN)) + 1
    item_ids = pa.field(HISTORY_ITEM_IDS, pa.list_(item_id))
    asked = [score_field(name) or item_ids for name in sorted(columns)]
    return [*list(ours)[:at], *further, *list(ours)[at:], *asked]


# Lies in the package of a codebook that has a parent; in no partition.
CROSSWALK = pa.schema(
    [
        ("label", _STRING),  # of the resolution
        ("old_cluster_id", pa.int32()),  # a number of the parent
        ("new_cluster_id", pa.int32()),  # where items of it went; 0 = it had none and is retired
        ("items", pa.int64()),
        ("item_share", pa.float64()),  # of the old number's items; they sum to one
        ("impressions", pa.int64()),  # of these items on the day of the fit
        ("impression_share", pa.float64()),  # of the old number's; item_share where it had none
    ]
)

TABLES = {
    table.name: table
    for table in (
        USER_HISTORIES,
        RECENT_CLICKS,
        TRAINING_ROWS,
        ITEM_EMBEDDINGS,
        ITEM_REJECTS,
        ITEM_FEATURES,
        USER_SIMSCORES,
    )
}
