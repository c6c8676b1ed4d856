"""Writes pipelines/docs/settings.md: what `courier init` writes, and what config.py takes.

    python -m tests.support.settings_page

`make docs` runs it; a test compares.
"""

import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipelines.config import Settings
from tests.support.first_look import Shop, draw

PAGE = Path(__file__).parents[2] / "pipelines/docs/settings.md"
_HEADER = re.compile(r"^(?:# )?\[+([\w.]+)\]+$", re.MULTILINE)
# What the limits of a gate are, by their class.
_SIDES = {
    "AtMost": "shares, `warn` ≤ `fail`",
    "AtLeast": "shares, `warn` ≥ `fail`",
    "Drift": "indices ≥ 0, `warn` ≤ `fail`",
    "Factor": "factors ≥ 1, `warn` ≤ `fail`",
}
_INTRODUCTION = """\
# Settings

All settings are in one TOML file, `courier.toml`; `courier COMMAND --config FILE` names another.
`courier init` writes it, with every setting and a comment on each, as below. A key that is not
known, or a value of another type, is refused before anything starts. `courier init --check` looks
at the tables and images that settings name, and ends with status 1 where a night would fail.

Paths are relative to the folder of the file, or `gs://…`; `~` is the home folder. With `base`, the
paths of tables and images are relative to that instead: [move a shop](nights.md#move-a-shop),
change the one line, and no day is recomputed.

This page is generated from `pipelines/config.py` and the file of `courier init`, by `make docs`.
"""


def page() -> str:
    """Returns the page: a section for each of the settings file, in its order."""
    schema = Settings.model_json_schema()
    sections = [
        f"## {f'`[{name}]`' if name else 'At the top of the file'}\n\n```toml\n{text}\n```\n"
        # Columns are named as we name them, by default: the file itself says all of them.
        + ("" if name.endswith(".columns") else _table(_keys(schema, name)))
        for name, text in _sections(_as_init_writes_it())
    ]
    return "\n".join([_INTRODUCTION, *sections])


def _as_init_writes_it() -> str:
    with tempfile.TemporaryDirectory() as name:
        draw(Path(name) / "images")
        return Shop(Path(name)).write().look().toml


def _sections(toml: str) -> Iterator[tuple[str, str]]:
    """Yields the name and the text of each section; paragraphs without a header go on with it."""
    name, paragraphs = "", list[str]()
    for paragraph in toml.strip().split("\n\n"):
        if header := _HEADER.search(paragraph):
            yield name, "\n\n".join(paragraphs)
            name, paragraphs = header[1], []
        paragraphs.append(paragraph)
    yield name, "\n\n".join(paragraphs)


def _keys(schema: Mapping[str, Any], section: str) -> dict[str, tuple[str, str]]:
    """Returns what each key of a section takes, and its default."""
    model: Mapping[str, Any] = schema
    for part in filter(None, section.split(".")):
        model = schema["$defs"].get(_model(model["properties"][part]), {})
    required = model.get("required", ())
    return {
        key: (_takes(about), "required" if key in required else _value(about["default"]))
        for key, about in model.get("properties", {}).items()
        if _is_gate(about) or (not _model(about) and about.get("additionalProperties") is not True)
    }


def _is_gate(about: Mapping[str, Any]) -> bool:
    """Returns whether a key takes the limits of a gate."""
    return _model(about) in _SIDES


def _model(about: Mapping[str, Any]) -> str:
    """Returns the name of the section that a key stands for, "" for a plain value."""
    found = re.search(r"#/\$defs/(\w+)", str(about))
    return found[1] if found else ""


def _takes(about: Mapping[str, Any]) -> str:
    """Returns what may be given, in words."""
    if _is_gate(about):
        return _SIDES[_model(about)]
    if "anyOf" in about:
        return _takes(about["anyOf"][0])
    if "enum" in about:
        return ", ".join(map(_value, about["enum"]))
    if "prefixItems" in about:
        return f"[{', '.join(map(_takes, about['prefixItems']))}]"
    if about["type"] == "array":
        return f"list of {_takes(about['items'])}"
    if about["type"] == "object":
        return f"table of {_takes(about['additionalProperties'])}"
    name = about.get("format") or {"string": "text", "boolean": "true, false"}.get(about["type"])
    least, above, most = (about.get(k) for k in ("minimum", "exclusiveMinimum", "maximum"))
    bounds = {"≥": least, ">": above, "≤": most}
    limits = [f"{sign} {bound}" for sign, bound in bounds.items() if bound is not None]
    return ", ".join([name or about["type"], *limits])


def _value(value: Any) -> str:
    spelt = {None: "none", True: "`true`", False: "`false`"}
    if isinstance(value, bool | None):
        return spelt[value]
    if isinstance(value, dict):
        return f"`{{{', '.join(f'{name} = {limit}' for name, limit in value.items())}}}`"
    return f"`{value}`" if not isinstance(value, str) else f'`"{value}"`'


def _table(keys: Mapping[str, tuple[str, str]]) -> str:
    if not keys:
        return ""
    rows = [f"| `{key}` | {takes} | {default} |" for key, (takes, default) in keys.items()]
    return "\n".join(["", "| key | takes | default |", "|---|---|---|", *rows, ""])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
