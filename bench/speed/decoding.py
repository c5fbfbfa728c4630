"""Decoding: bytes a second beside the predecessor's loop, and beside reading the weights once for each step."""

import itertools
import sys
from collections import deque
from collections.abc import Callable, Iterator

import torch

from bench.speed import predecessor
from bench.speed.timing import Goal, Row, Setting, Turns
from generate import decode
from mingru.minLM import MinLM, ModelConfig
from mingru.sampling import SamplingOptions
from mingru.sizing import resolve_config

GOALS = {torch.float32: 4, torch.bfloat16: 10}  # times the predecessor's, for one lane
LANES = (1, 8)
GPU_LANES = (1, 64)


def measure(setting: Setting) -> Iterator[Row]:
    """By lanes and by the dtype of our weights; the predecessor's are float32 on a CPU."""
    if setting.quick:
        config, length = ModelConfig(16, 2), 4
    else:
        config, length = (resolve_config(params=2**30), 64) if setting.cuda else (ModelConfig(512, 6), 64)
    dtypes = (torch.bfloat16,) if setting.cuda else (torch.float32, torch.bfloat16)
    totals = {}
    for lanes in GPU_LANES if setting.cuda else LANES:
        models = {dtype: _model(config, dtype, setting) for dtype in dtypes}
        theirs = _model(config, torch.bfloat16 if setting.cuda else torch.float32, setting)
        forms: dict[str, Callable[[], object]] = {
            f"ours {_name(dtype)}": _onward(_ours(model, lanes, sys.maxsize), length) for dtype, model in models.items()
        }
        for dtype, model in models.items():
            forms[f"start {_name(dtype)}"] = lambda model=model, lanes=lanes: list(_ours(model, lanes, 2))
        forms["predecessor"] = lambda theirs=theirs, lanes=lanes: predecessor.generate(
            theirs, lanes, length, setting.device
        )
        for dtype, model in models.items():
            forms[f"weights {_name(dtype)}"] = _reader(model, length)
        turns = Turns(setting, forms, rounds=15)
        for dtype in dtypes:
            ours, limit = f"ours {_name(dtype)}", f"weights {_name(dtype)}"
            case = f"dim {config.dim} depth {config.depth}, {lanes} lanes, {ours}"
            goals = lanes == 1 and not setting.quick
            totals[lanes] = lanes * length / turns.median(ours)
            yield Row(case, totals[lanes], "bytes/s")
            yield Row(f"{case}, the first two bytes", turns.median(f"start {_name(dtype)}") * 1e3, "ms")
            yield turns.faster(
                case, ours, "predecessor", Goal(">=", GOALS[dtype]) if goals and not setting.cuda else None
            )
            floor = Goal(">=", 0.6 if setting.cuda else 0.85) if goals else None
            yield turns.share_of(case, ours, limit, floor, "reading the weights")
    if setting.cuda:
        one, many = (totals[lanes] for lanes in GPU_LANES)
        yield Row(f"{GPU_LANES[1]} lanes over one", many / one, "times the bytes/s", goal=Goal(">=", 20))


def _ours(model: MinLM, lanes: int, length: int) -> Iterator[bytes]:
    """generate.py's own loop, sampling included, from a state of zeros."""
    logits_BV = torch.zeros(lanes, model.config.num_tokens, device=model.token_emb.weight.device)
    generator = torch.Generator().manual_seed(0)
    return decode(model, logits_BV, model.initial_state(lanes), length, SamplingOptions(), generator, None)


def _onward(continuation: Iterator[bytes], length: int) -> Callable[[], object]:
    """Takes the next `length` bytes: what a start costs, such as recording a step, is in the round that is not
    counted."""
    return lambda: deque(itertools.islice(continuation, length), maxlen=0)


def _reader(model: MinLM, times: int) -> Callable[[], object]:
    """Reads memory of the size of all matrices that a step uses, `times` over: the fastest of torch's reductions."""
    used = [p for name, p in model.named_parameters() if p.ndim == 2 and not name.startswith(("token_emb", "conv"))]
    nbytes = sum(p.numel() * p.element_size() for p in used)
    memory = torch.ones(nbytes // 4, device=used[0].device)

    def read() -> None:
        for _ in range(times):
            memory.sum()

    return read


def _model(config: ModelConfig, dtype: torch.dtype, setting: Setting) -> MinLM:
    torch.manual_seed(0)
    return MinLM(config).to(setting.device, dtype).requires_grad_(False)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
