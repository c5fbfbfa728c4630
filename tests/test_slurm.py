"""train.frontier.sh on a Slurm cluster: its header as it stands, fewer and smaller ranks, on the CPU."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bench.injection import Injection
from tests.conftest import TINY
from tests.projects import make_project
from tests.ranks import ROOT, World
from tests.slurm import NODES, Cluster, cluster

FLAGS = ["--val_every", "0", "--gossip_heartbeat", "0.2", "--gossip_liveness", "2", "--gossip_mixing_rate", "0.2",
         "--save_every", "1g", "--no_fitness_weighted_checkpointing", "--log_every", "10"]  # fmt: skip
FOREVER = ["--train_steps", "1g"]


class Job(World):
    """A job of train.frontier.sh on two nodes with so many tasks each, and its ranks as World sees them."""

    def __init__(self, slurm: Cluster, cwd: Path, text: Path, tasks: int, *flags: str, options: tuple = ()) -> None:
        super().__init__(cwd, text, 2 * tasks, run="runs/run")
        self.slurm = slurm
        self.nvme = slurm.nvme / "made"  # by the job
        made = {"VENV": cwd / "venv", "NVME": self.nvme, "DEVICE": "--cpu", "GOSSIP_HOST": slurm.address}
        settings = {name: str(value) for name, value in made.items()}
        command = ["sbatch", "--parsable", "--nodes=2", f"--ntasks-per-node={tasks}", *options, "train.frontier.sh"]
        arguments = [*TINY[:-3], "--data", str(text), "--val_bytes", "512", *FLAGS, "--output", "runs/run", *flags]
        done = subprocess.run(
            [*command, *arguments], cwd=cwd, env=slurm.environment | settings, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        self.id = done.stdout.strip()
        self.output = cwd / "logs" / f"slurm_{self.id}.out"

    def eventually(self, condition, seconds=120.0):
        return self.slurm.eventually(condition, self.output, seconds)

    def said(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def trains(self) -> None:
        """Wait until every rank has trained."""

        def training() -> bool:
            assert self.slurm.state(self.id) in ("PENDING", "CONFIGURING", "RUNNING"), "it ended"
            return min(self.step(rank) for rank in range(self.size)) > 0

        self.eventually(training)

    def ends(self) -> str:
        """Wait until the job is over; its last state."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        return self.eventually(lambda: self.slurm.state(self.id) in over and self.slurm.state(self.id))

    def saved(self) -> list[int]:
        """The ranks that have a checkpoint."""
        return sorted({file.rank for file in self.checkpoints()})


@pytest.fixture(scope="module")
def slurm():
    with cluster() as made:
        yield made


@pytest.fixture
def submit(slurm, text, tmp_path):
    """Submits a job from a copy of the project, with an environment small enough to be staged often."""
    make_project(tmp_path, environment="venv")
    jobs = []

    def start(*arguments, **extra):
        jobs.append(Job(slurm, tmp_path, text, *arguments, **extra))
        return jobs[-1]

    yield start
    for job in jobs:
        subprocess.run(["scancel", "--signal=KILL", "--full", job.id], env=slurm.environment, capture_output=True)
        subprocess.run(["scancel", job.id], env=slurm.environment, capture_output=True)
        job.eventually(lambda job=job: slurm.state(job.id) not in ("RUNNING", "PENDING", "COMPLETING"))


def environment_of(pid: int) -> dict[str, str]:
    entries = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return dict(entry.split("=", 1) for entry in entries if entry)


def python_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[0]


def test_slurm_job_trains_each_rank_on_its_gpu_from_its_nodes_disk(submit, slurm):
    job = submit(2, "--train_steps", "300")
    job.trains()
    for rank in range(4):
        told = environment_of(job.pid(rank))
        assert told["ROCR_VISIBLE_DEVICES"] == str([4, 5][rank % 2])
        assert told["SLURMD_NODENAME"] == NODES[rank // 2]
        assert (told["RANK"], told["LOCAL_RANK"], told["LOCAL_WORLD_SIZE"]) == (str(rank), str(rank % 2), "2")
        assert told["TRITON_CACHE_DIR"] == f"{job.nvme}/gruboros_{job.id}/cache/triton"
        assert python_of(job.pid(rank)) == f"{job.nvme}/gruboros_{job.id}/venv/bin/python"
    assert job.ends() == "COMPLETED"
    assert [os.listdir(disk / "made") for disk in slurm.disks(NODES[:2])] == [[], []]
    assert job.saved() == [0, 1, 2, 3] and {file.step for file in job.checkpoints()} == {300}
    assert any(job.events(rank, "sent", "merged") for rank in range(4))
    assert slurm.job(job.id)["Restarts"] == "0"


@pytest.mark.injects(Injection.KILL, Injection.RESTART)
def test_slurm_job_survives_a_dead_node_and_restarts_a_killed_rank(submit, slurm):
    job = submit(1, "--train_steps", "1000")
    job.trains()
    slurm.kill_node(NODES[1])
    try:
        first = job.pid(0)
        os.kill(first, signal.SIGKILL)
        job.eventually(lambda: "rank 0 was killed by SIGKILL: restart 1 of at most 5" in job.said())
        job.ends()
        assert job.pid(0) != first
        assert {file.rank: file.step for file in job.checkpoints()} == {0: 1000}
        assert job.step(1) < 1000
        assert re.search(rf"^srun: error: .*{NODES[1]}", job.said(), re.MULTILINE)
    finally:
        slurm.start_node(NODES[1])


def test_slurm_job_saves_before_its_time_limit_is_requeued_and_resumes(submit, slurm):
    job = submit(1, "--train_steps", "250", options=("--time=10", "--signal=B:USR1@40"))
    job.trains()
    pids = [job.pid(rank) for rank in range(2)]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)  # so that nobody is done before
    slurm.run("scontrol", "update", f"JobId={job.id}", "EndTime=now+60")  # Slurm looks at limits every 30 s
    job.eventually(lambda: "the time limit is near" in job.said())
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    job.eventually(lambda: "2 of 2 ranks have saved since" in job.said())
    reached = {file.rank: file.step for file in job.checkpoints()}
    assert max(reached.values()) < 250
    job.eventually(lambda: slurm.state(job.id) == "PENDING")
    slurm.run("scontrol", "update", f"JobId={job.id}", "TimeLimit=10")  # enough for all the rest, however slow
    assert job.ends() == "COMPLETED"
    for rank, step in reached.items():
        assert re.search(rf"resumed checkpoint_rank_{rank:04d}_step_{step:06d}_", job.log(rank))
    assert slurm.job(job.id)["Restarts"] == "1"
    assert [job.checkpoints(rank)[-1].step for rank in range(2)] == [250, 250]


def test_slurm_job_whose_time_is_short_before_there_is_a_run_is_requeued_too(submit, slurm):
    job = submit(1, "--train_steps", "20")
    job.eventually(lambda: f"job {job.id}, restart 0" in job.said())
    slurm.run("scancel", "--batch", "--signal=USR1", job.id)
    job.eventually(lambda: "0 of 2 ranks have saved since" in job.said())
    job.eventually(lambda: slurm.state(job.id) == "PENDING")
    assert job.ends() == "COMPLETED"
    assert slurm.job(job.id)["Restarts"] == "1" and job.saved() == [0, 1]


def test_slurm_job_that_is_cancelled_saves_first_and_does_without_a_nodes_disk(submit, slurm):
    (disk,) = slurm.disks(NODES[1:2])
    shutil.rmtree(disk / "made", ignore_errors=True)
    (disk / "made").touch()  # no folder can be made there
    job = submit(1, *FOREVER)
    job.trains()
    (disk / "made").unlink()
    assert python_of(job.pid(0)) == f"{job.nvme}/gruboros_{job.id}/venv/bin/python"
    assert python_of(job.pid(1)) == f"{job.cwd}/venv/bin/python"
    assert "warning: the environment is on 1 of 2 nodes: the ranks of the others take it from" in job.said()
    assert job.saved() == []
    slurm.run("scancel", job.id)
    assert job.ends() == "CANCELLED"
    job.eventually(lambda: job.saved() == [0, 1])
    assert slurm.job(job.id)["Restarts"] == "0"


def test_plain_srun_starts_a_population(slurm, submit, text, tmp_path):
    options = ["--nodes=2", "--ntasks-per-node=1", "--kill-on-bad-exit=0", "--wait=0"]
    flags = [*TINY, *FLAGS, "--gossip_host", slurm.address, "--data", str(text), "--train_steps", "1000"]
    command = ["srun", *options, sys.executable, "train.py", *flags, "--output", "run"]
    done = subprocess.run(command, cwd=tmp_path, env=slurm.environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    run = World(tmp_path, text, 2)
    assert {(file.rank, file.step) for file in run.checkpoints()} == {(0, 1000), (1, 1000)}
    assert "rank 0 of 2 (slurm)" in run.log(0) and run.events(0, "sent", "merged", "averaged")


def test_ranks_of_two_nodes_meet_where_ntasks_per_node_is_but_a_maximum(slurm, tmp_path):
    """--ntasks-per-node=4 would let 4 on each, and there are 4: every rank would listen on the loopback."""
    script = tmp_path / "who.py"
    script.write_text(
        "import os, socket\n"
        "from runtime.ranks import identity_from_environment\n"
        "identity = identity_from_environment(os.environ)\n"
        "print(os.environ['SLURMD_NODENAME'], identity.world_size, identity.local_world_size, flush=True)\n"
    )
    batch = tmp_path / "batch.sh"
    batch.write_text(f"#!/bin/sh\nexport PYTHONPATH={ROOT}\nsrun {sys.executable} {script}\n")
    options = ["--nodes=2", "--ntasks=4", "--ntasks-per-node=4", f"--output={tmp_path / 'said'}"]
    slurm.run("sbatch", "--wait", *options, str(batch))
    said = sorted(line.split() for line in (tmp_path / "said").read_text().splitlines())
    assert len(said) == 4 and len({node for node, *_ in said}) == 2
    assert {tuple(sizes) for _, *sizes in said} == {("4", "0")}
