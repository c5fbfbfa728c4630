"""The recurrence, forward and backward: ours against the peers' log-space form, in turn within one process.

    python -m bench.scan [--rounds N] [--cuda]

Prints per shape the medians, the ratio of the peers' time to ours with its quartiles over the rounds, and the memory
each needs beyond the input and the output's gradient, in units of one (B, T, E) tensor.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from mingru import scan_logspace
from mingru.scan import scan

SHAPES = ((4, 512, 768), (1, 2048, 1536), (8, 256, 384))
FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "ours": lambda projected: scan(projected)[0],
    "peers": lambda projected: scan_logspace.scan(projected, None, None)[0],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="measurements of each form (default: %(default)s)")
    parser.add_argument("--cuda", action="store_true", help="on the GPU (default: the CPU)")
    parser.add_argument("--peak", nargs=4, metavar=("FORM", "B", "T", "E"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = torch.device("cuda" if options.cuda else "cpu")
    if options.peak:
        print(peak_extra(options.peak[0], tuple(map(int, options.peak[1:])), device))
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {device}, float32, {options.rounds} rounds")
    for shape in SHAPES:
        seconds = measure(shape, options.rounds, device)
        ratios = [peers / ours for ours, peers in zip(seconds["ours"], seconds["peers"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        times = "  ".join(f"{form} {statistics.median(all_) * 1e3:7.2f} ms" for form, all_ in seconds.items())
        memory = "  ".join(f"{form} {peak_in_own_process(form, shape, options.cuda):4.1f} N" for form in FORMS)
        ratio = f"ratio {middle:.1f} ({low:.1f} to {high:.1f})"
        print("B{}-T{}-E{}:".format(*shape), times, ratio, f"extra {memory}", sep="  ", flush=True)


def measure(shape: tuple[int, int, int], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of one forward and backward pass of each form, the forms in turn; a first round is not counted."""
    projected_BT2E, grad_BTE = _inputs(shape, device)
    seconds: dict[str, list[float]] = {form: [] for form in FORMS}
    for counted in range(-1, rounds):
        for form in FORMS:
            start = time.perf_counter()
            _run(form, projected_BT2E, grad_BTE)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if counted >= 0:
                seconds[form].append(time.perf_counter() - start)
    return seconds


def peak_in_own_process(form: str, shape: tuple[int, int, int], cuda: bool) -> float:
    """peak_extra in a fresh process, whose peak nothing else has raised."""
    command = [sys.executable, "-m", "bench.scan", "--peak", form, *map(str, shape)] + (["--cuda"] if cuda else [])
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def peak_extra(form: str, shape: tuple[int, int, int], device: torch.device) -> float:
    """Peak memory of the first pass beyond its inputs, gradients included, in units of one (B, T, E) tensor."""
    _run(form, *_inputs((1, 65, 8), device))  # what torch sets up once is not the form's
    inputs = _inputs(shape, device)
    before = _peak_bytes(device, start=True)
    _run(form, *inputs)
    return (_peak_bytes(device) - before) / (inputs[1].numel() * inputs[1].element_size())


def _peak_bytes(device: torch.device, start: bool = False) -> int:
    """On a CPU what the process holds (`start`), or the most it ever held; on a GPU the same of torch's allocations."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated() if start else torch.cuda.max_memory_allocated()
    with open("/proc/self/status") as status:
        fields = dict(line.split(":", 1) for line in status)
    return int(fields["VmRSS" if start else "VmHWM"].split()[0]) * 1024


def _inputs(shape: tuple[int, int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    B, T, E = shape
    torch.manual_seed(0)
    return torch.randn(B, T, 2 * E, device=device, requires_grad=True), torch.randn(B, T, E, device=device)


def _run(form: str, projected_BT2E: Tensor, grad_BTE: Tensor) -> None:
    projected_BT2E.grad = None
    FORMS[form](projected_BT2E).backward(grad_BTE)


if __name__ == "__main__":
    main()
