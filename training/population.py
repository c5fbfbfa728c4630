"""What a rank's place in the ranking changes in its training: how often it saves, and when an elite renews it."""

import random
from pathlib import Path

from gossip.filesystem_coordinator import Roster
from gossip.merge import merge
from gossip.state import Schema
from training.checkpoint import CheckpointError, read_own_checkpoint
from training.optimizer import TrainedWeights
from training.options import PopulationOptions


def standing_of(roster: Roster | None, rank: int) -> float | None:
    """0 for the best of the live ranks ... 1 for the worst; None without a ranking of at least two."""
    if roster is None:
        return None
    ranked = [member for member in roster.members if member.standing is not None]
    member = roster.member(rank)
    return member.standing if member is not None and len(ranked) > 1 else None


def save_chance(standing: float | None, save_every: int, multiplier: float) -> float:
    """Chance of a checkpoint at this step.

    The best rank saves `multiplier` times as often as the last, linearly in between. Standings are spread evenly, so
    their mean weight is (multiplier + 1) / 2; over that, the population's mean distance between saves is `save_every`.
    """
    if standing is None:
        return 1 / save_every
    weight = multiplier + standing * (1 - multiplier)
    return weight / ((multiplier + 1) / 2) / save_every


def is_among_worst(standing: float | None, threshold: float) -> bool:
    """Is a rank in the last `threshold` (0 ... 1) of the ranking?"""
    return standing is not None and threshold > 0 and standing >= 1 - threshold


def merge_elite(
    run_dir: Path, weights: TrainedWeights, schema: Schema, options: PopulationOptions, dice: random.Random
) -> tuple[str, dict[str, float]]:
    """Merge the weights of a random elite checkpoint into the live ones; returns its link's name and its scalars.

    Raises CheckpointError if there is none that is whole and fits; then nothing was changed.
    """
    links = sorted(run_dir.glob("elite_*.pt"))
    if not links:
        raise CheckpointError(f"expected an elite checkpoint, got none in {run_dir}: none was saved yet")
    link = dice.choice(links)
    training = read_own_checkpoint(link)["training"]
    live = weights.tensors()
    shapes = {name: tensor.shape for name, tensor in training["tensors"].items()}
    if shapes != {name: tensor.shape for name, tensor in live.items()}:
        raise CheckpointError(f"expected an elite of this model and optimizer, got another in {link}")
    merge(live, schema, training["tensors"], None, options.gossip_merge_method, options.gossip_recombination_alpha)
    return link.name, training["scalars"]
