"""Losses in nats per byte: of one chunk, and of the averaged weights over several.

Shape letters: B lanes, T bytes of a chunk, S = T + 1, V byte values.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from mingru.cross_entropy import cross_entropy
from mingru.minLM import MinLM, MinLMState
from training.data import Chunk
from training.optimizer import TrainedWeights


def chunk_loss(
    model: Callable, chunk: Chunk, state: MinLMState | None, device: torch.device
) -> tuple[Tensor, MinLMState]:
    """Mean loss over a chunk's targets, and the state after it. The bytes travel as uint8."""
    ids_BS = _to_device(chunk.ids_BS, device)
    reset_BT = _to_device(chunk.reset_BT, device) if chunk.reset_BT.any() else None  # most chunks are in one document
    logits_BTV, state = model(ids_BS[:, :-1], state, reset_BT)
    return cross_entropy(logits_BTV.flatten(0, 1), ids_BS[:, 1:].flatten().long()), state


@torch.no_grad()
def averaged_loss(model: MinLM, weights: TrainedWeights, chunks: Iterable[Chunk], device: torch.device) -> float:
    """Mean loss of the averaged weights over the chunks in turn, the state carried from one to the next.

    Training's weights stay untouched; the model is left in eval mode.
    """
    with_averaged = _averaged_model(model, weights)
    total, count, state = 0.0, 0, None
    for chunk in chunks:
        loss, state = chunk_loss(with_averaged, chunk, state, device)
        total += float(loss) * chunk.reset_BT.size
        count += chunk.reset_BT.size
    return total / count


@torch.no_grad()
def lane_losses(
    model: MinLM, weights: TrainedWeights | None, chunks: Iterable[Chunk], device: torch.device
) -> np.ndarray:
    """Mean loss over each lane of each chunk, every one from a state of zero: float32 (lanes,). Of the averaged weights
    or, weights None, of the model's own, which training holds.

    Training's weights stay untouched; the model is left in eval mode.
    """
    forward = model.eval() if weights is None else _averaged_model(model, weights)
    losses = []
    for chunk in chunks:
        ids_BS = _to_device(chunk.ids_BS, device)
        logits_BTV, _ = forward(ids_BS[:, :-1], None, _to_device(chunk.reset_BT, device))
        targets_BT = ids_BS[:, 1:].long()
        losses.append(F.cross_entropy(logits_BTV.mT.float(), targets_BT, reduction="none").mean(dim=1))
    return torch.cat(losses).cpu().numpy()


def _averaged_model(model: MinLM, weights: TrainedWeights) -> Callable[..., tuple[Tensor, MinLMState]]:
    averaged = weights.averaged()
    model.eval()

    def with_averaged(*inputs: Any) -> tuple[Tensor, MinLMState]:
        return functional_call(model, averaged, inputs)

    return with_averaged


def _to_device(array: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
