"""One replica of a simulated population: a model, its optimizer, its data, and what is known of its fitness."""

import math
import random
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from gossip.state import Rule, Schema
from mingru.minLM import MinLM, MinLMState
from training.data import Chunk, LaneReader
from training.fitness import Fitness
from training.heredity import Heredity
from training.losses import chunk_loss
from training.optimizer import TrainedWeights
from training.options import OptimizerOptions


class Reader(Protocol):
    """Where a replica's chunks come from."""

    def next_chunk(self) -> Chunk:
        """The next bytes of every lane."""


class NoiseReader:
    """Corrupted data: chunks of `reader`'s shape whose bytes are all drawn uniformly at random."""

    def __init__(self, reader: LaneReader, seed: int) -> None:
        self._reader = reader
        self._rng = np.random.default_rng(seed)

    def next_chunk(self) -> Chunk:
        chunk = self._reader.next_chunk()
        noise = self._rng.integers(0, 256, chunk.ids_BS.shape, dtype=np.uint8)
        return Chunk(noise, np.zeros_like(chunk.reset_BT))


class Replica:
    """A member of a population, stepped by the trial. readers: one, or for DDP those of all ranks it stands for.

    rate: its own hyperparameter lr; sent: bytes of weights that this rank has sent; looks: comparisons since the
    weights last changed hands.
    """

    def __init__(
        self, rank: int, model: MinLM, weights: TrainedWeights, readers: Sequence[Reader], fitness: Fitness,
        rate: Heredity, options: OptimizerOptions, batch_size: int, device: torch.device,
    ) -> None:  # fmt: skip
        self.rank = rank
        self.model = model
        self.weights = weights
        self.fitness = fitness
        self.live = weights.tensors()
        self.schema = Schema.of(self.live, weights.rules, {})
        self.sent = 0
        self.merges = 0
        self.rolled_back = 0
        self.not_finite = 0
        self.looks = 0
        self._readers = readers
        self._states = [model.initial_state(batch_size) for _ in readers]
        self._rate = rate
        self._options = options
        self._device = device

    @property
    def lr(self) -> float:
        """The learning rate in force after warm-up."""
        return self._rate.values["lr"]

    @lr.setter
    def lr(self, value: float) -> None:
        self._rate.values["lr"] = value
        self.weights.set_hyperparameters(value, self._options.weight_decay)

    def inherit(self, other: "Replica", dice: random.Random) -> None:
        """Go on with the other's learning rate, mutated."""
        self._rate.inherit({"lr": other.lr}, dice)
        self.lr = self._rate.values["lr"]

    def train_step(self, decay: float = 1.0) -> None:
        """One optimizer step, at `decay` times the learning rate, on the mean gradient of the readers' next chunks; not
        applied if it is not finite."""
        self.weights.set_hyperparameters(self.lr * decay, self._options.weight_decay)
        self.model.train()
        states, total = [], 0.0
        for reader, before in zip(self._readers, self._states, strict=True):
            loss, state = chunk_loss(self.model, reader.next_chunk(), before, self._device)
            (loss / len(self._readers)).backward()
            states.append(state.detach())
            total += float(loss.detach())
        loss = total / len(self._readers)
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._options.grad_clip or math.inf))
        if math.isfinite(loss) and math.isfinite(norm):
            self.weights.step()
            self._states = states
            self.fitness.tracker.observe(loss)
        else:
            self.not_finite += 1
            self._states = [self.model.initial_state(len(reader.positions)) for reader in self._readers]
        self.model.zero_grad(set_to_none=True)

    def replaced(self, judged: bool = False) -> None:
        """The weights were changed by other means than training; judged: and the probe saw them last as they are."""
        self.fitness.replaced(judged)
        self.looks = 0

    def trained(self) -> dict[str, Tensor]:
        """The sequences that training moves, live and without moments, first ones too: what an average of weights is
        taken of."""
        kinds = "yz" if self.weights.averages else "w"
        return {name: tensor for name, tensor in self.live.items() if name[0] in kinds}


def weights_only(schema: Schema) -> Schema:
    """The schema without second moments."""
    return Schema(tuple(spec for spec in schema.tensors if spec.rule is Rule.WEIGHT), schema.terms)


def ring_bytes(nbytes: int, ranks: int) -> float:
    """Bytes that each rank sends in a ring all-reduce of `nbytes`."""
    return 2 * (ranks - 1) / ranks * nbytes


@torch.no_grad()
def held_out_loss(model: MinLM, averaged: Mapping[str, Tensor], chunks: Sequence[Chunk], device: torch.device) -> float:
    """Mean loss of the weights `averaged` over the chunks in turn, nats per byte, the state carried along."""

    def with_averaged(*inputs: Tensor | MinLMState | None) -> tuple[Tensor, MinLMState]:
        return functional_call(model, dict(averaged), inputs)

    model.eval()
    total, count, state = 0.0, 0, None
    for chunk in chunks:
        loss, state = chunk_loss(with_averaged, chunk, state, device)
        total += float(loss) * chunk.reset_BT.size
        count += chunk.reset_BT.size
    return total / count
