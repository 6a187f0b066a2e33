"""Clustering an embedding for task construction: umeta against scikit-learn's KMeans as CACTUs runs it.

    python benchmarks/kmeans.py
    python benchmarks/kmeans.py --partitions 100
    python benchmarks/kmeans.py --device cuda --partitions 100

Work: k-means with k = 500 of 22,000 points of 256 numbers, once per random scaling of the axes (CACTUs, Omniglot:
100 of them). Per partition both are run in turn on the same scaled points; the objective is compared. Processor
seconds of all threads are printed too: on a machine with other work they say more than the clock. On a GPU our
partitions are clustered all at once. --repeats has no effect here.
"""

from __future__ import annotations

import resource
import time

import torch
from harness import arguments, synchronize

from umeta_core.kmeans import kmeans, kmeans_batched
from umeta_core.partitions import random_scalings

FASTER, EXCESS, MEMORY = 3.5, 1, 4  # targets: times as fast, percent of the objective, GB


def embedding(n: int, d: int, groups: int = 1200) -> torch.Tensor:
    """Points like an embedding: many overlapping groups of uneven width."""
    g = torch.Generator().manual_seed(0)
    centers = torch.randn(groups, d, generator=g)
    width = 0.5 + torch.rand(n, 1, generator=g)
    return centers[torch.randint(groups, (n,), generator=g)] + width * torch.randn(n, d, generator=g)


def timed(run, device="cpu") -> tuple[float, float, float]:
    """Seconds, processor seconds and inertia of one clustering."""
    synchronize(device)
    start, work = time.perf_counter(), time.process_time()
    inertia = float(run())
    return time.perf_counter() - start, time.process_time() - work, inertia


def with_scikit_learn(x, k: int, seed: int, threads: int) -> float:
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    with threadpool_limits(threads):
        return KMeans(k, init="k-means++", n_init=1, max_iter=3000, random_state=seed).fit(x).inertia_


def main():
    integer = {"type": int}
    args = arguments(
        __doc__,
        partitions={**integer, "default": 3},
        points={**integer, "default": 22_000},
        width={**integer, "default": 256},
        clusters={**integer, "default": 500},
    )
    z, k = embedding(args.points, args.width), args.clusters
    scalings = random_scalings(args.partitions, args.width, torch.Generator().manual_seed(1))
    generator = torch.Generator(args.device).manual_seed(0)
    kmeans(z[:2000], 50, torch.Generator().manual_seed(0))  # warm up
    print(f"{args.points} points of {args.width} numbers, {k} clusters, {args.partitions} partitions", flush=True)
    times = {"umeta": [], "scikit-learn": []}
    if args.device != "cpu":
        x, w = z.to(args.device), scalings.to(args.device)
        kmeans_batched(x[:2000], 50, w, generator)
        all_ = timed(lambda: kmeans_batched(x, k, w, generator).inertia.sum(), args.device)
        times["umeta"] = [tuple(v / args.partitions for v in all_)] * args.partitions
    for p, w in enumerate(scalings):
        x = z * w
        if args.device == "cpu":
            times["umeta"].append(timed(lambda x=x: kmeans(x, k, generator).inertia))
        times["scikit-learn"].append(timed(lambda x=x, p=p: with_scikit_learn(x.numpy(), k, p, args.threads)))
        print(f"  {p + 1}: " + "   ".join(f"{name} {t[-1][0]:.2f} s ({t[-1][1]:.2f})" for name, t in times.items()))
    means = {name: torch.tensor(t, dtype=torch.float64).mean(0).tolist() for name, t in times.items()}
    for name, (seconds, work, inertia) in means.items():
        print(
            f"  {name:14s} {seconds:7.2f} s per partition ({work:6.2f} processor seconds), 100 partitions in "
            f"{100 * seconds:6.0f} s; inertia per point {inertia / args.points:.3f}"
        )
    ours, theirs = means.values()
    faster, excess = theirs[0] / ours[0], 100 * (ours[2] / theirs[2] - 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(
        f"  umeta is {faster:.2f}x as fast by the clock (target {FASTER}x: {met(faster >= FASTER)}), "
        f"{theirs[1] / ours[1]:.2f}x in processor time; inertia {excess:+.2f} % (target at most {EXCESS} % more: "
        f"{met(excess <= EXCESS)}); peak memory of this process {peak:.2f} GB (target {MEMORY} GB: "
        f"{met(peak <= MEMORY)})",
        flush=True,
    )


def met(reached: bool) -> str:
    return "met" if reached else "missed"


if __name__ == "__main__":
    main()
