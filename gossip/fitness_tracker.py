"""How fit a rank's weights are: a moving average of its training loss that knows when it speaks of other weights."""

import math

from runtime.errors import UserError

ENOUGH = 0.5  # share of the average's full weight that losses of these very weights must have


class FitnessTracker:
    """An exponential moving average of losses (nats per byte), corrected for its start. One thread.

    decay: 0 <= decay < 1, what one observation leaves of those before it. best: the lowest fitness ever known.
    """

    def __init__(self, decay: float) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"expected 0 <= --gossip_fitness_decay < 1, got {decay}: for example 0.99")
        self.decay = decay
        self.best: float | None = None
        self._sum = 0.0  # of weight * loss since the weights last changed
        self._weight = 0.0  # 1 - decay^n after n observations
        self._before: float | None = None  # the average up to that change

    def observe(self, loss: float) -> None:
        """Take in the loss of one training step; it must be finite."""
        assert math.isfinite(loss), f"a loss of {loss}"
        self._sum = self.decay * self._sum + (1 - self.decay) * loss
        self._weight = self.decay * self._weight + (1 - self.decay)
        fitness = self.fitness
        if fitness is not None:
            self.best = fitness if self.best is None else min(self.best, fitness)

    def reset(self) -> None:
        """The weights were changed by other means than training: what was observed describes others."""
        self._before = self.ema
        self._sum = self._weight = 0.0

    @property
    def ema(self) -> float | None:
        """The average for display; None before the first loss."""
        return self._sum / self._weight if self._weight > 0 else self._before

    @property
    def fitness(self) -> float | None:
        """The average once losses of these weights have enough weight in it, else None: unknown."""
        return self._sum / self._weight if self._weight >= ENOUGH else None

    def state_dict(self) -> dict[str, float | None]:
        """What load_state_dict() restores."""
        return {"sum": self._sum, "weight": self._weight, "before": self._before, "best": self.best}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        """Continue where state_dict() was taken."""
        self._sum, self._weight = state["sum"], state["weight"]
        self._before, self.best = state["before"], state["best"]
