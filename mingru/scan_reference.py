"""The recurrence one step at a time in plain torch: what every other backend is compared with."""

import torch
from torch import Tensor


def scan(projected_BT2E: Tensor, prev_hidden_BE: Tensor | None, reset_BT: Tensor | None) -> tuple[Tensor, Tensor]:
    """See mingru.scan.scan. Any floating dtype; gradients by autograd, to any order."""
    x_BTE, k_BTE = projected_BT2E.to(state_dtype(projected_BT2E)).chunk(2, dim=-1)
    z_BTE = k_BTE.sigmoid()
    keep_BTE = (-k_BTE).sigmoid()  # not 1 - z: the subtraction loses the digits of a gate that is nearly open
    if reset_BT is not None:
        keep_BTE = keep_BTE.masked_fill(reset_BT.unsqueeze(-1), 0)
    new_BTE = z_BTE * candidate(x_BTE)
    h_BE, steps = prev_hidden_BE, []
    for keep_BE, new_BE in zip(keep_BTE.unbind(1), new_BTE.unbind(1), strict=True):
        h_BE = new_BE if h_BE is None else keep_BE * h_BE + new_BE
        steps.append(h_BE)
    return torch.stack(steps, dim=1).to(projected_BT2E.dtype), h_BE


def candidate(x: Tensor) -> Tensor:
    """g(x) = x + 0.5 where x >= 0, else sigmoid(x): positive and continuous."""
    return torch.where(x >= 0, x + 0.5, x.sigmoid())


def state_dtype(projected: Tensor) -> torch.dtype:
    """The dtype the state is kept in: float64 for float64 input, float32 for every other."""
    return torch.promote_types(projected.dtype, torch.float32)
