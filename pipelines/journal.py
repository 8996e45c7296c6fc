"""What an evaluation has found so far, on disk as it is found, so that a run that was killed can go on."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tsm_core.errors import CallerError, WorldError

FORMAT = "tsm-evaluation/1"
FLUSH_S = 10.0  # what is younger may be lost with the machine, not with the process


class OtherJournal(CallerError):
    """The journal was begun for something else, or another run writes it."""

    reason = "other_journal"


class JournalFailed(WorldError):
    """The journal cannot be written."""

    reason = "journal_failed"


@dataclass(frozen=True, slots=True)
class Prediction:
    """What one video gave: (class, probability) of its first five, best first, or the error that says why nothing."""

    index: int
    path: str
    label: int
    top: tuple[tuple[int, float], ...] = ()
    error: str | None = None


class Journal:
    """A file of JSON lines: what is evaluated, then a line for each group of videos; only one run at a time has it.

    identity: names and values that must be the same for a run to go on. resume: take over what is there, else begin
    anew. A line that a killed run left unfinished is dropped. Raises OtherJournal, which names what differs.
    """

    def __init__(self, path: Path | str, identity: Mapping[str, Any], *, resume: bool = False) -> None:
        self.path = Path(path)
        self.found: dict[int, Prediction] = {}
        self._flushed_s = time.monotonic()
        try:
            self._file = self.path.open("a+b", buffering=0)
        except OSError as error:
            raise JournalFailed(f"journal {path} cannot be written: {error.strerror}") from None
        try:
            # of the process, not inherited by those that it forks to decode
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):  # else the file system knows no locks
                self._file.close()
                raise OtherJournal(f"{path} is being written by another evaluation; name another --out") from None
        try:
            self._begin({"format": FORMAT, **identity}, resume)
        except BaseException:
            self._file.close()
            raise

    def _begin(self, identity: dict[str, Any], resume: bool) -> None:
        self._file.seek(0)
        lines = self._file.read().splitlines(keepends=True) if resume else []
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()
        if not lines:
            self._file.truncate(0)
            self._write(identity)
            return
        self._compare(self._parsed(lines[0], 1), json.loads(json.dumps(identity)))
        for number, line in enumerate(lines[1:], 2):
            for each in self._parsed(line, number):
                top = tuple((int(index), float(share)) for index, share in each["top"])
                self.found[each["index"]] = Prediction(**{**each, "top": top})
        self._file.truncate(sum(map(len, lines)))

    def _parsed(self, line: bytes, number: int) -> Any:
        try:
            return json.loads(line)
        except ValueError:
            raise OtherJournal(f"{self.path}, line {number} is damaged; remove the file and begin anew") from None

    def _compare(self, theirs: Any, ours: dict[str, Any]) -> None:
        found = theirs if isinstance(theirs, dict) else {}
        differ = [name for name in {**ours, **found} if ours.get(name) != found.get(name)]
        if differ:
            told = "; ".join(f"{name} {found.get(name)!r} there, {ours.get(name)!r} here" for name in differ)
            raise OtherJournal(f"{self.path} was begun for something else: {told}. Leave out --resume to begin anew")

    def append(self, predictions: Sequence[Prediction]) -> None:
        """Add a group, whole or not at all. Raises JournalFailed."""
        self._write([asdict(each) for each in predictions])
        self.found.update((each.index, each) for each in predictions)

    def _write(self, content: Any) -> None:
        try:
            line = json.dumps(content).encode() + b"\n"
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if time.monotonic() - self._flushed_s > FLUSH_S:
                os.fsync(self._file.fileno())
                self._flushed_s = time.monotonic()
        except OSError as error:
            raise JournalFailed(f"journal {self.path} cannot be written: {error.strerror}") from None

    def close(self) -> None:
        """Let go of the file; it stays."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
