"""Compares what each objective learns from the same shop, in the same number of steps.

    python tests/benchmarks/compare_objectives.py SHOP_FOLDER --until 2026-01-06 [--seeds 0,1]

SHOP_FOLDER is one that `courier demo` made and `courier training-rows` has been run in; it is only
read. Everything is as in `courier train --preset demo` but what options say. `--starts` are where
the runs begin: `random`, a file of weights, or the folder of an encoder (as `--init-from`), for
which `--freeze-backbone` may hold; a random backbone is never frozen. On photographs, with
EfficientNet-Lite0 and the weights of `lite0_weights.py`:

    courier init-encoder --backbone timm:tf_efficientnet_lite0 --weights lite0.safetensors \\
        --input-size 96 --projection pca --ds 2026-01-05 --name lite0-pca
    python tests/benchmarks/compare_objectives.py SHOP_FOLDER --until 2026-01-08 \\
        --held-out-days 2 --backbone timm:tf_efficientnet_lite0 --input-size 96 \\
        --starts random,encoders/lite0-pca-ID --freeze-backbone 99 --temperature 0.5

The step of a run is chosen by the held-out AUC that is reported, for all objectives alike, so
compare figures, and take none as the truth. CLIP reads titles with a small BERT of random weights:
no language model is fetched.
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
from courier_model.training.train import Training, TrainingData
from pipelines.artefacts.training import find_span, read_data
from pipelines.config import load_settings

RUN = ("objective", "start", "seed")
BASELINES = ("histogram", "PCA", "start")  # of those, what a run was measured beside
MEASURED = (
    "AUC", "±", "GAUC", "max AUC", *(f"above {name}" for name in BASELINES),
    *(f"± {name}" for name in BASELINES), "nearest", "seconds",
)  # fmt: skip
COLUMNS = (*RUN, *MEASURED)

Result = dict[str, Any]


# ---- Runs --------------------------------------------------------------------------------------


def make_run(wanted: TrainSettings, data: TrainingData, folder: Path) -> Result:
    """Makes one training run; leaves only the images that it decoded in `folder`, for the next."""
    for leftover in ("checkpoints", "tensorboard"):
        shutil.rmtree(folder / leftover, ignore_errors=True)
    with joined() as process:
        run = Training(wanted, data, str(folder), process, lambda _: None)
        run.run(lambda _: None, lambda: False)
        run.finish()
    start = os.path.basename(wanted.init_from or wanted.weights)
    named = dict(zip(RUN, (wanted.objective, start, wanted.seed), strict=True))
    return named | figures(run)


def figures(run: Training) -> Result:
    """Returns the values of the columns MEASURED; PCA stands beside pretrained weights alone."""
    histogram, *pca, start = run.ahead.values()
    ahead = dict(zip(BASELINES, (histogram, pca[0] if pca else {}, start), strict=True))
    best = run.record.best
    assert best is not None
    exported = run.centred if run.centred and run.centred["taken"] else best
    return {
        **{"AUC": exported["auc"], "±": exported["auc_se"]},
        **{"GAUC": exported["gauc"], "max AUC": exported["max_auc"]},
        **{f"above {name}": found.get("auc") for name, found in ahead.items()},
        **{f"± {name}": found.get("auc_se") for name, found in ahead.items()},
        **{"nearest": best["nearest"], "seconds": run.record.seconds},
    }


def plan_runs(given: argparse.Namespace, text_model: str) -> list[TrainSettings]:
    """Plans runs seed by seed; raises OperatorError for an objective that there is none of."""
    same = {
        name: value
        for name in ("backbone", "input_size", "batch_rows", "epochs", "learning_rate",
                     "warmup_steps", "backbone_lr_factor", "temperature", "chunk_images",
                     "evaluate_every", "precision")
        if (value := getattr(given, name)) is not None
    }  # fmt: skip
    return [
        replace(
            PRESETS["demo"], objective=objective, seed=seed, **begun(start, given.freeze_backbone),
            **{k: v for k, v in same.items() if k != "temperature" or reconstructs(objective)},
            text_model=text_model if objective == "clip" else None,
        )
        for seed in given.seeds
        for start in given.starts
        for objective in given.objectives
    ]  # fmt: skip


def reconstructs(objective: str) -> bool:
    """Returns whether the objective is COURIER's or an ablation, by its temperature."""
    return TEMPERATURES[objective] == TEMPERATURES["courier"]


def begun(start: str, freeze_backbone: int) -> dict[str, Any]:
    """Returns the settings of a run that begins so."""
    if start == "random":
        return {"weights": start}
    name = "init_from" if os.path.isdir(start) else "weights"
    return {name: start, "freeze_backbone": freeze_backbone}


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
    if name == "seconds":
        return f"{value:.0f}"
    return f"{value:+.4f}" if name.startswith("above") else f"{value:.4f}"


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
    """Prints one line per objective and start, the best first."""
    runs: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        runs.setdefault((result["objective"], result["start"]), []).append(result)

    def auc(which: tuple[str, str]) -> float:
        return -float(np.mean([r["AUC"] for r in runs[which]]))

    print("\nMean over seeds (lowest–highest):\n")
    print(heading(("objective", "start", "seeds", *MEASURED)))
    for which in sorted(runs, key=auc):
        spread = (mean_and_spread(m, [r[m] for r in runs[which]]) for m in MEASURED)
        print(line((*which, str(len(runs[which])), *spread)))


# ---- The script ------------------------------------------------------------------------------


def read_shop(given: argparse.Namespace) -> TrainingData:
    settings = load_settings(str(given.shop / "courier.toml"))
    span = find_span(settings, given.start_ds, given.until, given.held_out_days, print)
    return read_data(settings, span, PRESETS["demo"])[0]


def listed(of: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Returns a type for argparse: it reads values with commas between them."""
    return lambda text: [of(part) for part in text.split(",")]


def parse() -> argparse.Namespace:
    demo = PRESETS["demo"]
    parser = argparse.ArgumentParser()
    parser.add_argument("shop", type=Path, metavar="SHOP_FOLDER")
    parser.add_argument("--until", type=dt.date.fromisoformat, required=True)
    parser.add_argument("--start-ds", type=dt.date.fromisoformat)
    parser.add_argument("--held-out-days", type=int, default=1)
    parser.add_argument("--seeds", type=listed(int), default=[0, 1])
    parser.add_argument("--objectives", type=listed(str), default=list(TEMPERATURES))
    parser.add_argument("--starts", type=listed(str), default=["random"])
    parser.add_argument("--freeze-backbone", type=int, default=0)
    parser.add_argument("--backbone")
    parser.add_argument("--input-size", type=int)
    parser.add_argument("--batch-rows", type=int, default=demo.batch_rows)
    parser.add_argument("--chunk-images", type=int)
    parser.add_argument("--epochs", type=int, default=demo.epochs)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--warmup-steps", type=int)
    parser.add_argument("--backbone-lr-factor", type=float)
    parser.add_argument("--temperature", type=float, help="Of COURIER and what is like it.")
    parser.add_argument("--evaluate-every", type=int)
    parser.add_argument("--precision")
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
    print(f"{rows:,} rows, {steps} steps of {given.batch_rows} rows\n")
    print(heading(COLUMNS), flush=True)
    results = []
    for wanted in planned:
        results.append(make_run(wanted, data, folder / "run"))
        print(line(cell(name, results[-1][name]) for name in COLUMNS), flush=True)
    print_summary(results)


if __name__ == "__main__":
    main()
