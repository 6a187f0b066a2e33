"""ACAI: an autoencoder whose interpolations fool a critic (Berthelot, Raffel, Roy & Goodfellow, 2019)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import as_floats
from .base import Embedding

SLOPE = 0.2  # of LeakyReLU below zero
SIDE = 4  # of the last map: 32 pixels halved three times
HALVINGS = 3


def critic_loss(on_mix: Tensor, alpha: Tensor, on_blend: Tensor) -> Tensor:
    """Name the mixing weight of an interpolation, and zero for an image that is nearly real. (eq-acai-critic)

    on_mix, alpha, on_blend: ``[n]``, what the critic says to interpolations, their weights, what it says to blends.
    """
    return (on_mix - alpha).square().mean() + on_blend.square().mean()


def autoencoder_loss(x: Tensor, again: Tensor, on_mix: Tensor, weight: float) -> Tensor:
    """Reconstruct, and let the critic take interpolations for real images. (eq-acai-autoencoder)

    The squared error is a mean over pixels (reference code; the paper writes a sum).
    """
    return F.mse_loss(again, x) + weight * on_mix.square().mean()


class ACAI(Embedding):
    """The encoder's output, 16 maps of 4x4 = 256 numbers (CACTUs, App. E.4: MNIST and Omniglot).

    All settings are those of the authors' code for MNIST with 256 numbers, which trains on 2**24 images in batches of
    64; CACTUs does not say how long it trained. Before clustering CACTUs whitens the vectors of MNIST (App. D).

    A step takes 0.16 s on one CPU core: an epoch of Omniglot's 22,000 images one minute, 2**24 images half a day.

    Args:
        channels, size: of the square images; 28 pixels are padded with zeros to 32 (CACTUs, App. E.4), 32 stay.
        depth: filters at full size, doubled at each halving.
        latent: maps of the code, so d = 16 * latent.
        weight: of the critic's answers in the autoencoder's loss.
        reg: share of the image itself in the blends that the critic should call real.
        lr: of Adam, for the autoencoder and for the critic.
        generator: source of the initial weights.

    Raises:
        ValueError: images of another size than 28 or 32.
    """

    encoder_parts = ("encoder.",)

    def __init__(
        self, channels=1, size=28, *, depth=16, latent=16, weight=0.5, reg=0.2, lr=1e-4,
        generator: torch.Generator | None = None,
    ):  # fmt: skip
        super().__init__()
        if size not in (28, 32):
            raise ValueError(f"ACAI takes images of 28x28 or 32x32, not {size}x{size}; load them with size=32")
        self.takes, self.size, self.latent, self.d = (channels, size, size), size, latent, latent * SIDE**2
        self.weight, self.reg, self.lr, self.margin = weight, reg, lr, (32 - size) // 2
        self.encoder = encoder(channels, depth, latent)
        self.decoder = decoder(channels, depth, latent)
        self.critic = encoder(channels, depth, latent)
        initialize(self, generator)
        self.to(memory_format=torch.channels_last)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Adam for the autoencoder, Adam for the critic."""
        return [torch.optim.Adam(p, lr=self.lr, fused=True) for p in (self._autoencoder(), self._critic())]

    def step(self, images: Tensor, index: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Both players move at once, from the same forward pass."""
        x = self._pad(as_floats(images[index]))
        alpha = torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device) / 2
        autoencoder, critic, losses = self.losses(x, alpha)
        for optimizer in self.opt:
            optimizer.zero_grad(set_to_none=True)
        autoencoder.backward(inputs=self._autoencoder(), retain_graph=True)
        critic.backward(inputs=self._critic())
        for optimizer in self.opt:
            optimizer.step()
        return losses

    def losses(self, x: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The autoencoder's loss, the critic's, and what to report, of padded images x and weights alpha in [0, 1/2].

        Image i is mixed with image n-1-i: weight alpha for itself, 1 - alpha for the partner (reference code). The
        critic's answers to the mixtures serve both losses, so each may only be differentiated for its own player.
        """
        z = self.encoder(x)
        again, mix = self.decoder(torch.cat([z, torch.lerp(z.flip(0), z, alpha)])).chunk(2)
        on_mix = self.judge(mix)
        on_blend = self.judge(torch.lerp(again, x, self.reg).detach())
        autoencoder = autoencoder_loss(x, again, on_mix, self.weight)
        critic = critic_loss(on_mix, alpha.flatten(), on_blend)
        report = {"reconstruction": F.mse_loss(again, x), "autoencoder": autoencoder, "critic": critic}
        return autoencoder, critic, report

    def judge(self, x: Tensor) -> Tensor:
        """What the critic says ``[n]``: the mean of its code."""
        return self.critic(x).mean((1, 2, 3))

    def encode(self, x: Tensor) -> Tensor:
        """Codes ``[n, d]`` of images ``[n, C, H, W]`` in [0, 1]."""
        return self.encoder(self._pad(x)).flatten(1)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Images ``[n, C, H, W]`` in [0, 1] of codes ``[n, d]``."""
        code = z.unflatten(1, (self.latent, SIDE, SIDE)).contiguous(memory_format=torch.channels_last)
        margin, end = self.margin, self.margin + self.size
        return self.decoder(code).add(1).div(2).clamp(0, 1)[:, :, margin:end, margin:end]

    @torch.no_grad()
    def interpolate(self, x1: Tensor, x2: Tensor, alphas: Tensor) -> Tensor:
        """Images ``[n, len(alphas), C, H, W]`` in [0, 1] on the way from uint8 images x1 (alpha 0) to x2 (alpha 1)."""
        z1, z2 = self.embed(x1).unsqueeze(1), self.embed(x2).unsqueeze(1)
        z = torch.lerp(z1, z2, torch.as_tensor(alphas, dtype=z1.dtype, device=z1.device).view(1, -1, 1))
        return self.decode(z.flatten(0, 1)).unflatten(0, z.shape[:2])

    def _pad(self, x: Tensor) -> Tensor:
        """Images in [0, 1] as the networks see them: 32x32 in [-1, 1]; the margin is -1, as black as a drawing's."""
        self.check_shape(x)
        return (F.pad(x, [self.margin] * 4) * 2 - 1).contiguous(memory_format=torch.channels_last)

    def _autoencoder(self) -> list[nn.Parameter]:
        return [*self.encoder.parameters(), *self.decoder.parameters()]

    def _critic(self) -> list[nn.Parameter]:
        return list(self.critic.parameters())


def encoder(channels: int, depth: int, latent: int) -> nn.Sequential:
    """``[n, channels, 32, 32] -> [n, latent, 4, 4]``; the first and the last convolution have no activation."""
    layers, c = [nn.Conv2d(channels, depth, 1)], depth
    for halving in range(HALVINGS):
        layers += [*convolution(c, depth << halving), *convolution(depth << halving, depth << halving), nn.AvgPool2d(2)]
        c = depth << halving
    return nn.Sequential(*layers, *convolution(c, 2 * c), nn.Conv2d(2 * c, latent, 3, padding=1))


def decoder(channels: int, depth: int, latent: int) -> nn.Sequential:
    """``[n, latent, 4, 4] -> [n, channels, 32, 32]``, about [-1, 1]; enlarges by repeating pixels."""
    layers, c = [], latent
    for halving in reversed(range(HALVINGS)):
        layers += [*convolution(c, depth << halving), *convolution(depth << halving, depth << halving),
                   nn.Upsample(scale_factor=2)]  # fmt: skip
        c = depth << halving
    return nn.Sequential(*layers, *convolution(c, depth), nn.Conv2d(depth, channels, 3, padding=1))


def convolution(c_in: int, c_out: int) -> list[nn.Module]:
    return [nn.Conv2d(c_in, c_out, 3, padding=1), nn.LeakyReLU(SLOPE, inplace=True)]


def initialize(network: nn.Module, generator: torch.Generator | None) -> None:
    """N(0, 1 / ((1 + slope^2) fan_in)), half the variance of He's; biases zero (reference code, not in the paper)."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            fan_in = math.prod(layer.weight.shape[1:])
            nn.init.normal_(layer.weight, std=((1 + SLOPE**2) * fan_in) ** -0.5, generator=generator)
            nn.init.zeros_(layer.bias)
