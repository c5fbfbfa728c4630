import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from runtime.errors import UserError
from training.data import Corpus, LaneReader, Region, find_files, validation_chunks

END = 0x1E


def corpus_of(tmp_path, *contents: bytes, delimiter: int | None = END) -> Corpus:
    paths = []
    for number, content in enumerate(contents):
        path = tmp_path / f"part_{number}"
        path.write_bytes(content)
        paths.append(path)
    return Corpus(paths, delimiter)


def whole(corpus: Corpus) -> Region:
    return Region(corpus, 0, len(corpus))


def reader(region: Region, batch_size=2, chunk_size=5, rank=0, world_size=1, seed=0, groups=1) -> LaneReader:
    return LaneReader(region, batch_size, chunk_size, rank=rank, world_size=world_size, seed=seed, groups=groups)


def test_find_files_takes_files_folders_and_globs_each_once(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("b.txt", "a.txt", "deep/c.txt", "deep/er/d.md"):
        (tmp_path / name).write_text("x")
    names = [path.name for path in find_files([f"{tmp_path}/*.txt", f"{tmp_path}/a.txt", f"{tmp_path}/deep"])]
    assert names == ["a.txt", "b.txt", "c.txt", "d.md"]


def test_find_files_follows_links_to_folders_and_ends_in_a_loop(tmp_path):
    for folder in ("data/own", "elsewhere/below"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "text").write_text("x")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "again").symlink_to(tmp_path / "elsewhere" / "below")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "data")
    found = find_files([f"{tmp_path}/data"])
    assert sorted(found) == [tmp_path / "data/own/text", tmp_path / "elsewhere/below/text"]


def test_find_files_says_which_pattern_names_nothing(tmp_path):
    with pytest.raises(UserError, match="nothing_here"):
        find_files([f"{tmp_path}/nothing_here*"])


def test_find_files_refuses_a_folder_that_it_may_not_list():
    """What is in it would be missing from the corpus, and nobody would know. As root it acts as somebody else."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path in (folder, folder / "open", folder / "locked"):
            path.mkdir(exist_ok=True)
            path.chmod(0o755)
            (path / "text.txt").write_text("x")
        for name in ("locked", "open/.hidden", "open/lost+found"):
            (folder / name).mkdir(exist_ok=True)
            (folder / name).chmod(0)
        before = os.geteuid()
        os.seteuid(before or 65534)
        try:
            assert len(find_files([f"{folder}/*.txt", f"{folder}/open/**/*.txt", f"{folder}/open/text.*"])) == 2
            for pattern in (
                f"{folder}",
                f"{folder}/**/*.txt",
                f"{folder}/*/*.txt",
                f"{folder}/l*",
                f"{folder}/locked/text.txt",
            ):
                with pytest.raises(UserError, match=r"expected data at .* that may be read, got .*Permission denied"):
                    find_files([pattern])
        finally:
            os.seteuid(before)
        for name in ("locked", "open/.hidden", "open/lost+found"):
            (folder / name).chmod(0o755)


@pytest.mark.parametrize("target", ["nothing", "link", "text/below"])
@pytest.mark.parametrize("pattern", ["", "*", "link", "*/x", "**/x", "**"])
def test_find_files_refuses_links_to_nothing(tmp_path, target, pattern):
    (tmp_path / "text").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x").write_text("x")
    if pattern:  # as a glob passes over it
        (tmp_path / "folder" / ".hidden").symlink_to("nothing")
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(UserError, match=r"got a link to nothing, .*/link: bring back what it names, or remove it"):
        find_files([str(tmp_path / pattern)])


def test_find_files_says_that_a_name_is_too_long(tmp_path):
    with pytest.raises(UserError, match="File name too long"):
        find_files([f"{tmp_path}/{'x' * 300}"])


def test_corpus_joins_files_with_the_delimiter_they_lack(tmp_path):
    corpus = corpus_of(tmp_path, b"one\x1e", b"", b"two", b"three\x1e")
    assert bytes(corpus.read(0, len(corpus))) == b"one\x1etwo\x1ethree\x1e"
    assert bytes(corpus.read(2, 7)) == b"e\x1etwo"
    assert len(corpus_of(tmp_path, b"one", b"two", delimiter=None)) == 6


def test_corpus_refuses_nothing_but_empty_files(tmp_path):
    with pytest.raises(UserError, match="empty"):
        corpus_of(tmp_path, b"", b"")


def test_corpus_fingerprint_tells_data_apart(tmp_path):
    same = corpus_of(tmp_path, b"abc").fingerprint
    assert same == corpus_of(tmp_path, b"abc").fingerprint
    others = [
        corpus_of(tmp_path, b"abd"),
        corpus_of(tmp_path, b"abc", delimiter=None),
        corpus_of(tmp_path, b"ab", b"c"),
    ]
    assert len({same, *(other.fingerprint for other in others)}) == 4


def test_split_cuts_behind_the_next_document_end(tmp_path):
    training, held_out = corpus_of(tmp_path, b"aaaa\x1ebbbb\x1ecccc\x1e").split(0.5)
    assert bytes(training.read(0, len(training))) == b"aaaa\x1ebbbb\x1e"
    assert bytes(held_out.read(0, len(held_out))) == b"cccc\x1e"


def test_split_without_documents_cuts_at_the_fraction(tmp_path):
    training, held_out = corpus_of(tmp_path, b"x" * 100, delimiter=None).split(0.1)
    assert (len(training), len(held_out)) == (90, 10)
    assert corpus_of(tmp_path, b"x").split(0)[1] is None


@pytest.mark.parametrize(
    ("document_bytes", "held_out_bytes"), [(100, 50_000), (20_000, 40_000), (24_000, 40_000), (999_949, 50_000)]
)
def test_split_holds_out_at_least_half_of_what_was_asked_for(tmp_path, document_bytes, held_out_bytes):
    document = b"x" * (document_bytes - 1) + b"\x1e"
    corpus = corpus_of(tmp_path, (document * (1_000_000 // document_bytes + 1))[:1_000_000])
    training, held_out = corpus.split(0.05)
    assert len(training) + len(held_out) == len(corpus)
    assert held_out_bytes - 100 <= len(held_out) <= held_out_bytes + 1  # it ends with an added delimiter


def test_lanes_lose_no_byte_and_no_target_between_chunks(tmp_path):
    content = bytes(np.random.default_rng(0).integers(32, 127, 997, dtype=np.uint8)) + b"\x1e"
    region = whole(corpus_of(tmp_path, content))
    lanes = reader(region, batch_size=3, chunk_size=50)
    starts = lanes.positions.copy()
    chunks = [lanes.next_chunk() for _ in range(30)]  # one and a half times round
    inputs = np.concatenate([chunk.ids_BS[:, :-1] for chunk in chunks], axis=1)
    targets = np.concatenate([chunk.ids_BS[:, 1:] for chunk in chunks], axis=1)
    ring = np.frombuffer(content * 3, dtype=np.uint8)
    for lane, start in enumerate(starts):
        assert np.array_equal(inputs[lane], ring[start : start + 1500])
        assert np.array_equal(targets[lane], ring[start + 1 : start + 1501])


def test_lanes_reset_at_every_delimiter_and_nowhere_else(tmp_path):
    region = whole(corpus_of(tmp_path, b"ab\x1ecdef\x1eg\x1e"))
    lanes = reader(region, batch_size=1, chunk_size=4)
    for _ in range(10):
        chunk = lanes.next_chunk()
        assert np.array_equal(chunk.reset_BT, chunk.ids_BS[:, :-1] == END)


@pytest.mark.parametrize("delimiter", [END, None])
def test_lanes_reset_at_the_start_of_a_region_that_ends_inside_a_document(tmp_path, delimiter):
    region = Region(corpus_of(tmp_path, b"abcdefghij", delimiter=delimiter), 0, 7)  # "abcdefg", then round
    lanes = reader(region, batch_size=1, chunk_size=5)
    for _ in range(8):
        chunk = lanes.next_chunk()
        assert np.array_equal(chunk.reset_BT, chunk.ids_BS[:, :-1] == ord("a"))


def test_lanes_are_spread_over_ranks_and_depend_on_the_seed(tmp_path):
    region = whole(corpus_of(tmp_path, b"x" * 8000))
    places = [reader(region, batch_size=4, rank=rank, world_size=2).positions for rank in (0, 1)]
    assert [list(positions * 8 // len(region)) for positions in places] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert np.array_equal(places[0], reader(region, batch_size=4, rank=0, world_size=2).positions)
    assert not np.array_equal(places[0], reader(region, batch_size=4, rank=0, world_size=2, seed=1).positions)


def test_lanes_of_groups_take_turns_and_each_goes_on_where_it_was(tmp_path):
    content = bytes(np.random.default_rng(0).integers(32, 127, 999, dtype=np.uint8)) + b"\x1e"
    lanes = reader(whole(corpus_of(tmp_path, content)), batch_size=2, chunk_size=50, groups=3)
    starts, read = lanes.positions.copy(), {lane: b"" for lane in range(6)}
    assert list(starts * 6 // len(content)) == [0, 3, 1, 4, 2, 5]  # every group all over the region
    for step in range(12):
        assert lanes.turn == slice(step % 3 * 2, step % 3 * 2 + 2)
        whose = range(6)[lanes.turn]
        lanes.prefetch()
        for lane, ids_S in zip(whose, lanes.next_chunk().ids_BS, strict=True):
            read[lane] += bytes(ids_S[:-1])
    for lane, start in enumerate(starts):
        assert read[lane] == (content * 2)[start : start + 200]


def test_lanes_of_groups_restore_whose_turn_it_is(tmp_path):
    region = whole(corpus_of(tmp_path, bytes(range(32, 127)) * 20))
    lanes = reader(region, groups=3)
    for _ in range(4):
        lanes.next_chunk()
    state = lanes.state_dict()
    again = reader(region, seed=9, groups=3)
    again.load_state_dict(state)
    for _ in range(3):
        assert np.array_equal(again.next_chunk().ids_BS, lanes.next_chunk().ids_BS)
    fewer = reader(region, seed=9, groups=2)
    fewer.load_state_dict(state)
    assert fewer.turn == slice(2, 4) and list(fewer.positions) == state["positions"][:4]


def test_lanes_restore_their_place_and_give_new_lanes_their_own(tmp_path):
    region = whole(corpus_of(tmp_path, bytes(range(32, 127)) * 20))
    lanes = reader(region)
    lanes.next_chunk()
    state, following = lanes.state_dict(), lanes.next_chunk()
    again = reader(region, seed=9)
    again.load_state_dict(state)
    assert np.array_equal(again.next_chunk().ids_BS, following.ids_BS)
    wider = reader(region, batch_size=5)
    wider.load_state_dict(state)
    assert np.array_equal(wider.next_chunk().ids_BS[:2], following.ids_BS)
    other = reader(Region(region.corpus, 0, len(region) - 1))
    with pytest.raises(UserError, match="--data"):
        other.load_state_dict(state)


def test_lanes_refuse_data_shorter_than_a_chunk_and_its_target(tmp_path):
    corpus = corpus_of(tmp_path, b"12345", delimiter=None)
    reader(whole(corpus), batch_size=1, chunk_size=4)
    with pytest.raises(UserError, match="at least 6 bytes"):
        reader(whole(corpus), batch_size=1, chunk_size=5)


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_validation_reads_every_target_once(tmp_path, batch_size):
    content = bytes(range(32, 52)) + b"\x1e"
    seen = []
    for chunk in validation_chunks(whole(corpus_of(tmp_path, content)), batch_size, 4, 1000):
        assert np.array_equal(chunk.reset_BT, chunk.ids_BS[:, :-1] == END)
        seen += chunk.ids_BS[:, 1:].flatten().tolist()
    assert len(seen) == 20 - 20 % min(batch_size, 20)
    assert sorted(seen) == sorted(content[1 : 1 + len(seen)])


def test_validation_reads_no_more_than_it_may(tmp_path):
    chunks = list(validation_chunks(whole(corpus_of(tmp_path, b"x" * 500)), 2, 10, 101))
    assert sum(chunk.reset_BT.size for chunk in chunks) == 100


SPARSE = """
import resource, sys
from pathlib import Path
from training.data import Corpus, LaneReader
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
training, held_out = Corpus([Path(sys.argv[1])], 0x1E).split(0.05)
chunk = LaneReader(training, 8, 2048, rank=0, world_size=4, seed=0).next_chunk()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_corpus_opens_100_gb_at_once_in_constant_memory(tmp_path):
    path = tmp_path / "sparse"
    with open(path, "wb") as file:
        os.truncate(file.fileno(), 100 * 1000**3)
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", SPARSE, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root, timeout=60)
    grown_kb = int(done.stdout)
    assert grown_kb < 64 * 1024  # to read it all would take 100 GB, or the minutes that the time-out does not give
