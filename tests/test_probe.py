"""The probe, and what is judged by it: an elite that does harm is not kept."""

import json
import math
import resource
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
from bench.injection import Injection
from gossip.filesystem_coordinator import Member, Roster
from gossip.fitness_tracker import FitnessTracker
from gossip.merge import merge_judged
from gossip.state import Schema
from mingru.minLM import MinLM, ModelConfig
from tests.test_loop import trainers  # noqa: F401 (a fixture)
from tests.test_resume import QUIET, newest
from training.checkpoint import CheckpointFile, list_checkpoints, save_checkpoint
from training.data import Corpus, Region
from training.fitness import Fitness
from training.loop import Trainer
from training.metrics import RunLog
from training.optimizer import build_optimizer
from training.options import OptimizerOptions
from training.probe import HELD_WINDOWS, Probe, affordable_windows, probe_cost, split_probe
from training.retention import RetentionPolicy, tidy

CPU = torch.device("cpu")


@pytest.fixture
def model() -> Iterator[MinLM]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield MinLM(ModelConfig(dim=16, depth=2))
    torch.set_num_threads(threads)


def regions(tmp_path, held_out_bytes: int, training_bytes: int = 20_000) -> tuple[Region, Region]:
    path = tmp_path / "bytes"
    generator = torch.Generator().manual_seed(1)
    numbers = torch.randint(0, 200, (held_out_bytes + training_bytes,), generator=generator, dtype=torch.uint8)
    path.write_bytes(bytes(numbers.tolist()))
    corpus = Corpus([path], None)
    return Region(corpus, training_bytes, len(corpus)), Region(corpus, 0, training_bytes)


def whole_loss(model: MinLM, weights: dict[str, torch.Tensor], lanes: torch.Tensor) -> float:
    """Of `weights` on whole lanes (L, S), each from zero and in one piece."""
    other = MinLM(model.config)
    other.load_state_dict(weights)
    with torch.no_grad():
        logits_LTV, _ = other(lanes[:, :-1])
    return F.cross_entropy(logits_LTV.flatten(0, 1), lanes[:, 1:].flatten().long()).item()


def probe_of(model, region, windows, pass_bytes=1000):
    weights = build_optimizer(model, OptimizerOptions(sf_beta=0.5))
    with torch.no_grad():
        for name, tensor in weights.tensors().items():
            tensor.mul_(1.5 if name.startswith("z.") else 1.0)
    return Probe(model, weights, region, windows, pass_bytes, CPU), weights


@pytest.mark.parametrize(
    ("held_out_bytes", "probed", "validated"),
    [(400_000, 65_537, 334_463), (40_000, 10_000, 30_000), (8000, 20_000, 8000), (1, 20_000, 1)],
    ids=["large", "a quarter", "too few", "none held out"],
)
def test_the_probe_is_apart_from_what_validates(tmp_path, held_out_bytes, probed, validated):
    held_out, training = regions(tmp_path, held_out_bytes)
    probe, validation = split_probe(training, held_out)
    assert (len(probe), len(validation)) == (probed, validated)
    assert validation.begin == held_out.begin
    if probed + validated == held_out_bytes:
        assert probe.begin == validation.end and probe.end == held_out.end
    else:
        assert probe == training


@pytest.mark.parametrize(
    ("step_bytes", "every", "budget", "windows"),
    [(32 * 64, 50, 0.02, 20), (8 * 2048, 50, 0.02, 188), (1024, 50, 0.0, 8), (1 << 20, 50, 0.02, 256)],
)
def test_the_probe_is_as_large_as_its_budget_allows(step_bytes, every, budget, windows):
    assert affordable_windows(step_bytes, every, budget, averages=True) == windows
    assert affordable_windows(step_bytes, every, budget, averages=False) == min(windows + 4 * (windows > 8), 256)
    cost = probe_cost(windows, step_bytes, every, averages=True)
    assert cost == pytest.approx((windows + 4) * 256 / 3 / (every * step_bytes))
    assert 0.95 * budget < cost <= budget or windows in (8, 256)


@pytest.mark.parametrize("pass_bytes", [1, 600, 100_000])
def test_probe_measures_the_averaged_weights_on_each_window(tmp_path, model, pass_bytes):
    region, _ = regions(tmp_path, 10_000)
    probe, weights = probe_of(model, region, 5, pass_bytes)
    losses, evidence = probe.measure()
    content = region.read(0, len(region))
    places = np.random.default_rng(0).permutation(9999 // 256)[:5] * 256
    of_training = []
    for place, measured in zip(places, evidence.losses, strict=True):
        window = torch.from_numpy(content[place : place + 257])[None]
        expected = whole_loss(model, weights.averaged(), window)
        assert measured == pytest.approx(expected, abs=2e-5)
        of_training.append(whole_loss(model, model.state_dict(), window))
        assert abs(expected - of_training[-1]) > 1e-4  # else both would do
    assert losses == pytest.approx((np.mean(evidence.losses), np.mean(of_training[:HELD_WINDOWS])), abs=1e-5)


def test_a_smaller_probe_is_the_beginning_of_a_larger_one(tmp_path, model):
    region, _ = regions(tmp_path, 10_000)
    (small, _), (large, _) = probe_of(model, region, 3), probe_of(model, region, 9)
    assert small.id == large.id
    assert large.measure()[1].losses[:3] == pytest.approx(small.measure()[1].losses, abs=2e-5)


def test_probes_of_other_bytes_have_other_names(tmp_path, model):
    region, other = regions(tmp_path, 10_000, 10_000)
    assert probe_of(model, region, 3)[0].id != probe_of(model, other, 3)[0].id


def test_probe_of_weights_that_are_not_finite_is_no_evidence(tmp_path, model):
    region, _ = regions(tmp_path, 10_000)
    probe, weights = probe_of(model, region, 3)
    with torch.no_grad():
        weights.tensors()["y.token_emb.weight"].fill_(math.nan)
    losses, evidence = probe.measure()
    assert all(math.isnan(loss) for loss in losses) and evidence is None


def test_probe_changes_nothing_and_says_the_same_again(tmp_path, model):
    region, _ = regions(tmp_path, 5000)
    probe, weights = probe_of(model, region, 8)
    before = {name: tensor.clone() for name, tensor in weights.tensors().items()}
    random_state = torch.get_rng_state()
    assert probe.measure() == probe.measure()
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights.tensors().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.injects(Injection.HARMFUL_UPDATE)
def test_a_peer_whose_base_iterate_is_far_off_does_harm_though_its_average_does_none(tmp_path, model):
    region, _ = regions(tmp_path, 10_000)
    probe, weights = probe_of(model, region, 8)
    fitness = Fitness("probe", FitnessTracker(0.9), probe, 1)
    live = weights.tensors()
    peer = {name: tensor.clone() for name, tensor in live.items()}
    for name, tensor in peer.items():
        if not name.startswith("v."):  # z moves as at far too high a rate, y follows by 1 - sf_beta, x stays
            step = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)) * 5
            tensor.add_(step, alpha=1.0 if name.startswith("z.") else 0.5)
    kept = {name: tensor.clone() for name, tensor in live.items()}
    schema = Schema.of(live, weights.rules, {})
    trial = merge_judged(live, schema, peer, None, "average", 0.5, fitness.judge, 0.1)
    assert trial.after[0] == pytest.approx(trial.before[0], abs=1e-3) and trial.after[1] > trial.before[1] + 0.1
    assert not trial.kept and all(torch.equal(tensor, kept[name]) for name, tensor in live.items())


def test_probe_measures_the_weights_of_training_on_its_first_eight_windows_alone(tmp_path, model):
    region, _ = regions(tmp_path, 10_000)
    (large, _), (small, _) = probe_of(model, region, 12), probe_of(model, region, 8)
    (averaged, held), (averaged_of_eight, held_of_eight) = large.measure()[0], small.measure()[0]
    assert held == pytest.approx(held_of_eight, abs=1e-6)
    assert abs(averaged - averaged_of_eight) > 1e-5


def test_probe_of_an_optimizer_without_an_average_measures_once(tmp_path, model):
    region, _ = regions(tmp_path, 10_000)
    weights = build_optimizer(model, OptimizerOptions(schedulefree=False))
    losses, evidence = Probe(model, weights, region, 3, 1000, CPU).measure()
    assert losses == pytest.approx((np.mean(evidence.losses),), abs=1e-5)


def make_worst(trainer: Trainer, monkeypatch) -> None:
    """Let the population see this rank as the last of two, which an elite may renew at any step."""

    def member(rank: int, standing: float) -> Member:
        return Member(rank, "0" * 32, 1, "running", True, "127.0.0.1:1", 1, 1.0, standing, {})

    roster = Roster(1, (member(0, 1.0), member(1, 0.0)))
    monkeypatch.setattr(train.EvolutionaryNode, "roster", property(lambda node: roster))
    trainer.options.population.rejuvenation_probability = 1.0


def put_elite(trainer: Trainer, scale: float) -> CheckpointFile:
    """An elite that seems the best of all: this rank's own newest state, its weights times `scale`."""
    run_dir = trainer.parts.run.path
    content = newest(run_dir)
    for name, tensor in content["training"]["tensors"].items():
        tensor.mul_(1.0 if name.startswith("v.") else scale)
    content["training"]["totals"]["lineage"] = 700
    path = save_checkpoint(
        run_dir, 1, 40, 0.0001, trainer.model.config, content["model_state_dict"], content["training"]
    )
    tidy(run_dir, RetentionPolicy(keep_checkpoints=2, keep_elite=1, archive_rate=0.0), trainer.dice)
    return next(file for file in list_checkpoints(run_dir) if file.path == path)


@pytest.mark.injects(Injection.POISONED_ELITE)
@pytest.mark.parametrize("method", ["clonal", "recombination"])
def test_an_elite_that_does_harm_is_undone_bit_for_bit_and_not_tried_again(
    run_train, trainers, monkeypatch, tmp_path, method  # noqa: F811
):  # fmt: skip
    run_train("run", "--train_steps", "30", "--gossip_merge_method", method, *QUIET)
    (trainer,) = trainers
    trainer.parts.log = RunLog(tmp_path / "after.log", echo=False)
    elite = put_elite(trainer, scale=-5.0)
    make_worst(trainer, monkeypatch)
    before = {name: tensor.clone() for name, tensor in trainer.weights.tensors().items()}
    scalars, fitness, totals = trainer.weights.scalars(), trainer.parts.fitness.value, vars(trainer.totals).copy()
    for _ in range(3):
        trainer._rejuvenation.consider()
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.weights.tensors().items())
    assert (trainer.weights.scalars(), trainer.parts.fitness.value) == (scalars, fitness)
    assert vars(trainer.totals) == totals
    lines = (tmp_path / "after.log").read_text().splitlines()
    assert f"rolled_back: elite_01.pt ({elite.path.name})" in lines[0] and "nats/byte after" in lines[0]
    assert len(lines) == 1  # and nothing more is said of it at every step


@pytest.mark.injects(Injection.POISONED_ELITE)
def test_an_elite_whose_base_iterate_has_strayed_is_not_merged_and_not_tried_again(
    run_train, trainers, monkeypatch, tmp_path  # noqa: F811
):  # fmt: skip
    run_train("run", "--train_steps", "30", "--gossip_rollback", "none", *QUIET)
    (trainer,) = trainers
    trainer.parts.log = RunLog(tmp_path / "after.log", echo=False)
    put_elite(trainer, scale=30.0)
    make_worst(trainer, monkeypatch)
    before = {name: tensor.clone() for name, tensor in trainer.weights.tensors().items()}
    for _ in range(3):
        trainer._rejuvenation.consider()
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.weights.tensors().items())
    (line,) = (tmp_path / "after.log").read_text().splitlines()
    assert "rejuvenation_failed: elite_01.pt" in line and "its base iterate is" in line


def test_an_elite_for_which_memory_is_out_costs_nothing(run_train, trainers, monkeypatch, tmp_path):  # noqa: F811
    run_train("run", "--train_steps", "30", *QUIET)
    (trainer,) = trainers
    trainer.parts.log = RunLog(tmp_path / "after.log", echo=False)
    put_elite(trainer, scale=1.0)
    make_worst(trainer, monkeypatch)
    monkeypatch.setattr(trainer.parts.fitness, "judge", lambda: torch.empty(10**15))
    before = {name: tensor.clone() for name, tensor in trainer.weights.tensors().items()}
    trainer._rejuvenation.consider()
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.weights.tensors().items())
    (line,) = (tmp_path / "after.log").read_text().splitlines()
    assert "rejuvenation_failed: " in line and "can't allocate memory" in line


@pytest.mark.injects(Injection.DANGLING_SYMLINK)
def test_an_elite_link_that_leads_in_a_circle_is_told_of_and_training_goes_on(
    run_train, trainers, monkeypatch, tmp_path  # noqa: F811
):  # fmt: skip
    run = run_train("run", "--train_steps", "10", *QUIET)
    (trainer,) = trainers
    trainer.parts.log = RunLog(tmp_path / "after.log", echo=False)
    for link in run.glob("elite_*.pt"):
        link.unlink()
    (run / "elite_01.pt").symlink_to("elite_01.pt")
    make_worst(trainer, monkeypatch)
    trainer._rejuvenation.consider()
    assert "rejuvenation_failed: expected " in (tmp_path / "after.log").read_text()


@pytest.mark.injects(Injection.DISK_ERROR)
def test_a_run_directory_that_cannot_be_listed_is_told_of_and_training_goes_on(
    run_train, trainers, monkeypatch, tmp_path  # noqa: F811
):  # fmt: skip
    run_train("run", "--train_steps", "30", *QUIET)
    (trainer,) = trainers
    trainer.parts.log = RunLog(tmp_path / "after.log", echo=False)
    put_elite(trainer, scale=1.0)
    make_worst(trainer, monkeypatch)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))  # a system that is out of descriptors
    try:
        trainer._rejuvenation.consider()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert "rejuvenation_failed: " in (tmp_path / "after.log").read_text()
    trainer._rejuvenation.consider()
    assert "rejuvenated: merged elite_01.pt" in (tmp_path / "after.log").read_text()


@pytest.mark.parametrize(("scale", "tolerance"), [(1.0, 0.1), (-5.0, None)], ids=["harmless", "no-judge"])
def test_an_elite_that_does_none_is_kept_and_its_lineage_is_inherited(
    run_train, trainers, monkeypatch, tmp_path, scale, tolerance  # noqa: F811
):  # fmt: skip
    run_train("run", "--train_steps", "30", "--gossip_rollback", str(tolerance).lower(), *QUIET)
    (trainer,) = trainers
    trainer.parts.log = RunLog(tmp_path / "after.log", echo=False)
    put_elite(trainer, scale)
    make_worst(trainer, monkeypatch)
    before = trainer.weights.tensors()["z.token_emb.weight"].clone()
    trainer._rejuvenation.consider()
    assert "rejuvenated: merged elite_01.pt" in (tmp_path / "after.log").read_text()
    torch.testing.assert_close(trainer.weights.tensors()["z.token_emb.weight"], before * (1 + scale) / 2)
    assert trainer.totals.lineage == 700
    assert (trainer.parts.fitness.value is None) == (tolerance is None)  # the judge has seen the weights as they are


def test_gossip_rollback_reaches_the_node_with_the_probe_as_its_judge(run_train, trainers, monkeypatch):  # noqa: F811
    seen = {}

    class Node(train.EvolutionaryNode):
        def __init__(self, **parts) -> None:
            seen.update(parts)
            super().__init__(**parts)

    monkeypatch.setattr(train, "EvolutionaryNode", Node)
    for flag, value in (("0.25", 0.25), ("none", None)):
        run_dir = run_train(f"run_{flag}", "--train_steps", "2", "--gossip_rollback", flag, *QUIET)
        assert seen["config"].rollback_tolerance == value
        assert json.loads((run_dir / "config.json").read_text())["options"]["population"]["gossip_rollback"] == value
        assert seen["judge"]() == trainers[-1].parts.fitness.probe.measure()[0]
        assert seen["known"]() == trainers[-1].parts.fitness.known is not None
