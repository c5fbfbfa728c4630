"""A Slurm cluster of a test's own: munged, slurmctld and four slurmd on this machine, as Frontier's nodes in small.

Each node is a mount namespace, in which the folder nvme is a disk of its own. Nothing else is its own: most of the
CPUs that it claims to have are not there, and its GPUs are device files without a driver.
"""

import contextlib
import os
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gossip.network_utils import choose_address
from runtime.errors import UserError
from runtime.ranks import Identity
from tests.ranks import clean_environment, eventually

NODES = [f"frontier{number:05d}" for number in range(1, 5)]
GPUS = 8
CORES = 64
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
PlugStackConfig={folder}/plugstack.conf
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
JobRequeue=1
KillWait=30
SlurmdTimeout=10
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_min_interval=2,sched_interval=2,bf_interval=2
"""


class Cluster:
    """Four nodes in the partition of train.frontier.sh. Commands of Slurm find it by `environment`; address: of all
    nodes, and no loopback address, which ranks on several nodes must not have."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.nvme = folder / "nvme"
        self.address = choose_address(None, Identity(0, 0, 2, 1, "slurm"))
        self.environment = {**clean_environment(), "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen] = []
        self._nodes: dict[str, subprocess.Popen] = {}

    def start(self) -> None:
        """Write the configuration, start the daemons, and wait until all nodes are idle."""
        self._configure()
        keys = self.folder / "munge"
        paths = [f"--{name}={keys / name}" for name in ("key-file", "socket", "pid-file", "log-file", "seed-file")]
        user = ["--reuid=munge", "--regid=munge", "--clear-groups"]
        self._daemons.append(self._daemon("munged", *paths, "--foreground", options=user))
        eventually((keys / "socket").exists, 20)
        self._daemons.append(self._daemon("slurmctld", "-D", "-c"))
        for node in NODES:
            self.start_node(node)

    def start_node(self, node: str) -> None:
        """Start the daemon of a node, with an empty disk, and wait until jobs can run there."""
        (disk,) = self.disks([node])
        shutil.rmtree(disk, ignore_errors=True)
        disk.mkdir()
        mount = 'mount --bind "$0" "$1" && exec slurmd -D -N "$2"'
        self._nodes[node] = self._daemon("unshare", "--mount", "sh", "-c", mount, str(disk), str(self.nvme), node)
        eventually(lambda: self.run("sinfo", "--noheader", "--nodes", node, "--format=%T").strip() == "idle", 30)

    def disks(self, nodes: list[str]) -> list[Path]:
        """What is the folder nvme of each of these nodes."""
        return [self.folder / f"disk.{node}" for node in nodes]

    def kill_node(self, node: str) -> None:
        """End everything that runs on a node at once: its daemon, steps and tasks."""
        home = os.readlink(f"/proc/{self._nodes[node].pid}/ns/mnt")
        for _ in range(3):  # a process may be starting another one meanwhile
            for pid in filter(str.isdigit, os.listdir("/proc")):
                with contextlib.suppress(ProcessLookupError, FileNotFoundError, PermissionError):
                    if os.readlink(f"/proc/{pid}/ns/mnt") == home:
                        os.kill(int(pid), signal.SIGKILL)
        self._nodes.pop(node).wait()

    def close(self) -> None:
        """End every process of the cluster."""
        for node in list(self._nodes):
            self.kill_node(node)
        for daemon in self._daemons:
            daemon.kill()
            daemon.wait()

    def run(self, *command: str) -> str:
        """What a command of Slurm prints."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    def state(self, job: str) -> str:
        """A job's state: PENDING, RUNNING, COMPLETING, COMPLETED, FAILED ..."""
        return self.job(job)["JobState"]

    def job(self, job: str) -> dict[str, str]:
        """What Slurm knows of a job."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def eventually(self, condition: Callable[[], Any], log: Path, seconds: float = 120.0) -> Any:
        """eventually(), showing the job's log where it does not come true."""
        try:
            return eventually(condition, seconds)
        except AssertionError as error:
            said = log.read_text() if log.exists() else f"no {log}"
            raise AssertionError(f"{error}\n{said}\n{self.run('squeue')}{self.run('sinfo')}") from None

    def _daemon(self, *command: str, options: list[str] | None = None) -> subprocess.Popen:
        # The kernel ends it with this process, however that ends.
        prefix = ["setpriv", "--pdeathsig", "KILL", *(options or [])]
        with open(self.folder / "daemons.out", "ab") as output:
            return subprocess.Popen(
                [*prefix, *command], env=self.environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip

    def _configure(self) -> None:
        for name in ("state", "munge", "nvme", "gpus"):
            (self.folder / name).mkdir()
        key = self.folder / "munge" / "key-file"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        for path in (key.parent, key):
            shutil.chown(path, "munge", "munge")
        # Slurm tells a task of its GPUs only where they are devices; that of /dev/null's kind is harmless.
        for number in range(GPUS):
            os.mknod(self.folder / "gpus" / f"gpu{number}", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        host = socket.gethostname()
        ports = _free_ports(len(NODES) + 1)
        lines = [CONFIGURATION.format(host=host, port=ports[0], folder=self.folder)]
        lines += [
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={CORES} RealMemory=500000 "
            f"Gres=gpu:{GPUS} Feature=nvme\n"
            for node, port in zip(NODES, ports[1:], strict=True)
        ]
        lines += ["PartitionName=batch Nodes=ALL Default=YES MaxTime=24:00:00 State=UP\n"]
        (self.folder / "slurm.conf").write_text("".join(lines))
        (self.folder / "plugstack.conf").touch()
        gpus = f"Name=gpu File={self.folder}/gpus/gpu[0-{GPUS - 1}] Flags=amd_gpu_env\n"
        (self.folder / "gres.conf").write_text(f"NodeName={','.join(NODES)} {gpus}")


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    """A cluster as long as the block lasts; nothing of it stays. Skips where none can be had."""
    for tool in ("munged", "slurmctld", "slurmd", "setpriv", "unshare"):
        if shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None:
            pytest.skip(f"no {tool} on this machine")
    if os.geteuid() != 0:
        pytest.skip("a Slurm cluster needs root")
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode != 0:
        pytest.skip("no mount namespaces on this machine")
    with tempfile.TemporaryDirectory(prefix="gruboros-slurm-") as name:
        folder = Path(name)
        folder.chmod(0o711)  # munged is another user, and wants its socket within everyone's reach
        try:
            made = Cluster(folder)
        except UserError as error:
            pytest.skip(str(error))
        try:
            made.start()
            yield made
        finally:
            made.close()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
