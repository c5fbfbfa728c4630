"""The causal depthwise convolution of a block, whose taps stop at document boundaries and whose past is carried along.

Shapes: B lanes, T steps, D width, K taps, P = K - 1 steps carried, S = P + T.
"""

import functools
from ctypes import CDLL, c_int64, c_void_p
from pathlib import Path
from typing import NamedTuple

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
        "conv_forward": (None, *[c_void_p] * 6, *[c_int64] * 4),
        "conv_backward": (None, *[c_void_p] * 8, *[c_int64] * 5),
    }
    return load_or_warn(
        Path(__file__).with_name("conv_native.c"), "the convolution", "half as fast", for_each_dtype(signatures)
    )


class Reach(NamedTuple):
    """What resets leave within reach; the same for every layer. All but reset_BT: factors 0 or 1.

    taps: for each tap but the newest, the oldest first, (B, T, 1): its input at each step.
    state_BP1: the last K - 1 inputs, seen from the next chunk.
    """

    reset_BT: Tensor
    taps: tuple[Tensor, ...]
    state_BP1: Tensor


def reach(reset_BT: Tensor, kernel_size: int, dtype: torch.dtype) -> Reach:
    """An input is within reach of a later step if no reset lies between them, the later step included."""
    T = reset_BT.shape[1]
    document_BS1 = F.pad(reset_BT, (kernel_size - 1, 0)).cumsum(dim=1, dtype=torch.int32).unsqueeze(-1)
    here_BT1 = document_BS1[:, kernel_size - 1 :]
    taps = tuple((document_BS1[:, j : j + T] == here_BT1).to(dtype) for j in range(kernel_size - 1))
    return Reach(reset_BT, taps, (document_BS1[:, T:] == document_BS1[:, -1:]).to(dtype))


class CausalConv(nn.Module):
    """A depthwise causal convolution over time, then a dense layer at each step; the block adds the input back."""

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__()
        self.taps = nn.Parameter(torch.empty(kernel_size, dim))  # oldest input first; a row is contiguous
        self.bias = nn.Parameter(torch.zeros(dim))
        self.pointwise = nn.Linear(dim, dim)

    def forward(self, x_BTD: Tensor, past_BPD: Tensor | None, reach: Reach | None) -> tuple[Tensor, Tensor]:
        """The output (B, T, D), and the last K - 1 inputs to hand to the next call.

        past_BPD: the K - 1 inputs before x_BTD (None: zeros, as at the start of a document).
        """
        (B, T, D), P = x_BTD.shape, self.taps.shape[0] - 1
        past_BPD = x_BTD.new_zeros(B, P, D) if past_BPD is None else past_BPD.to(x_BTD.dtype)
        state_BPD = torch.cat((past_BPD, x_BTD[:, max(0, T - P) :]), dim=1)[:, min(T, P) :]
        if reach is not None:
            state_BPD = state_BPD * reach.state_BP1
        return self.pointwise(convolve(x_BTD, past_BPD, self.taps, self.bias, reach)), state_BPD


def convolve(x_BTD: Tensor, past_BPD: Tensor, taps_KD: Tensor, bias_D: Tensor, reach: Reach | None) -> Tensor:
    """out_t = bias + sum over j of taps_j * padded_{t+j}, padded = past and x; an input out of reach counts as zero.

    Where torch computes it, what is not finite gets through from out of reach too.
    """
    B, T, D = x_BTD.shape
    assert past_BPD.shape == (B, len(taps_KD) - 1, D)
    assert reach is None or (reach.reset_BT.shape == (B, T) and reach.reset_BT.dtype == torch.bool)
    fits = x_BTD.is_cpu and x_BTD.dtype in SUFFIXES and (out := product_dtype(x_BTD)) in SUFFIXES
    # A compiler fuses the plain formula by itself, and could not look into the kernels.
    if fits and not torch.compiler.is_compiling() and kernels() is not None:
        reset_BT = None if reach is None else reach.reset_BT
        return _NativeTaps.apply(x_BTD.float(), past_BPD.float(), taps_KD.float(), bias_D.float(), reset_BT, out)
    padded_BSD = torch.cat((past_BPD, x_BTD), dim=1)
    return _Taps.apply(padded_BSD, taps_KD, bias_D, *(() if reach is None else reach.taps))


class _NativeTaps(torch.autograd.Function):
    """By the C kernels: from float32 to float32 or bfloat16 on a CPU."""

    @staticmethod
    def forward(
        ctx,
        x_BTD: Tensor,
        past_BPD: Tensor,
        taps_KD: Tensor,
        bias_D: Tensor,
        reset_BT: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        inputs = [tensor if tensor is None else tensor.contiguous() for tensor in (x_BTD, past_BPD, reset_BT, taps_KD)]
        out_BTD = torch.empty_like(inputs[0], dtype=dtype)
        _call("forward", *inputs, bias_D.contiguous(), out_BTD, like=out_BTD, taps=len(taps_KD))
        ctx.save_for_backward(*inputs)
        return out_BTD

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BTD: Tensor) -> tuple[Tensor | None, ...]:
        x_BTD, past_BPD, reset_BT, taps_KD = ctx.saved_tensors
        grad_BTD, threads = grad_BTD.contiguous(), torch.get_num_threads()
        grad_x_BTD, grad_past_BPD = torch.empty_like(x_BTD), torch.empty_like(past_BPD)
        partial = x_BTD.new_zeros(threads, len(taps_KD) + 1, x_BTD.shape[-1])  # of the taps, then of the bias
        _call("backward", grad_BTD, x_BTD, past_BPD, reset_BT, taps_KD, grad_x_BTD, grad_past_BPD, partial,
              like=grad_BTD, taps=len(taps_KD), threads=(threads,))  # fmt: skip
        grads_D = partial.sum(dim=0)
        return grad_x_BTD, grad_past_BPD, grads_D[:-1], grads_D[-1], None, None


def _call(name: str, *tensors: Tensor | None, like: Tensor, taps: int, threads: tuple[int, ...] = ()) -> None:
    """Run a kernel over `tensors`, contiguous; like: the output or its gradient (B, T, D), of the kernel's dtype."""
    kernel = getattr(kernels(), f"conv_{name}_{SUFFIXES[like.dtype]}")
    kernel(*(None if tensor is None else tensor.data_ptr() for tensor in tensors), *like.shape, taps, *threads)


class _Taps(torch.autograd.Function):
    """By torch alone, on any device."""

    @staticmethod
    def forward(ctx, padded_BSD: Tensor, taps_KD: Tensor, bias_D: Tensor, *reach: Tensor) -> Tensor:
        ctx.save_for_backward(padded_BSD, taps_KD, *reach)
        *older, newest_D = taps_KD.unbind(0)
        T = padded_BSD.shape[1] - len(older)
        out_BTD = torch.addcmul(bias_D, padded_BSD[:, len(older) :], newest_D)
        for j, tap_D in enumerate(older):
            inputs_BTD = padded_BSD[:, j : j + T]
            out_BTD.addcmul_(inputs_BTD * reach[j] if reach else inputs_BTD, tap_D)
        return out_BTD

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BTD: Tensor) -> tuple[Tensor | None, ...]:
        padded_BSD, taps_KD, *reach = ctx.saved_tensors
        T = grad_BTD.shape[1]
        grad_padded_BSD = torch.zeros_like(padded_BSD)
        grad_taps = []
        for j, tap_D in enumerate(taps_KD.unbind(0)):
            reached_BTD = grad_BTD * reach[j] if j < len(reach) else grad_BTD
            grad_padded_BSD[:, j : j + T].addcmul_(reached_BTD, tap_D)
            grad_taps.append((reached_BTD * padded_BSD[:, j : j + T]).sum(dim=(0, 1)))
        return grad_padded_BSD, torch.stack(grad_taps), grad_BTD.sum(dim=(0, 1)), *(None for _ in reach)
