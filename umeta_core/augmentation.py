"""Augmented copies of images, in batches, and the tasks that UMTRA makes of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .data import ImageSet, as_floats
from .episodes import Episodes, sample_without_replacement


def shift(x: Tensor, right: Tensor, down: Tensor, fill: float) -> Tensor:
    """Move each image by whole pixels; what enters at the border has the value `fill`.

    Args:
        x: ``[n, C, H, W]`` of any type; right, down: int64 ``[n]``, negative for left and up.
    """
    (n, channels, height, width), device = x.shape, x.device
    row = torch.arange(height, device=device) - down.view(-1, 1)
    column = torch.arange(width, device=device) - right.view(-1, 1)
    outside = ((row < 0) | (row >= height)).unsqueeze(2) | ((column < 0) | (column >= width)).unsqueeze(1)
    place = row.clamp(0, height - 1).unsqueeze(2) * width + column.clamp(0, width - 1).unsqueeze(1)
    moved = x.flatten(2).gather(2, place.view(n, 1, -1).expand(-1, channels, -1)).view(x.shape)
    return moved.masked_fill_(outside.unsqueeze(1), fill)


def zero_out(x: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Set each pixel of ``[n, C, H, W]``, all its channels, to 0 with probability `share`."""
    n, _, height, width = x.shape
    return x * (torch.rand(n, 1, height, width, generator=generator, device=x.device) >= share)


def umtra_drawings(x: Tensor, generator: torch.Generator, reach: float = 6, zeroed: float = 0.5) -> Tensor:
    """UMTRA's recipe for Omniglot: pixels set to 0, then a shift of up to `reach` pixels each way, filled with 0.

    The constants are the authors' (``models/umtra/umtra.py`` of MetaLearning-TF2.0): each pixel is zeroed with
    probability 1/2, and the shift is U(-6, 6) rounded to whole pixels. Images with ink = 255 on 0, as there.
    """
    offset = (torch.rand(2, len(x), generator=generator, device=x.device) * 2 - 1).mul(reach).round().long()
    return shift(zero_out(x, zeroed, generator), *offset, fill=0)


def auto_augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """torchvision's AutoAugment (Cubuk et al., 2019) of uint8 images ``[n, C, H, W]``: UMTRA's on mini-ImageNet.

    The policy is ImageNet's, drawn anew for each image. The library takes its random numbers from torch's global CPU
    generator, which is seeded from `generator` for the time being and restored. It works on the CPU, image by image.
    """
    from torchvision.transforms import AutoAugment, AutoAugmentPolicy

    augment = AutoAugment(AutoAugmentPolicy.IMAGENET)
    seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return torch.stack([augment(image) for image in x.cpu()]).to(x.device)


class AugmentedTasks:
    """UMTRA (Khodadadeh et al., 2019): N random images are N classes; the queries are augmented copies of them.

    Two of the N images may show the same thing; with many classes that is rare.

    Args:
        augment: maps uint8 images ``[n, C, H, W]`` and a generator to changed ones, for example `umtra_drawings` or
            `auto_augment`.
        embed: maps uint8 images ``[n, C, H, W]`` to vectors ``[n, d]``, which the episodes show instead of the images
            (Meta-GMVAE, Table 10).
    """

    def __init__(
        self, images: ImageSet, augment: Callable[[Tensor, torch.Generator], Tensor] = umtra_drawings,
        embed: Callable[[Tensor], Tensor] | None = None,
    ):  # fmt: skip
        self.images, self.augment, self.embed = images, augment, embed

    def sample(self, tasks: int, way: int, shot: int, query: int, generator: torch.Generator) -> Episodes:
        """Draw `tasks` N-way 1-shot episodes; the support is the image itself, each query a copy of its own.

        Raises:
            ValueError: a shot other than 1, or more classes than images.
        """
        if shot != 1:
            raise ValueError(f"a class of UMTRA has 1 support image, not {shot}; train with shot=1")
        if way > len(self.images):
            raise ValueError(
                f"{way}-way tasks need {way} images; {self.images.name} {self.images.split} has {len(self.images)}"
            )
        count = torch.full((tasks,), len(self.images), device=generator.device)
        index = sample_without_replacement(count, way, generator)  # [T, N]
        pixels = self.images.images
        x = pixels[index.to(pixels.device)].to(index.device)
        copies = self.augment(x.flatten(0, 1).repeat_interleave(query, 0), generator)
        if self.embed is None:
            support, copies = as_floats(x), as_floats(copies)
        else:
            support, copies = self.embed(x.flatten(0, 1)).unflatten(0, (tasks, way)), self.embed(copies)
        return Episodes(support.unsqueeze(2), copies.unflatten(0, (tasks, way, query)))
