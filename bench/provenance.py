"""What is needed to judge a figure and to print it again: the command, the hardware, the versions."""

import os
import platform
import re
import sys
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from training.run_directory import git_revision

PACKAGES = ("torch", "numpy", "schedulefree", "blake3")


def provenance(module: str) -> dict[str, Any]:
    """Of a bench that `python -m <module>` with this process's arguments runs."""
    model = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "command": " ".join(["python", "-m", module, *sys.argv[1:]]),
        "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "hardware": {
            "cpu": model[1] if model else platform.machine(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        }
        | gpu,
        "versions": {"python": platform.python_version(), "git": git_revision()}
        | {package: version(package) for package in PACKAGES},
    }
