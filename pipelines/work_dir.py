"""The folder of one training: on this machine, or behind a URI (s3://, gs://) with a local copy of what is written.

Every file is there whole or not at all, whatever stops the program that writes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import torch
from safetensors import SafetensorError

from tsm_core.errors import CallerError, WorldError

RUN, LAST = "run.json", "last.pt"
CHUNK_BYTES = 1 << 22


class OtherTraining(CallerError):
    """The folder holds another training, or one that is going on."""

    reason = "other_training"


class BadStorage(CallerError):
    """An address that cannot be written to."""

    reason = "bad_storage"


class CannotWrite(WorldError):
    """A file cannot be written; what was there before is still there."""

    reason = "cannot_write"


class DamagedCheckpoint(CallerError):
    """A checkpoint cannot be read."""

    reason = "damaged_checkpoint"


def is_uri(place: str | Path) -> bool:
    """Whether a place is a URI and not a folder."""
    return "://" in str(place)


class WorkDir:
    """The folder; `folder` is where it, or its copy, lies on this machine. Close it, or use it in a `with`.

    Raises BadStorage, CannotWrite.
    """

    def __init__(self, place: str | Path) -> None:
        self.place = str(place)
        self._filesystem: Any = None
        self._lock: BinaryIO | None = None
        if is_uri(place):
            try:
                filesystem = importlib.import_module("pyarrow.fs").FileSystem
                self._filesystem, self._base = filesystem.from_uri(self.place.rstrip("/"))
                self._filesystem.create_dir(self._base, recursive=True)
            except (OSError, ValueError) as error:
                raise BadStorage(f"{place} cannot be written to: {error}; a local folder, s3:// or gs:// can") from None
            self.folder = Path(tempfile.mkdtemp(prefix="tsm-training-"))
        else:
            self.folder = Path(place)
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise CannotWrite(f"{place} cannot be made: {error.strerror}") from None

    def lock(self, wait_s: float = 0.0) -> None:
        """Keep other trainings on this machine out; waits a while for one that is ending. Raises OtherTraining."""
        if self._filesystem is not None:
            return
        deadline_s = time.monotonic() + wait_s
        try:
            self._lock = (self.folder / ".lock").open("wb")
            while True:
                try:
                    fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of the process, not of its children
                    return
                except BlockingIOError:
                    if time.monotonic() >= deadline_s:
                        raise
                time.sleep(0.2)
        except BlockingIOError:
            raise OtherTraining(f"another training is going on in {self.place}; name another --work-dir") from None
        except OSError as error:
            raise CannotWrite(f"{self.place} cannot be written to: {error.strerror}") from None

    def write(self, name: str, writer: Callable[[Path], object]) -> Path:
        """Have `writer` write a file of this name; its path here. Raises CannotWrite."""
        target = self.folder / name
        part = target.with_name(f".{target.name}.part")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            writer(part)
            with part.open("rb") as file:
                os.fsync(file.fileno())
            part.replace(target)
            self.publish(name)
        except (OSError, RuntimeError, SafetensorError) as error:  # of Python, torch and safetensors
            why = getattr(error, "strerror", None) or str(error).splitlines()[0]
            kept = "the one before it is kept" if target.exists() else "nothing was written"
            raise CannotWrite(f"{self.place}/{name} cannot be written ({why}); {kept}") from None
        finally:
            part.unlink(missing_ok=True)
        return target

    def publish(self, name: str) -> None:
        """Bring a file of the local copy, or a folder of such, to its place behind the URI."""
        if self._filesystem is None:
            return
        source = self.folder / name
        for path in sorted(source.rglob("*")) if source.is_dir() else [source]:
            if path.is_file():
                self._send(path, f"{self._base}/{path.relative_to(self.folder)}")

    def _send(self, path: Path, target: str) -> None:
        # object stores show a file when it is whole; a file system shows it under another name until then
        local = self._filesystem.type_name == "local"
        if local:
            self._filesystem.create_dir(target.rpartition("/")[0], recursive=True)
        part = f"{target}.part" if local else target
        with path.open("rb") as file, self._filesystem.open_output_stream(part) as out:
            shutil.copyfileobj(file, out, CHUNK_BYTES)
        if local:
            self._filesystem.move(part, target)

    def find(self, name: str) -> Path | None:
        """The file of this name on this machine; None: there is none."""
        path = self.folder / name
        if self._filesystem is not None:
            try:
                source = self._filesystem.open_input_stream(f"{self._base}/{name}")
            except FileNotFoundError:
                return None
            path.parent.mkdir(parents=True, exist_ok=True)
            with source, path.open("wb") as file:
                shutil.copyfileobj(source, file, CHUNK_BYTES)
        return path if path.is_file() else None

    def remove(self, name: str) -> None:
        """Take away a file, or a folder of files, if it is there."""
        path = self.folder / name
        if self._filesystem is not None:
            with contextlib.suppress(FileNotFoundError):
                self._filesystem.delete_file(f"{self._base}/{name}")
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)

    # --- what is in it

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Write what a training goes on from: tensors and plain values. Raises CannotWrite."""
        self.write(LAST, lambda path: torch.save(state, path))

    def load_checkpoint(self) -> dict[str, Any] | None:
        """What `save_checkpoint` wrote; nothing in it is run. Raises DamagedCheckpoint."""
        path = self.find(LAST)
        if path is None:
            return None
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # noqa: BLE001  a damaged pickle fails in any way
            raise DamagedCheckpoint(
                f"{self.place}/{LAST} cannot be read ({str(error).splitlines()[0][:200]}); "
                "--no-resume begins anew in its place"
            ) from None
        return state

    def check_run(self, run: Mapping[str, Any]) -> None:
        """Raises OtherTraining that names what differs, where the folder is another training's."""
        path = self.find(RUN)
        if path is None:
            return
        try:
            theirs = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            theirs = {}
        differ = _differences(theirs, json.loads(json.dumps(run)))
        if differ:
            raise OtherTraining(
                f"{self.place} holds another training: {'; '.join(differ)}. Name another --work-dir, or --no-resume to "
                "begin anew in this one"
            )

    def save_run(self, run: Mapping[str, Any]) -> None:
        """Say whose folder this is."""
        self.write(RUN, lambda path: path.write_text(json.dumps(run, indent=1), encoding="utf-8"))

    def close(self) -> None:
        """Let go of the folder; what was written stays."""
        if self._lock is not None:
            self._lock.close()
        if self._filesystem is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _differences(theirs: Any, ours: Any, name: str = "") -> list[str]:
    """What differs, by its dotted name."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        return [
            line
            for key in {**ours, **theirs}
            for line in _differences(theirs.get(key), ours.get(key), f"{name}.{key}" if name else key)
        ]
    return [] if theirs == ours else [f"{name} {_short(theirs)} there, {_short(ours)} here"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
