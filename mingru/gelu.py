"""GELU of a dense layer's output, on the CPU in one pass with the layer's bias."""

import functools
from ctypes import CDLL, c_int64, c_void_p
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mingru.precision import product_dtype
from runtime.native import SUFFIXES, for_each_dtype, load_or_warn


@functools.cache
def kernels() -> CDLL | None:
    """The compiled kernels; None where they cannot be had, which is said once."""
    signatures = {
        "gelu_forward": (None, *[c_void_p] * 3, *[c_int64] * 2),
        "gelu_backward": (None, *[c_void_p] * 4, *[c_int64] * 3),
    }
    return load_or_warn(Path(__file__).with_name("gelu_native.c"), "GELU", "slower", for_each_dtype(signatures))


def gelu_of(layer: nn.Linear, x_BTD: Tensor) -> Tensor:
    """gelu(layer(x)) of a layer with a bias, exact (by the normal distribution), as torch's default."""
    # A compiler fuses the plain formula by itself, and could not look into the kernels.
    fits = x_BTD.is_cpu and layer.weight.dtype in SUFFIXES and product_dtype(x_BTD) in SUFFIXES
    if not fits or torch.compiler.is_compiling() or kernels() is None:
        return F.gelu(layer(x_BTD))
    return _NativeGELU.apply(F.linear(x_BTD, layer.weight).contiguous(), layer.bias.float())


class _NativeGELU(torch.autograd.Function):
    """By the C kernels: gelu(x + bias), float32 or bfloat16. The slope overwrites x, which nobody else may need.

    So as much is kept as if it were x, and the backward pass only multiplies.
    """

    @staticmethod
    def forward(ctx, x_BTF: Tensor, bias_F: Tensor) -> Tensor:
        y_BTF = torch.empty_like(x_BTF)
        _call("forward", x_BTF, bias_F, y_BTF)
        ctx.save_for_backward(x_BTF)
        return y_BTF

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BTF: Tensor) -> tuple[Tensor, Tensor]:
        (slope_BTF,) = ctx.saved_tensors
        threads = torch.get_num_threads()
        grad_x_BTF = torch.empty_like(slope_BTF)
        partial_NF = grad_x_BTF.new_zeros(threads, slope_BTF.shape[-1], dtype=torch.float32)
        _call("backward", grad_BTF.contiguous(), slope_BTF, grad_x_BTF, partial_NF, threads=(threads,))
        return grad_x_BTF, partial_NF.sum(dim=0)


def _call(name: str, *tensors: Tensor, threads: tuple[int, ...] = ()) -> None:
    """Run a kernel over `tensors`, the first of which is (..., F) in the dtype that it works in."""
    kernel = getattr(kernels(), f"gelu_{name}_{SUFFIXES[tensors[0].dtype]}")
    width = tensors[0].shape[-1]
    kernel(*(tensor.data_ptr() for tensor in tensors), tensors[0].numel() // width, width, *threads)
