"""Compares what each objective learns from the same shop, in the same number of steps.

    python tests/benchmarks/compare_objectives.py SHOP_FOLDER --until 2026-01-06 [--seeds 0,1]

SHOP_FOLDER is one that `courier demo` made and `courier training-rows` has been run in; it is only
read. Everything else is as in `courier train --preset demo`. The step of a run is chosen by the
held-out AUC that is reported, for all objectives alike, so compare figures, and take none as the
truth. CLIP reads titles with a small BERT of random weights: no language model is fetched.
"""

import argparse
import datetime as dt
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from courier_model.training.distributed import joined
from courier_model.training.settings import PRESETS, TEMPERATURES, TrainSettings
from courier_model.training.train import Record, Training, TrainingData
from pipelines.artefacts.training import find_span, read_data
from pipelines.config import load_settings

COLUMNS = (
    "objective", "seed", "untrained AUC", "colour histogram AUC", "best AUC", "best GAUC",
    "nearest", "seconds",
)  # fmt: skip
MEASURED = COLUMNS[2:]

Result = dict[str, Any]


# ---- Runs --------------------------------------------------------------------------------------


def run_objective(wanted: TrainSettings, data: TrainingData, folder: Path) -> Result:
    """Makes one training run; leaves only the images that it decoded in `folder`, for the next."""
    for leftover in ("checkpoints", "tensorboard"):
        shutil.rmtree(folder / leftover, ignore_errors=True)
    with joined() as process:
        run = Training(wanted, data, str(folder), process, lambda _: None)
        record = run.run(lambda _: None, lambda: False)
    return {"objective": wanted.objective, "seed": wanted.seed, **figures(record)}


def figures(record: Record) -> Result:
    """Returns the values of the columns MEASURED."""
    colours, untrained = record.measures[:2]
    best = record.best
    assert best is not None
    found = (untrained["auc"], colours["auc"], best["auc"], best["gauc"], best["nearest"])
    return dict(zip(MEASURED, (*found, record.seconds), strict=True))


def plan_runs(given: argparse.Namespace, text_model: str) -> list[TrainSettings]:
    """Plans runs seed by seed; raises OperatorError for an objective that there is none of."""
    return [
        replace(
            PRESETS["demo"], objective=objective, seed=seed, batch_rows=given.batch_rows,
            epochs=given.epochs, text_model=text_model if objective == "clip" else None,
        )
        for seed in given.seeds
        for objective in given.objectives
    ]  # fmt: skip


# ---- CLIP's language model -----------------------------------------------------------------------


def make_text_model(data: TrainingData, folder: Path) -> None:
    """Makes a BERT of two layers and random weights that knows the words of the items' titles."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # read at import
    from transformers import BertConfig, BertModel, BertTokenizerFast
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words_of(data)]
    folder.mkdir()
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(words) + "\n")
    BertTokenizerFast(str(vocabulary), do_lower_case=False).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words), hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=256, max_position_embeddings=128,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)


def words_of(data: TrainingData) -> list[str]:
    from tokenizers.pre_tokenizers import BertPreTokenizer

    cut = BertPreTokenizer()
    titles = [title for title in data.train.items["title"].to_pylist() if title]
    return sorted({word for title in titles for word, _ in cut.pre_tokenize_str(title)})


# ---- Tables --------------------------------------------------------------------------------------


def line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def heading(columns: Sequence[str]) -> str:
    return line(columns) + "\n" + line("---" for _ in columns)


def number(name: str, value: float) -> str:
    return f"{value:.0f}" if name == "seconds" else f"{value:.4f}"


def cell(name: str, value: Any) -> str:
    if value is None:
        return "–"
    return number(name, value) if isinstance(value, float) else str(value)


def mean_and_spread(name: str, values: Sequence[float | None]) -> str:
    """Writes the mean, and the lowest and the highest where they differ."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    low, high = number(name, min(known)), number(name, max(known))
    spread = f" ({low}–{high})" if low != high else ""
    return number(name, float(np.mean(known))) + spread


def print_summary(results: Sequence[Result]) -> None:
    """Prints one line per objective, the best first."""
    runs: dict[str, list[Result]] = {}
    for result in results:
        runs.setdefault(result["objective"], []).append(result)

    def auc(name: str) -> float:
        return -float(np.mean([r["best AUC"] for r in runs[name]]))

    print("\nMean over seeds (lowest–highest):\n")
    print(heading(("objective", "seeds", *MEASURED)))
    for name in sorted(runs, key=auc):
        spread = (mean_and_spread(m, [r[m] for r in runs[name]]) for m in MEASURED)
        print(line((name, str(len(runs[name])), *spread)))


# ---- The script ------------------------------------------------------------------------------


def read_shop(given: argparse.Namespace) -> TrainingData:
    settings = load_settings(str(given.shop / "courier.toml"))
    span = find_span(settings, None, given.until, given.held_out_days, print)
    return read_data(settings, span)[0]


def listed(of: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Returns a type for argparse: it reads values with commas between them."""
    return lambda text: [of(part) for part in text.split(",")]


def parse() -> argparse.Namespace:
    demo = PRESETS["demo"]
    parser = argparse.ArgumentParser()
    parser.add_argument("shop", type=Path, metavar="SHOP_FOLDER")
    parser.add_argument("--until", type=dt.date.fromisoformat, required=True)
    parser.add_argument("--held-out-days", type=int, default=1)
    parser.add_argument("--seeds", type=listed(int), default=[0, 1])
    parser.add_argument("--objectives", type=listed(str), default=list(TEMPERATURES))
    parser.add_argument("--batch-rows", type=int, default=demo.batch_rows)
    parser.add_argument("--epochs", type=int, default=demo.epochs)
    return parser.parse_args()


def main() -> None:
    given = parse()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        compare(given, Path(folder))


def compare(given: argparse.Namespace, folder: Path) -> None:
    bert = folder / "bert"
    planned = plan_runs(given, str(bert))
    data = read_shop(given)
    if "clip" in given.objectives:
        make_text_model(data, bert)
    rows = len(data.train.with_anchor())
    steps = given.epochs * (rows // given.batch_rows)
    print(f"{rows:,} rows, {steps} steps of {given.batch_rows} rows, demo preset\n")
    print(heading(COLUMNS), flush=True)
    results = []
    for wanted in planned:
        results.append(run_objective(wanted, data, folder / "run"))
        print(line(cell(name, results[-1][name]) for name in COLUMNS), flush=True)
    print_summary(results)


if __name__ == "__main__":
    main()
