"""Which addresses may be opened: every way to write them, under every policy."""

from __future__ import annotations

import ipaddress
import socket
from typing import Any

import pytest

from pipelines.addresses import (
    NETWORKS,
    AddressNotAllowed,
    AddressNotFound,
    check_url,
    judge,
    network_of,
    pinned,
    reachable,
)

NEVER = [
    "169.254.169.254",
    "169.254.0.1",
    "100.100.100.200",
    "168.63.129.16",
    "192.0.0.192",
    "0.0.0.0",
    "0.1.2.3",
    "224.0.0.1",
    "255.255.255.255",
    "fe80::1",
    "fd00:ec2::254",
    "fd20:ce::254",
    "ff02::1",
    "::",
    "::ffff:169.254.169.254",
    "::ffff:a9fe:a9fe",
    "::169.254.169.254",
    "64:ff9b::a9fe:a9fe",
    "64:ff9b:1::a9fe:a9fe",
    "2002:a9fe:a9fe::1",
    "2001:0:a9fe:a9fe::",
    "fe80::5efe:7f00:1",
    "2001:db8::5efe:a9fe:a9fe",
]
KINDS = {
    "loopback": ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::"],
    "private": ["10.0.0.1", "172.16.3.4", "192.168.1.20", "100.64.0.1", "fd12::1", "::ffff:10.0.0.1", "fec0::1"],
    "public": ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1"],
}
METADATA = [  # ways to write 169.254.169.254
    "2852039166",
    "0xa9fea9fe",
    "025177524776",
    "0xa9.0xfe.0xa9.0xfe",
    "0251.0376.0251.0376",
    "169.254.43518",
    "169.16689662",
    "169.254.169.254",
    "[::ffff:169.254.169.254]",
    "[::ffff:a9fe:a9fe]",
    "１６９.254.169.254",
    "169。254。169。254",
    "169.254.169.254.",
]
LOOPBACK = ["2130706433", "0x7f.1", "0177.0.0.1", "127.1", "localhost", "LOCALHOST", "[::1]", "[::ffff:127.0.0.1]"]


def resolver(*answers: str) -> Any:
    """One that gives all answers each time."""

    def resolve(host: str, port: int, **_: Any) -> list[tuple[Any, ...]]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (answer, port)) for answer in answers]

    return resolve


def look(host: str, networks: Any = NETWORKS) -> tuple[str, ...]:
    return check_url(f"rtsp://{host}/x", schemes=("rtsp",), networks=networks).addresses


@pytest.mark.parametrize("address", NEVER)
def test_some_addresses_are_never_opened(address: str) -> None:
    assert network_of(ipaddress.ip_address(address)) is None
    with pytest.raises(AddressNotAllowed, match="never opened"):
        judge("camera", 554, resolve=resolver("8.8.8.8", address))


@pytest.mark.parametrize("policy", NETWORKS)
@pytest.mark.parametrize(("kind", "address"), [(kind, each) for kind, all_ in KINDS.items() for each in all_])
def test_each_policy_opens_its_own_networks(kind: str, address: str, policy: Any) -> None:
    assert network_of(ipaddress.ip_address(address)) == kind
    assert judge("camera", 554, resolve=resolver(address)) == (address,)
    if kind == policy:
        assert judge("camera", 554, [policy], resolve=resolver(address)) == (address,)
    else:
        with pytest.raises(AddressNotAllowed, match=f"a {kind} address; this service opens {policy}"):
            judge("camera", 554, [policy], resolve=resolver(address))


@pytest.mark.parametrize("host", METADATA)
def test_every_way_to_write_the_metadata_address_is_seen_through(host: str) -> None:
    with pytest.raises(AddressNotAllowed, match=r"169\.254\.169\.254|::ffff:a9fe:a9fe"):
        look(host)


@pytest.mark.parametrize("host", LOOPBACK)
def test_every_way_to_write_loopback_is_seen_through(host: str) -> None:
    assert look(host)
    with pytest.raises(AddressNotAllowed, match="a loopback address"):
        look(host, ("private", "public"))


def test_the_best_of_several_addresses_does_not_excuse_the_worst() -> None:
    with pytest.raises(AddressNotAllowed, match="a private address"):
        judge("camera", 554, ["public"], resolve=resolver("8.8.8.8", "10.0.0.1"))


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("file:///etc/passwd", "scheme 'file'"),
        ("concat:/etc/passwd", "scheme 'concat'"),
        ("pipe:0", "scheme 'pipe'"),
        ("http://10.0.0.1/", "scheme 'http'"),
        ("gopher://10.0.0.1/", "scheme 'gopher'"),
        ("rtsp://10.0.0.1@169.254.169.254/", "user name"),
        ("rtsp://me:pass@10.0.0.1/", "user name"),
        ("rtsp://10.0.0.1\\@169.254.169.254/", "backslash"),
        ("rtsp://10.0.0.1\t/", "control character"),
        ("rtsp://10.0.0.1 /x", "space"),
        ("rtsp://10.0.0.1:0/x", "port 0"),
        ("rtsp://10.0.0.1:99999/x", "cannot be read"),
        ("rtsp://[10.0.0.1]/x", "cannot be read"),
        ("rtsp://a,b/x", "no host name"),
        ("rtsp://a%2eb/x", "no host name"),
        ("rtsp://[fe80::1%25eth0]/x", "never opened"),
        ("rtsp:///x", "no host name"),
    ],
)
def test_tricks_of_writing_are_refused(url: str, words: str) -> None:
    with pytest.raises(AddressNotAllowed, match=words) as refused:
        check_url(url, schemes=("rtsp", "rtsps"))
    assert "pass@" not in str(refused.value)


def test_a_trailing_dot_changes_nothing() -> None:
    assert look("localhost.") == look("localhost")


def test_a_name_without_address_says_so() -> None:
    with pytest.raises(AddressNotFound, match=r"camera-9\.invalid"):
        look("camera-9.invalid")


def test_what_was_judged_is_what_is_opened() -> None:
    """The name's second answer, a metadata address, is never asked for."""
    answers = iter(["10.0.0.7", "169.254.169.254"])

    def rebinding(host: str, port: int, **_: Any) -> list[tuple[Any, ...]]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers), port))]

    target = check_url("rtsp://camera.example:8554/live?x=1", schemes=("rtsp",), resolve=rebinding)
    assert pinned("rtsp://camera.example:8554/live?x=1", target.addresses[0]) == "rtsp://10.0.0.7:8554/live?x=1"
    with pytest.raises(AddressNotAllowed, match="never opened"):
        check_url("rtsp://camera.example:8554/live", schemes=("rtsp",), resolve=rebinding)


def test_an_ipv6_address_is_written_in_brackets() -> None:
    assert pinned("rtsps://camera/x", "fd12::1") == "rtsps://[fd12::1]/x"


def test_the_first_address_that_answers_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert reachable(["127.0.0.9", "127.0.0.1"], port, 2.0) == "127.0.0.1"
        assert reachable(["127.0.0.9"], port, 2.0) == "127.0.0.9"
