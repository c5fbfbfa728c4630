"""Memory that is out, which torch tells in other words than Python."""

import contextlib
from collections.abc import Iterator

# In a RuntimeError's text: torch on a CPU, torch on a GPU (whose OutOfMemoryError is one), a driver without room even
# for its own part, cuBLAS or hipBLAS without room for its workspace, and Python without room for a thread's stack.
_SAYINGS = (
    "DefaultCPUAllocator: can't allocate memory", "out of memory", "STATUS_ALLOC_FAILED", "can't start new thread",
)  # fmt: skip


@contextlib.contextmanager
def as_memory_error() -> Iterator[None]:
    """Whatever says in the block that memory is out is raised as MemoryError, with the first line of what it said."""
    try:
        yield
    except RuntimeError as error:
        if any(saying in str(error) for saying in _SAYINGS):
            raise MemoryError(str(error).partition("\n")[0]) from error
        raise
