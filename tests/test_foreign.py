"""Weights of minGRU-pytorch and of the predecessor load, and compute the same."""

import pytest
import torch
from minGRU_pytorch.minLM import minLM as PeerLM

from mingru import MinLM, ModelConfig
from mingru.foreign import convert
from runtime.errors import UserError

KINDS = {
    "default": {},
    "conv": {"enable_conv": True},
    "square": {"expansion": 1.0},
    "conv4-wide": {"enable_conv": True, "conv_kernel_size": 4, "expansion": 2.3, "ff_mult": 2.5},
    "just-above-1": {"expansion": 1.01},
}
IDS = torch.randint(0, 256, (2, 60), generator=torch.Generator().manual_seed(0))


def peer_model(**options):
    torch.manual_seed(0)
    model = PeerLM(num_tokens=256, dim=24, depth=3, **options)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too: swapped ones must show
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def load(checkpoint):
    config, weights = convert(checkpoint)
    model = MinLM(config)
    model.load_state_dict(weights)
    return model.eval()


def assert_same_logits(model, peer):
    with torch.no_grad():
        found, expected = model(IDS)[0], peer.eval()(IDS)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_convert_minLM_gives_the_same_logits(kind):
    peer = peer_model(**KINDS[kind])
    assert_same_logits(load(peer.state_dict()), peer)


@pytest.mark.parametrize("prefix", ["", "_orig_mod."], ids=["plain", "compiled"])
@pytest.mark.parametrize("conv", [False, True], ids=["default", "conv"])
def test_convert_predecessor_gives_the_same_logits(conv, prefix):
    peer = peer_model(enable_conv=conv, dropout=0.25)
    config = {
        "num_tokens": 256, "dim": 24, "depth": 3, "ff_mult": 4, "expansion": 1.5,
        "conv_kernel_size": 3 if conv else None, "enable_conv": conv, "dropout": 0.25, "use_lstm": False,
    }  # fmt: skip
    weights = {prefix + name: tensor for name, tensor in peer.state_dict().items()}
    model = load({"model_config": config, "model_state_dict": weights, "step": 7, "optimizer_state_dict": {}})
    assert_same_logits(model, peer)
    assert model.config == ModelConfig(24, 3, conv_kernel_size=3 if conv else None, dropout=0.25)


def test_convert_takes_half_precision_weights():
    peer = peer_model().bfloat16()
    assert_same_logits(load(peer.state_dict()), peer.float())


def wrong(change):
    weights = dict(peer_model().state_dict())
    change(weights)
    return weights


@pytest.mark.parametrize(
    "checkpoint, message",
    [
        ({}, "without token_emb.weight"),
        ({"model_state_dict": [1, 2]}, "to be dicts"),
        (peer_model(use_lstm=True).state_dict(), "minLSTM"),
        (wrong(lambda w: w.update({"layers.0.0.conv.weight": torch.zeros(24, 24, 3)})), "dense one"),
        (wrong(lambda w: w.update({"layers.0.0.proj.weight": torch.zeros(24, 24)})), "dense one"),
        (wrong(lambda w: w.update({"heads.weight": torch.zeros(2)})), "'heads.weight'"),
        (wrong(lambda w: w.update({"layers.x.1.weight": torch.zeros(2)})), "'layers.x.1.weight'"),
        (wrong(lambda w: w.update({"norm.weight": "text"})), "floating-point tensor for norm.weight"),
        (wrong(lambda w: w.pop("layers.0.2.to_hidden_and_gate.weight")), "to_hidden_and_gate"),
        ({"model_config": {"dim": 32}, "model_state_dict": wrong(lambda w: None)}, "expected dim 24"),
    ],
    ids=[
        "empty",
        "no-dict",
        "lstm",
        "dense-conv",
        "dense-proj",
        "unknown",
        "bad-layer",
        "no-tensor",
        "no-gate",
        "config",
    ],
)
def test_convert_refuses_what_it_does_not_know(checkpoint, message):
    with pytest.raises(UserError, match=message):
        convert(checkpoint)
