"""The recurrence in linear space with eager torch: vectorised over tiles of time, one fused operation a step.

Within a tile, gates and candidates are computed at once into time-major buffers that stay in cache; then one addcmul a
step runs the recurrence in place. The backward pass keeps only the inputs and h, and computes the gates again:

    G_t  = dL/dh_t + (1 - z_{t+1}) G_{t+1}
    dx_t = G_t z_t g'(x_t)
    dk_t = G_t z_t (1 - z_t) (g(x_t) - h_{t-1})

Nothing here waits for the device.
"""

import torch
from torch import Tensor

from mingru.scan_operators import register
from mingru.scan_reference import state_dtype

TILE = 64  # steps: five float32 buffers of (64, 4, 768) are 4 MiB


def scan(projected_BT2E: Tensor, prev_hidden_BE: Tensor | None, reset_BT: Tensor | None) -> tuple[Tensor, Tensor]:
    """See mingru.scan.scan; differentiable once."""
    return _scan(projected_BT2E, prev_hidden_BE, reset_BT)


def forward(projected_BT2E: Tensor, prev_hidden_BE: Tensor | None, reset_BT: Tensor | None) -> tuple[Tensor, Tensor]:
    """h_BTE in the input's dtype and the last h_BE in the state's."""
    (B, T, E2), dtype = projected_BT2E.shape, state_dtype(projected_BT2E)
    x_TBE, k_TBE = projected_BT2E.transpose(0, 1).chunk(2, dim=-1)
    h_BTE = projected_BT2E.new_empty(B, T, E2 // 2)
    h_TBE = h_BTE.transpose(0, 1)
    alive_TB1 = _alive(reset_BT, dtype)
    buffers = torch.empty(3, min(T, TILE), B, E2 // 2, dtype=dtype, device=h_BTE.device)
    keep_rows, h_rows = buffers[0].unbind(0), buffers[1].unbind(0)
    last_BE = h_BTE.new_zeros(B, E2 // 2, dtype=dtype) if prev_hidden_BE is None else prev_hidden_BE.to(dtype)
    for start in range(0, T, TILE):
        size = min(TILE, T - start)
        here = slice(start, start + size)
        keep, h, scratch = buffers[:, :size]
        x, k = x_TBE[here].to(dtype), k_TBE[here].to(dtype)

        _candidate(x, out=h, low=scratch)
        h.mul_(torch.sigmoid(k, out=scratch))
        torch.neg(k, out=keep).sigmoid_()  # not 1 - z: the subtraction loses the digits of a gate that is nearly open
        if alive_TB1 is not None:
            keep.mul_(alive_TB1[here])

        h_BE = last_BE
        for row, keep_BE in zip(h_rows[:size], keep_rows[:size], strict=True):
            h_BE = row.addcmul_(keep_BE, h_BE)
        last_BE = h_BE.clone()  # the next tile overwrites the buffers
        h_TBE[here].copy_(h)
    return h_BTE, last_BE


def backward(
    grad_BTE: Tensor,
    grad_last_BE: Tensor,
    projected_BT2E: Tensor,
    h_BTE: Tensor,
    prev_hidden_BE: Tensor | None,
    reset_BT: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The gradients of projected_BT2E, in its dtype, and of the previous hidden state, in the state's."""
    (B, T, E2), dtype = projected_BT2E.shape, state_dtype(projected_BT2E)
    x_TBE, k_TBE = projected_BT2E.transpose(0, 1).chunk(2, dim=-1)
    grad_TBE, h_TBE = grad_BTE.transpose(0, 1), h_BTE.transpose(0, 1)
    grad_projected_BT2E = projected_BT2E.new_empty(projected_BT2E.shape)
    grad_x_TBE, grad_k_TBE = grad_projected_BT2E.transpose(0, 1).chunk(2, dim=-1)
    alive_TB1 = _alive(reset_BT, dtype)
    buffers = torch.empty(5, min(T, TILE), B, E2 // 2, dtype=dtype, device=h_BTE.device)
    first_BE = h_BTE.new_zeros(B, E2 // 2, dtype=dtype) if prev_hidden_BE is None else prev_hidden_BE
    total_rows = buffers[0].unbind(0)
    carry_rows = buffers[1 if alive_TB1 is None else 2].unbind(0)
    # G and 1 - z (0 at a reset) of the step after the one at hand; what comes from beyond the end arrives whole.
    later_BE, later_carry_BE = grad_last_BE.to(dtype), torch.ones_like(grad_last_BE, dtype=dtype)
    for start in range((T - 1) // TILE * TILE, -1, -TILE):
        size = min(TILE, T - start)
        here = slice(start, start + size)
        total, keep, before, low, slope = buffers[:, :size]
        x, k = x_TBE[here].to(dtype), k_TBE[here].to(dtype)

        torch.neg(k, out=keep).sigmoid_()
        if alive_TB1 is not None:
            torch.mul(keep, alive_TB1[here], out=before)  # `before` lends its rows to the carry
        total.copy_(grad_TBE[here])
        for row, carry_BE in zip(total_rows[size - 1 :: -1], carry_rows[size - 1 :: -1], strict=True):
            later_BE, later_carry_BE = row.addcmul_(later_carry_BE, later_BE), carry_BE
        later_BE, later_carry_BE = later_BE.clone(), later_carry_BE.clone()  # the next tile overwrites the buffers

        before[0].copy_(h_TBE[start - 1] if start else first_BE)
        before[1:].copy_(h_TBE[start : start + size - 1])
        if alive_TB1 is not None:
            before.mul_(alive_TB1[here])
        _candidate(x, out=slope, low=low)
        slope.sub_(before).mul_(keep)
        total.mul_(torch.sigmoid(k, out=keep))
        torch.mul(slope, total, out=grad_k_TBE[here])
        # g' is low (1 - low) below zero. From zero on low is 1/2, so that 1/4 and 3/4 make the slope of 1.
        torch.ge(x, 0, out=slope)
        low.addcmul_(low, low, value=-1).add_(slope, alpha=0.75)
        torch.mul(low, total, out=grad_x_TBE[here])
    return grad_projected_BT2E, later_carry_BE * later_BE


def _candidate(x: Tensor, out: Tensor, low: Tensor) -> None:
    """out = g(x); low = sigmoid(min(x, 0)). Without torch.where, which runs unvectorised on a CPU."""
    torch.clamp(x, max=0, out=low).sigmoid_()  # 1/2 from zero on
    torch.clamp(x, min=0, out=out).add_(low)


def _alive(reset_BT: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Time-major factors of the carried state: 0 at a reset, else 1."""
    return None if reset_BT is None else reset_BT.t().logical_not().to(dtype).unsqueeze(-1)


_scan, scan_forward = register("tiled", forward, backward)
