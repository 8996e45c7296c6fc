"""What the tests of inference share: engines behind LocalInference, and inputs that a test can foresee."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import av
import numpy as np
from PIL import Image

from pipelines.scenes import Scene
from services.engine import Engine
from services.inference import InferReply, InferRequest, SequenceCall
from services.local_inference import LocalInference
from services.served import Model
from services.settings import ModelSettings
from services.store import StateStore
from tests.unit.services.engine_kit import MODEL, running, settings

T = TypeVar("T")
FPS = 15


def ran(work: Coroutine[Any, Any, T]) -> T:
    """Its result."""
    return asyncio.run(work)


@contextmanager
def inference(
    store: StateStore, more: Mapping[str, Model] | None = None, name: str = "r1", **engine: object
) -> Iterator[tuple[LocalInference, Engine]]:
    """One engine at work, asked in its process."""
    models = tuple(ModelSettings(name=each) for each in (MODEL, *(more or ())))
    with running(store, name, using=settings(models=models, **engine), more=more) as (at_work, _):
        yield LocalInference(at_work), at_work


def request(model: str = MODEL, **more: Any) -> InferRequest:
    """A request whose other arguments are its input or fields of InferRequest."""
    fields = InferRequest.__dataclass_fields__
    inputs = {name: more.pop(name) for name in list(more) if name not in fields}
    return InferRequest(model, inputs, **more)


def pushed(frame: np.ndarray, sequence_id: str, model: str = MODEL, **more: Any) -> InferRequest:
    """One frame (H, W, 3) of a sequence."""
    call = SequenceCall(sequence_id, more.pop("start", False), more.pop("end", False))
    return request(model, frame=frame[None], sequence=call, **more)


def film(frames: int = 24, seed: int = 80_000, size_px: int = 96) -> np.ndarray:
    """uint8 (frames, H, W, 3) of a scene in which something happens."""
    scene = Scene(seed, size_px=size_px, fps=FPS)
    return np.stack([scene.frame(number) for number in range(frames)])


def written(path: Path, images: np.ndarray) -> Path:
    """The pictures as an MP4."""
    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream("libx264", rate=FPS)
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for number, image in enumerate(images):
            picture: Any = av.VideoFrame.from_ndarray(image, format="rgb24")
            picture.pts, picture.time_base = number, Fraction(1, FPS)
            out.mux(stream.encode(picture))
        out.mux(stream.encode())
    return path


def png(image: np.ndarray) -> bytes:
    """A picture (H, W, 3) without loss."""
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return out.getvalue()


def blobs(*data: bytes) -> np.ndarray:
    """A BYTES tensor."""
    array = np.empty(len(data), dtype=np.object_)
    array[:] = data
    return array


def texts(array: np.ndarray) -> list[str]:
    """A BYTES tensor's texts."""
    return [text.decode() for text in array]


def number_of(reply: InferReply) -> int:
    """How many frames the state had seen before the reply's last one."""
    return int(reply.parameters["frame_number"])
