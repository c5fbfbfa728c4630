"""One of the worst ranks takes up an elite checkpoint, and keeps what that made of it only if it is no worse."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from gossip.merge import merge_judged
from runtime.exhaustion import as_memory_error
from training.checkpoint import CheckpointError, read_own_checkpoint
from training.checkpoint_writer import NO_MEMORY
from training.population import is_among_worst, standing_of

if TYPE_CHECKING:
    from training.loop import Trainer


class Rejuvenation:
    """Decides at step boundaries whether to merge an elite, and does. All methods are for the training thread."""

    def __init__(self, trainer: "Trainer") -> None:
        self._trainer = trainer
        self._refused: set[str] = set()  # names of checkpoints that did harm here: not again

    def consider(self) -> None:
        """Merge a random elite, if this rank is among the worst and the dice want it."""
        trainer = self._trainer
        node, options = trainer.parts.node, trainer.options.population
        standing = standing_of(node.roster, trainer.parts.run.rank)
        if is_among_worst(standing, options.rejuvenation_threshold):
            # The standing is as old as the last heartbeat: weights that are newer than their fitness have none.
            measured = trainer.parts.fitness.value is not None and not node.engaged
            if trainer.dice.random() < options.rejuvenation_probability and measured:
                try:
                    with as_memory_error():
                        self._rejuvenate()
                except CheckpointError as error:
                    trainer.event("rejuvenation_failed", str(error).partition("\n")[0])
                except MemoryError as error:
                    trainer.event("rejuvenation_failed", str(error) or NO_MEMORY)
                except OSError as error:
                    trainer.event("rejuvenation_failed", f"{trainer.parts.run.path}: {error.strerror}")

    def _rejuvenate(self) -> None:
        """Raises CheckpointError where no elite serves, OSError, or that memory is out; the weights are then as they
        were."""
        trainer = self._trainer
        options, schema = trainer.options.population, trainer.parts.schema
        chosen = self._choose()
        if chosen is None:
            return
        link, name = chosen
        training = read_own_checkpoint(link)["training"]
        live, elite = trainer.weights.tensors(), training["tensors"]
        if {k: tensor.shape for k, tensor in elite.items()} != {k: tensor.shape for k, tensor in live.items()}:
            raise CheckpointError(f"expected an elite of this model and optimizer, got another in {link}")
        objection = trainer.parts.objections.to(elite, training["scalars"], training["genes"])
        if objection is not None:
            self._refused.add(name)
            trainer.event("rejuvenation_failed", f"{link.name} ({name}): {objection}")
            return
        trainer.before_write()
        trial = merge_judged(
            live, schema, elite, None, options.gossip_merge_method, options.gossip_recombination_alpha,
            None if options.gossip_rollback is None else trainer.parts.fitness.judge, options.gossip_rollback,
        )  # fmt: skip
        if not trial.kept:
            self._refused.add(name)
            trainer.event("rolled_back", f"{link.name} ({name}): {trial}")
            return
        trainer.parts.node.weights_changed()
        whole = options.gossip_merge_method == "clonal"
        judged = options.gossip_rollback is not None
        trainer.weights_replaced(training["scalars"] if whole else None, training["totals"]["lineage"], judged)
        trainer.event("rejuvenated", f"merged {link.name}")

    def _choose(self) -> tuple[Path, str] | None:
        """A random elite's link, and the name of the checkpoint behind it; None where all of them did harm here.

        Raises CheckpointError where there is none at all.
        """
        run_dir = self._trainer.parts.run.path
        # Not Path.resolve(), which raises RuntimeError for links in a circle.
        links = [(link, os.path.basename(os.path.realpath(link))) for link in sorted(run_dir.glob("elite_*.pt"))]
        if not links:
            raise CheckpointError(f"expected an elite checkpoint, got none in {run_dir}: none was saved yet")
        untried = [(link, name) for link, name in links if name not in self._refused]
        return self._trainer.dice.choice(untried) if untried else None
