"""A sequence on its replica: a stream whose frames come in requests, and each of them has an answer."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from typing_extensions import override

from pipelines.media_limits import MediaLimits
from services.analytics import Look, Record, Result, View
from services.frame_queue import FrameQueue, Waiting
from services.inference import MAX_IN_FLIGHT, InferReply, InferRequest, NotMine, OutOfStep, Parameter, SequenceBusy
from services.requests import Open, Picture, as_bytes, pictures_of, reply_of, score_tensors
from services.schemas import Lease, StreamSpec
from services.served import Served
from services.session import OpenSource, Session
from services.settings import Settings
from services.snapshots import Snapshot
from tsm_core.errors import TSMError, WorldError
from tsm_core.frame import Frame
from tsm_core.types import Scores

AHEAD = 2  # frames that are decoded before their turn
FIRST_FPS = 15.0  # spacing of several frames in the first request of a sequence

Row = dict[str, Any]  # what one frame gave, JSON values


@dataclass(eq=False, slots=True)
class Push:
    """One request on its way: pictures that are still to go, and what came of those that went."""

    request: InferRequest
    token: str
    arrived_s: float
    opens: deque[Open]
    times_s: deque[float]
    frames: int
    begins: bool
    rows: list[Row] = field(default_factory=list)
    warmup: tuple[int, int] = (0, 0)
    number: int = 0
    answer: Future[InferReply] = field(default_factory=Future)


@dataclass(slots=True)
class _Item:
    """One frame between the queue and its result."""

    push: Push
    picture: Picture
    begins: bool
    row: Row | None = None


class PushedSession(Session):
    """One sequence, for as long as this replica owns it.

    Nothing is dropped: a request too many is refused. Requests go through the model in the order they came. `push` may
    be called from anywhere; a request is known by its token, and one that was counted already is answered again, by a
    later owner too as far as its snapshot reaches.
    """

    def __init__(
        self,
        spec: StreamSpec,
        lease: Lease,
        served: Mapping[str, Served[Any]],
        settings: Settings,
        *,
        on_ready: Callable[[FrameQueue], None],
        on_change: Callable[[Session, dict[str, Any]], None],
        first_track: int = 0,
        limits: MediaLimits,
        submit: Callable[..., Any],
        on_over: Callable[[PushedSession], None],
    ) -> None:
        """As a session; submit runs work in a thread, on_over is told when the end of a sequence was answered."""
        super().__init__(spec, lease, served, settings, on_ready=on_ready, on_change=on_change, first_track=first_track)
        self.queue = FrameQueue(capacity=AHEAD + 1)
        self.touched_s = time.monotonic()
        self._limits = limits
        self._submit = submit
        self._on_over = on_over
        self._labels: Sequence[str] = next((each.served.recipe.labels for each in self.analytics.values()), ())
        self._pushing = threading.Lock()
        self._pushes: deque[Push] = deque()
        self._items: dict[int, _Item] = {}
        self._feeding = False
        self._leaving = False
        self._begins = False  # a picture that should have begun the sequence could not be read: the next one does
        self._number = 0  # of the next frame
        self._base = 0  # number of the frame that began the sequence, of those that have a result
        self._sent_base = 0  # the same, of those that were sent to the model
        self._time_s: float | None = None  # of the newest frame
        self._token = ""  # of the newest request of which frames were counted
        self._rows: list[Row] = []  # what they gave
        self._told: tuple[int, tuple[int, int]] = (0, (0, 0))  # frame number and warm-up of the last

    # ---- life

    @override
    def _age_s(self, snapshot: Snapshot, now_s: float) -> float:
        return 0.0  # frames may have times of their own: whether the state still fits, the next one's says

    @override
    def _restore(self, snapshot: Snapshot, blob: bytes, now_s: float) -> None:
        super()._restore(snapshot, blob, now_s)
        memory = snapshot.memory
        self._number = snapshot.frame_number + 1
        self._time_s = snapshot.time_s
        self._sent_base = int(memory["base"])
        self._base, self._token, self._rows = int(memory["base"]), str(memory["token"]), list(memory["rows"])
        self._told = int(memory["number"]), (int(memory["warmup"][0]), int(memory["warmup"][1]))

    @override
    def _memory(self) -> dict[str, Any]:
        number, warmup = self._told
        return {"base": self._base, "token": self._token, "rows": list(self._rows), "number": number, "warmup": warmup}

    @override
    def start(self, open_source: OpenSource) -> None:
        self._change("RUNNING", self.note)

    @override
    def picture(self) -> tuple[Frame, Sequence[Record]] | None:
        return None

    @override
    def stop_source(self, timeout_s: float = 3.0) -> bool:
        self._leaving = True
        return True

    @override
    def free(self) -> None:
        super().free()
        self.let_go()

    @override
    def let_go(self) -> None:
        self._refuse_all(NotMine(f"sequence {self.spec.name!r} goes on at another replica"))

    @override
    def fail(self, code: str, message: str) -> None:
        super().fail(code, message)
        self._refuse_all(
            WorldError(
                f"sequence {self.spec.name!r} failed: {message}; sequence_start begins it anew", reason=code.lower()
            )
        )

    def _refuse_all(self, error: TSMError) -> None:
        with getattr(self, "_pushing", threading.Lock()):  # free() is called by a constructor that fails, too
            pushes, self._pushes = list(getattr(self, "_pushes", ())), deque()
        for push in pushes:
            _settle(push.answer, error)

    # ---- from requests

    @property
    def idle_s(self) -> float:
        """Seconds without a request, and without one at work."""
        return 0.0 if self._pushes else time.monotonic() - self.touched_s

    @property
    def in_work(self) -> int:
        """Requests without an answer."""
        return len(self._pushes)

    def push(self, request: InferRequest, token: str, name: str, array: np.ndarray) -> Future[InferReply]:
        """The answer to come for a checked request. Raises NotMine, SequenceBusy."""
        assert request.sequence is not None
        opens = deque(pictures_of(name, array, self._limits))
        with self._pushing:
            if self.frozen or self._leaving:
                raise NotMine(f"sequence {self.spec.name!r} goes on at another replica")
            for push in self._pushes:
                if push.token == token:
                    return push.answer
            if len(self._pushes) >= MAX_IN_FLIGHT:
                raise SequenceBusy(
                    f"{len(self._pushes)} requests of sequence {request.sequence.id!r} are on their way; wait for an "
                    "answer before the next"
                )
            self.touched_s = time.monotonic()
            push = Push(request, token, self.touched_s, opens, deque(), len(opens), request.sequence.start)
            self._pushes.append(push)
        self._kick()
        return push.answer

    def _kick(self) -> None:
        """Have a thread make frames of what waits, unless one does so already or enough are made."""
        with self._pushing:
            if self._feeding or self.queue.queued >= AHEAD or not any(push.opens for push in self._pushes):
                return
            self._feeding = True
        self._submit(self._feed)

    def _feed(self) -> None:
        while True:
            with self._pushing:
                push = next((push for push in self._pushes if push.opens), None)
                if push is None or self.queue.queued >= AHEAD or self.frozen:
                    self._feeding = False
                    return
            try:
                self._begin(push)
            except OutOfStep as error:
                self._drop(push, error)
                continue
            if push.opens:
                self._send(push)
            elif len(push.rows) == push.frames:
                self._answer(push)

    def _begin(self, push: Push) -> None:
        """Before a request's first frame: leave out what was counted before, and say when the others were taken.

        Raises OutOfStep.
        """
        if push.times_s or push.rows:
            return
        if push.token == self._token:
            push.begins = False
            push.rows = list(self._rows)
            push.number, push.warmup = self._told
            for _ in push.rows:
                push.opens.popleft()
        else:
            self._check_number(push)
        push.times_s.extend(self._times(push, len(push.opens)))

    def _check_number(self, push: Push) -> None:
        """Raises OutOfStep when the request's first frame says that it is another than the next."""
        given = push.request.frame_number
        following = 0 if push.begins or self._begins else self._number - self._sent_base
        if given is not None and given != following:
            raise OutOfStep(
                f"sequence {self.spec.name!r} goes on with frame {following}, and this is frame {given}; send those "
                f"from {following} on again (a replica that is lost takes the frames since its last save with it)"
            )

    def _times(self, push: Push, count: int) -> list[float]:
        """Frames of one request came evenly since the one before."""
        at_s = push.request.timestamp_s
        at_s = time.time() if at_s is None else at_s
        before_s, self._time_s = self._time_s, at_s
        gap_s = at_s - before_s if before_s is not None and not push.begins else -1.0
        if not 0 <= gap_s <= self.settings.engine.state_max_gap_s:
            gap_s = count / FIRST_FPS
        return [at_s - gap_s * (count - 1 - index) / count for index in range(count)]

    def _send(self, push: Push) -> None:
        try:
            picture = push.opens.popleft()()
        except TSMError as error:
            self._begins |= push.begins
            self._drop(push, error)
            return
        time_s = push.times_s.popleft()
        number, self._number = self._number, self._number + 1
        item = self._items[number] = _Item(push, picture, push.begins or self._begins)
        if item.begins:
            self._sent_base = number
        push.begins = self._begins = False
        self.on_frame(Frame(self.id, number, picture.image, time_s, time_s, picture.size))

    def _drop(self, push: Push, error: TSMError) -> None:
        with self._pushing:
            push.opens.clear()
            if push in self._pushes:
                self._pushes.remove(push)
        _settle(push.answer, error)

    # ---- from the batching loop

    @override
    def follow(self, name: str, frame: Frame) -> Look:
        item = self._items[frame.number]
        ended: list[Record] = []
        if item.begins:
            ended = self.analytics[name].restart()
            self._base, self._token, self._rows = frame.number, "", []
        look = super().follow(name, frame)
        views = [replace(view, image=item.picture.pixels) for view in look.views]
        return Look(views, [*ended, *look.events])

    @override
    def update(self, name: str, view: View, output: Any, frame: Frame, warmup: tuple[int, int] | None = None) -> Result:
        result = super().update(name, view, output, frame, warmup)
        item = self._items[frame.number]
        item.row = _row_of(output, result)
        item.push.warmup = result.warmup
        return result

    @override
    def done(self, waiting: Waiting) -> None:
        super().done(waiting)
        item = self._items.pop(waiting.frame.number)
        push = item.push
        assert item.row is not None  # a sequence has one model, and each of its frames goes through it
        push.rows.append(item.row)
        push.number = waiting.frame.number - self._base
        self._token, self._rows, self._told = push.token, push.rows, (push.number, push.warmup)
        if len(push.rows) == push.frames:
            self._answer(push)
        self._kick()

    def _answer(self, push: Push) -> None:
        with self._pushing:
            if push not in self._pushes:
                return
            self._pushes.remove(push)
            self.touched_s = time.monotonic()
        assert push.request.sequence is not None
        about: dict[str, Parameter] = {
            "epoch": self.lease.epoch,
            "frame_number": push.number,
            "restored": self.restored.mode,
        }
        outputs = _outputs_of(push.rows, self._labels)
        if push.request.sequence.end:
            self._leaving = True
        _settle(push.answer, reply_of(push.request, outputs, push.warmup, **about))
        if push.request.sequence.end:
            self._on_over(self)


def _settle(answer: Future[InferReply], result: InferReply | TSMError) -> None:
    if not answer.set_running_or_notify_cancel():
        return
    if isinstance(result, TSMError):
        answer.set_exception(result)
    else:
        answer.set_result(result)


def _row_of(output: Any, result: Result) -> Row:
    if isinstance(result.found, Scores):
        return {"logits": list(output), "scores": list(result.found.values)}
    return {"tracks": [[track.track_id, track.label, track.score, *track.xyxy] for track in result.found]}


def _outputs_of(rows: Sequence[Row], labels: Sequence[str]) -> dict[str, np.ndarray]:
    if rows and "logits" in rows[0]:
        return score_tensors([row["logits"] for row in rows], [row["scores"] for row in rows], labels)
    flat = [(index, track) for index, row in enumerate(rows) for track in row["tracks"]]
    return {
        "boxes": np.asarray([track[3:] for _, track in flat], dtype=np.float32).reshape(len(flat), 4),
        "box_scores": np.asarray([track[2] for _, track in flat], dtype=np.float32),
        "box_labels": as_bytes([track[1] for _, track in flat]),
        "frame_index": np.asarray([index for index, _ in flat], dtype=np.int64),
        "track_ids": as_bytes([track[0] for _, track in flat]),
    }
