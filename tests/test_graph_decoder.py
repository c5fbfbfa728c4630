"""The recorded step against the model's own forward pass; without a GPU what would be recorded runs as it is."""

import pytest
import torch

import generate
from mingru import norm
from mingru.graph_decoder import GraphDecoder
from mingru.minLM import MinLMState, uninitialised
from mingru.sampling import SamplingOptions
from tests.test_decoder import SHAPES, make

LANES, STEPS = 3, 40
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that share so little work mostly wait for each other, on a busy machine for long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def steps_of(model, seed=5):
    """Tokens, and where documents start: nowhere, in some lanes and in all of them, also twice in a row."""
    generator = torch.Generator().manual_seed(seed)
    ids_TN = torch.randint(model.config.num_tokens, (STEPS, LANES), generator=generator)
    reset_TN = torch.rand(STEPS, LANES, generator=generator) < 0.2
    reset_TN[7:9], reset_TN[20:30] = True, False
    return zip(ids_TN, reset_TN, strict=True)


def clone(state):
    return MinLMState(*(None if part is None else part.clone() for part in state))


@torch.no_grad()
def follow(model, device, **tolerance):
    """Both forms side by side; a step without resets may come without a mask."""
    model.to(device)
    decoder, state = GraphDecoder(model, LANES), model(torch.randint(11, (LANES, 6), device=device))[1]
    expected = clone(state)
    for number, (ids_N, reset_N) in enumerate(steps_of(model)):
        logits_NV, state = decoder.step(ids_N, state, reset_N if reset_N.any() or number % 2 else None)
        expected_N1V, expected = model(ids_N.to(device)[:, None], expected, reset_N.to(device)[:, None])
        torch.testing.assert_close(logits_NV, expected_N1V[:, 0], **tolerance)
        torch.testing.assert_close(state.hidden, expected.hidden, **tolerance)
        if expected.conv is not None:
            torch.testing.assert_close(state.conv, expected.conv, **tolerance)


@DTYPES
@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())
def test_steps_are_the_models_own_bit_for_bit(config, dtype):
    follow(make(config, dtype), "cpu", rtol=0, atol=0)


@needs_gpu
@DTYPES
@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())
def test_replayed_steps_are_the_models_own_on_a_gpu(config, dtype):
    tolerance = 1e-5 if dtype == torch.float32 else 0.02  # a product's terms may be added in another order
    follow(make(config, dtype), "cuda", rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["plain", "conv", "no feed-forward"])
def test_what_is_recorded_asks_for_no_value_and_leaves_the_device_alone(name, monkeypatch):
    """On the meta device, which has no values to decide by, none to copy to a host, and no place for a host's."""
    monkeypatch.setattr(norm, "kernels", lambda: None)  # C, which reads memory, and which no GPU has either
    decoder = GraphDecoder(uninitialised(SHAPES[name], torch.device("meta")).eval(), LANES)
    with torch.inference_mode():
        decoder._launch()
    assert decoder._logits_NV.shape == (LANES, 256) and decoder._logits_NV.is_meta


@torch.no_grad()
def test_step_leaves_a_state_that_is_not_its_own():
    model = make(SHAPES["conv"])
    _, state = model(torch.randint(256, (1, 6)))
    before, decoder = clone(state), GraphDecoder(model, 1)
    first = decoder.step(torch.tensor([7]), state)[0].clone()
    decoder.step(torch.tensor([9]), state)
    assert torch.equal(decoder.step(torch.tensor([7]), state)[0], first)
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))


@pytest.mark.parametrize("ids", [torch.tensor([256]), torch.tensor([-1]), torch.tensor([1], dtype=torch.int32)])
def test_step_refuses_what_is_no_token(ids):
    model = make(SHAPES["plain"])
    with pytest.raises(ValueError, match="expected int64 tokens from 0 to 255"):
        GraphDecoder(model, 1).step(ids, model.initial_state(1))


def test_fits_a_gpu_alone():
    assert not GraphDecoder.fits(make(SHAPES["plain"]))
    assert not GraphDecoder.fits(uninitialised(SHAPES["plain"], torch.device("meta")))


def greedy(model, device):
    model.to(device)
    logits_BV, state = generate.prefill(model, b"a prompt\x1eto go on from", 0x1E)
    lanes, options = [0, 0], SamplingOptions(temperature=0)
    return list(
        generate.decode(model, logits_BV[lanes], state.lanes(lanes), 30, options, torch.Generator(), 0x1E)
    )  # fmt: skip


def test_decode_goes_through_the_recorded_step(monkeypatch):
    """The same bytes, whichever takes the steps."""
    model, seen = make(SHAPES["conv"]), []
    expected = greedy(model, "cpu")
    monkeypatch.setattr(generate, "choose_decoder", lambda *given: seen.append(GraphDecoder(*given)) or seen[0])
    assert greedy(model, "cpu") == expected and len(seen) == 1


@needs_gpu
def test_decode_replays_on_a_gpu(monkeypatch):
    model = make(SHAPES["conv"]).to("cuda")
    assert isinstance(generate.choose_decoder(model, 2), GraphDecoder)
    found = greedy(model, "cuda")
    monkeypatch.setattr(generate, "choose_decoder", lambda *given: None)
    assert greedy(model, "cuda") == found
