"""LASIUM on Omniglot's network: how long tasks take to generate, against the meta-step that consumes them.

    python benchmarks/lasium.py
    python benchmarks/lasium.py --device cuda --threads 4

A step has 4 tasks of 5 classes with 1 + 5 images. Tasks are generated one step at a time and for many steps at once
(`ahead`); both ways give tasks that the learner cannot tell apart. The last lines add up what the GAN column of Table 7
costs: the GAN's training, and for each of its 14 cells 1000 steps and 1000 test tasks.
"""

from __future__ import annotations

import statistics
from functools import partial

import torch
from harness import arguments, interleaved

from umeta_core.data import ImageSet
from umeta_core.episodes import PartitionTasks
from umeta_core.evaluation import evaluate
from umeta_core.experiments import build_learner
from umeta_core.generators import MSGAN, VAE
from umeta_core.latent_tasks import LatentTasks
from umeta_core.rows import find_row

TASKS, WAY, SHOT, QUERY = 4, 5, 1, 5
AHEAD = (1, 10, 50)
CHARACTERS, CELLS, STEPS, TEST_TASKS, EPOCHS = 1200, 14, 1000, 1000, 40


def images(device) -> ImageSet:
    """As many noise images as Omniglot has for training; speed does not depend on what they show."""
    pixels = torch.randint(256, (20 * CHARACTERS, 1, 28, 28), generator=torch.Generator().manual_seed(0))
    labels = torch.arange(CHARACTERS).repeat_interleave(20)
    names = [str(c) for c in range(CHARACTERS)]
    return ImageSet(pixels.to(torch.uint8), labels, names, [], "noise", "train").to(device)


def sampler(data, network, ahead: int, device):
    """A function that makes `ahead` steps' tasks, one call of `sample` each."""
    anchors = "encoded" if isinstance(network, VAE) else "prior"
    source = LatentTasks(data, network, "RO", 0.2, anchors=anchors, ahead=ahead)
    generator = torch.Generator(device).manual_seed(0)

    def once():
        for _ in range(ahead):
            source.sample(TASKS, WAY, SHOT, QUERY, generator)

    return once


def meta_step(slug: str, episodes, device):
    """The row's learner, and a function that makes one of its meta-steps."""
    learner = build_learner(find_row(slug), 1, 28, seed=0).to(device)
    adam = torch.optim.Adam(learner.parameters(), 1e-3)

    def once():
        adam.zero_grad()
        learner.loss(episodes)[0].mean().backward()
        adam.step()

    return learner, once


def test_seconds(learner, data, device, tasks=20) -> float:
    """Of one test task of 15 queries per class."""
    work = partial(evaluate, learner, PartitionTasks(data), tasks=tasks, way=WAY, shot=SHOT, query=15, seed=0)
    return seconds(work, 2, device) / tasks


def seconds(work, repeats: int, device) -> float:
    return statistics.median(interleaved({"": work}, repeats, device)[""]) / 1e3


def main():
    args = arguments(__doc__)
    device, repeats = args.device, args.repeats
    data = images(device)
    start = torch.Generator().manual_seed(0)
    networks = {"VAE": VAE(generator=start).to(device), "GAN": MSGAN(generator=start).to(device)}
    made = {}
    for name, network in networks.items():
        made[name] = {a: seconds(sampler(data, network, a, device), max(3, repeats // a), device) / a for a in AHEAD}
    episodes = LatentTasks(data, networks["GAN"]).sample(TASKS, WAY, SHOT, QUERY, torch.Generator(device))
    column = 0.0
    for name, slug in {"MAML": "ro-gan-maml-02", "ProtoNets": "ro-gan-protonets-02"}.items():
        learner, once = meta_step(slug, episodes, device)
        step = seconds(once, repeats, device)
        for generator, times in made.items():
            told = ", ".join(f"{a} ahead {1e3 * t:5.1f} ms ({100 * t / (t + step):2.0f} %)" for a, t in times.items())
            least = min(times.values())
            print(f"{generator}-{name}: meta-step {1e3 * step:5.1f} ms; generation for a step {told}; "
                  f"{TASKS / (step + least):.0f} tasks a second", flush=True)  # fmt: skip
        cell = STEPS * (step + min(made["GAN"].values())) + TEST_TASKS * test_seconds(learner, data, device)
        column += CELLS / 2 * cell
    gan = MSGAN(generator=start, autocast=True).to(device)
    gan.train()
    gan.opt = gan.optimizers()
    index, noise = torch.arange(128, device=device), torch.Generator(device).manual_seed(0)
    update = seconds(lambda: gan.step(data.images, index, noise), 5, device)
    training = EPOCHS * (20 * CHARACTERS // 128) * update
    print(f"the GAN column of Table 7: {training / 60:.0f} min for {EPOCHS} epochs of the GAN ({1e3 * update:.0f} ms "
          f"an update, bfloat16) and {column / 60:.0f} min for {CELLS} cells")  # fmt: skip


if __name__ == "__main__":
    main()
