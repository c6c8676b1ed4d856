"""FuxiCTR itself reads a training set of `courier join`, by the configuration beside it, unchanged.

The set is the demo's, of a shop with few items, whose encoder is not trained. Its samples have
columns of their own besides (`joined_rows`), so that all that a layout does is done to them.
"""

import datetime as dt
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from feature_jobs.impressions.layouts import GROUP_ID
from tests.support import joined_rows
from tests.support.commands import Capture
from tests.support.joined_rows import as_array
from tests.test_imports import ROOT
from tests.test_readme import run

PYTHON = ROOT / ".venv-frameworks/bin/python"
READER = ROOT / "tests/support/fuxictr_reader.py"
DAYS = ("2026-01-08", "2026-01-09")  # of the page
PLACES, TOP = 20, 3
UNKNOWN, STRANGER = 10**6, 10**6 + 1  # an item that no catalogue has, a user who never clicked

# The second codebook gives numbers of its own to all clusters.
NIGHTS = """
courier init-encoder --backbone shufflenet_v2_x0_5 --weights random --input-size 32 >> courier.toml
courier embed --ds 2026-01-06
courier fit-codebook --ds 2026-01-06 --clusters coarse=3,main=8 >> courier.toml
courier refresh --ds 2026-01-07
courier fit-codebook --ds 2026-01-07 --clusters coarse=3,main=8 --mode fresh >> courier.toml
courier refresh --ds 2026-01-08 --accept churn --reason 'all numbers are new'
"""
MAX_IDS = {"main": 16, "coarse": 6}
SETTINGS = f"""
[simscore]
columns = [
    "history_cluster_ids", "history_cluster_coarse", "sim_bucket", "top_positions",
    "same_cluster_coarse", "history_item_ids",
]
top_k = {TOP}
"""
NUMBERS = {
    "has_night", "item_known", "has_image", "in_scope", "history_len", "sim_known", "sim_max",
    "sim_mean", "same_cluster", "same_cluster_coarse",
    "price", "member",  # of the shop's own
}  # fmt: skip
VECTORS = {"sim_scores": PLACES, "sim_mask": PLACES, "simtier": 20}
IDS = {"cluster_id": MAX_IDS["main"], "cluster_coarse": MAX_IDS["coarse"]}
LISTS = {
    "history_cluster_ids": (PLACES, MAX_IDS["main"], "cluster_id"),
    "history_cluster_coarse": (PLACES, MAX_IDS["coarse"], "cluster_coarse"),
    "sim_bucket": (PLACES, 20, None),
    "top_positions": (TOP, PLACES, None),
}

pytestmark = [
    pytest.mark.frameworks,
    pytest.mark.skipif(not PYTHON.exists(), reason="`make test-frameworks` installs FuxiCTR"),
]


def page(heading: str, language: str) -> str:
    """Returns the block of a language below a heading of the page, the first one for ''."""
    text = (
        (ROOT / "pipelines/docs/ctr.md")
        .read_text()
        .partition(f"## {heading}\n" if heading else "# ")[2]
    )
    found = re.search(rf"```{language}\n(.*?)```", text, re.DOTALL)
    assert found
    return found[1]


def training(heading: str) -> str:
    """Returns the lines of the page that train a model, in many small steps, seeded."""
    script = page(heading, "python")
    assert script.count("4096") == 1
    return "import torch\ntorch.manual_seed(0)\n" + script.replace("4096", "64")


def write_samples(shop: Path, day: str) -> None:
    """Writes the log of a day, and a negative for each of its rows; a day has two files."""
    rng = np.random.default_rng(dt.date.fromisoformat(day).toordinal())
    log = pq.read_table(shop / f"impressions/ds={day}", partitioning=None)
    items = pq.read_table(shop / f"catalogue/ds={day}", partitioning=None)["item_id"].to_numpy()
    negatives = rng.choice([*items, UNKNOWN], len(log))
    users = np.where(rng.random(len(log)) < 0.1, STRANGER, log["user_id"].to_numpy())
    columns = {
        "user_id": np.concatenate([log["user_id"].to_numpy(), users]),
        "item_id": np.concatenate([log["item_id"].to_numpy(), negatives]),
        "event_time": pa.concat_arrays([log["event_time"].combine_chunks()] * 2),
        "clicked": np.concatenate([log["clicked"].to_numpy(), np.zeros(len(log), bool)]),
    }
    own = joined_rows.samples(2 * len(log), rng)
    own = {name: own[name] for name in ("price", "member", "position", "page", "tags")}
    rows = pa.table(columns | own)
    folder = shop / f"ctr/ds={day}"
    folder.mkdir(parents=True)
    for part, some in enumerate((rows[: len(log)], rows[len(log) :])):
        pq.write_table(some, folder / f"{part}.parquet", row_group_size=256)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, warm_python: str) -> Path:
    """Makes a small demo shop, its nights, and its training set as the page does, in two layouts.

    The plain one is `ctr`, the other `fuxictr`.
    """
    folder = tmp_path_factory.mktemp("frameworks") / "shop"
    run("courier demo --out shop --items 80 --users 60", folder.parent, warm_python)
    settings = folder / "courier.toml"
    settings.write_text("rows_per_shard = 500\n" + settings.read_text() + SETTINGS)
    for day in DAYS:
        write_samples(folder, day)
    command = page("", "bash").strip()
    for_fuxictr = f"{command} --layout fuxictr --name fuxictr"
    run(f"{NIGHTS}\n{command}\n{for_fuxictr}", folder, warm_python)
    return folder


@pytest.fixture(scope="module")
def training_set(shop: Path) -> Path:
    """Gives the folder of the set for FuxiCTR."""
    return shop / "features/demo/joined/fuxictr"


@pytest.fixture(scope="module")
def plain(shop: Path) -> pa.Table:
    """Reads the plain set as a user does, by its folder; all that it should have is in it."""
    rows = pq.read_table(shop / "features/demo/joined/ctr")
    found = {name: set(rows[name].to_pylist()) for name in (*IDS, "clicked", "history_len")}
    assert found["cluster_id"] == set(range(MAX_IDS["main"] + 1))  # of both codebooks
    assert found["cluster_coarse"] == set(range(MAX_IDS["coarse"] + 1))
    assert found["history_len"] >= {0, PLACES}
    assert rows["price"].null_count
    for flag in ("has_night", "item_known", "has_image", "clicked"):
        assert set(rows[flag].to_pylist()) == {False, True}, flag
    assert {UNKNOWN} < set(rows["item_id"].to_pylist())
    assert {STRANGER} < set(rows["user_id"].to_pylist())
    return rows


def run_there(folder: Path, *command: str | Path) -> str:
    """Runs a program of the environment that has FuxiCTR; returns what it prints."""
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [PYTHON, *command], cwd=folder, env=outside | {"RAY_USAGE_STATS_ENABLED": "0"}, text=True,
        capture_output=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout


@pytest.fixture(scope="module")
def read(training_set: Path) -> tuple[str, dict[str, np.ndarray]]:
    """Returns the feature map that FuxiCTR prints, and the columns that it feeds to a model."""
    printed = run_there(training_set, READER, "_fuxictr", "_fuxictr/found.npz")
    return printed, dict(np.load(training_set / "_fuxictr/found.npz"))


def test_fuxictr_reads_every_feature_of_the_demos_set_unchanged(
    read: tuple[str, dict[str, np.ndarray]], plain: pa.Table
) -> None:
    _, found = read
    fed = {*NUMBERS, *VECTORS, *IDS, *LISTS, "clicked"}
    assert set(found) == {*fed, GROUP_ID}
    for name in fed:
        wanted = as_array(plain[name])
        wanted = np.where(np.equal(wanted, None), 0, wanted)  # a null in a column of the shop's
        assert np.array_equal(found[name], wanted), name
    users = set(zip(plain["user_id"].to_pylist(), found[GROUP_ID].tolist(), strict=True))
    assert len(users) == len({user for user, _ in users}) == len({group for _, group in users})


def test_fuxictrs_tables_have_a_row_for_every_number_that_may_come(
    read: tuple[str, dict[str, np.ndarray]], capsys: Capture
) -> None:
    printed, found = read
    with capsys.disabled():
        os.write(1, printed.encode())  # its feature map
    feature_map = {
        name: told for one in json.loads(printed)["features"] for name, told in one.items()
    }
    assert set(feature_map) == set(found) - {"clicked"}
    for name, max_id in IDS.items():
        assert feature_map[name]["vocab_size"] == max_id + 1
    for name, (length, highest, shares) in LISTS.items():
        told = feature_map[name]
        assert (told["max_len"], told["vocab_size"]) == (length, highest + 1), name
        assert told.get("share_embedding") == shares, name
    for name, length in VECTORS.items():
        assert feature_map[name]["pretrain_dim"] == length


@pytest.mark.usefixtures("read")
def test_a_set_that_fuxictr_has_worked_in_is_read_by_its_folder(
    training_set: Path, plain: pa.Table
) -> None:
    rows = pq.read_table(training_set)
    assert rows["cluster_id"].equals(plain["cluster_id"])


def test_the_pages_lines_train_a_model_of_fuxictr(training_set: Path) -> None:
    told = run_there(training_set, "-c", training("FuxiCTR") + "\nprint(loss.item())")
    assert 0 < float(told.split()[-1]) < 1


def test_the_pages_lines_train_a_model_of_torch(
    shop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shop)
    known = dict[str, Any]()
    exec(training("PyTorch"), known)
    assert 0 < known["loss"].item() < 1
