"""The networks of Meta-GMVAE: encoders of images and of sets, decoders (paper, Tables 3, 4, 7 and 8)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .fast_conv4 import Geometry, channels_last, conv_block
from .fast_norm import NormRelu

LOG_2PI = math.log(2 * math.pi)


class SetBlock(nn.Module):
    """Self-attention between the members of a set ``[S, M, width]``, as released, without layer norm.

    Against a transformer's layer: what attention adds to is the *projected* query, scores are divided by the root of
    the whole width and not of a head's, and one linear layer with ReLU is added after (the paper's Table 3 has ELU).
    (eq-gmvae-block)

    Raises:
        ValueError: heads that do not divide the width.
    """

    def __init__(self, width: int, heads: int = 4, generator: torch.Generator | None = None):
        super().__init__()
        if width % heads:
            raise ValueError(f"{heads} heads cannot share {width} features; use a divisor")
        self.heads, self.scale = heads, width**-0.5
        self.query, self.key, self.value, self.out = (_linear(width, width, generator) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self._split(f(x)) for f in (self.query, self.key, self.value))
        h = q + F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        h = h.transpose(1, 2).flatten(2)
        return h + F.relu(self.out(h))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class SetEncoder(nn.Sequential):
    """Two blocks, then means and log-variances side by side: ``[S, M, features]`` to ``[S, M, 2 * latent]``."""

    def __init__(self, features: int, latent: int, generator: torch.Generator | None = None):
        super().__init__(
            SetBlock(features, generator=generator), SetBlock(features, generator=generator),
            _linear(features, 2 * latent, generator),
        )  # fmt: skip


class NormBlock(nn.Module):
    """Convolution without bias, batch norm and ReLU on channels-last maps: the numbers of PyTorch's layers, faster.

    Training uses the statistics of the batch and averages them as BatchNorm2d does; evaluation has the averages. `pool`
    is a max-pool that halves the maps and rounds up. `up` is a transposed convolution, of stride 2.
    """

    def __init__(self, channels: int, filters: int, kernel=3, *, pool=False, up=False, generator=None):
        super().__init__()
        self.up, self.pool = up, pool
        shape = (channels, filters) if up else (filters, channels)
        self.weight = nn.Parameter(_uniform((*shape, kernel, kernel), shape[1] * kernel**2, generator))
        self.scale, self.shift = nn.Parameter(torch.ones(filters)), nn.Parameter(torch.zeros(filters))
        self.register_buffer("running_mean", torch.zeros(filters))
        self.register_buffer("running_var", torch.ones(filters))

    def forward(self, x: Tensor) -> Tensor:
        fused = self.training and self.pool and x.shape[2] % 2 == 0  # for even sides, rounding does not matter
        x = self._on_batch(channels_last(x), fused) if self.training else F.relu(self._on_averages(channels_last(x)))
        return F.max_pool2d(x, 2, ceil_mode=True) if self.pool and not fused else x

    def _on_batch(self, x: Tensor, fused: bool) -> Tensor:
        if fused:
            pixels = len(x) * x.shape[2] * x.shape[3]
            x, mean, var = conv_block(x, self.weight, self.scale, self.shift, Geometry())
        else:
            weight = channels_last(self.weight)
            y = F.conv_transpose2d(x, weight, None, 2, 1) if self.up else F.conv2d(x, weight, padding=1)
            pixels = y.numel() // y.shape[1]
            x, mean, var = NormRelu.apply(channels_last(y), self.scale, self.shift)
        with torch.no_grad():
            self.running_mean.lerp_(mean, 0.1)
            self.running_var.lerp_(var * pixels / (pixels - 1), 0.1)
        return x

    def _on_averages(self, x: Tensor) -> Tensor:
        gain = self.scale * torch.rsqrt(self.running_var + Geometry.eps)
        shift = self.shift - self.running_mean * gain
        if self.up:
            return F.conv_transpose2d(x, self.weight * gain.view(1, -1, 1, 1), shift, 2, 1)
        return F.conv2d(x, self.weight * gain.view(-1, 1, 1, 1), shift, padding=1)


def sides(size: int) -> list[int]:
    """Sides of the maps: halved four times, rounded up. 28, 14, 7, 4, 2."""
    return [size] + [(size := -(-size // 2)) for _ in range(4)]


class ImageEncoder(nn.Sequential):
    """Conv-4 with max-pools that round up (paper, Table 3): images ``[n, C, H, W]`` to features ``[n, 256]``."""

    def __init__(self, channels=1, size=28, filters=64, generator: torch.Generator | None = None):
        widths = [channels] + 4 * [filters]
        blocks = [NormBlock(a, b, pool=True, generator=generator) for a, b in zip(widths, widths[1:])]
        super().__init__(*blocks, nn.Flatten())
        self.features = filters * sides(size)[-1] ** 2


class ImageDecoder(nn.Module):
    """Latents to images of independent Bernoulli pixels (paper, Table 4): MLP, then transposed convolutions.

    ValueError: an odd size.
    """

    def __init__(self, latent=64, channels=1, size=28, filters=64, generator: torch.Generator | None = None):
        super().__init__()
        if size % 2:
            raise ValueError(f"no decoder for {size}x{size} images; use an even size")
        first, *targets, _ = reversed(sides(size))  # 2; 4, 7, 14; 28
        self.latent, self.shape = latent, (filters, first, first)
        width = filters * first**2
        widths = [latent, width, width, width]
        self.mlp = nn.Sequential(
            *(f for a, b in zip(widths, widths[1:]) for f in (_linear(a, b, generator), nn.ELU(inplace=True)))
        )
        self.blocks = nn.Sequential(
            *(NormBlock(filters, filters, 4 - side % 2, up=True, generator=generator) for side in targets)
        )
        self.weight = nn.Parameter(_uniform((filters, channels, 4, 4), 16 * channels, generator))
        self.bias = nn.Parameter(_uniform((channels,), 16 * channels, generator))

    def logits(self, z: Tensor) -> Tensor:
        """Logits of the pixels, ``[n, C, H, W]``, of latents ``[n, d]``.

        On a CPU the last transposed convolution is a matrix product and a sum of overlaps: few channels suit no kernel.
        On a GPU the derivative of that sum would launch a kernel for each image.
        """
        h = self.blocks(self.mlp(z).unflatten(1, self.shape))
        if h.is_cuda:
            return F.conv_transpose2d(h, self.weight, self.bias, 2, 1)
        parts = h.permute(0, 2, 3, 1).flatten(1, 2) @ self.weight.flatten(1)  # [n, pixels, channels * 16]
        size = [2 * side for side in h.shape[2:]]
        return F.fold(parts.transpose(1, 2), size, 4, stride=2, padding=1) + self.bias.view(-1, 1, 1)

    def forward(self, z: Tensor) -> Tensor:
        """Means of the pixels, ``[n, C, H, W]``, of latents ``[n, d]``."""
        return self.logits(z).sigmoid()

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x | z), ``[T, M, N]``, of images ``[T, M, C, H, W]`` in [0, 1] under samples ``[T, M, N, d]``."""
        logits = self.logits(z.flatten(0, 2)).unflatten(0, z.shape[:3])
        pixels = x.unsqueeze(2).expand_as(logits)
        return -F.binary_cross_entropy_with_logits(logits, pixels, reduction="none").flatten(3).sum(3)


class FeatureDecoder(nn.Sequential):
    """Latents to features, which end in a ReLU themselves (paper, Table 8): ``[n, d]`` to ``[n, features]``.

    Args:
        calibrated: the Gaussian's variance is the mean squared error of what is decoded at a time (paper, App. B.2,
            after Rybkin et al. 2020); False: the log-likelihood is minus the sum of squared errors (reference code).
    """

    def __init__(self, features=256, latent=64, *, calibrated=False, generator: torch.Generator | None = None):
        widths = [latent, 2 * features, 2 * features, features]
        super().__init__(
            *(f for a, b in zip(widths, widths[1:]) for f in (_linear(a, b, generator), nn.ReLU(inplace=True)))
        )
        self.latent, self.calibrated = latent, calibrated

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x | z), ``[T, M, N]``, of features ``[T, M, features]`` under samples ``[T, M, N, d]``."""
        error = (self(z) - x.unsqueeze(2)).square().sum(3)
        if not self.calibrated:
            return -error
        width = x.shape[2]
        variance = error.detach().mean() / width  # its own gradient is zero at the optimum
        return -(error / variance + width * (variance.log() + LOG_2PI)) / 2


def _uniform(shape: tuple[int, ...], fan: int, generator: torch.Generator | None) -> Tensor:
    """U(-1/sqrt(fan), 1/sqrt(fan)): what PyTorch gives a new layer, from a generator of our own."""
    return torch.empty(shape).uniform_(-(fan**-0.5), fan**-0.5, generator=generator)


def _linear(inputs: int, outputs: int, generator: torch.Generator | None) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    layer.weight.data, layer.bias.data = (_uniform(p.shape, inputs, generator) for p in layer.parameters())
    return layer
