"""The Triton kernels compile for GPUs that are not here, in every form in which training launches them."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("triton") is None:  # not imported here: other files first choose its interpreter
    pytest.skip("needs the package triton of requirements-dev.txt", allow_module_level=True)

ROOT = Path(__file__).parent.parent
SCANS = {"forward", "forward_aggregates", "backward", "backward_aggregates"}


def compiled(wanted: str, cache: Path) -> list[list[str]]:
    """The rows that tests.compiled_kernels prints."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-m", "tests.compiled_kernels", wanted]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]


def test_kernels_compile_in_all_variants_that_occur(tmp_path):
    """Cut in time or not, with and without resets and a first state, at sizes that are constants to the JIT."""
    rows = compiled("variants", tmp_path)
    for arch in ("90", "gfx90a"):
        of_shape = {shape: {row[3] for row in rows if row[1] == arch and row[2] == shape} for _, _, shape, _ in rows}
        assert of_shape["(64,512,1536)"] == of_shape["(1,1,1)"] == {"forward", "backward"}
        assert of_shape["(1,2048,1536)"] == of_shape["(1,4096,1)"] == SCANS
        assert of_shape["1"] == of_shape["1048577"] == {"step"}


def test_kernels_compile_to_machine_code_that_moves_no_rows(tmp_path):
    """For CUDA and ROCm; no row of a scan's tile is moved between threads on its way."""
    rows = compiled("code", tmp_path)
    assert len(rows) == 3 * (2 + 4 + 1)  # targets; the scan without segments and with them, the optimizer's step
    assert all(row[4] == "True" for row in rows), rows
    assert all(row[5] == "0" for row in rows if row[3] in SCANS), rows
