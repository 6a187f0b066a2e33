"""Bidirectional GAN (Donahue et al., 2017): a generator, its inverse, and a discriminator that judges the pair.

Facts that the papers leave out are from the authors' code: batch norm has neither scale nor shift, no layer has a
bias, the noise enters every hidden layer of the generator, and all three networks move in one simultaneous step.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import as_floats
from .base import Embedding


class BiGAN(Embedding):
    """Fully connected BiGAN for small images (CACTUs, App. E.4: MNIST with d = 50, Omniglot with d = 200).

    Args:
        channels, size: of the square images.
        d: numbers in a code; z is uniform on [-1, 1]^d.
        hidden: units per hidden layer.
        lr, decay: of Adam (beta1 = 0.5); decay is L2. The rate is constant for the first half of the epochs and falls
            exponentially to 1 % in the second (reference code, not in the paper).
        logits: `encode` returns the encoder's last layer before its squashing to [-1, 1], as the authors' nearest-
            neighbor evaluation does.
        generator: source of the initial weights, N(0, 0.02^2).
    """

    encoder_parts = ("e.",)

    def __init__(
        self, channels=1, size=28, d=200, *, hidden=1024, lr=2e-4, decay=2.5e-5, logits=False,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.shape, self.d, self.logits, self.lr, self.decay = (channels, size, size), d, logits, lr, decay
        self.takes = self.shape
        pixels = channels * size * size
        self.g = nn.ModuleList([_linear(d, hidden), _linear(hidden, hidden), _linear(d, hidden),
                                _linear(hidden, pixels), *_norms(2, hidden)])  # fmt: skip
        self.e = nn.ModuleList([_linear(pixels, hidden), _linear(hidden, hidden), _linear(hidden, d),
                                *_norms(1, hidden)])  # fmt: skip
        self.dis = nn.ModuleList([_linear(pixels, hidden), _linear(hidden, hidden), _linear(d, hidden),
                                  _linear(hidden, 1), *_norms(1, hidden)])  # fmt: skip
        for p in self.parameters():
            nn.init.normal_(p, std=0.02, generator=generator)

    def generate(self, z: Tensor) -> Tensor:
        """Images ``[n, C, H, W]`` in [0, 1] from codes ``[n, d]`` in [-1, 1]."""
        first, second, skip, last, norm1, norm2 = self.g
        h = F.relu(norm1(first(z)))
        h = F.relu(norm2(second(h) + skip(z)))
        return torch.sigmoid(last(h)).unflatten(1, self.shape)

    def _encoder(self, x: Tensor) -> Tensor:
        """The last layer ``[n, d]`` before its squashing."""
        first, second, last, norm = self.e
        return last(_leaky(norm(second(_leaky(first(x.flatten(1)))))))

    def encode(self, x: Tensor) -> Tensor:
        """Codes ``[n, d]``, in [-1, 1] unless `logits`, of images ``[n, C, H, W]`` in [0, 1]."""
        logits = self._encoder(x)
        return logits if self.logits else squash(logits)

    def discriminate(self, x: Tensor, z: Tensor) -> Tensor:
        """Logits ``[n]``: is the pair an image with its code (positive), or a code with its image?"""
        first, second, skip, last, norm = self.dis
        return last(_leaky(norm(second(_leaky(first(x.flatten(1)))) + skip(z)))).squeeze(1)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """One for the discriminator, one for generator and encoder together."""
        both = [*self.g.parameters(), *self.e.parameters()]
        return [torch.optim.Adam(p, lr=self.lr, betas=(0.5, 0.999), weight_decay=self.decay, fused=True)
                for p in (list(self.dis.parameters()), both)]  # fmt: skip

    def start_epoch(self, images, epoch, epochs, generator):
        half = epochs / 2
        factor = 0.01 ** max(0.0, (epoch - half) / half)
        for optimizer in self.opt:
            optimizer.param_groups[0]["lr"] = self.lr * factor
        return super().start_epoch(images, epoch, epochs, generator)

    def _views(self, x: Tensor, generator) -> Tensor:
        """What a training step sees of images ``[n, C, H, W]``."""
        return x

    def step(self, images, index, generator) -> dict[str, Tensor]:
        """Both losses at the same weights, then both updates: what the authors call updating both."""
        x = self._views(as_floats(images[index]), generator)
        z = torch.rand(len(x), self.d, generator=generator, device=x.device).mul_(2).sub_(1)
        made, code = self.generate(z), squash(self._encoder(x))
        theirs, ours = bigan_losses(self.discriminate(x, code), self.discriminate(made, z))
        judge, players = self.opt
        players.zero_grad()
        ours.backward(inputs=[*self.g.parameters(), *self.e.parameters()], retain_graph=True)
        judge.zero_grad()
        theirs.backward(inputs=list(self.dis.parameters()))
        players.step()
        judge.step()
        return {"discriminator": theirs, "generator": ours}


class ConvBiGAN(BiGAN):
    """Convolutional BiGAN on random 64x64 crops (CACTUs, App. E.4: mini-ImageNet and CelebA with d = 200).

    Generator and discriminator are DCGAN-like, the encoder AlexNet-like; z enters every hidden layer of the generator
    and of the discriminator; batch norm has scale and shift; pixels are in [-1, 1] inside (reference code).

    Args:
        width: channels of the first convolution of the discriminator, 64 in the authors' script; others in proportion.
        crop: height and width of the crops, a multiple of 16.

    Raises:
        ValueError: images smaller than the crops.
    """

    def __init__(
        self, channels=3, size=84, d=200, *, width=64, crop=64, lr=2e-4, decay=2.5e-5, logits=False,
        generator: torch.Generator | None = None,
    ):
        Embedding.__init__(self)
        if size < crop:
            raise ValueError(f"{size}x{size} images are smaller than the {crop}x{crop} crops; load them larger")
        self.shape, self.d, self.logits, self.lr, self.decay = (channels, crop, crop), d, logits, lr, decay
        self.takes = (channels, size, size)
        w, self.crop, self.side = width, crop, crop // 16
        widths = [8 * w, 4 * w, 2 * w, w]
        self.g = nn.ModuleDict({
            "first": _linear(d, 8 * w * self.side**2),
            "up": nn.ModuleList(nn.ConvTranspose2d(i, o, 5, 2, 2, 1, bias=False)
                                for i, o in zip(widths, [*widths[1:], channels])),
            "skip": nn.ModuleList(_linear(d, o) for o in widths[1:]),
            "norm": nn.ModuleList([nn.BatchNorm1d(8 * w * self.side**2), *(nn.BatchNorm2d(o) for o in widths[1:])]),
        })  # fmt: skip
        self.dis = nn.ModuleDict({
            "down": nn.ModuleList(nn.Conv2d(i, o, 5, 2, 2, bias=False)
                                  for i, o in zip([channels, *widths[:0:-1]], widths[::-1])),
            "skip": nn.ModuleList(_linear(d, o) for o in widths[2::-1]),
            "norm": nn.ModuleList(nn.BatchNorm2d(o) for o in widths[2::-1]),
            "last": _linear(8 * w * self.side**2, 1),
        })  # fmt: skip
        c = [3 * w // 2, 4 * w, 6 * w, 6 * w, 4 * w]  # AlexNet's 96, 256, 384, 384, 256
        self.e = nn.ModuleDict({
            "conv": nn.ModuleList([
                nn.Conv2d(channels, c[0], 11, 4, 5, bias=False), nn.Conv2d(c[0], c[1], 5, 1, 2, groups=2, bias=False),
                nn.Conv2d(c[1], c[2], 3, 1, 1, bias=False), nn.Conv2d(c[2], c[3], 3, 1, 1, groups=2, bias=False),
                nn.Conv2d(c[3], c[4], 3, 1, 1, groups=2, bias=False)]),
            "norm": nn.ModuleList(nn.BatchNorm2d(o) for o in c[1:]),
            "last": _linear(c[4] * self.side**2, d),
        })  # fmt: skip
        for p in self.parameters():
            if p.dim() > 1:  # scales start at 1, shifts at 0
                nn.init.normal_(p, std=0.02, generator=generator)

    def generate(self, z: Tensor) -> Tensor:
        g = self.g
        h = F.relu(g["norm"][0](g["first"](z))).unflatten(1, (-1, self.side, self.side))
        for up, skip, norm in zip(g["up"], g["skip"], g["norm"][1:]):
            h = F.relu(norm(up(h) + skip(z)[:, :, None, None]))
        return torch.sigmoid(g["up"][-1](h))

    def discriminate(self, x: Tensor, z: Tensor) -> Tensor:
        d = self.dis
        h = _leaky(d["down"][0](2 * x - 1))
        for down, skip, norm in zip(d["down"][1:], d["skip"], d["norm"]):
            h = _leaky(norm(down(h) + skip(z)[:, :, None, None]))
        return d["last"](h.flatten(1)).squeeze(1)

    def _encoder(self, x: Tensor) -> Tensor:
        conv, norm = self.e["conv"], self.e["norm"]
        h = F.max_pool2d(_leaky(conv[0](2 * self._center(x) - 1)), 3, 2, 1)
        h = F.max_pool2d(_leaky(norm[0](conv[1](h))), 3, 2, 1)
        for layer, n in zip(conv[2:], norm[1:]):
            h = _leaky(n(layer(h)))
        return self.e["last"](h.flatten(1))

    def _center(self, x: Tensor) -> Tensor:
        edge = (x.shape[2] - self.crop) // 2
        return x[:, :, edge : edge + self.crop, edge : edge + self.crop]

    def _views(self, x: Tensor, generator) -> Tensor:
        """A random crop of each image."""
        corner = torch.randint(x.shape[2] - self.crop + 1, (2, len(x), 1), generator=generator, device=x.device)
        rows, columns = corner + torch.arange(self.crop, device=x.device)  # [n, crop] each
        each = torch.arange(len(x), device=x.device).view(-1, 1, 1)
        return x[each, :, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)


def bigan_losses(real: Tensor, made: Tensor) -> tuple[Tensor, Tensor]:
    """Discriminator loss, and generator-and-encoder loss, from logits of (x, E(x)) and of (G(z), z). (eq-bigan)

    The second is the first with the labels exchanged, not its negative: its gradient does not vanish where the
    discriminator is sure (Donahue et al., 2017, section 3.4).
    """
    theirs = F.softplus(-real).mean() + F.softplus(made).mean()
    ours = F.softplus(real).mean() + F.softplus(-made).mean()
    return theirs / 2, ours / 2


def squash(logits: Tensor) -> Tensor:
    """To [-1, 1], the range of z: 2 sigmoid(a) - 1 (reference code, not in the paper)."""
    return torch.tanh(logits / 2)


def _linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


def _norms(how_many: int, features: int) -> list[nn.BatchNorm1d]:
    return [nn.BatchNorm1d(features, affine=False) for _ in range(how_many)]


def _leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2)
