"""How far an evaluation is: a bar on a terminal, now and then a line in a log."""

from __future__ import annotations

import shutil
import sys
import time
from datetime import timedelta
from types import TracebackType
from typing import Any, Self, TextIO

from tqdm import tqdm

from pipelines.evaluate import Facts

LINE_S = 10.0


class ProgressBar:
    """An `on_progress` that shows videos done, pace, time left and top-1 so far; close it, or use it in a `with`."""

    def __init__(self, file: TextIO | None = None, *, line_s: float = LINE_S) -> None:
        self._file = file or sys.stderr
        self._line_s, self._told_s = line_s, -float("inf")
        self._bar: Any = None

    def __call__(self, done: int, total: int, facts: Facts) -> None:
        """Show it."""
        judged = [] if facts.top1 is None else [f"top-1 {100 * facts.top1:.2f} %"]
        skipped = [f"{facts.skipped} skipped"] if facts.skipped else []
        words = ", ".join([*judged, *skipped])
        if not self._file.isatty():
            self._line(done, total, facts, words)
            return
        if self._bar is None:
            columns, rows = shutil.get_terminal_size()  # tqdm shows nothing where the terminal says 0
            self._bar = tqdm(total=total, initial=done, unit="video", file=self._file, ncols=columns, nrows=rows)
        self._bar.set_postfix_str(words, refresh=False)
        self._bar.update(done - self._bar.n)

    def _line(self, done: int, total: int, facts: Facts, words: str) -> None:
        now = time.monotonic()
        if now - self._told_s < self._line_s and done < total:
            return
        self._told_s = now
        left = "" if facts.eta_s is None or done == total else f", {timedelta(seconds=round(facts.eta_s))} left"
        pace = f", {facts.videos_per_s:.2f} videos/s" if facts.videos_per_s else ""
        said = f", {words}" if words else ""
        print(f"{done}/{total} videos{pace}{left}{said}", file=self._file, flush=True)

    def close(self) -> None:
        """Leave the bar as it is and go to the next line."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
