"""Which frames of a video a model sees: 0-based indices, nothing but integers in and out.

One frame is drawn from each of `frames` equal segments (uniform), or every few frames from a range of 64 (dense).
The two code bases whose weights we load agree on most rules; `convention` chooses where they differ. File names that
count from 1 are the decoder's business. Source: MMAction2 0.x SampleFrames and mit-han-lab's dataset.
"""

from __future__ import annotations

import numpy as np

from tsm_core.errors import CallerError
from tsm_core.labels import Convention
from tsm_core.recipes import CLIPS, Clips

DENSE_RANGE = 64  # frames that a dense clip spans


class NothingToSample(CallerError):
    """There is no frame to choose, or no number of frames to choose."""

    reason = "nothing_to_sample"


def train_indices(
    total: int, frames: int, rng: np.random.Generator, *, dense: bool = False, convention: Convention = "mmaction2"
) -> list[int]:
    """`frames` indices of a video of `total` frames, a random one of each segment, or from a random start if dense.

    A video shorter than `frames` is spread over the clip, its end wrapping to frame 0 where the rounding reaches it
    (mmaction2), or gives frame 0 alone (mit). Raises NothingToSample.
    """
    _check(total, frames)
    if dense:
        last = max(0, total - DENSE_RANGE)
        start = int(rng.integers(last)) if last else 0  # the last position is never drawn, as in both originals
        return _dense_clip(total, frames, start)
    length = total // frames
    if length:
        return [i * length + int(drawn) for i, drawn in enumerate(rng.integers(length, size=frames))]
    if convention == "mit":
        return [0] * frames
    step = total / frames
    return [round(i * step) % total for i in range(frames)]  # half to even


def validation_indices(
    total: int, frames: int, rng: np.random.Generator, *, dense: bool = False, convention: Convention = "mmaction2"
) -> list[int]:
    """The indices by which a model is judged between two epochs.

    mmaction2: those of the test (ten clips if dense). mit: the middles, but frame 0 alone of a video that is no longer
    than `frames`; if dense, one clip from a random start.
    """
    if convention == "mmaction2":
        return test_indices(total, frames, clips="dense" if dense else "uniform")
    if dense:
        return train_indices(total, frames, rng, dense=True, convention=convention)
    _check(total, frames)
    return _middles(total, frames) if total > frames else [0] * frames


def test_indices(
    total: int,
    frames: int,
    *,
    clips: Clips = "uniform",  # noqa: PT028
    convention: Convention = "mmaction2",  # noqa: PT028
) -> list[int]:
    """Indices of one clip (the middles of the segments), two (then their beginnings) or ten (dense), clip after clip.

    Both conventions agree here, short videos included. Raises NothingToSample.
    """
    _check(total, frames)
    if clips == "dense":
        starts = np.linspace(0, max(0, total - DENSE_RANGE), CLIPS["dense"], dtype=np.int64)
        return [index for start in starts for index in _dense_clip(total, frames, int(start))]
    found = _middles(total, frames)
    if clips == "twice":
        step = total / frames
        found += [int(i * step) for i in range(frames)]
    return found


def _middles(total: int, frames: int) -> list[int]:
    step = total / frames  # not the exact fraction: the originals' rounding is kept
    return [int(i * step + step / 2) for i in range(frames)]


def _dense_clip(total: int, frames: int, start: int) -> list[int]:
    stride = DENSE_RANGE // frames
    return [(start + i * stride) % total for i in range(frames)]


def _check(total: int, frames: int) -> None:
    if total < 1:
        raise NothingToSample(f"the video has {total} frames; at least 1 is needed")
    if frames < 1:
        raise NothingToSample(f"{frames} frames asked for; at least 1 makes sense")
