"""What happens after a step whose loss or gradients were not finite."""

from typing import TYPE_CHECKING

from training.checkpoint import CheckpointError, UnreadableError, list_checkpoints, read_own_checkpoint
from training.resume import restore_weights

if TYPE_CHECKING:
    from training.loop import Trainer

BAD_STEPS_IN_A_ROW = 3  # then the rank returns to its last good state
RETURNS_IN_A_ROW = 5  # without one good step between them; then it gives up


class TrainingDiverged(RuntimeError):
    """Losses stay non-finite, from the last good state on as well."""


class Recovery:
    """Counts bad steps, and takes a trainer back to its last good state when they follow one another."""

    def __init__(self, trainer: "Trainer") -> None:
        self._trainer = trainer
        self._bad_steps = 0
        self._returns = 0

    def good_step(self) -> None:
        """A step was finite, and applied."""
        self._bad_steps = self._returns = 0

    def bad_step(self) -> None:
        """A step was not finite, and not applied. Raises TrainingDiverged when returning does not help."""
        trainer = self._trainer
        self._bad_steps += 1
        trainer.state = trainer.initial_state()
        trainer.event("non_finite", f"a loss or gradient is not finite ({self._bad_steps} in a row); step not applied")
        if self._bad_steps < BAD_STEPS_IN_A_ROW:
            return
        self._bad_steps = 0
        self._returns += 1
        if self._returns > RETURNS_IN_A_ROW:
            raise TrainingDiverged(
                f"losses stay non-finite after {RETURNS_IN_A_ROW} returns to the last good state: lower --lr, or look "
                "at the data"
            )
        trainer.event("returned", f"to {self._return_to_last_good_state()}")

    def _return_to_last_good_state(self) -> str:
        """Take the weights of this rank's newest whole checkpoint, else the initial ones; the data goes on.

        Each further return without a good step between tries an older one: the newest may be what leads astray. Raises
        TrainingDiverged where it cannot be told which checkpoints there are, or none and --init_from cannot be read:
        started again, the rank will know.
        """
        trainer, run = self._trainer, self._trainer.parts.run
        trainer.saving.finish()  # it may be the newest
        trainer.before_write()
        source = unreadable = None
        try:
            newest_first = [file for file in reversed(list_checkpoints(run.path)) if file.rank == run.rank]
        except OSError as error:
            raise TrainingDiverged(f"loss is not finite, and {run.path} unreadable ({error.strerror})") from None
        for file in newest_first[self._returns - 1 :] or newest_first[-1:]:
            try:
                training = read_own_checkpoint(file.path)["training"]
                restore_weights(trainer, training)
                trainer.totals.lineage = training["totals"]["lineage"]
                source = file.path.name
                break
            except CheckpointError as error:
                trainer.event("checkpoint_passed_over", str(error))
                unreadable = file.path if isinstance(error, UnreadableError) else unreadable
        if source is None and unreadable is not None:
            raise TrainingDiverged(f"loss is not finite, and {unreadable} unreadable: mend its disk")
        if source is None:
            try:
                initial = trainer.parts.initial_weights()
            except CheckpointError as error:
                raise TrainingDiverged(f"loss is not finite, and where it began is lost: {error}") from None
            trainer.weights.adopt(initial)
            trainer.totals.lineage = 0
        trainer.parts.node.weights_changed()
        trainer.parts.fitness.replaced(judged=False)
        return source or "the initial weights"
