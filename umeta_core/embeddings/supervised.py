"""Features of a classifier: a wide residual network learns the meta-training classes (LEO, sec. 4.2.2 and App. B.2)."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import one_of
from ..data import as_floats
from ..wide_resnet import WideResNet
from .base import Embedding

VIEWS = ("center", "multi")


class Supervised(Embedding):
    """The averaged layer-21 activations of a WRN-28-10 that was trained to tell the meta-training classes apart.

    Unlike the other embeddings it needs labels, which `fit` gets. The paper's recipe: SGD with Nesterov momentum,
    batches of 1024, 10,000 of them for mini-ImageNet (270 epochs of 38,400 images) and 50,000 for tieredImageNet (114
    epochs, `drops` 0.4, 0.5, 0.6, 0.7, 0.8). Its augmentation is "similar to the inception pipeline", without numbers;
    those of `area`, `aspect` and `color` are ours, and its change of hue is left out.

    The test view is the central part of the image, resized to the network's input; its side is 80/92 of the image's, as
    in the pipeline that the paper follows. (The paper prints "a ratio of 82: about 85.95%".)

    WRN-28-10 needs a GPU. WRN-16-4 on 40x40 pixels (`input`) needs 50 times less arithmetic: 2 minutes of one core per
    epoch of mini-ImageNet.

    Args:
        channels, size: of the square images.
        classes: number of meta-training classes.
        depth, width, dropout, rectified: of the network; the embedding has 64 * width numbers (see `WideResNet`).
        input: height and width of the network's input, to which every view is resized on the fly.
        lr, momentum, decay: of SGD; decay is the weight of the L2 term of all parameters.
        drops: shares of the training after which the learning rate is multiplied by 0.2.
        area: least share of the image's area that a training view shows; aspect: largest ratio of its sides.
        color: largest relative change of brightness, contrast and saturation. flip: mirror half of the views.
        views: test views: "center", or "multi": that one, the four corners and the mirrors of these five, averaged.
        autocast: bfloat16 convolutions; None: on a GPU that can (Ampere or later). On a CPU with bf16
            instructions training is 1.3 to 1.6 times as fast, on others far slower.
        generator: source of the initial weights.

    Raises:
        ValueError: unknown views, or a depth or input that the network cannot have.
    """

    def __init__(
        self, channels=3, size=84, *, classes=64, depth=28, width=10, input=80, dropout=0.5, rectified=True, lr=0.1,
        momentum=0.9, decay=5e-4, drops=(0.3, 0.5, 0.7, 0.8, 0.9), area=0.35, aspect=4 / 3, color=0.4, flip=True,
        views="center", autocast: bool | None = None, generator: torch.Generator | None = None,
    ):
        super().__init__()
        one_of("views", views, VIEWS)
        self.net = WideResNet(channels, input, depth, width, classes, dropout, rectified=rectified, generator=generator)
        self.takes, self.d, self.classes, self.input = (channels, size, size), self.net.d, classes, input
        self.rates = {"lr": lr, "momentum": momentum, "weight_decay": decay, "nesterov": True}
        self.drops, self.views, self.autocast = drops, views, autocast
        self.augmentation = {"area": area, "aspect": aspect, "color": color, "flip": flip}
        self.labels = None

    # ---- the embedding

    def encode(self, x: Tensor) -> Tensor:
        """Features ``[n, d]`` of images ``[n, C, H, W]`` in [0, 1], averaged over the test views. (LEO, sec. 4.3)"""
        boxes = view_boxes(self.views).to(x.device)
        features = 0
        for box in boxes:
            view = look(x, box.expand(len(x), -1), self.input)
            with self.autocast_for(x):
                features = features + self.net.features(_centered(view)) / len(boxes)
        return features

    def embed(self, images: Tensor, chunk: int = 250) -> Tensor:
        """Vectors ``[n, d]``, float32, of uint8 images ``[n, C, H, W]``. ValueError: images of another shape."""
        return super().embed(images, chunk)

    def logits(self, x: Tensor) -> Tensor:
        """Scores ``[n, classes]`` of the central views of images ``[n, C, H, W]`` in [0, 1]."""
        view = look(x, view_boxes("center").to(x.device).expand(len(x), -1), self.input)
        with self.autocast_for(x):
            return self.net(_centered(view)).float()

    # ---- training

    def fit(
        self, images: Tensor, *, labels: Tensor, epochs: int, batch: int = 1024, seed: int = 0,
        checkpoint: str | Path | None = None, **rest,
    ) -> dict:
        """As `Embedding.fit`, with int64 `labels` ``[n]``; the history has the training "loss" and "accuracy".

        Raises:
            ValueError: images of another shape, or labels that are not one of 0 ... classes - 1 for every image.
        """
        if labels.shape != images.shape[:1] or not 0 <= labels.min() <= labels.max() < self.classes:
            raise ValueError(f"{len(images)} images need as many labels from 0 to {self.classes - 1}; "
                             f"got {len(labels)} from {labels.min()} to {labels.max()}")  # fmt: skip
        self.labels = labels.to(images.device)
        return super().fit(images, epochs=epochs, batch=batch, seed=seed, checkpoint=checkpoint, **rest)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(self.parameters(), **self.rates)]

    def start_epoch(self, images, epoch, epochs, generator) -> Tensor:
        """The schedule (Table 4, by epochs instead of steps), and the images in a new order."""
        passed = sum(epoch >= share * epochs for share in self.drops)
        for group in self.opt[0].param_groups:
            group["lr"] = self.rates["lr"] * 0.2**passed
        return super().start_epoch(images, epoch, epochs, generator)

    def step(self, images, index, generator) -> dict[str, Tensor]:
        """Cross-entropy of the classes."""
        x, y = augment(images[index], self.input, generator, **self.augmentation), self.labels[index]
        with self.autocast_for(x):
            logits = self.net(_centered(x), generator)
        loss = F.cross_entropy(logits.float(), y)
        (optimizer,) = self.opt
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return {"loss": loss, "accuracy": (logits.argmax(1) == y).float().mean()}


def _centered(x: Tensor) -> Tensor:
    """Intensities from [0, 1] to [-2, 2]."""
    return (x - 0.5) / 0.25


# Views: a *box* is (center x, center y, half width, half height) in units in which the image is [-1, 1]^2. A negative
# half width is a mirrored view.


def look(x: Tensor, boxes: Tensor, size: int) -> Tensor:
    """The part ``boxes[i]`` of image i, resized to ``[n, C, size, size]``.

    Bilinear; where an image shrinks by more than a half, several samples are averaged for each pixel.

    Args:
        x: float ``[n, C, H, W]``. boxes: ``[n, 4]``, see above.
    """
    n, channels, height, _ = x.shape
    fine = max(1, round(0.87 * height / size))
    theta = x.new_zeros(n, 2, 3)
    theta[:, 0, 2], theta[:, 1, 2], theta[:, 0, 0], theta[:, 1, 1] = boxes.unbind(1)
    grid = F.affine_grid(theta, (n, channels, fine * size, fine * size), align_corners=False)
    seen = F.grid_sample(x, grid, "bilinear", "border", align_corners=False)
    return seen if fine == 1 else F.avg_pool2d(seen, fine)


def view_boxes(views: str) -> Tensor:
    """The test views of an image, ``[1 or 10, 4]``: the center; with the four corners; and the mirrors of the five."""
    half = 80 / 92
    end = 1 - half
    places = [(0, 0)] if views == "center" else [(0, 0), (-end, -end), (end, -end), (-end, end), (end, end)]
    boxes = torch.tensor([[x, y, half, half] for x, y in places])
    return boxes if views == "center" else torch.cat([boxes, boxes * torch.tensor([1, 1, -1, 1])])


def random_boxes(n: int, generator: torch.Generator, area: float, aspect: float, flip: bool) -> Tensor:
    """n boxes inside the image: uniform area from `area` to 1, log-uniform ratio of the sides, uniform place."""
    u = torch.rand(n, 5, generator=generator, device=generator.device)
    side = (area + (1 - area) * u[:, 0]).sqrt()
    ratio = torch.exp((u[:, 1] - 0.5) * math.log(aspect))  # of width to side: half of the ratio of width to height
    half = torch.stack([side * ratio, side / ratio], 1).clamp_max(1)
    center = (2 * u[:, 2:4] - 1) * (1 - half)
    if flip:
        half[:, 0] *= torch.where(u[:, 4] < 0.5, -1.0, 1.0)
    return torch.cat([center, half], 1)


def distort(x: Tensor, generator: torch.Generator, color: float) -> Tensor:
    """Images ``[n, C, H, W]`` in [0, 1] with each its own brightness, contrast and saturation, in this order.

    Each factor is uniform in [1 - color, 1 + color]. Contrast moves pixels from the image's mean gray, saturation from
    their own gray (the mean of the channels).
    """
    u = torch.rand(3, len(x), 1, 1, 1, generator=generator, device=x.device)
    brightness, contrast, saturation = 1 + color * (2 * u - 1)
    x = (x * brightness).clamp(0, 1)
    x = torch.lerp(x.mean((1, 2, 3), keepdim=True), x, contrast).clamp(0, 1)
    return torch.lerp(x.mean(1, keepdim=True), x, saturation).clamp(0, 1)


def augment(images: Tensor, size: int, generator: torch.Generator, *, area, aspect, color, flip) -> Tensor:
    """Training views ``[n, C, size, size]`` in [0, 1] of uint8 images ``[n, C, H, W]``, each drawn on its own."""
    boxes = random_boxes(len(images), generator, area, aspect, flip)
    x = look(as_floats(images), boxes, size)
    return distort(x, generator, color) if color else x
