"""The recurrence, forward and backward, beside the log-space form, the tiled loop, other kernels and a copy."""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench.speed import gpu_peers
from bench.speed.memory import peak_extra
from bench.speed.timing import Goal, Row, Setting, Turns
from mingru import scan_logspace, scan_reference, scan_tiled
from mingru.scan import scan

SHAPES = ((4, 512, 768), (1, 2048, 1536), (8, 256, 384))
# The last two are larger, since at 4 TB/s a pass over the others takes 50 to 100 us, and the host's own work counts.
GPU_SHAPES = ((8, 2048, 1536), (1, 2048, 6144), (64, 2048, 1536), (8, 2048, 6144))
TENSORS_MOVED = 9  # of (B, T, E): forward reads two and writes one, backward reads four and writes two
ACCURACY = (1, 16384, 64)
FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "ours": lambda projected: scan(projected)[0],
    "log-space": lambda projected: scan_logspace.scan(projected, None, None)[0],
    "tiled": lambda projected: scan_tiled.scan(projected, None, None)[0],
}


def measure(setting: Setting) -> Iterator[Row]:
    """Time and memory by shape, then the error over a long time."""
    shapes = ((1, 64, 8),) if setting.quick else GPU_SHAPES if setting.cuda else SHAPES
    for shape in shapes:
        for dtype in (torch.bfloat16,) if setting.cuda else (torch.float32, torch.bfloat16):
            yield from _of_shape(setting, shape, dtype)
    yield from _errors(setting)


def _of_shape(setting: Setting, shape: tuple[int, int, int], dtype: torch.dtype) -> Iterator[Row]:
    B, T, E = shape
    case = f"({B},{T},{E}) {_name(dtype)}"
    projected_BT2E, grad_BTE = inputs(shape, dtype, setting.device)
    forms = {name: functools.partial(run, form, projected_BT2E, grad_BTE) for name, form in FORMS.items()}
    if setting.cuda:
        forms |= gpu_peers.recurrences(projected_BT2E, grad_BTE)
    # A copy reads and writes: half as many items as the recurrence moves make as many bytes.
    source = torch.ones(B * T * E * TENSORS_MOVED // 2, dtype=dtype, device=setting.device)
    target = torch.zeros_like(source)
    forms["copy of its bytes"] = lambda: target.copy_(source)
    turns = Turns(setting, forms, rounds=15)
    full_size = not setting.quick
    yield turns.faster(case, "ours", "log-space", Goal(">=", 20 if setting.cuda else 40) if full_size else None)
    yield turns.faster(case, "ours", "tiled")
    for peer in set(forms) - set(FORMS) - {"copy of its bytes"}:
        yield turns.faster(case, "ours", peer, Goal(">=", 1))
    floor = 0.8 if setting.cuda and B > 1 else 0.5
    yield turns.share_of(case, "ours", "copy of its bytes", Goal(">=", floor) if full_size else None)
    if setting.cuda or dtype == torch.float32:
        peaks = {
            name: peak_extra(_prepare, name, shape, dtype, setting.device.type, cuda=setting.cuda) / _nbytes(grad_BTE)
            for name in ("ours", "log-space")
        }
        goal = Goal("<=", 4 if setting.cuda else 3.2) if full_size else None
        yield Row(f"{case} extra memory", peaks["ours"], "N", "log-space", peaks["log-space"], goal=goal)


def _errors(setting: Setting) -> Iterator[Row]:
    """Largest error of h, dx and dk over the largest magnitude of each, against float64 from the same inputs."""
    B, T, E = (1, 256, 8) if setting.quick else ACCURACY
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        projected_BT2E, grad_BTE = inputs((B, T, E), dtype, setting.device)
        exact = _results(lambda p: scan_reference.scan(p, None, None)[0], projected_BT2E.double(), grad_BTE.double())
        for name, form in FORMS.items():
            if name == "tiled" and dtype != torch.float32:
                continue
            found = _results(form, projected_BT2E, grad_BTE)
            worst = max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(found, exact, strict=True))
            yield Row(
                f"error at T = {T}, {_name(dtype)}, {name}", worst, "relative", "float64",
                goal=Goal("<=", bound) if name == "ours" else None,
            )  # fmt: skip


def _results(form: Callable[[Tensor], Tensor], projected_BT2E: Tensor, grad_BTE: Tensor) -> tuple[Tensor, ...]:
    leaf = projected_BT2E.detach().clone().requires_grad_()
    h_BTE = form(leaf)
    h_BTE.backward(grad_BTE)
    return h_BTE.detach(), *leaf.grad.chunk(2, dim=-1)


def inputs(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """A projection that wants its gradient, and the output's gradient: N(0, 1)."""
    B, T, E = shape
    torch.manual_seed(0)
    projected_BT2E, grad_BTE = torch.randn(B, T, 2 * E), torch.randn(B, T, E)
    return projected_BT2E.to(device, dtype).requires_grad_(), grad_BTE.to(device, dtype)


def run(form: Callable[[Tensor], Tensor], projected_BT2E: Tensor, grad_BTE: Tensor) -> None:
    """One forward and one backward pass."""
    projected_BT2E.grad = None
    form(projected_BT2E).backward(grad_BTE)


def _prepare(form: str, shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> Callable[[], object]:
    run(FORMS[form], *inputs((1, 65, 8), dtype, torch.device(device)))
    return functools.partial(run, FORMS[form], *inputs(shape, dtype, torch.device(device)))


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
