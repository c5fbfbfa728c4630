"""One trial: an arm's population trained and measured, in this process, its replicas stepped in turn.

On a GPU too they take turns.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bench.evolution.policy import DIVERGING, Arm, Conditions, Policy
from bench.evolution.replica import NoiseReader, Reader, Replica, held_out_loss, ring_bytes
from gossip.fitness_tracker import FitnessTracker
from mingru.minLM import MinLM, ModelConfig
from training.data import Corpus, LaneReader, Region, validation_chunks
from training.heredity import Heredity
from training.optimizer import build_optimizer
from training.options import OptimizerOptions, PopulationOptions
from training.probe import Probe, split_probe

LANES, LANE_CHUNK = 64, 256  # in which the held-out bytes are read
TRACE_EVERY = 50  # steps
LEAST_RATE = 0.1  # of the full learning rate, at the end of a cosine


@dataclass(frozen=True)
class Setting:
    """What all arms of a comparison share. fingerprint: of the data; batch_size, chunk_size and steps are each rank's;
    probe_windows: as training.probe takes them from the end of the held-out bytes; those before it measure.
    """

    fingerprint: str
    val_fraction: float
    probe_windows: int
    replicas: int
    steps: int
    dim: int
    depth: int
    ff_mult: float
    batch_size: int
    chunk_size: int
    lr: float
    weight_decay: float
    warmup_steps: int

    @property
    def model(self) -> ModelConfig:
        """The shape of every replica."""
        return ModelConfig(dim=self.dim, depth=self.depth, ff_mult=self.ff_mult)

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(self).items())


def trial_key(setting: Setting, arm: Arm) -> str:
    """Eight hex digits that differ between any two arms, options left at their defaults included, and settings."""
    told = {"setting": dataclasses.asdict(setting), "arm": arm.in_full()}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]


def run_trial(setting: Setting, arm: Arm, seed: int, corpus: Corpus, device: torch.device) -> dict:
    """Train and measure one population; everything that the table needs, as plain values."""
    began, cpu_began = time.perf_counter(), time.process_time()
    training, held_out = corpus.split(setting.val_fraction)
    probed, measured = split_probe(training, held_out)
    policy, ranks = arm.policy(), arm.conditions.replicas or setting.replicas
    readers = list(_readers(setting, arm.conditions, ranks, seed, training))
    groups = [readers] if policy.one_model else [[reader] for reader in readers]
    options = OptimizerOptions(
        lr=setting.lr, weight_decay=setting.weight_decay, warmup_steps=setting.warmup_steps,
        sf_beta=arm.conditions.sf_beta, schedulefree=arm.conditions.optimizer == "schedulefree",
    )  # fmt: skip
    replicas = [
        _replica(setting, options, policy, seed, rank, group, probed, device) for rank, group in enumerate(groups)
    ]
    for replica, factor in zip(replicas, rate_factors(arm.conditions, len(replicas)), strict=True):
        replica.lr = setting.lr * factor
    policy.begin(replicas, random.Random(f"{seed} meetings"))

    trace = []
    for step in range(1, setting.steps + 1):
        decay = 1.0 if options.schedulefree else cosine_decay(step, setting.warmup_steps, setting.steps)
        for replica in replicas:
            replica.train_step(decay)
        policy.after_step(step)
        if step % TRACE_EVERY == 0:
            trace.append({"step": step, "lr": [replica.lr for replica in replicas],
                          "train": [replica.fitness.tracker.ema for replica in replicas]})  # fmt: skip
    trained, cpu_trained = time.perf_counter(), time.process_time()

    averages = [replica.weights.averaged() for replica in replicas]
    chunks = list(validation_chunks(measured, LANES, LANE_CHUNK, len(measured)))
    losses = [held_out_loss(replicas[0].model, average, chunks, device) for average in averages]
    gradients = 4 * sum(tensor.numel() for tensor in averages[0].values())
    all_reduce = ring_bytes(gradients, ranks) * setting.steps  # of DDP, each rank, fp32
    sent = all_reduce if policy.one_model else statistics.fmean(replica.sent for replica in replicas)
    return {
        "arm": arm.label,
        "seed": seed,
        "setting": dataclasses.asdict(setting),
        "options": arm.in_full(),
        "ranks": ranks,
        "parameters": gradients // 4,
        "steps": setting.steps,
        "loss": statistics.fmean(losses),
        "losses": losses,
        "best": min(losses),
        "loss_of_mean": held_out_loss(replicas[0].model, mean_of(averages), chunks, device),
        "distance": _distance(averages),
        "bytes_sent": sent,
        "bytes_over_ddp": sent / all_reduce if all_reduce else 0.0,
        "counts": dict(policy.counts),
        "replicas": [
            {"lr": r.lr, "sent": r.sent, "merges": r.merges, "rolled_back": r.rolled_back, "not_finite": r.not_finite}
            for r in replicas
        ],
        "trace": trace,
        "wall_s": trained - began,
        "cpu_s": cpu_trained - cpu_began,
        "device": str(device),
    }


def cosine_decay(step: int, warmup_steps: int, steps: int) -> float:
    """By what the learning rate of `step` (from 1) is over the full one: 1 until the warm-up ends, LEAST_RATE at the
    last step, a half cosine between them."""
    done = max(0.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    return LEAST_RATE + (1 - LEAST_RATE) * (1 + math.cos(math.pi * done)) / 2


def rate_factors(conditions: Conditions, replicas: int) -> list[float]:
    """By what each replica's learning rate is over --lr."""
    factors = []
    for rank in range(replicas):
        place = rank / (replicas - 1) if replicas > 1 else 2 / 3
        factors.append(conditions.lr * conditions.spread ** (place - 2 / 3))
    for rank in range(replicas - conditions.diverging, replicas):
        factors[rank] *= DIVERGING
    return factors


def _readers(setting: Setting, conditions: Conditions, ranks: int, seed: int, training: Region) -> Iterator[Reader]:
    for rank in range(ranks):
        reader = LaneReader(training, setting.batch_size, setting.chunk_size, rank=rank, world_size=ranks, seed=seed)
        if conditions.parted:
            parts = rank * setting.batch_size + np.arange(setting.batch_size)
            places = np.random.default_rng((seed, rank)).random(setting.batch_size)
            reader.positions = ((parts + places) / (ranks * setting.batch_size) * len(training)).astype(np.int64)
        yield NoiseReader(reader, seed + rank) if rank >= ranks - conditions.corrupt else reader


def _replica(
    setting: Setting, options: OptimizerOptions, policy: Policy, seed: int, rank: int, readers: list[Reader],
    probed: Region, device: torch.device,
) -> Replica:  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # all replicas begin alike
        model = MinLM(setting.model).to(device)
    weights = build_optimizer(model, options)
    probe = Probe(model, weights, probed, setting.probe_windows, LANES * LANE_CHUNK, device)
    fitness = policy.fitness_of(FitnessTracker(PopulationOptions().gossip_fitness_decay), probe)
    rate = Heredity(("lr",), options, 1.0, policy.mutation_scale, 0, 1)  # the arm's conditions say where it begins
    return Replica(rank, model, weights, readers, fitness, rate, options, setting.batch_size, device)


def mean_of(averages: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of several replicas' weights, by name."""
    return {name: torch.stack([average[name] for average in averages]).mean(0) for name in averages[0]}


def _distance(averages: list[dict[str, Tensor]]) -> float:
    """Mean distance of two replicas' weights over their mean norm; 0 for one."""
    flat = [torch.cat([tensor.flatten() for tensor in average.values()]) for average in averages]
    apart = [float((a - b).norm()) for a, b in itertools.combinations(flat, 2)]
    return statistics.fmean(apart) / statistics.fmean(float(a.norm()) for a in flat) if apart else 0.0
