"""Breaks the training set of a shop's second night, in many ways: faults as in `broken_roots`."""

from typing import Any

import pyarrow as pa

from tests.support.broken_roots import (
    DAY_BEFORE,
    DS,
    NOT_READY,
    Root,
    Rows,
    found_as,
    later,
    lose,
    place_of,
    put,
)

SET = "joined/ctr"


def _with_a_night(row: dict[str, Any]) -> bool:
    return bool(row["has_night"])


def _any(has: Any) -> Any:
    """Returns whether rows have one that `has` it."""
    return lambda rows: any(map(has, rows.to_pylist()))


def _clustered(row: dict[str, Any]) -> bool:
    return bool(row["cluster_id"])


def _change_where(root: Root, has: Any, **values: Any) -> None:
    """Gives the first row that `has` it other values."""

    def change(rows: Rows) -> Rows:
        at = place_of(rows, has)
        for name, value in values.items():
            rows = put(rows, name, value, at)
        return rows

    root.change(SET, change, _any(has))


# ---- Rows --------------------------------------------------------------------------------------


@found_as(SET, "feature_ds is not the night that its moment may know")
def features_of_a_night_that_nobody_named(root: Root) -> None:
    _change_where(root, _with_a_night, feature_ds=later(-7))


@found_as(SET, "feature_ds is not the night that its moment may know")
def a_sample_that_knows_a_night_before_it_is_available(root: Root) -> None:
    _change_where(
        root, lambda row: not row["has_night"], has_night=True, feature_ds=DAY_BEFORE
    )  # fmt: skip


@found_as(SET, "feature_ds is not where there is a night")
def a_sample_without_a_night_that_has_its_day(root: Root) -> None:
    _change_where(root, _with_a_night, has_night=False)


@found_as(SET, "a sample comes after ds")
def a_sample_of_the_day_after(root: Root) -> None:
    _change_where(root, _with_a_night, event_time=later(1))


@found_as(SET, "cluster_id is out of range")
def a_sample_of_a_cluster_above_max_id(root: Root) -> None:
    _change_where(root, _clustered, cluster_id=10)


@found_as(SET, "cluster_coarse is not where an item has a feature")
def a_sample_without_its_coarse_cluster(root: Root) -> None:
    _change_where(root, _clustered, cluster_coarse=0)


@found_as(SET, "sim_mean is not the mean of the real scores")
def a_mean_of_a_sample_off(root: Root) -> None:
    _change_where(root, lambda row: row["sim_known"], sim_mean=lambda mean: mean - 0.125)


@found_as(SET, "an unknown item has an image or is in scope")
def an_unknown_item_of_a_sample_with_an_image(root: Root) -> None:
    _change_where(root, _clustered, item_known=False)


@found_as(SET, "the manifest counts other rows")
def a_label_that_was_another(root: Root) -> None:
    _change_where(root, lambda row: row["clicked"], clicked=False)


@found_as(SET, "rows are not what their inputs give")
def another_cluster_than_the_night_says(root: Root) -> None:
    """Only the night knows that it is another."""
    _change_where(root, _clustered, cluster_id=lambda cluster: 3 if cluster != 3 else 5)


# ---- Files -------------------------------------------------------------------------------------


@found_as(SET, "rows were lost or doubled")
def a_sample_lost(root: Root) -> None:
    root.change(SET, lose)


@found_as(SET, "the files are not as samples were cut")
def a_sample_in_the_file_before(root: Root) -> None:
    first, second = root.rows(SET, 0), root.rows(SET, 1)
    root.publish(SET, {0: pa.concat_tables([first, second.slice(0, 1)]), 1: second.slice(1)})


@found_as(SET, "the schema is not that of the table")
def a_set_without_its_coarse_clusters(root: Root) -> None:
    every = range(len(root.files(SET)))
    root.publish(SET, {n: root.rows(SET, n).drop_columns(["cluster_coarse"]) for n in every})


@found_as(SET, "the schema is not that of the table")
def a_price_that_is_a_number_of_another_type_in_one_file(root: Root) -> None:
    rows = root.rows(SET, 1)
    at = rows.column_names.index("price")
    root.publish(SET, {1: rows.set_column(at, "price", rows["price"].cast(pa.float32()))})


@found_as(SET, "the schema is not that of the table")
def a_column_of_the_samples_behind_ours(root: Root) -> None:
    rows = root.rows(SET, 1)
    names = [name for name in rows.column_names if name != "price"]
    root.publish(SET, {1: rows.select([*names, "price"])})


@found_as(SET, "a file has another content than was published")
def a_flipped_byte_of_a_set(root: Root) -> None:
    path = root.files(SET)[0]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@found_as(SET, "there is no file list", "warning")
def a_file_list_of_a_set_gone(root: Root) -> None:
    (root.folder(SET) / "_files.txt").unlink()


@found_as(SET, "_SUCCESS does not name the manifest", NOT_READY)
def no_success_of_a_set(root: Root) -> None:
    (root.folder(SET) / "_SUCCESS").unlink()


# ---- Manifests ---------------------------------------------------------------------------------


def _edit_nights(root: Root, **fields: Any) -> None:
    inputs = root.manifest(SET)["inputs"]
    inputs["nights"] = [night | fields for night in inputs["nights"]]
    root.edit_manifest(SET, inputs=inputs)


@found_as(SET, "it is stale", "warning")
def a_night_of_another_version(root: Root) -> None:
    _edit_nights(root, item_features="0123456789ab")


@found_as(SET, "a night was not looked at", "unverified")
def a_night_that_is_gone(root: Root) -> None:
    _edit_nights(root, ds="2026-02-01")


@found_as(SET, "a night was not available to samples of ds")
def a_night_of_the_samples_own_day(root: Root) -> None:
    _edit_nights(root, ds=str(DS))


@found_as(SET, "a night was not available to samples of ds")
def a_night_available_an_hour_too_early(root: Root) -> None:
    (night,) = root.manifest(SET)["inputs"]["nights"]
    _edit_nights(root, from_us=night["from_us"] - 3_600_000_000)


@found_as(SET, "it was made with other artefacts than it says")
def notes_of_another_codebook(root: Root) -> None:
    notes = root.manifest(SET)["notes"]
    root.edit_manifest(SET, notes=notes | {"codebooks": {"other-0": []}})


@found_as(SET, "the manifest cannot be read")
def nights_that_are_none(root: Root) -> None:
    _edit_nights(root, from_us="soon")
