"""A worker in other versions than its launcher's is told of, with both."""

import sys
from pathlib import Path

import pytest

import feature_jobs
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


def test_a_worker_without_the_commands_timm_is_refused_and_both_without_it_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = versions.of_process()
    monkeypatch.setitem(versions.PACKAGE_VERSIONS, "timm", "missing")
    refused = str(versions.refusal(told | {"timm": "1.0.31"}))
    assert "timm missing (the command's: 1.0.31). " in refused
    assert versions.refusal(versions.of_process()) is None


def test_builds_for_other_processors_are_the_same_version(monkeypatch: pytest.MonkeyPatch) -> None:
    told = versions.of_process()
    theirs = versions.PACKAGE_VERSIONS | {"torch": f"{told['torch']}+cu999"}
    monkeypatch.setattr(versions, "PACKAGE_VERSIONS", theirs)
    assert versions.refusal(told) is None


def test_checkouts_of_one_version_differ_by_a_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_copy(name: str, text: str) -> str:
        for package in ("courier_model", "feature_jobs", "pipelines/running"):
            (tmp_path / name / package).mkdir(parents=True)
        (tmp_path / name / "pipelines/running/making.py").write_text(text)
        with monkeypatch.context() as patch:
            patch.setattr(feature_jobs, "__file__", str(tmp_path / name / "feature_jobs/x.py"))
            versions._code.cache_clear()
            return versions.of_process()["courier's code"]

    told = {name: of_copy(name, text) for name, text in (("a", "1"), ("b", "1"), ("c", "2"))}
    versions._code.cache_clear()
    assert told["a"] == told["b"] != told["c"]
    here = versions.of_process()
    refused = str(versions.refusal(here | {"courier's code": told["a"]}))
    code = here["courier's code"]
    assert f"courier's code {code} (the command's: {told['a']}). " in refused


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
