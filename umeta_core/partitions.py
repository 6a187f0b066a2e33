"""Partitions of unlabeled images into classes to practice on: clusters of an embedding, hyperplane cells, chance.

A partition is an int tensor ``[n]`` of class indices, -1 for images left out; a stack of P partitions is ``[P, n]``.
`umeta_core.episodes.PartitionTasks` draws tasks from it.
"""

from __future__ import annotations

import math
import sys
import time
import warnings
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


def random_scalings(partitions: int, d: int, generator: torch.Generator) -> Tensor:
    """Factors w ``[P, d]`` of the d axes of an embedding: partition p has the metric ``A_p = diag(w_p)^2``. (eq-metric)

    The first partition is unscaled, the others are U(0, 1) (reference code, not in the paper).
    """
    w = torch.rand(partitions, d, generator=generator, device=generator.device)
    w[0] = 1
    return w


def cluster_partitions(
    z: Tensor,
    k: int,
    partitions: int,
    generator: torch.Generator,
    *,
    least: int,
    way: int = 1,
    enough: float = 0.75,
    sizable: int | None = None,
    restarts: int | None = None,
    reruns: int = 10,
    iterations: int = 100,
    tol: float = 1e-3,
    progress: bool = True,
) -> Tensor:
    """P partitions by k-means, each under another random metric ``[P, n]`` (CACTUs, Alg. 1 and App. E.3).

    A clustering with too many small clusters is done again from another start, then small clusters become -1
    (reference code, not in the paper). The rule of the MAML code is the default; the ProtoNets code has
    ``enough=0.8, sizable=least, restarts=3``; pixel clusters have ``enough=0, restarts=1``.

    Args:
        z: embeddings ``[n, d]``; the generator is on their device.
        least: R = K + Q; smaller clusters are left out of the partition.
        way: a partition needs at least this many clusters of R members.
        enough: more than this share of the k clusters must be sizable; 0 for no such rule.
        sizable: from how many members a cluster counts as such (None: R + 1).
        restarts: k-means runs per partition, of which the best is kept (None: 10 for P = 1, else 1).
        reruns: how often a partition with too many small clusters is clustered again at most; then the attempt with
            the most sizable clusters is kept, with a warning.
        iterations, tol: as in `kmeans`.

    Returns:
        int16 (int32 from k = 32768 on): 100 partitions of 22,000 points are 4 MB.

    Raises:
        ValueError: as `kmeans`; no partition asked for; too few points for that many sizable clusters; or a partition
            has fewer than `way` clusters of R members.
    """
    check(z, k)
    if partitions < 1:
        raise ValueError(f"{partitions} partitions asked for; at least one")
    restarts = (10 if partitions == 1 else 1) if restarts is None else restarts
    sizable = least + 1 if sizable is None else sizable
    wanted = _sizable_wanted(len(z), k, enough, sizable)
    scalings = random_scalings(partitions, z.shape[1], generator)
    together = max(1, BATCH // (len(z) * restarts * _trials(k))) if z.is_cuda else 1

    def attempt(which):
        """New clusterings of some partitions, and how many sizable clusters each has."""
        chunks = _watched(which.split(together), progress)
        found = [_cluster(z, k, scalings[c], generator, iterations, tol, restarts).to(label_type(k)) for c in chunks]
        labels = torch.cat(found)
        return labels, (class_sizes(labels, k) >= sizable).sum(1)

    labels, count = _best_attempts(attempt, torch.arange(partitions, device=z.device), wanted, reruns)
    if int(count.min()) < wanted:
        warnings.warn(
            f"{int((count < wanted).sum())} of {partitions} partitions have at most {100 * enough:g} % clusters of "
            f"{sizable} or more members after {reruns} re-runs (worst: {int(count.min())} of {k}); the best attempts "
            "are kept. Fewer clusters would be larger.",
            stacklevel=2,
        )
    return prune(labels, k, least, way)


def _best_attempts(attempt, todo: Tensor, wanted: int, reruns: int) -> tuple[Tensor, Tensor]:
    """Labels ``[P, n]`` with the most sizable clusters, and how many ``[P]``; fewer than `wanted` is tried again."""
    labels, count = attempt(todo)
    for _ in range(reruns):
        todo = (count < wanted).nonzero().squeeze(1)
        if not len(todo):
            break
        again, more = attempt(todo)
        better = more > count[todo]
        labels[todo[better]], count[todo[better]] = again[better], more[better]
    return labels, count


def _sizable_wanted(n, k, enough, sizable) -> int:
    """How many sizable clusters are more than the share `enough`; ValueError if n points can never make them."""
    wanted = math.floor(enough * k) + 1 if enough > 0 else 0
    if wanted * sizable > n:
        raise ValueError(
            f"more than {100 * enough:g} % of {k} clusters with {sizable} or more members need {wanted * sizable} "
            f"points; there are {n}: lower k"
        )
    return wanted


def _cluster(z, k, scalings, generator, iterations, tol, restarts) -> Tensor:
    """Assignments ``[P, n]`` under P scalings: on a GPU at once, on a CPU one after the other with early stopping."""
    if z.is_cuda:
        return kmeans_batched(z, k, scalings, generator, iterations=iterations, tol=tol, restarts=restarts).assignment
    settings = dict(iterations=iterations, tol=tol, restarts=restarts)
    return torch.stack([kmeans(z * w, k, generator, **settings).assignment for w in scalings])


def prune(labels: Tensor, k: int, least: int, way: int) -> Tensor:
    """Set clusters with fewer than `least` members to -1, in place ``[P, n]``.

    Raises:
        ValueError: a partition has fewer than `way` clusters of that size.
    """
    sizes = class_sizes(labels, k)
    usable = (sizes >= least).sum(1)
    if int(usable.min()) < way:
        p = int(usable.argmin())
        raise ValueError(
            f"partition {p} has {int(usable[p])} clusters of at least {least} members, but {way} are needed (its "
            f"largest has {int(sizes[p].max())}; {labels.shape[1]} points in {k} clusters): use a smaller k"
        )
    small = (sizes < least).gather(1, labels.long().clamp(min=0))
    return labels.masked_fill_(small, -1)


def class_sizes(labels: Tensor, k: int) -> Tensor:
    """How often each of the classes 0..k-1 occurs in each partition: ``[P, k]`` from ``[P, n]``; -1 is not counted."""
    rows = torch.arange(len(labels), device=labels.device).unsqueeze(1) * (k + 1)
    tally = torch.bincount((rows + labels + 1).flatten(), minlength=len(labels) * (k + 1))
    return tally.view(len(labels), k + 1)[:, 1:]


def label_type(k: int) -> torch.dtype:
    return torch.int16 if k < 1 << 15 else torch.int32


# k-means


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
    check(z, k)
    if z.is_cuda:
        ones = z.new_ones(1, z.shape[1])
        found = kmeans_batched(z, k, ones, generator, iterations=iterations, tol=tol, restarts=restarts)
        return Clustering(found.assignment[0], found.centroids[0], found.inertia[0])
    middle = z.mean(0)
    x = z - middle  # squared distances are differences of squared norms: keep these small
    runs = [lloyd(x, plus_plus(x, k, generator), iterations, tol) for _ in range(restarts)]
    best = min(runs, key=lambda run: run.inertia)
    return Clustering(best.assignment, best.centroids + middle, best.inertia)


def check(z: Tensor, k: int) -> None:
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


def _trials(k: int) -> int:
    """Candidates per step of greedy k-means++ (as in scikit-learn)."""
    return 2 + int(math.log(k))


def plus_plus(x: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Greedy k-means++ (Arthur & Vassilvitskii, 2007): k of the points ``[n, d]`` to start from ``[k, d]``.

    Each step draws a few candidates with probability proportional to D^2, the squared distance to the nearest point
    chosen so far, and takes the one that lowers the sum of D^2 most. The distances to the candidates of about four
    steps are computed in one pass over the points, four times faster than in four; since D^2 only falls, candidates
    drawn with an older D^2 are thinned out by rejection to exact draws from the newer one.
    """
    trials = _trials(k)
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
        candidates = draw(near, _trials(k), generator) if i else _uniform(p, n, generator)
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


# Hyperplanes, chance, pixels


def signed_distances(z: Tensor, normals: Tensor, points: Tensor) -> Tensor:
    """``n . (z - z0) / |n|`` of points ``[n, d]`` to planes with normals n and points z0 ``[m, d]``. (eq-hyperplane)

    ``[m, n]``, positive on the side that the normal points to.
    """
    unit = normals / normals.norm(dim=1, keepdim=True)
    return unit @ z.t() - (unit * points).sum(1, keepdim=True)


def hyperplane_partitions(
    z: Tensor,
    way: int,
    partitions: int,
    generator: torch.Generator,
    *,
    least: int,
    margin: float = 0.0,
    spread: float = 0.8,
    planes: int = 1000,
    tries: int = 100,
) -> Tensor:
    """P partitions of embeddings ``[n, d]`` into the cells of H = ceil(log2 way) random hyperplanes (CACTUs, App. C).

    Points within the margin of a plane and cells with fewer than `least` = R points become -1; a partition needs
    `way` cells. The hyperplanes come from a pool of `planes`, each with at least 10 R points beyond the margin on
    either side; normals are U(-1, 1)^d, points on the plane U(-spread, spread)^d (reference code, not in the paper;
    there spread is 0 for whitened embeddings such as DeepCluster's).

    Args:
        margin: in units of z (CACTUs, Omniglot: 0 and 1.2 for ACAI, 0 and 0.5 for BiGAN).
        tries: give up after drawing this many times as many hyperplanes, or partitions, as are needed.

    Returns:
        ``[P, n]``, int16.

    Raises:
        ValueError: as `kmeans` for embeddings that are not finite, and where `tries` is not enough.
    """
    check(z, 1)
    if way < 2 or partitions < 1:
        raise ValueError(f"{partitions} partitions into {way} cells asked for; at least one of two cells")
    sides = _pool_of_sides(z, planes, generator, 10 * least, margin, spread, tries)
    h = math.ceil(math.log2(way))
    if h > planes:
        raise ValueError(f"{way} cells need {h} hyperplanes, but the pool has {planes}: raise planes")
    powers = (2 ** torch.arange(h, device=z.device)).view(1, h, 1)
    found, good, drawn = [], 0, 0
    while drawn < tries * partitions:
        drawn += 32
        which = torch.rand(32, planes, generator=generator, device=z.device).topk(h).indices
        chosen = sides[which]  # [32, H, n]
        cells = ((chosen > 0) * powers).sum(1).masked_fill_((chosen == 0).any(1), -1)
        sizes = class_sizes(cells, 2**h)
        cells[(sizes < least).gather(1, cells.clamp(min=0))] = -1
        found.append(cells[(sizes >= least).sum(1) >= way].to(torch.int16))
        good += len(found[-1])
        if good >= partitions:
            return torch.cat(found)[:partitions]
    raise ValueError(
        f"only {good} of {drawn} partitions by {h} hyperplanes with margin {margin:g} have {way} cells of at least "
        f"{least} of the {len(z)} points: lower the margin, the shots or the ways"
    )


def _pool_of_sides(z, planes, generator, least, margin, spread, tries) -> Tensor:
    """For each hyperplane of the pool, on which side each point is: 1, -1, or 0 within the margin; int8 ``[m, n]``."""
    found, good, drawn = [], 0, 0
    while drawn < tries * planes:
        drawn += 250
        normals, points = torch.rand(2, 250, z.shape[1], generator=generator, device=z.device) * 2 - 1
        distance = signed_distances(z, normals, spread * points)
        side = (distance >= margin).to(torch.int8) - (distance <= -margin).to(torch.int8)
        kept = torch.minimum((side > 0).sum(1), (side < 0).sum(1)) >= least
        found.append(side[kept])
        good += len(found[-1])
        if good >= planes:
            return torch.cat(found)[:planes]
    raise ValueError(
        f"only {good} of {drawn} random hyperplanes have {least} of the {len(z)} points beyond the margin "
        f"{margin:g} on either side, and {planes} are needed: lower the margin or the shots, or check that the "
        f"embedding has values of about {spread or 1:g}"
    )


def random_partitions(n: int, k: int, partitions: int, generator: torch.Generator) -> Tensor:
    """P partitions by chance ``[P, n]``: every image gets one of k labels, independently (CACTUs' Random ablation).

    ValueError: k or P below 1.
    """
    if k < 1 or partitions < 1:
        raise ValueError(f"{partitions} partitions into {k} classes asked for; at least one of each")
    return torch.randint(k, (partitions, n), generator=generator, device=generator.device, dtype=label_type(k))


def zca(images: Tensor, *, contrast: float = 10.0, eps: float = 1e-5) -> Tensor:
    """Whitened pixels ``[n, C*H*W]`` of uint8 images ``[n, C, H, W]``, for pixel clusters. (eq-zca)

    The recipe of Coates & Ng (2012), which CACTUs follows with these constants (reference code): each image is
    normalized to ``(x - mean) / sqrt(var + contrast)`` on the scale 0..255; then the images are centered and multiplied
    by ``V (D + eps)^(-1/2) V^T``, where ``V D V^T`` is the covariance of the pixels.
    """
    x = images.flatten(1).float()
    variance, mean = torch.var_mean(x, 1, correction=0, keepdim=True)
    x = ((x - mean) / (variance + contrast).sqrt()).double()  # eps is below the rounding of float32
    x -= x.mean(0)
    values, vectors = torch.linalg.eigh(x.t() @ x / len(x))
    return (x @ (vectors * (values.clamp(min=0) + eps).rsqrt()) @ vectors.t()).float()


# Looking at a partition


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


def _watched(items, shown: bool):
    """Yield the items; every 15 seconds a line says how many are done and how long the rest will take."""
    started = last = time.monotonic()
    for i, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if shown and now - last > 15:
            last, each = now, (now - started) / i
            left = each * (len(items) - i)
            print(f"k-means {i}/{len(items)}  {each:.2f} s each  {left / 60:.1f} min left", file=sys.stderr, flush=True)
