"""How good the features of a network are that a rule trained without labels, and of its rivals, on the same tasks.

Metz et al. 2019, section 5 and App. H: 10 labeled examples per class, a ridge readout, ten more per class to test.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import ascending
from .data import ImageSet
from .episodes import PartitionTasks
from .learned_rule import EMBEDDING, Phi, UpdateRule, meta_objective, ridge_readout, run_network
from .rule_tasks import Bucket, fresh_tasks, labeled, unlabeled


class Trial(NamedTuple):
    """T networks at their start, each with its own classes and order of pixels, and what they are judged by.

    `x` ``[T, D, 2, K, N_0]`` and `labels` ``[T, D, 2, K]`` are D draws of labeled halves.
    """

    bucket: Bucket
    pool: PartitionTasks
    state: dict
    x: Tensor
    labels: Tensor
    seed: int

    @property
    def phi(self) -> Phi:
        return Phi(*map(tuple, self.state["phi"]))

    def batch(self, size: int, generator: torch.Generator) -> Tensor:
        """Unlabeled images ``[T, size, N_0]``."""
        return unlabeled(self.bucket, self.pool, self.state, (size,), generator)

    def readout(self, features: Tensor) -> Tensor:
        """Accuracy ``[T]``, over the D draws, of a ridge readout of features ``[T, D, 2, K, n]`` of `x`."""
        return ridge_readout(features, self.labels, self.bucket.way).accuracy.mean(1)


def trial(images: ImageSet, judged: ImageSet | None = None, *, networks=8, way=10, hidden=(32, 32), draws=10, shot=10,
          seed=0, shuffle=True) -> Trial:  # fmt: skip
    """Networks for `images`; the labeled draws are from `judged`, which has the same classes (None: `images`).

    With `shuffle` each network sees the pixels in an order of its own. The same arguments give the same trial.

    Raises:
        ValueError: too few classes, or too few images of a class, or `judged` has other classes.
    """
    judged = judged or images
    if judged.class_names != images.class_names:
        raise ValueError(f"{judged.name} {judged.split} has other classes than {images.name} {images.split}; judge a "
                         "rule on images of the classes that it is shown")  # fmt: skip
    bucket = Bucket(images, way, tuple(hidden), drop=0.0, moved=0)
    pool, judging = PartitionTasks(images), PartitionTasks(judged)
    generator = torch.Generator(device=images.labels.device).manual_seed(seed)
    state = fresh_tasks(bucket, judging, networks, shot, 1.0, generator)
    if not shuffle:
        state["order"] = torch.arange(bucket.widths[0], device=generator.device).expand(networks, -1)
    judged_bucket = Bucket(judged, way, tuple(hidden), drop=0.0, moved=0)
    if state["classes"].max() >= pool.size.shape[1] or (pool.size[0][state["classes"]] == 0).any():
        raise ValueError(f"{images.name} {images.split} lacks a class that {judged.name} {judged.split} has; show the "
                         "rule images of every class that it is judged on")  # fmt: skip
    x, labels, _ = labeled(judged_bucket, judging, state, draws, shot, generator)
    return Trial(bucket, pool, state, x, labels, seed)


@torch.no_grad()
def rule_curve(rule: UpdateRule, task: Trial, at: tuple[int, ...], batch: int = 32, activation="relu") -> Tensor:
    """Accuracy ``[len(at), T]`` of the networks after so many steps of the rule. Ridge readout, as in meta-training."""
    return torch.stack([accuracy for _, accuracy in rule_path(rule, task, at, batch, activation)])


@torch.no_grad()
def rule_path(rule: UpdateRule, task: Trial, at: tuple[int, ...], batch: int = 32, activation="relu"):
    """Yields (phi, accuracy ``[T]``) after each number of steps in `at`, ascending."""
    ascending(at)
    generator = torch.Generator(device=task.x.device).manual_seed(task.seed + 1)
    phi, done = task.phi, 0
    for steps in at:
        for _ in range(steps - done):
            phi = rule.step(phi, task.batch(batch, generator), activation)
        done = steps
        yield phi, meta_objective(phi, task.x, task.labels, task.bucket.way, activation=activation).accuracy


def pixel_accuracy(task: Trial) -> Tensor:
    """Ridge on the pixels themselves ``[T]``: a control that the paper lacks."""
    return task.readout(task.x)


def pca_accuracy(task: Trial, components: int = EMBEDDING, samples: int = 1000) -> Tensor:
    """Ridge on the first principal components of unlabeled images ``[T]``: the other control that it lacks."""
    generator = torch.Generator(device=task.x.device).manual_seed(task.seed + 1)
    x = task.batch(samples, generator)
    mean = x.mean(1, keepdim=True)
    axes = torch.linalg.eigh((x - mean).mT @ (x - mean)).eigenvectors[..., -components:]  # [T, N_0, components]
    return task.readout((task.x - mean[:, None, None]) @ axes[:, None, None])


def explained_variance(phi: Phi, x: Tensor) -> Tensor:
    """Share of the variance of the embedding of x ``[T, n, N_0]`` in its first 1..32 principal components (Fig. 6)."""
    u = run_network(phi, x)[0][-1]
    s = torch.linalg.svdvals(u - u.mean(1, keepdim=True)).square()
    return s.cumsum(1) / s.sum(1, keepdim=True).clamp_min(1e-12)
