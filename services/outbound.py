"""HTTP to addresses that somebody gave: judged for each request, and connected to as judged."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Sequence

import httpx

from pipelines.addresses import NETWORKS, Network, Resolver, check_url, pinned


class JudgedTransport(httpx.HTTPTransport):
    """The transport for `httpx.Client(transport=..., follow_redirects=False)`: only networks of the policy are reached.

    The connection goes to an address that was judged; the Host header, and the name that TLS checks, are those of the
    URL. Requests raise AddressNotAllowed and AddressNotFound beside what httpx raises. Proxies of the environment are
    not used, because they would resolve names anew.
    """

    def __init__(
        self,
        networks: Sequence[Network] = NETWORKS,
        resolve: Resolver = socket.getaddrinfo,
        verify: ssl.SSLContext | bool = True,
    ) -> None:
        super().__init__(verify=verify, trust_env=False)
        self._networks, self._resolve = tuple(networks), resolve

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Judge, then connect to the first judged address that takes the connection."""
        url = str(request.url)
        timeout_s = float(request.extensions.get("timeout", {}).get("connect") or 5.0)
        target = check_url(
            url, schemes=("http", "https"), networks=self._networks, timeout_s=timeout_s, resolve=self._resolve
        )
        request.extensions = {**request.extensions, "sni_hostname": target.host}
        for place, address in enumerate(target.addresses, 1):
            request.url = httpx.URL(pinned(url, address))
            try:
                return super().handle_request(request)
            except httpx.ConnectError:
                if place == len(target.addresses):
                    raise
        raise AssertionError("a judged host has an address")
