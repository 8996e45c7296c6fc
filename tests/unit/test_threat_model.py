"""Every line of the threat model names a test that there is."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "threat-model.md"


def test_what_stands_against_a_threat_is_tested():
    files = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", PAGE.read_text())
    assert len(named) > 30
    missing = [f"{file}::{test}" for file, test in named if f"def {test}(" not in files.get(file, "")]
    assert not missing


def test_every_threat_has_its_test():
    rows = re.findall(r"^\| (?!threat |who |--).* \|$", PAGE.read_text().partition("## Threats")[2], re.MULTILINE)
    assert len(rows) > 20
    assert not [row for row in rows if not re.search(r"`test_\w+\.py::test_\w+`", row) and "|---|" not in row]


def test_the_page_leads_to_pages_that_there_are():
    links = re.findall(r"\]\(([\w./-]+)\)", PAGE.read_text())
    assert links
    assert not [link for link in links if not (PAGE.parent / link).exists()]
