"""One Dataset that gives frames of listed videos."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor
from torch.utils.data import Dataset

from pipelines.datasets import TEMPLATE, VideoRecord
from pipelines.decoding import UnreadableVideo, open_frames
from pipelines.sampling import NothingToSample, test_indices
from tsm_core.labels import Convention
from tsm_core.recipes import Clips


@dataclass(frozen=True, slots=True)
class VideoSample:
    """What one video gave: images uint8 (F, 3, H, W), RGB, or the error that says why there are none."""

    index: int
    label: int
    images: Tensor | None
    error: str | None = None


def read_frames(
    root: Path, record: VideoRecord, choose: Callable[[int], list[int]], template: str = TEMPLATE, start: int = 1
) -> Tensor:
    """uint8 (F, 3, H, W) of one record: the frames that `choose` picks of so many. Raises UnreadableVideo."""
    path = root / record.path
    with open_frames(path, template, start + record.offset) as reader:
        total = record.frames if record.frames is not None and path.is_dir() else len(reader)
        try:
            return reader.frames(choose(total))
        except NothingToSample as error:
            raise UnreadableVideo(f"{path}: {error}") from None


class VideoDataset(Dataset[VideoSample]):
    """Frames of listed videos for a test: item i is the VideoSample of record i.

    F is frames x clips (1, 2 or 10), clip after clip. root: the folder that the records' paths start from. A video
    that cannot be read is a sample without images, or with on_error `raise` an UnreadableVideo. In a DataLoader, say
    batch_size=None: videos differ in size.
    """

    def __init__(
        self,
        records: Sequence[VideoRecord],
        root: Path | str,
        *,
        frames: int = 8,
        clips: Clips = "uniform",
        convention: Convention = "mmaction2",
        template: str = TEMPLATE,
        start: int = 1,
        on_error: Literal["skip", "raise"] = "skip",
    ) -> None:
        self.records, self.root = list(records), Path(root)
        self.count, self.clips, self.convention = frames, clips, convention
        self.template, self.start, self.on_error = template, start, on_error

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> VideoSample:
        record = self.records[index]
        try:
            return VideoSample(index, record.label, self.images(record))
        except UnreadableVideo as error:
            if self.on_error == "raise":
                raise
            return VideoSample(index, record.label, None, str(error))

    def images(self, record: VideoRecord) -> Tensor:
        """uint8 (F, 3, H, W) of one record. Raises UnreadableVideo."""
        return read_frames(
            self.root,
            record,
            lambda total: test_indices(total, self.count, clips=self.clips, convention=self.convention),
            self.template,
            self.start,
        )
