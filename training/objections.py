"""Why a peer's weights are not to be mixed into this rank's: what tells of a rank that diverges before any loss does.

In a rank's first steps one whose rate is far too high learns as fast as any, or faster, and its average looks like the
others': by their losses a mean of it and them is sound. But its weights have gone many times as far, and whoever takes
half of them is long in getting back.
"""

from collections.abc import Callable, Mapping

from torch import Tensor

from training.optimizer import TrainedWeights

# Times this rank's learning rate, and times as far from its average: at 8 times the rate a base iterate was at most 8.7
# times as far (bench/excursion.py).
LIMIT = 10.0
GROWTH = 2.0  # power of the steps behind an average with which its distance grows at most: in a warm-up's first steps
ROUNDING = 2.0**-8  # of the weights: what bfloat16 on the wire may add


class Objections:
    """Compares a peer's learning rate, and how far its base iterate is from its average, with this rank's. All methods
    are for the training thread.

    genes: the hyperparameters that this rank trains with, "lr" among them; lr_evolves: every rank has a rate of its
    own, and which ones serve is for the losses to say; limit: how many times as far, and as high, a peer's may be (inf:
    any).
    """

    def __init__(
        self,
        weights: TrainedWeights,
        genes: Callable[[], Mapping[str, float]],
        lr_evolves: bool,
        limit: float = LIMIT,
    ) -> None:
        self._weights = weights
        self._genes = genes
        self._lr_evolves = lr_evolves
        self._limit = limit

    def to(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, float], genes: Mapping[str, float]) -> str | None:
        """What speaks against mixing a peer's state into the live one; None if nothing does.

        tensors, scalars: as TrainedWeights has them; genes: the peer's.
        """
        return self._to_rate(genes) or self._to_excursion(tensors, scalars, genes)

    def _to_rate(self, genes: Mapping[str, float]) -> str | None:
        own = self._genes()["lr"]
        if self._lr_evolves or genes["lr"] <= self._limit * own:
            return None
        return f"it trains at a rate of {genes['lr']:.3g}, where {own:.3g} is usual here"

    def _to_excursion(
        self, tensors: Mapping[str, Tensor], scalars: Mapping[str, float], genes: Mapping[str, float]
    ) -> str | None:
        """With more steps behind its average a peer may have gone the farther, and where learning rates evolve, as many
        times as far as its own is higher. A rank that has just begun its average, of one step at most, which is that
        step's base iterate, cannot tell."""
        steps = self._weights.averaged_steps(self._weights.scalars())
        if steps <= 1:
            return None
        theirs, ours = self._weights.excursion(tensors), self._weights.excursion(self._weights.tensors())
        if theirs is None or ours is None:
            return None
        longer = max(1.0, self._weights.averaged_steps(scalars) / steps) ** GROWTH
        faster = max(1.0, genes["lr"] / self._genes()["lr"]) if self._lr_evolves else 1.0
        if theirs.distance <= self._limit * longer * faster * ours.distance + ROUNDING * theirs.size:
            return None
        return f"its base iterate is {theirs.distance:.3g} from its average, where {ours.distance:.3g} is usual here"
