"""The recurrence as its public implementations compute it: in log space, by cumulative sums over the whole of time.

"Were RNNs All We Needed?" (arXiv 2410.01201), appendix B. It needs no kernel of its own and runs in parallel over time.
For that it keeps some 25 tensors of the state's size for the backward pass and loses digits as T grows: the logarithms
that it adds up and takes off again grow with T. It is here to be compared with, and has two limits: it cannot represent
a reset, whose logarithm is minus infinity from there on; and where the previous state is zero, the gradient to it is
not finite (every other one is). The previous state must not be negative.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mingru.scan_reference import state_dtype
from runtime.errors import UserError


def scan(projected_BT2E: Tensor, prev_hidden_BE: Tensor | None, reset_BT: Tensor | None) -> tuple[Tensor, Tensor]:
    """See mingru.scan.scan. Raises UserError for a reset mask."""
    if reset_BT is not None:
        raise UserError(
            "expected bytes of one document for GRUBOROS_SCAN=logspace, which cannot represent a reset, got a document "
            "that starts: choose another GRUBOROS_SCAN, or --document_delimiter none"
        )
    x_BTE, k_BTE = projected_BT2E.to(state_dtype(projected_BT2E)).chunk(2, dim=-1)
    log_candidate_BTE = torch.where(x_BTE >= 0, (F.relu(x_BTE) + 0.5).log(), -F.softplus(-x_BTE))
    log_new_BTE = log_candidate_BTE - F.softplus(-k_BTE)
    log_decay_BTE = (-F.softplus(k_BTE)).cumsum(dim=1)
    log_sum_BTE = log_new_BTE - log_decay_BTE
    if prev_hidden_BE is not None:  # one step before the first, nothing of which has decayed
        log_sum_BTE = torch.cat((prev_hidden_BE.to(log_sum_BTE.dtype).log().unsqueeze(1), log_sum_BTE), dim=1)
    log_sum_BTE = log_sum_BTE.logcumsumexp(dim=1)
    h_BTE = (log_decay_BTE + log_sum_BTE[:, -log_decay_BTE.shape[1] :]).exp()
    return h_BTE.to(projected_BT2E.dtype), h_BTE[:, -1]
