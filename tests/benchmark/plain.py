"""The usual way, as the baseline: torchvision's networks, unfused, contiguous, eager, one stream, separate buffers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models import mobilenet_v2, resnet50


class BufferedConv(nn.Module):
    """A convolution that takes its first eighth of channels from the previous frame."""

    def __init__(self, conv: nn.Module, channels: int) -> None:
        super().__init__()
        self.conv = conv
        self.fold = channels // 8
        self.held: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        held = torch.zeros_like(x[:, : self.fold]) if self.held is None else self.held
        self.held = x[:, : self.fold].clone()
        return self.conv(torch.cat([held, x[:, self.fold :]], dim=1))


def plain_online(backbone: str, shifted: bool = True) -> nn.Module:
    """A network that is stepped frame by frame, (1, 3, 224, 224) → (1, 1000); `shifted=False` leaves the shift out."""
    torch.manual_seed(0)
    if backbone == "mobilenet_v2":
        net: nn.Module = mobilenet_v2(weights=None)
        for block in net.features:
            inner = getattr(block, "conv", None)
            if shifted and inner is not None and len(inner) == 4 and block.use_res_connect:
                inner[0][0] = BufferedConv(inner[0][0], inner[0][0].in_channels)
    elif backbone == "resnet50":
        net = resnet50(weights=None)
        for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
            for block in stage:
                if shifted:
                    block.conv1 = BufferedConv(block.conv1, block.conv1.in_channels)
    else:
        raise ValueError(f"no plain network for {backbone!r}: mobilenet_v2 or resnet50")
    return net.eval()
