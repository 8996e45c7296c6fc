"""Commands of the README and of docs/ exist as written: make targets, tsm commands with their options, linked files."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from services.cli import app

ROOT = Path(__file__).resolve().parents[2]
PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
TEXT = "\n".join(PAGES.values())
SHELL = "\n".join(re.findall(r"```(?:sh|bash)\n(.*?)```", TEXT, re.DOTALL))
TSM = sorted(set(re.findall(r"^(?:\.venv/bin/)?tsm (.*)$", SHELL, re.MULTILINE)))
MAKE = sorted(set(re.findall(r"(?:^|`|&& )make ([a-z0-9-]+)", TEXT, re.MULTILINE)))


@pytest.mark.parametrize("line", TSM)
def test_tsm_command_parses(line: str):
    words = shlex.split(line, comments=True)
    command = typer.main.get_command(app)
    context = command.make_context("tsm", words, resilient_parsing=False)
    while hasattr(command, "resolve_command"):
        _, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(command.name, list(rest), parent=context)
    assert command.callback is not None


@pytest.mark.parametrize("target", MAKE)
def test_make_target_exists(target: str):
    rules = re.findall(r"^([a-z0-9 -]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert target in {name for names in rules for name in names.split()}


def test_linked_files_exist():
    links = [(page, link) for page, text in PAGES.items() for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text)]
    assert not [(page.name, link) for page, link in links if not (page.parent / link).exists()]


def test_there_are_commands_to_check():
    assert len(TSM) >= 20
    assert {"demo", "test", "serve", "check", "bench"} <= set(MAKE)
