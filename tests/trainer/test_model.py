"""Memory of the trainer's process."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from espalier.trainer.model import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(4):  # the heap grows to what is needed
    torch.ones(1 << 24)  # 64 MB
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.ones(1 << 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what is set is glibc's")
def test_large_tensors_are_not_fetched_from_the_kernel_again_and_again():
    def faults(how):
        words = [sys.executable, "-P", "-c", FAULTS, how]
        return int(subprocess.run(words, capture_output=True, text=True, check=True, timeout=120).stdout)

    pages = 5 * (1 << 26) // 4096
    assert faults("keep") < pages / 100
    assert faults("as it is") > pages / 100, "control: that is what happens without"
