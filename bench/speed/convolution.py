"""The depthwise convolution beside torch's and beside a copy of its bytes; what it costs a training step."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.speed.timing import Row, Setting, Turns
from bench.speed.training import trainer
from mingru.conv import convolve
from mingru.minLM import ModelConfig

TAPS = 4


def measure(setting: Setting) -> Iterator[Row]:
    """In milliseconds: one layer's, there and back, in float32; and whole steps with convolutions and without."""
    dim, depth, lanes, length = (16, 2, 2, 32) if setting.quick else (192, 4, 8, 256)
    x_BTD, grad_BTD = torch.randn(2, lanes, length, dim, device=setting.device)
    past_BPD = x_BTD.new_zeros(lanes, TAPS - 1, dim)
    taps_KD, bias_D = x_BTD.new_ones(TAPS, dim), x_BTD.new_ones(dim)
    inputs = [tensor.requires_grad_() for tensor in (x_BTD, taps_KD, bias_D)]
    copied_BTD = torch.empty_like(x_BTD)

    def there_and_back(form: Callable[[], Tensor]) -> None:
        torch.autograd.grad(form(), inputs, grad_BTD)

    def torchs() -> Tensor:
        return F.conv1d(F.pad(x_BTD.mT, (TAPS - 1, 0)), taps_KD.t().unsqueeze(1), bias_D, groups=dim).mT

    def copies() -> None:  # three reads and two writes: both ways read the input
        for _ in range(2):
            copied_BTD.copy_(x_BTD.detach())
        copied_BTD.sum()

    forms = {
        "ours": lambda: there_and_back(lambda: convolve(x_BTD, past_BPD, taps_KD, bias_D, None)),
        "torch's conv1d": lambda: there_and_back(torchs),
        "copy of its bytes": copies,
    }
    turns = Turns(setting, forms, rounds=45)
    case = f"{lanes} x {length} x {dim}, {TAPS} taps, forward + backward"
    yield turns.faster(case, "ours", "torch's conv1d")
    yield turns.share_of(case, "ours", "copy of its bytes")
    for dtype in ("fp32", "bf16"):
        steps = {
            name: trainer(ModelConfig(dim, depth, ff_mult=3.0, conv_kernel_size=taps), lanes, length, dtype, setting)
            for name, taps in (("with", TAPS), ("a step without", None))
        }
        turns = Turns(setting, steps, rounds=15)
        case = f"a step of dim {dim} depth {depth} B{lanes} T{length} {dtype}, {TAPS} taps"
        yield turns.share_of(case, "with", "a step without")
