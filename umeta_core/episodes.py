"""Episodes and the sources they come from. Sampling is index arithmetic on device tensors: no loop over tasks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .data import ImageSet, load


@dataclass
class Episodes:
    """A batch of T few-shot tasks.

    ``support`` ``[T, N, K, C, H, W]`` and ``query`` ``[T, N, Q, C, H, W]`` are floats in [0, 1]; tasks on embeddings
    have ``[T, N, K, d]`` and ``[T, N, Q, d]``. The label of an image is its position on the N axis; since classes are
    drawn in random order, that is a random label permutation. ``first`` is the number of the first task in its test: a
    learner that samples gives each task noise of its own by it.
    """

    support: Tensor
    query: Tensor
    first: int = 0

    @property
    def tasks(self) -> int:
        return self.support.shape[0]

    @property
    def way(self) -> int:
        return self.support.shape[1]

    @property
    def shot(self) -> int:
        return self.support.shape[2]

    def __len__(self) -> int:
        return self.tasks

    def __getitem__(self, tasks: slice) -> Episodes:
        return Episodes(self.support[tasks], self.query[tasks], self.first + tasks.indices(len(self))[0])

    def to(self, device) -> Episodes:
        return Episodes(self.support.to(device), self.query.to(device), self.first)

    def flat(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Support ``[T, N*K, ...]``, its labels ``[T, N*K]``, query ``[T, N*Q, ...]``, its labels ``[T, N*Q]``."""
        return self.support.flatten(1, 2), _labels(self.support), self.query.flatten(1, 2), self.labels

    @property
    def labels(self) -> Tensor:
        """Labels of the queries ``[T, N*Q]``, without a copy of the images, which `flat` makes."""
        return _labels(self.query)


def _labels(x: Tensor) -> Tensor:
    tasks, way, each = x.shape[:3]
    return torch.arange(way, device=x.device).repeat_interleave(each).expand(tasks, -1)


def sample_without_replacement(counts: Tensor, r: int, generator: torch.Generator) -> Tensor:
    """For every entry m of `counts` ``[...]``, r different numbers of 0..m-1 in random order: ``[..., r]``. (eq-floyd)

    Floyd's algorithm (Bentley & Floyd, 1987): draw i is uniform on 0..m-r+i and, if taken already, becomes m-r+i.
    It needs r draws whatever m is, so a source with clusters of 10 and of 10,000 members costs the same. Every m must
    be at least r: the caller sees to it, as looking would make a GPU wait.
    """
    draws = torch.rand(*counts.shape, r, generator=generator, device=counts.device, dtype=torch.float64)
    last = counts.unsqueeze(-1) - r + torch.arange(r, device=counts.device)
    draws = (draws * (last + 1)).long()
    chosen = torch.empty_like(draws)
    for i in range(r):
        taken = (chosen[..., :i] == draws[..., i : i + 1]).any(-1)
        chosen[..., i] = torch.where(taken, last[..., i], draws[..., i])
    order = torch.rand(chosen.shape, generator=generator, device=counts.device).argsort(-1)
    return chosen.gather(-1, order)


def features_of(images: ImageSet, features: Tensor | None) -> Tensor | None:
    """`features` ``[n, ...]`` on the device of the images; ValueError: they are of other images, or not finite."""
    if features is None:
        return None
    features = torch.as_tensor(features).to(images.labels.device)
    _check_rows("features are", len(features), images)
    if not torch.isfinite(features).all():
        bad = int((~torch.isfinite(features)).flatten(1).any(1).sum())
        raise ValueError(f"{bad} of {len(features)} features are not finite; fit the embedding again")
    return features


def _check_rows(what: str, rows: int, images: ImageSet) -> None:
    if rows != len(images):
        raise ValueError(f"the {what} of {rows} images but {images.name} {images.split} has {len(images)}")


class PartitionTasks:
    """Tasks whose classes are the classes of a partition: labels, clusters, hyperplane cells or chance.

    A partition is an int tensor ``[n]`` of class indices, -1 for images left out; ``[P, n]`` is a stack of P of them,
    of which each task draws one uniformly, then N of its classes uniformly (not by size), then R = K + Q of their
    members, all without replacement (CACTUs, Alg. 1). Classes with fewer than R members are not used.

    `features` ``[n, ...]``, float, are what the tasks show instead of the images, for example embeddings ``[n, d]``.
    The same generator draws the same tasks with and without them.

    Raises:
        ValueError: a partition or features of other images, features that are not finite, or a task that asks for more
            classes or images than there are.
    """

    def __init__(self, images: ImageSet, partitions: Tensor | None = None, features: Tensor | None = None):
        if features is None and images.images.dtype != torch.uint8:
            raise ValueError(f"images are uint8, 0 to 255, not {images.images.dtype}; pass other numbers as features")
        parts = images.labels if partitions is None else torch.as_tensor(partitions).to(images.labels.device)
        parts = parts.unsqueeze(0) if parts.dim() == 1 else parts
        _check_rows("partition is", parts.shape[1], images)
        self.images, self.features = images, features_of(images, features)
        classes = int(parts.max()) + 1
        if classes < 1:
            raise ValueError("the partition leaves every image out")
        if int(parts.min()) < -1:
            raise ValueError(f"a partition has {int(parts.min())}; it takes numbers of classes, and -1 to leave out")
        # members of class c of partition p: order[p, start[p, c] : start[p, c] + size[p, c]]
        self.order = torch.empty(parts.shape, dtype=torch.int32, device=parts.device)
        self.size = torch.empty(len(parts), classes, dtype=torch.long, device=parts.device)
        self.start = torch.empty_like(self.size)
        for order, size, start, part in zip(self.order, self.size, self.start, parts):  # thousands fit memory this way
            order.copy_(part.argsort(stable=True))
            tally = torch.bincount(part.long() + 1, minlength=classes + 1)
            size.copy_(tally[1:])
            start.copy_(tally.cumsum(0)[:-1])
        self._usable: dict[int, tuple[Tensor, Tensor]] = {}
        self._least: dict[int, int] = {}  # classes of the poorest partition, which a GPU need not be asked for twice

    def usable(self, r: int) -> tuple[Tensor, Tensor]:
        """Per partition, its classes with at least r members first ``[P, classes]``, and how many they are ``[P]``."""
        if r not in self._usable:
            enough = self.size >= r
            self._usable[r] = (~enough).int().argsort(dim=1, stable=True), enough.sum(1)
            self._least[r] = int(enough.sum(1).min())
        return self._usable[r]

    def sample(self, tasks: int, way: int, shot: int, query: int, generator: torch.Generator) -> Episodes:
        """Draw `tasks` N-way K-shot episodes with Q queries per class.

        Raises:
            ValueError: a partition has fewer than `way` classes of at least shot + query images; a number below 1.
        """
        if min(tasks, way, shot, query) < 1:
            raise ValueError(f"{tasks} tasks of {way} classes with {shot} + {query} images; use 1 or more of each")
        r = shot + query
        classes, count = self.usable(r)
        if self._least[r] < way:
            raise ValueError(
                f"{way}-way tasks with {shot} + {query} images per class need {way} classes of at least {r} images; "
                f"{self.images.name} {self.images.split} has {self._least[r]} (largest class: {int(self.size.max())})"
            )
        device = self.size.device
        p = torch.randint(len(count), (tasks,), generator=generator, device=device)
        picked = classes[p].gather(1, sample_without_replacement(count[p], way, generator))  # [T, N]
        member = sample_without_replacement(self.size[p].gather(1, picked), r, generator)  # [T, N, R]
        place = self.start[p].gather(1, picked).unsqueeze(2) + member
        index = self.order[p.view(-1, 1, 1), place].long()
        if self.features is not None:
            x = self.features[index]
        else:
            x = self.images.shown(index)
        return Episodes(x[:, :, :shot], x[:, :, shot:])


class MixedTasks:
    """Each task comes from `first` with probability `share`, else from `second` (CACTUs, App. G: semi-supervised MAML).

    Both sources show the same images or features; the paper mixes cluster tasks and labeled tasks in proportion to the
    data behind them: 964 ImageNet classes to the 64 labeled ones of them. ValueError: a share outside 0 to 1.
    """

    def __init__(self, first, second, share: float):
        if not 0 <= share <= 1:
            raise ValueError(f"share={share} is not a probability; use a number from 0 to 1")
        self.first, self.second, self.share, self.images = first, second, share, first.images

    def sample(self, tasks: int, way: int, shot: int, query: int, generator: torch.Generator) -> Episodes:
        """Draw from both and keep one of each pair: the work stays the same whatever the draw."""
        a = self.first.sample(tasks, way, shot, query, generator)
        b = self.second.sample(tasks, way, shot, query, generator)
        keep = torch.rand(tasks, generator=generator, device=a.support.device) < self.share

        def pick(x, y):
            return torch.where(keep.view(-1, *[1] * (x.dim() - 1)), x, y)

        return Episodes(pick(a.support, b.support), pick(a.query, b.query))


class UnlabeledSets:
    """Episodes of images drawn with replacement from a pool, labels never looked at (reference code: RandomSampler).

    `features` ``[n, d]``, float, are what the episodes show instead of the images.
    """

    def __init__(self, images: ImageSet, features: Tensor | None = None):
        self.images, self.features = images, features_of(images, features)

    def sample(self, tasks: int, way: int, shot: int, query: int, generator: torch.Generator) -> Episodes:
        """`tasks` sets of M = way * (shot + query) images; plainest with way 1, shot M, query 0."""
        device = self.images.labels.device
        shape = (tasks, way, shot + query)
        index = torch.randint(len(self.images), shape, generator=generator, device=device)
        if self.features is not None:
            x = self.features[index]
        else:
            x = self.images.shown(index)
        return Episodes(x[:, :, :shot], x[:, :, shot:])


def running_example() -> Episodes:
    """The book's one fixed episode: 5-way 1-shot with 5 queries, from unseen scripts of the glyphs; T = 1."""
    return PartitionTasks(load("glyphs", "test")).sample(1, 5, 1, 5, torch.Generator().manual_seed(7))
