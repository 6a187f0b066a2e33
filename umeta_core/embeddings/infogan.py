"""InfoGAN: a GAN whose generator must keep a short code readable (Chen, Duan, Houthooft, Schulman et al., 2016)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import as_floats
from ..networks import truncated_normal_
from .base import Embedding

SLOPE = 0.01  # of LeakyReLU below zero (reference code; the paper says 0.1)
STD = 0.02  # of initial weights


def information(c: Tensor, q: Tensor, categories: int) -> Tensor:
    """Lower bound on the mutual information of code and image, nats: ``H(c) + E[log q(c | x)]``. (eq-infogan)

    Args:
        c: codes ``[n, categories + m]`` of n images: one-hot category, then m numbers drawn from U(-1, 1).
        q: what the recognition network reads from those images, same shape: logits of the category, then the means of
            m Gaussians of variance 1 (reference code, not in the paper; a learned variance would give a tighter bound).

    The authors' code reports another constant: it takes the density of N(0, 1) for that of U(-1, 1).
    """
    category = (c[:, :categories] * q[:, :categories].log_softmax(1)).sum(1)
    numbers = -0.5 * (c[:, categories:] - q[:, categories:]).square() - 0.5 * math.log(2 * math.pi)
    entropy = math.log(categories) + numbers.shape[1] * math.log(2)
    return entropy + (category + numbers.sum(1)).mean()


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """``-log D(x) - log(1 - D(G(z)))`` from logits ``[n]``, averaged."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def generator_loss(fake: Tensor) -> Tensor:
    """``-log D(G(z))`` from logits ``[n]``, averaged."""
    return F.softplus(-fake).mean()


class InfoGAN(Embedding):
    """What the recognition network reads from an image: d = 12 (CACTUs, App. E.4: MNIST only).

    Networks and settings are those of the authors' code for MNIST, which runs 50 epochs of 100 updates with 128 images.
    An update takes 0.31 s on one CPU core, all of them half an hour.

    Args:
        channels, size: of the square images; size a multiple of 4.
        categories, numbers: parts of the code: one category out of so many, and so many numbers in [-1, 1].
        noise: further inputs of the generator, U(-1, 1).
        lr: of Adam (beta1 0.5) for the discriminator and the generator.
        weight: of the information in both losses.
        per_epoch: images in an epoch.
        logits: embed categories as logits; otherwise as probabilities. May be set later. (CACTUs' code reads an array
            called "Z_raw"; the paper does not say.)
        generator: source of the initial weights.

    Raises:
        ValueError: images whose size is not a multiple of 4.
    """

    def __init__(
        self, channels=1, size=28, *, categories=10, numbers=2, noise=62, lr=(2e-4, 1e-3), weight=1.0,
        per_epoch=12_800, logits=False, generator: torch.Generator | None = None,
    ):  # fmt: skip
        super().__init__()
        if size % 4:
            raise ValueError(f"InfoGAN takes images of a size divisible by 4, not {size}x{size}; load them resized")
        self.takes, self.d = (channels, size, size), categories + numbers
        self.categories, self.numbers, self.noise = categories, numbers, noise
        self.lr, self.weight, self.per_epoch, self.logits = lr, weight, per_epoch, logits
        self.discriminator = Discriminator(channels, size, self.d)
        self.generator = Generator(noise + self.d, channels, size)
        initialize(self, generator)
        self.to(memory_format=torch.channels_last)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Adam for the discriminator with the recognition network, Adam for the generator."""
        return [
            torch.optim.Adam(network.parameters(), lr=lr, betas=(0.5, 0.999), fused=True)
            for network, lr in zip((self.discriminator, self.generator), self.lr)
        ]

    def start_epoch(self, images: Tensor, epoch: int, epochs: int, generator: torch.Generator) -> Tensor:
        """`per_epoch` images in random order; none comes again before all were shown."""
        rounds = -(-self.per_epoch // len(images))
        orders = [torch.randperm(len(images), generator=generator, device=images.device) for _ in range(rounds)]
        return torch.cat(orders)[: self.per_epoch]

    def step(self, images: Tensor, index: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """The discriminator moves, then the generator against the new discriminator, with new codes."""
        x = as_floats(images[index]).contiguous(memory_format=torch.channels_last)
        noise, c = self.draw(len(x), generator)
        seeing = self.see_through(x, noise, c)
        self.move(self.opt[0], seeing, self.discriminator)
        noise, c = self.draw(len(x), generator)
        deceiving, bound = self.deceive(noise, c)
        self.move(self.opt[1], deceiving, self.generator)
        return {"discriminator": seeing, "generator": deceiving, "information": bound}

    def see_through(self, x: Tensor, noise: Tensor, c: Tensor) -> Tensor:
        """Loss of the discriminator and the recognition network on images x in [0, 1] and as many generated ones.

        Real and generated images pass separately, each normalized by its own statistics. Those of the real images go
        into the averages that `embed` uses.
        """
        with torch.no_grad():
            fake = self.generator(noise, c)
        real, _ = self.discriminator(x, "update")
        fake, q = self.discriminator(fake)
        return discriminator_loss(real, fake) - self.weight * information(c, q, self.categories)

    def deceive(self, noise: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of the generator, and the information (nats)."""
        fake, q = self.discriminator(self.generator(noise, c, "update"))
        bound = information(c, q, self.categories)
        return generator_loss(fake) - self.weight * bound, bound

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Noise ``[n, noise]`` and codes ``[n, d]``: one-hot category, then numbers from U(-1, 1)."""
        device = generator.device
        uniform = torch.rand(n, self.noise + self.numbers, generator=generator, device=device) * 2 - 1
        category = torch.randint(self.categories, (n,), generator=generator, device=device)
        one_hot = F.one_hot(category, self.categories).to(uniform.dtype)
        return uniform[:, : self.noise], torch.cat([one_hot, uniform[:, self.noise :]], 1)

    def encode(self, x: Tensor) -> Tensor:
        """What is read from images ``[n, C, H, W]`` in [0, 1]: ``[n, d]``, categories first, then numbers."""
        self.check_shape(x)
        q = self.discriminator(x.contiguous(memory_format=torch.channels_last), "running")[1]
        category = q[:, : self.categories]
        return torch.cat([category if self.logits else category.softmax(1), q[:, self.categories :]], 1)

    @torch.no_grad()
    def generate(self, noise: Tensor, c: Tensor) -> Tensor:
        """Images ``[n, C, H, W]`` in [0, 1] of noise ``[n, noise]`` and codes ``[n, d]``, each on its own."""
        return self.generator(noise, c, "running")

    def traverse(self, part: int, values: list[float], noise: Tensor, c: Tensor) -> Tensor:
        """Images ``[n, len(values), C, H, W]`` where one part of the code takes each of `values`, the rest is fixed.

        part: 0 for the category (values 0, 1, ...), j for the j-th number (values in [-1, 1] were seen in training).
        ValueError: the code has no such part.
        """
        if not 0 <= part <= self.numbers:
            raise ValueError(f"part {part} of a code of one category (0) and {self.numbers} numbers (1, ...)")
        c = c.unsqueeze(1).repeat(1, len(values), 1)
        if part == 0:
            chosen = torch.as_tensor(values, device=c.device, dtype=torch.long)
            c[..., : self.categories] = F.one_hot(chosen, self.categories).to(c.dtype)
        else:
            c[..., self.categories + part - 1] = torch.as_tensor(values, device=c.device, dtype=c.dtype)
        noise = noise.unsqueeze(1).expand(-1, len(values), -1)
        return self.generate(noise.flatten(0, 1), c.flatten(0, 1)).unflatten(0, c.shape[:2])


class Discriminator(nn.Module):
    """One trunk, two heads: is the image real, and which code made it (the recognition network)."""

    def __init__(self, channels: int, size: int, d: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 64, 4, stride=2, padding=1)
        self.conv2, self.norm2 = nn.Conv2d(64, 128, 4, stride=2, padding=1, bias=False), BatchNorm(128)
        # Fully connected, written as a filter as large as its map: half the time on a CPU.
        self.full, self.norm3 = nn.Conv2d(128, 1024, size // 4, bias=False), BatchNorm(1024)
        self.real = nn.Linear(1024, 1)
        self.read, self.norm4 = nn.Linear(1024, 128, bias=False), BatchNorm(128)
        self.code = nn.Linear(128, d)

    def forward(self, x: Tensor, stats: str = "batch") -> tuple[Tensor, Tensor]:
        """Logits ``[n]`` of being real and the code ``[n, d]`` of images ``[n, C, H, W]``; stats as in `BatchNorm`."""
        x = F.leaky_relu(self.conv1(x), SLOPE)
        x = F.leaky_relu(self.norm2(self.conv2(x), stats), SLOPE)
        x = F.leaky_relu(self.norm3(self.full(x).flatten(1), stats), SLOPE)
        return self.real(x).squeeze(1), self.code(F.leaky_relu(self.norm4(self.read(x), stats), SLOPE))


class Generator(nn.Module):
    """Noise and code -> image."""

    def __init__(self, inputs: int, channels: int, size: int):
        super().__init__()
        self.side = size // 4
        self.full1, self.norm1 = nn.Linear(inputs, 1024, bias=False), BatchNorm(1024)
        self.full2, self.norm2 = nn.Linear(1024, 128 * self.side**2, bias=False), BatchNorm(128 * self.side**2)
        self.conv3, self.norm3 = nn.ConvTranspose2d(128, 64, 4, stride=2, padding=1, bias=False), BatchNorm(64)
        self.conv4 = nn.ConvTranspose2d(64, channels, 4, stride=2, padding=1)

    def forward(self, noise: Tensor, c: Tensor, stats: str = "batch") -> Tensor:
        """Images ``[n, C, H, W]`` in (0, 1); stats as in `BatchNorm`."""
        x = F.relu(self.norm1(self.full1(torch.cat([noise, c], 1)), stats))
        x = F.relu(self.norm2(self.full2(x), stats)).unflatten(1, (128, self.side, self.side))
        x = F.relu(self.norm3(self.conv3(x.contiguous(memory_format=torch.channels_last)), stats))
        return self.conv4(x).sigmoid()


class BatchNorm(nn.Module):
    """Batch norm that is told which statistics to use, as real and generated images take turns.

    stats: "batch" for those of x, "update" to add them to the averages too, "running" for the averages.
    """

    def __init__(self, features: int):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(features)), nn.Parameter(torch.zeros(features))
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("var", torch.ones(features))

    def forward(self, x: Tensor, stats: str) -> Tensor:
        averages = (None, None) if stats == "batch" else (self.mean, self.var)
        return F.batch_norm(x, *averages, self.scale, self.shift, training=stats != "running", momentum=0.1, eps=1e-5)


def initialize(network: nn.Module, generator: torch.Generator | None) -> None:
    """Weights N(0, 0.02^2), cut at two deviations in convolutions; scales of batch norm N(1, 0.02^2); biases zero."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d) and layer.stride == (2, 2):
            truncated_normal_(layer.weight, STD, generator)
        elif isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(layer.weight, std=STD, generator=generator)
        elif isinstance(layer, BatchNorm):
            nn.init.normal_(layer.scale, 1, STD, generator=generator)
        if getattr(layer, "bias", None) is not None:
            nn.init.zeros_(layer.bias)
