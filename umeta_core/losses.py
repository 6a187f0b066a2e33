"""Loss and accuracy of each task of a batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy of each task ``[T]`` from logits ``[T, n, N]`` and labels ``[T, n]``."""
    return F.cross_entropy(logits.transpose(1, 2), y, reduction="none").mean(1)


def accuracy(logits: Tensor, y: Tensor) -> Tensor:
    """Share of right answers of each task ``[T]``. (eq-accuracy)"""
    return (logits.argmax(2) == y).float().mean(1)


def check_equal_weights(gradient: Tensor) -> None:
    """ValueError unless all losses ``[T]``, of which this is the gradient, have one weight, as in their mean."""
    message = "the losses of the tasks must have equal weights, as their mean has"
    if gradient.is_cuda:  # looks without waiting for the answer
        torch._assert_async((gradient == gradient[:1]).all(), message)
    elif not torch.equal(gradient, gradient[:1].expand_as(gradient)):
        raise ValueError(message)
