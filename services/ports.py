"""Sockets to listen on, and the words for a port that is taken."""

from __future__ import annotations

import socket

from tsm_core.errors import CallerError


class PortTaken(CallerError):
    """Another program listens on the port."""

    reason = "port_taken"


def listen(host: str, port: int, option: str = "--port") -> socket.socket:
    """A listening socket. option: what chooses another port. Raises PortTaken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=256)
    except OSError as error:
        raise PortTaken(
            f"cannot listen on {host}:{port} ({error.strerror}); choose another with {option} (0 takes a free one)"
        ) from None


def bracketed(host: str) -> str:
    """The host as it stands before a port: IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host


def shown_host(host: str) -> str:
    """The host as a user of this machine reaches it."""
    return bracketed({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host))  # noqa: S104
