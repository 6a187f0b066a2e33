"""Episodes per second, and sampling as a share of a training step.

python benchmarks/sampling.py
python benchmarks/sampling.py --device cuda
"""

from __future__ import annotations

import torch
from harness import arguments, interleaved

from umeta_core.data import ImageSet
from umeta_core.episodes import PartitionTasks
from umeta_core.maml import MAML
from umeta_core.networks import Conv4
from umeta_core.protonets import ProtoNet


def image_set(classes, each, channels, size, device):
    images = torch.randint(0, 256, (classes * each, channels, size, size), dtype=torch.uint8)
    labels = torch.arange(classes).repeat_interleave(each)
    return ImageSet(images, labels, [str(c) for c in range(classes)], [], "noise", "train").to(device)


def main():
    args = arguments(__doc__)
    device = args.device
    cases = {  # learner, source and task as in CACTUs' tables
        "MAML Omniglot 20-way": (
            MAML(Conv4(1, 28, 32, way=20, downsample="stride", head="mean", norm="shift")),
            image_set(1100, 20, 1, 28, device),
            (8, 20, 1, 5),
        ),
        "ProtoNets Omniglot 20-way": (ProtoNet(Conv4(1, 28, 64)), image_set(1100, 20, 1, 28, device), (1, 20, 1, 15)),
        "MAML mini-ImageNet 5-way": (
            MAML(Conv4(3, 84, 32, way=5, norm="shift")),
            image_set(64, 100, 3, 84, device),
            (8, 5, 1, 5),
        ),
    }
    for name, (learner, images, task) in cases.items():
        source, generator = PartitionTasks(images), torch.Generator(device).manual_seed(0)
        learner.to(device)
        episodes = source.sample(*task, generator)

        def step(learner=learner, episodes=episodes):
            learner.zero_grad()
            learner.loss(episodes)[0].mean().backward()

        times = interleaved(
            {
                "sample": lambda source=source, task=task, generator=generator: source.sample(*task, generator),
                "step": step,
            },
            args.repeats,
            device,
        )
        sample, train = (sorted(t)[len(t) // 2] for t in times.values())
        print(
            f"  {name:26s} {task[0] / sample * 1e3:8.0f} episodes/s   "
            f"sampling {sample:6.2f} ms of a step of {train:7.1f} ms: {100 * sample / train:.1f} %"
        )


if __name__ == "__main__":
    main()
