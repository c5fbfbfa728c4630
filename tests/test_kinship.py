"""Real nodes that must not mix: other tensors, other data, another run. Not a byte of weights moves."""

import functools

import pytest
import torch

import train
from bench.injection import Injection
from gossip.evolutionary_node import EvolutionaryNode
from gossip.faults import Fault
from gossip.protocol import MERGE_METHODS, VERSION
from gossip.state import Rule, Schema
from tests.gossip_helpers import Rank, counted, last_event, ranks, until, values_of

TERMS = {"data": "5a" * 32, "sf_beta": 0.9}


def state(value, shape=(30, 7), dtype=torch.float32, names="yzv", moments="v", terms=TERMS):
    live = {name: torch.full(shape, value, dtype=dtype) for name in names}
    rules = {name: Rule.SECOND_MOMENT if name in moments else Rule.WEIGHT for name in names}
    return live, Schema.of(live, rules, terms)


OTHERS = [
    pytest.param({"shape": (7, 30)}, id="shape", marks=pytest.mark.injects(Injection.WRONG_SHAPE)),
    pytest.param({"shape": (31, 7)}, id="size", marks=pytest.mark.injects(Injection.WRONG_SHAPE)),
    pytest.param({"dtype": torch.bfloat16}, id="dtype", marks=pytest.mark.injects(Injection.WRONG_DTYPE)),
    pytest.param({"dtype": torch.float64}, id="wider", marks=pytest.mark.injects(Injection.WRONG_DTYPE)),
    pytest.param({"names": "xzv"}, id="name", marks=pytest.mark.injects(Injection.WRONG_NAMES)),
    pytest.param({"names": "zyv"}, id="order", marks=pytest.mark.injects(Injection.WRONG_NAMES)),
    pytest.param({"names": "yv"}, id="missing", marks=pytest.mark.injects(Injection.WRONG_NAMES)),
    pytest.param({"moments": ""}, id="rule", marks=pytest.mark.injects(Injection.WRONG_NAMES)),
    pytest.param({"terms": {**TERMS, "data": "5b" * 32}}, id="data", marks=pytest.mark.injects(Injection.WRONG_DATA)),
    pytest.param({"terms": {"sf_beta": 0.9}}, id="no-data", marks=pytest.mark.injects(Injection.WRONG_DATA)),
]


def meet(one, other, one_fault, other_fault):
    """`one` calls: both ends name their fault, and nothing was merged nor even copied for it."""
    one.call()
    until(lambda: counted(one, failed=1) and counted(other, failed=1), one, other)
    for rank, fault in ((one, one_fault), (other, other_fault)):
        assert last_event(rank)["message"].startswith(fault.value)
        assert counted(rank, won=0, lost=0, tied=0, busy=0)
        assert rank.node.counters.bytes_received < 2000
        assert not any(rank.node._desk.receive_buffer.bytes) and not any(rank.node._desk.send_buffer.bytes)
    assert values_of(one) == {1.0} and values_of(other) == {3.0}


@pytest.mark.parametrize("method", MERGE_METHODS)
@pytest.mark.parametrize("adopts", [False, True], ids=["fitter", "elder"])
@pytest.mark.parametrize("changes", OTHERS)
def test_nodes_of_other_schemas_tell_each_other_and_move_no_weights(tmp_path, changes, method, adopts):
    other = Rank(tmp_path, 1, state=state(3.0, **changes), method=method)
    one = Rank(tmp_path, 0, state=state(1.0), method=method, peers=(other.node.address,))
    with ranks(one, other):
        one.fitness, other.fitness, one.lineage = 1.0, 2.0, 1000 * adopts
        one.boundary()
        other.boundary()
        meet(one, other, Fault.SCHEMA_MISMATCH, Fault.SCHEMA_MISMATCH)
        for rank in (one, other):  # each says both heads, so that a person can tell who differs
            assert all(each.schema.hash[:12] in last_event(rank)["message"] for each in (one, other))


@pytest.mark.injects(Injection.WRONG_RUN)
def test_nodes_of_other_runs_cannot_authenticate(tmp_path):
    other = Rank(tmp_path, 1, 3.0, run_id="another")
    one = Rank(tmp_path, 0, 1.0, peers=(other.node.address,))
    with ranks(one, other):
        meet(one, other, Fault.REFUSED, Fault.WRONG_SECRET)


@pytest.mark.injects(Injection.WRONG_VERSION)
def test_nodes_of_other_versions_have_other_schemas_even_past_the_opening(tmp_path, monkeypatch):
    other = Rank(tmp_path, 1, state=state(3.0))
    ours = other.schema.hash
    with monkeypatch.context() as patch:
        patch.setattr("gossip.state.VERSION", VERSION + 1)
        one = Rank(tmp_path, 0, state=state(1.0), peers=(other.node.address,))
        assert one.schema.hash != ours
    with ranks(one, other):
        meet(one, other, Fault.SCHEMA_MISMATCH, Fault.SCHEMA_MISMATCH)


@pytest.fixture
def hashes(monkeypatch):
    """The hashes of the schemas of the nodes that train.py makes, in the order it makes them."""
    found, real = [], EvolutionaryNode.__init__

    @functools.wraps(real)
    def seen(node, *arguments, schema, **named):
        found.append(schema.hash)
        real(node, *arguments, schema=schema, **named)

    monkeypatch.setattr(EvolutionaryNode, "__init__", seen)
    return found


@pytest.mark.injects(Injection.WRONG_DATA)
def test_train_gives_ranks_on_other_data_other_schemas(run_train, text, tmp_path, hashes):
    content = text.read_bytes()
    other = tmp_path / "other.txt"
    other.write_bytes(content.replace(b"quick", b"quack", 1))  # as long, and a letter of it differs
    for number, data in enumerate((text, text, other)):
        run_train(f"run_{number}", "--train_steps", "1", "--data", str(data))
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize(
    "flags",
    [
        ["--seed", "7"],
        ["--val_fraction", "0.25"],
        ["--val_fraction", "0"],
        ["--val_data", "other.txt"],
        ["--init_from", "run"],
    ],
    ids=" ".join,
)
def test_train_gives_ranks_of_another_start_or_other_held_out_bytes_other_schemas(
    run_train, text, tmp_path, hashes, flags
):
    (tmp_path / "other.txt").write_bytes(text.read_bytes()[::-1])
    run_train("run", "--train_steps", "1")
    run_train("another", "--train_steps", "1", *flags)
    assert hashes[0] != hashes[1]


@pytest.mark.parametrize(
    "flags",
    [
        ["--lr", "0.1"],
        ["--batch_size", "3"],
        ["--probe_every", "7"],
        ["--dtype", "bf16"],
        ["--val_fraction", "0.05001"],  # the same bytes
    ],
    ids=" ".join,
)
def test_train_lets_ranks_meet_that_train_otherwise(run_train, hashes, flags):
    run_train("run", "--train_steps", "1")
    run_train("another", "--train_steps", "1", *flags)
    assert hashes[0] == hashes[1]


def test_train_gives_ranks_that_begin_from_one_file_one_schema_whatever_their_seed(run_train, hashes):
    run_train("first", "--train_steps", "1")
    for seed in ("1", "2"):
        run_train(f"run_{seed}", "--train_steps", "1", "--init_from", "first", "--seed", seed)
    train.main(["--resume", "run_1", "--train_steps", "2"])
    assert hashes[0] != hashes[1] == hashes[2] == hashes[3]
