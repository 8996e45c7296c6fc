"""Which addresses may be opened for a caller: named, resolved, judged, and then opened as judged and not by name.

A name is resolved once for each connection. Every address it has is judged, and the connection goes to one of these
addresses: a name that answers otherwise a moment later (DNS rebinding) changes nothing.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit, urlunsplit

from tsm_core.errors import CallerError, WorldError

Network = Literal["loopback", "private", "public"]
IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolver = Callable[..., Sequence[tuple[Any, ...]]]  # socket.getaddrinfo, or a test's

NETWORKS: tuple[Network, ...] = ("loopback", "private", "public")
# files that hold their own video; a playlist could point to other files and hosts
FILE_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,gif,ogg,asf,nut,mxf,ivf,dv,"
    "h264,hevc,av1,m4v,mjpeg,apng"
)
PORTS = {"rtsp": 554, "rtsps": 322, "http": 80, "https": 443, "mqtt": 1883, "mqtts": 8883}

NEVER = tuple(
    ipaddress.ip_network(net)
    for net in (
        "0.0.0.0/8",  # this host, whatever it listens on
        "169.254.0.0/16",  # link-local, and the metadata service of most clouds
        "100.100.100.200/32",  # metadata: Alibaba
        "168.63.129.16/32",  # metadata: Azure
        "192.0.0.192/32",  # metadata: Oracle
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, broadcast
        "::/128",
        "fe80::/10",
        "ff00::/8",
        "fd00:ec2::/32",  # metadata: Amazon
        "fd20:ce::254/128",  # metadata: Google
        "fd00:c1::a9fe:a9fe/128",  # metadata: Oracle
    )
)
"""Link-local, metadata, multicast and reserved addresses: never a camera, never a webhook."""

_TRANSLATED = tuple(ipaddress.IPv6Network(net) for net in ("64:ff9b::/96", "64:ff9b:1::/48", "::ffff:0:0:0/96"))
_HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_.])?")


class AddressNotAllowed(CallerError):
    """The policy does not let this address be opened."""

    reason = "address_not_allowed"


class AddressNotFound(WorldError):
    """The host name has no address."""

    reason = "address_not_found"


@dataclass(frozen=True, slots=True)
class Target:
    """Where a URL leads: its host as written, its port, and the addresses that were judged, in order of preference."""

    scheme: str
    host: str
    port: int
    addresses: tuple[str, ...]


def network_of(address: IPAddress) -> Network | None:
    """Which kind of network an address belongs to; None: it is never opened.

    An IPv6 address that stands for an IPv4 one (mapped, compatible, 6to4, Teredo, NAT64, ISATAP) is of that one's kind.
    """
    if any(address.version == net.version and address in net for net in NEVER):
        return None
    if address.is_loopback:
        return "loopback"
    if isinstance(address, ipaddress.IPv6Address):
        if inner := _inside(address):
            kinds = [network_of(each) for each in inner]
            return None if None in kinds else min(kinds, key=lambda kind: NETWORKS.index(kind or "public"))
        if address.is_site_local:
            return "private"
    return "public" if address.is_global else "private"


def _inside(address: ipaddress.IPv6Address) -> list[ipaddress.IPv4Address]:
    """The IPv4 addresses that an IPv6 one stands for."""
    packed = address.packed
    last = ipaddress.IPv4Address(packed[12:])
    if address.ipv4_mapped or not any(packed[:12]) or any(address in net for net in _TRANSLATED):
        return [last]
    if address.sixtofour:
        return [address.sixtofour]
    if address.teredo:
        return list(address.teredo)
    if packed[8:12] in (b"\x00\x00\x5e\xfe", b"\x02\x00\x5e\xfe"):  # ISATAP
        return [last]
    return []


def check_url(
    url: str,
    *,
    schemes: Sequence[str],
    networks: Sequence[Network] = NETWORKS,
    timeout_s: float = 4.0,
    resolve: Resolver = socket.getaddrinfo,
) -> Target:
    """Where the URL leads, if all of it is allowed.

    Raises AddressNotAllowed for another scheme, a user name or password in the URL, a host that is written to be read
    in two ways, and an address outside the networks; AddressNotFound. No text holds more of the URL than scheme and
    host.
    """
    if re.search(r"[\x00-\x20\x7f\\]", url):
        raise AddressNotAllowed("the address holds a space, a control character or a backslash; write it without")
    try:
        parts = urlsplit(url)
        port, host = parts.port, parts.hostname or ""
    except ValueError:  # its words could quote a password
        raise AddressNotAllowed("the address cannot be read; write it as SCHEME://HOST[:PORT]/PATH") from None
    scheme = parts.scheme.lower()
    if scheme not in schemes:
        raise AddressNotAllowed(f"scheme {scheme[:20]!r} is not allowed here; use {' or '.join(schemes)}")
    if "@" in parts.netloc:
        raise AddressNotAllowed("the address holds a user name or a password; give them apart from it")
    if port == 0:
        raise AddressNotAllowed(f"host {host!r} has port 0; name the port, or none")
    port = port or PORTS[scheme]
    return Target(scheme, host, port, judge(host, port, networks, timeout_s=timeout_s, resolve=resolve))


def judge(
    host: str,
    port: int,
    networks: Sequence[Network] = NETWORKS,
    *,
    timeout_s: float = 4.0,
    resolve: Resolver = socket.getaddrinfo,
) -> tuple[str, ...]:
    """The addresses of a host, each of them allowed. Raises AddressNotAllowed, AddressNotFound."""
    found = dict.fromkeys(str(entry[4][0]) for entry in _resolved(ascii_host(host), port, timeout_s, resolve))
    for text in found:
        address = ipaddress.ip_address(text.partition("%")[0])
        kind = network_of(address)
        if kind is None:
            raise AddressNotAllowed(
                f"host {host} is {address}, a link-local or cloud metadata address, or none of a single machine; such "
                "are never opened: use a routable address"
            )
        if kind not in networks:
            raise AddressNotAllowed(
                f"host {host} is {address}, a {kind} address; this service opens {' and '.join(networks) or 'none'}"
            )
    return tuple(found)


def ascii_host(host: str) -> str:
    """The host as it is looked up: letters, digits, dots and hyphens, or an IPv6 address. Raises AddressNotAllowed."""
    with contextlib.suppress(ValueError):
        return str(ipaddress.IPv6Address(host.partition("%")[0]))
    try:
        name = (host if host.isascii() else host.encode("idna").decode()).removesuffix(".")
    except UnicodeError:
        name = ""
    if not _HOST.fullmatch(name):
        raise AddressNotAllowed(f"host {host[:60]!r} is no host name; use letters, digits, dots and hyphens")
    return name


def _resolved(host: str, port: int, timeout_s: float, resolve: Resolver) -> Sequence[tuple[Any, ...]]:
    """What the resolver says, within timeout_s: its own limit may be half a minute."""
    found: list[tuple[Any, ...]] = []
    errors: list[Exception] = []

    def look() -> None:
        try:
            found.extend(resolve(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            errors.append(error)

    thread = threading.Thread(target=look, name="resolver", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if not found:
        why = getattr(errors[0], "strerror", None) or str(errors[0]) if errors else f"no answer within {timeout_s:g} s"
        raise AddressNotFound(f"{host}: {why}; check the host name, or use the IP address")
    return found


def reachable(addresses: Sequence[str], port: int, timeout_s: float) -> str:
    """The first address that takes a connection; the first of all when none does. One alone is not tried."""
    for address in addresses if len(addresses) > 1 else ():
        with contextlib.suppress(OSError), socket.create_connection((address, port), timeout_s / len(addresses)):
            return address
    return addresses[0]


def pinned(url: str, address: str) -> str:
    """The URL with the address in place of its host's name."""
    parts = urlsplit(url)
    host = f"[{address}]" if ":" in address else address
    return urlunsplit(parts._replace(netloc=f"{host}:{parts.port}" if parts.port else host))
