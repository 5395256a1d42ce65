"""What the trainer's process keeps of the memory that it freed."""

import platform
import subprocess
import sys

import pytest

TENSORS = """
import resource, sys
import psutil, torch
from espalier.trainer.memory import hand_back, keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(16):  # the heap grows until what is freed beside small pieces serves
    torch.ones(1 << 24)  # 64 MB
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.ones(1 << 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
held = psutil.Process().memory_info().rss
for share in (0.9, 0.0):
    hand_back(share)
    print(held - psutil.Process().memory_info().rss)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what is set is glibc's")
def test_large_tensors_are_not_fetched_from_the_kernel_again_and_again():
    def run(how):
        words = [sys.executable, "-P", "-c", TENSORS, how]
        done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120)
        return [int(line) for line in done.stdout.split()]

    pages = 5 * (1 << 26) // 4096
    faults, handed_back, handed_back_all = run("keep")
    assert faults < pages / 100
    assert handed_back < 1 << 20, "it is not too much"
    assert handed_back_all > 0.9 * (1 << 26)
    assert run("as it is")[0] > pages / 100, "control: that is what happens without"
