"""Addresses and sockets: where a rank listens, and how it reaches a peer."""

import asyncio
import concurrent.futures
import contextlib
import errno
import fcntl
import ipaddress
import socket
import struct
import threading

from gossip.faults import Fault, ProtocolError
from runtime.errors import UserError
from runtime.ranks import Identity

BACKLOG = 128  # connections that the kernel holds until they are accepted
LOOKUPS_LIMIT = 4  # host names looked up at once in this process, with a thread each
SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)  # of this host's, which say nothing of a peer
_lookups = threading.BoundedSemaphore(LOOKUPS_LIMIT)
_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface


def choose_address(gossip_host: str | None, identity: Identity) -> str:
    """The numeric address that this rank listens on and is registered under.

    gossip_host: a numeric address, the name of a host, or the name of an interface such as hsn0. None: 127.0.0.1 if the
    whole population is on this host, else the address of the default route. Raises UserError when there is none, and
    for a loopback address where other hosts have ranks too.
    """
    if gossip_host is None:
        alone = identity.local_world_size == identity.world_size
        return "127.0.0.1" if alone else _default_route_address()
    if gossip_host in {name for _, name in socket.if_nameindex()}:
        address = _interface_address(gossip_host)
    else:
        address = gossip_host if _is_numeric(gossip_host) else _resolve(gossip_host)
    if _parsed(address).is_unspecified:
        raise UserError(f"expected one address to listen on, got {gossip_host}: name an address or an interface")
    if _parsed(address).is_loopback and 0 < identity.local_world_size < identity.world_size:
        raise UserError(
            f"expected an address that other hosts reach, since {identity.local_world_size} of {identity.world_size} "
            f"ranks are on this one, got {gossip_host}, which is {address}: give --gossip_host another address or an "
            "interface"
        )
    return address


def listen(address: str, port: int) -> socket.socket:
    """A non-blocking socket that listens on `address` (numeric) alone; port 0: one the kernel picks.

    Raises UserError for a port that is taken or not allowed, or an address that is not this host's.
    """
    if not 0 <= port < 65536:
        raise UserError(f"expected a port from 0 to 65535, got {port}: 0 picks a free one")
    listener = socket.socket(_family(address), socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        advice = "choose another port, or 0" if error.errno == errno.EADDRINUSE else "choose another address or port"
        raise UserError(
            f"expected to listen on {join_address(address, port)}, got {error.strerror}: {advice}"
        ) from None
    listener.setblocking(False)
    return listener


def parse_peer(text: str) -> tuple[str, int]:
    """Host and port of "host:port" or "[v6 address]:port". Raises UserError."""
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""  # an IPv6 address without its brackets: where it ends cannot be told
    if not (colon and host and len(port) <= 5 and port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise UserError(f"expected a peer as host:port, got {text!r}: for example node17:29400 or [fd00::17]:29400")
    return host, int(port)


def join_address(host: str, port: int) -> str:
    """The inverse of parse_peer()."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def connect(address: str) -> socket.socket:
    """A connection to `address` ("host:port"); of a name's several addresses the first that answers.

    Raises ProtocolError UNREACHABLE, also for an address that is not one host's (0.0.0.0, ::, multicast), and
    OUT_OF_MEMORY where it is this host that lacks descriptors, memory or threads. The caller bounds the time and
    cancels: a lookup that hangs is left behind on its own thread.
    """
    try:
        host, port = parse_peer(address)
        if _is_numeric(host):
            return await _connect(_family(host), (host, port))
        for family, where in await _look_up(host, port):
            try:
                return await _connect(family, where)
            except OSError as error:
                failure = error
        raise failure
    except (OSError, ValueError) as error:  # ValueError: no host and port, or a name that is none
        fault = Fault.OUT_OF_MEMORY if getattr(error, "errno", None) in SHORTAGES else Fault.UNREACHABLE
        raise ProtocolError(fault, getattr(error, "strerror", None) or str(error)) from error


async def _connect(family: socket.AddressFamily, where: tuple) -> socket.socket:
    if not _is_one_host(where[0]):
        raise OSError(f"{where[0]} is not the address of one host")
    with contextlib.ExitStack() as closing:
        connection = closing.enter_context(socket.socket(family, socket.SOCK_STREAM))
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, where)
        closing.pop_all()
    return connection


async def _look_up(name: str, port: int) -> list[tuple[socket.AddressFamily, tuple]]:
    """The families and socket addresses of `name`, looked up on a daemon thread: nobody waits for it at the end.

    The event loop's own threads would be joined there, however long the resolver hangs. Raises OSError, UnicodeError.
    """
    if not _lookups.acquire(blocking=False):
        raise OSError(f"{LOOKUPS_LIMIT} other names are still being looked up")
    found = concurrent.futures.Future()
    found.set_running_or_notify_cancel()  # from here on its result can be set, whoever waits for it
    try:
        threading.Thread(target=_resolve_into, args=(found, name, port), name="gossip-resolver", daemon=True).start()
    except RuntimeError as error:  # the system has no thread to spare
        _lookups.release()
        raise OSError(errno.ENOBUFS, str(error)) from error
    return [(family, where) for family, _, _, _, where in await asyncio.wrap_future(found)]


def _resolve_into(found: concurrent.futures.Future, name: str, port: int) -> None:
    try:
        result = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    except Exception as error:
        _lookups.release()
        found.set_exception(error)
    else:
        _lookups.release()
        found.set_result(result)


def _is_numeric(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_one_host(address: str) -> bool:
    # The kernel takes 0.0.0.0 for this host.
    return not (_parsed(address).is_unspecified or _parsed(address).is_multicast)


def _parsed(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """A numeric address; an IPv4 one that is written as IPv6, as IPv4."""
    parsed = ipaddress.ip_address(address)
    return getattr(parsed, "ipv4_mapped", None) or parsed


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ipaddress.ip_address(address).version == 6 else socket.AF_INET


def _resolve(name: str) -> str:
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        interfaces = ", ".join(interface for _, interface in socket.if_nameindex())
        raise UserError(
            f"expected an address, a host's name or an interface ({interfaces}) for --gossip_host, got {name!r}: "
            "it does not resolve"
        ) from None
    found.sort(key=lambda entry: entry[0] != socket.AF_INET)
    return found[0][4][0]


def _interface_address(name: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()))
        except OSError:
            raise UserError(
                f"expected an interface with an IPv4 address for --gossip_host, got {name}: name an address instead"
            ) from None
    return socket.inet_ntoa(answer[20:24])  # struct ifreq: 16 bytes of name, then family, port, address


def _default_route_address() -> str:
    # Connecting a datagram socket sends nothing: the kernel only looks up which of our addresses the route would use.
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # an address kept for documentation (RFC 5737)
        except OSError:
            raise UserError(
                "expected a default route to tell this host's address, got none: give --gossip_host"
            ) from None
        return probe.getsockname()[0]
