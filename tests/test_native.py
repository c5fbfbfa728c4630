"""C kernels: built once, by several processes at once too, into a folder that is nobody else's; or not, and said so."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mingru import scan_native, scan_tiled
from runtime import native
from runtime.native import NativeUnavailable, load_kernels

USE = (
    "import torch; from mingru.scan import scan; "
    "h, _ = scan(torch.ones(1, 2, 4)); print(h.sum().item()); scan(torch.ones(1, 2, 4))"
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gruboros"


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "answer.c"
    path.write_text("int answer(void) { return 42; }\n")
    return path


def use(**environment):
    """Run the default scan in a fresh process."""
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", USE]
    return subprocess.run(command, cwd=root, env={**os.environ, **environment}, capture_output=True, text=True)


def test_load_kernels_builds_once_into_a_private_folder(cache, source):
    assert load_kernels(source).answer() == 42
    (library,) = cache.iterdir()
    built = library.stat().st_mtime_ns
    assert load_kernels(source).answer() == 42
    assert list(cache.iterdir()) == [library] and library.stat().st_mtime_ns == built
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


def test_load_kernels_builds_again_for_another_source(cache, source):
    load_kernels(source)
    source.write_text("int answer(void) { return 43; }\n")
    assert load_kernels(source).answer() == 43


def test_load_kernels_builds_again_for_another_header(cache, source):
    header = source.with_name("wanted.h")
    header.write_text("#define WANTED 44\n")
    source.write_text('#include "wanted.h"\nint answer(void) { return WANTED; }\n')
    assert load_kernels(source).answer() == 44
    header.write_text("#define WANTED 45\n")
    assert load_kernels(source).answer() == 45


def test_load_kernels_by_several_processes_at_once(cache, source):
    code = f"from pathlib import Path; from runtime.native import load_kernels; load_kernels(Path({str(source)!r}))"
    root = Path(__file__).parent.parent
    processes = [subprocess.Popen([sys.executable, "-c", code], cwd=root) for _ in range(4)]
    assert [process.wait() for process in processes] == [0] * 4
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_load_kernels_tells_why_it_cannot(cache, source, monkeypatch, compiler):
    monkeypatch.setenv("CC", compiler)
    with pytest.raises(NativeUnavailable, match=compiler):
        load_kernels(source)


def test_load_kernels_quotes_the_compiler(cache, source):
    source.write_text("int answer(void) { return fortytwo; }\n")
    with pytest.raises(NativeUnavailable, match="fortytwo"):
        load_kernels(source)
    assert list(cache.iterdir()) == []


def test_load_kernels_refuses_a_cache_that_others_may_write(cache, source):
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    with pytest.raises(NativeUnavailable, match="written by nobody else"):
        load_kernels(source)


def test_load_kernels_without_a_home_asks_for_a_cache(source, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(NativeUnavailable, match="set XDG_CACHE_HOME"):
        load_kernels(source)


def test_kernels_share_torchs_openmp_runtime():
    assert scan_native.kernels() is not None
    assert len(native.openmp_runtimes()) == 1


def test_a_mapped_text_is_no_openmp_runtime_whatever_its_name(tmp_path):
    path = tmp_path / os.fsdecode(b"libgomp caf\xe9.txt")
    path.write_text("a corpus")
    mapped = np.memmap(path, dtype=np.uint8, mode="r")
    assert len(native.openmp_runtimes()) == 1 and len(mapped) == 8


def test_scan_without_a_compiler_says_so_once_and_goes_on(tmp_path):
    with_kernel, without = use(), use(CC="no-such-compiler", XDG_CACHE_HOME=str(tmp_path))
    assert float(without.stdout) == pytest.approx(float(with_kernel.stdout), rel=1e-6)
    assert with_kernel.stderr == ""
    assert without.stderr.count("without its C kernel") == 1 and "no-such-compiler" in without.stderr


def test_native_scan_equals_the_tiled_one_whatever_the_number_of_threads():
    threads = torch.get_num_threads()
    projected, prev = torch.randn(3, 40, 2 * 200), torch.rand(3, 200)
    try:
        outcomes = []
        for number in (1, 2, 7):
            torch.set_num_threads(number)
            outcomes.append(scan_native.scan(projected, prev, None)[0])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(outcome, outcomes[0]) for outcome in outcomes)
    assert torch.allclose(outcomes[0], scan_tiled.scan(projected, prev, None)[0], rtol=1e-5, atol=1e-6)
