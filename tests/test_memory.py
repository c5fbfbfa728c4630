import pytest
import torch

from runtime.devices import ranks_sharing
from runtime.errors import UserError
from training import memory
from training.memory import check_memory, estimate_memory


@pytest.mark.parametrize(("payload", "sequences"), [("weights", 2), ("full", 3)])
def test_memory_estimate_has_two_buffers_of_what_travels(payload, sequences):
    assert estimate_memory(1000, payload).exchange == 2 * sequences * 4000


@pytest.mark.parametrize(
    ("gpus", "local_world_size", "shared", "environment"),
    [
        (4, 4, [1, 1, 1, 1], {}),
        (4, 6, [2, 2, 1, 1], {}),
        (1, 3, [3], {}),
        (4, 2, [1, 1, 1, 1], {}),
        (2, 0, [1, 1], {}),  # not known
        (1, 8, [1], {"SLURM_PROCID": "3"}),  # each task is shown a device of its own
    ],
)
def test_ranks_sharing_a_gpu_are_those_that_it_is_chosen_for(monkeypatch, gpus, local_world_size, shared, environment):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    devices = [torch.device("cuda", number) for number in range(gpus)]
    assert [ranks_sharing(device, local_world_size, environment) for device in devices] == shared


def test_ranks_sharing_the_cpu_are_all_of_the_host():
    assert [ranks_sharing(torch.device("cpu"), size, {"SLURM_PROCID": "0"}) for size in (0, 1, 4)] == [1, 1, 4]


def test_a_model_must_fit_a_gpu_as_often_as_ranks_share_it(monkeypatch):
    estimate = estimate_memory(1000, "weights")
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(memory, "device_memory_bytes", lambda device: 10**9 if device.type == "cpu" else 50_000)
    assert 2 * estimate.on_device <= 50_000 < 3 * estimate.on_device
    check_memory(estimate, gpu, ranks_here=8, sharing=2)
    with pytest.raises(UserError, match=r"fits cuda:0 .* times 3 ranks: choose smaller --params, or fewer ranks"):
        check_memory(estimate, gpu, ranks_here=8, sharing=3)
    with pytest.raises(UserError, match=r"host buffers fit this host"):
        check_memory(estimate, gpu, ranks_here=10**6, sharing=1)
