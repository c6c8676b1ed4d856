"""Beam gets exactly the options that were asked for, or the command stops."""

from collections.abc import Sequence
from pathlib import Path

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import (
    DebugOptions,
    GoogleCloudOptions,
    PortableOptions,
    StandardOptions,
    WorkerOptions,
)
from apache_beam.runners.portability.fn_api_runner import FnApiRunner

from feature_jobs.schemas import OperatorError
from feature_jobs.store.threads import Share
from pipelines.running import runners
from pipelines.running.beam_options import (
    JobOptions,
    check_flags,
    check_ready,
    flags,
    pipeline_options,
    processes_per_host,
    run_pipeline,
)

SETTINGS = {
    "runner": "DataflowRunner",
    "num_workers": 10,
    "experiments": ["a=1", "b"],
    "no_use_public_ips": True,
    "embed": {"num_workers": 2, "machine_type": "g2"},
    "simscore": {"no_use_public_ips": False, "disk_size_gb": 500},
}


def refusal(given: Sequence[str]) -> str:
    with pytest.raises(OperatorError) as refused:
        check_flags(given, "FnApiRunner")
    assert refused.value.exit_status == 2
    message = str(refused.value)
    assert "\n" not in message
    return message


# ---- Settings as flags -------------------------------------------------------------------------


def test_a_setting_becomes_a_flag_and_a_list_one_for_each_value() -> None:
    assert flags(SETTINGS, "histories") == [
        "--runner=DataflowRunner",
        "--num_workers=10",
        "--experiments=a=1",
        "--experiments=b",
        "--no_use_public_ips",
    ]


def test_settings_of_a_stage_win_there_and_nowhere_else() -> None:
    assert {"--num_workers=2", "--machine_type=g2"} <= set(flags(SETTINGS, "embed"))
    assert "--num_workers=10" not in flags(SETTINGS, "embed")
    assert "--num_workers=10" in flags(SETTINGS, "simscore")
    assert "--machine_type=g2" not in flags(SETTINGS, "simscore")


def test_a_switch_can_be_turned_off_for_a_stage() -> None:
    assert "--no_use_public_ips" in flags(SETTINGS, "embed")
    assert not [flag for flag in flags(SETTINGS, "simscore") if "public_ips" in flag]
    assert "--streaming" not in flags(SETTINGS, "embed")


def test_no_settings_are_no_flags() -> None:
    assert flags({}, "embed") == []
    assert flags({"embed": {"num_workers": 2}}, "simscore") == []


# ---- What is refused -------------------------------------------------------------------------


def test_a_misspelt_option_is_refused_with_the_nearest_one() -> None:
    message = refusal(["--num_worker=3"])
    assert "'--num_worker=3'" in message
    assert "Did you mean --num_workers?" in message


@pytest.mark.parametrize("given", [["--zzzzzz"], ["--num_workers=3", "stray"], ["-x"]])
def test_an_option_like_no_other_is_refused(given: list[str]) -> None:
    message = refusal(given)
    assert repr(given[-1]) in message
    assert "Did you mean" not in message


@pytest.mark.parametrize(
    "given", ["--num_workers", "--num_workers=many", "--streaming=yes", "--flink_version=0.1"]
)
def test_an_option_without_its_value_or_with_a_wrong_one_is_refused(given: str) -> None:
    assert given in refusal([given])


@pytest.mark.parametrize(
    "given",
    [
        ["--num_workers=3"], ["--num_workers", "3"], ["--streaming"], ["--runner=FlinkRunner"],
        ["--experiments=a", "--experiments=b"], ["--sdk_container_image=i"], ["--temp_location=t"],
        ["--flink_master=localhost:8081"], ["--spark_master_url=local[2]"], [],
    ],
)  # fmt: skip
def test_beams_own_options_are_taken(given: list[str]) -> None:
    assert check_flags(given, "FnApiRunner") is None


def test_an_unknown_option_is_refused_wherever_it_stands() -> None:
    for settings, given in (
        ({"num_worker": 3}, []),
        ({"embed": {"num_worker": 3}}, []),
        ({}, ["--num_worker=3"]),
    ):
        with pytest.raises(OperatorError, match="--num_workers"):
            pipeline_options(settings, "embed", given)
    assert pipeline_options({"simscore": {"num_worker": 3}}, "embed", [])  # not this stage's


# ---- What Beam gets --------------------------------------------------------------------------


def test_the_command_line_wins_over_the_stage_and_the_stage_over_the_rest() -> None:
    def workers(stage: str, *given: str) -> int:
        return pipeline_options(SETTINGS, stage, given).view_as(WorkerOptions).num_workers

    assert workers("histories") == 10
    assert workers("embed") == 2
    assert workers("embed", "--num_workers=7") == 7
    assert workers("embed", "--num_workers", "7") == 7


def test_beam_reads_every_kind_of_value() -> None:
    options = pipeline_options(SETTINGS | {"project": "shop"}, "simscore", ["--experiments=c"])
    assert options.view_as(StandardOptions).runner == "DataflowRunner"
    assert options.view_as(GoogleCloudOptions).project == "shop"
    assert options.view_as(WorkerOptions).disk_size_gb == 500
    assert options.view_as(DebugOptions).experiments == ["a=1", "b", "c"]
    assert pipeline_options(SETTINGS, "embed", []).view_as(WorkerOptions).use_public_ips is False


def test_a_false_that_would_do_nothing_is_refused() -> None:
    for settings in ({"use_public_ips": False}, {"embed": {"streaming": False}}):
        with pytest.raises(OperatorError, match="false would do nothing"):
            flags(settings, "embed")


def test_the_default_runner_is_the_local_one_by_name() -> None:
    options = pipeline_options({}, "embed", [])
    assert options.view_as(StandardOptions).runner == "FnApiRunner"
    assert isinstance(beam.Pipeline(options=options).runner, FnApiRunner)


@pytest.mark.parametrize(
    ("given", "millis"),
    [
        ([], 0),
        (["--runner=prism"], 0),
        (["--runner=flink"], 10_000),
        (["--runner=spark"], 10_000),
        (["--runner=portable"], 10_000),
        (["--runner=flink", "--environment_cache_millis=7"], 7),
    ],
)
def test_workers_of_a_cluster_outlast_a_step(given: list[str], millis: int) -> None:
    options = pipeline_options({}, "embed", given).view_as(PortableOptions)
    assert int(options.environment_cache_millis) == millis


# ---- How many share a host -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "processes"),
    [
        ([], 1),
        (["--direct_num_workers=3"], 1),  # threads of one process
        (["--direct_num_workers=3", "--direct_running_mode=multi_threading"], 1),
        (["--direct_num_workers=3", "--direct_running_mode=multi_processing"], 3),
        (["--direct_num_workers=0", "--direct_running_mode=multi_processing"], None),
        (["--runner=DataflowRunner"], None),
        (["--runner=dataflow", "--experiments=use_runner_v2"], None),
        (["--runner=DataflowRunner", "--experiments=a,no_use_multiple_sdk_containers"], 1),
        (["--runner=FlinkRunner"], 1),
        (["--runner=apache_beam.runners.portability.flink_runner.FlinkRunner"], 1),
        (["--runner=FlinkRunner", "--sdk_worker_parallelism=4"], 4),
        (["--runner=SparkRunner", "--sdk_worker_parallelism=0"], None),
        (["--runner=PortableRunner", "--sdk_worker_parallelism=4"], 4),
        (
            ["--runner=PortableRunner", "--sdk_worker_parallelism=4",
             "--environment_type=LOOPBACK"], 1,
        ),
    ],
)  # fmt: skip
def test_beams_options_tell_how_many_processes_share_a_host(
    given: list[str], processes: int | None
) -> None:
    assert processes_per_host(pipeline_options({}, "embed", given)) == processes


def test_a_number_of_processes_that_is_none_is_refused() -> None:
    options = pipeline_options({}, "embed", ["--runner=Flink", "--sdk_worker_parallelism=many"])
    with pytest.raises(OperatorError, match="sdk_worker_parallelism=many is no number"):
        processes_per_host(options)


# ---- Running ---------------------------------------------------------------------------------


class WriteNumber(beam.DoFn):
    def __init__(self, folder: Path):
        self._folder = folder

    def process(self, number: int) -> None:
        if number < 0:
            raise ValueError(f"{number} is negative")
        (self._folder / str(number)).write_text(str(number * number))


def square(numbers: Sequence[int], folder: Path) -> None:
    def define(root: beam.Pipeline) -> None:
        _ = root | beam.Create(numbers) | beam.Reshuffle() | beam.ParDo(WriteNumber(folder))

    run_pipeline(define, pipeline_options({}, "embed", []))


def test_a_pipeline_has_run_to_its_end_on_return(tmp_path: Path) -> None:
    square([1, 2, 3], tmp_path)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"1": "1", "2": "4", "3": "9"}


def test_the_failure_of_a_worker_is_raised(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="-1 is negative"):
        square([-1], tmp_path)


def test_stages_of_the_same_options_are_looked_at_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(runners, "check_ready", asked.append)
    some, others = pipeline_options({}, "embed", []), pipeline_options({}, "embed", ["--streaming"])
    same = [JobOptions(some, (), Share()) for _ in range(3)]
    check_ready([*same, JobOptions(others, ("--streaming",), Share())])
    assert asked == [some, others]
