"""Root-mean-square normalisation with a gradient worked out by hand where torch has no fused kernel for it."""

import functools
from ctypes import CDLL, c_float, c_int64, c_void_p
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mingru.precision import product_dtype
from runtime.native import SUFFIXES, for_each_dtype, load_or_warn

EPSILON = torch.finfo(torch.float32).eps  # the one torch.nn.RMSNorm takes for float32


@functools.cache
def kernels() -> CDLL | None:
    """The compiled kernels; None where they cannot be had, which is said once."""
    signatures = {
        "norm_forward": (None, *[c_void_p] * 4, *[c_int64] * 2, c_float),
        "norm_backward": (None, *[c_void_p] * 6, *[c_int64] * 3),
    }
    return load_or_warn(
        Path(__file__).with_name("norm_native.c"),
        "normalisation",
        "some three times slower",
        for_each_dtype(signatures),
    )


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, as torch.nn.RMSNorm(dim)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x_BTD: Tensor) -> Tensor:
        if x_BTD.is_cuda:
            return F.rms_norm(x_BTD, self.weight.shape, self.weight, EPSILON)
        dtype = torch.promote_types(x_BTD.dtype, torch.float32)  # sums of squares need it
        # A compiler fuses the plain formula by itself, and could not look into the kernels.
        native = dtype == torch.float32 and not torch.compiler.is_compiling() and kernels() is not None
        if native and (out := product_dtype(x_BTD)) in SUFFIXES:
            return _NativeRMSNorm.apply(x_BTD.to(dtype), self.weight.to(dtype), out)
        return _RMSNorm.apply(x_BTD.to(dtype), self.weight.to(dtype)).to(x_BTD.dtype)


class _NativeRMSNorm(torch.autograd.Function):
    """By the C kernels: from float32 to float32 or bfloat16 on a CPU."""

    @staticmethod
    def forward(ctx, x_BTD: Tensor, weight_D: Tensor, dtype: torch.dtype) -> Tensor:
        x_BTD, weight_D = x_BTD.contiguous(), weight_D.contiguous()
        out_BTD, scale_BT = torch.empty_like(x_BTD, dtype=dtype), x_BTD.new_empty(x_BTD.shape[:-1])
        addresses = (tensor.data_ptr() for tensor in (x_BTD, weight_D, out_BTD, scale_BT))
        kernel = getattr(kernels(), f"norm_forward_{SUFFIXES[dtype]}")
        kernel(*addresses, scale_BT.numel(), len(weight_D), EPSILON)
        ctx.save_for_backward(x_BTD, weight_D, scale_BT)
        return out_BTD

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BTD: Tensor) -> tuple[Tensor, Tensor, None]:
        x_BTD, weight_D, scale_BT = ctx.saved_tensors
        grad_BTD, threads = grad_BTD.contiguous(), torch.get_num_threads()
        grad_x_BTD, partial_ND = torch.empty_like(x_BTD), x_BTD.new_zeros(threads, len(weight_D))
        tensors = (grad_BTD, x_BTD, weight_D, scale_BT, grad_x_BTD, partial_ND)
        addresses = (tensor.data_ptr() for tensor in tensors)
        kernel = getattr(kernels(), f"norm_backward_{SUFFIXES[grad_BTD.dtype]}")
        kernel(*addresses, scale_BT.numel(), len(weight_D), threads)
        return grad_x_BTD, partial_ND.sum(dim=0), None


class _RMSNorm(torch.autograd.Function):
    """By torch alone: a quarter to a half of the time of F.rms_norm, forward and backward, and fewer temporaries."""

    @staticmethod
    def forward(ctx, x_BTD: Tensor, weight_D: Tensor) -> Tensor:
        scale_BT1 = torch.linalg.vector_norm(x_BTD, dim=-1, keepdim=True)
        scale_BT1.square_().div_(x_BTD.shape[-1]).add_(EPSILON).rsqrt_()
        ctx.save_for_backward(x_BTD, scale_BT1, weight_D)
        return (x_BTD * scale_BT1).mul_(weight_D)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BTD: Tensor) -> tuple[Tensor, Tensor]:
        # With n = x * scale: dx = scale * (w grad - n * mean(w grad n)) and dw = sum of grad n.
        x_BTD, scale_BT1, weight_D = ctx.saved_tensors
        normal_BTD = x_BTD * scale_BT1
        product_BTD = grad_BTD * normal_BTD
        grad_weight_D = product_BTD.flatten(0, -2).sum(0)
        mean_BT1 = (product_BTD @ weight_D).unsqueeze(-1).div_(-x_BTD.shape[-1])
        return torch.addcmul(grad_BTD * weight_D, normal_BTD, mean_BT1).mul_(scale_BT1), grad_weight_D
