"""VGG-19 trained on ImageNet with labels: what transfer learning gives, the rival that needs no meta-learning."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import IMAGENET_MEAN, IMAGENET_STD, Embedding


class VGG19(Embedding):
    """The flattened last map of torchvision's VGG-19: d = 25,088 for images enlarged to 224x224 (LASIUM, section 4).

    LASIUM's code has Keras' weights, whose pixels are centered and not scaled: other features than these.

    A drawing's gray takes all three colors. `fit` does nothing; torchvision downloads the weights (550 MB) once.

    Args:
        channels, size: of the square images.
        input: pixels that images are resized to, bilinearly.
        weights: name of torchvision's weights; None: untrained.

    Raises:
        FileNotFoundError: the weights are not there and cannot be downloaded.
    """

    def __init__(self, channels=3, size=84, *, input=224, weights: str | None = "IMAGENET1K_V1", generator=None):
        super().__init__()
        from torchvision.models import VGG19_Weights, vgg19

        weights = weights and VGG19_Weights[weights]
        try:
            network = vgg19(weights=weights)
        except OSError as error:
            file = weights.url.rsplit("/", 1)[1]
            raise FileNotFoundError(
                f"the weights of VGG-19 could not be downloaded ({error}); put {weights.url} into "
                f"{torch.hub.get_dir()}/checkpoints/{file}"
            ) from None
        self.network, self.input = network.features, input
        if weights is None:
            for layer in self.network:
                if isinstance(layer, torch.nn.Conv2d):
                    torch.nn.init.kaiming_normal_(layer.weight, mode="fan_out", generator=generator)
        self.d = 512 * (input // 32) ** 2
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1))
        self.eval()

    def fit(self, images: Tensor | None = None, **settings) -> dict:
        """Nothing to do."""
        return {"epoch": [], "seconds": 0.0}

    def encode(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, (self.input, self.input), mode="bilinear", antialias=True).expand(-1, 3, -1, -1)
        return self.network((x - self.mean) / self.std).flatten(1)

    def embed(self, images: Tensor, chunk: int = 32) -> Tensor:
        return super().embed(images, chunk)
