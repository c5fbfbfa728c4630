"""C kernels: compiled by the machine's own compiler when first used, kept in a cache, loaded by ctypes."""

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch  # loaded first, so that the kernels find its OpenMP runtime and bring none of their own

from runtime.stderr import say

# No -ffast-math: NaN and infinity must come through. The two that are here only free the compiler from keeping errno
# and floating-point traps, which nobody reads.
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-fopenmp")
if platform.machine() in ("x86_64", "AMD64"):
    FLAGS += ("-mprefer-vector-width=512",)  # of some processors gcc takes only half the width
BUILD_SECONDS = 60

Signatures = Mapping[str, tuple[type | None, ...]]  # of each function the types of its result and of its arguments
SUFFIXES = {torch.float32: "float", torch.bfloat16: "bf16"}  # of a function's name, by what it works on


class NativeUnavailable(Exception):
    """The kernel cannot be built or loaded here, and why."""


def load_kernels(source: Path) -> ctypes.CDLL:
    """The compiled `source`; built first unless the cache has it for this source, the headers beside it, the compiler,
    the flags and the processor.

    CC names the compiler (default: cc). The cache is gruboros/ in XDG_CACHE_HOME, else in ~/.cache. Several processes
    may build at once: each renames its own file into place. Raises NativeUnavailable.
    """
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise NativeUnavailable(f"no compiler {os.environ.get('CC', 'cc')}")
    try:
        library = cache_folder() / f"{source.stem}_{_key(source, compiler)}.so"
        if not library.exists():
            _build(source, compiler, library)
        kernels = ctypes.CDLL(str(library))
    except subprocess.CalledProcessError as error:
        lines = error.stderr.splitlines() or [f"status {error.returncode}"]
        reason = next((line for line in lines if "error" in line), lines[0])
        raise NativeUnavailable(f"{compiler} failed: {reason}") from None
    except (OSError, subprocess.SubprocessError) as error:
        raise NativeUnavailable(str(error)) from None
    runtimes = openmp_runtimes()
    if len(runtimes) > 1:
        raise NativeUnavailable(f"more than one OpenMP runtime in the process: {', '.join(sorted(runtimes))}")
    return kernels


def load_or_warn(source: Path, user: str, cost: str, signatures: Signatures) -> ctypes.CDLL | None:
    """load_kernels() with the signatures of its functions; None where they cannot be had, which is said: who runs
    without them, and what it costs."""
    try:
        library = load_kernels(source)
    except NativeUnavailable as error:
        say(f"warning: {user} runs without its C kernel, {cost}: {error}")
        return None
    for name, (result, *arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def for_each_dtype(signatures: Signatures) -> Signatures:
    """The signatures of functions that there are for each of SUFFIXES, which ends their names."""
    return {f"{name}_{suffix}": types for name, types in signatures.items() for suffix in SUFFIXES.values()}


def cache_folder() -> Path:
    """The folder of compiled kernels, made with mode 0700. Raises OSError, also if others may write there."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gruboros"
    except RuntimeError:  # a user that the system does not know, as in a container
        raise FileNotFoundError("no home directory: set XDG_CACHE_HOME to a folder of your own") from None
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{folder} must be yours, and written by nobody else")
    return folder


def openmp_runtimes() -> set[str]:
    """Paths of the OpenMP runtimes that this process has mapped."""
    with open("/proc/self/maps", errors="surrogateescape") as maps:
        areas = [line.split(maxsplit=5) for line in maps if "/" in line]
    code = {path.strip() for _, permissions, *_, path in areas if "x" in permissions}  # not what is only read, as data
    return {path for path in code if Path(path).name.startswith(("libgomp", "libomp", "libiomp"))}


def _key(source: Path, compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=BUILD_SECONDS)
    with open("/proc/cpuinfo") as cpuinfo:
        lines = cpuinfo.read().split("\n\n")[0].splitlines()
    processor = [line for line in lines if line.startswith(("vendor_id", "cpu family", "model", "flags", "Features"))]
    sources = [source.read_text(), *(header.read_text() for header in sorted(source.parent.glob("*.h")))]
    parts = (*sources, version.stdout, " ".join(FLAGS), torch.__version__, "\n".join(processor))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _build(source: Path, compiler: str, library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        compiled, linked = Path(folder) / "kernels.o", Path(folder) / "kernels.so"
        for command in (
            [compiler, *FLAGS, "-c", str(source), "-o", str(compiled)],
            # Without -fopenmp here: its symbols are found in the runtime that torch has brought.
            [compiler, "-shared", str(compiled), "-o", str(linked)],
        ):
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=BUILD_SECONDS)
        os.replace(linked, library)
