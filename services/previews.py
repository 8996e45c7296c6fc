"""Pictures for the page: the newest frame of each stream as JPEG, often while somebody looks and seldom otherwise."""

from __future__ import annotations

import io
import logging
import threading
import time
from collections.abc import Callable, Iterable

from PIL import Image
from torch import Tensor

from services.overlay import overlay
from services.session import Session
from services.settings import PreviewSettings
from services.store import StaleLease, StateStore
from tsm_core.errors import WorldError

log = logging.getLogger(__name__)

LOOK_S = 0.25  # seconds between two looks at who is watched


def jpeg(image: Tensor, quality: int, comment: bytes | None = None) -> bytes:
    """JPEG of a picture, uint8 (3, H, W), with a comment in it."""
    out = io.BytesIO()
    more = {"comment": comment} if comment else {}
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(out, "JPEG", quality=quality, **more)
    return out.getvalue()


class Previews:
    """The thread that encodes; it takes the newest frame only and never meets the batching loop."""

    def __init__(self, store: StateStore, sessions: Callable[[], Iterable[Session]], settings: PreviewSettings) -> None:
        self._store = store
        self._sessions = sessions
        self._settings = settings
        self._shown: dict[str, tuple[int, int, float]] = {}  # epoch, frame number, when
        self._watched: set[str] = set()
        self._looked_s = 0.0

    def run(self, stopping: threading.Event) -> None:
        """Work until `stopping` is set."""
        wait_s = 0.05
        while not stopping.wait(wait_s):
            try:
                self.run_once()
                wait_s = 0.4 / self._settings.max_fps if self._watched else min(LOOK_S, 0.4 / self._settings.idle_fps)
            except WorldError as error:
                log.debug("previews wait for the store: %s", error)
                wait_s = 1.0

    def run_once(self) -> int:
        """Put every picture that is due; how many."""
        now_s = time.monotonic()
        if now_s - self._looked_s >= LOOK_S:
            self._watched = self._store.watched()
            self._looked_s = now_s
        put = 0
        alive = set()
        for session in self._sessions():
            alive.add(session.id)
            frame, found = session.picture() or (None, ())
            fps = self._settings.max_fps if session.id in self._watched else self._settings.idle_fps
            epoch, number, shown_s = self._shown.get(session.id, (0, -1, 0.0))
            # a tenth early, or a camera exactly as fast as max_fps would lose every other picture
            if frame is None or (epoch, number) == (session.lease.epoch, frame.number):
                continue
            if now_s - shown_s < 0.9 / fps and epoch == session.lease.epoch:
                continue
            self._shown[session.id] = (session.lease.epoch, frame.number, now_s)
            try:
                picture = jpeg(frame.image, self._settings.quality, overlay(frame.number, found))
                self._store.put_preview(session.lease, picture, frame.number)
                put += 1
            except StaleLease:
                continue  # the publisher closes the session
        for gone in self._shown.keys() - alive:
            del self._shown[gone]
        return put
