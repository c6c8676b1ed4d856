"""What is declared, pinned and built agrees with itself and with what the code imports."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.test_imports import IMPORTS, PACKAGES, importers, loaded_by

ROOT = Path(__file__).parents[1]
NAMES = {
    "PIL": "pillow", "apache_beam": "apache-beam", "faiss": "faiss-gpu",
    "google": "google-cloud-storage",
}  # fmt: skip


def read(name: str) -> str:
    return (ROOT / name).read_text()


def keywords_of_setup() -> dict[str, ast.expr]:
    calls = [node for node in ast.walk(ast.parse(read("setup.py"))) if isinstance(node, ast.Call)]
    (call,) = (c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "setup")
    return {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}


SETUP = keywords_of_setup()
NEEDED = [Requirement(text) for text in ast.literal_eval(SETUP["install_requires"])]
EXTRAS = {
    extra: [Requirement(text) for text in texts]
    for extra, texts in ast.literal_eval(SETUP["extras_require"]).items()
}
DEV, CLIP, TIMM = EXTRAS["dev"], EXTRAS["clip"], EXTRAS["timm"]
PIN_LINES = [
    line for line in read("requirements.txt").splitlines() if line and not line.startswith("#")
]
PINS = {canonicalize_name(Requirement(line).name): Requirement(line) for line in PIN_LINES}


def pinned(name: str) -> Version:
    (specifier,) = PINS[canonicalize_name(name)].specifier
    return Version(specifier.version)


# ---- requirements.txt ------------------------------------------------------------------------


def test_every_line_of_the_requirements_is_one_exact_pin_from_the_index() -> None:
    assert len(PIN_LINES) > 100
    assert len(PINS) == len(PIN_LINES)
    for name, pin in PINS.items():
        assert re.fullmatch(r"==[\w.!+]+", str(pin.specifier)), name
        assert pin.url is None, name


@pytest.mark.parametrize(
    "needed", [*NEEDED, *CLIP, *TIMM], ids=lambda requirement: requirement.name
)
def test_a_pin_satisfies_what_setup_asks_for(needed: Requirement) -> None:
    assert pinned(needed.name) in needed.specifier
    assert {s.operator for s in needed.specifier} == {">=", "<"}  # both ends are stated


@pytest.mark.parametrize("tool", DEV, ids=lambda requirement: requirement.name)
def test_the_tools_of_the_checks_are_pinned(tool: Requirement) -> None:
    assert pinned(tool.name) in tool.specifier


def test_a_package_is_pinned_for_the_platforms_that_setup_names() -> None:
    for platform in ("linux", "darwin"):
        there = {"sys_platform": platform, "platform_system": platform.title()}
        for needed in NEEDED:
            wanted = needed.marker is None or needed.marker.evaluate(there)
            marker = PINS[canonicalize_name(needed.name)].marker
            assert (marker is None or marker.evaluate(there)) == wanted, (needed.name, platform)


def test_beams_torch_extra_is_not_asked_for() -> None:
    # It caps torch below our pin.
    (beam,) = (needed for needed in NEEDED if needed.name == "apache-beam")
    assert beam.extras == {"gcp"}
    assert "apache-beam[" not in read("requirements.txt")


def test_every_package_that_the_code_imports_is_declared() -> None:
    known = {*sys.stdlib_module_names, *PACKAGES}
    found = {name.split(".")[0] for names in IMPORTS.values() for name in names} - known
    assert {"pyarrow", "torch", "click"} <= found
    declared = {canonicalize_name(needed.name) for needed in (*NEEDED, *CLIP, *TIMM)}
    assert {canonicalize_name(NAMES.get(name, name)) for name in found} <= declared


def test_what_is_optional_is_imported_where_it_is_asked_for_and_tested() -> None:
    assert importers("transformers") == {"courier_model.training.titles"}
    assert importers("timm", "huggingface_hub") == {"courier_model.backbones"}
    loaded = loaded_by("import courier_model.training.titles, courier_model.encoder")
    assert "torch" in loaded
    assert not loaded & {"transformers", "timm", "huggingface_hub"}
    assert {needed.name for needed in CLIP} == {"transformers"}
    assert {needed.name for needed in TIMM} == {"huggingface-hub", "timm"}
    assert {"transformers", "timm"} <= {tool.name for tool in DEV}


def test_what_lies_beside_the_code_is_in_the_distribution() -> None:
    (patterns,) = ast.literal_eval(SETUP["package_data"]).values()
    taken = {path for pattern in patterns for path in (ROOT / "pipelines").glob(pattern)}
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.*")]
    assert {path for path in files if path.suffix not in (".py", ".pyc")} == taken
    assert {path.suffix for path in taken} == {".md", ".toml", ".yaml"}


# ---- The image -------------------------------------------------------------------------------


def test_the_image_has_the_beam_of_the_pins_and_a_python_that_setup_takes() -> None:
    arguments = dict(re.findall(r"^ARG (\w+)=(\S+)$", read("Dockerfile"), re.MULTILINE))
    assert Version(arguments["BEAM_VERSION"]) == pinned("apache-beam")
    python = Requirement("python" + ast.literal_eval(SETUP["python_requires"]))
    assert Version(arguments["PYTHON_VERSION"]) in python.specifier


def test_the_image_is_built_from_the_packages_and_nothing_private() -> None:
    lines = read(".dockerignore").splitlines()
    assert lines[1] == "*"  # below the comment: nothing, but for what follows
    allowed = {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert set(PACKAGES) | {"requirements.txt", "setup.py", "pyproject.toml"} <= allowed
    assert not allowed & {"tests", ".git", "."}
    assert all((ROOT / name).exists() for name in allowed)


# ---- Commands --------------------------------------------------------------------------------


def dry_run(target: str) -> str:
    """Returns what `make target` would do."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(
        ["make", "-n", target], cwd=ROOT, env=outside, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("target", "commands"),
    [
        ("demo", ["courier demo", "courier train", "courier refresh", "courier status"]),
        ("test", ["python -m pytest"]),
        ("check", ["ruff format --check .", "ruff check .", "mypy", "python -m pytest"]),
        ("test-frameworks", ["fuxictr==", "python -m pytest -q -m frameworks"]),
        ("readers", ["java -version", "python -m pytest -q -m readers"]),
        ("test-clusters", ["support.cluster_packages", "python -m pytest -q -m clusters"]),
        ("flink", ["standing_clusters flink start"]),
        ("spark", ["standing_clusters spark start"]),
        ("prism", ["standing_clusters prism"]),
        ("docs", ["python -m tests.support.settings_page"]),
        ("bench", ["tests/benchmarks" if any(ROOT.glob("tests/benchmarks/*.py")) else "for b in"]),
    ],
)
def test_make_does_what_its_help_says(target: str, commands: list[str]) -> None:
    found = dry_run(target)
    for command in commands:
        assert command in found
    assert f"@echo 'make {target} " in read("Makefile")


def test_ci_runs_what_make_check_runs() -> None:
    assert os.access(ROOT / ".ci/run", os.X_OK)
    found = re.findall(r"\bmake ([\w-]+)(?= <)", read(".ci/run"))
    assert found == ["check", "test-frameworks", "readers", "test-clusters"]


def test_make_readers_says_what_it_lacks_without_java() -> None:
    make, env = shutil.which("make"), {"PATH": "nowhere"}
    done = subprocess.run([make, "java"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert "needs Java 17 or later" in done.stderr


# ---- Nothing of the machine it was written on ----------------------------------------------


PRIVATE = re.compile(
    r"/(?:work|tmp|Users)/|/root\b|/home/(?!courier\b)"  # folders of one machine
    r"|\blocalhost:(?!50000\b)\d"  # and its network; of pods, a pool of Beam's workers is there
    r"|\b127\.0\.0\.1\b|\b192\.168\.|://\d"
    r"|-index-url|--find-links|trusted-host"
)


def shipped_files() -> list[Path]:
    own = [p for p in ROOT.iterdir() if p.is_file() and p.name not in ("LICENSE", ".git")]
    inside = [p for package in PACKAGES for p in (ROOT / package).rglob("*") if p.is_file()]
    ci = [p for p in (ROOT / ".ci").iterdir() if p.is_file()]
    return [p for p in (*own, *inside, *ci) if p.suffix != ".pyc"]


def test_no_file_names_a_folder_or_host_of_one_machine() -> None:
    assert PRIVATE.search("see /home/me/data")
    assert not PRIVATE.search("WORKDIR /home/courier")
    assert len(shipped_files()) > 30
    for path in shipped_files():
        found = PRIVATE.search(path.read_text(encoding="utf-8"))
        assert not found, f"{path.relative_to(ROOT)}: {found.group() if found else ''}"
