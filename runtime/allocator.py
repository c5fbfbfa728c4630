"""The C library's allocator, told how a program that computes uses memory."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """From now on memory that is freed stays with the process, for what it allocates next.

    A training step frees its tensors and allocates the same again; given back to the kernel in between, each page
    would be mapped and cleared anew at every step. The process takes a few percent more at its peak: what it keeps does
    not always fit what it asks for.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(_M_MMAP_MAX, 0)
