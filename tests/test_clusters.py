"""Ways to start a population: torchrun, by hand on two hosts, the scripts without Slurm; before that, check_gpus.sh."""

import contextlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import check_gpus
from mingru.scan import scan
from tests.hosts import network
from tests.population import TALKS
from tests.projects import make_project
from tests.ranks import FLAGS, ROOT, World, clean_environment, eventually
from tests.synthetic_run import write_run

SECRET = "5e" * 32
PIN = re.compile(r"\S+==\S+ +# \S.*")


def test_torchrun_starts_a_population(text, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    flags = [*FLAGS, "--data", str(text), "--output", "run", "--train_steps", "1000", "--gossip_mixing_rate", "0.2"]
    done = subprocess.run(
        [*torchrun, str(ROOT / "train.py"), *flags],
        cwd=tmp_path, env=clean_environment(), capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run = World(tmp_path, text, 2)
    assert {(file.rank, file.step) for file in run.checkpoints()} >= {(0, 1000), (1, 1000)}
    assert run.events(0, *TALKS)


def test_ranks_by_hand_on_two_hosts_meet_without_a_shared_folder(text, tmp_path):
    with network(1, 1) as hosts, contextlib.ExitStack() as closing:
        worlds = []
        peers = ",".join(f"{host.address}:29400" for host in hosts)
        for rank, host in enumerate(hosts):
            folder = tmp_path / f"host{rank}"
            folder.mkdir()
            worlds.append(World(folder, text, 2, run="pair"))
            closing.callback(worlds[-1].close)
            told = ["env", f"GRUBOROS_SECRET={SECRET}", "LOCAL_RANK=0", "LOCAL_WORLD_SIZE=1"]
            worlds[-1].start(
                rank, "--no_filesystem_coordinator", "--gossip_host", "eth0", "--gossip_port", "29400",
                "--gossip_peers", peers, "--gossip_mixing_rate", "0.1",
                prefix=["ip", "netns", "exec", host.name, *told],
            )  # fmt: skip
        for rank, world in enumerate(worlds):
            world.eventually(lambda world=world, rank=rank: world.events(rank, *TALKS))
        for rank, world in enumerate(worlds):
            process = world.processes[rank]
            world.stop(rank)
            assert "(stopped by a signal)" in world.said(process)  # each has a terminal of its own
            assert {file.rank for file in world.checkpoints()} == {rank}


@pytest.fixture
def project(tmp_path):
    make_project(tmp_path)
    return tmp_path


def call(project: Path, script: str, *arguments: str, **settings: str) -> subprocess.CompletedProcess:
    environment = {**clean_environment(), **settings}
    command = [str(project / script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", timeout=300)


def test_train_local_trains_shows_the_ranks_and_lets_the_best_speak(project, text):
    small = {"RANKS": "2", "MODEL": "--dim 16 --depth 2", "CHUNK_SIZE": "32", "BATCH_SIZE": "2", "SAMPLE_BYTES": "20"}
    done = call(project, "train.local.sh", "--data", str(text), "--train_steps", "40", "--output", "runs/run", **small)
    assert done.returncode == 0, done.stderr
    assert {file.rank for file in World(project, text, 2, run="runs/run").checkpoints()} == {0, 1}
    assert done.stdout.startswith("2 ranks (2 left) ") and "\ndef " in done.stdout
    again = call(project, "train.local.sh", "--data", str(text), "--train_steps", "40", "--output", "runs/run", **small)
    assert (again.returncode, again.stdout) == (2, "") and "already holds a run" in again.stderr


# A rank that trains nothing, and writes down what it was told.
TOLD = """
import json, os, sys
with open(f"told_{os.environ['RANK']}.json", "w") as file:
    json.dump([os.environ["WORLD_SIZE"], sys.argv[1:]], file)
"""


@pytest.fixture
def told(project, text):
    """told(SCRIPT, ARGUMENT ..., SETTING=...): how many ranks the script starts, and with which arguments."""
    (project / "train.py").unlink()
    (project / "train.py").write_text(TOLD)
    write_run(project / "runs" / "three", ranks=3, steps=200)

    def asked(script, *arguments, **settings):
        done = call(project, script, *arguments, **settings)
        found = [json.loads(path.read_text()) for path in sorted(project.glob("told_*.json"))]
        for path in project.glob("told_*.json"):
            path.unlink()
        assert found and all(one == found[0] for one in found) and len(found) == int(found[0][0]), done.stderr
        return int(found[0][0]), found[0][1]

    return asked


@pytest.mark.parametrize("script", ["train.local.sh", "train.cuda.sh"])
def test_a_resumed_run_goes_on_as_it_was_started(told, script):
    assert told(script, "--resume", "runs/three", CORES="0") == (3, ["--resume", "runs/three"])
    settings = {"RANKS": "2", "CORES": "0", "GOSSIP_HOST": "lo", "MAX_MINUTES": "7", "DEVICE": "--cpu"}
    ranks, flags = told(script, "--resume=runs/three", "--lr", "1", **settings)
    assert ranks == 2 and flags[-3:] == ["--resume=runs/three", "--lr", "1"]
    own = ["--max_minutes", "7"] if script == "train.local.sh" else ["--cpu"]
    assert flags[:-3] == [*own, "--gossip_host", "lo"]


@pytest.mark.parametrize("script", ["train.local.sh", "train.cuda.sh"])
def test_a_new_run_is_started_with_the_settings(told, text, script):
    ranks, flags = told(script, "--data", str(text), RANKS="2", CORES="0")
    assert ranks == 2 and flags[-2:] == ["--data", str(text)]
    own = ["--max_minutes", "2"] if script == "train.local.sh" else ["--cuda"]
    assert flags[: len(own) + 2] == [*own, "--gossip_host", "127.0.0.1"]
    assert {"--output", "--batch_size", "--chunk_size", "--gossip_mixing_rate", "--dim"} <= set(flags)


def test_train_local_ends_by_its_clock_only_where_no_other_end_is_given(told, text):
    _, flags = told("train.local.sh", "--data", str(text), "--train_steps", "7", RANKS="2")
    assert "--max_minutes" not in flags
    _, flags = told("train.local.sh", "--data", str(text), "--train_steps", "7", RANKS="2", MAX_MINUTES="3")
    assert flags[:2] == ["--max_minutes", "3"]


@pytest.mark.parametrize("script", ["train.local.sh", "train.cuda.sh"])
def test_a_script_that_was_copied_away_says_so(project, tmp_path_factory, script):
    copy = shutil.copy(project / script, tmp_path_factory.mktemp("spool") / "slurm_script")  # as sbatch does
    done = subprocess.run([copy], capture_output=True, text=True, env=clean_environment())
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: expected the script in the project's folder, got a copy in ")
    assert done.stderr.endswith(f": sbatch --wrap ./{script}\n") and done.stderr.count("\n") == 1


def test_train_local_passes_on_every_signal_that_means_to_leave(project, text):
    (project / "train.py").unlink()
    (project / "train.py").write_text(SAVES_AND_LEAVES)
    script = subprocess.Popen(
        [project / "train.local.sh", "--data", text], cwd=project, env=clean_environment() | {"RANKS": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        rank = os.pidfd_open(int(eventually(lambda: (project / "rank").exists() and (project / "rank").read_text())))
        script.send_signal(signal.SIGUSR2)
        ended, _, _ = select.select([rank], [], [], 60)
        os.close(rank)
        assert ended and script.wait(60) >= 0  # the script itself goes on to its table
    finally:
        script.kill()
        script.wait()


@pytest.mark.parametrize("flag", ["--resume", "--output", "--output="])
@pytest.mark.parametrize("script", ["train.local.sh", "train.cuda.sh", "train.frontier.sh"])
def test_a_folder_that_is_not_named_is_asked_for_in_one_line(project, script, flag):
    job = {"SLURM_JOB_ID": "1", "SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "1", "VENV": ".venv"}
    done = call(project, script, flag, RANKS="1", CORES="0", **job)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"error: expected a folder after {flag.rstrip('=')}, got none: name it\n"
    assert not (project / "corpus").exists()  # found before anything is made


def test_train_local_speaks_only_where_it_is_to(project, text):
    small = {"RANKS": "1", "MODEL": "--dim 16 --depth 2", "CHUNK_SIZE": "32", "BATCH_SIZE": "2", "SAMPLE_PROMPT": ""}
    done = call(project, "train.local.sh", "--data", str(text), "--train_steps", "3", "--output", "runs/run", **small)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 rank (1 left)") and "best.pt, step" not in done.stderr


def wheel(folder: Path, name: str, version: str) -> None:
    """An empty package, for pip to install."""
    about = f"{name}-{version}.dist-info"
    content = {
        "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        for part, written in content.items():
            file.writestr(f"{about}/{part}", written)


def test_train_frontier_on_a_login_node_installs_torch_for_rocm(tmp_path):
    make_project(tmp_path, environment="unused")
    (tmp_path / "wheels").mkdir()
    for name in ("requirements.txt", "rocm-reqs.txt"):
        for package, version in re.findall(r"^(\S+)==(\S+)", (ROOT / name).read_text(), re.MULTILINE):
            wheel(tmp_path / "wheels", package.replace("-", "_"), version)
    offline = {"PYTHON": sys.executable, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path / "wheels")}
    done = call(tmp_path, "train.frontier.sh", **offline)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == ".venv is ready: now sbatch train.frontier.sh [ARGUMENT ...]"
    (torch,) = (tmp_path / ".venv").glob("lib/python*/site-packages/torch-*")
    assert "+rocm" in torch.name


def test_train_frontier_outside_a_job_explains_itself(project):
    shown = call(project, "train.frontier.sh", "--help")
    assert shown.returncode == 0 and "sbatch train.frontier.sh --train_steps 200k" in shown.stdout
    assert call(project, "train.frontier.sh", "--train_steps", "9").returncode == 2
    within = call(project, "train.frontier.sh", SLURM_JOB_ID="1")  # as in an interactive allocation
    assert within.returncode == 2 and within.stderr.startswith("error: expected a job of sbatch with --ntasks-per-node")


# A job of one node, without Slurm: srun runs what it is given here, scancel reaches the rank, and all write down calls.
STUBS = {
    "srun": 'while [[ $1 == -* ]]; do shift; done; exec "$@"',
    "sbcast": "exit 1",
    "scancel": 'echo "scancel $*" >> calls; kill -USR2 "$(cat rank)"; exit 1',
    "scontrol": 'echo "scontrol $*" >> calls',
}
SAVES_AND_LEAVES = """
import os, pathlib, signal
signal.alarm(60)  # no orphan outlives a failed test
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
pathlib.Path("pid").write_text(str(os.getpid()))
os.rename("pid", "rank")
signal.sigwait([signal.SIGUSR2])
"""


@pytest.mark.parametrize("was_short", [0, 1])
def test_train_frontier_is_requeued_though_nothing_can_be_staged_told_or_written_down(project, text, was_short):
    for name, script in STUBS.items():
        path = fake(project, name, script, shell="/bin/bash")
    (project / "train.py").unlink()
    (project / "train.py").write_text(SAVES_AND_LEAVES)
    job = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_NTASKS_PER_NODE": "1", "SLURM_CPUS_PER_TASK": "1",
           "SLURM_JOB_NODELIST": "here", "SLURM_PROCID": "0", "SLURM_NPROCS": "1", "SLURM_LOCALID": "0",
           "NVME": "/proc/absent"}  # fmt: skip
    if was_short:
        (project / "logs").mkdir(exist_ok=True)
        (project / "logs" / "slurm_7.short").touch()
    with open("/dev/full", "w") as full:
        script = subprocess.Popen(
            [project / "train.frontier.sh", "--data", text], cwd=project, env=clean_environment() | path | job,
            stdout=full, stderr=full,
        )  # fmt: skip
    try:
        eventually(lambda: (project / "rank").exists() or script.poll() is not None, 60)
        script.send_signal(signal.SIGUSR1)
        assert script.wait(60) == was_short
    finally:
        script.kill()
        script.wait()
    # But not if its time was as short the last time: that would go on for ever.
    requeued = "" if was_short else "scontrol requeue 7\n"
    assert (project / "logs" / "slurm_7.short").exists()
    assert (project / "calls").read_text() == "scancel --signal=USR2 7\n" + requeued


def test_train_frontier_names_a_setting_that_is_no_number(project):
    job = {"SLURM_JOB_ID": "7", "SLURM_NTASKS_PER_NODE": "1"}
    done = call(project, "train.frontier.sh", SAVE_SECONDS="8m", **job)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: expected SAVE_SECONDS as whole seconds, got '8m': give it as 480\n"


def test_train_cuda_trains_with_the_settings_of_the_environment(project, text):
    settings = {"RANKS": "2", "CORES": "0", "DEVICE": "--cpu", "MODEL": "--dim 16 --depth 2", "CHUNK_SIZE": "32"}
    arguments = ["--data", str(text), "--output", "runs/box", "--train_steps", "40", "--batch_size", "2"]
    done = call(project, "train.cuda.sh", *arguments, **settings)
    assert done.returncode == 0, done.stderr
    run = World(project, text, 2, run="runs/box")
    assert {(file.rank, file.step) for file in run.checkpoints()} >= {(0, 40), (1, 40)}
    config = run.run.joinpath("config.json").read_text()
    for told in ('"gossip_recombination_alpha": 0.3', '"chunk_size": 32', '"batch_size": 2'):
        assert told in config
    assert " rank " in done.stdout  # the table
    again = call(project, "train.cuda.sh", "--resume", "runs/box", "--train_steps", "60", **settings)
    assert again.returncode == 0, again.stderr
    assert {file.step for file in run.checkpoints()} >= {60}


@pytest.mark.skipif(os.path.exists("/dev/nvidia0"), reason="here is a GPU")
def test_train_cuda_without_a_gpu_says_so(project, text):
    done = call(project, "train.cuda.sh", "--data", str(text))
    assert done.returncode == 2 and not (project / "runs").exists()
    assert done.stderr.splitlines()[-1].startswith("error: expected an NVIDIA GPU that torch can use, got none")


def fake(folder: Path, name: str, script: str, shell: str = "/bin/sh") -> dict[str, str]:
    """A program of that name before all others on the path."""
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / name).write_text(f"#!{shell}\n{script}\n")
    (folder / "bin" / name).chmod(0o755)
    return {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}


@pytest.mark.skipif(any(map(shutil.which, ("nvidia-smi", "rocm-smi"))), reason="here is a GPU")
def test_check_gpus_where_there_is_none_checks_the_rest(project):
    done = call(project, "check_gpus.sh")
    assert done.returncode == 3, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "none: neither nvidia-smi nor rocm-smi is here"
    assert lines[-1] == "ok: no GPU here; training works on the CPU: ./train.local.sh"
    assert re.search(r"^two ranks at 127\.0\.0\.1: they met within \d+ s$", done.stdout, re.MULTILINE)


def test_check_gpus_finds_a_wrong_gradient_on_any_device(monkeypatch):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert "scan right within" in check_gpus.compute(device)

    def half(projected, first, reset):
        h, last = scan(projected, first, reset)
        return 0.5 * h + 0.5 * h.detach(), last

    monkeypatch.setattr(check_gpus, "scan", half)
    with pytest.raises(ValueError, match="expected a scan right within"):
        check_gpus.compute(device)


def test_check_gpus_tells_of_a_torch_that_does_not_go_with_the_driver(project):
    listed = fake(project, "nvidia-smi", "echo '0, NVIDIA Test, 999.1, 81559 MiB, 4 MiB'")
    hidden = {"CUDA_VISIBLE_DEVICES": ""}  # as if torch had no kernel for it, wherever this test runs
    done = call(project, "check_gpus.sh", "--no_ranks", **listed, **hidden)
    assert done.returncode == 1
    assert done.stdout.splitlines()[0] == "NVIDIA: 0, NVIDIA Test, 999.1, 81559 MiB, 4 MiB"
    assert "the driver is NVIDIA's: install a torch whose CUDA the driver supports" in done.stdout
    assert done.stdout.splitlines()[-1] == "failed: torch"


def test_check_gpus_tells_of_a_tool_that_hangs_and_of_devices_that_cannot_be_used(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", fake(tmp_path, "nvidia-smi", "exec sleep 60")["PATH"])
    monkeypatch.setattr(check_gpus, "TOOL_SECONDS", 0.1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)  # NVML's word, which needs no working driver
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def broken(device):
        raise RuntimeError("CUDA unknown error")

    monkeypatch.setattr(torch.cuda, "get_device_name", broken)
    assert check_gpus.main(["--no_ranks"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"NVIDIA: FAILED: .*nvidia-smi.* timed out after 0.1 seconds", lines[0])
    assert "device 1: FAILED: CUDA unknown error" in lines
    assert lines[-1] == "failed: NVIDIA, torch, device 0, device 1"


def test_check_gpus_tells_of_a_driver_that_fails_and_of_ranks_that_do_not_meet(project):
    broken = fake(project, "nvidia-smi", "echo 'Driver/library version mismatch' >&2; exit 18")
    flags = ["--gossip_host", "nowhere0", "--output", "/proc/absent"]
    done = call(project, "check_gpus.sh", *flags, CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="", **broken)
    assert done.returncode == 1
    assert "NVIDIA: FAILED: nvidia-smi failed: Driver/library version mismatch" in done.stdout
    assert "two ranks at nowhere0: FAILED: " in done.stdout
    assert done.stdout.splitlines()[-1] == "failed: NVIDIA, torch, output /proc/absent, two ranks at nowhere0"


@pytest.mark.parametrize("name", ["requirements.txt", "rocm-reqs.txt"])
def test_requirements_are_pinned_each_with_its_reason(name):
    lines = [line for line in (ROOT / name).read_text().splitlines() if not line.startswith(("#", "-"))]
    assert lines and all(PIN.fullmatch(line) for line in lines)


def test_requirements_for_rocm_are_the_same_with_another_torch():
    lines = (ROOT / "rocm-reqs.txt").read_text().splitlines()
    torch = (ROOT / "requirements.txt").read_text().splitlines()[0].split()[0]
    assert "-r requirements.txt" in lines and any(line.startswith(f"{torch}+rocm") for line in lines)
