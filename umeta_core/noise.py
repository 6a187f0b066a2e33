"""Noise of a learner's own, which goes on from a checkpoint."""

from __future__ import annotations

import torch
from torch import Tensor

from .training import noise_of_call


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
