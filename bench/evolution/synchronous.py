"""Arms in which all replicas act at the same step: DDP, averages of all, DiLoCo, NoLoCo.

Weights here are all sequences that training moves: y and z of schedule-free AdamW, on which an average or an outer step
acts alike, hence on x too; of plain AdamW the one that there is.
"""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bench.evolution.policy import Policy, require
from bench.evolution.replica import Replica, ring_bytes
from bench.evolution.rounding import WIRES, as_sent, sent_bytes


@dataclass
class Ddp(Policy):
    """One model on the mean gradient of all ranks, every step; fp32 gradients by ring all-reduce."""

    one_model: ClassVar[bool] = True


@dataclass
class Periodic(Policy):
    """Something that all replicas do together every `every` steps."""

    every: int = 50

    def __post_init__(self) -> None:
        require(self.every >= 1, "every", "at least 1 step", self.every)

    def after_step(self, step: int) -> None:
        if step % self.every == 0 and len(self.replicas) > 1:
            self.act()
            self.counts["rounds"] += 1
            for replica in self.replicas:
                replica.replaced()

    def act(self) -> None:
        """Change the weights of all replicas, and account for what they sent."""
        raise NotImplementedError


@dataclass
class MeanAll(Periodic):
    """Every replica moves by `share` to the mean of all, second moments too (PAPA: every 10, share .01)."""

    share: float = 1.0

    @torch.no_grad()
    def act(self) -> None:
        for name in self.replicas[0].live:
            mean = torch.stack([replica.live[name] for replica in self.replicas]).mean(0)
            for replica in self.replicas:
                replica.live[name].lerp_(mean, self.share)
        for replica in self.replicas:
            replica.sent += ring_bytes(replica.schema.nbytes, len(self.replicas))


@dataclass
class Outer(Periodic):
    """An outer optimizer moves weights by what training moved them; moments stay local. wire: fp32, bf16 or int4, of
    what is sent.
    """

    wire: str = "fp32"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.wire in WIRES, "wire", " or ".join(WIRES), self.wire)

    def displacement(self, ranks: Iterable[int], slow: Callable[[int], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Mean over `ranks` of how far training moved each from its slow weights, as sent."""
        moved = []
        for rank in ranks:
            live, start = self.replicas[rank].trained(), slow(rank)
            moved.append(as_sent({name: tensor - start[name] for name, tensor in live.items()}, self.wire))
        return mean_of(moved)

    def nbytes(self, replica: Replica) -> float:
        """Of a replica's weights on the wire."""
        return sent_bytes(replica.trained(), self.wire)


def mean_of(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Of each name."""
    return {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}


@dataclass
class DiLoCo(Outer):
    """Outer Nesterov momentum on the mean displacement of all (arXiv 2311.08105)."""

    outer_lr: float = 0.7
    momentum: float = 0.9

    def begin(self, replicas: list[Replica], dice: random.Random) -> None:
        super().begin(replicas, dice)
        self._outer = {name: tensor.clone() for name, tensor in replicas[0].trained().items()}
        self._optimizer = torch.optim.SGD(
            self._outer.values(), lr=self.outer_lr, momentum=self.momentum, nesterov=self.momentum > 0
        )

    @torch.no_grad()
    def act(self) -> None:
        moved = self.displacement(range(len(self.replicas)), lambda _: self._outer)
        for name, outer in self._outer.items():
            outer.grad = -moved[name]
        self._optimizer.step()
        for replica in self.replicas:
            for name, outer in self._outer.items():
                replica.live[name].copy_(outer)
            replica.sent += ring_bytes(self.nbytes(replica), len(self.replicas))


@dataclass
class NoLoCo(Outer):
    """Random pairs instead of all (arXiv 2506.10911): with slow weights phi, fast ones theta and d = theta - phi,
    m <- momentum m + outer_lr mean(d) + pull (mean(phi) - phi), phi <- phi + m, theta <- phi; means over the pair.
    """

    outer_lr: float = 0.7
    momentum: float = 0.5
    pull: float = 0.7

    def begin(self, replicas: list[Replica], dice: random.Random) -> None:
        super().begin(replicas, dice)
        self._slow = [{name: tensor.clone() for name, tensor in replica.trained().items()} for replica in replicas]
        self._velocity = [{name: torch.zeros_like(t) for name, t in slow.items()} for slow in self._slow]

    @torch.no_grad()
    def act(self) -> None:
        order = list(range(len(self.replicas)))
        self.dice.shuffle(order)
        pairs = [order[first : first + 2] for first in range(0, len(order), 2)]  # the last one alone, of an odd number
        for pair in pairs:
            self._step(pair)
            for rank in pair if len(pair) > 1 else ():
                self.replicas[rank].sent += 2 * self.nbytes(self.replicas[rank])  # phi and d

    def _step(self, pair: list[int]) -> None:
        moved = self.displacement(pair, self._slow.__getitem__)
        slow = [self._slow[rank] for rank in pair]
        middles = [mean_of([phi if phi is own else as_sent(phi, self.wire, near=own) for phi in slow]) for own in slow]
        for rank, middle in zip(pair, middles, strict=True):
            for name, phi in self._slow[rank].items():
                velocity = self._velocity[rank][name]
                velocity.mul_(self.momentum).add_(moved[name], alpha=self.outer_lr)
                phi.add_(velocity.add_(middle[name] - phi, alpha=self.pull))
                self.replicas[rank].live[name].copy_(phi)
