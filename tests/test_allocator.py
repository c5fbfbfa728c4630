"""Memory that is freed stays with the process when it was told so, and lies in huge pages."""

import subprocess
import sys
from pathlib import Path

import pytest

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


FIRST = """
import resource, sys
import torch
from runtime.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(12 * 2**20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    not HUGE_PAGES.exists() or "[madvise]" not in HUGE_PAGES.read_text(),
    reason="needs a kernel that gives huge pages to those who ask",
)
def test_keep_freed_memory_takes_new_memory_in_huge_pages():
    """48 MB are 12,288 small pages and 24 huge ones."""
    faults = {mode: run(FIRST, mode) for mode in ("plain", "keep")}
    assert faults["plain"] > 12_000 and faults["keep"] < 1_000


def run(code, mode):
    root = Path(__file__).parent.parent
    return int(subprocess.run([sys.executable, "-c", code, mode], cwd=root, capture_output=True, text=True).stdout)


def test_keep_freed_memory_spares_page_faults():
    faults = {mode: run(CODE, mode) for mode in ("plain", "keep")}
    assert faults["plain"] > 20 * max(1, faults["keep"])
