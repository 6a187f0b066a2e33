"""SimCLR: two views of an image should have vectors that find each other among all others (Chen et al., 2020).

The variant whose features Meta-GMVAE uses on mini-ImageNet (App. B; what the paper leaves out is from its code).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import one_of
from ..data import as_floats
from ..networks import glorot_uniform
from .base import IMAGENET_MEAN, IMAGENET_STD, Embedding
from .supervised import distort, look, random_boxes

LAYERS, FILTERS, PROJECTED = 5, 64, 128
SCHEDULES = ("released", "cosine", "constant")
_WARM, _HALF_PERIOD = 10, 75  # epochs


class SimCLR(Embedding):
    """Five convolutions with batch norm, ReLU and max-pool; the vector is the last map, d = 256 for 84x84 images.

    Args:
        channels, size: of the square images.
        temperature: of the loss.
        lr: of Adam: 1e-3 in the released code, 1e-4 in the paper.
        schedule: of the learning rate, by epochs: "released": ten epochs at `lr`, then a cosine that reaches zero after
            75 epochs and climbs again, to `lr` after another 75, and so on; "cosine": half a period over the whole
            fit; "constant".
        normalize: colors by ImageNet's statistics (reference code, not in the paper).
        area: least share of the image that a view shows; color: strength of the color distortion, see `views`.
        autocast: bfloat16 convolutions; None: on a GPU that can (Ampere or later).
        generator: source of the initial weights, Glorot-uniform.

    Raises:
        ValueError: images too small for five halvings, or an unknown schedule.
    """

    encoder_parts = ("encoder.",)

    def __init__(
        self, channels=3, size=84, *, temperature=0.5, lr=1e-3, schedule="released", normalize=True, area=0.08,
        color=0.8, autocast: bool | None = None, generator: torch.Generator | None = None,
    ):  # fmt: skip
        super().__init__()
        if size < 2**LAYERS:
            raise ValueError(f"images of {size}x{size} are too small for {LAYERS} halvings; use at least 32x32")
        one_of("schedule", schedule, SCHEDULES)
        self.takes, self.temperature, self.lr, self.schedule = (channels, size, size), temperature, lr, schedule
        self.area, self.color, self.autocast, self.normalize = area, color, autocast, normalize and channels == 3
        self.d = FILTERS * (size // 2**LAYERS) ** 2
        maps = [channels] + [FILTERS] * LAYERS
        self.encoder = nn.Sequential(*(
            layer for a, b in zip(maps, maps[1:])
            for layer in (nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(inplace=True), nn.MaxPool2d(2))
        ), nn.Flatten())  # fmt: skip
        self.projection = nn.Sequential(nn.Linear(self.d, self.d), nn.ReLU(), nn.Linear(self.d, PROJECTED))
        for layer in self.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                layer.weight.data.copy_(glorot_uniform(layer.weight.shape, generator))
                nn.init.zeros_(layer.bias)
        self.to(memory_format=torch.channels_last)

    def encode(self, x: Tensor) -> Tensor:
        """Vectors ``[n, d]``, none of them negative, of images ``[n, C, H, W]`` in [0, 1]."""
        self.check_shape(x)
        if self.normalize:
            x = (x - x.new_tensor(IMAGENET_MEAN).view(3, 1, 1)) / x.new_tensor(IMAGENET_STD).view(3, 1, 1)
        with self.autocast_for(x):
            z = self.encoder(x.contiguous(memory_format=torch.channels_last))
        return z.float()

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Adam."""
        return [torch.optim.Adam(self.parameters(), lr=self.lr, fused=True)]

    def start_epoch(self, images: Tensor, epoch: int, epochs: int, generator: torch.Generator) -> Tensor:
        """Sets the learning rate of the epoch."""
        for group in self.opt[0].param_groups:
            group["lr"] = self.lr * rate(self.schedule, epoch, epochs)
        return super().start_epoch(images, epoch, epochs, generator)

    def step(self, images: Tensor, index: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """One update on two views of each image; "found" is how often the other view is the nearest of all."""
        x = as_floats(images[index])
        two = torch.cat([views(x, generator, self.area, self.color) for _ in range(2)])
        loss, found = contrastive_loss(self.projection(self.encode(two)), self.temperature)
        (optimizer,) = self.opt
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return {"loss": loss, "found": found}


def contrastive_loss(h: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """NT-Xent of ``[2n, d]``, whose rows i and i + n are two views of one image, and how often the other one is found.

    The mean over rows of ``-log(exp(s_ij / t) / sum_k exp(s_ik / t))``, s the cosines, j the other view, k all but i
    (Chen et al., 2020, eq. 1).
    """
    h = F.normalize(h, dim=1)
    similarity = (h @ h.T / temperature).fill_diagonal_(-math.inf)
    other = torch.arange(len(h), device=h.device).roll(len(h) // 2)
    return F.cross_entropy(similarity, other), (similarity.argmax(1) == other).float().mean()


def rate(schedule: str, epoch: int, epochs: int) -> float:
    """The learning rate in an epoch, 0, 1, ..., as a share of its start."""
    if schedule == "constant":
        return 1.0
    done = epoch / epochs if schedule == "cosine" else max(0, epoch - _WARM) / _HALF_PERIOD
    return (1 + math.cos(math.pi * done)) / 2


def views(x: Tensor, generator: torch.Generator, area=0.08, color=0.8) -> Tensor:
    """A random view of each of the images ``[n, C, H, W]`` in [0, 1], of the same size.

    A box of `area` to 1 of the image, its sides in a ratio of 3:4 to 4:3, mirrored or not; for color images, with
    probability 0.8, brightness, contrast and saturation by factors in ``1 ± color`` and the hue by up to ``color / 4``
    of the circle, and with probability 0.2 gray. (torchvision draws the order of the four anew for each image.)
    """
    n = len(x)
    x = look(x, random_boxes(n, generator, area, 4 / 3, flip=True), x.shape[2])
    if x.shape[1] != 3:
        return x
    u = torch.rand(3, n, 1, 1, 1, generator=generator, device=x.device)
    changed = turn_hue(distort(x, generator, color), (2 * u[0] - 1) * color / 4)
    x = torch.where(u[1] < 0.8, changed, x)
    gray = (x * x.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    return torch.where(u[2] < 0.2, gray, x)


def turn_hue(x: Tensor, turn: Tensor) -> Tensor:
    """Images ``[n, 3, H, W]`` in [0, 1] with their hue turned by ``[n, 1, 1, 1]``, in full circles."""
    most, where = x.max(1, keepdim=True)
    span = most - x.amin(1, keepdim=True)
    red, green, blue = x.split(1, 1)
    sixth = torch.stack([green - blue, blue - red, red - green])  # in which sixth of the circle, by the largest color
    hue = sixth.gather(0, where.unsqueeze(0))[0] / span.clamp_min(1e-8) + 2 * where
    k = (torch.tensor([5.0, 3.0, 1.0], device=x.device).view(3, 1, 1) + hue + 6 * turn) % 6
    return most - span * torch.minimum(k, 4 - k).clamp(0, 1)
