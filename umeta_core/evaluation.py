"""Accuracy of a learner over many tasks, with its interval."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .episodes import Episodes
from .losses import accuracy

_BLOCK = 20  # tasks drawn at a time: fixed, so that every learner sees the same tasks whatever fits its memory


@dataclass
class Evaluation:
    """Per-task accuracies ``[tasks]`` in [0, 1]."""

    accuracies: Tensor

    @property
    def mean(self) -> float:
        """Percent."""
        return 100 * self.accuracies.double().mean().item()

    @property
    def ci95(self) -> float:
        """Half-width of the 95 % interval of the mean, percentage points. (eq-ci)"""
        return interval(self.accuracies)

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.ci95:.2f} % over {len(self.accuracies)} tasks"


def interval(accuracies: Tensor) -> float:
    """``1.96 * sigma / sqrt(tasks)`` in percentage points; sigma: population standard deviation over tasks. (eq-ci)"""
    a = accuracies.double()
    return 196 * a.std(correction=0).item() / len(a) ** 0.5


def sample_blocks(source, tasks: int, way: int, shot: int, query: int, seed: int, device="cpu"):
    """Yield `tasks` test episodes in blocks; the same seed gives the same tasks to every learner.

    ValueError: a number below 1.
    """
    if min(tasks, way, shot, query) < 1:
        raise ValueError(f"{tasks} tasks of {way} classes with {shot} + {query} images each are nothing to evaluate; "
                         "use 1 or more of each")  # fmt: skip
    generator = torch.Generator(device=device).manual_seed(seed)
    for done in range(0, tasks, _BLOCK):
        block = source.sample(_BLOCK, way, shot, query, generator)
        block.first = done
        yield block[: tasks - done]


def in_chunks(predict, episodes: Episodes, max_images: int) -> Tensor:
    """Apply `predict` to slices of at most `max_images` images; concatenates on the task axis (the last but two)."""
    per_task = episodes.way * (episodes.shot + episodes.query.shape[2])
    size = max(1, max_images // per_task)
    return torch.cat([predict(episodes[i : i + size]) for i in range(0, len(episodes), size)], -3)


def evaluate(
    learner, source, *, way: int, shot: int, query: int = 5, tasks: int = 1000, seed: int = 0, max_images: int = 2000
) -> Evaluation:
    """Mean accuracy over `tasks` episodes of `source`, 1000 as in CACTUs, LASIUM and Meta-GMVAE.

    Args:
        learner: anything with ``predict(episodes) -> logits [T, N*Q, N]``.
        max_images: how many images are handled at once; lower it if memory runs out. (The draws of a learner that
            draws at test time without looking at `Episodes.first`, such as the MLP, are then others.)

    Raises:
        ValueError: way, shot, query or tasks below 1.
        ArithmeticError: a logit is NaN.
    """
    task = {"way": way, "shot": shot, "query": query, "tasks": tasks, "seed": seed}
    (correct,) = _correct(learner, lambda e: learner.predict(e).unsqueeze(0), source, max_images, **task)
    return Evaluation(correct)


def evaluate_curve(
    learner,
    source,
    at: list[int],
    *,
    way: int,
    shot: int,
    query: int = 5,
    tasks: int = 1000,
    seed: int = 0,
    max_images: int = 2000,
) -> list[Evaluation]:
    """As `evaluate`, after each number of adaptation steps in `at`, on the same tasks.

    Raises what `evaluate` does, and ValueError if `at` is empty or not ascending.
    """
    task = {"way": way, "shot": shot, "query": query, "tasks": tasks, "seed": seed}
    correct = _correct(learner, lambda e: learner.predict_curve(e, at), source, max_images, **task)
    return [Evaluation(a) for a in correct]


def _correct(learner, predict, source, max_images: int, *, tasks: int, way: int, shot: int, query: int, seed: int):
    """Accuracies ``[points, tasks]`` where `predict` gives the logits ``[points, T, N*Q, N]`` of T episodes."""
    blocks, found = sample_blocks(source, tasks, way, shot, query, seed, _device(source)), []
    with evaluating(learner):
        for episodes in _progress(blocks, tasks):
            points = in_chunks(predict, episodes, max_images)
            if points.isnan().any():  # whose argmax would be class 0, so that the mean would be chance
                raise ArithmeticError("the learner's logits are NaN: its adaptation diverged; lower its inner rate")
            found.append(torch.stack([accuracy(logits, episodes.labels).cpu() for logits in points]))
    return torch.cat(found, 1)


@contextmanager
def evaluating(learner):
    """A module in evaluation mode, which it then leaves, also after an error, if it was not in it."""
    was = getattr(learner, "training", False)
    if was:
        learner.eval()
    try:
        yield
    finally:
        if was:
            learner.train()


def _device(source):
    images = getattr(source, "images", None)
    return "cpu" if images is None else images.labels.device


def _progress(blocks, tasks):
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return blocks
    return tqdm(blocks, total=-(-tasks // _BLOCK), desc="evaluate", leave=False, disable=None)
