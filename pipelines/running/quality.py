"""Gates stand between making and publishing: they stop what no night may put before a CTR model.

Before a share is looked at, the laws of DESIGN §3 that join tables are, by the counts of their
manifests: one that does not hold is our own fault or the disk's. The laws of rows were checked when
they were written. Whatever is refused, nothing is published, and what was published before stays.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from feature_jobs.schemas import MAIN, DataContractError, GateRefused
from pipelines.config import Gates, Settings
from pipelines.stages import EMBED, ITEM_FEATURES, SIMSCORE, TRAINING_ROWS, Kind

if TYPE_CHECKING:  # it needs Beam, for which no gate is to wait
    from feature_jobs.items.item_features import SamePicture

Counts = Mapping[Kind, Mapping[str, int]]
FindPicture = Callable[[str, int], "SamePicture"]

_CHURN = (
    "The CTR model's embedding rows would stand for other items. If a new codebook was pinned on "
    "purpose, move the rows by the crosswalk.parquet in its folder and say --allow-churn, which "
    "the manifest records"
)


def check(
    kind: Kind,
    input_rows: int,
    counts: Counts,
    settings: Settings,
    clusters: Mapping[str, Mapping[str, Any]],
    find_picture: FindPicture,
) -> None:
    """Raises GateRefused where a share forbids publishing what a stage made.

    Raises DataContractError where a law does, and for a catalogue without one readable image.
    `input_rows` are those of the stage's input, `counts` its own and those of the stages upstream,
    `clusters` what is said of the clusters of each resolution. `find_picture` is asked of a label
    and a cluster that is too large, for the picture that most of its items have.
    """
    check_laws(kind, input_rows, counts)
    for label, found in clusters.items():
        _clusters(label, found, settings.gates, find_picture)
    if kind is EMBED:
        _embed(counts[EMBED], settings)
    elif kind is SIMSCORE:
        _simscore(counts[SIMSCORE], settings, clusters)


def check_laws(kind: Kind, input_rows: int, counts: Counts) -> None:
    """Raises DataContractError where what a stage made has not as many rows as it was made from.

    The arguments are those of `check`.
    """
    for what, found, expected in _laws(kind, input_rows, counts):
        if found != expected:
            raise DataContractError(
                f"{what}: found {found:,}, expected {expected:,}. Rows were lost or doubled; "
                "nothing was published. This is a fault of COURIER or of the disk; run the command "
                "again, and report it if it stays."
            )


def _laws(kind: Kind, input_rows: int, counts: Counts) -> Iterator[tuple[str, int, int]]:
    """Yields what must be equal of a stage: what it is, how many there are, how many there must be.

    Nothing that is counted says how many users have a history.
    """
    mine = counts[kind]
    if kind is EMBED:
        catalogue = mine["catalogue_items"]
        embedded = mine["item_embeddings_rows"] - mine["former_items"]
        yield "catalogue rows that reached EMBED", catalogue, input_rows
        sides = embedded + mine["item_rejects_rows"]
        yield "item_embeddings in the catalogue + item_rejects", sides, catalogue
    elif kind is ITEM_FEATURES:
        items = counts[EMBED]["item_embeddings_rows"] + counts[EMBED]["item_rejects_rows"]
        yield "item_features rows", mine["item_features_rows"], items
    elif kind is SIMSCORE:
        yield "user_simscores rows", mine["user_simscores_rows"], input_rows
    elif kind is TRAINING_ROWS:
        reached = mine["impressions"] + mine["out_of_scope_impressions"]
        yield "impressions that reached TRAINING-ROWS", reached, input_rows


def warnings(work: Mapping[str, float]) -> list[str]:
    """Returns what an operator should know of how tables were made that may yet be published.

    `work` is what the stage's workers tell of it.
    """
    made = {name: int(n) for name, n in work.items() if name.startswith("embedded_on_")}
    if len({name.rpartition("_")[2] for name in made}) < 2:
        return []
    found = ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in made.items())
    return [
        f"The new embeddings are of several precisions ({found}): fp32 and bf16 of one image have "
        "a cosine of 0.9999 or so, not 1. Give all workers one kind of machine, or say "
        '[embed] precision = "fp32" or "bf16" in the settings, which embeds all images anew.'
    ]


def _embed(counts: Mapping[str, int], settings: Settings) -> None:
    catalogue, rejects = counts["catalogue_items"], counts["item_rejects_rows"]
    if catalogue and rejects == catalogue:
        raise DataContractError(
            f"Not one of the {catalogue:,} catalogue images can be read ({_reasons(counts)}). The "
            f"table would be empty of embeddings. Relative image_uri are looked up below "
            f"{settings.catalogue.image_roots[0]}: check catalogue.image_roots in the settings and "
            "whether the images are there."
        )
    _share(
        "catalogue items have no readable image",
        rejects, catalogue, settings.gates.max_reject_share, "max_reject_share",
        f"Reasons: {_reasons(counts)}. `item_rejects` would name each item",
    )  # fmt: skip


def _simscore(
    counts: Mapping[str, int], settings: Settings, clusters: Mapping[str, Mapping[str, Any]]
) -> None:
    _share(
        "impressions are of items that the catalogue lacks",
        counts["unknown_items"], counts["impressions"],
        settings.gates.max_unknown_item_share, "max_unknown_item_share",
        "A catalogue of another day or shop looks like this",
    )  # fmt: skip

    _share(
        "impressions are of items whose cluster ID is not that of the day before",
        counts["moved_impressions"], counts["compared_impressions"],
        settings.gates.max_moved_impression_share, "max_moved_impression_share",
        f"{_most_left(clusters[MAIN])}. {_CHURN}",
    )  # fmt: skip


def _clusters(
    label: str, found: Mapping[str, Any], gates: Gates, find_picture: FindPicture
) -> None:
    """Refuses too much churn or imbalance among the clusters of one resolution."""
    _share(
        f"items have another cluster ID ({label}) than the day before",
        found["moved_items"], found["compared_items"],
        gates.max_moved_item_share, "max_moved_item_share", f"{_most_left(found)}. {_CHURN}",
    )  # fmt: skip
    if not found["items"]:
        return
    # Of very few clusters, some hold such a share when all is well.
    limit, largest = gates.max_cluster_share, found["largest_cluster"]
    if limit * found["clusters"] >= 2 and found["items_max"] > limit * found["items"]:
        picture = find_picture(label, largest)
        _share(
            f"items with a cluster ID ({label}) are in cluster {largest}",
            found["items_max"], found["items"], limit, "max_cluster_share",
            _why_large(found["items_max"], found["items"], limit, picture),
        )  # fmt: skip
    _share(
        f"clusters ({label}) have no item",
        found["dead"], found["clusters"], gates.max_dead_share, "max_dead_share",
        "A codebook of another catalogue, or one much too old, looks like this",
    )  # fmt: skip


def _why_large(items: int, total: int, limit: float, picture: "SamePicture") -> str:
    """Tells why a cluster has `items` of `total`: for copies of one picture, or without them.

    Of a cluster hardly above the limit, any one picture is what makes it too large: that puts it
    down to a placeholder only where most of its items have it.
    """
    copies = items * picture.items / picture.looked_at
    are_most = picture.items >= max(2, picture.looked_at / 2)
    if not are_most or items - copies > limit * (total - copies):
        return "An encoder that takes most images for the same one looks like this"
    return (
        f"{picture.items:,} of the {picture.looked_at:,} of them that were looked at have the very "
        f"same picture, byte for byte (sha256 {picture.sha256}, for example item "
        f"{picture.item_id!r}): a placeholder, and no fault of the encoder. Leave the image_uri of "
        "such items null in the catalogue: they get cluster ID 0 then, and count as rejects, which "
        "gates.max_reject_share must leave room for"
    )


def _most_left(found: Mapping[str, Any]) -> str:
    left = [f"{c['cluster_id']} ({c['moved']:,} of {c['of']:,})" for c in found["most_moved"]]
    return f"Clusters that most items left: {', '.join(left)}"


def _reasons(counts: Mapping[str, int]) -> str:
    found = {k.removeprefix("rejected_"): v for k, v in counts.items() if k.startswith("rejected_")}
    return ", ".join(f"{reason} {n:,}" for reason, n in sorted(found.items(), key=lambda x: -x[1]))


def _share(what: str, found: int, total: int, limit: float, setting: str, remark: str) -> None:
    if total and found / total > limit:
        raise GateRefused(
            f"{found:,} of {total:,} {what} ({found / total:.1%}), above the limit of {limit:.1%}. "
            f"{remark}. Nothing was published, and what was published before stands. Mend the "
            f"input and run the command again, or raise gates.{setting} in the settings."
        )
