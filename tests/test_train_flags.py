"""Each flag of train.py that the other tests do not show at work, and each mistake that it refuses."""

import contextlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from gossip.decision import Policy
from gossip.filesystem_coordinator import Member, Roster
from runtime.errors import UserError
from tests.conftest import TINY
from tests.test_resume import QUIET, metrics_rows, newest
from training import loop
from training.checkpoint import list_checkpoints, read_for_use
from training.metrics import RunLog
from training.population import Standing, is_among_worst, save_chance, standing_of
from training.run_directory import RunDirectory


def config(run_dir) -> dict:
    return json.loads((run_dir / "config.json").read_text())


def test_config_json_holds_what_is_needed_to_repeat_the_run(run_train):
    stored = config(run_train("run", "--train_steps", "1", "--lr", "0.125", *QUIET))
    assert stored["options"]["optimizer"]["lr"] == 0.125
    assert stored["model"]["dim"] == 16
    assert stored["parameters"] == sum(t.numel() for t in newest(Path("run"))["model_state_dict"].values())
    assert {"git", "versions", "host", "device", "fitness", "command", "world_size", "run"} <= stored.keys()


def test_params_builds_a_model_of_that_size(text, run_train, tmp_path):
    flags = [*TINY[6:], "--data", str(text), "--output", "run", "--train_steps", "1", "--params", "1m", *QUIET]
    assert train.main(flags) == 0
    assert config(tmp_path / "run")["parameters"] == pytest.approx(1024**2, rel=0.01)


@pytest.mark.parametrize(
    ("flags", "check"),
    [
        (
            ["--expansion_factor", "3"],
            lambda w: w["token_emb.weight"].shape[1] * 3 in _widths(w, "to_hidden_and_gate", 2),
        ),
        (["--ff_mult", "0"], lambda w: not any(t.shape == (64, 16) for t in w.values())),
        (["--ff_mult", "2"], lambda w: any(t.shape == (32, 16) for t in w.values())),
        ([], lambda w: w["layers.0.conv.taps"].shape == (4, 16)),
        (["--no_enable_conv"], lambda w: not any(".conv." in name for name in w)),
        (["--depth", "3"], lambda w: sum("to_hidden_and_gate" in name for name in w) == 3),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_model_flags_shape_the_weights(run_train, flags, check):
    assert check(newest(run_train("run", "--train_steps", "1", *QUIET, *flags))["model_state_dict"])


def _widths(weights: dict, name: str, parts: int) -> set[int]:
    return {tensor.shape[0] // parts for key, tensor in weights.items() if name in key}


def test_dropout_changes_training_and_not_validation(run_train):
    flags = ["--train_steps", "5", "--lr", "1e-30", "--val_every", "5", "--log_every", "5", "--save_every", "99"]
    (plain,) = metrics_rows(run_train("plain", *flags))
    (dropped,) = metrics_rows(run_train("dropped", "--dropout", "0.5", *flags))
    assert plain["loss"] != dropped["loss"]
    assert plain["val_loss"] == dropped["val_loss"]


def test_grad_clip_bounds_the_gradient_that_is_applied(run_train):
    for clip in (0.0, 0.125):
        flags = ["--train_steps", "1", "--grad_clip", str(clip), "--log_every", "1", "--sf_beta2", "0.5"]
        run_dir = run_train(f"clip_{clip}", *flags)
        tensors = newest(run_dir)["training"]["tensors"]
        second_moments = sum(tensor.double().sum() for name, tensor in tensors.items() if name.startswith("v."))
        norm = float(metrics_rows(run_dir)[0]["grad_norm"])
        assert norm > 0.2
        assert float(second_moments / 0.5) ** 0.5 == pytest.approx(clip or norm, rel=1e-3)


def test_sf_beta_sets_the_distance_of_y_from_z(run_train):
    run_dir = run_train("run", "--train_steps", "9", "--sf_beta", "0.75", *QUIET)
    content = newest(run_dir)
    tensors = content["training"]["tensors"]
    for name, x in content["model_state_dict"].items():
        torch.testing.assert_close(tensors[f"y.{name}"], 0.75 * x + 0.25 * tensors[f"z.{name}"])


def test_val_data_replaces_the_tail_of_the_data(run_train, tmp_path):
    other = tmp_path / "other.txt"
    other.write_bytes(bytes(range(128, 250)) * 20)
    flags = ["--train_steps", "40", "--lr", "0.02", "--warmup_steps", "0", "--val_every", "40", "--log_every", "40"]
    (tail,) = metrics_rows(run_train("tail", *flags))
    (strange,) = metrics_rows(run_train("strange", "--val_data", str(other), *flags))
    assert float(strange["val_loss"]) > float(tail["val_loss"]) + 0.5  # it was never trained on such bytes
    (none,) = metrics_rows(run_train("none", "--val_fraction", "0", *flags))
    assert none["val_loss"] == "NA"


@pytest.mark.parametrize(
    ("flags", "sizes", "probed"),
    [
        (["--val_fraction", "0.5"], (0.5, 0.375), ""),
        (["--val_fraction", "0.05"], (0.95, 0.05), " of the training bytes' end: fewer than 8,196 are held out"),
        (["--val_fraction", "0"], (1, 0), " of the training bytes' end: fewer than 8,196 are held out"),
        (["--val_data", "other.txt"], (1, 0.75), ""),
    ],
    ids=["half", "few", "none", "other data"],
)
def test_the_log_tells_how_much_is_held_out_and_what_the_probe_is_of(run_train, text, tmp_path, flags, sizes, probed):
    (tmp_path / "other.txt").write_bytes(text.read_bytes())
    run_train("run", "--train_steps", "1", *flags, *QUIET)
    log = (tmp_path / "logs" / "train_run_rank_0000.log").read_text()
    told = re.search(r"; ([\d,]+) bytes to train on, ([\d,]+) to validate on$", log, re.MULTILINE).groups()
    size = text.stat().st_size
    assert [int(number.replace(",", "")) / size for number in told] == pytest.approx(sizes, abs=0.03)
    assert re.search(rf"probe: \d+ windows of 256 bytes{probed}, about", log)


def test_document_delimiter_sets_where_documents_end(run_train):
    flags = ["--train_steps", "10", "--log_every", "10"]
    spaces = metrics_rows(run_train("spaces", "--document_delimiter", "20", *flags))
    unbroken = metrics_rows(run_train("unbroken", "--document_delimiter", "none", *flags))
    assert int(spaces[0]["documents"]) > 60
    delimiters = [read_for_use(Path(name))[2]["document_delimiter"] for name in ("spaces", "unbroken")]
    assert delimiters == [0x20, None]  # generate.py goes by it
    assert int(unbroken[0]["documents"]) == 0


def test_save_every_and_keep_checkpoints_without_weighting_are_exact(run_train):
    flags = ["--no_fitness_weighted_checkpointing", "--save_every", "16", "--val_every", "0", "--train_steps", "70"]
    steps = [file.step for file in list_checkpoints(run_train("all", "--keep_checkpoints", "9", *flags))]
    assert steps == [16, 32, 48, 64, 70]
    run_dir = run_train("few", "--keep_checkpoints", "1", "--keep_elite", "1", *flags)
    assert len(list_checkpoints(run_dir)) <= 2
    assert sorted(path.name for path in run_dir.glob("elite_*")) == ["elite_01.pt"]
    run_dir = run_train("archived", "--keep_checkpoints", "1", "--keep_elite", "0", "--archive_rate", "1", *flags)
    assert len(list(run_dir.glob("archive_*.pt"))) == 4


def test_disk_use_is_said_at_the_start_and_holds_at_every_step(run_train, monkeypatch, tmp_path):
    taken, step = [], loop.Trainer.train_step

    def measured(self) -> bool:
        taken.append(0)
        for path in Path("run").glob("*checkpoint_rank_*"):
            with contextlib.suppress(FileNotFoundError):  # just retired, beside the training
                taken[-1] += path.lstat().st_size
        return step(self)

    monkeypatch.setattr(loop.Trainer, "train_step", measured)
    flags = ["--no_fitness_weighted_checkpointing", "--save_every", "1", "--keep_elite", "3", "--val_every", "0"]
    run_train("run", "--train_steps", "60", "--gossip_fitness_decay", "0.1", "--dim", "128", *flags)
    log = (tmp_path / "logs" / "train_run_rank_0000.log").read_text()
    each, most = re.search(r"checkpoints: ([\d.]+) MB each, at most ([\d.]+) MB for 1 rank", log).groups()
    assert float(most) == pytest.approx((2 + 3 + 1) * float(each), abs=0.3)
    assert 2.5 * float(each) < max(taken) / 1e6 <= float(most)


def test_save_every_with_weighting_is_a_mean_distance(run_train):
    run_dir = run_train(
        "run", "--train_steps", "300", "--save_every", "10", "--keep_checkpoints", "999", "--val_every", "0"
    )  # fmt: skip
    count = len(list_checkpoints(run_dir))
    assert 15 < count < 48  # 30 expected, standard deviation 5


def test_val_every_and_log_every_set_the_rows(run_train):
    flags = ["--train_steps", "14", "--log_every", "4", "--val_every", "6", "--save_every", "99"]
    rows = metrics_rows(run_train("run", *flags))
    assert [row["step"] for row in rows] == ["4", "6", "8", "12"]
    assert [row["val_loss"] != "NA" for row in rows] == [False, True, False, True]


def test_max_minutes_ends_a_run_that_has_no_last_step(run_train):
    run_dir = run_train("run", "--max_minutes", "0.01", *QUIET)
    assert newest(run_dir)["step"] > 0


def test_output_defaults_to_a_dated_folder_for_one_rank_alone(run_train, tmp_path, monkeypatch):
    run_train(None, "--train_steps", "1", *QUIET)
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert (run_dir / "latest.pt").exists()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--output"):
        run_train(None, "--train_steps", "1")


@pytest.mark.parametrize("name", ["GRUBOROS_LAUNCHER", "SLURM_RESTART_COUNT"])
def test_a_rank_that_may_be_started_again_has_an_output(text, tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(name, "1")
    said = "expected --output for a rank that may be started again, got none"
    try:
        assert train.main([*TINY, "--data", str(text), "--train_steps", "1"]) == 1  # of a restarted rank
        assert said in capsys.readouterr().err
    except UserError as error:
        assert said in str(error) and name == "GRUBOROS_LAUNCHER"
    assert not (tmp_path / "runs").exists()


def test_gossip_host_and_port_are_where_it_listens(run_train):
    run_dir = run_train("run", "--train_steps", "1", "--gossip_host", "127.0.0.2", "--gossip_port", "21123", *QUIET)
    record = json.loads((run_dir / "population" / "rank_0000.json").read_text())
    assert record["address"] == "127.0.0.2:21123"


def test_no_filesystem_coordinator_keeps_no_registry(run_train):
    run_dir = run_train("run", "--train_steps", "20", "--no-filesystem-coordinator", *QUIET)
    assert not list((run_dir / "population").glob("rank_*.json"))
    assert (run_dir / "best.pt").exists() and (run_dir / "latest.pt").exists()


MISTAKES = {
    "no data": (["--data"], "--data"),
    "data of a variable that is not set": (["--data", ""], "--data: expected a path, got an empty one"),
    "held-out data among the others": (["--val_data", "TEXT"], r"apart from --data, got \S+/text\.txt in both"),
    "absent data": (["--data", "absent.txt"], "absent.txt"),
    "empty data": (["--data", "empty.txt"], "empty"),
    "short data": (["--data", "short.txt", "--val_fraction", "0"], "at least 33 bytes"),
    "unknown suffix": (["--params", "12q"], "expected a size"),
    "two devices": (["--cuda"], "one device"),
    "alpha": (["--gossip_recombination_alpha", "1.5"], r"\[0, 1\]"),
    "a model too large": (["--params", "900g"], "GiB"),
    "a width that is no size": (["--dim", "0"], "expected a size"),
    "an impossible size": (["--params", "3"], "params"),
    "corrupt init_from": (["--init_from", "short.txt"], r"whole checkpoint, got \S+/short\.txt \(none, or cut\)"),
    "liveness below heartbeat": (["--gossip_liveness", "1", "--gossip_heartbeat", "2"], "liveness"),
    "bad peer": (["--gossip_peers", "nowhere"], "host"),
    "a huge seed": (["--seed", "9" * 30], "at most"),
    "one byte to validate on": (["--val_bytes", "1"], "at least 2 bytes"),
    "bad host": (["--gossip_host", "no.such.host.invalid"], "host"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_no_run_behind(run_train, tmp_path, text, mistake):
    flags, message = MISTAKES[mistake]
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("x" * 31)
    base = TINY[6:] if "--params" in flags else TINY  # without --dim and --depth
    data = [] if "--data" in flags else ["--data", str(text)]
    flags = [str(text) if flag == "TEXT" else flag for flag in flags]
    with pytest.raises(UserError, match=message) as caught:
        train.main([*base, *data, "--output", "run", *flags])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_cuda_without_cuda_is_refused(run_train, tmp_path, text):
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    base = [flag for flag in TINY if flag != "--cpu"]
    for flag in ("--cuda", "--rocm"):
        with pytest.raises(UserError, match=flag):
            train.main([*base, "--data", str(text), "--output", "run", flag])


def test_an_output_that_already_holds_a_run_is_refused(run_train):
    run_dir = run_train("run", "--train_steps", "1", *QUIET)
    before = sorted(run_dir.rglob("*"))
    with pytest.raises(UserError, match="--resume"):
        run_train("run", "--train_steps", "1", *QUIET)
    assert sorted(run_dir.rglob("*")) == before


def test_an_output_with_another_programs_config_is_refused(run_train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"with a config\.json of something else"):
        run_train("run", "--train_steps", "1", *QUIET)


def test_a_run_that_would_write_a_living_ones_log_is_refused(run_train, tmp_path):
    log = RunLog(tmp_path / "logs" / "train_run_rank_0000.log", echo=False)
    log.line("of one/run")
    with pytest.raises(UserError, match=r"expected logs/train_run_rank_0000\.log to be free, got a living run of this"):
        run_train("two/run", "--train_steps", "1", *QUIET)
    assert not (tmp_path / "two").exists() and len(list((tmp_path / "logs").iterdir())) == 1
    log.close()
    run_train("two/run", "--train_steps", "1", *QUIET)


def test_an_output_that_cannot_be_written_is_refused(run_train, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--output"):
        run_train("file/run", "--train_steps", "1", *QUIET)


@pytest.mark.parametrize(
    ("name", "value"), [("GRUBOROS_SCAN", "quantum"), ("GRUBOROS_SCAN", "logspace"), ("GRUBOROS_SECRET", "short")]
)
def test_a_mistake_in_the_environment_leaves_no_run_behind(run_train, tmp_path, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=name):
        run_train("run", "--train_steps", "1")
    assert not (tmp_path / "run").exists()


def test_ranks_that_could_never_meet_are_refused(run_train, monkeypatch):
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match="--gossip_peers"):
        run_train("run", "--no_filesystem_coordinator")


@pytest.mark.parametrize(
    "flag, beside",
    [
        ("--rejuvenation_probability", ["--no_filesystem_coordinator"]),
        ("--rejuvenation_threshold", ["--no_filesystem_coordinator"]),
        ("--elite_checkpoint_multiplier", ["--no_filesystem_coordinator"]),
        ("--elite_checkpoint_multiplier", ["--no_fitness_weighted_checkpointing"]),
        ("--gossip_significance", ["--gossip_fitness", "ema"]),
        ("--gossip_least_effect", ["--gossip_merge_method", "average"]),
        ("--gossip_recombination_alpha", ["--gossip_merge_method", "average"]),
        ("--gossip_recombination_alpha", ["--gossip_merge_method", "clonal"]),
        ("--mutation_scale", []),
    ],
)
def test_a_flag_that_would_do_nothing_is_refused(run_train, tmp_path, flag, beside):
    why = f"beside {' '.join(beside)}" if beside else "without --evolve"
    said = f"expected no {flag} {why}.*, got 1.0: leave it out"
    with pytest.raises(UserError, match=said):
        run_train("run", "--train_steps", "1", *beside, flag, "1", *QUIET)
    assert not (tmp_path / "run").exists()
    run_train("run", "--train_steps", "1", *beside, *QUIET)
    with pytest.raises(UserError, match=said):  # the run goes on as it was begun
        train.main(["--resume", "run", "--train_steps", "2", flag, "1"])


def test_from_the_shell_a_mistake_prints_one_line_and_exits_2(tmp_path):
    command = [sys.executable, str(Path(train.__file__)), "--data", "absent.txt"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: expected") and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_running_cannot_be_resumed_beside_itself(run_train):
    run_dir = run_train("run", "--train_steps", "2", *QUIET)
    with RunDirectory(run_dir, 0).lock():
        with pytest.raises(UserError, match="running it"):
            train.main(["--resume", "run", "--train_steps", "4"])
    train.main(["--resume", "run", "--train_steps", "4"])
    assert newest(run_dir)["step"] == 4


def test_val_bytes_bounds_what_a_validation_reads(run_train, monkeypatch):
    read = []
    original = loop.validation_chunks

    def counted(*arguments):
        for chunk in original(*arguments):
            read.append(chunk.reset_BT.size)
            yield chunk

    monkeypatch.setattr(loop, "validation_chunks", counted)
    run_train("run", "--train_steps", "2", "--val_every", "2", "--val_bytes", "101", "--save_every", "99")
    assert sum(read) == 100


def test_elite_checkpoint_multiplier_and_rejuvenation_threshold_follow_the_ranking():
    ranking = [Standing(place, 5) for place in range(5)]
    chances = [save_chance(standing, 100, 4.0) for standing in ranking]
    assert chances[0] / chances[4] == pytest.approx(4)
    assert chances[0] - chances[1] == pytest.approx(chances[3] - chances[4])  # linear
    assert sum(chances) / 5 == pytest.approx(1 / 100)  # --save_every is the population's mean distance
    assert save_chance(None, 100, 4.0) == 1 / 100
    for threshold, worst in ((0.0, []), (0.1, [4]), (0.4, [3, 4]), (0.5, [3, 4]), (1.0, [1, 2, 3, 4])):
        assert [s.place for s in ranking if is_among_worst(s, threshold)] == worst, threshold
    assert not is_among_worst(None, 1.0)


def test_standing_of_is_none_without_a_ranking():
    def member(rank, standing):
        return Member(rank, "0" * 32, 1, "running", True, "127.0.0.1:1", 1, 1.0, standing, {})

    assert standing_of(None, 0) is None
    assert standing_of(Roster(0, (member(0, 0.0),)), 0) is None
    roster = Roster(0, (member(0, 1.0), member(1, None), member(2, 0.0), member(3, 0.5)))
    assert [standing_of(roster, rank) for rank in range(5)] == [
        Standing(2, 3), None, Standing(0, 3), Standing(1, 3), None,
    ]  # fmt: skip


def test_memory_is_gathered_once_before_the_first_step(run_train, monkeypatch):
    done = []
    step = loop.Trainer.train_step
    monkeypatch.setattr(train, "gather_in_huge_pages", lambda: done.append("gathered"))
    monkeypatch.setattr(loop.Trainer, "train_step", lambda trainer: done.append("step") or step(trainer))
    run_train("run", "--train_steps", "2", *QUIET)
    assert done == ["gathered", "step", "step"]


def test_second_moments_do_not_travel_as_remainders(run_train):
    with pytest.raises(UserError, match=r"--gossip_payload weights beside --gossip_wire_dtype int4.*got full"):
        run_train("run", "--train_steps", "1", "--gossip_wire_dtype", "int4", "--gossip_payload", "full", *QUIET)


def as_flags(values):
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]


def test_gossip_flags_reach_the_node(run_train, monkeypatch):
    seen = {}

    class Node(train.EvolutionaryNode):
        def __init__(self, **parts):
            seen.update(parts)
            super().__init__(**parts)

    monkeypatch.setattr(train, "EvolutionaryNode", Node)
    flags = {
        "gossip_mixing_rate": 0.25, "gossip_recombination_alpha": 0.125, "gossip_timeout": 7.0, "gossip_tie": "none",
        "gossip_significance": 0.125, "gossip_least_effect": 0.25, "gossip_heartbeat": 0.5, "gossip_liveness": 3.0,
        "gossip_wire_dtype": "fp32",
    }  # fmt: skip
    run_train("run", "--train_steps", "1", *as_flags(flags), *QUIET)
    config = seen["config"]
    assert (config.mixing_rate, config.recombination_alpha, config.policy) == (
        0.25, 0.125, Policy("recombination", "probe", "none", 0.125, 0.25),
    )  # fmt: skip
    assert config.wire_dtype == "fp32"
    assert (config.exchange_seconds, config.heartbeat_seconds, config.liveness_seconds) == (7.0, 0.5, 3.0)
    run_train("other", "--train_steps", "1", "--gossip_fitness", "ema", "--gossip_merge_method", "clonal", *QUIET)
    assert (seen["config"].policy.method, seen["config"].policy.fitness) == ("clonal", "ema")


def test_the_decay_of_fitness_reaches_the_tracker(run_train):
    flags = ["--train_steps", "3", "--log_every", "1", "--gossip_fitness", "ema", "--gossip_fitness_decay", "0.5"]
    run_dir = run_train("run", *QUIET, *flags)
    a, b, c = (float(row["loss"]) for row in metrics_rows(run_dir))
    expected = (0.25 * a + 0.5 * b + c) / 1.75  # a moving average that forgets half a step
    assert newest(run_dir)["loss"] == pytest.approx(expected, abs=1e-3)


def test_a_run_whose_checkpoints_torch_could_not_open_is_refused(run_train, tmp_path):
    with pytest.raises(UserError, match="expected a run directory whose path is UTF-8"):
        run_train("run\udcff", "--train_steps", "3", *QUIET)
    assert not (tmp_path / "run\udcff").exists()


def test_config_json_is_utf8_whatever_the_paths_are(run_train, text, tmp_path):
    (tmp_path / "no\udcff.txt").symlink_to(text)
    run_dir = run_train("läuft", "--train_steps", "3", "--data", "no\udcff.txt", *QUIET)
    assert '"run": "läuft"' in (run_dir / "config.json").read_text(encoding="utf-8")
    train.main(["--resume", "läuft", "--train_steps", "4"])
    assert newest(run_dir)["step"] == 4


def test_lanes_of_all_ranks_take_turns_over_the_data(run_train, monkeypatch):
    places = {}
    for rank in (0, 1):
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}.items():
            monkeypatch.setenv(name, str(value))
        run_dir = run_train("run", "--train_steps", "1", "--lane_groups", "1", *QUIET)
        lanes = newest(run_dir, rank)["training"]["lanes"]
        places[rank] = [(position - 32) * 4 // lanes["region_bytes"] for position in lanes["positions"]]
    assert places == {0: [0, 2], 1: [1, 3]}


def test_help_lists_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as ended:
        train.main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--params", "--gossip_mixing_rate", "--no_schedulefree", "--rejuvenation_threshold", "--max_minutes"):
        assert flag in text
