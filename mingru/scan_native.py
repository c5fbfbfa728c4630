"""The recurrence by a C kernel, compiled when first used: float32 and bfloat16 on the CPU.

Whatever the kernel cannot do (another dtype, no compiler) goes to the tiled loop.
"""

import functools
from ctypes import CDLL, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from mingru import scan_tiled
from mingru.scan_operators import register
from runtime.native import SUFFIXES, for_each_dtype, load_or_warn

SOURCE = Path(__file__).with_suffix(".c")


@functools.cache
def kernels() -> CDLL | None:
    """The compiled kernels; None where they cannot be had, which is said once."""
    signatures = {
        "scan_forward": (None, *[c_void_p] * 5, *[c_int64] * 4),
        "scan_backward": (None, *[c_void_p] * 8, *[c_int64] * 4),
    }
    signatures = {"scan_block": (c_int64, *[c_int64] * 3), **for_each_dtype(signatures)}
    return load_or_warn(SOURCE, "recurrence", "some four times slower", signatures)


def scan(projected_BT2E: Tensor, prev_hidden_BE: Tensor | None, reset_BT: Tensor | None) -> tuple[Tensor, Tensor]:
    """See mingru.scan.scan; on a CPU, differentiable once."""
    fits = projected_BT2E.dtype in SUFFIXES
    return (_scan if fits else scan_tiled.scan)(projected_BT2E, prev_hidden_BE, reset_BT)


def forward(projected_BT2E: Tensor, prev_hidden_BE: Tensor | None, reset_BT: Tensor | None) -> tuple[Tensor, Tensor]:
    """h_BTE in the input's dtype and the last h_BE in float32."""
    if kernels() is None:  # asked in here, where torch.compile does not look
        return scan_tiled.forward(projected_BT2E, prev_hidden_BE, reset_BT)
    B, T, E2 = projected_BT2E.shape
    projected_BT2E, first_BE, reset_BT = _ready(projected_BT2E), _state(prev_hidden_BE), _ready(reset_BT)
    h_BTE = projected_BT2E.new_empty(B, T, E2 // 2)
    last_BE = projected_BT2E.new_empty(B, E2 // 2, dtype=torch.float32)
    _call("scan_forward", projected_BT2E, first_BE, reset_BT, h_BTE, last_BE, like=h_BTE)
    return h_BTE, last_BE


def backward(
    grad_BTE: Tensor,
    grad_last_BE: Tensor,
    projected_BT2E: Tensor,
    h_BTE: Tensor,
    prev_hidden_BE: Tensor | None,
    reset_BT: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The gradients of projected_BT2E, in its dtype, and of the previous hidden state, in float32."""
    if kernels() is None:
        return scan_tiled.backward(grad_BTE, grad_last_BE, projected_BT2E, h_BTE, prev_hidden_BE, reset_BT)
    projected_BT2E, first_BE, reset_BT = _ready(projected_BT2E), _state(prev_hidden_BE), _ready(reset_BT)
    grad_BTE, grad_last_BE = _ready(grad_BTE), _state(grad_last_BE)
    grad_projected_BT2E, grad_first_BE = torch.empty_like(projected_BT2E), torch.empty_like(grad_last_BE)
    _call(
        "scan_backward", grad_BTE, grad_last_BE, projected_BT2E, h_BTE, first_BE, reset_BT, grad_projected_BT2E,
        grad_first_BE, like=h_BTE,
    )  # fmt: skip
    return grad_projected_BT2E, grad_first_BE


def _ready(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _state(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(torch.float32).contiguous()


def _call(name: str, *tensors: Tensor | None, like: Tensor) -> None:
    """Run a kernel over `tensors`, contiguous; like: the hidden states (B, T, E), whose shape and dtype it works in."""
    library, (B, T, E) = kernels(), like.shape
    block = library.scan_block(B, E, torch.get_num_threads())
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    getattr(library, f"{name}_{SUFFIXES[like.dtype]}")(*addresses, B, T, E, block)


_scan, scan_forward = register("native", forward, backward, device_types="cpu")
