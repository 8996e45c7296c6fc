"""What the doors' tests share: the application behind a real server on loopback."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import uvicorn

from services.http.app import http_app
from services.inference import Inference
from services.jobs import JobsDoor
from services.manager import ServedModel, StreamManager

CANARY = "c4n4ry-pa55"
MODELS = (ServedModel(name="motion9", labels=("left", "right"), mode="step", input_px=64, default=True),)


@contextlib.contextmanager
def serving(manager: StreamManager, inference: Inference | None = None, jobs: JobsDoor | None = None) -> Iterator[str]:
    """The application behind a real server: its feeds are streams, which no test client passes on as they come."""
    config = uvicorn.Config(
        http_app(manager, inference=inference, jobs=jobs),
        host="127.0.0.1",
        port=0,
        log_level="critical",
        timeout_graceful_shutdown=1,
        ws="websockets-sansio",
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(5)
