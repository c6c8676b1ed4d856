"""Says which of Beam's runners make the same tables, and refuses what one of them lacks to begin.

Some runners lose rows and end well: Beam's DaskRunner loses tagged outputs, what CoGroupByKey makes
of them, and what `finish_bundle` yields. So only those are taken on which nights were made.
"""

import argparse
import difflib
import shutil

from apache_beam.options.pipeline_options import (
    FlinkRunnerOptions,
    GoogleCloudOptions,
    JobServerOptions,
    PipelineOptions,
    PortableOptions,
    SparkRunnerOptions,
    StandardOptions,
)
from apache_beam.options.pipeline_options_validator import PipelineOptionsValidator
from apache_beam.runners.portability.flink_runner import MAGIC_HOST_NAMES, FlinkJarJobServer
from apache_beam.runners.portability.prism_runner import PrismJobServer
from apache_beam.runners.portability.spark_runner import SparkJarJobServer

from feature_jobs.schemas import OperatorError

LOCAL = "FnApiRunner"  # by name: DirectRunner first tries to download a binary
PORTABLE, FLINK, SPARK, PRISM = "PortableRunner", "FlinkRunner", "SparkRunner", "PrismRunner"
DATAFLOW = "DataflowRunner"
SUPPORTED = (LOCAL, PORTABLE, FLINK, SPARK, PRISM, DATAFLOW)

_LOCAL_TOO = ("DirectRunner", "SwitchingDirectRunner", "BundleBasedDirectRunner")
_BEAMS = "apache_beam.runners."  # a class of that name elsewhere may do anything

# Options of Flink's runner that only its Java side knows. They go to it unread: its job server says
# what it knows, and a job server of Flink may stand behind a PortableRunner. A switch takes no
# value, and turns off what is on by default, as operator_chaining.
_OF_FLINK = (
    "auto_watermark_interval", "checkpoint_timeout_millis", "checkpointing_interval",
    "checkpointing_mode", "execution_mode_for_batch", "execution_retry_delay",
    "file_input_split_max_size_m_b", "flink_conf_dir", "job_check_interval_in_secs",
    "latency_tracking_interval", "max_bundle_size", "max_bundle_time_mills",
    "min_pause_between_checkpoints", "num_concurrent_checkpoints", "number_of_execution_retries",
    "report_checkpoint_duration", "savepoint_path", "shutdown_sources_after_idle_ms",
    "state_backend", "state_backend_factory", "state_backend_storage_path",
)  # fmt: skip
_SWITCHES_OF_FLINK = (
    "allow_non_restored_state", "attached_mode", "auto_balance_write_files_sharding_enabled",
    "disable_metrics", "enable_stable_input_drain", "externalized_checkpoints_enabled",
    "fail_on_checkpointing_errors", "faster_copy", "finish_bundle_before_checkpointing",
    "force_slot_sharing_group", "force_unaligned_checkpoint_enabled", "object_reuse",
    "operator_chaining", "re_iterable_group_by_key_result",
    "retain_externalized_checkpoints_on_cancellation", "unaligned_checkpoint_enabled",
    "use_data_stream_for_batch",
)  # fmt: skip


def named(given: str) -> str:
    """Returns the supported runner that `given` names in any of Beam's spellings, by Beam's name.

    Raises OperatorError for any other.
    """
    path, _, name = given.rpartition(".")
    ours = {runner.lower(): runner for runner in SUPPORTED}
    known = ours | {runner.lower(): LOCAL for runner in _LOCAL_TOO}
    spelt = name.lower() if name.lower() in known else f"{name.lower()}runner"
    if spelt in known and (not path or f"{path}.".startswith(_BEAMS)):
        return known[spelt]
    near = difflib.get_close_matches(spelt, ours, n=1, cutoff=0.8)
    hint = f" Did you mean {ours[near[0]]}?" if near else ""
    raise OperatorError(
        f"The runner {given!r} is none of those on which COURIER makes its tables: "
        f"{', '.join(SUPPORTED)}.{hint} Others may lose rows and end well, as Beam's DaskRunner, "
        "which drops tagged outputs, or were never tried. Name one of these as --runner or as "
        "runner under [beam], or leave it out: the jobs then run on this machine."
    )


def add_options(runner: str, parser: argparse.ArgumentParser) -> None:
    """Adds to `parser` what the runner takes beside the options that Beam's Python side knows."""
    if runner in (FLINK, PORTABLE):
        for name in _OF_FLINK:
            parser.add_argument(f"--{name}")
        for name in _SWITCHES_OF_FLINK:
            parser.add_argument(f"--{name}", action="store_true")


def is_of_flink(option: str) -> bool:
    """Returns whether `option`, as `--name`, is one that Flink's Java side knows."""
    return option.removeprefix("--") in _OF_FLINK + _SWITCHES_OF_FLINK


def check_ready(options: PipelineOptions) -> None:
    """Raises OperatorError where the runner would refuse its first job for what is told or missing.

    That is found out here: no job is sent. `options` name the runner as `named` does.
    """
    runner = options.view_as(StandardOptions).runner
    if errors := PipelineOptionsValidator(options, None).validate():
        raise _not_ready(runner, " ".join(errors), "Correct these options")
    if options.view_as(PortableOptions).output_executable_path and (
        runner not in (PORTABLE, FLINK, SPARK) or submits_its_jar(runner, options)
    ):
        raise _not_ready(
            runner,
            "it would run its job instead of writing it into the jar of --output_executable_path",
            "Leave that out, or name FlinkRunner or SparkRunner, without --flink_submit_uber_jar "
            "and --spark_submit_uber_jar",
        )
    if runner == DATAFLOW:
        _check_dataflow(options)
    elif runner == LOCAL:
        return
    elif not options.view_as(PortableOptions).job_endpoint:
        _check_job_service(runner, options)
    elif runner == FLINK and options.view_as(FlinkRunnerOptions).flink_master == "[auto]":
        raise _not_ready(
            runner,
            "it is told a --job_endpoint, and not where Flink itself is, and a job service ends no "
            "job of Flink's: an interrupted command would leave its job running",
            "Give the host:port of Flink's REST interface as --flink_master besides",
        )


def _not_ready(runner: str, found: str, remedy: str) -> OperatorError:
    return OperatorError(
        f"{runner} could not run a job as it is set up: {' '.join(found.split()).rstrip('.')}. "
        f"{remedy}. Beam's options stand after `--`, or under [beam] in the settings. Nothing was "
        "begun."
    )


# ---- Dataflow --------------------------------------------------------------------------------


def _check_dataflow(options: PipelineOptions) -> None:
    cloud = options.view_as(GoogleCloudOptions)
    places = [name for name in ("temp_location", "staging_location") if getattr(cloud, name)]
    missing = [name for name in ("project", "region") if not getattr(cloud, name)]
    if not places:
        missing.append("temp_location")  # Beam would make a bucket of its own
    if missing:
        wanted = " and ".join(f"--{name}" for name in missing)
        raise _not_ready(DATAFLOW, f"it is not told {wanted}", f"Give {wanted}")
    validator = PipelineOptionsValidator(options, None)
    errors = validator.validate_cloud_options(cloud)
    errors += [error for name in places for error in validator.validate_gcs_path(cloud, name)]
    if errors:
        raise _not_ready(DATAFLOW, " ".join(errors), "Correct these options")
    if not cloud.no_auth:
        from feature_jobs.store import gcs_client  # Google's client takes a second to load

        gcs_client.check_credentials(f"{DATAFLOW} needs")  # Beam would look for them for minutes


# ---- Job services ----------------------------------------------------------------------------


def _check_job_service(runner: str, options: PipelineOptions) -> None:
    """Raises OperatorError where the job service that Beam would start here cannot be started."""
    if runner == PORTABLE:
        raise _not_ready(
            runner,
            "it knows no job service of its own, and is not told --job_endpoint",
            "Give the host:port of one that runs, or a runner that starts one, as FlinkRunner",
        )
    remedy = (
        f"Give {_SERVICES[runner]}, or as --job_endpoint the host:port of a job service that runs"
    )
    try:
        program = _program(runner, options)
    except (ValueError, RuntimeError, OSError) as error:  # so Beam says what is not there
        raise _not_ready(runner, str(error), remedy) from error
    if program and shutil.which(program) is None:
        raise _not_ready(runner, f"there is no program {program!r} on this machine", remedy)


_SERVICES = {
    FLINK: "--flink_job_server_jar, and a Java that runs it",
    SPARK: "--spark_job_server_jar, and a Java that runs it",
    PRISM: "its program as --prism_location",
}


def _program(runner: str, options: PipelineOptions) -> str | None:
    """Returns the program that starts the runner's job service, None where the cluster has one.

    What the program needs is fetched, as Beam would fetch it, unless it is there.
    """
    if runner == PRISM:
        command, _ = PrismJobServer(options).subprocess_cmd_and_endpoint()
        return str(command[0])
    server = (FlinkJarJobServer if runner == FLINK else SparkJarJobServer)(options)
    jar = server.path_to_jar()
    if submits_its_jar(runner, options):
        return None  # which one, and in which version, the cluster says
    java = options.view_as(JobServerOptions)
    server.local_jar(jar, java.jar_cache_dir)
    return str(java.job_server_java_launcher)


def submits_its_jar(runner: str, options: PipelineOptions) -> bool:
    """Returns whether jobs go to a cluster as a jar each; raises ValueError for none to go to."""
    if runner == FLINK:
        flink = options.view_as(FlinkRunnerOptions)
        return bool(flink.flink_submit_uber_jar) and flink.flink_master not in MAGIC_HOST_NAMES
    spark = options.view_as(SparkRunnerOptions)
    if spark.spark_submit_uber_jar and not spark.spark_rest_url:
        raise ValueError("--spark_submit_uber_jar is told no --spark_rest_url")
    return bool(spark.spark_submit_uber_jar)
