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
    "solo",
    "pair_mean:p=0.02",
    "ours:p=0.02",
    "ddp",
    "one_way:p=0.02,winner=probe",
    "one_way:p=0.02,winner=random",
    "one_way:p=0.02,winner=ema",
    "ours:p=0.05",
    "pair_mean:p=0.05",
    "ddp:lr=2",
    "solo:spread=8",
    "one_way:p=0.02,spread=8,winner=random",
    "one_way:p=0.02,spread=8,winner=probe",
    "ours:p=0.02,spread=8",
    "ours:evolve=lr,p=0.02,spread=8",
    "pair_mean:p=0.0375,payload=weights,wire=bf16",
    "pair_mean:p=0.02,spread=8",
    "one_way:p=0.02,spread=8,winner=ema",
    "diloco",
    "noloco",
    "mean_all",
    "ddp:lr=0.5",
    "mean_all:every=10,share=0.01",
    "one_way:method=clonal,p=0.02,winner=probe",
    "pair_mean:p=0.011,payload=weights,wire=bf16",
    "ours:corrupt=1,p=0.02",
    "pair_mean:corrupt=1,p=0.02",
    "ours:diverging=1,p=0.02",
)
