"""The language model: bytes in, logits of the next byte out, and a state that goes on from chunk to chunk.

Shapes: B lanes, T steps, D model width, E inner width, V tokens, K convolution taps, S = K - 1, L layers.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from mingru.conv import CausalConv, Reach, reach
from mingru.dropout import dropout
from mingru.gelu import gelu_of
from mingru.minGRU import minGRU
from mingru.norm import RMSNorm
from runtime.errors import UserError


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model.

    dim: width; depth: layers; expansion: of the recurrence's inner width over dim; ff_mult: of the feed-forward's
    (0: no feed-forward); conv_kernel_size: taps of the causal convolution (None: no convolution); dropout: of each
    branch's output while training. Raises UserError for values that make no model.
    """

    dim: int
    depth: int
    num_tokens: int = 256
    expansion: float = 1.5
    ff_mult: float = 4.0
    conv_kernel_size: int | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("dim", "depth", "num_tokens"):
            _require(_is_whole(getattr(self, name), 1), name, "a whole number of at least 1", getattr(self, name))
        _require(_is_real(self.expansion) and self.dim_inner >= 1, "expansion", "dim * expansion >= 1", self.expansion)
        _require(
            _is_real(self.ff_mult) and (self.ff_mult == 0 or self.dim_ff >= 1),
            "ff_mult", "0, or dim * ff_mult >= 1", self.ff_mult,
        )  # fmt: skip
        _require(
            self.conv_kernel_size is None or _is_whole(self.conv_kernel_size, 1),
            "conv_kernel_size", "None or a whole number of at least 1", self.conv_kernel_size,
        )  # fmt: skip
        _require(_is_real(self.dropout) and 0 <= self.dropout < 1, "dropout", "a number in [0, 1)", self.dropout)

    @property
    def dim_inner(self) -> int:
        """E, the width of the recurrent state."""
        return int(self.dim * self.expansion)

    @property
    def dim_ff(self) -> int:
        """The inner width of the feed-forward; 0: none."""
        return int(self.dim * self.ff_mult)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and checkpoints."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """The inverse of to_dict; UserError for a field that is unknown, missing or of the wrong kind."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise UserError(f"expected a model config of {', '.join(sorted(known))}, got {unknown[0]!r}: remove it")
        if missing := sorted({"dim", "depth"} - set(values)):
            raise UserError(f"expected {missing[0]} in the model config, got none: add it")
        return cls(**values)


class MinLMState(NamedTuple):
    """What a lane remembers from chunk to chunk.

    hidden_LBE: each layer's recurrent state, float32 or wider. conv_LBSD: each layer's last K - 1 convolution inputs,
    zero where a reset put them out of reach; None without convolution.
    """

    hidden: Tensor
    conv: Tensor | None

    def detach(self) -> "MinLMState":
        """The same values, cut from the graph."""
        return MinLMState(self.hidden.detach(), None if self.conv is None else self.conv.detach())

    def lanes(self, index: Any) -> "MinLMState":
        """The lanes that `index` selects (a slice, a list, or a tensor of indices or booleans)."""
        return MinLMState(self.hidden[:, index], None if self.conv is None else self.conv[:, index])

    def put(self, index: slice, lanes: "MinLMState") -> None:
        """Write `lanes` into the place of the lanes that `index` selects."""
        self.hidden[:, index] = lanes.hidden
        if self.conv is not None:
            self.conv[:, index] = lanes.conv


class FeedForward(nn.Module):
    """Two dense layers with a GELU between them."""

    def __init__(self, dim: int, dim_ff: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, dim_ff)
        self.down = nn.Linear(dim_ff, dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(gelu_of(self.up, x_BTD))


class Block(nn.Module):
    """One layer on the residual stream: convolution (if any), recurrence, feed-forward (if any)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.conv = CausalConv(config.dim, config.conv_kernel_size) if config.conv_kernel_size else None
        self.norm = RMSNorm(config.dim)
        self.mingru = minGRU(config.dim, config.expansion)
        self.ff_norm = RMSNorm(config.dim) if config.dim_ff else None
        self.ff = FeedForward(config.dim, config.dim_ff) if config.dim_ff else None

    def forward(
        self,
        x_BTD: Tensor,
        hidden_BE: Tensor | None,
        past_BSD: Tensor | None,
        reset_BT: Tensor | None,
        reached: Reach | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The residual stream, the next hidden state and the next convolution inputs."""
        if self.conv is not None:
            branch_BTD, past_BSD = self.conv(x_BTD, past_BSD, reached)
            x_BTD = x_BTD + self._drop(branch_BTD)
        hidden_B1E = None if hidden_BE is None else hidden_BE.unsqueeze(1)
        branch_BTD, hidden_B1E = self.mingru(self.norm(x_BTD), hidden_B1E, True, reset_BT)
        x_BTD = x_BTD + self._drop(branch_BTD)
        if self.ff is not None:
            x_BTD = x_BTD + self._drop(self.ff(self.ff_norm(x_BTD)))
        return x_BTD, hidden_B1E.squeeze(1), past_BSD

    def _drop(self, branch_BTD: Tensor) -> Tensor:
        return dropout(branch_BTD, self.dropout) if self.dropout and self.training else branch_BTD


class _NothingDrawn(TorchFunctionMode):
    """Under it, what torch.nn.init has leaves its tensor as it is."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def uninitialised(config: ModelConfig, device: torch.device) -> "MinLM":
    """The model on `device` with whatever its memory holds as weights; on the meta device it has shapes alone.

    Drawing random numbers or copying there takes the import of torch's compiler, most of two seconds of a rank's start.
    """
    with device, _NothingDrawn():
        return MinLM(config)


class MinLM(nn.Module):
    """A byte-level language model of minGRU blocks, with the weights and the function of minGRU-pytorch's minLM.

    checkpoint_layers: keep of each block its inputs only, and compute the rest again in the backward pass.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_layers = False
        self.token_emb = nn.Embedding(config.num_tokens, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = RMSNorm(config.dim)
        self.to_logits = nn.Linear(config.dim, config.num_tokens, bias=False)
        self._initialise()

    def forward(
        self, ids_BT: Tensor, state: MinLMState | None = None, reset_BT: Tensor | None = None
    ) -> tuple[Tensor, MinLMState]:
        """Logits (B, T, V) of the token after each of ids_BT, and the state after the last.

        ids_BT: any integer dtype, uint8 included, below num_tokens. state: of the tokens before (None: a document
        starts here). reset_BT (bool): True at the first input of a document; nothing before it is seen from there on.
        """
        kernel_size = self.config.conv_kernel_size
        x_BTD = self.token_emb(ids_BT if ids_BT.dtype == torch.int64 else ids_BT.int())
        reached = None if reset_BT is None or kernel_size is None else reach(reset_BT, kernel_size, x_BTD.dtype)
        hidden, past = [], []
        for layer, block in enumerate(self.layers):
            hidden_BE = None if state is None else state.hidden[layer]
            past_BSD = None if state is None or state.conv is None else state.conv[layer]
            inputs = x_BTD, hidden_BE, past_BSD, reset_BT, reached
            if self.checkpoint_layers and torch.is_grad_enabled():
                x_BTD, hidden_BE, past_BSD = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x_BTD, hidden_BE, past_BSD = block(*inputs)
            hidden.append(hidden_BE)
            past.append(past_BSD)
        conv = None if kernel_size is None else torch.stack(past)
        return self.to_logits(self.norm(x_BTD)), MinLMState(torch.stack(hidden), conv)

    def initial_state(self, batch_size: int) -> MinLMState:
        """The state before a document: zeros on the parameters' device."""
        weight, config = self.token_emb.weight, self.config
        hidden_dtype = torch.promote_types(weight.dtype, torch.float32)
        hidden = weight.new_zeros(config.depth, batch_size, config.dim_inner, dtype=hidden_dtype)
        if config.conv_kernel_size is None:
            return MinLMState(hidden, None)
        return MinLMState(hidden, weight.new_zeros(config.depth, batch_size, config.conv_kernel_size - 1, config.dim))

    @torch.no_grad()
    def _initialise(self) -> None:
        """Weights under which activations keep their scale at any depth, and bytes are about equally likely."""
        residual = 1 / math.sqrt(2 * self.config.depth)
        nn.init.normal_(self.token_emb.weight)
        for block in self.layers:
            _init_dense(block.mingru.to_hidden_and_gate)
            if isinstance(block.mingru.to_out, nn.Linear):
                _init_dense(block.mingru.to_out, residual)
            if block.conv is not None:
                nn.init.normal_(block.conv.taps, std=1 / math.sqrt(block.conv.taps.shape[0]))
                _init_dense(block.conv.pointwise, residual)
            if block.ff is not None:
                _init_dense(block.ff.up)
                _init_dense(block.ff.down, residual)
        # Nearer to zero the first loss is nearer to chance (0.2 nats here), and what follows is learnt more slowly.
        _init_dense(self.to_logits, 1 / math.sqrt(3))


def _init_dense(layer: nn.Linear, gain: float = 1.0) -> None:
    nn.init.normal_(layer.weight, std=gain / math.sqrt(layer.in_features))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _is_whole(value: object, minimum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def _is_real(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _require(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise UserError(f"expected for {name} {expected}, got {got!r}: choose another")
