"""The passes over a whole state in C: a merge, and what a received one is checked for."""

import functools
from ctypes import CDLL, c_double, c_float, c_int, c_int64, c_void_p
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from runtime.native import load_or_warn


@functools.cache
def kernels() -> CDLL | None:
    """The compiled kernels; None where they cannot be had, which is said once."""
    signatures = {
        "merge_piece": (None, *[c_void_p] * 3, c_int64, c_float, c_int, c_void_p),
        "extremes": (None, c_void_p, c_int64, c_void_p),
        "energy": (c_double, c_void_p, c_int64),
        "narrow": (None, c_void_p, c_void_p, c_int64),
        "widen": (None, c_void_p, c_void_p, c_int64),
    }
    return load_or_warn(Path(__file__).with_suffix(".c"), "merging", "slower", signatures)


def can_merge(*tensors: Tensor | None) -> bool:
    """Whether merge_piece() takes these."""
    known = [tensor for tensor in tensors if tensor is not None]
    plain = all(t.dtype == torch.float32 and t.device.type == "cpu" and t.is_contiguous() for t in known)
    return plain and kernels() is not None


def merge_piece(live: Tensor, peer: Tensor, own: Tensor | None, share: float, whole: bool) -> tuple[float, float]:
    """live += share * (peer - own), own None: live stands for it; whole: live = peer. Afterwards `peer` holds what was
    overwritten. Returns the sums of squares of peer - own and of live before."""
    energies = (c_double * 2)()
    addresses = (None if tensor is None else tensor.data_ptr() for tensor in (live, peer, own))
    kernels().merge_piece(*addresses, live.numel(), share, whole, energies)
    return energies[0], energies[1]


def extremes(values: np.ndarray) -> tuple[float, float]:
    """The least and the greatest of some float32 values; both NaN where there is one. Any thread may call it."""
    found = (c_float * 2)()
    kernels().extremes(values.ctypes.data, values.size, found)
    return found[0], found[1]


def energy(values: np.ndarray) -> float:
    """The sum of the squares of float32 values, inf where single precision cannot hold it. Any thread may call it."""
    return kernels().energy(values.ctypes.data, values.size)


def narrow(values: Tensor, rounded: Tensor) -> None:
    """Round float32 `values` to as many bfloat16. Any thread may call it, and starts no others where there is a
    compiler: on a busy machine it would wait for them, ten times as long."""
    if kernels() is None:
        rounded.copy_(values)
    else:
        kernels().narrow(values.data_ptr(), rounded.data_ptr(), len(values))


def widen(rounded: Tensor, values: Tensor) -> None:
    """The way back, likewise."""
    if kernels() is None:
        values.copy_(rounded)
    else:
        kernels().widen(rounded.data_ptr(), values.data_ptr(), len(values))
