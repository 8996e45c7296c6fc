"""HTTP to judged addresses, against real servers."""

from __future__ import annotations

import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from pipelines.addresses import AddressNotAllowed
from services.outbound import JudgedTransport


class Echo(BaseHTTPRequestHandler):
    """Answers with the Host header; /away redirects to a metadata address."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"] or 0))
        host = self.headers["Host"].encode()
        self.send_response(302 if self.path == "/away" else 200)
        self.send_header("Location", "http://169.254.169.254/latest")
        self.send_header("Content-Length", str(len(host)))
        self.end_headers()
        self.wfile.write(host)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Echo) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def resolver(*answers: str) -> Any:
    """Gives one answer after the other, then fails."""
    left = iter(answers)

    def resolve(host: str, port: int, **_: Any) -> list[tuple[Any, ...]]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(left), port))]

    return resolve


def client(**options: Any) -> httpx.Client:
    return httpx.Client(transport=JudgedTransport(**options), follow_redirects=False)


def test_the_judged_address_is_connected_to_and_asked_by_name(server: ThreadingHTTPServer) -> None:
    with client(resolve=resolver("127.0.0.1")) as http:
        answer = http.post(f"http://hooks.example:{server.server_port}/x", content=b"1")
    assert answer.text == f"hooks.example:{server.server_port}"


def test_a_name_is_judged_for_each_request(server: ThreadingHTTPServer) -> None:
    with client(resolve=resolver("127.0.0.1", "169.254.169.254")) as http:
        url = f"http://hooks.example:{server.server_port}/x"
        assert http.post(url).status_code == 200
        with pytest.raises(AddressNotAllowed, match="never opened"):
            http.post(url)


def test_loopback_can_be_refused(server: ThreadingHTTPServer) -> None:
    with client(networks=("public",)) as http, pytest.raises(AddressNotAllowed, match="a loopback address"):
        http.post(f"http://localhost:{server.server_port}/x")


def test_a_redirect_is_not_followed_and_would_be_judged(server: ThreadingHTTPServer) -> None:
    url = f"http://127.0.0.1:{server.server_port}/away"
    with client() as http:
        assert http.post(url).status_code == 302
        with pytest.raises(AddressNotAllowed, match="never opened"):
            http.post(url, follow_redirects=True)


def test_tls_checks_the_name_and_not_the_address(server: ThreadingHTTPServer, tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subject = "-subj /CN=hooks.example -addext subjectAltName=DNS:hooks.example"
    words = f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 {subject} -keyout {key} -out {certificate}"
    subprocess.run(words.split(), check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    trusting = ssl.create_default_context(cafile=certificate)
    for host, trusted in (("hooks.example", True), ("other.example", False)):
        transport = JudgedTransport(resolve=resolver("127.0.0.1"), verify=trusting)
        with httpx.Client(transport=transport) as http:
            url = f"https://{host}:{server.server_port}/x"
            if trusted:
                assert http.post(url).status_code == 200
            else:
                with pytest.raises(httpx.ConnectError, match="certificate"):
                    http.post(url)
