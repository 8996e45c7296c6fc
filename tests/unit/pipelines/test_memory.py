"""Memory is used again: in a process of its own, as it stays so."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource
import torch
from pipelines.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(50 << 20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
usual = faults()
assert keep_freed_memory()
print(usual, [faults() for _ in range(8)][-1])
"""


def test_large_blocks_come_from_the_system_once():
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("another C library")
    said = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True).stdout
    usual, kept = map(int, said.split())
    assert usual > 10 * max(1, kept)
