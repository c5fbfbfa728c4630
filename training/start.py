"""What one process of a rank begins with. A user's mistakes are all found here, before the run directory is touched."""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

from gossip.config import GossipConfig
from mingru.minLM import MinLM, ModelConfig
from mingru.sizing import parameter_count
from runtime.allocator import keep_freed_memory
from runtime.devices import choose_device, ranks_sharing
from runtime.errors import UserError
from runtime.exhaustion import as_memory_error
from runtime.ranks import Identity
from training import setup
from training.checkpoint import build_model
from training.checkpoint_writer import NO_MEMORY
from training.computation import check_compiler, choose_dtype
from training.data import LaneReader, Region
from training.heredity import Heredity
from training.memory import MemoryEstimate, check_memory, estimate_memory
from training.optimizer import TrainedWeights, build_optimizer
from training.options import Options
from training.probe import split_probe
from training.run_directory import RunDirectory
from training.succession import Resumed, read_resumed


@dataclass
class Start:
    """The parts that a user's mistake could spoil, and what they were made from.

    goes_on: in a run that there is already; held: its lock, if so; resumed: the checkpoint to go on from, which holds a
    whole state; parameters: their number; probe_share: of training's work.
    """

    options: Options
    run: RunDirectory
    identity: Identity
    goes_on: bool
    held: BinaryIO | None
    resumed: Resumed | None
    device: torch.device
    dtype: torch.dtype
    config: ModelConfig
    parameters: int
    memory: MemoryEstimate
    model: MinLM
    weights: TrainedWeights
    training_region: Region
    held_out: Region | None
    probe_region: Region
    probe_share: float
    lanes: LaneReader
    heredity: Heredity
    gossip: GossipConfig
    listener: socket.socket

    @property
    def inherits(self) -> bool:
        """It goes on from another rank's checkpoint: its own work so far is another line."""
        return self.resumed is not None and self.resumed.file.rank != self.identity.rank

    @property
    def begins_again(self) -> bool:
        """The run is there, and nothing to go on from."""
        return self.goes_on and self.resumed is None

    @property
    def is_first(self) -> bool:
        """Of the ranks that share this folder, or else this terminal."""
        shared = self.options.population.filesystem_coordinator
        return self.identity.rank == 0 or (self.identity.local_rank == 0 and not shared)


def prepare(given: Mapping[str, Any], identity: Identity) -> Start:
    """Everything that flags, files, devices and addresses decide. Raises UserError, MemoryError."""
    options, run, goes_on = setup.choose_run(given, identity)
    setup.check_secret(options, run)
    gossip = setup.gossip_config(options)
    device = choose_device(options.run.cuda, options.run.rocm, options.run.cpu, identity.local_rank)
    setup.check_environment(device)
    if device.type == "cpu":
        keep_freed_memory()
    dtype = choose_dtype(options.compute.dtype, device)
    check_compiler(options.compute, device)
    held = run.lock() if goes_on else None
    try:
        resumed = read_resumed(run.path, identity) if goes_on else None
    except OSError as error:
        raise UserError(f"expected a usable {run.path}, got {error.strerror}: mend its filesystem") from None
    config = setup.choose_model(options, given, resumed)
    setup.resolve_model(options, config)
    probe_share = setup.resolve_probe(options)
    parameters = parameter_count(config)
    memory = estimate_memory(parameters, options.population.gossip_payload)
    ranks_here = max(1, identity.local_world_size)
    check_memory(memory, device, ranks_here, ranks_sharing(device, ranks_here, os.environ))
    heredity = setup.heredity(options, identity)
    training_region, held_out = setup.open_data(options, goes_on)
    probe_region, held_out = split_probe(training_region, held_out)
    lanes = LaneReader(
        training_region, options.data.batch_size, options.data.chunk_size,
        rank=identity.rank, world_size=identity.world_size, seed=options.optimizer.seed,
        groups=options.data.lane_groups,
    )  # fmt: skip
    if resumed:
        lanes.check(resumed.content["training"]["lanes"])  # before config.json says that this is the data
    model, weights = _build(options, config, resumed, device)
    torch.manual_seed((options.optimizer.seed * 1_000_003 + identity.rank + 1) % 2**63)  # dropout differs by rank
    return Start(
        options=options, run=run, identity=identity, goes_on=goes_on, held=held, resumed=resumed, device=device,
        dtype=dtype, config=config, parameters=parameters, memory=memory, model=model, weights=weights,
        training_region=training_region, held_out=held_out, probe_region=probe_region, probe_share=probe_share,
        lanes=lanes, heredity=heredity, gossip=gossip, listener=setup.open_listener(options, identity),
    )  # fmt: skip


def _build(
    options: Options, config: ModelConfig, resumed: Resumed | None, device: torch.device
) -> tuple[MinLM, TrainedWeights]:
    try:
        with as_memory_error():
            model = build_model(config, setup.initial_weights(options, config, resumed), device)
            return model, build_optimizer(model, options.optimizer)
    except MemoryError as error:
        raise UserError(
            f"expected memory for the model on {device}, got {str(error) or NO_MEMORY}: choose smaller --params, or "
            "end what else takes memory there"
        ) from None
