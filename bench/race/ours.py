"""Our own contestant: what train.py trains, by train.py's flags, without a population."""

import functools
import math
import shlex
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from bench.race.contestant import Plan, Setting
from mingru.minLM import MinLM, MinLMState, ModelConfig
from mingru.sizing import parameter_count
from runtime.errors import UserError
from training.computation import training_pass
from training.data import Chunk, LaneReader, Region
from training.losses import chunk_loss
from training.optimizer import build_optimizer
from training.options import (
    ComputeOptions,
    ModelOptions,
    OptimizerOptions,
    Options,
    parse_arguments,
    resolve_options,
)
from training.setup import choose_model

CPU = torch.device("cpu")
MODEL = {field.name for field in fields(ModelOptions)}
TRAINING = {field.name for group in (OptimizerOptions, ComputeOptions) for field in fields(group)}
TRAINING = (TRAINING | {"chunk_size", "batch_size", "lane_groups"}) - {"grad_accum", "seed"}
TUNED = {"lr", "dropout"}


def parse_flags(text: str, parameters: int) -> dict[str, Any]:
    """Values of train.py's flags in `text`, and `parameters` where they name no size. Raises UserError."""
    given = parse_arguments(shlex.split(text), "ours")
    if deaf := sorted(set(given) - (MODEL | TRAINING) | set(given) & TUNED):
        expected = "flags of model, optimiser, computation, batch or chunk but the tuned ones"
        raise UserError(f"expected in --ours {expected}, got --{deaf[0]}: leave it out")
    return given if {"params", "dim", "depth"} & set(given) else given | {"params": parameters}


def plan(given: dict[str, Any], setting: Setting) -> Plan:
    """What train.py would train by the flags that parse_flags read. Raises UserError."""
    given = given | {"lr": setting.rate, "dropout": setting.dropout}
    options = resolve_options(given)
    config = choose_model(options, given, None)
    values = {name: value for group in options.to_dict().values() for name, value in group.items()}
    in_force = {name: values[name] for name in sorted(TRAINING)} | config.to_dict()
    return Plan(in_force, functools.partial(Ours, options, config))


class Ours:
    """MinLM on contiguous lanes, its state carried along; measured by schedule-free AdamW's averaged weights."""

    carries = True

    def __init__(self, options: Options, config: ModelConfig, training: Region, seed: int) -> None:
        torch.manual_seed(seed)
        self._model = MinLM(config)
        self._weights = build_optimizer(self._model, options.optimizer)
        data = options.data
        self._lanes = LaneReader(
            training, data.batch_size, data.chunk_size, rank=0, world_size=1, seed=seed, groups=data.lane_groups
        )
        self._forward = training_pass(self._model, options.compute, CPU)
        self._state = self._model.initial_state(len(self._lanes.positions))
        self._clip = options.optimizer.grad_clip or math.inf
        self.parameters = parameter_count(config)
        self.told = {
            "shape": f"dim {config.dim}, depth {config.depth}, ff {config.ff_mult:g}", "rate": options.optimizer.lr,
            "dropout": config.dropout, "batch": f"{data.batch_size} x {data.chunk_size}",
            "dtype": options.compute.dtype,
        }  # fmt: skip

    def train_step(self, spent: float) -> int:
        """See Contestant; there is no schedule, so `spent` makes no difference."""
        self._model.train()
        turn = self._lanes.turn
        chunk = self._lanes.next_chunk()
        loss, state = chunk_loss(self._forward, chunk, self._state.lanes(turn), CPU)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._clip)
        self._weights.step()
        self._model.zero_grad(set_to_none=True)
        self._state.put(turn, state.detach())
        return chunk.reset_BT.size

    def loss(self, chunk: Chunk, state: MinLMState | None) -> tuple[Tensor, MinLMState]:
        """See Contestant."""
        self._model.eval()
        averaged = self._weights.averaged()
        return chunk_loss(lambda *inputs: functional_call(self._model, averaged, inputs), chunk, state, CPU)
