"""Hosts of a test's own: network namespaces around one bridge, with private addresses that exist nowhere else.

Nothing here touches the interfaces or addresses of the machine: every end of every cable lies in a namespace.
"""

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PREFIX = "gruboros-test"
_numbers = itertools.count()


class Host:
    """A namespace with a cable to the switch for each of its `addresses`: eth0, eth1, ..."""

    def __init__(self, switch: str, name: str, addresses: list[str]) -> None:
        self.name = name
        self.addresses = addresses
        self._switch = switch
        _make_namespace(name)
        for number, address in enumerate(addresses):
            port = self._port(number)
            ends = ["name", f"eth{number}", "netns", name, "type", "veth", "peer", "name", port, "netns", switch]
            _run("ip", "link", "add", *ends)
            _run("ip", "-n", switch, "link", "set", port, "master", "bridge", "up")
            _run("ip", "-n", name, "address", "add", f"{address}/24", "dev", f"eth{number}")
            _run("ip", "-n", name, "link", "set", f"eth{number}", "up")

    @property
    def address(self) -> str:
        """The address of eth0."""
        return self.addresses[0]

    def start(self, *arguments: str, **options) -> subprocess.Popen:
        """Start Python with `arguments` on this host, in the repository's root; options: of subprocess.Popen."""
        command = ["ip", "netns", "exec", self.name, sys.executable, *arguments]
        return subprocess.Popen(command, cwd=ROOT, text=True, start_new_session=True, **options)

    def unplug(self) -> None:
        """Pull eth0's cable at the switch: this host goes on, and whatever it sends is lost."""
        _run("ip", "-n", self._switch, "link", "set", self._port(0), "down")

    def drop(self, other: "Host") -> None:
        """Let the firewall drop every packet from and to eth0 of `other`, without a word."""
        rules = "".join(
            f"chain {hook} {{ type filter hook {hook} priority 0; ip {side} {other.address} drop; }}\n"
            for hook, side in (("input", "saddr"), ("output", "daddr"))
        )
        _run("ip", "netns", "exec", self.name, "nft", "-f", "-", input=f"table inet test {{\n{rules}}}\n")

    def slow_down(self, megabits: float) -> None:
        """Let eth0's cable carry at most so many Mbit/s in each direction, with the queue of an ordinary router."""
        for namespace, device in self._ends():
            limit = ["tbf", "rate", f"{megabits}mbit", "burst", "32kbit", "latency", "100ms"]
            _run("tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", *limit)

    def mend(self) -> None:
        """Take back unplug(), drop() and slow_down()."""
        _run("ip", "-n", self._switch, "link", "set", self._port(0), "up")
        _run("ip", "netns", "exec", self.name, "nft", "flush", "ruleset")
        for namespace, device in self._ends():
            if "tbf" in _run("tc", "-n", namespace, "qdisc", "show", "dev", device):
                _run("tc", "-n", namespace, "qdisc", "delete", "dev", device, "root")

    def passed(self) -> int:
        """Bytes that came or went through eth0 so far."""
        (link,) = json.loads(_run("ip", "-n", self.name, "-j", "-s", "link", "show", "dev", "eth0"))
        return link["stats64"]["tx"]["bytes"] + link["stats64"]["rx"]["bytes"]

    def _ends(self) -> list[tuple[str, str]]:
        return [(self.name, "eth0"), (self._switch, self._port(0))]

    def _port(self, number: int) -> str:
        return f"p{self.name.rpartition('-')[2]}.{number}"  # an interface's name has at most 15 characters


@contextlib.contextmanager
def network(*interfaces: int) -> Iterator[list[Host]]:
    """Hosts with so many interfaces each: 10.77.N.H is interface N of host H. Skips where there are no namespaces.

    Whatever happens, at the end every process on them is killed, and they are gone.
    """
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    for tool in ("ip", "nft", "tc"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} on this machine")
    _sweep()
    switch = f"{PREFIX}-{os.getpid()}-{next(_numbers)}"
    made = [switch]
    try:
        try:
            _make_namespace(switch)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces on this machine: {error.stderr.strip()}")
        _run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "bridge", "up")
        hosts = []
        for number, count in enumerate(interfaces, start=1):
            made.append(f"{switch}-{number}")
            hosts.append(Host(switch, made[-1], [f"10.77.{interface}.{number}" for interface in range(count)]))
        yield hosts
    finally:
        for name in made:
            _remove_namespace(name)


def _make_namespace(name: str) -> None:
    _run("ip", "netns", "add", name)
    _run("ip", "-n", name, "link", "set", "lo", "up")


def _remove_namespace(name: str) -> None:
    """Kill what runs in a namespace, and delete it with its cables. One that is not there is no error."""
    if name not in _namespaces():
        return
    for pid in _run("ip", "netns", "pids", name).split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    _run("ip", "netns", "delete", name)


def _sweep() -> None:
    """Remove what a run of the tests that was killed has left."""
    for name in _namespaces():
        if name.startswith(PREFIX) and not Path("/proc", name.removeprefix(f"{PREFIX}-").partition("-")[0]).exists():
            _remove_namespace(name)


def _namespaces() -> list[str]:
    return [line.split()[0] for line in _run("ip", "netns", "list").splitlines()]


def _run(*command: str, input: str | None = None) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, input=input, timeout=20).stdout
