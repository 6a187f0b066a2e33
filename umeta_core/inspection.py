"""Looking at a partition: how large its classes are and how well they agree with the labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Inspection:
    """Sizes of the classes that are not empty ``[classes]``, images left out, purity and NMI to the labels (0 to 1)."""

    sizes: Tensor
    left_out: int
    purity: float
    nmi: float

    def __str__(self) -> str:
        low, middle, high = (int(f(self.sizes)) for f in (torch.min, torch.median, torch.max))
        return (
            f"{len(self.sizes)} classes of {low} to {high} images (median {middle}), {self.left_out} images left out; "
            f"purity {self.purity:.3f}, NMI {self.nmi:.3f}"
        )


def inspect(partition: Tensor, labels: Tensor) -> Inspection:
    """Compare one partition ``[n]`` with labels ``[n]``; images with -1 in either are left out.

    Raises:
        ValueError: different numbers of images, or none left.
    """
    if partition.shape != labels.shape or partition.dim() != 1:
        raise ValueError(f"a partition {list(partition.shape)} cannot be compared with labels {list(labels.shape)}")
    kept = (partition >= 0) & (labels >= 0)
    if not kept.any():
        raise ValueError(f"the partition leaves all {len(labels)} images out")
    p, y = partition[kept].long(), labels[kept].long()
    columns = int(y.max()) + 1
    table = torch.bincount(p * columns + y, minlength=(int(p.max()) + 1) * columns).view(-1, columns)
    sizes = table.sum(1)
    return Inspection(sizes[sizes > 0], int((~kept).sum()), purity(table), nmi(table))


def purity(table: Tensor) -> float:
    """Share of images with the most frequent label of their cluster, from counts ``[clusters, labels]``. (eq-purity)"""
    return (table.amax(1).sum() / table.sum()).item()


def nmi(table: Tensor) -> float:
    """Normalized mutual information, from counts ``[clusters, labels]``: over the mean of both entropies. (eq-nmi)"""
    p = table.double() / table.sum()
    mean_entropy = (_entropy(p.sum(0)) + _entropy(p.sum(1))) / 2
    if mean_entropy == 0:
        return 1.0  # one cluster and one label: the same partition
    return ((2 * mean_entropy - _entropy(p.flatten())) / mean_entropy).item()


def _entropy(p: Tensor) -> Tensor:
    return -torch.special.xlogy(p, p).sum()
