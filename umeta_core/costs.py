"""What a run costs before it is made: rough seconds, and the stages that must be made first. For printed plans only."""

from __future__ import annotations

from dataclasses import replace

import torch

from . import shared_fits
from .embeddings.base import read
from .experiments import BASELINES
from .rows import Row
from .stages import clusters, fit_file, stage_files, vectors_file

# Seconds per training step, more per way of its tasks, and per image and test pass, for the printed plan only.
# Processor: measured with one thread of an AMD EPYC (Zen 5), on 28x28 images at 20 ways (MAML: also at 5), on 84x84 at
# 5 ways; GPU: planned, nobody has measured it yet.
_RATES = {
    ("protonets", "cpu", "small"): (0, 0.13 / 20, 4.5e-4), ("maml", "cpu", "small"): (0.087, 0.0057, 1e-4),
    ("protonets", "cpu", "large"): (0, 0.6 / 5, 4e-3), ("maml", "cpu", "large"): (0, 1.2 / 5, 9e-4),
    ("protonets", "cuda", "small"): (0, 0.003 / 20, 1e-5), ("maml", "cuda", "small"): (0, 0.010 / 20, 1e-6),
    ("protonets", "cuda", "large"): (0, 0.005 / 5, 1e-4), ("maml", "cuda", "large"): (0, 0.012 / 5, 1e-5),
}  # fmt: skip


def expected_seconds(row: Row, scale: str, device="cpu", training=True) -> float | None:
    """Rough seconds of one run with one thread (or one GPU), the embedding and its partitions not counted.

    `training` False: without a training that the row shares with others. None: nobody has timed it (a residual
    network, a classifier of embeddings on a GPU).
    """
    if row.network.get("residual"):
        return None
    if row.learner in BASELINES and torch.device(device).type == "cuda":
        return None
    if row.learner in BASELINES:
        return 5 + {"mlp": 0.45, "linear": 0.05, "matching": 0.03}.get(row.learner, 0) * row.test_tasks[scale]
    if row.learner == "leo" or row.network.get("linear"):  # one thread, 12 tasks; measured at 1 and 5 shots
        each = 0.01 if torch.device(device).type == "cuda" else 0.008 + 0.007 * row.shot
        each = each / 2 if row.network.get("linear") else each
        return 15 + row.budget(scale) * each + 0.005 * row.test_tasks[scale]
    if row.learner == "gmvae":
        return 15 + _gmvae_seconds(row, scale, training) / (100 if torch.device(device).type == "cuda" else 1)
    size = "large" if row.dataset in ("mini_imagenet", "celeba", "celeba_identity", "imagenet") else "small"
    per_step, per_way, per_image = _RATES[row.learner, torch.device(device).type, size]
    if row.inputs == "embeddings":
        per_step, per_way, per_image = per_step / 3, per_way / 3, per_image / 3
    steps = row.options.get("test_steps", 1)  # an adaptation step passes the support images only
    images = sum(way * (shot * steps + (row.test_query or 600)) for way, shot in row.tests)
    seconds = row.budget(scale) * (per_step + per_way * row.way) + row.test_tasks[scale] * images * per_image
    made = row.source in ("latent", "augmented")  # tasks that are generated take as long again, measured on a CPU
    return 15 + seconds * (2 if made else 1)


def _gmvae_seconds(row: Row, scale: str, training: bool) -> float:
    """One thread: images encoded and decoded in training, or features; images of validations, tests and readings."""
    decoded = row.options.get("decoded", row.options["samples"])
    each = 6.3e-4 + 3e-4 * decoded if row.inputs == "images" else 3e-5 * decoded
    steps, plan, test = row.budget(scale), row.validation, row.test_tasks[scale]
    tasks, every = row.checks(scale)
    images = -(-steps // every) * tasks * plan["way"] * (plan["shot"] + plan["query"])
    images += test * sum(way * (shot + row.test_query) for way, shot in row.tests)
    alone = 0  # images where each query has a set of its own: EM then has few samples to assign
    for changes in row.readings.values():
        for way, shot in row.tests[:2]:
            if changes.get("inference") == "inductive":
                alone += min(test, changes.get("tasks", test)) * way * row.test_query * (way * shot + 1)
            else:
                images += test * way * (shot + row.test_query)
    return training * steps * row.tasks * row.shot * each + 4e-4 * images + 6e-5 * alone


def embedding_seconds(row: Row, scale: str, device="cpu", done: int = 0) -> float | None:
    """Rough seconds of fitting the row's embedding with one thread, `done` epochs of it being there; None: unknown."""
    left = row.plan.epochs[scale] - done
    if left <= 0 or row.plan.seconds is None or torch.device(device).type == "cuda":
        return 0.0 if left <= 0 else None
    return left * row.plan.seconds / (10 if scale == "smoke" else 1)  # at smoke it sees a tenth of the images or less


def missing_stages(row: Row, scale: str, seed: int, device="cpu", folder=None) -> dict:
    """What must be made before the row can run, {file: (what it is, rough seconds or None if unknown)}.

    Rows that share a stage name the same file.
    """
    missing = [path for path in stage_files(row, scale, seed, folder) if not path.exists()]
    partitions = [path for path in missing if "-partitions-" in path.name]
    found, clustered = {}, vectors_file(row, "train", scale, folder)
    if row.needs_embedding and (missing != partitions or (partitions and not clustered.exists())):
        found[fit_file(row, scale, folder)] = _missing_fit(row, scale, device, folder)
    return found | {path: _missing_partitions(row, scale, seed, device) for path in partitions}


def _missing_fit(row: Row, scale: str, device, folder) -> tuple[str, float | None]:
    row = replace(row, fitted=row.plan.weights_of or row.fitted)  # a view of a fit costs that fit
    name, epochs = f"{row.fitted or row.embedding} of {row.dataset}", row.plan.epochs[scale]
    path = fit_file(row, scale, folder)
    if row.plan.brought:
        return f"embedding {name}, fitted by others", 0.0
    done = read(path).get("epoch", 0) if path.exists() else 0
    what = f"embedding {name}, {epochs} epochs" + (f" of which {done} are done" if done else "")
    if scale == "full" and not done and (shared_fits.FOLDER / path.name).is_file():
        what += f" (or take ours: umeta data fitted {row.slug})"
    return what, embedding_seconds(row, scale, device, done)


def _missing_partitions(row: Row, scale: str, seed: int, device) -> tuple[str, float | None]:
    many = "1 partition" if row.stack(scale) == 1 else f"{row.stack(scale)} partitions"
    into = f"{clusters(row, scale)} clusters"
    if row.source == "hyperplanes":
        into = "hyperplanes" + (f" with margin {row.margin:g}" if row.margin else "") + f" for {row.way} ways"
    what = f"{many} of {row.fitted or row.embedding} of {row.dataset} by {into}, R = {row.least()}, seed {seed}"
    if row.source == "hyperplanes" or row.clusters > 2000 or torch.device(device).type == "cuda":
        return what, None
    restarts = 10 if row.partitions == 1 else 3 if row.learner == "protonets" else 1
    return what, 1.5 * row.stack(scale) * restarts * max(row.clusters, 50) / 500  # see benchmarks/kmeans.py
