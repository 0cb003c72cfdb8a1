"""Threads that wait for work after a computation are given back."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROBE = """
import os, torch
from lora_hub_sdk.models.openmp import give_threads_back

def threads():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(3)
before = threads()
x = torch.randn(600, 600)
want = x.exp() @ x
print(threads() - before)
give_threads_back()
print(threads() - before)
assert (x.exp() @ x).equal(want)  # new ones start
print(threads() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_threads_are_given_back() -> None:
    found = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True).stdout.split()
    assert found == ["2", "0", "2"]
