from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest
import torch

from pipelines.work_dir import BadStorage, CannotWrite, DamagedCheckpoint, OtherTraining, WorkDir

STATE = {"epoch": 3, "weights": {"a": torch.arange(4.0)}, "name": "x", "rows": [{"loss": 1.5}]}


@pytest.fixture(params=["folder", "uri"])
def place(request, tmp_path):
    path = tmp_path / "deep" / "run"
    return path if request.param == "folder" else path.as_uri()


def test_checkpoints_come_back(place):
    with WorkDir(place) as folder:
        assert folder.load_checkpoint() is None
        folder.save_checkpoint(STATE)
    with WorkDir(place) as folder:
        found = folder.load_checkpoint()
        assert torch.equal(found.pop("weights")["a"], STATE["weights"]["a"])
        assert found == {"epoch": 3, "name": "x", "rows": [{"loss": 1.5}]}
        folder.remove("last.pt")
    with WorkDir(place) as folder:
        assert folder.load_checkpoint() is None


def test_what_is_written_is_there_for_all(place, tmp_path):
    with WorkDir(place) as folder:
        folder.write("metrics.csv", lambda path: path.write_text("a,b\n"))
        events = folder.folder / "tensorboard" / "events.1"
        events.parent.mkdir()
        events.write_text("scalars")
        folder.publish("tensorboard")
    run = tmp_path / "deep" / "run"
    assert (run / "metrics.csv").read_text() == "a,b\n"
    assert (run / "tensorboard" / "events.1").read_text() == "scalars"
    assert not [path for path in run.rglob("*") if "part" in path.name]


def test_a_writer_that_fails_leaves_what_was_there(place):
    def half(path):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with WorkDir(place) as folder:
        folder.write("metrics.csv", lambda path: path.write_text("whole"))
        with pytest.raises(CannotWrite, match=r"metrics\.csv cannot be written \(No space left.*is kept"):
            folder.write("metrics.csv", half)
        with pytest.raises(CannotWrite, match="nothing was written"):
            folder.write("other.csv", half)
        assert folder.find("metrics.csv").read_text() == "whole"
        assert sorted(path.name for path in folder.folder.iterdir()) == ["metrics.csv"]


FULL = """
import resource, signal, sys, torch
from pipelines.work_dir import CannotWrite, WorkDir
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = WorkDir(sys.argv[1])
folder.save_checkpoint({"step": 1, "weights": torch.zeros(1000)})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    folder.save_checkpoint({"step": 2, "weights": torch.zeros(1_000_000)})
except CannotWrite as error:
    print(error)
print(folder.load_checkpoint()["step"])
"""


def test_full_disk_keeps_the_last_checkpoint(tmp_path):
    """A limit on the size of files stands for the disk's: torch meets it in the middle of its file."""
    command = [sys.executable, "-W", "ignore", "-c", FULL, str(tmp_path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=os.getcwd()).stdout
    assert "last.pt cannot be written (" in out
    assert out.endswith("the one before it is kept\n1\n")


def test_damaged_checkpoint_says_how_to_go_on(tmp_path):
    with WorkDir(tmp_path) as folder:
        folder.save_checkpoint(STATE)
        path = tmp_path / "last.pt"
        path.write_bytes(path.read_bytes()[:300])
        with pytest.raises(DamagedCheckpoint, match="--no-resume"):
            folder.load_checkpoint()


class Evil:
    def __reduce__(self):
        return os.system, ("true",)


def test_nothing_in_a_checkpoint_is_run(tmp_path):
    torch.save({"epoch": Evil()}, tmp_path / "last.pt")
    with WorkDir(tmp_path) as folder, pytest.raises(DamagedCheckpoint):
        folder.load_checkpoint()


def test_another_training_is_told_apart(place):
    run = {"recipe": {"frames": 8, "views": (1, 2)}, "seed": 0}
    with WorkDir(place) as folder:
        folder.check_run(run)
        folder.save_run(run)
        folder.check_run(run)
        with pytest.raises(
            OtherTraining, match=r"recipe\.frames 8 there, 16 here; seed 0 there, 1 here\. Name another"
        ):
            folder.check_run({"recipe": {"frames": 16, "views": (1, 2)}, "seed": 1})


HOLDS = """
import sys, time
from pipelines.work_dir import WorkDir
folder = WorkDir(sys.argv[1])
folder.lock()
print("locked", flush=True)
time.sleep(60)
"""


def test_one_training_at_a_time(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "locked\n"
        with WorkDir(tmp_path) as folder, pytest.raises(OtherTraining, match="going on"):
            folder.lock()
        threading.Timer(0.5, other.kill).start()
        with WorkDir(tmp_path) as folder:
            folder.lock(wait_s=20)  # for one that is ending
    finally:
        other.send_signal(signal.SIGKILL)
        other.communicate()
    with WorkDir(tmp_path) as folder:
        folder.lock()


def test_places_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWrite, match="cannot be made"):
        WorkDir(tmp_path / "file" / "run")
    with pytest.raises(BadStorage, match="nowhere://x cannot be written to"):
        WorkDir("nowhere://x")
