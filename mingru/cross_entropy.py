"""Mean cross-entropy whose gradient takes the place of the logits.

So there is one tensor of the logits' size, where softmax, float32 copy and gradient would make three or four. N rows,
V tokens.
"""

import functools
from ctypes import CDLL, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version

from runtime.native import SUFFIXES, for_each_dtype, load_or_warn

ROWS = 4096  # that torch alone takes at a time


@functools.cache
def kernels() -> CDLL | None:
    """The compiled kernels; None where they cannot be had, which is said once."""
    signatures = {
        "cross_entropy_forward": (None, *[c_void_p] * 4, *[c_int64] * 2),
        "cross_entropy_backward": (None, *[c_void_p] * 4, *[c_int64] * 2),
    }
    return load_or_warn(
        Path(__file__).with_name("cross_entropy_native.c"),
        "the loss",
        "some three times slower",
        for_each_dtype(signatures),
    )


def cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """The mean over the rows in nats, float32, computed in float32; logits of any dtype, targets int64 in [0, V).

    The backward pass overwrites the logits, which nobody else may need; autograd refuses a second one.
    At least one row. On a CPU a target that is no token raises IndexError by the kernels, RuntimeError by torch.
    """
    native = logits_NV.is_cpu and logits_NV.dtype in SUFFIXES and kernels() is not None
    return (_NativeCrossEntropy if native else _CrossEntropy).apply(logits_NV, targets_N)


class _NativeCrossEntropy(torch.autograd.Function):
    """By the C kernels: float32 or bfloat16 on a CPU."""

    @staticmethod
    def forward(ctx, logits_NV: Tensor, targets_N: Tensor) -> Tensor:
        logits_NV, targets_N = logits_NV.contiguous(), targets_N.contiguous()
        tokens = logits_NV.shape[1]
        least, most = (int(bound) for bound in targets_N.aminmax())
        if least < 0 or most >= tokens:  # the kernel would read past its row
            raise IndexError(f"expected targets in [0, {tokens}), got some in [{least}, {most}]")
        norms_N, losses_N = torch.empty(2, len(targets_N)).unbind()
        _call("forward", logits_NV, targets_N, norms_N, losses_N)
        ctx.save_for_backward(logits_NV, targets_N, norms_N)
        return losses_N.mean(dtype=torch.float64).float()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        logits_NV, targets_N, norms_N = ctx.saved_tensors
        _call("backward", logits_NV, targets_N, norms_N, grad / len(targets_N))
        increment_version(logits_NV)
        return logits_NV, None


def _call(direction: str, logits_NV: Tensor, *tensors: Tensor) -> None:
    kernel = getattr(kernels(), f"cross_entropy_{direction}_{SUFFIXES[logits_NV.dtype]}")
    kernel(*(tensor.data_ptr() for tensor in (logits_NV, *tensors)), *logits_NV.shape)


class _CrossEntropy(torch.autograd.Function):
    """By torch alone, a few rows at a time."""

    @staticmethod
    def forward(ctx, logits_NV: Tensor, targets_N: Tensor) -> Tensor:
        total, norms = logits_NV.new_zeros((), dtype=torch.float64), []
        for rows_NV, wanted_N in zip(logits_NV.split(ROWS), targets_N.split(ROWS), strict=True):
            rows_NV = rows_NV.float()
            norms.append(rows_NV.logsumexp(dim=1))
            total += (norms[-1] - rows_NV.gather(1, wanted_N.unsqueeze(1)).squeeze(1)).sum(dtype=torch.float64)
        ctx.save_for_backward(logits_NV, targets_N, torch.cat(norms))
        return (total / len(targets_N)).float()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        logits_NV, targets_N, norms_N = ctx.saved_tensors
        scale = grad / len(targets_N)
        pieces = (tensor.split(ROWS) for tensor in (logits_NV, targets_N, norms_N))
        for rows_NV, wanted_N, norm_N in zip(*pieces, strict=True):
            share_NV = (rows_NV.float() - norm_N.unsqueeze(1)).exp_()
            share_NV.scatter_add_(1, wanted_N.unsqueeze(1), torch.full_like(norm_N, -1).unsqueeze(1))
            rows_NV.copy_(share_NV.mul_(scale))
        return logits_NV, None
