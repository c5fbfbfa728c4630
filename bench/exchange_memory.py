"""Host memory that exchanges take, over the state itself: `python -m bench.exchange_memory --megabytes 100 1000`.

Two processes with a real node each and a state of that size. Peak resident memory of each, over what it held with its
state alone, in units of the state's size, for a conversation in which one sends and the other merges with a judge that
lets it pass, one in which the merge is undone, and one in which both send. On Linux, by VmHWM.
"""

import multiprocessing
import tempfile
import time
from pathlib import Path

from bench.evidence import RESULTS, write_result
from bench.speed.exchange import make_state
from gossip.config import GossipConfig
from gossip.decision import Policy
from gossip.event_log import EventLog
from gossip.evolutionary_node import EvolutionaryNode
from gossip.network_utils import listen
from runtime.arguments import ArgumentParser, normalise_flags, run_main
from runtime.ranks import Identity

CASES = {"one sends": ("recombination", 0.0), "undone": ("recombination", 1.0), "both send": ("average", 0.0)}
PATIENCE = 300.0  # seconds for a conversation


def peak_bytes() -> int:
    """Most resident memory since forget_peak()."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024


def forget_peak() -> None:
    """Let the peak begin again at what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def one_rank(pipe, rank: int, megabytes: int, case: str) -> None:
    """A rank of two; rank 0 is the fitter one, and calls. Sends its address, takes the other's, sends its peak."""
    method, harm = CASES[case]
    live, schema = make_state(megabytes)
    for tensor in live.values():
        tensor.mul_(1 + rank)
    forget_peak()
    baseline = peak_bytes()
    judged = 0

    def judge() -> tuple[float]:
        nonlocal judged
        judged += 1
        return (harm * (judged - 1),)

    with tempfile.TemporaryDirectory() as folder:
        listener = listen("127.0.0.1", 0)
        host, port = listener.getsockname()
        pipe.send(f"{host}:{port}")
        config = GossipConfig(
            policy=Policy(method, "ema"), wire_dtype="fp32", filesystem_coordinator=False, peers=(pipe.recv(),),
            mixing_rate=0.0, exchange_seconds=PATIENCE,
        )  # fmt: skip
        node = EvolutionaryNode(
            Identity(rank, rank, 2, 2, "alone"), "bench", Path(folder), listener, schema, live, lambda: {"k": 0.0},
            config, EventLog(Path(folder) / "events.tsv", rank), 0, None, bytes(32), judge,
        )  # fmt: skip
        node.start()
        node.step_boundary(0, 0, float(rank), {})
        pipe.send("ready")
        pipe.recv()
        if rank == 0:
            node._switchboard.ring()
        deadline = time.monotonic() + PATIENCE
        while not ended(node) and time.monotonic() < deadline:
            node.step_boundary(0, 0, float(rank), {})
            time.sleep(0.001)
        counters = node.counters
        node.close()
    if not (counters.won or counters.lost or counters.averaged or counters.rolled_back):
        raise RuntimeError(f"expected a conversation to end well, got {counters}")
    pipe.send((peak_bytes() - baseline) / schema.nbytes)


def ended(node: EvolutionaryNode) -> bool:
    """A conversation was counted, well or not."""
    counters = node.counters
    return any((counters.won, counters.lost, counters.averaged, counters.rolled_back, counters.failed))


def measure(megabytes: int, case: str) -> list[float]:
    """Peaks of the caller (the fitter one) and of the answerer, in states."""
    spawn = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for rank in range(2):
        near, far = spawn.Pipe()
        processes.append(spawn.Process(target=one_rank, args=(far, rank, megabytes, case), daemon=True))
        processes[-1].start()
        far.close()  # so that a rank that dies ends the wait for what it would say
        pipes.append(near)
    addresses = [pipe.recv() for pipe in pipes]
    for pipe, other in zip(pipes, reversed(addresses), strict=True):
        pipe.send(other)
    for word in ("ready", "go"):
        for pipe in pipes:
            pipe.recv() if word == "ready" else pipe.send(word)
    peaks = [pipe.recv() for pipe in pipes]
    for process in processes:
        process.join()
    return peaks


def main(arguments: list[str]) -> int:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, nargs="+", default=[100, 1000], help="sizes of the state, 10^6 bytes")
    parser.add_argument(
        "--output", type=Path, default=RESULTS / "exchange_memory.json", help="figures (default: %(default)s)"
    )
    given = parser.parse_args(normalise_flags(arguments))
    rows = []
    print(f"{'state':>10s}  {'case':10s} {'fitter one':>11s} {'other':>7s}  states of peak memory over its own")
    for megabytes in given.megabytes:
        for case in CASES:
            fitter, other = measure(megabytes, case)
            rows.append({"megabytes": megabytes, "case": case, "fitter": round(fitter, 3), "other": round(other, 3)})
            print(f"{megabytes:>7d} MB  {case:10s} {fitter:11.2f} {other:7.2f}", flush=True)
    write_result(given.output, "exchange_memory", {"rows": rows})
    return 0


if __name__ == "__main__":
    run_main(main)
