"""The judge of a merge: the loss of the averaged weights on the same few bytes each time."""

import torch

from mingru.minLM import MinLM
from training.data import Region, validation_chunks
from training.losses import averaged_loss
from training.optimizer import TrainedWeights
from training.options import DataOptions

LEAST_BYTES, MOST_BYTES = 1024, 64 * 1024  # a batch's worth, within these


class Probe:
    """Fixed windows at the end of the held-out bytes, or where there are none of the training bytes, read once: what a
    rank looks at before and after others' weights."""

    def __init__(
        self,
        model: MinLM,
        weights: TrainedWeights,
        held_out: Region | None,
        training: Region,
        options: DataOptions,
        device: torch.device,
    ) -> None:
        region = held_out if held_out is not None and len(held_out) > 1 else training
        wanted = min(max(options.batch_size * options.chunk_size, LEAST_BYTES), MOST_BYTES)
        targets = min(wanted, len(region) - 1)
        tail = Region(region.corpus, region.end - targets - 1, region.end)
        self._chunks = list(validation_chunks(tail, options.batch_size, options.chunk_size, len(tail)))
        self._model, self._weights, self._device = model, weights, device

    def loss(self) -> float:
        """Loss of the averaged weights as they are now, nats per byte, from a state of zero. Training thread."""
        return averaged_loss(self._model, self._weights, self._chunks, self._device)
