"""Partitions of unlabeled images into classes to practice on: clusters of an embedding, hyperplane cells, chance.

A partition is an int tensor ``[n]`` of class indices, -1 for images left out; a stack of P partitions is ``[P, n]``.
`umeta_core.episodes.PartitionTasks` draws tasks from it.
"""

from __future__ import annotations

import math
import sys
import time
import warnings

import torch
from torch import Tensor

from .kmeans import BATCH, check_points, kmeans, kmeans_batched, trials_per_step


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
    check_points(z, k)
    if partitions < 1:
        raise ValueError(f"{partitions} partitions asked for; at least one")
    restarts = (10 if partitions == 1 else 1) if restarts is None else restarts
    sizable = least + 1 if sizable is None else sizable
    wanted = _sizable_wanted(len(z), k, enough, sizable)
    scalings = random_scalings(partitions, z.shape[1], generator)
    together = max(1, BATCH // (len(z) * restarts * trials_per_step(k))) if z.is_cuda else 1

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
    check_points(z, 1)
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
