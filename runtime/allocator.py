"""The C library's allocator, told how a program that computes uses memory."""

import ctypes
import mmap
import os

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h
_HUGE_PAGE = 2 * 1024 * 1024  # bytes


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
    with open("/proc/sys/vm/overcommit_memory") as mode:
        if mode.read().strip() == "2":
            return
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes, libc.madvise.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    start = libc.malloc(nbytes)
    if start is None:
        return
    first = -(-start // _HUGE_PAGE) * _HUGE_PAGE
    libc.madvise(first, (start + nbytes - first) // _HUGE_PAGE * _HUGE_PAGE, mmap.MADV_HUGEPAGE)
    libc.free(start)
