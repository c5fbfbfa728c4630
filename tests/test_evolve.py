"""A training run whose hyperparameters evolve, and one that sends its weights alone."""

import pytest

import train
from gossip.intake import MergeReport
from runtime.errors import UserError
from tests.test_loop import trainers  # noqa: F401 (a fixture)
from tests.test_resume import QUIET, metrics_rows, newest

EVOLVE = ("--evolve", "lr,weight_decay", "--evolve_spread", "3", "--warmup_steps", "0")


def merged(trainer, monkeypatch, both, scalars, genes):
    """Let the next step boundary have merged a peer's weights."""
    report = MergeReport(9, scalars, genes, both, clonal=not both, distance=0.1, judged=False)
    monkeypatch.setattr(trainer.parts.node, "step_boundary", lambda *args: report)
    trainer._meet_population()


def test_a_rank_trains_with_the_hyperparameters_it_drew(run_train, trainers):  # noqa: F811
    run_dir = run_train("run", "--train_steps", "5", "--lr", "1e-2", *EVOLVE, *QUIET)
    (trainer,) = trainers
    values = trainer.parts.heredity.values
    assert values.keys() == {"lr", "weight_decay"} and values["lr"] != 1e-2
    assert trainer.weights.lr == pytest.approx(values["lr"])
    row = metrics_rows(run_dir)[-1]
    assert float(row["base_lr"]) == pytest.approx(values["lr"], rel=1e-4)
    assert float(row["weight_decay"]) == pytest.approx(values["weight_decay"], rel=1e-4) and row["grad_clip"] == "1"


def test_a_loser_inherits_and_an_average_does_not(run_train, trainers, monkeypatch, tmp_path):  # noqa: F811
    run_train("run", "--train_steps", "5", "--mutation_scale", "0", *EVOLVE, *QUIET)
    (trainer,) = trainers
    monkeypatch.setattr(trainer, "line", lambda text: None)
    own, genes = dict(trainer.parts.heredity.values), {"lr": 5e-3, "weight_decay": 0.02}
    merged(trainer, monkeypatch, True, trainer.weights.scalars(), genes)
    assert trainer.parts.heredity.values == own
    merged(trainer, monkeypatch, False, trainer.weights.scalars(), genes)
    assert trainer.parts.heredity.values == genes
    groups = trainer.weights._optimizer.param_groups
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(5e-3, 0.02), (5e-3, 0.0)]


def test_hyperparameters_go_on_from_a_checkpoint(run_train, trainers):  # noqa: F811
    run_dir = run_train("run", "--train_steps", "5", *EVOLVE, *QUIET)
    stored = newest(run_dir)["training"]["genes"]
    assert stored == trainers[0].parts.heredity.values
    trainers[0].parts.heredity.values["lr"] = 0.5
    train.main(["--resume", "run", "--train_steps", "6"])
    assert trainers[1].parts.heredity.values == stored


@pytest.mark.parametrize(("payload", "k"), [("full", 7.0), ("weights", 5.0)], ids=["with second moments", "without"])
def test_second_moments_keep_their_counter(run_train, trainers, monkeypatch, payload, k):  # noqa: F811
    run_train("run", "--train_steps", "5", "--gossip_payload", payload, *QUIET)
    (trainer,) = trainers
    monkeypatch.setattr(trainer, "line", lambda text: None)
    travelling = {name[0] for name in trainer.parts.node._live}
    assert travelling == ({"y", "z", "v"} if payload == "full" else {"y", "z"})
    merged(trainer, monkeypatch, False, {**trainer.weights.scalars(), "k": 7.0, "weight_sum": 3.0}, {})
    scalars = trainer.weights.scalars()
    assert scalars["k"] == k and scalars["weight_sum"] == 3.0


def test_what_cannot_evolve_is_a_users_error(run_train):
    with pytest.raises(UserError, match="expected --evolve of lr,weight_decay,grad_clip, got 'dim'"):
        run_train("run", "--train_steps", "5", "--evolve", "dim", *QUIET)
