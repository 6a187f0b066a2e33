"""Logistic regression and nearest neighbors on 1000 tasks of embeddings: umeta, all at once, against scikit-learn.

    python benchmarks/baselines.py
    python benchmarks/baselines.py --device cuda

256 dimensions, 5 queries per class, C = 1. scikit-learn (lbfgs, task by task, its own tolerance, float32) is timed on
the first 100 tasks of every setting and scaled to 1000; it runs on the CPU whatever the device. Before that, ours is
compared with its predictions in float64 at tolerance 1e-10 and with its accuracy as timed, on those tasks.
"""

from __future__ import annotations

import statistics
import warnings

import torch
from harness import arguments, interleaved

from umeta_core.baselines import LinearClassifier, NearestNeighbors
from umeta_core.episodes import Episodes

TASKS, TIMED, DIMENSIONS, QUERY = 1000, 100, 256, 5
SETTINGS = {(5, 1): 50, (5, 5): None, (20, 1): None, (20, 5): 3}  # way, shot: the factor to reach


def episodes(way, shot, device) -> Episodes:
    """Unit-scale clouds that overlap: 1-shot accuracy is about half."""
    g = torch.Generator().manual_seed(0)
    centers = torch.randn(TASKS, way, 1, DIMENSIONS, generator=g) / DIMENSIONS**0.5
    noise = lambda n: torch.randn(TASKS, way, n, DIMENSIONS, generator=g) / DIMENSIONS**0.5  # noqa: E731
    return Episodes((centers + 3 * noise(shot)).to(device), (centers + 3 * noise(QUERY)).to(device))


def one_by_one(make, batch: Episodes, dtype=torch.float32):
    """A function that fits scikit-learn on every task and returns its predictions ``[T, N*Q]``."""
    xs, ys, xq, _ = batch.to("cpu").flat()
    arrays = [[x.numpy() for x in task] for task in zip(xs.to(dtype), ys, xq.to(dtype))]
    return lambda: torch.stack([torch.from_numpy(make().fit(xs, ys).predict(xq)) for xs, ys, xq in arrays])


def compare(name, learner, make, exact, batch, target, args) -> None:
    some = batch[:TIMED]
    ours, theirs = lambda: learner.predict(batch), one_by_one(make, some)
    found, y = ours()[:TIMED].argmax(2).cpu(), some.flat()[3].cpu()
    same = (found == one_by_one(exact, some, torch.float64)()).float().mean().item()
    mine, his = 100 * (found == y).float().mean().item(), 100 * (theirs() == y).float().mean().item()
    assert same > 0.9995, f"{name}: only {same:.4f} of the predictions agree"
    assert abs(mine - his) < 0.3, f"{name}: accuracies {mine:.2f} and {his:.2f}"
    times = interleaved({"umeta": ours, "scikit-learn": theirs}, args.repeats, args.device)
    scale = TASKS / TIMED
    ratio = statistics.median(scale * b / a for a, b in zip(times["umeta"], times["scikit-learn"]))
    wanted = "" if target is None else f" (target {target}x)"
    print(
        f"  {name}: umeta {statistics.median(times['umeta']):7.1f} ms, scikit-learn "
        f"{scale * statistics.median(times['scikit-learn']):7.0f} ms, {ratio:5.1f}x as fast{wanted}; "
        f"{100 * same:.2f} % of the predictions equal, accuracy {mine:.2f} and {his:.2f} %",
        flush=True,
    )


def main():
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    args = arguments(__doc__)
    warnings.simplefilter("ignore")
    logistic = lambda: LogisticRegression(C=1.0, max_iter=1000)  # noqa: E731
    exact = lambda: LogisticRegression(C=1.0, max_iter=20_000, tol=1e-10)  # noqa: E731
    neighbor = lambda: KNeighborsClassifier(1)  # noqa: E731
    for (way, shot), target in SETTINGS.items():
        print(f"{way}-way {shot}-shot, {TASKS} tasks")
        batch = episodes(way, shot, args.device)
        compare("logistic regression", LinearClassifier(), logistic, exact, batch, target, args)
        compare("nearest neighbor   ", NearestNeighbors(), neighbor, neighbor, batch, None, args)


if __name__ == "__main__":
    main()
