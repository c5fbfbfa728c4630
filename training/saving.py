"""When a rank's state is saved, and what became of it. Everything here runs on the training thread."""

from typing import TYPE_CHECKING

from runtime.exhaustion import as_memory_error
from training.checkpoint_writer import NO_MEMORY, Moment, Saved
from training.population import save_chance, standing_of
from training.resume import capture

if TYPE_CHECKING:
    from training.loop import Trainer


class Saving:
    """A trainer's checkpoints: the one that is due, the one that is being written, and the last that was.

    step: of the newest that was written.
    """

    def __init__(self, trainer: "Trainer") -> None:
        self.step: int | None = None
        self._trainer = trainer
        self._failure: str | None = None  # of the newest save
        self._due = False

    def consider(self) -> None:
        """After an optimizer step: does a checkpoint come due with it?"""
        trainer = self._trainer
        run, population = trainer.options.run, trainer.options.population
        if population.fitness_weighted_checkpointing:
            standing = standing_of(trainer.parts.node.roster, trainer.parts.run.rank)
            chance = save_chance(standing, run.save_every, population.elite_checkpoint_multiplier)
            self._due |= trainer.dice.random() < chance
        else:
            self._due |= trainer.totals.step % run.save_every == 0

    def begin_if_wanted(self) -> None:
        """Begin the save that is due, or asked for. It waits for the one before it, and one that is due also until the
        fitness for its name is known."""
        parts = self._trainer.parts
        self._report(parts.writer.take())
        if not parts.writer.idle:
            return
        if parts.signals.take_save():
            self.begin("asked for by a signal")
        elif self._due and parts.fitness.value is not None:
            self.begin()

    def begin(self, why: str = "", measured: bool = True) -> None:
        """Begin a checkpoint of this moment; how it ends is seen at a later step boundary, or by finish(). measured:
        its name is to tell the fitness of these very weights, else none unless that is known."""
        trainer, fitness = self._trainer, self._trainer.parts.fitness
        self._due = False
        try:
            with as_memory_error():
                if measured:
                    fitness.measure_aside()
                state = capture(trainer)
            trainer.parts.writer.begin(Moment(trainer.totals.step, fitness.value_now, why, state))
        except MemoryError:
            self._fail(NO_MEMORY)

    def finish(self) -> None:
        """Wait for the save that is under way, if one is."""
        self._report(self._trainer.parts.writer.wait())

    def last(self, why: str, measured: bool = True) -> None:
        """Save the newest step, unless it is saved already, and wait for it. See begin()."""
        self.finish()
        if self._trainer.totals.step == self.step:
            self._trainer.line(f"{why}, and saved already")
        else:
            self.begin(why, measured)
            self.finish()

    @property
    def unsaved(self) -> str | None:
        """Why the newest step is in no checkpoint, once the last save has ended; None if it is in one."""
        return None if self.step == self._trainer.totals.step else self._failure or "not saved"

    def _report(self, saved: Saved | None) -> None:
        if saved is None:
            return
        if saved.path is None:
            self._fail(saved.failure)
            return
        self._failure = None
        if saved.tidying is not None:
            self._trainer.event("tidy_failed", saved.tidying)
        self.step = saved.moment.step
        self._trainer.line(f"saved {saved.path.name}{f' ({saved.moment.why})' if saved.moment.why else ''}")

    def _fail(self, failure: str) -> None:
        self._failure = failure
        self._trainer.event("save_failed", f"{failure}; the older checkpoints stand, training goes on")
