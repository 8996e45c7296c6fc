"""The journal: what was appended comes back, whatever was cut off; and it belongs to one evaluation."""

import json
import subprocess
import sys

import pytest

from pipelines.journal import Journal, OtherJournal, Prediction

IDENTITY = {"recipe": "a", "views": [1, 2]}
ONE = [
    Prediction(0, "x/a.mp4", 3, ((3, 0.1 + 0.2), (1, 1 / 3))),
    Prediction(1, "x/b.mp4", 1, error="x/b.mp4 is empty"),
]
TWO = [Prediction(2, "x/c.mp4", 0, ((0, 1.0),))]


def everything(journal):
    with journal:
        return [journal.found[index] for index in sorted(journal.found)]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "result.json.journal"
    with Journal(path, IDENTITY) as journal:
        journal.append(ONE)
        journal.append(TWO)
    return path


def test_what_was_appended_comes_back_to_the_bit(path):
    assert everything(Journal(path, IDENTITY, resume=True)) == [*ONE, *TWO]
    assert everything(Journal(path, IDENTITY, resume=True)) == [*ONE, *TWO]


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_an_unfinished_line_is_dropped_and_written_over(path, cut):
    path.write_bytes(path.read_bytes()[:-cut])
    with Journal(path, IDENTITY, resume=True) as journal:
        assert list(journal.found.values()) == ONE
        journal.append(TWO)
    assert everything(Journal(path, IDENTITY, resume=True)) == [*ONE, *TWO]


@pytest.mark.parametrize("kept", [0, 5])
def test_a_journal_that_had_hardly_begun_begins_anew(path, kept):
    path.write_bytes(path.read_bytes()[:kept])
    assert everything(Journal(path, IDENTITY, resume=True)) == []
    assert json.loads(path.read_text())["recipe"] == "a"


def test_without_resume_it_begins_anew(path):
    assert everything(Journal(path, IDENTITY)) == []
    assert everything(Journal(path, IDENTITY, resume=True)) == []


def test_another_evaluation_is_refused_by_what_differs(path):
    before = path.read_bytes()
    with pytest.raises(OtherJournal, match=r"something else: views \[1, 2\] there, \[3\] here; list None there"):
        Journal(path, {"recipe": "a", "views": [3], "list": "x"}, resume=True)
    assert path.read_bytes() == before


def test_damage_in_the_middle_is_told(path):
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"[{\n" + lines[2])
    with pytest.raises(OtherJournal, match="line 2 is damaged"):
        Journal(path, IDENTITY, resume=True)


def test_two_runs_do_not_share_a_journal(path):
    code = "import sys; from pipelines.journal import Journal; Journal(sys.argv[1], {'recipe': 'a', 'views': [1, 2]})"
    with Journal(path, IDENTITY, resume=True):
        second = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert "is being written by another evaluation" in second.stderr
    assert everything(Journal(path, IDENTITY, resume=True)) == [*ONE, *TWO]
