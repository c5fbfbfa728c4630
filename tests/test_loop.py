"""What the training loop does at its edges: averaged weights, non-finite losses, failing disks, signals, merges."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import train
from bench.injection import Injection
from gossip.evolutionary_node import EvolutionaryNode
from gossip.filesystem_coordinator import RankReplaced
from runtime.errors import UserError
from runtime.supervise import REPLACED
from tests.conftest import TINY
from tests.test_resume import QUIET, metrics_rows, newest
from training import optimizer, start
from training.checkpoint import list_checkpoints
from training.data import validation_chunks
from training.fitness import Fitness
from training.loop import Trainer
from training.metrics import RunLog
from training.recovery import Recovery, TrainingDiverged


@pytest.fixture
def trainers(monkeypatch) -> list[Trainer]:
    """The Trainers that train.main makes, in the order it makes them."""
    made = []

    class Recorded(Trainer):
        def __init__(self, parts) -> None:
            super().__init__(parts)
            made.append(self)

    monkeypatch.setattr(train, "Trainer", Recorded)
    return made


def held_out_loss(trainer: Trainer, weights: dict[str, torch.Tensor]) -> float:
    """The held-out loss of `weights`, put into the model for good, a byte at a time through the public forward."""
    trainer.model.load_state_dict(weights)
    trainer.model.eval()
    losses, state = [], None
    data = trainer.options.data
    with torch.no_grad():
        for chunk in validation_chunks(trainer.parts.held_out, data.batch_size, data.chunk_size, data.val_bytes):
            for t in range(chunk.reset_BT.shape[1]):
                ids = torch.from_numpy(chunk.ids_BS)
                logits, state = trainer.model(ids[:, t : t + 1], state, torch.from_numpy(chunk.reset_BT)[:, t : t + 1])
                losses.append(F.cross_entropy(logits[:, 0], ids[:, t + 1].long(), reduction="none"))
    return torch.cat(losses).mean().item()


def test_validation_and_the_checkpoints_weights_are_x_while_training_is_y(run_train, trainers):
    run_dir = run_train("run", "--train_steps", "30", "--lr", "0.02", "--warmup_steps", "0", *QUIET)
    (trainer,) = trainers
    content = newest(run_dir)
    y = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    x = trainer.weights.averaged()
    measured = trainer.validate()
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, y[name])  # validating left training's weights alone
        assert torch.equal(content["model_state_dict"][name], x[name])
        assert torch.equal(content["training"]["tensors"][f"y.{name}"], y[name])
    loss_of_y, loss_of_x = held_out_loss(trainer, y), held_out_loss(trainer, x)
    assert abs(loss_of_x - loss_of_y) > 1e-3  # else this could not tell them apart
    assert measured == pytest.approx(loss_of_x, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_judges_is_computed_in_the_precision_of_training(run_train, trainers, dtype):
    word = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    run_train("run", "--train_steps", "2", "--dtype", word, *QUIET)
    (trainer,) = trainers
    seen = []
    products = [layer for layer in trainer.model.modules() if isinstance(layer, torch.nn.Linear)]
    products[0].register_forward_hook(lambda layer, given, out: seen.append(out.dtype))
    trainer.validate()
    validated, seen[:] = set(seen), []
    trainer.parts.fitness.probe.measure()
    assert set(seen) == validated == {dtype}


def test_a_step_trains_on_every_chunk_and_carries_the_state(run_train, trainers):
    flags = ["--lr", "1e-30", "--document_delimiter", "none", "--lane_groups", "1"]
    run_train("run", "--train_steps", "1", *flags, *QUIET)
    (trainer,) = trainers
    # With weights that stand still, the next steps' losses are those of one long chunk.
    start = trainer.parts.lanes.state_dict()
    trainer.state = trainer.initial_state()
    losses = []
    for _ in range(3):
        trainer.train_step()
        losses.append(trainer.loss)
    trainer.parts.lanes.load_state_dict(start)
    trainer.parts.lanes.chunk_size = 96
    trainer.state = trainer.initial_state()
    trainer.train_step()
    assert trainer.loss == pytest.approx(sum(losses) / 3, abs=1e-5)


def test_groups_of_lanes_take_turns_each_with_its_own_state(run_train, trainers):
    flags = ["--lr", "1e-30", "--document_delimiter", "none", "--lane_groups", "2"]
    run_train("run", "--train_steps", "1", *flags, *QUIET)
    (trainer,) = trainers
    start = trainer.parts.lanes.state_dict()
    losses = {}
    for name, length, steps in (("short", 32, 4), ("long", 64, 2)):  # each group two chunks; or one, twice as long
        trainer.parts.lanes.load_state_dict(start)
        trainer.parts.lanes.chunk_size = length
        trainer.state = trainer.initial_state()
        assert trainer.state.hidden.shape[1] == 4
        losses[name] = []
        for _ in range(steps):
            trainer.train_step()
            losses[name].append(trainer.loss)
    a, b, c, d = losses["short"]
    assert losses["long"] == pytest.approx([(a + c) / 2, (b + d) / 2], abs=1e-5)


@pytest.mark.parametrize("place", ["build_model", "build_optimizer"])
def test_a_device_without_memory_for_the_model_is_refused_and_leaves_no_run_behind(
    run_train, monkeypatch, tmp_path, place
):
    monkeypatch.setattr(start, place, lambda *_: torch.empty(10**15))
    with pytest.raises(UserError, match=r"expected memory for the model on cpu, got .*can't allocate .*: choose"):
        run_train("run", "--train_steps", "2")
    assert not (tmp_path / "run").exists()


def test_memory_that_is_out_in_training_is_told_in_one_line_after_a_save(
    run_train, monkeypatch, tmp_path, capsys, text
):
    original = Trainer.train_step
    monkeypatch.setattr(
        Trainer, "train_step", lambda self: original(self) if self.totals.step < 3 else torch.empty(10**15)
    )
    monkeypatch.chdir(tmp_path)
    assert train.main([*TINY, "--data", str(text), "--output", "run", *QUIET]) == 1
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error"))
    assert "can't allocate memory" in line and line.endswith(": lower --batch_size, --chunk_size or --params")
    assert newest(tmp_path / "run")["step"] == 3


def test_a_non_finite_gradient_is_not_applied_and_is_logged(run_train, trainers, monkeypatch, tmp_path):
    original = Trainer.train_step
    seen = {}

    def poisoned(self):
        if self.totals.step == 5 and not seen:
            hook = self.model.token_emb.weight.register_hook(lambda grad: grad * math.nan)
            before = {name: tensor.clone() for name, tensor in self.weights.tensors().items()}
            seen["finite"] = original(self)
            hook.remove()
            seen["same"] = all(torch.equal(tensor, before[name]) for name, tensor in self.weights.tensors().items())
            return seen["finite"]
        return original(self)

    monkeypatch.setattr(Trainer, "train_step", poisoned)
    run_dir = run_train("run", "--train_steps", "10", *QUIET)
    assert seen == {"finite": False, "same": True}
    assert newest(run_dir)["step"] == 10
    assert "\tnon_finite\t" in (tmp_path / "gossip_logs" / "run_rank_0000.tsv").read_text()
    assert "not finite" in (tmp_path / "logs" / "train_run_rank_0000.log").read_text()


@pytest.mark.parametrize("saved", [True, False], ids=["to-its-checkpoint", "to-the-initial-weights"])
def test_several_non_finite_losses_in_a_row_return_to_the_last_good_state(run_train, monkeypatch, tmp_path, saved):
    original = Trainer.train_step
    poisoned = []

    def poison(self):
        if self.totals.step == 20 and not poisoned:
            poisoned.append(self)
            for tensor in self.weights.tensors().values():
                tensor.fill_(math.nan)
        return original(self)

    monkeypatch.setattr(Trainer, "train_step", poison)
    flags = ["--no_fitness_weighted_checkpointing", "--save_every", "16" if saved else "1000", "--val_every", "0"]
    run_dir = run_train("run", "--train_steps", "25", *flags)
    log = (tmp_path / "logs" / "train_run_rank_0000.log").read_text()
    source = "checkpoint_rank_0000_step_000016" if saved else "the initial weights"
    assert f"returned: to {source}" in log
    assert log.count("not applied") == 3
    for tensor in newest(run_dir)["training"]["tensors"].values():
        assert bool(torch.isfinite(tensor).all())


@pytest.mark.injects(Injection.DISK_ERROR)
@pytest.mark.parametrize("hidden", ["the run directory", "the checkpoint", "what it began from"])
def test_a_return_that_the_disk_prevents_ends_the_rank_and_begins_nothing_anew(
    run_train, monkeypatch, tmp_path, capsys, hidden
):
    original, adopted = Trainer.train_step, []
    run, away = tmp_path / "run", tmp_path / "away"

    def poison(self):
        if self.totals.step == 20 and not away.exists():
            self.saving.finish()
            self.weights.tensors()["y.token_emb.weight"].fill_(math.nan)
            place = run if hidden == "the run directory" else list_checkpoints(run)[-1].path
            place.rename(away)
            if hidden == "the checkpoint":
                place.mkdir()
            if hidden == "what it began from":
                list_checkpoints(run)[0].path.unlink()
                (tmp_path / "first").rename(tmp_path / "gone")
        return original(self)

    monkeypatch.setattr(optimizer.ScheduleFreeWeights, "adopt", lambda *given: adopted.append(given))
    monkeypatch.setattr(Trainer, "train_step", poison)
    flags = ["--no_fitness_weighted_checkpointing", "--save_every", "16", "--val_every", "0"]
    if hidden == "what it began from":
        run_train("first", "--train_steps", "1", *flags)
        flags += ["--init_from", "first"]
    with pytest.raises(AssertionError):  # a status that is not 0
        run_train("run", "--train_steps", "25", *flags)
    assert "error: rank 0: loss is not finite, and " in capsys.readouterr().err and not adopted


def test_losses_that_stay_non_finite_end_the_rank_with_an_error(run_train, monkeypatch, capsys):
    def poison(self):
        return False

    monkeypatch.setattr(Trainer, "train_step", poison)
    with pytest.raises(AssertionError, match="assert 1 == 0"):  # the fixture's: the status was 1
        run_train("run", "--train_steps", "5", *QUIET)
    assert "error: rank 0: losses stay non-finite" in capsys.readouterr().err


@pytest.mark.injects(Injection.DISK_FULL)
def test_a_full_disk_at_a_save_is_logged_and_training_goes_on(text, tmp_path):
    # A limit on the size of files fails the checkpoint (about 200 kB), in the middle of its writing, and nothing else.
    root = Path(__file__).parents[1]
    script = (
        "import resource, sys; sys.argv[0] = 'train.py'; import train\n"
        "from training.saving import Saving\n"
        "original = Saving.begin\n"
        "def begin(self, *arguments):\n"
        "    limit = 50_000 if self._trainer.totals.step == 32 else resource.RLIM_INFINITY\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))\n"
        "    original(self, *arguments)\n"
        "Saving.begin = begin\n"
        "sys.exit(train.main(sys.argv[1:]))\n"
    )
    flags = ["--data", str(text), "--output", "run", "--dim", "16", "--depth", "2", "--batch_size", "2", "--cpu",
             "--chunk_size", "32", "--train_steps", "40", "--save_every", "16", "--no_fitness_weighted_checkpointing",
             "--val_every", "0", "--keep_checkpoints", "9"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-c", script, *flags], cwd=tmp_path, env=environment, check=True, timeout=120)
    run_dir = tmp_path / "run"
    assert [file.step for file in list_checkpoints(run_dir)] == [16, 40]
    assert newest(run_dir)["step"] == 40
    events = (tmp_path / "gossip_logs" / "run_rank_0000.tsv").read_text()
    assert "save_failed" in events and "File too large" in events
    assert not list(run_dir.glob(".*.tmp"))


@pytest.mark.parametrize(
    ("number", "stops"), [(signal.SIGUSR1, False), (signal.SIGTERM, True), (signal.SIGINT, True)], ids=lambda v: str(v)
)
def test_signals_save_and_stop_or_go_on(run_train, monkeypatch, tmp_path, number, stops):
    original = Trainer.train_step

    def step(self):
        if self.totals.step == 7:
            os.kill(os.getpid(), number)
        return original(self)

    monkeypatch.setattr(Trainer, "train_step", step)
    run_dir = run_train("run", "--train_steps", "20", "--keep_checkpoints", "9", *QUIET)
    assert [file.step for file in list_checkpoints(run_dir)] == ([8] if stops else [8, 20])
    log = (tmp_path / "logs" / "train_run_rank_0000.log").read_text()
    assert ("stopped by a signal" in log) == stops


def test_a_clone_brings_the_counters_and_a_reset_restarts_the_optimizer(run_train, trainers):
    run_train("run", "--train_steps", "20", *QUIET)
    (trainer,) = trainers
    assert trainer.parts.fitness.value is not None
    counters = trainer.weights.scalars()
    trainer.weights_replaced(None, 3, judged=False)
    assert trainer.weights.scalars() == counters
    assert trainer.parts.fitness.value is None  # what was measured described other weights
    trainer.weights_replaced({**counters, "k": 7.0}, 3, judged=False)
    assert trainer.weights.scalars()["k"] == 7
    trainer.options.population.gossip_optimizer_recombination = "reset"
    x = trainer.weights.averaged()
    trainer.weights_replaced(None, 3, judged=False)
    assert trainer.weights.scalars()["k"] == 0
    for name, tensor in trainer.weights.tensors().items():
        kind, parameter = name.split(".", 1)
        assert torch.equal(tensor, torch.zeros_like(tensor) if kind == "v" else x[parameter])


def test_weights_that_are_not_finite_are_never_saved(run_train, trainers, tmp_path):
    run_dir = run_train("run", "--train_steps", "5", *QUIET)
    (trainer,) = trainers
    trainer.parts.log = RunLog(tmp_path / "after.log", echo=False)
    before = sorted(run_dir.glob("*.pt"))
    trainer.weights.tensors()["y.token_emb.weight"][3, 3] = math.nan
    trainer.totals.step += 1
    trainer.saving.begin()
    trainer.saving.finish()
    assert sorted(run_dir.glob("*.pt")) == before
    assert "not finite" in (tmp_path / "gossip_logs" / "run_rank_0000.tsv").read_text()


def test_an_error_of_a_gossip_thread_saves_before_it_ends_the_rank(run_train, monkeypatch, tmp_path):
    def broken(self, *_):
        if self._desk.published.step == 6:
            raise ZeroDivisionError
        return original(self, *_)

    original = train.EvolutionaryNode.step_boundary
    monkeypatch.setattr(train.EvolutionaryNode, "step_boundary", broken)
    with pytest.raises(ZeroDivisionError):
        run_train("run", "--train_steps", "20", *QUIET)
    assert newest(tmp_path / "run")["step"] == 7


def test_a_rank_whose_place_was_taken_saves_nothing_and_says_so_in_one_line(text, tmp_path):
    script = (
        "import train; from gossip.filesystem_coordinator import RankReplaced; from runtime.arguments import run_main\n"
        "original = train.EvolutionaryNode.step_boundary\n"
        "def boundary(self, step, *rest):\n"
        "    if step == 6:\n"
        "        raise RankReplaced('expected rank 0 to be this process alone, got another: end one of them')\n"
        "    return original(self, step, *rest)\n"
        "train.EvolutionaryNode.step_boundary = boundary\n"
        "run_main(train.main)\n"
    )
    flags = ["--data", str(text), "--output", "run", *TINY, "--train_steps", "20", *QUIET]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", script, *flags], cwd=tmp_path, env=environment, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == RankReplaced.status == REPLACED
    assert [line for line in done.stderr.splitlines() if line.startswith("error: expected rank 0")]
    assert "Traceback" not in done.stderr
    assert list_checkpoints(tmp_path / "run") == []


def test_steps_and_merges_count_what_lies_behind_the_weights(run_train, trainers):
    run_dir = run_train("run", "--train_steps", "20", *QUIET)
    (trainer,) = trainers
    assert newest(run_dir)["training"]["totals"]["lineage"] == 20
    assert [row["lineage"] for row in metrics_rows(run_dir)] == ["5", "10", "15", "20"]
    trainer.weights_replaced(None, 12, judged=False)
    assert trainer.totals.lineage == 20  # a younger peer's add nothing
    trainer.weights_replaced(None, 500, judged=False)
    assert trainer.totals.lineage == 500
    trainer.train_step()
    assert trainer.totals.lineage == 501


def test_who_calls_before_the_first_step_is_told_what_lies_behind_the_weights(run_train, monkeypatch):
    told, start = [], EvolutionaryNode.start

    def seen(node):
        told.append((node._desk.published.step, node._desk.published.lineage))
        start(node)

    monkeypatch.setattr(EvolutionaryNode, "start", seen)
    run_train("run", "--train_steps", "20", *QUIET)
    assert train.main(["--resume", "run", "--train_steps", "21"]) == 0
    assert told == [(0, 0), (20, 20)]


def test_a_return_to_an_older_state_has_that_states_lineage(run_train, trainers):
    run_train("run", "--train_steps", "20", *QUIET)
    (trainer,) = trainers
    trainer.totals.lineage = 900
    trainer.event = lambda *_: None
    recovery = Recovery(trainer)
    for _ in range(3):
        recovery.bad_step()
    assert trainer.totals.lineage == 20


def test_every_write_of_the_weights_waits_for_a_snapshot_in_flight(run_train, trainers, monkeypatch):
    order = []
    monkeypatch.setattr(train.EvolutionaryNode, "before_write", lambda self: order.append("wait"))
    step = optimizer.ScheduleFreeWeights.step
    monkeypatch.setattr(optimizer.ScheduleFreeWeights, "step", lambda self: (order.append("write"), step(self)))
    run_train("run", "--train_steps", "3", *QUIET)
    assert order == ["wait", "write"] * 3


def test_training_outlives_its_standard_error(text, tmp_path):
    root = Path(__file__).parents[1]
    reader, writer = os.pipe()
    os.close(reader)  # whoever listened is gone
    flags = ["--data", str(text), "--output", "run", *TINY, "--train_steps", "30", "--log_every", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(root / "train.py"), *flags], cwd=tmp_path, env=environment, stderr=writer, timeout=120
    )
    os.close(writer)
    assert done.returncode == 0
    assert newest(tmp_path / "run")["step"] == 30


def test_metrics_count_what_was_trained(run_train):
    run_dir = run_train("run", "--train_steps", "10", "--grad_accum", "3", *QUIET)
    rows = metrics_rows(run_dir)
    assert [int(row["bytes_seen"]) for row in rows] == [5 * 3 * 64, 10 * 3 * 64]
    assert 0 < int(rows[-1]["documents"]) < 60
    assert all(float(row["bytes_per_s"]) > 0 and float(row["grad_norm"]) > 0 for row in rows)
    assert float(rows[0]["loss"]) == pytest.approx(math.log(256), rel=0.2)


def test_each_further_return_tries_an_older_checkpoint(run_train, trainers, tmp_path):
    flags = ["--no_fitness_weighted_checkpointing", "--save_every", "16", "--keep_checkpoints", "9", "--val_every", "0"]
    run_train("run", "--train_steps", "48", *flags)
    (trainer,) = trainers
    trainer.parts.log = RunLog(tmp_path / "after.log", echo=False)
    recovery = Recovery(trainer)
    for _ in range(5 * 3):
        recovery.bad_step()
    with pytest.raises(TrainingDiverged):
        for _ in range(3):
            recovery.bad_step()
    returns = [line for line in (tmp_path / "after.log").read_text().splitlines() if "returned" in line]
    assert [line.split("_step_")[1][:6] for line in returns] == ["000048", "000032", "000016", "000016", "000016"]


def test_the_last_sign_of_life_and_the_last_checkpoint_speak_of_the_last_weights(
    run_train, trainers, monkeypatch, tmp_path
):
    """A merge at the last step replaced them, and nobody has measured them yet."""
    meet = Trainer._meet_population

    def met(self):
        meet(self)
        if self.totals.step == 7:
            self.weights.adopt(self.weights.averaged())
            self.parts.fitness.replaced(judged=False)

    monkeypatch.setattr(Trainer, "_meet_population", met)
    run_train("run", "--train_steps", "7", *QUIET)
    (trainer,) = trainers
    entry = json.loads((tmp_path / "run" / "population" / "rank_0000.json").read_text())
    assert entry["step"] == 7 and entry["fitness"] == trainer.parts.fitness.value_now is not None
    assert newest(tmp_path / "run")["loss"] == entry["fitness"]


def test_a_last_measurement_that_fails_costs_no_last_save(run_train, monkeypatch, tmp_path):
    def failing(self):
        raise MemoryError("none left")

    monkeypatch.setattr(Fitness, "measure_aside", failing)
    with pytest.raises(AssertionError):  # its status is 1
        run_train("run", "--train_steps", "7", *QUIET)
    assert newest(tmp_path / "run")["step"] == 7
