"""The probe, and what is judged by it: an elite that does harm is not kept."""

import json
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

import train
from bench.injection import Injection
from gossip.filesystem_coordinator import Member, Roster
from mingru.minLM import MinLM, ModelConfig
from tests.test_loop import trainers  # noqa: F401 (a fixture)
from tests.test_resume import QUIET, newest
from training.checkpoint import CheckpointFile, list_checkpoints, save_checkpoint
from training.data import Corpus, Region
from training.loop import Trainer
from training.metrics import RunLog
from training.optimizer import build_optimizer
from training.options import DataOptions, OptimizerOptions
from training.probe import Probe
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


@pytest.mark.parametrize(
    ("held_out_bytes", "options", "lanes", "lane_bytes"),
    [
        (5000, DataOptions(batch_size=4, chunk_size=300), 4, 300),
        (5000, DataOptions(batch_size=2, chunk_size=32), 2, 512),  # no less than 1k
        (90_000, DataOptions(batch_size=64, chunk_size=2048), 64, 1024),  # no more than 64k
        (97, DataOptions(batch_size=4, chunk_size=300), 4, 24),  # what there is
        (1, DataOptions(batch_size=4, chunk_size=300), 4, 300),  # nothing held out: the end of the training bytes
    ],
    ids=["a batch", "few", "many", "short", "none held out"],
)
def test_probe_is_the_averaged_weights_loss_on_the_last_bytes(
    tmp_path, model, held_out_bytes, options, lanes, lane_bytes
):
    held_out, training = regions(tmp_path, held_out_bytes)
    region = held_out if held_out_bytes > 1 else training
    weights = build_optimizer(model, OptimizerOptions(sf_beta=0.5))
    with torch.no_grad():
        for name, tensor in weights.tensors().items():
            tensor.mul_(1.5 if name.startswith("z.") else 1.0)
    probe = Probe(model, weights, held_out, training, options, CPU)
    window = region.read(len(region) - lanes * lane_bytes - 1, len(region))
    rows = [window[lane * lane_bytes : (lane + 1) * lane_bytes + 1] for lane in range(lanes)]
    lanes_LS = torch.stack([torch.from_numpy(row) for row in rows])
    expected = whole_loss(model, weights.averaged(), lanes_LS)
    assert probe.loss() == pytest.approx(expected, abs=1e-5)
    assert abs(expected - whole_loss(model, model.state_dict(), lanes_LS)) > 1e-4  # of y: else both would do


def test_probe_changes_nothing_and_says_the_same_again(tmp_path, model):
    held_out, training = regions(tmp_path, 5000)
    weights = build_optimizer(model, OptimizerOptions())
    probe = Probe(model, weights, held_out, training, DataOptions(), CPU)
    before = {name: tensor.clone() for name, tensor in weights.tensors().items()}
    random_state = torch.get_rng_state()
    assert probe.loss() == probe.loss()
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights.tensors().items())
    assert all(parameter.grad is None for parameter in model.parameters())


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
    elite = put_elite(trainer, scale=-30.0)
    make_worst(trainer, monkeypatch)
    before = {name: tensor.clone() for name, tensor in trainer.weights.tensors().items()}
    scalars, fitness, totals = trainer.weights.scalars(), trainer.parts.tracker.fitness, vars(trainer.totals).copy()
    for _ in range(3):
        trainer._rejuvenation.consider()
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.weights.tensors().items())
    assert (trainer.weights.scalars(), trainer.parts.tracker.fitness) == (scalars, fitness)
    assert vars(trainer.totals) == totals
    lines = (tmp_path / "after.log").read_text().splitlines()
    assert f"rolled_back: elite_01.pt ({elite.path.name})" in lines[0] and "nats/byte after" in lines[0]
    assert len(lines) == 1  # and nothing more is said of it at every step


@pytest.mark.parametrize(("scale", "tolerance"), [(1.0, 0.1), (-30.0, None)], ids=["harmless", "no-judge"])
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
    assert trainer.parts.tracker.fitness is None


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
        assert seen["judge"]() == trainers[-1].parts.probe.loss()
