"""Hyperparameters that evolve: each rank trains with its own, and who takes up a fitter rank's weights inherits them
too, a little changed."""

import math
import random
from collections.abc import Mapping

from runtime.errors import UserError
from training.options import OptimizerOptions

EVOLVABLE = ("lr", "weight_decay", "grad_clip")
REACH = 32.0  # a value stays within this factor of the given one


class Heredity:
    """The values in force of the hyperparameters `names` (of EVOLVABLE), all others being the same for every rank.

    given: the options, around whose values the first ones are drawn; spread: at most this factor off, evenly on a
    logarithmic scale, one rank in each of `world_size` equal parts of it; mutation_scale: standard deviation of the
    natural logarithm of the factor that an inherited value is multiplied by. Raises UserError for a name that cannot
    evolve, or whose given value is 0.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        given: OptimizerOptions,
        spread: float,
        mutation_scale: float,
        rank: int,
        world_size: int,
    ) -> None:
        self._given: dict[str, float] = {}
        for name in names:
            if name not in EVOLVABLE:
                raise UserError(f"expected --evolve of {','.join(EVOLVABLE)}, got {name!r}: choose among them")
            self._given[name] = float(getattr(given, name))
            if self._given[name] == 0:
                raise UserError(f"expected --{name} above 0 beside --evolve {name}, got 0: give where to start")
        self._scale = mutation_scale
        self.values: dict[str, float] = {}
        for name, centre in self._given.items():
            dice = random.Random(f"{name} {given.seed}")
            parts = list(range(world_size))
            dice.shuffle(parts)  # so that two hyperparameters do not rise together over the ranks
            places = [dice.random() for _ in range(world_size)]
            position = (parts[rank] + places[rank]) / world_size
            self.values[name] = centre * spread ** (2 * position - 1)

    def load(self, values: Mapping[str, float]) -> None:
        """Go on with this rank's own, as it had them before; values: these, and perhaps others that do not evolve."""
        self.values.update({name: values[name] for name in self._given})

    def inherit(self, values: Mapping[str, float], dice: random.Random) -> None:
        """Take up a fitter rank's values, each multiplied by a log-normal factor and kept within REACH."""
        for name, centre in self._given.items():
            most = 2 * math.log(REACH)  # from one bound to the other
            mutated = values[name] * math.exp(min(max(dice.gauss(0, self._scale), -most), most))
            self.values[name] = min(max(mutated, centre / REACH), centre * REACH)
