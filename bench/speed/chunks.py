"""Training with longer chunks at as many bytes a step: time and memory should not change with the length."""

from collections.abc import Callable, Iterator

import torch

from bench.speed.memory import peak_extra
from bench.speed.timing import Goal, Row, Setting, Turns
from bench.speed.training import trainer
from mingru.minLM import ModelConfig

LENGTHS = (512, 4096, 65536)


def measure(setting: Setting) -> Iterator[Row]:
    """Each length against the shortest, in float32 on a CPU and in bfloat16 on a GPU."""
    config = ModelConfig(16 if setting.quick else 128, 2)
    lengths = (32, 128) if setting.quick else LENGTHS
    total, dtype = lengths[-1], "bf16" if setting.cuda else "fp32"
    forms = {f"T{length}": trainer(config, total // length, length, dtype, setting) for length in lengths}
    turns = Turns(setting, forms, rounds=5)
    del forms
    peaks = {
        length: peak_extra(_prepare, config, total // length, length, dtype, setting.device.type, cuda=setting.cuda)
        for length in lengths
    }
    base = lengths[0]
    goal = None if setting.quick else Goal(">=", 0.9)
    for length in lengths[1:]:
        case = f"dim {config.dim} depth {config.depth} B{total // length} T{length}"
        yield turns.share_of(case, f"T{length}", f"T{base}", goal, f"B{total // base} T{base}")
        yield Row(
            f"{case} memory of a step", peaks[length] / 1e6, "MB", f"B{total // base} T{base}", peaks[base] / 1e6,
            goal=None if setting.quick else Goal("<=", 1.05 * peaks[base] / 1e6),
        )  # fmt: skip


def _prepare(config: ModelConfig, lanes: int, length: int, dtype: str, device: str) -> Callable[[], None]:
    setting = Setting(torch.device(device))
    trainer(config, 1, 32, dtype, setting)()
    return trainer(config, lanes, length, dtype, setting)
