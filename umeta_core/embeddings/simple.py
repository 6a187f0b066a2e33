"""Two controls that cost nothing: whitened principal components of the pixels, and a network that nobody trained.

Neither is in CACTUs. What an embedding does not do better than these it has not learned.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..data import as_floats
from ..networks import Conv4
from .base import Embedding

_DONE = {"epoch": [], "seconds": 0.0}  # the history of a fit without epochs


class PCAPixels(Embedding):
    """Pixels projected on their first `d` principal components, each scaled to variance 1. (eq-pca-whitening)

    ValueError: d above the number of pixels; in `fit`, not below that of the images.
    """

    def __init__(self, channels=1, size=28, d=256, generator=None):
        super().__init__()
        pixels = channels * size * size
        if d > pixels:
            raise ValueError(f"{channels}x{size}x{size} images have {pixels} pixels, fewer than d={d}; use a smaller d")
        self.d, self.takes = d, (channels, size, size)
        self.register_buffer("mean", torch.zeros(pixels))
        self.register_buffer("projection", torch.zeros(pixels, d))

    def fit(
        self, images: Tensor, *, epochs=1, batch=128, seed=0, checkpoint=None, save_every=120.0, progress=True
    ) -> dict:
        """Closed form, on at most 50,000 of the uint8 images ``[n, C, H, W]``; `epochs` plays no role.

        A `checkpoint` that exists is read instead.
        """
        self.check_images(images)
        if checkpoint and Path(checkpoint).is_file():
            self.restore(checkpoint)
            return dict(_DONE)
        generator = torch.Generator(device=images.device).manual_seed(seed)
        some = torch.randperm(len(images), generator=generator, device=images.device)[:50_000]
        if len(some) <= self.d:
            raise ValueError(f"{len(some)} images cannot span d={self.d} components; use a smaller d")
        x = as_floats(images[some]).flatten(1)
        self.mean = x.mean(0)
        x = x - self.mean
        values, vectors = torch.linalg.eigh(x.T @ x / (len(x) - 1))  # ascending
        values, vectors = values.flip(0)[: self.d].clamp_min(1e-8), vectors.flip(1)[:, : self.d]
        self.projection = vectors / values.sqrt()
        if checkpoint:
            self.save(checkpoint)
        return dict(_DONE)

    def encode(self, x: Tensor) -> Tensor:
        return (x.flatten(1) - self.mean) @ self.projection


class RandomNetwork(Embedding):
    """`Conv4` with its initial weights and convolutions of stride 2: d = 256 for 28x28 images and 64 filters.

    Batch norm takes its statistics from images of `fit`, so that `encode` sees each image alone.
    """

    def __init__(self, channels=1, size=28, filters=64, generator: torch.Generator | None = None):
        super().__init__()
        self.network = Conv4(channels, size, filters=filters, downsample="stride", generator=generator)
        self.d, self.takes = self.network.features, (channels, size, size)

    def fit(
        self, images: Tensor, *, epochs=1, batch=128, seed=0, checkpoint=None, save_every=120.0, progress=True
    ) -> dict:
        """At most 2,000 images for the statistics of batch norm; no weight moves. A `checkpoint` there is read."""
        self.check_images(images)
        if checkpoint and Path(checkpoint).is_file():
            self.restore(checkpoint)
            return dict(_DONE)
        generator = torch.Generator(device=images.device).manual_seed(seed)
        with torch.no_grad():
            some = torch.randperm(len(images), generator=generator, device=images.device)[:2000]
            self.network.embed(as_floats(images[some]), update=True, momentum=1.0)
        if checkpoint:
            self.save(checkpoint)
        return dict(_DONE)

    def encode(self, x: Tensor) -> Tensor:
        return self.network.embed(x, stats="running")
