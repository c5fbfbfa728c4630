"""The step in C against the model's own forward pass."""

import pytest
import torch

from mingru import decoder
from mingru.decoder import Decoder
from mingru.minLM import MinLM, ModelConfig

SHAPES = {
    "plain": ModelConfig(dim=48, depth=3),
    "conv": ModelConfig(dim=40, depth=2, conv_kernel_size=4),
    "conv of one tap": ModelConfig(dim=20, depth=2, conv_kernel_size=1),
    "no feed-forward": ModelConfig(dim=36, depth=2, ff_mult=0),
    "no output projection": ModelConfig(dim=32, depth=2, expansion=1.0),
    "odd sizes": ModelConfig(dim=37, depth=2, expansion=1.37, ff_mult=0.7, conv_kernel_size=3),
    "few tokens": ModelConfig(dim=16, depth=1, num_tokens=11),
}


def make(config, dtype=torch.float32):
    torch.manual_seed(3)
    model = MinLM(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and gains start as zeros and ones, which would hide a mistake
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("lanes", [1, 3, 9])
@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())
@torch.no_grad()
def test_steps_equal_the_models_forward(config, lanes):
    model = make(config)
    ids_BT = torch.randint(config.num_tokens, (lanes, 20))
    expected_BTV, end = model(ids_BT)
    steps, state = Decoder(model), model(ids_BT[:, :5])[1]
    for t in range(5, 20):
        logits_BV, state = steps.step(ids_BT[:, t], state)
        torch.testing.assert_close(logits_BV, expected_BTV[:, t], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state.hidden, end.hidden, rtol=1e-4, atol=1e-5)
    if end.conv is not None:
        torch.testing.assert_close(state.conv, end.conv, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lanes", [1, 3, 9])
@pytest.mark.parametrize("name", ["conv", "odd sizes"])
@torch.no_grad()
def test_steps_with_bfloat16_weights_keep_float32_activations(name, lanes):
    """Nearer to the same rounded weights in float32 than the model's own bfloat16 pass is."""
    config = SHAPES[name]
    model, ids_BT = make(config, torch.bfloat16), torch.randint(256, (lanes, 12))
    exact_BTV, _ = make(config, torch.bfloat16).float()(ids_BT)
    steps, state = Decoder(model), model.initial_state(lanes)
    for t in range(12):
        logits_BV, state = steps.step(ids_BT[:, t], state)
        torch.testing.assert_close(logits_BV, exact_BTV[:, t], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_step_starts_a_document_afresh():
    model = make(SHAPES["conv"])
    _, state = model(torch.randint(256, (2, 6)))
    ids_B, reset_B = torch.tensor([30, 30]), torch.tensor([False, True])
    expected_B1V, expected = model(ids_B.unsqueeze(1), state, reset_B.unsqueeze(1))
    logits_BV, after = Decoder(model).step(ids_B, state, reset_B)
    torch.testing.assert_close(logits_BV, expected_B1V[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after.hidden, expected.hidden, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after.conv, expected.conv, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_step_leaves_the_state_it_was_given():
    model = make(SHAPES["conv"])
    _, state = model(torch.randint(256, (1, 6)))
    before = state.hidden.clone(), state.conv.clone()
    first, _ = Decoder(model).step(torch.tensor([7]), state)
    second, _ = Decoder(model).step(torch.tensor([7]), state)
    assert torch.equal(first, second)
    assert torch.equal(state.hidden, before[0]) and torch.equal(state.conv, before[1])


@pytest.mark.parametrize("ids", [torch.tensor([256]), torch.tensor([-1]), torch.tensor([1], dtype=torch.int32)])
def test_step_refuses_what_is_no_token(ids):
    model = make(SHAPES["plain"])
    with pytest.raises(ValueError, match="expected int64 tokens from 0 to 255"):
        Decoder(model).step(ids, model.initial_state(1))


def test_fits_a_few_lanes_on_a_cpu_with_a_compiler(monkeypatch):
    model = make(SHAPES["plain"])
    assert Decoder.fits(model, 1) and not Decoder.fits(model, decoder.MOST_LANES + 1)
    assert not Decoder.fits(make(SHAPES["plain"], torch.float64), 1)
    monkeypatch.setattr(decoder, "kernels", lambda: None)
    assert not Decoder.fits(model, 1)
