"""Going on exactly where a run stopped, and what may and may not change on the way."""

import errno
import json
import os
import re
import time

import pytest
import torch

import train
from bench.injection import Injection
from runtime.errors import UserError
from runtime.ranks import BEGAN
from training import checkpoint, succession
from training.checkpoint import list_checkpoints, read_checkpoint

QUIET = ["--save_every", "1000", "--val_every", "0", "--log_every", "5"]


def newest(run_dir, rank=0) -> dict:
    return read_checkpoint([file for file in list_checkpoints(run_dir) if file.rank == rank][-1].path)


def assert_same(one, other, where="") -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}/{key}")
    else:
        assert one == other, where


def metrics_rows(run_dir, rank=0) -> list[dict]:
    header, *lines = (run_dir / "metrics" / f"rank_{rank:04d}.tsv").read_text().splitlines()
    return [dict(zip(header.split("\t"), line.split("\t"), strict=True)) for line in lines]


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--lane_groups", "1"],
        ["--no_enable_conv", "--dropout", "0.2", "--grad_accum", "2"],
        ["--no_schedulefree", "--ff_mult", "0"],
        ["--document_delimiter", "none"],
        ["--dtype", "bf16"],
    ],
    ids=["plain", "one-group", "no-conv-dropout-accum", "adamw", "one-document", "bfloat16"],
)
def test_resume_10_and_10_steps_equal_20_bit_for_bit(run_train, flags):
    whole = run_train("whole", "--train_steps", "20", *QUIET, *flags)
    run_train("parts", "--train_steps", "10", *QUIET, *flags)
    train.main(["--resume", "parts", "--train_steps", "20"])
    parts = whole.parent / "parts"
    one, other = newest(whole), newest(parts)
    for content in (one, other):
        assert content["step"] == 20
        for name in ("seconds", "cpu_seconds"):
            content["training"]["totals"].pop(name)
    assert_same(one, other)
    changing = ("time_s", "bytes_per_s", "cpu_s", "probe_s")
    for a, b in zip(metrics_rows(whole), metrics_rows(parts), strict=True):
        assert {k: v for k, v in a.items() if k not in changing} == {k: v for k, v in b.items() if k not in changing}


def test_resume_of_a_finished_run_says_that_there_is_nothing_to_do(run_train, capsys):
    run_dir = run_train("run", "--train_steps", "4", *QUIET)
    before = newest(run_dir)
    train.main(["--resume", "run"])
    assert "nothing to do: --train_steps 4 is reached" in capsys.readouterr().err
    assert_same(before, newest(run_dir))
    assert json.loads((run_dir / "population" / "rank_0000.json").read_text())["step"] == 4


def test_resume_writes_its_metrics_on_in_the_same_file(run_train):
    run_dir = run_train("run", "--train_steps", "10", *QUIET)
    train.main(["--resume", "run", "--train_steps", "20"])
    assert [row["step"] for row in metrics_rows(run_dir)] == ["5", "10", "15", "20"]
    seen = [int(row["bytes_seen"]) for row in metrics_rows(run_dir)]
    assert seen == [step * 2 * 32 for step in (5, 10, 15, 20)]


def test_resume_finds_what_it_reads_from_another_working_directory(run_train, tmp_path, monkeypatch):
    (tmp_path / "here.txt").write_text("relative\x1e" * 100)
    run_dir = run_train("run", "--train_steps", "2", "--data", "here.txt", *QUIET)
    (tmp_path / "elsewhere").mkdir()
    later = run_train("later", "--train_steps", "2", "--data", "here.txt", "--init_from", "run", *QUIET)
    for file in list_checkpoints(later):
        file.path.unlink()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for name, place in (("run", run_dir), ("later", later)):
        train.main(["--resume", f"../{name}", "--train_steps", "4"])
        assert newest(place)["step"] == 4


def test_resume_takes_the_new_place_of_data_that_has_moved(run_train, tmp_path):
    for name in ("old.txt", "val.txt"):
        (tmp_path / name).write_text("relative\x1e" * 100)
    run_dir = run_train("run", "--train_steps", "2", "--data", "old.txt", "--val_data", "val.txt", *QUIET)
    (tmp_path / "old.txt").rename(tmp_path / "new.txt")
    with pytest.raises(UserError, match=r"expected data at '.*old\.txt', got no file there"):
        train.main(["--resume", "run", "--train_steps", "4"])
    with pytest.raises(UserError, match=r"expected --val_data .*val\.txt of the resumed run, got .*new\.txt: leave"):
        train.main(["--resume", "run", "--train_steps", "4", "--data", "new.txt", "--val_data", "new.txt"])
    train.main(["--resume", "run", "--train_steps", "4", "--data", "new.txt"])
    train.main(["--resume", "run", "--train_steps", "5"])
    assert newest(run_dir)["step"] == 5
    (tmp_path / "new.txt").rename(tmp_path / "newer.txt")
    (tmp_path / "other.txt").write_text("longer" * 300)
    with pytest.raises(UserError, match="training bytes of the checkpoint"):
        train.main(["--resume", "run", "--train_steps", "6", "--data", "other.txt"])
    train.main(["--resume", "run", "--train_steps", "6", "--data", "newer.txt"])  # a slip costs nothing
    assert newest(run_dir)["step"] == 6


def test_resume_of_a_run_whose_held_out_bytes_are_trained_on_warns(run_train, text, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr("training.setup.set", lambda files: frozenset(), raising=False)  # as before this was looked at
        run_train("run", "--train_steps", "2", "--val_data", str(text), *QUIET)
    assert train.main(["--resume", "run", "--train_steps", "3"]) == 0
    assert f"warning: {text.resolve()} is in --data and in --val_data" in capsys.readouterr().err


def test_resume_takes_new_rates_batch_and_chunk_sizes(run_train):
    run_dir = run_train("run", "--train_steps", "10", "--lane_groups", "1", *QUIET)
    before = newest(run_dir)["training"]
    train.main(["--resume", "run", "--train_steps", "11", "--batch_size", "5", "--chunk_size", "48", "--lr", "0.5"])
    after = newest(run_dir)["training"]
    places = [position + 48 for position in before["lanes"]["positions"]]
    assert after["lanes"]["positions"][:2] == places
    assert len(after["lanes"]["positions"]) == after["state"]["hidden"].shape[1] == 5
    options = json.loads((run_dir / "config.json").read_text())["options"]
    assert (options["optimizer"]["lr"], options["data"]["chunk_size"]) == (0.5, 48)


@pytest.mark.parametrize(
    "flags",
    [
        ["--batch_size", "64", "--chunk_size", "512", "--grad_accum", "2"],
        ["--probe_every", "100000", "--gossip_mixing_rate", "0"],
    ],
    ids=["larger steps", "longer intervals"],
)
def test_resume_keeps_the_probe_so_that_losses_in_names_compare(run_train, flags):
    run_dir = run_train("run", "--train_steps", "10", *QUIET)
    train.main(["--resume", "run", "--train_steps", "11", *flags])
    log = (run_dir.parent / "logs" / "train_run_rank_0000.log").read_text()
    assert re.findall(r"probe: (\d+) windows", log) == ["8", "8"]
    options = json.loads((run_dir / "config.json").read_text())["options"]
    assert options["population"]["probe_windows"] == 8


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dim", "32"], "--dim"),
        (["--params", "15m"], "expected no --params of the resumed run, got 15728640: leave"),
        (["--gossip_fitness", "ema"], "--gossip_fitness"),
        (["--seed", "7"], "--seed"),
        (["--no_schedulefree"], "--schedulefree"),
        (["--data", __file__], "--data"),
        (["--output", "elsewhere"], "--output"),
        (["--init_from", "x.pt"], "--init_from"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value)[:20],
)
def test_resume_refuses_what_may_not_change(run_train, flags, message):
    run_train("run", "--train_steps", "2", *QUIET)
    with pytest.raises(UserError, match=message):
        train.main(["--resume", "run", *flags])


def test_resume_refuses_to_change_what_each_rank_has_of_its_own_by_now(run_train):
    run_dir = run_train("run", "--train_steps", "2", "--evolve", "lr,grad_clip", "--lr", "0.01", *QUIET)
    for flag in ("--lr", "--grad_clip"):
        with pytest.raises(UserError, match=f"expected no other {flag} .* evolves, got 0.5: leave it out"):
            train.main(["--resume", "run", "--train_steps", "3", flag, "0.5"])
    flags = ["--lr", "0.01", "--weight_decay", "0.5"]  # no change, and one that all ranks share
    assert train.main(["--resume", "run", "--train_steps", "3", *flags]) == 0
    assert json.loads((run_dir / "config.json").read_text())["options"]["optimizer"]["weight_decay"] == 0.5


def test_resume_refuses_what_is_no_run(run_train, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for place, said in (("empty", r"without config\.json"), ("absent", "is no folder"), ("file", "is no folder")):
        with pytest.raises(UserError, match=f"expected a run directory to resume, got {place}, .*{said}: "):
            train.main(["--resume", place])
    run_train("run", "--train_steps", "1", *QUIET)
    with pytest.raises(UserError, match=r"got run/best\.pt, which is no folder: give its folder, run$"):
        train.main(["--resume", "run/best.pt"])


def test_resume_refuses_a_run_without_a_whole_checkpoint(run_train):
    run_dir = run_train("run", "--train_steps", "2", *QUIET)
    for file in list_checkpoints(run_dir):
        file.path.write_bytes(file.path.read_bytes()[:-100])
    with pytest.raises(UserError, match="whole checkpoint"):
        train.main(["--resume", "run", "--train_steps", "4"])


def test_resume_begins_a_run_again_that_was_stopped_before_its_first_checkpoint(run_train, capsys):
    run_dir = run_train("run", "--train_steps", "10", *QUIET)
    expected = newest(run_dir)
    for path in run_dir.glob("*.pt"):
        path.unlink()
    rows = (run_dir / "metrics" / "rank_0000.tsv").read_text()
    assert train.main(["--resume", "run", "--train_steps", "10"]) == 0
    assert "from its beginning, since there is no checkpoint" in capsys.readouterr().err
    assert_same(expected["model_state_dict"], newest(run_dir)["model_state_dict"])
    assert (run_dir / "metrics" / "rank_0000.tsv.1").read_text() == rows
    assert len(metrics_rows(run_dir)) == 2


@pytest.mark.injects(Injection.DISK_ERROR)
def test_resume_waits_for_a_checkpoint_that_cannot_be_read_for_a_while(run_train, monkeypatch, capsys):
    monkeypatch.setattr(succession, "READ_AGAIN_SECONDS", (0.1, 30.0))
    run_dir = run_train("run", "--train_steps", "20", "--save_every", "10", *QUIET[2:])
    file = list_checkpoints(run_dir)[-1].path
    away = file.rename(run_dir / "away")
    file.mkdir()  # open() fails with an error that is no damage
    waits = []

    def mend(seconds):
        waits.append(seconds)
        if len(waits) == 2:
            file.rmdir()
            away.rename(file)

    monkeypatch.setattr(succession.time, "sleep", mend)
    assert train.main(["--resume", "run", "--train_steps", "30"]) == 0
    assert waits[:2] == [0.1, 30.0] and f"resumed {file.name}" in capsys.readouterr().err


@pytest.mark.injects(Injection.DISK_ERROR, Injection.RESTART)
def test_a_restarted_rank_does_not_begin_again_where_checkpoints_cannot_be_read(
    run_train, monkeypatch, capsys, restarted
):
    monkeypatch.setattr(succession, "READ_AGAIN_SECONDS", ())
    run_dir = run_train("run", "--train_steps", "2", *QUIET)
    (file,) = list_checkpoints(run_dir)
    away = file.path.rename(run_dir / "away")
    file.path.mkdir()
    restarted()
    assert train.main(["--resume", "run", "--train_steps", "4"]) == 1
    assert "Is a directory" in capsys.readouterr().err
    file.path.rmdir()
    away.rename(file.path)
    assert train.main(["--resume", "run", "--train_steps", "4"]) == 0
    assert newest(run_dir)["step"] == 4 and not list(run_dir.glob("archive_*"))


@pytest.mark.injects(Injection.DISK_ERROR)
@pytest.mark.parametrize("place", ["is_sealed", "torch.load"])
def test_a_disks_error_anywhere_in_a_checkpoint_is_no_damage(run_train, monkeypatch, place):
    run_dir = run_train("run", "--train_steps", "2", *QUIET)

    def fail(*_, **__):
        error = OSError(errno.EIO, os.strerror(errno.EIO))
        if place == "is_sealed":
            raise error
        raise SystemError("returned a result with an exception set") from error

    monkeypatch.setattr(f"training.checkpoint.{place}", fail)
    with pytest.raises(checkpoint.UnreadableError, match="Input/output error"):
        read_checkpoint(list_checkpoints(run_dir)[-1].path)


def test_lack_of_memory_is_no_damage_of_a_checkpoint(run_train, monkeypatch):
    run_dir = run_train("run", "--train_steps", "2", *QUIET)
    monkeypatch.setattr(checkpoint.torch, "load", lambda *_, **__: torch.empty(10**15))
    with pytest.raises(checkpoint.UnreadableError, match="can't allocate memory"):
        read_checkpoint(list_checkpoints(run_dir)[-1].path)


@pytest.mark.injects(Injection.VANISHED, Injection.RESTART)
def test_a_restarted_rank_begins_no_new_run_where_its_own_has_vanished(run_train, capsys, restarted):
    run_dir = run_train("run", "--train_steps", "2", *QUIET)
    away = run_dir.rename(run_dir.with_name("away"))
    restarted()
    with pytest.raises(AssertionError):  # a status that is not 0
        run_train("run", "--train_steps", "4", *QUIET)
    assert "expected the run that logs/train_run_rank_0000.log tells of, got none in run" in capsys.readouterr().err
    assert not run_dir.exists()
    away.rename(run_dir)
    run_train("run", "--train_steps", "4", *QUIET)
    assert newest(run_dir)["step"] == 4


def test_a_restarted_rank_begins_no_new_run_among_checkpoints(run_train, capsys, restarted):
    run_dir = run_train("run", "--train_steps", "4", *QUIET)
    config = (run_dir / "config.json").rename(run_dir / "away")
    restarted()
    with pytest.raises(AssertionError):  # a status that is not 0
        run_train("run", "--train_steps", "6", *QUIET)
    assert "which already holds a run" in capsys.readouterr().err
    config.rename(run_dir / "config.json")
    run_train("run", "--train_steps", "6", *QUIET)
    assert newest(run_dir)["step"] == 6 and not list(run_dir.glob("archive_*"))


def test_any_rank_describes_a_new_run_and_goes_on_in_it(run_train, monkeypatch, restarted):
    """Rank 0 may never come so far."""
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    flags = ["--gossip_host", "127.0.0.1", *QUIET]
    run_dir = run_train("run", "--train_steps", "4", *flags)
    restarted()
    run_train("run", "--train_steps", "6", *flags)
    assert newest(run_dir, rank=1)["step"] == 6 and newest(run_dir, rank=1)["training"]["totals"]["lineage"] == 6
    assert not list(run_dir.glob("archive_*")) and [row["step"] for row in metrics_rows(run_dir, 1)] == ["5"]


@pytest.mark.parametrize("restarts", [0, 1])
def test_resume_refuses_the_training_state_of_another_version(run_train, monkeypatch, capsys, restarts):
    monkeypatch.setattr(checkpoint, "TRAINING_FORMAT", checkpoint.TRAINING_FORMAT - 1)
    run_dir = run_train("old", "--train_steps", "4", *QUIET)
    monkeypatch.undo()
    told = "of another version of this software: resume with that one, or use --init_from"
    if restarts:  # it does not begin again: the launcher gives it up in the end
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))
        assert train.main(["--resume", str(run_dir), "--train_steps", "8"]) == 1
        assert told in capsys.readouterr().err
    else:
        with pytest.raises(UserError, match=told):
            train.main(["--resume", str(run_dir), "--train_steps", "8"])
    assert checkpoint.read_for_use(run_dir)[2]["step"] == 4


def test_resume_passes_over_a_broken_checkpoint_for_the_next_older_and_says_so(run_train, capsys):
    flags = ["--no_fitness_weighted_checkpointing", "--save_every", "16", "--val_every", "0"]
    run_dir = run_train("run", "--train_steps", "40", *flags)
    files = list_checkpoints(run_dir)
    files[-1].path.write_bytes(files[-1].path.read_bytes()[:-100])
    train.main(["--resume", "run", "--train_steps", "41"])
    assert (
        f"passes over a checkpoint: expected a whole checkpoint, got run/{files[-1].path.name}"
        in capsys.readouterr().err
    )
    log = (run_dir.parent / "logs" / "train_run_rank_0000.log").read_text()
    assert f"resumed {files[-2].path.name}" in log
    assert (run_dir / "archive_001.pt").exists()  # the broken one, which must not pass for the newest again
    assert files[-1].path not in [file.path for file in list_checkpoints(run_dir)]


def test_resume_with_more_ranks_starts_the_new_ones_from_the_best(run_train, monkeypatch):
    run_dir = run_train("run", "--train_steps", "20", *QUIET)
    for name, value in {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    train.main(["--resume", "run", "--train_steps", "21", "--lr", "1e-30"])
    old, new = newest(run_dir), newest(run_dir, rank=1)
    assert new["step"] == 21
    base = [name for name in old["training"]["tensors"] if name.startswith("z.")]  # not moved by such a rate
    assert_same(*({name: content["training"]["tensors"][name] for name in base} for content in (old, new)))
    assert old["training"]["lanes"] != new["training"]["lanes"]  # at its own place in the data


def test_init_from_starts_a_new_run_at_the_averaged_weights(run_train):
    first = newest(run_train("first", "--train_steps", "12", *QUIET))
    run_dir = run_train("second", "--train_steps", "1", "--init_from", "first", "--lr", "1e-30", *QUIET)
    second = newest(run_dir)
    assert second["step"] == 1
    assert [file.step for file in list_checkpoints(run_dir)] == [0, 1]  # it can return to where it started
    assert_same(first["model_state_dict"], second["model_state_dict"])


@pytest.mark.parametrize(
    "flags", [["--dim", "24"], ["--depth", "3"], ["--no_enable_conv"], ["--params", "1m"]], ids=" ".join
)
def test_init_from_refuses_flags_that_disagree_with_the_file(run_train, flags):
    run_train("first", "--train_steps", "1", *QUIET)
    with pytest.raises(UserError, match="leave it out"):
        run_train("second", "--init_from", "first", *flags)


@pytest.mark.parametrize("seed", ["1", "2"])
def test_seed_repeats_a_run_and_another_seed_differs(run_train, seed):
    one = newest(run_train("one", "--train_steps", "8", "--seed", seed, *QUIET))
    again = newest(run_train("again", "--train_steps", "8", "--seed", seed, *QUIET))
    other = newest(run_train("other", "--train_steps", "8", "--seed", "3", *QUIET))
    assert_same(one["training"]["tensors"], again["training"]["tensors"])
    name = "y.token_emb.weight"
    assert not torch.equal(one["training"]["tensors"][name], other["training"]["tensors"][name])


@pytest.fixture
def restarted(monkeypatch):
    """restarted() makes what follows the second start of a rank, as its launcher says."""
    return lambda: monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")


@pytest.fixture
def seekers(monkeypatch) -> list:
    """The nodes that were told to seek a peer."""
    found = []
    monkeypatch.setattr(train.EvolutionaryNode, "seek", lambda self: found.append(self))
    return found


@pytest.mark.injects(Injection.RESTART)
def test_a_restarted_rank_goes_on_in_its_output_with_the_flags_given(run_train, restarted, seekers, text, capsys):
    run_dir = run_train("run", "--train_steps", "10", *QUIET)
    restarted()
    run_train("run", "--train_steps", "20", *QUIET)
    assert [row["step"] for row in metrics_rows(run_dir)] == ["5", "10", "15", "20"]
    assert newest(run_dir)["training"]["totals"]["lineage"] == 20
    log = (run_dir.parent / "logs" / "train_run_rank_0000.log").read_text()
    assert "resumed checkpoint_rank_0000_step_000010" in log
    assert len(seekers) == 1  # with peers, it would not wait for luck to meet them again
    assert train.main(["--data", str(text), "--output", "run", "--dim", "32"]) == 1
    assert "error: rank 0: expected --dim 16" in capsys.readouterr().err


def test_a_restarted_rank_that_began_from_a_file_goes_on_from_its_own(run_train, restarted):
    run_train("first", "--train_steps", "12", *QUIET)
    run_dir = run_train("second", "--train_steps", "2", "--init_from", "first", *QUIET)
    restarted()
    run_train("second", "--train_steps", "4", "--init_from", "first", *QUIET)
    assert newest(run_dir)["step"] == newest(run_dir)["training"]["totals"]["lineage"] == 4


@pytest.mark.injects(Injection.FRESH_RESTART)
@pytest.mark.parametrize("lost", ["removed", "broken"])
def test_a_restarted_rank_begins_again_where_nobody_has_a_checkpoint(run_train, restarted, seekers, capsys, lost):
    run_dir = run_train("run", "--train_steps", "10", *QUIET)
    for path in run_dir.glob("*.pt"):
        path.write_bytes(b"broken") if lost == "broken" and not path.is_symlink() else path.unlink()
    restarted()
    run_train("run", "--train_steps", "5", *QUIET)
    assert [row["lineage"] for row in metrics_rows(run_dir)] == ["5"]
    assert newest(run_dir)["training"]["totals"]["lineage"] == 5
    assert len(seekers) == 1  # with peers, it would take theirs at the first conversation
    assert ("passes over" in capsys.readouterr().err) == (lost == "broken")


@pytest.mark.injects(Injection.FRESH_RESTART)
def test_a_restarted_rank_without_a_checkpoint_takes_the_best_of_the_others(run_train, restarted, seekers, monkeypatch):
    for rank in (1, 0):
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}.items():
            monkeypatch.setenv(name, str(value))
        run_dir = run_train("run", "--train_steps", "20" if rank else "2", *QUIET)
    for file in list_checkpoints(run_dir):
        if file.rank == 0:
            file.path.unlink()
    restarted()
    run_train("run", "--train_steps", "21", "--lr", "1e-30", *QUIET)
    old, new = newest(run_dir, rank=1), newest(run_dir)
    assert (new["step"], new["training"]["totals"]["lineage"]) == (21, 21)
    base = [name for name in old["training"]["tensors"] if name.startswith("z.")]  # not moved by such a rate
    assert_same(*({name: content["training"]["tensors"][name] for name in base} for content in (old, new)))
    assert old["training"]["lanes"] != new["training"]["lanes"]
    assert len(seekers) == 1


def test_a_rank_killed_before_the_run_was_described_starts_in_its_place_again(run_train, restarted):
    run_dir = run_train("run", "--train_steps", "1", *QUIET)
    for path in (*run_dir.glob("*.pt"), run_dir / "config.json"):
        path.unlink()
    with pytest.raises(UserError, match="--resume"):
        run_train("run", "--train_steps", "2", *QUIET)
    restarted()
    run_train("run", "--train_steps", "2", *QUIET)
    assert newest(run_dir)["step"] == 2 and (run_dir / "config.json").exists()


def test_a_rank_that_was_restarted_trains_to_the_end_of_its_first_process_minutes(run_train, restarted, monkeypatch):
    run = run_train("run", "--train_steps", "5", "--max_minutes", "59")
    restarted()
    monkeypatch.setenv(BEGAN, str(time.monotonic() - 3600))
    run_train("run", "--train_steps", "10", "--max_minutes", "61")
    run_train("run", "--train_steps", "15", "--max_minutes", "59")
    assert max(file.step for file in list_checkpoints(run)) == 10


@pytest.mark.injects(Injection.DISK_ERROR)
def test_a_rank_that_was_restarted_tries_again_where_it_finds_a_file_unreadable(run_train, capsys, restarted):
    """Status 2 would say that it is the user's mistake, and that another try does not help."""
    run = run_train("run", "--train_steps", "5")
    (run / "config.json").unlink()
    (run / "config.json").mkdir()
    with pytest.raises(UserError, match="readable config"):
        train.main(["--resume", "run", "--train_steps", "10"])
    restarted()
    assert train.main(["--resume", "run", "--train_steps", "10"]) == 1
    assert "error: rank 0: expected a readable config.json" in capsys.readouterr().err
