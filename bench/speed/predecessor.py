"""What ours is compared with, written for that: a training step and a generate loop as minGRU models had them.

The same model and the same weights; the recurrence by cumulative sums in log space, float32, torch's own normalisation
and cross-entropy, schedulefree's AdamW as it comes; one call of the model for each byte of output.
"""

from collections.abc import Callable

import schedulefree
import torch
import torch.nn.functional as F
from torch import Tensor

from mingru import scan_logspace, scan_reference
from mingru.minLM import MinLM
from mingru.norm import EPSILON


def logits_of(model: MinLM, ids_BT: Tensor, hidden: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
    """Logits (B, T, V), and each layer's last state; for a single step by the plain formula, as minGRU-pytorch does."""
    scan = (scan_reference if ids_BT.shape[1] == 1 else scan_logspace).scan
    x_BTD, last = model.token_emb(ids_BT), []
    for layer, block in enumerate(model.layers):
        normal_BTD = F.rms_norm(x_BTD, block.norm.weight.shape, block.norm.weight, EPSILON)
        before_BE = None if hidden is None else hidden[layer]
        h_BTE, last_BE = scan(block.mingru.to_hidden_and_gate(normal_BTD), before_BE, None)
        last.append(last_BE)
        x_BTD = x_BTD + block.mingru.to_out(h_BTE)
        normal_BTD = F.rms_norm(x_BTD, block.ff_norm.weight.shape, block.ff_norm.weight, EPSILON)
        x_BTD = x_BTD + block.ff(normal_BTD)
    return model.to_logits(F.rms_norm(x_BTD, model.norm.weight.shape, model.norm.weight, EPSILON)), last


def trainer(model: MinLM, ids_BS: Tensor) -> Callable[[], None]:
    """A function that makes one training step on ids_BS, int64 (B, T + 1)."""
    optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=1e-4, weight_decay=0.01)
    optimizer.train()

    def step() -> None:
        logits_BTV, _ = logits_of(model, ids_BS[:, :-1], None)
        loss = F.cross_entropy(logits_BTV.flatten(0, 1), ids_BS[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    return step


@torch.no_grad()
def generate(model: MinLM, lanes: int, length: int, device: torch.device) -> None:
    """`length` times the next byte of every lane, drawn from the model."""
    ids_B1, hidden = torch.zeros(lanes, 1, dtype=torch.int64, device=device), None
    for _ in range(length):
        logits_B1V, hidden = logits_of(model, ids_B1, hidden)
        ids_B1 = torch.multinomial(logits_B1V[:, -1].softmax(dim=-1), 1)
        ids_B1.tolist()  # each byte is shown as it comes
