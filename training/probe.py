"""The probe: a few windows of held-out bytes, the same for every rank, on which weights are compared and judged."""

from collections.abc import Iterator

import numpy as np
import torch
from blake3 import blake3

from gossip.comparison import Evidence
from gossip.merge import Losses
from gossip.protocol import LOSS_LIMIT, PROBE_WINDOWS_LIMIT
from mingru.minLM import MinLM
from training.computation import precision
from training.data import Chunk, Region, document_starts
from training.losses import lane_losses
from training.optimizer import TrainedWeights

WINDOW_BYTES = 256  # targets of a window
LEAST_WINDOWS = 8  # fewer are little evidence, whatever the budget is
HELD_WINDOWS = 4  # the first ones, on which the weights that training holds are measured, where it averages
_FORWARD_SHARE = 1 / 3  # of a training step, that a pass without gradients costs
_HELD_OUT_SHARE = 4  # at most one part in so many of the held-out bytes is the probe's
LEAST_HELD_OUT = _HELD_OUT_SHARE * (LEAST_WINDOWS * WINDOW_BYTES + 1)  # bytes; of fewer none are the probe's
_DIGITS = 5  # of a loss that travels: 1e-5 nats


def split_probe(training: Region, held_out: Region | None) -> tuple[Region, Region | None]:
    """(probe, validation): the end of the held-out bytes, and what comes before it; apart, so that validation remains
    untouched by whatever is chosen by the probe.

    Where the held-out bytes are too few for it the probe looks at the end of the training bytes instead.
    """
    most = PROBE_WINDOWS_LIMIT * WINDOW_BYTES + 1
    if held_out is not None and len(held_out) >= LEAST_HELD_OUT:
        cut = held_out.end - min(len(held_out) // _HELD_OUT_SHARE, most)
        return Region(held_out.corpus, cut, held_out.end), Region(held_out.corpus, held_out.begin, cut)
    return Region(training.corpus, training.end - min(len(training), most), training.end), held_out


def affordable_windows(step_bytes: int, probe_every: float, budget: float, averages: bool) -> int:
    """Windows that cost `budget`, a share of training's work, every `probe_every` steps of `step_bytes`, with the few
    that training's own weights are measured on where it `averages`; at least 8, whatever they cost."""
    affordable = int(budget * probe_every * step_bytes / _FORWARD_SHARE / WINDOW_BYTES)
    return min(max(affordable - averages * HELD_WINDOWS, LEAST_WINDOWS), PROBE_WINDOWS_LIMIT)


def probe_cost(windows: int, step_bytes: int, probe_every: float, averages: bool) -> float:
    """The share of training's work that such a probe takes."""
    return (windows + averages * HELD_WINDOWS) * WINDOW_BYTES * _FORWARD_SHARE / (probe_every * step_bytes)


class Probe:
    """The first `windows` of a region's windows, in an order that spreads them and is the same for every rank. All
    methods are for the training thread.

    A rank that measures fewer than another has measured the first of the same. pass_bytes: targets that one forward
    pass may take. dtype: in which it is computed, that of training, so that it takes its share of training's time.
    """

    def __init__(
        self,
        model: MinLM,
        weights: TrainedWeights,
        region: Region,
        windows: int,
        pass_bytes: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        content = region.read(0, len(region))
        size = max(1, min(WINDOW_BYTES, (len(content) - 1) // 2))
        places = np.random.default_rng(0).permutation((len(content) - 1) // size)[:windows] * size
        self.id = blake3(content.tobytes() + size.to_bytes(4, "little")).hexdigest()[:32]
        self._ids_NS = np.stack([content[place : place + size + 1] for place in places])
        self._lanes = max(1, pass_bytes // size)
        self._delimiter = region.corpus.delimiter
        self._model, self._weights, self._device, self._dtype = model, weights, device, dtype

    def measure(self) -> tuple[Losses, Evidence | None]:
        """The weights as they are now, each window from a state of zero: mean losses in nats per byte of the averaged
        ones and, where training holds others, of those on the first windows; and the averaged ones' losses of each
        window, None if those are beyond LOSS_LIMIT or not numbers.
        """
        averaged = self._lane_losses(self._weights, self.windows)
        sound = bool((averaged <= LOSS_LIMIT).all())  # NaN is not
        evidence = Evidence(self.id, tuple(round(float(x), _DIGITS) for x in averaged)) if sound else None
        if not self._weights.averages:
            return (float(averaged.mean()),), evidence
        held = self._lane_losses(None, HELD_WINDOWS)
        return (float(averaged.mean()), float(held.mean())), evidence

    def __str__(self) -> str:
        return f"probe: {self.windows} windows of {self._ids_NS.shape[1] - 1} bytes"

    @property
    def windows(self) -> int:
        """How many windows are measured."""
        return len(self._ids_NS)

    def _lane_losses(self, weights: TrainedWeights | None, windows: int) -> np.ndarray:
        with precision(self._dtype, self._device):
            return lane_losses(self._model, weights, self._passes(windows), self._device)

    def _passes(self, windows: int) -> Iterator[Chunk]:
        ids_NS = self._ids_NS[:windows]
        for first in range(0, len(ids_NS), self._lanes):
            ids_BS = ids_NS[first : first + self._lanes]
            yield Chunk(ids_BS, document_starts(ids_BS[:, :-1], self._delimiter))
