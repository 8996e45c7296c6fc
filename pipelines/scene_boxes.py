"""The scenes as films with boxes, to train the demo's detector on, and what of the demo's cameras it should have found.

A box is the tight bound of what the picture shows of the object. What leaves on one side comes in on the other as
another object, and so does the small copy that replaces one grown too large.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from pipelines.box_data import BoxVideo, Objects, clean
from pipelines.camera import burn_frame_number, viewed_pictures
from pipelines.datasets import Part
from pipelines.scenes import KINDS, Pose, Scene

FRAMES = 32  # of a film: a little over two seconds
FILMS: dict[Part, int] = {"train": 800, "val": 12}
FIRST_SEED: dict[Part, int] = {"train": 1 << 40, "val": 1 << 41}  # far from the seeds that people give to films
LEAST_VISIBLE = 0.25  # less of an object need not be found
DRAWN_PX = 128  # training films: larger than the detector's input, so that they are scaled as live ones are
CAMERA_PX, SENT_PX = 320, 96  # others: what the demo's cameras show, and what the service's decoder makes of it


class SceneBoxes:
    """Films of scenes with boxes of their objects, which are all of one class. BoxVideos.

    Those to train on are drawn with a camera's burnt-in number. Those to be judged by (`val`) are as the service sees
    the demo's cameras: through H.264 and the decoder's scaling. `condition` of a frame is what the object does.
    """

    labels = KINDS

    def __init__(self, part: Part) -> None:
        self.part: Part = part
        self.identity = f"scenes {part} {FILMS[part]}x{FRAMES}"

    def __len__(self) -> int:
        return FILMS[self.part]

    def video(self, index: int) -> BoxVideo:
        """The film `index`."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        seed = FIRST_SEED[self.part] + index
        return drawn_film(seed) if self.part == "train" else sent_film(seed)


def drawn_film(seed: int, frames: int = FRAMES) -> BoxVideo:
    """A film as it is drawn, with numbers that do not begin at 0."""
    scene = Scene(seed, DRAWN_PX)
    first = int(np.random.default_rng([seed, 4]).integers(1 << 16))

    def read(numbers: Sequence[int]) -> Tensor:
        pictures = [burn_frame_number(scene.frame(number), first + number) for number in numbers]
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)

    return BoxVideo(f"scene {seed}", objects_of(scene, frames), read)


def sent_film(seed: int, frames: int = FRAMES) -> BoxVideo:
    """A film as the service sees it when a simulated camera shows it."""
    scene = Scene(seed, CAMERA_PX)

    @lru_cache(maxsize=1)
    def pictures() -> Tensor:
        sent = viewed_pictures(scene, frames, size=(SENT_PX, SENT_PX))
        return torch.from_numpy(np.stack(list(sent))).permute(0, 3, 1, 2)

    return BoxVideo(
        f"scene {seed}",
        objects_of(scene, frames, SENT_PX / CAMERA_PX),
        lambda numbers: pictures()[list(numbers)],
    )


def objects_of(scene: Scene, frames: int, scale: float = 1.0) -> tuple[Objects, ...]:
    """What shows in the frames [0, frames) of a scene, boxes in its pixels times `scale`."""
    tracks: dict[tuple[int, int, int], int] = {}
    turns = np.zeros(3, np.int64)  # so often have x, y and size gone round their circles
    before: Pose | None = None
    found: list[Objects] = []
    for number in range(frames):
        pose = scene.timeline.pose_at(number)
        if before:
            # no place moves by half a turn from one frame to the next: what seems to has passed the circle's end
            turns += np.rint([before.x - pose.x, before.y - pose.y, before.size - pose.size]).astype(np.int64)
        before = pose
        pieces = scene.look.pieces(pose)
        visible = np.array([piece.visible for piece in pieces], np.float32)
        copies = [tuple((np.array(piece.copy) - turns).tolist()) for piece in pieces]
        objects, _ = clean(
            (round(scene.size_px * scale),) * 2,
            np.array([piece.box for piece in pieces]) * scale,
            [0] * len(pieces),
            tracks=[tracks.setdefault(copy, len(tracks)) for copy in copies],
            ignore=visible < LEAST_VISIBLE,
            visible=visible,
            condition=scene.label_at(number),
        )
        found.append(objects)
    return tuple(found)
