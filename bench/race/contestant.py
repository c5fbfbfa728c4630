"""What takes part in a race, and how it is measured.

Shapes: B lanes, T bytes of a chunk, S = T + 1.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from training.data import Chunk, Region, validation_chunks

WINDOW = 256  # targets of a window that is read from a state of zero: the context of the Transformer
LANES = 16  # in which the held-out bytes are read where the state is carried along
WINDOWS_AT_ONCE = 64


class Setting(NamedTuple):
    """What is tuned of every contestant: the learning rate, and the chance of dropout."""

    rate: float
    dropout: float


class Contestant(Protocol):
    """A model that trains step by step. told: what the table and the results say of it.

    carries: its state can go on from chunk to chunk.
    """

    parameters: int
    carries: bool
    told: dict[str, Any]

    def train_step(self, spent: float) -> int:
        """One optimizer step, after the share `spent` of the time; how many bytes it was trained on."""

    def loss(self, chunk: Chunk, state: Any) -> tuple[Tensor, Any]:
        """Mean loss in nats over the chunk's targets, by the weights that one would use, and the state after it."""


class Plan(NamedTuple):
    """How to build a contestant on a region with a seed, and all the options in force that its result depends on."""

    options: dict[str, Any]
    build: Callable[[Region, int], Contestant]


def faster_dtype(train: Callable[[str], None]) -> str:
    """fp32 or bf16, by the quickest of three times that `train` takes with each, in turn; the first is not counted."""
    seconds: dict[str, list[float]] = {"fp32": [], "bf16": []}
    for counted in (False, True, True, True):
        for dtype, kept in seconds.items():
            begin = time.perf_counter()
            train(dtype)
            if counted:
                kept.append(time.perf_counter() - begin)
    return min(seconds, key=lambda dtype: min(seconds[dtype]))


@torch.no_grad()
def measure(contestant: Contestant, held_out: Region) -> dict[str, float | None]:
    """Held-out losses in nats per byte: of windows read from a state of zero; and carried (None: it cannot), where each
    of LANES equal parts is read from its start to its end."""
    whole = validation_chunks(held_out, LANES, WINDOW, len(held_out))
    return {
        "windows": _mean_loss(contestant, windows(held_out), carried=False),
        "carried": _mean_loss(contestant, whole, carried=True) if contestant.carries else None,
    }


def windows(region: Region) -> Iterator[Chunk]:
    """All of a region in windows of WINDOW targets, many at a time; the last may be shorter. Every byte but the first
    is a target once."""
    content = region.read(0, len(region))
    places = range(0, len(content) - 1, WINDOW)
    for _, group in itertools.groupby(enumerate(places), lambda item: item[0] // WINDOWS_AT_ONCE):
        pieces = [content[place : place + WINDOW + 1] for _, place in group]
        for ids in (pieces[:-1], pieces[-1:]) if len(pieces[-1]) <= WINDOW else (pieces,):
            if ids:
                ids_BS = np.stack(ids)
                yield Chunk(ids_BS, np.zeros(ids_BS[:, 1:].shape, dtype=bool))


def _mean_loss(contestant: Contestant, chunks: Iterable[Chunk], *, carried: bool) -> float:
    total, count, state = 0.0, 0, None
    for chunk in chunks:
        loss, after = contestant.loss(chunk, state)
        state = after if carried else None
        total += float(loss) * chunk.reset_BT.size
        count += chunk.reset_BT.size
    return total / count
