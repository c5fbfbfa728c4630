"""The peers' recurrence: minGRU in log space with cumulative sums, as "Were RNNs All We Needed?" gives it (appendix B).

It needs no kernel of its own and runs in parallel over time, which is why public implementations use it. It keeps many
tensors of the input's size for the backward pass, cannot start from a state of zero and cannot represent a reset.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def scan(projected_BT2E: Tensor) -> Tensor:
    """h_BTE from a state of zero; `projected_BT2E` as for mingru.scan.scan."""
    x_BTE, k_BTE = projected_BT2E.chunk(2, dim=-1)
    log_candidate_BTE = torch.where(x_BTE >= 0, (F.relu(x_BTE) + 0.5).log(), -F.softplus(-x_BTE))
    log_new_BTE = log_candidate_BTE - F.softplus(-k_BTE)
    log_decay_BTE = (-F.softplus(k_BTE)).cumsum(dim=1)
    return (log_decay_BTE + (log_new_BTE - log_decay_BTE).logcumsumexp(dim=1)).exp()
