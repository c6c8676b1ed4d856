"""A stage runs on a runner that makes the same tables, and that has what it needs, or not at all.

No test reaches a network: what Beam would fetch, and where Google's credentials are, is told.
"""

from pathlib import Path
from typing import Any

import google.auth
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.job_server import JavaJarJobServer
from apache_beam.runners.portability.prism_runner import PrismJobServer
from google.auth.credentials import AnonymousCredentials
from google.auth.exceptions import DefaultCredentialsError

from feature_jobs.schemas import OperatorError
from pipelines.running import runners
from pipelines.running.beam_options import pipeline_options
from tests.support.commands import Capture, paragraph, published, refresh
from tests.support.world import DAYS, World

DATAFLOW = ["--runner=dataflow", "--project=shop", "--region=europe-west4"]
PLACE = "--temp_location=gs://shop-beam/temp"
JAR = "--output_executable_path=/shop/embed.jar"


def ready(*given: str) -> PipelineOptions:
    options = pipeline_options({}, "embed", given)
    runners.check_ready(options)
    return options


def refusal(*given: str) -> str:
    with pytest.raises(OperatorError) as refused:
        ready(*given)
    assert refused.value.exit_status == 2
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.fixture(autouse=True)
def away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps all that Beam would fetch away, and has no credentials."""

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("Unable to fetch it:\n no network")

    def no_credentials(**_: Any) -> None:
        raise DefaultCredentialsError("Your default credentials were not found.")

    monkeypatch.setattr(JavaJarJobServer, "local_jar", staticmethod(fails))
    monkeypatch.setattr(PrismJobServer, "_download_to_local_path", fails)
    monkeypatch.setattr(google.auth, "default", no_credentials)


# ---- Which runners --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "runner"),
    [
        ("FnApiRunner", "FnApiRunner"), ("fnapi", "FnApiRunner"), ("DirectRunner", "FnApiRunner"),
        ("direct", "FnApiRunner"), ("directrunner", "FnApiRunner"),
        ("SwitchingDirectRunner", "FnApiRunner"), ("BundleBasedDirectRunner", "FnApiRunner"),
        ("apache_beam.runners.direct.direct_runner.DirectRunner", "FnApiRunner"),
        ("apache_beam.runners.DirectRunner", "FnApiRunner"),
        ("portable", "PortableRunner"), ("Flink", "FlinkRunner"), ("SPARKRUNNER", "SparkRunner"),
        ("apache_beam.runners.portability.spark_runner.SparkRunner", "SparkRunner"),
        ("prism", "PrismRunner"), ("dataflow", "DataflowRunner"),
    ],
)  # fmt: skip
def test_a_runner_may_be_spelt_in_any_of_beams_ways(given: str, runner: str) -> None:
    assert runners.named(given) == runner


@pytest.mark.parametrize(
    "given",
    [
        "NoSuchRunner", "DaskRunner", "apache_beam.runners.dask.dask_runner.DaskRunner",
        "InteractiveRunner", "interactive", "SamzaRunner", "RayRunner", "KafkaStreamsRunner",
        "TestDataflowRunner", "TestDirectRunner", "shop.runners.FlinkRunner", "runner",
    ],
)  # fmt: skip
def test_any_other_runner_is_refused_with_the_reason_and_the_ones_to_take(given: str) -> None:
    message = refusal(f"--runner={given}")
    assert repr(given) in message
    assert "DaskRunner, which drops tagged outputs" in message
    assert all(runner in message for runner in runners.SUPPORTED)


def test_a_misspelt_runner_is_refused_with_the_nearest_one() -> None:
    assert "Did you mean FlinkRunner?" in refusal("--runner=Flnk")
    assert "Did you mean" not in refusal("--runner=Interactive")


# ---- What a runner needs ---------------------------------------------------------------------


def test_the_local_runner_needs_nothing() -> None:
    assert ready()
    assert ready("--runner=direct")


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        (["--runner=dataflow"], ["--project", "--region", "--temp_location"]),
        (DATAFLOW[:2], ["--region", "--temp_location"]),
        (DATAFLOW, ["--temp_location"]),
        ([DATAFLOW[0], DATAFLOW[2], PLACE], ["--project"]),
    ],
)
def test_dataflow_is_refused_what_it_is_not_told(given: list[str], missing: list[str]) -> None:
    assert f"it is not told {' and '.join(missing)}." in refusal(*given)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--project=My Shop", *DATAFLOW[2:], PLACE], "Invalid Project ID (My Shop)"),
        ([*DATAFLOW[1:], "--temp_location=/tmp/beam"], "Invalid GCS path (/tmp/beam)"),
    ],
)
def test_dataflow_is_refused_what_it_could_not_use(given: list[str], told: str) -> None:
    assert told in refusal(DATAFLOW[0], *given)


@pytest.mark.parametrize("place", [PLACE, "--staging_location=gs://shop-beam/staging"])
def test_dataflow_without_credentials_is_refused_at_once(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = refusal(*DATAFLOW, place)
    assert "DataflowRunner needs Google's application default credentials, but " in message
    assert "gcloud auth application-default login" in message
    assert ready(*DATAFLOW, place, "--no_auth")
    monkeypatch.setattr(google.auth, "default", lambda **_: (AnonymousCredentials(), "shop"))
    assert ready(*DATAFLOW, place)


def test_a_portable_runner_needs_an_endpoint() -> None:
    assert "--job_endpoint" in refusal("--runner=portable")
    assert ready("--runner=portable", "--job_endpoint=localhost:8099")


@pytest.mark.parametrize(
    ("runner", "option"),
    [
        ("flink", "--flink_job_server_jar"),
        ("spark", "--spark_job_server_jar"),
        ("prism", "--prism_location"),
    ],
)
def test_a_runner_is_refused_whose_job_service_is_not_there(runner: str, option: str) -> None:
    for given in ([], [f"{option}=/nowhere/it"]):
        message = refusal(f"--runner={runner}", *given)
        assert f"Give {option}" in message or f"as {option}" in message
        assert "--job_endpoint" in message
    there = ["--flink_master=cluster:8081"] if runner == "flink" else []
    assert ready(f"--runner={runner}", "--job_endpoint=localhost:8099", *there)


def test_flink_behind_a_job_service_is_to_be_named_since_only_it_cancels_its_jobs() -> None:
    message = refusal("--runner=flink", "--job_endpoint=localhost:8099")
    assert "ends no job of Flink's" in message
    assert "as --flink_master" in message
    assert ready("--runner=portable", "--job_endpoint=localhost:8099")


@pytest.mark.parametrize(
    ("runner", "option"),
    [("flink", "--flink_job_server_jar"), ("spark", "--spark_job_server_jar")],
)
def test_a_jar_needs_a_java_that_runs_it(
    runner: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(JavaJarJobServer, "local_jar", staticmethod(lambda jar, _: jar))
    (jar := tmp_path / "server.jar").touch()
    given = [f"--runner={runner}", f"{option}={jar}"]
    message = refusal(*given, "--job_server_java_launcher=/no/java")
    assert "no program '/no/java' on this machine" in message
    (java := tmp_path / "java").touch(0o700)
    assert ready(*given, f"--job_server_java_launcher={java}")


def test_a_cluster_that_jobs_are_sent_to_as_jars_needs_an_address_and_no_java_here() -> None:
    flink = ["--runner=flink", "--flink_submit_uber_jar"]
    assert ready(*flink, "--flink_master=cluster:8081")
    assert "Unable to fetch it: no network" in refusal(*flink)  # then it would be started here
    spark = ["--runner=spark", "--spark_submit_uber_jar"]
    assert "--spark_rest_url" in refusal(*spark)
    assert ready(*spark, "--spark_rest_url=http://cluster:6066")


@pytest.mark.parametrize(
    "given",
    [
        ["--runner=direct"],
        ["--runner=prism"],
        [*DATAFLOW, PLACE],
        ["--runner=flink", "--flink_submit_uber_jar", "--flink_master=cluster:8081"],
        ["--runner=spark", "--spark_submit_uber_jar", "--spark_rest_url=http://cluster:6066"],
    ],
)
def test_a_job_that_would_run_instead_of_being_written_into_a_jar_is_refused(
    given: list[str],
) -> None:
    assert "instead of writing it into the jar" in refusal(*given, JAR)


@pytest.mark.parametrize("runner", ["portable", "flink", "spark"])
def test_a_job_service_writes_jars(runner: str) -> None:
    there = ["--job_endpoint=localhost:8099", "--flink_master=cluster:8081"]
    assert ready(f"--runner={runner}", *there, JAR)


def test_what_beam_itself_would_refuse_of_the_options_is_told_before() -> None:
    given = ["--runner=portable", "--job_endpoint=x:1", "--environment_type=PROCESS"]
    assert "process_command is required" in refusal(*given)


# ---- Options of Flink ------------------------------------------------------------------------

OF_FLINK = [
    "--max_bundle_size=1000", "--object_reuse", "--execution_mode_for_batch=BATCH_FORCED",
    "--number_of_execution_retries=3", "--state_backend=rocksdb", "--operator_chaining",
]  # fmt: skip


@pytest.mark.parametrize("runner", ["flink", "portable"])
def test_what_only_flinks_java_side_knows_goes_through_to_it(runner: str) -> None:
    options = pipeline_options({}, "embed", [f"--runner={runner}", *OF_FLINK])
    told = options.get_all_options(
        add_extra_args_fn=lambda parser: runners.add_options("FlinkRunner", parser)
    )
    assert told["max_bundle_size"] == "1000"
    assert told["object_reuse"] is True
    assert told["state_backend"] == "rocksdb"


@pytest.mark.parametrize("option", OF_FLINK)
@pytest.mark.parametrize("runner", ["direct", "spark", "prism", "dataflow"])
def test_an_option_of_flink_is_refused_elsewhere(option: str, runner: str) -> None:
    message = refusal(f"--runner={runner}", option)
    assert f"{option!r} is an option of Flink alone" in message
    assert runners.named(runner) in message


def test_a_misspelt_option_of_flink_is_refused_with_the_nearest_one() -> None:
    message = refusal("--runner=flink", "--max_bundle_sise=3")
    assert "Did you mean --max_bundle_size?" in message


def test_a_switch_of_flink_takes_no_value() -> None:
    assert "object_reuse" in refusal("--runner=flink", "--object_reuse=true")


# ---- Commands --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given", ["--runner=NoSuchRunner", "--runner=dataflow", "--runner=portable", "--runner=flink"]
)
def test_a_night_is_refused_before_its_first_job(world: World, capsys: Capture, given: str) -> None:
    for extra in ([], ["--dry-run"]):
        assert refresh(world, DAYS[0], *extra, "--", given) == 2
        assert paragraph(capsys)
    assert published(world) == {}
    assert not list(world.root.rglob("*.json"))
