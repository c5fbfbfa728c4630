"""Dropout that costs little on a CPU: 16 random bits an element, drawn again in the backward pass, so nothing is kept.

Where its C kernel cannot work (another device or dtype, a compiler that fuses by itself) it is torch's own.
"""

import functools
from ctypes import CDLL, c_float, c_int32, c_int64, c_void_p
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from runtime.native import load_or_warn

STEPS = 2**16  # in which the share that is kept can be chosen


@functools.cache
def kernels() -> CDLL | None:
    """The compiled kernel; None where it cannot be had, which is said once."""
    signatures = {
        "dropout": (None, *[c_void_p] * 2, *[c_int64] * 2, c_int32, c_float),
    }
    return load_or_warn(Path(__file__).with_name("dropout_native.c"), "dropout", "some five times slower", signatures)


def dropout(x: Tensor, chance: float) -> Tensor:
    """x with each element zeroed with the chance in [0, 1), the others divided by the share that is kept.

    That share is the multiple of 1 / STEPS nearest to 1 - chance, and at least one of them, so the mean is kept at any
    chance. The seed comes from torch's generator of the device: its state tells what is drawn next.
    """
    native = x.is_cpu and x.dtype in (torch.float32, torch.bfloat16) and not torch.compiler.is_compiling()
    if not native or kernels() is None:
        return F.dropout(x, chance)
    kept = max(1, round((1 - chance) * STEPS))
    return _NativeDropout.apply(x.float(), kept).to(x.dtype)


class _NativeDropout(torch.autograd.Function):
    """By the C kernel: float32 on a CPU."""

    @staticmethod
    def forward(ctx, x: Tensor, kept: int) -> Tensor:
        ctx.seed_and_kept = int(torch.empty((), dtype=torch.int64).random_()), kept
        return _drop(x, *ctx.seed_and_kept)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return _drop(grad, *ctx.seed_and_kept), None


def _drop(x: Tensor, seed: int, kept: int) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    kernels().dropout(x.data_ptr(), out.data_ptr(), x.numel(), seed, kept, STEPS / kept)
    return out
