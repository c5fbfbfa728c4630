"""Memory that is freed stays with the process when it was told so, and lies in huge pages."""

import ctypes
import json
import mmap
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.allocator import _MADV_COLLAPSE, _filled_areas

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


GATHER = """
import json, mmap, os, sys, tempfile, threading
import torch
with tempfile.TemporaryDirectory() as folder, open(os.path.join(os.fsencode(folder), b"caf\\xe9"), "w+b") as file:
    file.write(b"a file whose name is no UTF-8 is listed with the memory")
    file.flush()
    mapped = mmap.mmap(file.fileno(), 0)
from runtime.allocator import gather_in_huge_pages, keep_freed_memory
def kilobytes():
    lines = [line.split() for line in open("/proc/self/smaps_rollup")]
    return {line[0][:-1]: int(line[1]) for line in lines if line[2:] == ["kB"]}
idle = [threading.Thread(target=threading.Event().wait, daemon=True) for _ in range(50)]
for thread in idle:
    thread.start()
small = [bytes(1000) + bytes([number % 256]) for number in range(50_000)]
before, digest = kilobytes(), hash(tuple(small))
gather_in_huge_pages()
after = kilobytes()
assert hash(tuple(small)) == digest
print(json.dumps([before, after]))
"""


def collapses():
    """Whether this kernel moves pages into huge ones on request."""
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    huge = 2 * 2**20
    with mmap.mmap(-1, 2 * huge, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        area[:] = bytes(len(area))
        start = ctypes.addressof(ctypes.c_char.from_buffer(area))
        return libc.madvise(-(-start // huge) * huge, huge, _MADV_COLLAPSE) == 0


def test_gather_in_huge_pages_moves_what_is_there_and_takes_little_more():
    if not collapses():
        pytest.skip("needs a kernel that gathers pages on request (Linux 6.1)")
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", GATHER], cwd=root, capture_output=True, text=True, check=True)
    before, after = json.loads(done.stdout)
    assert before["AnonHugePages"] < 0.2 * before["Anonymous"]
    assert after["AnonHugePages"] > 0.7 * after["Anonymous"]
    assert after["Rss"] < before["Rss"] + 16 * 1024  # fifty stacks of idle threads among it


def test_filled_areas_are_the_heap_and_private_memory_in_use():
    smaps = """\
55d000000000-55d000100000 rw-p 00000000 00:00 0                          [heap]
Size:               1024 kB
Rss:                   4 kB
7f0000000000-7f0000100000 rw-p 00000000 00:00 0
Size:               1024 kB
Rss:                 900 kB
7f1000000000-7f1000100000 rw-p 00000000 00:00 0 \n\
Size:               1024 kB
Rss:                   8 kB
7f2000000000-7f2000100000 r--p 00000000 00:00 0
Rss:                1024 kB
7f3000000000-7f3000100000 rw-p 00001000 fe:00 1234                       /lib/x.so
Rss:                1024 kB
7ffc00000000-7ffc00100000 rw-p 00000000 00:00 0                          [stack]
Rss:                1024 kB
"""
    heap, used = (0x55D000000000, 0x55D000100000), (0x7F0000000000, 0x7F0000100000)
    assert list(_filled_areas(smaps.splitlines(keepends=True))) == [heap, used]
