"""The same arms as real processes: train.py under the launcher, over TCP, so that staleness and busy peers count."""

import csv
import dataclasses
import math
import statistics
import tempfile
import time
from pathlib import Path

import torch

from bench.evidence import newest_whole
from bench.evolution.pairwise import Meeting, Ours, PairMean
from bench.evolution.policy import Arm, Conditions, Policy, Solo
from bench.evolution.replica import held_out_loss, ring_bytes
from bench.evolution.trial import LANE_CHUNK, LANES, Setting, mean_of
from bench.population import ROOT, Population
from runtime.errors import UserError
from training.checkpoint import CheckpointFile, load_for_use
from training.data import Corpus, validation_chunks
from training.probe import split_probe

POLL_SECONDS = 0.5
SIMULATED = ("share", "shun", "evolve", "mutation_scale", "limit", "step_seconds")  # options that no flag says
SAID = ("replicas", "lr", "sf_beta", "minutes")  # conditions that flags say


def run_real(setting: Setting, arm: Arm, seed: int, data: Path, corpus: Corpus) -> dict:
    """Train one population on the CPU to the end of its steps, or minutes, and measure its last checkpoints as
    run_trial() does.

    Raises UserError where an arm has no flags that say it; RuntimeError with the ranks' words if one of them failed.
    """
    ranks = arm.conditions.replicas or setting.replicas
    flags = flags_of(setting, arm, seed)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        flags += ["--data", str(data.resolve())]
        with Population("real", Path(folder), ranks, ROOT / "train.py", flags) as population:
            while not population.ended():
                time.sleep(POLL_SECONDS)
            population.stop()
        if population.status != 0:
            raise RuntimeError(f"status {population.status}: {population.output[-2000:]}")
        seconds = time.perf_counter() - began
        files = [_newest(population, rank, 0 if arm.conditions.minutes else setting.steps) for rank in range(ranks)]
        models = [load_for_use(file.path, torch.device("cpu"))[0] for file in files]
        sent = [_bytes_sent(population, rank) for rank in range(ranks)]
    weights = [dict(model.named_parameters()) for model in models]
    _, measured = split_probe(*corpus.split(setting.val_fraction))
    chunks = list(validation_chunks(measured, LANES, LANE_CHUNK, len(measured)))
    losses = [held_out_loss(models[0], each, chunks, torch.device("cpu")) for each in weights]
    parameters = sum(tensor.numel() for tensor in weights[0].values())
    steps = statistics.fmean(file.step for file in files)
    all_reduce = ring_bytes(4 * parameters, ranks) * steps
    return {
        "arm": f"{arm.label} over TCP",
        "seed": seed,
        "setting": dataclasses.asdict(setting),
        "options": arm.in_full(),
        "ranks": ranks,
        "parameters": parameters,
        "steps": steps,
        "loss": statistics.fmean(losses),
        "losses": losses,
        "best": min(losses),
        "loss_of_mean": held_out_loss(models[0], mean_of(weights), chunks, torch.device("cpu")),
        "bytes_sent": statistics.fmean(sent),
        "bytes_over_ddp": statistics.fmean(sent) / all_reduce if all_reduce else 0.0,
        "wall_s": seconds,
        "cpu_s": population.cpu_seconds,
        "device": "cpu",
    }


def flags_of(setting: Setting, arm: Arm, seed: int) -> list[str]:
    """train.py's flags for an arm, but --data and --output. Raises UserError."""
    policy, conditions = arm.policy(), arm.conditions
    said = {name: getattr(Conditions, name) for name in SAID}
    plain = dataclasses.replace(conditions, **said) == Conditions()
    simulated = [name for name, _ in arm.options if name in SIMULATED]
    if not isinstance(policy, Solo | PairMean | Ours) or not plain or simulated:
        raise UserError(f"expected with --real solo, pair_mean or ours, under {', '.join(SAID)} alone and "
                        f"without {', '.join(SIMULATED)}, got {arm.label}: leave it out")  # fmt: skip
    budget = {"max_minutes": conditions.minutes} if conditions.minutes else {"train_steps": setting.steps}
    values = budget | {
        "seed": seed, "val_fraction": setting.val_fraction, "dim": setting.dim,
        "depth": setting.depth, "ff_mult": setting.ff_mult, "batch_size": setting.batch_size,
        "chunk_size": setting.chunk_size, "lr": setting.lr * conditions.lr, "sf_beta": conditions.sf_beta,
        "weight_decay": setting.weight_decay,
        "warmup_steps": setting.warmup_steps, "val_every": 0, "save_every": 10 * setting.steps, "log_every": 1,
        "dtype": "fp32",  # as the laboratory has it
        "gossip_host": "127.0.0.1", "gossip_heartbeat": 0.5,  # so that ranks know each other soon
    } | _gossip(policy)  # fmt: skip
    words = (word for name, value in values.items() for word in (f"--{name}", str(value)))
    return ["--cpu", "--no_enable_conv", "--lane_groups", "1", *words]


def _gossip(policy: Policy) -> dict[str, str | float]:
    if not isinstance(policy, Meeting):
        return {"gossip_mixing_rate": 0}
    flags = {
        "gossip_mixing_rate": policy.p, "gossip_payload": policy.payload, "gossip_wire_dtype": policy.wire,
        "gossip_rollback": "none" if math.isinf(policy.rollback) else policy.rollback,
    }  # fmt: skip
    if not isinstance(policy, Ours):
        return flags | {"gossip_merge_method": "average"}
    flags |= {"gossip_merge_method": policy.method, "gossip_fitness": "probe", "probe_every": policy.probe_every}
    if policy.method == "recombination":
        flags["gossip_recombination_alpha"] = policy.alpha
    if policy.method != "average":
        flags |= {
            "gossip_tie": policy.tie, "gossip_significance": policy.significance,
            "gossip_least_effect": policy.least_effect,
        }  # fmt: skip
    return flags


def _newest(population: Population, rank: int, step: int) -> CheckpointFile:
    """The rank's last checkpoint, of `step` (0: of any)."""
    file = newest_whole(population.run_dir, rank)
    if file is None or step not in (0, file.step):
        raise RuntimeError(f"rank {rank} left no checkpoint of step {step or 'any'}: {population.output[-2000:]}")
    return file


def _bytes_sent(population: Population, rank: int) -> int:
    """All bytes that the rank put on the wire, handshakes and refused calls included, as its metrics last said."""
    with open(population.run_dir / "metrics" / f"rank_{rank:04d}.tsv", newline="") as file:
        return int(list(csv.DictReader(file, delimiter="\t"))[-1]["bytes_sent"])
