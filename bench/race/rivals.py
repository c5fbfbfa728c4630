"""The rivals: torch's nn.GRU, minGRU-pytorch's model, and a Transformer of nanoGPT's shape, trained alike.

Shapes: B lanes, T bytes, D width, V byte values, H heads.
"""

import functools
import importlib.util
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.race.contestant import WINDOW, Plan, Setting, faster_dtype
from runtime.errors import UserError
from training.data import Chunk, Region

VOCABULARY = 256
BATCH = 16  # windows of WINDOW bytes, drawn at random, make a step
BETAS = (0.9, 0.99)
WEIGHT_DECAY = 0.1  # of the matrices
WARM_UP = 0.05  # share of the time in which the rate rises; then it falls by a cosine
LEAST_RATE = 0.1  # of the full one, at the end
CLIP = 1.0


class GRULM(nn.Module):
    """Embedding, two layers of torch.nn.GRU, a dense layer; dropout on what each layer hands on."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 256)
        self.gru = nn.GRU(256, dim, num_layers=2, batch_first=True, dropout=dropout)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(dim, VOCABULARY)

    def forward(self, ids_BT: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        h_BTD, state = self.gru(self.embedding(ids_BT), state)
        return self.head(self.dropout(h_BTD)), state


class MinGRUPytorch(nn.Module):
    """minLM of the package minGRU-pytorch, its other options at their defaults; it knows no dropout."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        from minGRU_pytorch.minLM import minLM  # of the tests' requirements; the other contestants do without

        self.model = minLM(num_tokens=VOCABULARY, dim=dim, depth=4)

    def forward(self, ids_BT: Tensor, state: None = None) -> tuple[Tensor, None]:
        return self.model(ids_BT), None


class Transformer(nn.Module):
    """nanoGPT's shape: learned positions, pre-norm blocks of attention and GELU, no biases, tied embedding; and its
    dropout: on the embedding, the attention's shares, and what each branch adds."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        layers = 4
        self.embedding = nn.Embedding(VOCABULARY, dim)
        self.positions = nn.Parameter(torch.empty(WINDOW, dim))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(TransformerBlock(dim, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(dim, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
        for block in self.blocks:  # what adds to the residual stream
            for layer in (block.out, block.down):
                nn.init.normal_(layer.weight, std=0.02 / math.sqrt(2 * layers))

    def forward(self, ids_BT: Tensor, state: None = None) -> tuple[Tensor, None]:
        x_BTD = self.dropout(self.embedding(ids_BT) + self.positions[: ids_BT.shape[1]])
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return F.linear(self.norm(x_BTD), self.embedding.weight), None


class TransformerBlock(nn.Module):
    """Causal self-attention, heads of 32, and a feed-forward four times as wide."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.heads = dim // 32
        self.dropout = nn.Dropout(dropout)
        self.attention_norm, self.norm = nn.LayerNorm(dim, bias=False), nn.LayerNorm(dim, bias=False)
        self.queries_keys_values = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.up = nn.Linear(dim, 4 * dim, bias=False)
        self.down = nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        projected = self.queries_keys_values(self.attention_norm(x_BTD)).chunk(3, dim=-1)
        split = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in projected)
        chance = self.dropout.p if self.training else 0.0
        attended_BHTd = F.scaled_dot_product_attention(*split, dropout_p=chance, is_causal=True)
        x_BTD = x_BTD + self.dropout(self.out(attended_BHTd.transpose(1, 2).flatten(2)))
        return x_BTD + self.dropout(self.down(F.gelu(self.up(self.norm(x_BTD)))))


class Kind(NamedTuple):
    """How a rival is built for a width and a chance of dropout, the grain of its widths, whether it has dropout, and
    whether it learns in bfloat16: minGRU-pytorch's sums in log space do not, at any rate (docs/experiments.md)."""

    build: Callable[[int, float], nn.Module]
    grain: int
    drops: bool
    bf16: bool = True


RIVALS = {
    "gru": Kind(GRULM, 8, True),
    "mingru_pytorch": Kind(MinGRUPytorch, 32, False, bf16=False),
    "transformer": Kind(Transformer, 32, True),
}


def plan(name: str, parameters: int, setting: Setting) -> Plan:
    """The rival of about so many parameters. Raises UserError where its package is missing, or it has no dropout."""
    if name == "mingru_pytorch" and importlib.util.find_spec("minGRU_pytorch") is None:
        raise UserError("expected the package minGRU-pytorch, got none: pip install -r requirements-dev.txt")
    if setting.dropout and not RIVALS[name].drops:
        raise UserError(f"expected dropout 0 for {name}, which has none, got {setting.dropout:g}: choose 0")
    options = {
        "dim": nearest_width(name, parameters), "rate": setting.rate, "dropout": setting.dropout, "batch": BATCH,
        "window": WINDOW, "betas": BETAS, "weight_decay": WEIGHT_DECAY, "warm_up": WARM_UP, "least_rate": LEAST_RATE,
        "clip": CLIP,
    }  # fmt: skip
    if not RIVALS[name].bf16:
        options["dtype"] = "fp32"
    return Plan(options, functools.partial(Rival, name, options["dim"], setting))


class Rival:
    """A rival in training: AdamW, warm-up and cosine by time, windows drawn at random, the faster of two dtypes."""

    def __init__(self, name: str, dim: int, setting: Setting, training: Region, seed: int) -> None:
        torch.manual_seed(seed)
        self._model = RIVALS[name].build(dim, setting.dropout)
        self._bytes = training.read(0, len(training))
        self._places = np.random.default_rng(seed)
        self._dtype = faster_dtype(self._backward) if RIVALS[name].bf16 else "fp32"
        self._model.zero_grad(set_to_none=True)
        groups = [{"params": [p for p in self._model.parameters() if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
                  {"params": [p for p in self._model.parameters() if p.ndim < 2], "weight_decay": 0.0}]  # fmt: skip
        self._rate = setting.rate
        self._optimizer = torch.optim.AdamW(groups, lr=setting.rate, betas=BETAS, fused=True)
        self.carries = name == "gru"
        self.parameters = count(self._model)
        self.told = {"shape": f"dim {dim}", "rate": setting.rate, "dropout": setting.dropout,
                     "batch": f"{BATCH} x {WINDOW}", "dtype": self._dtype}  # fmt: skip

    def train_step(self, spent: float) -> int:
        """See Contestant."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate * rate_factor(spent)
        self._backward(self._dtype)
        nn.utils.clip_grad_norm_(self._model.parameters(), CLIP)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return BATCH * WINDOW

    def loss(self, chunk: Chunk, state: Any) -> tuple[Tensor, Any]:
        """See Contestant."""
        self._model.eval()
        ids_BS = torch.from_numpy(chunk.ids_BS).long()
        logits_BTV, state = self._model(ids_BS[:, :-1], state)
        return F.cross_entropy(logits_BTV.flatten(0, 1), ids_BS[:, 1:].flatten()), state

    def _backward(self, dtype: str) -> None:
        self._model.train()
        places = self._places.integers(0, len(self._bytes) - WINDOW, BATCH)
        ids_BS = torch.from_numpy(np.stack([self._bytes[place : place + WINDOW + 1] for place in places])).long()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            logits_BTV, _ = self._model(ids_BS[:, :-1])
        F.cross_entropy(logits_BTV.float().flatten(0, 1), ids_BS[:, 1:].flatten()).backward()


def rate_factor(spent: float) -> float:
    """Of the full rate, after the share `spent` of the time."""
    if spent < WARM_UP:
        return max(spent / WARM_UP, 0.01)
    fallen = (1 + math.cos(math.pi * (spent - WARM_UP) / (1 - WARM_UP))) / 2
    return LEAST_RATE + (1 - LEAST_RATE) * fallen


@functools.cache
def nearest_width(name: str, parameters: int) -> int:
    """The width with which the rival's number of parameters is nearest to `parameters`."""
    best, best_error = 0, math.inf
    for width in itertools.count(RIVALS[name].grain, RIVALS[name].grain):
        with torch.device("meta"):
            error = abs(count(RIVALS[name].build(width, 0.0)) - parameters)
        if error >= best_error:
            return best
        best, best_error = width, error


def count(model: nn.Module) -> int:
    """Trained numbers; a matrix used twice counts once."""
    return sum(parameter.numel() for parameter in model.parameters())
