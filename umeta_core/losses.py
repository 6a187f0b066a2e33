"""Loss and accuracy of each task of a batch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy of each task ``[T]`` from logits ``[T, n, N]`` and labels ``[T, n]``."""
    return F.cross_entropy(logits.transpose(1, 2), y, reduction="none").mean(1)


def accuracy(logits: Tensor, y: Tensor) -> Tensor:
    """Share of right answers of each task ``[T]``. (eq-accuracy)"""
    return (logits.argmax(2) == y).float().mean(1)
