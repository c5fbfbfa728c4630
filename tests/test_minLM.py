"""The language model: chunks, resets, states."""

import math

import pytest
import torch
import torch.nn.functional as F

from mingru import MinLM, ModelConfig
from mingru.minLM import MinLMState
from mingru.norm import EPSILON, RMSNorm
from runtime.errors import UserError

KINDS = {
    "plain": {},
    "conv3": {"conv_kernel_size": 3},
    "conv4-no-ff": {"conv_kernel_size": 4, "ff_mult": 0},
    "conv1-square": {"conv_kernel_size": 1, "expansion": 1.0},
}
CHUNKS = (1, 2, 1, 1, 7, 20, 2, 6)  # shorter and longer than a convolution


@pytest.fixture(params=sorted(KINDS))
def model(request):
    torch.manual_seed(0)
    return MinLM(ModelConfig(dim=16, depth=3, **KINDS[request.param])).double()


def text(lanes, length, seed=0):
    return torch.randint(0, 256, (lanes, length), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def loss_and_gradients(model, ids, pieces, resets=None, state=None):
    """Summed loss over the targets, fed in pieces with the state carried (and not cut), and its gradients."""
    total, start = 0.0, 0
    for size in pieces:
        reset = None if resets is None else resets[:, start : start + size]
        logits, state = model(ids[:, start : start + size], state, reset)
        targets = ids[:, start + 1 : start + 1 + size].long()
        total = total + F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        start += size
    return total, torch.autograd.grad(total, list(model.parameters())), state


@pytest.mark.parametrize("resets", [False, True], ids=["one-document", "documents"])
def test_minLM_chunked_equals_whole(model, resets):
    ids = text(2, sum(CHUNKS) + 1)
    edges = [0, 1, 3, 11, 12, 13, 30]  # among them the first and the last step of a chunk, and neighbours
    reset = torch.zeros(2, sum(CHUNKS), dtype=torch.bool)
    reset[0, edges] = True
    reset = reset if resets else None
    whole, whole_grads, whole_state = loss_and_gradients(model, ids, [sum(CHUNKS)], reset)
    parts, part_grads, part_state = loss_and_gradients(model, ids, CHUNKS, reset, model.initial_state(2))
    assert torch.allclose(parts, whole, rtol=1e-12)
    for found, expected in zip(part_grads, whole_grads, strict=True):
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-11)
    assert torch.allclose(part_state.hidden, whole_state.hidden)
    if whole_state.conv is not None:
        assert torch.allclose(part_state.conv, whole_state.conv)


def test_minLM_documents_do_not_see_each_other(model):
    """Three documents in one lane, the cuts at awkward places, give the logits of each fed alone."""
    lengths = (5, 1, 2, 9)
    ids = text(1, sum(lengths))
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    reset = torch.zeros(1, sum(lengths), dtype=torch.bool)
    reset[0, starts] = True
    together, _ = model(ids, model.initial_state(1), reset)
    alone = [model(ids[:, start : start + length])[0] for start, length in zip(starts, lengths, strict=True)]
    assert torch.allclose(together, torch.cat(alone, dim=1), rtol=1e-12, atol=1e-14)


def test_minLM_is_causal(model):
    ids = text(1, 20)
    changed = ids.clone()
    changed[0, 12] ^= 1
    before, after = model(ids)[0], model(changed)[0]
    assert torch.equal(before[:, :12], after[:, :12]) and not torch.equal(before[:, 12], after[:, 12])


def test_minLM_first_chunk_may_leave_out_the_state(model):
    ids = text(2, 9)
    assert torch.equal(model(ids)[0], model(ids, model.initial_state(2))[0])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64], ids=str)
def test_minLM_takes_any_integer_dtype(dtype):
    model = MinLM(ModelConfig(dim=8, depth=1))
    ids = torch.tensor([[0, 127, 128, 255]])
    assert torch.equal(model(ids.to(dtype))[0], model(ids)[0])


def test_minLM_starts_at_chance():
    torch.manual_seed(0)
    model, ids = MinLM(ModelConfig(dim=128, depth=4, conv_kernel_size=3)), text(4, 257)
    logits, _ = model(ids[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten().long())
    assert abs(loss.item() - math.log(256)) < 0.25


def test_minLM_initial_weights_follow_the_seed():
    built = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        built.append(MinLM(ModelConfig(dim=8, depth=2, conv_kernel_size=2)).state_dict())
    assert all(torch.equal(built[0][name], built[1][name]) for name in built[0])
    assert not torch.equal(built[0]["to_logits.weight"], built[2]["to_logits.weight"])


def test_minLM_dropout_acts_only_in_training():
    model, ids = MinLM(ModelConfig(dim=16, depth=2, dropout=0.5)), text(1, 10)
    assert not torch.equal(model(ids)[0], model(ids)[0])
    model.eval()
    assert torch.equal(model(ids)[0], model(ids)[0])


def test_minLM_bfloat16_weights_keep_a_float32_hidden_state():
    model = MinLM(ModelConfig(dim=16, depth=2, conv_kernel_size=3)).bfloat16()
    assert model.initial_state(1).hidden.dtype == torch.float32
    logits, state = model(text(1, 10), model.initial_state(1))
    assert logits.dtype == torch.bfloat16 and state.hidden.dtype == torch.float32


def test_minLM_trains_under_autocast():
    torch.manual_seed(0)
    model, ids = MinLM(ModelConfig(dim=32, depth=2, conv_kernel_size=3)), text(2, 65)
    with torch.autocast("cpu", torch.bfloat16):
        logits, _ = model(ids[:, :-1], model.initial_state(2), ids[:, :-1] == 30)
    F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten().long()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.dtype == p.dtype for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_norm_equals_torch(dtype):
    """Values and gradients of torch.nn.RMSNorm in float64; values in bfloat16."""
    torch.manual_seed(0)
    ours, theirs = RMSNorm(24).to(dtype), torch.nn.RMSNorm(24, eps=EPSILON).double()
    with torch.no_grad():
        theirs.weight.normal_()
        ours.load_state_dict(theirs.state_dict())
    inputs, grad, found = torch.randn(3, 5, 24).double(), torch.randn(3, 5, 24).double(), []
    for norm, own in ((ours, dtype), (theirs, torch.float64)):
        x = inputs.to(own).requires_grad_()
        out = norm(x)
        out.backward(grad.to(own))
        found.append((out, x.grad, norm.weight.grad))
    rtol, atol = (1e-10, 1e-12) if dtype == torch.float64 else (1e-5, 1e-6)
    for mine, expected in zip(*found, strict=True):
        assert torch.allclose(mine.double(), expected, rtol=rtol, atol=atol)
    low = ours.bfloat16()(inputs.bfloat16())
    assert low.dtype == torch.bfloat16 and torch.allclose(low.double(), found[1][0], rtol=0.02, atol=0.02)


def test_norm_under_autocast_is_rounded_once_and_its_gradients_stay_float32():
    """As the float32 norm whose output is rounded, also backward."""
    torch.manual_seed(0)
    norm, grad = RMSNorm(40), torch.randn(3, 5, 40).bfloat16()
    inputs, found = torch.randn(3, 5, 40), []
    for autocast in (True, False):
        x = inputs.clone().requires_grad_()
        norm.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = norm(x)
        out.bfloat16().backward(grad)
        found.append((out, x.grad, norm.weight.grad))
    assert found[0][0].dtype == torch.bfloat16 and torch.equal(found[0][0], found[1][0].bfloat16())
    for own, expected in zip(found[0][1:], found[1][1:], strict=True):
        assert own.dtype == torch.float32
        torch.testing.assert_close(own, expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_norm_keeps_what_is_not_finite_to_its_row(bad):
    norm, x = RMSNorm(40), torch.ones(3, 2, 40)
    x[1, 0, 7] = bad
    out = norm(x)
    spoilt = ~out.isfinite().all(dim=-1)
    assert spoilt.nonzero().tolist() == [[1, 0]] and out[0].allclose(torch.ones(2, 40))


def test_norm_adds_up_the_rows_of_all_threads():
    torch.manual_seed(0)
    x, grads, threads = torch.randn(1, 1000, 48), [], torch.get_num_threads()
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            norm = RMSNorm(48)
            norm(x).square().sum().backward()
            grads.append(norm.weight.grad)
    finally:
        torch.set_num_threads(threads)
    assert torch.allclose(grads[0], grads[1], rtol=1e-4) and torch.equal(grads[1], grads[2])


def test_state_selects_lanes_and_detaches():
    model = MinLM(ModelConfig(dim=8, depth=2, conv_kernel_size=3))
    _, state = model(text(3, 5), model.initial_state(3))
    chosen = state.detach().lanes([2, 0])
    assert isinstance(chosen, MinLMState) and not chosen.hidden.requires_grad and not chosen.conv.requires_grad
    assert torch.equal(chosen.hidden, state.hidden[:, [2, 0]]) and torch.equal(chosen.conv, state.conv[:, [2, 0]])
    before = state.detach().lanes([0, 1, 2])  # a copy
    assert not torch.equal(before.hidden[:, 0], before.hidden[:, 1])  # else this could not tell
    mixed = state.detach()
    mixed.put(slice(1, 2), before.lanes([0]))
    assert all(torch.equal(new, old[:, [0, 0, 2]]) for new, old in zip(mixed, before, strict=True))
    alone = MinLM(ModelConfig(dim=8, depth=2)).initial_state(3)
    alone.put(slice(0, 1), alone.lanes([1]))
    assert alone.lanes([1]).conv is None and alone.detach().conv is None


def test_config_round_trips():
    config = ModelConfig(dim=8, depth=2, ff_mult=2.5, conv_kernel_size=4, dropout=0.1)
    assert ModelConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    "change",
    [
        {"dim": 0}, {"dim": 8.0}, {"depth": -1}, {"depth": True}, {"num_tokens": "256"}, {"expansion": 0.01},
        {"expansion": float("nan")}, {"ff_mult": -1.0}, {"ff_mult": 0.01}, {"conv_kernel_size": 0}, {"dropout": 1.0},
    ],
    ids=str,
)  # fmt: skip
def test_config_refuses_impossible_values(change):
    with pytest.raises(UserError, match=f"expected for {next(iter(change))} "):
        ModelConfig(**{"dim": 8, "depth": 2} | change)


@pytest.mark.parametrize("values", [{"dim": 8}, {"dim": 8, "depth": 2, "heads": 4}], ids=["missing", "unknown"])
def test_config_refuses_wrong_fields(values):
    with pytest.raises(UserError, match="model config"):
        ModelConfig.from_dict(values)
