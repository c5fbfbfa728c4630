"""Dropout beside torch's and beside a copy of its bytes; what it costs a training step in the shape of the race."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.speed.timing import Row, Setting, Turns
from bench.speed.training import trainer
from mingru.dropout import dropout
from mingru.minLM import ModelConfig

CHANCE = 0.1


def measure(setting: Setting) -> Iterator[Row]:
    """In milliseconds: one branch's output, there and back; and whole steps with dropout and without."""
    dim, depth, lanes, length = (16, 2, 2, 32) if setting.quick else (192, 4, 8, 256)
    x, grad = torch.randn(2, 8, length, dim, device=setting.device)
    copied = torch.empty_like(x)

    def there_and_back(drop: Callable[[Tensor, float], Tensor]) -> None:
        torch.autograd.grad(drop(x.requires_grad_(), CHANCE), x, grad)

    def copies() -> None:
        copied.copy_(x.detach())
        copied.copy_(grad)

    forms = {
        "ours": lambda: there_and_back(dropout),
        "torch's": lambda: there_and_back(F.dropout),
        "copy of its bytes": copies,
    }
    turns = Turns(setting, forms, rounds=45)
    case = f"8 x {length} x {dim}, forward + backward"
    yield turns.faster(case, "ours", "torch's")
    yield turns.share_of(case, "ours", "copy of its bytes")
    shape = {"ff_mult": 3.0, "conv_kernel_size": 4}
    steps = {
        name: trainer(ModelConfig(dim, depth, dropout=chance, **shape), lanes, length, "fp32", setting)
        for name, chance in (("with", CHANCE), ("a step without", 0.0))
    }
    turns = Turns(setting, steps, rounds=15)
    case = f"a step of dim {dim} depth {depth} B{lanes} T{length}, dropout {CHANCE}"
    yield turns.share_of(case, "with", "a step without")
