"""`courier train` makes an encoder package from published training rows.

This module says which days are trained on and which are held out, where their images are, how a run
is found again and how it is stopped, and what is written down about it. The training itself is
`courier_model.training.train`.
"""

import contextlib
import datetime as dt
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from courier_model.encoder import origin_of, save_encoder
from courier_model.training.distributed import joined, wait_for_all
from courier_model.training.rows import build_sets
from courier_model.training.settings import TrainSettings
from courier_model.training.train import Stopped, Training, TrainingData
from feature_jobs import inputs
from feature_jobs.schemas import (
    TRAINING_ROWS,
    CourierError,
    DataContractError,
    InputNotReady,
    OperatorError,
)
from feature_jobs.store import day_names, documents, files, partitions
from feature_jobs.store.encoder_info import EncoderInfo, check_name, read_encoder_info
from feature_jobs.store.partitions import Partition
from feature_jobs.store.versions import PACKAGE_VERSIONS
from pipelines.artefacts import training_dry_run
from pipelines.artefacts.held_out import draw_users, histories_of
from pipelines.artefacts.stanzas import encoder_stanza
from pipelines.config import Settings
from pipelines.planning.made_with import rows_settings
from pipelines.planning.shop_tables import ShopTables
from pipelines.planning.yesterday import history_law
from pipelines.running.progress import StepBar

_COLUMNS = (
    "user_id", "request_id", "event_time", "pv_item_ids", "pv_clicked", "click_item_ids"
)  # fmt: skip


@dataclass(frozen=True)
class Span:
    """Holds published partitions of `training_rows`, by ds ascending; `held_out` ones are later."""

    train: dict[dt.date, Partition]
    held_out: dict[dt.date, Partition]

    @property
    def all(self) -> dict[dt.date, Partition]:
        return self.train | self.held_out

    @property
    def categories(self) -> tuple[str, ...] | None:
        found = next(iter(self.train.values())).manifest["settings"]["categories"]
        return None if found is None else tuple(found)


def train(
    settings: Settings, folder: str, out: str, wanted: TrainSettings, name: str,
    start: dt.date | None, until: dt.date, held_out_days: int, dry_run: bool,
    say: Callable[[str], None],
) -> str | None:  # fmt: skip
    """Trains on days before `until` and saves the encoder; returns its stanza.

    With `dry_run` it only says what that would take, and writes nothing.

    The run has a folder of its own below `folder`/training; the encoder lies below `out`/encoders.
    The stanza holds from `until` on, or from the day after the data of an encoder that it goes on
    from. Goes on where the same command was stopped. Under torchrun all processes call this alike;
    all but the first are silent and return None.
    """
    check_name(name)
    earlier = read_encoder_info(wanted.init_from) if wanted.init_from else None
    run_folder = os.path.join(folder, "training", f"{name}-until-{until}")
    with joined() as process, contextlib.ExitStack() as stack:
        bar = stack.enter_context(contextlib.closing(StepBar(say if process.leads else None)))
        span = find_span(settings, start, until, held_out_days, bar.say)
        if earlier:
            check_goes_on(earlier, span, bar.say)
        data, sources = read_data(settings, span, wanted)
        if dry_run:
            told = training_dry_run.run(wanted, data, run_folder, process, bar.say)
            for line in told if process.leads else ():
                bar.say(line)
            return None
        if process.leads:
            stack.enter_context(_alone_in(run_folder))
        wait_for_all()
        run = Training(wanted, data, run_folder, process, bar.say)
        with stop_requests() as stop_asked:
            record = run.run(bar.show, stop_asked)
        run.finish()
        if not process.leads:
            return None
        info = _export(run, span, earlier, out, name)
        path = os.path.join(out, "encoders", info.encoder_id)
        documents.write_json(os.path.join(path, "train.json"), _account(run, span, sources, info))
        for warning in _disappointments(run):
            bar.say(warning)
        assert record.best is not None
        comment = (
            f"{wanted.objective}, {wanted.backbone}, trained on ds {info.data_start_ds} to "
            f"{info.data_end_ds}, held-out AUC {run.auc:.4f} at step {record.best['step']:,}"
        )
        assert info.data_end_ds is not None
        data_end = dt.date.fromisoformat(info.data_end_ds)
        from_ds = max(until, data_end + dt.timedelta(days=1))
        return encoder_stanza(settings, folder, comment, from_ds, path)


# ---- Which days ------------------------------------------------------------------------------


def find_span(
    settings: Settings, start: dt.date | None, until: dt.date, held_out_days: int,
    say: Callable[[str], None],
) -> Span:  # fmt: skip
    """Opens the published days before `until`, from `start` on or all of them.

    The last `held_out_days` of them are held out. Raises InputNotReady where a day from `start` on
    is missing, or too few are there, and OperatorError where `start` is not before `until` or days
    were made under other settings.
    """
    if start and start >= until:
        raise OperatorError(
            f"Training from ds {start} on until ds {until} leaves no day: --start-ds must lie "
            "before --until."
        )
    days = settings.layout.published_days(TRAINING_ROWS)
    days = [ds for ds in days if (start or dt.date.min) <= ds < until]
    last = until - dt.timedelta(days=1)
    first = start or min([*days, last - dt.timedelta(days=held_out_days)])
    expected = [first + dt.timedelta(days=n) for n in range((until - first).days)]
    missing = [ds for ds in expected if ds not in days]
    if start and missing:
        raise InputNotReady(
            f"{len(missing)} of the {len(expected)} days from {start} to {last} have no "
            f"training_rows, {missing[0]} first. Make them with `courier training-rows --start-ds "
            f"{missing[0]} --end-ds {missing[-1]}`, or leave --start-ds out to train on the others."
        )
    if len(days) <= held_out_days:
        raise InputNotReady(
            f"{len(days)} days before ds {until} have training_rows; {held_out_days + 1} or more "
            f"are needed, to train on and, the last {held_out_days}, to measure on. Make more with "
            f"`courier training-rows --start-ds {(missing or expected)[0]} --end-ds {last}`."
        )
    if missing:
        say(f"no training_rows of {len(missing)} days: {', '.join(map(str, missing[:10]))}")
    found = {
        ds: partitions.open_published(settings.layout.folder(TRAINING_ROWS, ds)) for ds in days
    }
    _check_alike(settings, found)
    train, held_out = days[:-held_out_days], days[-held_out_days:]
    say(f"training on ds {train[0]} to {train[-1]}, measuring on {held_out[0]} to {held_out[-1]}")
    return Span({ds: found[ds] for ds in train}, {ds: found[ds] for ds in held_out})


def _check_alike(settings: Settings, found: Mapping[dt.date, Partition]) -> None:
    """Raises OperatorError where days were made under other settings, naming both.

    Another feature set may have made them, for instance, since the table is shared.
    """
    expected = rows_settings(settings)
    other: dict[dt.date, dict[str, Any]] = {}
    for ds, partition in found.items():
        made = partition.manifest["settings"]
        if differs := {k: made.get(k) for k, v in expected.items() if made.get(k) != v}:
            other[ds] = differs
    if other:
        first, last, differs = min(other), max(other), other[min(other)]
        raise OperatorError(
            f"The training_rows of {len(other)} of {len(found)} days, ds {first} the first and "
            f"{last} the last, were made otherwise than these settings say: those of {first} with "
            f"{differs}, where the settings have { ({k: expected[k] for k in differs}) }. Rows of "
            "days made differently are not trained on together. Correct the settings, or run "
            f"`courier training-rows --start-ds {first} --end-ds {last}`."
        )


def check_goes_on(earlier: EncoderInfo, span: Span, say: Callable[[str], None]) -> None:
    """Raises OperatorError where an `earlier` encoder has another scope than the rows of `span`.

    Warns where it was made from days that are held out.
    """
    if _scope(earlier.categories) != _scope(span.categories):
        raise OperatorError(
            f"The encoder {earlier.encoder_id} of --init-from was made for "
            f"{_named(earlier.categories)}, but the training rows are of "
            f"{_named(span.categories)}. What it learned elsewhere would be in an encoder that "
            "does not say so. Go on from an encoder of these categories, or make training rows of "
            "those of [training] categories that it has."
        )
    first = str(next(iter(span.held_out)))
    if earlier.data_end_ds is not None and earlier.data_end_ds >= first:
        say(
            f"WARNING: {earlier.encoder_id}, which training goes on from, was made from data up to "
            f"ds {earlier.data_end_ds}, and the days held out begin with {first}: it has seen what "
            "it is measured on, so that the measures are too good. Train until a later day."
        )


def _scope(categories: Sequence[str] | None) -> frozenset[str] | None:
    return None if categories is None else frozenset(categories)


def _named(categories: Sequence[str] | None) -> str:
    return "all categories" if categories is None else f"the categories {list(categories)}"


# ---- Rows and images -------------------------------------------------------------------------


def read_data(
    settings: Settings, span: Span, wanted: TrainSettings
) -> tuple[TrainingData, dict[str, Any]]:
    """Reads the rows to train on and, of users drawn, held-out rows, over one table of items.

    Returns with them the identities of what was read.
    """
    rows = [_rows_of(parts) for parts in (span.train, span.held_out)]
    if rows[0].schema != rows[1].schema:
        raise _other_types(rows[0].schema, rows[1].schema)
    shown = [
        chunk.flatten()
        for table in rows
        for name in ("pv_item_ids", "click_item_ids")
        for chunk in table[name].chunks
    ]
    item_ids = pc.unique(
        pa.chunked_array(shown, rows[0].schema.field("pv_item_ids").type.value_type)
    )
    settings.catalogue.check_has_images()
    catalogue, catalogues = read_catalogue(settings, list(span.all), item_ids)
    sources = {
        "training_rows": {str(ds): part.manifest["version"] for ds, part in span.all.items()},
        "held_out_from_ds": str(next(iter(span.held_out))),
        "catalogues": catalogues,
        "one_snapshot_for_all_days": not day_names.has_day(settings.catalogue.path),
        "image_roots": settings.catalogue.image_roots,
        **settings.catalogue.rewrite_as_written,
    }
    train, later = build_sets(rows, catalogue)
    held_out = draw_users(later, wanted.held_out_rows, wanted.seed)
    histories = histories_of(held_out, [train, later], history_law(settings))
    roots, fingerprint = settings.catalogue.image_roots, documents.digest(sources)
    return TrainingData(train, held_out, histories, roots, fingerprint), sources


def _rows_of(days: Mapping[dt.date, Partition]) -> pa.Table:
    """Reads the rows of all days.

    An empty day, which may not know the types of its IDs, has none.
    """
    parts = [part for part in days.values() if part.rows] or list(days.values())[:1]
    found = []
    for part in parts:
        for path in part.paths:
            rows = partitions.read_parquet(path, _COLUMNS)
            at = rows.schema.get_field_index("request_id")
            found.append(rows.set_column(at, "request_id", rows["request_id"].cast(pa.string())))
            if found[-1].schema != found[0].schema:
                raise _other_types(found[0].schema, found[-1].schema)
    return pa.concat_tables(found)


def _other_types(one: pa.Schema, other: pa.Schema) -> DataContractError:
    name = next(f.name for f in one if f.type != other.field(f.name).type)
    return DataContractError(
        f"{name} is {one.field(name).type} in the training_rows of one day but "
        f"{other.field(name).type} in those of another. IDs of two types never meet. Cast it where "
        "the log is written, and make the training rows of those days again."
    )


def read_catalogue(
    settings: Settings, days: Sequence[dt.date], item_ids: pa.Array
) -> tuple[pa.Table, list[dict[str, object]]]:
    """Reads item_id, image_uri and title of the wanted items, and the snapshots' identities.

    Each item is from the newest snapshot of `days` that has it; items that none has are left out.
    """
    shop = ShopTables(settings, days[-1], lambda _: None)
    found, identities = [], []
    for ds in reversed(days):
        try:
            source = shop.catalogue(ds)
        except InputNotReady:
            continue
        if source.item_id not in (None, item_ids.type):
            raise DataContractError(
                f"item_id is {source.item_id} in the catalogue of ds {ds} but {item_ids.type} in "
                "training_rows. No item would have an image. Cast it where the catalogue is "
                "written, and make the training rows again."
            )
        if not source.rows:
            continue
        rows = pa.concat_tables([_items_of(group, item_ids) for group in source.groups()])
        inputs.check_unique(rows["item_id"].combine_chunks().sort(), ds)
        found.append(rows)
        identities.append(source.identity())
        item_ids = item_ids.filter(pc.invert(pc.is_in(item_ids, rows["item_id"])))
        if shop.has_one_catalogue or not len(item_ids):
            break
    if not found:
        raise InputNotReady(
            f"The catalogue has no partition for any of the days {days[0]} to {days[-1]}, so no "
            "image of their training rows can be found. Correct [catalogue] path in the settings."
        )
    return pa.concat_tables(found), identities


def _items_of(group: inputs.RowGroup, item_ids: pa.Array) -> pa.Table:
    rows = inputs.read_rows(group, ["item_id", "image_uri", "title"])
    if "title" not in rows.column_names:
        rows = rows.append_column("title", pa.nulls(len(rows), pa.string()))
    return rows.filter(pc.is_in(rows["item_id"], item_ids))


# ---- Starting and stopping -------------------------------------------------------------------


@contextlib.contextmanager
def _alone_in(folder: str) -> Iterator[None]:
    """Holds the run's folder; raises CourierError at once where another process trains in it."""
    try:
        with files.lock(folder):
            yield
    except BlockingIOError as error:
        raise CourierError(
            f"Another process is training in {folder}. Two at once would undo each other's "
            "checkpoints. Wait for it, stop it, or give this run another --name."
        ) from error


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether SIGINT or SIGTERM came.

    The first signal is delivered once the block raises Stopped, with everything saved; a second one
    at once.
    """
    received: list[int] = []

    def ask(number: int, _frame: Any) -> None:
        if received:
            restore()
            signal.raise_signal(number)
        received.append(number)  # no more: whoever is interrupted may be writing a line just now

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, ask)
    try:
        yield lambda: bool(received)
    except Stopped:
        restore()
        # Under torchrun the signal may have come to another process than this one.
        signal.raise_signal(received[0] if received else signal.SIGTERM)
        raise
    finally:
        restore()


# ---- What is left behind ---------------------------------------------------------------------


def _export(
    run: Training, span: Span, earlier: EncoderInfo | None, out: str, name: str
) -> EncoderInfo:
    """Saves the finished encoder, which knows what an `earlier` one knew."""
    days = [str(ds) for ds in span.all]
    origin, lineage = origin_of(run.settings.weights), tuple[str, ...]()
    if earlier:
        days += [ds for ds in (earlier.data_start_ds, earlier.data_end_ds) if ds is not None]
        origin, lineage = earlier.encoder_id, (earlier.encoder_id, *earlier.lineage)
    return save_encoder(
        run.encoder, os.path.join(out, "encoders"), name, span.categories,
        data_start_ds=min(days), data_end_ds=max(days),
        weights=f"{origin}, trained for {run.settings.objective}", lineage=lineage,
    )  # fmt: skip


def _account(
    run: Training, span: Span, sources: Mapping[str, Any], info: EncoderInfo
) -> dict[str, Any]:
    """Tells for `train.json` how to make the encoder again, and what it was found to be worth.

    The data range includes the held-out days, since they chose the step that was exported, but not
    the days of encoders in the lineage.
    """
    record = run.record
    return {
        "settings": asdict(run.settings),
        "precision": run.precision,
        "data": {
            "start_ds": str(next(iter(span.all))),
            "end_ds": str(list(span.all)[-1]),
            "fingerprint": run.identity["data"],
            **sources,
        },
        "lineage": list(info.lineage),
        "git_revision": _git_revision(),
        "versions": PACKAGE_VERSIONS,
        "device": run.process.device_name,
        "processes": run.process.size,
        "steps": record.step,
        "counts": record.counts,
        "seconds": round(record.seconds, 1),
        "best": record.best,
        "centred": run.centred,
        "ahead": run.ahead,
        "measures": record.measures,
    }


def _disappointments(run: Training) -> Iterator[str]:
    """Yields what the operator should know before pinning an encoder that is not worth it."""
    for measured in run.record.measures:
        same = measured.get("ranked") == run.exported.get("ranked")
        if not measured["step"] and same and measured["auc"] >= run.auc:
            name = measured.get("of", "a baseline")  # a run that an earlier version made
            yield (
                f"WARNING: {name} ranks held-out clicks at least as well (AUC "
                f"{measured['auc']:.4f}) as the trained encoder ({run.auc:.4f}). More "
                "days, more epochs or another --learning-rate may help; pinning this one will not."
            )


def _git_revision() -> str | None:
    """Returns this code's revision, "-dirty" where files differ from it; None outside of git."""
    here = os.path.dirname(os.path.abspath(__file__))
    ours = ["git", "-C", here, "ls-files", "--error-unmatch", os.path.basename(__file__)]
    describe = ["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        # An installed copy may lie inside another project's repository.
        subprocess.run(ours, capture_output=True, check=True)
        found = subprocess.run(describe, capture_output=True, check=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
