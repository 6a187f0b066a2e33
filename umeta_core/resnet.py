"""The residual network of CACTUs' ImageNet experiment (appendix G), for T tasks at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .fast_conv4 import to_groups
from .networks import check_head, glorot_uniform


class ResNet(nn.Module):
    """A 7x7 convolution of stride 2, four residual groups, the mean over the last map, and a linear head.

    Each group starts with a 2x2 max-pool and adds a 1x1 convolution of its input to two pre-activation parts
    (batch norm, ReLU, 3x3 convolution). Its filters are `width` times 1, 2, 4, 8. Batch norm has a shift but no scale
    and always uses the statistics of the batch at hand. The paper's Table 11 says five groups; its code insists on
    four, and all other details are from there. The first convolution of a group has no bias, since batch norm
    subtracts it again (the code has one). Padding is symmetric (the code's lies half a pixel off in the 7x7 one).

    Args:
        channels, size: of the square input images (3 and 224 in the paper; 32 is the smallest).
        width: filters of the first group (64 in the paper: 4.9 million weights).
        way: outputs of the linear head.
        eps: of batch norm.
        generator: source of the initial weights (Glorot; biases and shifts 0).

    Raises:
        ValueError: images too small for five halvings.
    """

    groups = 4

    def __init__(self, channels=3, size=224, width=64, way=5, *, eps=1e-3, generator: torch.Generator | None = None):
        super().__init__()
        if size < 32:
            raise ValueError(f"images of {size}x{size} are too small for five halvings; use at least 32x32")
        self.channels, self.size, self.way, self.eps = channels, size, way, eps
        filters = [width * 2**g for g in range(self.groups)]
        inputs = [width, *filters[:-1]]
        sides = list(zip(inputs, filters))
        self.first = nn.Parameter(glorot_uniform((width, channels, 7, 7), generator))
        self.first_bias = nn.Parameter(torch.zeros(width))
        self.shifts = nn.ParameterList(nn.Parameter(torch.zeros(c)) for side in sides for c in side)
        self.weights = nn.ParameterList(
            nn.Parameter(glorot_uniform((b, c, 3, 3), generator)) for a, b in sides for c in (a, b)
        )
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(b)) for b in filters)
        self.shortcuts = nn.ParameterList(nn.Parameter(glorot_uniform((b, a, 1, 1), generator)) for a, b in sides)
        self.head_weight = nn.Parameter(glorot_uniform((way, filters[-1]), generator))
        self.head_bias = nn.Parameter(torch.zeros(way))

    def tensors(self, way: int | None = None) -> list[Tensor]:
        """Weight and bias of the first convolution; shift, weight, shift, weight, bias and shortcut of each group;
        weight and bias of the head's first `way` outputs."""
        check_head(self.way, way)
        w, s = self.weights, self.shifts
        body = [self.first, self.first_bias]
        for g, (bias, shortcut) in enumerate(zip(self.biases, self.shortcuts)):
            body += [s[2 * g], w[2 * g], s[2 * g + 1], w[2 * g + 1], bias, shortcut]
        return [*body, self.head_weight[:way], self.head_bias[:way]]

    def norm_mask(self) -> list[bool]:
        """For each of `tensors()`: is it a shift of batch norm?"""
        return [False, False, *[True, False, True, False, False, False] * self.groups, False, False]

    def head_mask(self) -> list[bool]:
        """For each of `tensors()`: does it belong to the head?"""
        return [False] * (2 + 6 * self.groups) + [True, True]

    def forward_tasks(self, params: list[Tensor], x: Tensor) -> Tensor:
        """Logits ``[T, n, N]`` of images ``[T, n, C, H, W]`` under weights with a leading task axis.

        Tasks lie side by side as groups of channels, ``[n, T*C, H, W]``: one convolution serves them all, and batch
        norm's statistics, which are per channel, are each task's own.
        """
        tasks, n = x.shape[:2]
        body = [p.flatten(0, 1) for p in params[:-2]]
        x = F.conv2d(to_groups(x), body[0], body[1], stride=2, padding=3, groups=tasks)
        for g in range(self.groups):
            x = self._group(F.max_pool2d(x, 2), tasks, *body[2 + 6 * g : 8 + 6 * g])
        features = x.mean((2, 3)).view(n, tasks, -1).transpose(0, 1)
        return torch.baddbmm(params[-1].unsqueeze(1), features, params[-2].transpose(1, 2))

    def _group(self, x, tasks, shift, weight, second_shift, second_weight, bias, shortcut) -> Tensor:
        y = F.conv2d(self._normalize(x, shift), weight, None, padding=1, groups=tasks)
        y = F.conv2d(self._normalize(y, second_shift), second_weight, bias, padding=1, groups=tasks)
        return y + F.conv2d(x, shortcut, groups=tasks)

    def _normalize(self, x: Tensor, shift: Tensor) -> Tensor:
        # The scale is a constant 1, not None: without it `F.batch_norm` cannot be differentiated twice.
        return F.relu(F.batch_norm(x, None, None, torch.ones_like(shift), shift, training=True, eps=self.eps))
