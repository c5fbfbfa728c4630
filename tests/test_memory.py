import pytest

from training.memory import estimate_memory


@pytest.mark.parametrize(("payload", "sequences"), [("weights", 2), ("full", 3)])
def test_memory_estimate_has_two_buffers_of_what_travels(payload, sequences):
    assert estimate_memory(1000, payload).exchange == 2 * sequences * 4000
