from pathlib import Path

import pytest

from runtime.errors import UserError
from training.checkpoint import checkpoint_name
from training.retention import retire_from
from training.succession import Launch, claim_launch, newest_launch, resume_sources


def save(run_dir: Path, rank: int, step: int, loss: float | None = 1.0) -> None:
    (run_dir / "population").mkdir(exist_ok=True)
    (run_dir / checkpoint_name(rank, step, loss)).touch()


def begin(run_dir: Path, world_size: int) -> None:
    (run_dir / "population").mkdir(exist_ok=True)
    claim_launch(run_dir / "population", Launch(world_size, {}, ()))


def first(run_dir: Path, rank: int, world_size: int) -> tuple[int, int, bool]:
    source = resume_sources(run_dir, rank, world_size)[0]
    return source.file.rank, source.file.step, source.moves


def test_a_rank_goes_on_from_its_own_newest_then_its_older_then_others(tmp_path):
    begin(tmp_path, 2)
    for rank in (0, 1):
        for step in (10, 30, 20):
            save(tmp_path, rank, step, loss=2.0 - rank)
    found = [(source.file.rank, source.file.step) for source in resume_sources(tmp_path, 1, 2)]
    assert found[:3] == [(1, 30), (1, 20), (1, 10)] and len(found) == 6


def test_new_ranks_start_from_copies_of_the_best(tmp_path):
    begin(tmp_path, 3)
    for rank, loss in enumerate((3.0, 1.0, 2.0)):
        save(tmp_path, rank, 10, loss)
    found = [first(tmp_path, rank, 5) for rank in range(5)]
    assert found == [(0, 10, True), (1, 10, True), (2, 10, True), (1, 10, False), (1, 10, False)]


def test_where_ranks_are_fewer_the_best_go_on_and_it_is_said(tmp_path, capsys):
    begin(tmp_path, 4)
    for rank, loss in enumerate((3.0, 1.0, 2.0, 0.5)):
        save(tmp_path, rank, 10, loss)
    assert [first(tmp_path, rank, 2) for rank in range(2)] == [(3, 10, True), (1, 10, True)]
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("warning: the run had 4 ranks and goes on with 2: the best of them")
    assert first(tmp_path, 0, 2) == (3, 10, True) and capsys.readouterr().err == ""


def test_a_rank_that_was_dropped_comes_back_as_a_new_one(tmp_path):
    begin(tmp_path, 3)
    for rank, loss in enumerate((1.0, 2.0, 3.0)):
        save(tmp_path, rank, 10, loss)
    assert first(tmp_path, 0, 1) == (0, 10, True)
    save(tmp_path, 0, 90, 0.5)
    assert [first(tmp_path, rank, 3) for rank in range(3)] == [(0, 90, True), (0, 90, False), (0, 90, False)]


def test_who_was_to_go_on_elsewhere_and_never_did_is_not_dropped(tmp_path):
    begin(tmp_path, 2)
    save(tmp_path, 0, 10, 2.0)
    save(tmp_path, 1, 10, 1.0)
    assert first(tmp_path, 0, 1) == (1, 10, True)  # killed before its first save
    assert [first(tmp_path, rank, 2) for rank in range(2)] == [(0, 10, True), (1, 10, True)]
    (tmp_path / checkpoint_name(0, 10, 2.0)).unlink()
    assert first(tmp_path, 0, 3) == (1, 10, False)


def test_a_launch_that_never_trained_drops_nobody(tmp_path):
    begin(tmp_path, 4)
    for rank, loss in enumerate((3.0, 1.0, 2.0, 0.5)):
        save(tmp_path, rank, 10, loss)
    assert first(tmp_path, 0, 1) == (3, 10, True)  # and ended by a mistake before its first step
    assert [first(tmp_path, rank, 4) for rank in range(4)] == [(rank, 10, True) for rank in range(4)]
    assert first(tmp_path, 0, 2) == (3, 10, True)
    save(tmp_path, 0, 90, 0.25)
    assert first(tmp_path, 0, 3) == (0, 90, True)  # ends likewise: who was dropped by the launch of two stays so
    assert [first(tmp_path, rank, 4) for rank in range(4)] == [(0, 90, True), (1, 10, True)] + 2 * [(0, 90, False)]


def test_what_was_decided_holds_though_a_rank_saved_before_another_looked(tmp_path):
    begin(tmp_path, 4)
    for rank, loss in enumerate((3.0, 1.0, 2.0, 0.5)):
        save(tmp_path, rank, 10, loss)
    assert first(tmp_path, 0, 2) == (3, 10, True)
    save(tmp_path, 0, 12, 0.25)  # and by this, the ranking is another
    assert first(tmp_path, 1, 2) == (1, 10, True)


def test_a_later_resume_never_falls_back_to_a_rank_that_retired(tmp_path):
    begin(tmp_path, 4)
    for rank, loss in enumerate((3.0, 1.0, 2.0, 0.5)):
        save(tmp_path, rank, 10, loss)
    assert first(tmp_path, 0, 2) == (3, 10, True)
    assert first(tmp_path, 0, 2) == (3, 10, True)  # killed before its first save: again
    save(tmp_path, 0, 90, None)
    save(tmp_path, 1, 90, 9.0)
    assert [first(tmp_path, rank, 2) for rank in range(2)] == [(0, 90, True), (1, 90, True)]


def test_a_line_that_ended_does_not_pass_for_the_newest(tmp_path):
    begin(tmp_path, 2)
    save(tmp_path, 0, 50, 3.0)
    save(tmp_path, 0, 60, 3.0)
    save(tmp_path, 1, 40, 1.0)
    assert first(tmp_path, 0, 1) == (1, 40, True)
    retire_from(tmp_path, 0, 41)
    assert len(list(tmp_path.glob("archive_*.pt"))) == 2
    save(tmp_path, 0, 45, 0.5)
    assert first(tmp_path, 0, 1) == (0, 45, True)


def test_claim_launch_is_won_once(tmp_path):
    one = claim_launch(tmp_path, Launch(3, {0: "a"}, ("a",)))
    assert newest_launch(tmp_path) == one
    (tmp_path / "launch_0002.json").write_text((tmp_path / "launch_0001.json").read_text())
    (tmp_path / "launch_0001.json").rename(tmp_path / "launch_0003.json")
    assert newest_launch(tmp_path) == one
    assert not list(tmp_path.glob(".*"))


def test_claim_launch_refuses_ranks_of_different_worlds(tmp_path, monkeypatch):
    claim_launch(tmp_path, Launch(3, {}, ()))
    monkeypatch.setattr("training.succession._launches", lambda population: [])  # what the slower one saw before
    assert claim_launch(tmp_path, Launch(3, {}, ())).world_size == 3
    with pytest.raises(UserError, match="world size"):
        claim_launch(tmp_path, Launch(2, {}, ()))


def test_resume_sources_refuse_a_run_without_checkpoints(tmp_path):
    with pytest.raises(UserError, match="none"):
        resume_sources(tmp_path, 0, 1)


def test_an_heir_of_equal_step_goes_on_however_often_it_is_started_before_its_next_save(tmp_path):
    begin(tmp_path, 4)
    for rank, loss in enumerate((3.0, 1.0, 2.0, 0.5)):
        save(tmp_path, rank, 10, loss)
    assert first(tmp_path, 0, 2) == (3, 10, True)
    retire_from(tmp_path, 0, 10)
    assert first(tmp_path, 0, 2) == (3, 10, True)
    save(tmp_path, 0, 10, 0.5)  # where it starts
    found = resume_sources(tmp_path, 0, 2)[0].file
    assert (found.rank, found.step, found.loss) == (0, 10, 0.5)
