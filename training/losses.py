"""Losses in nats per byte: of one chunk, and of the averaged weights over several.

Shape letters: B lanes, T bytes of a chunk, S = T + 1, V byte values.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.func import functional_call

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
    return _CrossEntropy.apply(logits_BTV.flatten(0, 1), ids_BS[:, 1:].flatten().long()), state


class _CrossEntropy(torch.autograd.Function):
    """Mean cross-entropy in float32, a few rows at a time; the gradient takes the place of the logits.

    So there is one tensor of the logits' size, where softmax, float32 copy and gradient would make three or four. A
    second backward pass through it is refused by autograd's own check.
    """

    ROWS = 4096

    @staticmethod
    def forward(ctx, logits_NV: Tensor, targets_N: Tensor) -> Tensor:
        pieces = (tensor.split(_CrossEntropy.ROWS) for tensor in (logits_NV, targets_N))
        total, norms = logits_NV.new_zeros((), dtype=torch.float64), []
        for rows_NV, wanted_N in zip(*pieces, strict=True):
            rows_NV = rows_NV.float()
            norms.append(rows_NV.logsumexp(dim=1))
            total += (norms[-1] - rows_NV.gather(1, wanted_N.unsqueeze(1)).squeeze(1)).sum(dtype=torch.float64)
        ctx.save_for_backward(logits_NV, targets_N, torch.cat(norms))
        return (total / len(targets_N)).float()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        logits_NV, targets_N, norms_N = ctx.saved_tensors
        pieces = (tensor.split(_CrossEntropy.ROWS) for tensor in (logits_NV, targets_N, norms_N))
        scale = grad / len(targets_N)
        for rows_NV, wanted_N, norm_N in zip(*pieces, strict=True):
            share_NV = (rows_NV.float() - norm_N.unsqueeze(1)).exp_()
            share_NV.scatter_add_(1, wanted_N.unsqueeze(1), torch.full_like(norm_N, -1).unsqueeze(1))
            rows_NV.copy_(share_NV.mul_(scale))
        return logits_NV, None


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
