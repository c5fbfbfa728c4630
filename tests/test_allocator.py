"""Memory that is freed stays with the process when it was told so."""

import subprocess
import sys
from pathlib import Path

CODE = """
import resource, sys
import torch
from runtime.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def step():
    tensors = [torch.ones(12 * 2**20) for _ in range(2)]
for _ in range(20):  # until the heap has room for both, however it was cut
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_keep_freed_memory_spares_page_faults():
    root = Path(__file__).parent.parent
    faults = {
        mode: int(subprocess.run([sys.executable, "-c", CODE, mode], cwd=root, capture_output=True, text=True).stdout)
        for mode in ("plain", "keep")
    }
    assert faults["plain"] > 20 * max(1, faults["keep"])
