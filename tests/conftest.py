"""What tests of several rooms share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipelines.ray_local import ENVIRONMENT
from services.embedded import EmbeddedValkey, find_server

os.environ.update(ENVIRONMENT)  # read by ray as it is imported: before any test can do so

ServerStarter = Callable[[Path], EmbeddedValkey]


@pytest.fixture(scope="session")
def server_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerStarter]:
    """A function from a server's binary to a running server, one per binary for the whole session."""
    running: dict[Path, EmbeddedValkey] = {}

    def start(binary: Path) -> EmbeddedValkey:
        if binary not in running:
            running[binary] = EmbeddedValkey(tmp_path_factory.mktemp("store"), binary=binary).start()
        return running[binary]

    yield start
    for server in running.values():
        server.stop()


@pytest.fixture(scope="session")
def valkey_url(server_of: ServerStarter) -> str:
    """Address of a real Valkey or Redis; take a `store.prefix` of your own."""
    return server_of(find_server()).url
