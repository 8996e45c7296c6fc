"""The bar on a terminal and the lines of a log."""

import io

from pipelines.evaluate import Facts
from pipelines.progress import ProgressBar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(file: io.StringIO, **more: float) -> str:
    with ProgressBar(file, **more) as bar:
        bar(2, 8, Facts(0, None, 0.0, None))
        bar(5, 8, Facts(1, 0.75, 3.0, 3661.2))
        bar(8, 8, Facts(1, 0.5, 4.0, 0.0))
    return file.getvalue()


def test_a_log_gets_lines():
    assert run(io.StringIO(), line_s=0.0).splitlines() == [
        "2/8 videos",
        "5/8 videos, 3.00 videos/s, 1:01:01 left, top-1 75.00 %, 1 skipped",
        "8/8 videos, 4.00 videos/s, top-1 50.00 %, 1 skipped",
    ]


def test_lines_are_few_but_the_last_is_there():
    assert [line.split()[0] for line in run(io.StringIO(), line_s=60.0).splitlines()] == ["2/8", "8/8"]


def test_a_terminal_gets_a_bar():
    shown = run(Terminal())
    assert "2/8" in shown
    last = shown.rstrip().rpartition("\r")[2]
    assert "100%" in last
    assert "8/8" in last
    assert "top-1 50.00 %, 1 skipped" in last
    assert shown.endswith("\n")
