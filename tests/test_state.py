"""The schema's hash and layout, the flat buffers, and the checks on what arrives."""

import math

import pytest
import torch

from bench.injection import Injection
from gossip import state_native
from gossip.faults import Fault
from gossip.state import ALIGNMENT, Rule, Schema, StateBuffer, payload_fault, weight_energy
from runtime.errors import UserError

TERMS = {"sf_beta": 0.9, "merge_method": "average"}


def schema_of(tensors, moments=(), terms=TERMS):
    rules = {name: Rule.SECOND_MOMENT if name in moments else Rule.WEIGHT for name in tensors}
    return Schema.of(tensors, rules, terms)


def test_schema_hash_is_the_same_for_the_same_state():
    assert schema_of({"y": torch.ones(3)}).hash == schema_of({"y": torch.zeros(3)}, terms=dict(TERMS)).hash


@pytest.mark.injects(Injection.WRONG_NAMES, Injection.WRONG_SHAPE, Injection.WRONG_DTYPE)
@pytest.mark.parametrize(
    "other",
    [
        schema_of({"x": torch.ones(3, 2), "v": torch.ones(2)}, ["v"]),
        schema_of({"y": torch.ones(2, 3), "v": torch.ones(2)}, ["v"]),
        schema_of({"y": torch.ones(3, 2).half(), "v": torch.ones(2)}, ["v"]),
        schema_of({"v": torch.ones(2), "y": torch.ones(3, 2)}, ["v"]),
        schema_of({"y": torch.ones(3, 2)}),
        schema_of({"y": torch.ones(3, 2), "v": torch.ones(2)}, []),
        schema_of({"y": torch.ones(3, 2), "v": torch.ones(2)}, ["v"], {**TERMS, "sf_beta": 0.95}),
        schema_of({"y": torch.ones(3, 2), "v": torch.ones(2)}, ["v"], {"sf_beta": 0.9}),
    ],
    ids=["name", "shape", "dtype", "order", "missing", "rule", "term", "missing-term"],
)
def test_schema_hash_differs_for_another(other):
    assert other.hash != schema_of({"y": torch.ones(3, 2), "v": torch.ones(2)}, ["v"]).hash


def test_schema_hash_depends_on_the_protocol_version(monkeypatch):
    before = schema_of({"y": torch.ones(3)}).hash
    monkeypatch.setattr("gossip.state.VERSION", 0)
    assert schema_of({"y": torch.ones(3)}).hash != before


def test_schema_spans_cover_the_payload_without_gaps():
    tensors = {"a.y": torch.ones(5), "b.y": torch.ones(100), "a.v": torch.ones(5), "c.y": torch.ones(1).double()}
    schema = schema_of(tensors, ["a.v"])
    assert [(span.dtype, span.rule) for span in schema.spans] == [
        ("float32", Rule.WEIGHT), ("float32", Rule.SECOND_MOMENT), ("float64", Rule.WEIGHT),
    ]  # fmt: skip
    assert schema.spans[0].start == 0 and schema.spans[-1].stop == schema.nbytes
    assert all(a.stop == b.start for a, b in zip(schema.spans, schema.spans[1:], strict=False))


def test_state_buffer_holds_what_was_copied_at_aligned_places():
    tensors = {"y": torch.randn(7, 3), "h": torch.randn(5).bfloat16(), "v": torch.rand(2, 2).double()}
    schema = schema_of(tensors, ["v"])
    buffer = StateBuffer(schema)
    assert buffer.copy_from(tensors) is None
    for name, tensor in tensors.items():
        assert torch.equal(buffer.views[name], tensor)
        assert buffer.views[name].data_ptr() % ALIGNMENT == 0
    assert len(buffer.bytes) == schema.nbytes == 128 + 64 + 64


def test_state_buffer_of_received_bytes_shows_the_sent_tensors():
    tensors = {"y": torch.randn(70, 3), "v": torch.rand(9)}
    schema = schema_of(tensors, ["v"])
    ours, theirs = StateBuffer(schema), StateBuffer(schema)
    ours.copy_from(tensors)
    theirs.bytes[:] = ours.bytes
    assert all(torch.equal(theirs.views[name], tensor) for name, tensor in tensors.items())


class Runtime:
    """Stands in for a GPU's runtime library: what is registered, in bytes by address."""

    def __init__(self, status=0):
        self.status, self.registered = status, {}

    def cudaHostRegister(self, address, nbytes, flags):
        self.registered[address] = nbytes
        return self.status

    def cudaHostUnregister(self, address):
        del self.registered[address]
        return 0


def test_state_buffer_for_a_gpu_locks_its_own_bytes_until_it_goes(monkeypatch):
    """Not the next power of two, as torch's pinned memory does."""
    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    tensors = {"y": torch.randn(5000, 3), "v": torch.rand(9)}
    schema = schema_of(tensors, ["v"])
    ours, theirs = StateBuffer(schema, pin=True), StateBuffer(schema, pin=True)
    ours.copy_from(tensors)
    assert all(torch.equal(ours.views[name], tensor) for name, tensor in tensors.items())
    assert runtime.registered == {buffer.views["y"].data_ptr(): schema.nbytes for buffer in (ours, theirs)}
    kept = theirs.views["y"].data_ptr()
    del ours
    assert list(runtime.registered) == [kept]


def test_state_buffer_for_a_gpu_that_cannot_be_locked_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Runtime(status=2))
    with pytest.raises(UserError, match="GiB of host memory for a GPU's copies, got its runtime's error 2: choose"):
        StateBuffer(schema_of({"y": torch.ones(3)}), pin=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_state_buffer_on_a_gpu_is_locked_memory_and_its_copy_is_exact():
    tensors = {"y": torch.randn(5000, 3), "v": torch.rand(9)}
    live = {name: tensor.to("cuda") for name, tensor in tensors.items()}
    buffer = StateBuffer(schema_of(tensors, ["v"]), pin=True)
    assert all(view.is_pinned() for view in buffer.views.values())
    buffer.copy_from(live).synchronize()
    assert all(torch.equal(buffer.views[name], tensor) for name, tensor in tensors.items())
    live["y"].copy_(-buffer.views["y"], non_blocking=True)
    assert torch.equal(live["y"].cpu(), -tensors["y"])
    del buffer, live
    StateBuffer(schema_of(tensors, ["v"]), pin=True)  # as the first, which is unlocked


DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.mark.injects(Injection.NAN, Injection.INFINITY)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("name", "value", "fault"),
    [
        ("y", math.nan, Fault.NOT_FINITE),
        ("y", math.inf, Fault.NOT_FINITE),
        ("y", -math.inf, Fault.NOT_FINITE),
        ("v", math.nan, Fault.NOT_FINITE),
        ("v", -1e-6, Fault.NEGATIVE_SECOND_MOMENT),
        ("v", -0.0, None),
        ("y", -6e4, None),
    ],
)
@pytest.mark.parametrize("place", [0, 511, 999])
def test_payload_fault_finds_a_value_anywhere(dtype, name, value, fault, place):
    tensors = {"y": torch.ones(1000, dtype=dtype), "v": torch.ones(1000, dtype=dtype)}
    schema = schema_of(tensors, ["v"])
    tensors[name][place] = value
    buffer = StateBuffer(schema)
    buffer.copy_from(tensors)
    assert payload_fault(schema, 0, buffer.bytes) is fault
    pieces = [payload_fault(schema, at, buffer.bytes[at : at + 64]) for at in range(0, schema.nbytes, 64)]
    assert [found for found in pieces if found] == ([fault] if fault else [])


@pytest.mark.parametrize("value", [3e38, -3e38, 1e31])
def test_payload_fault_refuses_what_a_merge_could_overflow_with(value):
    tensors = {"y": torch.full((64,), value)}
    schema = schema_of(tensors, [])
    buffer = StateBuffer(schema)
    buffer.copy_from(tensors)
    assert payload_fault(schema, 0, buffer.bytes) is Fault.NOT_FINITE


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_energy_sums_the_squares_of_weights_alone_piece_by_piece(dtype):
    tensors = {"y": torch.randn(1000), "v": torch.rand(1000) * 100, "z": torch.randn(70, 3) * 200}
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    schema = schema_of(tensors, ["v"])
    buffer = StateBuffer(schema)
    buffer.copy_from(tensors)
    expected = sum(float(tensors[name].double().square().sum()) for name in "yz")
    assert expected > 65504  # more than a half could hold
    assert weight_energy(schema, 0, buffer.bytes) == pytest.approx(expected, rel=1e-5)
    pieces = [weight_energy(schema, at, buffer.bytes[at : at + 192]) for at in range(0, schema.nbytes, 192)]
    assert sum(pieces) == pytest.approx(expected, rel=1e-5)


def test_weight_energy_of_what_single_precision_cannot_square_is_infinite():
    schema = schema_of({"y": torch.full((64,), 1e30)}, [])
    buffer = StateBuffer(schema)
    buffer.copy_from({"y": torch.full((64,), 1e30)})
    assert weight_energy(schema, 0, buffer.bytes) == math.inf


@pytest.mark.parametrize("compiled", [True, False], ids=["in C", "by numpy"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 2e30, -2e30, -1.0, None], ids=str)
@pytest.mark.parametrize("place", [0, 5, 998, 999])
def test_checks_in_c_equal_numpys(compiled, bad, place, monkeypatch):
    tensors = {"y": torch.randn(1000), "v": torch.rand(1000)}
    schema, buffer = schema_of(tensors, ["v"]), StateBuffer(schema_of(tensors, ["v"]))
    if bad is not None:
        tensors["v"][place] = bad
    buffer.copy_from(tensors)
    assert state_native.kernels() is not None
    if not compiled:
        monkeypatch.setattr(state_native, "kernels", lambda: None)
    fault = None if bad is None else Fault.NEGATIVE_SECOND_MOMENT if bad == -1.0 else Fault.NOT_FINITE
    assert payload_fault(schema, 0, buffer.bytes) is fault
    expected = float(tensors["y"].double().square().sum())
    assert weight_energy(schema, 0, buffer.bytes) == pytest.approx(expected, rel=1e-5)
