"""Each module has a file of tests at its place, or a reason to have none."""

import re
from pathlib import Path

from tests.test_imports import MODULES, PACKAGES, ROOT

TESTS = {file for package in PACKAGES for file in (ROOT / "tests" / package).rglob("*.py")}
# What the named tests state already; a file of their own would repeat it. Whole nights are tested
# in files directly below tests/pipelines.
WITHOUT_A_FILE = {
    "courier_model/training/progress.py": "test_train and test_train_resume go by its steps",
    "courier_model/training/settings.py": "test_train_refusals gives what it refuses",
    "feature_jobs/impressions/clicks.py": "test_histories compares its arrays with plain loops",
    "feature_jobs/schemas.py": "it declares tables; test_partitions writes them and is refused",
    "feature_jobs/store/every_shard.py": "no shard of test_simscore_worlds is without it",
    "feature_jobs/store/faults.py": "test_files has an ill disk, test_gcs a flaky bucket",
    "feature_jobs/store/gcs_client.py": "test_gcs reaches its bucket through it",
    "feature_jobs/store/local.py": "test_files and test_files_laws test it behind `files`",
    "feature_jobs/store/protocol.py": "it declares; test_files_laws asks each store for it",
    "pipelines/artefacts/stanzas.py": "commands print them: test_encoders, test_codebooks",
    "pipelines/demo/garments.py": "test_shop draws them",
    "pipelines/demo/photographs.py": "test_shop makes shops of them",
    "pipelines/first_look/tables.py": "test_look and test_settings look through it",
    "pipelines/nightly.py": "whole nights: test_nights, test_refresh",
    "pipelines/options.py": "test_cli gives them",
    "pipelines/planning/day_plan.py": "whole nights: test_nights, test_refresh",
    "pipelines/planning/impressions.py": "whole nights: test_history_nights, test_training_rows",
    "pipelines/planning/items.py": "whole nights: test_embed_nights, test_full_runs",
    "pipelines/planning/joins.py": "whole training sets: test_join",
    "pipelines/planning/made_with.py": "test_training_inputs, test_history_nights are refused",
    "pipelines/planning/pinned.py": "whole nights: test_refusals",
    "pipelines/planning/shop_tables.py": "whole nights: test_refusals, test_training_rows",
    "pipelines/planning/yesterday.py": "whole nights: test_history_nights",
    "pipelines/running/layout.py": "test_locks orders its locks, test_nights look below its roots",
    "pipelines/running/records.py": "test_publishing reads its nights, test_rollback its holds",
    "pipelines/training_sets.py": "test_join makes sets by it",
    "pipelines/stages.py": "it declares; test_reasons and test_ranges make all kinds",
    "pipelines/running/stage.py": "whole nights: test_refresh; test_making and test_progress",
}


def place(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


FILES = {place(file): file for file in MODULES.values() if file.name != "__init__.py"}


def module_of(test: Path) -> str | None:
    """Returns the module that a file of tests is about.

    Of those at its place whose names the file's begins with, that is the one with the longest:
    test_embed_plan is about embed_plan.
    """
    folder = ROOT / test.parent.relative_to(ROOT / "tests")
    words = test.stem.removeprefix("test_")
    names = [f.stem for f in FILES.values() if f.parent == folder]
    found = [name for name in names if f"{words}_".startswith(f"{name}_")]
    return place(folder / max(found, key=len)) + ".py" if found else None


TESTED = {module_of(test) for test in TESTS if test.name.startswith("test_")}


def test_a_file_of_tests_is_about_the_module_with_the_longest_name() -> None:
    jobs = ROOT / "tests/feature_jobs/items"
    assert module_of(jobs / "test_embed_plan.py") == "feature_jobs/items/embed_plan.py"
    assert module_of(jobs / "test_embed_planner.py") == "feature_jobs/items/embed.py"
    assert module_of(jobs / "test_embed.py") == "feature_jobs/items/embed.py"
    assert module_of(jobs / "test_other.py") is None
    assert len(FILES) > 50


def test_every_module_has_a_file_of_tests_or_stands_in_the_list_with_a_reason() -> None:
    assert set(FILES) - TESTED - set(WITHOUT_A_FILE) == set()  # those that lack both
    assert TESTED & set(WITHOUT_A_FILE) == set()  # those that have a file by now
    assert set(WITHOUT_A_FILE) - set(FILES) == set()  # those that are no module


def test_a_reason_names_tests_that_are_there() -> None:
    known = {test.stem for test in TESTS}
    for module, reason in WITHOUT_A_FILE.items():
        named = set(re.findall(r"\btest_\w+", reason))
        assert named, module
        assert named <= known, module


def test_folders_of_tests_are_those_of_the_packages() -> None:
    folders = {file.parent for file in TESTS}
    assert len(folders) > 10
    packages = {file.parent for file in MODULES.values()}
    assert {folder.relative_to(ROOT / "tests") for folder in folders} <= {
        folder.relative_to(ROOT) for folder in packages
    }
