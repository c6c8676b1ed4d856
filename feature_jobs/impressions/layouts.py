"""Hands a joined training set over to CTR frameworks, as their own readers take it.

`plain` is what the join writes. `fuxictr` (2.3.10) adds a group key of the user and makes the label
a float; FuxiCTR reads the columns that its configuration lists, and leaves all others where they
are. `torcheasyrec` casts every column to one of the few types that TorchEasyRec accepts, and names
what goes along with the history `history__<feature>`, without its padding. No value is renumbered:
cluster ID 7 is row 7 of the model's table, which has `max_id` + 1 rows.

What these functions take as the join's is told by name (`Form`); all other columns are the user's.
They are features where their type says how they are one: floats and booleans are numbers. Whole
numbers and strings may be IDs, whose size only the user knows: the configuration names them in
comments.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from feature_jobs.schemas import (
    MAIN,
    SIM_TIERS,
    DataContractError,
    OperatorError,
    cluster_column,
)
from feature_jobs.store.arrays import list_array
from feature_jobs.store.hashing import hash_ids

PLAIN = "plain"
LAYOUTS = (PLAIN, "fuxictr", "torcheasyrec")
GROUP_ID = "group_id"  # of FuxiCTR's layout
GROUP_IDS = 2**53  # so many: whole numbers that a float64 holds, should a reader make it one
HISTORY = "history"  # TorchEasyRec's sequence group of what goes along with the history
_NUMBERS = (
    "has_night", "item_known", "has_image", "in_scope",
    "history_len", "sim_known", "sim_max", "sim_mean",
)  # fmt: skip
_EMBEDDING_DIM = 16  # of tables in TorchEasyRec's configuration, which asks for a number


@dataclass(frozen=True)
class Form:
    """Says what a joined set is made of: the user's columns, and the sizes of ours.

    `max_ids` has the highest cluster number by resolution, `main` that of `cluster_id`; lists of
    the history have `history_len` places, `top_positions` so many, and `simtier` has `tiers`.
    """

    user: str
    label: str | None
    history_len: int
    max_ids: Mapping[str, int]
    tiers: int = SIM_TIERS
    top_positions: int = 0


@dataclass(frozen=True)
class Feature:
    """Describes a column that a model is fed.

    A `number` or a `vector` of so many is fed as it is. An `id`, or each of a list of `ids`, is a
    row in 0..size-1 of a table: 0 for none, and the table that of the column `shares`, where it
    names one; where the size is 0, only the user knows it. Lists have `length` places, those of the
    `history` one for each item of it.
    """

    name: str
    kind: Literal["number", "vector", "id", "ids"]
    size: int = 0
    length: int = 1
    shares: str = ""
    history: bool = False


# ---- The three layouts -----------------------------------------------------------------------


def layout_schema(name: str, schema: pa.Schema, form: Form) -> pa.Schema:
    """Returns what rows of `schema`, as the join writes them, have for columns in a layout.

    Raises OperatorError for a column that the framework cannot read, and names it.
    """
    match name:
        case "plain":
            return schema
        case "fuxictr":
            return _fuxictr_schema(schema, form)
        case "torcheasyrec":
            return _torcheasyrec_schema(schema, form)
    raise OperatorError(f"There is no layout {name!r}: choose one of {', '.join(LAYOUTS)}.")


def to_layout(name: str, rows: pa.Table, form: Form) -> pa.Table:
    """Returns joined rows in a layout: as many, in the same order.

    A framework's layout has 0 for a number that is null, also where it may be an ID: FuxiCTR would
    look up a row that no table has. Raises OperatorError as `layout_schema` does; DataContractError
    where lists of a column of ours differ in length, and for rows without a label.
    """
    schema = layout_schema(name, rows.schema, form)
    if name == "plain":
        return rows
    _check_lengths(rows, form)
    columns = _without_nulls(rows, form)
    if name == "fuxictr":
        columns.append(_group_ids(rows[form.user]))
    else:
        columns = _without_padding(rows, columns, form)
    cast = [_cast(column, field.type) for column, field in zip(columns, schema, strict=True)]
    return pa.Table.from_arrays(cast, schema=schema)


def layout_config(name: str, schema: pa.Schema, form: Form) -> dict[str, str]:
    """Returns the framework's own configuration, by path below the set, for rows of `schema`.

    Its folder begins with `_`, as readers of all days look into no such folder, and fail at a file
    that is no Parquet. Raises OperatorError as `layout_schema` does.
    """
    layout_schema(name, schema, form)
    match name:
        case "fuxictr":
            return {"_fuxictr/dataset_config.yaml": _fuxictr_config(schema, form)}
        case "torcheasyrec":
            return {"_torcheasyrec/torcheasyrec.config": _torcheasyrec_config(schema, form)}
    return {}


# ---- Features --------------------------------------------------------------------------------


def features(schema: pa.Schema, form: Form) -> list[Feature]:
    """Returns which columns of joined rows a model can be fed without being told more.

    Those whose table another shares come first.
    """
    ours, found = _ours(form), []
    for field in schema:
        if field.name in ours:
            found.append(ours[field.name])
        elif field.name not in (form.user, form.label) and (
            pt.is_boolean(field.type) or pt.is_floating(field.type)
        ):
            found.append(Feature(field.name, "number"))
    told = [one for one in found if one.size or one.kind in ("number", "vector")]
    return sorted(told, key=lambda feature: feature.shares != "")


def _ours(form: Form) -> dict[str, Feature]:
    """Returns the features that the join may write, by name."""
    places = form.history_len
    found = [
        Feature("sim_scores", "vector", length=places, history=True),
        Feature("sim_mask", "vector", length=places, history=True),
        Feature("sim_bucket", "ids", form.tiers + 1, places, history=True),
        Feature("history_item_ids", "ids", 0, places, history=True),
        Feature("simtier", "vector", length=form.tiers),
        Feature("top_positions", "ids", places + 1, form.top_positions),
    ]
    for label, max_id in form.max_ids.items():
        # FuxiCTR wants two rows at least, also where no night has been there yet.
        column, rows = cluster_column(label), max(max_id, 1) + 1
        is_main = label == MAIN
        of_history = "history_cluster_ids" if is_main else f"history_{column}"
        found += [
            Feature(column, "id", rows),
            Feature(of_history, "ids", rows, places, shares=column, history=True),
            Feature("same_cluster" if is_main else f"same_{column}", "number"),
        ]
    found += [Feature(name, "number") for name in _NUMBERS]
    return {feature.name: feature for feature in found}


def _others(schema: pa.Schema, form: Form) -> list[pa.Field]:
    """Returns the columns that are no feature as long as nobody says more of them."""
    fed = {form.label, *(feature.name for feature in features(schema, form))}
    return [field for field in schema if field.name not in fed]


def _check_lengths(rows: pa.Table, form: Form) -> None:
    """Raises DataContractError unless each list of ours has the length of its feature."""
    for name, feature in _ours(form).items():
        if feature.kind in ("number", "id") or name not in rows.column_names:
            continue
        found = pc.min_max(pc.fill_null(pc.list_value_length(rows[name]), -1)).as_py()
        if len(rows) and found != {"min": feature.length, "max": feature.length}:
            raise DataContractError(
                f"Lists of column {name} should have {feature.length} places in every row, and "
                f"have {found['min']} to {found['max']} (-1: a null). A model would take some "
                "places for others. The rows were not joined with these settings: join them again."
            )


def _without_nulls(rows: pa.Table, form: Form) -> list[pa.ChunkedArray]:
    """Returns all columns, numbers with 0 for null; raises DataContractError for a null label."""
    if form.label is not None and (nulls := rows[form.label].null_count):
        raise DataContractError(
            f"{nulls:,} of {len(rows):,} rows have no label: column {form.label} is null. A "
            "model would learn from a label that nobody gave. Leave these samples out, or fill it."
        )
    return [
        pc.fill_null(column, pa.scalar(0).cast(column.type))
        if _is_number(column.type) and column.null_count
        else column
        for column in rows.columns
    ]


def _cast(column: pa.Array | pa.ChunkedArray, type: pa.DataType) -> pa.Array | pa.ChunkedArray:
    """Casts to a type of a layout; times become their microseconds, days their number."""
    if pt.is_timestamp(column.type) and not pt.is_timestamp(type):
        column = column.cast(pa.timestamp("us", column.type.tz), safe=False)  # below: cut off
    elif pt.is_date64(column.type):
        column = column.cast(pa.date32())
    return column if column.type == type else column.cast(type)


def _quoted(name: str) -> str:
    """Returns a column's name as text of YAML, and of a protocol buffer."""
    return json.dumps(name, ensure_ascii=False)


# ---- FuxiCTR ---------------------------------------------------------------------------------


def _fuxictr_schema(schema: pa.Schema, form: Form) -> pa.Schema:
    if GROUP_ID in schema.names:
        raise OperatorError(
            f"The samples have a column {GROUP_ID}, and the layout fuxictr writes one of that name "
            "(a number for each user, by which FuxiCTR groups rows for GAUC). Rename yours."
        )
    user, label = schema.field(form.user), _label(schema, form, "fuxictr")
    if not (pt.is_integer(user.type) or _is_text(user.type)):
        raise OperatorError(
            f"Column {form.user} is of type {user.type}; the layout fuxictr makes {GROUP_ID} of "
            "user IDs that are whole numbers or strings. Cast it before the join."
        )
    at = schema.get_field_index(label.name)
    with_label = schema.set(at, label.with_type(pa.float32()))
    return with_label.append(pa.field(GROUP_ID, pa.int64(), nullable=False))


def _label(schema: pa.Schema, form: Form, name: str) -> pa.Field:
    """Returns the column of labels; raises OperatorError where it is none."""
    found = schema.field(form.label) if form.label in schema.names else None
    if found is None or not _is_number(found.type):
        told = f"there is no {form.label}" if form.label else "none is named"
        if found is not None:
            told = f"{found.name} is of type {found.type}"
        raise OperatorError(
            f"The layout {name} needs a column of labels, booleans or numbers, and {told}: its "
            "framework would have nothing to learn. Name one (--label), or write the plain layout."
        )
    return found


def _group_ids(users: pa.ChunkedArray) -> pa.ChunkedArray:
    """Returns the xxHash64 of each user modulo 2^53, 0 for null; int64 [n]."""
    users = users.cast(pa.int64() if pt.is_integer(users.type) else pa.string())
    found = np.zeros(len(users), np.int64)
    there = users.is_valid().to_numpy()
    found[there] = (hash_ids(users.drop_null()) % np.uint64(GROUP_IDS)).astype(np.int64)
    return pa.chunked_array([found])


_FUXICTR = """\
# What FuxiCTR 2.3.10 reads of this training set. Lists are newest first, padded with 0. Paths are
# relative to the set's folder, in which FuxiCTR is to be run. A later join may write this file
# anew: add what is yours to a copy.
courier:
    # False, always. With True FuxiCTR counts the values of each column and numbers them anew:
    # cluster 7 of today would be another one tomorrow, and those of a new day none at all.
    rebuild_dataset: False
    data_format: parquet
    data_root: ./_fuxictr/  # feature_map.json is written below it
    train_data: "./*/*.parquet"  # name the days to train on, and
    valid_data: "./*/*.parquet"  # a later one to validate on
    test_data: null
    group_id: {group_id}  # a number for each user, for gAUC
    feature_cols:
        - {{name: {group_id}, active: True, dtype: int, type: meta, remap: False}}
{features}
{others}
    label_col: {{name: {label}, dtype: float}}
"""


def _fuxictr_config(schema: pa.Schema, form: Form) -> str:
    return _FUXICTR.format(
        group_id=GROUP_ID,
        features="\n".join(
            f"        - {{{_fuxictr_feature(feature)}}}" for feature in features(schema, form)
        ),
        others="\n".join(f"        # {line}" for line in _fuxictr_others(_others(schema, form))),
        label=_quoted(_label(schema, form, "fuxictr").name),
    )


def _fuxictr_feature(feature: Feature) -> str:
    """Returns a column's line: an embedding is a vector that FuxiCTR does not look up."""
    dtype = "int" if feature.size else "float"
    told = f"name: {_quoted(feature.name)}, active: True, dtype: {dtype}, type: "
    if feature.kind == "number":
        return f"{told}numeric"
    if feature.kind == "vector":
        return f"{told}embedding, pretrain_dim: {feature.length}"
    if feature.kind == "id":
        return f"{told}categorical, vocab_size: {feature.size}"
    told += f"sequence, max_len: {feature.length}, vocab_size: {feature.size}"
    return f"{told}, share_embedding: {_quoted(feature.shares)}" if feature.shares else told


def _fuxictr_others(others: list[pa.Field]) -> list[str]:
    """Returns what to say of columns that are in the files and not read."""
    whole = [field.name for field in others if pt.is_integer(field.type)]
    rest = [field.name for field in others if not pt.is_integer(field.type)]
    lines = []
    if whole:
        told = "IDs as numbers from 1, 0 for none, with the highest + 1 for vocab_size."
        lines.append(f"Yours to add: {told}")
    for name in whole:
        told = f"name: {_quoted(name)}, active: True, dtype: int"
        lines.append(f"- {{{told}, type: categorical, vocab_size: HIGHEST + 1}}")
    if rest:
        lines.append("In the files, but no features that FuxiCTR could read: strings, dates, lists")
        lines.append(f"of any length. {', '.join(map(_quoted, rest))}")
    return lines


# ---- TorchEasyRec ----------------------------------------------------------------------------

_YOURS = (
    "IDs as id_feature, with num_buckets (the highest + 1) or hash_bucket_size; 0 is also where "
    "there was none."
)
_SCALARS = (pa.int64(), pa.int32(), pa.float64(), pa.float32(), pa.string())
# What is cast, and to what: no number is changed, nor cut off.
_CASTS: tuple[tuple[Callable[[pa.DataType], bool], pa.DataType], ...] = (
    (pt.is_boolean, pa.int32()),
    (pt.is_int8, pa.int32()),
    (pt.is_int16, pa.int32()),
    (pt.is_uint8, pa.int32()),
    (pt.is_uint16, pa.int32()),
    (pt.is_uint32, pa.int64()),
    (pt.is_float16, pa.float32()),
    (pt.is_timestamp, pa.int64()),  # microseconds
    (pt.is_date, pa.int32()),  # days
)


def torcheasyrec_type(type: pa.DataType) -> pa.DataType | None:
    """Returns the type that a column of `type` has in TorchEasyRec's layout, None for none.

    Its reader takes int64, int32, float64, float32 and string, lists of these, lists of such
    lists, and maps of these whose keys are no floats; and stops at a column of anything else.
    """
    if _is_list(type):
        inner = torcheasyrec_type(type.value_type)
        if inner is None or pt.is_map(inner) or pt.is_temporal(type.value_type):
            return None
        return None if pt.is_list(inner) and pt.is_list(inner.value_type) else pa.list_(inner)
    if pt.is_map(type):
        keys = type.key_type in _SCALARS and not pt.is_floating(type.key_type)
        return type if keys and type.item_type in _SCALARS else None
    if _is_text(type):
        return pa.string()
    if type in _SCALARS:
        return type
    return next((to for is_such, to in _CASTS if is_such(type)), None)


def _torcheasyrec_name(name: str, form: Form) -> str:
    """Returns a column's name: `history__<feature>` for what goes along with the history."""
    return f"{HISTORY}__{name.removeprefix('history_')}" if _is_of_history(name, form) else name


def _is_of_history(name: str, form: Form) -> bool:
    ours = _ours(form)
    return name in ours and ours[name].history


def _without_padding(rows: pa.Table, columns: list[pa.ChunkedArray], form: Form) -> list[pa.Array]:
    """Returns the columns of `rows`, lists of the history with its items alone.

    TorchEasyRec takes the length of a list for that of the history, and would attend to padding. An
    empty history keeps one place, as its own reader fills an empty list.
    """
    sizes = np.clip(rows["history_len"].to_numpy(), 1, form.history_len)
    kept = pa.array((np.arange(form.history_len) < sizes[:, None]).reshape(-1))
    return [
        list_array(sizes, column.combine_chunks().flatten().filter(kept))
        if _is_of_history(name, form)
        else column
        for name, column in zip(rows.column_names, columns, strict=True)
    ]


def _torcheasyrec_schema(schema: pa.Schema, form: Form) -> pa.Schema:
    _label(schema, form, "torcheasyrec")
    fields = []
    for field in schema:
        type, name = torcheasyrec_type(field.type), _torcheasyrec_name(field.name, form)
        if type is None:
            raise OperatorError(
                f"Column {field.name} is of type {field.type}, which TorchEasyRec cannot read: it "
                "takes int64, int32, float64, float32, string, lists and maps of these, and stops "
                "at a column of anything else. Cast the column before the join, or leave it "
                "out of the samples."
            )
        if name != field.name and name in schema.names:
            raise OperatorError(
                f"The samples have a column {name}, and the layout torcheasyrec gives that name to "
                f"{field.name}. Rename yours."
            )
        fields.append(field.with_type(type).with_name(name))
    return pa.schema(fields, schema.metadata)


_TORCHEASYREC = """\
# What TorchEasyRec reads of this training set: the parts of a pipeline's configuration that are
# about data. train_config, eval_config and model_config are yours to add, to a copy of this file: a
# later join may write it anew.
data_config {{
    dataset_type: ParquetDataset
    batch_size: 4096
    fg_mode: FG_NONE  # columns are read as they are; FG_DAG hashes IDs of yours
    label_fields: {label}
    num_workers: 2
}}
{features}{history}{others}"""


def _torcheasyrec_config(schema: pa.Schema, form: Form) -> str:
    found = features(schema, form)
    flat = [_torcheasyrec_feature(feature, form) for feature in found if not feature.history]
    inner = [_torcheasyrec_feature(feature, form) for feature in found if feature.history]
    group = f'sequence_name: "{HISTORY}"\nsequence_length: {form.history_len}\n'
    group += 'sequence_delim: ";"\n'  # required, though of strings only
    group += "".join(_block("features", text) for text in inner)
    others = [_quoted(_torcheasyrec_name(f.name, form)) for f in _others(schema, form)]
    return _TORCHEASYREC.format(
        label=_quoted(_label(schema, form, "torcheasyrec").name),
        features="".join(_block("feature_configs", text) for text in flat),
        history=_block("feature_configs", _block("sequence_feature", group)) if inner else "",
        others=f"# Yours to add: {_YOURS}\n# {', '.join(others)}\n" if others else "",
    )


def _torcheasyrec_feature(feature: Feature, form: Form) -> str:
    """Returns the block of one feature; inside the group, names go without it."""
    column = _torcheasyrec_name(feature.name, form)
    name = column.removeprefix(f"{HISTORY}__") if feature.history else column
    side = "user" if feature.history else "item" if feature.kind == "id" else "context"
    lines = [f"feature_name: {_quoted(name)}", f"expression: {_quoted(f'{side}:{name}')}"]
    if feature.size:
        table = feature.shares or feature.name
        lines += [f"num_buckets: {feature.size}", f"embedding_dim: {_EMBEDDING_DIM}"]
        lines += [f"embedding_name: {_quoted(table)}"]
    elif feature.length > 1 and not feature.history:
        lines.append(f"value_dim: {feature.length}")
    return _block("id_feature" if feature.size else "raw_feature", "\n".join(lines))


def _block(name: str, text: str) -> str:
    """Returns a message of a protocol buffer, in text."""
    inside = "".join(f"    {line}\n" for line in text.splitlines())
    return f"{name} {{\n{inside}}}\n"


# ---- Types -----------------------------------------------------------------------------------


def _is_number(type: pa.DataType) -> bool:
    return pt.is_boolean(type) or pt.is_integer(type) or pt.is_floating(type)


def _is_text(type: pa.DataType) -> bool:
    inner = type.value_type if pt.is_dictionary(type) else type
    return pt.is_string(inner) or pt.is_large_string(inner)


def _is_list(type: pa.DataType) -> bool:
    return pt.is_list(type) or pt.is_large_list(type) or pt.is_fixed_size_list(type)
