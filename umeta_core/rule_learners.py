"""Two ways to meta-train the rule on truncations: back-propagation through the steps, and evolution strategies."""

from __future__ import annotations

import time
from functools import partial

import torch
from torch import Tensor, nn

from .learned_rule import Phi, Readout, UpdateRule, meta_objective
from .noise import CountedNoise
from .rule_tasks import Truncation


class RuleLearner(nn.Module):
    """The rule as a learner of `training.train`: `loss` runs a truncation and leaves its networks where they ended.

    Args:
        rule: what is meta-trained.
        clip: bound on the norm of the gradient (App. H.2).
        recompute: see `UpdateRule.forward`; less memory for a third more time.
        seconds: a budget for each meta-step. Tasks are then run one by one, and those that the time does not suffice
            for are left out (at least one is run): processes on uneven machines need not wait for each other. Their
            networks do not age, and the next call with the same bucket begins with them.
    """

    def __init__(self, rule: UpdateRule, clip: float = 5.0, recompute: bool = False, seconds: float | None = None):
        super().__init__()
        self.rule, self.clip, self.recompute, self.seconds = rule, clip, recompute, seconds
        self.first: dict[int, int] = {}  # the task to begin with, by bucket

    def loss(self, truncation: Truncation) -> tuple[Tensor, Tensor]:
        """Losses and accuracies ``[T]`` after the U steps (eq-rule-truncation), from detached networks."""
        if self.seconds is None:
            return self._run(truncation)
        started, done = time.monotonic(), []
        forward = self.seconds / (4 if self.recompute else 3)  # the way back takes two or three times as long
        tasks, first = len(truncation), self.first.get(truncation.bucket, 0)
        order = [(first + n) % tasks for n in range(tasks)]
        for task in order:
            if done and time.monotonic() - started > forward:
                break
            done.append(self._run(truncation[task : task + 1]))
        if truncation.left is not None:
            truncation.left[order[len(done) :]] += truncation.x.shape[1]
        self.first[truncation.bucket] = (first + len(done)) % tasks
        return tuple(map(torch.cat, zip(*done)))

    def _run(self, truncation: Truncation) -> tuple[Tensor, Tensor]:
        done = _advance(partial(self.rule, recompute=self.recompute), truncation.phi, truncation)
        return done.loss, done.accuracy

    def prepare_gradients(self, loss: Tensor) -> None:
        """Bound the gradient's norm; without a finite gradient the step is skipped. For `train(prepare=...)`."""
        params = [p for p in self.parameters() if p.grad is not None]
        norm = nn.utils.clip_grad_norm_(params, self.clip)
        if not torch.isfinite(norm + loss):
            for p in params:
                p.grad = None


class PESLearner(CountedNoise, RuleLearner):
    """The same rule with a gradient from perturbations instead of back-propagation: persistent evolution strategies.

    Vicol et al. 2021 (not in Metz et al.). Each task has a pair of networks, one trained by theta + e, one by
    theta - e, with fresh noise e in every truncation; the gradient weighs the difference of their losses with the sum
    of all noise since the pair began, so unlike truncated back-propagation it is not biased toward short horizons.
    The price is variance (`rule_figures.variance`). Give `RuleTasks` the argument ``theta=learner.size``.

    Args:
        sigma: standard deviation of the noise.
    """

    def __init__(self, rule: UpdateRule, sigma: float = 0.01, seed: int = 0, clip: float = 5.0):
        super().__init__(rule, clip)
        self.sigma, self.seed = sigma, seed
        self.names = [name for name, p in rule.named_parameters() if p.requires_grad]
        self.size = sum(rule.get_parameter(name).numel() for name in self.names)

    def loss(self, truncation: Truncation) -> tuple[Tensor, Tensor]:
        """The pairs' mean losses and accuracies ``[T]``; their gradient is the estimate (eq-rule-pes).

        ValueError: the tasks carry no noise.
        """
        if truncation.noise is None:
            raise ValueError("the tasks carry no noise; give RuleTasks theta=learner.size")
        params = [self.rule.get_parameter(name) for name in self.names]
        theta = nn.utils.parameters_to_vector(params)
        losses, accuracies, noise = [], [], self._noise()
        for t in range(len(truncation)):
            task = truncation[t : t + 1]
            e = self.sigma * torch.randn(self.size, generator=noise).to(theta)
            task.noise["noise"] += e
            networks = ((1, task.phi), (-1, Phi(*task.noise["below"])))
            pair = [self._shifted(sign * e, phi, task) for sign, phi in networks]
            value = (pair[0].loss + pair[1].loss) / 2
            gradient = (pair[0].loss - pair[1].loss) / (2 * self.sigma**2) * task.noise["noise"][0]
            losses.append(value + (theta - theta.detach()) @ gradient)
            accuracies.append((pair[0].accuracy + pair[1].accuracy) / 2)
        return torch.cat(losses), torch.cat(accuracies)

    @torch.no_grad()
    def _shifted(self, e: Tensor, phi: Phi, task: Truncation) -> Readout:
        """Advance one network of a pair with theta + e."""
        theta = [self.rule.get_parameter(name) for name in self.names]
        parts = e.split([p.numel() for p in theta])
        moved = {name: p + d.view_as(p) for name, p, d in zip(self.names, theta, parts)}
        return _advance(lambda *args: torch.func.functional_call(self.rule, moved, args), phi, task)


def _advance(rule, phi: Phi, truncation: Truncation) -> Readout:
    """Run U steps from detached networks, leave phi at their end, and judge it there."""
    end = rule(phi.map(lambda p: p.detach().clone()), truncation.x)
    for old, new in zip(phi.tensors(), end.tensors()):
        old.copy_(new.detach())
    return meta_objective(end, truncation.labeled, truncation.labels, truncation.classes, truncation.extra)
