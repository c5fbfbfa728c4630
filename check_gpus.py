"""Says whether this machine's GPUs are fit to train on: called by check_gpus.sh, which sees to the environment."""

import runtime.packages  # noqa: F401  # isort: skip

import csv
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from mingru.scan import scan
from mingru.scan_reference import scan as reference_scan
from runtime.arguments import ArgumentParser, normalise_flags, run_main
from runtime.devices import check_triton
from training.optimizer import build_optimizer
from training.options import OptimizerOptions

ROOT = Path(__file__).resolve().parent
NVIDIA = ("nvidia-smi", "--query-gpu=index,name,driver_version,memory.total,memory.used", "--format=csv,noheader")
AMD = ("rocm-smi", "--showproductname", "--showdriverversion", "--showmeminfo", "vram", "--csv")
TOOLS = {"NVIDIA": NVIDIA, "AMD": AMD}
TOOL_SECONDS = 60.0
TOLERANCE = 1e-3  # of a product of 512 terms in float32, for reduced-precision matrix units too
# (B, T, E): on any GPU the first is run through as a whole, and the second in segments of time.
SCANS = {"scan": (2, 100, 96), "scan in segments": (2, 1024, 96)}
LEAST_FREE = 20 * 2**30  # bytes: a checkpoint of a model of 1g parameters is 16 GiB, and other things need room too
MEET_SECONDS = 300
TINY = (
    "--cpu --dim 16 --depth 1 --batch_size 2 --chunk_size 32 --val_every 0 --max_minutes 4 "
    "--gossip_mixing_rate 0.3 --gossip_heartbeat 0.1 --data train.txt --output run"
).split()
FOREIGN = ("SLURM_", "GRUBOROS_", "TORCHELASTIC_")  # what tells a process who it is, and a secret


def main(argv: list[str]) -> int:
    """The command line; returns 0: GPUs that work, 3: none, and all else works, 1: something failed."""
    parser = ArgumentParser(prog="./check_gpus.sh", description=__doc__.splitlines()[0])
    scratch = os.environ.get("TMPDIR", "/tmp")
    parser.add_argument("--scratch", default=scratch, metavar="DIR", help="where temporary files go (%(default)s)")
    parser.add_argument("--output", default=".", metavar="DIR", help="where runs go (default: here)")
    parser.add_argument("--gossip_host", default="127.0.0.1", metavar="X", help="address or interface of the ranks")
    parser.add_argument("--no_ranks", action="store_true", help="leave out the two ranks that are to meet")
    options = parser.parse_args(normalise_flags(argv))

    failures: list[str] = []

    def attempt(what: str, check: Callable[[], str]) -> None:
        # Whatever goes wrong in one check is its finding; the others are still made.
        try:
            print(f"{what}: {check()}", flush=True)
        except Exception as error:
            failures.append(what)
            print(f"{what}: FAILED: {str(error).strip() or type(error).__name__}", flush=True)

    kind = next((kind for kind, tool in TOOLS.items() if shutil.which(tool[0])), "none")
    attempt(kind, lambda: list_devices(kind))
    attempt("torch", lambda: torch_build(kind))
    seen = torch.cuda.device_count()
    for number in range(seen):
        device = torch.device("cuda", number)
        attempt(f"device {number}", lambda device=device: f"{torch.cuda.get_device_name(device)}, {compute(device)}")
    attempt("cpu", lambda: compute(torch.device("cpu")))
    attempt(f"scratch {options.scratch}", lambda: free_space(Path(options.scratch)))
    attempt(f"output {options.output}", lambda: free_space(Path(options.output)))
    if not options.no_ranks:
        attempt(f"two ranks at {options.gossip_host}", lambda: ranks_meet(options.gossip_host))

    if failures:
        print(f"failed: {', '.join(failures)}")
        return 1
    if seen:
        print(f"ok: {seen} {'' if kind == 'none' else f'{kind} '}GPU{'s' if seen > 1 else ''} fit to train on")
        return 0
    print("ok: no GPU here; training works on the CPU: ./train.local.sh")
    return 3


def list_devices(kind: str) -> str:
    """What the driver's own tool lists, each line after the first marked with `kind`. Raises ValueError if it fails,
    TimeoutExpired if it hangs."""
    if kind == "none":
        return "neither nvidia-smi nor rocm-smi is here"
    tool = subprocess.Popen(TOOLS[kind], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        listed, said = tool.communicate(timeout=TOOL_SECONDS)
    finally:
        tool.kill()  # and not awaited: it may hang in the driver, where no signal reaches it
    if tool.returncode != 0:
        raise ValueError(f"{tool.args[0]} failed: {(said or listed).strip()}")
    return f"\n{kind}: ".join(line for line in listed.splitlines() if line.strip())


def torch_build(kind: str) -> str:
    """Torch's version and what it was built for. Raises ValueError where that does not go with the driver."""
    built = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    if not (torch.version.hip or torch.version.cuda):
        built = "the CPU alone"
    said = f"{torch.__version__}, built for {built}, sees {torch.cuda.device_count()} GPUs"
    if kind == "none" or (torch.cuda.is_available() and (kind == "AMD") == bool(torch.version.hip)):
        return said
    if kind == "AMD":
        raise ValueError(f"{said}, but the driver is AMD's: install rocm-reqs.txt, of a ROCm that the driver supports")
    raise ValueError(f"{said}, but the driver is NVIDIA's: install a torch whose CUDA the driver supports")


def compute(device: torch.device) -> str:
    """What training computes on `device`, against float64 on the CPU: a matrix product, the recurrence forward and
    backward, and a step of the optimizer. Raises ValueError if they differ, UserError if kernels cannot be launched."""
    check_triton(device)
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 512, 512, generator=generator).unbind()
    wrong = {"product": _error(left.to(device) @ right.to(device), left.double() @ right.double())}
    for name, (B, T, E) in SCANS.items():
        projected, grad = torch.randn(B, T, 2 * E, generator=generator), torch.randn(B, T, E, generator=generator)
        found = _there_and_back(scan, projected.to(device), grad.to(device))
        exact = _there_and_back(reference_scan, projected.double(), grad.double())
        wrong[name] = max(map(_error, found, exact))
    weight, gradient = torch.randn(2, 50, 100, generator=generator).unbind()
    wrong["optimizer"] = _error(
        _stepped(weight.to(device), gradient.to(device)), _stepped(weight.double(), gradient.double())
    )
    for name, error in wrong.items():
        if not error < TOLERANCE:
            raise ValueError(f"expected a {name} right within {TOLERANCE:g}, got an error of {error:.1e}")
    memory = f"{torch.cuda.mem_get_info(device)[0] / 2**30:.1f} GiB free, " if device.type == "cuda" else ""
    return memory + ", ".join(f"{name} right within {error:.0e}" for name, error in wrong.items())


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.double().cpu() - exact).abs().max() / exact.abs().max())


def _there_and_back(form: Callable[..., tuple[Tensor, Tensor]], projected: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """h and the gradient of the projection."""
    projected = projected.detach().requires_grad_()
    h = form(projected, None, None)[0]
    h.backward(grad)
    return h.detach(), projected.grad


def _stepped(weight: Tensor, gradient: Tensor) -> Tensor:
    """The weight after two steps of the optimizer."""
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = build_optimizer(torch.nn.ParameterList([parameter]), OptimizerOptions(lr=0.1, warmup_steps=0))
    for _ in range(2):
        parameter.grad = gradient.clone()  # in float64 the library's step changes it
        optimizer.step()
    return parameter.detach()


def free_space(folder: Path) -> str:
    """Free bytes where `folder` is, or would be made. Raises ValueError if it cannot be written."""
    while not folder.exists():
        folder = folder.absolute().parent
    with tempfile.TemporaryFile(dir=folder):
        free = shutil.disk_usage(folder).free
    note = "" if free >= LEAST_FREE else ", little beside a first checkpoint of 1g parameters, of 16 GiB"
    return f"{free / 2**30:.1f} GiB free{note}"


def ranks_meet(host: str) -> str:
    """Train two small ranks on the CPU until they have exchanged weights. Raises ValueError if they never do."""
    with tempfile.TemporaryDirectory(prefix="check_gpus_") as name:
        folder = Path(name)
        folder.joinpath("train.txt").write_bytes(b"".join(path.read_bytes() for path in sorted(ROOT.glob("*.py"))))
        environment = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
        launch = [sys.executable, "-m", "runtime.launch", "--ranks", "2", "--max_restarts", "0", "--"]
        with open(folder / "said", "w") as said:
            launcher = subprocess.Popen(
                [*launch, str(ROOT / "train.py"), *TINY, "--gossip_host", host],
                cwd=folder, env={**environment, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL, stderr=said,
            )  # fmt: skip
        began = time.monotonic()
        try:
            while launcher.poll() is None and not _met(folder) and time.monotonic() - began < MEET_SECONDS:
                time.sleep(0.2)
            took = time.monotonic() - began
        finally:
            launcher.terminate()
            try:
                launcher.wait(timeout=60)
            except subprocess.TimeoutExpired:
                launcher.kill()  # the ranks end with it
                launcher.wait()
        if _met(folder):
            return f"they met within {took:.0f} s"
        lines = (folder / "said").read_text().splitlines()
        if launcher.returncode != 0:
            raise ValueError(lines[-1] if lines else "they failed silently")
        failed = [row["message"] for row in _events(folder) if row["event"] == "failed"]
        raise ValueError(f"they never met: {failed[0] if failed else 'nobody was called'}")


def _met(folder: Path) -> bool:
    return any(row["event"] in ("sent", "merged", "averaged", "tied") for row in _events(folder))


def _events(folder: Path) -> Iterator[dict[str, str]]:
    for path in sorted(folder.glob("gossip_logs/*.tsv")):
        with open(path, newline="") as file:
            yield from csv.DictReader(file, delimiter="\t")


if __name__ == "__main__":
    run_main(main)
