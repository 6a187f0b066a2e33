"""The wide residual network that gives LEO its features (Zagoruyko & Komodakis, 2016; LEO, App. B.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .networks import glorot_uniform


class WideResNet(nn.Module):
    """WRN-depth-width: a 3x3 convolution, three groups of n = (depth - 4) / 6 pre-activation blocks, a linear head.

    A group's filters are `width` times 16, 32, 64. "3 steps of dimensionality reduction" (LEO, App. B.2) are taken
    to be a stride of 2 in the first block of every group, 80 -> 40 -> 20 -> 10 pixels; the original network for 32x32
    images has a stride of 1 in its first group. Dropout lies between the two convolutions of a block.

    *Layer 21* of WRN-28-10 is the end of the second of the four blocks of the last group: layer 1 is the first
    convolution, each block has two. In other depths it is the end of block n // 2 (at least 1) of the last group.
    The paper does not say whether its activations are those before or after batch norm and ReLU of the block that
    follows; `rectified` chooses.

    Args:
        channels, size: of the square input images.
        dropout: share of the activations that are dropped.
        rectified: features are rectified (by the norm and ReLU that follow them) before they are averaged.
        generator: source of the initial weights (He normal, fan out; the head's Glorot uniform).

    Raises:
        ValueError: no such depth, or images too small for three halvings.
    """

    def __init__(
        self, channels=3, size=80, depth=28, width=10, classes=64, dropout=0.5, *, rectified=True,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"no wide residual network has a depth of {depth}; use 10, 16, 22, 28, ...")
        if size < 8:
            raise ValueError(f"images of {size}x{size} are too small for three halvings; use at least 8x8")
        n = (depth - 4) // 6
        filters = [16, 16 * width, 32 * width, 64 * width]
        self.stem = nn.Conv2d(channels, filters[0], 3, padding=1, bias=False)
        self.blocks = nn.ModuleList(
            Block(filters[g] if i == 0 else filters[g + 1], filters[g + 1], 2 if i == 0 else 1, dropout)
            for g in range(3) for i in range(n)
        )
        self.norm = nn.BatchNorm2d(filters[-1])
        self.head = nn.Linear(filters[-1], classes)
        self.d, self.cut, self.rectified = filters[-1], 2 * n + max(1, n // 2), rectified
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", generator=generator)
        self.head.weight.data = glorot_uniform(self.head.weight.shape, generator)
        nn.init.zeros_(self.head.bias)
        self.to(memory_format=torch.channels_last)

    def features(self, x: Tensor) -> Tensor:
        """Spatial averages ``[n, d]`` of layer 21, float32, of images ``[n, C, size, size]``."""
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        for block in self.blocks[: self.cut]:
            x = block(x)
        if self.rectified:
            x = F.relu((self.blocks[self.cut].norm1 if self.cut < len(self.blocks) else self.norm)(x))
        return x.float().mean((2, 3))

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Logits ``[n, classes]`` of images ``[n, C, size, size]``; `generator` is the source of dropout."""
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        for block in self.blocks:
            x = block(x, generator)
        return self.head(F.relu(self.norm(x)).mean((2, 3)))


class Block(nn.Module):
    """Twice batch norm, ReLU, 3x3 convolution, added to the input or, where the shape changes, to a 1x1 projection."""

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        self.dropout = dropout

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Maps ``[n, outputs, h, w]`` of maps ``[n, inputs, H, W]``; dropout in training draws from `generator`."""
        y = F.relu(self.norm1(x))
        # As in the authors' network, the projection too starts from the normalized and rectified input.
        x = x if self.shortcut is None else self.shortcut(y)
        y = F.relu(self.norm2(self.conv1(y)))
        if self.training and self.dropout:
            keep = 1 - self.dropout
            y = y * torch.empty_like(y).bernoulli_(keep, generator=generator).div_(keep)
        return x + self.conv2(y)
