"""Which device a rank computes on, whether kernels can be launched there, and how much memory it has."""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import torch

from runtime.errors import UserError

CPUINFO = Path("/proc/cpuinfo")


def choose_device(cuda: bool = False, rocm: bool = False, cpu: bool = False, local_rank: int = 0) -> torch.device:
    """The device asked for, else the best there is; `local_rank` picks among this host's accelerators.

    An accelerator becomes the calling thread's current one: streams and pinned memory are made for that. Torch's ROCm
    builds present AMD devices as "cuda". Raises UserError when two kinds are asked for at once, or the
    one asked for is absent.
    """
    asked = [name for name, wanted in (("--cuda", cuda), ("--rocm", rocm), ("--cpu", cpu)) if wanted]
    if len(asked) > 1:
        raise UserError(f"expected one device, got {' and '.join(asked)}: keep one of them")
    if cpu:
        return torch.device("cpu")
    available = torch.cuda.is_available()
    if cuda and not (available and torch.version.hip is None):
        raise UserError("expected a CUDA device for --cuda, got none in this torch build or host: use --cpu or --rocm")
    if rocm and not (available and torch.version.hip is not None):
        raise UserError("expected a ROCm device for --rocm, got none in this torch build or host: use --cpu or --cuda")
    if not available:
        return torch.device("cpu")
    torch.cuda.init()  # before it the count may be the driver's, of boards that this process does not see
    # A launcher that binds one device to each task shows every task a single device, number 0.
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def check_triton(device: torch.device) -> None:
    """Raise UserError where Triton, which launches its kernels through a library that the machine's C compiler builds
    once, cannot have that: the first training step would end with it. On a CPU, or without Triton, nothing is wanted.
    """
    if device.type != "cuda":
        return
    try:
        from triton.runtime import driver
    except ImportError:  # who runs slower without its kernels says so
        return
    try:
        _ = driver.active.utils
    except (RuntimeError, AssertionError, ImportError, OSError, subprocess.SubprocessError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"expected a C compiler and Python's headers, by which Triton builds its launcher for {device}, got "
            f"{reason!r}: install gcc and python3-dev (or python3-devel), or let CC name a compiler"
        ) from error


def ranks_sharing(device: torch.device, local_world_size: int, environment: Mapping[str, str]) -> int:
    """How many of this host's ranks choose_device() gives `device`; 1 where that cannot be told: local_world_size is 0,
    or Slurm started the rank and may show each one other devices.
    """
    if device.type == "cpu":
        return max(1, local_world_size)
    if "SLURM_PROCID" in environment:
        return 1
    return max(1, len(range(device.index, local_world_size, torch.cuda.device_count())))


def device_memory_bytes(device: torch.device) -> int:
    """Total memory of `device` in bytes; for the CPU, the host's memory or the cgroup's limit if that is lower."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        with open("/sys/fs/cgroup/memory.max") as file:
            limit = file.read().strip()
    except OSError:  # no cgroup v2 on this host: the host's memory is the only limit
        return host
    return min(host, int(limit)) if limit.isdigit() else host


def has_fast_bf16() -> bool:
    """Whether this host's processor multiplies matrices faster in bfloat16 than in float32: one with tiles for it
    (AMX), or AMD's with AVX512_BF16 (Zen 4 and later; measured on a Zen 5, docs/performance.md).

    Others' bfloat16 instructions may be slower than float32's. torch reaches them through oneDNN.
    """
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:  # no Linux
        return False
    fields = {name.strip(): value.split() for name, _, value in (line.partition(":") for line in reversed(lines))}
    flags, vendor = fields.get("flags", []), fields.get("vendor_id", [])
    fast = "amx_bf16" in flags or ("avx512_bf16" in flags and vendor == ["AuthenticAMD"])
    return fast and torch.backends.mkldnn.is_available()
