"""What happens between the replicas of an arm: the base of all policies, and parsing an arm's name and options."""

import dataclasses
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from bench.evolution.replica import Replica
from gossip.fitness_tracker import FitnessTracker
from runtime.errors import UserError
from training.fitness import Fitness
from training.options import OptimizerOptions
from training.probe import Probe


@dataclass
class Policy:
    """An arm's conduct; its fields are its options. one_model: all ranks train one model, on their mean gradient;
    mutation_scale: of an inherited learning rate, where one is inherited.
    """

    one_model: ClassVar[bool] = False
    mutation_scale: ClassVar[float] = 0.0

    def fitness_of(self, tracker: FitnessTracker, probe: Probe) -> Fitness:
        """How a replica of this arm knows its fitness."""
        return Fitness("ema", tracker, probe, 1)

    def begin(self, replicas: list[Replica], dice: random.Random) -> None:
        """Before the first step. dice: the only source of chance."""
        self.replicas = replicas
        self.dice = dice
        self.counts: Counter[str] = Counter()

    def after_step(self, step: int) -> None:
        """After every replica's optimizer step number `step` (from 1)."""


@dataclass
class Solo(Policy):
    """Nobody meets anybody."""


@dataclass(frozen=True)
class Conditions:
    """What any arm may be put under.

    replicas: of the population, 0: as --replicas says. lr: over --lr. sf_beta: of schedule-free AdamW. optimizer: that,
    or cosine, plain AdamW whose rate after the warm-up falls to a tenth by the last step, as a half cosine. spread: the
    rates lie from x1/4 to x2 (for 8), evenly in their logarithm, one for each replica. corrupt: so many replicas read
    random bytes. diverging: so many train at DIVERGING times their rate. parted: 1, and each rank's lanes begin side by
    side, in its own part of the data; 0, and they begin all over the data, between the others', as train.py's do.
    minutes: with --real, so long a rank trains by the wall clock, whatever --steps says; 0: it takes --steps.
    """

    replicas: int = 0
    minutes: float = 0.0
    lr: float = 1.0
    sf_beta: float = OptimizerOptions.sf_beta
    optimizer: str = "schedulefree"
    spread: float = 1.0
    corrupt: int = 0
    diverging: int = 0
    parted: int = 0


DIVERGING = 30.0


@dataclass(frozen=True)
class Arm:
    """A policy by name with its options, under conditions; label: the text that gives the same arm."""

    label: str
    policy_class: type[Policy]
    options: tuple[tuple[str, Any], ...]
    conditions: Conditions

    def policy(self) -> Policy:
        """A new policy of this arm."""
        return self.policy_class(**dict(self.options))

    def in_full(self) -> dict[str, str]:
        """Every option and condition in force, as text."""
        told = dataclasses.asdict(self.policy()) | dataclasses.asdict(self.conditions)
        return {"policy": self.label.partition(":")[0]} | {name: shown(value) for name, value in told.items()}


def parse_arm(text: str, policies: Mapping[str, type[Policy]]) -> Arm:
    """ "name" or "name:option=value,..." -> Arm. Raises UserError."""
    name, _, rest = text.partition(":")
    if name not in policies:
        raise UserError(f"expected an arm among {', '.join(sorted(policies))}, got {name!r}: choose one")
    options, conditions = {}, {}
    of_policy = {field.name: field for field in dataclasses.fields(policies[name])}
    of_all = {field.name: field for field in dataclasses.fields(Conditions)}
    for pair in filter(None, rest.split(",")):
        option, equals, value = pair.partition("=")
        field = of_policy.get(option) or of_all.get(option)
        if not equals or field is None:
            known = ", ".join([*of_policy, *of_all])
            raise UserError(f"expected option=value with an option of {name} ({known}), got {pair!r}: write it so")
        (options if option in of_policy else conditions)[option] = _convert(field, value)
    given = ",".join(f"{option}={shown(value)}" for option, value in sorted((options | conditions).items()))
    arm = Arm(f"{name}:{given}" if given else name, policies[name], tuple(options.items()), Conditions(**conditions))
    arm.policy()  # so that options which make no sense are found now
    known = ("schedulefree", "cosine")
    require(arm.conditions.minutes >= 0, "minutes", "a time from 0", arm.conditions.minutes)
    require(arm.conditions.optimizer in known, "optimizer", " or ".join(known), arm.conditions.optimizer)
    return arm


def _convert(field: dataclasses.Field, value: str) -> Any:
    try:
        return type(field.default)(value)
    except ValueError:
        wanted = type(field.default).__name__
        raise UserError(f"expected for {field.name} a value of type {wanted}, got {value!r}: change it") from None


def shown(value: Any) -> str:
    """A value as it is written in an arm's name."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def require(inside: bool, option: str, expected: str, got: object) -> None:
    """Raise UserError unless `inside`."""
    if not inside:
        raise UserError(f"expected for {option} {expected}, got {got}: change it")
