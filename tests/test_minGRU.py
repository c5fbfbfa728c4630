"""The layer, beside minGRU-pytorch's."""

import pytest
import torch
from minGRU_pytorch.minGRU import minGRU as PeerGRU
from torch import nn

from mingru import minGRU


@pytest.mark.parametrize("expansion, proj_out", [(1.0, None), (1.5, None), (1.0, True), (2.0, False)])
def test_minGRU_equals_minGRU_pytorch(expansion, proj_out):
    torch.manual_seed(0)
    peer, ours = PeerGRU(24, expansion, proj_out), minGRU(24, expansion, proj_out)
    ours.load_state_dict(peer.state_dict())
    assert isinstance(ours.to_out, nn.Identity) == isinstance(peer.to_out, nn.Identity)
    x = torch.randn(3, 40, 24)
    expected, expected_state = peer(x, return_next_prev_hidden=True)
    found, state = ours(x, return_next_prev_hidden=True)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert state.shape == expected_state.shape and torch.allclose(state, expected_state, rtol=1e-4, atol=1e-5)
    expected, found = peer(x, expected_state), ours(x, state)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_minGRU_parallel_equals_sequential():
    torch.manual_seed(1)
    layer, x = minGRU(16, 1.5), torch.randn(2, 90, 16)
    whole, state = layer(x, return_next_prev_hidden=True)
    step_state, steps = None, []
    for t in range(x.shape[1]):
        out, step_state = layer(x[:, t : t + 1], step_state, True)
        steps.append(out)
    assert torch.allclose(torch.cat(steps, dim=1), whole, rtol=1e-5, atol=1e-6)
    assert torch.allclose(step_state, state, rtol=1e-5, atol=1e-6)


def test_minGRU_state_carries_the_gradient():
    layer, x = minGRU(8), torch.randn(1, 6, 8)
    prev = torch.rand(1, 1, 8, requires_grad=True)
    _, state = layer(x, prev, return_next_prev_hidden=True)
    state.sum().backward()
    assert prev.grad.abs().sum() > 0 and layer.to_hidden_and_gate.weight.grad.abs().sum() > 0


def test_minGRU_reset_equals_two_calls():
    layer, x = minGRU(8, 1.5), torch.randn(1, 12, 8)
    reset = torch.zeros(1, 12, dtype=torch.bool)
    reset[0, 5] = True
    expected = torch.cat((layer(x[:, :5]), layer(x[:, 5:])), dim=1)
    assert torch.allclose(layer(x, reset=reset), expected, rtol=1e-5, atol=1e-6)
