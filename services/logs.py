"""Log lines: a record is one line, as text or JSON, without secrets, with its trace, stream and replica.

On one machine the actors' lines go through a socket to the process that the user started, and out of its stderr: Ray
would keep them in files that it removes.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import shutil
import socket
import socketserver
import sys
import tempfile
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

from typing_extensions import override

from pipelines.faults import HIDDEN, redact
from pipelines.ray_local import temp_folder
from services.settings import Settings
from services.tracing import current_ids

RELAY_VARIABLE = "TSM_LOG_SOCKET"  # in the environment of the actors: where the relay listens
SEND_S = 0.5  # a relay that takes no line for so long gets no more: work must not wait for its log
QUIET = ("httpx", "httpcore", "opentelemetry", "urllib3")  # told from WARNING on
OWN_HANDLERS = ("ray", "ray.serve")  # loggers that hand nothing to the root
TOKEN = re.compile(r"\btsm_[A-Za-z0-9]+_[A-Za-z0-9_-]{8,}")


class About(logging.Filter):
    """Lets every record through, once its text holds no secret and it knows its trace, stream and replica."""

    def __init__(self, replica: str, secrets: tuple[str, ...] = ()) -> None:
        super().__init__()
        self._replica = replica
        self._secrets = secrets

    @override
    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if record.exc_info:
            record.exc_text = self._clean(logging.Formatter().formatException(record.exc_info))
            record.exc_info = None
        record.msg, record.args = self._clean(text), None
        record.replica = self._replica
        record.stream = getattr(record, "stream", None)
        record.ids = current_ids()
        return True

    def _clean(self, text: str) -> str:
        return TOKEN.sub(f"tsm_{HIDDEN}", redact(text, self._secrets))


class JsonLines(logging.Formatter):
    """A record as one line of JSON: `time`, `level`, `logger`, `message`, and what else is known of it."""

    @override
    def format(self, record: logging.LogRecord) -> str:
        ids = getattr(record, "ids", None)
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "replica": getattr(record, "replica", None),
            "stream": getattr(record, "stream", None),
            "trace_id": ids[0] if ids else None,
            "span_id": ids[1] if ids else None,
            "exception": record.exc_text,
        }
        return json.dumps({name: value for name, value in line.items() if value is not None}, ensure_ascii=False)


class TextLines(logging.Formatter):
    """A record as one line for people; line breaks inside it are shown as a bar."""

    @override
    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created).astimezone()
        replica = getattr(record, "replica", "")
        text = f"{at:%H:%M:%S}.{at.microsecond // 1000:03d} {record.levelname} {replica} {record.name}: "
        text += record.getMessage() + (f" | {record.exc_text}" if record.exc_text else "")
        return " | ".join(text.splitlines())


class _ToRelay(logging.Handler):
    """Sends lines to the process that the user started; falls back to stderr once that is gone."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._socket: socket.socket | None = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(SEND_S)
        try:
            self._socket.connect(path)
        except OSError:
            self._socket = None

    @override
    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record) + "\n"
        if self._socket is not None:
            try:
                self._socket.sendall(line.encode(errors="replace"))
                return
            except OSError:
                self._socket.close()
                self._socket = None
        _stderr().write(line)


def _stderr() -> Any:
    """The process's own: in a replica Serve puts a logger in its place, which would log every line of ours anew."""
    return sys.stderr if isinstance(sys.stderr, io.TextIOBase) else sys.__stderr__


def set_up(settings: Settings, replica: str) -> None:
    """Log as the settings say, from every logger of this process; replica: who this process is."""
    path = os.environ.get(RELAY_VARIABLE)
    handler: logging.Handler = _ToRelay(path) if path else logging.StreamHandler(_stderr())
    handler.setFormatter(JsonLines() if settings.logger.format == "json" else TextLines())
    handler.addFilter(About(replica, _secrets(settings)))
    handler.set_name("tsm")
    root = logging.getLogger()
    root.setLevel(settings.logger.level)
    for logger in (root, *(logging.getLogger(name) for name in OWN_HANDLERS)):
        for old in [one for one in logger.handlers if one.get_name() == "tsm"]:
            logger.removeHandler(old)
        if logger is root or not logger.propagate:
            logger.addHandler(handler)
    for noisy in QUIET:
        logging.getLogger(noisy).setLevel("WARNING")
    logging.captureWarnings(True)


def _secrets(settings: Settings) -> tuple[str, ...]:
    """The store's passwords: a client may name its address in an error."""
    urls = [url.get_secret_value() for url in (settings.store.url, settings.store.state_url) if url is not None]
    return tuple({unquote(password) for url in urls if (password := urlsplit(url).password)})


class Relay:
    """Where the actors of this machine send their lines; each comes out of `out` whole."""

    def __init__(self, out: BinaryIO | None = None) -> None:
        self._out = out or sys.stderr.buffer
        self._lock = threading.Lock()
        self._folder = Path(tempfile.mkdtemp(prefix="tsm-log-", dir=temp_folder()))
        self.path = str(self._folder / "socket")
        relay = self

        class Lines(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                for line in self.rfile:
                    relay._write(line)

        self._server: Any = socketserver.ThreadingUnixStreamServer(self.path, Lines)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.1,), name="log-relay", daemon=True).start()

    def stop(self) -> None:
        """Take no more lines, and leave nothing behind."""
        self._server.shutdown()
        self._server.server_close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _write(self, line: bytes) -> None:
        try:
            with self._lock:
                self._out.write(line)
                self._out.flush()
        except (OSError, ValueError):  # whoever read it is gone
            return
