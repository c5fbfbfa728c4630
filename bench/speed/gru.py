"""minGRU beside torch's nn.GRU of the same width: forward and backward, projection and weight gradients included."""

from collections.abc import Iterator

import torch
from torch import nn

from bench.speed.timing import Goal, Row, Setting, Turns
from mingru.minGRU import minGRU

WIDTH = 256
LANES = 4
LENGTHS = (128, 512, 2048, 16384)


def measure(setting: Setting) -> Iterator[Row]:
    """By length, in float32 on a CPU and in float16 on a GPU, where nn.GRU is cuDNN's or MIOpen's: torch does not lay
    out its weights for them in bfloat16."""
    width, lanes, dtype = (8 if setting.quick else WIDTH), LANES, torch.float16 if setting.cuda else torch.float32
    ours = minGRU(width).to(setting.device, dtype)
    theirs = nn.GRU(width, width, batch_first=True).to(setting.device, dtype)
    for length in (16, 64) if setting.quick else LENGTHS:
        torch.manual_seed(0)
        x_BTD = torch.randn(lanes, length, width).to(setting.device, dtype).requires_grad_()
        grad_BTD = torch.randn(lanes, length, width).to(setting.device, dtype)

        def run(layer: nn.Module, x_BTD=x_BTD, grad_BTD=grad_BTD) -> None:
            layer.zero_grad(set_to_none=True)
            x_BTD.grad = None
            out = layer(x_BTD)
            (out[0] if isinstance(out, tuple) else out).backward(grad_BTD)

        forms = {"minGRU": lambda run=run: run(ours), "nn.GRU": lambda run=run: run(theirs)}
        turns = Turns(setting, forms, rounds=9 if length < 4096 else 3)
        goal = None if setting.quick else Goal(">=", 1)
        yield turns.faster(f"width {width}, B{lanes} T{length}", "minGRU", "nn.GRU", goal)
