"""Classifiers on embeddings: what CACTUs has to beat. All tasks of a batch are solved in one computation."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .episodes import Episodes
from .evaluation import evaluate
from .maml import cross_entropy
from .protonets import prototypes, squared_distances


def _embeddings(episodes: Episodes) -> tuple[Tensor, Tensor, Tensor]:
    """Support ``[T, N*K, d]``, its labels ``[T, N*K]`` and queries ``[T, N*Q, d]``, checked to be finite."""
    xs, ys, xq, _ = episodes.flat()
    xs, xq = xs.flatten(2), xq.flatten(2)
    if not (xs.sum() + xq.sum()).isfinite():  # one pass over the numbers; the count only when something is wrong
        bad = [int((~x.isfinite()).any(2).sum()) for x in (xs, xq)]
        raise ValueError(
            f"{bad[0]} of {xs[..., 0].numel()} support and {bad[1]} of {xq[..., 0].numel()} query embeddings hold NaN "
            "or infinite values"
        )
    return xs, ys, xq


def _centred(xs: Tensor, xq: Tensor) -> tuple[Tensor, Tensor]:
    """Both minus the mean of the task's support set: no classifier here changes, rounding errors shrink."""
    mean = xs.mean(1, keepdim=True)
    return xs - mean, xq - mean


def _smoother(xs: Tensor, strength: float) -> Tensor:
    """``(K + strength I)^-1`` ``[T, n, n]`` for the Gram matrix K of centred points ``[T, n, d]``, made in float64."""
    xs = xs.double()
    ridge = strength * torch.eye(xs.shape[1], dtype=xs.dtype, device=xs.device)
    return torch.cholesky_inverse(torch.linalg.cholesky(xs @ xs.mT + ridge))


@dataclass(frozen=True)
class NearestNeighbors:
    """Vote of the closest support embeddings, Euclidean distance (CACTUs, 4.1: `neighbors` is tuned).

    Scores are votes. Equal votes go to the lowest label, as in scikit-learn's KNeighborsClassifier with uniform
    weights; since labels are a random permutation, that favors nobody. Among support embeddings at exactly the same
    distance, which one counts as closer is left to ``torch.topk``, as it is left to the search in scikit-learn.

    Raises:
        ValueError: fewer than one neighbor, or (in `predict`) more than there are support embeddings.
    """

    neighbors: int = 1

    def __post_init__(self):
        if self.neighbors < 1:
            raise ValueError(f"neighbors={self.neighbors}: a vote needs at least one")

    @torch.no_grad()
    def predict(self, episodes: Episodes) -> Tensor:
        """Votes ``[T, N*Q, N]``."""
        xs, _, xq = _embeddings(episodes)
        if self.neighbors > xs.shape[1]:
            raise ValueError(
                f"{self.neighbors} neighbors of {xs.shape[1]} support embeddings ({episodes.way}-way "
                f"{episodes.shot}-shot); take at most {xs.shape[1]}"
            )
        xs, xq = _centred(xs, xq)
        nearest = squared_distances(xq, xs).topk(self.neighbors, dim=2, largest=False).indices
        return F.one_hot(nearest // episodes.shot, episodes.way).sum(2).to(xs.dtype)


@dataclass(frozen=True)
class NearestMean:
    """The closest class mean of the support embeddings: a prototypical network without training. (eq-prototype)

    Not among the paper's baselines. Equals scikit-learn's NearestCentroid.
    """

    @torch.no_grad()
    def predict(self, episodes: Episodes) -> Tensor:
        """Negative squared distances ``[T, N*Q, N]`` to the class means."""
        xs, xq = _centred(*_embeddings(episodes)[::2])
        return -squared_distances(xq, prototypes(xs.unflatten(1, (episodes.way, episodes.shot))))


@dataclass(frozen=True)
class Ridge:
    """Least squares on one-hot labels with weight decay `strength` and a free intercept. (eq-ridge)

    With centred support embeddings X, Gram matrix ``K = X X'`` and one-hot labels Y: ``a = (K + strength I)^-1
    (Y - mean Y)``, scores of x: ``(X x)' a + mean Y``; an n x n system for n = N*K images instead of d x d.
    Not among the paper's baselines. Same decisions as scikit-learn's RidgeClassifier(alpha=strength).
    """

    strength: float = 1.0

    def __post_init__(self):
        if self.strength <= 0:
            raise ValueError(f"strength={self.strength}: ridge regression needs a positive weight decay")

    @torch.no_grad()
    def predict(self, episodes: Episodes) -> Tensor:
        """Regressed one-hot labels ``[T, N*Q, N]``."""
        xs, ys, xq = _embeddings(episodes)
        xs, xq = _centred(xs, xq)
        y = F.one_hot(ys, episodes.way).to(xs.dtype)
        a = (_smoother(xs, self.strength) @ (y - 1 / episodes.way).double()).to(xs.dtype)
        return xq @ (xs.mT @ a) + 1 / episodes.way


@dataclass(frozen=True)
class LinearClassifier:
    """Multinomial logistic regression with weight decay and a free intercept (CACTUs, 4.1: `c` is tuned).

    The minimum of ``c * sum of cross-entropies + |W|^2 / 2``, which is what scikit-learn's LogisticRegression(C=c)
    finds for three and more classes. For two it fits one weight vector instead of two, which is this with half the
    c; the reference code asks for the multinomial form there too, as here.

    All tasks at once (eq-boehning): the weights are ``W = X' a`` for centred support embeddings X, so logits are ``f =
    K a + b`` with the n x n Gram matrix K. The curvature of cross-entropy in f is at most 1/2 (Boehning, 1992), so with
    ``z = f - 2 (softmax(f) - Y)`` the loss lies below ``c/4 |K a + b - z|^2 + |W|^2 / 2`` and touches it at f. That is
    ridge regression on z: ``b = mean z``, ``a = (K + 2/c I)^-1 (z - b)``, one matrix per task for all steps, and ``f
    <- S z`` is one small matrix product. Nesterov's momentum with restarts does the rest.

    Args:
        c: inverse strength of the weight decay.
        tolerance: stop when no logit of a support image moves by more than this in a step.
        steps: give up after so many, with a warning.
    """

    c: float = 1.0
    tolerance: float = 1e-5
    steps: int = 10_000

    def __post_init__(self):
        if self.c <= 0:
            raise ValueError(f"c={self.c}: the inverse strength of the weight decay must be positive")

    @torch.no_grad()
    def predict(self, episodes: Episodes) -> Tensor:
        """Query logits ``[T, N*Q, N]``."""
        xs, ys, xq = _embeddings(episodes)
        xs, xq = _centred(xs, xq)
        inverse = _smoother(xs, 2 / self.c)
        smooth = 1 / xs.shape[1] - 2 / self.c * inverse
        smooth.diagonal(dim1=1, dim2=2).add_(1)  # K (K + 2/c I)^-1 = I - 2/c (K + 2/c I)^-1, and the mean
        z = self._targets(smooth.to(xs.dtype), F.one_hot(ys, episodes.way).to(xs.dtype)).double()
        b = z.mean(1, keepdim=True)
        a = (inverse @ (z - b)).to(xs.dtype)
        return xq @ (xs.mT @ a) + b.to(xs.dtype)

    def _targets(self, smooth: Tensor, y: Tensor) -> Tensor:
        """The z at which ``f = S z`` is the optimum ``[T, n, N]``."""
        f = look = torch.zeros_like(y)
        t = torch.ones_like(y[:, :1, :1])
        for step in range(1, self.steps + 1):
            z = look - 2 * (look.softmax(2) - y)
            new = smooth @ z
            move = new - f
            if step % 10 == 0 and (largest := move.abs().max()) < self.tolerance:
                return z
            back = ((look - new) * move).sum((1, 2), keepdim=True) > 0  # momentum overshoots: restart it
            t = torch.where(back, 1.0, t)
            t_next = (1 + (1 + 4 * t * t).sqrt()) / 2
            look = new + (t - 1) / t_next * move
            f, t = new, t_next
        warnings.warn(f"c={self.c}: logits still move by {largest:.1e} after {self.steps} steps", stacklevel=3)
        return z
