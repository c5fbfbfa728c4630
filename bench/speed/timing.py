"""Times of several forms of one piece of work, taken in turn, and the ratios between them.

A shared machine's speed drifts: forms that are timed in turn meet the same drift, and a ratio of two that followed each
other within one round stands where their milliseconds do not. On a GPU, whose work Python only launches, a turn is as
many calls as take 20 ms between two waits for the device: of one call alone the launches would be timed.
"""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

GPU_TURN_SECONDS = 0.02


class Spread(NamedTuple):
    """The quartiles of a figure over the rounds."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        """A single value is all three."""
        return cls(*(statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3))


class Goal(NamedTuple):
    """What a figure should be: `sense` ">=" or "<=", and the bound."""

    sense: str
    bound: float

    def met(self, value: float) -> bool:
        """Whether `value` is on the right side."""
        return value >= self.bound if self.sense == ">=" else value <= self.bound

    def __str__(self) -> str:
        return f"{self.sense} {self.bound:g}"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    case: what was done, by which of our forms; ours, theirs: what each took, in `unit`; against: the other form;
    ratio: how many times better ours is, unless `meaning` says what else it is; goal: of the ratio's median.
    """

    case: str
    ours: float
    unit: str
    against: str = ""
    theirs: float | None = None
    ratio: Spread | None = None
    goal: Goal | None = None
    meaning: str = "times as fast"

    @property
    def met(self) -> bool | None:
        """None: there is no goal."""
        return None if self.goal is None else self.goal.met(self.ours if self.ratio is None else self.ratio.median)


@dataclass(frozen=True)
class Setting:
    """Where and how long to measure. rounds: of each comparison, at most; quick: tiny sizes, to see that it runs."""

    device: torch.device
    rounds: int = 15
    quick: bool = False
    tell: Callable[[str], None] = field(default=lambda text: None)

    @property
    def cuda(self) -> bool:
        """On a GPU, ROCm's among them."""
        return self.device.type == "cuda"

    def times(self, rounds: int) -> int:
        """How many rounds of something that should have `rounds` of them."""
        return 2 if self.quick else min(self.rounds, rounds)

    @property
    def turn_seconds(self) -> float:
        """How long a turn is to take at least."""
        return GPU_TURN_SECONDS if self.cuda and not self.quick else 0.0

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize()


class Turns:
    """Seconds of a call of each form in each round."""

    def __init__(self, setting: Setting, forms: dict[str, Callable[[], object]], rounds: int) -> None:
        """Run the forms in turn; a first round is not counted."""
        self.seconds: dict[str, list[float]] = {name: [] for name in forms}
        calls: dict[str, int] = {}
        gc.collect()
        gc.disable()
        try:
            for counted in range(-1, setting.times(rounds)):
                for name, form in forms.items():
                    setting.tell(f"round {counted + 1} of {setting.times(rounds)}: {name}")
                    if counted < 0:
                        _turn(setting, form, 1)  # kernels are compiled
                        calls[name] = _calls(setting, form)
                    else:
                        self.seconds[name].append(_turn(setting, form, calls[name]) / calls[name])
        finally:
            gc.enable()

    def median(self, form: str) -> float:
        """Seconds."""
        return statistics.median(self.seconds[form])

    def ratio(self, over: str, under: str) -> Spread:
        """Of the seconds of `over` to those of `under`, round by round."""
        return Spread.of([a / b for a, b in zip(self.seconds[over], self.seconds[under], strict=True)])

    def faster(self, case: str, ours: str, theirs: str, goal: Goal | None = None, against: str | None = None) -> Row:
        """How many times as fast `ours` is as `theirs`, in milliseconds."""
        return Row(
            case, self.median(ours) * 1e3, "ms", against or theirs, self.median(theirs) * 1e3,
            self.ratio(theirs, ours), goal,
        )  # fmt: skip

    def share_of(self, case: str, ours: str, limit: str, goal: Goal | None = None, against: str | None = None) -> Row:
        """How much of the speed that `limit` has `ours` reaches, in milliseconds."""
        return Row(
            case, self.median(ours) * 1e3, "ms", against or limit, self.median(limit) * 1e3,
            self.ratio(limit, ours), goal, "of its speed",
        )  # fmt: skip


def _turn(setting: Setting, form: Callable[[], object], calls: int) -> float:
    """Seconds of so many calls, until the device has done them."""
    setting.synchronize()
    began = time.perf_counter()
    for _ in range(calls):
        form()
    setting.synchronize()
    return time.perf_counter() - began


def _calls(setting: Setting, form: Callable[[], object]) -> int:
    """How many calls make a turn, a power of two."""
    calls = 1
    while setting.turn_seconds and _turn(setting, form, calls) < setting.turn_seconds:
        calls *= 2
    return calls
