"""prepare_data.py after kill -9: the same command goes on, and the corpus is as if nothing had happened."""

import fcntl
import gzip
import os
import subprocess
import sys
from pathlib import Path

import pytest

import prepare_data
from preparation import documents, joining
from preparation.partial import partial_paths
from runtime.errors import UserError
from tests.test_preparation_documents import json_lines_of, write_parquet, zst

ROOT = Path(__file__).parent.parent
FIRST_MARK = 4  # calls: the partial file synced; the journal synced, renamed, its folder synced
LAST = 4  # calls: the partial file synced, renamed, its folder synced, the journal removed


@pytest.fixture
def inputs(tmp_path):
    """A folder with every kind of file, each long enough for several marks, with empty documents and 0x1e inside."""
    folder = tmp_path / "in"
    folder.mkdir()
    texts = ["", *(f"document {number}, " * number + "\x1e." for number in range(12)), ""]
    plain = "".join(texts).encode()
    (folder / "a.txt").write_bytes(plain)
    (folder / "b.txt.gz").write_bytes(gzip.compress(plain))
    (folder / "c.txt.zst").write_bytes(zst(plain))
    (folder / "d.jsonl").write_bytes(json_lines_of(texts))
    (folder / "e.jsonl.zst").write_bytes(zst(json_lines_of(texts)))
    write_parquet(folder / "f.parquet", texts)
    (folder / "g.txt").touch()
    return folder


@pytest.fixture
def killed(inputs):
    """killed((deadly call, output) ...) -> status and number of calls of each attempt, and what they said."""

    def run(*attempts: tuple[int, Path]):
        command = [sys.executable, "-m", "tests.killed_prepare_data", str(inputs)]
        lines = "".join(f"{deadly} {output}\n" for deadly, output in attempts)
        done = subprocess.run(command, cwd=ROOT, input=lines, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return [tuple(line.split()) for line in done.stdout.splitlines()], done.stderr

    return run


def test_prepare_data_goes_on_after_any_kill(killed, tmp_path):
    ((status, calls),), _ = killed((0, tmp_path / "whole"))
    assert status == "0"
    expected, calls = (tmp_path / "whole").read_bytes(), int(calls)
    assert calls > 60 and expected.count(b"\x1e") > 50
    # Each attempt dies after the mark that it begins with and at least one more, at another call of a mark each time.
    deadly = [FIRST_MARK * 2 + 1 + number % 7 for number in range(calls // 2)]
    attempts, said = killed(*((call, tmp_path / "corpus") for call in deadly))
    statuses = [status for status, _ in attempts]
    finished = statuses.index("0")
    assert finished >= 8 and statuses[:finished] == ["-9"] * finished
    assert set(statuses[finished + 1 :]) == {"2"}  # there is nothing more to do
    assert said.count("going on with") >= finished - 1
    assert (tmp_path / "corpus").read_bytes() == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "in", "whole"]


def test_prepare_data_killed_at_its_first_or_last_calls_is_whole_or_goes_on(killed, tmp_path):
    calls = int(killed((0, tmp_path / "whole"))[0][0][1])
    moments = [*range(1, FIRST_MARK + 1), *range(calls - LAST + 1, calls + 1)]
    outputs = [tmp_path / f"corpus_{moment}" for moment in moments]
    attempts, said = killed(*((call, o) for moment, o in zip(moments, outputs, strict=True) for call in (moment, 0)))
    statuses = [status for status, _ in attempts]
    assert statuses[::2] == ["-9"] * len(moments)
    assert statuses[1::2] == ["0"] * (len(moments) - 2) + ["2"] * 2 and said.count("which exists") == 2
    for output in outputs:
        assert output.read_bytes() == (tmp_path / "whole").read_bytes()
        assert not any(path.exists() for path in partial_paths(output))


@pytest.fixture
def interrupt(inputs, monkeypatch):
    """interrupt(output, error): in this process, the error comes when some of the corpus is written and marked."""

    def run(output: Path, error: BaseException):
        writes, real = [], joining.CorpusWriter.write

        def write(writer, piece):
            writes.append(piece)
            if len(writes) == 60:
                raise error
            real(writer, piece)

        with monkeypatch.context() as patch:
            patch.setattr(joining, "MARK_BYTES", 300)
            patch.setattr(documents, "PIECE_BYTES", 97)
            patch.setattr(joining.CorpusWriter, "write", write)
            with pytest.raises((UserError, KeyboardInterrupt)):
                prepare_data.main([str(inputs), "--output", str(output)])
        partial, journal, _ = partial_paths(output)
        assert partial.stat().st_size > 2000 and journal.exists()

    return run


@pytest.fixture
def begun(interrupt, tmp_path):
    """An output of which some is there."""
    interrupt(tmp_path / "corpus", KeyboardInterrupt())
    return tmp_path / "corpus"


def again(begun, *flags):
    prepare_data.main([str(begun.parent / "in"), "--output", str(begun), *flags])


@pytest.mark.parametrize("change", ["grown", "touched", "added", "removed", "seed", "field", "max_bytes"])
def test_prepare_data_refuses_to_go_on_with_other_inputs(begun, inputs, change):
    flags, path = [], inputs / "a.txt"
    if change == "grown":
        path.write_bytes(path.read_bytes() + b".")
    elif change == "touched":
        os.utime(path, ns=(1, 1))
    elif change == "added":
        (inputs / "new.txt").write_bytes(b"new")
    elif change == "removed":
        path.unlink()
    else:
        flags = {"seed": ["--seed", "1"], "field": ["--text_field", "id"], "max_bytes": ["--max_bytes", "1g"]}[change]
    partial, journal, _ = partial_paths(begun)
    before = partial.read_bytes(), journal.read_bytes()
    with pytest.raises(UserError, match=r"begun with, got others: give those, or remove .*corpus\.partial and corpus"):
        again(begun, *flags)
    assert (partial.read_bytes(), journal.read_bytes()) == before and not begun.exists()


@pytest.mark.parametrize("harm, said", [("cut", "expected .* bytes in"), ("no journal", "expected the journal"),
                                        ("broken journal", "expected the journal")])  # fmt: skip
def test_prepare_data_refuses_a_partial_file_that_is_not_as_it_left_it(begun, harm, said):
    partial, journal, _ = partial_paths(begun)
    if harm == "cut":
        os.truncate(partial, 100)
    elif harm == "no journal":
        journal.unlink()
    else:
        journal.write_text('{"format": 1')
    with pytest.raises(UserError, match=said):
        again(begun)
    assert partial.exists()


def test_prepare_data_begins_again_when_the_partial_file_was_removed(begun, inputs):
    partial_paths(begun)[0].unlink()
    again(begun, "--seed", "1")
    assert not any(path.exists() for path in partial_paths(begun))


def test_prepare_data_refuses_a_partial_file_that_another_process_writes(begun):
    with open(partial_paths(begun)[0], "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="got a process writing it"):
            again(begun)


def test_prepare_data_output_inside_its_input_folder_is_no_input(interrupt, inputs):
    interrupt(inputs / "corpus", KeyboardInterrupt())
    partial_paths(inputs / "corpus")[2].touch()  # as a kill may leave it
    prepare_data.main([str(inputs), "--output", str(inputs / "corpus")])
    assert not any(path.exists() for path in partial_paths(inputs / "corpus"))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["disk", "Ctrl-C"])
def test_prepare_data_keeps_what_is_marked_after_an_error(interrupt, tmp_path, error):
    again(tmp_path / "whole")
    interrupt(tmp_path / "corpus", error)
    again(tmp_path / "corpus")
    assert (tmp_path / "corpus").read_bytes() == (tmp_path / "whole").read_bytes()
