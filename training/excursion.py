"""How far a peer's base iterate has strayed: what tells of a rank that diverges before any loss does.

In a rank's first steps one whose rate is far too high learns as fast as any, or faster, and its average looks like the
others': by their losses a mean of it and them is sound. But its weights have gone many times as far, and whoever takes
half of them is long in getting back.
"""

from collections.abc import Callable, Mapping

from torch import Tensor

from training.optimizer import TrainedWeights

LIMIT = 10.0  # times as far as here: at 8 times the rate 8.7 was the most (bench/excursion.py), at 30 times 31
GROWTH = 2.0  # power of the steps behind an average with which its distance grows at most: in a warm-up's first steps
ROUNDING = 2.0**-8  # of the weights: what bfloat16 on the wire may add


class Excursions:
    """Compares a peer's excursion with that of the live weights. All methods are for the training thread.

    genes: this rank's hyperparameters that evolve; limit: how many times as far a peer may have gone, inf for any.
    """

    def __init__(self, weights: TrainedWeights, genes: Callable[[], Mapping[str, float]], limit: float = LIMIT) -> None:
        self._weights = weights
        self._genes = genes
        self._limit = limit

    def objection(
        self, tensors: Mapping[str, Tensor], scalars: Mapping[str, float], genes: Mapping[str, float]
    ) -> str | None:
        """Why a peer's state is not to be mixed into the live one; None where nothing speaks against it.

        tensors, scalars: as TrainedWeights has them; genes: the peer's. With more steps behind its average it may have
        gone the farther, and where learning rates evolve, as many times as far as its own is higher: whether such a
        rate serves is for the losses to say. A rank that has just begun its average, of one step at most, which is that
        step's base iterate, cannot tell.
        """
        steps = self._weights.averaged_steps(self._weights.scalars())
        if steps <= 1:
            return None
        theirs, ours = self._weights.excursion(tensors), self._weights.excursion(self._weights.tensors())
        if theirs is None or ours is None:
            return None
        longer = max(1.0, self._weights.averaged_steps(scalars) / steps) ** GROWTH
        faster = max(1.0, genes["lr"] / self._genes()["lr"]) if "lr" in genes else 1.0
        if theirs.distance <= self._limit * longer * faster * ours.distance + ROUNDING * theirs.size:
            return None
        return f"its base iterate is {theirs.distance:.3g} from its average, where {ours.distance:.3g} is usual here"
