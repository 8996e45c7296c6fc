"""The embedded Valkey: a real server as our child, through starts, deaths and quarrels."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from services.embedded import DataDirInUseError, EmbeddedError, EmbeddedValkey, bundled_server, find_server
from services.schemas import SourceSpec, StreamSpec
from services.settings import StoreSettings
from services.store import RedisStore

SERVERS = {path.name: path for path in (bundled_server(), find_server()) if path is not None}


def store_of(server: EmbeddedValkey) -> RedisStore:
    return RedisStore(StoreSettings(url=server.url))


def register(server: EmbeddedValkey, *names: str) -> None:
    for name in names:
        store_of(server).put_stream(StreamSpec(id=name, source=SourceSpec(uri="rtsp://camera/1")), create=True)


def registered(server: EmbeddedValkey) -> list[str]:
    return [spec.id for spec in store_of(server).list_streams()]


def until(what: Callable[[], object], timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.02)


@pytest.mark.parametrize("binary", SERVERS.values(), ids=SERVERS)
def test_registry_outlives_the_server(tmp_path: Path, binary: Path) -> None:
    folder = tmp_path / 'a "quoted" folder'
    with EmbeddedValkey(folder, binary=binary) as first:
        register(first, "door")
        pid = first.pid
        assert pid is not None
    assert first.pid is None
    assert not psutil.pid_exists(pid)
    with EmbeddedValkey(folder, binary=binary) as second:
        assert second.url != first.url
        assert registered(second) == ["door"]


@pytest.mark.skipif(len(SERVERS) < 2, reason="needs a server on the path beside the bundled one")
def test_registry_goes_from_one_server_to_another(tmp_path: Path) -> None:
    for n, binary in enumerate([*SERVERS.values(), *SERVERS.values()]):
        with EmbeddedValkey(tmp_path, binary=binary) as server:
            register(server, f"s{n}")
            store_of(server)._main.bgrewriteaof()
            until(lambda: not store_of(server)._main.info("persistence")["aof_rewrite_in_progress"])
            assert registered(server) == [f"s{i}" for i in range(n + 1)]


def test_killed_server_comes_back_with_its_data(tmp_path: Path) -> None:
    with EmbeddedValkey(tmp_path) as server:
        register(server, "door")
        store, before, url = store_of(server), server.pid, server.url
        assert before is not None
        os.kill(before, signal.SIGKILL)
        until(lambda: server.pid not in (None, before))
        until(lambda: [spec.id for spec in store.list_streams()] == ["door"] if answers(store) else False)
        assert server.url == url, "who is connected finds it again"


def answers(store: RedisStore) -> bool:
    try:
        store.ping()
    except Exception:  # noqa: BLE001
        return False
    return True


def test_nothing_is_kept_when_not_asked_to(tmp_path: Path) -> None:
    with EmbeddedValkey(tmp_path, persistent=False) as server:
        register(server, "door")
    assert not list(server.folder.glob("append*"))
    with EmbeddedValkey(tmp_path, persistent=False) as server:
        assert registered(server) == []


def test_two_services_do_not_share_a_folder(tmp_path: Path) -> None:
    with EmbeddedValkey(tmp_path) as first:
        with pytest.raises(DataDirInUseError, match=f"process {os.getpid()}") as error:
            EmbeddedValkey(tmp_path).start()
        assert "store.data_dir" in str(error.value)
        store_of(first).ping()
    EmbeddedValkey(tmp_path).start().stop()


def test_password_is_nowhere_to_be_seen(tmp_path: Path) -> None:
    with EmbeddedValkey(tmp_path) as server:
        password = server.url.split(":")[2].split("@")[0]
        process = psutil.Process(server.pid)
        assert len(password) >= 24
        assert password not in " ".join(process.cmdline())
        assert password not in " ".join(process.environ().values())
        assert password not in repr(server)
        assert password not in (server.folder / "valkey.log").read_text()
        for path in (server.folder, *server.folder.rglob("*")):
            assert not stat.S_IMODE(path.stat().st_mode) & 0o077, f"{path} is open to others"


def test_server_listens_on_loopback_alone(tmp_path: Path) -> None:
    with EmbeddedValkey(tmp_path) as server:
        listening = [c.laddr for c in psutil.Process(server.pid).net_connections() if c.status == psutil.CONN_LISTEN]
        assert listening == [("127.0.0.1", server.port)]


def test_server_outlives_the_thread_that_started_it(tmp_path: Path) -> None:
    server = EmbeddedValkey(tmp_path)
    thread = threading.Thread(target=server.start)
    thread.start()
    thread.join()
    try:
        pid = server.pid
        time.sleep(0.3)
        assert server.pid == pid is not None
        store_of(server).ping()
    finally:
        server.stop()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_server_dies_with_its_service_and_not_of_ctrl_c(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from services.embedded import EmbeddedValkey\n"
        "server = EmbeddedValkey(Path(sys.argv[1])).start()\n"
        "print(server.pid, flush=True); time.sleep(60)"
    )
    service = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert service.stdout is not None
    with service, service.stdout:
        pid = int(service.stdout.readline())
        assert os.getpgid(pid) != os.getpgid(service.pid)
        service.kill()
    until(lambda: not psutil.pid_exists(pid))
    EmbeddedValkey(tmp_path).start().stop()


def test_start_that_fails_says_why(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(EmbeddedError, match=r"(?i)in use|listening"):
            EmbeddedValkey(tmp_path, port=taken.getsockname()[1]).start()
    with pytest.raises(EmbeddedError, match="no-such-server"):
        EmbeddedValkey(tmp_path, binary=Path("no-such-server")).start()
    with EmbeddedValkey(tmp_path) as server:
        register(server, "door")
    (manifest,) = server.folder.glob("appendonlydir/*.manifest")
    manifest.write_text("nonsense\n")
    with pytest.raises(EmbeddedError, match=r"(?i)manifest|aof"):
        EmbeddedValkey(tmp_path).start()


def test_address_before_the_start(tmp_path: Path) -> None:
    with pytest.raises(EmbeddedError, match=r"start\(\)"):
        _ = EmbeddedValkey(tmp_path).url


def test_old_servers_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if bundled_server() is None:
        pytest.skip("no bundled server on this machine")
    old = tmp_path / "redis-server"
    old.write_text("#!/bin/sh\necho 'Redis server v=5.0.3 sha=00000000:0'\n")
    old.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=None)
    assert find_server() == bundled_server()
    old.write_text("#!/bin/sh\necho 'Redis server v=7.0.15 sha=00000000:0'\n")
    assert find_server() == old
