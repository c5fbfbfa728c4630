"""Prints the cores for each NVIDIA GPU that torch sees, in its numbering, a line each: python -m runtime.gpu_cores"""

import os
import subprocess

import torch

from runtime.arguments import ArgumentParser, run_main
from runtime.errors import UserError
from runtime.locality import bus_addresses, cores_near, format_cores
from runtime.stderr import say


def main(arguments: list[str]) -> None:
    """The command line. Raises UserError without an NVIDIA GPU."""
    ArgumentParser(prog="python -m runtime.gpu_cores", description=__doc__.split(":")[0]).parse_args(arguments)
    if torch.version.hip is not None or not torch.cuda.is_available():
        raise UserError("expected an NVIDIA GPU that torch can use, got none: see ./check_gpus.sh, or train on the CPU")
    devices = [str(torch.cuda.get_device_properties(number).uuid) for number in range(torch.cuda.device_count())]
    for cores in cores_near(devices, bus_addresses(list_addresses()), os.sched_getaffinity(0)):
        print(format_cores(cores))


def list_addresses() -> str:
    """The driver's "uuid, bus id" of every GPU, a line each; none where it does not tell, as in a container without
    nvidia-smi, which is said."""
    command = ["nvidia-smi", "--query-gpu=uuid,pci.bus_id", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        say(f"warning: nvidia-smi does not tell which cores are near which GPU ({error}): all count as near")
        return ""


if __name__ == "__main__":
    run_main(main)
