"""What the learned rule is meta-trained on: many networks at different ages, each with its own little data set.

Metz et al. 2019, sections 4.2 and 5, App. C and H. A meta-training step sees one `Truncation`: T networks of one
architecture, U unlabeled batches for each, and labeled examples to judge them by. `RuleTasks` is the task source of
`training.train`: it keeps the networks from step to step and replaces those that have lived long enough.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from .augmentation import shift
from .data import ImageSet
from .episodes import PartitionTasks, sample_without_replacement
from .learned_rule import EMBEDDING, Phi, initial_phi
from .speed import world


@dataclass(frozen=True)
class Bucket:
    """Tasks that can share a batch: one data set, one number of classes, one architecture.

    images: pixels as the networks see them; hidden: widths of the hidden layers. turned: images are rotated by any
    angle and moved by up to 5/14 of their size, and the four numbers that say how (sine, cosine, right, down) are
    regression targets beside the labels (section 4.2; their encoding is our choice). drop: a pixel is zeroed for a
    whole task with this probability, in half of the tasks, and for an example in half of the tasks; moved: the images
    of half of the tasks are moved sideways by up to this many pixels (probabilities and ranges are not in the paper).
    """

    images: ImageSet
    way: int = 10
    hidden: tuple[int, ...] = (64, 64)
    turned: bool = False
    drop: float = 0.2
    moved: int = 2

    @property
    def widths(self) -> tuple[int, ...]:
        return (self.images.images[0].numel(), *self.hidden, EMBEDDING)


@dataclass(frozen=True)
class Curriculum:
    """How long unrolls and lives are at a meta-step: both grow linearly (App. H.2).

    unroll: the range that U is drawn from, at first and after `unroll_steps`; length: mean (and standard deviation) of
    the number of inner steps in a network's life, at first and after `length_steps`.
    """

    unroll: tuple[tuple[int, int], tuple[int, int]] = ((2, 4), (8, 15))
    unroll_steps: int = 50_000
    length: tuple[float, float] = (20.0, 20_000.0)
    length_steps: int = 5_000

    def unroll_at(self, step: int) -> tuple[int, int]:
        share = min(step / self.unroll_steps, 1)
        return tuple(round(a + share * (b - a)) for a, b in zip(*self.unroll))

    def length_at(self, step: int) -> float:
        share = min(step / self.length_steps, 1)
        return self.length[0] + share * (self.length[1] - self.length[0])


@dataclass
class Truncation:
    """T networks and what the next U steps show them.

    `phi` are the networks, which the learner leaves where they ended; `x` ``[T, U, B, N_0]`` unlabeled batches;
    `labeled` ``[T, D, 2, K, N_0]`` with `labels` ``[T, D, 2, K]``: D draws of two halves, K = classes x shot; `extra`
    ``[T, D, 2, K, r]`` more targets, or None. `noise`, for `PESLearner`: the second network of each antithetic pair
    ("below") and the sum of the noise since the pair began ("noise" ``[T, theta]``). `left` ``[T]`` are the steps that
    each network has left after this truncation, a view of the state of its `bucket` (a number).
    """

    phi: Phi
    x: Tensor
    labeled: Tensor
    labels: Tensor
    classes: int
    extra: Tensor | None = None
    noise: dict | None = None
    left: Tensor | None = None
    bucket: int = 0

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, tasks: slice) -> Truncation:
        def cut(value):
            return [[p[tasks] for p in part] for part in value] if isinstance(value, list) else value[tasks]

        return replace(
            self, phi=self.phi.map(lambda p: p[tasks]), x=self.x[tasks], labeled=self.labeled[tasks],
            labels=self.labels[tasks], extra=None if self.extra is None else self.extra[tasks],
            noise=self.noise and {k: cut(v) for k, v in self.noise.items()},
            left=None if self.left is None else self.left[tasks],
        )  # fmt: skip


class RuleTasks:
    """Truncations from buckets taken in turn; between them the networks of a bucket live on.

    Args:
        buckets: what a batch of tasks can be.
        curriculum: of unrolls and lengths.
        batch: B, unlabeled images of one inner step (128 in the code's data set; the paper is silent).
        draws: D, labeled draws that the meta-objective is averaged over (App. H.2).
        theta: for `PESLearner`, how many numbers it perturbs.

    Its state (the networks included) goes into checkpoints: `state_dict`. All draws come from the generator passed to
    `sample`, also those of networks that other processes train, so all processes see the same curriculum.

    Raises:
        ValueError: no bucket, or one with too few classes or images per class.
    """

    def __init__(self, buckets: list[Bucket], curriculum: Curriculum | None = None, batch=128, draws=5, theta=0):
        if not buckets:
            raise ValueError("no bucket to draw tasks from: give at least one")
        self.buckets, self.curriculum = list(buckets), curriculum or Curriculum()
        self.batch, self.draws, self.theta, self.steps = batch, draws, theta, 0
        self.pools = [PartitionTasks(bucket.images) for bucket in self.buckets]
        self.alive: list[dict | None] = [None] * len(self.buckets)

    def sample(self, tasks: int, way: int, shot: int, query: int, generator: torch.Generator) -> Truncation:
        """The next bucket's truncation. `way` is the bucket's own and `query` is not used; `shot` is per half."""
        index = self.steps % len(self.buckets)
        bucket, pool = self.buckets[index], self.pools[index]
        least, most = self.curriculum.unroll_at(self.steps)
        unroll = int(torch.randint(least, most + 1, (), generator=generator, device=generator.device))
        state = self._renewed(index, tasks, shot, generator)
        self.alive[index], self.steps = state, self.steps + 1
        state["left"] = state["left"] - unroll
        shown = unlabeled(bucket, pool, state, (unroll, self.batch), generator)
        x, labels, extra = labeled(bucket, pool, state, self.draws, shot, generator)
        noise = {k: state[k] for k in ("below", "noise") if k in state} or None
        return Truncation(Phi(*state["phi"]), shown, x, labels, bucket.way, extra, noise, state["left"], index)

    def _renewed(self, index: int, tasks: int, shot: int, generator: torch.Generator) -> dict:
        """The bucket's networks and data sets, those that are through (or no longer finite) replaced by fresh ones."""
        old = self.alive[index]
        mean = self.curriculum.length_at(self.steps)
        fresh = fresh_tasks(self.buckets[index], self.pools[index], tasks, shot, mean, generator)
        if self.theta:
            fresh["below"] = [[p.clone() for p in part] for part in fresh["phi"]]
            fresh["noise"] = torch.zeros(tasks, self.theta, device=generator.device)
        if old is None or len(old["left"]) != tasks:
            # Ages must differ, else every batch would see one phase of training.
            fresh["left"] *= torch.rand(tasks, generator=generator, device=generator.device)
            return fresh
        networks = [*old["phi"], *old.get("below", [])]
        sane = torch.stack([p.flatten(1).isfinite().all(1) for part in networks for p in part]).all(0)
        keep = (old["left"] > 0) & sane

        def choose(a, b):
            return torch.where(keep.view(-1, *[1] * (a.dim() - 1)), a, b)

        return {
            key: [[choose(a, b) for a, b in zip(*parts)] for parts in zip(old[key], new)]
            if isinstance(new, list) else choose(old[key], new)
            for key, new in fresh.items()
        }  # fmt: skip

    def state_dict(self) -> dict:
        """Step and living networks, for a checkpoint; of several processes no one's, as each has others."""
        alone = world() == 1
        return {"steps": self.steps, "alive": self.alive if alone else [None] * len(self.buckets)}

    def load_state_dict(self, state: dict) -> None:
        """What `state_dict` gave; one of several processes starts with fresh networks, as it has not saved its own."""
        alone = world() == 1
        device = self.buckets[0].images.labels.device
        self.steps, self.alive = state["steps"], _to(device, state["alive"]) if alone else [None] * len(self.buckets)


def _to(device, value):
    """Tensors in nested lists and dicts, on a device."""
    if isinstance(value, dict):
        return {k: _to(device, v) for k, v in value.items()}
    return [_to(device, v) for v in value] if isinstance(value, list) else value if value is None else value.to(device)


def fresh_tasks(bucket, pool, tasks: int, shot: int, mean: float, generator: torch.Generator) -> dict:
    """T new networks, each with its classes, its order of the pixels and its mask, and the length of its life.

    "phi" as lists of tensors; "classes" ``[T, way]``; "order" ``[T, N_0]``; "seen" ``[T, N_0]``, false for a pixel that
    is zeroed; "drops" and "moves" ``[T]``; "left" ``[T]``, normal with mean and standard deviation `mean`, at least 1.
    ValueError: too few classes of 2 * shot images.
    """
    device, inputs = generator.device, bucket.widths[0]
    classes, count = pool.usable(2 * shot)
    if int(count[0]) < bucket.way:
        raise ValueError(f"{bucket.images.name} {bucket.images.split} has {int(count[0])} classes of {2 * shot} "
                         f"images, a bucket asks for {bucket.way}: take fewer classes or examples")  # fmt: skip

    def coin(*shape, p=0.5):
        return torch.rand(tasks, *shape, generator=generator, device=device) < p

    picked = sample_without_replacement(count.expand(tasks), bucket.way, generator)
    length = mean + mean * torch.randn(tasks, generator=generator, device=device)
    return {
        "phi": [list(part) for part in initial_phi(tasks, bucket.widths, generator)],
        "classes": classes[0][picked],
        "order": torch.rand(tasks, inputs, generator=generator, device=device).argsort(1),
        "seen": ~(coin(1) & coin(inputs, p=bucket.drop)),
        "drops": coin(),
        "moves": coin(),
        "left": length.clamp(min=1),
    }


def unlabeled(bucket, pool, state: dict, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Random images of each task's classes as its network sees them, ``[T, *shape, N_0]``."""
    tasks, device = len(state["left"]), generator.device
    which = torch.randint(bucket.way, (tasks, *shape), generator=generator, device=device)
    chosen = state["classes"].gather(1, which.flatten(1)).view_as(which)
    member = torch.rand(chosen.shape, generator=generator, device=device) * pool.size[0][chosen]
    return _view(bucket, pool, state, pool.start[0][chosen] + member.long(), generator)[0]


def labeled(bucket, pool, state: dict, draws: int, shot: int, generator: torch.Generator):
    """D draws of two halves of `shot` different images per class ``[T, D, 2, K, N_0]``, labels, more targets."""
    classes = state["classes"].unsqueeze(1).expand(-1, draws, -1)
    member = sample_without_replacement(pool.size[0][classes], 2 * shot, generator)
    place = (pool.start[0][classes].unsqueeze(-1) + member).unflatten(-1, (2, shot))  # [T, D, way, 2, shot]
    x, extra = _view(bucket, pool, state, place.transpose(2, 3).flatten(3), generator)
    labels = torch.arange(bucket.way, device=x.device).repeat_interleave(shot).expand(*x.shape[:-1])
    return x, labels, extra


def _view(bucket, pool, state: dict, place: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
    """Images at `place` ``[T, ...]`` of the pool, moved, permuted and with pixels dropped as the tasks demand."""
    tasks, device = len(place), place.device
    flat = bucket.images.shown(pool.order[0][place.flatten()].long())
    extra = None
    if bucket.turned:
        flat, extra = turned(flat, generator)
        extra = extra.view(*place.shape, -1)
    elif bucket.moved:
        by = torch.randint(-bucket.moved, bucket.moved + 1, place.shape, generator=generator, device=device)
        by = (by.flatten(1) * state["moves"][:, None]).flatten()
        flat = shift(flat, by, torch.zeros_like(by), 0)
    x = flat.view(tasks, -1, flat[0].numel()) * state["seen"][:, None]
    x = x.gather(2, state["order"][:, None].expand_as(x))
    if bucket.drop:
        kept = torch.rand(x.shape, generator=generator, device=device) >= bucket.drop
        x = x * (kept | ~state["drops"].view(-1, 1, 1))
    return x.view(*place.shape, -1), extra


def turned(x: Tensor, generator: torch.Generator, reach: float = 5 / 14) -> tuple[Tensor, Tensor]:
    """Images ``[n, C, H, W]`` moved and then rotated at random, and how: ``[n, 4]`` sine, cosine, right, down in -1..1.
    """
    n, device = len(x), x.device
    angle = torch.rand(n, generator=generator, device=device) * (2 * math.pi)
    by = torch.rand(n, 2, generator=generator, device=device) * 2 - 1
    sine, cosine = angle.sin(), angle.cos()
    # affine_grid counts half the image as 1, hence the 2.
    right, down = (-2 * reach * by).unbind(1)
    turn = torch.stack([cosine, -sine, right, sine, cosine, down], 1).view(n, 2, 3)
    grid = F.affine_grid(turn, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False), torch.cat([sine[:, None], cosine[:, None], by], 1)
