"""The causal depthwise convolution of a block, whose taps stop at document boundaries and whose past is carried along.

Shapes: B lanes, T steps, D width, K taps, S = T + K - 1 steps with the carried ones before them.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Reach(NamedTuple):
    """What resets leave within reach, as factors 0 or 1; the same for every layer.

    taps: for each tap but the newest, the oldest first, (B, T, 1): its input at each step.
    state_BS1: the last K - 1 inputs, seen from the next chunk.
    """

    taps: tuple[Tensor, ...]
    state_BS1: Tensor


def reach(reset_BT: Tensor, kernel_size: int, dtype: torch.dtype) -> Reach:
    """An input is within reach of a later step if no reset lies between them, the later step included."""
    T = reset_BT.shape[1]
    document_BS1 = F.pad(reset_BT, (kernel_size - 1, 0)).cumsum(dim=1, dtype=torch.int32).unsqueeze(-1)
    here_BT1 = document_BS1[:, kernel_size - 1 :]
    taps = tuple((document_BS1[:, j : j + T] == here_BT1).to(dtype) for j in range(kernel_size - 1))
    return Reach(taps, (document_BS1[:, T:] == document_BS1[:, -1:]).to(dtype))


class CausalConv(nn.Module):
    """A depthwise causal convolution over time, then a dense layer at each step; the block adds the input back."""

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__()
        self.taps = nn.Parameter(torch.empty(kernel_size, dim))  # oldest input first; a row is contiguous
        self.bias = nn.Parameter(torch.zeros(dim))
        self.pointwise = nn.Linear(dim, dim)

    def forward(self, x_BTD: Tensor, past_BSD: Tensor | None, reach: Reach | None) -> tuple[Tensor, Tensor]:
        """The output (B, T, D), and the last K - 1 inputs to hand to the next call.

        past_BSD: the K - 1 inputs before x_BTD (None: zeros, as at the start of a document).
        """
        before = self.taps.shape[0] - 1
        if past_BSD is None:
            padded_BSD = F.pad(x_BTD, (0, 0, before, 0))
        else:
            padded_BSD = torch.cat((past_BSD.to(x_BTD.dtype), x_BTD), dim=1)
        T = x_BTD.shape[1]
        state_BSD = padded_BSD[:, T:] if reach is None else padded_BSD[:, T:] * reach.state_BS1
        out_BTD = _Taps.apply(padded_BSD, self.taps, self.bias, *(() if reach is None else reach.taps))
        return self.pointwise(out_BTD), state_BSD


class _Taps(torch.autograd.Function):
    """out_t = bias + sum over j of taps_j * padded_{t+j}, each product only where that input is within reach."""

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
