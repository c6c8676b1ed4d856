"""FuxiCTR itself reads a training set in its layout, by the configuration beside it, unchanged."""

import json
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from feature_jobs.impressions.layouts import GROUP_ID, features, layout_config, to_layout
from tests.support.commands import Capture
from tests.support.joined_rows import FORM, MAX_IDS, PLACES, as_array, joined
from tests.test_imports import ROOT

PYTHON = ROOT / ".venv-frameworks/bin/python"
READER = ROOT / "tests/support/fuxictr_reader.py"
DAYS = ("2026-01-07", "2026-01-08")

pytestmark = [
    pytest.mark.frameworks,
    pytest.mark.skipif(not PYTHON.exists(), reason="`make test-frameworks` installs FuxiCTR"),
]


@pytest.fixture(scope="module")
def rows() -> list[pa.Table]:
    """Draws two days, which between them have both ends of each range of cluster IDs."""
    days = [joined(700, seed) for seed in range(len(DAYS))]
    found = set(np.concatenate([as_array(day["cluster_id"]) for day in days]).tolist())
    assert found == set(range(MAX_IDS["main"] + 1))
    return days


@pytest.fixture(scope="module")
def training_set(rows: list[pa.Table], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes both days, in two parts each, with FuxiCTR's configuration."""
    folder = tmp_path_factory.mktemp("frameworks") / "training_set"
    for day, plain in zip(DAYS, rows, strict=True):
        (folder / f"ds={day}").mkdir(parents=True)
        found = to_layout("fuxictr", plain, FORM)
        for part, some in enumerate((found[:300], found[300:])):
            pq.write_table(some, folder / f"ds={day}/part-{part}.parquet", row_group_size=128)
    for name, text in layout_config("fuxictr", rows[0].schema, FORM).items():
        (folder / name).write_text(text)
    return folder


def run(folder: Path, *command: str | Path) -> str:
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [PYTHON, *command], cwd=folder, env=outside | {"RAY_USAGE_STATS_ENABLED": "0"}, text=True,
        capture_output=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout


def test_fuxictr_reads_every_feature_unchanged(
    training_set: Path, rows: list[pa.Table], capsys: Capture
) -> None:
    printed = run(training_set, READER, ".", "found.npz")
    with capsys.disabled():
        os.write(1, printed.encode())  # its feature map
    feature_map = {k: v for told in json.loads(printed)["features"] for k, v in told.items()}
    found = np.load(training_set / "found.npz")
    plain = pa.concat_tables(rows)
    fed = [feature.name for feature in features(plain.schema, FORM)]
    assert set(found) == set(feature_map) | {"label"} == {*fed, GROUP_ID, "label"}
    for name in (*fed, "label"):
        wanted = as_array(plain[name])
        wanted = np.where(np.equal(wanted, None), 0, wanted)  # a null in a column of the user's
        assert np.array_equal(found[name], wanted), name
    for name, label in (("cluster_id", "main"), ("history_cluster_fine", "fine")):
        assert feature_map[name]["vocab_size"] == MAX_IDS[label] + 1
    assert feature_map["history_cluster_ids"]["max_len"] == PLACES
    users = as_array(plain["user"])
    assert len(set(found[GROUP_ID].tolist())) == len({str(user) for user in users})


def test_the_pages_lines_train_a_model(training_set: Path) -> None:
    page = (ROOT / "pipelines/docs/ctr.md").read_text().partition("## FuxiCTR")[2]
    (script,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    told = run(training_set, "-c", f"{script}\nprint(float(loss))")
    assert 0 < float(told.split()[-1]) < 1
