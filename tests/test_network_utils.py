"""Addresses and sockets: what is chosen, what is refused, and that only that is listened on."""

import asyncio
import errno
import socket

import pytest

from bench.injection import Injection
from gossip.faults import Fault, ProtocolError
from gossip.network_utils import choose_address, connect, join_address, listen, parse_peer
from runtime.errors import UserError
from runtime.ranks import Identity

HERE = Identity(0, 0, 4, 4, "environment")
SEVERAL_HOSTS = Identity(0, 0, 8, 4, "slurm")
UNKNOWN_HOSTS = Identity(0, 0, 8, 0, "environment")


def test_choose_address_stays_on_the_loopback_for_a_population_of_one_host():
    assert choose_address(None, HERE) == "127.0.0.1"


def test_choose_address_of_several_hosts_is_the_default_routes(monkeypatch):
    class Probe(socket.socket):
        def connect(self, address):
            assert self.type == socket.SOCK_DGRAM  # which sends nothing
            super().connect(("127.0.0.1", 9))

    monkeypatch.setattr(socket, "socket", Probe)
    assert choose_address(None, SEVERAL_HOSTS) == "127.0.0.1"


def test_choose_address_without_a_route_asks_for_a_host(monkeypatch):
    class Probe(socket.socket):
        def connect(self, address):
            raise OSError("Network is unreachable")

    monkeypatch.setattr(socket, "socket", Probe)
    with pytest.raises(UserError, match="--gossip_host"):
        choose_address(None, SEVERAL_HOSTS)


@pytest.mark.parametrize(
    ("host", "address"), [("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("lo", "127.0.0.1"), ("localhost", "127.0.0.1")]
)
def test_choose_address_takes_addresses_names_and_interfaces(host, address):
    assert choose_address(host, HERE) == address
    assert choose_address(host, UNKNOWN_HOSTS) == address
    said = (
        f"^expected an address that other hosts reach, .* 4 of 8 .*, got {host}, which is {address}: give --gossip_host"
    )
    with pytest.raises(UserError, match=said):
        choose_address(host, SEVERAL_HOSTS)


def test_choose_address_refuses_a_host_that_is_known_to_itself_alone(monkeypatch):
    entry = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **more: [entry])
    with pytest.raises(UserError, match=r"got node17, which is 127\.0\.1\.1"):
        choose_address("node17", SEVERAL_HOSTS)
    assert choose_address("10.0.0.1", SEVERAL_HOSTS) == "10.0.0.1"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "no.such.host.invalid", "a..b", "x" * 100])
def test_choose_address_refuses_wildcards_and_what_does_not_resolve(host):
    with pytest.raises(UserError):
        choose_address(host, HERE)


def test_listen_takes_a_port_on_that_address_alone():
    with listen("127.0.0.1", 0) as listener:
        address, port = listener.getsockname()
        assert address == "127.0.0.1" and port > 0 and not listener.getblocking()
        with pytest.raises(OSError), socket.create_connection(("127.0.0.2", port), timeout=5):
            pass


@pytest.mark.injects(Injection.PORT_TAKEN)
def test_listen_refuses_a_taken_port_in_one_line():
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(UserError, match=f"127.0.0.1:{port}.*in use") as caught:
            listen("127.0.0.1", port)
        assert "\n" not in str(caught.value)


@pytest.mark.injects(Injection.PORT_IN_TIME_WAIT)
def test_listen_takes_a_port_again_whose_connections_linger():
    with listen("127.0.0.1", 0) as listener:
        listener.setblocking(True)
        where = listener.getsockname()
        client = socket.create_connection(where)
        accepted, _ = listener.accept()
        accepted.close()  # closes first: its end of the connection stays in TIME_WAIT
        client.close()
    with socket.socket() as careless, pytest.raises(OSError, match="in use"):
        careless.bind(where)
    listen(*where).close()


@pytest.mark.parametrize(("address", "port"), [("192.0.2.1", 0), ("127.0.0.1", -1), ("127.0.0.1", 65536)])
def test_listen_refuses_foreign_addresses_and_impossible_ports(address, port):
    with pytest.raises(UserError):
        listen(address, port)


@pytest.mark.parametrize(
    ("text", "peer"),
    [("node17:29400", ("node17", 29400)), ("10.0.0.1:1", ("10.0.0.1", 1)), ("[fd00::1]:65535", ("fd00::1", 65535))],
)
def test_parse_peer_and_join_address_are_inverse(text, peer):
    assert parse_peer(text) == peer and join_address(*peer) == text


@pytest.mark.parametrize(
    "text", ["", "node17", "node17:", ":29400", "node17:0", "node17:65536", "node17:-1", "fd00::1:5", "a:1²"]
)
def test_parse_peer_refuses_anything_else(text):
    with pytest.raises(UserError):
        parse_peer(text)


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "localhost:{port}"])
def test_connect_reaches_a_listener_by_address_or_name(address):
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        connection = asyncio.run(connect(address.format(port=port)))
        assert connection.getpeername() == ("127.0.0.1", port)
        connection.close()


def test_connect_takes_the_first_address_of_a_name_that_answers(monkeypatch):
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        stream = (socket.SOCK_STREAM, 0, "")
        found = [
            (socket.AF_INET, *stream, ("0.0.0.0", port)),
            (socket.AF_INET6, *stream, ("::1", port, 0, 0)),
            (socket.AF_INET, *stream, ("127.0.0.1", port)),
        ]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        connection = asyncio.run(connect(f"host:{port}"))
        assert connection.getpeername() == ("127.0.0.1", port)
        connection.close()


def test_connect_holds_its_own_shortage_against_nobody(monkeypatch):
    def without_descriptors(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    def without_threads(*_, **__):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("gossip.network_utils._family", without_descriptors)
    monkeypatch.setattr("gossip.network_utils.threading.Thread", without_threads)
    for address, said in (("127.0.0.1:1", "Too many open files"), ("localhost:1", "can't start new thread")):
        with pytest.raises(ProtocolError, match=said) as caught:
            asyncio.run(connect(address))
        assert caught.value.fault is Fault.OUT_OF_MEMORY


@pytest.mark.injects(Injection.UNRESOLVABLE_ADDRESS)
def test_connect_names_the_fault_when_nobody_listens():
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
    long = f"127.0.0.1:{'1' * 5000}"
    for address in (f"127.0.0.1:{port}", "no.such.host.invalid:1", "not an address", "a..b:1", "224.0.0.1:1", long):
        with pytest.raises(ProtocolError) as caught:
            asyncio.run(connect(address))
        assert caught.value.fault is Fault.UNREACHABLE
