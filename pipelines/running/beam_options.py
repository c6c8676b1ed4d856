"""Chooses the runner and Beam's own options of a stage; unknown options are refused.

Beam itself drops an option that it does not know with a warning, and a misspelt
`--num_worker=100` would then run a night on one machine.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import (
    DebugOptions,
    DirectOptions,
    PipelineOptions,
    PortableOptions,
    StandardOptions,
    _BeamArgumentParser,
)

from feature_jobs.schemas import OperatorError
from feature_jobs.store.threads import Share
from pipelines.config import Settings
from pipelines.running import runners

# Runners whose workers start SDK processes as told.
_TOLD_PROCESSES = (runners.PORTABLE, runners.FLINK, runners.SPARK)
# They end a worker when no step is at it, and would start another for the next one, which imports
# for seconds and loads models anew. This long it waits.
_KEEP_WORKERS = "--environment_cache_millis=10000"


@dataclass(frozen=True)
class JobOptions:
    """Holds Beam's options of a stage, and what share of a host a process of its workers has.

    `flags` are what the options were made of: Beam takes long to tell whether two are equal.
    """

    beam: PipelineOptions
    flags: tuple[str, ...]
    share: Share


def flags(settings: Mapping[str, Any], stage: str) -> list[str]:
    """Returns the `[beam]` settings of a stage as Beam's flags; those of `[beam.<stage>]` win.

    `false` takes a switch of `[beam]` back for one stage. Raises OperatorError for any other
    `false`: Beam's switches are off unless named, so it would do nothing.
    """
    common = {k: v for k, v in settings.items() if not isinstance(v, dict)}
    found = []
    for name, value in (common | settings.get(stage, {})).items():
        if value is True:
            found.append(f"--{name}")
        elif value is False and common.get(name) is not True:
            raise OperatorError(
                f"[beam] {name} = false would do nothing: Beam's switches are off unless named. "
                "Leave the key out, or name the switch that turns it off, as no_use_public_ips."
            )
        elif value is not False:
            values = value if isinstance(value, list) else [value]
            found += [f"--{name}={v}" for v in values]
    return found


def _named_runner(given: Sequence[str]) -> str:
    """Returns the runner that flags name last, by its full name; the local one for none."""
    parser = _BeamArgumentParser(allow_abbrev=False)
    parser.add_argument("--runner", nargs="?")
    return runners.named(parser.parse_known_args(list(given))[0].runner or runners.LOCAL)


def check_flags(given: Sequence[str], runner: str) -> None:
    """Raises OperatorError for a flag that Beam or the runner does not know, or without a value."""
    parser = _BeamArgumentParser(allow_abbrev=False, exit_on_error=False)
    for options in {str(cls): cls for cls in PipelineOptions.__subclasses__()}.values():
        options._add_argparse_args(parser)
    runners.add_options(runner, parser)
    try:
        _, unknown = parser.parse_known_args(list(given))
    except (SystemExit, Exception) as error:  # argparse exits for some mistakes, raises for others
        raise OperatorError(f"Beam cannot parse the options {' '.join(given)}: {error}.") from error
    if unknown:
        name = unknown[0].split("=")[0]
        if runners.is_of_flink(name):
            raise OperatorError(
                f"{unknown[0]!r} is an option of Flink alone, and {runner} would drop it. Leave it "
                "out, or give it to the stages alone that run on FlinkRunner, or on a "
                "PortableRunner with Flink's job server."
            )
        known = [s for action in parser._actions for s in action.option_strings]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise OperatorError(
            f"Beam knows no option {unknown[0]!r} and would drop it with a warning, and the job "
            f"would run otherwise than you asked.{hint} Options after `--` and under [beam] are "
            "spelt as in Beam."
        )


def pipeline_options(
    settings: Mapping[str, Any], stage: str, given: Sequence[str]
) -> PipelineOptions:
    """Returns options of one stage: the defaults, the settings, then `given` on the command line.

    The runner is told by its full name; workers of a cluster outlast a step. Raises OperatorError
    for an unknown option, or a runner that is not supported.
    """
    mine = [*flags(settings, stage), *given]
    runner = _named_runner(mine)
    check_flags(mine, runner)
    defaults = [_KEEP_WORKERS] if runner in _TOLD_PROCESSES else []
    return PipelineOptions([*defaults, *mine, f"--runner={runner}"])


def job_options(settings: Settings, stage: str, given: Sequence[str]) -> JobOptions:
    """Returns how a stage runs, by the settings and then by what is `given` on the command line.

    Raises OperatorError for an option that Beam does not know and for a runner that is not
    supported.
    """
    options = pipeline_options(settings.beam, stage, given)
    share = Share(settings.workers.threads, processes_per_host(options))
    return JobOptions(options, (*flags(settings.beam, stage), *given), share)


def is_local(job: JobOptions) -> bool:
    """Returns whether a job's workers have this machine alone to share."""
    return bool(job.beam.view_as(StandardOptions).runner == runners.LOCAL)


def is_for_jar(job: JobOptions) -> bool:
    """Returns whether a job is to be written into a jar, which others run."""
    return bool(job.beam.view_as(PortableOptions).output_executable_path)


def check_ready(jobs: Iterable[JobOptions]) -> None:
    """Raises OperatorError where a runner lacks what its first job would ask for.

    To be asked before jobs are sent, and not before: what a job service needs may be fetched.
    """
    for options in {job.flags: job.beam for job in jobs}.values():
        runners.check_ready(options)


def processes_per_host(options: PipelineOptions) -> int | None:
    """Returns how many SDK processes share a worker host, None for one on each of its cores.

    Several workers that a cluster puts on one host are not told by options.
    """
    runner = options.view_as(StandardOptions).runner
    if runner == runners.DATAFLOW:
        experiments = options.view_as(DebugOptions).experiments or []
        return 1 if "no_use_multiple_sdk_containers" in experiments else None
    if runner in _TOLD_PROCESSES:
        portable = options.view_as(PortableOptions)
        # In LOOPBACK they are threads of the launcher's process.
        alone = portable.environment_type == "LOOPBACK"
        return 1 if alone else _parallelism(portable.sdk_worker_parallelism)
    local = options.view_as(DirectOptions)
    several = local.direct_running_mode == "multi_processing"
    return local.direct_num_workers or None if several else 1


def _parallelism(given: str | int) -> int | None:
    """Returns `sdk_worker_parallelism`, None where 0 leaves it to the runner: Beam checks nothing.

    Raises OperatorError where it is no number.
    """
    if not str(given).isdecimal():
        raise OperatorError(
            f"--sdk_worker_parallelism={given} is no number of SDK processes for each worker; give "
            "1 or more, or 0 to leave it to the runner."
        )
    return int(given) or None


def run_pipeline(define: Callable[[beam.Pipeline], None], options: PipelineOptions) -> None:
    """Runs the job that `define` wires, and returns when it has ended well."""
    with beam.Pipeline(options=options) as root:
        define(root)
