"""Every option of a run: dataclasses that become grouped flags, and config.json.

An option lives beside what it configures; its field's metadata holds the help text, the parser of its value and
whether it is fixed for the life of a run (refused beside --resume when it differs, but for files that are gone from
their old places) or of one launch alone (not taken over by --resume). One that is derived from others when a run
begins, and then stays, has no flag.
"""

import argparse
import dataclasses
import glob
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gossip.config import GossipConfig
from gossip.decision import FITNESS_KINDS, TIES, Policy
from gossip.protocol import MERGE_METHODS
from gossip.wire_format import WIRE_DTYPES
from runtime.arguments import ArgumentParser, as_argument, normalise_flags, parse_size
from runtime.errors import UserError
from training.option_values import (
    FRACTION,
    LANES,
    NOT_NEGATIVE,
    POSITIVE,
    SECONDS,
    parse_absolute,
    parse_chunk,
    parse_delimiter,
    parse_params,
    parse_path,
    parse_steps,
    parse_tolerance,
    parse_val_bytes,
    real,
    whole,
)

DEFAULT_DELIMITER = 0x1E  # the byte that ends a document
PAYLOADS = ("weights", "full")
DEVICES = ("cuda", "rocm", "cpu")  # of these flags one replaces another in a resumed run


def _option(default: Any, help: str, parse: Callable[[str], Any] = str, *, fixed: bool = False, **more: Any) -> Any:
    metadata = {"help": help, "parse": parse, "fixed": fixed, **more}
    if isinstance(default, list):
        return field(default_factory=list, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class DataOptions:
    """data"""

    # Kept as absolute paths, so that a run can be resumed from any working directory.
    data: list[str] = _option([], "files, folders or globs of training bytes; memory-mapped", parse_absolute,
                              many=True, files=True, fixed=True)  # fmt: skip
    val_data: list[str] = _option([], "files, folders or globs to validate on (default: the tail of --data)",
                                  parse_absolute, many=True, files=True, fixed=True)  # fmt: skip
    val_fraction: float = _option(
        0.05, "share of --data, at its end, held out for validation and the probe when there is no --val_data; less, "
        "down to half of it, where a document's end is near",
        real(0, 1, below=True), fixed=True,
    )  # fmt: skip
    val_bytes: int = _option(64 * 1024, "most bytes that one validation reads, from the start of the held-out data",
                             parse_val_bytes)  # fmt: skip
    chunk_size: int = _option(256, "bytes of a lane that one forward and backward pass sees", parse_chunk)
    batch_size: int = _option(8, "lanes: places of the data that are read in parallel", LANES)
    lane_groups: int = _option(16, "number of groups of --batch_size lanes each, which take turns, a chunk each: "
                               "neighbouring steps then see other text, and the weights do not follow what is read at "
                               "the moment",
                               LANES)  # fmt: skip
    document_delimiter: int | None = _option(
        DEFAULT_DELIMITER, "byte that ends a document, in hexadecimal, or none", parse_delimiter, fixed=True, show="1e"
    )


@dataclass
class ModelOptions:
    """model"""

    params: int | None = _option(None, "parameters to build, within 1 %% (15m, 350m, 1g, 7g); 15m if no --dim and "
                                 "--depth are given", parse_params, fixed=True)  # fmt: skip
    dim: int | None = _option(None, "width of the model", parse_size, fixed=True)
    depth: int | None = _option(None, "number of layers", whole(1), fixed=True)
    expansion_factor: float = _option(1.5, "width of the recurrence over --dim", POSITIVE, fixed=True)
    ff_mult: float = _option(4.0, "width of the feed-forward over --dim; 0: no feed-forward", NOT_NEGATIVE, fixed=True)
    enable_conv: bool = _option(True, "a causal depthwise convolution of 4 taps before each recurrence", fixed=True)
    dropout: float = _option(0.0, "chance that a layer's output element is dropped in training",
                             real(0, 1, below=True), fixed=True)  # fmt: skip


@dataclass
class OptimizerOptions:
    """optimisation"""

    lr: float = _option(3e-3, "learning rate", POSITIVE)
    weight_decay: float = _option(0.01, "decoupled weight decay of the matrices", NOT_NEGATIVE)
    warmup_steps: int = _option(100, "steps of linear warm-up", whole(0))
    grad_accum: int = _option(1, "chunks whose gradients make one optimizer step", whole(1))
    grad_clip: float = _option(1.0, "largest gradient norm; 0: no clipping", NOT_NEGATIVE)
    sf_beta: float = _option(0.9, "schedule-free interpolation (AdamW: first moment's decay)",
                             real(0, 1, above=True, below=True), fixed=True)  # fmt: skip
    sf_beta2: float = _option(0.99, "second moment's decay", real(0, 1, above=True, below=True), fixed=True)
    schedulefree: bool = _option(
        True,
        "schedule-free AdamW; --no_schedulefree: plain AdamW, whose rate stays as it is after the warm-up",
        fixed=True,
    )
    seed: int = _option(42, "seed of the initial weights (shared by all ranks) and of the data order", whole(0, 2**53),
                        fixed=True)  # fmt: skip


@dataclass
class ComputeOptions:
    """computation"""

    dtype: str = _option("auto", "of matrix products and what lies between them (weights and gradients are float32): "
                         "bf16, fp32, or auto: bf16 on a GPU that has it and on a CPU with AMX or AMD's AVX512_BF16",
                         choices=("bf16", "fp32", "auto"))  # fmt: skip
    compile: bool = _option(False, "compile the training pass with torch.compile: a slower start, faster steps")
    checkpoint_layers: bool = _option(False, "keep only each layer's input for the backward pass and compute the rest "
                                      "again: less memory, about a third more time")  # fmt: skip


@dataclass
class RunOptions:
    """run"""

    train_steps: int | None = _option(
        None, "optimizer steps in all, or none: until stopped (default: none)", parse_steps
    )
    max_minutes: float | None = _option(None, "minutes that this launch trains (default: until stopped)", POSITIVE,
                                        of_launch=True)  # fmt: skip
    output: str | None = _option(
        None, "run directory to create (default, one rank only: runs/<date>_<time>)", parse_path
    )
    resume: str | None = _option(None, "run directory to go on with, in place; --no_compile takes back its --compile, "
                                 "and so on", parse_path)  # fmt: skip
    init_from: str | None = _option(None, "checkpoint whose averaged weights a new run starts from", parse_absolute)
    save_every: int = _option(500, "mean steps between a rank's checkpoints, over the population", parse_size)
    keep_checkpoints: int = _option(2, "newest checkpoints kept of each rank", whole(1))
    keep_elite: int = _option(5, "best checkpoints kept of the population", whole(0))
    archive_rate: float = _option(0.0, "share of the checkpoints about to go that is kept as archive_001.pt ...",
                                  FRACTION)  # fmt: skip
    val_every: int = _option(500, "steps between validations; 0: never", whole(0))
    log_every: int = _option(10, "steps between lines of the log and of the metrics", whole(1))
    cuda: bool = _option(False, "train on an NVIDIA GPU")
    rocm: bool = _option(False, "train on an AMD GPU")
    cpu: bool = _option(False, "train on the CPU")


@dataclass
class PopulationOptions:
    """population"""

    gossip_mixing_rate: float = _option(
        GossipConfig.mixing_rate, "chance a step that this rank calls a random peer", FRACTION
    )
    gossip_merge_method: str = _option(Policy.method, "clonal: the loser takes the winner's weights; recombination: "
                                       "it moves towards them; average: both take the mean",
                                       choices=MERGE_METHODS)  # fmt: skip
    gossip_recombination_alpha: float = _option(
        GossipConfig.recombination_alpha, "how far a loser moves towards the winner, 0 ... 1", FRACTION
    )
    gossip_optimizer_recombination: str = _option(
        "interpolate", "after a merge, second moments that came along are interpolated, or the optimizer starts afresh",
        choices=("reset", "interpolate"),
    )  # fmt: skip
    gossip_fitness: str = _option(
        Policy.fitness, "compare ranks by the probe, held-out windows that are the same for all (of the training "
        "bytes' end where fewer than 8,196 are held out), or by ema, a moving average of the training loss",
        choices=FITNESS_KINDS, fixed=True,
    )  # fmt: skip
    gossip_tie: str = _option(
        Policy.tie, "where the probe shows no clear winner both take the mean, or nothing moves", choices=TIES
    )
    gossip_significance: float = _option(
        Policy.significance, "chance that a winner by the probe is none; 0: nobody ever wins", FRACTION
    )
    gossip_least_effect: float = _option(
        Policy.least_effect, "nats per byte by which a winner must be ahead on the probe", NOT_NEGATIVE
    )
    probe_every: int = _option(50, "steps between measurements of the probe, at most; fewer at a rank's beginning",
                               whole(1))  # fmt: skip
    probe_budget: float = _option(0.02, "share of training's work for the probe, from which its size follows when a "
                                  "run begins (at least 8 windows of 256 bytes)", FRACTION, fixed=True)  # fmt: skip
    probe_windows: int | None = _option(None, "windows of the probe, of 256 bytes", derived=True)
    gossip_payload: str = _option("weights", "send weights alone, or with the optimizer's second moments",
                                  choices=PAYLOADS)  # fmt: skip
    gossip_wire_dtype: str = _option(
        GossipConfig.wire_dtype, "how numbers travel: rounded to bf16; fp32 as they are; int4 as remainders of four "
        "bits, but for a clone, which travels in bf16", choices=WIRE_DTYPES,
    )  # fmt: skip
    evolve: list[str] = _option([], "hyperparameters that evolve, of lr,weight_decay,grad_clip: each rank draws its "
                                "own, and who takes a winner's weights inherits them, mutated", many=True,
                                fixed=True)  # fmt: skip
    evolve_spread: float = _option(2.83, "factor by which a first value is at most above or below the given one",
                                   real(1), fixed=True)  # fmt: skip
    mutation_scale: float = _option(0.2, "standard deviation of the logarithm of an inherited value's change",
                                    NOT_NEGATIVE)  # fmt: skip
    gossip_rollback: float | None = _option(
        GossipConfig.rollback_tolerance, "undo a merge that raises this rank's loss, of its averaged weights or of "
        "those it trains, by more nats per byte; none: never", parse_tolerance,
    )  # fmt: skip
    gossip_fitness_decay: float = _option(
        0.95, "decay a step of the training loss's moving average, with --gossip_fitness ema the fitness",
        real(0, 1, below=True),
    )  # fmt: skip
    gossip_host: str | None = _option(None, "address, host name or interface to listen on (default: loopback if all "
                                      "ranks are on this host, else the default route's)")  # fmt: skip
    gossip_port: int = _option(0, "TCP port to listen on, plus the local rank; 0: any free one", whole(0))
    gossip_peers: list[str] = _option([], "host:port,... to call where there is no shared filesystem", many=True)
    gossip_heartbeat: float = _option(GossipConfig.heartbeat_seconds, "seconds between a rank's signs of life", SECONDS)
    gossip_liveness: float = _option(
        GossipConfig.liveness_seconds, "seconds without a sign of life after which a rank counts as dead", SECONDS
    )
    gossip_timeout: float = _option(GossipConfig.exchange_seconds, "seconds that one exchange may take in all", SECONDS)
    filesystem_coordinator: bool = _option(
        True, "find peers, rank them and keep elites through the run directory; --no_filesystem_coordinator: "
        "only --gossip_peers",
    )  # fmt: skip
    fitness_weighted_checkpointing: bool = _option(True, "better ranks save more often, at random steps; "
                                                   "--no_...: every --save_every steps")  # fmt: skip
    elite_checkpoint_multiplier: float = _option(4.0, "how much likelier the best rank saves than the last",
                                                 real(1))  # fmt: skip
    rejuvenation_probability: float = _option(0.0, "chance a step that one of the worst ranks merges an elite",
                                              FRACTION)  # fmt: skip
    rejuvenation_threshold: float = _option(0.25, "share of the ranking, from its end, that counts as worst", FRACTION)


@dataclass
class Options:
    """All options of a run, by group."""

    data: DataOptions = field(default_factory=DataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    compute: ComputeOptions = field(default_factory=ComputeOptions)
    run: RunOptions = field(default_factory=RunOptions)
    population: PopulationOptions = field(default_factory=PopulationOptions)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Nested plain values, for config.json."""
        return dataclasses.asdict(self)


def parse_arguments(argv: Sequence[str], description: str) -> dict[str, Any]:
    """The flags that were given, by name; nothing for the others. Prints --help and exits. Raises UserError."""
    parser = ArgumentParser(
        description=description, argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=100),
    )  # fmt: skip
    for group_field in dataclasses.fields(Options):
        group = parser.add_argument_group(group_field.default_factory.__doc__)
        for option in dataclasses.fields(group_field.default_factory):
            if not option.metadata.get("derived"):
                _add_flag(group, option)
    return vars(parser.parse_args(normalise_flags(argv)))


def _add_flag(group: argparse._ArgumentGroup, option: dataclasses.Field) -> None:
    name, meta, default = option.name, option.metadata, option.default
    if isinstance(default, bool):
        group.add_argument(
            f"--{name}", action="store_true", help=f"{meta['help']} (default: {'on' if default else 'off'})"
        )
        if name not in DEVICES:
            help = f"not --{name}" if default else argparse.SUPPRESS
            group.add_argument(f"--no_{name}", dest=name, action="store_false", help=help)
        return
    shown = meta.get("show", default)
    suffix = "" if default in (None, dataclasses.MISSING) else f" (default: {shown})"
    if meta.get("many"):
        group.add_argument(
            f"--{name}", nargs="+", action="extend", type=as_argument(meta["parse"]), metavar="X", help=meta["help"]
        )  # fmt: skip
    else:
        sizes = (parse_size, parse_params, parse_chunk, parse_val_bytes, parse_steps)
        texts = (str, parse_path, parse_absolute)
        metavar = "SIZE" if meta["parse"] in sizes else "X" if meta["parse"] in texts else "N"
        group.add_argument(
            f"--{name}", choices=meta.get("choices"), metavar=None if meta.get("choices") else metavar,
            type=as_argument(meta["parse"]), help=meta["help"] + suffix,
        )  # fmt: skip


def resolve_options(given: Mapping[str, Any], stored: Mapping[str, Mapping[str, Any]] | None = None) -> Options:
    """Options from the flags `given`, over those of a resumed run's config.json (`stored`), over the defaults.

    Raises UserError where a flag beside --resume contradicts what is fixed for the life of a run.
    """
    options = Options()
    for group_field in dataclasses.fields(Options):
        group = getattr(options, group_field.name)
        for option in dataclasses.fields(group):
            old = {} if option.metadata.get("of_launch") else (stored or {}).get(group_field.name, {})
            value = old.get(option.name, getattr(group, option.name))
            new = given.get(option.name, value)
            moved = option.metadata.get("files") and value and not all(map(_is_there, value))
            if option.name in old and option.metadata["fixed"] and new != value and not moved:
                expected = f"no --{option.name}" if value in (None, []) else f"--{option.name} {_shown(value)}"
                raise UserError(
                    f"expected {expected} of the resumed run, got {_shown(new)}: leave the flag out, or start a new "
                    "run with --init_from"
                )
            setattr(group, option.name, new)
    return options


def _shown(value: Any) -> str:
    return " ".join(value) if isinstance(value, list) else str(value)


def _is_there(place: str) -> bool:
    """A file or folder, or a glob of some."""
    return os.path.exists(place) or any(glob.iglob(place, recursive=True))
