"""The arms by name, and the ones that are run unless others are asked for: what decides a default first."""

from bench.evolution.pairwise import OneWay, Ours, PairMean
from bench.evolution.policy import Solo
from bench.evolution.synchronous import Ddp, DiLoCo, MeanAll, NoLoCo

POLICIES = {
    "solo": Solo,
    "ddp": Ddp,
    "mean_all": MeanAll,
    "diloco": DiLoCo,
    "noloco": NoLoCo,
    "pair_mean": PairMean,
    "one_way": OneWay,
    "ours": Ours,
}

DEFAULT_ARMS = (
    "ours:lr=2",
    "ddp:lr=2",
    "solo:lr=2",
    "pair_mean:lr=2",
    "one_way:lr=2,winner=random",
    "ours:lr=2,spread=8",
    "one_way:lr=2,spread=8,winner=random",
    "ours:evolve=lr,lr=2,spread=8",
    "solo:lr=2,spread=8",
    "ours",
    "ddp",
    "solo",
    "ours:lr=4",
    "ddp:lr=4",
    "one_way:lr=2,winner=probe",
    "one_way:lr=2,winner=ema",
    "one_way:lr=2,method=clonal,winner=probe",
    "mean_all:lr=2",
    "mean_all:every=10,lr=2,share=0.01",
    "diloco:lr=2",
    "noloco:lr=2",
    "pair_mean:lr=2,p=0.4,share=0.1",
    "ours:corrupt=1,lr=2",
    "ours:diverging=1,lr=2",
)
