"""Train one rank of a population of byte-level MinGRU language models.

    python train.py --data /path/to/data.txt --output output_dir --params 1g --cuda

Wiring only: options become parts, parts become a Trainer, which runs. A launcher (train.local.sh, torchrun, srun)
starts many of these processes; alone, this one is a population of one.
"""

import runtime.packages  # noqa: F401  # isort: skip

import functools
import math
import os
import random
import sys
import time
from collections.abc import Mapping
from typing import Any

from runtime.signals import SignalFlags

signals = SignalFlags()
if __name__ == "__main__":
    signals.install()  # before torch: its import takes seconds, in which any signal would end the process

import torch

from gossip.event_log import EventLog
from gossip.evolutionary_node import EvolutionaryNode
from gossip.filesystem_coordinator import RankReplaced
from gossip.fitness_tracker import FitnessTracker
from gossip.state import Schema
from mingru.sizing import parameter_count
from runtime.allocator import gather_in_huge_pages, keep_freed_memory
from runtime.arguments import run_main
from runtime.devices import choose_device, ranks_sharing
from runtime.errors import UserError
from runtime.exhaustion import as_memory_error
from runtime.files import set_aside
from runtime.ranks import Identity, identity_from_environment
from runtime.stderr import say
from training import setup
from training.checkpoint import build_model, checkpoint_bytes
from training.checkpoint_writer import NO_MEMORY, CheckpointWriter
from training.computation import check_compiler, choose_dtype, peak_flops
from training.data import LaneReader
from training.fitness import Fitness
from training.loop import Parts, Trainer
from training.memory import check_memory, estimate_memory
from training.metrics import MetricsFile, Progress, RunLog
from training.objections import Objections
from training.optimizer import build_optimizer
from training.options import parse_arguments
from training.probe import LEAST_HELD_OUT, Probe, split_probe
from training.recovery import TrainingDiverged
from training.resume import restore
from training.retention import RetentionPolicy, disk_use, remove_leftovers, retire_from, tidy
from training.succession import read_resumed


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
    """One process of a rank. What a user can get wrong is found before the run directory is touched."""
    options, run, goes_on = setup.choose_run(given, identity)
    setup.check_secret(options, run)
    shared = options.population.filesystem_coordinator
    is_first = identity.rank == 0 or (identity.local_rank == 0 and not shared)  # of those with this folder and terminal
    population = setup.gossip_config(options)
    device = choose_device(options.run.cuda, options.run.rocm, options.run.cpu, identity.local_rank)
    setup.check_environment(device)
    if device.type == "cpu":
        keep_freed_memory()
    dtype = choose_dtype(options.compute.dtype, device)
    check_compiler(options.compute, device)
    held = run.lock() if goes_on else None
    resumed = read_resumed(run.path, identity) if goes_on else None
    config = setup.choose_model(options, given, resumed)
    setup.resolve_model(options, config)
    probe_share = setup.resolve_probe(options)
    parameters = parameter_count(config)
    memory = estimate_memory(parameters, options.population.gossip_payload)
    ranks_here = max(1, identity.local_world_size)
    check_memory(memory, device, ranks_here, ranks_sharing(device, ranks_here, os.environ))
    heredity = setup.heredity(options, identity)
    training_region, held_out = setup.open_data(options)
    probe_region, held_out = split_probe(training_region, held_out)
    lanes = LaneReader(
        training_region, options.data.batch_size, options.data.chunk_size,
        rank=identity.rank, world_size=identity.world_size, seed=options.optimizer.seed,
        groups=options.data.lane_groups,
    )  # fmt: skip
    try:
        with as_memory_error():
            model = build_model(config, setup.initial_weights(options, config, resumed), device)
            weights = build_optimizer(model, options.optimizer)
    except MemoryError as error:
        raise UserError(
            f"expected memory for the model on {device}, got {str(error) or NO_MEMORY}: choose smaller --params, or "
            "end what else takes memory there"
        ) from None
    torch.manual_seed((options.optimizer.seed * 1_000_003 + identity.rank + 1) % 2**63)  # dropout differs by rank
    schema = Schema.of(weights.tensors(), weights.rules, {})
    travelling = setup.gossip_state(options, weights)
    listener = setup.open_listener(options, identity)
    log = RunLog(run.log, echo=is_first and not sys.stderr.isatty())

    if not goes_on:
        run.claim(identity)
        held = run.lock()
        if not identity.restarts:  # another run of this name may have left its own
            log.begin_anew()
            set_aside(run.event_log)
    try:
        remove_leftovers(run.path, identity.rank)
    except OSError as error:
        say(f"warning: rank {identity.rank}: what killed processes left in {run.path} stays: {error.strerror}")
    if is_first or not goes_on:  # a new run's by whoever is there first
        run.write_config(options, config, parameters, identity, str(device), is_new=not goes_on)
    events = EventLog(run.event_log, identity.rank, tell=log.mix)
    archive_dice = random.Random()
    policy = RetentionPolicy(options.run.keep_checkpoints, options.run.keep_elite, options.run.archive_rate)

    def tidy_run() -> None:
        tidy(run.path, policy, archive_dice)

    fitness = Fitness(
        options.population.gossip_fitness, FitnessTracker(options.population.gossip_fitness_decay),
        Probe(
            model, weights, probe_region, options.population.probe_windows,
            options.data.batch_size * options.data.chunk_size, device, dtype,
        ),
        options.population.probe_every,
    )  # fmt: skip

    def genes() -> dict[str, float]:
        return {"lr": options.optimizer.lr} | heredity.values

    objections = Objections(weights, genes, lr_evolves="lr" in heredity.values)
    node = EvolutionaryNode(
        identity=identity, run_id=setup.run_identity(run), run_dir=run.path, listener=listener,
        schema=Schema.of(travelling, weights.rules, setup.terms(options, weights, training_region, held_out)),
        live=travelling, scalars=weights.scalars, config=population, event_log=events,
        seed=options.optimizer.seed, leader_duty=lambda roster: tidy_run(), secret=setup.choose_secret(options, run),
        judge=fitness.judge, known=lambda: fitness.known, genes=genes,
        objection=lambda peer: objections.to(peer.buffer.views, peer.scalars, peer.genes),
    )  # fmt: skip
    trainer = Trainer(
        Parts(
            options=options, run=run, device=device, model=model, weights=weights, schema=schema, lanes=lanes,
            held_out=held_out, fitness=fitness, heredity=heredity, node=node,
            writer=CheckpointWriter(
                run.path, identity.rank, config, options.data.document_delimiter, weights, schema, tidy_run
            ),
            signals=signals,
            metrics=MetricsFile(run.metrics), log=log, events=events, objections=objections,
            initial_weights=lambda: setup.initial_weights(options, config, None),
        )
    )  # fmt: skip
    trainer.apply_hyperparameters()
    if resumed:
        restore(trainer, resumed.content["training"], moves=resumed.moves)
    inherits = resumed is not None and resumed.file.rank != identity.rank  # its own work so far is another line
    try:
        retire_from(run.path, identity.rank, trainer.totals.step + (not inherits))
        disk = disk_use(run.path, policy, checkpoint_bytes(schema, parameters, trainer.state), identity.world_size)
    except OSError as error:
        raise UserError(f"expected to archive checkpoints in {run.path}, got {error.strerror}: mend it") from None
    begins_again = goes_on and resumed is None
    try:
        if begins_again:  # its rows may be all that is left of work whose checkpoints somebody has taken away
            set_aside(run.metrics)
        trainer.parts.metrics.rewind(trainer.totals.step)
    except OSError as error:
        trainer.event("metrics_failed", f"rows of steps to be done again stay: {error.strerror or error}")
    log.line(
        f"rank {identity.rank} of {identity.world_size} ({identity.source}) on {device}: {parameters:,} parameters "
        f"(dim {config.dim}, depth {config.depth}), {memory}; {len(training_region):,} bytes to train on, "
        f"{len(held_out) if held_out is not None else 0:,} to validate on"
        + (f"; resumed {resumed.file.path.name}" if resumed else "")
        + ("; from its beginning, since there is no checkpoint" if begins_again else ""),
        echo=is_first,
    )
    log.line(disk, echo=is_first)
    shares = ", ".join(f"{name} {value:.4g}" for name, value in heredity.values.items())
    whence = ""
    if probe_region.overlaps(training_region):
        whence = f" of the training bytes' end: fewer than {LEAST_HELD_OUT:,} are held out"
    log.line(
        f"{fitness.probe}{whence}, about {probe_share:.1%} of training's work"
        + (f"; evolves {shares}" if shares else ""),
        echo=is_first,
    )
    mfu = "no MFU: its peak is unknown" if peak_flops(device, dtype) is None else "MFU beside the rate"
    log.line(f"computes in {str(dtype).removeprefix('torch.')} on {device}; {mfu}", echo=is_first)
    if inherits or (not resumed and options.run.init_from):
        trainer.saving.begin("where it starts")  # what it came from lies elsewhere, and may go
    del resumed  # a whole state
    if device.type == "cpu":
        gather_in_huge_pages()
    deadline = None
    if options.run.max_minutes:  # a rank that was restarted ends with the others
        began = identity.began if identity.restarts else None
        deadline = (time.monotonic() if began is None else began) + options.run.max_minutes * 60
    progress = None
    if is_first and sys.stderr.isatty():
        progress = Progress(trainer.totals.step, options.run.train_steps, deadline)
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
        events.close()
        log.close()
        held.close()
    if (why := trainer.saving.unsaved) is not None:
        say(f"error: rank {identity.rank}: its last steps, up to {trainer.totals.step}, are lost: {why}")
        return 1
    return 0


if __name__ == "__main__":
    run_main(functools.partial(main, signals=signals))
