"""A worker in other versions than its launcher's is told of, with both."""

import sys

import pytest

from feature_jobs import __version__
from feature_jobs.schemas import OperatorError
from feature_jobs.store import versions


def test_versions_are_those_of_python_the_project_and_its_packages() -> None:
    told = versions.of_process()
    assert told["python"] == ".".join(map(str, sys.version_info[:2]))
    assert told["courier"] == __version__
    assert told.keys() >= {"apache-beam", "numpy", "pillow", "pyarrow", "torch"}
    assert all(told.values())


def test_the_same_versions_are_not_refused() -> None:
    assert versions.refusal(versions.of_process()) is None


def test_builds_for_other_processors_are_the_same_version(monkeypatch: pytest.MonkeyPatch) -> None:
    told = versions.of_process()
    theirs = versions.PACKAGE_VERSIONS | {"torch": f"{told['torch']}+cu999"}
    monkeypatch.setattr(versions, "PACKAGE_VERSIONS", theirs)
    assert versions.refusal(told) is None


def test_all_that_differ_are_told_with_both_versions() -> None:
    told = versions.of_process()
    pyarrow, python = told.pop("pyarrow"), told["python"]
    refused = versions.refusal(told | {"torch": "1.0", "python": "2.7", "dill": "0.4"})
    assert type(refused) is OperatorError
    assert (
        f"dill None (the command's: 0.4), pyarrow {pyarrow} (the command's: None), "
        f"python {python} (the command's: 2.7), torch {versions.of_process()['torch']} (the "
        "command's: 1.0). " in str(refused)
    )
    assert "\n" not in str(refused)
