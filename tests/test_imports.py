"""Who may import whom (DESIGN §6). Imports inside functions count like any others."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("pipelines", "courier_model", "feature_jobs")
# What jobs share. Every other module of feature_jobs is a job.
SHARED_GROUND = {
    "schemas", "tables", "storage", "gcs", "gcs_client", "pieces", "hashing", "inputs", "clicks",
    "histories", "lists", "codebook", "nearest", "broadcast",
}  # fmt: skip
# A job's own second half, which no other may know.
HALVES = {
    "feature_jobs.embed_plan": "feature_jobs.embed",
    "feature_jobs.item_vectors": "feature_jobs.simscore",
    "feature_jobs.kmeans": "feature_jobs.fit_codebook",
}
HEAVY = {"torch", "torchvision", "transformers", "tensorboard", "faiss", "apache_beam"}


def modules_of(package: str) -> dict[str, Path]:
    """Dotted name → file, of the package's modules."""
    files = sorted((ROOT / package).rglob("*.py"))
    names = {".".join(f.relative_to(ROOT).with_suffix("").parts): f for f in files}
    return {name.removesuffix(".__init__"): file for name, file in names.items()}


MODULES = {name: file for package in PACKAGES for name, file in modules_of(package).items()}
JOBS = {name for name in modules_of("feature_jobs") if "." in name} - {
    f"feature_jobs.{name}" for name in SHARED_GROUND
}


def imported(source: str) -> Iterator[str]:
    """Everything that `source` imports: modules of ours by full name, others by their first."""
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
    """The modules of ours that import one of `names`, or something below it."""
    return {
        module
        for module, found in IMPORTS.items()
        if any(f == name or f.startswith(name + ".") for f in found for name in names)
    }


def test_imports_are_found_wherever_they_stand() -> None:
    source = (
        "import os.path, torch.nn as nn\n"
        "from feature_jobs import storage, __version__\n"
        "from feature_jobs.schemas import Table\n"
        "def f():\n    from apache_beam.utils import shared\n    import faiss\n"
    )
    assert set(imported(source)) == {
        "os", "torch", "feature_jobs.storage", "feature_jobs", "feature_jobs.schemas",
        "apache_beam", "faiss",
    }  # fmt: skip
    assert len(MODULES) > 20
    assert len(JOBS) >= 4
    for name in SHARED_GROUND:
        assert f"feature_jobs.{name}" in MODULES


def test_nothing_outside_pipelines_imports_pipelines() -> None:
    found = importers("pipelines")
    assert found
    assert all(name.split(".")[0] == "pipelines" for name in found)


def test_the_model_takes_of_feature_jobs_only_schemas_tables_and_storage() -> None:
    found = {
        name
        for module in modules_of("courier_model")
        for name in IMPORTS[module]
        if name.split(".")[0] == "feature_jobs"
    }
    assert found
    assert found <= {f"feature_jobs.{name}" for name in ("schemas", "tables", "storage")}


def test_jobs_meet_in_tables_and_not_by_importing_each_other() -> None:
    for module in modules_of("feature_jobs"):
        own = {half for half, job in HALVES.items() if job == module}
        assert not (IMPORTS[module] & JOBS) - own, module


def test_what_jobs_share_knows_no_model() -> None:
    shared = {f"feature_jobs.{name}" for name in SHARED_GROUND}
    embed = {"feature_jobs.embed", "feature_jobs.embed_plan"}
    assert importers("courier_model") & set(modules_of("feature_jobs")) == embed
    assert not importers("courier_model") & shared


def test_faiss_is_imported_where_centres_are_fitted_only() -> None:
    found = importers("faiss")
    assert found == {"feature_jobs.kmeans"}


def test_torch_is_imported_by_the_model_and_the_search_for_centres_only() -> None:
    found = importers("torch", "torchvision")
    centres = {"feature_jobs.nearest", "feature_jobs.kmeans"}
    assert centres < found
    others = found - centres
    assert {name.split(".")[0] for name in others} == {"courier_model"}


def test_beam_is_imported_by_jobs_histories_and_who_runs_them() -> None:
    found = importers("apache_beam")
    assert "feature_jobs.embed" in found
    assert found <= JOBS | {
        "feature_jobs.histories",
        "feature_jobs.nearest",
        "pipelines.beam_options",
    }


def test_google_is_known_to_the_storage_only() -> None:
    assert importers("google") == {
        f"feature_jobs.{name}" for name in ("gcs", "gcs_client", "storage")
    }


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
    """What a new process that runs `source` has imported, by first names."""
    source += "\nprint(*{name.split('.')[0] for name in __import__('sys').modules})"
    command = [sys.executable, "-c", source]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_help_of_every_command_loads_nothing_heavy() -> None:
    loaded = loaded_by(HELP)
    assert {"pipelines", "click"} <= loaded
    assert not loaded & HEAVY
    assert loaded_by("import pipelines.beam_options") & HEAVY == {"apache_beam"}  # it would show


def test_planning_and_running_a_night_loads_torch_only_where_it_embeds_or_assigns() -> None:
    loaded = loaded_by("import pipelines.nightly, pipelines.audit, feature_jobs.simscore")
    assert "apache_beam" in loaded
    assert not loaded & {"torch", "torchvision", "faiss"}
