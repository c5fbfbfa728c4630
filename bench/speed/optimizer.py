"""The optimizer's step: ours beside schedulefree's two forms, torch's fused AdamW, and a copy of its bytes."""

from collections.abc import Callable, Iterator

import schedulefree
import torch
from torch import nn

from bench.speed.timing import Row, Setting, Turns
from mingru.minLM import MinLM, ModelConfig
from training.optimizer import build_optimizer
from training.options import OptimizerOptions

MOVED = 7  # float32 numbers a parameter: reads y, z, v and the gradient, writes y, z and v


def measure(setting: Setting) -> Iterator[Row]:
    """In milliseconds a step and nanoseconds a parameter."""
    # On a GPU so many that the host's own work, of some hundred launches, is hidden behind the device's.
    config = ModelConfig(16, 2) if setting.quick else ModelConfig(2048, 6) if setting.cuda else ModelConfig(512, 6)
    models = {name: _model(config, setting) for name in ("ours", "foreach", "one by one", "adamw")}
    count = sum(p.numel() for p in models["ours"].parameters())
    source = torch.ones(count * MOVED // 2, device=setting.device)
    target = torch.zeros_like(source)
    forms: dict[str, Callable[[], object]] = {
        "ours": build_optimizer(models["ours"], OptimizerOptions()).step,
        "schedulefree, foreach": _library(models["foreach"], foreach=True).step,
        "schedulefree, one by one": _library(models["one by one"], foreach=False).step,
        "torch AdamW(fused)": torch.optim.AdamW(models["adamw"].parameters(), lr=1e-4, fused=True).step,
        "copy of its bytes": lambda: target.copy_(source),
    }
    turns = Turns(setting, forms, rounds=15)
    case = f"{count / 1e6:.1f}M parameters"
    yield Row(f"{case}, a parameter", turns.median("ours") / count * 1e9, "ns")
    for peer in list(forms)[1:-1]:
        yield turns.faster(case, "ours", peer)
    yield turns.share_of(case, "ours", "copy of its bytes")


def _library(model: nn.Module, foreach: bool) -> schedulefree.AdamWScheduleFree:
    optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=1e-4, foreach=foreach)
    optimizer.train()
    return optimizer


def _model(config: ModelConfig, setting: Setting) -> MinLM:
    torch.manual_seed(0)
    model = MinLM(config).to(setting.device)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model
