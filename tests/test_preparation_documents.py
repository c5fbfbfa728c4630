"""Every kind of file that prepare_data.py reads, and what becomes of broken ones."""

import gzip
import io
import json
import sys
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import prepare_data
from preparation import documents, json_lines
from preparation.documents import check_files, read_pieces
from runtime.errors import UserError

TEXTS = ["first\nof all", "", 'quotes " and \\ backslashes \\u0041', "naïve 😀 \x01\x7f", "a bound\x1eary", "last"]


def zst(content: bytes) -> bytes:
    """Two frames, the first without its content's size, as streamed compression writes it."""
    zstandard = pytest.importorskip("zstandard")
    half = len(content) // 2
    first = zstandard.ZstdCompressor().compressobj()
    return first.compress(content[:half]) + first.flush() + zstandard.ZstdCompressor().compress(content[half:])


def json_lines_of(texts, field="text", **dumping) -> bytes:
    lines = [json.dumps({"id": number, field: text}, **dumping) for number, text in enumerate(texts)]
    return ("\n".join(lines) + "\n\n").encode()


def write_parquet(path, texts, kind="string", field="text"):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {"id": list(range(len(texts))), field: arrow.array(texts, type=getattr(arrow, kind)())}
    parquet.write_table(arrow.table(columns), path, row_group_size=2)


def whole_documents(path, field="text", position=0) -> list[bytes]:
    found = [b""]
    for piece in read_pieces(path, field, position):
        found[-1] += piece.content
        if piece.ends:
            found.append(b"")
    assert found.pop() == b""
    return found


@pytest.fixture(params=["plain", "gz", "zst", "jsonl", "jsonl.gz", "JSONL.ZST", "parquet"])
def kind_of_file(request, tmp_path):
    """A file, and the documents in it."""
    path, encoded = tmp_path / f"file.{request.param}", [text.encode() for text in TEXTS]
    if request.param == "parquet":
        write_parquet(path, [None if text == "" else text for text in TEXTS])
        return path, encoded
    content = json_lines_of(TEXTS) if "jsonl" in request.param.lower() else b"\n".join(encoded)
    pack = {"gz": lambda raw: gzip.compress(raw[:9]) + gzip.compress(raw[9:]), "zst": zst}
    path.write_bytes(pack.get(request.param.lower().split(".")[-1], bytes)(content))
    return path, encoded if "jsonl" in request.param.lower() else [content]


def test_read_pieces_gives_the_documents_of_every_kind(kind_of_file):
    path, expected = kind_of_file
    assert whole_documents(path) == expected
    assert path.stat().st_size - 1 <= [piece.raw for piece in read_pieces(path, "text")][-1] <= path.stat().st_size


def test_read_pieces_goes_on_from_any_position(kind_of_file, monkeypatch):
    path, _ = kind_of_file
    monkeypatch.setattr(documents, "PIECE_BYTES", 7)
    pieces = list(read_pieces(path, "text"))
    assert len(pieces) > 5
    for number, piece in enumerate(pieces):
        rest = [(p.content, p.ends, p.position) for p in read_pieces(path, "text", piece.position)]
        assert [p for p in rest if p[0]] == [(p.content, p.ends, p.position) for p in pieces[number + 1 :] if p.content]


@pytest.mark.parametrize("kind", ["large_string", "binary", "large_binary"])
def test_read_pieces_takes_every_type_of_text_column(tmp_path, kind):
    write_parquet(tmp_path / "x.parquet", [text.encode() if "binary" in kind else text for text in TEXTS], kind, "body")
    assert whole_documents(tmp_path / "x.parquet", "body") == [text.encode() for text in TEXTS]


def test_text_field_names_where_the_text_is(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(json_lines_of(["here"], field="content"))
    prepare_data.main([str(tmp_path / "x.jsonl"), "--output", str(tmp_path / "out"), "--text-field", "content"])
    assert (tmp_path / "out").read_bytes() == b"here"


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    text=st.text(alphabet='a"\\/\n\x00\x1eäé☃😀u\ud83d\ude00', max_size=30),
    other=st.dictionaries(
        st.sampled_from(['"text"', ",", "{", "k", "text "]),
        st.sampled_from(["", '"text":', "\\", {"text": "x"}, [1, "{"]]),
    ),
    first=st.booleans(),
    as_ascii=st.booleans(),
    line_bytes=st.integers(1, 20),
    piece_bytes=st.integers(1, 20),
)
def test_json_lines_long_lines_are_like_short_ones(text, other, first, as_ascii, line_bytes, piece_bytes):
    line = {"text": text, **other} if first else {**other, "text": text}
    halves = any("\ud800" <= letter <= "\udfff" for letter in text)  # which only an escape may be
    content = (json.dumps(line, ensure_ascii=as_ascii or halves) + "\n").encode() * 2
    expected = json.loads(content.splitlines()[0])["text"].encode("utf-8", "surrogatepass")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_lines, "LINE_BYTES", line_bytes)
        patch.setattr(json_lines, "PIECE_BYTES", piece_bytes)
        pieces = list(json_lines.texts(io.BytesIO(content), "text", 0))
    assert b"".join(piece for piece, _ in pieces) == expected * 2
    assert [after for _, after in pieces if after is not None] == [len(content) // 2, len(content)]


@pytest.mark.parametrize(
    "halves", [r"\ud83d\ude00", r"\ud83d", r"\ude00", r"x\\ud83d", r"\ud83d\u0041", r"\\\ud83d\ude00"]
)
@pytest.mark.parametrize("line_bytes", [1, 3, 10, 16, 17, 20, 22, 1000])
def test_json_lines_surrogates_in_any_pieces(halves, line_bytes, monkeypatch):
    monkeypatch.setattr(json_lines, "LINE_BYTES", line_bytes)
    monkeypatch.setattr(json_lines, "PIECE_BYTES", 1)
    content = f'{{"text": "{halves}"}}'.encode()
    expected = json.loads(content)["text"].encode("utf-8", "surrogatepass")
    assert b"".join(piece for piece, _ in json_lines.texts(io.BytesIO(content), "text", 0)) == expected


BAD_LINES = {
    "no JSON": (b"{text: 1}\n", "expected JSON"),
    "cut": (b'{"text": "some', "expected JSON"),
    "cut behind the text": (b'{"text": "some"', "expected JSON"),
    "two values": (b'{"text": "some"} {}\n', "expected JSON"),
    "a list": (b'["text"]\n', "got a list"),
    "no field": (b'{"txt": "some"}\n', "got 'txt'"),
    "a number": (b'{"text": 12}\n', "got a int"),
    "no UTF-8": (b'{"text": "\xff\xfe"}\n', "expected JSON in UTF-8"),
    "a control character": (b'{"text": "a\x01b"}\n', "expected JSON"),
    "a bad escape": (b'{"text": "a\\qb"}\n', "expected JSON"),
}


@pytest.mark.parametrize("line_bytes", [4, 1000], ids=["in pieces", "whole"])
@pytest.mark.parametrize("kind", BAD_LINES)
def test_json_lines_bad_line_is_named_by_its_place(tmp_path, monkeypatch, kind, line_bytes):
    monkeypatch.setattr(json_lines, "LINE_BYTES", line_bytes)
    line, said = BAD_LINES[kind]
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "good"}\n' + line)
    with pytest.raises(UserError) as caught:
        list(read_pieces(tmp_path / "x.jsonl", "text"))
    message = str(caught.value)
    assert said in message and "byte 17 of" in message and "x.jsonl" in message and "\n" not in message


def test_json_lines_long_line_with_two_texts_or_too_much_beside_is_refused(monkeypatch):
    monkeypatch.setattr(json_lines, "LINE_BYTES", 4)
    monkeypatch.setattr(json_lines, "REST_BYTES", 50)
    for content, said in ((b'{"text": "a", "text": "b"}', "twice"), (b'{"x": "%s"}' % bytes(60), "at most 50 bytes")):
        with pytest.raises(json_lines.BadLineError, match=said):
            list(json_lines.texts(io.BytesIO(content), "text", 0))


def test_json_lines_memory_does_not_grow_with_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(json_lines, "LINE_BYTES", 1 << 18)
    monkeypatch.setattr(json_lines, "PIECE_BYTES", 1 << 18)
    with open(tmp_path / "x.jsonl", "wb") as file:
        file.write(b'{"text": "' + (b"a thousand bytes" * 64 + b"\\n") * (12 << 10) + b'"}\n')
    tracemalloc.start()
    try:
        total = sum(len(piece.content) for piece in read_pieces(tmp_path / "x.jsonl", "text"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == 1025 * (12 << 10) and peak < 5 << 20


@pytest.mark.parametrize("damage", ["cut", "flipped", "other"])
@pytest.mark.parametrize("suffix", ["gz", "zst", "parquet"])
def test_read_pieces_refuses_a_damaged_file_in_one_line(tmp_path, suffix, damage):
    path, content = tmp_path / f"x.{suffix}", bytes(range(256)) * 1000
    if suffix == "parquet":
        write_parquet(path, ["text"] * 1000)
        content = path.read_bytes()
    else:
        content = gzip.compress(content) if suffix == "gz" else zst(content)
    flipped = content[:-9] + bytes(9) if suffix == "parquet" else bytes(9) + content[9:]
    path.write_bytes({"cut": content[:-5], "other": b"This is a text." * 9, "flipped": flipped}[damage])
    with pytest.raises(UserError, match=rf"expected a readable, whole file, got .*x\.{suffix}") as caught:
        list(read_pieces(path, "text"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "values, field, said", [(["x"], "body", r"the column 'body'.*got id, text"), ([1], "text", "got int64")]
)
def test_read_pieces_refuses_a_parquet_column_without_texts(tmp_path, values, field, said):
    write_parquet(tmp_path / "x.parquet", values, "string" if values == ["x"] else "int64")
    with pytest.raises(UserError, match=said):
        list(read_pieces(tmp_path / "x.parquet", field))


@pytest.mark.parametrize(
    "name, package", [("x.zst", "zstandard"), ("x.jsonl.zst", "zstandard"), ("x.parquet", "pyarrow")]
)
def test_prepare_data_says_which_package_is_missing_before_it_begins(tmp_path, monkeypatch, name, package):
    (tmp_path / name).write_bytes(b"anything")
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(UserError, match=rf"expected the package {package} .* pip install -r requirements-data\.txt"):
        prepare_data.main([str(tmp_path / name), "--output", str(tmp_path / "out")])
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_prepare_data_warns_of_files_that_it_does_not_unpack(tmp_path, capsys):
    for name in ("a.txt", "b.tar.gz", "c.xz"):
        (tmp_path / name).write_bytes(gzip.compress(b"c"))
    check_files(sorted(tmp_path.iterdir()))
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"warning: 2 packed files, such as {tmp_path}/b.tar.gz, stay packed: ")


def test_prepare_data_refuses_a_compressed_parquet_file(tmp_path):
    (tmp_path / "x.parquet.gz").write_bytes(b"anything")
    with pytest.raises(UserError, match="decompress it"):
        prepare_data.main([str(tmp_path), "--output", str(tmp_path / "out")])


def test_zst_content_of_high_compression_comes_in_bounded_pieces(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "x.zst").write_bytes(zstandard.ZstdCompressor().compress(bytes(256 << 20)))
    tracemalloc.start()
    try:
        total = sum(len(piece.content) for piece in read_pieces(tmp_path / "x.zst", "text"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == 256 << 20 and peak < 100 << 20
