"""Noise of a learner's own: in training it goes on from a checkpoint, in tests each task has its own."""

from __future__ import annotations

import torch
from torch import Tensor

from .speed import rank


def noise_of_call(device, seed: int, call: int) -> torch.Generator:
    """A generator for the noise of a learner's `call`-th loss, other for each seed and each process of several.

    All of it is mixed into 32 bits: that is all of a seed that PyTorch's generator on a CPU looks at.
    """
    return torch.Generator(device).manual_seed(((seed * 1009 + rank()) * 1_000_003 + call) % 2**32)


def noise_of_tasks(like: Tensor, seed: int, first: int) -> Tensor:
    """Standard normal noise like ``[T, ...]`` for tasks number `first` and on.

    It depends on a task's number alone, so not on how many are handled at once.
    """
    generators = (noise_of_call(like.device, seed, first + t) for t in range(len(like)))
    return torch.stack([
        torch.randn(like.shape[1:], generator=g, device=like.device, dtype=like.dtype) for g in generators
    ])  # fmt: skip


class CountedNoise:
    """A mix-in for modules with a `seed`: each call of `loss` has other noise, and checkpoints hold their number."""

    seed: int
    draws = 0

    def _noise(self, like: Tensor | None = None) -> torch.Generator:
        """A new generator for each call of `loss`, on the device of `like`, or None: on a CPU; each process of several
        has its own."""
        self.draws += 1
        return noise_of_call("cpu" if like is None else like.device, self.seed, self.draws)

    def get_extra_state(self) -> dict:
        return {"draws": self.draws}

    def set_extra_state(self, state: dict) -> None:
        self.draws = state["draws"]
