"""prepare_data.py --stats."""

import gzip
import math
import random
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare_data
from preparation import statistics
from preparation.statistics import Statistics, measure, rounded_length
from runtime.errors import UserError


@pytest.mark.parametrize("piece_bytes", [1, 2, 3, 1 << 20])
def test_measure_counts_what_is_there(tmp_path, monkeypatch, piece_bytes):
    monkeypatch.setattr(statistics, "PIECE_BYTES", piece_bytes)
    documents = ["ä😀".encode(), b"", b"ab", "ä".encode()[:1], b"\xff" * 5, b"z" * 900]
    path = tmp_path / "corpus"
    path.write_bytes(b"\x1e".join(documents) + b"\x1e")
    found = measure(path)
    assert (found.bytes, found.documents, found.empty) == (path.stat().st_size, 5, 1)
    assert (found.non_utf8, found.non_utf8_bytes) == (2, 6)
    assert (found.shortest, found.longest, found.quantile(0.5), found.quantile(1)) == (1, 900, 5, 900)
    assert found.byte_counts[0x1E] == 6 and found.byte_counts[0xFF] == 5 and found.byte_counts.sum() == found.bytes
    (tmp_path / "corpus.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert prepare_data.report(measure(tmp_path / "corpus.gz")) == prepare_data.report(found)


@settings(deadline=None)
@given(st.lists(st.integers(1, 10**12), min_size=1, max_size=50), st.floats(0.01, 1))
def test_quantile_is_within_two_thousandths(lengths, share):
    found = Statistics()
    for length in lengths:
        found.add_document(length, True)
    exact = sorted(lengths)[max(0, math.ceil(share * len(lengths) - 1e-9) - 1)]
    assert found.quantile(share) == pytest.approx(exact, rel=2e-3)
    assert exact >= 1024 or found.quantile(share) == exact


def test_rounded_length_has_few_values():
    assert [rounded_length(length) for length in (1, 1023, 1024, 1025, 1026)] == [1, 1023, 1024, 1024, 1026]


def test_entropy_is_that_of_the_byte_values(tmp_path):
    (tmp_path / "corpus").write_bytes(bytes(range(16)) * 8)
    assert measure(tmp_path / "corpus").entropy() == pytest.approx(4)
    (tmp_path / "empty").write_bytes(b"")
    assert str(measure(tmp_path / "empty").entropy()) == "0.0"


def test_measure_memory_does_not_grow_with_a_corpus(tmp_path):
    dice = random.Random(0)
    with open(tmp_path / "corpus", "wb") as file:
        file.write(b"\x1e".join(bytes(dice.randrange(200)) for _ in range(50_000)) + bytes(24 << 20))
    measure(tmp_path / "corpus")
    tracemalloc.start()
    try:
        measure(tmp_path / "corpus")
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_stats_prints_a_report(tmp_path, capsys):
    (tmp_path / "corpus").write_bytes(b"one\x1etwo\x1e\xff")
    prepare_data.main(["--stats", str(tmp_path / "corpus")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["bytes         9", "documents     3"]
    assert lines[2].startswith("bytes of one  shortest 1, ") and lines[2].endswith("longest 3, mean 2")
    assert lines[3] == "no UTF-8      1 documents (33.33 %), 1 bytes (11.11 %)"


def test_stats_of_an_empty_or_absent_file(tmp_path, capsys):
    (tmp_path / "empty").touch()
    prepare_data.main(["--stats", str(tmp_path / "empty")])
    assert capsys.readouterr().out.startswith("bytes         0\n")
    with pytest.raises(UserError, match="expected a readable"):
        prepare_data.main(["--stats", str(tmp_path / "absent")])
