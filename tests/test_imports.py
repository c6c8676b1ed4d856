"""Tests who may import whom (DESIGN §6); imports inside functions count like any others."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("pipelines", "courier_model", "feature_jobs")
# What a folder, or a module that lies beside folders, may import of ours besides itself.
SHARED_GROUND = {
    "feature_jobs.schemas", "feature_jobs.laws", "feature_jobs.store", "feature_jobs.inputs",
    "feature_jobs.drift",
}  # fmt: skip
MODEL = {"feature_jobs.schemas", "feature_jobs.store"}
MAY_IMPORT = {
    "feature_jobs.schemas": set(),
    "feature_jobs.drift": set(),
    "feature_jobs.laws": {"feature_jobs.schemas"},
    # A part is checked when it is written.
    "feature_jobs.store": {"feature_jobs.schemas", "feature_jobs.laws"},
    "feature_jobs.inputs": {"feature_jobs.schemas", "feature_jobs.store"},
    "feature_jobs.tables": {"feature_jobs.schemas", "feature_jobs.store"},
    "feature_jobs.codebooks": SHARED_GROUND,
    # An item's cluster is found by the search that also fits centres.
    "feature_jobs.items": {*SHARED_GROUND, "feature_jobs.codebooks", "courier_model"},
    # A score is that of two items' vectors.
    "feature_jobs.impressions": {*SHARED_GROUND, "feature_jobs.items"},
    "courier_model": MODEL,
    "courier_model.training": {*MODEL, "courier_model"},
}
COMMANDS = {"pipelines.reports", "pipelines.artefacts", "pipelines.first_look", "pipelines.demo"}
HEAVY = {"torch", "torchvision", "timm", "transformers", "tensorboard", "faiss", "apache_beam"}


def modules_of(package: str) -> dict[str, Path]:
    """Returns the files of a package's modules by their dotted names."""
    files = sorted((ROOT / package).rglob("*.py"))
    names = {".".join(f.relative_to(ROOT).with_suffix("").parts): f for f in files}
    return {name.removesuffix(".__init__"): file for name, file in names.items()}


MODULES = {name: file for package in PACKAGES for name, file in modules_of(package).items()}


def room_of(module: str) -> str:
    """Returns a module's folder; itself, where it lies beside folders of jobs or commands."""
    package, *rest = module.split(".")
    if len(rest) == 2 or package == "courier_model":
        return ".".join([package, *rest[:-1]])
    return module


def imported(source: str) -> Iterator[str]:
    """Yields all that `source` imports: modules of ours by full name, others by their first."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide who is imported"
            found = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in found:
            ours = [m for m in MODULES if name == m or name.startswith(m + ".")]
            yield max(ours, key=len) if ours else name.split(".")[0]


IMPORTS = {name: set(imported(file.read_text())) for name, file in MODULES.items()}


def importers(*names: str) -> set[str]:
    """Returns the modules of ours that import one of `names`, or something below it."""
    return {
        module
        for module, found in IMPORTS.items()
        if any(f == name or f.startswith(name + ".") for f in found for name in names)
    }


def test_imports_are_found_wherever_they_stand() -> None:
    source = (
        "import os.path, torch.nn as nn\n"
        "from feature_jobs.store import files\n"
        "from feature_jobs import __version__\n"
        "from feature_jobs.schemas import Table\n"
        "def f():\n    from apache_beam.utils import shared\n    import faiss\n"
    )
    assert set(imported(source)) == {
        "os", "torch", "feature_jobs.store.files", "feature_jobs", "feature_jobs.schemas",
        "apache_beam", "faiss",
    }  # fmt: skip
    assert len(MODULES) > 20


def test_a_room_is_a_folder_or_a_module_beside_folders() -> None:
    rooms = {
        "courier_model.encoder": "courier_model",
        "courier_model.training.train": "courier_model.training",
        "feature_jobs.schemas": "feature_jobs.schemas",
        "feature_jobs.store.files": "feature_jobs.store",
        "pipelines.nightly": "pipelines.nightly",
    }
    assert {module: room_of(module) for module in rooms} == rooms
    assert set(rooms) <= set(MODULES)


def test_nothing_outside_pipelines_imports_pipelines() -> None:
    found = importers("pipelines")
    assert found
    assert all(name.split(".")[0] == "pipelines" for name in found)


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_what_it_may_and_nothing_else(room: str) -> None:
    inside = {name for name in MODULES if room_of(name) == room}
    assert inside
    found = {
        room_of(name)
        for module in inside
        for name in IMPORTS[module]
        if name.split(".")[0] in PACKAGES and name not in PACKAGES
    }
    assert found - {room} <= MAY_IMPORT[room]


def test_every_room_outside_pipelines_has_its_rule() -> None:
    rooms = {room_of(name) for name in MODULES if name.split(".")[0] != "pipelines"}
    assert rooms - {"feature_jobs"} == set(MAY_IMPORT)


@pytest.mark.parametrize("room", ["pipelines.planning", "pipelines.running"])
def test_plans_and_runs_know_no_command(room: str) -> None:
    inside = {name for name in MODULES if room_of(name) == room}
    assert inside
    found = {room_of(name) for module in inside for name in IMPORTS[module]}
    assert not found & COMMANDS
    assert {room_of(name) for name in MODULES} >= COMMANDS


def test_running_knows_no_plan() -> None:
    found = importers("pipelines.planning")
    assert found
    assert not {name for name in found if room_of(name) == "pipelines.running"}


def test_no_module_imports_itself_through_others() -> None:
    left = {name: found & set(MODULES) - {name} for name, found in IMPORTS.items()}
    while ends := {name for name, found in left.items() if not found}:
        left = {name: found - ends for name, found in left.items() if name not in ends}
    assert not left, f"a circle among {sorted(left)}"


def rooms_that_import(*names: str) -> set[str]:
    return {room_of(module) for module in importers(*names)}


def test_faiss_is_imported_where_centres_are_fitted_only() -> None:
    assert importers("faiss") == {"feature_jobs.codebooks.kmeans"}


def test_torch_is_imported_by_the_model_and_the_search_for_centres_only() -> None:
    assert rooms_that_import("torch", "torchvision") == {
        "courier_model", "courier_model.training", "feature_jobs.codebooks",
    }  # fmt: skip


def test_beam_is_imported_by_jobs_and_who_runs_them_only() -> None:
    assert rooms_that_import("apache_beam") == {
        "feature_jobs.store", "feature_jobs.items", "feature_jobs.codebooks",
        "feature_jobs.impressions", "pipelines.running",
    }  # fmt: skip


def test_google_is_known_to_the_store_only() -> None:
    assert rooms_that_import("google") == {"feature_jobs.store"}


def test_the_command_line_is_known_to_the_cli_only() -> None:
    assert importers("click") == {"pipelines.cli", "pipelines.options"}


def test_top_level_folders_are_the_three_packages_and_their_tests() -> None:
    made = ("demo", "demo.partial-*", "build", "dist", "*.egg-info", "__pycache__")
    found = {
        path.name
        for path in ROOT.iterdir()
        if path.is_dir() and path.name[0] != "." and not any(fnmatch(path.name, m) for m in made)
    }
    assert found == {*PACKAGES, "tests"}


def test_every_package_has_a_folder_of_tests() -> None:
    found = {path.name for path in (ROOT / "tests").iterdir() if (path / "__init__.py").exists()}
    assert set(PACKAGES) <= found


HELP = """
import contextlib, io, sys
from pipelines import cli
for args in [["--help"], *([name, "--help"] for name in cli.cli.commands)]:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert cli.main(args) == 0
    assert out.getvalue().startswith("Usage: courier")
"""


def loaded_by(source: str) -> set[str]:
    """Returns what a new process that runs `source` has imported, by first names."""
    source += "\nprint(*{name.split('.')[0] for name in __import__('sys').modules})"
    command = [sys.executable, "-c", source]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_help_of_every_command_loads_nothing_heavy() -> None:
    loaded = loaded_by(HELP)
    assert {"pipelines", "click"} <= loaded
    assert not loaded & HEAVY
    assert loaded_by("import pipelines.running.beam_options") & HEAVY == {
        "apache_beam"
    }  # it would show


def test_reading_a_night_loads_nothing_heavy_and_no_pipeline() -> None:
    loaded = loaded_by("import feature_jobs.tables")
    assert "pyarrow" in loaded
    assert not loaded & {*HEAVY, "pipelines", "click", "courier_model"}


def test_planning_and_running_a_night_loads_torch_only_where_it_embeds_or_assigns() -> None:
    loaded = loaded_by(
        "import pipelines.nightly, pipelines.reports.audit, feature_jobs.impressions.simscore"
    )
    assert "apache_beam" in loaded
    assert not loaded & {"torch", "torchvision", "faiss"}
