"""Which cores are near which GPU, and how the ranks of a host share them."""

import contextlib
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from runtime.errors import UserError

PCI_DEVICES = Path("/sys/bus/pci/devices")
CPUS = Path("/sys/devices/system/cpu")
_CORES_LIMIT = 1 << 16


def cores_near(
    devices: Sequence[str], addresses: dict[str, str], usable: set[int], pci: Path = PCI_DEVICES, cpus: Path = CPUS
) -> list[set[int]]:
    """For each device the cores for the rank on it: devices with the same near cores share them evenly.

    devices: their UUIDs; addresses: PCI address by UUID; usable: cores that this process may use. Where the kernel does
    not tell what is near (a virtual machine), or nothing near is usable, all usable cores count as near.
    """
    near = []
    for device in devices:
        listing = pci / addresses.get(device, "unknown") / "local_cpulist"
        told = parse_cores(listing.read_text()) if listing.exists() else set()
        near.append(frozenset(told & usable or usable))
    shares = {cores: iter(share(cores, near.count(cores), cpus)) for cores in set(near)}
    return [next(shares[cores]) for cores in near]


def share(cores: Iterable[int], parts: int, cpus: Path = CPUS) -> list[set[int]]:
    """`cores` in `parts` of whole physical cores, equal but for one; each has one at least, if it must be another's."""
    physical: dict[str, set[int]] = {}
    for core in sorted(cores):
        siblings = cpus / f"cpu{core}" / "topology" / "thread_siblings_list"
        physical.setdefault(siblings.read_text() if siblings.exists() else str(core), set()).add(core)
    groups = list(physical.values())
    if len(groups) < parts:
        return [groups[part % len(groups)] for part in range(parts)]
    bounds = [len(groups) * part // parts for part in range(parts + 1)]
    return [set().union(*groups[low:high]) for low, high in itertools.pairwise(bounds)]


def bus_addresses(listing: str) -> dict[str, str]:
    """PCI addresses as the kernel writes them, by UUID without its "GPU-", from lines of "uuid, bus id"."""
    rows = [line.split(",") for line in listing.splitlines() if line.count(",") == 1]
    return {uuid.strip().removeprefix("GPU-"): _kernel_address(bus.strip()) for uuid, bus in rows}


def _kernel_address(bus: str) -> str:
    domain, _, rest = bus.partition(":")  # nvidia-smi writes eight digits of the domain, the kernel four
    return f"{int(domain, 16):04x}:{rest.lower()}"


def parse_cores(text: str) -> set[int]:
    """The cores of a list such as 0-3,8. Raises UserError."""
    cores: set[int] = set()
    try:
        for part in text.strip().split(","):
            low, dash, high = part.partition("-")
            last = int(high if dash else low)
            if last >= _CORES_LIMIT:
                raise ValueError
            cores.update(range(int(low), last + 1))
    except ValueError:
        raise UserError(f"expected a list of cores such as 0-3,8, got {text.strip()!r}: write it so") from None
    return cores


def format_cores(cores: Iterable[int]) -> str:
    """The inverse of parse_cores(): runs of cores as low-high."""
    runs: list[list[int]] = []
    for core in sorted(cores):
        if runs and core == runs[-1][1] + 1:
            runs[-1][1] = core
        else:
            runs.append([core, core])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


@contextlib.contextmanager
def bound(cores: set[int] | None) -> Iterator[None]:
    """The calling thread, and what it starts in the block, runs on these cores alone; None: as before.

    Raises OSError where none of them may be used.
    """
    before = os.sched_getaffinity(0)
    if cores is not None:
        os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
