"""DeepCluster (Caron et al., 2018): cluster the features of a network, train it to predict the clusters, repeat.

Facts that the papers leave out are from the authors' code: the features that are clustered are those before the last
ReLU, the last layer moves without momentum, and in an epoch every cluster is drawn equally often.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import one_of
from ..data import as_floats
from ..evaluation import evaluating
from ..storage import save_tensors
from .base import IMAGENET_MEAN, IMAGENET_STD, Embedding, read

CHANNELS = (96, 256, 384, 384, 256)
POOLED = (0, 1, 4)  # the convolutions that a 3x3 max-pool of stride 2 follows
UNITS = 4096


class DeepCluster(Embedding):
    """AlexNet with batch norm on Sobel gradients; its features, reduced by PCA and whitened, are the embedding.

    CACTUs (App. E.4) says of its network only that the first layer was changed to fit 64x64 images. Kernel 5, stride 1,
    padding 1 are what someone who repeated it took (issue 7 of its repository); with them the last map has 6x6 pixels,
    as the original's has. Not said either: how many clusters and epochs, and whether images were mirrored.

    The paper's network needs 7 GFLOP per image and epoch: days on a CPU. `width` 1/4 and `stride` 2 need 50 times less,
    about a minute of one core per epoch of mini-ImageNet. So short a training learns little unless it takes more and
    smaller steps, `batch` 32 or 64, and no `dropout`.

    Args:
        channels, size: of the square images; one channel or RGB.
        d: numbers in an embedding.
        clusters: k of the k-means before each epoch.
        width: factor on the number of channels and of hidden units; 1 is the paper's network.
        kernel, stride, padding: of the first convolution.
        crop: height and width of the network's input.
        view: how an image becomes that small. "crop": at a random place in training, from the center otherwise
            (CACTUs, mini-ImageNet); "resize" (CACTUs, CelebA).
        flip: mirror half of the training images left to right.
        dropout: before both hidden layers; lr, momentum, decay: of SGD.
        iterations: of k-means.
        whiten: statistics of PCA and whitening: those of the "train" images, or of the images that `embed` gets, "own"
            (CACTUs, sec. 4.1: of the whole meta-test split).
        generator: source of the initial weights.

    Raises:
        ValueError: the input is too small for the network, or d larger than its number of features.
    """

    def __init__(
        self, channels=3, size=84, d=256, *, clusters=500, width=1.0, kernel=5, stride=1, padding=1, crop=64,
        view="crop", flip=True, dropout=0.5, lr=0.05, momentum=0.9, decay=1e-5, iterations=20, whiten="train",
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        one_of("view", view, ("crop", "resize"))
        one_of("whiten", whiten, ("train", "own"))
        if crop > size and view == "crop":
            raise ValueError(f"a {crop}x{crop} crop does not fit into {size}x{size} images; use crop={size}")
        self.takes, self.d, self.clusters, self.crop, self.view = (channels, size, size), d, clusters, crop, view
        self.flip, self.dropout, self.iterations, self.whiten = flip, dropout, iterations, whiten
        self.rates = {"lr": lr, "momentum": momentum, "weight_decay": decay}
        side = last_side(crop, kernel, stride, padding)
        filters, units = [max(1, round(c * width)) for c in CHANNELS], round(UNITS * width)
        if d > units:
            raise ValueError(f"d={d} is more than the {units} features of width={width}; use a smaller d")
        self.sobel = Sobel(channels)
        kernels = [(kernel, stride, padding), (5, 1, 2), (3, 1, 1), (3, 1, 1), (3, 1, 1)]
        self.convs = nn.ModuleList(
            nn.Conv2d(i, o, *k, bias=False) for i, o, k in zip([2, *filters], filters, kernels)
        )  # batch norm subtracts a bias again
        self.norms = nn.ModuleList(nn.BatchNorm2d(c) for c in filters)
        self.hidden = nn.ModuleList([nn.Linear(filters[-1] * side * side, units), nn.Linear(units, units)])
        self.top = nn.Linear(units, clusters)
        self._initialize(generator)
        self.to(memory_format=torch.channels_last)
        self.register_buffer("mean", torch.full((units,), torch.nan))
        self.register_buffer("whitening", torch.full((units, d), torch.nan))
        self.labels, self.nmi, self.final = torch.empty(0, dtype=torch.int64), None, False

    def _initialize(self, generator: torch.Generator | None) -> None:
        for conv in self.convs:
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", generator=generator)
        for layer, inputs in zip([*self.hidden, self.top], (9216, UNITS, UNITS)):
            _fresh(layer, inputs, generator)

    # ---- the network

    def features(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Output of the last hidden layer before its ReLU, ``[n, units]``, of `crop` x `crop` images in [0, 1].

        `generator` is the source of dropout, in training only.
        """
        x = self.sobel(x)
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms)):
            x = F.relu_(norm(conv(x)))
            x = F.max_pool2d(x, 3, 2) if i in POOLED else x
        first, second = self.hidden
        x = F.relu_(first(self._drop(x.flatten(1), generator)))
        return second(self._drop(x, generator))

    def _drop(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        if not self.training or self.dropout == 0:
            return x
        keep = 1 - self.dropout
        return x * torch.empty_like(x).bernoulli_(keep, generator=generator) / keep

    def _views(self, images: Tensor, index: Tensor, generator: torch.Generator) -> Tensor:
        """Training views ``[batch, C, crop, crop]`` in [0, 1] of ``images[index]``, each with its own crop and flip."""
        n, device = len(index), images.device
        if self.view == "resize":
            x = self._center(as_floats(images[index]))
            mirrored = torch.rand(n, 1, 1, 1, generator=generator, device=device) < 0.5
            return torch.where(mirrored, x.flip(3), x) if self.flip else x
        place = torch.randint(self.takes[1] - self.crop + 1, (2, n, 1), generator=generator, device=device)
        rows, columns = place + torch.arange(self.crop, device=device)
        if self.flip:
            mirrored = torch.rand(n, 1, generator=generator, device=device) < 0.5
            columns = torch.where(mirrored, columns.flip(1), columns)
        x = images[index[:, None, None], :, rows[:, :, None], columns[:, None, :]]
        return as_floats(x.permute(0, 3, 1, 2))

    def _center(self, x: Tensor) -> Tensor:
        """The one view ``[n, C, crop, crop]`` by which an image is clustered and embedded."""
        if self.view == "resize":
            return F.interpolate(x, (self.crop, self.crop), mode="bilinear", antialias=True)
        at = (self.takes[1] - self.crop) // 2
        return x[:, :, at : at + self.crop, at : at + self.crop]

    # ---- the embedding

    def encode(self, x: Tensor) -> Tensor:
        """Whitened features of length 1, ``[n, d]``, of images ``[n, C, H, W]`` in [0, 1]."""
        return apply_whitening(self.features(self._center(x)), self.mean, self.whitening)

    def embed(self, images: Tensor, chunk: int = 250) -> Tensor:
        """Vectors ``[n, d]``, float32, of uint8 images ``[n, C, H, W]``. ValueError: not fitted, or other images."""
        self.check_shape(images)
        if self.whiten == "own":
            z = self._all_features(images, chunk)
            return apply_whitening(z, *pca_whitening(z, self.d))
        if self.whitening[0, 0].isnan():
            raise ValueError("the whitening has no statistics yet; call fit first (epochs=0 leaves the network)")
        return super().embed(images, chunk)

    @torch.no_grad()
    def _all_features(self, images: Tensor, chunk: int = 250) -> Tensor:
        with evaluating(self):
            return torch.cat([self.features(self._center(as_floats(x))) for x in images.split(chunk)])

    def _whitened(self, images: Tensor) -> Tensor:
        """New statistics from these images, and their embeddings."""
        z = self._all_features(images)
        mean, matrix = pca_whitening(z, self.d)
        self.mean.copy_(mean)
        self.whitening.copy_(matrix)
        return apply_whitening(z, mean, matrix)

    # ---- training

    def fit(self, images: Tensor, *, epochs: int, batch: int = 256, checkpoint: str | Path | None = None, **rest):
        """As `Embedding.fit`, at the end with PCA and whitening of the trained network's features.

        The history also has the accuracy on the pseudo-labels, and "nmi" between the clusters of successive epochs:
        one number less than epochs.

        Raises:
            ValueError: fewer images than clusters, or images of another shape.
        """
        if len(images) < self.clusters:
            raise ValueError(f"{len(images)} images cannot form {self.clusters} clusters; use fewer clusters")
        history = super().fit(images, epochs=epochs, batch=batch, checkpoint=checkpoint, **rest)
        if self.final:  # a finished fit was read
            return history
        self._whitened(images.to(self.mean.device))
        self.final = True
        if checkpoint and Path(checkpoint).exists():
            save_tensors({**read(checkpoint), "model": self.state_dict()}, checkpoint)
        return history

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """SGD of the network; of the last layer, which starts afresh in every epoch, without momentum."""
        body = [p for name, p in self.named_parameters() if not name.startswith("top.")]
        last = {**self.rates, "momentum": 0}
        return [torch.optim.SGD(body, **self.rates), torch.optim.SGD(self.top.parameters(), **last)]

    def start_epoch(self, images, epoch, epochs, generator) -> Tensor:
        """New pseudo-labels, a new last layer, and an order in which all clusters are equally frequent."""
        from ..inspection import inspect
        from ..kmeans import kmeans

        self.final = False
        z, before = self._whitened(images), self.labels
        found = kmeans(z, self.clusters, generator, iterations=self.iterations).assignment
        self.labels = fill_empty(z, found, self.clusters, generator)
        self.nmi = inspect(self.labels, before).nmi if len(before) else None
        _fresh(self.top, UNITS, generator)
        return uniform_over_clusters(self.labels, self.clusters, generator)

    def step(self, images, index, generator) -> dict[str, Tensor]:
        """Cross-entropy of the pseudo-labels. (eq-deepcluster)"""
        y = self.labels[index]
        logits = self.top(F.relu(self.features(self._views(images, index, generator), generator)))
        loss = F.cross_entropy(logits, y)
        for optimizer in self.opt:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in self.opt:
            optimizer.step()
        shown = {"loss": loss, "accuracy": (logits.argmax(1) == y).float().mean()}
        return shown if self.nmi is None else {**shown, "nmi": torch.as_tensor(self.nmi, device=y.device)}

    def get_extra_state(self) -> dict:
        return {"labels": self.labels, "nmi": self.nmi, "final": self.final}

    def set_extra_state(self, state: dict) -> None:
        self.labels, self.nmi = state["labels"].to(self.mean.device), state["nmi"]
        self.final = state.get("final", False)


class Sobel(nn.Module):
    """Horizontal and vertical gradients ``[n, 2, H, W]`` of the gray image; nothing is learned.

    RGB is first normalized by the mean and deviation of ImageNet (reference code, not in the paper).
    """

    def __init__(self, channels: int):
        super().__init__()
        if channels not in (1, 3):
            raise ValueError(f"images of {channels} channels have no gray; use 1 or 3 channels")
        mean, deviation = torch.tensor([IMAGENET_MEAN, IMAGENET_STD])
        gray = torch.ones(1) if channels == 1 else 1 / (3 * deviation)
        self.register_buffer("gray", gray, persistent=False)
        self.register_buffer("offset", torch.zeros(()) if channels == 1 else -(mean * gray).sum(), persistent=False)
        horizontal = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]])
        self.register_buffer("filters", torch.stack([horizontal, horizontal.T]).unsqueeze(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        gray = x.permute(0, 2, 3, 1) @ self.gray + self.offset
        return F.conv2d(gray.unsqueeze(1), self.filters, padding=1)


def _fresh(layer: nn.Linear, inputs: int, generator: torch.Generator | None) -> None:
    """The authors' N(0, 0.01^2), wider where the layer has fewer inputs than theirs: its outputs keep their size."""
    nn.init.normal_(layer.weight, std=0.01 * (inputs / layer.in_features) ** 0.5, generator=generator)
    nn.init.zeros_(layer.bias)


def last_side(crop: int, kernel: int, stride: int, padding: int) -> int:
    """Height and width of the last map. ValueError: nothing is left of the input."""
    least = 14 * stride + kernel - 2 * padding
    if crop < least:
        raise ValueError(f"{crop}x{crop} is too small for three poolings after a first layer of kernel {kernel} and "
                         f"stride {stride}; use at least {least}x{least}, or a smaller stride")  # fmt: skip
    side = (crop + 2 * padding - kernel) // stride + 1
    for _ in POOLED:
        side = (side - 3) // 2 + 1
    return side


def pca_whitening(z: Tensor, d: int) -> tuple[Tensor, Tensor]:
    """Mean ``[D]`` and matrix ``[D, d]`` that turn features ``[n, D]`` into d uncorrelated ones of variance 1.

    The matrix is U / sqrt(lambda) of the d largest eigenvalues of the covariance. (eq-whitening) Directions of almost
    no variance, below a millionth of the largest, stay small instead of becoming noise of variance 1.

    Raises:
        ValueError: not more images than d, or a feature that is not finite.
    """
    if not torch.isfinite(z).all():
        broken = int((~torch.isfinite(z)).any(1).sum())
        raise ValueError(f"{broken} of {len(z)} embeddings are not finite: the fit diverged; make it again with a "
                         "lower learning rate")
    if len(z) <= d:
        raise ValueError(f"PCA to {d} dimensions needs more than {d} images; got {len(z)}")
    mean = z.mean(0)
    centered = z - mean
    covariance = (centered.T @ centered).double() / (len(z) - 1)
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values[-d:].flip(0), vectors[:, -d:].flip(1)
    return mean, (vectors / values.clamp_min(1e-6 * values[0]).sqrt()).float()


def apply_whitening(z: Tensor, mean: Tensor, matrix: Tensor) -> Tensor:
    """Whitened features ``[n, d]``, each scaled to length 1."""
    return F.normalize((z - mean) @ matrix, dim=1)


def fill_empty(z: Tensor, labels: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Labels ``[n]`` in which each empty cluster got about half of another one, chosen at random.

    The two centroids are that cluster's, moved apart a little in a random direction (Caron et al., sec. 3.3). A cluster
    of equal points is not divisible; after k tries, clusters that are still empty stay empty.
    """
    labels = labels.clone()
    for _ in range(k):
        sizes = torch.bincount(labels, minlength=k)
        empty = (sizes == 0).nonzero().flatten()
        if len(empty) == 0:
            break
        large = (sizes > 1).float()
        if not large.any():
            break
        chosen = torch.multinomial(large, 1, generator=generator)
        members = (labels == chosen).nonzero().flatten()
        direction = torch.randn(z.shape[1], generator=generator, device=z.device)
        side = (z[members] - z[members].mean(0)) @ direction
        labels[members[side > 1e-6 * direction.norm()]] = empty[0]
    return labels


def uniform_over_clusters(labels: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """n indices in random order, floor(n / k') + 1 or less of each of the k' clusters that are not empty.

    Large clusters are drawn from without replacement, small ones with (reference code, not in the paper).
    """
    n, device = len(labels), labels.device
    sizes = torch.bincount(labels, minlength=k)
    shuffled = torch.randperm(n, generator=generator, device=device)
    grouped = shuffled[labels[shuffled].argsort(stable=True)]
    starts, sizes = (sizes.cumsum(0) - sizes)[sizes > 0], sizes[sizes > 0]
    each = n // len(sizes) + 1
    drawn = (torch.rand(len(sizes), each, generator=generator, device=device) * sizes[:, None]).long()
    first = torch.arange(each, device=device).expand_as(drawn)
    member = torch.where(sizes[:, None] > each, first, drawn.minimum(sizes[:, None] - 1))
    picked = grouped[(starts[:, None] + member).flatten()]
    return picked[torch.randperm(len(picked), generator=generator, device=device)[:n]]
