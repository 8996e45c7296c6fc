"""The usual way to train, as the baseline: MMAction2's arithmetic in a plain torch loop.

MMAction2 cannot be installed beside a current torch: mmcv has to be built for it. This is what its 0.24 does to a clip
of a folder of frames (RawFrameDecode, Resize, MultiScaleCrop, Resize, Flip, Normalize, FormatShape, Collect), by OpenCV
as there, and its network, head and optimiser step, on torchvision's layers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision.models import resnet50

MEAN, STD = np.float64([[123.675, 116.28, 103.53]]), np.float64([[58.395, 57.12, 57.375]])
SCALES, PLACES = (1, 0.875, 0.75, 0.66), 13
Picture = np.ndarray[Any, np.dtype[Any]]


class PlainClips(Dataset[tuple[Tensor, int]]):
    """Clips of listed folders, `path frames label` a line, (T, 3, px, px) float32."""

    def __init__(self, listed: Path, home: Path, frames: int = 8, px: int = 224) -> None:
        self._records = [line.split() for line in listed.read_text().splitlines()]
        self._home, self._frames, self._px = home, frames, px

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, total, label = self._records[index]
        interval = int(total) // self._frames
        chosen = np.arange(self._frames) * interval + np.random.randint(interval, size=self._frames)
        images = [self._decode(self._home / path / f"img_{number + 1:05}.jpg") for number in chosen]
        height, width = images[0].shape[:2]
        factor = 256 / min(height, width)
        images = [self._resize(each, int(width * factor + 0.5), int(height * factor + 0.5)) for each in images]
        images = [self._resize(each, self._px, self._px) for each in self._crop(images)]
        if np.random.rand() < 0.5:
            for each in images:
                cv2.flip(each, 1, each)
        clip = np.empty((self._frames, self._px, self._px, 3), np.float32)
        for number, each in enumerate(images):
            clip[number] = each
        for each in clip:
            cv2.subtract(each, MEAN, each)
            cv2.multiply(each, 1 / STD, each)
        return torch.from_numpy(np.transpose(clip, (0, 3, 1, 2))), int(label)

    @staticmethod
    def _decode(path: Path) -> Picture:
        found = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR)
        return cv2.cvtColor(found, cv2.COLOR_BGR2RGB)

    @staticmethod
    def _resize(image: Picture, width: int, height: int) -> Picture:
        return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)

    def _crop(self, images: list[Picture]) -> list[Picture]:
        height, width = images[0].shape[:2]
        sides = [int(min(height, width) * scale) for scale in SCALES]
        sides = [self._px if abs(side - self._px) < 3 else side for side in sides]
        sizes = [(w, h) for i, h in enumerate(sides) for j, w in enumerate(sides) if abs(i - j) <= 1]
        w, h = sizes[np.random.randint(len(sizes))]
        across, down = (width - w) // 4, (height - h) // 4
        quarters = [(x, y) for x in (0, 2, 4) for y in (0, 2, 4)] + [(x, y) for x in (1, 3) for y in (1, 3)]
        assert len(quarters) == PLACES
        x, y = quarters[np.random.randint(PLACES)]
        left, top = x * across, y * down
        return [each[top : top + h, left : left + w] for each in images]


class ShiftedBlock(nn.Module):
    """A convolution behind the temporal shift, both ways, as MMAction2's TemporalShift makes it of pieces."""

    def __init__(self, conv: nn.Module, frames: int, fold_div: int = 8) -> None:
        super().__init__()
        self.conv, self.frames, self.fold_div = conv, frames, fold_div

    def forward(self, x: Tensor) -> Tensor:
        rows, channels, height, width = x.shape
        clip = x.view(-1, self.frames, channels, height * width)
        fold = channels // self.fold_div
        left, middle, right = clip[:, :, :fold], clip[:, :, fold : 2 * fold], clip[:, :, 2 * fold :]
        left = torch.cat([left[:, 1:], torch.zeros_like(left[:, :1])], 1)
        middle = torch.cat([torch.zeros_like(middle[:, :1]), middle[:, :-1]], 1)
        return self.conv(torch.cat([left, middle, right], 2).view(rows, channels, height, width))


class PlainTraining:
    """A ResNet-50 with shifts, and what a step of its training does."""

    def __init__(self, classes: int = 400, frames: int = 8, lr: float = 1e-3) -> None:
        torch.manual_seed(0)
        self.net, self.frames = resnet50(num_classes=classes), frames
        for stage in (self.net.layer1, self.net.layer2, self.net.layer3, self.net.layer4):
            for block in stage:
                block.conv1 = ShiftedBlock(block.conv1, frames)
        self.net.fc = nn.Sequential(nn.Dropout(0.5), self.net.fc)
        self.net.train()
        self.optimiser = torch.optim.SGD(self._groups(lr), lr=lr, momentum=0.9, weight_decay=1e-4)

    def _groups(self, lr: float) -> list[dict[str, Any]]:
        """TSMOptimizerConstructor's: the classifier learns faster, its bias faster still, norms and it do not decay."""
        head, first = list(self.net.fc.parameters()), [self.net.conv1.weight]
        norms = [
            each for module in self.net.modules() if isinstance(module, nn.BatchNorm2d) for each in module.parameters()
        ]
        told = {id(each) for each in (*head, *first, *norms)}
        return [
            {"params": first},
            {"params": [each for each in self.net.parameters() if id(each) not in told]},
            {"params": norms, "weight_decay": 0.0},
            {"params": head[:1], "lr": 5 * lr},
            {"params": head[1:], "lr": 10 * lr, "weight_decay": 0.0},
        ]

    def step(self, clips: Tensor, labels: Tensor) -> float:
        """Learn from clips (N, T, 3, H, W); the loss."""
        logits = self.net(clips.reshape(-1, *clips.shape[2:]))
        loss = nn.functional.cross_entropy(logits.view(len(labels), self.frames, -1).mean(1), labels)
        self.optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), 20)
        self.optimiser.step()
        return float(loss.detach())


def plain_batches(listed: Path, home: Path, batch: int, loaders: int) -> DataLoader[tuple[Tensor, int]]:
    """Its batches, read ahead by so many processes."""
    cv2.setNumThreads(0)  # as MMAction2 does
    clips = PlainClips(listed, home)
    endless = RandomSampler(clips, replacement=True, num_samples=10**9)
    return DataLoader(clips, batch, sampler=endless, num_workers=loaders)
