"""The papers' networks. A network of T tasks takes its weights as a list of tensors with a leading task axis."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import one_of
from .fast_conv4 import Geometry, channels_last, conv_block, to_groups


@torch.no_grad()
def truncated_normal_(x: Tensor, std: float, generator: torch.Generator | None = None) -> Tensor:
    """N(0, std^2) cut off at 2 std, in place. PyTorch's own draws other numbers before version 2.12."""
    low, high = (torch.tensor(edge, dtype=x.dtype).item() for edge in (-2 * std, 2 * std))
    drawn = x.normal_(0, std, generator=generator)
    while (outside := (drawn < low) | (drawn > high)).any():
        drawn = torch.where(outside, torch.empty_like(drawn).normal_(0, std, generator=generator), drawn)
    return x.copy_(drawn)


def glorot_uniform(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """U(-a, a) with a = sqrt(6 / (fan_in + fan_out)); fans of a filter count its taps (Glorot & Bengio, 2010)."""
    return nn.init.xavier_uniform_(torch.empty(shape), generator=generator)


class Conv4(nn.Module):
    """Four blocks of 3x3 convolution, batch norm, ReLU and downsampling; optionally a linear head.

    The convolutions have no bias: batch norm subtracts it again, so it changes nothing (CACTUs' code has one).

    Args:
        channels, size: of the square input images.
        filters: per convolution (32 in CACTUs' MAML, 64 in its ProtoNets).
        way: outputs of the linear head; None for a network that embeds only.
        downsample: "pool" (2x2 max-pool) or "stride" (convolutions of stride 2; CACTUs' MAML on 28x28).
        padding: pixels of 0 around each map, 1 or 0 (LASIUM on 84x84: sides 84, 41, 19, 8, 3; reference code).
        head: "flatten" the last map, or take its spatial "mean" (CACTUs' MAML on 28x28).
        norm: "affine" (learned scale and shift) or "shift" (CACTUs' MAML: no scale; reference code, not in the paper).
        eps: of batch norm (1e-3 in CACTUs' MAML, 1e-5 in its ProtoNets).
        head_init: "glorot" or "normal" (N(0, 1); CACTUs' Omniglot and MNIST, reference code, not in the paper).
        generator: source of the initial weights.

    Raises:
        ValueError: an unknown option, or images too small for four blocks.
    """

    blocks = 4

    def __init__(
        self,
        channels=1,
        size=28,
        filters=64,
        way=None,
        *,
        downsample="pool",
        padding=1,
        head="flatten",
        norm="affine",
        eps=1e-5,
        head_init="glorot",
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        one_of("downsample", downsample, ("pool", "stride"))
        one_of("padding", padding, (0, 1))
        one_of("head", head, ("flatten", "mean"))
        one_of("norm", norm, ("affine", "shift"))
        one_of("head_init", head_init, ("glorot", "normal"))
        self.channels, self.size, self.way = channels, size, way
        self.average = head == "mean"
        pool = downsample == "pool"
        self.geometry = Geometry(stride=1 if pool else 2, padding=padding, pool=pool, eps=eps)
        side = self._side(size)
        if side < 1:
            least = next(s for s in range(1, 99) if self._side(s) > 0)
            raise ValueError(f"images of {size}x{size} are too small for four blocks; use at least {least}x{least}")
        self.features = filters if self.average else filters * side * side
        shapes = [(filters, channels if b == 0 else filters, 3, 3) for b in range(self.blocks)]
        self.weights = nn.ParameterList(
            nn.Parameter(glorot_uniform(s, generator).contiguous(memory_format=torch.channels_last)) for s in shapes
        )
        learned = norm == "affine"
        self.scales = nn.ParameterList(nn.Parameter(torch.ones(filters), learned) for _ in shapes)
        self.shifts = nn.ParameterList(nn.Parameter(torch.zeros(filters)) for _ in shapes)
        self.register_buffer("running_mean", torch.zeros(self.blocks, filters))
        self.register_buffer("running_var", torch.ones(self.blocks, filters))
        if way is not None:
            w = torch.randn(way, self.features, generator=generator)
            self.head_weight = nn.Parameter(w if head_init == "normal" else glorot_uniform(w.shape, generator))
            self.head_bias = nn.Parameter(torch.zeros(way))

    def _side(self, size: int) -> int:
        """Side of the last map."""
        for _ in range(self.blocks):
            size = self.geometry.side(size) // (2 if self.geometry.pool else 1)
        return size

    def tensors(self, way: int | None = None) -> list[Tensor]:
        """Filter, scale and shift of each block, then weight and bias of the head's first `way` outputs."""
        body = [t for three in zip(self.weights, self.scales, self.shifts) for t in three]
        if self.way is None:
            return body
        check_head(self.way, way)
        return [*body, self.head_weight[:way], self.head_bias[:way]]

    def norm_mask(self) -> list[bool]:
        """For each of `tensors()`: is it a scale or shift of batch norm?"""
        return [False, True, True] * self.blocks + [False] * (0 if self.way is None else 2)

    def head_mask(self) -> list[bool]:
        """For each of `tensors()`: does it belong to the head?"""
        return [False] * (3 * self.blocks) + [True] * (0 if self.way is None else 2)

    def check_images(self, x: Tensor) -> None:
        """ValueError: ``[..., C, H, W]`` are no float images of its channels and, if it has a head, of its size."""
        channels, *size = x.shape[-3:]
        sized = self.way is None or self.average or size == [self.size, self.size]
        if channels != self.channels or not sized or not x.is_floating_point():
            raise ValueError(f"the network takes float images {(self.channels, self.size, self.size)}, these are "
                             f"{x.dtype} {tuple(x.shape[-3:])}; build Conv4(channels, size) for them")  # fmt: skip

    def embed(self, x: Tensor, stats: str = "batch", update: bool = False, momentum=0.1) -> Tensor:
        """Features ``[n, d]`` of images ``[n, C, H, W]`` with the shared weights.

        `stats` says which batch-norm statistics are used: "batch" (those of x) or "running" (the averages over
        training, with unbiased variance as in PyTorch's BatchNorm2d). `update` gives x the share `momentum` of the
        averages.
        """
        one_of("stats", stats, ("batch", "running"))
        self.check_images(x)
        if stats == "running":
            return self._embed_running(x)
        x = channels_last(x)
        for b in range(self.blocks):
            n = x.shape[0] * self.geometry.side(x.shape[2]) * self.geometry.side(x.shape[3])
            x, mean, var = conv_block(x, self.weights[b], self.scales[b], self.shifts[b], self.geometry)
            if update:
                self._gather(b, mean, var, n, momentum)
        return self._flatten(x)

    def _gather(self, block: int, mean: Tensor, var: Tensor, n: int, momentum=0.1) -> None:
        """Add the statistics ``[F]`` of n pixels to the averages; the biased variance becomes the unbiased one."""
        self.running_mean[block].lerp_(mean, momentum)
        self.running_var[block].lerp_(var * n / (n - 1), momentum)

    def _embed_running(self, x: Tensor) -> Tensor:
        """With fixed statistics batch norm is a rescaled filter and a bias, which commute with the max-pool."""
        x = channels_last(x)
        for b in range(self.blocks):
            gain = self.scales[b] * torch.rsqrt(self.running_var[b] + self.geometry.eps)
            w = self.weights[b] * gain.view(-1, 1, 1, 1)
            x = F.conv2d(
                x, w, self.shifts[b] - self.running_mean[b] * gain, self.geometry.stride, self.geometry.padding
            )
            x = F.relu_(F.max_pool2d(x, 2) if self.geometry.pool else x)
        return self._flatten(x)

    def _flatten(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) if self.average else x.flatten(1)

    def embed_tasks(self, params: list[Tensor], x: Tensor, update: bool = False) -> Tensor:
        """Features ``[T, n, d]`` of ``[T, n, C, H, W]``; task t has its own weights and batch statistics.

        `update` adds the statistics, averaged over tasks, to the averages that `embed` uses.
        """
        self.check_images(x)
        tasks, n = x.shape[:2]
        geometry = Geometry(tasks, self.geometry.stride, self.geometry.padding, self.geometry.pool, self.geometry.eps)
        x = to_groups(x)
        for b in range(self.blocks):
            pixels = n * geometry.side(x.shape[2]) * geometry.side(x.shape[3])
            x, mean, var = conv_block(x, *(p.flatten(0, 1) for p in params[3 * b : 3 * b + 3]), geometry)
            if update:
                self._gather(b, mean.view(tasks, -1).mean(0), var.view(tasks, -1).mean(0), pixels)
        maps = x.reshape(n, tasks, -1, *x.shape[2:]).transpose(0, 1)
        return maps.mean((3, 4)) if self.average else maps.flatten(2)

    def forward_tasks(self, params: list[Tensor], x: Tensor) -> Tensor:
        """Logits ``[T, n, N]`` of images ``[T, n, C, H, W]`` under weights with a leading task axis."""
        return torch.baddbmm(params[-1].unsqueeze(1), self.embed_tasks(params, x), params[-2].transpose(1, 2))


class MLP(nn.Module):
    """Fully connected network with ReLU, for T tasks at once: ``[T, n, sizes[0]] -> [T, n, sizes[-1]]``.

    Args:
        norm: None, or "shift": batch norm over the images of a task after each hidden layer, with a shift and no scale
            (CACTUs' MAML on embeddings; reference code, not in the paper).
        std: of the normal initial weights, cut off at 2 std (CACTUs: 0.01); None: Glorot.

    Raises:
        ValueError: an unknown norm.
    """

    def __init__(self, sizes: list[int], generator: torch.Generator | None = None, *, norm=None, std=None, eps=1e-3):
        super().__init__()
        one_of("norm", norm, (None, "shift"))
        self.way, self.norm, self.eps = sizes[-1], norm, eps
        shapes = list(zip(sizes[1:], sizes[:-1]))
        self.weights = nn.ParameterList(nn.Parameter(glorot_uniform(s, generator)) for s in shapes)
        if std is not None:
            for w in self.weights:
                truncated_normal_(w, std, generator)
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(s[0])) for s in shapes)

    def tensors(self, way: int | None = None) -> list[Tensor]:
        """Weight and bias (with batch norm: its shift) of each layer; the last layer cut to its first `way` outputs."""
        check_head(self.way, way)
        flat = [t for two in zip(self.weights, self.biases) for t in two]
        return [*flat[:-2], flat[-2][:way], flat[-1][:way]]

    def norm_mask(self) -> list[bool]:
        hidden = len(self.weights) - 1
        return [False, self.norm is not None] * hidden + [False, False]

    def head_mask(self) -> list[bool]:
        return [False] * (2 * len(self.weights) - 2) + [True, True]

    def forward_tasks(self, params: list[Tensor], x: Tensor) -> Tensor:
        """Logits ``[T, n, N]`` of vectors ``[T, n, ...]``; params as in `tensors`, but one copy per task."""
        x = x.flatten(2)
        for i in range(0, len(params), 2):
            last = i == len(params) - 2
            if self.norm is None or last:
                x = torch.baddbmm(params[i + 1].unsqueeze(1), x, params[i].transpose(1, 2))
            else:
                x = x @ params[i].transpose(1, 2)
                x = x - x.mean(1, keepdim=True)
                x = x * torch.rsqrt(x.square().mean(1, keepdim=True) + self.eps) + params[i + 1].unsqueeze(1)
            x = x if last else F.relu(x)
        return x


class LinearHead(nn.Module):
    """A linear classifier without bias for T tasks at once, ``[T, n, features] -> [T, n, way]`` (LEO, App. B.3).

    std: of the normal initial weights, cut off at 2 std.
    """

    def __init__(self, features: int, way: int, generator: torch.Generator | None = None, *, std=0.01):
        super().__init__()
        self.way, self.weight = way, nn.Parameter(torch.empty(way, features))
        truncated_normal_(self.weight, std, generator)

    def tensors(self, way: int | None = None) -> list[Tensor]:
        check_head(self.way, way)
        return [self.weight[:way]]

    def norm_mask(self) -> list[bool]:
        return [False]

    def head_mask(self) -> list[bool]:
        return [True]

    def forward_tasks(self, params: list[Tensor], x: Tensor) -> Tensor:
        return x.flatten(2) @ params[0].transpose(1, 2)


def check_head(outputs: int, way: int | None) -> None:
    """Raise ValueError if tasks have more classes than the head has outputs; None: all outputs are asked for."""
    if way is not None and way > outputs:
        raise ValueError(f"{way}-way tasks need a head of {way} outputs; this network has {outputs}")
