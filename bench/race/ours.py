"""Our own contestant: what train.py trains, by train.py's flags, without a population."""

import functools
import math
import shlex
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from bench.race.contestant import Plan, Setting, faster_dtype
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
    if "dtype" not in given:
        in_force["dtype"] = "faster"
    return Plan(in_force, functools.partial(Ours, options, config, in_force["dtype"]))


class Ours:
    """MinLM on contiguous lanes, its state carried along; measured by schedule-free AdamW's averaged weights.

    dtype: as --dtype names them, or faster: of float32 and bf16 the one that is, as of the rivals.
    """

    carries = True

    def __init__(self, options: Options, config: ModelConfig, dtype: str, training: Region, seed: int) -> None:
        torch.manual_seed(seed)
        self._model = MinLM(config)
        self._weights = build_optimizer(self._model, options.optimizer)
        data = options.data
        read = functools.partial(
            LaneReader, training, data.batch_size, data.chunk_size, rank=0, world_size=1, seed=seed,
            groups=data.lane_groups,
        )  # fmt: skip
        self._lanes = read()
        self._state = self._model.initial_state(len(self._lanes.positions))
        self._clip = options.optimizer.grad_clip or math.inf
        if dtype == "faster":
            dtype = faster_dtype(functools.partial(self._try, options.compute, read().next_chunk()))
        self._forward = training_pass(self._model, replace(options.compute, dtype=dtype), CPU)
        self.parameters = parameter_count(config)
        self.told = {
            "shape": f"dim {config.dim}, depth {config.depth}, ff {config.ff_mult:g}", "rate": options.optimizer.lr,
            "dropout": config.dropout, "batch": f"{data.batch_size} x {data.chunk_size}", "dtype": dtype,
        }  # fmt: skip

    def _try(self, options: ComputeOptions, chunk: Chunk, dtype: str) -> None:
        """A pass forward and backward on lanes that begin, of which nothing is kept."""
        self._model.train()
        forward = training_pass(self._model, replace(options, dtype=dtype), CPU)
        loss, _ = chunk_loss(forward, chunk, self._model.initial_state(len(chunk.ids_BS)), CPU)
        loss.backward()
        self._model.zero_grad(set_to_none=True)

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
