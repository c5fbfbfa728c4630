"""Host memory that stays in its place, so that a GPU copies from and to it without holding up the caller."""

import mmap
import weakref

import torch
from torch import Tensor

from runtime.errors import UserError

_PORTABLE = 1  # cudaHostRegisterPortable, hipHostRegisterPortable: locked for all devices


def page_locked(nbytes: int, owner: object) -> Tensor:
    """`nbytes` zeros (uint8), which stay locked until `owner` goes.

    In as many whole pages as it takes: torch's pin_memory rounds up to a power of two. Raises UserError where the host
    cannot lock so much.
    """
    try:
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise _refused(nbytes, error.strerror) from None
    flat = torch.frombuffer(pages, dtype=torch.uint8)  # which keeps the pages
    status = int(torch.cuda.cudart().cudaHostRegister(flat.data_ptr(), nbytes, _PORTABLE))
    if status != 0:
        raise _refused(nbytes, f"its runtime's error {status}")
    # Called before the owner's tensors go. At the end of the process the system does it.
    weakref.finalize(owner, _unlock, flat.data_ptr()).atexit = False
    return flat


def _refused(nbytes: int, got: str) -> UserError:
    return UserError(
        f"expected to lock {nbytes / 2**30:.2f} GiB of host memory for a GPU's copies, got {got}: choose smaller "
        "--params, or fewer ranks a host"
    )


def _unlock(address: int) -> None:
    status = int(torch.cuda.cudart().cudaHostUnregister(address))
    assert status == 0, f"cudaHostUnregister: error {status}"
