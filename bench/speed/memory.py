"""Peak memory of a piece of work, measured in a process of its own, whose peak nothing else has raised."""

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch


def peak_extra(prepare: Callable[..., Callable[[], object]], *arguments: object, cuda: bool = False) -> int:
    """Bytes that `prepare(*arguments)()` takes at its peak beyond what was there once it was prepared.

    prepare: a module's own function; what torch sets up once must be set up when it returns. On a CPU resident memory,
    on a GPU torch's allocations.
    """
    spawn = multiprocessing.get_context("spawn")
    near, far = spawn.Pipe()
    process = spawn.Process(target=_measure, args=(far, cuda, prepare, arguments))
    process.start()
    far.close()  # so that a child that dies is seen here as the end of the pipe
    try:
        return near.recv()
    finally:
        process.join()


def _measure(pipe: Connection, cuda: bool, prepare: Callable[..., Callable[[], object]], arguments: tuple) -> None:
    work = prepare(*arguments)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        pipe.send(torch.cuda.max_memory_allocated() - before)
        return
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again at what is resident now
    before = _resident("VmRSS")
    work()
    pipe.send(_resident("VmHWM") - before)


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith(field))) * 1024
