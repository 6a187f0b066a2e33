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
from .losses import cross_entropy
from .protonets import prototypes, squared_distances

GROUP = 250_000  # numbers in the n x n matrices of the tasks solved together on a CPU: measured, they stay in the cache


def _embeddings(episodes: Episodes) -> tuple[Tensor, Tensor, Tensor]:
    """Support ``[T, N*K, d]``, its labels ``[T, N*K]`` and queries ``[T, N*Q, d]``, checked to be finite."""
    xs, ys, xq, _ = episodes.flat()
    xs, xq = xs.flatten(2), xq.flatten(2)
    if not (xs.sum() + xq.sum()).isfinite():  # one pass over the numbers; they are counted only if something is wrong
        bad = [int((~x.isfinite()).any(2).sum()) for x in (xs, xq)]
        if any(bad):
            raise ValueError(
                f"{bad[0]} of {xs[..., 0].numel()} support and {bad[1]} of {xq[..., 0].numel()} query embeddings hold "
                "NaN or infinite values"
            )
    return xs, ys, xq


def _centered(xs: Tensor, xq: Tensor) -> tuple[Tensor, Tensor]:
    """Both minus the task's mean support embedding: distances stay the same, their rounding errors shrink."""
    mean = xs.mean(1, keepdim=True)
    return xs - mean, xq - mean


def _inverse(xs: Tensor, strength: float) -> Tensor:
    """``(K + strength I)^-1`` ``[T, n, n]``, K the Gram matrix of the points ``[T, n, d]``; always in float64."""
    k = xs.double() @ xs.double().mT
    k.diagonal(dim1=1, dim2=2).add_(strength)
    return torch.cholesky_inverse(torch.linalg.cholesky(k))


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
        xs, xq = _centered(xs, xq)
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
        xs, _, xq = _embeddings(episodes)
        xs, xq = _centered(xs, xq)
        return -squared_distances(xq, prototypes(xs.unflatten(1, (episodes.way, episodes.shot))))


@dataclass(frozen=True)
class Ridge:
    """Least squares on one-hot labels with weight decay `strength` and a free intercept. (eq-ridge)

    With centered support embeddings X, Gram matrix ``K = X X'`` and one-hot labels Y, whose mean is 1/N: ``W = X' a``,
    ``a = (K + strength I)^-1 (Y - 1/N)``, scores ``x W + 1/N``. The system is n x n, n = N*K images, instead of d x d.
    Not among the paper's baselines. Decides as scikit-learn's RidgeClassifier(alpha=strength).

    Raises:
        ValueError: `strength` is not positive.
    """

    strength: float = 1.0

    def __post_init__(self):
        if not self.strength > 0:
            raise ValueError(f"strength={self.strength}: the weight decay of ridge regression must be positive")

    @torch.no_grad()
    def predict(self, episodes: Episodes) -> Tensor:
        """Regressed one-hot labels ``[T, N*Q, N]``."""
        xs, ys, xq = _embeddings(episodes)
        mean = xs.mean(1, keepdim=True)
        xs = xs - mean
        y = F.one_hot(ys, episodes.way).double() - 1 / episodes.way
        w = xs.mT @ (_inverse(xs, self.strength) @ y).to(xs.dtype)
        return xq @ w - mean @ w + 1 / episodes.way


@dataclass(frozen=True, eq=False)
class LinearClassifier:
    """Multinomial logistic regression with weight decay and a free intercept (CACTUs, 4.1: `c` is tuned).

    The minimum of ``c * sum of cross-entropies + |W|^2 / 2``, as scikit-learn's LogisticRegression(C=c) from three
    classes on. For two classes that fits one weight vector in place of two: the same decisions at C = 2c. The reference
    code asks for the multinomial form there too, as here.

    All tasks at once (eq-kernel-logistic): with centered support embeddings X the best weights are ``W = X' a``, so
    the support logits are ``f = K a + b`` with the n x n Gram matrix K, and the negative gradient in W is X' r with
    ``r = c (Y - softmax(f)) - a``. Conjugate gradients (Polak-Ribiere) then need one small product ``K r`` per step.
    Along a direction that moves the logits by v, the third derivative of the loss is at most the second times m, the
    range of v, so that with Newton's step s the step ``log(1 + m s) / m`` never overshoots (as in Bach, 2010).

    The objective minus ``|W|^2 / 2`` is convex, hence ``|W - optimum| <= |gradient|``, and a task is done when this
    bound is below ``tolerance |W|``. scikit-learn's default stops much earlier where c times the squared length of the
    embeddings is large; its decisions differ accordingly.

    Args:
        c: inverse strength of the weight decay.
        deviation: ``[d]``, by which every feature is divided first: in Meta-GMVAE's LR (SimCLR) its standard deviation
            over the meta-training images, as of scikit-learn's StandardScaler (reference code, not in the paper). Its
            mean would change nothing, as the intercept is free.
        tolerance: largest relative error of the weights.
        steps: a warning says so if some task needs more.

    Raises:
        ValueError: `c` is not positive.
    """

    c: float = 1.0
    deviation: Tensor | None = None
    tolerance: float = 1e-4
    steps: int = 2000

    def __post_init__(self):
        if not self.c > 0:
            raise ValueError(f"c={self.c}: the inverse strength of the weight decay must be positive")

    @torch.no_grad()
    def predict(self, episodes: Episodes) -> Tensor:
        """Query logits ``[T, N*Q, N]``."""
        xs, ys, xq = _embeddings(episodes)
        if self.deviation is not None:
            xs, xq = xs / self.deviation, xq / self.deviation
        mean = xs.mean(1, keepdim=True)
        xs, y = xs - mean, F.one_hot(ys, episodes.way).to(xs.dtype)
        size = len(xs) if xs.is_cuda else max(1, GROUP // xs.shape[1] ** 2)
        solved = [self._solve(*group) for group in zip(xs.split(size), y.split(size))]
        w, b = (torch.cat(part) for part in zip(*solved))
        return xq @ w + (b - mean @ w)

    def _solve(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Weights ``[T, d, N]`` and intercepts ``[T, 1, N]`` from points ``[T, n, d]`` and labels ``[T, n, N]``."""
        n, way = y.shape[1:]
        length = x.square().sum(2).mean(1)[:, None, None]  # squared
        rate = length + way / (self.c * n)  # of the intercepts: about one over their curvature
        noise = self.c * (n * way * rate).sqrt()  # times eps: what rounding makes of a zero gradient
        coarse = torch.finfo(x.dtype).eps * (noise * length.sqrt()).max() > 10 * self.tolerance
        dtype = torch.float64 if coarse else x.dtype
        k, y, rate, noise = x.to(dtype) @ x.to(dtype).mT, y.to(dtype), rate.to(dtype), torch.finfo(dtype).eps * noise
        total = lambda t: t.sum((1, 2), keepdim=True)  # noqa: E731

        # a, K a and b; the direction in each; the gradient of the step before
        a = ka = d = kd = kr_before = torch.zeros_like(y)
        b = e = g_before = torch.zeros_like(y[:, :1])
        slope_before = torch.full_like(rate, torch.inf)
        for step in range(1, self.steps + 1):
            p = (ka + b).softmax(2)
            r = self.c * (y - p) - a
            kr, g = k @ r, rate * self.c * (y - p).sum(1, keepdim=True)
            slope = total(r * kr) + total(g * g) / rate  # the squared gradient
            going = slope > self.tolerance**2 * total(a * ka) + noise**2
            if step % 5 == 0 and not going.any():
                break
            keep = slope - total(r * kr_before) - total(g * g_before) / rate
            keep = (keep / slope_before.clamp_min(1e-30)).clamp_min(0)
            d, kd, e = r + keep * d, kr + keep * kd, g + keep * e
            slope_before, kr_before, g_before = slope, kr, g

            v = kd + e
            m = v.amax((1, 2), keepdim=True) - v.amin((1, 2), keepdim=True)
            curve = self.c * total(p * (v - (p * v).sum(2, keepdim=True)).square()) + total(d * kd)
            newton = ((self.c * total((y - p) * v) - total(d * ka)) / curve).clamp_min(0)
            s = torch.where(going, torch.log1p(m * newton) / m, 0)  # a finished task rests: its numbers are rounding
            a, ka, b = a + s * d, ka + s * kd, b + s * e
        else:
            warnings.warn(
                f"logistic regression with c={self.c}: the weights of {int(going.sum())} of {len(x)} tasks may be off "
                f"by more than {self.tolerance} of their size after {self.steps} steps",
                stacklevel=3,
            )
        return x.mT @ a.to(x.dtype), b.to(x.dtype)


@dataclass(frozen=True, kw_only=True, eq=False)
class MLPClassifier:
    """One hidden layer of rectified units with dropout, trained from scratch on every task (CACTUs, section 4).

    Full-batch Adam, Glorot-uniform weights, zero biases: Keras' defaults (reference code, not in the paper). The tasks
    train side by side: every weight has a leading task axis, and Adam never mixes weights.

    Args:
        generator: initial weights and dropout, on the device of the episodes. Its state moves on, so that no two tasks
            share them: build the learner anew to repeat a result.
        hidden: units.
        dropout: share of hidden units left out in a training step; tuned in the paper.
        epochs: training steps; with `stop_on_query` at most so many. 500 as in the reference code: on Omniglot's
            validation tasks accuracy (whitened pixels, raw pixels) still rises or has settled there.
        stop_on_query: end a task's training when the loss **of its query labels** has not improved for two epochs, and
            answer with the weights of that moment. It leaks the answers and is here because the published numbers were
            made so (reference code, not in the paper).

    Raises:
        ValueError: `dropout` outside [0, 1), or less than one unit or epoch.
    """

    generator: torch.Generator
    hidden: int = 128
    dropout: float = 0.5
    epochs: int = 500
    learning_rate: float = 1e-3
    stop_on_query: bool = False

    def __post_init__(self):
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} is not in [0, 1)")
        if self.hidden < 1 or self.epochs < 1:
            raise ValueError(f"hidden={self.hidden}, epochs={self.epochs}: both must be at least 1")

    def initial(self, tasks: int, d: int, way: int, like: Tensor) -> list[Tensor]:
        """``[T, d, hidden]``, ``[T, 1, hidden]``, ``[T, hidden, N]``, ``[T, 1, N]``; type and device of `like`."""
        weights = []
        for rows, columns in ((d, self.hidden), (self.hidden, way)):
            w = like.new_empty(tasks, rows, columns)
            bound = (6 / (rows + columns)) ** 0.5
            weights += [w.uniform_(-bound, bound, generator=self.generator), like.new_zeros(tasks, 1, columns)]
        return [w.requires_grad_() for w in weights]

    @torch.no_grad()
    def predict(self, episodes: Episodes) -> Tensor:
        """Query logits ``[T, N*Q, N]``."""
        xs, ys, xq = _embeddings(episodes)
        weights = self.initial(len(xs), xs.shape[2], episodes.way, xs)
        adam = torch.optim.Adam(weights, self.learning_rate, eps=1e-7, fused=True)  # Keras' eps
        watch = _Patience(episodes.labels) if self.stop_on_query else None
        for _ in range(self.epochs):
            adam.zero_grad()
            with torch.enable_grad():
                cross_entropy(self._forward(weights, xs, self.dropout), ys).sum().backward()
            adam.step()
            if watch is not None and watch.done(self._forward(weights, xq)):
                break
        return watch.answer if watch is not None else self._forward(weights, xq)

    def _forward(self, weights: list[Tensor], x: Tensor, dropout: float = 0.0) -> Tensor:
        w1, b1, w2, b2 = weights
        h = torch.relu(x @ w1 + b1)
        if dropout:
            h = h * (torch.rand(h.shape, generator=self.generator, device=h.device) >= dropout) / (1 - dropout)
        return h @ w2 + b2


class _Patience:
    """Early stopping, each task by itself: `answer` ``[T, n, N]`` keeps the logits of the epoch at which it ended."""

    def __init__(self, y: Tensor, patience: int = 2):
        self.y, self.patience, self.answer = y, patience, None
        self.best = torch.full(y.shape[:1], torch.inf, device=y.device)
        self.waited = torch.zeros_like(self.best)

    def done(self, logits: Tensor) -> bool:
        """Take the logits of one more epoch; True when every task has ended."""
        running = self.waited < self.patience
        self.answer = logits if self.answer is None else torch.where(running[:, None, None], logits, self.answer)
        loss = cross_entropy(logits, self.y)
        self.waited = torch.where(running & (loss < self.best), 0, self.waited + 1)
        self.best = torch.minimum(self.best, loss)
        return not (self.waited < self.patience).any()


@dataclass(frozen=True, eq=False)
class ClusterMatching:
    """Clusters of the training embeddings, named by the support images in them (CACTUs, section 4). (eq-matching)

    Each of the k clusters takes the plurality label of the support images closest to its centroid; a query takes the
    label of the closest centroid that has one. Equal counts go to the lowest label (as in the reference code; labels
    are a random permutation), equal distances to the earlier centroid.

    Args:
        centroids: ``[k, d]``, of clusters of the *training* images.

    Raises:
        ValueError: centroids that are not a finite matrix, or (in `predict`) embeddings of another dimension.
    """

    centroids: Tensor

    def __post_init__(self):
        if self.centroids.dim() != 2 or not self.centroids.isfinite().all():
            raise ValueError(f"centroids {list(self.centroids.shape)} must be a finite matrix [k, d]")

    @torch.no_grad()
    def predict(self, episodes: Episodes) -> Tensor:
        """One-hot decisions ``[T, N*Q, N]``."""
        xs, ys, xq = _embeddings(episodes)
        k, d = self.centroids.shape
        if xs.shape[2] != d:
            raise ValueError(f"the embeddings have {xs.shape[2]} dimensions but the centroids {d}")
        mean = self.centroids.mean(0)
        centroids = (self.centroids - mean).unsqueeze(0)
        home = squared_distances(xs - mean, centroids).argmin(2)  # [T, N*K]
        votes = xs.new_zeros(len(xs), k * episodes.way)
        votes.scatter_add_(1, home * episodes.way + ys, torch.ones_like(votes[:, :1]).expand(ys.shape))
        votes = votes.unflatten(1, (k, episodes.way))
        unnamed = votes.sum(2) == 0
        distances = squared_distances(xq - mean, centroids).masked_fill_(unnamed.unsqueeze(1), torch.inf)
        label = votes.argmax(2).gather(1, distances.argmin(2))
        return F.one_hot(label, episodes.way).to(xs.dtype)


def tune(
    make: Callable, values: Iterable, source, *, way: int, shot: int, query: int = 5, tasks: int = 1000, seed: int = 0,
    max_images: int = 2000,
) -> tuple[object, dict]:  # fmt: skip
    """Choose a setting on labeled validation tasks, as the paper does for its baselines (CACTUs, 4.1).

    Args:
        make: maps a value to a learner, such as ``lambda c: LinearClassifier(c=c)``.
        values: hashable candidates; all see the same tasks, and the first wins a tie. Numbers of neighbors must not
            exceed way * shot: `NearestNeighbors` refuses, rather than be compared with less than it asks for.
        source: tasks of the *validation* classes, with labels.
        max_images: see `evaluate`.

    Returns:
        The best value and ``{value: mean accuracy in percent}``, to be recorded with the result.

    Raises:
        ValueError: no values.
    """
    protocol = {"way": way, "shot": shot, "query": query, "tasks": tasks, "seed": seed, "max_images": max_images}
    accuracies = {value: evaluate(make(value), source, **protocol).mean for value in values}
    if not accuracies:
        raise ValueError("there are no values to choose from")
    return max(accuracies, key=accuracies.get), accuracies
