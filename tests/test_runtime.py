import errno
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from runtime.devices import check_triton, choose_device, device_memory_bytes
from runtime.errors import UserError
from runtime.exhaustion import as_memory_error
from runtime.files import atomic_write, atomic_writer, replace_symlink, stale_temporaries, temporary_name, write_once
from runtime.ranks import Identity, identity_from_environment
from runtime.signals import AGAIN_SECONDS
from training.setup import check_environment

ROOT = Path(__file__).parent.parent


def exhaust_torch() -> None:
    torch.empty(10**15)


def exhaust_numpy() -> None:
    np.empty(10**15)


def exhaust_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4 MiB\nand more")


def exhaust_driver() -> None:
    raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported")


@pytest.mark.parametrize("exhaust", [exhaust_torch, exhaust_numpy, exhaust_gpu, exhaust_driver])
def test_memory_that_is_out_is_one_error_of_one_line(exhaust):
    with pytest.raises(MemoryError, match=r"^[^\n]*(memory|allocate)[^\n]*$"), as_memory_error():
        exhaust()


def test_a_thread_without_memory_for_its_stack_is_memory_that_is_out():
    script = (
        "import resource, threading\n"
        "from runtime.exhaustion import as_memory_error\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**20, -1))\n"
        "try:\n"
        "    with as_memory_error():\n"
        "        threading.Thread(target=print).start()\n"
        "except MemoryError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("can't start new thread\n", "")


def test_an_error_that_says_nothing_of_memory_stays_what_it_is():
    with pytest.raises(RuntimeError, match="shapes"), as_memory_error():
        raise RuntimeError("shapes do not match")


@pytest.fixture
def system_calls(monkeypatch):
    """What a write asks of the system, in order, with the state of the file at that moment."""
    calls = []
    fsync, replace, link = os.fsync, os.replace, os.link

    def record_fsync(descriptor):
        state = os.fstat(descriptor)
        calls.append(("sync folder",) if stat.S_ISDIR(state.st_mode) else ("sync file", state.st_size))
        fsync(descriptor)

    def record_replace(source, target):
        calls.append(("rename", Path(target).name))
        replace(source, target)

    def record_link(source, target):
        calls.append(("link", Path(target).name))
        link(source, target)

    monkeypatch.setattr(os, "link", record_link)
    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    return calls


def test_atomic_write_syncs_the_file_then_renames_then_syncs_the_folder(tmp_path, system_calls):
    atomic_write(tmp_path / "name", b"content")
    assert system_calls == [("sync file", 7), ("rename", "name"), ("sync folder",)]
    assert (tmp_path / "name").read_bytes() == b"content"


def test_atomic_write_without_durability_renames_only(tmp_path, system_calls):
    atomic_write(tmp_path / "name", "content", durable=False)
    assert system_calls == [("rename", "name")]
    assert (tmp_path / "name").read_text() == "content"


def test_atomic_writer_shows_the_older_file_until_the_end(tmp_path):
    atomic_write(tmp_path / "name", "older")
    with atomic_writer(tmp_path / "name") as file:
        file.write(b"newer")
        file.flush()
        assert (tmp_path / "name").read_text() == "older"
    assert (tmp_path / "name").read_text() == "newer"


def test_atomic_writer_keeps_the_older_file_on_an_error(tmp_path):
    atomic_write(tmp_path / "name", "older")
    with pytest.raises(KeyboardInterrupt), atomic_writer(tmp_path / "name") as file:
        file.write(b"newer")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["name"] and (tmp_path / "name").read_text() == "older"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_atomic_write_raises_a_full_disk_and_leaves_no_temporary_file(tmp_path, monkeypatch, call):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left"):
        atomic_write(tmp_path / "name", "content")
    assert os.listdir(tmp_path) == []


def test_replace_symlink_renames_over_the_older_one(tmp_path, system_calls):
    link = tmp_path / "best.pt"
    for target in ("first.pt", "second.pt"):  # both dangle: nobody need own what a link names
        replace_symlink(link, target)
        assert os.readlink(link) == target
    replace_symlink(link, "second.pt")
    assert system_calls == [("rename", "best.pt")] * 2  # at no time is there no link, and no work without need
    assert os.listdir(tmp_path) == ["best.pt"]


def test_replace_symlink_takes_over_what_a_dead_process_left(tmp_path):
    temporary_name(tmp_path / "best.pt").symlink_to("ghost.pt")  # by one that had this name before
    replace_symlink(tmp_path / "best.pt", "first.pt")
    assert os.readlink(tmp_path / "best.pt") == "first.pt"


# A process that goes away in the middle of a write.
HALF_A_WRITE = """
import os, sys
from pathlib import Path
from runtime.files import atomic_writer, temporary_name
with atomic_writer(Path(sys.argv[1]) / "state.pt") as file:
    temporary_name(Path(sys.argv[1]) / "link").symlink_to("nowhere")
    os._exit(0)
"""


@pytest.fixture
def half_written(tmp_path):
    """A folder with what a dead process left there: a file and a symlink."""
    folder = tmp_path / "run"
    folder.mkdir()
    subprocess.run([sys.executable, "-c", HALF_A_WRITE, str(folder)], cwd=ROOT, check=True)
    return folder


def test_stale_temporaries_are_what_a_dead_process_of_this_host_left(half_written):
    left = sorted(half_written.iterdir())
    assert len(left) == 2
    (half_written / "state.pt").write_text("whole")
    (half_written / ".hidden.tmp").write_text("a user's")
    with atomic_writer(half_written / "mine"):  # by a live process
        assert stale_temporaries(half_written) == left


@pytest.mark.parametrize("host", ["else", "a.{here}", "{here}.b", "{here}0"])
def test_stale_temporaries_leave_those_of_other_hosts(half_written, monkeypatch, host):
    here = socket.gethostname()
    monkeypatch.setattr(socket, "gethostname", lambda: host.format(here=here))
    assert stale_temporaries(half_written) == []
    other = [temporary_name(half_written / "state.pt"), temporary_name(half_written / "a.b.pt")]
    dead = re.search(r"\.(\d+)\.\d+\.tmp$", min(half_written.iterdir()).name)[1]
    other = [path.with_name(path.name.replace(f".{os.getpid()}.", f".{dead}.")) for path in other]
    for path in other:
        path.touch()
    assert stale_temporaries(half_written) == sorted(other)
    monkeypatch.undo()
    assert len(stale_temporaries(half_written)) == 2 and not set(stale_temporaries(half_written)) & set(other)


def test_stale_temporaries_leave_those_of_other_containers(half_written):
    within = ["unshare", "--pid", "--fork", "--mount-proc"]
    if shutil.which("unshare") is None or subprocess.run([*within, "true"], capture_output=True).returncode != 0:
        pytest.skip("no process namespaces on this machine")
    code = "import sys; from runtime.files import stale_temporaries; print(len(stale_temporaries(sys.argv[1])))"
    for where, count in ((within, 0), ([], 2)):
        command = [*where, sys.executable, "-c", code, str(half_written)]
        assert subprocess.check_output(command, cwd=ROOT, text=True) == f"{count}\n"


@pytest.mark.parametrize(
    "process_id, listed", [("1", False), (str(10**30), True), ("", False), ("x", False), ("-1", False)]
)
def test_stale_temporaries_tell_the_living_from_the_dead_by_their_number(tmp_path, process_id, listed):
    named = temporary_name(tmp_path / "state.pt").name.replace(f".{os.getpid()}.", f".{process_id}.")
    (tmp_path / named).touch()
    assert stale_temporaries(tmp_path) == ([tmp_path / named] if listed else [])


TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
SLURM = {
    "SLURM_PROCID": "9", "SLURM_NPROCS": "16", "SLURM_LOCALID": "1", "SLURM_NTASKS_PER_NODE": "8", "SLURM_NNODES": "2",
}  # fmt: skip


@pytest.mark.parametrize(
    "environment, identity",
    [
        ({}, Identity(0, 0, 1, 1, "alone")),
        ({"SLURM_RESTART_COUNT": "2"}, Identity(0, 0, 1, 1, "alone", restarts=2)),
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, Identity(0, 0, 1, 1, "alone")),
        ({**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "0"}, Identity(5, 1, 8, 4, "environment")),
        (
            {**SLURM, **TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "3", "SLURM_RESTART_COUNT": "1"},
            Identity(5, 1, 8, 4, "environment", restarts=4),
        ),
        (TORCHRUN, Identity(5, 1, 8, 4, "environment")),
        (SLURM, Identity(9, 1, 16, 8, "slurm")),
        ({**SLURM, **TORCHRUN}, Identity(5, 1, 8, 4, "environment")),
        ({**SLURM, "SLURM_NTASKS_PER_NODE": "8(x2)"}, Identity(9, 1, 16, 0, "slurm")),
        # With --ntasks it is only a maximum: 16 ranks that are somehow spread over two nodes.
        ({**SLURM, "SLURM_NTASKS_PER_NODE": "16"}, Identity(9, 1, 16, 0, "slurm")),
        ({**SLURM, "SLURM_NTASKS_PER_NODE": "16", "SLURM_NNODES": "1"}, Identity(9, 1, 16, 16, "slurm")),
        ({**SLURM, "SLURM_NNODES": "1"}, Identity(9, 1, 16, 16, "slurm")),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, Identity(1, 0, 2, 0, "environment")),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, Identity(0, 0, 1, 1, "environment")),
    ],
    ids=[
        "alone",
        "requeued",
        "in-a-batch-script",
        "first-start",
        "restarted-and-requeued",
        "environment",
        "slurm",
        "torchrun-in-slurm",
        "uneven-nodes",
        "at-most",
        "one-node",
        "one-node-at-most",
        "unknown-host",
        "one",
    ],
)
def test_identity_comes_from_the_environment(environment, identity):
    assert identity_from_environment(environment) == identity


@pytest.mark.parametrize(
    "change, said",
    [
        ({"RANK": "8"}, "RANK=8 WORLD_SIZE=8"),
        ({"RANK": "-1"}, "RANK=-1"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE, got 'many'"),
        ({"LOCAL_RANK": None}, "expected LOCAL_RANK"),
        ({"TORCHELASTIC_RESTART_COUNT": "often"}, "TORCHELASTIC_RESTART_COUNT, got 'often'"),
        ({"RANK": None}, "expected RANK in the environment beside WORLD_SIZE=8, got none"),
    ],
    ids=["outside", "negative", "negative-local", "no-number", "absent", "restarts", "no-rank"],
)
def test_identity_refuses_what_no_launcher_means(change, said):
    environment = {name: value for name, value in {**TORCHRUN, **change}.items() if value is not None}
    with pytest.raises(UserError, match=said):
        identity_from_environment(environment)


@pytest.fixture
def accelerators(monkeypatch):
    """Pretends that this torch build sees so many devices, of ROCm if `hip`; lists those that were made current."""
    made_current = []

    def pretend(count, hip=None):
        monkeypatch.setattr(torch.cuda, "init", lambda: None)
        monkeypatch.setattr(torch.cuda, "set_device", made_current.append)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.version, "hip", hip)
        return made_current

    return pretend


@pytest.mark.parametrize(
    "count, hip, asked, local_rank, device",
    [
        (0, None, {}, 3, "cpu"),
        (0, None, {"cpu": True}, 0, "cpu"),
        (8, None, {"cpu": True}, 0, "cpu"),
        (8, None, {}, 3, "cuda:3"),
        (8, None, {"cuda": True}, 3, "cuda:3"),
        (8, "6.4", {"rocm": True}, 3, "cuda:3"),
        (1, None, {}, 3, "cuda:0"),
    ],
    ids=["none", "cpu", "cpu-beside-gpus", "best", "cuda", "rocm", "bound"],
)
def test_choose_device_takes_what_was_asked_for_or_the_best(accelerators, count, hip, asked, local_rank, device):
    made_current = accelerators(count, hip)
    assert choose_device(**asked, local_rank=local_rank) == torch.device(device)
    assert made_current == ([] if device == "cpu" else [torch.device(device)])


@pytest.mark.parametrize(
    "count, hip, asked, said",
    [
        (0, None, {"cuda": True}, "CUDA device for --cuda"),
        (8, "6.4", {"cuda": True}, "CUDA device for --cuda"),
        (8, None, {"rocm": True}, "ROCm device for --rocm"),
        (8, None, {"cuda": True, "cpu": True}, "one device, got --cuda and --cpu"),
    ],
    ids=["no-gpu", "cuda-on-rocm", "rocm-on-cuda", "two"],
)
def test_choose_device_refuses_what_is_not_there(accelerators, count, hip, asked, said):
    accelerators(count, hip)
    with pytest.raises(UserError, match=said):
        choose_device(**asked)


class BuildingDriver:
    """A GPU's Triton driver without the GPU: what it needs is built by Triton's own function."""

    @property
    def utils(self):
        from triton.runtime.build import compile_module_from_src

        source = '#include <Python.h>\nstatic struct PyModuleDef def = {PyModuleDef_HEAD_INIT, "launches"};\n'
        return compile_module_from_src(source + "PyMODINIT_FUNC PyInit_launches() { return PyModule_Create(&def); }",
                                       "launches")  # fmt: skip


@pytest.fixture
def building(monkeypatch, tmp_path):
    driver = pytest.importorskip("triton.runtime", reason="needs triton of requirements-dev.txt").driver
    monkeypatch.setattr(driver, "_active", BuildingDriver())
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)


def test_a_gpu_whose_kernels_can_be_launched_is_accepted(building):
    if not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")) or shutil.which("gcc") is None:
        pytest.skip("needs gcc and Python.h")
    check_triton(torch.device("cuda", 0))


@pytest.mark.parametrize(
    "environment", [{"PATH": ""}, {"CC": "false"}, {"CC": "/absent/gcc"}], ids=["no compiler", "one that fails", "lost"]
)
def test_a_gpu_without_what_builds_tritons_launcher_is_refused_in_one_line(building, monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"expected a C compiler and Python's headers.* install gcc") as caught:
        check_environment(torch.device("cuda", 0))
    assert "\n" not in str(caught.value)
    check_environment(torch.device("cpu"))


def test_device_memory_of_the_cpu_is_within_the_host():
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < device_memory_bytes(torch.device("cpu")) <= host


# A program that takes signals as flags and says so; its input says when to look.
LISTENER = """
import sys
import sysconfig
from runtime.signals import SignalFlags
flags = SignalFlags().install()
print("ready", flush=True)
for line in sys.stdin:
    print(flags.stop, flags.take_save(), flush=True)
"""


@pytest.fixture
def listen():
    """Starts a listener, under `prefix`."""
    started = []

    def start(*prefix):
        command = [*prefix, sys.executable, "-c", LISTENER]
        started.append(subprocess.Popen(command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        assert started[-1].stdout.readline() == "ready\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def flags_of(process):
    process.stdin.write("look\n")
    process.stdin.flush()
    return process.stdout.readline().split()


def test_signals_stop_however_many_at_once_is_a_flag_and_again_later_leaves_now(listen):
    stops = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    listeners = {number: listen() for number in stops}
    for number, listener in listeners.items():
        assert flags_of(listener) == ["False", "False"]
        for each in (number, *stops):  # as a service that is stopped, and its launcher, send it
            listener.send_signal(each)
        assert flags_of(listener) == ["True", "False"]
        assert flags_of(listener) == ["True", "False"]
    time.sleep(AGAIN_SECONDS)
    for number, listener in listeners.items():
        listener.send_signal(number)
        assert listener.wait() == 128 + number


def test_signals_hangup_is_ignored_under_nohup(listen):
    listener = listen("nohup")
    listener.send_signal(signal.SIGHUP)
    assert flags_of(listener) == ["False", "False"]


def test_signals_save_is_taken_once_and_stops_nothing(listen):
    listener = listen()
    for _ in range(2):
        listener.send_signal(signal.SIGUSR1)
        assert flags_of(listener) == ["False", "True"]
        assert flags_of(listener) == ["False", "False"]


@pytest.mark.parametrize("script", sorted(path.name for path in ROOT.glob("*.py")))
def test_a_script_without_its_packages_says_so_in_one_line(script):
    done = subprocess.run([sys.executable, "-S", "-E", ROOT / script], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: expected the packages of requirements.txt, got a Python without torch")
    assert done.stderr.count("\n") == 1


def test_write_once_leaves_what_another_wrote_first(tmp_path, system_calls):
    assert write_once(tmp_path / "x", "first")
    assert system_calls[-2:] == [("link", "x"), ("sync folder",)]
    assert not write_once(tmp_path / "x", "second")
    assert (tmp_path / "x").read_text() == "first" and [path.name for path in tmp_path.iterdir()] == ["x"]
