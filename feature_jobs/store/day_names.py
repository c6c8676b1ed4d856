"""Spells days in names of files and folders, and reads them back.

A template is a name, a path or a glob pattern in which {ds} stands for the day as YYYY-MM-DD, and
{ds:%Y%m%d} or parts such as year={ds:%Y}/month={ds:%m} for other spellings. A brace that is meant
as such is doubled, as in Python's own format strings.
"""

import contextlib
import datetime as dt
import functools
import re
import string
from dataclasses import dataclass
from glob import escape


@dataclass(frozen=True)
class _Field:
    """Is a number of a date in a template; `digits` are 0 for as many as it takes."""

    of: str
    digits: int

    def of_day(self, ds: dt.date) -> str:
        return f"{getattr(ds, self.of):0{self.digits}}"

    def glob(self) -> str:
        return "?" * self.digits or "*"

    def regex(self) -> str:
        return f"([0-9]{{{self.digits}}})" if self.digits else "([1-9][0-9]?)"


_FIELDS = {
    "%Y": _Field("year", 4),
    "%m": _Field("month", 2),
    "%d": _Field("day", 2),
    "%-m": _Field("month", 0),
    "%-d": _Field("day", 0),
}
_ISO = "%Y-%m-%d"


@dataclass(frozen=True)
class DayNames:
    """Gives each day a name by a `template`, and each such name its day.

    Raises ValueError, with the reason as a predicate ("has no day …"), for a template whose names
    do not tell every day from all others.
    """

    template: str

    def __post_init__(self) -> None:
        _check(_parts(self.template))

    def name_of(self, ds: dt.date) -> str:
        """Returns the name of one day; a glob pattern where the template is one."""
        return name_of(self.template, ds)

    def day_of(self, name: str) -> dt.date | None:
        """Returns the day whose `name_of` this is, or matches; None for any other name."""
        found = re.fullmatch(_regex(self.template), name)
        if not found:
            return None
        fields = [part for part in _parts(self.template) if isinstance(part, _Field)]
        numbers = {(f.of, int(n)) for f, n in zip(fields, found.groups(), strict=True)}
        try:  # one that stands there twice may differ, or be of 2026-02-30
            return dt.date(**dict(numbers)) if len(numbers) == 3 else None
        except ValueError:
            return None

    def glob(self) -> str:
        """Returns a pattern that the names of all days match; what else does has no `day_of`."""
        return "".join(p.glob() if isinstance(p, _Field) else p for p in _parts(self.template))


def has_day(template: str) -> bool:
    """Tells whether a name has anything of a day in it; one snapshot for all days has nothing."""
    return any(isinstance(part, _Field) for part in _parts(template))


def name_of(template: str, ds: dt.date) -> str:
    """Returns the name of one day; that of one snapshot is the same for every day."""
    return "".join(p.of_day(ds) if isinstance(p, _Field) else p for p in _parts(template))


def literal(text: str) -> str:
    """Returns the template of `text` itself: its braces name no day, its brackets no wildcard."""
    return escape(text).replace("{", "{{").replace("}", "}}")


# ---- Recognising -----------------------------------------------------------------------------

_KEY = r"(?:\w+=)?"
# A day in the folders of a path, Hive's keys aside: in one of them, or a number in each.
_IN_FOLDERS = (
    r"(?P<Y>(?:19|20)\d\d)(?P<a>[-_.]?|/{key})(?P<m>\d\d?)(?P<b>[-_.]?|/{key})(?P<d>\d\d?)"
    r"(?=(?:\.\w+)?/)"
)
_IN_NAME = (
    r"(?<!\d)(?P<Y>(?:19|20)\d\d)(?P<a>{between})(?P<m>\d\d)(?P<b>(?P=a))(?P<d>\d\d)(?!\d)"
    r"[^/]*$"
)
# Where a day is looked for, in this order: a file's name may also tell when it was written.
_SPELLINGS = (
    re.compile(r"(?<=/)\w+=" + _IN_FOLDERS.format(key=r"\w+=")),
    re.compile(_IN_NAME.format(between="-")),
    re.compile(r"(?<=/)" + _KEY + _IN_FOLDERS.format(key=_KEY)),
    re.compile(_IN_NAME.format(between="[_.]?")),
)


def find_day(path: str) -> tuple[dt.date, re.Match[str]] | None:
    """Finds the day that a full path has by its looks, in its folders or its name; None for none.

    Returns with it the match: the groups Y, m and d are its numbers, a and b what is between them.
    """
    for spelling in _SPELLINGS:
        for found in reversed(list(spelling.finditer(path))):  # the deepest folder first
            with contextlib.suppress(ValueError):  # digits such as 2026-99-01
                return dt.date(int(found["Y"]), int(found["m"]), int(found["d"])), found
    return None


# ---- Templates ---------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def _parts(template: str) -> tuple[str | _Field, ...]:
    """Splits a template into fields and the texts around them; raises ValueError."""
    found: list[str | _Field] = []
    for text, name, spelt, conversion in string.Formatter().parse(template):
        found.append(text)
        if name is None:
            continue
        if name != "ds" or conversion:
            raise ValueError(f"knows {{ds}} only, but has {{{name}}}")
        for directive, between in re.findall(r"(%-?.?)|([^%]+)", spelt or _ISO):
            if directive and directive not in _FIELDS:
                known = ", ".join(_FIELDS)
                raise ValueError(f"spells the day with {directive!r}, but knows only {known}")
            found.append(_FIELDS[directive] if directive else between)
    return tuple(part for part in found if part)


def _check(parts: tuple[str | _Field, ...]) -> None:
    missing = [of for of in ("year", "month", "day") if of not in {_of(part) for part in parts}]
    if missing:
        without = "no day" if len(missing) == 3 else f"no {' and no '.join(missing)}"
        raise ValueError(
            f"has {without}: {{ds}} stands for the day as YYYY-MM-DD, {{ds:%Y%m%d}} and "
            "year={ds:%Y}/month={ds:%m}/day={ds:%d} for other spellings"
        )
    # day=1 would be taken for day=11 as well where a digit, or anything at all, may come next.
    for before, part, after in zip(("", *parts), parts, (*parts[1:], ""), strict=False):
        if isinstance(part, _Field) and not part.digits and (_open(before, -1) or _open(after, 0)):
            raise ValueError(
                f"has a {part.of} of one digit or two beside another digit or a wildcard, so that "
                f"the names of two days are alike: take %{part.of[0]}, or put a '-' between"
            )


def _of(part: str | _Field) -> str:
    return part.of if isinstance(part, _Field) else ""


def _open(beside: str | _Field, at: int) -> bool:
    """Tells whether what stands beside a field, or its end `at` the field, may be a digit."""
    return isinstance(beside, _Field) or bool(re.match(r"[0-9*?\[\]]", beside[at:][:1]))


@functools.lru_cache(maxsize=256)
def _regex(template: str) -> str:
    """Returns the regular expression of all days' names, with a group for each field."""
    return "".join(
        part.regex() if isinstance(part, _Field) else _wild(part) for part in _parts(template)
    )


_WILDCARDS = {"**/": r"(?:[^/]+/)*", "**": ".*", "*": "[^/]*", "?": "[^/]"}


def _wild(pattern: str) -> str:
    """Returns the regular expression of a glob pattern."""
    found = ""
    for text, wildcard, members in re.findall(
        r"([^*?[]+)|(\*\*/?|[*?])|(\[!?\]?[^]]*\]|\[)", pattern
    ):
        found += re.escape(text) + _WILDCARDS.get(wildcard, "")
        if members:
            inside = re.sub(r"([][\\^&~|])", r"\\\1", members[1:-1].removeprefix("!"))
            found += f"[{'^' * (members[1:2] == '!')}{inside}]" if inside else re.escape(members)
    return found
