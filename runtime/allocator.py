"""The C library's allocator and the kernel, told how a program that computes uses memory."""

import ctypes
import mmap
import os
import re
from collections.abc import Iterable, Iterator

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h
_HUGE_PAGE = 2 * 1024 * 1024  # bytes
_MADV_COLLAPSE = 25  # of Linux 6.1 and later; Python 3.13 has no name for it


def keep_freed_memory() -> None:
    """From now on memory that is freed stays with the process, for what it allocates next, and lies in huge pages.

    A training step frees its tensors and allocates the same again; given back to the kernel in between, each page
    would be mapped and cleared anew at every step. The process takes a few percent more at its peak: what it keeps does
    not always fit what it asks for.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_TRIM_THRESHOLD, -1)  # never
    libc.mallopt(_M_MMAP_MAX, 0)
    _use_huge_pages(libc, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4)


def _use_huge_pages(libc: ctypes.CDLL, nbytes: int) -> None:
    """Let the heap's next `nbytes` lie in huge pages, where the kernel has them for programs that ask.

    A step reads and writes more memory than the processor's table of small pages holds addresses of. What is reserved
    here are addresses; memory is taken when it is written to. Where the kernel counts addresses as memory, or refuses
    them, pages stay small.
    """
    try:
        with open("/proc/sys/vm/overcommit_memory") as mode:
            counted = mode.read().strip() == "2"
    except OSError:  # a kernel that does not tell
        return
    if counted:
        return
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes, libc.madvise.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    start = libc.malloc(nbytes)
    if start is None:
        return
    first = -(-start // _HUGE_PAGE) * _HUGE_PAGE
    libc.madvise(first, (start + nbytes - first) // _HUGE_PAGE * _HUGE_PAGE, mmap.MADV_HUGEPAGE)
    libc.free(start)


def gather_in_huge_pages() -> None:
    """Move what the process has allocated so far into huge pages, where the kernel moves pages on request.

    What imports and preparations leave behind lies in small pages, wherever the machine had some free. Scattered over
    all of its memory, as they are once other processes have come and gone, they slow every step by up to a third
    (docs/experiments.md). Where the kernel refuses, pages stay where they are.
    """
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    try:
        with open("/proc/self/smaps", errors="surrogateescape") as areas:  # with the names of mapped files
            filled = list(_filled_areas(areas))
    except OSError:  # a kernel that does not tell
        return
    for start, stop in filled:
        first, last = -(-start // _HUGE_PAGE) * _HUGE_PAGE, stop // _HUGE_PAGE * _HUGE_PAGE
        if first < last:
            libc.madvise(first, last - first, _MADV_COLLAPSE)


def _filled_areas(smaps: Iterable[str]) -> Iterator[tuple[int, int]]:
    """Start and stop of the heap, and of private memory without a file that is more than half in use: not of stacks,
    which would grow to huge pages."""
    start = stop = 0
    for line in smaps:
        if head := re.match(r"(\w+)-(\w+) rw-p \w+ \S+ 0 *(\S*)$", line):
            start, stop, name = int(head[1], 16), int(head[2], 16), head[3]
            if name == "[heap]":
                yield start, stop
            if name:
                start = stop = 0
        elif re.match(r"\w+-\w+ ", line):
            start = stop = 0
        elif line.startswith("Rss:") and int(line.split()[1]) * 1024 * 2 > stop - start > 0:
            yield start, stop
