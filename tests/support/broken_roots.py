"""Breaks what a shop has published, in many ways: each is a function whose name says how.

A *logical* fault is written back as if it had been published so: file, manifest, `_SUCCESS`, and
whatever names the version, so that nothing but a law can find it. A *physical* one happens to what
lies there: manifests still tell what was published. All are of the second night of a `World`.
"""

import datetime as dt
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from feature_jobs.impressions.scores import mean_scores, simtier
from feature_jobs.schemas import TABLES
from feature_jobs.store import hashing, partitions
from pipelines.running.locks import Locks
from pipelines.running.publishing import renew_latest
from tests.support.world import DAYS, World

DS, DAY_BEFORE = DAYS[1], DAYS[0]
NOT_READY = "not ready"
Rows = pa.Table
Change = Callable[[Rows], Rows]


@dataclass(frozen=True)
class Fault:
    """Describes a way to break a root, and by which finding it is to be found."""

    breaks: Callable[["Root"], None]
    table: str
    law: str
    level: str = "broken"

    @property
    def name(self) -> str:
        return self.breaks.__name__


FAULTS: list[Fault] = []


def found_as(table: str, law: str, level: str = "broken") -> Callable:
    """Makes a fault of a function that breaks a `Root`; `law` is the beginning of what is told."""

    def add(breaks: Callable[["Root"], None]) -> Callable:
        FAULTS.append(Fault(breaks, table, law, level))
        return breaks

    return add


# ---- A root that can be broken -----------------------------------------------------------------


class Root:
    """Is what a world has published, of which the second night is to be broken."""

    def __init__(self, world: World):
        self._top, self._layout = world.root, world.settings().layout

    def folder(self, table: str, day: dt.date = DS) -> Path:
        shared = table in TABLES and TABLES[table].shared
        return self._top / ("shared" if shared else "test") / table / f"ds={day}"

    @property
    def record(self) -> Path:
        return self._top / "test/_nights" / f"ds={DS}.json"

    @property
    def latest(self) -> Path:
        return self.record.with_name("latest.json")

    def manifest(self, table: str) -> dict[str, Any]:
        return json.loads((self.folder(table) / "_manifest.json").read_text())

    def files(self, table: str) -> list[Path]:
        return [self.folder(table) / file["name"] for file in self.manifest(table)["files"]]

    # -- Logical faults --

    def rows(self, table: str, shard: int) -> Rows:
        return pq.read_table(self.files(table)[shard], partitioning=None)

    def shard_with(self, table: str, has: Callable[[Rows], bool]) -> int:
        """Returns the first shard whose rows have what a fault needs."""
        return next(n for n in range(len(self.files(table))) if has(self.rows(table, n)))

    def change(self, table: str, change: Change, has: Callable[[Rows], bool] = len) -> None:
        """Publishes a table whose rows are changed in one file, the first that `has` it in it."""
        shard = self.shard_with(table, has)
        self.publish(table, {shard: change(self.rows(table, shard))})

    def publish(self, table: str, changed: dict[int, Rows]) -> None:
        """Publishes a table with other rows in some shards."""
        manifest, paths = self.manifest(table), self.files(table)
        for shard, rows in changed.items():
            size, sha256 = partitions.write_parquet(str(paths[shard]), rows)
            manifest["files"][shard] |= {"rows": len(rows), "bytes": size, "sha256": sha256}
        manifest["rows"] = sum(file["rows"] for file in manifest["files"])
        self.publish_manifest(table, manifest)

    def publish_manifest(self, table: str, manifest: dict[str, Any]) -> None:
        """Publishes a manifest as if it had been made so, under the version that it has then."""
        old = manifest["version"]
        new = partitions.version_of({k: v for k, v in manifest.items() if k != "version"})
        self.write_manifest(table, manifest)
        record = json.loads(self.record.read_text())
        if table in record["tables"]:
            record["tables"][table]["rows"] = manifest["rows"]
            self.record.write_text(json.dumps(record))
        for path in self.folder(table).glob(f"*-{old}.parquet"):
            path.rename(path.with_name(path.name.replace(old, new)))
        days = [*self._top.glob("*/*/*"), *self._top.glob("*/joined/*/*")]
        names = [day / name for day in days for name in ("_manifest.json", "_files.txt")]
        named = filter(Path.exists, names)
        for path in (self.record, *named):
            if old in (text := path.read_text()):
                path.write_text(text.replace(old, new))
                if path.name == "_manifest.json":
                    seal(path.parent)
        renew_latest(self._layout, Locks())

    def write_manifest(self, table: str, manifest: dict[str, Any]) -> None:
        folder = self.folder(table)
        (folder / "_manifest.json").write_text(json.dumps(manifest))
        seal(folder)

    def edit_manifest(self, table: str, **fields: Any) -> None:
        """Writes a manifest that says otherwise than it did, and is announced."""
        self.write_manifest(table, self.manifest(table) | fields)


def seal(folder: Path) -> None:
    """Writes the `_SUCCESS` of the manifest that lies in a folder."""
    digest = hashlib.sha256((folder / "_manifest.json").read_bytes()).hexdigest()
    (folder / "_SUCCESS").write_text(digest + "\n")


def put(rows: Rows, column: str, value: Any, at: int = 0) -> Rows:
    """Returns `rows` with another value in one place; `value` may be a function of the old one."""
    values = rows[column].to_pylist()
    values[at] = value(values[at]) if callable(value) else value
    place = rows.column_names.index(column)
    field = rows.field(place)
    return rows.set_column(place, field, pa.array(values, field.type))


def place_of(rows: Rows, has: Callable[[dict[str, Any]], bool]) -> int:
    return next(at for at, row in enumerate(rows.to_pylist()) if has(row))


def double(rows: Rows) -> Rows:
    return pa.concat_tables([rows.slice(0, 1), rows])


def lose(rows: Rows) -> Rows:
    return rows.slice(1)


def swap(rows: Rows) -> Rows:
    return rows.take([1, 0, *range(2, len(rows))])


def two(rows: Rows) -> bool:
    return len(rows) > 1


def move_to_another_file(root: Root, table: str) -> None:
    """Puts a row where readers that ask for a range of hashes do not look for it."""
    source = root.shard_with(table, len)
    target = (source + 1) % len(root.files(table))
    rows, there = root.rows(table, source), root.rows(table, target)
    moved = pa.concat_tables([there, rows.slice(0, 1)]).sort_by(TABLES[table].key)
    root.publish(table, {source: rows.slice(1), target: moved})


def id_of_the_same_shard(root: Root, table: str, shard: int, after: int, taken: set[int]) -> int:
    """Returns an ID above `after` that no item has, and whose rows lie in `shard`."""
    ids = np.arange(after + 1, after + 1000)
    found = hashing.shard_of(hashing.hash_ids(pa.array(ids)), len(root.files(table))) == shard
    return next(int(one) for one in ids[found] if int(one) not in taken)


def vector_times(factor: float) -> Change:
    return lambda rows: put(rows, "embedding", lambda v: [factor * x for x in v])


def later(days: int) -> Callable[[Any], Any]:
    return lambda value: value + dt.timedelta(days=days)


# ---- Histories and clicks ----------------------------------------------------------------------


@found_as("user_histories", "item_ids and click_times are not aligned")
def a_list_one_short(root: Root) -> None:
    root.change("user_histories", lambda rows: put(rows, "item_ids", lambda ids: ids[1:]))


@found_as("user_histories", "click_times are not newest first")
def clicks_oldest_first(root: Root) -> None:
    def change(rows: Rows) -> Rows:
        many = place_of(rows, lambda row: len(set(row["click_times"])) > 1)
        return put(rows, "click_times", lambda times: times[::-1], many)

    def has(rows: Rows) -> bool:
        return any(len(set(times)) > 1 for times in rows["click_times"].to_pylist())

    root.change("user_histories", change, has)


@found_as("user_histories", "item_ids are more than history_len")
def a_history_too_long(root: Root) -> None:
    def change(rows: Rows) -> Rows:
        for name in ("item_ids", "click_times"):
            rows = put(rows, name, lambda old: [*old, *[old[-1]] * 5])
        return rows

    root.change("user_histories", change)


@found_as("user_histories", "a click comes after the end of ds")
def a_history_that_knows_tomorrow(root: Root) -> None:
    def change(rows: Rows) -> Rows:
        return put(rows, "click_times", lambda times: [later(2)(times[0]), *times[1:]])

    root.change("user_histories", change)


@found_as("user_histories", "there is a null in a list of item_ids")
def a_null_in_a_list(root: Root) -> None:
    root.change("user_histories", lambda rows: put(rows, "item_ids", lambda ids: [None, *ids[1:]]))


@found_as("user_histories", "a user has no click")
def a_history_of_nothing(root: Root) -> None:
    def change(rows: Rows) -> Rows:
        return put(put(rows, "item_ids", []), "click_times", [])

    root.change("user_histories", change)


@found_as("user_histories", "the manifest counts other rows")
def a_user_lost(root: Root) -> None:
    root.change("user_histories", lose)


@found_as("user_simscores", "the manifest counts other rows")
def scores_of_other_histograms(root: Root) -> None:
    histograms = root.manifest("user_simscores")["histograms"]
    bins = histograms["sim_max_unclicked"]
    full = next(place for place, rows in enumerate(bins) if rows)
    bins[full], bins[full - 1] = bins[full - 1], bins[full]  # of as many rows as before
    root.edit_manifest("user_simscores", histograms=histograms)


@found_as("user_histories", "not every impression reached the table")
def a_runner_that_lost_rows_of_the_log(root: Root) -> None:
    counts = root.manifest("user_histories")["counts"]
    root.edit_manifest("user_histories", counts=counts | {"impressions": 150})


@found_as("recent_clicks", "a click is in user_histories too")
def two_tables_that_share_a_click(root: Root) -> None:
    """Tells of a user in both tables that the newest click of the history is a recent one too."""

    def is_in_both(rows: Rows) -> bool:
        return bool(set(rows["user_id"].to_pylist()) & set(histories))

    every = [root.rows("user_histories", n) for n in range(len(root.files("user_histories")))]
    histories = {row["user_id"]: row for rows in every for row in rows.to_pylist()}

    def change(rows: Rows) -> Rows:
        at = place_of(rows, lambda row: row["user_id"] in histories)
        history, row = histories[rows["user_id"][at].as_py()], rows.to_pylist()[at]
        both = [*zip(row["click_times"], row["item_ids"], strict=True)]
        both.append((history["click_times"][0], history["item_ids"][0]))
        both.sort(reverse=True)
        times, items = zip(*both, strict=True)
        return put(put(rows, "click_times", list(times), at), "item_ids", list(items), at)

    root.change("recent_clicks", change, is_in_both)


# ---- Training rows -----------------------------------------------------------------------------


@found_as("training_rows", "a chunk is below 0")
def a_chunk_below_0(root: Root) -> None:
    root.change("training_rows", lambda rows: put(rows, "chunk", -1))


@found_as("training_rows", "pv_item_ids and pv_clicked are not aligned")
def a_label_too_few(root: Root) -> None:
    root.change("training_rows", lambda rows: put(rows, "pv_clicked", lambda labels: labels[1:]))


@found_as("training_rows", "the manifest counts other rows")
def a_label_that_is_another(root: Root) -> None:
    def is_all_clicked(rows: Rows) -> bool:
        return any(all(labels) for labels in rows["pv_clicked"].to_pylist())

    def change(rows: Rows) -> Rows:
        at = place_of(rows, lambda row: all(row["pv_clicked"]))
        return put(rows, "pv_clicked", lambda labels: [*labels[:-1], False], at)

    root.change("training_rows", change, is_all_clicked)


# ---- Embeddings and rejects --------------------------------------------------------------------


@found_as("item_embeddings", "an embedding is no finite unit vector")
def an_embedding_of_norm_0_9(root: Root) -> None:
    root.change("item_embeddings", vector_times(0.9))


@found_as("item_embeddings", "an embedding is no finite unit vector")
def an_embedding_of_nan(root: Root) -> None:
    root.change("item_embeddings", vector_times(float("nan")))


@found_as("item_embeddings", "an embedding has not 256 floats")
def an_embedding_of_255_floats(root: Root) -> None:
    root.change("item_embeddings", lambda rows: put(rows, "embedding", lambda v: v[1:]))


@found_as("item_embeddings", "left_catalogue_ds and in_catalogue disagree")
def a_former_item_without_the_day_it_left(root: Root) -> None:
    def change(rows: Rows) -> Rows:
        at = place_of(rows, lambda row: not row["in_catalogue"])
        return put(rows, "left_catalogue_ds", None, at)

    root.change("item_embeddings", change, _has_former)


def _has_former(rows: Rows) -> bool:
    return not all(rows["in_catalogue"].to_pylist())


@found_as("item_embeddings", "left_catalogue_ds comes after ds")
def an_item_that_leaves_tomorrow(root: Root) -> None:
    def change(rows: Rows) -> Rows:
        at = place_of(rows, lambda row: not row["in_catalogue"])
        return put(rows, "left_catalogue_ds", later(1), at)

    root.change("item_embeddings", change, _has_former)


@found_as("item_embeddings", "an image_size is below 0")
def an_image_of_less_than_nothing(root: Root) -> None:
    root.change("item_embeddings", lambda rows: put(rows, "image_size", -1))


@found_as("item_embeddings", "rows are not unique by item_id")
def an_item_doubled(root: Root) -> None:
    root.change("item_embeddings", double)


@found_as("item_embeddings", "rows were lost or doubled")
def an_item_lost(root: Root) -> None:
    root.change("item_embeddings", lose)


@found_as("item_embeddings", "rows are not in the order of item_id")
def items_unsorted(root: Root) -> None:
    root.change("item_embeddings", swap, two)


@found_as("item_embeddings", "an item_id belongs into another file by its hash")
def an_item_in_another_shard(root: Root) -> None:
    move_to_another_file(root, "item_embeddings")


@found_as("item_embeddings", "the schema is not that of the table")
def int32_instead_of_int64(root: Root) -> None:
    def change(rows: Rows) -> Rows:
        place = rows.column_names.index("image_size")
        field = pa.field("image_size", pa.int32(), nullable=False)
        return rows.set_column(place, field, rows["image_size"].cast(pa.int32()))

    root.change("item_embeddings", change)


@found_as("item_rejects", "first_ds, last_ds and next_ds are not in order")
def a_next_ds_before_the_last(root: Root) -> None:
    root.change("item_rejects", lambda rows: put(rows, "next_ds", DAY_BEFORE))


@found_as("item_rejects", "last_ds comes after ds")
def a_reject_of_tomorrow(root: Root) -> None:
    def change(rows: Rows) -> Rows:
        return put(put(rows, "next_ds", DAYS[3]), "last_ds", DAYS[2])

    root.change("item_rejects", change)


@found_as("item_rejects", "attempts are fewer than one")
def a_reject_that_was_never_tried(root: Root) -> None:
    root.change("item_rejects", lambda rows: put(rows, "attempts", 0))


@found_as("item_rejects", "a stage is neither read nor decode")
def a_stage_that_there_is_not(root: Root) -> None:
    root.change("item_rejects", lambda rows: put(rows, "stage", "forward"))


@found_as("item_rejects", "the manifest counts other rows")
def another_reason_than_was_counted(root: Root) -> None:
    root.change("item_rejects", lambda rows: put(rows, "reason", "forbidden"))


@found_as("item_rejects", "an item has an embedding and is a reject too")
def an_item_both_embedded_and_rejected(root: Root) -> None:
    shard = root.shard_with("item_rejects", len)
    embedded = root.rows("item_embeddings", shard)["item_id"][0].as_py()
    rows = put(root.rows("item_rejects", shard), "item_id", embedded)
    root.publish("item_rejects", {shard: rows.sort_by("item_id")})


# ---- Item features -----------------------------------------------------------------------------


def _clustered(rows: Rows) -> bool:
    return any(number > 0 for number in rows["cluster_id"].to_pylist())


def _of_a_clustered(column: str, value: Any) -> Change:
    def change(rows: Rows) -> Rows:
        return put(rows, column, value, place_of(rows, lambda row: row["cluster_id"] > 0))

    return change


@found_as("item_features", "cluster_id is out of range")
def a_cluster_above_max_id(root: Root) -> None:
    root.change("item_features", _of_a_clustered("cluster_id", 10), _clustered)


@found_as("item_features", "cluster_coarse is out of range")
def a_coarse_cluster_above_its_own_max_id(root: Root) -> None:
    root.change("item_features", _of_a_clustered("cluster_coarse", 5), _clustered)


@found_as("item_features", "cluster_id is not where an item has a feature")
def a_feature_without_a_cluster(root: Root) -> None:
    root.change("item_features", _of_a_clustered("cluster_id", 0), _clustered)


@found_as("item_features", "a centre_distance is below 0 or not finite")
def a_distance_of_infinity(root: Root) -> None:
    change = _of_a_clustered("centre_distance", float("inf"))
    root.change("item_features", change, _clustered)


@found_as("item_features", "a second_distance is below centre_distance")
def a_second_centre_nearer_than_the_first(root: Root) -> None:
    change = _of_a_clustered("second_distance", lambda old: old / 1e6)
    root.change("item_features", change, _clustered)


@found_as("item_features", "an item with an image is not in item_embeddings")
def an_id_that_embeddings_lack(root: Root) -> None:
    shard = root.shard_with("item_features", lambda rows: any(rows["has_image"].to_pylist()))
    rows = root.rows("item_features", shard)
    ids = rows["item_id"].to_pylist()
    other = id_of_the_same_shard(root, "item_features", shard, max(ids), set())
    at = place_of(rows, lambda row: row["has_image"])
    rows = put(rows, "item_id", other, at).sort_by("item_id")
    root.publish("item_features", {shard: rows})


@found_as("item_features", "an item of item_embeddings has no row with an image")
def features_of_an_item_lost(root: Root) -> None:
    def change(rows: Rows) -> Rows:
        at = place_of(rows, lambda row: row["has_image"])
        return rows.take([place for place in range(len(rows)) if place != at])

    root.change("item_features", change, lambda rows: any(rows["has_image"].to_pylist()))


@found_as("item_features", "encoder_id is not that of the manifest")
def another_encoder_in_a_column(root: Root) -> None:
    root.change("item_features", lambda rows: put(rows, "encoder_id", "other-000000000000"))


@found_as("item_features", "codebook_id is not that of the manifest")
def another_codebook_in_a_column(root: Root) -> None:
    root.change("item_features", lambda rows: put(rows, "codebook_id", "other-000000000000"))


@found_as("item_features", "category is not that of item_embeddings")
def another_category_than_the_embedding_has(root: Root) -> None:
    root.change("item_features", _of_a_clustered("category", None), _clustered)


@found_as("item_features", "in_catalogue is not that of item_embeddings")
def a_flag_that_lies(root: Root) -> None:
    change = _of_a_clustered("in_catalogue", lambda inside: not inside)
    root.change("item_features", change, _clustered)


@found_as("item_features", "the schema is not that of the table")
def a_category_that_is_a_number(root: Root) -> None:
    def change(rows: Rows) -> Rows:
        place = rows.column_names.index("category")
        return rows.set_column(place, "category", pa.array(np.zeros(len(rows), np.int64)))

    root.change("item_features", change)


@found_as("item_features", "the schema is not that of the table")
def item_ids_of_int32(root: Root) -> None:
    def change(rows: Rows) -> Rows:
        field = pa.field("item_id", pa.int32(), nullable=False)
        return rows.set_column(0, field, rows["item_id"].cast(pa.int32()))

    root.change("item_features", change)


@found_as("item_features", "the schema is not that of the table")
def ds_inside_the_file(root: Root) -> None:
    def change(rows: Rows) -> Rows:
        return rows.append_column("ds", pa.array([str(DS)] * len(rows)))

    root.change("item_features", change)


@found_as("item_features", "the schema is not that of the table")
def a_column_that_may_be_null(root: Root) -> None:
    def change(rows: Rows) -> Rows:
        place = rows.column_names.index("in_scope")
        values = pa.array([None, *rows["in_scope"].to_pylist()[1:]], pa.bool_())
        return rows.set_column(place, pa.field("in_scope", pa.bool_()), values)

    root.change("item_features", change)


@found_as("item_features", "the schema is not that of the table")
def a_column_fewer(root: Root) -> None:
    root.change("item_features", lambda rows: rows.drop_columns(["cluster_coarse"]))


@found_as("item_features", "the schema is not that of the table")
def lists_whose_values_have_another_name(root: Root) -> None:
    shard = root.shard_with("item_features", len)
    rows, path = root.rows("item_features", shard), root.files("item_features")[shard]
    place = rows.column_names.index("embedding")
    kind = pa.list_(pa.field("item", pa.float32()))
    field = pa.field("embedding", kind, nullable=False)
    rows = rows.set_column(place, field, rows["embedding"].cast(kind))
    pq.write_table(rows, path, use_compliant_nested_type=False)
    manifest, data = root.manifest("item_features"), path.read_bytes()
    manifest["files"][shard] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    root.publish_manifest("item_features", manifest)


# ---- SimScores ---------------------------------------------------------------------------------


def _of_a_scored(change: Callable[[Rows, int], Rows]) -> Change:
    return lambda rows: change(rows, place_of(rows, lambda row: row["sim_known"] > 1))


def _scored(rows: Rows) -> bool:
    return any(known > 1 for known in rows["sim_known"].to_pylist())


def _change_a_scored(root: Root, column: str, value: Any) -> None:
    root.change(
        "user_simscores", _of_a_scored(lambda rows, at: put(rows, column, value, at)), _scored
    )


@found_as("user_simscores", "scores are not what their inputs give")
def a_score_off_by_1e_3(root: Root) -> None:
    """Moves a score, and all that is made of it: nothing but another computation can tell."""

    def change(rows: Rows, at: int) -> Rows:
        row = rows.to_pylist()[at]
        scores = np.array([row["sim_scores"]], np.float32)
        mask = np.array([row["sim_mask"]], np.int8)
        place = int(mask[0].argmax())
        scores[0, place] -= np.float32(1e-3) * np.sign(scores[0, place])
        known = mask.sum(axis=1)
        made = {
            "sim_scores": scores[0].tolist(),
            "sim_max": float(scores[mask > 0].max()),
            "sim_mean": float(mean_scores(scores, known)[0]),
            "simtier": simtier(scores, mask)[0].tolist(),
        }
        for name, value in made.items():
            rows = put(rows, name, value, at)
        return rows

    root.change("user_simscores", _of_a_scored(change), _scored)


@found_as("user_simscores", "a score is not 0 where it is masked")
def a_mask_that_hides_a_score(root: Root) -> None:
    _change_a_scored(root, "sim_mask", [0] * 5)


@found_as("user_simscores", "a place after the history is real")
def a_mask_of_padding(root: Root) -> None:
    def is_short(row: dict[str, Any]) -> bool:
        return row["history_len"] < 5

    def change(rows: Rows) -> Rows:
        return put(rows, "sim_mask", lambda mask: [*mask[:-1], 1], place_of(rows, is_short))

    def has(rows: Rows) -> bool:
        return any(map(is_short, rows.to_pylist()))

    root.change("user_simscores", change, has)


@found_as("user_simscores", "sim_mean is not the mean of the real scores")
def a_mean_off(root: Root) -> None:
    _change_a_scored(root, "sim_mean", lambda mean: mean - 1e-3)


@found_as("user_simscores", "simtier is not the histogram of the real scores")
def a_score_in_another_tier(root: Root) -> None:
    _change_a_scored(root, "simtier", lambda tiers: [*tiers[1:], tiers[0]])


@found_as("user_simscores", "simtier does not add up to sim_known")
def a_score_in_no_tier(root: Root) -> None:
    _change_a_scored(root, "simtier", [0] * 20)


@found_as("user_simscores", "sim_max is not the largest real score")
def a_maximum_off(root: Root) -> None:
    _change_a_scored(root, "sim_max", lambda largest: largest - 1e-3)


@found_as("user_simscores", "sim_known is not the number of real scores")
def one_score_more_than_there_is(root: Root) -> None:
    _change_a_scored(root, "sim_known", lambda known: known + 1)


@found_as("user_simscores", "history_item_ids are not history_len long")
def a_history_len_that_lies(root: Root) -> None:
    _change_a_scored(root, "history_len", lambda length: length - 1)


@found_as("user_simscores", "history_len is out of range")
def a_history_of_less_than_nothing(root: Root) -> None:
    _change_a_scored(root, "history_len", -1)


@found_as("user_simscores", "history_len is out of range")
def a_history_without_end(root: Root) -> None:
    _change_a_scored(root, "history_len", 2**31 - 1)


@found_as("user_simscores", "same_cluster is out of range")
def more_of_the_same_cluster_than_of_any(root: Root) -> None:
    _change_a_scored(root, "same_cluster", 6)


@found_as("user_simscores", "sim_scores are not history_len long")
def scores_one_short(root: Root) -> None:
    _change_a_scored(root, "sim_scores", lambda scores: scores[:-1])


@found_as("user_simscores", "a score is out of -1 to 1 or not finite")
def a_score_of_nan(root: Root) -> None:
    _change_a_scored(root, "sim_scores", lambda scores: [float("nan"), *scores[1:]])


@found_as("user_simscores", "there is a null in a list of sim_scores")
def a_score_of_null(root: Root) -> None:
    _change_a_scored(root, "sim_scores", lambda scores: [None, *scores[1:]])


@found_as("user_simscores", "event_time comes after ds")
def an_impression_of_tomorrow(root: Root) -> None:
    _change_a_scored(root, "event_time", later(2))


@found_as("user_simscores", "the manifest counts other rows")
def a_click_that_was_none(root: Root) -> None:
    _change_a_scored(root, "clicked", lambda clicked: not clicked)


@found_as("user_simscores", "rows are not unique by impression_id")
def an_impression_doubled(root: Root) -> None:
    root.change("user_simscores", double)


@found_as("user_simscores", "rows were lost or doubled")
def an_impression_lost(root: Root) -> None:
    root.change("user_simscores", lose)


@found_as("user_simscores", "a user_id belongs into another file by its hash")
def a_user_in_another_shard(root: Root) -> None:
    move_to_another_file(root, "user_simscores")


@found_as("user_simscores", "IDs are of two types")
def item_ids_that_are_strings_in_one_table(root: Root) -> None:
    def as_strings(rows: Rows) -> Rows:
        place = rows.column_names.index("item_id")
        field = pa.field("item_id", pa.string(), nullable=False)
        rows = rows.set_column(place, field, rows["item_id"].cast(pa.string()))
        place = rows.column_names.index("history_item_ids")
        kind = pa.list_(pa.string())
        field = pa.field("history_item_ids", kind, nullable=False)
        return rows.set_column(place, field, rows["history_item_ids"].cast(kind))

    every = range(len(root.files("user_simscores")))
    root.publish("user_simscores", {n: as_strings(root.rows("user_simscores", n)) for n in every})


# ---- Manifests and the night -------------------------------------------------------------------


@found_as("user_simscores", "tables of one night are of two artefacts")
def a_table_of_another_encoder(root: Root) -> None:
    manifest = root.manifest("user_simscores")
    manifest["identities"] |= {"encoder_id": "other-000000000000"}
    root.publish_manifest("user_simscores", manifest)


@found_as("item_features", "an upstream was made again since")
def an_upstream_made_again(root: Root) -> None:
    made_from = root.manifest("item_features")["made_from"] | {"item_embeddings": "0123456789ab"}
    root.edit_manifest("item_features", made_from=made_from)


@found_as("item_features", "it is stale", "warning")
def a_day_before_made_again(root: Root) -> None:
    made_from = root.manifest("item_features")["made_from"]
    root.edit_manifest(
        "item_features", made_from=made_from | {"before": {"item_features": "0123456789ab"}}
    )


@found_as("item_features", "rows were lost or doubled")
def a_manifest_of_more_rows_than_its_files(root: Root) -> None:
    root.edit_manifest("item_features", rows=root.manifest("item_features")["rows"] + 1)


@found_as("item_features", "rows were lost or doubled")
def a_file_of_fewer_rows_than_the_manifest(root: Root) -> None:
    manifest = root.manifest("item_features")
    manifest["files"][0]["rows"] += 1
    root.publish_manifest("item_features", manifest)


@found_as("item_features", "the manifest counts other rows")
def clusters_of_more_items_than_have_one(root: Root) -> None:
    clusters = root.manifest("item_features")["clusters"]
    clusters["main"]["items"] += 1
    root.edit_manifest("item_features", clusters=clusters)


@found_as("user_simscores", "the manifest counts other rows")
def a_histogram_of_other_rows(root: Root) -> None:
    root.edit_manifest("user_simscores", histograms={"history_len": [1, 2, 3]})


@found_as("item_embeddings", "the version is not that of the content")
def a_version_of_another_content(root: Root) -> None:
    identities = root.manifest("item_embeddings")["identities"] | {"encoder_id": "other-0"}
    root.edit_manifest("item_embeddings", identities=identities)


@found_as("item_features", "the files are not one for each shard")
def two_files_that_have_changed_places(root: Root) -> None:
    listed = root.manifest("item_features")["files"]
    root.edit_manifest("item_features", files=[*listed[1::-1], *listed[2:]])


@found_as("item_features", "the manifest is that of another table or day")
def the_day_before_in_the_place_of_ds(root: Root) -> None:
    shutil.rmtree(root.folder("item_features"))
    shutil.copytree(root.folder("item_features", DAY_BEFORE), root.folder("item_features"))


@found_as("item_features", "the manifest cannot be read")
def a_manifest_that_is_no_json(root: Root) -> None:
    (root.folder("item_features") / "_manifest.json").write_text("{")
    seal(root.folder("item_features"))


@found_as("item_features", "the manifest cannot be read")
def a_manifest_without_files(root: Root) -> None:
    manifest = root.manifest("item_features")
    del manifest["files"]
    root.write_manifest("item_features", manifest)


@found_as("item_features", "the manifest cannot be read")
def a_manifest_whose_counts_are_null(root: Root) -> None:
    root.edit_manifest("item_features", counts=None)


@found_as("item_features", "the manifest cannot be read")
def a_manifest_that_is_a_list(root: Root) -> None:
    (root.folder("item_features") / "_manifest.json").write_text("[]")
    seal(root.folder("item_features"))


@found_as("", "what the tables were made from was not compared", "unverified")
def a_manifest_of_the_day_before_that_is_a_list(root: Root) -> None:
    folder = root.folder("item_features", DAY_BEFORE)
    (folder / "_manifest.json").write_text("[]")
    seal(folder)


@found_as("item_features", "the manifest is not there")
def a_manifest_gone(root: Root) -> None:
    (root.folder("item_features") / "_manifest.json").unlink()


@found_as("item_features", "_SUCCESS does not name the manifest", NOT_READY)
def a_damaged_manifest(root: Root) -> None:
    path = root.folder("item_features") / "_manifest.json"
    path.write_bytes(path.read_bytes().replace(b"0", b"1", 1))


@found_as("item_features", "_SUCCESS does not name the manifest", NOT_READY)
def no_success(root: Root) -> None:
    (root.folder("item_features") / "_SUCCESS").unlink()


@found_as("item_features", "_SUCCESS does not name the manifest", NOT_READY)
def a_success_of_another_manifest(root: Root) -> None:
    other = root.folder("item_features", DAY_BEFORE) / "_SUCCESS"
    shutil.copy(other, root.folder("item_features"))


@found_as("item_features", "_SUCCESS does not name the manifest", NOT_READY)
def files_alone(root: Root) -> None:
    for name in ("_SUCCESS", "_manifest.json"):
        (root.folder("item_features") / name).unlink()


def _edit_record(root: Root, **fields: Any) -> None:
    record = json.loads(root.record.read_text())
    record["tables"]["item_features"] |= fields
    root.record.write_text(json.dumps(record))


@found_as("item_features", "the night's record names what is not published")
def a_record_of_another_version(root: Root) -> None:
    _edit_record(root, version="0123456789ab")


@found_as("item_features", "the night's record names what is not published")
def a_record_of_other_rows(root: Root) -> None:
    _edit_record(root, rows=1)


@found_as("recent_clicks", "the night's record names what is not published")
def a_table_of_the_record_gone(root: Root) -> None:
    shutil.rmtree(root.folder("recent_clicks"))


@found_as("item_features", "an upstream was made again since")
def an_upstream_gone(root: Root) -> None:
    shutil.rmtree(root.folder("item_rejects"))


@found_as("", "the night's record names what is not published")
def a_record_that_is_no_json(root: Root) -> None:
    root.record.write_text("{")


@found_as("", "the night's record names what is not published")
def a_record_whose_tables_are_null(root: Root) -> None:
    record = json.loads(root.record.read_text())
    root.record.write_text(json.dumps(record | {"tables": None}))


@found_as("", "the night's record names what is not published")
def the_record_of_the_day_before(root: Root) -> None:
    shutil.copy(root.record.with_name(f"ds={DAY_BEFORE}.json"), root.record)


LATEST = "latest.json does not name the newest night"


@found_as("", LATEST, NOT_READY)
def a_latest_that_lags(root: Root) -> None:
    text = root.latest.read_text()
    root.latest.write_text(text.replace(f'"ds": "{DS}"', f'"ds": "{DAY_BEFORE}"'))


@found_as("", LATEST, NOT_READY)
def a_latest_of_another_record(root: Root) -> None:
    record = json.loads(root.record.read_text())
    root.record.write_text(json.dumps(record | {"rolled_back": "2026-03-03T00:00:00+00:00"}))


@found_as("", LATEST)
def a_latest_that_is_no_json(root: Root) -> None:
    root.latest.write_text("{")


@found_as("", LATEST)
def a_latest_without_a_record(root: Root) -> None:
    root.record.unlink()


@found_as("", LATEST, "warning")
def a_latest_gone(root: Root) -> None:
    root.latest.unlink()


@found_as("item_features", "the file list names other files than the manifest")
def a_file_list_of_another_file(root: Root) -> None:
    listed = [*map(str, root.files("item_features"))][:-1]
    (root.folder("item_features") / "_files.txt").write_text("\n".join([*listed, "other"]) + "\n")


@found_as("item_features", "the file list names another place", "warning")
def a_file_list_of_where_the_shop_was(root: Root) -> None:
    path = root.folder("item_features") / "_files.txt"
    path.write_text(path.read_text().replace(str(path.parent), "/mnt/shop"))


@found_as("item_features", "there is no file list", "warning")
def a_file_list_gone(root: Root) -> None:
    (root.folder("item_features") / "_files.txt").unlink()


# ---- Files -------------------------------------------------------------------------------------


@found_as("item_embeddings", "a file has another content than was published")
def a_flipped_byte(root: Root) -> None:
    path = root.files("item_embeddings")[0]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@found_as("item_embeddings", "a file has not the bytes that the manifest says")
def a_truncated_file(root: Root) -> None:
    path = root.files("item_embeddings")[0]
    path.write_bytes(path.read_bytes()[:-100])


@found_as("item_embeddings", "a file of the manifest is not there")
def a_file_gone(root: Root) -> None:
    root.files("item_embeddings")[0].unlink()


@found_as("item_embeddings", "there is a file too many")
def a_file_too_many(root: Root) -> None:
    path = root.files("item_embeddings")[0]
    shutil.copy(path, path.with_name("part-00000-of-00002-0123456789ab.parquet"))


@found_as("item_embeddings", "a file cannot be read as Parquet")
def a_file_that_is_no_parquet(root: Root) -> None:
    path = root.files("item_embeddings")[0]
    path.write_bytes(b"PAR1 is how it begins, and nothing of it is so. PAR1")
    manifest, data = root.manifest("item_embeddings"), path.read_bytes()
    manifest["files"][0] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    root.publish_manifest("item_embeddings", manifest)
