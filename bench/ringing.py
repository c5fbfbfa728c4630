"""train.py, whose rank 0 exchanges at the start of every second block of steps and writes when each block began."""

import json
import os
import time
from pathlib import Path

import train
from gossip.evolutionary_node import EvolutionaryNode
from runtime.arguments import run_main

BLOCK = 50  # steps
REPORT = Path("blocks.json")


def main(arguments: list[str]) -> int:
    """train.py's own; of rank 0 every step boundary is watched."""
    if os.environ["RANK"] != "0":
        return train.main(arguments)
    original, starts, exchanges = EvolutionaryNode.step_boundary, [], 0

    def step_boundary(node: EvolutionaryNode, step: int, *rest: object, **named: object) -> object:
        nonlocal exchanges
        if step % BLOCK == 0:
            starts.append(time.perf_counter())
            if len(starts) % 2 == 1:
                node.seek()
        report = original(node, step, *rest, **named)
        exchanges = node.counters.averaged + node.counters.rolled_back
        return report

    EvolutionaryNode.step_boundary = step_boundary
    status = train.main(arguments)
    REPORT.write_text(json.dumps({"starts": starts, "exchanges": exchanges}))
    return status


if __name__ == "__main__":
    run_main(main)
