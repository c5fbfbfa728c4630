"""How far a base iterate goes from its average at 8 and 30 times a learning rate: `python -m bench.excursion --data F`.

Replicas of one small model that begin alike, read different bytes and meet nobody. For each rate and warm-up, after so
many steps: the distance at 8 and at 30 times the rate over the one at the rate itself. By it training/objections.py
tells a rank that diverges from one whose rate is merely another.
"""

from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bench.evidence import RESULTS, write_result
from bench.evolution.laboratory import open_corpus
from mingru.minLM import MinLM, ModelConfig
from runtime.arguments import ArgumentParser, normalise_flags, run_main
from training.data import LaneReader, Region
from training.losses import chunk_loss
from training.optimizer import build_optimizer
from training.options import OptimizerOptions

STEPS = (2, 5, 10, 20, 50, 100, 200, 400)
MODEL = ModelConfig(dim=64, depth=2)
LANES, LANE_CHUNK = 8, 64
FACTORS = (1.0, 8.0, 30.0)
CASES = ((3e-3, 100), (3e-3, 1000), (3e-3, 0), (4e-2, 100))  # learning rate, steps of warm-up
DEVICE = torch.device("cpu")


def distances(training: Region, seed: int, place: int, lr: float, warmup_steps: int) -> list[float]:
    """Of one replica after each of STEPS; place: whose bytes it reads."""
    options = OptimizerOptions(lr=lr, warmup_steps=warmup_steps)
    torch.manual_seed(seed)
    model = MinLM(MODEL)
    weights = build_optimizer(model, options)
    reader = LaneReader(training, LANES, LANE_CHUNK, rank=place, world_size=len(FACTORS), seed=seed)
    state, found = model.initial_state(LANES), []
    for step in range(1, STEPS[-1] + 1):
        loss, state = chunk_loss(model, reader.next_chunk(), state.detach(), DEVICE)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.grad_clip)
        weights.step()
        model.zero_grad(set_to_none=True)
        if step in STEPS:
            found.append(weights.excursion(weights.tensors()).distance)
    return found


def main(arguments: list[str]) -> int:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="file of bytes to train on")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--output", type=Path, default=RESULTS / "excursion.json", help="figures (default: %(default)s)"
    )
    given = parser.parse_args(normalise_flags(arguments))
    training, _ = open_corpus(given.data).split(0.1)
    table = Table("rate", "warm-up", "times", *map(str, STEPS), title="distance over a sound rank's, by step")
    rows = []
    for lr, warmup_steps in CASES:
        own, *others = (
            distances(training, given.seed, place, factor * lr, warmup_steps) for place, factor in enumerate(FACTORS)
        )
        for factor, other in zip(FACTORS[1:], others, strict=True):
            ratios = [round(far / near, 1) for far, near in zip(other, own, strict=True)]
            rows.append({"lr": lr, "warmup_steps": warmup_steps, "factor": factor, "ratios": ratios})
            table.add_row(f"{lr:g}", str(warmup_steps), f"{factor:g}", *map(str, ratios))
    Console().print(table)
    write_result(given.output, "excursion", {"steps": STEPS, "rows": rows})
    return 0


if __name__ == "__main__":
    run_main(main)
