"""From options to parts: which run, which model, which data, which weights. Every user's mistake is found here."""

import dataclasses
import hashlib
import os
import resource
import secrets
import socket
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from gossip.config import GossipConfig
from gossip.decision import Policy
from gossip.network_utils import choose_address, listen
from gossip.secret import FILE_NAME, VARIABLE, run_secret
from gossip.state import Rule
from mingru import scan_logspace
from mingru.minLM import MinLM, ModelConfig
from mingru.scan import chosen_backend
from mingru.sizing import parameter_count, resolve_config
from runtime.devices import check_triton
from runtime.errors import UserError
from runtime.ranks import Identity
from runtime.stderr import say
from training.checkpoint import read_for_use
from training.data import Corpus, Region, check_length, find_files
from training.heredity import Heredity
from training.optimizer import TrainedWeights
from training.options import DEVICES, Options, PopulationOptions, resolve_options
from training.probe import affordable_windows, probe_cost
from training.run_directory import RunDirectory
from training.succession import Resumed

CONV_KERNEL_SIZE = 4  # as in the paper's language model
DEFAULT_PARAMETERS = 15 * 1024**2


def choose_run(given: Mapping[str, Any], identity: Identity) -> tuple[Options, RunDirectory, bool]:
    """The options in force, the run directory, and whether it holds the run to go on with, else a new one is to begin.

    A rank that its launcher restarted goes on in the --output of its first start. Raises UserError for flags that do
    not go together.
    """
    options, run, goes_on = _choose_run(given, identity)
    try:
        str(run.path.resolve()).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"expected a run directory whose path is UTF-8, since torch opens checkpoints by no other, got {run.path}: "
            "choose another"
        ) from None
    population = options.population
    if identity.world_size > 1 and not population.filesystem_coordinator and not population.gossip_peers:
        raise UserError("expected --gossip_peers beside --no_filesystem_coordinator, got none: nobody could be found")
    for name, beside in _idle(population):
        if name in given:
            raise UserError(f"expected no --{name} {beside}, got {given[name]}: leave it out")
    return options, run, goes_on


def _idle(population: PopulationOptions) -> Iterator[tuple[str, str]]:
    """Options that do nothing beside the others, each with what makes it so."""
    comparing = ("gossip_tie", "gossip_significance", "gossip_least_effect")
    alpha = "gossip_recombination_alpha"
    for holds, names, beside in (
        (
            not population.filesystem_coordinator,
            ("elite_checkpoint_multiplier", "rejuvenation_probability", "rejuvenation_threshold"),
            "beside --no_filesystem_coordinator, with which nobody ranks the population",
        ),
        (
            not population.fitness_weighted_checkpointing,
            ("elite_checkpoint_multiplier",),
            "beside --no_fitness_weighted_checkpointing, with which all ranks save alike",
        ),
        (population.gossip_fitness == "ema", comparing, "beside --gossip_fitness ema, by which the lower loss wins"),
        (
            population.gossip_merge_method == "average",
            (alpha, *comparing),
            "beside --gossip_merge_method average, with which both always take the mean",
        ),
        (
            population.gossip_merge_method == "clonal",
            (alpha,),
            "beside --gossip_merge_method clonal, with which a loser takes all of the winner's weights",
        ),
        (not population.evolve, ("evolve_spread", "mutation_scale"), "without --evolve"),
    ):
        if holds:
            yield from ((name, beside) for name in names)


def _choose_run(given: Mapping[str, Any], identity: Identity) -> tuple[Options, RunDirectory, bool]:
    if "resume" in given:
        if "init_from" in given:
            raise UserError("expected --resume or --init_from, got both: a resumed run has its weights")
        run = RunDirectory(Path(given["resume"]), identity.rank)
        if "output" in given and Path(given["output"]).resolve() != run.path.resolve():
            raise UserError("expected --resume to go on in its own folder, got another --output: leave it out")
        return _resumed_options(given, run), run, True
    if identity.restarts and "output" in given:
        run = RunDirectory(Path(given["output"]), identity.rank)
        if run.config.exists():
            return _resumed_options(given, run), run, True
    options = resolve_options(given)
    if options.run.output is None:
        if identity.world_size > 1:
            raise UserError("expected --output for a population of several ranks, got none: name one folder for all")
        if identity.launcher is not None or identity.restarts:
            raise UserError("expected --output for a rank that may be started again, got none: name its folder")
        options.run.output = f"runs/{datetime.now():%Y%m%d_%H%M%S}"
    return options, RunDirectory(Path(options.run.output), identity.rank), False


def _resumed_options(given: Mapping[str, Any], run: RunDirectory) -> Options:
    stored = run.stored_options()
    if any(name in given for name in DEVICES):
        stored.get("run", {}).update(dict.fromkeys(DEVICES, False))
    options = resolve_options(given, stored)
    for name in evolving(options):
        centre = stored.get("optimizer", {}).get(name)
        if given.get(name, centre) != centre:
            raise UserError(
                f"expected no other --{name} beside --resume of a run where it evolves, got {given[name]}: leave it "
                "out, since each rank has its own by now, or start a new run with --init_from"
            )
    return options


def choose_model(options: Options, given: Mapping[str, Any], resumed: Resumed | None) -> ModelConfig:
    """The model's shape: that of the checkpoint that the run goes on from, else that of the options."""
    if resumed:
        return ModelConfig.from_dict(resumed.content["model_config"])
    wanted = options.model
    kernel = CONV_KERNEL_SIZE if wanted.enable_conv else None
    params = wanted.params
    if params is None and wanted.dim is None and wanted.depth is None:
        params = DEFAULT_PARAMETERS
    shape = {"expansion": wanted.expansion_factor, "ff_mult": wanted.ff_mult, "conv_kernel_size": kernel}
    if options.run.init_from is None:
        return resolve_config(params=params, dim=wanted.dim, depth=wanted.depth, dropout=wanted.dropout, **shape)
    config = read_for_use(Path(options.run.init_from))[0]
    if config.num_tokens != 256:
        raise UserError(f"expected a model of 256 byte values, got {config.num_tokens} in {options.run.init_from}")
    flags = {"dim": "dim", "depth": "depth", "expansion_factor": "expansion", "ff_mult": "ff_mult"}
    for flag, name in flags.items():
        if flag in given and given[flag] != getattr(config, name):
            raise UserError(
                f"expected --{flag} {getattr(config, name)} of {options.run.init_from}, got {given[flag]}: leave it out"
            )
    has_conv = config.conv_kernel_size is not None
    if given.get("enable_conv", has_conv) != has_conv:
        flag = "--no_enable_conv" if has_conv else "--enable_conv"
        raise UserError(f"expected no {flag}, as in {options.run.init_from}, got it: leave it out")
    if "params" in given and abs(parameter_count(config) / given["params"] - 1) > 0.01:
        expected = f"--params {parameter_count(config)} of {options.run.init_from}"
        raise UserError(f"expected {expected}, got {given['params']}: leave it out")
    return dataclasses.replace(config, dropout=wanted.dropout)


def open_data(options: Options, goes_on: bool) -> tuple[Region, Region | None]:
    """The part to train on and the part held out, of a new run or of one that goes on. Raises UserError."""
    data = options.data
    if not data.data:
        raise UserError("expected --data with files, folders or globs, got none: name the bytes to train on")
    # Each mapped file keeps a descriptor.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    files = find_files(data.data)
    corpus = Corpus(files, data.document_delimiter)
    if data.val_data:
        held_out_files = find_files(data.val_data)
        if both := sorted(set(files) & set(held_out_files)):
            if not goes_on:
                raise UserError(f"expected --val_data apart from --data, got {both[0]} in both: leave it out of one")
            say(f"warning: {both[0]} is in --data and in --val_data: held-out losses are of bytes trained on")
        held_out_corpus = Corpus(held_out_files, data.document_delimiter)
        training_region, held_out = Region(corpus, 0, len(corpus)), Region(held_out_corpus, 0, len(held_out_corpus))
    else:
        training_region, held_out = corpus.split(data.val_fraction)
    check_length(training_region, data.chunk_size)
    if options.run.val_every and held_out is not None and len(held_out) < 2:
        raise UserError(f"expected at least 2 held-out bytes, got {len(held_out)}: give more data or --val_every 0")
    return training_region, held_out


def initial_weights(options: Options, config: ModelConfig, resumed: Resumed | None) -> dict[str, torch.Tensor]:
    """What a rank starts from, on the CPU: the checkpoint it goes on from, --init_from, or an initialisation that all
    ranks share by its seed.
    """
    if resumed:
        return resumed.content["model_state_dict"]
    if options.run.init_from:
        return read_for_use(Path(options.run.init_from))[1]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(options.optimizer.seed)  # of no GPU's, which nothing would set back
        return MinLM(config).state_dict()


def resolve_model(options: Options, config: ModelConfig) -> None:
    """Write the shape that was chosen into the options, which config.json then holds resolved."""
    model = options.model
    model.dim, model.depth = config.dim, config.depth
    model.expansion_factor, model.ff_mult = config.expansion, config.ff_mult
    model.enable_conv = config.conv_kernel_size is not None


def run_identity(run: RunDirectory) -> str:
    """What the ranks of a run call it among themselves: a digest of its folder's name."""
    return hashlib.sha256(run.name.encode()).hexdigest()[:32]


def terms(
    options: Options, weights: TrainedWeights, training_region: Region, held_out: Region | None
) -> dict[str, Any]:
    """What both ends of an exchange must have in common, besides the tensors.

    Weights of unrelated beginnings have no mean worth having, and one that trained on what another holds out would win
    by that.
    """
    population = options.population
    return {
        "optimizer": weights.family,
        "sf_beta": options.optimizer.sf_beta,
        "fitness": population.gossip_fitness,
        "merge_method": population.gossip_merge_method,
        "recombination_alpha": population.gossip_recombination_alpha,
        "tie": population.gossip_tie,
        "significance": population.gossip_significance,
        "least_effect": population.gossip_least_effect,
        "wire_dtype": population.gossip_wire_dtype,
        "evolve": ",".join(evolving(options)),
        "data": training_region.corpus.fingerprint,
        "training_bytes": len(training_region),
        "held_out": None if held_out is None else held_out.corpus.fingerprint,
        "initial_seed": options.optimizer.seed if options.run.init_from is None else None,
    }


def gossip_config(options: Options) -> GossipConfig:
    """The population's options as gossip knows them. Raises UserError where they do not go together."""
    population = options.population
    if population.gossip_wire_dtype == "int4" and population.gossip_payload == "full":
        raise UserError(
            "expected --gossip_payload weights beside --gossip_wire_dtype int4, whose rounding could make a second "
            "moment negative, got full: choose another of the two"
        )
    return GossipConfig(
        mixing_rate=population.gossip_mixing_rate,
        policy=Policy(
            method=population.gossip_merge_method,
            fitness=population.gossip_fitness,
            tie=population.gossip_tie,
            significance=population.gossip_significance,
            least_effect=population.gossip_least_effect,
        ),
        wire_dtype=population.gossip_wire_dtype,
        recombination_alpha=population.gossip_recombination_alpha,
        rollback_tolerance=population.gossip_rollback,
        peers=_listed(population.gossip_peers),
        filesystem_coordinator=population.filesystem_coordinator,
        heartbeat_seconds=population.gossip_heartbeat,
        liveness_seconds=population.gossip_liveness,
        exchange_seconds=population.gossip_timeout,
    )


def evolving(options: Options) -> tuple[str, ...]:
    """The hyperparameters that evolve, by option name."""
    return _listed(options.population.evolve)


def heredity(options: Options, identity: Identity) -> Heredity:
    """The rank's own values of them. Raises UserError for what cannot evolve."""
    population = options.population
    return Heredity(
        evolving(options), options.optimizer, population.evolve_spread, population.mutation_scale,
        identity.rank, identity.world_size,
    )  # fmt: skip


def gossip_state(options: Options, weights: TrainedWeights) -> dict[str, torch.Tensor]:
    """The live tensors that travel: all, or without the second moments."""
    whole = options.population.gossip_payload == "full"
    return {k: v for k, v in weights.tensors().items() if whole or weights.rules[k] is not Rule.SECOND_MOMENT}


def resolve_probe(options: Options) -> float:
    """Write the probe's windows into the options, unless the run that goes on has brought them along: losses of other
    windows do not compare, nor would its checkpoints. As many as --probe_budget allows, with one measurement every
    --probe_every steps and one at each expected merge, a rank calling, and being called, with --gossip_mixing_rate.

    Returns the share of training's work that they take.
    """
    population, optimizer, data = options.population, options.optimizer, options.data
    step_bytes = data.batch_size * data.chunk_size * optimizer.grad_accum
    interval = 1 / (1 / population.probe_every + 2 * population.gossip_mixing_rate)
    if population.probe_windows is None:
        population.probe_windows = affordable_windows(
            step_bytes, interval, population.probe_budget, optimizer.schedulefree
        )
    return probe_cost(population.probe_windows, step_bytes, interval, optimizer.schedulefree)


def _listed(texts: list[str]) -> tuple[str, ...]:
    """The words of space- or comma-separated lists."""
    return tuple(word for text in texts for word in text.replace(",", " ").split())


def open_listener(options: Options, identity: Identity) -> socket.socket:
    """The socket that peers will call: --gossip_port counts up over the ranks of a host."""
    port = options.population.gossip_port
    return listen(choose_address(options.population.gossip_host, identity), port + identity.local_rank if port else 0)


def check_environment(device: torch.device) -> None:
    """Raise UserError for a variable, or for a device's missing tools, that would be found wrong only once a run
    directory depends on it."""
    if chosen_backend(device.type) is scan_logspace.scan:
        raise UserError("expected a GRUBOROS_SCAN that can start documents, got logspace: choose another, or unset it")
    check_triton(device)
    if VARIABLE in os.environ:
        run_secret(None, os.environ)


def check_secret(options: Options, run: RunDirectory) -> None:
    """Raise UserError for a secret that is there and will not do, or that nobody could make."""
    makes_one = options.population.filesystem_coordinator and VARIABLE not in os.environ
    if not makes_one or os.path.exists(run.population / FILE_NAME):
        choose_secret(options, run)


def choose_secret(options: Options, run: RunDirectory) -> bytes:
    """The run's secret: from the environment or the run directory; without a way to meet anybody, nobody's."""
    if options.population.filesystem_coordinator:
        return run_secret(run.population, os.environ)
    if options.population.gossip_peers:
        return run_secret(None, os.environ)
    return secrets.token_bytes(32)
