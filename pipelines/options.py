"""Defines the options that several commands of `courier` take."""

import datetime as dt
import difflib
import functools
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast
from zoneinfo import ZoneInfo

import click

F = TypeVar("F", bound=Callable[..., Any])


class Ds(click.ParamType):
    """Reads an option's value as a date YYYY-MM-DD."""

    name = "YYYY-MM-DD"

    def convert(self, value: Any, param: Any, ctx: Any) -> dt.date:
        try:
            return value if isinstance(value, dt.date) else dt.date.fromisoformat(value)
        except ValueError:
            self.fail(f"{value!r} is no date YYYY-MM-DD", param, ctx)


class Duration(click.ParamType):
    """Reads an option's value as a time span: seconds, or with units as in 1h30m."""

    name = "duration"

    def convert(self, value: Any, param: Any, ctx: Any) -> dt.timedelta:
        if isinstance(value, dt.timedelta):
            return value
        pattern = r"(?:([0-9]+)h)?(?:([0-9]+)m)?(?:([0-9]+)s)?|([0-9]+)"
        found = re.fullmatch(pattern, str(value).strip())
        if not found or not any(found.groups()):
            self.fail(
                f"{value!r} is no time span such as 2h, 1h30m, 45m or 90 (seconds)", param, ctx
            )
        hours, minutes, *seconds = (int(number or 0) for number in found.groups())
        total = 3600 * hours + 60 * minutes + sum(seconds)
        if total > 7 * 86_400:
            self.fail(f"{value!r} is more than a week", param, ctx)
        return dt.timedelta(seconds=total)


class Clock(click.ParamType):
    """Reads an option's value as a time of day, HH:MM."""

    name = "HH:MM"

    def convert(self, value: Any, param: Any, ctx: Any) -> dt.time:
        if isinstance(value, dt.time):
            return value
        found = re.fullmatch(r"([01]?[0-9]|2[0-3]):([0-5][0-9])", str(value).strip())
        if not found:
            self.fail(f"{value!r} is no time of day HH:MM, from 00:00 to 23:59", param, ctx)
        return dt.time(int(found[1]), int(found[2]))


class PathText(click.ParamType):
    """Reads an option's value as a path: local, or in a bucket unless `local` only.

    Of an option that takes several, an environment variable has them as PATH has: a:gs://b/c.
    """

    name = "path"

    def __init__(self, local: bool = False):
        self._local = local

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        from feature_jobs.schemas import OperatorError
        from feature_jobs.store import files

        try:
            path = files.expanded(str(value))
        except OperatorError as error:
            self.fail(str(error), param, ctx)
        if self._local and files.is_remote(path):
            self.fail(f"{path!r} lies in a bucket, but a local path is needed here.", param, ctx)
        return path

    def split_envvar_value(self, rv: str) -> Sequence[str]:
        return re.split(rf"{os.pathsep}(?!//)", rv)


class SetName(click.ParamType):
    """Reads an option's value as the name of a training set, which is that of a folder."""

    name = "name"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", str(value)):
            self.fail(
                f"{value!r} is no name of small letters, digits, - and _, which begins with a "
                "letter or digit",
                param,
                ctx,
            )
        return str(value)


class ZoneName(click.ParamType):
    """Reads an option's value as the name of a time zone."""

    name = "zone"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        try:
            ZoneInfo(str(value))
        except (KeyError, ValueError, OSError):
            self.fail(f"{value!r} is no IANA time zone such as 'Asia/Shanghai'", param, ctx)
        return str(value)


class GateName(click.ParamType):
    """Reads an option's value as the name of a gate."""

    name = "gate"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        from pipelines.config import Gates

        known = list(Gates.model_fields)
        if value not in known:
            near = difflib.get_close_matches(str(value), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"gates are {', '.join(known)}"
            self.fail(f"{value!r} is no gate, {hint}", param, ctx)
        return str(value)


def _beam_args(
    _ctx: click.Context, _param: click.Parameter, given: tuple[str, ...]
) -> Sequence[str]:
    if given and not given[0].startswith("--"):
        raise click.UsageError(
            f"Unexpected argument {given[0]!r}. A day is given as --ds YYYY-MM-DD; Beam's own "
            "options follow `--`."
        )
    return given


config_option = click.option(
    "--config",
    type=PathText(local=True),
    default="courier.toml",
    show_default=True,
    metavar="FILE",
    help="The settings.",
)
json_option = click.option("--json", is_flag=True, help="The result as JSON.")
dry_run_option = click.option(
    "--dry-run", is_flag=True, help="Only print what would be computed, reused and left alone."
)
overlap_option = click.option(
    "--allow-overlap",
    is_flag=True,
    help="Use an encoder or codebook made from this day or later ones; the manifest records it.",
)
out_option = click.option(
    "--out",
    type=PathText(),
    metavar="FOLDER",
    help="Where packages go; may be gs://. [default: beside the settings]",
)
full_option = click.option(
    "--full", is_flag=True, help="Read and embed every image again, whatever the day before had."
)
remake_option = click.option(
    "--remake", is_flag=True, help="Make again what is published from the same inputs, too."
)
embeddings_by_option = click.option(
    "--embeddings-by",
    type=click.Choice(["auto", "broadcast", "shuffle"]),
    help="How embeddings reach impressions: a copy on each worker, or a shuffle. [default: the "
    "settings']",
)
from_log_option = click.option(
    "--from-log",
    is_flag=True,
    help="Begin histories from the log of the window, not from those of the day before.",
)


def waiting_options(command: F) -> F:
    """Gives `command` the options by which it waits for its inputs."""
    options = (
        click.option(
            "--wait",
            type=Duration(),
            metavar="2h|45m|90",
            help="Wait so long for inputs that are not there yet. [default: end with 4 at once]",
        ),
        click.option(
            "--deadline",
            type=Clock(),
            help="Wait for them until it is this time, in the settings' day_timezone.",
        ),
    )
    return _with(options, command)


def encoder_option(help: str) -> Callable[[F], F]:
    """Returns the option that names an encoder which is not pinned yet."""
    return click.option("--encoder", type=PathText(), metavar="FOLDER", help=help)


beam_argument = click.argument(
    "beam_args", nargs=-1, type=click.UNPROCESSED, callback=_beam_args, metavar="[-- BEAM OPTIONS]"
)


def ds_option(help: str) -> Callable[[F], F]:
    """Returns the option of a command for one day, with what the day is to that command."""
    return click.option("--ds", type=Ds(), required=True, help=help)


def days_options(command: F) -> F:
    """Gives `command` the options of every command that makes tables of one ds or several days.

    The command gets the days as `days`, and the gates to accept and the reason as `accepted`.
    """
    accept = (
        click.option(
            "--accept",
            type=GateName(),
            multiple=True,
            metavar="GATE",
            help="Publish although this gate refuses; repeat. The night's record tells it.",
        ),
        click.option("--reason", help="Why: said with --accept, and recorded."),
    )
    rest = (*accept, remake_option, dry_run_option, json_option, beam_argument)

    @functools.wraps(command)
    def with_accepted(accept: tuple[str, ...], reason: str | None, **given: Any) -> Any:
        reason = (reason or "").strip()
        if bool(accept) != bool(reason):
            raise click.UsageError("--accept GATE and --reason WHY go together.")
        return command(accepted=(accept, reason), **given)

    return _with_days(cast(F, with_accepted), "make", rest)


def checked_days_options(command: F) -> F:
    """Gives `command` the options of one that looks at what is published of one ds or several."""
    return _with_days(command, "look at", (json_option,))


def _with_days(command: F, to_do: str, rest: Sequence[Callable[[F], F]]) -> F:
    days = (
        click.option("--ds", type=Ds(), help=f"The day to {to_do}."),
        click.option("--start-ds", type=Ds(), help="Or the first of several days."),
        click.option("--end-ds", type=Ds(), help="And the last of them."),
    )

    @functools.wraps(command)
    def with_days(
        ds: dt.date | None, start_ds: dt.date | None, end_ds: dt.date | None, **given: Any
    ) -> Any:
        return command(days=days_asked(ds, start_ds, end_ds), **given)

    return _with((config_option, *days, *rest), cast(F, with_days))


def _with(options: Sequence[Callable[[F], F]], command: F) -> F:
    for option in reversed(options):
        command = option(command)
    return command


def days_asked(ds: dt.date | None, start: dt.date | None, end: dt.date | None) -> list[dt.date]:
    """Returns `ds`, or the days `start` to `end`; raises UsageError unless one form is given."""
    if ds and not start and not end:
        return [ds]
    if ds or not start or not end:
        raise click.UsageError(
            "Give one day as --ds, or the first and the last of several as --start-ds and --end-ds."
        )
    if start > end:
        raise click.UsageError(f"--start-ds {start} comes after --end-ds {end}.")
    return [start + dt.timedelta(days=n) for n in range((end - start).days + 1)]
