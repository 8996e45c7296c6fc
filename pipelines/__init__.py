"""Pixels from disks and cameras, tracks and training."""

import os

# Read as torch is imported. OpenMP's threads spin while they wait for work, by default, and take the cores of whoever
# does work beside them, most of all of the processes that read frames.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
