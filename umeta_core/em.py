"""Expectation-maximization for mixtures of Gaussians: T mixtures at once, on vectors of which some may be labeled.

Shapes: T sets of n vectors z ``[T, n, d]``, and m labeled ones ``[T, m, d]`` where there are any; K components. Squared
distances are expanded into matrix products, so that no tensor is larger than ``[T, n, max(K, d)]``. Gradients flow
through a mixture's densities to the vectors; fitting has none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import one_of

FLOOR = 1e-4  # least variance of a component in each dimension
EMPTY = 1e-6  # a component that is responsible for less than this many vectors stays where it is


@dataclass
class Mixture:
    """T mixtures of K Gaussians: `weights` ``[T, K]``, `mean` and `variance` ``[T, K, d]``; None: all are 1."""

    weights: Tensor
    mean: Tensor
    variance: Tensor | None = None

    def log_joint(self, z: Tensor) -> Tensor:
        """log of weight times density, ``[T, n, K]``, of vectors ``[T, n, d]``."""
        center = z.detach().mean(1, keepdim=True)  # a square of a difference out of three products loses digits far off
        z = z - center
        scores = _scores(z, Mixture(self.weights, self.mean - center, self.variance)).transpose(1, 2)
        return scores if self.variance is not None else scores - z.square().sum(2, keepdim=True) / 2

    def log_density(self, z: Tensor) -> Tensor:
        """log p(z), ``[T, n]``. (eq-mixture)"""
        return self.log_joint(z).logsumexp(2)

    def responsibilities(self, z: Tensor) -> Tensor:
        """p(component | z), ``[T, n, K]``: the E-step (Meta-GMVAE, eq. 7). (eq-responsibility)"""
        return self.log_joint(z).softmax(2)

    def log_likelihood(self, z: Tensor, labeled: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """What `em` climbs, ``[T]``: the sum of log p(z), and of log p(x, y) over labeled vectors (x, y).

        (eq-em-bound) (eq-em-labeled)
        """
        total = self.log_density(z).sum(1)
        if labeled is None:
            return total
        x, y = labeled
        return total + self.log_joint(x).gather(2, y.unsqueeze(2)).sum((1, 2))


def _scores(z: Tensor, mixture: Mixture) -> Tensor:
    """log of weight times density of vectors near the origin, ``[T, K, n]``; of identity covariance, but for -|z|^2/2.

    A softmax over components does not see what is missing, and is faster on the middle axis. A narrow component needs
    float64: its terms are large and cancel. (eq-em-products)
    """
    mean, variance = mixture.mean, mixture.variance
    constant = mixture.weights.log() - mean.shape[2] / 2 * math.log(2 * math.pi)
    if variance is None:
        return torch.baddbmm((constant - mean.square().sum(2) / 2).unsqueeze(2), mean, z.transpose(1, 2))
    wide, mean, precision = z.double().transpose(1, 2), mean.double(), 1 / variance.double()
    constant = constant.double() - (mean.square() * precision - precision.log()).sum(2) / 2
    linear = torch.baddbmm(constant.unsqueeze(2), mean * precision, wide)
    return torch.baddbmm(linear, precision, wide.square(), alpha=-0.5).to(z.dtype)


def random_start(z: Tensor, k: int, generator: torch.Generator) -> Mixture:
    """K different vectors of each set as means, equal weights, identity covariance (Meta-GMVAE, section 3.2).

    ValueError: fewer vectors than components.
    """
    tasks, n, d = z.shape
    if not 0 < k <= n:
        raise ValueError(f"{k} components cannot start from {n} different vectors; use 1 to {n} components")
    chosen = torch.rand(tasks, n, generator=generator, device=z.device).topk(k, dim=1).indices
    return Mixture(_equal(z, k), z.detach().gather(1, chosen.unsqueeze(2).expand(-1, -1, d)))


def labeled_start(x: Tensor, y: Tensor, k: int) -> Mixture:
    """The means of K classes of labeled vectors x ``[T, m, d]``, y ``[T, m]``; equal weights, identity covariance.

    Meta-GMVAE, section 3.2, meta-test. ValueError: a class without vectors, or labels beyond K (looked for on the CPU).
    """
    _check_labels(x, y, k)
    count, total, _ = _moments(x.detach(), _one_hot(x, y, k))
    if not x.is_cuda and not bool((count > 0).all()):
        raise ValueError(f"a class of {k} has no labeled vector in some set; each needs one to start from")
    return Mixture(_equal(x, k), total / count.unsqueeze(2))


@torch.no_grad()
def em(
    z: Tensor, start: Mixture, iterations: int = 10, *, labeled: tuple[Tensor, Tensor] | None = None,
    covariance="identity", e_step: str | None = None, learn_weights=True, floor=FLOOR,
) -> Mixture:  # fmt: skip
    """Fit T mixtures to z ``[T, n, d]`` in a fixed number of iterations (Meta-GMVAE, eq. 7; with `labeled`, eq. 10).

    It starts from the weights and means of `start`, and from its variances where the E-step has variances.

    The M-step maximizes exactly, also where a variance is held at its floor or an empty component stays where it is.
    So the likelihood under the model of the E-step never falls. (eq-m-step)

    Args:
        labeled: x ``[T, m, d]`` and their components y ``[T, m]``: these keep their labels in the E-step.
        covariance: "identity", or "diagonal": each component has a variance in each dimension.
        e_step: covariance under which vectors are assigned, None: the same. "identity" with diagonal covariance is the
            reference code of Meta-GMVAE, against its equation 10: variances are those of the last M-step alone.
        learn_weights: False: the weights stay those of `start` (Meta-GMVAE, meta-test).
        floor: least variance (reference code: none).

    Raises:
        ValueError: shapes that do not fit or an unknown option; on the CPU also vectors that are not finite and labels
            beyond K. On a GPU nothing waits to look: the mixture is then not finite either.
    """
    e_step = e_step or covariance
    _check(z, start, covariance, e_step, floor, iterations)
    if labeled is not None:
        _check_labeled(*labeled, start.mean.shape[1], z)
    dtype, center = z.dtype, z.mean(1, keepdim=True)
    work = torch.float64 if e_step == "diagonal" else dtype
    z, mixture = (z - center).to(work), Mixture(start.weights.to(work), (start.mean - center).to(work))
    if e_step == "diagonal":
        mixture.variance = start.variance
    known = None
    if labeled is not None:
        x, y = labeled
        known = _moments((x - center).to(work), _one_hot(x, y, start.mean.shape[1]).to(work), covariance == "diagonal")
    for i in range(iterations):
        q = _scores(z, mixture).softmax(1)
        spread = covariance == "diagonal" and (e_step == "diagonal" or i == iterations - 1)
        mixture = _m_step(z, q, known, mixture, spread, learn_weights, floor)
    variance = None if mixture.variance is None else mixture.variance.to(dtype)
    return Mixture(mixture.weights.to(dtype), mixture.mean.to(dtype) + center, variance)


def _m_step(z: Tensor, q: Tensor, known, old: Mixture, spread: bool, learn_weights: bool, floor: float) -> Mixture:
    """The mixture that responsibilities q ``[T, K, n]`` and the sums `known` over labeled vectors imply."""
    count, total, squares = _moments(z, q, spread)
    if known is not None:
        count, total = count + known[0].to(count.dtype), total + known[1].to(count.dtype)
        squares = squares + known[2] if spread else None
    weights = count / count.sum(1, keepdim=True) if learn_weights else old.weights
    some, least = (count > EMPTY).unsqueeze(2), count.clamp_min(EMPTY).unsqueeze(2)
    mean = torch.where(some, total / least, old.mean)
    if not spread:
        return Mixture(weights, mean)
    variance = torch.where(some, squares / least - mean.square(), 1 if old.variance is None else old.variance)
    return Mixture(weights, mean, variance.clamp_min(floor))


def _moments(z: Tensor, q: Tensor, squares: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sums of q ``[T, K]``, of q z ``[T, K, d]`` and of q z^2: all in float64 then, as variances are differences."""
    if squares:
        z, q = z.double(), q.double()
    return q.sum(2), q @ z, q @ z.square() if squares else None


def _one_hot(x: Tensor, y: Tensor, k: int) -> Tensor:
    """``[T, K, m]``."""
    return (y.unsqueeze(1) == torch.arange(k, device=y.device).unsqueeze(1)).to(x.dtype)


def _equal(z: Tensor, k: int) -> Tensor:
    return z.new_full((len(z), k), 1 / k)


def _check(z: Tensor, start: Mixture, covariance: str, e_step: str, floor: float, iterations: int) -> None:
    one_of("covariance", covariance, ("identity", "diagonal"))
    one_of("e_step", e_step, ("identity", "diagonal"))
    if covariance == "identity" and e_step == "diagonal":
        raise ValueError("e_step='diagonal' needs covariance='diagonal': there are no variances to assign with")
    if floor <= 0:
        raise ValueError(f"floor={floor} is not a variance; use a number above 0")
    if iterations < 0:
        raise ValueError(f"iterations={iterations} is not a number of iterations; use 0 or more")
    if z.dim() != 3 or start.mean.dim() != 3 or z.shape[0] != len(start.mean) or z.shape[2] != start.mean.shape[2]:
        raise ValueError(f"vectors of shape {tuple(z.shape)} and means of shape {tuple(start.mean.shape)} do not fit; "
                         "use [T, n, d] and [T, K, d]")  # fmt: skip
    variance = start.mean if start.variance is None else start.variance
    if start.weights.shape != start.mean.shape[:2] or variance.shape != start.mean.shape:
        shapes = ", ".join(str(tuple(s.shape)) for s in (start.weights, start.mean, variance))
        raise ValueError(f"weights, means and variances of shapes {shapes} are not of one mixture; use [T, K], "
                         "[T, K, d] and [T, K, d]")  # fmt: skip
    if not z.shape[1]:
        raise ValueError("no unlabeled vectors; the mixture of labeled ones alone is `labeled_start`")
    _check_finite(z)


def _check_finite(z: Tensor) -> None:
    if not z.is_cuda and not torch.isfinite(z).all():
        bad = int((~torch.isfinite(z)).any(2).sum())
        raise ValueError(f"{bad} of {z.shape[0] * z.shape[1]} vectors are not finite; no mixture fits them")


def _check_labeled(x: Tensor, y: Tensor, k: int, z: Tensor) -> None:
    _check_labels(x, y, k)
    if (x.shape[0], x.shape[2]) != (z.shape[0], z.shape[2]):
        raise ValueError(f"labeled vectors of shape {tuple(x.shape)} and unlabeled ones of shape {tuple(z.shape)} do "
                         "not fit; use [T, m, d] and [T, n, d]")  # fmt: skip
    _check_finite(x)


def _check_labels(x: Tensor, y: Tensor, k: int) -> None:
    if x.dim() != 3 or y.shape != x.shape[:2]:
        raise ValueError(f"labeled vectors of shape {tuple(x.shape)} and labels of shape {tuple(y.shape)} do not fit; "
                         "use [T, m, d] and [T, m]")  # fmt: skip
    if not y.is_cuda and y.numel() and not 0 <= int(y.min()) <= int(y.max()) < k:
        raise ValueError(f"labels from {int(y.min())} to {int(y.max())}, but the components are 0 to {k - 1}")
