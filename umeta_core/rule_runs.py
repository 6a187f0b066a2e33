"""Meta-training runs of the learned rule: which tasks, how long, and a file with theta at the end.

    python -m umeta_core.rule_runs cpu --seed 0 --checkpoint ck.pt --out thetas/cpu-seed0
    torchrun --nproc-per-node 2 -m umeta_core.rule_runs cpu ...
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

from .data import ImageSet, load
from .learned_rule import UpdateRule
from .results import provenance
from .rule_evaluation import rule_curve, trial
from .rule_learners import RuleLearner
from .rule_tasks import Bucket, Curriculum, RuleTasks
from .speed import device_of_process, rank, tune_cpu
from .training import train


@dataclass(frozen=True)
class RulePlan:
    """A meta-training run: size and step of the rule, Adam's rates, tasks of a meta-step, batch B, draws D, lengths.

    rates: (first meta-step, Adam's rate from there on), in order.
    """

    size: str
    lr: float
    rates: tuple[tuple[int, float], ...]
    tasks: int
    batch: int
    draws: int
    steps: int
    curriculum: Curriculum

    def rate(self, step: int) -> float:
        """Adam's rate at a meta-step."""
        return next(rate for first, rate in reversed(self.rates) if step >= first)


PLANS = {
    # The book's: minutes on one core.
    "book": RulePlan("small", 1e-3, ((0, 2e-3),), 4, 32, 2, 150, Curriculum(((2, 4), (3, 6)), 100, (20, 60), 100)),
    # Hours on two cores. 12,000 meta-steps go on where 6,000 stop, with a lower rate at the end.
    "cpu": RulePlan("small", 1e-3, ((0, 1e-3), (10_000, 2e-4)), 8, 32, 3, 6000,
                    Curriculum(((2, 4), (5, 8)), 600, (20, 300), 2500)),
    # Sections 4 and 5, App. C and H.2: 512 workers for 8 days.
    "paper": RulePlan("full", 3e-4, ((0, 3e-4), (100_000, 1e-4), (150_000, 2e-5)), 256, 128, 5, 200_000, Curriculum()),
}


def buckets(plan: str, device="cpu") -> list[Bucket]:
    """The task distribution of a plan. "book" needs no data beyond the built-in glyphs.

    "paper" has half of its tasks from glyphs at 14x14 (turned in half of them) and half from CIFAR-10 and
    mini-ImageNet at 16x16, with 2 to 5 layers of 64 to 512 units; its fixed groups of glyphs (letters, mathematical
    symbols, currencies) are not built. "cpu" is at 8x8 with narrow networks; seven of eight tasks are
    glyphs, five of them neither moved nor turned: with more photographs and motion, which leave little to see at 8x8,
    far less was learned in a thousand meta-steps.

    Raises:
        FileNotFoundError: CIFAR-10 or mini-ImageNet is missing (the message says how to get it).
    """

    def images(name: str, size: int) -> ImageSet:
        return load(name, "train", size=size, device=device)

    if plan == "book":
        return [Bucket(images("glyphs", 8), hidden=(32, 32))]
    if plan == "cpu":
        drawn, nets = images("glyphs", 8), ((32, 32), (48,), (24, 24, 24), (32, 32), (64, 32))
        plain = [Bucket(drawn, 10, net, drop=0.1, moved=0) for net in nets]
        return [*plain[:3], Bucket(images("mini_imagenet", 8), 10, (32, 32), moved=1), *plain[3:],
                Bucket(drawn, 14, (32, 32), moved=1), Bucket(drawn, 10, (32, 32), turned=True)]  # fmt: skip
    drawn, photos = images("glyphs", 14), [images(name, 16) for name in ("cifar10", "mini_imagenet")]
    nets = [(64,) * 2, (512,), (128,) * 4, (256,) * 3, (128,) * 2, (512,) * 2]
    glyphs = [Bucket(drawn, way, net, turned=i % 2 == 0)
              for i, (way, net) in enumerate(zip((10, 13, 14, 17, 20, 30), nets))]  # fmt: skip
    ways = [(0, 10), (1, 10), (1, 15), (0, 10), (1, 20), (1, 25)]
    natural = [Bucket(photos[which], way, net) for (which, way), net in zip(ways, nets[::-1])]
    return [bucket for pair in zip(glyphs, natural) for bucket in pair]


def meta_train(plan: str, seed: int = 0, *, steps: int | None = None, device="cpu", recompute=False, seconds=None,
               keep=None, every=0, **options) -> tuple[UpdateRule, dict]:  # fmt: skip
    """A rule meta-trained by a plan, and its history; `recompute` and `seconds` as in `RuleLearner`.

    keep: called every `every` meta-steps as ``keep(learner, step)``; what it returns goes into the history as
    "validation". Other `options` go to `train`.
    """
    p = PLANS[plan]
    rule = UpdateRule(p.size, lr=p.lr, generator=torch.Generator().manual_seed(seed)).to(device)
    learner = RuleLearner(rule, recompute=recompute, seconds=seconds)
    source = RuleTasks(buckets(plan, device), p.curriculum, batch=p.batch, draws=p.draws)
    watch = keep and (lambda learner: keep(learner, source.steps))
    history = train(learner, source, steps=steps or p.steps, tasks=p.tasks, way=10, shot=10, query=0, lr=p.rate,
                    seed=seed, device=device, prepare=learner.prepare_gradients, config={"plan": plan},
                    validate=watch, validate_every=every, **options)  # fmt: skip
    return rule, history


def main() -> None:
    """Meta-train a rule by a plan and write theta on the way and at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", choices=PLANS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="meta-steps; the plan's without it")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--out", required=True, type=Path, help="folder for theta at the end and every --every steps")
    parser.add_argument("--every", type=int, default=250)
    parser.add_argument("--seconds", type=float, help="budget of a process for each meta-step (uneven machines)")
    parser.add_argument("--recompute", action="store_true", help="less memory, a third more time")
    a = parser.parse_args()
    tune_cpu()
    a.device, a.steps = device_of_process(a.device), a.steps or PLANS[a.plan].steps
    origin = provenance(a.device)  # now, as the code may change while it runs
    held_out = trial(load("glyphs", "val", size=8, device=a.device), networks=4, seed=1)

    def save(rule: UpdateRule, step: int) -> None:
        if rank() == 0:
            rule.save(a.out / f"{step:06d}.pt", plan=a.plan, seed=a.seed, steps=step, **origin)

    def keep(learner: RuleLearner, step: int) -> float:
        """Save theta; its accuracy in percent on unseen characters after 100 steps of the rule."""
        save(learner.rule, step)
        return 100 * rule_curve(learner.rule, held_out, (100,)).mean().item()

    rule, _ = meta_train(a.plan, a.seed, steps=a.steps, device=a.device, recompute=a.recompute, seconds=a.seconds,
                         keep=keep, every=a.every, checkpoint=a.checkpoint, log_every=40)  # fmt: skip
    save(rule, a.steps)


if __name__ == "__main__":
    main()
