"""The README's commands run as they stand there."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def run(script: str, folder: Path, python: str) -> str:
    """Runs a bash script in which `courier` is this checkout."""
    courier = f'courier() {{ "{python}" -m pipelines.cli "$@"; }}\n'
    done = subprocess.run(
        ["bash", "-euc", courier + script],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def joined(shop: Path, *columns: str) -> list[list[float]]:
    """Returns some columns of the rows that the README's snippet makes, one for each of the log."""
    (snippet,) = blocks("python")
    report = f"""
assert len(rows) == len(log)
print(rows[{list(columns)}].T.to_json(orient="values"))
"""
    done = subprocess.run(
        [sys.executable, "-c", snippet + report], cwd=shop, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, warm_python: str) -> tuple[Path, str]:
    """Makes the shop of the README's steps; returns its folder, and what they print."""
    folder = tmp_path_factory.mktemp("readme")
    steps = next(block for block in blocks("bash") if "courier demo" in block)
    # One pass over one day: how long training takes is not what is tested here.
    short = "--preset demo --epochs 1 --start-ds 2026-01-04"
    return folder / "shop", run(steps.replace("--preset demo", short), folder, warm_python)


def test_the_readmes_steps_make_a_whole_night_with_the_rows_that_it_shows(
    shop: tuple[Path, str],
) -> None:
    _, told = shop
    assert "newest night: 2026-01-07, whole; published " in told
    assert "567 items, 551 of them clustered; 23,390 impressions" in " ".join(told.split())
    shown = re.findall(r"^(?:ds  |2026-01-0[567]).*$", README, re.MULTILINE)
    assert len(shown) == 4
    assert set(shown) <= set(told.splitlines())


def test_its_own_embeddings_as_vectors_make_the_same_night_once_more(
    shop: tuple[Path, str], warm_python: str
) -> None:
    folder, page = shop[0], (ROOT / "pipelines" / "docs" / "vectors.md").read_text()
    steps = next(b for b in re.findall(r"```bash\n(.*?)```", page, re.DOTALL) if "own.toml" in b)
    assert len(steps.splitlines()) == 5
    told = run(steps, folder, warm_python)
    assert "as they were" in told
    for table, key in (("item_features", "item_id"), ("user_simscores", "impression_id")):
        ours, theirs = (
            pq.read_table(folder / "features" / name / table / "ds=2026-01-07", partitioning=None)
            .sort_by(key)
            .drop_columns(["encoder_id", "codebook_id"])
            for name in ("own", "demo")
        )
        assert len(ours) > 500
        assert ours.equals(theirs)


def test_the_readmes_snippet_gives_each_impression_its_scores_with_and_without_an_id(
    shop: tuple[Path, str], warm_python: str
) -> None:
    folder, _ = shop
    (path,) = (folder / "impressions/ds=2026-01-07").glob("*.parquet")
    log = pq.read_table(path)
    as_it_is = joined(folder, "sim_mean", "cluster_id")
    assert len(as_it_is[0]) == log.num_rows
    assert None not in as_it_is[0] + as_it_is[1]
    log = pa.concat_tables([log, log.slice(0, 50)])  # equal ones: only an ID tells them apart
    ids = pa.array([f"shown-{row}" for row in range(len(log))])
    pq.write_table(log.append_column("impression_id", ids), path)
    run("courier simscore --ds 2026-01-07", folder, warm_python)
    by_id = joined(folder, "sim_mean", "cluster_id")
    pq.write_table(log, path)
    assert joined(folder, "sim_mean", "cluster_id") == by_id
    # The first fifty twice; pandas gives back what a float32 was, so they are equal as they are.
    assert by_id == [values + values[:50] for values in as_it_is]


def test_the_two_commands_that_the_readme_opens_with_are_targets_of_make() -> None:
    (opening, *_) = blocks("bash")
    targets = re.findall(r"^make (\w+)", opening, re.MULTILINE)
    assert targets == ["demo", "test"]
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    recipe = makefile[makefile.index("\ndemo:") :]
    steps = next(block for block in blocks("bash") if "courier demo" in block)
    assert {"training-rows", "train", "embed", "fit-codebook", "refresh", "status"} == {
        line.split()[1] for line in steps.splitlines() if line.startswith("courier ")
    } - {"demo"}
    for command in ("train --preset demo --until 2026-01-06", "fit-codebook --ds 2026-01-06"):
        assert f"courier {command}" in recipe
