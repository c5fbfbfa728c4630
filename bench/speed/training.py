"""A whole training step beside the predecessor's and beside its matrix products alone; what share those have of it."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from bench.speed import gpu_peers, predecessor
from bench.speed.products import Products
from bench.speed.timing import Goal, Row, Setting, Spread, Turns
from mingru.minLM import MinLM, ModelConfig
from mingru.sizing import resolve_config
from training.computation import flops_per_byte, peak_flops, training_pass
from training.data import Chunk
from training.losses import chunk_loss
from training.optimizer import build_optimizer
from training.options import ComputeOptions, OptimizerOptions

# dim, lanes, and the goals against the predecessor in fp32 and bf16; each 6 layers and chunks of 512 bytes.
CASES = ((256, 4, 1.9, 3.4), (512, 2, 1.55, 3.1))
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::mkldnn_linear")


def measure(setting: Setting) -> Iterator[Row]:
    """By size on a CPU; on a GPU a model of 1g parameters in bfloat16, at the largest batch that fits."""
    if setting.cuda:
        yield from _on_gpu(setting)
        return
    for dim, lanes, *goals in ((16, 2, None, None),) if setting.quick else CASES:
        depth, length = (2, 32) if setting.quick else (6, 512)
        config = ModelConfig(dim, depth)
        case = f"dim {dim} depth {depth} B{lanes} T{length}"
        forms = {f"ours {dtype}": trainer(config, lanes, length, dtype, setting) for dtype in ("fp32", "bf16")}
        chunk = random_chunk(lanes, length)
        ids_BS = torch.from_numpy(chunk.ids_BS).long()
        forms["predecessor"] = predecessor.trainer(new_model(config, setting), ids_BS)
        for dtype in (torch.float32, torch.bfloat16):
            forms[f"products {dtype}"] = Products(new_model(config, setting), lanes * length, dtype, setting.device)
        turns = Turns(setting, forms, rounds=15)
        for dtype, name, goal in zip(("fp32", "bf16"), (torch.float32, torch.bfloat16), goals, strict=True):
            ours, products = f"ours {dtype}", f"products {name}"
            yield turns.faster(f"{case}, {ours}", ours, "predecessor", goal and Goal(">=", goal))
            limit = f"matrix products in {dtype}"
            yield turns.share_of(f"{case}, {ours}", ours, products, goal and Goal(">=", 0.85), limit)
        yield turns.faster(f"{case}, matrix products in bf16", "products torch.bfloat16", "products torch.float32")
        for name in ("ours fp32", "ours bf16", "predecessor"):
            share = products_share(forms[name], setting)
            yield Row(f"{case}, {name}: matrix products in the profile", 100 * share, "% of a step")


def trainer(config: ModelConfig, lanes: int, length: int, dtype: str, setting: Setting) -> Callable[[], None]:
    """A function that makes one training step as the training loop makes it, on the same chunk each time."""
    model, options = new_model(config, setting).train(), OptimizerOptions()
    weights = build_optimizer(model, options)
    forward = training_pass(model, ComputeOptions(dtype=dtype), setting.device)
    chunk, state = random_chunk(lanes, length), model.initial_state(lanes)

    def step() -> None:
        loss, _ = chunk_loss(forward, chunk, state, setting.device)
        loss.backward()
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
        if torch.stack((loss.detach(), norm)).tolist()[1] > options.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), options.grad_clip, norm)
        weights.step()
        model.zero_grad(set_to_none=True)

    return step


def new_model(config: ModelConfig, setting: Setting) -> MinLM:
    """The same weights each time."""
    torch.manual_seed(0)
    return MinLM(config).to(setting.device)


def random_chunk(lanes: int, length: int) -> Chunk:
    """Bytes of one document, at random."""
    ids_BS = np.random.default_rng(0).integers(0, 256, (lanes, length + 1), dtype=np.uint8)
    return Chunk(ids_BS, np.zeros((lanes, length), dtype=bool))


def products_share(step: Callable[[], None], setting: Setting) -> float:
    """Of the profiler's self times of one step, the share of matrix products."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(setting.times(3)):
            step()
    times = {event.key: event.self_cpu_time_total for event in seen.key_averages()}
    return sum(times.get(name, 0.0) for name in PRODUCTS) / sum(times.values())


def _on_gpu(setting: Setting) -> Iterator[Row]:
    config, length = (ModelConfig(64, 2), 64) if setting.quick else (resolve_config(params=2**30), 2048)
    peak = peak_flops(setting.device, torch.bfloat16)
    own = "ours bf16"
    lanes = _most_lanes(lambda lanes: trainer(config, lanes, length, "bf16", setting), setting)
    step = trainer(config, lanes, length, "bf16", setting)
    seconds = Turns(setting, {own: step}, rounds=9).seconds[own]
    rates = Spread.of([lanes * length / each for each in seconds])
    case = f"dim {config.dim} depth {config.depth}, largest batch B{lanes} T{length}"
    yield Row(f"{case}, {own}", rates.median, "bytes/s")
    if peak is not None:
        flops = flops_per_byte(new_model(config, setting))
        share = Spread(*(rate * flops / peak for rate in rates))
        yield Row(f"{case}, {own}: MFU", share.median, "of the peak", ratio=share, goal=Goal(">=", 0.5), meaning="MFU")
    del step
    peers = {"predecessor": _predecessor_maker(config, length, setting)}
    peers |= {
        name: _peer_maker(make, length, setting)
        for name, make in gpu_peers.models(sum(p.numel() for p in new_model(config, setting).parameters()), 256).items()
    }
    for name, make in peers.items():
        torch.cuda.empty_cache()
        yield _against(case, rates, name, make, length, setting)


def _against(case: str, rates: Spread, name: str, make: Callable, length: int, setting: Setting) -> Row:
    """Our rates, in bytes a second, beside a peer's at its own largest batch, if it can train at all."""
    try:
        lanes = _most_lanes(make, setting)
        rate = lanes * length / Turns(setting, {name: make(lanes)}, rounds=9).median(name)
    except torch.OutOfMemoryError:
        return Row(case, rates.median, "bytes/s", f"{name}: out of memory with one lane")
    return Row(
        f"{case} against B{lanes}", rates.median, "bytes/s", name, rate, Spread(*(r / rate for r in rates)),
        Goal(">=", 1),
    )  # fmt: skip


def _most_lanes(make: Callable[[int], Callable[[], None]], setting: Setting) -> int:
    """The largest power of two of lanes with which a step fits the GPU's memory."""
    lanes = 1
    while not setting.quick or lanes < 2:
        step = None  # the one before goes first
        try:
            step = make(2 * lanes)
            for _ in range(2):  # an optimizer may allocate its state within the first
                step()
        except torch.OutOfMemoryError:
            break
        finally:
            step = None
            torch.cuda.empty_cache()
        lanes *= 2
    return lanes


def _predecessor_maker(config: ModelConfig, length: int, setting: Setting) -> Callable[[int], Callable[[], None]]:
    def make(lanes: int) -> Callable[[], None]:
        ids_BS = torch.from_numpy(random_chunk(lanes, length).ids_BS).long().to(setting.device)
        step = predecessor.trainer(new_model(config, setting), ids_BS)

        def in_bf16() -> None:
            with torch.autocast(setting.device.type, torch.bfloat16):
                step()

        return in_bf16

    return make


def _peer_maker(make: Callable[[], torch.nn.Module], length: int, setting: Setting) -> Callable:
    def of_lanes(lanes: int) -> Callable[[], None]:
        model = make().to(setting.device)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        ids_BT = torch.from_numpy(random_chunk(lanes, length).ids_BS).long().to(setting.device)[:, :-1]

        def step() -> None:
            with torch.autocast(setting.device.type, torch.bfloat16):
                loss = model(input_ids=ids_BT, labels=ids_BT).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    return of_lanes
