"""The README's commands run as they stand there."""

import re
import subprocess
import sys
from pathlib import Path

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


def test_the_readmes_steps_make_a_whole_night_that_its_snippet_reads(
    tmp_path: Path, warm_python: str
) -> None:
    steps = next(block for block in blocks("bash") if "courier demo" in block)
    # One pass over one day: how long training takes is not what is tested here.
    short = "--preset demo --epochs 1 --start-ds 2026-01-04"
    out = run(steps.replace("--preset demo", short), tmp_path, warm_python)
    assert "newest night: 2026-01-07, whole; published " in out
    assert "567 items, 551 of them clustered; 23,390 impressions" in " ".join(out.split())
    (snippet,) = blocks("python")
    done = subprocess.run(
        [sys.executable, "-c", snippet], cwd=tmp_path / "shop", capture_output=True, text=True
    )
    assert "True" in done.stdout, done.stderr


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


def test_every_command_that_the_readme_names_exists() -> None:
    from pipelines.cli import cli

    named = set(re.findall(r"`?courier ([a-z-]+)", README)) - {"COMMAND"}
    assert named >= {"init", "refresh", "rollback"}
    assert named <= set(cli.commands)
