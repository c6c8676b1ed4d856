"""README and pages agree with the code: commands, links, messages and settings that they name."""

import ast
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from feature_jobs import schemas
from feature_jobs.schemas import OperatorError
from pipelines.cli import cli
from pipelines.running.beam_options import pipeline_options
from tests.support import settings_page
from tests.test_imports import MODULES

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "pipelines/docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
RUNBOOK = (DOCS / "runbook.md").read_text()
NAMES = [page.name for page in PAGES]


def prose_of(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


# ---- Commands --------------------------------------------------------------------------------


def commands(text: str) -> Iterator[list[str]]:
    """Yields the arguments of each `courier …` in blocks of bash, and in the midst of prose.

    What stands for a day or a command is one there. A command that prose names alone, or whose
    rest is left out, has its name alone.
    """
    for block in re.findall(r"^```bash\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        for line in block.splitlines():
            if found := re.search(r"\bcourier ([a-z].*)", line.partition(" >> ")[0]):
                yield shlex.split(found[1], comments=True)
    for span in re.findall(r"`([^`]+)`", prose_of(text)):
        if found := re.fullmatch(r"(?:.* )?courier ([a-zC].*)", " ".join(span.split())):
            given = found[1].replace("COMMAND", "refresh").partition(" >> ")[0]
            yield shlex.split(re.sub(r"(?<= )(D|DAY|…)(?= |$)", "2026-01-07", given))


def parse(name: str, *given: str) -> None:
    """Raises UsageError where click would; OperatorError for options that Beam does not know."""
    command = cli.commands[name]
    try:
        context = command.make_context(name, list(given))
    except click.exceptions.Exit:  # --help
        return
    pipeline_options({}, "embed", context.params.get("beam_args", ()))


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_command_of_a_page_is_one_with_the_options_that_it_has(page: Path) -> None:
    for name, *given in commands(page.read_text()):
        assert name in cli.commands, name
        if given:  # else prose speaks of it
            parse(name, *given)


def beam_settings(text: str) -> list[dict[str, Any]]:
    """Returns what blocks of TOML have under [beam]."""
    blocks = re.findall(r"^```toml\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [found["beam"] for block in blocks if "beam" in (found := tomllib.loads(block))]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_beam_knows_the_options_of_a_page(page: Path) -> None:
    for settings in beam_settings(page.read_text()):
        pipeline_options(settings, "embed", [])


def test_pages_have_options_of_beam_and_a_misspelt_one_is_found() -> None:
    assert sum(len(beam_settings(page.read_text())) for page in PAGES) > 2
    (settings,) = beam_settings("```toml\n[beam]\nenvironment_typ = 'PROCESS'\n```")
    with pytest.raises(OperatorError, match="environment_type"):
        pipeline_options(settings, "embed", [])


def test_a_command_that_is_misspelt_on_a_page_is_found() -> None:
    told = (
        "```bash\ncourier refresh --ds 2026-01-01 --dri\n```\nor `courier train\n--until D --bogus`"
    )
    first, second = commands(told)
    for found in (first, second):
        with pytest.raises(click.UsageError, match="No such option"):
            parse(*found)


def test_every_command_is_on_some_page() -> None:
    named = {name for page in PAGES for name, *_ in commands(page.read_text())}
    assert set(cli.commands) - named == {"item-features", "histories", "simscore"}  # as of a night


# ---- Links -----------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", prose_of(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def links(page: Path) -> list[tuple[Path, str]]:
    found = re.findall(r"\]\(([^)#]*)#?([^)]*)\)", prose_of(page.read_text()))
    return [((page.parent / path).resolve() if path else page, anchor) for path, anchor in found]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_link_of_a_page_leads_to_a_page_and_a_heading_of_it(page: Path) -> None:
    for target, anchor in links(page):
        assert target in PAGES, target
        assert not anchor or anchor in anchors(target), (target, anchor)


def test_every_page_is_reached_from_the_readme() -> None:
    reached = {target for target, _ in links(ROOT / "README.md")}
    assert reached == set(PAGES[1:])
    assert len(reached) > 5


# ---- What is said of the code ----------------------------------------------------------------


def test_the_readme_is_short_and_its_lines_are() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    assert max(len(line) for line in lines if line[:1] != "|") <= 120


def test_the_page_of_settings_is_what_the_code_takes() -> None:
    assert settings_page.PAGE.read_text() == settings_page.page(), "run `make docs`"


def messages() -> str:
    """Returns all texts of the code, a line each, with … for what is put into them."""
    found = []
    for file in MODULES.values():
        for node in ast.walk(ast.parse(file.read_text())):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [part.value if isinstance(part, ast.Constant) else "…" for part in parts]
            found.append("".join(text for text in texts if isinstance(text, str)))
    return "\n".join(text.replace("\n", " ") for text in found)


def quotes(page: str) -> list[str]:
    """Returns what a page quotes: in blocks, and at the beginning of a table's row."""
    blocks = re.findall(r"(?:^> .*\n)+", page, re.MULTILINE)
    cells = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    return [" ".join(re.sub(r"^> ", "", b, flags=re.MULTILINE).split()) for b in blocks] + cells


def test_the_messages_of_the_runbook_are_those_of_the_code() -> None:
    said, quoted = messages(), quotes(RUNBOOK)
    assert len(quoted) > 25
    for quote in quoted:
        assert re.search(".*".join(map(re.escape, quote.split("…"))), said), quote
    assert "Rows were lost or found" not in said


def test_the_runbook_has_a_section_for_each_exit_status() -> None:
    heads = re.findall(r"^## (\d+)(?: and (\d+))?:", RUNBOOK, re.MULTILINE)
    told = {int(number) for numbers in heads for number in numbers if number}
    errors = [schemas.CourierError, *schemas.CourierError.__subclasses__()]
    assert told == {0, *(error.exit_status for error in errors), 130, 143}


def test_the_readme_says_which_tables_hold_user_ids() -> None:
    rows = re.findall(r"^\| `\w+/(\w+)/ds=…` .* (yes|no) \|$", PAGES[0].read_text(), re.MULTILINE)
    assert dict(rows) == {
        table.name: "yes" if table.has_users else "no" for table in schemas.TABLES.values()
    }
