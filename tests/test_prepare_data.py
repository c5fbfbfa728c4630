import io
import os
import subprocess
import sys
import sysconfig
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import prepare_data
from preparation.joining import CorpusWriter, join
from prepare_data import python_stdlib_files
from runtime.errors import UserError


@pytest.fixture
def folder(tmp_path):
    for name, content in {"b.txt": b"bee", "a.txt": b"ant", "deep/er/c.md": b"cat", "deep/empty.txt": b""}.items():
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "in"


def prepare(tmp_path, *arguments):
    output = tmp_path / "out" / "corpus.txt"
    prepare_data.main([*map(str, arguments), "--output", str(output)])
    return output.read_bytes()


def test_prepare_data_joins_files_folders_and_globs_each_once(folder, tmp_path, monkeypatch):
    corpus = prepare(tmp_path, folder / "a.txt", folder, folder / "**" / "*.md")
    assert sorted(corpus.split(b"\x1e")) == [b"ant", b"bee", b"cat"]


def test_prepare_data_order_is_the_seeds(tmp_path):
    for number in range(20):
        (tmp_path / f"{number:02d}.txt").write_bytes(b"%02d" % number)

    def order(output, *flags):
        prepare_data.main([str(tmp_path / "*.txt"), "--output", str(tmp_path / output), *flags])
        return (tmp_path / output).read_bytes().split(b"\x1e")

    first, again, other = order("1"), order("2", "--seed", "0"), order("3", "--seed", "1")
    assert first == again != other
    assert first != sorted(first) == sorted(other)


def test_prepare_data_keeps_boundaries_inside_a_file_and_drops_empty_documents(tmp_path):
    (tmp_path / "joined").write_bytes(b"\x1eone\x1e\x1etwo\x1e")
    output = tmp_path / "corpus"
    tally = join([tmp_path / "joined", tmp_path / "joined"], output)
    assert (tally.written, tally.documents, tally.delimiters, tally.empty) == (15, 4, 8, 0)
    assert output.read_bytes() == b"one\x1etwo\x1eone\x1etwo"


@given(
    st.lists(st.lists(st.binary(max_size=9).map(lambda b: b.replace(b"b", b"\x1e")), max_size=4), max_size=6),
    st.none() | st.integers(1, 40),
)
def test_corpus_writer_pieces_make_no_difference(files, max_bytes):
    sink = io.BytesIO()
    writer = CorpusWriter(sink, max_bytes)
    for pieces in files:
        for piece in pieces:
            writer.write(piece)
        writer.end_document()
    documents = [document for pieces in files for document in b"".join(pieces).split(b"\x1e") if document]
    assert sink.getvalue() == b"\x1e".join(documents)[:max_bytes]
    assert writer.tally.written == len(sink.getvalue())
    assert writer.full == (writer.tally.written == max_bytes)


def test_corpus_writer_counts_nothing_beyond_its_last_byte():
    writer = CorpusWriter(io.BytesIO(), 4)
    writer.write(b"ab\x1ecd\x1eef")
    assert (writer.tally.documents, writer.tally.delimiters) == (2, 1)


def test_prepare_data_max_bytes_cuts(folder, tmp_path):
    assert len(prepare(tmp_path, folder, "--max-bytes", "5")) == 5


def test_join_memory_does_not_grow_with_a_file(tmp_path):
    big = tmp_path / "big"
    with open(big, "wb") as file:
        file.truncate(64 << 20)
    tracemalloc.start()
    try:
        join([big], tmp_path / "corpus")
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
    assert (tmp_path / "corpus").stat().st_size == 64 << 20


def test_prepare_data_never_overwrites(folder, tmp_path):
    first = prepare(tmp_path, folder)
    with pytest.raises(UserError, match=r"expected a new file, got .*corpus\.txt"):
        prepare(tmp_path, folder / "a.txt")
    assert (tmp_path / "out" / "corpus.txt").read_bytes() == first


@pytest.mark.parametrize(
    "inputs, said",
    [
        ([], "expected files, folders or globs"),
        (["absent.txt"], "'absent.txt', got no file"),
        (["deep/*.nothing"], "got no file"),
        (["deep/empty.txt"], "files without any"),
        (["a.txt", "--max_bytes", "much"], "size such as"),
        (["a.txt", "--seed", "x"], "--seed"),
        (["a.txt", "--unheard_of"], "--unheard_of"),
        (["a.txt", "--stats", "b.txt"], "expected --stats alone"),
    ],
    ids=["none", "absent", "glob", "empty", "size", "seed", "flag", "stats"],
)
def test_prepare_data_refuses_in_one_line_and_leaves_nothing(folder, tmp_path, inputs, said):
    script = Path(prepare_data.__file__)
    command = [sys.executable, script, *inputs, "--output", tmp_path / "corpus.txt"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and said in done.stderr
    assert os.listdir(tmp_path) == ["in"]


def test_prepare_data_says_when_the_output_cannot_be_written(folder, tmp_path):
    (tmp_path / "out").write_text("a file where a folder should be")
    with pytest.raises(UserError, match="expected to write"):
        prepare(tmp_path, folder)


def test_prepare_data_error_midway_leaves_no_file(folder, tmp_path):
    with pytest.raises(UserError, match="expected a readable file"):
        join([folder / "a.txt", folder / "deep"], tmp_path / "corpus.txt")
    assert os.listdir(tmp_path) == ["in"]


def test_python_stdlib_files_are_its_own_sources():
    root = Path(sysconfig.get_path("stdlib"))
    names = [path.relative_to(root) for path in python_stdlib_files()]
    assert {Path("argparse.py"), Path("json/decoder.py")} <= set(names)
    assert all(name.suffix == ".py" for name in names)
    assert not any({"site-packages", "dist-packages", "__pycache__"} & set(name.parts) for name in names)
    assert names == sorted(names)
    assert sum((root / name).stat().st_size for name in names) > 5_000_000


def test_prepare_data_takes_the_python_stdlib(tmp_path):
    corpus = prepare(tmp_path, "--python_stdlib", "--max_bytes", "100k")
    assert len(corpus) == 100 * 1024
    assert corpus.split(b"\x1e")[0] in {path.read_bytes() for path in python_stdlib_files()}
