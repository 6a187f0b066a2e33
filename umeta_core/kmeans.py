"""k-means: greedy k-means++ starts and Lloyd's algorithm, one run at a time, or under many metrics at once on a GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 4096  # rows scored at a time on the CPU, so that their scores stay in the cache; a multiple of 16
BATCH = 1 << 27  # numbers per temporary tensor of the batched k-means (512 MiB of float32)


@dataclass
class Clustering:
    """Which cluster each point is in ``[n]``, the means ``[k, d]`` and the sum of squared distances to them ``[]``.

    From `kmeans_batched` all three have a leading axis of partitions.
    """

    assignment: Tensor
    centroids: Tensor
    inertia: Tensor


def kmeans(
    z: Tensor, k: int, generator: torch.Generator, *, iterations: int = 100, tol: float = 1e-3, restarts: int = 1
) -> Clustering:
    """k-means of points ``[n, d]``: greedy k-means++ start, Lloyd's algorithm, the best of `restarts` runs.

    Args:
        iterations: of Lloyd's algorithm at most.
        tol: stop once no more than this share of the points changes cluster. 0.001 costs about 0.01 % of the
            objective and saves a third of the iterations; 0 goes on to a local optimum.

    Raises:
        ValueError: more clusters than points, or points with NaN or infinity.
    """
    check_points(z, k)
    if z.is_cuda:
        ones = z.new_ones(1, z.shape[1])
        found = kmeans_batched(z, k, ones, generator, iterations=iterations, tol=tol, restarts=restarts)
        return Clustering(found.assignment[0], found.centroids[0], found.inertia[0])
    middle = z.mean(0)
    x = z - middle  # squared distances are differences of squared norms: keep these small
    runs = [lloyd(x, plus_plus(x, k, generator), iterations, tol) for _ in range(restarts)]
    best = min(runs, key=lambda run: run.inertia)
    return Clustering(best.assignment, best.centroids + middle, best.inertia)


def check_points(z: Tensor, k: int) -> None:
    """ValueError: the embeddings are not floats ``[n, d]``, or k is not 1 to n."""
    if z.dim() != 2 or not z.is_floating_point():
        raise ValueError(f"embeddings are floats [n, d]; these are {z.dtype} {list(z.shape)}")
    if not 1 <= k <= len(z):
        raise ValueError(f"k-means with k={k} clusters needs at least as many points; there are {len(z)}: lower k")
    broken = int((~z.isfinite()).any(1).sum())
    if broken:
        raise ValueError(
            f"{broken} of {len(z)} embeddings hold NaN or infinity: leave them out, or train the embedding again with "
            "a lower learning rate"
        )


def trials_per_step(k: int) -> int:
    """Candidates per step of greedy k-means++ (as in scikit-learn)."""
    return 2 + int(math.log(k))


def plus_plus(x: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Greedy k-means++ (Arthur & Vassilvitskii, 2007): k of the points ``[n, d]`` to start from ``[k, d]``.

    Each step draws a few candidates with probability proportional to D^2, the squared distance to the nearest point
    chosen so far, and takes the one that lowers the sum of D^2 most. The distances to the candidates of about four
    steps are computed in one pass over the points, four times faster than in four; since D^2 only falls, candidates
    drawn with an older D^2 are thinned out by rejection to exact draws from the newer one.
    """
    trials = trials_per_step(k)
    xx = x.square().sum(1)
    chosen = torch.randint(len(x), (1,), generator=generator)
    near = squared_distances(x, xx, chosen).squeeze(1)
    while len(chosen) < k:
        pool = draw(near, 4 * trials, generator)
        distance = squared_distances(x, xx, pool)
        bar = torch.rand(len(pool), generator=generator).mul_(near[pool])
        at = 0
        while len(chosen) < k:
            alive = bar[at:] <= near[pool[at:]]
            places = alive.nonzero()[:trials]
            if len(places) < trials:
                break
            end = int(places[-1]) + 1
            lowered = torch.minimum(distance[:, at : at + end], near.unsqueeze(1))
            best = lowered.sum(0).masked_fill_(~alive[:end], math.inf).argmin()
            near = lowered[:, best].contiguous()
            chosen = torch.cat([chosen, pool[at + best].view(1)])
            at += end
    return x[chosen]


def squared_distances(x: Tensor, xx: Tensor, index: Tensor) -> Tensor:
    """Of all points ``[n, d]`` with squared norms xx ``[n]`` to those at `index` ``[m]``: ``[n, m]``."""
    return (xx.unsqueeze(1) - 2 * scores(x, x[index], xx[index] / 2)).clamp_(min=0)


def draw(weights: Tensor, m: int, generator: torch.Generator) -> Tensor:
    """m draws with replacement, with probability proportional to the weights: ``[..., m]`` from ``[..., n]``."""
    total = weights.cumsum(-1, dtype=torch.float64)
    u = torch.rand(*weights.shape[:-1], m, generator=generator, device=weights.device, dtype=torch.float64)
    return torch.searchsorted(total, u * total[..., -1:], right=True).clamp_(max=weights.shape[-1] - 1)


def scores(x: Tensor, c: Tensor, half: Tensor) -> Tensor:
    """``x.c - |c|^2 / 2`` for every pair of rows of x ``[n, d]`` and c ``[k, d]``; largest for the nearest c.

    half: ``|c|^2 / 2`` ``[k]``.
    """
    whole = len(x) // 16 * 16
    if x.device.type != "cpu" or x.dtype != torch.float32 or not whole or not torch.backends.mkldnn.is_available():
        return torch.addmm(half, x, c.t(), beta=-1)
    # The same product as a 1x1 convolution of 16 images whose pixels are the points: torch's convolution (oneDNN) uses
    # AVX-512 on every processor that has it, its matrix product (MKL) not on AMD's. Twice as fast there.
    pixels = x[:whole].view(16, 1, whole // 16, x.shape[1]).permute(0, 3, 1, 2)
    out = torch.conv2d(pixels, c.view(len(c), -1, 1, 1), -half).permute(0, 2, 3, 1).reshape(whole, len(c))
    return out if whole == len(x) else torch.cat([out, torch.addmm(half, x[whole:], c.t(), beta=-1)])


def lloyd(x: Tensor, centroids: Tensor, iterations: int, tol: float) -> Clustering:
    """Minimize ``sum_i |x_i - mu_c(i)|^2`` over assignments c ``[n]`` and means mu ``[k, d]``, in turn. (eq-kmeans)

    Points whose nearest mean cannot have changed are skipped (Hamerly, 2010): an upper bound of the distance to the
    own mean and a lower bound of that to every other are kept up as the means move. The result is Lloyd's own.
    An empty cluster keeps its mean.
    """
    n, k = len(x), len(centroids)
    xx = x.square().sum(1)
    assignment = torch.zeros(n, dtype=torch.long)
    upper, lower = x.new_full((n,), math.inf), x.new_zeros(n)
    for step in range(iterations + 1):
        if step > 0:
            sums = torch.zeros_like(centroids).index_add_(0, assignment, x)
            counts = torch.bincount(assignment, minlength=k).unsqueeze(1)
            means = torch.where(counts > 0, sums / counts, centroids)
            moved = (means - centroids).norm(dim=1)
            centroids = means
            most, which = moved.topk(min(2, k))
            upper += moved[assignment]
            lower -= torch.where(assignment == which[0], most[-1], most[0])  # the most that another mean has moved
        before = assignment.clone()
        half = centroids.square().sum(1) / 2
        for part in (upper > lower).nonzero().squeeze(1).split(BLOCK):
            top, nearest = two_largest(scores(x[part], centroids, half))
            distance = (xx[part].unsqueeze(1) - 2 * top).clamp_(min=0).sqrt_()
            assignment[part], upper[part], lower[part] = nearest, distance[:, 0], distance[:, 1]
        if step > 0 and int((assignment != before).sum()) <= tol * n:
            break
    inertia = (x - centroids[assignment]).square().sum()
    return Clustering(assignment, centroids, inertia)


def two_largest(score: Tensor) -> tuple[Tensor, Tensor]:
    """The two largest numbers of every row ``[n, 2]`` and the place of the largest ``[n]``; overwrites `score`."""
    first, place = score.max(1)
    second = score.scatter_(1, place.unsqueeze(1), -math.inf).amax(1)  # on the CPU two passes are faster than topk
    return torch.stack([first, second], 1), place


def kmeans_batched(
    z: Tensor,
    k: int,
    scalings: Tensor,
    generator: torch.Generator,
    *,
    iterations: int = 100,
    tol: float = 1e-3,
    restarts: int = 1,
) -> Clustering:
    """`kmeans` of ``z * w`` for P scalings w ``[P, d]`` at once, each the best of `restarts` runs: for GPUs.

    No scaled copy of z is made: the metric is put on the centroids, so all partitions share one matrix product. Runs
    go on until the last one has converged. The centroids ``[P, k, d]`` are means of z itself, the inertia ``[P]`` is
    that of ``z * w``. Temporary tensors have at most 2^27 numbers if P * restarts * n * (2 + log k) is below that.
    """
    p, n = len(scalings), len(z)
    middle = z.mean(0)
    x, metric = z - middle, scalings.repeat_interleave(restarts, 0).square()
    xx = metric @ x.square().t()  # [P, n]
    centroids = plus_plus_batched(x, xx, metric, k, generator)
    assignment = torch.zeros(len(metric), n, dtype=torch.long, device=z.device)
    for step in range(iterations + 1):
        if step > 0:
            centroids = means_batched(x, assignment, centroids)
        before = assignment
        assignment, best = assign_batched(x, centroids, metric)
        if step > 0 and int((assignment != before).sum(1).max()) <= tol * n:
            break
    inertia = (xx - 2 * best).clamp_(min=0).sum(1)
    pick = inertia.view(p, restarts).argmin(1) + restarts * torch.arange(p, device=z.device)
    return Clustering(assignment[pick], centroids[pick] + middle, inertia[pick])


def plus_plus_batched(x: Tensor, xx: Tensor, metric: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """`plus_plus` under every metric ``[P, d]``, step by step for all: ``[P, k, d]``; xx: squared norms ``[P, n]``."""
    p, n = xx.shape
    chosen = torch.empty(p, k, dtype=torch.long, device=x.device)
    near = torch.full_like(xx, math.inf)
    for i in range(k):
        candidates = draw(near, trials_per_step(k), generator) if i else _uniform(p, n, generator)
        c = x[candidates]  # [P, trials, d]
        weighted = c * metric.unsqueeze(1)
        distance = (weighted.flatten(0, 1) @ x.t()).view(p, -1, n).mul_(-2)
        distance += xx.unsqueeze(1) + (weighted * c).sum(2, keepdim=True)
        lowered = torch.minimum(distance.clamp_(min=0), near.unsqueeze(1))
        best = lowered.sum(2).argmin(1, keepdim=True)
        near = lowered.gather(1, best.unsqueeze(2).expand(-1, 1, n)).squeeze(1)
        chosen[:, i] = candidates.gather(1, best).squeeze(1)
    return x[chosen]


def _uniform(p, n, generator):
    return torch.randint(n, (p, 1), generator=generator, device=generator.device)


def assign_batched(x: Tensor, centroids: Tensor, metric: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest centroid of each point under each metric, and its score ``x.c - |c|^2 / 2``: ``[P, n]`` both."""
    p, k, _ = centroids.shape
    weighted = centroids * metric.unsqueeze(1)
    half = (weighted * centroids).sum(2).flatten() / 2
    weighted = weighted.flatten(0, 1).t()
    parts = x.split(max(1, BATCH // (p * k)))
    found = [torch.addmm(half, part, weighted, beta=-1).view(-1, p, k).max(2) for part in parts]
    return torch.cat([f.indices for f in found]).t().contiguous(), torch.cat([f.values for f in found]).t()


def means_batched(x: Tensor, assignment: Tensor, centroids: Tensor) -> Tensor:
    """Means of the points of each cluster ``[P, k, d]``; an empty cluster keeps its old one."""
    ones = x.new_ones(1).expand_as(assignment)
    counts = torch.zeros_like(centroids[:, :, 0]).scatter_add_(1, assignment, ones).unsqueeze(2)
    sums = torch.stack([torch.zeros_like(c).index_add_(0, a, x) for a, c in zip(assignment, centroids)])
    return torch.where(counts > 0, sums / counts, centroids)
