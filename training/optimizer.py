"""The optimizers, and what of them a checkpoint holds and a peer receives.

Schedule-free AdamW ("The Road Less Scheduled", arXiv 2405.15682) keeps three sequences: training sees y, the base
iterate is z, and their average x = y + (z - y)(1 - 1/beta) is what one evaluates, generates from and calls the
result. Plain AdamW has one, w, which is used for everything.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gossip.state import Rule
from training.options import OptimizerOptions
from training.schedule_free import FusedAdamWScheduleFree

PIECE_ITEMS = 256 * 1024  # compared at a time: they stay in a CPU's cache
MOST_STEPS = 2.0**53  # that are counted
GPU_PIECE_ITEMS = 4 * 1024 * 1024  # on a GPU, where each piece costs launches


@dataclass(frozen=True)
class Excursion:
    """L2 norms of all values: of the difference of base iterate and average, and of the average."""

    distance: float
    size: float


class TrainedWeights(Protocol):
    """A model's weights in training: everything that moves them, merges them or stores them goes through here."""

    family: str
    moments_counter: str  # which of the scalars counts the steps behind the second moments
    averages: bool  # averaged() are others than those that training holds
    rules: dict[str, Rule]

    def step(self) -> None:
        """Apply the gradients."""

    def tensors(self) -> dict[str, Tensor]:
        """The live tensors by name ("y.token_emb.weight", ...): float32, on the model's device."""

    def scalars(self) -> dict[str, float]:
        """The optimizer's counters, which belong to its tensors."""

    def load_scalars(self, scalars: dict[str, float]) -> None:
        """Take counters that `scalars` of the same family returned."""

    def averaged(self) -> dict[str, Tensor]:
        """The weights to use, by parameter name, computed out of place: training's own are not touched."""

    def average_of(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """averaged(), of a copy of tensors(). Any thread."""

    def excursion(self, tensors: Mapping[str, Tensor]) -> Excursion | None:
        """How far training is from its own average in what tensors() returned, here or elsewhere, on any device; None
        where it has none."""

    def averaged_steps(self, scalars: Mapping[str, float]) -> float:
        """How many steps at the full learning rate are in the average that belongs to what scalars() returned."""

    def adopt(self, weights: dict[str, Tensor]) -> None:
        """Go on from `weights` (by parameter name) as a new optimizer would, without any history."""

    def set_hyperparameters(self, lr: float, weight_decay: float) -> None:
        """Go on with this full learning rate, and this decay of the matrices."""

    @property
    def lr(self) -> float:
        """The learning rate of the last step, warm-up included."""


def build_optimizer(model: nn.Module, options: OptimizerOptions) -> TrainedWeights:
    """The optimizer of `options` over the parameters of `model`; its state exists from the start, all zero steps."""
    return (ScheduleFreeWeights if options.schedulefree else AdamWWeights)(model, options)


def _groups(parameters: Iterable[Tensor], weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; gains and biases, being vectors, do not."""
    parameters = list(parameters)
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay, "decays": True},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0, "decays": False},
    ]


class ScheduleFreeWeights:
    """Schedule-free AdamW: y (the model's own parameters), z and second moments v."""

    family = "schedule-free AdamW"
    moments_counter = "k"
    averages = True

    def __init__(self, model: nn.Module, options: OptimizerOptions) -> None:
        self._parameters = dict(model.named_parameters())
        self._beta = options.sf_beta
        on_cpu = all(p.device.type == "cpu" for p in self._parameters.values())
        self._optimizer = FusedAdamWScheduleFree(
            _groups(self._parameters.values(), options.weight_decay),
            lr=options.lr,
            betas=(options.sf_beta, options.sf_beta2),
            warmup_steps=options.warmup_steps,
            foreach=not on_cpu,  # on a CPU one tensor at a time stays in the cache: twice as fast
        )
        self._optimizer.train()
        for parameter in self._parameters.values():
            self._optimizer.state[parameter] = {
                "z": parameter.detach().clone(memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }
        self.rules = {
            f"{kind}.{name}": Rule.SECOND_MOMENT if kind == "v" else Rule.WEIGHT
            for kind in "yzv"
            for name in self._parameters
        }

    def step(self) -> None:
        self._optimizer.step()

    def tensors(self) -> dict[str, Tensor]:
        state = self._optimizer.state
        return (
            {f"y.{name}": p.detach() for name, p in self._parameters.items()}
            | {f"z.{name}": state[p]["z"] for name, p in self._parameters.items()}
            | {f"v.{name}": state[p]["exp_avg_sq"] for name, p in self._parameters.items()}
        )

    def scalars(self) -> dict[str, float]:
        # All groups step together, with one learning rate: their counters are the same.
        group = self._optimizer.param_groups[0]
        return {name: float(group[name]) for name in ("k", "weight_sum", "lr_max")}

    def load_scalars(self, scalars: dict[str, float]) -> None:
        for group in self._optimizer.param_groups:
            group["k"] = int(scalars["k"])
            group["weight_sum"] = scalars["weight_sum"]
            group["lr_max"] = scalars["lr_max"]

    def averaged(self) -> dict[str, Tensor]:
        return self.average_of(self.tensors())

    @torch.no_grad()
    def average_of(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        weight = 1 - 1 / self._beta
        return {name: torch.lerp(tensors[f"y.{name}"], tensors[f"z.{name}"], weight) for name in self._parameters}

    @torch.no_grad()
    def excursion(self, tensors: Mapping[str, Tensor]) -> Excursion:
        device = next(iter(self._parameters.values())).device
        items = PIECE_ITEMS if device.type == "cpu" else GPU_PIECE_ITEMS
        distances, sizes = [], []
        scratch = torch.empty(items, device=device)
        for name in self._parameters:
            pieces = (tensors[f"{kind}.{name}"].view(-1).split(items) for kind in "yz")
            for pair in zip(*pieces, strict=True):
                y, z = (piece.to(device, non_blocking=True) for piece in pair)
                distances.append(torch.linalg.vector_norm(torch.sub(z, y, out=scratch[: len(z)])))
                sizes.append(torch.linalg.vector_norm(y))
        distance, size = (float(torch.linalg.vector_norm(torch.stack(norms))) for norms in (distances, sizes))
        return Excursion(distance / self._beta, size)  # z - x = (z - y) / beta; of x and y the size is the same

    def averaged_steps(self, scalars: Mapping[str, float]) -> float:
        square = scalars["lr_max"] ** 2
        # A peer's may be anything: no division by what is 0 once it is squared, and nothing that grows out of a float.
        return min(scalars["weight_sum"] / square, MOST_STEPS) if scalars["lr_max"] > 0 and square > 0 else 0.0

    @torch.no_grad()
    def adopt(self, weights: dict[str, Tensor]) -> None:
        # With k = 0 the bias correction fits the empty second moments and the warm-up runs again; with
        # weight_sum = 0 the first step's z replaces the average whole. So x, y and z must start equal.
        for name, parameter in self._parameters.items():
            state = self._optimizer.state[parameter]
            parameter.copy_(weights[name])
            state["z"].copy_(weights[name])
            state["exp_avg_sq"].zero_()
        self.load_scalars({"k": 0, "weight_sum": 0.0, "lr_max": -1.0})

    def set_hyperparameters(self, lr: float, weight_decay: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
            group["weight_decay"] = weight_decay if group["decays"] else 0.0

    @property
    def lr(self) -> float:
        return float(self._optimizer.param_groups[0]["scheduled_lr"])


class AdamWWeights:
    """Plain AdamW with linear warm-up: weights w, first moments m, second moments v."""

    family = "AdamW"
    moments_counter = "steps"
    averages = False

    def __init__(self, model: nn.Module, options: OptimizerOptions) -> None:
        self._parameters = dict(model.named_parameters())
        self._full_lr = options.lr
        self._warmup_steps = options.warmup_steps
        self._optimizer = torch.optim.AdamW(
            _groups(self._parameters.values(), options.weight_decay),
            lr=options.lr,
            betas=(options.sf_beta, options.sf_beta2),
            fused=True,
        )
        for parameter in self._parameters.values():
            self._optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }
        self._steps = 0
        self.rules = {
            f"{kind}.{name}": Rule.SECOND_MOMENT if kind == "v" else Rule.WEIGHT
            for kind in "wmv"
            for name in self._parameters
        }

    def step(self) -> None:
        warmup = min(1.0, (self._steps + 1) / self._warmup_steps) if self._warmup_steps else 1.0
        for group in self._optimizer.param_groups:
            group["lr"] = self._full_lr * warmup
        self._optimizer.step()
        self._steps += 1

    def tensors(self) -> dict[str, Tensor]:
        state = self._optimizer.state
        return (
            {f"w.{name}": p.detach() for name, p in self._parameters.items()}
            | {f"m.{name}": state[p]["exp_avg"] for name, p in self._parameters.items()}
            | {f"v.{name}": state[p]["exp_avg_sq"] for name, p in self._parameters.items()}
        )

    def scalars(self) -> dict[str, float]:
        return {"steps": float(self._steps)}

    def load_scalars(self, scalars: dict[str, float]) -> None:
        self._steps = int(scalars["steps"])
        for parameter in self._parameters.values():
            self._optimizer.state[parameter]["step"].fill_(self._steps)

    def averaged(self) -> dict[str, Tensor]:
        return self.average_of(self.tensors())

    def average_of(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensors[f"w.{name}"].clone() for name in self._parameters}

    def excursion(self, tensors: Mapping[str, Tensor]) -> None:
        return None

    def averaged_steps(self, scalars: Mapping[str, float]) -> float:
        return 0.0

    @torch.no_grad()
    def adopt(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(weights[name])
            self._optimizer.state[parameter]["exp_avg"].zero_()
            self._optimizer.state[parameter]["exp_avg_sq"].zero_()
        self.load_scalars({"steps": 0})

    def set_hyperparameters(self, lr: float, weight_decay: float) -> None:
        self._full_lr = lr
        for group in self._optimizer.param_groups:
            group["weight_decay"] = weight_decay if group["decays"] else 0.0

    @property
    def lr(self) -> float:
        return float(self._optimizer.param_groups[0]["lr"])
