"""Space-time non-local block: every place of every frame of a clip hears from all others.

Source: Wang et al., arXiv:1711.07971; as MMAction2 and mit-han-lab put it into TSM: half the channels inside, keys and
values pooled 2x2, no scaling of the scores.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

from tsm_core.shift import running

NonLocalMode = Literal["embedded_gaussian", "gaussian", "dot_product"]
INIT_STD = 0.01


class NonLocalBlock(nn.Module):
    """x + norm(out(y)), where y averages g over all places of the clip, each weighed by its likeness to this one.

    Likeness: `embedded_gaussian` softmax of theta . phi; `gaussian` softmax of x . x, no parameters; `dot_product`
    theta . phi over the number of places. A 1x1x1 convolution over a clip is a 1x1 convolution over its frames, so all
    layers are two-dimensional. A new block is the identity: its norm begins at zero.
    """

    def __init__(self, channels: int, mode: NonLocalMode) -> None:
        super().__init__()
        self.mode = mode
        inner = channels // 2
        self.g = nn.Conv2d(channels, inner, 1)
        if mode != "gaussian":
            self.theta = nn.Conv2d(channels, inner, 1)
            self.phi = nn.Conv2d(channels, inner, 1)
        self.out = nn.Conv2d(inner, channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        for name, conv in self.named_children():
            if name in ("g", "theta", "phi"):
                nn.init.normal_(conv.weight, std=INIT_STD)  # type: ignore[arg-type]
                nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        nn.init.kaiming_normal_(self.out.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Frames (N * T, C, H, W) -> same shape; T is the running pass's."""
        gaussian = self.mode == "gaussian"
        queries = _places(x if gaussian else self.theta(x))
        keys = _places(functional.max_pool2d(x if gaussian else self.phi(x), 2))
        values = _places(functional.max_pool2d(self.g(x), 2))
        if self.mode == "dot_product":  # no softmax between the products: the small one first
            y = queries @ (keys.mT @ values / keys.shape[1])
        else:
            q, k, v = (each[:, None] for each in (queries, keys, values))  # one head
            y = functional.scaled_dot_product_attention(q, k, v, scale=1.0)[:, 0]
        frames = y.reshape(-1, *x.shape[2:], y.shape[-1]).permute(0, 3, 1, 2)  # (N * T, C / 2, H, W)
        rest: Tensor = self.norm(self.out(frames))
        return x + rest


def _places(x: Tensor) -> Tensor:
    # frames (N * T, C, H, W) -> (N, T * H * W, C), without a copy when x is channels last
    return x.permute(0, 2, 3, 1).reshape(-1, running.get().frames * x.shape[2] * x.shape[3], x.shape[1])
