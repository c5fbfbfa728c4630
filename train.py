"""Train one rank of a population of byte-level MinGRU language models.

    python train.py --data /path/to/data.txt --output output_dir --params 1g --cuda

Wiring only: options become parts, parts become a Trainer, which runs. A launcher (train.local.sh, torchrun, srun)
starts many of these processes; alone, this one is a population of one.
"""

import runtime.packages  # noqa: F401  # isort: skip

import contextlib
import functools
import math
import os
import random
import sys
import time
from collections.abc import Mapping
from typing import Any, BinaryIO

from runtime.signals import SignalFlags

signals = SignalFlags()
if __name__ == "__main__":
    signals.install()  # before torch: its import takes seconds, in which any signal would end the process

from gossip.event_log import EventLog
from gossip.evolutionary_node import EvolutionaryNode
from gossip.filesystem_coordinator import RankReplaced
from gossip.fitness_tracker import FitnessTracker
from gossip.state import Schema
from runtime.allocator import gather_in_huge_pages
from runtime.arguments import run_main
from runtime.errors import UserError
from runtime.exhaustion import as_memory_error
from runtime.files import set_aside
from runtime.ranks import Identity, identity_from_environment
from runtime.scribe import Scribe
from runtime.stderr import say
from training import setup
from training.checkpoint import checkpoint_bytes
from training.checkpoint_writer import NO_MEMORY, CheckpointWriter
from training.computation import peak_flops
from training.fitness import Fitness
from training.loop import Parts, Trainer
from training.metrics import MetricsFile, Progress, RunLog
from training.objections import Objections
from training.options import parse_arguments
from training.probe import LEAST_HELD_OUT, Probe
from training.recovery import TrainingDiverged
from training.resume import restore
from training.retention import RetentionPolicy, disk_use, remove_leftovers, retire_from, tidy
from training.start import Start, prepare


def main(arguments: list[str], signals: SignalFlags | None = None) -> int:
    """The command line; signals: where handlers are installed already. Returns the status to exit with."""
    signals = signals or SignalFlags().install()
    given = parse_arguments(arguments, __doc__.splitlines()[0])
    identity = identity_from_environment(os.environ)
    if identity.launcher is not None:
        signals.follow(identity.launcher)
    try:
        with as_memory_error():
            return run_rank(given, identity, signals)
    except MemoryError as error:
        said = str(error) or NO_MEMORY
        say(f"error: rank {identity.rank}: {said}: lower --batch_size, --chunk_size or --params")
        return 1
    except UserError as error:
        if not identity.restarts or isinstance(error, RankReplaced):
            raise
        # The same command line served before: it is a disk or a network that is at fault, and a later try may help.
        say(f"error: rank {identity.rank}: {error}")
        return 1


def run_rank(given: Mapping[str, Any], identity: Identity, signals: SignalFlags) -> int:
    """One process of a rank, from its flags to its exit status."""
    start = prepare(given, identity)
    options, run = start.options, start.run
    with contextlib.ExitStack() as ending:
        lock = ending.enter_context(contextlib.ExitStack())  # let go of last
        scribe = Scribe()
        ending.callback(scribe.close)
        log = RunLog(run.log, echo=start.is_first and not sys.stderr.isatty(), hand=scribe.hand)
        ending.callback(log.close)
        lock.callback(enter(start, log).close)
        policy = RetentionPolicy(options.run.keep_checkpoints, options.run.keep_elite, options.run.archive_rate)
        trainer = assemble(start, policy, signals, log, scribe)
        ending.callback(trainer.parts.events.close)
        take_up(start, trainer)
        announce(start, policy, trainer)
        if start.inherits or (not start.resumed and options.run.init_from):
            trainer.saving.begin("where it starts")  # what it came from lies elsewhere, and may go
        start.resumed = None  # a whole state
        return train(start, trainer)


def enter(start: Start, log: RunLog) -> BinaryIO:
    """Take the rank's place in the run directory; returns the lock that holds it. Raises UserError."""
    run, identity, held = start.run, start.identity, start.held
    if not start.goes_on:
        run.claim(identity)
        held = run.lock()
        if not identity.restarts:  # another run of this name may have left its own
            try:
                log.begin_anew()
                set_aside(run.event_log)
            except OSError as error:
                raise UserError(f"expected to begin new logs, got {error.strerror}: mend {run.log.parent}") from None
    try:
        remove_leftovers(run.path, identity.rank)
    except OSError as error:
        say(f"warning: rank {identity.rank}: what killed processes left in {run.path} stays: {error.strerror}")
    if start.is_first or not start.goes_on:  # a new run's by whoever is there first
        run.write_config(
            start.options, start.config, start.parameters, identity, str(start.device), is_new=not start.goes_on
        )
    return held


def assemble(start: Start, policy: RetentionPolicy, signals: SignalFlags, log: RunLog, scribe: Scribe) -> Trainer:
    """The Trainer, of its parts, as a new run's begins."""
    options, run, identity, weights = start.options, start.run, start.identity, start.weights
    heredity = start.heredity
    events = EventLog(run.event_log, identity.rank, tell=log.mix, hand=scribe.hand)
    archive_dice = random.Random()

    def tidy_run() -> None:
        tidy(run.path, policy, archive_dice)

    def genes() -> dict[str, float]:
        return {"lr": options.optimizer.lr} | heredity.values

    fitness = Fitness(
        options.population.gossip_fitness, FitnessTracker(options.population.gossip_fitness_decay),
        Probe(
            start.model, weights, start.probe_region, options.population.probe_windows,
            options.data.batch_size * options.data.chunk_size, start.device, start.dtype,
        ),
        options.population.probe_every,
    )  # fmt: skip
    objections = Objections(weights, genes, lr_evolves="lr" in heredity.values)
    travelling = setup.gossip_state(options, weights)
    terms = setup.terms(options, weights, start.training_region, start.held_out)
    node = EvolutionaryNode(
        identity=identity, run_id=setup.run_identity(run), run_dir=run.path, listener=start.listener,
        schema=Schema.of(travelling, weights.rules, terms), live=travelling, scalars=weights.scalars,
        config=start.gossip, event_log=events, seed=options.optimizer.seed, leader_duty=lambda roster: tidy_run(),
        secret=setup.choose_secret(options, run), judge=fitness.judge, known=lambda: fitness.known, genes=genes,
        objection=lambda peer: objections.to(peer.buffer.views, peer.scalars, peer.genes),
    )  # fmt: skip
    schema = Schema.of(weights.tensors(), weights.rules, {})
    writer = CheckpointWriter(
        run.path, identity.rank, start.config, options.data.document_delimiter, weights, schema, tidy_run
    )
    return Trainer(
        Parts(
            options=options, run=run, device=start.device, model=start.model, weights=weights, schema=schema,
            lanes=start.lanes, held_out=start.held_out, writer=writer, node=node, fitness=fitness, heredity=heredity,
            signals=signals, metrics=MetricsFile(run.metrics), hand=scribe.hand, log=log, events=events,
            objections=objections, initial_weights=lambda: setup.initial_weights(options, start.config, None),
        )
    )  # fmt: skip


def take_up(start: Start, trainer: Trainer) -> None:
    """Put the trainer where the rank was, and out of its way what it is going to do again. Raises UserError."""
    trainer.apply_hyperparameters()
    if start.resumed:
        restore(trainer, start.resumed.content["training"], moves=start.resumed.moves)
    run, step = start.run, trainer.totals.step
    try:
        retire_from(run.path, run.rank, step + (not start.inherits))
    except OSError as error:
        raise UserError(f"expected to archive checkpoints in {run.path}, got {error.strerror}: mend it") from None
    try:
        if start.begins_again:  # its rows may be all that is left of work whose checkpoints somebody has taken away
            set_aside(run.metrics)
        trainer.parts.metrics.rewind(step)
    except OSError as error:
        trainer.event("metrics_failed", f"rows of steps to be done again stay: {error.strerror or error}")


def announce(start: Start, policy: RetentionPolicy, trainer: Trainer) -> None:
    """Say in the log, and of the first rank on the terminal, what is about to train. Raises UserError."""
    config, identity, device, heredity = start.config, start.identity, start.device, start.heredity
    held_out = 0 if start.held_out is None else len(start.held_out)
    try:
        file_bytes = checkpoint_bytes(trainer.parts.schema, start.parameters, trainer.state)
        disk = disk_use(start.run.path, policy, file_bytes, identity.world_size)
    except OSError as error:
        raise UserError(f"expected to list {start.run.path}, got {error.strerror}: mend it") from None
    whence = ""
    if start.probe_region.overlaps(start.training_region):
        whence = f" of the training bytes' end: fewer than {LEAST_HELD_OUT:,} are held out"
    shares = ", ".join(f"{name} {value:.4g}" for name, value in heredity.values.items())
    mfu = "no MFU: its peak is unknown" if peak_flops(device, start.dtype) is None else "MFU beside the rate"
    for line in (
        f"rank {identity.rank} of {identity.world_size} ({identity.source}) on {device}: {start.parameters:,} "
        f"parameters (dim {config.dim}, depth {config.depth}), {start.memory}; {len(start.training_region):,} bytes to "
        f"train on, {held_out:,} to validate on"
        + (f"; resumed {start.resumed.file.path.name}" if start.resumed else "")
        + ("; from its beginning, since there is no checkpoint" if start.begins_again else ""),
        disk,
        f"{trainer.parts.fitness.probe}{whence}, about {start.probe_share:.1%} of training's work"
        + (f"; evolves {shares}" if shares else ""),
        f"computes in {str(start.dtype).removeprefix('torch.')} on {device}; {mfu}",
    ):
        trainer.parts.log.line(line, echo=start.is_first)


def train(start: Start, trainer: Trainer) -> int:
    """From the first step to the last save; returns the status to exit with."""
    options, identity, node = start.options, start.identity, trainer.parts.node
    if start.device.type == "cpu":
        gather_in_huge_pages()
    deadline = None
    if options.run.max_minutes:  # a rank that was restarted ends with the others
        began = identity.began if identity.restarts else None
        deadline = (time.monotonic() if began is None else began) + options.run.max_minutes * 60
    progress = None
    if start.is_first and sys.stderr.isatty():
        progress = Progress(trainer.totals.step, options.run.train_steps, deadline)
    # Who calls at once is told how much training is behind these weights, not that there is none.
    node.publish(trainer.totals.step, trainer.totals.lineage, None, trainer.status())
    try:
        node.start()
        if identity.restarts:
            node.seek()  # the others have trained since
        trainer.run(math.inf if deadline is None else deadline, progress)
    except TrainingDiverged as error:
        say(f"error: rank {identity.rank}: {error}")
        return 1
    finally:
        if progress:
            progress.close()
        node.close()
        trainer.saving.finish()
    if (why := trainer.saving.unsaved) is not None:
        say(f"error: rank {identity.rank}: its last steps, up to {trainer.totals.step}, are lost: {why}")
        return 1
    return 0


if __name__ == "__main__":
    run_main(functools.partial(main, signals=signals))
