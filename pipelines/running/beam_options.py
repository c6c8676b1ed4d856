"""Chooses the runner and Beam's own options of a stage; unknown options are refused.

Beam itself drops an option that it does not know with a warning, and a misspelt
`--num_worker=100` would then run a night on one machine.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions, _BeamArgumentParser

from feature_jobs.schemas import OperatorError

LOCAL_RUNNER = "FnApiRunner"  # by name: DirectRunner first tries to download a binary


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


def check_flags(given: Sequence[str]) -> None:
    """Raises OperatorError for a flag that no Beam option knows, or that lacks its value."""
    parser = _BeamArgumentParser(allow_abbrev=False, exit_on_error=False)
    for options in {str(cls): cls for cls in PipelineOptions.__subclasses__()}.values():
        options._add_argparse_args(parser)
    try:
        _, unknown = parser.parse_known_args(list(given))
    except (SystemExit, Exception) as error:  # argparse exits for some mistakes, raises for others
        raise OperatorError(f"Beam cannot parse the options {' '.join(given)}: {error}.") from error
    if unknown:
        known = [s for action in parser._actions for s in action.option_strings]
        near = difflib.get_close_matches(unknown[0].split("=")[0], known, n=1)
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

    Raises OperatorError for an unknown option.
    """
    mine = [*flags(settings, stage), *given]
    check_flags(mine)
    return PipelineOptions([f"--runner={LOCAL_RUNNER}", *mine])


def run_pipeline(define: Callable[[beam.Pipeline], None], options: PipelineOptions) -> None:
    """Runs the job that `define` wires, and returns when it has ended well."""
    with beam.Pipeline(options=options) as root:
        define(root)
